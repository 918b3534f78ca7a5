"""The synthetic data set, and how well it and the real one are predicted."""

import itertools
import re
from collections import Counter
from operator import eq

import pytest

import replay
from bookkeep import NaiveBayes, amount_range, tokens
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
    assert SYNTHETIC.stat().st_size < 350_000
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
        ("exact duplicate rows", 4, 7),  # fewer than with ranges of amounts
        ("> -1000:", 20, 27),
        ("big positive:", 5, 10),
        ("amounts new to their company", 60, 75),
        ("Department +:", 10, 20),
    ):
        assert least < float(re.search(rf"{figure} +([0-9.]+)[%,]", out)[1]) < most
    assert run(SYNTHESIZE, "--rows", "0")[0] == 2


def test_numeric_words_of_a_set_that_hides_its_words(rows, tmp_path):
    file = tmp_path / "hidden.csv"
    columns = [*rows[0]][:-1]  # a set that hides its words has no Department
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
        assert re.fullmatch("-?(0|[1-9][0-9]*)[.][0-9]{2}", row["BankEntryAmount"])
        assert re.fullmatch("([A-Z][a-z]+)?", row["Department"])
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
    for batch in batches_of(replay.by_date(rows)[:5000], 500):
        list(model.book([tokens(row) for row in batch], [row["AccountNumber"] for row in batch]))
    names = dict(zip(labels, (row["AccountName"] for row in rows), strict=True))
    for text, account in (("Office rent June", "Office rent"), ("Fuel Larkby 03/14", "Fuel")):
        asked = booking(company="new", text=text)
        assert names[model.predict([tokens(asked)])[0]] == account


def test_rents_and_fees_recur_to_the_cent_and_most_other_sums_do_not(rows):
    met = Counter((row["CompanyId"], row["BankEntryAmount"]) for row in rows)

    def share_that_recur(*accounts):
        sums = [row for row in rows if row["AccountName"].partition(",")[0] in accounts]
        assert len(sums) > 200
        return sum(met[row["CompanyId"], row["BankEntryAmount"]] > 2 for row in sums) / len(sums)

    assert share_that_recur("Office rent", "Insurance", "Bank fees", "Software") > 0.5
    assert share_that_recur("Sales", "Goods for resale", "Fuel", "Trade debtors") < 0.3
    paid_in = [row["BankEntryAmount"][0] != "-" for row in rows if row["AccountNumber"][0] == "1"]
    assert sum(paid_in) > 0.85 * len(paid_in)


def test_sums_and_departments_say_something_of_the_account(rows):
    def accuracy(samples, context=()):
        model, hits = NaiveBayes(), 0
        for batch in batches_of(samples, 200):
            documents = [tokens(sample, context) for sample in batch]
            labels = [sample["AccountNumber"] for sample in batch]
            for part, assessments, _ in model.book(documents, labels):
                hits += sum(map(eq, (made.predicted for made in assessments), labels[part]))
        return hits / len(samples)

    rows = replay.by_date(rows)[:5000]
    ranges = [row | {"BankEntryAmount": amount_range(row["BankEntryAmount"])} for row in rows]
    with_ranges, with_sums = accuracy(ranges), accuracy(rows)
    assert with_ranges + 0.005 < with_sums < with_ranges + 0.03
    assert with_sums + 0.01 < accuracy(rows, ["Department"]) < with_sums + 0.06


def test_ids_of_synthetic_companies_are_unique(tmp_path):
    options = ("--rows", 8000, "--companies", 8000, "--out", tmp_path / "many")
    assert run(SYNTHESIZE, *options) == (0, "", "")
    many = replay.read_rows(tmp_path / "many")
    ids = [id for id, _ in itertools.groupby(row["CompanyId"] for row in many)]
    assert len(ids) == len({*ids}) > 4000
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
