"""
One line on what a model does with the pages of a task: it reads them, loops, recites, writes the
text of another page, or does so on some of them. Judged from the rows of an evaluation (dicts, one
per page, as nanochat/scoring.py makes them) and from the rows of its controls. And two models
compared page by page.
"""
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from nanochat.metrics import bootstrap_ci, normalize_whitespace, one_minus_ned

# What a control shows the model instead of the page.
CONTROLS = {
    "blank": "a white page in its place",
    "another": "another page's picture in its place",
    "random_chars": "its words replaced by random letters, truth too",
    "shuffled": "its words in random order, truth too",
}
MIN_GAIN = 0.1  # 1-NED that the right picture must add before we say that the model reads
MIN_TRUTH = 6  # characters; a wrong "yes" is not another page's answer
CANDIDATES = 3  # other pages compared with each prediction, those with most words in common
OTHER_MARGIN = 0.2  # 1-NED by which another page's truth must be nearer than the page's own
SAID = 0.05  # share of pages from which on a fault is part of the verdict


def mean(rows, key):
    return float(np.mean([row[key] for row in rows]))


# -----------------------------------------------------------------------------
# What goes wrong on single pages


def nearest_other(rows):
    """
    For each row the 1-NED of its prediction to the truth of another row: the best of the few that
    share most words with the prediction. Truths under 6 characters are left out.
    """
    # An index of words, because to compare every prediction with every truth of a benchmark of a
    # thousand pages takes ten minutes.
    pages_with = defaultdict(set)  # word -> indices of the rows whose truth contains it
    for i, row in enumerate(rows):
        if len(row["truth"]) >= MIN_TRUTH:
            for word in set(row["truth"].split()):
                pages_with[word].add(i)

    scores = []
    for row in rows:
        shared = Counter()  # other row -> number of words in common
        for word in set(row["prediction"].split()):
            for i in pages_with[word]:
                if rows[i]["truth"] != row["truth"]:
                    shared[i] += 1
        best = 0.0  # also where no word is shared
        for i, _ in shared.most_common(CANDIDATES):
            best = max(best, one_minus_ned(row["prediction"], rows[i]["truth"]))
        scores.append(best)
    return scores


def repeated_texts(rows):
    """
    Rows that got a wrong text which other rows, of other truths, got as well. Short truths are left
    out, since many questions are wrongly answered "yes"; so are empty predictions, another fault.
    """
    groups = defaultdict(list)
    for row in rows:
        text = normalize_whitespace(row["prediction"])  # two empty lines are one empty text
        if text and len(row["truth"]) >= MIN_TRUTH:
            groups[text].append(row)
    found = []
    for text, group in groups.items():
        # Pages with the same truth may well be read alike.
        truths = {normalize_whitespace(row["truth"]) for row in group}
        if len(truths) > 1:
            found += [row for row in group if normalize_whitespace(row["truth"]) != text]
    return found


def empty_pages(rows):
    """Rows without a text where there is one; nothing is the right answer to an empty page."""
    return [row for row in rows if row["truth"].strip() and not row["prediction"].strip()]


def find_faults(rows, good, others):
    """
    {fault: rows that have it}; a row may have several. good: the rows that did not fail; others:
    their `nearest_other`.
    """
    wrong_page = []
    for row, other in zip(good, others):
        if other > row["one_minus_ned"] + OTHER_MARGIN:
            wrong_page.append(row)
    return {
        "failed": [row for row in rows if row["failed"]],
        "empty": empty_pages(good),
        "cut": [row for row in good if not row["finished"]],
        "looping": [row for row in good if row["repetition"]],
        "repeated_text": repeated_texts(good),
        "another_page": wrong_page,
    }


FAULT_NAMES = {
    "failed": "failed",
    "empty": "empty",
    "cut": "cut by the token limit",
    "looping": "looping",
    "repeated_text": "the same wrong text as for other pages",
    "another_page": "the text of another page",
}


def fault_notes(faults, total):
    """What is said about the faults of more than 5 % of the pages; "" if there are none."""
    notes = []
    for fault, rows in faults.items():
        share = len(rows) / total
        if share > SAID:
            notes.append(f"{FAULT_NAMES[fault]} on {len(rows)} of {total} ({share:.0%})")
    return "; ".join(notes)


# -----------------------------------------------------------------------------
# The verdict


class Gain(NamedTuple):
    """1-NED with a page's own picture minus 1-NED under a control, paired over pages."""
    mean: float
    low: float  # lower end of the 95 % interval
    pairs: int

    @property
    def is_small(self):
        return self.mean < MIN_GAIN

    @property
    def is_certain(self):
        return self.low > 0


def paired_gain(rows, control_rows):
    """
    The Gain over a control, or None without a pair. Pages that failed in either are left out: a
    failure says nothing about reading, and a 0 under the control would look like a gain.
    """
    without = {}  # page -> its score under the control
    for row in control_rows:
        if not row["failed"]:
            without[row["index"]] = row["one_minus_ned"]
    gains = []
    for row in rows:
        if not row["failed"] and row["index"] in without:
            gains.append(row["one_minus_ned"] - without[row["index"]])
    if not gains:
        return None
    low, _ = bootstrap_ci(gains, limits=(-1.0, 1.0))
    return Gain(float(np.mean(gains)), low, len(gains))


