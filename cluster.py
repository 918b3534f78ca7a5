"""Several bookkeeps on one replicated log: a stream of NATS JetStream.

    python bookkeep.py --stream nats://a:4222,b:4222,c:4222/bookkeep

The stream holds the log's lines, so that every node's log has the same bytes in the same order. A
message is published with the sequence of the last one that the node has seen, so that only one node
can append at a position: who comes second unlearns its lines, takes over the other's, and tries
again. All else follows from the log, as it does at a start. There is no consensus, membership or
replication of its own here: these are JetStream's. docs/cluster.md says what follows for a user.

A message is a line of JSON, the rest of it compressed. `base` is how many lines the log has before
it, `part` of `parts` which piece of what did not fit into one message it is.

    NAME.lines   {"base": 1200, "lines": 500, "part": 0, "parts": 1, "node": "b-1f03"}   lines
    NAME.orders  {"base": 1700, "lines": 0, "part": 0, "parts": 1, "node": "b-1f03"}     to forget

An order has no name: it lists the lines that are to be emptied, as differences. A group of lines
whose last part another node's message prevented counts for nothing. One without lines shows that
the stream takes messages again.
"""

import asyncio
import json
import logging
import math
import os
import queue
import re
import secrets
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Coroutine
from contextlib import suppress
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import BytesIO
from typing import NamedTuple, TypeVar
from urllib.parse import parse_qs
from urllib.request import urlopen

import nats
import numpy as np
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.js.api import RawStreamMsg, RetentionPolicy, StorageType, StreamConfig, StreamInfo, StreamState
from nats.js.errors import APIError, NotFoundError

import bookkeep
from bookkeep import (
    CHUNK,
    LINES,
    UNSURE,
    Batch,
    Booking,
    Bookkeeper,
    Busy,
    Conflict,
    Damage,
    Log,
    NotFound,
    NotReady,
    NotStored,
    Sample,
    batches_of,
    check_records,
    chunks,
    scan,
)

T = TypeVar("T")

PATIENCE = 10  # seconds that an append may take until it is given up
RECENT = 3  # seconds after it wrote, for which the others forward to a node
MOST_LAG = 10_000  # lines that a node may lack and still be ready
SEEDED = 1 << 18  # bytes of a log that go into one message, when it becomes the stream's
WRONG_SEQUENCE, NOT_THERE = 10071, 10057  # JetStream's codes: another position; no message
NOT_ASKED = "not asked"
LOST = "the stream is gone, or has lost lines that this log has; docs/cluster.md says what to do"
BEHIND = (
    "the stream no longer has what this log lacks: stop this node, copy the log of another "
    "(curl -f .../samples), remove the file that ends in .stream beside it, and start it again"
)
ERRORS = {error.__name__: error for error in (Busy, Conflict, NotFound, NotStored)}
ADDRESS = "nats://a:4222,b:4222,c:4222/bookkeep"

logger = logging.getLogger("bookkeep.cluster")


class Unreachable(Exception):
    """The stream gave no answer, or none of use; the message says which."""


class Overtaken(Exception):
    """Another node's message stands where this one was to stand."""


class Gone(Exception):
    """The node that was asked gives no answer."""


class Foreign(Exception):
    """The stream is not of this log; the message says what to do."""


class Message(NamedTuple):
    """A message of the stream."""

    sequence: int
    subject: str
    base: int
    lines: int
    part: int
    parts: int
    node: str
    data: bytes


