"""
CLIP's ViT as DeepEncoder's second stage (DeepSeek-OCR, arXiv 2510.18234, section 3.2): it takes the compressor's output in place of patch
embeddings. Parameter names are the published checkpoint's.

A second stage is a module with a config dataclass of its own (whose `kind` names it), listed in SECOND_STAGES of nanochat/config.py:
    layout              "grid": a token for each of the compressor's h x w positions, so rows take newlines and the features are joined with
                        the compressor's own; "sequence": any number of tokens, without newlines, which are the features
    width, blocks       channels that it gives; its blocks, to compile and recompute
    forward(x)          (B, C, h, w) -> (B, n, width)
    tokens, flops       n, and the FLOPs of an image, for h x w
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.layers import Conv2d, LayerNorm, Linear, attention, run_blocks, trunc_normal_linears


@dataclass
class CLIPConfig:
    """CLIP ViT fed by the compressor in place of patch embeddings (defaults are the published ViT-L/14)."""
    kind: str = "clip"
    grid: int = 16                   # the position table is stored for grid x grid tokens and a class token
    width: int = 1024
    depth: int = 24
    n_head: int = 16
    ffn: int = 4096
    patch_size: int = 14             # CLIP's own patch convolution: published, kept, never run; 0 = absent


class CLIPEmbeddings(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(cfg.width))
        if cfg.patch_size:  # part of the published weights, never run: no gradient
            self.patch_embedding = Conv2d(3, cfg.width, cfg.patch_size, stride=cfg.patch_size, bias=False)
            self.patch_embedding.requires_grad_(False)
        self.position_embedding = nn.Embedding(cfg.grid ** 2 + 1, cfg.width)

    def forward(self, x):  # (B, C, h, w) compressor output -> (B, 1 + hw, C)
        B, C, h, w = x.shape
        table, grid = self.position_embedding.weight, int((self.position_embedding.num_embeddings - 1) ** 0.5)
        if (h, w) != (grid, grid):
            patches = table[1:].float().view(1, grid, grid, C).permute(0, 3, 1, 2)
            patches = F.interpolate(patches, size=(h, w), mode="bicubic", antialias=True, align_corners=False)
            table = torch.cat([table[:1], patches.flatten(2)[0].t().to(table.dtype)])
        cls = self.class_embedding.to(x.dtype).expand(B, 1, C)
        return torch.cat([cls, x.flatten(2).transpose(1, 2)], 1) + table.to(x.dtype)


class CLIPAttention(nn.Module):
    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv_proj = Linear(width, 3 * width)
        self.out_proj = Linear(width, width)

    def forward(self, x):  # (B, T, C)
        B, T, C = x.shape
        q, k, v = self.qkv_proj(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        return self.out_proj(attention(q, k, v).transpose(1, 2).reshape(B, T, C))


class CLIPMLP(nn.Module):
    def __init__(self, width, ffn):
        super().__init__()
        self.fc1 = Linear(width, ffn)
        self.fc2 = Linear(ffn, width)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick GELU


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
    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.ModuleList(CLIPBlock(cfg) for _ in range(cfg.depth))


class CLIP(nn.Module):
    """CLIP ViT without final norm, pooling or text tower: (B, C, h, w) -> (B, hw, C), the class token dropped."""
    layout = "grid"  # a token for each of the compressor's positions, in rows

    def __init__(self, cfg):
        super().__init__()
        self.width = cfg.width
        self.embeddings = CLIPEmbeddings(cfg)
        self.pre_layrnorm = LayerNorm(cfg.width, eps=1e-5)  # the published name, sic
        self.transformer = CLIPTransformer(cfg)
        self.recompute = False

    def init_weights(self):
        trunc_normal_linears(self)
        nn.init.normal_(self.embeddings.class_embedding, std=0.02)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.02)

    def forward(self, x):
        x = self.pre_layrnorm(self.embeddings(x))
        return run_blocks(self.transformer.layers, x, recompute=self.recompute)[:, 1:]

    @property
    def blocks(self):
        return self.transformer.layers

    @staticmethod
    def tokens(cfg, h, w):
        """Tokens that it makes of a compressor output of h x w."""
        return h * w

    @staticmethod
    def flops(cfg, h, w):
        """Multiply-adds x 2 of one image's forward pass."""
        T = h * w + 1
        return cfg.depth * (2 * T * (4 * cfg.width ** 2 + 2 * cfg.width * cfg.ffn) + 4 * T * T * cfg.width)
