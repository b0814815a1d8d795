"""
How far a page that was read is from the page's truth. Every metric is defined here once, with its source.

The primary number is `one_minus_ned`: order, repetition and omission all cost. The word-set figures (f1, precision)
are reported because the literature does, but they do not see order or loops: never quote them alone.
All figures are shares between 0 and 1 unless their docstring says otherwise. Empty predictions and empty truths are
defined everywhere, so a run over a benchmark cannot stop on one.
"""

import math
import re

import numpy as np

CHINESE = re.compile("[\u4e00-\u9fa5]")  # Fox's range
SHORT_LOOP = re.compile(r"(.{1,8}?)\1{3,}", re.DOTALL)  # a unit of 1 to 8 characters, 4 times or more back to back


def normalize_whitespace(text):
    """Each run of whitespace becomes one space, the ends are stripped; case, punctuation and markup stay."""
    return " ".join(text.split())


# -----------------------------------------------------------------------------
# edit distances


def _levenshtein(a, b):
    from rapidfuzz.distance import Levenshtein  # only scoring needs rapidfuzz, so training runs without it
    return Levenshtein.distance(a, b)


def _error_rate(pred, truth):
    """Edits divided by the truth's length; an empty truth gives 0 for an empty prediction and 1 for any other."""
    if not truth:
        return float(bool(pred))
    return _levenshtein(pred, truth) / len(truth)


def ned(pred, truth):
    """Normalised edit distance, 0 (same) to 1: Levenshtein over characters / the longer length, on
    whitespace-normalised text (Fox's edit_dist, there on raw text). Both empty: 0. This is a whole-page figure, not
    OmniDocBench's official score, which matches blocks first and drops punctuation."""
    pred, truth = normalize_whitespace(pred), normalize_whitespace(truth)
    return _levenshtein(pred, truth) / max(len(pred), len(truth), 1)


def one_minus_ned(pred, truth):
    """1 - NED: the primary number. 1 is a perfect page."""
    return 1.0 - ned(pred, truth)


def cer(pred, truth):
    """Character error rate: Levenshtein over characters / characters of the truth, whitespace-normalised.
    A long prediction makes it exceed 1."""
    return _error_rate(normalize_whitespace(pred), normalize_whitespace(truth))


def wer(pred, truth):
    """Word error rate: Levenshtein over whitespace-separated words / words of the truth. May exceed 1."""
    return _error_rate(pred.split(), truth.split())


# -----------------------------------------------------------------------------
# word sets


def _words(text, chinese, by_character):
    if not chinese:
        return set(text.split())
    if by_character:
        return set(text) - {c for c in text if c.isspace()}
    try:
        import jieba
    except ImportError as error:
        raise ImportError("word figures of a text with Chinese characters need jieba, as Fox's script does: "
                          "`pip install jieba`, or cut by character with by_character=True") from error
    jieba.setLogLevel("WARNING")  # it reports the loading of its dictionary otherwise
    return set(jieba.lcut(text))


def word_sets(pred, truth, by_character=False):
    """
    F1, precision and recall between the SETS of words P (prediction) and T (truth), as in Fox's eval_ocr_test.py:
    split at whitespace, case and punctuation kept; when either side holds a Chinese character both are cut by jieba
    (its whitespace pieces included, as there). by_character=True cuts those pages into single characters instead.

    - precision = |P & T| / |P|. Misleading when the output is short: "the" alone can score 1.
    - recall = precision_official = |P & T| / |T|. Fox's script passes its two arguments swapped, so what it (and
      GOT-OCR2.0 with it) prints as "precision" is the recall; the second name marks the figure comparable to theirs.
    - both sets empty: all 1. One empty: all 0 (Fox's script crashes there).

    Sets see neither order nor repetition: shuffled words, or a correct page followed by a loop, score 1.
    """
    chinese = bool(CHINESE.search(pred) or CHINESE.search(truth))
    p, t = _words(pred, chinese, by_character), _words(truth, chinese, by_character)
    if not p or not t:
        precision = recall = f1 = float(not p and not t)
    else:
        common = len(p & t)
        precision, recall, f1 = common / len(p), common / len(t), 2 * common / (len(p) + len(t))
    return {"f1": f1, "precision": precision, "precision_official": recall, "recall": recall}


# -----------------------------------------------------------------------------
# loops


def repeated_share(text, n=10):
    """Share of the n-grams of characters that already occurred earlier in the text; 0 for texts of up to n
    characters. Text pages stay under 0.2 (0.00 to 0.16 on OmniDocBench's demo pages), a loop tends to 1."""
    total = len(text) - n + 1
    if total < 2:
        return 0.0
    return 1.0 - len({text[i:i + n] for i in range(total)}) / total


