"""replay.py: the client, the files that it reads, and the command line."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from contextlib import closing, contextmanager, nullcontext
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest

import replay
from bookkeep_extra import files
from conftest import (
    HERE,
    SERVICE,
    SYNTHETIC,
    booking,
    bookings,
    free_port,
    read,
    read_lines,
    run,
    scanned,
    wait_until,
    write_csv,
)

REPLAY = HERE / "replay.py"


@cache
def rows_by_date():
    """All rows of the synthetic set, as a replay sends them."""
    return replay.by_date(replay.read_rows(SYNTHETIC))


@pytest.fixture
def small(tmp_path):
    """A file of 3,001 bookings by date: it is read faster than the whole set."""
    return write_csv(tmp_path / "small.csv", rows_by_date()[:3001])


@pytest.fixture
def main(capsys):
    """Runs replay.py in this process: (exit status, standard output, standard error)."""

    def run(*arguments):
        try:
            status = replay.main([*map(str, arguments)])
        except SystemExit as done:
            status = done.code
        return status, *capsys.readouterr()

    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in stops]
    yield run
    for number, handler in zip(stops, handlers, strict=True):
        signal.signal(number, handler)


def starts(*arguments, **options):
    """Starts replay.py, which heeds Ctrl-C though a job in the background ignores it."""
    return subprocess.Popen(
        [sys.executable, REPLAY, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        **options,
    )


@contextmanager
def serving(handler, **attributes):
    """A server with these attributes whose requests this handler answers, and its URL."""
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        vars(server).update(attributes)
        answering = threading.Thread(target=server.serve_forever, args=(0.01,))
        answering.start()
        try:
            yield server, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            answering.join()


# ------------------------------------------------------------------------------------------- Client


def test_the_client_says_what_the_service_says(serve):
    service = serve()
    client = replay.Client(f"http://127.0.0.1:{service.port}/")
    first = client.sample(bookings(400), key="may")
    assert first == {"received": 400, "total": 400, "first": 0, "last": 399}
    assert client.sample(bookings(400), key="may") == first
    assert client.sample(bookings(400, seed=1))["first"] == 400  # each call has a key of its own
    asked = [replay.without_account(row) for row in bookings(350, seed=2)]  # more than one answer
    accounts = service.post("/predict", asked)[1]
    assert client.predict(asked) == accounts
    assert client.predict(asked[0]) == accounts[0]
    suggested = client.suggest(asked, top=2, book_from=0.5)
    assert [each["suggestions"][0]["account"] for each in suggested] == accounts
    assert suggested[0] == service.post("/suggest?top=2&book_from=0.5", asked[0])[1]
    assert client.suggest(asked[0], top=2, book_from=0.5) == suggested[0]
    assert (client.predict([]), client.suggest([])) == ([], [])
    assert client.metrics(100) == service.get("/metrics/100")[1]
    assert client.report(100) == service.get("/report/100")[1]
    one = client.report(100, company="company1", book_from=0.7)
    assert one == service.get("/report/100?company=company1&book_from=0.7")[1]
    corrected = client.correct(3, "77")
    assert (corrected["seq"], corrected["AccountNumber"]) == (3, "77")
    export = [booking("B") | {"Id": "17"}]
    answers = [client.sample(export) for _ in range(2)]
    assert [answer["known"] for answer in answers] == [0, 1]
    assert client.correct(("B", "17"), "78")["seq"] == answers[0]["first"]
    assert client.forget("B") == 1
    odd = "Smørrebrød & Sons/../#1?"
    client.sample([booking(company=odd)])
    assert client.forget(odd) == 1
    assert client.health()["samples"] == service.samples() == 800


def test_an_error_has_the_status_and_the_sentence_of_the_service(serve, monkeypatch):
    monkeypatch.setenv("BOOKKEEP_TOKEN", "s3cret")
    url = f"http://127.0.0.1:{serve().port}"
    client = replay.Client(url, "s3cret", patience=0)
    unbooked = replay.without_account(booking())
    for asked, status, sentence in (
        (lambda: client.sample([unbooked]), 400, "sample 0: AccountNumber is missing"),
        (lambda: client.predict(unbooked), 503, "there is no model yet"),
        (lambda: client.forget("nobody"), 404, "there is no booking of this company"),
        (lambda: replay.Client(url).metrics(), 401, "send the token, with the header"),
        (lambda: replay.Client(f"{url}/x", "s3cret").metrics(), 404, "there is nothing here"),
        (lambda: client.sample([], key="Büro"), None, "a key must be printable ASCII"),
        (lambda: replay.Client(url, "two\nlines"), None, "a token must be printable ASCII"),
    ):
        with pytest.raises(replay.ServiceError) as raised:
            asked()
        assert raised.value.status == status
        assert sentence in raised.value.sentence
        assert raised.value.sentence in str(raised.value)


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://127.0.0.1:x", "http://", "http://a b", "http://[", "127.0.0.1:8080"]
)
def test_what_is_no_url_is_refused_at_once(url):
    with pytest.raises(replay.ServiceError, match="this is not the URL of a service"):
        replay.Client(url)


class Script(BaseHTTPRequestHandler):
    """Answers its server's `answers` in turn: a status with a Retry-After, or None for a loss."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.headers["Idempotency-Key"])
        answer = self.server.answers.pop(0)
        if answer is None:
            self.close_connection = True
            return
        status, after, body = answer
        self.send_response(status)
        if after:
            self.send_header("Retry-After", after)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        self.wfile.write(body)

    do_DELETE = do_POST


OK = (200, None, b'{"forgotten": 1}')
NOT_YET = (503, None, b'{"error": "there is no model yet"}')


@pytest.mark.parametrize(
    ("answers", "call", "times", "status"),
    [
        ([None, OK], "sample", 2, 200),
        ([None, OK], "forget", 1, None),  # it may have been done, and who sent more would go, too
        ([(503, "0", b'{"error": "busy"}'), OK], "forget", 2, 200),
        ([(503, "1", b'{"error": "busy"}'), OK], "sample", 2, 200),
        ([(503, "99", b'{"error": "busy"}'), OK], "sample", 1, 503),  # that would be too long
        ([(429, None, b"<html>"), OK], "forget", 2, 200),
        ([NOT_YET, OK], "sample", 1, 503),
        ([(502, None, b"<html>"), (503, None, b"<html>"), OK], "sample", 3, 200),
        ([(502, None, b"<html>"), OK], "forget", 1, 502),
        ([(507, None, b'{"error": "full"}'), OK], "sample", 1, 507),
        ([(422, None, b'{"error": "other"}'), OK], "sample", 1, 422),
        ([(200, None, b"nonsense"), OK], "sample", 1, 200),
    ],
)
def test_what_can_help_and_do_no_harm_is_sent_again(monkeypatch, answers, call, times, status):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    fails = answers[times - 1] is not OK
    with (
        serving(Script, answers=list(answers), asked=[]) as (server, url),
        closing(replay.Client(url, patience=5)) as client,
        pytest.raises(replay.ServiceError) if fails else nullcontext() as raised,
    ):
        client.sample([]) if call == "sample" else client.forget("A")
    if fails:
        assert raised.value.status == status
        assert raised.value.temporary == (status in (None, 502, 503, 507))
    assert len(server.asked) == times
    assert len(set(server.asked)) == 1
    if call == "sample":
        assert server.asked[0]
    assert len(pauses) == times - 1
    for answer, pause in zip(answers, pauses, strict=False):
        least = int(answer[1] or 0) if answer else 0
        assert least <= pause <= max(least, 0.2)


