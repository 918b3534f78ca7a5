"""The commands: what can be done with a log without serving it, and a token for a company."""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bookkeep import (
    FEATURES,
    FLOOR,
    GRAIN,
    PLACE,
    RIVALS,
    SPECIFICITY,
    TARGET,
    BadRequest,
    Batch,
    Books,
    Damage,
    Log,
    LogError,
    Sample,
    books_for,
    check_sample,
    features_of,
    fsync_folder,
    one_line,
    otherwise,
    scan,
    score_weight,
)
from bookkeep_extra.suspects import print_suspects
from bookkeep_extra.tokens import print_token

logger = logging.getLogger("bookkeep")


def check(path: Path) -> int:
    """Prints what is wrong with a log; the exit status. Raises OSError if there is none."""
    bookings = problems = 0
    features = None  # of all records, as the first one has them
    for found in scan(path):
        damages = [found]
        if isinstance(found, Batch):
            learned = (features_of(record) for record in found.records if len(record) > len(PLACE))
            features = next(learned, None) if features is None else features
            damages = [*check_records(found.records, found.line, features)]
            bookings += sum("sample" in record for record in found.records)
        for damage in damages:
            print(one_line(f"{path}, line {damage.line}: {damage.reason}"))
        problems += len(damages)
    said = f"{problems or 'no'} problem{'s' * (problems != 1)}"
    print(f"{path}: {bookings} booking{'s' * (bookings != 1)} in whole batches, {said}")
    return int(problems > 0)


def relearn(old: Path, new: Path, books: Books) -> int:
    """Books all whole batches of a log anew, as this version and these books do; the exit status.

    Seqs, keys and corrections stay. What is left out is printed; its lines are empty in the new
    log. Raises LogError or OSError.
    """
    if os.path.lexists(new):
        raise LogError(f"{new} is there already; move it away first")
    with open(old, "rb"):  # before anything is made for the sake of a log that is not there
        pass
    if os.path.exists(f"{os.path.realpath(old)}.forgetting"):
        raise LogError(f"what {old} is to forget is still in it; start the service on it first")
    unfinished = new.with_name(f".{new.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    log, left_out = Log(unfinished), 0
    reported = time.monotonic()
    try:
        for found in scan(old):
            damages = [found]
            if isinstance(found, Batch):
                damages = [*_relearn_batch(found, log, books)]
            for damage in damages:
                print(one_line(f"{old}, line {damage.line}: {damage.reason}; left out"))
            left_out += len(damages)
            if time.monotonic() - reported > 3:
                reported = time.monotonic()
                logger.info("%s: %d lines so far", new, len(log))
        log.sync()
        log.close()
        os.rename(unfinished, new)
        fsync_folder(new.absolute().parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    n = len(books.history.rows)
    print(f"{new}: {n} booking{'s' * (n != 1)} learned anew")
    return int(left_out > 0)


def _relearn_batch(batch: Batch, log: Log, books: Books) -> Iterator[Damage]:
    """Books a batch under its seqs and key, and says what of it is left out."""
    first, key = batch.records[0]["seq"], batch.records[0]["batch"]
    log.write(log.place([(None, [{}] * (first - len(log)))]), durable=False)
    records: list[dict] = [{} for _ in batch.records]
    bookings: dict[int, Sample] = {}  # in the batch
    corrected: dict[int, dict] = {}  # the bookings that its corrections are of
    for i, record in enumerate(batch.records):
        try:
            if "sample" in record:
                check_sample(record["sample"], (*FEATURES, books.target))
                score_weight(record["sample"])
                bookings[i] = record["sample"]
            elif "corrects" in record:
                if books.target not in record:
                    raise ValueError(f"it corrects another key than {books.target}")
                _check_corrected(record, books.target)
                booking = log.record(record["corrects"])
                if "sample" not in booking:
                    raise ValueError("it corrects no booking before it")
                corrected[i] = booking
        except (BadRequest, KeyError, TypeError, ValueError) as error:
            yield Damage(batch.line + i, str(error))
    drafted, rows = books.draft([*bookings.values()])
    for i, record in zip(bookings, drafted, strict=True):
        records[i] = record
    says = (map(batch.records[i].get, (books.target, "now")) for i in corrected)
    changes = [(booking, *says) for booking, says in zip(corrected.values(), says, strict=True)]
    for i, correction in zip(corrected, books.corrections(changes), strict=True):
        records[i] = correction or {}
    [placed] = log.place([(None if isinstance(key, int) else key, records)])
    log.write([placed], durable=False)
    books.enter([placed.records[i] for i in bookings], rows)
    made = ((booking, placed.records[i]) for i, booking in corrected.items())
    books.correct([(booking, record) for booking, record in made if "corrects" in record])


def check_records(
    records: Sequence[dict], line: int, features: dict | None = None
) -> Iterator[Damage]:
    """A Damage for each record that this version's `draft` and `corrections` could not have made.

    The first one is on that line. They must have been learned with those features, if any.
    """
    for number, record in enumerate(records, start=line):
        learned = features_of(record)
        try:
            if reason := otherwise(record, learned if features is None else features):
                yield Damage(number, reason, otherwise=True)
            elif "corrects" in record:
                _check_correction(record, learned.get("target", TARGET))
            elif len(record) > len(PLACE):  # else it was emptied
                _check_booking(record, learned.get("target", TARGET))
        except KeyError as error:
            yield Damage(number, f"{error} is missing")
        except (AttributeError, TypeError, ValueError) as error:
            yield Damage(number, str(error))


def _check_corrected(record: dict, target: str) -> None:
    """Raises BadRequest or KeyError if nobody can have sent what this correction says."""
    check_sample({target: record[target]}, (target,))
    if "now" in record:
        check_sample(record["now"], (*FEATURES, target))


def _check_correction(record: dict, target: str) -> None:
    _check_corrected(record, target)
    if type(record["corrects"]) is not int or not 0 <= record["corrects"] < record["seq"]:
        raise ValueError("it corrects no booking before it")
    _check_counts(record["weight"], record["against"])


def _check_booking(record: dict, target: str) -> None:
    check_sample(record["sample"], (*FEATURES, target))
    if score_weight(record["sample"]):
        _check_counts(record["weight"], record["against"])
    elif "weight" in record or record["reviewed"] is not False:
        raise ValueError("what was booked unseen counts nothing")
    if not isinstance(record["predicted"], str | None):
        raise ValueError("predicted is no account")
    for name, highest in (("confidence", 1), ("margin", sys.float_info.max)):
        if record[name] is not None and not 0 <= record[name] <= highest:
            raise ValueError(f"no prediction can have that {name}")
    if record["known"] not in range(len(SPECIFICITY)):
        raise ValueError("no prediction can have that known")
    if record["rank"] is not None and (type(record["rank"]) is not int or record["rank"] < 1):
        raise ValueError("no account can have that rank")


def _check_counts(weight: float, against: list[str]) -> None:
    if not FLOOR <= weight <= 1 or weight * GRAIN % 1:
        raise ValueError("no booking can have that weight")
    if len({*against}) < len(against) or len(against) > RIVALS:
        raise ValueError("no booking can count against these")
    for account in against:
        check_sample({TARGET: account}, (TARGET,))


COMMANDS = {
    "check": lambda options: check(options.LOG),
    "relearn": lambda options: relearn(
        options.OLD, options.NEW, books_for(options.context, options.target, options.isolate)
    ),
    "suspects": lambda options: print_suspects(options.LOG),
    "token": print_token,
}
