"""The description of the service's API, in OpenAPI 3.1: GET /openapi.json.

It is made from the service's routes: paths, parameters, their limits and whether there is a
body are what the service itself goes by. Here stands what a route does not say: texts, examples,
and the schemas of what is sent and answered.
"""

import json
from collections import defaultdict
from collections.abc import Iterable

from bottle import Route

import bookkeep
from bookkeep import BOOKED_BY, ID, MAX_SHORT, MAX_VALUE, NAME, TARGET, Schema
from bookkeep_extra.suspects import LIKE
from bookkeep_extra.views import LEAST_SURE, MAX_PAGE

# ---------------------------------------------------------------------------------------- Schemas


def _of(name: object, section: str = "schemas") -> Schema:
    return {"$ref": f"#/components/{section}/{name}"}


def _list(name: str, **limits: int) -> Schema:
    return {"type": "array", "items": _of(name), **limits}


def _one_of(words: Iterable[str]) -> Schema:
    return {"type": "string", "enum": [*words]}


def _or_null(schema: Schema) -> Schema:
    if "$ref" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    return schema | {"type": [schema["type"], "null"]}


def _field(schema: Schema, says: str, *examples: object) -> Schema:
    """A schema that says what it is, with examples."""
    return schema | {"description": says} | ({"examples": [*examples]} if examples else {})


def _record(
    says: str, optional: str = "", others: bool | Schema = False, **fields: tuple
) -> Schema:
    """An object of fields, each a schema, what it says, and an example.

    It may lack the optional ones, and may have others if there is a schema of these.
    """
    return {
        "type": "object",
        "description": says,
        "required": [name for name in fields if name not in optional.split()],
        "properties": {name: _field(*field) for name, field in fields.items()},
        "additionalProperties": others,
    }


TEXT = {"type": "string", "maxLength": MAX_VALUE}
FILLED = TEXT | {"minLength": 1}
BRIEF = FILLED | {"maxLength": MAX_SHORT}
COUNT = {"type": "integer", "format": "int64", "minimum": 0}
FROM_ONE = COUNT | {"minimum": 1}
NUMBER = {"type": "number", "format": "double"}
SHARE = NUMBER | {"minimum": 0, "maximum": 1}
YES = {"type": "boolean"}
RANKS = bookkeep.Calibration.RANKS
WHO = _one_of(bookkeep.SCORE_WEIGHTS)

# Fields that several records have
COMPANY = {"CompanyId": (BRIEF, "whose booking it is", "acme")}
STATEMENT = {
    **COMPANY,
    "BankEntryText": (FILLED, "what the bank statement says", "Office rent June"),
    "BankEntryAmount": (
        BRIEF,
        "a plain decimal number, which counts as the range that it is in, or a range: "
        f"{', '.join(bookkeep.RANGES)}; any other text is a range of its own",
        *("-9875.50", *bookkeep.RANGES),
    ),
}
MORE = {
    "BankEntryDate": (TEXT, "the day, which is stored, but says nothing", "2016-02-29"),
    NAME: (TEXT, "the account's name, for people", "Office costs"),
}
OWN_ID = {ID: (BRIEF, "what the company calls the booking: it is booked once, then changed", "17")}
BY_WHOM = {BOOKED_BY: (WHO, "who booked it, a person if it is not said", "check"), **OWN_ID}
ACCOUNT = {TARGET: (BRIEF, "the account that it is booked to", "6300")}
SEQ = {"seq": (bookkeep.WHOLE_NUMBER, "the booking's number", 1203)}
STANDING = SEQ | {
    "sample": (_of("Booked"), "as it was sent, but as it is booked now"),
    "account": (FILLED, "the account", "6300"),
    "name": (_or_null(FILLED), "the latest name of the account, if any", "Office costs"),
    "predicted": (_or_null(FILLED), "the account that was predicted, if any", "7140"),
    "predicted_name": (_or_null(FILLED), "the latest name of that, if any", "Travel"),
    "confidence": (_or_null(SHARE), "how sure that was", 0.62),
    "rank": (_or_null(FROM_ONE), "the place of its account among all", 2),
    "reviewed": (YES, "whether a person has looked at it", True),
    "booked_by": (WHO, "who booked it", "person"),
    "corrected": (_or_null(_of("Change")), "whether it was booked anew"),
}
NEXT = {
    "next": (_or_null(FILLED), "`before` of the next page, null if this is the last", "0.62:1495")
}
MEANS = {
    "precision": (SHARE, "the mean of all accounts' precision", 0.51),
    "recall": (SHARE, "the mean of all accounts' recall", 0.52),
}
FIGURES = {"accuracy": (SHARE, "the share that was right", 0.72), **MEANS}
LEVELS = {
    "confidence": (_list("Level"), "how good they were when how sure"),
    "switch_on": (
        _or_null(_of("SwitchOn")),
        "from when on few of what is booked unseen would be wrong, null while one cannot know",
    ),
}
CHECKS = {"checks": (COUNT, "bookings that were checked for all that nobody looked at", 4)}
UNSEEN = {"unseen": (COUNT, "bookings that nobody has looked at", 60), **CHECKS}

