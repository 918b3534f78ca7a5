"""The page: bookkeep_extra/page, served by a real service, mostly in a real browser."""

import csv
import itertools
import json
import re
import shutil
import time
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from html.parser import HTMLParser
from urllib.parse import quote

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from bookkeep import Access
from bookkeep_extra.tokens import company_token
from conftest import SERVICE, Service, batches_of, booking, bookings, by
from replay import guarded

CHROMIUM = shutil.which("chromium")
IN_A_BROWSER = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium, the Debian package")

FIELDS = ("CompanyId", "BankEntryText", "BankEntryAmount")  # of the form
CHECK = 16  # bookings that a check stands for
HOSTILE = '<img src=x onerror="document.title=1">'


def shown(share):
    """As percent, as the page rounds it."""
    return f"{Decimal(100 * share).quantize(Decimal('0.1'), ROUND_HALF_UP)}%"


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        expect.set_options(timeout=20_000)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens pages; afterwards nothing may have been logged, nor another host asked."""
    complaints, contexts = [], []

    def open(service, expected=(), **options):
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        home = f"http://127.0.0.1:{service.port}/"

        def asked(request):
            if not request.url.startswith((home, "data:")):
                complaints.append(request.url)

        def said(message):
            if not any(text in message.text for text in expected):
                complaints.append(message.text)

        page.on("request", asked)
        page.on("console", said)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(home)
        return page

    yield open
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A service that has booked some 1,500 bookings, some of them hostile."""
    service = Service(tmp_path_factory.mktemp("learned") / "log.jsonl")
    for batch in batches_of(bookings(1500), 150):
        service.post("/sample", batch)
    for seed, booked_by in ((6, "check"), (7, "suggestion")):
        more = [sample | {"BookedBy": booked_by} for sample in bookings(60, seed)]
        assert service.post("/sample", more)[0] == 200
    nasty = HOSTILE * 40
    for account in (HOSTILE, nasty[:100], "\u202e" + HOSTILE, "a\nb"):
        assert service.post("/sample", [booking(HOSTILE, nasty, HOSTILE, account)] * 2)[0] == 200
    yield service
    service.process.kill()
    service.process.wait()


PAGE_FILES = {
    "/": "text/html; charset=utf-8",
    "/desk.css": "text/css; charset=utf-8",
    "/desk.js": "text/javascript; charset=utf-8",
}


def test_the_page_allows_its_own_files_and_nothing_else(service):
    status, headers, _ = service.ask("GET", "/", kind=PAGE_FILES["/"])
    assert status == 200
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


class Inline(HTMLParser):
    """What of a page is inline, and the files that it loads."""

    def __init__(self, page):
        super().__init__()
        self.inline, self.loaded, self.element = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.element = tag
        for name, value in attributes:
            if name == "style" or name.startswith("on"):
                self.inline.append((tag, name))
            if name == "src" or (name == "href" and tag == "link"):
                self.loaded.append(value)

    def handle_data(self, data):
        if self.element in ("script", "style") and data.strip():
            self.inline.append((self.element, data))


def test_inline_styles_and_scripts_are_found():
    found = Inline("<p style='x' onclick=y>z<style>a</style><script>b</script><script src=c>")
    assert found.inline == [("p", "style"), ("p", "onclick"), ("style", "a"), ("script", "b")]
    assert found.loaded == ["c"]


def test_the_page_is_three_files_with_nothing_inline(service):
    files = {}
    for path, kind in PAGE_FILES.items():
        status, headers, content = service.ask("GET", path, kind=kind)
        assert (status, headers["X-Content-Type-Options"]) == (200, "nosniff")
        files[path] = content.decode()
    page = Inline(files["/"])
    assert page.inline == []
    local = [address for address in page.loaded if not address.startswith("data:")]
    assert local == ["desk.css", "desk.js"]
    for content in files.values():
        assert not re.search("innerHTML|outerHTML|insertAdjacentHTML|document.write", content)
        assert {*re.findall("https?://[^'\"/]*", content)} <= {"http://www.w3.org"}


def test_without_the_page_files_there_is_a_404_that_says_so_and_the_api_works(serve, tmp_path):
    alone = shutil.copy(SERVICE, tmp_path)
    service = serve(program=(alone,))
    for path in PAGE_FILES:
        status, answer = service.get(path)
        assert (status, [*answer]) == (404, ["error"])
        assert "nothing here without bookkeep_extra, which is missing" in answer["error"]
    assert service.post("/sample", [booking(account="6300")])[0] == 200
    assert service.post("/predict", booking()) == (200, ["6300"])


@IN_A_BROWSER
def test_the_page_shows_what_metrics_say_and_keeps_up(learned, visit):
    page = visit(learned)

    def shows():
        metrics, health = learned.get("/metrics/1000")[1], learned.get("/health")[1]
        report = learned.get("/report/1000")[1]
        for name in ("precision", "recall"):
            expect(page.locator(f"#{name}")).to_have_text(f"{metrics[name]:.3f}")
        expect(page.locator("#accuracy")).to_have_text(f"{report['accuracy']:.3f}")
        for name in ("samples", "accounts", "companies"):
            expect(page.locator(f"#{name}")).to_have_text(f"{health[name]:,}")

    shows()
    expect(page.locator("#curve svg")).to_have_attribute(
        "aria-label", re.compile("accuracy from 0")
    )
    assert page.locator("#curve path.line").count() == 3
    learned.post("/sample", bookings(200, seed=1))
    shows()


