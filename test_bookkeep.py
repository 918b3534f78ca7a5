"""The tests of the service, in the order of bookkeep.py's sections.

Oracles: scikit-learn for the model and the metrics.
"""

import doctest
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

import wsgiref.validate
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from prometheus_client.parser import text_string_to_metric_families
from sklearn.metrics import precision_score, recall_score
from sklearn.naive_bayes import MultinomialNB
from waitress.buffers import ReadOnlyFileBasedBuffer

import bookkeep
from bookkeep import (
    FLOOR,
    GRAIN,
    GROUP,
    SOFTENING,
    BadRequest,
    Bookkeeper,
    Busy,
    Calibration,
    Conflict,
    Counts,
    Export,
    History,
    Lesson,
    Log,
    LogError,
    NaiveBayes,
    NotFound,
    NotReady,
    NotStored,
    create_app,
    precision_recall,
    tokens,
)
from conftest import (
    EVERY_BIN,
    HERE,
    SERVICE,
    SYNTHETIC,
    Service,
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
    held_at_the_disk,
    judged,
    learn,
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
        assert tokens(booking(amount=amount)) == tokens(booking(amount=said))


def test_each_token_can_be_said_in_the_samples_own_words():
    sample = booking(company="A b", text="rent May rent", amount="< 10")
    words = [(kind, word) for kind in bookkeep.KINDS[2:4] for word in ("rent", "May", "rent")]
    first = [*zip(bookkeep.KINDS[4:], ["rent", "rent", "rent May", "rent May rent"], strict=True)]
    said = [("company", "A b"), ("amount", "< 10"), *words, *first]
    assert bookkeep.wordings(sample) == said
    assert len(dict(zip(tokens(sample), said, strict=True))) == len({*said})
    for text in ("rent", " ", "x " * 500):
        sample["BankEntryText"] = text
        assert len(bookkeep.wordings(sample)) == len(tokens(sample))


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
        st.tuples(st.integers(0, 7), st.integers(1, 6)).map(lambda t: t[0] * KIND + t[1]),
        st.integers(0, 9),  # account
        st.integers(0, 1),  # for or against
        st.integers(1, 3000),  # units
    ),
    max_size=60,
)
ALL_TOKENS = np.array([kind * KIND + token for kind in range(8) for token in range(1, 7)])


def count(counts, sums, sign=1):
    """Adds (token, account, side, units) to the counts, or takes them away."""
    if sums:
        token, account, side, units = np.array(sums, dtype=np.int64).T
        counts.grow(int(account.max()) + 1)
        counts.add(counts.insert(token), 2 * account + side, sign * units)


