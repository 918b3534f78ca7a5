"""Which bookings look wrong: what others like it, and the model without it, say of each.

Of a booking, a model that has learned all others says which other account is the most probable, and
its log-odds over the account that it is booked to. Of the company's other bookings with the same
first two words, and of those with the same sum, there are t, of which x are on that other account,
o on the booking's own. Of the n others on its own, the model would have booked u elsewhere. Then

    log-odds of an error = -7.2 + sqrt(max(0, log-odds)) - 0.8 [are there any others like it?]
                           + 0.6 (d(first two words) + d(sum) - log((u + 1/2) / (n + 1)))
    d = log((x + 1/2) / (t - x + o + 1/2)), 0 if there are none

The numbers were fitted, by logistic regression, to three real sets with 1 % wrong accounts: in one
half drawn from the company's own bookings, in the other from the model's next likeliest. So these
odds are for 1 % of errors. They are multiplied by (changed + 5) / (expected + 5): of what persons
had booked and looked at again, how many they changed, and how many were expected.
"""

import csv
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bookkeep import (
    FEATURES,
    KIND_SHIFT,
    KINDS,
    PLACE,
    ROUND,
    Bookkeeper,
    Books,
    Damage,
    Sample,
    books_for,
    chunks,
    features_of,
    require_features,
    scan,
    score_weight,
)
from bookkeep_extra.files import guarded
from bookkeep_extra.unlearned import doubts
from bookkeep_extra.views import standings

RECENT = 10_000  # bookings, the last, that an answer looks at
LEAST = 0.05  # the probability from which on a booking is shown
LOOKED = 5  # bookings that persons looked at, as expected, to start with
ALL = ""  # in place of an account: all
LIKE = {  # what others may have in common with a booking, from most to least
    "text": KINDS.index("whole text"),
    "first two words": KINDS.index("first two words in this company"),
    "sum": KINDS.index("sum in this company"),
}


class Suspect(NamedTuple):
    """A booking that looks wrong."""

    seq: int
    sample: Sample
    account: str
    likely: str  # the most probable other one
    probability: float  # that it is wrong
    like: str | None  # what the company's others have in common with it, of LIKE
    alike: int  # of the company's other bookings
    on_account: int  # of these
    on_likely: int


class Doubt(NamedTuple):
    """What the model says against a booking."""

    seq: int
    sample: Sample
    account: str  # that it was booked to first
    now: str  # that it is booked to
    is_looked_at: bool  # has a person corrected or confirmed it?
    likely: str | None
    margin: float  # the log-odds of that
    keys: dict[str, tuple]  # what others like it have, too, by LIKE


def find(books: Books, records: Iterable[dict]) -> list[Suspect]:
    """Those of these bookings that are suspects, the most probable first; of equals, the newest.

    Each is compared with the others of these. Raises NotReady if nothing is learned.
    """
    found = chain.from_iterable(_find(own, some) for own, some in books.apart(records))
    return sorted(found, key=lambda each: (-each.probability, -each.seq))


def _find(books: Books, records: Iterable[dict]) -> Iterator[Suspect]:
    asked = [doubt for chunk in chunks(records, 4 * ROUND) for doubt in _doubts(books, chunk)]
    groups: defaultdict[object, Counter] = defaultdict(Counter)  # key -> account, ALL -> bookings
    odd: Counter[tuple] = Counter()  # by company and account: booked elsewhere by the model
    for each in asked:
        for key in (each.sample["CompanyId"], *each.keys.values()):
            group = groups[key]
            group[ALL] += 1
            group[each.now] += 1
        if each.margin > 0 and each.now == each.account:
            odd[each.sample["CompanyId"], each.now] += 1
    weighed = []
    expected = changed = LOOKED
    for each in asked:
        company, account, likely = each.sample["CompanyId"], each.account, each.likely
        stays, moved = account == each.now, likely == each.now
        u, n = odd[company, account] - (stays and each.margin > 0), groups[company][account] - stays
        like = {
            name: (group[ALL] - 1, group[account] - stays, group[likely] - moved)
            for name, group in ((name, groups[key]) for name, key in each.keys.items())
            if group[ALL] > 1
        }
        log_odds = math.sqrt(max(0, each.margin)) - 7.2 - 0.8 * bool(like)
        log_odds -= 0.6 * math.log((u + 0.5) / (n + 1))
        for t, o, x in (like[name] for name in ("first two words", "sum") if name in like):
            log_odds += 0.6 * math.log((x + 0.5) / (t - x + o + 0.5))
        odds = math.exp(log_odds)
        if score_weight(each.sample) and each.is_looked_at:
            expected += odds / (1 + odds)
            changed += not stays
        elif score_weight(each.sample) and likely is not None:
            weighed.append((odds, each, *next(iter(like.items()), (None, (0, 0, 0)))))
    for odds, (seq, sample, account, _, _, likely, *_), name, said in weighed:
        probability = round(1 - 1 / (1 + odds * changed / expected), 4)
        if probability >= LEAST:
            yield Suspect(seq, sample, account, likely, probability, name, *said)


