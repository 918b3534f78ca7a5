"""Several bookkeeps on one stream, with real NATS servers."""

import asyncio
import errno
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path

import nats
import numpy as np
import pytest

from bookkeep import (
    JSON_LINES,
    UNSAVED,
    UNSURE,
    Books,
    Busy,
    Conflict,
    Log,
    NotFound,
    NotReady,
    health,
    require_ready,
    suggest,
)
from bookkeep_extra import cluster
from bookkeep_extra.isolated import Isolated
from bookkeep_extra.logs import check_records
from bookkeep_extra.prometheus import gauges
from conftest import (
    assert_same,
    batches_of,
    booking,
    bookings,
    bookkeeping,
    free_port,
    line_of,
    refused,
    scanned,
    wait_until,
)


class Servers:
    """Three real NATS servers in processes of their own. A message has 64 KB at most."""

    PROGRAM = Path(sys.executable).with_name("nats-server")
    CONFIGURATION = """
        server_name: n%d, listen: "127.0.0.1:%d", http: "127.0.0.1:%d", max_payload: 65536
        jetstream { store_dir: "%s", sync_interval: always }
        cluster { name: c, listen: "127.0.0.1:%d", routes: %s }
        no_auth_user: anybody
        authorization { users: [
            { user: anybody, password: anything }
            { user: narrow, password: "a secret", permissions: {
                publish: [ narrow.lines, narrow.orders, narrow.news, narrow.node, "narrow.node.*"
                    "_INBOX.>", "$JS.API.STREAM.INFO.narrow", "$JS.API.STREAM.CREATE.narrow"
                    "$JS.API.STREAM.MSG.GET.narrow", "$JS.API.STREAM.MSG.DELETE.narrow"
                    "$JS.API.DIRECT.GET.narrow" ]
                subscribe: [ narrow.node, "narrow.node.*", narrow.news, "_INBOX.>" ] } }
        ] }
    """

    def __init__(self, folder):
        clients, self.monitors, routes = ([free_port() for _ in range(3)] for _ in range(3))
        self.hosts = ",".join(f"127.0.0.1:{port}" for port in clients)
        self.folders = [folder / f"n{number}" for number in range(3)]
        for number, of in enumerate(self.folders):
            of.mkdir()
            ports = number, clients[number], self.monitors[number], of, routes[number]
            others = json.dumps([f"nats://127.0.0.1:{port}" for port in routes])
            (of / "configuration").write_text(self.CONFIGURATION % (*ports, others))
        self.processes = [None] * 3
        self.start(0, 1, 2)

    def start(self, *numbers):
        for number in numbers:
            of = self.folders[number]
            command = [self.PROGRAM, "-c", of / "configuration", "-l", of / "log"]
            self.processes[number] = subprocess.Popen(command)

    def kill(self, *numbers):
        for number in numbers:
            self.processes[number].kill()
            self.processes[number].wait()

    def address(self, topic, user="", options=""):
        return f"nats://{user}{self.hosts}/{topic}{options}"

    def do(self, work):
        """What a coroutine does with JetStream."""

        async def run():
            client = await nats.connect([f"nats://{host}" for host in self.hosts.split(",")])
            try:
                return await work(client.jetstream(timeout=5))
            finally:
                await client.close()

        with ThreadPoolExecutor(1) as thread:  # in this one, a browser may have a loop
            return thread.submit(asyncio.run, run()).result()

    def make(self, topic, **configuration):
        """Makes a stream like a bookkeep's, but for this."""
        like = {"subjects": [f"{topic}.lines", f"{topic}.orders"], "num_replicas": 3}
        like |= {"allow_direct": True} | configuration
        self.do(lambda js: js.add_stream(nats.js.api.StreamConfig(topic, **like)))

    def messages(self, topic):
        """What is in it: sequence -> subject, head and what is compressed."""

        async def read(js):
            found = {}
            state = (await js.stream_info(topic)).state
            for sequence in range(state.first_seq, state.last_seq + 1):
                with suppress(nats.js.errors.NotFoundError):
                    message = await js.get_msg(topic, sequence)
                    head, _, data = message.data.partition(b"\n")
                    found[sequence] = (message.subject, json.loads(head), data)
            return found

        return self.do(read)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """What all tests share; each has a stream of its own in it."""
    servers = Servers(tmp_path_factory.mktemp("nats"))
    try:
        wait_until(partial(makes_streams, servers))
        yield servers
    finally:
        servers.kill(0, 1, 2)


def makes_streams(servers):
    ended = [i for i, process in enumerate(servers.processes) if process.poll() is not None]
    servers.start(*ended)  # for a moment, another process may have had their ports
    with suppress(nats.errors.Error, OSError):
        servers.make("ready")
        return servers.do(lambda js: js.delete_stream("ready"))


@pytest.fixture
def topic(request):
    """A name for the test's stream."""
    return re.sub(r"\W", "_", request.node.name)[:80]


class Nodes:
    """Nodes in this process, each with a log of its own name in a folder."""

    def __init__(self, folder, address):
        self.folder, self.address, self.nodes = folder, address, []

    def __call__(self, name, ready=True, address=None, books=None):
        """Starts one."""
        path = self.folder / name
        node = cluster.Node(address or self.address, Log(path), UNSAVED, books)
        self.nodes.append(node)
        node.path = path
        if ready:
            wait_until(lambda: is_ready(node))
        return node

    def close(self, *nodes):
        for node in nodes:
            self.nodes.remove(node)
            node.close()


@pytest.fixture
def joined(servers, topic, tmp_path):
    nodes = Nodes(tmp_path, servers.address(topic))
    yield nodes
    nodes.close(*nodes.nodes)


def is_ready(node):
    with suppress(NotReady):
        require_ready(node)
        return True


def stream(node):
    """How a node in this process stands to its stream."""
    return health(node)["stream"]


def stands(node):
    return stream(node)["status"]


def booked(node):
    """How many bookings a node in this process has."""
    return health(node)["samples"]


