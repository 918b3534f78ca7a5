"""The tests of bookkeep_extra/isolated.py: no company learns of another."""

import random
from contextlib import closing

import pytest

from bookkeep import Bookkeeper, Books, Log, LogError, NotFound, NotReady, suggest
from bookkeep_extra import logs, suspects, views
from bookkeep_extra.isolated import Isolated
from conftest import SERVICE, booking, bookings, bookkeeping, by, changed, learn, run, scanned

PLACE = ("seq", "batch", "left", "crc", "corrects")  # what counts all companies' lines
ASKED = bookings(8, seed=3)
ASKED_OF_A = [sample | {"CompanyId": "a"} for sample in ASKED]


def isolated(path, context=(), **options):
    return bookkeeping(path, books=Isolated(context), **options)


def told(keeper, company):
    """All that a company is told, and what is stored of it, without the numbers of lines."""
    books, asked = keeper.books, [sample | {"CompanyId": company} for sample in ASKED]
    records = scanned(keeper.log.path)
    own = {r["seq"] for r in records if r.get("sample", {}).get("CompanyId") == company}
    mine = [r for r in records if r["seq"] in own or r.get("corrects") in own]
    said = {"records": [{k: v for k, v in r.items() if k not in PLACE} for r in mine]}
    try:
        said["predictions"] = books.predict(asked)
        said["suggestions"] = suggest(books, asked, 3, 0.5)
        found, _ = suspects.suspects(keeper, 50, company)
        said["suspects"] = [{k: v for k, v in each.items() if k != "seq"} for each in found]
        said["report"] = views.report(books, 1000, company)
    except (NotFound, NotReady) as error:
        said["refused"] = str(error)
    return said


def walk(keeper, companies, seed, steps=12, forgetting=0.08):
    """Books, corrects and forgets at random for these companies; what `a` is told now and then.

    What is done for a company is the same whichever others there are.
    """
    dice = {company: random.Random(f"{seed} {company}") for company in companies}
    said = []
    for step in range(1, steps + 1):
        lists = {}
        for company, rng in dice.items():
            booked = keeper.books.history.of(company)["seq"].tolist()
            if booked and rng.random() < forgetting:
                keeper.forget(company)
            elif booked and rng.random() < 0.4:
                keeper.correct(rng.choice(booked), str(rng.randrange(3000, 3008)))
            lists[company] = [
                by(rng.choice(["person", "person", "check", "suggestion"]), sample)
                | {"CompanyId": company}
                | ({"Id": str(rng.randrange(20))} if rng.random() < 0.3 else {})
                for sample in bookings(rng.choice([0, 1, 7, 30, 150]), rng.random())
            ]
        owners = [company for company, samples in lists.items() for _ in samples]
        random.Random(seed).shuffle(owners)
        rest = {company: iter(samples) for company, samples in lists.items()}
        keeper.book([next(rest[company]) for company in owners])
        if step % 3 == 0:
            said.append(told(keeper, "a"))
    return said


@pytest.mark.parametrize("seed", range(2))
def test_what_a_company_is_told_is_the_same_whatever_others_book(path, seed):
    with isolated(path) as keeper:
        among_others = walk(keeper, "bac", seed)
    with isolated(path.with_name("alone")) as keeper:
        alone = walk(keeper, "a", seed)
    for step, expected in zip(among_others, alone, strict=True):
        for about in expected | step:
            assert step.get(about) == expected.get(about), about
    assert any(each.get("suspects") and each.get("report") for each in alone)
    assert any("now" in record for each in alone for record in each["records"])


def test_a_company_alone_is_told_the_same_accounts_either_way(path):
    rows = [sample | {"CompanyId": "a"} for sample in bookings(300)]
    wrong = {5, 111, 222}
    rows = [row | {"AccountNumber": "9"} if i in wrong else row for i, row in enumerate(rows)]
    said = []
    for books in (Books(), Isolated()):
        with bookkeeping(path.with_name(type(books).__name__), books=books) as keeper:
            for start in range(0, 300, 60):
                keeper.book(rows[start : start + 60])
            found, _ = suspects.suspects(keeper, 50)
            said.append([books.predict(ASKED_OF_A), *(each | {"confidence": 0} for each in found)])
    assert said[0] == said[1]
    assert wrong & {each["seq"] for each in found}


def test_without_it_a_company_is_told_of_others(path):
    for options in ({}, {"books": Isolated()}):
        with bookkeeping(path.with_name(str(len(options))), **options) as keeper:
            keeper.book([booking("a", account="1")] * 30)
            before = told(keeper, "a")
            keeper.book([booking("b", account="2")] * 30)
            assert (told(keeper, "a") == before) == ("books" in options)


@pytest.mark.parametrize("unsaved", [1, 10**9], ids=["with a snapshot", "without"])
def test_a_start_goes_on_where_it_was(path, unsaved):
    with isolated(path, unsaved=unsaved) as keeper:
        walk(keeper, "abc", 1, steps=6, forgetting=0)
        keeper.book([booking("new"), by("suggestion", company="unseen")])
        before = {company: told(keeper, company) for company in ["new", "unseen", *"abc"]}
        companies = [*keeper.books.companies]
    with isolated(path, unsaved=unsaved) as keeper:
        assert (keeper.snapshot.lines > 0) == (unsaved == 1)
        assert {company: told(keeper, company) for company in before} == before
        assert sorted(keeper.books.companies) == sorted(companies)
        assert keeper.correct(len(keeper.log) - 1, "7") in ("3115", "7")
        later = [walk(keeper, "a", 2, steps=3, forgetting=0), keeper.books.model.n_tokens]
    with isolated(path, unsaved=unsaved) as keeper:
        assert told(keeper, "a") == later[0][-1]
        assert keeper.books.model.n_tokens == later[1]