SCHEMAS = {
    "Sample": _record("a line of a bank statement", " ".join(MORE), TEXT, **STATEMENT | MORE),
    "Booking": _record(
        "a line of a bank statement, and how it is booked",
        " ".join(MORE | BY_WHOM),
        TEXT,
        **STATEMENT | ACCOUNT | MORE | BY_WHOM,
    ),
    "Stored": _record(
        "these bookings are on disk, and learned",
        "booked known corrected",
        received=(COUNT, "bookings in the list", 2),
        total=(COUNT, "lines that the log had with them", 15002),
        first=(_or_null(COUNT), "the seq of the first line, null if it took none", 15000),
        last=(_or_null(COUNT), "the seq of the last line, null if it took none", 15001),
        booked=(COUNT, f"if any has an {ID}: bookings that are new", 1),
        known=(COUNT, "bookings that say nothing new", 0),
        corrected=(COUNT, "bookings that were changed, or confirmed", 1),
    ),
    "Accounts": {
        **{"type": "array", "items": FILLED | {"examples": ["6300"]}},
        "description": "an account for each sample, in order",
    },
    "Suggested": {
        "anyOf": [_of("Suggestions"), _list("Suggestions")],
        "description": "for one sample, or for each in the list",
    },
    "Suggestions": _record(
        "the most likely accounts",
        "decision",
        suggestions=(_list("Suggestion", maxItems=RANKS), "accounts, best first"),
        record=(_of("Record"), "what the confidence of the first rests on"),
        check=(YES, "whether a person should look at it, however sure it is", False),
        decision=(_one_of(["book", "check", "review"]), "what to do with the first one", "book"),
    ),
    "Suggestion": _record(
        "an account",
        "prior reasons",
        account=(FILLED, "the account", "6300"),
        confidence=(
            _or_null(SHARE),
            "of earlier suggestions like it, the share that was right; null before there are any",
            0.94,
        ),
        over=(_or_null(FILLED), "the account that it is compared with, null if alone", "7140"),
        margin=(_or_null(NUMBER), "log-odds over that one: the prior and all reasons", 2.4445),
        prior=(_or_null(NUMBER), "log-odds before anything is known of the sample", 0.0155),
        reasons=(_list("Reason"), "what the sample says, the heaviest first"),
    ),
    "Reason": _record(
        "what something that the sample says speaks for",
        token=({"type": "string", "minLength": 1}, "the sample's own words", "office"),
        kind=(FILLED, "what they are in it", "word in this company"),
        weight=(NUMBER, "log-odds for this account over the other", 1.1628),
    ),
    "Record": _record(
        "what the first suggestion's confidence rests on",
        known=(_one_of(bookkeep.SPECIFICITY), "what was known of the sample", "the first word"),
        own=(_of("Tally"), "the company's own ones of this account"),
        all=(_of("Tally"), "those of all companies, with as much known; many of one count as few"),
    ),
    "Tally": _record(
        "earlier suggestions with about as much evidence",
        suggestions=(COUNT, "how many there were", 38),
        right=(COUNT, "how many of them were right", 37),
    ),
    "Correction": _record("a booking, and its right account", **SEQ | ACCOUNT),
    "CorrectionById": _record("the same, of a company's id", **COMPANY | OWN_ID | ACCOUNT),
    "Corrected": _record(
        "it is booked so, and learned",
        **SEQ | ACCOUNT,
        before=(FILLED, "the account that it was booked to until now", "7140"),
    ),
    "Forgotten": _record(
        "the company is neither in the log nor learned",
        company=(FILLED, "a company, by its CompanyId", "acme"),
        forgotten=(FROM_ONE, "how many bookings it had", 312),
    ),
    "Metrics": _record("means over the accounts, however rare", **MEANS),
    "Figures": _record("how good the last predictions were", **FIGURES),
    "Report": _record(
        "how good the last predictions were",
        support=(FROM_ONE, "predictions that this is about", 1000),
        **UNSEEN | FIGURES,
        confused=(_list("Confusion", maxItems=10), "the most frequent errors"),
        **LEVELS,
    ),
    "Level": _record(
        "how good they were when so sure",
        at_least=(SHARE, "the level: so sure, or surer", 0.95),
        share=(SHARE, "the share of all predictions that is", 0.34),
        accuracy=(_or_null(SHARE), "the share of these that was right", 0.976),
        error=(_or_null(SHARE), "one standard error of this accuracy", 0.008),
        **CHECKS,
    ),
    "SwitchOn": _record(
        "the confidence from which on one may book unseen",
        at_least=(SHARE, "the confidence", 0.93),
        share=(SHARE, "the share of all predictions that is so sure", 0.41),
        wrong=(SHARE, "at most this share of these is wrong", 0.02),
        certainty=(SHARE, "as sure as that is", 0.95),
    ),
    "Confusion": _record(
        "an error",
        booked=(FILLED, "the account that it is booked to", "6300"),
        predicted=(FILLED, "the account that was predicted", "7140"),
        count=(COUNT, "how often that was", 3),
    ),
    "Overview": _record(
        "the page",
        health=(_of("Health"), "how much is learned"),
        target=(FILLED, "the key that is predicted", TARGET),
        context=(
            {"type": "array", "items": FILLED | {"examples": ["Department"]}},
            "keys of a sample that are features, too",
            ["Department"],
        ),
        company=(_or_null(BRIEF), "the company that the token is for, null if for all", None),
        may_change=(YES, "whether the token may change something", True),
        metrics=(_or_null(_of("Figures")), "of the last predictions, if any"),
        curve=(_list("Point", maxItems=129), "the learning curve"),
        scored=(COUNT, "predictions that the confidence is about", 10000),
        **LEVELS,
    ),
    "Point": _record(
        "the same, after so many bookings",
        bookings=(COUNT, "how many bookings there were", 15000),
        **FIGURES,
    ),
    "Bookings": _record(
        "a page of bookings",
        bookings=(_list("Standing", maxItems=MAX_PAGE), "the page"),
        **NEXT,
    ),
    "Standing": _record("a booking as it stands now", **STANDING),
    "Suspects": _record(
        "a page of bookings that look wrong, the most probable first",
        suspects=(_list("Suspect", maxItems=MAX_PAGE), "the page"),
        **NEXT,
    ),
    "Suspect": _record(
        "a booking that looks wrong, as it stands now",
        **STANDING,
        likely=(FILLED, "the account that it rather belongs to", "7140"),
        probability=(SHARE, "how probable it is that its account is wrong", 0.93),
        like=(_or_null(_one_of(LIKE)), "what these have in common with it", "text"),
        alike=(COUNT, "how many of the company's other bookings are like it", 14),
        on_account=(COUNT, "how many of these are on its account", 1),
        on_likely=(COUNT, "how many of these are on the likely one", 13),
    ),
    "Booked": _record(
        "a line of a bank statement, as it is booked now; without the name of another account",
        others=TEXT,
        **STATEMENT | {TARGET: (FILLED, "the account that it is booked to", "6300")},
    ),
    "Change": _record(
        "from what it was booked to before", **{"from": (FILLED, "the account before", "7140")}
    ),
    "Health": _record(
        "how much is learned",
        "companies tokens stream",
        status=(FILLED, "ok, or why bookings cannot be stored now", "ok"),
        samples=(COUNT, "bookings, also those that nobody has looked at", 15000),
        **UNSEEN,
        lines=(COUNT, "lines of the log", 15002),
        accounts=(COUNT, "accounts that are learned", 214),
        companies=(COUNT, "companies that have bookings", 50),
        tokens=(COUNT, "tokens that are learned", 90210),
        uptime=(NUMBER | {"minimum": 0}, "seconds since the start", 86400.25),
        stream=(_of("Stream"), "how its log is kept equal to others"),
    ),
    "Stream": _record(
        "a node among others",
        status=(FILLED, "ok, or why the node cannot book now", "ok"),
        node=(FILLED, "the node's own name", "1f03a2c4"),
        writer=(_or_null(FILLED), "the node that writes now, null if none does", "77e0b15d"),
        lag=(COUNT, "lines of the stream that are not in its log yet", 0),
        quorum=(YES, "whether most of the stream's servers are there", True),
        to_forget=(COUNT, "orders to forget a company that it has still to carry out", 0),
    ),
    "Ready": _record("bookings can be sent", status=(FILLED, "ready", "ready")),
    "Error": _record(
        "why it was refused",
        error=(FILLED, "one sentence that says what to change", "AccountNumber is missing"),
    ),
    "Lines": {"type": "string", "description": "JSON Lines", "examples": ['{"seq": 15000, ...}']},
    "Text": {"type": "string", "description": "metrics", "examples": ["bookkeep_bookings 15000"]},
    "Page": {"type": "string", "description": "HTML", "examples": ["<!doctype html>"]},
    "Description": {"type": "object", "description": "this", "examples": [{"openapi": "3.1.0"}]},
}
MEDIA = {"Lines": bookkeep.JSON_LINES, "Text": "text/plain", "Page": "text/html"}  # else JSON

