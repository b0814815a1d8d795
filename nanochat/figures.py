"""
What the rows of an evaluation add up to (dicts, one per page, as nanochat/scoring.py makes
them): means, spread, speed and compression of a task, breakdowns by attribute of its pages, and the
compression curve in the form of DeepSeek-OCR's table.
"""
import re
from collections import Counter, defaultdict

import numpy as np

from nanochat.metrics import bootstrap_ci, summarize
from nanochat.verdict import judge, mean

# Figures that are printed, and kept for controls.
MAIN = ("one_minus_ned", "ned", "cer", "f1", "precision", "precision_official",
        "repetition_rate", "relaxed_accuracy")


# -----------------------------------------------------------------------------
# Buckets and breakdowns


def step_of(values):
    """Width of buckets, 1, 2 or 5 times a power of ten, of which `values` (>= 0) fill about 8."""
    largest = max(values)
    # With values close together, a range from 0 would put them all in one bucket of eight; with
    # equal values the span would be 0, and so would the width.
    span = max(largest - min(values), largest / 8)
    for exponent in range(-3, 9):
        for factor in (1, 2, 5):
            width = factor * 10 ** exponent
            if span <= 8 * width:
                return width
    raise ValueError(f"values up to {largest} are too large for buckets")


def natural_order(text):
    """Sort key that puts "9" before "10": runs of digits compare as numbers."""
    pieces = re.split(r"(\d+)", text)
    # Pieces alternate between text and digits, so a number is never compared with a text.
    return [int(piece) if piece.isdigit() else piece for piece in pieces]


def scores_by_value(rows, key, score):
    """{value of the attribute `key`: scores of the rows that have it}; a row may have several."""
    groups = defaultdict(list)
    for row in rows:
        values = row["attributes"].get(key)
        if values is None:
            continue
        if not isinstance(values, list):  # OmniDocBench's special_issue is a list
            values = [values]
        for value in values:
            # A failed page has no relaxed accuracy: it counts as a wrong answer.
            groups[str(value)].append(row.get(score, 0.0))
    return groups


def breakdown(rows, key, score="one_minus_ned"):
    """
    {value of the attribute `key`: [mean score, pages, its 95 % interval]} over the pages that have
    the attribute; {} if they all share one value. A page with several values counts in each.
    """
    groups = scores_by_value(rows, key, score)
    if len(groups) < 2:  # it would repeat the figure of the task
        return {}
    table = {}
    for value in sorted(groups, key=natural_order):
        scores = groups[value]
        low, high = bootstrap_ci(scores)
        interval = [round(low, 3), round(high, 3)]
        table[value] = [round(float(np.mean(scores)), 3), len(scores), interval]
    return table


def label_lengths(rows):
    """Adds the attribute text_tokens, a range such as "600-700", where the truth is known."""
    width = step_of([row["text_tokens"] for row in rows])
    for row in rows:
        if row["truth"] is not None:  # else its 0 tokens are no length
            low = row["text_tokens"] // width * width
            row["attributes"]["text_tokens"] = f"{low:g}-{low + width:g}"


def breakdowns(rows):
    """
    {"by_<attribute>": its breakdown} where pages differ in the attribute. Tasks of short answers
    get "relaxed_accuracy_by_<attribute>" as well: ChartQA is quoted in its human and augmented
    parts.
    """
    attributes = {}  # a dict, since it keeps the order
    for row in rows:
        attributes.update(row["attributes"])
    answers = any("relaxed_accuracy" in row for row in rows)

    found = {}
    for name in attributes:
        groups = breakdown(rows, name)
        if not groups:
            continue
        found[f"by_{name}"] = groups
        if answers:
            found[f"relaxed_accuracy_by_{name}"] = breakdown(rows, name, "relaxed_accuracy")
    return found


def breakdowns_in(figures):
    """[(score, attribute, breakdown), ...] of a task's figures, the score by its printed name."""
    found = []
    for key, value in figures.items():
        score, by, attribute = key.partition("by_")
        if by and isinstance(value, dict):
            name = score.strip("_").replace("_", " ")
            found.append((name or "1-NED", attribute, value))
    return found


# -----------------------------------------------------------------------------
# A task


def size_figures(rows):
    """How densely the pages are packed: means over the pages that could be opened."""
    names = ("vision_tokens", "positions", "valid_tokens", "text_tokens", "truth_chars")
    loaded = [row for row in rows if row["vision_tokens"]]
    if loaded:
        means = {name: mean(loaded, name) for name in names}
    else:  # all pictures are broken: there is nothing to take a mean of
        means = dict.fromkeys(names, 0.0)

    vision_tokens = means["vision_tokens"]
    per_token = 1 / max(vision_tokens, 1)
    if vision_tokens == int(vision_tokens):  # "64" reads better than "64.0"; tiled modes vary
        vision_tokens = int(vision_tokens)
    return {
        "chars_per_vision_token": means["truth_chars"] * per_token,
        "text_tokens_per_vision_token": means["text_tokens"] * per_token,
        "vision_tokens": vision_tokens,
        "positions": means["positions"],
        "valid_tokens": means["valid_tokens"],
    }


