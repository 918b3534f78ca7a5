"""The tests of the API's description, bookkeep_extra/openapi.py: it is complete, and true."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, urlencode

from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

import bookkeep
from bookkeep_extra import openapi
from conftest import booking

JSON = "application/json"


def operations(whole):
    """Each operation of a description, with its method and path."""
    for path, methods in whole["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def test_every_route_is_described_and_every_operation_is_a_route(keeper):
    app = bookkeep.create_app(keeper)
    routes = {f"{each.method} {bookkeep.described_path(each)}": each for each in app.routes}
    files = {f"GET {path}" for path in openapi.PAGE_FILES}
    assert {*routes} == files | {*openapi.OPERATIONS}
    assert {name for each in app.routes for name in each.callback.schemas} == {*openapi.PARAMETERS}
    whole = openapi.describe(app.routes, 10, 1000, guarded=False)
    described = {f"{method} {path}": each for method, path, each in operations(whole)}
    assert {*described} == {*openapi.OPERATIONS}
    for name, operation in described.items():
        handler = routes[name].callback
        schemas = {each["name"]: each["schema"] for each in operation["parameters"]}
        assert schemas == handler.schemas
        assert ("requestBody" in operation) == bool(handler.body)


def test_machines_can_make_clients_of_the_description(service):
    whole = service.get("/openapi.json")[1]
    validate(whole)  # raises
    components = whole["components"]
    described = [operation for _, _, operation in operations(whole)]
    names = [each["operationId"] for each in described]
    tags = {tag["name"] for tag in whole["tags"]}
    assert len({*names}) == len(names)
    assert all(each["summary"] and each["tags"][0] in tags for each in described)

    def check(schema, where, examples=()):
        """All of it says what it is, and has examples that fit, or is made of what has."""
        assert "description" in schema or where.endswith("[]"), where
        examples = [*schema.get("examples", []), *examples]
        for example in examples:
            Draft202012Validator(schema | {"components": components}).validate(example)  # raises
        parts = {f"{where}.{name}": part for name, part in schema.get("properties", {}).items()}
        parts |= {f"{where}[]": schema["items"]} if "items" in schema else {}
        parts |= {f"{where}{i}[]": part for i, part in enumerate(schema.get("anyOf", []))}
        assert parts or examples or "$ref" in schema or schema["type"] == "null", where
        for name, part in parts.items():
            check(part, name)

    for name, schema in components["schemas"].items():
        check(schema, name)
    for each in (each for operation in described for each in operation["parameters"]):
        check(
            each["schema"] | {"description": each["description"]}, each["name"], [each["example"]]
        )
    for operation in described:
        answers = [*operation["responses"].values(), *components["responses"].values()]
        for answer in (answer for answer in answers if "$ref" not in answer):
            for content in answer["content"].values():
                told = {"description": answer["description"]}
                check(content["schema"] | told, operation["operationId"], [content["example"]])
        if body := operation.get("requestBody"):
            content = body["content"][JSON]
            check(content["schema"] | {"description": ""}, "body", [content["example"]])


def test_it_says_the_options_and_where_a_token_is_needed(serve, tmp_path, monkeypatch):
    options = ("--max-batch=7", "--max-body=1000")
    whole = serve(*options).get("/openapi.json")[1]
    assert whole["security"] == []
    assert "at most 1000 bytes" in whole["info"]["description"]
    monkeypatch.setenv("BOOKKEEP_TOKEN", "s3cret")
    guarded = serve(*options, log=tmp_path / "guarded.jsonl")
    headers = {"Authorization": "Bearer s3cret"}
    whole = guarded.ask("GET", "/openapi.json", headers=headers)[2]
    for method, path, operation in operations(whole):
        needed = operation.get("security", whole["security"]) == [{"token": []}]
        status = guarded.ask(method, path, [], kind=None)[0]
        assert (status == 401) == needed == ("401" in operation["responses"])


# --------------------------------------------------------------- Limits, made from the description

PATTERNS = [  # texts, some of which any pattern of ours takes
    *("", "x" * 200, "x" * 201, "é", "0.5:1", "0.5:", ":1", "0.5"),
    *(f"{'1' * 30}:1", f"{'1' * 31}:1", f"1:{'1' * 18}", f"1:{'1' * 19}"),
]


def values(schema):
    """Values at the limits of a schema, each with whether it is within them."""
    if "enum" in schema:
        yield from ((value, True) for value in schema["enum"])
        yield from ((value, False) for value in ("", "nobody"))
    elif "pattern" in schema:
        yield from ((text, bool(re.search(schema["pattern"], text))) for text in PATTERNS)
    elif schema["type"] == "string":
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        yield "x" * least, True
        if least:
            yield "x" * (least - 1), False
        if most:
            yield from (("x" * most, True), ("x" * (most + 1), False))
    else:
        step = 1 if schema["type"] == "integer" else 0.0625
        for limit, out in (("minimum", -step), ("maximum", step)):
            if limit in schema:
                yield from ((schema[limit], True), (schema[limit] + out, False))


def bodies(schema, example, components):
    """Bodies at the limits of a schema, each with whether it is within them."""
    if "anyOf" in schema:
        for part in schema["anyOf"]:
            yield from bodies(part, example, components)
    elif "items" in schema:
        one = example[0] if isinstance(example, list) else example
        yield from (([one] * schema["maxItems"], True), ([one] * (schema["maxItems"] + 1), False))
        for body, fits in bodies(schema["items"], one, components):
            yield [body], fits
    else:
        record = components["schemas"][schema["$ref"].rpartition("/")[2]]
        more = record["additionalProperties"] or {"type": "string"}
        takes_more = bool(record["additionalProperties"])
        if not {*record["required"]} <= {*example}:  # it is one of another record
            example = {
                name: record["properties"][name]["examples"][0] for name in record["required"]
            }
        for name, field in {**record["properties"], "other": more}.items():
            for value, fits in values(field):
                yield example | {name: value}, fits and (takes_more or name != "other")
            yield example | {name: None}, False
        longest = more.get("maxLength", 1)
        yield {**example, "x" * longest: ""}, takes_more
        yield {**example, "x" * (longest + 1): ""}, False
        for name in record["required"]:
            yield {key: value for key, value in example.items() if key != name}, False


def requests(path, operation, components):
    """Requests for an operation: path, headers, body; and whether all of it is within limits."""
    parameters = operation["parameters"]
    content = operation.get("requestBody", {"content": {JSON: None}})["content"][JSON]
    example = content and content["example"]

    def made(chosen, body=example):
        at, after, headers = path, {}, {}
        for each in parameters:
            if (value := chosen.get(each["name"])) is not None:
                if each["in"] == "path":
                    at = at.replace(f"{{{each['name']}}}", quote(str(value), safe=""))
                else:
                    (headers if each["in"] == "header" else after)[each["name"]] = str(value)
        return f"{at}?{urlencode(after)}" if after else at, headers, body

    needed = {each["name"]: each["example"] for each in parameters if each["required"]}
    yield made(needed), True
    yield made({each["name"]: each["example"] for each in parameters}), True
    for each in parameters:
        for value, fits in values(each["schema"]):
            if value != "" or each["in"] != "path":  # that would be another path
                yield made(needed | {each["name"]: value}), fits
        if each["required"] and each["in"] == "query":
            yield made({}), False
    for body, fits in bodies(content["schema"], example, components) if content else ():
        yield made(needed, body), fits


def test_each_limit_is_refused_just_beyond_and_taken_just_within_and_answers_fit(serve):
    service = serve("--max-batch=7")
    whole = service.get("/openapi.json")[1]
    components = whole["components"]
    taught = [booking("acme", account=account) for account in ("1", "2", "2")]
    service.post("/sample", taught)
    tried = 0
    for method, path, operation in sorted(operations(whole), key=lambda each: each[0] == "DELETE"):
        seen = set()
        for (at, headers, body), fits in requests(path, operation, components):
            if method == "DELETE":
                service.post("/sample", taught)
            tried += 1
            more = {} if body is None else {"content": body}
            status, told, answer = service.ask(method, at, headers=headers, kind=None, **more)
            asked = f"{method} {at} {headers} {json.dumps(body)}"[:200]
            assert (status != 400) == fits, (asked, answer)
            assert status < 500 or status == 503, asked
            seen.add(status)
            response = operation["responses"][str(status)]
            if "$ref" in response:
                response = components["responses"][response["$ref"].rpartition("/")[2]]
            [(media, content)] = response["content"].items()
            assert told["Content-Type"].partition(";")[0] == media, (asked, answer)
            if media == JSON:
                schema = content["schema"] | {"components": components}
                Draft202012Validator(schema).validate(json.loads(answer))  # raises
        assert 200 in seen, (method, path)
    assert tried > 200


def test_strange_requests_are_answered_as_it_says(serve, tmp_path):
    service = serve()
    for _ in range(2):
        kept = booking(company="one that is not forgotten by chance")
        assert service.post("/sample", [kept])[0] == 200
    config = tmp_path / "schemathesis.toml"
    accepted = "checks.positive_data_acceptance.expected-statuses"
    config.write_text(  # how many samples /suggest takes depends on a parameter
        f"{accepted} = [200, 404, 422]\n"
        f'[[operations]]\ninclude-path = "/suggest"\n{accepted} = [200, 400]\n'
    )
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("st"), "--config-file", config),
            *("run", f"http://127.0.0.1:{service.port}/openapi.json", "--checks=all", "--seed=1"),
            f"--max-examples={os.environ.get('BOOKKEEP_EXAMPLES', 8)}",
            *("--phases=coverage,fuzzing", "--no-color"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "Traceback" not in service.said()
    assert "failed" not in service.said()
