"""Tokens for one company: what they give access to, and that it is nothing of others."""

import base64
import json
import re
import time
from argparse import Namespace
from io import BytesIO
from urllib.parse import urlencode

import pytest

import bookkeep
from bookkeep import Access, BadRequest
from bookkeep_extra.tokens import company_token, print_token
from conftest import SERVICE, booking, by, run

SECRET = "0123456789abcdef0123456789abcdef"
OWN, OTHER = "acme", "zett & co/7"
TRACES = re.compile("zett|zeppelin|zeta|zinc")  # of what the other has


def token(company=OWN, may_change=True, expires=None, secret=SECRET):
    return company_token(secret, Access(company, may_change), expires or time.time() + 60)


class Asker:
    """Sends requests to an app with a token: it gives the status and the answer as a text."""

    def __init__(self, app, token):
        self.app, self.token = app, token

    def __call__(self, method, path, content=None, key=None):
        body = b"" if content is None else json.dumps(content).encode()
        path, _, query = path.partition("?")
        environ = {
            **{"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query},
            **{"SERVER_NAME": "x", "SERVER_PORT": "80", "wsgi.url_scheme": "http"},
            **{"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(body))},
            **{"wsgi.input": BytesIO(body), "HTTP_AUTHORIZATION": f"Bearer {self.token}"},
            **({"HTTP_IDEMPOTENCY_KEY": key} if key else {}),
        }
        started = []
        answer = b"".join(self.app(environ, lambda *start: started.append(start)))
        return int(started[0][0][:3]), answer.decode()

    def get(self, path):
        status, answer = self("GET", path)
        return json.loads(answer) if status == 200 else status


@pytest.fixture
def app(keeper):
    """A service with a token that two companies have taught: their words are their own."""
    for number in range(20):
        keeper.book([booking(OWN, f"rent {number}", account="3000")])
        keeper.book([booking(OTHER, f"zeppelin {number}", account="zeta", zone="zinc")])
    keeper.book([by("suggestion", booking(OTHER, "zeppelin"))])
    return bookkeep.create_app(keeper, SECRET)


def aimed(content, company, seq):
    """An example of a body, about this company and booking instead."""
    if isinstance(content, list):
        return [aimed(each, company, seq) for each in content]
    if isinstance(content, dict):
        instead = {"CompanyId": company, "seq": seq, "BankEntryText": "rent"}
        return {key: instead.get(key, aimed(each, company, seq)) for key, each in content.items()}
    return content


def requests(app, company, seq):
    """For every operation that is described: requests, and whether they name company or booking."""
    described = Asker(app, SECRET).get("/openapi.json")
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            values = {each["name"]: each["example"] for each in operation["parameters"]}
            values |= {"company": company, "id": company, "seq": seq}
            needed = {each["name"] for each in operation["parameters"] if each["required"]}
            optional = {each["name"] for each in operation["parameters"]} & {"company"}
            content = None
            if "requestBody" in operation:
                example = operation["requestBody"]["content"]["application/json"]["example"]
                content = aimed(example, company, seq)
            for names in (needed, needed | optional) if optional else (needed,):
                filled = path
                for name in names:
                    filled = filled.replace(f"{{{name}}}", f"{values[name]}")
                query = urlencode({n: values[n] for n in names if f"{{{n}}}" not in path})
                named = names & {"company", "id", "seq"} or content is not None
                yield method.upper(), filled + (query and f"?{query}"), content, bool(named)


def standing(app, company):
    """All that is booked for a company."""
    asks = Asker(app, SECRET)
    return asks.get(f"/bookings?{urlencode({'company': company, 'limit': 500})}")["bookings"]


REFUSED = {"/samples", "/metrics"}  # whatever they are about
CHANGES = {"/sample", "/correct", "/company"}


@pytest.mark.parametrize("may_change", [True, False])
def test_no_operation_gives_or_changes_anything_of_another_company(app, may_change):
    asks = Asker(app, token(may_change=may_change))
    before = standing(app, OTHER)
    others, nobodys = requests(app, OTHER, before[0]["seq"]), requests(app, "nobody", 999)
    for (*request, named), (*none, _) in zip(others, nobodys, strict=True):
        status, answer = asks(*request)
        if named:
            assert (status, answer) == asks(*none), request  # as if there were no such company
            assert status in (403, 404), request
        else:
            assert status in (200, 403), request
            assert not TRACES.search(answer), request
    assert standing(app, OTHER) == before


@pytest.mark.parametrize("may_change", [True, False])
def test_all_operations_but_two_are_for_a_company_itself(app, keeper, may_change):
    asks = Asker(app, token(may_change=may_change))
    other, own = standing(app, OTHER), standing(app, OWN)
    for *request, _ in sorted(requests(app, OWN, own[0]["seq"]), key=lambda each: each[0] < "G"):
        if request[0] != "DELETE" or request == ["DELETE", f"/company?id={OWN}", None]:
            status, answer = asks(*request)
            path = re.match("/[a-z]*", request[1])[0]
            is_refused = request[1] in REFUSED or (path in CHANGES and not may_change)
            assert status == (403 if is_refused else 200), (request, answer)
            assert path == "/suggest" or not TRACES.search(answer), request
    assert standing(app, OTHER) == other
    assert len(keeper.books.history.of(OWN)) == (0 if may_change else len(own))  # it forgot itself


def test_an_id_finds_nothing_of_another_company(app, keeper):
    asks, content = Asker(app, token()), {"AccountNumber": "3000", "Id": "17"}
    keeper.book([booking(OTHER, account="zeta") | {"Id": "17"}])
    before = standing(app, OTHER)
    for status, company in ((404, OTHER), (404, "nobody"), (404, OWN)):
        query = urlencode({"company": company, "Id": "17"})
        assert asks("POST", "/correct", content | {"CompanyId": company})[0] == status
        assert asks.get(f"/bookings?{query}") == asks.get("/bookings?Id=17") == status
    assert asks("POST", "/sample", [booking(OWN, account="3000") | {"Id": "17"}])[0] == 200
    assert asks("POST", "/correct", content | {"CompanyId": OWN})[0] == 200
    [found] = asks.get("/bookings?Id=17")["bookings"]
    assert found["sample"]["CompanyId"] == OWN
    assert standing(app, OTHER) == before


def test_what_a_company_is_told_does_not_change_as_others_book(app, keeper):
    asks = Asker(app, token())
    paths = (
        "/overview",
        "/health",
        "/metrics/9",
        "/report/9",
        "/bookings?below=0.5",
        "/bookings/0",
    )

    def told():
        answers = [asks.get(path) for path in paths]
        for health in (answers[0]["health"], answers[1]):
            del health["uptime"]
        return answers

    before = told()
    assert (before[0]["company"], before[0]["may_change"]) == (OWN, True)
    assert before[1] == before[0]["health"]
    assert before[1] == {
        **{"status": "ok", "samples": 20, "unseen": 0, "checks": 0, "lines": 20, "accounts": 1}
    }
    assert before[3] == Asker(app, SECRET).get(f"/report/9?company={OWN}")
    keeper.book([booking(OTHER, f"zebra {number}", account="zoo") for number in range(300)])
    keeper.correct(1, "zoo")
    assert told() == before
    keeper.correct(0, "3001")
    assert told()[1]["lines"] == 21


def test_the_page_of_a_company_without_bookings_has_figures(app):
    asks = Asker(app, token("new"))
    overview = asks.get("/overview")
    assert (overview["company"], overview["health"]["samples"], overview["curve"]) == ("new", 0, [])
    assert asks.get("/report/9") == asks.get("/bookings") == 404


def test_two_companies_may_use_one_key(app, keeper):
    for name, first in ((OWN, 41), (OTHER, 42), (OWN, 41)):
        status, answer = Asker(app, token(name))("POST", "/sample", [booking(name)], key="june")
        assert (status, json.loads(answer)["first"]) == (200, first)
    assert Asker(app, token())("POST", "/sample", [booking(OWN, "x")], key="june")[0] == 422
    assert Asker(app, SECRET)("POST", "/sample", [booking(OWN)], key="june")[0] == 200
    assert len(keeper.log) == 44


def test_a_list_with_one_booking_of_another_is_refused_whole(app, keeper):
    for path in ("/sample", "/predict", "/suggest"):
        status, answer = Asker(app, token())("POST", path, [booking(OWN), booking(OTHER)])
        assert (status, TRACES.search(answer)) == (404, None)
    assert len(keeper.log) == 41


def test_a_route_that_does_not_say_whose_it_is_is_refused_to_companies(app):
    @app.get("/added")
    @bookkeep.takes({"company": bookkeep.TEXT})
    def added(company):
        return {"told": True}

    assert Asker(app, SECRET).get("/added") == {"told": True}
    assert Asker(app, token()).get(f"/added?company={OWN}") == 403


def test_only_a_token_as_it_was_made_is_taken_until_it_ends(app):
    def status(token):
        return Asker(app, token)("GET", "/metrics/9")[0]

    made = token()
    assert status(made) == 200
    said, _, signature = made.partition(".")
    for at in range(len(made)):
        assert status(made[:at] + ("A" if made[at] != "A" else "B") + made[at + 1 :]) == 401
    deep = base64.urlsafe_b64encode(b"[" * 9000).decode()
    others = [
        said,
        f"{said}.",
        f".{signature}",
        f"{deep}.{signature}",
        f"{made}=",
        "\xff.\xff",
        ".",
    ]
    others += [token(expires=time.time() - 1), token(secret=SECRET[::-1]), f"{said}.{made}"]
    assert {*map(status, others)} == {401}
    assert Asker(app, token(expires=time.time() - 1)).get("/health")["samples"] == 41  # as to all


def test_the_command_prints_a_token(app, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    asked = {"token_file": secret, "company": OWN, "read_only": False, "days": 1}
    assert print_token(Namespace(**asked)) == 0
    made = capsys.readouterr().out.strip()
    assert made == token(expires=json.loads(base64.urlsafe_b64decode(made.split(".")[0]))[2])
    assert Asker(app, made).get("/overview")["may_change"]
    with pytest.raises(BadRequest, match="CompanyId is empty"):
        print_token(Namespace(**asked | {"company": ""}))
    command = (SERVICE, f"--token-file={secret}", "token", "--company=Bücher", "--read-only")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    status, out, said = run(*command, env=plain)
    overview = Asker(app, out.strip()).get("/overview")
    assert (overview["company"], overview["may_change"]) == ("Bücher", False)
    secret.write_text(SECRET[1:])
    status, out, said = run(*command)
    assert (status, out) == (1, "")
    assert said.startswith("bookkeep: give the service's own token, ")
    assert said.count("\n") == 1
