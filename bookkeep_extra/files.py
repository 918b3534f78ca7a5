"""files: bookings from what banks and accounting programs export.

A file is a CSV file of any kind, a spreadsheet, a bank's MT940 or OFX, or a zip with some of them.
How it is written (encoding, separator, the line with the names of the columns, amounts, dates) is
found in the file itself. What was found is said; what cannot be read is refused, with the row.

It needs nothing but Python for a CSV file in UTF-8; the extra "client" has what reads the others.
It reads from top to bottom: Names, Amounts, Dates, Sources, Tables, Guesses, Files.
"""

import codecs
import csv
import hashlib
import html
import importlib
import io
import itertools
import logging
import re
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import date, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO
from unicodedata import normalize

# -------------------------------------------------------------------------------------------- Names

BOOKED_BY = "BookedBy"
WHO = ["check", "person", "suggestion"]
FIELDS = {  # the keys of a sample that mean something, by their names for --map
    "company": "CompanyId",
    "text": "BankEntryText",
    "amount": "BankEntryAmount",
    "account": "AccountNumber",
    "date": "BankEntryDate",
    "name": "AccountName",
    "by": BOOKED_BY,
    "id": "Id",
    "out": "",  # the amount in two columns, money out and in; or a column with its sign
    "in": "",
    "sign": "",
    "context": "",  # columns that are sent under their own names, too
}
# Characters in the values that a booking must have, of which the last is what is predicted, and
# in its Id.
LONGEST = {"CompanyId": 100, "BankEntryText": 10_000, "BankEntryAmount": 100, "AccountNumber": 100}
*FEATURES, TARGET = COLUMNS = [*LONGEST]
LONGEST["Id"] = 100
NAMED = {key: field for field, key in FIELDS.items() if key}

Sample = dict[str, str]
Columns = Mapping[str, str] | None  # which column is which, as read_rows takes it
Ask = Callable[[str, Sequence[str], Sequence[Sequence[str]]], str | None]  # see Table

logger = logging.getLogger("replay")


class Failed(Exception):
    """It cannot go on; the message says why in one sentence."""


class Odd(Exception):
    """This row is no booking; the message says why, after "it"."""


def library(name: str, what: str) -> Any:
    """The module of this name. Raises Failed, which says that this is what it is needed for."""
    try:
        return importlib.import_module(name)
    except ImportError:
        how = "pip install '.[client]' in bookkeep's folder installs it"
        raise Failed(f"{what} needs the package {name.partition('.')[0]}: {how}") from None


