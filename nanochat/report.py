"""
The figures of an evaluation (nanochat/figures.py) to look at: the compression curve beside
DeepSeek-OCR's, and one self-contained HTML page, verdicts and pages in sight, tables folded.
"""
import base64
import html
import io
import re
from collections import defaultdict

from nanochat.figures import breakdowns_in, pages_of
from nanochat.metrics import MEANS
from nanochat.verdict import CONTROLS

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
# The curve


def plot_line(axis, group, figure):
    """One task and mode: `figure` over compression, with the number of pages at each point."""
    x = [point["tokens_per_vision_token"] for point in group]
    y = [point[figure] for point in group]
    first = group[0]
    label = f"{first['task']}, {first['mode']}, {first['vision_tokens']:g} tokens"
    [line] = axis.plot(x, y, "o-", label=label)
    if figure == "one_minus_ned":  # the figure that the intervals belong to
        low = [point["ci95"][0] for point in group]
        high = [point["ci95"][1] for point in group]
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15)
    # A point of 3 pages must not look like one of 300.
    for point, at in zip(group, zip(x, y)):
        axis.annotate(str(point["pages"]), at, textcoords="offset points", xytext=(3, 4),
                      fontsize=7)


def plot_published(axis):
    """DeepSeek-OCR's own points, in gray."""
    for label, points in PUBLISHED.items():
        x = [ratio for ratio, _ in points]
        y = [precision for _, precision in points]
        gray = "0.6" if "64" in label else "0.3"
        axis.plot(x, y, "s--", color=gray, markersize=4, label=f"{label} (their tokenizer)")


def plot_curve(path, table, pages):
    """
    Draws a table of figures.curve as a PNG: precision beside the published one, and 1-NED. pages:
    a note on how many of the pages were read.
    """
    import matplotlib
    matplotlib.use("Agg")  # no window system is needed
    import matplotlib.pyplot as plt

    lines = defaultdict(list)  # (task, mode) -> its points, which are in order of length
    for point in table:
        lines[point["task"], point["mode"]].append(point)

    # Two panels: the paper's figure, and ours, which sees order and loops.
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for axis, name in zip(axes, ("precision_official", "one_minus_ned")):
        for group in lines.values():
            plot_line(axis, group, name)
        if name == "precision_official":
            plot_published(axis)
        axis.set(xlabel="text tokens per vision token", title=name, ylim=(-0.02, 1.04))
        axis.grid(alpha=0.3)
        if axis.lines:  # matplotlib warns about an empty legend
            axis.legend(fontsize=7)
    figure.suptitle(f"{pages}. Small numbers: pages at a point. The paper does not define its "
                    "precision; Fox's script prints precision_official", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)  # matplotlib keeps every figure otherwise


# -----------------------------------------------------------------------------
# Differences

BY_CHARACTER = 300  # longest text, in characters, whose differences are marked by character

# In longer texts they are marked by word: here one character of Chinese or Japanese, which have no
# spaces, or up to 20 other characters with the space behind them.
EAST_ASIAN = "\u3000-\u30ff\u3400-\u9fff\uff00-\uffef"
WORD = re.compile(rf"[{EAST_ASIAN}]|[^\s{EAST_ASIAN}]{{1,20}}\s*|\s+")


def marked(tag, text):
    return f"<{tag}>{text}</{tag}>" if text else ""


def differences(truth, prediction, by_character=BY_CHARACTER):
    """
    [(kept, missed, wrong), ...]: what both texts have, or what one has in place of the other.
    by_character: longest text, in characters, that is compared by character and not by word.
    """
    # Not difflib: it takes half a minute over a page that repeats itself.
    from rapidfuzz.distance import Levenshtein
    if max(len(truth), len(prediction)) <= by_character:
        old_pieces = list(truth)
        new_pieces = list(prediction)
    else:  # by character, two long texts that differ look like confetti
        old_pieces = WORD.findall(truth)
        new_pieces = WORD.findall(prediction)

    found = []
    opcodes = Levenshtein.opcodes(old_pieces, new_pieces)
    for kind, old_start, old_end, new_start, new_end in opcodes:
        old = "".join(old_pieces[old_start:old_end])
        new = "".join(new_pieces[new_start:new_end])
        found.append((old, "", "") if kind == "equal" else ("", old, new))
    return found