@given(
    st.lists(MANY_SUMS, max_size=5),
    MANY_SUMS,
    st.sampled_from([(2, 2), (2, 100), (100, 128)]),
    st.integers(1, 9),
)
def test_evidence_is_of_exact_sums_however_they_are_kept(kept, passing, sizes, most):
    def evidence(counts):
        counts.grow(10)
        rows = counts.vocabulary.find(ALL_TOKENS)
        whole = counts.evidence(rows, np.arange(10))
        some = np.array([1, 4, 5, 9])
        assert np.array_equal(counts.evidence(rows, some), whole[:, some])
        lengths, of_all = counts.of_document(ALL_TOKENS.tolist(), 10)
        np.testing.assert_allclose(of_all, whole.sum(axis=0), atol=1e-9)
        assert counts.occupied.tolist() == lengths
        return whole

    expected = Counts(0.1, 6)
    count(expected, [*itertools.chain(*kept)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Counts, "NARROW", sizes[0])
        patch.setattr(Counts, "STRIPS", sizes[1])
        patch.setattr(bookkeep, "MOST_ENTRIES", most)
        counts = Counts(0.1, 6)
        for sums in (*kept, passing):
            count(counts, sums)
        both = evidence(counts)
        count(counts, passing, -1)
        assert np.array_equal(evidence(counts), evidence(expected))
        restored = Counts(0.1, 6)
        restored.restore({name: array.copy() for name, array in counts.state().items()})
        count(restored, passing)
        assert np.array_equal(evidence(restored), both)

    n = np.zeros((len(ALL_TOKENS), 10, 2))
    for token, account, side, units in (*itertools.chain(*kept), *passing):
        n[ALL_TOKENS.tolist().index(token), account, side] += units / GRAIN
    np.testing.assert_allclose(both, np.log1p(n / [0.1, 6]) @ [1, -1], atol=1e-9)


def test_what_is_taken_away_leaves_its_room_to_others():
    counts = Counts(0.1, 6)
    counts.insert(np.arange(1, 101).repeat(1000))
    assert len(counts.sizes) <= 512
    for first in range(1, 20_000, 100):
        sums = [(token, 0, 0, 640) for token in range(first, first + 100)]
        count(counts, sums)
        count(counts, sums, -1)
    assert len(counts.sizes) < 1000
    rng = random.Random(3)
    sums = [  # of tokens that met one account, and of some that met nearly all
        (rng.choice([1, 2 + rng.randrange(20), 1000 + i]), rng.randrange(i // 12 + 1), i % 2, 640)
        for i in range(9000)
    ]
    for sign in (1, -1) * 20:
        for part in batches_of(sums, 300):
            count(counts, part, sign)
    assert len(counts.entries) < 8 * len(sums)
    assert len(counts.sizes) < 8 * len(sums)
    assert len(counts.dense_units) <= Counts.STRIPS


# ------------------------------------------------------------------------------------------ Model


WEIGHTS = st.integers(1, GRAIN).map(lambda n: n / GRAIN)
TOKENS = st.integers(0, 23).map(lambda n: n % 8 * KIND + 1 + n // 8)  # three of each kind
DOCUMENTS = st.lists(TOKENS, min_size=1, max_size=6)
EACH_TOKEN = [[kind * KIND + 1 + token] for kind in range(8) for token in range(3)]
UNKNOWN = 9  # a token that no document has
LABELS = st.sampled_from(["1", "2", "3", "4"])
LABELLED = st.lists(st.tuples(DOCUMENTS, LABELS), min_size=1, max_size=9)
LESSONS = st.builds(Lesson, LABELS, WEIGHTS, st.dictionaries(LABELS, WEIGHTS, max_size=2))
LEARNED = st.lists(st.tuples(DOCUMENTS, LESSONS), min_size=1, max_size=30)
FOR_ONLY = st.lists(
    st.tuples(DOCUMENTS, st.builds(Lesson, LABELS, WEIGHTS, st.just({}))), min_size=1, max_size=30
)


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


def said(model, documents=EACH_TOKEN, labels="1234"):
    """What a model says, by account, whatever the order in which it learned."""
    if not model.n_classes:
        return model.n_tokens
    scores = model.joint_log_likelihood(documents)
    labels = [labels[i % len(labels)] for i in range(len(documents))]
    by_account = {
        name: (n, model.feature_counts[:, i].tolist(), scores[:, i].tolist())
        for i, (name, n) in enumerate(zip(model.names, model.class_counts.tolist(), strict=True))
        if n
    }
    assert len(by_account) == model.n_classes
    top = [[model.names[i] for i in best] for best in model.top(scores, 3).tolist()]
    assessed = model.assess(documents, labels)
    return model.n_tokens, by_account, top, model.predict(documents), assessed


def formula(bookings, document, label, alpha=0.1, beta=6):
    """The score of an account as the docstring of NaiveBayes has it, from what was learned."""
    n, m, totals = Counter(), Counter(), Counter()
    for learned, lesson in bookings:
        for token in learned:
            n[token] += lesson.weight * (lesson.account == label)
            m[token] += lesson.against.get(label, 0)
            totals[token // KIND] += lesson.weight * (lesson.account == label)
    known = Counter(token // KIND for token in n)
    score = math.log(sum(lesson.weight for _, lesson in bookings if lesson.account == label))
    for token in document:
        if token in n:
            kind = token // KIND
            score -= math.log(totals[kind] + alpha * known[kind]) / 2
            score += math.log(1 + n[token] / alpha) - math.log(1 + m[token] / beta)
    return score


def booked(bookings):
    """The accounts that something was booked to."""
    return sorted({lesson.account for _, lesson in bookings})


def test_the_textbooks_example_is_as_the_docstring_says():
    found = doctest.testmod(bookkeep)
    assert (found.failed, found.attempted >= 6) == (0, True)


@given(LEARNED, DOCUMENTS)
def test_the_score_is_the_formula(bookings, document):
    model = taught(bookings)
    document = [*document, UNKNOWN, document[0]]
    [scores] = model.joint_log_likelihood([document])
    for label in booked(bookings):
        expected = formula(bookings, document, label)
        assert scores[model.accounts[label]] == pytest.approx(expected, abs=1e-8)
    assert np.count_nonzero(scores > -np.inf) == len(booked(bookings)) == model.n_classes


@given(FOR_ONLY, DOCUMENTS, st.sampled_from([0.02, 0.5, 1.0]))
def test_without_rivals_each_kind_is_scikit_learns(bookings, document, alpha):
    """Which takes all of a kind's length off the score, where bookkeep takes half of it."""
    model = taught(bookings, alpha=alpha)
    labels = [lesson.account for _, lesson in bookings]
    weights = [lesson.weight for _, lesson in bookings]
    accounts = booked(bookings)
    columns = [model.accounts[account] for account in accounts]
    expected = np.log(model.class_counts[columns])
    for kind in range(8):
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
        totals = np.log(model.feature_counts[kind, columns] + alpha * len(vocabulary))
        expected += len(asked) / 2 * totals
    scores = model.joint_log_likelihood([document])[0, columns]
    np.testing.assert_allclose(scores - scores[0], expected - expected[0], atol=1e-8)


@given(LEARNED, LABELLED)
def test_an_assessment_is_the_prediction_its_margin_and_the_rank(bookings, asked):
    model = taught(bookings)
    documents, labels = zip(*asked, strict=True)
    assessments = model.assess(documents, labels)
    assert [assessment.predicted for assessment in assessments] == model.predict(documents)
    seen = {token for document, _ in bookings for token in document}
    for (predicted, margin, rank, known), (document, label) in zip(assessments, asked, strict=True):
        by_kind = [bookkeep.SPECIFICITY_BY_KIND[token // KIND] for token in seen & {*document}]
        assert known == max(by_kind, default=0)
        scores = {name: formula(bookings, document, name) for name in booked(bookings)}
        assert scores[predicted] >= max(scores.values()) - 1e-8
        if label not in scores:
            assert rank is None
        else:
            above = sum(score > scores[label] + 1e-8 for score in scores.values())
            level = sum(score >= scores[label] - 1e-8 for score in scores.values())
            assert above < rank <= level
            assert (rank == 1) == (predicted == label)
        if len(scores) == 1:
            assert margin is None
        else:
            second, best = sorted(scores.values())[-2:]
            assert margin == pytest.approx(best - second, abs=1e-4)


@given(LEARNED, LABELLED)
def test_a_lesson_is_the_surprise_and_the_strongest_rivals(bookings, asked):
    model = taught(bookings)
    documents, labels = zip(*asked, strict=True)
    lessons = model.weigh(documents, labels)
    assert [lesson.account for lesson in lessons] == list(labels)
    for (document, label), lesson in zip(asked, lessons, strict=True):
        if label not in booked(bookings):
            assert lesson == Lesson(label, 1.0)
            continue
        met = {
            account
            for learned, other in bookings
            if {*learned} & {*document}
            for account in (other.account, *other.against)
        }
        among = sorted({*met, label} & {*booked(bookings)})
        scores = np.array([formula(bookings, document, account) for account in among])
        odds = np.exp((scores - scores.max()) / SOFTENING)
        share = dict(zip(among, odds / odds.sum(), strict=True))
        surprise = 1 - share.pop(label)
        assert lesson.weight == pytest.approx(max(FLOOR, 0.75 * surprise), abs=0.51 / GRAIN)
        assert len(lesson.against) <= 2
        for rival, m in lesson.against.items():
            assert m == pytest.approx(share[rival], abs=0.51 / GRAIN)
        strongest = sorted(share.values(), reverse=True)[:2]
        expected = [
            p for p, least in zip(strongest, (0.5 / GRAIN, 0.1), strict=False) if p >= least
        ]
        if all(abs(p - 0.1) > 1e-6 and p > 0.6 / GRAIN for p in strongest):
            counted = sorted(lesson.against.values(), reverse=True)
            assert counted == pytest.approx(expected, abs=0.51 / GRAIN)
        for weight in (lesson.weight, *lesson.against.values()):
            assert weight > 0 == weight * GRAIN % 1


def test_a_rival_of_less_than_half_a_grain_counts_nothing():
    model = taught([([*range(1, 9)], Lesson("1", 1.0))] * 99 + [([1], Lesson("2", 1.0))])
    [(_, _, against), (_, _, likely)] = model.weigh([[*range(1, 9)], [1]], ["1", "1"])
    assert against == {}
    assert list(likely) == ["2"]


@given(LEARNED, LABELLED, st.integers(1, 9), st.integers(1, 4))
def test_a_batch_is_assessed_whole_and_learned_in_rounds(bookings, asked, cells, most):
    documents, labels = zip(*asked, strict=True)
    model, expected = taught(bookings), taught(bookings)
    assessments = expected.assess(documents, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bookkeep, "CELLS", cells)  # few scores at a time
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


@given(LEARNED, LABELLED, st.lists(st.integers(0, 10)), st.randoms(use_true_random=False))
@example(
    [([1], Lesson(label, 1.0)) for label in "3214"], [([1], "1"), ([2], "2")], [1], random.Random(0)
)  # of equals, it is the first by name
def test_any_batching_and_any_order_give_the_same_bits(bookings, asked, sizes, rng):
    documents, labels = zip(*asked, strict=True)
    model = taught(bookings)
    for other in (bookings, rng.sample(bookings, len(bookings))):
        assert said(taught(other, sizes)) == said(model)
        assert said(taught(other, sizes), documents, labels) == said(model, documents, labels)
    assert taught(bookings, sizes).weigh(documents, labels) == model.weigh(documents, labels)
    scores = model.joint_log_likelihood(documents)
    for i, document in enumerate(documents):
        [alone] = model.joint_log_likelihood([document])
        assert np.array_equal(alone, scores[i])
        best = sorted(booked(bookings), key=lambda name: (-alone[model.accounts[name]], name))
        for most in (1, 2, 9):
            top = model.top(alone[np.newaxis], most)[0]
            assert [model.names[account] for account in top] == best[:most]
        assert model.predict([document]) == best[:1]


@given(st.just([]) | LEARNED, LEARNED, LABELLED)
def test_what_was_unlearned_leaves_no_trace_and_can_be_learned_again(kept, passing, asked):
    documents, labels = zip(*asked, strict=True)
    model, expected = taught(kept + passing), taught(kept)
    learn_all(model, passing, -1)
    assert said(model) == said(expected)
    assert model.assess(documents, labels) == expected.assess(documents, labels)
    assert model.weigh(documents, labels) == expected.weigh(documents, labels)
    gone = [i for i, name in enumerate(model.names) if name not in booked(kept)]
    assert (model.joint_log_likelihood(documents)[:, gone] == -np.inf).all()
    learn_all(model, passing)
    assert said(model) == said(taught(kept + passing))


def test_without_a_model_there_is_no_prediction_and_full_weight():
    assert NaiveBayes().assess([[1]], ["1"]) == [(None, None, None, 0)]
    assert NaiveBayes().weigh([[1]], ["1"]) == [Lesson("1", 1.0)]


@given(LEARNED, LEARNED, DOCUMENTS)
def test_terms_are_log_odds_that_add_up_to_the_difference_of_scores(kept, passing, document):
    model = taught(kept)
    for sign in (1, -1):
        learn_all(model, passing, sign)
    document = [*document, UNKNOWN, document[0]]
    accounts = np.flatnonzero(model.class_counts)[::-1]
    terms = model.terms(document, accounts)
    assert terms.shape == (len(accounts), 1 + len(document))
    assert not terms[:, -2].any()
    [scores] = model.joint_log_likelihood([document])
    np.testing.assert_allclose(terms.sum(axis=1), scores[accounts], atol=1e-9)
    np.testing.assert_allclose(terms[:, 0], np.log(model.class_counts[accounts]), atol=1e-9)
    np.testing.assert_array_equal(model.terms(document, accounts[:1]), terms[:1])


@pytest.mark.parametrize("strips", [128, 8])
def test_how_rows_are_kept_changes_no_figure(strips):
    rng = random.Random(1)

    def many(n):
        """Documents with tokens of one account and of nearly all."""
        for i in range(n):
            rare = 5 * KIND + 1000 + i
            yield (
                [1, 2 + rng.randrange(50), KIND + rng.randrange(1, 51), rare],
                Lesson(
                    str(rng.randrange(i // 4 + 1)),
                    rng.randrange(64, 1025) / GRAIN,
                    {str(rng.randrange(i // 4 + 1)): rng.randrange(1, 1025) / GRAIN},
                ),
            )

    learned = [*many(3000)]
    documents, lessons = zip(*many(200), strict=True)
    labels = [lesson.account for lesson in lessons]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Counts, "STRIPS", strips)
        model = taught(learned, [rng.randrange(1, 200) for _ in range(20)])
        patch.setattr(Counts, "NARROW", 1 << 20)
        plain = taught(learned)
    dense = [np.count_nonzero(each.token_counts.sizes == bookkeep.DENSE) for each in (model, plain)]
    assert 0 < dense[0] <= strips
    assert dense[1] == 0
    assert said(model, documents, labels) == said(plain, documents, labels)
    weighed = plain.weigh(documents, labels)
    assert model.weigh(documents, labels) == weighed
    assert len({lesson.weight for lesson in weighed}) > 50
    assert sum(len(lesson.against) for lesson in weighed) > 50
    numbers = [[each.accounts[name] for name in plain.names[:40]] for each in (model, plain)]
    terms = [
        each.terms(documents[0], np.array(of))
        for each, of in zip((model, plain), numbers, strict=True)
    ]
    assert np.array_equal(*terms)


def test_the_example_of_how_it_works():
    model = taught(
        [
            (tokens(booking("acme", "Office rent May", "> -10000")), Lesson("6300", 1.0)),
            (tokens(booking("acme", "Train to Oslo", "> -100")), Lesson("7140", 1.0)),
        ]
    )
    asked = [tokens(booking("acme", "Office", "> -100"))]
    assert model.assess(asked, ["7140"]) == [("6300", 4.7958, 2, 3)]
    [lesson] = lessons = model.weigh(asked, ["7140"])
    assert lesson.weight == pytest.approx(0.624, abs=1e-3)
    assert lesson.against == {"6300": pytest.approx(0.832, abs=1e-3)}
    model.learn(asked, lessons)
    assert model.assess(asked, ["7140"]) == [("7140", 8.1133, 1, 5)]


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
        margin = (2 ** ((row["bin"] + 0.5) / 6) - 1) / 8  # for each token, of which there is one
        records.append(
            {name: row[name] for name in ("seq", "predicted", "confidence", "known", "rank")}
            | {"sample": who | {"AccountName": row["name"]}, "margin": margin}
            | reviewed
        )
    history.append(history.draft(records, [[1]] * len(records)), records)
    return history.rows[len(history.rows) - len(rows) :]


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from([1, 1, 16])),
        min_size=1,
        max_size=50,
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
    assert bookkeep.figures(weighted) == bookkeep.figures(once)
    [level], [other] = (bookkeep.by_confidence(of, [0.5]) for of in (weighted, once))
    assert (level["share"], level["accuracy"]) == (1, other["accuracy"])
    assert level["checks"] == np.count_nonzero(weights > 1)


@pytest.mark.parametrize("level", [0.05, 0.1, 0.9, 0.95, 0.99])
def test_who_is_just_sure_enough_is_sure_enough(level):
    rows = add_rows(History(), [{"confidence": level}])
    assert bookkeep.by_confidence(rows, [level])[0]["share"] == 1


def test_accuracy_by_confidence():
    found = [("1", 0.9, 1), ("2", 0.5, 1), ("1", 0.2, 1), ("1", 0.95, 16), ("2", 0.95, 0)]
    rows = [{"predicted": p, "confidence": c, "score_weight": weight} for p, c, weight in found]
    rows = bookkeep.scored(add_rows(History(), rows))
    names = ("at_least", "share", "accuracy", "checks")
    levels = bookkeep.by_confidence(rows, [0.0, 0.5, 0.92, 0.99])
    assert [tuple(level[name] for name in names) for level in levels] == [
        (0.0, 1.0, 18 / 19, 1),
        (0.5, 18 / 19, 17 / 18, 1),
        (0.92, 16 / 19, 1.0, 1),
        (0.99, 0.0, None, 0),
    ]


def test_an_accuracys_standard_error():
    def error_of(*rows):
        [level] = bookkeep.by_confidence(add_rows(History(), rows), [0])
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
            "bin": st.integers(0, 47),
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
    scored = [row for row in rows if row["score_weight"]]
    asked_rows = add_rows(history, asked)
    together, evidence = calibration.confidence(asked_rows), calibration.evidence_counts(asked_rows)
    for i, row in enumerate(asked):
        assert together[i] == calibration.confidence(asked_rows[i : i + 1])[0]
        assert together[i] == pytest.approx(confidence_by_hand(scored, row), abs=1e-9)
        everybodys = [
            (other["score_weight"], other["booked"] == other["predicted"])
            for other in scored
            if other["known"] == row["known"] and abs(other["bin"] // 4 - row["bin"] // 4) <= 1
        ]
        assert evidence[i] == {
            "own": tally_by_hand(own_by_hand(scored, row, "predicted")),
            "all": {
                "suggestions": sum(weight for weight, _ in everybodys),
                "right": sum(weight for weight, right in everybodys if right),
            },
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
    calibration.add(rows[len(kept) :], sign=-1)
    other = Calibration()
    other.add(rows[: len(kept)])
    assert said(calibration) == said(other)


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
    assert second == pytest.approx(0.52 * 30 / 52)
    assert third == pytest.approx(0.52 * 10 / 52)
    assert others == [0] * (Calibration.RANKS - 3)
    assert calibration.shared(np.array([0.01]))[0, 1] == 0.01  # never more than the first
    calibration.add(add_rows(history, [{"booked": "3", "rank": 3, "score_weight": 16}]))
    assert calibration.shared(np.array([0.48]))[0, 1] == pytest.approx(0.52 * 30 / (52 + 16))


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
        page, before = history.page(limit, *asked)
        while before is not None:
            assert len(page) == limit
            yield from page.tolist()
            page, before = history.page(limit, *asked, before)
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
                patch.setattr(bookkeep, "LEAST_SURE", most)
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
    assert history.last_named(companies, accounts).tolist() == [8, 4, 2, -1, 8]
    add_rows(history, [{"seq": 11 + i, "company": "C"} for i in range(40_000)])
    assert history.last_named(companies, accounts).tolist() == [8, 4, 2, -1, 8]
    history.forget(np.array([0, 2, 6, 8]))
    assert history.last_named(companies, accounts).tolist() == [-1, 4, -1, -1, -1]


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
        growing.page(99, "A", True, 0.9, True)[0][::-1],
    ):
        assert found.tolist()[:20] == [*range(20)]
    assert growing.last_named(history.rows[:1]["company"], account[0]).tolist() == [-1]


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
        with pytest.raises(LogError, match="line 1: this is no log"):
            read(path)
        assert path.read_bytes() == other


@pytest.mark.parametrize("lacking", [("known",), ("known", "against")], ids=["0.2", "0.1"])
def test_a_log_of_an_older_version_is_refused_with_the_command_that_converts_it(path, lacking):
    with bookkeeping(path) as keeper:
        keeper.book(bookings(2))
        keeper.book(bookings(2))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(changed(line, **dict.fromkeys(lacking)) for line in lines))
    before = path.read_bytes()
    expected = f"line 1: a version before 0.3 wrote it; .*: python bookkeep.py relearn {path} NEW$"
    with pytest.raises(LogError, match=expected):
        Bookkeeper(Log(path))
    assert path.read_bytes() == before


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


@pytest.mark.parametrize(("names", "said"), FAILURES.items(), ids=str)
def test_what_cannot_be_written_is_not_in_the_log_or_said_to_be_there_maybe(path, names, said):
    [line] = written(path, [[{"x": 1}]])
    lost = [(None, [{"x": "lost" * 100}])]
    with open_log(path) as log:
        with no_space(*names), pytest.raises(OSError, match=rf"No space left on device.*{said}$"):
            log.append(lost)
        assert (path.read_bytes() == line) == ("ftruncate" not in names)
        if said:
            with no_space(*names), pytest.raises(OSError, match="No space left on device$"):
                log.append(lost)  # which was not written at all
        log.append([(None, [{"x": 2}])])
        with no_space(*names), pytest.raises(OSError, match="No space"):
            log.append(lost)
    assert values(path) == [1, 2]  # for at the end, it could be cut back


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
    with open_log(path) as log:
        with monkeypatch.context() as patch, no_space("fsync"):
            patch.setattr(bookkeep, "new_file", lambda path, durable: open(path, "wb"))
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
    sizes, follow = [], Bookkeeper.follow

    def counted(keeper, records):
        sizes.append(len(records))
        follow(keeper, records)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bookkeeper, "follow", counted)
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
        assert keeper.book(bookings(700)[:70], "key0") == range(70)
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
        patch.setattr(bookkeep, "amount_range", str)  # as up to version 0.3
        with bookkeeping(path, unsaved=1) as keeper:
            keeper.book([booking(amount="-5.00", account="1"), booking(amount="7")])
    assert snapshot_of(path).exists()
    with bookkeeping(path) as keeper:
        assert "another version made it" in caplog.text
        asked = [booking("B", "", "-3.20"), booking("B", "", "< 10")]
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


def test_batches_from_many_threads_are_each_booked_once_and_whole(path):
    batches = batches_of(bookings(900), 3)
    ranges = []
    with bookkeeping(path) as bookkeeper:

        def send(mine):
            for batch in mine:
                ranges.append((bookkeeper.book(batch), batch))

        threads = [threading.Thread(target=send, args=(batches[i::8],)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        before = counts(bookkeeper._model)
    records = read(path)
    assert len(records) == 900
    for numbers, batch in ranges:
        assert [records[number]["sample"] for number in numbers] == batch
        assert [records[number]["left"] for number in numbers] == [2, 1, 0]
    with bookkeeping(path) as bookkeeper:
        assert counts(bookkeeper._model) == before


def test_batches_that_wait_share_an_fsync(path):
    with bookkeeping(path) as bookkeeper:
        small, large = [booking()], [booking()] * GROUP
        calls = [partial(bookkeeper.book, samples) for samples in [small] * 20 + [large]]
        with held_at_the_disk(bookkeeper, calls) as fsyncs:
            assert len(fsyncs) == 1
        assert len(fsyncs) == 3  # the first alone, the small ones together, the large one alone
        assert bookkeeper.health()["samples"] == 20 + GROUP


def test_bookings_that_wait_together_are_predicted_and_learned_as_one_batch(path, tmp_path):
    batches = batches_of(bookings(400), 30)
    together = list(itertools.chain(*batches[1:]))
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book(batches[0])
        bookkeeper.book(together)
    with bookkeeping(tmp_path / "other") as other:
        calls = [partial(other.book, batch, f"key{i}") for i, batch in enumerate(batches)]
        with held_at_the_disk(other, calls):
            pass
        assert counts(other._model) == counts(bookkeeper._model)
        assert other.metrics(500) == bookkeeper.metrics(500)
    records = [
        [record | dict.fromkeys(bookkeep.PLACE) for record in read(log)]
        for log in (path, other.log.path)
    ]
    assert records[0] == records[1]
    assert [record["batch"] for record in read(other.log.path)[28:32]] == ["key0"] * 2 + [
        "key1"
    ] * 2


def test_it_answers_while_a_batch_is_on_its_way_to_the_disk(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(account="1")])
        bookkeeper.book([booking(account="1")])
        with held_at_the_disk(bookkeeper, [partial(bookkeeper.book, [booking(account="2")] * 500)]):
            assert bookkeeper.predict([booking()]) == ["2"]  # learned, not counted
            assert bookkeeper.metrics(10) == {"precision": 1, "recall": 1}
            assert bookkeeper.health()["samples"] == 2
        assert bookkeeper.predict([booking()]) == ["2"]


def test_it_learns_a_large_batch_in_chunks_between_which_it_answers(path, monkeypatch):
    sizes, answers = [], []
    learn = NaiveBayes.learn

    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()])

        def watched(self, found, lessons):
            assert bookkeeper._changing.locked()
            sizes.append(len(lessons))
            learn(self, found, lessons)

        def ask():
            while not sizes or sum(sizes) < 1000:
                answers.append(bookkeeper.predict([booking()]))

        monkeypatch.setattr(NaiveBayes, "learn", watched)
        asking = threading.Thread(target=ask)
        asking.start()
        bookkeeper.book(bookings(1000))
        asking.join()
    assert max(sizes) <= bookkeep.ROUND
    assert sum(sizes) == 1000
    assert answers


def test_answers_stay_right_while_tables_grow(path):
    answers, done = [], threading.Event()
    asked = [booking(text=f"shop{i}") for i in range(7)]
    known = [booking(text=f"shop{i}", account=str(i)) for i in range(7)]
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book(known)
        bookkeeper.book(known)

        def ask():
            while not done.is_set():
                answers.append(bookkeeper.predict(asked) + bookkeeper.predict(asked[:1]))

        asking = threading.Thread(target=ask)
        asking.start()
        for seed in range(4):
            bookkeeper.book(bookings(3000, seed))
        done.set()
        asking.join()
    assert {*map(tuple, answers)} == {(*"0123456", "0")}


def test_a_named_batch_that_waits_twice_is_booked_once(path):
    answers = []

    def send(account):
        answers.append(answer_of(bookkeeper, [booking(account=account)], "mine"))

    with bookkeeping(path) as bookkeeper:
        calls = [partial(bookkeeper.book, [booking()]), *(partial(send, a) for a in "1191")]
        with held_at_the_disk(bookkeeper, calls):
            pass
    assert Counter(answers) == {range(1, 2): 3, Conflict: 1}
    assert len(read(path)) == 2


def test_nothing_that_is_read_changes_without_the_lock(path, monkeypatch):
    held = []
    samples = bookings(200)

    def watched(change):
        def watching(*arguments, **more):
            held.append(bookkeeper._changing.locked())
            return change(*arguments, **more)

        return watching

    with bookkeeping(path) as bookkeeper:
        for owner, names in (
            (Counts, ["add", "grow"]),
            (Calibration, ["add"]),
            (History, ["append", "correct", "forget"]),
        ):
            for name in names:
                monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
        bookkeeper.book(samples[:100])
        bookkeeper.book(samples[100:])
        bookkeeper.correct(150, "new")
        bookkeeper.forget(samples[0]["CompanyId"])
    assert held
    assert all(held)


@pytest.mark.parametrize("change", ["append", "correct", "forget"])
def test_what_has_lost_step_with_the_log_is_not_used_and_not_saved(path, monkeypatch, change):
    samples = bookings(100)
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book(samples[:50])
    calls = {"append": ("book", samples[50:]), "correct": ("correct", 3, "1")}
    method, *arguments = calls.get(change, ("forget", samples[0]["CompanyId"]))

    def broken(*_):
        raise MemoryError

    with bookkeeping(path, unsaved=1) as bookkeeper:
        settled(bookkeeper)
        with monkeypatch.context() as patch:
            patch.setattr(History, change, broken)
            with pytest.raises(MemoryError):
                getattr(bookkeeper, method)(*arguments)
        with pytest.raises(NotReady, match="started again"):
            bookkeeper.book([booking()])
        with pytest.raises(NotReady, match="started again"):
            bookkeeper.health()
    with bookkeeping(path) as bookkeeper:
        learned = standing(path)
        assert bookkeeper.health()["samples"] == len(learned)
        assert counts(bookkeeper._model) == counts(taught(learned))


def test_changes_are_made_in_their_turn(path):
    answers = {}

    def call(turn, method, *arguments):
        answers[turn] = method(*arguments)

    with bookkeeping(path) as bookkeeper:
        changes = [
            (bookkeeper.book, [booking(account="1")]),
            (bookkeeper.book, [booking(account="1")]),
            (bookkeeper.correct, 1, "2"),
            (bookkeeper.book, [booking(account="3")]),
            (bookkeeper.forget, "A"),
        ]
        calls = [partial(call, turn, *change) for turn, change in enumerate(changes)]
        with held_at_the_disk(bookkeeper, calls):
            pass
        expected = [range(0, 1), range(1, 2), "1", range(3, 4), 3]
        assert [answers[turn] for turn in range(5)] == expected
        assert bookkeeper.book([booking(account="4")]) == range(4, 5)
        assert bookkeeper.predict([booking()]) == ["4"]


def test_what_cannot_be_written_is_not_learned_and_can_be_sent_again(path, monkeypatch):
    samples = bookings(300)
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book(samples[:100])
        bookkeeper.book(samples[100:200])
        before = state(bookkeeper, samples)
        with monkeypatch.context() as patch:

            def broken(file):
                raise OSError(28, "No space left on device")

            patch.setattr(os, "fsync", broken)
            with pytest.raises(NotStored, match="No space"):
                bookkeeper.book(samples[200:])
        assert state(bookkeeper, samples) == before
        assert bookkeeper.book(samples[200:]) == range(200, 300)
    assert [record["sample"] for record in read(path)] == samples


def test_a_batch_that_fails_half_way_is_not_learned(path, monkeypatch):
    samples = bookings(300)
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book(samples[:100])
        bookkeeper.book(samples[100:150])
        before = state(bookkeeper, samples)
        calibration = sums_of(bookkeeper._calibration)
        weigh, calls = NaiveBayes.weigh, []

        def broken(self, *arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise MemoryError
            return weigh(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(NaiveBayes, "weigh", broken)
            with pytest.raises(MemoryError):
                bookkeeper.book(samples[150:])
        assert len(calls) == 2
        assert state(bookkeeper, samples) == before
        assert sums_of(bookkeeper._calibration) == calibration
        assert bookkeeper.book(samples[150:]) == range(150, 300)
    assert counts(bookkeeper._model) == counts(taught(standing(path)))


def test_a_named_batch_is_booked_once_by_many_threads_at_once(path):
    answers = []

    def send(account):
        answers.append(answer_of(bookkeeper, [booking(account=account)], "mine"))

    with bookkeeping(path) as bookkeeper:
        calls = [partial(send, account) for account in "111111191911"]
        with held_at_the_disk(bookkeeper, calls):
            pass
    assert Counter(answers) == {range(0, 1): 10, Conflict: 2}
    assert len(read(path)) == 1


def test_when_too_many_wait_no_more_are_taken(path, monkeypatch):
    monkeypatch.setattr(bookkeep, "BACKLOG", 10)
    with bookkeeping(path) as bookkeeper:
        # The second has more than may wait, but it is the only one.
        calls = [partial(bookkeeper.book, [booking()] * n) for n in (1, 20)]
        with (
            held_at_the_disk(bookkeeper, calls),
            pytest.raises(Busy, match="in a second"),
        ):
            bookkeeper.book([booking()])
        assert bookkeeper.book([booking()]) == range(21, 22)


def test_if_learning_fails_nothing_more_is_booked_until_a_restart(path, monkeypatch):
    answers = []

    def send(account):
        answers.append(answer_of(bookkeeper, [booking(account=account)] * GROUP, account))

    def broken(*_):
        wait_until(lambda: len(bookkeeper._writer._queue) == 2)
        raise MemoryError

    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(account="1")])
        sending = [threading.Thread(target=send, args=account) for account in "234"]
        with monkeypatch.context() as patch:
            patch.setattr(NaiveBayes, "learn", broken)
            for thread in sending:
                thread.start()
            for thread in sending:
                thread.join()
        send("2")
        assert Counter(answers) == {MemoryError: 1, NotReady: 3}
        with pytest.raises(NotReady, match="started again"):
            bookkeeper.health()
        assert bookkeeper.predict([booking()]) == ["1"]
    with bookkeeping(path) as bookkeeper:
        assert bookkeeper.book([booking(account="2")] * GROUP, "2") == range(1, GROUP + 1)
        assert bookkeeper.predict([booking()]) == ["2"]


@pytest.mark.parametrize("failing", ["_predicted", "scored"])
def test_if_anything_fails_between_learning_and_answering_only_a_restart_helps(
    path, monkeypatch, failing
):
    def broken(*_):
        raise MemoryError

    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()])
        with monkeypatch.context() as patch:
            patch.setattr(bookkeep, failing, broken)
            with pytest.raises(MemoryError):
                bookkeeper.book([booking()])
        with pytest.raises(NotReady, match="started again"):
            bookkeeper.book([booking()])
        with pytest.raises(NotReady, match="started again"):
            bookkeeper.health()
    with bookkeeping(path) as bookkeeper:
        assert counts(bookkeeper._model) == counts(taught(standing(path)))


def test_a_correction_reads_all_that_it_needs_before_it_is_written(path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(account="1"), booking(account="2")])
        append = bookkeeper.log.append

        def append_then_fail(batches):
            monkeypatch.setattr(Log, "record", fail)
            return append(batches)

        with monkeypatch.context() as patch:
            patch.setattr(bookkeeper.log, "append", append_then_fail)
            assert bookkeeper.correct(0, "2") == "1"
        monkeypatch.undo()
        assert counts(bookkeeper._model) == counts(taught(standing(path)))


def test_a_named_batch_that_cannot_be_read_back_fails_alone(path):
    answers = {}

    def send(name):
        answers[name] = answer_of(bookkeeper, [booking()], name)

    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()], "damaged")
        path.write_bytes(path.read_bytes().replace(b"rent", b"Rent"))
        calls = [partial(send, name) for name in ("a", "damaged", "b")]
        with held_at_the_disk(bookkeeper, calls):
            pass
    assert answers == {"a": range(1, 2), "damaged": NotStored, "b": range(2, 3)}


def test_a_closed_bookkeeper_books_what_waits_and_no_more(path):
    bookkeeper = Bookkeeper(Log(path))
    closing = threading.Thread(target=bookkeeper.close)
    with held_at_the_disk(bookkeeper, [partial(bookkeeper.book, [booking()])] * 5):
        closing.start()
        wait_until(lambda: bookkeeper._writer._closed)
        with pytest.raises(NotReady, match="started again"):
            bookkeeper.book([booking()])
    closing.join()
    assert len(read(path)) == 5


# ------------------------------------------------------------------------------------- Bookkeeper


def test_learns_what_it_books(path):
    with bookkeeping(path) as bookkeeper:
        with pytest.raises(NotReady, match="no model"):
            bookkeeper.predict([booking()])
        with pytest.raises(NotReady, match="nothing has been predicted"):
            bookkeeper.metrics(10)
        assert bookkeeper.book([booking(), booking(text="food", account="7000")]) == range(0, 2)
        assert bookkeeper.predict([booking(text="food"), booking()]) == ["7000", "3115"]
        with pytest.raises(NotReady, match="nothing has been predicted"):
            bookkeeper.metrics(10)
        assert bookkeeper.book([]) == range(2, 2)
        assert bookkeeper.book([booking(text="food", account="7000")]) == range(2, 3)
        assert bookkeeper.metrics(10) == {"precision": 1, "recall": 1}
        health = bookkeeper.health()
        assert health.pop("uptime") >= 0
        assert health == {
            "status": "ok",
            "samples": 3,
            "unseen": 0,
            "checks": 0,
            "lines": 3,
            "accounts": 2,
            "companies": 1,
            "tokens": len({*tokens(booking()), *tokens(booking(text="food"))}),
        }


def test_a_batch_is_predicted_whole_before_any_of_it_is_learned(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(account="1")])
        bookkeeper.book([booking(text="new", account="2")] * 200)
        bookkeeper.book([booking(text="new", account="2")])
    records = read(path)
    assert [record["predicted"] for record in records] == [None, *["1"] * 200, "2"]
    assert [record["sample"]["AccountNumber"] for record in records[:2]] == ["1", "2"]
    assert [records[0][key] for key in ("margin", "confidence", "rank")] == [None] * 3


def test_a_sample_that_others_of_its_batch_have_taught_surprises_less(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(account="1")])
        bookkeeper.book([booking(text="new", account="2")] * 200)
    weights = [record["weight"] for record in read(path)[1:]]
    first, *later = bookkeep.rounds(200)
    assert {*weights[first]} == {1}
    assert all(max(weights[part]) < 1 for part in later)


def test_metrics_are_those_of_the_last_n_predictions(path):
    with bookkeeping(path) as bookkeeper:
        for batch in batches_of(bookings(500), 60):
            bookkeeper.book(batch)
        pairs = [
            (record["sample"]["AccountNumber"], record["predicted"])
            for record in map(json.loads, path.read_text().splitlines())
            if record["predicted"]
        ]
        assert len(pairs) == 440
        for n in (1, 7, 100, 440, 10_000):
            booked, predicted = zip(*pairs[-n:], strict=True)
            assert bookkeeper.metrics(n) == pytest.approx(
                {
                    name: score(booked, predicted, average="macro", zero_division=0)
                    for name, score in (("precision", precision_score), ("recall", recall_score))
                }
            )


def test_a_restart_changes_nothing(path):
    samples, asked = bookings(3000), bookings(50, seed=1)
    with bookkeeping(path) as bookkeeper:
        for batch in batches_of(samples, 170):
            bookkeeper.book(batch)
        before = state(bookkeeper, asked)
    with bookkeeping(path) as bookkeeper:
        assert state(bookkeeper, asked) == before
        assert bookkeeper.book([booking()]) == range(3000, 3001)
    assert [record["sample"] for record in read(path)] == [*samples, booking()]


@pytest.mark.parametrize(
    "damage",
    [
        {"weight": 0.83},
        {"weight": 2},
        {"weight": "1"},
        {"against": None},
        {"against": ["1"]},
        {"against": {"1": 0}},
        {"against": {"1": 0.83}},
        {"against": {"1": 2}},
        {"against": {"": 0.5}},
        {"margin": 10**400},
        {"margin": []},
        {"confidence": ""},
        {"confidence": 1.5},
        {"rank": 2.5},
        {"rank": 0},
        {"known": 6},
        {"known": "1"},
        {"known": None},
        {"sample": by("robot")},
        {"sample": by("suggestion")},
        {"corrects": 0, "sample": 5},
        {"predicted": ["1"]},
        {"sample": booking(account="")},
        {"sample": None},
        {"sample": {"CompanyId": "A"}},
    ],
    ids=str,
)
def test_a_record_that_makes_no_sense_is_refused_with_its_line(path, damage):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(account="1")])
        bookkeeper.book([booking(account="1"), booking(account="9")])
    assert_refused(path, 2, damage)