def equal(nodes):
    """Waits until the logs of nodes have as many lines; whether these are the same."""
    most = max(len(node.log) for node in nodes)
    wait_until(lambda: all(len(node.log) == most for node in nodes))
    return len({node.path.read_bytes() for node in nodes}) == 1


@contextmanager
def behind(node):
    """Inside, the node makes no change, so that it learns nothing of what others append."""
    held, let_go = threading.Event(), threading.Event()

    def hold():
        held.set()
        assert let_go.wait(30)

    thread = threading.Thread(target=node.change, args=[hold])
    thread.start()
    assert held.wait(30)
    try:
        yield
    finally:
        let_go.set()
        thread.join()


@contextmanager
def each_by_itself():
    """Inside, no node has another one book for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "RECENT", 0)
        yield


@contextmanager
def changed_late(node, change):
    """Has a node make a change, with what is done inside before; gives what came of it."""
    came, submit, submitted = [], node.writer.submit, threading.Event()

    def note(work):
        submitted.set()
        return submit(work)

    def make():
        try:
            came.append(change())
        except NotFound as error:
            came.append(type(error))

    thread = threading.Thread(target=make)
    with each_by_itself(), behind(node), pytest.MonkeyPatch.context() as patch:
        patch.setattr(node.writer, "submit", note)
        thread.start()
        assert submitted.wait(30)
        yield came
    thread.join()


def knows(node, total):
    """Waits until a node has so many lines, as an answer that must know of them does."""
    node.order.require_lines(node.log, total)


def test_nodes_have_equal_logs_and_know_the_same(joined):
    nodes = [joined(name) for name in "abc"]
    for number, batch in enumerate(batches_of(bookings(300), 20)):
        numbers = nodes[number % 3].book(batch, f"key{number}")
        assert numbers == range(number * 21, number * 21 + 20)
        other = nodes[(number + 1) % 3]
        knows(other, numbers.stop)
        assert other.correct(numbers[3], "9999") == batch[3]["AccountNumber"]
        knows(nodes[number % 3], numbers.stop + 1)
    assert nodes[0].book(bookings(300, seed=2), "long") == range(15 * 21, 15 * 21 + 300)
    assert equal(nodes)
    wait_until(lambda: len({booked(node) for node in nodes}) == 1)
    a, b, c = nodes
    assert_same(a, b)
    assert_same(a, c)
    assert len({gauges(node)["last_batch_accuracy"][1] for node in nodes}) == 1
    assert {node.books.last_batch for node in nodes} == {15 * 21}
    with bookkeeping(shutil.copy(a.path, a.path.with_name("copy"))) as keeper:
        assert_same(a, keeper)


def test_a_node_says_how_it_stands_to_the_stream(serve, servers, topic, tmp_path):
    a, b = (
        serve("--stream", servers.address(topic), log=tmp_path / name, reads=True) for name in "ab"
    )
    wait_until(lambda: a.get("/ready") == b.get("/ready") == (200, {"status": "ready"}))
    said = a.get("/health")[1]["stream"]
    as_it_should = {"status": "ok", "writer": None, "lag": 0, "quorum": True, "to_forget": 0}
    assert said == as_it_should | {"node": said["node"]}
    status, answer = a.post("/sample", bookings(20))
    assert (status, answer["total"]) == (200, 20)
    wait_until(lambda: b.get("/health")[1]["stream"]["writer"] == said["node"])
    assert b.post("/sample", bookings(5))[1]["total"] == 25  # by the other one
    for at_least, status in (("25", 200), ("-1", 400), ("x", 400)):
        headers = {"Bookkeep-At-Least": at_least}
        assert b.ask("POST", "/predict", booking(), headers=headers)[0] == status
    figures = b.ask("GET", "/metrics", kind="text/plain; version=0.0.4; charset=utf-8")[2].decode()
    assert re.findall(r"^bookkeep_stream_(forwarded_total|lag|writable) (\S+)", figures, re.M) == [
        ("forwarded_total", "1"),
        ("lag", "0"),
        ("writable", "1"),
    ]
    assert b.stop() == a.stop() == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_who_asks_for_more_than_is_known_waits_but_keeps_nobody_waiting(joined):
    a, b = joined("a"), joined("b")
    a.book(bookings(5))
    knows(b, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "LATE", 1)
        raised = []

        def wait():
            try:
                knows(b, 6)
            except Busy as error:
                raised.append((time.monotonic() - started, str(error)))

        started = time.monotonic()
        threads = [threading.Thread(target=wait) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(raised) == 40
    assert sum(after >= 1 for after, _ in raised) in range(1, 16)  # of 16 threads for questions
    later = threading.Thread(target=wait)
    later.start()
    a.book(bookings(1))
    later.join()
    assert len(raised) == 40


def test_a_key_is_booked_once_whoever_is_sent_it_when(servers, topic, joined):
    servers.make(topic, duplicate_window=0.1)
    nodes = [joined(name) for name in "abc"]
    numbers = []

    def send(node):
        numbers.append(node.book(bookings(7), "key"))

    for _ in range(2):
        threads = [threading.Thread(target=send, args=[nodes[i % 3]]) for i in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(0.2)  # then the server has forgotten the message's own id
    assert numbers == [range(7)] * 18
    with pytest.raises(Conflict):
        nodes[0].book(bookings(6), "key")
    assert equal(nodes)
    assert nodes[0].book(bookings(1)) == range(7, 8)


def test_an_acknowledgement_that_is_lost_doubles_nothing(servers, topic, joined):
    servers.make(topic, duplicate_window=0.1)
    a, b = joined("a"), joined("b")
    publish, lost = nats.js.JetStreamContext.publish, []

    async def lose(*arguments, **options):
        found = await publish(*arguments, **options)
        if not lost:
            lost.append(found)
            await asyncio.sleep(0.3)
            raise nats.errors.TimeoutError
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nats.js.JetStreamContext, "publish", lose)
        assert a.book(bookings(3)) == range(3)
        assert len(lost) == 1
        lost.clear()
        assert a.correct(1, "9999") == bookings(3)[1]["AccountNumber"]
        assert len(lost) == 1
    assert equal([a, b])
    assert len(a.log) == 4


def test_what_is_lost_on_its_way_to_the_node_that_writes_is_not_waited_for(joined):
    """As it may be if a server dies that both were connected to."""
    writer, other = sorted([joined("a"), joined("b")], key=lambda node: stream(node)["node"])
    writer.book(bookings(3))
    wait_until(lambda: stream(other)["writer"])
    request, lost = nats.NATS.request, []

    async def lose(client, subject, content, **options):
        if ".node." in subject and len(content) > 50:
            lost.append(subject)
            await asyncio.sleep(3600)
        return await request(client, subject, content, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nats.NATS, "request", lose)
        started = time.monotonic()
        assert other.book(bookings(2), "key") == range(3, 5)
        writer.book(bookings(1))
        wait_until(lambda: stream(other)["writer"] == stream(writer)["node"])
        with pytest.raises(Busy, match=UNSURE):
            other.book(bookings(2))
    assert time.monotonic() - started < 3
    assert len(lost) == 2
    assert equal([writer, other])


def test_a_list_of_several_messages_is_taken_whole_or_not_at_all(servers, topic, joined):
    a, b = joined("a"), joined("b")
    rng = random.Random(0)
    large = [booking(text=rng.randbytes(500).hex()) for _ in range(200)]  # 100 KB, compressed
    assert a.book(large) == range(200)
    publish, between = nats.js.JetStreamContext.publish, []

    async def interrupted(stream, subject, message, **options):
        head = json.loads(message.partition(b"\n")[0])
        if head["part"] == 1 and not between:  # the other part is there
            between.append(None)
            run = asyncio.get_running_loop().run_in_executor
            between.append(await run(None, b.book, [booking(account="1")]))
        return await publish(stream, subject, message, **options)

    with each_by_itself(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nats.js.JetStreamContext, "publish", interrupted)
        assert a.book(large, "key") == range(201, 401)
    assert between == [None, range(200, 201)]
    assert equal([a, b, joined("c")])
    places = [(head["base"], head["part"]) for _, head, _ in servers.messages(topic).values()]
    places = places[places.index((200, 0)) :]
    assert places[:4] == [(200, 0), (200, 0), (201, 0), (201, 1)]
    assert a.book(large, "key") == b.book(large, "key") == range(201, 401)


CRASHES = """
import os, sys, bookkeep
method = getattr(bookkeep.Log, sys.argv[1])
def crash(*arguments):
    if os.path.exists(sys.argv[2]):
        os._exit(9)
    return method(*arguments)
