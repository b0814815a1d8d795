"""
What an evaluation's rows (dicts, one a page; scripts/vision_eval.py writes them) show: a verdict, breakdowns, the compression
curve beside DeepSeek-OCR's, and one self-contained HTML page.
"""
import base64
import difflib
import html
import io
import re
from collections import Counter, defaultdict

import numpy as np

from nanochat.metrics import MEANS, bootstrap_ci, one_minus_ned

# DeepSeek-OCR on 100 English pages of Fox, paper table 2: (text tokens per vision token, precision)
PUBLISHED = {
    "DeepSeek-OCR, 64 tokens": [(10.5, .965), (11.8, .938), (13.2, .838), (15.1, .859), (16.5, .793), (17.7, .764), (19.7, .591)],
    "DeepSeek-OCR, 100 tokens": [(6.7, .985), (7.5, .973), (8.5, .968), (9.7, .968), (10.6, .915), (11.3, .898), (12.6, .871)]}
CONTROLS = {"blank": "a white page in its place", "another": "another page's picture in its place",
            "random_chars": "its words replaced by random letters, truth too", "shuffled": "its words in random order, truth too"}


def mean(rows, key):
    return float(np.mean([row[key] for row in rows]))


# -----------------------------------------------------------------------------
# Verdict


def nearest_other(rows):
    """
    For each row 1-NED of its prediction to the truth, of all other rows' truths, that shares most words with it. Truths under 6
    characters are left out: a wrong "yes" is not another page's answer.
    """
    pages_with, scores = defaultdict(set), []
    for i, row in enumerate(rows):
        for word in set(row["truth"].split()) if len(row["truth"]) >= 6 else ():
            pages_with[word].add(i)
    for row in rows:
        shared = Counter(i for word in set(row["prediction"].split()) for i in pages_with[word] if rows[i]["truth"] != row["truth"])
        scores.append(max((one_minus_ned(row["prediction"], rows[i]["truth"]) for i, _ in shared.most_common(3)), default=0.0))
    return scores


def verdict(rows, controls):
    """
    One line on what the model does, from a task's rows and its controls' rows {name: rows}. The first that holds, of: every page
    failed; same text for every page; loops; reads another page; reads (better with its own page than with another's by 0.1 1-NED
    or more, paired); ignores the page. Without controls the last two cannot be told apart.
    """
    good = [row for row in rows if not row["failed"]]
    if not good:
        return f"every page failed: {rows[0]['error']}"
    text, same = Counter(row["prediction"] for row in good).most_common(1)[0]
    if same > len(good) / 2 and len({row["truth"] for row in good}) > 1:
        return f"same text for every page: {text[:40]!r} on {same} of {len(good)}"
    if (loops := sum(row["repetition"] for row in good)) > len(good) / 2:
        return f"loops: on {loops} of {len(good)} pages"
    own, other = mean(good, "one_minus_ned"), float(np.mean(nearest_other(good)))
    if other > own + 0.2:
        return f"reads another page: 1-NED {other:.3f} to another page's truth, {own:.3f} to its own"
    if not controls.get("another"):
        return f"1-NED {own:.3f}; whether the page is read, controls would tell (--controls)"
    without = {row["index"]: row["one_minus_ned"] for row in controls["another"]}
    gains = [row["one_minus_ned"] - without[row["index"]] for row in rows if row["index"] in without]
    gain, low = float(np.mean(gains)), bootstrap_ci(gains)[0]
    return f"{'reads' if gain >= 0.1 and low > 0 else 'ignores the page'}: 1-NED {gain:+.3f} with its own page against another in its place"


# -----------------------------------------------------------------------------
# Breakdowns and the compression curve


