"""Kills, failing calls and power failures, on real processes.

BOOKKEEP_ROUNDS makes what is random here longer: so many kills, and all faults and power failures.
"""

import errno
import fcntl
import itertools
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path

import pytest

from bookkeep import CHUNK, Books, chunks
from bookkeep_extra import views
from conftest import (
    HERE,
    assert_same,
    batches_of,
    booking,
    bookings,
    bookkeeping,
    books_of,
    request,
    run,
    scanned,
    wait_until,
)

LONG = "BOOKKEEP_ROUNDS" in os.environ


def seeded():
    """Random numbers that BOOKKEEP_SEED repeats."""
    seed = int(os.environ.get("BOOKKEEP_SEED", random.randrange(10**6)))
    print(f"BOOKKEEP_SEED={seed}")
    return random.Random(seed)


# Kills


def test_kills_at_any_moment_lose_nothing_and_double_nothing(serve, tmp_path):
    """4 rounds, or BOOKKEEP_ROUNDS, two on each log."""
    rng = seeded()
    for number in range(int(os.environ.get("BOOKKEEP_ROUNDS", 4))):
        log = tmp_path / f"{number // 2}.jsonl"
        if number % 2 == 0:
            sent = {}  # to this log: key -> samples
        batches = [
            (f"{number}/{i}", bookings(rng.choice([1, 3, 30]), seed=rng.random()))
            for i in range(60)
        ]
        sent |= dict(batches)
        service = serve(log=log, unsaved=rng.choice([100, 10_000]))
        answered = {}
        streams = [
            threading.Thread(target=stream, args=(service, batches[i::3], answered))
            for i in range(3)
        ]
        for thread in streams:
            thread.start()
        time.sleep(rng.random() * 0.2)
        service.stop(signal.SIGKILL)
        for thread in streams:
            thread.join()

        stored = {record["seq"]: record for record in scanned(log)}
        for key, answer in answered.items():
            kept = [stored[seq] for seq in range(answer["first"], answer["last"] + 1)]
            assert [record["sample"] for record in kept] == sent[key]
        service = serve(log=log)
        again = {}
        stream(service, batches, again)
        assert again.keys() == dict(batches).keys()
        assert answered.items() <= again.items()
        stored = {}
        for record in scanned(log):
            stored.setdefault(record["batch"], []).append(record["sample"])
        assert stored == sent
        service.stop(signal.SIGKILL)
        with bookkeeping(log) as keeper:  # maybe with a snapshot
            assert_same(keeper, books_of(log))


def stream(service, batches, answered):
    """Sends batches by their keys and notes the answers, until the service is gone."""
    with suppress(OSError, HTTPException):
        for key, batch in batches:
            headers = {"Idempotency-Key": key}
            status, _, answer = service.ask("POST", "/sample", batch, headers=headers)
            assert status == 200
            answered[key] = answer


def test_kills_at_any_moment_double_nothing_that_has_an_id(serve, tmp_path):
    """Three send lists of their own ids again and again, from the one that was not answered on."""
    rng, log = seeded(), tmp_path / "log.jsonl"
    lists = [
        [
            [
                booking(f"company{n}", f"text{rng.randrange(3)}", account=f"{rng.randrange(3)}")
                | {"Id": f"{rng.randrange(20)}"}
                for _ in range(rng.choice([1, 3, 30]))
            ]
            for _ in range(25)
        ]
        for n in range(3)
    ]
    answered = [0, 0, 0]

    def send(n):
        with suppress(OSError, HTTPException):
            while answered[n] < len(lists[n]):
                assert service.post("/sample", lists[n][answered[n]])[0] == 200
                answered[n] += 1

    for killed in (True, True, True, False):
        service = serve(log=log, unsaved=rng.choice([100, 10_000]))
        threads = [threading.Thread(target=send, args=[n]) for n in range(3)]
        for thread in threads:
            thread.start()
        if killed:
            time.sleep(rng.random() * 0.2)
            service.stop(signal.SIGKILL)
        for thread in threads:
            thread.join()
    service.stop()
    last = {
        (each["CompanyId"], each["Id"]): each for sent in lists for part in sent for each in part
    }
    with bookkeeping(log) as keeper:
        assert_same(keeper, books_of(log))
        found = [each["sample"] for each in views.bookings(keeper, 100)[0]]
    assert {(each["CompanyId"], each["Id"]): each for each in found} == last
    assert len(found) == len(last)


# Faults