class Stream:
    """What is asked of NATS, from any thread: it knows nothing of bookings."""

    def __init__(self, address: str) -> None:
        """Reads an address. Raises OSError if it is none, or names files that cannot be read."""
        found = re.fullmatch(r"(nats|tls)://(?:(.*)@)?([^/@]+)/([\w-]+)(?:\?(.*))?", address)
        options = parse_qs(found[5] or "", strict_parsing=bool(found[5])) if found else {}
        if not found or options.keys() - {"credentials", "ca", "monitor"}:
            raise OSError(f"--stream must be like {ADDRESS}, not {address}")
        scheme, user, hosts, self.name, _ = found.groups()
        self._servers = [f"{scheme}://{user + '@' if user else ''}{h}" for h in hosts.split(",")]
        self._monitors = [each for text in options.get("monitor", []) for each in text.split(",")]
        self._options: dict[str, object] = {}
        if "credentials" in options:
            [self._options["user_credentials"]] = options["credentials"]
            open(options["credentials"][0], "rb").close()
        if scheme == "tls" or "ca" in options:
            self._options["tls"] = ssl.create_default_context(cafile=options.get("ca", [None])[0])
        self.id = f"{re.sub(r'[^A-Za-z0-9]', '-', socket.gethostname())}-{secrets.token_hex(4)}"
        self._loop = asyncio.new_event_loop()
        self._answering = ThreadPoolExecutor(16)
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def _do(self, work: Coroutine) -> object:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except (nats.errors.Error, OSError) as error:
            raise Unreachable(str(error) or type(error).__name__) from None

    def connect(self, asked: Callable[[bytes], bytes], news: Callable[[str], None]) -> None:
        """Connects to a server, and from then on by itself. Raises Unreachable.

        `asked` answers what other nodes ask, `news` hears of what they have appended.
        """

        async def quiet(*_: object) -> None:  # it says enough itself what cannot be done
            pass

        async def answer(message: Msg) -> None:
            found = b""  # to somebody who only asks whether this node is there
            if message.data:
                run = asyncio.get_running_loop().run_in_executor
                found = await run(self._answering, asked, message.data)
            await message.respond(found)

        async def started(message: Msg) -> None:
            asyncio.ensure_future(answer(message))

        async def heard(message: Msg) -> None:
            news(message.data.decode())

        async def connect() -> None:
            self._nats = await nats.connect(
                self._servers,
                name=self.id,
                error_cb=quiet,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.1,
                connect_timeout=2,
                ping_interval=1,
                max_outstanding_pings=2,
                no_echo=True,
                **self._options,
            )
            self._js = self._nats.jetstream(timeout=2)
            self.room = self._nats.max_payload - 4096  # bytes, for what it is sent
            await self._nats.subscribe(f"{self.name}.node.{self.id}", cb=started)
            await self._nats.subscribe(f"{self.name}.all", cb=started)
            await self._nats.subscribe(f"{self.name}.news", cb=heard)

        self._do(connect())

    def info(self, make: bool = False) -> StreamState | None:
        """How many messages it has, and from where to where; None if there is no such stream.

        With `make`, it makes the stream then. Raises Unreachable, also if it is no safe one.
        """
        subjects = [f"{self.name}.lines", f"{self.name}.orders"]
        wanted = StreamConfig(name=self.name, subjects=subjects, num_replicas=3)
        wanted.storage, wanted.allow_direct = StorageType.FILE, True

        async def ask() -> StreamInfo | None:
            try:
                return await self._js.stream_info(self.name)
            except NotFoundError:
                return await self._js.add_stream(wanted) if make else None

        found = self._do(ask())
        if not found:
            return None
        config = found.config
        for wrong, must in (
            (sorted(config.subjects or []) != subjects, f"be of {' and '.join(subjects)}"),
            (config.storage != StorageType.FILE, "be stored in files"),
            (config.num_replicas < 3, "have at least three replicas"),
            (config.retention != RetentionPolicy.LIMITS, "keep what was read (retention: limits)"),
            (not config.allow_direct, "allow direct gets"),
            (config.deny_delete, "allow that messages are deleted"),
        ):
            if wrong:
                raise Unreachable(f"the stream {self.name} must {must}")
        return found.state

    def unsynced(self) -> list[str]:
        """The monitored servers that do not sync each message onto the disk. Raises OSError."""
        if not self._monitors:
            return ["none of the servers is monitored"]
        found = {}
        for url in self._monitors:
            with urlopen(f"{url}/varz", timeout=2) as answer:
                found[url] = json.load(answer).get("jetstream", {}).get("config", {})
        return [url for url, config in found.items() if not config.get("sync_always")]

    def next(self, sequence: int, subject: str = "*") -> Message | None:
        """The first message from that sequence on, if it is known. Raises Unreachable."""

        async def get() -> Message | None:
            try:
                found = await self._js.get_msg(
                    self.name, sequence, f"{self.name}.{subject}", direct=True, next=True
                )
            except NotFoundError:
                return None
            return _message(found)

        return self._do(get())

    def append(self, subject: str, base: int, lines: int, data: bytes, last: int) -> int:
        """Appends behind the last sequence; the sequence that it has now.

        Raises Overtaken, or Unreachable if it is not acknowledged in time; it may yet come.
        """
        data = zlib.compress(data, 1)
        pieces = [data[at : at + self.room] for at in range(0, len(data), self.room)]
        end = time.monotonic() + PATIENCE
        for part, piece in enumerate(pieces):
            head = {"base": base, "lines": lines, "part": part, "parts": len(pieces)}
            payload = json.dumps({**head, "node": self.id}).encode() + b"\n" + piece
            self._do(self._publish(f"{self.name}.{subject}", payload, last + part, end))
        self._do(self._nats.publish(f"{self.name}.news", b"%d" % (base + lines)))
        return last + len(pieces)

    async def _publish(self, subject: str, payload: bytes, last: int, end: float) -> None:
        headers = {"Nats-Msg-Id": secrets.token_hex(8), "Nats-Expected-Last-Sequence": str(last)}
        while True:
            try:
                await self._js.publish(subject, payload, timeout=1, headers=headers)
                return
            except (nats.errors.Error, OSError) as error:
                reason = str(error) or "no answer"
                if getattr(error, "err_code", None) == WRONG_SEQUENCE:
                    first = await self._id_of(last + 1)
                    if first == headers["Nats-Msg-Id"]:
                        return  # its acknowledgement got lost
                    if first:
                        raise Overtaken from None
            if time.monotonic() > end:
                raise Unreachable(reason)
            await asyncio.sleep(0.05)

    async def _id_of(self, sequence: int) -> str | None:
        with suppress(nats.errors.Error):
            return (await self._js.get_msg(self.name, sequence)).headers["Nats-Msg-Id"]

    def holding(self, line: int) -> Message | None:
        """The last message that has its base before that line, if any is there."""
        state = self.info()
        low, high, found = state.first_seq, state.last_seq, None
        while low <= high:
            middle = (low + high) // 2
            message = self.next(middle)
            if message is None or message.base >= line:
                high = middle - 1
            else:
                found, low = message, message.sequence + 1
        return found

    def erase(self, sequence: int) -> None:
        """Overwrites and deletes a message, if it is there. Raises Unreachable."""

        async def delete() -> None:
            try:
                await self._js.delete_msg(self.name, sequence)
            except APIError as error:
                if error.err_code != NOT_THERE:
                    raise

        self._do(delete())

    def ask(self, node: str, content: bytes) -> bytes:
        """What another node answers, however long it takes. Raises Gone if it is not there."""
        subject = f"{self.name}.node.{node}"

        async def ask() -> bytes:
            answer = asyncio.ensure_future(self._nats.request(subject, content, timeout=3600))
            try:
                while not (await asyncio.wait([answer], timeout=0.2))[0]:
                    await self._nats.request(subject, b"", timeout=1)
                return answer.result().data
            except (nats.errors.Error, OSError):
                asked = not answer.done() or not isinstance(answer.exception(), NoRespondersError)
                raise Gone(*[] if asked else [NOT_ASKED]) from None
            finally:
                answer.cancel()

        return self._do(ask())

    def ask_all(self, content: bytes) -> list[bytes]:
        """What all nodes answer that are there, in a second. Raises Unreachable."""

        async def ask() -> list[bytes]:
            inbox = self._nats.new_inbox()
            answers = await self._nats.subscribe(inbox)
            await self._nats.publish(f"{self.name}.all", content, reply=inbox)
            await asyncio.sleep(1)
            found = [(await answers.next_msg()).data for _ in range(answers.pending_msgs)]
            await answers.unsubscribe()
            return found

        return self._do(ask())

    def close(self) -> None:
        """Ends the connection."""

        async def close() -> None:
            await self._nats.close()

        with suppress(Unreachable, AttributeError):
            self._do(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._answering.shutdown(wait=False)


def _message(found: RawStreamMsg) -> Message:
    head, _, data = (found.data or b"").partition(b"\n")
    head = json.loads(head)
    subject = found.subject.rpartition(".")[2]
    return Message(found.seq, subject, data=data, **head)


class Node(Bookkeeper):
    """A bookkeeper whose log is that of a stream.

    Its writer is the only one that appends, and that takes over what others have appended. A second
    thread follows: it joins the stream, fetches messages, and sees whether the stream can be used.
    """

    def __init__(self, address: str, log: Log, unsaved: int) -> None:
        """Learns all that is in the log, and joins the stream in the background.

        Raises LogError, or OSError if the address is none.
        """
        self._stream = Stream(address)
        self._trouble = "it has not joined the stream yet"  # why nothing can be booked, if so
        self._writable = True  # was the last append acknowledged?
        self._quorum = False  # has the stream a leader?
        self._sequence = 0  # of the last message that the log has
        self._acked = 0  # of the last one appended that the log has not
        self._parts: list[Message] = []  # of a group whose last part has not come
        self._end = 0  # lines of the stream, up to that sequence
        self._heard = 0  # lines that the stream has, by what others say
        self._wrote: dict[str, float] = {}  # node -> when it did
        self._ordered: set[int] = set()  # lines that are to be emptied, and may not be yet
        self._counted = dict.fromkeys(("appends", "append_seconds", "overtaken", "forwarded"), 0)
        self._file: int | None = None  # that says how far the log is, once it has joined
        self._news, self._ended = threading.Event(), threading.Event()
        self._orders: queue.Queue[np.ndarray] = queue.Queue()
        log.order = self._order
        super().__init__(log, unsaved)
        self._position = log.beside("{}.stream")
        for work in (self._keep_up, self._obey):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    # What a caller asks for

    def book(self, samples: list[Sample], key: str | None = None) -> range:
        """Books samples, as Bookkeeper does, by the node that writes. Raises NotReady, too."""
        repeated = Booking(Future(), samples, key)
        if self._is_repeated(repeated):
            return repeated.done.result()
        if not samples:
            return super().book(samples, key)
        found = self._forwarded("book", key is not None, samples, key)
        return range(*found) if found else super().book(samples, key)

    def correct(self, seq: int, account: str) -> str:
        """Corrects a booking, as Bookkeeper does, by the node that writes."""
        [before] = self._forwarded("correct", True, seq, account) or [None]
        return before or super().correct(seq, account)

    def forget(self, company: str) -> int:
        """Removes a company from this node, and orders that the others do it."""
        self._require_stream()
        lines = self._change_by(self._order_forgetting, company)
        forgotten = self._forget_lines(lines)
        self._orders.put(lines)  # for what is left to be done
        return forgotten

    def health(self) -> dict:
        """What Bookkeeper says, and how the node stands to the stream."""
        stream = {
            "status": self._trouble or ("ok" if self._writable else "nothing can be appended"),
            "node": self._stream.id,
            "writer": self._writer_of_all(),
            "lag": self._lag(),
            "quorum": self._quorum,
        }
        return super().health() | {"stream": stream}

    def require_ready(self) -> None:
        """Raises NotReady unless it can book, and knows what the others have booked."""
        super().require_ready()
        self._require_stream()
        if not self._quorum:
            raise NotReady("the stream has no leader")
        if self._lag() > MOST_LAG:
            raise NotReady(f"{self._lag()} lines of the stream are still to be learned")

    def gauges(self) -> dict[str, tuple[str, float]]:
        """What Bookkeeper says, and what there is to say of the stream."""
        texts = {
            "appends": "Appends to the stream.",
            "append_seconds": "Seconds that these took.",
            "overtaken": "Appends that another node came before.",
            "forwarded": "Bookings and corrections that another node made for this one.",
        }
        gauges = {f"stream_{name}_total": (texts[name], n) for name, n in self._counted.items()}
        gauges["stream_lag"] = ("Lines of the stream that the log has not yet.", self._lag())
        gauges["stream_ready"] = ("Whether it can append.", int(not self._reason()))
        return super().gauges() | gauges

    def close(self) -> None:
        """Books what is waiting, and leaves the stream."""
        self._ended.set()
        self._news.set()
        self._orders.put(None)
        super().close()
        self._stream.close()

    # What the writer does

    def _book(self, group: list[Booking]) -> None:
        book = super()._book
        self._require_stream()
        self._in_order(lambda: book([booking for booking in group if not booking.done.done()]))

    def _correct(self, seq: int, account: str) -> str:
        if seq in self._ordered:
            raise NotFound(f"there is no booking {seq}")
        self._require_stream()
        return self._in_order(partial(super()._correct, seq, account))

    def _order_forgetting(self, company: str) -> np.ndarray:
        def order() -> np.ndarray:
            lines, _ = self._lines_of(company)
            self._append("orders", 0, json.dumps(np.diff(lines, prepend=0).tolist()).encode())
            return lines

        lines = self._in_order(order)
        self._ordered.update(lines.tolist())
        return lines

    def _in_order(self, change: Callable[[], T]) -> T:
        """What comes of a change that appends, behind all that others have appended."""
        while True:
            self._acked = 0
            try:
                made = change()
            except Overtaken:
                self._counted["overtaken"] += 1
                self._catch_up()
                continue
            except OSError as error:  # it is taken over from the stream as soon as that can be
                if self._acked:
                    raise NotStored(f"the log could not be written ({error}); {UNSURE}") from None
                raise
            if self._acked:
                self._pass(self._acked)
            return made

    def _order(self, batches: list[Batch]) -> None:
        lines = [line for batch in batches for line in batch.lines]
        if lines:
            self._append("lines", len(lines), b"".join(lines))

    def _append(self, subject: str, lines: int, data: bytes) -> None:
        started = time.perf_counter()
        base = len(self.log)
        try:
            self._acked = self._stream.append(subject, base, lines, data, self._sequence)
        except Unreachable as error:
            self._writable = False
            raise Busy(f"the stream does not acknowledge this ({error}); {UNSURE}") from None
        self._writable = True
        self._counted["appends"] += 1
        self._counted["append_seconds"] += time.perf_counter() - started
        self._wrote[self._stream.id] = time.monotonic()

    def _catch_up(self) -> None:
        end = time.monotonic() + PATIENCE
        try:
            while not self._take(self._fetch()):
                if time.monotonic() > end:
                    raise Busy("what another node has booked is not there yet; send this again")
                time.sleep(0.003)
        except Unreachable as error:
            raise Busy(f"the stream cannot be read ({error}); send this again") from None

    def _fetch(self) -> list[Message]:
        """The next messages that are there, of some thousand lines."""
        found: list[Message] = []
        lines, sequence = 0, self._sequence
        while lines < LINES and len(found) < LINES:
            message = self._stream.next(sequence + 1)
            if not message:
                break
            found.append(message)
            lines, sequence = lines + message.lines, message.sequence
        return found

    def _take(self, messages: list[Message]) -> bool:
        """Takes over what messages say; whether any was new. Raises Foreign, OSError."""
        messages = [each for each in messages if each.sequence > self._sequence]
        base, lines = 0, b""
        for message in messages:
            if message.node != self._stream.id:
                self._wrote[message.node] = time.monotonic()
            data = self._whole(message)
            if data is None:
                continue
            if lines and message.base != self._end:
                self._take_lines(base, lines)
                lines = b""
            self._end = message.base + message.lines
            if message.subject == "orders":
                self._take_order(data)
            elif data:
                base = base if lines else message.base
                lines += data
        self._take_lines(base, lines)
        if messages:
            self._pass(messages[-1].sequence)
        return bool(messages)

    def _whole(self, message: Message) -> bytes | None:
        """What a group of messages says, if this is the last of it."""
        self._parts = [*(self._parts if message.part else []), message]
        if [each.part for each in self._parts] == [*range(message.parts)]:
            return zlib.decompress(b"".join(each.data for each in self._parts))

    def _take_order(self, data: bytes) -> None:
        lines = np.cumsum(json.loads(data))
        self._ordered.update(lines.tolist())
        self._orders.put(lines)

    def _take_lines(self, base: int, data: bytes) -> None:
        if base > len(self.log):
            raise Foreign(BEHIND)
        batches = list(batches_of(BytesIO(data), base))
        records = []
        for batch in batches:
            if isinstance(batch, Damage) or [*check_records(batch.records, batch.line)]:
                raise Foreign("the stream holds what is no log")
            first, end = batch.line - 1, batch.line - 1 + len(batch.lines)
            if first >= len(self.log):
                records += batch.records
                continue
            file, size = self.log.export(range(first, end))
            for mine, theirs in zip(file.read(size).splitlines(True), batch.lines, strict=True):
                if mine != theirs and mine != bookkeep._emptied(theirs, first):
                    raise Foreign(f"the stream is of another log: line {first + 1} differs")
        self.log.write([batch for batch in batches if batch.line > len(self.log)])
        for chunk in chunks(records, CHUNK):
            self._follow(chunk)

    def _pass(self, sequence: int) -> None:
        self._sequence = sequence
        if self._file is not None:
            with suppress(OSError):  # it is of use where the stream is bounded by age
                os.pwrite(self._file, b"%19d %19d\n" % (sequence, len(self.log)), 0)

    def _probe(self) -> None:
        if not self._writable:
            self._in_order(partial(self._append, "lines", 0, b""))

    # What its other threads do

    def _keep_up(self) -> None:
        """Joins the stream, takes over what others append, and sees whether it can be used."""
        connected = False
        while not self._ended.is_set():
            trouble = None
            try:
                if not connected:
                    self._stream.connect(self._asked, self._hear)
                    connected = True
                if self._file is None:
                    self._join()
                self._look()
            except Overtaken:
                continue
            except Unreachable as error:
                self._quorum = False
                trouble = None if self._file is not None else f"the stream cannot be used: {error}"
            except Exception as error:
                trouble = str(error)
            if trouble != self._trouble and trouble:
                logger.warning("%s: %s", self._stream.name, trouble)
            self._trouble = trouble
            self._ended.wait(1)

    def _look(self) -> None:
        looked = -math.inf
        while not self._ended.is_set():
            if time.monotonic() - looked > 1:
                looked = time.monotonic()
                state = self._stream.info()
                if state is None or state.last_seq < self._sequence:
                    raise Foreign(LOST)
                self._quorum = True
                if state.last_seq == self._sequence:
                    self._heard = len(self.log)
                if not self._writable:
                    self._change_by(self._probe)
            while messages := self._fetch():
                self._change_by(self._take, messages)
            self._trouble = None
            self._news.wait(0.003 if self._heard > len(self.log) else 1)
            self._news.clear()

    def _join(self) -> None:
        known = [*map(int, self._position.read_text().split())] if self._position.exists() else []
        state = self._stream.info(make=not known)
        if state is None or (known and state.last_seq < known[0]):
            raise Foreign(LOST)
        mine = len(self.log)
        held, first = self._stream.holding(mine), self._stream.next(1)
        aged = known and state.first_seq > known[0] + 1
        if aged or (first.base > mine if first else state.last_seq and known != [state.last_seq, mine]):
            raise Foreign(BEHIND)
        if held:
            start = held.sequence - held.part
        else:
            start = first.sequence if first else state.last_seq + 1
        self._end = mine if known and not first else 0
        self._sequence = sequence = 0
        while (order := self._stream.next(sequence + 1, "orders")) and order.sequence < start:
            sequence = order.sequence
            if data := self._whole(order):
                self._take_order(data)
        self._sequence = start - 1
        while self._sequence < state.last_seq and not self._ended.is_set():
            self._change_by(self._take, self._fetch())
        if self._end < len(self.log):
            if known:
                raise Foreign(LOST)
            self._seed()
        for server in self._stream.unsynced():
            logger.warning("an acknowledged booking may be lost if the power fails: %s", server)
        self._file = os.open(self._position, os.O_RDWR | os.O_CREAT, 0o600)
        self._pass(self._sequence)
        logger.info("joined the stream %s as %s", self._stream.name, self._stream.id)

    def _seed(self) -> None:
        """Makes what the stream lacks of the log the stream's."""
        logger.info("%s becomes the stream's from line %d on", self.log.path, self._end + 1)
        lines: list[bytes] = []
        size = 0
        for batch in scan(self.log.path):
            if batch.line > self._end + len(lines):
                lines += batch.lines
                size += sum(map(len, batch.lines))
            if size > SEEDED or (lines and self._end + len(lines) == len(self.log)):
                data, n = b"".join(lines), len(lines)
                self._sequence = self._stream.append("lines", self._end, n, data, self._sequence)
                self._end, lines, size = self._end + n, [], 0

    def _obey(self) -> None:
        """Removes what was ordered to be, and then erases the messages that held it."""
        while (lines := self._orders.get()) is not None:
            try:
                with self._changing:
                    rows = self._history.rows
                if np.isin(lines, rows["seq"]).any():
                    self._forget_lines(lines)
                self._ordered.difference_update(lines.tolist())
                self._erase(lines)
            except (Unreachable, NotReady, NotStored) as error:
                logger.warning("not all that was forgotten is erased yet: %s", error)
                self._orders.put(lines)
                if self._ended.wait(1):
                    return

    def _forget_lines(self, lines: np.ndarray) -> int:
        return self._forget(lambda: (lines, len(self.log)))

    def _erase(self, lines: np.ndarray) -> None:
        sequence = self._sequence
        where = zlib.compress(b'["sequence", []]')
        while min([sequence, *map(_made, self._stream.ask_all(where))]) < sequence:
            self._ended.wait(1)
        while len(lines):
            held = self._stream.holding(int(lines[0]) + 1)
            if held and held.base + held.lines > lines[0]:
                for part in range(held.parts):
                    self._stream.erase(held.sequence - part)
                end = held.base + held.lines
            else:
                after = self._stream.next(held.sequence + 1 if held else 1)
                end = after.base if after else math.inf
            lines = lines[lines >= end]

    def _hear(self, lines: str) -> None:
        self._heard = max(self._heard, int(lines))
        self._news.set()

    # Between nodes

    def _forwarded(self, what: str, again: bool, *arguments: object) -> object:
        """What the node that writes answers; None if this one is to do it itself."""
        self._require_stream()
        writer = self._writer_of_all()
        content = zlib.compress(json.dumps([what, arguments]).encode(), 1)
        if writer in (None, self._stream.id) or len(content) > self._stream.room:
            return None
        try:
            answer = json.loads(self._stream.ask(writer, content))
        except (Gone, Unreachable) as error:
            self._wrote.pop(writer, None)
            if again or error.args == (NOT_ASKED,):
                return None
            raise Busy(f"the node that was to book this is gone; {UNSURE}") from None
        self._counted["forwarded"] += 1
        if error := answer.get("error"):
            if error[0] not in ERRORS:
                return None  # it cannot, but this one may
            raise ERRORS[error[0]](error[1])
        with suppress(NotReady):
            self.wait_for(answer["lines"])
        return answer["made"]

    def _asked(self, content: bytes) -> bytes:
        """What another node gets for an answer."""
        what, arguments = json.loads(zlib.decompress(content))
        try:
            if what == "sequence":
                made: object = self._sequence
            elif what == "correct":
                made = [super().correct(*arguments)]
            else:
                numbers = super().book(*arguments)
                made = [numbers.start, numbers.stop]
            answer = {"made": made, "lines": len(self.log)}
        except Exception as error:
            answer = {"error": [type(error).__name__, str(error)]}
        return json.dumps(answer).encode()

    def _writer_of_all(self) -> str | None:
        """The lowest of those that wrote just now: if only that one does, none is overtaken."""
        recently = time.monotonic() - RECENT
        wrote = self._wrote.copy().items()
        return min((node for node, when in wrote if when > recently), default=None)

    def _reason(self) -> str | None:
        waits = None if self._writable else "the stream does not acknowledge; try later"
        return self._trouble or waits

    def _require_stream(self) -> None:
        if reason := self._reason():
            raise Busy(reason)

    def _lag(self) -> int:
        return max(0, self._heard - len(self.log))


def _made(answer: bytes) -> int:
    return json.loads(answer)["made"]
