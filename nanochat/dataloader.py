"""
From conversations to batches: task -> tokens and pixels -> Batch. Micro-batch k of rank r is a matter of arithmetic on
indices, so any step can be rebuilt, and a resumed run sees exactly what the unbroken one would have seen.
"""
import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from nanochat.image_modes import preprocess

IGNORE = -1


@dataclass
class Batch:
    """B conversations, one a row, padded on the right. Images of all rows in order."""
    ids: torch.Tensor                # (B, T) int64
    targets: torch.Tensor            # (B, T) int64: the next token where the assistant speaks, else -1
    views: dict = field(default_factory=dict)   # {side in px: (N, 3, side, side) uint8}, an image's tiles before its global view
    plans: list = field(default_factory=list)   # image_modes.Plan per image
    features_per_row: list = field(default_factory=list)
    characters: int = 0              # supervised characters

    @property
    def images(self):
        return len(self.plans)

    def supervised(self):
        return int((self.targets != IGNORE).sum())

    def to(self, device):
        def move(t):
            return t.to(device, non_blocking=True)
        return replace(self, ids=move(self.ids), targets=move(self.targets), views={s: move(v) for s, v in self.views.items()})

    def pin_memory(self):
        return replace(self, ids=self.ids.pin_memory(), targets=self.targets.pin_memory(),
                       views={s: v.pin_memory() for s, v in self.views.items()})

    def deranged(self):
        """The same text beside the next row's page: every image wrong. Needs one global view per row and at least two rows."""
        if len(self.plans) != len(self.ids) or len(set(self.plans)) != 1 or self.plans[0].rows or len(self.ids) < 2:
            raise ValueError("deranging images needs at least two rows with one image each, all of one untiled mode")
        return replace(self, views={s: v.roll(1, 0) for s, v in self.views.items()})


class Sampler:
    """Turns conversation i of a task into token ids, mask and pixels. Picklable: it travels to the loader's workers."""
    def __init__(self, task, tokenizer, mode, stride, max_tokens):
        self.task, self.tokenizer, self.mode, self.stride, self.max_tokens = task, tokenizer, mode, stride, max_tokens

    def __len__(self):
        return len(self.task)

    def __getitem__(self, i):
        conversation = self.task[i]
        images = [preprocess(image, self.mode, self.stride) for image in conversation["images"]]
        ids, mask = self.tokenizer.render_conversation(conversation, [p.positions for p, _, _ in images])
        if len(ids) > self.max_tokens + 1:
            raise ValueError(f"conversation {conversation['id']} takes {len(ids) - 1} positions, the limit is {self.max_tokens}: "
                             f"raise --max-seq-len or use shorter pages")
        characters = sum(len(m["content"]) for m in conversation["messages"] if m["role"] == "assistant")
        return ids, mask, images, characters


def collate(samples):
    T = max(len(ids) for ids, *_ in samples) - 1
    ids = np.zeros((len(samples), T), dtype=np.int64)
    targets = np.full((len(samples), T), IGNORE, dtype=np.int64)
    views, plans, per_row = {}, [], []
    for row, (tokens, mask, images, _) in enumerate(samples):
        n = len(tokens) - 1
        ids[row, :n] = tokens[:-1]
        targets[row, :n] = np.where(mask[1:], tokens[1:], IGNORE)  # position t predicts token t + 1
        per_row.append(sum(p.positions for p, _, _ in images))
        for p, view, tiles in images:
            plans.append(p)
            if p.rows:
                views.setdefault(p.mode.tile, []).extend(tiles)
            views.setdefault(p.mode.size, []).append(view)
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets), {s: torch.from_numpy(np.stack(v)) for s, v in views.items()},
                 plans, per_row, sum(c for *_, c in samples))


class Mixture:
    """Tasks in fixed integer shares, e.g. [(ocr, 9), (chat, 1)]: every run of sum(shares) samples has exactly these counts."""
    def __init__(self, parts):
        for task, share in parts:
            if share < 1 or share != int(share):
                raise ValueError(f"share {share} of {type(task).__name__}: must be a positive integer")
        self.tasks = [task for task, _ in parts]
        divisor = math.gcd(*(share for _, share in parts))
        parts = [(task, share // divisor) for task, share in parts]
        total = sum(share for _, share in parts)
        # spread each task evenly over the cycle: slot at (j + 1/2) / share
        order = sorted(((j + 0.5) / share, t) for t, (_, share) in enumerate(parts) for j in range(share))
        self.cycle = [(t, sum(1 for _, u in order[:pos] if u == t)) for pos, (_, t) in enumerate(order)]
        self.shares = [share for _, share in parts]
        self.length = min(len(task) // share for task, share in parts) * total

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        turn, slot = divmod(i, len(self.cycle))
        t, nth = self.cycle[slot]
        return self.tasks[t][turn * self.shares[t] + nth]


class MicroBatches:
    """Batch sampler: micro-batch k of this rank holds indices (k * world + rank) * size ... + size."""
    def __init__(self, start, stop, size, rank, world):
        self.start, self.stop, self.size, self.rank, self.world = start, stop, size, rank, world

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        for k in range(self.start, self.stop):
            first = (k * self.world + self.rank) * self.size
            yield range(first, first + self.size)


def loader(sampler, size, start, stop, rank=0, world=1, workers=0, pin_memory=False):
    """Iterator of Batch for micro-batches start..stop-1 of this rank. The task must be long enough: nothing is repeated."""
    needed = stop * world * size
    if needed > len(sampler):
        raise ValueError(f"{stop} micro-batches of {size} on {world} ranks need {needed} samples, the task has {len(sampler)}")
    return iter(torch.utils.data.DataLoader(
        sampler, batch_sampler=MicroBatches(start, stop, size, rank, world), collate_fn=collate, num_workers=workers,
        pin_memory=pin_memory, prefetch_factor=4 if workers else None))