def collapse(good, others):
    """The verdict on models whose output hardly depends on the page, or None."""
    total = len(good)
    distinct_truths = {row["truth"] for row in good}
    wrong = Counter()  # a text that is right on many pages ("yes", an empty table) is no collapse
    for row in good:
        text = normalize_whitespace(row["prediction"])
        wrong[text] += text != normalize_whitespace(row["truth"])
    text, same = wrong.most_common(1)[0]

    # Empty before equal: no text is the same text as well, but a name of its own says more.
    empty = empty_pages(good)
    if len(empty) > total / 2:
        return f"writes nothing: on {len(empty)} of {total} pages"
    if same > total / 2 and len(distinct_truths) > 1:
        return f"same text for every page: {text[:40]!r} on {same} of {total}"
    loops = sum(row["repetition"] for row in good)
    if loops > total / 2:
        return f"loops: on {loops} of {total} pages"

    # On average and not page by page: single pages may share their text with another, as forms do.
    own = mean(good, "one_minus_ned")
    other = float(np.mean(others))
    if other > own + OTHER_MARGIN:
        return (f"reads another page: 1-NED {other:.3f} to another page's truth, "
                f"{own:.3f} to its own")
    return None


class Verdict(NamedTuple):
    grade: str    # good, mixed, bad or open
    text: str     # one line
    faults: dict  # {fault: rows that have it}


def judge(rows, controls):
    """
    Verdict on a task's rows, with the rows of its controls, {name: rows}. The first that holds:

    bad    every page failed; nothing, the same text or a loop on most pages; another page's text
    open   without controls, reading and reciting cannot be told apart
    bad    ignores the page: its own picture adds less than 0.1 1-NED to a blank one or to another's
           (paired means)
    open   it adds more, but on so few pages that a 95 % interval of the means includes 0
    mixed  reads, but more than 5 % of the pages have a fault
    good   reads
    """
    good = [row for row in rows if not row["failed"]]
    others = nearest_other(good)
    faults = find_faults(rows, good, others)
    if not good:
        return Verdict("bad", f"every page failed: {rows[0]['error']}", faults)

    # What the model does on most pages comes first; faults that some pages have follow it.
    notes = fault_notes(faults, len(rows))
    tail = f"; {notes}" if notes else ""
    collapsed = collapse(good, others)
    if collapsed:
        return Verdict("bad", collapsed + tail, faults)

    # Both controls. A model that recites may be distracted by another page's picture, which looks
    # like a gain; then a blank page scores as high as the real one.
    another = paired_gain(rows, controls.get("another", []))
    blank = paired_gain(rows, controls.get("blank", []))
    if another is None:
        own = mean(good, "one_minus_ned")
        advice = "controls would tell (--controls)"
        if controls:
            advice = "cannot be told: no page had a control with another page's picture"
        line = f"1-NED {own:.3f}; whether the page is read, {advice}"
        return Verdict("open", line + tail, faults)

    evidence = (f"1-NED {another.mean:+.3f} with its own page against another in its place, on "
                f"{another.pairs} pages")
    if blank is not None:
        evidence += f", {blank.mean:+.3f} against a blank one"
    gains = [another] if blank is None else [another, blank]
    if any(gain.is_small for gain in gains):
        return Verdict("bad", f"ignores the page: {evidence}{tail}", faults)
    if not all(gain.is_certain for gain in gains):
        return Verdict("open", f"too few pages to tell (--controls): {evidence}{tail}", faults)
    if notes:
        return Verdict("mixed", f"reads in part: {notes}; {evidence}", faults)
    return Verdict("good", f"reads: {evidence}", faults)


# -----------------------------------------------------------------------------
# Two models


def compare(rows, other_rows):
    """
    Two evaluations of the same pages, paired page by page: {"pages": pairs, "of": pages here,
    "difference": mean 1-NED here minus there, "ci95", "better", "worse": pages}. Pages pair when
    name, picture and truth are the same; a page that failed counts as 0, as everywhere.
    ValueError when no page does.
    """
    # By name and truth, not by index: pages may have been added, or another sample drawn.
    there = {}
    for row in other_rows:
        there[row["hash"]["page"], row["hash"]["truth"]] = row
    differences = []
    for row in rows:
        other = there.get((row["hash"]["page"], row["hash"]["truth"]))
        if other is None:
            continue
        pictures = {row["hash"]["picture"], other["hash"]["picture"]} - {None}  # None: not opened
        if len(pictures) <= 1:
            differences.append(row["one_minus_ned"] - other["one_minus_ned"])
    if not differences:
        raise ValueError("no page is in both evaluations: were they run with the same --task, "
                         "--chars, --path and --seed?")
    return {"pages": len(differences), "of": len(rows),
            "difference": float(np.mean(differences)),
            "ci95": list(bootstrap_ci(differences, limits=(-1.0, 1.0))),
            "better": sum(difference > 0 for difference in differences),
            "worse": sum(difference < 0 for difference in differences)}