def assert_refused(path, line, damage):
    """Changes that line, from 1, and sees that no bookkeeper takes the log."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = changed(lines[line - 1], **damage)
    path.write_bytes(b"".join(lines))
    log = Log(path)
    with pytest.raises(LogError, match=f"is damaged, line {line}: "):
        Bookkeeper(log)
    log.close()


@pytest.mark.parametrize(
    "damage", [{"weight": 0.5}, {"reviewed": True}, {"sample": by("person")}], ids=str
)
def test_an_unseen_record_that_makes_no_sense_is_refused_with_its_line(path, damage):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(), by("suggestion")])
    assert_refused(path, 2, damage)


def test_suggestions_agree_with_predictions_and_their_reasons_add_up(path):
    with bookkeeping(path) as bookkeeper:
        with pytest.raises(NotReady, match="no model"):
            suggested_by(bookkeeper, booking(), 3)
        for batch in batches_of(bookings(800), 50):
            bookkeeper.book(batch)
        for sample in [*bookings(40, seed=1), booking(text="rent rent nobody knows")]:
            suggestions = suggested_by(bookkeeper, sample, 20)["suggestions"]
            accounts = [suggestion["account"] for suggestion in suggestions]
            assert accounts[0] == bookkeeper.predict([sample])[0]
            assert len({*accounts}) == len(accounts) == 8
            assert suggested_by(bookkeeper, sample, 1)["suggestions"] == suggestions[:1]
            [scores] = bookkeeper._model.joint_log_likelihood([tokens(sample)])
            score = {name: scores[number] for name, number in bookkeeper._model.accounts.items()}
            assert accounts == sorted(score, key=score.get, reverse=True)
            assert [suggestion["over"] for suggestion in suggestions] == [
                accounts[1],
                *[accounts[0]] * 7,
            ]
            confidences = [suggestion["confidence"] for suggestion in suggestions]
            assert confidences == sorted(confidences, reverse=True)
            for suggestion in suggestions:
                reasons = suggestion["reasons"]
                weights = [reason["weight"] for reason in reasons]
                assert weights == sorted(weights, reverse=True)
                assert sum(weights) + suggestion["prior"] == pytest.approx(
                    suggestion["margin"], abs=1e-3
                )
                difference = score[suggestion["account"]] - score[suggestion["over"]]
                assert suggestion["margin"] == pytest.approx(difference, abs=1e-4)
                said = [(reason["kind"], reason["token"]) for reason in reasons]
                assert len({*said}) == len(said)
                assert {*said} <= {*bookkeep.wordings(sample)}
                assert "knows" not in {token for _, token in said}


def test_a_reason_is_what_the_word_says_for_one_account_over_the_other(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(text="rent", account="1"), booking(text="food", account="2")])
        [first, second] = suggested_by(bookkeeper, booking(text="rent food rent"), 3)["suggestions"]
        assert (first["account"], first["over"], second["account"]) == ("1", "2", "2")
        assert first["prior"] == 0
        weights = {(r["kind"], r["token"]): r["weight"] for r in first["reasons"]}
        odds = np.log((1 + bookkeep.ALPHA) / bookkeep.ALPHA)
        for kind in bookkeep.KINDS[2:4]:
            assert weights[kind, "rent"] == pytest.approx(2 * odds, abs=1e-4)
            assert weights[kind, "food"] == pytest.approx(-odds, abs=1e-4)
        for kind in bookkeep.KINDS[4:6]:
            assert weights[kind, "rent"] == pytest.approx(odds, abs=1e-4)
        assert (bookkeep.KINDS[6], "rent food") not in weights
        assert second["margin"] == -first["margin"]


def test_one_account_alone_is_suggested_without_reasons(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()])
        assert suggested_by(bookkeeper, booking(), 3)["suggestions"] == [
            {
                "account": "3115",
                "confidence": 0,
                "over": None,
                "margin": None,
                "prior": None,
                "reasons": [],
            }
        ]


def test_confidence_is_the_record_of_earlier_predictions_only(path):
    who = random.Random(1)
    before = []
    with bookkeeping(path) as bookkeeper:
        for batch in batches_of(bookings(600), 60):
            batch = [by(who.choice(["person", "check", "suggestion"]), sample) for sample in batch]
            bookkeeper.book(batch)
            for record in read_lines(path)[-len(batch) :: 7]:
                if record["predicted"]:
                    asked = {key: record[key] for key in ("predicted", "known")}
                    asked["company"] = record["sample"]["CompanyId"]
                    asked["bin"] = bin_of(record["margin"], record["sample"])
                    expected = confidence_by_hand(before, asked)
                    assert record["confidence"] == pytest.approx(expected, abs=1e-4)
            before = judged(path)
        ranks = [row for row in before if row["booked"] == row["predicted"]]
        assert 100 < len(ranks) < len(before)
        for seq in range(0, 600, 40):
            bookkeeper.correct(seq, "3001")
        bookkeeper.forget("company3")
        for sample in [*bookings(40, seed=1), booking("new")]:
            assert_confidence_is_that_of_the_log(bookkeeper, path, sample)
    with bookkeeping(path) as bookkeeper:
        for sample in bookings(5, seed=1):
            assert_confidence_is_that_of_the_log(bookkeeper, path, sample)


def assert_confidence_is_that_of_the_log(bookkeeper, path, sample):
    """What a suggestion says of its confidence is what the log and the formula say."""
    answer = suggested_by(bookkeeper, sample, 1)
    [best] = answer["suggestions"]
    asked = {
        "company": sample["CompanyId"],
        "predicted": best["account"],
        "bin": bin_of(best["margin"], sample),
        "known": bookkeep.KNOWN.index(answer["record"]["known"]),
    }
    rows = judged(path)
    assert best["confidence"] == pytest.approx(confidence_by_hand(rows, asked), abs=1e-4)
    assert answer["record"]["own"] == tally_by_hand(own_by_hand(rows, asked, "predicted"))


def test_it_says_what_was_known(path):
    known = {
        ("B", "rent May", "> -1000"): "nothing of the company",
        ("A", "food", "> -1000"): "nothing of the text",
        ("A", "new May", "> -1000"): "a word",
        ("A", "rent August", "< 10"): "the first word",
        ("A", "rent August", "> -1000"): "the first word and the amount",
        ("A", "rent May again", "< 10"): "the first two words",
    }
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()])
        for (company, text, amount), expected in known.items():
            answer = suggested_by(bookkeeper, booking(company, text, amount), 1)
            assert answer["record"]["known"] == expected
        bookkeeper.book([booking(*sample) for sample in known])
    lines = read_lines(path)
    assert [line["known"] for line in lines] == [0, *range(6)]


def test_of_a_company_without_a_booking_it_knows_that_it_knows_nothing(path):
    with bookkeeping(path) as bookkeeper:
        for turn in range(60):
            bookkeeper.book([booking(f"company{turn}", "rent", account=str(turn))])
            bookkeeper.book([booking(f"company{turn}", "rent", account=str(turn))] * 5)
        [new] = suggested_by(bookkeeper, booking("new", "rent"), 1)["suggestions"]
        [old] = suggested_by(bookkeeper, booking("company7", "rent"), 1)["suggestions"]
        assert new["confidence"] < 0.1
        assert (old["account"], old["confidence"] > 0.8) == ("7", True)


def test_what_was_booked_unseen_proves_nothing(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book(bookings(200))
        bookkeeper.book(bookings(200, seed=1))
        before = state(bookkeeper, bookings(20, seed=2))[:-1]
        sums = sums_of(bookkeeper._calibration)
        unseen = [by("suggestion", sample) for sample in bookings(50, seed=3)]
        [*_, new] = seqs = bookkeeper.book([*unseen, by("suggestion", account="new")])
        assert state(bookkeeper, bookings(20, seed=2))[:-1] == before
        assert sums_of(bookkeeper._calibration) == sums
        records = read_lines(path)[400:]
        assert [record["sample"] for record in records[:-1]] == unseen
        for record in records:
            assert (record["reviewed"], "weight" in record) == (False, False)
            assert record["predicted"]
            assert 0 <= record["confidence"] <= 1
        health = bookkeeper.health()
        assert [health[name] for name in ("samples", "unseen", "checks")] == [451, 51, 0]
        assert bookkeeper.report(1000)["support"] == 200
        assert bookkeeper.report(1000)["unseen"] == 51

        # A person looks at two of them: from then on they are learned, but never scored.
        assert bookkeeper.correct(seqs[0], "7") == unseen[0]["AccountNumber"]
        assert bookkeeper.correct(new, "new") == "new"
        assert counts(bookkeeper._model) == counts(taught(standing(path)))
        assert bookkeeper.predict([booking()]) == ["new"]
        assert suggested_by(bookkeeper, unseen[0], 1)["suggestions"][0]["account"] == "7"
        assert sums_of(bookkeeper._calibration) == sums
        assert bookkeeper.health()["unseen"] == 49
        assert len(read_lines(path)) == 453
        assert bookkeeper.correct(new, "new") == "new"  # which has been looked at by now
        assert len(read_lines(path)) == 453
        assert bookkeeper.correct(seqs[0], "8") == "7"
        known = state(bookkeeper, bookings(20, seed=2))
    with bookkeeping(path) as bookkeeper:
        assert state(bookkeeper, bookings(20, seed=2)) == known
        assert counts(bookkeeper._model) == counts(taught(standing(path)))
        assert bookkeeper.forget("company2") > 0
        assert counts(bookkeeper._model) == counts(taught(standing(path)))


def test_a_check_counts_for_those_that_nobody_looked_at(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()])
        bookkeeper.book([by("check"), by("suggestion"), by("person", account="2")])
        report = bookkeeper.report(10)
        assert (report["support"], report["unseen"], report["checks"]) == (2, 1, 1)
        assert report["accuracy"] == 16 / 17
        assert report["recall"] == (16 / 16 + 0) / 2
        assert report["precision"] == (16 / 17 + 0) / 2
        assert report["confused"] == [{"booked": "2", "predicted": "3115", "count": 1}]
        assert bookkeeper.metrics(1) == {"precision": 0, "recall": 0}
        record = suggested_by(bookkeeper, booking(), 1)["record"]
        assert record["own"] == {"suggestions": 2, "right": 1}
        assert record["all"] == {"suggestions": 17, "right": 16}
        assert bookkeeper.gauges()["checks"][1] == bookkeeper.health()["checks"] == 1


def test_who_tells_nothing_books_as_a_person(path, tmp_path):
    told = tmp_path / "told.jsonl"
    with bookkeeping(path) as silent, bookkeeping(told) as telling:
        for batch in batches_of(bookings(500), 60):
            silent.book(batch)
            telling.book([by("person", sample) for sample in batch])
        assert state(silent, bookings(30, seed=1)) == state(telling, bookings(30, seed=1))
        assert silent.report(100) == telling.report(100)
    for line, other in zip(read_lines(path), read_lines(told), strict=True):
        assert line | {"sample": 0, "crc": 0} == other | {"sample": 0, "crc": 0}


def test_one_in_sixteen_is_to_be_checked_whatever_recurs(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()])

        def drawn(sample, place=0):
            return suggested_by(bookkeeper, sample, 1, place)["check"]

        many = [booking(text=f"rent {i}") for i in range(1600)]
        assert 60 < sum(map(drawn, many)) < 140
        assert [drawn(sample) for sample in many[:200]] == [drawn(sample) for sample in many[:200]]
        # The same again: by its place in the request, and by how many bookings there are.
        assert 0 < sum(drawn(booking(), place) for place in range(200)) < 40
        found = []
        for _ in range(100):
            found.append(drawn(booking()))
            bookkeeper.book([booking()])
        assert 0 < sum(found) < 25
        others = suggested_by(bookkeeper, booking("B"), 1)["check"]
        bookkeeper.book([booking()])
        assert suggested_by(bookkeeper, booking("B"), 1)["check"] == others


def test_a_decision_is_by_confidence_and_check(path):
    with bookkeeping(path) as bookkeeper:
        for batch in batches_of(bookings(600), 60):
            bookkeeper.book(batch)
        seen = Counter()
        for place, sample in enumerate(bookings(300, seed=1)):
            answer = suggested_by(bookkeeper, sample, 1, place, book_from=0.6)
            sure = answer["suggestions"][0]["confidence"] >= 0.6
            decision = ("check" if answer["check"] else "book") if sure else "review"
            assert answer["decision"] == decision
            seen[decision] += 1
        assert len(seen) == 3
        assert "decision" not in suggested_by(bookkeeper, sample, 1)
        confidence = answer["suggestions"][0]["confidence"]
        assert suggested_by(bookkeeper, sample, 1, place, confidence)["decision"] != "review"


def test_without_reasons_suggestions_are_the_same_however_many(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(account=account) for account in "4213"])  # alike, but for names
        asked = [booking("C", "new"), booking("D", "")]
        bookkeeper.book(bookings(500))
        asked += bookings(300, seed=1)
        for top in (1, 3, 20):
            expected = [
                suggested_by(bookkeeper, sample, top, i, 0.5) for i, sample in enumerate(asked)
            ]
            assert bookkeeper.suggest(asked, top, 0.5) == expected
            for answer in expected:
                for suggestion in answer["suggestions"]:
                    del suggestion["prior"], suggestion["reasons"]
            assert bookkeeper.suggest(asked, top, 0.5, with_reasons=False) == expected
        assert bookkeeper.suggest([], 3) == []


def test_a_correction_unlearns_the_old_and_learns_the_new(path):
    samples = bookings(400)
    with bookkeeping(path) as bookkeeper:
        for batch in batches_of(samples, 40):
            bookkeeper.book(batch)
        before = path.read_bytes()
        assert bookkeeper.correct(123, "new") == samples[123]["AccountNumber"]
        assert bookkeeper.correct(7, "3003") == samples[7]["AccountNumber"]
        assert bookkeeper.correct(123, "3001") == "new"
        assert path.read_bytes().startswith(before)
        lines = read_lines(path)[400:]
        assert [(line["corrects"], line["AccountNumber"]) for line in lines] == [
            (123, "new"),
            (7, "3003"),
            (123, "3001"),
        ]
        assert lines[0]["weight"] == 1  # nobody had booked to it
        assert bookkeeper.correct(123, "3001") == "3001"
        assert len(path.read_bytes().splitlines()) == 403  # it was so already
        assert bookkeeper.health()["samples"] == 400
        assert counts(bookkeeper._model) == counts(taught(standing(path)))
        corrected = [*samples[:7], samples[7] | {"AccountNumber": "3003"}, *samples[8:]]
        corrected[123] = samples[123] | {"AccountNumber": "3001"}
        assert [(tokens(c), c["AccountNumber"]) for c in corrected] == [
            (document, lesson.account) for document, lesson in standing(path)
        ]
        for sample in samples[:10]:
            assert_confidence_is_that_of_the_log(bookkeeper, path, sample)
        known = state(bookkeeper, samples[:50])
        suggested = [suggested_by(bookkeeper, sample, 5) for sample in samples[:50]]
        reported = bookkeeper.report(1000)
    with bookkeeping(path) as bookkeeper:
        assert state(bookkeeper, samples[:50]) == known
        assert [suggested_by(bookkeeper, sample, 5) for sample in samples[:50]] == suggested
        assert bookkeeper.report(1000) == reported
        assert bookkeeper.correct(123, "x") == "3001"
        assert counts(bookkeeper._model) == counts(taught(standing(path)))


def test_metrics_score_the_old_prediction_against_the_corrected_account(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(account="1")])
        bookkeeper.book([booking(account="2")])
        assert bookkeeper.metrics(10) == {"precision": 0, "recall": 0}
        assert suggested_by(bookkeeper, booking(), 1)["suggestions"][0]["confidence"] == 0
        bookkeeper.correct(1, "1")
        assert bookkeeper.metrics(10) == {"precision": 1, "recall": 1}
        assert bookkeeper.predict([booking()]) == ["1"]
        assert_confidence_is_that_of_the_log(bookkeeper, path, booking())
        assert suggested_by(bookkeeper, booking(), 1)["suggestions"][0]["confidence"] > 0.2
        bookkeeper.correct(0, "3")  # which was never predicted
        assert bookkeeper.metrics(10) == {"precision": 1, "recall": 1}


def test_who_corrects_a_correction_back_leaves_no_trace_in_the_confidence(path):
    with bookkeeping(path) as bookkeeper:
        for batch in batches_of(bookings(300), 50):
            bookkeeper.book(batch)
        before = [array.tolist() for array in bookkeeper._calibration.state().values()]
        for record in read_lines(path)[60::20]:
            bookkeeper.correct(record["seq"], "9999")
            bookkeeper.correct(record["seq"], record["sample"]["AccountNumber"])
        after = [array.tolist() for array in bookkeeper._calibration.state().values()]
        assert after[:3] == before[:3]


def test_a_report_counts_the_unseen_since_the_first_of_its_predictions(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()])
        for who in ("suggestion", "person", "suggestion", "suggestion", "person"):
            bookkeeper.book([by(who)])
        assert [bookkeeper.report(n)["unseen"] for n in (1, 2, 9)] == [0, 2, 2]


def test_a_mistake_that_was_corrected_is_not_repeated(path):
    with bookkeeping(path) as bookkeeper:
        for batch in batches_of(bookings(300), 30):
            bookkeeper.book(batch)
        wrong = booking(text="new supplier", account="3001")
        [seq] = bookkeeper.book([wrong])
        assert bookkeeper.predict([wrong]) == ["3001"]
        bookkeeper.correct(seq, "6700")
        assert bookkeeper.predict([wrong]) == ["6700"]


def test_a_company_that_is_forgotten_was_never_there(path):
    samples = bookings(600)
    company = samples[0]["CompanyId"]
    others = [sample for sample in samples if sample["CompanyId"] != company]
    mine = [seq for seq, sample in enumerate(samples) if sample["CompanyId"] == company]
    with bookkeeping(path) as bookkeeper:
        for number, batch in enumerate(batches_of(samples, 50)):
            bookkeeper.book(batch, f"key{number}")
        other = next(seq for seq in range(600) if seq not in mine)
        for number, seq in enumerate((mine[0], other, mine[5], mine[0])):
            bookkeeper.correct(seq, f"account{number}")
        kept = {
            record["seq"]: record
            for record in read_lines(path)
            if record.get("corrects", record["seq"]) not in mine
        }
        assert bookkeeper.forget(company) == len(mine) > 50
        assert not bookkeep._digests
        left = read_lines(path)
        assert [record["seq"] for record in left] == list(range(604))
        for record in left:
            assert kept.get(record["seq"], record) == record
            assert (record.keys() == {*bookkeep.PLACE, "crc"}) == (record["seq"] not in kept)
        assert company not in path.read_text()
        assert re.findall("account[0-9]", path.read_text()) == ["account1"]
        assert counts(bookkeeper._model) == counts(taught(standing(path)))
        assert bookkeeper.health()["samples"] == len(others)
        assert bookkeeper.health()["companies"] == 4
        with pytest.raises(NotFound):
            bookkeeper.forget(company)
        with pytest.raises(NotFound):
            bookkeeper.report(10, company)
        with pytest.raises(NotFound, match=f"there is no booking {mine[1]}"):
            bookkeeper.correct(mine[1], "1")
        known = state(bookkeeper, samples[:50])
        suggested = [suggested_by(bookkeeper, sample, 5) for sample in samples[:50]]
    with bookkeeping(path) as bookkeeper:
        assert state(bookkeeper, samples[:50]) == known
        assert [suggested_by(bookkeeper, sample, 5) for sample in samples[:50]] == suggested
        # A batch that comes again brings nothing back.
        assert bookkeeper.book(samples[:50], "key0") == range(0, 50)
        with pytest.raises(Conflict):
            bookkeeper.book([booking()] * 50, "key0")
        with pytest.raises(Conflict):
            bookkeeper.book(samples[:49], "key0")
        assert bookkeeper.book([booking(company=company)]) == range(604, 605)
        assert bookkeeper.forget(company) == 1


def test_others_are_booked_corrected_and_predicted_while_a_company_is_forgotten(path, monkeypatch):
    samples = bookings(3000)
    answers = []
    with bookkeeping(path) as bookkeeper:
        for number, batch in enumerate(batches_of(samples, 500)):
            bookkeeper.book(batch, f"batch{number}")
        mine = [seq for seq, sample in enumerate(samples) if sample["CompanyId"] == "company1"]
        other = next(seq for seq in range(3000) if seq not in mine)
        bookkeeper.correct(mine[3], "3001")
        extend, change_by = Copy.extend, Bookkeeper._change_by

        def between(step):
            """What others do between two steps, and what they get."""
            [late] = bookkeeper.book([booking("company1", f"late {step}")])
            [seq] = bookkeeper.book([booking("B", f"rent {step}", account="new")])
            assert bookkeeper.correct(other, str(step)) != str(step)
            assert bookkeeper.predict([booking("B", "rent")]) == ["new"]
            answers.append((late, seq))
            if step > 2:  # it is gone
                for gone in (mine[0], mine[3], answers[0][0]):
                    with pytest.raises(NotFound):
                        bookkeeper.correct(gone, "3001")
                assert bookkeeper.book(samples[:500], "batch0") == range(500)

        def extended(self, *lines):
            extend(self, *lines)
            if len(answers) < 2:  # it is not the writer's time yet
                between(len(answers))

        def changed_by(self, make, *arguments):
            found = change_by(self, make, *arguments)
            if getattr(make, "__name__", "") == "_learn" and len(answers) < 4:
                between(len(answers) + 1)
            return found

        monkeypatch.setattr(Copy, "extend", extended)
        monkeypatch.setattr(Bookkeeper, "_change_by", changed_by)
        assert bookkeeper.forget("company1") == len(mine) + 2
        assert counts(bookkeeper._model) == counts(taught(standing(path)))
        assert bookkeeper._history.size("company1") == len(answers) - 2
        for sample in bookings(5, seed=1):
            assert_confidence_is_that_of_the_log(bookkeeper, path, sample)
        known = state(bookkeeper, samples[:50])
    with bookkeeping(path) as bookkeeper:
        assert state(bookkeeper, samples[:50]) == known
    assert "late 0" not in path.read_text()
    assert "late 3" in path.read_text()


def test_the_writer_copies_only_what_came_while_the_rest_was_copied(path, monkeypatch):
    copied = {}

    def extend(copy, *lines, extend=Copy.extend):
        before = len(copy.starts)
        extend(copy, *lines)
        who = threading.current_thread().name
        copied[who] = copied.get(who, 0) + len(copy.starts) - before

    monkeypatch.setattr(Copy, "extend", extend)
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()] * 300)
        bookkeeper.forget("A")
        assert copied == {threading.current_thread().name: 300, "writer": 0}


def test_what_comes_while_a_company_is_forgotten_is_forgotten_too(path, monkeypatch):
    extend, append = Copy.extend, Log.append

    def late(copy, *lines):
        if not copy.starts:
            bookkeeper.book([booking(text="late")])
        extend(copy, *lines)

    def slow(log, batches):
        records = append(log, batches)
        time.sleep(0.001)  # it is in the log, but not yet known to be
        return records

    monkeypatch.setattr(Copy, "extend", late)
    monkeypatch.setattr(Log, "append", slow)
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(), booking(company="B", account="2")] * 500)
        stop = threading.Event()

        def book():
            while not stop.is_set():
                bookkeeper.book([booking(text="later", account="3")])

        booking_on = threading.Thread(target=book)
        booking_on.start()
        for _ in range(10):
            bookkeeper.book([booking()])  # whatever the other thread has done
            bookkeeper.forget("A")
        stop.set()
        booking_on.join()
        known = state(bookkeeper, [booking()])
        assert 'late"' not in path.read_text()
    with bookkeeping(path) as bookkeeper:
        assert state(bookkeeper, [booking()]) == known


def test_a_step_of_forgetting_is_not_refused_where_many_bookings_wait(path, monkeypatch):
    monkeypatch.setattr(bookkeep, "BACKLOG", 10)
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(), booking(company="B")])
        calls = [partial(bookkeeper.book, [booking(company="B")] * n) for n in (1, 11)]
        calls += [partial(bookkeeper.forget, "A"), partial(bookkeeper.correct, 1, "5")]
        with held_at_the_disk(bookkeeper, calls):
            pass
        assert bookkeeper.health()["samples"] == 13


def test_companies_are_forgotten_one_after_the_other(path, monkeypatch):
    enter, leave, together, most = Copy.__enter__, Copy.__exit__, [], []

    def entered(copy):
        together.append(copy)
        most.append(len(together))
        time.sleep(0.05)
        return enter(copy)

    def left(copy, *error):
        leave(copy, *error)
        together.remove(copy)

    monkeypatch.setattr(Copy, "__enter__", entered)
    monkeypatch.setattr(Copy, "__exit__", left)
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(company) for company in "ABC"])
        forgetting = [threading.Thread(target=bookkeeper.forget, args=[name]) for name in "ABC"]
        for thread in forgetting:
            thread.start()
        for thread in forgetting:
            thread.join()
        assert bookkeeper.health()["samples"] == 0
    assert most == [1, 1, 1]


def test_a_stop_while_a_company_is_forgotten_leaves_all_of_it(path, monkeypatch):
    copying, go_on, answers = threading.Event(), threading.Event(), []
    extend = Copy.extend

    def held(copy, *lines):
        copying.set()
        assert go_on.wait(30)
        extend(copy, *lines)

    def forget():
        with pytest.raises(NotReady):
            bookkeeper.forget("A")
        answers.append(NotReady)

    monkeypatch.setattr(Copy, "extend", held)
    bookkeeper = Bookkeeper(Log(path))
    bookkeeper.book([booking()] * 3)
    before = path.read_bytes()
    threads = [threading.Thread(target=forget), threading.Thread(target=bookkeeper.close)]
    threads[0].start()
    assert copying.wait(30)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive()  # it waits for the copy, which reads the log
    go_on.set()
    for thread in threads:
        thread.join()
    assert answers == [NotReady]
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_when_all_is_forgotten_there_is_no_model(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()])
        bookkeeper.book([booking()])
        assert bookkeeper.forget("A") == 2
        for ask in (bookkeeper.predict, lambda samples: suggested_by(bookkeeper, samples[0], 1)):
            with pytest.raises(NotReady, match="no model"):
                ask([booking()])
        with pytest.raises(NotReady):
            bookkeeper.metrics(1)
        health = bookkeeper.health()
        assert [health[key] for key in ("samples", "accounts", "companies", "tokens")] == [0] * 4
        assert bookkeeper.book([booking(account="2")]) == range(2, 3)
        assert read_lines(path)[2]["predicted"] is None
        assert bookkeeper.predict([booking()]) == ["2"]
        [suggestion] = suggested_by(bookkeeper, booking(), 3)["suggestions"]
        assert suggestion["account"] == "2"


@given(st.data())
@settings(max_examples=15)
def test_any_mix_of_bookings_corrections_and_forgetting_is_exact(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("mix") / "log.jsonl"
    bookkeeper = Bookkeeper(Log(path))
    try:
        for _ in range(data.draw(st.integers(1, 20))):
            match data.draw(st.sampled_from(["book", "book", "correct", "forget", "restart"])):
                case "book":
                    seed = data.draw(st.integers(0, 9))
                    who = st.sampled_from(["person", "check", "suggestion"])
                    booked = bookings(data.draw(st.integers(0, 30)), seed)
                    bookkeeper.book([by(data.draw(who), sample) for sample in booked])
                case "correct":
                    seq = data.draw(st.integers(0, 60))
                    with suppress(NotFound):
                        bookkeeper.correct(seq, data.draw(st.sampled_from(["3001", "3005", "new"])))
                case "forget":
                    with suppress(NotFound):
                        bookkeeper.forget(f"company{data.draw(st.integers(0, 4))}")
                case "restart":
                    bookkeeper.close()
                    bookkeeper = Bookkeeper(Log(path))
        learned = standing(path)
        assert counts(bookkeeper._model) == counts(taught(learned))
        health = bookkeeper.health()
        assert health["samples"] - health["unseen"] == len(learned)
        asked = bookings(5, seed=10)
        names = [lesson.account for _, lesson in learned]

        def known():
            with suppress(NotReady):
                return bookkeeper.metrics(50), suggested_by(bookkeeper, asked[0], 1)

        before = known()
        bookkeeper.close()
        bookkeeper = Bookkeeper(Log(path))
        assert known() == before
        assert bookkeeper.health()["accounts"] == len({*names})
        if names:
            assert_confidence_is_that_of_the_log(bookkeeper, path, asked[0])
    finally:
        bookkeeper.close()


@pytest.mark.parametrize("change", ["correct", "forget"])
def test_a_change_that_cannot_be_written_is_not_made(path, monkeypatch, change):
    samples = bookings(100)
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book(samples[:50])
        bookkeeper.book(samples[50:])
        before, log = state(bookkeeper, samples), path.read_bytes()
        with monkeypatch.context() as patch:

            def broken(file):
                raise OSError(28, "No space left on device")

            patch.setattr(os, "fsync", broken)
            with pytest.raises(NotStored, match="No space"):
                bookkeeper.correct(3, "1") if change == "correct" else bookkeeper.forget("company1")
        assert state(bookkeeper, samples) == before
        assert path.read_bytes() == log
        assert bookkeeper.correct(3, "1") == samples[3]["AccountNumber"]
        assert bookkeeper.forget("company1") > 0


def test_after_a_removal_that_may_not_be_on_disk_nothing_is_booked(path, monkeypatch):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()])
        with monkeypatch.context() as patch:

            def broken(folder):
                raise OSError(5, "Input/output error")

            patch.setattr(bookkeep, "_fsync_folder", broken)
            with pytest.raises(NotReady, match="started again"):
                bookkeeper.forget("A")
        with pytest.raises(NotReady, match="started again"):
            bookkeeper.book([booking()])
    with bookkeeping(path) as bookkeeper:
        assert bookkeeper.health()["samples"] == 0


def test_a_booking_that_cannot_be_read_is_neither_corrected_nor_forgotten(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()])
        path.write_bytes(path.read_bytes().replace(b"rent", b"Rent"))
        with pytest.raises(NotStored, match="line 1 of the log could not be read"):
            bookkeeper.correct(0, "1")
        with pytest.raises(NotStored):
            bookkeeper.forget("A")
        assert bookkeeper.book([booking()]) == range(1, 2)


def test_what_cannot_be_read_is_not_said_to_be_unwritten(path, monkeypatch, caplog):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()])

        def broken(*_):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", broken)
            with pytest.raises(NotStored, match=r"line 1 of the log could not be read .*output"):
                bookkeeper.correct(0, "1")
    assert "line 1 of the log could not be read" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        {"corrects": 2},
        {"corrects": 9},
        {"corrects": "0"},
        {"corrects": 0.0},
        {"AccountNumber": ""},
        {"weight": 2},
    ],
    ids=str,
)
def test_a_correction_that_makes_no_sense_is_refused_with_its_line(path, damage):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(), booking()])
        bookkeeper.correct(1, "1")
        bookkeeper.correct(0, "1")
    assert_refused(path, 4, damage)
    status, out, _ = run(HERE / "bookkeep.py", "check", path)
    assert status == 1
    assert f"{path}, line 4: " in out


def test_a_report_is_of_the_last_n_predictions_as_they_stand(path):
    with bookkeeping(path) as bookkeeper:
        with pytest.raises(NotReady):
            bookkeeper.report(10)
        for batch in batches_of(bookings(500), 60):
            bookkeeper.book(batch)
        bookkeeper.correct(450, "corrected")
        rows = [
            (line["sample"]["CompanyId"], line["sample"]["AccountNumber"], *map(line.get, KEYS))
            if line["seq"] != 450
            else (line["sample"]["CompanyId"], "corrected", *map(line.get, KEYS))
            for line in read_lines(path)
            if line.get("predicted")
        ]
        for n, company in ((1, None), (100, None), (10**6, None), (30, "company1")):
            expected = [row for row in rows if company in (None, row[0])][-n:]
            _, booked, predicted, confidence = zip(*expected, strict=True)
            right = np.array(booked) == np.array(predicted)
            report = bookkeeper.report(n, company)
            assert report["support"] == len(expected)
            assert report["accuracy"] == right.mean()
            for name, score in (("precision", precision_score), ("recall", recall_score)):
                expected = score(booked, predicted, average="macro", zero_division=0)
                assert report[name] == pytest.approx(expected)
            confused = Counter((b, p) for b, p in zip(booked, predicted, strict=True) if b != p)
            assert [row["count"] for row in report["confused"]] == [
                count for _, count in confused.most_common(10)
            ]
            for row in report["confused"]:
                assert confused[row["booked"], row["predicted"]] == row["count"]
            assert [row["at_least"] for row in report["confidence"]] == [0.5, 0.8, 0.9, 0.95, 0.99]
            for row in report["confidence"]:
                sure = right[np.array(confidence) >= row["at_least"]]
                assert row["share"] == len(sure) / len(right)
                assert row["accuracy"] == (sure.mean() if len(sure) else None)
            levels = bookkeeper.report(n, company, 0.85)["confidence"]
            assert [row["at_least"] for row in levels] == [0.5, 0.8, 0.85, 0.9, 0.95, 0.99]
            assert [row for row in levels if row["at_least"] != 0.85] == report["confidence"]
        with pytest.raises(NotFound):
            bookkeeper.report(10, "company9")


KEYS = ("predicted", "confidence")


def test_the_overview_is_what_metrics_and_the_log_say(path):
    with bookkeeping(path) as bookkeeper:
        empty = bookkeeper.overview()
        assert empty["health"]["samples"] == 0
        assert [empty[key] for key in ("metrics", "curve", "confidence")] == [None, [], []]
        for batch in batches_of(bookings(3000), 200):
            bookkeeper.book(batch)
        for _ in range(2):
            overview = bookkeeper.overview()
            records = [record for record in read_lines(path) if "sample" in record]
            last = {r["corrects"]: r["AccountNumber"] for r in read_lines(path) if "corrects" in r}
            booked = [last.get(r["seq"], r["sample"]["AccountNumber"]) for r in records]
            last = overview["curve"][-1]
            assert overview["metrics"] == {n: last[n] for n in ("accuracy", "precision", "recall")}
            assert overview["metrics"].items() > bookkeeper.metrics(1000).items()
            assert overview["scored"] == 2800
            ends = [point["bookings"] for point in overview["curve"]]
            assert ends == list(range(250, 3001, 250))
            for point in overview["curve"]:
                end = point["bookings"]
                window = range(max(200, end - 1000), end)
                pairs = [[records[i]["predicted"] for i in window], [booked[i] for i in window]]
                assert point["accuracy"] == np.mean([p == b for p, b in zip(*pairs, strict=True)])
                for name, score in (("precision", precision_score), ("recall", recall_score)):
                    expected = score(*pairs[::-1], average="macro", zero_division=0)
                    assert point[name] == pytest.approx(expected)
            levels = [row["at_least"] for row in overview["confidence"]]
            assert levels == [0, 0.5, 0.8, 0.9, 0.95, 0.99]
            first = overview["confidence"][0]
            assert (first["at_least"], first["share"], first["checks"]) == (0, 1, 0)
            assert first["accuracy"] == bookkeeper.report(10_000)["accuracy"]
            ours = bookkeeper.overview("company1")
            theirs = bookkeeper.report(10_000, "company1")["confidence"]
            assert [row for row in ours["confidence"] if row in theirs] == theirs
            with pytest.raises(NotFound):
                bookkeeper.overview("nobody")
            for seq in (1100, 2999):
                bookkeeper.correct(seq, "corrected")


def test_the_overview_says_what_nobody_has_looked_at(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(account="1")])
        bookkeeper.book([by("suggestion", account="2"), by("suggestion", account="1")])
        overview = bookkeeper.overview()
        assert overview["health"]["unseen"] == 2
        assert (overview["metrics"], overview["confidence"]) == (None, [])
        bookkeeper.correct(1, "3")
        assert bookkeeper.overview()["health"]["unseen"] == 1


def test_a_booking_is_told_as_it_stands_now(path):
    rent = {"account": "1", "AccountName": "Rent", "Note": "x"}
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(**rent), booking("B", account="1", AccountName="Theirs")])
        bookkeeper.book([by("suggestion", **rent)] * 2 + [by("check", **rent)])
        bookkeeper.book([booking(account="2", AccountName="Food"), booking(account="2")])
        usual = {
            **{"seq": 6, "sample": booking(account="2"), "account": "2", "name": "Food"},
            **{"predicted": "1", "predicted_name": "Rent", "rank": None, "reviewed": True},
            **{"booked_by": "person", "corrected": None},
        }
        confidence = {line["seq"]: line["confidence"] for line in read_lines(path)}
        assert bookkeeper.booking(6) == usual | {"confidence": confidence[6]}
        unseen = bookkeeper.booking(2)
        sample = by("suggestion", **rent)
        assert unseen == usual | {
            **{"seq": 2, "sample": sample, "account": "1", "name": "Rent", "rank": 1},
            **{"confidence": confidence[2], "reviewed": False, "booked_by": "suggestion"},
        }
        bookkeeper.correct(2, "1")
        confirmed = {"reviewed": True, "booked_by": "person", "corrected": {"from": "1"}}
        confirmed |= {"sample": sample | {"BookedBy": "person"}}
        assert bookkeeper.booking(2) == unseen | confirmed
        bookkeeper.correct(4, "2")
        food = {"account": "2", "name": "Food", "rank": None, "corrected": {"from": "1"}}
        food |= {"sample": by("check", account="2", Note="x"), "booked_by": "check"}
        assert bookkeeper.booking(4).items() >= food.items()
        bookkeeper.correct(5, "1")
        assert bookkeeper.booking(5)["rank"] == 1
        first = bookkeeper.booking(0)
        assert [first[k] for k in ("predicted", "predicted_name", "confidence", "rank")] == 4 * [
            None
        ]
        for seq in (7, 99):  # a correction, and none
            with pytest.raises(NotFound):
                bookkeeper.booking(seq)
        found, _ = bookkeeper.bookings(50)
        assert [each["seq"] for each in found] == [6, 5, 4, 3, 2, 1, 0]
        assert found == [bookkeeper.booking(each["seq"]) for each in found]
        assert bookkeeper.bookings(9, "A", reviewed=False)[0] == [bookkeeper.booking(3)]
        with pytest.raises(NotFound):
            bookkeeper.bookings(50, "nobody")
    with bookkeeping(path, unsaved=1) as bookkeeper:
        assert bookkeeper.bookings(50)[0] == found
    with bookkeeping(path) as bookkeeper:  # from the snapshot
        assert bookkeeper._snapshot.lines
        assert bookkeeper.bookings(50)[0] == found
        bookkeeper.forget("A")
        [left] = bookkeeper.bookings(50)[0]
        assert (left["seq"], left["name"]) == (1, "Theirs")
        with pytest.raises(NotFound):
            bookkeeper.booking(2)


def test_what_is_forgotten_while_it_is_asked_for_is_left_out(path, monkeypatch):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book(bookings(100))
        record = Log.record

        def forgotten_first(log, seq):
            monkeypatch.setattr(Log, "record", record)
            bookkeeper.forget("company1")
            return record(log, seq)

        monkeypatch.setattr(Log, "record", forgotten_first)
        found, _ = bookkeeper.bookings(100)
        assert found == bookkeeper.bookings(100)[0]
        assert len(found) == bookkeeper.health()["samples"] < 100


def test_the_last_batch_is_watched_without_what_was_forgotten(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(account="1")])
        assert "last_batch_accuracy" not in bookkeeper.gauges()
        bookkeeper.book([booking(account="2")] * 3)
        bookkeeper.book([booking("B", account="2"), booking(account="1")])
        assert bookkeeper.gauges()["last_batch_accuracy"][1] == 0.5
        bookkeeper.book([])
        bookkeeper.correct(0, "3")
        bookkeeper.forget("A")
        assert bookkeeper.gauges()["last_batch_accuracy"][1] == 1
    with bookkeeping(path) as bookkeeper:
        assert "last_batch_accuracy" not in bookkeeper.gauges()


def test_the_learning_curve_is_of_what_was_not_forgotten(path):
    with bookkeeping(path) as bookkeeper:
        for batch in batches_of(bookings(1000), 100):
            bookkeeper.book(batch)
        bookkeeper.overview()
        bookkeeper.forget("company1")
        curve = bookkeeper.overview()["curve"]
    with bookkeeping(path) as bookkeeper:
        assert bookkeeper.overview()["curve"] == curve


def test_the_learning_curve_has_at_most_129_points(path, monkeypatch):
    monkeypatch.setattr(bookkeep, "WINDOW", 8)
    with bookkeeping(path) as bookkeeper:
        for batch in batches_of(bookings(1000), 100):
            bookkeeper.book(batch)
        ends = [point["bookings"] for point in bookkeeper.overview()["curve"]]
        assert ends == [*range(104, 1000, 8), 1000]


def test_a_named_batch_is_booked_once(path):
    samples = bookings(50)
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()])
        first = bookkeeper.book(samples, "mine")
        assert first == range(1, 51)
        bookkeeper.book([booking()], "yours")
        before = counts(bookkeeper._model)
        assert bookkeeper.book(samples, "mine") == first
        with pytest.raises(Conflict, match="take a new one"):
            bookkeeper.book(samples[:-1], "mine")
        with pytest.raises(Conflict):
            bookkeeper.book([*samples[:-1], booking(account="0")], "mine")
        assert counts(bookkeeper._model) == before
        assert bookkeeper.book(samples) == range(52, 102)
    with bookkeeping(path) as bookkeeper:
        assert bookkeeper.book([dict(reversed(sample.items())) for sample in samples], "mine") == (
            first
        )
        with pytest.raises(Conflict):
            bookkeeper.book([booking(account="0")], "yours")
        assert bookkeeper.health()["samples"] == 102
    assert {record["batch"] for record in read(path)} == {0, "mine", "yours", 52}


def test_a_named_batch_that_was_not_written_is_booked_when_it_comes_again(path, monkeypatch):
    with bookkeeping(path) as bookkeeper:
        with monkeypatch.context() as patch:

            def broken(file, data):
                raise OSError(5, "Input/output error")

            patch.setattr(os, "write", broken)
            with pytest.raises(NotStored, match="Input/output"):
                bookkeeper.book([booking()], "mine")
        assert bookkeeper.book([booking(account="2")], "mine") == range(0, 1)


# ------------------------------------------------------------------------------------------- HTTP


def test_the_contract(serve):
    service = serve()
    asked = {key: booking()[key] for key in bookkeep.FEATURES}
    assert service.get("/health")[1]["samples"] == 0
    assert service.post("/predict", asked)[0] == 503
    assert service.get("/metrics/1000")[0] == 503
    first = [booking(), booking(text="food", account="7000")]
    assert service.post("/sample", first) == (
        200,
        {"received": 2, "total": 2, "first": 0, "last": 1},
    )
    assert service.post("/predict", asked) == (200, ["3115"])
    assert service.post("/predict", json.dumps(asked)) == (200, ["3115"])
    assert service.post("/predict", booking(account="")) == (200, ["3115"])
    assert service.post("/predict", [asked, asked | {"BankEntryText": "food"}]) == (
        200,
        ["3115", "7000"],
    )
    assert service.post("/predict", []) == (200, [])
    assert service.get("/metrics/1000")[0] == 503
    assert service.post("/sample", json.dumps([booking()]))[1]["total"] == 3
    assert service.post("/sample", []) == (
        200,
        {"received": 0, "total": 3, "first": None, "last": None},
    )
    assert service.get("/metrics/1000") == (200, {"precision": 1.0, "recall": 1.0})
    status, health = service.get("/health")
    assert status == 200
    assert list(health) == [
        *("status", "samples", "unseen", "checks", "lines"),
        *("accounts", "companies", "tokens", "uptime"),
    ]
    assert (health["status"], health["samples"], health["accounts"]) == ("ok", 3, 2)
    assert isinstance(health["uptime"], float)


def test_one_sample_gets_suggestions_and_a_list_a_list(service):
    asked = {key: booking()[key] for key in bookkeep.FEATURES}
    status, answer = service.post("/suggest", asked)
    assert status == 200
    [suggestion] = answer["suggestions"]
    assert (suggestion["account"], suggestion["over"]) == ("1", None)
    status, [first, second] = service.post("/suggest", [asked, asked])
    assert (status, first) == (200, answer)
    assert second | {"check": False} == answer | {"check": False}
    assert service.post("/suggest", []) == (200, [])
    assert service.post("/suggest?top=20", json.dumps(asked)) == (200, answer)
    for top in ("0", "21", "x", "-1", "1.0", "", "9" * 50):
        status, refusal = service.post(f"/suggest?top={top}", asked)
        assert (status, refusal["error"]) == (400, "top must be a whole number from 1 to 20")
    assert service.post("/suggest", [asked] * 100)[0] == 200
    assert service.post("/suggest", [asked] * 101)[0] == 400
    assert service.post("/suggest?top=20", [asked] * 15)[0] == 200
    assert service.post("/suggest?top=20", [asked] * 16)[0] == 400
    assert service.post("/suggest", [asked] * 101)[1]["error"] == (
        "with reasons, send at most 100 samples in one request, not 101; "
        "?reasons=no leaves them out"
    )
    assert len(service.post("/suggest?reasons=no&top=20", [asked] * 400)[1]) == 400
    assert service.post("/suggest?reasons=no", asked)[1]["suggestions"] == [
        {"account": "1", "confidence": suggestion["confidence"], "over": None, "margin": None}
    ]
    assert service.post("/suggest?reasons=maybe", asked)[0] == 400
    assert service.post("/suggest", {"CompanyId": "A"})[0] == 400
    assert service.post("/suggest", asked | {"BookedBy": "nobody yet"}) == (200, answer)
    decided = service.post("/suggest?book_from=0", [asked] * 100)[1]
    assert {answer["decision"] for answer in decided} == {"book", "check"}
    assert service.post("/suggest?book_from=1&top=1", asked)[1]["decision"] == "review"
    for level in ("1.01", "-0.1", "x", "", "nan", "inf", "0_1", "%20.5"):
        for method, path in (("POST", "/suggest"), ("GET", "/report/9")):
            status, _, refusal = service.ask(method, f"{path}?book_from={level}", asked)
            said = refusal["error"]
            assert (status, "book_from must be a number from 0 to 1" in said) == (400, True)


def test_corrections_forgetting_and_reports_over_http(serve):
    service = serve()
    assert service.post("/suggest", booking()) == (
        503,
        {"error": "there is no model yet; send bookings to /sample first"},
    )
    company = "A/B ü%?"
    for account in ("1", "1", "2"):
        service.post("/sample", [booking(account=account), booking(company, account="3")])
    right = {"seq": 4, "AccountNumber": "1", "before": "2"}
    assert service.post("/correct", {"seq": 4, "AccountNumber": "1"}) == (200, right)
    assert service.post("/correct", {"seq": 4.0, "AccountNumber": "1"})[1]["before"] == "1"
    assert service.get("/metrics/10") == (200, {"precision": 1, "recall": 1})
    for refused, status in (
        ({"seq": 99, "AccountNumber": "1"}, 404),
        ({"seq": 6, "AccountNumber": "1"}, 404),
        ({"seq": -1, "AccountNumber": "1"}, 400),
        ({"seq": 1e300, "AccountNumber": "1"}, 400),
        ({"seq": 10**400, "AccountNumber": "1"}, 400),
        ({"seq": 1.5, "AccountNumber": "1"}, 400),
        ({"seq": "1", "AccountNumber": "1"}, 400),
        ({"seq": True, "AccountNumber": "1"}, 400),
        ({"seq": 1, "AccountNumber": ""}, 400),
        ({"seq": 1, "AccountNumber": 1}, 400),
        ({"seq": 1, "AccountNumber": "\ud800"}, 400),
        ({"seq": 1, "AccountNumber": "1" * 101}, 400),
        ({"seq": 1, "AccountNumber": "1", "AccountName": "x"}, 400),
        ({"seq": 1}, 400),
        ([1], 400),
    ):
        answered, answer = service.post("/correct", refused)
        assert (answered, list(answer)) == (status, ["error"])
    status, report = service.get(f"/report/10?company={quote(company)}")
    assert (status, report["support"], report["accuracy"]) == (200, 2, 1)
    assert service.get("/report/3")[1]["support"] == 3
    assert service.get("/report/0")[0] == 400
    assert service.get("/report/1?company=%ff")[0] == 400
    assert service.get("/report/1?company=")[0] == 404
    for query, status in (("A", 200), ("nobody", 404), ("%ff", 400)):
        assert service.get(f"/overview?company={query}")[0] == status
    assert [row["at_least"] for row in service.get("/report/1?book_from=0.6")[1]["confidence"]] == [
        *(0.5, 0.6, 0.8, 0.9, 0.95, 0.99)
    ]
    for name in ("acme", "acme\n", "a\nb", "\n", ".."):
        service.post("/sample", [booking(name)] * 2)
        assert service.delete(f"/company/{quote(name, safe='')}") == (
            200,
            {"company": name, "forgotten": 2},
        )
        service.post("/sample", [booking("acme")])
    assert service.delete("/company/acme%0A")[0] == 404
    assert service.delete("/company/acme") == (200, {"company": "acme", "forgotten": 5})
    assert service.delete("/company/nobody")[0] == 404
    assert service.delete(f"/company/{quote(company)}%ff")[0] == 400
    assert service.samples() == 6
    assert service.delete(f"/company/{quote(company, safe='')}") == (
        200,
        {"company": company, "forgotten": 3},
    )
    assert service.delete(f"/company/{quote(company)}")[0] == 404
    assert service.get(f"/report/10?company={quote(company)}")[0] == 404
    health = service.get("/health")[1]
    assert [health[key] for key in ("samples", "lines", "accounts")] == [3, 22, 1]
    service.stop(signal.SIGKILL)
    service = serve()
    again = service.get("/health")[1]
    assert health | {"uptime": 0} == again | {"uptime": 0}
    assert service.post("/correct", {"seq": 4, "AccountNumber": "1"})[1]["before"] == "1"


def test_a_company_is_forgotten_whatever_its_id(serve):
    service = serve()
    ids = [".", "..", "a/b", "/", "../x", "a b", "ä&=?#%2e"]
    service.post("/sample", [booking(company=company) for company in ids])
    assert service.delete("/company?id=nobody")[0] == 404
    for nothing in ("", "?id=", "?id=%ff", "?id=.&id=.", "?company=."):
        assert service.delete(f"/company{nothing}")[0] == 400
    for company in ids:
        answer = {"company": company, "forgotten": 1}
        assert service.delete(f"/company?id={quote(company, safe='')}") == (200, answer)
    assert service.samples() == 0


def test_the_export_is_the_log(serve, tmp_path):
    service = serve()

    def export(query=""):
        status, headers, lines = service.ask("GET", f"/samples{query}", kind="application/jsonl")
        assert (status, int(headers["Content-Length"])) == (200, len(lines))
        return lines

    assert export() == b""
    for batch in batches_of(bookings(6000), 1000):
        service.post("/sample", batch)
    service.post("/correct", {"seq": 5, "AccountNumber": "1"})
    service.delete("/company/company3")
    log = (tmp_path / "log.jsonl").read_bytes()
    lines = log.splitlines(keepends=True)
    assert export() == log
    assert export("?from=10&limit=3") == b"".join(lines[10:13])
    assert export("?from=5999") == b"".join(lines[5999:])
    assert export("?limit=0") == export("?from=6001") == b""
    for query in ("?from=-1", "?from=x", "?limit=1e3", "?from=", "?limit=9999999999"):
        assert service.get(f"/samples{query}")[0] == 400
    assert "WARNING" not in service.said()
    (tmp_path / "backup.jsonl").write_bytes(export())
    assert run(HERE / "bookkeep.py", "check", tmp_path / "backup.jsonl")[0] == 0


def test_a_companys_own_lines_are_exported(serve):
    service = serve()
    for batch in batches_of(bookings(3000), 1000):
        service.post("/sample", batch)
    seq = next(i for i, sample in enumerate(bookings(3000)) if sample["CompanyId"] == "company2")
    service.post("/correct", {"seq": seq, "AccountNumber": "1"})

    def export(query=""):
        status, headers, lines = service.ask("GET", f"/samples{query}", kind="application/jsonl")
        assert (status, int(headers["Content-Length"])) == (200, len(lines))
        return lines.splitlines(keepends=True)

    lines = export()
    whose = [json.loads(line) for line in lines]
    theirs = [
        line
        for line, record in zip(lines, whose, strict=True)
        if record.get("sample", {}).get("CompanyId") == "company2" or record.get("corrects") == seq
    ]
    assert 400 < len(theirs) < 800
    assert export("?company=company2") == theirs
    after = [line for line in theirs if json.loads(line)["seq"] >= 500]
    assert export("?company=company2&from=500&limit=3") == after[:3]
    assert export("?company=company2&limit=0") == export("?company=company2&from=3001") == []
    assert service.get("/samples?company=nobody")[0] == 404
    service.delete("/company/company2")
    assert service.get("/samples?company=company2")[0] == 404


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("limit=0", "limit must be a whole number from 1 to 500"),
        ("limit=501", "limit must be a whole number from 1 to 500"),
        ("reviewed=maybe", "reviewed must be yes or no"),
        ("order=oldest", "order must be newest or confidence"),
        ("below=2", "below must be a number from 0 to 1, such as 0.95"),
        ("before=7", "before must be what the page before says is `next`"),
        ("before=0.1:x", "before must be what the page before says is `next`"),
        ("before=--:1", "before must be what the page before says is `next`"),
        ("company=%ff", "company must be UTF-8, percent-encoded"),
    ],
)
def test_what_is_no_page_of_bookings_is_refused(service, query, said):
    assert service.get(f"/bookings?{query}") == (400, {"error": said})


def test_the_description_allows_a_page_that_follows_any_confidence(service):
    asked = service.get("/openapi.json")[1]["paths"]["/bookings"]["get"]["parameters"]
    [before] = [each["schema"]["pattern"] for each in asked if each["name"] == "before"]
    for confidence in (0.0001, 0.62, 1):
        history, rows = History(), [{"seq": 0}, {"seq": 1, "confidence": confidence}]
        add_rows(history, rows)
        _, (sure, seq) = history.page(1)
        assert re.search(before, f"{sure}:{seq}")
        assert service.get(f"/bookings?before={sure}:{seq}")[0] == 200


def test_slow_readers_of_the_export_stop_nobody(serve, tmp_path):
    service = serve("--threads=4")
    for _ in range(3):
        service.post("/sample", [booking(Note="x" * 9000)] * 1000)
    slow = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(20)]
    for connection in slow:
        connection.sendall(b"GET /samples HTTP/1.1\r\nHost: localhost\r\n\r\n")
    for connection in slow:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    for _ in range(10):
        assert service.post("/predict", booking())[0] == 200
    assert opened(service, tmp_path / "log.jsonl") == 21
    for connection in slow:
        connection.close()
    wait_until(lambda: opened(service, tmp_path / "log.jsonl") == 1)
    assert "exception" not in service.said()


def opened(service, path):
    """How many files of the service are this one."""
    number = 0
    for file in Path(f"/proc/{service.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            number += os.readlink(file) == str(path)
    return number


def watched(service):
    """All that it tells Prometheus, by name, and the families that these are in."""
    kind = "text/plain; version=0.0.4; charset=utf-8"
    status, _, text = service.ask("GET", "/metrics", kind=kind)
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    return {
        sample.name: sample.value for family in families.values() for sample in family.samples
    }, families


def test_prometheus_can_read_the_figures(serve):
    service = serve()
    for batch in batches_of(bookings(300), 100):
        service.post("/sample", batch)
    service.post("/predict", bookings(7))
    service.post("/suggest", booking())
    service.get("/metrics/10")
    service.get("/nowhere")
    service.post("/sample", [{}])
    values, families = watched(service)
    assert all(family.documentation for family in families.values())
    values = {
        name: value
        for name, value in values.items()
        if "duration" not in name and not name.startswith("process_")
    }
    health = service.get("/health")[1]
    last, report = service.get("/report/100")[1], service.get("/report/1000")[1]
    [bookable] = [each for each in report["confidence"] if each["at_least"] == 0.95]
    assert values == {
        "bookkeep_bookings": 300,
        "bookkeep_unseen": 0,
        "bookkeep_checks": 0,
        "bookkeep_predictions_total": 8,
        "bookkeep_booked_total": 300,
        "bookkeep_scored_total": 200,
        "bookkeep_scored_right_total": pytest.approx(200 * report["accuracy"]),
        "bookkeep_corrections_total": 0,
        "bookkeep_forgotten_total": 0,
        "bookkeep_refused_total": 2,
        "bookkeep_failed_writes_total": 0,
        "bookkeep_accounts": health["accounts"],
        "bookkeep_companies": 5,
        "bookkeep_tokens": health["tokens"],
        "bookkeep_waiting": 0,
        "bookkeep_log_bytes": len(service.ask("GET", "/samples", kind="application/jsonl")[2]),
        "bookkeep_log_lines": 300,
        "bookkeep_snapshot_lines": 0,
        "bookkeep_build_info": 1,
        **{
            f"bookkeep_{name}_{figure}": pytest.approx(told[figure])
            for name, told in (("last_batch", last), ("window", report))
            for figure in ("accuracy", "precision", "recall")
        },
        "bookkeep_window_bookable": bookable["share"],
    }
    [build] = families["bookkeep_build_info"].samples
    assert build.labels["version"] == bookkeep.__version__
    requests = {}
    for sample in families["bookkeep_request_duration_seconds"].samples:
        labels = dict(sample.labels)
        kind = sample.name.removeprefix("bookkeep_request_duration_seconds")
        requests.setdefault((labels.pop("path"), labels.pop("status")), []).append(
            (kind, labels.get("le"), sample.value)
        )
    assert {key: values[-1][2] for key, values in requests.items()} == {
        ("/sample", "200"): 3,
        ("/sample", "400"): 1,
        ("/predict", "200"): 1,
        ("/suggest", "200"): 1,
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


def test_counters_never_go_down_and_say_what_was_done_since_the_start(serve):
    service, seen = serve(unsaved=100), Counter()

    def counted():
        """How much each counter has grown since it was asked for."""
        now = {name: value for name, value in watched(service)[0].items() if "_total" in name}
        grown = {name: value - seen[name] for name, value in now.items() if "cpu" not in name}
        assert min(grown.values()) >= 0
        seen.update(grown)
        return {name[9:-6]: value for name, value in grown.items() if value}

    service.post("/sample", [booking(), booking(company="B", account="1")])
    assert counted() == {"booked": 2}  # nothing was predicted yet
    service.post("/sample", [by("check"), by("suggestion"), booking(account="2")])
    assert counted() == {"booked": 3, "scored": 17, "scored_right": 16}
    service.post("/correct", {"seq": 2, "AccountNumber": "9"})
    assert counted() == {"corrections": 1}
    service.post("/predict", [booking()] * 3)
    assert counted() == {"predictions": 3}
    assert "bookkeep_snapshot_age_seconds" not in watched(service)[0]
    service.post("/sample", [booking()] * 120)
    wait_until(lambda: watched(service)[0]["bookkeep_snapshot_lines"] == 126)
    service.stop(signal.SIGKILL)
    service = serve(unsaved=100)
    now = watched(service)[0]
    assert [now[f"bookkeep_{name}_total"] for name in ("booked", "scored", "corrections")] == [
        0
    ] * 3
    assert now["bookkeep_snapshot_lines"] == 126
    assert 0 < now["bookkeep_snapshot_age_seconds"] < 60
    seen.clear()
    counted()
    assert service.delete("/company/B")[0] == 200
    assert service.delete("/company/B")[0] == 404
    assert counted() == {"forgotten": 1, "refused": 1}


def test_prometheus_sees_the_process(serve):
    service = serve()
    pid = service.process.pid
    now = watched(service)[0]
    assert time.time() - 60 < now["process_start_time_seconds"] < time.time()
    held = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(10)]
    # Connections of before may have been open still, when it was asked first.
    wait_until(lambda: watched(service)[0]["process_open_fds"] > now["process_open_fds"] + 5)
    for connection in held:
        connection.close()
    status = Path(f"/proc/{pid}/status").read_text()
    resident = 1024 * int(re.search(r"VmRSS:\s+([0-9]+) kB", status)[1])
    assert now["process_resident_memory_bytes"] == pytest.approx(resident, rel=0.3)
    while (
        watched(service)[0]["process_cpu_seconds_total"] < now["process_cpu_seconds_total"] + 0.05
    ):
        service.post("/predict", [booking()] * 100)


def test_a_failed_write_is_counted(path, monkeypatch):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()])

        def fail(file):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        for _ in range(2):
            with pytest.raises(NotStored):
                bookkeeper.book([booking()])
        monkeypatch.undo()
        bookkeeper.book([booking()])
        gauges = bookkeeper.gauges()
        assert gauges["failed_writes_total"][1] == 2
        assert gauges["booked_total"][1] == 2


@pytest.mark.parametrize("file", ["alerts.yml", "dashboard.json"])
def test_what_the_docs_watch_is_there(serve, tmp_path, file):
    service = serve(unsaved=1)
    for _ in range(3):
        service.post("/sample", [booking()])
    wait_until(lambda: "bookkeep_snapshot_age_seconds" in watched(service)[0])
    text = (HERE / "docs" / file).read_text()
    names = {*re.findall(r"\b(?:bookkeep|process)_[a-z_]+\b", text)}
    assert len(names) > 5
    assert names <= watched(service)[0].keys()


@pytest.mark.parametrize(
    ("seconds", "bound"), [(0, 0.001), (0.001, 0.001), (0.0011, 0.0025), (10, 10), (11, "+Inf")]
)
def test_a_duration_is_counted_up_to_the_bound_that_it_keeps(seconds, bound):
    histogram = bookkeep.Histogram()
    histogram.observe(seconds)
    lines = [line for line in histogram.exposition("x") if line.startswith("x_bucket")]
    assert next(line for line in lines if line.endswith(" 1")) == f'x_bucket{{le="{bound}"}} 1'


@pytest.mark.parametrize(("body", "message"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_bad_input_gets_a_400_and_is_not_stored(service, body, message):
    status, _, answer = service.ask("POST", "/sample", body=body)
    assert (status, list(answer)) == (400, ["error"])
    assert message in answer["error"]
    assert service.samples() == 2
    assert service.post("/predict", booking()) == (200, ["1"])


def test_a_batch_is_taken_whole_or_not_at_all(service):
    status, answer = service.post("/sample", [booking()] * 3 + [booking(account="")])
    assert (status, answer) == (400, {"error": "sample 3: AccountNumber is empty"})
    assert service.samples() == 2


@pytest.mark.parametrize("n", ["0", "-1", "x", "1.0", "+1", "%20", "1e3", "%D9%A3", "9" * 1000])
def test_metrics_of_what_is_no_number_are_a_bad_request(service, n):
    status, answer = service.get(f"/metrics/{n}")
    assert status == 400
    assert "whole number" in answer["error"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status"),
    [
        ("GET", "/page", {}, None, 404),
        ("GET", "/suggest", {}, None, 405),
        ("POST", "/company/A", {}, b"", 405),
        ("DELETE", "/company/none", {}, None, 404),
        ("GET", "/report/10?company=none", {}, None, 404),
        ("GET", "/metrics/1/2", {}, None, 404),
        ("GET", "/sample", {}, None, 405),
        ("PUT", "/sample", {}, b"[]", 405),
        ("GET", "/predict", {}, None, 405),
        ("POST", "/metrics/1000", {}, b"[]", 405),
        ("DELETE", "/health", {}, None, 405),
        ("POST", "/sample", {"Content-Type": "text/plain"}, b"[]", 415),
        ("POST", "/sample", {"Content-Type": ""}, b"[]", 415),
        ("POST", "/predict", {"Content-Type": "application/x-www-form-urlencoded"}, b"[]", 415),
        ("POST", "/sample", {"Content-Type": "Application/JSON; charset=utf-8"}, b"[]", 200),
        ("POST", "/sample", {}, b" " * 300_001, 413),
        ("POST", "/predict", {}, b" " * 500_000, 413),
        ("POST", "/sample", {}, b"[]" + b" " * 299_998, 200),
        ("GET", "/health", {"X": "x" * 300_000}, None, 431),
    ],
    ids=lambda value: str(value)[:30],
)
def test_statuses(service, method, path, headers, body, status):
    answered, headers, answer = service.ask(method, path, body=body, headers=headers)
    assert answered == status
    assert ("error" in answer) == (status != 200)
    assert ("Allow" in headers) == (status == 405)
    assert service.samples() == 2


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize(
    "sent",
    [
        b"NONSENSE\r\n\r\n",
        b"GET http://[::1/health HTTP/%b\r\n\r\n",
        b"POST /sample HTTP/%b\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_a_json_error_too(service, sent, version):
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(sent.replace(b"%b", version))
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1.[01] 400 ", head)
    assert list(json.loads(body)) == ["error"]
    assert "exception" not in service.said()


@pytest.mark.parametrize(
    ("method", "path", "names"),
    [
        ("GET", "/samples?below=1", "only company, from, limit,"),
        ("GET", "/samples?from=1&from=2", "only company, from, limit,"),
        ("GET", "/report/1?from=1", "only company,"),
        ("POST", "/suggest?tip=1", "only top,"),
        ("POST", "/sample?company=A", "nothing"),
        ("GET", "/health?x", "nothing"),
        ("GET", "/metrics/1?company=A", "nothing"),
        ("DELETE", "/company/none?id=A", "nothing"),
        ("GET", "/?a=b", "nothing"),
    ],
)
def test_a_parameter_that_a_path_does_not_have_is_refused(service, method, path, names):
    status, _, answer = service.ask(method, path, [])
    assert (status, answer) == (400, {"error": answer["error"]})
    assert f"send {names}" in answer["error"]
    assert service.get("/health?")[0] == 200


def test_a_method_that_a_path_does_not_have_is_not_repeated(service):
    status, headers, answer = service.ask("X" * 2000, "/sample")
    assert (status, headers["Allow"]) == (405, "POST")
    assert answer == {"error": "ask for this with POST"}


def test_the_access_log_has_a_line_for_each_request_and_no_names(serve):
    service = serve("--access-log")
    service.post("/sample", [booking(company="secret")])
    service.post("/predict", booking(company="secret"))
    service.get("/report/1?company=secret")
    service.delete("/company/secret")
    service.get("/secret")
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(b"SECRET\r\n\r\n")
        connection.recv(1000)

    def logged():
        lines = [line.split()[2:] for line in service.said().splitlines() if line.endswith(" ms")]
        return [line for line in lines if line[3] != "/health" and line[3:5] != ["-", "503"]]

    wait_until(lambda: len(logged()) == 6)
    lines = logged()
    assert sorted(line[1:5] for line in lines) == [  # answers come before their lines
        ["127.0.0.1", "-", "-", "400"],
        ["127.0.0.1", "DELETE", "/company/{id}", "200"],
        ["127.0.0.1", "GET", "-", "404"],
        ["127.0.0.1", "GET", "/report/{n}", "503"],
        ["127.0.0.1", "POST", "/predict", "200"],
        ["127.0.0.1", "POST", "/sample", "200"],
    ]
    assert all(int(line[5]) > 0 and float(line[6]) >= 0 for line in lines)
    assert [str(len('["3115"]'))] == [line[5] for line in lines if line[3] == "/predict"]
    assert "secret" not in service.said().lower()
    assert " ms" not in serve(log=service.messages.with_name("quiet.jsonl")).said()


def test_a_full_disk_is_a_507_and_when_there_is_space_again_bookings_go_on(serve):
    service = serve()
    assert service.post("/sample", [booking()] * 100)[0] == 200
    unlimited = resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (40_000, -1))
    status, answer = service.post("/sample", [booking(account="2")] * 500)
    assert status == 507
    assert answer == {"error": "the log could not be written (File too large); try later"}
    assert "ERROR" in service.said()
    failing = "the log could not be written (File too large)"
    assert service.get("/health")[1]["status"] == failing
    service.post("/sample", [])  # which says nothing of the log
    assert service.get("/health")[1] | {"uptime": 0} == {
        **service.get("/overview")[1]["health"],
        "status": failing,
        "samples": 100,
        "uptime": 0,
    }
    assert service.post("/predict", booking()) == (200, ["3115"])
    assert service.get("/metrics/10")[0] == 503
    assert service.post("/sample", [booking()])[0] == 200
    assert service.get("/health")[1]["status"] == "ok"
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, unlimited)
    assert service.post("/sample", [booking(account="2")] * 500)[0] == 200
    service.stop()
    assert serve().samples() == 601


def test_an_idempotency_key_books_a_batch_once_also_after_a_restart(serve):
    service = serve()
    key = {"Idempotency-Key": '"8e03978e-40d5-43dd-bc93-6894a57f9324"'}

    def send(account, headers=key):
        status, _, answer = service.ask(
            "POST", "/sample", [booking(account=account)] * 2, headers=headers
        )
        return status, answer

    first = (200, {"received": 2, "total": 2, "first": 0, "last": 1})
    assert send("1") == first
    assert send("1") == first
    assert send("2")[0] == 422
    assert send("2", {"Idempotency-Key": "x" * 200})[1]["total"] == 4
    service.stop(signal.SIGKILL)
    service = serve()
    assert send("1") == first
    assert send("2")[0] == 422
    for bad in ("", "x" * 201, "a\tb", "\xe9"):
        status, answer = send("1", {"Idempotency-Key": bad})
        assert (status, list(answer)) == (400, ["error"])
    assert service.samples() == 4


def test_every_answer_says_how_to_handle_it_and_none_what_serves_it(service):
    for method, path in (
        ("GET", "/health"),
        ("GET", "/x"),
        ("GET", "/sample"),
        ("POST", "/sample"),
    ):
        _, headers, _ = service.ask(method, path, body=b"x")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert "Server" not in headers
        assert "Via" not in headers


@pytest.mark.parametrize("by_file", [False, True])
def test_with_a_token_nobody_else_reads_or_teaches(serve, tmp_path, monkeypatch, by_file):
    secret = "s3cret~token"
    options = ["--host", "0.0.0.0"]
    if by_file:
        (tmp_path / "token").write_text(f"{secret}\n")
        options += ["--token-file", tmp_path / "token"]
    else:
        monkeypatch.setenv("BOOKKEEP_TOKEN", secret)
    service = serve(*options)
    right = {"Authorization": f"bEARER {secret}"}
    assert service.ask("POST", "/sample", [booking()], headers=right)[0] == 200
    for wrong in (
        None,
        "",
        secret,
        "Bearer",
        f"Bearer {secret}x",
        "Bearer \xe9",
        f"Basic {secret}",
    ):
        headers = {} if wrong is None else {"Authorization": wrong}
        for method, path in (
            ("POST", "/sample"),
            ("POST", "/predict"),
            ("GET", "/metrics/1"),
            ("GET", "/openapi.json"),
            ("GET", "//sample"),
            ("GET", "/nowhere"),
            ("PUT", "/sample"),
        ):
            status, got, answer = service.ask(method, path, [booking()], headers=headers)
            assert (status, got["WWW-Authenticate"]) == (401, "Bearer")
            assert secret not in json.dumps(answer)
    assert service.samples() == 1
    command = Path(f"/proc/{service.process.pid}/cmdline").read_text()
    assert secret not in command + service.said()
    status, out, said = run(
        *(
            HERE / "replay.py",
            SYNTHETIC,
            "--samples=50",
            "--url",
            f"http://127.0.0.1:{service.port}",
        ),
        *options[2:],
    )
    assert (status, said) == (0, "")
    monkeypatch.delenv("BOOKKEEP_TOKEN", raising=False)
    status, out, said = run(HERE / "replay.py", "--url", f"http://127.0.0.1:{service.port}")
    assert (status, out) == (1, "")
    assert "401" in said
    assert secret not in said


def test_without_a_token_it_answers_only_to_its_own_names(service, path):
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1", f"127.0.0.1:{service.port}", "[::1]:80"):
        assert service.ask("GET", "/health", headers={"Host": host})[0] == 200
    for host in (
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil",
        "",
    ):
        for method, at in (("POST", "/sample"), ("GET", "/metrics/1"), ("GET", "/health")):
            status, _, answer = service.ask(method, at, [booking()], headers={"Host": host})
            assert status == 403
            assert "localhost" in answer["error"]
    assert service.samples() == 2


def test_a_length_that_lies_and_chunks_without_end(serve):
    service = serve("--max-body=1000")

    def raw(*parts):
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
            for part in parts:
                connection.sendall(part)
            return connection.recv(100)

    head = b"POST /sample HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    body = json.dumps([booking()]).encode()
    assert raw(chunked, b"%x\r\n%s\r\n" % (len(body), body), b"0\r\n\r\n").startswith(
        b"HTTP/1.1 200 "
    )
    assert b" 413 " in raw(chunked, b"3e9\r\n" + b" " * 1001 + b"\r\n", b"0\r\n\r\n")
    assert b" 413 " in raw(head + b"Content-Length: 99999999999\r\n\r\n")
    assert b" 400 " in raw(head + b"Content-Length: -1\r\n\r\n")
    assert b" 400 " in raw(head + b"Content-Length: 5\r\n\r\n" + body)
    endless = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    assert b" 413 " in raw(chunked, endless * 257)
    assert service.samples() == 1


def test_slow_clients_do_not_stop_others(serve):
    service = serve()
    service.post("/sample", [booking()])
    slow = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(300)]
    for connection in slow[:200]:
        connection.sendall(b"POST /sample HTTP/1.1\r\nContent-Length: 1000\r\n\r\n[")
    for round in range(10):
        for connection in slow[:100]:
            connection.sendall(b" ")
        assert service.post("/predict", booking()) == (200, ["3115"])
        assert service.post("/sample", [booking()])[1]["total"] == round + 2
    for connection in slow:
        connection.close()


def test_many_large_uploads_that_stall_do_not_stop_others(serve):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))

    service = serve(limit=limit)
    head = b"POST /sample HTTP/1.1\r\nContent-Length: 2000000\r\n\r\n"
    slow = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(95)]
    for connection in slow:
        connection.sendall(head + b" " * 600_000)
    assert service.post("/sample", [booking()])[0] == 200
    assert service.post("/predict", booking()) == (200, ["3115"])
    more = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(30)]
    for connection in more[:5]:  # those beyond the limit wait to be accepted
        connection.close()
    for connection in [*slow, *more]:
        connection.close()
    assert service.post("/predict", booking()) == (200, ["3115"])
    assert "exception" not in service.said()


def test_the_openapi_description_is_true(serve, tmp_path):
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
            f"--max-examples={os.environ.get('BOOKKEEP_EXAMPLES', 30)}",
            *("--phases=coverage,fuzzing", "--no-color"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in service.said()
    assert "failed" not in service.said()


def test_machines_can_make_clients_of_the_openapi_description(service):
    _, whole = service.get("/openapi.json")
    validate(whole)  # raises
    components = whole["components"]
    operations = [each for path in whole["paths"].values() for each in path.values()]
    names = [each["operationId"] for each in operations]
    tags = {tag["name"] for tag in whole["tags"]}
    assert len({*names}) == len(names)
    assert all(each["summary"] and each["tags"][0] in tags for each in operations)

    def check(schema, where, examples=()):
        """All of it says what it is, and has examples that fit, or is made of what has."""
        assert "description" in schema or where.endswith("[]"), where
        for example in [*schema.get("examples", []), *examples]:
            Draft202012Validator(schema | {"components": components}).validate(example)  # raises
        parts = {f"{where}.{name}": part for name, part in schema.get("properties", {}).items()}
        parts |= {f"{where}[]": schema["items"]} if "items" in schema else {}
        parts |= {f"{where}{i}[]": part for i, part in enumerate(schema.get("anyOf", []))}
        assert parts or "examples" in schema or "$ref" in schema or schema["type"] == "null", where
        for name, part in parts.items():
            check(part, name)

    for name, schema in components["schemas"].items():
        check(schema, name)
    for each in (each for operation in operations for each in operation["parameters"]):
        check(
            each["schema"] | {"description": each["description"]}, each["name"], [each["example"]]
        )
    for operation in operations:
        answers = [*operation["responses"].values(), *components["responses"].values()]
        for answer in (answer for answer in answers if "$ref" not in answer):
            for content in answer["content"].values():
                told = {"description": answer["description"]}
                check(content["schema"] | told, operation["operationId"], [content["example"]])
        if body := operation.get("requestBody"):
            content = body["content"]["application/json"]
            check(content["schema"] | {"description": ""}, "body", [content["example"]])


def test_the_openapi_description_says_its_limits_and_where_a_token_is_needed(
    serve, tmp_path, monkeypatch
):
    options = ("--max-batch=7", "--max-body=1000")
    whole = serve(*options).get("/openapi.json")[1]
    assert whole["security"] == []
    assert "at most 1000 bytes" in whole["info"]["description"]
    for path, most in (("/sample", 7), ("/predict", 7), ("/suggest", 7)):
        body = whole["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert [each["maxItems"] for each in (body, *body.get("anyOf", [])) if "items" in each] == [
            most
        ]
    monkeypatch.setenv("BOOKKEEP_TOKEN", "s3cret")
    guarded = serve(*options, log=tmp_path / "guarded.jsonl")
    headers = {"Authorization": "Bearer s3cret"}
    _, _, whole = guarded.ask("GET", "/openapi.json", headers=headers)
    needed = {
        (path, method): operation.get("security", whole["security"]) == [{"token": []}]
        for path, operations in whole["paths"].items()
        for method, operation in operations.items()
    }
    for (path, method), needs in needed.items():
        status = guarded.ask(method.upper(), path, [], kind=None)[0]
        assert (status == 401) == needs == ("401" in whole["paths"][path][method]["responses"])


def test_the_app_is_one_that_any_wsgi_server_can_run(path):
    def call(app, method, path, body=b"", content_type="application/json"):
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "SCRIPT_NAME": "",
            "QUERY_STRING": "",
            "SERVER_NAME": "x",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "CONTENT_TYPE": content_type,
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": BytesIO(body),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        started = []
        parts = app(environ, lambda status, headers, exc_info=None: started.append(status))
        answer = b"".join(parts)
        parts.close()
        return int(started[0][:3]), json.loads(answer)

    with bookkeeping(path) as bookkeeper:
        app = wsgiref.validate.validator(create_app(bookkeeper, max_body=1000))
        body = json.dumps([booking()]).encode()
        assert call(app, "POST", "/sample", body)[1]["total"] == 1
        assert call(app, "POST", "/predict", body) == (200, ["3115"])
        assert call(app, "POST", "/predict", body, "text/plain")[0] == 415
        assert call(app, "POST", "/predict", body * 100)[0] == 413
        assert call(app, "GET", "/nowhere")[0] == 404


def raised(path, monkeypatch, error):
    """The status line, the headers and the body of the answer when the bookkeeper raises this."""

    def broken(self):
        raise error

    monkeypatch.setattr(Bookkeeper, "health", broken)
    with bookkeeping(path) as bookkeeper:
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/health", "wsgi.errors": sys.stderr}
        started = []
        [body] = create_app(bookkeeper)(environ, lambda *start: started.append(start))
    assert list(json.loads(body)) == ["error"]
    return started[0][0], dict(started[0][1]), body


def test_a_failure_of_the_service_is_a_500_without_a_traceback(path, monkeypatch, caplog):
    status, _, body = raised(path, monkeypatch, RuntimeError("secret"))
    assert status.startswith("500 ")
    assert b"secret" not in body
    assert "secret" in caplog.text


def test_who_finds_too_many_waiting_is_told_when_to_come_again(path, monkeypatch):
    status, headers, _ = raised(path, monkeypatch, Busy("too many"))
    assert status.startswith("503 ")
    assert headers["Retry-After"] == "1"


class Described:
    """A service as README.md and docs/operations.md describe it; told what was predicted."""

    def __init__(self):
        self.lines = []  # as /samples gives them
        self.bookings = {}  # by seq, those that are not forgotten: the line, and what became of it
        self.keys = {}  # key -> (the number of the list's first line, the answer)

    def accounts(self):
        return {booking["account"] for booking in self.bookings.values() if booking["learned"]}

    def of(self, company):
        return [each for each in self.bookings.values() if company in (None, each["company"])]

    def sample(self, samples, key):
        """The status and the answer. What is stored awaits its predictions."""
        first, answer = self.keys.get(key, (None, None))
        if answer:
            lines = self.lines[first : first + len(samples)]
            same = len(samples) == answer["received"] and all(
                line.get("sample", sample) == sample
                for line, sample in zip(lines, samples, strict=True)
            )
            return (200, answer) if same else (422, None)
        first = len(self.lines)
        total = first + len(samples)
        for seq, sample in enumerate(samples, first):
            self.line(key or first, total - seq - 1, sample=sample)
        answer = {"received": len(samples), "total": total, "first": first, "last": total - 1}
        if not samples:
            return 200, answer | {"first": None, "last": None}
        if key:
            self.keys[key] = (first, answer)
        return 200, answer

    def line(self, batch, left, **more):
        self.lines.append({"seq": len(self.lines), "batch": batch, "left": left, **more})

    def told(self, lines, accounts):
        """Takes the predictions of these lines, made while the model knew these accounts."""
        for line in lines:
            described, sample = self.lines[line["seq"]], line.get("sample", {})
            who = sample.get("BookedBy", "person")
            learned = {"reviewed"} if who == "suggestion" else {"weight", "against"}
            predicted = {"predicted", "margin", "confidence", "rank", "known"} if sample else set()
            assert line.keys() == described.keys() | predicted | learned
            assert described.items() <= line.items()
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
            assert line["known"] in range(6)
            if accounts:
                assert line["predicted"] in accounts
                assert 0 <= line["confidence"] <= 1
                assert (line["margin"] is None) == (len(accounts) == 1)
                assert (line["rank"] is None) == (account not in accounts)
                assert (line["rank"] == 1) == (account == line["predicted"])
            else:
                assert {line[key] for key in predicted - {"known"}} == {None}

    def correct(self, seq, account):
        if seq not in self.bookings:
            return 404, None
        booking = self.bookings[seq]
        answer = {"seq": seq, "AccountNumber": account, "before": booking["account"]}
        if not booking["learned"] or booking["account"] != account:
            self.line(len(self.lines), 0, corrects=seq, AccountNumber=account)
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
            and (not below or each["confidence"] < below)
        ]
        if order:
            found.sort(key=lambda each: each["confidence"])
        return 200, [self.standing(each["seq"]) for each in found]

    def health(self):
        return {
            "status": "ok",
            "samples": len(self.bookings),
            "unseen": sum(not booking["learned"] for booking in self.bookings.values()),
            "checks": sum(booking["times"] == 16 for booking in self.bookings.values()),
            "lines": len(self.lines),
            "accounts": len(self.accounts()),
            "companies": len({booking["company"] for booking in self.bookings.values()}),
        }

    def report(self, n, company, levels):
        """The status and the answer, but for the standard errors."""
        if company and not self.of(company):
            return 404, None
        rows = [each for each in self.of(company) if each["times"] and each["predicted"]][-n:]
        if not rows:
            return 503, None
        pairs = Counter()  # (booked, predicted) -> how often
        for row in rows:
            pairs[row["account"], row["predicted"]] += row["times"]
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

        def sure(level):
            found = [row for row in rows if row["confidence"] >= level]
            times = sum(row["times"] for row in found)
            right = sum(row["times"] for row in found if row["account"] == row["predicted"])
            return {
                "at_least": level,
                "share": times / pairs.total(),
                "accuracy": right / times if times else None,
                "checks": sum(row["times"] == 16 for row in found),
            }

        return 200, {
            "support": len(rows),
            "unseen": sum(
                not each["learned"] and each["seq"] > rows[0]["seq"] for each in self.of(company)
            ),
            "checks": sure(0)["checks"],
            "accuracy": sure(0)["accuracy"],
            "precision": means[0],
            "recall": means[1],
            "confused": {pair: times for pair, times in pairs.items() if pair[0] != pair[1]},
            "confidence": [sure(level) for level in levels],
        }


def nearly(answer):
    """The same with its floats rounded."""
    return json.loads(json.dumps(answer), parse_float=lambda number: round(float(number), 9))


class Walk:
    """Random requests to a service, each answer compared with what the documents say."""

    COMPANIES = ("A", "B/ü", "C d")
    BY = (None, None, "person", "check", "suggestion")
    REFUSED = (
        ("POST", "/sample", [booking(account="")], 400),
        ("POST", "/sample", [booking(), booking(BookedBy="nobody")], 400),
        ("POST", "/sample", [booking(), booking(amount=3)], 400),
        ("POST", "/sample", [booking(account="1" * 101)], 400),
        ("POST", "/sample", [{"CompanyId": "A"}], 400),
        ("POST", "/sample", booking(), 400),
        ("POST", "/predict", [{"CompanyId": "A"}], 400),
        ("POST", "/suggest?top=21", [], 400),
        ("POST", "/suggest?book_from=2", [], 400),
        ("POST", "/correct", {"seq": -1, "AccountNumber": "1"}, 400),
        ("POST", "/correct", {"seq": 0, "AccountNumber": ""}, 400),
        ("GET", "/metrics/0", None, 400),
        ("GET", "/report/x", None, 400),
        ("GET", "/samples?from=-1", None, 400),
        ("GET", "/sample", None, 405),
        ("GET", "/company", None, 405),
    )

    def __init__(self, start, rng):
        self.start, self.rng = start, rng
        self.service, self.described = start(unsaved=20), Described()
        self.predictions = 0  # that were asked for since the start

    def ask(self, method, path, content=None, **more):
        print(method, path, json.dumps(content), more)
        status, _, answer = self.service.ask(method, path, content, **more)
        if status != 200:
            assert list(answer) == ["error"]
        return status, answer if status == 200 else None

    def step(self):
        acts = (self.send, self.correct, self.refuse, self.forget, self.restart)
        self.rng.choices(acts, [60, 30, 10, 2, 3])[0]()
        health, described = self.ask("GET", "/health")[1], self.described.health()
        assert {key: health[key] for key in described} == described
        looks = (self.report, self.metrics, self.predict, self.slice, self.prometheus, self.page)
        self.rng.choices(looks, [4, 2, 2, 1, 1, 2])[0]()

    def samples(self):
        """Up to eight. Most texts have one account in all companies."""
        number = self.rng.choice([0, 1, 1, 1, 2, 8])
        texts = [self.rng.randrange(6) for _ in range(number)]
        return [
            booking(
                self.rng.choice(self.COMPANIES),
                f"shop{text} {self.rng.choice(['May', 'June'])}",
                self.rng.choice(["> -100", "< 10"]),
                str(text // 2 if self.rng.random() < 0.85 else self.rng.randrange(7)),
                **self.rng.choice(
                    [{}, {"AccountName": self.rng.choice("xyz")}, {"": "1", "Note": "ü\n"}]
                ),
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
        first, accounts = len(described.lines), described.accounts()
        suggested = self.suggest(samples)
        headers = {"Idempotency-Key": key} if key else {}
        stored = self.ask("POST", "/sample", samples, headers=headers)
        assert stored == described.sample(samples, key)
        lines = self.read(first)
        described.told(lines, accounts)
        if accounts and lines:
            firsts = [answer["suggestions"][0] for answer in suggested]
            for line, suggestion in zip(lines, firsts, strict=True):
                assert line["predicted"] == suggestion["account"]
                assert line["confidence"] == suggestion["confidence"]
                assert line["margin"] == suggestion["margin"]

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
        self.described.told(self.read(first), None)

    def refuse(self):
        method, path, content, status = self.rng.choice(self.REFUSED)
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
        self.predictions = 0
        assert (self.export(), self.suggest(samples)) == before

    def report(self):
        n = self.rng.choice([1, 2, 3, 10, 30, 1000])
        company = self.rng.choice([None, *self.COMPANIES])
        sure = [each["confidence"] for each in self.described.bookings.values()]
        level = self.rng.choice(sure or [None]) or 0.5  # the very one of a prediction
        query = f"?book_from={level}" + (f"&company={quote(company)}" if company else "")
        status, said = self.ask("GET", f"/report/{n}{query}")
        if said:
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
        status, report = self.described.report(n, None, ())
        figures = report and {key: report[key] for key in ("precision", "recall")}
        assert nearly(self.ask("GET", f"/metrics/{n}")) == nearly((status, figures))

    def prometheus(self):
        text = self.ask("GET", "/metrics", kind="text/plain; version=0.0.4; charset=utf-8")[1]
        values = dict(re.findall(r"^bookkeep_(\w+) (\d+)$", text.decode(), re.MULTILINE))
        described = self.described.health()
        for name in ("unseen", "checks", "accounts", "companies"):
            assert int(values[name]) == described[name]
        assert int(values["bookings"]) == described["samples"]
        assert int(values["predictions_total"]) == self.predictions
        assert int(values["log_bytes"]) == len(self.export())

    def predict(self):
        samples, accounts = self.samples(), self.described.accounts()
        suggested = self.suggest(samples)
        status, predicted = self.ask("POST", "/predict", samples)
        assert status == (200 if accounts or not samples else 503)
        if status == 200:
            self.predictions += len(samples)
            assert predicted == [answer["suggestions"][0]["account"] for answer in suggested]
        for answer in suggested or ():
            names = [suggestion["account"] for suggestion in answer["suggestions"]]
            assert len(set(names)) == len(names) <= 3
            assert accounts.issuperset(names)
            if answer["suggestions"][0]["confidence"] < 0.5:
                assert answer["decision"] == "review"
            else:
                assert answer["decision"] == ("check" if answer["check"] else "book")

    def suggest(self, samples):
        status, answers = self.ask("POST", "/suggest?top=3&book_from=0.5", samples)
        assert status == (200 if self.described.accounts() or not samples else 503)
        self.predictions += len(answers or ())
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
            content, crc = re.fullmatch(r'(.*), "crc": (\d+)}', text).groups()
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
        walk = Walk(partial(serve, log=tmp_path / f"{number}.jsonl"), rng)
        for _ in range(min(400, steps - number)):
            walk.step()
        walk.service.stop()


# ----------------------------------------------------------------------------------------- Server


@contextmanager
def turning(app, threads=2, is_quick=lambda size: True, is_busy=lambda: False):
    """A server that only turns when it is told to, and so many connections to it as are asked."""
    listener = bookkeep._bind("127.0.0.1", 0)
    app.is_quick, app.is_busy = is_quick, is_busy
    server = bookkeep.Server(app, listener, threads, 1000)
    opened = []

    def connect(n):
        new = [socket.create_connection(listener.getsockname(), timeout=30) for _ in range(n)]
        opened.extend(new)
        return new

    try:
        yield server, connect
    finally:
        server._dispatcher.shutdown()
        server._server.asyncore.close_all(server._server._map)
        for connection in opened:
            connection.close()


def who_answers(seconds=0.0):
    """An app, and the threads that called it."""
    threads = []

    def app(environ, start):
        threads.append(threading.get_ident())
        time.sleep(seconds)
        start("200 OK", [("Content-Length", "0")])
        return []

    app.refuses = lambda environ: False
    return app, threads


def test_all_who_wait_are_accepted_in_one_turn():
    with turning(who_answers()[0]) as (server, connect):
        connect(50)
        server._turn(0)
        assert len(server._server.active_channels) == 50


def test_short_questions_take_a_moment_of_each_turn_and_are_answered_in_turn():
    app, threads = who_answers(bookkeep.TURN / 2)
    with turning(app) as (server, connect):
        connections = connect(20)
        server._turn(0)
        for connection in connections:
            connection.sendall(request("/predict", booking()))
        answered = []
        while len(answered) < 20:
            before = len(threads)
            server._turn(0)
            assert len(threads) - before <= 3
            ready, _, _ = select.select({*connections} - {*answered}, [], [], 0)
            for connection in ready:
                assert connection.recv(15) == b"HTTP/1.1 200 OK"
                connection.recv(1000)
                connection.sendall(request("/predict", booking()))  # nobody is asked twice before
            answered += ready
        assert {*threads} == {threading.get_ident()}
        assert len(threads) < 24


def test_a_short_question_waits_for_the_model_without_keeping_anybody_waiting():
    app, threads = who_answers()
    resting = threading.Event()
    with turning(app, is_busy=lambda: not resting.is_set()) as (server, connect):
        [connection, other] = connect(2)
        server._turn(0)
        connection.sendall(request("/predict", booking()))
        server._turn(1)
        other.sendall(request("/health", method="GET"))
        server._turn(1)
        assert other.recv(15) == b"HTTP/1.1 200 OK"
        assert len(threads) == 1
        resting.set()
        server._turn(1)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        assert threads[1] == threading.get_ident()


@pytest.mark.parametrize(
    ("asked", "at_once"),
    [
        (request("/predict", booking()), True),
        (request("/predict", booking()).replace(b"{", b" \r\n{", 1)[:-3], True),
        (request("/predict", [booking()]), False),
        (request("/predict", json.dumps(booking())), False),
        (request("/predict", booking(Note="x" * bookkeep.SHORT_BODY)), False),
        (request("/predict", booking()) * 2, False),
        (request("/suggest", booking()), False),
        (request("/sample", [booking()]), False),
        (request("/health", method="GET"), False),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("is_quick", [True, False])
def test_only_what_is_surely_quick_is_answered_by_who_receives(asked, at_once, is_quick):
    app, threads = who_answers()
    with turning(app, is_quick=lambda size: is_quick) as (server, connect):
        [connection] = connect(1)
        server._turn(0)
        connection.sendall(asked)
        server._turn(1)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        assert (threads[0] == threading.get_ident()) == (at_once and is_quick)


def test_long_questions_keep_nobody_from_looking():
    go_on = threading.Event()

    def app(environ, start):
        assert environ["PATH_INFO"] == "/health" or go_on.wait(30)
        start("200 OK", [("Content-Length", "0")])
        return []

    app.refuses = lambda environ: False
    with turning(app, threads=1) as (server, connect):
        [asking, looking] = connect(2)
        server._turn(0)
        asking.sendall(request("/predict", [booking()]))
        server._turn(1)
        looking.sendall(request("/health", method="GET"))
        server._turn(1)
        assert looking.recv(15) == b"HTTP/1.1 200 OK"
        go_on.set()
        assert asking.recv(15) == b"HTTP/1.1 200 OK"


def test_a_prediction_is_quick_unless_there_are_too_many_accounts(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking(account=str(number)) for number in range(100)])
        assert bookkeeper.is_quick(bookkeep.QUICK // 100)
        assert not bookkeeper.is_quick(bookkeep.QUICK // 100 + 1)
        assert not bookkeeper.is_busy()
        with bookkeeper._changing:
            assert bookkeeper.is_busy()


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
    changes = [
        *[("POST", "/sample", [booking()])] * 5,
        ("POST", "/correct", {"seq": 0, "AccountNumber": "1"}),
        ("DELETE", "/company/none", None),
    ]
    changing = [
        threading.Thread(target=lambda change=change: answers.append(service.ask(*change)[0]))
        for change in changes
    ]
    changing[0].start()
    wait_until(hanging.with_suffix(".held").exists)
    for thread in changing[1:5]:
        thread.start()
    wait_until(lambda: "bookkeep_waiting 1" in metrics(service))
    for thread in changing[5:]:
        thread.start()
    for _ in range(3):
        assert service.get("/health")[0] == service.get("/report/1")[0] == 200
        assert service.post("/predict", [booking()] * 9)[0] == 200
        assert service.post("/suggest", booking())[0] == 200
    assert answers == []
    hanging.unlink()
    for thread in changing:
        thread.join()
    assert sorted(answers) == [200] * 6 + [404]


def metrics(service):
    return service.ask("GET", "/metrics", kind="text/plain; version=0.0.4; charset=utf-8")[
        2
    ].decode()


LONG = {"Content_Length": 200_000}


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (request("/sample", Authorization="", **LONG), 401),
        (request("/sample", Authorization="Bearer secrets", **LONG), 401),
        (request("/sample", Content_Length=900_000), 413),
        (request("/health", method="GET", Content_Length=900_000), 413),
        (request("/predict", Content_Type="text/plain", **LONG), 415),
        (request("/sample", method="PUT", **LONG), 405),
        (request("/nowhere", **LONG), 404),
        (request("/predict", Content_Length=9, Content_Type="text/plain"), 415),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_its_headers_suffice_to_refuse_is_refused_before_its_body(guarded, head, status):
    length = int(re.search(rb"Content-Length: (\d+)", head)[1])
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
        answers = connection.makefile("rb")
        for _ in range(2):
            connection.sendall(head)
            said, body = answer(answers)
            assert said.startswith(b"HTTP/1.1 %d " % status)
            assert list(json.loads(body)) == ["error"]
            connection.sendall(b"GET /nowhere HTTP/1.1\r\n\r\n".ljust(length)[:length])
        connection.sendall(request("/health", method="GET"))
        assert answer(answers)[0].startswith(b"HTTP/1.1 200 ")
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
        connection.sendall(head.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 %d " % status)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """One with a token, which the request helper sends."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "token").write_text("secret")
    service = Service(folder / "log.jsonl", "--max-body=300000", "--token-file", folder / "token")
    yield service
    service.process.kill()
    service.process.wait()


