"""bookkeep: a service that learns from every booking and suggests the account of the next.

`python bookkeep.py` answers HTTP requests: `POST /sample` stores and learns bookings,
`POST /predict` predicts an account, `POST /suggest` says how sure that is and why,
`GET /metrics/<n>` how good the last predictions were; `GET /openapi.json` describes the rest. The
module reads from top to bottom, each section using only those above it: Samples, Model, Metrics,
Log, Snapshot, Bookkeeper, HTTP, Command line. At its end stands the source of the page.

It does not tune itself, forgets only what it is told to forget, and does not spread over machines:
one process owns one log, and the model is the sum of what is in it.
"""

import argparse
import errno
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
import stat
import sys
import threading
import time
import zlib
from array import array
from base64 import b64encode
from bisect import bisect_left
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, lru_cache, partial
from hashlib import blake2b, sha256
from itertools import accumulate, chain, count, groupby, islice, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
import waitress
from bottle import Bottle, HTTPError, request, response
from waitress.channel import HTTPChannel
from waitress.server import BaseWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher

__version__ = "0.1.0"

logger = logging.getLogger("bookkeep")

# ---------------------------------------------------------------------------------------- Samples

FEATURES = ("CompanyId", "BankEntryText", "BankEntryAmount")
TARGET = "AccountNumber"
NAMES = ("CompanyId", "BankEntryAmount")  # of at most MAX_NAME characters

MAX_BATCH = 10_000  # samples in one body
MAX_VALUE = 10_000  # characters in a key or a value
MAX_NAME = 100  # characters in a company or an amount
MAX_WORDS = 100  # words of a text that become tokens: its first ones

KINDS = (  # of tokens, in a person's words
    "company",
    "amount",
    "word",
    "word in this company",
    "first word in this company",
    "first word with this amount in this company",
    "first two words in this company",
)

Sample = dict[str, str]
Arrays = dict[str, np.ndarray]
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


def parse_samples(body: bytes, booked: bool, most: int = MAX_BATCH) -> list[Sample]:
    """The samples in a JSON body: a list of them, or, unless they must be `booked`, a single one.

    A booked sample must name its account. Raises BadRequest, which counts the samples from 0, also
    if there are more than `most`.
    """
    return check_samples(parse_json(body), booked, most)


def check_samples(content: object, booked: bool, most: int) -> list[Sample]:
    """The samples in what the body says. Raises BadRequest as parse_samples does."""
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
        if key in NAMES and len(sample[key]) > MAX_NAME:
            raise BadRequest(f"{key} is longer than {MAX_NAME} characters")
    try:
        "".join(chain(sample, sample.values())).encode()
    except UnicodeEncodeError:
        raise BadRequest("a lone surrogate (half of a \\u pair) is not text") from None


def tokens(sample: Sample) -> list[int]:
    """The sample's tokens: 64-bit hashes of their kind and of what they say.

    The kind keeps a word from passing for a company. That any two of five million tokens have the
    same hash has a probability of less than 1 in 100,000.
    """
    company, words, amount = _parts(sample)
    c, a, *w = map(_digest, [company, amount, *words])
    first = [hash((4, c, w[0])), hash((5, c, a, w[0])), hash((6, c, *w[:2]))] if w else []
    return [
        hash((0, c)),
        hash((1, a)),
        *[hash((2, word)) for word in w],
        *[hash((3, c, word)) for word in w],
        *first,
    ]


@lru_cache(1 << 16)
def _digest(text: str) -> int:
    """A hash that is the same in every process, unlike Python's own of a string."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def wordings(sample: Sample) -> list[tuple[str, str]]:
    """What each of the sample's tokens says to a person: its kind and the sample's own words."""
    company, words, amount = _parts(sample)
    first = [words[0], words[0], " ".join(words[:2])] if words else []
    crossed = [(kind, word) for kind in KINDS[2:4] for word in words]
    return [(KINDS[0], company), (KINDS[1], amount), *crossed, *zip(KINDS[4:], first, strict=False)]


def _parts(sample: Sample) -> tuple[str, list[str], str]:
    """The sample's company, the words of its text that count, and its amount."""
    words = sample["BankEntryText"].split(maxsplit=MAX_WORDS)[:MAX_WORDS]
    return sample["CompanyId"], words, sample["BankEntryAmount"]


def _packed(content: object) -> np.ndarray:
    """Its JSON, as an array of bytes."""
    return np.frombuffer(json.dumps(content).encode(), dtype=np.uint8)


def _unpacked(array: np.ndarray) -> object:
    return json.loads(array.tobytes())


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        for key, _ in pairs:
            if unique.pop(key, pairs) is pairs:  # popped before
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


# ------------------------------------------------------------------------------------------ Model

ALPHA = 0.025  # Lidstone smoothing
SOFTENING = 3  # divides log-odds for the weights: Naive Bayes is too sure of itself
FLOOR = 1 / 16  # what a booking that surprises nobody counts at the least
GRAIN = 1024  # weights are multiples of 1 / GRAIN, so sums of them are exact in any order
ROUND = 64  # documents of a batch that are weighed, and learned, at once
MAX_CELLS = 1 << 23  # scores that may be at work at once, unless one document has more
MAX_ENTRIES = 1 << 20  # sums of narrow tokens that may be at work at once, likewise


class Assessment(NamedTuple):
    """What the model made of a booking before it learned it."""

    predicted: str | None  # the most probable account; None while there is no model
    margin: float | None  # its log-odds over the second; None while there is no second
    rank: int | None  # of the booked account, 1 for the most probable; None if it was not known


class Known(NamedTuple):
    """The known tokens of n documents."""

    document: np.ndarray  # (m,) that each is in, in ascending order
    rows: np.ndarray  # (m,) of token_counts
    lengths: np.ndarray  # (n,) how many each document has
    entries: int  # of the narrow ones


class Cells(NamedTuple):
    """The scores of n documents that are worth a look: each of a document and an account."""

    document: np.ndarray  # (k,) in ascending order
    account: np.ndarray  # (k,) in ascending order for each document
    before: np.ndarray  # (k,) the score without the evidence of narrow tokens
    score: np.ndarray  # (k,)
    start: np.ndarray  # (n,) each document's first cell


