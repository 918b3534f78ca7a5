"""replay: the client of bookkeep, for Python and for CSV files.

`Client` is the service as Python calls. `python replay.py FILE` streams a CSV file of bookings to
the service, in batches as an accounting program would, and reports how many it would have booked
right; `python replay.py --serve` is the demo, which starts the service, too. It judges nothing by
itself: all figures are the service's own. `python replay.py --suggest FILE` writes the file with
the accounts that the service suggests.

The module needs nothing but Python, and reads from top to bottom: Client, Files, Service, Progress,
Replay, Report, Suggest, Command line.
"""

import os
import signal
import sys

if (__name__ == "__main__" or os.path.basename(sys.argv[0]) == "bookkeep-replay") and (
    signal.getsignal(signal.SIGINT) != signal.SIG_IGN
):
    # Quiet from the start: to import all that follows takes a moment. It is main's afterwards.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import codecs
import csv
import hashlib
import io
import itertools
import json
import logging
import random
import re
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import lru_cache, partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from ssl import CertificateError
from typing import Any, BinaryIO, NamedTuple, TypeVar, overload
from urllib.parse import urlencode, urlsplit

try:
    from tqdm import tqdm
except ImportError:  # the extra "client" is not installed: plain lines will do
    tqdm = None

HERE = Path(__file__).parent
CHECKED_OUT = (HERE / "data").is_dir()  # else it is installed
START = "python bookkeep.py" if CHECKED_OUT else "bookkeep"  # what starts the service

FIELDS = {  # the keys of a sample that mean something, by their names for --map
    "company": "CompanyId",
    "text": "BankEntryText",
    "amount": "BankEntryAmount",
    "account": "AccountNumber",
    "date": "BankEntryDate",
    "name": "AccountName",
}
LONGEST = {  # characters in the values that a booking must have
    "CompanyId": 100,
    "BankEntryText": 10_000,
    "BankEntryAmount": 100,
    "AccountNumber": 100,
}
COLUMNS = [*LONGEST]
TARGET = "AccountNumber"  # the last of them
BOOKED_BY = "BookedBy"
BOOKED_AFTER = {"book": "suggestion", "check": "check", "review": "person"}  # a decision, by whom
WHO = sorted(BOOKED_AFTER.values())

Sample = dict[str, str]
T = TypeVar("T")

logger = logging.getLogger("replay")


# ------------------------------------------------------------------------------------------- Client

MAX_SUGGESTED = 300  # suggestions with reasons that the service gives in one answer
LARGE = 1000  # samples in one request, where it takes long lists
BUSY = {429, 502, 503, 504}  # what the service, or a proxy before it, says for the moment
TEMPORARY = {*BUSY, 507}


