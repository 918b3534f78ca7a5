"""What a person looks at: how good the service is, and bookings as they stand. It changes nothing.

`report` and `overview` say how good the last predictions were; `bookings` and `booking` give what
is booked, which a person may confirm or correct.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from bookkeep import (
    ALL,
    BOOKED_BY,
    NAME,
    TARGET,
    Access,
    Bookkeeper,
    Books,
    History,
    NotFound,
    checks,
    health,
    last_scored,
    precision_recall,
    right,
    scored,
    unseen,
)

WRONG = 0.02  # the share of what is booked unseen that may be wrong, if nobody says otherwise
MAX_PAGE = 500  # bookings in one answer
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)  # of confidence
RECENT = 10_000  # bookings, the last, that an overview looks at
WINDOW = 1000  # bookings that a point of the learning curve is over
LEAST_SURE = 10_000  # bookings of which the least sure are asked for: the last ones

# ----------------------------------------------------------------------------------- How good it is


def report(
    books: Books,
    n: int,
    company: str | None = None,
    book_from: float | None = None,
    wrong: float = WRONG,
) -> dict[str, object]:
    """How good the last n (or fewer) predictions were, and how good when how sure.

    Also from when on at most so many would be `wrong`, were they booked unseen. Raises NotFound if
    there is no such company, NotReady if nothing was predicted.
    """
    rows = last_scored(books, n, company)
    since = books.history.of(company)
    since = since[since["seq"].searchsorted(rows[0]["seq"]) :]
    levels = {*LEVELS, *([] if book_from is None else [book_from])}
    return {
        "support": len(rows),
        "unseen": unseen(since),
        "checks": checks(rows),
        **figures(rows),
        "confused": confused(rows, [*books.history.accounts]),
        "confidence": by_confidence(rows, sorted(levels)),
        "switch_on": switch_on(rows, wrong),
    }


def overview(keeper: Bookkeeper, company: str | None = None, access: Access = ALL) -> dict:
    """What the page shows: health, the learning curve, confidence.

    The confidence may be of one company, and all else is of those that there is access to. Raises
    NotFound if there is no such company, unless it is that one.
    """
    history = keeper.books.history
    with keeper.books.lock:
        if company != access.company:
            keeper.books.require(company)
        last, recent = history.last(WINDOW, access.company), history.last(RECENT, company)
    return {
        "health": health(keeper, access.company),
        "target": keeper.books.target,
        "context": [*keeper.books.context],
        "company": access.company,
        "may_change": access.may_change,
        "metrics": figures(last) if len(last) else None,
        "curve": [*curve(history.of(access.company))],
        "scored": len(recent),
        "confidence": by_confidence(recent, (0, *LEVELS)) if len(recent) else [],
        "switch_on": switch_on(recent, WRONG) if len(recent) else None,
    }


def curve(rows: np.ndarray) -> Iterator[dict]:
    """The learning curve: at most 129 points, each of the last WINDOW bookings."""
    step = WINDOW // 4
    while len(rows) > 128 * step:
        step *= 2
    for end in (*range(step, len(rows), step), len(rows)):
        window = scored(rows[max(0, end - WINDOW) : end])
        if len(window):
            yield {"bookings": end, **figures(window)}


def figures(rows: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-averaged precision and recall of n > 0 scored rows of a History."""
    precision, recall = precision_recall(rows["booked"], rows["predicted"], rows["score_weight"])
    return {"accuracy": accuracy(rows)[0], "precision": precision, "recall": recall}


def accuracy(rows: np.ndarray) -> tuple[float, float]:
    """The share of n > 0 scored rows that were right, and its standard error.

    That is as if one more row, of those that count most, had been wrong: a few right ones are not
    a certainty.
    """
    weights, hit = rows["score_weight"].astype(np.float64), right(rows)
    share = float(weights @ hit / weights.sum())
    off = weights * (hit - share)
    return share, math.sqrt(off @ off + weights.max() ** 2) / float(weights.sum())


def by_confidence(rows: np.ndarray, levels: Iterable[float]) -> list[dict[str, float | None]]:
    """For each level, what share of n > 0 scored rows was at least so sure, and its accuracy.

    Also the accuracy's standard error, and how many of them are checks, which stand for many.
    """
    found = []
    for level in levels:
        sure = rows[rows["confidence"] >= level]
        share, error = accuracy(sure) if len(sure) else (None, None)
        found.append(
            {
                "at_least": level,
                "share": int(sure["score_weight"].sum()) / int(rows["score_weight"].sum()),
                "accuracy": share,
                "error": error,
                "checks": checks(sure),
            }
        )
    return found


