"""
How far the text that was read from a page is from the page's truth. Every metric is defined here
once, with its source.

The headline is `one_minus_ned`: mistakes in order, repetitions and omissions all lower it. The
word-set figures (f1, precision) are reported because the literature reports them, but they see
neither order nor loops: never quote them alone.

All figures are shares between 0 and 1 unless their docstring says otherwise. Empty predictions and
empty truths are defined everywhere, so that one empty page cannot stop the run over a benchmark.
"""
import math
import re

import numpy as np

CHINESE = re.compile("[\u4e00-\u9fa5]")  # the range in Fox's script
CHARACTER_OR_WORD = re.compile("[\u4e00-\u9fa5]|[^\\s\u4e00-\u9fa5]+")


def normalize_whitespace(text):
    """Turns every run of whitespace into one space and strips the ends; nothing else changes."""
    return " ".join(text.split())


# -----------------------------------------------------------------------------
# Edit distances


def _levenshtein(a, b):
    # imported here so that training, which scores nothing, runs without rapidfuzz
    from rapidfuzz.distance import Levenshtein
    return Levenshtein.distance(a, b)


def _error_rate(pred, truth):
    """Edits / length of the truth. For an empty truth 0 if the prediction is empty too, else 1."""
    if not truth:
        return float(bool(pred))
    return _levenshtein(pred, truth) / len(truth)


def ned(pred, truth):
    """
    Normalized edit distance, 0 (equal) to 1: Levenshtein distance in characters / length of the
    longer text, on whitespace-normalized text (Fox's edit_dist does the same on raw text). Two
    empty texts: 0. This scores the page as one string; OmniDocBench's official score matches
    blocks first and drops punctuation, so the two must not be compared.
    """
    pred = normalize_whitespace(pred)
    truth = normalize_whitespace(truth)
    longer = max(len(pred), len(truth), 1)  # 1: no division by zero when both are empty
    return _levenshtein(pred, truth) / longer


def one_minus_ned(pred, truth):
    """1 - NED, the headline number. 1 is a perfect page."""
    return 1.0 - ned(pred, truth)


def cer(pred, truth):
    """
    Character error rate: Levenshtein distance in characters / characters of the truth, on
    whitespace-normalized text. Exceeds 1 when the prediction is much too long.
    """
    return _error_rate(normalize_whitespace(pred), normalize_whitespace(truth))


def wer(pred, truth):
    """Word error rate: the same in whitespace-separated words. May exceed 1 too."""
    return _error_rate(pred.split(), truth.split())


# -----------------------------------------------------------------------------
# Sets of words


def _words(text, chinese, by_character):
    """The set of words of a text; `chinese` and `by_character` as in word_sets."""
    if not chinese:
        return set(text.split())
    if by_character:
        return set(CHARACTER_OR_WORD.findall(text))
    try:
        import jieba
    except ImportError as error:
        raise ImportError(
            "the word figures of a text with Chinese characters need jieba, which Fox's script "
            "uses: `pip install jieba`, or count characters with by_character=True") from error
    jieba.setLogLevel("WARNING")  # otherwise it logs the loading of its dictionary
    return set(jieba.lcut(text))


def word_sets(pred, truth, by_character=False):
    """
    F1, precision and recall between the SETS of words P (prediction) and T (truth), as in Fox's
    eval_ocr_test.py. Words are split at whitespace, with case and punctuation kept. If either text
    holds a Chinese character, both are cut by jieba (whose pieces of whitespace count, as they do
    there); by_character=True cuts their Chinese into single characters instead.

    - precision = |P & T| / |P|. Misleading when the output is short: "the" alone can score 1.
    - recall = precision_official = |P & T| / |T|. Fox's script passes its arguments in the wrong
      order, so what it prints as "precision" (GOT-OCR2.0 as well) is the recall. Compare
      precision_official with their numbers.
    - both sets empty: all figures 1; one empty: all 0 (Fox's script crashes in both cases).

    Sets see neither order nor repetition: shuffled words, or a correct page followed by a loop,
    score 1.
    """
    chinese = bool(CHINESE.search(pred) or CHINESE.search(truth))
    pred_words = _words(pred, chinese, by_character)
    true_words = _words(truth, chinese, by_character)
    if pred_words and true_words:
        common = len(pred_words & true_words)
        precision = common / len(pred_words)
        recall = common / len(true_words)
        f1 = 2 * common / (len(pred_words) + len(true_words))
    else:
        both_empty = float(not pred_words and not true_words)
        precision = recall = f1 = both_empty
    return {"f1": f1, "precision": precision, "precision_official": recall, "recall": recall}


# -----------------------------------------------------------------------------
# Loops

# A unit of 1 to 8 characters, at least 4 times back to back.
SHORT_LOOP = re.compile(r"(.{1,8}?)\1{3,}", re.DOTALL)
TAIL = 400  # characters at the end of a page that are also judged on their own


def repeated_share(text, n=10):
    """
    Share of a text's n-grams of characters that occurred earlier in it; 0 for up to n characters.
    Pages of text stay under 0.2 (0.00 to 0.16 on OmniDocBench's demo pages), a loop tends to 1.
    """
    total = len(text) - n + 1
    if total < 2:
        return 0.0
    distinct = {text[start:start + n] for start in range(total)}
    return 1.0 - len(distinct) / total