def test_the_rest_of_what_was_refused_is_no_request_however_it_ends(guarded):
    chunked = request("/sample", Authorization="", Transfer_Encoding="chunked")
    chunked = chunked.replace(b"Content-Length: 0\r\n", b"")
    hidden = request("/health", method="GET")
    for rest, after in (
        (b"%x\r\n%s\r\n0\r\n\r\n" % (len(hidden), hidden), 200),
        (b"9\r\n" + hidden, 400),
        (b"%x\r\n" % 9**9 + b" " * 2_000_000 + hidden, 413),
    ):
        with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
            answers = connection.makefile("rb")
            connection.sendall(chunked)
            assert answer(answers)[0].startswith(b"HTTP/1.1 401 ")
            with suppress(ConnectionError):
                connection.sendall(rest + hidden)
            said, _ = answer(answers)
            assert int(said.split()[1]) == after
            with suppress(ConnectionError):
                assert (after == 200) or answers.read() == b""
    assert "Traceback" not in guarded.said()


def test_those_who_forget_do_not_keep_others_from_booking(serve):
    service = serve("--threads=2")
    for batch in batches_of([booking(company=f"c{i % 8}") for i in range(40_000)], 10_000):
        assert service.post("/sample", batch)[0] == 200
    forgetting = [
        threading.Thread(target=service.delete, args=[f"/company/c{i}"]) for i in range(8)
    ]
    for thread in forgetting:
        thread.start()
    waited = []
    while forgetting[-1].is_alive():
        started = time.monotonic()
        assert service.post("/sample", [booking()])[0] == 200
        waited.append(time.monotonic() - started)
    for thread in forgetting:
        thread.join()
    assert len(waited) > 3
    assert max(waited) < 1


