"""
Reads the pages of a task with a trained model and scores them: one row (a dict) per page, kept in
a JSON-lines file that a stopped evaluation continues from, and the figures of all rows together.
"""
import glob
import json
import os
import time

from PIL import ImageOps
from tqdm import tqdm

from nanochat.common import barrier, dist_info
from nanochat.image_modes import valid_tokens
from nanochat.metrics import FAILED, relaxed_accuracy, score_page, summarize
from nanochat.report import breakdown, step_of
from nanochat.verdict import mean, verdict

WINDOW = 4  # batches' worth of pages that are loaded and sorted by length before they are batched

# Figures that are printed, and kept for controls.
FIGURES = ("one_minus_ned", "ned", "cer", "f1", "precision", "precision_official",
           "repetition_rate", "relaxed_accuracy")
# Keys that a page's conversation may have and that become attributes of its row.
PAGE_KEYS = ("face", "size_px", "bucket", "columns")


# -----------------------------------------------------------------------------
# Until every task says these itself, as nanochat.conversation.Task does: delete this section then.


def answer_metric(name, task):
    if hasattr(task, "answer_metric"):
        return task.answer_metric
    return "relaxed_accuracy" if name in ("chartqa-test", "synthchart") else None


def truth(task, i):
    if hasattr(task, "truth"):
        return task.truth(i)
    return task.truths[i] if hasattr(task, "truths") else None


def image_name(task, i):
    if hasattr(task, "image_name"):
        return task.image_name(i)
    return task.image_names[i] if hasattr(task, "image_names") else None


# -----------------------------------------------------------------------------
# Rows


def truth_of(conversation):
    return conversation["messages"][-1]["content"]


def describe_page(engine, name, task, i, conversation):
    """The part of page i's row that does not depend on what was read from it."""
    row = {"index": i, "id": conversation["id"], "task": name, "truth": truth_of(conversation)}
    plans = engine.plans(conversation)
    row["vision_tokens"] = sum(plan.tokens for plan in plans)
    row["positions"] = sum(plan.positions for plan in plans)
    row["valid_tokens"] = 0  # vision tokens that are not of padding
    modes = {}  # a dict, since it keeps the order
    for plan, image in zip(plans, conversation["images"]):
        width, height = ImageOps.exif_transpose(image).size
        row["valid_tokens"] += valid_tokens(plan, width, height)
        modes[plan.mode.name] = True
    row["mode"] = "+".join(modes)

    attributes = {key: conversation[key] for key in PAGE_KEYS if key in conversation}
    row["attributes"] = {**attributes, **conversation.get("attributes", {}), "mode": row["mode"]}
    return row


def describe_missing(name, task, i):
    """The same of a page whose picture could not be loaded."""
    return {"index": i, "id": f"{name}/{i}", "task": name, "truth": truth(task, i),
            "vision_tokens": 0, "positions": 0, "valid_tokens": 0, "mode": "", "attributes": {}}


def page_row(engine, name, task, i, conversation, result, by_character):
    """
    The row of page i. conversation: None if it could not be loaded; result: an engine.Result, or
    the error by which the page failed. A failed page counts as wrong.
    """
    if conversation is None:
        row = describe_missing(name, task, i)
    else:
        row = describe_page(engine, name, task, i, conversation)
    true_text = row["truth"] or ""
    row["text_tokens"] = len(engine.tokenizer.encode(true_text))
    if image_name(task, i):
        row["image_name"] = image_name(task, i)

    row["failed"] = isinstance(result, Exception)
    if row["failed"]:
        row.update(FAILED, prediction="", error=str(result), flags=["failed"], tokens=0,
                   truth_chars=len(true_text))
        return row
    row.update(prediction=result.text, finished=result.finished, confidence=result.confidence,
               flags=result.flags, tokens=result.tokens)
    row.update(score_page(result.text, true_text, by_character=by_character))
    if answer_metric(name, task) == "relaxed_accuracy":
        row["relaxed_accuracy"] = relaxed_accuracy(result.text, true_text)
    return row


def to_line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(path):
    """{page index: row} of a JSON-lines file; a last line cut short by a kill is left out."""
    rows = {}
    with open(path, encoding="utf-8") as f:
        for line in f:
            if line.endswith("\n"):
                row = json.loads(line)
                rows[row["index"]] = row
    return rows


def merge_parts(path):
    """Merges what the ranks of this run and of earlier ones wrote beside `path` into it."""
    parts = sorted(glob.glob(glob.escape(path) + ".rank*"))
    rows = read_rows(path) if os.path.exists(path) else {}
    for part in parts:
        rows.update(read_rows(part))
    # A new file, then a rename: a kill in between loses nothing.
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        for i in sorted(rows):
            f.write(to_line(rows[i]))
    os.replace(path + ".tmp", path)
    for part in parts:
        os.remove(part)


def gather_rows(path):
    """{page index: row} of all ranks so far, on every rank."""
    barrier()
    if dist_info()[0] == 0:
        merge_parts(path)
    barrier()
    return read_rows(path)


