"""Kills, failing calls and power failures, on real processes."""

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path

import pytest

from conftest import (
    batches_of,
    bookings,
    bookkeeping,
    counts,
    scanned,
    standing,
    taught,
    wait_until,
)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])  # nohup; & in a script
def test_a_signal_that_is_ignored_when_it_starts_does_not_stop_it(serve, number):
    service = serve(limit=partial(signal.signal, number, signal.SIG_IGN))
    service.process.send_signal(number)
    assert service.samples() == 0
    assert service.stop() == 0
    assert number.name not in service.said()


def test_kills_at_any_moment_lose_nothing_and_double_nothing(serve, tmp_path):
    """20 rounds, or BOOKKEEP_ROUNDS, ten on each log."""
    rounds = int(os.environ.get("BOOKKEEP_ROUNDS", 20))
    seed = int(os.environ.get("BOOKKEEP_SEED", random.randrange(10**6)))
    print(f"BOOKKEEP_SEED={seed}")
    rng = random.Random(seed)
    for number in range(rounds):
        log = tmp_path / f"{number // 10}.jsonl"
        if number % 10 == 0:
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

    with bookkeeping(log) as bookkeeper:
        assert counts(bookkeeper._model) == counts(taught(standing(log)))


def stream(service, batches, answered):
    """Sends batches by their keys and notes the answers, until the service is gone."""
    with suppress(OSError, HTTPException):
        for key, batch in batches:
            headers = {"Idempotency-Key": key}
            status, _, answered[key] = service.ask("POST", "/sample", batch, headers=headers)
            assert status == 200


def test_a_kill_while_a_company_is_forgotten_leaves_all_of_it_or_nothing(serve, tmp_path):
    rounds = int(os.environ.get("BOOKKEEP_ROUNDS", 20)) // 3
    log = tmp_path / "log.jsonl"
    companies = [f"company{number}" for number in range(5)]
    outcomes = Counter()
    for number in range(rounds):
        if number % 5 == 0:
            log.unlink(missing_ok=True)
        service = serve()
        if number % 5 == 0:
            for batch in batches_of(bookings(5000, seed=number), 1000):
                assert service.post("/sample", batch)[0] == 200
        company = companies[number % 5]
        before = scanned(log)
        answered = []

        def forget(service=service, company=company, answered=answered):
            with suppress(OSError, HTTPException):
                answered.append(service.delete(f"/company/{company}"))

        asking = threading.Thread(target=forget)
        asking.start()
        time.sleep(random.random() * 0.1)
        service.stop(signal.SIGKILL)
        asking.join()
        after = scanned(log)
        gone = [record for record in after if "sample" not in record]
        if after != before:
            outcomes["forgotten"] += 1
            assert company not in log.read_text()
            assert [r for r in after if "sample" in r] == [
                r for r in before if r.get("sample", {}).get("CompanyId") not in (company, None)
            ]
            assert len(after) == len(before) == 5000
        else:
            outcomes["kept"] += 1
            assert not answered
        service = serve()
        assert service.samples() == 5000 - len(gone)
        assert not list(tmp_path.glob(".*"))
        service.stop(signal.SIGKILL)
    print(outcomes)


class Cached:
    """A file that a traced service has written, and what a power failure may leave of it."""

    def __init__(self):
        self.durable, self.now, self.sizes = b"", bytearray(), {0}

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


def power_failures(trace, log, rng):
    """What may be left of a log and what is beside it at each moment of a trace: how many answers
    had been sent by then, and the contents of the files, by name.
    """
    folder, log = log.parent, log.name
    names = {}  # -> the files that it may be, the last one now
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
                    moment = hash((answered, *sorted(state.items())))
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


def without(log, company):
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
    for turn in range(22):
        if turn in (9, 17):
            seq = rng.choice([seq for seq, entry in enumerate(log) if "CompanyId" in entry])
            answer = ask("POST", "/correct", {"seq": seq, "AccountNumber": "new"})
            log = [*log, {"corrects": seq, "AccountNumber": "new"}]
        elif turn == 14:
            answer = ask("DELETE", "/company/company1")
            log = without(log, "company1")
        else:
            batch = bookings(rng.choice([1, 2, 4, 20]), seed=turn)
            headers = {"Idempotency-Key": f"key{turn}"} if turn % 2 else {}
            answer = ask("POST", "/sample", batch, headers=headers)
            log = [*log, *batch]
        assert answer[0] == 200
        yield log


def test_a_power_failure_at_any_moment_loses_nothing_that_was_answered(
    serve, tmp_path, monkeypatch
):
    """Up to 500 states that one may leave, all with BOOKKEEP_ROUNDS, of a traced service."""
    trace, log = tmp_path / "trace", tmp_path / "disk" / "log.jsonl"
    tracing = ["strace", "-D", "-f", "-xx", "-s1000000", f"-o{trace}"]
    tracing += ["-etrace=openat,write,lseek,ftruncate,fsync,rename,unlink,close,sendto"]
    if shutil.which("strace"):
        subprocess.run([*tracing, "true"], check=True)
    if not (trace.exists() and trace.read_text()):
        pytest.skip("there is no strace, or it may not trace")
    seed = int(os.environ.get("BOOKKEEP_SEED", random.randrange(10**6)))
    print(f"BOOKKEEP_SEED={seed}")
    rng = random.Random(seed)
    log.parent.mkdir()
    service = serve(log=log, unsaved=40, under=tracing)
    expected = [[], *ask_in_turn(service.ask, rng)]  # the first answer was whether it had started
    assert service.stop() == 0
    wait_until(lambda: trace.read_text().endswith("exited with 0 +++\n"))
    failures = list(power_failures(trace, log, rng))
    assert failures[-1][0] == len(expected) - 1
    print(len(failures), "states")
    monkeypatch.setattr(os, "fsync", lambda file: None)  # these disks do not fail
    outcomes = Counter()
    some = len(failures) if "BOOKKEEP_ROUNDS" in os.environ else min(500, len(failures))
    for number, (answered, state) in enumerate(rng.sample(failures, some)):
        log = tmp_path / str(number) / "log.jsonl"
        log.parent.mkdir()
        for name, content in state.items():
            if content is not None:
                (log.parent / name).write_bytes(content)
        with bookkeeping(log) as bookkeeper:
            assert said(scanned(log)) in expected[answered : answered + 2]
            if number % 10 == 0:
                assert counts(bookkeeper._model) == counts(taught(standing(log)))
        outcomes.update(os.listdir(log.parent))
        shutil.rmtree(log.parent)
    print(outcomes)