def test_what_is_accepted_is_told_to_continue(service):
    body = json.dumps([]).encode()
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(request("/sample", Expect="100-continue", Content_Length=len(body)))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"


def test_unfinished_uploads_hold_little_and_shut_nobody_out(serve):
    code = "import sys, bookkeep; bookkeep.PATIENT = 1; sys.exit(bookkeep.main())"
    service = serve("--max-body=3000000", program=("-c", code))

    def held():
        sizes = []
        for file in Path(f"/proc/{service.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                deleted = "deleted" in os.readlink(file)
                sizes += [file.stat().st_size] if deleted else []
        return sum(sizes)

    def push(connection):
        with suppress(OSError):
            connection.sendall(request("/sample", Content_Length=3_000_000) + b" " * 2_900_000)

    stalled = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(12)]
    sending = [threading.Thread(target=push, args=(connection,)) for connection in stalled]
    for thread in sending:
        thread.start()
    wait_until(lambda: held() > 8_000_000)
    assert service.post("/sample", [booking()])[0] == 200
    assert held() < bookkeep.ROOM * 7_100_000
    large = b"[]".ljust(2_999_999)
    assert service.ask("POST", "/sample", body=large)[0] == 200
    assert held() < bookkeep.ROOM * 7_100_000
    service.process.kill()
    for thread in sending:
        thread.join()
    for connection in stalled:
        connection.close()


