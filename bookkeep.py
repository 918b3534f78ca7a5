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

import argparse
import errno
import fcntl
import gc
import hmac
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
import zlib
from array import array
from base64 import b64encode
from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from hashlib import blake2b, sha256
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

__version__ = "0.3.0"

logger = logging.getLogger("bookkeep")
access = logging.getLogger("bookkeep.access")  # a line for each request

# ---------------------------------------------------------------------------------------- Samples

FEATURES = ("CompanyId", "BankEntryText", "BankEntryAmount")
TARGET = "AccountNumber"
BOOKED_BY = "BookedBy"  # optional: who booked it, a person if it is not said
CHECKS = 16  # of the suggestions that could be booked unseen, one in so many is to be checked
TIMES = {"person": 1, "check": CHECKS, "suggestion": 0}  # that such a booking is scored

MAX_BATCH = 10_000  # samples in one body
MAX_VALUE = 10_000  # characters in a key or a value
SHORT = ("CompanyId", "BankEntryAmount", TARGET)  # of at most MAX_SHORT characters
MAX_SHORT = 100
MAX_WORDS = 100  # words of a text that become tokens: its first ones

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
        raise BadRequest(f"{_shown(key)} must be a string") from None
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
    """The sample's company, the words of its text that count, and its amount."""
    words = sample["BankEntryText"].split(maxsplit=MAX_WORDS)[:MAX_WORDS]
    return sample["CompanyId"], words, sample["BankEntryAmount"]


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
        """(k,) the accounts of the highest of (A,) scores, best first; of equals, by name."""
        least = np.sort(scores)[-most:][0]
        some = np.flatnonzero((scores >= least) & (scores > -np.inf)).tolist()
        best = sorted(some, key=lambda account: (-scores[account], self.names[account]))
        return np.array(best[:most], dtype=np.int64)

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
        self._end = 0

    def state(self) -> Arrays:
        """The whole table; arrays that are its own."""
        return {"history": self.rows, "history_names": _packed([self.accounts, self.companies])}

    def restore(self, state: Arrays) -> None:
        """Takes over the table of another."""
        self.accounts, self.companies = map(_numbers, _unpacked(state["history_names"]))
        self._table = state["history"]
        self._end = len(self._table)
        companies, sizes = np.unique(self.rows["company"], return_counts=True)
        self._sizes.update(dict(zip(companies.tolist(), sizes.tolist(), strict=True)))

    @property
    def rows(self) -> np.ndarray:
        """All rows: an array that stays as it is, but for corrections, whatever comes later."""
        return self._table[: self._end]

    def append(self, rows: np.ndarray, names: Iterable[tuple[str, str, str | None]]) -> None:
        """Adds rows, and numbers their companies, accounts booked and accounts predicted."""
        rows["company"], rows["booked"], rows["predicted"] = (
            np.array(
                [
                    (
                        self.companies[company],
                        self.accounts[booked],
                        -1 if predicted is None else self.accounts[predicted],
                    )
                    for company, booked, predicted in names
                ],
                dtype=np.int32,
            )
            .reshape(-1, 3)
            .T
        )
        end = self._end + len(rows)
        if end > len(self._table):
            self._table = _grown(self._table, 2 * end)
        self._table[self._end : end] = rows
        self._end = end
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
        return self.rows[self.rows["company"] == self.companies.get(company, -1)]

    def find(self, seqs: np.ndarray) -> np.ndarray:
        """(m,) which rows have these seqs."""
        return self.rows["seq"].searchsorted(seqs)

    def correct(self, seq: int, account: str, rank: int) -> None:
        """Has a person book an account, which had that rank, in the row of that seq."""
        row = self.rows[self.find(seq)]  # a view
        row["booked"], row["rank"], row["reviewed"] = self.accounts[account], rank, True

    def forget(self, seqs: np.ndarray) -> np.ndarray:
        """Drops the rows of these (m,) seqs, or of those that have one, and gives them."""
        gone = np.isin(self.rows["seq"], seqs)
        rows, self._table = self.rows[gone], self.rows[~gone]
        self._end = len(self._table)
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

    def shared(self, confidence: float) -> np.ndarray:
        """(RANKS,) the confidence of the first suggestion and of the others, best first.

        These share what it leaves as the ranks of wrongly predicted accounts have been.
        """
        others = (1 - confidence) * self._ranks[2:] / (self._ranks.sum() + self.DOUBT)
        return np.minimum.accumulate([confidence, *others])

    def record(self, row: np.ndarray) -> dict[str, dict[str, int]]:
        """What the confidence of a suggestion (1,) rests on, with about as much evidence."""
        _, own = self._own_of(row)[0].tolist()
        known, wide = int(row["known"][0]), int(row["bin"][0]) // self.WIDE
        near = slice(max(0, wide - 1) * self.WIDE, (wide + 2) * self.WIDE)
        everybodys = [int(counts[known, near].sum()) for counts in (self._all, self._right)]
        return {
            name: dict(zip(("suggestions", "right"), counts, strict=True))
            for name, counts in (("own", own), ("all", everybodys))
        }

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
        return [self.record(seq) for seq in self._keys[key]] if key in self._keys else None

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
        key = batch.records[0]["batch"] if batch.records else None
        if isinstance(key, str):  # its sender's
            self._keys[key] = range(len(self), len(self) + len(batch.records))
            if len(self._keys) > MAX_KEYS:
                self._keys.popitem(last=False)
        with self._placing:
            for line in batch.lines:
                self._starts.append(self.size)
                self.size += len(line)

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

