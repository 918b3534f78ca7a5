"""What several files of tests use: builders, fixtures, and what to compare.

`books` are in memory, `keeper` has a log on disk, `service` is a real process. assert_same(a, b)
says that two books, or keepers, are the same: that is what "as if it had never been" means.
"""

import csv
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import defaultdict
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from sklearn.isotonic import IsotonicRegression

import replay
from bookkeep import (
    CHUNK,
    SPECIFICITY,
    UNSAVED,
    Batch,
    Bookkeeper,
    Books,
    Calibration,
    History,
    Log,
    NotReady,
    chunks,
    precision_recall,
    scan,
    suggest,
)
from bookkeep_extra.views import report

settings.register_profile("quick", max_examples=50, deadline=None)
settings.load_profile("quick")


def pytest_collection_modifyitems(items):
    """Has one process run all of a file that makes something once for all of its tests."""
    for item in items:
        if item.path.name in ("test_cluster.py", "test_data.py", "test_page.py"):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


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


def write_csv(path, rows, encoding="utf-8", **how):
    """The rows as a CSV file."""
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0], **how)
        writer.writeheader()
        writer.writerows(rows)
    return path


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


def wait_until(condition):
    """Returns once it holds; fails if it does not within 30 seconds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def batches_of(samples, size):
    return [samples[i : i + size] for i in range(0, len(samples), size)]


@pytest.fixture
def path(tmp_path):
    """Of a log that is not there yet, nor its folder."""
    return tmp_path / "folder" / "log.jsonl"


# What a log holds, whoever owns it


def read(path):
    """Its records, as a start reads them."""
    log = Log(path)
    try:
        return list(log.read())
    finally:
        log.close()


def scanned(path):
    """The records of all whole batches."""
    batches = (found for found in scan(path) if isinstance(found, Batch))
    return [record for batch in batches for record in batch.records]


def read_lines(path):
    """What JSON says that its lines are."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def written(path, batches, name=None):
    """Makes a log with these batches, so named; its lines, each with its newline."""
    log = Log(path)
    assert list(log.read()) == []
    for batch in batches:
        log.append([(name and f"{name}{len(log)}", batch)])
    log.close()
    return path.read_bytes().splitlines(keepends=True)


def line_of(record):
    """A line of a log that says this, and the checksum of it."""
    text = json.dumps(record, ensure_ascii=False)[:-1].encode()
    return b'%s, "crc": %d}\n' % (text, zlib.crc32(text))


def changed(line, **values):
    """The line with other values, and a checksum that fits them; without those that are None."""
    record = json.loads(line) | values
    del record["crc"]
    return line_of({key: value for key, value in record.items() if value is not None})


# Books and keepers, and what they answer


@pytest.fixture
def books():
    """Books in memory, with nothing in them."""
    return Books()


def learn(books, samples):
    """Has books in memory book a batch, as the next lines of a log; their records."""
    records, rows = books.draft(samples)
    first = len(books.history.rows)
    places = [{"seq": first + i, "batch": first} for i in range(len(records))]
    records = [place | record for place, record in zip(places, records, strict=True)]
    books.enter(records, rows)
    return records


def books_of(path, context=(), target="AccountNumber"):
    """Books that have read all of a log, whoever owns it."""
    books, records = Books(context, target), scanned(path)
    for chunk in chunks(records, CHUNK):
        books.apply(chunk, lambda correction: records[correction["corrects"]])
    return books


@contextmanager
def bookkeeping(path, **options):
    """A keeper of the log, closed at the end."""
    keeper = Bookkeeper(Log(path), **options)
    try:
        yield keeper
    finally:
        keeper.close()


@pytest.fixture
def keeper(path):
    """A keeper of a new log."""
    with bookkeeping(path) as keeper:
        yield keeper


# Suggestions of an unknown company and account, one for each specificity and bin.
EVERY_BIN = np.zeros(len(SPECIFICITY) * Calibration.BINS, History.ROW)
EVERY_BIN["company"] = EVERY_BIN["predicted"] = -1
EVERY_BIN["specificity"], EVERY_BIN["bin"] = np.divmod(np.arange(len(EVERY_BIN)), Calibration.BINS)


def answers(books, asked=()):
    """All that books, or those of a keeper, say, as if nothing had a number; of these samples."""
    books, asked = getattr(books, "books", books), [*asked] or bookings(30, seed=1)
    model, history, calibration = books.model, books.history, books.calibration
    names = [account for account, n in zip(model.names, model.class_counts, strict=True) if n]
    columns = [model.accounts[name] for name in names]
    documents = [books.tokens(sample) for sample in asked]
    sums = model.sums[columns].tolist()
    accounts = [*history.accounts, None]
    companies = {number: company for company, number in history.companies.items()}
    said = {
        "tokens": model.n_tokens,
        "sums": dict(zip(names, sums, strict=True)),
        "bookings": [
            (companies[company], accounts[booked], accounts[named], accounts[predicted], *others)
            for _, company, booked, named, predicted, *others in history.rows.tolist()
        ],
        "corrected": [books.corrected[seq].lesson for seq in sorted(books.corrected)],
        "confidence": calibration.confidence(EVERY_BIN).tolist(),
        "confidence of others": calibration.shared(np.array([0.5])).tolist(),
        "evidence": calibration.evidence_counts(np.concatenate([EVERY_BIN, history.rows])),
    }
    if names:
        top, _ = model.suggest(documents, len(names))
        said["scores"] = [[(model.names[i], score) for score, i in each] for each in top]
    with suppress(NotReady):  # where nothing was learned, or nothing predicted
        said["suggestions"] = suggest(books, asked, 3)
        said["lessons"] = model.weigh(documents, [sorted(names)[0]] * len(asked))
        said["report"] = report(books, 10_000)
    return said