class NaiveBayes:
    """Multinomial Naive Bayes over documents of tokens, learned and unlearned a weight at a time.

    Of an account (a class) and a document it knows, up to a constant of the document,

        log P(account | tokens) = log N(account)
            + sum over known tokens of log (1 + N(token, account) / alpha)
            - (number of known tokens) * log (N(account's tokens) + alpha * V)

    where N are sums of weights and V is the number of known tokens. A document is a list of
    tokens, n documents with A accounts give (n, A) scores, and accounts count from 0 in the order
    in which they were first seen. Equals scikit-learn's MultinomialNB fitted with sample_weight.

    Few of the scores have to be computed. Documents with as many known tokens and the same wide
    ones, those that many accounts have met, have the same `base` of scores; their narrow tokens
    raise it for few accounts.
    """

    def __init__(self, alpha: float = ALPHA) -> None:
        self.alpha = alpha
        self.accounts = _numbers()  # account -> column of token_counts
        self.names: list[str] = []  # (A,) the accounts by number
        self.token_counts = Counts(alpha)  # N(token, account)
        self.account_counts = np.zeros(0)  # (A,) N(account)
        self.account_tokens = np.zeros(0)  # (A,) N(account's tokens)
        self._logs = np.zeros((2, 0))  # (2, A) of N(account) and of N(account's tokens) + alpha * V

    @property
    def known(self) -> int:
        """How many accounts it can predict: all that were learned but those wholly unlearned."""
        return int(np.count_nonzero(self.account_counts))

    def scores(self, documents: Sequence[Sequence[int]]) -> np.ndarray:
        """(n, A) log P(account, tokens), up to a constant of the document."""
        return np.array([self._scores(document) for document in documents])

    def _scores(self, document: Sequence[int]) -> np.ndarray:
        # One token after the other, which for a single document is faster than all at once.
        length, lines, account, evidence = self.token_counts.of_document(document)
        [scores] = self._base([(length, *lines)])
        np.add.at(scores, account, evidence)
        return scores

    def _base(self, kinds: Collection[tuple[int, ...]]) -> np.ndarray:
        """(n, A) scores of documents of that many known tokens, with these lines of wide ones."""
        A = len(self.names)
        base = np.empty((len(kinds), A))
        log_counts, log_tokens = self._logs
        priors = {
            length: log_counts - length * log_tokens for length in {kind[0] for kind in kinds}
        }
        for scores, (length, *lines) in zip(base, kinds, strict=True):
            evidence = [self.token_counts.wide_evidence[line, :A] for line in lines] or [0.0]
            np.add(priors[length], evidence[0], out=scores)
            for more in evidence[1:]:
                scores += more
        return base

    def terms(self, document: Sequence[int], accounts: np.ndarray) -> np.ndarray:
        """(k, 1 + T) what makes up the scores of k accounts: the prior, then each of T tokens.

        The difference between two accounts' terms is a list of log-odds that add up to the
        difference of their scores. The terms of an unknown token are 0.
        """
        rows = self.token_counts.find(_flat([document]))
        known = np.flatnonzero(self.token_counts.sizes[rows])
        terms = np.zeros((len(accounts), 1 + len(document)))
        terms[:, 0] = np.log(self.account_counts[accounts])
        counts = self.token_counts.of(rows[known], accounts)
        total = self.account_tokens[accounts] + self.alpha * self.token_counts.occupied
        terms[:, 1 + known] = np.log((counts + self.alpha) / total[:, np.newaxis])
        return terms

    def predict(self, documents: Sequence[Sequence[int]]) -> list[str]:
        """The most probable account of each document. There must be a model, that is an account."""
        if len(documents) > 1:
            assessed = self.assess(documents, [""] * len(documents))
            return [assessment.predicted for assessment in assessed]
        return [self.names[self._best(self._scores(document))] for document in documents]

    def _best(self, scores: np.ndarray) -> int:
        """The account of the highest of (A,) scores; of equals, the first by name."""
        best = scores.argmax()
        tied = (scores == scores[best]).nonzero()[0]
        return best if len(tied) == 1 else min(tied, key=self.names.__getitem__)

    def _best_two(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) accounts of the two highest of (n, A) scores; of equals, the first by name."""
        each = np.arange(len(scores))
        first = scores.argmax(axis=1)
        highest = scores[each, first]
        scores[each, first] = -np.inf
        second = scores.argmax(axis=1)
        scores[each, first] = highest
        for i in np.flatnonzero(scores[each, second] == highest):
            other = first[i]
            first[i] = self._best(scores[i])
            if first[i] != other:
                second[i] = other
        return first, second

    def top(self, scores: np.ndarray, most: int) -> np.ndarray:
        """(k,) the accounts of the highest of (A,) scores, best first; of equals, by name."""
        known = np.flatnonzero(scores > -np.inf)
        if len(known) > most:
            least = np.partition(scores[known], -most)[-most]
            known = known[scores[known] >= least]
        best = sorted(known.tolist(), key=lambda account: (-scores[account], self.names[account]))
        return np.array(best[:most], dtype=np.int64)

    def assess(self, documents: Sequence[Sequence[int]], labels: Sequence[str]) -> list[Assessment]:
        """Predictions for documents whose accounts, the labels, are known."""
        n = len(documents)
        if not (n and self.known):
            return [Assessment(None, None, None)] * n
        if n == 1:
            return [self._assessed(documents[0], labels[0])]
        if n * len(self.names) > MAX_CELLS or (
            (known := self._known(documents)).entries > MAX_ENTRIES
        ):
            half = n // 2
            first_half = self.assess(documents[:half], labels[:half])
            return first_half + self.assess(documents[half:], labels[half:])
        numbers = _numbers()
        kind = np.array([numbers[kind] for kind in self._kinds(known)])
        base = self._base(numbers)
        first, second = (best[kind] for best in self._best_two(base))
        booked = self._numbered(labels)
        asked = [first, second, np.where(booked < 0, first, booked)]
        cells, (_, _, own) = self._cells(
            known, asked, lambda document, account: base[kind[document], account]
        )

        best = self._best_cells(cells)
        predicted = cells.account[best]
        others = cells.score.copy()
        others[best] = -np.inf
        margins = cells.score[best] - np.maximum.reduceat(others, cells.start)

        # The rank of a booked account that was not predicted: how many score as much.
        ranks = (predicted == booked).astype(np.int64)
        wrong = np.flatnonzero((predicted != booked) & (booked >= 0))
        least = cells.score[own]
        raised = (cells.before < least[cells.document]) & (cells.score >= least[cells.document])
        ranks[wrong] = np.add.reduceat(raised, cells.start, dtype=np.int64)[wrong]
        for i in wrong:
            ranks[i] += np.count_nonzero(base[kind[i]] >= least[i])

        return list(
            map(
                Assessment,
                [self.names[account] for account in predicted.tolist()],
                [margin if margin < np.inf else None for margin in margins.round(4).tolist()],
                [rank or None for rank in ranks.tolist()],
            )
        )

    def _assessed(self, document: Sequence[int], label: str) -> Assessment:
        scores = self._scores(document)
        best, [booked] = self._best(scores), self._numbered([label])
        rank = 1 if best == booked else np.count_nonzero(scores >= scores[booked])
        highest = scores[best]
        scores[best] = -np.inf
        margin = float((highest - scores.max()).round(4))
        return Assessment(
            self.names[best],
            margin if margin < np.inf else None,
            int(rank) if booked >= 0 else None,
        )

    def weigh(
        self,
        documents: Sequence[Sequence[int]],
        labels: Sequence[str],
        predicted: Sequence[str | None],
    ) -> np.ndarray:
        """(n,) what documents count when they are learned: max(floor, 1 - P(label | tokens)).

        That is the discriminative frequency estimate (Su, Zhang, Ling, Matwin, ICML 2008), from a
        posterior that is softened by SOFTENING and is over the label, what was predicted, and the
        accounts that those of the document's tokens have met that met at most NARROW of them. An
        account not seen before counts 1.
        """
        n = len(documents)
        if not self.known:
            return np.ones(n)
        known = self._known(documents)
        if n > 1 and known.entries > MAX_ENTRIES:
            halves = slice(n // 2), slice(n // 2, n)
            return np.concatenate(
                [self.weigh(documents[h], labels[h], predicted[h]) for h in halves]
            )
        booked, rival = self._numbered(labels), self._numbered(predicted)
        any_known = self.account_counts.argmax()
        asked = [np.where(booked < 0, any_known, booked)]
        asked.append(np.where(rival < 0, asked[0], rival))
        cells, (own, _) = self._cells(known, asked, partial(self._base_at, known), Counts.NARROW)
        softened = cells.score / SOFTENING
        softened -= np.maximum.reduceat(softened, cells.start)[cells.document]
        likelihood = np.exp(softened)
        probability = likelihood[own] / np.add.reduceat(likelihood, cells.start)
        probability[booked < 0] = 0
        return np.maximum(FLOOR, np.round((1 - probability) * GRAIN) / GRAIN)

    def _numbered(self, accounts: Sequence[str | None]) -> np.ndarray:
        """(n,) their numbers, -1 for those that are not known."""
        numbers = np.array([self.accounts.get(account, -1) for account in accounts], dtype=np.int64)
        numbers[self.account_counts[numbers] == 0] = -1
        return numbers

    def _known(self, documents: Sequence[Sequence[int]]) -> Known:
        n = len(documents)
        rows = self.token_counts.find(_flat(documents))
        sizes = self.token_counts.sizes[rows]
        known = sizes.nonzero()[0]
        document = np.arange(n).repeat([len(tokens) for tokens in documents])[known]
        lengths = np.bincount(document, minlength=n)
        return Known(document, rows[known], lengths, int(np.maximum(sizes, 0).sum()))

    def _kinds(self, known: Known) -> Iterator[tuple[int, ...]]:
        """Of each document, how many tokens are known, and the lines of its wide ones."""
        lines, sizes = (numbers.tolist() for numbers in self._wide_lines(known))
        end = 0
        for length, size in zip(known.lengths.tolist(), sizes, strict=True):
            yield length, *lines[end : end + size]
            end += size

    def _wide_lines(self, known: Known) -> tuple[np.ndarray, np.ndarray]:
        """The lines of all wide tokens, in order, and (n,) how many each document has."""
        wide = self.token_counts.sizes[known.rows] == WIDE
        sizes = np.bincount(known.document[wide], minlength=len(known.lengths))
        return self.token_counts.starts[known.rows[wide]], sizes

    def _cells(
        self,
        known: Known,
        asked: list[np.ndarray],
        base: Callable[[np.ndarray, np.ndarray], np.ndarray],
        most: int | None = None,
    ) -> tuple[Cells, list[np.ndarray]]:
        """The scores of the accounts that narrow tokens have met and of those asked for, (n,) each.

        And in which cells these are. `base` gives the scores without the narrow tokens. Accounts
        that no token has met that met at most so many are left out.
        """
        counts = self.token_counts
        most = most or counts.narrow
        few = counts.sizes[known.rows] <= most
        owner, account, evidence = counts.evidence(known.rows[few])
        each = np.arange(len(known.lengths)) << 32
        asked = [each | account for account in asked]
        cells = np.concatenate([known.document[few][owner] << 32 | account, *asked])
        evidence = np.concatenate([evidence, np.zeros(len(cells) - len(evidence))])
        order = cells.argsort(kind="stable")
        cells = cells[order]
        first = _run_starts(cells)
        cells = cells[first]
        document, account = cells >> 32, cells & 0xFFFFFFFF
        before = base(document, account)
        score = before + np.add.reduceat(evidence[order], first)

        if most < counts.narrow:
            owner, other, count = counts.take(known.rows[~few])
            key = known.document[~few][owner] << 32 | other
            at = np.minimum(cells.searchsorted(key), len(cells) - 1)
            there = cells[at] == key
            more = _log_ratio(count[there], self.alpha)
            score += np.bincount(at[there], more, minlength=len(cells))
        found = Cells(document, account, before, score, start=cells.searchsorted(each))
        return found, [cells.searchsorted(cell) for cell in asked]

    def _best_cells(self, cells: Cells) -> np.ndarray:
        """(n,) the cell of each document's highest score; of equals, the first by name."""
        highest = np.maximum.reduceat(cells.score, cells.start)
        best = np.flatnonzero(cells.score == highest[cells.document])
        if len(best) > len(highest):
            document, account = cells.document[best].tolist(), cells.account[best].tolist()
            name = [self.names[number] for number in account]
            order = sorted(range(len(best)), key=lambda i: (document[i], name[i]))
            best = best[order][_run_starts(cells.document[best])]
        return best

    def _base_at(self, known: Known, document: np.ndarray, account: np.ndarray) -> np.ndarray:
        """(k,) what the base of each document has for the account."""
        log_counts, log_tokens = self._logs
        base = log_counts[account] - known.lengths[document] * log_tokens[account]
        lines, sizes = self._wide_lines(known)
        owner, at = _ranges((sizes.cumsum() - sizes)[document], sizes[document])
        evidence = self.token_counts.wide_evidence[lines[at], account[owner]]
        return base + np.bincount(owner, evidence, minlength=len(base))

    def learn(
        self,
        documents: Sequence[Sequence[int]],
        labels: Sequence[str],
        weights: Sequence[float] | np.ndarray,
    ) -> None:
        """Adds each document to its account `weight` times; the weight's negative takes it away.

        Weights are multiples of 1 / GRAIN, so the counts are exact: the same in any order and any
        batching, and as if it had never been after learning and unlearning.
        """
        lengths = np.array([len(tokens) for tokens in documents], dtype=np.int64)
        columns = np.array([self.accounts[label] for label in labels], dtype=np.int64)
        weights = np.asarray(weights, dtype=np.float64)
        if len(self.accounts) > len(self.names):
            self.names += islice(self.accounts, len(self.names), None)
            self.account_counts = _grown(self.account_counts, len(self.names))
            self.account_tokens = _grown(self.account_tokens, len(self.names))
            self.token_counts.grow(len(self.names))
        np.add.at(self.account_counts, columns, weights)
        np.add.at(self.account_tokens, columns, weights * lengths)
        self.token_counts.add(_flat(documents), columns.repeat(lengths), weights.repeat(lengths))
        self._take_logs()

    def _take_logs(self) -> None:
        total = self.account_tokens + self.alpha * self.token_counts.occupied
        with np.errstate(divide="ignore"):  # an account wholly unlearned: log 0
            self._logs = _exact(np.log([self.account_counts, total]))

    def state(self) -> Arrays:
        """All that it has counted; arrays that are its own."""
        return {
            "account_names": _packed(self.names),
            "account_counts": self.account_counts,
            "account_tokens": self.account_tokens,
            **self.token_counts.state(),
        }

    def restore(self, state: Arrays) -> None:
        """Takes over what a model had counted."""
        self.names = _unpacked(state["account_names"])
        self.accounts = _numbers({name: number for number, name in enumerate(self.names)})
        self.account_counts = state["account_counts"]
        self.account_tokens = state["account_tokens"]
        self.token_counts.restore(state)
        self._take_logs()


