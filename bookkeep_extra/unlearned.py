"""What a model would say of bookings that it has learned, had it learned all but the one."""

from collections.abc import Sequence

import numpy as np

import bookkeep
from bookkeep import EVIDENCE, GRAIN, KINDS, ROUND, UNITS, Lesson, NaiveBayes, Scores, ranges

Tokens = Sequence[Sequence[int]]


def doubts(
    model: NaiveBayes, documents: Tokens, labels: Sequence[str], lessons: Sequence[Lesson]
) -> list[tuple[str, float]]:
    """Of each document, what a model says that has learned all but this one.

    That is the most probable account other than its label, and its log-odds over the label, -inf if
    there is no such account or the label is unknown then. `lessons` are what the documents have
    taught.
    """
    made: list[tuple[str, float]] = []
    for start in range(0, len(documents), ROUND):
        part = slice(start, start + ROUND)
        scores = scores_without(model, documents[part], labels[part], lessons[part])
        others, own = scores.score.copy(), np.full(len(scores.start), np.inf)
        own[scores.document[scores.label]] = scores.score[scores.label]
        others[scores.label] = -np.inf
        best = model.best(scores._replace(score=others))
        names = map(model.names.__getitem__, scores.account[best].tolist())
        made += zip(names, (others[best] - own).tolist(), strict=True)
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
        n, accounts = len(lessons), len(model.names)
        _, self.document, self.kind, self.row = self.found = model.look_up(documents)
        token = self.document * len(self.counts.rows.keys) + self.row
        _, of, times = np.unique(token, return_inverse=True, return_counts=True)
        self.times = times[of]  # that a token is in its document, which has taught it so often
        self.weight = np.array([lesson.weight for lesson in lessons])
        self.booked = np.array([model.accounts[lesson.account] for lesson in lessons])
        self.taught = np.zeros((n, accounts, 2), dtype=np.int32)  # units for, and against
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
        self.left = self.counts.sizes(self.row) - np.bincount(token[gone], minlength=len(of))
        self.said = np.bincount(cell >> 1, said, minlength=n * accounts).reshape(n, accounts)
        self.met = np.zeros((n, accounts), dtype=bool)
        self.met.ravel()[np.delete(cell, own[gone]) >> 1] = True
        self.wide = self.counts.is_wide(self.row).nonzero()[0]

    def candidates(self, labels: np.ndarray) -> np.ndarray:
        """(n, A) is it a candidate, or the label and known?"""
        found, each, learned = self.met.copy(), np.arange(len(labels)), self.model.class_counts
        few = self.left[self.wide] <= bookkeep.RARE + 1 + bookkeep.RIVALS
        for i in self.wide[few].tolist():  # which are narrow rows without it, maybe
            sums = self.wide_sums(np.array([i]), np.arange(len(learned)))
            if np.count_nonzero(sums) <= bookkeep.RARE:
                found[self.document[i]] |= sums.any(axis=1)
        alive = np.tile(learned > 0, (len(labels), 1))
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
        of = self.document[self.wide]
        many = np.bincount(document, minlength=len(self.said))[of]
        token, at = self.wide.repeat(many), ranges(document.searchsorted(of), many)
        more = self.counts.asked(self.row[token], account[at])
        own = (self.taught[..., 0] | self.taught[..., 1])[document, account][at].nonzero()[0]
        sums, kind = self.wide_sums(token[own], account[at[own]]), self.kind[token[own], np.newaxis]
        more[own] = self.model.evidence(kind, np.arange(2), sums).sum(axis=1)
        return self.said[document, account] + np.bincount(at, more, minlength=len(account))

    def prior(self, document: np.ndarray, account: np.ndarray) -> np.ndarray:
        """(p,) what classes and their sizes say of these pairs, in units of EVIDENCE."""
        model, n, kinds = self.model, len(self.booked), len(KINDS)

        def lengths_of(counted: np.ndarray) -> np.ndarray:  # (n, 1 + kinds)
            of_kinds = np.bincount(self.document * kinds + self.kind, counted, n * kinds)
            return np.column_stack([np.ones(n), of_kinds.reshape(n, kinds)])

        lengths = lengths_of(self.left > 0)
        lost = np.rint(lengths_of((self.left == 0) / self.times)) * (lengths > 0)
        # The accounts, and behind them each document's own, without what it taught.
        used = np.bincount(account).nonzero()[0]
        taught = self.weight[:, np.newaxis] * lengths_of(self.left >= 0)
        sums = np.vstack([model.sums[used], model.sums[self.booked] - taught])
        prior = np.zeros((n, len(sums)))
        for gone in np.unique(lost):
            logs = model.log_counts(sums, model.smoothing_of(self.counts.occupied - gone))
            with np.errstate(invalid="ignore"):  # 0 times log 0, of what is no candidate
                prior += (lengths * (lost == gone)) @ logs.T
        own = account == self.booked[document]
        return prior[document, np.where(own, len(used) + document, used.searchsorted(account))]
