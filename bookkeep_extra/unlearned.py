"""What a model would say of bookings that it has learned, had it learned all but the one."""

from collections.abc import Sequence

import numpy as np

import bookkeep
from bookkeep import EVIDENCE, GRAIN, KINDS, ROUND, UNITS, Lesson, NaiveBayes, Scores, ranges

Tokens = Sequence[Sequence[int]]


def doubts(
    model: NaiveBayes, documents: Tokens, labels: Sequence[str], lessons: Sequence[Lesson]
) -> list[tuple[str | None, float]]:
    """Of each document, what a model says that has learned all but this one.

    That is the most probable account other than its label, None if no other is a candidate, and its
    log-odds over the label, 0 if the label is unknown then. `lessons` are what the documents have
    taught.
    """
    made: list[tuple[str | None, float]] = []
    for start in range(0, len(documents), ROUND):
        part = slice(start, start + ROUND)
        scores = scores_without(model, documents[part], labels[part], lessons[part])
        others, own = scores.score.copy(), np.full(len(scores.start), np.nan)
        own[scores.document[scores.label]] = scores.score[scores.label]
        others[scores.label] = -np.inf
        best = model.best(scores._replace(score=others))
        margins = np.nan_to_num(others[best] - own).tolist()
        for pair, margin in zip(best, margins, strict=True):
            alone = others[pair] == -np.inf
            made.append((None, 0.0) if alone else (model.names[scores.account[pair]], margin))
    return made


def scores_without(
    model: NaiveBayes, documents: Tokens, labels: Sequence[str], lessons: Sequence[Lesson]
) -> Scores:
    """The scores of all candidates and labels; which labels are no candidates, it does not say.

    They are, bit for bit, those of `joint_log_likelihood` after the one document is unlearned.
    """
    rest = Unlearned(model, documents, lessons)
    numbers = np.array([model.accounts.get(label, -1) for label in labels])
    document, account = rest.candidates(numbers).nonzero()
    score = rest.evidence(document, account) + rest.prior(document, account)
    start = document.searchsorted(np.arange(len(labels)))
    label = (account == numbers[document]).nonzero()[0]
    return Scores(document, account, score * EVIDENCE, start, label, label[:0], rest.found)