# ------------------------------------------------------------------------------------- Operations

TAGS = {
    "bookings": "what is learned: store, correct, read and forget it",
    "suggestions": "what is likely to be booked, how sure that is, and why",
    "quality": "how good the predictions were",
    "service": "how the service is, and what describes it",
}
# A browser asks for the page's own files, a client for none of them: they are not described.
PAGE_FILES = {"/desk.css", "/desk.js"}
OPERATIONS = {  # each route's tag, id, answer and own refusals; summary
    "POST /sample": ("bookings sample Stored 404 422 503 507", "book, and learn"),
    "POST /predict": ("suggestions predict Accounts 404 503", "predict the accounts of samples"),
    "POST /suggest": ("suggestions suggest Suggested 404 503", "and why"),
    "POST /correct": ("bookings correct Corrected 404 503 507", "book to another account"),
    "DELETE /company": ("bookings forget Forgotten 404 503 507", "forget any company"),
    "DELETE /company/{id}": ("bookings forgetByPath Forgotten 404 503 507", "forget by a path"),
    "GET /metrics/{n}": ("quality metrics Metrics 404 503", "of the last n predictions"),
    "GET /report/{n}": ("quality report Report 404 503", "more of that"),
    "GET /bookings": ("bookings bookings Bookings 404 507", "bookings as they stand now, in pages"),
    "GET /bookings/{seq}": ("bookings booking Standing 404 507", "one of them"),
    "GET /suspects": ("bookings suspects Suspects 404 503 507", "bookings that look wrong"),
    "GET /samples": ("bookings samples Lines", "lines of the log"),
    "GET /overview": ("quality overview Overview 404 503", "what the page shows"),
    "GET /metrics": ("service prometheus Text", "figures for Prometheus"),
    "GET /health": ("service health Health 503", "how much is learned"),
    "GET /ready": ("service ready Ready 503", "whether bookings can be sent"),
    "GET /openapi.json": ("service openapi Description", "this description"),
    "GET /": ("service page Page", "the page"),
}
PARAMETERS = {  # what each says, an example
    "Idempotency-Key": ("the list's name, under which it is stored only once", "june-1"),
    "top": ("how many", 1),
    "wrong": ("the share of what is booked unseen that may be wrong", 0.02),
    "book_from": ("the confidence from which on you book unseen", 0.95),
    "reasons": (f"with them, an answer has at most {bookkeep.MAX_SUGGESTED} suggestions", "no"),
    "id": ("a company, by its CompanyId", "acme"),
    ID: ("only the booking that the company calls so", "17"),
    "company": ("a company, by its CompanyId", "acme"),
    "n": ("over how many predictions, the last", 1000),
    "seq": ("the booking's number", 1203),
    "reviewed": ("only what somebody, or nobody, saw", "no"),
    "below": ("only those predicted with less confidence", 0.9),
    "order": (f"newest, or least sure, of which the last {LEAST_SURE} count", "newest"),
    "limit": ("how many, at most", 20),
    "before": ("next of the page before", "0.62:14950"),
    "from": ("the seq of the first line", 15000),
}
REFUSALS = {  # status -> when, and a sentence that comes with it
    400: ("the request makes no sense, or is too much", "sample 0: AccountNumber is missing"),
    401: ("no token", "send the token, with the header Authorization: Bearer <token>"),
    403: ("a company's token is not enough, or may only ask", "this token may only ask"),
    404: ("no such booking or company, for this token", "there is no booking 1203"),
    413: ("the body is too long", f"send at most {bookkeep.MAX_BODY} bytes in one request"),
    415: ("not JSON", "send JSON, with the header Content-Type: application/json"),
    422: ("a known key", "this Idempotency-Key was used for other bookings; take a new one"),
    503: ("not yet, or no longer", "there is no model yet; send bookings to /sample first"),
    507: ("nothing was changed", "the log could not be written (No space left on device)"),
    "default": ("refused, with one sentence that says what to change", "there is nothing here"),
}