# Percentiles of the page scores. A mean of 0.5 may be of pages half read, or of half of the pages.
QUANTILES = {"min": 0, "p10": 10, "p25": 25, "median": 50, "p75": 75, "p90": 90, "max": 100}


def distribution(rows):
    """How the pages' scores are spread: quantiles, and counts in ten equal bins of 0 to 1."""
    scores = [row["one_minus_ned"] for row in rows]
    quantiles = {name: float(np.percentile(scores, q)) for name, q in QUANTILES.items()}
    counts, _ = np.histogram(scores, bins=10, range=(0, 1))  # a score of 1 is in the last bin
    return {"quantiles": quantiles, "histogram": counts.tolist()}


def speed(rows):
    """
    Pages and tokens per second of encoding and generation, without opening and scoring pages. Kept
    predictions count with the time that they took. 0 if nothing was read.
    """
    read = [row for row in rows if not row["failed"]]  # a page that failed at once is not fast
    seconds = sum(row["seconds"] for row in read)
    if seconds == 0:
        return {"pages_per_sec": 0.0, "tokens_per_sec": 0.0}
    tokens = sum(row["tokens"] for row in read)
    return {"pages_per_sec": len(read) / seconds, "tokens_per_sec": tokens / seconds}


def control_figures(controls):
    """{control: its main figures} from {control: rows}."""
    kept = ("samples", "failed", "ci95", *MAIN)  # a control is judged by a few numbers
    figures = {}
    for kind, rows in controls.items():
        summary = summarize(rows)
        figures[kind] = {key: value for key, value in summary.items() if key in kept}
    return figures


def figures_of(name, rows, controls, of):
    """
    All that is said about one task, from its rows and {control: rows}. `of`: pages that the task
    has; the rows are a sample of them when they are fewer.
    """
    label_lengths(rows)  # first, so that the length is one of the breakdowns
    verdict = judge(rows, controls)
    summary = summarize(rows)
    read = [row for row in rows if not row["failed"]]
    shares = {fault: len(found) / len(rows) for fault, found in verdict.faults.items()}
    return {
        "task": name,
        "verdict": verdict.text,
        "grade": verdict.grade,
        "samples": summary.pop("samples"),
        "of": of,
        **summary,
        **size_figures(rows),
        "confidence": mean(read, "confidence") if read else None,  # nats per token
        "unfinished": sum(not row["finished"] for row in read),
        **speed(rows),
        "shares": shares,
        **distribution(rows),
        "controls": control_figures(controls),
        **breakdowns(rows),
    }


def pages_of(figures):
    """"256 of 981": how many of a task's pages its figures are about."""
    return f"{figures['samples']} of {figures['of']}"


# -----------------------------------------------------------------------------
# The compression curve

CURVE_MEANS = ("text_tokens", "vision_tokens", "positions", "tokens_per_vision_token",
               "tokens_per_position", "precision", "precision_official", "one_minus_ned")


def usual_sizes(rows):
    """{task: (mode, vision tokens, positions) of most of its pages}."""
    seen = defaultdict(Counter)
    for row in rows:
        if row["vision_tokens"]:
            size = (row["mode"], row["vision_tokens"], row["positions"])
            seen[row["task"]][size] += 1
    usual = {}
    for task, sizes in seen.items():
        [(size, _)] = sizes.most_common(1)
        usual[task] = size
    return usual


def with_ratios(rows):
    """Copies of the rows of known length, with their compression added."""
    usual = usual_sizes(rows)
    known = []
    for row in rows:
        row = dict(row)
        # Pages that could not be opened stay in the curve, as wrong, at the size of most others:
        # left out, they would make a broken benchmark look better.
        if not row["vision_tokens"] and row["task"] in usual:
            row["mode"], row["vision_tokens"], row["positions"] = usual[row["task"]]
        if row["vision_tokens"] and row["truth"] is not None:
            row["tokens_per_vision_token"] = row["text_tokens"] / row["vision_tokens"]
            row["tokens_per_position"] = row["text_tokens"] / row["positions"]
            known.append(row)
    return known


def curve(rows, key="text_tokens"):
    """
    The paper's table, as a list of dicts: rows by task (all ranges of --chars of one task
    together), mode and bucket of `key`, which is text_tokens or tokens_per_vision_token. Vision
    tokens are counted as in the paper, and as positions in the decoder.
    """
    known = with_ratios(rows)
    if not known:
        return []
    width = step_of([row[key] for row in known])
    groups = defaultdict(list)
    for row in known:
        task = re.sub(r"_\d+-\d+$", "", row["task"])  # heldout_14-20 -> heldout
        bucket = int(row[key] // width)
        groups[task, row["mode"], bucket].append(row)
    return [curve_point(where, width, group) for where, group in sorted(groups.items())]


def curve_point(where, width, group):
    """One line of `curve`; where: (task, mode, number of the bucket)."""
    task, mode, bucket = where
    start = bucket * width
    end = start + width
    point = {"task": task, "mode": mode, "bucket": f"{start:g}-{end:g}", "pages": len(group)}
    for name in CURVE_MEANS:
        point[name] = round(mean(group, name), 4)
    low, high = bootstrap_ci([row["one_minus_ned"] for row in group])
    point["ci95"] = [round(low, 4), round(high, 4)]
    return point
