"""replay: the client of bookkeep, for Python and for CSV files.

`Client` is the service as Python calls. `python replay.py FILE` streams a CSV file of bookings to
the service, in batches as an accounting program would, and reports how many it would have booked
right; `python replay.py --serve` is the demo, which starts the service, too. It judges nothing by
itself: all figures are the service's own. `python replay.py --suggest FILE` writes the file with
the accounts that the service suggests.

The module needs nothing but Python, and reads from top to bottom: Client, Files, Service, Progress,
Replay, Report, Suggest, Command line.
"""

import argparse
import codecs
import csv
import hashlib
import io
import itertools
import json
import logging
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from ssl import CertificateError
from typing import Any, BinaryIO, TextIO, TypeVar
from urllib.parse import urlencode, urlsplit

try:
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm
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
    "context": "",  # columns that are sent under their own names, too
}
# Characters in the values that a booking must have, of which the last is what is predicted.
LONGEST = {"CompanyId": 100, "BankEntryText": 10_000, "BankEntryAmount": 100, "AccountNumber": 100}
*FEATURES, TARGET = COLUMNS = [*LONGEST]
BOOKED_BY = "BookedBy"
BOOKED_AFTER = {"book": "suggestion", "check": "check", "review": "person"}  # a decision, by whom
WHO = sorted(BOOKED_AFTER.values())

Sample = dict[str, str]
Samples = Sample | Sequence[Sample]  # one, or a list of any length
Columns = Mapping[str, str] | None  # which column is which, as read_rows takes it
T = TypeVar("T")

logger = logging.getLogger("replay")


# ------------------------------------------------------------------------------------------- Client

MAX_SUGGESTED = 300  # suggestions with reasons that the service gives in one answer
LARGE = 1000  # samples in one request, where it takes long lists


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

        Under a key of yours, such as the name of the file that they are from, they are booked once,
        however often you send them: also if your own program was killed in between. Without one,
        only this call's own attempts are one booking.
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
        if connection := getattr(self._own, "connection", None):
            connection.close()

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


# -------------------------------------------------------------------------------------------- Files

