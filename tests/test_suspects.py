"""The tests of bookkeep_extra/suspects.py: which bookings look wrong, and of what says so."""

import csv
import io
import random

import numpy as np
import pytest

import bookkeep
from bookkeep import NaiveBayes, NotFound
from bookkeep_extra import suspects, views
from bookkeep_extra.unlearned import doubts, scores_without
from conftest import SERVICE, assert_same, booking, bookkeeping, learn, run

WORDS = ("rent", "fuel", "paper", "coffee", "phone", "train")


def ledger(n=300, company="A", seed=0):
    """Bookings of which each first word has an account of its own."""
    rng = random.Random(seed)
    for number in range(n):
        word = rng.choice(WORDS)
        text = f"{word} {rng.choice('xyz')} {number}"
        yield booking(company, text, str(-rng.randrange(10, 5000)), f"{word}s")


def planted(samples, *places):
    """The samples, of which those in these places are booked to the next word's account."""
    samples = [*samples]
    for place in places:
        word = samples[place]["BankEntryText"].split()[0]
        wrong = WORDS[(WORDS.index(word) + 1) % len(WORDS)]
        samples[place] = samples[place] | {"AccountNumber": f"{wrong}s"}
    return samples


def found_in(keeper, **asked):
    return suspects.suspects(keeper, **{"limit": 50} | asked)[0]


@pytest.mark.parametrize("rare", [bookkeep.RARE, 12, 3])
def test_a_booking_is_scored_exactly_as_if_it_had_never_been_learned(rare, monkeypatch):
    monkeypatch.setattr(bookkeep, "RARE", rare)  # rows turn wide, and narrow again without one
    rng = random.Random(1)
    documents, labels, lessons = [], [], {}
    for _ in range(300):
        company = f"c{rng.randrange(5)}"
        text = " ".join(rng.choices("abcdefghij", k=rng.randrange(1, 5)))
        amount = str(rng.randrange(-50, 50))
        documents.append(bookkeep.tokens(booking(company, text, amount), ()))
        labels.append(f"{int(rng.expovariate(0.2))}{rng.choice(['', company])}")  # some only once
    for account in "rqp":  # of each, the others are equally likely
        documents.append(bookkeep.tokens(booking("new", "k l", "7"), ()))
        labels.append(account)
    documents.append(bookkeep.tokens(booking("alone", "a m m", "7"), ()))
    labels.append("1")
    model = NaiveBayes()
    for start in range(0, len(documents), 50):
        batch = slice(start, start + 50)
        for part, _, learned in model.book(documents[batch], labels[batch]):
            lessons |= dict(zip(range(start, start + 50)[part], learned, strict=True))
    own = [lessons[i] for i in range(len(documents))]
    # What is asked about is mostly what it is booked to, but what it was before it was corrected.
    asked = [label if i % 7 else labels[i - 1] for i, label in enumerate(labels)]
    at_once = scores_without(model, documents, asked, own)
    is_label = np.isin(np.arange(len(at_once.score)), at_once.label)
    ties = 0
    doubted = doubts(model, documents, asked, own)
    for i, (document, lesson) in enumerate(zip(documents, own, strict=True)):
        model.learn([document], [lesson], sign=-1)
        alone = model.joint_log_likelihood([document], [asked[i]])
        model.learn([document], [lesson])
        mine = at_once.document == i
        assert at_once.account[mine].tolist() == alone.account.tolist()
        assert at_once.score[mine].tolist() == alone.score.tolist()
        assert is_label[mine].nonzero()[0].tolist() == alone.label.tolist()
        pairs = [p for p in range(len(alone.score)) if p not in alone.label]
        others = [alone.score[p] for p in pairs]
        names = [model.names[alone.account[p]] for p in pairs if alone.score[p] == max(others)]
        likely, margin = doubted[i]
        if others and len(alone.label):
            assert margin == max(others) - alone.score[alone.label[0]]
        else:
            assert margin == -np.inf
        if others:
            assert likely == min(names) != asked[i]
        ties += len(names) > 1
    assert ties


def test_what_was_booked_wrong_comes_first_with_the_numbers_that_say_so(keeper):
    wrong = [40, 111, 222]
    samples = planted(ledger(), *wrong)
    samples[111]["BankEntryText"] = samples[110]["BankEntryText"] = "rent x"
    samples[110]["AccountNumber"], samples[111]["AccountNumber"] = "rents", "fuels"
    keeper.book(samples)
    found = found_in(keeper)
    assert {each["seq"] for each in found[:3]} == {*wrong}
    assert all(each["probability"] > 0.4 for each in found[:3])
    [twin] = [each for each in found if each["seq"] == 111]
    assert (twin["account"], twin["likely"], twin["sample"]) == ("fuels", "rents", samples[111])
    assert (twin["like"], twin["alike"], twin["on_account"], twin["on_likely"]) == ("text", 1, 0, 1)
    chances = [each["probability"] for each in found]
    assert chances == sorted(chances, reverse=True)
    assert min(chances) >= suspects.LEAST


def test_pages_follow_one_another(keeper):
    keeper.book(planted(ledger(), *range(5, 300, 30)))
    whole, end = suspects.suspects(keeper, 50)
    assert (len(whole) >= 10, end) == (True, None)
    pages, end = [], None
    while end or not pages:
        page, end = suspects.suspects(keeper, 3, None, end)
        pages += page
    assert pages == whole


