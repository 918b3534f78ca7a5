"""bookkeep: a service that learns from every booking and suggests the account of the next.

`python bookkeep.py` answers HTTP requests: `POST /sample` stores and learns bookings,
`POST /predict` predicts an account, `POST /suggest` says how sure that is and why,
`GET /metrics/<n>` how good the last predictions were; `GET /openapi.json` describes the rest.

The module reads from top to bottom, each section using only those above it: Samples, Counts, Model,
Metrics, Log, Snapshot, Writer, Books, Bookkeeper, Views, HTTP, Server, Command line. What the
service can do without stands beside it, in bookkeep_extra: reports, bookings as they stand and what
looks wrong, the page, the API's description, Prometheus, tokens of companies, isolated companies,
the cluster, commands on logs.

A booking travels like this:

    bytes -> check_samples -> [sample, ...] -> Bookkeeper.book -> queue -> the writer -> 200
                                                1 Books.draft   predicted, then learned and counted
                                                2 Log.append    one fsync for all that wait
                                                3 Books.enter   in the history; or, if 2 failed,
                                                  Books.undo    unlearned, exactly, and a 507

The service does not tune itself and forgets only what it is told to forget: one process owns one
log, and all that it knows follows from what is in it.
"""

import argparse
import errno
import fcntl
import gc
import hmac
import io
import ipaddress
import json
import logging
import math
import os
import re
import resource
import signal
import socket
import stat
import sys
import threading
import time
import unicodedata
import zlib
from array import array
from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, lru_cache, partial
from hashlib import blake2b
from importlib import import_module
from itertools import chain, count, islice, pairwise, repeat
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple, TypeVar

# Requests are answered by threads of its own: those of NumPy's BLAS would only be in their way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import waitress
from bottle import Bottle, HTTPError, Route, request, response
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.task import ThreadedTaskDispatcher

__version__ = "0.5.0"

logger = logging.getLogger("bookkeep")

# ---------------------------------------------------------------------------------------- Samples

FEATURES = ("CompanyId", "BankEntryText", "BankEntryAmount")
TARGET = "AccountNumber"
NAME = "AccountName"  # optional: what the company calls the account
BOOKED_BY = "BookedBy"  # optional: who booked it, a person if it is not said
ID = "Id"  # optional: what the caller calls the booking, which a company has but once
CHECKS = 16  # of the suggestions that could be booked unseen, one in so many is to be checked
SCORE_WEIGHTS = {"person": 1, "check": CHECKS, "suggestion": 0}  # what its prediction counts

MAX_CONTEXT = 8  # keys beside the text that are features
OF_A_RECORD = (  # keys that stand beside the target in a log, or in an answer
    *("seq", "batch", "left", "crc", "sample", "corrects", "now", "weight", "against"),
    *("target", "context", "isolated", "before"),
)

MAX_BATCH = 10_000  # samples in one body
MAX_VALUE = 10_000  # characters in a key or a value
MAX_SHORT = 100  # of those that a sample must have, but for the text
MAX_WORDS = 100  # words of a text that become tokens: its first ones
LONG_WORD = 11  # characters of a word beyond which its parts are words, too

BOUNDS = [-10000, -1000, -100, -10, 0, 10, 100, 1000, 10000]  # each the last of its range
RANGES = (  # of amounts
    "big negative",
    *("> -10000", "> -1000", "> -100", "> -10", "< 10", "< 100", "< 1000", "< 10000"),
    "big positive",
)

KINDS = (  # of tokens, in a person's words; c is the company
    "company",
    "amount",
    "word",
    "word in this company",
    "first word in this company",
    "first word with this amount in this company",
    "first two words in this company",
    "whole text",
    "sum in this company",
    "context",
    "context in this company",
    "text in this context",
)
SPECIFICITY = (  # how much of a sample was known, in a person's words, from least to most
    "nothing of the company",
    "nothing of the text",
    "a word",
    "the first word",
    "the first word and the amount",
    "the first two words",
)
SPECIFICITY_BY_KIND = np.array([1, 0, 0, 2, 3, 4, 5, 0, 0, 0, 0, 0])  # if a token of it is known
KIND_SHIFT = 59  # a token's kind stands in its upper bits
HASH = (1 << KIND_SHIFT) - 1  # the others

Sample = dict[str, str]
T = TypeVar("T")


class BadRequest(ValueError):
    """The caller sent something that cannot be used; the message says what to change."""


def parse_json(body: bytes) -> object:
    """What the body says, strictly: UTF-8, no duplicate keys, no NaN. Raises BadRequest.

    A body that is a JSON string is read as the JSON within.
    """
    try:
        content = _decode(body.decode("utf-8-sig"))
        return _decode(content) if isinstance(content, str) else content
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body must be UTF-8, byte {error.start} is not") from None
    except RecursionError:
        raise BadRequest("the JSON is nested too deeply") from None
    except BadRequest:
        raise
    except ValueError as error:
        raise BadRequest(f"the body must be JSON: {error}") from None


def check_samples(
    content: object, booked: bool, most: int = MAX_BATCH, target: str = TARGET
) -> list[Sample]:
    """The samples that a body says: a list, or, unless they must be `booked`, a single one.

    A booked sample must have its target. Raises BadRequest, which counts the samples from 0, also
    if there are more than `most`.
    """
    if isinstance(content, dict) and not booked:
        content = [content]
    if not isinstance(content, list):
        raise BadRequest(f"send a list of samples{'' if booked else ' or one sample'}")
    if len(content) > most:
        raise BadRequest(f"send at most {most} samples in one request, not {len(content)}")
    required = (*FEATURES, target) if booked else FEATURES
    for number, sample in enumerate(content):
        try:
            check_sample(sample, required)
            if booked:
                score_weight(sample)
            if booked and ID in sample:
                check_sample(sample, (ID,))
        except BadRequest as error:
            raise BadRequest(f"sample {number}: {error}") from None
    return content