def assert_same(one, other, asked=()):
    """Two books, or keepers, or what one of them answered before, say the same of all."""
    one, other = (each if isinstance(each, dict) else answers(each, asked) for each in (one, other))
    for about in one | other:
        assert one.get(about) == other.get(about), about


def settled(keeper):
    """Returns once the writer has nothing to do and no snapshot is on its way."""
    keeper.book([])
    keeper.book([])  # the writer has looked whether a snapshot is due after the first
    for thread in threading.enumerate():
        if thread.name == "saving":
            thread.join()


@contextmanager
def held_at_the_disk(calls):
    """Inside, the first of these calls waits for the disk and the others behind it, in order.

    Gives the fsyncs that it sees; afterwards, all calls have come back.
    """
    called, let_go, fsyncs, waiting = threading.Event(), threading.Event(), [], []
    fsync, result = os.fsync, Future.result

    def wait(file):
        fsyncs.append(file)
        called.set()
        assert let_go.wait(30)
        fsync(file)

    def wait_for_it(future, *more):
        waiting.append(future)
        return result(future, *more)

    threads = [threading.Thread(target=call) for call in calls]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", wait)
        patch.setattr(Future, "result", wait_for_it)
        for number, thread in enumerate(threads, start=1):
            thread.start()
            wait_until(lambda number=number: len(waiting) == number)
            assert called.wait(30)
        try:
            yield fsyncs
        finally:
            let_go.set()
            for thread in threads:
                thread.join()


def answer_of(keeper, samples, name):
    """The numbers that the samples got, or what was raised."""
    try:
        return keeper.book(samples, name)
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
        unsaved=UNSAVED,
        program=(SERVICE,),
        under=(),
        reads=True,
    ):
        """Waits until it has read its log, or answers that it `reads` it not yet."""

        def prepare():
            for number in (signal.SIGINT, signal.SIGHUP):  # a job in the background ignores them
                signal.signal(number, signal.SIG_DFL)
            if limit:
                limit()

        self.port = port or free_port()
        self.messages = log.with_suffix(".stderr")
        with open(self.messages, "wb") as stderr:
            self.process = subprocess.Popen(
                [*under, sys.executable, *program, f"--log={log}", f"--port={self.port}", *options],
                env=os.environ | {"BOOKKEEP_UNSAVED": str(unsaved)},
                cwd=HERE,
                stderr=stderr,
                preexec_fn=prepare,
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


# What Calibration is to make of a log, as its formulas say it


def judged(path):
    """What the log says of each suggestion, as it stands by now."""
    records = scanned(path)
    last = {r["corrects"]: r["AccountNumber"] for r in records if "corrects" in r}
    found = []
    for record in records:
        if record.get("predicted") is None:
            continue
        sample = record["sample"]
        found.append(
            {
                "seq": record["seq"],
                "company": sample["CompanyId"],
                "booked": last.get(record["seq"], sample["AccountNumber"]),
                "predicted": record["predicted"],
                "bin": bin_of(record["margin"]),
                "known": record["known"],
                "score_weight": {"suggestion": 0, "check": 16}.get(sample.get("BookedBy"), 1),
            }
        )
    return found


def bin_of(margin):
    return min(int(4 * np.log2(1 + (margin or 0))), 27)


def pooled(right, counted):
    """Shares of bins, made monotone by scikit-learn; an empty one has that of the one before."""
    filled = np.flatnonzero(counted)
    if not len(filled):
        return np.zeros(28)
    shares = IsotonicRegression().fit_transform(
        filled, right[filled] / counted[filled], sample_weight=counted[filled]
    )
    at = filled.searchsorted(np.arange(28), side="right") - 1
    return np.where(at < 0, 0, shares[at])


def own_by_hand(rows, asked, name):
    """The company's own of these rows, with the same of that name and about as much evidence."""
    return [
        row
        for row in rows
        if row["score_weight"]
        and (row["company"], row[name]) == (asked["company"], asked[name])
        and abs(row["bin"] - asked["bin"]) <= 2
    ]


def everybodys_by_hand(rows):
    """(6, 28) right, and all, that companies count together, by what was known and evidence."""
    right, counted = np.zeros((2, 6, 28))
    drawn, cells = defaultdict(lambda: [0, 0]), defaultdict(lambda: np.zeros((2, 2), dtype=int))
    for row in rows:
        if row["score_weight"] != 1:
            drawn[row["company"]][row["score_weight"] > 1] += 1
        if row["score_weight"]:
            values = cells[row["company"], row["known"], row["bin"]][int(row["score_weight"] > 1)]
            values += [1, row["booked"] == row["predicted"]]
    for (company, *cell), (persons, checked) in cells.items():
        unseen, checks = drawn[company]
        if checks:
            persons += checked * (unseen + checks) // checks
        n, hits = persons.tolist()
        root = round(1024 * math.sqrt(n))
        counted[*cell] += root / 1024
        right[*cell] += root * hits // n / 1024
    return right, counted


def tally_by_hand(rows):
    right = sum(row["booked"] == row["predicted"] for row in rows)
    return {"suggestions": len(rows), "right": right}


def confidence_by_hand(rows, asked):
    """The confidence of a suggestion after these rows, as the formula says it."""
    rights, counts = everybodys_by_hand(rows)
    right, counted = rights.sum(axis=0), counts.sum(axis=0)
    there = counted > 0
    g = pooled(right, counted + 2 * there)
    right, counted = rights[asked["known"]] + 3 * g, counts[asked["known"]] + 3
    share = pooled(right, counted * there)[asked["bin"]]
    for name in ("known", "predicted"):
        own = tally_by_hand(own_by_hand(rows, asked, name))
        share = (own["right"] + 100 * share) / (own["suggestions"] + 100)
    return share
