"""
Rows of a data set on the hub, or of a local copy of its folder, as conversations. They stay raw until a task's plain function
to_conversation(row, where) turns one into a conversation. So a broken row is an error of its own, and what `datasets` does with
rows (slices, streams, shares over ranks and workers, its state_dict) goes on working.
"""
import json
from functools import partial

from nanochat.hub import dataset
from tasks.common import Task
from tasks.synthdoc import stable_hash

VAL_ONE_IN = 50


def belongs(part, texts):
    """Whether a row with these texts is in "train" or "val": by hash, so alike for any order of rows, shards and ranks."""
    return (stable_hash(json.dumps(texts, sort_keys=True)) % VAL_ONE_IN == 0) == (part == "val")


class Rows(Task):
    """
    start, stop   rows of the split, or of its part; stop None = to its end
    part          "train" or "val" of a split that has no validation rows of its own; "" = all of it. `text_column` decides
    streaming     `rows` is then datasets' IterableDataset: no length and no index; who iterates converts by to_conversation(row, where).
                  Once shared over ranks or workers, it counts start and stop within shards: hold rows out by `part` there
    """
    def __init__(self, repo, config, split, to_conversation, text_column="", part="", start=0, stop=None, streaming=False):
        if part not in ("", "train", "val") or start < 0 or (stop is not None and stop <= start):
            raise ValueError(f"part={part!r}, start={start}, stop={stop}: give train, val or nothing, and 0 <= start < stop")
        self.name, self.start, self.to_conversation = " ".join(filter(None, (repo, config, split, part))), start, to_conversation
        rows = dataset(repo, config, split, streaming)
        rows = rows.decode(False) if streaming else rows  # pictures stay bytes for open_image
        if part:
            rows = rows.filter(partial(belongs, part), input_columns=[text_column])
        if streaming:
            self.rows = rows.skip(start) if start else rows
            self.rows = self.rows if stop is None else self.rows.take(stop - start)
            return
        stop = len(rows) if stop is None else stop
        if not start < stop <= len(rows):
            raise ValueError(f"{self.name} has {len(rows)} rows: rows {start} to {stop} are not among them")
        self.rows = rows.select(range(start, stop)).with_format("arrow")  # does not decode pictures either

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.check_index(i)
        return self.to_conversation(self.rows[i].to_pylist()[0], f"{self.name} row {self.start + i}")
