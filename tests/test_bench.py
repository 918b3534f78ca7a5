"""The benchmark: bench.py."""

import itertools
import re
import time

import pytest

import bench
import replay
from conftest import HERE, SYNTHETIC, booking, prequential, run, write_csv


def test_models_are_compared_on_the_same_rows(tmp_path, monkeypatch, capsys):
    rows = replay.by_date(replay.read_rows(SYNTHETIC))[:2000]
    small = write_csv(tmp_path / "small.csv", rows)
    monkeypatch.setattr(bench, "find_spec", lambda package: package in ("numpy", "sklearn"))
    refitted = bench.MODELS["scikit-learn refitted"]._replace(rows=1000)
    monkeypatch.setitem(bench.MODELS, "scikit-learn refitted", refitted)
    assert bench.main([str(small), "--repeats=1"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    names = ["", *(f"small: {name}" for name in bench.MODELS)]
    pairs = zip(names, lines, strict=True)
    table = {name: re.split("  +", line[len(name) :].strip()) for name, line in pairs}
    assert table[""][:5] == ["rows", "accuracy", "precision", "recall", "samples per cpu second"]
    *ours, _ = prequential(small)
    assert table["small: bookkeep"][:4] == ["2,000", *(f"{figure:.4f}" for figure in ours)]
    assert table["small: River MultinomialNB"] == ["needs river"]
    refitted = table["small: scikit-learn refitted"]
    assert refitted[0::2][:2] == ["1,000", "-"]
    assert 0.2 < float(refitted[1]) < float(refitted[6]) < 0.9
    assert float(refitted[7]) > 0
    assert 0.2 < float(table["small: scikit-learn partial_fit"][1]) < 0.9


@pytest.mark.parametrize("name", bench.MODELS)
def test_a_model_predicts_each_batch_before_it_learns_it(name):
    model, _, package = bench.MODELS[name]
    pytest.importorskip(package)
    rents, fuels = ([booking(text=text, account=account)] * 3 for text, account in KNOWN)
    predictions = model([rents, fuels, rents + fuels], ["3115", "4320"], ())
    assert list(predictions) == [[""] * 3, ["3115"] * 3, ["3115"] * 3 + ["4320"] * 3]


KNOWN = [("Office rent", "3115"), ("Diesel", "4320")]


@pytest.mark.parametrize("name", bench.MODELS)
def test_all_models_get_sums_and_context(name):
    model, _, package = bench.MODELS[name]
    pytest.importorskip(package)
    for told in ({"amount": "{}.17"}, {"Department": "{}"}):
        samples = [
            booking(text="Invoice", account=account, **{k: v.format(n) for k, v in told.items()})
            for account, n in (("3115", 21), ("4320", 84))
        ]
        batches = [samples] * 9
        *_, last = model(batches, ["3115", "4320"], ["Department"])
        assert last == ["3115", "4320"]
        if "Department" in told:
            *_, last = model(batches, ["3115", "4320"], ())
            assert last[0] == last[1]


def test_what_a_sample_says_by_namespace():
    sample = booking(company="A: 1", text="Office|RENT June", amount="-9875.50", Department="North")
    assert bench.namespaces(sample, ["Department", "Project"]) == {
        "c": ["A__1"],
        "t": ["office_rent", "june"],
        "x": ["office_rent_june"],
        "a": [">_-10000"],
        "s": ["-9875.5", "....5"],
        "k": ["Department=North"],
    }


def test_a_column_amount_is_the_amount(tmp_path):
    rows = [booking(amount="> -10", Amount=amount, BankEntryDate="2016-02-29") for amount in "12"]
    read = bench.read_rows(write_csv(tmp_path / "rows.csv", rows))
    assert [row["BankEntryAmount"] for row in read] == ["1", "2"]


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
    status, out, said = run(HERE / "bench.py", "--part=scale", "--most=600")
    assert (status, said) == (0, "")
    *_, names, figures = out.splitlines()
    assert re.split("  +", names.strip()) == [
        *("samples per second", "bytes per sample", "restart seconds")
    ]
    size, speed, memory, restart = re.split("  +", figures)
    assert size == "600"
    assert float(speed.replace(",", "")) > 10
    assert float(memory.replace(",", "")) > 0
    assert 0 < float(restart) < 30


def test_medians_and_spreads():
    measured = [{"a": a, "b": 1, "c": None} for a in (1, 5, 3)]
    assert bench.medians(measured) == {"a": 3, "a_spread": 4, "b": 1, "c": None}


def test_a_bench_of_what_is_no_csv_is_one_sentence(tmp_path):
    assert run(HERE / "bench.py", tmp_path / "none.csv")[::2] == (
        1,
        f"bench: cannot read {tmp_path / 'none.csv'}: No such file or directory\n",
    )
