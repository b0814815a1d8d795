"""
Ways to draw from tasks: several in fixed shares (Mixture), one in a new order each epoch
(Shuffled), one that can only be read in order (Stream), and the first rows of such a one (First).

All of them can be resumed. Of tasks with an index, sample i is plain arithmetic. A Stream yields
with every sample the state from which it continues.
"""
import math
import random
from collections import Counter
from functools import partial
from itertools import count, islice

import numpy as np

from nanochat.common import stable_hash
from nanochat.conversation import Task


def task_name(task):
    """The name a task is counted under; a plain list of conversations will do as a task, too."""
    return getattr(task, "name", type(task).__name__)


# -----------------------------------------------------------------------------
# Mixtures

def fingerprint(task):
    """Task.fingerprint; None of a stream or a plain list, which cannot tell."""
    return task.fingerprint() if isinstance(task, Task) else None


def fingerprints(train, val):
    """{name: fingerprint} of what training and validation read from disk."""
    named = {"validation": val}
    if isinstance(train, Mixture):
        named.update(zip(train.names, train.tasks))
    else:
        named[task_name(train)] = train
    found = {}
    for name, task in named.items():
        mark = fingerprint(task)
        if mark is not None:
            found[name] = mark
    return found


class Mixture:
    """
    Tasks in fixed integer shares, e.g. [(ocr, 9), (chat, 1)]: every cycle of sum(shares) samples
    has exactly these counts, and each task is read in its own order.

    If one of the tasks is a Stream, the mixture has no length and no random access: each of the
    loader's workers then walks through the cycle and draws the next sample of each task.
    """
    def __init__(self, parts):
        # Integers, so that a cycle has exactly these counts and any sample's place is arithmetic.
        for task, share in parts:
            if share < 1 or share != int(share):
                name = type(task).__name__
                raise ValueError(f"share {share} of {name}: must be a positive integer")
        self.parts = flatten(parts)
        # The loader asks for these side by side, by number of the task.
        self.tasks = [task for task, _ in self.parts]
        self.shares = [share for _, share in self.parts]
        self.total_share = sum(self.shares)
        self.names = unique_names(self.tasks)
        self.cycle = spread_evenly(self.shares)  # [(number t of the task, n-th of t in a cycle)]

        self.streams = any(isinstance(task, Stream) for task in self.tasks)
        self.length = 0
        if not self.streams:
            # Whole cycles only, until the first task runs out: the shares stay exact to the end.
            cycles = min(len(task) // share for task, share in self.parts)
            self.length = cycles * self.total_share

    def __len__(self):
        return self.length

    def place(self, i):
        """(number of the task, index in that task) of sample i."""
        turn, slot = divmod(i, len(self.cycle))  # cycles before this one, place in this one
        t, nth = self.cycle[slot]
        return t, turn * self.shares[t] + nth

    def __getitem__(self, i):
        t, row = self.place(i)
        return self.tasks[t][row]


def flatten(parts):
    """[(task, share)] with every mixture replaced by its tasks, in proportion, in lowest terms."""
    # A nested task's share is share * inner_share / total_share. All shares are first multiplied by
    # every total_share, so that each of these divisions is exact.
    scale = math.prod(task.total_share for task, _ in parts if isinstance(task, Mixture))
    flat = []
    for task, share in parts:
        if not isinstance(task, Mixture):
            flat.append((task, share * scale))
            continue
        unit = share * scale // task.total_share
        for inner_task, inner_share in task.parts:
            flat.append((inner_task, unit * inner_share))
    divisor = math.gcd(*(share for _, share in flat))
    return [(task, share // divisor) for task, share in flat]


def spread_evenly(shares):
    """One cycle as [(task number t, n-th sample of task t in the cycle), ...]."""
    # Sample j of a task that has n in a cycle belongs at (j + 1/2) / n of the way through it.
    slots = []
    for t, share in enumerate(shares):
        for j in range(share):
            slots.append(((j + 0.5) / share, t))
    cycle = []
    seen = Counter()
    for _, t in sorted(slots):
        cycle.append((t, seen[t]))
        seen[t] += 1
    return cycle


def unique_names(tasks):
    """The tasks' names; those that several tasks share get the task's number appended."""
    # The counters drawn/NAME in the logs must not add up two tasks.
    names = [task_name(task) for task in tasks]
    unique = []
    for t, name in enumerate(names):
        unique.append(name if names.count(name) == 1 else f"{name}-{t}")
    return unique


# -----------------------------------------------------------------------------
# Tasks with an index

class Shuffled(Task):
    """
    `size` samples of `task`: all of it in one random order, then all of it in another, and so on.
    Sample i depends on (task, seed, i) alone, whoever draws it.
    """
    def __init__(self, task, size, seed):
        self.task = task
        self.size = size
        self.seed = stable_hash(str(seed))  # numpy takes integers only, ours are often strings
        self.name = task_name(task)
        # Neighboring samples need the same permutation, so the last one is kept.
        self.epoch = None
        self.order = None

    def __len__(self):
        return self.size

    def fingerprint(self):
        return fingerprint(self.task)

    def __getitem__(self, i):
        epoch, k = divmod(i, len(self.task))
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.order = rng.permutation(len(self.task))
            self.epoch = epoch
        return self.task[int(self.order[k])]


class First(Task):
    """The first n rows of a streamed task (tasks/rows.py), kept in memory."""
    def __init__(self, task, n):
        self.name = task.name
        self.to_conversation = task.to_conversation
        self.rows = list(islice(task.rows, n))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.check_index(i)
        return self.to_conversation(self.rows[i], f"{self.name} row {i}")


# -----------------------------------------------------------------------------
# Tasks that are read in order. draws() is what a worker of the loader reads: an endless iterator
# over (where, get, state). `where` names the sample in errors. get() makes the conversation; it is
# a function so that an error in it does not end the iterator. `state` is plain JSON, and draws()
# continues after this sample when given it.

class Stream:
    """
    A data set that may be larger than the disk, read in order, epoch after epoch.

    rows             a `datasets` IterableDataset, which splits its shards over ranks and workers
    to_conversation  plain function (row, where) -> conversation. Rows stay raw, pictures undecoded
                     (Image(decode=False)), until then: an error inside the generators of `datasets`
                     would end them
    window           so many rows are shuffled among themselves. (The buffer of rows.shuffle() would
                     be lost on resume; a window is simply read again.)
    """
    def __init__(self, rows, to_conversation, name, window=1, seed=0):
        self.rows = rows
        self.to_conversation = to_conversation
        self.name = name
        self.window = window
        self.seed = seed

    def draws(self, rank, world, worker, workers, state):
        """
        state: None at the start, or the state that came with the last sample used:
            epoch  number of passes over the set that are complete
            rows   state_dict of the IterableDataset at the start of the window, None = of the epoch
            row    number of rows of this worker before the window
            taken  number of samples drawn from the window
        """
        from datasets.distributed import split_dataset_by_node
        # This makes a copy. The epoch of self.rows is shared memory, common to all workers.
        rows = split_dataset_by_node(self.rows, rank, world)
        start = state or new_epoch(0)
        while True:
            epoch = start["epoch"]
            n_windows = 0
            for window, at in self.windows(rows, start):
                n_windows += 1
                order = self.order(len(window), f"{epoch}/{rank}/{worker}/{at['row']}")
                for taken in range(at["taken"], len(window)):
                    nth = order[taken]
                    row = f"row {at['row'] + nth} of worker {worker} of rank {rank}"
                    where = f"{self.name} epoch {epoch}, {row}"
                    get = partial(self.to_conversation, window[nth], where)
                    yield where, get, dict(at, taken=taken + 1)

            # A resumed epoch may have no window left. A whole one without rows would loop forever.
            if n_windows == 0 and start["row"] == 0:
                reader = f"worker {worker} of {workers} on rank {rank} of {world}"
                limit = f"its {rows.num_shards} shards on this rank"
                raise ValueError(f"{self.name} has no row for {reader}: "
                                 f"give --workers no more than {limit}")
            start = new_epoch(epoch + 1)

    def windows(self, rows, state):
        """What is left of an epoch: iterator over (list of rows, state before the first one)."""
        rows.set_epoch(state["epoch"])
        if state["rows"]:
            rows.load_state_dict(state["rows"])
        reader = iter(rows)
        while True:
            window = list(islice(reader, self.window))
            if not window:
                return
            yield window, state
            # Asked for only now: what is not yet read from `rows` is what a resumed run reads.
            state = {
                "epoch": state["epoch"],
                "rows": rows.state_dict(),
                "row": state["row"] + len(window),
                "taken": 0,
            }

    def order(self, n, which):
        """A permutation of range(n), the same each time this window is read."""
        return random.Random(f"{self.seed}/{which}").sample(range(n), n)


def new_epoch(epoch):
    """The state of a Stream before the first row of an epoch."""
    return {"epoch": epoch, "rows": None, "row": 0, "taken": 0}


def draws(task, name, rank, world, worker, workers, state):
    """
    The same for a task with an index that is mixed with a Stream: each worker of each rank takes
    every n-th row, epoch after epoch. state: number of samples drawn so far, or None.
    """
    # Reader r takes rows r, r + readers, ...; past the end of the task it starts over.
    readers = world * workers
    reader = rank * workers + worker
    for n in count(state or 0):
        row = (n * readers + reader) % len(task)
        yield f"{name} row {row}", partial(task.__getitem__, row), n + 1