setattr(bookkeep.Log, sys.argv[1], crash)
sys.exit(bookkeep.main(sys.argv[3:]))
"""


def crashes_in(method, path):
    """A service that crashes where its log is to do this, once there is that file."""
    return ("-c", CRASHES, method, path)


def test_a_node_that_crashes_before_it_has_written_what_it_appended(
    serve, servers, topic, joined, tmp_path
):
    options = ["--stream", servers.address(topic)]
    service = serve(*options, log=tmp_path / "a", program=crashes_in("write", tmp_path / "crash"))
    other = joined("b")
    wait_until(lambda: service.get("/ready")[0] == 200)
    assert service.post("/sample", bookings(10))[0] == 200
    (tmp_path / "crash").touch()
    headers = {"Idempotency-Key": "key"}
    with pytest.raises((OSError, HTTPException)):
        service.ask("POST", "/sample", bookings(5, seed=1), headers=headers)
    knows(other, 15)
    assert len((tmp_path / "a").read_bytes().splitlines()) == 10
    assert other.book(bookings(5, seed=1), "key") == range(10, 15)
    assert other.book(bookings(1)) == range(15, 16)
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[:-9])  # as if what was written before were not on disk
    service = serve(*options, log=tmp_path / "a")
    wait_until(lambda: service.get("/ready")[0] == 200)
    assert service.ask("POST", "/sample", bookings(5, seed=1), headers=headers)[2]["first"] == 10
    assert service.samples() == 16
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_disk_that_fails_after_the_acknowledgement_skips_nothing(
    serve, servers, topic, joined, tmp_path
):
    service, other = serve("--stream", servers.address(topic), log=tmp_path / "a"), joined("b")
    wait_until(lambda: service.get("/ready")[0] == 200)
    assert service.post("/sample", bookings(50))[0] == 200
    full = (tmp_path / "a").stat().st_size
    unlimited = resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (full, -1))
    headers = {"Idempotency-Key": "key"}
    status, _, answer = service.ask("POST", "/sample", bookings(9, seed=1), headers=headers)
    assert status == 507
    assert UNSURE in answer["error"]
    assert service.get("/ready")[0] == 503
    wait_until(lambda: "could not be written" in service.get("/health")[1]["stream"]["status"])
    assert service.post("/sample", bookings(1, seed=2))[0] in (503, 507)
    assert service.post("/predict", booking())[0] == 200
    assert other.book(bookings(9, seed=1), "key") == range(50, 59)
    other.book(bookings(3, seed=3))
    assert service.get("/health")[1]["lines"] == 50
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, unlimited)
    wait_until(lambda: service.get("/ready")[0] == 200)
    status, _, answer = service.ask("POST", "/sample", bookings(9, seed=1), headers=headers)
    assert (status, answer["first"]) == (200, 50)
    wait_until(lambda: service.samples() == 62)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_company_is_forgotten_by_all_nodes_and_by_the_stream(servers, topic, joined):
    a, b, away = (joined(name) for name in "abc")
    secret = [booking(company="secret", text=f"confidential {i}") for i in range(4)]
    for i, batch in enumerate([[*bookings(5), secret[0]], bookings(3), secret[1:], bookings(2)]):
        [a, b][i % 2].book(batch)
        assert equal([a, b, away])
    b.correct(5, "9999")
    assert equal([a, b, away])
    joined.close(away)
    assert a.forget("secret") == 4
    for node in (a, b):
        wait_until(lambda node=node: booked(node) == 10)
    a.book(bookings(2))
    wait_until(lambda: equal([a, b]))
    assert b"confidential" not in a.path.read_bytes()
    # Before a correction and an order comes a group of no lines.
    wait_until(lambda: {*servers.messages(topic)} == {2, 4, 5, 7, 8, 9})
    for of in servers.folders:
        for block in of.glob(f"**/streams/{topic}/msgs/*.blk"):
            assert b"confidential" not in plain(block.read_bytes())
    assert b"confidential" in away.path.read_bytes()
    back = joined("c")
    wait_until(lambda: booked(back) == 12 and equal([a, b, back]))
    wait_until(lambda: [stream(node)["to_forget"] for node in (a, b, back)] == [0, 0, 0])
    assert_same(a, b)
    assert_same(a, back)
    new = joined("d", ready=False)  # it lacks what stood in messages that are gone
    wait_until(lambda: "copy the log of another" in stands(new))
    with pytest.raises(NotFound):
        b.forget("secret")


def plain(content):
    """All that is compressed in this, one after the other."""
    starts = [found.start() for found in re.finditer(b"\x78\x01", content)]
    pieces = []
    for start in starts:
        with suppress(zlib.error):
            pieces.append(zlib.decompressobj().decompress(content[start:]))
    return b"".join(pieces)


def test_a_node_that_is_alone_erases_what_it_forgot(servers, topic, joined):
    node = joined("a")
    for i in range(2):
        node.book([booking(company=f"secret{i}")])
    for i in range(2):
        assert node.forget(f"secret{i}") == 1
        wait_until(lambda i=i: i + 1 not in servers.messages(topic))


def test_two_who_forget_a_company_while_a_third_books_it_agree(joined):
    nodes = [joined(name) for name in "abc"]
    secret = [booking(company="secret", text=f"{i}") for i in range(300)]
    nodes[0].book(secret[:100])
    nodes[0].book(bookings(5))
    assert equal(nodes)
    forgotten = []

    def forget(node):
        with suppress(NotFound):
            forgotten.append(node.forget("secret"))

    threads = [threading.Thread(target=forget, args=[node]) for node in nodes[:2]]
    for thread in threads:
        thread.start()
    for sample in secret[100:]:
        numbers = nodes[2].book([sample])
    for thread in threads:
        thread.join()
    assert 100 <= sum(forgotten) <= 300
    knows(nodes[0], numbers.stop)
    assert nodes[0].forget("secret") == 300 - sum(forgotten)
    wait_until(lambda: [stream(node)["to_forget"] for node in nodes] == [0] * 3)
    wait_until(lambda: [booked(node) for node in nodes] == [5] * 3)
    wait_until(lambda: equal(nodes))
    assert_same(nodes[0], nodes[1])
    assert_same(nodes[0], nodes[2])
    with bookkeeping(shutil.copy(nodes[0].path, nodes[0].path.with_name("copy"))) as keeper:
        assert_same(nodes[0], keeper)


@pytest.mark.parametrize("method", ["start_forgetting", "empty", "finish_forgetting"])
def test_a_node_that_crashes_before_it_has_forgotten_does_it_later(
    serve, servers, topic, joined, tmp_path, method
):
    options = ["--stream", servers.address(topic)]
    crashes = crashes_in(method, tmp_path / "crash")
    service = serve(*options, log=tmp_path / "a", program=crashes)
    other = joined("b")
    wait_until(lambda: service.get("/ready")[0] == 200)
    assert service.post("/sample", [booking(company="secret"), booking()])[0] == 200
    (tmp_path / "crash").touch()
    with pytest.raises((OSError, HTTPException)):
        service.delete("/company/secret")
    wait_until(lambda: booked(other) == 1)
    service = serve(*options, log=tmp_path / "a")
    wait_until(lambda: service.samples() == 1)
    wait_until(lambda: (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes())


@pytest.mark.parametrize("starts_again", [False, True])
def test_what_a_node_has_still_to_forget_is_counted_and_done_once_it_can(joined, starts_again):
    a, b = joined("a"), joined("b")
    a.book([booking(company="secret"), booking()])
    assert equal([a, b])
    start = Log.start_forgetting

    def fail_on_one(log, lines):
        if log is b.log:
            raise OSError(errno.ENOSPC, "No space left on device")
        return start(log, lines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "start_forgetting", fail_on_one)
        assert a.forget("secret") == 1
        wait_until(lambda: stream(b)["to_forget"] == 1)
        assert stream(a)["to_forget"] == 0
        assert booked(b) == 1
        with pytest.raises(NotFound):
            b.correct(0, "9999")
        assert b"secret" in b.path.read_bytes()
        a.book(bookings(3))
        assert equal([a, b]) is False
        if starts_again:
            joined.close(b)
    if starts_again:
        b = joined("b")
    wait_until(lambda: stream(b)["to_forget"] == 0)
    assert b"secret" not in b.path.read_bytes()
    assert equal([a, b])
    assert_same(a, b)


def test_a_node_knows_its_log_in_messages_that_are_not_erased_yet(servers, topic, joined):
    node = joined("a")
    node.book([booking(company="secret"), booking()])

    def fail(stream, sequence):
        raise cluster.Unreachable("no answer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.Stream, "erase", fail)
        assert node.forget("secret") == 1
        joined.close(node)
    assert 1 in servers.messages(topic)
    assert booked(joined("a")) == 1
    wait_until(lambda: 1 not in servers.messages(topic))


def test_what_is_ordered_to_be_forgotten_cannot_be_corrected(joined):
    a, b = joined("a"), joined("b")
    a.book([booking(company="secret"), booking()])
    assert equal([a, b])
    with changed_late(b, lambda: b.correct(0, "9999")) as came:
        assert a.forget("secret") == 1
    assert came == [NotFound]
    wait_until(lambda: equal([a, b]))
    assert health(b)["companies"] == 1
    assert [*check_records(scanned(a.path), 1)] == []
    with bookkeeping(shutil.copy(a.path, a.path.with_name("copy"))) as keeper:
        assert booked(keeper) == 1


def test_a_correction_is_compared_with_what_others_have_booked_last(joined):
    a, b = joined("a"), joined("b")
    a.book([booking(account="1")])
    assert equal([a, b])
    with changed_late(b, lambda: b.correct(0, "1")) as came:
        assert a.correct(0, "2") == "1"
    assert came == ["2"]
    assert equal([a, b])


def test_what_has_an_id_is_compared_with_what_others_have_booked_last(joined):
    a, b = joined("a"), joined("b")
    sample = booking(account="1") | {"Id": "17"}
    assert a.book([sample]) == range(1)
    assert equal([a, b])
    assert b.book([sample]) == range(1, 1)
    with changed_late(b, lambda: b.book([sample])) as came:
        assert a.book([sample | {"AccountNumber": "2"}]) == range(1, 2)
    assert came == [range(2, 3)]  # it is booked to 2 by then, so this corrects it
    moved = sample | {"BankEntryText": "another"}
    assert b.book([moved, sample | {"Id": "18"}]) == range(3, 5)
    assert equal([a, b])
    a.change(lambda: None)  # it has learned what it has
    assert_same(a, b)
    assert a.books.sample(a.booking(0)) == moved
    assert a.seq_of("A", "18") == 3


def test_nodes_learn_each_company_apart(joined):
    a, b = (joined(name, books=Isolated()) for name in "ab")
    a.book(bookings(200))
    first, *_ = b.book([booking("new", account="1"), booking("gone"), booking("new")])
    assert b.correct(first, "2") == "1"
    assert a.forget("gone") == 1
    wait_until(lambda: equal([a, b]) and "gone" not in b.books.companies)
    assert {*a.books.companies} == {*b.books.companies} == {*b.books.history.companies}
    for node in (a, b):
        with pytest.raises(NotReady, match="sample 0: there is no model of its company"):
            node.books.predict([booking("gone")])
    asked = [*bookings(30, seed=1), booking("new")]
    assert suggest(a.books, asked, 3) == suggest(b.books, asked, 3)


def test_another_log_is_refused_and_kept(joined, tmp_path):
    a = joined("a")
    a.book(bookings(5))
    with bookkeeping(tmp_path / "b") as keeper:
        keeper.book(bookings(5, seed=1))
    before = (tmp_path / "b").read_bytes()
    b = joined("b", ready=False)
    wait_until(lambda: "of another log, by its line 1" in stands(b))
    with pytest.raises(NotReady, match="of another log"):
        b.book(bookings(1))
    assert b.books.predict([booking()]) != []
    assert not is_ready(b)
    a.book(bookings(1))
    time.sleep(0.1)
    assert (tmp_path / "b").read_bytes() == before
    assert len(a.log) == 6


def test_nodes_learn_from_the_same_keys_or_say_that_they_do_not(joined):
    a, b = (joined(name, books=Books(["Department"], "Vat")) for name in "ab")
    a.book([booking(Vat="25", Department="HR"), booking(Vat="12", Department="IT")])
    assert b.correct(1, "0") == "12"
    assert equal([a, b])
    a.change(lambda: None)  # it has learned what it has
    assert_same(a, b)
    for number, books in enumerate((Books(["Project"], "Vat"), Books())):
        other = joined(f"other{number}", ready=False, books=books)
        wait_until(lambda other=other: "context Department, the target Vat" in stands(other))
        with pytest.raises(NotReady, match="line 1 of the stream: it was learned with the context"):
            require_ready(other)
        assert len(other.log) == 0


def test_a_log_of_one_machine_goes_into_a_cluster_and_back(serve, servers, topic, joined, tmp_path):
    with bookkeeping(tmp_path / "a") as keeper:
        for number, batch in enumerate(batches_of(bookings(3000), 500)):
            keeper.book(batch, f"key{number}")
        keeper.correct(3, "9999")
    first = bookings(3000)[:500]
    before = (tmp_path / "a").read_bytes()
    shutil.copy(tmp_path / "a", tmp_path / "same")
    killed = serve("--stream", servers.address(topic), log=tmp_path / "a")
    wait_until(lambda: has_messages(servers, topic))
    killed.process.kill()
    killed.process.wait()
    sizes = len(servers.messages(topic))
    a, same, new = joined("a", ready=False), joined("same", ready=False), joined("new", ready=False)
    wait_until(lambda: all(map(is_ready, [a, same, new])))
    assert equal([a, same, new])
    assert new.path.read_bytes() == before
    assert new.book(first, "key0") == range(500)
    new.book(bookings(2, seed=9))
    assert equal([a, same, new])
    assert sizes > 0
    joined.close(new)
    with bookkeeping(new.path) as keeper:
        assert keeper.book(bookings(1)) == range(3003, 3004)
    joined.close(a)
    changed = joined("new", ready=False)
    wait_until(lambda: stands(changed) != "it has not joined the stream yet")
    assert "lost lines that this log has" in stands(changed)


def has_messages(servers, topic):
    with suppress(nats.errors.Error):
        return servers.do(lambda js: js.stream_info(topic)).state.messages > 0


def test_what_is_booked_while_the_stream_is_looked_at_is_not_missed(joined):
    node = joined("a")
    looked, state = threading.Event(), cluster.Stream.state

    def slow(stream):
        found = state(stream)
        node.book(bookings(1))
        looked.set()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.Stream, "state", slow)
        assert looked.wait(30)
        time.sleep(0.1)
        assert stands(node) == "ok"


@pytest.mark.parametrize("again", ["never", "with as many messages"])
def test_a_stream_that_is_gone_is_noticed(servers, topic, joined, again):
    a, b = joined("a"), joined("b")
    a.book(bookings(20))
    assert equal([a, b])
    servers.do(lambda js: js.delete_stream(topic))
    if again == "with as many messages":
        servers.make(topic)
        servers.do(lambda js: js.publish(f"{topic}.lines", first_message(bookings(3))))
    for node in (a, b):
        wait_until(lambda node=node: stands(node) not in ("ok", None))
        assert "stream is gone" in stands(node)
        with pytest.raises(NotReady, match="stream is gone"):
            node.book(bookings(1))
        assert len(node.books.predict(bookings(3))) == 3
    joined.close(a)
    a = joined("a", ready=False)
    wait_until(lambda: stands(a) != "it has not joined the stream yet")
    assert "gone" in stands(a) or "another log" in stands(a)
    assert len(a.log) == len(b.log) == 20


def first_message(samples):
    """A message as a node would append it first of all."""
    lines = [line_of({"seq": i, "batch": 0, "left": 2 - i}) for i in range(len(samples))]
    head = {"base": 0, "lines": len(samples), "part": 0, "parts": 1, "node": "n"}
    return json.dumps(head).encode() + b"\n" + zlib.compress(b"".join(lines))


def test_a_log_that_is_too_far_behind_says_what_to_copy(servers, topic, joined):
    servers.make(topic, max_age=3600)
    a, away = joined("a"), joined("b")
    a.book(bookings(5))
    assert equal([a, away])
    joined.close(away)
    for seed in range(3):
        a.book(bookings(5, seed=seed))
    servers.do(lambda js: js.purge_stream(topic, seq=4))  # as its age would
    behind, new = joined("b", ready=False), joined("new", ready=False)
    for node in (behind, new):
        wait_until(lambda node=node: "copy the log of another" in stands(node))
        joined.close(node)
    shutil.copy(a.path, new.path)
    copied = joined("new")
    copied.book(bookings(2))
    servers.do(lambda js: js.purge_stream(topic))
    behind.path.write_bytes(new.path.read_bytes())
    behind.path.with_name("b.stream").unlink()
    joined.close(a)
    assert not is_ready(joined("b", ready=False))
    a = joined("a")  # it knows that it has all that was in the stream
    a.book(bookings(1))
    assert equal([a, copied])


WRONG = {
    "two replicas": {"num_replicas": 2},
    "memory": {"storage": "memory"},
    "another subject": {"subjects": ["wrong.>"]},
    "read once": {"retention": "workqueue"},
    "no direct gets": {"allow_direct": False},
    "nothing deleted": {"deny_delete": True},
    "the last only": {"max_msgs_per_subject": 1},
    "small messages": {"max_msg_size": 1000},
    "no acknowledgement": {"no_ack": True},
    "no more than": {"max_msgs": 100, "discard": "new"},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_stream_that_would_not_keep_a_log_is_refused(servers, topic, joined, wrong):
    servers.make(topic, **wrong)
    node = joined("a", ready=False)
    wait_until(lambda: " must " in stands(node))
    with pytest.raises(NotReady, match=" must "):
        node.book(bookings(1))


def test_what_is_no_bookkeepers_message_is_named(servers, topic, joined):
    node = joined("a")
    servers.do(lambda js: js.publish(f"{topic}.lines", b"hello"))
    wait_until(lambda: "no bookkeep" in stands(node))
    with pytest.raises(NotReady, match="no bookkeep"):
        node.book(bookings(1))


def test_a_user_of_nats_needs_few_permissions(servers, joined):
    address = servers.address("narrow", user="narrow:a%20secret@")
    a, b = joined("a", address=address), joined("b", address=address)
    assert a.book(bookings(3)) == range(3)
    wait_until(lambda: stream(b)["writer"])
    assert b.book([booking(company="secret")]) == range(3, 4)
    assert b.forget("secret") == 1
    wait_until(lambda: equal([a, b]))
    wait_until(lambda: [*servers.messages("narrow")] == [1, 3, 4])


def test_a_node_that_may_not_connect_says_so(joined, tmp_path):
    port = str(free_port())
    options = ["-a", "127.0.0.1", "-p", port, "--user", "u", "--pass", "right"]
    server = subprocess.Popen([Servers.PROGRAM, *options, "-l", tmp_path / "said"])
    try:
        wrong = joined("a", ready=False, address=f"nats://u:wrong@127.0.0.1:{port}/books")
        wait_until(lambda: "uthorization" in stands(wrong))
        with pytest.raises(NotReady, match="uthorization"):
            wrong.book(bookings(1))
    finally:
        server.kill()
        server.wait()


def test_unsafe_servers_are_named_and_those_that_are_away_stop_nobody(
    servers, topic, joined, caplog
):
    with socket.create_server(("127.0.0.1", 0)) as away:
        monitors = [f"http://127.0.0.1:{port}" for port in servers.monitors]
        monitors += [f"http://127.0.0.1:{away.getsockname()[1]}", "nonsense"]
        joined("a", address=servers.address(topic, options="?monitor=" + ",".join(monitors)))
    assert all(monitor not in caplog.text for monitor in monitors[:3])
    assert all(monitor in caplog.text for monitor in monitors[3:])


@pytest.mark.parametrize(
    "address",
    [
        "a",
        "http://a/b",
        "nats://a:1",
        "nats://a:1/b/c",
        "nats://a:1/b?x",
        "nats://a:1/b?x=1",
        "nats://a:1/b?ca=/nowhere",
        "nats://a:1/b?credentials=/nowhere",
        "nats://a:1/b?credentials=/nowhere&credentials=/nowhere",
        "nats://a:x/b",
    ],
)
def test_an_address_that_is_none_is_an_error_in_one_sentence(tmp_path, address):
    assert "Traceback" not in refused(tmp_path / "log", f"--stream={address}")


def test_without_nats_py_it_says_what_to_install(tmp_path):
    (tmp_path / "nats.py").write_text("raise ModuleNotFoundError(name='nats')")
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    said = refused(tmp_path / "log", "--stream=nats://a/b", env=environ)
    assert "pip install 'bookkeep-service[cluster]'" in said


def test_bookings_under_way_are_answered_before_a_node_stops(serve, servers, topic, tmp_path):
    """And the other goes on; also if all stop, and start again."""
    options = ["--stream", servers.address(topic)]
    nodes = [serve(*options, log=tmp_path / name) for name in "ab"]
    wait_until(lambda: all(node.get("/ready")[0] == 200 for node in nodes))
    answered, refused = [], []

    def send(number):
        with suppress(OSError, HTTPException):
            for i in itertools.count():
                batch = bookings(2, seed=100 * number + i)
                key = {"Idempotency-Key": f"{number}-{i}"}
                status, _, answer = nodes[number % 2].ask("POST", "/sample", batch, headers=key)
                if status != 200:
                    return refused.append((number, answer))
                answered.append((answer["first"], batch))

    threads = [threading.Thread(target=send, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(answered) > 40)
    names = [node.get("/health")[1]["stream"]["node"] for node in nodes]
    writes = names.index(min(names))
    assert nodes[writes].stop() == 0
    so_far = len(answered)
    wait_until(lambda: len(answered) > so_far + 40 or refused)
    assert [each for each in refused if each[0] % 2 != writes] == []
    assert nodes[1 - writes].stop() == 0
    for thread in threads:
        thread.join()
    nodes = [serve(*options, log=tmp_path / name) for name in "ab"]
    wait_until(lambda: all(node.get("/ready")[0] == 200 for node in nodes))
    logs = [(tmp_path / name).read_bytes() for name in "ab"]
    assert logs[0] == logs[1]
    log = [record["sample"] for record in scanned(tmp_path / "a")]
    assert all(log[first : first + 2] == batch for first, batch in answered)
    assert "Traceback" not in "".join(node.said() for node in nodes)


def test_a_node_that_was_stopped_for_some_time_doubles_nothing(serve, servers, topic, tmp_path):
    options = ["--stream", servers.address(topic)]
    nodes = [serve(*options, log=tmp_path / name) for name in "ab"]
    wait_until(lambda: all(node.get("/ready")[0] == 200 for node in nodes))
    names = [node.get("/health")[1]["stream"]["node"] for node in nodes]
    writer, other = (nodes[names.index(name)] for name in sorted(names))
    assert writer.post("/sample", bookings(1))[0] == 200
    wait_until(lambda: other.get("/health")[1]["stream"]["writer"] == min(names))
    writer.process.send_signal(signal.SIGSTOP)
    headers = {"Idempotency-Key": "key"}
    late = []
    sending = threading.Thread(
        target=lambda: late.append(writer.ask("POST", "/sample", bookings(2), headers=headers))
    )
    sending.start()
    status, _, answer = other.ask("POST", "/sample", bookings(2), headers=headers)
    assert (status, answer["first"]) == (200, 1)
    assert other.post("/correct", {"seq": 0, "AccountNumber": "1"})[0] == 200
    assert other.post("/correct", {"seq": 0, "AccountNumber": "2"})[0] == 200
    time.sleep(1)
    writer.process.send_signal(signal.SIGCONT)
    sending.join()
    assert (late[0][0], late[0][2]["first"]) == (200, 1)
    assert other.post("/sample", bookings(1))[1]["first"] == 5
    wait_until(lambda: writer.get("/health")[1]["lines"] == 6)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


IMPATIENT = """
import sys, bookkeep
from bookkeep_extra import cluster
from bookkeep_extra.prometheus import gauges
cluster.PATIENCE = 2
sys.exit(bookkeep.main())
"""


def test_without_a_quorum_all_but_bookings_goes_on(serve, servers, topic, tmp_path):
    options = ["--stream", servers.address(topic)]
    nodes = [serve(*options, log=tmp_path / name, program=("-c", IMPATIENT)) for name in "ab"]
    wait_until(lambda: all(node.get("/ready")[0] == 200 for node in nodes))
    first, second = batches_of(bookings(50), 25)
    known = {"Idempotency-Key": "known"}
    assert nodes[0].ask("POST", "/sample", first, headers=known)[0] == 200
    assert nodes[0].post("/sample", second)[0] == 200
    headers = {"Idempotency-Key": "key"}
    wait_until(lambda: nodes[1].samples() == 50)
    servers.kill(0, 1)
    try:
        for node in nodes:
            assert node.post("/correct", {"seq": 0, "AccountNumber": "1"})[0] == 503
            status, _, _ = node.ask("POST", "/sample", bookings(9, seed=1), headers=headers)
            assert status == 503
            started = time.monotonic()
            for _ in range(3):
                status, said, _ = node.ask("POST", "/sample", bookings(3), headers=headers)
                assert (status, said["Retry-After"]) == (503, "1")
                assert node.post("/correct", {"seq": 0, "AccountNumber": "1"})[0] == 503
            assert node.delete("/company/company1")[0] == 503
            assert time.monotonic() - started < 1
            status, _, answer = node.ask("POST", "/sample", first, headers=known)
            assert (status, answer["first"]) == (200, 0)
            assert node.post("/predict", booking())[0] == 200
            assert node.get("/metrics/10")[0] == 200
            assert len(node.ask("GET", "/samples", kind=JSON_LINES)[2].splitlines()) == 50
        for node in nodes:
            wait_until(lambda node=node: not node.get("/health")[1]["stream"]["quorum"])
            assert node.get("/ready")[0] == 503
    finally:
        servers.start(0, 1)
    wait_until(lambda: all(node.get("/ready")[0] == 200 for node in nodes))
    said = []
    for node in nodes:
        ask = partial(node.ask, "POST", "/sample", bookings(9, seed=1), headers=headers)
        # The stream may elect another leader once more: a client would send it again, too.
        wait_until(lambda ask=ask: said.append(ask()) or said[-1][0] != 503)
    [one, other] = (answer for status, _, answer in said if status == 200)
    assert one["first"] == other["first"]
    wait_until(lambda: nodes[0].samples() == nodes[1].samples() == 59)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_node_stops_at_once_without_its_stream(serve, tmp_path):
    nowhere = f"nats://127.0.0.1:{free_port()}/nothing"
    service = serve("--stream", nowhere, log=tmp_path / "a")
    wait_until(lambda: "connect" in service.get("/health")[1]["stream"]["status"].lower())
    assert service.post("/sample", bookings(1))[0] == 503
    assert service.get("/ready")[0] == 503
    started = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - started < 2


class Fleet:
    """Three bookkeeps on three NATS servers, with what may happen to each."""

    def __init__(self, servers, serve, folder):
        self.servers, self.logs = servers, [folder / f"{number}.jsonl" for number in range(3)]
        ports = [free_port() for _ in range(3)]
        options = ["--stream", servers.address("fleet")]
        self.serve = lambda i: serve(*options, log=self.logs[i], port=ports[i], unsaved=500)
        self.nodes = [self.serve(number) for number in range(3)]

    def servers_dead(self, numbers, seconds):
        self.servers.kill(*numbers)
        time.sleep(seconds)
        self.servers.start(*numbers)

    def leader(self):
        while True:
            with suppress(nats.errors.Error, OSError):
                info = self.servers.do(lambda js: js.stream_info("fleet"))
                return int(info.cluster.leader.removeprefix("n"))

    def fault(self, kind, rng):
        """Lets it happen; for how many seconds nothing could be booked for sure."""
        leader, node = self.leader(), rng.randrange(3)
        if kind == "a server that leads is killed":
            self.servers_dead([leader], 2)
        elif kind == "a server that follows is killed":
            self.servers_dead([(leader + rng.choice([1, 2])) % 3], 2)
        elif kind == "a server that leads is stopped for some seconds":
            held(self.servers.processes[leader], rng.uniform(3, 8))
        elif kind == "two servers are dead":
            self.servers_dead([leader, (leader + 1) % 3], 4)
            return 4
        elif kind == "three servers are dead":
            self.servers_dead([0, 1, 2], 4)
            return 4
        elif kind == "a bookkeep is killed":
            self.nodes[node].process.kill()
            self.nodes[node].process.wait()
            time.sleep(1)
            self.nodes[node] = self.serve(node)
        elif kind == "a bookkeep is ended":
            assert self.nodes[node].stop() == 0
            self.nodes[node] = self.serve(node)
        else:
            held(self.nodes[node].process, rng.uniform(1, 8))
        return 0

    FAULTS = (
        *("a server that leads is killed", "a server that follows is killed"),
        *("a server that leads is stopped for some seconds", "two servers are dead"),
        *("three servers are dead", "a bookkeep is killed", "a bookkeep is ended"),
        "a bookkeep is stopped for some seconds",
    )

    def keep_sending(self, number, ended, answered):
        """Books lists, each under its key until it is, and corrects one of each. Notes answers."""
        rng = random.Random(number)
        for turn in itertools.count():
            if ended.is_set():
                return
            key = f"{number}-{turn}"
            batch = [booking(text=f"{key} {i}") for i in range(rng.randint(1, 20))]
            headers = {"Idempotency-Key": key}
            answer = self.until_done(rng, "POST", "/sample", batch, headers=headers)
            answered.append((time.monotonic(), answer["first"], batch))
            if turn % 5 == 0:
                corrected = {"seq": answer["last"], "AccountNumber": key}
                self.until_done(rng, "POST", "/correct", corrected)
                batch[-1]["AccountNumber"] = key

    def until_done(self, rng, *what, **more):
        while True:
            with suppress(OSError, HTTPException):
                status, _, answer = rng.choice(self.nodes).ask(*what, **more)
                if status == 200:
                    return answer
                assert status in (503, 507), answer
            time.sleep(0.05)


def held(process, seconds):
    """Stops a process for some seconds."""
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)


def wait_for_20_more(answered):
    so_far = len(answered)
    wait_until(lambda: len(answered) > so_far + 20)


def test_whatever_dies_nothing_is_lost_or_doubled(serve, tmp_path):
    """As many faults as BOOKKEEP_ROUNDS says, while four send and send again."""
    rounds = int(os.environ.get("BOOKKEEP_ROUNDS", 0))
    if not rounds:
        pytest.skip("it takes ten seconds for each of BOOKKEEP_ROUNDS")
    rng = random.Random(int(os.environ.get("BOOKKEEP_SEED", random.randrange(10**6))))
    servers, ended, answered, pauses = Servers(tmp_path), threading.Event(), [], defaultdict(list)
    try:
        fleet = Fleet(servers, serve, tmp_path)
        sending = [
            threading.Thread(target=fleet.keep_sending, args=[number, ended, answered])
            for number in range(4)
        ]
        for thread in sending:
            thread.start()
        for number in range(rounds):
            wait_for_20_more(answered)
            kind = Fleet.FAULTS[number % len(Fleet.FAULTS)]
            before = len(answered) - 1
            excused = fleet.fault(kind, rng)
            wait_for_20_more(answered)
            assert all(thread.is_alive() for thread in sending)
            pause = np.diff([when for when, *_ in answered[before:]]).max() - excused
            pauses[kind].append(round(float(pause), 2))
            print(number, kind, pauses[kind][-1], flush=True)
        ended.set()
        for thread in sending:
            thread.join()
        wait_until(lambda: all(node.get("/ready")[0] == 200 for node in fleet.nodes))
        most = max(node.get("/health")[1]["lines"] for node in fleet.nodes)
        wait_until(lambda: all(node.get("/health")[1]["lines"] == most for node in fleet.nodes))
        for node in fleet.nodes:
            assert node.stop() == 0
            assert "Traceback" not in node.said()
    finally:
        ended.set()
        servers.kill(0, 1, 2)
    for kind, seconds in pauses.items():
        print(f"{kind}: {len(seconds)}, pauses up to {max(seconds)} s", sorted(seconds))
    print(len(answered), "lists", most, "lines")
    logs = [log.read_bytes() for log in fleet.logs]
    assert logs[0] == logs[1] == logs[2]
    log = standing_bookings(fleet.logs[0])
    sent = [(first + i, sample) for _, first, batch in answered for i, sample in enumerate(batch)]
    assert all(log[seq] == sample for seq, sample in sent)
    assert len(log) == len(sent)


def standing_bookings(path):
    """What a log says of bookings, as they are corrected: seq -> sample."""
    samples = {}
    for record in scanned(path):
        if "sample" in record:
            samples[record["seq"]] = record["sample"]
        else:
            samples[record["corrects"]]["AccountNumber"] = record["AccountNumber"]
    return samples
