"""replay: streams a CSV file of bookings to bookkeep and shows how well it predicts them.

`python replay.py --serve` is the demo: it starts the service, sends it 15,000 bookings in batches
as an accounting program would, and reports how many it would have booked right. It judges nothing
by itself: all figures are the service's own.
"""

import os
import signal
import sys

if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "bookkeep-replay":
    # Quiet from the start: to import all that follows takes a moment. It is main's afterwards.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import codecs
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
from typing import BinaryIO
from urllib.parse import urlsplit

from bookkeep import BOOKED_BY, FEATURES, MAX_SUGGESTED, TARGET, Sample, chunks, read_token

try:
    from tqdm import tqdm
except ImportError:  # the extra "client" is not installed: plain lines will do
    tqdm = None

HERE = Path(__file__).parent
CHECKED_OUT = (HERE / "data").is_dir()  # else it is installed
DATA = HERE / "data" if CHECKED_OUT else Path("data")
DATA_SETS = [  # a real one first, if the user has put it there
    DATA / "bank_expenses_obfuscated.csv.zip",
    DATA / "bank_expenses_obfuscated.csv",
    DATA / "bank_expenses_synthetic.csv.zip",
]
START = "python bookkeep.py" if CHECKED_OUT else "bookkeep"  # what starts the service
COLUMNS = [*FEATURES, TARGET]
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # encrypted is the last
LAST = 1000  # predictions that the report is about
WINDOWS = (100, LAST, 10_000)  # the n of the /metrics/<n> in it
BOOKED_AFTER = {"book": "suggestion", "check": "check", "review": "person"}  # a decision, by whom
STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
WELL_BOOKED = 0.9  # accuracy from which on one may book unseen


class Failed(Exception):
    """The replay cannot go on; the message says why in one sentence."""