def test_pauses_get_longer_until_patience_ends(monkeypatch):
    pauses, now = [], [0.0]

    def sleep(seconds):
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(replay.Failed, match="start it with python bookkeep"):
        replay.Client(f"http://127.0.0.1:{free_port()}", patience=60).health()
    assert pauses[0] <= 0.1
    assert 1 <= max(pauses) <= 2
    assert 58 <= sum(pauses) <= 60


def test_a_client_that_was_idle_over_a_restart_does_not_mistake_it_for_a_lost_answer(serve):
    service = serve()
    client = replay.Client(f"http://127.0.0.1:{service.port}")
    client.sample([booking()])
    service.stop()
    serve(port=service.port)
    assert client.forget("A") == 1


def test_threads_may_share_a_client(serve):
    service = serve()
    client = replay.Client(f"http://127.0.0.1:{service.port}")
    client.sample([booking(text=f"shop{i}", account=f"{i}") for i in range(8)])
    wrong = []

    def work(i):
        for _ in range(30):
            stored = client.sample([booking(text=f"shop{i}", account=f"{i}")])
            answer = client.predict(replay.without_account(booking(text=f"shop{i}")))
            if (stored["received"], answer) != (1, f"{i}"):
                wrong.append((i, stored, answer))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert service.samples() == 8 + 8 * 30


def test_the_client_is_one_file_that_needs_nothing_but_python(service, tmp_path):
    shutil.copy(REPLAY, tmp_path)
    code = f"import replay; print(replay.Client('http://127.0.0.1:{service.port}').predict([]))"
    assert run("-S", "-c", code, cwd=tmp_path) == (0, "[]\n", "")
    status, out, said = run("-S", "replay.py", "x.csv", cwd=tmp_path)
    assert (status, out) == (1, "")
    assert said.startswith("replay: files are read by bookkeep_extra/files.py, which is not beside")


# -------------------------------------------------------------------------------------------- Files

