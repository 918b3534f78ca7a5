"""replay: the client of bookkeep, for Python and for files of bookings.

`Client` is the service as Python calls, and needs nothing but this file. `python replay.py FILE`
streams a file of bookings to the service, in batches as an accounting program would, and reports
how many it would have booked right; `python replay.py --serve` is the demo, which starts the
service, too. It judges nothing by itself: all figures are the service's own. `python replay.py
--suggest FILE` writes the file with the accounts that the service suggests.

Files are read by bookkeep_extra/files.py. It reads from top to bottom: Client, Service, Progress,
Replay, Report, Suggest, Command line.
"""

import argparse
import hashlib
import itertools
import json
import logging
import os
import random
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from ssl import CertificateError
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

try:
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm
except ImportError:  # the extra "client" is not installed: plain lines will do
    tqdm = None

try:
    from bookkeep_extra import files
    from bookkeep_extra.files import FIELDS, Failed, by_date, guarded, read_rows  # noqa: F401
except ModuleNotFoundError:  # replay.py was copied alone, which will do for Client
    files = None

    class Failed(Exception):
        """It cannot go on; the message says why in one sentence."""


HERE = Path(__file__).parent
CHECKED_OUT = (HERE / "data").is_dir()  # else it is installed
START = "python bookkeep.py" if CHECKED_OUT else "bookkeep"  # what starts the service
REPLAY = "python replay.py" if CHECKED_OUT else "bookkeep-replay"

TARGET = "AccountNumber"  # what is predicted
BOOKED_BY = "BookedBy"
BOOKED_AFTER = {"book": "suggestion", "check": "check", "review": "person"}  # a decision, by whom

Sample = dict[str, str]
Samples = Sample | Sequence[Sample]  # one, or a list of any length
T = TypeVar("T")

logger = logging.getLogger("replay")


# ------------------------------------------------------------------------------------------- Client

MAX_SUGGESTED = 300  # suggestions with reasons that the service gives in one answer
LARGE = 1000  # samples in one request, where it takes long lists


class ServiceError(Failed):
    """The service refused something, or did not answer.

    `status` is HTTP's, None if no answer came. `sentence` says what to change, in the service's
    words if there are any. `temporary` is true where the same may be taken later: the service is
    away, it starts, or its disk is full.
    """

    def __init__(
        self,
        where: str,
        sentence: str,
        status: int | None = None,
        wait: float | None = None,
        lost: bool = False,
    ) -> None:
        """`wait` is after how many seconds the same may help; `lost` says that it may be done."""
        super().__init__(f"{where}: {f'{status}, ' if status else ''}{sentence}")
        self.sentence, self.status, self.wait, self.lost = sentence, status, wait, lost
        self.temporary = wait is not None or status in (503, 507)