@IN_A_BROWSER
def test_the_form_gives_suggestions_and_reasons(learned, visit):
    page = visit(learned)
    asked = bookings(1, seed=3)[0]
    for key in FIELDS:
        page.fill(f"#try [name={key}]", asked[key])
    page.press("#try [name=BankEntryAmount]", "Enter")
    page.wait_for_selector("#suggestions li")
    suggestions = learned.post("/suggest?top=5", asked)[1]["suggestions"]
    texts = page.locator("#suggestions summary").all_inner_texts()
    for text, suggestion in zip(texts, suggestions, strict=True):
        assert suggestion["account"] in text
        assert f"{100 * suggestion['confidence']:.1f}%" in text
    first = page.locator("#suggestions details").first
    assert first.get_attribute("open") is not None
    heaviest = suggestions[0]["reasons"][0]
    expect(first).to_contain_text(heaviest["token"])
    expect(first).to_contain_text(heaviest["kind"])
    expect(first).to_contain_text(f"+{heaviest['weight']:.2f}")
    expect(first).to_contain_text(f"+{suggestions[0]['margin']:.2f}")


@IN_A_BROWSER
def test_the_form_asks_for_the_context_and_review_shows_it(serve, visit):
    service = serve("--context", "Department,Cost centre,constructor,querySelector")
    for _ in range(3):
        for place, account in (("North", "6300"), ("South", "7140")):
            service.post("/sample", [booking("acme", "rent", account=account, Department=place)])
    page = visit(service)
    for key in FIELDS:
        page.fill(f"#try [name={key}]", booking("acme", "rent")[key])
    for place, account in (("South", "7140"), ("North", "6300")):
        page.get_by_label("Department").fill(place)
        with page.expect_request("**/suggest*") as asked:
            page.click("#try button")
        sent = booking("acme", "rent", Department=place)
        del sent["AccountNumber"]
        assert asked.value.post_data_json == sent
        expect(page.locator("#suggestions b")).to_have_text(account)
        first = page.locator("#suggestions details").first
        expect(first).to_contain_text(f"{place} Department")
        expect(first).to_contain_text("this text in that Department")
    page.wait_for_timeout(2500)  # a refresh leaves what was typed
    assert page.get_by_label("Department").input_value() == "North"
    for seq, place in ((5, "South"), (4, "North")):
        page.click(f'#list [data-seq="{seq}"]')
        expect(page.locator("#facts .context")).to_have_text(["Department", place])


@IN_A_BROWSER
def test_the_page_books_what_the_service_predicts(serve, visit):
    service = serve("--target", "Vat", "--context", "AccountNumber")
    page = visit(service)
    expect(page.locator("#command")).to_contain_text('"Vat": "6300"')
    for vat in ("20", "5"):
        service.post("/sample", [booking(account="6300", Vat=vat)])
    page.click('#list [data-seq="1"]')
    page.click("#change")
    page.fill("#account", "19")
    page.press("#account", "Enter")
    says(page, "Booked to 19, no longer to 5. That was the last one.")
    expect(page.locator("#facts")).to_contain_text("6300")
    [correction] = [line for line in lines_of(service) if "corrects" in line]
    assert (correction["corrects"], correction["Vat"]) == (1, "19")
    assert service.get("/bookings/1")[1]["sample"]["AccountNumber"] == "6300"


@IN_A_BROWSER
def test_how_much_can_be_booked_unseen_of_all_companies_or_of_one(learned, visit):
    page = visit(learned, expected=["status of 404"])
    part = page.get_by_role("region", name="How much can be booked unseen")
    company = page.get_by_label("Company").first

    def shows(asked=""):
        levels = learned.get(f"/overview{asked}")[1]["confidence"]
        steps = [level for level in levels if level["at_least"] in (0, 0.5, 0.8, 0.9, 0.95, 0.99)]
        figures = [
            (shown(level["share"]), f"{shown(level['accuracy'])} ± {shown(level['error'])}")
            for level in steps
            if level["accuracy"] is not None
        ]
        rows = part.locator("tbody tr")
        expect(rows).to_have_count(6)
        for row, (share, accuracy) in enumerate(figures):
            expect(rows.nth(row).locator("td").nth(0)).to_have_text(share)
            expect(rows.nth(row).locator("td").nth(1)).to_have_text(accuracy)
        checks = f"{levels[0]['checks']} of them checks, each of which stands for"
        expect(part).to_contain_text(f"{checks} {CHECK}.")
        on = learned.get(f"/overview{asked}")[1]["switch_on"]
        expect(page.locator("#coverage-sentence")).to_have_text(
            f"Could be booked unseen: {shown(on['share'])} of the bookings, all that are at least "
            f"{on['at_least']:.0%} sure. With 95% certainty at most 2% of these would be wrong."
            if on
            else "From when on bookings could be booked unseen, nobody can know yet."
        )
        return figures

    of_all = shows()
    company.fill("company1")
    with page.expect_response("**/overview*") as answered:
        pass
    assert "company" not in answered.value.url  # it is half typed, perhaps
    company.press("Enter")
    assert shows("?company=company1") != of_all
    learned.post("/sample", bookings(3, seed=8))
    expect(page.locator("#samples")).to_have_text(f"{learned.samples():,}")
    shows("?company=company1")
    company.fill("nobody & Co.")
    company.press("Enter")
    status, answer = learned.get("/overview?company=nobody")
    assert status == 404
    told = answer["error"].capitalize() + "."
    for node in (part.get_by_role("status"), page.locator("#empty")):
        expect(node).to_have_text(told)
    expect(page.locator("#coverage")).to_be_hidden()
    expect(page.locator("#curve")).to_be_visible()
    expect(page.locator("#state")).to_have_text("Connected")
    company.fill("")
    company.press("Tab")
    expect(page.locator("#coverage")).to_be_visible()
    shows()


