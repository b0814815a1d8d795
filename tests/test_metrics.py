"""
Proves that every metric gives the value worked out by hand, that empty texts are defined, that
loops are told from text, and that failed pages count as wrong.

python -m pytest tests/test_metrics.py
"""

import json

import numpy as np
import pytest

from nanochat import metrics
from nanochat.metrics import (bootstrap_ci, cer, ned, normalize_whitespace, one_minus_ned,
                              relaxed_accuracy, repeated_share, repetition, score_page, summarize,
                              wer, word_sets)

PROSE = ("The quick brown fox jumps over the lazy dog while seven wizards mix strong potions by "
         "the old stone bridge, and nobody in the village asks why the river has turned a faint "
         "shade of green this morning.")


def test_whitespace_and_nothing_else():
    assert normalize_whitespace("  One,\n\n two\tTHREE \u3000four ") == "One, two THREE four"
    assert normalize_whitespace(" \n ") == ""


@pytest.mark.parametrize("pred, truth, expected", [
    ("kitten", "sitting", 3 / 7),       # substitute k, substitute e, insert g
    ("a  b\nc", "a b c", 0.0),          # whitespace runs only
    ("abc", "ABC", 1.0),                # case counts
    ("", "", 0.0), ("", "abc", 1.0), ("abc", "", 1.0), (" \n", "", 0.0),
])
def test_ned(pred, truth, expected):
    assert ned(pred, truth) == pytest.approx(expected)
    assert ned(truth, pred) == pytest.approx(expected)  # symmetric
    assert one_minus_ned(pred, truth) == pytest.approx(1 - expected)


def test_error_rates():
    assert cer("kitten", "sitting") == pytest.approx(3 / 7)
    assert cer("abcdef", "ab") == 2.0  # four insertions on two characters: may exceed 1
    # one substitution and one deletion on four words
    assert wer("the cat sat", "the dog sat down") == pytest.approx(2 / 4)
    assert wer("a b c", "a") == 2.0
    for rate in (cer, wer):
        assert (rate("", ""), rate("x", ""), rate("", "x y")) == (0.0, 1.0, 1.0)


def test_five_of_ten_words():
    figures = word_sets("a b c d e", "a b c d e f g h i j")
    assert figures == {"f1": pytest.approx(2 / 3), "precision": 1.0,
                       "precision_official": 0.5, "recall": 0.5}


def test_word_sets_edges():
    assert set(word_sets("", "").values()) == {1.0}
    assert set(word_sets(" ", "\n").values()) == {1.0}
    assert set(word_sets("", "word").values()) == {0.0}
    assert set(word_sets("word", "").values()) == {0.0}
    assert set(word_sets("x y", "a b").values()) == {0.0}
    assert word_sets("Word.", "word")["f1"] == 0.0  # no lower-casing, no stripping of punctuation


def test_sets_do_not_see_order_or_loops_but_ned_does():
    shuffled = " ".join(sorted(PROSE.split()))
    assert word_sets(shuffled, PROSE)["f1"] == 1.0
    assert ned(shuffled, PROSE) > 0.5
    looping = PROSE + " the lazy dog" * 100
    assert word_sets(looping, PROSE)["precision"] == 1.0
    assert ned(looping, PROSE) > 0.8


def test_chinese_by_character():
    # P = {天,地,人}, T = {天,地,日,月}: 2 common. The space is no character.
    figures = word_sets("天地 人", "天地日月", by_character=True)
    assert figures == {"f1": pytest.approx(4 / 7), "precision": pytest.approx(2 / 3),
                       "precision_official": 0.5, "recall": 0.5}
    # without Chinese they are words all the same
    assert word_sets("two words", "two more", by_character=True)["f1"] == 0.5
    # ... and one Chinese character does not make letters of the others
    assert word_sets("silent 天", "listen", by_character=True)["f1"] == 0


def test_chinese_by_jieba():
    pytest.importorskip("jieba", reason="jieba, an optional extra, is not installed")
    assert set(word_sets("我来到北京", "我来到北京").values()) == {1.0}
    figures = word_sets("北京", "我来到北京")  # jieba cuts the truth into 我 来到 北京
    assert figures["precision"] == 1.0 and figures["precision_official"] == pytest.approx(1 / 3)


