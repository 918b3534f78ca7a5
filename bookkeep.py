"""bookkeep: a service that learns from every booking and suggests the account of the next.

`python bookkeep.py` answers HTTP requests: `POST /sample` stores and learns bookings,
`POST /predict` suggests an account, `GET /metrics/<n>` says how good the last suggestions were,
`GET /health` how much has been learned. The module reads from top to bottom, each section using
only those above it: Samples, Model, Metrics, Log, Bookkeeper, HTTP, Command line.

It does not tune itself, does not forget, and does not spread over machines: one process owns one
log, and the model is the sum of what is in it.
"""

import argparse
import fcntl
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
import sys
import threading
import time
import zlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import waitress
from bottle import Bottle, HTTPError, request, response
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask

__version__ = "0.1.0"

logger = logging.getLogger("bookkeep")

# ---------------------------------------------------------------------------------------- Samples

FEATURES = ("CompanyId", "BankEntryText", "BankEntryAmount")
TARGET = "AccountNumber"
REPEATED = ("CompanyId", "BankEntryAmount")  # in the tokens of each word

MAX_BATCH = 10_000  # samples in one body
MAX_VALUE = 10_000  # characters in a key or a value
MAX_NAME = 100  # characters in a company or an amount, which most of a sample's tokens repeat
MAX_WORDS = 100  # words of a text that become tokens: its first ones

Sample = dict[str, str]


class BadRequest(ValueError):
    """The caller sent something that cannot be used; the message says what to change."""


def parse_samples(body: bytes, booked: bool, most: int = MAX_BATCH) -> list[Sample]:
    """The samples in a JSON body: a list of them, or, unless they must be `booked`, a single one.

    A booked sample must name its account. A body that is a JSON string is read as the JSON within.
    Raises BadRequest, which counts the samples from 0, also if there are more than `most`.
    """
    content = _parse_json(body)
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
        except BadRequest as error:
            raise BadRequest(f"sample {number}: {error}") from None
    return content


def check_sample(sample: object, required: Sequence[str]) -> None:
    """Raises BadRequest unless it is an object of strings with all `required` keys filled."""
    if not isinstance(sample, dict):
        raise BadRequest("must be an object of strings")
    for key, value in sample.items():
        if not isinstance(value, str):
            raise BadRequest(f"{_shown(key)} must be a string")
        if max(len(key), len(value)) > MAX_VALUE:
            raise BadRequest(f"{_shown(key)} is longer than {MAX_VALUE} characters")
    for key in required:
        if key not in sample:
            raise BadRequest(f"{key} is missing")
        if not sample[key]:
            raise BadRequest(f"{key} is empty")
        if key in REPEATED and len(sample[key]) > MAX_NAME:
            raise BadRequest(f"{key} is longer than {MAX_NAME} characters")
    try:
        "".join(chain(sample, sample.values())).encode()
    except UnicodeEncodeError:
        raise BadRequest("a lone surrogate (half of a \\u pair) is not text") from None


def tokens(sample: Sample) -> list[str]:
    """The sample's tokens, each prefixed with its kind, so that no word can pass for a company.

    >>> tokens({"CompanyId": "A", "BankEntryText": "rent May", "BankEntryAmount": "< 10"})
    ['c A', 'a < 10', 'w rent', 'w May', 'cw A|rent', 'cw A|May', 'caw A|< 10|rent', ...]

    (The bar stands for the unit separator, which no word contains.)
    """
    company, text, amount = (sample[key] for key in FEATURES)
    words = text.split(maxsplit=MAX_WORDS)[:MAX_WORDS]
    return [
        f"c {company}",
        f"a {amount}",
        *[f"w {word}" for word in words],
        *[f"cw {company}\x1f{word}" for word in words],
        *[f"caw {company}\x1f{amount}\x1f{word}" for word in words],
    ]


def _parse_json(body: bytes) -> object:
    """What the body says, strictly: UTF-8, no duplicate keys, no NaN. Raises BadRequest."""
    try:
        content = _loads(body.decode("utf-8-sig"))
        return _loads(content) if isinstance(content, str) else content
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body must be UTF-8, byte {error.start} is not") from None
    except RecursionError:
        raise BadRequest("the JSON is nested too deeply") from None
    except BadRequest:
        raise
    except ValueError as error:
        raise BadRequest(f"the body must be JSON: {error}") from None


def _loads(text: str) -> object:
    # No number is of use here, so any will do as a float, which may have any number of digits.
    return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_int=float)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        for key, _ in pairs:
            if unique.pop(key, pairs) is pairs:  # popped before
                raise BadRequest(f"the key {_shown(key)} occurs twice in one object")
    return unique


def _no_constant(name: str) -> None:
    raise BadRequest(f"the body must be JSON, which has no {name}")


def _shown(key: str) -> str:
    """The key as an error message shows it: never too long, never unprintable."""
    return key if re.fullmatch(r"\w{1,40}", key, re.ASCII) else json.dumps(key[:40])


# ------------------------------------------------------------------------------------------ Model

ALPHA = 0.02  # Lidstone smoothing
FLOOR = 1 / 16  # what a booking that surprises nobody counts at the least
MAX_CELLS = 1 << 22  # counts and scores that are at work at once, unless one document has more
GRAIN = 1024  # weights are multiples of 1 / GRAIN, so sums of them are exact in any order


class Assessment(NamedTuple):
    """What the model made of a booking before it learned it."""

    predicted: str | None  # the most probable account; None while there is no model
    margin: float | None  # its log-odds over the second; None while there is no second
    weight: float  # what the booking will count when it is learned


