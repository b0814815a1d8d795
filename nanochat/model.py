"""
DeepseekOCR: DeepEncoder + linear projector + GPT. Image features take the places of the <|image|>
placeholders among the token embeddings (`fuse`); from there on the decoder reads one sequence.

Shapes: N views of S px a side, (h, w) vision tokens of a view, P image positions in all rows,
        B rows, T positions, C = n_embd.
"""
import math
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.common import to_device
from nanochat.deepencoder import DeepEncoder
from nanochat.gpt import GPT
from nanochat.layers import Linear

# Logits that the loss holds at a time: 256 MB in fp32, on a GPU 1 GB, since thin products waste it.
LOSS_CHUNK = 1 << 26
LOSS_CHUNK_CUDA = 1 << 28


def fuse(embeddings, is_image, features, features_per_row):
    """
    Puts image features where the placeholders are.

    embeddings (B, T, C); is_image (B, T) bool, on the host to avoid a GPU sync; features
    (P, C), those of all rows in order; features_per_row: B ints.

    Counts are compared per row, not in total. Otherwise a surplus in one row and a lack in the
    next would give a page's features to its neighbor, and no error would tell.
    """
    placeholders = is_image.sum(1).tolist()
    for row, (slots, given) in enumerate(zip(placeholders, features_per_row, strict=True)):
        if slots != given:
            raise ValueError(
                f"row {row} has {slots} <|image|> placeholders but {given} image features: the "
                f"image mode used for tokens and the one used for pixels differ, or the row was "
                f"cut inside an image")
    if sum(features_per_row) != features.size(0):
        raise ValueError(f"{features.size(0)} image features for {sum(features_per_row)} "
                         f"placeholders")
    # The host knows where they go. masked_scatter would work it out on the GPU, and its backward
    # pass would sync.
    at = is_image.flatten().nonzero()[:, 0]  # (P,)
    at = to_device(at, embeddings.device)
    fused = embeddings.flatten(0, 1).index_copy(0, at, features.to(embeddings.dtype))
    return fused.view_as(embeddings)


class Projector(nn.Module):
    def __init__(self, width_in, width_out):
        super().__init__()
        self.layers = Linear(width_in, width_out)  # the published name

    def forward(self, x):
        return self.layers(x)