@IN_A_BROWSER
def test_a_filter_overtakes_what_was_asked_for_before_it(learned, visit):
    page = visit(learned)
    expect(page.locator("#coverage")).to_be_visible()
    held = []
    page.route("**/overview*", lambda route: held.append(route))
    while not held:
        page.wait_for_timeout(20)
    before = page.inner_text("#samples")
    learned.post("/sample", bookings(3, seed=9))
    page.fill("#company", "company1")
    page.press("#company", "Enter")
    with page.expect_request("**/overview?company=company1", timeout=1000):
        held.pop().continue_()
    assert page.inner_text("#samples") == before  # of all companies, which are not wanted now
    while not held:
        page.wait_for_timeout(20)
    held.pop().continue_()
    expect(page.locator("#samples")).to_have_text(f"{learned.samples():,}")


@IN_A_BROWSER
def test_the_page_tells_what_was_booked_unseen(serve, visit):
    service = serve()
    service.post("/sample", [booking()])
    service.post("/sample", [booking()] * 98)
    page = visit(service, expected=["status of 503"])
    expect(page.locator("#samples")).to_have_text("99")
    assert page.locator("#unseen").is_hidden()
    assert page.get_by_text("checks").count() == 0
    service.post(
        "/sample", [booking("B", account="7", BookedBy="suggestion"), booking(account="8")]
    )
    expect(page.locator("#unseen")).to_have_text(
        "Nobody has looked at 1 of the bookings yet: it is not learned."
    )
    expect(page.locator("#list tbody th").first).to_have_text("Booked unseen, not looked at yet")
    expect(page.locator("#list tbody tr").nth(1)).to_contain_text("B")
    page.locator("#list tbody tr").nth(1).click()
    expect(page.locator("#booked")).to_have_text("7 · unseen")
    expect(page.locator("#coverage")).to_be_visible()
    page.fill("#company", "B")
    page.press("#company", "Enter")
    expect(page.locator("#no-coverage")).to_have_text(
        "No prediction for this company could be compared with a person’s booking yet."
    )
    page.fill("#company", "")
    page.press("#company", "Enter")
    expect(page.locator("#coverage")).to_be_visible()
    service.post("/sample", [booking("B", BookedBy="check")])
    expect(page.locator("#evidence")).to_have_text(
        f"100 bookings by a person, 1 of them a check, which stands for {CHECK}"
    )


@IN_A_BROWSER
def test_the_page_says_what_a_confidence_rests_on(serve, visit):
    service = serve()
    page = visit(service)
    evidence = "with about as much evidence"
    own = f"suggestions of 6300 {evidence}"
    new = f"suggestions of any account {evidence} and nothing of the company known"
    everybodys = f"suggestions of any account {evidence} and the first two words known"
    as_roots = "were right, where n of one company count as √n"

    def book(company, **more):
        service.post("/sample", [booking(company, "rent May", account="6300", **more)])

    def says(company, *sentences):
        for key, value in zip(FIELDS, (company, "rent May", "> -1000"), strict=True):
            page.fill(f"#try [name={key}]", value)
        page.press("#try [name=CompanyId]", "Enter")
        expect(page.locator("#suggestions > p").nth(1)).to_have_text(" ".join(sentences))

    book("acme")
    says(
        "new & Co.",
        f"There are none yet of all companies’ {new}.",
    )
    book(HOSTILE)
    says(
        "newer",
        f"Of all companies’ {new}, 1 of 1 {as_roots}.",
    )
    says(
        *("acme", f"There are none yet of acme’s own {own}."),
        f"There are none yet of all companies’ {everybodys}.",
    )
    book("acme")
    says(
        *("acme", f"The only one of acme’s own {own} was right."),
        f"Of all companies’ {everybodys}, 1 of 1 {as_roots}.",
    )
    says(
        *(HOSTILE, f"The only one of {HOSTILE}’s own {own} was right."),
        f"Of all companies’ {everybodys}, 1 of 1 {as_roots}.",
    )
    book("acme", BookedBy="check")
    expect(page.locator("#samples")).to_have_text("4")
    says(
        *("acme", f"Of acme’s own 2 {own}, 2 were right."),
        f"Of all companies’ {everybodys}, 1 of 1 {as_roots}.",
    )


@IN_A_BROWSER
def test_of_a_new_company_and_new_words_it_says_that_nothing_is_known(learned, visit):
    page = visit(learned)
    for key, value in zip(FIELDS, ("new & Co.", "unheard", "< 10"), strict=True):
        page.fill(f"#try [name={key}]", value)
    page.click("#try button")
    told = page.locator("#suggestions > p").first
    expect(told).to_have_text("Nothing is known of this company yet, nor of these words.")
    assert page.locator("#suggestions li").count() == 0
    page.fill("#try [name=BankEntryText]", "shop1")
    page.click("#try button")
    expect(told).to_contain_text(
        re.compile("Nothing is known of this company yet. By what others book, most likely [0-9]+")
    )