# What reading something else raises; RuntimeError is that of an encrypted zip.
NOT_CSV = (csv.Error, UnicodeError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
CURRENCY = re.compile("[A-Z]{3}|[A-Z]{0,2}[$€£¥₩₪₫₴₸₹₺₽]|[Kk]r[.]?|Fr[.]?|zł|Kč|Ft")
SPELLING = str.maketrans({"'": None, "’": None, "−": "-", "–": "-"})
SIGNED = re.compile(r"([(])?([+-]?)([0-9.,]+)([+-]?)(?(1)[)])")
NUMBER = {  # by its decimal mark: what stands before that, and after it
    ".": re.compile(r"([0-9]*|[1-9][0-9]{0,2}(?:,[0-9]{2,3})*,[0-9]{3})(?:[.]([0-9]+))?"),
    ",": re.compile(r"([0-9]*|[1-9][0-9]{0,2}(?:[.][0-9]{2,3})*[.][0-9]{3})(?:,([0-9]+))?"),
}
# A day or a month, that a date begins with.
DAY_OR_MONTH = re.compile(r"([0-9]{1,2})([./-])([0-9]{1,2})\2([0-9]{4}|(?<=[./])[0-9]{2})(?![0-9])")
AS_IT_STANDS = "replay.py --order file needs no dates, and sends rows as they stand"


def read_rows(
    path: Path, columns: Columns = None, company: str | None = None, booked: bool = True
) -> Iterator[Sample]:
    """The bookings in a CSV file, or in the one in a zip, one by one.

    `columns` says which column is which, as {"text": "Payee+Purpose", "amount": "Amount"}, by the
    keys of FIELDS; others keep their names, and so do those that are its "context". The company
    may be the same for all rows. Unless they are `booked`, they need no account. Amounts become
    plain decimal numbers if they are numbers. Rows that the service cannot take, as something is
    empty, are left out, with a warning. Raises Failed if it is no such file.
    """
    with open_csv(path) as file:
        table = Table(file, path, columns, company, booked)
        table.warn("left out")
        for _, _, sample in table.records():
            if sample:
                yield sample


@contextmanager
def open_csv(path: Path) -> Iterator[BinaryIO]:
    """The CSV file, or the one in a zip, to be read more than once.

    Raises Failed if there is none, and for what goes wrong inside while it is read.
    """
    with ExitStack() as opened:
        try:
            file = opened.enter_context(open(path, "rb"))
        except OSError as error:
            raise Failed(f"cannot read {path}: {error.strerror}") from None
        try:
            if path.suffix == ".zip":
                archive = opened.enter_context(zipfile.ZipFile(file))
                names = [name for name in archive.namelist() if name.endswith(".csv")]
                if not names:
                    raise Failed(f"there is no CSV file in {path}")
                file = opened.enter_context(archive.open(names[0]))
            elif not file.seekable():  # a pipe can be read but once
                copy = opened.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(file, copy)
                file = copy
            yield file
        except (OSError, *NOT_CSV) as error:
            if getattr(error, "errno", None):  # bzip2 says OSError of damage, with no number
                raise
            raise Failed(f"{path} is no CSV file: {error}") from None


class Table:
    """A CSV file of bookings: its rows as they stand, and each as a sample.

    Its encoding, separator and quotes, and how it writes amounts, are found in the file itself,
    which is read once for that.
    """

    def __init__(
        self, file: BinaryIO, path: Path, columns: Columns, company: str | None, booked: bool
    ) -> None:
        """As read_rows, of a file that is open. Raises Failed if a row cannot be used."""
        self.path, self._booked = path, booked
        self._fixed = {} if company is None else {"CompanyId": company}
        self._needed = COLUMNS if booked else FEATURES
        named = {FIELDS[field]: names.split("+") for field, names in (columns or {}).items()}
        self.context = named.pop("", [])
        if not booked:
            named.pop(TARGET, None)  # so that the same names will do before and after
        used = {key: [key] for key in self._needed if key not in self._fixed} | named
        wanted = list(dict.fromkeys(itertools.chain(*used.values(), self.context)))
        self._text = io.TextIOWrapper(file, newline="", encoding=_encoding(file))
        self._text.seek(0)
        self._header = self._text.readline()
        self._dialect = _dialect(self._header, wanted)
        [self.columns] = csv.reader([self._header], **self._dialect)
        self._check_columns(wanted)
        taken = {*itertools.chain(*named.values())} - {*self.context}
        # By the key of a sample, the columns that it is joined from.
        self._joined = {name: [name] for name in self.columns if name not in taken} | named
        self.rows = 0
        self._lacking: list[int] = []  # the lines of rows that the service cannot take
        self._mark = ""  # until it is found, amounts stay as they are written
        self._mark = decimal_mark(self._survey(), path)

    def records(self) -> Iterator[tuple[int, list[str], Sample | None]]:
        """Of each row the line that it ends in, its values, and the sample that it makes.

        An empty line has no values. The sample is None where the service cannot take it. The header
        is left out. The file is read anew each time. Raises Failed.
        """
        self._text.seek(0)
        rows = csv.reader(self._text, **self._dialect)
        next(rows)
        for values in rows:
            yield rows.line_num, values, self._sample(values, rows.line_num)

    def warn(self, outcome: str) -> None:
        """Warns what became of rows that the service does not take, if there are any, and why."""
        if self._lacking:
            *needed, last = [field for field, key in FIELDS.items() if key in self._needed]
            why = f"{', '.join(needed)} or {last} is empty or too long"
            which = f"{len(self._lacking):,} of {self.rows:,}, the first in line {self._lacking[0]}"
            logger.warning(f"{self.path}: rows {outcome}, as {why}: {which}")

    def writer(self, file: TextIO) -> Any:
        """A csv.writer of rows as these are."""
        quoted = self._header.startswith(self._dialect["quotechar"])
        quoting = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
        end = self._header[len(self._header.rstrip("\r\n")) :] or "\n"
        return csv.writer(file, **self._dialect, quoting=quoting, lineterminator=end)

    def _survey(self) -> Iterator[tuple[str, int]]:
        """Counts the rows. Gives their amounts and lines; raises Failed if one cannot be used."""
        for line, values, sample in self.records():
            if values:
                self.rows += 1
                if sample:
                    yield sample["BankEntryAmount"], line
                else:
                    self._lacking.append(line)

    def _sample(self, values: list[str], line: int) -> Sample | None:
        """A row as a sample, its amount as a plain decimal number if it is one."""
        if not values:
            return None
        if len(values) != len(self.columns):
            raise Failed(f"{self.path}, line {line}: there must be {len(self.columns)} values")
        row = dict(zip(self.columns, values, strict=True))
        sample = {
            key: " ".join(row[name] for name in names if row[name])
            for key, names in self._joined.items()
        } | self._fixed
        if self._booked and sample.get(BOOKED_BY, "person") not in WHO:
            wrong = f"{BOOKED_BY} must be one of {', '.join(WHO)}"
            how = "if the column says something else, give it another name"
            raise Failed(f"{self.path}, line {line}: {wrong}; {how}")
        if not all(0 < len(sample.get(key, "")) <= LONGEST[key] for key in self._needed):
            return None
        amount = sample["BankEntryAmount"]
        return sample | {"BankEntryAmount": _readings(amount).get(self._mark, amount)}

    def _check_columns(self, wanted: Sequence[str]) -> None:
        has = ", ".join(name if name.isprintable() else repr(name) for name in self.columns)[:1000]
        if missing := [column for column in wanted if column not in self.columns]:
            raise Failed(
                f"{self.path} is no CSV file with the column {', '.join(missing)} in its first "
                f"line, which has {has or 'none'}; say with --map which is which"
            )
        if twice := [column for column in wanted if self.columns.count(column) > 1]:
            raise Failed(f"{self.path} has the column {twice[0]} more than once: {has}")


def _encoding(file: BinaryIO) -> str:
    """UTF-16 if the file begins so, UTF-8 if all of it can be that, else Windows-1252."""
    file.seek(0)
    if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    file.seek(0)
    try:
        for _ in codecs.iterdecode(iter(lambda: file.read(1 << 20), b""), "utf-8"):
            pass
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"


def _dialect(header: str, wanted: Sequence[str]) -> dict[str, Any]:
    """Separator and quotes: those between most of the columns that are wanted, or else of all."""

    def found(dialect: dict[str, Any]) -> tuple[int, bool, int]:
        with suppress(csv.Error):
            [names] = csv.reader([header], **dialect)
            return sum(map(names.__contains__, wanted)), dialect["quotechar"] == '"', len(names)
        return 0, False, 0

    marks = itertools.product(",;\t|", "\"'")
    dialects = [{"delimiter": mark, "quotechar": quote, "strict": True} for mark, quote in marks]
    return max(dialects, key=found)


def decimal_mark(amounts: Iterable[tuple[str, int]], file: object) -> str:
    """The mark before the decimals in a column of amounts, given as (amount, its line).

    They are written as `1,200.00`, `1.200,00`, `(12.50)`, `€ 12.50` or `12,50-`. All of the column
    decides, never one value. Raises Failed if two of them contradict each other. What is no number,
    such as `> -1000`, stays as it is.

    >>> decimal_mark([("1.200", 2), ("(€ 12,5)", 3)], "a file")
    ','
    """
    shown: dict[str, str] = {}  # by mark, the first amount that is a number with this mark only
    likely: dict[str, str] = {}  # and the first such as 1.200, by the mark if that is thousands
    a_word, numbers = "", False
    for amount, line in amounts:
        read = _readings(amount)
        where = f"{amount} in line {line}"
        numbers = numbers or bool(read)
        if not read:
            a_word = a_word or where
        elif len(read) == 1:
            shown.setdefault(*read, where)
        elif read["."] != read[","]:
            likely.setdefault("," if "." in amount else ".", where)
    found = shown or likely
    if len(found) > 1:
        one, other = found.values()
        raise Failed(f"{file} writes amounts in two ways: {one} and {other}")
    if found and not shown:
        [where] = found.values()
        logger.warning("%s: amounts such as %s are taken for thousands", file, where)
    if a_word and numbers:
        logger.warning("%s: amounts such as %s are no numbers; they stay", file, a_word)
    return next(iter(found), ".")


@lru_cache(4096)  # amounts recur
def _readings(amount: str) -> dict[str, str]:
    """The plain number that it is by decimal mark: `1.200` is 1.200 by point, 1200 by comma."""
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


def by_date(rows: Iterable[Sample]) -> list[Sample]:
    """The rows in the order in which they arose.

    Raises Failed if they have no date, or if it cannot be told what is its day and what its month.
    """
    rows = list(rows)
    if any("BankEntryDate" not in row for row in rows):
        no_date = "there is no column BankEntryDate to sort by: --map date=COLUMN names another"
        raise Failed(f"{no_date}; {AS_IT_STANDS}")
    when = _sortable({row["BankEntryDate"] for row in rows})
    return sorted(rows, key=lambda row: (when[row["BankEntryDate"]], row["CompanyId"]))


def _sortable(dates: Collection[str]) -> dict[str, tuple | str]:
    """Each date as it sorts: 2016-02-29 as it stands, 29.02.2016 or 2/29/16 from the year on."""
    found = {date: match.groups() for date in sorted(dates) if (match := DAY_OR_MONTH.match(date))}
    if not found:
        return {date: date for date in dates}
    parts = {date: (int(a), int(b), int(year)) for date, (a, _, b, year) in found.items()}
    others = [date for date in sorted(dates) if date and date not in found]
    day_first = [date for date, (a, _, _) in parts.items() if a > 12 or "." in date]
    month_first = [date for date, (_, b, _) in parts.items() if b > 12]
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

LAST = 1000  # predictions that the report is about
WINDOWS = (100, LAST, 10_000)  # the n of the /metrics/<n> in it


def replay(client: Client, options: argparse.Namespace, rows: Iterator[Sample]) -> dict:
    """Sends the rows in batches and reports; Ctrl-C ends it early. Raises Failed."""
    run = Run(client, options)
    started = time.monotonic()
    interrupted = False
    try:
        run.send(rows)
    except KeyboardInterrupt:
        interrupted = True
        client.patience = 2
    except ServiceError as error:
        if not (error.temporary and run.resumable):
            raise
        log = f" --log {options.log}" if options.serve else ""
        how = f"the same command goes on with --resume {run.start}{log}"
        raise Failed(f"{error}; {how}") from None
    seconds = time.monotonic() - started
    report = {
        "samples": run.sent,
        "stored_before": run.stored_before,
        "seconds": round(seconds, 3),
        "samples_per_second": round(run.sent / seconds),
        "accounts": None,
        "metrics": {},
        **dict.fromkeys(("report", "unseen", "booked_unseen", "prediction")),
        "interrupted": interrupted,
        "resume": run.start if run.resumable else None,
    }
    try:
        report |= run.figures()
        report["prediction"] = run.prediction(next(rows, None))
    except Failed as error:
        print(f"replay: {error}", file=sys.stderr)
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
        source = [options.file.name, options.order, options.batch, options.seed, self.start]
        source += [sorted(options.map.items()), options.company]
        self.name = hashlib.sha256(repr(source).encode()).hexdigest()[:16]
        self.sent = self.stored_before = 0
        self.account_names: dict[tuple[str, str], str | None] = {}  # by company and account
        # What was suggested for a batch that comes again would be another by then.
        self.resumable = options.book_from is None
        self.integrator = None if self.resumable else Integrator(client, options.book_from)

    def send(self, rows: Iterator[Sample]) -> None:
        """Sends as many of the rows as there are to send."""
        most, largest, seed = self.options.samples, self.options.batch, self.options.seed
        with _progress(most, self.how_good) as show:
            for batch in batches(itertools.islice(rows, most), largest, seed):
                for row in batch:
                    self.account_names[row["CompanyId"], row[TARGET]] = row.get("AccountName")
                if self.integrator and (self.sent or self.before["accounts"]):  # there is a model
                    batch = self.integrator.book(batch)
                answer = self.client.sample(batch, f"replay {self.name} row {self.sent}")
                self.sent += len(batch)
                if answer["first"] < self.before["lines"]:
                    self.stored_before += len(batch)
                show(self.sent)

    def how_good(self) -> str:
        """How good the service's last predictions were, in short."""
        last = self.last(LAST)
        figures = "accuracy {accuracy:.3f}, precision {precision:.3f}, recall {recall:.3f}"
        return figures.format(**last) if last else ""

    def last(self, n: int) -> dict | None:
        """What the service reports of its last n predictions; None if there are none yet."""
        try:
            return self.client.report(n)
        except ServiceError as error:
            if error.status == 503:
                return None
            raise

    def figures(self) -> dict:
        """What the service says of its last predictions."""
        report = self.last(LAST)
        if not report:
            return {}
        predicted = self.client.report(max(WINDOWS))["support"]
        wanted = [n for n in WINDOWS if n == LAST or n <= predicted]
        return {
            "accounts": self.client.health()["accounts"],
            "metrics": {str(n): self.client.metrics(n) for n in wanted},
            "report": report,
            "unseen": best_level(report["confidence"]),
            "booked_unseen": self.integrator and self.integrator.report(),
        }

    def prediction(self, row: Sample | None) -> dict | None:
        """What the service suggests for a row that it has not been sent, if there is one."""
        if row is None or not self.sent:
            return None
        sample = without_account(row)
        [suggestion] = self.client.suggest(sample, top=1)["suggestions"]
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
        """The rows as they are to be booked."""
        asked = [without_account(row) for row in rows]
        answers = self.client.suggest(asked, 1, self.book_from, reasons=False)
        booked = []
        for row, sample, answer in zip(rows, asked, answers, strict=True):
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
    if report["stored_before"]:
        sent.append(f"{report['stored_before']:,} of them had been stored before")
    paragraphs: list[Iterable[str]] = [sent]
    if report["booked_unseen"]:
        paragraphs.append(_booked_unseen(report["booked_unseen"]))
    elif report["unseen"]:
        paragraphs.append(_quality(report["report"], report["unseen"], report["accounts"]))
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
    yield (
        f"  {sure:,} could have been booked unseen, being at least {at_least} sure: "
        f"{right}, {_percent(level['accuracy'], 1)}"
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
    yield f"  predicted {predicted}, {_percent(found['confidence'])} sure{because}"
    yield f"  the accountant booked {booked}"


def _next(report: dict) -> Iterator[str]:
    """Where all of it is, and what to do now."""
    log = f" --log {report['log']}" if "log" in report else ""
    if report["interrupted"]:
        how = f"; the same command goes on with --resume {report['resume']}{log}"
        yield f"Interrupted{how if report['resume'] is not None else ''}"
        return
    if log:
        yield f"All of it is in {report['log']}"
    if names := report.get("context"):
        log += f" --context {shlex.quote(','.join(names))}"
    if "page" not in report:
        yield "What to try next:"
        yield "  the same command with --stay shows it on a page, in a browser"
        yield f"  {START}{log} goes on from here"
    elif not log:
        yield f"Its page is at {report['page']}"


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


# ------------------------------------------------------------------------------------------ Suggest


def suggest(client: Client, options: argparse.Namespace) -> None:
    """Writes the file to standard output, each row with an account, and how sure that is.

    Both are empty where the service cannot take a row. Nothing is learned. Raises Failed.
    """
    with open_csv(options.file) as file:
        table = Table(file, options.file, options.map, options.company, booked=False)
        table.warn("without a suggestion")
        sys.stdout.reconfigure(encoding="utf-8", newline="")
        writer = table.writer(sys.stdout)
        header, done = [[*table.columns, "account", "confidence"]], 0
        with _progress(table.rows, str) as show:
            for records in chunks(table.records(), LARGE):
                samples = [sample for _, _, sample in records if sample]
                wanted = (*FEATURES, *table.context)
                asked = [{key: sample[key] for key in wanted} for sample in samples]
                answers = iter(client.suggest(asked, top=1, reasons=False))
                writer.writerows(header)
                header = []  # it is written once, and not before there is an answer
                for _, values, sample in records:
                    if sample:
                        [best] = next(answers)["suggestions"]
                        values += [guarded(best["account"]), best["confidence"]]
                    elif values:  # an empty line stays one
                        values += ["", ""]
                    writer.writerow(values)
                sys.stdout.flush()
                done += len(records)
                show(done)
        writer.writerows(header)


# Where a spreadsheet would begin a formula: at the start of a cell, whatever separates cells.
FORMULA = r"""(?<![^,;|\t\r\n])%s(?='*[" ]*[-=+@\t\r\uff1d\uff0b\uff0d\uff20])"""


def guarded(text: str) -> str:
    """A cell of a CSV file that no spreadsheet runs: with a ' where a formula would begin.

    A plain number stays. Quote all cells: what separates them may stand in one, too.
    """
    return text if re.fullmatch("[-+]?[0-9][0-9.,]*", text) else re.sub(FORMULA % "", "'", text)


def unguarded(cell: str) -> str:
    """The text of a guarded cell."""
    return re.sub(FORMULA % "'", "", cell)


# ------------------------------------------------------------------------------------- Command line

EXAMPLES = """\
the demo, all in one:
  replay.py --serve
see how well your own bookings are predicted, teach a service that runs, and let it suggest:
  replay.py OLD.csv --serve --company acme --map text=Payee+Purpose,amount=Sum,date=Day,account=To
  replay.py OLD.csv --samples all --company acme --map (the same)
  replay.py NEW.csv --suggest --company acme --map (the same) > SUGGESTED.csv"""
THE_FILE = """\
Its first line names its columns: CompanyId, BankEntryText, BankEntryAmount, AccountNumber
(but for --suggest), and BankEntryDate to sort by; --map finds them under other names.
AccountName is shown, others are sent along. Separators, quotes, encoding (UTF-8, UTF-16,
Windows-1252), and how amounts (1,200.00, 1.200,00, (12.50), € 12.50) and dates (2016-02-29,
29.02.2016, 2/29/2016) are written show in the file. Rows that lack something are left out."""
DATA = HERE / "data" if CHECKED_OUT else Path("data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the options say and prints what came of it; the exit status."""
    options = _options(arguments)
    logging.basicConfig(format="replay: %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)  # so that a service is stopped, too
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
    options.context = [*filter(None, options.map.get("context", "").split("+"))]
    if not options.suggest:  # before a service is started in vain
        rows = read_rows(options.file, options.map, options.company)
        if options.order == "date":
            rows = iter(by_date(rows))
        rows = itertools.chain([*itertools.islice(rows, 1)], rows)  # the first at once
    token = os.environ.get("BOOKKEEP_TOKEN")
    if options.token_file:
        token = options.token_file.read_text("latin-1").strip()
    with ExitStack() as opened:
        if options.serve:
            options.log = options.log or Path(tempfile.mkdtemp(prefix="bookkeep-")) / "replay.jsonl"
            command = [HERE / "bookkeep.py", f"--log={options.log}"]
            if options.context:
                command.append(f"--context={','.join(options.context)}")
            port, service = opened.enter_context(started(*command, token=token))
            options.url = f"http://127.0.0.1:{port}"
        client = Client(options.url, token)
        if options.suggest:
            suggest(client, options)
            return 0
        if options.stay:
            print(f"Watch it learn: {client.url}/", file=sys.stderr)
        report = replay(client, options, rows)
        if options.serve:
            report |= {"log": str(options.log), "context": options.context}
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
        description="Streams a CSV file of bookings to bookkeep and shows how well it predicts.",
        epilog=EXAMPLES,
    )
    option = parser.add_argument_group("the file", THE_FILE).add_argument
    usual = "a CSV file or a zip with one; without it, a bank set in data/, the real or synthetic"
    option("file", nargs="?", type=Path, metavar="FILE", help=usual)
    how = f"which column is which, of {', '.join(FIELDS)}; text=A+B joins two; context=C+D sends "
    how += "two under their own names, and --serve starts a service that goes by them, too"
    option("--map", type=columns, action="append", default=[], metavar="FIELD=COLUMN,...", help=how)
    option("--company", help="the company of all of its rows")
    written = "write it to standard output with suggested accounts instead; nothing is learned"
    option("--suggest", action="store_true", help=written)
    option = parser.add_argument_group("the replay").add_argument
    most = "how many of its first rows to send, or all (default: %(default)s)"
    option("--samples", type=_count_or_all, default=15_000, help=most)
    option("--order", choices=["date", "file"], default="date", help="by date, or as they stand")
    largest = "the largest batch; sizes are random, from 1 to this (default: %(default)s)"
    option("--batch", type=count, default=1000, help=largest)
    option("--seed", type=int, default=0, help="of those sizes (default: %(default)s)")
    unseen = "book suggestions unseen from this confidence on, but for the checks, with the file "
    unseen += "as the accountant for all others; and say what the service says of it and the truth"
    option("--book-from", type=float, metavar="CONFIDENCE", help=unseen)
    begun = "go on with an interrupted run that began when the log held FROM bookings (else 0)"
    option("--resume", type=int, nargs="?", const=0, metavar="FROM", help=begun)
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
    of_a_replay = ("samples", "order", "batch", "seed", "book_from", "resume", "json", "stay")
    given = [name for name in of_a_replay if getattr(options, name) != parser.get_default(name)]
    resumes, book_from = options.resume is not None, options.book_from
    if options.company and "company" in options.map:
        parser.error("give --company, or a company= in --map, not both")
    if options.suggest and not options.file:
        parser.error("--suggest needs a FILE")
    if options.suggest and given:
        parser.error(f"--{given[0].replace('_', '-')} does not go with --suggest")
    if book_from is not None and not 0 <= book_from <= 1:
        parser.error(f"{book_from} is not a number from 0 to 1")
    if book_from is not None and resumes:
        parser.error("--resume does not go with --book-from: what it suggested then is not known")
    if resumes and options.serve and not options.log:
        parser.error("--resume goes with --url, or with --serve and the --log of the first run")
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