class Away(Failed):
    """The service is gone or full: what was asked can be asked again later."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Replays as the options say and prints the report; the exit status."""
    options = _options(arguments)
    try:
        for number in STOPS:  # each as Ctrl-C, so that a service is stopped, too
            signal.signal(number, signal.default_int_handler)
        options.file = options.file or _default_file()
        token = read_token(options.token_file)
        rows = _rows(options)  # before a service is started in vain
        if options.serve and not options.log:
            options.log = Path(tempfile.mkdtemp(prefix="bookkeep-")) / "replay.jsonl"
        with _service(options) as url:
            if options.stay:
                print(f"Watch it learn: {url}/", file=sys.stderr)
            report = replay(Client(url, token), options, rows)
            if options.serve:
                report["log"] = str(options.log)
            if options.stay or not options.serve:
                report["page"] = f"{url}/"
            print(json.dumps(report) if options.json else in_words(report), flush=True)
            if options.stay and not report["interrupted"]:
                _stay(url)
    except (Failed, OSError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 130 if report["interrupted"] else 0


def replay(
    client: "Client", options: argparse.Namespace, rows: Iterator[Sample], skip: bool = True
) -> dict:
    """Sends the rows in batches and reports; Ctrl-C ends it early. Raises Failed."""
    run = Run(client, options)
    started = time.monotonic()
    interrupted = False
    try:
        with _progress(options.samples) as show:
            found = run.send(itertools.islice(rows, options.samples), show, skip)
        if not found:
            return replay(client, options, _rows(options), skip=False)
    except KeyboardInterrupt:
        interrupted = True
        client.interrupted()
    except Away as error:
        log = f" --log {options.log}" if options.serve else ""
        how = f"; the same command goes on with --resume {run.start}{log}" if run.resumable else ""
        raise Failed(f"{error}{how}") from None
    seconds = time.monotonic() - started
    report = {
        "samples": run.sent,
        "stored_before": run.resent,
        "seconds": round(seconds, 3),
        "samples_per_second": round(run.sent / seconds),
        "accounts": None,
        "metrics": {},
        "report": None,
        "unseen": None,
        "booked_unseen": None,
        "prediction": None,
        "interrupted": interrupted,
        "resume": run.start if run.resumable else None,
    }
    try:
        for name, figure in run.figures():
            report[name] = figure
        report["prediction"] = run.prediction(next(rows, None))
    except Failed as error:
        print(f"replay: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        report["interrupted"] = True
    return report


class Run:
    """One replay: what the service has of it, and what it says.

    Each batch has a key that is the same when the same run is resumed, so that the service stores
    it once, whatever happened to the first attempt.
    """

    def __init__(self, client: "Client", options: argparse.Namespace) -> None:
        self.client, self.options = client, options
        self.before = client.health()
        self.start = self.before["lines"] if options.resume is None else options.resume
        source = (options.file.name, options.order, options.batch, options.seed, self.start)
        self.name = hashlib.sha256(repr(source).encode()).hexdigest()[:16]
        self.sent = self.resent = self.predicted = self.unpredicted = 0
        self.account_names: dict[tuple[str, str], str | None] = {}  # by company and account
        # What was suggested for a batch that comes again would be another by then.
        self.resumable = options.book_from is None
        self.integrator = None if self.resumable else Integrator(client, options.book_from)

    def send(self, rows: Iterable[Sample], show: Callable[[int, dict], None], skip: bool) -> bool:
        """Sends the rows, without the batches that the log holds already but for the last of these.

        That shows whether they stand where they must: False if they do not, and must all be sent.
        """
        before = self.before["lines"]
        answer, asked = None, time.monotonic()
        for batch in batches(rows, self.options.batch, self.options.seed):
            for row in batch:
                self.account_names[row["CompanyId"], row[TARGET]] = row.get("AccountName")
            if skip and self.start + self.sent + len(batch) < before:
                self.sent += len(batch)
                self.resent = self.sent
                continue
            if self.integrator and (self.sent or self.before["accounts"]):  # there is a model
                batch = self.integrator.book(batch)
            key = f"replay {self.name} row {self.sent}"
            answer = self.client.ask("POST", "/sample", batch, key)
            if skip and self.resent == self.sent > 0 and answer["first"] != self.start + self.sent:
                return False  # others have booked in between
            self._count(answer, len(batch))
            if self.predicted and (
                self.sent == self.options.samples or time.monotonic() - asked > 0.1
            ):
                asked = time.monotonic()
                show(self.sent, self.client.ask("GET", f"/report/{LAST}"))
        return answer is not None or not self.sent

    def _count(self, answer: dict, size: int) -> None:
        self.sent += size
        if answer["first"] < self.before["lines"]:
            self.resent += size
        if answer["first"] == 0 or (self.sent == size and not self.before["accounts"]):
            self.unpredicted = size  # there was no model yet
        bookings = answer["total"] - self.before["lines"] + self.before["samples"]
        self.predicted = bookings - self.unpredicted

    def figures(self) -> Iterator[tuple[str, object]]:
        """What the service says of its last predictions, by name."""
        if not self.predicted:
            return
        yield "accounts", self.client.health()["accounts"]
        wanted = [n for n in WINDOWS if n == LAST or self.predicted >= n]
        yield "metrics", {str(n): self.client.ask("GET", f"/metrics/{n}") for n in wanted}
        report = self.client.ask("GET", f"/report/{LAST}")
        yield "report", report
        yield "unseen", best_level(report["confidence"])
        if self.integrator:
            yield "booked_unseen", self.integrator.report()

    def prediction(self, row: Sample | None) -> dict | None:
        """What the service suggests for a row that it has not been sent, if there is one."""
        if row is None or not self.sent:
            return None
        sample = without_account(row)
        [suggestion] = self.client.ask("POST", "/suggest?top=1", sample)["suggestions"]
        account = suggestion["account"]
        return {
            "sample": sample,
            "predicted": account,
            "predicted_name": self.account_names.get((row["CompanyId"], account)),
            "confidence": suggestion["confidence"],
            "reason": max(suggestion["reasons"], key=lambda reason: reason["weight"], default=None),
            "booked": row[TARGET],
            "booked_name": row.get("AccountName"),
        }


class Integrator:
    """Books unseen what the service is sure enough of, with the file as the accountant.

    It knows the truth, which the service does not: what would have been right.
    """

    def __init__(self, client: "Client", book_from: float) -> None:
        self.client, self.book_from = client, book_from
        # Of each suggestion: how sure it was, whether it was right, by whom it was booked.
        self.outcomes: list[tuple[float, bool, str]] = []

    def book(self, rows: Sequence[Sample]) -> list[Sample]:
        """The rows as they are to be booked."""
        booked = []
        for chunk in chunks(rows, MAX_SUGGESTED):
            asked = [without_account(row) for row in chunk]
            answers = self.client.ask("POST", f"/suggest?top=1&book_from={self.book_from}", asked)
            for row, sample, answer in zip(chunk, asked, answers, strict=True):
                [suggestion] = answer["suggestions"]
                account, who = suggestion["account"], BOOKED_AFTER[answer["decision"]]
                self.outcomes.append((suggestion["confidence"], account == row[TARGET], who))
                if who == "suggestion":
                    row = sample | {TARGET: account}
                booked.append(row | {BOOKED_BY: who})
        return booked

    def report(self) -> dict | None:
        """What the service says of the second half of the suggestions, and what is true."""
        half = self.outcomes[len(self.outcomes) // 2 :]
        scored = sum(who != "suggestion" for _, _, who in half)
        if not scored:
            return None
        said = self.client.ask("GET", f"/report/{scored}?book_from={self.book_from}")
        level = next(row for row in said["confidence"] if row["at_least"] == self.book_from)
        unseen = [right for _, right, who in half if who == "suggestion"]
        sure = [right for confidence, right, _ in half if confidence >= self.book_from]
        return {
            "book_from": self.book_from,
            "suggestions": len(half),
            "unseen": len(unseen),
            "unseen_wrong": unseen.count(False),
            "checks": sum(who == "check" for _, _, who in half),
            "said": level | {"overall": said["accuracy"]},
            "true": {
                "share": len(sure) / len(half),
                "accuracy": sum(sure) / len(sure) if sure else None,
                "overall": sum(right for _, right, _ in half) / len(half),
            },
        }


def without_account(row: Sample) -> Sample:
    """What is known of a row before it is booked."""
    return {key: value for key, value in row.items() if not key.startswith("Account")}


def best_level(levels: Sequence[dict]) -> dict:
    """The confidence from which on most can be booked well enough, or else 0.9 as an example.

    None below 0.8 is worth a thought, however well it does.
    """
    good = [
        level
        for level in levels
        if level["at_least"] >= 0.8 and (level["accuracy"] or 0) >= WELL_BOOKED
    ]
    if good:
        return max(good, key=lambda level: level["share"])
    return next(level for level in levels if level["at_least"] == 0.9)


def _stay(url: str) -> None:
    """Waits for Ctrl-C. Raises Failed if the service ends before."""
    with suppress(KeyboardInterrupt):
        print(f"The page is at {url}/ until Ctrl-C", file=sys.stderr)
        while _listens(urlsplit(url).port):
            time.sleep(1)
        raise Failed("the service has ended")


# ----------------------------------------------------------------------------------------- Report


def in_words(report: dict) -> str:
    """The report as a person reads it."""
    lines = [
        f"{report['samples']:,} bookings in {report['seconds']:.1f} s, "
        f"{report['samples_per_second']:,} a second"
    ]
    if report["stored_before"]:
        lines.append(f"{report['stored_before']:,} of them had been stored before")
    unseen = report["booked_unseen"]
    lines += _unseen(**unseen) if unseen else _quality(report)
    if report["prediction"]:
        lines += _suggestion(**report["prediction"])
    if str(LAST) in report["metrics"]:
        last = report["metrics"][str(LAST)]
        shown = f"precision {last['precision']:.3f}   recall {last['recall']:.3f}"
        lines += ["", f"/metrics/{LAST}   {shown}"]
    lines += ["", *_next(report)]
    return "\n".join(lines)


def _quality(report: dict) -> Iterator[str]:
    """How many of the last predictions were right, and of those that were sure enough."""
    if not report["unseen"]:
        return
    last, level = report["report"], report["unseen"]
    n = last["support"]
    yield ""
    yield (
        f"The last {n:,} predictions, each of one among {report['accounts']:,} accounts, made "
        "before the booking was known:"
    )
    yield (
        f"  {round(last['accuracy'] * n):,} were right: accuracy {_percent(last['accuracy'], 1)}; "
        f"as averages over accounts, precision {_percent(last['precision'], 1)}, "
        f"recall {_percent(last['recall'], 1)}"
    )
    sure, at_least = round(level["share"] * n), _percent(level["at_least"])
    if not sure:
        yield f"  none was at least {at_least} sure, so none could have been booked unseen yet"
        return
    yield (
        f"  {sure:,} could have been booked unseen, being at least {at_least} sure: "
        f"{round(level['accuracy'] * sure):,} of these were right, {_percent(level['accuracy'], 1)}"
    )


def _unseen(
    book_from: float,
    suggestions: int,
    unseen: int,
    unseen_wrong: int,
    checks: int,
    said: dict,
    true: dict,
) -> Iterator[str]:
    """What the service says that it got right, and what is true."""
    yield ""
    yield f"Booked unseen from {_percent(book_from)} on, in the last {suggestions:,} bookings:"
    yield (
        f"  {unseen:,} unseen, of which {unseen_wrong:,} are wrong, "
        f"{_percent(unseen_wrong / suggestions, 1)} of all; {checks:,} were checked instead"
    )
    if said["accuracy"] is not None:
        yield (
            f"  right of those: {_percent(said['accuracy'], 1)} (± {_percent(said['error'], 1)}), "
            f"the service says; {_percent(true['accuracy'], 1)}, in truth"
        )
    yield (
        f"  right of all: {_percent(said['overall'], 1)}, the service says; "
        f"{_percent(true['overall'], 1)}, in truth"
    )


def _suggestion(
    sample: Sample,
    predicted: str,
    predicted_name: str | None,
    confidence: float,
    reason: dict | None,
    booked: str,
    booked_name: str | None,
) -> Iterator[str]:
    because = f', because of "{reason["token"]}" ({reason["kind"]})' if reason else ""
    yield ""
    yield (
        f'The next one, not sent: "{sample["BankEntryText"]}" of {sample["CompanyId"]}, '
        f"{sample['BankEntryAmount']}"
    )
    yield f"  predicted {_account(predicted, predicted_name)}, {_percent(confidence)} sure{because}"
    yield f"  the accountant booked {_account(booked, booked_name)}"


def _account(number: str, name: str | None) -> str:
    return f"{number} ({name})" if name else number


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _next(report: dict) -> Iterator[str]:
    """Where all of it is, and what to do now."""
    log = f" --log {report['log']}" if "log" in report else ""
    if report["interrupted"]:
        how = f"; the same command goes on with --resume {report['resume']}{log}"
        yield f"Interrupted{how if report['resume'] is not None else ''}"
        return
    if log:
        yield f"All of it is in {report['log']}"
    if "page" not in report:
        yield "What to try next:"
        yield "  the same command with --stay shows it on a page, in a browser"
        yield f"  {START}{log} goes on from here"
    elif not log:
        yield f"Its page is at {report['page']}"


# ------------------------------------------------------------------------------------------- Rows


def read_rows(path: Path) -> Iterator[Sample]:
    """The rows of a CSV file, or of the one in a zip, one by one. Raises Failed."""
    try:
        with _open(path) as file:
            text = io.TextIOWrapper(file, newline="", encoding=_encoding(file))
            header = text.readline()
            lines = itertools.chain([header], text)
            rows = csv.DictReader(lines, delimiter=_separator(header), strict=True)
            missing = [column for column in COLUMNS if column not in (rows.fieldnames or [])]
            if missing:
                raise Failed(
                    f"{path} is no CSV file with the column {', '.join(missing)} in its first line"
                )
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
def _open(path: Path) -> Iterator[BinaryIO]:
    if path.suffix != ".zip":
        with open(path, "rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".csv")]
        if not names:
            raise Failed(f"there is no CSV file in {path}")
        with archive.open(names[0]) as file:
            yield file


def _encoding(file: BinaryIO) -> str:
    """UTF-16 if the file begins so, UTF-8 if all of it can be that, else Windows-1252."""
    if not file.seekable():
        return "utf-8-sig"  # a pipe can be read but once
    chunks = iter(lambda: file.read(1 << 20), b"")
    try:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        file.seek(0)
        for _ in codecs.iterdecode(chunks, "utf-8"):
            pass
        return "utf-8-sig"
    except UnicodeDecodeError:
        return "cp1252"
    finally:
        file.seek(0)


def _separator(header: str) -> str:
    """Comma, semicolon or tab: the one between most of the columns that a file needs."""

    def found(separator: str) -> int:
        [names] = csv.reader([header], delimiter=separator)
        return sum(column in names for column in COLUMNS)

    return max(",;\t", key=found)


def _rows(options: argparse.Namespace) -> Iterator[Sample]:
    """The file's rows in the order that is asked for. Raises Failed at once if it is no CSV."""
    rows = read_rows(options.file)
    if options.order == "date":
        return iter(by_date(rows))
    first = list(itertools.islice(rows, 1))
    return itertools.chain(first, rows)


def by_date(rows: Iterable[Sample]) -> list[Sample]:
    """The rows in the order in which they arose. Raises Failed if they have no date."""
    try:
        return sorted(rows, key=lambda row: (row["BankEntryDate"], row["CompanyId"]))
    except KeyError:
        raise Failed(
            "there is no column BankEntryDate to sort by; replay.py --order file needs none"
        ) from None


def _default_file() -> Path:
    for path in DATA_SETS:
        if path.exists():
            return path
    raise Failed(
        f"there is no data set in {DATA}/: name a CSV file of bookings (--help says which columns "
        "it needs), as data/bank_expenses_synthetic.csv.zip, which is in bookkeep's repository"
    )


def batches(rows: Iterable[Sample], largest: int, seed: int) -> Iterator[list[Sample]]:
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
        self._said = False  # that it tries again

    def ask(self, method: str, path: str, content: object = None, key: str = "") -> dict | list:
        """The service's answer; tries again for a while if it is not there or not ready.

        Bookings must have a key, by which the service knows them if they come again. Raises Away
        if there is no answer in the end, or no space, and Failed if it is anything else but 200.
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
                reason = f"connection refused: start it with {START}, or give --serve"
            except (OSError, HTTPException) as error:
                status, reason = None, f"no answer: {error!r}"
            except ValueError as error:
                raise Failed(f"{self._url}{path} is no bookkeep service: {error}") from None
            if status is None:
                self._connection.close()
            if status not in (None, 503) or time.monotonic() + pause > end:
                failed = Away if status in (None, 503, 507) else Failed
                raise failed(f"{self._url}{path}: {reason}")
            self._say_that_it_waits(reason)
            time.sleep(pause)
            pause = min(2 * pause, 2)

    def _say_that_it_waits(self, reason: str) -> None:
        if not self._said:
            self._said = True
            say = tqdm.write if tqdm else print  # tqdm's keeps the bar whole
            say(
                f"replay: waiting {self._patience:.0f} s for the service at {self._url} ({reason})",
                file=sys.stderr,
            )

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
            while not _answers(port):
                if service.poll() is not None:
                    messages.seek(0)
                    last = messages.read().decode(errors="replace").splitlines()[-1:]
                    raise Failed(f"the service did not start: {''.join(last)}")
                time.sleep(0.01)
            yield port, service.pid
        finally:
            service.terminate()
            service.wait()


def _answers(port: int) -> bool:
    """Whether it has read its log back."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status != 503
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# ----------------------------------------------------------------------------------- Command line


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int, dict], None]]:
    """A function that shows how far it is and how good: a bar in a terminal, else plain lines."""
    if tqdm and sys.stderr.isatty():
        with tqdm(total=total, unit=" samples", dynamic_ncols=True) as bar:

            def show(sent: int, report: dict) -> None:
                bar.set_postfix_str(_in_short(report))
                bar.update(sent - bar.n)

            yield show
        return

    started = shown = time.monotonic()

    def show(sent: int, report: dict) -> None:
        nonlocal shown
        if time.monotonic() - shown > 2:
            shown = time.monotonic()
            of_all = f" of {total:,}" if total else ""
            rate = sent / (shown - started)
            print(f"{sent:,}{of_all} samples, {rate:,.0f}/s, {_in_short(report)}", file=sys.stderr)

    yield show


def _in_short(report: dict) -> str:
    return ", ".join(f"{name} {report[name]:.3f}" for name in ("accuracy", "precision", "recall"))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="replay",
        description="Streams a CSV file of bookings to bookkeep and shows how well it predicts.",
        epilog="The demo, all in one: replay.py --serve",
    )
    _add_rows(parser)
    _add_service(parser)
    parser.add_argument("--json", action="store_true", help="print the report as a JSON object")
    options = parser.parse_args(arguments)
    if options.log and not options.serve:
        parser.error("--log goes with --serve")
    if options.book_from is not None and options.resume is not None:
        parser.error("--resume does not go with --book-from: what it suggested then is not known")
    if options.stay and not options.serve:
        parser.error("--stay goes with --serve")
    if options.resume is not None and options.serve and not options.log:
        parser.error("--resume goes with --url, or with --serve and the --log of the first run")
    return options


