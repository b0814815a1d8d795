"""
Samples, and the batches they are collated into: what the model takes.
"""
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

IGNORE = -1
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

    def loss_counts(self):
        """{name of a loss: number that the model sums it over}, known on the host before a forward pass."""
        return {"text": self.supervised()}

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
