"""
DeepseekOCR: DeepEncoder + linear projector + GPT. Image features take the places of <|image|> placeholders in the
token embeddings (`fuse`); from there on the decoder reads one sequence.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.config import SECOND_STAGES
from nanochat.deepencoder import DeepEncoder
from nanochat.gpt import GPT
from nanochat.layers import Linear

LOSS_CHUNK = 1 << 26  # logits held at a time in the loss: 256 MB in fp32


def fuse(embeddings, is_image, features, features_per_row, placeholders=None):
    """
    Puts image features where the placeholders are. embeddings (B, T, C); is_image (B, T) bool; features (P, C), all rows'
    features in order; features_per_row: B ints. Counts are compared per row, not in total: a surplus in one row and a lack
    in the next would otherwise hand a page's features to its neighbour. placeholders: those of each row, counted from is_image
    if not given, for which the host must wait for the device.
    """
    placeholders = placeholders or is_image.sum(1).tolist()
    for row, (slots, given) in enumerate(zip(placeholders, features_per_row, strict=True)):
        if slots != given:
            raise ValueError(f"row {row} has {slots} <|image|> placeholders but {given} image features: the image mode used for "
                             f"tokens and the one used for pixels differ, or the row was cut inside an image")
    if sum(features_per_row) != features.size(0):
        raise ValueError(f"{features.size(0)} image features for {sum(features_per_row)} placeholders")
    return embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))


class Projector(nn.Module):
    def __init__(self, width_in, width_out):
        super().__init__()
        self.layers = Linear(width_in, width_out)

    def forward(self, x):
        return self.layers(x)


class DeepseekOCR(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # compute dtype; parameters are fp32
        n_embd = cfg.gpt.n_embd
        self.encoder = DeepEncoder(cfg)
        self.projector = Projector(self.encoder.width, n_embd)
        self.image_newline = nn.Parameter(torch.zeros(n_embd))
        self.view_seperator = nn.Parameter(torch.zeros(n_embd))  # the published name, sic
        self.gpt = GPT(cfg.gpt)

    def init_weights(self, seed):
        torch.manual_seed(seed)
        self.encoder.init_weights()
        nn.init.normal_(self.projector.layers.weight, std=self.projector.layers.in_features ** -0.5)
        nn.init.zeros_(self.projector.layers.bias)
        for vector in (self.image_newline, self.view_seperator):
            nn.init.normal_(vector, std=vector.numel() ** -0.5)
        self.gpt.init_weights()
        return self

    @property
    def device(self):
        return self.image_newline.device

    def project(self, pixels, taps=None):
        """(N, 3, S, S) uint8 -> (N, h, w, n_embd)."""
        x = pixels.to(self.device, non_blocking=True).to(self.dtype) / 127.5 - 1.0  # mean = std = 0.5, as published
        y = self.projector(self.encoder(x, taps))
        if taps is not None:
            taps["projector"] = y
        side = pixels.size(-1) // self.cfg.token_stride
        return y.view(y.size(0), side, side, -1)

    def rows_with_newline(self, grid):
        """(N, h, w, C) -> (N, h * (w + 1), C)."""
        N, h, _, C = grid.shape
        return torch.cat([grid, self.image_newline.to(grid.dtype).expand(N, h, 1, C)], 2).flatten(1, 2)

    def encode_images(self, views, plans):
        """
        views {side in px: (N, 3, side, side) uint8}, each image's tiles before its global view, images in order;
        plans: one image_modes.Plan per image. -> (positions of all images, n_embd): local, global, separator for each image.
        """
        grids = {side: self.project(pixels) for side, pixels in views.items()}
        separator = self.view_seperator.to(self.dtype)[None]
        used, pieces = dict.fromkeys(grids, 0), []
        for p in plans:
            if p.rows:
                n, t = p.rows * p.cols, p.tile_side
                tiles = grids[p.mode.tile][used[p.mode.tile]:][:n].view(p.rows, p.cols, t, t, -1)
                used[p.mode.tile] += n
                pieces.append(self.rows_with_newline(tiles.transpose(1, 2).reshape(1, p.rows * t, p.cols * t, -1))[0])
            pieces.append(self.rows_with_newline(grids[p.mode.size][used[p.mode.size]][None])[0])
            used[p.mode.size] += 1
            pieces.append(separator)
        if any(used[side] != len(g) for side, g in grids.items()):
            raise ValueError(f"views given per size {({s: len(g) for s, g in grids.items()})}, used by the plans {used}")
        return torch.cat(pieces)

    def embed(self, batch):
        """Token embeddings (B, T, C) of a batch with its images in place. Ids that are still on the host are counted there."""
        ids, placeholders = batch.ids.to(self.device, non_blocking=True), (batch.ids == self.cfg.image_token_id).sum(1).tolist()
        x = self.gpt.transformer.wte(ids).to(self.dtype)
        if batch.plans:
            x = fuse(x, ids == self.cfg.image_token_id, self.encode_images(batch.views, batch.plans), batch.features_per_row, placeholders)
        elif any(placeholders):
            row = next(r for r, n in enumerate(placeholders) if n)
            raise ValueError(f"row {row} has <|image|> placeholders but the batch has no images")
        elif self.training:
            # Parameters that a batch has no use for take part at weight zero: every parameter then has a gradient on every rank and step.
            seeing = [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("gpt.")]
            x = x + 0.0 * sum(p.sum() for p in seeing).to(x.dtype)
        return x

    def forward(self, batch):
        """
        -> {name: (sum in nats, number it is summed over)}. "text": next-token loss over the batch's supervised positions (targets != -1).
        The batch may stay on the host: what is needed goes to the device as it is needed, and the host waits for nothing.
        """
        positions, at, targets = (None if t is None else t.to(self.device, non_blocking=True)
                                  for t in (batch.positions, batch.supervised_at, batch.targets))
        hidden = self.gpt(self.embed(batch), positions=positions, lengths=batch.lengths)
        hidden, targets = hidden.flatten(0, 1).index_select(0, at), targets.flatten()[at]  # the head and its softmax run where there is something to learn
        rows = max(1, LOSS_CHUNK // self.cfg.gpt.vocab_size)
        if len(targets) <= rows:
            text = self.chunk_loss(hidden, targets)
        else:
            text = sum(checkpoint(self.chunk_loss, h, t, use_reentrant=False) for h, t in zip(hidden.split(rows), targets.split(rows)))
        return {"text": (text, batch.supervised())}

    def chunk_loss(self, hidden, targets):
        return F.cross_entropy(self.gpt.logits(hidden), targets, reduction="sum")

    def freeze(self, parts):
        """Parts that do not learn: sam-core (SAM as published, without the compressor behind it), clip, gpt. Gradients still pass through them."""
        found = {"sam-core": self.encoder.sam_model.core, self.encoder.kind: self.encoder.vision_model.parameters, "gpt": self.gpt.parameters}
        for part in parts:
            if part not in found:
                raise ValueError(f"--freeze={part}: must be of {', '.join(found)}")
            for p in found[part]():
                p.requires_grad_(False)

    def recompute(self, on=True):
        """Activation checkpointing in every block: a third more compute, a fraction of the memory."""
        for part in (self.encoder.sam_model, self.encoder.vision_model, self.gpt):
            part.recompute = on

    def compile_blocks(self, backend="inductor"):
        """
        torch.compile for every block, forward and backward: blocks of one kind and shape share their kernels, so this takes seconds where
        the whole network takes minutes. Shapes are static but for the number of images or rows: a grid of patches, one of the four lengths
        of rows that loop.py asks for. Evaluation stays eager: its shapes change at every step.
        """
        torch._dynamo.config.recompile_limit = 32  # lengths of rows, grids of several modes, numbers of packed rows
        torch._dynamo.config.optimize_ddp = False  # it would cut a block where a bucket of gradients is full
        for blocks in (self.encoder.sam_model.blocks, self.encoder.vision_model.blocks, self.gpt.transformer.h):
            for block in blocks:
                block.compile(dynamic=False, backend=backend)
        self.chunk_loss = torch.compile(self.chunk_loss, dynamic=True, backend=backend)  # every batch supervises another number of positions

    def num_params(self):
        return sum(p.numel() for p in self.parameters())


def forward_flops(cfg, views, text_positions, rows=1, head_positions=None, lengths=None):
    """
    Multiply-adds x 2 of one forward pass, by part. views: {side in px: count}; text_positions: decoder positions per row,
    images included; head_positions: how many go through the head, over all rows (default: all); lengths: of packed rows, lists of
    their samples' lengths. Matrix products and attention only; softmax, norms and gathers are not counted.
    """
    s, c, g = cfg.sam, cfg.second_stage, cfg.gpt
    second_stage = SECOND_STAGES[c.kind][1]
    sam = second = projector = 0
    for side, n in views.items():
        H = side // s.patch_size
        sam += n * 2 * H * H * 3 * s.patch_size ** 2 * s.width
        for i in range(s.depth):
            w = H if i in s.global_blocks else s.window
            padded = (-(-H // w) * w) ** 2
            sam += n * 2 * H * H * 12 * s.width ** 2
            sam += n * padded * (4 * w * w * s.width + 4 * w * s.width)  # attention; relative positions of both axes
        sam += n * 2 * (H * H * (s.width * s.neck + 9 * s.neck ** 2) + (H // 2) ** 2 * 9 * s.neck * s.net_2
                        + (H // 4) ** 2 * 9 * s.net_2 * s.net_3)
        second += n * second_stage.flops(c, H // 4, H // 4)
        projector += n * 2 * second_stage.tokens(c, H // 4, H // 4) * (c.width + s.net_3) * g.n_embd
    T = text_positions
    kv = g.n_embd * g.n_kv_head // g.n_head
    squares = sum(n * n for row in lengths for n in row) if lengths else rows * T * T
    gpt = g.n_layer * (2 * rows * T * (2 * g.n_embd ** 2 + 2 * g.n_embd * kv + 8 * g.n_embd ** 2) + 2 * squares * g.n_embd)  # causal: half of the square
    gpt += 2 * (rows * T if head_positions is None else head_positions) * g.n_embd * g.vocab_size
    return {"sam": sam, c.kind: second, "projector": projector, "gpt": gpt}