def switch_on(rows: np.ndarray, wrong: float) -> dict[str, float] | None:
    """From which confidence on at most that share of suggestions is wrong, null if nobody can know.

    `share` of n > 0 scored rows is so sure. The levels 0.99, 0.98, ..., 0.5 are tested one after
    the other, from the first with enough rows, as long as a binomial test says with `certainty`
    that no more are wrong: as the first failure ends it, it gets no luckier by trying many. Rows
    that count differently are as good as sum(weights) ** 2 / sum(weights ** 2) others (Kish, 1965).
    """
    found, certainty = None, 0.95
    for level in (np.arange(99, 49, -1) / 100).tolist():
        sure = rows[rows["confidence"] >= level]
        weights = sure["score_weight"].astype(np.float64)
        size = int(weights.sum() ** 2 // max(weights @ weights, 1))
        if (1 - wrong) ** size > 1 - certainty:
            continue  # too few to know, even if all were right
        errors = math.ceil(size * (1 - accuracy(sure)[0]) - 1e-9)
        # The probability of so few errors, or fewer, if this share is wrong.
        i = np.arange(1, errors + 1)
        odds = np.log((size + 1 - i) / i * wrong / (1 - wrong))
        few = np.exp(size * math.log(1 - wrong) + np.append(0, odds.cumsum())).sum()
        if few > 1 - certainty:
            break
        share = float(weights.sum() / rows["score_weight"].sum())
        if not found or share > found["share"]:
            found = {"at_least": level, "share": share, "wrong": wrong, "certainty": certainty}
    return found


def confused(rows: np.ndarray, accounts: Sequence[str], most: int = 10) -> list[dict]:
    """The most frequent errors of scored rows of a History: booked, predicted, how often."""
    wrong = rows[~right(rows)]
    pairs, codes = np.unique(wrong[["booked", "predicted"]], return_inverse=True)
    counts = np.bincount(codes, wrong["score_weight"]).astype(np.int64)
    errors = [
        (-count, accounts[booked], accounts[predicted])
        for (booked, predicted), count in zip(pairs.tolist(), counts.tolist(), strict=True)
    ]
    return [
        {"booked": booked, "predicted": predicted, "count": -count}
        for count, booked, predicted in sorted(errors)[:most]
    ]


# --------------------------------------------------------------------------- Bookings as they stand


def bookings(
    keeper: Bookkeeper, limit: int, company: str | None = None, **asked: object
) -> tuple[list[dict], tuple[float, int] | None]:
    """What `limit` bookings are by now, and where that page ends, as `page` says.

    Raises NotFound if there is no such company, NotStored.
    """
    with keeper.books.lock:
        keeper.books.require(company)
    seqs, end = page(keeper.books.history, limit, company, **asked)
    return standings(keeper, seqs), end


def booking(keeper: Bookkeeper, seq: int) -> dict:
    """What one booking is by now. Raises NotFound, NotStored."""
    for standing in standings(keeper, [seq]):
        return standing
    raise NotFound(f"there is no booking {seq}")


def standings(keeper: Bookkeeper, seqs: Sequence[int] | np.ndarray) -> list[dict]:
    """What bookings are by now, without those that were forgotten meanwhile."""
    history = keeper.books.history
    with keeper.books.lock:
        rows = history.at(np.asarray(seqs, dtype=np.int64))
        corrected = [seq in keeper.books.corrected for seq in rows["seq"].tolist()]
        accounts = [*history.accounts, None]
    called = _account_names(keeper, rows)
    found = []
    for row, anew in zip(rows, corrected, strict=True):
        company, booked, predicted = row[["company", "booked", "predicted"]].item()
        record = keeper.record(row["seq"])
        if "sample" not in record:
            continue
        sample, account = keeper.books.sample(record), accounts[booked]
        booked_by = sample.get(BOOKED_BY, "person")
        # Once a person has looked at what was booked unseen, it is the person's.
        if row["reviewed"] and booked_by == "suggestion":
            booked_by = "person"
            sample = sample | {BOOKED_BY: booked_by}
        target = keeper.books.target
        if sample[target] != account:
            sample = sample | {target: account}
            if target == TARGET:
                sample.pop(NAME, None)  # which is the other account's
        found.append(
            {
                "seq": int(row["seq"]),
                "sample": sample,
                "account": account,
                "name": called.get((company, booked)),
                "predicted": accounts[predicted],
                "predicted_name": called.get((company, predicted)),
                "confidence": record["confidence"],
                "rank": 1 if booked == predicted else int(row["rank"]) or None,
                "reviewed": bool(row["reviewed"]),
                "booked_by": booked_by,
                "corrected": {"from": record["sample"][target]} if anew else None,
            }
        )
    return found


def _account_names(keeper: Bookkeeper, rows: np.ndarray) -> dict[tuple[int, int], str | None]:
    """The latest names that companies gave the accounts booked and predicted in these rows."""
    accounts = np.concatenate([rows["booked"], rows["predicted"]])
    companies = np.tile(rows["company"], 2)[accounts >= 0]
    accounts = accounts[accounts >= 0]
    seqs = last_named(keeper.books.history, companies, accounts).tolist()
    named = {seq: keeper.record(seq).get("sample", {}) for seq in {*seqs} - {-1}}
    names = (named.get(seq, {}).get(NAME) for seq in seqs)
    pairs = zip(companies.tolist(), accounts.tolist(), strict=True)
    return dict(zip(pairs, names, strict=True))


def page(
    history: History,
    limit: int,
    company: str | None = None,
    reviewed: bool | None = None,
    below: float | None = None,
    least_sure: bool = False,
    before: tuple[float, int] | None = None,
) -> tuple[np.ndarray, tuple[float, int] | None]:
    """(k,) seqs of bookings, newest first, or the least sure of the last LEAST_SURE that match.

    They are at most `limit`, and follow the page that ended with this confidence and seq. And
    with which this one ends, None if nothing follows. This looks at all rows, which takes less
    than a millisecond for each column of a million.
    """
    rows = history.rows
    wanted = np.ones(len(rows), dtype=bool)
    if company is not None:
        wanted &= rows["company"] == history.companies.get(company, -1)
    if reviewed is not None:
        wanted &= rows["reviewed"] == reviewed
    if below is not None:
        wanted &= rows["confidence"] < below
    if below is not None or least_sure:
        wanted &= rows["predicted"] >= 0
    sure, last = before or (-1, sys.maxsize)
    if least_sure:
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


def last_named(history: History, companies: np.ndarray, accounts: np.ndarray) -> np.ndarray:
    """(n,) the seqs of the last bookings in which n companies named n accounts, -1 if none."""
    seqs = np.full(len(companies), -1)
    rest, size = history.rows, 1 << 14
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