def colored(truth, prediction):
    """(truth, prediction) as HTML: what was missed as <del>, what stands in its place as <ins>."""
    left = ""
    right = ""
    for kept, missed, wrong in differences(truth, prediction):
        left += html.escape(kept) + marked("del", html.escape(missed))
        right += html.escape(kept) + marked("ins", html.escape(wrong))
    return left, right


# -----------------------------------------------------------------------------
# Pieces of HTML

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


def encoded(data):
    return base64.b64encode(data).decode()


def data_uri(image):
    """A PIL image, reduced to at most 900 px a side, as a data URI."""
    image = image.convert("RGB")
    image.thumbnail((900, 900))  # enough to read a page; 256 scans would make a file of 1 GB
    kind = "PNG" if max(image.size) <= 200 else "JPEG"  # JPEG would blur the pixels of a tiny page
    data = io.BytesIO()
    image.save(data, kind, quality=75)
    return f"data:image/{kind.lower()};base64,{encoded(data.getvalue())}"


def cell(value):
    """A value as text: three decimals, one from 100 on; an interval as "low to high"."""
    if isinstance(value, float):
        # Lengths and rates are 100 and more, and their decimals mean nothing.
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
    if isinstance(value, (list, tuple)):
        return " to ".join(cell(part) for part in value)
    return str(value)


def table_line(tag, values):
    cells = ""
    for value in values:
        text = html.escape(cell(value))
        cells += marked(tag, text or " ")  # an empty cell must stay, or the row would shift
    return marked("tr", cells)


def html_table(rows):
    """Dicts -> <table>, its columns all their keys; nothing without rows."""
    if not rows:
        return ""
    keys = {}  # a dict, since it keeps the order; not every task has every figure
    for row in rows:
        keys.update(row)
    lines = [table_line("th", keys)]
    for row in rows:
        lines.append(table_line("td", [row.get(key, "") for key in keys]))
    return marked("table", "".join(lines))


def folded(title, content):
    """A part that opens on a click: whatever is long must not push the first page out of sight."""
    return f"<details><summary>{title}</summary>{content}</details>"


# -----------------------------------------------------------------------------
# Parts of the report. tasks: {name: figures}


def against_line(against):
    """The comparison with another evaluation (verdict.compare), as one line."""
    low, high = against["ci95"]
    difference = f"1-NED {against['difference']:+.3f} (95 % {low:+.3f} to {high:+.3f})"
    pages = f"paired on {against['pages']} of {against['of']} pages"
    counts = f"better on {against['better']}, worse on {against['worse']}"
    return f"against {against['out']}: {difference}, {pages}; {counts}"


def verdict_html(name, figures):
    """A task's verdict in the color of its grade; below it the headline number."""
    verdict = html.escape(f"{name}: {figures['verdict']}")
    score = f"1-NED {figures['one_minus_ned']:.3f} ({cell(figures['ci95'])})"
    parts = [f"<p class='verdict {figures['grade']}'>{verdict}</p>",
             f"<p>{score} on {pages_of(figures)} pages</p>"]
    if "against" in figures:
        parts.append(marked("p", html.escape(against_line(figures["against"]))))
    return "".join(parts)


def figure_table(tasks):
    """One line per task."""
    lines = []
    for name, figures in tasks.items():
        line = {"task": name, "pages": pages_of(figures), "failed": figures["failed"],
                "1-NED, 95 %": figures["ci95"]}
        for key in (*MEANS, "relaxed_accuracy", "repetition_rate"):
            if key in figures:
                line[key] = figures[key]
        lines.append(line)
    return html_table(lines)


def histogram_html(counts):
    """Ten bars, from pages that were not read at all to perfect ones."""
    bars = ""
    for i, count in enumerate(counts):
        low = i / 10
        label = f"1-NED {low:.1f} to {low + 0.1:.1f}: {count} pages"
        height = round(100 * count / max(counts))  # %; there is at least one page
        bars += f'<div title="{label}" style="height:{height}%"></div>'
    return f'<div class="bins">{bars}</div>'