FAULTS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fnmatch.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {SOUND, FAILS, FAILS_BUT_IS_DONE, HALF, KILLS_BEFORE, KILLS_AFTER, KILLS_HALF_WAY};

/* How this call must go, as the file says that FAULTS names: which calls, on which path, the how
   manieth (and all later ones?), how, and the error. */
static int fault(const char *call, const char *path, int *error) {
    static char last[999];
    static int seen;
    char now[999] = "", calls[99], pattern[99];
    int first, lasting, how;
    FILE *file = fopen(getenv("FAULTS"), "r");
    if (!file) return SOUND;
    char *line = fgets(now, sizeof now, file);
    fclose(file);
    if (!line || sscanf(now, "%98s %98s %d %d %d %d", calls, pattern, &first, &lasting, &how,
                        error) != 6) return SOUND;
    if (strcmp(now, last)) seen = 0;
    strcpy(last, now);
    if (!strstr(calls, call) || fnmatch(pattern, path, 0)) return SOUND;
    seen++;
    return seen == first || (lasting && seen > first) ? how : SOUND;
}

static const char *of(int number) {
    static __thread char path[4096];
    char link[50];
    snprintf(link, sizeof link, "/proc/self/fd/%d", number);
    ssize_t size = readlink(link, path, sizeof path - 1);
    path[size < 0 ? 0 : size] = 0;
    return path;
}

