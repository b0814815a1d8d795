"""
From conversations to batches: task -> tokens and pixels -> Batch. Micro-batch k of rank r is a matter of arithmetic on
indices, so any step can be rebuilt, and a resumed run sees exactly what the unbroken one would have seen. Where a set can only be
read in order (Stream), a batch carries the state that does the same.
"""
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from nanochat.image_modes import plan, preprocess
from tasks.common import BadSample, open_image

IGNORE = -1
UNUSABLE = (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError)  # what malformed rows give rise to
COUNTS = ("images", "positions", "slots", "bad", "clipped", "dropped")  # slots: positions and padding


@dataclass
class Batch:
    """B rows of T positions, padded on the right: a conversation a row, or several when packed. Images of all rows in order."""
    ids: torch.Tensor                # (B, T) int64
    targets: torch.Tensor            # (B, T) int64: the next token where the assistant speaks, else -1
    views: dict = field(default_factory=dict)   # {side in px: (N, 3, side, side) uint8}, an image's tiles before its global view
    plans: list = field(default_factory=list)   # image_modes.Plan per image
    features_per_row: list = field(default_factory=list)
    characters: int = 0              # supervised characters
    positions: torch.Tensor = None   # (B, T) int64 of packed rows: each sample counts from 0; None = 0..T-1
    lengths: list = None             # of packed rows: for each row the lengths of its samples
    owners: list = field(default_factory=list)  # number of the conversation per image
    counts: dict = field(default_factory=dict)  # COUNTS, and "drawn/<task>": samples drawn
    state: dict = None               # of a stream's worker after this batch: what `loader` goes on from
    supervised_at: torch.Tensor = field(init=False)  # (n,) int64: where targets are not -1, as indices into B * T

    def __post_init__(self):
        self.supervised_at = (self.targets.flatten() != IGNORE).nonzero()[:, 0]  # on the host: asked of a device, one has to wait for it

    @property
    def images(self):
        return len(self.plans)

    def supervised(self):
        return len(self.supervised_at)

    def map(self, f):
        """The same batch with every tensor t as f(t)."""
        return replace(self, ids=f(self.ids), targets=f(self.targets), views={s: f(v) for s, v in self.views.items()},
                       positions=None if self.positions is None else f(self.positions))

    def to(self, device):
        return self.map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self):
        batch = self.map(torch.Tensor.pin_memory)
        batch.supervised_at = batch.supervised_at.pin_memory()
        return batch

    def deranged(self):
        """The same text beside other pages: every image gets the pixels of one with an equal plan from another conversation."""
        source = list(range(self.images))  # whose pixels each image gets
        for shape in dict.fromkeys(self.plans):
            group = [i for i, p in enumerate(self.plans) if p == shape]
            shift = max(Counter(self.owners[i] for i in group).values())  # past the images of one's own conversation
            if len(group) < 2 * shift:
                raise ValueError(f"deranging needs each shape of image in two conversations or more; of {shape.mode.name} with "
                                 f"{shape.cols}x{shape.rows} tiles there are {len(group)}, {shift} in one of them: use larger batches "
                                 f"or an untiled mode")
            for i, j in zip(group, group[-shift:] + group[:-shift]):
                source[i] = j
        if not source:
            raise ValueError("deranging needs images, this batch has none")
        pieces = {side: v.split([p.views.get(side, 0) for p in self.plans]) for side, v in self.views.items()}
        return replace(self, views={side: torch.cat([pieces[side][i] for i in source]) for side in self.views})


class Sample(NamedTuple):
    """One conversation ready for `collate`; one that cannot be used has no ids, only counts."""
    ids: list
    mask: list = ()
    images: list = ()                # [(plan, global view, tiles), ...]
    characters: int = 0
    counts: dict = {}


