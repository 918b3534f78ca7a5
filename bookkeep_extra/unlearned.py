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
    counts, accounts, n = model.token_counts, len(model.names), len(documents)
    number = model.accounts.__getitem__
    _, document, kind, row = found = model.look_up(documents)
    # A token that occurs twice in a document was learned twice.
    _, once, of, times = np.unique(
        document * len(counts.rows.keys) + row,
        return_index=True,
        return_inverse=True,
        return_counts=True,
    )
    times = times[of]

    # What each document taught: cells of a document and a column, in order, and their units.
    booked = np.array([number(lesson.account) for lesson in lessons])
    weight = np.array([lesson.weight for lesson in lessons])
    taught = {(i, 2 * booked[i]): round(GRAIN * weight[i]) for i in range(n)}
    taught |= {(i, 2 * number(rival) + 1): GRAIN for i in range(n) for rival in lessons[i].against}
    cells = sorted(taught)
    units_taught = np.array([taught[cell] for cell in cells])
    of_document, columns_taught = np.array(cells).T
    cells = of_document * 2 * accounts + columns_taught

    def without(token: np.ndarray, column: np.ndarray, units: np.ndarray) -> np.ndarray:
        """What is left of sums of these tokens in these columns."""
        cell = document[token] * 2 * accounts + column
        at = np.minimum(cells.searchsorted(cell), len(cells) - 1)
        return units - np.where(cells[at] == cell, units_taught[at], 0) * times[token]

    # What narrow rows are left with.
    sizes, at = counts.spans(row)
    token = np.arange(len(row)).repeat(sizes)
    column = counts.entries[at] >> 40
    units = without(token, column, counts.entries[at] & UNITS)
    left = counts.sizes(row) - np.bincount(token[units == 0], minlength=len(row))
    there = units > 0
    token, column, units = token[there], column[there], units[there]
    said = model.evidence(kind[token], column & 1, units)

    # How many sums wide rows are left with. If these are few, their accounts are candidates, too.
    wide = counts.is_wide(row).nonzero()[0]
    own, which = (document[wide][:, np.newaxis] == of_document).nonzero()
    column_own = columns_taught[which]
    had = counts.units(row[wide[own]], column_own >> 1)[np.arange(len(own)), column_own & 1]
    gone = without(wide[own], column_own, had) == 0
    np.subtract.at(left, wide[own[gone]], 1)

    # The candidates, but no account that has learned nothing else; and the labels.
    each = np.arange(n)
    alive = np.tile(model.class_counts > 0, (n, 1))
    alive[each, booked] &= model.class_counts[booked] != weight
    there = np.zeros((n, accounts), dtype=bool)
    there[document[token], column >> 1] = True
    for i in wide[left[wide] <= bookkeep.RARE].tolist():
        sums = counts.units(row[i], np.arange(accounts))
        sums = without(np.full(2 * accounts, i), np.arange(2 * accounts), sums.ravel())
        there[document[i]] |= sums.reshape(-1, 2).any(axis=1)
    there &= alive
    there[~there.any(axis=1)] = True
    there &= alive
    label = np.array([model.accounts.get(label, -1) for label in labels])
    there[each, label] |= alive[each, label] & (label >= 0)
    of, account = there.nonzero()
    place = np.full((n, accounts), -1)
    place[of, account] = np.arange(len(of))

    # What narrow rows say of them, and wide rows.
    at = place[document[token], column >> 1]
    score = np.bincount(at[at >= 0], said[at >= 0], minlength=len(of))
    many = there.sum(axis=1)[document[wide]]
    first = of.searchsorted(document[wide])  # of the pairs of its document
    asked, at = wide.repeat(many), ranges(first, many)
    units = counts.units(row[asked], account[at])
    for side in (0, 1):
        kept = without(asked, 2 * account[at] + side, units[:, side])
        score += np.bincount(at, model.evidence(kind[asked], side, kept), minlength=len(of))

    # The prior and the normalisers: without what it taught, and without tokens unknown then.
    known, kinds = left > 0, len(KINDS)

    def by_kind(some: np.ndarray) -> np.ndarray:
        cell = document[some] * kinds + kind[some]
        return np.bincount(cell, minlength=n * kinds).reshape(n, kinds)

    lengths = np.column_stack([np.ones(n), by_kind(known)])
    lost = by_kind(once[~known[once]])
    smoothing = model.smoothing_of(counts.occupied - lost)
    sums = model.sums.take(account, axis=0)
    at = place[each, booked]
    all_of_them = np.column_stack([np.ones(n), by_kind(np.arange(len(row)))])
    sums[at[at >= 0]] -= (weight[:, np.newaxis] * all_of_them)[at >= 0]
    logs = model.log_counts(sums, smoothing[of])
    score += np.einsum("pk,pk->p", logs, lengths.take(of, axis=0))
    labelled = (account == label[of]).nonzero()[0]
    return Scores(of, account, score * EVIDENCE, of.searchsorted(each), labelled, label[:0], found)
