"""
Reads the pages of a task with a trained model and scores them.

What the model writes for a picture is slow to get, so it is kept: `Predictions` stores it under a
hash of the picture and the prompt. A row (a dict, one per page) is quick to make, so it is made
anew on every run, from the page as it is now and from the prediction for its picture. Thus a
corrected truth, a renamed page or another picture can never keep an old score, and a stopped
evaluation continues where it was.
"""
import glob
import hashlib
import json
import os
import time
from collections import Counter, defaultdict

import numpy as np
from PIL import ImageOps
from tqdm import tqdm

from nanochat.common import barrier, dist_info, gather
from nanochat.image_modes import valid_tokens
from nanochat.metrics import FAILED, relaxed_accuracy, score_page, summarize
from nanochat.report import breakdown, step_of
from nanochat.verdict import judge, mean

WINDOW = 4  # batches' worth of pages that are loaded and sorted by length before they are batched

# Figures that are printed, and kept for controls.
FIGURES = ("one_minus_ned", "ned", "cer", "f1", "precision", "precision_official",
           "repetition_rate", "relaxed_accuracy")
# Keys that a page's conversation may have and that become attributes of its row.
PAGE_KEYS = ("face", "size_px", "bucket", "columns")
QUANTILES = {"min": 0, "p10": 10, "p25": 25, "median": 50, "p75": 75, "p90": 90, "max": 100}


# -----------------------------------------------------------------------------
# What a task says about itself
# TODO: delete the fallbacks, and this section, once every task is a nanochat.conversation.Task
# that has answer_metric, truth, image_name and attributes.


def answer_metric(name, task):
    if hasattr(task, "answer_metric"):
        return task.answer_metric
    return "relaxed_accuracy" if name in ("chartqa-test", "synthchart") else None


def image_name(task, i):
    if hasattr(task, "image_name"):
        return task.image_name(i)
    return task.image_names[i] if hasattr(task, "image_names") else None


def attributes(task, i):
    if hasattr(task, "attributes"):
        return task.attributes(i)
    page = task.pages[i] if hasattr(task, "pages") else None
    return page["page_info"].get("page_attribute") or {} if isinstance(page, dict) else {}


def truth(task, i):
    """The text of page i, or None where only its broken picture's sample would tell."""
    try:
        if hasattr(task, "truth"):
            return task.truth(i)
        if hasattr(task, "truths"):
            return task.truths[i]
        return truth_of(task[i])
    except (OSError, ValueError):
        return None


# -----------------------------------------------------------------------------
# Pages


def truth_of(conversation):
    return conversation["messages"][-1]["content"]


def prompt_of(conversation):
    """The text that the model is asked with, without its pictures."""
    content = conversation["messages"][-2]["content"]
    if isinstance(content, str):
        return content
    texts = [part["text"] for part in content if part["type"] == "text"]
    return "".join(texts).strip()


def readable(text):
    """Lone surrogates, which some JSON files hold and no file can be written with, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_hash(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def picture_hash(conversation):
    """Hash of all that the model gets to see: pixels and words, without the answer."""
    state = hashlib.sha256()
    for image in conversation["images"]:
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "P":  # its bytes are indices of a palette
            upright = upright.convert("RGBA")
        state.update(f"{upright.mode} {upright.size}".encode())
        state.update(upright.tobytes())
    asked = json.dumps(conversation["messages"][:-1])
    state.update(asked.encode())
    return state.hexdigest()[:16]


class Page:
    """A page on its way from the task to its row."""

    def __init__(self, task, i):
        self.index = i
        self.conversation = None
        self.picture = None     # hash of what the model sees
        self.prediction = None  # a record of Predictions
        self.reused = False     # whether the prediction is of an earlier run
        self.error = None       # why there is no prediction
        try:
            self.conversation = task[i]
            self.picture = picture_hash(self.conversation)
        except (OSError, ValueError) as error:
            self.error = str(error)


# -----------------------------------------------------------------------------
# JSON-lines files


def read_lines(path):
    """Objects of a JSON-lines file, [] without one. A last line cut short by a kill is left out."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def to_line(record):
    # Readable Chinese instead of escapes. A lone surrogate, from a file name, has no UTF-8: with
    # backslashreplace it becomes an escape, which JSON reads back.
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_lines(path, records):
    """A new file, then a rename: a kill in between loses nothing."""
    with open(path + ".tmp", "w", encoding="utf-8", errors="backslashreplace") as f:
        for record in records:
            f.write(to_line(record))
    os.replace(path + ".tmp", path)


