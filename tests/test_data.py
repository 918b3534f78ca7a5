"""The synthetic data set, and how well it and the real one are predicted."""

import itertools
import re

import pytest

import replay
from bookkeep import NaiveBayes, tokens
from conftest import HERE, REAL, SYNTHETIC, batches_of, booking, prequential, run

SYNTHESIZE = HERE / "data" / "synthesize.py"


@pytest.fixture(scope="module")
def rows():
    return list(replay.read_rows(SYNTHETIC))


def test_the_synthetic_set_is_what_its_script_makes(rows, tmp_path):
    assert run(SYNTHESIZE, "--out", tmp_path / "again.csv") == (0, "", "")
    assert run(SYNTHESIZE, "--out", tmp_path / "again.zip") == (0, "", "")
    made = list(replay.read_rows(tmp_path / "again.csv"))
    assert made == list(replay.read_rows(tmp_path / "again.zip"))
    assert made == rows
    assert SYNTHETIC.stat().st_size < 1_000_000
    assert [row[""] for row in made] == [str(index) for index in range(20_000)]
    blocks = [(row["CompanyId"], row["BankEntryDate"]) for row in made]
    for (company, date), (next_company, next_date) in itertools.pairwise(blocks):
        assert company != next_company or date >= next_date
    assert len({company for company, _ in blocks}) == len(
        list(itertools.groupby(company for company, _ in blocks))
    )


@pytest.mark.parametrize(("rows", "companies"), [(1, 1), (5, 50), (1234, 7)])
def test_synthetic_sets_of_any_size(tmp_path, rows, companies):
    options = ("--rows", rows, "--companies", companies)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = ("--seed", seed, "--out", tmp_path / name)
        assert run(SYNTHESIZE, *options, *out) == (0, "", "")
    a, b, c = ((tmp_path / name).read_text() for name in "abc")
    assert a == b != c
    assert len(list(replay.read_rows(tmp_path / "a"))) == rows


def test_the_figures_of_a_synthetic_set():
    status, out, _ = run(SYNTHESIZE, "--describe", SYNTHETIC)
    assert status == 0
    assert re.search(r"rows, companies +20000, 40\n", out)
    for figure, least, most in (
        ("mean and most", 3.2, 3.8),
        ("that occur once", 68, 78),
        ("in several companies", 9, 15),
        ("numeric", 18, 22),
        ("new to its company, of rows", 60, 70),
        ("exact duplicate rows", 5, 10),
    ):
        assert least < float(re.search(rf"{figure} +([0-9.]+)[%,]", out)[1]) < most
    assert run(SYNTHESIZE, "--rows", "0")[0] == 2


def test_numeric_words_of_a_set_that_hides_its_words(rows, tmp_path):
    file = tmp_path / "hidden.csv"
    columns = rows[0].keys()
    row = "0,int:1,2014-01-02,{},> -10,str:1,1234,Balance"
    texts = ("str:5d04e5f int:3fdba35", "str:5d04e5f Rent", "May 10482 K12")
    file.write_text("\n".join([",".join(columns), *map(row.format, texts)]))
    status, out, _ = run(SYNTHESIZE, "--describe", file)
    assert status == 0
    assert re.search(r"numeric +42.9%\n", out)  # 3 of 7


def test_a_synthetic_set_can_be_read(rows):
    names = {}
    for row in rows:
        company, text, number = row["CompanyId"], row["BankEntryText"], row["AccountNumber"]
        assert re.fullmatch("[a-z]+-[a-z]+", company)
        assert re.fullmatch("[A-Z0-9][A-Za-z0-9 .,/&-]*", text)
        assert re.fullmatch("[1-8][0-9]{3,6}", number)
        assert row["AccountTypeName"] == ("Balance" if number >= "5" else "Profit and Loss")
        assert re.fullmatch("[A-Z][A-Za-z', ]+", row["AccountName"])
        names.setdefault((company, number), set()).add(row["AccountName"])
    assert all(len(of_account) == 1 for of_account in names.values())


def test_what_a_synthetic_text_says_fits_its_account(rows):
    accounts = {
        "rent": "Office rent",
        "fuel": "Fuel",
        "consulting": "Services",
        "hosting": "Software",
        "courier": "Freight",
        "hotel": "Hotels",
        "materials": "Raw materials",
        "audit": "Accounting",
        "vat": "VAT",
    }
    fits = [
        row["AccountName"].startswith(accounts[word])
        for row in rows
        for word in row["BankEntryText"].lower().split()
        if word in accounts
    ]
    assert len(fits) > 200
    assert sum(fits) > 0.8 * len(fits)

    labels = [row["AccountNumber"] for row in rows]
    model = NaiveBayes()
    for batch in batches_of(replay.by_date(rows), 500):
        list(model.book([tokens(row) for row in batch], [row["AccountNumber"] for row in batch]))
    names = dict(zip(labels, (row["AccountName"] for row in rows), strict=True))
    for text, account in (("Office rent June", "Office rent"), ("Fuel Larkby 03/14", "Fuel")):
        asked = booking(company="new", text=text)
        assert names[model.predict([tokens(asked)])[0]] == account


def test_ids_of_synthetic_companies_are_unique(tmp_path):
    options = ("--rows", 20_000, "--companies", 10_000, "--out", tmp_path / "many")
    assert run(SYNTHESIZE, *options) == (0, "", "")
    many = replay.read_rows(tmp_path / "many")
    ids = [id for id, _ in itertools.groupby(row["CompanyId"] for row in many)]
    assert len(ids) == len({*ids}) > 6000
    assert max(map(len, ids)) <= 40


def test_the_synthetic_set_is_as_hard_as_it_should_be():
    accuracy, precision, recall, calibration_error = prequential(SYNTHETIC)
    assert 0.65 < accuracy < 0.75
    assert precision > 0.4
    assert recall > 0.4
    assert calibration_error < 0.03


@pytest.mark.skipif(not REAL.exists(), reason="the real data set is not in data/")
def test_quality_on_the_real_set():
    accuracy, precision, recall, calibration_error = prequential(REAL)
    assert accuracy >= 0.702
    assert precision >= 0.489
    assert recall >= 0.496
    assert calibration_error <= 0.02