class Failed(Exception):
    """It cannot go on; the message says why in one sentence."""


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
        self.temporary = wait is not None or status in TEMPORARY


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
        address = urlsplit(url)
        kinds = {"http": HTTPConnection, "https": HTTPSConnection}
        try:
            if not address.hostname:
                raise ValueError
            self._connect = partial(
                kinds[address.scheme], address.hostname, address.port, timeout=timeout
            )
            self._connect()
        except (KeyError, ValueError, HTTPException):
            sentence = "this is not the URL of a service, as http://127.0.0.1:8080 is"
            raise ServiceError(url, sentence) from None
        self.url = url.rstrip("/")
        self.patience = patience
        self._path = address.path.rstrip("/")
        self._own = threading.local()  # a connection for each thread
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {self._printable('a token', '[!-~]+', token)}"

    def sample(self, bookings: Sequence[Sample], key: str | None = None) -> dict:
        """Stores bookings, which are then learned: {"received", "total", "first", "last"}.

        Under a key of yours, such as the name of the file that they are from, they are booked once,
        however often you send them: also if your own program was killed in between. Without one,
        only this call's own attempts are one booking.
        """
        return self.ask("POST", "/sample", bookings, key or uuid.uuid4().hex)

    @overload
    def predict(self, samples: Sample) -> str: ...
    @overload
    def predict(self, samples: Sequence[Sample]) -> list[str]: ...

    def predict(self, samples: Sample | Sequence[Sample]) -> str | list[str]:
        """The account of a sample, or of each in a list of any length."""
        if isinstance(samples, dict):
            return self.ask("POST", "/predict", samples)[0]
        return self._of_each("/predict", samples, LARGE)

    @overload
    def suggest(
        self, samples: Sample, top: int = 3, book_from: float | None = None, reasons: bool = True
    ) -> dict: ...
    @overload
    def suggest(
        self,
        samples: Sequence[Sample],
        top: int = 3,
        book_from: float | None = None,
        reasons: bool = True,
    ) -> list[dict]: ...

    def suggest(
        self,
        samples: Sample | Sequence[Sample],
        top: int = 3,
        book_from: float | None = None,
        reasons: bool = True,
    ) -> dict | list[dict]:
        """Up to `top` accounts for a sample, or for each in a list of any length, and how sure.

        With `book_from`, each answer has the decision, `book`, `check` or `review`. Without reasons
        it takes a fraction of the time.
        """
        given = {"top": top, "book_from": book_from, "reasons": None if reasons else "no"}
        path = _query("/suggest", given)
        if isinstance(samples, dict):
            return self.ask("POST", path, samples)
        size = max(1, MAX_SUGGESTED // max(1, top)) if reasons else LARGE
        return self._of_each(path, samples, size)

    def correct(self, seq: int, account: str) -> dict:
        """Books the booking with this seq to another account, or confirms its own.

        Gives {"seq", "AccountNumber", "before"}.
        """
        return self.ask("POST", "/correct", {"seq": seq, TARGET: account})

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

    def health(self) -> dict:
        """How much has been learned, and whether bookings can be stored."""
        health = self.ask("GET", "/health")
        if not (isinstance(health, dict) and isinstance(health.get("lines"), int)):
            raise ServiceError(self.url, "this is no bookkeep service")
        return health

    def close(self) -> None:
        """Closes this thread's connection; the next call opens another."""
        connection = getattr(self._own, "connection", None)
        if connection:
            connection.close()

    def ask(
        self, method: str, path: str, content: object = None, key: str = "", again: bool = True
    ) -> Any:
        """What the service answers to any request, path and query as they are sent.

        Tries again for a while if it is not there or not ready; where it may have done what was
        asked, only if it may be asked `again`. Raises ServiceError.
        """
        headers = self._headers
        if key:
            wanted = "[!-~]([ -~]{0,198}[!-~])?"
            headers = headers | {"Idempotency-Key": self._printable("a key", wanted, key)}
        body = None if content is None else json.dumps(content).encode()
        end = time.monotonic() + self.patience
        pause = 0.1
        waits = False
        while True:
            try:
                return self._attempt(method, path, body, headers)
            except ServiceError as error:
                if error.wait is None or (error.lost and not again):
                    raise
                wait = max(error.wait, pause * random.uniform(0.5, 1))  # not all at once
                if time.monotonic() + wait > end:
                    raise
                if not waits:
                    logger.warning(
                        "waiting %.0f s for the service at %s (%s)",
                        *(self.patience, self.url, error.sentence),
                    )
                    waits = True
            time.sleep(wait)
            pause = min(2 * pause, 2)

    def _attempt(self, method: str, path: str, body: bytes | None, headers: dict) -> Any:
        """The answer to one request. Raises ServiceError, which says what can be done."""
        where = self.url + path
        connection, sent = self._connection(), False
        try:
            try:
                if connection.sock is None:
                    connection.connect()
                sent = True
                connection.request(method, self._path + path, body, headers)
                with connection.getresponse() as response:
                    answer = response.read()
            except BaseException:  # whatever it is, nothing more can be read there
                connection.close()
                raise
        except CertificateError as error:
            raise ServiceError(where, f"it cannot be trusted: {error}") from None
        except (OSError, HTTPException) as error:
            reason = f"no answer: {error!r}"
            if isinstance(error, ConnectionRefusedError):
                reason = f"connection refused: start it with {START}, or give replay.py --serve"
            raise ServiceError(where, reason, wait=0, lost=sent) from None
        try:
            content = json.loads(answer)
        except ValueError:
            content = None
        if response.status == 200 and content is not None:
            return content
        raise self._refusal(where, response, content)

    def _connection(self) -> HTTPConnection:
        """This thread's connection, closed if the other end has closed it."""
        connection = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._own.connection = self._connect()
        elif connection.sock:
            with suppress(ValueError):  # too many files are open to look
                if select.select([connection.sock], [], [], 0)[0]:
                    connection.close()
        return connection

    @staticmethod
    def _refusal(where: str, response: HTTPResponse, content: object) -> ServiceError:
        """The error that an answer other than the one wanted means."""
        status, after = response.status, response.headers.get("Retry-After", "")
        said = content.get("error") if isinstance(content, dict) else None
        if status == 200:
            return ServiceError(where, "this is no bookkeep service")
        wait = None
        # A 503 of the service's own without a time says that there is nothing to answer with yet.
        if status in BUSY and (status != 503 or after or not said):
            wait = int(after) if re.fullmatch("[0-9]{1,5}", after) else 0
        lost = status in (502, 504)  # a proxy's, which may not know
        return ServiceError(where, said or response.reason, status, wait, lost)

    def _of_each(self, path: str, samples: Sequence[Sample], size: int) -> list:
        """What the path answers to each of the samples, in requests of that size."""
        asked = chunks(samples, size)
        return [answer for chunk in asked for answer in self.ask("POST", path, chunk)]

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


# -------------------------------------------------------------------------------------------- Files

ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # encrypted is the last
CURRENCY = re.compile("[A-Z]{3}|[A-Z]{0,2}[$€£¥₩₪₫₴₸₹₺₽]|[Kk]r[.]?|Fr[.]?|zł|Kč|Ft")
SPELLING = str.maketrans({"'": None, "’": None, "−": "-", "–": "-"})
SIGNED = re.compile(r"([(])?([+-]?)([0-9.,]+)([+-]?)(?(1)[)])")
NUMBER = {  # by its decimal mark: what stands before that, and after it
    mark: re.compile(
        f"([0-9]*|[1-9][0-9]{{0,2}}(?:[{other}][0-9]{{2,3}})*[{other}][0-9]{{3}})"
        f"(?:[{mark}]([0-9]+))?"
    )
    for mark, other in (".,", ",.")
}
DAY_OR_MONTH = re.compile(  # that a date begins with
    r"([0-9]{1,2})([./-])([0-9]{1,2})\2([0-9]{4}|(?<=[./])[0-9]{2})(?![0-9])"
)
AS_IT_STANDS = "replay.py --order file needs no dates, and sends rows as they stand"


class Record(NamedTuple):
    """A row of a file: the line that it ends in, its text as it stands, and its values."""

    line: int
    text: str
    values: list[str]


class Table:
    """A CSV file of bookings: its rows as they stand, and each as a sample.

    Its encoding, separator and quotes, and how it writes amounts, are found in the file itself,
    which is read once for that.
    """

    def __init__(
        self,
        file: BinaryIO,
        path: Path,
        columns: Mapping[str, str] | None,
        company: str | None,
        booked: bool,
    ) -> None:
        """As open_table. Raises Failed if a row cannot be used."""
        self.path = path
        named = {FIELDS[field]: names.split("+") for field, names in (columns or {}).items()}
        self._fixed = {} if company is None else {"CompanyId": company}
        self._booked = booked
        self._needed = COLUMNS if booked else COLUMNS[:-1]
        if not booked:
            named.pop(TARGET, None)  # so that the same names will do before and after
        keys = [key for key in self._needed if key not in self._fixed] + list(named)
        wanted = list(dict.fromkeys(itertools.chain(*(named.get(key, [key]) for key in keys))))
        with _reading(path):
            self._text = io.TextIOWrapper(file, newline="", encoding=_encoding(file))
            self.header = self._text.readline()
            self._dialect = _dialect(self.header, wanted)
            [self._columns] = _csv([self.header], *self._dialect)
        self._check_columns(wanted)
        self._places = {  # in a row, of what each key of a sample is made of
            column: [place]
            for place, column in enumerate(self._columns)
            if column not in named and column not in itertools.chain(*named.values())
        }
        for key, names in named.items():
            self._places[key] = [self._columns.index(name) for name in names]
        self._amounts = Amounts()
        self.rows = 0
        self.lacking: list[int] = []  # the lines of rows that the service cannot take
        self._survey()

    def records(self) -> Iterator[Record]:
        """The file's rows, the header left out; one of an empty line has no values. Raises Failed.

        They are read anew each time, one after the other.
        """
        with _reading(self.path):
            self._text.seek(0)
            read: list[str] = []
            rows = _csv((read.append(line) or line for line in self._text), *self._dialect)
            for number, values in enumerate(rows):
                if number:
                    yield Record(rows.line_num, "".join(read), values)
                read.clear()

    def sample(self, values: list[str]) -> Sample:
        """A row as a sample, its amount as a plain decimal number if it is one."""
        sample = self._as_written(values)
        sample["BankEntryAmount"] = self._amounts.plain(sample["BankEntryAmount"])
        return sample

    def takes(self, sample: Sample) -> bool:
        """Whether the service would: nothing that it needs is missing, empty or too long."""
        return all(0 < len(sample.get(key, "")) <= LONGEST[key] for key in self._needed)

    def samples(self) -> Iterator[Sample]:
        """The rows that the service takes, as samples."""
        for record in self.records():
            if record.values and self.takes(sample := self.sample(record.values)):
                yield sample

    def lack(self) -> str:
        """Why it does not take some rows, and how many these are."""
        *needed, last = [field for field, key in FIELDS.items() if key in self._needed]
        return (
            f"as {', '.join(needed)} or {last} is empty or too long: {len(self.lacking):,} of "
            f"{self.rows:,}, the first in line {self.lacking[0]}"
        )

    def extended(self, text: str, *values: str) -> bytes:
        """The text of a row with more values, written as the header is."""
        separator, quote = self._dialect
        row = text.rstrip("\r\n")
        end = text[len(row) :]
        always = self.header.startswith(quote)
        for value in values:
            if always or any(mark in value for mark in (separator, quote, "\r", "\n")):
                value = quote + value.replace(quote, 2 * quote) + quote
            row += separator + value
        return (row + end).encode()

    def _as_written(self, values: list[str]) -> Sample:
        sample = {
            key: values[at[0]] if len(at) == 1 else " ".join(values[i] for i in at if values[i])
            for key, at in self._places.items()
        }
        return sample | self._fixed

    def _survey(self) -> None:
        """Looks at all rows. Raises Failed if one cannot be used."""
        for line, _, values in self.records():
            if not values:
                continue
            self.rows += 1
            where = f"{self.path}, line {line}"
            if len(values) != len(self._columns):
                raise Failed(f"{where}: there must be {len(self._columns)} values")
            sample = self._as_written(values)
            if self._booked and sample.get(BOOKED_BY, "person") not in WHO:
                raise Failed(
                    f"{where}: {BOOKED_BY} must be one of {', '.join(WHO)}; if the column says "
                    "something else, give it another name"
                )
            self._amounts.look(sample["BankEntryAmount"], line)
            if not self.takes(sample):
                self.lacking.append(line)
        self._amounts.decide(self.path)

    def _check_columns(self, wanted: Sequence[str]) -> None:
        has = ", ".join(name if name.isprintable() else repr(name) for name in self._columns)[:1000]
        if missing := [column for column in wanted if column not in self._columns]:
            raise Failed(
                f"{self.path} is no CSV file with the column {', '.join(missing)} in its first "
                f"line, which has {has or 'none'}; say with --map which is which"
            )
        if twice := [column for column in wanted if self._columns.count(column) > 1]:
            raise Failed(f"{self.path} has the column {twice[0]} more than once: {has}")


class Amounts:
    """How a column writes its amounts: `1,200.00`, `1.200,00`, `(12.50)`, `€ 12.50`, `12,50-`.

    Which mark the decimals follow is decided by all of the column, never by one value: the one with
    which all of its numbers can be read. What is no number, such as `> -1000`, stays as it is.

    >>> amounts = Amounts()
    >>> amounts.look("1.200", line=2)
    >>> amounts.look("(€ 12,5)", line=3)
    >>> amounts.decide("a file")
    >>> amounts.plain("1.200"), amounts.plain("(€ 12,5)")
    ('1200', '-12.5')
    """

    def __init__(self) -> None:
        self._mark = "."
        # Where it was seen first: a number that only one mark fits, by mark; one that both fit,
        # with different values, by the mark that stands in it; one that is none; any that is one.
        self._only: dict[str, str] = {}
        self._either: dict[str, str] = {}
        self._none = self._number = ""

    def look(self, amount: str, line: int) -> None:
        """Notes how this one is written."""
        read = self._readings(amount)
        where = f"{amount} in line {line}"
        if not read:
            self._none = self._none or where
            return
        self._number = self._number or where
        if len(read) == 1:
            self._only.setdefault(next(iter(read)), where)
        elif read["."] != read[","]:
            self._either.setdefault("." if "." in amount else ",", where)

    def decide(self, file: object) -> None:
        """Decides for all that it was shown. Raises Failed if they differ among themselves."""
        if len(self._only) > 1 or (not self._only and len(self._either) > 1):
            one, other = (self._only or self._either).values()
            raise Failed(f"{file} writes amounts in two ways: {one} and {other}")
        if self._only:
            [self._mark] = self._only
        elif self._either:
            [(mark, where)] = self._either.items()
            self._mark = {".": ",", ",": "."}[mark]
            logger.warning("%s: amounts such as %s are taken for thousands", file, where)
        if self._none and self._number:
            logger.warning("%s: amounts such as %s are no numbers; they stay", file, self._none)

    def plain(self, amount: str) -> str:
        """The amount as a plain decimal number, if it is one."""
        return self._readings(amount).get(self._mark, amount)

    @staticmethod
    @lru_cache(4096)  # amounts recur
    def _readings(amount: str) -> dict[str, str]:
        """The number that it is with a point as the decimal mark, and with a comma, where it is."""
        if not any(map(str.isdigit, amount)):
            return {}
        bare = "".join(CURRENCY.sub("", amount, count=1).translate(SPELLING).split())
        found = SIGNED.fullmatch(bare)
        if not found:
            return {}
        opened, before, digits, after = found.groups()
        sign = "-" if opened or "-" in (before, after) else ""
        read = {}
        for mark, pattern in NUMBER.items():
            if number := pattern.fullmatch(digits):
                whole, decimals = re.sub("[.,]", "", number[1]), number[2]
                read[mark] = f"{sign}{whole or 0}{f'.{decimals}' if decimals else ''}"
        return read


def read_rows(
    path: Path,
    columns: Mapping[str, str] | None = None,
    company: str | None = None,
    booked: bool = True,
) -> Iterator[Sample]:
    """The bookings in a CSV file, or in the one in a zip, one by one.

    `columns` says which column is which, as {"text": "Payee+Purpose", "amount": "Amount"}, by the
    keys of FIELDS; others keep their names. The company may be the same for all rows. Unless they
    are `booked`, they need no account. Amounts become plain decimal numbers if they are numbers.
    Rows that the service cannot take, as something is empty, are left out, with a warning. Raises
    Failed if it is no such file.
    """
    with open_table(path, columns, company, booked) as table:
        if table.lacking:
            logger.warning("%s: rows left out, %s", path, table.lack())
        yield from table.samples()


@contextmanager
def open_table(
    path: Path,
    columns: Mapping[str, str] | None,
    company: str | None,
    booked: bool,
) -> Iterator[Table]:
    """The CSV file, or the one in a zip, as read_rows understands it. Raises Failed."""
    with ExitStack() as opened:
        with _reading(path):
            file = opened.enter_context(_open(path))
        yield Table(file, path, columns, company, booked)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Says in one sentence what goes wrong when the file is read."""
    try:
        yield
    except (OSError, csv.Error, UnicodeError, *ZIP_ERRORS) as error:
        if reason := getattr(error, "strerror", None):  # bzip2 has errors with none
            raise Failed(f"cannot read {path}: {reason}") from None
        raise Failed(f"{path} is no CSV file: {error}") from None


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The CSV file in the path, to be read more than once."""
    with open(path, "rb") as file:
        if path.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                names = [name for name in archive.namelist() if name.endswith(".csv")]
                if not names:
                    raise Failed(f"there is no CSV file in {path}")
                with archive.open(names[0]) as found:
                    yield found
        elif file.seekable():
            yield file
        else:  # a pipe can be read but once
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(file, copy)
                copy.seek(0)
                yield copy


def _encoding(file: BinaryIO) -> str:
    """UTF-16 if the file begins so, UTF-8 if all of it can be that, else Windows-1252."""
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


def _dialect(header: str, wanted: Sequence[str]) -> tuple[str, str]:
    """Separator and quotes: those between most of the columns that are wanted, or else of all."""

    def found(dialect: tuple[str, str]) -> tuple[int, bool, int]:
        with suppress(csv.Error):
            [names] = _csv([header], *dialect)
            return sum(column in names for column in wanted), '"' in dialect, len(names)
        return 0, False, 0

    return max(itertools.product(",;\t|", "\"'"), key=found)


def _csv(lines: Iterable[str], separator: str, quote: str) -> Any:
    return csv.reader(lines, delimiter=separator, quotechar=quote, strict=True)


def by_date(rows: Iterable[Sample]) -> list[Sample]:
    """The rows in the order in which they arose.

    Raises Failed if they have no date, or if it cannot be told what is its day and what its month.
    """
    rows = list(rows)
    try:
        when = _sortable({row["BankEntryDate"] for row in rows})
    except KeyError:
        no_date = "there is no column BankEntryDate to sort by: --map date=COLUMN names another"
        raise Failed(f"{no_date}; {AS_IT_STANDS}") from None
    return sorted(rows, key=lambda row: (when[row["BankEntryDate"]], row["CompanyId"]))


def _sortable(dates: Collection[str]) -> dict[str, tuple | str]:
    """Each date as it sorts: 2016-02-29 as it stands, 29.02.2016 or 2/29/16 from the year on."""
    found = {date: match.groups() for date in sorted(dates) if (match := DAY_OR_MONTH.match(date))}
    others = [date for date in sorted(dates) if date and date not in found]
    if not found:
        return {date: date for date in dates}
    parts = {date: (int(a), int(b), int(year)) for date, (a, _, b, year) in found.items()}
    day_first = [date for date, (a, b, _) in parts.items() if a > 12 or "." in date]
    month_first = [date for date, (a, b, _) in parts.items() if b > 12]
    if others or (day_first and month_first):
        one, other = (others or month_first)[0], (day_first or [*found])[0]
        raise Failed(f"dates are written in two ways, as {one} and {other}; {AS_IT_STANDS}")
    if not (day_first or month_first):
        raise Failed(f"what is the day in {next(iter(found))} is not clear; {AS_IT_STANDS}")
    when = {
        date: (year, b, a) if day_first else (year, a, b) for date, (a, b, year) in parts.items()
    }
    return when | {"": (0, 0, 0)}


# ------------------------------------------------------------------------------------------ Service


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

    Of BOOKKEEP_* it is told the token only: the others are a service's that is there already, as
    its --stream. Raises Failed if it ends before it listens.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = (sys.executable, *command, f"--port={port}")
    told = {
        name: value
        for name, value in os.environ.items()
        if name == "BOOKKEEP_TOKEN" or not name.startswith("BOOKKEEP_")
    }
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


# ----------------------------------------------------------------------------------------- Progress


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int, dict | None], None]]:
    """A function that shows how far it is and how good: a bar in a terminal, else plain lines."""
    if tqdm and sys.stderr.isatty():
        with tqdm(total=total, unit=" samples", dynamic_ncols=True) as bar:

            def show(sent: int, report: dict | None) -> None:
                bar.set_postfix_str(_in_short(report))
                bar.update(sent - bar.n)

            yield show
        return

    started = shown = time.monotonic()

    def show(sent: int, report: dict | None) -> None:
        nonlocal shown
        if time.monotonic() - shown > 2:
            shown = time.monotonic()
            of_all = f" of {total:,}" if total else ""
            rate = sent / (shown - started)
            good = _in_short(report)
            print(f"{sent:,}{of_all} samples, {rate:,.0f}/s{good and f', {good}'}", file=sys.stderr)

    yield show