def _add_rows(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group(
        "the bookings",
        "The file's first line names its columns. It must have CompanyId, BankEntryText, "
        "BankEntryAmount and AccountNumber; to sort by date BankEntryDate, as 2016-02-29, too. "
        "AccountName is shown, others are sent along. Commas, semicolons or tabs separate values; "
        "it is in UTF-8, UTF-16 or Windows-1252.",
    ).add_argument
    option(
        "file",
        nargs="?",
        type=Path,
        help="a CSV file or a zip with one; without it, bank_expenses_obfuscated.csv.zip or .csv "
        "in data/, or else the synthetic set there",
    )
    option(
        "--samples",
        type=_count_or_all,
        default=15_000,
        help="how many of its first rows to send, or all (default: 15000)",
    )
    option(
        "--order",
        choices=["date", "file"],
        default="date",
        help="send rows by date and company, as they arose, or as they stand (default: date)",
    )
    option(
        "--batch",
        type=count,
        default=1000,
        help="the largest batch; sizes are random, from 1 to this (default: 1000)",
    )
    option("--seed", type=int, default=0, help="of those sizes (default: 0)")
    option(
        "--book-from",
        type=share,
        metavar="CONFIDENCE",
        help="book suggestions unseen from this confidence on, but for the checks, with the file "
        "as the accountant for all others; and say what the service says of it and what is true",
    )


def _add_service(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the service")
    option = group.add_argument
    url_or_serve = group.add_mutually_exclusive_group().add_argument
    url_or_serve(
        "--url", default="http://127.0.0.1:8080", help="where it is (default: %(default)s)"
    )
    url_or_serve("--serve", action="store_true", help="start it, and stop it at the end")
    option(
        "--stay",
        action="store_true",
        help="with --serve: keep it running at the end, to look at its page, until Ctrl-C",
    )
    option(
        "--log",
        type=Path,
        help="with --serve: the service's log (default: a new one in a temporary folder)",
    )
    option(
        "--resume",
        type=int,
        nargs="?",
        const=0,
        metavar="FROM",
        help="go on with an interrupted run that began when the log held FROM bookings (0, unless "
        "given): what is stored is not stored again",
    )
    option(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the service's token; or set BOOKKEEP_TOKEN",
    )


def count(text: str) -> int:
    """The whole number, of at least 1, that the text says, for argparse."""
    if not (text.isdecimal() and len(text) < 19 and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    """The number from 0 to 1 that the text says, for argparse."""
    with suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")


def _count_or_all(text: str) -> int | None:
    return None if text == "all" else count(text)


if __name__ == "__main__":
    sys.exit(main())
