"""
nanochat's GPT, October 2025 form: rotary positions in fp32, QK norm, ReLU^2, RMSNorm without parameters (also right after the
embedding), untied head, logits softly capped at 15. Parameter names are nanochat's, so that its checkpoints load.

Shapes: B rows, T positions, C = n_embd, H heads of D = C / H.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.layers import Linear, attention, packed_attention, run_blocks

EPS = torch.finfo(torch.float32).eps  # 1.19e-7, whatever the compute dtype
SOFTCAP = 15.0


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def rotary_tables(length, head_dim, base=10000.0):
    """cos and sin, each (length, head_dim / 2), fp32."""
    freqs = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), freqs)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """(B, T, H, D) turned by its position; cos, sin: (B or 1, T, 1, D / 2) fp32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


class KVCache:
    """
    Keys and values of every layer for B rows of up to `length` positions. Rows may have different lengths: a row's next token
    is written at its own position, over whatever padding its prompt had there. Room is made `room` positions at a time, so that
    a step attends to little more than what there is, in memory without gaps.
    """
    def __init__(self, cfg, rows, length, device, dtype, room=64):
        if length > cfg.sequence_len:
            raise ValueError(f"cache of {length} positions: the decoder has {cfg.sequence_len}; shorten prompt or max_new_tokens")
        shape = (cfg.n_layer, rows, cfg.n_kv_head, 0, cfg.n_embd // cfg.n_head)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length, self.room = length, room

    def reserve(self, n):
        """Room for n positions in the longest row; -> whether that took other tensors."""
        more = min(-(-n // self.room) * self.room, self.length) - self.k.size(3)
        if more > 0:
            self.k, self.v = (F.pad(t, (0, 0, 0, more)) for t in (self.k, self.v))
        return more > 0

    def update(self, layer, k, v, positions):
        """Writes k, v (B, H, T, D) at `positions` (B, T); returns all keys and values."""
        at = positions[:, None, :, None].expand(-1, k.size(1), -1, k.size(3))
        self.k[layer].scatter_(2, at, k)
        self.v[layer].scatter_(2, at, v)
        return self.k[layer], self.v[layer]

    def keep_rows(self, index):
        """Only these rows go on (finished ones leave the batch)."""
        self.k, self.v = self.k[:, index], self.v[:, index]


class Attention(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head, self.head_dim = layer, cfg.n_head, cfg.n_kv_head, cfg.n_embd // cfg.n_head
        self.c_q = Linear(cfg.n_embd, self.n_head * self.head_dim, bias=False)
        self.c_k = Linear(cfg.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.c_v = Linear(cfg.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.c_proj = Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x, cos, sin, mask, cache, positions, lengths):
        B, T, C = x.shape
        qk = torch.cat([self.c_q(x), self.c_k(x)], -1).view(B, T, -1, self.head_dim)  # together: half as many kernels
        q, k = norm(rotate(qk, cos, sin)).to(x.dtype).transpose(1, 2).split([self.n_head, self.n_kv_head], 1)  # (B, H, T, D)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)
        y = packed_attention(q, k, v, lengths) if lengths else attention(q, k, v, mask=mask, causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.c_proj = Linear(4 * cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.attn = Attention(cfg, layer)
        self.mlp = MLP(cfg)

    def forward(self, x, *attention_args):
        x = x + self.attn(norm(x), *attention_args)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(cfg.vocab_size, cfg.n_embd),
            "h": nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layer))})
        self.lm_head = Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.recompute = False
        cos, sin = rotary_tables(cfg.sequence_len, cfg.n_embd // cfg.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def init_weights(self):
        """nanochat's: embeddings N(0, 1), matrices scaled by fan-in, zero where a block meets the residual stream and the head."""
        nn.init.normal_(self.transformer.wte.weight)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                fan_out, fan_in = m.weight.shape
                nn.init.normal_(m.weight, std=fan_in ** -0.5 * min(1.0, (fan_out / fan_in) ** 0.5))
        nn.init.zeros_(self.lm_head.weight)
        for block in self.transformer.h:
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)

    def forward(self, x, cache=None, positions=None, lengths=None):
        """
        Embeddings (B, T, C), before their norm, -> hidden states (B, T, C), to be given to `logits`.
        `positions` (B, T): default 0..T-1. With a cache, which must have room for them, a query sees every key up to its own position.
        `lengths`: of packed rows, for each row those of its samples, in order; a position then sees its own sample alone.
        """
        (B, T, _), mask = x.shape, None
        if positions is None:
            if T > self.cfg.sequence_len:
                raise ValueError(f"sequence of {T} positions, the decoder has {self.cfg.sequence_len}")
            cos, sin = self.cos[None, :T, None], self.sin[None, :T, None]
            if cache is not None:
                positions = torch.arange(T, device=x.device).expand(B, T)
        else:
            cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        if cache is not None:
            keys = torch.arange(cache.k.size(3), device=x.device)
            later = keys[None, None, None, :] > positions[:, None, :, None]
            mask = x.new_zeros(later.shape).masked_fill_(later, float("-inf"))  # added to the scores, made once for all layers
        return norm(run_blocks(self.transformer.h, norm(x), cos, sin, mask, cache, positions, lengths, recompute=self.recompute))

    def logits(self, x):
        """(..., C) -> (..., vocab) in fp32."""
        x = self.lm_head(x).float()
        return SOFTCAP * torch.tanh(x / SOFTCAP)
