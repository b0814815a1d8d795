"""
Samples, and the batches they are collated into: what the model takes.
"""
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

IGNORE = -1  # target of a position that is not supervised
NO_GLYPH = -1  # of a token that prints nothing

# What `collate` counts, in addition to "drawn/<task>". slots: positions, padding included.
# no_places: pages with letter labels that give no targets for the place loss (glyphs_of_tokens).
COUNTS = ("images", "positions", "slots", "bad", "clipped", "dropped", "no_places")

NO_POINTS = ((), {})  # of an image without labels of a kind


class LabelPoints(NamedTuple):
    """Labeled points on all views of one size in a batch. Sequences of equal length."""
    values: list        # the label of each point
    view: np.ndarray    # index into Batch.views[side]
    row: np.ndarray     # float token coordinates, as in image_modes.TokenPoints
    column: np.ndarray


@dataclass
class Batch:
    """
    B rows of T positions, padded on the right: one conversation a row, or several when packed.
    Images are numbered through all rows, in the order of their placeholders.
    """
    ids: torch.Tensor      # (B, T) int64
    targets: torch.Tensor  # (B, T) int64: the next token where the assistant speaks, else IGNORE
    # {side in px: (N, 3, side, side) uint8}; an image's tiles come before its global view
    views: dict = field(default_factory=dict)
    plans: list = field(default_factory=list)  # image_modes.Plan of each image
    features_per_row: list = field(default_factory=list)  # image positions of each row
    characters: int = 0  # supervised characters
    # Packed rows only: (B, T) int64, each sample counts from 0; None = 0..T-1
    positions: torch.Tensor = None
    lengths: list = None  # packed rows only: the lengths of each row's samples
    owners: list = field(default_factory=list)  # number of each image's conversation
    counts: dict = field(default_factory=dict)  # COUNTS and "drawn/<task>": samples drawn
    state: dict = None  # a stream's worker after this batch: what `loader` resumes from
    # {kind: (values, {side: image_modes.TokenPoints})} of each image, {} without labels
    labels: list = field(default_factory=list)
    image_at: list = field(default_factory=list)  # each image's first position, as index into B * T
    # {image: (where a character of its text is about to be written, as indices into B * T,
    #          which of its labeled glyphs that is)}, int64 arrays of equal length
    said: dict = field(default_factory=dict)
    memo: dict = field(default_factory=dict)  # what a head has worked out from the labels, to keep
    # (n,) int64: where targets are not IGNORE, as indices into B * T
    supervised_at: torch.Tensor = field(init=False)

    def __post_init__(self):
        # Done here, while targets are on the host: nonzero() on a GPU tensor is a sync.
        supervised = self.targets.flatten() != IGNORE
        self.supervised_at = supervised.nonzero()[:, 0]

    @property
    def images(self):
        return len(self.plans)

    def supervised(self):
        return len(self.supervised_at)

    def labeled_views(self, kind):
        """
        {side in px: indices into Batch.views[side]} of the views of all images with labels of that
        kind. An image whose list of labels is empty is one of them: it is known to show nothing.
        """
        found = {}
        first_view = Counter()  # {side: number of the current image's first view}
        for plan, labels in zip(self.plans, self.labels):
            for side, n_views in plan.views.items():
                if kind in labels:
                    first = first_view[side]
                    found.setdefault(side, []).extend(range(first, first + n_views))
                first_view[side] += n_views
        return found

    def label_points(self, kind):
        """
        {side in px: LabelPoints}: the labels of that kind on the views of the whole batch. Sides
        without any are left out, and images without labels of that kind contribute nothing.
        """
        pieces = {}  # {side: [LabelPoints of one image, ...]}
        first_view = Counter()  # {side: number of the current image's first view}
        for plan, labels in zip(self.plans, self.labels):
            values, points = labels.get(kind, NO_POINTS)
            for side, at in points.items():
                if len(at.index):
                    shown = [values[i] for i in at.index]
                    view = at.view + first_view[side]  # numbered in the batch, no longer the image
                    piece = LabelPoints(shown, view, at.row, at.column)
                    pieces.setdefault(side, []).append(piece)
            first_view.update(plan.views)
        return {side: join_points(found) for side, found in pieces.items()}

    def map(self, f):
        """The same batch with f(t) in place of every tensor t."""
        changes = {"ids": f(self.ids), "targets": f(self.targets)}
        changes["views"] = {side: f(stack) for side, stack in self.views.items()}
        if self.positions is not None:
            changes["positions"] = f(self.positions)
        return replace(self, **changes)

    def to(self, device):
        return self.map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self):
        batch = self.map(torch.Tensor.pin_memory)
        # `replace` computes this field anew, in memory that is not pinned.
        batch.supervised_at = batch.supervised_at.pin_memory()
        return batch

    def deranged(self):
        """
        The same text beside the wrong pages: every image gets the pixels, and the labels, of an
        image with an equal plan from another conversation. ValueError if there is none.
        """
        if not self.plans:
            raise ValueError("deranging needs images, this batch has none")
        source = derangement(self.plans, self.owners)

        views = {}
        for side, stack in self.views.items():
            n_views = [plan.views.get(side, 0) for plan in self.plans]
            pieces = stack.split(n_views)  # one of each image, empty if it has none of this side
            views[side] = torch.cat([pieces[i] for i in source])
        labels = self.labels
        if labels:
            labels = [labels[i] for i in source]
        return replace(self, views=views, labels=labels, said={}, memo={})


