"""
What the rows of an evaluation show (dicts, one per page, as nanochat/evaluation.py makes them):
breakdowns by attribute, the compression curve beside DeepSeek-OCR's, and one self-contained HTML
page to look at.
"""
import base64
import html
import io
import re
from collections import Counter, defaultdict

import numpy as np

from nanochat.metrics import MEANS, bootstrap_ci
from nanochat.verdict import CONTROLS, mean

# DeepSeek-OCR on 100 English pages of Fox (paper, table 2): (text tokens per vision token,
# precision), counted with their tokenizer.
PUBLISHED = {
    "DeepSeek-OCR, 64 tokens": [
        (10.5, .965), (11.8, .938), (13.2, .838), (15.1, .859), (16.5, .793), (17.7, .764),
        (19.7, .591)],
    "DeepSeek-OCR, 100 tokens": [
        (6.7, .985), (7.5, .973), (8.5, .968), (9.7, .968), (10.6, .915), (11.3, .898),
        (12.6, .871)],
}


# -----------------------------------------------------------------------------
# Breakdowns


def natural_order(text):
    """Sort key that puts "9" before "10": runs of digits compare as numbers."""
    pieces = re.split(r"(\d+)", text)
    return [int(piece) if piece.isdigit() else piece for piece in pieces]


def breakdown(rows, key, score="one_minus_ned"):
    """
    {value of the attribute `key`: [mean score, pages, its 95 % interval]} over the pages that have
    the attribute; {} if they all share one value. A page with several values counts in each.
    """
    groups = defaultdict(list)
    for row in rows:
        values = row["attributes"].get(key)
        if values is None:
            continue
        if not isinstance(values, list):
            values = [values]
        for value in values:
            groups[str(value)].append(row.get(score, 0.0))  # failed pages have no answer: wrong
    if len(groups) < 2:
        return {}

    table = {}
    for value in sorted(groups, key=natural_order):
        scores = groups[value]
        low, high = bootstrap_ci(scores)
        table[value] = [round(float(np.mean(scores)), 3), len(scores),
                        [round(low, 3), round(high, 3)]]
    return table


def step_of(values):
    """Width of buckets, 1, 2 or 5 times a power of ten, of which `values` (>= 0) fill about 8."""
    span = max(max(values) - min(values), max(values) / 8)
    for exponent in range(-3, 9):
        for factor in (1, 2, 5):
            width = factor * 10 ** exponent
            if span <= 8 * width:
                return width
    raise ValueError(f"values up to {max(values)} are too large for buckets")


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
    return {task: sizes.most_common(1)[0][0] for task, sizes in seen.items()}


def with_ratios(rows):
    """The rows of known length, with tokens_per_vision_token and tokens_per_position."""
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
    return [curve_point(key, width, group) for key, group in sorted(groups.items())]


def curve_point(key, width, group):
    """One line of `curve`: key is (task, mode, number of the bucket)."""
    task, mode, bucket = key
    low = bucket * width
    line = {"task": task, "mode": mode, "bucket": f"{low:g}-{low + width:g}", "pages": len(group)}
    for name in CURVE_MEANS:
        line[name] = round(mean(group, name), 4)
    low, high = bootstrap_ci([row["one_minus_ned"] for row in group])
    line["ci95"] = [round(low, 4), round(high, 4)]
    return line


def plot_line(axis, group, figure):
    """One task and mode: `figure` over compression, with the number of pages at each point."""
    x = [point["tokens_per_vision_token"] for point in group]
    y = [point[figure] for point in group]
    first = group[0]
    label = f"{first['task']}, {first['mode']}, {first['vision_tokens']:g} tokens"
    line, = axis.plot(x, y, "o-", label=label)
    if figure == "one_minus_ned":  # the figure that the intervals belong to
        low = [point["ci95"][0] for point in group]
        high = [point["ci95"][1] for point in group]
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15)
    for point, px, py in zip(group, x, y):
        axis.annotate(str(point["pages"]), (px, py), textcoords="offset points", xytext=(3, 4),
                      fontsize=7)


def plot_published(axis):
    """DeepSeek-OCR's own points, in grey."""
    for label, points in PUBLISHED.items():
        x = [ratio for ratio, _ in points]
        y = [precision for _, precision in points]
        gray = "0.6" if "64" in label else "0.3"
        axis.plot(x, y, "s--", color=gray, markersize=4, label=f"{label} (their tokenizer)")