@IN_A_BROWSER
def test_what_is_hostile_stays_text(learned, visit):
    for account in ("<b>1</b>", '"><script>document.title=2</script>'):
        sample = booking(HOSTILE, HOSTILE, HOSTILE, account, AccountName=HOSTILE)
        assert learned.post("/sample", [sample])[0] == 200
    page = visit(learned)
    page.select_option("#order", "newest")
    page.select_option("#reviewed", "yes")
    expect(page.locator("#list tbody")).to_contain_text(HOSTILE)
    page.click("#why")
    expect(page.locator("#explanation li").first).to_contain_text(re.compile("<|[0-9]"))
    page.click("#change")
    expect(page.locator("#account-list")).to_contain_text(HOSTILE)
    page.keyboard.press("Escape")
    page.click("#when a")
    expect(page.locator("#company-title")).to_have_text(HOSTILE)
    expect(page.locator("#company-latest")).to_contain_text(HOSTILE)
    for key in FIELDS:
        page.fill(f"#try [name={key}]", HOSTILE)
    page.click("#try button")
    expect(page.locator("#suggestions ol")).to_contain_text(HOSTILE)
    page.click("#forget")
    expect(page.locator("#to-type")).to_have_text(HOSTILE)
    page.wait_for_timeout(100)
    assert page.locator("img, b b").count() == 0
    assert page.title() == "bookkeep"


LONG_ACCOUNT = "3100-0042-7781"


@IN_A_BROWSER
def test_the_page_is_as_wide_as_the_window_in_light_and_dark(learned, visit):
    assert (
        learned.post("/sample", [booking("wide", "W" * 5000, "W" * 100, LONG_ACCOUNT)] * 3)[0]
        == 200
    )
    page = visit(learned)
    page.fill("#company", "wide")
    page.press("#company", "Enter")
    expect(page.locator("#company-view")).to_be_visible()
    for key, value in zip(FIELDS, ("W" * 100, HOSTILE, HOSTILE), strict=True):
        page.fill(f"#try [name={key}]", value)
    page.click("#try button")
    expect(page.locator("#suggestions > p").first).to_contain_text("Nothing is known")
    page.click("#why")
    expect(page.locator("#explanation summary").first).to_contain_text(LONG_ACCOUNT)
    for width, scheme in itertools.product((360, 800, 1400), ("light", "dark")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for place in ("#list", "#explanation summary", "#company-accounts"):
            account = page.locator(f"{place} .one-line").first
            assert account.bounding_box()["height"] < 30
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall("[0-9]+", background))) < 99) == (scheme == "dark")


@IN_A_BROWSER
def test_an_empty_service_says_what_to_do_first(serve, visit):
    service = serve()
    page = visit(service)
    expect(page.locator("#start")).to_be_visible()
    assert page.locator("#report").is_hidden()
    command = page.inner_text("#command")
    url, body = re.fullmatch(r"curl (\S+) -H '[^']+' -d '(.*)'", command, re.DOTALL).groups()
    assert url == f"http://127.0.0.1:{service.port}/sample"
    assert service.post("/sample", json.loads(body))[0] == 200
    expect(page.locator("#samples")).to_have_text("2")
    expect(page.locator("#start")).to_be_hidden()
    expect(page.locator("#list tbody td").nth(2)).to_be_hidden()  # nothing had been predicted
    expect(page.locator("#precision")).to_have_text("–")
    assert service.post("/sample", json.loads(body))[0] == 200
    expect(page.locator("#precision")).to_have_text("1.000")
    expect(page.locator("#list tbody")).to_contain_text("Office rent May")
    expect(page.locator("#coverage")).to_be_hidden()
    assert service.post("/sample", [booking()] * 100)[0] == 200
    expect(page.locator("#coverage")).to_be_visible()


@IN_A_BROWSER
def test_the_page_asks_for_the_token_once(serve, visit, monkeypatch):
    monkeypatch.setenv("BOOKKEEP_TOKEN", "s3cret")
    service = serve()
    headers = {"Authorization": "Bearer s3cret"}
    service.ask("POST", "/sample", [booking()], headers=headers)
    page = visit(service, expected=["status of 401"])
    page.fill("#token", "wrong")
    page.press("#token", "Enter")
    expect(page.locator("#access-status")).to_contain_text("refused")
    page.fill("#token", "s3cret")
    page.press("#token", "Enter")
    expect(page.locator("#samples")).to_have_text("1")
    assert page.locator("#access").is_hidden()
    page.reload()
    expect(page.locator("#samples")).to_have_text("1")
    assert "s3cret" not in page.url + page.content() + service.said()


@IN_A_BROWSER
def test_a_refresh_keeps_what_the_user_is_at(learned, visit):
    page = visit(learned)
    page.wait_for_selector("#list tbody td")
    page.fill("#try [name=BankEntryText]", "half a te")
    page.evaluate("scrollTo(0, 300)")
    page.locator("#list button").nth(3).hover()
    row = page.locator("#list tbody tr").nth(1).element_handle()
    learned.post("/sample", [by("suggestion", sample) for sample in bookings(3, seed=4)])
    expect(page.locator("#samples")).to_have_text(f"{learned.samples():,}")
    assert page.evaluate("document.activeElement.name") == "BankEntryText"
    assert page.input_value("#try [name=BankEntryText]") == "half a te"
    assert page.evaluate("scrollY") == 300
    expect(page.locator("#reload")).to_be_visible()
    assert row.evaluate("row => row.isConnected")  # the list waits until one wants it anew
    page.click("#reload")
    expect(page.locator("#reload")).to_be_hidden()


@IN_A_BROWSER
def test_a_page_whose_service_has_gone_says_so_and_recovers(serve, visit):
    service = serve()
    service.post("/sample", [booking()])
    page = visit(service, expected=["ERR_CONNECTION_REFUSED"])
    expect(page.locator("#state")).to_have_text("Connected")
    service.stop()
    expect(page.locator("#state")).to_contain_text("Not reachable; last figures from")
    service = serve(port=service.port)
    service.post("/sample", [booking()])
    expect(page.locator("#state")).to_have_text("Connected")
    expect(page.locator("#samples")).to_have_text("2")


