"""bench: measures bookkeep beside what one would use instead, on the same data, in one run.

`python bench.py FILE ...` streams the rows of each file by date, in batches of random size, to each
model; every batch is predicted whole before any of it is learned, the first ones in parts, as the
service does, and nobody has predictions for the first 20 rows. All get the same: text, company,
sum, and the context. `--part service` measures the service over HTTP, beside a handler that does
nothing but read and answer JSON, and `--part scale` how it grows. Absolute times are those of this
machine in this hour; the ratios are what to look at.
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
from typing import NamedTuple

# One thread, as in the service, where bookkeep says so: here NumPy is there before it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import replay
from bookkeep import (
    TARGET,
    NaiveBayes,
    Sample,
    amount_range,
    chunks,
    exact_sum,
    parts,
    precision_recall,
    tokens,
    words,
)

WINDOW = 1000  # predictions that macro averages are over
SIZES = (10_000, 50_000, 100_000, 1_000_000)  # bookings at which the service is looked at
LAST = 10_000  # bookings, the last before, that its speed is taken from
Accounts, Keys = list[str], Sequence[str]
Batches, Predictions = Iterable[list[Sample]], Iterator[list[str]]

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
    """Measures what the options say and prints a table; the exit status."""
    options = parse_options(arguments)
    found: dict[str, dict] = {}  # by line
    try:
        if options.part == "scale":
            found = measure_scale(options.most)
        for file in options.files if options.part != "scale" else ():
            rows = read_rows(file)
            measure = compare_models if options.part == "models" else measure_service
            name = file.name.partition(".")[0]
            for line, figures in measure(rows, options.repeats, options.context).items():
                found[f"{name}: {line}"] = figures
    except (replay.Failed, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, NumPy {np.__version__}\n")
    print("\n".join(table(found)))
    return 0


def read_rows(file: Path) -> list[Sample]:
    """The file's rows by date. Where a column is called Amount, that is the amount."""
    rows = replay.by_date(replay.read_rows(file))
    for row in rows:
        row["BankEntryAmount"] = row.get("Amount") or row["BankEntryAmount"]
    return rows


# ----------------------------------------------------------------------------------------- Models


# A model is given the batches, and predicts each before it learns it: as empty strings if it has
# learned nothing yet.


def bookkeep(batches: Batches, accounts: Accounts, context: Keys) -> Predictions:
    """The model of this repository."""
    model = NaiveBayes()
    for batch in batches:
        documents = [tokens(sample, context) for sample in batch]
        predicted = [""] * len(batch)
        for part, assessments, _ in model.book(documents, [sample[TARGET] for sample in batch]):
            predicted[part] = [made.predicted or "" for made in assessments]
        yield predicted


def river(batches: Batches, accounts: Accounts, context: Keys) -> Predictions:
    """River's MultinomialNB on bookkeep's tokens, one sample after the other."""
    from river import naive_bayes

    model = naive_bayes.MultinomialNB(alpha=0.02)
    for batch in batches:
        documents = [Counter(map(str, tokens(sample, context))) for sample in batch]
        yield [model.predict_one(document) or "" for document in documents]
        for document, sample in zip(documents, batch, strict=True):
            model.learn_one(document, sample[TARGET])


def partially_fitted(batches: Batches, accounts: Accounts, context: Keys) -> Predictions:
    """scikit-learn's MultinomialNB.partial_fit on bookkeep's tokens, hashed to 65,536 columns."""
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.naive_bayes import MultinomialNB

    hasher = FeatureHasher(1 << 16, input_type="string", alternate_sign=False)
    model = MultinomialNB(alpha=0.01)
    for number, batch in enumerate(batches):
        documents = hasher.transform(map(str, tokens(sample, context)) for sample in batch)
        yield model.predict(documents).tolist() if number else [""] * len(batch)
        model.partial_fit(documents, [sample[TARGET] for sample in batch], sorted(accounts))


def refitted(batches: Batches, accounts: Accounts, context: Keys) -> Predictions:
    """scikit-learn's MultinomialNB on what a sample says: fitted anew on all at each batch."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(CountVectorizer(analyzer=str.split), MultinomialNB())
    texts, labels = [], []
    for batch in batches:
        said = [namespaces(sample, context) for sample in batch]
        new = [" ".join(name + word for name in each for word in each[name]) for each in said]
        yield model.predict(new).tolist() if texts else [""] * len(batch)
        texts += new
        labels += [sample[TARGET] for sample in batch]
        model.fit(texts, labels)


def vowpal_wabbit(batches: Batches, accounts: Accounts, context: Keys) -> Predictions:
    """Vowpal Wabbit on bookkeep's tokens, as words: it takes a number for a place in its table."""

    def example(sample: Sample) -> str:
        return "|t " + " ".join(f"t{token}" for token in tokens(sample, context))

    return one_against_all(example, "", batches, accounts)