# -----------------------------------------------------------------------------
# Predictions


class Predictions:
    """
    What the model wrote so far, per task and picture, in <out>/predictions.jsonl. Each rank appends
    to a file of its own; `load` merges the files of all ranks, of this run and earlier ones.
    """

    def __init__(self, out):
        self.path = os.path.join(out, "predictions.jsonl")
        self.own_path = f"{self.path}.rank{dist_info()[0]}"
        self.records = {}

    def load(self):
        barrier()  # all ranks have written
        if dist_info()[0] == 0:
            self.merge()
        barrier()
        self.records = self.keyed(read_lines(self.path))

    def keyed(self, records):
        return {(record["task"], record["picture"]): record for record in records}

    def merge(self):
        parts = sorted(glob.glob(glob.escape(self.path) + ".rank*"))
        records = self.keyed(read_lines(self.path))
        for part in parts:
            records.update(self.keyed(read_lines(part)))
        write_lines(self.path, records.values())
        for part in parts:
            os.remove(part)

    def find(self, task, picture, limit):
        """The record for a picture, or None. A text that a lower limit cut short does not count."""
        record = self.records.get((task, picture))
        if record and (record["finished"] or record["limit"] >= limit):
            return record
        return None

    def append(self, records):
        with open(self.own_path, "a", encoding="utf-8", errors="backslashreplace") as f:
            for record in records:
                f.write(to_line(record))


# -----------------------------------------------------------------------------
# Reading


def room_left(engine, conversation):
    """
    Tokens that the decoder can write after this prompt, its pictures included. ValueError without
    any: such a prompt must not get into a batch, where it would leave no room for the others.
    """
    positions = [plan.positions for plan in engine.plans(conversation)]
    prompt = len(engine.tokenizer.render_for_completion(conversation, positions))
    decoder = engine.model.cfg.gpt.sequence_len
    if prompt >= decoder:
        raise ValueError(f"a prompt of {prompt} positions leaves no room for an answer: the "
                         f"decoder has {decoder}; use a --mode with fewer tokens")
    return decoder - prompt