def describe(
    routes: Iterable[Route], max_batch: int, max_body: int, guarded: bool, target: str = TARGET
) -> dict:
    """The description of the API that has these routes; guarded if it takes a token.

    What a service predicts has another key than usual if that is its `target`.
    """
    samples = {"anyOf": [_of("Sample"), _list("Sample", maxItems=max_batch)]}
    bodies = {
        "sample": _list("Booking", maxItems=max_batch),
        "predict": samples,
        "suggest": samples,
        "correct": {"anyOf": [_of("Correction"), _of("CorrectionById")]},
    }
    paths: defaultdict[str, dict] = defaultdict(dict)
    for route in routes:
        path = bookkeep.described_path(route)
        if path not in PAGE_FILES:
            paths[path][route.method.lower()] = _operation(path, route, bodies)
    says = (
        f"Learns from every booking and suggests the account of the next. A body has at most "
        f"{max_body} bytes. With the header {bookkeep.AT_LEAST}: n, an answer knows of the log's "
        "first n lines, or is a 503."
    )
    info = {"title": "bookkeep", "version": bookkeep.__version__, "description": says}
    responses = {
        str(status): {"description": when, **_media(_of("Error"), {"error": sentence})}
        for status, (when, sentence) in REFUSALS.items()
    }
    made = {
        "openapi": "3.1.0",
        "info": info | {"license": {"name": "MIT", "identifier": "MIT"}},
        "servers": [{"url": "/", "description": "this service"}],
        "tags": [{"name": name, "description": says} for name, says in TAGS.items()],
        "security": [{"token": []}] if guarded else [],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "responses": responses,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}} if guarded else {},
        },
    }
    return json.loads(json.dumps(made).replace(f'"{TARGET}"', f'"{target}"'))