def test_a_long_answer_that_nobody_reads_keeps_no_other_from_its_own(serve):
    service = serve()
    assert service.post("/sample", [booking(account="\U0001f600" * 100)])[0] == 200
    samples = [{"CompanyId": "A", "BankEntryText": "r", "BankEntryAmount": "a"}] * 10_000
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(request("/predict", samples) + request("/health", method="GET"))
        time.sleep(0.5)
        assert service.get("/health")[0] == 200
        assert service.post("/predict", booking())[0] == 200
    assert service.stop() == 0


def test_requests_of_one_connection_are_answered_in_order(service):
    kinds = [
        (request("/predict", booking()), b'["1"]'),
        (request("/predict", [booking()] * 500), b'["1", "1", '),
        (request("/predict", {}), b'{"error": "sample 0: CompanyId is missing"}'),
        (request("/sample", []), b'{"received": 0, '),
        (request("/health", method="GET"), b'{"status": "ok"'),
    ]
    rng = random.Random(0)
    asked = rng.choices(kinds, k=200)
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        sending = threading.Thread(
            target=connection.sendall, args=(b"".join(sent for sent, _ in asked),)
        )
        sending.start()
        answers = connection.makefile("rb")
        for _, expected in asked:
            assert answer(answers)[1].startswith(expected)
        sending.join()


