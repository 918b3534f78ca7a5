"""replay: streams a CSV file of bookings to bookkeep and shows how well it predicts them.

`python replay.py --serve` is the demo: it starts the service, sends it 15,000 bookings in batches
as an accounting program would, and reports what `/metrics` says. It judges nothing by itself: all
figures are the service's own.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

from bookkeep import FEATURES, TARGET, Sample, read_token

try:
    from tqdm import tqdm
except ImportError:  # the extra "client" is not installed: plain lines will do
    tqdm = None

HERE = Path(__file__).parent
DATA = HERE / "data" if (HERE / "data").is_dir() else Path("data")
DATA_SETS = [  # a real one first, if the user has put it there
    DATA / "bank_expenses_obfuscated.csv.zip",
    DATA / "bank_expenses_obfuscated.csv",
    DATA / "bank_expenses_synthetic.csv.zip",
]
COLUMNS = [*FEATURES, "BankEntryDate", TARGET]
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # encrypted is the last
WINDOWS = (100, 1000, 10_000)  # the n of the /metrics/<n> in the report


class Failed(Exception):
    """The replay cannot go on; the message says why in one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Replays as the options say and prints the report; the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C, so that a service is stopped, too
        signal.signal(number, signal.default_int_handler)
    options = _options(arguments)
    try:
        options.file = options.file or _default_file()
        token = read_token(options.token_file)
        with _service(options) as url:
            if options.stay:
                print(f"Watch it learn: {url}/", file=sys.stderr)
            report = replay(Client(url, token), options)
            if options.serve:
                report["log"] = str(options.log)
            print(json.dumps(report) if options.json else in_words(report), flush=True)
            if options.stay and not report["interrupted"]:
                _stay(url)
    except (Failed, OSError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 130 if report["interrupted"] else 0


def replay(client: "Client", options: argparse.Namespace, skip: bool = True) -> dict:
    """Sends the rows in batches and reports; Ctrl-C ends it early. Raises Failed.

    Each batch has a key that is the same when the same run is resumed, so that the service stores
    it once, whatever happened to the first attempt. Batches that the log holds already are skipped,
    all but the last, which shows that they stand where they must.
    """
    sent = resent = predicted = unpredicted = 0
    interrupted = False
    answer = None
    started = asked = time.monotonic()
    health = client.health()
    stored_before = health["lines"]
    start = stored_before if options.resume is None else options.resume
    source = (options.file.name, options.order, options.batch, options.seed, start)
    run = hashlib.sha256(repr(source).encode()).hexdigest()[:16]
    rows = _rows(options)
    try:
        with _progress(options.samples) as show:
            to_send = itertools.islice(rows, options.samples)
            for batch in _batches(to_send, options.batch, options.seed):
                if skip and start + sent + len(batch) < stored_before:
                    sent += len(batch)
                    resent = sent
                    continue
                answer = client.ask("POST", "/sample", batch, key=f"replay {run} row {sent}")
                if skip and resent == sent > 0 and answer["first"] != start + sent:
                    return replay(client, options, skip=False)  # others have booked in between
                sent += len(batch)
                if answer["first"] < stored_before:
                    resent += len(batch)
                if answer["first"] == 0 or (sent == len(batch) and not health["accounts"]):
                    unpredicted = len(batch)  # there was no model yet
                bookings = answer["total"] - health["lines"] + health["samples"]
                predicted = bookings - unpredicted
                if predicted and (sent == options.samples or time.monotonic() - asked > 0.1):
                    asked = time.monotonic()
                    show(sent, client.ask("GET", "/metrics/1000"))
        if sent and answer is None:  # all were skipped, and none has shown that it is there
            return replay(client, options, skip=False)
    except KeyboardInterrupt:
        interrupted = True
        client.interrupted()
    except Failed as error:
        log = f" --log {options.log}" if options.serve else ""
        raise Failed(f"{error}; the same command goes on with --resume {start}{log}") from None
    seconds = time.monotonic() - started
    report = {
        "samples": sent,
        "stored_before": resent,
        "seconds": round(seconds, 3),
        "samples_per_second": round(sent / seconds),
        "metrics": {},
        "prediction": None,
        "interrupted": interrupted,
        "resume": start,
    }
    try:
        for n in WINDOWS:
            if predicted and (n == 1000 or predicted >= n):
                report["metrics"][str(n)] = client.ask("GET", f"/metrics/{n}")
        report["prediction"] = _prediction(next(rows, None), client) if sent else None
    except Failed as error:
        print(f"replay: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        report["interrupted"] = True
    return report


def _stay(url: str) -> None:
    """Waits for Ctrl-C. Raises Failed if the service ends before."""
    print(f"The page is at {url}/ until Ctrl-C", file=sys.stderr)
    with suppress(KeyboardInterrupt):
        while _listens(urlsplit(url).port):
            time.sleep(1)
        raise Failed("the service has ended")


def in_words(report: dict) -> str:
    """The report as a person reads it."""
    lines = [
        f"{report['samples']:,} samples in {report['seconds']:.1f} s, "
        f"{report['samples_per_second']:,} a second"
    ]
    if report["stored_before"]:
        lines.append(f"{report['stored_before']:,} of them had been stored before")
    if report["interrupted"]:
        log = f" --log {report['log']}" if "log" in report else ""
        lines.append(f"Interrupted; the same command goes on with --resume {report['resume']}{log}")
    for n, metrics in report["metrics"].items():
        lines.append(
            f"/metrics/{n:<6} precision {metrics['precision']:.3f}   recall {metrics['recall']:.3f}"
        )
    if report["prediction"]:
        sample, predicted, booked = report["prediction"].values()
        lines.append(
            f'Not sent: company {sample["CompanyId"]}, "{sample["BankEntryText"]}", '
            f"{sample['BankEntryAmount']}\n"
            f"          predicted {predicted}, the accountant booked {booked}"
        )
    if "log" in report:
        lines.append(f"All of it is in {report['log']}")
    return "\n".join(lines)


def _prediction(row: Sample | None, client: "Client") -> dict | None:
    """What the service predicts for a row that it has not been sent, if there is one."""
    if row is None:
        return None
    sample = {key: value for key, value in row.items() if not key.startswith("Account")}
    [predicted] = client.ask("POST", "/predict", sample)
    return {"sample": sample, "predicted": predicted, "booked": row[TARGET]}


# ------------------------------------------------------------------------------------------- Rows


def read_rows(path: Path) -> Iterator[Sample]:
    """The rows of a CSV file, or of the one in a zip, one by one. Raises Failed."""
    try:
        with _open_text(path) as text:
            rows = csv.DictReader(text, strict=True)
            missing = [column for column in COLUMNS if column not in (rows.fieldnames or [])]
            if missing:
                raise Failed(f"{path} is no CSV file with the column {', '.join(missing)}")
            for row in rows:
                if None in row or None in row.values():
                    raise Failed(
                        f"{path}, line {rows.line_num}: there must be {len(rows.fieldnames)} values"
                    )
                yield row
    except OSError as error:
        raise Failed(f"cannot read {path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError, *ZIP_ERRORS) as error:
        raise Failed(f"{path} is no CSV file: {error}") from None


@contextmanager
def _open_text(path: Path) -> Iterator[io.TextIOBase]:
    if path.suffix != ".zip":
        with open(path, newline="", encoding="utf-8-sig") as text:
            yield text
        return
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".csv")]
        if not names:
            raise Failed(f"there is no CSV file in {path}")
        with archive.open(names[0]) as file:
            yield io.TextIOWrapper(file, newline="", encoding="utf-8-sig")


def _rows(options: argparse.Namespace) -> Iterator[Sample]:
    """The file's rows in the order that is asked for."""
    rows = read_rows(options.file)
    return iter(by_date(rows)) if options.order == "date" else rows


def by_date(rows: Iterable[Sample]) -> list[Sample]:
    """The rows in the order in which they arose."""
    return sorted(rows, key=lambda row: (row["BankEntryDate"], row["CompanyId"]))


def _default_file() -> Path:
    for path in DATA_SETS:
        if path.exists():
            return path
    raise Failed(f"there is no data set in {DATA}/: name a CSV file or its zip")


def _batches(rows: Iterable[Sample], largest: int, seed: int) -> Iterator[list[Sample]]:
    """Batches of random size, from 1 to the largest."""
    sizes = random.Random(seed)
    rows = iter(rows)
    while batch := list(itertools.islice(rows, sizes.randint(1, largest))):
        yield batch


# ---------------------------------------------------------------------------------------- Service


class Client:
    """One kept-alive connection to the service, opened again when it has to be."""

    def __init__(self, url: str, token: str | None = None) -> None:
        """Connects when first asked. Raises Failed if the URL is none of http or https."""
        address = urlsplit(url)
        kinds = {"http": HTTPConnection, "https": HTTPSConnection}
        try:
            if not address.hostname:
                raise ValueError
            self._connection = kinds[address.scheme](address.hostname, address.port, timeout=600)
        except (KeyError, ValueError, HTTPException):
            raise Failed(
                f"{url} is not the URL of a service, as http://127.0.0.1:8080 is"
            ) from None
        self._url = url
        self._path = address.path.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._patience = 30.0  # seconds to try again for

    def ask(self, method: str, path: str, content: object = None, key: str = "") -> dict | list:
        """The service's answer; tries again for a while if it is not there or not ready.

        Bookings must have a key, by which the service knows them if they come again. Raises Failed
        if there is no answer in the end, or if it is anything but 200.
        """
        headers = self._headers | ({"Idempotency-Key": key} if key else {})
        body = None if content is None else json.dumps(content).encode()
        end = time.monotonic() + self._patience
        pause = 0.1
        while True:
            try:
                self._connection.request(method, self._path + path, body, headers)
                with self._connection.getresponse() as response:
                    status, answer = response.status, response.read()
                if status == 200:
                    return json.loads(answer)
                reason = f"{status} {answer[:1000].decode(errors='replace')}"
            except ConnectionRefusedError:
                status = None
                reason = "connection refused: start it with python bookkeep.py, or give --serve"
            except (OSError, HTTPException) as error:
                status, reason = None, f"no answer: {error!r}"
            except ValueError as error:
                raise Failed(f"{self._url}{path} is no bookkeep service: {error}") from None
            if status is None:
                self._connection.close()
            if status not in (None, 503) or time.monotonic() + pause > end:
                raise Failed(f"{self._url}{path}: {reason}")
            time.sleep(pause)
            pause = min(2 * pause, 2)

    def health(self) -> dict:
        """The service's health. Raises Failed if it is no bookkeep."""
        health = self.ask("GET", "/health")
        if not (isinstance(health, dict) and isinstance(health.get("lines"), int)):
            raise Failed(f"{self._url} is no bookkeep service")
        return health

    def interrupted(self) -> None:
        """Drops what was under way, and tries again but for a moment from now on."""
        self._connection.close()
        self._patience = 2.0


def _service(options: argparse.Namespace) -> AbstractContextManager[str]:
    """Gives the URL of the service that the options ask for."""
    if not options.serve:
        return nullcontext(options.url)
    token = [f"--token-file={options.token_file}"] if options.token_file else []
    return serving(options.log, *token)


@contextmanager
def serving(log: Path, *options: str) -> Iterator[str]:
    """Starts bookkeep.py with that log on a free port, gives its URL and stops it at the end."""
    with started(HERE / "bookkeep.py", f"--log={log}", *options) as (port, _):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def started(*command: object) -> Iterator[tuple[int, int]]:
    """Starts a Python script that listens on a --port, gives that and its process, and stops it.

    Raises Failed if it ends before it listens.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = (sys.executable, *command, f"--port={port}")
    with tempfile.TemporaryFile() as messages:
        # In a session of its own, so that Ctrl-C ends the replay first and the service after it.
        service = subprocess.Popen(command, stderr=messages, start_new_session=True)
        try:
            while not _listens(port):
                if service.poll() is not None:
                    messages.seek(0)
                    last = messages.read().decode(errors="replace").splitlines()[-1:]
                    raise Failed(f"the service did not start: {''.join(last)}")
                time.sleep(0.01)
            yield port, service.pid
        finally:
            service.terminate()
            service.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# ----------------------------------------------------------------------------------- Command line


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int, dict], None]]:
    """A function that shows how far it is and how good: a bar in a terminal, else plain lines."""
    if tqdm and sys.stderr.isatty():
        with tqdm(total=total, unit=" samples", dynamic_ncols=True) as bar:

            def show(sent: int, metrics: dict) -> None:
                bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.items()})
                bar.update(sent - bar.n)

            yield show
        return

    started = shown = time.monotonic()

    def show(sent: int, metrics: dict) -> None:
        nonlocal shown
        if time.monotonic() - shown > 2:
            shown = time.monotonic()
            figures = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            of_all = f" of {total:,}" if total else ""
            rate = sent / (shown - started)
            print(f"{sent:,}{of_all} samples, {rate:,.0f}/s, {figures}", file=sys.stderr)

    yield show


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="replay",
        description="Streams a CSV file of bookings to bookkeep and shows how well it predicts.",
        epilog="The demo, all in one: python replay.py --serve",
    )
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        help="a CSV file or a zip with one; without it, bank_expenses_obfuscated.csv.zip or .csv "
        "in data/, or else the synthetic set there",
    )
    parser.add_argument(
        "--samples",
        type=_count_or_all,
        default=15_000,
        help="how many of its first rows to send, or all (default: 15000)",
    )
    parser.add_argument(
        "--order",
        choices=["file", "date"],
        default="file",
        help="send rows as they stand, or by date and company (default: file)",
    )
    parser.add_argument(
        "--batch",
        type=_count,
        default=1000,
        help="the largest batch; sizes are random, from 1 to this (default: 1000)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of those sizes (default: 0)")
    service = parser.add_mutually_exclusive_group()
    service.add_argument(
        "--url", default="http://127.0.0.1:8080", help="where the service is (default: %(default)s)"
    )
    service.add_argument(
        "--serve", action="store_true", help="start the service, and stop it at the end"
    )
    parser.add_argument(
        "--stay",
        action="store_true",
        help="with --serve: keep it running at the end, to look at its page, until Ctrl-C",
    )
    parser.add_argument(
        "--log",
        type=Path,
        help="with --serve: the service's log (default: a new one in data/ for each run)",
    )
    parser.add_argument(
        "--resume",
        type=int,
        nargs="?",
        const=0,
        metavar="FROM",
        help="go on with an interrupted run that began when the log held FROM bookings (0, unless "
        "given): what is stored is not stored again",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the service's token; or set BOOKKEEP_TOKEN",
    )
    parser.add_argument("--json", action="store_true", help="print the report as a JSON object")
    options = parser.parse_args(arguments)
    if options.log and not options.serve:
        parser.error("--log goes with --serve")
    if options.stay and not options.serve:
        parser.error("--stay goes with --serve")
    if options.resume is not None and options.serve and not options.log:
        parser.error("--resume goes with --url, or with --serve and the --log of the first run")
    if options.log is None:
        options.log = DATA / time.strftime("replay-%Y%m%d-%H%M%S.jsonl")
    return options


def _count(text: str) -> int:
    if not (text.isdecimal() and len(text) < 19 and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _count_or_all(text: str) -> int | None:
    return None if text == "all" else _count(text)


if __name__ == "__main__":
    sys.exit(main())