class NaiveBayes:
    """Multinomial Naive Bayes over documents of tokens, learned and unlearned a weight at a time.

    Of an account (a class) and a document it knows, up to a constant of the document,

        log P(account | tokens) = log N(account)
            + sum over known tokens of log (N(token, account) + alpha)
            - (number of known tokens) * log (N(account's tokens) + alpha * V)

    where N are sums of weights and V is the number of known tokens. A document is a list of
    tokens, n documents with A accounts give (n, A) scores, and accounts count from 0 in the order
    in which they were first seen. Equals scikit-learn's MultinomialNB fitted with sample_weight.
    """

    def __init__(self, alpha: float = ALPHA) -> None:
        self.alpha = alpha
        self.vocabulary = Index()  # token -> row of token_counts
        self.accounts = Index()  # account -> column of token_counts
        self.names: list[str] = []  # (A,) the accounts by number
        self.token_counts = Counts()  # N(token, account)
        self.account_counts = np.zeros(0)  # (A,) N(account)
        self.account_tokens = np.zeros(0)  # (A,) N(account's tokens)

    def scores(self, documents: Sequence[Sequence[str]]) -> np.ndarray:
        """(n, A) log P(account, tokens), up to a constant of the document."""
        n, A = len(documents), len(self.names)
        rows = [self.vocabulary.get(token, -1) for token in chain.from_iterable(documents)]
        rows = np.array(rows, dtype=np.int64)
        document = np.repeat(np.arange(n), [len(tokens) for tokens in documents])
        known = (rows >= 0) & (self.token_counts.sizes[rows] > 0)
        rows, document = rows[known], document[known]
        if n > 1 and n * A + self.token_counts.sizes[rows].sum() > MAX_CELLS:
            half = n // 2
            return np.concatenate([self.scores(documents[:half]), self.scores(documents[half:])])

        # log (N + alpha) = log (1 + N / alpha) + log alpha: zeros add nothing but the constant.
        owner, account, count = self.token_counts.take(rows)
        cell = document[owner] * A + account
        evidence = np.bincount(cell, np.log1p(count / self.alpha), minlength=n * A)
        with np.errstate(divide="ignore"):  # an account wholly unlearned: log 0
            scores = np.log(self.account_counts) + evidence.reshape(n, A)
        total = np.log(self.account_tokens + self.alpha * self.token_counts.occupied)
        scores -= np.outer(np.bincount(document, minlength=n), total)
        return scores

    def predict(self, documents: Sequence[Sequence[str]]) -> list[str]:
        """The most probable account of each document. There must be a model, that is an account."""
        return [self.names[best] for best in self.scores(documents).argmax(axis=1).tolist()]

    def assess(self, documents: Sequence[Sequence[str]], labels: Sequence[str]) -> list[Assessment]:
        """Predictions and learning weights of documents whose accounts, the labels, are known.

        The weight is max(floor, 1 - P(label | tokens)), 1 for an account not seen before: the
        discriminative frequency estimate (Su, Zhang, Ling, Matwin, ICML 2008).
        """
        if not self.names:
            return [Assessment(None, None, 1.0)] * len(documents)
        scores = self.scores(documents)
        each = np.arange(len(documents))
        booked = np.array([self.accounts.get(label, -1) for label in labels], dtype=np.int64)
        probability = np.where(booked < 0, 0, posterior(scores)[each, booked])
        weights = np.maximum(FLOOR, np.round((1 - probability) * GRAIN) / GRAIN)

        best = scores.argmax(axis=1)
        best_score = scores[each, best]
        scores[each, best] = -np.inf
        margins = best_score - scores.max(axis=1)
        return [
            Assessment(self.names[account], round(margin, 4) if margin < np.inf else None, weight)
            for account, margin, weight in zip(
                best.tolist(), margins.tolist(), weights.tolist(), strict=True
            )
        ]

    def learn(
        self,
        documents: Sequence[Sequence[str]],
        labels: Sequence[str],
        weights: Sequence[float] | np.ndarray,
    ) -> None:
        """Adds each document to its account `weight` times; the weight's negative takes it away.

        With weights that are multiples of 1 / GRAIN the counts are exact: the same in any order
        and any batching, and as if it had never been after learning and unlearning.
        """
        lengths = np.array([len(tokens) for tokens in documents], dtype=np.int64)
        rows = [self.vocabulary[token] for token in chain.from_iterable(documents)]
        columns = np.array([self.accounts[label] for label in labels], dtype=np.int64)
        weights = np.asarray(weights, dtype=np.float64)
        if len(self.accounts) > len(self.names):
            self.names = list(self.accounts)
            self.account_counts = _grown(self.account_counts, len(self.names))
            self.account_tokens = _grown(self.account_tokens, len(self.names))
        np.add.at(self.account_counts, columns, weights)
        np.add.at(self.account_tokens, columns, weights * lengths)
        self.token_counts.add(
            np.array(rows, dtype=np.int64), columns.repeat(lengths), weights.repeat(lengths)
        )


def posterior(scores: np.ndarray) -> np.ndarray:
    """(n, A) P(account | tokens), which sums to one over the accounts, from (n, A) scores."""
    probability = np.exp(scores - scores.max(axis=1, keepdims=True))
    probability /= probability.sum(axis=1, keepdims=True)
    return probability


class Index(dict):
    """Numbers things from 0 in the order in which they are first asked for."""

    def __missing__(self, thing: str) -> int:
        number = self[thing] = len(self)
        return number


