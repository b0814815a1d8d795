"""
Data sets of rows, on the hub or in a local copy of its folder, as conversations.

Rows stay raw until a plain function to_conversation(row, where) turns one into a conversation. So a
broken row is an error of its own, and everything `datasets` does with rows (slices, streams, shares
over ranks and workers, state_dict) keeps working.
"""
import json
from functools import partial

from nanochat.common import stable_hash
from nanochat.conversation import Task
from nanochat.hub import dataset

VAL_ONE_IN = 50  # rows of which one is held out, where a data set has no validation split


def belongs(part, texts):
    """Whether a row with these texts is in `part`, "train" or "val"."""
    # By hash of the content: the same for any order of rows, shards and ranks, and two rows with
    # the same text are never on different sides.
    in_val = stable_hash(json.dumps(texts, sort_keys=True)) % VAL_ONE_IN == 0
    return in_val == (part == "val")


class Rows(Task):
    """
    part         "train" or "val" of a split that has no validation rows of its own, by the hash of
                 `text_column`; "" = all rows
    start, stop  rows of that part; stop None = to its end
    streaming    `rows` is then an IterableDataset of `datasets`, without length and index, for
                 First and Stream (nanochat/mixture.py), which call to_conversation themselves.
                 Over several ranks or workers start and stop would count within shards: hold rows
                 out by `part`
    """
    def __init__(self, repo, config, split, to_conversation, text_column,
                 part="", start=0, stop=None, streaming=False):
        self.name = " ".join(filter(None, (repo, config, split, part)))  # in errors and logs
        self.start = start
        self.to_conversation = to_conversation
        self.streaming = streaming

        rows = dataset(repo, config, split, streaming)
        if streaming:
            rows = rows.decode(False)  # pictures stay bytes, for open_image
        if part:
            rows = rows.filter(partial(belongs, part), input_columns=[text_column])
        self.rows = self.stream(rows, stop) if streaming else self.table(rows, stop)

    def stream(self, rows, stop):
        rows = rows.skip(self.start)
        return rows if stop is None else rows.take(stop - self.start)

    def table(self, rows, stop):
        last = len(rows) if stop is None else stop
        if not len(rows):
            raise ValueError(f"{self.name} has no rows: of small sets none may be held out for "
                             f"validation, one in {VAL_ONE_IN} is by its hash")
        if not 0 <= self.start < last <= len(rows):
            raise ValueError(f"{self.name} has {len(rows)} rows: "
                             f"start={self.start}, stop={stop} is not a range of them")
        # Indexing in arrow format does not decode pictures either.
        return rows.select(range(self.start, last)).with_format("arrow")

    def __len__(self):
        return len(self.rows)

    def fingerprint(self):
        # Rows that were added or taken away; to read all of them would take too long.
        return None if self.streaming else f"{len(self.rows)} rows"

    def row(self, i):
        """The raw row i, a dict; its pictures are encoded bytes."""
        self.check_index(i)
        return self.rows[i].to_pylist()[0]  # one index gives a table of one row

    def where(self, i):
        """What errors call row i: its number in the whole part, whatever `start` is."""
        return f"{self.name} row {self.start + i}"

    def __getitem__(self, i):
        return self.to_conversation(self.row(i), self.where(i))