def repetition(pred):
    """
    Whether a page loops, judged on whitespace-normalized text. The definition is our own:

    - 40 characters or more: over half of the 10-grams of the whole page, or of its last 400
      characters, are repeats; or
    - 16 characters or more: a unit of 1 to 8 characters, 4 times or more back to back, fills at
      least half of the last 64 characters (or of the text, if shorter). The rule above misses
      these, since a page of large print has too few 10-grams.

    A page that ends in a long ruled line, or in an HTML table of empty cells, counts as a loop.
    """
    text = normalize_whitespace(pred)
    if len(text) >= 40:
        if repeated_share(text) > 0.5 or repeated_share(text[-TAIL:]) > 0.5:
            return True

    end = text[-64:]
    longest = 0
    for loop in SHORT_LOOP.finditer(end):
        longest = max(longest, len(loop.group()))
    return len(end) >= 16 and longest >= len(end) / 2


# -----------------------------------------------------------------------------
# Short answers


def _number(text):
    """'0.14' and '14%' as a float; None for anything else ('1,000', 'yes', 'nan')."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:  # an answer need not be a number
        return None
    return value if math.isfinite(value) else None


def relaxed_accuracy(pred, truth):
    """
    ChartQA's relaxed accuracy, as a bool. Numbers must be within 5 % of the truth, with '14%' equal
    to 0.14. Everything else, and any answer to a truth of 0, must match exactly after stripping the
    ends and lower-casing. '1,000' is not a number, so it differs from '1000'.
    Source: Masry et al. 2022, in the form that the public harnesses agree on.
    """
    pred = pred.strip().lower()
    truth = truth.strip().lower()
    pred_value = _number(pred)
    true_value = _number(truth)
    if pred_value is None or not true_value:  # no number, or 0: 5 % of 0 would allow nothing
        return pred == truth
    return abs(pred_value - true_value) <= 0.05 * abs(true_value)


# -----------------------------------------------------------------------------
# One page, and all pages

# The figures of a page that are averaged over pages.
MEANS = ("one_minus_ned", "ned", "cer", "wer", "f1", "precision", "precision_official", "recall",
         "f1_by_character")

# A page without an output scores like an empty answer: nothing is right and nothing loops.
FAILED = dict.fromkeys(MEANS, 0.0)
FAILED.update(ned=1.0, cer=1.0, wer=1.0, repetition=False)


# 97.5 % quantiles of Student's t for 2, 3, ... 30 values.
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14,
             2.13, 2.12, 2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05,
             2.05)
NORMAL = 1.96  # and of the normal distribution


def bootstrap_ci(values, seed=0, n=1000, limits=(0.0, 1.0)):
    """
    (low, high): 95 % percentile bootstrap interval of the mean (Efron 1979), n resamples. limits:
    what the mean can be at all.

    Of few values the bootstrap's interval is too narrow (that of 4 covers 81 % for normal data, not
    95). Up to 30 it is widened to the one of Student's t; of one value nothing can be said, so its
    interval is everything between the limits.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("bootstrap_ci got 0 values, it needs at least 1: were any pages scored?")
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(n):
        resample = values[rng.integers(values.size, size=values.size)]
        means.append(resample.mean())
    low, high = np.percentile(means, [2.5, 97.5])
    if values.size == 1:
        return limits
    if values.size - 2 < len(STUDENT_T):
        # The bootstrap takes the spread of a sample for that of the population, which is larger.
        spread = math.sqrt(values.size / (values.size - 1))
        widening = spread * STUDENT_T[values.size - 2] / NORMAL
        mean = values.mean()
        low = max(limits[0], mean - widening * (mean - low))
        high = min(limits[1], mean + widening * (high - mean))
    return float(low), float(high)


def score_page(pred, truth, by_character=False):
    """
    All figures of one page. f1_by_character equals f1 where no text has Chinese; by_character=True
    cuts Chinese into characters for the other word figures too, for machines without jieba.
    """
    distance = ned(pred, truth)
    scores = {
        "one_minus_ned": 1.0 - distance,
        "ned": distance,
        "cer": cer(pred, truth),
        "wer": wer(pred, truth),
        **word_sets(pred, truth, by_character),
        "f1_by_character": word_sets(pred, truth, by_character=True)["f1"],
        # A truth that itself counts as a loop (a ruled line, a table of empty cells) excuses the
        # prediction, so a perfect reader always has a repetition rate of 0.
        "repetition": repetition(pred) and not repetition(truth),
        "pred_chars": len(pred),
        "truth_chars": len(truth),
    }
    return scores


def _mean(rows, key):
    return float(np.mean([row[key] for row in rows]))


def summarize(rows):
    """
    Means over rows as score_page makes them, every page with the same weight.

    A row with "failed": true needs no figures: it counts as wrong (1-NED 0, NED, CER and WER 1,
    words 0), never as absent. ci95 is the [low, high] of one_minus_ned. relaxed_accuracy is present
    if any row has it (tasks with short answers). ValueError without rows.
    """
    if not rows:
        raise ValueError("summarize got 0 rows, it needs at least 1: were any pages scored?")
    scored = []
    for row in rows:
        if row.get("failed"):
            row = {**row, **FAILED}
        scored.append(row)

    summary = {"samples": len(rows), "failed": sum(bool(row.get("failed")) for row in rows)}
    for key in MEANS:
        summary[key] = _mean(scored, key)
    summary["repetition_rate"] = _mean(scored, "repetition")

    if any("relaxed_accuracy" in row for row in rows):
        right = [not row.get("failed") and row["relaxed_accuracy"] for row in rows]
        summary["relaxed_accuracy"] = float(np.mean(right))

    summary["ci95"] = list(bootstrap_ci([row["one_minus_ned"] for row in scored]))
    return summary