#define FAULTY(type, name, parameters, arguments, path, halve) \
    type name parameters { \
        type (*call) parameters = dlsym(RTLD_NEXT, #name); \
        int error, how = fault("," #name ",", path, &error); \
        if (how == KILLS_BEFORE) raise(SIGKILL); \
        if (how == HALF || how == KILLS_HALF_WAY) halve; \
        type result = how == FAILS ? -1 : call arguments; \
        if (how >= KILLS_AFTER) raise(SIGKILL); \
        if (how == FAILS || how == FAILS_BUT_IS_DONE) errno = error, result = -1; \
        return result; \
    }
FAULTY(ssize_t, write, (int file, const void *data, size_t size), (file, data, size), of(file),
       size -= size / 2)
FAULTY(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at),
       (file, data, size, at), of(file), size -= size / 2)
FAULTY(ssize_t, read, (int file, void *data, size_t size), (file, data, size), of(file),)
FAULTY(ssize_t, pread64, (int file, void *data, size_t size, off64_t at), (file, data, size, at),
       of(file),)
FAULTY(int, open64, (const char *path, int flags, mode_t mode), (path, flags, mode), path,)
FAULTY(int, close, (int file), (file), of(file),)
FAULTY(int, fsync, (int file), (file), of(file),)
FAULTY(int, ftruncate64, (int file, off64_t size), (file, size), of(file),)
FAULTY(int, rename, (const char *from, const char *to), (from, to), from,)
FAULTY(int, unlink, (const char *path), (path), path,)
"""
FAILS, FAILS_BUT_IS_DONE, HALF, KILLS_BEFORE, KILLS_AFTER, KILLS_HALF_WAY = range(1, 7)


class Faults:
    """Has system calls fail in a service that is started `under` it, while a fault is `set`."""

    def __init__(self, folder):
        library, self.file = folder / "faults.so", folder / "faults"
        compiling = ["cc", "-shared", "-fPIC", "-o", library, "-xc", "-", "-ldl"]
        subprocess.run(compiling, input=FAULTS.encode(), check=True)
        self.under = ["env", f"LD_PRELOAD={library}", f"FAULTS={self.file}"]
        self.number = itertools.count()

    def set(self, calls, path, first=1, lasting=0, how=FAILS, error=errno.EIO):
        """From now on, until another one is set, the calls are counted anew."""
        fault = f",{calls}, {path} {first} {lasting:d} {how} {error} {next(self.number)}"
        written = self.file.with_suffix(".new")
        written.write_text(fault)
        written.rename(self.file)

    def clear(self):
        self.file.unlink()


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    if not shutil.which("cc"):
        pytest.skip("there is no C compiler")
    return Faults(tmp_path_factory.mktemp("faults"))


# Kills while a company is forgotten

NOTE = "*/.log.jsonl.forgetting", "*/log.jsonl.forgetting"  # before it has its name, and then
LARGE, SMALL = "company-large", "company-small"  # of three parts, of one


def without(records, company):
    """What a log says once the company is forgotten."""
    gone = {r["seq"] for r in records if r.get("sample", {}).get("CompanyId") == company}
    return [
        {name: record[name] for name in ("seq", "batch", "left")}
        if record["seq"] in gone or record.get("corrects") in gone
        else record
        for record in records
    ]


def books_from(records):
    """Books that were told nothing else."""
    books = Books()
    for chunk in chunks((r for r in records if "sample" in r or "corrects" in r), CHUNK):
        books.apply(chunk, lambda correction: records[correction["corrects"]])
    return books


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder with the log of two companies and others, and its snapshot; what is in the log."""
    log = tmp_path_factory.mktemp("filled") / "disk" / "log.jsonl"
    samples = bookings(2600, seed=1)
    for i, sample in enumerate(samples):
        sample["CompanyId"] = LARGE if i % 26 else sample["CompanyId"]
    for i in range(0, len(samples), 130):
        samples[i]["CompanyId"] = SMALL
    with bookkeeping(log, unsaved=1) as keeper:
        for number, batch in enumerate(batches_of(samples, 300)):
            keeper.book(batch, f"batch{number}")
            for i in range(0, 40, 10):
                keeper.correct(keeper.log.find(f"batch{number}")[i]["seq"], "new")
    assert {path.name for path in log.parent.iterdir()} == {
        "log.jsonl",
        "log.jsonl.snapshot.npz",
    }
    return log.parent, scanned(log)


def require_all_or_nothing(log, before, company, done):
    """After a start on what was left: whether all of the company is gone, as it must be if `done`,
    or must not be if that is False.
    """
    with bookkeeping(log) as keeper:
        after = scanned(log)
        gone = after[: len(before)] != before
        assert done is None or gone == done
        expected = [*(without(before, company) if gone else before), *after[len(before) :]]
        assert after == expected
        assert_same(keeper, books_from(expected))
        if not gone:
            keeper.forget(company)
            assert scanned(log) == without(expected, company)
    for path in log.parent.iterdir():
        assert company.encode() not in path.read_bytes(), path
    assert not log.with_name("log.jsonl.forgetting").exists()
    return gone


def kills(lines):
    """(call, path, how manieth, how) of each moment at which a forgetting of so many lines may be
    cut short, and whether all is to be gone then.
    """
    note, named = NOTE
    for done, calls in (
        (False, [("open64", note, 1), ("write", note, 1), ("fsync", note, 1)]),
        (None, [("rename", note, 1)]),
        (
            True,
            [
                ("fsync", "*/disk", 1),
                *(("pwrite64", "*/log.jsonl", n) for n in (1, lines // 2, lines)),
                ("fsync", "*/log.jsonl", 1),
                ("unlink", named, 1),
                ("fsync", "*/disk", 2),
            ],
        ),
    ):
        for call in calls:
            yield *call, KILLS_BEFORE, bool(done)
            yield *call, KILLS_AFTER, done is not False
            if call[0] in ("write", "pwrite64"):
                yield *call, KILLS_HALF_WAY, done


@pytest.mark.parametrize(("company", "some"), [(SMALL, 4), (LARGE, 4)])
def test_a_kill_while_a_company_is_forgotten_leaves_all_of_it_or_nothing(
    serve, tmp_path, faults, filled, company, some
):
    """At some moments, or all with BOOKKEEP_ROUNDS, also of the start that ends it."""
    rng, (folder, before) = seeded(), filled
    lines = sum(a != b for a, b in zip(before, without(before, company), strict=True))
    moments = [*kills(lines)]
    for number, (*moment, how, done) in enumerate(moments if LONG else rng.sample(moments, some)):
        log = shutil.copytree(folder, tmp_path / str(number) / "disk") / "log.jsonl"
        service = serve(log=log, under=faults.under)
        faults.set(*moment, how=how)
        with pytest.raises((OSError, HTTPException)):
            service.delete(f"/company/{company}")
        assert service.process.wait(30) == -signal.SIGKILL
        if log.with_name("log.jsonl.forgetting").exists() and (LONG or rng.random() < 0.4):
            nth = rng.randint(1, lines)
            faults.set(
                "pwrite64", "*/log.jsonl", nth, how=rng.choice([KILLS_AFTER, KILLS_HALF_WAY])
            )
            service = serve(log=log, under=faults.under)
            assert service.process.wait(30) == -signal.SIGKILL
        faults.clear()
        require_all_or_nothing(log, before, company, done)
        shutil.rmtree(log.parent)


def test_a_kill_while_others_book_leaves_all_of_a_company_or_nothing(serve, tmp_path, filled):
    """2 rounds, or BOOKKEEP_ROUNDS: answered bookings of others are there, and in their places."""
    rng, (folder, before) = seeded(), filled
    outcomes = Counter()
    for number in range(int(os.environ.get("BOOKKEEP_ROUNDS", 2))):
        log = shutil.copytree(folder, tmp_path / str(number) / "disk") / "log.jsonl"
        service = serve(log=log, unsaved=rng.choice([100, 10_000]))
        batches = [(f"{i}", bookings(rng.choice([1, 20]), seed=rng.random())) for i in range(90)]
        answered, forgotten = {}, []

        def forget(service=service, forgotten=forgotten):
            with suppress(OSError, HTTPException):
                forgotten.append(service.delete(f"/company/{LARGE}"))

        threads = [
            threading.Thread(target=stream, args=(service, batches[i::2], answered))
            for i in range(2)
        ]
        threads.append(threading.Thread(target=forget))
        for thread in threads:
            thread.start()
        time.sleep(rng.random() * 0.4)
        service.stop(signal.SIGKILL)
        for thread in threads:
            thread.join()
        outcomes[require_all_or_nothing(log, before, LARGE, bool(forgotten) or None)] += 1
        stored = scanned(log)
        for key, answer in answered.items():
            kept = stored[answer["first"] : answer["last"] + 1]
            assert [record["sample"] for record in kept] == dict(batches)[key]
        batches_stored = Counter(record["batch"] for record in stored[len(before) :])
        assert all(
            batches_stored[key] == len(batch) for key, batch in batches if batches_stored[key]
        )
        shutil.rmtree(log.parent)
    print(outcomes)


# Power failures


class Cached:
    """A file that a traced service has written, and what a power failure may leave of it."""

    def __init__(self, content=b""):
        self.durable, self.now, self.sizes = content, bytearray(content), {len(content)}

    def write(self, at, data):
        self.now.extend(bytes(max(0, at - len(self.now))))
        self.now[at : at + len(data)] = data
        self.sizes.add(len(self.now))

    def truncate(self, size):
        del self.now[size:]
        self.sizes.add(size)

    def fsync(self):
        self.durable, self.sizes = bytes(self.now), {len(self.now)}

    def contents(self, block, rng):
        """Of any size since the fsync, without any of the blocks that were written since."""
        longest = max(len(self.durable), *self.sizes)
        old, new = (bytes(content).ljust(longest, b"\0") for content in (self.durable, self.now))
        starts = range(0, longest, block)
        changed = [at for at in starts if old[at : at + block] != new[at : at + block]]
        if len(changed) <= 4:
            lost = [gone for n in range(5) for gone in itertools.combinations(changed, n)]
        else:
            singles = rng.sample(changed, min(len(changed), 8))
            lost = [[], changed, *([at] for at in singles)]
            lost += [[at for at in changed if at != kept] for kept in singles]
            lost += [rng.sample(changed, rng.randrange(len(changed))) for _ in range(8)]
        if longest > 50_000:  # a snapshot
            lost = rng.choices(lost, k=2)
        contents = set()
        for gone in lost:
            content = bytearray(new)
            for at in gone:
                content[at : at + block] = old[at : at + block]
            few = {*rng.sample([*self.sizes], min(len(self.sizes), 2))}
            for size in {*few, max(self.sizes), (min(self.sizes) + max(self.sizes)) // 2}:
                contents.add(bytes(content[:size]))
        return sorted(contents)


def power_failures(trace, log, rng, before):
    """What may be left of a log and what is beside it at each moment of a trace: how many answers
    had been sent by then, and the contents of the files, by name. They were as `before` first.
    """
    folder, log = log.parent, log.name
    names = {name: [Cached(content)] for name, content in before.items() if content is not None}
    # -> the files that it may be, the last one now
    opened = {}  # by number: a file or else the folder, where in it, and whether it appends
    unfinished = {}  # calls, by thread
    answered = 0
    seen = set()
    for line in trace.read_text().splitlines():
        thread, call = line.split(None, 1)
        if call.endswith("<unfinished ...>"):
            unfinished[thread] = call.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", call):
            call = unfinished.pop(thread) + call[resumed.end() :]
        match = re.match(r"(\w+)\((.*)\) += (-?[0-9]+)", call)
        if not match or (result := int(match[3])) < 0:
            continue
        call, arguments = match[1], match[2]
        texts = [bytes.fromhex(t.replace(r"\x", "")) for t in re.findall('"(.*?)"', arguments)]
        paths = (
            [Path(os.fsdecode(t)) for t in texts] if call in ("openat", "rename", "unlink") else []
        )
        inside = [path.name for path in paths if path.parent == folder]
        number = int(re.match("[0-9]*", arguments)[0] or result)
        file, at, appends = opened.get(number, (None, 0, False))
        if call == "sendto":
            answered += texts[0].startswith(b"HTTP/1.1 200 ")
        elif call == "close":
            opened.pop(number, None)
        elif call == "openat" and (inside or paths == [folder]):
            file = names.get(inside[0], [None])[-1] if inside else folder
            if file is None:
                file = Cached()
                names.setdefault(inside[0], [None]).append(file)
            if "O_TRUNC" in arguments:
                file.truncate(0)
            opened[number] = (file, 0, "O_APPEND" in arguments)
        elif call == "rename" and inside:
            names.setdefault(inside[1], [None]).append(names[inside[0]][-1])
            names[inside[0]].append(None)
        elif call == "unlink" and inside:
            names[inside[0]].append(None)
        elif call == "fsync" and file == folder:
            names = {name: files[-1:] for name, files in names.items()}
        elif call == "fsync" and file:
            file.fsync()
        elif call == "lseek" and file:
            opened[number] = (file, result, appends)
        elif call == "ftruncate" and file:
            file.truncate(int(arguments.split(",")[1]))
        elif call == "pwrite64" and file:
            file.write(int(arguments.rsplit(",", 1)[1]), texts[0][:result])
        elif call == "write" and file:
            at = len(file.now) if appends else at
            file.write(at, texts[0][:result])
            opened[number] = (file, at + result, appends)
            if not appends and rng.random() < 0.8:  # of the many that make a snapshot
                continue
        else:
            continue
        for block in (512, 4096):
            left = {
                name: [c for file in files for c in (file.contents(block, rng) if file else [None])]
                for name, files in names.items()
            }
            for name, contents in left.items():
                for content in contents if name == log else rng.choices(contents, k=2):
                    state = {other: rng.choice(others) for other, others in left.items()}
                    state[name] = content
                    moment = hash((answered, *sorted(state.items(), key=str)))
                    if moment not in seen:
                        seen.add(moment)
                        yield answered, state


def said(records):
    """What a log says, without what was made of it."""
    return [
        record.get("sample")
        or {key: record[key] for key in ("corrects", "AccountNumber") if key in record}
        for record in records
    ]


def said_without(log, company):
    """What it says once the company is forgotten."""
    gone = {seq for seq, entry in enumerate(log) if entry.get("CompanyId") == company}
    return [
        {} if seq in gone or entry.get("corrects") in gone else entry
        for seq, entry in enumerate(log)
    ]


def ask_in_turn(ask, rng):
    """Asks a service for all that it can store; what the log must say after each answer."""
    log = []
    yield log
    for turn in range(24):
        if turn in (6, 12, 20):
            seq = rng.choice([seq for seq, entry in enumerate(log) if "CompanyId" in entry])
            correction = {"AccountNumber": f"new{turn}"}
            answer = ask("POST", "/correct", {"seq": seq, **correction})
            log = [*log, {"corrects": seq, **correction}]
        elif turn in (10, 15):
            company = rng.choice([entry["CompanyId"] for entry in log if "CompanyId" in entry])
            answer = ask("DELETE", f"/company/{company}")
            log = said_without(log, company)
        else:
            batch = bookings(rng.choice([1, 2, 4, 20]), seed=turn)
            headers = {"Idempotency-Key": f"key{turn}"} if turn % 2 else {}
            answer = ask("POST", "/sample", batch, headers=headers)
            log = [*log, *batch]
        assert answer[0] == 200
        yield log


@pytest.fixture(scope="module")
def tracing():
    """Writes the system calls of what follows this and a path there."""
    command = ["strace", "-D", "-f", "-xx", "-s1000000"]
    command += ["-etrace=openat,write,pwrite64,lseek,ftruncate,fsync,rename,unlink,close,sendto"]
    if not shutil.which("strace") or subprocess.run([*command, "-o/dev/null", "true"]).returncode:
        pytest.skip("there is no strace, or it may not trace")
    return [*command, "-o"]


def has_ended(trace):
    return trace.read_text().endswith("exited with 0 +++\n")


def test_a_power_failure_at_any_moment_loses_nothing_that_was_answered(
    serve, tmp_path, monkeypatch, tracing
):
    """Up to 120 states that one may leave, half of them inside a forgetting, of a traced service;
    and 30 of a start that ends the forgetting. All of them with BOOKKEEP_ROUNDS.
    """
    trace, log = tmp_path / "trace", tmp_path / "disk" / "log.jsonl"
    rng = seeded()
    log.parent.mkdir()
    service = serve(log=log, unsaved=40, under=[*tracing, trace])
    expected = [[], *ask_in_turn(service.ask, rng)]  # the first answer was whether it had started
    assert service.stop() == 0
    wait_until(lambda: has_ended(trace))
    failures = list(power_failures(trace, log, rng, {}))
    assert failures[-1][0] == len(expected) - 1
    monkeypatch.setattr(os, "fsync", lambda file: None)  # these disks do not fail
    outcomes = Counter()

    def require(answered, state):
        """What was answered is there after a start, and what was not is there wholly or not."""
        log = put(state, tmp_path / "left" / "log.jsonl")
        with bookkeeping(log) as keeper:
            assert said(scanned(log)) in expected[answered : answered + 2]
            if rng.random() < 0.2:
                assert_same(keeper, books_of(log))
        outcomes.update(os.listdir(log.parent))
        shutil.rmtree(log.parent)

    inside = [failure for failure in failures if failure[1].get("log.jsonl.forgetting")]
    outside = [failure for failure in failures if not failure[1].get("log.jsonl.forgetting")]
    print(len(outside), "states, and inside a forgetting", len(inside))
    for all_of_them in (inside, outside):
        some = len(all_of_them) if LONG else min(60, len(all_of_them))
        for failure in rng.sample(all_of_them, some):
            require(*failure)

    for number in range(5 if LONG else 1):
        answered, state = rng.choice(inside)
        log = put(state, tmp_path / f"again{number}" / "log.jsonl")
        trace = tmp_path / f"trace{number}"
        service = serve(log=log, unsaved=40, under=[*tracing, trace])
        assert service.stop() == 0
        wait_until(lambda trace=trace: has_ended(trace))
        again = [left for _, left in power_failures(trace, log, rng, state)]
        print(len(again), "states of a start")
        for left in again if LONG else rng.sample(again, min(30, len(again))):
            require(answered, left)
    print(outcomes)


def put(files, log):
    """The log, with what is beside it, in a new folder."""
    log.parent.mkdir()
    for name, content in files.items():
        if content is not None:
            (log.parent / name).write_bytes(content)
    return log


# Failing system calls


def test_whatever_call_fails_an_answer_says_whether_it_is_stored(serve, tmp_path, faults):
    """40 faults, or all with BOOKKEEP_ROUNDS, of a service that goes on."""
    rng, disk = seeded(), tmp_path / "disk"
    disk.mkdir()
    start = partial(serve, log=disk / "log.jsonl", unsaved=50, under=faults.under)
    service, log = start(), []
    calls = ["write", "pwrite64", "fsync", "open64", "close", "read", "pread64", "rename", "unlink"]
    calls += ["fsync,ftruncate64", "pwrite64,ftruncate64", "fsync,unlink"]
    kinds = [*itertools.product(calls, (1, 2, 3), (False, True), (FAILS, FAILS_BUT_IS_DONE))]
    kinds += [(call, n, True, HALF) for call in ("write", "pwrite64") for n in (1, 2)]
    some = [(*kind, turn) for kind in kinds for turn in range(4)]
    rng.shuffle(some)
    some += [(*kind, 3) for kind in rng.sample(kinds, 15)]
    outcomes = Counter()
    for number, (failing, first, lasting, how, turn) in enumerate(some if LONG else some[-40:]):
        batch, headers = bookings(2, seed=number), {}
        assert service.post("/sample", batch)[0] == 200
        log = [*log, *batch]
        if turn < 2:
            headers = {"Idempotency-Key": f"key{number}"} if turn else {}
            asked, changed = ("POST", "/sample", batch), [*log, *batch]
        elif turn == 2:
            asked = ("POST", "/correct", {"seq": len(log) - 1, "AccountNumber": "new"})
            changed = [*log, {"corrects": len(log) - 1, "AccountNumber": "new"}]
        else:
            asked = ("DELETE", f"/company/{batch[0]['CompanyId']}")
            changed = said_without(log, batch[0]["CompanyId"])
        error = rng.choice([errno.EIO, errno.ENOSPC])
        faults.set(failing, "*/disk*", first, lasting, how, error)
        status, _, answer = service.ask(*asked, headers=headers)
        faults.clear()
        unfinished = shutil.ignore_patterns(".*.npz")  # which may go at any moment
        shutil.copytree(disk, tmp_path / "killed", ignore=unfinished)
        with bookkeeping(tmp_path / "killed" / "log.jsonl") as keeper:
            stored = said(scanned(tmp_path / "killed" / "log.jsonl"))
            if number % 5 == 0:
                assert_same(keeper, books_of(tmp_path / "killed" / "log.jsonl"))
        shutil.rmtree(tmp_path / "killed")
        message = answer.get("error", "")
        sure = "may hold this all the same" not in message
        outcomes[(asked[1].split("/")[1], status, sure)] += 1
        fault = (failing, first, lasting, how, turn, status, answer)
        assert status in (200, 503, 507), fault
        forgets = "the next start forgets the rest" in message
        assert forgets == (status == 503), fault
        done = status == 200 or forgets
        assert stored in ([changed] if done else [log] if sure else [log, changed]), fault
        if forgets:
            assert service.post("/sample", batch)[0] == 503
            assert service.get("/ready")[0] == 503
            service.stop()
            service = start()
            log = said(scanned(disk / "log.jsonl"))
            assert log == changed, fault
        elif status == 200 or sure or headers:
            if status != 200 or headers:
                assert service.ask(*asked, headers=headers)[0] == 200, fault
            log = changed
            assert said(scanned(disk / "log.jsonl")) == log, fault
    print(outcomes)
    service.stop()
    assert serve(log=disk / "log.jsonl").samples() == sum("CompanyId" in e for e in log)
    assert said(scanned(disk / "log.jsonl")) == log


def test_what_a_disk_takes_in_parts_is_written_to_its_end(serve, tmp_path, faults):
    log = tmp_path / "disk" / "log.jsonl"
    log.parent.mkdir()
    service, samples = serve(log=log, under=faults.under), bookings(50)
    faults.set("write,pwrite64", "*/disk/*", lasting=True, how=HALF)
    assert service.post("/sample", samples)[0] == 200
    assert service.delete("/company/company1")[0] == 200
    service.stop()
    faults.clear()
    assert said(scanned(log)) == said_without(samples, "company1")
    with bookkeeping(log) as keeper:
        assert_same(keeper, books_of(log))


def test_whatever_call_fails_at_a_start_the_next_one_is_sound(serve, tmp_path, faults, filled):
    """4 faults, or all with BOOKKEEP_ROUNDS, of starts that forget the rest and cut a batch off."""
    rng, (folder, before) = seeded(), filled
    noted = shutil.copytree(folder, tmp_path / "noted" / "disk")
    log = noted / "log.jsonl"
    service = serve(log=log, under=faults.under)
    faults.set("pwrite64", "*/log.jsonl", 20, how=KILLS_HALF_WAY)
    with pytest.raises((OSError, HTTPException)):
        service.delete(f"/company/{SMALL}")
    assert service.process.wait(30) == -signal.SIGKILL
    with open(log, "ab") as file:
        file.write(b'{"seq": %d, "batch": "cut", "left": 1, ' % len(before))
    calls = ["open64", "read", "pread64", "pwrite64", "fsync", "ftruncate64", "unlink", "write"]
    kinds = [*itertools.product(calls, (1, 2, 3), (False, True), (FAILS, FAILS_BUT_IS_DONE))]
    outcomes = Counter()
    for number, (call, *how) in enumerate(kinds if LONG else rng.sample(kinds, 4)):
        log = shutil.copytree(noted, tmp_path / str(number) / "disk") / "log.jsonl"
        where = "*log.jsonl*" if call == "write" else "*/disk*"  # not where its messages go
        faults.set(call, where, *how, rng.choice([errno.EIO, errno.ENOSPC]))
        service = serve(log=log, under=faults.under)
        status = service.process.poll()
        assert status in (None, 1), (call, how)
        assert "Traceback" not in service.said(), (call, how)
        outcomes["serves" if status is None else service.said().split(": ")[-1]] += 1
        service.stop(signal.SIGKILL)
        faults.clear()
        require_all_or_nothing(log, before, SMALL, True)
        shutil.rmtree(log.parent)
    print(outcomes)


def test_on_a_full_disk_a_company_is_forgotten_or_nothing_has_changed(
    serve, tmp_path, faults, filled
):
    folder, before = filled
    log = shutil.copytree(folder, tmp_path / "disk") / "log.jsonl"
    snapshot, note = (log.with_name(f"log.jsonl.{name}") for name in ("snapshot.npz", "forgetting"))
    service = serve(log=log, under=faults.under)
    assert snapshot.exists()
    samples = service.samples()
    figures = [service.get(path)[1] for path in ("/report/10000", "/metrics/10000")]

    # Not even the note can be written: nothing changes, but the snapshot has gone for it.
    for call, how in itertools.product(
        ("open64", "write", "fsync", "rename"), (FAILS, FAILS_BUT_IS_DONE)
    ):
        faults.set(call, NOTE[0], lasting=True, how=how, error=errno.ENOSPC)
        status, answer = service.delete(f"/company/{LARGE}")
        assert (status, "No space left on device" in answer["error"]) == (507, True)
        assert {path.name for path in log.parent.iterdir()} == {"log.jsonl", "log.stderr"}
    assert scanned(log) == before
    assert service.samples() == samples
    assert figures == [service.get(path)[1] for path in ("/report/10000", "/metrics/10000")]
    faults.clear()
    assert service.post("/sample", [booking()])[0] == 200
    before = scanned(log)

    # What is noted is done by the next start, and nothing is booked before.
    faults.set("pwrite64", "*/log.jsonl", 1500, lasting=True, error=errno.ENOSPC)
    status, answer = service.delete(f"/company/{LARGE}")
    assert (status, "the next start forgets the rest" in answer["error"]) == (503, True)
    faults.clear()
    assert note.exists()
    assert service.post("/sample", [booking()])[0] == 503
    assert service.delete(f"/company/{SMALL}")[0] == 503
    assert service.get("/health")[0] == service.get("/ready")[0] == 503
    assert service.post("/predict", booking())[0] == 200
    status, out, err = run(HERE / "bookkeep.py", "relearn", log, tmp_path / "new.jsonl")
    assert (status, out, "is to forget" in err) == (1, "", True)
    assert service.stop() == 0

    # A start that has no room either does not start, and changes nothing for the worse.
    faults.set("pwrite64", "*/log.jsonl", 2000, lasting=True, error=errno.ENOSPC)
    service = serve(log=log, under=faults.under)
    assert service.process.wait(30) == 1
    assert "No space left on device" in service.said()
    faults.clear()
    assert note.exists()
    assert require_all_or_nothing(log, before, LARGE, True)


# Readers


def on_their_way(reader):
    """The bytes that a connection's sockets hold, at both ends."""
    ports = [f"0100007F:{end[1]:04X}" for end in (reader.getpeername(), reader.getsockname())]
    waiting = struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, b"\0" * 4))[0]
    for line in Path("/proc/net/tcp").read_text().splitlines():
        fields = line.split()
        if fields[1:3] == ports:
            return waiting + int(fields[4].partition(":")[0], 16)
    raise AssertionError("there is no such connection")


def test_an_export_under_way_shows_each_line_whole_and_nothing_that_was_forgotten(serve, tmp_path):
    rng, log = seeded(), tmp_path / "log.jsonl"
    service = serve(log=log)
    for number in range(4):  # 9 MB, more than sockets take
        batch = bookings(150, seed=number)
        for sample in batch:
            sample |= {f"note{i}": "x" * rng.randrange(10_000) for i in range(3)}
        assert service.post("/sample", batch)[0] == 200
    before = log.read_bytes()
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        reader.settimeout(30)
        reader.connect(("127.0.0.1", service.port))
        reader.sendall(request("/samples", method="GET", Connection="close"))
        got = reader.recv(20_000)
        while b"\r\n\r\n" not in got:
            got += reader.recv(20_000)
        got = got.partition(b"\r\n\r\n")[2]
        for company in ("company1", "company3"):
            for _ in range(20):
                got += reader.recv(20_000)
            assert service.delete(f"/company/{company}")[0] == 200
            sent = len(got) + on_their_way(reader)
            rest = log.read_bytes()[sent:].partition(b"\n")[2]
            assert company.encode() not in rest
            assert company.encode() in before[sent:]
            after = len(before) - len(rest)
            if company == "company1":
                first = after
        while piece := reader.recv(1 << 16):
            got += piece
    assert len(got) == len(before)
    lines = list(zip(before.splitlines(), log.read_bytes().splitlines(), strict=True))
    shown = got.splitlines()
    assert all(line in were for line, were in zip(shown, lines, strict=True))
    assert b"company1" in got[:first]
    assert b"company1" not in got[first:]
    assert b"company3" in got[:after]
    assert b"company3" not in got[after:]
    assert log.read_bytes()[after:] == got[after:]