BANK_ROWS = [
    booking("Larch & Finch", "Büro; Miete", "> -1000", "6300"),
    booking("Smørrebrød", 'the "best", 5\t€', "< 10", "7140"),
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_files_as_banks_write_them_are_read(tmp_path, encoding, separator, quoting):
    rows = [{",,,,,,;;;;;;\t\t\t\t\t\t.": "x", **row} for row in BANK_ROWS]
    path = write_csv(tmp_path / "bank.csv", rows, encoding, delimiter=separator, quoting=quoting)
    assert list(replay.read_rows(path)) == rows
    with zipfile.ZipFile(tmp_path / "bank.zip", "w") as archive:
        archive.write(path, "bank.csv")
    assert list(replay.read_rows(tmp_path / "bank.zip")) == rows


@pytest.mark.parametrize(
    ("encoding", "last"), [("utf-8", "€"), ("cp1252", "7 €"), ("cp1252", "Café")]
)
def test_the_encoding_is_that_of_the_whole_file(tmp_path, encoding, last):
    rows = [*[booking(text="x" * 1000)] * 1200, booking(text=last * 2)]  # more than one part of it
    if encoding == "utf-8":  # characters on the borders of all parts that one may read
        rows[1:1] = [booking(text="€" * 10_000)] * 100
    assert list(replay.read_rows(write_csv(tmp_path / "bank.csv", rows, encoding))) == rows


def test_a_file_is_read_in_parts(tmp_path):
    path = write_csv(tmp_path / "bank.csv", [booking(text="€" * 3000)] * 1000)
    tracemalloc.start()
    assert sum(1 for _ in replay.read_rows(path)) == 1000
    assert tracemalloc.get_traced_memory()[1] < 6_000_000 < path.stat().st_size
    tracemalloc.stop()


def test_a_pipe_is_read(tmp_path):
    reading, writing = os.pipe()
    with open(reading), open(writing, "w") as file:
        file.write("CompanyId;BankEntryText;BankEntryAmount;AccountNumber\nA;Büro;< 10;6300\n")
        file.close()
        assert list(replay.read_rows(Path(f"/dev/fd/{reading}"))) == [
            booking(text="Büro", amount="< 10", account="6300")
        ]


AMOUNTS = [
    (["> -1000", "< 10", "big negative"], None),  # the buckets
    (["-9875.50", "12", "0.5"], None),
    (["1,200.00", "-12.5", "1,234,567.00"], ["1200.00", "-12.5", "1234567.00"]),
    (["1.200,00", "-12,5", "1.234.567"], ["1200.00", "-12.5", "1234567"]),
    (["1 200,00", "1\u202f200", "−7"], ["1200.00", "1200", "-7"]),
    (["CHF 1'200.50", "Fr. 3.20", "1’000.-"], ["1200.50", "3.20", "1000"]),
    (["(12.50)", "$1,200.00", "-$3.00", "US$ 5"], ["-12.50", "1200.00", "-3.00", "5"]),
    (["€ 12.50", "12.50 EUR", "£.50", "+1"], ["12.50", "12.50", "0.50", "1"]),
    (["12,50-", "kr 1.200,00", "3,00 kr."], ["-12.50", "1200.00", "3.00"]),
    (["1.200", "12,50"], ["1200", "12.50"]),  # what the first is, the second shows
    (["1,200", "12.50", "n/a", "31.12.2024"], ["1200", "12.50", "n/a", "31.12.2024"]),
    (["1,00,000.00", "0.125", "1234.567"], ["100000.00", "0.125", "1234.567"]),
    (["1.200", "3"], ["1200", "3"]),
]


@pytest.mark.parametrize(("written", "read"), AMOUNTS, ids=str)
def test_amounts_become_plain_numbers_by_what_all_of_the_column_shows(tmp_path, written, read):
    path = write_csv(tmp_path / "bank.csv", [booking(amount=amount) for amount in written])
    assert [row["BankEntryAmount"] for row in replay.read_rows(path)] == (read or written)


def test_it_says_what_it_assumed_of_amounts_or_that_it_cannot_tell(tmp_path, caplog):
    def read(*amounts):
        caplog.clear()
        path = write_csv(tmp_path / "bank.csv", [booking(amount=amount) for amount in amounts])
        assert len(list(replay.read_rows(path))) == len(amounts)
        return caplog.text

    assert "amounts such as 1.200 in line 3 are taken for thousands" in read("3", "1.200")
    assert "amounts such as n/a in line 2 are no numbers" in read("n/a", "1.20")
    assert read("1.20", "1,200.00") == read("< 10", "> -10") == ""
    for one, other in (("1.20", "1,20"), ("1.200", "1,200"), ("1.200,00", "1,200.00")):
        with pytest.raises(replay.Failed, match=f"in two ways: {one} in line 2 and {other} in lin"):
            read(one, other)


@pytest.mark.parametrize(
    ("dates", "order"),
    [
        (["2016-02-29", "2015-12-01T10:00", ""], [2, 1, 0]),
        (["29.02.2016", "1.3.2016", "02.01.2017"], [0, 1, 2]),
        (["2/29/2016", "12/1/2015", "1/3/2016"], [1, 2, 0]),
        (["29/02/16", "01/03/16", "02/01/17", ""], [3, 0, 1, 2]),
        (["16-02-29", "15-12-01"], [1, 0]),
        (["01/02/2016", "03/04/2016"], "what is the day in 01/02/2016 is not clear"),
        (["13/02/2016", "02/13/2016"], "in two ways, as 13/02/2016 and 02/13/2016"),
        (["1.3.2016", "2016-02-29"], [1, 0]),
        (["29.02.2016", "pending"], "pending is no date"),
        ([None], "there is no column BankEntryDate to sort by"),
    ],
)
def test_rows_are_sorted_by_dates_as_they_are_written(dates, order):
    rows = [booking(BankEntryDate=date) if date is not None else booking() for date in dates]
    if isinstance(order, str):
        with pytest.raises(replay.Failed, match=f"{order}.*; replay.py --order file "):
            replay.by_date(rows)
    else:
        assert replay.by_date(rows) == [rows[i] for i in order]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "No such file"),
        ("folder", ..., "Is a directory"),
        ("empty.csv", b"", "there are no bookings in"),
        ("binary.csv", bytes(range(256)) * 10, "its encoding is not clear"),
        ("other.csv", b"a,b\n1,2\n", "it has a, b; say which is which, as --map text=COLUMN"),
        ("no.zip", b"PK nonsense", "no CSV file"),
        ("corrupt.zip", ..., "no CSV file"),
        ("nul.csv", b"\0" * 1000, "its encoding is not clear"),
        (
            "short.csv",
            b"CompanyId,BankEntryText,BankEntryAmount,BankEntryDate,AccountNumber\nA,b\n",
            "short.csv: in line 2, it has no amount",
        ),
        (
            "half.csv",
            b"CompanyId;BankEntryText;BankEntryDate\nA;b;2016-01-01\n",
            "has no column BankEntryAmount, AccountNumber; it has CompanyId, ",
        ),
    ],
)
@pytest.mark.parametrize("order", ["date", "file"])
def test_a_file_that_cannot_be_replayed_is_one_sentence(
    main, tmp_path, name, content, message, order
):
    path = tmp_path / name
    if name == "corrupt.zip":
        zipped = bytearray(SYNTHETIC.read_bytes())
        zipped[1000:1100] = bytes(100)
        path.write_bytes(zipped)
    elif content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    log = tmp_path / "log"
    status, out, said = main(path, "--serve", f"--log={log}", f"--order={order}")
    assert (status, out) == (1, "")
    assert said.startswith("replay: ")
    assert said.count("\n") == 1
    assert message in said
    assert "goes on" not in said
    assert not log.exists()  # no service was started for it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--map=text=Payee"], "no column Payee; it has CompanyId, Amount, Twice, Twice, Account"),
        (["--map=text=Amount,amount=Twice"], "has the column Twice more than once, as 3 and 4"),
        (
            ["--map=text=Amount,amount=Amount"],
            "BookedBy must be one of check, person, suggestion, and not Anna; --map by=COLUMN name",
        ),
        (["--map=amount=Amount+3"], "amount=Amount+3 names 2 columns, but takes one: out=COLUMN,"),
        (["--map=words=Payee"], "words=Payee is not FIELD=COLUMN, with one of company, text, am"),
        (["--map=context=A,B"], "context=A,B: put + between columns, which have no comma"),
        (
            ["--map=context=Amount+A"],
            "has no column A; it has CompanyId, Amount",
        ),
        (["--map=company=A", "--company=B"], "give --company, or a company= in --map, not both"),
        (["--suggest", "--samples=9"], "--samples does not go with --suggest"),
        (["--suggest", "--book-from=0.9"], "--book-from does not go with --suggest"),
        (["--samples=0"], "0 is not a whole number of at least 1"),
        (["--samples=99999999999999999999"], "is not a whole number"),
        (["--log=log"], "--log goes with --serve"),
        (["--stay"], "--stay goes with --serve"),
        (["--book-from=1.1"], "1.1 is not a number from 0 to 1"),
        (["--book-from=x"], "invalid float value: 'x'"),
        (["--url=x", "--serve"], "not allowed with argument"),
    ],
)
def test_what_does_not_fit_a_file_or_other_options_is_one_sentence(
    main, tmp_path, options, message
):
    path = tmp_path / "bank.csv"
    columns = "CompanyId,Amount,Twice,Twice,AccountNumber,BookedBy"
    path.write_text(f"{columns}\nA,1,2,2,3,person\nA,1,2,2,3,Anna\n")
    order = [] if "--suggest" in options else ["--order=file"]
    status, out, said = main(path, *order, *options)
    assert out == ""
    assert message in said.splitlines()[-1]
    assert status == (1 if said.startswith("replay: ") else 2)


def test_a_suggestion_needs_a_file_and_a_default_one_must_be_there(main, monkeypatch, tmp_path):
    assert "--suggest needs a FILE" in main("--suggest")[2]
    monkeypatch.setattr(replay, "DATA", tmp_path)  # as it is where it is installed
    status, out, said = main("--serve")
    assert (status, out) == (1, "")
    assert re.fullmatch("replay: .* name a CSV file .*bank_expenses_synthetic.csv.zip.*\n", said)


def test_help_says_which_columns_a_file_needs(main):
    status, text, _ = main("--help")
    assert status == 0
    for column in (*files.COLUMNS, "BankEntryDate"):
        assert column in text


# ------------------------------------------------------------------------------------------- Replay


