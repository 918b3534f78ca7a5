"""bench: measures bookkeep beside what one would use instead, on the same data, in one run.

`python bench.py [CSV or ZIP]` streams the rows by date, in batches of random size, to each model;
every batch is predicted whole before any of it is learned. Then it measures the service over HTTP,
beside a handler that does nothing but read and answer JSON, and how it grows. Absolute times are
those of this machine in this hour; the ratios are what to look at.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import replay
from bookkeep import (
    FEATURES,
    TARGET,
    NaiveBayes,
    Sample,
    chunks,
    precision_recall,
    tokens,
)

WINDOW = 1000  # predictions that macro averages are over
SIZES = (10_000, 50_000, 100_000, 1_000_000)  # bookings at which the service is looked at
LAST = 10_000  # bookings, the last before, that its speed is taken from
SERVICE = replay.HERE / "bookkeep.py"
BARE = """
import sys, json, bottle, waitress
app = bottle.Bottle()
@app.post("/predict")
def predict():
    json.loads(bottle.request.body.read())
    bottle.response.content_type = "application/json"
    return json.dumps(["3115"])
port = int(sys.argv[1].removeprefix("--port="))
waitress.serve(app, host="127.0.0.1", port=port, threads=16)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the options say and prints tables, or JSON; the exit status."""
    options = _options(arguments)
    results = {"machine": f"{os.cpu_count()} cores, Python {sys.version.split()[0]}"}
    try:
        rows = replay.by_date(replay.read_rows(options.file))
        results["file"] = {"name": options.file.name, "rows": len(rows)}
        if options.part in ("models", "all"):
            results["models"] = compare_models(rows, options.repeats)
        if options.part in ("service", "all"):
            results["service"] = measure_service(rows, options.repeats)
        if options.part in ("scale", "all"):
            results["scale"] = measure_scale(options.most)
    except (replay.Failed, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(results) if options.json else "\n".join(in_words(results)))
    return 0


# ----------------------------------------------------------------------------------------- Models


class Bookkeep:
    """The model of this repository."""

    rows = None

    def __init__(self, accounts: list[str]) -> None:
        self.model = NaiveBayes()

    def step(self, batch: list[Sample]) -> list[str]:
        """The predictions for a batch, which is learned then."""
        documents = [tokens(sample) for sample in batch]
        labels = [sample[TARGET] for sample in batch]
        predicted = [""] * len(batch)
        for part, assessments, _ in self.model.book(documents, labels):
            predicted[part] = [made.predicted or "" for made in assessments]
        return predicted


class Refitted:
    """scikit-learn's MultinomialNB on words, company, amount: fitted anew on all at each batch."""

    needs = "sklearn"
    rows = 10_000

    def __init__(self, accounts: list[str]) -> None:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.naive_bayes import MultinomialNB
        from sklearn.pipeline import make_pipeline

        self.pipeline = make_pipeline(CountVectorizer(analyzer=str.split), MultinomialNB())
        self.texts: list[str] = []
        self.labels: list[str] = []

    def step(self, batch: list[Sample]) -> list[str]:
        """The predictions for a batch, which is learned then."""
        texts = [
            f"company={s['CompanyId']} amount={s['BankEntryAmount'].replace(' ', '_')} "
            + s["BankEntryText"]
            for s in batch
        ]
        predicted = self.pipeline.predict(texts).tolist() if self.texts else [""] * len(batch)
        self.texts += texts
        self.labels += [sample[TARGET] for sample in batch]
        self.pipeline.fit(self.texts, self.labels)
        return predicted


class PartiallyFitted:
    """scikit-learn's MultinomialNB.partial_fit on bookkeep's tokens, hashed to 65,536 columns."""

    needs = "sklearn"
    rows = 10_000

    def __init__(self, accounts: list[str]) -> None:
        from sklearn.feature_extraction import FeatureHasher
        from sklearn.naive_bayes import MultinomialNB

        self.hasher = FeatureHasher(1 << 16, input_type="string", alternate_sign=False)
        self.model = MultinomialNB(alpha=0.01)
        self.accounts = sorted(accounts)

    def step(self, batch: list[Sample]) -> list[str]:
        """The predictions for a batch, which is learned then."""
        documents = self.hasher.transform(map(str, tokens(sample)) for sample in batch)
        known = hasattr(self.model, "classes_")
        predicted = self.model.predict(documents).tolist() if known else [""] * len(batch)
        labels = [sample[TARGET] for sample in batch]
        self.model.partial_fit(documents, labels, None if known else self.accounts)
        return predicted


