"""The tests, in the order of bookkeep.py's sections, then replay.py, the synthetic data, bench.py.

What several sections use stands first.

What is said of processes, signals and disks is tried on real ones. Oracles: scikit-learn for the
model and the metrics.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from sklearn.isotonic import IsotonicRegression

import bookkeep
import replay
from bookkeep import (
    GRAIN,
    Bookkeeper,
    Copy,
    History,
    Lesson,
    Log,
    NaiveBayes,
    precision_recall,
    scan,
    tokens,
)

settings.register_profile("untimed", deadline=None)  # speed is the benchmark's matter
settings.load_profile("untimed")

HERE = Path(__file__).parent
SERVICE = HERE / "bookkeep.py"
SYNTHETIC = HERE / "data" / "bank_expenses_synthetic.csv.zip"
REAL = HERE / "data" / "bank_expenses_obfuscated.csv.zip"


def booking(company="A", text="rent May", amount="> -1000", account="3115", **more):
    """A sample with these values."""
    return {
        "CompanyId": company,
        "BankEntryText": text,
        "BankEntryAmount": amount,
        "AccountNumber": account,
        **more,
    }


def by(who, sample=None, **more):
    """A booking that says who booked it."""
    return (sample or booking(**more)) | {"BookedBy": who}


def bookings(n, seed=0):
    """So many bookings that a model can learn something from."""
    rng = random.Random(seed)
    merchants = [f"shop{rng.randrange(40)}" for _ in range(n)]
    return [
        booking(
            company=f"company{rng.randrange(5)}",
            text=f"{merchant} ref{rng.randrange(10**6)}",
            amount=rng.choice(["< 10", "> -1000"]),
            account=str(3000 + int(merchant[4:]) % 7 + rng.randrange(2)),
        )
        for merchant in merchants
    ]


def parse_samples(body, **options):
    return bookkeep.check_samples(bookkeep.parse_json(body), **options)


def suggested_by(bookkeeper, sample, top, place=0, book_from=None):
    """What is suggested for a sample in that place of a request."""
    [answer] = bookkeeper._suggest([sample], place, top, book_from, True)
    return answer


def wait_until(condition):
    """Returns once it holds; fails if it does not within 30 seconds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def batches_of(samples, size):
    return [samples[i : i + size] for i in range(0, len(samples), size)]


KIND = 1 << bookkeep.KIND_SHIFT


def taught(bookings, chunks=(), **constants):
    """A model that has learned these (document, lesson), in chunks of these sizes."""
    model = NaiveBayes(**constants)
    rest = list(bookings)
    for size in (*chunks, len(rest)):
        chunk, rest = rest[:size], rest[size:]
        model.learn([document for document, _ in chunk], [lesson for _, lesson in chunk])
    return model


def entries_of(counts):
    """All of its sums that are not zero: token, account, N, M."""
    for row in counts.sizes.nonzero()[0].tolist():
        units = np.zeros(counts.dense_units.shape[1:])
        if counts.sizes[row] == bookkeep.DENSE:
            units[:] = counts.dense_units[counts.starts[row]]
        _, column, entered = counts.take(np.array([row]))
        units[column >> 1, column & 1] += entered
        for account in units.any(axis=1).nonzero()[0].tolist():
            n, m = (units[account] / GRAIN).tolist()
            yield int(counts.vocabulary.tokens[row]), account, n, m