def breakdown(rows, key):
    """
    {value of attribute `key`: [mean 1-NED, pages, its 95 % interval]} over the pages that have it, {} if they all have the same. A page
    with several values counts in each.
    """
    groups = defaultdict(list)
    for row in rows:
        values = row["attributes"].get(key)
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            groups[str(value)].append(row["one_minus_ned"])
    in_order = sorted(groups, key=lambda value: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", value)])
    return {value: [round(float(np.mean(scores)), 3), len(scores), [round(v, 3) for v in bootstrap_ci(scores)]]
            for value in in_order for scores in [groups[value]]} if len(groups) > 1 else {}


def step_of(values):
    """Width of buckets, a round number, so that `values` (not negative) fall into about eight of them at most."""
    span = max(max(values) - min(values), max(values) / 8)
    return next(w for e in range(-3, 9) for w in (10 ** e, 2 * 10 ** e, 5 * 10 ** e) if span <= 8 * w)


def curve(rows, key="text_tokens"):
    """
    The paper's table: rows by task (its ranges of --chars together), mode and bucket of `key` (text_tokens or tokens_per_vision_token).
    Vision tokens are counted as in the paper and as positions in the decoder. Pages that failed to load have no length and no bucket.
    """
    known = [{**r, "tokens_per_vision_token": r["text_tokens"] / r["vision_tokens"],
              "tokens_per_position": r["text_tokens"] / r["positions"]} for r in rows if r["vision_tokens"]]
    groups, width = defaultdict(list), step_of([r[key] for r in known] or [1])
    for r in known:
        groups[re.sub(r"_\d+-\d+$", "", r["task"]), r["mode"], int(r[key] // width)].append(r)
    return [{"task": task, "mode": mode, "bucket": f"{n * width:g}-{(n + 1) * width:g}", "pages": len(group),
             **{k: round(mean(group, k), 4) for k in ("text_tokens", "vision_tokens", "positions", "tokens_per_vision_token",
                                                      "tokens_per_position", "precision", "precision_official", "one_minus_ned")},
             "ci95": [round(v, 4) for v in bootstrap_ci([r["one_minus_ned"] for r in group])]}
            for (task, mode, n), group in sorted(groups.items())]


def plot_curve(path, table):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for axis, name in zip(axes, ("precision_official", "one_minus_ned")):
        for task, mode in dict.fromkeys((row["task"], row["mode"]) for row in table):
            group = [row for row in table if (row["task"], row["mode"]) == (task, mode)]
            x, y = [r["tokens_per_vision_token"] for r in group], [r[name] for r in group]
            line, = axis.plot(x, y, "o-", label=f"{task}, {mode}, {group[0]['vision_tokens']:g} tokens")
            if name == "one_minus_ned":
                axis.fill_between(x, *zip(*(r["ci95"] for r in group)), color=line.get_color(), alpha=0.15)
            for r, *point in zip(group, x, y):
                axis.annotate(str(r["pages"]), point, textcoords="offset points", xytext=(3, 4), fontsize=7)
        for label, points in PUBLISHED.items() if name == "precision_official" else ():
            axis.plot(*zip(*points), "s--", color="0.6" if "64" in label else "0.3", markersize=4, label=f"{label} (their tokenizer)")
        axis.set(xlabel="text tokens per vision token", title=name, ylim=(-0.02, 1.04))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.suptitle("Small numbers: pages. The paper does not define its precision; Fox's script prints precision_official", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# -----------------------------------------------------------------------------
# HTML

STYLE = """body{font:14px sans-serif;margin:2em} table{border-collapse:collapse;margin:.5em 0} td,th{border:1px solid #ccc;padding:2px 8px}
.page{display:flex;gap:1em;padding:.7em 0} .page img{width:300px;align-self:flex-start;image-rendering:pixelated} .page pre{flex:1;
white-space:pre-wrap;overflow-wrap:anywhere;background:#f7f7f7;padding:.5em;margin:0} del{background:#fbb} ins{background:#bdf}
del,ins{text-decoration:none} .flag{background:#e33;color:#fff;margin-left:.5em} .verdict{font-size:1.3em;font-weight:bold}"""


def coloured(truth, prediction):
    """(truth, prediction) as HTML: what was missed as <del>, what was put in its place as <ins>. By character where short, else by word."""
    cut = list if max(len(truth), len(prediction)) <= 300 else re.compile(r"\S+\s*|\s+").findall
    a, b, left, right = cut(truth), cut(prediction), "", ""
    for kind, a1, a2, b1, b2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        old, new = html.escape("".join(a[a1:a2])), html.escape("".join(b[b1:b2]))
        left += old if kind == "equal" or not old else f"<del>{old}</del>"
        right += new if kind == "equal" or not new else f"<ins>{new}</ins>"
    return left, right


def data_uri(image):
    """A PIL image, at most 900 px on a side, as a data URI."""
    image, data = image.convert("RGB"), io.BytesIO()
    image.thumbnail((900, 900))
    kind = "PNG" if max(image.size) <= 200 else "JPEG"
    image.save(data, kind, quality=75)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def html_table(rows):
    """Dicts with the same keys -> <table>."""
    def line(tag, values):
        values = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
        return "<tr>" + "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values) + "</tr>"
    return "<table>" + line("th", rows[0]) + "".join(line("td", row.values()) for row in rows) + "</table>" if rows else ""


def page_html(row, task):
    left, right = coloured(row["truth"] or "", row["prediction"])
    picture = "" if row["failed"] else f'<img alt="page" src="{data_uri(task[row["index"]]["images"][0])}">'
    flags = "".join(f'<span class="flag">{flag}</span>' for flag in row["flags"])
    confidence = "" if row["failed"] else f", confidence {row['confidence']:.2f} nats/token"
    return (f'<hr><b>{html.escape(row["id"])}</b>: 1-NED {row["one_minus_ned"]:.3f}{confidence}{flags}'
            f'<div class="page">{picture}<pre>{left}</pre><pre>{right}</pre></div>')


def write_html(path, title, summary, sections, curves, png, limit):
    """sections: [(name, task, rows)]; summary: {name: figures}; curves: tables of `curve`; png: its picture; limit: pages a task."""
    names, title = [name for name, _, _ in sections], html.escape(title)
    controls = [{"task": name, "control": kind, "what": CONTROLS[kind], **v}
                for name in names for kind, v in summary[name]["controls"].items()]
    with open(png, "rb") as f:
        picture = base64.b64encode(f.read()).decode()
    with open(path, "w", encoding="utf-8") as f:
        f.write(f"<!DOCTYPE html><html><head><meta charset='utf-8'><title>{title}</title><style>{STYLE}</style></head><body>")
        f.write(f"<h1>{title}</h1>")
        f.write("".join(f"<p class='verdict'>{html.escape(name)}: {html.escape(summary[name]['verdict'])}</p>" for name in names))
        keys = ("task", "samples", "failed", *MEANS, "repetition_rate", "ci95")
        f.write(html_table([{k: summary[name][k] for k in keys} for name in names]))
        f.write("<h2>Controls</h2>" + (html_table(controls) or "<p>Not run (--controls).</p>"))
        f.write(f"<h2>Compression</h2><img alt='curve' src='data:image/png;base64,{picture}'>" + "".join(map(html_table, curves)))
        for name, task, rows in sections:
            f.write(f"<h2>{html.escape(name)}</h2>")
            for key in (key for key in summary[name] if key.startswith("by_")):
                f.write(html_table([{key: value, "1-NED": score, "95 %": "{}-{}".format(*ci95), "pages": n} for value, (score, n, ci95) in summary[name][key].items()]))
            shown = sorted(rows, key=lambda row: row["one_minus_ned"])[:limit]
            f.write(f"<p>{len(shown)} of {len(rows)} pages, worst first: page, truth (<del>missed</del>), reading (<ins>wrong</ins>)</p>")
            f.writelines(page_html(row, task) for row in shown)
        f.write("</body></html>")
