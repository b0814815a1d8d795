"""
Rows of a data set on the hub, or of a local copy of its folder, as conversations. They stay raw until a task's plain function
to_conversation(row, where) turns one into a conversation: so a broken row is an error of its own, and all that `datasets` does with rows
(slices, streams, shares over ranks and workers, state_dict) goes on working.
"""
import json
from functools import partial

from nanochat.hub import dataset
from nanochat.common import stable_hash
from nanochat.conversation import Task

VAL_ONE_IN = 50


def belongs(part, texts):
    """Whether a row with these texts is in "train" or "val": by hash, so alike for any order of rows, shards and ranks."""
    return (stable_hash(json.dumps(texts, sort_keys=True)) % VAL_ONE_IN == 0) == (part == "val")


class Rows(Task):
    """
    part        "train" or "val" of a split that has no validation rows of its own, by the hash of `text_column`; "" = all
    start, stop rows of that part; stop None = to its end
    streaming   `rows` is datasets' IterableDataset, without length and index: who iterates calls to_conversation(row, where). Over several
                ranks or workers it would count start and stop within shards: hold rows out by `part`
    """
    def __init__(self, repo, config, split, to_conversation, text_column, part="", start=0, stop=None, streaming=False):
        self.name, self.start, self.to_conversation = " ".join(filter(None, (repo, config, split, part))), start, to_conversation
        rows = dataset(repo, config, split, streaming)
        rows = rows.decode(False) if streaming else rows  # pictures stay bytes for open_image
        rows = rows.filter(partial(belongs, part), input_columns=[text_column]) if part else rows
        if streaming:
            self.rows = rows.skip(start) if stop is None else rows.skip(start).take(stop - start)
            return
        if not 0 <= start < (len(rows) if stop is None else stop) <= len(rows):
            raise ValueError(f"{self.name} has {len(rows)} rows: start={start}, stop={stop} are not among them")
        self.rows = rows.select(range(len(rows))[start:stop]).with_format("arrow")  # this does not decode pictures either

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.check_index(i)
        return self.to_conversation(self.rows[i].to_pylist()[0], f"{self.name} row {self.start + i}")