class Evaluator:
    """
    Reads and scores tasks with one engine, into one folder.

    max_new_tokens  tokens a page may take; -1: half as many again as the task's longest truth, and
                    32. Loops end there, and a sound page never gets near. The decoder's room is a
                    limit in either case
    by_character    whether word figures of Chinese count characters (metrics.word_sets)
    """

    def __init__(self, engine, out, batch_size, max_new_tokens, by_character):
        self.engine = engine
        self.out = out
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.by_character = by_character
        self.predictions = Predictions(out)

    def token_limit(self, task, indices):
        """Tokens that a page of this task may take."""
        if self.max_new_tokens > 0:
            return self.max_new_tokens
        longest = 0
        for i in indices:
            text = readable(truth(task, i) or "")
            longest = max(longest, len(self.engine.tokenizer.encode(text)))
        return longest + longest // 2 + 32

    def evaluate(self, name, task, indices, limit):
        """
        Reads the pages `indices` of a task, each rank its share, and writes <out>/<name>.jsonl.
        -> (rows in the order of `indices`, counts of what was reused, see `count_reuse`).
        """
        rank, _, world = dist_info()
        self.predictions.load()
        mine = indices[rank::world]
        window = WINDOW * self.batch_size
        rows = []
        reused = []
        with tqdm(total=len(mine), unit="page", desc=name, disable=rank != 0) as progress:
            for first in range(0, len(mine), window):
                pages = [Page(task, i) for i in mine[first:first + window]]
                self.read(name, pages, limit, progress)
                for page in pages:
                    rows.append(self.row(name, task, page))
                    if page.reused:
                        reused.append(page.index)
        self.predictions.load()

        rows = [row for of_rank in gather(rows) for row in of_rank]
        rows.sort(key=lambda row: row["index"])
        reused = {i for of_rank in gather(reused) for i in of_rank}
        path = os.path.join(self.out, f"{name}.jsonl")
        counts = count_reuse(read_lines(path), rows, reused)
        barrier()  # all ranks have read the earlier rows
        if rank == 0:
            write_lines(path, rows)
        return rows, counts

    def read(self, name, pages, limit, progress):
        """Gives each page its prediction or error: from an earlier run, or by reading it now."""
        # A batch has one limit. Pages with less room form batches of their own, so that what is
        # read from a page does not depend on the pages beside it.
        waiting = defaultdict(list)  # limit -> pages
        for page in pages:
            if page.conversation is None:
                continue
            try:
                page_limit = min(limit, room_left(self.engine, page.conversation))
            except ValueError as error:
                page.error = str(error)
                continue
            page.prediction = self.predictions.find(name, page.picture, page_limit)
            page.reused = page.prediction is not None
            if not page.reused:
                waiting[page_limit].append(page)
        progress.update(len(pages) - sum(len(group) for group in waiting.values()))

        for page_limit, group in waiting.items():
            # Rows of similar length end at about the same time, so none waits long for its batch.
            group.sort(key=lambda page: len(truth_of(page.conversation)))
            for start in range(0, len(group), self.batch_size):
                batch = group[start:start + self.batch_size]
                self.read_batch(name, batch, page_limit)
                progress.update(len(batch))

    def read_batch(self, name, batch, limit):
        conversations = [page.conversation for page in batch]
        started = time.perf_counter()
        results = self.engine.generate_each(conversations, limit)
        # Seconds of the evaluation as a whole per page: all ranks work at once.
        seconds = (time.perf_counter() - started) / dist_info()[2] / len(batch)

        records = []
        for page, result in zip(batch, results):
            if isinstance(result, Exception):  # one page that the engine refuses stops no other
                page.error = str(result)
                continue
            page.prediction = {
                "task": name, "picture": page.picture, "id": page.conversation["id"],
                "text": result.text, "tokens": result.tokens, "finished": result.finished,
                "confidence": result.confidence, "flags": result.flags, "limit": limit,
                "seconds": seconds}
            records.append(page.prediction)
        self.predictions.append(records)

    def row(self, name, task, page):
        """The row of a page: what it is, what was read, and how far that is from its truth."""
        if page.conversation is None:
            row = describe_missing(name, task, page.index)
        else:
            row = describe_page(self.engine, name, page.index, page.conversation)
        true_text = row["truth"] or ""
        row["text_tokens"] = len(self.engine.tokenizer.encode(true_text))
        row["truth_chars"] = len(true_text)
        row["hash"] = {"page": text_hash(row["id"]), "picture": page.picture,
                       "truth": text_hash(true_text)}
        if image_name(task, page.index):
            row["image_name"] = image_name(task, page.index)

        row["failed"] = page.prediction is None
        if row["failed"]:
            row.update(FAILED, prediction="", error=page.error, flags=["failed"], tokens=0,
                       seconds=0.0)
            return row
        text = page.prediction["text"]
        row["prediction"] = text
        for key in ("tokens", "finished", "confidence", "flags", "seconds"):
            row[key] = page.prediction[key]
        row.update(score_page(text, true_text, by_character=self.by_character))
        if answer_metric(name, task) == "relaxed_accuracy":
            row["relaxed_accuracy"] = relaxed_accuracy(text, true_text)
        return row


def describe_page(engine, name, i, conversation):
    """The part of a row that does not depend on what was read."""
    row = {"index": i, "id": conversation["id"], "task": name,
           "truth": readable(truth_of(conversation)), "prompt": prompt_of(conversation)}
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

    own = {key: conversation[key] for key in PAGE_KEYS if key in conversation}
    row["attributes"] = {**own, **conversation.get("attributes", {}), "mode": row["mode"]}
    return row


def describe_missing(name, task, i):
    """The same for a page whose picture cannot be opened, so that its size is not known."""
    text = truth(task, i)
    return {"index": i, "id": image_name(task, i) or f"{name}/{i}", "task": name,
            "truth": None if text is None else readable(text), "prompt": "",
            "vision_tokens": 0, "positions": 0, "valid_tokens": 0, "mode": "",
            "attributes": dict(attributes(task, i))}