def plot_curve(path, table, pages):
    """
    Draws a table of `curve` as a PNG: precision beside the published one, and 1-NED. pages: a note
    on which share of the pages was read.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = defaultdict(list)
    for point in table:
        lines[point["task"], point["mode"]].append(point)

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for axis, name in zip(axes, ("precision_official", "one_minus_ned")):
        for group in lines.values():
            plot_line(axis, group, name)
        if name == "precision_official":
            plot_published(axis)
        axis.set(xlabel="text tokens per vision token", title=name, ylim=(-0.02, 1.04))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.suptitle(f"{pages}. Small numbers: pages at a point. The paper does not define its "
                    "precision; Fox's script prints precision_official", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# -----------------------------------------------------------------------------
# HTML

STYLE = """
body { font: 14px sans-serif; margin: 2em }
table { border-collapse: collapse; margin: .5em 0; display: block; overflow-x: auto }
td, th { border: 1px solid #ccc; padding: 2px 8px }
summary { cursor: pointer; font-weight: bold; margin: .4em 0 }
.curve { max-width: 100% }
.page { display: flex; gap: 1em; padding: .7em 0 }
.page img { width: 300px; align-self: flex-start; image-rendering: pixelated }
.page pre { flex: 1; white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f7f7;
            padding: .5em; margin: 0 }
del { background: #fbb }
ins { background: #bdf }
del, ins { text-decoration: none }
.flag { background: #e33; color: #fff; margin-left: .5em; padding: 0 .3em }
.error { color: #b00 }
.verdict { font-size: 1.3em; font-weight: bold; margin: .4em 0; padding: .2em .5em;
           border-left: .4em solid }
.good { color: #070; background: #e8f6e8 }
.mixed { color: #850; background: #fdf3dc }
.bad { color: #b00; background: #fce8e8 }
.open { color: #444; background: #eee }
.bins { display: flex; align-items: flex-end; gap: 2px; height: 80px }
.bins div { width: 36px; background: #69c }
"""

BY_CHARACTER = 300  # longest text, in characters, whose differences are marked by character
# Else by word: here a character of Chinese or Japanese, or up to 20 others with the space behind.
WORD = re.compile("[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]"
                  r"|[^\s\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]{1,20}\s*|\s+")


def coloured(truth, prediction):
    """(truth, prediction) as HTML: what was missed as <del>, what stands in its place as <ins>."""
    # rapidfuzz and not difflib, which takes minutes over a page that repeats itself
    from rapidfuzz.distance import Levenshtein
    if max(len(truth), len(prediction)) <= BY_CHARACTER:
        old_pieces = list(truth)
        new_pieces = list(prediction)
    else:
        old_pieces = WORD.findall(truth)
        new_pieces = WORD.findall(prediction)

    left = ""
    right = ""
    opcodes = Levenshtein.opcodes(old_pieces, new_pieces)
    for kind, old_start, old_end, new_start, new_end in opcodes:
        old = html.escape("".join(old_pieces[old_start:old_end]))
        new = html.escape("".join(new_pieces[new_start:new_end]))
        if kind != "equal":
            old = f"<del>{old}</del>" if old else ""
            new = f"<ins>{new}</ins>" if new else ""
        left += old
        right += new
    return left, right


def data_uri(image):
    """A PIL image, reduced to at most 900 px a side, as a data URI."""
    image = image.convert("RGB")
    image.thumbnail((900, 900))
    kind = "PNG" if max(image.size) <= 200 else "JPEG"  # JPEG would blur the pixels of a tiny page
    data = io.BytesIO()
    image.save(data, kind, quality=75)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{encoded}"


def cell(value):
    """A value as text: three decimals, one from 100 on; an interval as low-high."""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
    if isinstance(value, (list, tuple)):
        return " to ".join(cell(part) for part in value)
    return str(value)


def table_line(tag, values):
    cells = [f"<{tag}>{html.escape(cell(value))}</{tag}>" for value in values]
    return f"<tr>{''.join(cells)}</tr>"


def html_table(rows):
    """Dicts -> <table>, its columns all their keys; nothing without rows."""
    if not rows:
        return ""
    keys = {}  # a dict, since it keeps the order
    for row in rows:
        keys.update(dict.fromkeys(row))
    lines = [table_line("th", keys)]
    for row in rows:
        lines.append(table_line("td", [row.get(key, "") for key in keys]))
    return f"<table>{''.join(lines)}</table>"


def folded(title, content):
    """A part that opens on a click, so that the first page is in sight above it all."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def page_html(row, task):
    """One page: its picture, the truth and what was read, with the differences marked."""
    truth, prediction = coloured(row["truth"] or "", row["prediction"])
    if row["failed"]:
        picture = f'<p class="error">{html.escape(row["error"])}</p>'
        confidence = ""
    else:
        image = task[row["index"]]["images"][0]
        picture = f'<img alt="page" src="{data_uri(image)}">'
        confidence = f", confidence {row['confidence']:.2f} nats/token"
    flags = "".join(f'<span class="flag">{flag}</span>' for flag in row["flags"])
    title = f"<b>{html.escape(row['id'])}</b>: 1-NED {row['one_minus_ned']:.3f}{confidence}{flags}"
    return (f'<hr>{title}<div class="page">{picture}<pre>{truth}</pre>'
            f"<pre>{prediction}</pre></div>")


def pages_of(figures):
    """"256 of 981": how many of its pages a figure of a task is about."""
    return f"{figures['samples']} of {figures['of']}"


def figure_table(tasks):
    """One line per task, from {name: figures}."""
    lines = []
    for name, figures in tasks.items():
        line = {"task": name, "pages": pages_of(figures), "failed": figures["failed"],
                "1-NED, 95 %": figures["ci95"]}
        for key in (*MEANS, "relaxed_accuracy", "repetition_rate"):
            if key in figures:
                line[key] = figures[key]
        lines.append(line)
    return html_table(lines)


def distribution_html(tasks):
    """Quantiles of the page scores, a histogram of them and the shares of faults, per task."""
    parts = []
    for name, figures in tasks.items():
        highest = max(figures["histogram"])
        bars = ""
        for i, count in enumerate(figures["histogram"]):
            height = round(100 * count / highest)
            label = f"1-NED {i / 10:.1f} to {(i + 1) / 10:.1f}: {count} pages"
            bars += f'<div title="{label}" style="height:{height}%"></div>'
        parts.append(f"<p>{html.escape(name)}, {pages_of(figures)} pages by 1-NED, 0 to 1 in steps "
                     f'of 0.1</p><div class="bins">{bars}</div>')
        parts.append(html_table([{"quantile of 1-NED": "", **figures["quantiles"]}]))
        parts.append(html_table([{"share of pages": "", **figures["shares"]}]))
    return "".join(parts)


def control_table(tasks):
    """One line per task and control."""
    lines = []
    for name, figures in tasks.items():
        for kind, control in figures["controls"].items():
            lines.append({"task": name, "control": kind, "what": CONTROLS[kind],
                          "pages": f"{control['samples']} of {figures['of']}", **control})
    return html_table(lines)


def breakdown_tables(tasks):
    """Every breakdown ("by_<attribute>", "relaxed_accuracy_by_<attribute>") of every task."""
    text = ""
    for name, figures in tasks.items():
        for key in figures:
            score, by, attribute = key.partition("by_")
            if not by or not isinstance(figures[key], dict):
                continue
            score = score.strip("_").replace("_", " ") or "1-NED"
            lines = []
            for value, (mean_score, pages, ci95) in figures[key].items():
                lines.append({attribute: value, score: mean_score, "95 %": ci95, "pages": pages})
            text += f"<p>{html.escape(name)}: {pages_of(figures)} pages</p>" + html_table(lines)
    return text


def against_html(figures):
    """The line that compares a task with the same task of another evaluation, if there is one."""
    if "against" not in figures:
        return ""
    return f"<p>{html.escape(against_line(figures['against']))}</p>"


def against_line(against):
    low, high = against["ci95"]
    return (f"against {against['out']}: 1-NED {against['difference']:+.3f} (95 % {low:+.3f} to "
            f"{high:+.3f}), paired on {against['pages']} of {against['of']} pages; better on "
            f"{against['better']}, worse on {against['worse']}")


def head_html(tasks, curves, png):
    """Everything above the pages: verdicts in sight, figures folded."""
    with open(png, "rb") as f:
        plot = base64.b64encode(f.read()).decode()
    picture = f"<img class='curve' alt='curve' src='data:image/png;base64,{plot}'>"
    tables = "".join(html_table(table) for table in curves)
    controls = control_table(tasks) or "<p>Not run (--controls).</p>"

    parts = []
    for name, figures in tasks.items():
        line = html.escape(f"{name}: {figures['verdict']}")
        parts.append(f"<p class='verdict {figures['grade']}'>{line}</p>")
        parts.append(f"<p>1-NED {figures['one_minus_ned']:.3f} ({cell(figures['ci95'])}) on "
                     f"{pages_of(figures)} pages</p>{against_html(figures)}")
    parts.append(folded("Figures", figure_table(tasks)))
    parts.append(folded("How the pages' scores are spread", distribution_html(tasks)))
    parts.append(folded("Controls", controls))
    parts.append(folded("Compression", picture + tables))
    parts.append(folded("By attribute", breakdown_tables(tasks)))
    return "".join(parts)


def write_html(path, title, summary, sections, curves, png, limit):
    """
    The report as one file without references to others.

    summary   {task name: its figures, ...}
    sections  [(task name, task, rows)]
    curves    tables of `curve`; png: path of its picture
    limit     pages shown per task, the worst
    """
    title = html.escape(title)
    tasks = {name: summary[name] for name, _, _ in sections}
    with open(path, "w", encoding="utf-8", errors="replace") as f:  # ids may be any file names
        f.write(f"<!DOCTYPE html><html><head><meta charset='utf-8'><title>{title}</title>"
                f"<style>{STYLE}</style></head><body><h1>{title}</h1>")
        f.write(head_html(tasks, curves, png))
        for name, task, rows in sections:
            worst_first = sorted(rows, key=lambda row: row["one_minus_ned"])
            shown = worst_first[:limit]
            f.write(f"<h2>{html.escape(name)}</h2>")
            f.write(f"<p>{len(shown)} of {len(rows)} pages, worst first: page, truth "
                    "(<del>missed</del>), reading (<ins>wrong</ins>)</p>")
            for row in shown:
                f.write(page_html(row, task))
        f.write("</body></html>")
