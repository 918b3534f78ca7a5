"""The tests of the service, in the order of bookkeep.py's sections.

Oracles: scikit-learn for the model and the metrics.
"""

import doctest
import fcntl
import itertools
import json
import math
import os
import random
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import tracemalloc
import wsgiref.validate
import zipfile
import zlib
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from scipy.stats import binom
from sklearn.metrics import accuracy_score, precision_score, recall_score
from sklearn.naive_bayes import MultinomialNB
from waitress.buffers import ReadOnlyFileBasedBuffer

import bookkeep
from bookkeep import (
    FEATURES,
    GRAIN,
    GROUP,
    LONG,
    Alone,
    BadRequest,
    Bookkeeper,
    Books,
    Busy,
    Calibration,
    Conflict,
    Counts,
    Export,
    History,
    Ids,
    Lesson,
    Log,
    LogError,
    LogLines,
    NaiveBayes,
    NotFound,
    NotReady,
    NotStored,
    Work,
    Writer,
    create_app,
    precision_recall,
    tokens,
)
from bookkeep_extra import logs, prometheus, views
from bookkeep_extra.logs import check_records
from conftest import (
    EVERY_BIN,
    HERE,
    SERVICE,
    answer_of,
    answers,
    assert_same,
    batches_of,
    bin_of,
    booking,
    bookings,
    bookkeeping,
    books_of,
    by,
    changed,
    confidence_by_hand,
    everybodys_by_hand,
    free_port,
    held_at_the_disk,
    judged,
    line_of,
    own_by_hand,
    read,
    read_lines,
    refused,
    request,
    run,
    scanned,
    settled,
    tally_by_hand,
    wait_until,
    written,
)

# ---------------------------------------------------------------------------------------- Samples


def test_tokens_are_the_features_and_crosses_of_them():
    both = tokens(booking(company="A", text=" rent\tMay ", amount="< 10"))
    assert len({*both}) == len(both) == 10
    assert [token >> bookkeep.KIND_SHIFT for token in both] == [0, 1, 2, 2, 3, 3, 4, 5, 6, 7]
    assert all(0 < token < 1 << 63 for token in both)

    def kept(company="A", text="rent May", amount="< 10", **more):
        """Which of the tokens stay when something else is said."""
        other = tokens(booking(company, text, amount, **more))
        return [number for number, token in enumerate(both) if token in other]

    assert kept(account="1", BankEntryDate="x", **{"": "7"}) == [*range(10)]
    assert kept(company="B") == [1, 2, 3, 9]  # the amount, the words, the whole text
    assert kept(amount="> 10") == [0, 2, 3, 4, 5, 6, 8, 9]  # but the first word's with the amount
    assert kept(text="rent June") == [0, 1, 2, 4, 6, 7]  # the first word's, but the two words'
    assert kept(text="food May") == [0, 1, 3, 5]
    assert kept(text="May rent") == [*range(6)]  # none of the first, nor the whole
    assert kept(text="rent May 7") == [*range(9)]  # but the whole text
    assert len(tokens(booking(text="rent"))) == 8
    assert len(tokens(booking(text=" "))) == 2
    words = [str(number) for number in range(5000)]
    assert tokens(booking(text=" ".join(words))) == tokens(booking(text=" ".join(words[:100])))


def test_a_value_in_one_place_is_never_the_token_of_another():
    kinds = [
        tokens(booking(company="x", text="t", amount="a"))[0],
        tokens(booking(company="t", text="t", amount="x"))[1],
        tokens(booking(company="t", text="x", amount="t"))[2],
        tokens(booking(company="c x", text="c", amount="t"))[2],
    ]
    assert len({*kinds}) == len(kinds)


def test_tokens_are_the_same_in_every_process():
    code = "import bookkeep; print(bookkeep.tokens({k: k for k in bookkeep.FEATURES}))"
    said = {
        subprocess.check_output(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, cwd=HERE
        )
        for seed in ("1", "2")
    }
    assert said == {f"{tokens({key: key for key in bookkeep.FEATURES})}\n".encode()}


def test_what_is_kept_of_words_takes_at_most_16_mb():
    digests, most = bookkeep.Digests(), 0
    for number in range(40_000):
        for word in (f"{'💶' * 24}{number}", f"{number}" + "ü" * 900):
            assert digests[word] == bookkeep.digest(word)
        if number % 8192 == 8191:
            held = sum(map(sys.getsizeof, itertools.chain(digests, digests.values())))
            most = max(most, sys.getsizeof(digests) + held)
    assert 4e6 < most < 16e6


AMOUNTS = {
    "big negative": ["-123456.78", "-10000.01", "-10000"],
    "> -10000": ["-9999.99", "-9875.50", "-1000.00"],
    "> -1000": ["-999.99", "-100"],
    "> -100": ["-99.99", "-010"],
    "> -10": ["-9.99", "-0.01", "-0", "0", "0.00"],
    "< 10": ["0.01", "+9.99", "10", "10.00"],
    "< 100": ["10.01", "100"],
    "< 1000": ["100.01", "1000.0"],
    "< 10000": ["1000.01", "10000"],
    "big positive": ["10000.01", "9" * 100],
} | {
    other: [other]  # is one of its own
    for other in ("1,200.00", "1200,00", "1e3", "12.50 EUR", ".5", "5.", " 5", "5\n", "--5", "٣")
}


@pytest.mark.parametrize(("said", "amounts"), AMOUNTS.items())
def test_a_plain_decimal_number_counts_as_the_range_that_it_is_in(said, amounts):
    for amount in amounts:
        assert bookkeep.amount_range(amount) == said
        assert bookkeep.wordings(booking(amount=amount))[1] == ("amount", said)
        of_range = tokens(booking(amount=said))
        assert tokens(booking(amount=amount))[: len(of_range)] == of_range


SUMS = {  # as accounting programs write them
    "1200": ["1200.0", "+1200.00", "01200", "1200.000"],
    "-0.5": ["-0.50", "-00.500"],
    "0": ["-0.00", "+0", "0.0"],
    "1000000000000000000.01": ["1000000000000000000.010"],
    None: ["1,200", "1200.", ".5", "< 10", "1e3", "٣"],
}


@pytest.mark.parametrize(("shortest", "amounts"), SUMS.items())
def test_a_sum_is_the_same_however_it_is_written(shortest, amounts):
    for amount in amounts:
        assert bookkeep.exact_sum(amount) == shortest
        if shortest is None:
            assert all(
                token >> bookkeep.KIND_SHIFT != 8 for token in tokens(booking(amount=amount))
            )
        else:
            assert tokens(booking(amount=amount)) == tokens(booking(amount=shortest))
    if shortest and shortest != "0":
        whole = [*tokens(booking(amount=shortest))[-3:]]
        assert [token >> bookkeep.KIND_SHIFT for token in whole] == [8] * 3
        for other in (booking(amount=shortest + "1"), booking("other", amount=shortest)):
            assert not {*whole} & {*tokens(other)}
        with_other_word = tokens(booking(text="x", amount=shortest))
        assert [token in with_other_word for token in whole] == [True, True, False]


TEXTS = {
    " Rent\tMAY  rent ": ["rent", "may", "rent"],
    "Straße \uff26\uff35\uff2c\uff2c \ufb01n": ["strasse", "full", "fin"],  # full-width letters
    "Cafe\u0301": ["café"],
    "ネットフリックス 六月": ["ネッ", "ット", "トフ", "フリ", "リッ", "ック", "クス", "六月"],
    "京 東京x": ["京", "東京", "京x"],
    "Amazon.co.uk*1f37b5qz4 May": ["amazon.co.uk*1f37b5qz4", "may", "amazon"],
    "SVWZ+VodafoneRg464342": ["svwz+vodafonerg464342", "svwz", "vodafonerg"],
    "longwordwithoutany a+b-c": ["longwordwithoutany", "a+b-c"],
    "(parentheses)": ["(parentheses)"],
    " ": [],
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.items())
def test_words_are_folded_and_parted(text, expected):
    assert bookkeep.words(text) == expected
    assert tokens(booking(text=text)) == tokens(booking(text=" ".join([text.upper(), " "])))


def test_a_hundred_words_count_whatever_they_are_made_of():
    for text in ("x " * 500, "東" * 500, "aaa+bbb+ccc+ddd " * 99):
        assert len(bookkeep.words(text)) == 100


def test_what_is_named_as_context_is_a_feature():
    context = ("Service", "MCC")
    sample = booking(text="rent May", Service="Care", MCC="")
    without, both = tokens(sample), tokens(sample, context)
    assert both[: len(without)] == without
    more = both[len(without) :]
    assert [token >> bookkeep.KIND_SHIFT for token in more] == [9, 10, 11, 11]

    def kept(context=context, **others):
        other = tokens(sample | others, context)
        return [number for number, token in enumerate(more) if token in other]

    assert kept(MCC="7") == [0, 1, 2, 3]
    assert kept(CompanyId="other") == [0]
    assert kept(BankEntryText="rent June") == [0, 1, 2]
    assert kept(BankEntryText="food") == [0, 1]
    assert kept(Service="") == kept(Service="", MCC="Care") == kept(("Unit",), Unit="Care") == []
    said = bookkeep.wordings(sample, context)[len(without) :]
    assert said == [
        ("Service", "Care"),
        ("Service in this company", "Care"),
        ("first word in that Service", "rent"),
        ("this text in that Service", "rent may"),
    ]


def test_each_token_can_be_said_in_the_samples_own_words():
    sample = booking(company="A b", text="rent May rent", amount="-12.50")
    words = [(kind, word) for kind in bookkeep.KINDS[2:4] for word in ("rent", "may", "rent")]
    first = [*zip(bookkeep.KINDS[4:8], ["rent", "rent", "rent may", "rent may rent"], strict=True)]
    sums = [
        ("this very sum", "-12.5"),
        ("a sum that ends like this", ".5"),
        ("first word with this very sum", "rent -12.5"),
    ]
    said = [("company", "A b"), ("amount", "> -100"), *words, *first, *sums]
    assert bookkeep.wordings(sample) == said
    assert len(dict(zip(tokens(sample), said, strict=True))) == len({*said})
    for text in ("rent", " ", "x " * 500, "Amazon.co.uk*1f37b5qz4"):
        for amount in ("12", "< 10"):
            sample |= {"BankEntryText": text, "BankEntryAmount": amount, "MCC": "7"}
            made = tokens(sample, ("MCC", "Service"))
            assert len(bookkeep.wordings(sample, ("MCC", "Service"))) == len(made)


def parsed(body, booked=True, most=bookkeep.MAX_BATCH):
    """The samples that a body says, or that the JSON of it says."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return bookkeep.check_samples(bookkeep.parse_json(body), booked, most)


def test_samples_come_back_as_they_were_sent():
    nameless = {key: booking()[key] for key in bookkeep.FEATURES}
    sent = [booking(), booking(text="Müller 💶", AccountName="", **{"": "17"})]
    sent += [by(who) for who in ("person", "check", "suggestion")]
    for body in (sent, json.dumps(sent), b"\xef\xbb\xbf" + json.dumps(sent).encode()):
        assert parsed(body) == sent
    assert parsed(json.dumps(sent, ensure_ascii=False).encode()) == sent
    for sample in (nameless, nameless | {"BookedBy": "nobody yet"}):
        assert parsed(sample, booked=False) == parsed([sample], booked=False) == [sample]


def test_limits_are_themselves_allowed():
    longest = booking("c" * 100, "t" * 10_000, "a" * 100, "1" * 100, **{"k" * 10_000: ""})
    assert parsed([longest]) == [longest]
    assert len(parsed([booking()] * 10_000)) == 10_000
    with pytest.raises(BadRequest, match="send at most 2 samples in one request, not 3"):
        parsed([booking()] * 3, most=2)


BAD_BODIES = [  # bytes, or what the JSON says; and why it is refused
    (b"", "the body must be JSON"),
    (b"CompanyId=A", "the body must be JSON"),
    (b"[] []", "the body must be JSON"),
    (b'["\xff"]', "the body must be UTF-8, byte 2 is not"),
    ("[]".encode("utf-16"), "the body must be UTF-8"),
    (b"[NaN]", "the body must be JSON, which has no NaN"),
    (b"[-Infinity]", "the body must be JSON, which has no -Infinity"),
    (b'[{"CompanyId": "A", "CompanyId": "B"}]', "the key CompanyId occurs twice in one object"),
    (b"[" * 10_000, "the JSON is nested too deeply"),
    (b'{"a":' * 10_000, "the JSON is nested too deeply"),
    (booking(), "send a list of samples"),
    (1, "send a list of samples"),
    (None, "send a list of samples"),
    (json.dumps('"x"'), "send a list of samples"),
    (b"[" + b"{}," * 10_000 + b"{}]", "send at most 10000 samples in one request, not 10001"),
    ([{}, "x"], "sample 0: CompanyId is missing"),
    ([[]], "sample 0: must be an object of strings"),
    (b"[" + b"9" * 10_000 + b"]", "sample 0: must be an object of strings"),
    ([booking(), booking(AccountName=7)], "sample 1: AccountName must be a string: put the"),
    ([booking(amount=-9875.50)], "sample 0: BankEntryAmount must be a string: put the number in"),
    ([booking(text=None)], "sample 0: BankEntryText must be a string"),
    ([booking(x={})], "sample 0: x must be a string"),
    ([{"k" * 10_000: 1}], 'sample 0: "kkk'),
    ([booking(), by("robot")], "sample 1: BookedBy must be one of person, check, suggestion"),
    ([booking(account="")], "sample 0: AccountNumber is empty"),
    ([booking(text="")], "sample 0: BankEntryText is empty"),
    ([booking(text="\udc00")], "sample 0: a lone surrogate"),
    ([booking(**{"\udc00": ""})], "sample 0: a lone surrogate"),
    ([booking(text="x" * 10_001)], "sample 0: BankEntryText is longer than 10000 characters"),
    ([booking(**{"k" * 10_001: "x"})], "is longer than 10000 characters"),
    ([booking(company="x" * 101)], "sample 0: CompanyId is longer than 100 characters"),
    ([booking(amount="x" * 101)], "sample 0: BankEntryAmount is longer than 100 characters"),
    ([booking(account="1" * 101)], "sample 0: AccountNumber is longer than 100 characters"),
]
BAD_BODIES = {
    f"{number} {why}": (body if isinstance(body, bytes) else json.dumps(body).encode(), why)
    for number, (body, why) in enumerate(BAD_BODIES)
}


@pytest.mark.parametrize(("body", "message"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_body_is_refused_in_one_short_sentence(body, message):
    with pytest.raises(BadRequest, match=r"^.{1,150}$") as refusal:
        parsed(body)
    assert message in str(refusal.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
VALUES = st.text(st.characters(codec=None), max_size=8)
NEAR_SAMPLES = st.lists(
    st.dictionaries(st.sampled_from([*bookkeep.FEATURES, "AccountNumber", ""]), VALUES | JSON)
)


@given(st.binary() | JSON | NEAR_SAMPLES)
def test_whatever_the_body_it_gives_valid_samples_or_a_bad_request(body):
    try:
        samples = parsed(body)
    except BadRequest:
        return
    for sample in samples:
        assert all(sample[key] for key in (*bookkeep.FEATURES, "AccountNumber"))
        json.dumps(sample, ensure_ascii=False).encode()
        assert tokens(sample)


# ----------------------------------------------------------------------------------------- Counts


KIND = 1 << bookkeep.KIND_SHIFT
MANY_SUMS = st.lists(
    st.tuples(
        st.tuples(st.integers(0, 11), st.integers(1, 4)).map(lambda t: t[0] * KIND + t[1]),
        st.integers(0, 9),  # account
        st.integers(0, 1),  # for or against
        st.integers(1, 3000),  # units
    ),
    max_size=60,
)
ALL_TOKENS = np.array([kind * KIND + token for kind in range(12) for token in range(1, 5)])


def count(counts, sums, sign=1):
    """Adds (token, account, side, units) to the counts, or takes them away."""
    if sums:
        token, account, side, units = np.array(sums, dtype=np.int64).T
        counts.add(counts.rows.insert(token), 2 * account + side, sign * units)


def held(counts):
    """All sums for and against, by token and account: what narrow rows have, and wide ones say."""
    rows = counts.rows.find(ALL_TOKENS)
    found = Counter()
    sizes, *met = counts.met(rows)
    for token, account, said in zip(ALL_TOKENS.repeat(sizes).tolist(), *met, strict=True):
        found[token, int(account)] += int(said)
    wide, accounts = counts.is_wide(rows), np.arange(bookkeep.PAGE * counts.page_of.shape[1])
    evidence = counts.asked(rows[wide, np.newaxis], accounts)
    for t, row in zip(ALL_TOKENS[wide], evidence, strict=True):
        found.update({(t, account): int(said) for account, said in enumerate(row) if said})
    known = counts.occupied.sum(), np.count_nonzero(counts.rows.values[rows])
    assert known[0] == known[1] == len({t for t, _ in found})
    return found


def packed(kind, against, units):
    """Both sums in one number, as what they say."""
    return units << 20 * against


@given(st.lists(MANY_SUMS, max_size=5), MANY_SUMS, st.sampled_from([1, 2, 4, 200]))
def test_sums_are_exact_however_they_are_kept(kept, passing, rare):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bookkeep, "RARE", rare)
        counts = Counts(packed)
        for sums in (*kept, passing):
            count(counts, sums)
        by_hand = Counter()
        for token, account, side, units in (*itertools.chain(*kept), *passing):
            by_hand[token, account] += units << 20 * side
        assert held(counts) == by_hand
        rows = counts.rows.find(ALL_TOKENS)
        assert (counts.is_wide(rows) == ((counts.sizes(rows) > rare) & (ALL_TOKENS > KIND))).all()
        both = held(counts)
        count(counts, passing, -1)
        expected = Counts(packed)
        count(expected, [*itertools.chain(*kept)])
        assert held(counts) == held(expected)
        restored = Counts(packed)
        restored.restore({name: array.copy() for name, array in counts.state().items()})
        count(restored, passing)
        assert held(restored) == both


def test_what_is_taken_away_leaves_its_room_to_others():
    counts = Counts(packed)
    counts.rows.insert(np.arange(1, 101).repeat(1000))
    assert len(counts.rows.keys) <= 512
    for first in range(1, 20_000, 100):
        sums = [(KIND + token, 0, 0, 640) for token in range(first, first + 100)]
        count(counts, sums)
        count(counts, sums, -1)
    assert len(counts.rows.keys) < 1000
    rng = random.Random(3)
    sums = [  # of tokens that met one account, and of some that met nearly all
        (
            KIND + rng.choice([1, 2 + rng.randrange(20), 1000 + i]),
            rng.randrange(i // 12 + 1),
            i % 2,
            640,
        )
        for i in range(9000)
    ]
    for sign in (1, -1) * 8:
        for part in batches_of(sums, 300):
            count(counts, part, sign)
        assert counts.is_wide(counts.rows.find(np.array([KIND + 1])))[0] == (sign > 0)
    for array in (counts.entries, counts.rows.keys, counts.cells):
        assert len(array) < 8 * len(sums)


# ------------------------------------------------------------------------------------------ Model


WEIGHTS = st.integers(1, GRAIN).map(lambda n: n / GRAIN)
TOKENS = st.integers(0, 35).map(lambda n: n % 12 * KIND + 1 + n // 12)  # three of each kind
DOCUMENTS = st.lists(TOKENS, min_size=1, max_size=6)
EACH_TOKEN = [[kind * KIND + 1 + token] for kind in range(12) for token in range(3)]
UNKNOWN = 9  # a token that no document has
LABELS = st.sampled_from(["1", "2", "3", "4"])
LABELLED = st.lists(st.tuples(DOCUMENTS, LABELS), min_size=1, max_size=9)
RIVALS = st.lists(LABELS, unique=True, max_size=2)
LESSONS = st.builds(Lesson, LABELS, WEIGHTS, RIVALS)
LEARNED = st.lists(st.tuples(DOCUMENTS, LESSONS), min_size=1, max_size=30)
FOR_ONLY = st.lists(
    st.tuples(DOCUMENTS, st.builds(Lesson, LABELS, WEIGHTS, st.just([]))), min_size=1, max_size=30
)
RARE = st.sampled_from([1, 3, 200])


def taught(bookings, sizes=(), **constants):
    """A model that has learned these (document, lesson), in batches of these sizes."""
    model = NaiveBayes(**constants)
    rest = list(bookings)
    for size in (*sizes, len(rest)):
        learn_all(model, rest[:size])
        del rest[:size]
    return model


def learn_all(model, bookings, sign=1):
    model.learn([document for document, _ in bookings], [lesson for _, lesson in bookings], sign)


@contextmanager
def rare(most):
    """Inside, a token that has more sums than these is not rare."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bookkeep, "RARE", most)
        yield


def scores_of(model, documents):
    """The scores of each document's candidates, by their names."""
    scores = model.joint_log_likelihood(documents)
    found = [{} for _ in documents]
    for document, account, score in zip(*(each.tolist() for each in scores[:3]), strict=True):
        found[document][model.names[account]] = score
    return found


def said(model, documents=EACH_TOKEN, labels="1234"):
    """What a model says, by account, whatever the order in which it learned."""
    if not model.n_classes:
        return model.n_tokens
    labels = [labels[i % len(labels)] for i in range(len(documents))]
    sums = {
        name: row for name, row in zip(model.names, model.sums.tolist(), strict=False) if row[0]
    }
    assert len(sums) == model.n_classes
    found, _ = model.suggest(documents, 3)
    top = [[(model.names[i], score) for score, i in best] for best in found]
    made = model.predict(documents), model.assess(documents, labels), model.weigh(documents, labels)
    return model.n_tokens, sums, top, scores_of(model, documents), made