def distribution_html(tasks):
    """Histogram and quantiles of the page scores, and the shares of faults."""
    parts = []
    for name, figures in tasks.items():
        title = f"{html.escape(name)}, {pages_of(figures)} pages by 1-NED, 0 to 1 in steps of 0.1"
        parts.append(marked("p", title))
        parts.append(histogram_html(figures["histogram"]))
        parts.append(html_table([{"quantile of 1-NED": "", **figures["quantiles"]}]))
        parts.append(html_table([{"share of pages": "", **figures["shares"]}]))
    return "".join(parts)


def control_table(tasks):
    """One line per task and control."""
    lines = []
    for name, figures in tasks.items():
        for kind, control in figures["controls"].items():
            pages = f"{control['samples']} of {figures['of']}"
            lines.append({"task": name, "control": kind, "what": CONTROLS[kind], "pages": pages,
                          **control})
    return html_table(lines) or marked("p", "Not run (--controls).")


def breakdown_tables(tasks):
    """Every breakdown of every task."""
    text = ""
    for name, figures in tasks.items():
        title = f"{html.escape(name)}: {pages_of(figures)} pages"
        for score, attribute, groups in breakdowns_in(figures):
            lines = []
            for value, (mean_score, pages, ci95) in groups.items():
                lines.append({attribute: value, score: mean_score, "95 %": ci95, "pages": pages})
            text += marked("p", title)
            text += html_table(lines)
    return text


def curve_html(curves, png):
    """The picture of the curve, and its tables."""
    with open(png, "rb") as f:  # inside the page, so that it can be sent as one file
        plot = encoded(f.read())
    picture = f"<img class='curve' alt='curve' src='data:image/png;base64,{plot}'>"
    return picture + "".join(html_table(table) for table in curves)


def page_html(row, task):
    """One page: its picture, the truth and what was read, with the differences marked."""
    truth, prediction = colored(row["truth"] or "", row["prediction"])
    if row["failed"]:  # often because the picture cannot be opened
        picture = f'<p class="error">{html.escape(row["error"])}</p>'
        confidence = ""
    else:
        image = task[row["index"]]["images"][0]
        picture = f'<img alt="page" src="{data_uri(image)}">'
        confidence = f", confidence {row['confidence']:.2f} nats/token"
    name = marked("b", html.escape(row["id"]))
    flags = "".join(f'<span class="flag">{flag}</span>' for flag in row["flags"])
    title = f"{name}: 1-NED {row['one_minus_ned']:.3f}{confidence}{flags}"
    return (f'<hr>{title}<div class="page">{picture}<pre>{truth}</pre>'
            f"<pre>{prediction}</pre></div>")


# -----------------------------------------------------------------------------
# The report


def write_html(path, title, summary, sections, curves, png, limit):
    """
    The report as one file without references to others.

    summary   {task name: its figures, ...}
    sections  [(task name, task, rows)]
    curves    tables of figures.curve; png: path of its picture
    limit     pages shown per task, the worst
    """
    title = html.escape(title)
    tasks = {name: summary[name] for name, _, _ in sections}
    with open(path, "w", encoding="utf-8", errors="replace") as f:  # ids may be any file names
        f.write(f"<!DOCTYPE html><html><head><meta charset='utf-8'><title>{title}</title>"
                f"<style>{STYLE}</style></head><body><h1>{title}</h1>")
        for name, figures in tasks.items():
            f.write(verdict_html(name, figures))
        # Numbers on request: the pages below tell more, and are to be seen at once.
        f.write(folded("Figures", figure_table(tasks)))
        f.write(folded("How the pages' scores are spread", distribution_html(tasks)))
        f.write(folded("Controls", control_table(tasks)))
        f.write(folded("Compression", curve_html(curves, png)))
        f.write(folded("By attribute", breakdown_tables(tasks)))

        for name, task, rows in sections:
            worst_first = sorted(rows, key=lambda row: row["one_minus_ned"])
            shown = worst_first[:limit]
            f.write(marked("h2", html.escape(name)))
            f.write(f"<p>{len(shown)} of {len(rows)} pages, worst first: page, truth "
                    "(<del>missed</del>), reading (<ins>wrong</ins>)</p>")
            # One at a time: the pictures of all pages together may not fit in memory.
            for row in shown:
                f.write(page_html(row, task))
        f.write("</body></html>")
