"""bookkeep: a service that learns from every booking and suggests the account of the next.

`python bookkeep.py` answers HTTP requests: `POST /sample` stores and learns bookings,
`POST /predict` predicts an account, `POST /suggest` says how sure that is and why,
`GET /metrics/<n>` how good the last predictions were; `GET /openapi.json` describes the rest. The
module reads from top to bottom, each section using only those above it: Samples, Counts, Model,
Metrics, Log, Snapshot, Writer, Bookkeeper, API description, HTTP, Server, Command line. At its end
stands the source of the page.

It does not tune itself and forgets only what it is told to forget: one process owns one log, and
the model is the sum of what is in it. cluster.py, beside it, keeps the logs of several equal.
"""

import os
import signal
import sys

if (__name__ == "__main__" or os.path.basename(sys.argv[0]) == "bookkeep") and (
    signal.getsignal(signal.SIGINT) != signal.SIG_IGN
):
    # Quiet from the start: to import all that follows takes a moment. It is main's afterwards.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

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
import re
import resource
import socket
import stat
import threading
import time
import zlib
from array import array
from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from hashlib import blake2b
from itertools import accumulate, chain, count, islice, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

# Requests are answered by threads of its own: those of NumPy's BLAS would only be in their way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import waitress
from bottle import Bottle, HTTPError, Route, request, response
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.receiver import ChunkedReceiver, FixedStreamReceiver
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask

__version__ = "0.4.0"

logger = logging.getLogger("bookkeep")
access = logging.getLogger("bookkeep.access")  # a line for each request

# ---------------------------------------------------------------------------------------- Samples

FEATURES = ("CompanyId", "BankEntryText", "BankEntryAmount")
TARGET = "AccountNumber"
NAME = "AccountName"  # optional: what the company calls the account
BOOKED_BY = "BookedBy"  # optional: who booked it, a person if it is not said
CHECKS = 16  # of the suggestions that could be booked unseen, one in so many is to be checked
TIMES = {"person": 1, "check": CHECKS, "suggestion": 0}  # that such a booking is scored
BY_TIMES = {times: who for who, times in TIMES.items()}

MAX_BATCH = 10_000  # samples in one body
MAX_VALUE = 10_000  # characters in a key or a value
SHORT = ("CompanyId", "BankEntryAmount", TARGET)  # of at most MAX_SHORT characters
MAX_SHORT = 100
MAX_WORDS = 100  # words of a text that become tokens: its first ones

BOUNDS = [-10000, -1000, -100, -10, 0, 10, 100, 1000, 10000]  # each the last of its range
RANGES = (  # of amounts
    "big negative",
    *("> -10000", "> -1000", "> -100", "> -10", "< 10", "< 100", "< 1000", "< 10000"),
    "big positive",
)

KINDS = (  # of tokens, in a person's words
    "company",
    "amount",
    "word",
    "word in this company",
    "first word in this company",
    "first word with this amount in this company",
    "first two words in this company",
    "whole text",
)
KNOWN = (  # what may have been known of a sample, in a person's words, from least to most
    "nothing of the company",
    "nothing of the text",
    "a word",
    "the first word",
    "the first word and the amount",
    "the first two words",
)
KNOWN_BY_KIND = np.array([1, 0, 0, 2, 3, 4, 5, 0])  # if a token of this kind is known
KIND_SHIFT = 60  # a token's kind stands in its upper bits
HASH = (1 << KIND_SHIFT) - 1  # the others
_KIND = [kind << KIND_SHIFT for kind in range(len(KINDS))]

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


def check_samples(content: object, booked: bool, most: int = MAX_BATCH) -> list[Sample]:
    """The samples that a body says: a list, or, unless they must be `booked`, a single one.

    A booked sample must name its account. Raises BadRequest, which counts the samples from 0, also
    if there are more than `most`.
    """
    if isinstance(content, dict) and not booked:
        content = [content]
    if not isinstance(content, list):
        raise BadRequest(f"send a list of samples{'' if booked else ' or one sample'}")
    if len(content) > most:
        raise BadRequest(f"send at most {most} samples in one request, not {len(content)}")
    required = (*FEATURES, TARGET) if booked else FEATURES
    for number, sample in enumerate(content):
        try:
            check_sample(sample, required)
            if booked:
                times_scored(sample)
        except BadRequest as error:
            raise BadRequest(f"sample {number}: {error}") from None
    return content


