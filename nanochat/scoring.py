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
from collections import defaultdict

from PIL import ImageOps
from tqdm import tqdm

from nanochat.common import (
    barrier, dist_info, gather, get_world_size, is_master, print0, read_json_lines)
from nanochat.conversation import truth_of
from nanochat.image_modes import valid_tokens
from nanochat.metrics import FAILED, relaxed_accuracy, score_page

WINDOW = 4  # batches' worth of pages that are loaded and sorted by length before they are batched

# Keys that a page's conversation may have and that become attributes of its row.
PAGE_KEYS = ("face", "size_px", "bucket", "columns")


# -----------------------------------------------------------------------------
# Pages


def prompt_of(conversation):
    """The text that the model is asked with, without its pictures."""
    content = conversation["messages"][-2]["content"]
    if isinstance(content, str):
        return content
    texts = [part["text"] for part in content if part["type"] == "text"]
    return "".join(texts).strip()


def readable(text):
    """The text with U+FFFD for lone surrogates: JSON can hold them, but UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def full_truth(task, i):
    """The text of page i, from its sample where the task does not know it otherwise."""
    text = task.truth(i)
    if text is None:
        try:
            text = truth_of(task[i])
        except (OSError, ValueError):  # a broken page; reading it will say so
            text = ""
    return readable(text)


def text_hash(text):
    # File names, and so ids, may hold surrogates too.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def pixel_hash(images):
    """sha256 object of the pixels of some pictures."""
    state = hashlib.sha256()
    for image in images:
        upright = ImageOps.exif_transpose(image)
        # The bytes of a palette picture are indices, and what is transparent may be said elsewhere.
        # (Pictures of 16 bits would become white.)
        is_deep = upright.mode.startswith("I")
        if upright.mode in ("P", "PA") or (upright.has_transparency_data and not is_deep):
            upright = upright.convert("RGBA")
        state.update(f"{upright.mode} {upright.size}".encode())
        state.update(upright.tobytes())
    return state


def picture_hash(conversation):
    """Hash of all that the model gets to see: pixels and words, without the answer."""
    state = pixel_hash(conversation["images"])
    asked = json.dumps(conversation["messages"][:-1])
    state.update(asked.encode())
    return state.hexdigest()[:16]


class Page:
    """A page on its way from the task to its row."""

    def __init__(self, task, i):
        self.index = i
        self.conversation = None  # stays None if the picture cannot be opened
        self.picture = None       # hash of what the model sees
        self.prediction = None    # a record of Predictions
        self.reused = False       # whether the prediction is of an earlier run
        self.error = None         # why there is no prediction
        try:
            self.conversation = task[i]
            self.picture = picture_hash(self.conversation)
        except (OSError, ValueError) as error:
            self.error = str(error)


# -----------------------------------------------------------------------------
# JSON-lines files


def read_lines(path):
    """Objects of a JSON-lines file, [] without one. A page of a damaged line is read again."""
    if not os.path.exists(path):
        return []
    records, damaged = read_json_lines(path)
    if damaged:
        print0(f"NOTE: {damaged} damaged lines of {path} are left out")
    return records


def to_line(record):
    # Chinese stays Chinese, for whoever opens the file.
    return json.dumps(record, ensure_ascii=False) + "\n"


def open_lines(path, mode):
    # UTF-8 has no lone surrogates, which a file name may hold. "backslashreplace" turns them into
    # \udc80, which in JSON is an escape, so that reading gives the same text.
    return open(path, mode, encoding="utf-8", errors="backslashreplace")


def write_lines(path, records):
    # A new file, then a rename: a kill in between loses nothing.
    with open_lines(path + ".tmp", "w") as f:
        for record in records:
            f.write(to_line(record))
    os.replace(path + ".tmp", path)


# -----------------------------------------------------------------------------
# Predictions


class Predictions:
    """
    What the model wrote so far, per task and picture, in <out>/predictions.jsonl. Each rank appends
    to a file of its own; `load` merges the files of all ranks, of this run and earlier ones.

    Per task, because a control must be read for itself: that a picture has been read under another
    name must not decide what a control shows.
    """

    def __init__(self, out):
        self.path = os.path.join(out, "predictions.jsonl")
        self.own_path = f"{self.path}.rank{dist_info()[0]}"
        self.records = {}  # (task, picture) -> record

    def load(self):
        barrier()  # all ranks have written
        if is_master():
            self.merge()
        barrier()  # and now all may read
        self.records = self.keyed(read_lines(self.path))

    def keyed(self, records):
        return {(record["task"], record["picture"]): record for record in records}

    def merge(self):
        """Rank 0: one file out of all."""
        records = self.keyed(read_lines(self.path))
        parts = sorted(glob.glob(glob.escape(self.path) + ".rank*"))
        for part in parts:
            records.update(self.keyed(read_lines(part)))
        write_lines(self.path, records.values())
        for part in parts:
            os.remove(part)

    def find(self, task, picture, limit):
        """
        The record for a picture, or None. A text that a lower limit cut short does not count, nor
        one that is longer than this limit allows.
        """
        record = self.records.get((task, picture))
        if record is None or record.get("longest", record["tokens"]) > limit:
            return None
        return record if record["finished"] or record["limit"] >= limit else None

    def append(self, records):
        # Opened and closed for every batch, so that a kill loses no more than one.
        with open_lines(self.own_path, "a") as f:
            for record in records:
                f.write(to_line(record))


# -----------------------------------------------------------------------------
# Reading


def room_left(engine, conversation):
    """
    Tokens that the decoder can write after this prompt, its pictures included. ValueError without
    any: such a prompt must not get into a batch, where it would leave no room for the others.
    """
    prompt = 0
    for part in engine.parts(conversation):  # of a page in windows, the longest prompt decides
        positions = [plan.positions for plan in engine.plans(part)]
        rendered = engine.tokenizer.render_for_completion(part, positions)
        prompt = max(prompt, len(rendered))
    decoder = engine.model.cfg.gpt.sequence_len
    if prompt >= decoder:
        raise ValueError(f"a prompt of {prompt} positions leaves no room for an answer: the "
                         f"decoder has {decoder}; use a --mode with fewer tokens")
    return decoder - prompt


class Scorer:
    """
    Reads and scores tasks with one engine, into one folder.

    max_new_tokens  tokens a page may take; -1: half as many again as the task's longest truth, and
                    32. The room in the decoder is a limit in either case
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
            tokens = self.engine.tokenizer.encode(full_truth(task, i))
            longest = max(longest, len(tokens))
        # A loop ends here. A model that reads stays below, also where it is wordy or where its
        # mistakes take more tokens than the words of the truth.
        return longest + longest // 2 + 32

    def score_pages(self, name, task, indices, limit):
        """
        Reads the pages `indices` of a task, each rank its share, and writes <out>/<name>.jsonl.
        -> (rows in order, what was reused: see `count_reuse`), the same on all ranks.
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
        self.predictions.load()  # leaves one file

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
        """Reads the pages of one batch, and keeps what was read."""
        started = time.perf_counter()
        conversations = [page.conversation for page in batch]
        results = self.engine.generate_each(conversations, limit)
        # Seconds of the evaluation as a whole per page: all ranks work at once.
        seconds = (time.perf_counter() - started) / get_world_size() / len(batch)

        records = []
        for page, result in zip(batch, results):
            if isinstance(result, Exception):  # one page that the engine refuses stops no other
                page.error = str(result)
                continue
            # The limit is one of each window of a page that is read in windows.
            parts = [part.tokens for _, part in getattr(result, "windows", [])]
            page.prediction = {
                "task": name, "picture": page.picture, "id": page.conversation["id"],
                "text": result.text, "tokens": result.tokens,
                "longest": max(parts, default=result.tokens), "finished": result.finished,
                "confidence": result.confidence, "flags": result.flags, "limit": limit,
                "seconds": seconds}
            records.append(page.prediction)
        self.predictions.append(records)  # not failures: the next run tries those again

    def row(self, name, task, page):
        """The row of a page: what it is, what was read, and how far that is from its truth."""
        if page.conversation is None:
            row = describe_missing(name, task, page.index)
        else:
            try:
                row = describe_page(self.engine, name, page.index, page.conversation)
            except ValueError:  # a picture that opens and cannot be cut into windows
                row = describe_missing(name, task, page.index)
        true_text = row["truth"] or ""
        row["text_tokens"] = len(self.engine.tokenizer.encode(true_text))
        row["truth_chars"] = len(true_text)
        row["hash"] = {"page": text_hash(row["id"]), "picture": page.picture,
                       "truth": text_hash(true_text)}
        image_name = task.image_name(page.index)
        if image_name:
            row["image_name"] = image_name

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
        if task.answer_metric == "relaxed_accuracy":
            row["relaxed_accuracy"] = relaxed_accuracy(text, true_text)
        return row


def describe_page(engine, name, i, conversation):
    """The part of a row that does not depend on what was read."""
    row = {"index": i, "id": conversation["id"], "task": name,
           "truth": readable(truth_of(conversation)), "prompt": prompt_of(conversation)}
    plans = []
    images = []
    for part in engine.parts(conversation):  # every window has its own tokens
        plans += engine.plans(part)
        images += part["images"]
    row["vision_tokens"] = sum(plan.tokens for plan in plans)     # as the paper counts them
    row["positions"] = sum(plan.positions for plan in plans)      # newlines and separators too
    row["valid_tokens"] = 0                                       # less those of padding
    modes = {}  # a dict, since it keeps the order
    for plan, image in zip(plans, images):
        width, height = ImageOps.exif_transpose(image).size
        row["valid_tokens"] += valid_tokens(plan, width, height)
        modes[plan.mode.name] = True
    row["mode"] = "+".join(modes)

    own = {key: conversation[key] for key in PAGE_KEYS if key in conversation}
    row["attributes"] = {**own, **conversation.get("attributes", {}), "mode": row["mode"]}
    return row


def describe_missing(name, task, i):
    """The same for a page whose picture cannot be opened, so that its size is not known."""
    text = task.truth(i)
    # What the page is called when it can be opened, so that two evaluations pair it.
    page = task.where(i) if hasattr(task, "where") else task.image_name(i) or f"{name}/{i}"
    return {"index": i, "id": page, "task": name,
            "truth": None if text is None else readable(text), "prompt": "",
            "vision_tokens": 0, "positions": 0, "valid_tokens": 0, "mode": "",
            # so that it stays in the breakdowns, as wrong
            "attributes": dict(task.attributes(i))}


def count_reuse(earlier, rows, reused):
    """
    {"reused": pages whose prediction is of an earlier run; "rescored": those of them whose truth
    has changed since; "renamed": those under another name now}. reused: their indices.
    """
    before = {row["hash"]["picture"]: row["hash"] for row in earlier}
    counts = {"reused": len(reused), "rescored": 0, "renamed": 0}
    for row in rows:
        old = before.get(row["hash"]["picture"])
        # A killed run left predictions, but no rows to compare with.
        if row["index"] in reused and old is not None:
            counts["rescored"] += old["truth"] != row["hash"]["truth"]
            counts["renamed"] += old["page"] != row["hash"]["page"]
    return counts