def vowpal_wabbit_crossed(batches: Batches, accounts: Accounts, context: Keys) -> Predictions:
    """Vowpal Wabbit on namespaces and crosses of its own."""

    def example(sample: Sample) -> str:
        said = namespaces(sample, context)
        return " ".join(f"|{name} {' '.join(said[name])}" for name in said)

    crosses = "-q ct -q cx -q ca -q cs -q ck --cubic ckx"
    return one_against_all(example, crosses, batches, accounts)


def one_against_all(
    example: Callable[[Sample], str], crosses: str, batches: Batches, accounts: Accounts
) -> Predictions:
    """Vowpal Wabbit's predictions at the best setting of those that were tried on three sets.

    It must know all accounts from the start. With fewer than 28 bits its weights for so many
    accounts collide.
    """
    import vowpalwabbit

    options = f"--oaa {len(accounts)} --loss_function hinge -l .6 -b 28 --quiet {crosses}"
    model = vowpalwabbit.Workspace(options)
    numbers = {account: number for number, account in enumerate(accounts, 1)}
    for number, batch in enumerate(batches):
        examples = [example(sample) for sample in batch]
        yield [accounts[model.predict(each) - 1] if number else "" for each in examples]
        for each, sample in zip(examples, batch, strict=True):
            model.learn(f"{numbers[sample[TARGET]]} {each}")


def namespaces(sample: Sample, context: Keys) -> dict[str, list[str]]:
    """What a sample says, by one letter: company, words, whole text, range, sum, context keys."""
    amount, text = sample["BankEntryAmount"], words(sample["BankEntryText"])
    exact = exact_sum(amount)
    said = {
        "c": [sample["CompanyId"]],
        "t": text,
        "x": ["_".join(text)],
        "a": [amount_range(amount)],
        "s": [exact, f"...{exact[-2:]}"] if exact else [],
        "k": [f"{key}={sample[key]}" for key in context if sample.get(key)],
    }
    return {name: [word.translate(ESCAPES) for word in found] for name, found in said.items()}


ESCAPES = str.maketrans(dict.fromkeys(" :|\t\r\n", "_"))


class Peer(NamedTuple):
    """A model, the first rows that it gets if it is slow, and the package that it needs."""

    model: Callable[[Batches, Accounts, Keys], Predictions]
    rows: int | None
    needs: str


MODELS = {
    "bookkeep": Peer(bookkeep, None, "numpy"),
    "Vowpal Wabbit, same tokens": Peer(vowpal_wabbit, None, "vowpalwabbit"),
    "Vowpal Wabbit, own crosses": Peer(vowpal_wabbit_crossed, None, "vowpalwabbit"),
    "River MultinomialNB": Peer(river, 2_000, "river"),
    "scikit-learn partial_fit": Peer(partially_fitted, 10_000, "sklearn"),
    "scikit-learn refitted": Peer(refitted, 10_000, "sklearn"),
}


def compare_models(rows: list[Sample], repeats: int, context: Keys) -> dict[str, dict]:
    """The figures of each model, or what it needs to be there.

    Beside each, bookkeep's accuracy on the same rows, and how many times as fast it is.
    """
    found: dict[str, list[dict]] = {name: [] for name in MODELS}
    for repeat, (name, peer) in itertools.product(range(repeats), MODELS.items()):
        if not find_spec(peer.needs):
            found[name].append({"not_installed": peer.needs})
            continue
        say(f"{name}, {repeat + 1} of {repeats}")
        figures = in_a_process(evaluate, peer.model, rows[: peer.rows], context)
        if peer.model is not bookkeep:
            ours = in_a_process(evaluate, bookkeep, rows[: peer.rows], context)
            times = ours["samples_per_cpu_second"] / figures["samples_per_cpu_second"]
            figures |= {"bookkeep_accuracy": ours["accuracy"], "bookkeep_times_as_fast": times}
        found[name].append(figures)
    return {name: medians(measured) for name, measured in found.items()}


def evaluate(model: Callable, rows: list[Sample], context: Keys) -> dict:
    """How good and how fast a model is on the rows."""
    accounts = list(dict.fromkeys(row[TARGET] for row in rows))
    batches: list[list[Sample]] = []
    done = 0
    for batch in replay.batches(rows, 1000, seed=0):
        batches += [batch[part] for part in parts(len(batch), done)]
        done += len(batch)
    before = memory("VmHWM")
    started = time.process_time()
    guessed = np.array([*itertools.chain.from_iterable(model(batches, accounts, context))])
    seconds = time.process_time() - started  # of a core, whoever else is at work
    booked = np.array([row[TARGET] for row in rows])
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
        "samples_per_cpu_second": len(booked) / seconds,
        "megabytes": memory("VmHWM") - before,
    }


def in_a_process(measure: Callable, *arguments: object) -> dict:
    """What the function gives in a process of its own, so that its peak of memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(measure, *arguments).result()


def memory(kind: str, process: int | str = "self") -> float:
    """The memory of a process in MB: VmRSS now, VmHWM the most that it had so far."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) / 1024


# ---------------------------------------------------------------------------------------- Service