def count_reuse(earlier, rows, reused):
    """
    {"reused": pages whose prediction is of an earlier run; "rescored": those of them whose truth
    has changed since; "renamed": those under another name now}. reused: their indices.
    """
    before = {row["hash"]["picture"]: row["hash"] for row in earlier if "hash" in row}
    counts = Counter(reused=len(reused), rescored=0, renamed=0)
    for row in rows:
        old = before.get(row["hash"]["picture"])
        if row["index"] in reused and old:
            counts["rescored"] += old["truth"] != row["hash"]["truth"]
            counts["renamed"] += old["page"] != row["hash"]["page"]
    return dict(counts)


# -----------------------------------------------------------------------------
# Figures


def label_lengths(rows):
    """Adds the attribute text_tokens, a range such as "600-700", where the truth is known."""
    width = step_of([row["text_tokens"] for row in rows])
    for row in rows:
        if row["truth"] is not None:
            low = row["text_tokens"] // width * width
            row["attributes"]["text_tokens"] = f"{low:g}-{low + width:g}"


def breakdowns(rows):
    """{"by_<attribute>": its breakdown}, where pages differ in it; of answers, their accuracy too."""
    names = {}  # a dict, since it keeps the order
    for row in rows:
        names.update(row["attributes"])
    answers = any("relaxed_accuracy" in row for row in rows)
    found = {}
    for name in names:
        groups = breakdown(rows, name)
        if not groups:
            continue
        found[f"by_{name}"] = groups
        if answers:
            found[f"relaxed_accuracy_by_{name}"] = breakdown(rows, name, "relaxed_accuracy")
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
    """How densely the pages are packed: means over the pages that could be opened."""
    names = ("vision_tokens", "positions", "valid_tokens", "text_tokens", "truth_chars")
    loaded = [row for row in rows if row["vision_tokens"]]
    means = dict.fromkeys(names, 0.0)
    if loaded:
        means = {name: mean(loaded, name) for name in names}

    vision_tokens = means["vision_tokens"]
    per_token = 1 / max(vision_tokens, 1)
    if vision_tokens == int(vision_tokens):
        vision_tokens = int(vision_tokens)
    return {"chars_per_vision_token": means["truth_chars"] * per_token,
            "text_tokens_per_vision_token": means["text_tokens"] * per_token,
            "vision_tokens": vision_tokens,
            "positions": means["positions"],
            "valid_tokens": means["valid_tokens"]}


def distribution(rows):
    """How the pages' scores are spread: quantiles, and counts in ten equal bins of 0 to 1."""
    scores = [row["one_minus_ned"] for row in rows]
    quantiles = {name: float(np.percentile(scores, q)) for name, q in QUANTILES.items()}
    counts, _ = np.histogram(scores, bins=10, range=(0, 1))
    return {"quantiles": quantiles, "histogram": counts.tolist()}


def speed(rows):
    """Pages and tokens per second of encoding and generation; 0 if nothing was read."""
    seconds = sum(row["seconds"] for row in rows)
    if seconds == 0:
        return {"pages_per_sec": 0.0, "tokens_per_sec": 0.0}
    read = [row for row in rows if not row["failed"]]
    return {"pages_per_sec": len(read) / seconds,
            "tokens_per_sec": sum(row["tokens"] for row in read) / seconds}


def figures_of(name, rows, controls, of):
    """
    All that is said about one task, from its rows and {control: rows}. `of`: pages that the task
    has, of which the rows are a sample when they are fewer.
    """
    finished = [row for row in rows if not row["failed"]]
    label_lengths(rows)
    verdict = judge(rows, controls)
    summary = summarize(rows)
    return {
        "task": name,
        "verdict": verdict.text,
        "grade": verdict.grade,
        "samples": summary.pop("samples"),
        "of": of,
        **summary,
        **size_figures(rows),
        "confidence": mean(finished, "confidence") if finished else None,
        "unfinished": sum(not row["finished"] for row in finished),
        **speed(rows),
        "shares": {fault: len(found) / len(rows) for fault, found in verdict.faults.items()},
        **distribution(rows),
        "controls": control_figures(controls),
        **breakdowns(rows),
    }
