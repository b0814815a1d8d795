"""
One line on what a model does with the pages of a task: reads them, loops, recites, or writes the
text of another page. Judged from the rows of an evaluation (dicts, one per page, as
nanochat/evaluation.py makes them) and from the rows of its controls.
"""
from collections import Counter, defaultdict

import numpy as np

from nanochat.metrics import bootstrap_ci, one_minus_ned

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


def mean(rows, key):
    return float(np.mean([row[key] for row in rows]))


def nearest_other(rows):
    """
    For each row the 1-NED of its prediction to the truth of another row: the best of the few that
    share most words with the prediction. Truths under 6 characters are left out.
    """
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
        best = 0.0
        for i, _ in shared.most_common(CANDIDATES):
            best = max(best, one_minus_ned(row["prediction"], rows[i]["truth"]))
        scores.append(best)
    return scores


def paired_gain(rows, control_rows):
    """
    What a page's own picture adds: (mean, lower end of its 95 % interval) of 1-NED with the page
    minus 1-NED under the control, over the pages that the control has.
    """
    without = {row["index"]: row["one_minus_ned"] for row in control_rows}
    gains = []
    for row in rows:
        if row["index"] in without:
            gains.append(row["one_minus_ned"] - without[row["index"]])
    low, _ = bootstrap_ci(gains)
    return float(np.mean(gains)), low


def verdict(rows, controls):
    """
    One line from a task's rows and the rows of its controls, {name: rows}. The first that holds:
    every page failed; the same text for every page; loops; reads another page; reads (1-NED with
    its own picture is better than with another page's by 0.1 or more, paired); ignores the page.
    Without controls the last two cannot be told apart.
    """
    good = [row for row in rows if not row["failed"]]
    if not good:
        return f"every page failed: {rows[0]['error']}"

    text, same = Counter(row["prediction"] for row in good).most_common(1)[0]
    distinct_truths = {row["truth"] for row in good}
    if same > len(good) / 2 and len(distinct_truths) > 1:
        return f"same text for every page: {text[:40]!r} on {same} of {len(good)}"

    loops = sum(row["repetition"] for row in good)
    if loops > len(good) / 2:
        return f"loops: on {loops} of {len(good)} pages"

    own = mean(good, "one_minus_ned")
    other = float(np.mean(nearest_other(good)))
    if other > own + 0.2:
        return (f"reads another page: 1-NED {other:.3f} to another page's truth, "
                f"{own:.3f} to its own")

    if not controls.get("another"):
        return f"1-NED {own:.3f}; whether the page is read, controls would tell (--controls)"
    gain, low = paired_gain(rows, controls["another"])
    what = "reads" if gain >= MIN_GAIN and low > 0 else "ignores the page"
    return f"{what}: 1-NED {gain:+.3f} with its own page against another in its place"
