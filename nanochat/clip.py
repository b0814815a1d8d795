"""
CLIP's ViT as the second stage of DeepEncoder (DeepSeek-OCR, arXiv 2510.18234, section 3.2). It
takes the compressor's output in place of patch embeddings. Parameter names are those of the
published checkpoint.

How to write another second stage: one file like this one, and its entry in SECOND_STAGES of
nanochat/config.py. It is an nn.Module that is built from a config dataclass, and has

    config_class       the dataclass. Its `kind` is the name in SECOND_STAGES, its `width` the
                       channels C of input and output; SAMConfig.net_3 must equal it.
    layout             "grid": one token for each of the compressor's h x w positions. Rows of
                       tokens end in a newline, and each is joined with the compressor's token.
                       "sequence": any number of tokens. No newlines, and they are all the features.
    forward(x)         (B, C, h, w) -> (B, n, C)
    tokens(cfg, h, w)  n; a static method, as `flops` is
    flops(cfg, h, w)   FLOPs of one image's forward pass
    init_weights()
    blocks             its transformer blocks, for torch.compile; in a module called `layers` or
                       `blocks` their matrices are trained by Muon
    parameters         are all it keeps: no buffers that training changes
    recompute          False; True asks for activation checkpointing (layers.run_blocks)

Shapes: B images, C channels, (h, w) tokens of the compressor, T = 1 + hw positions.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn

from nanochat.layers import (
    Conv2d, LayerNorm, Linear, attention, resample_grid, run_blocks, trunc_normal_linears)


@dataclass
class CLIPConfig:
    """CLIP ViT fed by the compressor. Defaults are the published ViT-L/14."""
    kind: str = "clip"
    grid: int = 16                   # tokens a side that the position table is stored for
    width: int = 1024
    depth: int = 24
    n_head: int = 16
    ffn: int = 4096
    patch_size: int = 14             # px; CLIP's patch convolution, published, never run; 0 = none

    def __post_init__(self):
        if self.width % self.n_head:
            raise ValueError(f"clip: width {self.width} is not a multiple of its {self.n_head} "
                             f"heads")


class CLIPEmbeddings(nn.Module):
    """Compressor output (B, C, h, w) -> (B, T, C): class token first, positions added."""
    def __init__(self, cfg):
        super().__init__()
        self.grid = cfg.grid
        self.class_embedding = nn.Parameter(torch.zeros(cfg.width))
        if cfg.patch_size:
            # Part of the published weights, but the compressor's output takes its place: it never
            # runs, and without a gradient it must not count as trainable.
            self.patch_embedding = Conv2d(
                3, cfg.width, cfg.patch_size, stride=cfg.patch_size, bias=False)
            self.patch_embedding.requires_grad_(False)
        self.position_embedding = nn.Embedding(cfg.grid ** 2 + 1, cfg.width)

    def positions(self, h, w):
        """(T, C): the class token's position, then those of h x w tokens."""
        table = self.position_embedding.weight  # (1 + grid^2, C)
        if (h, w) == (self.grid, self.grid):
            return table
        # The class token is not on the grid, so its row is kept as it is.
        patches = table[1:].view(self.grid, self.grid, -1)
        patches = resample_grid(patches, h, w).flatten(0, 1)  # (hw, C)
        return torch.cat([table[:1], patches])

    def forward(self, x):
        B, C, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (B, hw, C)
        class_token = self.class_embedding.to(x.dtype).expand(B, 1, C)
        return torch.cat([class_token, tokens], 1) + self.positions(h, w).to(x.dtype)  # (B, T, C)


class CLIPAttention(nn.Module):
    """Full bidirectional attention over (B, T, C)."""
    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv_proj = Linear(width, 3 * width)
        self.out_proj = Linear(width, width)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv_proj(x)
        qkv = qkv.view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = attention(q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.out_proj(y)


class CLIPMLP(nn.Module):
    def __init__(self, width, ffn):
        super().__init__()
        self.fc1 = Linear(width, ffn)
        self.fc2 = Linear(ffn, width)

    def forward(self, x):
        x = self.fc1(x)
        x = x * torch.sigmoid(1.702 * x)  # quick GELU, the activation CLIP was trained with
        return self.fc2(x)


class CLIPBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layer_norm1 = LayerNorm(cfg.width, eps=1e-5)
        self.self_attn = CLIPAttention(cfg.width, cfg.n_head)
        self.layer_norm2 = LayerNorm(cfg.width, eps=1e-5)
        self.mlp = CLIPMLP(cfg.width, cfg.ffn)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTransformer(nn.Module):
    """Holds the blocks under their published name; CLIP itself runs them."""
    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.ModuleList(CLIPBlock(cfg) for _ in range(cfg.depth))


class CLIP(nn.Module):
    """
    (B, C, h, w) -> (B, hw, C). As published: no final norm, no pooling, no text tower, and the
    class token is dropped at the end.
    """
    config_class = CLIPConfig
    layout = "grid"

    def __init__(self, cfg):
        super().__init__()
        self.embeddings = CLIPEmbeddings(cfg)
        self.pre_layrnorm = LayerNorm(cfg.width, eps=1e-5)  # sic, the published name
        self.transformer = CLIPTransformer(cfg)
        self.recompute = False

    def init_weights(self):
        trunc_normal_linears(self)
        nn.init.normal_(self.embeddings.class_embedding, std=0.02)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.02)

    @property
    def blocks(self):
        return self.transformer.layers

    def forward(self, x):
        x = self.pre_layrnorm(self.embeddings(x))  # (B, T, C)
        x = run_blocks(self.blocks, x, recompute=self.recompute)
        return x[:, 1:]  # (B, hw, C)

    @staticmethod
    def tokens(cfg, h, w):
        return h * w

    @staticmethod
    def flops(cfg, h, w):
        """Matrix products and attention only, a multiply-add counted as 2."""
        T = h * w + 1
        attention_weights = 4 * cfg.width ** 2  # qkv_proj and out_proj
        mlp_weights = 2 * cfg.width * cfg.ffn
        scores = 4 * T * T * cfg.width  # q k^T, and its product with v
        return cfg.depth * (2 * T * (attention_weights + mlp_weights) + scores)
