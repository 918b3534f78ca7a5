"""Figures for Prometheus, at GET /metrics: what the service knows, and how long its work takes."""

import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

import numpy as np
from bottle import Bottle, request, response

from bookkeep import (
    Bookkeeper,
    __version__,
    checks,
    described_path,
    scored,
    takes,
    unseen,
)
from bookkeep_extra.views import by_confidence, figures

RECENT = 10_000  # bookings, the last, that the window is looked for in
WINDOW = 1000  # predictions that figures are over, the last that are scored
COUNTERS = {  # since the start
    "predictions": "Predictions that were asked for.",
    "booked": "Bookings that were stored.",
    "scored": "Predictions that were scored as their bookings came, each as often as it counts.",
    "scored_right": "Those of the scored predictions that were right.",
    "corrections": "Bookings that were corrected or confirmed.",
    "forgotten": "Bookings that were forgotten.",
}


def watch(app: Bottle, keeper: Bookkeeper) -> None:
    """Adds GET /metrics to the app, and has it take the time of all requests and fsyncs."""
    requests = Histogram("request", "How long requests took, by path and status.")
    fsyncs = Histogram("fsync", "How long the disk took to store batches.")
    keeper.log.fsynced = fsyncs.observe

    @app.hook("before_request")
    def arrive() -> None:
        request.environ["bookkeep.arrival"] = time.perf_counter()

    @app.hook("after_request")
    def leave() -> None:
        route = request.environ.get("bottle.route")
        path = described_path(route) if route else "other"
        now = time.perf_counter()
        seconds = now - request.environ.get("bookkeep.arrival", now)  # unless it was refused before
        requests.observe(seconds, f'path="{path}",status="{response.status_code}"')

    @app.get("/metrics")
    @takes()
    def get_prometheus() -> str:
        refused = ("Requests that were answered with a status of 4xx.", requests.seen('status="4'))
        build = f'build_info{{version="{__version__}",python="{sys.version.split()[0]}"}}'
        watched = gauges(keeper) | {"refused_total": refused, build: ("What runs.", 1)}
        lines = [*_exposition(watched), *requests.exposition(), *fsyncs.exposition()]
        response.content_type = "text/plain; version=0.0.4; charset=utf-8"
        return "".join(f"{line}\n" for line in lines)


def gauges(keeper: Bookkeeper) -> dict[str, tuple[str, float]]:
    """What an operator watches: what each figure is, and the figure."""
    log, snapshot, books = keeper.log, keeper.snapshot, keeper.books
    with books.lock:
        rows, counted = books.history.rows, books.counters.copy()
        accounts, tokens = books.model.n_classes, books.model.n_tokens
        companies = len(books.history.companies)
    watched = {f"{name}_total": (text, counted[name]) for name, text in COUNTERS.items()} | {
        "failed_writes_total": ("Changes that could not be stored.", keeper.writer.failed),
        "bookings": ("Bookings in the log.", len(rows)),
        "unseen": ("Bookings that nobody has looked at.", unseen(rows)),
        "checks": ("Bookings that could have been booked unseen.", checks(rows)),
        "accounts": ("Accounts in the model.", accounts),
        "companies": ("Companies in the model.", companies),
        "tokens": ("Tokens in the model.", tokens),
        "waiting": ("Samples that wait to be booked.", keeper.writer.waiting()),
        "log_bytes": ("Bytes of the log.", log.size),
        "log_lines": ("Lines of the log.", len(log)),
        "snapshot_lines": ("Lines that the snapshot covers.", snapshot.lines),
    }
    if snapshot.lines:
        age = time.time() - snapshot.made
        watched["snapshot_age_seconds"] = ("Time since the snapshot was made.", age)
    return watched | _quality(rows, books.last_batch) | keeper.order.gauges()


def _quality(rows: np.ndarray, last_batch: int) -> dict[str, tuple[str, float]]:
    """How good the last of these predictions were; it looks at few, for it is often asked."""
    found: dict[str, tuple[str, float]] = {}
    last = scored(rows[rows["seq"].searchsorted(last_batch) :])
    window = scored(rows[-RECENT:])[-WINDOW:]
    for name, of, these in (
        ("last_batch", "the last batch", last),
        ("window", f"the last {WINDOW} predictions that are scored", window),
    ):
        for figure, value in figures(these).items() if len(these) else ():
            found[f"{name}_{figure}"] = (f"The {figure} of {of}.", value)
    if len(window):
        [sure] = by_confidence(window, [0.95])
        share = f"The share of the last {WINDOW} that was at least 95% sure."
        found["window_bookable"] = (share, sure["share"])
    return found


def _exposition(watched: dict[str, tuple[str, float]]) -> Iterator[str]:
    """What an operator watches, in Prometheus's text format."""
    for labelled, (text, value) in watched.items():
        name = f"bookkeep_{labelled.partition('{')[0]}"
        yield f"# HELP {name} {text}"
        yield f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}"
        yield f"bookkeep_{labelled} {value}"


class Histogram:
    """How often something took how long, as Prometheus counts it, for each of some labels."""

    BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds

    def __init__(self, what: str, text: str) -> None:
        self._name, self._text = f"bookkeep_{what}_duration_seconds", text
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[list[int], list[float]]] = {}  # labels -> counts, [sum]

    def observe(self, seconds: float, labels: str = "") -> None:
        """Counts one that took so long."""
        with self._lock:
            new = [0] * (len(self.BOUNDS) + 1), [0.0]
            counts, total = self._seen.setdefault(labels, new)
            counts[bisect_left(self.BOUNDS, seconds)] += 1
            total[0] += seconds

    def seen(self, part: str) -> int:
        """How many have that in their labels."""
        with self._lock:
            return sum(sum(counts) for labels, (counts, _) in self._seen.items() if part in labels)

    def exposition(self) -> Iterator[str]:
        """Its lines in Prometheus's text format."""
        with self._lock:
            seen = [(labels, [*counts], *total) for labels, (counts, total) in self._seen.items()]
        yield f"# HELP {self._name} {self._text}"
        yield f"# TYPE {self._name} histogram"
        for labels, counts, total in seen:
            for bound, so_far in zip((*self.BOUNDS, "+Inf"), accumulate(counts), strict=True):
                yield f'{self._name}_bucket{{{labels}{labels and ","}le="{bound}"}} {so_far}'
            braced = labels and f"{{{labels}}}"
            yield f"{self._name}_sum{braced} {total}"
            yield f"{self._name}_count{braced} {sum(counts)}"