def rounds(n: int) -> list[slice]:
    """How a batch of n is learned: in rounds of at most ROUND, each of which spans all of it.

    Neighbours, often much alike, are in different rounds, so that the second is weighed by a model
    that has learned the first.
    """
    step = -(-n // ROUND)
    return [slice(start, n, step) for start in range(step)]


def _log_ratio(counts: np.ndarray, alpha: float) -> np.ndarray:
    """log (1 + N / alpha), which is 0 for most."""
    return _exact(np.log(1 + counts / alpha))  # log1p is slower, and counts are not so small


def _exact(logs: np.ndarray) -> np.ndarray:
    """Rounded to multiples of 2 ** -40, so that sums of them are exact in any order, too."""
    logs *= 2.0**40
    np.rint(logs, out=logs)
    logs *= 2.0**-40
    return logs


def _flat(documents: Sequence[Sequence[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(documents), dtype=np.int64)


def _numbers(known: Mapping[Hashable, int] = {}) -> defaultdict:
    """Numbers things in the order in which they are first asked for, on from the known ones."""
    return defaultdict(count(max([-1, *known.values()]) + 1).__next__, known)


def _run_starts(values: np.ndarray) -> np.ndarray:
    """Where in sorted values, of which there must be one, another value starts.

    [3, 3, 5, 7, 7] -> [0, 2, 3]
    """
    starts = np.empty(len(values), dtype=bool)
    starts[0] = True
    np.not_equal(values[1:], values[:-1], out=starts[1:])
    return starts.nonzero()[0]


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers in ranges of these sizes from these starts on, each with its range's index.

    starts [5, 8], sizes [2, 1] -> [0, 0, 1], [5, 6, 8]
    """
    owner = np.arange(len(sizes)).repeat(sizes)
    before = sizes.cumsum() - sizes
    return owner, (starts - before)[owner] + np.arange(len(owner))


WIDE = -1  # the size of a wide row


class Counts:
    """A sparse matrix of sums, token by account, that grows with each entry added.

    A token is a 64-bit integer, not 0; an open hash table with triangular probing has its row. Most
    tokens meet one account, an amount meets nearly all. So a row is either narrow: a span of one
    long array, its entries sorted by account, with room for the next power of two, that moves to
    the end when it outgrows that; or wide: a line of a dense matrix, beside which its evidence, the
    log (1 + N / alpha), is kept. An entry is one number: the account in the upper 24 bits, the sum
    in the lower 40, in units of 1 / GRAIN. Entries that become zero are dropped. A row is wide if
    it has more than `narrow` entries, which doubles when too many rows are.
    """

    LOAD = 1 / 2  # of the slots may be taken
    NARROW = 64  # entries that a narrow row may have, as long as there are no more than
    LINES = 256  # wide rows

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.tokens = np.zeros(2, dtype=np.int64)  # in each slot of the table, 0 if it is free
        self.starts = np.zeros(2, dtype=np.int64)  # of its row's span, or which wide row it is
        self.sizes = np.zeros(2, dtype=np.int32)  # of its row: how many entries, or WIDE
        self.entries = np.zeros(0, dtype=np.int64)
        self.wide_counts = np.zeros((0, 0))
        self.wide_evidence = np.zeros((0, 0))
        self.used = 0  # slots that are not free
        self.end = 0  # of the last span
        self.wide = 0  # wide rows
        self.narrow = self.NARROW  # entries that a narrow row may have
        self.occupied = 0  # rows that have an entry

    def state(self) -> Arrays:
        """All sums; arrays that are its own."""
        return {
            "tokens": self.tokens,
            "starts": self.starts,
            "sizes": self.sizes,
            "entries": self.entries[: self.end],
            "wide_counts": self.wide_counts[: self.wide],
            "table": np.array([self.used, self.narrow, self.occupied]),
        }

    def restore(self, state: Arrays) -> None:
        """Takes over all sums of another."""
        self.tokens, self.starts, self.sizes = (state[k] for k in ("tokens", "starts", "sizes"))
        self.entries, self.wide_counts = state["entries"], state["wide_counts"]
        self.end, self.wide = len(self.entries), len(self.wide_counts)
        self.wide_evidence = _log_ratio(self.wide_counts, self.alpha)
        self.used, self.narrow, self.occupied = state["table"].tolist()

    def find(self, tokens: np.ndarray) -> np.ndarray:
        """(m,) the row of each token, or an empty one, of size 0, if the token is not known."""
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

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All entries of the narrow ones of these rows: index into `rows`, account, sum."""
        owner, at = self._spans(rows)
        account, units = _parted(self.entries[at])
        return owner, account, units * (1 / GRAIN)

    def evidence(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As take, but log (1 + N / alpha) for each sum N."""
        owner, account, count = self.take(rows)
        return owner, account, _log_ratio(count, self.alpha)

    def of_document(self, tokens: Iterable[int]) -> tuple[int, list[int], np.ndarray, np.ndarray]:
        """Of a document: how many tokens are known, the lines of wide ones, and of narrow ones all
        accounts, each with its evidence.
        """
        last = len(self.tokens) - 1
        there, sizes, starts = self.tokens.item, self.sizes.item, self.starts.item
        known, lines, spans = 0, [], [self.entries[:0]]
        for token in tokens:
            row, step = token & last, 0
            while there(row) not in (token, 0):
                step += 1
                row = row + step & last
            if size := sizes(row):
                known += 1
                start = starts(row)
                if size == WIDE:
                    lines.append(start)
                else:
                    spans.append(self.entries[start : start + size])
        account, units = _parted(np.concatenate(spans))
        return known, lines, account, _log_ratio(units * (1 / GRAIN), self.alpha)

    def of(self, rows: np.ndarray, accounts: np.ndarray) -> np.ndarray:
        """(k, m) the sums of k accounts in each of m rows."""
        sums = np.zeros((len(accounts), len(rows)))
        owner, account, value = self.take(rows)
        entry, asked = np.nonzero(account[:, np.newaxis] == accounts)
        sums[asked, owner[entry]] = value[entry]
        wide = np.flatnonzero(self.sizes[rows] == WIDE)
        sums[:, wide] = self.wide_counts[self.starts[rows[wide]]][:, accounts].T
        return sums

    def grow(self, accounts: int) -> None:
        """Makes room for so many accounts."""
        lines, columns = self.wide_counts.shape
        if accounts > columns:
            self._grow_wide(lines, 2 * accounts)

    def add(self, tokens: np.ndarray, accounts: np.ndarray, values: np.ndarray) -> None:
        """Adds each value to the sum of its token and account."""
        if not len(tokens):
            return
        rows = self._insert(tokens)
        is_wide = self.sizes[rows] == WIDE
        for add, those in ((self._add_wide, is_wide), (self._add_narrow, ~is_wide)):
            if those.any():
                add(rows[those], accounts[those], values[those])

    def _add_wide(self, rows: np.ndarray, accounts: np.ndarray, values: np.ndarray) -> None:
        lines = self.starts[rows]
        np.add.at(self.wide_counts, (lines, accounts), values)
        sums = self.wide_counts[lines, accounts]
        self.wide_evidence[lines, accounts] = _log_ratio(sums, self.alpha)
        if not sums.all():
            self._make_narrow(np.unique(rows[sums == 0]))

    def _add_narrow(self, rows: np.ndarray, accounts: np.ndarray, values: np.ndarray) -> None:
        # What the touched rows hold and what is new, merged and summed by (row, account).
        touched = np.sort(rows)
        touched = touched[_run_starts(touched)]
        owner, at = self._spans(touched)
        old_accounts, old_units = _parted(self.entries[at])
        cells = np.concatenate([touched[owner] << 24 | old_accounts, rows << 24 | accounts])
        units = np.concatenate([old_units, _in_units(values)])
        order = cells.argsort(kind="stable")
        cells = cells[order]
        first = _run_starts(cells)
        units = np.add.reduceat(units[order], first)
        kept = units.nonzero()[0]
        cells = cells[first[kept]]
        self._fill(touched, touched.searchsorted(cells >> 24), cells & 0xFFFFFF, units[kept])

    def _fill(
        self, rows: np.ndarray, owner: np.ndarray, accounts: np.ndarray, units: np.ndarray
    ) -> None:
        """Puts these entries, in order, into narrow rows, and makes those wide that should be."""
        sizes = np.bincount(owner, minlength=len(rows))
        moved = _room(sizes) > _room(self.sizes[rows])
        room = _room(sizes[moved])
        self._make_room(int(room.sum()))
        self.starts[rows[moved]] = self.end + room.cumsum() - room
        self.end += int(room.sum())
        self.occupied += int(np.count_nonzero(sizes) - np.count_nonzero(self.sizes[rows]))
        self.sizes[rows] = sizes
        _, at = self._spans(rows)
        self.entries[at] = accounts << 40 | units & (1 << 40) - 1
        many = sizes > self.narrow
        if many.any():
            self._make_wide(rows[many])

    def _make_room(self, more: int) -> None:
        """If so many more entries don't fit, moves all spans together, with twice the room."""
        if self.end + more <= len(self.entries):
            return
        rows = np.flatnonzero(self.sizes > 0)
        sizes = self.sizes[rows]
        room = _room(sizes)
        self.end = int(room.sum())
        entries = np.zeros(2 * (self.end + more), dtype=np.int64)
        starts = room.cumsum() - room
        entries[_ranges(starts, sizes)[1]] = self.entries[self._spans(rows)[1]]
        self.entries, self.starts[rows] = entries, starts

    def _spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the narrow rows' entries lie, in order, each with its index into `rows`."""
        return _ranges(self.starts[rows], np.maximum(self.sizes[rows], 0))

    def _make_wide(self, rows: np.ndarray) -> None:
        lines = self.wide + np.arange(len(rows))
        self.wide += len(rows)
        if self.wide > len(self.wide_counts):
            self._grow_wide(2 * self.wide, self.wide_counts.shape[1])
        owner, account, count = self.take(rows)
        self.wide_counts[lines[owner], account] = count
        self.wide_evidence[lines[owner], account] = _log_ratio(count, self.alpha)
        self.starts[rows] = lines
        self.sizes[rows] = WIDE
        if self.wide > self.LINES:
            self._drop_lines()
        while self.wide > self.LINES:
            self.narrow *= 2
            self._make_narrow(np.flatnonzero(self.sizes == WIDE))
            self._drop_lines()

    def _drop_lines(self) -> None:
        """Drops the lines of rows that are not wide any more."""
        rows = np.flatnonzero(self.sizes == WIDE)
        lines = self.starts[rows]
        self.wide_counts, self.wide_evidence = self.wide_counts[lines], self.wide_evidence[lines]
        self.wide = len(rows)
        self.starts[rows] = np.arange(self.wide)

    def _make_narrow(self, rows: np.ndarray) -> None:
        """Makes those of the wide rows narrow that have few enough entries."""
        counts = self.wide_counts[self.starts[rows]]
        few = np.count_nonzero(counts, axis=1) <= self.narrow
        rows, counts = rows[few], counts[few]
        owner, account = counts.nonzero()
        self.sizes[rows] = 0
        self.occupied -= len(rows)
        self._fill(rows, owner, account, _in_units(counts[owner, account]))

    def _grow_wide(self, lines: int, columns: int) -> None:
        self.wide_counts = _grown(self.wide_counts, lines, columns)
        self.wide_evidence = _grown(self.wide_evidence, lines, columns)

    def _insert(self, tokens: np.ndarray) -> np.ndarray:
        """(m,) the row of each token, which has one now."""
        rows = self.find(tokens)
        new = np.flatnonzero(self.tokens[rows] != tokens)
        if self.used + len(new) > self.LOAD * len(self.tokens):
            self._rehash(len(new))
            return self._insert(tokens)
        if len(new):
            self._put(tokens, rows, new)
            self.used += len({*rows[new].tolist()})
        return rows

    def _put(self, tokens: np.ndarray, rows: np.ndarray, new: np.ndarray) -> None:
        """Takes slots for the new ones of the tokens, which changes their rows."""
        while len(new):
            self.tokens[rows[new]] = tokens[new]  # of those that want a slot, one gets it
            new = new[self.tokens[rows[new]] != tokens[new]]
            rows[new] = self.find(tokens[new])

    def _rehash(self, more: int) -> None:
        """Makes room for so many more tokens, and drops those whose rows are empty."""
        live = np.flatnonzero(self.sizes)
        tokens, starts, sizes = self.tokens[live], self.starts[live], self.sizes[live]
        length = 1 << math.ceil((len(live) + more) / self.LOAD).bit_length()
        self.tokens, self.starts = np.zeros((2, length), dtype=np.int64)
        self.sizes = np.zeros(length, dtype=np.int32)
        rows = self.find(tokens)
        self._put(tokens, rows, np.arange(len(tokens)))
        self.starts[rows], self.sizes[rows] = starts, sizes
        self.used = len(live)


def _in_units(sums: np.ndarray) -> np.ndarray:
    return np.rint(sums * GRAIN).astype(np.int64)


def _parted(entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accounts, and sums in units of 1 / GRAIN."""
    return entries >> 40, entries << 24 >> 24


def _room(sizes: np.ndarray) -> np.ndarray:
    """The power of two that holds so many entries: 0 -> 0, 1 -> 1, 2 -> 2, 3 -> 4, 5 -> 8."""
    return np.where(sizes > 0, 1 << np.frexp(sizes - 1.0)[1], 0)


def _grown(values: np.ndarray, *shape: int) -> np.ndarray:
    """A copy of that shape, filled up with zeros."""
    grown = np.zeros(shape, dtype=values.dtype)
    grown[tuple(map(slice, values.shape))] = values
    return grown


# ---------------------------------------------------------------------------------------- Metrics

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)  # of confidence, in a report
CONFUSED = 10  # pairs of accounts, in a report
WINDOW = 1000  # predictions that a point of the learning curve is over


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


class Calibration:
    """What a margin is worth: how often predictions with about as much evidence were right.

    The evidence of a prediction is its margin (log-odds) over the number of its tokens, for Naive
    Bayes takes each token for independent of the others and is the surer the more there are.
    Predictions are counted in bins of evidence. The share that was right is made monotone by
    pooling adjacent violators (Ayer et al., 1955), and each bin's is that of its history and
    DOUBT wrong predictions more. The counts are sums: any order gives the same.
    """

    BINS = 48  # six for each doubling of 1 / 8 + evidence
    RANKS = 20  # suggestions that get a confidence
    DOUBT = 2

    def __init__(self) -> None:
        self._all = np.zeros(self.BINS, dtype=np.int64)  # predictions
        self._right = np.zeros(self.BINS, dtype=np.int64)  # those that were right
        self._ranks = np.zeros(self.RANKS + 1, dtype=np.int64)  # of the others' accounts, 0: beyond
        self._table: np.ndarray | None = None

    def add(self, evidence: Sequence[float], ranks: Sequence[int], times: int = 1) -> None:
        """Counts predictions and the rank of what was booked, 1 if right, 0 if it was unknown.

        With times = -1 it takes them away again.
        """
        bins, ranks = self._bins(evidence), np.asarray(ranks, dtype=np.int64)
        right = ranks == 1
        np.add.at(self._all, bins, times)
        np.add.at(self._right, bins[right], times)
        np.add.at(self._ranks, np.where(ranks <= self.RANKS, ranks, 0)[~right], times)
        self._table = None

    def state(self) -> Arrays:
        """All that it has counted; arrays that are its own."""
        return {"bins": self._all, "bins_right": self._right, "ranks": self._ranks}

    def restore(self, state: Arrays) -> None:
        """Takes over what another had counted."""
        self._all, self._right, self._ranks = (state[k] for k in ("bins", "bins_right", "ranks"))

    def confidence(self, evidence: Sequence[float]) -> np.ndarray:
        """(n, RANKS) the probability that each suggestion is right, best first.

        That of the second and so on is what the first leaves, shared out as the ranks of wrongly
        predicted accounts have been.
        """
        if self._table is None:
            first = self._shares()
            others = self._ranks[2:] / (self._ranks.sum() + self.DOUBT)
            table = np.column_stack([first, np.outer(1 - first, others)])
            self._table = np.minimum.accumulate(table, axis=1)
        return self._table[self._bins(evidence)]

    def _bins(self, evidence: Sequence[float]) -> np.ndarray:
        doublings = np.log2(1 + 8 * np.asarray(evidence, dtype=np.float64))
        return np.minimum(6 * doublings, self.BINS - 1).astype(np.int64)

    def _shares(self) -> np.ndarray:
        """(BINS,) the share that was right, monotone; an empty bin's is that of the one before."""
        blocks: list[tuple[int, int, int]] = []  # right, all and doubt, first bin
        for first in np.flatnonzero(self._all).tolist():
            right, counted = int(self._right[first]), int(self._all[first]) + self.DOUBT
            while blocks and right * blocks[-1][1] <= blocks[-1][0] * counted:
                more_right, more_counted, first = blocks.pop()
                right, counted = right + more_right, counted + more_counted
            blocks.append((right, counted, first))
        shares = np.zeros(self.BINS)
        for right, counted, first in blocks:
            shares[first:] = right / counted
        return shares


class History:
    """A table of all bookings: whose they are, what was predicted, what they were booked to.

    A row's `seq` is larger than that of the row before it. Companies and accounts are numbers;
    `predicted` is -1 where there was no model.
    """

    ROW = np.dtype(
        [
            ("seq", "i8"),
            ("company", "i4"),
            ("booked", "i4"),
            ("predicted", "i4"),
            ("confidence", "f4"),
        ]
    )

    def __init__(self) -> None:
        self.accounts = _numbers()
        self.companies = _numbers()
        self._table = np.zeros(1024, dtype=self.ROW)
        self._end = 0
        self._unpredicted = 0  # rows at most, since some may have been forgotten

    def state(self) -> Arrays:
        """The whole table; arrays that are its own."""
        names = [self.accounts, self.companies, self._unpredicted]
        return {"history": self.rows, "history_names": _packed(names)}

    def restore(self, state: Arrays) -> None:
        """Takes over the table of another."""
        accounts, companies, self._unpredicted = _unpacked(state["history_names"])
        self.accounts, self.companies = _numbers(accounts), _numbers(companies)
        self._table = state["history"]
        self._end = len(self._table)

    @property
    def rows(self) -> np.ndarray:
        """All rows: an array that stays as it is, but for corrections, whatever comes later."""
        return self._table[: self._end]

    def append(self, bookings: Iterable[tuple[int, str, str, str | None, float | None]]) -> None:
        """Adds rows: seq, company, account booked, account predicted, confidence."""
        rows = [
            (
                seq,
                self.companies[company],
                self.accounts[booked],
                -1 if predicted is None else self.accounts[predicted],
                confidence or 0,
            )
            for seq, company, booked, predicted, confidence in bookings
        ]
        end = self._end + len(rows)
        if end > len(self._table):
            self._table = _grown(self._table, 2 * end)
        self._table[self._end : end] = rows
        self._unpredicted += sum(row[3] < 0 for row in rows)
        self._end = end

    def last(self, n: int, company: str | None = None) -> np.ndarray:
        """The last n rows that were predicted, or fewer if there are fewer; of one company."""
        rows = self.rows[-n - self._unpredicted :] if company is None else self.of(company)
        return rows[rows["predicted"] >= 0][-n:]

    def of(self, company: str) -> np.ndarray:
        """All rows of a company."""
        return self.rows[self.rows["company"] == self.companies.get(company, -1)]

    def correct(self, seq: int, account: str) -> None:
        """Books another account in the row of that seq."""
        self._table["booked"][self.rows["seq"].searchsorted(seq)] = self.accounts[account]

    def forget(self, company: str) -> None:
        """Drops all rows of a company."""
        self._table = self.rows[self.rows["company"] != self.companies.pop(company)]
        self._end = len(self._table)


def right(rows: np.ndarray) -> np.ndarray:
    """(n,) which of these rows of a History were predicted right."""
    return rows["booked"] == rows["predicted"]


def figures(rows: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-averaged precision and recall of n > 0 rows of a History."""
    precision, recall = precision_recall(rows["booked"], rows["predicted"])
    return {"accuracy": float(right(rows).mean()), "precision": precision, "recall": recall}


def by_confidence(rows: np.ndarray, levels: Sequence[float]) -> list[dict[str, float | None]]:
    """For each level, the share of n > 0 rows that were at least so sure, and their accuracy."""
    found = []
    for level in levels:
        sure = right(rows[rows["confidence"] >= level])
        accuracy = float(sure.mean()) if len(sure) else None
        found.append({"at_least": level, "share": len(sure) / len(rows), "accuracy": accuracy})
    return found


def report(rows: np.ndarray, accounts: Sequence[str]) -> dict:
    """How good n > 0 predictions were, which accounts they confused, and how good when how sure."""
    wrong = rows[~right(rows)]
    pairs = wrong["booked"].astype(np.int64) << 32 | wrong["predicted"]
    pairs, counts = np.unique(pairs, return_counts=True)
    confused = [
        (-count, accounts[pair >> 32], accounts[pair & 0xFFFFFFFF])
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)
    ]
    return {
        "support": len(rows),
        **figures(rows),
        "confused": [
            {"booked": booked, "predicted": predicted, "count": -count}
            for count, booked, predicted in sorted(confused)[:CONFUSED]
        ],
        "confidence": by_confidence(rows, LEVELS),
    }


def curve(rows: np.ndarray, points: dict[int, dict]) -> Iterator[dict]:
    """The learning curve's points but the last: at most 128, each of the last WINDOW bookings."""
    step = WINDOW // 4
    while len(rows) > 128 * step:
        step *= 2
    for end in range(step, len(rows), step):
        if end not in points:
            window = rows[max(0, end - WINDOW) : end]
            window = window[window["predicted"] >= 0]
            points[end] = {"bookings": end, **figures(window)} if len(window) else {}
        if points[end]:
            yield points[end]


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

    @contextmanager
    def time(self) -> Iterator[None]:
        """Counts how long its body takes."""
        started = time.perf_counter()
        yield
        self.observe(time.perf_counter() - started)

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


# -------------------------------------------------------------------------------------------- Log


PLACE = ("seq", "batch", "left")  # what the log puts before a record
MAX_NAMES = 100_000  # names of batches that are remembered, the last ones: about 30 MB


class LogError(Exception):
    """The log cannot be used; the message says which, where and why."""


class Log:
    """A JSON Lines file of batches of records, owned by one process, that grows at its end.

    A line is a record between its place and its checksum: `seq` counts lines from 0, `batch` names
    the batch (its sender's name for it, or else the seq of its first line), `left` counts it down
    to 0, `crc` is the CRC-32 of the line before it. A batch is in the log once its line with
    `left` 0 is. A record that was removed leaves an empty one in its place.
    """

    def __init__(self, path: Path) -> None:
        """Opens the log or makes it, with its folder. Raises LogError if it cannot be owned."""
        self.path = path
        self.size = 0  # bytes of whole batches
        self.fsyncs = Histogram()  # seconds that each took
        self._starts = array("q")  # the byte at which each line of a whole batch starts
        self._torn = False  # may the file hold bytes beyond them?
        self._named: OrderedDict[str, range] = OrderedDict()  # batch -> its lines
        self._placing = threading.Lock()  # held while lines get their places, or are looked up
        self._rewritten = path.resolve().with_name(f".{path.name}.rewritten")
        try:
            folders = path.absolute().parents
            new = sum(not folder.exists() for folder in folders)
            with suppress(FileExistsError):  # if it is a file, opening says so better
                path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            for folder in folders[: 1 + new]:  # so that new names are on disk, too
                _fsync_folder(folder)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._file), os.stat(path)):
                raise BlockingIOError  # its owner has just put another file in its place
            self._rewritten.unlink(missing_ok=True)  # a crash left it unfinished
        except BlockingIOError:
            os.close(self._file)
            raise LogError(f"{path} is in use by another process") from None
        except OSError as error:
            raise LogError(f"cannot open {path}: {error.strerror}") from None

    def state(self) -> Arrays:
        """Where its lines are."""
        named = [[name, lines.start, lines.stop] for name, lines in self._named.items()]
        return {"line_starts": np.array(self._starts), "named": _packed([self.size, named])}

    def restore(self, state: Arrays) -> None:
        """Takes over where lines are, so that only later ones will be read."""
        self.size, named = _unpacked(state["named"])
        self._starts.frombytes(state["line_starts"].tobytes())
        self._named.update((name, range(start, stop)) for name, start, stop in named)

    def checksum(self, size: int) -> int | None:
        """The CRC-32 of its first bytes, so many; None if there are fewer."""
        crc = 0
        with self._opened() as file:
            while size and (part := file.read(min(size, 1 << 22))):
                crc, size = zlib.crc32(part, crc), size - len(part)
        return None if size else crc

    def __len__(self) -> int:
        """The lines of all whole batches, so that the next one's seq is this."""
        return len(self._starts)

    def read(self) -> Iterator[dict]:
        """The records of all further whole batches; an unfinished one at the end is cut off.

        To be read to its end, once, before the first append. Raises LogError where the log is
        damaged, and leaves the file as it is.
        """
        for found in scan(self.path, self.size, len(self)):
            if isinstance(found, Damage):
                if not found.at_end:
                    raise self.damaged(found)
                logger.warning("%s: cut off from line %d on: %s", self.path, *found[:2])
                self._cut_back()
            else:
                yield from found.records
                self._keep(found.records, found.sizes)

    def append(self, batches: list[tuple[str | None, list[dict]]]) -> list[dict]:
        """Writes batches, named or not, with one fsync: once it returns, they are on disk.

        The answer is all records with their places. Raises OSError if they could not be written;
        then the log is as it was before.
        """
        seq = len(self)
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
        written = [list(map(_line, batch)) for batch in placed]
        try:
            if self._torn:
                self._cut_back()
            self._torn = True
            unwritten = memoryview(b"".join(chain.from_iterable(written)))
            while unwritten:
                unwritten = unwritten[os.write(self._file, unwritten) :]
            with self.fsyncs.time():
                os.fsync(self._file)
            self._torn = False
        except OSError:
            with suppress(OSError):  # else it is cut back before the next append
                self._cut_back()
            raise
        for batch, lines in zip(placed, written, strict=True):
            self._keep(batch, list(map(len, lines)))
        return list(chain.from_iterable(placed))

    def find(self, name: str) -> list[dict] | None:
        """The records of the batch of that name, if it is one of the last MAX_NAMES named ones."""
        return [self.record(seq) for seq in self._named[name]] if name in self._named else None

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

    def remove(self, seqs: Collection[int]) -> None:
        """Writes the log anew, with empty records in these places, and takes it for the old one.

        A crash leaves the old log or the new. Raises OSError if nothing has changed, and LogError
        if it has, but may not be on disk.
        """
        path = self.path.resolve()  # what a symbolic link leads to, not the link, is replaced
        file = os.open(self._rewritten, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(file, stat.S_IMODE(os.fstat(self._file).st_mode))
            starts = array("q")
            size = 0
            with self._opened() as lines, open(file, "wb", closefd=False) as copy:
                for seq, (start, end) in enumerate(pairwise([*self._starts, self.size])):
                    line = lines.read(end - start)
                    if seq in seqs:
                        record = _parse(line)
                        line = _line({key: record[key] for key in PLACE})
                    starts.append(size)
                    size += copy.write(line)
            os.fsync(file)
            if not os.path.samestat(os.fstat(self._file), os.stat(path)):
                raise OSError(errno.ESTALE, "another file is in its place")
            os.replace(self._rewritten, path)
        except BaseException:
            os.close(file)
            self._rewritten.unlink(missing_ok=True)
            raise
        with self._placing:
            os.close(self._file)
            self._file, self._starts, self.size, self._torn = file, starts, size, False
        try:
            _fsync_folder(path.parent)
        except OSError as error:
            raise LogError(f"cannot be sure of {path}: {error.strerror}") from None

    def close(self) -> None:
        """Lets another process own the log."""
        os.close(self._file)

    def damaged(self, damage: "Damage") -> LogError:
        """What to raise when a line makes no sense."""
        return LogError(
            f"{self.path} is damaged, line {damage.line}: {damage.reason}; restore it, or see what "
            f"python bookkeep.py check {self.path} --repair can keep of it"
        )

    def _keep(self, batch: list[dict], sizes: list[int]) -> None:
        """Counts a whole batch that stands behind all others, with the bytes of its lines."""
        if (name := name_of(batch)) is not None:
            self._named[name] = range(len(self), len(self) + len(batch))
            if len(self._named) > MAX_NAMES:
                self._named.popitem(last=False)
        with self._placing:
            for size in sizes:
                self._starts.append(self.size)
                self.size += size

    def _cut_back(self) -> None:
        os.ftruncate(self._file, self.size)
        os.fsync(self._file)
        self._torn = False


class Whole(NamedTuple):
    """A whole batch in a log."""

    records: list[dict]
    line: int  # of the first, from 1
    sizes: list[int]  # bytes of each


class Damage(NamedTuple):
    """What is wrong with a line in a log."""

    line: int  # from 1
    reason: str
    at_end: bool = False  # is it but a batch that a crash left unfinished?


def scan(path: Path, start: int = 0, lines: int = 0) -> Iterator[Whole | Damage]:
    """What is in the log, in order; after a damage, the batches that are surely whole.

    It starts at a byte behind which the whole batches before it have so many lines.
    """
    seq, left, name = lines - 1, 0, None  # of the line before
    batch: list[dict] | None = []  # the lines of an unfinished batch, None if some are missing
    number, first, unreadable = lines, 0, 0
    sizes: list[int] = []
    torn = False
    for (number, line, record), (_, _, after) in pairwise(_lines(path, start, lines)):
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
            batch, first, sizes = [], number, []
        elif missing:
            batch = None
        elif (name, left - 1) != (record["batch"], record["left"]):
            yield Damage(number, "it does not belong to the batch before it")
            batch = None
        seq, left, name = record["seq"], record["left"], record["batch"]
        unreadable = 0
        if batch is not None:
            batch.append(record)
            sizes.append(len(line))
            if left == 0:
                yield Whole(batch, first, sizes)
                batch = []
    if torn or left:
        first = number + (not torn) - len(batch or [])
        yield Damage(first, "the batch is unfinished", at_end=True)


def _lines(
    path: Path, start: int, before: int
) -> Iterator[tuple[int, bytes, dict | ValueError | None]]:
    """The lines, as bytes and as records, or what is wrong with them; and then no line."""
    with open(path, "rb") as lines:
        if start:  # else it may be a pipe
            lines.seek(start)
        for number, line in enumerate(lines, start=before + 1):
            try:
                yield number, line, _parse(line)
            except ValueError as error:
                yield number, line, error
    yield 0, b"", None


def name_of(batch: list[dict]) -> str | None:
    """What the sender of a batch called it, if anything."""
    return batch[0]["batch"] if batch and isinstance(batch[0]["batch"], str) else None


_encode = json.JSONEncoder(ensure_ascii=False).encode


def _line(record: dict) -> bytes:
    text = _encode(record)[:-1].encode()
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


# --------------------------------------------------------------------------------------- Snapshot

FORMAT = 1  # of snapshots


class Snapshot:
    """A file beside a log, with what was made of its first lines, to spare reading them again.

    It counts for nothing unless it is whole and of this format, tokens are made as they were, and
    the log still starts with the very bytes that it was made from.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        path = log.path.resolve()
        self.path = path.with_name(f"{path.name}.snapshot.npz")
        self._unfinished = path.with_name(f".{path.name}.snapshot.npz")
        self.lines = 0  # of the log that it covers

    def save(self, state: Arrays) -> None:
        """Puts the state in the place of an earlier one, in one step, or logs why it cannot."""
        try:
            size, _ = _unpacked(state["named"])
            origin = np.array([size, self.log.checksum(size), *self._version()])
            file = os.open(self._unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(file, "wb") as file:
                np.savez(file, origin=origin, **state)
            # There is no fsync: if it was not on disk at a power failure, the log is.
            os.replace(self._unfinished, self.path)
            self.lines = len(state["line_starts"])
        except Exception as error:  # whatever it is, there is the log
            logger.warning("%s could not be written: %s", self.path, error)
            with suppress(OSError):
                self._unfinished.unlink(missing_ok=True)

    def load(self) -> Arrays | None:
        """The state, or None, with a warning, if there is one that cannot be used."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                state = dict(file)
            size, checksum, *version = state["origin"].tolist()
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever is wrong with it, the log has it all
            reason = f"it is damaged ({error})"
        else:
            if version != self._version():
                reason = "another version made it"
            elif checksum != self.log.checksum(size):
                reason = "it is not of this log as it is"
            else:
                self.lines = len(state["line_starts"])
                return state
        logger.warning("%s is of no use, %s; all of the log is read", self.path, reason)
        return None

    def discard(self) -> None:
        """Removes the file, also one that a crash left unfinished. Raises OSError."""
        self.path.unlink(missing_ok=True)
        self._unfinished.unlink(missing_ok=True)
        self.lines = 0

    def _version(self) -> list[int]:
        return [FORMAT, *tokens(dict.fromkeys(FEATURES, "a b c"))]


# ------------------------------------------------------------------------------------- Bookkeeper

CHUNK = 128  # samples scored or learned at a time: what a prediction may have to wait for
GROUP = 1000  # samples that a group of batches may have, unless it is one batch
BACKLOG = 50_000  # samples that may wait, unless they are one batch
RESTART = "nothing can be booked until the service is started again"
LISTED = 10  # bookings in each list of the overview
UNSAVED = 10_000  # lines of the log that its snapshot may lack; a sixteenth while it grows


class NotReady(Exception):
    """Nothing to answer with yet, or no longer; the message says why."""


class Busy(NotReady):
    """No more can wait; the same can be sent again in a second."""


class NotStored(Exception):
    """The log could not be written: nothing has changed, and the same can be sent again."""


class NotFound(Exception):
    """There is no such booking or company."""


class Conflict(Exception):
    """A batch was sent under the name of another."""


class Batch(NamedTuple):
    """Samples on their way into the log, or another change, and what their sender waits for."""

    done: Future
    name: str | None = None
    samples: Sequence[Sample] = ()
    change: Callable[[], object] | None = None


class Bookkeeper:
    """Books samples into the log and the model, and knows how well it predicted them.

    One writer thread is the only one that changes anything. It takes the batches that wait as one
    group: each in turn is predicted as a whole and then learned, and all are appended to the log
    with one fsync. So no batch is scored by a model that has seen its answers, and all figures are
    the same however batches meet. If they cannot be appended, all of them are unlearned, exactly.
    """

    def __init__(self, log: Log) -> None:
        """Learns all that is in the log. Raises LogError if that is damaged, or OSError."""
        self.log = log
        self._model = NaiveBayes()
        self._calibration = Calibration()
        self._history = History()
        self._corrections: dict[int, list[int]] = {}  # seq of a booking -> of its corrections
        self._curve: dict[int, dict] = {}  # points of the learning curve that will not change
        self._predictions = 0  # that were asked for
        self._changing = threading.Lock()  # held to learn a chunk, and to read what that changes
        self._waiting: deque[Batch] = deque()
        self._arrival = threading.Condition()  # of a batch that waits, or of the end
        self._closed = False
        self._broken = False  # has the model lost step with the log?
        self._started = time.monotonic()
        self._snapshot = Snapshot(log)
        # Lines of the log that the last snapshot was to cover; infinite if there must be none.
        self._saved: float = 0
        self._saving: threading.Thread | None = None
        if state := self._snapshot.load():
            self._restore(state)
        self._read_back()
        self._last_batch = len(log)  # the seq that it starts with; there is none since the start
        self._writer = threading.Thread(target=self._write, name="writer", daemon=True)
        self._writer.start()

    def book(self, samples: list[Sample], name: str | None = None) -> range:
        """The samples' sequence numbers, once they are on disk and learned.

        A batch whose name is known is not booked again: it has the numbers that it got before.
        Raises Conflict if that was another batch, NotStored if the samples could not be written,
        Busy if too many wait, NotReady if the bookkeeper is closed.
        """
        return self._submit(Batch(Future(), name, samples))

    def correct(self, seq: int, account: str) -> str:
        """Books a booking to another account, and says to which it was booked before.

        The old one is unlearned, the new one learned with the weight of its surprise. Metrics keep
        the prediction. Raises NotFound, NotStored, NotReady.
        """
        return self._submit(Batch(Future(), change=partial(self._correct, seq, account)))

    def forget(self, company: str) -> int:
        """Unlearns a company, removes it from the log, and says how many bookings it had.

        Raises NotFound, NotStored, NotReady.
        """
        return self._submit(Batch(Future(), change=partial(self._forget, company)))

    def predict(self, samples: Iterable[Sample]) -> list[str]:
        """The most probable account of each sample. Raises NotReady while there is no model."""
        accounts: list[str] = []
        for documents in _chunks(map(tokens, samples), CHUNK):
            with self._model_at_rest() as model:
                accounts += model.predict(documents)
                self._predictions += len(documents)
        return accounts

    def suggest(self, sample: Sample, top: int) -> list[dict]:
        """The most probable accounts, best first, each with its confidence and its reasons.

        The first is compared with the second, the others are with the first. The log-odds of what
        the sample says, its `reasons`, and the `prior` add up to the `margin`. Raises NotReady.
        """
        document = tokens(sample)
        with self._model_at_rest() as model:
            [scores] = model.scores([document])
            best = model.top(scores, max(top, 2))
            accounts = [model.names[account] for account in best.tolist()]
            terms = model.terms(document, best)
            margin = round(scores[best[0]] - scores[best[1]], 4) if len(best) > 1 else None
            [confidence] = self._calibration.confidence([_evidence(margin, document)])
            self._predictions += 1

        suggestions = []
        for place, account in enumerate(accounts[:top]):
            suggestion = {
                "account": account,
                "confidence": round(confidence[place], 4),
                "over": None,
                "margin": None,
                "prior": None,
                "reasons": [],
            }
            if len(accounts) > 1:
                other = int(place == 0)
                prior, *weights = (terms[place] - terms[other]).tolist()
                suggestion |= {
                    "over": accounts[other],
                    "margin": round(math.fsum([prior, *weights]), 4),
                    "prior": round(prior, 4),
                    "reasons": _reasons(sample, weights),
                }
            suggestions.append(suggestion)
        return suggestions

    def metrics(self, n: int) -> dict[str, float]:
        """Macro precision and recall of the last n (or fewer) predictions. Raises NotReady."""
        rows = self._last(n)
        precision, recall = precision_recall(rows["booked"], rows["predicted"])
        return {"precision": precision, "recall": recall}

    def report(self, n: int, company: str | None = None) -> dict:
        """How good the last n (or fewer) predictions were, and how good when how sure.

        Raises NotFound if there is no such company, NotReady if nothing was predicted.
        """
        return report(self._last(n, company), list(self._history.accounts))

    def overview(self) -> dict:
        """What the page shows: health, the learning curve, confidence, bookings to look at."""
        health = self.health()
        with self._changing:
            rows, recent, points = self._history.rows, self._history.last(10_000), self._curve
        names = list(self._history.accounts)
        last = recent[-WINDOW:]
        overview = {"health": health, "metrics": None, "curve": [], "confidence": []}
        if len(last):
            now = figures(last)
            overview |= {
                "metrics": {name: now[name] for name in ("precision", "recall")},
                "curve": [*curve(rows, points), {"bookings": len(rows), **now}],
                "confidence": by_confidence(recent, [*(step / 20 for step in range(20)), 0.99]),
            }
        wrong = recent[~right(recent)][: -LISTED - 1 : -1]
        unsure = last[::-1][last["confidence"][::-1].argsort(kind="stable")][:LISTED]
        for name, listed in (("wrong", wrong), ("unsure", unsure)):
            overview[name] = [
                {
                    "seq": seq,
                    "company": record["sample"]["CompanyId"],
                    "text": record["sample"]["BankEntryText"],
                    "amount": record["sample"]["BankEntryAmount"],
                    "booked": names[booked],
                    "predicted": names[predicted],
                    "confidence": record["confidence"],
                }
                for seq, _, booked, predicted, _ in listed.tolist()
                if "sample" in (record := self._record(seq))  # not forgotten since
            ]
        return overview

    def health(self) -> dict[str, str | int | float]:
        """How much has been learned, and for how many seconds the service has been up.

        Raises NotReady if the service must be restarted.
        """
        if self._broken:
            raise NotReady(RESTART)
        with self._changing:
            return {
                "status": "ok",
                "samples": len(self._history.rows),
                "lines": len(self.log),
                "accounts": self._model.known,
                "companies": len(self._history.companies),
                "tokens": self._model.token_counts.occupied,
                "uptime": round(time.monotonic() - self._started, 3),
            }

    def gauges(self) -> dict[str, tuple[str, float]]:
        """What an operator watches: what each figure is, and the figure."""
        with self._changing:
            rows = self._history.rows
            last = rows[rows["seq"].searchsorted(self._last_batch) :]
            last = last[last["predicted"] >= 0]
            gauges = {
                "bookings": ("Bookings in the log.", len(rows)),
                "predictions_total": ("Predictions that were asked for.", self._predictions),
                "accounts": ("Accounts in the model.", self._model.known),
                "companies": ("Companies in the model.", len(self._history.companies)),
                "tokens": ("Tokens in the model.", self._model.token_counts.occupied),
                "waiting": ("Samples that wait to be booked.", self._queue()),
                "log_bytes": ("Bytes of the log.", self.log.size),
            }
        if len(last):
            now = figures(last)
            for name in ("precision", "accuracy"):
                gauges[f"last_batch_{name}"] = (f"The last batch's {name}.", now[name])
        return gauges

    def close(self) -> None:
        """Books what is waiting, nothing more, and closes the log."""
        with self._arrival:
            self._closed = True
            self._arrival.notify()
        self._writer.join()
        self._end_saving()
        may_save = not self._broken and self._saved < math.inf
        if may_save and len(self.log) - self._snapshot.lines >= UNSAVED:
            self._snapshot.save(self._state())
        self.log.close()

    def _state(self) -> Arrays:
        """All that was made of the log; arrays that are those at work."""
        parts = (self.log, self._model, self._calibration, self._history)
        corrections = {"corrections": _packed([*self._corrections.items()])}
        return dict(chain(*(part.state().items() for part in parts), corrections.items()))

    def _restore(self, state: Arrays) -> None:
        for part in (self.log, self._model, self._calibration, self._history):
            part.restore(state)
        self._corrections = dict(_unpacked(state["corrections"]))
        self._saved = len(self.log)

    def _save(self) -> None:
        """Saves the state in the background, if it is time to."""
        waiting = self._saving and self._saving.is_alive()
        if waiting or self._broken or len(self.log) - self._saved < max(UNSAVED, self._saved / 16):
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

    @contextmanager
    def _model_at_rest(self) -> Iterator[NaiveBayes]:
        with self._changing:
            if not self._model.known:
                raise NotReady("there is no model yet; send bookings to /sample first")
            yield self._model

    def _last(self, n: int, company: str | None = None) -> np.ndarray:
        with self._changing:
            if company is not None and company not in self._history.companies:
                raise NotFound("there is no booking of this company")
            rows = self._history.last(n, company)
        if not len(rows):
            raise NotReady("nothing has been predicted yet; send bookings to /sample first")
        return rows

    def _queue(self) -> int:
        return sum(len(batch.samples) for batch in self._waiting.copy())

    def _submit(self, batch: Batch) -> object:
        """What the writer made of the batch."""
        with self._arrival:
            if self._closed or self._broken:
                raise NotReady(RESTART)
            if self._waiting and self._queue() + len(batch.samples) > BACKLOG:
                raise Busy("too many bookings are waiting; send this again in a second")
            self._waiting.append(batch)
            self._arrival.notify()
        return batch.done.result()

    def _write(self) -> None:
        """The writer thread: books group after group until there will be no more."""
        while group := self._next_group():
            try:
                if self._broken:
                    raise NotReady(RESTART)
                if group[0].change:
                    group[0].done.set_result(group[0].change())
                else:
                    self._book_group(group)
            except Exception as error:
                if isinstance(error, LogError):
                    logger.error("%s", error)
                    self._broken = True
                    error = NotReady(RESTART)
                elif isinstance(error, OSError):
                    logger.error("%s could not be written: %s", self.log.path, error.strerror)
                    error = NotStored(f"the log could not be written ({error.strerror}); try later")
                for batch in group:
                    if not batch.done.done():
                        batch.done.set_exception(error)
            self._save()

    def _next_group(self) -> list[Batch]:
        with self._arrival:
            self._arrival.wait_for(lambda: self._waiting or self._closed)
            group: list[Batch] = []
            size = 0
            while self._waiting:
                batch = self._waiting[0]
                size += len(batch.samples)
                named = batch.name is not None and batch.name in {other.name for other in group}
                if group and (named or size > GROUP or batch.change or group[0].change):
                    break
                group.append(self._waiting.popleft())
            return group

    def _book_group(self, group: list[Batch]) -> None:
        group = [batch for batch in group if not self._answered_before(batch)]
        if not group:
            return
        learned: list[dict] = []
        try:
            batches = [(batch.name, self._book_in_model(batch.samples, learned)) for batch in group]
            records = self.log.append(batches)
        except BaseException:
            self._learn(learned, times=-1)
            raise
        with self._in_step():
            self._remember(records)
        first = len(self.log) - len(records)
        for batch in group:
            last = first + len(batch.samples)
            if batch.samples:
                self._last_batch = first
            batch.done.set_result(range(first, last))
            first = last

    def _answered_before(self, batch: Batch) -> bool:
        try:
            records = None if batch.name is None else self.log.find(batch.name)
        except (OSError, ValueError) as error:
            batch.done.set_exception(NotStored(f"the log could not be read ({error}); try later"))
            return True
        if records is None:
            return False
        # What was forgotten since is taken to have been the same, and is not booked again.
        if len(records) == len(batch.samples) and all(
            record.get("sample", sample) == sample
            for record, sample in zip(records, batch.samples, strict=True)
        ):
            batch.done.set_result(range(records[0]["seq"], records[-1]["seq"] + 1))
        else:
            batch.done.set_exception(
                Conflict("this Idempotency-Key was used for other bookings; take a new one")
            )
        return True

    def _book_in_model(self, samples: Sequence[Sample], learned: list[dict]) -> list[dict]:
        """Predicts a batch, then learns it, and gives what the log will say of it.

        Adds to `learned` what it has learned, however far it comes.
        """
        documents = [tokens(sample) for sample in samples]
        labels = [sample[TARGET] for sample in samples]
        assessments = self._model.assess(documents, labels)
        predicted = [assessment.predicted for assessment in assessments]
        evidence = list(map(_evidence, [made.margin for made in assessments], documents))
        confidence = self._calibration.confidence(evidence)[:, 0].round(4).tolist()
        records = [
            {
                "sample": sample,
                "predicted": made.predicted,
                "margin": made.margin,
                "confidence": None if made.predicted is None else sure,
                "rank": made.rank,
            }
            for sample, made, sure in zip(samples, assessments, confidence, strict=True)
        ]
        for part in rounds(len(samples)):
            weights = self._model.weigh(documents[part], labels[part], predicted[part])
            for record, weight in zip(records[part], weights.tolist(), strict=True):
                record["weight"] = weight
            self._learn(records[part], documents[part])
            learned += records[part]
        return records

    def _learn(
        self, records: list[dict], documents: list[list[int]] | None = None, times: int = 1
    ) -> None:
        """Learns bookings from what the log says of them; with times = -1 unlearns them."""
        documents = documents or [tokens(record["sample"]) for record in records]
        for chunk in _chunks(zip(records, documents, strict=True), CHUNK):
            labels = [record["sample"][TARGET] for record, _ in chunk]
            weights = [times * record["weight"] for record, _ in chunk]
            with self._in_step(), self._changing:
                self._model.learn([document for _, document in chunk], labels, weights)
                booked = ((record, doc, record["sample"][TARGET]) for record, doc in chunk)
                self._count(booked, times)

    def _remember(self, records: list[dict]) -> None:
        with self._changing:
            self._history.append(
                (
                    record["seq"],
                    record["sample"]["CompanyId"],
                    *(record["sample"][TARGET], record["predicted"], record["confidence"]),
                )
                for record in records
            )

    def _count(self, booked: Iterable[tuple[dict, list[int], str]], times: int = 1) -> None:
        """Takes into account how good the predictions of these (record, document, account) were."""
        evidence, ranks = [], []
        for record, document, account in booked:
            if record["predicted"] is not None:
                evidence.append(_evidence(record["margin"], document))
                ranks.append(_rank(record, account))
        self._calibration.add(evidence, ranks, times)

    def _correct(self, seq: int, account: str) -> str:
        booking = self._booking(seq)
        before, _ = self._standing(booking)
        if account != before:
            document = tokens(booking["sample"])
            [assessment] = self._model.assess([document], [account])
            [weight] = self._model.weigh([document], [account], [assessment.predicted]).tolist()
            correction = {"corrects": seq, TARGET: account, "weight": weight}
            [correction] = self.log.append([(None, [correction])])
            with self._in_step():
                self._apply(correction)
        return before

    def _booking(self, seq: int) -> dict:
        """The record of a booking. Raises NotFound, NotStored."""
        record = self._record(seq) if 0 <= seq < len(self.log) else {}
        if "sample" not in record:
            raise NotFound(f"there is no booking {seq}")
        return record

    def _record(self, seq: int) -> dict:
        try:
            return self.log.record(seq)
        except ValueError as error:
            raise NotStored(f"line {seq + 1} of the log could not be read ({error})") from None

    def _standing(self, booking: dict) -> tuple[str, float]:
        """To which account the booking is booked by now, and with which weight."""
        corrections = self._corrections.get(booking["seq"])
        if corrections is None:
            return booking["sample"][TARGET], booking["weight"]
        last = self._record(corrections[-1])
        return last[TARGET], last["weight"]

    def _apply(self, correction: dict) -> None:
        """Unlearns a booking and learns it as corrected. Raises NotFound."""
        booking = self._booking(correction["corrects"])
        seq, document = booking["seq"], tokens(booking["sample"])
        before, weight = self._standing(booking)
        account = correction[TARGET]
        with self._changing:
            self._model.learn([document] * 2, [before, account], [-weight, correction["weight"]])
            self._count([(booking, document, before)], times=-1)
            self._count([(booking, document, account)])
            self._history.correct(seq, account)
            self._corrections.setdefault(seq, []).append(correction["seq"])
            self._curve = {}

    def _apply_all(self, corrections: Iterable[dict]) -> None:
        for correction in corrections:
            try:
                self._apply(correction)
            except NotFound as error:
                raise self.log.damaged(Damage(correction["seq"] + 1, str(error))) from None

    def _forget(self, company: str) -> int:
        seqs = self._history.of(company)["seq"].tolist()
        if not seqs:
            raise NotFound("there is no booking of this company")
        bookings = [self._booking(seq) for seq in seqs]
        standing = [self._standing(booking) for booking in bookings]
        corrections = chain.from_iterable(self._corrections.get(seq, []) for seq in seqs)
        self._end_saving()
        self._snapshot.discard()
        self.log.remove({*seqs, *corrections})
        self._saved = math.inf  # accounts that only it used keep their names until the next start
        with self._in_step():
            for chunk in _chunks(zip(bookings, standing, strict=True), CHUNK):
                documents = [tokens(booking["sample"]) for booking, _ in chunk]
                accounts = [account for _, (account, _) in chunk]
                with self._changing:
                    self._model.learn(documents, accounts, [-weight for _, (_, weight) in chunk])
                    records = [booking for booking, _ in chunk]
                    self._count(zip(records, documents, accounts, strict=True), times=-1)
            with self._changing:
                self._history.forget(company)
                self._curve = {}
            _digest.cache_clear()
        return len(seqs)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """For what must follow from what the log says: if it fails, only a restart will help."""
        try:
            yield
        except BaseException:
            self._broken = True
            raise

    def _read_back(self) -> None:
        reported = time.monotonic()
        for records in _chunks(self.log.read(), 32 * CHUNK):
            for damage in check_records(records, records[0]["seq"] + 1):
                raise self.log.damaged(damage)
            for keys, alike in groupby(records, dict.keys):
                if "sample" in keys:
                    bookings = list(alike)
                    self._learn(bookings)
                    self._remember(bookings)
                elif "corrects" in keys:
                    self._apply_all(alike)
            if time.monotonic() - reported > 3:
                reported = time.monotonic()
                logger.info("%s: %d lines read back so far", self.log.path, len(self.log))


def check_records(
    records: list[dict], line: int, missing: Collection[int] = ()
) -> Iterator[Damage]:
    """Those of the records from that line on which are none that a bookkeeper writes.

    `missing` are the earlier seqs that are of no booking, as far as they are known.
    """
    for number, record in enumerate(records, start=line):
        if record.keys() == {*PLACE}:
            continue  # it was removed
        try:
            if "corrects" in record:
                check_sample({TARGET: record[TARGET]}, (TARGET,))
                if not 0 <= record["corrects"] < record["seq"] or record["corrects"] in missing:
                    raise ValueError("it corrects no booking before it")
            else:
                check_sample(record["sample"], (*FEATURES, TARGET))
                if not isinstance(record["predicted"], str | None):
                    raise ValueError("predicted is no account")
                if not 0 <= (record["confidence"] or 0) <= 1:
                    raise ValueError("no prediction can have that confidence")
                if not 0 <= (record["margin"] or 0) < math.inf:
                    raise ValueError("no prediction can have that margin")
                if not (record["rank"] or 1) >= 1:
                    raise ValueError("no account can have that rank")
            if not (FLOOR <= record["weight"] <= 1 and record["weight"] * GRAIN % 1 == 0):
                raise ValueError("no booking can have that weight")
        except KeyError as error:
            yield Damage(number, f"{error} is missing")
        except (ValueError, TypeError) as error:
            yield Damage(number, str(error))


def _evidence(margin: float | None, document: list[int]) -> float:
    return (margin or 0) / len(document)


def _rank(record: dict, account: str) -> int:
    """The account's place among what was suggested for the recorded sample, 0 if unknown."""
    if account == record["predicted"]:
        return 1
    return (record["rank"] or 0) if account == record["sample"][TARGET] else 0


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


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


# ------------------------------------------------------------------------------------------- HTTP

MAX_BODY = 64 << 20  # bytes of a request's body
LARGE_BODY = 1 << 20  # bytes from which a body has to wait for its turn
MAX_NUMBER = 999_999_999
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}  # of every answer

JSON_LINES = "application/jsonl"
MAX_SUGGESTED = 300  # suggestions in one answer, each of which is long
OPEN = {"/", "/health"}  # to all, as there is nothing to learn from them

STATUS = {  # of what is raised above
    BadRequest: 400,
    NotFound: 404,
    Conflict: 422,
    NotReady: 503,
    NotStored: 507,
}


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
    not.
    """
    app = Bottle()
    app.install(_in_json)
    app.default_error_handler = _error_in_json
    description = _openapi(max_batch)
    parsing = threading.Lock()  # parsed JSON may take 20 times its bytes, so one at a time
    durations = Histogram()

    @app.hook("before_request")
    def authorize() -> None:
        request.environ["bookkeep.arrival"] = time.perf_counter()
        if request.environ["PATH_INFO"].encode() != request.environ["bottle.raw_path"].encode(
            "latin-1"
        ):
            raise HTTPError(400, "the path must be UTF-8, percent-encoded")
        host = re.sub(":[0-9]*$", "", request.environ.get("HTTP_HOST", "")).lower()
        if hosts is not None and host not in hosts:
            raise HTTPError(403, f"call this service by one of its names: {', '.join(hosts)}")
        if token is None or request.path in OPEN:
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
        route = request.environ.get("bottle.route")
        seconds = time.perf_counter() - request.environ["bookkeep.arrival"]
        durations.observe(seconds, _labels(route and route.rule, response.status_code))

    def received(parse: Callable[[bytes], T]) -> T:
        if request.content_type.partition(";")[0].strip() != "application/json":
            raise HTTPError(415, "send JSON, with the header Content-Type: application/json")
        length = request.content_length
        if length > max_body:
            raise HTTPError(413, f"send at most {max_body} bytes in one request")
        with parsing if length > LARGE_BODY else nullcontext():
            return parse(request.body.read())

    def number(name: str, text: str, least: int, most: int = MAX_NUMBER) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise HTTPError(400, f"{name} must be a whole number from {least} to {most}")
        return int(text)

    @app.post("/sample")
    def sample() -> dict:
        key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
        if key is not None and not re.fullmatch("[ -~]{1,200}", key):
            raise HTTPError(400, "an Idempotency-Key must be 1 to 200 printable ASCII characters")
        stored = bookkeeper.book(received(partial(parse_samples, booked=True, most=max_batch)), key)
        first, last = (stored[0], stored[-1]) if stored else (None, None)
        return {"received": len(stored), "total": stored.stop, "first": first, "last": last}

    @app.post("/predict")
    def predict() -> list[str]:
        return bookkeeper.predict(received(partial(parse_samples, booked=False, most=max_batch)))

    @app.post("/suggest")
    def suggest() -> dict | list[dict]:
        top = number("top", request.query.get("top", "3"), 1, Calibration.RANKS)
        asked = received(parse_json)
        samples = check_samples(asked, False, min(max_batch, MAX_SUGGESTED // top))
        answers = [{"suggestions": bookkeeper.suggest(sample, top)} for sample in samples]
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
        company = request.query.getunicode("company")
        if company is None and "company" in request.query:
            raise HTTPError(400, "company must be UTF-8, percent-encoded")
        return bookkeeper.report(n, company)

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
        return "".join(f"{line}\n" for line in _exposition(bookkeeper, durations))

    @app.get("/overview")
    def overview() -> dict:
        return bookkeeper.overview()

    @app.get("/health")
    def health() -> dict:
        return bookkeeper.health()

    @app.get("/openapi.json")
    def openapi() -> dict:
        return description

    @app.get("/")
    def page() -> str:
        response.content_type = "text/html; charset=utf-8"
        response.set_header("Content-Security-Policy", _page_policy())
        return PAGE

    @app.error(404)
    def not_found(error: HTTPError) -> str:
        if error.body == f"Not found: {request.path!r}":
            error.body = f"there is nothing here; {' '.join(description['paths'])} is all"
        return _error_in_json(error)

    @app.error(405)
    def not_allowed(error: HTTPError) -> str:
        error.body = f"ask for this with {response.get_header('Allow')}, not {request.method}"
        return _error_in_json(error)

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
            for kind, status in STATUS.items():
                if isinstance(error, kind):
                    again = {"Retry-After": "1"} if isinstance(error, Busy) else {}
                    raise HTTPError(status, str(error), **again) from None
            logger.exception("%s %s failed", request.method, request.path)
            raise HTTPError(500, "the service failed to answer; its log says why") from None
        if not isinstance(answer, dict | list):
            return answer
        response.content_type = "application/json"
        return json.dumps(answer)

    return route


@cache
def _labels(rule: str | None, status: int) -> str:
    """Of a request in Prometheus's text format: the path as the API's description has it."""
    path = re.sub("<(.*?)(:.*?)?>", r"{\1}", rule) if rule else "other"
    return f'path="{path}",status="{status}"'


def _exposition(bookkeeper: Bookkeeper, durations: Histogram) -> Iterator[str]:
    """What an operator watches, in Prometheus's text format."""
    for name, (text, value) in bookkeeper.gauges().items():
        kind = "counter" if name.endswith("_total") else "gauge"
        yield f"# HELP bookkeep_{name} {text}"
        yield f"# TYPE bookkeep_{name} {kind}"
        yield f"bookkeep_{name} {value}"
    for name, text, histogram in (
        ("request", "How long requests took, by path and status.", durations),
        ("fsync", "How long the disk took to store batches.", bookkeeper.log.fsyncs),
    ):
        name = f"bookkeep_{name}_duration_seconds"
        yield f"# HELP {name} {text}"
        yield f"# TYPE {name} histogram"
        yield from histogram.exposition(name)


def _error_in_json(error: HTTPError) -> str:
    response.content_type = "application/json"
    return json.dumps({"error": error.body})


def _openapi(max_batch: int) -> dict:
    """The description of this API, in OpenAPI 3.1."""

    def of(kind: str, name: str) -> dict:
        return {"$ref": f"#/components/{kind}/{name}"}

    def answers(schema: dict, *refusals: int, kind: str = "application/json") -> dict:
        success = {"description": "done", "content": {kind: {"schema": schema}}}
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

    def record(properties: dict, others: object = False) -> dict:
        required = list(properties)
        shape = {"type": "object", "required": required, "properties": properties}
        return shape | {"additionalProperties": others}

    text = {"type": "string", "maxLength": MAX_VALUE}
    filled = text | {"minLength": 1}
    features = {
        key: filled | {"maxLength": MAX_NAME if key in NAMES else MAX_VALUE} for key in FEATURES
    }
    count = {"type": "integer", "minimum": 0}
    share = {"type": "number", "minimum": 0, "maximum": 1}
    seq = count | {"maximum": MAX_NUMBER}
    log_odds = {"type": ["number", "null"]}
    maybe_text = {"type": ["string", "null"]}
    place = {"type": ["integer", "null"], "minimum": 0}
    health = dict.fromkeys(("samples", "lines", "accounts", "companies", "tokens"), count)
    reason = record({"token": filled, "kind": {"enum": list(KINDS)}, "weight": {"type": "number"}})
    figures = {"accuracy": share, "precision": share, "recall": share}
    sureness = record(
        {"at_least": share, "share": share, "accuracy": share | {"type": ["number", "null"]}}
    )
    confusion = record({"booked": filled, "predicted": filled, "count": count})
    listed = record(
        {"seq": seq}
        | dict.fromkeys(("company", "text", "amount", "booked", "predicted"), filled)
        | {"confidence": share}
    )
    schemas = {
        "Sample": record(features, text),
        "Booking": record(features | {TARGET: filled}, text),
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
                )
            }
        ),
        "Correction": record({"seq": seq, TARGET: filled}),
        "Corrected": record({"seq": seq, TARGET: filled, "before": filled}),
        "Forgotten": record({"company": filled, "forgotten": count | {"minimum": 1}}),
        "Metrics": record({"precision": share, "recall": share}),
        "Report": record(
            {"support": count | {"minimum": 1}}
            | figures
            | {"confused": a_list(confusion), "confidence": a_list(sureness)}
        ),
        "Overview": record(
            {
                "health": of("schemas", "Health"),
                "metrics": {"anyOf": [of("schemas", "Metrics"), {"type": "null"}]},
                "curve": a_list(record({"bookings": count} | figures)),
                "confidence": a_list(sureness),
                "wrong": a_list(listed),
                "unsure": a_list(listed),
            }
        ),
        "Health": record(
            {"status": {"const": "ok"}} | health | {"uptime": {"type": "number", "minimum": 0}}
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
            [n, parameter("query", "company", filled, "only the predictions for this company")],
            answers(of("schemas", "Report"), 400, 404, 503),
        ),
        "/samples": get(
            "the lines of the log",
            [
                parameter("query", "from", seq | {"default": 0}, "the seq of the first"),
                parameter("query", "limit", seq, "how many, at most; without it, all"),
            ],
            answers({"type": "string"}, 400, kind=JSON_LINES),
        ),
        "/overview": get("what the page shows", [], answers(of("schemas", "Overview"), 503)),
        "/metrics": get(
            "figures for Prometheus", [], answers({"type": "string"}, kind="text/plain")
        ),
        "/health": get("how much has been learned", [], answers(of("schemas", "Health"), 503)),
        "/openapi.json": get("this description", [], answers({"type": "object"})),
        "/": get("the page", [], answers({"type": "string"}, kind="text/html")),
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


# ----------------------------------------------------------------------------------- Command line

SHORT_BODY = 1 << 14  # bytes of a question that is answered without another thread
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
    seconds = time.monotonic() - started
    names = {"localhost", "127.0.0.1", "[::1]", options.host.lower()}
    hosts = None if token or options.open else sorted(names)
    app = create_app(bookkeeper, token, hosts, options.max_body, options.max_batch)
    server = _server(app, listener, options)
    logger.info(
        "serving on http://%s:%d, log %s, %d bookings read back in %.1f s",
        *(f"[{host}]" if ":" in host else host, port),
        *(log.path, bookkeeper.health()["samples"], seconds),
    )
    _answer(server, listener)
    bookkeeper.close()
    logger.info("stopped")


def check(path: Path, repair: bool) -> int:
    """Prints what is wrong with a log, and what a repaired copy leaves out; the exit status."""
    damages = lost_at_end = 0
    missing: set[int] = set()  # seqs before the next one that are of no booking
    due = 0  # the seq that comes next, if none is left out

    def whole_batches() -> Iterator[list[dict]]:
        nonlocal damages, lost_at_end, due
        for found in scan(path):
            if isinstance(found, Damage):
                problems = [found]
            else:
                missing.update(range(due, found.records[0]["seq"]))
                problems = list(check_records(found.records, found.line, missing))
            for problem in problems:
                print(f"{path}, line {problem.line}: {problem.reason}")
            damages += len(problems)
            lost_at_end = len(problems)
            if not problems:
                yield found.records
                missing.update(record["seq"] for record in found.records if "sample" not in record)
                due = found.records[-1]["seq"] + 1

    with open(path, "rb"):  # before anything is made for the sake of a log that is not there
        pass
    if not repair:
        kept = sum("sample" in record for batch in whole_batches() for record in batch)
        print(f"{path}: {kept} bookings in whole batches, {damages or 'no'} problems")
        return int(damages > 0)

    target = path.with_name(f"{path.name}.repaired")
    if target.exists():
        raise LogError(f"{target} is there already; move it away first")
    copy = Log(target)
    kept = 0
    try:
        for batches in _chunks(whole_batches(), 16):
            whole: list[tuple[str | None, list[dict]]] = []
            place = len(copy)
            for records in batches:
                if lost := records[0]["seq"] - place:
                    print(f"left out: seq {place} to {records[0]['seq'] - 1}")
                    whole.append((None, [{}] * lost))
                whole.append((name_of(records), list(map(_content, records))))
                place = records[-1]["seq"] + 1
                kept += sum("sample" in record for record in records)
            copy.append(whole)
    except BaseException:
        target.unlink()  # an unfinished copy must not pass for a finished one
        raise
    if lost_at_end:
        print(f"left out: all from seq {len(copy)} on")
    print(f"{target}: {kept} bookings")
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
        help="write all its whole batches to LOG.repaired, and say what is left out",
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


def _server(app: Bottle, listener: socket.socket, options: argparse.Namespace) -> BaseWSGIServer:
    """A server that listens, but does not answer yet."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    dispatcher = Dispatcher()
    dispatcher.set_thread_count(options.threads)
    server = waitress.create_server(
        app,
        _dispatcher=dispatcher,
        sockets=[listener],
        ident=None,
        # A connection takes a socket, and a file for a body of over 512 KiB.
        connection_limit=1000 if files == resource.RLIM_INFINITY else min(1000, files // 2 - 50),
        asyncore_use_poll=True,
        # The app refuses long bodies, in JSON; waitress refuses what is not worth receiving.
        max_request_body_size=2 * options.max_body + (1 << 20),
    )
    server.channel_class = Channel
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # waiting for a thread is fine
    return server


def _answer(server: BaseWSGIServer, listener: socket.socket) -> None:
    """Answers requests until SIGTERM or Ctrl-C, then those that are under way."""
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
    """A connection of waitress's whose errors are in JSON.

    A short question is answered by the very thread that received it: to hand it to another and
    back takes longer than to answer it.
    """

    error_task_class = JSONErrorTask
    receiver: int | None = None  # the thread that receives, while it does
    short = False  # is there a short question to answer?

    def handle_read(self) -> None:
        """Receives what has arrived."""
        self.receiver = threading.get_ident()
        super().handle_read()
        self.receiver = None
        if self.short:
            self.short = False
            if len(self.requests) == 1:
                self.service()
            else:  # before the next request, it might wait for what only this thread can send
                self.server.add_task(self)


class Dispatcher(ThreadedTaskDispatcher):
    """Threads of waitress's for all requests but short questions."""

    def add_task(self, channel: Channel) -> None:
        """Has the channel's next request answered."""
        request = channel.requests[0]
        if (
            channel.receiver == threading.get_ident()
            and not request.error
            and not request.chunked
            and request.path == "/predict"
            and request.content_length <= SHORT_BODY
        ):
            channel.short = True
        else:
            super().add_task(channel)


# ------------------------------------------------------------------------------------------- Page

PAGE = """<!doctype html>
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
.coverage { display: grid; grid-template-columns: minmax(0, 1fr) 21rem; gap: 1rem 2rem; }

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
#access form { max-width: 20rem; }

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
  #steps th + th, #steps td { padding-left: .4rem; }
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
      predictions before it.</p>
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
    <p class="muted">Over the last 10,000 predictions. The dots are the confidence a suggestion must
      have to be booked unseen: the higher, the fewer but the surer.</p>
  </div>
  <div>
    <p class="none" data-of="confidence">It is too early to say: this takes 100 bookings.</p>
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
      predictions with about as much evidence were right, and lower while there are few.</p>
    <form id="try">
      <label>Company <input name="CompanyId" required autocomplete="off"></label>
      <label>Text <input name="BankEntryText" required autocomplete="off"></label>
      <label>Amount <input name="BankEntryAmount" required autocomplete="off"></label>
      <button type="submit">Suggest an account</button>
    </form>
  </div>
  <div id="suggestions">
    <p id="verdict" role="status">The suggestions appear here, with the reasons for each.</p>
    <p id="weights" class="muted" hidden>A weight above zero speaks for the account, one below zero
      for the account it is compared with. Each 0.7 doubles the odds; the weights add up.</p>
    <ol id="ranking"></ol>
  </div>
</section>

<section class="part" aria-labelledby="wrong-title">
  <div class="lead">
    <h2 id="wrong-title">Latest wrong ones</h2>
    <p class="muted">Booked otherwise than predicted, newest first. They are learned by now: try
      them again.</p>
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
const number = (text) => make('td', { role: 'cell', className: 'number' }, text);

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

let busy = false, pause = PAUSE, timer, seen;

async function refresh() {
  const waiting = !$('access').hidden && sessionStorage.getItem('token') === null;
  if (busy || waiting || document.hidden) return;
  busy = true;
  clearTimeout(timer);
  try {
    show(await call('overview'));
    seen = new Date().toLocaleTimeString('en-GB');
    pause = PAUSE;
    $('access').hidden = true;
    $('state').className = 'good';
    put($('state'), 'Connected');
  } catch (error) {
    pause = Math.min(2 * pause, LONGEST_PAUSE);
    const why = !(error instanceof Refused) ? 'Not reachable'
      : error.cause === 401 ? 'Token needed' : `Not answering: ${error.message}`;
    $('state').className = 'bad';
    put($('state'), seen ? `${why}; last figures from ${seen}` : why);
  }
  busy = false;
  timer = setTimeout(refresh, pause);
}

document.addEventListener('visibilitychange', refresh);

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
    if (!changed(this, points)) return;
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
    this.dot = (name, point) => shape('path', { class: `mark ${name}`, d: MARKS[name],
      transform: `translate(${this.left(point)} ${down(point[name])})` });
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
      } else if (x <= below) {
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
      + `${percent(point.share)} of the bookings, ${percent(point.accuracy)} of them right.`;
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
  const held = body.matches(':hover, :focus-within')
    || selection.type === 'Range' && selection.containsNode(body, true);
  if (body.rows.length && held || !changed(table, items)) return;
  body.replaceChildren(...items.map(row));
}

function step({ at_least: from, share, accuracy }) {
  const wrong = accuracy == null ? '–' : count(Math.round(1000 * share * (1 - accuracy)));
  const row = make('tr', {}, make('th', { scope: 'row' }, percent(from, 0)),
    ...[percent(share), percent(accuracy), wrong].map(number));
  row.dataset.from = from;
  return row;
}

function booking({ seq, company, text, amount, booked, predicted, confidence }) {
  const again = () => {
    const sample = { CompanyId: company, BankEntryText: text, BankEntryAmount: amount };
    for (const [name, what] of Object.entries(sample)) {
      // A field drops line ends, and the words around them would become one.
      $('try').elements[name].value = what.replaceAll(String.fromCharCode(10), ' ');
    }
    $('try').closest('section').scrollIntoView();
    $('try').elements.CompanyId.focus({ preventScroll: true });
    suggest(sample);
  };
  const texts = [company, text, amount, booked, predicted];
  const cells = [...texts.map((what) => cell(clip(value(what)))), number(percent(confidence))];
  cells.forEach((each, index) => { each.dataset.name = COLUMNS[index]; });
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

let asked = 0;

async function suggest(sample) {
  const turn = ++asked;
  let suggestions = [], verdict;
  try {
    ({ suggestions } = await call('suggest?top=5', sample));
    const { account, confidence } = suggestions[0];
    verdict = ['Most likely ', make('b', {}, value(account, 40)),
      `, with ${percent(confidence)} confidence.`];
  } catch (error) {
    const why = error instanceof Refused ? error.message : 'The service is not reachable.';
    verdict = [make('span', { className: 'error' }, why)];
  }
  if (turn !== asked) return;
  $('verdict').replaceChildren(...verdict);
  $('ranking').replaceChildren(...suggestions.map(suggestion));
  $('weights').hidden = suggestions.length < 2;
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
    make('td', {}, clip(value(token, 40), ' ', make('span', { className: 'muted' }, kind))),
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

function show({ health, metrics, curve: points, confidence: all, wrong, unsure }) {
  const confidence = health.samples < ENOUGH ? [] : all;
  for (const name of ['samples', 'accounts', 'companies']) put($(name), count(health[name]));
  const now = { accuracy: points.at(-1)?.accuracy, ...metrics };
  for (const name of SCORES) put($(name), score(now[name]));
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
${bookings.join(`,
`)}]'`;
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
