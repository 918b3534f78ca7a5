"""Several bookkeeps on one replicated log: a stream of NATS JetStream.

`python bookkeep.py --stream nats://a:4222,b:4222,c:4222/bookkeep` makes a service a node of it.
The stream holds the log's lines: every node's log has the same bytes in the same order, and all
else follows from the log, as it does at a start. A message is published with the sequence of the
last one that its node has seen, so only one node can append at a position: who comes second
unlearns, takes over what came first, and tries again. There is no consensus, membership or
replication of its own here; those are JetStream's. docs/cluster.md says what follows for users.

A message is a line of JSON and compressed bytes. `base` is how many lines the log has before it; a
group of messages, part 0 to `parts` - 1, holds what is too long for one:

    NAME.lines   {"base": 1200, "lines": 500, "part": 0, "parts": 1, "node": "1f03a2c4"}
    NAME.orders  {"base": 1700, "lines": 0, "part": 0, "parts": 1, "node": "1f03a2c4"}

The bytes are lines of the log, or the numbers of lines to empty, as differences: an order to forget
has no name. A group counts for nothing if another node's message stands where its next part should.
One of no lines is appended to see whether that is possible, and whether all before it is known.
"""

import asyncio
import json
import logging
import math
import os
import re
import secrets
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from io import BytesIO
from typing import NamedTuple
from urllib.parse import parse_qs
from urllib.request import urlopen

import nats
import numpy as np
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.js.api import StreamState
from nats.js.errors import APIError, NotFoundError

import bookkeep
from bookkeep import UNSURE, Bookkeeper, Busy, Log, NotReady, NotStored, Sample, T
from bookkeep_extra.logs import check_records

LATE = 5  # seconds that a request may wait for lines that others have booked
PATIENCE = 10  # seconds that an append may take until it is given up
RECENT = 3  # seconds for which the others forward to a node that wrote
LOST = "the stream is gone, or has lost lines that this log has; docs/cluster.md says what to do"
NONSENSE = "the stream holds what no bookkeep has written"
BEHIND = (
    "the stream no longer has what this log lacks: stop this node, copy the log of another "
    "(curl -f .../samples), remove the file beside it that ends in .stream, and start it again"
)
COUNTERS = {  # since the start
    "stream_appends_total": "Groups of lines appended to the stream.",
    "stream_append_seconds_total": "Seconds that this took.",
    "stream_overtaken_total": "Appends that another node's came before.",
    "stream_forwarded_total": "Bookings and corrections that another node made for this one.",
}

logger = logging.getLogger("bookkeep.cluster")


class Unreachable(Exception):
    """The stream gave no answer, or none of use; the message says which."""


class Overtaken(Exception):
    """Another node's message stands where this one was to stand."""


class Gone(Exception):
    """The node that was asked is not there."""

    def __init__(self, asked: bool) -> None:
        self.asked = asked  # may it have done what it was asked for?


class Refused(Busy):
    """This node cannot book, and has not tried to; another one may."""


class Foreign(Exception):
    """The stream is not of this log; the message says what to do."""


class Message(NamedTuple):
    """A message of the stream."""

    sequence: int
    subject: str
    data: bytes
    base: int
    lines: int
    part: int
    parts: int
    node: str


def _message(sequence: int, subject: str, content: bytes) -> Message:
    head, _, data = content.partition(b"\n")
    try:
        return Message(sequence, subject, data, **json.loads(head))
    except (TypeError, ValueError):
        raise Foreign(NONSENSE) from None