def join_points(pieces):
    """LabelPoints of several images -> one."""
    values = []
    for piece in pieces:
        values.extend(piece.values)
    return LabelPoints(values,
                       np.concatenate([piece.view for piece in pieces]),
                       np.concatenate([piece.row for piece in pieces]),
                       np.concatenate([piece.column for piece in pieces]))


def derangement(plans, owners):
    """
    -> for each image the number of the one whose pixels it gets, which has an equal plan (as many
    positions) and another owner. ValueError if a plan is not found in enough conversations.
    """
    # The images of a conversation are neighbors within their group. Shifting the group by the
    # largest number of images that one conversation has there takes every image to another one.
    groups = {}  # {plan: images}
    for i, plan in enumerate(plans):
        groups.setdefault(plan, []).append(i)

    source = list(range(len(plans)))
    for plan, group in groups.items():
        images_of = Counter(owners[i] for i in group)
        shift = max(images_of.values())
        if len(group) < 2 * shift:  # wrapping around, some would get their own conversation
            raise ValueError(
                f"deranging needs each shape of image in two conversations or more; of "
                f"{plan.mode.name} with {plan.cols}x{plan.rows} tiles there are {len(group)}, "
                f"{shift} in one of them: use larger batches or an untiled mode")
        shifted = group[-shift:] + group[:-shift]
        for i, j in zip(group, shifted):
            source[i] = j
    return source


# -----------------------------------------------------------------------------
# Collating

class Sample(NamedTuple):
    """One conversation ready for `collate`; one that cannot be used has counts but no ids."""
    ids: list
    mask: list = ()        # 1 where the token is the assistant's
    images: list = ()      # [(plan, global view, tiles), ...]
    characters: int = 0    # supervised ones
    counts: dict = {}
    labels: list = ()      # per image {kind: (values, {side: TokenPoints})}; () = none
    image_at: list = ()    # where in ids each image begins
    # For each of the ids, which glyph of the only image's labels it begins with, NO_GLYPH if with
    # none; () where the text is not known to be that of the glyphs
    glyphs: list = ()

    @property
    def positions(self):
        return len(self.ids) - 1  # the last token is only a target


class Row:
    """A row of a batch that is being packed."""
    def __init__(self):
        self.samples = []  # their numbers
        self.positions = 0
        self.images = 0

    def add(self, number, positions, images):
        self.samples.append(number)
        self.positions += positions
        self.images += images