@pytest.fixture
def desk(serve):
    """A service with 40 bookings of two companies, the last 20 of them booked unseen."""
    service = serve()
    merchants = [("rent", "6300", "Office costs"), ("train", "7140", "Travel")]
    sure = [
        booking(company, f"{text} {n}", account=account, AccountName=name)
        for n in range(10)
        for company, (text, account, name) in zip(("acme", "b&b"), merchants, strict=True)
    ]
    assert service.post("/sample", sure[:2])[0] == 200
    assert service.post("/sample", sure[2:])[0] == 200
    unseen = [by("suggestion", sample | {"BankEntryDate": "2026-05-17"}) for sample in sure]
    assert service.post("/sample", unseen)[0] == 200
    return service


def standing_of(service, seq):
    """The account of a booking, and whether a person has looked at it."""
    status, found = service.get(f"/bookings/{seq}")
    assert status == 200
    return found["account"], found["reviewed"]


def lines_of(service):
    status, _, log = service.ask("GET", "/samples", kind="application/jsonl")
    assert status == 200
    return [json.loads(line) for line in log.splitlines()]


def corrections_of(service):
    return [(r["corrects"], r["AccountNumber"]) for r in lines_of(service) if "corrects" in r]


def chosen(page):
    return int(page.locator("#list [aria-current]").get_attribute("data-seq"))


def says(page, text):
    expect(page.locator("#review-status")).to_have_text(text)


@IN_A_BROWSER
def test_ten_are_reviewed_by_keys_one_is_changed_and_taken_back(desk, visit):
    page = visit(desk)
    rows = page.locator("#list tbody td:first-child")
    expect(rows).to_have_count(10)
    seqs = [int(row.get_attribute("data-seq")) for row in page.locator("#list [data-seq]").all()]
    assert all(desk.get(f"/bookings/{seq}")[1]["reviewed"] is False for seq in seqs)
    for place, seq in enumerate(seqs[:9], start=1):
        assert chosen(page) == seq
        page.keyboard.press("c")
        expect(page.locator("#session summary")).to_have_text(
            f"This session: {place} confirmed, 0 changed"
        )
        says(page, f"Confirmed {standing_of(desk, seq)[0]}.")
    confirmed = [(seq, standing_of(desk, seq)[0]) for seq in seqs[:9]]
    assert corrections_of(desk) == confirmed
    assert all(standing_of(desk, seq)[1] for seq in seqs[:9])
    last, was = seqs[9], standing_of(desk, seqs[9])[0]
    assert chosen(page) == last
    page.keyboard.press("a")
    expect(page.locator("#account-list li").first).to_contain_text("now")
    page.keyboard.type("new account, c j u")  # no key of the page while one types
    expect(page.locator("#account-list li")).to_contain_text("new here")
    assert chosen(page) == last
    page.fill("#account", "7200")
    page.keyboard.press("Enter")
    says(page, f"Booked to 7200, no longer to {was}.")
    assert standing_of(desk, last) == ("7200", True)
    assert chosen(page) != last  # the next one was fetched
    page.keyboard.press("u")
    says(page, f"Back to {was}.")
    assert standing_of(desk, last) == (was, True)
    assert corrections_of(desk) == [*confirmed, (last, "7200"), (last, was)]
    assert chosen(page) == last
    expect(page.locator("#session summary")).to_have_text("This session: 9 confirmed, 0 changed")
    page.reload()
    expect(page.locator("#session li")).to_have_count(9)
    page.locator("#session li button").first.click()
    says(page, re.compile("^Back on the desk, but learned as"))
    expect(page.locator("#session li")).to_have_count(8)


@IN_A_BROWSER
def test_the_buttons_do_what_the_keys_do(desk, visit):
    page = visit(desk)
    expect(page.locator("#list [data-seq]")).to_have_count(10)
    first = chosen(page)
    page.click("#next")
    second = chosen(page)
    page.click("#previous")
    assert (chosen(page), second) != (second, first)
    page.click("#previous")
    says(page, re.compile("That was the first one."))
    page.locator("#list button").nth(4).focus()
    page.keyboard.press("ArrowDown")
    fifth = chosen(page)
    page.keyboard.press("k")
    assert chosen(page) != fifth
    page.click("#why")
    expect(page.locator("#explanation > p").first).to_contain_text("Most likely")
    page.click(f"[data-seq='{second}']")
    page.click("#change")
    page.fill("#account", "office")  # by its name, which only the other company uses
    expect(page.locator("#account-list")).not_to_contain_text("Travel")
    page.fill("#account", "tra" if standing_of(desk, second)[0] == "7140" else "off")
    page.locator("#account-list li").first.click()
    says(page, re.compile("^Confirmed (6300|7140)"))
    assert standing_of(desk, second)[1]
    page.click("#undo")
    says(page, re.compile("^Back on the desk"))
    page.click("#more")
    expect(page.locator("#list [data-seq]")).to_have_count(35)


