"""
Layers that encoder and decoder share: attention, and Linear, Conv2d and LayerNorm that keep their
parameters in fp32 and compute in the dtype of their input. So the compute dtype is chosen in one
place, where pixels and token embeddings enter the model, and no layer has to know about it (no
autocast).

Shapes: B rows or images, H heads, T positions, D channels per head, C = H * D.
"""
import inspect
import os
import time
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from nanochat.common import banner, to_device

# -----------------------------------------------------------------------------
# fp32 parameters, cast where they are used. The casts and their backward are 0.7 % of a nano step
# on a CPU, so a second copy of all weights in the compute dtype would not pay for its
# bookkeeping.


class Linear(nn.Linear):
    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Conv2d(nn.Conv2d):
    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.weight.to(x.dtype), bias, self.stride, self.padding)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        weight = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


# -----------------------------------------------------------------------------
# Attention

# torch's fused CPU kernel was several times slower than plain matmuls in bf16 with its backward
# (torch 2.13, AVX-512 BF16), up to about this many scores per head. Beyond it, memory decides.
WRITTEN_OUT_ON = {"cpu"}  # device types
WRITTEN_OUT_SCORES = 512 ** 2
# Causal attention is written out for so many queries at a time. A block skips the keys after it:
# at 544 positions this takes half the time of the fused kernel, forward and backward.
QUERY_BLOCK = 128
CAUSAL_WRITTEN_OUT_SCORES = 1024 ** 2  # half of them are skipped


def attention(q, k, v, scale=None, mask=None, causal=False, cudnn=False):
    """
    softmax(q k^T * scale + mask) v over (B, H, T, D) -> (B, H, T, D of v).

    `scale` defaults to D ** -0.5. `mask` is added to the scores. k and v may have fewer heads
    than q (grouped queries), and v may have fewer channels than q and k.
    cudnn: cuDNN's kernel does it, without a mask; see cudnn_pays.
    """
    if cudnn:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    same_heads = q.size(1) == k.size(1)
    limit = CAUSAL_WRITTEN_OUT_SCORES if causal else WRITTEN_OUT_SCORES
    few_scores = q.size(2) * k.size(2) <= limit
    if q.device.type in WRITTEN_OUT_ON and same_heads and few_scores:
        if causal and mask is None:
            return causal_attention_in_blocks(q, k, v, scale)
        return written_out_attention(q, k, v, scale, mask, causal)

    # SDPA wants v as wide as q and k: pad with zeros, and cut them off again.
    narrower = q.size(-1) - v.size(-1)
    padded_v = F.pad(v, (0, narrower)) if narrower else v
    y = F.scaled_dot_product_attention(
        q, k, padded_v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=not same_heads)
    return y[..., :v.size(-1)]


@lru_cache(None)
@torch.inference_mode(False)  # the trial runs backward, even when called during inference
@torch.enable_grad()
def cudnn_pays(device, dtype, positions, width, value_width):
    """
    Whether cuDNN's kernel beats `attention` for queries and keys of `width` channels and narrower
    values: cuDNN takes those as they are, flash attention pads them to `width`. Both are timed
    once per size, forward and backward. Only for shapes that seldom change: cuDNN makes a plan
    for every new one. NANOCHAT_CUDNN=0 in the environment turns it off.
    """
    if os.environ.get("NANOCHAT_CUDNN") == "0":
        return False
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if positions % 128 == 64:  # where its backward pass may give NaN (NVIDIA/cudnn-frontend #628)
        return False
    B, H = 2, 8  # images and heads enough to fill a GPU
    common = dict(device=device, dtype=dtype, requires_grad=True)
    q = torch.randn(B, H, positions, width, **common)
    k = torch.randn(B, H, positions, width, **common)
    # In memory as SAM has it: a part of its fused qkv.
    qkv = torch.randn(B, positions, 3, H, value_width, **common)
    v = qkv[:, :, 2].transpose(1, 2)
    scale = width ** -0.5
    seconds = {}
    found = {}  # output and gradients
    for cudnn in (False, True):
        try:
            for repeat in range(6):
                if repeat == 2:  # the first two warm up
                    torch.cuda.synchronize(device)
                    start = time.perf_counter()
                y = attention(q, k, v, scale=scale, cudnn=cudnn)
                gradients = torch.autograd.grad(y.square().sum(), (q, k, v))
            torch.cuda.synchronize(device)
        except RuntimeError:  # no cuDNN, or one that does not take these sizes
            return False
        seconds[cudnn] = time.perf_counter() - start
        found[cudnn] = (y, *gradients)
    for by_cudnn, expected in zip(found[True], found[False]):
        # By norms: single numbers are small, and are rounded to 16 bits.
        error = (by_cudnn.float() - expected.float()).norm()
        if not error <= 0.05 * expected.float().norm():  # NaN is not, either
            return False
    return seconds[True] < seconds[False]


def written_out_attention(q, k, v, scale, mask, causal):
    """The formula itself; arguments as in `attention`."""
    if scale is None:
        scale = q.size(-1) ** -0.5
    scores = (q * scale) @ k.mT  # (B, H, T of q, T of k)
    if causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


def causal_attention_in_blocks(q, k, v, scale):
    """The same for as many queries as keys and without a mask, QUERY_BLOCK queries at a time."""
    T = q.size(2)
    if T <= QUERY_BLOCK:
        return written_out_attention(q, k, v, scale, None, causal=True)
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        # Queries start..end-1 see all keys up to `start`, and each other's from there on.
        mask = torch.zeros(end - start, end, device=q.device, dtype=q.dtype)
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        mask[:, start:].masked_fill_(later, float("-inf"))
        block = written_out_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], scale,
                                      mask, causal=False)
        blocks.append(block)
    return torch.cat(blocks, 2)