def test_a_forgotten_company_leaves_nothing(path):
    with isolated(path) as keeper:
        keeper.book([*bookings(100), by("suggestion", company="unseen")])
        before = told(keeper, "company0"), keeper.books.model.n_classes, keeper.books.model.n_tokens
        keeper.book([sample | {"CompanyId": "gone"} for sample in bookings(300, seed=1)])
        keeper.correct(200, "7")
        for company in ("gone", "unseen"):
            assert keeper.forget(company) > 0
            assert company not in keeper.books.companies
            with pytest.raises(NotReady, match="sample 1: there is no model of its company yet"):
                keeper.books.predict([booking("company0"), booking(company)])
        now = told(keeper, "company0"), keeper.books.model.n_classes, keeper.books.model.n_tokens
        assert now == before


def test_what_cannot_be_stored_is_unlearned_whole(path, monkeypatch):
    with isolated(path) as keeper:
        keeper.book(bookings(100))
        before = {f"company{i}": told(keeper, f"company{i}") for i in range(5)}
        for failing in (keeper.log, keeper.books.of("company3")):
            name = "append" if failing is keeper.log else "draft"
            with monkeypatch.context() as patch:
                patch.setattr(failing, name, lambda *_: [][0])
                with pytest.raises(IndexError):
                    keeper.book([*bookings(50, seed=1), booking("new")])
            assert "new" not in keeper.books.companies
            assert {company: told(keeper, company) for company in before} == before
            assert not keeper.books.broken


def test_what_is_short_is_booked_while_a_list_of_its_company_pauses():
    """Though it is undone meanwhile, and the company has nothing else."""
    books, undone = Isolated(), []

    def pause():
        if not undone:
            undone.append(booking("a"))
            books.undo(*books.draft(undone))

    drafted = books.draft([booking("a")] * 30, pause)
    assert books.companies["a"].model.n_classes == 1
    books.undo(*drafted)
    assert (books.companies, books.model.n_tokens) == ({}, 0)


def test_how_others_fare_says_nothing_of_how_sure_a_company_can_be(books):
    alone = Isolated()
    for kept in (books, alone):
        for i in range(9):
            learn(kept, [booking("others", f"x{i}"), booking("others", f"y{i}", account="1")] * 9)
        learn(kept, [booking("a", "x", account="1"), booking("a", "y", account="2")])
    [shared, own] = [suggest(each, [booking("a", "x")], 1)[0] for each in (books, alone)]
    assert shared["suggestions"][0]["confidence"] is not None
    assert own["suggestions"][0]["confidence"] is None  # nothing was predicted for it so far


@pytest.mark.parametrize("unsaved", [1, 10**9], ids=["with a snapshot", "without"])
def test_a_log_that_was_learned_otherwise_is_refused_until_it_is_relearned(path, unsaved):
    options = {Books: ", no company isolated", Isolated: ", each company isolated"}
    for kind, wanted in ((Books, Isolated), (Isolated, Books)):
        path = path.with_name(kind.__name__)
        expected, new = path.with_name("expected"), path.with_name("new")
        for log, books in ((path, kind()), (expected, wanted())):
            with bookkeeping(log, unsaved=unsaved, books=books) as keeper:
                walk(keeper, "ab", 5, steps=4, forgetting=0)
                keeper.book([booking()], "a key")
        with closing(Log(path)) as log, pytest.raises(LogError) as raised:
            Bookkeeper(log, unsaved, wanted())
        assert "learned with the context none, the target AccountNumber" in str(raised.value)
        assert f"{options[kind]}; to learn it anew, give the options of" in str(raised.value)
        assert logs.check(expected) == logs.check(path) == 0
        assert logs.relearn(path, new, wanted()) == 0
        assert new.read_bytes() == expected.read_bytes()
        for each in (new, expected):
            each.unlink()


def test_a_check_says_which_lines_were_learned_otherwise(path, capsys):
    with isolated(path) as keeper:
        keeper.book(bookings(3))
        keeper.correct(1, "7")
    first, *rest, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, *rest, changed(last, isolated=None)]))
    assert logs.check(path) == 1
    assert f"{path}, line 4: it was learned with the context" in capsys.readouterr().out


def test_it_is_started_told_apart_and_started_again_as_an_operator_does(serve, tmp_path):
    log = tmp_path / "log.jsonl"
    service = serve("--isolate")
    rows = bookings(400)
    for start in range(0, 400, 100):
        assert service.post("/sample", rows[start : start + 100])[0] == 200
    asked = [sample | {"AccountNumber": ""} for sample in bookings(30, seed=1)]
    status, before = service.post("/suggest", asked)
    assert status == 200
    accounts = [each["suggestions"][0]["account"] for each in before]
    assert service.post("/predict", asked) == (200, accounts)
    for path in ("/predict", "/suggest"):
        status, refusal = service.post(path, [*asked, booking("new")])
        assert status == 503
        assert refusal["error"].startswith("sample 30: there is no model of its company yet; send")
    health = service.get("/health")[1]
    assert (health["companies"], health["samples"]) == (5, 400)
    service.process.kill()
    service.process.wait()
    status, out, _ = run(SERVICE, "suspects", log)
    assert (status, out.splitlines()[0][:5]) == (0, '"Seq"')
    service = serve("--isolate")
    assert service.post("/suggest", asked) == (200, before)