class River:
    """A River classifier on bookkeep's tokens, one sample after the other."""

    needs = "river"
    rows = 2_000
    name = "MultinomialNB"

    def __init__(self, accounts: list[str]) -> None:
        from river import naive_bayes

        self.model = getattr(naive_bayes, self.name)(alpha=0.02)

    def step(self, batch: list[Sample]) -> list[str]:
        """The predictions for a batch, which is learned then."""
        documents = [Counter(map(str, tokens(sample))) for sample in batch]
        predicted = [self.model.predict_one(document) or "" for document in documents]
        for document, sample in zip(documents, batch, strict=True):
            self.model.learn_one(document, sample[TARGET])
        return predicted


class RiverComplement(River):
    """River's ComplementNB."""

    rows = 1_000
    name = "ComplementNB"


class VowpalWabbit:
    """Vowpal Wabbit's one-against-all on crossed words, company and amount.

    It must know all accounts from the start. With fewer than 28 bits its weights for so many
    accounts collide.
    """

    needs = "vowpalwabbit"
    rows = None
    options = "-q ct -q cx -q ca"

    def __init__(self, accounts: list[str]) -> None:
        import vowpalwabbit

        options = f"--loss_function hinge -l 1 -b 28 --quiet {self.options}"
        self.vw = vowpalwabbit.Workspace(f"--oaa {len(accounts)} {options}")
        self.names = ["", *accounts]
        self.numbers = {name: number for number, name in enumerate(self.names)}

    def step(self, batch: list[Sample]) -> list[str]:
        """The predictions for a batch, which is learned then."""
        examples = [self.example(sample) for sample in batch]
        predicted = [self.names[self.vw.predict(example)] for example in examples]
        for example, sample in zip(examples, batch, strict=True):
            self.vw.learn(f"{self.numbers[sample[TARGET]]} {example}")
        return predicted

    def example(self, sample: Sample) -> str:
        """The sample in Vowpal Wabbit's text format."""
        company, text, amount = (sample[key].translate(ESCAPES) for key in FEATURES)
        words = sample["BankEntryText"].translate(str.maketrans(":|", "__"))
        return f"|c {company} |t {words} |x {text} |a {amount}"


class VowpalWabbitOnTokens(VowpalWabbit):
    """Vowpal Wabbit's strongest setting that was found: on bookkeep's tokens, slower to settle."""

    options = "--power_t .3"

    def example(self, sample: Sample) -> str:
        """The sample's tokens: as words, for it takes a number for a place in its table."""
        return "|t " + " ".join(f"t{token}" for token in tokens(sample))


ESCAPES = str.maketrans(" :|", "___")
MODELS = {
    "bookkeep": Bookkeep,
    "Vowpal Wabbit -q ct -q cx -q ca": VowpalWabbit,
    "Vowpal Wabbit, same tokens": VowpalWabbitOnTokens,
    "River MultinomialNB": River,
    "River ComplementNB": RiverComplement,
    "scikit-learn partial_fit": PartiallyFitted,
    "scikit-learn refitted": Refitted,
}


def compare_models(rows: list[Sample], repeats: int) -> dict[str, dict]:
    """The figures of each model, on the first rows if it is slow, or what it needs to be there.

    Beside them, those of bookkeep on the same rows.
    """
    found: dict[str, list[dict]] = {name: [] for name in MODELS}
    missing = {
        name: model.needs
        for name, model in MODELS.items()
        if hasattr(model, "needs") and not find_spec(model.needs)
    }
    for repeat, (name, model) in itertools.product(range(repeats), MODELS.items()):
        if name not in missing:
            _say(f"{name}, {repeat + 1} of {repeats}")
            figures = _in_a_process(evaluate, model, rows[: model.rows])
            if model is not Bookkeep:
                ours = _in_a_process(evaluate, Bookkeep, rows[: model.rows])
                times = ours["samples_per_second"] / figures["samples_per_second"]
                figures |= {"bookkeep_accuracy": ours["accuracy"], "bookkeep_times_as_fast": times}
            found[name].append(figures)
    return {
        name: medians(found[name]) if name not in missing else {"not_installed": missing[name]}
        for name in MODELS
    }


