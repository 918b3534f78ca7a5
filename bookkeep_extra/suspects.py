"""Which bookings look wrong: what others like it, and the model without it, say of each.

Of a booking, a model that has learned all others says which other account is the most probable. If
it is more probable than the booking's own, the booking is doubted, by a margin: the log-odds of the
two. Of the company's other bookings with the same first word and range, and of those with the same
sum, there are t, of which x are on that likely account, o on the booking's own. Of the n others on
its own, u are doubted, too. Of the two before and after it with the same first two words, b are on
its own: what is booked in a row is a habit. Then

    log-odds of an error = -7.1 + 0.8 sqrt(margin) - 1.3 b
                           + 0.6 (d(first word and range) + d(sum) - log((u + 1/2) / (n + 1)))
    d = log(x + 1/2) - 1/2 log(o + 1/2) - 1/2 log(t - x + 1/2), which is 0 if there are none

The numbers were fitted, by logistic regression, to three real sets with 1 % wrong accounts: in one
half drawn from the company's own bookings, in the other from the model's next likeliest. So these
odds are for 1 % of errors. They are multiplied by (changed + 5) / (expected + 5): of the doubted
that persons had booked and looked at again, how many they changed, and how many were expected.
"""

import csv
import math
import sys
from collections import Counter
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
LIKE = {  # what others may have in common with a booking, from most to least
    "text": KINDS.index("whole text"),
    "first two words": KINDS.index("first two words in this company"),
    "first word and range": KINDS.index("first word with this amount in this company"),
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
    """What the model says of a booking."""

    seq: int
    sample: Sample
    account: str  # that it was booked to first
    now: str  # that it is booked to
    is_looked_at: bool  # has a person corrected or confirmed it?
    likely: str  # the most probable other one
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
    habits = Habits(asked)
    doubted = [each for each in asked if each.margin > 0 and score_weight(each.sample)]
    odds = {each.seq: habits.odds(each) for each in doubted}
    looked_at = [each for each in doubted if each.is_looked_at]
    changed = LOOKED + sum(each.now != each.account for each in looked_at)
    expected = LOOKED + sum(odds[each.seq] / (1 + odds[each.seq]) for each in looked_at)
    for each in doubted:
        probability = round(1 - 1 / (1 + odds[each.seq] * changed / expected), 4)
        if probability >= LEAST and not each.is_looked_at:
            counts = ((name, *habits.others(each, key)) for name, key in each.keys.items())
            said = next((like for like in counts if like[1]), (None, 0, 0, 0))
            yield Suspect(each.seq, each.sample, each.account, each.likely, probability, *said)


def _doubts(books: Books, records: Sequence[dict]) -> Iterator[Doubt]:
    """What the model says of those of these bookings that it has learned."""
    with books.at_rest() as model:
        seqs = np.array([record["seq"] for record in records])
        there = {*books.history.at(seqs)["seq"].tolist()}  # not forgotten meanwhile
        records = [r for r in records if r["seq"] in there and books.lesson(r).weight]
        if model.n_classes < 2:
            return
        looked_at = [record["seq"] in books.corrected for record in records]
        lessons, samples = [*map(books.lesson, records)], [*map(books.sample, records)]
        accounts, documents = [s[books.target] for s in samples], [*map(books.tokens, samples)]
        made = doubts(model, documents, accounts, lessons)
    for i, (record, sample) in enumerate(zip(records, samples, strict=True)):
        by_kind = {token >> KIND_SHIFT: token for token in reversed(documents[i])}
        keys = {n: (sample["CompanyId"], by_kind[k]) for n, k in LIKE.items() if k in by_kind}
        booked = accounts[i], lessons[i].account, looked_at[i]
        yield Doubt(record["seq"], sample, *booked, *made[i], keys)


class Habits:
    """How bookings that have something in common are booked."""

    def __init__(self, asked: Iterable[Doubt]) -> None:
        self.booked: Counter[tuple] = Counter()  # by key, by key and account
        self.beside: Counter[int] = Counter()  # by seq: neighbours that are on its account
        last: dict[object, Doubt] = {}
        for each in asked:
            company, words = each.sample["CompanyId"], each.keys.get("first two words", each.seq)
            keys = [(company,), *each.keys.values()]
            if each.margin > 0 and each.now == each.account:
                keys.append((company, "doubted"))
            self.booked.update([*keys, *((key, each.now) for key in keys)])
            if before := last.get(words):
                self.beside[each.seq] += before.now == each.account
                self.beside[before.seq] += each.now == before.account
            last[words] = each

    def others(self, each: Doubt, key: tuple) -> tuple[int, int, int]:
        """How many others of a booking have a key, are on its account, are on the likely one."""
        on_account = self.booked[key, each.account] - (each.now == each.account)
        on_likely = self.booked[key, each.likely] - (each.now == each.likely)
        return self.booked[key] - 1, on_account, on_likely

    def odds(self, each: Doubt) -> float:
        """The odds that a doubted booking is wrong, if 1 % are."""
        company = each.sample["CompanyId"]
        n, u = (self.others(each, key)[1] for key in ((company,), (company, "doubted")))
        log_odds = -7.1 + 0.8 * math.sqrt(each.margin) - 1.3 * self.beside[each.seq]
        log_odds -= 0.6 * math.log((u + 0.5) / (n + 1))
        for name in ("first word and range", "sum"):
            if name in each.keys:
                t, o, x = self.others(each, each.keys[name])
                log_odds += 0.6 * math.log((x + 0.5) / math.sqrt((o + 0.5) * (t - x + 0.5)))
        return math.exp(log_odds)


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
