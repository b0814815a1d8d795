"""
DeepEncoder (DeepSeek-OCR, arXiv 2510.18234, section 3.2): SAM ViT -> neck -> two stride-2 convolutions (16x fewer tokens) ->
CLIP ViT; the features are the concatenation [CLIP, SAM]. Module and parameter names are the published checkpoint's.

Shapes: B images, S px a side, C channels, (H, W) patches = S / patch_size, (h, w) tokens = (H, W) / 4.
"""
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from nanochat.config import SECOND_STAGES
from nanochat.image_modes import get_mode
from nanochat.layers import Conv2d, LayerNorm, Linear, attention, run_blocks, trunc_normal_linears

MIN_BATCH_FOR_STATISTICS = 8  # below this many images, batch statistics are too noisy: running ones are used


# -----------------------------------------------------------------------------
# SAM ViT

def relative_positions(table, size):
    """Rows of a (2L-1, d) table for every (query, key) pair along one axis -> (size, size, d). Another length is interpolated."""
    if table.size(0) != 2 * size - 1:
        table = F.interpolate(table.float().t()[None], size=2 * size - 1, mode="linear")[0].t().to(table.dtype)
    i = torch.arange(size, device=table.device)
    return table[i[:, None] - i[None, :] + size - 1]


class SAMAttention(nn.Module):
    """
    Attention over an (H, W) grid with decomposed relative positions: logit = q.k / sqrt(d) + q.Rh[dh] + q.Rw[dw].
    The bias is folded into the dot product: q is extended by its H + W bias values, k by the one-hot code of its row and
    column. The sum is the same number, and SDPA's fused kernels run without an (H*W, H*W) mask ever being stored.
    """
    def __init__(self, width, n_head, grid):
        super().__init__()
        self.n_head = n_head
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid - 1, width // n_head))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid - 1, width // n_head))

    def forward(self, x):  # (B, H, W, C) -> (B, H, W, C)
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv):  # (B, H, W, 3C) -> (B, H, W, C), before the output projection
        B, H, W, C = *qkv.shape[:3], qkv.size(3) // 3
        d = C // self.n_head
        q, k, v = qkv.view(B, H * W, 3, self.n_head, d).permute(2, 0, 3, 1, 4)  # 3 x (B, n_head, HW, d)
        grid_q = q.reshape(B, self.n_head, H, W, d)
        bias_h = torch.einsum("bnhwd,hkd->bnhwk", grid_q, relative_positions(self.rel_pos_h, H).to(q.dtype))
        bias_w = torch.einsum("bnhwd,wkd->bnhwk", grid_q, relative_positions(self.rel_pos_w, W).to(q.dtype))
        rows = torch.eye(H, device=q.device, dtype=q.dtype).repeat_interleave(W, 0)  # (HW, H)
        cols = torch.eye(W, device=q.device, dtype=q.dtype).repeat(H, 1)             # (HW, W)
        code = torch.cat([rows, cols], -1).expand(B, self.n_head, -1, -1)
        pad = -(d + H + W) % 8  # fused kernels want head sizes in multiples of 8
        q = F.pad(torch.cat([q * d ** -0.5, bias_h.flatten(2, 3), bias_w.flatten(2, 3)], -1), (0, pad))
        k = F.pad(torch.cat([k, code], -1), (0, pad))
        y = attention(q, k, v, scale=1.0)
        return y.transpose(1, 2).reshape(B, H, W, C)


class SAMMLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lin1 = Linear(width, 4 * width)
        self.lin2 = Linear(4 * width, width)

    def forward(self, x):
        return self.lin2(F.gelu(self.lin1(x)))


class SAMBlock(nn.Module):
    def __init__(self, width, n_head, window, grid):
        super().__init__()
        self.window = window  # 0 = global attention
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.attn = SAMAttention(width, n_head, window or grid)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.mlp = SAMMLP(width)

    def forward(self, x):  # (B, H, W, C)
        y = self.norm1(x)
        x = x + (self.windowed(y) if self.window else self.attn(y))
        return x + self.mlp(self.norm2(x))

    def windowed(self, x):
        """
        Attention inside whole windows. As published, positions are zero-padded to them after the norm and attended to: their queries,
        keys and values are the bias alone, so only real positions go through the two projections (4,096 of 4,900 at 1024 px).
        """
        (B, H, W, C), w = x.shape, self.window
        down, right = -H % w, -W % w
        nh, nw = (H + down) // w, (W + right) // w

        def windows(x):  # (B, nh * w, nw * w, D) -> (B * nh * nw, w, w, D)
            return x.view(B, nh, w, nw, w, -1).transpose(2, 3).reshape(B * nh * nw, w, w, -1)
        if down or right:
            padded = self.attn.qkv.bias.to(x.dtype).expand(B, H + down, W + right, 3 * C).clone()
            padded[:, :H, :W] = self.attn.qkv(x)
            qkv = windows(padded)
        else:
            qkv = self.attn.qkv(windows(x))  # a third of the memory to move
        y = self.attn.attend(qkv).view(B, nh, nw, w, w, C).transpose(2, 3).reshape(B, nh * w, nw * w, C)
        return self.attn.proj(y[:, :H, :W])


