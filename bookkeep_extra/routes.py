"""The requests that the service can do without: reports, bookings, the page, the API's description.

Each is a route as those of bookkeep.py are, which says what it takes by `takes`.
"""

from functools import partial
from pathlib import Path

from bottle import Bottle, request, response

from bookkeep import (
    FRACTION,
    FROM_ONE,
    ID,
    TEXT,
    WHOLE_NUMBER,
    YES_OR_NO,
    Bookkeeper,
    NotFound,
    Schema,
    takes,
)
from bookkeep_extra import openapi, views
from bookkeep_extra.suspects import suspects

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_END: Schema = {
    "type": "string",
    "pattern": r"^[0-9]{1,20}(\.[0-9]{1,20})?(e-[0-9]{1,3})?:[0-9]{1,18}$",
    "title": "what the page before says is `next`",
}
A_PAGE = {"limit": FROM_ONE | {"maximum": views.MAX_PAGE, "default": 50}, "before": PAGE_END}


def add(app: Bottle, keeper: Bookkeeper, max_batch: int, max_body: int, guarded: bool) -> None:
    """Adds these routes to an app, which has such limits and, if guarded, a token."""

    @app.get("/report/<n>")
    @takes(
        {
            "n": FROM_ONE,
            "company": TEXT,
            "book_from": FRACTION,
            "wrong": FRACTION | {"minimum": 0.001, "maximum": 0.5, "default": views.WRONG},
        },
        of="company",
    )
    def get_report(n: int, *asked: object) -> dict:
        return views.report(keeper.books, n, *asked)

    @app.get("/bookings")
    @takes(
        {
            "company": TEXT,
            ID: TEXT,
            "reviewed": YES_OR_NO,
            "below": FRACTION,
            "order": {"type": "string", "enum": ["newest", "confidence"], "default": "newest"},
            **A_PAGE,
        },
        of="company",
    )
    def get_bookings(company, id, reviewed, below, order, limit, before) -> dict:
        if id is not None:
            if company is None:  # which the API's description cannot ask for
                raise NotFound(f"say whose {ID} it is, as in /bookings?company=acme&{ID}=17")
            return _page([views.booking(keeper, keeper.seq_of(company, id))], None)
        asked = {
            "reviewed": reviewed and reviewed == "yes",
            "below": below,
            "least_sure": order == "confidence",
            "before": _end(before),
        }
        return _page(*views.bookings(keeper, limit, company, **asked))

    @app.get("/bookings/<seq>")
    @takes({"seq": WHOLE_NUMBER}, of="booking")
    def get_booking(seq: int) -> dict:
        return views.booking(keeper, seq)

    @app.get("/suspects")
    @takes({"company": TEXT, **A_PAGE}, of="company")
    def get_suspects(company: str | None, limit: int, before: str | None) -> dict:
        return _page(*suspects(keeper, limit, company, _end(before)), name="suspects")

    @app.get("/overview")
    @takes({"company": TEXT}, of="company")
    def get_overview(company: str | None) -> dict:
        return views.overview(keeper, company, request.environ["bookkeep.access"])

    @app.get("/openapi.json")
    @takes(of="nobody")
    def get_openapi() -> dict:
        return openapi.describe(app.routes, max_batch, max_body, guarded, keeper.books.target)

    for path, name, media in (
        ("/", "index.html", "text/html"),
        ("/desk.css", "desk.css", "text/css"),
        ("/desk.js", "desk.js", "text/javascript"),
    ):
        text = (Path(__file__).parent / "page" / name).read_text(encoding="utf-8")
        app.get(path, callback=takes(of="nobody")(partial(_file, text, media)))


def _file(text: str, media: str) -> str:
    response.set_header("Content-Security-Policy", PAGE_POLICY)
    response.content_type = f"{media}; charset=utf-8"
    return text


def _page(found: list[dict], end: tuple[float, int] | None, name: str = "bookings") -> dict:
    return {name: found, "next": end and "{}:{}".format(*end)}


def _end(text: str | None) -> tuple[float, int] | None:
    """The share and the seq in what fits PAGE_END."""
    share, _, seq = (text or "").partition(":")
    return (float(share), int(seq)) if text else None