# -----------------------------------------------------------------------------
# Reading


def load_pages(task, indices):
    """-> ([(index, conversation), ...], [(index, error), ...] of those that cannot be loaded)."""
    loaded = []
    broken = []
    for i in indices:
        try:
            loaded.append((i, task[i]))
        except (OSError, ValueError) as error:
            broken.append((i, error))
    return loaded, broken


def read_pages(engine, task, indices, batch_size, max_new_tokens):
    """
    Yields [(index, conversation or None, Result or error), ...] batch by batch, until every page
    of `indices` has had its turn.
    """
    window = WINDOW * batch_size
    for first in range(0, len(indices), window):
        loaded, broken = load_pages(task, indices[first:first + window])
        if broken:
            yield [(i, None, error) for i, error in broken]

        # Rows of similar length end at about the same time, so none waits long for its batch.
        loaded.sort(key=lambda page: len(truth_of(page[1])))
        for start in range(0, len(loaded), batch_size):
            batch = loaded[start:start + batch_size]
            conversations = [conversation for _, conversation in batch]
            results = engine.generate_each(conversations, max_new_tokens)
            yield [(i, c, result) for (i, c), result in zip(batch, results)]


def evaluate(engine, name, task, pages, args, out, by_character):
    """
    Rows of the pages 0 to `pages` - 1, in order. Every rank reads its share of those that
    <out>/<name>.jsonl lacks, and appends to a file of its own batch by batch.
    """
    rank, _, world = dist_info()
    path = os.path.join(out, f"{name}.jsonl")
    done = gather_rows(path)
    missing = [i for i in range(pages) if i not in done]
    mine = missing[rank::world]

    progress = tqdm(total=len(mine), unit="page", desc=name, disable=rank != 0)
    with open(f"{path}.rank{rank}", "a", encoding="utf-8") as f, progress:
        start = time.perf_counter()
        for batch in read_pages(engine, task, mine, args.batch_size, args.max_new_tokens):
            # Seconds of the whole evaluation per page: all ranks work at once.
            now = time.perf_counter()
            seconds = (now - start) / world / len(batch)
            start = now
            for i, conversation, result in batch:
                row = page_row(engine, name, task, i, conversation, result, by_character)
                f.write(to_line({**row, "seconds": seconds}))
            f.flush()
            progress.update(len(batch))

    rows = gather_rows(path)
    return [rows[i] for i in range(pages)]


# -----------------------------------------------------------------------------
# Figures


def label_lengths(rows):
    """Adds the attribute text_tokens, a range such as "600-700", to the rows of loaded pages."""
    width = step_of([row["text_tokens"] for row in rows])
    for row in rows:
        if row["vision_tokens"]:
            low = row["text_tokens"] // width * width
            row["attributes"]["text_tokens"] = f"{low:g}-{low + width:g}"


def breakdowns(rows):
    """{"by_<attribute>": its breakdown}, where pages differ in the attribute."""
    attributes = {}  # a dict, since it keeps the order
    for row in rows:
        attributes.update(row["attributes"])
    found = {}
    for key in attributes:
        groups = breakdown(rows, key)
        if groups:
            found[f"by_{key}"] = groups
    return found


def control_figures(controls):
    """{control: its main figures} from {control: rows}."""
    kept = ("samples", "failed", "ci95", *FIGURES)
    figures = {}
    for kind, rows in controls.items():
        summary = summarize(rows)
        figures[kind] = {key: value for key, value in summary.items() if key in kept}
    return figures


def size_figures(rows):
    """How densely the pages are packed: means over the pages that could be loaded."""
    loaded = [row for row in rows if row["vision_tokens"]]
    if not loaded:
        loaded = [dict.fromkeys(("vision_tokens", "positions", "valid_tokens", "text_tokens",
                                 "truth_chars"), 0)]
    vision_tokens = mean(loaded, "vision_tokens")
    if vision_tokens == int(vision_tokens):
        vision_tokens = int(vision_tokens)
    per_token = 1 / max(vision_tokens, 1)
    return {"chars_per_vision_token": mean(loaded, "truth_chars") * per_token,
            "text_tokens_per_vision_token": mean(loaded, "text_tokens") * per_token,
            "vision_tokens": vision_tokens,
            "positions": mean(loaded, "positions"),
            "valid_tokens": mean(loaded, "valid_tokens")}


def figures_of(name, rows, controls):
    """All that is said about one task, from its rows and {control: rows}."""
    finished = [row for row in rows if not row["failed"]]
    seconds = sum(row["seconds"] for row in rows)
    label_lengths(rows)
    return {
        "task": name,
        "verdict": verdict(rows, controls),
        **summarize(rows),
        **size_figures(rows),
        "confidence": mean(finished, "confidence") if finished else None,
        "unfinished": sum(not row["finished"] for row in finished),
        "pages_per_sec": len(rows) / seconds,
        "tokens_per_sec": sum(row["tokens"] for row in rows) / seconds,
        "controls": control_figures(controls),
        **breakdowns(rows),
    }