class Client:
    """A bookkeep service, as Python calls: each asks it once, and says what it answered.

    Each raises ServiceError for any answer but 200. While the service is away, starts or is too
    busy, a call tries again, with longer and longer pauses, for as long as its patience lasts.
    What may have been done already is sent again only where that does no harm: bookings go under a
    key, and all else but `forget` may be said twice.

    Threads may share a client: each has a connection of its own, which is kept and opened again
    when it is lost. Processes may not: make a client after a fork.

    >>> client = Client("http://127.0.0.1:8080")
    >>> client.predict({"CompanyId": "a", "BankEntryText": "Rent", "BankEntryAmount": "-9875.50"})
    '6300'
    """

    def __init__(
        self, url: str, token: str | None = None, patience: float = 30, timeout: float = 600
    ) -> None:
        """Connects when first asked. Raises ServiceError if URL or token can be none.

        Patience is how many seconds a call tries again, the timeout how many one attempt may take.
        """
        self.url = url.rstrip("/")
        self.patience = patience
        kinds = {"http": HTTPConnection, "https": HTTPSConnection}
        try:
            address = urlsplit(self.url)
            if not address.hostname:
                raise ValueError
            self._new_connection = partial(
                kinds[address.scheme], address.hostname, address.port, timeout=timeout
            )
            self._new_connection()  # which does not connect yet, but looks at the host and port
        except (KeyError, ValueError, HTTPException):
            sentence = "this is not the URL of a service, as http://127.0.0.1:8080 is"
            raise ServiceError(url, sentence) from None
        self._path = address.path.rstrip("/")
        self._own = threading.local()  # a connection for each thread
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {self._printable('a token', '[!-~]+', token)}"

    def sample(self, bookings: Sequence[Sample], key: str | None = None) -> dict:
        """Stores bookings, which are then learned: {"received", "total", "first", "last"}.

        A booking with an `Id` of yours is booked once, however often you send it, and is then as
        you send it last: the answer has "booked", "known" and "corrected", too. So are those
        without one under a key of yours, such as the name of the file that they are from: also if
        your own program was killed in between. Without either, only this call's own attempts are
        one booking.
        """
        return self.ask("POST", "/sample", bookings, key or uuid.uuid4().hex)

    def predict(self, samples: Samples) -> Any:
        """The account of a sample, or a list of those of all in a list."""
        accounts = self._of_each("/predict", samples, LARGE)
        return accounts[0] if isinstance(samples, dict) else accounts

    def suggest(
        self, samples: Samples, top: int = 3, book_from: float | None = None, reasons: bool = True
    ) -> Any:
        """Up to `top` accounts for a sample, and how sure, in a dict; for a list, a list of dicts.

        With `book_from`, each has the decision, `book`, `check` or `review`. Without reasons it
        takes a fraction of the time.
        """
        given = {"top": top, "book_from": book_from, "reasons": None if reasons else "no"}
        size = max(1, MAX_SUGGESTED // max(1, top)) if reasons else LARGE
        return self._of_each(_query("/suggest", given), samples, size)

    def correct(self, booking: int | tuple[str, str], account: str) -> dict:
        """Books a booking to another account, or confirms its own.

        It is named by its seq, or by its company and `Id`. Gives {"seq", "AccountNumber",
        "before"}.
        """
        if isinstance(booking, int):
            which = {"seq": booking}
        else:
            which = dict(zip(("CompanyId", "Id"), booking, strict=True))
        return self.ask("POST", "/correct", {**which, TARGET: account})

    def forget(self, company: str) -> int:
        """Forgets a company, and says how many bookings it had. This cannot be undone.

        If no answer came, ask again: a ServiceError with the status 404 says that it is forgotten.
        """
        return self.ask("DELETE", _query("/company", {"id": company}), again=False)["forgotten"]

    def metrics(self, n: int = 1000) -> dict:
        """{"precision", "recall"}, the means over accounts, of the last n predictions."""
        return self.ask("GET", f"/metrics/{n}")

    def report(
        self, n: int = 1000, company: str | None = None, book_from: float | None = None
    ) -> dict:
        """More about the last n predictions, of all companies or one: how many are right from
        which confidence on, and which accounts were confused.
        """
        return self.ask("GET", _query(f"/report/{n}", {"company": company, "book_from": book_from}))

    def suspects(self, company: str | None = None, limit: int = 50) -> list[dict]:
        """Bookings that look wrong, of all companies or one, the most probable first."""
        query = {"company": company, "limit": limit}
        return self.ask("GET", _query("/suspects", query))["suspects"]

    def health(self) -> dict:
        """How much has been learned, and whether bookings can be stored."""
        health = self.ask("GET", "/health")
        if not (isinstance(health, dict) and isinstance(health.get("lines"), int)):
            raise ServiceError(self.url, "this is no bookkeep service")
        return health

    def close(self) -> None:
        """Closes this thread's connection; the next call opens another."""
        if connection := getattr(self._own, "connection", None):
            connection.close()
            self._own.connection = None  # it may keep headers of a request that was broken off

    def ask(
        self, method: str, path: str, content: object = None, key: str = "", again: bool = True
    ) -> Any:
        """What the service answers to any request, path and query as they are sent.

        Tries again for a while if it is not there or not ready; where it may have done what was
        asked, only if it may be asked `again`. Raises ServiceError.
        """
        headers = dict(self._headers)
        if key:
            wanted = "[!-~]([ -~]{0,198}[!-~])?"
            headers["Idempotency-Key"] = self._printable("a key", wanted, key)
        body = None if content is None else json.dumps(content).encode()
        end = time.monotonic() + self.patience
        for attempt in itertools.count():
            try:
                return self._attempt(method, path, body, headers)
            except ServiceError as error:
                if error.wait is None or (error.lost and not again):
                    raise
                pause = min(0.1 * 2 ** min(attempt, 5), 2)
                wait = max(error.wait, pause * random.uniform(0.5, 1))  # not all at once
                if time.monotonic() + wait > end:
                    raise
                if not attempt:
                    wanted = f"{self.patience:.0f} s for the service at {self.url}"
                    logger.warning(f"waiting {wanted} ({error.sentence})")
            time.sleep(wait)

    def _attempt(self, method: str, path: str, body: bytes | None, headers: dict) -> Any:
        """The answer to one request. Raises ServiceError, which says what can be done."""
        where = self.url + path
        sent, answer = False, None
        try:
            connection = self._connected()
            sent = True
            connection.request(method, self._path + path, body, headers)
            with connection.getresponse() as response:
                answer = response.read()
        except CertificateError as error:
            raise ServiceError(where, f"it cannot be trusted: {error}") from None
        except (OSError, HTTPException) as error:
            reason = f"no answer: {error!r}"
            if isinstance(error, ConnectionRefusedError):
                reason = f"connection refused: start it with {START}, or give replay.py --serve"
            raise ServiceError(where, reason, wait=0, lost=sent) from None
        finally:
            if answer is None:  # what came next on the connection would be the answer to this
                self.close()
        content = None
        with suppress(ValueError):
            content = json.loads(answer)
        if response.status == 200 and content is not None:
            return content
        raise self._refusal(where, response, content)

    def _connected(self) -> HTTPConnection:
        """This thread's connection, open at both ends."""
        connection = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._own.connection = self._new_connection()
        if connection.sock:
            with suppress(ValueError):  # too many files are open to look
                if select.select([connection.sock], [], [], 0)[0]:  # the other end has closed it
                    connection.close()
        if connection.sock is None:
            connection.connect()
        return connection

    @staticmethod
    def _refusal(where: str, response: HTTPResponse, content: object) -> ServiceError:
        """The error that an answer other than the one wanted means."""
        status, after = response.status, response.headers.get("Retry-After", "")
        said = content.get("error") if isinstance(content, dict) else None
        if status == 200:
            return ServiceError(where, "this is no bookkeep service", status)
        wait = None
        # The service, or a proxy before it, is busy. A 503 of the service's own that names no time
        # says something else: there is nothing to answer with yet.
        if status in (429, 502, 504) or (status == 503 and (after or not said)):
            wait = int(after) if re.fullmatch("[0-9]{1,5}", after) else 0
        lost = status in (502, 504)  # a proxy's, which may not know
        return ServiceError(where, said or response.reason, status, wait, lost)

    def _of_each(self, path: str, samples: Samples, size: int) -> Any:
        """What the path answers to a sample, or to all in a list, in requests of that size."""
        if isinstance(samples, dict):
            return self.ask("POST", path, samples)
        lists = (self.ask("POST", path, chunk) for chunk in chunks(samples, size))
        return list(itertools.chain.from_iterable(lists))

    def _printable(self, what: str, pattern: str, text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ServiceError(self.url, f"{what} must be printable ASCII characters")
        return text


def _query(path: str, values: Mapping[str, object]) -> str:
    """The path with these values, but for those that are None."""
    given = {name: value for name, value in values.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of that size, of which the last may be shorter."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


# ------------------------------------------------------------------------------------------ Service


@contextmanager
def started(*command: object, token: str | None = None) -> Iterator[tuple[int, subprocess.Popen]]:
    """Starts a Python script that listens on a --port, gives that and its process, and stops it.

    Of BOOKKEEP_* it is told this token only: the others are a service's that is there already, as
    its --stream. Raises Failed if it ends before it listens.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = (sys.executable, *command, f"--port={port}")
    told = {name: value for name, value in os.environ.items() if not name.startswith("BOOKKEEP_")}
    if token:
        told["BOOKKEEP_TOKEN"] = token
    with tempfile.TemporaryFile() as messages:
        # In a session of its own, so that Ctrl-C ends the replay first and the service after it.
        service = subprocess.Popen(command, env=told, stderr=messages, start_new_session=True)
        try:
            while not _answers(port):
                if service.poll() is not None:
                    messages.seek(0)
                    last = messages.read().decode(errors="replace").splitlines()[-1:]
                    raise Failed(f"the service did not start: {''.join(last)}")
                time.sleep(0.01)
            yield port, service
        finally:
            service.terminate()
            service.wait()


def _answers(port: int) -> bool:
    """Whether it has read its log back; without the token, it may say so with a 401."""
    try:
        Client(f"http://127.0.0.1:{port}", patience=0).ask("GET", "/health")
    except ServiceError as error:
        return error.status not in (None, 503)
    return True


# ----------------------------------------------------------------------------------------- Progress


@contextmanager
def _progress(total: int | None, how_good: Callable[[], str]) -> Iterator[Callable[[int], None]]:
    """A function that shows how far it is and how good: a bar in a terminal, else plain lines."""
    if tqdm and sys.stderr.isatty():
        with tqdm(total=total, unit=" samples", dynamic_ncols=True) as bar, logging_redirect_tqdm():

            def show(done: int) -> None:
                if bar.update(done - bar.n):  # it was time to show it again
                    bar.set_postfix_str(how_good())

            yield show
        return

    started = shown = time.monotonic()

    def show(done: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > 2:
            shown = time.monotonic()
            of_all = f" of {total:,}" if total else ""
            line = f"{done:,}{of_all} samples, {done / (shown - started):,.0f}/s, {how_good()}"
            print(line.removesuffix(", "), file=sys.stderr)

    yield show


# ------------------------------------------------------------------------------------------- Replay

LAST = 1000  # predictions that the report is about, or half of them if it is a small file
WINDOWS = (100, LAST, 10_000)  # the n of the /metrics/<n> in it
SUSPECTS = 10  # bookings that look wrong, in the report
MAX_PAGE = 500  # bookings in one answer


def replay(client: Client, options: argparse.Namespace, name: str, rows: Iterator[Sample]) -> dict:
    """Sends the rows in batches and reports; Ctrl-C ends it early. Raises Failed.

    The name is the same for the same rows in the same batches only.
    """
    run = Run(client, options, name)
    started = time.monotonic()
    interrupted = False
    try:
        run.send(rows)
    except KeyboardInterrupt:
        interrupted = True
        client.patience = 2
    except ServiceError as error:
        if error.status == 422 and run.resumable:
            others = "some of these rows were sent before, in other batches, or were forgotten"
            raise Failed(f"{error}; {others}: --again books all of them once more") from None
        if not (error.temporary and run.resumable):
            raise
        log = f" with --log {options.log}" if options.serve else ""
        raise Failed(f"{error}; the same command goes on{log}") from None
    seconds = time.monotonic() - started
    report = {
        "samples": run.sent,
        "stored_before": run.stored_before,
        "stored_as": run.stored_as,
        "known": run.known,
        "corrected": run.corrected,
        "seconds": round(seconds, 3),
        "samples_per_second": round(run.sent / seconds),
        "accounts": None,
        "metrics": {},
        **dict.fromkeys(("report", "unseen", "booked_unseen", "suspects", "prediction")),
        "interrupted": interrupted,
        "resumable": run.resumable,
    }
    try:
        report |= run.figures()
        report["prediction"] = run.prediction(next(rows, None))
    except Failed as error:
        print(f"replay: {error}", file=sys.stderr)
    return report


class Run:
    """One replay: what the service has of it, and what it says.

    Each batch has a key that is the same when the same rows are sent once more, so that the service
    stores it once, whatever happened to the first attempt.
    """

    def __init__(self, client: Client, options: argparse.Namespace, name: str) -> None:
        self.client, self.options = client, options
        self.before = client.health()
        # What was suggested for a batch that comes again would be another by then.
        self.resumable = options.book_from is None and not options.again
        self.name = name if self.resumable else uuid.uuid4().hex
        self.sent = self.stored_before = 0
        self.known = self.corrected = 0  # of those with an id
        self.stored_as: list[int] = []  # the first and the last seq of what had been stored before
        self.account_names: dict[tuple[str, str], str | None] = {}  # by company and account
        book_from = options.book_from
        self.integrator = None if book_from is None else Integrator(client, book_from)

    def send(self, rows: Iterator[Sample]) -> None:
        """Sends as many of the rows as there are to send."""
        most, largest, seed = self.options.samples, self.options.batch, self.options.seed
        with _progress(self.options.total, self.how_good) as show:
            for batch in batches(itertools.islice(rows, most), largest, seed):
                for row in batch:
                    self.account_names[row["CompanyId"], row[TARGET]] = row.get("AccountName")
                if self.integrator:
                    batch = self.integrator.book(batch)
                answer = self.client.sample(batch, f"replay {self.name} row {self.sent}")
                self.sent += len(batch)
                self.known += answer.get("known", 0)
                self.corrected += answer.get("corrected", 0)
                if answer["first"] is not None and answer["first"] < self.before["lines"]:
                    self.stored_before += len(batch)
                    first, *_ = self.stored_as or [answer["first"]]
                    self.stored_as = [first, answer["last"]]
                show(self.sent)

    def how_good(self) -> str:
        """How good the service's last predictions were, in short."""
        last = self.last(LAST)
        figures = "accuracy {accuracy:.3f}, precision {precision:.3f}, recall {recall:.3f}"
        return figures.format(**last) if last and last["accuracy"] is not None else ""

    def last(self, n: int) -> dict | None:
        """What the service reports of its last n predictions; None if there are none yet."""
        return or_none(lambda: self.client.report(n))

    def figures(self) -> dict:
        """What the service says of its last predictions."""
        report = self.last(min(LAST, max(100, self.sent // 2)))
        if not report or report["accuracy"] is None:
            return {}
        predicted = self.client.report(max(WINDOWS))["support"]
        wanted = [n for n in WINDOWS if n == LAST or n <= predicted]
        return {
            "accounts": self.client.health()["accounts"],
            "metrics": {str(n): self.client.metrics(n) for n in wanted},
            "report": report,
            "unseen": best_level(report["confidence"]),
            "booked_unseen": self.integrator and self.integrator.report(),
            "suspects": self.suspects(),
        }

    def suspects(self) -> list[dict]:
        """What looks wrong most, of bookings that are alike only one; none if nothing can say."""
        try:
            found = self.client.suspects(limit=MAX_PAGE)
        except ServiceError as error:
            if error.status == 404:  # bookkeep_extra is missing
                return []
            raise
        alike = {}
        for each in found:
            sample = each["sample"]
            alike.setdefault((sample["CompanyId"], sample["BankEntryText"], each["account"]), each)
        return [*alike.values()][:SUSPECTS]

    def prediction(self, row: Sample | None) -> dict | None:
        """What the service suggests for a row that it has not been sent, if there is one."""
        if row is None or not self.sent:
            return None
        sample = without_account(row)
        answer = or_none(lambda: self.client.suggest(sample, top=1))
        if answer is None:
            return None
        [suggestion] = answer["suggestions"]
        account = suggestion["account"]
        return {
            "sample": sample,
            "context": self.options.context,
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

    def __init__(self, client: Client, book_from: float) -> None:
        self.client, self.book_from = client, book_from
        # Of each suggestion: how sure it was, whether it was right, by whom it was booked.
        self.outcomes: list[tuple[float, bool, str]] = []

    def book(self, rows: Sequence[Sample]) -> list[Sample]:
        """The rows as they are to be booked: as they are where there is no model yet."""
        asked = [without_account(row) for row in rows]
        answers = or_none(lambda: self.client.suggest(asked, 1, self.book_from, reasons=False))
        if answers is None:
            return [*rows]
        booked = []
        for row, sample, answer in zip(rows, asked, answers, strict=True):
            [suggestion] = answer["suggestions"]
            account, who = suggestion["account"], BOOKED_AFTER[answer["decision"]]
            confidence = suggestion["confidence"] or 0.0  # null is: nothing was measured yet
            self.outcomes.append((confidence, account == row[TARGET], who))
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
        said = self.client.report(scored, book_from=self.book_from)
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


def or_none(ask: Callable[[], T]) -> T | None:
    """What comes of it; None while the service has nothing to answer with."""
    try:
        return ask()
    except ServiceError as error:
        if error.status == 503:
            return None
        raise


def without_account(row: Sample) -> Sample:
    """What is known of a row before it is booked."""
    return {key: value for key, value in row.items() if not key.startswith("Account")}


def best_level(levels: Sequence[dict]) -> dict:
    """The confidence of at least 0.8 from which on most are right in nine of ten cases.

    If there is none, 0.9 as an example.
    """
    good = [row for row in levels if row["at_least"] >= 0.8 and (row["accuracy"] or 0) >= 0.9]
    example = [row for row in levels if row["at_least"] == 0.9]
    return max(good or example, key=lambda row: row["share"])


def batches(rows: Iterable[Sample], largest: int, seed: int) -> Iterator[list[Sample]]:
    """Batches of random size, from 1 to the largest."""
    sizes = random.Random(seed)
    rows = iter(rows)
    while batch := list(itertools.islice(rows, sizes.randint(1, largest))):
        yield batch


# ------------------------------------------------------------------------------------------- Report


def in_words(report: dict) -> str:
    """The report as a person reads it."""
    rate = f"{report['seconds']:.1f} s, {report['samples_per_second']:,} a second"
    sent = [f"{report['samples']:,} bookings in {rate}"]
    if n := report["stored_before"]:
        first, last = report["stored_as"]
        all_of = "all" if n == report["samples"] else f"{n:,}"
        there = f"{all_of} of them are there already, as bookings {first:,} to {last:,}"
        sent.append(f"{there}: they were not booked twice, which --again does")
    if known := report["known"] + report["corrected"]:
        sent.append(
            f"{known:,} were known by their Id, and not booked twice; changed of them: "
            f"{report['corrected']:,}"
        )
    paragraphs: list[Iterable[str]] = [sent]
    if report["booked_unseen"]:
        paragraphs.append(_booked_unseen(report["booked_unseen"]))
    elif report["unseen"]:
        paragraphs.append(_quality(report["report"], report["unseen"], report["accounts"]))
    else:
        paragraphs.append(["How good it is was not measured yet: there were too few bookings"])
    if report["suspects"]:
        paragraphs.append(_suspects(report["suspects"]))
    if report["prediction"]:
        paragraphs.append(_prediction(report["prediction"]))
    if last := report["metrics"].get(str(LAST)):
        figures = f"precision {last['precision']:.3f}   recall {last['recall']:.3f}"
        paragraphs.append([f"/metrics/{LAST}   {figures}"])
    paragraphs.append(_next(report))
    return "\n\n".join("\n".join(lines) for lines in paragraphs)


def _quality(last: dict, level: dict, accounts: int) -> Iterator[str]:
    """How many of the last predictions were right, and of those that were sure enough."""
    n, accuracy = last["support"], _percent(last["accuracy"], 1)
    precision, recall = _percent(last["precision"], 1), _percent(last["recall"], 1)
    yield (
        f"The last {n:,} predictions, each of one among {accounts:,} accounts, made "
        "before the booking was known:"
    )
    yield (
        f"  {round(last['accuracy'] * n):,} were right: accuracy {accuracy}; "
        f"as averages over accounts, precision {precision}, recall {recall}"
    )
    sure, at_least = round(level["share"] * n), _percent(level["at_least"])
    if not sure:
        yield f"  none was at least {at_least} sure, so none could have been booked unseen yet"
        return
    right = f"{round(level['accuracy'] * sure):,} of these were right"
    error = f" (± {_percent(level['error'], 1)})" if level.get("error") is not None else ""
    yield (
        f"  {sure:,} could have been booked unseen, being at least {at_least} sure: "
        f"{right}, {_percent(level['accuracy'], 1)}{error}"
    )


def _booked_unseen(found: dict) -> Iterator[str]:
    """What the service says that it got right, and what is true."""
    said, true, n = found["said"], found["true"], found["suggestions"]
    unseen, checks = found["unseen"], found["checks"]
    wrong = f"{found['unseen_wrong']:,} are wrong, {_percent(found['unseen_wrong'] / n, 1)} of all"
    yield f"Booked unseen from {_percent(found['book_from'])} on, in the last {n:,} bookings:"
    yield f"  {unseen:,} unseen, of which {wrong}; {checks:,} were checked instead"
    if said["accuracy"] is not None:
        about = f"{_percent(said['accuracy'], 1)} (± {_percent(said['error'], 1)})"
        truth = _percent(true["accuracy"], 1)
        yield f"  right of those: {about}, the service says; {truth}, in truth"
    about, truth = _percent(said["overall"], 1), _percent(true["overall"], 1)
    yield f"  right of all: {about}, the service says; {truth}, in truth"


def _suspects(found: Sequence[dict]) -> Iterator[str]:
    """The bookings that look wrong most, and why."""
    yield "What looks wrong most, of the last bookings:"
    for each in found:
        sample, account, likely = each["sample"], each["account"], each["likely"]
        on = f"{each['on_likely']:,} on {likely}, {each['on_account']:,} on {account}"
        of = f"{each['alike']:,} other{'s' * (each['alike'] != 1)} with the same {each['like']}"
        yield (
            f'  {_percent(min(each["probability"], 0.99))} "{sample["BankEntryText"]}" of '
            f"{sample['CompanyId']}, {sample['BankEntryAmount']}, is on {account}; "
            f"{likely} is likelier{f': of {of}, {on}' if each['like'] else ''}"
        )


def _prediction(found: dict) -> Iterator[str]:
    sample, reason = found["sample"], found["reason"]
    predicted, booked = (
        f"{found[by]} ({found[f'{by}_name']})" if found[f"{by}_name"] else found[by]
        for by in ("predicted", "booked")
    )
    because = f', because of "{reason["token"]}" ({reason["kind"]})' if reason else ""
    yield (
        f'The next one, not sent: "{sample["BankEntryText"]}" of {sample["CompanyId"]}, '
        f"{sample['BankEntryAmount']}"
        + "".join(f", {key} {sample[key]}" for key in found["context"] if sample[key])
    )
    confidence = found["confidence"]
    sure = "not measured yet" if confidence is None else f"{_percent(confidence)} sure"
    yield f"  predicted {predicted}, {sure}{because}"
    yield f"  the accountant booked {booked}"


def _next(report: dict) -> Iterator[str]:
    """Where all of it is, and what to do now."""
    log = f" --log {report['log']}" if "log" in report else ""
    if report["interrupted"]:
        how = f"; the same command goes on{log and f' with{log}'}"
        yield f"Interrupted{how if report['resumable'] else ''}"
        return
    if log:
        yield f"All of it is in {report['log']}"
    if names := report.get("context"):
        log += f" --context {shlex.quote(','.join(names))}"
    if "page" not in report:
        yield "What to try next:"
        yield "  the same command with --stay shows it on a page, in a browser"
        yield f"  {START}{log} goes on from here, and then"
        yield f"  {REPLAY} NEW.csv --suggest{report['how']} > SUGGESTED.csv suggests accounts"
    elif not log:
        yield f"Its page is at {report['page']}"


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


# ------------------------------------------------------------------------------------------ Suggest


def suggest(client: Client, book: Any) -> None:
    """Writes the file to standard output, each row with an account, how sure that is, and by whom.

    All are empty where the service cannot take a row. Nothing is learned. Raises Failed.
    """
    if len(book.tables) > 1:
        raise Failed("--suggest takes one file: unzip them, and take one after the other")
    [table] = book.tables
    wanted = (*files.FEATURES, *table.context)

    def suggested(samples: list[Sample]) -> Iterator[tuple]:
        asked = [{key: sample[key] for key in wanted} for sample in samples]
        for answer in client.suggest(asked, top=1, reasons=False):
            best = answer["suggestions"][0]
            sure = "" if best["confidence"] is None else best["confidence"]
            yield guarded(best["account"]), sure, "suggestion"

    sys.stdout.reconfigure(encoding="utf-8", newline="")
    with _progress(table.rows, str) as show:
        for done in table.suggested(sys.stdout, suggested, ("account", "confidence", BOOKED_BY)):
            show(done)


# ------------------------------------------------------------------------------------- Command line

EXAMPLES = """\
the demo, all in one:
  replay.py --serve
see how well your own bookings are predicted, teach a service that runs, and let it suggest:
  replay.py OLD.csv --serve
  replay.py OLD.csv --samples all --company acme --map text=Payee+Purpose,out=Debit,in=Credit,...
  replay.py NEW.csv --suggest --company acme --map (the same) > SUGGESTED.csv"""
THE_FILE = """\
Columns: CompanyId, BankEntryText, BankEntryAmount, AccountNumber (but for --suggest), and
BankEntryDate to sort by. Under other names they are guessed, or found with --map. AccountName
is shown, others are sent along. Encoding, separator, quotes, and how amounts (1,200.00,
1.200,00 Dr, (12.50), € 12.50) and dates (2016-02-29, 29.02.16, 29 Feb 2016) are written show in
the file, and it says what it took them for. Rows that lack something are left out. Excel,
MT940 and OFX are read, too."""
DATA = HERE / "data" if CHECKED_OUT else Path("data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the options say and prints what came of it; the exit status."""
    if files is None:
        where = "bookkeep_extra/files.py, which is not beside it: pip install '.[client]'"
        sys.exit(f"replay: files are read by {where} in bookkeep's folder installs both")
    options = _options(arguments)
    logging.basicConfig(format="replay: %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)  # so that a service is stopped, too
    logger.setLevel(logging.INFO)
    try:
        return _run(options)
    except BrokenPipeError:  # whoever read this has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (Failed, OSError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    """Replays or suggests; the exit status. Raises Failed."""
    if not options.file:
        options.file = _default_file()
        if "synthetic" in options.file.name:
            options.map.setdefault("context", "Department")  # the demo shows what that is good for
    token = os.environ.get("BOOKKEEP_TOKEN")
    if options.token_file:
        token = options.token_file.read_text("latin-1").strip()
    with ExitStack() as opened:
        # All of the file is looked at before a service is started in vain.
        reading = files.open_file(
            options.file,
            options.map,
            company=options.company,
            booked=not options.suggest,
            encoding=options.encoding,
            guess=True,
            ask=_ask if sys.stdin.isatty() and sys.stderr.isatty() else None,
            otherwise="my-company" if options.serve else None,
        )
        book = opened.enter_context(reading)
        options.context = book.context
        for table in book.tables:
            table.say("without a suggestion" if options.suggest else "left out")
        if not options.suggest:
            if not book.rows:
                raise Failed(f"there are no bookings in {options.file}")
            options.batch = options.batch or max(1, min(book.usable // 50, LARGE))
            options.total = min(options.samples or book.usable, book.usable)
            rows = book.samples()
            if options.order == "date":
                rows = iter(by_date(rows))
        if options.serve:
            options.log = options.log or Path(tempfile.mkdtemp(prefix="bookkeep-")) / "replay.jsonl"
            command = [HERE / "bookkeep.py", f"--log={options.log}"]
            if options.context:
                command.append(f"--context={','.join(options.context)}")
            port, service = opened.enter_context(started(*command, token=token))
            options.url = f"http://127.0.0.1:{port}"
        client = Client(options.url, token)
        if options.suggest:
            suggest(client, book)
            return 0
        if options.stay:
            print(f"Watch it learn: {client.url}/", file=sys.stderr)
        how = [book.digest, book.map, book.company, options.encoding]
        how += [options.order, options.batch, options.seed]
        name = hashlib.sha256(repr(how).encode()).hexdigest()[:32]
        report = replay(client, options, name, rows)
        if options.serve:
            report |= {"log": str(options.log), "context": options.context}
            report["how"] = _how(book, options)
        if options.stay or not options.serve:
            report["page"] = f"{client.url}/"
        print(json.dumps(report) if options.json else in_words(report), flush=True)
        if report["interrupted"]:
            return 130
        if options.stay:
            print(f"The page is at {client.url}/ until Ctrl-C", file=sys.stderr)
            with suppress(KeyboardInterrupt):
                service.wait()
                raise Failed("the service has ended")
    return 0


def _ask(field: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str | None:
    """Asks whoever is at the terminal which column it is."""
    print(f"Which column is the {field}?", file=sys.stderr)
    for number, name in enumerate(names):
        such = ", ".join(row[number] for row in rows if number < len(row) and row[number].strip())
        print(f"  {number + 1}  {name}  ({such[:60]})", file=sys.stderr)
    print("Its name or number: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() or None


def _how(book: Any, options: argparse.Namespace) -> str:
    """The options that name the company and the columns of a file like this one."""
    given = {"company": book.company, "map": book.map, "encoding": options.encoding}
    return "".join(f" --{name} {shlex.quote(value)}" for name, value in given.items() if value)


def _default_file() -> Path:
    for kind in ("obfuscated.csv.zip", "obfuscated.csv", "synthetic.csv.zip"):
        if (path := DATA / f"bank_expenses_{kind}").exists():
            return path
    raise Failed(
        f"there is no data set in {DATA}/: name a CSV file of bookings (--help says which columns "
        "it needs), as data/bank_expenses_synthetic.csv.zip, which is in bookkeep's repository"
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="replay",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Streams a file of bookings to bookkeep and shows how well it predicts.",
        epilog=EXAMPLES,
    )
    option = parser.add_argument_group("the file", THE_FILE).add_argument
    usual = "a CSV file or a zip of some; without it, a bank set in data/, the real or synthetic"
    option("file", nargs="?", type=Path, metavar="FILE", help=usual)
    how = f"which column is which, of {', '.join(FIELDS)}, by name or number; text=A+B joins two; "
    how += "out and in are columns of money out and in, sign is one with D or C, + or -; by is who "
    how += "booked it; context=C+D sends two under their own names, and --serve goes by them, too"
    option("--map", type=columns, action="append", default=[], metavar="FIELD=COLUMN,...", help=how)
    option("--company", help="the company of all of its rows")
    option("--encoding", help="as cp1252 or utf-8 (default: as it is found)")
    written = "write it to standard output with suggested accounts instead; nothing is learned"
    option("--suggest", action="store_true", help=written)
    option = parser.add_argument_group("the replay").add_argument
    most = "how many of its first rows to send, or all (default: %(default)s)"
    option("--samples", type=_count_or_all, default=15_000, help=most)
    option("--order", choices=["date", "file"], default="date", help="by date, or as they stand")
    largest = (
        "the largest batch; sizes are random, from 1 to this (default: a fiftieth of the file)"
    )
    option("--batch", type=count, help=largest)
    option("--seed", type=int, default=0, help="of those sizes (default: %(default)s)")
    unseen = "book suggestions unseen from this confidence on, but for the checks, with the file "
    unseen += "as the accountant for all others; and say what the service says of it and the truth"
    option("--book-from", type=float, metavar="CONFIDENCE", help=unseen)
    again = "book rows that are there already once more; else the same command goes on where it was"
    option("--again", action="store_true", help=again)
    option("--json", action="store_true", help="print the report as a JSON object")
    group = parser.add_argument_group("the service")
    option = group.add_mutually_exclusive_group().add_argument
    option("--url", default="http://127.0.0.1:8080", help="where it is (default: %(default)s)")
    option("--serve", action="store_true", help="start it, and stop it at the end")
    option = group.add_argument
    option("--stay", action="store_true", help="with --serve: serve its page until Ctrl-C")
    option("--log", type=Path, help="with --serve: its log (default: in a new temporary folder)")
    option("--token-file", type=Path, metavar="FILE", help="its token; or set BOOKKEEP_TOKEN")

    options = parser.parse_args(arguments)
    options.map = {field: name for named in options.map for field, name in named.items()}
    of_a_replay = ("samples", "order", "batch", "seed", "book_from", "again", "json", "stay")
    given = [name for name in of_a_replay if getattr(options, name) != parser.get_default(name)]
    book_from = options.book_from
    if options.company and "company" in options.map:
        parser.error("give --company, or a company= in --map, not both")
    if options.suggest and not options.file:
        parser.error("--suggest needs a FILE")
    if options.suggest and given:
        parser.error(f"--{given[0].replace('_', '-')} does not go with --suggest")
    if book_from is not None and not 0 <= book_from <= 1:
        parser.error(f"{book_from} is not a number from 0 to 1")
    for name in ("stay", "log"):
        if getattr(options, name) and not options.serve:
            parser.error(f"--{name} goes with --serve")
    return options


def columns(text: str) -> dict[str, str]:
    """The columns by the fields that the text names, as text=Description,amount=Amount does."""
    found = {}
    for part in re.split(rf",\s*(?=(?:{'|'.join(FIELDS)})=)", text):
        field, equals, name = part.partition("=")
        if field not in FIELDS or not equals:
            named = ", ".join(FIELDS)
            raise argparse.ArgumentTypeError(f"{part} is not FIELD=COLUMN, with one of {named}")
        if field == "context" and "," in name:
            raise argparse.ArgumentTypeError(f"{part}: put + between columns, which have no comma")
        found[field] = name
    return found


def count(text: str) -> int:
    """The whole number, of at least 1, that the text says, for argparse."""
    if not (text.isdecimal() and len(text) < 19 and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _count_or_all(text: str) -> int | None:
    return None if text == "all" else count(text)


if __name__ == "__main__":
    sys.exit(main())