class Unlearned:
    """A model, as each of n documents finds it that has taught it: without what this one taught.

    Nothing is changed: it is taken out of the sums that are read.
    """

    def __init__(self, model: NaiveBayes, documents: Tokens, lessons: Sequence[Lesson]) -> None:
        self.model, self.counts = model, model.token_counts
        self.shape = n, accounts = len(lessons), len(model.names)
        _, self.document, self.kind, self.row = self.found = model.look_up(documents)
        self.wide = self.counts.is_wide(self.row).nonzero()[0]
        token = self.document * len(self.counts.rows.keys) + self.row
        _, of, times = np.unique(token, return_inverse=True, return_counts=True)
        self.times = times[of]  # that each token is in its document, and was learned
        self.weight = np.array([lesson.weight for lesson in lessons])
        self.booked = np.array([model.accounts[lesson.account] for lesson in lessons])
        self.taught = np.zeros((n, accounts, 2), dtype=np.int64)  # units for, and against
        self.taught[np.arange(n), self.booked, 0] = np.rint(GRAIN * self.weight)
        for i, lesson in enumerate(lessons):
            self.taught[i, [model.accounts[rival] for rival in lesson.against], 1] = GRAIN

        # Most sums in narrow rows say what they said; of what was taught, there is less, or none.
        sizes, at = self.counts.spans(self.row)
        token = np.arange(len(of)).repeat(sizes)
        cell = self.document.take(token) * (2 * accounts) + (self.counts.entries.take(at) >> 40)
        said, taught = self.counts.evidence.take(at), self.taught.take(cell)
        own = taught.nonzero()[0]
        token, units = token[own], self.counts.entries[at[own]] & UNITS
        units -= taught[own] * self.times[token]
        said[own] = model.evidence(self.kind[token], cell[own] & 1, units)
        gone = units == 0
        self.pair, self.said = np.delete(cell >> 1, own[gone]), np.delete(said, own[gone])
        self.left = self.counts.sizes(self.row) - np.bincount(token[gone], minlength=len(of))

    def candidates(self, labels: np.ndarray) -> np.ndarray:
        """(n, A) is it a candidate, or the label and known?"""
        n, accounts = self.shape
        found = np.zeros(n * accounts, dtype=bool)
        found[self.pair] = True
        found = found.reshape(self.shape)
        few = self.left[self.wide] <= bookkeep.RARE + 1 + bookkeep.RIVALS
        for i in self.wide[few].tolist():  # which are narrow rows without it, maybe
            sums = self.wide_sums(np.array([i]), np.arange(accounts))
            if np.count_nonzero(sums) <= bookkeep.RARE:
                found[self.document[i]] |= sums.any(axis=1)
        each, learned = np.arange(n), self.model.class_counts
        alive = np.tile(learned > 0, (n, 1))
        alive[each, self.booked] = learned[self.booked] > self.weight
        found &= alive
        found |= alive & ~found.any(axis=1, keepdims=True)
        found[each, labels] |= alive[each, labels] & (labels >= 0)
        return found

    def wide_sums(self, token: np.ndarray, account: np.ndarray) -> np.ndarray:
        """(k, 2) what k tokens of wide rows are left with, for accounts and against."""
        taught = self.taught[self.document[token], account] * self.times[token, np.newaxis]
        return self.counts.units(self.row[token], account) - taught

    def evidence(self, document: np.ndarray, account: np.ndarray) -> np.ndarray:
        """(p,) what the tokens say of these pairs, in units of EVIDENCE."""
        n, accounts = self.shape
        said = np.bincount(self.pair, self.said, minlength=n * accounts)
        of = self.document[self.wide]
        many = np.bincount(document, minlength=n)[of]
        token, at = self.wide.repeat(many), ranges(document.searchsorted(of), many)
        more = self.counts.asked(self.row[token], account[at])
        own = (self.taught[..., 0] | self.taught[..., 1])[document, account][at].nonzero()[0]
        sums, kind = self.wide_sums(token[own], account[at[own]]), self.kind[token[own], np.newaxis]
        more[own] = self.model.evidence(kind, np.arange(2), sums).sum(axis=1)
        return said[document * accounts + account] + np.bincount(at, more, minlength=len(account))

    def prior(self, document: np.ndarray, account: np.ndarray) -> np.ndarray:
        """(p,) what classes and their sizes say of these pairs, in units of EVIDENCE."""
        lengths, model = self.lengths(self.left > 0), self.model
        lost = np.rint(self.lengths((self.left == 0) / self.times)) * (lengths > 0)
        used = np.bincount(account).nonzero()[0]
        prior = np.zeros((len(lengths), len(used)))
        for gone in np.unique(lost):
            smoothing = model.smoothing_of(self.counts.occupied - gone)
            logs = model.log_counts(model.sums[used], smoothing)
            prior += (lengths * (lost == gone)) @ logs.T
        prior = prior[document, used.searchsorted(account)]
        own = (account == self.booked[document]).nonzero()[0]
        of = document[own]
        taught = self.weight[:, np.newaxis] * self.lengths(self.left >= 0)
        smoothing = model.smoothing_of(self.counts.occupied - lost[of, 1:])
        logs = model.log_counts(model.sums[account[own]] - taught[of], smoothing)
        prior[own] = np.einsum("pk,pk->p", logs, lengths[of])
        return prior

    def lengths(self, counted: np.ndarray) -> np.ndarray:
        """(n, 1 + kinds) 1, and what a document's tokens of each kind count."""
        n, kinds = self.shape[0], len(KINDS)
        cell = self.document * kinds + self.kind
        of_kinds = np.bincount(cell, counted, minlength=n * kinds).reshape(n, kinds)
        return np.column_stack([np.ones(n), of_kinds])