def _operation(path: str, route: Route, bodies: dict[str, Schema]) -> dict:
    named, summary = OPERATIONS[f"{route.method} {path}"]
    tag, name, answer, *statuses = named.split()
    takes, is_open = route.callback, path in bookkeep.OPEN
    statuses += [
        "400",
        *([] if is_open else ["401", "403"]),
        *(["413", "415"] if takes.body else []),
    ]
    media = MEDIA.get(answer, "application/json")
    done = {"description": SCHEMAS[answer]["description"], **_media(_of(answer), media=media)}
    refused = {status: _of(status, "responses") for status in [*sorted(statuses), "default"]}
    body = {"requestBody": {"required": True, **_media(bodies[name])}} if takes.body else {}
    return {
        "operationId": name,
        "tags": [tag],
        "summary": summary,
        "parameters": [_parameter(path, *each) for each in takes.schemas.items()],
        **body,
        "responses": {"200": done} | refused,
        **({"security": []} if is_open else {}),
    }


def _parameter(path: str, name: str, schema: Schema) -> dict:
    says, example = PARAMETERS[name]
    in_path = f"{{{name}}}" in path
    return {
        "name": name,
        "in": "path" if in_path else "header" if name == "Idempotency-Key" else "query",
        "required": in_path or name == "id",
        "description": says,
        "schema": schema,
        "example": example,
    }


def _media(schema: Schema, example: object = None, media: str = "application/json") -> dict:
    return {"content": {media: {"schema": schema, "example": example or _example(schema)}}}


def _example(schema: Schema) -> object:
    """What a schema describes, made of the examples of its parts."""
    if "$ref" in schema:
        schema = SCHEMAS[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return _example(schema["anyOf"][0])
    if "properties" in schema:
        return {name: _example(part) for name, part in schema["properties"].items()}
    return schema["examples"][0] if "examples" in schema else [_example(schema["items"])]