class Stream:
    """What is asked of NATS, from any thread. It knows nothing of bookings."""

    def __init__(self, address: str) -> None:
        """Reads an address. Raises OSError if it is none, or names no file."""
        host = r"(?:[\w.-]+|\[[\w:.]+\])(?::\d{1,5})?"
        pattern = rf"(nats|tls)://(.*@)?({host}(?:,{host})*)/([\w-]+)(\?.*)?"
        found = re.fullmatch(pattern, address)
        options = parse_qs(found[5][1:], keep_blank_values=True) if found and found[5] else {}
        if not found or options.keys() - {"credentials", "ca", "monitor"}:
            example = "nats://a:4222,b:4222,c:4222/bookkeep"
            raise OSError(f"--stream must be like {example}, as docs/cluster.md says")
        scheme, user, hosts, self.name, _ = found.groups("")
        self._servers = [f"{scheme}://{user}{host}" for host in hosts.split(",")]
        self._monitors = [url for text in options.get("monitor", []) for url in text.split(",")]
        self._options = {"connect_timeout": 2, "ping_interval": 1, "max_outstanding_pings": 2}
        self._options |= {"max_reconnect_attempts": -1, "reconnect_time_wait": 0.1, "no_echo": True}
        if "credentials" in options:
            self._options["user_credentials"] = options["credentials"][0]
            open(options["credentials"][0], "rb").close()
        if scheme == "tls" or "ca" in options:
            self._options["tls"] = ssl.create_default_context(cafile=options.get("ca", [None])[0])
        self.node = secrets.token_hex(4)
        self.created: object = None  # when the stream was, if it was seen
        self._nats: nats.NATS | None = None  # once it is connected
        self._loop = asyncio.new_event_loop()
        self._answering = ThreadPoolExecutor(16)
        self._answers: dict[bytes, asyncio.Future] = {}  # under way, by the names of questions
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def _do(self, work: Coroutine) -> object:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except NotFoundError:
            raise
        except (nats.errors.Error, OSError) as error:
            raise Unreachable(str(error) or type(error).__name__) from None

    def connect(self, asked: Callable, news: Callable, failed: Callable) -> None:
        """Connects to a server, once, and from then on by itself. Raises Unreachable.

        `asked` answers what other nodes ask, `news` is told what they have appended, `failed` what
        is in the way of a connection.
        """

        async def answer(message: Msg, content: bytes) -> None:
            found = await self._loop.run_in_executor(self._answering, asked, content)
            await message.respond(found)

        async def begin(message: Msg) -> None:
            name, _, content = message.data.partition(b" ")
            if content:
                self._answers[name] = task = asyncio.ensure_future(answer(message, content))
                task.add_done_callback(lambda _: self._answers.pop(name))
            else:  # is it under way? If not, the answer was sent before this one, or it never came
                await message.respond(b"yes" if name in self._answers else b"")

        async def hear(message: Msg) -> None:
            sequence, _, rest = message.data.partition(b" ")
            news(_message(int(sequence), "lines", rest))

        async def connect() -> None:
            client = await nats.connect(self._servers, error_cb=failed, **self._options)
            self.room = client.max_payload - 4096  # bytes, for what is sent
            for subject, call in ((f"node.{self.node}", begin), ("node", begin), ("news", hear)):
                await client.subscribe(f"{self.name}.{subject}", cb=call)
            self._nats, self._stream = client, client.jetstream(timeout=2)

        if not self._nats:
            self._do(connect())

    def state(self, make: bool = False) -> StreamState | None:
        """Which messages it has; None if there is no such stream, unless it is to `make` it.

        Raises Unreachable, also if what is there is no safe one, and Foreign if it is another now.
        """

        subjects = [f"{self.name}.lines", f"{self.name}.orders"]
        try:
            found = self._do(self._stream.stream_info(self.name))
        except NotFoundError:
            if not make:
                return None
            wanted = {"subjects": subjects, "num_replicas": 3, "storage": "file"}
            wanted |= {"name": self.name, "allow_direct": True}
            found = self._do(self._stream.add_stream(**wanted))
        self.created = self.created or found.created
        if found.created != self.created:
            raise Foreign(LOST)
        config = found.config
        for right, must in (
            (sorted(config.subjects or []) == subjects, f"be of {' and '.join(subjects)}"),
            (config.storage == "file", "be stored in files"),
            ((config.num_replicas or 0) >= 3, "have three replicas or more"),
            (config.retention == "limits", "keep what was read (retention: limits)"),
            (config.discard == "old", "make room if it is bounded (discard: old)"),
            (config.allow_direct, "allow direct gets"),
            (not config.no_ack, "acknowledge"),
            (config.max_msg_size in (None, -1, 0), "take messages of any size"),
            (config.max_msgs_per_subject in (None, -1, 0), "keep all messages of a subject"),
            (not config.deny_delete, "allow that messages are deleted"),
        ):
            if not right:
                raise Unreachable(f"it must {must}")
        others = found.cluster.replicas or []
        there = [each for each in others if not each.offline and each.active < 3e9]  # ns
        self.quorum = 2 * (1 + len(there)) > 1 + len(others)
        return found.state

    def unsynced(self) -> Iterator[str]:
        """What is to be said of servers that may acknowledge before it is on their disks."""
        if not self._monitors:
            yield "what it acknowledges is as durable as its servers' sync_interval; see ?monitor="
        for url in self._monitors:
            try:
                with urlopen(f"{url}/varz", timeout=2) as answer:
                    if not json.load(answer)["jetstream"]["config"].get("sync_always"):
                        yield f"{url} may lose what it acknowledged: set sync_interval: always"
            except (OSError, ValueError, KeyError) as error:
                yield f"{url} does not say whether it has sync_interval: always ({error})"

    def next(self, sequence: int, subject: str = "*") -> Message | None:
        """The first message from that sequence on, if it is known. Raises Unreachable."""

        subjects = f"{self.name}.{subject}"
        try:
            found = self._do(self._stream.get_msg(self.name, sequence, subjects, True, True))
        except NotFoundError:
            return None
        return _message(found.seq, found.subject.split(".")[-1], found.data)

    def holding(self, line: int) -> Message | None:
        """The last message that has its base before that line. Raises Unreachable."""
        state = self.state() or StreamState(0, 0, 1, 0, 0)  # it may be too new to be seen
        low, high, found = state.first_seq, state.last_seq, None
        while low <= high:
            middle = (low + high) // 2
            if (message := self.next(middle)) and message.base < line:
                found, low = message, message.sequence + 1
            else:
                high = middle - 1
        return found

    def append(self, subject: str, base: int, lines: int, data: bytes, last: int) -> int:
        """Appends a group behind the last sequence, and says which is the last then.

        Raises Overtaken, or Unreachable if it is not acknowledged in time; it may yet come.
        """
        data = zlib.compress(data, 1)
        pieces = [data[at : at + self.room] for at in range(0, len(data), self.room)]
        end = time.monotonic() + PATIENCE
        for part, piece in enumerate(pieces):
            head = {"base": base, "lines": lines, "part": part, "parts": len(pieces)}
            message = json.dumps({**head, "node": self.node}).encode() + b"\n" + piece
            self._do(self._publish(f"{self.name}.{subject}", message, last + part, end))
        last += len(pieces)
        if subject == "lines" and len(pieces) == 1:  # so that others need not fetch it
            self._do(self._nats.publish(f"{self.name}.news", b"%d %s" % (last, message)))
        return last

    async def _publish(self, subject: str, message: bytes, last: int, end: float) -> None:
        headers = {"Nats-Msg-Id": secrets.token_hex(8), "Nats-Expected-Last-Sequence": str(last)}
        while True:
            try:
                await self._stream.publish(subject, message, timeout=1, headers=headers)
                return
            except (nats.errors.Error, OSError) as error:
                reason = str(error) or "no answer"
                if getattr(error, "err_code", None) == 10071:  # wrong last sequence
                    with suppress(nats.errors.Error):
                        any_ = f"{self.name}.*"
                        stands = await self._stream.get_msg(self.name, last + 1, any_, next=True)
                        if stands.headers["Nats-Msg-Id"] == headers["Nats-Msg-Id"]:
                            return  # its acknowledgement got lost
                        raise Overtaken("another node came before") from None
            if time.monotonic() > end:
                raise Unreachable(reason)
            await asyncio.sleep(0.05)

    def erase(self, sequence: int) -> None:
        """Overwrites and deletes a message, if it is there. Raises Unreachable."""

        async def delete() -> None:
            try:
                await self._stream.delete_msg(self.name, sequence)
            except APIError as error:
                if error.err_code not in (10043, 10057):  # it is not there
                    raise

        self._do(delete())

    def ask(self, node: str, content: bytes) -> bytes:
        """What another node answers, however long it takes. Raises Gone if it is not there."""

        async def ask() -> bytes:
            subject, name = f"{self.name}.node.{node}", secrets.token_hex(8).encode()
            asking = self._nats.request(subject, name + b" " + content, timeout=3600)
            answer = asyncio.ensure_future(asking)
            try:
                while not (await asyncio.wait([answer], timeout=0.2))[0]:
                    known = await self._nats.request(subject, name, timeout=1)
                    if not known.data and not (await asyncio.wait([answer], timeout=0.2))[0]:
                        raise Gone(True)  # it got lost, or the answer did
                return answer.result().data
            except (nats.errors.Error, OSError):
                early = answer.done() and isinstance(answer.exception(), NoRespondersError)
                raise Gone(not early) from None
            finally:
                answer.cancel()

        return self._do(ask())

    def ask_all(self, content: bytes) -> list[bytes]:
        """What the nodes that are there answer within a second. Raises Unreachable."""

        async def ask() -> list[bytes]:
            inbox, name = self._nats.new_inbox(), secrets.token_hex(8).encode()
            answers = await self._nats.subscribe(inbox)
            await self._nats.publish(f"{self.name}.node", name + b" " + content, reply=inbox)
            await asyncio.sleep(1)
            found = [(await answers.next_msg()).data for _ in range(answers.pending_msgs)]
            await answers.unsubscribe()
            return [*filter(None, found)]  # NATS answers with nothing, if nobody is there

        return self._do(ask())

    def close(self) -> None:
        """Ends the connection, once what others asked is answered."""

        async def close() -> None:
            await asyncio.gather(*self._answers.values(), return_exceptions=True)
            await self._nats.close()

        if self._nats:
            with suppress(Unreachable):
                self._do(close())
        self._answering.shutdown(wait=False)