def _in_short(report: dict | None) -> str:
    names = ("accuracy", "precision", "recall") if report else ()
    return ", ".join(f"{name} {report[name]:.3f}" for name in names)


# ------------------------------------------------------------------------------------------- Replay

LAST = 1000  # predictions that the report is about
WINDOWS = (100, LAST, 10_000)  # the n of the /metrics/<n> in it
WELL_BOOKED = 0.9  # accuracy from which on one may book unseen


def replay(
    client: Client, options: argparse.Namespace, rows: Iterator[Sample], skip: bool = True
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
        client.close()
        client.patience = 2
    except ServiceError as error:
        if not error.temporary:
            raise
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
        **dict.fromkeys(("report", "unseen", "booked_unseen", "prediction")),
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

    def __init__(self, client: Client, options: argparse.Namespace) -> None:
        self.client, self.options = client, options
        self.before = client.health()
        self.start = self.before["lines"] if options.resume is None else options.resume
        source = (options.file.name, options.order, options.batch, options.seed, self.start)
        if options.map or options.company:
            source += (sorted(options.map.items()), options.company)
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
            answer = self.client.sample(batch, key)
            if skip and self.resent == self.sent > 0 and answer["first"] != self.start + self.sent:
                return False  # others have booked in between
            self._count(answer, len(batch))
            if self.predicted and (
                self.sent == self.options.samples or time.monotonic() - asked > 0.1
            ):
                asked = time.monotonic()
                show(self.sent, self.client.report(LAST))
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
        yield "metrics", {str(n): self.client.metrics(n) for n in wanted}
        report = self.client.report(LAST)
        yield "report", report
        yield "unseen", best_level(report["confidence"])
        if self.integrator:
            yield "booked_unseen", self.integrator.report()

    def prediction(self, row: Sample | None) -> dict | None:
        """What the service suggests for a row that it has not been sent, if there is one."""
        if row is None or not self.sent:
            return None
        sample = without_account(row)
        [suggestion] = self.client.suggest(sample, top=1)["suggestions"]
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

    def __init__(self, client: Client, book_from: float) -> None:
        self.client, self.book_from = client, book_from
        # Of each suggestion: how sure it was, whether it was right, by whom it was booked.
        self.outcomes: list[tuple[float, bool, str]] = []

    def book(self, rows: Sequence[Sample]) -> list[Sample]:
        """The rows as they are to be booked."""
        booked = []
        for chunk in chunks(rows, MAX_SUGGESTED):
            asked = [without_account(row) for row in chunk]
            answers = self.client.suggest(asked, 1, self.book_from, reasons=False)
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


def _rows(options: argparse.Namespace) -> Iterator[Sample]:
    """The file's rows in the order that is asked for. Raises Failed at once if it is no CSV."""
    rows = read_rows(options.file, options.map, options.company)
    if options.order == "date":
        return iter(by_date(rows))
    first = list(itertools.islice(rows, 1))
    return itertools.chain(first, rows)


def batches(rows: Iterable[Sample], largest: int, seed: int) -> Iterator[list[Sample]]:
    """Batches of random size, from 1 to the largest."""
    sizes = random.Random(seed)
    rows = iter(rows)
    while batch := list(itertools.islice(rows, sizes.randint(1, largest))):
        yield batch


# ------------------------------------------------------------------------------------------- Report


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


# ------------------------------------------------------------------------------------------ Suggest


def suggest(client: Client, options: argparse.Namespace) -> None:
    """Writes the file to standard output, each row with an account, and how sure that is.

    Both are empty where the service cannot take a row. Nothing is learned. Raises Failed.
    """
    with (
        open_table(options.file, options.map, options.company, booked=False) as table,
        _progress(table.rows) as show,
    ):
        if table.lacking:
            logger.warning("%s: rows without a suggestion, %s", options.file, table.lack())
        out, done = sys.stdout.buffer, 0
        header = table.extended(table.header, "account", "confidence")
        for records in chunks(table.records(), LARGE):
            samples = [table.sample(record.values) if record.values else {} for record in records]
            takes = [table.takes(sample) for sample in samples]
            asked = [_features(sample) for sample in itertools.compress(samples, takes)]
            answers = iter(client.suggest(asked, top=1, reasons=False))
            out.write(header)
            header = b""  # it is written once, and not before there is an answer
            for record, sample, is_asked in zip(records, samples, takes, strict=True):
                added = ["", ""] if sample else []  # an empty line stays one
                if is_asked:
                    [best] = next(answers)["suggestions"]
                    added = [_not_run(best["account"]), str(best["confidence"])]
                out.write(table.extended(record.text, *added))
            out.flush()
            done += sum(map(bool, samples))
            show(done, None)
        out.write(header)


def _not_run(account: str) -> str:
    """An account, which another company may have taught, so that no spreadsheet runs it."""
    is_formula = account[0] in "=+-@\t\r" and not re.fullmatch(r"[-+]?\d+", account)
    return f"'{account}" if is_formula else account


def _features(sample: Sample) -> Sample:
    """What a suggestion is made from."""
    return {key: sample[key] for key in COLUMNS if key != TARGET}


# ------------------------------------------------------------------------------------- Command line

EXAMPLES = """\
the demo, all in one:
  replay.py --serve
see how well your own bookings are predicted, teach a service that runs, and let it suggest:
  replay.py OLD.csv --serve --company acme --map text=Payee+Purpose,amount=Sum,date=Day,account=To
  replay.py OLD.csv --samples all --company acme --map (the same)
  replay.py NEW.csv --suggest --company acme --map (the same) > SUGGESTED.csv
from Python:
  from replay import Client
  Client("http://127.0.0.1:8080").predict({...})"""
STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
DATA = HERE / "data" if CHECKED_OUT else Path("data")
DATA_SETS = [  # a real one first, if the user has put it there
    DATA / "bank_expenses_obfuscated.csv.zip",
    DATA / "bank_expenses_obfuscated.csv",
    DATA / "bank_expenses_synthetic.csv.zip",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the options say and prints what came of it; the exit status."""
    options = _options(arguments)
    logger.handlers, logger.propagate = [_Sayer()], False
    try:
        for number in STOPS:  # each as Ctrl-C, so that a service is stopped, too
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores SIGHUP
                signal.signal(number, signal.default_int_handler)
        options.file = options.file or _default_file()
        token = _token(options.token_file)
        rows = None if options.suggest else _rows(options)  # before a service is started in vain
        if options.serve and not options.log:
            options.log = Path(tempfile.mkdtemp(prefix="bookkeep-")) / "replay.jsonl"
        with _service(options) as url:
            client = Client(url, token)
            if options.suggest:
                suggest(client, options)
                return 0
            return _show(client, options, rows)
    except BrokenPipeError:  # whoever read this has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (Failed, OSError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _show(client: Client, options: argparse.Namespace, rows: Iterator[Sample]) -> int:
    """Replays the rows and prints the report; the exit status."""
    if options.stay:
        print(f"Watch it learn: {client.url}/", file=sys.stderr)
    report = replay(client, options, rows)
    if options.serve:
        report["log"] = str(options.log)
    if options.stay or not options.serve:
        report["page"] = f"{client.url}/"
    print(json.dumps(report) if options.json else in_words(report), flush=True)
    if report["interrupted"]:
        return 130
    if options.stay:
        _stay(client.url)
    return 0


def _stay(url: str) -> None:
    """Waits for Ctrl-C. Raises Failed if the service ends before."""
    with suppress(KeyboardInterrupt):
        print(f"The page is at {url}/ until Ctrl-C", file=sys.stderr)
        while _listens(urlsplit(url).port):
            time.sleep(1)
        raise Failed("the service has ended")


class _Sayer(logging.Handler):
    """Says warnings on standard error, and leaves a bar that is there whole."""

    def emit(self, record: logging.LogRecord) -> None:
        say = tqdm.write if tqdm else print
        say(f"replay: {self.format(record)}", file=sys.stderr)


def _token(file: Path | None) -> str | None:
    return file.read_text("latin-1").strip() if file else os.environ.get("BOOKKEEP_TOKEN")


def _default_file() -> Path:
    for path in DATA_SETS:
        if path.exists():
            return path
    raise Failed(
        f"there is no data set in {DATA}/: name a CSV file of bookings (--help says which columns "
        "it needs), as data/bank_expenses_synthetic.csv.zip, which is in bookkeep's repository"
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="replay",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Streams a CSV file of bookings to bookkeep and shows how well it predicts, or "
        "writes\nthe file with the accounts that bookkeep suggests.",
        epilog=EXAMPLES,
    )
    _add_file(parser)
    replays = _add_replay(parser)
    _add_service(parser)
    options = parser.parse_args(arguments)
    options.map = {field: name for named in options.map for field, name in named.items()}
    if options.company and "company" in options.map:
        parser.error("give --company, or a company= in --map, not both")
    if options.suggest:
        if not options.file:
            parser.error("--suggest needs a FILE")
        for name, usual in (replays | {"stay": False}).items():
            if getattr(options, name) != usual:
                parser.error(f"--{name.replace('_', '-')} does not go with --suggest")
    if options.log and not options.serve:
        parser.error("--log goes with --serve")
    if options.book_from is not None and options.resume is not None:
        parser.error("--resume does not go with --book-from: what it suggested then is not known")
    if options.stay and not options.serve:
        parser.error("--stay goes with --serve")
    if options.resume is not None and options.serve and not options.log:
        parser.error("--resume goes with --url, or with --serve and the --log of the first run")
    return options


def _add_file(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group(
        "the file",
        "Its first line names its columns. It must have CompanyId, BankEntryText, BankEntryAmount\n"
        "and AccountNumber (but for --suggest), or columns that --map names; to sort by date\n"
        "BankEntryDate, too. AccountName is shown, others are sent along. Commas, semicolons,\n"
        "tabs or bars separate values; it is in UTF-8, UTF-16 or Windows-1252. Amounts are words\n"
        "as > -1000, or numbers as 1,200.00, 1.200,00, (12.50) or € 12.50. What a comma means\n"
        "all of the column shows. Dates are as 2016-02-29, 29.02.2016 or 2/29/2016. Rows in which\n"
        "something is empty are left out.",
    ).add_argument
    option(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="a CSV file or a zip with one; without it, bank_expenses_obfuscated.csv.zip or .csv "
        "in data/, or else the synthetic set there",
    )
    option(
        "--map",
        type=columns,
        action="append",
        default=[],
        metavar="FIELD=COLUMN,...",
        help=f"which of its columns is which; the fields are {', '.join(FIELDS)}; text=A+B joins "
        "the columns A and B",
    )
    option("--company", help="the company of all of its rows")
    option(
        "--suggest",
        action="store_true",
        help="write it to standard output, in UTF-8, with two more columns: the account that is "
        "suggested, and how sure that is; nothing is learned",
    )


def _add_replay(parser: argparse.ArgumentParser) -> dict[str, object]:
    """Adds what a replay alone has, and says what these are without being given."""
    group = parser.add_argument_group("the replay")
    option = group.add_argument
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
    option(
        "--resume",
        type=int,
        nargs="?",
        const=0,
        metavar="FROM",
        help="go on with an interrupted run that began when the log held FROM bookings (0, unless "
        "given): what is stored is not stored again",
    )
    option("--json", action="store_true", help="print the report as a JSON object")
    return {action.dest: action.default for action in group._group_actions}


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
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the service's token; or set BOOKKEEP_TOKEN",
    )


def columns(text: str) -> dict[str, str]:
    """The columns by the fields that the text names, as text=Description,amount=Amount does."""
    found = {}
    for part in re.split(rf",\s*(?=(?:{'|'.join(FIELDS)})=)", text):
        field, equals, name = part.partition("=")
        if field not in FIELDS or not equals:
            named = ", ".join(FIELDS)
            raise argparse.ArgumentTypeError(f"{part} is not FIELD=COLUMN, with one of {named}")
        found[field] = name
    return found


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
