"""
The place loss: while the model trains, the decoder is asked, before each character that it writes,
where on the page that character stands: on which vision token, and in which cell of it.

The local reading loss (local_loss.py) tells the encoder what its tokens show. On dense pages the
slow part is then that the decoder has to find its place: letters can be read off the tokens long
before it knows which of them comes next (FINDINGS.md). Rendered pages know, since their
glyphs are labeled in reading order.

The head reads the decoder's hidden states before its last block, so that one block is left to look
at the place and to name the character. As the local head, it is for training only.

Shapes: I labeled images, Q the most characters that one of them shows, P decoder positions of an
        image, C channels of the decoder's hidden states, (R, S) rows and columns of cells in a
        token.
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

TOKEN = "place"      # which vision token, nats per character
CELL = "place_cell"  # which row and which column of cells in that token, nats per character

POINTER_WIDTH = 64   # channels of the pointer's queries and keys
POINTER_SCALE = 0.5  # shrinks their products: at AdamW's rate, scores would overshoot without it


# -----------------------------------------------------------------------------
# What is asked

class Places(NamedTuple):
    """What is asked of the images with equal plans. Arrays of int64."""
    queries: np.ndarray  # (I, Q) where a character is about to be written, as indices into B * T
    keys: np.ndarray     # (I, P) the image's own positions, likewise
    tokens: np.ndarray   # (I, Q) which of the P positions shows the character, or IGNORE
    rows: np.ndarray     # (I, Q) in which of the token's R rows of cells, or IGNORE
    columns: np.ndarray  # (I, Q) in which of its S columns, or IGNORE


def places(batch, cells):
    """
    [Places, ...] of a batch. A character is looked for where it is shown largest: on a tile of a
    tiled page. Images whose text is not known to be that of their glyphs are left out.
    """
    by_plan = {}  # {plan: [(image, where its text is written, numbers of the glyphs)]}
    for image, said in batch.said.items():
        by_plan.setdefault(batch.plans[image], []).append((image, *said))
    return [places_of_plan(batch, plan, images, cells) for plan, images in by_plan.items()]


def places_of_plan(batch, plan, images, cells):
    longest = max(len(at) for _, at, _ in images)
    shape = (len(images), longest)
    queries = np.zeros(shape, dtype=np.int64)  # padding asks at position 0, for nothing
    tokens = np.full(shape, IGNORE, dtype=np.int64)
    rows = np.full(shape, IGNORE, dtype=np.int64)
    columns = np.full(shape, IGNORE, dtype=np.int64)
    keys = np.zeros((len(images), plan.positions), dtype=np.int64)
    for i, (image, at, glyphs) in enumerate(images):
        _, points = batch.labels[image]["glyphs"]
        position, row, column = where_shown(plan, points)
        n = len(at)
        queries[i, :n] = at
        tokens[i, :n] = position[glyphs]
        rows[i, :n] = cell_in_token(row[glyphs], cells[0])
        columns[i, :n] = cell_in_token(column[glyphs], cells[1])
        keys[i] = batch.image_at[image] + np.arange(plan.positions)
    return Places(queries, keys, tokens, rows, columns)


def cell_in_token(coordinates, n_cells):
    """Float token coordinates along an axis -> the cell, of n_cells, that each is in."""
    fraction = coordinates % 1  # of the token's side
    return (fraction * n_cells).astype(np.int64)


def where_shown(plan, points):
    """
    -> (position among the image's own, row and column in float token coordinates of its view) of
    every glyph of an image, in the order of the labels.
    """
    if plan.tiles:
        across = plan.cols
        view_side = plan.tile_side
        on_view = points[plan.mode.tile]
    else:
        across = 1
        view_side = plan.side
        on_view = points[plan.mode.size]
    # Tiles come first, and where they share a stack with the global view they are numbered first.
    shown = on_view.view < max(1, plan.tiles)
    order = np.argsort(on_view.index[shown])
    view = on_view.view[shown][order]
    row = on_view.row[shown][order]
    column = on_view.column[shown][order]

    # Views lie side by side as one page of tokens, with a newline after each of its rows.
    page_row = view // across * view_side + row.astype(np.int64)
    page_column = view % across * view_side + column.astype(np.int64)
    return page_row * (across * view_side + 1) + page_column, row, column


# -----------------------------------------------------------------------------
# The head

class PlaceHead(nn.Module):
    """
    Hidden states (B, T, C) -> for each character scores of the image's P positions, of the R rows
    and of the S columns of cells in a token. cells: (R, S)
    """
    def __init__(self, width, cells):
        super().__init__()
        self.cells = cells
        self.query = Linear(width, POINTER_WIDTH)
        self.key = Linear(width, POINTER_WIDTH)
        self.row = Linear(width, cells[0])
        self.column = Linear(width, cells[1])
        nn.init.normal_(self.query.weight, std=width ** -0.5)
        nn.init.zeros_(self.query.bias)
        # At first all places are equally likely.
        for linear in (self.key, self.row, self.column):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def ask(self, hidden, asked):
        """
        hidden (B, T, C), asked: Places -> (scores (I, Q, P) in fp32, states (I, Q, C) that ask).
        """
        hidden = F.layer_norm(hidden, hidden.shape[-1:]).flatten(0, 1)
        states = rows_at(hidden, asked.queries)
        shown = rows_at(hidden, asked.keys)
        scores = self.query(states) @ self.key(shown).mT
        return POINTER_SCALE * scores.float(), states

    def loss_counts(self, batch):
        """{name: characters that are asked for}"""
        n = sum(len(at) for at, _ in batch.said.values())
        return {TOKEN: n, CELL: n}

    def losses(self, taps, batch):
        """{name: (sum in nats, characters)}; taps: of DeepseekOCR.forward. No host-device sync."""
        hidden = taps["before_last_block"]
        # Without any labels the losses are zero, but the head still has a gradient.
        zero = weight_zero(self.parameters(), next(self.parameters()))
        token_nats = zero
        cell_nats = zero
        for asked in places(batch, self.cells):
            scores, states = self.ask(hidden, asked)
            token_nats = token_nats + sum_of_nats(scores, asked.tokens)
            cell_nats = cell_nats + sum_of_nats(self.row(states).float(), asked.rows)
            cell_nats = cell_nats + sum_of_nats(self.column(states).float(), asked.columns)
        counts = self.loss_counts(batch)
        return {TOKEN: (token_nats, counts[TOKEN]), CELL: (cell_nats, counts[CELL])}


def rows_at(hidden, at):
    """hidden (B * T, C), at (I, n) on the host -> (I, n, C)."""
    index = to_device(torch.from_numpy(at), hidden.device)
    return hidden.index_select(0, index.flatten()).unflatten(0, index.shape)


def sum_of_nats(scores, wanted):
    """Sum of cross-entropies of scores (I, Q, n) and wanted (I, Q), without those to IGNORE."""
    wanted = to_device(torch.from_numpy(wanted), scores.device)
    return F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE,
                           reduction="sum")


# -----------------------------------------------------------------------------
# The gauge

@torch.no_grad()
def place_accuracy(model, head, batches):
    """
    Share of the characters whose vision token the decoder points to before it writes them; None if
    no page has labels. Batches are shared out over ranks.
    """
    rank, _, world_size = dist_info()
    right = 0
    total = 0
    for batch in batches[rank::world_size]:
        taps = {}
        model(batch, taps=taps)
        for asked in places(batch, head.cells):
            scores, _ = head.ask(taps["before_last_block"], asked)
            pointed_at = scores.argmax(-1).cpu().numpy()
            is_asked = asked.tokens != IGNORE
            right += int((pointed_at == asked.tokens)[is_asked].sum())
            total += int(is_asked.sum())
    right, total = all_reduce([right, total])
    return right / total if total else None
