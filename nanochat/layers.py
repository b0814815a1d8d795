"""
Attention; and Linear, Conv2d and LayerNorm whose parameters stay fp32 and are cast to the dtype of what comes in. The compute dtype is
thereby chosen once, where pixels and embeddings enter the model, and nothing else has to know of it (no autocast).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def _to(p, x):
    return None if p is None else p.to(x.dtype)


class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), _to(self.bias, x))


class Conv2d(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight.to(x.dtype), _to(self.bias, x), self.stride, self.padding)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


WRITTEN_OUT_ON = {"cpu"}  # device types where small attention is written out


def attention(q, k, v, scale=None, mask=None, causal=False):
    """
    softmax(q k^T * scale + mask) v over (B, H, T, D); v's D may differ. k, v may have fewer heads.
    Written out on the CPU up to 512 x 512 positions: torch's fused CPU kernel was several times slower there in bf16 with its
    backward (torch 2.13, AVX-512 BF16). Elsewhere it is SDPA.
    """
    if q.device.type in WRITTEN_OUT_ON and q.size(1) == k.size(1) and q.size(2) * k.size(2) <= 512 ** 2:
        scores = (q * (scale or q.size(-1) ** -0.5)) @ k.mT
        if causal:
            scores = scores.masked_fill(torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).triu(1), float("-inf"))
        if mask is not None:
            scores = scores + mask
        return scores.softmax(-1) @ v
    pad = q.size(-1) - v.size(-1)
    y = F.scaled_dot_product_attention(q, k, F.pad(v, (0, pad)) if pad else v, attn_mask=mask, is_causal=causal, scale=scale,
                                       enable_gqa=q.size(1) != k.size(1))
    return y[..., :v.size(-1)]


@torch.compiler.disable  # as many kernels as samples: a graph of its own for every batch otherwise
def packed_attention(q, k, v, lengths):
    """
    Causal attention inside each sample of packed rows (B, H, T, D). lengths: B lists of the samples' lengths, in order; what is left of
    a row is padding and counts as one more. A sample at a time: no (T, T) mask is stored, and nothing is computed that a mask discards.
    """
    rows = []
    for r, row in enumerate(lengths):
        rest = q.size(2) - sum(row)
        pieces = [*row, rest] if rest else row
        rows.append(torch.cat([attention(*sample, causal=True) for sample in zip(*(t[r:r + 1].split(pieces, 2) for t in (q, k, v)))], 2))
    return torch.cat(rows)


def run_blocks(blocks, x, *args, recompute=False):
    """x through `blocks` in turn. recompute (activation checkpointing): only each block's input is kept for the backward pass."""
    recompute = recompute and torch.is_grad_enabled()
    for block in blocks:
        if block._compiled_call_impl is not None:  # one kernel for any number of rows or images; other sizes are static
            torch._dynamo.maybe_mark_dynamic(x, 0)
        x = checkpoint(block, x, *args, use_reentrant=False) if recompute else block(x, *args)
    return x


def trunc_normal_linears(module, std=0.02):
    """ViT initialisation for every Linear and Conv2d below `module`; biases start at zero."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