def check_sample(sample: object, required: Sequence[str]) -> None:
    """Raises BadRequest unless it is an object of strings with all `required` keys filled."""
    if not isinstance(sample, dict):
        raise BadRequest("must be an object of strings")
    try:
        text = "".join(chain(sample, sample.values()))
    except TypeError:
        key = next(key for key, value in sample.items() if not isinstance(value, str))
        hint = ": put the number in quotes" if isinstance(sample[key], float) else ""
        raise BadRequest(f"{_shown(key)} must be a string{hint}") from None
    if len(text) > MAX_VALUE:
        for key, value in sample.items():
            if max(len(key), len(value)) > MAX_VALUE:
                raise BadRequest(f"{_shown(key)} is longer than {MAX_VALUE} characters")
    for key in required:
        if key not in sample:
            raise BadRequest(f"{key} is missing")
        if not sample[key]:
            raise BadRequest(f"{key} is empty")
        if key != "BankEntryText" and len(sample[key]) > MAX_SHORT:
            raise BadRequest(f"{key} is longer than {MAX_SHORT} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest("a lone surrogate (half of a \\u pair) is not text") from None


def check_features(context: Sequence[str], target: str) -> None:
    """Raises BadRequest unless these keys can be features, and that one the target."""
    taken = {*FEATURES, "BankEntryDate", ID, BOOKED_BY}
    if target in {*taken, *OF_A_RECORD} or not re.fullmatch(r"[\w-]{1,100}", target):
        raise BadRequest(f"{_shown(target)} cannot be the target")
    if len(context) > MAX_CONTEXT or len({*context}) < len(context):
        raise BadRequest(f"a context is of at most {MAX_CONTEXT} keys, each once")
    for key in context:
        of_the_account = key.startswith("Account") and target == TARGET
        if key in taken or key == target or of_the_account or not key or len(key) > MAX_SHORT:
            raise BadRequest(f"{_shown(key)} cannot be a context")


def score_weight(sample: Sample) -> int:
    """What its prediction counts, by who booked it. Raises BadRequest if that is nobody."""
    booked_by = sample.get(BOOKED_BY, "person")
    if booked_by not in SCORE_WEIGHTS:
        raise BadRequest(f"{BOOKED_BY} must be one of {', '.join(SCORE_WEIGHTS)}")
    return SCORE_WEIGHTS[booked_by]


def tokens(sample: Sample, context: Sequence[str] = ()) -> list[int]:
    """The sample's tokens: positive 63-bit integers, the kind and a hash of what they say.

    `context` are keys that count, too. That any two of five million tokens have the same hash has
    a probability of less than 1 in 40,000.
    """
    texts = words(sample["BankEntryText"])
    c, *w = map(_digests.__getitem__, [sample["CompanyId"], *texts])
    a, exact, ending = _amount_digests(sample["BankEntryAmount"])
    made = [c, _KIND[1] | a, *[_KIND[2] | word for word in w]]
    first = w[:1]
    if w:
        kind = _KIND[3]
        made += [kind | hash((c, word)) & HASH for word in w]
        made += [
            _KIND[4] | hash((c, *first)) & HASH,
            _KIND[5] | hash((c, a, *first)) & HASH,
            _KIND[6] | hash((c, *w[:2])) & HASH,
            _KIND[7] | hash(tuple(w)) & HASH,
        ]
    if exact:
        said = [(c, exact), (c, ending), *[(c, exact, word) for word in first]]
        made += [_KIND[8] | hash(each) & HASH for each in said]
    for key in context:
        if value := sample.get(key):
            k, v = _digests[key], _digests[value]
            made += [_KIND[9] | hash((k, v)) & HASH, _KIND[10] | hash((c, k, v)) & HASH]
            if w:
                made.append(_KIND[11] | hash((c, k, v, *first)) & HASH)
                made.append(_KIND[11] | hash((c, k, v, *w)) & HASH)
    return made


def wordings(sample: Sample, context: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What each of the sample's tokens says to a person: its kind and the sample's own words."""
    amount, w = sample["BankEntryAmount"], words(sample["BankEntryText"])
    first, text, exact = w[:1], " ".join(w), exact_sum(amount)
    made = [(KINDS[0], sample["CompanyId"]), (KINDS[1], amount_range(amount))]
    made += [(kind, word) for kind in KINDS[2:4] for word in w]
    if w:
        made += zip(KINDS[4:8], [*first, *first, " ".join(w[:2]), text], strict=True)
    if exact is not None:
        made += [("this very sum", exact), ("a sum that ends like this", exact[-2:])]
        made += [("first word with this very sum", f"{word} {exact}") for word in first]
    for key in context:
        if value := sample.get(key):
            made += [(key, value), (f"{key} in this company", value)]
            if w:
                made += [(f"first word in that {key}", w[0]), (f"this text in that {key}", text)]
    return made


def words(text: str) -> list[str]:
    """The words of a text that count, at most MAX_WORDS.

    "Büro  MIETE" -> büro, miete; "東京電力" -> 東京, 京電, 電力; "Uber*1f37b5qz4 May" ->
    uber*1f37b5qz4, may, and behind all others uber
    """
    ascii_only = text.isascii()
    if not ascii_only:  # full-width letters, accents in two characters and the like
        text = unicodedata.normalize("NFKC", text)
    made, parts = [], []
    for word in text.casefold().split(maxsplit=MAX_WORDS)[:MAX_WORDS]:
        if not ascii_only and len(word) > 2 and _east_asian(word):
            made += [first + second for first, second in pairwise(word)]
            continue
        made.append(word)
        if len(word) > LONG_WORD and _joined(word):
            parts += _letters(word)
    return (made + parts)[:MAX_WORDS]


_east_asian = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]").search
_joined = re.compile(r"\w[^\w\s]\w").search
_letters = re.compile(r"[^\W\d_]{3,}").findall


def amount_range(amount: str) -> str:
    """The range that a plain decimal number is in; any other amount is one of its own.

    -9875.50 -> > -10000, -1000 -> > -10000, 0 -> > -10, 10 -> < 10, 1,200.00 -> 1,200.00
    """
    if _decimal(amount):
        return RANGES[bisect_left(BOUNDS, float(amount))]
    return amount


def exact_sum(amount: str) -> str | None:
    """A plain decimal number as it is shortest: +1200.00 -> 1200, -0.50 -> -0.5; None otherwise."""
    if not (number := _decimal(amount)):
        return None
    sign, whole, cents = number.groups(default="")
    shortest = f"{whole}.{cents}" if cents else whole
    return "-" + shortest if sign == "-" and shortest != "0" else shortest


_decimal = re.compile(r"([+-]?)0*([0-9]+?)(?:\.(?=[0-9])([0-9]*?)0*)?").fullmatch


def digest(text: str) -> int:
    """A hash that is the same in every process, unlike Python's own of a string."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 64 - KIND_SHIFT


class Digests(dict):
    """The digests of words that were met lately: of short ones, and so few that 16 MB will do."""

    def __missing__(self, word: str) -> int:
        made = digest(word)
        if len(word) <= 32:
            if len(self) >= 1 << 15:
                self.clear()
            self[word] = made
        return made


@lru_cache(1 << 13)
def _amount_digests(amount: str) -> tuple[int, int, int]:
    """Of an amount's range, of the sum, and of how it ends; 0 for both unless it is a number."""
    exact = exact_sum(amount)
    ends = (0, 0) if exact is None else (digest(exact), digest(f"...{exact[-2:]}"))
    return digest(amount_range(amount)), *ends


_digests = Digests()
_KIND = [kind << KIND_SHIFT for kind in range(len(KINDS))]


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise BadRequest(f"the key {_shown(key)} occurs twice in one object")
    return unique


def _no_constant(name: str) -> None:
    raise BadRequest(f"the body must be JSON, which has no {name}")


# No number is of use here, so any will do as a float, which may have any number of digits.
_decode = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_constant, parse_int=float
).decode


def _shown(key: str) -> str:
    """The key as an error message shows it: never too long, never unprintable."""
    return key if re.fullmatch(r"\w{1,40}", key, re.ASCII) else json.dumps(key[:40])


def one_line(text: str) -> str:
    """The text, which may have somebody's names in it, so that it is one line of output.

    What cannot be printed is escaped, but for bytes of a file's name that are no text here.
    """
    return "".join(
        c if c.isprintable() or "\udc80" <= c <= "\udcff" else repr(c)[1:-1] for c in text
    )


class LogLines(logging.Formatter):
    """Lines of the service's own log: all but an entry's first one are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The entry, with a traceback if it has one."""
        return "\n    ".join(map(one_line, super().format(record).split("\n")))


# ----------------------------------------------------------------------------------------- Counts

GRAIN = 1024  # weights are multiples of 1 / GRAIN, so sums of them are exact in any order
RARE = 200  # sums that a token has at most if the accounts that it has met are candidates
UNITS = (1 << 40) - 1  # of an entry
SIZE = (1 << 24) - 1  # of a row
WIDE = 1 << 62  # in the value of a wide row
PAGE = 8  # accounts

Arrays = dict[str, np.ndarray]


class Table:
    """Whole numbers for each key: an open hash table with triangular probing, at most 5/8 full.

    A key is an integer above 0 whose lower bits are as good as random. Its numbers, so many as the
    table is wide, are in `values[slot]`, all 0 as long as there are none.
    """

    def __init__(self, *width: int, slots: int = 2) -> None:
        self.keys = np.zeros(slots, dtype=np.int64)  # 0 where a slot is free
        self.values = np.zeros((slots, *width), dtype=np.int64)
        self.taken = 0  # slots

    @classmethod
    def of(cls, keys: np.ndarray, values: np.ndarray) -> "Table":
        """The table that had these keys and values."""
        table = cls()
        table.keys, table.values, table.taken = keys, values, int(np.count_nonzero(keys))
        return table

    def find(self, keys: np.ndarray) -> np.ndarray:
        """(m,) the slot of each key, or the free one that it would get."""
        last = len(self.keys) - 1
        slots = keys & last
        there = self.keys.take(slots)
        far = ((there != keys) & (there != 0)).nonzero()[0]
        step = 0
        while len(far):
            step += 1
            slots[far] = at = slots[far] + step & last
            there = self.keys.take(at)
            far = far[(there != keys[far]) & (there != 0)]
        return slots

    def find_each(self, keys: Iterable[int]) -> list[int]:
        """As find, one key after the other, which for a dozen is faster."""
        last, key_at = len(self.keys) - 1, self.keys.item
        slots = []
        for key in keys:
            slot, step = key & last, 0
            while (there := key_at(slot)) != key and there:
                step += 1
                slot = slot + step & last
            slots.append(slot)
        return slots

    def insert(
        self,
        keys: np.ndarray,
        changing: Callable[[], AbstractContextManager] = nullcontext,
    ) -> np.ndarray:
        """(m,) the slot of each key, its own from now on.

        If there may be no room, all that have a number move to a larger table; what `changing`
        gives is entered to put that in the place of this one.
        """
        slots = self.find(keys)
        homeless = (self.keys.take(slots) != keys).nonzero()[0]
        new = len(_run_starts(np.sort(keys[homeless])))
        if (self.taken + new) * 8 > len(self.keys) * 5:
            live = self.values.reshape(len(self.keys), -1).any(axis=1).nonzero()[0]
            room = (len(live) * 9 // 8 + new) * 8 // 5 + 1
            larger = Table(*self.values.shape[1:], slots=1 << room.bit_length())
            larger.values[larger.insert(self.keys[live])] = self.values[live]
            slots = larger.insert(keys)
            with changing():
                self.keys, self.values, self.taken = larger.keys, larger.values, larger.taken
            return slots
        self.taken += new
        while len(homeless):
            wanted = keys[homeless]
            self.keys[slots[homeless]] = wanted  # of those that want a slot, one gets it
            homeless = homeless[self.keys[slots[homeless]] != wanted]
            slots[homeless] = self.find(keys[homeless])
        return slots


class Counts:
    """A sparse matrix of exact sums, token by account, twice: N for an account, M against it.

    Sums are in units of 1 / GRAIN; one that becomes zero is dropped. A token's row is narrow or
    wide. A narrow row has at most RARE sums, or is a company's: its accounts are candidates. It is
    a span of entries in one long array, with room for a few more, and moves to the end when it
    outgrows that. An entry is one number: the column (2 * account for N, the next one for M) in the
    upper 23 bits, the sum in the lower 40; its evidence is beside it. A wide row has met so many
    accounts that it is only asked about some, so that it costs no more the more accounts there are:
    its sums are on pages of PAGE accounts each, beside their evidence. Accounts that it has not met
    mostly have no page of their own, but the first one, which stays empty.
    """

    def __init__(self, evidence_of: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]):
        """It gives the evidence, as whole numbers, of sums by their kind, side and units."""
        self._evidence_of = evidence_of
        # Of a token: where its span starts, or which wide row it is; how many sums it has.
        self.rows = Table()
        self.entries = np.zeros(1, dtype=np.int64)  # the first is in no span
        self.evidence = np.zeros(1)  # of each entry
        self.end = 1  # of the last span
        self.cells = np.zeros((PAGE, 3), dtype=np.int64)  # of all pages: N, M, their evidence
        self.pages = 1  # in use, the empty one included
        self.page_of = np.zeros((0, 1), dtype=np.int32)  # (wide rows, A / PAGE and room)
        self.spare: list[int] = []  # wide rows that are none now
        self.occupied = np.zeros(len(KINDS), dtype=np.int64)  # known tokens of each kind

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """(m,) how many sums each row has."""
        return self.rows.values.take(rows) & SIZE

    def is_wide(self, rows: np.ndarray) -> np.ndarray:
        """(m,) is it a wide row?"""
        return self.rows.values.take(rows) >= WIDE

    def spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(m,) how many entries each row has, 0 for a wide one; (e,) where they all are."""
        values = self.rows.values.take(rows)
        sizes = np.where(values < WIDE, values & SIZE, 0)
        return sizes, ranges(values >> 24, sizes)

    def met(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What narrow rows say: (m,) how many entries each has, (e,) their accounts, evidence."""
        sizes, at = self.spans(rows)
        return sizes, self.entries.take(at) >> 41, self.evidence.take(at)

    def asked(self, rows: np.ndarray, accounts: np.ndarray) -> np.ndarray:
        """The evidence of wide rows for accounts."""
        return self.cells[self._cells(rows, accounts), 2]

    def units(self, rows: np.ndarray, accounts: np.ndarray) -> np.ndarray:
        """(..., 2) the sums, N and M, of wide rows for accounts."""
        return self.cells[self._cells(rows, accounts), :2]

    def _cells(self, rows: np.ndarray, accounts: np.ndarray) -> np.ndarray:
        """Where wide rows' accounts are in the cells: below PAGE if they have no page."""
        page, at = np.divmod(accounts, PAGE)
        return self.page_of[self.rows.values.take(rows) - WIDE >> 24, page] * PAGE + at

    def add(self, rows: np.ndarray, columns: np.ndarray, units: np.ndarray) -> None:
        """Adds so many units to the sum in each row and column."""
        wide_rows, pages = self.page_of.shape
        if int(columns.max()) >= 2 * PAGE * pages:
            self.page_of = _grown(self.page_of, wide_rows, int(columns.max()) // PAGE + 1)
        cells = rows << 24 | columns
        order = cells.argsort()
        cells = cells.take(order)
        first = _run_starts(cells)
        cells, units = cells.take(first), np.add.reduceat(units.take(order), first)
        rows = cells >> 24
        touched = rows.take(_run_starts(rows))
        known = self.rows.values.take(touched) > 0
        wide = self.is_wide(rows)
        for add, those in ((self._add_wide, wide), (self._add_narrow, ~wide)):
            if those.any():
                add(cells[those], units[those])
        changed = (self.rows.values.take(touched) > 0).astype(np.int64) - known
        np.add.at(self.occupied, self.rows.keys.take(touched) >> KIND_SHIFT, changed)

    def _add_narrow(self, cells: np.ndarray, units: np.ndarray) -> None:
        rows = cells >> 24
        touched = rows.take(_run_starts(rows))
        sizes, at = self.spans(touched)
        old = self.entries.take(at)
        owner = np.append(np.arange(len(touched)).repeat(sizes), touched.searchsorted(rows))
        cells = owner << 24 | np.append(old >> 40, cells & 0xFFFFFF)
        order = cells.argsort(kind="stable")  # both parts are in order: they are only merged
        cells = cells.take(order)
        first = _run_starts(cells)
        units = np.add.reduceat(np.append(old & UNITS, units).take(order), first)
        kept = units.nonzero()[0]
        cells = cells.take(first.take(kept))
        self._fill(touched, cells >> 24, cells & 0xFFFFFF, units.take(kept))

    def _fill(
        self, rows: np.ndarray, owner: np.ndarray, columns: np.ndarray, units: np.ndarray
    ) -> None:
        """Puts these sums, in order, into rows, in the place of theirs."""
        sizes = np.bincount(owner, minlength=len(rows))
        many = (sizes > RARE) & (self.rows.keys.take(rows) > HASH)
        if many.any():
            self._widen(rows[many])
            wide = many[owner]
            self._add_wide(rows[owner[wide]] << 24 | columns[wide], units[wide])
            rows, owner = rows[~many], ((~many).cumsum() - 1)[owner[~wide]]
            sizes, columns, units = sizes[~many], columns[~wide], units[~wide]
        moved = (sizes > _room(self.sizes(rows))).nonzero()[0]
        room = _room(sizes[moved])
        self._make_room(int(room.sum()))
        starts = self.rows.values[rows] >> 24
        starts[moved] = self.end + room.cumsum() - room
        self.end += int(room.sum())
        self.rows.values[rows] = np.where(sizes > 0, starts << 24 | sizes, 0)
        at = ranges(starts, sizes)
        self.entries[at] = columns << 40 | units
        kind = (self.rows.keys.take(rows) >> KIND_SHIFT).take(owner)
        self.evidence[at] = self._evidence_of(kind, columns & 1, units)

    def _make_room(self, more: int) -> None:
        """If so many more entries don't fit, moves all spans together, into larger arrays."""
        if self.end + more <= len(self.entries):
            return
        rows = ((self.rows.values > 0) & (self.rows.values < WIDE)).nonzero()[0]
        sizes, old = self.spans(rows)
        room = _room(sizes)
        starts = 1 + room.cumsum() - room
        self.rows.values[rows] = starts << 24 | sizes
        new, self.end = ranges(starts, sizes), 1 + int(room.sum())
        slots = (self.end + more) * 4 // 3
        entries, evidence = np.zeros(slots, dtype=np.int64), np.zeros(slots)
        entries[new], evidence[new] = self.entries[old], self.evidence[old]
        self.entries, self.evidence = entries, evidence

    def _widen(self, rows: np.ndarray) -> None:
        """Makes these rows wide ones, without any sum."""
        wide_rows, pages = self.page_of.shape
        if len(rows) > len(self.spare):
            more = wide_rows // 2 + len(rows)
            self.spare += range(wide_rows, wide_rows + more)
            self.page_of = _grown(self.page_of, wide_rows + more, pages)
        self.rows.values[rows] = [WIDE | self.spare.pop() << 24 for _ in rows]

    def _add_wide(self, cells: np.ndarray, units: np.ndarray) -> None:
        rows, accounts, side = cells >> 24, (cells & 0xFFFFFF) >> 1, cells & 1
        lacking = (self._cells(rows, accounts) < PAGE).nonzero()[0]
        if len(lacking):
            wide = self.rows.values.take(rows[lacking]) - WIDE >> 24
            new = wide << 32 | accounts[lacking] // PAGE
            new = new[_run_starts(new)]
            self.page_of[new >> 32, new & 0xFFFFFFFF] = self.pages + np.arange(len(new))
            self.pages += len(new)
            if self.pages * PAGE > len(self.cells):
                self.cells = _grown(self.cells, self.pages * PAGE * 3 // 2, 3)
        at = self._cells(rows, accounts)
        had = self.cells[at, side]
        self.cells[at, side] += units
        kinds, sums = self.rows.keys.take(rows) >> KIND_SHIFT, self.cells[at, :2]
        said = self._evidence_of(kinds[:, np.newaxis], np.arange(2), sums)
        self.cells[at, 2] = said.sum(axis=1)
        more = (had + units != 0).astype(np.int64) - (had != 0)
        np.add.at(self.rows.values, rows, more)
        for row in sorted({*rows[more < 0].tolist()}):
            if self.sizes(row) <= RARE:
                self._make_narrow(row)

    def _make_narrow(self, row: int) -> None:
        wide = int(self.rows.values[row]) - WIDE >> 24
        cells = np.add.outer(self.page_of[wide] * PAGE, np.arange(PAGE)).ravel()
        units = self.cells[cells, :2].ravel()
        self.cells[cells] = self.rows.values[row] = 0
        self.spare.append(wide)  # and its pages with it
        columns = units.nonzero()[0]
        self._fill(np.array([row]), np.zeros_like(columns), columns, units[columns])

    def state(self) -> Arrays:
        """All sums; arrays that are its own."""
        return {
            "tokens": self.rows.keys,
            "spans": self.rows.values,
            "entries": self.entries[: self.end],
            "evidence": self.evidence[: self.end],
            "cells": self.cells[: self.pages * PAGE],
            "page_of": self.page_of,
            "spare": np.array(self.spare, dtype=np.int64),
            "occupied": self.occupied,
        }

    def restore(self, state: Arrays) -> None:
        """Takes over all sums of another."""
        self.rows = Table.of(state["tokens"], state["spans"])
        self.entries, self.evidence = state["entries"], state["evidence"]
        self.end = len(self.entries)
        self.cells, self.pages = state["cells"], len(state["cells"]) // PAGE
        self.page_of = state["page_of"]
        self.spare, self.occupied = state["spare"].tolist(), state["occupied"]


def packed(content: object) -> np.ndarray:
    """Its JSON, as an array of bytes."""
    return np.frombuffer(json.dumps(content).encode(), dtype=np.uint8)


def unpacked(array: np.ndarray) -> object:
    """What was packed."""
    return json.loads(array.tobytes())


def _room(sizes: np.ndarray) -> np.ndarray:
    """Room for so many entries, and some more: 0, 1, 2, 3, 4, 6, 8, 12, 16 and so on."""
    return _ROOMS.take(_ROOMS.searchsorted(sizes))


_ROOMS = np.sort([0, 1, *(n << i for n in (2, 3) for i in range(24))])


def _grown(values: np.ndarray, *shape: int) -> np.ndarray:
    """A copy of that shape, filled up with zeros."""
    grown = np.zeros(shape, dtype=values.dtype)
    grown[tuple(map(slice, values.shape))] = values
    return grown


def _run_starts(values: np.ndarray) -> np.ndarray:
    """Where in sorted values another one starts.

    [3, 3, 5, 7, 7] -> [0, 2, 3]
    """
    starts = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=starts[1:])
    return starts.nonzero()[0]


def _summed(keys: np.ndarray, values: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys, below `end` and 2 ** 39, and the sum of the values of each.

    [7, 3, 7], [1, 2, 4] -> [3, 7], [2, 5]
    """
    if end <= 32 * len(keys):
        there = np.zeros(end, dtype=bool)
        there[keys] = True
        found = there.nonzero()[0]
        return found, np.bincount(keys, values).take(found)
    keys = np.sort(keys << 24 | np.arange(len(keys)))  # faster than argsort
    order, keys = keys & 0xFFFFFF, keys >> 24
    first = _run_starts(keys)
    return keys.take(first), np.add.reduceat(values.take(order), first)


def _inserted(
    keys: np.ndarray, values: np.ndarray, more: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted keys with some more of them, whose values are 0."""
    at = keys.searchsorted(more)
    return np.insert(keys, at, more), np.insert(values, at, 0)


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The numbers in ranges of these sizes from these starts on.

    starts [5, 8], sizes [2, 1] -> [5, 6, 8]
    """
    ends = sizes.cumsum()
    return (starts - ends + sizes).repeat(sizes) + np.arange(ends[-1] if len(ends) else 0)


# ------------------------------------------------------------------------------------------ Model

ALPHA = 0.15  # smooths what speaks for an account
BETA = 4  # smooths what speaks against it
FACTORS = (2, 1, 1, 1 / 2, 1, 1, 1, 1, 1, 2, 1, 1 / 2)  # of the evidence of each kind of tokens
SOFTENING = 3  # divides scores for the weights: Naive Bayes is too sure of itself
SHARE = 0.75  # of its surprise that a booking counts
FLOOR = 1 / 64  # what it counts at the least, even if it surprises nobody
RIVALS = 2  # that it counts against at most
NEAR = 1 / 32  # the probability from which on an account is a rival
CALMING = 2  # divides scores for the margin, likewise
ROUND = 64  # documents of a batch that are weighed, and learned, at once
EVIDENCE = 2.0**-36  # evidence and logs are multiples of it, so sums of them are exact, too


class Assessment(NamedTuple):
    """What the model made of a booking before it learned it."""

    predicted: str | None  # the most probable account; None while there is no model
    margin: float | None  # how far it is ahead of all others; None if there is no other
    rank: int | None  # of the booked account, 1 for the most probable; None if it is no candidate
    specificity: int  # how much was known of it, of SPECIFICITY


class Lesson(NamedTuple):
    """What a document counts for its account, and the rivals, against each of which it counts 1."""

    account: str
    weight: float
    against: Sequence[str] = ()


class LookedUp(NamedTuple):
    """n documents whose m tokens have been looked up, for as long as no row moves."""

    start: np.ndarray  # (n,) the first token of each document
    document: np.ndarray  # (m,) in which document each token is
    kind: np.ndarray  # (m,) of each token
    row: np.ndarray  # (m,) of each token in the counts


Documents = Sequence[Sequence[int]] | LookedUp


class Scores(NamedTuple):
    """The scores of n documents' candidates: p pairs, in the order of documents, then accounts.

    Where labels are given, those that are known have a pair, too, even if they are no candidates.
    """

    document: np.ndarray  # (p,)
    account: np.ndarray  # (p,)
    score: np.ndarray  # (p,)
    start: np.ndarray  # (n,) the first pair of each document
    label: np.ndarray  # (l,) the pairs of the known labels
    alien: np.ndarray  # (l,) is it no candidate?
    found: LookedUp | None  # None for a single document that is only predicted


class NaiveBayes:
    """Multinomial Naive Bayes, for and against, over documents of tokens of several kinds.

    The score of an account a (a class) for a document is log P(a | document), up to a constant:

        log N(a) - 1/2 sum over kinds k of n_k log (T_k(a) + alpha V_k)
            + sum over known tokens t of c_k [ L(N(t, a) / alpha) - L(M(t, a) / beta) ]

    N are sums of weights for an account, M against it. n_k is how many known tokens of kind k the
    document has, T_k(a) the weight of a's tokens of kind k, V_k how many tokens of kind k are
    known, c_k its factor. L is `root_log`. With nothing against, 1 for 1/2 and for all c_k, and L
    the log of 1 + x, it is scikit-learn's MultinomialNB of each kind, fitted with sample_weight,
    added up.

    Only candidates have a score: the accounts that the document's company or one of its rare tokens
    has met, or, if there are none, all. A document is a list of tokens. Accounts count from 0 in
    the order in which they were first seen. Scores are exact sums of rounded numbers: the same, bit
    for bit, however many are computed at once.

    The example of Manning, Raghavan and Schuetze (Introduction to Information Retrieval, table
    13.1), whose tokens are of one kind here:

    >>> chinese, beijing, shanghai, macao, tokyo, japan = range(1, 7)
    >>> documents = [
    ...     [chinese, beijing, chinese],
    ...     [chinese, chinese, shanghai],
    ...     [chinese, macao],
    ...     [tokyo, japan, chinese],
    ... ]
    >>> model = NaiveBayes(alpha=1)
    >>> model.learn(documents, [Lesson("c", 1.0)] * 3 + [Lesson("j", 1.0)])
    >>> asked = [chinese, chinese, chinese, tokyo, japan]
    >>> model.predict([asked])
    ['c']
    >>> model.joint_log_likelihood([asked]).score.round(2).tolist()
    [6.55, 1.75]
    """

    def __init__(self, alpha: float = ALPHA, beta: float = BETA) -> None:
        self.alpha = alpha
        self._per_unit = np.tile(1 / (GRAIN * np.array([alpha, beta])), len(KINDS))
        self._factors = np.multiply.outer(FACTORS, [1, -1]).ravel() / EVIDENCE  # for and against
        self._shares = np.array([1, *[-0.5] * len(KINDS)]) / EVIDENCE  # of logs in a score
        self.accounts = _numbers()  # account -> number
        self.names: list[str] = []  # (A,) the accounts by number
        self.token_counts = Counts(self.evidence)  # N(t, a) and M(t, a)
        self.sums = np.zeros((0, 1 + len(KINDS)))  # (A and room, 1 + kinds) N(a), T_k(a)
        self.n_classes = 0  # accounts it can predict: those that are not wholly unlearned

    @property
    def class_counts(self) -> np.ndarray:
        """(A,) N(a)."""
        return self.sums[: len(self.names), 0]

    @property
    def n_tokens(self) -> int:
        """How many tokens it knows."""
        return int(self.token_counts.occupied.sum())

    def joint_log_likelihood(self, documents: Documents, labels: Sequence[str] = ()) -> Scores:
        """The scores of all candidates. There must be a model, that is an account."""
        found, accounts = self.look_up(documents), len(self.names)
        counts, n = self.token_counts, len(found.start)

        # What narrow rows say: their accounts are the candidates.
        sizes, account, evidence = counts.met(found.row)
        pairs = (found.document * accounts).repeat(sizes) + account
        if self.n_classes < accounts:  # an account wholly unlearned is no candidate
            alive = (self.class_counts[account] > 0).nonzero()[0]
            pairs, evidence = pairs[alive], evidence[alive]
        pairs, score = _summed(pairs, evidence, n * accounts)
        lonely = np.bincount(pairs // accounts, minlength=n) == 0
        if lonely.any():
            everyone = np.add.outer(lonely.nonzero()[0] * accounts, self.class_counts.nonzero()[0])
            pairs, score = _inserted(pairs, score, everyone.ravel())
        numbers = np.fromiter(map(self.accounts.get, labels, repeat(-1)), dtype=np.int64)
        known = ((numbers >= 0) & (self.sums[numbers, 0] > 0)).nonzero()[0]
        label = known * accounts + numbers[known]
        alien = pairs.take(pairs.searchsorted(label), mode="clip") != label
        if alien.any():
            pairs, score = _inserted(pairs, score, label[alien])
        document, account = np.divmod(pairs, accounts)
        start = _run_starts(document)

        # The prior and the normalisers.
        values = counts.rows.values.take(found.row)
        known = values.nonzero()[0]
        columns = self.sums.shape[1]
        cell = (found.document * columns + found.kind + 1).take(known)
        lengths = np.bincount(cell, minlength=n * columns).reshape(n, columns).astype(np.float64)
        lengths[:, 0] = 1
        score += self._prior(lengths, pairs)

        # What wide rows say of the candidates.
        wide = (values >= WIDE).nonzero()[0]
        if len(wide):
            of = found.document.take(wide)
            sizes = np.bincount(document).take(of)
            at = ranges(start.take(of), sizes)
            said = counts.asked(found.row.take(wide).repeat(sizes), account.take(at))
            score += np.bincount(at, said, minlength=len(score))
        score *= EVIDENCE
        return Scores(document, account, score, start, pairs.searchsorted(label), alien, found)

    def _score_one(self, document: Sequence[int]) -> Scores:
        """As joint_log_likelihood, of one document: the same in fewer steps."""
        counts, accounts = self.token_counts, len(self.names)
        value_at = counts.rows.values.item
        spans, evidence, wide = [], [], []
        lengths = [1] + [0] * len(KINDS)
        for token, row in zip(document, counts.rows.find_each(document), strict=True):
            if value := value_at(row):
                lengths[1 + (token >> KIND_SHIFT)] += 1
                if value < WIDE:
                    start, size = value >> 24, value & SIZE
                    spans.append(counts.entries[start : start + size])
                    evidence.append(counts.evidence[start : start + size])
                else:
                    wide.append(row)
        if not spans or self.n_classes < accounts:  # which is rare
            return self.joint_log_likelihood([document])
        met = np.concatenate(spans) >> 41
        account, score = _summed(met, np.concatenate(evidence), accounts)
        score += self._prior(np.array([lengths], dtype=np.float64), account)
        if wide:
            score += counts.asked(np.array(wide)[:, np.newaxis], account).sum(axis=0)
        score *= EVIDENCE
        zeros = np.zeros_like(account)
        return Scores(zeros, account, score, zeros[:1], zeros[:0], zeros[:0], None)

    def _prior(self, lengths: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """(p,) what classes and their sizes say, in units of EVIDENCE.

        `lengths` are (n, 1 + kinds): 1, and how many known tokens of each kind a document has. A
        pair is the document times A, plus the account.
        """
        accounts = len(self.names)
        self._asked += len(pairs)
        if self._logs is None and self._asked >= accounts:
            self._logs = self.log_counts(self.sums[:accounts])
        if self._logs is not None and len(lengths) * accounts <= 32 * len(pairs):
            return (lengths @ self._logs.T).take(pairs)
        document, account = np.divmod(pairs, accounts)
        if self._logs is None:
            logs = self.log_counts(self.sums.take(account, axis=0))
        else:
            logs = self._logs.take(account, axis=0)
        return np.einsum("pk,pk->p", logs, lengths.take(document, axis=0))

    def evidence(self, kind: np.ndarray, against: np.ndarray, units: np.ndarray) -> np.ndarray:
        """What sums for or against an account say, in units of EVIDENCE."""
        which = 2 * kind + against
        said = root_log(units * self._per_unit.take(which))
        said *= self._factors.take(which)
        return np.rint(said, said)

    def log_counts(self, sums: np.ndarray, smoothing: np.ndarray | None = None) -> np.ndarray:
        """(p, 1 + kinds) log N(a), and - 1/2 log (T_k(a) + alpha V_k), in units of EVIDENCE.

        The `smoothing`, of each kind or of each of p and each kind, is that of what is known now.
        """
        smoothing = self._smoothing if smoothing is None else smoothing
        with np.errstate(divide="ignore"):  # an account wholly unlearned: log 0
            return np.rint(np.log(sums + smoothing) * self._shares)

    def smoothing_of(self, occupied: np.ndarray) -> np.ndarray:
        """(..., 1 + kinds) 0 and alpha V_k, where so many tokens of each kind are known."""
        # A kind without known tokens has no use for its log, which must be finite.
        known = self.alpha * np.maximum(occupied, 1)
        return np.concatenate([np.zeros_like(known[..., :1]), known], axis=-1)

    def look_up(
        self, documents: Documents, rows_of: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> LookedUp:
        """The documents' tokens and their rows, which `rows_of` may give, also to new ones."""
        if isinstance(documents, LookedUp):
            return documents
        tokens = np.fromiter(chain.from_iterable(documents), dtype=np.int64)
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        document = np.arange(len(lengths)).repeat(lengths)
        row = (rows_of or self.token_counts.rows.find)(tokens)
        return LookedUp(lengths.cumsum() - lengths, document, tokens >> KIND_SHIFT, row)

    def terms(self, document: Sequence[int], accounts: np.ndarray) -> np.ndarray:
        """(k, 1 + T) what makes up the scores of k candidates: the prior, then each of T tokens.

        The difference between two accounts' terms is a list of log-odds that add up to the
        difference of their scores. The terms of an unknown token are 0.
        """
        found, accounts = self.look_up([document]), np.asarray(accounts)
        counts = self.token_counts
        logs = self.log_counts(self.sums[accounts]).T
        terms = np.zeros((len(document), len(accounts)))
        known = (counts.rows.values[found.row] > 0).nonzero()[0]
        terms[known] = logs[1 + found.kind[known]]
        sizes, account, evidence = counts.met(found.row)
        token = np.arange(len(document)).repeat(sizes)
        entry, place = (account[:, np.newaxis] == accounts).nonzero()
        np.add.at(terms, (token[entry], place), evidence[entry])
        wide = counts.is_wide(found.row).nonzero()[0]
        terms[wide] += counts.asked(found.row[wide, np.newaxis], accounts)
        return np.vstack([logs[:1], terms]).T * EVIDENCE

    def predict(self, documents: Sequence[Sequence[int]]) -> list[str]:
        """The most probable account of each document. There must be a model, that is an account."""
        return [
            self.names[account]
            for _, scores in self._scores(documents)
            for account in scores.account[self.best(scores)].tolist()
        ]

    def _scores(
        self, documents: Documents, labels: Sequence[str] = ()
    ) -> Iterator[tuple[slice, Scores]]:
        """Those of all documents, ROUND at a time if they are yet to be looked up."""
        if isinstance(documents, LookedUp):
            yield slice(None), self.joint_log_likelihood(documents, labels)
            return
        if len(documents) == 1 and not labels:
            yield slice(None), self._score_one(documents[0])
            return
        for start in range(0, len(documents), ROUND):
            part = slice(start, start + ROUND)
            yield part, self.joint_log_likelihood(documents[part], labels[part])

    def best(self, scores: Scores) -> np.ndarray:
        """(n,) the pair of each document's highest score; of equals, the first by name."""
        highest = np.maximum.reduceat(scores.score, scores.start)
        best = (scores.score == highest.take(scores.document)).nonzero()[0]
        if len(best) > len(scores.start):
            best = sorted(best, key=lambda p: (scores.document[p], self.names[scores.account[p]]))
            best = np.array(best)[_run_starts(scores.document[best])]
        return best

    def suggest(
        self, documents: Sequence[Sequence[int]], most: int
    ) -> tuple[list[list[tuple[float, int]]], list[Assessment]]:
        """The score and the account of each document's candidates, best first; of equals, by name.

        They are at most so many. And what `assess` makes of the first ones.
        """
        found, margins = [], []
        for _, scores in self._scores(documents):
            for start, end in pairwise([*scores.start.tolist(), len(scores.score)]):
                each = (values[start:end].tolist() for values in (scores.score, scores.account))
                pairs = zip(*each, strict=True)
                best = sorted(pairs, key=lambda pair: (-pair[0], self.names[pair[1]]))
                found.append(best[:most])
            margins += self._margins(scores, self.best(scores))
        known = self.specificity(documents).tolist()
        return found, [
            Assessment(self.names[best[0][1]], margin, None, specificity)
            for best, margin, specificity in zip(found, margins, known, strict=True)
        ]

    def assess(
        self,
        documents: Documents,
        labels: Sequence[str],
        scored: Sequence[tuple[slice, Scores]] = (),
    ) -> list[Assessment]:
        """Predictions for documents whose accounts, the labels, are known, and maybe the scores."""
        if not self.n_classes:
            return [Assessment(None, None, None, 0)] * len(labels)
        made = []
        for part, scores in scored or self._scores(documents, labels):
            seen = scores.score.copy()
            seen[scores.label[scores.alien]] = -np.inf
            best = self.best(scores._replace(score=seen))
            label = np.full(len(best), -1)  # the pairs of labels that are candidates
            known = scores.label[~scores.alien]
            label[scores.document[known]] = known
            above = seen >= np.where(label < 0, np.inf, seen[label])[scores.document]
            ranks = np.where(label == best, 1, np.add.reduceat(above, scores.start))
            made += map(
                Assessment,
                map(self.names.__getitem__, scores.account[best].tolist()),
                self._margins(scores._replace(score=seen), best),
                [rank or None for rank in ranks.tolist()],
                self.specificity(scores.found or documents[part]).tolist(),
            )
        return made

    def _margins(self, scores: Scores, best: np.ndarray) -> list[float | None]:
        """How far each document's best is ahead of its other candidates, None if it has none.

        That is - 2 log (1 - P), where P is its posterior if scores are halved: with two candidates
        far apart, their log-odds. Of the scores nothing is left.
        """
        lead, rest = scores.score[best], scores.score
        rest[best] = -np.inf
        second = np.maximum.reduceat(rest, scores.start)
        alone = second == -np.inf
        second[alone] = 0
        rest -= second.take(scores.document)
        rest /= CALMING
        np.exp(rest, rest)
        rest /= EVIDENCE
        others = np.add.reduceat(np.rint(rest, rest), scores.start)
        others = np.log(others * EVIDENCE + alone)
        margins = CALMING * np.logaddexp(0, (lead - second) / CALMING - others)
        margins[alone] = np.nan
        return [None if margin != margin else margin for margin in margins.round(4).tolist()]

    def specificity(self, documents: Documents) -> np.ndarray:
        """(n,) how much was known of each document, of SPECIFICITY."""
        found = self.look_up(documents)
        known = self.token_counts.rows.values[found.row] > 0
        return np.maximum.reduceat(known * SPECIFICITY_BY_KIND[found.kind], found.start)

    def weigh(
        self,
        documents: Documents,
        labels: Sequence[str],
        scored: Sequence[tuple[slice, Scores]] = (),
    ) -> list[Lesson]:
        """What documents, maybe with scores, are to count for their labels, and against whom.

        For the label b, max(FLOOR, SHARE (1 - P(b))), much as in the discriminative frequency
        estimate (Su, Zhang, Ling, Matwin, ICML 2008), in multiples of 1 / GRAIN. Rivals are the
        most probable other accounts, at most RIVALS, whose P is NEAR or above. P is the posterior,
        softened, over the candidates and the label. An account not seen before counts 1 and has no
        rivals.
        """
        if not self.n_classes:
            return [Lesson(label, 1.0, []) for label in labels]
        weights, rivals = np.zeros(len(labels)), [[] for _ in labels]
        for part, scores in scored or self._scores(documents, labels):
            score = scores.score / SOFTENING
            highest = np.maximum.reduceat(score, scores.start)
            posterior = np.rint(np.exp(score - highest.take(scores.document)) / EVIDENCE)
            posterior /= np.add.reduceat(posterior, scores.start).take(scores.document)
            document = scores.document + (part.start or 0)
            surprise = np.rint(GRAIN * SHARE * (1 - posterior[scores.label])) / GRAIN
            weights[document[scores.label]] = np.maximum(FLOOR, surprise)
            posterior[scores.label] = 0
            near = ((posterior >= NEAR) & (weights[document] > 0)).nonzero()[0]
            names = map(self.names.__getitem__, scores.account[near].tolist())
            by_name = zip(document[near].tolist(), (-posterior[near]).tolist(), names, strict=True)
            for i, _, name in sorted(by_name):
                rivals[i].append(name)
        return [
            Lesson(label, weight or 1.0, each[:RIVALS])
            for label, weight, each in zip(labels, weights.tolist(), rivals, strict=True)
        ]

    def learn(self, documents: Documents, lessons: Sequence[Lesson], sign: int = 1) -> None:
        """Adds what documents count to the sums; with sign = -1 takes it away again.

        Weights are multiples of 1 / GRAIN, so the sums are exact: the same in any order and any
        batching, and as if it had never been after learning and unlearning.
        """
        if not lessons:
            return
        found = self.look_up(documents, self.token_counts.rows.insert)
        against = [lesson.against for lesson in lessons]
        names = chain((lesson.account for lesson in lessons), *against)
        account = np.fromiter(map(self.accounts.__getitem__, names), dtype=np.int64)
        document = np.arange(len(lessons))
        document = np.append(document, document.repeat([*map(len, against)]))
        weight = sign * np.array([lesson.weight for lesson in lessons])
        units = np.full(len(account), sign * GRAIN)
        units[: len(lessons)] = np.rint(GRAIN * weight)
        column = 2 * account
        column[len(lessons) :] += 1
        account = account[: len(lessons)]
        self.names += islice(self.accounts, len(self.names), None)
        if len(self.names) > len(self.sums):
            self.sums = _grown(self.sums, len(self.names) * 3 // 2, self.sums.shape[1])
        np.add.at(self.sums[:, 0], account, weight)
        cell = account.take(found.document), 1 + found.kind
        np.add.at(self.sums, cell, weight.take(found.document))

        sizes = np.bincount(found.document, minlength=len(lessons)).take(document)
        token = ranges(found.start.take(document), sizes)
        self.token_counts.add(found.row.take(token), column.repeat(sizes), units.repeat(sizes))
        self._count()

    def book(
        self,
        documents: Sequence[Sequence[int]],
        labels: Sequence[str],
        changing: Callable[[], AbstractContextManager] = nullcontext,
        pause: Callable[[], object] = lambda: None,
    ) -> Iterator[tuple[slice, list[Assessment], list[Lesson]]]:
        """Predicts a batch as a whole, then learns it in rounds, and yields each once learned.

        What `changing` gives is entered for as long as the model changes. It calls `pause` between
        the parts of its work: meanwhile the model may learn others.
        """
        insert = partial(self.token_counts.rows.insert, changing=changing)
        assessments: list[Assessment] = []
        for start in range(0, len(documents), 2 * ROUND):
            pause()
            part = slice(start, start + 2 * ROUND)
            found = self.look_up(documents[part], insert)
            scored = [*self._scores(found, labels[part])] if self.n_classes else []
            assessments += self.assess(found, labels[part], scored)
        parts = rounds(len(documents))
        for part in parts:
            if len(parts) > 1:  # what was found and scored is no longer so
                pause()
                found, scored = self.look_up(documents[part], insert), ()
            lessons = self.weigh(found, labels[part], scored)
            with changing():  # for him who takes them, too: should he fail, it is half a change
                self.learn(found, lessons)
                yield part, assessments[part], lessons

    def state(self) -> Arrays:
        """All that it has counted; arrays that are its own."""
        return {
            "account_names": packed(self.names),
            "sums": self.sums[: len(self.names)],
            **self.token_counts.state(),
        }

    def restore(self, state: Arrays) -> None:
        """Takes over what a model had counted."""
        self.names = unpacked(state["account_names"])
        self.accounts = _numbers({name: number for number, name in enumerate(self.names)})
        self.sums = state["sums"]
        self.token_counts.restore(state)
        self._count()

    def _count(self) -> None:
        """Has what follows from the sums."""
        self.n_classes = int(np.count_nonzero(self.class_counts))
        self._logs: np.ndarray | None = None  # log_counts of all accounts, once it pays
        self._asked = 0  # for how many pairs they have been asked for
        self._smoothing = self.smoothing_of(self.token_counts.occupied)


def root_log(x: np.ndarray) -> np.ndarray:
    """8 ((1 + x) ** (1 / 8) - 1): a little above log (1 + x), and the same on every machine."""
    root = 1 + x
    for _ in range(3):
        np.sqrt(root, root)
    root -= 1
    root *= 8
    return root


def rounds(n: int) -> list[slice]:
    """How a batch of n is learned: in rounds of at most ROUND, each of which spans all of it.

    Neighbours, often much alike, are in different rounds, so that the second is weighed by a model
    that has learned the first.
    """
    step = -(-n // ROUND)
    return [slice(start, n, step) for start in range(step)]


def _numbers(known: Mapping[Hashable, int] = {}) -> defaultdict:
    """Numbers things in the order in which they are first asked for, on from the known ones."""
    return defaultdict(count(max([-1, *known.values()]) + 1).__next__, known)


# ---------------------------------------------------------------------------------------- Metrics


def precision_recall(
    booked: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None
) -> tuple[float, float]:
    """Macro-averaged precision and recall, over the labels in either of two (n,) arrays, n > 0.

    A label never predicted has precision 0, one never booked recall 0: scikit-learn's
    precision_score and recall_score with average="macro", zero_division=0. Each of the n counts
    its weight, or 1: their sample_weight.
    """
    labels, codes = np.unique(np.concatenate([booked, predicted]), return_inverse=True)
    booked, predicted = codes.reshape(2, -1)
    weights = np.ones(len(booked)) if weights is None else weights
    hits = np.bincount(booked, weights * (booked == predicted), minlength=len(labels))
    actual = np.bincount(booked, weights, minlength=len(labels))
    claimed = np.bincount(predicted, weights, minlength=len(labels))
    # fsum, which rounds once, gives the same whatever the order of the labels.
    precision = math.fsum(hits / np.maximum(claimed, 1)) / len(labels)
    recall = math.fsum(hits / np.maximum(actual, 1)) / len(labels)
    return precision, recall


class History:
    """A table of all bookings: whose they are, what was predicted, what they were booked to.

    A row's `seq` is larger than that of the row before it. Companies and accounts are numbers.
    """

    ROW = np.dtype(
        [
            ("seq", "i8"),
            ("company", "i4"),
            ("booked", "i4"),
            ("named", "i4"),  # the account whose name came with the booking, -1 if none did
            ("predicted", "i4"),  # -1 where there was no model
            ("confidence", "f4"),
            ("bin", "i1"),  # of the margin
            ("specificity", "i1"),  # of SPECIFICITY
            ("rank", "i1"),  # of what is booked among what was suggested; 0 if it is no such
            ("score_weight", "i1"),  # what it counts in figures, 0 if nobody has looked
            ("reviewed", "?"),  # has a person looked at it?
        ]
    )

    def __init__(self, target: str = TARGET) -> None:
        """What is booked is what the samples have under `target`."""
        self.target = target
        self.accounts = _numbers()
        self.companies = _numbers()
        self._sizes: Counter[int] = Counter()  # company -> how many bookings
        # All of them: an array that stays as it is, but for corrections, whatever comes later.
        self.rows = self._table = np.zeros(0, dtype=self.ROW)

    def state(self) -> Arrays:
        """The whole table; arrays that are its own."""
        return {"history": self.rows, "history_names": packed([self.accounts, self.companies])}

    def restore(self, state: Arrays) -> None:
        """Takes over the table of another."""
        self.accounts, self.companies = map(_numbers, unpacked(state["history_names"]))
        self.rows = self._table = state["history"]
        self._sizes = Counter(self.rows["company"].tolist())

    def draft(self, records: Sequence[dict]) -> np.ndarray:
        """(n,) rows for records of bookings, which count for their companies from now on.

        What they lack is their confidence, and the seq that only the log gives them.
        """
        rows = np.zeros(len(records), dtype=self.ROW)
        company, account = self.companies.__getitem__, self.accounts.__getitem__
        named = self.target == TARGET  # else a name is not that of what is predicted
        known = ["company", "booked", "named", "predicted", "specificity", "rank", "score_weight"]
        rows[known] = [
            (
                company(sample["CompanyId"]),
                account(sample[self.target]),
                account(sample[TARGET]) if named and sample.get(NAME) else -1,
                -1 if r["predicted"] is None else account(r["predicted"]),
                r["known"],
                in_ranks(r["rank"]),
                SCORE_WEIGHTS[sample.get(BOOKED_BY, "person")],
            )
            for r in records
            for sample in [r["sample"]]
        ]
        rows["reviewed"] = rows["score_weight"] > 0
        rows["bin"] = Calibration.bins([r["margin"] or 0 for r in records])
        self._sizes.update(rows["company"].tolist())
        return rows

    def undraft(self, rows: np.ndarray) -> None:
        """Forgets what was drafted, or booked, and the names of companies that have no bookings."""
        self._sizes.subtract(rows["company"].tolist())
        for company, number in [*self.companies.items()]:
            if not self._sizes[number]:
                del self.companies[company], self._sizes[number]

    def append(self, rows: np.ndarray, seqs: Sequence[int]) -> None:
        """Adds what was drafted, once it is in the log under these seqs."""
        rows["seq"] = seqs
        end = len(self.rows) + len(rows)
        if end > len(self._table):
            self._table = _grown(self._table, 2 * end)
        self._table[len(self.rows) : end] = rows
        self.rows = self._table[:end]

    def asked(self, companies: Sequence[str], made: Sequence[Assessment]) -> np.ndarray:
        """(n,) rows for suggestions that nobody has booked: all that a Calibration looks at.

        A name that was never booked is -1.
        """
        rows = np.zeros(len(companies), dtype=self.ROW)
        rows["company"] = [self.companies.get(company, -1) for company in companies]
        rows["predicted"] = [self.accounts.get(each.predicted, -1) for each in made]
        rows["specificity"] = [each.specificity for each in made]
        rows["bin"] = Calibration.bins([each.margin or 0 for each in made])
        return rows

    def size(self, company: str | None) -> int:
        """How many bookings the company has, or all of them."""
        return len(self.rows) if company is None else self._sizes[self.companies.get(company)]

    def last(self, n: int, company: str | None = None) -> np.ndarray:
        """The last n rows that are scored, or fewer if there are fewer; of one company."""
        rows = self.of(company)
        size = n
        while True:
            found = scored(rows[-size:])
            if len(found) >= n or size >= len(rows):
                return found[-n:]
            size *= 2

    def of(self, company: str | None) -> np.ndarray:
        """All rows of a company, or of all."""
        rows = self.rows  # once: another thread may append
        return rows if company is None else rows[rows["company"] == self.companies.get(company, -1)]

    def has(self, company: str, seq: int) -> bool:
        """Whether that is a booking of the company."""
        return self.companies.get(company, -1) in self.at(np.array([seq]))["company"]

    def find(self, seqs: np.ndarray) -> np.ndarray:
        """(m,) which rows have these seqs."""
        return self.rows["seq"].searchsorted(seqs)

    def at(self, seqs: np.ndarray) -> np.ndarray:
        """(k,) copies of the rows of m seqs, without those that there are not."""
        found, after = self.find(np.array([seqs, seqs + 1]))
        return self.rows[found[found < after]]

    def correct(self, seq: int, account: str, rank: int) -> None:
        """Has a person book an account, which had that rank, in the row of that seq."""
        row = self.rows[self.find(seq)]  # a view
        row["booked"], row["rank"], row["reviewed"] = self.accounts[account], rank, True

    def forget(self, seqs: np.ndarray) -> np.ndarray:
        """Drops the rows of these (m,) seqs, or of those that have one, and gives them."""
        gone = np.isin(self.rows["seq"], seqs)
        rows = self.rows[gone]
        self.rows = self._table = self.rows[~gone]
        self.undraft(rows)
        return rows


def in_ranks(rank: int | None) -> int:
    """A rank as a History has it: 0 if it is none, or not among what can be suggested."""
    return rank if rank and rank <= Calibration.RANKS else 0


def right(rows: np.ndarray) -> np.ndarray:
    """(n,) which of these rows of a History were predicted right."""
    return rows["booked"] == rows["predicted"]


def scored(rows: np.ndarray) -> np.ndarray:
    """Those of these rows of a History that were predicted, and booked by who knew better."""
    return rows[(rows["predicted"] >= 0) & (rows["score_weight"] > 0)]


class Calibration:
    """What a suggestion is worth: the share of earlier ones like it that were right.

    "Like it" gets narrower as there is evidence, and each step starts from the one before:
    as much evidence (g); of all companies, with as much known, too (p0); this company's own of
    these (p1); its own for this account, whatever was known (p2).

        g  = right / (all + 2), made monotone
        p0 = (right + 3 g) / (all + 3), made monotone
        p1 = (right + 100 p0) / (all + 100)
        p2 = (right + 100 p1) / (all + 100)

    "As much evidence" is the same bin of the margin; in the last two, one at most two away. Shares
    are made monotone over the bins by pooling adjacent violators (Ayer et al., 1955).

    In g and p0, a company's k checks stand for its m bookings that nobody looked at, too: each
    counts (k + m) / k times. And so that no company outvotes the others, n of its suggestions with
    as much known and as much evidence count as the square root of n. All that is kept are whole
    numbers: any order gives the same, and what is taken away leaves no trace.
    """

    BINS = 28  # four for each doubling of 1 + margin
    AROUND = np.arange(-2, 3)  # how far bins are away that count among a company's own
    RANKS = 20  # suggestions that get a confidence
    DOUBT = 2  # suggestions that are added to those of all companies
    TRUST: float | np.ndarray = 0.0  # the share of them that is right, maybe by the bin: none
    BACK = 3  # suggestions that g counts in p0
    OWN = 100  # suggestions that p0 counts in p1, and p1 in p2

    # What is counted has a cell: of a company, a level, which is a specificity or one of these, and
    # a bin. There are more columns than bins: what is near the first or the last one is empty.
    COLUMNS = 32
    RANKED = len(SPECIFICITY)  # of what was predicted wrong, by rank in place of bin
    CHECKED = RANKED + 1  # from here on the levels before, but of checks alone
    DRAWN = 2 * CHECKED  # of what was checked or booked unseen; the right ones are the checks
    ACCOUNT = DRAWN + 2  # from here on, of accounts predicted; -1 is none
    COMPANY = 1 << 36  # cells of one company

    def __init__(self) -> None:
        self._own = Table(2)  # of each cell: all, right
        # (levels before CHECKED, COLUMNS, 2) what these cells of all companies count together
        self._everybodys = np.zeros((self.CHECKED, self.COLUMNS, 2), dtype=np.int64)
        self._shares: dict[int, np.ndarray] = {}  # specificity -> (COLUMNS,) p0, until it changes

    def add(self, rows: np.ndarray, sign: int = 1) -> None:
        """Counts those rows of a History that were predicted; with sign = -1 takes them away."""
        rows = rows[rows["predicted"] >= 0]
        names = "company", "specificity", "bin", "rank", "predicted"
        company, known, bin, rank, predicted = (rows[name].astype(np.int64) for name in names)
        hit, seen, check = right(rows), rows["score_weight"] > 0, rows["score_weight"] > 1
        drawn = check | ~seen
        cells, hits = [], []
        for those, level, column, good in (  # which rows count, where, and which as right ones
            (seen, known, bin, hit),
            (seen & ~hit, self.RANKED, rank, hit),
            (seen, self.ACCOUNT + predicted, bin, hit),
            (check, self.CHECKED + known, bin, hit),
            (drawn, self.DRAWN, 0, check),
        ):
            cells.append(self._cells(company, level, column)[those])
            hits.append(good[those])
        # What a company's checks stand for changes in all of its cells.
        of = np.unique(company[drawn])[:, np.newaxis]
        of_drawn = self._cells(of, 0, np.arange(self.CHECKED * self.COLUMNS)).ravel()
        changed = np.unique(np.concatenate([*cells[:2], of_drawn]))
        cells, hits = np.concatenate(cells), np.concatenate(hits)
        at = self._own.insert(_spread(cells))  # first, for the table may grow
        checked = changed + self.CHECKED * self.COLUMNS
        drawn = changed & -self.COMPANY | self.DRAWN * self.COLUMNS
        slots = self._own.find(_spread(np.concatenate([changed, checked, drawn])))
        before = self._counts(slots)
        np.add.at(self._own.values, at, sign * np.column_stack([np.ones_like(cells), hits]))
        everybodys = self._everybodys.reshape(-1, 2)  # a view
        np.add.at(everybodys, changed % self.COMPANY, self._counts(slots) - before)
        self._shares = {}

    def _cells(self, company: np.ndarray, level: np.ndarray, bin: np.ndarray) -> np.ndarray:
        """Numbers of cells, of arrays of 64-bit integers or numbers; the company -1 is none."""
        return (company + 1) * self.COMPANY + level * self.COLUMNS + bin

    def _counts(self, slots: np.ndarray) -> np.ndarray:
        """(n, 2) what cells count among everybody's, in units of 1 / GRAIN: all, right.

        Of each there are three slots: its own, its checks', and what was drawn of its company.
        """
        own, checked, drawn = self._own.values[slots].reshape(3, -1, 2)
        own += checked * drawn[:, :1] // np.maximum(drawn[:, 1:], 1) - checked
        root = np.rint(GRAIN * np.sqrt(own[:, :1])).astype(np.int64)
        return root * own // np.maximum(own[:, :1], 1)

    def _own_of(self, rows: np.ndarray) -> np.ndarray:
        """(n, 2, 2) the company's own, by specificity and by account: all, right."""
        names = "company", "bin", "specificity", "predicted"
        columns = (rows[name].astype(np.int64)[:, np.newaxis] for name in names)
        company, bin, known, predicted = columns
        cells = self._cells(company, np.hstack([known, self.ACCOUNT + predicted]), bin)
        near = np.add.outer(cells, self.AROUND)
        found = self._own.values[self._own.find(_spread(near.ravel()))]
        return found.reshape(*near.shape, 2).sum(axis=2)

    def state(self) -> Arrays:
        """All that it has counted; arrays that are its own."""
        own = {"own_cells": self._own.keys, "own": self._own.values}
        return {"everybodys": self._everybodys, **own}

    def restore(self, state: Arrays) -> None:
        """Takes over what another had counted."""
        self._everybodys, self._shares = state["everybodys"], {}
        self._own = Table.of(state["own_cells"], state["own"])

    def confidence(self, rows: np.ndarray) -> np.ndarray:
        """(n,) the probability that each suggestion is right, from the rows that it would get.

        What matters are their bin, specificity, company and account predicted, where -1 stands for
        one that no row has.
        """
        families = zip(rows["specificity"].tolist(), rows["bin"].tolist(), strict=True)
        share = np.array([self._share(known)[bin] for known, bin in families])
        for suggestions, hits in self._own_of(rows).transpose(1, 2, 0):
            share = (hits + self.OWN * share) / (suggestions + self.OWN)
        return share

    def measured(self) -> bool:
        """Has any suggestion been counted? Without one a confidence says nothing."""
        return bool(self._everybodys.any())

    def shared(self, confidence: np.ndarray) -> np.ndarray:
        """(n, RANKS) the confidence of n first suggestions and of the others, best first.

        These share what it leaves as the ranks of wrongly predicted accounts have been.
        """
        ranks = self._everybodys[self.RANKED, : self.RANKS + 1, 0] / GRAIN  # 0: beyond
        others = np.multiply.outer(1 - confidence, ranks[2:]) / (ranks.sum() + self.DOUBT)
        return np.minimum.accumulate(np.column_stack([confidence, others]), axis=1)

    def evidence_counts(self, rows: np.ndarray) -> list[dict[str, dict[str, int]]]:
        """What the confidences of n suggestions rest on, with about as much evidence."""
        near = rows["specificity"][:, np.newaxis], np.add.outer(rows["bin"], self.AROUND)
        everybodys = self._everybodys[near].sum(axis=1) // GRAIN
        own = self._own_of(rows)[:, 1]
        tallies = ("own", own.tolist()), ("all", everybodys.tolist())
        names = "suggestions", "right"
        return [
            {whose: dict(zip(names, counts[i], strict=True)) for whose, counts in tallies}
            for i in range(len(rows))
        ]

    @classmethod
    def bins(cls, margins: Sequence[float]) -> np.ndarray:
        """(n,) the bins of margins."""
        doublings = np.log2(1 + np.asarray(margins, dtype=np.float64))
        return np.minimum(4 * doublings, cls.BINS - 1).astype(np.int64)

    def _share(self, specificity: int) -> np.ndarray:
        """(COLUMNS,) p0 of suggestions with as much known."""
        if specificity not in self._shares:
            cells = self._everybodys[: self.RANKED] / GRAIN
            counted, right = cells.sum(axis=0).T
            there = counted > 0
            doubt, back = self.DOUBT * there, self.BACK * there
            g = _monotone(right + doubt * self.TRUST, counted + doubt)
            counted, right = cells[specificity].T
            self._shares[specificity] = _monotone(right + back * g, counted + back)
        return self._shares[specificity]


def _spread(cells: np.ndarray) -> np.ndarray:
    """Keys of cells, as good as random."""
    keys = cells.astype(np.uint64)
    keys *= np.uint64(0x9E3779B97F4A7C15)
    return (keys ^ keys >> 40).astype(np.int64) & (1 << 63) - 1


def _monotone(right: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """(n,) the shares of bins that were right, monotone; an empty one has that before it.

    It is the least of those from a bin on, from the bin before which that is the largest: what
    pooling adjacent violators gives.
    """
    sums = np.zeros((2, len(right) + 1))
    np.cumsum([right, counted], axis=1, out=sums[:, 1:])
    hits, sizes = sums[:, np.newaxis, 1:] - sums[:, :-1, np.newaxis]  # from a bin to another
    shares = hits / np.maximum(sizes, 1)  # of none, 0
    least = np.minimum.accumulate(shares[:, ::-1], axis=1)[:, ::-1]
    return np.maximum.accumulate(least, axis=0).diagonal()


def checks(rows: np.ndarray) -> int:
    """How many of these rows of a History are checks of what could have been booked unseen."""
    return int(np.count_nonzero(rows["score_weight"] > 1))


def unseen(rows: np.ndarray) -> int:
    """How many of these rows of a History nobody has looked at."""
    return len(rows) - int(np.count_nonzero(rows["reviewed"]))


# -------------------------------------------------------------------------------------------- Log

# A log is a file of JSON Lines that grows at its end. Here are a booking, a correction of it, and
# what is left of the correction once its company is forgotten (wrapped here, and the last one
# without most of its blanks):
#
#   {"seq": 2, "batch": "june-1", "left": 0, "sample": {"CompanyId": "acme", "BankEntryText":
#     "Office rent June", "BankEntryAmount": "> -10000", "AccountNumber": "6300"}, "predicted":
#     "6300", "margin": 16.2383, "confidence": null, "rank": 1, "known": 5, "weight": 0.015625,
#     "against": [], "crc": 533278187}
#   {"seq": 3, "batch": 3, "left": 0, "corrects": 2, "AccountNumber": "7140", "weight":
#     0.7470703125, "against": ["6300"], "crc": 27062549}
#   {"seq": 3, "batch": 3, "left": 0, "crc": 4241497597}            ...
#
# First comes a line's place, then the record, then the CRC-32 of all before it. `seq` counts lines
# from 0. `batch` is the sender's key for the batch, or else the seq of its first line. `left`
# counts the batch down to 0: it is in the log once its line with `left` 0 is.
#
# A line never changes its length or its place. To forget, it is overwritten with its place, the
# CRC-32 of that, and blanks. Which lines are to be overwritten stands in a file beside the log
# first, LOG.forgetting, until all of them are: a start that finds it does the rest. A line that a
# power failure left half overwritten still has its place, which is the same before and after.

PLACE = ("seq", "batch", "left")  # what the log puts before a record
UNSURE = "it may hold this all the same, so that only a key makes it safe to send it again"
MAX_KEYS = 100_000  # keys of batches that are remembered, the last ones: about 30 MB


class LogError(Exception):
    """The log cannot be used; the message says which, where and why."""


class Log:
    """A JSON Lines file of batches of records, owned by one process, that grows at its end."""

    def __init__(self, path: Path) -> None:
        """Opens the log or makes it, with its folder, and ends a forgetting that a crash cut short.

        Raises LogError if it cannot be owned.
        """
        self.path = path
        self.size = 0  # bytes of whole batches
        self.failure: str | None = None  # why the last append failed, if it did
        self.forgetting = False  # is there a note of what is to be forgotten?
        self.fsynced: Callable[[float], object] = lambda seconds: None  # told how long each took
        self._starts = array("q")  # the byte at which each line of a whole batch starts
        self._torn = False  # may the file hold bytes beyond them?
        self._keys: OrderedDict[str, range] = OrderedDict()  # of batches -> their lines
        self._lock = threading.RLock()  # held while lines get their places, or are read
        try:
            folders = self.beside("{}").parents
            new = sum(not folder.exists() for folder in folders)
            with suppress(FileExistsError):  # if it is a file, opening says so better
                folders[0].mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise LogError(f"{path} is no regular file")
            for folder in folders[: 1 + new]:  # so that new names are on disk, too
                fsync_folder(folder)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._end_forgetting()
        except BlockingIOError:
            os.close(self._file)
            raise LogError(f"{path} is in use by another process") from None
        except OSError as error:
            raise LogError(f"cannot open {path}: {error.strerror}") from None

    def beside(self, name: str) -> Path:
        """A path beside the log itself, wherever a symbolic link to it is; {} is the log's name."""
        real = Path(os.path.realpath(self.path))
        return real.with_name(name.format(real.name))

    def in_place(self) -> bool:
        """Does its path still lead to the file that is owned, with all that is in it?"""
        with suppress(OSError):
            size, owned = self.size, os.fstat(self._file)  # in that order: it may be growing
            return os.path.samestat(owned, os.stat(self.path)) and owned.st_size >= size
        return False

    def _require_place(self) -> None:
        if not self.in_place():
            raise OSError(errno.ESTALE, "it was moved, replaced, deleted or cut by another")

    def state(self) -> Arrays:
        """Where its lines are."""
        keys = [[key, lines.start, lines.stop] for key, lines in self._keys.items()]
        return {"line_starts": np.array(self._starts), "keys": packed([self.size, keys])}

    def restore(self, state: Arrays) -> None:
        """Takes over where lines are, so that only later ones are read; nothing, if it raises."""
        size, keys = unpacked(state["keys"])
        keys = OrderedDict((key, range(start, stop)) for key, start, stop in keys)
        self._starts, self.size = array("q", state["line_starts"].tobytes()), size
        self._keys = keys

    def progress(self) -> str:
        """How much of the file has been read."""
        return f"{self.size >> 20} of {os.fstat(self._file).st_size >> 20} MB"

    def checksum(self, size: int) -> int | None:
        """The CRC-32 of its first bytes, so many; None if there are fewer."""
        crc = at = 0
        while at < size and (piece := os.pread(self._file, min(size - at, 1 << 20), at)):
            crc, at = zlib.crc32(piece, crc), at + len(piece)
        return crc if at == size else None

    def __len__(self) -> int:
        """The lines of all whole batches, so that the next one's seq is this."""
        return len(self._starts)

    def read(self) -> Iterator[dict]:
        """The records of all further whole batches; what follows the last is cut off.

        To be read to its end, once, before the first append. Raises LogError where the log is
        damaged, and leaves the file as it is.
        """
        for found in scan(self.path, self.size, len(self)):
            if isinstance(found, Batch):
                yield from found.records
                self._keep(found)
            elif found.unfinished:  # which cannot be told from damage
                tail = os.pread(self._file, os.fstat(self._file).st_size - self.size, self.size)
                keep_aside(path := self.beside("{}.cut"), tail)
                self._cut_back()
                logger.warning("%s, line %d: %s; they are kept in %s", self.path, *found[:2], path)
            else:
                raise found.error(self.path)

    def append(self, batches: Iterable[tuple[str | None, Sequence[dict]]]) -> list[dict]:
        """Writes batches, with or without a key, with one fsync: then they are on disk.

        The answer is all records with their places. Raises OSError if they could not be written;
        then the log is as it was before, unless the error says that it may not be.
        """
        placed = self.place(batches)
        self.write(placed)
        return [record for batch in placed for record in batch.records]

    def place(self, batches: Iterable[tuple[str | None, Sequence[dict]]]) -> list["Batch"]:
        """The batches as they would stand behind all others."""
        placed, seq = [], len(self._starts)
        for key, records in batches:
            batch = Batch([], [], seq + 1)
            name, left = seq if key is None else key, len(records)
            for record in records:
                left -= 1
                batch.records.append({"seq": seq, "batch": name, "left": left, **record})
                batch.lines.append(_sealed(_encode(batch.records[-1])[:-1].encode()))
                seq += 1
            placed.append(batch)
        return placed

    def write(self, batches: Sequence["Batch"], durable: bool = True) -> None:
        """Writes what was placed. Raises OSError, as append does.

        What need not be `durable` is not on disk before the next fsync. No lines change nothing.
        """
        content = b"".join([line for batch in batches for line in batch.lines])
        if not content:
            return
        self._require_place()
        if self._torn:
            self._cut_back()
        try:
            self._torn = True
            write_at(self._file, self.size, content)
            if durable:
                started = time.perf_counter()
                os.fsync(self._file)
                self.fsynced(time.perf_counter() - started)
            self._torn = False
        except OSError as error:
            self.failure = error.strerror
            with suppress(OSError):  # else it is cut back before the next append, or at the end
                self._cut_back()
            if not self._torn:
                raise
            raise OSError(error.errno, f"{error.strerror}; {UNSURE}") from None
        self.failure = None
        for batch in batches:
            self._keep(batch)

    def find(self, key: str) -> list[dict] | None:
        """The records of the batch of that key, if it is one of the last MAX_KEYS.

        Raises what `record` raises.
        """
        self._require_place()
        lines = self._keys.get(key)
        return None if lines is None else [self.record(seq) for seq in lines]

    def record(self, seq: int) -> dict:
        """The record of that seq, with its place. Raises ValueError or OSError if it is damaged."""
        return _parse(self.lines(seq, seq + 1))

    def lines(self, first: int, end: int) -> bytes:
        """Those lines, as they are now. Raises OSError."""
        with self._lock:  # or one might be read half overwritten
            start, stop = self.start(first), self.start(end)
            return os.pread(self._file, stop - start, start)

    def start(self, seq: int) -> int:
        """The byte at which that line starts, or at which the last one ends."""
        return self._starts[seq] if seq < len(self) else self.size

    def start_forgetting(self, seqs: np.ndarray) -> None:
        """Notes on disk that these lines are to be emptied: if nothing else does, a start will.

        Raises OSError; then nothing has changed, unless it is `forgetting` all the same.
        """
        self._require_place()
        starts = np.append(np.array(self._starts), self.size)
        lines = np.column_stack([seqs, starts[seqs], np.diff(starts)[seqs]]).tolist()
        path = self.beside("{}.forgetting")
        try:
            with new_file(path, durable=True) as file:
                file.write(_sealed(_encode({"lines": lines})[:-1].encode()))
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self.forgetting = True
        fsync_folder(path.parent)

    def empty(self, seq: int) -> None:
        """Overwrites a line with its place and blanks. Raises OSError, or ValueError."""
        with self._lock:
            write_at(self._file, self.start(seq), emptied(self.lines(seq, seq + 1), seq))

    def sync(self) -> None:
        """Has all that was written on disk. Raises OSError."""
        os.fsync(self._file)

    def finish_forgetting(self) -> None:
        """Removes the note, once the lines are emptied on disk. Raises OSError; a start does it."""
        path = self.beside("{}.forgetting")
        path.unlink(missing_ok=True)
        fsync_folder(path.parent)
        self.forgetting = False

    def _end_forgetting(self) -> None:
        """Empties what a note says. Raises OSError, or LogError if the note is of another log."""
        path = self.beside("{}.forgetting")
        try:
            noted = json.loads(_unsealed(path.read_bytes()) + b"}")["lines"]
            for seq, start, size in noted:  # nothing is overwritten before all is seen
                emptied(os.pread(self._file, size, start), seq)
            for seq, start, size in noted:
                write_at(self._file, start, emptied(os.pread(self._file, size, start), seq))
            self.sync()
        except FileNotFoundError:
            return
        except (KeyError, ValueError) as error:
            os.close(self._file)
            raise LogError(f"{path} is not of {self.path} ({error}); move it away") from None
        self.finish_forgetting()
        logger.warning("%s: forgot what was to be forgotten, %d lines", self.path, len(noted))

    def close(self) -> None:
        """Lets another process own the log, without what a failed append left, if that can be."""
        if self._torn:
            with suppress(OSError):
                self._cut_back()
        os.close(self._file)

    def _keep(self, batch: "Batch") -> None:
        """Counts a whole batch that stands behind all others."""
        first = len(self._starts)
        with self._lock:
            for line in batch.lines:
                self._starts.append(self.size)
                self.size += len(line)
        key = batch.records[0]["batch"] if batch.records else None
        if isinstance(key, str):  # its sender's; from now on, another thread may find it
            self._keys[key] = range(first, len(self._starts))
            if len(self._keys) > MAX_KEYS:
                self._keys.popitem(last=False)

    def _cut_back(self) -> None:
        os.ftruncate(self._file, self.size)
        os.fsync(self._file)
        self._torn = False


class Export(io.RawIOBase):
    """Lines of a log as a file, each as it is when it is read: as it was written, or emptied."""

    def __init__(self, log: Log, seqs: range) -> None:
        self._log, self._first, self._stop = log, seqs.start, min(seqs.stop, len(log))
        self.size = max(0, log.start(self._stop) - log.start(seqs.start))  # bytes
        self._at = 0  # where it stands
        self._piece, self._start = b"", 0  # the lines from _first on, and where they start

    def seekable(self) -> bool:
        """It is, if not to before what was read last."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Where it stands now."""
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """At most so many bytes, and at least one before the end."""
        # A line that is begun goes on as it was. Those behind it are read as they are by now, also
        # where they were read before: waitress skips only what it could send.
        at = self._at - self._start
        line = self._piece.rfind(b"\n", 0, at) + 1
        begun = self._piece[line : self._piece.find(b"\n", line) + 1] if line < at else b""
        self._first += self._piece.count(b"\n", 0, line)
        self._start, at, behind = self._start + line, at - line, self._first + bool(begun)
        self._piece = begun + self._log.lines(behind, min(behind + 64, self._stop))
        found = self._piece[at : None if size < 0 else at + size]
        self._at += len(found)
        return found


class Batch(NamedTuple):
    """A whole batch in a log."""

    records: list[dict]  # with their places
    lines: list[bytes]
    line: int  # the number of the first, from 1


class Damage(NamedTuple):
    """What is wrong with a line in a log."""

    line: int  # from 1
    reason: str
    unfinished: bool = False  # may it be but what a crash left of an append?
    otherwise: bool = False  # is it whole, but learned by another version, or from other keys?

    def error(self, path: Path) -> LogError:
        """What to raise when that line of a log makes no sense."""
        anew = f"python bookkeep.py relearn {path} NEW"
        where = f"line {self.line}: {self.reason}"
        if self.otherwise:
            return LogError(
                f"{path}, {where}; to learn it anew, give the options of this start to: {anew}"
            )
        return LogError(
            f"{path} is damaged, {where}; restore a backup, or keep what is whole: {anew}"
        )


def scan(path: Path, start: int = 0, before: int = 0) -> Iterator[Batch | Damage]:
    """What is in the log, in order; after a damage, the batches that are surely whole.

    It starts at a byte behind which the whole batches before it have so many lines. All that
    follows the last whole batch is one damage, if a crash may have left it.
    """
    with open(path, "rb") as lines:
        if start:  # else it may be a pipe
            lines.seek(start)
        yield from batches_of(lines, before)


def batches_of(lines: Iterable[bytes], before: int) -> Iterator[Batch | Damage]:
    """What lines hold of which a log has so many before them; as `scan`."""
    seq, left, name = before - 1, 0, None  # of the last line that could be read
    unreadable = 0  # lines behind it
    batch: Batch | None = None  # the unfinished one; None if lines of it are missing
    last, end = before, before  # the last whole batch's last line, and the seq behind it
    size, damages = 0, []  # bytes of what follows it; what is wrong with that
    torn = True  # may a crash have left it? A power failure leaves holes, but moves nothing
    for number, line in enumerate(lines, start=before + 1):
        size += len(line)
        if number == 1:  # what all logs start with, or a hole
            torn = all(got in (due, 0) for got, due in zip(line, b'{"seq": 0, ', strict=False))
        try:
            record = _parse(line)
        except ValueError as error:
            if not unreadable:
                reason = str(error) if torn or number > 1 else "no log starts like this"
                damages.append(Damage(number, reason))
            unreadable += 1
            continue
        missing = record["seq"] - seq - 1
        goes_on = (missing, record["batch"], record["left"]) == (0, name, left - 1)
        if missing > unreadable:
            reason = f"{missing - unreadable} bookings are missing before it"
            damages.append(Damage(number, reason))
        elif missing < 0 or not (missing or goes_on or left == 0):
            damages.append(Damage(number, f"booking {record['seq']} does not belong here"))
            torn = False
        if record["seq"] < end:
            continue
        # A batch starts where the one before ends, and one without a key says where it starts.
        if left == missing or record["seq"] in (end, record["batch"]):
            batch = Batch([], [], number)
        elif not goes_on:
            batch = None
        seq, left, name, unreadable = record["seq"], record["left"], record["batch"], 0
        if batch:
            batch.records.append(record)
            batch.lines.append(line)
            if left == 0:
                yield from damages
                yield batch
                last, end, size, damages, torn = number, seq + 1, 0, [], True
    if size and torn:
        reason = f"the batch is unfinished; a start cuts off {size} bytes"
        damages = [Damage(last + 1, reason, unfinished=True)]
    yield from damages


_encode = json.JSONEncoder(ensure_ascii=False).encode


def _sealed(text: bytes, size: int = 0) -> bytes:
    """The line whose record is this text, but for its end; filled up with blanks to that size."""
    return (b'%s, "crc": %d}' % (text, zlib.crc32(text))).ljust(size - 1) + b"\n"


def _unsealed(line: bytes) -> bytes:
    """The text that was sealed. Raises ValueError unless the line is as it was written."""
    text, _, end = line.rpartition(b', "crc": ')
    if end[-1:] != b"\n" or end[:-1].rstrip(b" ") != b"%d}" % zlib.crc32(text):
        raise ValueError("the checksum does not fit")
    return text


def _parse(line: bytes) -> dict:
    """The record on the line. Raises ValueError unless the line is as it was written."""
    record = json.loads(_unsealed(line).decode() + "}")
    seq, batch, left = map(record.get, PLACE)
    if not (isinstance(seq, int) and isinstance(batch, int | str) and isinstance(left, int)):
        raise ValueError("it has no place in the log")
    return record


def emptied(line: bytes, seq: int | None = None) -> bytes:
    """A line of the same length, with the place, but without the record.

    Raises ValueError if it has no place, or another than that.
    """
    place = re.match(rb'\{"seq": (\d+), "batch": (\d+|"([^"\\]|\\.)*"), "left": \d+', line)
    if not place or line.find(b"\n") != len(line) - 1:
        raise ValueError("a line has no place")
    if seq not in (None, int(place[1])):
        raise ValueError("it is another line")
    return _sealed(place[0], len(line))


def keep_aside(path: Path, content: bytes) -> None:
    """Has it on disk behind what is in that file. Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with open(file, "wb") as kept:
        kept.write(content)
        kept.flush()
        os.fsync(file)
    fsync_folder(path.parent)


def write_at(file: int, start: int, content: bytes) -> None:
    """Writes all of it from that byte on. Raises OSError."""
    unwritten = memoryview(content)
    while unwritten:  # a disk that is nearly full takes a part of it
        written = os.pwrite(file, unwritten, start)
        unwritten, start = unwritten[written:], start + written


@contextmanager
def new_file(path: Path, durable: bool) -> Iterator[BinaryIO]:
    """A file that takes that path once it is written, and on disk. Raises OSError if it is not."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.unlink(missing_ok=True)  # it may be a link
    try:
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def fsync_folder(path: Path) -> None:
    """Has the names in a folder on disk. Raises OSError."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of that size, of which the last may be shorter."""
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


# --------------------------------------------------------------------------------------- Snapshot

FORMAT = 8  # of snapshots


class Snapshot:
    """A file beside a log, with what was made of its first lines, to spare reading them again.

    It counts for nothing unless it is whole and of this format, tokens are made as they were, and
    the log still starts with the very bytes that it was made from.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.path = log.beside("{}.snapshot.npz")
        self.lines = 0  # of the log that it covers
        self.made = 0.0  # when, in seconds since 1970

    def save(self, state: Arrays) -> None:
        """Puts the state in the place of an earlier one, in one step, or logs why it cannot."""
        try:
            size, _ = unpacked(state["keys"])
            origin = np.array([size, self.log.checksum(size), *self._version()])
            # If it is not on disk at a power failure, the log is.
            with new_file(self.path, durable=False) as file:
                np.savez(file, origin=origin, **state)
            self.lines, self.made = len(state["line_starts"]), time.time()
        except Exception as error:  # whatever it is, there is the log
            logger.warning("%s could not be written: %s", self.path, error)

    def load(self, restore: Callable[[Arrays], object]) -> None:
        """Has the state restored, if there is one. One of no use is removed, with a warning."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                state = dict(file)
            size, checksum, *version = state["origin"].tolist()
            if version != self._version():
                raise ValueError("another version made it")
            if checksum != self.log.checksum(size):
                raise ValueError("it is not of this log as it is")
            restore(state)
            self.lines, self.made = len(self.log), self.path.stat().st_mtime
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever is wrong with it, the log has it all
            reason = f"{self.path} is damaged or of no use ({error})"
            logger.warning("%s; it is removed, and all of the log is read", reason)
            with suppress(OSError):
                self.discard()

    def discard(self) -> None:
        """Removes the file, also one that a crash left unfinished. Raises OSError."""
        for path in (self.path, self.path.with_name(f".{self.path.name}")):
            path.unlink(missing_ok=True)
        self.lines = 0

    def _version(self) -> list[int]:
        sample = {"CompanyId": "a", "BankEntryText": "\u00c4 \u6771\u4eac\u90fd Amazon.com*1f37"}
        sample["BankEntryAmount"] = "-1000.50"
        return [FORMAT, *tokens(sample, FEATURES)]


# ----------------------------------------------------------------------------------------- Writer

LONG = 128  # samples beyond which a list is a long one
GROUP = 1000  # samples that a group of requests may have
BACKLOG = 50_000  # samples that may wait, unless they are one request
RESTART = "nothing can be booked until the service is started again"


class NotReady(Exception):
    """Nothing to answer with yet, or no longer; the message says why."""


class Busy(NotReady):
    """No more can wait; the same can be sent again in a second."""


class NotStored(Exception):
    """The log failed. Unless the message says otherwise, nothing has changed; send it again."""


class Work(NamedTuple):
    """Samples on their way into the log, or another change; what who asked for it waits for."""

    done: Future
    samples: Sequence[Sample] = ()
    key: str | None = None
    change: Callable[[], object] | None = None

    @property
    def without_id(self) -> list[Sample]:
        """Those of its samples that have no id: only its key says whether they were booked."""
        return [sample for sample in self.samples if ID not in sample]

    @property
    def by_id(self) -> dict[tuple[str, str], Sample]:
        """The others by company and id. The last one of an id counts."""
        return {
            (sample["CompanyId"], sample[ID]): sample for sample in self.samples if ID in sample
        }

    @property
    def names(self) -> set[Hashable]:
        """What no other request of its group may have: its key, and its bookings' ids."""
        return {*self.by_id, *([] if self.key is None else [self.key])}


class Writer(threading.Thread):
    """The thread that makes one change after the other, and is the only one to make any.

    Requests to book that wait together are handed on as a group, to share what storing costs. A
    long list is handed on alone, and what is short needs not wait for the end of it.
    """

    def __init__(self, book: Callable[[list[Work]], None], after: Callable[[], None]) -> None:
        """`book` answers a group of requests, and calls `pause` while it works on a long list;
        `after` is called after each group and change, but those that are done in a pause.
        """
        super().__init__(name="writer", daemon=True)
        self._book, self._after = book, after
        self._queue: deque[Work] = deque()
        self._long: deque[Work] = deque()  # the long lists
        self._at_long = False  # is one of them being booked, and nothing else?
        self._arrival = threading.Condition()  # of something that waits, or of the end
        self._last_group = 0  # requests in it
        self._closed = False
        self.begun = self.failed = 0  # groups and changes; those that could not be stored

    def submit(self, work: Work) -> object:
        """What came of it, once it is done.

        Raises what it raises, Busy if too many wait, NotReady if no more are taken.
        """
        with self._arrival:
            if self._closed:
                raise NotReady(RESTART)
            waiting = self.waiting() if work.samples else 0
            if waiting and waiting + len(work.samples) > BACKLOG:
                raise Busy("too many bookings are waiting; send this again in a second")
            (self._long if len(work.samples) > LONG else self._queue).append(work)
            self._arrival.notify()
        return work.done.result()

    def waiting(self) -> int:
        """How many samples wait to be booked."""
        return sum(len(work.samples) for work in (*self._queue.copy(), *self._long.copy()))

    def close(self) -> None:
        """Does what is waiting, and nothing more."""
        with self._arrival:
            self._closed = True
            self._arrival.notify()
        self.join()

    def run(self) -> None:
        """Does what comes, until the end."""
        while group := self._next_group():
            self._at_long = len(group[0].samples) > LONG
            self._do(group)
            self._after()

    def pause(self) -> None:
        """In the middle of a long list: does what is short and waits, as much as one part of it."""
        if self._at_long and self._queue:
            with self._arrival:
                group = self._short_group(LONG)
            self._at_long = False
            self._do(group)
            self._at_long = True

    def _do(self, group: list[Work]) -> None:
        self.begun += 1
        try:
            if group[0].change:
                group[0].done.set_result(group[0].change())
            else:
                self._book(group)
        except Exception as error:
            if isinstance(error, OSError):
                error = NotStored(f"the log could not be written ({error.strerror}); try later")
            if isinstance(error, NotStored):
                self.failed += 1
                logger.error("%s", error)
            for work in group:
                if not work.done.done():
                    work.done.set_exception(error)

    def _next_group(self) -> list[Work]:
        """A long list, or a short group; nothing if there will be no more."""
        with self._arrival:
            while not (self._queue or self._long or self._closed):
                self._arrival.wait()
            if self._long:  # first, for nothing short has to wait for it
                return [self._long.popleft()]
            # Who was answered together soon sends again: a moment's wait makes larger groups.
            end = time.monotonic() + 0.001
            while len(self._queue) < self._last_group and not self._closed:
                if not self._arrival.wait(end - time.monotonic()):
                    break
            group = self._short_group(GROUP)
            self._last_group = len(group)
            return group

    def _short_group(self, most: int) -> list[Work]:
        """A change, or requests to book that share no name, of so many samples at most."""
        group, names, size = [], set(), 0
        while self._queue:
            work = self._queue[0]
            size += len(work.samples)
            own = work.names
            alone = work.change or size > most or not names.isdisjoint(own)
            if group and (alone or group[0].change):
                break
            group.append(self._queue.popleft())
            names |= own
        return group


# ------------------------------------------------------------------------------------------ Books

CHUNK = 128  # samples that are predicted, or unlearned, at a time


class NotFound(Exception):
    """There is no such booking or company."""


class Standing(NamedTuple):
    """How a corrected booking stands by now."""

    lesson: Lesson
    lines: list[int]  # the seqs of its corrections
    sample: Sample | None = None  # that was sent in the place of the first one, if any was


class Ids:
    """Which booking it is that a company has under an id of its own: 16 bytes for each.

    The latest, one in 64, wait in a dict until they are put among the others. An id is a hash, so
    a booking that is found may be another's.
    """

    def __init__(self) -> None:
        none = np.zeros(0, dtype=np.int64)
        self._sorted = none, none  # (n,) hashes; (n,) seqs, of equal hashes the latest first
        self._latest: dict[int, int] = {}

    def add(self, seq: int, company: str, id: str) -> None:
        """Has a booking found by this id from now on."""
        self._latest[self._hash(company, id)] = seq
        if len(self._latest) > 1000 + len(self._sorted[0]) // 64:
            self._sort()

    def find(self, company: str, id: str) -> int | None:
        """The seq of the booking that may have this id; None if there is none."""
        wanted = self._hash(company, id)
        latest, (hashes, seqs) = self._latest, self._sorted  # in that order: they may be moving
        if wanted in latest:
            return latest[wanted]
        at = hashes.searchsorted(wanted)
        return int(seqs[at]) if at < len(hashes) and hashes[at] == wanted else None

    def forget(self, seqs: np.ndarray) -> None:
        """Drops the ids of these bookings."""
        self._sort()
        kept = ~np.isin(self._sorted[1], seqs)
        self._sorted = self._sorted[0][kept], self._sorted[1][kept]

    def state(self) -> Arrays:
        """All of it; arrays that are its own."""
        self._sort()
        return dict(zip(("id_hashes", "id_seqs"), self._sorted, strict=True))

    def restore(self, state: Arrays) -> None:
        """Takes over all of another."""
        self._sorted = state["id_hashes"], state["id_seqs"]

    def _sort(self) -> None:
        new = np.array(sorted(self._latest.items()), dtype=np.int64).reshape(-1, 2).T
        at = self._sorted[0].searchsorted(new[0])
        self._sorted = tuple(map(np.insert, self._sorted, (at, at), new))
        self._latest = {}

    @staticmethod
    def _hash(company: str, id: str) -> int:
        return digest(_encode([company, id]))


class Books:
    """All that follows from a log's records, and nothing else: model, history, calibration.

    `draft` makes the records of samples, `enter` takes them once the log has them, `undo` takes
    them back if it cannot, and `apply` takes what a log has. One thread changes the books, under
    `lock`. If a change fails half-way, they are `broken`: they no longer match the log, and only
    reading it anew will help.

    What was booked unseen, as it was suggested, is predicted, but neither learned nor scored: it
    would prove itself right. It is learned once a person confirms or corrects it. What could have
    been, but was checked, counts for all the others that nobody looked at.
    """

    AT_ONCE = 1 << 12  # records that a start learns at a time

    def __init__(self, context: Sequence[str] = (), target: str = TARGET) -> None:
        """`context` are keys of a sample that are features, too; `target` is the one to predict."""
        self.context, self.target = tuple(context), target
        usual = not context and target == TARGET
        # What each record says of them, so that no log is read with others.
        self.features = {} if usual else {"target": target, "context": [*context]}
        self.company: str | None = None  # whose books these are, if not all companies'
        self.model, self.calibration, self.history = NaiveBayes(), Calibration(), History(target)
        self.ids = Ids()
        self.in_snapshot: tuple = (self.model, self.calibration, self.history, self.ids)
        self.corrected: dict[int, Standing] = {}  # seq -> how it stands by now
        self.counters: Counter[str] = Counter()  # since the start, for an operator
        self.last_batch = 0  # the seq that the last batch of bookings starts with
        self.lock = threading.Lock()
        self.broken = False

    @contextmanager
    def changing(self) -> Iterator[None]:
        """For all that changes the books."""
        try:
            with self.lock:
                yield
        except BaseException:
            self.broken = True
            raise

    def draft(
        self, samples: Sequence[Sample], pause: Callable[[], object] = lambda: None
    ) -> tuple[list[dict], np.ndarray]:
        """Records of samples, and their rows: predicted, learned, and counted in what is measured.

        A first list would have nothing to be predicted by: it is learned in parts, and each is
        predicted before it is. If this raises, nothing is learned. It calls `pause` now and then:
        meanwhile there may be any other change.
        """
        records: list[dict] = [{} for _ in samples]
        drafted = [self.history.rows[:0]]
        try:
            for part in parts(len(samples), self.history.size(self.company)):
                self._draft(samples[part], records[part], pause)
                with self.changing():
                    rows = self.history.draft(records[part])
                    rows["confidence"] = sure = self.calibration.confidence(rows).round(4)
                    if self.calibration.measured():
                        for record, confidence in zip(records[part], sure.tolist(), strict=True):
                            if record["predicted"] is not None:
                                record["confidence"] = confidence
                    self.calibration.add(rows)
                drafted.append(rows)
        except BaseException:
            self.undo(records, np.concatenate(drafted))
            raise
        return records, np.concatenate(drafted)

    def _draft(
        self, samples: Sequence[Sample], records: Sequence[dict], pause: Callable[[], object]
    ) -> None:
        """Predicts all of these samples, then learns them, and fills their records."""
        documents = [*map(self.tokens, samples)]
        labels = [sample[self.target] for sample in samples]
        seen, unseen = [], []
        for i, sample in enumerate(samples):
            (seen if score_weight(sample) else unseen).append(i)
        for chunk in chunks(unseen, CHUNK):
            pause()
            made = self.model.assess(_at(documents, chunk), _at(labels, chunk))
            for i, assessment in zip(chunk, made, strict=True):
                records[i] |= _record(samples[i], assessment, reviewed=False, **self.features)
        rounds = self.model.book(_at(documents, seen), _at(labels, seen), self.changing, pause)
        for part, made, lessons in rounds:
            for i, assessment, lesson in zip(seen[part], made, lessons, strict=True):
                records[i] |= _record(samples[i], assessment, **self._counts(lesson))

    def enter(self, records: Sequence[dict], rows: np.ndarray) -> None:
        """Adds bookings, which are learned and have their places in the log, to the history."""
        with self.changing():
            self.history.append(rows, [record["seq"] for record in records])
            weights = rows["score_weight"] * (rows["predicted"] >= 0)
            self.counters["booked"] += len(rows)
            self.counters["scored"] += int(weights.sum())
            self.counters["scored_right"] += int(weights[right(rows)].sum())
            for record in reversed(records):
                if record["batch"] != records[-1]["batch"]:
                    break
                self.last_batch = record["seq"]
            for record in records:
                if ID in record["sample"]:
                    self.ids.add(record["seq"], *map(record["sample"].get, ("CompanyId", ID)))

    def undo(self, records: Iterable[dict], rows: np.ndarray) -> None:
        """Takes back what was drafted, or such a part of it."""
        with self.changing():
            self.calibration.add(rows, sign=-1)
            self.history.undraft(rows)
        self.unlearn(record for record in records if record)

    def unlearn(self, records: Iterable[dict]) -> None:
        """Unlearns bookings, as they stand."""
        learned = (record for record in records if self.lesson(record).weight)
        for chunk in chunks(learned, CHUNK):
            documents = [self.tokens(self.sample(record)) for record in chunk]
            with self.changing():
                self.model.learn(documents, [*map(self.lesson, chunk)], sign=-1)

    def apply(self, records: Sequence[dict], booking_of: Callable[[dict], dict]) -> None:
        """Learns what the log says next. `booking_of` gives the booking of a correction."""
        bookings = [record for record in records if "sample" in record]
        self.enter(bookings, self.learn(bookings))
        self.correct([(booking_of(record), record) for record in records if "corrects" in record])

    def learn(self, bookings: Sequence[dict]) -> np.ndarray:
        """Learns bookings as a log's records say, counts them in what is measured; their rows."""
        documents = [self.tokens(record["sample"]) for record in bookings]
        learned = [i for i, record in enumerate(bookings) if "weight" in record]
        with self.changing():
            self.model.learn(
                [documents[i] for i in learned], [self._lesson(bookings[i]) for i in learned]
            )
            rows = self.history.draft(bookings)
            rows["confidence"] = [record["confidence"] or 0 for record in bookings]
            self.calibration.add(rows)
        return rows

    def change(self, booking: dict, sample: Sample) -> tuple[str, Sample | None] | None:
        """What a sample changes of the booking that has its id: the account, and all, if it moved.

        It has moved if its text, amount or context is another. None if nothing changes: what nobody
        has looked at changes nothing, nor does a copy that doesn't say who has.
        """
        before, lesson, account = self.sample(booking), self.lesson(booking), sample[self.target]
        moved = any(before.get(key) != sample.get(key) for key in (*FEATURES, *self.context))
        confirms = BOOKED_BY in sample and not lesson.weight
        if score_weight(sample) and (moved or confirms or account != lesson.account):
            return account, sample if moved else None
        return None

    def corrections(
        self,
        changes: Sequence[tuple[dict, str, Sample | None]],
        pause: Callable[[], object] = lambda: None,
    ) -> list[dict | None]:
        """Records of bookings that are booked to another account, or confirmed.

        A booking that moved comes with what it is now: all of these are weighed as if what they
        were before had never been. A person's that is confirmed counts what it did: nothing is
        learned anew. None if a person has said so already. It calls `pause` as `draft` does.
        """
        made: list[dict | None] = []
        for part in chunks(changes, ROUND):
            pause()
            lessons = [self.lesson(booking) for booking, _, _ in part]
            before = [self.tokens(self.sample(booking)) for booking, _, _ in part]
            there = self.history.at(np.array([booking["seq"] for booking, _, _ in part]))["seq"]
            # What was forgotten in a pause has been unlearned.
            moved = [
                i for i, (booking, _, now) in enumerate(part) if now and booking["seq"] in there
            ]
            documents = before.copy()
            for i in moved:
                documents[i] = self.tokens(part[i][2])
            with self.changing():
                self.model.learn(_at(before, moved), _at(lessons, moved), sign=-1)
                weighed = self.model.weigh(documents, [account for _, account, _ in part])
                self.model.learn(_at(before, moved), _at(lessons, moved))
            for (booking, account, now), old, lesson in zip(part, lessons, weighed, strict=True):
                confirms = not now and account == old.account and old.weight
                if confirms and booking["seq"] in self.corrected:
                    made.append(None)
                    continue
                says = {"corrects": booking["seq"], self.target: account}
                says |= {"now": now} if now else {}
                made.append(says | self._counts(old if confirms else lesson))
        return made

    def correct(self, corrections: Sequence[tuple[dict, dict]]) -> None:
        """Unlearns bookings, and learns them as they were corrected, one after the other."""
        if not corrections:
            return
        gone, come = [], []  # what is unlearned and learned: documents and their lessons
        with self.changing():
            seqs = np.unique([booking["seq"] for booking, _ in corrections])
            at = self.history.find(seqs)
            self.calibration.add(self.history.rows[at], sign=-1)
            for booking, correction in corrections:
                seq, account = booking["seq"], correction[self.target]
                _, lines, sample = self.corrected.get(seq, Standing(None, []))
                gone.append((self.tokens(self.sample(booking)), self.lesson(booking)))
                self.corrected[seq] = Standing(
                    self._lesson(correction),
                    [*lines, correction["seq"]],
                    correction.get("now", sample),
                )
                come.append((self.tokens(self.sample(booking)), self.lesson(booking)))
                as_sent = account == booking["sample"][self.target]
                self.history.correct(seq, account, in_ranks(booking["rank"] if as_sent else None))
            self.calibration.add(self.history.rows[at])
            # First what is added, so that no sum is below 0 meanwhile.
            self.model.learn(*zip(*come, strict=True))
            self.model.learn(*zip(*gone, strict=True), sign=-1)
            self.counters["corrections"] += len(corrections)

    def drop(self, seqs: np.ndarray) -> int:
        """Takes bookings out of what is scored, and says how many; they are yet to be undone."""
        with self.changing():
            rows = self.history.forget(seqs)
            self.calibration.add(rows, sign=-1)
            self.ids.forget(seqs)
            self.counters["forgotten"] += len(rows)
        return len(rows)

    def sample(self, booking: dict) -> Sample:
        """What a booking is of by now."""
        standing = self.corrected.get(booking.get("seq", -1))
        return (standing and standing.sample) or booking["sample"]

    def lesson(self, booking: dict) -> Lesson:
        """To which account a booking is booked by now, and what it counts."""
        standing = self.corrected.get(booking.get("seq", -1))
        return standing.lesson if standing else self._lesson(booking)

    def _lesson(self, record: dict) -> Lesson:
        """What a booking or a correction counts; what nobody has looked at counts 0."""
        account = record[self.target] if "corrects" in record else record["sample"][self.target]
        return Lesson(account, record.get("weight", 0.0), record.get("against", ()))

    def _counts(self, lesson: Lesson) -> dict:
        """What a record says of that."""
        return {"weight": lesson.weight, "against": lesson.against, **self.features}

    def tokens(self, sample: Sample) -> list[int]:
        """The sample's tokens."""
        return tokens(sample, self.context)

    def lines_of(self, company: str) -> np.ndarray:
        """(m,) the seqs of a company's bookings and corrections, in order. Raises NotFound."""
        self.require(company)
        seqs = self.history.of(company)["seq"].tolist()
        corrected = (self.corrected[seq].lines for seq in seqs if seq in self.corrected)
        return np.sort(np.array([*seqs, *chain.from_iterable(corrected)], dtype=np.int64))

    def require(self, company: str | None) -> None:
        """Raises NotFound unless the company, if any is named, has bookings."""
        if company is not None and company not in self.history.companies:
            raise NotFound("there is no booking of this company")

    def state(self) -> Arrays:
        """All of it; arrays that are those at work."""
        own = {"corrected": packed([*self.corrected.items()]), "features": packed(self.features)}
        return dict(chain(*(part.state().items() for part in self.in_snapshot), own.items()))

    def fits(self, state: Arrays) -> bool:
        """Is it of the same features?"""
        return unpacked(state["features"]) == self.features

    def restore(self, state: Arrays) -> None:
        """Takes over all of it."""
        for part in self.in_snapshot:
            part.restore(state)
        self.corrected |= {
            seq: Standing(Lesson(*lesson), *others)
            for seq, (lesson, *others) in unpacked(state["corrected"])
        }

    @contextmanager
    def at_rest(self) -> Iterator[NaiveBayes]:
        """The model, which does not change meanwhile. Raises NotReady while there is none."""
        with self.lock:
            if not self.model.n_classes:
                raise NotReady("there is no model yet; send bookings to /sample first")
            yield self.model

    def predict(self, samples: Iterable[Sample]) -> list[str]:
        """The most probable account of each sample. Raises NotReady while there is no model."""
        accounts: list[str] = []
        for books, chunk in self.asked(samples, CHUNK):
            documents = [*map(self.tokens, chunk)]
            with books.at_rest() as model:
                accounts += model.predict(documents)
                self.counters["predictions"] += len(chunk)
        return accounts

    def asked(self, samples: Iterable[Sample], most: int) -> Iterator[tuple["Books", list[Sample]]]:
        """The samples in chunks of at most so many, in order, with the books that know of them."""
        return zip(repeat(self), chunks(samples, most))

    def apart(self, records: Iterable[dict]) -> Iterable[tuple["Books", Iterable[dict]]]:
        """Bookings that may be compared with each other, with the books that know of them."""
        return [(self, records)]

    def confidences(
        self, samples: Sequence[Sample], made: Iterable[Assessment]
    ) -> tuple[list[list[float | None]], list[dict]]:
        """(n, RANKS) how sure n suggestions are, each with those after it; what they rest on.

        Nobody knows how sure before the first suggestion is counted: None.
        """
        rows = self.history.asked([sample["CompanyId"] for sample in samples], [*made])
        sure = self.calibration.shared(self.calibration.confidence(rows)).round(4)
        known = sure if self.calibration.measured() else np.full(sure.shape, None)
        return known.tolist(), self.calibration.evidence_counts(rows)


def parts(n: int, booked: int) -> list[slice]:
    """In which parts n samples are booked after so many: of at least 20, or as many as before."""
    ends = [0]
    while ends[-1] < n:
        ends.append(min(n, ends[-1] + max(20, booked + ends[-1])))
    return [*map(slice, ends, ends[1:])]


def _at(items: Sequence[T], numbers: Iterable[int]) -> list[T]:
    return [*map(items.__getitem__, numbers)]


def _record(sample: Sample, assessment: Assessment, **counts: object) -> dict:
    """What a log is to say of a booking; its confidence is yet to come."""
    predicted, margin, rank, known = assessment
    made = {"sample": sample, "predicted": predicted, "margin": margin, "confidence": None}
    return {**made, "rank": rank, "known": known, **counts}


def features_of(record: dict) -> dict:
    """What a record says of the keys that it was learned from, as Books.features does."""
    return {key: record[key] for key in ("target", "context", "isolated") if key in record}


def otherwise(record: dict, features: dict) -> str | None:
    """Why a record must be learned anew: another version or other features made it, if any did."""
    is_old = "sample" in record and "known" not in record
    if is_old or not isinstance(record.get("against", []), list):
        return "a version before 0.5 wrote it"
    learned = features_of(record)
    if learned == features or len(record) <= len(PLACE):  # it was emptied
        return None
    context = ",".join(learned.get("context", ())) or "none"
    target = learned.get("target", TARGET)
    alone = ", each company isolated" if "isolated" in learned else ""
    if "isolated" in features and not alone:
        alone = ", no company isolated"
    return f"it was learned with the context {context}, the target {target}{alone}"


def require_features(records: Sequence[dict], first: int, features: dict, path: Path) -> None:
    """Raises LogError if one of these lines of a log, from the first on, is to be learned anew."""
    for line, record in enumerate(records, start=first):
        if reason := otherwise(record, features):
            raise Damage(line, reason, otherwise=True).error(path)


# ------------------------------------------------------------------------------------- Bookkeeper

UNSAVED = 10_000  # lines of the log that its snapshot may lack; a sixteenth while it grows


class Conflict(Exception):
    """Other bookings were sent under the key of a batch."""


class Plan(NamedTuple):
    """What is to be made of a request's samples; what else it has, is known."""

    new: list[Sample]
    changed: list[tuple[dict, str, Sample | None]]  # as Books.corrections takes them
    key: str | None  # of the batch that comes of it
    repeated: range | None  # where those without an id are, if their key is known


class Alone:
    """Says in which order lines come into a log: here, as they are appended, by one process.

    A cluster's has a stream of lines that others append, too: bookkeep_extra/cluster.py.
    """

    def in_order(self, change: Callable[[], T]) -> T:
        """What comes of a change that appends; the writer's thread asks for it."""
        return change()

    def append(self, log: Log, batches: Sequence[tuple[str | None, Sequence[dict]]]) -> list[dict]:
        """Appends to the log, as Log.append says, behind all that others have appended."""
        return log.append(batches)

    def require_ready(self) -> None:
        """Raises NotReady if nothing can be appended."""

    def require_lines(self, log: Log, total: int) -> None:
        """Raises Busy unless the log has so many lines."""
        if len(log) < total:
            raise Busy(f"only {len(log)} lines are known here so far, not {total}")

    def health(self) -> dict[str, object]:
        """What there is to add to the service's health."""
        return {}

    def gauges(self) -> dict[str, tuple[str, float]]:
        """What there is to add to the figures for Prometheus."""
        return {}


class Bookkeeper:
    """Keeps the log and the books in step: its writer's thread is the only one to change either.

    Requests that wait together are a group: it is predicted as a whole, then learned, then appended
    with one fsync. So no sample is scored by a model that has seen its answer. What cannot be
    appended is unlearned, exactly.
    """

    def __init__(
        self,
        log: Log,
        unsaved: int = UNSAVED,
        books: Books | None = None,
        order: Alone | None = None,
    ) -> None:
        """Learns all that is in the log, in these books or some of the usual context and target.

        Raises LogError if that is damaged, or OSError. A snapshot is not made for fewer than
        `unsaved` lines.
        """
        self.log = log
        self.unsaved = unsaved
        self.order = order or Alone()
        self.books = books or Books()
        self.snapshot = Snapshot(log)
        self.started = time.monotonic()
        # Lines of the log that the last snapshot was to cover; infinite if there must be none.
        self._saved: float = 0
        self._saving: threading.Thread | None = None
        self._forgetting = threading.Lock()  # held while a company is forgotten
        self.writer = Writer(self._book, self._save)
        self.snapshot.load(self._restore)
        self._read_back()
        self.books.counters.clear()
        self.books.last_batch = len(log)  # there is none since the start
        self.writer.start()

    def book(self, samples: list[Sample], key: str | None = None) -> range:
        """The numbers of the lines that the samples took, once they are on disk and learned.

        A batch whose key is known is not booked again: it has the numbers that it got before. Nor
        is a sample whose company has a booking with its id: what it says otherwise corrects that.
        Raises Conflict if the key is that of another batch, NotStored if the samples could not be
        written, Busy if too many wait, NotReady if the bookkeeper is closed.
        """
        return self.writer.submit(Work(Future(), samples, key))

    def correct(self, seq: int, account: str) -> str:
        """Books a booking to another account, and says to which it was booked before.

        The old one is unlearned, the new one learned with the weight of its surprise. Metrics keep
        the prediction. The same account confirms it. Raises NotFound, NotStored, NotReady.
        """
        return self.change(lambda: self.order.in_order(partial(self._correct, seq, account)))

    def forget(self, company: str) -> int:
        """Removes a company from the log, unlearns it, and says how many bookings it had.

        Others are booked between its steps. What is booked for the company after the first one is
        not forgotten. Raises NotFound, NotStored, NotReady.
        """
        return self.forget_lines(partial(self.books.lines_of, company))

    def forget_lines(self, lines_of: Callable[[], np.ndarray]) -> int:
        """Removes lines, which the writer's thread is to ask for, as forget does."""
        with self._forgetting:
            self._end_saving()  # or the writer would have to wait for it
            try:
                lines, forgotten = self.change(partial(self._start_forgetting, lines_of))
                # A copy may be read meanwhile: let it have no correction without its booking.
                for part in chunks(lines[::-1].tolist(), 8 * CHUNK):
                    self.change(partial(self._forget_part, part))
                self.log.finish_forgetting()
            except BaseException as error:
                if not self.log.forgetting:
                    raise
                self.books.broken = True  # the log says less than the books, or will after a start
                raise NotReady(f"the next start forgets the rest ({error}); {RESTART}") from None
        _digests.clear()
        _amount_digests.cache_clear()
        logger.info("forgot %d lines", len(lines))
        return forgotten

    def change(self, make: Callable[[], T]) -> T:
        """What comes of a change, made by the writer's thread. Raises what it raises, NotReady."""

        def made() -> T:
            if self.books.broken:
                raise NotReady(RESTART)
            return make()

        return self.writer.submit(Work(Future(), change=made))

    def booking(self, seq: int) -> dict:
        """The record of a booking. Raises NotFound, NotStored."""
        if not len(self.books.history.at(np.array([seq]))):
            raise NotFound(f"there is no booking {seq}")
        return self.record(seq)

    def record(self, seq: int) -> dict:
        """The record of that line. Raises NotStored if it cannot be read."""
        try:
            return self.log.record(seq)
        except (OSError, ValueError) as error:
            raise NotStored(f"line {seq + 1} of the log could not be read ({error})") from None

    def find(self, company: str, id: str) -> dict | None:
        """The record of the booking that a company has under this id, if any. Raises NotStored."""
        seq = self.books.ids.find(company, id)
        booking = {} if seq is None else self.record(seq)
        sample = booking.get("sample", {})
        return booking if (sample.get("CompanyId"), sample.get(ID)) == (company, id) else None

    def seq_of(self, company: str, id: str) -> int:
        """The number of the booking that it finds. Raises NotFound, NotStored."""
        if booking := self.find(company, id):
            return booking["seq"]
        raise NotFound(f"no company of that name has a booking with this {ID}")

    def repeated(self, samples: Sequence[Sample], key: str | None) -> range | None:
        """The numbers that these samples without an id got, if their key is known.

        Raises Conflict, NotStored.
        """
        try:
            records = None if key is None else self.log.find(key)
        except (OSError, ValueError) as error:
            raise NotStored(f"the log could not be read ({error}); try later") from None
        if records is None:
            return None
        if any(len(record) == len(PLACE) for record in records):
            raise Conflict("these were forgotten; take a new Idempotency-Key to book them again")
        stored = (record["sample"] for record in records if "sample" in record)
        if [sample for sample in stored if ID not in sample] != samples:
            raise Conflict("this Idempotency-Key was used for other bookings; take a new one")
        return range(records[0]["seq"], records[-1]["seq"] + 1)

    def close(self) -> None:
        """Books what is waiting, nothing more, and closes the log."""
        self.writer.close()
        self._end_saving()
        may_save = not self.books.broken and self._saved < math.inf and self.log.in_place()
        if may_save and len(self.log) - self.snapshot.lines >= self.unsaved:
            self.snapshot.save(self._state())
        with self._forgetting:
            self.log.close()

    # What the writer's thread does

    def _book(self, group: list[Work]) -> None:
        if self.books.broken:
            raise NotReady(RESTART)
        self.order.in_order(partial(self._store, group))

    def _store(self, group: list[Work], pause: Callable[[], object] | None = None) -> None:
        """Answers requests that share no name, but those that are answered by now."""
        begun = self.writer.begun
        planned = [(each, plan) for each in group if (plan := self._planned(each))]
        if not planned:
            return
        pause = pause or self.writer.pause
        new = [sample for _, plan in planned for sample in plan.new]
        changed = [change for _, plan in planned for change in plan.changed]
        records, rows = self.books.draft(new, pause)
        try:
            corrections = self.books.corrections(changed, pause)
            # In a pause, others may have booked the same, or changed what this is to change.
            is_old = self.writer.begun > begun and any(self._plan(r) != p for r, p in planned)
            if not is_old:
                drafted, anew = iter(records), iter(corrections)
                batches = [
                    (p.key, [*islice(drafted, len(p.new)), *islice(anew, len(p.changed))])
                    for _, p in planned
                ]
                made = self.order.append(self.log, batches)
        except BaseException:
            self.books.undo(records, rows)
            raise
        if is_old:
            self.books.undo(records, rows)
            return self._store(group, lambda: None)  # or it might never end
        self.books.enter([record for record in made if "sample" in record], rows)
        corrections = (record for record in made if "corrects" in record)
        pairs = zip((booking for booking, _, _ in changed), corrections, strict=True)
        for part in chunks(pairs, CHUNK):
            self.books.correct(part)
        end = len(self.log) - len(made)
        for (each, _), (_, lines) in zip(planned, batches, strict=True):
            first, end = end, end + len(lines)
            each.done.set_result(range(first, end))

    def _planned(self, request: Work) -> Plan | None:
        """What is to be made of its samples; None if it is answered, or nothing is to be made."""
        if request.done.done():
            return None
        try:
            plan = self._plan(request)
        except (Conflict, NotStored) as error:
            request.done.set_exception(error)
            return None
        if plan.new or plan.changed:
            return plan
        if request.by_id:  # appending nothing shows whether others have changed them
            self.order.append(self.log, [])
        end = len(self.log)
        request.done.set_result(plan.repeated or range(end, end))
        return None

    def _plan(self, request: Work) -> Plan:
        """What is to be made of its samples. Raises Conflict, NotStored."""
        without = request.without_id
        key = request.key if without or not request.samples else None  # ids need none
        repeated = self.repeated(without, key)
        plan = Plan([], [], key if repeated is None else None, repeated)
        if repeated is None:
            plan.new.extend(without)
        for (company, id), sample in request.by_id.items():
            if (booking := self.find(company, id)) is None:
                plan.new.append(sample)
            elif change := self.books.change(booking, sample):
                plan.changed.append((booking, *change))
        return plan

    def _correct(self, seq: int, account: str) -> str:
        booking = self.booking(seq)
        before = self.books.lesson(booking).account
        [correction] = self.books.corrections([(booking, account, None)])
        if correction:
            [correction] = self.order.append(self.log, [(None, [correction])])
            self.books.correct([(booking, correction)])
        return before

    def _start_forgetting(self, lines_of: Callable[[], np.ndarray]) -> tuple[np.ndarray, int]:
        lines = lines_of()
        self._end_saving()
        self.snapshot.discard()  # which a full disk has room for, and then for the note
        self.log.start_forgetting(lines)
        self._saved = math.inf  # only a start drops the names of its accounts
        return lines, self.books.drop(lines)

    def _forget_part(self, seqs: list[int]) -> None:
        """Unlearns bookings among these lines, as they stand, and empties the lines."""
        records = [record for seq in seqs if "sample" in (record := self.log.record(seq))]
        self.books.unlearn(records)
        for record in records:
            self.books.corrected.pop(record["seq"], None)
        for seq in seqs:
            self.log.empty(seq)
        self.log.sync()  # by this thread: the kernel tells only one that bytes were lost

    def _read_back(self) -> None:
        reported = time.monotonic()
        gc.disable()  # no cycles are made, and to look for them takes a tenth of the time
        try:
            for records in chunks(self.log.read(), self.books.AT_ONCE):
                self._learn_back(records)
                if time.monotonic() - reported > 3:
                    reported = time.monotonic()
                    logger.info("%s: %s read back so far", self.log.path, self.log.progress())
        finally:
            gc.enable()

    def _learn_back(self, records: list[dict]) -> None:
        first = records[0]["seq"] + 1
        require_features(records, first, self.books.features, self.log.path)
        try:
            self.books.apply(records, self._corrected)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            reason = f"it, or one of the {len(records) - 1} after it, makes no sense ({error!r})"
            raise Damage(first, reason).error(self.log.path) from None

    def _corrected(self, correction: dict) -> dict:
        """The booking that a line corrects. Raises LogError if there is none."""
        try:
            return self.booking(correction["corrects"])
        except NotFound as error:
            damage = Damage(correction["seq"] + 1, str(error))
            raise damage.error(self.log.path) from None

    # Snapshots

    def _state(self) -> Arrays:
        """All that was made of the log; arrays that are those at work."""
        return self.log.state() | self.books.state()

    def _restore(self, state: Arrays) -> None:
        """Takes over all that was made of the log; or nothing, if it raises."""
        books = type(self.books)(self.books.context, self.books.target)
        if not books.fits(state):
            return  # the log says so, too, unless all of it is forgotten
        books.restore(state)
        self.log.restore(state)
        self.books, self._saved = books, len(self.log)

    def _save(self) -> None:
        """Saves the state in the background, if it is time to."""
        due = max(self.unsaved, self._saved / 16)
        is_saving = self._saving and self._saving.is_alive()
        if len(self.log) - self._saved < due or is_saving or self.books.broken:
            return
        self._saved = len(self.log)
        try:
            state = {name: array.copy() for name, array in self._state().items()}
            saving = threading.Thread(target=self.snapshot.save, args=[state], name="saving")
            saving.start()
            self._saving = saving  # now another thread may join it
        except Exception as error:  # there is the log
            logger.warning("no snapshot was made: %s", error)

    def _end_saving(self) -> None:
        if self._saving:
            self._saving.join()


# ------------------------------------------------------------------------------------------ Views


class Access(NamedTuple):
    """What the sender of a request may do."""

    company: str | None = None  # whose data it may be about; anybody's, if it is None
    may_change: bool = True  # or else only ask


ALL = Access()


def suggest(
    books: Books,
    samples: Sequence[Sample],
    top: int,
    book_from: float | None = None,
    with_reasons: bool = True,
) -> list[dict[str, object]]:
    """The most probable accounts of each sample, best first, with their confidence and reasons.

    The first is compared with the second, the others are with the first. The log-odds of what the
    sample says, its `reasons`, and the `prior` add up to the `margin`. The `record` says what the
    first one's confidence rests on, and `check` whether a person should look at it even if it is
    sure enough. Whether it is, from a confidence on, is the `decision`. Raises NotReady.
    """
    answers: list[dict[str, object]] = []
    # Reasons take long, and others wait for the model, too.
    for own, chunk in books.asked(samples, 1 if with_reasons else CHUNK):
        documents = [*map(books.tokens, chunk)]
        with own.at_rest() as model:
            best, made = model.suggest(documents, max(top, 2))
            scores = [[score for score, _ in row] for row in best]
            numbers = [[number for _, number in row] for row in best]
            pairs = zip(documents, numbers, strict=True)
            terms = [model.terms(*pair) if with_reasons else None for pair in pairs]
            accounts = [[model.names[number] for number in row] for row in numbers]
            sure, evidence = own.confidences(chunk, made)
            sizes = [books.history.size(sample["CompanyId"]) for sample in chunk]
            books.counters["predictions"] += len(chunk)
        for i, sample in enumerate(chunk):
            check = is_check(sample, sizes[i], len(answers))
            says = wordings(sample, books.context) if with_reasons else []
            answer = {
                "suggestions": [
                    _suggestion(accounts[i], scores[i], rank, sure[i][rank], says, terms[i])
                    for rank in range(min(top, len(accounts[i])))
                ],
                "record": {"known": SPECIFICITY[made[i].specificity], **evidence[i]},
                "check": check,
            }
            if book_from is not None:
                is_sure = sure[i][0] is not None and sure[i][0] >= book_from
                answer["decision"] = ("check" if check else "book") if is_sure else "review"
            answers.append(answer)
    return answers


def is_check(sample: Sample, bookings: int, place: int) -> bool:
    """Whether a suggestion that may be booked unseen is to be checked: one in CHECKS is.

    It depends on how many bookings the company has and on the place in the request, too, for what
    recurs must not be checked always or never.
    """
    drawn = [*(sample[key] for key in FEATURES), bookings, place]
    return digest(_encode(drawn)) % CHECKS == 0


def _suggestion(
    accounts: Sequence[str],
    scores: Sequence[float],
    rank: int,
    confidence: float | None,
    says: Sequence[tuple[str, str]],
    terms: np.ndarray | None,
) -> dict[str, object]:
    """One of k accounts, and what speaks for it over another, by the terms (k, 1 + T)."""
    made = {"account": accounts[rank], "confidence": confidence, "over": None, "margin": None}
    reasons = {} if terms is None else {"prior": None, "reasons": []}
    if len(accounts) > 1:
        other = int(rank == 0)
        made |= {"over": accounts[other], "margin": round(scores[rank] - scores[other], 4)}
        if terms is not None:
            prior, *weights = (terms[rank] - terms[other]).tolist()
            reasons = {"prior": round(prior, 4), "reasons": _reasons(says, weights)}
    return made | reasons


def _reasons(says: Sequence[tuple[str, str]], weights: list[float]) -> list[dict[str, str | float]]:
    """What the sample's words weigh, the heaviest first, without those that are not known."""
    reasons: Counter[tuple[str, str]] = Counter()
    for wording, weight in zip(says, weights, strict=True):
        reasons[wording] += weight
    return [
        {"token": token, "kind": kind, "weight": round(weight, 4)}
        for (kind, token), weight in sorted(reasons.items(), key=lambda reason: -reason[1])
        if weight
    ]


def metrics(books: Books, n: int, company: str | None = None) -> dict[str, float]:
    """Macro precision and recall of the last n predictions. Raises NotFound, NotReady."""
    rows = last_scored(books, n, company)
    figures = precision_recall(rows["booked"], rows["predicted"], rows["score_weight"])
    return dict(zip(("precision", "recall"), figures, strict=True))


def last_scored(books: Books, n: int, company: str | None = None) -> np.ndarray:
    """The last n (or fewer) scored rows. Raises NotFound, NotReady."""
    with books.lock:
        books.require(company)
        rows = books.history.last(n, company)
    if not len(rows):
        raise NotReady("nothing has been predicted yet; send bookings to /sample first")
    return rows


def health(keeper: Bookkeeper, company: str | None = None) -> dict[str, object]:
    """How much has been learned, and for how many seconds the service has been up.

    Of one company, it is how much that has. Raises NotReady if the service must be restarted, or
    the log be put back in its place.
    """
    if keeper.books.broken:
        raise NotReady(RESTART)
    if not keeper.log.in_place():
        raise NotReady("the log was moved, replaced, deleted or cut by another; put it back")
    failure = keeper.log.failure
    with keeper.books.lock:
        books, rows = keeper.books, keeper.books.history.of(company)
        if company is None:
            sizes = {
                "lines": len(keeper.log),
                "accounts": books.model.n_classes,
                "companies": len(books.history.companies),
                "tokens": books.model.n_tokens,
                **keeper.order.health(),
            }
        else:
            lines = len(books.lines_of(company)) if len(rows) else 0
            sizes = {"lines": lines, "accounts": len(np.unique(rows["booked"]))}
        return {
            "status": f"the log could not be written ({failure})" if failure else "ok",
            "samples": len(rows),
            "unseen": unseen(rows),
            "checks": checks(rows),
            **sizes,
            "uptime": round(time.monotonic() - keeper.started, 3),
        }


def require_ready(keeper: Bookkeeper) -> None:
    """Raises NotReady unless bookings can be sent to it."""
    if health(keeper)["status"] != "ok":
        raise NotReady("the log could not be written")
    keeper.order.require_ready()


# ------------------------------------------------------------------------------------------- HTTP

MAX_BODY = 16 << 20  # bytes of a request's body
LARGE_BODY = 1 << 20  # bytes from which a body has to wait for its turn to be parsed
MAX_NUMBER = 999_999_999
MAX_SUGGESTED = 300  # suggestions in one answer, each of which is long
JSON_LINES = "application/jsonl"
AT_LEAST = "Bookkeep-At-Least"  # lines that an answer must know of
OPEN = {"/", "/desk.css", "/desk.js", "/health", "/ready"}  # nothing to learn from them
READS = {"GET", "HEAD"}  # methods that change nothing
QUESTIONS = {"/predict", "/suggest"}  # nor do these
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}  # of every answer
EXTRA = Path(__file__).resolve().parent / "bookkeep_extra"
STATUS = {BadRequest: 400, NotFound: 404, Conflict: 422, NotReady: 503, NotStored: 507}

# What a route takes beside a body: each name with its JSON Schema. The name is in the path, or a
# header, or else after the ?. From this come the refusals, the handler's arguments, and what
# openapi.py says of it. A `title` says what a text with a pattern must be.
Schema = dict[str, object]
WHOLE_NUMBER: Schema = {"type": "integer", "format": "int64", "minimum": 0, "maximum": MAX_NUMBER}
FROM_ONE = WHOLE_NUMBER | {"minimum": 1}
FRACTION: Schema = {"type": "number", "format": "double", "minimum": 0, "maximum": 1}
TEXT: Schema = {"type": "string", "minLength": 1}
YES_OR_NO: Schema = {"type": "string", "enum": ["yes", "no"]}
KEY: Schema = {"type": "string", "pattern": "^[!-~]([ -~]{0,198}[!-~])?$"}
KEY |= {"title": "1 to 200 printable ASCII characters"}


def extra(name: str) -> ModuleType:
    """What stands beside this module under that name. Raises ImportError."""
    if not EXTRA.exists():  # or that of another one might be found
        raise ImportError(f"this needs {EXTRA.name} beside {Path(__file__).name}, which is missing")
    return import_module(f"{EXTRA.name}.{name}")


def takes(
    schemas: dict[str, Schema] | None = None, body: Callable | None = None, of: str | None = None
) -> Callable:
    """For a handler: its arguments are the body, as read by `body`, and these, in that order.

    It is refused to the token of a company unless it says what it is `of` that must be this
    company's: "samples" in the body, a "booking", the "company" of a parameter, or "nobody".
    """

    def mark(handler: Callable) -> Callable:
        handler.schemas, handler.body, handler.of = schemas or {}, body, of
        return handler

    return mark


def value_of(name: str, schema: Schema, text: str | None) -> object:
    """The value that a text gives to a parameter. Raises BadRequest."""
    if text is None:
        return schema.get("default")
    least, most = schema.get("minimum"), schema.get("maximum")
    if schema["type"] == "integer":
        if re.fullmatch("[0-9]{1,18}", text) and least <= int(text) <= most:
            return int(text)
        needed = f"a whole number from {least} to {most}"
    elif schema["type"] == "number":
        with suppress(ValueError):
            if re.fullmatch("[0-9.e-]+", text) and least <= float(text) <= most:
                return float(text)
        needed = f"a number from {least} to {most}"
    elif "enum" in schema:
        if text in schema["enum"]:
            return text
        needed = " or ".join(schema["enum"])
    elif re.search(schema.get("pattern", "."), text, re.DOTALL):
        return text
    else:
        needed = schema.get("title", "filled")
    raise BadRequest(f"{name} must be {needed}")


def access_of(token: str | None, authorization: str) -> Access | None:
    """What a request with that header may do where this is the service's token, if anything."""
    scheme, _, given = authorization.partition(" ")
    if token is not None and scheme.lower() != "bearer":
        return None
    if token is None or hmac.compare_digest(given.encode("latin-1"), token.encode()):
        return ALL
    return extra("tokens").access_of(token, given) if EXTRA.exists() else None


def create_app(
    keeper: Bookkeeper,
    token: str | None = None,
    hosts: Collection[str] | None = None,
    max_body: int = MAX_BODY,
    max_batch: int = MAX_BATCH,
) -> Bottle:
    """The WSGI app that answers for this bookkeeper, all but the page in JSON, errors too.

    With a token, all but OPEN is for those who send it. With hosts, it is for those who call the
    service by one of these names: a web page whose own name was made to lead here does not.
    """
    app = Bottle()
    app.install(partial(_answering, keeper, max_body, threading.Lock()))
    app.default_error_handler = _error_in_json
    if EXTRA.exists():  # without it, there are no figures for Prometheus
        extra("prometheus").watch(app, keeper)  # before authorize: a refusal takes time, too
    target = keeper.books.target
    booked = partial(check_samples, booked=True, most=max_batch, target=target)
    asked = partial(check_samples, booked=False, most=max_batch)

    @app.hook("before_request")
    def authorize() -> None:
        environ = request.environ
        if environ["PATH_INFO"].encode() != environ["bottle.raw_path"].encode("latin-1"):
            raise HTTPError(400, "the path must be UTF-8, percent-encoded")
        host = re.sub(":[0-9]*$", "", environ.get("HTTP_HOST", "")).lower()
        if hosts is not None and host not in hosts:
            raise HTTPError(403, f"call this service by one of its names: {', '.join(hosts)}")
        access = access_of(token, environ.get("HTTP_AUTHORIZATION", ""))
        if request.path not in OPEN and access is None:
            needed = "send the token, with the header Authorization: Bearer <token>"
            raise HTTPError(401, needed, **{"WWW-Authenticate": "Bearer"})
        environ["bookkeep.access"] = access or ALL

    @app.hook("after_request")
    def protect() -> None:
        for name, value in HEADERS.items():
            response.set_header(name, value)

    @app.post("/sample")
    @takes({"Idempotency-Key": KEY}, body=booked, of="samples")
    def post_sample(samples: list[Sample], key: str | None) -> dict:
        stored = keeper.book(samples, key)
        first, last = (stored[0], stored[-1]) if stored else (None, None)
        answer = {"received": len(samples), "total": stored.stop, "first": first, "last": last}
        if any(ID in sample for sample in samples):
            n = len(keeper.books.history.at(np.array(stored)))
            known = max(0, len(samples) - len(stored))  # its key's first list may have had more
            answer |= {"booked": n, "known": known, "corrected": len(stored) - n}
        return answer

    @app.post("/predict")
    @takes(body=asked, of="samples")
    def post_predict(samples: list[Sample]) -> list[str]:
        return keeper.books.predict(samples)

    @app.post("/suggest")
    @takes(
        {
            "top": FROM_ONE | {"maximum": Calibration.RANKS, "default": 3},
            "book_from": FRACTION,
            "reasons": YES_OR_NO | {"default": "yes"},
        },
        body=lambda content: (asked(content), isinstance(content, list)),
        of="samples",
    )
    def post_suggest(sent: tuple, top: int, book_from: float | None, reasons: str) -> dict | list:
        samples, as_list = sent
        most = MAX_SUGGESTED // top
        if reasons == "yes" and len(samples) > most:
            raise BadRequest(
                f"with reasons, send at most {most} samples in one request, not {len(samples)}; "
                "?reasons=no leaves them out"
            )
        answers = suggest(keeper.books, samples, top, book_from, reasons == "yes")
        return answers if as_list else answers[0]

    @app.post("/correct")
    @takes(body=partial(_correction, target), of="booking")
    def post_correct(correction: dict) -> dict:
        seq, account = correction.get("seq"), correction[target]
        seq = keeper.seq_of(correction["CompanyId"], correction[ID]) if seq is None else int(seq)
        return {"seq": seq, target: account, "before": keeper.correct(seq, account)}

    @app.delete("/company")  # clients take .. and the like out of a path
    @app.delete("/company/<id:re:(?s:.+)>")
    @takes({"id": TEXT}, of="company")
    def delete_company(id: str | None) -> dict:
        if id is None:
            raise BadRequest("say which company, as in /company?id=acme")
        return {"company": id, "forgotten": keeper.forget(id)}

    @app.get("/metrics/<n>")
    @takes({"n": FROM_ONE, "company": TEXT}, of="company")
    def get_metrics(n: int, company: str | None) -> dict[str, float]:
        return metrics(keeper.books, n, company)

    @app.get("/samples")
    @takes({"from": WHOLE_NUMBER | {"default": 0}, "limit": WHOLE_NUMBER | {"default": MAX_NUMBER}})
    def get_samples(first: int, limit: int) -> Export | str:
        lines = Export(keeper.log, range(first, first + limit))
        response.content_type, response.content_length = JSON_LINES, lines.size
        return lines if lines.size else ""  # waitress sends it: a slow reader keeps no thread

    @app.get("/health")
    @takes(of="nobody")
    def get_health() -> dict:
        return health(keeper, request.environ["bookkeep.access"].company)

    @app.get("/ready")
    @takes(of="nobody")
    def get_ready() -> dict:
        require_ready(keeper)
        return {"status": "ready"}

    if EXTRA.exists():  # reports, what a person corrects, the page, what describes all of this
        extra("routes").add(app, keeper, max_batch, max_body, token is not None)
    paths = " ".join(dict.fromkeys(map(described_path, app.routes)))

    @app.error(404)
    def not_found(error: HTTPError) -> str:
        if error.body.startswith("Not found: "):  # Bottle's own
            alone = "" if EXTRA.exists() else " without bookkeep_extra, which is missing"
            error.body = f"there is nothing here{alone}; {paths} is all"
        return _error_in_json(error)

    @app.error(405)
    def not_allowed(error: HTTPError) -> str:
        error.body = f"ask for this with {response.get_header('Allow')}"
        return _error_in_json(error)

    return app


def starting_app(log: Log) -> Bottle:
    """The WSGI app for as long as the log is read back: it only says how far that is."""
    app = Bottle()
    app.default_error_handler = _error_in_json

    @app.hook("before_request")
    def refuse() -> None:
        more = {"Retry-After": "1", **HEADERS}
        raise HTTPError(503, f"the log is being read back, {log.progress()} so far", **more)

    return app


@cache
def described_path(route: Route) -> str:
    """A route's path as the API's description has it."""
    return re.sub("<(.*?)(:.*?)?>", r"{\1}", route.rule)


def _answering(
    keeper: Bookkeeper, max_body: int, parsing: threading.Lock, handler: Callable
) -> Callable:
    """A Bottle plugin: gives a handler what it takes, makes JSON of what it returns or raises.

    Texts and files are left as they are.
    """

    def arguments(in_path: dict[str, str]) -> Iterator[object]:
        access = request.environ["bookkeep.access"]
        if access.company is not None and handler.of is None:
            raise HTTPError(403, "the token of a company is not enough for this")
        if not (access.may_change or request.method in READS or request.path in QUESTIONS):
            raise HTTPError(403, "this token may only ask")
        asked = [name for name, _ in request.query.allitems()] if request.query_string else []
        known = [n for n in handler.schemas if n not in in_path and n != "Idempotency-Key"]
        if set(asked) - set(known) or len(asked) > len(set(asked)):
            these = f"only {', '.join(known)}, each once" if known else "nothing"
            raise BadRequest(f"send {these} after the ? of this path")
        if handler.body and request.content_type.partition(";")[0].strip() != "application/json":
            raise HTTPError(415, "send JSON, with the header Content-Type: application/json")
        if request.content_length > max_body:
            raise HTTPError(413, f"send at most {max_body} bytes in one request")
        if (total := _header(AT_LEAST)) is not None:
            keeper.order.require_lines(keeper.log, value_of(AT_LEAST, WHOLE_NUMBER, total))
        values = {
            name: value_of(name, schema, in_path.get(name) or _sent(name))
            for name, schema in handler.schemas.items()
        }
        content = None
        if handler.body:
            # Parsed JSON may take 20 times its bytes, so it is one large body after the other.
            with parsing if request.content_length > LARGE_BODY else nullcontext():
                content = parse_json(request.body.read())
                yield handler.body(content)
        if access.company is not None:
            extra("tokens").confine(keeper, access.company, handler.of, values, content)
        yield from values.values()

    def answer(**in_path: str) -> str | Export:
        try:
            made = handler(*arguments(in_path))
        except HTTPError:
            raise
        except Exception as error:
            for raised, status in STATUS.items():
                if isinstance(error, raised):
                    again = {"Retry-After": "1"} if isinstance(error, Busy) else {}
                    raise HTTPError(status, str(error), **again) from None
            logger.exception("%s %s failed", request.method, request.path)
            raise HTTPError(500, "the service failed to answer; its log says why") from None
        if not isinstance(made, dict | list):
            return made
        response.content_type = "application/json"
        if isinstance(made, list):  # in parts: while one is made, all other threads wait
            return f"[{', '.join(_encode(part)[1:-1] for part in chunks(made, CHUNK))}]"
        return _encode(made)

    return answer


def _header(name: str) -> str | None:
    """The text of a header, whatever its bytes: Bottle's own would raise unless they are UTF-8."""
    return request.environ.get(f"HTTP_{name.upper().replace('-', '_')}")


def _sent(name: str) -> str | None:
    """The text of a header, or of a parameter after the ?. Raises BadRequest."""
    if name == "Idempotency-Key":
        return _header(name)
    text = request.query.getunicode(name)
    if text is None and name in request.query:
        raise BadRequest(f"{name} must be UTF-8, percent-encoded")
    return text


def _correction(target: str, content: object) -> dict:
    """The booking's number, or its company and id; and its account. Raises BadRequest."""
    keys = content.keys() if isinstance(content, dict) else ()
    if keys not in ({"seq", target}, {"CompanyId", ID, target}):
        with_id = f'{{"CompanyId": "acme", "{ID}": "17", "{target}": "6700"}}'
        raise BadRequest(f'send {{"seq": 1203, "{target}": "6700"}} or {with_id}, and nothing else')
    texts = {key: text for key, text in content.items() if key != "seq"}
    check_sample(texts, [*texts])
    seq = content.get("seq", 0.0)
    if not isinstance(seq, float) or not (seq.is_integer() and 0 <= seq <= MAX_NUMBER):
        raise BadRequest(f"seq must be a whole number from 0 to {MAX_NUMBER}")
    return content


def _error_in_json(error: HTTPError) -> str:
    response.content_type = "application/json"
    return json.dumps({"error": error.body})


# ----------------------------------------------------------------------------------------- Server

STOPS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


class Request(HTTPRequestParser):
    """A request while it is received: a stranger's long body is not, the app answers 401."""

    def __init__(self, welcomes: Callable[[str], object], adj: Adjustments) -> None:
        super().__init__(adj)
        self._welcomes = welcomes

    def parse_header(self, header_plus: bytes) -> None:
        """Reads the headers. Raises ParsingError."""
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # an address in brackets that is none
            raise ParsingError(str(error)) from None
        if self.chunked and "CONTENT_LENGTH" in self.headers:  # a proxy may believe the other one
            raise ParsingError("send Content-Length or Transfer-Encoding, not both")
        if header_plus.lower().count(b"\nidempotency-key:") > 1:
            raise ParsingError("send one Idempotency-Key")
        is_long = self.chunked or self.content_length > 1 << 16
        if is_long and not self._welcomes(self.headers.get("AUTHORIZATION", "")):
            self.body_rcv, self.content_length, self.expect_continue = None, 0, False
            self.headers["CONNECTION"] = "close"


class Server:
    """Waitress, turn by turn: it receives what has come, then answers short questions.

    Changes, questions and all else have threads of their own, so that no kind waits for another:
    changes wait for the disk, and one company is forgotten after the other. A short question is
    answered by the thread that received it: to hand it over takes longer than to answer it, and
    with 100 threads asking, new connections would wait.
    """

    def __init__(
        self,
        app: Bottle,
        listener: socket.socket,
        threads: int,
        max_body: int,
        welcomes: Callable[[str], object],
    ) -> None:
        """Listens, but does not answer yet. `welcomes` says if an Authorization header will do."""
        _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        self._short: deque[HTTPChannel] = deque()  # whose next request is a short question
        self._stopping = threading.Event()
        self._receiver = threading.get_ident()
        self._pools = [ThreadedTaskDispatcher() for _ in range(4)]
        self._changes, self._questions, self._others, self._forgetting = self._pools
        for pool in self._pools:
            pool.set_thread_count(1 if pool is self._forgetting else threads)
        self._server = waitress.create_server(
            app,
            _dispatcher=self,
            sockets=[listener],
            ident=None,
            # A connection takes a file, and another for a long body.
            connection_limit=1000 if files < 0 else max(10, min(1000, files // 2 - 50)),
            asyncore_use_poll=True,
            # The app refuses long bodies, in JSON; waitress what is not worth receiving.
            max_request_body_size=2 * max_body + (1 << 20),
            max_request_header_size=1 << 14,
        )

        class Channel(HTTPChannel):
            parser_class = partial(Request, welcomes)

            def service(self) -> None:
                with self.requests_lock:
                    # Before a further answer, the thread would wait until this one is read.
                    if len(self.requests) > 1:
                        self.requests[0].headers["CONNECTION"] = "close"
                super().service()

        self._server.channel_class = Channel
        self._server.pull_trigger = self._wake
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # waiting for a thread is fine

    def call(self, app: Bottle) -> None:
        """Has this app answer what comes from now on."""
        self._server.application = app

    def add_task(self, channel: HTTPChannel) -> None:
        """Has the channel's next request answered; waitress calls this."""
        request = channel.requests[0]
        if self._stopping.is_set():
            request.headers["CONNECTION"] = "close"
        if request.error or request.command in READS:
            self._others.add_task(channel)
        elif request.command == "DELETE":
            self._forgetting.add_task(channel)
        elif request.path not in QUESTIONS:
            self._changes.add_task(channel)
        elif self._is_short(channel, request):
            self._short.append(channel)
        else:
            self._questions.add_task(channel)

    def _is_short(self, channel: HTTPChannel, request: HTTPRequestParser) -> bool:
        return (
            request.path == "/predict"
            and 0 < request.content_length <= 1 << 10
            and request.body_rcv.getbuf().get().lstrip().startswith(b"{")
            and AT_LEAST.upper().replace("-", "_") not in request.headers  # it may have to wait
            and threading.get_ident() == self._receiver
        )

    def answer(self, until: Future | None = None) -> bool:
        """Answers requests until one of STOPS, then those under way; or until that is done.

        Says whether it was stopped.
        """
        on_signals(self._stop)
        if until:
            until.add_done_callback(lambda _: self._wake())
        while not self._stopping.is_set():
            if until and until.done():
                return False
            self._turn(1)
        self._server.del_channel()  # no further connections
        self._server.socket.close()
        self._turn(0)  # what has arrived by now is under way
        end = time.monotonic() + 4  # for requests to arrive, and answers to be read
        while channels := [*self._server.active_channels.values()]:
            late = time.monotonic() > end
            for channel in channels:
                unread = channel.total_outbufs_len
                idle = not (channel.requests or channel.request or unread)
                # Whole requests are answered, however long the disk takes.
                if idle or (late and (unread or not channel.requests)):
                    channel.handle_close()
            self._turn(0.05)
        for pool in self._pools:
            pool.shutdown()
        return True

    def _stop(self, number: int, _: object) -> None:
        logger.info("stopping on %s", signal.Signals(number).name)
        self._stopping.set()  # also if it comes before it answers for the next app
        self._server.trigger.pull_trigger()

    def _wake(self) -> None:
        """Has the receiving thread look again, unless it asks for it itself: it will."""
        if threading.get_ident() != self._receiver:
            self._server.trigger.pull_trigger()

    def _turn(self, seconds: float) -> None:
        """Waits so long for what comes, unless there are short questions, and answers some."""
        seconds = 0 if self._short else seconds
        self._server.asyncore.loop(seconds, use_poll=True, map=self._server._map, count=1)
        end = time.perf_counter() + 0.004  # then it receives again
        while self._short and time.perf_counter() < end:
            self._short.popleft().service()


def on_signals(handler: Callable) -> None:
    """Has this called on each of STOPS that is not ignored, as nohup ignores SIGHUP."""
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------- Command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the service until one of STOPS, or a command on a log; the exit status."""
    options = _options(arguments)
    for stream in (sys.stdout, sys.stderr):  # whatever the locale has no letters for
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    handler = logging.StreamHandler()
    handler.setFormatter(LogLines("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    try:
        on_signals(signal.default_int_handler)  # as Ctrl-C, until it serves
        if options.command:
            status = extra("logs").COMMANDS[options.command](options)
            sys.stdout.flush()
            return status
        serve(options)
    except BrokenPipeError:  # whoever read what a command prints has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (BadRequest, ImportError, LogError, OSError) as error:
        named = isinstance(error, OSError) and error.filename
        reason = f"{error.filename}: {error.strerror}" if named else error
        print(one_line(f"bookkeep: {reason}"), file=sys.stderr)
        return 1
    except MemoryError:
        print("bookkeep: there is not enough memory for this log", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        logger.info("stopped before it was done")
        return 130 if options.command else 0
    return 0


def serve(options: argparse.Namespace) -> None:
    """Runs the service. Raises LogError or OSError if it cannot."""
    token = read_token(options.token_file)
    listener = _listen(options.host, options.port)
    host, port = listener.getsockname()[:2]
    if not (token or options.open or ipaddress.ip_address(host).is_loopback):
        raise OSError(
            f"{host} can be reached from other machines: set a token in BOOKKEEP_TOKEN or with "
            "--token-file, or give --open to let anybody read and teach"
        )
    log = Log(options.log)
    welcomes = partial(access_of, token)
    server = Server(starting_app(log), listener, options.threads, options.max_body, welcomes)
    started = time.monotonic()
    open_books: Callable = Bookkeeper
    books = books_for(options.context, options.target, options.isolate)
    if options.stream:
        try:
            open_books = partial(extra("cluster").Node, options.stream)
        except ImportError:
            needed = "nats-py: pip install 'bookkeep-service[cluster]'"
            raise OSError(f"--stream needs bookkeep_extra and {needed}") from None
    reading = _in_background(partial(open_books, log, options.unsaved, books))
    if server.answer(reading):
        raise KeyboardInterrupt
    keeper = reading.result()
    seconds = time.monotonic() - started
    names = {"localhost", "127.0.0.1", "[::1]", options.host.lower(), *options.name}
    hosts = None if token or options.open else sorted(names)
    server.call(create_app(keeper, token, hosts, options.max_body, options.max_batch))
    logger.info(
        "serving on http://%s:%d, log %s, %d bookings read back in %.1f s",
        *(f"[{host}]" if ":" in host else host, port),
        *(log.path, len(keeper.books.history.rows), seconds),
    )
    server.answer()
    keeper.close()
    logger.info("stopped")


def books_for(context: Sequence[str] = (), target: str = TARGET, isolated: bool = False) -> Books:
    """New books that learn from these features. Raises ImportError if they need what is missing."""
    return (extra("isolated").Isolated if isolated else Books)(context, target)


def _in_background(work: Callable[[], T]) -> "Future[T]":
    """What comes of it, in a thread that ends with the process."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def read_token(file: Path | None) -> str | None:
    """The token in the file, or else in BOOKKEEP_TOKEN. Raises OSError if it cannot be one."""
    if file is None and "BOOKKEEP_TOKEN" not in os.environ:
        return None
    token = file.read_text("latin-1").strip() if file else os.environ["BOOKKEEP_TOKEN"]
    if not re.fullmatch("[!-~]+", token):
        raise OSError("a token must be printable ASCII characters, without a space, at least one")
    return token


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bookkeep",
        description="Learns from every booking and suggests the account of the next, over HTTP.",
        epilog="Try it: python replay.py --serve",
    )
    _add_options(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, paths, says in (
        ("check", ("LOG",), "print each problem of a log; the exit status is 0 if it has none"),
        ("suspects", ("LOG",), "print which bookings of a log look wrong, as CSV"),
        (
            *("relearn", ("OLD", "NEW")),
            "book anew, with the options before its name, what is whole of a log of any version, "
            "under its numbers, keys and corrections; print what is left out; the exit status is "
            "0 if nothing is",
        ),
    ):
        command = commands.add_parser(name, help=says, description=says)
        for path in paths:
            command.add_argument(path, type=Path)
    says = "print a token for one company, made from that in --token-file or BOOKKEEP_TOKEN"
    command = commands.add_parser("token", help=says, description=says)
    command.add_argument("--company", required=True, metavar="ID")
    command.add_argument("--read-only", action="store_true", help="it may ask, and change nothing")
    command.add_argument("--days", type=_whole(1, 36_500), default=90, help="until it ends (90)")
    options = parser.parse_args(arguments)
    try:
        check_features(options.context, options.target)
    except BadRequest as error:
        parser.error(str(error))
    return options


def _add_options(parser: argparse.ArgumentParser) -> None:
    def option(
        name: str, help: str, type: Callable = str, default: object = None, **more: object
    ) -> None:
        """Adds --some-thing, which BOOKKEEP_SOME_THING sets, too, unless it is given."""
        variable = f"BOOKKEEP_{name.upper().replace('-', '_')}"
        found = os.environ.get(variable)

        def value(text: str) -> object:
            try:
                return type(text)
            except argparse.ArgumentTypeError as error:
                where = f", as {variable} says" if text is found else ""
                raise argparse.ArgumentTypeError(f"{error}{where}") from None

        usual = f"default: {default}; " if default else ""
        default = default if found is None else found
        added = parser.add_argument(
            f"--{name}", help=f"{help} ({usual}{variable})", default=default, **more
        )
        added.type = value  # which argparse calls with a default that is a text, too

    option("host", "address to listen on", str, "127.0.0.1")
    option("port", "0 for any free one", _whole(0, 65535), 8080)
    keys = "keys of a sample that are features, too, with commas between: Department,Project"
    option("context", keys, lambda text: text.split(","), [], metavar="KEY,KEY")
    option("target", "the key to predict", str, TARGET, metavar="KEY")
    apart = "no company learns of another: docs/how-it-works.md"
    option("isolate", apart, _yes_or_no, False, action="store_true")
    option(
        "name", "names that a proxy calls it by, with commas between", _names, [], metavar="HOST"
    )
    kept = "file that keeps every booking; it is made, and read back at the next start"
    option("log", kept, lambda path: Path(path).absolute(), "data/bookkeep.jsonl")
    stream = "NATS JetStream that holds the log of several bookkeeps: docs/cluster.md"
    option("stream", stream, metavar="nats://HOST:PORT,.../NAME")
    token = "file with a token, which all but /health, /ready and the page need, or BOOKKEEP_TOKEN"
    option("token-file", token, Path, metavar="FILE")
    reach = "listen without a token where other machines can reach it"
    option("open", reach, _yes_or_no, False, action="store_true")
    threads = "requests at work at once: so many that book, so many questions, so many others"
    option("threads", threads, _whole(1, 1000), 16)
    option("max-body", "bytes in one request's body", _whole(1, 1 << 40), MAX_BODY)
    option("max-batch", "samples in one request", _whole(1, 10**9), MAX_BATCH)
    option("unsaved", "lines of the log that its snapshot may lack", _whole(0, 10**18), UNSAVED)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def _whole(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not re.fullmatch("[0-9]{1,19}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} to {most}")
        return int(text)

    return number


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text} is neither yes nor no")
    return text == "yes"


def _names(text: str) -> list[str]:
    names = text.lower().split(",")
    for name in names:
        if not re.fullmatch(r"[\w.-]+|\[[0-9a-f:.]+\]", name, re.ASCII):
            raise argparse.ArgumentTypeError(f"{name} is no name of a host, without a port")
    return names


def _listen(host: str, port: int) -> socket.socket:
    """A socket at the address, so that a port in use shows before the log is read."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", "it is no host name").partition(" (while")[0]
        raise OSError(f"cannot listen on {host}, port {port}: {reason}") from None


if __name__ == "__main__":
    from bookkeep import main  # what stands beside it imports this module under that name, too

    sys.exit(main())