class Node(bookkeep.Alone):
    """A bookkeeper, and the order of its log: that of a stream.

    The bookkeeper's writer is the only one that appends, and that takes over what others appended.
    A thread joins the stream and keeps up with it; another one forgets what is ordered to be
    forgotten. What a node does not do itself, its bookkeeper does.
    """

    def __init__(self, address: str, log: Log, unsaved: int, books: bookkeep.Books) -> None:
        """Learns all of the log, joins the stream in the background. Raises LogError, OSError."""
        self._stream = Stream(address)
        self._trouble: str | None = "it has not joined the stream yet"  # why it cannot book
        self._writable = True  # was the last append acknowledged?
        self._quorum = False  # has the stream a leader?
        self._sequence = 0  # of the last message that is in the log
        self._group: list[Message] = []  # the last one, of which parts may not have come
        self._void: list[int] = []  # messages of groups that count for nothing
        self._end = 0  # lines that the stream has, up to that sequence
        self._heard = 0  # lines that it has in all, as others say
        self._arrived: dict[int, Message] = {}  # what others say that they have appended
        self._wrote: dict[str, float] = {}  # node -> when it last did
        self._orders: list[np.ndarray] = []  # of lines that are to be forgotten
        self._obeyed: list[np.ndarray] = []  # lines that were, and that messages may still hold
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._waits, self._forgetting = threading.Semaphore(4), threading.Lock()
        self._news, self._wanted, self._ordered, self._ended = (threading.Event() for _ in range(4))
        self._passed: int | None = None  # the file that says how far the log is, once it joined
        self.keeper = Bookkeeper(log, unsaved, books, order=self)
        for work in (self._keep_up, self._obey):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def __getattr__(self, name: str) -> object:
        return getattr(self.keeper, name)

    # What callers ask for

    def book(self, samples: list[Sample], key: str | None = None) -> range:
        """As Bookkeeper's, by the node that writes; what has a known key without the stream."""
        with_id = any(bookkeep.ID in sample for sample in samples)
        if not with_id and (known := self.keeper.repeated(samples, key)) is not None:
            return known
        return range(*self._ask("book", samples, key))

    def correct(self, seq: int, account: str) -> str:
        """As Bookkeeper's, by the node that writes."""
        return self._ask("correct", seq, account)[0]

    def forget(self, company: str) -> int:
        """Removes a company from this log, once the others are ordered to do it, too."""

        def order() -> int:
            lines = np.diff(self.books.lines_of(company), prepend=0).tolist()
            data = json.dumps(lines).encode()
            self._pass(self._append("orders", 0, data))
            return self._take_order(data)

        self.keeper.change(self._be_current)
        forgotten = self.keeper.change(lambda: self.in_order(order))
        self._forget()
        return forgotten

    def close(self) -> None:
        """As Bookkeeper's; leaves the stream."""
        self._trouble = "it stops"
        for event in (self._ended, self._news, self._ordered):
            event.set()
        self.keeper.close()
        self._stream.close()

    # What its bookkeeper asks for

    def in_order(self, change: Callable[[], T]) -> T:
        """What comes of a change that appends, behind all that others have appended."""
        self._require_stream()
        while True:
            try:
                return change()
            except Overtaken:
                self._counters["stream_overtaken_total"] += 1
                self._catch_up()

    def append(self, log: Log, batches: Sequence[tuple[str | None, Sequence[dict]]]) -> list[dict]:
        """Appends to the stream, and then to the log. Raises Overtaken, Busy, NotStored."""
        placed = log.place(batches)
        lines = [line for batch in placed for line in batch.lines]
        sequence = self._append("lines", len(lines), b"".join(lines))
        try:
            log.write(placed)
        except OSError as error:  # the log takes it over from the stream when it can
            raise NotStored(f"the log could not be written ({error}); {UNSURE}") from None
        self._pass(sequence)
        return [record for batch in placed for record in batch.records]

    def health(self) -> dict[str, object]:
        """How the node stands to the stream."""
        stream = {"status": self._reason() or "ok", "node": self._stream.node}
        stream |= {"writer": self._writer_of_all(), "lag": self._lag(), "quorum": self._quorum}
        return {"stream": stream | {"to_forget": len(self._orders)}}

    def require_ready(self) -> None:
        """Raises NotReady if it cannot book, or lacks too much of the stream."""
        self._require_stream()
        if not self._quorum or self._lag() > 10_000:
            raise NotReady(f"the stream has no leader, or this log lacks {self._lag()} lines of it")

    def require_lines(self, log: Log, total: int) -> None:
        """Waits for some seconds until the log has so many lines, unless many do. Raises Busy."""
        if len(log) < total and self._waits.acquire(blocking=False):
            try:
                self._await(total)
            finally:
                self._waits.release()
        super().require_lines(log, total)

    def _await(self, total: int) -> None:
        end = time.monotonic() + LATE
        while len(self.log) < total and time.monotonic() < end:
            self._wanted.set()
            time.sleep(0.002)

    def gauges(self) -> dict[str, tuple[str, float]]:
        """How appending goes."""
        gauges = {name: (text, self._counters[name]) for name, text in COUNTERS.items()}
        gauges["stream_lag"] = ("Lines of the stream that are not in this log yet.", self._lag())
        gauges["stream_writable"] = ("Whether it can append.", int(not self._reason()))
        return gauges

    # What its writer does

    def _append(self, subject: str, lines: int, data: bytes) -> int:
        """The sequence of what is appended to the stream. Raises Overtaken, Busy."""
        started, base = time.perf_counter(), len(self.log)
        try:
            sequence = self._stream.append(subject, base, lines, data, self._sequence)
        except Unreachable as error:
            self._writable = False
            raise Busy(f"the stream does not acknowledge this ({error}); {UNSURE}") from None
        self._writable = True
        self._counters["stream_appends_total"] += 1
        self._counters["stream_append_seconds_total"] += time.perf_counter() - started
        self._wrote[self._stream.node] = time.monotonic()
        return sequence

    def _be_current(self) -> None:
        """Takes over all that others have appended: only behind that comes a group of no lines."""
        self.in_order(lambda: self._pass(self._append("lines", 0, b"")))

    def _catch_up(self) -> None:
        end = time.monotonic() + PATIENCE
        try:
            while not self._take():
                if time.monotonic() > end:
                    raise Unreachable("another node's message is not there yet")
                time.sleep(0.003)
        except (Unreachable, Foreign) as error:
            raise Busy(f"nothing was booked ({error}); send this again") from None

    def _next(self) -> list[Message]:
        """The next messages that are there, of some thousand lines. Raises Unreachable."""
        found: list[Message] = []
        after, lines = self._sequence, 0
        get = self._arrived.get if after + 1 in self._arrived else self._stream.next
        while lines + len(found) < 4096 and (message := get(after + 1)):
            found.append(message)
            after, lines = message.sequence, lines + message.lines
        return found

    def _take(self) -> bool:
        """Takes over what comes next, if any does. Raises Unreachable, Foreign, OSError."""
        base, lines = 0, b""
        for message in (messages := self._next()):
            if message.node != self._stream.node:
                self._wrote[message.node] = time.monotonic()
            if (data := self._whole(message)) is None:
                continue
            if message.base != self._end or message.subject == "orders":
                self._take_lines(base, lines)
                lines = b""
            base = base if lines else message.base
            if message.subject == "orders":
                self._take_lines(base, lines)  # none, but those before it must be there
                self._take_order(data)
            else:
                lines += data
            self._end = message.base + message.lines
        self._take_lines(base, lines)
        if messages:
            self._pass(messages[-1].sequence)
        return bool(messages)

    def _whole(self, message: Message) -> bytes | None:
        """What a group says, if this is the last message of it."""
        if message.part == 0 and self._group and self._group[-1].part + 1 < self._group[-1].parts:
            self._void += [each.sequence for each in self._group]
        self._group = [*(self._group if message.part else []), message]
        if [each.part for each in self._group] == [*range(message.parts)]:
            try:
                return zlib.decompress(b"".join(each.data for each in self._group))
            except zlib.error:
                raise Foreign(NONSENSE) from None
        return None

    def _take_order(self, data: bytes) -> int:
        """Notes which lines are to be forgotten, and says how many bookings are gone by this."""
        lines = np.cumsum(json.loads(data))
        if len(self.log.record(lines[0])) == len(bookkeep.PLACE):  # emptied before a start
            self._obeyed.append(lines)
            return 0
        self._orders.append(lines)
        self._ordered.set()
        return self.books.drop(lines)

    def _take_lines(self, base: int, data: bytes) -> None:
        """Adds lines to the log; those that it has must be the same. Raises Foreign, OSError."""
        if base > len(self.log):
            raise Foreign(BEHIND)
        batches = []
        for batch in bookkeep.batches_of(BytesIO(data), base):
            if isinstance(batch, bookkeep.Damage):
                raise Foreign(NONSENSE)
            for damage in check_records(batch.records, batch.line, self.books.features):
                said = f"line {damage.line} of the stream: {damage.reason}"
                raise Foreign(said if damage.otherwise else NONSENSE)
            if batch.line > len(self.log):
                batches.append(batch)
            for theirs in batch.records if batch.line <= len(self.log) else ():
                place = {name: theirs[name] for name in bookkeep.PLACE}  # if it was emptied
                if self.log.record(theirs["seq"]) not in (theirs, place):
                    raise Foreign(f"the stream is of another log, by its line {theirs['seq'] + 1}")
        if batches:
            self.log.write(batches)
        records = [record for batch in batches for record in batch.records]
        try:
            for some in bookkeep.chunks(records, bookkeep.CHUNK):
                self.books.apply(some, lambda record: self.keeper.booking(record["corrects"]))
        except BaseException:
            self.books.broken = True  # the log says more than the books
            raise
        for batch in batches:
            if "sample" in batch.records[0]:
                self.books.last_batch = batch.line - 1

    def _pass(self, sequence: int) -> None:
        self._sequence = sequence
        if self._passed is not None:
            with suppress(OSError):  # only a stream that is bounded by age makes it needed
                os.pwrite(self._passed, b"%19d %19d\n" % (sequence, len(self.log)), 0)

    # What its other threads do

    def _keep_up(self) -> None:
        while not self._ended.is_set():
            trouble = None
            try:
                self._stream.connect(self._asked, self._hear, self._fail)
                if self._passed is None:
                    self._join()
                self._look()
            except (Unreachable, Overtaken, Busy) as error:
                self._quorum = False
                trouble = f"it cannot be used ({error})" if self._passed is None else None
            except Exception as error:
                trouble = str(error)
            if trouble not in (None, self._trouble):
                logger.warning("stream %s: %s", self._stream.name, trouble)
            self._trouble = trouble
            self._ended.wait(1)

    def _look(self) -> None:
        """Takes over what others append, until that fails, and sees how the stream is."""
        looked = -math.inf
        while not self._ended.is_set():
            if time.monotonic() - looked > 1:
                looked, passed = time.monotonic(), self._sequence
                state = self._stream.state()
                if state is None or state.last_seq < passed:
                    raise Foreign(LOST)
                self._quorum = self._stream.quorum
                if state.last_seq == self._sequence:
                    self._heard = len(self.log)
            while self._lag() or state.last_seq > self._sequence:
                if not self.keeper.change(self._take):
                    break
            if not self._writable:  # a group of no lines tells whether it is again
                self.keeper.change(partial(self._append, "lines", 0, b""))
            self._trouble = None
            if self._news.wait(0.003 if self._lag() else 1):
                self._news.clear()
                self._wanted.wait(0.02)  # more gathers, unless somebody waits for it
                self._wanted.clear()

    def _join(self) -> None:
        """Finds where the log ends in the stream, and what it lacks, or what the stream does."""
        path, mine, self._stream.created = self.log.beside("{}.stream"), len(self.log), None
        known = [*map(int, path.read_text().split())] if path.exists() else []
        state = self._stream.state(make=not known)
        if state is None or (known and state.last_seq < known[0]):
            raise Foreign(LOST)
        held, first = self._stream.holding(mine), self._stream.next(1)
        lacks = first.base > mine if first else known != [state.last_seq, mine] != [0, mine]
        if lacks or (known and state.first_seq > known[0] + 1):
            raise Foreign(BEHIND)
        start = held.sequence - held.part if held else first.sequence if first else 0
        start = start or state.last_seq + 1
        order = self._stream.next(1, "orders")
        while order and order.sequence < start:
            if data := self._whole(order):
                self.keeper.change(partial(self._take_order, data))
            order = self._stream.next(order.sequence + 1, "orders")
        self._sequence, self._end = start - 1, mine if known and not first else 0
        while self._sequence < state.last_seq and not self._ended.is_set():
            self.keeper.change(self._take)
        if self._end < len(self.log):
            if known:
                raise Foreign(LOST)
            self._seed()
        for warning in self._stream.unsynced():
            logger.warning("stream %s: %s", self._stream.name, warning)
        self._passed = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._pass(self._sequence)
        logger.info("joined the stream %s as %s", self._stream.name, self._stream.node)

    def _seed(self) -> None:
        """Appends to the stream what it lacks of the log."""
        logger.info("%s becomes the stream's, from line %d on", self.log.path, self._end + 1)
        lines: list[bytes] = []
        for batch in bookkeep.scan(self.log.path):
            if batch.line > self._end:
                lines += batch.lines
            whole = self._end + len(lines) == len(self.log)
            if lines and (whole or sum(map(len, lines)) > 1 << 18):
                data, n = b"".join(lines), len(lines)
                self._sequence = self._stream.append("lines", self._end, n, data, self._sequence)
                self._end, lines = self._end + n, []

    def _obey(self) -> None:
        """Forgets what is ordered to be, and then erases the messages that held it."""
        while not self._ended.is_set():
            try:
                self._forget()
                if obeyed := self._obeyed.copy():  # all of them together, as erasing takes long
                    self._erase(np.unique(np.concatenate(obeyed)))
                    del self._obeyed[: len(obeyed)]
            except Exception as error:
                logger.warning("not all that was forgotten is erased yet: %s", error)
            self._ordered.wait(1)
            self._ordered.clear()

    def _forget(self) -> None:
        """Empties the lines that are ordered to be forgotten. Raises NotStored, NotReady."""
        with self._forgetting:
            while self._orders:
                self.keeper.forget_lines(self._orders[0].copy)
                self._obeyed.append(self._orders.pop(0))

    def _erase(self, lines: np.ndarray) -> None:
        """Erases the messages that held lines, once all nodes that are there know that."""
        sequence, question = self._sequence, zlib.compress(b'["sequence", []]')
        while any(json.loads(a)["made"] < sequence for a in self._stream.ask_all(question)):
            self._ended.wait(1)
        while self._void:
            self._stream.erase(self._void.pop())
        while len(lines):
            held = self._stream.holding(int(lines[0]) + 1)
            if held and held.base + held.lines > lines[0]:
                for part in range(held.parts):
                    self._stream.erase(held.sequence - part)
                end = held.base + held.lines
            else:  # another node has erased it
                after = self._stream.next(held.sequence + 1 if held else 1)
                end = after.base if after else math.inf
            lines = lines[lines >= end]

    # What nodes say to each other

    def _ask(self, what: str, *arguments: object) -> list:
        """What comes of a booking or a correction, which the node that writes is to make."""
        self._require_stream()
        writer = self._writer_of_all()
        if writer in (None, self._stream.node):
            return self._make(what, *arguments)
        content = zlib.compress(json.dumps([what, arguments]).encode(), 1)
        if len(content) > self._stream.room:
            return self._make(what, *arguments)
        try:
            answer = json.loads(self._stream.ask(writer, content))
        except Gone as gone:
            self._wrote.pop(writer, None)
            if gone.asked and (what == "correct" or arguments[1] is None):  # it has no key
                raise Busy(f"the node that was to book this is gone; {UNSURE}") from None
            return self._make(what, *arguments)
        if answer.get("error") == "Refused" or answer.get("reason") == bookkeep.RESTART:
            return self._make(what, *arguments)  # it was not tried
        if "error" in answer:
            raise getattr(bookkeep, answer["error"], Busy)(answer["reason"])
        self._counters["stream_forwarded_total"] += 1
        self._await(answer["lines"])
        return answer["made"]

    def _make(self, what: str, *arguments: object) -> list:
        """What comes of a booking or a correction, made here."""
        if what == "correct":  # or what another node has changed might seem to need no change
            self.keeper.change(self._be_current)
            return [self.keeper.correct(*arguments)]
        numbers = self.keeper.book(*arguments)
        return [numbers.start, numbers.stop]

    def _asked(self, content: bytes) -> bytes:
        """The answer to another node."""
        what, arguments = json.loads(zlib.decompress(content))
        try:
            if what == "sequence":
                made: object = math.inf if self._trouble else self._sequence  # else all would wait
            else:
                self._require_stream()
                made = self._make(what, *arguments)
            answer = {"made": made, "lines": len(self.log)}
        except Exception as error:
            answer = {"error": type(error).__name__, "reason": str(error)}
        return json.dumps(answer).encode()

    async def _fail(self, error: Exception) -> None:
        if self._passed is None:
            self._trouble = f"it has not joined the stream yet ({error or 'no answer'})"

    def _hear(self, message: Message) -> None:
        self._heard = max(self._heard, message.base + message.lines)
        if len(self._arrived) == 64:  # most were taken over
            self._arrived.clear()
        self._arrived[message.sequence] = message
        self._news.set()

    def _writer_of_all(self) -> str | None:
        """The lowest node of those that wrote just now; if it alone goes on, none is overtaken."""
        recently, wrote = time.monotonic() - RECENT, self._wrote.copy()
        return min((node for node, when in wrote.items() if when > recently), default=None)

    def _reason(self) -> str | None:
        waits = None if self._writable else "the stream does not acknowledge; try later"
        return self._trouble or waits

    def _require_stream(self) -> None:
        if reason := self._reason():
            raise Refused(f"stream {self._stream.name}: {reason}")

    def _lag(self) -> int:
        return max(0, self._heard - len(self.log))