def _doubts(books: Books, records: Sequence[dict]) -> Iterator[Doubt]:
    """What the model says against those of these bookings that it has learned."""
    known = {record["seq"]: books.tokens(record["sample"]) for record in records}
    with books.at_rest() as model:
        there = {*books.history.at(np.array([*known]))["seq"].tolist()}  # not forgotten meanwhile
        records = [r for r in records if r["seq"] in there and books.lesson(r).weight]
        if model.n_classes < 2:
            return
        looked_at = [record["seq"] in books.corrected for record in records]
        lessons = [*map(books.lesson, records)]
        accounts = [record["sample"][books.target] for record in records]
        made = doubts(model, [known[record["seq"]] for record in records], accounts, lessons)
    for i, (record, said) in enumerate(zip(records, made, strict=True)):
        seq, sample = record["seq"], record["sample"]
        by_kind = {token >> KIND_SHIFT: token for token in reversed(known[seq])}
        keys = {n: (sample["CompanyId"], by_kind[k]) for n, k in LIKE.items() if k in by_kind}
        yield Doubt(seq, sample, accounts[i], lessons[i].account, looked_at[i], *said, keys)


def suspects(
    keeper: Bookkeeper,
    limit: int,
    company: str | None = None,
    before: tuple[float, int] | None = None,
) -> tuple[list[dict], tuple[float, int] | None]:
    """At most so many suspects of the last RECENT bookings, of a company or all, as they stand.

    They follow the page that ended with this probability and seq. And with which this one ends,
    None if nothing follows. Raises NotFound, NotReady, NotStored.
    """
    with keeper.books.lock:
        keeper.books.require(company)
        seqs = keeper.books.history.of(company)["seq"][-RECENT:].tolist()
    records = map(keeper.record, seqs)
    found = find(keeper.books, (record for record in records if "sample" in record))
    share, last = before or (1, sys.maxsize)
    found = [each for each in found if (-each.probability, -each.seq) > (-share, -last)]
    page = {each.seq: each._asdict() for each in found[:limit]}
    end = (found[limit - 1].probability, found[limit - 1].seq) if len(found) > limit else None
    return [page[now["seq"]] | now for now in standings(keeper, [*page])], end


def print_suspects(path: Path) -> int:
    """Prints the suspects of a log as CSV; the exit status. Raises LogError, OSError."""
    bookings: dict[int, dict] = {}
    books = Books()
    for batch in scan(path):
        if isinstance(batch, Damage):
            if batch.unfinished:  # a service may be writing it
                break
            raise batch.error(path)
        records = [record for record in batch.records if len(record) > len(PLACE)]
        if records and not bookings:
            books = books_for(**features_of(records[0]))
        require_features(batch.records, batch.line, books.features, path)
        bookings.update((record["seq"], record) for record in records if "sample" in record)
        books.apply(records, lambda correction: bookings[correction["corrects"]])
    rows = csv.writer(sys.stdout, quoting=csv.QUOTE_ALL)
    counts = ("Like", "Alike", "OnAccount", "OnLikely")
    rows.writerow(["Seq", *FEATURES, books.target, "Likely", "Probability", *counts])
    for seq, sample, account, likely, *numbers in (
        find(books, bookings.values()) if bookings else ()
    ):
        texts = [*map(sample.__getitem__, FEATURES), account, likely]
        rows.writerow([seq, *map(guarded, texts), *numbers])
    return 0