@IN_A_BROWSER
def test_what_looks_wrong_is_confirmed_or_changed_by_the_same_keys(desk, visit):
    right = {"office rent": ("6300", "Office costs"), "train to": ("7140", "Travel")}
    booked = [
        booking("acme", f"{text} {n}", str(n), account, AccountName=name)
        for n in range(1, 40)
        for text, (account, name) in right.items()
    ]
    wrong = {60: ("7140", "Travel"), 71: ("6300", "Office costs")}
    for seq, (account, name) in wrong.items():
        booked[seq - 40] |= {"AccountNumber": account, "AccountName": name}
    assert desk.post("/sample", booked)[0] == 200
    found = desk.get("/suspects")[1]["suspects"]
    assert {each["seq"] for each in found[:2]} == {*wrong}
    page = visit(desk)
    page.select_option("#reviewed", "wrong")
    rows = page.locator("#list [data-seq]")
    expect(rows).to_have_count(len(found))
    expect(page.locator("#list tbody th")).to_have_text("Looks wrong, the most probable first")
    first, second = found[:2]
    assert chosen(page) == first["seq"]
    expect(rows.first).to_contain_text(shown(first["probability"]))
    expect(page.locator("#doubt")).to_contain_text(f"Likelier is {first['likely']}")
    others = (
        f"of {first['alike']} other bookings with the same {first['like']}, {first['on_likely']} on"
    )
    expect(page.locator("#doubt")).to_contain_text(others)
    page.keyboard.press("w")
    expect(page.locator("#explanation li").first).to_be_visible()
    page.keyboard.press("c")
    says(page, f"Confirmed {first['account']}.")
    assert chosen(page) == second["seq"]
    page.keyboard.press("a")
    expect(page.locator("#account-list li").first).to_contain_text(second["likely"])
    page.keyboard.press("Enter")
    says(page, re.compile(f"^Booked to {second['likely']}, no longer to {second['account']}."))
    expected = [(first["seq"], first["account"]), (second["seq"], second["likely"])]
    assert corrections_of(desk) == expected
    left = {each["seq"] for each in desk.get("/suspects")[1]["suspects"]}
    page.reload()
    page.select_option("#reviewed", "wrong")
    expect(rows).to_have_count(len(left))
    assert not left & {seq for seq, _ in expected}
    page.select_option("#reviewed", "no")
    expect(page.locator("#how-sure")).to_have_text("Confidence")
    expect(page.locator("#doubt")).to_be_hidden()


@IN_A_BROWSER
def test_the_list_is_filtered_by_company_confidence_and_order(desk, visit):
    desk.post("/sample", [booking("acme", "unlike all", account="1")])
    page = visit(desk)
    expect(page.locator("#list [data-seq]")).to_have_count(10)

    def lists(query):
        found = desk.get(f"/bookings?limit=10&{query}")[1]["bookings"]
        for place, each in enumerate(found):
            at = page.locator("#list [data-seq]").nth(place)
            expect(at).to_have_attribute("data-seq", str(each["seq"]))

    lists("reviewed=no&order=confidence")
    page.select_option("#order", "newest")
    lists("reviewed=no&order=newest")
    page.keyboard.press("Escape")
    page.select_option("#reviewed", "yes")
    lists("reviewed=yes&order=newest")
    page.select_option("#below", "0.5")
    lists("reviewed=yes&order=newest&below=0.5")
    page.select_option("#below", "")
    page.locator("#review-title").click()
    page.keyboard.press("/")
    page.keyboard.type("b&")
    expect(page.locator("#company-list li").first).to_have_text("b&b")
    page.keyboard.press("Enter")
    lists("reviewed=yes&order=newest&company=b%26b")
    assert page.url.endswith("#company=b%26b")
    page.go_back()
    lists("reviewed=yes&order=newest")


def downloaded(page, folder):
    """The CSV file of the company that the page shows: its name and its rows."""
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(folder / "download.csv")
    with open(folder / "download.csv", encoding="utf-8-sig", newline="") as file:
        return download.value.suggested_filename, [*csv.DictReader(file)]


@IN_A_BROWSER
def test_a_company_has_a_view_a_csv_file_and_an_end(desk, visit, tmp_path):
    texts = ["=cmd|' /C calc'!A0", '+47 "x;\t"=1";-2,\r\n@y']
    odd = [
        booking("acme", texts[0], "-9875.50", "6300", AccountName="Office costs"),
        booking("acme", texts[1], "> -1000", "7140", AccountName="Travel"),
    ]
    odd = [sample | {"AccountTypeName": "Expenses"} for sample in odd]
    *_, last = range(desk.post("/sample", odd)[1]["last"] + 1)
    for seq in (last, 20):
        assert desk.post("/correct", {"seq": seq, "AccountNumber": "6300"})[0] == 200
    page = visit(desk, expected=["status of 404"])
    page.locator("#list [data-seq]").first.wait_for()
    page.goto(f"http://127.0.0.1:{desk.port}/#company=acme")
    own = page.get_by_role("region", name="acme", exact=True)
    expect(own).to_contain_text("Bookings22")
    report = desk.get("/report/1000?company=acme")[1]
    expect(own).to_contain_text(f"{shown(report['accuracy'])} precision {report['precision']:.3f}")
    for level in report["confidence"][2:4]:
        words = f"Could be booked unseen from {level['at_least']:.0%} confidence on"
        expect(own).to_contain_text(words + shown(level["share"]))
    expect(page.locator("#company-accounts tbody tr")).to_have_text("6300 Office costs22–")
    expect(page.locator("#company-latest tbody tr").first).to_contain_text("@y")
    file, rows = downloaded(page, tmp_path)
    assert file == "acme.csv"
    assert [row["Seq"] for row in rows[-2:]] == [str(last - 1), str(last)]
    assert [row["BankEntryAmount"] for row in rows[-2:]] == ["-9875.50", "> -1000"]
    assert [row["BankEntryText"] for row in rows[-2:]] == [guarded(text) for text in texts]
    assert [row["AccountNumber"] for row in rows] == ["6300"] * 22
    assert rows[-1]["AccountName"] == "Office costs"  # not the name of the account it was on
    assert [row["AccountTypeName"] for row in rows[-2:]] == ["Expenses", ""]  # nor its type
    assert Counter(row["Reviewed"] for row in rows) == {"true": 13, "false": 9}
    assert Counter(row["BookedBy"] for row in rows) == {"": 12, "person": 1, "suggestion": 9}
    page.click("#forget")
    submit = page.get_by_role("button", name="Forget it")
    expect(submit).to_be_disabled()
    page.fill("#typed", "b&b")
    expect(submit).to_be_disabled()
    page.keyboard.press("Escape")
    assert desk.get("/report/1000?company=acme")[0] == 200
    page.click("#forget")
    page.fill("#typed", "acme")
    submit.click()
    says(page, "22 bookings are forgotten.")
    assert desk.get("/report/1000?company=acme")[0] == 404
    expect(page.locator("#company-view")).to_be_hidden()
    expect(page.locator("#list tbody")).not_to_contain_text("acme")


