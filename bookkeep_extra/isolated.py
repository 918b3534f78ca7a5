"""Books in which no company learns of another: `python bookkeep.py --isolate`.

Each company has books of its own: a model, and a calibration. What all have in common are the table
of bookings, in which each row is one company's, the ids, the corrections, and the lock. So there is
nothing by which what one company books could change what another is told.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np

from bookkeep import (
    TARGET,
    Arrays,
    Books,
    Calibration,
    History,
    NaiveBayes,
    NotReady,
    Sample,
    chunks,
    packed,
    unpacked,
)


class OwnCalibration(Calibration):
    """What a suggestion is worth, with the record of one company alone.

    While that is short, it trusts the model, as sure as this would be at half the margin, and the
    company's own suggestions of an account count sooner. Numbers were chosen on three real sets.
    """

    OWN = 30
    _MARGINS = 2 ** ((np.arange(Calibration.COLUMNS) + 0.5) / 4) - 1
    TRUST = 1 - np.exp(-_MARGINS / 4)


class OwnBooks(Books):
    """The books of one company, in the history of all."""

    def __init__(self, of: "Isolated", company: str) -> None:
        super().__init__(of.context, of.target)
        self.company, self.calibration = company, OwnCalibration()
        self.features, self.lock, self.changing = of.features, of.lock, of.changing
        self.history, self.corrected, self.ids = of.history, of.corrected, of.ids
        self.counters = of.counters
        self.changes = 0  # that are made in them just now

    def is_empty(self) -> bool:
        """Has the company no booking, and is nothing of it learned?"""
        return not (self.model.n_classes or self.history.size(self.company))


class Isolated(Books):
    """Books of many companies, each with a model and a calibration that no other has a part in."""

    AT_ONCE = 1 << 15  # more: each company's are learned by themselves

    def __init__(self, context: Sequence[str] = (), target: str = TARGET) -> None:
        """As Books."""
        super().__init__(context, target)
        self.features = {"target": target, "context": [*context], "isolated": True}
        self.companies: dict[str, OwnBooks] = {}  # those that have bookings
        self.model = Together(self)
        self.in_snapshot = (self.model, self.history, self.ids)
        del self.calibration  # each company's books have one

    def of(self, company: str) -> OwnBooks:
        """The company's books; new ones if it has none."""
        if company not in self.companies:
            self.companies[company] = OwnBooks(self, company)
        return self.companies[company]

    def _changing_each(self, samples: Iterable[Sample]) -> Iterator[tuple[OwnBooks, list[int]]]:
        """The books that these samples change, one after the other, and the numbers of those.

        Books that are empty then are dropped, unless they are being changed around this, too: what
        is long pauses for what is short.
        """
        numbers: defaultdict[str, list[int]] = defaultdict(list)
        for i, sample in enumerate(samples):
            numbers[sample["CompanyId"]].append(i)
        for company, those in numbers.items():
            own = self.of(company)
            own.changes += 1
            try:
                yield own, those
            finally:
                own.changes -= 1
                if not own.changes and own.is_empty():
                    self.companies.pop(company, None)

    def draft(
        self, samples: Sequence[Sample], pause: Callable[[], object] = lambda: None
    ) -> tuple[list[dict], np.ndarray]:
        """As Books, each company's as if they were all: a first list is its own first one."""
        records: list[dict] = [{} for _ in samples]
        rows = np.zeros(len(samples), History.ROW)
        done: list[int] = []
        try:
            for own, those in self._changing_each(samples):
                drafted, rows[those] = own.draft([samples[i] for i in those], pause)
                for i, record in zip(those, drafted, strict=True):
                    records[i] = record
                done += those
        except BaseException:
            self.undo([records[i] for i in done], rows[done])
            raise
        return records, rows

    def undo(self, records: Iterable[dict], rows: np.ndarray) -> None:
        """As Books, of what was drafted whole."""
        records = [*records]
        for own, those in self._changing_each(record["sample"] for record in records):
            own.undo([records[i] for i in those], rows[those])

    def unlearn(self, records: Iterable[dict]) -> None:
        """As Books."""
        records = [*records]
        for own, those in self._changing_each(record["sample"] for record in records):
            own.unlearn([records[i] for i in those])

    def learn(self, bookings: Sequence[dict]) -> np.ndarray:
        """As Books."""
        rows = np.zeros(len(bookings), History.ROW)
        for own, those in self._changing_each(record["sample"] for record in bookings):
            rows[those] = own.learn([bookings[i] for i in those])
        return rows

    def corrections(
        self,
        changes: Sequence[tuple[dict, str, Sample | None]],
        pause: Callable[[], object] = lambda: None,
    ) -> list[dict | None]:
        """As Books."""
        made: list[dict | None] = [None] * len(changes)
        for own, those in self._changing_each(booking["sample"] for booking, _, _ in changes):
            for i, record in zip(
                those, own.corrections([changes[i] for i in those], pause), strict=True
            ):
                made[i] = record
        return made

    def correct(self, corrections: Sequence[tuple[dict, dict]]) -> None:
        """As Books."""
        for own, those in self._changing_each(booking["sample"] for booking, _ in corrections):
            own.correct([corrections[i] for i in those])

    def drop(self, seqs: np.ndarray) -> int:
        """As Books."""
        rows = self.history.at(seqs)
        names = {number: company for company, number in self.history.companies.items()}
        return sum(
            self.companies[names[number]].drop(rows["seq"][rows["company"] == number])
            for number in np.unique(rows["company"]).tolist()
        )

    def asked(self, samples: Iterable[Sample], most: int) -> Iterator[tuple[Books, list[Sample]]]:
        """As Books. Raises NotReady if there is no model of one of the companies."""
        known = []
        for i, sample in enumerate(samples):
            own = self.companies.get(sample["CompanyId"])
            if own is None or not own.model.n_classes:
                reason = "there is no model of its company yet; send its bookings to /sample first"
                raise NotReady(f"sample {i}: {reason}")
            known.append((own, sample))
        for own, pairs in groupby(known, key=lambda pair: pair[0]):
            for chunk in chunks((sample for _, sample in pairs), most):
                yield own, chunk

    def apart(self, records: Iterable[dict]) -> Iterator[tuple[Books, Iterable[dict]]]:
        """As Books: each company's, if there is a model of it."""
        records_of: defaultdict[str, list[dict]] = defaultdict(list)
        for record in records:
            records_of[record["sample"]["CompanyId"]].append(record)
        for company, some in records_of.items():
            own = self.companies.get(company)
            if own and own.model.n_classes:
                yield own, some