FAULTS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Whether this call on the log's folder must fail, as the file says that FAULTS names: which calls,
   the how manieth (and all later ones?), and whether it is carried out all the same. */
static int fails(const char *call, const char *path) {
    static char last[99];
    static int seen;
    char now[99] = "", calls[50];
    int first, lasting, done;
    FILE *file = fopen(getenv("FAULTS"), "r");
    if (!file) return 0;
    char *line = fgets(now, sizeof now, file);
    fclose(file);
    if (!line || sscanf(now, "%49s %d %d %d", calls, &first, &lasting, &done) != 4) return 0;
    if (strcmp(now, last)) seen = 0;
    strcpy(last, now);
    if (!strstr(calls, call) || !strstr(path, "/disk")) return 0;
    seen++;
    return seen == first || (lasting && seen > first) ? 1 + done : 0;
}

static const char *of(int number) {
    static __thread char path[4096];
    char link[50];
    snprintf(link, sizeof link, "/proc/self/fd/%d", number);
    ssize_t size = readlink(link, path, sizeof path - 1);
    path[size < 0 ? 0 : size] = 0;
    return path;
}

#define FAILING(type, name, parameters, arguments, path) \
    type name parameters { \
        type (*call) parameters = dlsym(RTLD_NEXT, #name); \
        int how = fails("," #name ",", path); \
        type result = how == 1 ? -1 : call arguments; \
        if (how) errno = EIO; \
        return how ? -1 : result; \
    }
FAILING(ssize_t, write, (int file, const void *data, size_t size), (file, data, size), of(file))
FAILING(int, fsync, (int file), (file), of(file))
FAILING(int, ftruncate, (int file, off_t size), (file, size), of(file))
FAILING(int, ftruncate64, (int file, off64_t size), (file, size), of(file))
FAILING(int, close, (int file), (file), of(file))
FAILING(ssize_t, read, (int file, void *data, size_t size), (file, data, size), of(file))
FAILING(ssize_t, pread64, (int file, void *data, size_t size, off64_t at), (file, data, size, at),
        of(file))
FAILING(int, rename, (const char *from, const char *to), (from, to), from)
FAILING(int, unlink, (const char *path), (path), path)
"""


def test_whatever_call_fails_an_answer_says_whether_it_is_stored(serve, tmp_path):
    """80 faults, or all with BOOKKEEP_ROUNDS, of a service that goes on."""
    if not shutil.which("cc"):
        pytest.skip("there is no C compiler")
    library, control, disk = tmp_path / "faults.so", tmp_path / "faults", tmp_path / "disk"
    compiling = ["cc", "-shared", "-fPIC", "-o", library, "-xc", "-", "-ldl"]
    subprocess.run(compiling, input=FAULTS.encode(), check=True)
    disk.mkdir()
    start = partial(
        serve,
        log=disk / "log.jsonl",
        unsaved=50,
        under=["env", f"LD_PRELOAD={library}", f"FAULTS={control}"],
    )
    service, log = start(), []
    calls = ["write", "fsync", "close", "read", "pread64", "rename", "unlink"]
    calls += ["fsync,ftruncate,ftruncate64", "write,ftruncate,ftruncate64"]
    faults = list(itertools.product(calls, (1, 2, 3), (0, 1), (0, 1), range(4)))
    random.shuffle(faults)
    outcomes = Counter()
    for number, (failing, *how, turn) in enumerate(
        faults if "BOOKKEEP_ROUNDS" in os.environ else faults[:80]
    ):
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
            changed = without(log, batch[0]["CompanyId"])
        control.write_text(" ".join(map(str, [f",{failing},", *how, number])))
        status, _, answer = service.ask(*asked, headers=headers)
        control.unlink()
        unfinished = shutil.ignore_patterns(".*.npz")  # which may go at any moment
        shutil.copytree(disk, tmp_path / "killed", ignore=unfinished)
        with bookkeeping(tmp_path / "killed" / "log.jsonl"):
            stored = said(scanned(tmp_path / "killed" / "log.jsonl"))
        shutil.rmtree(tmp_path / "killed")
        sure = not re.search("may hold this all the same|not sure", answer.get("error", ""))
        outcomes[(status, sure)] += 1
        fault = (failing, *how, turn, status, answer)
        assert stored in ([changed] if status == 200 else [log] if sure else [log, changed]), fault
        if status == 503:
            service.stop()
            service = start()
            log = said(scanned(disk / "log.jsonl"))
        elif status == 200 or sure or headers:
            if status != 200 or headers:
                assert service.ask(*asked, headers=headers)[0] == 200, fault
            log = changed
            assert said(scanned(disk / "log.jsonl")) == log, fault
    print(outcomes)
    service.stop()
    assert serve(log=disk / "log.jsonl").samples() == sum("CompanyId" in e for e in log)
    assert said(scanned(disk / "log.jsonl")) == log