def measure_service(rows: list[Sample], repeats: int, context: Keys) -> dict:
    """Requests and samples a second over HTTP, and how long predictions take."""
    found: dict[str, list[dict]] = {}
    predict = request("/predict", replay.without_account(rows[-1]))
    options = [f"--context={','.join(context)}"] if context else []
    for repeat in range(repeats):
        say(f"service, {repeat + 1} of {repeats}")
        with (
            tempfile.TemporaryDirectory() as folder,
            replay.started(SERVICE, f"--log={folder}/log", *options) as (port, _),
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
                ours = measure_load(port, itertools.cycle(bodies), connections)
                ours["samples_per_second"] = ours["requests_per_second"] * size
                found.setdefault(f"/sample of {size}, {connections} at once", []).append(ours)
            name = "/predict while 1,000s stream in"
            found.setdefault(name, []).append(busy(port, rows, predict))
    return {name: medians(figures) for name, figures in found.items()}


def busy(port: int, rows: list[Sample], predict: bytes) -> dict:
    """How long predictions take while another process sends batches of 1,000."""
    bodies = [request("/sample", batch) for batch in chunks(rows, 1000)]
    context = multiprocessing.get_context("fork")
    sender = context.Process(target=measure_load, args=(port, itertools.cycle(bodies), 1, 4.0))
    sender.start()
    time.sleep(0.5)
    figures = measure_load(port, itertools.repeat(predict), 1, 3.0)
    sender.join()
    return figures


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
            if not whole(key.data):
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


def whole(answer: bytearray) -> bool:
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
        say(f"making {most:,} synthetic rows")
        script = replay.HERE / "data" / "synthesize.py"
        command = [sys.executable, script, f"--rows={most}", "--companies=10000", "--out", file]
        subprocess.run(command, check=True)
        rows = iter(replay.by_date(replay.read_rows(file)))
        with replay.started(SERVICE, f"--log={folder}/empty") as (_, process):
            empty = memory("VmRSS", process.pid)
        sent = 0
        for size in (*(size for size in SIZES if size < most), most):
            with replay.started(SERVICE, f"--log={log}") as (port, _):
                client = replay.Client(f"http://127.0.0.1:{port}")
                send(client, itertools.islice(rows, max(0, size - LAST - sent)), size)
                last = list(itertools.islice(rows, LAST))
                started = time.perf_counter()
                send(client, last, size)
                seconds = time.perf_counter() - started
                sent = size
            started = time.perf_counter()
            with replay.started(SERVICE, f"--log={log}") as (_, process):
                restart = time.perf_counter() - started
                results[f"{size:,}"] = {
                    "samples_per_second": len(last) / seconds,
                    "bytes_per_sample": (memory("VmRSS", process.pid) - empty) * (1 << 20) / size,
                    "restart_seconds": restart,
                }
    return results


def send(client: replay.Client, rows: Iterable[Sample], size: int) -> None:
    """Books the rows, on the way to that size."""
    for number, batch in enumerate(chunks(rows, 500)):
        client.ask("POST", "/sample", batch, key=f"{size} {batch[0]['']} {number}")
        say(f"growing to {size:,} synthetic bookings")


# ----------------------------------------------------------------------------------- Command line


def table(lines: dict[str, dict]) -> Iterator[str]:
    """The figures as a table: medians, with half of the spread."""
    names = list(dict.fromkeys(name for figures in lines.values() for name in figures))
    names = [name for name in names if not name.endswith("_spread") and name != "not_installed"]
    cells = [["", *(name.replace("_", " ") for name in names)]]
    for line, figures in lines.items():
        needs = [f"needs {package}" for package in figures.values() if isinstance(package, str)]
        cells.append([line, *(needs or (shown(name, figures) for name in names))])
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(names) + 1)]
    for row in cells:
        yield "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        )


def shown(name: str, figures: dict) -> str:
    """A figure as the table has it."""
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
        is_number = not isinstance(values[0], str | None)
        result[name] = statistics.median(values) if is_number else values[0]
        if is_number and max(values) > min(values):
            result[f"{name}_spread"] = max(values) - min(values)
    return result


def say(what: str) -> None:
    """Shows what is being done, in one line that the next replaces, if there is someone to see."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench",
        description="Measures bookkeep beside other models, and its service. Takes some minutes.",
        epilog="The other models: pip install -e '.[bench]'",
    )
    option = parser.add_argument
    option(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        default=[replay.DATA / "bank_expenses_synthetic.csv.zip"],
        help="CSV files of bookings, or zips with one (default: the synthetic set); a column "
        "Amount is taken for BankEntryAmount",
    )
    option(
        "--context",
        type=lambda text: text.split(","),
        default=[],
        metavar="KEY,...",
        help="columns that the models get, too, of the files that have them",
    )
    option(
        "--part",
        choices=["models", "service", "scale"],
        default="models",
        help="what to measure: the models in process, the service over HTTP with the files' "
        "bookings, or how it grows with synthetic ones (default: models)",
    )
    option("--repeats", type=replay.count, default=3, help="of models and service (default: 3)")
    option(
        "--most",
        type=replay.count,
        default=SIZES[-1],
        help="synthetic bookings that it grows to (default: %(default)s)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
