"""
What the rows of an evaluation show (dicts, one per page, as nanochat/evaluation.py makes them):
breakdowns by attribute, the compression curve beside DeepSeek-OCR's, and one self-contained HTML
page to look at.
"""
import base64
import difflib
import html
import io
import re
from collections import defaultdict

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


def breakdown(rows, key):
    """
    {value of the attribute `key`: [mean 1-NED, pages, its 95 % interval]} over the pages that have
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
            groups[str(value)].append(row["one_minus_ned"])
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


def curve(rows, key="text_tokens"):
    """
    The paper's table, as a list of dicts: rows by task (all ranges of --chars of one task
    together), mode and bucket of `key`, which is text_tokens or tokens_per_vision_token. Vision
    tokens are counted as in the paper, and as positions in the decoder. Pages that failed to load
    have no number of tokens and so no bucket.
    """
    known = []
    for row in rows:
        if row["vision_tokens"]:
            ratios = {"tokens_per_vision_token": row["text_tokens"] / row["vision_tokens"],
                      "tokens_per_position": row["text_tokens"] / row["positions"]}
            known.append({**row, **ratios})
    if not known:
        return []

    width = step_of([row[key] for row in known])
    groups = defaultdict(list)
    for row in known:
        task = re.sub(r"_\d+-\d+$", "", row["task"])  # heldout_14-20 -> heldout
        bucket = int(row[key] // width)
        groups[task, row["mode"], bucket].append(row)

    table = []
    for (task, mode, bucket), group in sorted(groups.items()):
        line = {"task": task, "mode": mode,
                "bucket": f"{bucket * width:g}-{(bucket + 1) * width:g}", "pages": len(group)}
        for name in CURVE_MEANS:
            line[name] = round(mean(group, name), 4)
        low, high = bootstrap_ci([row["one_minus_ned"] for row in group])
        line["ci95"] = [round(low, 4), round(high, 4)]
        table.append(line)
    return table


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


def plot_curve(path, table):
    """Draws a table of `curve` as a PNG: precision beside the published one, and 1-NED."""
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
    figure.suptitle("Small numbers: pages. The paper does not define its precision; Fox's script "
                    "prints precision_official", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# -----------------------------------------------------------------------------
# HTML

STYLE = """
body { font: 14px sans-serif; margin: 2em }
table { border-collapse: collapse; margin: .5em 0 }
td, th { border: 1px solid #ccc; padding: 2px 8px }
.page { display: flex; gap: 1em; padding: .7em 0 }
.page img { width: 300px; align-self: flex-start; image-rendering: pixelated }
.page pre { flex: 1; white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f7f7;
            padding: .5em; margin: 0 }
del { background: #fbb }
ins { background: #bdf }
del, ins { text-decoration: none }
.flag { background: #e33; color: #fff; margin-left: .5em }
.verdict { font-size: 1.3em; font-weight: bold }
"""


def coloured(truth, prediction):
    """
    (truth, prediction) as HTML: what was missed as <del>, what stands in its place as <ins>. Texts
    up to 300 characters are compared by character, longer ones by word.
    """
    if max(len(truth), len(prediction)) <= 300:
        old_pieces = list(truth)
        new_pieces = list(prediction)
    else:
        word = re.compile(r"\S+\s*|\s+")
        old_pieces = word.findall(truth)
        new_pieces = word.findall(prediction)

    left = ""
    right = ""
    matcher = difflib.SequenceMatcher(None, old_pieces, new_pieces, autojunk=False)
    for kind, old_start, old_end, new_start, new_end in matcher.get_opcodes():
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


def table_line(tag, values):
    cells = ""
    for value in values:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        cells += f"<{tag}>{html.escape(text)}</{tag}>"
    return f"<tr>{cells}</tr>"


def html_table(rows):
    """Dicts with the same keys -> <table>; nothing without rows."""
    if not rows:
        return ""
    lines = [table_line("th", rows[0])]
    for row in rows:
        lines.append(table_line("td", row.values()))
    return f"<table>{''.join(lines)}</table>"


def page_html(row, task):
    """One page: its picture, the truth and what was read, with the differences marked."""
    truth, prediction = coloured(row["truth"] or "", row["prediction"])
    picture = ""
    confidence = ""
    if not row["failed"]:
        image = task[row["index"]]["images"][0]
        picture = f'<img alt="page" src="{data_uri(image)}">'
        confidence = f", confidence {row['confidence']:.2f} nats/token"
    flags = "".join(f'<span class="flag">{flag}</span>' for flag in row["flags"])
    title = f"<b>{html.escape(row['id'])}</b>: 1-NED {row['one_minus_ned']:.3f}{confidence}{flags}"
    return (f'<hr>{title}<div class="page">{picture}<pre>{truth}</pre>'
            f"<pre>{prediction}</pre></div>")


def control_table(names, summary):
    """One line per task and control."""
    lines = []
    for name in names:
        for kind, figures in summary[name]["controls"].items():
            lines.append({"task": name, "control": kind, "what": CONTROLS[kind], **figures})
    return lines


def breakdown_tables(figures):
    """HTML of every breakdown ("by_<attribute>") of one task."""
    text = ""
    for key in figures:
        if not key.startswith("by_"):
            continue
        lines = []
        for value, (score, pages, (low, high)) in figures[key].items():
            lines.append({key: value, "1-NED": score, "95 %": f"{low}-{high}", "pages": pages})
        text += html_table(lines)
    return text


def head_html(title, summary, names, curves, png):
    """Everything above the pages: verdicts, figures, controls, compression curve."""
    with open(png, "rb") as f:
        plot = base64.b64encode(f.read()).decode()
    keys = ("task", "samples", "failed", *MEANS, "repetition_rate", "ci95")
    figures = [{key: summary[name][key] for key in keys} for name in names]

    parts = [f"<h1>{title}</h1>"]
    for name in names:
        line = html.escape(f"{name}: {summary[name]['verdict']}")
        parts.append(f"<p class='verdict'>{line}</p>")
    parts.append(html_table(figures))
    parts.append("<h2>Controls</h2>")
    parts.append(html_table(control_table(names, summary)) or "<p>Not run (--controls).</p>")
    parts.append(f"<h2>Compression</h2><img alt='curve' src='data:image/png;base64,{plot}'>")
    parts.extend(html_table(table) for table in curves)
    return "".join(parts)


def write_html(path, title, summary, sections, curves, png, limit):
    """
    The report as one file without references to others.

    summary   {task name: its figures}
    sections  [(task name, task, rows)]
    curves    tables of `curve`; png: path of its picture
    limit     pages shown per task, the worst
    """
    title = html.escape(title)
    names = [name for name, _, _ in sections]
    with open(path, "w", encoding="utf-8") as f:
        f.write(f"<!DOCTYPE html><html><head><meta charset='utf-8'><title>{title}</title>"
                f"<style>{STYLE}</style></head><body>")
        f.write(head_html(title, summary, names, curves, png))
        for name, task, rows in sections:
            worst_first = sorted(rows, key=lambda row: row["one_minus_ned"])
            shown = worst_first[:limit]
            f.write(f"<h2>{html.escape(name)}</h2>")
            f.write(breakdown_tables(summary[name]))
            f.write(f"<p>{len(shown)} of {len(rows)} pages, worst first: page, truth "
                    "(<del>missed</del>), reading (<ins>wrong</ins>)</p>")
            for row in shown:
                f.write(page_html(row, task))
        f.write("</body></html>")