def check_sample(sample: object, required: Sequence[str], short: Sequence[str] = SHORT) -> None:
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
        if key in short and len(sample[key]) > MAX_SHORT:
            raise BadRequest(f"{key} is longer than {MAX_SHORT} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest("a lone surrogate (half of a \\u pair) is not text") from None


def times_scored(sample: Sample) -> int:
    """How often a booking is scored, by who booked it. Raises BadRequest if that is nobody."""
    booked_by = sample.get(BOOKED_BY, "person")
    if booked_by not in TIMES:
        raise BadRequest(f"{BOOKED_BY} must be one of {', '.join(TIMES)}")
    return TIMES[booked_by]


def tokens(sample: Sample) -> list[int]:
    """The sample's tokens: positive 63-bit integers, the kind and a hash of what they say.

    That any two of five million tokens have the same hash has a probability of less than 1 in
    50,000.
    """
    company, words, amount = _parts(sample)
    c, a, *w = map(_digests.__getitem__, [company, amount, *words])
    made = [c, _KIND[1] | a, *[_KIND[2] | word for word in w]]
    if w:
        kind = _KIND[3]
        made += [kind | hash((c, word)) & HASH for word in w]
        made += [
            _KIND[4] | hash((c, w[0])) & HASH,
            _KIND[5] | hash((c, a, w[0])) & HASH,
            _KIND[6] | hash((c, *w[:2])) & HASH,
            _KIND[7] | hash(tuple(w)) & HASH,
        ]
    return made


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


_digests = Digests()


def wordings(sample: Sample) -> list[tuple[str, str]]:
    """What each of the sample's tokens says to a person: its kind and the sample's own words."""
    company, words, amount = _parts(sample)
    first = [words[0], words[0], " ".join(words[:2]), " ".join(words)] if words else []
    crossed = [(kind, word) for kind in KINDS[2:4] for word in words]
    return [(KINDS[0], company), (KINDS[1], amount), *crossed, *zip(KINDS[4:], first, strict=False)]


def _parts(sample: Sample) -> tuple[str, list[str], str]:
    """The sample's company, the words of its text that count, and its amount, or the range."""
    words = sample["BankEntryText"].split(maxsplit=MAX_WORDS)[:MAX_WORDS]
    return sample["CompanyId"], words, amount_range(sample["BankEntryAmount"])


def amount_range(amount: str) -> str:
    """The range that a plain decimal number is in; any other amount is one of its own.

    -9875.50 -> > -10000, -1000 -> > -10000, 0 -> > -10, 10 -> < 10, 1,200.00 -> 1,200.00
    """
    if _is_decimal(amount):
        return RANGES[bisect_left(BOUNDS, float(amount))]
    return amount


_is_decimal = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?").fullmatch


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


# ----------------------------------------------------------------------------------------- Counts

GRAIN = 1024  # weights are multiples of 1 / GRAIN, so sums of them are exact in any order
DENSE = -1  # the size of a dense row
UNITS = (1 << 40) - 1  # of an entry
MOST_ENTRIES = 1 << 19  # that are at work at once, unless one row has more

Arrays = dict[str, np.ndarray]


class Vocabulary:
    """Gives each token a row: an open hash table with triangular probing, at most 5/8 full.

    A token is an integer above 0 whose lower bits are as good as random. Its row is its slot in the
    table. A table does not grow: who needs more room makes a larger one.
    """

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens  # in each slot, 0 if it is free
        self.most = len(tokens) * 5 // 8
        self.taken = int(np.count_nonzero(tokens))  # slots

    @classmethod
    def with_room(cls, most: int) -> "Vocabulary":
        """An empty table for at least so many tokens."""
        return cls(np.zeros(1 << (most * 8 // 5 + 1).bit_length(), dtype=np.int64))

    def renewed(
        self, live: np.ndarray, tokens: np.ndarray
    ) -> tuple["Vocabulary", np.ndarray, np.ndarray]:
        """A table for the tokens in these rows and (m,) others, the rows of these, and of those."""
        more = len(live) // 8 + len(_run_starts(np.sort(tokens)))
        vocabulary = Vocabulary.with_room(len(live) + more)
        return vocabulary, vocabulary.add(self.tokens[live]), vocabulary.add(tokens)

    def find(self, tokens: np.ndarray) -> np.ndarray:
        """(m,) the row of each token, or the free one that it would get."""
        last = len(self.tokens) - 1
        rows = tokens & last
        there = self.tokens[rows]
        far = ((there != tokens) & (there != 0)).nonzero()[0]
        step = 0
        while len(far):
            step += 1
            rows[far] = at = rows[far] + step & last
            there = self.tokens[at]
            far = far[(there != tokens[far]) & (there != 0)]
        return rows

    def find_each(self, tokens: Iterable[int]) -> list[int]:
        """As find, one token after the other, which for a single document is faster."""
        last, token_at = len(self.tokens) - 1, self.tokens.item
        rows = []
        for token in tokens:
            row, step = token & last, 0
            while token_at(row) not in (token, 0):
                step += 1
                row = row + step & last
            rows.append(row)
        return rows

    def add(self, tokens: np.ndarray) -> np.ndarray | None:
        """(m,) the row of each token, its own from now on; None if there may be no room."""
        rows = self.find(tokens)
        homeless = (self.tokens[rows] != tokens).nonzero()[0]
        new = np.sort(tokens[homeless])
        new = new[_run_starts(new)]
        if self.taken + len(new) > self.most:
            return None
        self.taken += len(new)
        while len(new):
            wanted = self.find(new)
            self.tokens[wanted] = new  # of those that want a slot, one gets it
            new = new[self.tokens[wanted] != new]
        rows[homeless] = self.find(tokens[homeless])
        return rows


class Counts:
    """A sparse matrix of exact sums, token by account, twice: N for an account, M against it.

    Evidence is log (1 + N / alpha) - log (1 + M / beta). Most tokens meet few accounts, an amount
    meets nearly all. So a row is either narrow: a span of entries in one long array, in ascending
    order, with room for the next power of two, that moves to the end when it outgrows that; or
    dense: a strip of a matrix over all accounts, beside which their evidence is kept. An entry is
    one number: the column (2 * account for N, the next one for M) in the upper 23 bits, the sum in
    the lower 40, in units of 1 / GRAIN. Entries that become zero are dropped. A row is dense if it
    has more than `limit` entries, which doubles when too many rows are.
    """

    NARROW = 96  # the limit, as long as there are no more than
    STRIPS = 128  # dense rows

    def __init__(self, alpha: float, beta: float) -> None:
        self._per_unit = 1 / (GRAIN * np.array([alpha, beta]))
        self._sign = np.array([1.0, -1.0])
        self.vocabulary = Vocabulary.with_room(0)
        self.starts = np.zeros(2, dtype=np.int64)  # of each row's span, or which strip it is
        self.sizes = np.zeros(2, dtype=np.int32)  # how many entries each row has, or DENSE
        self.occupied = np.zeros(len(KINDS), dtype=np.int64)  # known tokens of each kind
        self.entries = np.zeros(1, dtype=np.int64)  # the first is in no span
        self.end = 1  # of the last span
        self.limit = self.NARROW
        self.strips = 0  # in use
        self.dense_units = np.zeros((0, 0, 2), dtype=np.int64)  # (strips and room, A and room, 2)
        self.dense_evidence = np.zeros((0, 0))  # (strips and room, A and room)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All e entries of the narrow ones of these rows: (e,) index of the row, column, units."""
        owner, at = self._spans(rows)
        return owner, *_parted(self.entries[at])

    def add_evidence(
        self,
        scores: np.ndarray,
        documents: np.ndarray,
        rows: np.ndarray,
        accounts: np.ndarray | None = None,
    ) -> None:
        """Adds the evidence of m rows to the scores of the document that each is in.

        Scores are (n, A), or (n, k) of the chosen accounts.
        """
        if len(rows) > 1 and np.maximum(self.sizes[rows], 0).sum() > MOST_ENTRIES:
            half = len(rows) // 2
            for part in (slice(half), slice(half, None)):
                self.add_evidence(scores, documents[part], rows[part], accounts)
            return
        owner, column, units = self.take(rows)
        account = column >> 1
        dense = (self.sizes[rows] == DENSE).nonzero()[0]
        strip = self.starts[rows[dense]]
        if accounts is None:
            evidence = self.dense_evidence[:, : scores.shape[1]]
        else:
            strips, strip = np.unique(strip, return_inverse=True)
            evidence = self.dense_evidence[strips[:, np.newaxis], accounts]
            place = np.full(self.dense_evidence.shape[1], -1)
            place[accounts] = np.arange(len(accounts))
            account = place[account]
            units = np.where(account < 0, 0, units)  # the others say nothing
        cell = documents[owner] * scores.shape[1] + account
        np.add.at(scores.reshape(-1), cell, self._evidence(column, units))
        for i, j in zip(documents[dense].tolist(), strip.tolist(), strict=True):
            scores[i] += evidence[j]

    def of_document(self, document: Sequence[int], accounts: int) -> tuple[list[int], np.ndarray]:
        """Of one document: how many known tokens of each kind it has, and (A,) their evidence."""
        size_of, start_of = self.sizes.item, self.starts.item
        lengths, spans = [0] * len(KINDS), [self.entries[:0]]
        evidence = np.zeros(accounts)
        for token, row in zip(document, self.vocabulary.find_each(document), strict=True):
            if size := size_of(row):
                lengths[token >> KIND_SHIFT] += 1
                start = start_of(row)
                if size == DENSE:
                    evidence += self.dense_evidence[start, :accounts]
                else:
                    spans.append(self.entries[start : start + size])
        column, units = _parted(np.concatenate(spans))
        np.add.at(evidence, column >> 1, self._evidence(column, units))
        return lengths, evidence

    def evidence(self, rows: np.ndarray, accounts: np.ndarray) -> np.ndarray:
        """(m, k) the evidence of m rows for each of k accounts."""
        evidence = np.zeros((len(rows), len(accounts)))
        self.add_evidence(evidence, np.arange(len(rows)), rows, accounts)
        return evidence

    def grow(self, accounts: int) -> None:
        """Makes room for so many accounts."""
        strips, room = self.dense_evidence.shape
        if accounts > room:
            self._resize(strips, accounts + accounts // 2)

    def insert(
        self,
        tokens: np.ndarray,
        changing: Callable[[], AbstractContextManager] = nullcontext,
    ) -> np.ndarray:
        """(m,) the row of each token, which has one from now on.

        What `changing` gives is entered to move the rows of others, if there is no more room.
        """
        rows = self.vocabulary.add(tokens)
        if rows is None:
            live = self.sizes.nonzero()[0]  # the others are dropped
            vocabulary, moved, rows = self.vocabulary.renewed(live, tokens)
            starts = np.zeros(len(vocabulary.tokens), dtype=np.int64)
            sizes = np.zeros(len(vocabulary.tokens), dtype=np.int32)
            starts[moved], sizes[moved] = self.starts[live], self.sizes[live]
            with changing():
                self.vocabulary, self.starts, self.sizes = vocabulary, starts, sizes
        return rows

    def add(self, rows: np.ndarray, columns: np.ndarray, units: np.ndarray) -> None:
        """Adds so many units to the sum in each row and column."""
        is_dense = self.sizes[rows] == DENSE
        for add, those in ((self._add_dense, is_dense), (self._add_narrow, ~is_dense)):
            chosen = those.nonzero()[0]
            if len(chosen):
                add(rows[chosen], columns[chosen], units[chosen])

    def _add_dense(self, rows: np.ndarray, columns: np.ndarray, units: np.ndarray) -> None:
        strips, accounts = self.starts[rows], columns >> 1
        cells = strips, accounts, columns & 1
        np.add.at(self.dense_units, cells, units)
        self.dense_evidence[strips, accounts] = self._of_both(self.dense_units[strips, accounts])
        if not self.dense_units[cells].all():
            self._make_narrow(np.unique(rows))

    def _add_narrow(self, rows: np.ndarray, columns: np.ndarray, units: np.ndarray) -> None:
        cells = rows << 24 | columns
        order = cells.argsort()
        first = _run_starts(cells[order])
        cells, units = cells[order[first]], np.add.reduceat(units[order], first)
        rows = cells >> 24
        known = rows[_run_starts(rows)]
        owner, at = self._spans(known)
        old = known[owner] << 24 | self.entries[at] >> 40  # in order, too
        place = old.searchsorted(cells)
        there = np.append(old, -1)[place] == cells
        at = at[place[there]]
        self.entries[at] += units[there]

        # Rows that get new entries, or lose some, are filled anew.
        changed = ~there
        changed[there] = self.entries[at] & UNITS == 0
        if not changed.any():
            return
        anew = rows[changed]
        anew = anew[_run_starts(anew)]
        owner, columns, old_units = self.take(anew)
        cells = np.concatenate([anew[owner] << 24 | columns, cells[~there]])
        units = np.concatenate([old_units, units[~there]])
        order = cells.argsort()
        order = order[units[order] != 0]
        owner = anew.searchsorted(cells[order] >> 24)
        self._fill(anew, owner, cells[order] & 0xFFFFFF, units[order])

    def _fill(
        self, rows: np.ndarray, owner: np.ndarray, columns: np.ndarray, units: np.ndarray
    ) -> None:
        """Puts these entries, in order, into narrow rows, and makes those dense that should be."""
        sizes = np.bincount(owner, minlength=len(rows))
        had = self.sizes[rows]
        room, had_room = _room(sizes), _room(had)
        moved = (room > had_room).nonzero()[0]
        room = room[moved]
        self._make_room(int(room.sum()))
        self.starts[rows[moved]] = self.end + room.cumsum() - room
        self.end += int(room.sum())
        kinds = self.vocabulary.tokens[rows] >> KIND_SHIFT
        np.add.at(self.occupied, kinds, (sizes > 0).astype(np.int64) - (had != 0))
        self.sizes[rows] = sizes
        _, at = self._spans(rows)
        self.entries[at] = columns << 40 | units
        many = sizes > self.limit
        if many.any():
            self._make_dense(rows[many])

    def _make_room(self, more: int) -> None:
        """If so many more entries don't fit, makes more room, or moves all spans together."""
        if self.end + more <= len(self.entries):
            return
        rows = np.flatnonzero(self.sizes > 0)
        sizes = self.sizes[rows]
        room = _room(sizes)
        if int(room.sum()) + more > self.end / 2:
            self.entries = _grown(self.entries, self.end + max(more, self.end // 2))
            return
        starts = 1 + room.cumsum() - room
        entries = np.zeros(len(self.entries) + more, dtype=np.int64)
        entries[_ranges(starts, sizes)[1]] = self.entries[self._spans(rows)[1]]
        self.entries, self.starts[rows], self.end = entries, starts, 1 + int(room.sum())

    def _spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the narrow rows' entries lie, in order, each with its index into `rows`."""
        return _ranges(self.starts[rows], np.maximum(self.sizes[rows], 0))

    def _make_dense(self, rows: np.ndarray) -> None:
        strips = self.strips + np.arange(len(rows))
        self.strips += len(rows)
        if self.strips > len(self.dense_units):
            self._resize(2 * self.strips, self.dense_evidence.shape[1])
        owner, column, units = self.take(rows)
        self.dense_units[strips] = 0
        self.dense_units[strips[owner], column >> 1, column & 1] = units
        self.dense_evidence[strips] = self._of_both(self.dense_units[strips])
        self.starts[rows] = strips
        self.sizes[rows] = DENSE
        while self.strips > self.STRIPS:
            self.limit *= 2
            self._make_narrow(np.flatnonzero(self.sizes == DENSE))

    def _make_narrow(self, rows: np.ndarray) -> None:
        """Makes those of the dense rows narrow that have few enough entries."""
        units = self.dense_units[self.starts[rows]].reshape(len(rows), -1)
        few = np.count_nonzero(units, axis=1) <= self.limit
        if not few.any():
            return
        units = units[few]
        owner, column = units.nonzero()
        self._fill(rows[few], owner, column, units[owner, column])
        dense = np.flatnonzero(self.sizes == DENSE)  # that are left; drops the strips of the others
        strips = self.starts[dense]
        self.dense_units = self.dense_units[strips]
        self.dense_evidence = self.dense_evidence[strips]
        self.strips = len(dense)
        self.starts[dense] = np.arange(self.strips)

    def _resize(self, strips: int, accounts: int) -> None:
        self.dense_units = _grown(self.dense_units, strips, accounts, 2)
        self.dense_evidence = _grown(self.dense_evidence, strips, accounts)

    def _evidence(self, column: np.ndarray, units: np.ndarray) -> np.ndarray:
        against = column & 1
        logs = np.log(1 + units * self._per_unit[against])
        return _rounded(logs * self._sign[against])

    def _of_both(self, units: np.ndarray) -> np.ndarray:
        """(...) the evidence of (..., 2) sums, for and against."""
        return self._evidence(np.arange(2), units).sum(axis=-1)

    def state(self) -> Arrays:
        """All sums; arrays that are its own."""
        return {
            "tokens": self.vocabulary.tokens,
            "starts": self.starts,
            "sizes": self.sizes,
            "entries": self.entries[: self.end],
            "dense_units": self.dense_units[: self.strips],
            "occupied": self.occupied,
            "limit": np.array(self.limit),
        }

    def restore(self, state: Arrays) -> None:
        """Takes over all sums of another."""
        self.limit = int(state["limit"])
        self.vocabulary = Vocabulary(state["tokens"])
        self.starts, self.sizes, self.occupied = (state[k] for k in ("starts", "sizes", "occupied"))
        self.entries, self.dense_units = state["entries"], state["dense_units"]
        self.end, self.strips = len(self.entries), len(self.dense_units)
        self.dense_evidence = self._of_both(self.dense_units)


def _packed(content: object) -> np.ndarray:
    """Its JSON, as an array of bytes."""
    return np.frombuffer(json.dumps(content).encode(), dtype=np.uint8)


def _unpacked(array: np.ndarray) -> object:
    return json.loads(array.tobytes())


def _rounded(logs: np.ndarray) -> np.ndarray:
    """Rounded to multiples of 2 ** -40, so that sums of them are exact in any order, too."""
    return np.rint(logs * 2.0**40) * 2.0**-40


def _parted(entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns, and sums in units of 1 / GRAIN."""
    return entries >> 40, entries & UNITS


def _room(sizes: np.ndarray) -> np.ndarray:
    """The power of two that holds so many entries: 0 -> 0, 1 -> 1, 2 -> 2, 3 -> 4, 5 -> 8."""
    return np.where(sizes > 0, 1 << np.frexp(sizes - 1.0)[1], 0)


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


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers in ranges of these sizes from these starts on, each with its range's index.

    starts [5, 8], sizes [2, 1] -> [0, 0, 1], [5, 6, 8]
    """
    owner = np.arange(len(sizes)).repeat(sizes)
    before = sizes.cumsum() - sizes
    return owner, (starts - before)[owner] + np.arange(len(owner))


# ------------------------------------------------------------------------------------------ Model

ALPHA = 0.1  # smooths what speaks for an account
BETA = 6  # smooths what speaks against it
SOFTENING = 3  # divides scores for the weights: Naive Bayes is too sure of itself
SHARE = 0.75  # of its surprise that a booking counts
FLOOR = 1 / 32  # what it counts at the least, even if it surprises nobody
SECOND = 0.1  # the probability above which a booking counts against a second rival, too
RARE = 96  # entries that a token has at most if the accounts that it has met can be rivals
ROUND = 64  # documents of a batch that are weighed, and learned, at once
CELLS = 1 << 19  # scores that are at work at once, unless one document has more


class Assessment(NamedTuple):
    """What the model made of a booking before it learned it."""

    predicted: str | None  # the most probable account; None while there is no model
    margin: float | None  # its log-odds over the second; None while there is no second
    rank: int | None  # of the booked account, 1 for the most probable; None if it was not known
    known: int  # what was known of it, of KNOWN


class Lesson(NamedTuple):
    """What a document counts for its account, and against which rivals."""

    account: str
    weight: float
    against: Mapping[str, float] = {}


class LookedUp(NamedTuple):
    """n documents whose m tokens have been looked up, for as long as no row moves."""

    lengths: np.ndarray  # (n,) tokens of each document
    kind: np.ndarray  # (m,) of each token
    row: np.ndarray  # (m,) of each token in the counts

    @property
    def document(self) -> np.ndarray:
        """(m,) in which document each token is."""
        return np.arange(len(self.lengths)).repeat(self.lengths)

    @property
    def start(self) -> np.ndarray:
        """(n,) the first token of each document."""
        return self.lengths.cumsum() - self.lengths

    def part(self, documents: slice) -> "LookedUp":
        """Some of the documents."""
        _, at = _ranges(self.start[documents], self.lengths[documents])
        return LookedUp(self.lengths[documents], self.kind[at], self.row[at])


Documents = Sequence[Sequence[int]] | LookedUp


class NaiveBayes:
    """Multinomial Naive Bayes, for and against, over documents of tokens of several kinds.

    The score of an account a (a class) for a document is log P(a | document), up to a constant:

        log N(a) - 1/2 sum over kinds k of n_k log (T_k(a) + alpha V_k)
            + sum over known tokens t of [ log (1 + N(t, a) / alpha) - log (1 + M(t, a) / beta) ]

    N are sums of weights for an account, M against it. n_k is how many known tokens of kind k the
    document has, T_k(a) the weight of a's tokens of kind k, V_k how many tokens of kind k are
    known. With nothing against and 1 for 1/2 it is scikit-learn's MultinomialNB of each kind,
    fitted with sample_weight, added up.

    A document is a list of tokens; n documents with A accounts give (n, A) scores. Accounts count
    from 0 in the order in which they were first seen. Scores are exact sums of rounded logs: the
    same, bit for bit, however many are computed at once.
    """

    def __init__(self, alpha: float = ALPHA, beta: float = BETA) -> None:
        self.alpha = alpha
        self.accounts = _numbers()  # account -> number
        self.names: list[str] = []  # (A,) the accounts by number
        self.token_counts = Counts(alpha, beta)  # N(t, a) and M(t, a)
        self.class_counts = np.zeros(0)  # (A,) N(a)
        self.feature_counts = np.zeros((len(KINDS), 0))  # (kinds, A) T_k(a)
        self._logs: np.ndarray | None = None  # of both, until they change

    @property
    def known(self) -> int:
        """How many accounts it can predict: all that were learned but those wholly unlearned."""
        return int(np.count_nonzero(self.class_counts))

    @property
    def known_tokens(self) -> int:
        """How many tokens it knows."""
        return int(self.token_counts.occupied.sum())

    def joint_log_likelihood(
        self, documents: Documents, accounts: np.ndarray | None = None
    ) -> np.ndarray:
        """(n, A) scores, or (n, k) those of chosen accounts."""
        if isinstance(documents, list) and len(documents) == 1:
            # One token after the other, which for a single document is faster than all at once.
            lengths, evidence = self.token_counts.of_document(documents[0], len(self.names))
            return (np.array([1.0, *lengths]) @ self._log_counts() + evidence)[np.newaxis]
        found = self._look_up(documents)
        document, n, columns = found.document, len(found.lengths), 1 + len(KINDS)
        known = self.token_counts.sizes[found.row].nonzero()[0]
        cell = document[known] * columns + found.kind[known] + 1
        lengths = np.bincount(cell, minlength=n * columns).reshape(n, columns).astype(np.float64)
        lengths[:, 0] = 1
        scores = lengths @ self._log_counts(accounts)
        self.token_counts.add_evidence(scores, document, found.row, accounts)
        return scores

    def _log_counts(self, accounts: np.ndarray | None = None) -> np.ndarray:
        """(1 + kinds, A) log N(a), and - 1/2 log (T_k(a) + alpha V_k) for each kind."""
        if accounts is None and self._logs is not None:
            return self._logs
        chosen = slice(None) if accounts is None else accounts
        occupied = self.token_counts.occupied[:, np.newaxis]
        # A kind without known tokens has no use for its log, which must be finite.
        totals = self.feature_counts[:, chosen] + np.where(occupied, self.alpha * occupied, 1)
        with np.errstate(divide="ignore"):  # an account wholly unlearned: log 0
            logs = _rounded(np.log(np.vstack([self.class_counts[chosen], totals])))
        logs[1:] /= -2
        if accounts is None:
            self._logs = logs
        return logs

    def _look_up(
        self, documents: Documents, rows_of: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> LookedUp:
        if isinstance(documents, LookedUp):
            return documents
        tokens = np.fromiter(chain.from_iterable(documents), dtype=np.int64)
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        row = (rows_of or self.token_counts.vocabulary.find)(tokens)
        return LookedUp(lengths, tokens >> KIND_SHIFT, row)

    def terms(self, document: Sequence[int], accounts: np.ndarray) -> np.ndarray:
        """(k, 1 + T) what makes up the scores of k accounts: the prior, then each of T tokens.

        The difference between two accounts' terms is a list of log-odds that add up to the
        difference of their scores. The terms of an unknown token are 0.
        """
        found = self._look_up([document])
        logs = self._log_counts(accounts)
        terms = self.token_counts.evidence(found.row, accounts)
        known = self.token_counts.sizes[found.row].nonzero()[0]
        terms[known] += logs[1 + found.kind[known]]
        return np.vstack([logs[0], terms]).T

    def predict(self, documents: Sequence[Sequence[int]]) -> list[str]:
        """The most probable account of each document. There must be a model, that is an account."""
        return [
            self.names[best]
            for part in self._blocks(len(documents))
            for best in self._best(self.joint_log_likelihood(documents[part]))[0].tolist()
        ]

    @property
    def at_once(self) -> int:
        """How many documents to score at once: few enough to stay in a processor's cache."""
        return max(1, min(128, CELLS // max(1, len(self.names))))

    def _blocks(self, n: int) -> Iterator[slice]:
        step = self.at_once
        return (slice(start, start + step) for start in range(0, n, step))

    def _best(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) the account of the highest of (n, A) scores, and (n,) its lead over the second.

        Of equals, it is the first by name.
        """
        each = np.arange(len(scores))
        best = scores.argmax(axis=1)
        highest = scores[each, best]
        scores[each, best] = -np.inf
        lead = highest - scores.max(axis=1)
        scores[each, best] = highest
        for i in (lead == 0).nonzero()[0]:
            tied = (scores[i] == highest[i]).nonzero()[0].tolist()
            best[i] = min(tied, key=self.names.__getitem__)
        return best, lead

    def top(self, scores: np.ndarray, most: int) -> np.ndarray:
        """(n, k) the accounts of the highest of (n, A) scores, best first; of equals, by name."""
        each, left = np.arange(len(scores)), scores.copy()
        best = np.zeros((len(scores), min(most, self.known)), dtype=np.int64)
        for rank in range(best.shape[1]):
            best[:, rank] = left.argmax(axis=1)
            left[each, best[:, rank]] = -np.inf
        highest = np.column_stack([np.take_along_axis(scores, best, axis=1), left.max(axis=1)])
        for i in (highest[:, 1:] == highest[:, :-1]).any(axis=1).nonzero()[0]:
            high = np.flatnonzero(scores[i] >= highest[i, -2]).tolist()
            high.sort(key=lambda account, of=scores[i]: (-of[account], self.names[account]))
            best[i] = high[: best.shape[1]]
        return best

    def assess(self, documents: Sequence[Sequence[int]], labels: Sequence[str]) -> list[Assessment]:
        """Predictions for documents whose accounts, the labels, are known."""
        return self._assess(self._look_up(documents), labels)[0]

    def _assess(
        self, found: LookedUp, labels: Sequence[str]
    ) -> tuple[list[Assessment], np.ndarray | None]:
        """The predictions, and the scores of those documents that were scored at once last."""
        if not self.known:
            return [Assessment(None, None, None, 0)] * len(labels), None
        made, scores = [], None
        for part in self._blocks(len(labels)):
            documents = found.part(part)
            scores = self.joint_log_likelihood(documents)
            best, lead = self._best(scores)
            booked = self._numbered(labels[part])
            ranks = (best == booked).astype(np.int64)
            for i in ((best != booked) & (booked >= 0)).nonzero()[0]:
                ranks[i] = np.count_nonzero(scores[i] >= scores[i, booked[i]])
            made += map(
                Assessment,
                [self.names[account] for account in best.tolist()],
                [margin if margin < np.inf else None for margin in lead.round(4).tolist()],
                [rank or None for rank in ranks.tolist()],
                self.specificity(documents).tolist(),
            )
        return made, scores

    def specificity(self, documents: Documents) -> np.ndarray:
        """(n,) the most that was known of each document, of KNOWN."""
        found = self._look_up(documents)
        known = self.token_counts.sizes[found.row] != 0
        return np.maximum.reduceat(known * KNOWN_BY_KIND[found.kind], found.start)

    def _numbered(self, accounts: Sequence[str]) -> np.ndarray:
        """(n,) their numbers, -1 for those that are not known."""
        numbers = np.array([self.accounts.get(account, -1) for account in accounts], dtype=np.int64)
        numbers[self.class_counts[numbers] == 0] = -1
        return numbers

    def weigh(
        self, documents: Documents, labels: Sequence[str], scores: np.ndarray | None = None
    ) -> list[Lesson]:
        """What documents, whose (n, A) scores may be there already, are to count.

        For the label b, max(FLOOR, SHARE (1 - P(b))), much as in the discriminative frequency
        estimate (Su, Zhang, Ling, Matwin, ICML 2008). Against the most probable other account r,
        P(r), and likewise against the second, if its P is above SECOND. P is the posterior,
        softened, over the label and the accounts that the document's rare tokens have met. An
        account not seen before counts 1 and has no rivals. All are multiples of 1 / GRAIN.
        """
        if not self.known:
            return [Lesson(label, 1.0) for label in labels]
        found = self._look_up(documents)
        each = np.arange(len(labels))
        booked = self._numbered(labels)
        own = np.where(booked < 0, self.class_counts.argmax(), booked)  # any, if it is not known
        rare = (self.token_counts.sizes[found.row] <= RARE).nonzero()[0]
        token, column, _ = self.token_counts.take(found.row[rare])
        document = np.concatenate([found.document[rare[token]], each])
        account = np.concatenate([column >> 1, own])
        if scores is not None:
            accounts = np.arange(len(self.names))
        else:  # those of the few accounts that any of the documents has met will do
            few = np.zeros(len(self.names), dtype=bool)
            few[account] = True
            place, accounts = few.cumsum() - 1, few.nonzero()[0]
            account, own = place[account], place[own]
            scores = self.joint_log_likelihood(found, accounts)
        met = np.zeros(scores.shape, dtype=bool)
        met[document, account] = True
        softened = np.where(met, scores, -np.inf) / SOFTENING
        posterior = np.exp((softened - softened.max(axis=1, keepdims=True)).astype(np.float32))
        posterior /= posterior.sum(axis=1, keepdims=True)

        weights = np.maximum(FLOOR, _in_grains(SHARE * (1 - posterior[each, own])))
        weights[booked < 0] = 1
        posterior[each, own] = posterior[booked < 0] = 0
        return list(map(Lesson, labels, weights.tolist(), self._rivals(posterior, accounts)))

    def _rivals(self, posterior: np.ndarray, accounts: np.ndarray) -> list[dict[str, float]]:
        """What n documents count against the two most probable of (n, k) accounts."""
        each = np.arange(len(posterior))
        against: list[dict[str, float]] = [{} for _ in each]
        for least in (0.5 / GRAIN, SECOND):
            rival = posterior.argmax(axis=1)
            probability = posterior[each, rival]
            posterior[each, rival] = 0
            chosen = (probability > least).nonzero()[0]
            counted = _in_grains(probability[chosen]).tolist()
            for i, r, m in zip(chosen, accounts[rival[chosen]], counted, strict=True):
                against[i][self.names[r]] = m
        return against

    def learn(self, documents: Documents, lessons: Sequence[Lesson], times: int = 1) -> None:
        """Adds what documents count to the sums; with times = -1 takes it away again.

        Weights are multiples of 1 / GRAIN, so the sums are exact: the same in any order and any
        batching, and as if it had never been after learning and unlearning.
        """
        if not lessons:
            return
        found = self._look_up(documents, self.token_counts.insert)
        account = np.array([self.accounts[lesson.account] for lesson in lessons])
        weight = np.array([times * lesson.weight for lesson in lessons])
        rivals = [
            (i, 2 * self.accounts[rival] + 1, times * m)
            for i, lesson in enumerate(lessons)
            for rival, m in lesson.against.items()
        ]
        if len(self.accounts) > len(self.names):
            self.names += islice(self.accounts, len(self.names), None)
            self.class_counts = _grown(self.class_counts, len(self.names))
            self.feature_counts = _grown(self.feature_counts, len(KINDS), len(self.names))
            self.token_counts.grow(len(self.names))
        np.add.at(self.class_counts, account, weight)
        cell = found.kind, account.repeat(found.lengths)
        np.add.at(self.feature_counts, cell, weight.repeat(found.lengths))

        against = np.array(rivals).reshape(-1, 3).T
        document = np.concatenate([np.arange(len(lessons)), against[0]]).astype(np.int64)
        column = np.concatenate([2 * account, against[1]]).astype(np.int64)
        units = np.rint(GRAIN * np.concatenate([weight, against[2]])).astype(np.int64)
        of, token = _ranges(found.start[document], found.lengths[document])
        self.token_counts.add(found.row[token], column[of], units[of])
        self._logs = None

    def book(
        self,
        documents: Sequence[Sequence[int]],
        labels: Sequence[str],
        changing: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Iterator[tuple[slice, list[Assessment], list[Lesson]]]:
        """Predicts a batch as a whole, then learns it in rounds, and yields each once learned.

        What `changing` gives is entered for as long as the model changes.
        """
        insert = partial(self.token_counts.insert, changing=changing)
        found = self._look_up(documents, insert)
        assessments, scores = self._assess(found, labels)
        if len(documents) > min(ROUND, self.at_once):
            scores = None  # they are of another model by then, or of some documents only
        for part in rounds(len(documents)):
            taken = found.part(part)
            lessons = self.weigh(taken, labels[part], scores)
            with changing():
                self.learn(taken, lessons)
            yield part, assessments[part], lessons

    def state(self) -> Arrays:
        """All that it has counted; arrays that are its own."""
        return {
            "account_names": _packed(self.names),
            "class_counts": self.class_counts,
            "feature_counts": self.feature_counts,
            **self.token_counts.state(),
        }

    def restore(self, state: Arrays) -> None:
        """Takes over what a model had counted."""
        self.names = _unpacked(state["account_names"])
        self.accounts = _numbers({name: number for number, name in enumerate(self.names)})
        self.class_counts, self.feature_counts = state["class_counts"], state["feature_counts"]
        self.token_counts.restore(state)
        self._logs = None


def rounds(n: int) -> list[slice]:
    """How a batch of n is learned: in rounds of at most ROUND, each of which spans all of it.

    Neighbours, often much alike, are in different rounds, so that the second is weighed by a model
    that has learned the first.
    """
    step = -(-n // ROUND)
    return [slice(start, n, step) for start in range(step)]


def _in_grains(weights: np.ndarray) -> np.ndarray:
    return np.rint(GRAIN * weights.astype(np.float64)) / GRAIN


def _numbers(known: Mapping[Hashable, int] = {}) -> defaultdict:
    """Numbers things in the order in which they are first asked for, on from the known ones."""
    return defaultdict(count(max([-1, *known.values()]) + 1).__next__, known)


# ---------------------------------------------------------------------------------------- Metrics

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)  # of confidence, in a report
CONFUSED = 10  # pairs of accounts, in a report
LEAST_SURE = 10_000  # bookings of which the least sure are asked for: the last ones
WINDOW = 1000  # bookings that a point of the learning curve is over


def precision_recall(
    booked: np.ndarray, predicted: np.ndarray, times: np.ndarray | None = None
) -> tuple[float, float]:
    """Macro-averaged precision and recall, over the labels in either of two (n,) arrays, n > 0.

    A label never predicted has precision 0, one never booked recall 0: scikit-learn's
    precision_score and recall_score with average="macro", zero_division=0. Each of the n counts
    `times`, or once: their sample_weight.
    """
    labels, codes = np.unique(np.concatenate([booked, predicted]), return_inverse=True)
    booked, predicted = codes.reshape(2, -1)
    times = np.ones(len(booked)) if times is None else times
    hits, actual, claimed = (
        np.bincount(numbers, weights, minlength=len(labels))
        for numbers, weights in (
            (booked, times * (booked == predicted)),
            (booked, times),
            (predicted, times),
        )
    )
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
            ("bin", "i1"),  # of the margin for each token
            ("known", "i1"),  # of KNOWN
            ("rank", "i1"),  # of what is booked among what was suggested; 0 if it is no such
            ("times", "i1"),  # that it is scored
            ("reviewed", "?"),  # has a person looked at it?
        ]
    )

    def __init__(self) -> None:
        self.accounts = _numbers()
        self.companies = _numbers()
        self._sizes: Counter[int] = Counter()  # company -> how many bookings
        self._table = np.zeros(1024, dtype=self.ROW)
        # All of them: an array that stays as it is, but for corrections, whatever comes later.
        self.rows = self._table[:0]

    def state(self) -> Arrays:
        """The whole table; arrays that are its own."""
        return {"history": self.rows, "history_names": _packed([self.accounts, self.companies])}

    def restore(self, state: Arrays) -> None:
        """Takes over the table of another."""
        self.accounts, self.companies = map(_numbers, _unpacked(state["history_names"]))
        self.rows = self._table = state["history"]
        companies, sizes = np.unique(self.rows["company"], return_counts=True)
        self._sizes.update(dict(zip(companies.tolist(), sizes.tolist(), strict=True)))

    def append(
        self, rows: np.ndarray, names: Iterable[tuple[str, str, str | None, str | None]]
    ) -> None:
        """Adds rows, and numbers their companies, and the accounts booked, named, and predicted."""
        rows["company"], rows["booked"], rows["named"], rows["predicted"] = (
            np.array(
                [
                    (
                        self.companies[company],
                        *(-1 if each is None else self.accounts[each] for each in accounts),
                    )
                    for company, *accounts in names
                ],
                dtype=np.int32,
            )
            .reshape(-1, 4)
            .T
        )
        end = len(self.rows) + len(rows)
        if end > len(self._table):
            self._table = _grown(self._table, 2 * end)
        self._table[len(self.rows) : end] = rows
        self.rows = self._table[:end]
        self._sizes.update(rows["company"].tolist())

    def size(self, company: str) -> int:
        """How many bookings the company has."""
        return self._sizes[self.companies.get(company)]

    def last(self, n: int, company: str | None = None) -> np.ndarray:
        """The last n rows that are scored, or fewer if there are fewer; of one company."""
        rows = self.rows if company is None else self.of(company)
        size = n
        while True:
            found = scored(rows[-size:])
            if len(found) >= n or size >= len(rows):
                return found[-n:]
            size *= 2

    def of(self, company: str) -> np.ndarray:
        """All rows of a company."""
        rows = self.rows  # once: another thread may append
        return rows[rows["company"] == self.companies.get(company, -1)]

    def find(self, seqs: np.ndarray) -> np.ndarray:
        """(m,) which rows have these seqs."""
        return self.rows["seq"].searchsorted(seqs)

    def at(self, seqs: np.ndarray) -> np.ndarray:
        """(k,) copies of the rows of m seqs, without those that there are not."""
        found, after = self.find(np.array([seqs, seqs + 1]))
        return self.rows[found[found < after]]

    def page(
        self,
        limit: int,
        company: str | None = None,
        reviewed: bool | None = None,
        below: float | None = None,
        by_confidence: bool = False,
        before: tuple[float, int] | None = None,
    ) -> tuple[np.ndarray, tuple[float, int] | None]:
        """(k,) seqs of bookings, newest first, or the least sure of the last LEAST_SURE that match.

        They are at most `limit`, and follow the page that ended with this confidence and seq. And
        with which this one ends, None if nothing follows. This looks at all rows, which takes less
        than a millisecond for each column of a million.
        """
        rows = self.rows
        wanted = np.ones(len(rows), dtype=bool)
        if company is not None:
            wanted &= rows["company"] == self.companies.get(company, -1)
        if reviewed is not None:
            wanted &= rows["reviewed"] == reviewed
        if below is not None:
            wanted &= rows["confidence"] < below
        if below is not None or by_confidence:
            wanted &= rows["predicted"] >= 0
        sure, last = before or (-1, sys.maxsize)
        if by_confidence:
            found = rows[wanted.nonzero()[0][: -LEAST_SURE - 1 : -1]]
            found = found[found["confidence"].argsort(kind="stable")]
            as_sure = (found["confidence"] == sure) & (found["seq"] < last)
            found = found[(found["confidence"] > sure) | as_sure]
        else:
            wanted &= rows["seq"] < last
            found = rows[wanted.nonzero()[0][: -limit - 2 : -1]]
        page = found[:limit]
        end = page[["confidence", "seq"]][-1].item() if len(found) > limit else None
        return page["seq"], end

    def last_named(self, companies: np.ndarray, accounts: np.ndarray) -> np.ndarray:
        """(n,) the seqs of the last bookings in which n companies named n accounts, -1 if none."""
        seqs = np.full(len(companies), -1)
        rest, size = self.rows, 1 << 14
        while len(rest) and (missing := seqs < 0).any():  # most are found among the last rows
            rest, rows = rest[:-size], rest[-size:]
            whose, company = np.unique(companies[missing], return_inverse=True)
            which, account = np.unique(accounts[missing], return_inverse=True)
            at = np.isin(rows["named"], which).nonzero()[0]
            at = at[np.isin(rows["company"][at], whose)]
            cell = whose.searchsorted(rows["company"][at]), which.searchsorted(rows["named"][at])
            last = np.full((len(whose), len(which)), -1)
            last[cell] = rows["seq"][at]  # of those in one cell, the last one stays
            seqs[missing], size = last[company, account], 2 * size
        return seqs

    def correct(self, seq: int, account: str, rank: int) -> None:
        """Has a person book an account, which had that rank, in the row of that seq."""
        row = self.rows[self.find(seq)]  # a view
        row["booked"], row["rank"], row["reviewed"] = self.accounts[account], rank, True

    def forget(self, seqs: np.ndarray) -> np.ndarray:
        """Drops the rows of these (m,) seqs, or of those that have one, and gives them."""
        gone = np.isin(self.rows["seq"], seqs)
        rows = self.rows[gone]
        self.rows = self._table = self.rows[~gone]
        self._sizes.subtract(rows["company"].tolist())
        for company, number in [*self.companies.items()]:
            if not self._sizes[number]:
                del self.companies[company], self._sizes[number]
        return rows


def right(rows: np.ndarray) -> np.ndarray:
    """(n,) which of these rows of a History were predicted right."""
    return rows["booked"] == rows["predicted"]


def scored(rows: np.ndarray) -> np.ndarray:
    """Those of these rows of a History that were predicted, and booked by who knew better."""
    return rows[(rows["predicted"] >= 0) & (rows["times"] > 0)]


class Calibration:
    """What a suggestion is worth: the share of earlier ones like it that were right.

    "Like it" gets narrower as there is evidence, and each step starts from the one before:
    as much evidence (g); of all companies, with as much known, too (p0); this company's own of
    these (p1); its own for this account, whatever was known (p2).

        g  = right / (all + 2), made monotone
        p0 = (right + 2 g) / (all + 2), made monotone
        p1 = (right + 20 p0) / (all + 20 + 1/4)
        p2 = (right + 20 p1) / (all + 20 + 1/4)

    "As much evidence" is the same bin of the margin (log-odds) for each token, for Naive Bayes
    takes each token for independent of the others and is the surer the more there are; in the last
    two, the same wide bin or one beside it. Shares are made monotone over the bins by pooling
    adjacent violators (Ayer et al., 1955). All that is kept are whole numbers: any order gives the
    same, and what is taken away leaves no trace.
    """

    BINS = 48  # six for each doubling of 1 / 8 + margin
    WIDE = 4  # bins in a wide one
    RANKS = 20  # suggestions that get a confidence
    DOUBT = 2  # wrong ones that are added to those of all companies
    BACK = 2  # suggestions that g counts in p0
    OWN = 20  # suggestions that p0 counts in p1, and p1 in p2
    OWN_DOUBT = 1 / 4  # of a wrong one that is added to a company's own: the best are often lucky

    def __init__(self) -> None:
        self._all = np.zeros((len(KNOWN), self.BINS), dtype=np.int64)  # suggestions of everybody's
        self._right = np.zeros((len(KNOWN), self.BINS), dtype=np.int64)
        self._ranks = np.zeros(self.RANKS + 1, dtype=np.int64)  # of the others' accounts, 0: beyond
        self._cells = Vocabulary.with_room(0)  # of a company, what was known or an account, a bin
        self._own = np.zeros((len(self._cells.tokens), 2), dtype=np.int32)  # all, right of each
        self._shares: dict[int, np.ndarray] = {}  # what was known -> (BINS,) p0, until it changes

    def add(self, rows: np.ndarray, times: int = 1) -> None:
        """Counts those rows of a History that are scored; with times = -1 takes them away again.

        A row that counts 16 times, for others that nobody looked at, is one of the company's own.
        """
        rows = scored(rows)
        hit = right(rows)
        counted = times * rows["times"].astype(np.int64)
        np.add.at(self._all, (rows["known"], rows["bin"]), counted)
        np.add.at(self._right, (rows["known"], rows["bin"]), counted * hit)
        np.add.at(self._ranks, rows["rank"][~hit], counted[~hit])
        self._shares = {}
        own = rows["known"] > 0  # else it says nothing of the company
        cells = self._cells_of(rows[own], np.array([0])).ravel()
        sums = np.column_stack([own[own], hit[own]]).repeat(2, axis=0)
        at = self._inserted(cells)
        np.add.at(self._own, at, times * sums)

    def _cells_of(self, rows: np.ndarray, near: np.ndarray) -> np.ndarray:
        """(n, 2, k) cells of n rows, by what was known and by account, in k wide bins near it."""
        # One more, for a name without a number has -1, and what is nearest to the first bin, too.
        company = 1 + rows["company"].astype(np.int64)[:, np.newaxis, np.newaxis]
        level = np.stack([rows["known"], len(KNOWN) + 1 + rows["predicted"]], axis=1)
        wide = 1 + rows["bin"][:, np.newaxis] // self.WIDE + near
        cells = company << 36 | level[:, :, np.newaxis] << 4 | wide[:, np.newaxis]
        cells = cells.astype(np.uint64)
        cells *= np.uint64(0x9E3779B97F4A7C15)  # spreads them over the table's slots
        return (cells ^ cells >> 40).astype(np.int64) & (1 << 63) - 1

    def _inserted(self, cells: np.ndarray) -> np.ndarray:
        """(m,) the rows of cells, which are there from now on."""
        rows = self._cells.add(cells)
        if rows is None:
            live = self._own[:, 0].nonzero()[0]  # the others are dropped
            self._cells, moved, rows = self._cells.renewed(live, cells)
            own = np.zeros((len(self._cells.tokens), 2), dtype=np.int32)
            own[moved] = self._own[live]
            self._own = own
        return rows

    def _own_of(self, rows: np.ndarray) -> np.ndarray:
        """(n, 2, 2) the company's own, by what was known and by account: all, right."""
        cells = self._cells_of(rows, np.array([-1, 0, 1]))
        return self._own[self._cells.find(cells.ravel())].reshape(*cells.shape, 2).sum(axis=2)

    def state(self) -> Arrays:
        """All that it has counted; arrays that are its own."""
        return {
            "suggestions": self._all,
            "suggestions_right": self._right,
            "ranks": self._ranks,
            "cells": self._cells.tokens,
            "own": self._own,
        }

    def restore(self, state: Arrays) -> None:
        """Takes over what another had counted."""
        self._all, self._right = state["suggestions"], state["suggestions_right"]
        self._ranks, self._own = state["ranks"], state["own"]
        self._cells, self._shares = Vocabulary(state["cells"]), {}

    def confidence(self, rows: np.ndarray) -> np.ndarray:
        """(n,) the probability that each suggestion is right, from the rows that it would get.

        What matters is their bin, and what was known, company and account predicted, where -1
        stands for one that no row has.
        """
        families = zip(rows["known"].tolist(), rows["bin"].tolist(), strict=True)
        share = np.array([self._share(known)[bin] for known, bin in families])
        for suggestions, hits in self._own_of(rows).transpose(1, 2, 0):
            share = (hits + self.OWN * share) / (suggestions + self.OWN + self.OWN_DOUBT)
        return share

    def shared(self, confidence: np.ndarray) -> np.ndarray:
        """(n, RANKS) the confidence of n first suggestions and of the others, best first.

        These share what it leaves as the ranks of wrongly predicted accounts have been.
        """
        counted = self._ranks.sum() + self.DOUBT
        others = np.multiply.outer(1 - confidence, self._ranks[2:]) / counted
        return np.minimum.accumulate(np.column_stack([confidence, others]), axis=1)

    def record(self, rows: np.ndarray) -> list[dict[str, dict[str, int]]]:
        """What the confidences of n suggestions rest on, with about as much evidence."""
        wide = rows["bin"] // self.WIDE
        first, end = np.maximum(wide - 1, 0) * self.WIDE, (wide + 2) * self.WIDE
        sums = np.zeros((2, len(KNOWN), self.BINS + self.WIDE + 1), dtype=np.int64)
        sums[:, :, 1 : self.BINS + 1] = [self._all, self._right]
        sums = sums.cumsum(axis=-1)  # up to each bin
        everybodys = (sums[:, rows["known"], end] - sums[:, rows["known"], first]).T
        return [
            {
                "own": {"suggestions": own, "right": own_right},
                "all": {"suggestions": suggestions, "right": right},
            }
            for (own, own_right), (suggestions, right) in zip(
                self._own_of(rows)[:, 1].tolist(), everybodys.tolist(), strict=True
            )
        ]

    @classmethod
    def bins(cls, margins: Sequence[float]) -> np.ndarray:
        """(n,) the bins of margins for each token."""
        doublings = np.log2(1 + 8 * np.asarray(margins, dtype=np.float64))
        return np.minimum(6 * doublings, cls.BINS - 1).astype(np.int64)

    def _share(self, known: int) -> np.ndarray:
        """(BINS,) p0 of what was known."""
        if known not in self._shares:
            anybodys = self._all.sum(axis=0)
            g = _monotone(self._right.sum(axis=0), anybodys + self.DOUBT * (anybodys > 0))
            right = self._right[known] + self.BACK * g
            counted = self._all[known] + self.BACK * (anybodys > 0)
            self._shares[known] = _monotone(right, counted)
        return self._shares[known]


def _monotone(right: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """(BINS,) the share that was right, monotone; an empty bin's is that of the one before."""
    blocks: list[tuple[float, float, int]] = []  # right, all, first bin
    for first, (hits, size) in enumerate(zip(right.tolist(), counted.tolist(), strict=True)):
        if size:
            while blocks and hits * blocks[-1][1] <= blocks[-1][0] * size:
                more_hits, more, first = blocks.pop()
                hits, size = hits + more_hits, size + more
            blocks.append((hits, size, first))
    shares = np.zeros(len(counted))
    for hits, size, first in blocks:
        shares[first:] = hits / size
    return shares


def figures(rows: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-averaged precision and recall of n > 0 scored rows of a History."""
    precision, recall = precision_recall(rows["booked"], rows["predicted"], rows["times"])
    return {"accuracy": _accuracy(rows)[0], "precision": precision, "recall": recall}


def _accuracy(rows: np.ndarray) -> tuple[float, float]:
    """The share of n > 0 scored rows that were right, and its standard error.

    That is as if one more row, of those that count most, had been wrong: a few right ones are not
    a certainty.
    """
    times, hit = rows["times"].astype(np.float64), right(rows)
    accuracy = float(times @ hit / times.sum())
    off = times * (hit - accuracy)
    return accuracy, math.sqrt(off @ off + times.max() ** 2) / float(times.sum())


def by_confidence(rows: np.ndarray, levels: Iterable[float]) -> list[dict[str, float | None]]:
    """For each level, what share of n > 0 scored rows was at least so sure, and its accuracy.

    Also the accuracy's standard error, and how many of them are checks, which stand for many.
    """
    found = []
    for level in levels:
        sure = rows[rows["confidence"] >= level]
        accuracy, error = _accuracy(sure) if len(sure) else (None, None)
        found.append(
            {
                "at_least": level,
                "share": int(sure["times"].sum()) / int(rows["times"].sum()),
                "accuracy": accuracy,
                "error": error,
                "checks": checks(sure),
            }
        )
    return found


def checks(rows: np.ndarray) -> int:
    """How many of these rows of a History are checks of what could have been booked unseen."""
    return int(np.count_nonzero(rows["times"] > 1))


def unseen(rows: np.ndarray) -> int:
    """How many of these rows of a History nobody has looked at."""
    return len(rows) - int(np.count_nonzero(rows["reviewed"]))


def report(rows: np.ndarray, accounts: Sequence[str], levels: Iterable[float]) -> dict:
    """How good n > 0 predictions were, which accounts they confused, and how good when how sure.

    The rows are scored ones of a History.
    """
    wrong = rows[~right(rows)]
    pairs = wrong["booked"].astype(np.int64) << 32 | wrong["predicted"]
    pairs, codes = np.unique(pairs, return_inverse=True)
    counts = np.bincount(codes, wrong["times"]).astype(np.int64)
    confused = [
        (-count, accounts[pair >> 32], accounts[pair & 0xFFFFFFFF])
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)
    ]
    return {
        "checks": checks(rows),
        **figures(rows),
        "confused": [
            {"booked": booked, "predicted": predicted, "count": -count}
            for count, booked, predicted in sorted(confused)[:CONFUSED]
        ],
        "confidence": by_confidence(rows, levels),
    }


def curve(rows: np.ndarray, points: dict[int, dict]) -> Iterator[dict]:
    """The learning curve: at most 129 points, each of the last WINDOW bookings.

    Takes `points` of before, and adds those that will not change.
    """
    step = WINDOW // 4
    while len(rows) > 128 * step:
        step *= 2
    for end in (*range(step, len(rows), step), len(rows)):
        point = points.get(end)
        if point is None:
            window = scored(rows[max(0, end - WINDOW) : end])
            point = {"bookings": end, **figures(window)} if len(window) else {}
            if end < len(rows):
                points[end] = point
        if point:
            yield point


# -------------------------------------------------------------------------------------------- Log

# A booking, a correction of it, and what is left once its company is forgotten, as lines of a log
# (wrapped here). A record stands between its place and the CRC-32 of the line before it.
#
#   {"seq": 2, "batch": "june-1", "left": 0, "sample": {"CompanyId": "acme", "BankEntryText":
#     "Office rent June", "BankEntryAmount": "> -10000", "AccountNumber": "6300"}, "predicted":
#     "6300", "margin": 19.1832, "confidence": 0.0, "rank": 1, "known": 5, "weight": 0.03125,
#     "against": {"7140": 0.001953125}, "crc": 4002900356}
#   {"seq": 3, "batch": 3, "left": 0, "corrects": 2, "AccountNumber": "7140", "weight":
#     0.7490234375, "against": {"6300": 0.9990234375}, "crc": 2220480574}
#   {"seq": 3, "batch": 3, "left": 0, "crc": 4241497597}

PLACE = ("seq", "batch", "left")  # what the log puts before a record
HEAD = b'{"seq": 0, '  # what a log starts with
REWRITTEN = ".{}.rewritten"  # beside the log, while it is written anew
UNSURE = "it may hold this all the same, so that only a key makes it safe to send it again"
MAX_KEYS = 100_000  # keys of batches that are remembered, the last ones: about 30 MB


class LogError(Exception):
    """The log cannot be used; the message says which, where and why."""


class Log:
    """A JSON Lines file of batches of records, owned by one process, that grows at its end.

    `seq` counts lines from 0, `batch` is the sender's key for the batch (or else the seq of its
    first line), `left` counts the batch down to 0: it is in the log once its line with `left` 0 is.
    A record that was removed leaves an empty one in its place.
    """

    def __init__(self, path: Path) -> None:
        """Opens the log or makes it, with its folder. Raises LogError if it cannot be owned."""
        self.path = path
        self.size = 0  # bytes of whole batches
        self.fsynced: Callable[[float], object] = lambda seconds: None  # told how long each took
        # Called with what has its place, before it is written: what it raises prevents that.
        self.order: Callable[[list[Batch]], object] = lambda batches: None
        self._starts = array("q")  # the byte at which each line of a whole batch starts
        self._torn = False  # may the file hold bytes beyond them?
        self.failure: str | None = None  # why the last append failed, if it did
        self._keys: OrderedDict[str, range] = OrderedDict()  # of batches -> their lines
        self._placing = threading.RLock()  # held while lines get their places, or are looked up
        try:
            folders = self.beside("{}").parents
            new = sum(not folder.exists() for folder in folders)
            with suppress(FileExistsError):  # if it is a file, opening says so better
                folders[0].mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            for folder in folders[: 1 + new]:  # so that new names are on disk, too
                _fsync_folder(folder)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._leads_to(self._file):
                raise BlockingIOError  # its owner has just put another file in its place
            self.beside(REWRITTEN).unlink(missing_ok=True)  # a crash left it unfinished
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
        with self._placing:
            return self._leads_to(self._file) and os.fstat(self._file).st_size >= self.size

    def _require_place(self) -> None:
        if not self.in_place():
            raise OSError(errno.ESTALE, "it was moved, replaced, deleted or cut by another")

    def _leads_to(self, file: int) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        return False

    def state(self) -> Arrays:
        """Where its lines are."""
        keys = [[key, lines.start, lines.stop] for key, lines in self._keys.items()]
        return {"line_starts": np.array(self._starts), "keys": _packed([self.size, keys])}

    def restore(self, state: Arrays) -> None:
        """Takes over where lines are, so that only later ones are read; nothing, if it raises."""
        size, keys = _unpacked(state["keys"])
        keys = OrderedDict((key, range(start, stop)) for key, start, stop in keys)
        self._starts, self.size = array("q", state["line_starts"].tobytes()), size
        self._keys = keys

    def progress(self) -> str:
        """How much of the file has been read."""
        return f"{self.size >> 20} of {os.fstat(self._file).st_size >> 20} MB"

    def checksum(self, size: int) -> int | None:
        """The CRC-32 of its first bytes, so many; None if there are fewer."""
        crc = 0
        with self._opened() as file:
            for piece in _pieces(file, size):
                crc = zlib.crc32(piece, crc)
            return crc if file.tell() == size else None

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
            elif found.unfinished:
                self._cut_off(found)
            else:
                raise self.damaged(found)

    def _cut_off(self, end: "Damage") -> None:
        """Moves what follows the last whole batch to LOG.cut: it cannot be told from damage."""
        path = self.beside("{}.cut")
        cut = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with self._opened() as lines, open(cut, "wb") as file:
            lines.seek(self.size)
            file.write(lines.read())
            file.flush()
            os.fsync(cut)
        _fsync_folder(path.parent)
        self._cut_back()
        logger.warning("%s, line %d: %s; they are kept in %s", self.path, *end[:2], path)

    def append(self, batches: list[tuple[str | None, list[dict]]]) -> list[dict]:
        """Writes batches, with or without a key, with one fsync: then they are on disk.

        The answer is all records with their places. Raises OSError if they could not be written;
        then the log is as it was before, unless the error says that it may not be.
        """
        placed, first = [], len(self)
        for key, records in batches:
            batch, end = first if key is None else key, first + len(records)
            records = [
                {"seq": seq, "batch": batch, "left": end - seq - 1} | record
                for seq, record in enumerate(records, start=first)
            ]
            placed.append(Batch(records, [_line(record) for record in records], first + 1))
            first = end
        self.order(placed)
        self.write(placed)
        return [record for batch in placed for record in batch.records]

    def write(self, batches: list["Batch"]) -> None:
        """Writes what was placed. Raises OSError, as append does."""
        self._require_place()
        if self._torn:
            self._cut_back()
        try:
            self._torn = True
            unwritten = memoryview(b"".join(line for batch in batches for line in batch.lines))
            while unwritten:
                unwritten = unwritten[os.write(self._file, unwritten) :]
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
        for batch in batches:
            self.failure = None if batch.lines else self.failure
            self._keep(batch)

    def find(self, key: str) -> list[dict] | None:
        """The records of the batch of that key, if it is one of the last MAX_KEYS; or as record."""
        self._require_place()
        lines = self._keys.get(key)
        return None if lines is None else [self.record(seq) for seq in lines]

    def record(self, seq: int) -> dict:
        """The record of that seq, with its place. Raises ValueError or OSError if it is damaged."""
        with self._placing:
            start, end = self._start(seq), self._start(seq + 1)
            line = os.pread(self._file, end - start, start)
        return _parse(line)

    def export(self, seqs: range) -> tuple[BinaryIO, int]:
        """A file at the first of these lines, and how many bytes to read; of those that exist."""
        with self._placing:
            start, end = self._start(seqs.start), self._start(seqs.stop)
            file = self._opened()
        file.seek(start)
        return file, max(0, end - start)

    def export_some(self, seqs: np.ndarray) -> tuple["Lines", int]:
        """Lines of these seqs, which exist, as a file of their own, and how many bytes it has."""
        with self._placing:
            starts = np.append(np.array(self._starts), self.size)
            file = self._opened()
        lines = Lines(file, starts[seqs], starts[seqs + 1] - starts[seqs])
        return lines, lines.size

    def _opened(self) -> BinaryIO:
        """The file that is owned, whatever stands at its path by now, opened once more."""
        return open(f"/proc/self/fd/{self._file}", "rb")

    def _start(self, seq: int) -> int:
        return self._starts[seq] if seq < len(self) else self.size

    def replace(self, copy: "Copy") -> None:
        """Takes a copy of all lines for the log; from then on the copy is what was the log.

        A crash leaves the one or the other. Raises OSError if nothing has changed, and LogError if
        it has, but may not be on disk.
        """
        path = self.beside("{}")
        with self._placing:
            self._require_place()
            try:
                fcntl.flock(copy.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.fchmod(copy.file, stat.S_IMODE(os.fstat(self._file).st_mode))
                os.replace(copy.path, path)
            except OSError:
                if not self._leads_to(copy.file):  # else it was done all the same
                    raise
            self._file, copy.file = copy.file, self._file
            self._starts, copy.starts = copy.starts, self._starts
            self.size, copy.size, self._torn = copy.size, self.size, False
        try:
            _fsync_folder(path.parent)
        except OSError as error:
            raise LogError(f"cannot be sure of {path}: {error.strerror}") from None

    def close(self) -> None:
        """Lets another process own the log, without what a failed append left, if that can be."""
        if self._torn:
            with suppress(OSError):
                self._cut_back()
        os.close(self._file)

    def damaged(self, damage: "Damage") -> LogError:
        """What to raise when a line makes no sense."""
        return LogError(
            f"{self.path} is damaged, line {damage.line}: {damage.reason}; restore it, or see what "
            f"python bookkeep.py check {self.path} --repair can keep of it"
        )

    def _keep(self, batch: "Batch") -> None:
        """Counts a whole batch that stands behind all others."""
        first = len(self)
        with self._placing:
            for line in batch.lines:
                self._starts.append(self.size)
                self.size += len(line)
        key = batch.records[0]["batch"] if batch.records else None
        if isinstance(key, str):  # its sender's; from now on, another thread may find it
            self._keys[key] = range(first, len(self))
            if len(self._keys) > MAX_KEYS:
                self._keys.popitem(last=False)

    def _cut_back(self) -> None:
        os.ftruncate(self._file, self.size)
        os.fsync(self._file)
        self._torn = False


class Copy(AbstractContextManager):
    """A log's lines, some of them emptied, in a file that may take the log's place."""

    def __init__(self, log: Log) -> None:
        """Starts without a line. Raises OSError."""
        self.log = log
        self.path = log.beside(REWRITTEN)
        self.path.unlink(missing_ok=True)
        self.file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        self.starts = array("q")
        self.size = 0

    def __exit__(self, *_: object) -> None:
        """Removes the file, unless it is the log by now, and lets go of it, or of the old log."""
        with suppress(OSError):
            os.close(self.file)
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def extend(self, emptied: np.ndarray, to: int) -> None:
        """Adds lines up to that one, with (m,) emptied ones, by seq in order, onto the disk.

        Raises OSError, or ValueError if a line that is to be emptied is damaged.
        """
        first = len(self.starts)
        with self.log._placing:
            starts = np.append(np.array(self.log._starts[first:to]), self.log._start(to))
        sizes = np.diff(starts)
        with self.log._opened() as lines, open(self.file, "ab", closefd=False) as copy:
            lines.seek(starts[0])
            for line in (emptied[emptied >= first] - first).tolist():
                copy.writelines(_pieces(lines, starts[line] - lines.tell()))
                empty = _emptied(lines.read(sizes[line]), first + line + 1)
                sizes[line] = copy.write(empty)
            copy.writelines(_pieces(lines, starts[-1] - lines.tell()))
        os.fsync(self.file)
        self.starts.frombytes((self.size + sizes.cumsum() - sizes).tobytes())
        self.size += int(sizes.sum())

    def record(self, seq: int) -> dict:
        """The record of that seq. Raises ValueError or OSError if it is damaged."""
        start, end = [*self.starts[seq : seq + 2], self.size][:2]
        return _parse(os.pread(self.file, end - start, start))


class Lines(io.RawIOBase):
    """Some lines of a file, as a file of their own."""

    def __init__(self, file: BinaryIO, starts: np.ndarray, sizes: np.ndarray) -> None:
        self._file = file
        self._ends = sizes.cumsum()  # of the lines, here
        self._shifts = starts + sizes - self._ends  # from here to there
        self._at = 0
        self.size = int(sizes.sum())

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Where it stands now."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """At most so many bytes, or the rest."""
        end = self.size if size < 0 else min(self._at + size, self.size)
        pieces = []
        line = int(self._ends.searchsorted(self._at, side="right"))
        while self._at < end:
            stop = min(end, int(self._ends[line]))
            shift = int(self._shifts[line])
            pieces.append(os.pread(self._file.fileno(), stop - self._at, self._at + shift))
            self._at, line = stop, line + 1
        return b"".join(pieces)

    def close(self) -> None:
        """Closes the file that has the lines, too."""
        self._file.close()
        super().close()


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


Line = tuple[int, bytes, dict | ValueError | None]


def scan(path: Path, start: int = 0, before: int = 0) -> Iterator[Batch | Damage]:
    """What is in the log, in order; after a damage, the batches that are surely whole.

    It starts at a byte behind which the whole batches before it have so many lines. All that
    follows the last whole batch is one damage.
    """
    with open(path, "rb") as lines:
        if start:  # else it may be a pipe
            lines.seek(start)
        yield from batches_of(lines, before)


def batches_of(lines: Iterable[bytes], before: int) -> Iterator[Batch | Damage]:
    """What lines hold of which a log has so many before them; as `scan`."""
    last, size, head = before, 0, b""  # lines up to the last whole batch; what follows it
    damages: list[Damage] = []
    unfinished = True
    for number, line, found in _batches(_parsed(lines, before), before):
        if isinstance(found, Batch):
            yield from damages
            yield found
            last, size, damages, unfinished = number, 0, [], True
            continue
        if found:
            damages.append(Damage(found.line, found.reason))
            unfinished &= found.unfinished
        head = head or line[: len(HEAD)]
        size += len(line)
    if not last and any(got not in (due, 0) for got, due in zip(head, HEAD, strict=False)):
        yield Damage(1, "this is no log")
    elif size and unfinished:  # a power failure leaves holes in what is not on disk yet
        yield Damage(last + 1, f"the batch is unfinished; a start cuts off {size} bytes", True)
    else:
        yield from damages


def _batches(lines: Iterable[Line], before: int) -> Iterator[tuple]:
    """Each line with its number, and the batch that it ends or what is wrong with it."""
    seq, left, name = before - 1, 0, None  # of the line before
    batch: Batch | None = Batch([], [], 0)  # the unfinished one, None if lines of it are missing
    unreadable = 0  # lines before it
    for (number, line, record), (_, _, after) in pairwise(lines):
        if isinstance(record, ValueError):
            yield number, line, None if unreadable else Damage(number, str(record), True)
            unreadable += 1
            continue
        missing = record["seq"] - seq - 1
        if missing < 0 or (missing and isinstance(after, dict) and after["seq"] == seq + 1):
            yield number, line, Damage(number, f"booking {record['seq']} does not belong here")
            continue
        if missing > unreadable:
            reason = f"{missing - unreadable} bookings are missing before it"
            yield number, b"", Damage(number, reason, True)
        # A batch starts where the one before ends, and one without a key says where it starts.
        if left == missing or record["batch"] == record["seq"]:
            if left > missing:
                yield number, b"", Damage(number, "the batch before it is unfinished", True)
            batch = Batch([], [], number)
        elif missing:
            batch = None
        elif (name, left - 1) != (record["batch"], record["left"]):
            yield number, b"", Damage(number, "it does not belong to the batch before it")
            batch = None
        seq, left, name, unreadable = record["seq"], record["left"], record["batch"], 0
        if batch is not None:
            batch.records.append(record)
            batch.lines.append(line)
        yield number, line, batch if left == 0 else None


def _parsed(lines: Iterable[bytes], before: int) -> Iterator[Line]:
    """The lines, as bytes and as records, or what is wrong with them; and then no line."""
    for number, line in enumerate(lines, start=before + 1):
        try:
            yield number, line, _parse(line)
        except ValueError as error:
            yield number, line, error
    yield 0, b"", None


_encode = json.JSONEncoder(ensure_ascii=False).encode
_decode_line = json.JSONDecoder().decode


def _line(record: dict) -> bytes:
    return _sealed(_encode(record)[:-1].encode())


def _sealed(text: bytes) -> bytes:
    """The line whose record is this text, but for its end."""
    return b'%s, "crc": %d}\n' % (text, zlib.crc32(text))


def _unsealed(line: bytes) -> bytes:
    """The text that was sealed. Raises ValueError unless the line is as it was written."""
    text, _, checksum = line.rpartition(b', "crc": ')
    if checksum != b"%d}\n" % zlib.crc32(text):
        raise ValueError("the checksum does not fit")
    return text


def _parse(line: bytes) -> dict:
    """The record on the line. Raises ValueError unless the line is as it was written."""
    record = _decode_line(_unsealed(line).decode() + "}")
    seq, batch, left = map(record.get, PLACE)
    if not (isinstance(seq, int) and isinstance(batch, int | str) and isinstance(left, int)):
        raise ValueError("it has no place in the log")
    return record


def _emptied(line: bytes, number: int) -> bytes:
    """A line with its place, but without its record. Raises ValueError if it is damaged."""
    place = rb'\{"seq": \d+, "batch": (\d+|"([^"\\]|\\.)*"), "left": \d+'
    try:
        return _sealed(re.match(place, _unsealed(line))[0])
    except (TypeError, ValueError):  # there is no place, or the line is not as it was written
        raise ValueError(f"line {number} of the log could not be read") from None


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """So many bytes of the file, or all that it has, a piece at a time."""
    while size and (piece := file.read(min(size, 1 << 20))):
        yield piece
        size -= len(piece)


def _fsync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check(path: Path, repair: bool) -> int:
    """Prints what is wrong with a log, and what a repaired copy leaves out; the exit status.

    Raises LogError or OSError if there is none, or no place for a copy.
    """
    with open(path, "rb"):  # before anything is made for the sake of a log that is not there
        pass
    damages: list[Damage] = []
    if repair:
        _repair(path, damages)
    else:
        kept = sum("sample" in r for batch in _sound(path, damages) for r in batch.records)
        problems = f"{len(damages) or 'no'} problem{'s' * (len(damages) != 1)}"
        print(f"{path}: {kept} booking{'s' * (kept != 1)} in whole batches, {problems}")
    return int(bool(damages))


def _repair(path: Path, damages: list[Damage]) -> None:
    """Copies all sound batches to LOG.repaired, under their old numbers."""
    target = path.with_name(f"{path.name}.repaired")
    if os.path.lexists(target):
        raise LogError(f"{target} is there already; move it away first")
    kept = due = last_line = 0
    with open(target, "xb", opener=partial(os.open, mode=0o600)) as copy:
        try:
            for batch in _sound(path, damages):
                first = batch.records[0]["seq"]
                if due < first:
                    print(f"left out: seq {due} to {first - 1}")
                for seq in range(due, first):
                    copy.write(_line({"seq": seq, "batch": due, "left": first - seq - 1}))
                copy.writelines(batch.lines)
                due = first + len(batch.lines)
                last_line = batch.line + len(batch.lines) - 1
                kept += sum("sample" in record for record in batch.records)
            copy.flush()
            os.fsync(copy.fileno())
        except BaseException:
            target.unlink()  # an unfinished copy must not pass for a finished one
            raise
    _fsync_folder(target.parent)
    if damages and damages[-1].line > last_line:
        print(f"left out: all from seq {due} on")
    print(f"{target}: {kept} booking{'s' * (kept != 1)}")


def _sound(path: Path, damages: list[Damage]) -> Iterator[Batch]:
    """The whole batches without a problem; prints the problems of others, and adds them."""
    missing: set[int] = set()  # seqs before the next one that are of no booking
    due = 0  # the seq that comes next, if none is left out
    for found in scan(path):
        if isinstance(found, Damage):
            problems = [found]
        else:
            missing.update(range(due, found.records[0]["seq"]))
            problems = list(check_records(found.records, found.line, missing))
        for problem in problems:
            print(f"{path}, line {problem.line}: {problem.reason}")
        damages += problems
        if not problems:
            yield found
            missing.update(r["seq"] for r in found.records if "sample" not in r)
            due = found.records[-1]["seq"] + 1


def check_records(
    records: list[dict], line: int, missing: Collection[int] = ()
) -> Iterator[Damage]:
    """Yields a Damage for each record that a Bookkeeper could not have written.

    The first one is on that line; `missing` are the seqs before that are known to be no bookings.
    """
    for number, record in enumerate(records, start=line):
        try:
            if "corrects" in record and "sample" not in record:
                _check_recorded({TARGET: record[TARGET]}, (TARGET,))
                corrected = record["corrects"]
                before = type(corrected) is int and 0 <= corrected < record["seq"]
                if not before or corrected in missing:
                    raise ValueError("it corrects no booking before it")
                _check_weights(record)
            elif record.keys() != {*PLACE}:  # else it was removed
                _check_recorded(record["sample"], (*FEATURES, TARGET))
                _check_prediction(record)
                if times_recorded(record):
                    _check_weights(record)
                elif "weight" in record or record["reviewed"] is not False:
                    raise ValueError("what was booked unseen counts nothing")
        except KeyError as error:
            yield Damage(number, f"{error} is missing")
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            yield Damage(number, str(error))


# Accounts could be longer before version 0.3.
_check_recorded = partial(check_sample, short=("CompanyId", "BankEntryAmount"))


def times_recorded(record: dict) -> int:
    """How often a booking is scored, by what the log says. Raises BadRequest if it can't be so.

    Before version 0.3, which says what was known, a sample's keys did not say who booked it.
    """
    return times_scored(record["sample"]) if "known" in record else 1


def _check_prediction(record: dict) -> None:
    if not isinstance(record["predicted"], str | None):
        raise ValueError("predicted is no account")
    for name, most in (("confidence", 1), ("margin", sys.float_info.max)):
        if record[name] is not None and not 0 <= float(record[name]) <= most:
            raise ValueError(f"no prediction can have that {name}")
    if record["rank"] is not None and (type(record["rank"]) is not int or record["rank"] < 1):
        raise ValueError("no account can have that rank")
    if record.get("known", 0) not in range(len(KNOWN)):
        raise ValueError("nothing like that can be known")


def _check_weights(record: dict) -> None:
    weight, against = record["weight"], record.get("against", {})  # version 0.1 wrote none
    for least, counted in ((FLOOR, [weight]), (1 / GRAIN, against.values())):
        for each in counted:
            if not least <= each <= 1 or each * GRAIN % 1:
                raise ValueError("no booking can have that weight")
    "".join(against).encode()  # which a lone surrogate cannot be
    if "" in against:
        raise ValueError("an account is empty")


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of that size, of which the last may be shorter."""
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


# --------------------------------------------------------------------------------------- Snapshot

FORMAT = 4  # of snapshots


class Snapshot:
    """A file beside a log, with what was made of its first lines, to spare reading them again.

    It counts for nothing unless it is whole and of this format, tokens are made as they were, and
    the log still starts with the very bytes that it was made from.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.path = log.beside("{}.snapshot.npz")
        self._unfinished = log.beside(".{}.snapshot.npz")
        self.lines = 0  # of the log that it covers
        self.made = 0.0  # when, in seconds since 1970

    def save(self, state: Arrays) -> None:
        """Puts the state in the place of an earlier one, in one step, or logs why it cannot."""
        try:
            size, _ = _unpacked(state["keys"])
            origin = np.array([size, self.log.checksum(size), *self._version()])
            self._unfinished.unlink(missing_ok=True)  # it may be a link
            file = os.open(self._unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(file, "wb") as file:
                np.savez(file, origin=origin, **state)
            # There is no fsync: if it was not on disk at a power failure, the log is.
            os.replace(self._unfinished, self.path)
            self.lines, self.made = len(state["line_starts"]), time.time()
        except Exception as error:  # whatever it is, there is the log
            logger.warning("%s could not be written: %s", self.path, error)
            with suppress(OSError):
                self._unfinished.unlink(missing_ok=True)

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
        self.path.unlink(missing_ok=True)
        self._unfinished.unlink(missing_ok=True)
        self.lines = 0

    def _version(self) -> list[int]:
        sample = dict.fromkeys(FEATURES, "a b c") | {"BankEntryAmount": "-1000"}
        return [FORMAT, *tokens(sample)]


# ----------------------------------------------------------------------------------------- Writer

GROUP = 1000  # samples that a group of bookings may have, unless it is one booking
PATIENCE = 0.001  # seconds that bookings may wait for as many as were answered together last
BACKLOG = 50_000  # samples that may wait, unless they are one booking
RESTART = "nothing can be booked until the service is started again"


class NotReady(Exception):
    """Nothing to answer with yet, or no longer; the message says why."""


class Busy(NotReady):
    """No more can wait; the same can be sent again in a second."""


class NotStored(Exception):
    """The log failed. Unless the message says otherwise, nothing has changed; send it again."""


class Booking(NamedTuple):
    """Samples on their way into the log, and what their sender waits for."""

    done: Future
    samples: Sequence[Sample]
    key: str | None = None


class Change(NamedTuple):
    """Another change, and what who asked for it waits for."""

    done: Future
    make: Callable[[], object]
    samples: Sequence[Sample] = ()


class Writer(threading.Thread):
    """The thread that makes one change after the other, and is the only one to make any.

    Bookings that wait together are handed on as a group, to share what it costs to store them.
    """

    def __init__(self, book: Callable[[list[Booking]], None], rest: Callable[[], None]) -> None:
        """`book` answers a group of bookings; `rest` is called after each group and change."""
        super().__init__(name="writer", daemon=True)
        self._book, self._rest = book, rest
        self._queue: deque[Booking | Change] = deque()
        self._arrival = threading.Condition()  # of something in the queue, or of the end
        self._together = 0  # in the last group
        self._closed = False
        self.broken = False  # has what is known lost step with the log?
        self.failed = 0  # groups and changes that could not be stored

    def submit(self, work: Booking | Change) -> object:
        """What came of it, once it is done.

        Raises what it raises, Busy if too many wait, NotReady if no more are taken.
        """
        with self._arrival:
            if self._closed or self.broken:
                raise NotReady(RESTART)
            if work.samples and self._queue and self.waiting() + len(work.samples) > BACKLOG:
                raise Busy("too many bookings are waiting; send this again in a second")
            self._queue.append(work)
            self._arrival.notify()
        return work.done.result()

    def waiting(self) -> int:
        """How many samples wait to be booked."""
        return sum(len(work.samples) for work in self._queue.copy())

    def close(self) -> None:
        """Does what is waiting, and nothing more."""
        with self._arrival:
            self._closed = True
            self._arrival.notify()
        self.join()

    @contextmanager
    def must_succeed(self) -> Iterator[None]:
        """For what must follow from what the log says: if it fails, only a restart will help."""
        try:
            yield
        except BaseException:
            self.broken = True
            raise

    def run(self) -> None:
        """Does what comes, until the end."""
        while group := self._next_group():
            try:
                if self.broken:
                    raise NotReady(RESTART)
                if isinstance(group[0], Change):
                    group[0].done.set_result(group[0].make())
                else:
                    self._book(group)
            except Exception as error:
                refusal = self.refusal(error)
                for work in group:
                    if not work.done.done():
                        work.done.set_exception(refusal)
            self._rest()

    def _next_group(self) -> list[Booking] | list[Change]:
        """A change, or bookings of different keys; nothing if there will be no more."""
        with self._arrival:
            self._arrival.wait_for(lambda: self._queue or self._closed)
            # Who was answered together soon sends again: a moment's patience makes larger groups.
            self._arrival.wait_for(
                lambda: len(self._queue) >= self._together or self._closed, PATIENCE
            )
            group, keys, size = [], set(), 0
            while self._queue:
                work = self._queue[0]
                size += len(work.samples)
                alone = isinstance(work, Change) or size > GROUP or work.key in keys
                if group and (alone or isinstance(group[0], Change)):
                    break
                group.append(self._queue.popleft())
                if isinstance(work, Booking) and work.key is not None:
                    keys.add(work.key)
            self._together = len(group)
            return group

    def refusal(self, error: Exception) -> Exception:
        """What to raise to a caller for what was raised; says it in the service's log, too."""
        if isinstance(error, LogError | OSError | NotStored):
            with self._arrival:
                self.failed += 1
        if isinstance(error, LogError):
            logger.error("%s", error)
            self.broken = True
            return NotReady(f"it is not sure that this was done; {RESTART}")
        if isinstance(error, OSError):
            error = NotStored(f"the log could not be written ({error.strerror}); try later")
        if isinstance(error, NotStored):
            logger.error("%s", error)
        return error


# ------------------------------------------------------------------------------------- Bookkeeper

CHUNK = 128  # samples that are predicted, or unlearned, at a time
LINES = 4096  # of the log that are read back at a time
RECENT = 10_000  # bookings that it looks at
MOMENT = 0.002  # seconds that a short question may wait for the model, before all others
QUICK = 250_000  # bytes of a sample times accounts, for which a prediction takes a millisecond
SURE = 0.95  # confidence from which on an operator is told how much can be booked unseen
UNSAVED = 10_000  # lines of the log that its snapshot may lack; a sixteenth while it grows


COUNTED = {  # since the start, for an operator
    "predictions": "Predictions that were asked for.",
    "booked": "Bookings that were stored.",
    "scored": "Predictions that were scored as their bookings came, each as often as it counts.",
    "scored_right": "Those of the scored predictions that were right.",
    "corrections": "Bookings that were corrected or confirmed.",
    "forgotten": "Bookings that were forgotten.",
}


class NotFound(Exception):
    """There is no such booking or company."""


class Conflict(Exception):
    """Other bookings were sent under the key of a batch."""


A_WORD = KNOWN.index("a word")  # what is taken for known where a log of before 0.3 says nothing


class Bookkeeper:
    """Books samples into the log and the model, and knows how well it predicted them.

    Its writer is the only one that changes anything. Bookings that wait together are a group: it is
    predicted as a whole, then learned, then appended to the log with one fsync. So no sample is
    scored by a model that has seen its answer. What cannot be appended is unlearned, exactly.

    What was booked unseen, as it was suggested, is stored and predicted, but neither learned nor
    scored: it would prove itself right. It is learned once a person confirms or corrects it. What
    could have been, but was checked, counts for all the others that nobody looked at.
    """

    def __init__(self, log: Log, unsaved: int = UNSAVED) -> None:
        """Learns all that is in the log. Raises LogError if that is damaged, or OSError.

        A snapshot is not made for fewer than `unsaved` lines.
        """
        self.log = log
        self.unsaved = unsaved
        self._model = NaiveBayes()
        self._calibration = Calibration()
        self._history = History()
        self._corrections: dict[int, list[int]] = {}  # seq of a booking -> of its corrections
        self._curve: dict[int, dict] = {}  # points of the learning curve that will not change
        self._counted = dict.fromkeys(COUNTED, 0)
        self._changing = threading.Lock()  # held while these change, and to read them
        self._forgetting = threading.Lock()  # held while a company is forgotten
        self._started = time.monotonic()
        self._snapshot = Snapshot(log)
        # Lines of the log that the last snapshot was to cover; infinite if there must be none.
        self._saved: float = 0
        self._saving: threading.Thread | None = None
        self._writer = Writer(self._book, self._save)
        self._snapshot.load(self._restore)
        with _no_collection():
            self._read_back()
        self._counted = dict.fromkeys(COUNTED, 0)
        self._last_batch = len(log)  # the seq that it starts with; there is none since the start
        self._writer.start()

    def book(self, samples: list[Sample], key: str | None = None) -> range:
        """The samples' sequence numbers, once they are on disk and learned.

        A batch whose key is known is not booked again: it has the numbers that it got before.
        Raises Conflict if that was another batch, NotStored if the samples could not be written,
        Busy if too many wait, NotReady if the bookkeeper is closed.
        """
        return self._writer.submit(Booking(Future(), samples, key))

    def correct(self, seq: int, account: str) -> str:
        """Books a booking to another account, and says to which it was booked before.

        The old one is unlearned, the new one learned with the weight of its surprise. Metrics keep
        the prediction. The same account confirms what was booked unseen. Raises NotFound,
        NotStored, NotReady.
        """
        return self._change_by(self._correct, seq, account)

    def forget(self, company: str) -> int:
        """Removes a company from the log, unlearns it, and says how many bookings it had.

        Others are booked between its steps. Raises NotFound, NotStored, NotReady.
        """
        return self._forget(partial(self._lines_of, company))

    def _forget(self, lines_of: Callable[[], tuple[np.ndarray, int]]) -> int:
        """Removes lines, which the writer is asked for, as forget does."""
        with self._forgetting:
            try:
                with Copy(self.log) as copy:
                    for _ in range(2):  # the second time, what has come meanwhile
                        copy.extend(*self._change_by(lines_of))
                    self._end_saving()  # or the writer would have to wait for it
                    forgotten = self._change_by(self._remove, lines_of, copy)
                    with self._writer.must_succeed():
                        self._unlearn_all(forgotten, copy)
            except ValueError as error:
                raise self._writer.refusal(NotStored(str(error))) from None
            except (OSError, LogError) as error:
                raise self._writer.refusal(error) from None
        _digests.clear()
        logger.info("forgot a company of %d bookings", len(forgotten))
        return len(forgotten)

    def predict(self, samples: Iterable[Sample]) -> list[str]:
        """The most probable account of each sample. Raises NotReady while there is no model."""
        accounts: list[str] = []
        documents = map(tokens, samples)
        # The more accounts, the fewer at a time, for others wait for the model, too.
        while chunk := list(islice(documents, self._model.at_once)):
            with self._model_at_rest() as model:
                accounts += model.predict(chunk)
                self._counted["predictions"] += len(chunk)
        return accounts

    def is_quick(self, size: int) -> bool:
        """Whether a prediction for one sample of so many bytes takes a millisecond or two at most.

        It does even if all its words have met all accounts, once the model is at rest.
        """
        return size * len(self._model.names) <= QUICK

    def is_busy(self) -> bool:
        """Whether a prediction would have to wait for the model for more than a moment."""
        if self._changing.acquire(timeout=MOMENT):
            self._changing.release()
            return False
        return True

    def suggest(
        self,
        samples: Sequence[Sample],
        top: int,
        book_from: float | None = None,
        with_reasons: bool = True,
    ) -> list[dict[str, object]]:
        """The most probable accounts of each, best first, with their confidence and the reasons.

        The first is compared with the second, the others are with the first. The log-odds of what
        the sample says, its `reasons`, and the `prior` add up to the `margin`. The `record` says
        what the first one's confidence rests on, and `check` whether a person should look at it
        even if it is sure enough, which depends on its place in the request, too. Whether it is,
        from a confidence on, is the `decision`. Raises NotReady.
        """
        # Reasons take long, and others wait for the model, too.
        step = 1 if with_reasons else self._model.at_once
        return [
            answer
            for place in range(0, len(samples), step)
            for answer in self._suggest(
                samples[place : place + step], place, top, book_from, with_reasons
            )
        ]

    def _suggest(
        self, samples: Sequence[Sample], place: int, top: int, book_from: float | None, why: bool
    ) -> Iterator[dict[str, object]]:
        """What suggest says of samples that follow in a request from that place on."""
        documents = [tokens(sample) for sample in samples]
        with self._model_at_rest() as model:
            scores = model.joint_log_likelihood(documents)
            best = model.top(scores, max(top, 2))
            scores = np.take_along_axis(scores, best, axis=1).tolist()
            known = model.specificity(documents).tolist()
            pairs = zip(documents, best, strict=True)
            terms = [model.terms(*pair) if why else None for pair in pairs]
            self._counted["predictions"] += len(samples)

        accounts = [[model.names[account] for account in row] for row in best.tolist()]
        made = [
            {
                "sample": {"CompanyId": sample["CompanyId"]},  # the rest may be anything
                "predicted": names[0],
                "margin": highest[0] - highest[1] if len(highest) > 1 else None,
                "known": most,
            }
            for sample, names, highest, most in zip(samples, accounts, scores, known, strict=True)
        ]
        rows = self._rows(made, documents)
        with self._changing:
            confidence = self._calibration.shared(self._calibration.confidence(rows))
            records = self._calibration.record(rows)
            sizes = [self._history.size(sample["CompanyId"]) for sample in samples]

        confidence = confidence.round(4).tolist()
        for i, sample in enumerate(samples):
            check = is_check(sample, sizes[i], place + i)
            answer = {
                "suggestions": [
                    _suggestion(sample, accounts[i], scores[i], rank, confidence[i][rank], terms[i])
                    for rank in range(min(top, len(accounts[i])))
                ],
                "record": {"known": KNOWN[known[i]], **records[i]},
                "check": check,
            }
            if book_from is not None:
                sure_enough = "check" if check else "book"
                answer["decision"] = sure_enough if confidence[i][0] >= book_from else "review"
            yield answer

    def metrics(self, n: int) -> dict[str, float]:
        """Macro precision and recall of the last n (or fewer) predictions. Raises NotReady."""
        now = figures(self._last(n))
        return {name: now[name] for name in ("precision", "recall")}

    def report(
        self, n: int, company: str | None = None, book_from: float | None = None
    ) -> dict[str, object]:
        """How good the last n (or fewer) predictions were, and how good when how sure.

        Raises NotFound if there is no such company, NotReady if nothing was predicted.
        """
        levels = sorted({*LEVELS, *([] if book_from is None else [book_from])})
        rows = self._last(n, company)
        since = self._history.rows if company is None else self._history.of(company)
        since = since[since["seq"].searchsorted(rows[0]["seq"]) :]
        made = report(rows, list(self._history.accounts), levels)
        return {"support": len(rows), "unseen": unseen(since), **made}

    def overview(self, company: str | None = None) -> dict:
        """What the page shows: health, the learning curve, confidence.

        The confidence may be of one company. Raises NotFound if there is no such.
        """
        health = self.health()
        with self._changing:
            rows, points = self._history.rows, self._curve
        last = self._scored(WINDOW)
        recent = self._scored(RECENT, company)
        return {
            "health": health,
            "metrics": figures(last) if len(last) else None,
            "curve": [*curve(rows, points)],
            "scored": len(recent),
            "confidence": by_confidence(recent, (0, *LEVELS)) if len(recent) else [],
        }

    def bookings(self, limit: int, company: str | None = None, **asked: object) -> tuple:
        """What `limit` bookings are by now, and where that page ends, as History.page says.

        Raises NotFound if there is no such company.
        """
        with self._changing:
            self._require(company)
        seqs, end = self._history.page(limit, company, **asked)
        return self._standing(seqs), end

    def booking(self, seq: int) -> dict:
        """What one booking is by now. Raises NotFound."""
        for standing in self._standing(np.array([seq])):
            return standing
        raise NotFound(f"there is no booking {seq}")

    def lines(self, company: str, first: int, limit: int) -> tuple[Lines, int]:
        """The company's lines in the log from that seq on, as Log.export_some. Raises NotFound."""
        seqs, _ = self._lines_of(company)
        return self.log.export_some(seqs[seqs >= first][:limit])

    def _standing(self, seqs: np.ndarray) -> list[dict]:
        """What bookings are by now, without those that were forgotten meanwhile."""
        with self._changing:
            rows = self._history.at(seqs)
            corrections = [self._corrections.get(seq) for seq in rows["seq"].tolist()]
        names, called = [*self._history.accounts, None], self._called(rows)
        rows = rows[["seq", "company", "booked", "predicted", "rank", "times", "reviewed"]]
        found = []
        for row, corrected in zip(rows.tolist(), corrections, strict=True):
            seq, company, booked, predicted, rank, times, reviewed = row
            record = self._record(seq)
            if "sample" not in record:
                continue
            # Once a person has looked at what was booked unseen, it is the person's.
            person = {BOOKED_BY: "person"} if reviewed and not times else {}
            sample = record["sample"] | {TARGET: names[booked]} | person
            if record["sample"][TARGET] != names[booked]:
                sample.pop(NAME, None)  # which is the other account's
            found.append(
                {
                    "seq": seq,
                    "sample": sample,
                    "account": names[booked],
                    "name": called.get((company, booked)),
                    "predicted": names[predicted],
                    "predicted_name": called.get((company, predicted)),
                    "confidence": record["confidence"],
                    "rank": 1 if booked == predicted else rank or None,
                    "reviewed": reviewed,
                    "booked_by": "person" if person else BY_TIMES[times],
                    "corrected": corrected and {"from": record["sample"][TARGET]},
                }
            )
        return found

    def _called(self, rows: np.ndarray) -> dict[tuple[int, int], str | None]:
        """The latest names that companies gave the accounts booked and predicted in these rows."""
        accounts = np.concatenate([rows["booked"], rows["predicted"]])
        companies = np.tile(rows["company"], 2)[accounts >= 0]
        accounts = accounts[accounts >= 0]
        seqs = self._history.last_named(companies, accounts).tolist()
        named = {seq: self._record(seq).get("sample", {}) for seq in {*seqs} - {-1}}
        names = (named.get(seq, {}).get(NAME) for seq in seqs)
        pairs = zip(companies.tolist(), accounts.tolist(), strict=True)
        return dict(zip(pairs, names, strict=True))

    def health(self) -> dict[str, str | int | float]:
        """How much has been learned, and for how many seconds the service has been up.

        Raises NotReady if the service must be restarted, or the log be put back in its place.
        """
        if self._writer.broken:
            raise NotReady(RESTART)
        if not self.log.in_place():
            raise NotReady("the log was moved, replaced, deleted or cut by another; put it back")
        failure = self.log.failure
        with self._changing:
            rows = self._history.rows
            return {
                "status": f"the log could not be written ({failure})" if failure else "ok",
                "samples": len(rows),
                "unseen": unseen(rows),
                "checks": checks(rows),
                "lines": len(self.log),
                "accounts": self._model.known,
                "companies": len(self._history.companies),
                "tokens": self._model.known_tokens,
                "uptime": round(time.monotonic() - self._started, 3),
            }

    def require_ready(self) -> None:
        """Raises NotReady unless bookings can be sent to it."""
        if self.health()["status"] != "ok":
            raise NotReady("the log could not be written")

    def require_lines(self, total: int) -> None:
        """Raises Busy unless the log has so many lines."""
        if len(self.log) < total:
            raise Busy(f"only {len(self.log)} lines are known here so far, not {total}")

    def gauges(self) -> dict[str, tuple[str, float]]:
        """What an operator watches: what each figure is, and the figure."""
        with self._changing:
            rows, counted = self._history.rows, self._counted.copy()
            accounts, tokens = self._model.known, self._model.known_tokens
            companies = len(self._history.companies)
        watched = {f"{name}_total": (text, counted[name]) for name, text in COUNTED.items()} | {
            "failed_writes_total": ("Changes that could not be stored.", self._writer.failed),
            "bookings": ("Bookings in the log.", len(rows)),
            "unseen": ("Bookings that nobody has looked at.", unseen(rows)),
            "checks": ("Bookings that could have been booked unseen.", checks(rows)),
            "accounts": ("Accounts in the model.", accounts),
            "companies": ("Companies in the model.", companies),
            "tokens": ("Tokens in the model.", tokens),
            "waiting": ("Samples that wait to be booked.", self._writer.waiting()),
            "log_bytes": ("Bytes of the log.", self.log.size),
            "log_lines": ("Lines of the log.", len(self.log)),
            "snapshot_lines": ("Lines that the snapshot covers.", self._snapshot.lines),
        }
        if self._snapshot.lines:
            age = time.time() - self._snapshot.made
            watched["snapshot_age_seconds"] = ("Time since the snapshot was made.", age)
        return watched | self._quality(rows)

    def _quality(self, rows: np.ndarray) -> dict[str, tuple[str, float]]:
        """How good the last of these predictions were; it looks at few, for it is often asked."""
        found: dict[str, tuple[str, float]] = {}
        last = scored(rows[rows["seq"].searchsorted(self._last_batch) :])
        window = scored(rows[-RECENT:])[-WINDOW:]
        for name, of, these in (
            ("last_batch", "the last batch", last),
            ("window", f"the last {WINDOW} predictions that are scored", window),
        ):
            for figure, value in figures(these).items() if len(these) else ():
                found[f"{name}_{figure}"] = (f"The {figure} of {of}.", value)
        if len(window):
            [sure] = by_confidence(window, [SURE])
            share = f"The share of the last {WINDOW} that was at least {SURE:.0%} sure."
            found["window_bookable"] = (share, sure["share"])
        return found

    def _scored(self, n: int, company: str | None = None) -> np.ndarray:
        with self._changing:
            self._require(company)
            return self._history.last(n, company)

    def _require(self, company: str | None) -> None:
        if company is not None and company not in self._history.companies:
            raise NotFound("there is no booking of this company")

    def _last(self, n: int, company: str | None = None) -> np.ndarray:
        rows = self._scored(n, company)
        if not len(rows):
            raise NotReady("nothing has been predicted yet; send bookings to /sample first")
        return rows

    @contextmanager
    def _model_at_rest(self) -> Iterator[NaiveBayes]:
        with self._changing:
            if not self._model.known:
                raise NotReady("there is no model yet; send bookings to /sample first")
            yield self._model

    def _book(self, group: list[Booking]) -> None:
        """Answers a group: bookings of different keys."""
        group = [booking for booking in group if not self._is_repeated(booking)]
        if not group:
            return
        samples = list(chain.from_iterable(booking.samples for booking in group))
        learned: list[dict] = []
        try:
            records, rows = self._predict_and_learn(samples, learned)
            rest = iter(records)
            records = self.log.append(
                [(booking.key, list(islice(rest, len(booking.samples)))) for booking in group]
            )
        except BaseException:
            self._unlearn(learned)
            raise
        with self._change():
            self._score(records, rows)
        end = len(self.log) - len(records)
        for booking in group:
            first, end = end, end + len(booking.samples)
            if booking.samples:
                self._last_batch = first
            booking.done.set_result(range(first, end))

    def _is_repeated(self, booking: Booking) -> bool:
        """Whether its key is known; then it is answered."""
        try:
            records = None if booking.key is None else self.log.find(booking.key)
        except (OSError, ValueError) as error:
            booking.done.set_exception(NotStored(f"the log could not be read ({error}); try later"))
            return True
        if records is None:
            return False
        # What was forgotten since is taken to have been the same, and is not booked again.
        if len(records) == len(booking.samples) and all(
            record.get("sample", sample) == sample
            for record, sample in zip(records, booking.samples, strict=True)
        ):
            booking.done.set_result(range(records[0]["seq"], records[-1]["seq"] + 1))
        else:
            booking.done.set_exception(
                Conflict("this Idempotency-Key was used for other bookings; take a new one")
            )
        return True

    def _predict_and_learn(
        self, samples: list[Sample], learned: list[dict]
    ) -> tuple[list[dict], np.ndarray]:
        """What the log and the history are to say of samples.

        Adds to `learned` what is learned, however far it gets.
        """
        records: list[dict] = [{}] * len(samples)
        documents = [tokens(sample) for sample in samples]
        seen, unseen = [], []
        for i, sample in enumerate(samples):
            (seen if times_scored(sample) else unseen).append(i)

        def chosen(numbers: list[int]) -> tuple[list[list[int]], list[str]]:
            return [documents[i] for i in numbers], [samples[i][TARGET] for i in numbers]

        for i, made in zip(unseen, self._model.assess(*chosen(unseen)), strict=True):
            records[i] = _predicted(samples[i], made) | {"reviewed": False}
        for part, assessments, lessons in self._model.book(*chosen(seen), self._change):
            with self._writer.must_succeed():  # else it would not be known what was learned
                for i, made, lesson in zip(seen[part], assessments, lessons, strict=True):
                    counts = {"weight": lesson.weight, "against": lesson.against}
                    records[i] = _predicted(samples[i], made) | counts
                    learned.append(records[i])
        rows = self._rows(records, documents)
        rows["confidence"] = confidence = self._calibration.confidence(rows).round(4)
        for record, sure in zip(records, confidence.tolist(), strict=True):
            if record["predicted"] is not None:
                record["confidence"] = sure
        return records, rows

    @contextmanager
    def _change(self) -> Iterator[None]:
        """For changes of what follows from the log."""
        with self._writer.must_succeed(), self._changing:
            yield

    def _unlearn(self, records: list[dict]) -> None:
        """Unlearns bookings that count as the log was to say."""
        for chunk in chunks(records, CHUNK):
            documents = [tokens(record["sample"]) for record in chunk]
            lessons = [_lesson(record, record["sample"][TARGET]) for record in chunk]
            self._learn(documents, lessons, -1)

    def _rows(self, records: Sequence[dict], documents: Sequence[Sequence[int]]) -> np.ndarray:
        """Rows of the history for records of the log, without what only their booking gives them.

        Names that have no number yet are -1.
        """
        companies, accounts = self._history.companies, self._history.accounts
        rows = np.array(
            [
                (
                    -1,
                    companies.get(record["sample"]["CompanyId"], -1),
                    -1,
                    -1,
                    accounts.get(record["predicted"], -1),
                    record.get("confidence") or 0,
                    0,
                    record.get("known", A_WORD),
                    _in_ranks(record.get("rank")),
                    times_recorded(record),
                    "reviewed" not in record,
                )
                for record in records
            ],
            dtype=History.ROW,
        )
        margins = np.array([record["margin"] or 0 for record in records], dtype=np.float64)
        rows["bin"] = Calibration.bins(margins / [len(document) for document in documents])
        return rows

    def _score(self, records: list[dict], rows: np.ndarray) -> None:
        """Adds what the log says of bookings, as rows, to the history and the calibration."""
        rows["seq"] = [record["seq"] for record in records]
        names = [
            (s["CompanyId"], s[TARGET], s[TARGET] if s.get(NAME) else None, record["predicted"])
            for record in records
            for s in [record["sample"]]
        ]
        self._history.append(rows, names)
        self._calibration.add(rows)
        times = (now := scored(rows))["times"]
        self._counted["booked"] += len(rows)
        self._counted["scored"] += int(times.sum())
        self._counted["scored_right"] += int(times[right(now)].sum())

    def _correct(self, seq: int, account: str) -> str:
        booking = self._booking(seq)
        before = self._current_lesson(booking)
        if account != before.account or not before.weight:
            documents = [tokens(booking["sample"])]
            [lesson] = self._model.weigh(documents, [account])
            correction = {"corrects": seq, TARGET: account}
            correction |= {"weight": lesson.weight, "against": lesson.against}
            [correction] = self.log.append([(None, [correction])])
            self._apply([(booking, before, correction)])
        return before.account

    def _booking(self, seq: int) -> dict:
        """The record of a booking. Raises NotFound, NotStored."""
        record = self._record(seq) if 0 <= seq < len(self.log) else {}
        if "sample" not in record:
            raise NotFound(f"there is no booking {seq}")
        return record

    def _record(self, seq: int) -> dict:
        try:
            return self.log.record(seq)
        except (OSError, ValueError) as error:
            raise NotStored(f"line {seq + 1} of the log could not be read ({error})") from None

    def _current_lesson(self, booking: dict) -> Lesson:
        """To which account the booking is booked by now, and what it counts."""
        corrections = self._corrections.get(booking["seq"])
        last = self._record(corrections[-1]) if corrections else booking
        return _lesson(last, last[TARGET] if corrections else booking["sample"][TARGET])

    def _apply(self, changes: Sequence[tuple[dict, Lesson, dict]]) -> None:
        """Unlearns bookings, which counted so before, and learns them as corrected."""
        documents = [tokens(booking["sample"]) for booking, _, _ in changes]
        with self._change():
            self._model.learn(documents, [_lesson(c, c[TARGET]) for _, _, c in changes])
            self._model.learn(documents, [lesson for _, lesson, _ in changes], times=-1)
            rows = self._history.find(np.unique([booking["seq"] for booking, _, _ in changes]))
            self._calibration.add(self._history.rows[rows], times=-1)
            for booking, _, correction in changes:
                seq, account = booking["seq"], correction[TARGET]
                rank = booking["rank"] if account == booking["sample"][TARGET] else None
                self._history.correct(seq, account, _in_ranks(rank))
                self._corrections.setdefault(seq, []).append(correction["seq"])
            self._calibration.add(self._history.rows[rows])
            self._counted["corrections"] += len(changes)
            self._curve = {}

    def _lines_of(self, company: str) -> tuple[np.ndarray, int]:
        """(m,) the seqs of a company's bookings and corrections, and how many lines there are.

        Raises NotFound. Only the writer knows all: between a line and its row is a moment.
        """
        seqs = self._history.of(company)["seq"]
        if not len(seqs):
            raise NotFound("there is no booking of this company")
        corrections = chain.from_iterable(self._corrections.get(seq, ()) for seq in seqs.tolist())
        lines = np.concatenate([seqs, np.fromiter(corrections, dtype=np.int64)])
        return np.sort(lines), len(self.log)

    def _remove(
        self, lines_of: Callable[[], tuple[np.ndarray, int]], copy: Copy
    ) -> list[tuple[int, int]]:
        """Takes the copy for the log. Of each booking removed, the seq, and of what stands for it.

        These are to be unlearned, from what was the log.
        """
        lines, end = lines_of()
        copy.extend(lines, end)
        self._end_saving()
        self._snapshot.discard()
        self.log.replace(copy)
        self._saved = math.inf  # only a start drops the names of its accounts
        with self._change():
            rows = self._history.forget(lines)
            seqs = rows["seq"].tolist()
            self._calibration.add(rows, times=-1)
            self._counted["forgotten"] += len(rows)
            self._curve = {}
            return [(seq, self._corrections.pop(seq, [seq])[-1]) for seq in seqs]

    def _unlearn_all(self, forgotten: list[tuple[int, int]], log: Copy) -> None:
        """Unlearns bookings that stand in what was the log, a chunk at a time. Raises LogError."""
        for chunk in chunks(forgotten, 8 * CHUNK):
            documents, lessons = [], []
            for seq, standing in chunk:
                try:
                    booking = log.record(seq)
                    last = booking if seq == standing else log.record(standing)
                except (OSError, ValueError) as error:
                    raise LogError(f"what was removed cannot be unlearned ({error})") from None
                documents.append(tokens(booking["sample"]))
                lessons.append(_lesson(last, last.get(TARGET) or booking["sample"][TARGET]))
            self._change_by(self._learn, documents, lessons, -1)

    def _learn(self, documents: list[list[int]], lessons: list[Lesson], times: int) -> None:
        with self._change():
            self._model.learn(documents, lessons, times)

    def _change_by(self, make: Callable, *arguments: object) -> object:
        """What comes of a change, made by the writer. Raises what it raises, or NotReady."""
        return self._writer.submit(Change(Future(), partial(make, *arguments)))

    def _read_back(self) -> None:
        reported = time.monotonic()
        for records in chunks(self.log.read(), LINES):
            for damage in check_records(records, records[0]["seq"] + 1):
                raise self.log.damaged(damage)
            self._follow(records)
            if time.monotonic() - reported > 3:
                reported = time.monotonic()
                logger.info("%s: %s read back so far", self.log.path, self.log.progress())

    def _follow(self, records: list[dict]) -> None:
        """Learns what the log says next, of bookings and corrections. Raises LogError."""
        bookings = [record for record in records if "sample" in record]
        documents = [tokens(record["sample"]) for record in bookings]
        learned = [(d, r) for d, r in zip(documents, bookings, strict=True) if "weight" in r]
        lessons = [_lesson(record, record["sample"][TARGET]) for _, record in learned]
        with self._change():
            self._score(bookings, self._rows(bookings, documents))
            self._model.learn([document for document, _ in learned], lessons)
        self._apply_all(r for r in records if "corrects" in r and "sample" not in r)

    def _apply_all(self, corrections: Iterable[dict]) -> None:
        changes, last = [], {}
        for correction in corrections:
            seq = correction["corrects"]
            try:
                booking = self._booking(seq)
            except NotFound as error:
                raise self.log.damaged(Damage(correction["seq"] + 1, str(error))) from None
            before = last.get(seq) or self._current_lesson(booking)
            last[seq] = _lesson(correction, correction[TARGET])
            changes.append((booking, before, correction))
        if changes:
            self._apply(changes)

    def _state(self) -> Arrays:
        """All that was made of the log; arrays that are those at work."""
        parts = (self.log, self._model, self._calibration, self._history)
        corrections = {"corrections": _packed([*self._corrections.items()])}
        return dict(chain(*(part.state().items() for part in parts), corrections.items()))

    def _restore(self, state: Arrays) -> None:
        """Takes over all that was made of the log; or nothing, if it raises."""
        parts = NaiveBayes(), Calibration(), History()
        for part in parts:
            part.restore(state)
        corrections = dict(_unpacked(state["corrections"]))
        self.log.restore(state)
        self._model, self._calibration, self._history = parts
        self._corrections, self._saved = corrections, len(self.log)

    def _save(self) -> None:
        """Saves the state in the background, if it is time to."""
        waiting = self._saving and self._saving.is_alive()
        due = max(self.unsaved, self._saved / 16)
        if waiting or self._writer.broken or len(self.log) - self._saved < due:
            return
        self._saved = len(self.log)
        try:
            state = {name: array.copy() for name, array in self._state().items()}
            saving = threading.Thread(target=self._snapshot.save, args=[state], name="saving")
            saving.start()
            self._saving = saving
        except Exception as error:  # there is the log
            logger.warning("no snapshot was made: %s", error)

    def _end_saving(self) -> None:
        if self._saving:
            self._saving.join()

    def close(self) -> None:
        """Books what is waiting, nothing more, and closes the log."""
        self._writer.close()
        self._end_saving()
        may_save = not self._writer.broken and self._saved < math.inf and self.log.in_place()
        if may_save and len(self.log) - self._snapshot.lines >= self.unsaved:
            self._snapshot.save(self._state())
        with self._forgetting:  # which copies the log
            self.log.close()


def is_check(sample: Sample, bookings: int, place: int) -> bool:
    """Whether a suggestion that may be booked unseen is to be checked: one in CHECKS is.

    It depends on how many bookings the company has and on the place in the request, too, for what
    recurs must not be checked always or never.
    """
    drawn = [*(sample[key] for key in FEATURES), bookings, place]
    return digest(_encode(drawn)) % CHECKS == 0


@contextmanager
def _no_collection() -> Iterator[None]:
    """For work that makes many objects, but no cycles of them: looking for these takes a tenth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _predicted(sample: Sample, assessment: Assessment) -> dict:
    return {
        "sample": sample,
        "predicted": assessment.predicted,
        "margin": assessment.margin,
        "confidence": None,
        "rank": assessment.rank,
        "known": assessment.known,
    }


def _lesson(record: dict, account: str) -> Lesson:
    """What the record counts; version 0.1 wrote no rivals, and what nobody looked at counts 0."""
    return Lesson(account, record.get("weight", 0.0), record.get("against", {}))


def _in_ranks(rank: int | None) -> int:
    return rank if rank and rank <= Calibration.RANKS else 0


def _suggestion(
    sample: Sample,
    accounts: Sequence[str],
    scores: Sequence[float],
    rank: int,
    confidence: float,
    terms: np.ndarray | None,
) -> dict[str, object]:
    """One of k accounts, and what speaks for it over another, by the terms (k, 1 + T)."""
    other = int(rank == 0)
    alone = len(accounts) == 1
    suggestion = {
        "account": accounts[rank],
        "confidence": confidence,
        "over": None if alone else accounts[other],
        "margin": None if alone else round(scores[rank] - scores[other], 4),
    }
    if terms is None:
        return suggestion
    if alone:
        return suggestion | {"prior": None, "reasons": []}
    prior, *weights = (terms[rank] - terms[other]).tolist()
    return suggestion | {"prior": round(prior, 4), "reasons": _reasons(sample, weights)}


def _reasons(sample: Sample, weights: list[float]) -> list[dict[str, str | float]]:
    """What the sample's words weigh, the heaviest first, without those that are not known."""
    reasons: defaultdict[tuple[str, str], float] = defaultdict(float)
    for wording, weight in zip(wordings(sample), weights, strict=True):
        if weight:
            reasons[wording] += weight
    heaviest = sorted(reasons.items(), key=lambda reason: -reason[1])
    return [
        {"token": token, "kind": kind, "weight": round(weight, 4)}
        for (kind, token), weight in heaviest
    ]


# -------------------------------------------------------------------------------- API description

JSON_LINES = "application/jsonl"
MAX_NUMBER = 999_999_999
MAX_PAGE = 500  # bookings in one answer
MAX_SUGGESTED = 300  # suggestions in one answer, each of which is long
OPEN = {"/", "/desk.css", "/desk.js", "/health", "/ready"}  # nothing to learn from them
    "/",
    "/desk.css",
    "/desk.js",
    "/health",
    "/ready",
}  # to all, as there is nothing to learn from them
TAGS = {
    "bookings": "what is learned: store, correct, read and forget it",
    "suggestions": "what is likely to be booked, how sure that is, and why",
    "quality": "how good the predictions were",
    "service": "how the service is, and what describes it",
}
REFUSALS = {  # status -> when, and a sentence that comes with it
    400: ("the request makes no sense, or is too much", "sample 0: AccountNumber is missing"),
    401: ("no token", "send the token, with the header Authorization: Bearer <token>"),
    404: ("no such booking or company", "there is no booking 1203"),
    413: ("the body is too long", "send at most 67108864 bytes in one request"),
    415: ("not JSON", "send JSON, with the header Content-Type: application/json"),
    422: ("a known key", "this Idempotency-Key was used for other bookings; take a new one"),
    503: ("not yet, or no longer", "there is no model yet; send bookings to /sample first"),
    507: (
        "nothing was changed",
        "the log could not be written (No space left on device); try later",
    ),
    "default": ("refused, with one sentence that says what to change", "there is nothing here"),
}
_TEXT = {"type": "string", "maxLength": MAX_VALUE}
_FILLED = _TEXT | {"minLength": 1}
_BRIEF = _FILLED | {"maxLength": MAX_SHORT}
_COUNT = {"type": "integer", "format": "int64", "minimum": 0}
_SEQ = _COUNT | {"maximum": MAX_NUMBER}
_ODDS = {"type": "number", "format": "double"}
_SHARE = _ODDS | {"minimum": 0, "maximum": 1}
_YES = {"type": "boolean"}


def _or_null(schema: dict) -> dict:
    return schema | {"type": [schema["type"], "null"]}


def _one_of(words: Iterable[str]) -> dict:
    return {"type": "string", "enum": list(words)}


def _of(name: object, section: str = "schemas") -> dict:
    return {"$ref": f"#/components/{section}/{name}"}


def _list(name: str, **limits: int) -> dict:
    return {"type": "array", "items": _of(name), **limits}


FIELDS = {  # of records and parameters: the schema, what it says, an example
    "CompanyId": (_BRIEF, "whose booking it is", "acme"),
    "BankEntryText": (_FILLED, "what the bank statement says", "Office rent June"),
    "BankEntryAmount": (
        _BRIEF,
        "a plain decimal number, which counts as the range that it is in, or a range: "
        f"{', '.join(RANGES)}; any other text is a range of its own",
        *("-9875.50", *RANGES),
    ),
    "BankEntryDate": (_TEXT, "the day, which is stored, but says nothing", "2016-02-29"),
    "AccountName": (_TEXT, "the account's name, for people", "Office costs"),
    TARGET: (_BRIEF, "the account that it is booked to", "6300"),
    BOOKED_BY: (_one_of(TIMES), "who booked it, a person if it is not said", "check"),
    "received": (_COUNT, "bookings in the list", 2),
    "total": (_COUNT, "lines that the log had with them", 15002),
    "first": (_or_null(_COUNT), "the seq of the first one, null for an empty list", 15000),
    "last": (_or_null(_COUNT), "the seq of the last one, null for an empty list", 15001),
    "token": (_FILLED, "the sample's own words", "Office"),
    "kind": (_one_of(KINDS), "what they are in it", "word"),
    "weight": (_ODDS, "log-odds for this account over the other", 2.4137),
    "account": (_FILLED, "the account", "6300"),
    "confidence": (_SHARE, "of earlier suggestions like it, the share that was right", 0.94),
    "over": (
        _or_null(_FILLED),
        "the account that it is compared with, null if it is alone",
        "7140",
    ),
    "margin": (_or_null(_ODDS), "log-odds over that one: the prior and all reasons", 2.4445),
    "prior": (_or_null(_ODDS), "log-odds before anything is known of the sample", 0.0308),
    "reasons": (_list("Reason"), "what the sample says, the heaviest first"),
    "suggestions": (_list("Suggestion", maxItems=Calibration.RANKS), "accounts, best first"),
    "suggest.reasons": (
        _one_of(("yes", "no")) | {"default": "yes"},
        f"no leaves them out; with them, an answer has at most {MAX_SUGGESTED} suggestions",
        "no",
    ),
    "record": (_of("Record"), "what the confidence of the first rests on"),
    "check": (_YES, "whether a person should look at it, however sure it is", False),
    "decision": (_one_of(("book", "check", "review")), "what to do with the first one", "book"),
    "known": (_one_of(KNOWN), "what was known of the sample", "the first word"),
    "own": (_of("Tally"), "the company's own ones of this account"),
    "all": (_of("Tally"), "those of all companies, with as much known"),
    "Tally.suggestions": (_COUNT, "how many there were", 38),
    "right": (_COUNT, "how many of them were right", 37),
    "seq": (_SEQ, "the booking's number", 1203),
    "before": (_FILLED, "the account that it was booked to until now", "7140"),
    "company": (_FILLED, "a company, by its CompanyId", "acme"),
    "forgotten": (_COUNT | {"minimum": 1}, "how many bookings it had", 312),
    "accuracy": (_SHARE, "the share that was right", 0.72),
    "precision": (_SHARE, "the mean of all accounts' precision", 0.51),
    "recall": (_SHARE, "the mean of all accounts' recall", 0.52),
    "support": (_COUNT | {"minimum": 1}, "predictions that this is about", 1000),
    "unseen": (_COUNT, "bookings that nobody has looked at", 60),
    "checks": (_COUNT, "bookings that were checked for all that nobody looked at", 4),
    "confused": (_list("Confusion", maxItems=CONFUSED), "the most frequent errors"),
    "Report.confidence": (_list("Level"), "how good they were when how sure"),
    "at_least": (_SHARE, "the level: so sure, or surer", 0.95),
    "share": (_SHARE, "the share of all predictions that is", 0.34),
    "Level.accuracy": (_or_null(_SHARE), "the share of these that was right", 0.976),
    "Level.error": (_or_null(_SHARE), "one standard error of this accuracy", 0.008),
    "booked": (_FILLED, "the account that it is booked to", "6300"),
    "predicted": (_FILLED, "the account that was predicted", "7140"),
    "count": (_COUNT, "how often that was", 3),
    "health": (_of("Health"), "how much is learned"),
    "metrics": ({"anyOf": [_of("Figures"), {"type": "null"}]}, "of the last predictions, if any"),
    "curve": (_list("Point", maxItems=129), "the learning curve"),
    "bookings": (_COUNT, "how many bookings there were", 15000),
    "scored": (_COUNT, "predictions that the confidence is about", 10000),
    "Overview.confidence": (_list("Level"), "how good they were when how sure"),
    "reviewed": (_YES, "whether a person has looked at it", True),
    "sample": (
        _of("Booked"),
        "the booking as it was sent, but as it is booked now, then without the name of the other "
        "account",
    ),
    "Booked.AccountNumber": (_FILLED, "the account that it is booked to", "6300"),
    "name": (_or_null(_FILLED), "the latest name of the account, if it has any", "Office costs"),
    "Standing.predicted": (_or_null(_FILLED), "the account that was predicted, if any", "7140"),
    "predicted_name": (_or_null(_FILLED), "the latest name of that, if it has any", "Travel"),
    "Standing.confidence": (_or_null(_SHARE), "how sure that was", 0.62),
    "rank": (_or_null(_COUNT | {"minimum": 1}), "the place of its account among all", 2),
    "booked_by": (_one_of(TIMES), "who booked it", "person"),
    "corrected": ({"anyOf": [_of("Change"), {"type": "null"}]}, "whether it was booked anew"),
    "Change.from": (_FILLED, "the account before", "7140"),
    "Bookings.bookings": (_list("Standing", maxItems=MAX_PAGE), "the page"),
    "next": (
        _or_null(_FILLED),
        "what to ask for the next page with, null if it is the last",
        "0.62:14950",
    ),
    "bookings.reviewed": (_one_of(("yes", "no")), "only what somebody, or nobody, saw", "no"),
    "below": (_SHARE, "only those predicted with less confidence", 0.9),
    "order": (
        _one_of(("newest", "confidence")) | {"default": "newest"},
        f"newest first, or the least sure of the last {LEAST_SURE} that match",
        "confidence",
    ),
    "bookings.limit": (
        *(_COUNT | {"minimum": 1, "maximum": MAX_PAGE, "default": 50}, "how many, at most", 20),
    ),
    "bookings.before": (
        {"type": "string", "pattern": "^[0-9.e-]{1,30}:[0-9]{1,18}$"},
        "next of the page before",
        "0.62:14950",
    ),
    "status": (_FILLED, "ok, or why bookings cannot be stored now", "ok"),
    "samples": (_COUNT, "bookings, also those that nobody has looked at", 15000),
    "lines": (_COUNT, "lines of the log", 15002),
    "accounts": (_COUNT, "accounts that are learned", 214),
    "companies": (_COUNT, "companies that have bookings", 50),
    "tokens": (_COUNT, "tokens that are learned", 90210),
    "uptime": (_ODDS | {"minimum": 0}, "seconds since the start", 86400.25),
    "error": (_FILLED, "one sentence that says what to change", "AccountNumber is missing"),
    "stream": (_of("Stream"), "how its log is kept equal to others"),
    "Stream.status": (_FILLED, "ok, or why the node cannot book now", "ok"),
    "node": (_FILLED, "the node's own name", "1f03a2c4"),
    "writer": (_or_null(_FILLED), "the node that writes now, null if none does", "77e0b15d"),
    "lag": (_COUNT, "lines of the stream that are not in its log yet", 0),
    "quorum": (_YES, "whether most of the stream's servers are there", True),
    "Ready.status": (_FILLED, "ready", "ready"),
    "n": (_SEQ | {"minimum": 1}, "over how many predictions, the last", 1000),
    "top": (_COUNT | {"minimum": 1, "maximum": Calibration.RANKS, "default": 3}, "how many", 1),
    "book_from": (_SHARE, "the confidence from which on you book unseen", 0.95),
    "from": (_SEQ | {"default": 0}, "the seq of the first line", 15000),
    "limit": (_SEQ, "how many lines, at most; all, if it is not said", 100),
    "id": (_FILLED, "a company, by its CompanyId", "acme"),
    "Idempotency-Key": (
        {"type": "string", "pattern": "^[!-~]([ -~]{0,198}[!-~])?$"},
        "the list's name: under it, it is stored once, however often it is sent",
        "june-1",
    ),
}
RECORDS = {  # what each is, its fields, and those that may be left out
    "Sample": ("a line of a bank statement", " ".join(FEATURES), "BankEntryDate AccountName"),
    "Booking": (
        *("a line of a bank statement, and how it is booked", f"{' '.join(FEATURES)} {TARGET}"),
        f"BankEntryDate AccountName {BOOKED_BY}",
    ),
    "Stored": ("these bookings are on disk, and learned", "received total first last"),
    "Reason": ("what something that the sample says speaks for", "token kind weight"),
    "Suggestion": ("an account", "account confidence over margin", "prior reasons"),
    "Tally": ("earlier suggestions with about as much evidence", "suggestions right"),
    "Record": ("what the first suggestion's confidence rests on", "known own all"),
    "Suggestions": ("the most likely accounts", "suggestions record check", "decision"),
    "Correction": ("a booking, and its right account", f"seq {TARGET}"),
    "Corrected": ("it is booked so, and learned", f"seq {TARGET} before"),
    "Forgotten": ("the company is neither in the log nor learned", "company forgotten"),
    "Metrics": ("means over the accounts, however rare", "precision recall"),
    "Figures": ("how good the last predictions were", "accuracy precision recall"),
    "Point": ("the same, after so many bookings", "bookings accuracy precision recall"),
    "Level": ("how good they were when so sure", "at_least share accuracy error checks"),
    "Confusion": ("an error", "booked predicted count"),
    "Report": (
        "how good the last predictions were",
        "support unseen checks accuracy precision recall confused confidence",
    ),
    "Booked": (
        *("a line of a bank statement, as it is booked now", f"{' '.join(FEATURES)} {TARGET}"),
    ),
    "Change": ("from what it was booked to before", "from"),
    "Standing": (
        "a booking as it stands now",
        "seq sample account name predicted predicted_name confidence rank reviewed booked_by "
        "corrected",
    ),
    "Bookings": ("a page of bookings", "bookings next"),
    "Overview": ("the page", "health metrics curve scored confidence"),
    "Health": (
        "how much is learned",
        *("status samples unseen checks lines accounts companies tokens uptime", "stream"),
    ),
    "Stream": ("a node among others", "status node writer lag quorum"),
    "Ready": ("bookings can be sent", "status"),
    "Error": ("why it was refused", "error"),
}


OTHERS = {  # answers that are no records
    "Accounts": {
        **{"type": "array", "items": _FILLED | {"examples": ["6300"]}},
        "description": "an account for each sample, in order",
    },
    "Suggested": {
        "anyOf": [_of("Suggestions"), _list("Suggestions")],
        "description": "for one sample, or for each in the list",
    },
    "Lines": {"type": "string", "description": "JSON Lines", "examples": ['{"seq": 15000, ...}']},
    "Text": {"type": "string", "description": "metrics", "examples": ["bookkeep_bookings 15000"]},
    "Page": {"type": "string", "description": "HTML", "examples": ["<!doctype html>"]},
    "Description": {"type": "object", "description": "this", "examples": [{"openapi": "3.1.0"}]},
}
MEDIA = {"Lines": JSON_LINES, "Text": "text/plain", "Page": "text/html"}  # else JSON
OPERATIONS = {  # tag, id, answer and some refusals; summary; parameters
    "POST /sample": ("bookings sample Stored 422 503 507", "book, and learn", "Idempotency-Key"),
    "POST /predict": ("suggestions predict Accounts 503", "predict the accounts of samples"),
    "POST /suggest": ("suggestions suggest Suggested 503", "and why", "top book_from reasons"),
    "POST /correct": ("bookings correct Corrected 404 503 507", "book to another account"),
    "DELETE /company": ("bookings forget Forgotten 404 503 507", "forget any company", "id"),
    "DELETE /company/{id}": (
        *("bookings forgetByPath Forgotten 404 503 507", "if a path can hold its id", "id"),
    ),
    "GET /metrics/{n}": ("quality metrics Metrics 503", "of the last n predictions", "n"),
    "GET /report/{n}": ("quality report Report 404 503", "more of that", "n company book_from"),
    "GET /bookings": (
        *("bookings bookings Bookings 404 507", "bookings as they stand now, a page at a time"),
        "company reviewed below order limit before",
    ),
    "GET /bookings/{seq}": ("bookings booking Standing 404 507", "one of them", "seq"),
    "GET /samples": ("bookings samples Lines 404", "lines of the log", "company from limit"),
    "GET /overview": ("quality overview Overview 404 503", "what the page shows", "company"),
    "GET /metrics": ("service prometheus Text", "figures for Prometheus"),
    "GET /health": ("service health Health 503", "how much is learned"),
    "GET /ready": ("service ready Ready 503", "whether bookings can be sent"),
    "GET /openapi.json": ("service openapi Description", "this description"),
    "GET /": ("service page Page", "the page"),
    "GET /desk.css": ("service style Page", "the page's style"),
    "GET /desk.js": ("service script Page", "the page's script"),
}


def openapi(max_batch: int, max_body: int, guarded: bool) -> dict:
    """The description of this API, in OpenAPI 3.1; guarded if it takes a token."""

    def or_one(most: int) -> dict:
        return {"anyOf": [_of("Sample"), _list("Sample", maxItems=most)]}

    bodies = {
        "sample": _list("Booking", maxItems=max_batch),
        "predict": or_one(max_batch),
        "suggest": or_one(max_batch),
        "correct": _of("Correction"),
    }
    paths: defaultdict[str, dict] = defaultdict(dict)
    for asked, row in OPERATIONS.items():
        method, path = asked.split()
        paths[path][method.lower()] = _operation(path, bodies, *row)
    learns = (
        "Learns from every booking and suggests the account of the next. A body has at most "
        f"{max_body} bytes. With the header Bookkeep-At-Least: n, an answer knows of the log's "
        "first n lines, or is a 503."
    )
    info = {
        "title": "bookkeep",
        "version": __version__,
        "license": {"name": "MIT", "identifier": "MIT"},
    }
    responses = {
        str(status): {"description": says} | _media(_of("Error"), example={"error": sentence})
        for status, (says, sentence) in REFUSALS.items()
    }
    return {
        "openapi": "3.1.0",
        "info": info | {"description": learns},
        "servers": [{"url": "/", "description": "this service"}],
        "tags": [{"name": name, "description": says} for name, says in TAGS.items()],
        "security": [{"token": []}] if guarded else [],
        "paths": paths,
        "components": {
            "schemas": {name: _record(name) for name in RECORDS} | OTHERS,
            "responses": responses,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}} if guarded else {},
        },
    }


def _operation(
    path: str, bodies: dict[str, dict], named: str, summary: str, parameters: str = ""
) -> dict:
    tag, name, answer, *refusals = named.split()
    statuses = {"400", *refusals, *([] if path in OPEN else ["401"])}
    statuses |= {"413", "415"} if name in bodies else set()
    made = {"operationId": name, "tags": [tag], "summary": summary}
    made["parameters"] = [_parameter(each, name, path) for each in parameters.split()]
    if name in bodies:
        made["requestBody"] = {"required": True} | _media(bodies[name])
    done = {"description": _resolved(_of(answer))["description"]}
    done |= _media(_of(answer), MEDIA.get(answer, "application/json"))
    refused = {status: _of(status, "responses") for status in [*sorted(statuses), "default"]}
    made["responses"] = {"200": done} | refused
    return made | ({"security": []} if path in OPEN else {})


def _parameter(name: str, operation: str, path: str) -> dict:
    in_path, header = f"{{{name}}}" in path, name == "Idempotency-Key"
    place = "path" if in_path else "header" if header else "query"
    schema = _field(name, operation)
    return {
        **{"name": name, "in": place, "required": in_path or name == "id", "schema": schema},
        **{"description": schema["description"], "example": _example(schema)},
    }


def _field(name: str, of: str) -> dict:
    """A field of a record, or a parameter of an operation."""
    schema, says, *examples = FIELDS.get(f"{of}.{name}") or FIELDS[name]
    return schema | {"description": says} | ({"examples": examples} if examples else {})


def _record(name: str) -> dict:
    says, fields, *optional = RECORDS[name]
    properties = {each: _field(each, name) for each in " ".join([fields, *optional]).split()}
    shape = {"type": "object", "description": says, "required": fields.split()}
    others = _TEXT if fields.startswith(FEATURES[0]) else False
    return shape | {"properties": properties, "additionalProperties": others}


def _resolved(schema: dict) -> dict:
    name = schema.get("$ref", "").rpartition("/")[2]
    return _record(name) if name in RECORDS else OTHERS.get(name, schema)


def _example(schema: dict) -> object:
    """What a schema describes, made of the examples of its parts."""
    schema = _resolved(schema)
    if "anyOf" in schema:
        return _example(schema["anyOf"][0])
    if "properties" in schema:
        return {name: _example(part) for name, part in schema["properties"].items()}
    return schema["examples"][0] if "examples" in schema else [_example(schema["items"])]


def _media(schema: dict, media: str = "application/json", example: object = None) -> dict:
    return {"content": {media: {"schema": schema, "example": example or _example(schema)}}}


# ------------------------------------------------------------------------------------------- HTTP

MAX_BODY = 64 << 20  # bytes of a request's body
LARGE_BODY = 1 << 20  # bytes from which a body has to wait for its turn
AT_LEAST = "HTTP_BOOKKEEP_AT_LEAST"  # of an environ: lines that an answer must know of
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}  # of every answer

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
BUILD = f'build_info{{version="{__version__}",python="{sys.version.split()[0]}"}}'

STATUS = {  # of what is raised above
    BadRequest: 400,
    NotFound: 404,
    Conflict: 422,
    NotReady: 503,
    NotStored: 507,
}


class Histogram:
    """How often something took how long, as Prometheus counts it, for each of some labels."""

    BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[list[int], list[float]]] = {}  # labels -> counts, [sum]

    def observe(self, seconds: float, labels: str = "") -> None:
        """Counts one that took so long."""
        with self._lock:
            new = [0] * (len(self.BOUNDS) + 1), [0.0]
            counts, total = self._seen.setdefault(labels, new)
            counts[bisect_left(self.BOUNDS, seconds)] += 1
            total[0] += seconds

    def seen(self, part: str) -> int:
        """How many have that in their labels."""
        with self._lock:
            return sum(sum(counts) for labels, (counts, _) in self._seen.items() if part in labels)

    def exposition(self, name: str) -> Iterator[str]:
        """Its lines in Prometheus's text format."""
        with self._lock:
            seen = [(labels, [*counts], *total) for labels, (counts, total) in self._seen.items()]
        for labels, counts, total in seen:
            for bound, so_far in zip((*self.BOUNDS, "+Inf"), accumulate(counts), strict=True):
                yield f'{name}_bucket{{{labels}{labels and ","}le="{bound}"}} {so_far}'
            braced = labels and f"{{{labels}}}"
            yield f"{name}_sum{braced} {total}"
            yield f"{name}_count{braced} {sum(counts)}"


def create_app(
    bookkeeper: Bookkeeper,
    token: str | None = None,
    hosts: Collection[str] | None = None,
    max_body: int = MAX_BODY,
    max_batch: int = MAX_BATCH,
) -> Bottle:
    """The WSGI app that answers for this bookkeeper, all but the page in JSON, errors too.

    With a token, all but OPEN is for those who send it. With hosts, it is for those who call the
    service by one of these names: a web page whose own name was made to lead here does not. Its
    `refuses` says of an environ whether its headers suffice to refuse the request, its
    `is_quick` whether a prediction for one sample of so many bytes takes no time, its `is_busy`
    whether that would have to wait.
    """
    app = Bottle()
    app.install(_in_json)
    app.install(lambda callback: partial(checked, callback))
    app.default_error_handler = _error_in_json
    description = openapi(max_batch, max_body, token is not None)
    parsing = threading.Lock()  # parsed JSON may take 20 times its bytes, so one at a time
    durations, fsyncs = Histogram(), Histogram()
    bookkeeper.log.fsynced = fsyncs.observe

    def authorize() -> None:
        """Refuses who may not ask. Raises HTTPError."""
        environ = request.environ
        if environ["PATH_INFO"].encode() != environ["bottle.raw_path"].encode("latin-1"):
            raise HTTPError(400, "the path must be UTF-8, percent-encoded")
        host = re.sub(":[0-9]*$", "", environ.get("HTTP_HOST", "")).lower()
        if hosts is not None and host not in hosts:
            raise HTTPError(403, f"call this service by one of its names: {', '.join(hosts)}")
        if token is not None and request.path not in OPEN:
            scheme, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
            right = hmac.compare_digest(given.encode("latin-1"), token.encode())
            if scheme.lower() != "bearer" or not right:
                raise HTTPError(
                    401,
                    "send the token, with the header Authorization: Bearer <token>",
                    **{"WWW-Authenticate": "Bearer"},
                )

    def check(route: Route) -> None:
        """Refuses what else can be refused from the headers. Raises HTTPError."""
        takes = operations[route]
        if request.query_string:
            names = [name for name, _ in request.query.allitems()]
            known = [each["name"] for each in takes["parameters"] if each["in"] == "query"]
            if set(names) - set(known) or len(names) > len(set(names)):
                these = f"only {', '.join(known)}, each once" if known else "nothing"
                raise HTTPError(400, f"send {these} after the ? of this path")
        if "requestBody" in takes:
            kind = request.content_type.partition(";")[0].strip()
            if kind != "application/json":
                raise HTTPError(415, "send JSON, with the header Content-Type: application/json")
        if request.content_length > max_body:
            raise HTTPError(413, f"send at most {max_body} bytes in one request")
        if (total := request.environ.get(AT_LEAST)) is not None:
            number("Bookkeep-At-Least", total, 0)

    @app.hook("before_request")
    def arrive() -> None:
        request.environ["bookkeep.arrival"] = time.perf_counter()
        authorize()

    def checked(callback: Callable, **arguments: str) -> object:
        check(request.environ["bottle.route"])
        bookkeeper.require_lines(int(request.environ.get(AT_LEAST, 0)))
        return callback(**arguments)

    def refuses(environ: dict) -> bool:
        path = environ["bottle.raw_path"] = environ["PATH_INFO"]
        environ["PATH_INFO"] = path.encode("latin-1").decode(errors="ignore")  # as Bottle does
        request.bind(environ)
        try:
            authorize()
            check(app.match(environ)[0])
        except HTTPError:
            return True
        return False

    @app.hook("after_request")
    def protect() -> None:
        for name, value in HEADERS.items():
            response.set_header(name, value)
        route = request.environ.get("bottle.route")
        path = _path(route.rule) if route else "other"
        seconds = time.perf_counter() - request.environ["bookkeep.arrival"]
        durations.observe(seconds, f'path="{path}",status="{response.status_code}"')

    def received() -> object:
        with parsing if request.content_length > LARGE_BODY else nullcontext():
            return parse_json(request.body.read())

    def number(name: str, text: str, least: int, most: int = MAX_NUMBER) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise HTTPError(400, f"{name} must be a whole number from {least} to {most}")
        return int(text)

    def text_asked(name: str) -> str | None:
        value = request.query.getunicode(name)
        if value is None and name in request.query:
            raise HTTPError(400, f"{name} must be UTF-8, percent-encoded")
        return value

    def share_asked(name: str) -> float | None:
        text = request.query.get(name)
        with suppress(ValueError):
            if text is None:
                return None
            if re.fullmatch("[0-9.e-]+", text) and 0 <= float(text) <= 1:
                return float(text)
        raise HTTPError(400, f"{name} must be a number from 0 to 1, such as 0.95")

    def choice_asked(name: str, **choices: bool) -> bool | None:
        text = request.query.get(name)
        if text is not None and text not in choices:
            raise HTTPError(400, f"{name} must be {' or '.join(choices)}")
        return choices.get(text)

    def page_before() -> tuple[float, int] | None:
        text = request.query.get("before")
        with suppress(ValueError):
            if text is None:
                return None
            if found := re.fullmatch("([0-9.e-]+):([0-9]{1,18})", text):
                return float(found[1]), int(found[2])
        raise HTTPError(400, "before must be what the page before says is `next`")

    @app.post("/sample")
    def sample() -> dict:
        key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
        if key is not None and not re.fullmatch("[ -~]{1,200}", key):
            raise HTTPError(400, "an Idempotency-Key must be 1 to 200 printable ASCII characters")
        stored = bookkeeper.book(check_samples(received(), True, max_batch), key)
        first, last = (stored[0], stored[-1]) if stored else (None, None)
        return {"received": len(stored), "total": stored.stop, "first": first, "last": last}

    @app.post("/predict")
    def predict() -> list[str]:
        return bookkeeper.predict(check_samples(received(), False, max_batch))

    @app.post("/suggest")
    def suggest() -> dict | list[dict]:
        top = number("top", request.query.get("top", "3"), 1, Calibration.RANKS)
        level = share_asked("book_from")
        with_reasons = choice_asked("reasons", yes=True, no=False) is not False
        asked = received()
        most = MAX_SUGGESTED // top
        if with_reasons and isinstance(asked, list) and len(asked) > most:
            raise BadRequest(
                f"with reasons, send at most {most} samples in one request, not {len(asked)}; "
                "?reasons=no leaves them out"
            )
        samples = check_samples(asked, False, max_batch)
        answers = bookkeeper.suggest(samples, top, level, with_reasons)
        return answers if isinstance(asked, list) else answers[0]

    @app.post("/correct")
    def correct() -> dict:
        match received():
            case {"seq": float(seq), "AccountNumber": account, **others} if not others:
                check_sample({TARGET: account}, (TARGET,))
                if not (seq.is_integer() and 0 <= seq <= MAX_NUMBER):
                    raise BadRequest(f"seq must be a whole number from 0 to {MAX_NUMBER}")
                before = bookkeeper.correct(int(seq), account)
                return {"seq": int(seq), TARGET: account, "before": before}
        raise BadRequest('send {"seq": 1203, "AccountNumber": "6700"}, and nothing else')

    @app.delete("/company")  # clients take .. and the like out of a path
    @app.delete("/company/<id:re:(?s:.+)>")
    def company(id: str | None = None) -> dict:
        id = id or text_asked("id")
        if not id:
            raise HTTPError(400, "say which company, as in /company?id=acme")
        return {"company": id, "forgotten": bookkeeper.forget(id)}

    @app.get("/metrics/<n>")
    def metrics(n: str) -> dict[str, float]:
        return bookkeeper.metrics(number("n, after /metrics/,", n, 1))

    @app.get("/report/<n>")
    def report(n: str) -> dict:
        n = number("n, after /report/,", n, 1)
        return bookkeeper.report(n, text_asked("company"), share_asked("book_from"))

    @app.get("/bookings")
    def bookings() -> dict:
        limit = number("limit", request.query.get("limit", "50"), 1, MAX_PAGE)
        found, end = bookkeeper.bookings(
            limit,
            text_asked("company"),
            reviewed=choice_asked("reviewed", yes=True, no=False),
            below=share_asked("below"),
            by_confidence=choice_asked("order", newest=False, confidence=True),
            before=page_before(),
        )
        return {"bookings": found, "next": end and "{}:{}".format(*end)}

    @app.get("/bookings/<seq>")
    def one_booking(seq: str) -> dict:
        return bookkeeper.booking(number("seq, after /bookings/,", seq, 0))

    @app.get("/samples")
    def samples() -> BinaryIO | str:
        first = number("from", request.query.get("from", "0"), 0)
        limit = number("limit", request.query.get("limit", str(MAX_NUMBER)), 0)
        company = text_asked("company")
        if company is None:
            lines, size = bookkeeper.log.export(range(first, first + limit))
        else:
            lines, size = bookkeeper.lines(company, first, limit)
        response.content_type = JSON_LINES
        response.content_length = size
        if not size:
            lines.close()
            return ""
        return lines  # which waitress sends by itself, so that a slow reader keeps no thread

    @app.get("/metrics")
    def prometheus() -> str:
        response.content_type = "text/plain; version=0.0.4; charset=utf-8"
        refused = ("Requests that were answered with a status of 4xx.", durations.seen('status="4'))
        watched = bookkeeper.gauges() | {"refused_total": refused, BUILD: ("What runs.", 1)}
        watched = {f"bookkeep_{name}": figure for name, figure in watched.items()} | process()
        return "".join(f"{line}\n" for line in _exposition(watched, durations, fsyncs))

    @app.get("/overview")
    def overview() -> dict:
        return bookkeeper.overview(text_asked("company"))

    @app.get("/health")
    def health() -> dict:
        return bookkeeper.health()

    @app.get("/ready")
    def ready() -> dict:
        bookkeeper.require_ready()
        return {"status": "ready"}

    @app.get("/openapi.json")
    def described() -> dict:
        return description

    @app.get("/")
    def page() -> str:
        response.set_header("Content-Security-Policy", PAGE_POLICY)
        return page_file("index.html", "text/html")

    @app.get("/desk.css")
    def style() -> str:
        return page_file("desk.css", "text/css")

    @app.get("/desk.js")
    def script() -> str:
        return page_file("desk.js", "text/javascript")

    def page_file(name: str, media: str) -> str:
        try:
            content = (Path(__file__).parent / "bookkeep_extra" / "page" / name).read_text()
        except FileNotFoundError:
            raise HTTPError(
                404, "there is no page: bookkeep_extra/page is missing"
            ) from None
        response.content_type = f"{media}; charset=utf-8"
        return content

    @app.error(404)
    def not_found(error: HTTPError) -> str:
        if error.body.startswith("Not found: "):  # Bottle's own
            error.body = f"there is nothing here; {' '.join(description['paths'])} is all"
        return _error_in_json(error)

    @app.error(405)
    def not_allowed(error: HTTPError) -> str:
        error.body = f"ask for this with {response.get_header('Allow')}"
        return _error_in_json(error)

    operations = {
        route: description["paths"][_path(route.rule)][route.method.lower()] for route in app.routes
    }
    app.refuses, app.is_quick, app.is_busy = (
        refuses,
        bookkeeper.is_quick,
        bookkeeper.is_busy,
    )
    return app


def starting_app(log: Log) -> Bottle:
    """The WSGI app for as long as the log is read back: it only says how far that is."""
    app = Bottle()
    app.default_error_handler = _error_in_json

    @app.hook("before_request")
    def refuse() -> None:
        more = {"Retry-After": "1", **HEADERS}
        raise HTTPError(503, f"the log is being read back, {log.progress()} so far", **more)

    app.refuses, app.is_quick, app.is_busy = lambda environ: True, lambda size: False, bool
    return app


def _in_json(callback: Callable) -> Callable:
    """A Bottle plugin: what a route returns becomes JSON, what it raises an error with a status.

    Texts and files are left as they are.
    """

    def route(**arguments: str) -> str | BinaryIO:
        try:
            answer = callback(**arguments)
        except HTTPError:
            raise
        except Exception as error:
            for raised, status in STATUS.items():
                if isinstance(error, raised):
                    again = {"Retry-After": "1"} if isinstance(error, Busy) else {}
                    raise HTTPError(status, str(error), **again) from None
            logger.exception("%s %s failed", request.method, request.path)
            raise HTTPError(500, "the service failed to answer; its log says why") from None
        if not isinstance(answer, dict | list):
            return answer
        response.content_type = "application/json"
        if isinstance(answer, list):  # in parts: while one is made, all other threads wait
            parts = (_encode(part)[1:-1] for part in chunks(answer, CHUNK))
            return f"[{', '.join(parts)}]"
        return _encode(answer)

    return route


@cache
def _path(rule: str) -> str:
    """A route's path as the API's description has it."""
    return re.sub("<(.*?)(:.*?)?>", r"{\1}", rule)


def process() -> dict[str, tuple[str, float]]:
    """What the system says of this process, as Prometheus's own clients do; {} without /proc."""
    try:
        # What follows the name, which may hold anything: state, parent, ... (man 5 proc).
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        boot = re.search("^btime ([0-9]+)$", Path("/proc/stat").read_text(), re.MULTILINE)
        files = len(os.listdir("/proc/self/fd")) - 1  # one of them is to list them
    except OSError:
        return {}
    ticks = os.sysconf("SC_CLK_TCK")
    cpu, started = (int(fields[11]) + int(fields[12])) / ticks, int(fields[19]) / ticks
    memory = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "process_cpu_seconds_total": ("Seconds of all processors, user and system.", cpu),
        "process_resident_memory_bytes": ("Bytes of memory in use.", memory),
        "process_start_time_seconds": ("When it started, since 1970.", int(boot[1]) + started),
        "process_open_fds": ("Files and connections that are open.", files),
        "process_max_fds": ("Files and connections that may be open.", most),
    }


def _exposition(
    watched: dict[str, tuple[str, float]], durations: Histogram, fsyncs: Histogram
) -> Iterator[str]:
    """What an operator watches, in Prometheus's text format."""
    for labelled, (text, value) in watched.items():
        name = labelled.partition("{")[0]
        yield f"# HELP {name} {text}"
        yield f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}"
        yield f"{labelled} {value}"
    for name, text, histogram in (
        ("request", "How long requests took, by path and status.", durations),
        ("fsync", "How long the disk took to store batches.", fsyncs),
    ):
        name = f"bookkeep_{name}_duration_seconds"
        yield f"# HELP {name} {text}"
        yield f"# TYPE {name} histogram"
        yield from histogram.exposition(name)


def _error_in_json(error: HTTPError) -> str:
    response.content_type = "application/json"
    return json.dumps({"error": error.body})


# ----------------------------------------------------------------------------------------- Server

SHORT_BODY = 1 << 10  # bytes of a question that is answered without another thread
TURN = 0.004  # seconds of such answers, after which it looks for what else there is to do
ROOM = 2  # times what waitress takes of one request: for all large ones that are not answered
SLOW = 1 << 17  # bytes a second; who sends fewer, or none for a while, makes room for others
PATIENT = 5  # seconds, that while
FEWEST = 10  # connections, for which the system must let it open files
GRACE = 4  # seconds that requests have to arrive, and answers to be read, when the service stops
STOPS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


class Server:
    """Waitress, which calls the app: the one place that knows its insides."""

    def __init__(self, app: Bottle, listener: socket.socket, threads: int, max_body: int) -> None:
        """Listens, but does not answer yet. Raises OSError if it may open too few files."""
        _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        # A connection takes a socket, and a file for a body of over 512 KiB.
        most = 1000 if files == resource.RLIM_INFINITY else min(1000, files // 2 - 50)
        if most < FEWEST:
            raise OSError(f"let it open at least {2 * FEWEST + 100} files (ulimit -n), not {files}")
        self._dispatcher = Dispatcher(threads)
        self._listener = listener
        self._stopping = threading.Event()
        self._server = waitress.create_server(
            app,
            _dispatcher=self._dispatcher,
            sockets=[listener],
            ident=None,
            connection_limit=most,
            asyncore_use_poll=True,
            # The app refuses long bodies, in JSON; waitress refuses what is not worth receiving.
            max_request_body_size=2 * max_body + (1 << 20),
        )
        self._server.channel_class = Channel
        self.call(app)
        self._server.pull_trigger = self._wake
        self._server.handle_accept = partial(self._accept, self._server.handle_accept)
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # waiting for a thread is fine

    def call(self, app: Bottle) -> None:
        """Has this app answer what comes from now on."""
        self._server.application = self._dispatcher.app = app

    def answer(self, until: Future | None = None) -> bool:
        """Answers requests until one of STOPS, then those that are under way; or until it is done.

        Says whether it was stopped.
        """
        on_signals(self._stop)
        if until:
            until.add_done_callback(lambda _: self._server.trigger.pull_trigger())
        while not self._stopping.is_set():
            if until and until.done():
                return False
            self._turn(1)

        self._server.del_channel()
        self._listener.close()
        self._turn(0)  # what has arrived by now is under way
        self._server.accepting = False
        deadline = time.monotonic() + GRACE
        while channels := list(self._server.active_channels.values()):
            late = time.monotonic() > deadline
            for channel in channels:
                if channel.is_done() or (late and not channel.is_worked_on()):
                    channel.handle_close()
            self._turn(0.05)
        self._dispatcher.shutdown()
        return True

    def _stop(self, number: int, _: object) -> None:
        logger.info("stopping on %s", signal.Signals(number).name)
        self._stopping.set()  # also if it comes before it answers for the next app
        self._server.trigger.pull_trigger()

    def _turn(self, seconds: float) -> None:
        seconds = 0 if self._dispatcher.short else seconds
        self._server.full = False
        self._server.asyncore.loop(seconds, use_poll=True, map=self._server._map, count=1)
        self._dispatcher.answer_short()

    def _wake(self) -> None:
        """Has the loop look again, unless it is the loop that asks: it will."""
        if threading.get_ident() != self._dispatcher.receiver:
            self._server.trigger.pull_trigger()

    def _accept(self, accept: Callable[[], None]) -> None:
        """Accepts all that wait: if each had to wait for a turn, many would wait for long."""
        before = -1
        while before != (before := len(self._server._map)) and self._server.readable():
            accept()


def on_signals(handler: Callable) -> None:
    """Has this called on each of STOPS that is not ignored, as nohup ignores SIGHUP."""
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class Logged:
    """A task of waitress's that leaves a line in the access log: no body, query or name."""

    def service(self) -> None:
        """Answers a request."""
        arrived = self.channel.last_activity
        try:
            super().service()
        finally:
            route = (getattr(self, "environ", None) or {}).get("bottle.route")
            access.info(
                "%s %s %s %s %d %.1f ms",
                self.channel.addr[0],
                getattr(self.request, "command", "-"),
                _path(route.rule) if route else "-",
                self.status[:3],
                self.content_length or self.content_bytes_written,
                1e3 * (time.time() - arrived),
            )


class AppTask(Logged, WSGITask):
    """What the app answers."""


class JSONErrorTask(Logged, ErrorTask):
    """What waitress answers, in JSON, to a request that it does not hand on."""

    def execute(self) -> None:
        """Writes the answer."""
        error = self.request.error
        reason = f"send a shorter or a proper HTTP request ({error.reason}: {error.body})"
        body = json.dumps({"error": reason}).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", "application/json"), *HEADERS.items()]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Request(HTTPRequestParser):
    """A request while it is received: what the app refuses in any case is answered at once."""

    path = ""  # until it is known
    took = 0  # bytes of the room for large ones
    since = 0.0  # when it took them

    def __init__(self, channel: "Channel") -> None:
        super().__init__(channel.adj)
        self._channel: Channel | None = channel

    def received(self, data: bytes) -> int:
        """Takes what it needs of the data, and says how many bytes."""
        consumed = super().received(data)
        if self.headers_finished and self._channel:
            channel, self._channel = self._channel, None  # a cycle would keep the body for long
            lacks = self.content_length > len(data) - consumed
            if (lacks or self.chunked or self.expect_continue) and not self.error:
                environ = WSGITask(channel, self).get_environment()
                if channel.server.application.refuses(environ):
                    self._go_without_body(channel)
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        """Reads the headers. Raises ParsingError."""
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # an address in brackets that is none
            raise ParsingError(str(error)) from None
        if "CONTENT_LENGTH" in self.headers and (
            self.chunked or "TRANSFER_ENCODING" in self.headers
        ):
            raise ParsingError("send Content-Length or Transfer-Encoding, not both")

    def _go_without_body(self, channel: "Channel") -> None:
        if self.expect_continue:  # nobody knows whether the body will come
            self.headers["CONNECTION"] = "close"
        else:
            channel.rest = Rest(self.adj, self.body_rcv)
        self.body_rcv, self.content_length = None, 0
        self.expect_continue, self.completed = False, True


class Rest(HTTPRequestParser):
    """The body of a request that was refused without it: it is received, and thrown away."""

    path, took = "", 0

    def __init__(self, adj: Adjustments, receiver: FixedStreamReceiver | ChunkedReceiver) -> None:
        super().__init__(adj)
        receiver.buf = deque(maxlen=0)
        self.body_rcv = receiver

    @property
    def empty(self) -> bool:
        """Whether it needs no answer: it does if nobody knows where the next request starts."""
        return not self.error

    def close(self) -> None:
        """Keeps nothing."""


class Channel(HTTPChannel):
    """A connection of waitress's whose errors are in JSON."""

    task_class = AppTask
    error_task_class = JSONErrorTask
    rest: Rest | None = None  # what comes next, if it is no request

    def parser_class(self, _: Adjustments) -> HTTPRequestParser:
        """What receives whatever comes next."""
        rest, self.rest = self.rest, None
        return rest or Request(self)

    def readable(self) -> bool:
        """Whether it is to receive: no further request once the service stops."""
        if self.request is None:
            return self.server.accepting and super().readable()
        return super().readable() and self._has_room(self.request)

    def is_done(self) -> bool:
        """Whether it has neither a request nor an answer under way."""
        return not (self.requests or self.request or self.total_outbufs_len)

    def is_worked_on(self) -> bool:
        """Whether it has a whole request whose answer has not begun."""
        return bool(self.requests) and not self.total_outbufs_len

    def _has_room(self, request: HTTPRequestParser) -> bool:
        """Whether it is small, or has room among the large ones; if not, slow ones go."""
        size = max(request.content_length, request.body_bytes_received)
        if request.empty or request.took or size <= LARGE_BODY:
            return True
        if self.server.full:  # in this turn: to look at all for each that waits would take long
            return False
        most = self.adj.max_request_body_size
        needed = request.content_length or most
        channels = self.server.active_channels.values()
        large = [(channel, each) for channel in channels for each in channel.all() if each.took]
        now = time.time()  # as waitress's last_activity
        if not large or sum(each.took for _, each in large) + needed <= ROOM * most:
            request.took, request.since = needed, now
            return True
        self.server.full = True
        for channel, each in large:
            slow = each.body_bytes_received < SLOW * (now - each.since - PATIENT)
            if slow or channel.last_activity < now - PATIENT:
                channel.will_close = not channel.requests
        return False

    def all(self) -> list[HTTPRequestParser]:
        """The requests that wait for their answers, and that which is received."""
        return [*self.requests, *filter(None, [self.request])]


class Dispatcher:
    """Threads of waitress's, others for each kind of request, so that no kind waits for another.

    A short question is answered by the very thread that received it: to hand it to another and
    back takes longer than to answer it. They take turns with all else that this thread does.
    """

    app: Bottle

    def __init__(self, threads: int) -> None:
        self.receiver = threading.get_ident()
        self.short: deque[Channel] = deque()  # whose next request is a short question
        self._looks, self._questions, self._changes, self._forgetting = self._pools = [
            ThreadedTaskDispatcher() for _ in range(4)
        ]
        for pool in self._pools:
            pool.set_thread_count(threads if pool is not self._forgetting else 1)

    def add_task(self, channel: Channel) -> None:
        """Has the channel's next request answered."""
        if threading.get_ident() == self.receiver and self._is_short(channel.requests[0]):
            self.short.append(channel)
        else:
            self._hand_out(channel)

    def _is_short(self, request: HTTPRequestParser) -> bool:
        return (
            not request.error
            and request.path == "/predict"
            and AT_LEAST.removeprefix("HTTP_") not in request.headers
            and 0 < request.content_length <= SHORT_BODY
            and request.body_rcv.getbuf().get().lstrip().startswith(b"{")
        )

    def answer_short(self) -> None:
        """Answers short questions, for no longer than a turn takes."""
        end = time.perf_counter() + TURN
        while self.short and not self.app.is_busy() and time.perf_counter() < end:
            channel = self.short.popleft()
            # Before a further request, it might wait for what only this thread can send.
            alone = len(channel.requests) == 1
            if alone and self.app.is_quick(channel.requests[0].content_length):
                channel.service()
            else:
                self._hand_out(channel)

    def _hand_out(self, channel: Channel) -> None:
        request = channel.requests[0]
        if request.error or request.command in ("GET", "HEAD"):
            self._looks.add_task(channel)
        elif request.path in ("/predict", "/suggest"):
            self._questions.add_task(channel)
        elif request.command == "DELETE":  # one company after the other, and bookings meanwhile
            self._forgetting.add_task(channel)
        else:
            self._changes.add_task(channel)

    def shutdown(self) -> None:
        """Ends the threads."""
        for pool in self._pools:
            pool.shutdown()


# ----------------------------------------------------------------------------------- Command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the service until one of STOPS, or checks a log; the exit status."""
    options = _options(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    access.disabled = not options.access_log
    try:
        on_signals(signal.default_int_handler)  # as Ctrl-C, until it serves
        if options.command == "check":
            return check(options.checked, options.repair)
        serve(options)
    except (LogError, OSError) as error:
        named = isinstance(error, OSError) and error.filename
        reason = f"{error.filename}: {error.strerror}" if named else error
        print(f"bookkeep: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        logger.info("stopped before it was done")
        return 130 if options.command == "check" else 0
    return 0


def serve(options: argparse.Namespace) -> None:
    """Runs the service. Raises LogError or OSError if it cannot."""
    token = read_token(options.token_file)
    listener = _bind(options.host, options.port)
    host, port = listener.getsockname()[:2]
    if not (token or options.open or ipaddress.ip_address(host).is_loopback):
        raise OSError(
            f"{host} can be reached from other machines: set a token in BOOKKEEP_TOKEN or with "
            "--token-file, or give --open to let anybody read and teach"
        )
    log = Log(options.log)
    server = Server(starting_app(log), listener, options.threads, options.max_body)
    started = time.monotonic()
    if options.stream:
        sys.modules.setdefault("bookkeep", sys.modules[__name__])  # which may be "__main__"
        try:
            from bookkeep_extra import cluster
        except ImportError:
            raise OSError("--stream needs nats-py: pip install 'bookkeep[cluster]'") from None

        keeper = partial(cluster.Node, options.stream)
    else:
        keeper = Bookkeeper
    reading = _in_background(partial(keeper, log, options.unsaved))
    if server.answer(reading):
        raise KeyboardInterrupt
    bookkeeper = reading.result()
    seconds = time.monotonic() - started
    names = {"localhost", "127.0.0.1", "[::1]", options.host.lower(), *options.name}
    hosts = None if token or options.open else sorted(names)
    app = create_app(bookkeeper, token, hosts, options.max_body, options.max_batch)
    server.call(app)
    logger.info(
        "serving on http://%s:%d, log %s, %d bookings read back in %.1f s",
        *(f"[{host}]" if ":" in host else host, port),
        *(log.path, bookkeeper.gauges()["bookings"][1], seconds),
    )
    server.answer()
    bookkeeper.close()
    logger.info("stopped")


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
    checking = commands.add_parser(
        "check",
        help="verify a log without serving it",
        description="Prints a line for each problem of a log; the exit status is 0 if it has none.",
    )
    checking.add_argument("checked", type=Path, metavar="LOG", help="the log to verify")
    repair = "write all its whole batches to LOG.repaired, and say what is left out"
    checking.add_argument("--repair", action="store_true", help=repair)
    return parser.parse_args(arguments)


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
    lines = "write a line for each request to standard error: no body, query or name"
    option("access-log", lines, _yes_or_no, False, action="store_true")
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


def _bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, so that a port in use shows before the log is read."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no host name"
        raise OSError(f"cannot listen on {host}, port {port}: {reason}") from None
    return listener


if __name__ == "__main__":
    sys.exit(main())