def evaluate(model_of: Callable, rows: list[Sample]) -> dict:
    """How good and how fast a model is on the rows."""
    accounts = list(dict.fromkeys(row[TARGET] for row in rows))
    batches = list(replay.batches(rows, 1000, seed=0))
    before = _memory("VmHWM")
    model = model_of(accounts)
    predicted: list[str] = []
    started = time.perf_counter()
    for batch in batches:
        predicted += model.step(batch)
    seconds = time.perf_counter() - started
    booked = np.array([row[TARGET] for row in rows])
    guessed = np.array(predicted)
    windows = [
        precision_recall(booked[end - WINDOW : end], guessed[end - WINDOW : end])
        for end in range(2 * WINDOW, len(booked) + 1, WINDOW)
    ]
    precision, recall = np.mean(windows, axis=0) if windows else (None, None)
    return {
        "rows": len(booked),
        "accuracy": float((booked == guessed).mean()),
        "precision": precision,
        "recall": recall,
        "samples_per_second": len(booked) / seconds,
        "megabytes": _memory("VmHWM") - before,
    }


def _in_a_process(measure: Callable, *arguments: object) -> dict:
    """What the function gives in a process of its own, so that its peak of memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(measure, *arguments).result()


def _memory(kind: str, process: int | str = "self") -> float:
    """The memory of a process in MB: VmRSS now, VmHWM the most that it had so far."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) / 1024


# ---------------------------------------------------------------------------------------- Service


def measure_service(rows: list[Sample], repeats: int) -> dict:
    """Requests and samples a second over HTTP, and how long predictions take."""
    found: dict[str, list[dict]] = {}
    asked = replay.without_account(rows[-1])
    predict = request("/predict", asked)
    for repeat in range(repeats):
        _say(f"service, {repeat + 1} of {repeats}")
        with (
            tempfile.TemporaryDirectory() as folder,
            replay.started(SERVICE, f"--log={folder}/log") as (port, _),
            replay.started("-c", BARE) as (bare_port, _),
        ):
            client = replay.Client(f"http://127.0.0.1:{port}")
            for number, batch in enumerate(chunks(rows, 500)):
                client.ask("POST", "/sample", batch, key=f"{number}")
            for connections in (1, 8):
                ours = measure_load(port, itertools.repeat(predict), connections)
                bare = measure_load(bare_port, itertools.repeat(predict), connections)
                share = ours["requests_per_second"] / bare["requests_per_second"]
                name = f"/predict, {connections} at once"
                found.setdefault(name, []).append(ours | {"share_of_bare": share})
            for size, connections in itertools.product((1, 50, 500), (1, 8)):
                bodies = [request("/sample", batch) for batch in chunks(rows, size)]
                load = measure_load(port, itertools.cycle(bodies), connections)
                load["samples_per_second"] = load["requests_per_second"] * size
                found.setdefault(f"/sample of {size}, {connections} at once", []).append(load)
            found.setdefault("/predict while 1,000s stream in", []).append(
                _busy(port, rows, predict)
            )
    return {name: medians(loads) for name, loads in found.items()}


def _busy(port: int, rows: list[Sample], predict: bytes) -> dict:
    """How long predictions take while another process sends batches of 1,000."""
    bodies = [request("/sample", batch) for batch in chunks(rows, 1000)]
    context = multiprocessing.get_context("fork")
    sender = context.Process(target=measure_load, args=(port, itertools.cycle(bodies), 1, 4.0))
    sender.start()
    time.sleep(0.5)
    load = measure_load(port, itertools.repeat(predict), 1, 3.0)
    sender.join()
    return load