class LayerNorm2d(LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, width):
        super().__init__()
        self.proj = Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, x):  # (B, 3, S, S) -> (B, H, W, C)
        return self.proj(x).permute(0, 2, 3, 1).contiguous()  # the layout of every block behind it


class SAM(nn.Module):
    """SAM ViT, neck and compressor: (B, 3, S, S) -> (B, net_3, h, w)."""
    def __init__(self, cfg):
        super().__init__()
        grid = cfg.image_size // cfg.patch_size
        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, cfg.width))
        self.blocks = nn.ModuleList(
            SAMBlock(cfg.width, cfg.n_head, 0 if i in cfg.global_blocks else cfg.window, grid) for i in range(cfg.depth))
        self.neck = nn.Sequential(
            Conv2d(cfg.width, cfg.neck, 1, bias=False), LayerNorm2d(cfg.neck, eps=1e-6),
            Conv2d(cfg.neck, cfg.neck, 3, padding=1, bias=False), LayerNorm2d(cfg.neck, eps=1e-6))
        self.net_2 = Conv2d(cfg.neck, cfg.net_2, 3, stride=2, padding=1, bias=False)
        self.net_3 = Conv2d(cfg.net_2, cfg.net_3, 3, stride=2, padding=1, bias=False)
        self.recompute = False

    def init_weights(self):
        trunc_normal_linears(self)
        for conv in (self.patch_embed.proj, self.neck[0], self.neck[2], self.net_2, self.net_3):
            fan_in = conv.weight[0].numel()
            nn.init.normal_(conv.weight, std=fan_in ** -0.5)  # unit variance through a chain that has no norm inside
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def positions(self, H):
        """(1, H, H, C) position table, bicubic with antialiasing in fp32 when the grid differs (as published)."""
        table = self.pos_embed
        if table.size(1) != H:
            table = F.interpolate(table.float().permute(0, 3, 1, 2), size=(H, H), mode="bicubic", antialias=True,
                                  align_corners=False).permute(0, 2, 3, 1)
        return table

    def core(self):
        """The parameters that published SAM weights fill: all but the compressor's."""
        return [p for name, p in self.named_parameters() if not name.startswith("net_")]

    def forward(self, x, taps=None):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.pos_embed.requires_grad):
            x = self.patch_embed(x)
            x = x + self.positions(x.size(1)).to(x.dtype)
            x = run_blocks(self.blocks, x, recompute=self.recompute)
            if taps is not None:
                taps["sam"] = x
            x = self.neck(x.permute(0, 3, 1, 2))
        x = self.net_3(self.net_2(x))
        if taps is not None:
            taps["compressor"] = x
        return x


# -----------------------------------------------------------------------------
# Standardisation of the compressor's output over the batch