def packed_attention(q, k, v, lengths):
    """
    Causal attention inside each sample of packed rows (B, H, T, D). lengths: for each row the
    lengths of its samples, in order; the rest of a row is padding, and is treated as one more
    sample.

    One sample at a time: no (T, T) mask is stored, and no score is computed that a mask would
    discard.
    """
    T = q.size(2)
    rows = []
    for r, samples in enumerate(lengths):
        pieces = list(samples)
        padding = T - sum(samples)
        if padding:
            pieces.append(padding)

        row_q = q[r:r + 1].split(pieces, 2)  # one (1, H, length, D) per sample
        row_k = k[r:r + 1].split(pieces, 2)
        row_v = v[r:r + 1].split(pieces, 2)
        attended = []
        for sample_q, sample_k, sample_v in zip(row_q, row_k, row_v):
            attended.append(attention(sample_q, sample_k, sample_v, causal=True))
        rows.append(torch.cat(attended, 2))  # (1, H, T, D)
    return torch.cat(rows)


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None


@lru_cache(None)
@torch.inference_mode(False)  # the trial runs backward, even when called during inference
@torch.enable_grad()
def varlen_works(device):
    """
    Whether one kernel takes samples of any lengths on this device: tried once per process, since
    it depends on torch (2.11 and later), on how it was built, and on the GPU.
    """
    if device.type != "cuda":
        return False
    problem = why_not_varlen(device)
    if problem:
        banner(f"torch's attention kernel for packed rows cannot be used: {problem}.\n"
               f"Packed samples are attended to one by one, more slowly.")
    return not problem


def why_not_varlen(device):
    """What is wrong with varlen_attn on this device; "" if nothing is."""
    if varlen_attn is None or "window_size" not in inspect.signature(varlen_attn).parameters:
        return f"torch {torch.__version__} is too old, 2.11 has it"
    q, k, v = torch.randn(3, 1, 2, 48, 64, device=device, dtype=torch.bfloat16).unbind()
    q.requires_grad_()
    packing = Packing([[16, 29]], 48, device)
    try:
        y = packing.varlen_attention(q, k, v)
        y.sum().backward()
    except RuntimeError as error:
        return f"it does not run on this GPU ({error})"
    expected = packed_attention(q, k, v, [packing.samples])
    right = torch.allclose(y, expected, atol=0.05) and bool(q.grad.isfinite().all())
    return "" if right else "its result is wrong"


def takes_varlen(q, k):
    """Whether these queries and keys, (1, H, T, D), can go through that one kernel."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    same_heads = q.size(1) == k.size(1)
    return half and same_heads and varlen_works(q.device)


class Packing:
    """
    The `lengths` of packed rows, in a form that compiled kernels and one attention kernel for all
    samples can use.

    All rows are laid end to end as one row of B * T positions; attention does not care which row a
    sample came from. So batches differ in one size only, and torch.compile needs a single kernel.
    """
    def __init__(self, lengths, T, device):
        self.samples = []  # length of each sample in that one row; padding is one more sample
        for row in lengths:
            self.samples.extend(row)
            padding = T - sum(row)
            if padding:
                self.samples.append(padding)
        # Sample i takes positions starts[i] to starts[i + 1] - 1.
        starts = list(accumulate(self.samples, initial=0))
        self.starts = to_device(torch.tensor(starts, dtype=torch.int32), device)

    def flatten(self, x):
        """(B, T, ...) -> (1, B * T, ...)"""
        x = x.flatten(0, 1)[None]
        torch._dynamo.maybe_mark_dynamic(x, 1)  # the one size that varies between batches
        return x

    # The lists and numbers in here change with every batch. torch.compile must not see them, or it
    # would compile a graph for each.
    @torch.compiler.disable
    def attention(self, q, k, v):
        """Causal attention inside each sample: (1, H, B * T, D) -> the same shape."""
        if takes_varlen(q, k):
            y = self.varlen_attention(q, k, v)
        else:
            y = packed_attention(q, k, v, [self.samples])
        torch._dynamo.maybe_mark_dynamic(y, 2)
        return y

    def varlen_attention(self, q, k, v):
        longest = max(self.samples)
        # The kernel wants (positions, H, D).
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        causal = (-1, 0)  # any number of positions to the left, none to the right
        y = varlen_attn(q, k, v, self.starts, self.starts, longest, longest, window_size=causal)
        return y.transpose(0, 1)[None]


# -----------------------------------------------------------------------------
# Helpers

def run_blocks(blocks, x, *args, recompute=False, varies=0):
    """
    x through `blocks` one after the other. recompute is activation checkpointing: only the input
    of each block is kept for the backward pass, which computes the rest again. varies: the
    dimension of x whose size changes from batch to batch, which matters to compiled blocks only.
    """
    recompute = recompute and torch.is_grad_enabled()
    for block in blocks:
        is_compiled = block._compiled_call_impl is not None
        if is_compiled:
            # One kernel for any number of rows or images. All other sizes are static.
            torch._dynamo.maybe_mark_dynamic(x, varies)
        if recompute:
            # Nothing in a block is random, so there is no random state to be kept.
            x = checkpoint(block, x, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, *args)
    return x


def resample_grid(table, h, w):
    """
    Position table (H, W, C) -> (h, w, C) for another grid: bicubic with antialiasing in fp32, as
    published (both SAM's and CLIP's tables).
    """
    x = table.float().permute(2, 0, 1)[None]  # (1, C, H, W)
    x = F.interpolate(x, size=(h, w), mode="bicubic", antialias=True, align_corners=False)
    return x[0].permute(1, 2, 0).to(table.dtype)  # (h, w, C)


def trunc_normal_linears(module, std=0.02):
    """ViT initialization of every Linear and Conv2d inside `module`; biases start at zero."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
