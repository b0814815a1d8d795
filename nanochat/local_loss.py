"""
The local reading loss: while the model trains, a linear head asks every vision token which letters
it shows. Rendered pages know the answer, since they were printed glyph by glyph.

The area of a token is divided into cells, and each cell is asked which character has the center of
its ink there, or whether none has. So the encoder is told what it sees. Otherwise it learns through
the decoder alone, which at first gains more from its language prior than from the page (with AdamW
all pages then come to look the same, FINDINGS.md).

The head is for training only. It is not part of the model and not saved with it; a run keeps it
with the optimizer state.

Shapes: N views, h tokens along a side of a view, (R, S) rows and columns of cells in a token,
        C channels of the encoder's features.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.batch import IGNORE
from nanochat.common import all_reduce, dist_info, to_device
from nanochat.layers import Linear
from nanochat.model import weight_zero

# The two losses, each a mean over cells of its own kind. Four cells in five of a page of large
# print are empty, and one in three of a dense page: in one mean over all cells they would drown
# the letters, and by how much would depend on the page.
INK = "local"          # over cells that hold a character
EMPTY = "local_empty"  # over cells of labeled pages that hold none
EMPTY_WEIGHT = 0.5     # beside 1 for INK

# A cell is no larger than the smallest letters that can be told apart, so that few share a cell.
CELL_WIDTH = 4   # px of a view
CELL_HEIGHT = 8

# Classes of a cell: none, and the 95 printable characters of ASCII.
NONE = 0
CLASSES = 96
CLASS_OF = {chr(31 + k): k for k in range(1, CLASSES)}  # " " is 1, "~" is 95


# -----------------------------------------------------------------------------
# What is asked

class CellTargets(NamedTuple):
    """The cells of the labeled views of one size."""
    views: list          # n indices into Batch.views[side]
    classes: np.ndarray  # (n, h * h, R * S) int64: NONE, a character's class, or IGNORE


def cells_of(stride):
    """(rows, columns) of cells in a token that covers stride x stride px."""
    return max(1, stride // CELL_HEIGHT), max(1, stride // CELL_WIDTH)


def cell_targets(batch, stride, cells):
    """
    {side in px: CellTargets}. Views of images without labels are left out: nothing is known about
    them. Where the centers of several glyphs are in one cell, the first one in reading order
    counts. Cells with a character outside of ASCII are not asked (IGNORE).
    """
    points = batch.label_points("glyphs")
    targets = {}
    for side, views in batch.labeled_views("glyphs").items():
        h = side // stride
        rows = h * cells[0]
        columns = h * cells[1]
        classes = np.full((len(batch.views[side]), rows, columns), NONE, dtype=np.int64)
        if side in points:
            mark_glyphs(classes, points[side], cells)
        targets[side] = CellTargets(views, by_token(classes[views], h, cells))
    return targets


def mark_glyphs(classes, points, cells):
    """Writes the classes of LabelPoints into (N, h * R, h * S)."""
    _, rows, columns = classes.shape
    # Coordinates are below h, but their product with R may be rounded up to h * R.
    row = np.minimum((points.row * cells[0]).astype(np.int64), rows - 1)
    column = np.minimum((points.column * cells[1]).astype(np.int64), columns - 1)
    values = np.array([CLASS_OF.get(value, IGNORE) for value in points.values])
    cell = (points.view * rows + row) * columns + column  # numbered through all views
    # Which one numpy would keep of several values for one cell is not defined.
    cell, first = np.unique(cell, return_index=True)
    np.put(classes, cell, values[first])


def by_token(classes, h, cells):
    """(n, h * R, h * S) -> (n, h * h, R * S): the order in which the head answers."""
    R, S = cells
    classes = classes.reshape(-1, h, R, h, S).transpose(0, 1, 3, 2, 4)  # (n, h, h, R, S)
    return classes.reshape(-1, h * h, R * S)


def count_cells(targets):
    """(cells with a known character, empty cells) of {side: CellTargets}."""
    ink = 0
    empty = 0
    for _, classes in targets.values():
        ink += int((classes > NONE).sum())
        empty += int((classes == NONE).sum())
    return ink, empty


# -----------------------------------------------------------------------------
# The head

class LocalHead(nn.Module):
    """
    Encoder features (N, n, C) -> logits of each cell (N, n, R * S, CLASSES).

    stride: px that a token covers along a side; cells: (R, S), default: cells of 4 x 8 px
    """
    def __init__(self, width, stride, cells=None):
        super().__init__()
        self.stride = stride
        self.cells = cells or cells_of(stride)
        rows, columns = self.cells
        self.linear = Linear(width, rows * columns * CLASSES)
        # Zero, as the decoder's head: no random number is drawn, so everything else starts as it
        # would without this loss.
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def targets(self, batch):
        """cell_targets of the batch. A step needs them twice, so they are kept."""
        key = (self.stride, self.cells)
        if key not in batch.memo:
            batch.memo[key] = cell_targets(batch, self.stride, self.cells)
        return batch.memo[key]

    def forward(self, features):
        # Features may have any scale, and without this single steps of AdamW threw the head off:
        # losses of 2 jumped to 20, and nano learned half as fast (gap after 300 steps 0.53 nats
        # per character, 1.02 with this).
        features = F.layer_norm(features, features.shape[-1:])
        return self.linear(features).unflatten(-1, (-1, CLASSES))

    def loss_counts(self, batch):
        """{name: cells}, on all views: a tile and the global view."""
        ink, empty = count_cells(self.targets(batch))
        return {INK: ink, EMPTY: empty}

    def losses(self, taps, batch):
        """
        {name: (sum of cross-entropies in nats, cells)}, over cells with ink and over empty ones.
        taps: of DeepseekOCR.forward. No host-device sync.
        """
        targets = self.targets(batch)
        features = taps["features"]
        # Without any labels the losses are zero, but the head still has a gradient.
        some = next(self.parameters())
        ink = weight_zero(self.parameters(), some)
        empty = torch.zeros_like(ink)
        for side, (views, classes) in targets.items():
            logits, classes = self.ask(features[side], views, classes)
            nats = F.cross_entropy(logits, classes, ignore_index=IGNORE, reduction="none")
            ink = ink + (nats * (classes > NONE)).sum()
            empty = empty + (nats * (classes == NONE)).sum()
        n_ink, n_empty = count_cells(targets)
        return {INK: (ink, n_ink), EMPTY: (empty, n_empty)}

    def ask(self, features, views, classes):
        """-> (logits (cells, CLASSES) in fp32, classes (cells,)) of these views, on the device."""
        views = to_device(torch.tensor(views), features.device)
        # Megabytes on dense pages, so they travel in two bytes each.
        classes = to_device(torch.from_numpy(classes.astype(np.int16)), features.device).long()
        logits = self(features.index_select(0, views))
        return logits.flatten(0, 2).float(), classes.flatten()


# -----------------------------------------------------------------------------
# The gauge

@torch.no_grad()
def local_accuracy(model, head, batches):
    """
    Share of the cells with ink whose character the head names; None if no page has labels. Batches
    are shared out over ranks.
    """
    rank, _, world_size = dist_info()
    right = 0
    asked = 0
    for batch in batches[rank::world_size]:
        for side, (views, classes) in head.targets(batch).items():
            features = model.features(batch.views[side])
            logits, classes = head.ask(features, views, classes)
            ink = classes > NONE
            right += int((logits.argmax(-1) == classes)[ink].sum())
            asked += int(ink.sum())
    right, asked = all_reduce([right, asked])
    return right / asked if asked else None