def repetition(pred):
    """
    True when the page loops, on whitespace-normalised text. Our own definition; either
    - from 40 characters: over half of the 10-grams of the whole page, or of its last 400 characters, are repeats, or
    - from 16 characters: one unit of 1 to 8 characters, 4 times or more back to back, fills at least half of the last
      64 characters (of the whole text if shorter). A page of large print has too few 10-grams for the first rule.
    A page that ends in a long ruled line or, read as HTML, in a table of empty cells counts as a loop too.
    """
    text = normalize_whitespace(pred)
    if len(text) >= 40 and max(repeated_share(text), repeated_share(text[-400:])) > 0.5:
        return True
    tail = text[-64:]
    longest = max((len(match.group()) for match in SHORT_LOOP.finditer(tail)), default=0)
    return len(tail) >= 16 and longest >= len(tail) / 2


# -----------------------------------------------------------------------------
# short answers


def _number(text):
    """'0.14' and '14%' as a float; None for anything else ('1,000', 'yes', 'nan')."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:  # not a number is an answer here, not a failure
        return None
    return value if math.isfinite(value) else None


def relaxed_accuracy(pred, truth):
    """ChartQA's relaxed accuracy as bool: numbers within 5 % of the truth, '14%' being 0.14; everything else, and any
    prediction for a truth of 0, by exact match after stripping the ends and lower-casing. '1,000' is no number, so it
    differs from '1000'. Source: Masry et al. 2022, in the form the public harnesses agree on."""
    pred, truth = pred.strip().lower(), truth.strip().lower()
    p, t = _number(pred), _number(truth)
    if p is not None and t:
        return abs(p - t) <= 0.05 * abs(t)
    return pred == truth


# -----------------------------------------------------------------------------
# a page, and all pages


def bootstrap_ci(values, seed=0, n=1000):
    """(low, high): 95 % percentile bootstrap interval of the mean (Efron 1979), from n resamples of the pages."""
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("bootstrap_ci got 0 values, it needs at least 1: were any pages scored?")
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(values.size, size=values.size)].mean() for _ in range(n)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def score_page(pred, truth, by_character=False):
    """All figures of one page. f1_by_character equals f1 on pages without Chinese; by_character=True makes the other
    word figures use that cut as well, for machines without jieba. A page whose truth itself counts as a loop (a ruled
    line, a table of empty cells) is not one, so a perfect reader has a repetition rate of 0."""
    distance = ned(pred, truth)
    return {"one_minus_ned": 1.0 - distance, "ned": distance, "cer": cer(pred, truth), "wer": wer(pred, truth),
            **word_sets(pred, truth, by_character), "f1_by_character": word_sets(pred, truth, by_character=True)["f1"],
            "repetition": repetition(pred) and not repetition(truth),
            "pred_chars": len(pred), "truth_chars": len(truth)}


MEANS = ("one_minus_ned", "ned", "cer", "wer", "f1", "precision", "precision_official", "recall", "f1_by_character")
# a page without an output scores what an empty answer would: nothing right, nothing looping
FAILED = {**dict.fromkeys(MEANS, 0.0), "ned": 1.0, "cer": 1.0, "wer": 1.0, "repetition": False}


def summarize(rows):
    """
    Means over pages (each page weighs the same) of rows as score_page gives them. A row with "failed": true needs no
    figures and counts as wrong (1-NED 0, NED/CER/WER 1, words 0), never as absent. ci95 is [low, high] of
    one_minus_ned. relaxed_accuracy is there when any row has it (short answers). Raises ValueError without rows: a mean
    of nothing is no result.
    """
    if not rows:
        raise ValueError("summarize got 0 rows, it needs at least 1: were any pages scored?")
    scored = [{**row, **FAILED} if row.get("failed") else row for row in rows]
    summary = {"samples": len(rows), "failed": sum(bool(row.get("failed")) for row in rows)}
    summary |= {key: float(np.mean([row[key] for row in scored])) for key in MEANS}
    summary["repetition_rate"] = float(np.mean([row["repetition"] for row in scored]))
    if any("relaxed_accuracy" in row for row in rows):
        summary["relaxed_accuracy"] = float(np.mean([not row.get("failed") and row["relaxed_accuracy"] for row in rows]))
    summary["ci95"] = list(bootstrap_ci([row["one_minus_ned"] for row in scored]))
    return summary