@IN_A_BROWSER
def test_a_csv_file_has_all_bookings_of_a_company_and_all_their_keys(serve, visit, tmp_path):
    service = serve()
    plain = [
        booking(company, f"rent {n}", AccountTypeName="Costs")
        for n in range(1200)
        for company in ("A/B", "other")
    ]
    odd = {"__proto__": "p", "constructor": "c", "toString": "t", "=1+1": "f", "Seq 2": "s"}
    for batch in (plain, [booking("A/B") | odd], plain[:2]):
        assert service.post("/sample", batch)[0] == 200
    assert service.post("/correct", {"seq": 4, "AccountNumber": "7140"})[0] == 200
    assert service.post("/correct", {"seq": 4, "AccountNumber": "3115"})[0] == 200
    page = visit(service)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"http://127.0.0.1:{service.port}/#company=A/B")
    expect(page.locator("#company-view")).to_be_visible()
    file, rows = downloaded(page, tmp_path)
    assert file == "A-B.csv"
    assert [int(row["Seq"]) for row in rows] == [*range(0, 2401, 2), 2401]
    assert {row["AccountNumber"] for row in rows} == {"3115"}
    assert [row["AccountTypeName"] for row in rows] == ["Costs"] * 1200 + ["", "Costs"]
    names = {name: f"'{name}" if name == "=1+1" else name for name in odd}
    for key, value in odd.items():
        values = [row[names[key]] for row in rows]
        assert values == [""] * 1200 + [value, ""]
    assert not any("/samples" in url for url in asked)
    assert sum("limit=500&before=" in url for url in asked) >= 2


@IN_A_BROWSER
def test_an_account_is_called_as_its_own_company_calls_it(desk, visit):
    theirs = booking("other", "rent 3", account="6300", AccountName="Warehouse")
    assert desk.post("/sample", [by("suggestion", theirs)])[0] == 200
    page = visit(desk)
    lines = page.locator("#list tbody tr[data-seq]")
    for company, name in (("acme", "Office costs"), ("other", "Warehouse")):
        expect(lines.filter(has_text=company).first).to_contain_text(f"6300 {name}")


@IN_A_BROWSER
def test_two_tabs_do_not_undo_each_other(desk, visit):
    one, other = visit(desk), visit(desk, expected=["status of 404"])
    for page in (one, other):
        page.locator("#list [data-seq]").first.wait_for()
    seq, was = chosen(one), standing_of(desk, chosen(one))[0]
    assert chosen(other) == seq
    one.keyboard.press("a")
    one.keyboard.type("7999")
    one.keyboard.press("Enter")
    says(one, f"Booked to 7999, no longer to {was}.")
    other.keyboard.press("c")
    says(other, "Meanwhile it was booked to 7999. Nothing was changed.")
    assert corrections_of(desk) == [(seq, "7999")]
    expect(other.locator("#booked")).to_contain_text("7999")
    other.keyboard.press("a")
    other.keyboard.type("8000")
    other.keyboard.press("Enter")
    says(other, "Booked to 8000, no longer to 7999.")
    one.keyboard.press("u")
    says(one, "Meanwhile it was booked to 8000. Nothing was changed.")
    assert standing_of(desk, seq) == ("8000", True)
    company = desk.get(f"/bookings/{chosen(other)}")[1]["sample"]["CompanyId"]
    desk.delete(f"/company/{quote(company)}")
    gone = chosen(other)
    other.keyboard.press("c")
    expect(other.locator("#review-status")).to_contain_text("There is no booking")
    expect(other.locator(f"[data-seq='{gone}']")).to_have_count(0)


@IN_A_BROWSER
def test_what_the_service_refuses_is_said_in_a_sentence(desk, visit, tmp_path, serve):
    page = visit(desk, expected=["status of 5", "status of 413", "ERR_"])
    page.locator("#list [data-seq]").first.wait_for()
    seq, before = chosen(page), corrections_of(desk)
    log = tmp_path / "log.jsonl"
    log.rename(tmp_path / "elsewhere")
    page.keyboard.press("c")
    expect(page.locator("#review-status.error")).to_have_text(re.compile(r"^The log .*\.$"))
    (tmp_path / "elsewhere").rename(log)
    page.context.set_offline(True)
    page.keyboard.press("c")
    says(page, "The service is not reachable.")
    page.context.set_offline(False)
    assert (chosen(page), corrections_of(desk)) == (seq, before)
    desk.stop()
    service = serve("--max-body=20", port=desk.port)
    page.keyboard.press("c")
    says(page, "Send at most 20 bytes in one request.")
    service.stop()
    service = serve(port=desk.port)
    page.keyboard.press("c")
    says(page, re.compile("^Confirmed"))
    assert corrections_of(service) == [(seq, standing_of(service, seq)[0])]