def request(path: str, content: object) -> bytes:
    """The bytes of a POST with this as JSON."""
    body = json.dumps(content).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def measure_load(
    port: int, requests: Iterator[bytes], connections: int, seconds: float = 2.0
) -> dict:
    """Requests a second, and milliseconds for one, over so many connections for so long."""
    waits: list[float] = []
    ready = selectors.DefaultSelector()
    sent = {}
    for _ in range(connections):
        connection = socket.create_connection(("127.0.0.1", port))
        ready.register(connection, selectors.EVENT_READ, bytearray())
        sent[connection] = time.perf_counter()
        connection.sendall(next(requests))
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        for key, _ in ready.select(1):
            key.data.extend(key.fileobj.recv(1 << 16))
            if not _whole(key.data):
                continue
            if not key.data.startswith(b"HTTP/1.1 200"):
                raise replay.Failed(f"the service answered {bytes(key.data[:300])!r}")
            key.data.clear()
            now = time.perf_counter()
            waits.append(now - sent[key.fileobj])
            sent[key.fileobj] = now
            key.fileobj.sendall(next(requests))
    took = time.perf_counter() - started
    for connection in sent:
        connection.close()
    waits.sort()
    return {
        "requests_per_second": len(waits) / took,
        "p50": 1e3 * waits[len(waits) // 2],
        "p99": 1e3 * waits[len(waits) * 99 // 100],
    }


def _whole(answer: bytearray) -> bool:
    """Whether an answer with a Content-Length has arrived."""
    head, end, body = answer.partition(b"\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return bool(end) and len(body) >= int(length)


# ------------------------------------------------------------------------------------------ Scale


def measure_scale(most: int) -> dict[str, dict]:
    """Speed, memory and restart of the service with more and more synthetic bookings."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "rows.csv", Path(folder) / "log"
        _say(f"making {most:,} synthetic rows")
        script = replay.HERE / "data" / "synthesize.py"
        command = [sys.executable, script, f"--rows={most}", "--companies=10000", "--out", file]
        subprocess.run(command, check=True)
        rows = iter(replay.by_date(replay.read_rows(file)))
        with replay.started(SERVICE, f"--log={folder}/empty") as (_, process):
            empty = _memory("VmRSS", process.pid)
        sent = 0
        for size in (*(size for size in SIZES if size < most), most):
            with replay.started(SERVICE, f"--log={log}") as (port, _):
                client = replay.Client(f"http://127.0.0.1:{port}")
                _send(client, itertools.islice(rows, max(0, size - LAST - sent)), size)
                last = list(itertools.islice(rows, LAST))
                started = time.perf_counter()
                _send(client, last, size)
                seconds = time.perf_counter() - started
                sent = size
            started = time.perf_counter()
            with replay.started(SERVICE, f"--log={log}") as (_, process):
                restart = time.perf_counter() - started
                results[f"{size:,}"] = {
                    "samples_per_second": len(last) / seconds,
                    "bytes_per_sample": (_memory("VmRSS", process.pid) - empty) * (1 << 20) / size,
                    "restart_seconds": restart,
                }
    return results


def _send(client: replay.Client, rows: Iterable[Sample], size: int) -> None:
    for number, batch in enumerate(chunks(rows, 500)):
        client.ask("POST", "/sample", batch, key=f"{size} {batch[0]['']} {number}")
        _say(f"growing to {size:,} synthetic bookings")


# ----------------------------------------------------------------------------------- Command line


def in_words(results: dict) -> Iterator[str]:
    """The results as tables: medians, with half of the spread."""
    yield f"{results['file']['name']}, {results['file']['rows']:,} rows; {results['machine']}"
    for part in ("models", "service", "scale"):
        if part in results:
            yield ""
            yield from _table(part, results[part])


def _table(title: str, lines: dict[str, dict]) -> Iterator[str]:
    names = list(dict.fromkeys(name for figures in lines.values() for name in figures))
    names = [name for name in names if not name.endswith("_spread") and name != "not_installed"]
    cells = [["", *(name.replace("_", " ") for name in names)]]
    for line, figures in lines.items():
        if "not_installed" in figures:
            cells.append([line, f"needs {figures['not_installed']}"])
        else:
            cells.append([line, *(_shown(name, figures) for name in names)])
    cells[0][0] = title
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(names) + 1)]
    for row in cells:
        yield "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        )


def _shown(name: str, figures: dict) -> str:
    value, spread = figures.get(name), figures.get(f"{name}_spread")
    if value is None:
        return "-"
    digits = 4 if name.endswith(("accuracy", "precision", "recall")) else 2 if value < 100 else 0
    return f"{value:,.{digits}f}" + (f" ±{50 * spread / value:.0f}%" if spread else "")


def medians(measured: list[dict]) -> dict:
    """Each figure's median, and its spread (the highest less the lowest) if it varied."""
    result = {}
    for name in measured[0]:
        values = [figures[name] for figures in measured]
        result[name] = values[0] if None in values else statistics.median(values)
        if None not in values and max(values) > min(values):
            result[f"{name}_spread"] = max(values) - min(values)
    return result


def _say(what: str) -> None:
    """Shows what is being done, in one line that the next replaces, if there is someone to see."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench",
        description="Measures bookkeep beside other models, and its service. Takes some minutes.",
        epilog="The other models: pip install -e '.[bench]'",
    )
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        default=replay.DATA / "bank_expenses_synthetic.csv.zip",
        help="a CSV file of bookings, or a zip with one (default: the synthetic set)",
    )
    parser.add_argument(
        "--part",
        choices=["models", "service", "scale", "all"],
        default="all",
        help="measure only this: the models in process, the service over HTTP with the file's "
        "bookings, or how it grows with synthetic ones (default: all)",
    )
    parser.add_argument(
        "--repeats", type=replay.count, default=3, help="of models and service (default: 3)"
    )
    parser.add_argument(
        "--most",
        type=replay.count,
        default=SIZES[-1],
        help="synthetic bookings that it grows to (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON object")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