def test_the_demo_in_one_command(serve, small, tmp_path):
    command = (REPLAY, small, "--json", "--serve", "--batch=100", "--samples=1500")
    others = {"BOOKKEEP_HOST": "127.0.0.2", "BOOKKEEP_MAX_BATCH": "1"}  # of another service
    status, out, said = run(*command, env=os.environ | others | {"TMPDIR": str(tmp_path)})
    assert (status, said) == (0, "")
    report = json.loads(out)
    assert report["samples"] == 1500
    assert report["samples_per_second"] == pytest.approx(1500 / report["seconds"], rel=0.02)
    assert list(report["metrics"]) == ["100", "1000"]
    assert "page" not in report
    rows = rows_by_date()
    assert rows == sorted(rows, key=lambda row: (row["BankEntryDate"], row["CompanyId"]))
    log = Path(report["log"])
    assert log.is_relative_to(tmp_path)
    assert [record["sample"] for record in read(log)] == rows[:1500]
    asked = replay.without_account(rows[1500])
    prediction = report["prediction"]
    assert (prediction["sample"], prediction["booked"], prediction["booked_name"]) == (
        *(asked, rows[1500]["AccountNumber"], rows[1500]["AccountName"]),
    )
    service = serve(log=log)
    assert (200, report["metrics"]["1000"]) == service.get("/metrics/1000")
    assert (200, report["report"]) == service.get("/report/750")  # of a small file, half
    assert report["accounts"] == service.get("/health")[1]["accounts"]
    assert report["unseen"] in report["report"]["confidence"]
    found = service.get("/suspects?limit=500")[1]["suspects"]
    assert report["suspects"][0] == found[0]
    shown = [each["sample"]["BankEntryText"] for each in report["suspects"]]
    assert len(shown) == min(10, len({each["sample"]["BankEntryText"] for each in found}))
    assert (200, [prediction["predicted"]]) == service.post("/predict", asked)
    [suggested] = service.post("/suggest?top=1", asked)[1]["suggestions"]
    assert prediction["confidence"] == suggested["confidence"]
    assert prediction["reason"]["weight"] == max(why["weight"] for why in suggested["reasons"])
    service.stop()
    status, out, said = run(*command[:2], *command[3:], f"--log={log}")
    assert status == 0, said
    assert "all of them are there already, as bookings 0 to 1,499: they were not booked" in out
    assert len(read(log)) == 1500


def test_a_replay_that_stays_serves_its_page_until_it_is_stopped(small, tmp_path):
    process = starts(
        *(small, "--serve", "--stay", "--json", "--samples=200"),
        f"--log={tmp_path / 'log.jsonl'}",
        text=True,
    )
    assert json.loads(process.stdout.readline())["samples"] == 200
    said = iter(process.stderr.readline, "")
    watch, stay = (next(line for line in said if "http://" in line) for _ in range(2))
    url = re.fullmatch("Watch it learn: (.*)\n", watch)[1]
    assert stay == f"The page is at {url} until Ctrl-C\n"
    with urlopen(url) as page:
        assert b"<title>bookkeep" in page.read()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert process.stderr.read() == ""
    with pytest.raises(OSError, match="refused"):
        urlopen(url)


def test_a_replay_that_stays_says_that_its_service_has_ended(small, tmp_path):
    log = tmp_path / "log.jsonl"
    process = starts(small, "--serve", "--stay", "--samples=200", f"--log={log}", text=True)
    assert any("until Ctrl-C" in line for line in iter(process.stderr.readline, ""))
    [service] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(service), signal.SIGTERM)
    assert process.wait(30) == 1
    assert process.stderr.read() == "replay: the service has ended\n"


def test_a_report_in_words_and_file_order_and_a_running_service(main, serve, tmp_path):
    rents = [("6300", "Office rent"), ("7140", "Travel")]
    rows = [
        booking("Larch & Finch", f"{name} {i}", "> -1000", account, AccountName=name)
        for i in range(60)
        for account, name in rents
    ]
    rows += [
        booking("Larch & Finch", "Office rent June", "> -10000", "6300", AccountName="Office rent")
    ]
    path = write_csv(tmp_path / "rents.csv", rows)
    service = serve()
    url = f"http://127.0.0.1:{service.port}"
    status, out, said = main(path, "--url", url, "--order=file", "--batch=9", "--samples=120")
    assert (status, said) == (0, "")
    *lines, metrics, _, page = out.splitlines()
    assert re.fullmatch(r"120 bookings in [\d.]+ s, [\d,]+ a second", lines[0])
    report = service.get("/report/100")[1]
    n = report["support"]
    assert f"The last {n} predictions, each of one among 2 accounts" in lines[2]
    figures = r"(\d+) were right: accuracy ([\d.]+) %; .* precision ([\d.]+) %, recall ([\d.]+) %"
    right, *shares = map(float, re.search(figures, lines[3]).groups())
    assert right / n == report["accuracy"]
    names = ("accuracy", "precision", "recall")
    assert shares == pytest.approx([100 * report[name] for name in names], abs=0.051)
    figures = r"(\d+) could have .* at least (\d+) % sure: (\d+) of these were right, ([\d.]+) %"
    sure, at_least, right, share = map(float, re.search(figures, lines[4]).groups())
    level = replay.best_level(report["confidence"])
    assert [at_least / 100, sure / n, right / sure] == [
        *map(level.get, ("at_least", "share", "accuracy"))
    ]
    assert share == pytest.approx(100 * level["accuracy"], abs=0.051)
    assert lines[6] == 'The next one, not sent: "Office rent June" of Larch & Finch, > -10000'
    why = r' % sure, because of "(office|rent|office rent)" \([a-z ]+\)'
    assert re.fullmatch(rf"  predicted 6300 \(Office rent\), \d+{why}", lines[7])
    assert lines[8] == "  the accountant booked 6300 (Office rent)"
    told = "/metrics/1000   precision {precision:.3f}   recall {recall:.3f}"
    assert metrics == told.format(**service.get("/metrics/1000")[1])
    assert page == f"Its page is at {url}/"
    service.stop()
    assert [record["sample"] for record in read(tmp_path / "log.jsonl")] == rows[:120]


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [
        ((0.8, 0.91, 0.93, 1.0), 0.8),
        ((0.9, 0.91, 0.93, 1.0), 0.8),
        ((0.8, 0.85, 0.89, 0.92), 0.95),
        ((0.8, 0.85, 0.89, 0.89), 0.9),
        ((0.8, 0.85, None, None), 0.9),
    ],
    ids=str,
)
def test_most_is_booked_unseen_where_nine_of_ten_are_right(accuracies, best):
    levels = [
        {"at_least": at_least, "share": share, "accuracy": accuracy}
        for at_least, share, accuracy in zip(
            (0.5, 0.8, 0.9, 0.95), (0.8, 0.6, 0.4, 0.2), accuracies, strict=True
        )
    ]
    assert replay.best_level(levels)["at_least"] == best