class Together:
    """What is asked of the companies' models as if they were one."""

    def __init__(self, books: Isolated) -> None:
        self._books = books

    def _models(self) -> list[NaiveBayes]:
        return [own.model for own in [*self._books.companies.values()]]

    @property
    def n_classes(self) -> int:
        """The accounts of all companies, each company's for itself."""
        return sum(model.n_classes for model in self._models())

    @property
    def n_tokens(self) -> int:
        """The tokens of all companies."""
        return sum(model.n_tokens for model in self._models())

    def state(self) -> Arrays:
        """What the models and the calibrations have counted: of each array, all in one."""
        companies = self._books.companies
        states = [own.model.state() | own.calibration.state() for own in companies.values()]
        names = [*states[0]] if states else []
        shapes = [[array.shape for array in state.values()] for state in states]
        return {"isolated": packed([[*companies], names, shapes])} | {
            name: np.concatenate([state[name].ravel() for state in states]) for name in names
        }

    def restore(self, state: Arrays) -> None:
        """Takes over what other companies' had counted."""
        companies, names, shapes = unpacked(state["isolated"])
        ends = dict.fromkeys(names, 0)
        for company, each in zip(companies, shapes, strict=True):
            own, parts = self._books.of(company), {}
            for name, shape in zip(names, each, strict=True):
                start, ends[name] = ends[name], ends[name] + int(np.prod(shape))
                parts[name] = state[name][start : ends[name]].reshape(shape).copy()
            own.model.restore(parts)
            own.calibration.restore(parts)
