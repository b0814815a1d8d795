"""
Ways to draw from tasks: in fixed shares (Mixture), in another order each epoch (Shuffled), in the order of a stream (Stream, First).
"""
import math
import random
import sys
from functools import partial
from itertools import islice

import numpy as np

from nanochat.common import stable_hash
from nanochat.conversation import Task


class Mixture:
    """
    Tasks in fixed integer shares, e.g. [(ocr, 9), (chat, 1)]: every run of sum(shares) samples has exactly these counts. With a
    Stream among them it has no length, and each of the loader's workers mixes what it draws.
    """
    def __init__(self, parts):
        for task, share in parts:
            if share < 1 or share != int(share):
                raise ValueError(f"share {share} of {type(task).__name__}: must be a positive integer")
        # a mixture among the parts is taken apart: its tasks are counted, and streamed, like any other
        scale = math.prod(sum(task.shares) for task, _ in parts if isinstance(task, Mixture))
        parts = [part for task, share in parts for part in (
            [(inner, share * scale // sum(task.shares) * n) for inner, n in zip(task.tasks, task.shares)] if isinstance(task, Mixture) else [(task, share * scale)])]
        self.tasks = [task for task, _ in parts]
        names = [getattr(task, "name", type(task).__name__) for task in self.tasks]
        self.names = [name if names.count(name) == 1 else f"{name}-{t}" for t, name in enumerate(names)]
        divisor = math.gcd(*(share for _, share in parts))
        parts = [(task, share // divisor) for task, share in parts]
        total = sum(share for _, share in parts)
        # spread each task evenly over the cycle: slot at (j + 1/2) / share
        order = sorted(((j + 0.5) / share, t) for t, (_, share) in enumerate(parts) for j in range(share))
        self.cycle = [(t, sum(1 for _, u in order[:pos] if u == t)) for pos, (_, t) in enumerate(order)]
        self.shares = [share for _, share in parts]
        self.streams = any(isinstance(task, Stream) for task in self.tasks)
        self.length = 0 if self.streams else min(len(task) // share for task, share in parts) * total

    def __len__(self):
        return self.length

    def place(self, i):
        """(number of the task, its row) of sample i."""
        turn, slot = divmod(i, len(self.cycle))
        t, nth = self.cycle[slot]
        return t, turn * self.shares[t] + nth

    def __getitem__(self, i):
        t, row = self.place(i)
        return self.tasks[t][row]


class First(Task):
    """The first n rows of a streamed set, kept."""
    def __init__(self, task, n):
        self.name, self.to_conversation, self.rows = task.name, task.to_conversation, list(islice(task.rows, n))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.check_index(i)
        return self.to_conversation(self.rows[i], f"{self.name} row {i}")


class Shuffled(Task):
    """`size` samples of `task`: all of it in one order, then in another, ...; sample i is a matter of arithmetic."""
    def __init__(self, task, size, seed):
        self.task, self.size, self.seed, self.epoch, self.order = task, size, stable_hash(str(seed)), -1, None
        self.name = getattr(task, "name", type(task).__name__)  # what is drawn is logged under

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        epoch, k = divmod(i, len(self.task))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.task))
        return self.task[int(self.order[k])]


class Stream:
    """
    A set read in order, epoch after epoch, which may be larger than the disk. rows: a `datasets` IterableDataset, which shards itself
    over ranks and workers. Its pictures stay undecoded (Image(decode=False)) and rows raw until to_conversation(row, where), a plain
    function: an error inside the generators of `datasets` would end them. window: so many rows are shuffled among themselves (the
    buffer of `rows.shuffle` is lost on resume; a window is read again).
    """
    def __init__(self, rows, to_conversation, name, window=1, seed=0):
        self.rows, self.to_conversation, self.name, self.window, self.seed = rows, to_conversation, name, window, seed

    def draws(self, rank, world, worker, workers, state):
        """Endless (where, function that gives the conversation, state to go on after it)."""
        from datasets.distributed import split_dataset_by_node
        rows = split_dataset_by_node(self.rows, rank, world)  # a copy: the epoch of self.rows is shared by all workers
        state = state or {"epoch": 0, "rows": None, "row": 0, "taken": 0}  # rows: where the window begins; taken: of the window
        while True:
            epoch, at, row, taken = (state[key] for key in ("epoch", "rows", "row", "taken"))
            rows.set_epoch(epoch)
            if at:
                rows.load_state_dict(at)
            reader = iter(rows)
            while window := list(islice(reader, self.window)):
                order = random.Random(f"{self.seed}/{epoch}/{rank}/{worker}/{row}").sample(range(len(window)), len(window))
                for taken in range(taken + 1, len(window) + 1):
                    nth = order[taken - 1]
                    where = f"{self.name} epoch {epoch}, row {row + nth} of worker {worker} of rank {rank}"
                    yield where, partial(self.to_conversation, window[nth], where), dict(state, rows=at, row=row, taken=taken)
                at, row, taken = rows.state_dict(), row + len(window), 0
            if row == 0:
                raise ValueError(f"{self.name} has no row for worker {worker} of {workers} on rank {rank} of {world}: give --workers "
                                 f"no more than its {rows.num_shards} shards on this rank")
            state = {"epoch": epoch + 1, "rows": None, "row": 0, "taken": 0}


def draws(task, name, rank, world, worker, workers, state):
    """As Stream.draws, for a task with indices beside a Stream: every so-many-th row, epoch after epoch."""
    for n in range(state or 0, sys.maxsize):
        row = (n * world * workers + rank * workers + worker) % len(task)
        yield f"{name} row {row}", partial(task.__getitem__, row), n + 1