class Counts:
    """A sparse matrix of sums, token by account, that grows with each entry added.

    Most tokens meet one account, an amount meets nearly all. So each row has a span of its own in
    two long arrays, its entries sorted by account, with room for the next power of two; a row that
    outgrows its span moves to the end. Entries that become zero are dropped.
    """

    def __init__(self) -> None:
        self.starts = np.zeros(1, dtype=np.int64)  # of each row's span
        self.sizes = np.zeros(1, dtype=np.int64)  # how many entries are in it
        self.accounts = np.zeros(1, dtype=np.int32)
        self.values = np.zeros(1)
        self.end = 0  # of the last span
        self.occupied = 0  # rows that have an entry

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All entries of these rows, in order: the index into `rows`, the account, the value."""
        owner, at = self._entries(rows)
        return owner, self.accounts[at], self.values[at]

    def add(self, rows: np.ndarray, accounts: np.ndarray, values: np.ndarray) -> None:
        """Adds each value to the entry at its row and account."""
        if not len(rows):
            return
        last = int(rows.max())
        if last >= len(self.sizes):
            self.starts = _grown(self.starts, 2 * last)
            self.sizes = _grown(self.sizes, 2 * last)

        # What the touched rows hold and what is new, merged and summed by (row, account).
        touched, row = np.unique(rows, return_inverse=True)
        owner, old_accounts, old_values = self.take(touched)
        keys = np.concatenate([owner << 32 | old_accounts, row << 32 | accounts])
        order = keys.argsort(kind="stable")
        keys = keys[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        sums = np.add.reduceat(np.concatenate([old_values, values])[order], first)
        keys, sums = keys[first][sums != 0], sums[sums != 0]

        sizes = np.bincount(keys >> 32, minlength=len(touched))
        self._resize(touched, sizes)
        _, at = self._entries(touched)
        self.accounts[at] = keys & 0xFFFFFFFF
        self.values[at] = sums

    def _entries(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where these rows' entries lie, in order, each with its index into `rows`."""
        sizes = self.sizes[rows]
        owner = np.repeat(np.arange(len(rows)), sizes)
        before = sizes.cumsum() - sizes
        return owner, (self.starts[rows] - before)[owner] + np.arange(len(owner))

    def _resize(self, rows: np.ndarray, sizes: np.ndarray) -> None:
        """Gives these (distinct) rows new sizes, and a new span where the old one is too short."""
        moved = _room(sizes) > _room(self.sizes[rows])
        room = _room(sizes[moved])
        self.starts[rows[moved]] = self.end + room.cumsum() - room
        self.end += int(room.sum())
        if self.end > len(self.values):
            self.accounts = _grown(self.accounts, 2 * self.end)
            self.values = _grown(self.values, 2 * self.end)
        self.occupied += int(np.count_nonzero(sizes) - np.count_nonzero(self.sizes[rows]))
        self.sizes[rows] = sizes


def _room(sizes: np.ndarray) -> np.ndarray:
    """The power of two that holds so many entries: 0 -> 0, 1 -> 1, 2 -> 2, 3 -> 4, 5 -> 8."""
    return np.where(sizes > 0, 1 << np.frexp(sizes - 1.0)[1], 0)


def _grown(values: np.ndarray, length: int) -> np.ndarray:
    """A longer copy, filled up with zeros."""
    return np.concatenate([values, np.zeros(length - len(values), dtype=values.dtype)])


# ---------------------------------------------------------------------------------------- Metrics


