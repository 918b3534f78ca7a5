"""The benchmark: bench.py."""

import csv
import itertools
import json
import re
import time

import pytest

import bench
import replay
from conftest import HERE, SYNTHETIC, booking, prequential, run


def test_models_are_compared_on_the_same_rows(tmp_path, monkeypatch):
    rows = replay.by_date(replay.read_rows(SYNTHETIC))[:2500]
    small = tmp_path / "small.csv"
    with open(small, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(bench, "find_spec", lambda package: package == "sklearn")
    monkeypatch.setattr(bench.Refitted, "rows", 1500)
    found = bench.compare_models(rows, repeats=1)
    assert list(found) == list(bench.MODELS)
    accuracy, precision, recall, _ = prequential(small)
    ours = found["bookkeep"]
    assert [ours[name] for name in ("rows", "accuracy", "precision", "recall")] == [
        *(2500, accuracy, precision, recall)
    ]
    refitted = found["scikit-learn refitted"]
    assert (refitted["rows"], refitted["precision"]) == (1500, None)
    assert 0.2 < refitted["accuracy"] < refitted["bookkeep_accuracy"]
    assert 0.2 < found["scikit-learn partial_fit"]["accuracy"] < 0.9
    times = refitted["bookkeep_times_as_fast"] * refitted["samples_per_second"]
    assert times > 0
    assert found["River MultinomialNB"] == {"not_installed": "river"}
    results = {"file": {"name": "small.csv", "rows": 2500}, "machine": "", "models": found}
    table = "\n".join(bench.in_words(results))
    assert re.search(r"River MultinomialNB +needs river\n", table)
    assert re.search(rf"bookkeep +2,500 +{accuracy:.4f} +{precision:.4f} +{recall:.4f} ", table)


def test_a_load_counts_requests_and_their_milliseconds(service):
    predict = bench.request("/predict", booking())
    started = time.perf_counter()
    load = bench.measure_load(service.port, itertools.repeat(predict), connections=3, seconds=0.3)
    took = time.perf_counter() - started
    assert 0.3 <= took < 5
    assert 1 < load["requests_per_second"] < 20_000
    assert 0 < load["p50"] <= load["p99"] < 1e3 * took
    bad = bench.request("/predict", {})
    with pytest.raises(replay.Failed, match="CompanyId is missing"):
        bench.measure_load(service.port, itertools.repeat(bad), connections=1)


def test_growth_is_measured_with_synthetic_bookings():
    status, out, said = run(HERE / "bench.py", "--part=scale", "--most=600", "--json")
    assert (status, said) == (0, "")
    [(size, figures)] = json.loads(out)["scale"].items()
    assert size == "600"
    assert figures["samples_per_second"] > 10
    assert 0 < figures["restart_seconds"] < 30
    assert figures["bytes_per_sample"] > 0


def test_medians_and_spreads():
    measured = [{"a": a, "b": 1, "c": None} for a in (1, 5, 3)]
    assert bench.medians(measured) == {"a": 3, "a_spread": 4, "b": 1, "c": None}


def test_a_bench_of_what_is_no_csv_is_one_sentence(tmp_path):
    assert run(HERE / "bench.py", tmp_path / "none.csv")[::2] == (
        1,
        f"bench: cannot read {tmp_path / 'none.csv'}: No such file or directory\n",
    )