FORMAT = 3  # of snapshots


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
            self.lines = len(state["line_starts"])
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
            self.lines = len(self.log)
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
        return [FORMAT, *tokens(dict.fromkeys(FEATURES, "a b c"))]


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
LISTED = 10  # bookings in each list of the overview
RECENT = 10_000  # bookings that it looks at
MOMENT = 0.002  # seconds that a short question may wait for the model, before all others
QUICK = 250_000  # bytes of a sample times accounts, for which a prediction takes a millisecond
UNSAVED = 10_000  # lines of the log that its snapshot may lack; a sixteenth while it grows


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
        self._predictions = 0  # that were asked for
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
                self._predictions += len(chunk)
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
        self, sample: Sample, top: int, place: int = 0, book_from: float | None = None
    ) -> dict[str, object]:
        """The most probable accounts, best first, each with its confidence and its reasons.

        The first is compared with the second, the others are with the first. The log-odds of what
        the sample says, its `reasons`, and the `prior` add up to the `margin`. The `record` says
        what the first one's confidence rests on, and `check` whether a person should look at it
        even if it is sure enough, which depends on its place in the request, too. Whether it is,
        from a confidence on, is the `decision`. Raises NotReady.
        """
        document = tokens(sample)
        with self._model_at_rest() as model:
            [scores] = model.joint_log_likelihood([document])
            best = model.top(scores, max(top, 2))
            accounts = [model.names[account] for account in best.tolist()]
            terms = model.terms(document, best)
            margin = round(scores[best[0]] - scores[best[1]], 4) if len(best) > 1 else None
            [known] = model.specificity([document]).tolist()
            whose = {
                "CompanyId": sample["CompanyId"]
            }  # the rest may be anything, as it is not booked
            made = {"sample": whose, "predicted": accounts[0], "margin": margin, "known": known}
            row = self._rows([made], [document])
            [sure] = self._calibration.confidence(row).tolist()
            confidence = self._calibration.shared(sure).round(4).tolist()
            record = self._calibration.record(row)
            check = is_check(sample, self._history.size(sample["CompanyId"]), place)
            self._predictions += 1

        answer = {
            "suggestions": [
                _suggestion(sample, accounts, terms, rank, confidence[rank])
                for rank in range(min(top, len(accounts)))
            ],
            "record": {"known": KNOWN[known], **record},
            "check": check,
        }
        if book_from is not None:
            sure_enough = "check" if check else "book"
            answer["decision"] = sure_enough if confidence[0] >= book_from else "review"
        return answer

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
        """What the page shows: health, the learning curve, confidence, bookings to look at.

        The confidence may be of one company. Raises NotFound if there is no such.
        """
        health = self.health()
        with self._changing:
            rows, points = self._history.rows, self._curve
        last = self._scored(WINDOW)
        recent = self._scored(RECENT, company)
        newest = rows[: -RECENT - 1 : -1]
        newest = newest[newest["predicted"] >= 0]
        unsure = newest[:WINDOW]["confidence"].argsort(kind="stable")[:LISTED]
        steps = (*(step / 20 for step in range(20)), 0.99)
        return {
            "health": health,
            "metrics": figures(last) if len(last) else None,
            "curve": [*curve(rows, points)],
            "scored": len(recent),
            "confidence": by_confidence(recent, steps) if len(recent) else [],
            "wrong": self._listed(newest[~right(newest)][:LISTED]),
            "unsure": self._listed(newest[unsure]),
        }

    def _listed(self, rows: np.ndarray) -> list[dict]:
        """What the page says of rows of the history."""
        names = list(self._history.accounts)
        rows = rows[["seq", "booked", "predicted", "reviewed"]]
        return [
            {
                "seq": seq,
                "company": record["sample"]["CompanyId"],
                "text": record["sample"]["BankEntryText"],
                "amount": record["sample"]["BankEntryAmount"],
                "booked": names[booked],
                "predicted": names[predicted],
                "confidence": record["confidence"],
                "reviewed": reviewed,
            }
            for seq, booked, predicted, reviewed in rows.tolist()
            if "sample" in (record := self._record(seq))  # not forgotten since
        ]

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
            rows = self._history.rows
            last = scored(rows[rows["seq"].searchsorted(self._last_batch) :])
            gauges = {
                "bookings": ("Bookings in the log.", len(rows)),
                "unseen": ("Bookings that nobody has looked at.", unseen(rows)),
                "checks": ("Bookings that could have been booked unseen.", checks(rows)),
                "predictions_total": ("Predictions that were asked for.", self._predictions),
                "accounts": ("Accounts in the model.", self._model.known),
                "companies": ("Companies in the model.", len(self._history.companies)),
                "tokens": ("Tokens in the model.", self._model.known_tokens),
                "waiting": ("Samples that wait to be booked.", self._writer.waiting()),
                "log_bytes": ("Bytes of the log.", self.log.size),
            }
        if len(last):
            now = figures(last)
            for name in ("precision", "accuracy"):
                gauges[f"last_batch_{name}"] = (f"The last batch's {name}.", now[name])
        return gauges

    def _scored(self, n: int, company: str | None = None) -> np.ndarray:
        with self._changing:
            if company is not None and company not in self._history.companies:
                raise NotFound("there is no booking of this company")
            return self._history.last(n, company)

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
        names = ((r["sample"]["CompanyId"], r["sample"][TARGET], r["predicted"]) for r in records)
        self._history.append(rows, names)
        self._calibration.add(rows)

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
            self._curve = {}

    def _lines_of(self, company: str) -> tuple[np.ndarray, int]:
        """(m,) the seqs of a company's bookings and corrections, and how many lines there are.

        Raises NotFound. Only the writer knows: between a line and its row is a moment.
        """
        seqs = self._history.of(company)["seq"]
        if not len(seqs):
            raise NotFound("there is no booking of this company")
        corrected = self._corrections.keys() & seqs.tolist()
        corrections = chain.from_iterable(self._corrections[seq] for seq in corrected)
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
    sample: Sample, accounts: Sequence[str], terms: np.ndarray, rank: int, confidence: float
) -> dict[str, object]:
    """One of the accounts, and what speaks for it over another; terms are (k, 1 + T)."""
    suggestion = {"account": accounts[rank], "confidence": confidence, "over": None}
    if len(accounts) == 1:
        return suggestion | {"margin": None, "prior": None, "reasons": []}
    other = int(rank == 0)
    prior, *weights = (terms[rank] - terms[other]).tolist()
    return suggestion | {
        "over": accounts[other],
        "margin": round(math.fsum([prior, *weights]), 4),
        "prior": round(prior, 4),
        "reasons": _reasons(sample, weights),
    }


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
MAX_SUGGESTED = 300  # suggestions in one answer, each of which is long
OPEN = {"/", "/health", "/ready"}  # to all, as there is nothing to learn from them