def counts(model):
    """All that a model has counted, whatever the order in which it did."""
    classes = zip(model.names, model.class_counts, model.feature_counts.T.tolist(), strict=True)
    return {
        "classes": {name: (n, features) for name, n, features in classes if n or any(features)},
        "tokens": {
            (token, model.names[account]): (n, m)
            for token, account, n, m in entries_of(model.token_counts)
        },
        "known": model.token_counts.occupied.tolist(),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "log.jsonl"


def read(path):
    log = Log(path)
    try:
        return list(log.read())
    finally:
        log.close()


def written(path, batches, name=None):
    """Makes a log with these batches, so named; its lines, each with its newline."""
    log = Log(path)
    assert list(log.read()) == []
    for batch in batches:
        log.append([(name and f"{name}{len(log)}", batch)])
    log.close()
    return path.read_bytes().splitlines(keepends=True)


def empty(log, seqs):
    """Takes a copy without these records for the log."""
    with Copy(log) as copy:
        copy.extend(np.array(sorted(seqs)), len(log))
        log.replace(copy)


def changed(line, **values):
    """The line with other values, and a checksum that fits them."""
    return bookkeep._line(bookkeep._parse(line) | values)


def scanned(log):
    """The records of all whole batches in a log, whoever owns it."""
    return [record for found in scan(log) for record in getattr(found, "records", [])]


def read_lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@contextmanager
def bookkeeping(path, **options):
    """A bookkeeper on the log, closed at the end."""
    bookkeeper = Bookkeeper(Log(path), **options)
    try:
        yield bookkeeper
    finally:
        bookkeeper.close()


def state(bookkeeper, asked):
    """All that a bookkeeper knows and says."""
    model = bookkeeper._model
    scores = model.joint_log_likelihood([tokens(sample) for sample in asked])
    return (
        counts(model),
        {
            name: scores[:, number].tolist()
            for number, name in enumerate(model.names)
            if model.class_counts[number]
        },
        bookkeeper.predict(asked),
        [suggested_by(bookkeeper, sample, 3) for sample in asked[:5]],
        [bookkeeper.metrics(n) for n in (1, 10, 100, 10_000)],
        bookkeeper.health() | {"status": "", "uptime": 0},
    )


def settled(bookkeeper):
    """Returns once the writer has nothing to do and no snapshot is on its way."""
    bookkeeper.book([])
    bookkeeper.book([])  # the writer has looked whether a snapshot is due after the first
    bookkeeper._end_saving()


def standing(path):
    """What counts by the log: (tokens, lesson) of each booking, as last corrected."""
    records = {record["seq"]: record for record in scanned(path)}
    last = {record["corrects"]: record for record in records.values() if "corrects" in record}
    return [
        (
            tokens(record["sample"]),
            Lesson(
                last.get(seq, record["sample"])["AccountNumber"],
                last.get(seq, record)["weight"],
                last.get(seq, record).get("against", {}),
            ),
        )
        for seq, record in records.items()
        if "weight" in last.get(seq, record) and "sample" in record
    ]


@contextmanager
def held_at_the_disk(bookkeeper, calls):
    """Inside, the first of these calls waits for the disk and the others behind it, in order.

    Gives the fsyncs that it sees; afterwards, all calls have come back.
    """
    called, let_go, fsyncs = threading.Event(), threading.Event(), []
    fsync = os.fsync

    def wait(file):
        fsyncs.append(file)
        called.set()
        assert let_go.wait(30)
        fsync(file)

    threads = [threading.Thread(target=call) for call in calls]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", wait)
        threads[0].start()
        assert called.wait(30)
        for waiting, thread in enumerate(threads[1:], start=1):
            thread.start()
            wait_until(lambda waiting=waiting: len(bookkeeper._writer._queue) == waiting)
        try:
            yield fsyncs
        finally:
            let_go.set()
            for thread in threads:
                thread.join()


def answer_of(bookkeeper, samples, name):
    """The numbers that the samples got, or what was raised."""
    try:
        return bookkeeper.book(samples, name)
    except Exception as error:
        return type(error)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Service:
    """A real bookkeep.py in a process of its own."""

    def __init__(
        self,
        log,
        *options,
        port=None,
        limit=None,
        unsaved=bookkeep.UNSAVED,
        program=(SERVICE,),
        under=(),
        reads=True,
    ):
        """Waits until it has read its log, or answers that it `reads` it not yet."""
        self.port = port or free_port()
        self.messages = log.with_suffix(".stderr")
        with open(self.messages, "wb") as stderr:
            self.process = subprocess.Popen(
                [
                    *under,
                    *(sys.executable, *program),
                    *(f"--log={log}", f"--port={self.port}"),
                    *options,
                ],
                env=os.environ | {"BOOKKEEP_UNSAVED": str(unsaved)},
                cwd=HERE,
                stderr=stderr,
                preexec_fn=limit,
            )
        wanted = 200 if reads else 503
        wait_until(lambda: self.process.poll() is not None or self.answers() == wanted)

    def answers(self):
        """What it says of its health, if it listens."""
        with suppress(OSError, HTTPException):
            return self.get("/health")[0]

    def ask(self, method, path, content=None, *, body=None, headers=None, kind="application/json"):
        """The status, the headers and the answer, read as JSON if it must be that."""
        if content is not None:
            body = json.dumps(content).encode()
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(
                method, path, body, {"Content-Type": "application/json"} | (headers or {})
            )
            response = connection.getresponse()
            assert kind in (None, response.headers["Content-Type"])
            answer = response.read()
            return (
                response.status,
                response.headers,
                json.loads(answer) if kind == "application/json" else answer,
            )
        finally:
            connection.close()

    def get(self, path):
        status, _, answer = self.ask("GET", path)
        return status, answer

    def delete(self, path):
        status, _, answer = self.ask("DELETE", path)
        return status, answer

    def post(self, path, content):
        status, _, answer = self.ask("POST", path, content)
        return status, answer

    def samples(self):
        return self.get("/health")[1]["samples"]

    def stop(self, number=signal.SIGTERM):
        """The exit status after this signal."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def said(self):
        return self.messages.read_text()


def request(path, content=None, method="POST", **headers):
    """The bytes of a request, with this as JSON."""
    body = b"" if content is None else json.dumps(content).encode()
    headers = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": len(body),
        "Authorization": "Bearer secret",
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *map("{0[0]}: {0[1]}".format, headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.fixture
def serve(tmp_path):
    """Starts services, and kills them at the end."""
    services = []

    def start(*options, log=tmp_path / "log.jsonl", **more):
        services.append(Service(log, *options, **more))
        return services[-1]

    yield start
    for service in services:
        service.process.kill()
        service.process.wait()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """One that all tests share which store nothing in it."""
    service = Service(tmp_path_factory.mktemp("shared") / "log.jsonl", "--max-body=300000")
    assert service.post("/sample", [booking(account="1")])[0] == 200
    assert service.post("/sample", [booking(account="1")])[0] == 200
    yield service
    service.process.kill()
    service.process.wait()


def run(*command, **options):
    """Runs a command to its end: (exit status, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=60, **options
    )
    return done.returncode, done.stdout, done.stderr


def refused(log, *options, **more):
    status, out, said = run(HERE / "bookkeep.py", f"--log={log}", "--port=0", *options, **more)
    assert (status, out) == (1, "")
    assert said.startswith("bookkeep: ")
    assert said.count("\n") == 1
    return said


def prequential(path):
    """Each batch of the rows by date predicted whole: accuracy, the mean macro precision and recall
    of windows of 1,000, and the expected calibration error (ten equal bins) of the second half.
    """
    rows = replay.by_date(replay.read_rows(path))
    with tempfile.TemporaryDirectory() as folder:
        with bookkeeping(Path(folder) / "log.jsonl") as bookkeeper:
            for batch in replay.batches(rows, 1000, seed=0):
                bookkeeper.book(batch)
        records = read_lines(Path(folder) / "log.jsonl")
    booked = np.array([row["AccountNumber"] for row in rows])
    predicted = np.array([record["predicted"] or "" for record in records])
    confidence = np.array([record["confidence"] or 0 for record in records])
    windows = [
        precision_recall(booked[end - 1000 : end], predicted[end - 1000 : end])
        for end in range(2000, len(rows) + 1, 1000)
    ]
    right = booked == predicted
    late = np.arange(len(rows)) >= len(rows) // 2
    bins = np.minimum(confidence * 10, 9).astype(int)
    error = sum(
        abs(right[late & (bins == bin)].sum() - confidence[late & (bins == bin)].sum())
        for bin in range(10)
    )
    return right.mean(), *np.mean(windows, axis=0), error / late.sum()


def add_rows(history, rows):
    """Adds rows to a history, each a dict of what differs from these."""
    usual = {"seq": 0, "company": "A", "booked": "1", "predicted": "1", "confidence": 0.5}
    usual |= {"bin": 9, "known": 3, "rank": 0, "times": 1}
    rows = [usual | row for row in rows]
    numbers = ("seq", "confidence", "bin", "known", "rank", "times")
    table = np.zeros(len(rows), History.ROW)
    for name in numbers:
        table[name] = [row[name] for row in rows]
    table["reviewed"] = table["times"] > 0
    names = [(row["company"], row["booked"], row.get("named"), row["predicted"]) for row in rows]
    history.append(table, names)
    return history.rows[-len(rows) :] if rows else history.rows[:0]


def judged(path):
    """What the log says of each suggestion that is scored, as it stands by now."""
    records = scanned(path)
    last = {r["corrects"]: r["AccountNumber"] for r in records if "corrects" in r}
    found = []
    for record in records:
        if record.get("predicted") is None:
            continue
        sample = record["sample"]
        booked = last.get(record["seq"], sample["AccountNumber"])
        found.append(
            {
                "company": sample["CompanyId"],
                "booked": booked,
                "predicted": record["predicted"],
                "bin": bin_of(record["margin"], sample),
                "known": record["known"],
                "times": {"suggestion": 0, "check": 16}.get(sample.get("BookedBy"), 1),
            }
        )
    return [row for row in found if row["times"]]


def bin_of(margin, sample):
    return min(int(6 * np.log2(1 + 8 * (margin or 0) / len(tokens(sample)))), 47)


def pooled(right, counted):
    """Shares of bins, made monotone by scikit-learn; an empty one has that of the one before."""
    filled = np.flatnonzero(counted)
    if not len(filled):
        return np.zeros(48)
    shares = IsotonicRegression().fit_transform(
        filled, right[filled] / counted[filled], sample_weight=counted[filled]
    )
    at = filled.searchsorted(np.arange(48), side="right") - 1
    return np.where(at < 0, 0, shares[at])


def own_by_hand(rows, asked, name):
    """The company's own of these rows, with the same of that name and about as much evidence."""
    return [
        row
        for row in rows
        if row["known"] > 0
        and (row["company"], row[name]) == (asked["company"], asked[name])
        and abs(row["bin"] // 4 - asked["bin"] // 4) <= 1
    ]


def tally_by_hand(rows):
    right = sum(row["booked"] == row["predicted"] for row in rows)
    return {"suggestions": len(rows), "right": right}


def confidence_by_hand(rows, asked):
    """The confidence of a suggestion after these rows, as the formula says it."""

    def sums(rows):
        right, counted = np.zeros(48), np.zeros(48)
        for row in rows:
            counted[row["bin"]] += row["times"]
            right[row["bin"]] += row["times"] * (row["booked"] == row["predicted"])
        return right, counted

    right, anybodys = sums(rows)
    g = pooled(right, np.where(anybodys > 0, anybodys + 2, 0))
    right, counted = sums(row for row in rows if row["known"] == asked["known"])
    share = pooled(right + 2 * g, np.where(anybodys > 0, counted + 2, 0))[asked["bin"]]
    for name in ("known", "predicted"):
        own = tally_by_hand(own_by_hand(rows, asked, name))
        share = (own["right"] + 20 * share) / (own["suggestions"] + 20.25)
    return share


def sums_of(calibration):
    """All that it has counted, wherever it keeps that."""
    cells, own = calibration._cells.tokens, calibration._own
    kept = dict(zip(cells.tolist(), own.tolist(), strict=True))
    return (
        calibration._all.tolist(),
        calibration._right.tolist(),
        calibration._ranks.tolist(),
        {cell: counted for cell, counted in kept.items() if any(counted)},
    )