class Standardize(nn.Module):
    """
    Zero mean and unit variance over the batch, per channel or per channel and position, without affine parameters. What all
    pages share (paper, layout) otherwise dominates the features, the part that tells pages apart drowns, and the decoder
    falls back on its language prior (FINDINGS.md, "standardisation"). `none` is the identity and holds no state.

    In training, statistics are the micro-batch's own on its own rank; a batch of fewer than 8 images, evaluation and a frozen
    module use running ones. Those lag behind fast-moving weights: `reestimate` before evaluating.
    Each grid of the model's modes has statistics of its own, those of `grid` without a suffix; a grid that was never trained on takes
    (and interpolates, where they are per position) these. A variance below zero says "never trained on".
    """
    def __init__(self, kind, channels, grid, others=()):
        super().__init__()
        self.kind, self.frozen, self.eps, self.momentum = kind, False, 1e-5, 0.1
        self.grids = {grid: "", **{g: f"_{g}" for g in others if g != grid}} if kind != "none" else {}  # tokens a side: suffix of its buffers
        for g, suffix in self.grids.items():
            size = (g, g) if kind == "position" else (1, 1)
            self.register_buffer(f"mean{suffix}", torch.zeros(channels, *size))
            self.register_buffer(f"var{suffix}", torch.full((channels, *size), -1.0 if suffix else 1.0))

    def own(self, h, w):
        """The running (mean, var) of a grid; None where none are kept."""
        suffix = self.grids.get(h if h == w else None, None if self.kind == "position" else "")
        return None if suffix is None else (getattr(self, f"mean{suffix}"), getattr(self, f"var{suffix}"))

    def tables(self, h, w):
        first, found = (self.mean, self.var), self.own(h, w)
        if found is not None and found[1] is self.var:
            return first
        if self.kind == "position":
            first = tuple(F.interpolate(t[None], size=(h, w), mode="bilinear", align_corners=False)[0] for t in first)
        if found is None:
            return first
        seen = found[1].amin() >= 0  # stays on the device
        return tuple(torch.where(seen, t, instead) for t, instead in zip(found, first))

    def statistics(self, x):
        dims = (0,) if self.kind == "position" else (0, 2, 3)
        mean = x.mean(dims, keepdim=True)
        return mean[0], (x - mean).square().mean(dims, keepdim=True)[0]

    def forward(self, x):  # (B, C, h, w)
        if self.kind == "none":
            return x
        y = x.float()
        if self.training and not self.frozen and x.size(0) >= MIN_BATCH_FOR_STATISTICS:
            mean, var = self.statistics(y)
            if running := self.own(*x.shape[2:]):
                with torch.no_grad():
                    for t, new in zip(running, (mean, var)):
                        t.lerp_(new, self.momentum)
        else:
            mean, var = self.tables(*x.shape[2:])
        return ((y - mean) * torch.rsqrt(var + self.eps)).to(x.dtype)

    @torch.no_grad()
    def reestimate(self, batches, grid=None):
        """Sets the running statistics of a grid, by default the first, to those of all `batches` of (B, C, grid, grid) outputs, over all ranks."""
        if self.kind == "none":
            return
        dims, grid = (0,) if self.kind == "position" else (0, 2, 3), grid or next(iter(self.grids))
        if (running := self.own(grid, grid)) is None:
            raise ValueError(f"no statistics per position are kept for {grid}x{grid} outputs, only for grids of {sorted(self.grids)}: train in "
                             f"one of the preset's modes, or --standardize=channel")
        n, images = torch.zeros((), dtype=torch.float64), 0
        total, square = (torch.zeros(running[0].shape, dtype=torch.float64) for _ in range(2))
        for x in batches:
            if x.shape[2:] != (grid, grid):
                raise ValueError(f"re-estimating the statistics of {grid}x{grid} outputs on some of {tuple(x.shape[1:])}")
            images += x.size(0)
            x = x.double().cpu()  # fp64 sums: var = E[x^2] - E[x]^2 would cancel in fp32
            n += x.numel() / total.numel()
            total += x.sum(dims, keepdim=True)[0]
            square += x.square().sum(dims, keepdim=True)[0]
        sums = torch.stack([total, square]).to(self.mean.device, torch.float64 if self.mean.device.type != "mps" else torch.float32)
        n, images = n.to(sums), torch.tensor(float(images)).to(sums)
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(n)
            dist.all_reduce(images)
        if images < MIN_BATCH_FOR_STATISTICS:
            raise ValueError(f"re-estimating statistics needs at least {MIN_BATCH_FOR_STATISTICS} images, got {int(images)}")
        mean, square = sums / n
        running[0].copy_(mean)
        running[1].copy_((square - mean.square()).clamp(min=0))

    @torch.no_grad()
    def average_over_ranks(self):
        """Each rank keeps its own running statistics while training; a checkpoint holds their mean."""
        if self.kind != "none" and not self.frozen and dist.is_initialized():
            for t in self.buffers():
                dist.all_reduce(t)
                t.div_(dist.get_world_size())


# -----------------------------------------------------------------------------

class DeepEncoder(nn.Module):
    """
    (B, 3, S, S) pixels in [-1, 1], S a multiple of 4 patches -> (B, h*w, clip.width + net_3) features, CLIP's first.
    `taps`, a dict, collects what the gauges of collapse look at: sam, compressor (before standardisation), clip.
    """
    def __init__(self, cfg):
        super().__init__()
        self.stride = cfg.token_stride
        self.sam_model = SAM(cfg.sam)
        sides = {side for mode in map(get_mode, cfg.modes) for side in (mode.size, mode.tile) if side}
        self.standardize = Standardize(cfg.standardize, cfg.sam.net_3, cfg.sam.image_size // cfg.token_stride,
                                       sorted(side // cfg.token_stride for side in sides))
        second_stage = SECOND_STAGES[cfg.second_stage.kind][1]
        self.vision_model = second_stage(cfg.second_stage)  # the published name of CLIP's place
        self.kind = cfg.second_stage.kind
        self.width = self.vision_model.width + (cfg.sam.net_3 if self.vision_model.layout == "grid" else 0)

    def init_weights(self):
        self.sam_model.init_weights()
        self.vision_model.init_weights()

    def freeze_sam(self):
        """Stage 2 (paper, section 3.5): SAM and compressor fixed, and with them the statistics of their output."""
        self.sam_model.requires_grad_(False)
        self.standardize.frozen = True

    def forward(self, x, taps=None):
        if x.ndim != 4 or x.size(2) != x.size(3) or x.size(2) % self.stride:
            raise ValueError(f"pixels of shape {tuple(x.shape)}: need (B, 3, S, S) with S a multiple of {self.stride}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.sam_model.net_3.weight.requires_grad):
            x = self.sam_model(x, taps)
            x = self.standardize(x)
        y = self.vision_model(x)
        if taps is not None:
            taps[self.kind] = y
        if self.vision_model.layout == "sequence":
            return y
        return torch.cat([y, x.flatten(2).transpose(1, 2)], -1)