class DeepseekOCR(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # compute dtype; parameters are always fp32
        self.compiled = False
        n_embd = cfg.gpt.n_embd
        self.encoder = DeepEncoder(cfg)
        self.projector = Projector(self.encoder.width, n_embd)
        has_rows = self.encoder.layout == "grid"  # a sequence has no use for newlines
        self.image_newline = nn.Parameter(torch.zeros(n_embd), requires_grad=has_rows)
        self.view_seperator = nn.Parameter(torch.zeros(n_embd))  # sic, the published name
        self.gpt = GPT(cfg.gpt)

    def init_weights(self, seed):
        torch.manual_seed(seed)
        self.encoder.init_weights()
        layer = self.projector.layers
        nn.init.normal_(layer.weight, std=layer.in_features ** -0.5)
        nn.init.zeros_(layer.bias)
        for vector in (self.image_newline, self.view_seperator):  # as published
            nn.init.normal_(vector, std=vector.numel() ** -0.5)
        self.gpt.init_weights()
        return self

    @property
    def device(self):
        return self.image_newline.device

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    # -------------------------------------------------------------------------
    # From pixels to the decoder's input

    def features(self, pixels, taps=None):
        """(N, 3, S, S) uint8 -> the encoder's features (N, n, its width); taps: see DeepEncoder."""
        pixels = pixels.to(self.device, non_blocking=True)
        x = pixels.to(self.dtype) / 127.5 - 1.0  # mean = std = 0.5, as published
        return self.encoder(x, taps)

    def to_tokens(self, features, taps=None):
        """
        Features -> vision tokens as the decoder sees them: (N, h, w, C) on a grid, or (N, n, C)
        where the second stage gives a sequence.
        """
        y = self.projector(features)  # (N, n, C)
        if taps is not None:
            taps["projector"] = y
        if self.encoder.layout == "grid":
            side = math.isqrt(y.size(1))  # views are square
            y = y.unflatten(1, (side, side))
        return y

    def project(self, pixels, taps=None):
        """(N, 3, S, S) uint8 -> vision tokens, as of `to_tokens`."""
        return self.to_tokens(self.features(pixels, taps), taps)

    def encode_views(self, views):
        """{side in px: (N, 3, side, side) uint8} -> {side: vision tokens, as of `project`}."""
        return {side: self.project(pixels) for side, pixels in views.items()}

    def lay_out(self, tokens, rows, cols):
        """
        Vision tokens of rows x cols views, side by side as one page, -> (positions, C): line by
        line with a newline after each, or view by view where they are a sequence.
        """
        if self.encoder.layout == "sequence":
            return tokens.flatten(0, 1)
        _, h, w, C = tokens.shape
        page = tokens.view(rows, cols, h, w, C).transpose(1, 2)  # (rows, h, cols, w, C)
        page = page.reshape(rows * h, cols * w, C)
        newlines = self.image_newline.to(page.dtype).expand(rows * h, 1, C)
        page = torch.cat([page, newlines], 1)  # (rows * h, cols * w + 1, C)
        return page.flatten(0, 1)

    def arrange(self, tokens, plans):
        """
        Vision tokens {side in px: those of its views} -> (P, C): for each image its tiles, its
        global view and the separator. This is the published order. `plans`: an image_modes.Plan
        per image.
        """
        used = Counter()
        for plan in plans:
            used[plan.mode.size] += 1
            if plan.rows:
                used[plan.mode.tile] += plan.rows * plan.cols
        given = {side: len(views) for side, views in tokens.items()}
        if given != dict(used):
            raise ValueError(f"views given per size {given}, used by the plans {dict(used)}")

        # Views of one size are stacked over all images, so each image takes the next ones.
        first = dict.fromkeys(tokens, 0)  # {side: its first view that no image has taken yet}

        def take(side, n):
            views = tokens[side][first[side]:first[side] + n]
            first[side] += n
            return views

        separator = self.view_seperator.to(self.dtype)[None]  # (1, C)
        pieces = []
        for plan in plans:
            if plan.rows:
                tiles = take(plan.mode.tile, plan.rows * plan.cols)
                pieces.append(self.lay_out(tiles, plan.rows, plan.cols))
            pieces.append(self.lay_out(take(plan.mode.size, 1), 1, 1))
            pieces.append(separator)
        return torch.cat(pieces)

    def embed(self, batch, tokens=None):
        """
        Token embeddings (B, T, C) of a batch with its images in place. tokens: its views as
        `encode_views` gives them, if the caller has encoded them already.
        """
        # Looked for where the ids are: on the host, unless the caller has moved the batch.
        is_image = batch.ids == self.cfg.image_token_id
        ids = batch.ids.to(self.device, non_blocking=True)
        x = self.gpt.transformer.wte(ids).to(self.dtype)

        if batch.plans:
            tokens = tokens or self.encode_views(batch.views)
            features = self.arrange(tokens, batch.plans)
            return fuse(x, is_image, features, batch.features_per_row)

        for row, n in enumerate(is_image.sum(1).tolist()):
            if n:
                raise ValueError(f"row {row} has <|image|> placeholders but the batch has no "
                                 f"images")
        if self.training:
            vision = [p for name, p in self.named_parameters() if not name.startswith("gpt.")]
            x = x + weight_zero(vision, x)
        return x

    # -------------------------------------------------------------------------
    # Losses

    def loss_counts(self, batch):
        """
        {name of a loss: how many terms it is summed over in `forward`}, known on the host before
        the forward pass. Every name is there for every batch, so that ranks agree on them.
        """
        return {"text": batch.supervised()}

    def forward(self, batch, taps=None):
        """
        -> {name of a loss: (sum in nats, number of things it is summed over)}. The numbers are
        those of `loss_counts`.

        "text": next-token loss over the supervised positions (targets != -1).

        The batch may be on the host. No host-device sync in here.

        taps: a dict that collects what the auxiliary heads read: "features" {side in px: encoder
        features of the views of that side} and "before_last_block" (B, T, C), the decoder's hidden
        states there.
        """
        features = {side: self.features(pixels) for side, pixels in batch.views.items()}
        tokens = {side: self.to_tokens(f) for side, f in features.items()}
        x = self.embed(batch, tokens)  # (B, T, C)
        positions = batch.positions
        if positions is not None:
            positions = positions.to(self.device, non_blocking=True)
        hidden = self.gpt(x, positions=positions, lengths=batch.lengths, taps=taps)  # (B, T, C)
        if taps is not None:
            taps["features"] = features
        return {"text": (self.text_loss(hidden, batch), batch.supervised())}

    def text_loss(self, hidden, batch):
        """Sum of next-token losses, in nats. The head runs on the supervised positions only."""
        at = batch.supervised_at.to(self.device, non_blocking=True)
        targets = batch.targets.to(self.device, non_blocking=True)
        hidden = hidden.flatten(0, 1).index_select(0, at)  # (supervised, C)
        targets = targets.flatten()[at]  # (supervised,)

        # The head is cast once and not twice per chunk: 11 % of the loss at 65,536 x 1,280 on a
        # CPU. Its gradient is then summed over chunks in the compute dtype (9e-4 off with three,
        # in bf16).
        head = self.gpt.head_weight(hidden.dtype)
        if self.compiled:
            torch._dynamo.mark_static(head)  # as parameters are; only the positions vary

        # With a large vocabulary the logits of a batch are gigabytes: only a chunk of them exists
        # at a time, and is computed again in the backward pass.
        on_host = self.device.type in ("cpu", "mps")  # "meta" stands for a GPU
        logits = LOSS_CHUNK if on_host else LOSS_CHUNK_CUDA
        chunk = max(1, logits // self.cfg.gpt.vocab_size)
        if len(targets) <= chunk:
            return self.chunk_loss(hidden, targets, head)
        loss = 0.0
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            loss = loss + checkpoint(self.chunk_loss, h, t, head, use_reentrant=False,
                                     preserve_rng_state=False)
        return loss

    def chunk_loss(self, hidden, targets, head_weight):
        """(n, C), (n,) -> sum of n next-token losses, in nats. head_weight: of GPT.head_weight."""
        logits = self.gpt.logits(hidden, head_weight)
        return F.cross_entropy(logits, targets, reduction="sum")

    # -------------------------------------------------------------------------
    # Parts of the model, to freeze them or to give them rates of their own

    def part_of(self, name):
        """The part that a parameter belongs to, by its name."""
        parts = {  # where two prefixes fit, the first counts
            "encoder.sam_model.net_": "compressor",
            "encoder.sam_model.": "sam",
            "encoder.vision_model.": self.encoder.kind,  # "clip"
            "projector.": "projector",
            "image_newline": "projector",
            "view_seperator": "projector",
            "gpt.transformer.h.": "gpt",
            "gpt.transformer.wte.": "embedding",
            "gpt.lm_head.": "head",
        }
        for prefix, part in parts.items():
            if name.startswith(prefix):
                return part
        raise ValueError(f"parameter {name} belongs to no part: add its prefix to part_of")

    def parts(self):
        """{part: [(name, parameter), ...]}. Every parameter is in exactly one part."""
        from_pixels_to_text = (
            "sam", "compressor", self.encoder.kind, "projector", "gpt", "embedding", "head")
        parts = {part: [] for part in from_pixels_to_text}
        for name, p in self.named_parameters():
            parts[self.part_of(name)].append((name, p))
        return parts

    def freeze(self, names):
        """
        Parts that do not learn; gradients still pass through them. Takes the names of `parts`;
        "gpt" freezes the whole decoder, with embedding and head.
        """
        parts = self.parts()
        for name in names:
            if name not in parts:
                raise ValueError(f"--freeze={name}: must be of {', '.join(parts)}")
            for part in ("gpt", "embedding", "head") if name == "gpt" else (name,):
                for _, p in parts[part]:
                    p.requires_grad_(False)

    # -------------------------------------------------------------------------
    # Memory and speed

    def recompute(self, on):
        """Activation checkpointing of all blocks: a third more compute, much less memory."""
        for part in (self.encoder.sam_model, self.encoder.vision_model, self.gpt):
            part.recompute = on

    def compile_blocks(self, backend="inductor"):
        """
        torch.compile for every block, forward and backward. Blocks of one kind and shape share
        their kernels, so this takes seconds where the whole network would take minutes.

        Shapes are static but for the number of images or rows, and of positions in packed rows.
        So a training script should ask for rows of few different lengths (Sampler's `multiple`).
        Run evaluation eagerly: its shapes always change.
        """
        # A graph per length of rows and per grid of patches (several modes)
        torch._dynamo.config.recompile_limit = 32
        # DDP's optimizer would split a block's graph wherever a bucket of gradients is full.
        torch._dynamo.config.optimize_ddp = False
        blocks = [*self.encoder.sam_model.blocks, *self.encoder.vision_model.blocks,
                  *self.gpt.transformer.h]
        for block in blocks:
            block.compile(dynamic=False, backend=backend)
        # Every batch supervises another number of positions.
        self.chunk_loss = torch.compile(self.chunk_loss, dynamic=True, backend=backend)
        self.compiled = True


def weight_zero(parameters, x):
    """
    A zero, of the dtype of x, that depends on all trainable parameters. Added to the input of a
    loss, it gives parameters that the batch does not use a gradient of zero. DDP would wait forever
    for a parameter without a gradient.
    """
    total = torch.zeros((), device=x.device)
    for p in parameters:
        if p.requires_grad:
            total = total + p.sum()
    return 0.0 * total.to(x.dtype)


# -----------------------------------------------------------------------------
# FLOPs of a forward pass: matrix products and attention, a multiply-add counted as 2. Softmax,
# norms and gathers are left out.

def sam_flops(cfg, side):
    """SAM, neck and compressor on one view of `side` px. cfg: SAMConfig."""
    H = side // cfg.patch_size
    patches = H * H
    flops = 2 * patches * 3 * cfg.patch_size ** 2 * cfg.width  # patch embedding
    for i in range(cfg.depth):
        flops += 2 * patches * 12 * cfg.width ** 2  # qkv, proj and MLP
        window = H if i in cfg.global_blocks else cfg.window
        padded = (-(-H // window) * window) ** 2  # positions with the padding to whole windows
        scores = 4 * window ** 2 * cfg.width  # q k^T, and its product with v
        relative = 4 * window * cfg.width  # relative positions along both axes
        flops += padded * (scores + relative)
    neck = cfg.width * cfg.neck + 9 * cfg.neck ** 2
    flops += 2 * patches * neck
    flops += 2 * (H // 2) ** 2 * 9 * cfg.neck * cfg.net_2
    flops += 2 * (H // 4) ** 2 * 9 * cfg.net_2 * cfg.net_3
    return flops


def gpt_flops(cfg, rows, length, head_positions, lengths):
    """The decoder on `rows` rows of `length` positions; see forward_flops. cfg: GPTConfig."""
    C = cfg.n_embd
    kv = C * cfg.n_kv_head // cfg.n_head  # channels of the keys, and of the values
    weights = 2 * C * C + 2 * C * kv + 8 * C * C  # of one layer: c_q and c_proj, c_k and c_v, MLP
    if lengths:
        squares = sum(n * n for row in lengths for n in row)
    else:
        squares = rows * length ** 2
    scores = 2 * squares * C  # q k^T and its product with v; causal, so half of the square
    if head_positions is None:
        head_positions = rows * length
    head = 2 * head_positions * C * cfg.vocab_size
    return cfg.n_layer * (2 * rows * length * weights + scores) + head


def forward_flops(cfg, views, text_positions, rows=1, head_positions=None, lengths=None):
    """
    FLOPs of one forward pass -> {part: FLOPs}, the parts being sam, the second stage by its kind,
    projector and gpt.

    views:          {side in px: how many}
    text_positions: decoder positions per row, those of images included
    head_positions: how many positions go through the head, over all rows; default all
    lengths:        of packed rows, for each row the lengths of its samples
    """
    stage = cfg.second_stage_class
    sam = 0
    second_stage = 0
    projector = 0
    for side, n in views.items():
        h = side // cfg.token_stride
        sam += n * sam_flops(cfg.sam, side)
        second_stage += n * stage.flops(cfg.second_stage, h, h)
        vision_tokens = n * stage.tokens(cfg.second_stage, h, h)
        projector += 2 * vision_tokens * cfg.feature_width * cfg.gpt.n_embd
    gpt = gpt_flops(cfg.gpt, rows, text_positions, head_positions, lengths)
    return {"sam": sam, cfg.second_stage.kind: second_stage, "projector": projector, "gpt": gpt}
