"""Which bookings look wrong: what others like it, and the model without it, say of each.

For a booking, ask a model that has learned all others for the most probable other account, and its
log-odds over the account that it is booked to. Look at the company's other bookings with the same
first two words (t of them, x on the other account), and with the same sum; and at how many of the
account's other bookings the model would have booked elsewhere, too (u of n). Then

    log-odds of an error = -7.3 + 1.05 sqrt(max(0, log-odds)) - [any others]
                           + 0.6 (d(words) + d(sum) - log((u + 1/2) / (n + 1)))
    d = log((x + 1/2) / (t - x + 1/2))

The four numbers were fitted, by logistic regression, to three real sets with 1 % wrong accounts, half
of them drawn from the company's own bookings, half from the model's next likeliest. So the odds are
for 1 % of errors. They are multiplied by (changed + 5) / (expected + 5): of what persons had booked
and looked at again, how many they changed, and how many this had expected.
"""

import csv
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bookkeep import (
    FEATURES,
    KIND_SHIFT,
    KINDS,
    PLACE,
    ROUND,
    TARGET,
    Batch,
    Bookkeeper,
    Books,
    Damage,
    Sample,
    chunks,
    features_of,
    otherwise,
    scan,
    score_weight,
    standings,
)
from bookkeep_extra.files import guarded

COUNTS = ("Others", "OnAccount", "OnLikely")
RECENT = 10_000  # bookings, the last, that are looked at
LEAST = 0.05  # the probability from which on a booking is shown
LOOKED = 5  # bookings that were looked at, and were as expected, to start with
LIKE = {  # what others have in common with a booking, from most to least
    "text": KINDS.index("whole text"),
    "first two words": KINDS.index("first two words in this company"),
    "sum": KINDS.index("sum in this company"),
}


class Doubt(NamedTuple):
    """What there is to say against a booking."""

    seq: int
    sample: Sample  # as it was sent
    account: str  # that it was booked to
    now: str  # that it is booked to
    likely: str  # the most probable other one
    margin: float  # its log-odds, 0 if nothing else is booked to the account
    is_open: bool  # has a person booked it, and nobody looked at it again?
    is_seen: bool  # has a person booked it, and somebody looked at it again?
    like: dict[str, tuple]  # of LIKE, what others must have


class Suspect(NamedTuple):
    """A booking that looks wrong."""

    seq: int
    sample: Sample
    account: str
    likely: str
    probability: float  # that it is wrong
    like: str | None  # what `others` have in common with it, of LIKE
    others: int  # of the company's bookings
    on_account: int  # of these
    on_likely: int


def find(books: Books, records: Iterable[dict]) -> list[Suspect]:
    """Those of these bookings that are suspects, the most probable first; of equals, the newest.

    The others are only compared with these. Raises NotReady if nothing is learned.
    """
    doubts = [doubt for chunk in chunks(records, ROUND) for doubt in _doubts(books, chunk)]
    sizes: Counter[tuple] = Counter()  # of bookings with the same in common, on an account and all
    learned: Counter[tuple] = Counter()  # by company and account
    odd: Counter[tuple] = Counter()  # those of them that the model would have booked elsewhere
    for doubt in doubts:
        whose = doubt.sample["CompanyId"], doubt.now
        learned[whose] += 1
        odd[whose] += doubt.margin > 0 and doubt.account == doubt.now
        for key in doubt.like.values():
            sizes[key] += 1
            sizes[key, doubt.now] += 1
    weighed = []
    expected = changed = LOOKED
    for doubt in doubts:
        stays, moved = doubt.account == doubt.now, doubt.likely == doubt.now
        whose = doubt.sample["CompanyId"], doubt.account
        n, u = learned[whose] - stays, odd[whose] - (stays and doubt.margin > 0)
        like = {
            name: (
                sizes[key] - 1,
                sizes[key, doubt.account] - stays,
                sizes[key, doubt.likely] - moved,
            )
            for name, key in doubt.like.items()
            if sizes[key] > 1
        }
        log_odds = 1.05 * math.sqrt(max(0, doubt.margin)) - 7.3 - bool(like)
        log_odds -= 0.6 * math.log((u + 0.5) / (n + 1))
        for name in {"first two words", "sum"} & {*like}:
            others, _, on_likely = like[name]
            log_odds += 0.6 * math.log((on_likely + 0.5) / (others - on_likely + 0.5))
        odds = math.exp(log_odds)
        if doubt.is_seen:
            expected += odds / (1 + odds)
            changed += not stays
        elif doubt.is_open:
            weighed.append((odds, doubt, next(iter(like.items()), (None, (0, 0, 0)))))
    found = []
    for odds, doubt, (name, counts) in weighed:
        odds *= changed / expected
        probability = round(odds / (1 + odds), 4)
        if probability >= LEAST:
            seen = doubt.seq, doubt.sample, doubt.account, doubt.likely
            found.append(Suspect(*seen, probability, name, *counts))
    return sorted(found, key=lambda each: (-each.probability, -each.seq))