def answer(file):
    """The next answer on a connection: its head and its body."""
    head = b"".join(iter(file.readline, b"\r\n"))
    length = re.search(rb"(?i)^content-length: (\d+)", head, re.MULTILINE)
    return head, file.read(int(length[1]))


# ----------------------------------------------------------------------------------- Command line


def test_help_explains_each_option():
    status, text, _ = run(HERE / "bookkeep.py", "--help")
    assert status == 0
    explained = text.partition("options:")[2]
    options = re.findall(r"(--[a-z-]+)", text.partition("options:")[0])
    assert {"--host", "--port", "--log", "--threads", "--token-file", "--version"} <= {*options}
    for option in options:
        assert re.search(rf"^ +(-h, )?{option}( [A-Z_]+)?\s+\w.{{9,}}", explained, re.MULTILINE)
        variable = f"BOOKKEEP_{option[2:].upper().replace('-', '_')}"
        assert (f"{variable})" in explained) == (option not in ("--help", "--version"))
    assert run(HERE / "bookkeep.py", "--version")[1] == f"bookkeep {bookkeep.__version__}\n"


@pytest.mark.parametrize(
    "options", [["--port", "x"], ["--port", "70000"], ["--threads", "0"], ["--nonsense"]], ids=str
)
def test_options_that_make_no_sense_are_refused(options):
    status, _, said = run(HERE / "bookkeep.py", *options)
    assert status == 2
    assert "Traceback" not in said
    assert "BOOKKEEP_PORT says" not in said


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PORT", "tcp://10.0.0.1:8080"),
        ("THREADS", "0"),
        ("MAX_BATCH", "1_0"),
        ("UNSAVED", "1e4"),
        ("OPEN", "maybe"),
        ("NAME", "https://books.example"),
        ("NAME", ""),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(f"BOOKKEEP_{variable}", value)
    status, out, said = run(HERE / "bookkeep.py", "check", "/no/log")
    assert (status, out) == (2, "")
    assert said.endswith(f", as BOOKKEEP_{variable} says\n")
    assert value in said