def openapi(max_batch: int) -> dict:
    """The description of this API, in OpenAPI 3.1."""

    def of(section: str, name: str) -> dict:
        return {"$ref": f"#/components/{section}/{name}"}

    def answers(schema: dict, *refusals: int, media: str = "application/json") -> dict:
        success = {"description": "done", "content": {media: {"schema": schema}}}
        refused = dict.fromkeys(map(str, (*refusals, 401)), of("responses", "Refusal"))
        return {"200": success, **refused, "default": of("responses", "Refusal")}

    def get(summary: str, parameters: list[dict], responses: dict) -> dict:
        return {"get": {"summary": summary, "parameters": parameters, "responses": responses}}

    def post(summary: str, schema: dict, responses: dict, *parameters: dict) -> dict:
        return {
            "post": {
                "summary": summary,
                "parameters": list(parameters),
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": schema}},
                },
                "responses": responses,
            }
        }

    def parameter(place: str, name: str, schema: dict, description: str) -> dict:
        required = place == "path"
        described = {"name": name, "in": place, "required": required, "schema": schema}
        return described | {"description": description}

    def a_list(items: dict, **more: object) -> dict:
        return {"type": "array", "items": items, **more}

    def record(properties: dict, others: object = False, **optional: dict) -> dict:
        required = list(properties)
        shape = {"type": "object", "required": required, "properties": properties | optional}
        return shape | {"additionalProperties": others}

    text = {"type": "string", "maxLength": MAX_VALUE}
    filled = text | {"minLength": 1}
    short = filled | {"maxLength": MAX_SHORT}
    features = {key: short if key in SHORT else filled for key in FEATURES}
    count = {"type": "integer", "minimum": 0}
    share = {"type": "number", "minimum": 0, "maximum": 1}
    seq = count | {"maximum": MAX_NUMBER}
    log_odds = {"type": ["number", "null"]}
    maybe_text = {"type": ["string", "null"]}
    place = {"type": ["integer", "null"], "minimum": 0}
    totals = ("samples", "unseen", "checks", "lines", "accounts", "companies", "tokens")
    health = dict.fromkeys(totals, count)
    reason = record({"token": filled, "kind": {"enum": list(KINDS)}, "weight": {"type": "number"}})
    figures = {"accuracy": share, "precision": share, "recall": share}
    maybe_share = share | {"type": ["number", "null"]}
    sureness = record(
        dict.fromkeys(("at_least", "share"), share)
        | dict.fromkeys(("accuracy", "error"), maybe_share)
        | {"checks": count}
    )
    tally = record({"suggestions": count, "right": count})
    confusion = record({"booked": filled, "predicted": filled, "count": count})
    listed = record(
        {"seq": seq}
        | dict.fromkeys(("company", "text", "amount", "booked", "predicted"), filled)
        | {"confidence": share, "reviewed": {"type": "boolean"}}
    )
    schemas = {
        "Sample": record(features, text),
        "Booking": record(features | {TARGET: short}, text, **{BOOKED_BY: {"enum": [*TIMES]}}),
        "Stored": record({"received": count, "total": count, "first": place, "last": place}),
        "Suggestions": record(
            {
                "suggestions": a_list(
                    record(
                        {
                            "account": filled,
                            "confidence": share,
                            "over": maybe_text,
                            "margin": log_odds,
                            "prior": log_odds,
                            "reasons": a_list(reason),
                        }
                    )
                ),
                "record": record({"known": {"enum": [*KNOWN]}, "own": tally, "all": tally}),
                "check": {"type": "boolean"},
            },
            decision={"enum": ["book", "check", "review"]},
        ),
        "Correction": record({"seq": seq, TARGET: short}),
        "Corrected": record({"seq": seq, TARGET: short, "before": filled}),
        "Forgotten": record({"company": filled, "forgotten": count | {"minimum": 1}}),
        "Metrics": record({"precision": share, "recall": share}),
        "Report": record(
            {"support": count | {"minimum": 1}, "unseen": count, "checks": count}
            | figures
            | {"confused": a_list(confusion), "confidence": a_list(sureness)}
        ),
        "Overview": record(
            {
                "health": of("schemas", "Health"),
                "metrics": {"anyOf": [record(figures), {"type": "null"}]},
                "curve": a_list(record({"bookings": count} | figures)),
                "scored": count,
                "confidence": a_list(sureness),
                "wrong": a_list(listed),
                "unsure": a_list(listed),
            }
        ),
        "Health": record(
            {"status": filled | {"description": "ok, or why bookings cannot be stored now"}}
            | health
            | {"uptime": {"type": "number", "minimum": 0}},
            stream=record(
                {"status": filled, "node": filled, "writer": maybe_text, "lag": count}
                | {"quorum": {"type": "boolean"}}
            ),
        ),
        "Error": record({"error": {"type": "string", "minLength": 1}}),
    }
    refusal = {
        "description": "refused, with one sentence that says what to change",
        "content": {"application/json": {"schema": of("schemas", "Error")}},
    }
    a_sample, a_suggestion = of("schemas", "Sample"), of("schemas", "Suggestions")
    n = parameter("path", "n", count | {"minimum": 1, "maximum": MAX_NUMBER}, "how many, the last")
    key = parameter(
        "header",
        "Idempotency-Key",
        {"type": "string", "pattern": "^[!-~]([ -~]{0,198}[!-~])?$"},
        "the batch's name: under it, it is stored once, however often it is sent",
    )
    top = parameter(
        "query",
        "top",
        count | {"minimum": 1, "maximum": Calibration.RANKS, "default": 3},
        "how many suggestions, at most",
    )
    company = parameter("query", "company", filled, "only the predictions for this company")
    book_from = parameter(
        "query", "book_from", share, "the confidence from which on you book unseen"
    )
    paths = {
        "/sample": post(
            "store bookings, and learn them",
            a_list(of("schemas", "Booking"), maxItems=max_batch),
            answers(of("schemas", "Stored"), 400, 413, 415, 422, 503, 507),
            key,
        ),
        "/predict": post(
            "predict the account of one sample, or of each of a list",
            {"anyOf": [a_sample, a_list(a_sample, maxItems=max_batch)]},
            answers(a_list(filled), 400, 413, 415, 503),
        ),
        "/suggest": post(
            "suggest accounts for one sample, or for each of a list, and say why",
            {"anyOf": [a_sample, a_list(a_sample, maxItems=min(max_batch, MAX_SUGGESTED // 3))]},
            answers({"anyOf": [a_suggestion, a_list(a_suggestion)]}, 400, 413, 415, 503),
            top,
            book_from,
        ),
        "/correct": post(
            "book a booking to another account",
            of("schemas", "Correction"),
            answers(of("schemas", "Corrected"), 400, 404, 413, 415, 503, 507),
        ),
        "/company/{id}": {
            "delete": {
                "summary": "forget a company",
                "parameters": [parameter("path", "id", filled, "its CompanyId")],
                "responses": answers(of("schemas", "Forgotten"), 400, 404, 503, 507),
            }
        },
        "/metrics/{n}": get(
            "macro-averaged precision and recall of the last n predictions",
            [n],
            answers(of("schemas", "Metrics"), 400, 503),
        ),
        "/report/{n}": get(
            "how good the last n predictions were, and how good when how sure",
            [n, company, book_from],
            answers(of("schemas", "Report"), 400, 404, 503),
        ),
        "/samples": get(
            "the lines of the log",
            [
                parameter("query", "from", seq | {"default": 0}, "the seq of the first"),
                parameter("query", "limit", seq, "how many, at most; without it, all"),
            ],
            answers({"type": "string"}, 400, media=JSON_LINES),
        ),
        "/overview": get(
            "what the page shows", [company], answers(of("schemas", "Overview"), 400, 404, 503)
        ),
        "/metrics": get(
            "figures for Prometheus", [], answers({"type": "string"}, media="text/plain")
        ),
        "/health": get("how much has been learned", [], answers(of("schemas", "Health"), 503)),
        "/ready": get("whether bookings can be sent", [], answers(record({"status": filled}), 503)),
        "/openapi.json": get("this description", [], answers({"type": "object"})),
        "/": get("the page", [], answers({"type": "string"}, media="text/html")),
    }
    for path in OPEN:
        paths[path]["get"]["security"] = []
    return {
        "openapi": "3.1.0",
        "info": {"title": "bookkeep", "version": __version__, "license": {"name": "MIT"}},
        "security": [{}, {"token": []}],  # a token, where the service has one
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {"Refusal": refusal},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


# ------------------------------------------------------------------------------------------- HTTP

MAX_BODY = 64 << 20  # bytes of a request's body
LARGE_BODY = 1 << 20  # bytes from which a body has to wait for its turn
AT_LEAST = "HTTP_BOOKKEEP_AT_LEAST"  # of an environ: lines that an answer must know of
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}  # of every answer

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

    With a token, all but the page and /health is for those who send it. With hosts, it is for those
    who call the service by one of these names: a web page whose own name was made to lead here does
    not. Its `refuses` says of an environ whether its headers suffice to refuse the request, its
    `is_quick` whether a prediction for one sample of so many bytes takes no time, its `is_busy`
    whether that would have to wait.
    """
    app = Bottle()
    app.install(_in_json)
    app.install(lambda callback: partial(checked, callback))
    app.default_error_handler = _error_in_json
    description = openapi(max_batch)
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

    def received(parse: Callable[[bytes], T]) -> T:
        with parsing if request.content_length > LARGE_BODY else nullcontext():
            return parse(request.body.read())

    def number(name: str, text: str, least: int, most: int = MAX_NUMBER) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise HTTPError(400, f"{name} must be a whole number from {least} to {most}")
        return int(text)

    def company_asked() -> str | None:
        company = request.query.getunicode("company")
        if company is None and "company" in request.query:
            raise HTTPError(400, "company must be UTF-8, percent-encoded")
        return company

    def book_from() -> float | None:
        text = request.query.get("book_from")
        with suppress(ValueError):
            if text is None:
                return None
            if re.fullmatch("[0-9.e-]+", text) and 0 <= float(text) <= 1:
                return float(text)
        raise HTTPError(400, "book_from must be a number from 0 to 1, such as 0.95")

    @app.post("/sample")
    def sample() -> dict:
        key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
        if key is not None and not re.fullmatch("[ -~]{1,200}", key):
            raise HTTPError(400, "an Idempotency-Key must be 1 to 200 printable ASCII characters")
        stored = bookkeeper.book(check_samples(received(parse_json), True, max_batch), key)
        first, last = (stored[0], stored[-1]) if stored else (None, None)
        return {"received": len(stored), "total": stored.stop, "first": first, "last": last}

    @app.post("/predict")
    def predict() -> list[str]:
        return bookkeeper.predict(check_samples(received(parse_json), False, max_batch))

    @app.post("/suggest")
    def suggest() -> dict | list[dict]:
        top = number("top", request.query.get("top", "3"), 1, Calibration.RANKS)
        asked = received(parse_json)
        samples = check_samples(asked, False, min(max_batch, MAX_SUGGESTED // top))
        level = book_from()
        answers = [bookkeeper.suggest(s, top, place, level) for place, s in enumerate(samples)]
        return answers if isinstance(asked, list) else answers[0]

    @app.post("/correct")
    def correct() -> dict:
        match received(parse_json):
            case {"seq": float(seq), "AccountNumber": account, **others} if not others:
                check_sample({TARGET: account}, (TARGET,))
                if not (seq.is_integer() and 0 <= seq <= MAX_NUMBER):
                    raise BadRequest(f"seq must be a whole number from 0 to {MAX_NUMBER}")
                before = bookkeeper.correct(int(seq), account)
                return {"seq": int(seq), TARGET: account, "before": before}
        raise BadRequest('send {"seq": 1203, "AccountNumber": "6700"}, and nothing else')

    @app.delete("/company/<id:re:(?s:.+)>")
    def company(id: str) -> dict:
        return {"company": id, "forgotten": bookkeeper.forget(id)}

    @app.get("/metrics/<n>")
    def metrics(n: str) -> dict[str, float]:
        return bookkeeper.metrics(number("n, after /metrics/,", n, 1))

    @app.get("/report/<n>")
    def report(n: str) -> dict:
        n = number("n, after /report/,", n, 1)
        return bookkeeper.report(n, company_asked(), book_from())

    @app.get("/samples")
    def samples() -> BinaryIO | str:
        first = number("from", request.query.get("from", "0"), 0)
        limit = number("limit", request.query.get("limit", str(MAX_NUMBER)), 0)
        lines, size = bookkeeper.log.export(range(first, first + limit))
        response.content_type = JSON_LINES
        response.content_length = size
        if not size:
            lines.close()
            return ""
        return lines  # which waitress sends by itself, so that a slow reader keeps no thread

    @app.get("/metrics")
    def prometheus() -> str:
        response.content_type = "text/plain; version=0.0.4; charset=utf-8"
        return "".join(f"{line}\n" for line in _exposition(bookkeeper.gauges(), durations, fsyncs))

    @app.get("/overview")
    def overview() -> dict:
        return bookkeeper.overview(company_asked())

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
        response.content_type = "text/html; charset=utf-8"
        response.set_header("Content-Security-Policy", _page_policy())
        return PAGE

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
        return json.dumps(answer, ensure_ascii=False)  # which would make six times as much of it

    return route


@cache
def _path(rule: str) -> str:
    """A route's path as the API's description has it."""
    return re.sub("<(.*?)(:.*?)?>", r"{\1}", rule)


def _exposition(
    gauges: dict[str, tuple[str, float]], durations: Histogram, fsyncs: Histogram
) -> Iterator[str]:
    """What an operator watches, in Prometheus's text format."""
    for name, (text, value) in gauges.items():
        type_ = "counter" if name.endswith("_total") else "gauge"
        yield f"# HELP bookkeep_{name} {text}"
        yield f"# TYPE bookkeep_{name} {type_}"
        yield f"bookkeep_{name} {value}"
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
    on_signals(signal.default_int_handler)  # as Ctrl-C, until it serves
    try:
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
    unsaved = os.environ.get("BOOKKEEP_UNSAVED", str(UNSAVED))
    if not re.fullmatch("[0-9]{1,18}", unsaved):
        raise OSError(f"BOOKKEEP_UNSAVED must be a whole number of lines, not {unsaved}")
    log = Log(options.log)
    server = Server(starting_app(log), listener, options.threads, options.max_body)
    started = time.monotonic()
    if options.stream:
        sys.modules.setdefault("bookkeep", sys.modules[__name__])  # which may be "__main__"
        import cluster

        keeper = partial(cluster.Node, options.stream)
    else:
        keeper = Bookkeeper
    reading = _in_background(partial(keeper, log, int(unsaved)))
    if server.answer(reading):
        raise KeyboardInterrupt
    bookkeeper = reading.result()
    seconds = time.monotonic() - started
    names = {"localhost", "127.0.0.1", "[::1]", options.host.lower()}
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
    def option(name: str, help: str, **more: object) -> None:
        shown = f"{help} (default: %(default)s)" if "default" in more else help
        parser.add_argument(f"--{name}", help=shown, **more)

    option("host", "address to listen on", default="127.0.0.1")
    option("port", "0 for any free one", type=_whole(0, 65535), default=8080)
    kept = "file that keeps every booking; it is made, and read back at the next start"
    option("log", kept, type=Path, default=Path("data/bookkeep.jsonl"))
    stream = "NATS JetStream that holds the log of several bookkeeps: docs/cluster.md"
    option("stream", stream, metavar="nats://HOST:PORT,.../NAME")
    token = "file with a token that all but /health and the page need; or set BOOKKEEP_TOKEN"
    option("token-file", token, type=Path, metavar="FILE")
    reach = "listen without a token where other machines can reach it"
    option("open", reach, action="store_true")
    lines = "write a line for each request to standard error: no body, query or name"
    option("access-log", lines, action="store_true")
    threads = "requests at work at once: so many that book, so many questions, so many others"
    option("threads", threads, type=_whole(1, 1000), default=16)
    option("max-body", "bytes in one request's body", type=_whole(1, 1 << 40), default=MAX_BODY)
    option("max-batch", "samples in one request", type=_whole(1, 10**9), default=MAX_BATCH)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def _whole(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
        return int(text)

    number.__name__ = "whole number"  # what argparse calls it in an error
    return number


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


# ------------------------------------------------------------------------------------------- Page

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>bookkeep</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'
  viewBox='0 0 16 16'%3E%3Cpath d='M1 3h14M8 3v12' stroke='%232f86b5' stroke-width='3'/%3E
  %3C/svg%3E">
<style>
:root {
  color-scheme: light dark;
  --page: #fff; --tint: #f2f5f7; --rule: #dce1e5; --edge: #818c95; --muted: #56626b; --ink: #192026;
  --accent: #0b5f8a; --on-accent: #fff; --good: #11734b; --bad: #ab2f1c;
  --accuracy: #0b5f8a; --precision: #b84c00; --recall: #00765a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181b; --tint: #20272c; --rule: #2c3439; --edge: #717d86; --muted: #9da9b1;
    --ink: #e5e9ec; --accent: #74bce6; --on-accent: #0c1a23; --good: #6cc79b; --bad: #f2907c;
    --accuracy: #74bce6; --precision: #f0a05a; --recall: #62c9a4;
  }
}
* { box-sizing: border-box; margin: 0; padding: 0; }
[hidden] { display: none !important; }
body {
  max-width: 78rem; margin: 0 auto; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
h1 { font-size: 1.25rem; line-height: 1.2; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 1.0625rem; line-height: 1.35; font-weight: 600; }
.muted, label, dt, thead th { color: var(--muted); font-size: .8125rem; font-weight: 400; }
.error { color: var(--bad); }
a { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }

header, footer { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem 1rem; }
header { padding: 1.25rem 0; }
footer { border-top: 1px solid var(--rule); padding: 1rem 0 2rem; }
h1 svg { width: 1em; height: 1em; margin-right: .4em; vertical-align: -.1em; color: var(--accent); }
#state { margin-left: auto; font-size: .875rem; }
#state::before { content: ""; display: inline-block; width: .6em; height: .6em;
  margin-right: .5em; border: 2px solid var(--muted); }
#state.good::before { background: var(--good); border-color: var(--good); border-radius: 50%; }
#state.bad { color: var(--bad); }
#state.bad::before { border-color: var(--bad); }

#figures { display: grid; grid-template-columns: 1fr 1fr; border-top: 2px solid var(--ink); }
#figures > div { padding: .75rem 0 1.25rem; }
#figures > div + div { padding-left: 2rem; border-left: 1px solid var(--rule); }
#figures dl { display: flex; flex-wrap: wrap; gap: 0 1rem; }
#figures dl div { flex: 1 1 28%; margin-top: .5rem; }
#unseen { margin-top: .25rem; }
#figures dd { font-size: 1.75rem; line-height: 1.2; font-weight: 500; white-space: nowrap; }

.part { display: grid; grid-template-columns: 17rem minmax(0, 1fr); gap: 1rem 2.5rem;
  border-top: 1px solid var(--rule); padding: 1.5rem 0 2rem; }
.lead { position: relative; }
.lead > * + * { margin-top: .5rem; }
#sentence { font-size: 1.0625rem; line-height: 1.45; }
pre { font: .8125rem/1.6 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  background: var(--tint); padding: .75rem 1rem; margin-bottom: .75rem; }

.chart { position: relative; height: 100%; min-height: 19rem; }
.chart > * { position: absolute; inset: 0; width: 100%; height: 100%; }
.chart div { cursor: crosshair; touch-action: pan-y; }
.chart text { font-size: .75rem; fill: var(--muted); }
.chart .name { fill: var(--ink); }
.grid { stroke: var(--rule); }
.axis { stroke: var(--edge); }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.mark { fill: currentColor; stroke: var(--page); stroke-width: 1.5; }
.error-bar { stroke: currentColor; stroke-width: 1.5; opacity: .6; }
.accuracy { color: var(--accuracy); }
.precision { color: var(--precision); }
.recall { color: var(--recall); }
.line.precision { stroke-dasharray: 8 4; }
.line.recall { stroke-dasharray: 2 3; }
#legend { display: grid; gap: .5rem 2rem; margin: .75rem 0; }
#legend div { display: grid; grid-template-columns: 1fr auto; }
#legend dt { color: inherit; font-size: inherit; text-transform: capitalize; }
#legend svg { width: 2rem; height: .75rem; margin-right: .75rem; }
#legend .muted { grid-column: 1 / -1; padding-left: 2.75rem; }
.coverage { display: grid; grid-template-columns: minmax(0, 1fr) 23.5rem; gap: 1rem 2rem; }

table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem 0 .3rem 1rem; font-weight: 400; }
th:first-child, td:first-child { padding-left: 0; }
thead th { vertical-align: bottom; line-height: 1.3; overflow-wrap: normal;
  border-bottom: 1px solid var(--edge); }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
caption { text-align: left; }
td.number, th.number { text-align: right; }
td.number { white-space: nowrap; }
#steps { align-self: start; }
#steps th + th, #steps td { padding-left: .75rem; }
#steps .chosen > * { background: var(--tint); }
.clip { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2;
  overflow: hidden; }
.bookings { table-layout: fixed; }
.bookings th:nth-child(n + 4) { width: 11.5%; }
.bookings th:nth-child(odd) { width: 14%; }
.bookings th:nth-child(5) { width: 11.5%; }
.bookings th:nth-child(7) { width: 4.25rem; }
.held { visibility: hidden; }
.part:has(tbody:hover, tbody:focus-within) .held { visibility: visible; }

form { display: grid; gap: .75rem; }
label { display: grid; gap: .2rem; }
input, button { font: inherit; border: 1px solid var(--edge); border-radius: 3px;
  padding: .4rem .75rem; background: none; }
input { color: var(--ink); width: 100%; }
button { color: var(--accent); cursor: pointer; }
button:hover { border-color: var(--accent); text-decoration: underline; }
button[type=submit] { color: var(--on-accent); background: var(--accent); justify-self: start;
  align-self: end; border-color: transparent; font-weight: 500; }
td button { padding: 0 .6rem; font-size: .8125rem; line-height: 1.4rem; }
#access form, #company { max-width: 20rem; }
::placeholder { color: var(--muted); opacity: 1; }

#suggestions > * + * { margin-top: .5rem; }
#ranking { list-style: none; }
#ranking li { border-top: 1px solid var(--rule); }
summary { display: grid; grid-template-columns: 1rem minmax(0, 1fr) minmax(0, 2fr) 4rem;
  gap: .75rem; align-items: center; padding: .4rem 0; cursor: pointer; }
summary::before { content: "+"; color: var(--muted); text-align: center; }
[open] > summary::before { content: "–"; }
summary .clip { font-weight: 600; }
summary .number { text-align: right; }
details > div { padding: 0 0 1rem 1.75rem; }
.bar { display: block; position: relative; height: .5rem; background: var(--tint); }
.bar span { position: absolute; height: 100%; background: var(--accent); }
.zero { background: none; margin-top: .5rem; }
.zero::after { content: ""; position: absolute; inset: -.55rem auto -.55rem 50%;
  border-left: 1px solid var(--edge); }
.zero .against { background: var(--precision); }
.reasons { table-layout: fixed; }
.reasons .clip { -webkit-line-clamp: 3; }
.reasons td:nth-child(2) { width: 34%; }
.reasons td:nth-child(3) { width: 5rem; }
.reasons tr:last-child td { border-top-color: var(--edge); font-weight: 600; }

@media (max-width: 72rem) { .coverage { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 60rem) { .part { grid-template-columns: minmax(0, 1fr); } }
@media (min-width: 44rem) and (max-width: 60rem) {
  #legend { grid-template-columns: repeat(3, 1fr); }
  #try { grid-template-columns: 1fr 2fr 1fr auto; }
}
@media (max-width: 44rem) {
  #state { margin-left: 0; flex-basis: 100%; }
  #figures { grid-template-columns: 1fr; }
  #figures > div { padding-bottom: .75rem; }
  #figures > div + div { padding-left: 0; border-left: 0; border-top: 1px solid var(--rule); }
  #figures dd { font-size: 1.5rem; }
  .chart { min-height: 16rem; }
  details > div { padding-left: 0; }
  #steps { font-size: .875rem; }
  #steps th + th, #steps td { padding-left: .35rem; }
  .reasons td:nth-child(2) { width: 25%; }
  .bookings thead { position: absolute; width: 1px; height: 1px; overflow: hidden;
    clip-path: inset(50%); display: block; }
  .bookings, .bookings tbody { display: block; }
  .bookings tr { display: grid; grid-template-columns: 1.4fr 1fr 1fr 4.5rem; gap: 0 .75rem;
    position: relative; padding: .6rem 0; border-bottom: 1px solid var(--rule); }
  .bookings tbody td { padding: 0; border: 0; text-align: left; min-width: 0; }
  .bookings tbody td:nth-child(-n + 2) { grid-column: 1 / -1; padding-right: 4.25rem; }
  .bookings td:nth-child(1) { color: var(--muted); }
  .bookings td:nth-child(n + 3)::before { content: attr(data-name); display: block;
    color: var(--muted); font-size: .75rem; white-space: nowrap; }
  .bookings td:nth-child(7) { position: absolute; top: .6rem; right: 0; }
}
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }
</style>
</head>
<body>
<header>
  <h1><svg viewBox="0 0 16 16" aria-hidden="true"><path d="M1 3h14M8 3v12" stroke="currentColor"
    stroke-width="3"/></svg>bookkeep</h1>
  <p class="muted">learns from every booking and suggests the account of the next one</p>
  <p id="state" role="status">Connecting</p>
</header>
<main>
<noscript><p class="error">This page needs JavaScript.</p></noscript>

<section id="figures" aria-label="Key figures">
  <div>
    <p class="muted">Learned so far</p>
    <dl>
      <div><dt>Bookings</dt><dd id="samples">–</dd></div>
      <div><dt>Accounts</dt><dd id="accounts">–</dd></div>
      <div><dt>Companies</dt><dd id="companies">–</dd></div>
    </dl>
    <p id="unseen" class="muted" hidden></p>
  </div>
  <div>
    <p class="muted">Over the last 1,000 predictions</p>
    <dl>
      <div><dt>Accuracy</dt><dd id="accuracy">–</dd></div>
      <div><dt>Precision</dt><dd id="precision">–</dd></div>
      <div><dt>Recall</dt><dd id="recall">–</dd></div>
    </dl>
  </div>
</section>

<section id="access" class="part" aria-labelledby="access-title" hidden>
  <div class="lead">
    <h2 id="access-title">Token needed</h2>
    <p id="why" role="status"></p>
    <p class="muted">This tab keeps the token until you close it.</p>
  </div>
  <form>
    <label>Token <input id="token" type="password" autocomplete="off" required pattern="[!-~]+"
      title="letters, digits and signs of a US keyboard, no spaces"></label>
    <button type="submit">Use this token</button>
  </form>
</section>

<section id="start" class="part" aria-labelledby="start-title" hidden>
  <div class="lead">
    <h2 id="start-title">Send the first bookings</h2>
    <p class="muted">Nothing has been booked yet. Run this in a terminal, or send your own bookings
      the same way. This page then comes to life by itself.</p>
  </div>
  <div>
    <pre id="command"></pre>
    <button id="copy" type="button">Copy</button>
    <span id="copied" class="muted" role="status"></span>
  </div>
</section>

<div id="report" hidden>
<section class="part" aria-labelledby="curve-title">
  <div class="lead">
    <h2 id="curve-title">How well it has learned</h2>
    <p class="muted">Each booking is predicted before it is learned. A point covers the 1,000
      bookings before it.</p>
    <div data-of="curve">
      <p id="when"></p>
      <dl id="legend"></dl>
      <p class="muted">Precision and recall are means over the accounts: a rare one counts as much
        as a common one.</p>
    </div>
  </div>
  <div>
    <p class="none" data-of="curve">Nothing has been predicted yet. The next bookings will be.</p>
    <div id="curve" class="chart" data-of="curve">
      <svg role="img"></svg>
      <div role="slider" tabindex="0" aria-label="Point of the learning curve"></div>
    </div>
  </div>
</section>

<section class="part" aria-labelledby="coverage-title">
  <div class="lead">
    <h2 id="coverage-title">How much can be booked unseen</h2>
    <p id="sentence" data-of="confidence"></p>
    <p class="muted" data-of="confidence">Rests on the last <span id="checks"></span>.
      The dots are the confidence a suggestion must have to be booked unseen:
      the higher, the fewer but the surer. ± and the lines through the dots: one standard error.</p>
    <label>Company <input id="company" autocomplete="off" maxlength="100" placeholder="all"></label>
  </div>
  <div>
    <p id="none" class="none" data-of="confidence" role="status"></p>
    <div class="coverage" data-of="confidence">
      <div id="coverage" class="chart">
        <svg role="img"></svg>
        <div role="slider" tabindex="0" aria-label="Confidence to book unseen"></div>
      </div>
      <table id="steps">
        <thead><tr><th scope="col">Confidence from</th>
          <th scope="col" class="number">Booked unseen</th>
          <th scope="col" class="number">Right of these</th>
          <th scope="col" class="number">Wrong in 1,000 bookings</th></tr></thead>
        <tbody></tbody>
      </table>
    </div>
  </div>
</section>

<section class="part" aria-labelledby="try-title">
  <div class="lead">
    <h2 id="try-title">Try a sample</h2>
    <p class="muted">It only asks. Nothing is booked or learned. Confidence is how often past
      suggestions like the first were right: the company’s own and, while these are few, those of
      all companies. The other suggestions share the rest.</p>
    <form id="try">
      <label>Company <input name="CompanyId" required autocomplete="off"></label>
      <label>Text <input name="BankEntryText" required autocomplete="off"></label>
      <label>Amount <input name="BankEntryAmount" required autocomplete="off"></label>
      <button type="submit">Suggest an account</button>
    </form>
  </div>
  <div id="suggestions">
    <p id="verdict" role="status">The suggestions appear here, with the reasons for each.</p>
    <p id="record" role="status"></p>
    <p id="weights" class="muted" hidden>A weight above zero speaks for the account, one below zero
      for the account it is compared with. Each 0.7 doubles the odds; the weights add up.</p>
    <ol id="ranking"></ol>
  </div>
</section>

<section class="part" aria-labelledby="wrong-title">
  <div class="lead">
    <h2 id="wrong-title">Latest wrong ones</h2>
    <p class="muted">Booked otherwise than predicted, newest first. They are learned by now, but
      for those booked unseen: try them again.</p>
    <p class="muted held">Held still while you use it.</p>
  </div>
  <div>
    <p class="none" data-of="wrong">None yet.</p>
    <table id="wrong" class="bookings" role="table" aria-labelledby="wrong-title"
      data-of="wrong"></table>
  </div>
</section>

<section class="part" aria-labelledby="unsure-title">
  <div class="lead">
    <h2 id="unsure-title">Least sure ones</h2>
    <p class="muted">Of the last 1,000 predictions, those to look at first, right or wrong.</p>
    <p class="muted held">Held still while you use it.</p>
  </div>
  <div>
    <p class="none" data-of="unsure">None yet.</p>
    <table id="unsure" class="bookings" role="table" aria-labelledby="unsure-title"
      data-of="unsure"></table>
  </div>
</section>
</div>
</main>
<footer class="muted">
  <span>For programs: <a href="openapi.json">openapi.json</a><span id="locked" hidden>, with the
    token</span></span>
  <span id="engine"></span>
</footer>
<script>
'use strict';

const PAUSE = 2000, LONGEST_PAUSE = 10000, TIMEOUT = 10000; // milliseconds
const STEPS = [0, 0.5, 0.8, 0.9, 0.95, 0.99]; // confidences with a row, and most with a dot
const USUAL = 0.9; // the confidence shown while none is pointed at
const ENOUGH = 100; // bookings, to say what can be booked unseen
const CHECKED = 16; // bookings that a check stands for
const REASONS = 13; // shown for one suggestion: a long text has hundreds
const EXAMPLES = [
  ['acme', 'Office rent May', '> -10000', '6300'],
  ['acme', 'Train to Oslo', '> -100', '7140'],
];
const MEANINGS = {
  accuracy: 'of all suggestions, how many were right',
  precision: 'of an account’s suggestions, how many were right',
  recall: 'of an account’s bookings, how many were suggested',
};
const SCORES = Object.keys(MEANINGS);
const COLUMNS = ['Company', 'Text', 'Amount', 'Booked', 'Predicted', 'Confidence'];

const $ = (id) => document.getElementById(id);
const near = (a, b) => Math.abs(a - b) < 1e-6;
const isStep = (point) => STEPS.some((step) => near(step, point.at_least));
const count = (number) => number.toLocaleString('en');
const score = (number) => number == null ? '–' : number.toFixed(3);
const percent = (share, digits = 1) => share == null ? '–' : `${(100 * share).toFixed(digits)}%`;
const signed = (number) => `${number < 0 ? '−' : '+'}${Math.abs(number).toFixed(2)}`;

// What the service says gets into the page as text, by the next three only.

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function shape(tag, attributes, ...children) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function value(text, most = 150) { // characters: laying out 10,000 of them takes seconds
  return make('bdi', { title: text }, text.length > most ? `${text.slice(0, most)}…` : text);
}

const clip = (...children) => make('span', { className: 'clip' }, ...children);
const cell = (...children) => make('td', { role: 'cell' }, ...children);
const number = (...children) => make('td', { role: 'cell', className: 'number' }, ...children);
const quiet = (text) => make('span', { className: 'muted' }, text);

// ------------------------------------------------------------------------------------ The service

class Refused extends Error {}

async function call(path, body) {
  const token = sessionStorage.getItem('token');
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const options = { headers, signal: AbortSignal.timeout(TIMEOUT) };
  if (body) {
    headers['Content-Type'] = 'application/json';
    Object.assign(options, { method: 'POST', body: JSON.stringify(body) });
  }
  const response = await fetch(path, options);
  const answer = await response.json();
  if (response.status === 401) askForToken(token);
  if (!response.ok) throw new Refused(answer.error, { cause: response.status });
  return answer;
}

function askForToken(refused) {
  // A newer token may have been entered while this request was on its way.
  if (sessionStorage.getItem('token') !== refused) return;
  sessionStorage.removeItem('token');
  put($('why'), refused ? 'The service refused this token. Enter another one.'
    : 'This service answers only those who send its token.');
  $('access').hidden = false;
  if ($('report').hidden) $('token').focus();
}

$('access').addEventListener('submit', (event) => {
  event.preventDefault();
  sessionStorage.setItem('token', $('token').value);
  $('token').value = '';
  put($('why'), 'Asking the service.');
  refresh();
});

let busy = false, pause = PAUSE, timer, seen, company = '';

async function overview() {
  try {
    return await call(company ? `overview?${new URLSearchParams({ company })}` : 'overview');
  } catch (error) {
    if (error.cause !== 404) throw error;
    return { ...await call('overview'), confidence: [], unknown: error.message };
  }
}

async function refresh() {
  const waiting = !$('access').hidden && sessionStorage.getItem('token') === null;
  if (busy || waiting || document.hidden) return;
  busy = true;
  clearTimeout(timer);
  const asked = company;
  try {
    const found = await overview();
    if (asked === company) show(found);
    seen = new Date().toLocaleTimeString('en-GB');
    pause = PAUSE;
    $('access').hidden = true;
    const { status } = found.health;
    $('state').className = status === 'ok' ? 'good' : 'bad';
    put($('state'), status === 'ok' ? 'Connected' : `Connected, but ${status}`);
  } catch (error) {
    pause = Math.min(2 * pause, LONGEST_PAUSE);
    const why = !(error instanceof Refused) ? 'Not reachable'
      : error.cause === 401 ? 'Token needed' : `Not answering: ${error.message}`;
    $('state').className = 'bad';
    put($('state'), seen ? `${why}; last figures from ${seen}` : why);
  }
  busy = false;
  timer = setTimeout(refresh, asked === company ? pause : 0);
}

document.addEventListener('visibilitychange', refresh);

$('company').addEventListener('change', () => {
  company = $('company').value;
  refresh();
});

// ------------------------------------------------------------------------------------- The charts

const MARKS = { // around 0 0
  accuracy: 'M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z',
  precision: 'M-4-4h8v8h-8z',
  recall: 'M0-5.5l5.5 5.5l-5.5 5.5l-5.5-5.5z',
};

function closest(points, distance) {
  return points.reduce((best, point) => distance(point) <= distance(best) ? point : best);
}

function ticks(end, most) {
  const power = 10 ** Math.floor(Math.log10(end / most));
  const step = power * [1, 2, 5, 10].find((times) => times * power * most >= end);
  return Array.from({ length: Math.floor(end / step + 1e-6) + 1 }, (_, index) => index * step);
}

/* A line chart whose cursor follows the pointer and the arrow keys. Its design:
   names, of the values; key, what names a point; usual, the key to show without a cursor;
   x(point) and end(points), where the axis ends; floors, where the other axis may start;
   xName, yName, xText, yText, of the axes; label(point), of one that gets a dot;
   tell(point), which shows it elsewhere on the page too, and returns it in words. */
class Chart {
  constructor(box, design) {
    Object.assign(this, design, { box, points: [], cursor: null });
    [this.svg, this.handle] = box.children;
    const follow = (event) => this.moveTo(
      closest(this.points, (point) => Math.abs(this.left(point) - event.offsetX)));
    this.handle.addEventListener('pointermove', follow);
    this.handle.addEventListener('pointerdown', follow);
    this.handle.addEventListener('pointerleave', (event) => {
      if (event.pointerType === 'mouse') this.moveTo(null);
    });
    this.handle.addEventListener('focus', () => this.moveTo(this.current()));
    this.handle.addEventListener('blur', () => this.moveTo(null));
    this.handle.addEventListener('keydown', (event) => this.press(event));
    new ResizeObserver(() => this.draw()).observe(box);
  }

  show(points) {
    if (!changed(this, points) || !points.length) return; // without points it is hidden
    this.points = points;
    this.draw();
  }

  current() {
    const wanted = this.cursor ?? this.usual;
    return closest(this.points, (point) => Math.abs(point[this.key] - wanted));
  }

  moveTo(point) {
    this.cursor = point && point[this.key];
    this.mark();
  }

  press(event) {
    const index = this.points.indexOf(this.current()), last = this.points.length - 1;
    const target = {
      ArrowLeft: index - 1, ArrowDown: index - 1, PageDown: index - 10, Home: 0,
      ArrowRight: index + 1, ArrowUp: index + 1, PageUp: index + 10, End: last,
    }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    this.moveTo(this.points[Math.max(0, Math.min(last, target))]);
  }

  draw() {
    const width = this.box.clientWidth, height = this.box.clientHeight;
    if (!width || !this.points.length) return;
    const start = 44, stop = width - 26, top = 40, bottom = height - 44;
    const end = this.end(this.points);
    const lowest = Math.min(...this.points.flatMap((p) => this.names.map((name) => p[name])));
    const floor = this.floors.find((each) => each <= lowest);
    const across = (x) => start + (stop - start) * x / end;
    const down = (y) => bottom - (bottom - top) * (y - floor) / (1 - floor);
    this.left = (point) => across(this.x(point));
    const within = (y) => down(Math.max(floor, Math.min(1, y)));
    this.dot = (name, point) => {
      const [x, y, error = 0] = [this.left(point), point[name], point.error];
      return shape('g', { class: name },
        shape('path', { class: 'error-bar', d: `M${x} ${within(y - error)}V${within(y + error)}` }),
        shape('path', { class: 'mark', d: MARKS[name], transform: `translate(${x} ${down(y)})` }));
    };
    this.rod = (point) =>
      shape('path', { class: 'axis', d: `M${this.left(point)} ${top}V${bottom}` });

    const parts = [shape('text', { x: 0, y: 12 }, this.yName),
      shape('text', { x: stop, y: height - 4, 'text-anchor': 'end' }, this.xName)];
    for (const y of [0, 1, 2, 3, 4, 5].map((step) => floor + (1 - floor) * step / 5)) {
      parts.push(
        shape('path', { class: y === floor ? 'axis' : 'grid', d: `M${start} ${down(y)}H${stop}` }),
        shape('text', { x: start - 8, y: down(y) + 4, 'text-anchor': 'end' }, this.yText(y)));
    }
    for (const x of ticks(end, Math.floor((stop - start) / 70))) {
      parts.push(shape('path', { class: 'axis', d: `M${across(x)} ${bottom}v5` }),
        shape('text', { x: across(x), y: bottom + 19, 'text-anchor': 'middle' }, this.xText(x)));
    }
    for (const name of this.names) {
      const way = this.points.map((point) => `${this.left(point)} ${down(point[name])}`);
      parts.push(shape('path', { class: `line ${name}`, d: `M${way.join('L')}` }));
    }
    let above = width + 6, below = width; // where the label to the right begins
    for (const point of this.points.filter(this.label).reverse()) {
      const x = this.left(point), y = down(point[this.names[0]]), text = this.label(point);
      parts.push(this.dot(this.names[0], point));
      if (x + 34 <= above) {
        above = x;
        parts.push(shape('text', { class: 'name', x: x + 6, y: y - 8 }, text));
      } else if (x <= below && x - 34 > start) {
        below = x - 34;
        const place = { class: 'name', x: x - 6, y: y + 16, 'text-anchor': 'end' };
        parts.push(shape('text', place, text));
      }
    }
    this.pointer = shape('g', {});
    this.svg.replaceChildren(...parts, this.pointer);
    this.mark();
  }

  mark() {
    const point = this.current();
    this.pointer.replaceChildren(...this.cursor === null ? [] : [this.rod(point)],
      ...this.names.map((name) => this.dot(name, point)));
    const words = this.tell(point);
    if (this.cursor === null) this.svg.setAttribute('aria-label', words);
    Object.assign(this.handle, { ariaValueMin: 0, ariaValueMax: this.points.length - 1,
      ariaValueNow: this.points.indexOf(point), ariaValueText: words });
  }
}

for (const [name, meaning] of Object.entries(MEANINGS)) {
  const sample = shape('svg', { viewBox: '-16 -6 32 12', 'aria-hidden': true },
    shape('path', { class: `line ${name}`, d: 'M-16 0h32' }),
    shape('path', { class: `mark ${name}`, d: MARKS[name] }));
  $('legend').append(make('div', {}, make('dt', {}, sample, name),
    make('dd', { id: `at-${name}` }), make('dd', { className: 'muted' }, meaning)));
}

const curve = new Chart($('curve'), {
  names: SCORES, key: 'bookings', usual: Infinity, floors: [0], label: () => null,
  x: (point) => point.bookings, end: (points) => points.at(-1).bookings,
  xName: 'bookings', xText: (x) => Number.isInteger(x) ? count(x) : '',
  yName: 'score', yText: (y) => y.toFixed(1),
  tell(point) {
    const when = `After ${count(point.bookings)} bookings`;
    put($('when'), when);
    for (const name of SCORES) put($(`at-${name}`), score(point[name]));
    return `${when}: ${SCORES.map((name) => `${name} ${score(point[name])}`).join(', ')}.`;
  },
});

const coverage = new Chart($('coverage'), {
  names: ['accuracy'], key: 'at_least', usual: USUAL, floors: [0.9, 0.5, 0],
  label: (point) => point.at_least > 0 && isStep(point) ? percent(point.at_least, 0) : null,
  x: (point) => point.share, end: () => 1,
  xName: 'booked unseen, of all', xText: (x) => percent(x, 0),
  yName: 'right, of those booked unseen', yText: (y) => percent(y, 0),
  tell(point) {
    const words = `If it books by itself from ${percent(point.at_least, 0)} confidence on: `
      + `${percent(point.share)} of the bookings, ${percent(point.accuracy)} ± `
      + `${percent(point.error)} of them right.`;
    put($('sentence'), words);
    for (const row of $('steps').tBodies[0].rows) {
      row.classList.toggle('chosen', near(row.dataset.from, point.at_least));
    }
    return words;
  },
});

// ------------------------------------------------------------------------------------- The tables

const states = new Map();

function changed(key, what) {
  const state = JSON.stringify(what);
  return states.get(key) !== state && Boolean(states.set(key, state));
}

function fill(table, items, row) {
  const body = table.tBodies[0], selection = getSelection();
  const held = body.matches('.bookings :hover, .bookings :focus-within')
    || selection.type === 'Range' && selection.containsNode(body, true);
  if (body.rows.length && held || !changed(table, items)) return;
  body.replaceChildren(...items.map(row));
}

function step({ at_least: from, share, accuracy, error }) {
  const [wrong, within] = accuracy == null ? ['–', '']
    : [count(Math.round(1000 * share * (1 - accuracy))), ` ± ${percent(error)}`];
  const row = make('tr', {}, make('th', { scope: 'row' }, percent(from, 0)),
    number(percent(share)), number(percent(accuracy), quiet(within)), number(wrong));
  row.dataset.from = from;
  return row;
}

function booking({ seq, company, text, amount, booked, predicted, confidence, reviewed }) {
  const again = () => {
    const sample = { CompanyId: company, BankEntryText: text, BankEntryAmount: amount };
    for (const [name, what] of Object.entries(sample)) {
      // A field drops line ends, and the words around them would become one.
      $('try').elements[name].value = what.replaceAll('\n', ' ');
    }
    $('try').closest('section').scrollIntoView();
    $('try').elements.CompanyId.focus({ preventScroll: true });
    suggest(sample);
  };
  const texts = [company, text, amount, booked, predicted];
  const cells = [...texts.map((what) => cell(clip(value(what)))), number(percent(confidence))];
  cells.forEach((each, index) => { each.dataset.name = COLUMNS[index]; });
  if (!reviewed) cells[3].append(quiet('unseen'));
  const button = { type: 'button', onclick: again, ariaLabel: `Try booking ${seq}` };
  return make('tr', { role: 'row' }, ...cells, cell(make('button', button, 'Try')));
}

for (const table of [$('wrong'), $('unsure')]) {
  const names = [...COLUMNS, ''].map((name) => make('th', { scope: 'col', role: 'columnheader',
    className: name === 'Confidence' ? 'number' : '' }, name));
  table.append(make('thead', { role: 'rowgroup' }, make('tr', { role: 'row' }, ...names)),
    make('tbody', { role: 'rowgroup' }));
}

// -------------------------------------------------------------------------------- The suggestions

let asked = 0, checked = false;

async function suggest(sample) {
  const turn = ++asked;
  let suggestions = [], record, verdict, basis = [];
  try {
    ({ suggestions, record } = await call('suggest?top=5', sample));
    const { account, confidence } = suggestions[0];
    basis = rests(sample.CompanyId, account, record);
    verdict = ['Most likely ', make('b', {}, value(account, 40)),
      `, with ${percent(confidence)} confidence.`];
  } catch (error) {
    const why = error instanceof Refused ? error.message : 'The service is not reachable.';
    verdict = [make('span', { className: 'error' }, why)];
  }
  if (turn !== asked) return;
  $('verdict').replaceChildren(...verdict);
  $('record').replaceChildren(...basis);
  $('ranking').replaceChildren(...suggestions.map(suggestion));
  $('weights').hidden = suggestions.length < 2;
}

function rests(company, account, { known, own, all }) {
  const whose = value(company, 40), evidence = 'with about as much evidence';
  const its = known === 'nothing of the company' ? ['Nothing is known of ', whose, ' yet.']
    : tally(make('span', {}, whose, '’s own'), ['of ', value(account, 40), ` ${evidence}`], own);
  const ofAll = tally('all companies’', [`of any account ${evidence} and ${known} known`], all);
  const note = checked && all.suggestions ? ` A check counts as ${CHECKED} of these.` : '';
  return [...its, ' ', ...ofAll, note];
}

function tally(whose, which, { suggestions, right }) {
  const [start, end] = suggestions === 0 ? ['There are none yet of ', '.']
    : suggestions === 1 ? ['The only one of ', right ? ' was right.' : ' was wrong.']
      : ['Of ', `, ${right ? count(right) : 'none'} ${right === 1 ? 'was' : 'were'} right.`];
  return [start, whose, suggestions > 1 ? ` ${count(suggestions)}` : '', ' suggestions ', ...which,
    end];
}

function suggestion({ account, confidence, over, margin, prior, reasons }, rank) {
  const sure = make('span', { className: 'bar' }, make('span', {}));
  sure.firstChild.style.width = percent(confidence);
  const why = make('div', {}, over === null ? 'There is no other account yet to compare it with.'
    : weights(over, margin, prior, reasons));
  const summary = make('summary', {}, clip(value(account)), sure,
    make('span', { className: 'number' }, percent(confidence)));
  return make('li', {}, make('details', { open: rank === 0 }, summary, why));
}

function weights(over, margin, prior, reasons) {
  const bySize = reasons.toSorted((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  const shown = new Set(bySize.slice(0, REASONS)), others = bySize.slice(REASONS);
  const rows = [{ token: 'how often each is booked', kind: '', weight: prior },
    ...reasons.filter((reason) => shown.has(reason))];
  if (others.length) {
    const weight = others.reduce((sum, reason) => sum + reason.weight, 0);
    rows.push({ token: `${count(others.length)} more`, kind: '', weight });
  }
  const most = Math.max(...rows.map((row) => Math.abs(row.weight)));
  const body = rows.map(({ token, kind, weight }) => make('tr', {},
    make('td', {}, clip(value(token, 40), ' ', quiet(kind))),
    make('td', {}, weightBar(weight / most)), number(signed(weight))));
  const sum = make('tr', {}, make('td', {}, 'Together'), make('td', {}), number(signed(margin)));
  return make('table', { className: 'reasons' },
    make('caption', {}, 'For it, and against ', value(over, 40)),
    make('tbody', {}, ...body, sum));
}

function weightBar(part) {
  const bar = make('span', { className: part < 0 ? 'against' : '' });
  bar.style.left = percent(0.5 + Math.min(0, part) / 2);
  bar.style.width = percent(Math.abs(part) / 2);
  return make('span', { className: 'bar zero' }, bar);
}

$('try').addEventListener('submit', (event) => {
  event.preventDefault();
  suggest(Object.fromEntries(new FormData($('try'))));
});

// --------------------------------------------------------------------------------------- The page

function show({ health, metrics, curve: points, scored, confidence: all, wrong, unsure,
  unknown }) {
  const confidence = health.samples < ENOUGH ? [] : all;
  showTrust(health, scored, confidence, unknown);
  for (const name of ['samples', 'accounts', 'companies']) put($(name), count(health[name]));
  for (const name of SCORES) put($(name), score(metrics?.[name]));
  const locked = sessionStorage.getItem('token') !== null;
  $('locked').hidden = !locked;
  put($('engine'), `${count(health.tokens)} tokens in the model, running for `
    + duration(health.uptime));
  put($('command'), command(locked));
  $('start').hidden = health.samples > 0;
  $('report').hidden = health.samples === 0;
  for (const [id, list] of Object.entries({ curve: points, confidence, wrong, unsure })) {
    for (const node of document.querySelectorAll(`[data-of=${id}]`)) {
      node.hidden = (list.length === 0) !== node.matches('.none');
    }
  }
  fill($('steps'), confidence.filter(isStep), step);
  fill($('wrong'), wrong, booking);
  fill($('unsure'), unsure, booking);
  curve.show(points);
  coverage.show(confidence.filter((point) => point.accuracy !== null).reverse());
}

function showTrust({ samples, unseen, checks: allChecks }, scored, confidence, unknown) {
  const checks = confidence[0]?.checks, each = checks > 1 ? 'checks, each of' : 'a check,';
  put($('checks'), `${count(scored)} bookings by a person`
    + (checks ? `, ${count(checks)} of them ${each} which stands for ${CHECKED}` : ''));
  checked = allChecks > 0;
  put($('none'), unknown ?? (samples < ENOUGH ? `Too early to say: this takes ${ENOUGH} bookings.`
    : `No prediction ${company && 'for this company '}could be compared with a person’s `
      + 'booking yet.'));
  $('none').classList.toggle('error', Boolean(unknown));
  $('unseen').hidden = unseen === 0;
  put($('unseen'), `Nobody has looked at ${count(unseen)} of the bookings yet: `
    + `${unseen === 1 ? 'it is' : 'they are'} not learned.`);
}

function duration(seconds) {
  const [size, unit] = [[86400, 'd'], [3600, 'h'], [60, 'min'], [1, 's']]
    .find(([each]) => seconds >= 2 * each || each === 1);
  return `${count(Math.floor(seconds / size))} ${unit}`;
}

function command(locked) {
  const key = locked ? " -H 'Authorization: Bearer <token>'" : '';
  const bookings = EXAMPLES.map(([CompanyId, BankEntryText, BankEntryAmount, AccountNumber]) =>
    JSON.stringify({ CompanyId, BankEntryText, BankEntryAmount, AccountNumber }));
  return `curl ${location.origin}/sample -H 'Content-Type: application/json'${key} -d '[
${bookings.join(',\n')}]'`;
}

$('copy').addEventListener('click', async () => {
  try {
    await navigator.clipboard.writeText($('command').textContent);
    put($('copied'), 'Copied');
  } catch {
    getSelection().selectAllChildren($('command'));
    put($('copied'), 'Selected: copy it with the keyboard');
  }
});

refresh();
</script>
</body>
</html>
"""


def _page_policy() -> str:
    """The page's Content-Security-Policy: its own style and script, this service, nothing else."""

    def allowed(element: str) -> str:
        [source] = re.findall(f"<{element}>(.*?)</{element}>", PAGE, re.DOTALL)
        return f"'sha256-{b64encode(sha256(source.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


if __name__ == "__main__":
    sys.exit(main())