class Plain:
    """The model of the docstring of NaiveBayes, from what was learned, in plain Python."""

    def __init__(self, bookings, alpha=0.15, beta=4):
        self.bookings, self.alpha, self.beta = bookings, alpha, beta
        self.n, self.m, self.totals, self.prior = Counter(), Counter(), Counter(), Counter()
        for learned, lesson in bookings:
            self.prior[lesson.account] += lesson.weight
            for token in learned:
                self.n[token, lesson.account] += lesson.weight
                self.totals[token // KIND, lesson.account] += lesson.weight
                self.m.update((token, rival) for rival in lesson.against)
        self.known = {token for token, _ in self.n}

    def candidates(self, document):
        """The accounts that the company or a rare token has met, or all."""
        met = set()
        for token in document:
            sums = [account for t, account in itertools.chain(self.n, self.m) if t == token]
            if token // KIND == 0 or len(sums) <= bookkeep.RARE:
                met.update(sums)
        return sorted(met & {*self.prior}) or sorted(self.prior)

    def score(self, document, account):
        """The formula."""
        score = math.log(self.prior[account])
        for token in self.known.intersection(document):
            kind = token // KIND
            size = sum(t // KIND == kind for t in self.known)
            factor = {0: 2, 3: 0.5, 9: 2, 11: 0.5}.get(kind, 1)
            says = power(self.n[token, account] / self.alpha)
            says -= power(self.m[token, account] / self.beta)
            total = math.log(self.totals[kind, account] + self.alpha * size)
            score += document.count(token) * (factor * says - total / 2)
        return score

    def scores(self, document):
        """Those of all candidates."""
        return {name: self.score(document, name) for name in self.candidates(document)}

    def weigh(self, document, label):
        """What it counts for the label, and P of each of the others that it may count against."""
        if label not in self.prior:
            return 1, {}
        among = sorted({label, *self.candidates(document)})
        scores = np.array([self.score(document, account) for account in among])
        odds = np.exp((scores - scores.max()) / 3)
        share = dict(zip(among, odds / odds.sum(), strict=True))
        return max(1 / 64, 0.75 * (1 - share.pop(label))), share


def power(x):
    return 8 * ((1 + x) ** (1 / 8) - 1)


def test_the_textbooks_example_is_as_the_docstring_says():
    found = doctest.testmod(bookkeep)
    assert (found.failed, found.attempted >= 6) == (0, True)


@given(LEARNED, st.lists(DOCUMENTS, min_size=1, max_size=3), RARE)
def test_the_score_is_the_formula_and_only_candidates_have_one(bookings, documents, most):
    with rare(most):
        model, plain = taught(bookings), Plain(bookings)
        documents = [[*document, UNKNOWN, document[0]] for document in documents]
        for document, scores in zip(documents, scores_of(model, documents), strict=True):
            assert scores == pytest.approx(plain.scores(document), abs=1e-8)
            assert scores_of(model, [document]) == [scores]
        assert model.n_classes == len(plain.prior)


@given(FOR_ONLY, DOCUMENTS, st.sampled_from([0.02, 0.5, 1.0]))
def test_without_rivals_each_kind_is_scikit_learns(bookings, document, alpha):
    """Which takes all of a kind's length off the score, where bookkeep takes half of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bookkeep, "root_log", np.log1p)
        patch.setattr(bookkeep, "FACTORS", (1,) * 12)
        model = taught(bookings, alpha=alpha)
        [scores] = scores_of(model, [document])
    labels = [lesson.account for _, lesson in bookings]
    weights = [lesson.weight for _, lesson in bookings]
    accounts = sorted({*labels})
    sums = model.sums[[model.accounts[account] for account in accounts]]
    expected = np.log(sums[:, 0])
    for kind in range(12):
        vocabulary = sorted({t for learned, _ in bookings for t in learned if t // KIND == kind})
        asked = [vocabulary.index(token) for token in document if token in vocabulary]
        if not asked:
            continue
        matrix = [[learned.count(token) for token in vocabulary] for learned, _ in bookings]
        reference = MultinomialNB(alpha=alpha, force_alpha=True, fit_prior=False)
        reference.fit(np.array(matrix), labels, sample_weight=weights)
        assert list(reference.classes_) == accounts
        expected += reference.feature_log_prob_[:, asked].sum(axis=1)
        # Half of what a kind's length costs is given back, so that scikit-learn's is left.
        expected += len(asked) / 2 * np.log(sums[:, 1 + kind] + alpha * len(vocabulary))
    expected = dict(zip(accounts, expected.tolist(), strict=True))
    first = next(iter(scores))
    for account, score in scores.items():
        assert score - scores[first] == pytest.approx(expected[account] - expected[first], abs=1e-8)


@given(LEARNED, LABELLED, RARE)
def test_an_assessment_is_the_prediction_its_margin_and_the_rank(bookings, asked, most):
    with rare(most):
        model, plain = taught(bookings), Plain(bookings)
        documents, labels = zip(*asked, strict=True)
        assessments = model.assess(documents, labels)
        assert [made.predicted for made in assessments] == model.predict(documents)
        candidates = [plain.scores(document) for document in documents]
    for made, scores, document, label in zip(
        assessments, candidates, documents, labels, strict=True
    ):
        by_kind = [bookkeep.SPECIFICITY_BY_KIND[t // KIND] for t in plain.known & {*document}]
        assert made.specificity == max(by_kind, default=0)
        assert scores[made.predicted] >= max(scores.values()) - 1e-8
        if label not in scores:
            assert made.rank is None
        else:
            above = sum(score > scores[label] + 1e-8 for score in scores.values())
            level = sum(score >= scores[label] - 1e-8 for score in scores.values())
            assert above < made.rank <= level
            assert (made.rank == 1) == (made.predicted == label)
        if len(scores) == 1:
            assert made.margin is None
        else:
            others = np.logaddexp.reduce([scores[a] / 2 for a in scores if a != made.predicted])
            ahead = scores[made.predicted] / 2 - others
            assert made.margin == pytest.approx(2 * np.logaddexp(0, ahead), abs=1e-4)


@given(LEARNED, LABELLED, RARE)
def test_a_lesson_is_the_surprise_and_the_strongest_rivals(bookings, asked, most):
    with rare(most):
        model, plain = taught(bookings), Plain(bookings)
        documents, labels = zip(*asked, strict=True)
        lessons = model.weigh(documents, labels)
        expected = [plain.weigh(*each) for each in asked]
    for lesson, label, (weight, share) in zip(lessons, labels, expected, strict=True):
        assert lesson.account == label
        assert lesson.weight == pytest.approx(weight, abs=0.51 / GRAIN)
        assert lesson.weight * GRAIN % 1 == 0
        near = sorted((-p, name) for name, p in share.items() if p >= 1 / 32 - 1e-9)
        ps = sorted(share.values(), reverse=True)
        apart = all(abs(p - q) > 1e-9 for p, q in itertools.pairwise([*ps[:3], 1 / 32]))
        if apart or not share:
            assert lesson.against == [name for _, name in near[:2]]
        assert len(lesson.against) == min(2, len(near)) or not apart


def test_of_a_sure_one_nobody_is_a_rival_and_it_still_counts_a_little():
    model = taught([([*range(KIND, KIND + 8)], Lesson("1", 1.0))] * 99 + [([1], Lesson("2", 1.0))])
    sure = [*range(KIND, KIND + 8)]
    assert model.weigh([sure, [1]], ["1", "1"])[0] == Lesson("1", 1 / 64, [])
    assert model.weigh([[1]], ["1"])[0].against == ["2"]
    assert model.weigh([[1]], ["new"]) == [Lesson("new", 1.0, [])]


@given(LEARNED, LABELLED, st.integers(1, 4))
def test_a_batch_is_assessed_whole_and_learned_in_rounds(bookings, asked, most):
    documents, labels = zip(*asked, strict=True)
    model, expected = taught(bookings), taught(bookings)
    assessments = expected.assess(documents, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bookkeep, "ROUND", most)
        assert model.assess(documents, labels) == assessments
        assert model.predict(documents) == expected.predict(documents)
        found = list(model.book(documents, labels))
        parts = bookkeep.rounds(len(documents))
    for part, (same, made, lessons) in zip(parts, found, strict=True):
        assert (same, made) == (part, assessments[part])
        assert lessons == expected.weigh(documents[part], labels[part])
        expected.learn(documents[part], lessons)
    assert said(model) == said(expected)


def test_a_round_has_at_most_so_many_and_spans_the_whole_batch():
    for n in (0, 1, 63, 64, 65, 500, 10_000):
        parts = [list(range(n)[part]) for part in bookkeep.rounds(n)]
        assert sorted(itertools.chain(*parts)) == list(range(n))
        assert all(len(part) <= bookkeep.ROUND for part in parts)
        neighbours = [(i, i + 1) for part in parts for i in part if i + 1 in part]
        assert not neighbours or len(parts) == 1


@given(LEARNED, LABELLED, st.lists(st.integers(0, 10)), st.randoms(use_true_random=False), RARE)
@example(
    [([1], Lesson(label, 1.0)) for label in "3214"],
    [([1], "1"), ([2], "2")],
    [1],
    random.Random(0),
    200,
)  # of equals, it is the first by name
def test_any_batching_and_any_order_give_the_same_bits(bookings, asked, sizes, rng, most):
    documents, labels = zip(*asked, strict=True)
    with rare(most):
        model = taught(bookings)
        for other in (bookings, rng.sample(bookings, len(bookings))):
            assert said(taught(other, sizes)) == said(model)
            assert said(taught(other, sizes), documents, labels) == said(model, documents, labels)
        together = scores_of(model, documents), model.weigh(documents, labels)
        for document, label, scores, lesson in zip(documents, labels, *together, strict=True):
            assert scores_of(model, [document]) == [scores]
            assert model.weigh([document], [label]) == [lesson]
            best = sorted(scores, key=lambda name: (-scores[name], name))
            for k in (1, 2, 9):
                [top] = model.suggest([document], k)[0]
                assert [(model.names[i], score) for score, i in top] == [
                    (name, scores[name]) for name in best[:k]
                ]
            assert model.predict([document]) == best[:1]


@given(st.just([]) | LEARNED, LEARNED, LABELLED, RARE)
def test_what_was_unlearned_leaves_no_trace_and_can_be_learned_again(kept, passing, asked, most):
    documents, labels = zip(*asked, strict=True)
    with rare(most):
        model, expected = taught(kept + passing), taught(kept)
        learn_all(model, passing, -1)
        assert said(model) == said(expected)
        assert model.assess(documents, labels) == expected.assess(documents, labels)
        assert model.weigh(documents, labels) == expected.weigh(documents, labels)
        restored = NaiveBayes()
        restored.restore({name: array.copy() for name, array in model.state().items()})
        assert said(restored) == said(expected)
        learn_all(model, passing)
        assert said(model) == said(taught(kept + passing))


def test_without_a_model_there_is_no_prediction_and_full_weight():
    assert NaiveBayes().assess([[1]], ["1"]) == [(None, None, None, 0)]
    assert NaiveBayes().weigh([[1]], ["1"]) == [Lesson("1", 1.0, [])]


@given(LEARNED, LEARNED, DOCUMENTS, RARE)
def test_terms_are_log_odds_that_add_up_to_the_difference_of_scores(kept, passing, document, most):
    with rare(most):
        model = taught(kept)
        for sign in (1, -1):
            learn_all(model, passing, sign)
        document = [*document, UNKNOWN, document[0]]
        scores, accounts = zip(*model.suggest([document], 9)[0][0], strict=True)
        terms = model.terms(document, accounts)
        assert terms.shape == (len(accounts), 1 + len(document))
        assert not terms[:, -2].any()
        assert terms.sum(axis=1).tolist() == [*scores]
        priors = np.log(model.class_counts[[*accounts]])
        np.testing.assert_allclose(terms[:, 0], priors, atol=1e-9)
        np.testing.assert_array_equal(model.terms(document, accounts[:1]), terms[:1])


def test_the_example_of_how_it_works():
    model = taught(
        [
            (tokens(booking("acme", "Office rent May", "> -10000")), Lesson("6300", 1.0)),
            (tokens(booking("acme", "Train to Oslo", "> -100")), Lesson("7140", 1.0)),
        ]
    )
    asked = [tokens(booking("acme", "Office", "> -100"))]
    assert model.assess(asked, ["7140"]) == [("6300", 3.803, 2, 3)]
    lessons = model.weigh(asked, ["7140"])
    assert lessons == [Lesson("7140", 0.5712890625, ["6300"])]
    model.learn(asked, lessons)
    assert model.assess(asked, ["7140"]) == [("7140", 8.8629, 1, 5)]


# ---------------------------------------------------------------------------------------- Metrics


WHO = {0: "suggestion", 1: "person", 16: "check"}  # booked it, by what its prediction counts


def add_rows(history, rows):
    """Adds bookings to a history, each a dict of what differs from these; their rows."""
    usual = {"seq": 0, "company": "A", "booked": "1", "predicted": "1", "name": ""}
    usual |= {"confidence": 0.5, "bin": 9, "known": 3, "rank": 0, "score_weight": 1}
    records = []
    for row in (usual | row for row in rows):
        who = by(WHO[row["score_weight"]], company=row["company"], account=row["booked"])
        reviewed = {} if row["score_weight"] else {"reviewed": False}
        margin = 2 ** ((row["bin"] + 0.5) / 4) - 1
        records.append(
            {name: row[name] for name in ("seq", "predicted", "confidence", "known", "rank")}
            | {"sample": who | {"AccountName": row["name"]}, "margin": margin}
            | reviewed
        )
    rows = history.draft(records)
    rows["confidence"] = [record["confidence"] for record in records]
    history.append(rows, [record["seq"] for record in records])
    return history.rows[len(history.rows) - len(rows) :]


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from([1, 1, 16])),
        min_size=1,
        max_size=20,
    )
)
def test_precision_and_recall_equal_scikit_learns(rows):
    booked, predicted, weights = np.array(rows).T
    for counted in (None, weights):
        assert precision_recall(booked, predicted, counted) == pytest.approx(
            [
                score(booked, predicted, average="macro", zero_division=0, sample_weight=counted)
                for score in (precision_score, recall_score)
            ]
        )
    rows = [{"booked": str(b), "predicted": str(p), "score_weight": w} for b, p, w in rows]
    each = [row | {"score_weight": 1} for row in rows for _ in range(row["score_weight"])]
    once, weighted = add_rows(History(), each), add_rows(History(), rows)
    assert views.figures(weighted) == views.figures(once)
    [level], [other] = (views.by_confidence(of, [0.5]) for of in (weighted, once))
    assert (level["share"], level["accuracy"]) == (1, other["accuracy"])
    assert level["checks"] == np.count_nonzero(weights > 1)


@pytest.mark.parametrize("level", [0.05, 0.1, 0.9, 0.95, 0.99])
def test_who_is_just_sure_enough_is_sure_enough(level):
    rows = add_rows(History(), [{"confidence": level}])
    assert views.by_confidence(rows, [level])[0]["share"] == 1


def test_accuracy_by_confidence():
    found = [("1", 0.9, 1), ("2", 0.5, 1), ("1", 0.2, 1), ("1", 0.95, 16), ("2", 0.95, 0)]
    rows = [{"predicted": p, "confidence": c, "score_weight": weight} for p, c, weight in found]
    rows = bookkeep.scored(add_rows(History(), rows))
    names = ("at_least", "share", "accuracy", "checks")
    levels = views.by_confidence(rows, [0.0, 0.5, 0.92, 0.99])
    assert [tuple(level[name] for name in names) for level in levels] == [
        (0.0, 1.0, 18 / 19, 1),
        (0.5, 18 / 19, 17 / 18, 1),
        (0.92, 16 / 19, 1.0, 1),
        (0.99, 0.0, None, 0),
    ]


def test_an_accuracys_standard_error():
    def error_of(*rows):
        [level] = views.by_confidence(add_rows(History(), rows), [0])
        return level["error"]

    hits, misses, check = [{}] * 300, [{"predicted": "2"}] * 100, {"score_weight": 16}
    usual = (0.75 * 0.25 / 400) ** 0.5
    assert usual < error_of(*hits, *misses) < 1.01 * usual
    checks = [row | check for row in hits + misses]
    assert error_of(*checks) == pytest.approx(error_of(*hits, *misses))
    # 16 certain ones weigh as much as a check, but say more.
    assert error_of(*hits, check | {"predicted": "2"}) > 10 * error_of(*hits)
    # What has always been right is not certain, the less so the less there is.
    assert error_of(*hits) == pytest.approx(1 / 300)
    assert error_of(check) == 1


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "company": st.sampled_from("AB"),
            "predicted": st.sampled_from("12"),
            "booked": st.sampled_from("12"),
            "bin": st.integers(0, 27),
            "known": st.integers(0, 5),
            "rank": st.integers(0, 20),
            "score_weight": st.sampled_from([0, 1, 16]),
        }
    ),
    max_size=40,
)


@given(ROWS, ROWS)
def test_confidence_narrows_down_from_everybodys_record_to_ones_own(rows, asked):
    history, calibration = History(), Calibration()
    calibration.add(add_rows(history, rows))
    asked_rows = add_rows(history, asked)
    together, evidence = calibration.confidence(asked_rows), calibration.evidence_counts(asked_rows)
    for i, row in enumerate(asked):
        assert together[i] == calibration.confidence(asked_rows[i : i + 1])[0]
        assert together[i] == pytest.approx(confidence_by_hand(rows, row), abs=1e-9)
        near = slice(max(0, row["bin"] - 2), row["bin"] + 3)
        right, counted = (sums[row["known"], near].sum() for sums in everybodys_by_hand(rows))
        assert evidence[i] == {
            "own": tally_by_hand(own_by_hand(rows, row, "predicted")),
            "all": {"suggestions": int(counted + 1e-9), "right": int(right + 1e-9)},
        }


@given(ROWS, ROWS, st.randoms(use_true_random=False))
def test_calibration_is_a_sum_that_leaves_no_trace(kept, passing, rng):
    history = History()
    rows = add_rows(history, kept + passing)
    asked = np.concatenate([EVERY_BIN, rows])

    def said(calibration):
        confidence = calibration.confidence(asked)
        evidence = calibration.evidence_counts(asked)
        return confidence.tolist(), evidence, calibration.shared(confidence).tolist()

    calibration, other = Calibration(), Calibration()
    calibration.add(rows)
    for i in rng.sample(range(len(rows)), len(rows)):
        other.add(rows[i : i + 1])
    assert said(calibration) == said(other)
    for i in rng.sample(range(len(kept), len(rows)), len(passing)):
        calibration.add(rows[i : i + 1], sign=-1)
    other = Calibration()
    other.add(rows[: len(kept)])
    assert said(calibration) == said(other)


@pytest.mark.parametrize(
    "attack",
    [{}, {"score_weight": 16}, {"predicted": "2"}, {"predicted": "2", "score_weight": 16}],
    ids=["what was suggested", "checks that were none", "garbage", "checks of garbage"],
)
def test_one_company_does_not_move_what_is_said_of_others(attack):
    history, calibration = History(), Calibration()
    for turn in range(40):  # each is the more often right the surer it is
        for bin, hits in ((8, 12), (12, 16), (16, 19)):
            usual = {"company": f"{turn}", "bin": bin}
            rows = add_rows(history, [usual, usual | {"predicted": "2"}])
            calibration.add(rows.repeat([hits, 20 - hits]))
    asked = add_rows(history, [{"company": "new", "bin": bin} for bin in (8, 12, 16)])
    before = calibration.confidence(asked)
    assert before == pytest.approx([0.6, 0.8, 0.94], abs=0.03)
    rows = [{"company": "evil", "bin": bin} | attack for bin in (8, 12, 16)]
    calibration.add(add_rows(history, rows).repeat(3000))
    change = calibration.confidence(asked) - before
    assert change.max() < 0.1  # or else more would be booked unseen than is right
    assert change.min() > -0.25


def test_checks_stand_for_the_companys_own_bookings_that_nobody_looked_at():
    def said_of_others(*rows):
        history, calibration = History(), Calibration()
        calibration.add(add_rows(history, rows))
        [evidence] = calibration.evidence_counts(add_rows(history, [{"company": "new"}]))
        return evidence["all"]

    check, unseen = {"score_weight": 16}, {"score_weight": 0, "bin": 20, "predicted": "2"}
    wrong = {"predicted": "2"}
    assert said_of_others(*[check] * 40) == said_of_others(*[{}] * 40)
    assert said_of_others(*[check] * 40, *[unseen] * 600) == said_of_others(*[{}] * 640)
    all_of_them = [check] * 3 + [check | wrong] + [unseen] * 28
    assert said_of_others(*all_of_them) == said_of_others(*[{}] * 24, *[wrong] * 8)
    assert said_of_others({}, *[unseen] * 9) == said_of_others({})
    of_another = [unseen | {"company": "B"}] * 600
    assert said_of_others(*[check] * 40, *of_another) == said_of_others(*[{}] * 40)


def test_a_calibration_keeps_no_room_for_what_was_taken_away():
    history, calibration = History(), Calibration()
    for turn in range(40):
        rows = add_rows(history, [{"company": f"{turn} {i}"} for i in range(100)])
        calibration.add(rows)
        calibration.add(rows, sign=-1)
    assert sum(array.size for array in calibration.state().values()) < 10_000
    calibration.add(rows)
    [evidence] = calibration.evidence_counts(rows[:1])
    assert evidence["own"] == {"suggestions": 1, "right": 1}


def test_the_second_gets_what_the_first_leaves_as_often_as_it_was_right():
    history, calibration = History(), Calibration()
    assert not calibration.shared(np.array([0.0])).any()
    ranks = [(1, 48), (2, 30), (3, 10), (0, 10)]
    rows = [{"booked": str(rank), "rank": rank} for rank, often in ranks for _ in range(often)]
    calibration.add(add_rows(history, rows))
    first, second, third, *others = calibration.shared(np.array([0.48]))[0]
    assert first == 0.48
    counted = sum(math.sqrt(often) for often in (30, 10, 10)) + 2
    assert second == pytest.approx(0.52 * math.sqrt(30) / counted, abs=1e-3)
    assert third == pytest.approx(0.52 * math.sqrt(10) / counted, abs=1e-3)
    assert others == [0] * (Calibration.RANKS - 3)
    assert calibration.shared(np.array([0.01]))[0, 1] == 0.01  # never more than the first
    calibration.add(add_rows(history, [{"company": "B", "booked": "2", "rank": 2}] * 7))
    of_both = math.sqrt(30) + math.sqrt(7), counted + math.sqrt(7)
    second = calibration.shared(np.array([0.48]))[0, 1]
    assert second == pytest.approx(0.52 * of_both[0] / of_both[1], abs=1e-3)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("AB"),
            st.integers(0, 3),
            st.sampled_from([None, "0", "1", "2"]),
            st.sampled_from([0, 1, 1, 16]),
        )
    ),
    st.integers(1, 12),
    st.lists(st.integers(0, 40)),
)
def test_a_history_gives_the_last_that_are_scored(bookings, n, sizes):
    names = ("company", "booked", "predicted", "score_weight")
    rows = [
        dict(zip(names, (company, str(booked), *more), strict=True), seq=2 * i)
        for i, (company, booked, *more) in enumerate(bookings)
    ]
    history, rest = History(), list(rows)
    for size in (*sizes, len(rest)):
        add_rows(history, rest[:size])
        del rest[:size]

    def assert_it_has(history, rows):
        assert {*history.companies} == {row["company"] for row in rows}
        for company in (None, "A", "B", "C"):
            mine = [row for row in rows if company in (None, row["company"])]
            scored = [row["seq"] for row in mine if row["predicted"] and row["score_weight"]]
            assert history.last(n, company)["seq"].tolist() == scored[-n:]
            if company:
                assert history.of(company)["seq"].tolist() == [row["seq"] for row in mine]
                assert history.size(company) == len(mine)
        accounts = list(history.accounts)
        booked = [accounts[number] for number in history.rows["booked"]]
        assert booked == [row["booked"] for row in rows]
        assert history.rows["reviewed"].tolist() == [row["score_weight"] > 0 for row in rows]

    assert_it_has(history, rows)
    restored = History()
    restored.restore({name: array.copy() for name, array in history.state().items()})
    assert_it_has(restored, rows)
    gone = [row["seq"] for row in rows if row["company"] == "A"]
    assert history.forget(np.array([*gone, 999]))["seq"].tolist() == gone
    kept = [row for row in rows if row["company"] == "B"]
    assert_it_has(history, kept)
    row = {"booked": "1", "predicted": "1", "score_weight": 1}
    more = [row | {"seq": 998, "company": "C"}, row | {"seq": 999, "company": "A"}]
    add_rows(history, more)
    assert_it_has(history, kept + more)
    history.correct(998, "corrected", 2)
    [row] = history.at(np.array([998, 1000]))
    assert list(history.accounts)[row["booked"]] == "corrected"
    assert (row["rank"], row["reviewed"]) == (2, True)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("AB"),
            st.sampled_from([None, "0", "1"]),
            st.sampled_from([0.0, 0.25, 0.3, 0.9]),
            st.integers(0, 1),
        ),
        max_size=30,
    )
)
def test_pages_of_a_history_have_all_that_match_once(bookings):
    names = ("company", "predicted", "confidence", "score_weight")
    rows = [dict(zip(names, row, strict=True), seq=3 * i) for i, row in enumerate(bookings)]
    history = History()
    add_rows(history, rows)

    def pages(limit, *asked):
        page, before = views.page(history, limit, *asked)
        while before is not None:
            assert len(page) == limit
            yield from page.tolist()
            page, before = views.page(history, limit, *asked, before)
        yield from page.tolist()

    asked = itertools.product([None, "A"], [None, True, False], [None, 0.3], [False, True])
    for company, reviewed, below, by_confidence in asked:
        matching = [
            row
            for row in reversed(rows)
            if company in (None, row["company"])
            and reviewed in (None, bool(row["score_weight"]))
            and (below is None or row["confidence"] < below)
            and (row["predicted"] or not (by_confidence or below))
        ]
        for limit, most in ((3, 100), (1, 5)):
            if by_confidence:
                matching = sorted(matching, key=lambda row: -row["seq"])[:most]
                matching = sorted(matching, key=lambda row: row["confidence"])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(views, "LEAST_SURE", most)
                found = [*pages(limit, company, reviewed, below, by_confidence)]
            assert found == [row["seq"] for row in matching]


def test_a_history_knows_who_named_an_account_last():
    history = History()
    named = [("A", "1", "x"), ("A", "2", "x"), ("B", "1", "x"), ("A", "1", ""), ("A", "1", "y")]
    add_rows(
        history,
        [
            {"seq": 2 * i, "company": company, "booked": booked, "name": name}
            for i, (company, booked, name) in enumerate([*named, ("B", "2", "")])
        ],
    )
    history.correct(8, "2", 0)
    pairs = [("A", "1"), ("B", "1"), ("A", "2"), ("B", "2"), ("A", "1")]
    companies = np.array([history.companies[company] for company, _ in pairs])
    accounts = np.array([history.accounts[account] for _, account in pairs])
    assert views.last_named(history, companies, accounts).tolist() == [8, 4, 2, -1, 8]
    add_rows(history, [{"seq": 11 + i, "company": "C"} for i in range(40_000)])
    assert views.last_named(history, companies, accounts).tolist() == [8, 4, 2, -1, 8]
    history.forget(np.array([0, 2, 6, 8]))
    assert views.last_named(history, companies, accounts).tolist() == [-1, 4, -1, -1, -1]


def test_a_history_can_be_read_while_bookings_come():
    rows = add_rows(history := History(), [{"seq": seq} for seq in range(50)])

    class Growing(History):
        """Has one row more whenever one looks."""

        rows = property(lambda self: rows[: next(size)], lambda self, _: None)

    growing, size = Growing(), itertools.count(20)
    growing.companies, growing.accounts = history.companies, history.accounts
    account = history.rows[:1]["booked"], history.rows[:1]["named"]
    for found in (
        growing.of("A")["seq"],
        growing.last(99)["seq"],
        growing.last(99, "A")["seq"],
        growing.at(np.arange(99))["seq"],
        views.page(growing, 99, "A", True, 0.9, True)[0][::-1],
    ):
        assert found.tolist()[:20] == [*range(20)]
    assert views.last_named(growing, history.rows[:1]["company"], account[0]).tolist() == [-1]


# -------------------------------------------------------------------------------------------- Log


@contextmanager
def open_log(path):
    """A log that has been read, closed at the end."""
    log = Log(path)
    try:
        list(log.read())
        yield log
    finally:
        log.close()


@contextmanager
def no_space(*names):
    """Inside, these functions of the system fail, but that a pwrite writes a part of it first."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    def write_a_part(file, data, at):
        return pwrite(file, data[:200], at) if len(data) > 200 else fail()

    pwrite = os.pwrite
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, write_a_part if name == "pwrite" else fail)
        yield


def values(path):
    """What the lines hold that `written` wrote; None if they hold nothing."""
    return [record.get("x") for record in read(path)]


def test_a_line_says_its_place_and_then_what_was_recorded(path):
    lines = written(path, [[{"a": "ü"}, {"a": "\n"}], [{"a": 1}]])
    placed = [
        {"seq": 0, "batch": 0, "left": 1, "a": "ü"},
        {"seq": 1, "batch": 0, "left": 0, "a": "\n"},
        {"seq": 2, "batch": 2, "left": 0, "a": 1},
    ]
    assert lines == [line_of(record) for record in placed]
    assert read(path) == placed
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_text_can_forge_a_line(path):
    forged = json.dumps({"seq": 1, "batch": 1, "left": 0}) + ', "crc": 0}\n'
    nasty = [forged, "\n" + forged, "\r\n\x00\x1b\x85\u2028\u2029", '"}\n', "\\n"]
    lines = written(path, [[{"x": text, text: "x"} for text in nasty]])
    assert len(lines) == len(path.read_text("utf-8").split("\n")) - 1 == len(nasty)
    assert values(path) == nasty


def test_a_log_cut_anywhere_keeps_every_whole_batch_and_goes_on(path, caplog):
    lines = written(path, [[{"x": i}] * 2 for i in range(3)])
    whole = b"".join(lines)
    ends = [0, *(sum(map(len, lines[:n])) for n in (2, 4, 6))]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        caplog.clear()
        kept = max(n for n in range(4) if ends[n] <= cut)
        with open_log(path) as log:
            assert path.read_bytes() == whole[: ends[kept]]
            log.append([(None, [{"x": "more"}])])
        assert bool(caplog.records) == (cut not in ends)
        records = read(path)
        assert [record["seq"] for record in records] == [*range(2 * kept + 1)]
        assert records[-1]["x"] == "more"


DAMAGE = {  # of line 3, the first of a batch of three
    "a bit flipped": lambda line: bytes([line[0], line[1] ^ 1]) + line[2:],
    "a bit of a value flipped": lambda line: line.replace(b'"x": 2', b'"x": 3'),
    "a bit of the checksum flipped": lambda line: line[:-3] + bytes([line[-3] ^ 1]) + line[-2:],
    "a newline inside": lambda line: line[:9] + b"\n" + line[10:],
    "cut": lambda line: line[:-9] + b"\n",
    "no text": lambda line: b"\n",
    "lost": lambda line: b"",
    "twice before": lambda line: line.replace(b'"x": 2', b'"x": 3') + line,
    "no object": lambda line: b'[1], "crc": %d}\n' % zlib.crc32(b"[1]"),
    "a key lost": lambda line: changed(line, left=None),
    "another place": lambda line: changed(line, seq=7),
    "an earlier place": lambda line: changed(line, seq=0),
    "another batch": lambda line: changed(line, batch="another"),
    "another left": lambda line: changed(line, left=1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", [None, "mine"])
def test_damage_is_refused_with_its_line_and_left_alone(path, damage, name):
    lines = written(path, [[{"x": 1}, {"x": 1}], [{"x": 2}, {"x": 3}, {"x": 4}], [{"x": 5}]], name)
    path.write_bytes(b"".join([*lines[:2], damage(lines[2]), *lines[3:]]))
    before = path.read_bytes()
    with pytest.raises(
        LogError, match=r"is damaged, line [34]: .*bookkeep\.py relearn .*log\.jsonl"
    ):
        read(path)
    assert path.read_bytes() == before


def test_any_byte_flipped_before_the_last_batch_is_found(path):
    lines = written(path, [[{"x": 1}], [{"x": 2}, {"x": 3}], [{"x": 4}]])
    whole = b"".join(lines)
    for place in range(len(whole) - len(lines[3]) - 1):  # the newline is the last batch's, too
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(LogError, match=r"is damaged, line [1234]: "):
            read(path)


@pytest.mark.parametrize("name", [None, "mine"])
@pytest.mark.parametrize(("at", "lost"), [(2, []), (3, [2, 3])])
def test_a_line_that_stands_too_early_costs_only_the_batch_that_it_is_in(path, at, lost, name):
    lines = written(path, [[{"x": i}, {"x": i}] for i in range(5)], name)
    path.write_bytes(b"".join([*lines[:at], lines[8], *lines[at:]]))
    assert [r["seq"] for r in scanned(path)] == [seq for seq in range(10) if seq not in lost]
    with pytest.raises(LogError, match=f"is damaged, line {at + 1}: "):
        read(path)


def test_holes_in_the_last_append_are_cut_off_and_kept(path, caplog):
    lines = written(path, [[{"x": 1}], [{"x": "x" * 230}] * 9])
    whole, end = lines[0], b"".join(lines[1:])
    assert len(end) > 5 * 512
    cut = path.with_name("log.jsonl.cut")
    for lost in itertools.product((False, True), repeat=5):
        torn = bytearray(end)
        for block in itertools.compress(range(5), lost):
            torn[512 * block : 512 * (block + 1)] = bytes(512)
        path.write_bytes(whole + torn)
        caplog.clear()
        assert len(read(path)) == (1 if any(lost) else 10)
        if any(lost):
            assert f"line 2: the batch is unfinished; a start cuts off {len(end)} by" in caplog.text
            assert path.read_bytes() == whole
            assert cut.read_bytes().endswith(torn)
    assert len(cut.read_bytes()) == 31 * len(end)  # all of them
    assert cut.stat().st_mode & 0o777 == 0o600


def test_a_new_log_with_a_hole_is_one_and_any_other_file_is_left_alone(path):
    line = written(path, [[{"x": 1}]])[0]
    for torn in (bytes(40) + line[40:], line[:4], bytes(99)):
        path.write_bytes(torn)
        assert read(path) == []
    for other in (b"a,b\n1,2\n" * 99, b"\n", b"PK\3\4", line[1:]):
        path.write_bytes(other)
        with pytest.raises(LogError, match="line 1: no log starts like this"):
            read(path)
        assert path.read_bytes() == other


def test_a_log_that_grows_while_one_looks_for_it_is_in_its_place(path, monkeypatch):
    look = os.fstat

    def grow(file):
        found = look(file)
        monkeypatch.undo()
        log.append([(None, [{"x": 1}])])
        return found

    with open_log(path) as log:
        monkeypatch.setattr(os, "fstat", grow)
        assert log.in_place()
        assert len(log) == 1


def test_the_last_batches_with_keys_can_be_found_again(path, monkeypatch):
    monkeypatch.setattr(bookkeep, "MAX_KEYS", 3)

    def check(log):
        assert log.find("a") is None
        assert log.find("other") is None
        assert [record["seq"] for record in log.find("d")] == [8, 9]
        assert [record["x"] for record in log.find("b")[:1]] == ["b"]

    with open_log(path) as log:
        for name in ("a", None, "b", "c", "d"):
            log.append([(name, [{"x": name}, {"y": name}])])
        check(log)
    with open_log(path) as log:
        assert len(log) == 10
        check(log)


def test_a_batch_is_found_by_its_key_once_its_lines_can_be_read(path):
    class Asking(list):
        def __iter__(self):  # another thread may ask at any moment
            found.append(log.find("k"))
            return super().__iter__()

    found = []
    with open_log(path) as log:
        [batch] = log.place([("k", [{"x": 1}])])
        log.write([batch._replace(lines=Asking(batch.lines))])
        assert found == [None] * len(found) != []
        assert log.find("k") == batch.records


def test_a_new_log_is_on_disk_before_it_is_used(path, monkeypatch):
    synced = []
    fsync = os.fsync

    def watched(file):
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    monkeypatch.setattr(os, "fsync", watched)
    written(path, [[{"x": 1}]])
    folder = str(path.parent.resolve())
    assert synced == [folder, str(Path(folder).parent), str(path.resolve())]
    synced.clear()
    deep = path.parent / "new" / "newer" / "log"
    written(deep, [])
    assert synced == [str(parent.resolve()) for parent in deep.parents[:3]]
    synced.clear()
    link, far = path.with_name("link"), path.parent.parent / "far" / "log"
    link.symlink_to(far)
    written(link, [])
    assert synced == [str(far.parent.resolve()), str(far.parent.parent.resolve())]


def test_what_need_not_be_durable_is_on_disk_with_what_comes_next(path, monkeypatch):
    synced = []
    with open_log(path) as log:
        monkeypatch.setattr(os, "fsync", synced.append)
        log.write(log.place([("k", [{"x": 1}])]), durable=False)
        assert synced == []
        assert log.find("k")[0]["x"] == 1
        log.append([(None, [{"x": 2}])])
        assert len(synced) == 1
        log.write(log.place([(None, [{"x": 3}])]), durable=False)
        log.sync()
        assert len(synced) == 2
    assert values(path) == [1, 2, 3]


def test_a_log_has_one_owner(path):
    with open_log(path), pytest.raises(LogError, match="in use by another process"):
        Log(path)
    Log(path).close()


UNSURE = "may hold this all the same, so that only a key makes it safe to send it again"
FAILURES = {("pwrite",): "", ("fsync",): UNSURE, ("pwrite", "ftruncate"): UNSURE}
FAILURES[("fsync", "ftruncate")] = UNSURE  # so that all of it is there


@pytest.mark.parametrize(("names", "said"), FAILURES.items(), ids=str)
def test_what_cannot_be_written_is_not_in_the_log_or_said_to_be_there_maybe(path, names, said):
    [line] = written(path, [[{"x": 1}]])
    lost = [(None, [{"x": "lost" * 100}])]
    with open_log(path) as log:
        with no_space(*names), pytest.raises(OSError, match=rf"No space left on device.*{said}$"):
            log.append(lost)
        assert (path.read_bytes() == line) == ("ftruncate" not in names)
        if said:
            with no_space(*names), pytest.raises(OSError, match=r"No space left on device$"):
                log.append(lost)  # which was not written at all
        log.append([(None, [{"x": 2}])])
        with no_space(*names), pytest.raises(OSError, match="No space"):
            log.append(lost)
    assert b"lost" not in path.read_bytes()  # for at the end, it could be cut back
    assert values(path) == [1, 2]


def test_a_log_that_was_moved_is_not_written_but_can_be_read(path):
    with open_log(path) as log:
        log.append([("k", [{"x": 1}])])
        moved = path.rename(path.with_name("moved"))
        for another in (False, True):
            if another:
                path.touch()
            calls = [lambda: log.append([(None, [{"x": 2}])]), lambda: log.find("k")]
            for call in (*calls, lambda: log.start_forgetting(np.array([0]))):
                with pytest.raises(OSError, match="moved, replaced, deleted or cut"):
                    call()
            assert Export(log, range(1)).read() == moved.read_bytes()
        assert {*os.listdir(path.parent)} == {"log.jsonl", "moved"}
        moved.rename(path)
        log.append([(None, [{"x": 2}])])
    assert values(path) == [1, 2]


def test_an_emptied_line_has_its_length_and_its_place_and_nothing_else(path):
    batches = [('ke"y\\', [{"x": "ü"}, {"x": 1}]), (None, [{"x": {"a": [2, "}\n"]}}])]
    with open_log(path) as log:
        log.append(batches)
        before = path.read_bytes().splitlines(keepends=True)
        log.empty(0)
        log.empty(2)
        assert [record.get("x") for record in log.find('ke"y\\')] == [None, 1]
    lines = path.read_bytes().splitlines(keepends=True)
    assert [*map(len, lines)] == [*map(len, before)]
    assert lines[1] == before[1]
    for seq in (0, 2):
        place = dict(itertools.islice(json.loads(before[seq]).items(), 3))
        assert list(place) == ["seq", "batch", "left"]
        assert lines[seq] == line_of(place)[:-1].ljust(len(before[seq]) - 1) + b"\n"
        assert bookkeep.emptied(before[seq]) == bookkeep.emptied(lines[seq]) == lines[seq]
    for line in (b"", b"\n", before[0][:-1], before[0] * 2, before[0][1:], b'{"seq": 0, "x": 1}\n'):
        with pytest.raises(ValueError, match="has no place"):
            bookkeep.emptied(line)


def forgetting(path, seqs=(1, 2, 4)):
    """A log of six lines that was about to empty these; its lines."""
    lines = written(path, [[{"x": 0}, {"x": 1}], [{"x": 2}], [{"x": 3}, {"x": 4}, {"x": 5}]], "key")
    with open_log(path) as log:
        log.start_forgetting(np.array(seqs))
    return lines


def note_of(path):
    return path.with_name("log.jsonl.forgetting")


def test_a_start_does_the_rest_of_a_forgetting_wherever_it_was_cut_short(path, caplog):
    lines = forgetting(path)
    note, emptied = note_of(path).read_bytes(), [*map(bookkeep.emptied, lines)]
    assert note_of(path).stat().st_mode & 0o777 == 0o600
    done = [*lines]
    for seq in (1, 2, 4):
        done[seq] = emptied[seq]
    states = [[*lines], [lines[0], emptied[1], *lines[2:]], [*done]]  # none, one, all of them
    for cut in range(0, len(lines[2]), 3):  # and one half, from either side
        for first, second in ((lines[2], emptied[2]), (emptied[2], lines[2])):
            states.append([lines[0], emptied[1], first[:cut] + second[cut:], *lines[3:]])
    for state in states:
        path.write_bytes(b"".join(state))
        note_of(path).write_bytes(note)
        caplog.clear()
        assert values(path) == [0, None, None, 3, None, 5]
        assert path.read_bytes() == b"".join(done)
        assert [*path.parent.iterdir()] == [path]
        assert "forgot what was to be forgotten, 3 lines" in caplog.text


def test_a_log_knows_whether_a_start_would_forget_something(path, monkeypatch):
    written(path, [[{"x": 0}], [{"x": 1}]])
    new_file = bookkeep.new_file
    with open_log(path) as log:
        with monkeypatch.context() as patch, no_space("fsync"):
            patch.setattr(bookkeep, "new_file", lambda path, durable: new_file(path, False))
            with pytest.raises(OSError, match="No space"):  # once the note has its name
                log.start_forgetting(np.array([0]))
        assert (log.forgetting, note_of(path).exists()) == (True, True)
        log.empty(0)
        log.sync()
        with no_space("fsync"), pytest.raises(OSError, match="No space"):
            log.finish_forgetting()
        assert log.forgetting
        log.finish_forgetting()
        assert (log.forgetting, note_of(path).exists()) == (False, False)
    assert values(path) == [None, 1]


def other_note(path):
    """The note of another log, whose first line is as in this one."""
    other = path.with_name("other")
    lines = written(other, [[{"x": 0}, {"x": "other"}], [{"x": 2}]], "key")
    with open_log(other) as log:
        log.start_forgetting(np.array([0, 1]))
    assert lines[0] == path.read_bytes().splitlines(keepends=True)[0]
    return other.with_name("other.forgetting").read_bytes()


NOTES = {
    "empty": lambda path, note: b"",
    "damaged": lambda path, note: note.replace(b"1", b"0", 1),
    "cut": lambda path, note: note[:-3],
    "a line": lambda path, note: path.read_bytes().splitlines(keepends=True)[0],
    "longer": lambda path, note: line_of({"lines": [*json.loads(note)["lines"], [6, 600, 80]]}),
    "of another log": lambda path, note: other_note(path),
}


@pytest.mark.parametrize("made", NOTES.values(), ids=NOTES)
def test_a_note_that_is_not_of_this_log_is_refused_and_nothing_overwritten(path, made):
    forgetting(path)
    note_of(path).write_bytes(made(path, note_of(path).read_bytes()))
    log, note = path.read_bytes(), note_of(path).read_bytes()
    expected = f"^{note_of(path)} is not of {path} \\([^;]*\\); move it away$"
    for _ in range(2):  # so the log is let go, too
        with pytest.raises(LogError, match=expected):
            Log(path)
        assert (path.read_bytes(), note_of(path).read_bytes()) == (log, note)
    note_of(path).unlink()
    assert len(read(path)) == 6


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_forgetting_that_cannot_be_noted_has_changed_nothing(path, step):
    lines = written(path, [[{"x": seq}] for seq in range(100)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_log(path) as log:
        try:
            if step == "write":
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            with no_space(*{step} - {"write"}), pytest.raises(OSError, match=r"No space|too large"):
                log.start_forgetting(np.arange(100))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.listdir(path.parent) == [path.name]
        assert path.read_bytes() == b"".join(lines)
        log.append([(None, [{"x": 100}])])
    assert values(path) == [*range(101)]


def test_a_note_that_was_not_finished_counts_for_nothing(path):
    forgetting(path)
    unfinished = note_of(path).rename(path.with_name(".log.jsonl.forgetting"))
    assert values(path) == [*range(6)]
    with open_log(path) as log:
        log.start_forgetting(np.array([0]))
        assert not unfinished.exists()
    assert values(path) == [None, *range(1, 6)]


def test_a_log_is_forgotten_in_wherever_a_symbolic_link_leads(path, tmp_path):
    written(path, [[{"x": 1}], [{"x": 2}]])
    link = tmp_path / "link"
    link.symlink_to(path)
    with open_log(link) as log:
        log.start_forgetting(np.array([0]))
        assert note_of(path).exists()
    assert values(link) == values(path) == [None, 2]
    assert link.is_symlink()
    assert [*path.parent.iterdir()] == [path]


def test_files_beside_the_log_are_not_opened_through_links(path):
    precious = path.parent.parent / "precious"
    precious.write_bytes(b"precious")
    with bookkeeping(path, unsaved=1) as keeper:
        for name in (".log.jsonl.forgetting", ".log.jsonl.snapshot.npz", "log.jsonl.cut"):
            path.with_name(name).symlink_to(precious)
        keeper.book([booking()])
        settled(keeper)
        assert zipfile.is_zipfile(path.with_name("log.jsonl.snapshot.npz"))
        keeper.forget("A")
    path.write_bytes(path.read_bytes() + b"torn")
    with pytest.raises(OSError, match="symbolic links"):
        read(path)
    assert path.read_bytes().endswith(b"torn")
    assert precious.read_bytes() == b"precious"


def test_an_export_has_those_lines_that_exist(path):
    lines = written(path, [[{"x": i}] for i in range(200)])
    with open_log(path) as log:
        for first, stop in ((0, 200), (3, 5), (63, 65), (199, 300), (200, 220), (500, 501)):
            export, expected = Export(log, range(first, stop)), b"".join(lines[first:stop])
            assert export.size == export.seek(0, os.SEEK_END) == len(expected)
            export.seek(0)
            assert b"".join(iter(export.read, b"")) == expected


def test_an_export_shows_each_line_whole_as_it_was_or_emptied(path):
    rng = random.Random(0)
    lines = written(path, [[{"x": "x" * rng.randrange(2000)}] for _ in range(300)])
    seen = Counter()
    with open_log(path) as log:
        sent, buffer = b"", ReadOnlyFileBasedBuffer(Export(log, range(10, 290)))  # as waitress does
        buffer.prepare()
        while len(buffer):
            part = buffer.get(rng.randrange(1, 20_000))
            taken = rng.randrange(1, len(part) + 1)  # by the socket
            buffer.skip(taken)
            sent += part[:taken]
            log.empty(rng.randrange(300))
        log.append([(None, [{"x": "late"}])])
    for seq, line in enumerate(sent.splitlines(keepends=True), start=10):
        assert line in (lines[seq], bookkeep.emptied(lines[seq]))
        seen[line == lines[seq]] += 1
    assert seen.total() == 280
    assert min(seen[True], seen[False]) > 20


def test_no_line_is_read_half_emptied(path, monkeypatch):
    [line] = written(path, [[{"x": "secret"}]])
    found, pwrite = [], os.pwrite
    with open_log(path) as log:
        reading = threading.Thread(target=lambda: found.append(log.lines(0, 1)))

        def write_half(file, content, at):
            written = pwrite(file, content[: len(content) // 2 + 1], at)
            if not reading.ident:
                reading.start()
                reading.join(0.2)  # would be time enough
            return written

        monkeypatch.setattr(os, "pwrite", write_half)
        log.empty(0)
        reading.join()
    assert found == [bookkeep.emptied(line)]


# --------------------------------------------------------------------------------------- Snapshot


UNSAVED = 100  # lines after which a snapshot is due, here
saving = partial(bookkeeping, unsaved=UNSAVED)


def snapshot_of(path):
    return path.with_name(f"{path.name}.snapshot.npz")


@contextmanager
def read_back():
    """How many lines a start inside reads, in parts."""
    sizes, apply = [], Books.apply

    def counted(books, records, booking_of):
        sizes.append(len(records))
        apply(books, records, booking_of)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Books, "apply", counted)
        yield sizes


@pytest.fixture
def grown(path):
    """Answers of a keeper of 700 bookings, some corrected and some forgotten, in a log."""
    samples = bookings(700)
    with saving(path) as keeper:
        for number, batch in enumerate(batches_of(samples[:600], 70)):
            keeper.book(batch, f"key{number}")
        keeper.forget(samples[0]["CompanyId"])
    with saving(path) as keeper:
        for batch in batches_of(samples[600:], 7):
            keeper.book(batch)
        for seq in (690, 691, 690):
            keeper.correct(seq, f"account{seq}")
        settled(keeper)
        keeper.snapshot.lines = 0  # so that there will be a new one
        return answers(keeper)


def test_a_snapshot_spares_reading_the_log_and_changes_nothing(path, grown, caplog):
    caplog.clear()
    with read_back() as sizes, saving(path) as keeper:
        assert sizes == []
        assert_same(keeper, grown)
        assert_same(keeper, books_of(path))
        # It goes on as one that has read the log does.
        with pytest.raises(Conflict, match="were forgotten"):
            keeper.book(bookings(700)[:70], "key0")
        assert keeper.correct(690, "other") == "account690"
        assert keeper.forget(bookings(60, seed=2)[0]["CompanyId"]) > 0
        keeper.book(bookings(60, seed=2))
        assert_same(keeper, books_of(path))
    assert not caplog.records


def test_what_came_after_a_snapshot_is_read_from_the_log(path, grown):
    late = bookings(UNSAVED - 1, seed=3)
    with saving(path) as keeper:
        keeper.book(late, "late")
        known = answers(keeper)
    whole = path.read_bytes()
    lines = whole.count(b"\n")
    path.write_bytes(whole + b'{"seq": 5')  # cut off by a crash
    with read_back() as sizes, saving(path) as keeper:
        assert sizes == [UNSAVED - 1]
        assert_same(keeper, known)
        assert keeper.book(late, "late").stop == lines
        keeper.book([booking()])
    for place, expected in ((-2, lines), (0, 1)):  # behind what the snapshot covers, and before
        spoilt = path.read_bytes().splitlines(keepends=True)
        spoilt[place] = spoilt[place].replace(b'"left": ', b'"left":  ')
        path.write_bytes(b"".join(spoilt))
        log = Log(path)
        with pytest.raises(LogError, match=f"line {expected}: the checksum does not fit"):
            Bookkeeper(log)
        log.close()


def with_arrays(snapshot, **values):
    """The snapshot with these arrays, and without those that are None."""
    with np.load(snapshot) as file:
        arrays = dict(file) | values
    changed = BytesIO()
    np.savez(changed, **{name: array for name, array in arrays.items() if array is not None})
    return changed.getvalue()


def of_another_log(snapshot):
    other = snapshot.with_name("other")
    with saving(other) as keeper:
        keeper.book(bookings(150, seed=9))
    return snapshot_of(other).read_bytes()


HARM = {
    "empty": (lambda snapshot: b"", "damaged"),
    "cut": (lambda snapshot: snapshot.read_bytes()[:-100], "damaged"),
    "a pickle": (lambda snapshot: b"\x80\x04K\x01.", "damaged"),
    "another version": (lambda it: with_arrays(it, origin=np.zeros(3)), "another version made it"),
    "a part missing": (lambda snapshot: with_arrays(snapshot, corrected=None), "corrected"),
    "nonsense": (lambda snapshot: with_arrays(snapshot, keys=np.zeros(3)), "damaged"),
    "of another log": (of_another_log, "not of this log"),
}


@pytest.mark.parametrize(("harm", "reason"), HARM.values(), ids=HARM)
def test_a_snapshot_of_no_use_is_said_so_and_the_log_read(path, grown, caplog, harm, reason):
    caplog.clear()
    snapshot_of(path).write_bytes(harm(snapshot_of(path)))
    with read_back() as sizes, saving(path) as keeper:
        assert not snapshot_of(path).exists()
        assert_same(keeper, grown)
        assert sum(sizes) == len(keeper.log)
    assert [reason in record.message for record in caplog.records] == [True]
    with read_back() as sizes, saving(path) as keeper:  # it was made anew
        assert_same(keeper, grown)
        assert sizes == []


def test_a_flipped_byte_in_a_snapshot_does_no_harm(path, grown):
    whole = snapshot_of(path).read_bytes()
    rng = random.Random(0)
    directory = whole.index(b"PK\1\2")  # in which each name comes 13 bytes after a length
    places = [directory + at.start() - 13 for at in re.finditer(rb"\w+\.npy", whole[directory:])]
    assert len(places) > 15
    for place in [*places, *(rng.randrange(len(whole)) for _ in range(9))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        snapshot_of(path).write_bytes(flipped)
        with bookkeeping(path) as keeper:  # that makes no new one
            assert_same(keeper, grown)


def test_a_snapshot_of_other_tokens_is_not_used(path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(bookkeep, "words", str.split)  # as up to version 0.4
        with bookkeeping(path, unsaved=1) as keeper:
            keeper.book([booking(text="RENT", account="1"), booking(text="Food")])
    assert snapshot_of(path).exists()
    with bookkeeping(path) as keeper:
        assert "another version made it" in caplog.text
        asked = [booking("B", "rent"), booking("B", "food")]
        assert keeper.books.predict(asked) == ["1", "3115"]
        assert_same(keeper, books_of(path), asked)


def test_a_snapshot_is_made_while_the_log_grows(path):
    with saving(path) as keeper:
        for batch in batches_of(bookings(1030), 10):
            keeper.book(batch)
        settled(keeper)
        saved = snapshot_of(path).read_bytes()
    snapshot_of(path).write_bytes(saved)  # as if it had been killed
    with read_back() as sizes, saving(path) as keeper:
        assert 0 < sum(sizes) <= UNSAVED + 10
        assert_same(keeper, books_of(path))


@pytest.mark.parametrize(
    "owner", [(np, "savez"), (os, "open"), (threading.Thread, "start")], ids=str
)
def test_a_snapshot_that_cannot_be_made_keeps_nothing_from_working(
    path, monkeypatch, caplog, owner
):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with saving(path) as keeper:
        keeper.book([booking("mine")])
        with monkeypatch.context() as patch:
            patch.setattr(*owner, fail)
            keeper.book(bookings(150))
            settled(keeper)
        assert "No space left" in caplog.text
        assert [*path.parent.iterdir()] == [path]
        keeper.book(bookings(150))
        assert keeper.forget("mine") == 1
        assert_same(keeper, books_of(path))
    with saving(path) as keeper:
        keeper.book(bookings(150))
    assert snapshot_of(path).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("moment", ["before", "left unfinished", "under way", "just begun"])
def test_what_was_forgotten_is_in_no_snapshot(path, monkeypatch, moment):
    samples = [booking(company="mine", text=f"shop{i}", account="its own") for i in range(150)]
    let_go, checksum = threading.Event(), Log.checksum

    def held(log, size):
        assert let_go.wait(30)
        return checksum(log, size)

    def begin(make):
        """Has a snapshot begin after forget has seen that none is under way."""
        monkeypatch.setattr(keeper, "change", change)
        monkeypatch.setattr(Log, "checksum", held)
        keeper.book(samples)
        threading.Timer(0.3, let_go.set).start()
        return change(make)

    with saving(path) as keeper:
        change = keeper.change
        if moment == "under way":
            monkeypatch.setattr(Log, "checksum", held)
            threading.Timer(0.3, let_go.set).start()
        keeper.book(samples[:1] if moment == "just begun" else samples)
        if moment == "just begun":
            monkeypatch.setattr(keeper, "change", begin)
        elif moment != "under way":
            settled(keeper)
            assert b"mine" in snapshot_of(path).read_bytes()
        if moment == "left unfinished":
            snapshot_of(path).rename(path.with_name(f".{path.name}.snapshot.npz"))
        assert keeper.forget("mine") in (150, 151)
        assert [*path.parent.iterdir()] == [path]
        keeper.book(bookings(300))
        settled(keeper)
    with saving(path) as keeper:
        keeper.book(bookings(300, seed=2))
    assert snapshot_of(path).exists()
    for file in path.parent.iterdir():
        assert b"mine" not in file.read_bytes()
        assert b"its own" not in file.read_bytes()


# ----------------------------------------------------------------------------------------- Writer


@pytest.fixture
def writing():
    """A writer of no log, what it has done so far, and an event that it waits for at first."""
    done, go_on = [], threading.Event()

    def book(group):
        done.append([len(each.samples) for each in group])
        assert go_on.wait(30)
        for each in group:
            if isinstance(each.key, Exception):
                raise each.key
            each.done.set_result(each.key)

    writer = Writer(book, lambda: None)
    writer.start()
    yield writer, done, go_on
    go_on.set()
    writer.close()


def submit(writer, *works):
    """Has threads submit these, one after the other; what comes of each, as futures."""
    futures = [Future() for _ in works]
    for work, future in zip(works, futures, strict=True):
        before = writer.waiting()

        def wait(work=work, future=future):
            try:
                future.set_result(writer.submit(work))
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=wait).start()
        wait_until(lambda: future.done() or writer.waiting() > before)  # noqa: B023
    return futures


def asking(n=1, key=None):
    return Work(Future(), [booking()] * n, key)


def test_what_waits_is_grouped_by_size_and_key_and_changes_take_their_turn(writing):
    writer, done, go_on = writing
    threading.Thread(target=writer.submit, args=[asking()]).start()
    wait_until(lambda: done)
    change = Work(Future(), [booking()], change=lambda: done.append("change") or 5)
    works = [asking() for _ in range(20)] + [asking(key=key) for key in "aba"]
    fitting = GROUP // LONG
    works += [change, asking(2), asking(LONG + 1), *(asking(LONG) for _ in range(fitting + 1))]
    answers = submit(writer, *works)
    go_on.set()
    assert [each.result(30) for each in answers[22:26]] == ["a", 5, None, None]
    assert [each.result(30) for each in answers[26:]] == [None] * (fitting + 1)
    groups = [[1] * 22, [1], "change", [2, *[LONG] * fitting], [LONG]]
    assert done == [[1], [LONG + 1], *groups]


def test_what_is_short_waits_for_a_part_of_a_long_list_only():
    done, go_on = [], threading.Event()

    def book(group):
        done.append([len(each.samples) for each in group])
        if group[0].key == "long":
            assert go_on.wait(30)
            for _ in range(4):
                writer.pause()
                done.append("part")
        writer.pause()  # what is short has no pauses
        for each in group:
            each.done.set_result(each.key)

    writer = Writer(book, lambda: done.append("after"))
    writer.start()
    threading.Thread(target=writer.submit, args=[asking(LONG + 1, "long")]).start()
    wait_until(lambda: done)
    change = Work(Future(), [booking()], change=lambda: done.append("change"))
    works = [asking(3), asking(LONG - 3), asking(4), change, asking(LONG + 2, "last")]
    answers = submit(writer, *works)
    go_on.set()
    assert [each.result(30) for each in answers] == [None, None, None, None, "last"]
    writer.close()
    parts = [[3, LONG - 3], "part", [4], "part", "change", "part", "part"]
    assert done == [[LONG + 1], *parts, "after", [LONG + 2], "after"]


def test_no_more_wait_than_may_and_a_change_always_may(writing, monkeypatch):
    monkeypatch.setattr(bookkeep, "BACKLOG", 10)
    writer, done, go_on = writing
    threading.Thread(target=writer.submit, args=[asking()]).start()
    wait_until(lambda: done)
    [alone] = submit(writer, asking(20))  # has more than may wait, but is the only one
    with pytest.raises(Busy, match="in a second"):
        writer.submit(asking())
    change = Work(Future(), change=lambda: 5)
    threading.Thread(target=writer.submit, args=[change]).start()
    go_on.set()
    assert (alone.result(30), change.done.result(30)) == (None, 5)
    assert writer.submit(asking()) is None


def test_a_failure_is_that_of_its_group_and_the_writer_goes_on(writing, caplog):
    writer, done, go_on = writing
    threading.Thread(target=writer.submit, args=[asking()]).start()
    wait_until(lambda: done)
    full, other = OSError(28, "No space left on device"), MemoryError()
    works = [asking(key="fine"), asking(key=full), asking(key="after it"), asking(GROUP, other)]
    answers = submit(writer, *works)
    go_on.set()
    assert answers[0].result(30) == "fine"
    for answer in answers[1:3]:
        with pytest.raises(NotStored, match=r"could not be written \(No space left on device\)"):
            answer.result(30)
    with pytest.raises(MemoryError):
        answers[3].result(30)
    assert writer.submit(asking(key="later")) == "later"
    assert writer.failed == 1
    assert "No space left on device" in caplog.text


def test_a_closed_writer_does_what_waits_and_no_more(writing):
    writer, done, go_on = writing
    threading.Thread(target=writer.submit, args=[asking()]).start()
    wait_until(lambda: done)
    answers = submit(writer, *[asking(key=number) for number in range(5)])
    closing = threading.Thread(target=writer.close)
    closing.start()

    # As long as it waits, what is done at once was refused.
    wait_until(lambda: submit(writer, asking())[0].done())
    go_on.set()
    closing.join()
    assert [answer.result(30) for answer in answers] == [0, 1, 2, 3, 4]
    with pytest.raises(NotReady, match="started again"):
        writer.submit(asking())


# ------------------------------------------------------------------------------------------ Books


def assert_true_to_log(keeper):
    """What a keeper says follows from its log; its model is one that learned what counts in it."""
    records, books = scanned(keeper.log.path), keeper.books
    last = {record["corrects"]: record for record in records if "corrects" in record}
    moved = {record["corrects"]: record["now"] for record in records if "now" in record}
    documents, lessons = [], []
    for record in records:
        standing = last.get(record["seq"], record)
        if "sample" in record and "weight" in standing:
            account = standing.get(books.target, record["sample"][books.target])
            lessons.append(Lesson(account, standing["weight"], standing["against"]))
            sample = moved.get(record["seq"], record["sample"])
            documents.append(tokens(sample, books.context))
    alone = Books(books.context, books.target)
    alone.model.learn(documents, lessons)
    now, alone = answers(keeper), answers(alone)
    for name in ("tokens", "sums", "scores"):
        assert now.get(name) == alone.get(name), name
    assert_same(now, books_of(keeper.log.path, books.context, books.target))


def lines_of(keeper):
    return read_lines(keeper.log.path)


def suggested(keeper, sample, top=1):
    [answer] = bookkeep.suggest(keeper.books, [sample], top)
    return answer


def test_a_list_is_predicted_whole_and_learned_in_rounds(keeper):
    for _ in range(10):
        keeper.book([booking(account="1")] * 20)
    keeper.book([booking(text="new", account="2")] * 200)
    keeper.book([booking(text="new", account="2")])
    lines = lines_of(keeper)
    assert [line["predicted"] for line in lines] == [None] * 20 + ["1"] * 380 + ["2"]
    assert [lines[0][key] for key in ("margin", "confidence", "rank")] == [None] * 3
    weights = [line["weight"] for line in lines[200:-1]]
    first, *later = bookkeep.rounds(200)
    assert {*weights[first]} == {1}
    assert all(max(weights[part]) < 1 for part in later)


def test_it_says_what_was_known(keeper):
    known = {
        ("B", "rent May", "> -1000"): "nothing of the company",
        ("A", "food", "> -1000"): "nothing of the text",
        ("A", "new May", "> -1000"): "a word",
        ("A", "rent August", "< 10"): "the first word",
        ("A", "rent August", "> -1000"): "the first word and the amount",
        ("A", "rent May again", "< 10"): "the first two words",
    }
    keeper.book([booking()])
    for sample, expected in known.items():
        assert suggested(keeper, booking(*sample))["record"]["known"] == expected
    keeper.book([booking(*sample) for sample in known])
    assert [line["known"] for line in lines_of(keeper)] == [0, *range(6)]


def test_suggestions_are_the_best_scores_and_their_reasons_add_up(keeper):
    for batch in batches_of(bookings(800), 50):
        keeper.book(batch)
    model = keeper.books.model
    for sample in [*bookings(40, seed=1), booking(text="rent rent nobody knows")]:
        suggestions = suggested(keeper, sample, 20)["suggestions"]
        [score] = scores_of(model, [tokens(sample)])
        accounts = [suggestion["account"] for suggestion in suggestions]
        assert accounts == sorted(score, key=score.get, reverse=True)
        assert accounts[:1] == keeper.books.predict([sample])
        assert [each["over"] for each in suggestions] == [
            accounts[1],
            *[accounts[0]] * (len(score) - 1),
        ]
        confidences = [each["confidence"] for each in suggestions]
        assert confidences == sorted(confidences, reverse=True)
        for each in suggestions:
            weights = [reason["weight"] for reason in each["reasons"]]
            assert weights == sorted(weights, reverse=True)
            assert sum(weights) + each["prior"] == pytest.approx(each["margin"], abs=1e-3)
            difference = score[each["account"]] - score[each["over"]]
            assert each["margin"] == pytest.approx(difference, abs=1e-4)
            said = [(reason["kind"], reason["token"]) for reason in each["reasons"]]
            assert len({*said}) == len(said)
            assert {*said} <= {*bookkeep.wordings(sample)}
            assert "knows" not in {token for _, token in said}


def test_a_reason_is_what_the_word_says_for_one_account_over_the_other(keeper):
    keeper.book([booking(text="rent", account="1")])
    alone = {"account": "1", "over": None, "margin": None, "prior": None, "reasons": []}
    assert suggested(keeper, booking(), 3)["suggestions"] == [alone | {"confidence": None}]
    keeper.forget("A")
    keeper.book([booking(text="rent", account="1"), booking(text="food", account="2")])
    [first, second] = suggested(keeper, booking(text="rent food rent"), 3)["suggestions"]
    assert (first["account"], first["over"], second["account"]) == ("1", "2", "2")
    assert (first["prior"], second["margin"]) == (0, -first["margin"])
    weights = {(reason["kind"], reason["token"]): reason["weight"] for reason in first["reasons"]}
    odds = power(1 / 0.15)
    for kind, times in ((2, 2), (3, 1), (4, 1), (5, 1)):  # the first is of both words
        assert weights[bookkeep.KINDS[kind], "rent"] == pytest.approx(times * odds, abs=1e-4)
    for kind, factor in ((2, 1), (3, 1 / 2)):
        assert weights[bookkeep.KINDS[kind], "food"] == pytest.approx(-odds * factor, abs=1e-4)
    assert (bookkeep.KINDS[6], "rent food") not in weights


def test_without_reasons_suggestions_are_the_same_however_many(keeper):
    keeper.book([booking(account=account) for account in "4213"])  # alike, but for names
    asked = [booking("C", "new"), booking("D", ""), *bookings(200, seed=1)]
    keeper.book(bookings(500))
    for top in (1, 20):
        expected = bookkeep.suggest(keeper.books, asked, top, 0.5)
        for place in (0, 77):
            [alone] = bookkeep.suggest(keeper.books, [asked[place]], top, 0.5)
            for name in ("suggestions", "record"):
                assert alone[name] == expected[place][name]
        for answer in expected:
            for suggestion in answer["suggestions"]:
                del suggestion["prior"], suggestion["reasons"]
        assert bookkeep.suggest(keeper.books, asked, top, 0.5, with_reasons=False) == expected
    assert bookkeep.suggest(keeper.books, [], 3) == []


def test_a_first_list_is_learned_in_parts_and_predicted_by_those_before(books):
    sizes = [[part.stop - part.start for part in bookkeep.parts(*n)] for n in ((200, 0), (7, 3))]
    assert sizes == [[20, 20, 40, 80, 40], [7]]
    assert bookkeep.parts(10_000, 10_000) == [slice(0, 10_000)]
    assert bookkeep.parts(0, 0) == []
    records, _ = books.draft([booking()] * 20 + [booking(account="2")] * 41)
    assert [record["predicted"] for record in records] == [None] * 20 + ["3115"] * 20 + ["2"] * 21
    assert [record["confidence"] for record in records] == [None] * 40 + [0] * 21
    books.undo(records, books.draft([])[1])


@pytest.mark.parametrize("fails", [False, True])
def test_others_are_served_between_the_parts_of_a_long_list(path, fails):
    class Order(Alone):
        def append(self, log, batches):
            if fails and batches[0][0] == "long":
                raise NotStored("the disk is full")
            return super().append(log, batches)

    with bookkeeping(path, order=Order()) as keeper:
        for batch in batches_of(bookings(2000), 100):
            keeper.book(batch)
        long = Future()

        def send():
            try:
                long.set_result(keeper.book([booking(text="new", account="long")] * 2000, "long"))
            except NotStored as error:
                long.set_exception(error)

        threading.Thread(target=send).start()
        wait_until(lambda: keeper.writer.waiting() == 0)
        before = []
        for i in itertools.count():
            [seq] = keeper.book([booking("between", account="b")])
            keeper.correct(seq, "between")
            if i == 2:
                keeper.forget("company1")
            if long.done():
                break
            before.append(seq)
        if fails:
            with pytest.raises(NotStored):
                long.result()
        else:
            seqs = long.result()
            assert sum(seq < seqs.start for seq in before) > 3
            lines = lines_of(keeper)[seqs.start : seqs.stop]
            assert "long" not in {line["predicted"] for line in lines}
            assert keeper.book([line["sample"] for line in lines], "long") == seqs
        assert_same(keeper, books_of(path))


def test_a_key_that_comes_between_the_parts_of_a_long_list_is_that_of_one_batch(path):
    with bookkeeping(path) as keeper:
        keeper.book(bookings(1000))
        with ThreadPoolExecutor() as pool:
            long = pool.submit(keeper.book, bookings(2000), "key")
            wait_until(lambda: keeper.writer.waiting() == 0)
            assert keeper.book([booking()], "key") == range(1000, 1001)
            with pytest.raises(Conflict):
                long.result()
        assert len(lines_of(keeper)) == 1001
        assert_same(keeper, books_of(path))


def test_confidence_is_the_record_of_earlier_predictions_only(keeper):
    who, path, booked = random.Random(1), keeper.log.path, 0
    for batch in batches_of(bookings(600), 60):
        keeper.book([by(who.choice([*bookkeep.SCORE_WEIGHTS]), sample) for sample in batch])
        lines = lines_of(keeper)
        for part in bookkeep.parts(len(batch), booked):
            before = [row for row in judged(path) if row["seq"] < booked + part.start]
            for line in lines[booked:][part][::7]:
                if not any(row["score_weight"] for row in before):
                    assert line["confidence"] is None
                elif line["predicted"]:
                    asked = {key: line[key] for key in ("predicted", "known")}
                    asked["company"] = line["sample"]["CompanyId"]
                    asked["bin"] = bin_of(line["margin"])
                    expected = confidence_by_hand(before, asked)
                    assert line["confidence"] == pytest.approx(expected, abs=1e-4)
        booked += len(batch)
    for seq in range(0, 600, 40):
        keeper.correct(seq, "3001")
    keeper.forget("company3")
    assert_confidence_is_that_of_the_log(keeper, [*bookings(40, seed=1), booking("new")])


def assert_confidence_is_that_of_the_log(keeper, samples):
    """What suggestions say of their confidence is what the log and the formula say."""
    rows = judged(keeper.log.path)
    for sample in samples:
        answer = suggested(keeper, sample)
        [best] = answer["suggestions"]
        books = keeper.books
        [made] = books.model.assess([books.tokens(sample)], [])
        asked = {
            "company": sample["CompanyId"],
            "predicted": best["account"],
            "bin": bin_of(made.margin),
            "known": bookkeep.SPECIFICITY.index(answer["record"]["known"]),
        }
        measured = any(row["score_weight"] for row in rows)
        expected = confidence_by_hand(rows, asked) if measured else None
        assert best["confidence"] == pytest.approx(expected, abs=1e-4)
        assert answer["record"]["own"] == tally_by_hand(own_by_hand(rows, asked, "predicted"))


def test_of_a_company_without_a_booking_it_knows_that_it_knows_nothing(keeper):
    for turn in range(60):
        keeper.book([booking(f"company{turn}", "rent", account=str(turn))])
        keeper.book([booking(f"company{turn}", "rent", account=str(turn))] * 5)
    [new] = suggested(keeper, booking("new", "rent"))["suggestions"]
    [old] = suggested(keeper, booking("company7", "rent"))["suggestions"]
    assert new["confidence"] < 0.1
    assert (old["account"], old["confidence"] > 0.8) == ("7", True)


def test_one_in_sixteen_is_to_be_checked_whatever_recurs(keeper):
    keeper.book([booking()])

    def drawn(samples):
        return [
            answer["check"] for answer in bookkeep.suggest(keeper.books, samples, 1, None, False)
        ]

    many = [booking(text=f"rent {i}") for i in range(1600)]
    assert 60 < sum(drawn(many)) < 140
    assert drawn(many) == drawn(many)
    # The same again: by its place in the request, and by how many bookings its company has.
    assert 0 < sum(drawn([booking()] * 200)) < 40
    found = []
    others = drawn([booking("B")] * 50)
    for _ in range(100):
        found += drawn([booking()])
        keeper.book([booking()])
    assert 0 < sum(found) < 25
    assert drawn([booking("B")] * 50) == others


def test_what_was_booked_unseen_proves_nothing(keeper):
    keeper.book(bookings(200))
    keeper.book(bookings(200, seed=1))
    before = books_of(keeper.log.path)
    unseen = [by("suggestion", sample) for sample in bookings(50, seed=3)]
    [first, *_, new] = keeper.book([*unseen, by("suggestion", account="new")])
    assert keeper.books.predict(bookings(90, seed=2)) == before.predict(bookings(90, seed=2))
    asked = bookings(20, seed=2)
    pair = [bookkeep.suggest(books, asked, 3) for books in (keeper.books, before)]
    for now, then in zip(*pair, strict=True):  # what is to be checked depends on how many there are
        assert now | {"check": 0} == then | {"check": 0}
    then, now = (views.report(books, 1000) for books in (before, keeper.books))
    assert now == then | {"unseen": 51}
    # A person looks at two of them: from then on they are learned, but never scored.
    assert keeper.correct(first, "7") == unseen[0]["AccountNumber"]
    assert keeper.correct(new, "new") == "new"
    assert keeper.books.predict([booking()]) == ["new"]
    assert suggested(keeper, unseen[0])["suggestions"][0]["account"] == "7"
    assert views.report(keeper.books, 1000) == then | {"unseen": 49}
    assert_true_to_log(keeper)
    assert keeper.correct(new, "new") == "new"  # which has been looked at by now
    assert len(lines_of(keeper)) == 453


def test_a_mistake_that_was_corrected_is_not_repeated(keeper):
    for batch in batches_of(bookings(300), 30):
        keeper.book(batch)
    wrong = booking(text="new supplier", account="3001")
    [seq] = keeper.book([wrong])
    assert keeper.books.predict([wrong]) == ["3001"]
    keeper.correct(seq, "6700")
    assert keeper.books.predict([wrong]) == ["6700"]


def test_who_corrects_a_correction_back_leaves_no_trace_in_the_confidence(keeper):
    def counted():
        return [array.tolist() for array in keeper.books.calibration.state().values()][:1]

    for batch in batches_of(bookings(300), 50):
        keeper.book(batch)
    before = counted()
    for line in lines_of(keeper)[60::20]:
        keeper.correct(line["seq"], "9999")
        assert counted() != before
        keeper.correct(line["seq"], line["sample"]["AccountNumber"])
    assert counted() == before


@given(st.data())
@settings(max_examples=10)
def test_any_mix_of_bookings_corrections_and_forgetting_is_exact(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("mix") / "log.jsonl"
    unsaved = data.draw(st.sampled_from([1, 10_000]))
    keeper = Bookkeeper(Log(path), unsaved)
    try:
        for _ in range(data.draw(st.integers(1, 20))):
            match data.draw(st.sampled_from(["book", "book", "correct", "forget", "restart"])):
                case "book":
                    seed = data.draw(st.integers(0, 9))
                    who = st.sampled_from(["person", "check", "suggestion"])
                    booked = bookings(data.draw(st.integers(0, 30)), seed)
                    keeper.book([by(data.draw(who), sample) for sample in booked])
                case "correct":
                    seq = data.draw(st.integers(0, 60))
                    with suppress(NotFound):
                        keeper.correct(seq, data.draw(st.sampled_from(["3001", "3005", "new"])))
                case "forget":
                    with suppress(NotFound):
                        keeper.forget(f"company{data.draw(st.integers(0, 4))}")
                case "restart":
                    keeper.close()
                    keeper = Bookkeeper(Log(path), unsaved)
        assert_true_to_log(keeper)
        if keeper.books.model.n_classes:
            assert_confidence_is_that_of_the_log(keeper, [booking("company1")])
    finally:
        keeper.close()


SENSELESS = [  # values in a record, and what is wrong with that
    ({"weight": 0.83}, "no booking can have that weight"),
    ({"weight": 2}, "no booking can have that weight"),
    ({"weight": "1"}, ""),
    ({"weight": None}, ""),
    ({"weight": 1 / 128}, "no booking can have that weight"),
    ({"against": None}, "a version before 0.5 wrote it"),
    ({"against": {"1": 0.5}}, "a version before 0.5 wrote it"),
    ({"against": [1]}, ""),
    ({"against": ["1", "1"]}, "no booking can count against these"),
    ({"against": ["1", "2", "3"]}, "no booking can count against these"),
    ({"against": [""]}, "AccountNumber is empty"),
    ({"margin": 10**400}, ""),
    ({"margin": []}, ""),
    ({"confidence": ""}, ""),
    ({"confidence": 1.5}, "no prediction can have that confidence"),
    ({"rank": 2.5}, "no account can have that rank"),
    ({"rank": 0}, "no account can have that rank"),
    ({"known": 6}, "no prediction can have that known"),
    ({"known": "1"}, "no prediction can have that known"),
    ({"known": None}, "no prediction can have that known"),
    ({"predicted": ["1"]}, "predicted is no account"),
    ({"sample": by("robot")}, "BookedBy must be one of person, check, suggestion"),
    ({"sample": by("suggestion")}, "what was booked unseen counts nothing"),
    ({"sample": booking(account="")}, "AccountNumber is empty"),
    ({"sample": None}, "must be an object of strings"),
    ({"sample": {"CompanyId": "A"}}, "BankEntryText is missing"),
    ({"corrects": 0, "sample": 5}, "'AccountNumber' is missing"),
]
SENSELESS_UNSEEN = [
    ({"weight": 0.5}, "what was booked unseen counts nothing"),
    ({"reviewed": True}, "what was booked unseen counts nothing"),
    ({"sample": by("person")}, "'weight' is missing"),
]
SENSELESS_CORRECTION = [
    ({"corrects": 4}, "it corrects no booking before it"),
    ({"corrects": 9}, "it corrects no booking before it"),
    ({"corrects": "0"}, "it corrects no booking before it"),
    ({"corrects": 0.0}, "it corrects no booking before it"),
    ({"corrects": -1}, "it corrects no booking before it"),
    ({"AccountNumber": ""}, "AccountNumber is empty"),
    ({"now": {"CompanyId": "A"}}, "BankEntryText is missing"),
    ({"now": "rent"}, "must be an object of strings"),
    ({"weight": 2}, "no booking can have that weight"),
]


def test_what_this_version_cannot_have_written_is_named_with_its_line(keeper):
    keeper.book([booking(account="1")])
    keeper.book([booking(account="1"), booking(account="9"), by("suggestion")])
    keeper.correct(1, "9")
    records = scanned(keeper.log.path)
    assert [*check_records(records, 1)] == []
    for seq, table in ((2, SENSELESS), (3, SENSELESS_UNSEEN), (4, SENSELESS_CORRECTION)):
        for values, reason in table:
            damaged = [*records[:seq], records[seq] | values, *records[seq + 1 :]]
            found = [*check_records(damaged, 1)]
            assert [damage.line for damage in found] == [seq + 1], values
            assert reason in found[0].reason
    del records[2]["known"]
    [damage] = check_records(records, 11)
    assert damage[:2] == (13, "a version before 0.5 wrote it")


@pytest.mark.parametrize(
    ("line", "damage"), [(1, {"weight": "1"}), (1, {"AccountNumber": []}), (4, {"corrects": 2})]
)
def test_a_start_refuses_a_line_that_makes_no_sense(path, line, damage):
    with bookkeeping(path) as keeper:
        keeper.book([booking(), booking()])
        keeper.correct(1, "1")
        keeper.correct(0, "1")  # line 3 is no booking to correct
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], changed(lines[3], **damage)]))
    whole, log = path.read_bytes(), Log(path)
    with pytest.raises(LogError, match=rf"is damaged, line {line}: .* relearn .*log.jsonl NEW"):
        Bookkeeper(log)
    log.close()
    assert path.read_bytes() == whole


# ------------------------------------------------------------------------------------- Bookkeeper


@contextmanager
def raising(owner, name, error):
    """Inside, this function raises that."""

    def fail(*_, **__):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield


def test_batches_from_many_threads_are_each_booked_once_and_whole(keeper):
    batches, ranges = batches_of(bookings(900), 3), []

    def send(mine):
        for batch in mine:
            ranges.append((keeper.book(batch), batch))

    threads = [threading.Thread(target=send, args=[batches[i::8]]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = lines_of(keeper)
    assert len(lines) == 900
    for numbers, batch in ranges:
        assert [lines[number]["sample"] for number in numbers] == batch
        assert [lines[number]["left"] for number in numbers] == [2, 1, 0]
    assert_true_to_log(keeper)


def test_bookings_that_wait_together_are_one_batch_with_one_fsync(keeper, tmp_path):
    batches = batches_of(bookings(400), 30)
    with bookkeeping(tmp_path / "other.jsonl") as other:
        other.book(batches[0])
        other.book(list(itertools.chain(*batches[1:])))
        calls = [partial(keeper.book, batch, f"key{i}") for i, batch in enumerate(batches)]
        with held_at_the_disk(calls) as fsyncs:
            pass
        assert len(fsyncs) == 2
        assert_same(keeper.books, other.books)
        places = dict.fromkeys([*bookkeep.PLACE, "crc"])
        assert [line | places for line in lines_of(keeper)] == [
            line | places for line in lines_of(other)
        ]
    assert [line["batch"] for line in lines_of(keeper)[28:32]] == [*["key0"] * 2, *["key1"] * 2]


def test_it_answers_while_a_batch_is_on_its_way_to_the_disk(keeper):
    keeper.book([booking(account="1")])
    keeper.book([booking(account="1")])
    with held_at_the_disk([partial(keeper.book, [booking(account="2")] * 500)]):
        assert keeper.books.predict([booking()]) == ["2"]  # learned, not counted
        assert bookkeep.metrics(keeper.books, 10) == {"precision": 1, "recall": 1}
        assert bookkeep.health(keeper)["samples"] == 2
    assert keeper.books.predict([booking()]) == ["2"]


def test_answers_stay_right_while_tables_grow_and_between_rounds(keeper, monkeypatch):
    """No more is learned at once than others can wait for, and nothing without the lock."""
    answers, sizes, done = [], [], threading.Event()
    asked = [booking(text=f"shop{i}") for i in range(7)]
    keeper.book([booking(text=f"shop{i}", account=str(i)) for i in range(7)] * 2)

    def watch(owner, name):
        change = getattr(owner, name)

        def watched(self, *arguments, **more):
            assert keeper.books.lock.locked()
            sizes.append(len(arguments[0]) if owner is bookkeep.NaiveBayes else 1)
            return change(self, *arguments, **more)

        monkeypatch.setattr(owner, name, watched)

    watch(bookkeep.NaiveBayes, "learn")
    watch(bookkeep.Calibration, "add")
    for name in ("append", "correct", "forget"):
        watch(bookkeep.History, name)

    def ask():
        while not done.is_set():
            answers.append(keeper.books.predict(asked) + keeper.books.predict(asked[:1]))

    thread = threading.Thread(target=ask)
    thread.start()
    for seed in range(3):
        keeper.book(bookings(1500, seed))
    keeper.correct(50, "new")
    keeper.forget("company2")
    done.set()
    thread.join()
    monkeypatch.undo()
    assert max(sizes) <= bookkeep.CHUNK
    assert {*map(tuple, answers)} == {(*"0123456", "0")}
    assert_true_to_log(keeper)


CHANGES = {
    "a list": lambda keeper: keeper.book(bookings(100, seed=1)),
    "a list with a key": lambda keeper: keeper.book(bookings(100, seed=1), "mine"),
    "a correction": lambda keeper: keeper.correct(3, "new"),
    "a company": lambda keeper: keeper.forget("company1"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["fsync", "pwrite"])
def test_what_cannot_be_written_is_not_done_and_can_be_asked_for_again(keeper, change, name):
    keeper.book(bookings(50))
    keeper.book(bookings(50, seed=2))
    before, log = books_of(keeper.log.path), keeper.log.path.read_bytes()
    if (change, name) == (CHANGES["a company"], "pwrite"):
        return  # by then it is noted that it is to be forgotten: see the next
    full = OSError(28, "No space left on device")
    with raising(os, name, full), pytest.raises(NotStored, match="No space"):
        change(keeper)
    assert_same(keeper.books, before)
    assert keeper.log.path.read_bytes() == log
    assert prometheus.gauges(keeper)["failed_writes_total"][1] == 1
    assert not [*keeper.log.path.parent.glob("*forgetting*")]
    assert change(keeper)
    assert_true_to_log(keeper)


def test_a_batch_that_fails_half_way_is_not_learned(keeper):
    keeper.book(bookings(100))
    weigh, calls = bookkeep.NaiveBayes.weigh, []

    def broken(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return weigh(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bookkeep.NaiveBayes, "weigh", broken)
        with pytest.raises(MemoryError):
            keeper.book(bookings(200, seed=1))
    assert len(calls) == 2
    assert_true_to_log(keeper)
    assert keeper.book(bookings(200, seed=1)) == range(100, 300)


@pytest.mark.parametrize(
    ("owner", "name", "change"),
    [
        (bookkeep.NaiveBayes, "learn", "a list"),
        (bookkeep.Calibration, "add", "a list"),
        (bookkeep.History, "append", "a list"),
        (bookkeep.History, "correct", "a correction"),
        (bookkeep.NaiveBayes, "learn", "a correction"),
        (bookkeep.History, "forget", "a company"),
        (Log, "empty", "a company"),
        (Log, "sync", "a company"),
        (Log, "finish_forgetting", "a company"),
    ],
)
def test_what_has_lost_step_with_the_log_is_not_used_and_a_start_mends_it(
    path, owner, name, change
):
    with bookkeeping(path, unsaved=1) as keeper:
        keeper.book(bookings(50))
        with raising(owner, name, MemoryError()), pytest.raises((MemoryError, NotReady)):
            CHANGES[change](keeper)
        for ask in (*CHANGES.values(), bookkeep.health):
            with pytest.raises(NotReady, match="started again"):
                ask(keeper)
        assert len(keeper.books.predict(bookings(9))) == 9
    with bookkeeping(path) as keeper:
        assert_true_to_log(keeper)
        known = {*keeper.books.history.companies}
        assert known == {f"company{i}" for i in range(5) if i != 1 or change != "a company"}
        assert keeper.book([booking()]) == range(len(keeper.log) - 1, len(keeper.log))


def test_a_named_batch_is_booked_once_by_many_threads_at_once(keeper):
    answers = []

    def send(account):
        answers.append(answer_of(keeper, [booking(account=account)], "mine"))

    with held_at_the_disk([partial(send, account) for account in "111111191911"]):
        pass
    assert Counter(answers) == {range(0, 1): 10, Conflict: 2}
    assert len(lines_of(keeper)) == 1


def test_what_cannot_be_read_back_fails_alone(keeper, caplog):
    answers = {}

    def send(key):
        answers[key] = answer_of(keeper, [booking()], key)

    keeper.book([booking()], "damaged")
    path = keeper.log.path
    path.write_bytes(path.read_bytes().replace(b"rent", b"Rent"))
    with held_at_the_disk([partial(send, key) for key in ("a", "damaged", "b")]):
        pass
    assert answers == {"a": range(1, 2), "damaged": NotStored, "b": range(2, 3)}
    with pytest.raises(NotStored, match="line 1 of the log could not be read"):
        keeper.correct(0, "1")
    broken = OSError(5, "Input/output error")
    with raising(os, "pread", broken), pytest.raises(NotStored, match=r"line 2 .*output"):
        keeper.correct(1, "1")
    assert "line 2 of the log could not be read" in caplog.text
    assert keeper.book([booking()]) == range(3, 4)


def test_a_company_that_is_forgotten_leaves_its_places_and_no_word(keeper):
    samples, path = bookings(600), keeper.log.path
    mine = [seq for seq, sample in enumerate(samples) if sample["CompanyId"] == "company1"]
    other = next(seq for seq in range(600) if seq not in mine)
    for number, batch in enumerate(batches_of(samples, 50)):
        keeper.book(batch, f"key{number}")
    for number, seq in enumerate((mine[0], other, mine[5], mine[0])):
        keeper.correct(seq, f"account{number}")
    before = lines_of(keeper)
    assert keeper.forget("company1") == len(mine) > 50
    for line, then in zip(lines_of(keeper), before, strict=True):
        if then.get("corrects", then["seq"]) in mine:
            assert line == {key: then[key] for key in bookkeep.PLACE} | {"crc": line["crc"]}
        else:
            assert line == then
    assert re.findall("company1|account[0-9]", path.read_text()) == ["account1"]
    assert_true_to_log(keeper)
    for gone in (
        partial(keeper.forget, "company1"),
        partial(views.report, keeper.books, 10, "company1"),
        partial(keeper.correct, mine[1], "1"),
    ):
        with pytest.raises(NotFound):
            gone()
    # A batch that comes again brings nothing back.
    with pytest.raises(Conflict, match="were forgotten"):
        keeper.book(samples[:50], "key0")
    assert keeper.book([booking(company="company1")]) == range(604, 605)
    assert keeper.forget("company1") == 1


def after_each_step(monkeypatch, do):
    """Has the thread that forgets a company do this after each step of it."""
    change, within = Bookkeeper.change, []

    def changed(keeper, make):
        made = change(keeper, make)
        if not within:
            within.append(True)
            do()
            within.clear()
        return made

    monkeypatch.setattr(Bookkeeper, "change", changed)


def test_others_are_served_between_the_steps_of_forgetting(keeper, monkeypatch):
    samples, steps = bookings(3000) + [booking("company1")] * 2000, itertools.count()
    mine = [seq for seq, sample in enumerate(samples) if sample["CompanyId"] == "company1"]
    other = next(seq for seq in range(3000) if seq not in mine)

    def ask():
        """What others ask between two steps, and what they get."""
        step = next(steps)
        keeper.book([booking("company1", f"late {step}")])
        keeper.book([booking("B", f"fee {step}", account="new")])
        assert keeper.correct(other, str(step)) != str(step)
        assert keeper.books.predict([booking("B", "fee")]) == ["new"]
        with pytest.raises(NotFound):
            keeper.correct(mine[0], "3001")
        assert keeper.book([booking("C")], "kept") == kept

    for number, batch in enumerate(batches_of(samples, 500)):
        keeper.book(batch, f"batch{number}")
    keeper.correct(mine[3], "3001")
    kept = keeper.book([booking("C")], "kept")
    with monkeypatch.context() as patch:
        after_each_step(patch, ask)
        assert keeper.forget("company1") == len(mine)
    assert keeper.books.history.size("company1") == next(steps) > 2  # booked after it began
    assert_true_to_log(keeper)


def test_companies_are_forgotten_one_after_the_other(keeper, monkeypatch):
    start, finish, steps = Log.start_forgetting, Log.finish_forgetting, []

    def started(*arguments):
        steps.append("start")
        start(*arguments)
        time.sleep(0.05)

    def finished(log):
        finish(log)
        steps.append("finish")

    monkeypatch.setattr(Log, "start_forgetting", started)
    monkeypatch.setattr(Log, "finish_forgetting", finished)
    keeper.book([booking(company) for company in "ABC"])
    forgetting = [threading.Thread(target=keeper.forget, args=[name]) for name in "ABC"]
    for thread in forgetting:
        thread.start()
    for thread in forgetting:
        thread.join()
    assert steps == ["start", "finish"] * 3
    assert bookkeep.health(keeper)["samples"] == 0


def test_a_stop_while_a_company_is_forgotten_leaves_the_rest_to_the_next_start(path, monkeypatch):
    keeper = Bookkeeper(Log(path))
    closing = threading.Thread(target=keeper.close)

    def is_closed():
        with suppress(NotReady):
            return keeper.correct(0, "3") is None
        return True

    keeper.book([booking("B"), *[booking()] * 2000])
    with monkeypatch.context() as patch:
        after_each_step(patch, lambda: closing.start() or wait_until(is_closed))
        with pytest.raises(NotReady, match="the next start forgets the rest"):
            keeper.forget("A")
    closing.join()
    assert b'"A"' in path.read_bytes()
    with bookkeeping(path) as keeper:
        assert bookkeep.health(keeper)["samples"] == 1
        assert b'"A"' not in path.read_bytes()
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        assert_true_to_log(keeper)


def test_what_is_scored_in_a_long_list_is_counted_in_full(keeper):
    keeper.book([booking()])
    keeper.book([booking()] * 300)
    assert keeper.books.counters["scored"] == keeper.books.counters["scored_right"] == 300


def test_when_all_is_forgotten_there_is_no_model(keeper):
    keeper.book([booking()])
    keeper.book([booking()])
    assert keeper.forget("A") == 2
    for ask in (keeper.books.predict, lambda samples: bookkeep.suggest(keeper.books, samples, 1)):
        with pytest.raises(NotReady, match="no model"):
            ask([booking()])
    with pytest.raises(NotReady, match="nothing has been predicted"):
        bookkeep.metrics(keeper.books, 1)
    health = bookkeep.health(keeper)
    assert [health[key] for key in ("samples", "accounts", "companies", "tokens")] == [0] * 4
    assert keeper.book([booking(account="2")]) == range(2, 3)
    assert lines_of(keeper)[2]["predicted"] is None
    assert keeper.books.predict([booking()]) == ["2"]


def numbered(id, *more, **others):
    """A booking with an id."""
    return booking(*more, **others) | {"Id": id}


def sent(service, samples, **headers):
    """How many of these samples were booked, known and corrected."""
    status, _, answer = service.ask("POST", "/sample", samples, headers=headers)
    assert (status, answer["received"]) == (200, len(samples))
    return tuple(answer[name] for name in ("booked", "known", "corrected"))


def test_a_booking_with_an_id_is_booked_once_and_then_as_it_is_sent_last(serve, tmp_path):
    service, path = serve(), tmp_path / "log.jsonl"
    export = [numbered(f"{i}", text=f"shop{i % 3}", account=f"{i % 3}") for i in range(30)]
    assert sent(service, export[:20]) == (20, 0, 0)
    before = path.read_bytes()
    assert sent(service, export[:20]) == (0, 20, 0)
    assert service.post("/sample", export[:1])[1]["first"] is None
    assert path.read_bytes() == before
    assert sent(service, export[10:]) == (10, 10, 0)
    # Another company's is another booking.
    assert sent(service, [numbered("1", "B")]) == (1, 0, 0)

    others = [
        *(numbered("1", text="shop1", account="9"), numbered("2", text="taxi", account="2")),
        *(numbered("3", amount="< 10", text="shop0", account="8"), export[4], numbered("new")),
    ]
    assert sent(service, others) == (1, 1, 3)
    for sample in others:
        [found] = service.get(f"/bookings?company=A&Id={sample['Id']}")[1]["bookings"]
        assert (found["sample"], found["account"]) == (sample, sample["AccountNumber"])
        assert found == service.get(f"/bookings/{found['seq']}")[1]
    before = export[1]["AccountNumber"]
    [found] = service.get("/bookings?company=A&Id=1")[1]["bookings"]
    assert found["corrected"] == {"from": before}
    assert service.get("/health")[1]["samples"] == 32
    assert sent(service, others) == (0, 5, 0)

    # Of several in a list, the last counts.
    assert sent(service, [numbered("twice", text="one"), numbered("twice", text="two")]) == (
        1,
        1,
        0,
    )
    [found] = service.get("/bookings?company=A&Id=twice")[1]["bookings"]
    assert found["sample"]["BankEntryText"] == "two"
    answer = {"seq": found["seq"], "AccountNumber": "7", "before": "3115"}
    correction = {"CompanyId": "A", "Id": "twice", "AccountNumber": "7"}
    assert service.post("/correct", correction) == (200, answer)
    for where in ("/bookings?company=A&Id=none", "/bookings?company=C&Id=1"):
        assert service.get(where)[0] == 404
    status, refusal = service.get("/bookings?Id=1")
    assert (status, refusal["error"][:13]) == (404, "say whose Id ")
    assert service.post("/correct", correction | {"Id": "none"})[0] == 404
    for wrong in ("", "x" * 101):
        status, refusal = service.post("/sample", [numbered(wrong)])
        assert (status, refusal["error"][:12]) == (400, "sample 0: Id")

    everything = service.get("/bookings?limit=500")
    service.stop(signal.SIGKILL)
    service = serve()
    assert service.get("/bookings?limit=500") == everything
    assert sent(service, others) == (0, 5, 0)
    # Forgetting forgets ids.
    assert service.ask("DELETE", "/company/A")[0] == 200
    assert service.get("/bookings?company=A&Id=1")[0] == 404
    assert sent(service, export) == (30, 0, 0)


def test_a_list_may_have_some_with_an_id_and_some_under_its_key(serve):
    service, key = serve(), {"Idempotency-Key": "june"}
    mixed = [numbered("1"), booking(), numbered("2"), booking(text="food")]
    assert sent(service, mixed, **key) == (4, 0, 0)
    assert sent(service, mixed, **key) == (4, 0, 0)  # the answer that it had
    assert service.get("/health")[1]["lines"] == 4
    assert sent(service, mixed[1:], **key) == (4, 0, 0)
    assert sent(service, [*mixed, numbered("3")], **key) == (1, 4, 0)
    others = [numbered("4"), booking("other")]
    assert service.ask("POST", "/sample", others, headers=key)[0] == 422
    # The ids alone need no key.
    assert sent(service, [numbered("4"), numbered("5")], **key) == (2, 0, 0)
    assert sent(service, mixed, **key) == (4, 0, 0)
    assert service.get("/health")[1]["lines"] == 7


def test_only_who_has_looked_changes_what_has_an_id(keeper):
    def lines(*samples):
        return [*keeper.book([*samples])]

    unseen = by("suggestion", numbered("1", account="1"))
    [seq] = lines(unseen)
    assert lines(unseen) == lines(unseen | {"AccountNumber": "2"}) == []
    assert lines(numbered("1", account="1")) == []  # which may be but a copy
    assert not views.booking(keeper, seq)["reviewed"]
    assert lines(by("person", numbered("1", account="1"))) == [1]
    assert views.booking(keeper, seq)["reviewed"]
    assert keeper.books.predict([booking()]) == ["1"]
    assert lines(by("person", numbered("1", account="1"))) == []
    assert lines(unseen | {"BankEntryText": "x"}) == []
    assert lines(numbered("1", account="2")) == [2]
    assert_true_to_log(keeper)


def test_a_booking_that_moved_is_weighed_and_learned_as_if_the_one_before_had_never_been(path):
    samples = [*bookings(300), numbered("1", text="a new supplier", account="new")]
    moved = numbered("1", text="an old supplier", account="new")
    with bookkeeping(path) as keeper:
        for batch in batches_of(samples, 43):
            keeper.book(batch)
        keeper.book([moved])
        now = lines_of(keeper)[-1]
        assert_true_to_log(keeper)
        model, document = keeper.books.model, keeper.books.tokens(moved)
        model.learn([document], [Lesson("new", now["weight"], now["against"])], -1)
        assert "new" not in {model.names[i] for i in model.class_counts.nonzero()[0]}
        [lesson] = model.weigh([document], ["new"])
        assert (lesson.weight, lesson.against) == (now["weight"], now["against"])


def test_what_has_an_id_is_booked_once_however_many_send_it_at_once(keeper):
    export = [numbered(f"{i}", text=f"shop{i % 7}", account=f"{i % 7}") for i in range(1000)]
    with ThreadPoolExecutor(20) as pool:  # long lists are booked in parts, short ones between
        sizes = [1, 10, 100, 1000]
        parts = [part for size in sizes for part in batches_of(export, size)[:40]]
        random.Random(1).shuffle(parts)
        stored = [*pool.map(keeper.book, parts)]
    assert sum(map(len, stored)) == len(lines_of(keeper)) == 1000
    assert {line["sample"]["Id"] for line in lines_of(keeper)} == {each["Id"] for each in export}
    assert_true_to_log(keeper)


def test_others_are_served_while_a_long_list_changes_what_has_an_id(path):
    export = [numbered(f"{i}", f"company{i % 3}", f"shop{i % 50}", "-1") for i in range(1500)]
    moved = [each | {"BankEntryText": f"new {each['BankEntryText']}"} for each in export]
    with bookkeeping(path) as keeper, ThreadPoolExecutor() as pool:
        keeper.book(export)
        long = pool.submit(keeper.book, moved)
        wait_until(lambda: keeper.writer.waiting() == 0)
        for i in itertools.count():
            [seq] = keeper.book([booking("between", account="b")])
            if i == 1:
                keeper.correct(keeper.seq_of("company1", "100"), "corrected")
                assert keeper.forget("company2") == 500
            if long.done():
                break
            before = seq
        assert len(export) < before < long.result().start
        assert keeper.book(moved) == range(len(keeper.log), len(keeper.log))
        assert len(lines_of(keeper)) == len(export) + 1 + i + 1 + len(moved)
        assert_true_to_log(keeper)


def test_who_books_the_same_ids_meanwhile_delays_a_long_list_but_once(keeper, monkeypatch):
    export = [numbered(f"{i}", text=f"shop{i % 7}") for i in range(300)]
    draft, others = Books.draft, []

    def overtaken(books, samples, pause):
        if len(samples) > LONG and len(others) < 5:
            others.append(threading.Thread(target=keeper.book, args=[export[-1 - len(others) :]]))
            others[-1].start()
            wait_until(keeper.writer.waiting)
        return draft(books, samples, pause)

    monkeypatch.setattr(Books, "draft", overtaken)
    keeper.book([booking()])
    assert len(keeper.book(export)) == 299
    assert len(others) == 2
    for thread in others:
        thread.join()
    assert len(lines_of(keeper)) == 301
    assert_true_to_log(keeper)


def test_what_cannot_be_stored_leaves_no_id_and_no_change(path):
    with bookkeeping(path) as keeper:
        keeper.book([numbered("1", account="1"), numbered("2", account="2")])
        before = answers(keeper)
        full = OSError(28, "No space left on device")
        with raising(Log, "write", full), pytest.raises(NotStored):
            keeper.book([numbered("1", text="x"), numbered("2", account="3"), numbered("3")])
        assert_same(keeper, before)
        assert [keeper.find("A", id) is None for id in "123"] == [False, False, True]
        assert len(keeper.book([numbered("1", text="x"), numbered("3")])) == 2


def test_a_log_with_ids_is_learned_anew_with_all_that_was_changed(path, capsys):
    new = path.with_name("new.jsonl")
    export = [numbered(f"{i}", text=f"shop{i % 3}", account=f"{i % 3}") for i in range(30)]
    with bookkeeping(path) as keeper:
        keeper.book([*export, booking()])
        moved = [numbered(f"{i}", text="new", account="9") for i in range(0, 30, 7)]
        keeper.book([*moved, numbered("3", text="shop0", account="8"), numbered("new")])
        keeper.correct(keeper.seq_of("A", "5"), "7")
        before = [views.booking(keeper, seq) for seq in (0, 3, 5, 7, 30, 31)]
    assert logs.check(path) == logs.relearn(path, new, Books()) == 0
    with bookkeeping(new) as keeper:
        assert_true_to_log(keeper)
        anew = [views.booking(keeper, seq) for seq in (0, 3, 5, 7, 30, 31)]
        for name in ("seq", "sample", "account", "reviewed", "corrected"):
            assert [each[name] for each in anew] == [each[name] for each in before]
        assert not keeper.book([*moved, *export[1:3]])


@given(st.data())
@settings(max_examples=10)
def test_any_lists_with_ids_leave_each_booking_as_it_was_sent_last(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("ids") / "log.jsonl"
    standing = {}  # by company and id: text, amount, account; whether somebody has looked
    one = st.fixed_dictionaries(
        {
            "CompanyId": st.sampled_from("AB"),
            "BankEntryText": st.sampled_from(["rent", "food", "taxi"]),
            "BankEntryAmount": st.sampled_from(["-1.50", "< 10"]),
            "AccountNumber": st.sampled_from("12"),
            "Id": st.sampled_from("12345"),
        },
        optional={"BookedBy": st.sampled_from(["person", "suggestion"])},
    )
    keeper = Bookkeeper(Log(path), unsaved=1)
    try:
        for _ in range(data.draw(st.integers(1, 12))):
            match data.draw(
                st.sampled_from(["book", "book", "book", "correct", "forget", "restart"])
            ):
                case "book":
                    samples, lines = data.draw(st.lists(one, max_size=6)), 0
                    for (company, id), sample in {
                        (each["CompanyId"], each["Id"]): each for each in samples
                    }.items():
                        who, before = sample.get("BookedBy"), standing.get((company, id))
                        now = [sample[key] for key in (*FEATURES[1:], "AccountNumber")]
                        if before is None:
                            standing[company, id] = now, who != "suggestion"
                        elif who == "suggestion" or (before[0] == now and (before[1] or not who)):
                            continue
                        else:
                            standing[company, id] = now, True
                        lines += 1
                    assert len(keeper.book(samples)) == lines
                case "correct" if standing:
                    which = data.draw(st.sampled_from(sorted(standing)))
                    keeper.correct(keeper.seq_of(*which), "2")
                    standing[which] = [*standing[which][0][:-1], "2"], True
                case "forget":
                    with suppress(NotFound):
                        keeper.forget("A")
                    standing = {key: each for key, each in standing.items() if key[0] != "A"}
                case "restart":
                    keeper.close()
                    keeper = Bookkeeper(Log(path), unsaved=1)
        found = {}
        for each in views.bookings(keeper, 100)[0]:
            sample = each["sample"]
            now = [sample[key] for key in (*FEATURES[1:], "AccountNumber")]
            found[sample["CompanyId"], sample["Id"]] = now, each["reviewed"]
            assert keeper.seq_of(sample["CompanyId"], sample["Id"]) == each["seq"]
        assert found == standing
        assert_true_to_log(keeper)
    finally:
        keeper.close()


def test_an_id_takes_at_most_30_bytes_and_is_found_among_many():
    tracemalloc.start()
    try:
        ids, before = Ids(), tracemalloc.get_traced_memory()[0]
        for seq in range(0, 60_000, 2):
            ids.add(seq, f"company{seq % 50}", f"{seq}")
        assert tracemalloc.get_traced_memory()[0] - before < 30 * 30_000
    finally:
        tracemalloc.stop()
    seqs = range(0, 60_000, 334)
    assert [ids.find(f"company{seq % 50}", f"{seq}") for seq in seqs] == [*seqs]
    assert [ids.find(f"company{(seq + 1) % 50}", f"{seq}") for seq in seqs] == [None] * len(seqs)
    ids.forget(np.array(seqs))
    assert [ids.find(f"company{seq % 50}", f"{seq}") for seq in seqs] == [None] * len(seqs)
    assert ids.find("company2", "2") == 2


# ------------------------------------------------------------------------------------------ Views


def test_one_may_switch_on_from_where_few_are_wrong_for_certain():
    def rows(*found):
        made = [
            {"confidence": sure, "predicted": "1" if i >= wrong else "2", "score_weight": weight}
            for sure, n, wrong, weight in found
            for i in range(n)
        ]
        return add_rows(History(), [{"seq": i} | row for i, row in enumerate(made)])

    def level(*found, wrong=0.02):
        on = views.switch_on(rows(*found), wrong)
        return on and on["at_least"]

    assert level((0.995, 148, 0, 1)) is None
    assert level((0.995, 149, 0, 1)) == 0.99
    assert level((0.995, 149, 1, 1)) is None
    assert level((0.995, 149, 0, 1), (0.9, 10, 0, 1), (0.8, 100, 50, 1)) == 0.9
    assert level((0.995, 149, 0, 1), (0.9, 100, 50, 1), (0.8, 9999, 0, 1)) == 0.99  # it has ended
    assert level((0.995, 60, 0, 1), (0.7, 89, 0, 1)) == 0.7
    assert level((0.995, 149, 0, 16)) == 0.99
    assert level((0.995, 9, 0, 16), (0.995, 139, 0, 1)) is None  # it is as if there were fewer
    assert views.switch_on(rows((0.95, 300, 0, 1), (0.3, 100, 60, 1)), 0.05) == {
        "at_least": 0.95,
        "share": 0.75,
        "wrong": 0.05,
        "certainty": 0.95,
    }
    for n, wrong in itertools.product((150, 400, 1000), range(30)):
        for most in (0.01, 0.02, 0.1):
            is_certain = binom.cdf(wrong, n, most) <= 0.05
            assert (level((0.995, n, wrong, 1), wrong=most) is not None) == is_certain


def test_the_learning_curve_has_at_most_129_points_of_a_window_each(keeper, monkeypatch):
    monkeypatch.setattr(views, "WINDOW", 8)
    assert views.overview(keeper)["curve"] == []
    for batch in batches_of(bookings(1000), 100):
        keeper.book(batch)
    keeper.correct(555, "corrected")
    lines = lines_of(keeper)
    lines[555]["sample"]["AccountNumber"] = "corrected"
    curve = views.overview(keeper)["curve"]
    assert [point["bookings"] for point in curve] == [*range(24, 1000, 8), 1000]
    for point in curve[1:]:
        window = lines[point["bookings"] - 8 : point["bookings"]]
        booked = [line["sample"]["AccountNumber"] for line in window]
        predicted = [line["predicted"] for line in window]
        assert point["accuracy"] == accuracy_score(booked, predicted)
        for name, score in (("precision", precision_score), ("recall", recall_score)):
            expected = score(booked, predicted, average="macro", zero_division=0)
            assert point[name] == pytest.approx(expected)


def test_what_is_forgotten_while_it_is_asked_for_is_left_out(keeper, monkeypatch):
    record = Log.record
    keeper.book(bookings(100))

    def forgotten_first(log, seq):
        monkeypatch.setattr(Log, "record", record)
        keeper.forget("company1")
        return record(log, seq)

    monkeypatch.setattr(Log, "record", forgotten_first)
    found, _ = views.bookings(keeper, 100)
    assert found == views.bookings(keeper, 100)[0]
    assert len(found) == bookkeep.health(keeper)["samples"] < 100


@pytest.mark.parametrize(
    ("seconds", "bound"), [(0, 0.001), (0.001, 0.001), (0.0011, 0.0025), (10, 10), (11, "+Inf")]
)
def test_a_duration_is_counted_up_to_the_bound_that_it_keeps(seconds, bound):
    histogram = prometheus.Histogram("x", "What it is.")
    histogram.observe(seconds)
    lines = [line for line in histogram.exposition() if "_bucket{" in line]
    assert (
        next(line for line in lines if line.endswith(" 1"))
        == f'bookkeep_x_duration_seconds_bucket{{le="{bound}"}} 1'
    )


# ------------------------------------------------------------------------------------------- HTTP


def test_the_contract(serve):
    service = serve()
    asked = {key: booking()[key] for key in bookkeep.FEATURES}
    assert service.post("/predict", asked)[0] == 503
    assert service.get("/metrics/1000")[0] == 503
    first = [booking(), booking(text="food", account="7000")]
    stored = {"received": 2, "total": 2, "first": 0, "last": 1}
    assert service.post("/sample", first) == (200, stored)
    for one in (asked, json.dumps(asked), booking(account=""), [asked]):
        assert service.post("/predict", one) == (200, ["3115"])
    assert service.post("/predict", [asked, first[1]]) == (200, ["3115", "7000"])
    assert service.post("/predict", []) == (200, [])
    assert service.get("/metrics/1000")[0] == 503
    assert service.post("/sample", json.dumps([booking()]))[1]["total"] == 3
    stored = {"received": 0, "total": 3, "first": None, "last": None}
    assert service.post("/sample", []) == (200, stored)
    assert service.get("/metrics/1000") == (200, {"precision": 1.0, "recall": 1.0})
    assert service.post("/suggest", [asked])[1] == [service.post("/suggest", asked)[1]]
    assert list(service.get("/health")[1]) == [
        *("status", "samples", "unseen", "checks", "lines"),
        *("accounts", "companies", "tokens", "uptime"),
    ]


ASKED = {"CompanyId": "A", "BankEntryText": "x", "BankEntryAmount": "1"}
WHOLE = "must be a whole number from"
REFUSED = [  # method, path, content, status, what the sentence says
    ("POST", "/sample", [booking()] * 3 + [booking(account="")], 400, "sample 3: AccountNumber is"),
    ("POST", "/sample", [booking(), by("nobody")], 400, "sample 1: BookedBy must be one of"),
    ("POST", "/sample", [booking(amount=3)], 400, "sample 0: BankEntryAmount must be a string"),
    ("POST", "/sample", [booking(account="1" * 101)], 400, "longer than 100"),
    ("POST", "/sample", [ASKED], 400, "sample 0: AccountNumber is missing"),
    ("POST", "/sample", booking(), 400, "send a list of samples"),
    ("POST", "/sample", b"", 400, "the body must be JSON"),
    ("POST", "/sample", b"[\xff]", 400, "the body must be UTF-8"),
    ("POST", "/sample", b" " * 300_001, 413, "at most 300000 bytes"),
    ("POST", "/predict", b" " * 500_000, 413, "at most 300000 bytes"),
    ("POST", "/predict", [{"CompanyId": "A"}], 400, "sample 0: BankEntryText is missing"),
    ("POST", "/suggest?top=21", ASKED, 400, f"top {WHOLE} 1 to 20"),
    ("POST", "/suggest?top=", ASKED, 400, f"top {WHOLE} 1 to 20"),
    ("POST", "/suggest?top=1.0", ASKED, 400, f"top {WHOLE} 1 to 20"),
    ("POST", "/suggest?top=" + "9" * 50, ASKED, 400, f"top {WHOLE} 1 to 20"),
    ("POST", "/suggest", [ASKED] * 101, 400, "with reasons, send at most 100 samples"),
    ("POST", "/suggest?top=20", [ASKED] * 16, 400, "with reasons, send at most 15 samples"),
    ("POST", "/suggest?reasons=maybe", ASKED, 400, "reasons must be yes or no"),
    ("POST", "/suggest?tip=1", ASKED, 400, "send only top,"),
    ("POST", "/sample?company=A", [], 400, "send nothing after the ?"),
    ("POST", "/correct", {"seq": 99, "AccountNumber": "1"}, 404, "there is no booking 99"),
    ("POST", "/correct", {"seq": -1, "AccountNumber": "1"}, 400, f"seq {WHOLE}"),
    ("POST", "/correct", {"seq": 10**400, "AccountNumber": "1"}, 400, f"seq {WHOLE}"),
    ("POST", "/correct", {"seq": 1.5, "AccountNumber": "1"}, 400, f"seq {WHOLE}"),
    ("POST", "/correct", {"seq": "1", "AccountNumber": "1"}, 400, f"seq {WHOLE}"),
    ("POST", "/correct", {"seq": True, "AccountNumber": "1"}, 400, f"seq {WHOLE}"),
    ("POST", "/correct", {"seq": 1, "AccountNumber": ""}, 400, "AccountNumber is empty"),
    ("POST", "/correct", {"seq": 1, "AccountNumber": 1}, 400, "AccountNumber must be a string"),
    ("POST", "/correct", {"seq": 1, "AccountNumber": "\ud800"}, 400, "a lone surrogate"),
    ("POST", "/correct", {"seq": 1, "AccountNumber": "1", "x": "y"}, 400, "and nothing else"),
    ("POST", "/correct", {"seq": 1}, 400, "and nothing else"),
    ("POST", "/correct", [1], 400, "and nothing else"),
    ("DELETE", "/company/none", None, 404, "there is no booking of this company"),
    ("DELETE", "/company/A%ff", None, 400, "UTF-8"),
    ("DELETE", "/company", None, 400, "say which company"),
    ("DELETE", "/company?id=", None, 400, "id must be filled"),
    ("DELETE", "/company?id=%ff", None, 400, "id must be UTF-8"),
    ("DELETE", "/company?id=A&id=A", None, 400, "only id, each once"),
    ("DELETE", "/company/none?id=A", None, 400, "send nothing"),
    *[
        ("GET", f"/metrics/{n}", None, 400, f"n {WHOLE} 1")
        for n in ("0", "-1", "x", "1.0", "+1", "%20", "1e3", "%D9%A3", "9" * 1000)
    ],
    *[
        ("GET", f"/report/9?book_from={level}", None, 400, "book_from must be a number from 0 to 1")
        for level in ("1.01", "-0.1", "x", "", "nan", "inf", "0_1", "%20.5")
    ],
    ("GET", "/report/9?company=none", None, 404, "there is no booking of this company"),
    ("GET", "/report/1?from=1", None, 400, "send only company,"),
    ("GET", "/overview?company=%ff", None, 400, "company must be UTF-8"),
    ("GET", "/samples?from=-1", None, 400, f"from {WHOLE} 0"),
    ("GET", "/samples?limit=9999999999", None, 400, f"limit {WHOLE} 0"),
    ("GET", "/samples?from=1&from=2", None, 400, "only from, limit, each once"),
    ("GET", "/samples?company=A", None, 400, "only from, limit"),
    ("GET", "/bookings?limit=501", None, 400, f"limit {WHOLE} 1 to 500"),
    ("GET", "/bookings?reviewed=maybe", None, 400, "reviewed must be yes or no"),
    ("GET", "/bookings?order=oldest", None, 400, "order must be newest or confidence"),
    ("GET", "/bookings?below=2", None, 400, "below must be a number from 0 to 1"),
    ("GET", "/bookings?before=7", None, 400, "before must be what the page before says"),
    ("GET", "/bookings?before=--:1", None, 400, "before must be what the page before says"),
    ("GET", "/bookings?company=none", None, 404, "there is no booking of this company"),
    ("GET", "/bookings/7", None, 404, "there is no booking 7"),
    ("GET", "/bookings/x", None, 400, f"seq {WHOLE} 0"),
    ("GET", "/health?x", None, 400, "send nothing"),
    ("GET", "/?a=b", None, 400, "send nothing"),
    ("GET", "/nowhere", None, 404, "/sample /predict /suggest /correct"),
    ("GET", "/metrics/1/2", None, 404, "there is nothing here"),
    ("GET", "/suggest", None, 405, "ask for this with POST"),
    ("PUT", "/sample", [], 405, "ask for this with POST"),
    ("POST", "/company/A", [], 405, "ask for this with DELETE"),
    ("X" * 2000, "/sample", None, 405, "ask for this with POST"),
]
REFUSED_HEADERS = [  # of a POST /sample of [], status, what the sentence says
    ({"Content-Type": "text/plain"}, 415, "Content-Type: application/json"),
    ({"Content-Type": ""}, 415, "Content-Type: application/json"),
    *[
        ({"Idempotency-Key": key}, 400, "Idempotency-Key must be 1 to 200 printable ASCII")
        for key in ("", "x" * 201, "a\tb", "\xe9")
    ],
    *[
        ({"Host": host}, 403, "localhost")
        for host in ("evil.example:80", "localhost.evil.example", "127.0.0.1.evil", "")
    ],
    ({"Bookkeep-At-Least": "x"}, 400, f"Bookkeep-At-Least {WHOLE} 0"),
    ({"Bookkeep-At-Least": "9"}, 503, "only 2 lines are known here so far, not 9"),
]


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "said"),
    [
        *[(*asked, {}, status, said) for *asked, status, said in REFUSED],
        *[("POST", "/sample", [], *refusal) for refusal in REFUSED_HEADERS],
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_done_is_refused_in_one_sentence_and_nothing_is_stored(
    service, method, path, content, headers, status, said
):
    body = content if isinstance(content, bytes | None) else json.dumps(content).encode()
    answered, got, answer = service.ask(method, path, body=body, headers=headers)
    assert answered == status
    assert list(answer) == ["error"]
    assert said in answer["error"]
    assert len(answer["error"]) < 400
    assert ("Allow" in got) == (status == 405)
    assert (got["X-Content-Type-Options"], got["Cache-Control"]) == ("nosniff", "no-store")
    assert not {"Server", "Via"} & {*got}
    assert service.samples() == 2


def test_what_is_nearly_refused_is_not(service):
    for host in ("LOCALHOST:80", "127.0.0.1", f"127.0.0.1:{service.port}", "[::1]:80"):
        assert service.ask("GET", "/health?", headers={"Host": host})[0] == 200
    kind = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert service.ask("POST", "/sample", body=b"[]".ljust(300_000), headers=kind)[0] == 200
    assert service.ask("POST", "/sample", [], headers={"Bookkeep-At-Least": "2"})[0] == 200
    assert service.post("/suggest?top=20", [ASKED] * 15)[0] == 200
    assert len(service.post("/suggest?reasons=no&top=20", [ASKED] * 400)[1]) == 400
    assert service.get("/bookings?before=0.0001:1")[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"NONSENSE\r\n\r\n",
        b"GET http://[::1/health HTTP/1.1\r\n\r\n",
        request("/sample", Content_Length=5, Transfer_Encoding="chunked") + b"0\r\n\r\n",
        request("/sample", Content_Length=-1),
        request("/sample", Content_Length=99999999999),
    ],
)
def test_what_is_no_http_is_refused_and_the_connection_closed(service, sent):
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(sent)
        said = connection.makefile("rb").read()
    assert re.match(rb"HTTP/1.[01] 4(00|13) ", said)
    assert "exception" not in service.said()


def test_a_body_may_come_in_chunks(service):
    def send(*chunks):
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
            head = request("/predict", Transfer_Encoding="chunked")
            connection.sendall(head.replace(b"Content-Length: 0\r\n", b""))
            with suppress(ConnectionError):  # it may be refused before its end
                for chunk in chunks:
                    connection.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            return connection.recv(100)

    body = json.dumps([booking()]).encode()
    assert send(body[:9], body[9:], b"").startswith(b"HTTP/1.1 200 ")
    assert b" 413 " in send(b" " * 300_001, b"")
    assert b" 413 " in send(*[b" " * 100_000] * 30)


def test_a_company_is_forgotten_whatever_its_id(serve):
    service = serve()
    for name in ("acme", "acme\n", "a\nb", ".", "..", "/", "a/b", "ä&=?#%2e", "é %"):
        quoted = quote(name, safe="")
        for path in (f"/company/{quoted}", f"/company?id={quoted}"):
            service.post("/sample", [booking(name), booking("other")])
            assert service.delete(path) == (200, {"company": name, "forgotten": 1})
            assert service.delete(path)[0] == 404
    assert service.samples() == 18


def test_slow_readers_of_the_whole_log_stop_nobody(serve, tmp_path):
    """And what they get is the log, also if a company is forgotten while they read."""
    service, log = serve("--threads=4"), tmp_path / "log.jsonl"
    for number in range(3):
        service.post("/sample", [booking("A" * (number == 1), Note="x" * 9000)] * 1000)
        service.post("/sample", [booking(Note="x" * 9000)] * 100)
    slow = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(20)]
    for connection in slow:
        connection.sendall(request("/samples", method="GET"))
    files = [connection.makefile("rb") for connection in slow]
    for file in files:
        assert file.readline() == b"HTTP/1.1 200 OK\r\n"
    for _ in range(10):
        assert service.post("/predict", booking())[0] == 200
    assert service.delete("/company/A")[0] == 200
    for file in files[:3]:
        _, body = answer(file, b"HTTP/1.1 200 OK\r\n")
        assert len(body) == log.stat().st_size
        records = [json.loads(line) for line in body.splitlines()]
        assert [record["seq"] for record in records] == list(range(len(records)))
        assert {"sample" in record for record in records} == {True, False}
    for connection in slow:
        connection.close()
    assert "exception" not in service.said()
    status, headers, lines = service.ask("GET", "/samples", kind="application/jsonl")
    assert (status, int(headers["Content-Length"]), lines) == (200, len(lines), log.read_bytes())


def answer(file, start=b""):
    """The next answer on a connection: its head and its body."""
    head = start + b"".join(itertools.takewhile(bytes.strip, file))
    length = re.findall(rb"(?im)^content-length: (\d+)", head)
    return head, file.read(int(length[0]))  # no head at the end of all


def watched(service):
    """The families of all that it tells Prometheus, by name."""
    kind = "text/plain; version=0.0.4; charset=utf-8"
    text = service.ask("GET", "/metrics", kind=kind)[2].decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_prometheus_can_read_what_the_docs_watch(serve):
    service = serve(unsaved=1)
    for _ in range(3):
        service.post("/sample", [booking()])
    service.post("/predict", booking())
    service.get("/metrics/10")
    service.get("/nowhere")
    service.post("/sample", [{}])
    wait_until(lambda: "bookkeep_snapshot_age_seconds" in watched(service))
    families = watched(service)
    assert all(family.documentation for family in families.values())
    told = {sample.name for family in families.values() for sample in family.samples}
    for file in ("alerts.yml", "dashboard.json"):
        names = {*re.findall(r"\bbookkeep_[a-z_]+\b", (HERE / "docs" / file).read_text())}
        assert len(names) > 5
        assert names <= told
    [build] = families["bookkeep_build_info"].samples
    assert build.labels["version"] == bookkeep.__version__
    requests = {}
    for sample in families["bookkeep_request_duration_seconds"].samples:
        labels = dict(sample.labels)
        kind = sample.name.removeprefix("bookkeep_request_duration_seconds")
        requests.setdefault((labels.pop("path"), labels.pop("status")), []).append(
            (kind, labels.get("le"), sample.value)
        )
    del requests["/metrics", "200"]
    assert {key: values[-1][2] for key, values in requests.items()} == {
        ("/sample", "200"): 3,
        ("/sample", "400"): 1,
        ("/predict", "200"): 1,
        ("/metrics/{n}", "200"): 1,
        ("/health", "200"): 1,  # whether it had started
        ("other", "404"): 1,
    }
    for *buckets, (_, _, seconds), (_, _, number) in requests.values():
        heights = [value for _, _, value in buckets]
        assert heights == sorted(heights)
        assert (buckets[-1][1], heights[-1]) == ("+Inf", number)
        assert 0 < seconds < 60
    assert families["bookkeep_fsync_duration_seconds"].samples[-1].value == 3


def test_a_full_disk_is_a_507_and_when_there_is_space_again_bookings_go_on(serve):
    service = serve()
    assert service.post("/sample", [booking()] * 100)[0] == 200
    unlimited = resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (40_000, -1))
    metrics = service.get("/metrics/100")
    status, refusal = service.post("/sample", [booking(account="2")] * 500)
    assert status == 507
    assert refusal == {"error": "the log could not be written (File too large); try later"}
    assert "ERROR" in service.said()
    failing = "the log could not be written (File too large)"
    service.post("/sample", [])  # which says nothing of the log
    for health in (service.get("/health")[1], service.get("/overview")[1]["health"]):
        assert (health["status"], health["samples"]) == (failing, 100)
    assert service.get("/ready")[0] == 503
    assert service.post("/predict", booking()) == (200, ["3115"])
    assert service.get("/metrics/100") == metrics
    assert service.post("/sample", [booking()])[0] == 200
    assert service.get("/health")[1]["status"] == "ok"
    assert service.get("/ready") == (200, {"status": "ready"})
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, unlimited)
    assert service.post("/sample", [booking(account="2")] * 500)[0] == 200
    service.stop()
    assert serve().samples() == 601


@pytest.mark.parametrize("by_file", [False, True])
def test_with_a_token_nobody_else_reads_or_teaches(serve, tmp_path, monkeypatch, by_file):
    secret, options = "s3cret~token", ["--host=0.0.0.0"]
    if by_file:
        (tmp_path / "token").write_text(f"{secret}\n")
        options.append(f"--token-file={tmp_path / 'token'}")
    else:
        monkeypatch.setenv("BOOKKEEP_TOKEN", secret)
    service = serve(*options)
    right = {"Authorization": f"bEARER {secret}", "Host": "any.name"}
    assert service.ask("POST", "/sample", [booking()], headers=right)[0] == 200
    wrong = ["", secret, "Bearer", f"Bearer {secret}x", "Bearer \xe9", f"Basic {secret}"]
    for headers in ({}, *({"Authorization": each} for each in wrong)):
        for method, path in (
            *(
                ("POST", "/sample"),
                ("POST", "/predict"),
                ("GET", "/metrics/1"),
                ("GET", "//sample"),
            ),
            *(("GET", "/openapi.json"), ("GET", "/nowhere"), ("PUT", "/sample")),
        ):
            status, got, refusal = service.ask(method, path, [booking()], headers=headers)
            assert (status, got["WWW-Authenticate"]) == (401, "Bearer")
            assert secret not in json.dumps(refusal)
    assert service.samples() == 1
    command = Path(f"/proc/{service.process.pid}/cmdline").read_text()
    assert secret not in command + service.said()


def called(keeper, method, path, body=b"", content_type="application/json", **options):
    """What any WSGI server gets: the status line, the headers and the body."""
    environ = {
        **{"REQUEST_METHOD": method, "PATH_INFO": path, "SCRIPT_NAME": "", "QUERY_STRING": ""},
        **{"SERVER_NAME": "x", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1"},
        **{"CONTENT_TYPE": content_type, "CONTENT_LENGTH": str(len(body))},
        **{"wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.input": BytesIO(body)},
        **{"wsgi.errors": sys.stderr, "wsgi.multithread": True, "wsgi.multiprocess": False},
        "wsgi.run_once": False,
    }
    started = []
    app = wsgiref.validate.validator(create_app(keeper, **options))
    parts = app(environ, lambda *start: started.append(start))
    answer = b"".join(parts)
    parts.close()
    return int(started[0][0][:3]), dict(started[0][1]), json.loads(answer)


def test_the_app_is_one_that_any_wsgi_server_can_run(keeper):
    body = json.dumps([booking()]).encode()
    assert called(keeper, "POST", "/sample", body)[2]["total"] == 1
    assert called(keeper, "POST", "/predict", body)[2] == ["3115"]
    assert called(keeper, "POST", "/predict", body, "text/plain")[0] == 415
    assert called(keeper, "POST", "/predict", body * 100, max_body=1000)[0] == 413
    assert called(keeper, "GET", "/nowhere")[0] == 404


def test_a_failure_of_the_service_is_a_500_without_a_traceback(keeper, caplog):
    with raising(bookkeep, "health", RuntimeError("secret")):
        status, _, refusal = called(keeper, "GET", "/health")
    assert (status, list(refusal)) == (500, ["error"])
    assert "secret" not in refusal["error"]
    assert "secret" in caplog.text


def test_no_name_forges_a_line_of_the_figures_or_of_the_log(keeper, caplog):
    name = "x\nbookkeep_forged 1\r\n2026-05-17 INFO forged\u2028INFO forged\x1b[2J"
    keeper.book([booking(name, name, account=name, **{name: name})] * 2)
    app = create_app(keeper)
    with raising(Bookkeeper, "forget", RuntimeError(name)):
        assert called(keeper, "DELETE", f"/company/{name}".encode().decode("latin-1"))[0] == 500
    lines = LogLines("%(levelname)s %(message)s").format(caplog.records[-1]).splitlines()
    assert lines[0] == "ERROR DELETE /company/x"
    assert all(line.startswith("    ") and line.isprintable() for line in lines[1:])
    assert sum("INFO forged" in line for line in lines) == 2
    [figures] = [each.callback for each in app.routes if each.rule == "/metrics"]
    assert all(re.match("bookkeep_|# (HELP|TYPE) ", line) for line in figures().splitlines())
    assert "forged" not in figures()


def test_who_finds_too_many_waiting_is_told_when_to_come_again(keeper):
    with raising(Bookkeeper, "book", Busy("too many")):
        status, headers, refusal = called(keeper, "POST", "/sample", b"[]")
    assert (status, headers["Retry-After"], refusal) == (503, "1", {"error": "too many"})


class Described:
    """A service as README.md and docs/operations.md describe it; told what was predicted."""

    def __init__(self, context):
        self.context = context
        self.features = {"target": "AccountNumber", "context": context} if context else {}
        self.lines = []  # as /samples gives them
        self.bookings = {}  # by seq, those that are not forgotten: the line, and what became of it
        self.keys = {}  # key -> (the number of the list's first line, the answer)
        self.start()

    def start(self):
        self.counted = Counter()  # what an operator watches, since the start
        self.last_batch = math.inf  # the number of its first line

    def accounts(self):
        return {booking["account"] for booking in self.bookings.values() if booking["learned"]}

    def of(self, company):
        return [each for each in self.bookings.values() if company in (None, each["company"])]

    def sample(self, samples, key):
        """The status and the answer. What is stored awaits its predictions."""
        first, answer = self.keys.get(key, (None, None))
        if answer:
            lines = self.lines[first : first + len(samples)]
            same = [line.get("sample") for line in lines] == samples  # and none was forgotten
            return (200, answer) if same and len(samples) == answer["received"] else (422, None)
        first = len(self.lines)
        total = first + len(samples)
        for seq, sample in enumerate(samples, first):
            self.line(key or first, total - seq - 1, sample=sample)
        answer = {"received": len(samples), "total": total, "first": first, "last": total - 1}
        if not samples:
            return 200, answer | {"first": None, "last": None}
        if key:
            self.keys[key] = (first, answer)
        self.last_batch = first
        self.counted["booked"] += len(samples)
        return 200, answer

    def line(self, batch, left, **more):
        self.lines.append({"seq": len(self.lines), "batch": batch, "left": left, **more})

    def met(self):
        """Which accounts each company has."""
        learned = (booking for booking in self.bookings.values() if booking["learned"])
        return {(booking["company"], booking["account"]) for booking in learned}

    def told(self, lines, met=()):
        """Takes the predictions of these lines, made while companies had `met` these accounts."""
        samples = [line["sample"] for line in lines if line.get("sample")]
        parts = {part.start for part in bookkeep.parts(len(samples), len(self.bookings))}
        learned_before, met = {*met}, set()
        for i, line in enumerate(lines):
            if i in parts:  # or else it is a correction, alone
                met = {*learned_before}
                measured = any(b["times"] and b["predicted"] for b in self.bookings.values())
            accounts = {account for _, account in met}
            described, sample = self.lines[line["seq"]], line.get("sample", {})
            who = sample.get("BookedBy", "person")
            learned = {"reviewed"} if who == "suggestion" else {"weight", "against"}
            predicted = {"predicted", "margin", "confidence", "rank", "known"} if sample else set()
            assert line.keys() == described.keys() | predicted | learned | self.features.keys()
            assert (described | self.features).items() <= line.items()
            self.lines[line["seq"]] = line
            if not sample:
                continue
            assert line.get("reviewed", False) is False
            account = sample["AccountNumber"]
            self.bookings[line["seq"]] = {
                "company": sample["CompanyId"],
                "account": account,
                "learned": who != "suggestion",
                "times": {"person": 1, "check": 16, "suggestion": 0}[who],
                **line,
            }
            if who != "suggestion":
                learned_before.add((sample["CompanyId"], account))
            if accounts:
                times = self.bookings[line["seq"]]["times"]
                self.counted["scored"] += times
                self.counted["scored_right"] += times * (account == line["predicted"])
            assert line["known"] in range(6)
            if accounts:
                assert line["predicted"] in accounts
                assert not measured if line["confidence"] is None else 0 <= line["confidence"] <= 1
                assert line["margin"] is None or len(accounts) > 1
                assert line["rank"] is None or account in accounts
                assert (line["rank"] == 1) == (account == line["predicted"])
                # Candidates are what the company has met, at least.
                own = {account for company, account in met if company == sample["CompanyId"]}
                assert line["margin"] is not None or own <= {line["predicted"]}
                assert line["rank"] is not None or account not in own
            else:
                assert {line[key] for key in predicted - {"known"}} == {None}

    def correct(self, seq, account):
        if seq not in self.bookings:
            return 404, None
        booking = self.bookings[seq]
        answer = {"seq": seq, "AccountNumber": account, "before": booking["account"]}
        seen = any(line.get("corrects") == seq for line in self.lines)
        if not seen or booking["account"] != account:  # or else a person has said so already
            self.line(len(self.lines), 0, corrects=seq, AccountNumber=account)
            self.counted["corrections"] += 1
        booking |= {"account": account, "learned": True}
        return 200, answer

    def forget(self, company):
        gone = {booking["seq"] for booking in self.of(company)}
        for seq in gone:
            del self.bookings[seq]
        for line in self.lines:
            if line["seq"] in gone or line.get("corrects") in gone:
                for key in line.keys() - {"seq", "batch", "left"}:
                    del line[key]
        self.counted["forgotten"] += len(gone)
        return (200, {"company": company, "forgotten": len(gone)}) if gone else (404, None)

    def standing(self, seq):
        each = self.bookings[seq]
        sample, account = each["sample"], each["account"]
        person = each["learned"] and not each["times"]
        names = {None: None}
        for other in self.of(each["company"]):
            if "AccountName" in other["sample"]:
                names[other["sample"]["AccountNumber"]] = other["sample"]["AccountName"]
        rank = each["rank"] if account == sample["AccountNumber"] else None
        is_corrected = any(line.get("corrects") == seq for line in self.lines)
        return {
            "seq": seq,
            "sample": {
                key: value
                for key, value in sample.items()
                if key != "AccountName" or account == sample["AccountNumber"]
            }
            | {"AccountNumber": account}
            | ({"BookedBy": "person"} if person else {}),
            "account": account,
            "name": names.get(account),
            "predicted": each["predicted"],
            "predicted_name": names.get(each["predicted"]),
            "confidence": each["confidence"],
            "rank": 1 if account == each["predicted"] else rank,
            "reviewed": each["learned"],
            "booked_by": "person" if person else sample.get("BookedBy", "person"),
            "corrected": {"from": sample["AccountNumber"]} if is_corrected else None,
        }

    def page(self, company, reviewed, below, order):
        """The status, and all that match, in order."""
        if company and not self.of(company):
            return 404, None
        found = [
            each
            for each in reversed(self.of(company))
            if reviewed in (None, "yes" if each["learned"] else "no")
            and (each["predicted"] or not (below or order))
            and (not below or (each["confidence"] or 0) < below)
        ]
        if order:
            found.sort(key=lambda each: each["confidence"] or 0)
        return 200, [self.standing(each["seq"]) for each in found]

    def health(self):
        learned = [booking for booking in self.bookings.values() if booking["learned"]]
        return {
            "status": "ok",
            "samples": len(self.bookings),
            "unseen": sum(not booking["learned"] for booking in self.bookings.values()),
            "checks": sum(booking["times"] == 16 for booking in self.bookings.values()),
            "lines": len(self.lines),
            "accounts": len(self.accounts()),
            "companies": len({booking["company"] for booking in self.bookings.values()}),
            "tokens": len(
                {token for each in learned for token in tokens(each["sample"], self.context)}
            ),
        }

    def scored(self, n=None, company=None):
        """The last n predictions that are scored, or all."""
        rows = [each for each in self.of(company) if each["times"] and each["predicted"]]
        return rows[-n:] if n else rows

    def report(self, n, company, levels):
        """The status and the answer, but for the standard errors."""
        if company and not self.of(company):
            return 404, None
        rows = self.scored(n, company)
        if not rows:
            return 503, None
        pairs = pairs_of(rows)
        return 200, {
            "support": len(rows),
            "unseen": sum(
                not each["learned"] and each["seq"] > rows[0]["seq"] for each in self.of(company)
            ),
            "checks": sure_of(rows, 0)["checks"],
            **figures_of(rows),
            "confused": {pair: times for pair, times in pairs.items() if pair[0] != pair[1]},
            "confidence": [sure_of(rows, level) for level in levels],
        }

    def overview(self, company):
        """The status and the answer, but for the standard errors and the health."""
        if company and not self.of(company):
            return 404, None
        all_of_it, recent = self.of(None), self.scored(10_000, company)
        ends = sorted({*range(250, len(all_of_it), 250), len(all_of_it)})
        curve = []
        for end in ends:
            window = [
                each
                for each in all_of_it[max(end - 1000, 0) : end]
                if each["times"] and each["predicted"]
            ]
            curve += [{"bookings": end, **figures_of(window)}] if window else []
        levels = (0, 0.5, 0.8, 0.9, 0.95, 0.99) if recent else ()
        return 200, {
            "target": "AccountNumber",
            "context": self.context,
            "company": None,
            "may_change": True,
            "metrics": figures_of(self.scored(1000)) if self.scored() else None,
            "curve": curve,
            "scored": len(recent),
            "confidence": [sure_of(recent, level) for level in levels],
        }

    def watched(self):
        """What an operator watches, by what was done since the start, and what is there."""
        names = ("booked", "scored", "scored_right", "corrections", "forgotten", "predictions")
        figures = {f"{name}_total": self.counted[name] for name in (*names, "refused")}
        figures |= {"failed_writes_total": 0, "waiting": 0}
        health = self.health()
        figures |= {"bookings": health["samples"], "log_lines": health["lines"]}
        figures |= {name: health[name] for name in ("unseen", "checks", "accounts", "companies")}
        last = [each for each in self.scored() if each["seq"] >= self.last_batch]
        for name, rows in (("last_batch", last), ("window", self.scored(1000))):
            if rows:
                figures |= {f"{name}_{about}": n for about, n in figures_of(rows).items()}
        if self.scored():
            figures["window_bookable"] = sure_of(self.scored(1000), 0.95)["share"]
        return figures


def pairs_of(rows):
    """How often an account was booked where another, or it, was predicted."""
    pairs = Counter()
    for row in rows:
        pairs[row["account"], row["predicted"]] += row["times"]
    return pairs


def figures_of(rows):
    """Accuracy, and the means of precision and recall over all accounts."""
    pairs = pairs_of(rows)
    accounts = {account for pair in pairs for account in pair}
    means = [
        sum(
            pairs[account, account]
            / max(sum(times for pair, times in pairs.items() if pair[side] == account), 1)
            for account in accounts
        )
        / len(accounts)
        for side in (1, 0)
    ]
    return {"accuracy": sure_of(rows, 0)["accuracy"], "precision": means[0], "recall": means[1]}


def sure_of(rows, level):
    """What share of them was at least so sure, and how much of it was right."""
    found = [row for row in rows if (row["confidence"] or 0) >= level]
    times = sum(row["times"] for row in found)
    right = sum(row["times"] for row in found if row["account"] == row["predicted"])
    return {
        "at_least": level,
        "share": times / pairs_of(rows).total(),
        "accuracy": right / times if times else None,
        "checks": sum(row["times"] == 16 for row in found),
    }


def nearly(answer):
    """The same with its floats rounded."""
    return json.loads(json.dumps(answer), parse_float=lambda number: round(float(number), 9))


class Walk:
    """Random requests to a service, each answer compared with what the documents say."""

    COMPANIES = ("A", "B/ü", "C d")
    BY = (None, None, "person", "check", "suggestion")

    def __init__(self, start, rng, context):
        self.start, self.rng = start, rng
        self.service, self.described = start(unsaved=20), Described(context)

    def ask(self, method, path, content=None, **more):
        print(method, path, json.dumps(content), more)
        status, _, answer = self.service.ask(method, path, content, **more)
        if status != 200:
            assert list(answer) == ["error"]
            self.described.counted["refused"] += status < 500
        return status, answer if status == 200 else None

    def step(self):
        acts = (self.send, self.correct, self.refuse, self.forget, self.restart)
        self.rng.choices(acts, [60, 30, 10, 2, 3])[0]()
        health, described = self.ask("GET", "/health")[1], self.described.health()
        assert {key: health[key] for key in described} == described
        looks = (self.report, self.metrics, self.predict, self.slice, self.watch, self.page)
        self.rng.choices((*looks, self.overview), [3, 1, 2, 1, 2, 2, 1])[0]()

    def samples(self):
        """Up to eight. Most texts have one account in all companies."""
        number = self.rng.choice([0, 1, 1, 1, 2, 8])
        texts = [self.rng.randrange(6) for _ in range(number)]
        return [
            booking(
                self.rng.choice(self.COMPANIES),
                f"shop{text} {self.rng.choice(['May', 'June'])}",
                self.rng.choice(["> -100", "< 10", "-9.50", "-9.5"]),
                str(text // 2 if self.rng.random() < 0.85 else self.rng.randrange(7)),
                **self.rng.choice(
                    [{}, {"AccountName": self.rng.choice("xyz")}, {"": "1", "Note": "ü\n"}]
                ),
                **self.rng.choice([{}, {"Department": ""}, {"Department": self.rng.choice("xy")}]),
                **({"BookedBy": who} if (who := self.rng.choice(self.BY)) else {}),
            )
            for text in texts
        ]

    def send(self):
        described, samples = self.described, self.samples()
        key = self.rng.choice([None, str(self.rng.randrange(len(described.lines) + 5))])
        if key in described.keys and self.rng.random() < 0.7:
            first, answer = described.keys[key]
            lines = described.lines[first : first + answer["received"]]
            samples = [line.get("sample", booking()) for line in lines]
        first, met = len(described.lines), described.met()
        suggested = self.suggest(samples)
        headers = {"Idempotency-Key": key} if key else {}
        stored = self.ask("POST", "/sample", samples, headers=headers)
        assert stored == described.sample(samples, key)
        lines = self.read(first)
        described.told(lines, met)
        if met and lines:
            firsts = [answer["suggestions"][0] for answer in suggested]
            for line, suggestion in zip(lines, firsts, strict=True):
                assert line["predicted"] == suggestion["account"]
                assert line["confidence"] == suggestion["confidence"]
                assert (line["margin"] is None) == (suggestion["margin"] is None)

    def correct(self):
        first = len(self.described.lines)
        seq = self.rng.randrange(max(first - 20, 0), first + 2)
        if seq < first and self.rng.random() < 0.7:
            seq = self.described.lines[seq].get("corrects", seq)
        account = str(self.rng.randrange(7))
        if seq in self.described.bookings and self.rng.random() < 0.5:
            account = self.described.bookings[seq]["account"]
        correction = {"seq": seq, "AccountNumber": account}
        answer = self.ask("POST", "/correct", correction)
        assert answer == self.described.correct(seq, account)
        self.described.told(self.read(first))

    def refuse(self):
        method, path, content, status, _ = self.rng.choice(REFUSED)
        if status in (400, 405) and not isinstance(content, bytes):
            headers = {"Idempotency-Key": str(len(self.described.lines))}
            assert self.ask(method, path, content, headers=headers) == (status, None)

    def forget(self):
        company = self.rng.choice(self.COMPANIES)
        answer = self.ask("DELETE", f"/company/{quote(company, safe='')}")
        assert answer == self.described.forget(company)
        assert self.read(0, 10**6) == self.described.lines

    def restart(self):
        samples = self.samples()
        before = self.export(), self.suggest(samples)
        number = self.rng.choice([signal.SIGTERM, signal.SIGKILL])
        print(number)
        self.service.stop(number)
        self.service = self.start(unsaved=self.rng.choice([20, 20, 10_000]))
        self.described.start()
        assert (self.export(), self.suggest(samples)) == before

    def report(self):
        n = self.rng.choice([1, 2, 3, 10, 30, 1000])
        company = self.rng.choice([None, *self.COMPANIES])
        sure = [each["confidence"] for each in self.described.bookings.values()]
        level = self.rng.choice(sure or [None]) or 0.5  # the very one of a prediction
        query = f"?book_from={level}" + (f"&company={quote(company)}" if company else "")
        status, said = self.ask("GET", f"/report/{n}{query}")
        if said:
            del said["switch_on"]  # it is null of so few
            for line in said["confidence"]:
                assert (line.pop("error") is None) == (line["accuracy"] is None)
        levels = sorted({0.5, 0.8, 0.9, 0.95, 0.99, level})
        described, report = self.described.report(n, company, levels)
        assert status == described
        if report:
            confused = report.pop("confused")
            most = sorted(confused.values(), reverse=True)[: len(said["confused"])]
            assert bool(most) == bool(confused)
            assert [each["count"] for each in said["confused"]] == most
            for each in said.pop("confused"):
                assert confused[each["booked"], each["predicted"]] == each["count"]
        assert nearly(said) == nearly(report)

    def metrics(self):
        n = self.rng.choice([1, 2, 3, 10, 30, 1000])
        company = self.rng.choice([None, None, *self.COMPANIES])
        query = f"?company={quote(company)}" if company else ""
        status, report = self.described.report(n, company, ())
        figures = report and {key: report[key] for key in ("precision", "recall")}
        assert nearly(self.ask("GET", f"/metrics/{n}{query}")) == nearly((status, figures))

    def watch(self):
        figures = {
            sample.name.removeprefix("bookkeep_"): sample.value
            for family in watched(self.service).values()
            for sample in family.samples
        }
        described = self.described.watched()
        assert nearly({name: figures.get(name) for name in described}) == nearly(described)
        assert figures["log_bytes"] == len(self.export())
        assert ("last_batch_recall" in figures) == ("last_batch_recall" in described)

    def overview(self):
        company = self.rng.choice([None, *self.COMPANIES])
        query = f"?company={quote(company)}" if company else ""
        status, said = self.ask("GET", f"/overview{query}")
        described, overview = self.described.overview(company)
        if said:
            assert said.pop("health").items() >= self.described.health().items()
            del said["switch_on"]
            for line in said["confidence"]:
                assert (line.pop("error") is None) == (line["accuracy"] is None)
        assert (status, nearly(said)) == (described, nearly(overview))

    def predict(self):
        samples, accounts = self.samples(), self.described.accounts()
        suggested = self.suggest(samples)
        status, predicted = self.ask("POST", "/predict", samples)
        assert status == (200 if accounts or not samples else 503)
        if status == 200:
            self.described.counted["predictions"] += len(samples)
            assert predicted == [answer["suggestions"][0]["account"] for answer in suggested]
        for answer in suggested or ():
            names = [suggestion["account"] for suggestion in answer["suggestions"]]
            assert len(set(names)) == len(names) <= 3
            assert accounts.issuperset(names)
            if (answer["suggestions"][0]["confidence"] or 0) < 0.5:
                assert answer["decision"] == "review"
            else:
                assert answer["decision"] == ("check" if answer["check"] else "book")

    def suggest(self, samples):
        status, answers = self.ask("POST", "/suggest?top=3&book_from=0.5", samples)
        assert status == (200 if self.described.accounts() or not samples else 503)
        self.described.counted["predictions"] += len(answers or ())
        return answers

    def page(self):
        company, reviewed = self.rng.choice([None, *self.COMPANIES]), self.rng.choice([None, "no"])
        below, order = self.rng.choice([None, 0.5]), self.rng.choice([None, "confidence"])
        asked = {"company": company, "reviewed": reviewed, "below": below, "order": order}
        query = "".join(f"&{name}={quote(str(value))}" for name, value in asked.items() if value)
        status, described = self.described.page(**asked)
        found, before = [], ""
        while before is not None:
            answered, answer = self.ask("GET", f"/bookings?limit=25{query}{before}")
            assert answered == status
            if not answer:
                return
            found += answer["bookings"]
            before = answer["next"] and f"&before={answer['next']}"
        assert found == described
        seq = self.rng.randrange(len(self.described.lines) + 1)
        is_there = seq in self.described.bookings
        one = (200, self.described.standing(seq)) if is_there else (404, None)
        assert self.ask("GET", f"/bookings/{seq}") == one

    def export(self, query=""):
        return self.ask("GET", f"/samples{query}", kind="application/jsonl")[1]

    def slice(self):
        first, limit = (self.rng.randrange(len(self.described.lines) + 2) for _ in range(2))
        limit = self.rng.choice([limit % 9, 1000])
        assert self.read(first, limit) == self.described.lines[first : first + limit]

    def read(self, first, limit=999):
        """These lines, without their checksums, which are right."""
        lines = []
        for text in self.export(f"?from={first}&limit={limit}").decode().splitlines():
            content, crc = re.fullmatch(r'(.*), "crc": (\d+)} *', text).groups()
            assert zlib.crc32(content.encode()) == int(crc)
            lines.append(json.loads(content + "}"))
        return lines


def test_random_requests_are_answered_as_the_documents_say(serve, tmp_path):
    """160 steps, or eight times BOOKKEEP_ROUNDS, 400 on each log, also over restarts and kills."""
    steps = int(os.environ.get("BOOKKEEP_ROUNDS", 20)) * 8
    seed = int(os.environ.get("BOOKKEEP_SEED", random.randrange(10**6)))
    print(f"BOOKKEEP_SEED={seed}")
    rng = random.Random(seed)
    for number in range(0, steps, 400):
        context = rng.choice([[], ["Department", "Note"]])
        options = [f"--context={','.join(context)}"] if context else []
        start = partial(serve, *options, log=tmp_path / f"{number}.jsonl")
        walk = Walk(start, rng, context)
        for _ in range(min(400, steps - number)):
            walk.step()
        walk.service.stop()


# ----------------------------------------------------------------------------------------- Server


def served(app, ask, threads=2):
    """What `ask` says, called with the port of a server of this app that this thread answers for.

    It is called by another thread.
    """
    asked, listener = Future(), socket.create_server(("127.0.0.1", 0))
    before = [signal.getsignal(number) for number in bookkeep.STOPS]
    server = bookkeep.Server(app, listener, threads, 1000, lambda authorization: True)

    def run():
        try:
            asked.set_result(ask(listener.getsockname()[1]))
        except BaseException as error:
            asked.set_exception(error)

    threading.Thread(target=run).start()
    try:
        server.answer(until=asked)
        signal.raise_signal(signal.SIGTERM)
        assert server.answer()
    finally:
        for number, handler in zip(bookkeep.STOPS, before, strict=True):
            signal.signal(number, handler)
    return asked.result()


def exchange(port, sent):
    """The start of what comes back on a connection of its own."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(sent)
        return connection.recv(15)


@pytest.mark.parametrize(
    ("sent", "by_receiver"),
    [
        (request("/predict", booking()), True),
        (request("/predict", booking()).replace(b"{", b" \r\n{", 1)[:-3], True),
        (request("/predict", [booking()]), False),
        (request("/predict", json.dumps(booking())), False),
        (request("/predict", booking(Note="x" * 1024)), False),
        (request("/predict", booking(), Bookkeep_At_Least="1"), False),
        (request("/suggest", booking()), False),
        (request("/sample", [booking()]), False),
        (request("/health", method="GET"), False),
    ],
    ids=lambda value: str(value)[2:20],
)
def test_only_a_short_question_is_answered_by_the_thread_that_received_it(sent, by_receiver):
    threads = []

    def app(environ, start):
        threads.append(threading.get_ident())
        start("200 OK", [("Content-Length", "0")])
        return []

    assert served(app, lambda port: exchange(port, sent)) == b"HTTP/1.1 200 OK"
    assert (threads[0] == threading.get_ident()) == by_receiver


def test_short_questions_are_answered_in_turn_and_keep_nobody_else():
    answered, looked = Counter(), []

    def app(environ, start):
        if environ["PATH_INFO"] == "/predict":
            time.sleep(0.002)  # so that all together never end
        start("200 OK", [("Content-Length", "0")])
        return []

    def ask(port):
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for connection in connections:
            connection.sendall(request("/predict", booking()))
        while answered.total() < 400:
            ready, _, _ = select.select(connections, [], [], 10)
            for connection in ready:
                assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK")
                answered[connection] += 1
                connection.sendall(request("/predict", booking()))
            if answered.total() > 40 * len(looked):
                looked.append(exchange(port, request("/health", method="GET")))
        for connection in connections:
            connection.close()

    served(app, ask)
    assert {*looked} == {b"HTTP/1.1 200 OK"}
    assert min(answered.values()) > 10


def test_long_questions_keep_nobody_from_looking_and_booking():
    go_on = threading.Event()

    def app(environ, start):
        assert environ["PATH_INFO"] != "/suggest" or go_on.wait(30)
        start("200 OK", [("Content-Length", "0")])
        return []

    def ask(port):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as asking:
            asking.sendall(request("/suggest", [booking()]))
            said = [
                exchange(port, request("/health", method="GET")),
                exchange(port, request("/sample", [booking()])),
                exchange(port, request("/predict", booking())),
            ]
            go_on.set()
            return [*said, asking.recv(15)]

    assert served(app, ask, threads=1) == [b"HTTP/1.1 200 OK"] * 4


HANGING = """
import os, sys, time, bookkeep
fsync = os.fsync
def hang(file):
    while os.path.exists("{0}"):
        open("{0}.held", "w").close()
        time.sleep(0.01)
    fsync(file)
os.fsync = hang
sys.exit(bookkeep.main())
"""


def test_who_waits_for_the_disk_keeps_nobody_else(serve, tmp_path):
    hanging = tmp_path / "hanging"
    service = serve("--threads=2", program=("-c", HANGING.format(hanging)))
    for _ in range(2):
        service.post("/sample", [booking()])
    hanging.touch()
    answers = []
    changes = [("POST", "/sample", [booking()])] * 20
    changes += [("POST", "/correct", {"seq": 0, "AccountNumber": "1"}), ("DELETE", "/company/B")]
    changing = [
        threading.Thread(target=lambda change=change: answers.append(service.ask(*change)[0]))
        for change in changes
    ]
    for number, thread in enumerate(changing):
        thread.start()
        if number == 0:
            wait_until(hanging.with_suffix(".held").exists)
    for _ in range(3):
        for path in ("/health", "/report/1", "/overview", "/bookings"):
            assert service.get(path)[0] == 200
        assert service.ask("GET", "/samples", kind="application/jsonl")[0] == 200
        assert "bookkeep_waiting" in watched(service)
        assert service.post("/predict", booking())[0] == 200
        assert service.post("/predict", [booking()] * 9)[0] == 200
        assert service.post("/suggest", booking())[0] == 200
    assert answers == []
    hanging.unlink()
    for thread in changing:
        thread.join()
    assert Counter(answers) == {200: 21, 404: 1}


def held_by(process):
    """Bytes of memory, and of files without a name, that a process holds."""
    status, files = Path(f"/proc/{process.pid}/status").read_text(), 0
    for file in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            files += file.stat().st_size if "deleted" in os.readlink(file) else 0
    return 1024 * int(re.search(r"VmRSS:\s+([0-9]+) kB", status)[1]) + files


def test_a_strangers_long_body_is_not_received(serve, tmp_path):
    (tmp_path / "token").write_text("secret")
    service = serve(f"--token-file={tmp_path / 'token'}")
    before = held_by(service.process)
    for more in ({"Content_Length": 16_000_000}, {"Transfer_Encoding": "chunked"}):
        for wrong in ("", "Bearer secrets"):
            head = request("/sample", Authorization=wrong, **more)
            if "Transfer_Encoding" in more:
                head = head.replace(b"Content-Length: 0\r\n", b"") + b"f00000\r\n"
            pushing = [
                socket.create_connection(("127.0.0.1", service.port), timeout=10) for _ in range(5)
            ]
            for connection in pushing:
                with suppress(ConnectionError):
                    connection.sendall(head)
                    said = connection.recv(15)  # before any of its body
                    assert said == b"HTTP/1.1 401 Un"
                    for _ in range(15):
                        connection.sendall(b" " * 1_000_000)
                    raise AssertionError("all of it was received")
                connection.close()
    assert held_by(service.process) < before + 10_000_000
    # With the token, it is, and a short one is received from anybody.
    body = json.dumps([booking(Note="x" * 9000)] * 30).encode()
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        answers = connection.makefile("rb")
        connection.sendall(request("/sample", [booking()], Authorization=""))
        assert answer(answers)[0].startswith(b"HTTP/1.1 401 ")
        head = request("/sample", Content_Length=len(body), Expect="100-continue")
        connection.sendall(head)
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert answer(answers)[0].startswith(b"HTTP/1.1 200 ")
    assert service.samples() == 30
    assert "Traceback" not in service.said()


def test_few_files_are_enough_and_stalled_uploads_stop_nobody(serve):
    service = serve(limit=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (100, 100)))
    stalled = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(5)]
    for connection in stalled:
        connection.sendall(request("/sample", Content_Length=2_000_000) + b" " * 600_000)
    statuses = []

    def ask():
        for _ in range(10):
            statuses.append(service.post("/sample", [booking()])[0])
            statuses.append(service.post("/predict", booking())[0])

    asking = [threading.Thread(target=ask) for _ in range(20)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    for connection in stalled:
        connection.close()
    assert Counter(statuses) == {200: 400}
    assert not re.search("exception|Too many open files", service.said())


def test_a_valid_booking_is_never_refused_for_good_while_the_service_starts(serve, path):
    """Six connections post while a log of 3,000 lines is read back, eight times."""
    with bookkeeping(path) as keeper:
        keeper.book(bookings(3000))
    whole, statuses = path.read_bytes(), Counter()

    def post(port, number):
        """Books until it has been told five times that it is done; the body after the headers."""
        stored, connection = 0, None
        while stored < 5:
            sent = request("/sample", [booking(text=f"mine {number} {stored}")])
            try:
                if connection is None:
                    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
                    answers = connection.makefile("rb")
                connection.sendall(sent[: sent.index(b"[")])
                connection.sendall(sent[sent.index(b"[") :])
                status = int(answer(answers)[0].split()[1])
            except ConnectionError:  # it does not listen yet
                time.sleep(0.01)
                continue
            statuses[status] += 1
            stored += status == 200
            if status not in (200, 503):
                return

    for _ in range(8):
        path.write_bytes(whole)
        port = free_port()
        posting = [threading.Thread(target=post, args=(port, number)) for number in range(6)]
        for thread in posting:
            thread.start()
        service = serve("--threads=1", log=path, port=port)  # so that requests queue
        for thread in posting:
            thread.join()
        service.stop(signal.SIGKILL)
        assert {*statuses} <= {200, 503}, statuses
        texts = [record["sample"]["BankEntryText"] for record in scanned(path)[3000:]]
        assert sorted(texts) == sorted(f"mine {n} {i}" for n in range(6) for i in range(5))
    assert {*statuses} == {200, 503}


def test_a_signal_stops_it_cleanly_and_a_start_knows_all(serve):
    samples, known, service = bookings(600), None, serve()
    for number, mine in zip(bookkeep.STOPS, batches_of(samples, 200), strict=True):
        for batch in batches_of(mine, 70):
            assert service.post("/sample", batch)[0] == 200
        known = service.get("/metrics/100"), service.post("/predict", samples)
        assert service.stop(number) == 0
        said = service.said()
        assert f"serving on http://127.0.0.1:{service.port}" in said
        assert f"stopping on {number.name}" in said
        assert said.rstrip().endswith("stopped")
        assert "Traceback" not in said
        service = serve()
        assert (service.get("/metrics/100"), service.post("/predict", samples)) == known
    assert "600 bookings read back" in service.said()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])  # nohup; & in a script
def test_a_signal_that_is_ignored_when_it_starts_does_not_stop_it(serve, number):
    service = serve(limit=partial(signal.signal, number, signal.SIG_IGN))
    service.process.send_signal(number)
    assert service.samples() == 0
    assert service.stop() == 0
    assert number.name not in service.said()


def test_those_who_ask_for_more_at_once_than_they_read_keep_no_thread(serve):
    """Before a second answer, a thread would wait until the long first one is read."""
    service = serve("--threads=4")
    for _ in range(4):
        service.post("/sample", [booking(Note="x" * 9900)] * 1000)
    asking = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(8)]
    for connection in asking:
        connection.sendall(request("/samples", method="GET") + request("/health", method="GET"))
    wait_until(lambda: select.select(asking, [], [], 0)[0] == asking)
    for _ in range(8):
        assert service.get("/health")[0] == 200
    for connection in asking:
        connection.close()


def test_a_key_whose_bookings_were_forgotten_is_no_answer_for_others(keeper):
    samples = [booking(company="A"), booking(company="B")]
    assert keeper.book(samples, "import") == keeper.book(samples, "import") == range(2)
    keeper.forget("A")
    for again in (samples, [booking(company="C"), samples[1]]):
        with pytest.raises(Conflict, match="were forgotten; take a new Idempotency-Key"):
            keeper.book(again, "import")
    assert keeper.book(samples, "import again") == range(2, 4)


def test_headers_that_are_long_or_come_twice_are_refused(service):
    twice = request("/sample", [], Idempotency_Key="a").replace(
        b"\r\n\r\n", b"\r\nIdempotency-Key: b\r\n\r\n"
    )
    long = b"GET /health HTTP/1.1\r\nX: ".ljust(1 << 14, b"x")  # all of which is received
    for sent, status in ((twice, b"400"), (long, b"431")):
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
            connection.sendall(sent)
            assert connection.makefile("rb").readline().split()[1] == status


def test_what_is_whole_is_answered_before_it_stops_and_nobody_else_keeps_it(serve, tmp_path):
    """The disk hangs; somebody has sent half, reads nothing, goes on asking, or does nothing."""
    hanging, log = tmp_path / "hanging", tmp_path / "log.jsonl"
    service = serve(program=("-c", HANGING.format(hanging)))
    service.post("/sample", [booking(Note="x" * 9000)] * 1000)
    hanging.touch()
    answers, asked = [], []

    def ask():
        with (
            suppress(ConnectionError, IndexError),
            socket.create_connection(address, timeout=30) as mine,
        ):
            file = mine.makefile("rb")
            while True:
                mine.sendall(request("/predict", booking()))
                asked.append(answer(file)[0])

    address = ("127.0.0.1", service.port)
    half, late, idle, slow = (socket.create_connection(address, timeout=30) for _ in range(4))
    booking_on = threading.Thread(
        target=lambda: answers.append(service.post("/sample", [booking()])[0])
    )
    asking = threading.Thread(target=ask)
    booking_on.start()
    asking.start()
    wait_until(hanging.with_suffix(".held").exists)
    body = request("/sample", [booking()])
    half.sendall(body[:-5])
    late.sendall(body[:-5])
    slow.sendall(request("/samples", method="GET"))
    assert slow.recv(15) == b"HTTP/1.1 200 OK"
    wait_until(lambda: asked)
    started = time.monotonic()
    service.process.terminate()
    asking.join()
    assert idle.recv(10) == b""
    assert time.monotonic() - started < 2
    late.sendall(body[-5:])
    assert half.recv(10) == b""
    assert 3 < time.monotonic() - started < 6
    time.sleep(0.5)  # whoever has sent all is waited for, however long
    assert service.process.poll() is None
    hanging.unlink()
    booking_on.join()
    assert answers == [200]
    assert late.recv(15) == b"HTTP/1.1 200 OK"
    assert service.process.wait(5) == 0
    assert len(scanned(log)) == 1002
    for connection in (half, late, idle, slow):
        connection.close()


# ----------------------------------------------------------------------------------- Command line


def test_help_explains_each_option():
    status, text, _ = run(SERVICE, "--help")
    assert status == 0
    usage, _, explained = text.partition("options:")
    options = re.findall(r"(--[a-z-]+)", usage)
    assert {"--host", "--port", "--log", "--threads", "--token-file", "--version"} <= {*options}
    for option in options:
        assert re.search(rf"^ +(-h, )?{option}( [A-Z_]+)?\s+\w.{{9,}}", explained, re.MULTILINE)
        variable = f"BOOKKEEP_{option[2:].upper().replace('-', '_')}"
        assert (f"{variable})" in explained) == (option not in ("--help", "--version"))
    assert run(SERVICE, "--version")[1] == f"bookkeep {bookkeep.__version__}\n"


@pytest.mark.parametrize(
    ("options", "variables", "said"),
    [
        (["--port=x"], {}, "x is no whole number from 0 to 65535"),
        (["--port=70000"], {"BOOKKEEP_PORT": "1"}, "70000 is no whole number from 0 to 65535\n"),
        (["--threads=0"], {}, "0 is no whole number from 1 to 1000"),
        (["--nonsense"], {}, "unrecognized arguments: --nonsense"),
        ([], {"BOOKKEEP_PORT": "tcp://10.0.0.1:8080"}, "65535, as BOOKKEEP_PORT says\n"),
        ([], {"BOOKKEEP_MAX_BATCH": "1_0"}, ", as BOOKKEEP_MAX_BATCH says\n"),
        ([], {"BOOKKEEP_OPEN": "maybe"}, "maybe is neither yes nor no, as BOOKKEEP_OPEN says\n"),
        ([], {"BOOKKEEP_NAME": "https://a.example"}, ", as BOOKKEEP_NAME says\n"),
        ([], {"BOOKKEEP_NAME": ""}, ", as BOOKKEEP_NAME says\n"),
    ],
    ids=str,
)
def test_options_and_variables_that_make_no_sense_are_refused(
    monkeypatch, capsys, options, variables, said
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        bookkeep.main([*options, "check", "/no/log"])
    assert said in capsys.readouterr().err


def test_variables_set_options_that_are_not_given(serve, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("s3cret")
    for name, value in {
        **{"HOST": "::1", "PORT": "1", "LOG": "/dev/null/log", "OPEN": "no", "THREADS": "none"},
        **{"TOKEN_FILE": str(tmp_path / "token"), "MAX_BATCH": "1"},
    }.items():
        monkeypatch.setenv(f"BOOKKEEP_{name}", value)
    service = serve("--host=127.0.0.1", "--threads=2")
    assert service.post("/sample", [])[0] == 401
    for samples, status in (([booking()], 200), ([booking()] * 2, 400)):
        headers = {"Authorization": "Bearer s3cret"}
        assert service.ask("POST", "/sample", samples, headers=headers)[0] == status


def test_a_proxy_may_call_it_by_names_that_are_given(serve):
    service = serve("--name=Books.example,10.0.0.7")
    for host in ("books.example", "BOOKS.EXAMPLE:443", "10.0.0.7", "localhost"):
        assert service.ask("GET", "/health", headers={"Host": host})[0] == 200
    for host in ("example", "evil.books.example", "books.example.evil", "books.example,10.0.0.7"):
        assert service.ask("GET", "/health", headers={"Host": host})[0] == 403


def test_importing_starts_nothing(tmp_path):
    status, out, said = run("-c", "import bookkeep, replay", cwd=tmp_path, env={"PYTHONPATH": HERE})
    assert (status, out, said, list(tmp_path.iterdir())) == (0, "", "", [])


def test_who_has_seen_enough_of_a_command_ends_it_quietly(path):
    written(path, [[{}]])
    command = [sys.executable, SERVICE, "check", path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(30)) == (b"", 141)


def test_alone_in_a_folder_it_books_predicts_measures_and_recovers(serve, tmp_path):
    program = tmp_path / "alone" / "bookkeep.py"
    program.parent.mkdir()
    program.write_bytes(SERVICE.read_bytes())
    service = serve(program=[program])
    for _ in range(2):
        assert service.post("/sample", [booking()])[0] == 200
    service.stop(signal.SIGKILL)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    service = serve(program=[program])
    assert "the batch is unfinished; a start cuts off" in service.said()
    assert service.post("/sample", [booking()])[1]["total"] == 2
    assert service.post("/predict", booking()) == (200, ["3115"])
    assert service.get("/metrics/9") == (200, {"precision": 1, "recall": 1})
    assert service.post("/correct", {"seq": 0, "AccountNumber": "1"})[0] == 200
    assert service.delete("/company/A") == (200, {"company": "A", "forgotten": 2})
    for path in ("/", "/openapi.json", "/report/9", "/bookings", "/suspects"):
        status, answer = service.get(path)
        assert (status, "bookkeep_extra" in answer["error"]) == (404, True)
    assert service.get("/metrics")[0] == 404
    status, out, said = run(program, "check", log)
    assert (status, out) == (1, "")
    assert said == "bookkeep: this needs bookkeep_extra beside bookkeep.py, which is missing\n"


READING_SLOWLY = """
import os, sys, time, bookkeep
scan = bookkeep.scan
def slowly(*arguments):
    for number, found in enumerate(scan(*arguments)):
        while number == 5 and os.path.exists("{}"):
            time.sleep(0.01)
        yield found
bookkeep.scan = slowly
sys.exit(bookkeep.main())
"""


@pytest.mark.parametrize("then", ["ready", "damaged", "stopped"])
def test_while_a_log_is_read_back_it_says_how_far_and_nothing_else(serve, path, tmp_path, then):
    with bookkeeping(path) as keeper:
        for batch in batches_of([booking(Note="x" * 9_000) for _ in range(400)], 50):
            keeper.book(batch)
    if then == "damaged":
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:320], b"?" + lines[320], *lines[321:]]))
    reading = tmp_path / "reading"
    reading.touch()
    service = serve(log=path, program=("-c", READING_SLOWLY.format(reading)), reads=False)
    wait_until(lambda: ", 2 of" in service.get("/health")[1]["error"])
    for method, name in (("GET", "/health"), ("GET", "/"), ("POST", "/sample"), ("PUT", "/x")):
        status, headers, answer = service.ask(method, name, [booking()])
        assert (status, headers["Retry-After"]) == (503, "1")
        assert answer == {"error": "the log is being read back, 2 of 3 MB so far"}
        assert headers["X-Content-Type-Options"] == "nosniff"
    if then == "stopped":
        assert service.stop() == 0
        assert service.said().endswith("stopped before it was done\n")
        return
    reading.unlink()
    if then == "damaged":
        assert service.process.wait(30) == 1
        assert "is damaged, line 321" in service.said()
    else:
        wait_until(lambda: service.answers() == 200)
        assert service.samples() == 400
        assert service.stop() == 0
    assert "Traceback" not in service.said()


def test_a_signal_that_comes_when_the_log_has_been_read_stops_it(serve):
    code = (
        "import os, signal, sys, bookkeep; made = bookkeep.create_app\n"
        "def app(*options):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return made(*options)\n"
        "bookkeep.create_app = app\n"
        "sys.exit(bookkeep.main())"
    )
    service = serve(program=("-c", code), reads=False)
    assert service.process.wait(5) == 0


@pytest.mark.parametrize("accident", ["moved", "replaced", "deleted", "cut"])
def test_a_log_that_is_moved_under_the_service_is_not_written(path, accident, caplog):
    away = path.with_name("away")
    with bookkeeping(path) as keeper:
        keeper.book([booking()] * 3, "mine")
        whole = path.read_bytes()
        if accident == "cut":  # as logrotate's copytruncate does
            os.truncate(path, 0)
        else:
            os.link(path, away)
            path.unlink()
        if accident == "replaced":
            path.write_bytes(whole)
        for change in (
            partial(keeper.book, [booking(account="2")] * 3),
            partial(keeper.book, [booking()] * 3, "mine"),  # nor is it said to be stored
            partial(keeper.correct, 0, "2"),
            partial(keeper.forget, "A"),
        ):
            with pytest.raises(NotStored, match=r"could not be (written|read)"):
                change()
        assert "moved, replaced, deleted or cut" in caplog.text
        with pytest.raises(NotReady, match="put it back"):
            bookkeep.health(keeper)
        assert keeper.books.predict([booking()]) == ["3115"]
        if accident == "cut":
            path.write_bytes(whole)
        else:
            away.rename(path)
        assert bookkeep.health(keeper)["samples"] == 3
        assert keeper.book([booking(account="2")] * 3) == range(3, 6)
    assert len(read(path)) == 6


@pytest.fixture
def failed(monkeypatch, capsys):
    """Runs a command that cannot do what it is to do, and gives the sentence that it says."""
    monkeypatch.setattr(bookkeep, "on_signals", lambda handler: None)  # they are the tests' own

    def run(*arguments):
        assert bookkeep.main([str(each) for each in arguments]) == 1
        out, said = capsys.readouterr()
        assert (out, said.count("\n"), said[:10]) == ("", 1, "bookkeep: ")
        return said[10:-1]

    return run


def test_what_keeps_it_from_starting_is_said_in_one_line(path, tmp_path, failed):
    other, taken = f"--log={tmp_path / 'other'}", socket.create_server(("127.0.0.1", 0))
    with bookkeeping(path) as keeper:
        keeper.book([booking()])
        assert failed(f"--log={path}", "--port=0") == f"{path} is in use by another process"
    port = taken.getsockname()[1]
    assert failed(other, f"--port={port}").startswith(f"cannot listen on 127.0.0.1, port {port}: ")
    for options, said in (
        (["--host=no.such.host.invalid"], "cannot listen on no.such.host.invalid, port 0: "),
        (["--host=0.0.0.0"], "0.0.0.0 can be reached from other machines: set a token"),
        ([f"--token-file={path}"], "a token must be printable ASCII characters"),
        (["--token-file=/no/token"], "/no/token: No such file or directory"),
    ):
        assert failed(other, "--port=0", *options).startswith(said)
    os.mkfifo(tmp_path / "fifo")
    for log in ("/dev/null", "/dev/full", tmp_path / "fifo"):
        assert failed(f"--log={log}", "--port=0") == f"{log} is no regular file"
    for log, why in (("/proc/log", "No such"), (tmp_path, "Is a dir"), (path / "log", "Not a dir")):
        assert failed(f"--log={log}", "--port=0").startswith(f"cannot open {log}: {why}")
    path.write_bytes(b"nonsense\n" + path.read_bytes())
    before = path.read_bytes()
    assert "is damaged, line 1: no log starts like this; " in refused(path)
    assert path.read_bytes() == before


def checked(log, capsys):
    """The problems that a check of a log prints."""
    status = logs.check(log)
    *problems, end = capsys.readouterr().out.splitlines()
    whole = sum("sample" in record for record in scanned(log))
    counted = f"{len(problems) or 'no'} problem{'s' * (len(problems) != 1)}"
    assert end == f"{log}: {whole} booking{'s' * (whole != 1)} in whole batches, {counted}"
    assert status == bool(problems)
    return [problem.removeprefix(f"{log}, ") for problem in problems]


def relearned(log, capsys, books=None):
    """The log that is made of another, which stays as it is, and what is said to be left out."""
    before, new = log.read_bytes(), log.with_name("new.jsonl")
    status = logs.relearn(log, new, books or Books())
    *left_out, end = capsys.readouterr().out.splitlines()
    assert log.read_bytes() == before
    assert checked(new, capsys) == []
    whole = sum("sample" in record for record in scanned(new))
    assert end == f"{new}: {whole} booking{'s' * (whole != 1)} learned anew"
    assert status == bool(left_out)
    assert all(each.endswith("; left out") for each in left_out)
    return new, [each.removeprefix(f"{log}, ").removesuffix("; left out") for each in left_out]


def test_a_log_that_is_relearned_by_its_own_version_is_the_same(path, capsys):
    with bookkeeping(path) as keeper:
        for number, batch in enumerate(batches_of(bookings(300), 7)):
            who = ("person", "check", "suggestion")[number % 3]
            keeper.book(
                [by(who, sample) for sample in batch], (number % 2 and f"key{number}") or None
            )
        for seq in (4, 250, 4, 20):  # what was booked unseen, too
            keeper.correct(seq, f"account{seq % 3}")
    assert checked(path, capsys) == []
    new, left_out = relearned(path, capsys)
    assert left_out == []
    assert new.read_bytes() == path.read_bytes()


def test_what_is_whole_of_a_damaged_log_is_relearned(path, capsys):
    with bookkeeping(path) as keeper:
        keeper.book([booking("gone")] * 3)
        for number in range(8):
            batch = [booking(account=str(number), Note=f"{number}{i}") for i in range(3)]
            keeper.book(batch, f"key{number}" if number % 2 else None)
        keeper.book([by("suggestion")], "unseen")
        keeper.correct(4, "corrected")
        keeper.correct(7, "lost")
        keeper.correct(27, "3115")
        keeper.forget("gone")
        keeper.book([booking()] * 2)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[7] = lines[7].replace(b"rent", b"Rent")  # of batch 1, seq 6 to 8
    lines.insert(10, b"inserted\n")  # in batch 2
    lines.insert(14, lines[3])  # in batch 3
    del lines[17:19]  # of batch 4, seq 15 to 17
    lines[-1] = lines[-1][:50]
    path.write_bytes(b"".join(lines))
    problems = [
        "line 8: the checksum does not fit",
        "line 11: the checksum does not fit",
        "line 15: booking 3 does not belong here",
        "line 18: 2 bookings are missing before it",
        "line 32: the batch is unfinished; a start cuts off",
    ]
    found = checked(path, capsys)
    assert [each[: len(problem)] for each, problem in zip(found, problems, strict=True)] == problems
    new, left_out = relearned(path, capsys)
    assert sorted({*left_out} - {*found}) == ["line 30: it corrects no booking before it"]
    kept = {record["seq"]: record for record in scanned(new)}
    assert [*kept] == list(range(31))
    missing = {0, 1, 2, 6, 7, 8, 15, 16, 17, 29}
    assert {seq for seq, record in kept.items() if record.keys() == {*bookkeep.PLACE}} == missing
    assert kept[28].items() >= {"corrects": 4, "AccountNumber": "corrected"}.items()
    assert kept[30].items() >= {"corrects": 27, "AccountNumber": "3115"}.items()
    with bookkeeping(new) as keeper:
        assert_true_to_log(keeper)
        batch = [booking(account="3", Note=f"3{i}") for i in range(3)]
        assert keeper.book(batch, "key3") == range(12, 15)
        assert keeper.correct(4, "2") == "corrected"
        assert views.booking(keeper, 27)["booked_by"] == "person"
        for seq in (0, 6, 17, 29):
            with pytest.raises(NotFound):
                keeper.correct(seq, "2")


OLD = [  # lines as 0.4.0 wrote them
    {
        **{"seq": 0, "batch": "may", "left": 0, "sample": booking("A", "rent May", account="1")},
        **{"predicted": None, "margin": None, "confidence": None, "rank": None, "known": 0},
        **{"weight": 1.0, "against": {}},
    },
    {
        **{"seq": 1, "batch": 1, "left": 0, "sample": booking("A", "rent June", account="2")},
        **{"predicted": "1", "margin": None, "confidence": 0.0, "rank": None, "known": 4},
        **{"weight": 1.0, "against": {}},
    },
    {
        **{"seq": 2, "batch": 2, "left": 0, "sample": by("suggestion", text="rent", account="1")},
        **{"predicted": "1", "margin": 0.0, "confidence": 0.0, "rank": 1, "known": 4},
        **{"reviewed": False},
    },
    {
        **{"seq": 3, "batch": 3, "left": 0, "corrects": 1, "AccountNumber": "1"},
        **{"weight": 0.720703125, "against": {"2": 0.9609375}},
    },
]


@pytest.mark.parametrize("lacking", [[], ["known"], ["known", "against"]], ids=["4", "2", "1"])
def test_a_log_of_before_is_refused_and_relearned(path, capsys, failed, lacking):
    path.parent.mkdir()
    lines = [changed(line_of(record), **dict.fromkeys(lacking)) for record in OLD]
    path.write_bytes(b"".join(lines))
    log = Log(path)
    anew = f"give the options of this start to: python bookkeep.py relearn {path} NEW"
    expected = f"{path}, line 1: a version before 0.5 wrote it; to learn it anew, {anew}"
    with pytest.raises(LogError, match=f"^{re.escape(expected)}$"):
        Bookkeeper(log)
    log.close()
    assert failed(f"--log={path}", "--port=0") == expected
    assert b"".join(lines) == path.read_bytes()
    assert checked(path, capsys)[0] == "line 1: a version before 0.5 wrote it"
    new, left_out = relearned(path, capsys)
    assert left_out == []
    keys = ("seq", "batch", "left", "sample", "corrects", "AccountNumber", "reviewed")
    made = scanned(new)
    for record, before in zip(made, OLD, strict=True):
        assert {k: v for k, v in record.items() if k in keys} == {
            k: v for k, v in before.items() if k in keys
        }
    assert [record["against"] for record in (made[0], made[1], made[3])] == [[], [], ["2"]]
    with bookkeeping(new) as keeper:
        assert_true_to_log(keeper)
        assert keeper.book([booking("A", "rent May", account="1")], "may") == range(1)


def test_a_record_that_makes_no_sense_is_left_out_alone(path, capsys):
    with bookkeeping(path) as keeper:
        keeper.book([booking(), booking(), booking()])
        for seq in (0, 1, 2):
            keeper.correct(seq, "1")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = changed(lines[1], sample=booking(account=""))
    lines[3] = changed(lines[3], corrects=99)
    lines[5] = changed(lines[5], AccountNumber="")
    path.write_bytes(b"".join(lines))
    new, left_out = relearned(path, capsys)
    assert [each[:7] for each in left_out] == ["line 2:", "line 4:", "line 5:", "line 6:"]
    with bookkeeping(new) as keeper:
        assert bookkeep.health(keeper)["samples"] == 2
        assert_true_to_log(keeper)


def test_a_check_says_once_what_is_no_log_and_relearn_overwrites_nothing(path, capsys, failed):
    written(path, [])
    assert checked(path, capsys) == []
    path.write_bytes(b"a,b\n" * 1000)
    assert checked(path, capsys) == ["line 1: no log starts like this"]
    for name in ("there", "link"):
        new = path.with_name(name)
        new.symlink_to("nowhere") if name == "link" else new.write_text("precious")
        said = failed("relearn", path, new)
        assert said == f"{new} is there already; move it away first"
    assert path.with_name("there").read_text() == "precious"
    none, new = path.with_name("none"), path.with_name("new")
    for command in (["check", none], ["relearn", none, new]):
        assert failed(*command) == f"{none}: No such file or directory"
    assert not new.exists()


@pytest.mark.parametrize("command", ["check", "relearn"])
def test_a_command_that_is_interrupted_says_so_and_leaves_no_half_copy(tmp_path, command):
    with bookkeeping(tmp_path / "whole") as keeper:
        keeper.book([booking()])
    log, new = tmp_path / "log", tmp_path / "folder" / "new"  # a pipe, at which it waits for more
    os.mkfifo(log)
    new.parent.mkdir()
    arguments = [log] if command == "check" else [log, new]
    process = subprocess.Popen(
        [sys.executable, SERVICE, command, *arguments], stderr=subprocess.PIPE, text=True
    )
    pipe = os.open(log, os.O_RDWR)
    os.write(pipe, (tmp_path / "whole").read_bytes())
    wait_until(lambda: fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)) == bytes(4))
    wait_until(lambda: ") S " in Path(f"/proc/{process.pid}/stat").read_text())  # it waits there
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    os.close(pipe)
    assert process.returncode == 130
    assert said.endswith("stopped before it was done\n")
    assert "Traceback" not in said
    assert list(new.parent.iterdir()) == []


# What is learned from other keys, and predicted instead of the account


EIGHT = [f"--context={','.join('ABCDEFGH')}"]
KEYS = [  # options, what is said of them
    (["--context=BankEntryText"], "BankEntryText cannot be a context"),
    (["--context=Department,BankEntryDate"], "BankEntryDate cannot be a context"),
    (["--context=Id"], "Id cannot be a context"),
    (["--context=BookedBy"], "BookedBy cannot be a context"),
    (["--context=AccountNumber"], "AccountNumber cannot be a context"),
    (["--context=AccountName"], "AccountName cannot be a context"),
    (["--context=Department,,Project"], '"" cannot be a context'),
    ([f"--context={'x' * 101}"], " cannot be a context"),
    (["--context=Department,Department"], "a context is of at most 8 keys, each once"),
    ([f"{EIGHT[0]},I"], "a context is of at most 8 keys, each once"),
    (["--target=Vat", "--context=Vat"], "Vat cannot be a context"),
    (["--target=CompanyId"], "CompanyId cannot be the target"),
    (["--target=BookedBy"], "BookedBy cannot be the target"),
    (["--target="], '"" cannot be the target'),
    (["--target=V a t"], '"V a t" cannot be the target'),
    *(([f"--target={key}"], f"{key} cannot be the target") for key in bookkeep.OF_A_RECORD),
]


@pytest.mark.parametrize(("options", "said"), KEYS, ids=str)
def test_keys_that_cannot_be_features_or_the_target_are_refused(capsys, options, said):
    with pytest.raises(SystemExit, match="2"):
        bookkeep.main([*options, "check", "/no/log"])
    assert capsys.readouterr().err.endswith(f"{said}\n")


def test_keys_beside_the_text_are_taken_as_options_or_variables(monkeypatch, capsys, failed):
    for options in (
        EIGHT,
        ["--target=Vat", "--context=AccountNumber,AccountName"],
        ["--target=Ü-1"],
    ):
        assert failed(*options, "check", "/no/log").startswith("/no/log: ")
    monkeypatch.setenv("BOOKKEEP_CONTEXT", "Department,Id")
    with pytest.raises(SystemExit, match="2"):
        bookkeep.main(["check", "/no/log"])
    assert "Id cannot be a context" in capsys.readouterr().err


def by_department(n=60):
    """Bookings whose text says nothing of the account; only the department does."""
    rng = random.Random(3)
    departments = [rng.choice(["HR", "IT", "Ünits"]) for _ in range(n)]
    return [
        booking(text="card payment", amount="-9.50", account=f"{len(each)}", Department=each)
        for each in departments
    ]


def test_a_context_says_the_account_and_a_sample_may_lack_it(serve, tmp_path, monkeypatch):
    asked = [booking(text="card payment", amount="-9.50", Department=d) for d in ("Ünits", "HR")]
    lacking = [
        booking(text="card payment", amount="-9.50", **more) for more in ({}, {"Department": ""})
    ]
    without = serve(log=tmp_path / "without.jsonl")
    monkeypatch.setenv("BOOKKEEP_CONTEXT", "Department,Project")
    service = serve()
    for each in (without, service):
        for batch in batches_of(by_department(), 10):
            assert each.post("/sample", batch)[0] == 200
        assert each.post("/sample", lacking)[0] == 200
    assert service.post("/predict", asked) == (200, ["5", "2"])
    assert len({*without.post("/predict", asked)[1]}) == 1
    known, *others = service.post("/suggest", [*asked, *lacking])[1]
    kinds = {reason["kind"]: reason["token"] for reason in known["suggestions"][0]["reasons"]}
    said = {"Department": "Ünits", "Department in this company": "Ünits"}
    said |= {
        "first word in that Department": "card",
        "this text in that Department": "card payment",
    }
    assert said.items() <= kinds.items()
    assert "Department" not in str(without.post("/suggest", asked)[1])
    none, empty = (answer["suggestions"] for answer in others[1:])
    assert none == empty
    assert "Department" not in str(none)
    assert service.get("/overview")[1]["context"] == ["Department", "Project"]
    assert service.get("/bookings/0")[1]["sample"] == by_department()[0]
    before = service.post("/suggest", asked)
    service.stop(signal.SIGKILL)
    service = serve()
    assert service.post("/suggest", asked) == before
    assert service.post("/correct", {"seq": 61, "AccountNumber": "9"})[0] == 200
    service.stop()
    status, out, _ = run(SERVICE, "check", tmp_path / "log.jsonl")
    assert (status, out[-40:]) == (0, "62 bookings in whole batches, no problems\n"[-40:])


LEARNED_FROM = [  # the context and target of a log, and of a start on it; what is said
    (([], "AccountNumber"), (["Department"], "AccountNumber")),
    ((["Department"], "AccountNumber"), ([], "AccountNumber")),
    ((["Department"], "AccountNumber"), (["Department", "Project"], "AccountNumber")),
    (([], "AccountNumber"), ([], "Vat")),
    ((["AccountNumber"], "Vat"), ([], "Vat")),
]


@pytest.mark.parametrize("unsaved", [1, UNSAVED], ids=["with a snapshot", "without"])
@pytest.mark.parametrize(("learned", "wanted"), LEARNED_FROM, ids=str)
def test_a_log_that_was_learned_from_other_keys_is_refused(path, caplog, learned, wanted, unsaved):
    with bookkeeping(path, unsaved=unsaved, books=Books(*learned)) as keeper:
        keeper.book([booking(Vat="25")])
        keeper.book([by("suggestion", Vat="25")])
        keeper.correct(0, "12")
    files = {each: each.read_bytes() for each in path.parent.iterdir()}
    context, target = (",".join(learned[0]) or "none", learned[1])
    with closing(Log(path)) as log, pytest.raises(LogError) as raised:
        Bookkeeper(log, unsaved, Books(*wanted))
    assert str(raised.value) == (
        f"{path}, line 1: it was learned with the context {context}, the target {target}; to learn "
        f"it anew, give the options of this start to: python bookkeep.py relearn {path} NEW"
    )
    assert caplog.text == ""
    assert {each: each.read_bytes() for each in path.parent.iterdir()} == files
    with bookkeeping(path, books=Books(*learned)) as keeper:
        assert_true_to_log(keeper)


def test_a_log_whose_bookings_are_all_forgotten_may_be_learned_from_other_keys(path):
    with bookkeeping(path, unsaved=1) as keeper:
        keeper.book([booking()])
        keeper.forget("A")
    with bookkeeping(path, unsaved=1):
        pass  # it makes a snapshot
    with bookkeeping(path, books=Books(["Department"], "Vat")) as keeper:
        keeper.book([booking(Vat="25")])
        keeper.book([booking(Vat="25")])
        assert lines_of(keeper)[-1]["predicted"] == "25"


def test_a_check_says_which_lines_were_learned_from_other_keys(path, capsys):
    with bookkeeping(path, books=Books(["Department"], "Vat")) as keeper:
        keeper.book([booking("gone", Vat="25")])
        keeper.book([booking(Vat="25")] * 2)
        keeper.book([by("suggestion", Vat="12")])
        keeper.correct(2, "12")
        keeper.forget("gone")
    assert checked(path, capsys) == []
    lines = path.read_bytes().splitlines(keepends=True)
    for seq, values in ((2, {"context": None}), (3, {"target": "Id"}), (4, {"context": ["X"]})):
        damaged = [*lines]
        damaged[seq] = changed(lines[seq], **values)
        path.write_bytes(b"".join(damaged))
        [problem] = checked(path, capsys)
        assert problem.startswith(f"line {seq + 1}: it was learned with the context ")
        with closing(Log(path)) as log, pytest.raises(LogError, match=re.escape(problem)):
            Bookkeeper(log, books=Books(["Department"], "Vat"))


def test_names_that_the_locale_has_no_letters_for_are_printed_as_they_are(tmp_path):
    path = tmp_path / "Bücher" / "lög.jsonl"
    path.parent.mkdir()
    with bookkeeping(path, books=Books(["Abteilung ü€"])) as keeper:
        keeper.book([booking()])
    path.write_bytes(path.read_bytes() + changed(path.read_bytes(), seq=1, batch=1, context=["é"]))
    plain = {"env": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "check": False}
    for *command, status, out, said in (
        ("check", path, 1, f"{path}, line 2: it was learned with the context é, ", ""),
        ("relearn", path, path.with_name("neü"), 0, f"{path.with_name('neü')}: 2 bookings ", ""),
        ("check", path.parent, 1, "", f"bookkeep: {path.parent}: Is a directory"),
    ):
        done = subprocess.run([sys.executable, SERVICE, *command], capture_output=True, **plain)
        assert done.returncode == status
        assert done.stdout.decode().startswith(out)
        assert done.stderr.decode().startswith(said)
        assert b"Traceback" not in done.stderr


def batches_by_department(keeper):
    """Books what a log with any context may have."""
    for number, batch in enumerate(batches_of(by_department(), 7)):
        who = ("person", "check", "suggestion")[number % 3]
        keeper.book([by(who, sample) for sample in batch], f"key{number}" if number % 2 else None)
    for seq in (3, 20, 3):
        keeper.correct(seq, str(seq))


def test_relearned_with_another_context_it_is_as_if_it_had_always_had_that(path, capsys):
    other = path.with_name("other.jsonl")
    with bookkeeping(path) as keeper:
        batches_by_department(keeper)
    with bookkeeping(other, books=Books(["Department"])) as keeper:
        batches_by_department(keeper)
    for log, books, expected in ((path, Books(["Department"]), other), (other, Books(), path)):
        new, left_out = relearned(log, capsys, books)
        assert left_out == []
        assert new.read_bytes() == expected.read_bytes()
        new.unlink()


def test_what_lacks_another_target_is_left_out_of_a_log_relearned_for_it(path, capsys):
    with bookkeeping(path) as keeper:
        keeper.book([booking(Vat="25"), booking(), booking(Vat="v" * 101), booking(Vat="12")])
        keeper.correct(0, "1")
    new, left_out = relearned(path, capsys, Books(["AccountNumber"], "Vat"))
    assert left_out == [
        "line 2: Vat is missing",
        "line 3: Vat is longer than 100 characters",
        "line 5: it corrects another key than Vat",
    ]
    with bookkeeping(new, books=Books(["AccountNumber"], "Vat")) as keeper:
        assert_true_to_log(keeper)
        assert keeper.correct(3, "25") == "12"


def test_another_key_than_the_account_is_predicted_from_the_account(serve, tmp_path):
    old, new = tmp_path / "old.jsonl", tmp_path / "log.jsonl"
    options = ["--target=Vat", "--context=AccountNumber"]
    vats = {"3001": "25", "3002": "12", "3003": "0"}
    rows = [
        booking(text="card payment", account=account, Vat=vats[account], AccountName="Büro")
        for account in random.Random(5).choices([*vats], k=40)
    ]
    usual = serve(log=old)
    for batch in batches_of(rows, 10):
        assert usual.post("/sample", batch)[0] == 200
    usual.stop()
    said = refused(old, *options)
    assert "line 1: it was learned with the context none, the target AccountNumber; " in said
    assert f"python bookkeep.py relearn {old} NEW" in said
    status, out, _ = run(SERVICE, *options, "relearn", old, new)
    assert (status, out) == (0, f"{new}: 40 bookings learned anew\n")
    service = serve(*options)
    asked = [booking(text="card payment", account=account) for account in vats]
    assert service.post("/predict", asked) == (200, [*vats.values()])
    assert service.get("/report/100")[1]["accuracy"] > 0.5
    status, refusal = service.post("/sample", [booking()])
    assert (status, refusal) == (400, {"error": "sample 0: Vat is missing"})
    status, refusal = service.post("/sample", [booking(Vat="1" * 101)])
    assert (status, refusal) == (400, {"error": "sample 0: Vat is longer than 100 characters"})
    bare = {key: value for key, value in booking(Vat="25").items() if key != "AccountNumber"}
    assert service.post("/sample", [bare])[1]["total"] == 41
    status, refusal = service.post("/correct", {"seq": 0, "AccountNumber": "3001"})
    assert status == 400
    assert refusal["error"].startswith('send {"seq": 1203, "Vat": "6700"} or {"CompanyId": ')
    before = rows[7]["Vat"]
    answer = service.post("/correct", {"seq": 7, "Vat": "6"})
    assert answer == (200, {"seq": 7, "Vat": "6", "before": before})
    standing = service.get("/bookings/7")[1]
    assert standing["sample"] == rows[7] | {"Vat": "6"}
    assert (standing["account"], standing["name"]) == ("6", None)
    assert standing["corrected"] == {"from": before}
    assert service.get("/overview")[1]["target"] == "Vat"
    schemas = service.get("/openapi.json")[1]["components"]["schemas"]
    assert "Vat" in schemas["Booking"]["required"]
    assert schemas["Correction"]["properties"].keys() == {"seq", "Vat"}
    assert "AccountNumber" not in schemas["Corrected"]["properties"]
    service.stop()
    with bookkeeping(new, books=Books(["AccountNumber"], "Vat")) as keeper:
        assert_true_to_log(keeper)


def test_a_sum_gets_the_same_suggestions_however_it_is_written(keeper):
    keeper.book([booking(text="x", amount="+1200.00", account="1"), booking(text="y", account="2")])
    ways = ["1200", "1200.0", "+1200.00", "01200"]
    for zero in ("0", "-0.00", "+0"):
        keeper.book([booking(text="z", amount=zero, account="3")])
    for each in (ways, ["0", "0.00", "-0.00"]):
        suggestions = [suggested(keeper, booking(text="w", amount=way), 3) for way in each]
        for suggestion in suggestions:
            del suggestion["check"]  # which is drawn
        assert all(suggestion == suggestions[0] for suggestion in suggestions)
    reasons = suggested(keeper, booking(text="w", amount="1200.0"))["suggestions"][0]["reasons"]
    assert ("this very sum", "1200") in {(each["kind"], each["token"]) for each in reasons}