def test_an_integrator_who_books_unseen_learns_how_good_it_is(main, small, tmp_path):
    log = tmp_path / "log.jsonl"
    command = (small, "--serve", f"--log={log}", "--batch=200", "--samples=3000", "--json")
    status, out, said = main(*command, "--book-from=0.9")
    assert status == 0, said
    report = json.loads(out)
    assert not report["resumable"]  # the suggestions would be others
    found = report["booked_unseen"]
    said, true = found["said"], found["true"]
    lines = read_lines(log)
    truth = [row["AccountNumber"] for row in rows_by_date()[:3000]]
    who = [line["sample"].get("BookedBy") for line in lines]
    first = next(i for i, each in enumerate(who) if each)  # in the second batch
    assert None not in who[first:]
    assert found["suggestions"] == -(-(3000 - first) // 2)
    second = range(3000 - found["suggestions"], 3000)
    assert found["checks"] == sum(who[i] == "check" for i in second) > 10
    unseen = [i for i in second if who[i] == "suggestion"]
    assert found["unseen"] == len(unseen) > 300
    for i in second:
        sample, predicted = lines[i]["sample"], lines[i]["predicted"]
        assert sample["AccountNumber"] == (predicted if i in unseen else truth[i])
        assert (lines[i]["confidence"] >= 0.9) == (who[i] != "person")
        assert ("AccountName" in sample) == (i not in unseen)
    right = {i: lines[i]["predicted"] == truth[i] for i in second}
    assert found["unseen_wrong"] == sum(not right[i] for i in unseen)
    sure = [right[i] for i in second if who[i] != "person"]
    assert true["accuracy"] == pytest.approx(np.mean(sure))
    assert true["overall"] == pytest.approx(np.mean([*right.values()]))
    checked = [right[i] for i in second if who[i] == "check"]
    assert said["accuracy"] == pytest.approx(np.mean(checked))
    assert said["checks"] == found["checks"]
    assert abs(said["accuracy"] - true["accuracy"]) < 3 * said["error"]
    words = replay.in_words(report)
    assert f"{len(unseen):,} unseen, of which {found['unseen_wrong']:,} are wrong" in words
    assert f"{100 * said['accuracy']:.1f} % (± {100 * said['error']:.1f} %), the service" in words
    assert f"the service says; {100 * true['accuracy']:.1f} %, in truth" in words


def test_an_integrator_who_has_nothing_to_go_by_books_as_the_file_says(main, serve, tmp_path):
    path = write_csv(tmp_path / "one.csv", [booking()])
    url = f"--url=http://127.0.0.1:{serve().port}"
    report = json.loads(main(path, url, "--order=file", "--book-from=0", "--json")[1])
    assert (report["samples"], report["booked_unseen"]) == (1, None)


def test_a_report_says_what_is_not_there_yet_and_what_to_try_next():
    level = {"at_least": 0.9, "share": 0.0, "accuracy": None}
    last = {"support": 5, "accuracy": 0.2, "precision": 0.1, "recall": 0.1}
    report = {
        **{"samples": 6, "stored_before": 2, "seconds": 1.0, "samples_per_second": 6},
        **{"stored_as": [8, 9], "known": 0, "corrected": 0, "how": " --company acme --map text=T"},
        **{"accounts": 3, "metrics": {"1000": {"precision": 0.1, "recall": 0.1}}, "report": last},
        **{"unseen": level, "booked_unseen": None, "suspects": [], "prediction": None},
        **{"interrupted": False, "resumable": True, "log": "x/log"},
    }
    words = replay.in_words(report)
    assert "none was at least 90 % sure, so none could" in words
    assert "\n2 of them are there already, as bookings 8 to 9: they were not booked twice" in words
    assert "the same command with --stay" in words
    assert "python bookkeep.py --log x/log" in words
    assert "replay.py NEW.csv --suggest --company acme --map text=T > SUGGESTED.csv" in words
    odd = {"sample": booking("a", "rent"), "account": "7", "likely": "6", "probability": 0.934}
    suspects = [
        odd | {"like": "text", "alike": 1400, "on_likely": 1300, "on_account": 2},
        odd | {"like": None, "alike": 0, "on_likely": 0, "on_account": 0},
    ]
    words = replay.in_words(report | {"suspects": suspects})
    says = '\n  93 % "rent" of a, > -1000, is on 7; 6 is likelier'
    assert f"{says}: of 1,400 others with the same text, 1,300 on 6, 2 on 7{says}\n" in words
    interrupted = replay.in_words(report | {"interrupted": True})
    assert interrupted.endswith("Interrupted; the same command goes on with --log x/log")
    early = replay.in_words(report | {"report": None, "unseen": None})
    assert "was not measured yet" in early
    stays = replay.in_words(report | {"page": "http://127.0.0.1:1/"})  # which is said after it
    assert "--stay" not in stays
    assert stays.endswith("All of it is in x/log")


def test_all_of_a_small_file_is_sent(main, serve, tmp_path):
    path = write_csv(tmp_path / "all.csv", bookings(40))
    command = (path, f"--url=http://127.0.0.1:{serve().port}", "--samples=all", "--json")
    status, out, said = main(*command)
    assert (status, out) == (1, "")
    assert re.fullmatch("replay: .* no column BankEntryDate .* --order file .*\n", said)
    status, out, _ = main(*command, "--order=file")
    report = json.loads(out)
    assert (status, report["samples"], report["prediction"]) == (0, 40, None)


def test_batches_are_of_random_size_and_the_same_for_the_same_seed():
    rows = [booking()] * 5000
    sizes = [len(batch) for batch in replay.batches(rows, 100, seed=1)]
    assert sum(sizes) == 5000
    assert max(sizes) <= 100
    assert len(set(sizes)) > 20
    assert sizes == [len(batch) for batch in replay.batches(rows, 100, seed=1)]
    assert sizes != [len(batch) for batch in replay.batches(rows, 100, seed=2)]


def test_it_says_once_and_at_once_that_it_waits_for_a_service_that_starts_late(serve, small):
    port = free_port()
    process = starts(small, f"--url=http://127.0.0.1:{port}", "--samples=200", "--json", text=True)
    started = time.monotonic()
    said = process.stderr.readline()
    assert time.monotonic() - started < 10
    assert f"replay: waiting 30 s for the service at http://127.0.0.1:{port} " in said
    assert "start it with python bookkeep.py" in said
    serve(port=port)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert json.loads(out)["samples"] == 200


def test_a_service_that_does_not_start_is_one_sentence(main, small, tmp_path):
    log = tmp_path / "log"
    log.write_text("nonsense\n")
    status, out, said = main(small, "--serve", f"--log={log}")
    assert (status, out) == (1, "")
    assert re.fullmatch("replay: the service did not start: bookkeep: .*\n", said)


class Stub(BaseHTTPRequestHandler):
    """Answers its server's `status` to bookings, or nothing if that is None."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(200, b'{"lines": 3, "samples": 3, "accounts": 1}')

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.status:
            self.answer(self.server.status, b"nonsense")

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize("status", [None, 503, 507, 200, 400, 401, 413, 415, 422])
def test_it_says_how_to_resume_only_where_that_can_help(main, monkeypatch, small, status):
    impatient = partial(replay.Client, patience=0.1)
    monkeypatch.setattr(replay, "Client", impatient)
    with serving(Stub, status=status) as (_, url):
        exited, out, said = main(small, f"--url={url}", "--samples=9")
    assert (exited, out) == (1, "")
    helps = status in (None, 503, 507)
    assert said.endswith("; the same command goes on\n") == helps
    assert ("--again books all of them" in said) == (status == 422)


@pytest.mark.parametrize("order", ["date", "file"])
def test_a_replay_reads_its_file_but_once_so_that_a_pipe_will_do(tmp_path, order):
    rows = [booking(text=f"rent {i}", BankEntryDate="2016-02-29") for i in range(300)]
    with open(write_csv(tmp_path / "rents.csv", rows), "rb") as file:
        piped = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)
        command = (REPLAY, "/dev/stdin", "--serve", f"--order={order}")
        done = run(*command, "--log", tmp_path / "log.jsonl", stdin=piped.stdout)
        assert piped.wait() == 0
    assert done[0] == 0, done
    assert [record["sample"] for record in scanned(tmp_path / "log.jsonl")] == rows


def test_an_interrupted_replay_reports_what_was_sent(tmp_path):
    log = tmp_path / "log.jsonl"
    process = starts(
        *(SYNTHETIC, "--samples=all", "--batch=1", "--serve", f"--log={log}", "--json"),
        start_new_session=True,
    )
    wait_until(lambda: log.exists() and log.stat().st_size > 10_000)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C does
    out, said = process.communicate(timeout=30)
    report = json.loads(out)
    assert (process.returncode, report["interrupted"]) == (130, True)
    assert b"Traceback" not in said
    assert "1000" in report["metrics"], said
    # The service is stopped, and the batch that was under way may be in its log.
    assert len(read(log)) - report["samples"] in (0, 1)


def test_a_replay_to_a_service_that_has_forgotten_all(main, serve, small):
    service = serve()
    service.post("/sample", [booking()] * 200)
    service.delete("/company/A")
    url = f"--url=http://127.0.0.1:{service.port}"
    status, out, said = main(small, url, "--samples=150", "--json")
    assert (status, said) == (0, "")
    report = json.loads(out)
    assert (report["samples"], report["stored_before"]) == (150, 0)


def cut_off(service, log):
    """Kills the service, and cuts off the last batch, as if it had been killed while it came."""
    service.stop(signal.SIGKILL)
    log.write_bytes(log.read_bytes()[:-1])


def test_rows_that_are_there_already_are_not_booked_twice_unless_that_is_asked_for(
    main, serve, small, tmp_path
):
    service = serve()
    service.post("/sample", [booking()] * 7)
    command = (small, f"--url=http://127.0.0.1:{service.port}", "--json", "--batch=50")
    first = json.loads(main(*command, "--samples=400")[1])
    assert (first["stored_before"], first["stored_as"]) == (0, [])
    log = tmp_path / "log.jsonl"
    cut_off(service, log)
    whole = len(scanned(log)) - 7
    assert whole < 400
    service = serve(port=service.port)
    service.post("/sample", [booking()] * 500)  # others have booked meanwhile
    status, out, said = main(*command, "--samples=900")
    assert status == 0, said
    second = json.loads(out)
    assert (second["samples"], second["stored_before"]) == (900, whole)
    assert second["stored_as"] == [7, whole + 6]
    stored = [record["sample"] for record in scanned(log)[7:]]
    assert [sample for sample in stored if sample != booking()] == rows_by_date()[:900]
    third = json.loads(main(*command, "--samples=900", "--again")[1])
    assert (third["stored_before"], third["resumable"]) == (0, False)
    assert service.samples() == 507 + 1800


def test_an_export_that_overlaps_is_booked_once_by_its_ids(main, serve, tmp_path, caplog):
    service, path = serve(), tmp_path / "rows.csv"
    rows = [row | {"Voucher": f"v{i}" if i % 10 else ""} for i, row in enumerate(bookings(100))]
    command = (path, f"--url=http://127.0.0.1:{service.port}", "--map=id=Voucher", "--order=file")
    # One in ten has none: it is booked once for each file, by the file's own keys.
    for first, last, known, booked in ((0, 60, 0, 60), (30, 90, 27, 33), (30, 90, 27, 0)):
        write_csv(path, rows[first:last])
        before = service.samples()
        status, out, said = main(*command, "--batch=20", "--json")
        assert status == 0, said
        assert service.samples() == before + booked
        assert json.loads(out)["known"] >= known
    rows[51]["AccountNumber"] = "changed"
    write_csv(path, [rows[51], *rows[51:54]])
    status, out, said = main(*command)
    assert "rows with the id of a later one, which is booked in their place: 1" in caplog.text
    assert "\n4 were known by their Id, and not booked twice; changed of them: 1\n" in out
    [found] = service.get(f"/bookings?company={rows[51]['CompanyId']}&Id=v51")[1]["bookings"]
    assert found["account"] == "changed"
    assert found["sample"].keys() == {*booking(), "Id"}


def test_a_replay_outlives_a_restart_of_the_service(serve, small, tmp_path):
    service = serve()
    url = f"--url=http://127.0.0.1:{service.port}"
    process = starts(small, "--batch=5", "--samples=800", "--json", url)
    log = tmp_path / "log.jsonl"
    for size in (30_000, 120_000):
        wait_until(lambda size=size: log.stat().st_size > size)
        service.stop(signal.SIGKILL)
        service = serve(port=service.port)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out)["samples"] == 800
    assert [record["sample"] for record in scanned(log)] == rows_by_date()[:800]


# ------------------------------------------------------------------------- Files of one's own

GERMAN = (
    "Buchungstag;Zweck;Empfänger;Betrag;Konto;AccountNumber;Ledger\r\n"
    '02.01.2024;Miete;"Müller; Söhne";-1.200,50 €;6300;DE12 3456;A\r\n'
    "01.02.2024;;Café Ü;7,00 €;7140;DE12 3456;A\r\n"
    "\r\n"
    "31.12.2023;;Bäcker;12,00- €;4650;DE12 3456;A\r\n"
    "03.02.2024;;;-1,00 €;4650;DE12 3456;A\r\n"
)
MAPPED = "--map=text=Empfänger+Zweck,amount=Betrag,account=Konto,date=Buchungstag"


def test_an_export_of_your_own_bank_is_sent_by_date(tmp_path):
    path = tmp_path / "bank.csv"
    path.write_text(GERMAN, encoding="cp1252", newline="")
    log = tmp_path / "log.jsonl"
    for company, company_of, options in (
        ("A", "company=Ledger,", [f"{MAPPED},company=Ledger"]),
        ("B", "", [MAPPED, "--company=B"]),  # other bookings, under keys of their own
    ):
        status, _, said = run(REPLAY, path, "--serve", f"--log={log}", "--json", *options)
        assert status == 0, said
        assert said == (
            f"replay: {path}: CP1252, separated by semicolons; {company_of}"
            "text=Empfänger+Zweck,amount=Betrag,account=Konto,date=Buchungstag; "
            '"-1.200,50 €" is -1200.50; "02.01.2024" is 2024-01-02; '
            "1 of 4 rows left out, the first in line 6: it has no text\n"
        )
        sent = [record["sample"] for record in scanned(log)][-3:]
        assert [(s["BankEntryDate"], s["BankEntryText"], s["BankEntryAmount"]) for s in sent] == [
            ("2023-12-31", "Bäcker", "-12.00"),
            ("2024-01-02", "Müller; Söhne Miete", "-1200.50"),
            ("2024-02-01", "Café Ü", "7.00"),
        ]
        assert {sample["CompanyId"] for sample in sent} == {company}
        assert sent[0]["AccountNumber"] == "4650"  # the column of this name is another's
        assert "Konto" not in sent[0]


def test_the_company_of_all_rows_stands_above_a_column(tmp_path):
    path = write_csv(tmp_path / "bank.csv", [booking("A"), booking("")])
    assert [row["CompanyId"] for row in replay.read_rows(path, company="B")] == ["B", "B"]


def test_columns_of_the_context_go_under_their_own_names_to_a_service_that_goes_by_them(
    main, tmp_path
):
    rows = [
        {"Payee": "Shop", "Sum": "-5.00", "To": account, "Cost centre": place, "Project": project}
        for place, account in (("North", "1"), ("South", "2"))
        for project in ("A", "")
    ] * 20
    path, log = write_csv(tmp_path / "old.csv", rows), tmp_path / "log.jsonl"
    how = "--map=text=Payee+Project,amount=Sum,account=To,context=Cost centre+Project"
    service = (f"--log={log}", "--serve", "--order=file", "--batch=8")
    status, out, said = main(path, how, "--company=A", *service)
    assert (status, said) == (0, "")
    assert f"bookkeep.py --log {log} --context 'Cost centre,Project' goes on from here" in out
    samples = [record["sample"] for record in read(log)]
    assert [sample["Cost centre"] for sample in samples] == [row["Cost centre"] for row in rows]
    texts = [(sample["BankEntryText"], sample["Project"]) for sample in samples[:2]]
    assert texts == [("Shop A", "A"), ("Shop", "")]  # joined, and by its own name
    assert {*samples[0]}.isdisjoint({"Payee", "Sum", "To"})
    assert read(log)[-1]["context"] == ["Cost centre", "Project"]

    new = write_csv(tmp_path / "new.csv", [row | {"To": ""} for row in rows[:4]])
    context = ("--context=Cost centre,Project", f"--log={log}")
    with replay.started(SERVICE, *context) as (port, _):
        out = main(new, how, "--company=A", "--suggest", f"--url=http://127.0.0.1:{port}")[1]
    suggested = [row["account"] for row in csv.DictReader(out.splitlines())]
    assert suggested == [row["To"] for row in rows[:4]]  # which the place alone tells apart


def test_the_demo_goes_by_the_department(main, monkeypatch, tmp_path):
    monkeypatch.setattr(replay, "DATA", tmp_path)
    path = write_csv(tmp_path / "demo.csv", rows_by_date()[:301])
    with zipfile.ZipFile(tmp_path / "bank_expenses_synthetic.csv.zip", "w") as archive:
        archive.write(path, path.name)
    log = tmp_path / "log.jsonl"
    status, out, said = main("--serve", f"--log={log}", "--samples=300")
    assert (status, said) == (0, "")
    assert read(log)[-1]["context"] == ["Department"]
    assert f"Department {rows_by_date()[300]['Department']}\n" in out


def test_a_file_is_written_with_what_is_suggested_and_nothing_is_learned(serve, tmp_path):
    service = serve()
    service.post("/sample", [booking("A", "Café Ü", "12.00", '47"11;x')] * 30)
    path = tmp_path / "new.csv"
    export = GERMAN.replace("Konto", "IBAN")  # it has no accounts yet
    path.write_text(export, encoding="cp1252", newline="")
    before = service.get("/health")[1]["lines"]
    url = f"--url=http://127.0.0.1:{service.port}"
    out, said = starts(path, "--suggest", url, f"{MAPPED},company=Ledger").communicate(timeout=60)
    why = "1 of 4 rows without a suggestion, the first in line 6: it has no text\n"
    assert said.decode().startswith(f"replay: {path}: CP1252, ")
    assert said.decode().endswith(why)
    rows = export.split("\r\n")
    asked = [
        booking("A", "Müller; Söhne Miete", "-1200.50"),
        booking("A", "Café Ü", "7.00"),
        booking("A", "Bäcker", "-12.00"),
    ]
    sure = [each["suggestions"][0]["confidence"] for each in service.post("/suggest", asked)[1]]
    sure = ["" if each is None else each for each in sure]  # not measured yet
    account = '"47""11;x"'
    assert out.decode().split("\r\n") == [
        f"{rows[0]};account;confidence;BookedBy",
        f"{rows[1]};{account};{sure[0]};suggestion",
        f"{rows[2]};{account};{sure[1]};suggestion",
        "",
        f"{rows[4]};{account};{sure[2]};suggestion",
        f"{rows[5]};;;",
        "",
    ]
    assert service.get("/health")[1]["lines"] == before


def test_what_is_suggested_needs_a_model_but_no_rows(main, serve, tmp_path):
    url = f"--url=http://127.0.0.1:{serve().port}"
    path = write_csv(tmp_path / "new.csv", [replay.without_account(booking())])
    status, out, said = main(path, "--suggest", url)
    assert (status, out, "there is no model yet" in said) == (1, "", True)
    header = path.read_text().partition("\n")[0]
    path.write_text(f"{header}\n")
    assert main(path, "--suggest", url) == (0, f"{header},account,confidence,BookedBy\n", "")


@pytest.mark.parametrize(
    ("account", "written"),
    [
        *(("=1+2", "'=1+2"), ("-6300", "-6300"), ("@x", "'@x"), ("6300", "6300")),
        *(("x;=1+2;y", "x;'=1+2;y"), ("-1.200,50", "-1.200,50"), ('x,"-1"', 'x,\'"-1"')),
    ],
)
def test_a_spreadsheet_does_not_run_an_account(main, serve, tmp_path, account, written):
    service = serve()
    service.post("/sample", [booking(account=account)] * 2)
    path = write_csv(tmp_path / "new.csv", [booking()])
    out = main(path, "--suggest", f"--url=http://127.0.0.1:{service.port}")[1]
    assert [row["account"] for row in csv.DictReader(out.splitlines())] == [written]


def test_a_file_of_quoted_values_gets_quoted_ones(service, tmp_path):
    rows = [booking(company=f"{i}", text='two\r\nlines, "quoted"') for i in range(2500)]
    path = write_csv(tmp_path / "new.csv", rows, "utf-16", quoting=csv.QUOTE_ALL, delimiter="\t")
    url = f"--url=http://127.0.0.1:{service.port}"
    out, said = starts(path, "--suggest", url).communicate(timeout=60)
    assert said.decode() == f"replay: {path}: UTF-16, separated by tabs\n"
    written = out.decode()
    old = path.read_bytes().decode("utf-16").split("\r\n")
    for new, line in zip(written.split("\r\n"), old, strict=True):
        assert new.startswith(line)
    read = list(csv.DictReader(written.splitlines(keepends=True), delimiter="\t"))
    assert [row["BankEntryText"] for row in read] == [row["BankEntryText"] for row in rows]
    assert {row["account"] for row in read} == {"1"}
    assert written.count('"1"\t"0.') + written.count('"1"\t"1.') == 2500


def test_who_has_seen_enough_ends_a_suggestion_quietly(service, tmp_path):
    path = write_csv(tmp_path / "new.csv", [booking(text=f"rent {i}") for i in range(20_000)])
    url = f"--url=http://127.0.0.1:{service.port}"
    for end, status in (("pipe", 141), ("interrupt", 130)):
        process = starts(path, "--suggest", url)
        assert process.stdout.readline().endswith(b"account,confidence,BookedBy\r\n")
        if end == "pipe":
            process.stdout.close()
        else:
            process.send_signal(signal.SIGINT)
            process.stdout.read()
        said = process.stderr.read()
        assert (process.wait(30), said.count(b"Traceback"), said[:7]) == (status, 0, b"")


def test_the_recipes_do_what_they_say(serve, tmp_path):
    """Each block of docs/recipes.md is run as it stands, but for the port."""
    service = serve()
    codes = serve("--target=Vat", "--context=AccountNumber", log=tmp_path / "vat.jsonl")
    text = (HERE / "docs" / "recipes.md").read_text()
    text = text.replace("8080", f"{service.port}").replace("8081", f"{codes.port}")
    programs = re.findall("```python\n(.*?)```", text, re.DOTALL)
    [commands] = re.findall("```sh\n(.*?)```", text, re.DOTALL)
    for name in ("replay.py", "bookkeep.py", "bookkeep_extra"):
        (tmp_path / name).symlink_to(HERE / name)

    def runs(program, *files):
        status, out, said = run("-c", programs[program], *files, cwd=tmp_path)
        assert (status, said) == (0, "")
        return out

    account, decision, _, forgotten = runs(0).splitlines()
    assert (account, decision, forgotten) == ("6300", "review", "2")
    row = {"Date": "17.05.2026", "Description": "", "Amount": "-1.200,00 €", "Category": "6300"}
    shops = [(f"shop{i % 9} {i}", f"{3000 + i % 9}") for i in range(2400)]
    rows = [row | {"Description": text, "Category": account} for text, account in shops]
    write_csv(tmp_path / "BOOKED.csv", rows, "cp1252", delimiter=";")
    before = service.samples()
    for _ in range(2):  # the second time changes nothing
        sent = [line.split()[0] for line in runs(1, "BOOKED.csv").splitlines()]
        assert sent == ["100"] * 24
        assert service.samples() == before + 2400
    stored = read_lines(tmp_path / "log.jsonl")[-1]["sample"]
    assert (stored["BankEntryAmount"], stored["BankEntryDate"]) == ("-1200.00", "2026-05-17")
    new = [{key: row[key] for key in row if key != "Category"} for row in rows[:300]]
    new.append(new[0] | {"Description": '+47 "never;=1+1'})
    write_csv(tmp_path / "NEW.csv", new, "cp1252", delimiter=";")
    out = runs(2, "NEW.csv", "DESK.csv")
    unseen, rest = map(int, re.findall("[0-9]+", out))
    assert unseen + rest == 301
    assert unseen > 200
    assert service.get("/health")[1]["unseen"] == unseen
    with open(tmp_path / "DESK.csv", encoding="utf-8-sig") as file:
        assert '"\'+47 ""never;\'=1+1",' in file.readlines()[-1]
    assert runs(3, "DESK.csv") == f"{rest} sent\n"
    assert read_lines(tmp_path / "log.jsonl")[-1]["sample"]["BankEntryText"] == '+47 "never;=1+1'
    assert service.get("/health")[1]["checks"] in range(6, rest)  # the others are not sure enough
    commands = f'python() {{ "{sys.executable}" "$@"; }}\n{commands}'
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, check=True, capture_output=True)
    with open(tmp_path / "SUGGESTED.csv", encoding="utf-8") as file:
        suggested = list(csv.DictReader(file, delimiter=";"))
    assert [row["account"] for row in suggested[:300]] == [account for _, account in shops[:300]]
    wrong = [booking("acme", f"shop{i} =1+1", "-1200.00", f"{3001 + i}") for i in range(3)]
    seq = service.post("/sample", wrong)[1]["first"]
    assert runs(4, "WRONG.csv") == "4 look wrong\n"  # one is of DESK.csv
    with open(tmp_path / "WRONG.csv", encoding="utf-8-sig") as file:
        found = sorted(csv.DictReader(file), key=lambda row: int(row["Seq"]))
    for row, right in zip(found, ["", "3000", "3002", ""], strict=True):
        row["Right"] = right
    likely = [(int(row["Seq"]) - seq, row["Likely"]) for row in found[1:]]
    assert likely == [(0, "3000"), (1, "3001"), (2, "3002")]
    said = "[0-9]+ of [0-9]+ others with the same .* are on 3000, 0 on 3001"
    assert re.fullmatch(said, found[1]["Why"])
    write_csv(tmp_path / "WRONG.csv", found, "cp1252", delimiter=";")
    status, out, said = run("-c", programs[5], "WRONG.csv", cwd=tmp_path)
    assert (status, out) == (0, f"{seq} was 3001\n{seq + 1} confirmed\n")
    assert "2 of 4 rows left out, the first in line 2: it has no account" in said
    runs(4, "WRONG.csv")
    with open(tmp_path / "WRONG.csv", encoding="utf-8-sig") as file:
        assert not {f"{seq}", f"{seq + 1}"} & {row["Seq"] for row in csv.DictReader(file)}
    assert service.delete("/company/acme")[0] == 200
    rows = [row | {"Vat": f"V{int(row['Category']) % 3}"} for row in rows[:300]]
    write_csv(tmp_path / "BOTH.csv", rows, "cp1252", delimiter=";")
    both = "200 of 200 right\n200 of the 200 that were sure enough\n"
    assert runs(6, "BOTH.csv") == both
    assert codes.post("/predict", {**booking("acme", "shop4 x"), "AccountNumber": "3004"})[1] == [
        "V1"
    ]
    assert service.delete("/company/acme")[0] == 200
    status, out, said = run("-c", programs[1], "BOOKED.csv", cwd=tmp_path)
    assert (status, out) == (1, "")
    assert re.fullmatch("nightly: .*these were forgotten; .*; --again WORD does, .*\n", said)
    for _ in range(2):
        runs(1, "BOOKED.csv", "--again=2")
        assert service.samples() == 2400