def _doubts(books: Books, records: Sequence[dict]) -> Iterator[Doubt]:
    """What there is to say against those of these bookings that are learned."""
    documents = [books.tokens(record["sample"]) for record in records]
    with books.at_rest() as model:
        if model.n_classes < 2:
            return
        there = {*books.history.at(np.array([record["seq"] for record in records]))["seq"].tolist()}
        learned = [
            (record, document, lesson)
            for record, document in zip(records, documents, strict=True)
            if record["seq"] in there and (lesson := books.lesson(record)).weight
        ]
        looked = {record["seq"] for record, *_ in learned} & {*books.corrected}
        labels = [record["sample"][books.target] for record, *_ in learned]
        each, documents, lessons = (
            map(list, zip(*learned, strict=True)) if learned else ([], [], [])
        )
        made = model.doubt(documents, labels, lessons)
    for record, document, account, lesson, (likely, margin) in zip(
        each, documents, labels, lessons, made, strict=True
    ):
        seq, sample = record["seq"], record["sample"]
        by_kind = {token >> KIND_SHIFT: token for token in reversed(document)}
        company = sample["CompanyId"]
        like = {name: (company, by_kind[k]) for name, k in LIKE.items() if k in by_kind}
        persons, seen = score_weight(sample) > 0, seq in looked
        is_open = persons and not seen and likely is not None
        yield Doubt(
            *(seq, sample, account, lesson.account, likely, margin),
            is_open=is_open,
            is_seen=persons and seen,
            like=like,
        )


def suspects(
    keeper: Bookkeeper,
    limit: int,
    company: str | None = None,
    before: tuple[float, int] | None = None,
) -> tuple[list[dict], tuple[float, int] | None]:
    """At most so many suspects as they stand, among the last RECENT bookings, of a company or all.

    They follow the page that ended with this probability and seq; and with which this one ends,
    None if nothing follows. Raises NotFound, NotReady, NotStored.
    """
    books = keeper.books
    with books.lock:
        books.require(company)
        seqs = books.history.of(company)["seq"][-RECENT:].tolist()
    records = (keeper.record(seq) for seq in seqs)
    found = find(books, (record for record in records if "sample" in record))
    most, last = before or (1, sys.maxsize)
    rest = [each for each in found if (-each.probability, -each.seq) > (-most, -last)]
    page = {each.seq: each for each in rest[:limit]}
    made = [
        standing
        | {"likely": each.likely, "probability": each.probability, "like": each.like}
        | {"others": each.others, "on_account": each.on_account, "on_likely": each.on_likely}
        for standing in standings(keeper, [*page])
        for each in [page[standing["seq"]]]
    ]
    end = rest[limit - 1] if len(rest) > limit else None
    return made, end and (end.probability, end.seq)


def print_suspects(path: Path) -> int:
    """Prints the suspects of a log as CSV; the exit status. Raises LogError, OSError."""
    bookings: dict[int, dict] = {}
    books = None
    for batch in scan(path):
        if not isinstance(batch, Batch):
            raise batch.error(path)
        for line, record in enumerate(batch.records, batch.line):
            if len(record) <= len(PLACE):
                continue
            features = features_of(record)
            books = books or Books(features.get("context", ()), features.get("target", TARGET))
            if reason := otherwise(record, books.features):
                raise Damage(line, reason, otherwise=True).error(path)
            if "sample" in record:
                bookings[record["seq"]] = record
        if books:
            books.apply(batch.records, lambda record: bookings[record["corrects"]])
    rows = csv.writer(sys.stdout, quoting=csv.QUOTE_ALL, lineterminator="\n")
    target = books.target if books else TARGET
    rows.writerow(["Probability", "Seq", *FEATURES, target, "Likely", "Like", *COUNTS])
    for each in find(books, bookings.values()) if books else ():
        texts = [*(each.sample[key] for key in FEATURES), each.account, each.likely]
        counts = each.others, each.on_account, each.on_likely
        rows.writerow([each.probability, each.seq, *map(guarded, texts), each.like, *counts])
    return 0
