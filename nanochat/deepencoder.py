"""
DeepEncoder (DeepSeek-OCR, arXiv 2510.18234, section 3.2): SAM ViT -> neck -> two stride-2
convolutions, the compressor with 16x fewer tokens -> a second stage, CLIP's ViT in the paper. On
a grid the features are the concatenation [second stage, compressor]. Module and parameter names
are the published checkpoint's.

Shapes: B images, S px a side, C channels, D = C / heads channels of a head,
        (H, W) patches = S / patch_size, (h, w) tokens = (H, W) / 4.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.layers import (
    Conv2d, LayerNorm, Linear, attention, cudnn_pays, resample_grid, run_blocks,
    trunc_normal_linears)

# -----------------------------------------------------------------------------
# SAM ViT

def relative_positions(table, size):
    """
    Relative position vectors of every (query, key) pair along one axis, from a table (2L - 1, D)
    -> (size, size, D). The table is interpolated where L differs from `size`.
    """
    distances = 2 * size - 1
    if table.size(0) != distances:
        resized = table.float().t()[None]  # (1, D, 2L - 1)
        resized = F.interpolate(resized, size=distances, mode="linear")
        table = resized[0].t().to(table.dtype)
    i = torch.arange(size, device=table.device)
    distance = i[:, None] - i[None, :]  # (size, size), query minus key
    return table[distance + size - 1]


class SAMAttention(nn.Module):
    """
    Attention over an (H, W) grid with decomposed relative positions:

        logit = q.k / sqrt(D) + q.Rh[row distance] + q.Rw[column distance]

    The bias is folded into the dot product: q is extended by its H + W bias values, and k by the
    one-hot codes of its row and column. The sum is the same number, and SDPA's fused kernels can
    be used without ever storing an (HW, HW) mask.
    """
    def __init__(self, width, n_head, grid):
        super().__init__()
        self.n_head = n_head
        self.head_dim = width // n_head
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.cudnn = {}  # {patches a side: whether cuDNN attends}, see SAM.choose_kernels
        table = (2 * grid - 1, self.head_dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(table))
        self.rel_pos_w = nn.Parameter(torch.zeros(table))

    def forward(self, x):
        """(B, H, W, C) -> (B, H, W, C)"""
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv):
        """What happens between the two projections: (B, H, W, 3C) -> (B, H, W, C)."""
        B, H, W, C3 = qkv.shape
        C = C3 // 3
        D = self.head_dim
        qkv = qkv.view(B, H * W, 3, self.n_head, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, HW, D)

        # The bias is that of q before scaling, so q is scaled here and not by the attention.
        bias_h, bias_w = self.position_bias(q, H, W)
        q = q * D ** -0.5
        q = torch.cat([q, bias_h, bias_w], -1)  # (B, heads, HW, D + H + W)
        code = self.position_code(H, W, like=k)
        code = code.expand(B, self.n_head, -1, -1)
        k = torch.cat([k, code], -1)  # (B, heads, HW, D + H + W)

        padding = self.padding(H, W)
        q = F.pad(q, (0, padding))
        k = F.pad(k, (0, padding))
        y = attention(q, k, v, scale=1.0, cudnn=self.cudnn.get(H, False))  # (B, heads, HW, D)
        return y.transpose(1, 2).reshape(B, H, W, C)

    def padding(self, H, W):
        """Channels of zeros behind queries and keys: fused kernels want multiples of 8."""
        return -(self.head_dim + H + W) % 8

    def position_bias(self, q, H, W):
        """Bias of each query to every row (B, heads, HW, H) and every column (B, heads, HW, W)."""
        B, n_head, _, D = q.shape
        q = q.reshape(B, n_head, H, W, D)
        rows = relative_positions(self.rel_pos_h, H).to(q.dtype)  # (H, H, D)
        cols = relative_positions(self.rel_pos_w, W).to(q.dtype)  # (W, W, D)
        bias_h = torch.einsum("bnhwd,hkd->bnhwk", q, rows)  # (B, heads, H, W, H)
        bias_w = torch.einsum("bnhwd,wkd->bnhwk", q, cols)  # (B, heads, H, W, W)
        return bias_h.flatten(2, 3), bias_w.flatten(2, 3)

    @staticmethod
    def position_code(H, W, like):
        """One-hot row and column of every position, (HW, H + W): a key picks its bias with it."""
        rows = torch.eye(H, device=like.device, dtype=like.dtype)
        cols = torch.eye(W, device=like.device, dtype=like.dtype)
        rows = rows.repeat_interleave(W, 0)  # (HW, H)
        cols = cols.repeat(H, 1)  # (HW, W)
        return torch.cat([rows, cols], -1)


class SAMMLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lin1 = Linear(width, 4 * width)
        self.lin2 = Linear(4 * width, width)

    def forward(self, x):
        x = F.gelu(self.lin1(x))  # the exact GELU, as published
        return self.lin2(x)


def to_windows(x, window):
    """(B, H, W, C), H and W multiples of the window -> (B * windows, window, window, C)"""
    B, H, W, C = x.shape
    x = x.view(B, H // window, window, W // window, window, C)
    return x.transpose(2, 3).reshape(-1, window, window, C)


def from_windows(x, H, W):
    """Inverse of `to_windows`: (B * windows, window, window, C) -> (B, H, W, C)"""
    _, window, _, C = x.shape
    x = x.view(-1, H // window, W // window, window, window, C)
    return x.transpose(2, 3).reshape(-1, H, W, C)


class SAMBlock(nn.Module):
    """Pre-norm transformer block over (B, H, W, C)."""
    def __init__(self, width, n_head, window, grid):
        super().__init__()
        self.window = window  # in patches; 0 = global attention
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.attn = SAMAttention(width, n_head, window or grid)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.mlp = SAMMLP(width)

    def forward(self, x):
        y = self.norm1(x)
        y = self.windowed(y) if self.window else self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x))

    def windowed(self, x):
        """
        Attention inside windows. As published, the grid is zero-padded to whole windows after the
        norm, and real positions attend to the padding.
        """
        B, H, W, C = x.shape
        window = self.window
        padded_H = -(-H // window) * window
        padded_W = -(-W // window) * window

        if (padded_H, padded_W) == (H, W):
            # Windows are cut before the projection: a third of the memory to move.
            qkv = self.attn.qkv(to_windows(x, window))
        else:
            # Padding is zero, so its queries, keys and values are the bias alone. Only real
            # positions go through the projections: 4,096 of 4,900 at 1024 px.
            bias = self.attn.qkv.bias.to(x.dtype)
            qkv = bias.expand(B, padded_H, padded_W, 3 * C).clone()
            qkv[:, :H, :W] = self.attn.qkv(x)
            qkv = to_windows(qkv, window)

        y = self.attn.attend(qkv)  # (B * windows, window, window, C)
        y = from_windows(y, padded_H, padded_W)
        return self.attn.proj(y[:, :H, :W])


class LayerNorm2d(LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""
    def forward(self, x):
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        x = super().forward(x)
        return x.permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, width):
        super().__init__()
        self.proj = Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, x):
        """(B, 3, S, S) -> (B, H, W, C)"""
        x = self.proj(x)  # (B, C, H, W)
        return x.permute(0, 2, 3, 1).contiguous()  # all blocks work in this layout


class SAM(nn.Module):
    """SAM ViT, neck and compressor: (B, 3, S, S) -> (B, net_3, h, w)."""
    def __init__(self, cfg):
        super().__init__()
        grid = cfg.image_size // cfg.patch_size
        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, cfg.width))
        self.blocks = nn.ModuleList()
        for i in range(cfg.depth):
            window = 0 if i in cfg.global_blocks else cfg.window
            self.blocks.append(SAMBlock(cfg.width, cfg.n_head, window, grid))
        self.neck = nn.Sequential(
            Conv2d(cfg.width, cfg.neck, 1, bias=False),
            LayerNorm2d(cfg.neck, eps=1e-6),
            Conv2d(cfg.neck, cfg.neck, 3, padding=1, bias=False),
            LayerNorm2d(cfg.neck, eps=1e-6),
        )
        # The compressor. As published, no norm and no activation stand between or after these.
        self.net_2 = Conv2d(cfg.neck, cfg.net_2, 3, stride=2, padding=1, bias=False)
        self.net_3 = Conv2d(cfg.net_2, cfg.net_3, 3, stride=2, padding=1, bias=False)
        self.recompute = False

    def init_weights(self):
        trunc_normal_linears(self)
        # Scaled by fan-in, which keeps unit variance through a chain that has no norm inside.
        convolutions = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        for conv in convolutions:
            fan_in = conv.weight[0].numel()
            nn.init.normal_(conv.weight, std=fan_in ** -0.5)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def positions(self, H):
        """Position table for H x H patches, (1, H, H, C)."""
        if self.pos_embed.size(1) == H:
            return self.pos_embed
        return resample_grid(self.pos_embed[0], H, H)[None]

    def choose_kernels(self, x):
        """
        Chooses the kernel of global attention over patches (B, H, W, C), which is a quarter of a
        step of the published size. Out here, since the choice must not be part of compiled blocks.
        """
        _, H, W, _ = x.shape
        for block in self.blocks:
            if block.window == 0:
                attn = block.attn
                width = attn.head_dim + H + W + attn.padding(H, W)
                attn.cudnn[H] = cudnn_pays(x.device, x.dtype, H * W, width, attn.head_dim)

    def forward(self, x, taps=None):
        # A frozen ViT needs no graph. Its parameters are frozen together: one stands for all.
        vit_trains = self.pos_embed.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and vit_trains):
            x = self.patch_embed(x)  # (B, H, W, C)
            positions = self.positions(x.size(1))
            x = x + positions.to(x.dtype)
            self.choose_kernels(x)
            x = run_blocks(self.blocks, x, recompute=self.recompute)
            if taps is not None:
                taps["sam"] = x
            x = self.neck(x.permute(0, 3, 1, 2))  # (B, neck, H, W)
        x = self.net_3(self.net_2(x))  # (B, net_3, h, w)
        if taps is not None:
            taps["compressor"] = x
        return x


# -----------------------------------------------------------------------------

class DeepEncoder(nn.Module):
    """
    Pixels (B, 3, S, S) in [-1, 1], S a multiple of the token stride -> features (B, n, C).
    On a grid n is h * w, and the channels are [second stage, compressor].

    `taps`, a dict, collects what the collapse metrics look at: "sam", "compressor", and the second
    stage under its kind, e.g. "clip".
    """
    def __init__(self, cfg):
        super().__init__()
        self.stride = cfg.token_stride
        self.kind = cfg.second_stage.kind
        self.layout = cfg.second_stage_class.layout
        self.width = cfg.feature_width
        self.sam_model = SAM(cfg.sam)
        # The published name, whatever the second stage is
        self.vision_model = cfg.second_stage_class(cfg.second_stage)

    def init_weights(self):
        self.sam_model.init_weights()
        self.vision_model.init_weights()

    def forward(self, x, taps=None):
        is_square = x.ndim == 4 and x.size(2) == x.size(3)
        if not is_square or x.size(2) % self.stride:
            raise ValueError(f"pixels of shape {tuple(x.shape)}: need (B, 3, S, S) with S a "
                             f"multiple of {self.stride}")
        # Without a graph where nothing before the second stage learns
        sam_trains = any(p.requires_grad for p in self.sam_model.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and sam_trains):
            x = self.sam_model(x, taps)  # (B, C, h, w)
        y = self.vision_model(x)  # (B, n, C)
        if taps is not None:
            taps[self.kind] = y
        if self.layout == "sequence":
            return y
        tokens = x.flatten(2).transpose(1, 2)  # (B, hw, C)
        return torch.cat([y, tokens], -1)