def test_variables_set_options_that_are_not_given(serve, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("s3cret")
    for name, value in {
        "HOST": "::1",
        "PORT": "1",
        "LOG": "/dev/null/log",
        "TOKEN_FILE": str(tmp_path / "token"),
        "ACCESS_LOG": "yes",
        "OPEN": "no",
        "MAX_BATCH": "1",
        "THREADS": "none",
    }.items():
        monkeypatch.setenv(f"BOOKKEEP_{name}", value)
    service = serve("--host=127.0.0.1", "--threads=2")
    assert service.post("/sample", [])[0] == 401
    for samples, status in (([booking()], 200), ([booking()] * 2, 400)):
        headers = {"Authorization": "Bearer s3cret"}
        assert service.ask("POST", "/sample", samples, headers=headers)[0] == status
    wait_until(lambda: "INFO 127.0.0.1 POST /sample 400" in service.said())


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_proxy_may_call_it_by_names_that_are_given(serve, monkeypatch, by_variable):
    names = "Books.example,10.0.0.7"
    if by_variable:
        monkeypatch.setenv("BOOKKEEP_NAME", names)
    service = serve(*([] if by_variable else [f"--name={names}"]))
    for host in ("books.example", "BOOKS.EXAMPLE:443", "10.0.0.7", "localhost"):
        assert service.ask("GET", "/health", headers={"Host": host})[0] == 200
    for host in ("example", "evil.books.example", "books.example.evil", "books.example,10.0.0.7"):
        assert service.ask("GET", "/health", headers={"Host": host})[0] == 403


def test_it_says_at_the_start_where_its_log_is(tmp_path):
    command = [sys.executable, SERVICE, "--port=0", "--log=kept.jsonl"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        said = process.stderr.readline()
        process.terminate()
    assert f", log {tmp_path / 'kept.jsonl'}, " in said


def test_importing_starts_nothing(tmp_path):
    status, out, said = run("-c", "import bookkeep, replay", cwd=tmp_path, env={"PYTHONPATH": HERE})
    assert (status, out, said, list(tmp_path.iterdir())) == (0, "", "", [])


INTERRUPTING = """
import os, signal, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == "{}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""


def interrupted_at(module, folder, *command):
    """As run, if Ctrl-C comes when this module is about to be imported."""
    (folder / "sitecustomize.py").write_text(INTERRUPTING.format(module))
    return run(*command, env=os.environ | {"PYTHONPATH": str(folder)})


@pytest.mark.parametrize("module", ["argparse", "numpy", "numpy.linalg", "bottle", "waitress"])
@pytest.mark.parametrize("installed", [False, True])
def test_ctrl_c_while_it_is_imported_is_quiet(tmp_path, module, installed):
    program = SERVICE
    if installed:
        program = tmp_path / "bookkeep"  # as pip makes it
        program.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r}); import bookkeep")
    assert interrupted_at(module, tmp_path, program, "check", "/no/log") == (130, "", "")


READING_SLOWLY = """
import os, sys, time, bookkeep
keep = bookkeep.Log._keep
def slowly(log, batch):
    keep(log, batch)
    while len(log) == 200 and os.path.exists("{}"):
        time.sleep(0.01)
bookkeep.Log._keep = slowly
sys.exit(bookkeep.main())
"""


@pytest.mark.parametrize("then", ["ready", "damaged", "stopped"])
def test_while_a_log_is_read_back_it_says_how_far_and_nothing_else(serve, path, tmp_path, then):
    with bookkeeping(path) as bookkeeper:
        for batch in batches_of([booking(Note="x" * 9_000) for _ in range(400)], 50):
            bookkeeper.book(batch)
    if then == "damaged":
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:250], b"?" + lines[250], *lines[251:]]))
    reading = tmp_path / "reading"
    reading.touch()
    program = ("-c", READING_SLOWLY.format(reading))
    service = serve(log=path, program=program, reads=False)
    wait_until(lambda: ", 1 of" in service.get("/health")[1]["error"])
    for method, name in (("GET", "/health"), ("GET", "/"), ("POST", "/sample"), ("PUT", "/x")):
        status, headers, answer = service.ask(method, name, [booking()])
        assert (status, headers["Retry-After"]) == (503, "1")
        assert answer == {"error": "the log is being read back, 1 of 3 MB so far"}
        assert headers["X-Content-Type-Options"] == "nosniff"
    if then == "stopped":
        assert service.stop() == 0
        assert service.said().endswith("stopped before it was done\n")
        return
    reading.unlink()
    if then == "damaged":
        assert service.process.wait(30) == 1
        assert "is damaged, line 251" in service.said()
    else:
        wait_until(lambda: service.answers() == 200)
        assert service.samples() == 400
        assert service.stop() == 0
    assert "Traceback" not in service.said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_it_cleanly_and_a_restart_knows_all(serve, number):
    service = serve()
    samples = bookings(700)
    for batch in batches_of(samples, 90):
        assert service.post("/sample", batch)[0] == 200
    before = (service.get("/metrics/100"), service.post("/predict", samples))
    assert service.stop(number) == 0
    said = service.said()
    assert f"serving on http://127.0.0.1:{service.port}" in said
    assert "0 bookings read back" in said
    assert said.rstrip().endswith("stopped")
    assert "Traceback" not in said
    service = serve()
    wait_until(lambda: "700 bookings read back" in service.said())
    assert (service.get("/metrics/100"), service.post("/predict", samples)) == before


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


def test_a_request_under_way_is_answered_before_it_stops(serve):
    service = serve()
    body = json.dumps([booking()]).encode()
    idle = socket.create_connection(("127.0.0.1", service.port))
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(
            b"POST /sample HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body[:10]
        )
        time.sleep(0.3)
        service.process.terminate()
        wait_until(lambda: "stopping" in service.said())
        connection.sendall(body[10:])
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert service.process.wait(5) == 0
    idle.close()
    assert serve().samples() == 1


def test_who_does_not_finish_or_read_does_not_keep_it_from_stopping(serve, tmp_path):
    hanging = tmp_path / "hanging"
    service = serve(program=("-c", HANGING.format(hanging)))
    hanging.touch()
    answers = []
    sending = threading.Thread(target=lambda: answers.append(service.post("/sample", [booking()])))
    sending.start()
    half = request("/sample", [booking()])[:-5]
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(half)
        time.sleep(0.3)
        started = time.monotonic()
        service.process.terminate()
        assert connection.recv(10) == b""
        assert 3 < time.monotonic() - started < 5
        time.sleep(1)  # whoever has sent all is waited for, however long
        assert service.process.poll() is None
        hanging.unlink()
        assert service.process.wait(2) == 0
    sending.join()
    assert answers[0][0] == 200
    assert serve().samples() == 1


def test_a_cut_off_batch_is_repaired_at_the_start(serve, tmp_path):
    service = serve()
    for batch in batches_of(bookings(40), 20):
        service.post("/sample", batch)
    service.process.kill()
    service.process.wait()
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-100])
    service = serve()
    assert service.samples() == 20
    assert "WARNING" in service.said()
    assert "the batch is unfinished" in service.said()


@pytest.mark.parametrize("accident", ["moved", "replaced", "deleted", "cut"])
def test_a_log_that_is_moved_under_the_service_is_not_written(serve, tmp_path, accident):
    log, away = tmp_path / "log.jsonl", tmp_path / "away"
    service = serve()
    headers = {"Idempotency-Key": "mine"}
    assert service.ask("POST", "/sample", [booking()] * 3, headers=headers)[0] == 200
    whole = log.read_bytes()
    if accident == "cut":  # as logrotate's copytruncate does
        os.truncate(log, 0)
    else:
        os.link(log, away)
        log.unlink()
    if accident == "replaced":
        log.write_bytes(whole)
    for more in ({}, {"headers": headers}):  # nor is what was stored in it said to be stored
        status, _, answer = service.ask("POST", "/sample", [booking(account="2")] * 3, **more)
        assert status == 507
        assert "moved, replaced, deleted or cut" in answer["error"]
    assert service.post("/correct", {"seq": 0, "AccountNumber": "2"})[0] == 507
    assert service.delete("/company/A")[0] == 507
    assert re.search("ERROR.*moved, replaced, deleted or cut", service.said())
    status, answer = service.get("/health")
    assert status == 503
    assert "put it back" in answer["error"]
    assert service.post("/predict", booking()) == (200, ["3115"])
    if accident == "cut":
        log.write_bytes(whole)
    else:
        away.rename(log)
    assert service.samples() == 3
    assert service.post("/sample", [booking(account="2")] * 3)[0] == 200
    assert service.stop() == 0
    assert len(read(log)) == 6


def test_what_keeps_it_from_starting_is_said_in_one_line(serve, tmp_path):
    log = tmp_path / "log.jsonl"
    service = serve()
    service.post("/sample", [booking(), booking()])
    assert "in use by another process" in refused(log)
    assert f"port {service.port}" in refused(tmp_path / "other", f"--port={service.port}")
    assert "no.such.host" in refused(tmp_path / "other", "--host=no.such.host.invalid")
    assert "--open" in refused(tmp_path / "other", "--host=0.0.0.0")
    assert "a token must be" in refused(tmp_path / "other", f"--token-file={log}")
    assert "No such file" in refused(tmp_path / "other", "--token-file=/no/token")
    files = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (119, 119))
    assert "let it open at least 120 files" in refused(tmp_path / "other", preexec_fn=files)
    service.stop()
    assert "cannot open" in refused(Path("/proc/log"))  # where nobody may write
    assert "Is a directory" in refused(tmp_path)
    assert "Not a directory" in refused(log / "log")
    log.write_bytes(b"nonsense\n" + log.read_bytes())
    before = log.read_bytes()
    assert "damaged, line 1: " in refused(log)
    assert log.read_bytes() == before


def test_a_log_without_problems_is_checked(tmp_path):
    lines = written(tmp_path / "log", [])
    assert run(HERE / "bookkeep.py", "check", tmp_path / "log")[0] == 0
    with bookkeeping(tmp_path / "log") as bookkeeper:
        bookkeeper.book(bookkeeping_samples := bookings(30))
        bookkeeper.book(bookkeeping_samples, "mine")
    status, out, said = run(HERE / "bookkeep.py", "check", tmp_path / "log")
    assert (status, said, lines) == (0, "", [])
    assert out == f"{tmp_path / 'log'}: 60 bookings in whole batches, no problems\n"
    status, out, said = run(HERE / "bookkeep.py", "check", tmp_path / "none")
    assert (status, out) == (1, "")
    assert "No such file" in said


def test_a_check_says_once_what_a_start_cuts_off_and_what_is_no_log(tmp_path):
    log = tmp_path / "log"
    with bookkeeping(log) as bookkeeper:
        bookkeeper.book([booking()])
        whole = log.read_bytes()
        bookkeeper.book([booking(), booking(), booking()])
    size = len(log.read_bytes()) - len(whole)
    log.write_bytes(whole + log.read_bytes()[len(whole) :].replace(b"rent", bytes(4)))
    assert run(HERE / "bookkeep.py", "check", log)[:2] == (
        1,
        f"{log}, line 2: the batch is unfinished; a start cuts off {size} bytes\n"
        f"{log}: 1 booking in whole batches, 1 problem\n",
    )
    log.write_bytes(b"a,b\n" * 1000)
    assert run(HERE / "bookkeep.py", "check", log)[:2] == (
        1,
        f"{log}, line 1: this is no log\n{log}: 0 bookings in whole batches, 1 problem\n",
    )


def test_a_repaired_copy_has_every_batch_that_is_surely_whole(tmp_path):
    log = tmp_path / "log"
    with bookkeeping(log) as bookkeeper:
        for number in range(8):
            batch = [booking(account=str(number))] * 3
            bookkeeper.book(batch, f"key{number}" if number % 2 else None)
    lines = log.read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b"rent", b"Rent")  # of batch 1
    lines.insert(7, b"inserted\n")  # in batch 2
    lines.insert(11, lines[3])  # in batch 3
    del lines[14:16]  # of batch 4
    lines[-1] = lines[-1][:50]  # of batch 7
    log.write_bytes(b"".join(lines))
    before = log.read_bytes()
    status, out, said = run(HERE / "bookkeep.py", "check", log)
    assert (status, said) == (1, "")
    problems = out.splitlines()[:-1]
    assert [int(re.search(r"line (\d+): ", problem)[1]) for problem in problems] == [
        5,
        8,
        12,
        15,
        22,
    ]
    status, out, said = run(HERE / "bookkeep.py", "check", log, "--repair")
    assert (status, said) == (1, "")
    assert [line for line in out.splitlines() if ", line " in line] == problems
    assert "left out: seq 3 to 5" in out
    assert "left out: seq 12 to 14" in out
    assert "left out: all from seq 21 on" in out
    assert log.read_bytes() == before
    repaired = tmp_path / "log.repaired"
    with bookkeeping(repaired) as bookkeeper:
        assert bookkeeper.health()["samples"] == 15
        assert bookkeeper.book([booking(account="3")] * 3, "key3") == range(9, 12)
    kept = [record for record in read(repaired) if "sample" in record]
    assert [record["sample"]["AccountNumber"] for record in kept[::3]] == [*"02356"]
    assert [record["seq"] for record in kept] == [*range(3), *range(6, 12), *range(15, 21)]
    assert run(HERE / "bookkeep.py", "check", repaired)[0] == 0
    status, _, said = run(HERE / "bookkeep.py", "check", log, "--repair")
    assert status == 1
    assert "is there already" in said


def test_a_batch_with_a_record_that_makes_no_sense_is_left_out(path):
    with bookkeeping(path) as bookkeeper:
        for _ in range(3):
            bookkeeper.book([booking()] * 2)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = changed(lines[3], weight=0.83)
    path.write_bytes(b"".join(lines))
    status, out, _ = run(HERE / "bookkeep.py", "check", path, "--repair")
    assert status == 1
    assert "line 4: no booking can have that weight" in out
    assert "left out: seq 2 to 3" in out
    kept = read(path.with_name("log.jsonl.repaired"))
    assert [record["seq"] for record in kept if "sample" in record] == [0, 1, 4, 5]


def test_one_booking_is_said_to_be_one(path):
    with bookkeeping(path) as bookkeeper:
        bookkeeper.book([booking()])
    assert ": 1 booking in" in run(HERE / "bookkeep.py", "check", path)[1]
    assert ".repaired: 1 booking\n" in run(HERE / "bookkeep.py", "check", path, "--repair")[1]


def test_a_repaired_copy_keeps_numbers_corrections_and_what_was_removed(path):
    with bookkeeping(path) as bookkeeper:
        for number in range(4):
            bookkeeper.book([booking(company=f"company{number}")] * 2)
        for seq in (1, 3, 7):
            bookkeeper.correct(seq, "new")
        bookkeeper.forget("company2")
    assert run(HERE / "bookkeep.py", "check", path)[:2] == (
        0,
        f"{path}: 6 bookings in whole batches, no problems\n",
    )
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[2]  # of what is corrected
    path.write_bytes(b"".join(lines))
    status, out, _ = run(HERE / "bookkeep.py", "check", path, "--repair")
    assert status == 1
    repaired = path.with_name("log.jsonl.repaired")
    assert "left out: seq 2 to 3\n" in out
    assert "line 9: it corrects no booking before it" in out
    assert "left out: seq 9 to 9\n" in out
    assert f"{repaired}: 4 bookings\n" in out
    assert run(HERE / "bookkeep.py", "check", repaired)[0] == 0
    with bookkeeping(repaired) as bookkeeper:
        assert bookkeeper.health()["samples"] == 4
        assert bookkeeper.correct(1, "2") == bookkeeper.correct(7, "2") == "new"
        for seq in (2, 3, 4, 9):
            with pytest.raises(NotFound):
                bookkeeper.correct(seq, "2")


def test_one_misplaced_line_costs_no_batch(path):
    lines = written(path, [[{"x": number}] for number in range(200)])
    path.write_bytes(b"".join([*lines[:3], lines[180], *lines[3:]]))
    found = list(scan(path))
    assert sum(hasattr(whole, "records") for whole in found) == 200
    [damage] = [damage for damage in found if not hasattr(damage, "records")]
    assert (damage.line, damage.reason) == (4, "booking 180 does not belong here")


@pytest.mark.parametrize("repair", [[], ["--repair"]])
def test_a_check_that_is_interrupted_says_so_and_leaves_no_half_copy(tmp_path, repair):
    line = written(tmp_path / "whole", [[{"x": 1}]])[0]
    log = tmp_path / "log"  # a pipe, at which the check waits for more
    os.mkfifo(log)
    command = [sys.executable, HERE / "bookkeep.py", "check", log, *repair]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    pipe = os.open(log, os.O_RDWR)
    os.write(pipe, line)
    wait_until(lambda: fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)) == bytes(4))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    os.close(pipe)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert not (tmp_path / "log.repaired").exists()


@pytest.mark.parametrize(("name", "kept"), [(None, [0, 9, 12]), ("named", [0, 12])])
def test_after_a_gap_a_batch_is_kept_if_its_start_is_sure(path, name, kept):
    lines = written(path, [[{"x": 1}] * 3 for _ in range(5)])
    lines[9:12] = [changed(line, batch=name or 9) for line in lines[9:12]]
    del lines[5:9]  # the end of one batch and all of the next
    path.write_bytes(b"".join(lines))
    found = list(scan(path))
    assert [whole.records[0]["seq"] for whole in found if hasattr(whole, "records")] == kept
    [damage] = [damage for damage in found if not hasattr(damage, "records")]
    assert (damage.line, damage.reason) == (6, "4 bookings are missing before it")