def precision_recall(booked: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """Macro-averaged precision and recall, over the labels in either of two (n,) arrays, n > 0.

    A label never predicted has precision 0, one never booked recall 0: scikit-learn's
    precision_score and recall_score with average="macro", zero_division=0.
    """
    labels, codes = np.unique(np.concatenate([booked, predicted]), return_inverse=True)
    booked, predicted = codes.reshape(2, -1)
    hits, actual, claimed = (
        np.bincount(numbers, minlength=len(labels))
        for numbers in (booked[booked == predicted], booked, predicted)
    )
    # fsum, which rounds once, gives the same whatever the order of the labels.
    precision = math.fsum(hits / np.maximum(claimed, 1)) / len(labels)
    recall = math.fsum(hits / np.maximum(actual, 1)) / len(labels)
    return precision, recall


# -------------------------------------------------------------------------------------------- Log


PLACE = ("seq", "batch", "left")  # what the log puts before a record
MAX_NAMES = 100_000  # names of batches that are remembered, the last ones: about 30 MB


class LogError(Exception):
    """The log cannot be used; the message says which, where and why."""


class Log:
    """An append-only JSON Lines file of batches of records, owned by one process.

    A line is a record between its place and its checksum: `seq` counts lines from 0, `batch` names
    the batch (its sender's name for it, or else the seq of its first line), `left` counts it down
    to 0, `crc` is the CRC-32 of the line before it. A batch is in the log once its line with
    `left` 0 is.
    """

    def __init__(self, path: Path) -> None:
        """Opens the log or makes it, with its folder. Raises LogError if it cannot be owned."""
        self.path = path
        self.total = 0  # records in whole batches
        self._size = 0  # bytes of whole batches
        self._torn = False  # may the file hold bytes beyond them?
        self._named: OrderedDict[str, tuple[int, int]] = OrderedDict()  # batch -> its bytes
        try:
            folders = path.absolute().parents
            new = sum(not folder.exists() for folder in folders)
            with suppress(FileExistsError):  # if it is a file, opening says so better
                path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            for folder in folders[: 1 + new]:  # so that new names are on disk, too
                _fsync_folder(folder)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise LogError(f"{path} is in use by another process") from None
        except OSError as error:
            raise LogError(f"cannot open {path}: {error.strerror}") from None

    def read(self) -> Iterator[dict]:
        """The records of all whole batches; an unfinished batch at the end is cut off.

        To be read to its end, once, before the first append. Raises LogError where the log is
        damaged, and leaves the file as it is.
        """
        for found in scan(self.path):
            if isinstance(found, Damage):
                if not found.at_end:
                    raise self.damaged(found)
                logger.warning("%s: cut off from line %d on: %s", self.path, *found[:2])
                self._cut_back()
            else:
                yield from found.records
                self._keep(found.records, found.size)

    def append(self, batches: list[tuple[str | None, list[dict]]]) -> None:
        """Writes batches, named or not, with one fsync: once it returns, they are on disk.

        Raises OSError if they could not be written; then the log is as it was before.
        """
        seq = self.total
        placed: list[list[dict]] = []
        for name, batch in batches:
            first, seq = seq, seq + len(batch)
            batch_name = first if name is None else name
            placed.append(
                [
                    {"seq": first + i, "batch": batch_name, "left": seq - first - i - 1} | record
                    for i, record in enumerate(batch)
                ]
            )
        written = [b"".join(map(_line, batch)) for batch in placed]
        try:
            if self._torn:
                self._cut_back()
            self._torn = True
            unwritten = memoryview(b"".join(written))
            while unwritten:
                unwritten = unwritten[os.write(self._file, unwritten) :]
            os.fsync(self._file)
            self._torn = False
        except OSError:
            with suppress(OSError):  # else it is cut back before the next append
                self._cut_back()
            raise
        for batch, data in zip(placed, written, strict=True):
            self._keep(batch, len(data))

    def find(self, name: str) -> list[dict] | None:
        """The records of the batch of that name, if it is one of the last MAX_NAMES named ones."""
        if name not in self._named:
            return None
        start, size = self._named[name]
        return [_parse(line) for line in os.pread(self._file, size, start).splitlines(True)]

    def close(self) -> None:
        """Lets another process own the log."""
        os.close(self._file)

    def damaged(self, damage: "Damage") -> LogError:
        """What to raise when a line makes no sense."""
        return LogError(
            f"{self.path} is damaged, line {damage.line}: {damage.reason}; restore it, or see what "
            f"python bookkeep.py check {self.path} --repair can keep of it"
        )

    def _keep(self, batch: list[dict], size: int) -> None:
        """Counts a whole batch that stands behind all others."""
        if (name := name_of(batch)) is not None:
            self._named[name] = self._size, size
            if len(self._named) > MAX_NAMES:
                self._named.popitem(last=False)
        self.total += len(batch)
        self._size += size

    def _cut_back(self) -> None:
        os.ftruncate(self._file, self._size)
        os.fsync(self._file)
        self._torn = False


class Whole(NamedTuple):
    """A whole batch in a log."""

    records: list[dict]
    line: int  # of the first, from 1
    size: int  # bytes


class Damage(NamedTuple):
    """What is wrong with a line in a log."""

    line: int  # from 1
    reason: str
    at_end: bool = False  # is it but a batch that a crash left unfinished?


def scan(path: Path) -> Iterator[Whole | Damage]:
    """What is in the log, in order; after a damage, the batches that are surely whole."""
    seq, left, name = -1, 0, None  # of the line before
    batch: list[dict] | None = []  # the lines of an unfinished batch, None if some are missing
    number = start = size = unreadable = 0
    torn = False
    for (number, line, record), (_, _, after) in pairwise(_lines(path)):
        if isinstance(record, ValueError):
            torn = not line.endswith(b"\n")
            if not torn:
                yield Damage(number, str(record))
                unreadable += 1
            continue
        missing = record["seq"] - seq - 1
        if missing < 0 or (missing and isinstance(after, dict) and after["seq"] == seq + 1):
            yield Damage(number, f"booking {record['seq']} does not belong here")
            continue
        if missing > unreadable:
            yield Damage(number, f"{missing - unreadable} bookings are missing before it")
        # A batch starts where the one before ends, and an unnamed one says where it starts.
        if left == missing or record["batch"] == record["seq"]:
            if left > missing:
                yield Damage(number, "the batch before it is unfinished")
            batch, start, size = [], number, 0
        elif missing:
            batch = None
        elif (name, left - 1) != (record["batch"], record["left"]):
            yield Damage(number, "it does not belong to the batch before it")
            batch = None
        seq, left, name = record["seq"], record["left"], record["batch"]
        unreadable = 0
        if batch is not None:
            batch.append(record)
            size += len(line)
            if left == 0:
                yield Whole(batch, start, size)
                batch = []
    if torn or left:
        first = number + (not torn) - len(batch or [])
        yield Damage(first, "the batch is unfinished", at_end=True)


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict | ValueError | None]]:
    """The lines from 1, as bytes and as records, or what is wrong with them; and then no line."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield number, line, _parse(line)
            except ValueError as error:
                yield number, line, error
    yield 0, b"", None


def name_of(batch: list[dict]) -> str | None:
    """What the sender of a batch called it, if anything."""
    return batch[0]["batch"] if batch and isinstance(batch[0]["batch"], str) else None


def _line(record: dict) -> bytes:
    text = json.dumps(record, ensure_ascii=False)[:-1].encode()
    return b'%s, "crc": %d}\n' % (text, zlib.crc32(text))


def _parse(line: bytes) -> dict:
    """The record on the line. Raises ValueError unless the line is as it was written."""
    text, _, checksum = line.rpartition(b', "crc": ')
    if checksum != b"%d}\n" % zlib.crc32(text):
        raise ValueError("the checksum does not fit")
    record = json.loads(text + b"}")
    seq, batch, left = (record.get(key) for key in PLACE)
    if not (isinstance(seq, int) and isinstance(batch, int | str) and isinstance(left, int)):
        raise ValueError("it has no place in the log")
    return record


def _fsync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ------------------------------------------------------------------------------------- Bookkeeper

CHUNK = 128  # samples scored or learned at a time: what a prediction may have to wait for
GROUP = 1000  # samples that a group of batches may have, unless it is one batch
BACKLOG = 50_000  # samples that may wait, unless they are one batch
RESTART = "nothing can be booked until the service is started again"


class NotReady(Exception):
    """Nothing to answer with yet, or no longer; the message says why."""


class Busy(NotReady):
    """No more can wait; the same can be sent again in a second."""


class NotStored(Exception):
    """The log could not be written: nothing has changed, and the same can be sent again."""


class Conflict(Exception):
    """A batch was sent under the name of another."""


class Batch(NamedTuple):
    """Samples on their way into the log, and what their sender waits for."""

    name: str | None
    samples: list[Sample]
    stored: Future  # of the range of their sequence numbers


class Bookkeeper:
    """Books samples into the log and the model, and knows how well it predicted them.

    One writer thread is the only one that changes anything. It takes the batches that wait as one
    group: predicts them all, appends them all with one fsync, learns them. So no batch is scored
    by a model that has seen its answers, and none is learned that is not on disk.
    """

    def __init__(self, log: Log) -> None:
        """Learns all that is in the log. Raises LogError if that is damaged, or OSError."""
        self.log = log
        self._model = NaiveBayes()
        self._companies: set[str] = set()
        self._labels = Index()  # accounts by the numbers that the next two have for them
        self._booked = array("i")  # for each sample that was predicted, by which account it was
        self._predicted = array("i")  # booked and predicted
        self._changing = threading.Lock()  # held to learn a chunk, and to read what that changes
        self._waiting: deque[Batch] = deque()
        self._arrival = threading.Condition()  # of a batch that waits, or of the end
        self._closed = False
        self._broken = False  # has the model lost step with the log?
        self._started = time.monotonic()
        self._read_back()
        self._writer = threading.Thread(target=self._write, name="writer", daemon=True)
        self._writer.start()

    def book(self, samples: list[Sample], name: str | None = None) -> range:
        """The samples' sequence numbers, once they are on disk and learned.

        A batch whose name is known is not booked again: it has the numbers that it got before.
        Raises Conflict if that was another batch, NotStored if the samples could not be written,
        Busy if too many wait, NotReady if the bookkeeper is closed.
        """
        batch = Batch(name, samples, Future())
        with self._arrival:
            if self._closed or self._broken:
                raise NotReady(RESTART)
            waiting = sum(len(other.samples) for other in self._waiting)
            if waiting and waiting + len(samples) > BACKLOG:
                raise Busy("too many bookings are waiting; send this again in a second")
            self._waiting.append(batch)
            self._arrival.notify()
        return batch.stored.result()

    def predict(self, samples: Iterable[Sample]) -> list[str]:
        """The most probable account of each sample. Raises NotReady while there is no model."""
        accounts: list[str] = []
        for documents in _chunks(map(tokens, samples), CHUNK):
            with self._changing:
                if not self._model.names:
                    raise NotReady("there is no model yet; send bookings to /sample first")
                accounts += self._model.predict(documents)
        return accounts

    def metrics(self, n: int) -> dict[str, float]:
        """Macro precision and recall of the last n (or fewer) predictions. Raises NotReady."""
        with self._changing:
            booked, predicted = np.array(self._booked[-n:]), np.array(self._predicted[-n:])
        if not len(booked):
            raise NotReady("nothing has been predicted yet; send bookings to /sample first")
        precision, recall = precision_recall(booked, predicted)
        return {"precision": precision, "recall": recall}

    def health(self) -> dict[str, str | int | float]:
        """How much has been learned, and for how many seconds the service has been up.

        Raises NotReady if the service must be restarted.
        """
        if self._broken:
            raise NotReady(RESTART)
        with self._changing:
            return {
                "status": "ok",
                "samples": self.log.total,
                "accounts": len(self._model.names),
                "companies": len(self._companies),
                "tokens": self._model.token_counts.occupied,
                "uptime": round(time.monotonic() - self._started, 3),
            }

    def close(self) -> None:
        """Books what is waiting, nothing more, and closes the log."""
        with self._arrival:
            self._closed = True
            self._arrival.notify()
        self._writer.join()
        self.log.close()

    def _write(self) -> None:
        """The writer thread: books group after group until there will be no more."""
        while group := self._next_group():
            try:
                if self._broken:
                    raise NotReady(RESTART)
                self._book_group(group)
            except Exception as error:
                if isinstance(error, OSError):
                    logger.error("%s could not be written: %s", self.log.path, error.strerror)
                    error = NotStored(f"the log could not be written ({error.strerror}); try later")
                for batch in group:
                    if not batch.stored.done():
                        batch.stored.set_exception(error)

    def _next_group(self) -> list[Batch]:
        with self._arrival:
            self._arrival.wait_for(lambda: self._waiting or self._closed)
            group: list[Batch] = []
            size = 0
            while self._waiting:
                batch = self._waiting[0]
                size += len(batch.samples)
                named = batch.name is not None and batch.name in {other.name for other in group}
                if group and (named or size > GROUP):
                    break
                group.append(self._waiting.popleft())
            return group

    def _book_group(self, group: list[Batch]) -> None:
        group = [batch for batch in group if not self._answered_before(batch)]
        if not group:
            return
        samples = [sample for batch in group for sample in batch.samples]
        documents = [tokens(sample) for sample in samples]
        records = self._assess(samples, documents)
        remaining = iter(records)
        first = self.log.total
        self.log.append(
            [(batch.name, list(islice(remaining, len(batch.samples)))) for batch in group]
        )
        try:
            self._learn(records, documents)
        except BaseException:
            self._broken = True  # until a restart
            raise
        for batch in group:
            batch.stored.set_result(range(first, first + len(batch.samples)))
            first += len(batch.samples)

    def _answered_before(self, batch: Batch) -> bool:
        try:
            records = None if batch.name is None else self.log.find(batch.name)
        except (OSError, ValueError) as error:
            batch.stored.set_exception(NotStored(f"the log could not be read ({error}); try later"))
            return True
        if records is None:
            return False
        if [record["sample"] for record in records] == batch.samples:
            batch.stored.set_result(range(records[0]["seq"], records[-1]["seq"] + 1))
        else:
            batch.stored.set_exception(
                Conflict("this Idempotency-Key was used for other bookings; take a new one")
            )
        return True

    def _assess(self, samples: list[Sample], documents: list[list[str]]) -> list[dict]:
        """What the log will say of these samples."""
        labels = [sample[TARGET] for sample in samples]
        assessments: list[Assessment] = []
        for chunk in _chunks(zip(documents, labels, strict=True), CHUNK):
            assessments += self._model.assess(*zip(*chunk, strict=True))
        return [
            {"sample": sample, **assessment._asdict()}
            for sample, assessment in zip(samples, assessments, strict=True)
        ]

    def _learn(self, records: list[dict], documents: list[list[str]]) -> None:
        for chunk in _chunks(zip(records, documents, strict=True), CHUNK):
            labels = [record["sample"][TARGET] for record, _ in chunk]
            weights = [record["weight"] for record, _ in chunk]
            tested = [record for record, _ in chunk if record["predicted"] is not None]
            with self._changing:
                self._model.learn([document for _, document in chunk], labels, weights)
                self._companies.update(record["sample"]["CompanyId"] for record, _ in chunk)
                self._booked.extend(self._labels[record["sample"][TARGET]] for record in tested)
                self._predicted.extend(self._labels[record["predicted"]] for record in tested)

    def _read_back(self) -> None:
        reported = time.monotonic()
        for records in _chunks(self.log.read(), 32 * CHUNK):
            for damage in check_records(records, records[0]["seq"] + 1):
                raise self.log.damaged(damage)
            self._learn(records, [tokens(record["sample"]) for record in records])
            if time.monotonic() - reported > 3:
                reported = time.monotonic()
                logger.info("%s: %d bookings read back so far", self.log.path, self.log.total)


def check_records(records: list[dict], line: int) -> Iterator[Damage]:
    """Those of the records from that line on which are none that a bookkeeper writes."""
    for number, record in enumerate(records, start=line):
        try:
            check_sample(record["sample"], (*FEATURES, TARGET))
            if not isinstance(record["predicted"], str | None):
                raise ValueError("predicted is no account")
            if not (FLOOR <= record["weight"] <= 1 and record["weight"] * GRAIN % 1 == 0):
                raise ValueError("no booking can have that weight")
        except KeyError as error:
            yield Damage(number, f"{error} is missing")
        except (ValueError, TypeError) as error:
            yield Damage(number, str(error))


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


# ------------------------------------------------------------------------------------------- HTTP

MAX_BODY = 64 << 20  # bytes of a request's body
LARGE_BODY = 1 << 20  # bytes from which a body has to wait for its turn
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}  # of every answer

STATUS = {BadRequest: 400, Conflict: 422, NotReady: 503, NotStored: 507}  # of what is raised above


def create_app(
    bookkeeper: Bookkeeper,
    token: str | None = None,
    hosts: Collection[str] | None = None,
    max_body: int = MAX_BODY,
    max_batch: int = MAX_BATCH,
) -> Bottle:
    """The WSGI app that answers for this bookkeeper, all in JSON, errors too.

    With a token, all but /health is for those who send it. With hosts, it is for those who call
    the service by one of these names: a web page whose own name was made to lead here does not.
    """
    app = Bottle()
    app.install(_in_json)
    app.default_error_handler = _error_in_json
    description = _openapi(max_batch)
    parsing = threading.Lock()  # parsed JSON may take 20 times its bytes, so one at a time

    @app.hook("before_request")
    def authorize() -> None:
        host = re.sub(":[0-9]*$", "", request.environ.get("HTTP_HOST", "")).lower()
        if hosts is not None and host not in hosts:
            raise HTTPError(403, f"call this service by one of its names: {', '.join(hosts)}")
        if token is None or request.path == "/health":
            return
        expected = f"Bearer {token}".encode()
        given = request.environ.get("HTTP_AUTHORIZATION", "")
        if not hmac.compare_digest(given.encode("latin-1"), expected):
            raise HTTPError(
                401,
                "send the token, with the header Authorization: Bearer <token>",
                **{"WWW-Authenticate": "Bearer"},
            )

    @app.hook("after_request")
    def protect() -> None:
        for name, value in HEADERS.items():
            response.set_header(name, value)

    def samples(booked: bool) -> list[Sample]:
        if request.content_type.partition(";")[0].strip() != "application/json":
            raise HTTPError(415, "send JSON, with the header Content-Type: application/json")
        if request.content_length > max_body:
            raise HTTPError(413, f"send at most {max_body} bytes in one request")
        with parsing if request.content_length > LARGE_BODY else nullcontext():
            return parse_samples(request.body.read(), booked, max_batch)

    @app.post("/sample")
    def sample() -> dict:
        key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
        if key is not None and not re.fullmatch("[ -~]{1,200}", key):
            raise HTTPError(400, "an Idempotency-Key must be 1 to 200 printable ASCII characters")
        stored = bookkeeper.book(samples(booked=True), key)
        first, last = (stored[0], stored[-1]) if stored else (None, None)
        return {"received": len(stored), "total": stored.stop, "first": first, "last": last}

    @app.post("/predict")
    def predict() -> list[str]:
        return bookkeeper.predict(samples(booked=False))

    @app.get("/metrics/<n>")
    def metrics(n: str) -> dict[str, float]:
        if not re.fullmatch("[0-9]{1,9}", n) or int(n) == 0:
            raise HTTPError(400, "after /metrics/ there must be a whole number from 1 to 999999999")
        return bookkeeper.metrics(int(n))

    @app.get("/health")
    def health() -> dict:
        return bookkeeper.health()

    @app.get("/openapi.json")
    def openapi() -> dict:
        return description

    @app.error(404)
    def not_found(error: HTTPError) -> str:
        error.body = f"there is nothing here; {' '.join(description['paths'])} is all"
        return _error_in_json(error)

    @app.error(405)
    def not_allowed(error: HTTPError) -> str:
        error.body = f"ask for this with {response.get_header('Allow')}, not {request.method}"
        return _error_in_json(error)

    return app


def _in_json(callback: Callable) -> Callable:
    """A Bottle plugin: what a route returns becomes JSON, what it raises an error with a status."""

    def route(**arguments: str) -> str:
        try:
            answer = json.dumps(callback(**arguments))
        except HTTPError:
            raise
        except Exception as error:
            for kind, status in STATUS.items():
                if isinstance(error, kind):
                    again = {"Retry-After": "1"} if isinstance(error, Busy) else {}
                    raise HTTPError(status, str(error), **again) from None
            logger.exception("%s %s failed", request.method, request.path)
            raise HTTPError(500, "the service failed to answer; its log says why") from None
        response.content_type = "application/json"
        return answer

    return route


def _error_in_json(error: HTTPError) -> str:
    response.content_type = "application/json"
    return json.dumps({"error": error.body})


def _openapi(max_batch: int) -> dict:
    """The description of this API, in OpenAPI 3.1."""

    def of(kind: str, name: str) -> dict:
        return {"$ref": f"#/components/{kind}/{name}"}

    def answers(schema: dict, *refusals: int) -> dict:
        success = {"description": "done", "content": {"application/json": {"schema": schema}}}
        refused = dict.fromkeys(map(str, (*refusals, 401)), of("responses", "Refusal"))
        return {"200": success, **refused, "default": of("responses", "Refusal")}

    def body(schema: dict) -> dict:
        return {"required": True, "content": {"application/json": {"schema": schema}}}

    def record(properties: dict, others: object = False) -> dict:
        required = list(properties)
        shape = {"type": "object", "required": required, "properties": properties}
        return shape | {"additionalProperties": others}

    text = {"type": "string", "maxLength": MAX_VALUE}
    filled = text | {"minLength": 1}
    features = {
        key: filled | {"maxLength": MAX_NAME if key in REPEATED else MAX_VALUE} for key in FEATURES
    }
    count = {"type": "integer", "minimum": 0}
    share = {"type": "number", "minimum": 0, "maximum": 1}
    place = {"type": ["integer", "null"], "minimum": 0}
    schemas = {
        "Sample": record(features, text),
        "Booking": record(features | {TARGET: filled}, text),
        "Stored": record({"received": count, "total": count, "first": place, "last": place}),
        "Metrics": record({"precision": share, "recall": share}),
        "Health": record(
            {"status": {"const": "ok"}}
            | dict.fromkeys(("samples", "accounts", "companies", "tokens"), count)
            | {"uptime": {"type": "number", "minimum": 0}}
        ),
        "Error": record({"error": {"type": "string", "minLength": 1}}),
    }
    refusal = {
        "description": "refused, with one sentence that says what to change",
        "content": {"application/json": {"schema": of("schemas", "Error")}},
    }
    some = {"type": "array", "maxItems": max_batch}
    key = {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "the batch's name: under it, it is stored once, however often it is sent",
        "schema": {"type": "string", "pattern": "^[!-~]([ -~]{0,198}[!-~])?$"},
    }
    n = {
        "name": "n",
        "in": "path",
        "required": True,
        "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999},
    }
    paths = {
        "/sample": {
            "post": {
                "summary": "store bookings, and learn them",
                "parameters": [key],
                "requestBody": body(some | {"items": of("schemas", "Booking")}),
                "responses": answers(of("schemas", "Stored"), 400, 413, 415, 422, 503, 507),
            }
        },
        "/predict": {
            "post": {
                "summary": "suggest an account for one sample, or for each of a list",
                "requestBody": body(
                    {
                        "anyOf": [
                            of("schemas", "Sample"),
                            some | {"items": of("schemas", "Sample")},
                        ]
                    }
                ),
                "responses": answers({"type": "array", "items": filled}, 400, 413, 415, 503),
            }
        },
        "/metrics/{n}": {
            "get": {
                "summary": "macro-averaged precision and recall of the last n predictions",
                "parameters": [n],
                "responses": answers(of("schemas", "Metrics"), 400, 503),
            }
        },
        "/health": {
            "get": {
                "summary": "how much has been learned",
                "security": [],
                "responses": answers(of("schemas", "Health"), 503),
            }
        },
        "/openapi.json": {
            "get": {"summary": "this description", "responses": answers({"type": "object"})}
        },
    }
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


# ----------------------------------------------------------------------------------- Command line

GRACE = 10  # seconds that requests under way have to end when the service stops


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the service until SIGTERM or Ctrl-C, or checks a log; the exit status."""
    options = _options(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, until it serves
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
    log = Log(options.log)
    started = time.monotonic()
    bookkeeper = Bookkeeper(log)
    logger.info(
        "serving on http://%s:%d, log %s, %d bookings read back in %.1f s",
        *(f"[{host}]" if ":" in host else host, port),
        *(log.path, log.total, time.monotonic() - started),
    )
    names = {"localhost", "127.0.0.1", "[::1]", options.host.lower()}
    hosts = None if token or options.open else sorted(names)
    app = create_app(bookkeeper, token, hosts, options.max_body, options.max_batch)
    _answer(app, listener, options)
    bookkeeper.close()
    logger.info("stopped")


def check(path: Path, repair: bool) -> int:
    """Prints what is wrong with a log, and what a repaired copy leaves out; the exit status."""
    damages = lost_at_end = 0

    def whole_batches() -> Iterator[list[dict]]:
        nonlocal damages, lost_at_end
        for found in scan(path):
            if isinstance(found, Damage):
                problems = [found]
            else:
                problems = list(check_records(found.records, found.line))
            for problem in problems:
                print(f"{path}, line {problem.line}: {problem.reason}")
            damages += len(problems)
            lost_at_end = len(problems)
            if not problems:
                yield found.records

    with open(path, "rb"):  # before anything is made for the sake of a log that is not there
        pass
    if not repair:
        kept = sum(map(len, whole_batches()))
        print(f"{path}: {kept} bookings in whole batches, {damages or 'no'} problems")
        return int(damages > 0)

    target = path.with_name(f"{path.name}.repaired")
    if target.exists():
        raise LogError(f"{target} is there already; move it away first")
    copy = Log(target)
    due = 0  # the booking that comes next, if none is left out
    try:
        for batches in _chunks(whole_batches(), 16):
            for records in batches:
                if records[0]["seq"] > due:
                    print(f"left out: bookings {due} to {records[0]['seq'] - 1}")
                due = records[-1]["seq"] + 1
            copy.append([(name_of(records), list(map(_content, records))) for records in batches])
    except BaseException:
        target.unlink()  # an unfinished copy must not pass for a finished one
        raise
    if lost_at_end:
        print(f"left out: all from booking {due} on")
    print(f"{target}: {copy.total} bookings, numbered anew")
    copy.close()
    return int(damages > 0)


def _content(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in PLACE}


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
    option = parser.add_argument
    option("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    option(
        "--port",
        type=_whole(0, 65535),
        default=8080,
        help="0 for any free one (default: %(default)s)",
    )
    option(
        "--log",
        type=Path,
        default=Path("data/bookkeep.jsonl"),
        help="file that keeps every booking; it is made, and read back at the next start "
        "(default: %(default)s)",
    )
    option(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with a token that all requests but /health must send; or set BOOKKEEP_TOKEN",
    )
    option(
        "--open",
        action="store_true",
        help="listen without a token where other machines can reach it",
    )
    option(
        "--threads",
        type=_whole(1, 1000),
        default=16,
        help="requests at work at once; one of /sample is until its bookings are on disk "
        "(default: %(default)s)",
    )
    option(
        "--max-body",
        type=_whole(1, 1 << 40),
        default=MAX_BODY,
        help="bytes in one request's body (default: %(default)s)",
    )
    option(
        "--max-batch",
        type=_whole(1, 10**9),
        default=MAX_BATCH,
        help="samples in one request (default: %(default)s)",
    )
    option("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    checking = commands.add_parser(
        "check",
        help="verify a log without serving it",
        description="Prints a line for each problem of a log; the exit status is 0 if it has none.",
    )
    checking.add_argument("checked", type=Path, metavar="LOG", help="the log to verify")
    checking.add_argument(
        "--repair",
        action="store_true",
        help="write all its whole batches to LOG.repaired, numbered anew, and say what is left out",
    )
    return parser.parse_args(arguments)


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


def _answer(app: Bottle, listener: socket.socket, options: argparse.Namespace) -> None:
    """Answers requests until SIGTERM or Ctrl-C, then those that are under way."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    server = waitress.create_server(
        app,
        sockets=[listener],
        threads=options.threads,
        ident=None,
        # A connection takes a socket, and a file for a body of over 512 KiB.
        connection_limit=1000 if files == resource.RLIM_INFINITY else min(1000, files // 2 - 50),
        asyncore_use_poll=True,
        # The app refuses long bodies, in JSON; waitress refuses what is not worth receiving.
        max_request_body_size=2 * options.max_body + (1 << 20),
    )
    server.channel_class = Channel
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # waiting for a thread is fine
    stopping = threading.Event()

    def stop(number: int, _: object) -> None:
        logger.info("stopping on %s", signal.Signals(number).name)
        stopping.set()
        server.pull_trigger()

    def turn(seconds: float) -> None:
        server.asyncore.loop(timeout=seconds, use_poll=True, map=server._map, count=1)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while not stopping.is_set():
        turn(1)

    server.del_channel()
    listener.close()
    turn(0)  # what has arrived by now is under way
    deadline = time.monotonic() + GRACE
    while server.active_channels and time.monotonic() < deadline:
        for channel in list(server.active_channels.values()):
            if not (channel.requests or channel.request or channel.total_outbufs_len):
                channel.handle_close()
        turn(0.05)
    server.task_dispatcher.shutdown()


class JSONErrorTask(ErrorTask):
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


class Channel(HTTPChannel):
    """A connection of waitress's whose errors are in JSON."""

    error_task_class = JSONErrorTask


if __name__ == "__main__":
    sys.exit(main())