def test_it_is_of_one_company_and_compares_with_its_own(keeper):
    keeper.book([*planted(ledger(), 40), *planted(ledger(company="B"), 41)])
    assert {each["sample"]["CompanyId"] for each in found_in(keeper)[:2]} == {"A", "B"}
    assert found_in(keeper, company="B")[0]["seq"] == 341
    assert {each["sample"]["CompanyId"] for each in found_in(keeper, company="B")} == {"B"}
    with pytest.raises(NotFound):
        found_in(keeper, company="C")


def test_what_a_person_confirmed_or_changed_looks_wrong_no_more(path):
    with bookkeeping(path) as keeper:
        keeper.book(planted(ledger(), 40, 111, 222))
        before = keeper.books.model.sums.copy()
        account = keeper.books.lesson(keeper.record(40)).account
        assert keeper.correct(40, account) == account
        assert (keeper.books.model.sums == before).all()  # it is learned already
        keeper.correct(111, "rents")
        lines = len(keeper.log)
        keeper.correct(40, account)
        assert len(keeper.log) == lines == 302  # it is said once
        first = [each["seq"] for each in found_in(keeper)]
        assert first[0] == 222
        assert not {40, 111} & {*first}
        told = keeper.books
    with bookkeeping(path) as keeper:
        assert [each["seq"] for each in found_in(keeper)] == first
        assert_same(keeper, told)
        assert views.booking(keeper, 40)["corrected"] == {"from": account}
        keeper.forget("A")
        assert found_in(keeper) == []


def test_the_more_were_confirmed_the_less_do_others_look_wrong(keeper):
    places = range(5, 300, 30)
    keeper.book(planted(ledger(), *places))

    def chance():
        return {each["seq"]: each["probability"] for each in found_in(keeper)}[5]

    chances = [chance()]
    for place in places[1:5]:
        keeper.correct(place, keeper.books.lesson(keeper.record(place)).account)
        chances.append(chance())
    assert chances == sorted({*chances}, reverse=True)
    for place in places[5:]:
        word = keeper.record(place)["sample"]["BankEntryText"].split()[0]
        keeper.correct(place, f"{word}s")
    assert chance() > chances[-1]


def test_what_is_booked_so_in_a_row_looks_less_wrong_than_what_is_alone(keeper):
    def chance(neighbours):
        company = f"{neighbours}"
        samples = [*ledger(company=company), *[booking(company, "rent x", account="rents")] * 9]
        for place in (303, *neighbours):
            samples[place] = samples[place] | {"AccountNumber": "fuels"}
        keeper.book(samples)
        found = found_in(keeper, company=company, limit=1)
        assert found[0]["sample"] == samples[303]
        return found[0]["probability"]

    assert chance([304]) < chance([308]) < chance([])  # of two, the neighbours are a habit


def test_what_was_sent_anew_under_its_id_is_doubted_as_it_is_now(keeper):
    first = [each | {"Id": f"{i}"} for i, each in enumerate(planted(ledger(), *range(5, 300, 30)))]
    now = [*first]
    for i in range(35, 300, 30):  # now the text is that of the account
        now[i] = first[i] | {"BankEntryText": f"{first[i]['AccountNumber'][:-1]} x {i}"}
    keeper.book(first)
    keeper.book(now)
    keeper.book([each | {"CompanyId": "B"} for each in now])
    [anew] = found_in(keeper, company="A")
    [at_once] = found_in(keeper, company="B")
    assert anew["sample"]["Id"] == at_once["sample"]["Id"] == "5"
    assert anew["probability"] == pytest.approx(at_once["probability"], abs=0.1)


def test_what_nobody_looked_at_is_left_to_the_review(keeper):
    keeper.book([*ledger()])
    unseen = planted(ledger(seed=1), 5)[5] | {bookkeep.BOOKED_BY: "suggestion"}
    keeper.book([unseen])
    assert 300 not in {each["seq"] for each in found_in(keeper)}


def test_one_account_or_a_booking_without_words_is_nothing_to_stumble_over(books):
    alone = learn(books, [booking(text="  "), booking(text="rent")])
    assert suspects.find(books, alone) == []
    more = learn(books, [booking(text="  ", account="2"), booking(text="x", account="3")])
    assert {type(each) for each in suspects.find(books, [*alone, *more])} <= {suspects.Suspect}


def test_the_command_prints_them_as_csv_that_no_spreadsheet_runs(path):
    samples = planted(ledger(), 40)
    samples[40]["BankEntryText"] = "=1+1 " + samples[40]["BankEntryText"]
    with bookkeeping(path) as keeper:
        keeper.book(samples[:200])
        keeper.book(samples[200:])
        keeper.correct(7, "others")
        found = suspects.find(keeper.books, map(keeper.record, range(300)))
    status, printed, _ = run(SERVICE, "suspects", path)
    rows = [*csv.DictReader(io.StringIO(printed))]
    assert status == 0
    assert [int(each["Seq"]) for each in rows] == [each.seq for each in found]
    [row] = [each for each in rows if each["Seq"] == "40"]
    assert row["BankEntryText"].startswith("'=1+1 ")
    assert row["BankEntryAmount"] == samples[40]["BankEntryAmount"]
    assert row["AccountNumber"] == samples[40]["AccountNumber"]
    path.write_bytes(path.read_bytes()[:500] + b"\n" + path.read_bytes()[500:])
    status, _, said = run(SERVICE, "suspects", path)
    assert status == 1
    assert "is damaged, line" in said