@IN_A_BROWSER
def test_reviewing_works_with_a_token(desk, visit, serve, monkeypatch):
    desk.stop()
    monkeypatch.setenv("BOOKKEEP_TOKEN", "s3cret")
    service = serve()
    page = visit(service, expected=["status of 401"])
    page.fill("#token", "s3cret")
    page.press("#token", "Enter")
    page.locator("#list [data-seq]").first.wait_for()
    page.locator("#review-title").click()
    page.keyboard.press("c")
    says(page, re.compile("^Confirmed"))
    page.goto(f"http://127.0.0.1:{service.port}/#company=acme")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "acme.csv"


@IN_A_BROWSER
@pytest.mark.parametrize("may_change", [True, False])
def test_with_the_token_of_a_company_the_page_is_of_this_company(
    desk, visit, serve, monkeypatch, may_change
):
    desk.stop()
    secret = "0123456789abcdef0123456789abcdef"
    monkeypatch.setenv("BOOKKEEP_TOKEN", secret)
    service = serve()
    page = visit(service, expected=["status of 401", "status of 404"])
    page.goto(f"http://127.0.0.1:{service.port}/#company=acme")
    page.fill("#token", company_token(secret, Access("b&b", may_change), time.time() + 600))
    page.press("#token", "Enter")
    expect(page.locator("#company-title")).to_have_text("b&b")
    expect(page.locator("#samples")).to_have_text("20")
    expect(page.locator("#list [data-seq]").first).to_contain_text("train")
    expect(page.locator("#report")).not_to_contain_text(re.compile("acme|rent"))
    for name in ("#company", "#all-companies", "#companies"):
        expect(page.locator(name)).to_be_hidden()
    for name in ("#confirm", "#change", "#undo", "#forget"):
        expect(page.locator(name)).to_be_visible(visible=may_change)
    seq = chosen(page)
    page.locator("#review-title").click()
    page.keyboard.press("c")
    if may_change:
        says(page, re.compile("^Confirmed 7140."))
    page.keyboard.press("w")
    expect(page.locator("#explanation")).to_contain_text("7140")
    page.fill("#try [name=BankEntryText]", "train 3")
    page.fill("#try [name=BankEntryAmount]", "> -1000")
    page.press("#try [name=BankEntryAmount]", "Enter")
    expect(page.locator("#suggestions ol li").first).to_contain_text("7140")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "b-b.csv"
    headers = {"Authorization": f"Bearer {secret}"}
    standing = service.ask("GET", f"/bookings/{seq}", headers=headers)[2]
    assert standing["reviewed"] == may_change
    if may_change:
        page.click("#forget")
        page.fill("#typed", "b&b")
        page.get_by_role("button", name="Forget it").click()
        expect(page.locator("#start")).to_be_visible()
        expect(page.locator("#start")).to_contain_text('{"CompanyId": "b&b", ')
        assert service.ask("GET", "/health", headers=headers)[2]["samples"] == 20


@IN_A_BROWSER
def test_the_keys_are_shown_and_can_be_turned_off(desk, visit):
    page = visit(desk)
    page.locator("#list [data-seq]").first.wait_for()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_contain_text("take the last change back")
    page.uncheck("#keys-on")
    page.get_by_role("button", name="Close").click()
    first = chosen(page)
    page.keyboard.press("j")
    page.keyboard.press("c")
    page.reload()
    page.locator("#list [data-seq]").first.wait_for()
    page.keyboard.press("c")
    page.click("#help")
    page.check("#keys-on")
    page.keyboard.press("c")  # within the dialog
    page.keyboard.press("Escape")
    page.focus("#try button")
    page.keyboard.press("c")  # far from the list
    page.evaluate("document.activeElement.blur()")
    assert (chosen(page), corrections_of(desk)) == (first, [])
    page.keyboard.press("Control+c")
    page.keyboard.press("j")
    assert chosen(page) != first
    assert corrections_of(desk) == []


@IN_A_BROWSER
def test_axe_finds_nothing_to_object_to_in_any_state(learned, serve, visit):
    colours = {"resultTypes": ["violations"], "runOnly": ["color-contrast"]}

    def fine(page):
        for scheme, options in (("dark", colours), ("light", {"resultTypes": ["violations"]})):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            found = Axe().run(page, options=options)
            assert found.violations_count == 0, found.generate_report()

    fine(visit(serve()))
    page = visit(learned, viewport={"width": 1300, "height": 900})
    page.locator("#list [data-seq]").first.wait_for()
    expect(page.locator("#coverage tbody tr")).to_have_count(6)
    page.keyboard.press("w")
    page.wait_for_selector("#explanation li")
    page.keyboard.press("a")
    expect(page.locator("#account-list li").first).to_be_visible()
    fine(page)
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    page.locator("#session li").wait_for()
    page.keyboard.press("?")
    fine(page)
    page.keyboard.press("Escape")
    page.set_viewport_size({"width": 360, "height": 800})
    page.fill("#company", "company1")
    page.press("#company", "Enter")
    page.locator("#company-latest tbody tr").first.wait_for()
    fine(page)
    page.click("#forget")
    fine(page)