class Sampler:
    """
    Turns conversation i of a task into a Sample. Picklable: it travels to the loader's workers. mode: a Mode, or several, which
    samples take in turn, shifted by one in every round of a mixture, so that no task keeps to one of them. Samples that do not fit:
    bad_data  raise | skip: null or empty text, unreadable picture, missing column, ...; what is skipped is counted and named on stderr
    too_long  raise | clip | drop: over max_tokens positions. Text is clipped at its end; a sample is dropped where that would cut an
              image or leave no answer, or if it has over max_images images
    pack      positions of a row for several samples, with max_images images at most; 0 = one sample a row
    multiple  rows are padded to a multiple of so many positions: few shapes, where each is compiled on its own
    """
    def __init__(self, task, tokenizer, mode, stride, max_tokens, bad_data="raise", too_long="raise", max_images=16, pack=0, multiple=1):
        if pack and pack < max_tokens:
            raise ValueError(f"--pack={pack}: a packed row must hold the longest sample, --max-seq-len={max_tokens} positions")
        self.modes = mode if isinstance(mode, list) else [mode]
        for mode in self.modes:
            plan(mode, 1, 1, stride)  # a stride that does not fit the mode raises now: it is no fault of the data
        self.task, self.tokenizer, self.stride, self.max_tokens = task, tokenizer, stride, max_tokens
        self.bad_data, self.too_long, self.max_images, self.pack, self.multiple = bad_data, too_long, max_images, pack, multiple
        self.mixture = task if isinstance(task, Mixture) else Mixture([(task, 1)])
        self.counters = [*COUNTS, *(f"drawn/{name}" for name in self.mixture.names)]

    def __len__(self):
        return len(self.task)

    def __getitem__(self, i):
        t, row = self.mixture.place(i)
        return self.sample(i, t, f"{self.mixture.names[t]} row {row}", partial(self.mixture.tasks[t].__getitem__, row))

    def sample(self, i, t, where, get):
        """Conversation get(), number i of the mixture and of its task number t -> Sample. where: data set and row, for errors."""
        mode = self.modes[(i + i // len(self.mixture.cycle)) % len(self.modes)]
        counts = {f"drawn/{self.mixture.names[t]}": 1}
        try:
            conversation = get()
            for m in conversation["messages"]:
                parts = m["content"] if isinstance(m["content"], (list, tuple)) else [{"type": "text", "text": m["content"]}]
                if m["role"] != "system" and not any(p["type"] == "image" or (p["text"] or "").strip() for p in parts):
                    raise BadSample(f"{where}: a message of the {m['role']} is null or empty")
            images = [preprocess(open_image(image, where), mode, self.stride) for image in conversation["images"]]
            ids, mask = self.tokenizer.render_conversation(conversation, [p.positions for p, _, _ in images])
            if not any(mask):
                raise BadSample(f"{where}: nothing for the assistant to say")
        except UNUSABLE as e:
            bad = e if isinstance(e, BadSample) else BadSample(f"{where}: {type(e).__name__}: {e}")
            if self.bad_data != "skip":
                raise bad from e.__cause__ if bad is e else e
            sys.stderr.write(f"skipped {bad}\n")  # in one piece: several workers write
            return Sample([], counts={**counts, "bad": 1})
        end = self.max_tokens + 1  # the last token is only a target
        if len(ids) > end or len(images) > self.max_images:
            if self.too_long == "raise":
                raise ValueError(f"{where}: conversation {conversation.get('id', '?')} takes {len(ids) - 1} positions and {len(images)} "
                                 f"images, the limit is {self.max_tokens} and {self.max_images}: raise --max-seq-len or --max-images, "
                                 f"use shorter pages, or --too-long=clip|drop")
            whole = len(images) <= self.max_images and self.tokenizer.image_token_id not in ids[end:] and any(mask[1:end])
            if self.too_long == "drop" or not whole:
                return Sample([], counts={**counts, "dropped": 1})
            ids, mask, counts = ids[:end], mask[:end], {**counts, "clipped": 1}
        said = [token for token, m in zip(ids, mask) if m and token < len(self.tokenizer.ranks)]
        return Sample(ids, mask, images, len(self.tokenizer.decode(said)), counts)


def pack_rows(lengths, images, row_length, max_images):
    """
    Rows, lists of sample numbers, of at most row_length positions and max_images images: the fewest in which all find a place, the
    longest sample first, each in the emptiest row with room. Only the samples of one micro-batch share rows, so which samples it holds
    stays arithmetic on indices and a resume needs no state. Emptiest, not first fit: rows come out nearly equal, and T is the longest.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for n in range(-(-sum(lengths) // row_length), len(lengths) + 1):
        rows, used, pictures = [[] for _ in range(n)], [0] * n, [0] * n
        for i in order:
            fit = [r for r in range(n) if used[r] + lengths[i] <= row_length and pictures[r] + images[i] <= max_images]
            if not fit:
                break
            r = min(fit, key=used.__getitem__)
            rows[r], used[r], pictures[r] = [*rows[r], i], used[r] + lengths[i], pictures[r] + images[i]
        else:
            return [sorted(row) for row in rows]


def collate(samples, pack=0, max_images=0, multiple=1):
    """Samples -> Batch, its rows padded to a multiple of `multiple`; samples that cannot be used leave only their counts."""
    samples = [Sample(*s) for s in samples]
    counts = sum((Counter(s.counts) for s in samples), Counter())
    samples = [s for s in samples if s.ids] or [Sample([0, 0], [0, 0])]  # nothing to use: a row that teaches nothing
    lengths = [len(s.ids) - 1 for s in samples]
    rows = pack_rows(lengths, [len(s.images) for s in samples], pack, max_images) if pack else [[i] for i in range(len(samples))]
    T = -(-max(sum(lengths[i] for i in row) for row in rows) // multiple) * multiple
    ids, positions = (np.zeros((len(rows), T), dtype=np.int64) for _ in range(2))
    targets = np.full((len(rows), T), IGNORE, dtype=np.int64)
    views, plans, owners, per_row = {}, [], [], []
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            (tokens, mask, images, *_), n = samples[i], lengths[i]
            ids[r, at:at + n] = tokens[:-1]
            targets[r, at:at + n] = np.where(mask[1:], tokens[1:], IGNORE)  # position t predicts token t + 1
            positions[r, at:at + n] = np.arange(n)
            at += n
            for p, view, tiles in images:
                plans.append(p)
                owners.append(i)
                if p.rows:
                    views.setdefault(p.mode.tile, []).extend(tiles)
                views.setdefault(p.mode.size, []).append(view)
        per_row.append(sum(p.positions for i in row for p, _, _ in samples[i].images))
    counts.update(images=len(plans), positions=sum(lengths), slots=ids.size)
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets), {s: torch.from_numpy(np.stack(v)) for s, v in views.items()}, plans,
                 per_row, sum(s.characters for s in samples), torch.from_numpy(positions) if pack else None,
                 [[lengths[i] for i in row] for row in rows] if pack else None, owners, dict(counts))


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


def micro_batches(start, stop, size, rank, world):
    """The samples of this rank's micro-batches start..stop-1: number k holds (k * world + rank) * size ... + size."""
    return [range(first, first + size) for first in ((k * world + rank) * size for k in range(start, stop))]


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


class StreamBatches(torch.utils.data.IterableDataset):
    """Micro-batches start..stop-1 of a rank; number k is made by worker k % workers, which is the order in which DataLoader asks them."""
    def __init__(self, sampler, collate, size, start, stop, rank, world, workers, states):
        self.sampler, self.collate, self.size, self.start, self.stop = sampler, collate, size, start, stop
        self.rank, self.world, self.workers, self.states = rank, world, workers, states

    def __iter__(self):
        mixture, worker = self.sampler.mixture, getattr(torch.utils.data.get_worker_info(), "id", 0)
        state = self.states.get(str(worker)) or {"drawn": 0, "parts": [None] * len(mixture.tasks)}
        drawn, parts = state["drawn"], list(state["parts"])
        shares = (self.rank, self.world, worker, self.workers)
        sources = [task.draws(*shares, part) if isinstance(task, Stream) else draws(task, name, *shares, part)
                   for task, name, part in zip(mixture.tasks, mixture.names, parts)]
        for k in range(self.start - self.start % self.workers + worker, self.stop, self.workers):
            if k < self.start:
                yield None  # its turn in this round was before the stop
                continue
            samples = []
            for drawn in range(drawn + 1, drawn + self.size + 1):
                t, _ = mixture.cycle[(drawn - 1) % len(mixture.cycle)]
                where, get, parts[t] = next(sources[t])
                samples.append(self.sampler.sample(drawn - 1, t, where, get))
            yield replace(self.collate(samples), state={"worker": worker, "workers": self.workers, "drawn": drawn, "parts": list(parts)})


def loader(sampler, size, start, stop, rank=0, world=1, workers=0, pin_memory=False, states=None):
    """
    Iterator of Batch for micro-batches start..stop-1 of this rank. A task with indices must be long enough: nothing is repeated.
    states: {worker: Batch.state of its last batch}, for a stream that goes on.
    """
    make = partial(collate, pack=sampler.pack, max_images=sampler.max_images, multiple=sampler.multiple)
    common = dict(num_workers=workers, pin_memory=pin_memory, prefetch_factor=4 if workers else None)
    if sampler.mixture.streams:
        if any(s["workers"] != max(1, workers) for s in (states or {}).values()):
            raise ValueError(f"--workers={workers}: a stream goes on with as many workers as it was begun with")
        stream = StreamBatches(sampler, make, size, start, stop, rank, world, max(1, workers), states or {})
        return filter(None, torch.utils.data.DataLoader(stream, batch_size=None, **common))
    needed = stop * world * size
    if needed > len(sampler):
        raise ValueError(f"{stop} micro-batches of {size} on {world} ranks need {needed} samples, the task has {len(sampler)}")
    return iter(torch.utils.data.DataLoader(
        sampler, batch_sampler=micro_batches(start, stop, size, rank, world), collate_fn=make, **common))


def ahead(batches, device):
    """
    The same batches, their pixels on the device. On CUDA the next batch's travel on a stream of their own while this one is computed
    with; the rest of a batch is small, and the model takes it from pinned memory itself.
    """
    def send(batch):
        batch.views = {side: v.to(device, non_blocking=True) for side, v in batch.views.items()}
        return batch
    if device.type != "cuda":
        yield from map(send, batches)
        return
    copies, waiting = torch.cuda.Stream(), None
    for batch in batches:
        with torch.cuda.stream(copies):
            sent = send(batch)
        if waiting is not None:
            yield waiting
        torch.cuda.current_stream().wait_stream(copies)
        for v in sent.views.values():
            v.record_stream(torch.cuda.current_stream())  # its memory is not given away before this stream is done with it
        waiting = sent
    if waiting is not None:
        yield waiting