def pack_rows(lengths, images, row_length, max_images):
    """
    lengths, images: positions and images of each sample. -> rows, each a sorted list of sample
    numbers with at most row_length positions and max_images images: as few rows as possible when
    samples are placed longest first, each into the emptiest row that has room for it.
    """
    # Only samples of one micro-batch share rows, so which samples a batch holds stays arithmetic
    # on indices and resuming needs no state. The emptiest row instead of the first that fits
    # makes rows nearly equally long, and the longest sets T for all.
    fewest = -(-sum(lengths) // row_length)
    for n_rows in range(fewest, len(lengths) + 1):
        rows = try_packing(n_rows, lengths, images, row_length, max_images)
        if rows is not None:
            return [sorted(row.samples) for row in rows]
    raise ValueError(f"samples of up to {max(lengths)} positions and {max(images)} images do not "
                     f"fit rows of {row_length} positions and {max_images} images")


def try_packing(n_rows, lengths, images, row_length, max_images):
    """-> list of n_rows Rows that hold all samples, or None."""
    rows = [Row() for _ in range(n_rows)]
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in longest_first:
        best = None
        for row in rows:
            has_room = (row.positions + lengths[i] <= row_length
                        and row.images + images[i] <= max_images)
            if has_room and (best is None or row.positions < best.positions):
                best = row
        if best is None:
            return None
        best.add(i, lengths[i], images[i])
    return rows


def collate(samples, pack=0, max_images=0, multiple=1):
    """
    Samples -> Batch. pack: positions of a row for several samples, of max_images images at most;
    0 = one sample a row. Rows are padded to a multiple of `multiple` positions. Samples that
    cannot be used leave only their counts.
    """
    samples = [Sample(*sample) for sample in samples]  # plain tuples are welcome
    counts = Counter()
    for sample in samples:
        counts.update(sample.counts)
    samples = [sample for sample in samples if sample.ids]
    if not samples:
        samples = [Sample([0, 0], [0, 0])]  # a row that supervises nothing; ranks need a batch

    rows = arrange(samples, pack, max_images)
    row_lengths = []
    for row in rows:
        row_lengths.append([samples[i].positions for i in row])
    longest = max(sum(lengths) for lengths in row_lengths)
    T = -(-longest // multiple) * multiple  # rounded up
    ids, targets, positions = token_rows(samples, rows, T)
    images = Images()
    for r, row in enumerate(rows):
        images.add_row(samples, row, start=r * T)

    counts["images"] = len(images.plans)
    counts["positions"] = sum(sample.positions for sample in samples)
    counts["slots"] = ids.size
    batch = Batch(
        ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        views=images.stacks(),
        plans=images.plans,
        features_per_row=images.positions_per_row,
        characters=sum(sample.characters for sample in samples),
        owners=images.owners,
        counts=dict(counts),
        labels=images.labels,
        image_at=images.first_positions,
        said=images.said,
    )
    if pack:
        # Attention and rotary positions then go by sample, not by row.
        batch.positions = torch.from_numpy(positions)
        batch.lengths = row_lengths
    return batch


def arrange(samples, pack, max_images):
    """Which samples share a row: [[numbers of samples], ...]."""
    if not pack:
        return [[i] for i in range(len(samples))]
    lengths = [sample.positions for sample in samples]
    n_images = [len(sample.images) for sample in samples]
    return pack_rows(lengths, n_images, pack, max_images)


def token_rows(samples, rows, T):
    """-> (ids, targets, positions), (B, T) int64 each; rows: the numbers of each row's samples."""
    shape = (len(rows), T)
    ids = np.zeros(shape, dtype=np.int64)  # padding on the right: no token attends to it
    targets = np.full(shape, IGNORE, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            sample = samples[i]
            here = slice(start, start + sample.positions)
            ids[r, here] = sample.ids[:-1]
            # Position t predicts token t + 1, where the assistant says that one.
            following = sample.ids[1:]
            targets[r, here] = np.where(sample.mask[1:], following, IGNORE)
            positions[r, here] = np.arange(sample.positions)
            start = here.stop
    return ids, targets, positions


class Images:
    """The images of a batch that is being collated, and what belongs to each."""
    def __init__(self):
        self.views = {}  # {side in px: [(3, side, side) uint8, ...]}
        self.plans = []
        self.owners = []
        self.labels = []
        self.positions_per_row = []  # that images take in the decoder
        self.first_positions = []
        self.said = {}

    def add_row(self, samples, row, start):
        """start: the row's first position, as index into B * T."""
        self.positions_per_row.append(0)
        for i in row:
            self.add_sample(samples[i], i, start)
            start += samples[i].positions

    def add_sample(self, sample, owner, start):
        if sample.glyphs:
            # Position t predicts token t + 1, so that it is asked for that one's glyph.
            glyphs = np.array(sample.glyphs[1:], dtype=np.int64)
            at = np.flatnonzero(glyphs != NO_GLYPH)
            self.said[len(self.plans)] = (start + at, glyphs[at])
        for position in sample.image_at:
            self.first_positions.append(start + position)
        for plan, global_view, tiles in sample.images:
            self.plans.append(plan)
            self.owners.append(owner)
            self.positions_per_row[-1] += plan.positions
            if plan.tiles:
                self.views.setdefault(plan.mode.tile, []).extend(tiles)
            self.views.setdefault(plan.mode.size, []).append(global_view)
        # Every image has an entry, so that labels and plans have equal numbers.
        self.labels.extend(sample.labels or [{} for _ in sample.images])

    def stacks(self):
        """{side in px: (N, 3, side, side) uint8 tensor}."""
        stacks = {}
        for side, views in self.views.items():
            stacks[side] = torch.from_numpy(np.stack(views))
        return stacks