def test_missing_jieba_names_the_fix(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jieba", None)  # makes the import fail
    with pytest.raises(ImportError, match="pip install jieba"):
        word_sets("天", "地")
    assert score_page("天", "天", by_character=True)["f1"] == 1.0


@pytest.mark.parametrize("text", [
    "0.6." * 20, "0.6." * 8, "a" * 16, "the cat " * 5, PROSE + " river" * 12,
    PROSE + " " + "and then the whole line comes again. " * 12,
    "plain start then xyxyxyxyxyxyxyxyxyxy",  # 20 of 37 characters, a page of large print
    PROSE * 3 + " Unseen words end it.",  # a loop that is left again
])
def test_loops(text):
    assert repetition(text)


@pytest.mark.parametrize("text", [
    "", "a", "1000000", "aaaa", "0.6.", PROSE, PROSE[:32], "had had that that is is not not it",
    "Chapter 1 .......... 12", "hahaha she said, hahaha he answered", PROSE + " " + PROSE[::-1],
    PROSE + "\n" + "_" * 24,  # a signature line
])
def test_no_loops(text):
    assert not repetition(text)


def test_a_true_rule_is_no_loop():
    rule = PROSE + "\n" + "-" * 60
    assert repetition(rule) and not score_page(rule, rule)["repetition"]
    assert score_page(rule, PROSE)["repetition"]


def test_repeated_share():
    assert repeated_share("abcdefghij") == 0.0  # one 10-gram
    assert repeated_share("a" * 19) == pytest.approx(0.9)  # ten 10-grams, one of them new
    assert repeated_share(PROSE) < 0.2


@pytest.mark.parametrize("pred, truth, expected", [
    ("105", "100", True), ("95", "100", True), ("105.1", "100", False),
    ("-95", "-100", True), ("-100", "100", False),
    ("14%", "0.14", True), ("0.14", "14%", True), ("14", "14%", False),
    ("0", "0", True), ("0.0", "0", False), ("0.001", "0", False),  # 5 % of 0 is 0: exact text
    ("Yes", "yes ", True), ("yes.", "yes", False),
    ("1,000", "1000", False), ("1,000", "1,000", True),
    ("", "", True), ("", "5", False), ("%", "%", True), ("nan", "nan", True), ("inf", "5", False),
])
def test_relaxed_accuracy(pred, truth, expected):
    assert relaxed_accuracy(pred, truth) is expected


@pytest.mark.parametrize("n", [2, 4, 6, 8, 25])
def test_intervals_of_few_values_are_wide_enough(n):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = bootstrap_ci(rng.normal(size=n), n=200, limits=(-99, 99))
        covered += low < 0 < high
    assert covered / 400 > (0.8 if n == 2 else 0.9)  # the bootstrap alone: 0.5, 0.81, ... of them


def test_bootstrap():
    values = [i / 99 for i in range(100)]
    low, high = bootstrap_ci(values)
    assert (low, high) == bootstrap_ci(values)  # same seed, same interval
    assert (low, high) != bootstrap_ci(values, seed=1)
    # the mean's standard error is 0.0290 (sd 0.2901 / 10), so the interval is about 0.5 +- 0.057
    assert low == pytest.approx(0.443, abs=0.012) and high == pytest.approx(0.557, abs=0.012)
    # of one value nothing can be said but what it can be at all
    assert bootstrap_ci([0.7]) == (0, 1) and bootstrap_ci([0.7], limits=(-1, 1)) == (-1, 1)
    with pytest.raises(ValueError, match="0 values"):
        bootstrap_ci([])


def test_summarize():
    perfect, empty = score_page(PROSE, PROSE), score_page("", PROSE)
    assert perfect["one_minus_ned"] == perfect["f1"] == 1.0 and perfect["cer"] == 0.0
    loop = score_page("0.6." * 50, PROSE)
    summary = summarize([perfect, empty, loop, {"failed": True, "error": "no image"}])
    assert summary["samples"] == 4 and summary["failed"] == 1
    assert summary["one_minus_ned"] == pytest.approx((1 + 0 + loop["one_minus_ned"] + 0) / 4)
    assert summary["ned"] == pytest.approx(1 - summary["one_minus_ned"])
    assert summary["f1"] == summary["precision"] == summary["precision_official"] == 0.25
    assert summary["repetition_rate"] == 0.25
    assert summary["ci95"][0] <= summary["one_minus_ned"] <= summary["ci95"][1]
    assert json.loads(json.dumps(summary)) == summary
    with pytest.raises(ValueError, match="0 rows"):
        summarize([])


def test_a_failed_page_is_wrong_even_with_figures_and_equals_an_empty_answer():
    failed = summarize([{**score_page(PROSE, PROSE), "failed": True}])
    empty = summarize([score_page("", PROSE)])
    assert {**failed, "failed": 0} == empty
    assert set(metrics.MEANS) | {"repetition_rate", "ci95", "samples", "failed"} == set(failed)