def few(odd: int, of: int) -> bool:
    """Whether so many odd rows may be left out, rather than doubt what all of them mean."""
    return odd <= max(3, of // 20)


def outvoted(odd: int, of: int) -> bool:
    """Whether so many odd values do not keep the others from saying what all of them mean."""
    return not odd or (of >= 20 and few(odd, of))


# Where a spreadsheet would begin a formula: at the start of a cell, whatever separates cells.
FORMULA = r"""(?<![^,;|\t\r\n])%s(?='*[" ]*[-=+@\t\r\uff1d\uff0b\uff0d\uff20])"""


def guarded(text: str) -> str:
    """A cell of a CSV file that no spreadsheet runs: with a ' where a formula would begin.

    A plain number stays. Quote all cells: what separates them may stand in one, too. A file that is
    read has its texts without these.
    """
    return text if re.fullmatch("[-+]?[0-9][0-9.,]*", text) else re.sub(FORMULA % "", "'", text)


def unguarded(cell: str) -> str:
    """The text of a guarded cell."""
    return re.sub(FORMULA % "'", "", cell) if "'" in cell else cell


# ------------------------------------------------------------------------------------------ Amounts

OUT = "dr db deb dbt dbit debit débit d s soll lastschrift belastung ausgang af uit cargo addebito "
OUT += "dare out withdrawal payment wn obciążenie 出金"
IN = "cr cre crd crdt credit crédit c k h haben gutschrift eingang bij in abono accredito avere "
IN += "deposit receipt ma uznanie 入金"
SIDES = dict.fromkeys(["-", *OUT.split()], "-") | dict.fromkeys(["+", *IN.split()], "+")
SIDE = re.compile(rf"(?<![^\W\d])({'|'.join(f'{OUT} {IN}'.split())})(?![\w/$])[.]?", re.IGNORECASE)
CURRENCY = re.compile(
    r"[A-Z]{0,3}[$€£¥₩₪₫₴₸₹₺₽฿₦₱\\]|(?<![^\W\d])(?:[A-Z]{3}|[Rr][Ss]|R|RM|Rp|[Kk][Rr]|S?F[Rr]|zł|Kč"
    r"|Ft|lei|лв|руб|р|грн|kn|din|TL|S/|[Ee]uro|円|元|원)(?![^\W\d])[.]?"
)
SPELLING = str.maketrans(dict.fromkeys("'’´`‘ʼ") | dict.fromkeys("−–—‐‑‒▲△", "-"))
SIGNED = re.compile(r"([(])?([+-]?)([0-9.,]*[0-9])(?:[.,]-{0,2}|/-|([+-]))?(?(1)[)])")
PLAIN = re.compile("-?(0|[1-9][0-9]*)[.][0-9]{1,2}")
POWER = re.compile(r"([+-]?[0-9])(?:[.,]([0-9]+))?E([+]?[0-9]{1,2})")
NUMBER = {  # by its decimal mark: what stands before that, and after it
    ".": re.compile(r"([0-9]*|[1-9][0-9]{0,2}(?:,[0-9]{2,3})*,[0-9]{3})(?:[.]([0-9]+))?"),
    ",": re.compile(r"([0-9]*|[1-9][0-9]{0,2}(?:[.][0-9]{2,3})*[.][0-9]{3})(?:,([0-9]+))?"),
}


@lru_cache(4096)  # amounts recur
def readings(amount: str) -> dict[str, str]:
    """The plain number that it is by decimal mark: `1.200` is 1.200 by point, 1200 by comma.

    >>> readings("1.200,50 Dr")
    {',': '-1200.50'}
    """
    if PLAIN.fullmatch(amount):  # as most are
        return {".": amount}
    text = normalize("NFKC", amount.translate(SPELLING)).translate(SPELLING)
    text = re.sub('^="(.*)"$', r"\1", text)
    if power := POWER.fullmatch(text):
        first, decimals, zeros = power[1], power[2] or "", int(power[3])
        if len(decimals) > zeros:
            return {}
        return dict.fromkeys(".,", first + decimals.ljust(zeros, "0"))
    side = SIDE.search(text)
    text = CURRENCY.sub(" ", SIDE.sub("", text, count=1).replace("()", ""), count=1)
    found = SIGNED.fullmatch("".join(text.split()))
    if not found:
        return {}
    opened, before, digits, after = found.groups()
    signs = {opened and "-", before, after, side and SIDES[side[1].lower()]} - {None, ""}
    if len(signs) > 1 or (before and after):
        return {}
    sign = "-" if "-" in signs else ""
    read = {}
    for mark, pattern in NUMBER.items():
        if number := pattern.fullmatch(digits):
            whole, decimals = re.sub("[.,]", "", number[1]), number[2]
            read[mark] = f"{sign}{whole or 0}{f'.{decimals}' if decimals else ''}"
    return read


def side_of(word: str) -> str | None:
    """The sign that a word such as Dr, H or + gives to an amount: "-", "+", or None for others."""
    return SIDES.get(word.strip().lower().removesuffix("."))


class Amounts:
    """The mark before the decimals in a column of amounts, which all of the column decides.

    A value such as `1.200` never decides it alone: it may be 1.2 or 1200. What is no number, such
    as `> -1000`, stays as it is.
    """

    def __init__(self) -> None:
        self.shown: dict[str, list] = {}  # by mark, how many are numbers with it only, the first
        self.likely: dict[str, list] = {}  # and such as 1.200, by the mark if that is thousands
        self.words = [0, ""]
        self.numbers = 0

    def add(self, amount: str, line: int) -> None:
        """Counts an amount that stands in this line."""
        read = readings(amount)
        self.numbers += bool(read)
        if not read:
            found = self.words
        elif len(read) == 1:
            found = self.shown.setdefault(*read, [0, ""])
        elif read["."] != read[","]:
            found = self.likely.setdefault("," if "." in amount else ".", [0, ""])
        else:
            return
        found[0] += 1
        found[1] = found[1] or f"{amount} in line {line}"

    def mark(self, name: object) -> str:
        """The mark. Raises Failed if more than a few contradict the others."""
        found = self.shown or self.likely
        mark = max(found, key=lambda mark: found[mark][0], default=".")
        if len(found) > 1:
            (n, one), (m, other) = found.values()
            if not outvoted(min(n, m), self.numbers):
                raise Failed(f"{name} writes amounts in two ways: {one} and {other}")
        if found and not self.shown:
            first = found[mark][1]
            logger.warning("%s: amounts such as %s are taken for thousands", name, first)
        if self.words[1] and (self.numbers or re.match("[^<>]*[0-9]", self.words[1])):
            logger.warning("%s: amounts such as %s are no numbers; they stay", name, self.words[1])
        return mark


# -------------------------------------------------------------------------------------------- Dates

ISO = re.compile("[12][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])(T[0-9:.]+)?")
ERAS = {"令和": 2018, "R": 2018, "平成": 1988, "H": 1988, "昭和": 1925, "S": 1925}
ERA = re.compile("^(令和|平成|昭和|[RHS](?=[0-9]))(元|[0-9]+)(?=[年./-])")
TIME = re.compile(
    r"(?:(?:T|[\s,]+)([0-9]{1,2})[:.h]([0-9]{2})(?![0-9])|(?<=^[0-9]{8})T?([0-9]{2})([0-9]{2}))"
    r"(?:[:.]?([0-9]{2})(?![0-9])(?:[.,][0-9]+)?)?\s*(?:([AaPp])[.]?[Mm][.]?)?"
    r"\s*(?:Z|[A-Z]{3,4}|[+-][0-9:]+)?$"
)
NUMBERS = re.compile(
    r"(?:[^\W\d]{2,9}[.,]*\s+)?([0-9]{1,4})\s*([-./\s年년])\s*([0-9]{1,2})\s*[-./\s月월]\s*([0-9]{1,4})"
    r"\s*[.日일]?(?:\s*[(]\w+[)])?"
)
COMPACT = re.compile("([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})?")
LANGUAGES = "en de fr es it pt nl pl sv da nb fi cs hu ro tr ru el bg hr sk sl uk et lv lt ja"
AS_IT_STANDS = "replay.py --order file needs no dates, and sends rows as they stand"


def read_dates(dates: Collection[str]) -> dict[str, str]:
    """Each date as 2016-02-29 or 2016-02-29T10:00; those that cannot be read are left out.

    What is day, month and year in 1/2/16 is decided by all of them. Raises Failed if it cannot be.

    >>> read_dates(["29.02.16", "01 Mar 2016"])
    {'29.02.16': '2016-02-29', '01 Mar 2016': '2016-03-01'}
    """
    read, orders, worded = {}, {}, {}
    for written in dates:
        if ISO.fullmatch(written):
            read[written] = written
            continue
        text = normalize("NFKC", written).strip()
        text = ERA.sub(lambda era: f"{ERAS[era[1]] + int(era[2].replace('元', '1'))}", text)
        time = ""
        if found := TIME.search(text):
            text, time = text[: found.start()], _time(found)
        if ways := _ways(text):
            orders[written] = {order: day + time for order, day in ways.items()}
        elif re.search(r"[^\W\d]{3}", text) and len(re.findall("[0-9]+", text)) == 2:
            worded[written] = (text, time)
    if worded:
        read |= _worded(worded)
    if orders:
        read |= _ordered(orders, len(dates))
    return {written: read[written] for written in dates if written in read}


def _time(found: re.Match) -> str:
    hour, minute, second, half = found[1] or found[3], found[2] or found[4], found[5], found[6]
    hour = int(hour) % 12 + 12 * (half in "Pp") if half else int(hour)
    time = f"{hour:02}:{minute}{f':{second}' if second else ''}"
    return f"T{time}" if time.strip("0:") else ""


def _day(year: str, month: int | str, day: str) -> str | None:
    """That day, if there is one, and if its year is likely."""
    this = date.today().year
    number = int(year)
    if len(year) <= 2:
        number += 2000 if 2000 + number <= this + 1 else 1900
    if len(year) == 3 or not (1970 if len(year) <= 2 else 1900) <= number <= this + 20:
        return None
    with suppress(ValueError):
        return date(number, int(month), int(day)).isoformat()
    return None


def _ways(text: str) -> dict[str, str]:
    """What a date in numbers can be, by the order that its parts are in."""
    if found := NUMBERS.fullmatch(text):
        a, mark, b, c = found.groups()
        ways = {"year": (a, b, c)} if len(a) == 4 else {"day": (c, b, a), "month": (c, a, b)}
        if mark == ".":
            ways.pop("month", None)
        elif len(a) <= 2 and len(c) <= 2:
            ways["year"] = (a, b, c)
    elif found := COMPACT.fullmatch(text):
        a, b, c, d = found.groups()
        year = f"{c}{d or ''}"
        ways = {"day": (year, b, a), "month": (year, a, b)}
        ways["year"] = (f"{a}{b}", c, d) if d else (a, b, c)
    else:
        return {}
    days = {order: _day(*parts) for order, parts in ways.items()}
    return {order: day for order, day in days.items() if day}


def _ordered(orders: Mapping[str, Mapping[str, str]], of: int) -> dict[str, str]:
    """The dates in numbers, by the one order that nearly all of them can have."""
    counts = Counter(itertools.chain.from_iterable(orders.values()))
    most = max(counts.values())
    likely = [order for order, n in counts.items() if n == most]
    read = {w: ways[likely[0]] for w, ways in orders.items() if likely[0] in ways}
    others = [written for written in orders if written not in read]
    if others and (len(likely) > 1 or not outvoted(len(others), of)):
        one = next(iter(read))
        raise Failed(f"dates are written in two ways, as {one} and {others[0]}; {AS_IT_STANDS}")
    for order in likely[1:]:
        if other := [w for w in read if orders[w][order] != read[w]]:
            raise Failed(f"what is the day in {other[0]} is not clear; {AS_IT_STANDS}")
    return read


def _worded(dates: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """The dates with names of months, by the language that reads most of them."""
    parser = library("dateparser.date", f"a date such as {next(iter(dates))}").DateDataParser
    strict = {"STRICT_PARSING": True}
    best: dict[str, str] = {}
    for language in LANGUAGES.split():
        parse = lru_cache(None)(parser(languages=[language], settings=strict).get_date_data)
        read = {}
        for written, (text, time) in dates.items():
            a, first, b, second, c = re.split("([0-9]+)", text)
            # It is asked for a month of one year and day, so that there are few to parse.
            if len(first) == 4:
                year, day, asked = first, second, f"{a}2000{b}11{c}"
            else:
                year, day, asked = second, first, f"{a}11{b}2000{c}"
            month = parse(asked).date_obj
            known = month and (month.year, month.day) == (2000, 11)
            if known and (iso := _day(year, month.month, day)):
                read[written] = iso + time
        best = max(best, read, key=len)
        if len(dates) - len(best) <= len(dates) // 50:  # but for totals and the like
            break
    return best


def looks_like_date(text: str) -> bool:
    """Whether it may be a date, as far as that can be told from one."""
    if len(text) > 40:
        return False
    text = TIME.sub("", text)
    worded = r"[0-9]{0,4}\W*(?:[^\W\d]+\W*){1,3}[0-9]{0,4}\W*(?:[0-9]{4})?"
    two = len(re.findall("[0-9]+", text)) == 2
    return bool(_ways(text) or (two and re.fullmatch(worded, text)))


def by_date(rows: Iterable[Sample]) -> list[Sample]:
    """The rows in the order in which they arose.

    Raises Failed if they have no date, or if it cannot be told what is its day and what its month.
    """
    rows = list(rows)
    if any("BankEntryDate" not in row for row in rows):
        no_date = "there is no column BankEntryDate to sort by: --map date=COLUMN names another"
        raise Failed(f"{no_date}; {AS_IT_STANDS}")
    dates = dict.fromkeys(row["BankEntryDate"] for row in rows)
    when = {"": "", **read_dates([date for date in dates if date])}
    if unread := [date for date in dates if date not in when]:
        raise Failed(f"{unread[0]} is no date, as far as can be seen; {AS_IT_STANDS}")
    return sorted(rows, key=lambda row: (when[row["BankEntryDate"]], row["CompanyId"]))


# ------------------------------------------------------------------------------------------ Sources

# What reading something else raises; RuntimeError is that of an encrypted zip.
NOT_CSV = (csv.Error, UnicodeError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
EXPORT = "export it as CSV or Excel from the program that it is from"
OTHERS = (  # what a file begins with that is none of those which are read, and its name
    (rb"%PDF", "a PDF"),
    (rb"\x1f\x8b|\x42\x5a\x68|\x37\x7a\xbc\xaf", "compressed, but no zip"),
    (rb'\s*\[?\s*\{\s*"', "JSON"),
    (rb"\s*!(Type|Account|Option)\b", "QIF"),
    (rb"(?s)\s*<\?xml.{,600}(camt[.]05|BkToCstmr)", "CAMT (ISO 20022)"),
    (rb"(?is)\s*<(html|!doc|table|head|meta|\?xml.{,600}<html)", "a web page, whatever its name"),
    (rb"\s*<\?xml", "XML"),
)
MEMBER = re.compile(r"(?i)(?!(.*/)?(__MACOSX/|[.])).*[.](csv|txt|tsv)")  # of a zip, and not hidden
# Those that banks and accounting programs write, so that a short file is not taken for others.
ENCODINGS = "windows-1250 windows-1251 windows-1252 windows-1253 windows-1254 windows-1255 "
ENCODINGS += "windows-1257 iso8859-2 iso8859-15 koi8-r cp437 cp850 cp852 cp865 cp866 macroman "
ENCODINGS += "maccyrillic cp932 euc-jp gb18030 big5 cp949 utf-16-le utf-16-be"
# What speaks for an encoding; and against it: control characters, boxes, and what a word seldom
# has, letters of two scripts or a symbol.
MONEY = re.compile(r"[0-9]\s?[€£]|[€£]\s?-?[0-9]")
NO_TEXT = re.compile(
    r"[\0-\x08\x0e-\x1f\x7f-\x9f\u2500-\u259f]"
    r"|[A-Za-z][\u0370-\u05ff]|[\u0370-\u05ff][A-Za-z]"
    r"|[^\W\d_][«»¯£ˇ˘¨¸˙˝˛¬¦§¶±¥¢¤©®÷×]|[«»¯£ˇ˘¨¸˙˝˛¬¦§¶±¥¢¤©®÷×][^\W\d_]"
)
HEAD = 100  # records at the start in which the names of the columns are looked for


class Record(NamedTuple):
    """A row: the line that it begins in, its text as it stands, and its values without spaces."""

    line: int
    text: str
    values: list[str]


class Text:
    """The records of a CSV file."""

    def __init__(self, file: BinaryIO, encoding: str | None, wanted: Collection[str]) -> None:
        """`wanted` are names of columns that it should have, as `plain` gives them."""
        self.odd_bytes: list[int] = []  # the lines of bytes that are no UTF-8 in a file that is
        if encoding is None:
            encoding, self.odd_bytes = _encoding(file)
        errors = "bookkeep.files" if self.odd_bytes else "strict"
        file.seek(0)
        try:
            self._text = io.TextIOWrapper(file, newline="", encoding=encoding, errors=errors)
        except LookupError:
            raise UnicodeError(f"{encoding} is no encoding that Python knows") from None
        self.dialect = _dialect(self._text.read(1 << 16), wanted)
        self.encoding = encoding.removesuffix("-sig")

    def __str__(self) -> str:
        mark = self.dialect["delimiter"]
        mark = {";": "semicolons", "\t": "tabs", ",": "commas"}.get(mark, mark)
        said = f"{self.encoding.upper()}, separated by {mark}"
        if self.odd_bytes:
            said += f" (what is no UTF-8 in line {self.odd_bytes[0]} is taken for Windows-1252)"
        return "" if said == "UTF-8, separated by commas" else said

    def records(self, width: int = 0) -> Iterator[Record]:
        """All of them, anew. A record over several lines must have `width` values, if that is set.

        Where quotes are not closed, or stand within others, each line is a record of its own.
        """
        self._text.seek(0)
        held: deque[str] = deque()  # lines to be read again
        taken: list[str] = []  # those of this record

        def lines() -> Iterator[str]:
            while line := held.popleft() if held else self._text.readline():
                taken.append(line)
                yield line

        number, reader = 1, None
        while True:
            try:
                reader = reader or csv.reader(lines(), strict=True, **self.dialect)
                values = next(reader)
                whole = len(taken) == 1 or len(values) == width or not width
            except csv.Error:
                whole = False
            except StopIteration:
                return
            if not whole:
                reader = None
                held.extendleft(reversed(taken[1:]))
                del taken[1:]
                values = self._alone(taken[0], width)
            yield Record(number, "".join(taken), [value.strip() for value in values])
            number += len(taken)
            taken.clear()

    def _alone(self, line: str, width: int) -> list[str]:
        """The values of a line whose quotes are odd."""
        lenient = next(csv.reader([line], **self.dialect))
        if len(lenient) == width or not width:
            return lenient
        as_it_stands = self.dialect | {"quoting": csv.QUOTE_NONE}
        return next(csv.reader([line.rstrip("\r\n")], **as_it_stands))

    def behind(self, record: Record, width: int, more: Sequence[object], quoted: bool) -> str:
        """The text of a record as it stands, filled up to `width` values, and more values."""
        body = record.text.rstrip("\r\n")
        mark, quote = self.dialect["delimiter"], self.dialect["quotechar"]
        how = {"delimiter": mark, "quotechar": quote}
        how["lineterminator"] = record.text[len(body) :] or "\n"
        how["quoting"] = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
        new = io.StringIO()
        csv.writer(new, **how).writerow(["", *more])  # so that an empty one alone is not quoted
        lacking = mark * (width - len(record.values))
        return f"{body}{lacking}{new.getvalue().removeprefix(2 * quote)}"


class Cells(Text):
    """The rows of a file that is no text, as if they were a CSV file's."""

    def __init__(self, what: str, rows: Iterable[Sequence[object]]) -> None:
        self._what = what
        self.dialect = {"delimiter": ",", "quotechar": '"'}
        self._rows = []
        for number, row in enumerate(rows, 1):
            values = [_cell(value) for value in row]
            line = io.StringIO()
            csv.writer(line, lineterminator="\n").writerow(values)
            self._rows.append(Record(number, line.getvalue(), [*map(str.strip, values)]))

    def __str__(self) -> str:
        return self._what

    def records(self, width: int = 0) -> Iterator[Record]:
        """All of them."""
        return iter(self._rows)


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat("T", "minutes").removesuffix("T00:00")
    if isinstance(value, float):
        return f"{value:.10f}".rstrip("0").rstrip(".")
    return "" if value is None else str(value)


def _lenient(error: UnicodeDecodeError) -> tuple[str, int]:
    """Bytes that are no UTF-8, as Windows-1252."""
    return error.object[error.start : error.end].decode("cp1252", "replace"), error.end


codecs.register_error("bookkeep.files", _lenient)


def _encoding(file: BinaryIO) -> tuple[str, list[int]]:
    """The encoding, and the lines that are no UTF-8 in a file that is UTF-8 but for a few."""
    file.seek(0)
    head = file.read(1 << 12)
    for name in ("utf-32", "utf-16"):
        if head.startswith(tuple("\ufeff".encode(f"{name}-{order}") for order in ("le", "be"))):
            return name, []
    if b"\0" in head:
        return _guessed_encoding(head), []
    good, odd, sample = 0, [], b""
    file.seek(0)
    for number, line in enumerate(file, 1):
        if not line.isascii():
            try:
                line.decode("utf-8")
                good += 1
            except UnicodeDecodeError:
                odd.append(number)
                if len(sample) < 50_000:
                    sample += line
    if head.startswith(codecs.BOM_UTF8):
        return "utf-8-sig", odd
    return ("utf-8", odd) if len(odd) <= good else (_guessed_encoding(sample), [])


def _guessed_encoding(sample: bytes) -> str:
    """The encoding in which some lines are likely to be written."""
    chardet = library("chardet", "a file that is not UTF-8")
    likely: dict[str, int] = {}  # by encoding, what speaks for it and against it
    among = ENCODINGS.split()
    for found in chardet.detect_all(sample, ignore_threshold=True, include_encodings=among):
        with suppress(UnicodeError, TypeError):  # it may name none
            text = sample.decode(found["encoding"])
            likely[found["encoding"]] = len(MONEY.findall(text)) - len(NO_TEXT.findall(text))
    if not likely:
        raise UnicodeError("its encoding is not clear; name it, as in --encoding cp1252")
    return codecs.lookup(max(likely, key=likely.__getitem__)).name


def _dialect(head: str, wanted: Collection[str]) -> dict[str, Any]:
    """Separator and quotes: with the most columns that are wanted, or else the most that agree."""

    def found(dialect: dict[str, Any]) -> tuple:
        rows = list(itertools.islice(csv.reader(io.StringIO(head, newline=""), **dialect), HEAD))
        widths = Counter(len(row) for row in rows if len(row) > 1)
        agree = max((n * (width - 1) for width, n in widths.items()), default=0)
        names = max((len({*map(plain, row)} & known) for row in rows), default=0)
        return names, dialect["quotechar"] == '"', agree

    known = {*wanted, *itertools.chain(*KNOWN.values())}
    said = re.match(r'"?sep=(.)"?[\r\n]', head)
    marks = itertools.product(said[1] if said else ";\t,|", "\"'")
    ways = [{"delimiter": m, "quotechar": q, "skipinitialspace": m != "\t"} for m, q in marks]
    return max(ways, key=found)


def plain(name: str) -> str:
    """A column's name as it is compared: without upper case, more spaces and line breaks."""
    return " ".join(name.split()).casefold()


def _sources(
    path: Path, file: BinaryIO, opened: ExitStack, *how: Any
) -> Iterator[tuple[str, Text]]:
    """The tables in a file, with their names. Raises Failed if it is of no kind that is read.

    How a CSV file is read is said as Text takes it.
    """
    head = file.read(1 << 12)
    file.seek(0)
    if head.startswith(b"PK"):
        archive = opened.enter_context(zipfile.ZipFile(file))
        names = sorted(archive.namelist())
        if not any(name.startswith(("xl/", "[Content_Types]", "content.xml")) for name in names):
            members = [name for name in names if MEMBER.fullmatch(name)]
            if not members:
                raise Failed(f"there is no CSV file in {path}")
            for name in members:
                label = f"{path}, {name}" if len(members) > 1 else str(path)
                yield label, Text(opened.enter_context(archive.open(name)), *how)
            return
    for begin, what, rows, way_out in READ:
        if re.match(begin, head):
            file.seek(0)
            try:
                cells = Cells(what, rows(file))
            except Failed:
                raise
            except Exception as error:  # what reads them raises what comes
                reason = f"{path} is {what} that cannot be read ({error})"
                raise Failed(f"{reason}: {way_out}") from None
            yield str(path), cells
            return
    for begin, what in OTHERS:
        if re.match(begin, head.removeprefix(codecs.BOM_UTF8)):
            raise Failed(f"{path} is {what}: {EXPORT}")
    yield str(path), Text(file, *how)


def _spreadsheet(file: BinaryIO) -> list:
    """The rows of the largest sheet."""
    calamine = library("python_calamine", "an Excel file")
    book = calamine.CalamineWorkbook.from_filelike(file)
    sheets = [book.get_sheet_by_name(name).to_python() for name in book.sheet_names]
    return max(sheets, key=len)


def _mt940(file: BinaryIO) -> Iterator[tuple]:
    yield "Date", "Text", "Amount"
    mt940 = library("mt940", "MT940")
    for entry in mt940.parse(file.read().decode("utf-8", "bookkeep.files")):
        entry = entry.data
        words = ("applicant_name", "purpose", "additional_purpose")
        said = " ".join(str(entry[word]) for word in words if entry.get(word))
        said = said or entry.get("transaction_details") or entry.get("extra_details") or ""
        yield entry["date"], " ".join(said.split()), entry["amount"].amount


def _ofx(file: BinaryIO) -> Iterator[tuple]:
    yield "Date", "Text", "Amount"
    text = file.read().decode("utf-8", "bookkeep.files")
    for entry in re.findall("(?is)<STMTTRN>(.*?)</STMTTRN>", text):
        found = dict(re.findall(r"<([A-Za-z0-9.]+)>([^<\r\n]+)", entry))
        words = html.unescape(f"{found.get('NAME', '')} {found.get('MEMO', '')}").strip()
        yield found.get("DTPOSTED", "")[:8], words, found.get("TRNAMT", "")


READ = (  # what a file begins with that is no CSV, its name, what reads it, and the way out
    (rb"PK|\xd0\xcf\x11\xe0", "an Excel file", _spreadsheet, "save it as CSV"),
    (rb"\s*(\{1:|:20:|:940:)", "MT940", _mt940, EXPORT),
    (rb"(?s)\s*(OFXHEADER|<OFX>|<\?OFX|<\?xml.{,600}<.?OFX)", "OFX", _ofx, EXPORT),
)


# ------------------------------------------------------------------------------------------- Tables


class Header:
    """The record that names the columns of a table. Without one, they are called 1, 2, 3."""

    def __init__(self, table: str, head: Sequence[Record], wanted: Collection[str]) -> None:
        """Finds it among the first records, by the names that are wanted, or by how it looks."""
        self._table = table
        found = [len({*map(plain, record.values)} & {*wanted}) for record in head]
        record = head[found.index(max(found))] if any(found) else _likely_header(head)
        self.line, self.text, self.values = record or Record(0, "", [])
        names = [*self.values]
        while names and not names[-1]:
            names.pop()
        if not record:
            widths = Counter(len(each.values) for each in head if any(each.values))
            width = max(widths, key=widths.__getitem__, default=0)
            names = [f"{number + 1}" for number in range(width)]
        self.written = names
        # The second of two columns of one name is called by its number, too.
        self.names = [
            f"{name} ({number})".strip() if name in names[: number - 1] else name
            for number, name in enumerate(names, 1)
        ]
        self._first_row = next(filter(None, map(self.row, head)), [])

    def __str__(self) -> str:
        """What there is, as a message says it."""
        if self.line:
            names = ", ".join(name if name.isprintable() else repr(name) for name in self.written)
            return f"it has {names[:1000]}"
        such = ", ".join(f"{number}={value}" for number, value in enumerate(self._first_row, 1))
        return (
            f"it has no names of columns but numbers, as {such[:1000]}" if such else "it is empty"
        )

    def row(self, record: Record) -> list[str] | None:
        """The values of a record, at least as many as there are columns, if it is one of bookings.

        None if it stands before them, is empty, or is the header once more.
        """
        if record.line <= self.line or record.values == self.values:
            return None
        row = [unguarded(value) for value in record.values]
        return row + [""] * (len(self.names) - len(row)) if any(row) else None

    def number(self, name: str) -> int | None:
        """The column of this name or number. Raises Failed if there are several."""
        for alike in (str, plain):
            found = [n for n, each in enumerate(self.written) if alike(each) == alike(name)]
            if len(found) == 1:
                return found[0]
            if found:
                numbers = " and ".join(f"{number + 1}" for number in found)
                what = f"has the column {name} more than once, as {numbers}"
                raise Failed(f"{self._table} {what}: name it by its number; {self}")
        if name in self.names:
            return self.names.index(name)
        return int(name) - 1 if name.isdecimal() and 0 < int(name) <= len(self.names) else None

    def numbers(self, field: str, text: str) -> list[int]:
        """The columns that a text names, which are joined by a plus; names may have one, too.

        Raises Failed if there are none, or several for a field that takes one.
        """
        parts, found, missing = text.split("+"), [], []
        while parts:
            for size in range(len(parts), 0, -1):
                number = self.number("+".join(parts[:size]).strip())
                if number is not None:
                    found.append(number)
                    break
            else:
                missing.append(parts[0])
            parts = parts[size:]
        if missing:
            what = f"{self._table} has no column {', '.join(missing)}"
            raise Failed(f"{what}; {self}; say with --map which is which, by name or number")
        if len(found) > 1 and field in ("amount", "date", "out", "in", "sign"):
            how = ": out=COLUMN,in=COLUMN names money out and in" if field == "amount" else ""
            raise Failed(f"{field}={text} names {len(found)} columns, but takes one{how}")
        return found

    def free_name(self, name: str) -> str:
        """This name for a new column, or one like it if it is taken."""
        taken = {*map(plain, self.names)}
        numbered = (f"{name} {number}" for number in itertools.count(2))
        return next(n for n in itertools.chain([name], numbered) if plain(n) not in taken)


def wanted_names(columns: Mapping[str, str]) -> set[str]:
    """The names that a header may have, as `plain` gives them."""
    parts = itertools.chain.from_iterable(text.split("+") for text in columns.values())
    names = {*map(plain, (*FIELDS.values(), *columns.values(), *parts))} - {""}
    return {name for name in names if not name.isdecimal()}


def _likely_header(head: Sequence[Record]) -> Record | None:
    """The record that names the columns, if nobody says what their names are."""
    filled = [record for record in head if any(record.values)]
    widths = Counter(len(record.values) for record in filled)
    width = max(widths, key=lambda width: (widths[width] * (width - 1), width), default=0)
    before = None
    for record in filled:
        texts = [*filter(None, record.values)]
        if any(readings(text) or looks_like_date(text) for text in texts):
            if len(record.values) == width:
                return before
            before = None
        elif len(texts) > 1 or width == 1:
            before = record
    return next((record for record in filled if len(record.values) == width), None)


class Table:
    """Bookings in rows: these as they stand, and each as a sample.

    How it writes amounts and dates is found in the rows themselves, which are read twice for that.
    """

    def __init__(
        self,
        source: Text,
        name: str,
        columns: Columns,
        company: str | None = None,
        booked: bool = True,
        guess: bool = False,
        ask: Ask | None = None,
        otherwise: str | None = None,
    ) -> None:
        """As read_rows, of a source. Raises Failed if it cannot be used.

        If it may `guess`, columns that nobody named are found by their names and values. It asks
        about those that are not clear: ask(field, names, some rows) gives the name of a column.
        `otherwise` is the company if no column has it.
        """
        self.source, self.name, self._booked, self.company = source, name, booked, company
        self._needed = COLUMNS if booked else FEATURES
        asked = {field: text for field, text in (columns or {}).items() if text}
        if not booked:
            asked.pop("account", None)  # so that the same names will do before and after
        if {"amount", "sign"} & {*asked} and {"out", "in"} & {*asked}:
            raise Failed("--map takes amount=, with or without sign=, or out= and in=, not both")
        head = list(itertools.islice(source.records(), HEAD))
        self._header = Header(name, head, wanted_names(asked))
        self.names = self._header.names
        # By field, the numbers of its columns.
        self._named = {field: self._header.numbers(field, text) for field, text in asked.items()}
        self._add_defaults(otherwise)
        if guess:
            self._guess(ask)
        if lacking := self._lacking():
            missing = ", ".join(FIELDS[field] for field in lacking)
            how = "say which is which, as --map " + ",".join(f"{f}=COLUMN" for f in lacking)
            if "company" in lacking:
                how += " or --company NAME for all of its rows"
            raise Failed(f"{name} has no column {missing}; {self._header}; {how}")
        required = [NAMED[key] for key in COLUMNS] + ["date"]
        self._required = {f: self._named[f] for f in required if f in self._named}
        self.context = [self.names[number] for number in self._named.get("context", ())]
        # By the key of a sample the columns that it is joined from, in the order of the file.
        keys = {FIELDS[f]: numbers for f, numbers in self._named.items() if FIELDS[f]}
        taken = {n for f, numbers in self._named.items() if f != "context" for n in numbers}
        others = {
            name: [n] for n, name in enumerate(self.names) if n not in taken or name in self.context
        }
        self._keys = dict(sorted((others | keys).items(), key=lambda item: item[1]))
        self._survey()
        self._count()

    def _add_defaults(self, otherwise: str | None) -> None:
        """Adds the columns that nobody named by the keys' own names, and the company."""
        for key, field in NAMED.items():
            known = field in self._named or (key == TARGET and not self._booked)
            if key in self._header.written and not known:
                self._named[field] = [self._header.number(key)]
        if self.company is None and "company" not in self._named:
            self.company = otherwise
        if self.company is not None:
            self._named.pop("company", None)

    def _guess(self, ask: Ask | None) -> None:
        """Adds columns by their names and values, and asks about those that are not clear."""
        rows = [row for _, row in itertools.islice(self._rows(), 500)]
        if not rows and self._lacking():
            raise Failed(f"there are no bookings in {self.name}")
        fields = {*self._lacking(), "date", "sign"} - {*self._named}
        used = {*itertools.chain.from_iterable(self._named.values())}
        self._named |= guessed(self.names, rows, fields, used)
        for field in self._lacking() if ask else ():
            if field != "company" and (name := ask(field, self.names, rows[:3])):
                self._named[field] = self._header.numbers(field, name)

    def _lacking(self) -> list[str]:
        """The fields that a booking needs and that have no column."""
        has = {*self._named}
        if self.company is not None:
            has.add("company")
        if has & {"out", "in"}:
            has.add("amount")
        return [NAMED[key] for key in self._needed if NAMED[key] not in has]

    @property
    def columns(self) -> dict[str, str]:
        """Which column is which, but for those that have a key's own name."""
        named = {
            field: "+".join(self.names[number] or f"{number + 1}" for number in self._named[field])
            for field in FIELDS
            if field in self._named
        }
        return {field: name for field, name in named.items() if name != FIELDS[field]}

    @property
    def map(self) -> str:
        """The same, as --map takes it."""
        return ",".join(f"{field}={name}" for field, name in self.columns.items())

    # -- rows

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """The line and the values of each row, anew."""
        for record in self.source.records(len(self.names)):
            if row := self._header.row(record):
                yield record.line, row

    def _booking(self, record: Record) -> Sample | None:
        """The sample in a record, if that is a booking."""
        if row := self._header.row(record):
            with suppress(Odd):
                return self._sample(row)
        return None

    def samples(self) -> Iterator[Sample]:
        """Each row that is a booking, as a sample."""
        return filter(None, map(self._booking, self.source.records(len(self.names))))

    def suggested(
        self,
        file: TextIO,
        suggest: Callable[[list[Sample]], Iterable[Sequence]],
        new: Sequence[str],
    ) -> Iterator[int]:
        """Writes all lines to a file, with more columns: the new names, and what is suggested.

        `suggest` gives their values for each sample in a list. Gives how many rows are done.
        """
        names = [self._header.free_name(name) for name in new]
        width = max([len(self._header.values), *(len(row) for _, row in self._rows())])
        records = self.source.records(len(self.names))
        done = 0
        while chunk := list(itertools.islice(records, 1000)):
            found = [self._booking(record) for record in chunk]
            answers = iter(list(suggest([sample for sample in found if sample])))
            for record, sample in zip(chunk, found, strict=True):
                more = next(answers) if sample else [""] * len(new)
                if record.values == self._header.values:
                    more = names
                self._write(file, record, width, more)
            file.flush()
            done += len(chunk)
            yield done

    def _write(self, file: TextIO, record: Record, width: int, more: Sequence[object]) -> None:
        """Writes a record as it stands, and more values if it is no line before the header."""
        if record.line < self._header.line or not any(record.values):
            file.write(record.text)
            return
        first = self._header.text or record.text
        quoted = first.startswith(self.source.dialect["quotechar"])
        file.write(self.source.behind(record, width, more, quoted))

    def _survey(self) -> None:
        """Finds how amounts and dates are written."""
        amounts, sums = Amounts(), Counter()
        dates: dict[str, None] = {}
        for line, row in self._rows():
            with suppress(Odd):
                self._check(row)
                for field in ("amount", "out", "in"):
                    if (text := self._text(row, field)).strip("-–—"):
                        amounts.add(text, line)
                        signs = {reading[:1] == "-" for reading in readings(text).values()}
                        sums.update((field, sign) for sign in signs)
                dates.setdefault(self._text(row, "date"))
        self._mark = amounts.mark(self.name)
        self._negative_out = sums["out", True] > sums["out", False]
        self._signed = sums["amount", True] and "sign" in self._named
        self._dates: dict[str, str] | None = None  # None if they stay as they are written
        dates.pop("", None)
        with suppress(Failed):  # by_date says it, if it is needed
            read = read_dates(dates)
            if dates and outvoted(len(dates) - len(read), len(dates)):
                self._dates = read

    def _count(self) -> None:
        """Counts the rows, and why some are left out. Raises Failed if those are more than few."""
        self.rows = self.usable = self._unread = 0
        self._left: dict[str, list[int]] = {}  # by why they are: how many, and the first's line
        self._examples: dict[str, str] = {}  # of amounts and dates, as they are written and read
        accounts: dict[str, str] = {}  # each as it is written first
        alike: tuple[str, ...] = ()  # two accounts that are one but for how they are written
        ids: Counter[tuple] = Counter()  # by company and id, of those that have one
        for line, row in self._rows():
            self.rows += 1
            try:
                sample = self._sample(row)
            except Odd as odd:
                self._left.setdefault(str(odd), [0, line])[0] += 1
            else:
                self.usable += 1
                self._unread += sample.get(BOOKED_BY) == "suggestion"
                ids.update([(sample["CompanyId"], sample["Id"])] if "Id" in sample else ())
                account = self._text(row, "account")
                if (first := accounts.setdefault(plain(account), account)) != account:
                    alike = alike or (first, account)
                if len(self._examples) < 2:
                    self._add_examples(row, sample)
        bad = {why: n for why, (n, _) in self._left.items() if not why.startswith("has no ")}
        if bad and not few(sum(bad.values()), self.rows):
            why = next(iter(bad))
            many = f"{sum(bad.values()):,} of {self.rows:,} rows are no bookings"
            raise Failed(f"{self.name}: {many}: in line {self._left[why][1]}, it {why}")
        if again := sum(ids.values()) - len(ids):
            rows = "%s: rows with the id of a later one, which is booked in their place: %s"
            logger.warning(rows, self.name, f"{again:,}")
        if alike:
            both = '%s: accounts "%s" and "%s" are two, as they are written'
            logger.warning(both, self.name, *alike)

    def _add_examples(self, row: list[str], sample: Sample) -> None:
        amount = sample["BankEntryAmount"]
        side = "amount" if "amount" in self._named else "out" if amount[0] == "-" else "in"
        for field, read in ((side, amount), ("date", sample.get("BankEntryDate", ""))):
            written = self._text(row, field)
            if written and read != written:
                self._examples.setdefault(field, f'"{written}" is {read}')

    def _text(self, row: Sequence[str], field: str) -> str:
        return _joined(row, self._named.get(field, ()))

    def _check(self, row: Sequence[str]) -> None:
        """Raises Odd if a row is no booking, as something is missing or too much."""
        if any(row[len(self.names) :]):
            raise Odd(f"has {len(row)} values for {len(self.names)} columns")
        for field, numbers in self._required.items():
            if not _joined(row, numbers):
                raise Odd(f"has no {field}")

    def _sample(self, row: Sequence[str]) -> Sample:
        """A row as a sample. Raises Odd if it is no booking."""
        self._check(row)
        sample = {key: _joined(row, numbers) for key, numbers in self._keys.items()}
        if self.company is not None:
            sample["CompanyId"] = self.company
        amount = self._amount if "amount" in self._named else self._out_and_in
        sample["BankEntryAmount"] = amount(row)
        for key in (*self._needed, "Id"):
            if len(sample.get(key, "")) > LONGEST[key]:
                raise Odd(f"has more than {LONGEST[key]:,} characters in its {NAMED[key]}")
        if self._dates is not None:
            written = sample["BankEntryDate"]
            if written not in self._dates:
                raise Odd(f"has the date {written}, which cannot be read")
            sample["BankEntryDate"] = self._dates[written]
        for optional in (BOOKED_BY, "Id"):
            if not sample.get(optional):
                sample.pop(optional, None)
        if BOOKED_BY in sample and self._booked and sample[BOOKED_BY] not in WHO:
            how = f"{BOOKED_BY} must be one of {', '.join(WHO)}, and not {sample[BOOKED_BY]}"
            raise Failed(f"{self.name}: {how}; --map by=COLUMN names another column for it")
        return sample

    def _amount(self, row: Sequence[str]) -> str:
        """The amount as a plain decimal number if it is one, with the sign that its column says."""
        amount = self._text(row, "amount")
        read = readings(amount)
        if read and self._mark not in read:
            raise Odd(f"has the amount {amount}, written another way than the others")
        number = read.get(self._mark, amount)
        if "sign" in self._named:
            sign = side_of(self._text(row, "sign"))
            if sign is None or not read:
                raise Odd(f'has the sign "{self._text(row, "sign")}" for {amount}')
            number = sign.strip("+") + number.lstrip("-")
        return number

    def _out_and_in(self, row: Sequence[str]) -> str:
        """The amount of two columns, negative if it is in that of money out."""
        found = []
        for field in ("out", "in"):
            text = self._text(row, field)
            if text.strip("-–—"):
                number = readings(text).get(self._mark)
                if number is None:
                    raise Odd(f"has {text} as money {field}, which is no amount as the others are")
                if field == "out" and not self._negative_out:
                    number = f"-{number}".removeprefix("--")
                if number.strip("-0."):
                    found.append(number)
        if len(found) > 1:
            raise Odd(f"has money out and in at once, {found[0]} and {found[1]}")
        if not found:
            raise Odd("has no amount")
        return found[0]

    # -- words

    def say(self, outcome: str = "left out") -> None:
        """Says in one line how the file was read, unless it is as plain as can be."""
        said = [str(self.source)]
        if (at := self._header.line) != 1:
            said.append(f"the names of its columns in line {at}" if at else "no names of columns")
        if {*self.columns} - {"context"}:
            said.append(self.map)
        said += self._examples.values()
        if self._signed:
            said.append("where amounts have a sign of their own, that of the column counts")
        if self._unread and self._booked:
            unread = f'{BOOKED_BY} is "suggestion" in {self._unread:,} of {self.rows:,} rows'
            said.append(f'{unread}, which teach nothing until somebody writes "person"')
        if left := sum(n for n, _ in self._left.values()):
            why, (_, line) = next(iter(self._left.items()))
            rows = f"{left:,} of {self.rows:,} rows {outcome}"
            said.append(f"{rows}, the first in line {line}: it {why}")
        if self.rows and not self.usable:
            raise Failed(f"there are no bookings in {self.name}: in line {line}, it {why}")
        if said := "; ".join(filter(None, said)):
            logger.log(logging.WARNING if left else logging.INFO, "%s: %s", self.name, said)


def _joined(row: Sequence[str], numbers: Sequence[int]) -> str:
    """What stands in these columns, with spaces between."""
    if len(numbers) == 1:
        return row[numbers[0]]
    return " ".join(row[number] for number in numbers if row[number])


# ----------------------------------------------------------------------------------------- Guesses

WORDS = {  # in names of columns, the likelier first
    "date": "buchungstag buchungsdatum belegdatum bookingdate transactiondate posted date datum"
    " dato data fecha buchung booking päivä dátum tarih дата 日付 取引日 日期 ημερομηνία valuta"
    " wertstellung valutadatum",
    "amount": "amount betrag beløb belopp importe montant bedrag importo valor kwota částka összeg"
    " summa sum tutar sumă сумма 金額 金额 umsatz amt value ποσό määrä iznos znesek gross total"
    " net",
    "out": "debit withdrawal withdrawals out débit soll cargo cargos addebiti dare uit ausgaben"
    " belastung wn 出金 出金額 お支払金額 spent paid expense",
    "in": "credit deposit deposits in crédit haben abono abonos accrediti avere bij einnahmen"
    " gutschrift ma 入金 入金額 お預り金額 received income",
    "text": "description details narration narrative payee merchant supplier purpose memo text"
    " tekst verwendungszweck empfänger auftraggeber beguenstigter zahlungsbeteiligter zweck"
    " buchungstext name libellé libelle concepto descripción descrizione causale omschrijving naam"
    " opis popis beskrivning beskrivelse leírás açıklama описание 摘要 内容 描述 descrição"
    " histórico particulars counterparty reference vendor περιγραφή selite viesti",
    "account": "accountnumber category account ledger kategorie konto catégorie categoría"
    " categoria kategoria sachkonto gegenkonto compte cuenta conto rekening tili účet számla gl"
    " nominal 科目 勘定科目 счет счёт категория luokka grootboek kategori expensetype",
}
KNOWN = {field: words.split() for field, words in WORDS.items()}
NO_WORDS = {"iban", "bic", "id", "nr", "no", "number", "currency", "währung"}
NO_WORDS |= {"type", "balance", "saldo"}


def guessed(
    names: Sequence[str], rows: Sequence[Sequence[str]], fields: Collection[str], used: set[int]
) -> dict[str, list[int]]:
    """The columns that are likely to be the fields, by names and by what stands in some rows."""
    values = [[row[n] for row in rows if row[n]] for n in range(len(names))]
    free = [n for n in range(len(names)) if n not in used and values[n]]

    def share(n: int, test: Callable[[str], object]) -> float:
        return sum(bool(test(value)) for value in values[n]) / len(values[n])

    def best(field: str, among: Iterable[int]) -> list[int]:
        """The columns whose names say the field, the likeliest first."""
        ranks = {n: _rank(names[n], KNOWN[field]) for n in among}
        return sorted((n for n in ranks if ranks[n] is not None), key=lambda n: (ranks[n], n))

    found: dict[str, list[int]] = {}
    day = {n: share(n, looks_like_date) for n in free}
    days = [n for n in best("date", free) if day[n] >= 0.5]
    days += [n for n in free if day[n] > 0.8]
    numbers = {n for n in free if n not in days and share(n, is_amount) > 0.8}
    if "date" in fields and days:
        found["date"] = days[:1]
    if "amount" in fields:
        among = numbers | {n for n in range(len(names)) if not values[n]}
        sides = {side: [n] for side in ("out", "in") for n in best(side, among)[:1]}
        if sides.get("out") == sides.get("in"):  # one that says what it is not
            sides = {}
        named = [n for n in best("amount", numbers) if [n] not in sides.values()]
        moving = [n for n in numbers if _rank(names[n], ["balance", "saldo", "残高"]) is None]
        decimals = [n for n in moving if share(n, re.compile(".*[.,][0-9]{2}").match) > 0.5]
        if named or (not sides and len(decimals) == 1):
            found["amount"] = named[:1] or decimals
        else:
            found |= sides
    taken = {n for columns in found.values() for n in columns} | {*days}
    if "sign" in fields:
        signs = [n for n in free if n not in taken and {*map(side_of, values[n])} == {"-", "+"}]
        if signs:
            found["sign"] = signs[:1]
            taken.add(signs[0])
    words = [n for n in free if n not in taken | numbers]
    # An account recurs; a text is what is seldom the same.
    kinds = {n: len({*values[n]}) for n in free}
    if "account" in fields:
        several = [n for n in free if n not in taken and (kinds[n] > 1 or len(rows) < 9)]
        named = best("account", several)
        recurs = [n for n in words if 1 < kinds[n] <= len(values[n]) // 2]
        others = [n for n in recurs if _rank(names[n], KNOWN["text"]) is None]
        if named or len(others) == 1:
            found["account"] = named[:1] or others
            words = [n for n in words if n not in found["account"]]
    if "text" in fields and words:
        longest = max(words, key=lambda n: sum(map(len, values[n])) / len(values[n]))
        found["text"] = sorted(best("text", words)[:2]) or [longest]
    return found


def is_amount(text: str) -> bool:
    """Whether it is a number, a range of amounts, or a stroke for none."""
    return bool(readings(text) or re.fullmatch("[<>] ?-?10*|big .*|[-–—]", text))


def _rank(name: str, known: Sequence[str]) -> int | None:
    """How likely a name says one of these words: 0 is the likeliest, None is not at all."""
    whole = re.sub(r"[\W_]", "", plain(name))
    parts = re.findall(r"[^\W\d_]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name))
    parts = {part.casefold() for part in parts}
    if whole in known:
        return known.index(whole)
    for rank, word in enumerate(known, 100):
        if word in parts:
            return rank + (100 if parts & NO_WORDS else 0)
    return None


# ------------------------------------------------------------------------------------------- Files


class Book:
    """The tables of a file, which is open: see open_file."""

    def __init__(self, tables: Sequence[Table], digest: str) -> None:
        self.tables, self.digest = tables, digest
        self.rows = sum(table.rows for table in tables)
        self.usable = sum(table.usable for table in tables)
        self.map, self.context = tables[0].map, tables[0].context
        self.company = tables[0].company

    def samples(self) -> Iterator[Sample]:
        """The bookings, in the order of the file."""
        return itertools.chain.from_iterable(table.samples() for table in self.tables)


@contextmanager
def open_file(
    path: Path, columns: Columns = None, encoding: str | None = None, **how: Any
) -> Iterator[Book]:
    """The file, to be read more than once, with further arguments as Table takes them.

    Raises Failed, also for what goes wrong while it is read.
    """
    wanted = wanted_names(columns or {})
    with ExitStack() as opened:
        try:
            file = opened.enter_context(open(path, "rb"))
        except OSError as error:
            raise Failed(f"cannot read {path}: {error.strerror}") from None
        try:
            if not file.seekable():  # a pipe can be read but once
                copy = opened.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(file, copy)
                file = copy
                file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            tables: list[Table] = []
            for name, source in _sources(path, file, opened, encoding, wanted):
                if tables:  # the same columns as in the first
                    columns, how["guess"] = tables[0].columns, False
                tables.append(Table(source, name, columns, **how))
            yield Book(tables, digest)
        except (OSError, *NOT_CSV) as error:
            if getattr(error, "errno", None):  # bzip2 says OSError of damage, with no number
                raise
            raise Failed(f"{path} is no CSV file: {error}") from None


def read_rows(
    path: Path,
    columns: Columns = None,
    company: str | None = None,
    booked: bool = True,
    encoding: str | None = None,
) -> Iterator[Sample]:
    """The bookings in a file, one by one.

    `columns` says which column is which, as {"text": "Payee+Purpose", "amount": "Amount"}, by the
    keys of FIELDS, and by names or numbers; others keep their names, and so do those that are its
    "context". The company may be the same for all rows. Unless they are `booked`, they need no
    account. Amounts become plain decimal numbers and dates as 2016-02-29, if they are clear. Rows
    that are no bookings, as something is empty, are left out, with a warning. Raises Failed if it
    is no such file.
    """
    with open_file(path, columns, encoding, company=company, booked=booked) as book:
        for table in book.tables:
            table.say()
            yield from table.samples()
