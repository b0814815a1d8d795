"""
nanochat's GPT as of October 2025: rotary positions in fp32, QK norm, ReLU^2, RMSNorm without
parameters (also right after the embedding), untied head, logits softly capped at 15. Parameter
names are nanochat's, so that its checkpoints load.

Shapes: B rows, T positions, C = n_embd, H heads of D = C / H channels.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.layers import Linear, Packing, attention, run_blocks, varlen_works

EPS = torch.finfo(torch.float32).eps  # 1.19e-7, whatever the compute dtype
SOFTCAP = 15.0  # logits stay within +-15
# nanochat's 65,536 tokens and <|image|> make rows of logits that are not aligned in memory, for
# which cuBLAS has slow kernels only.
HEAD_ROWS = 64
ROOM = 64  # positions by which a KV cache grows


def norm(x):
    channels = (x.size(-1),)
    return F.rms_norm(x, channels, eps=EPS)  # nanochat's norms have no weights


def rotary_tables(length, head_dim, base=10000.0):
    """cos and sin, each (length, D / 2), fp32."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32)
    frequencies = base ** (-channels / head_dim)
    positions = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """(B, T, H, D) turned by its position, in fp32. cos, sin: (B or 1, T, 1, D / 2) fp32."""
    a, b = x.float().chunk(2, -1)  # halves, not neighbors, are pairs: (B, T, H, D / 2)
    turned_a = a * cos + b * sin
    turned_b = b * cos - a * sin
    return torch.cat([turned_a, turned_b], -1)


class KVCache:
    """
    Keys and values of all layers, for B rows of up to `length` positions. k and v are
    (n_layer, B, H, reserved, D).

    Rows may have different lengths. The next token of a row is written at that row's own
    position, over whatever padding its prompt had there. Positions are reserved `room` at a time,
    so that a step attends to little more than what has been written, in memory without gaps.
    """
    def __init__(self, cfg, rows, length, device, dtype, room=ROOM):
        if length > cfg.sequence_len:
            raise ValueError(f"cache of {length} positions: the decoder has {cfg.sequence_len}; "
                             f"shorten prompt or max_new_tokens")
        self.length = length  # no row gets longer than this
        self.room = room  # positions reserved at a time
        shape = (cfg.n_layer, rows, cfg.n_kv_head, 0, cfg.n_embd // cfg.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def reserved(self):
        return self.k.size(3)

    def reserve(self, n):
        """Makes room for n positions in the longest row. -> whether there was too little."""
        if min(n, self.length) <= self.reserved:
            return False
        self.grow(self.rounded_up(n))
        return True

    def rounded_up(self, n):
        enough = -(-n // self.room) * self.room
        return min(enough, self.length)

    def grow(self, reserved):
        more = reserved - self.reserved
        self.k = F.pad(self.k, (0, 0, 0, more))
        self.v = F.pad(self.v, (0, 0, 0, more))

    def update(self, layer, k, v, positions):
        """Writes k, v (B, H, T, D) at `positions` (B, T). -> all keys and values of the layer."""
        index = positions[:, None, :, None]  # (B, 1, T, 1)
        index = index.expand_as(k)  # (B, H, T, D)
        self.k[layer].scatter_(2, index, k)
        self.v[layer].scatter_(2, index, v)
        return self.k[layer], self.v[layer]

    def keep_rows(self, index):
        """Drops all other rows: finished ones leave the batch."""
        self.k = self.k[:, index]
        self.v = self.v[:, index]

    def mask(self, positions):
        """
        What is added to the scores of queries at `positions` (B, T): -inf at every key after the
        query's own position, (B, 1, T, reserved).
        """
        device = positions.device
        keys = torch.arange(self.reserved, device=device)
        queries = positions[:, None, :, None]  # (B, 1, T, 1)
        later = keys > queries  # (B, 1, T, reserved)
        mask = torch.zeros(later.shape, device=device, dtype=self.k.dtype)
        return mask.masked_fill_(later, float("-inf"))


class FixedKVCache(KVCache):
    """
    The same in memory that stays where it is, which CUDA graphs need: all positions are allocated
    at once, and k and v are views of the first `reserved` positions of the first rows.
    """
    def __init__(self, cfg, rows, length, device, dtype, room):
        super().__init__(cfg, rows, length, device, dtype, room)
        n_layer, B, H, _, D = self.k.shape
        self.memory = torch.zeros(2, n_layer, B, H, length, D, device=device, dtype=dtype)

    def look_at(self, rows, reserved):
        self.k, self.v = self.memory[:, :, :rows, :, :reserved]

    def grow(self, reserved):
        # Every size needs a graph of its own, so there are few: each a quarter larger.
        larger = self.rounded_up(self.reserved * 5 // 4)
        self.look_at(self.k.size(1), max(reserved, larger))

    def keep_rows(self, index):
        rows = len(index)
        reserved = self.reserved
        kept = self.memory[:, :, index, :, :reserved]  # a copy
        self.memory[:, :, :rows, :, :reserved] = kept
        self.look_at(rows, reserved)


class Attention(nn.Module):
    """Causal attention with rotary positions and QK norm; keys and values may have fewer heads."""
    def __init__(self, cfg, layer):
        super().__init__()
        self.layer = layer  # its place in the cache
        self.n_head = cfg.n_head
        self.n_kv_head = cfg.n_kv_head
        self.head_dim = cfg.n_embd // cfg.n_head
        C = cfg.n_embd
        kv_width = self.n_kv_head * self.head_dim
        self.c_q = Linear(C, C, bias=False)
        self.c_k = Linear(C, kv_width, bias=False)
        self.c_v = Linear(C, kv_width, bias=False)
        self.c_proj = Linear(C, C, bias=False)

    def project(self, x, cos, sin):
        """(B, T, C) -> queries, keys and values, each (B, its heads, T, D)."""
        B, T, _ = x.shape
        # Queries and keys are rotated and normed together: half as many kernels.
        qk = torch.cat([self.c_q(x), self.c_k(x)], -1)
        qk = qk.view(B, T, -1, self.head_dim)  # (B, T, heads of q and of k, D)
        qk = rotate(qk, cos, sin)
        qk = norm(qk).to(x.dtype)
        qk = qk.transpose(1, 2)  # (B, heads of q and of k, T, D)
        q, k = qk.split([self.n_head, self.n_kv_head], 1)  # (B, H, T, D)
        v = self.c_v(x)
        v = v.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        return q, k, v

    def attend(self, q, k, v, mask, cache, positions):
        """Each query sees the keys up to its own position: (B, H, T, D) -> (B, H, T, D)."""
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)  # all keys so far, (B, H, reserved, D)
        return attention(q, k, v, mask=mask, causal=mask is None)

    def merge(self, y):
        """What the heads found (B, H, T, D) -> (B, T, C)."""
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.c_proj = Linear(4 * cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x):
        x = F.relu(self.c_fc(x)).square()  # (B, T, 4 * C)
        return self.c_proj(x)


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.attn = Attention(cfg, layer)
        self.mlp = MLP(cfg)

    def forward(self, x, cos, sin, mask, cache, positions, packing):
        q, k, v = self.attn.project(norm(x), cos, sin)
        # Compiled blocks are cut in two here when rows are packed. One call further down,
        # torch.compile would cut them in four.
        if packing is None:
            y = self.attn.attend(q, k, v, mask, cache, positions)
        else:
            y = packing.attention(q, k, v)
        x = x + self.attn.merge(y)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        blocks = [Block(cfg, layer) for layer in range(cfg.n_layer)]
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(cfg.vocab_size, cfg.n_embd),
            "h": nn.ModuleList(blocks),
        })
        self.lm_head = Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.recompute = False
        # Not in checkpoints: sequence_len may grow later.
        cos, sin = rotary_tables(cfg.sequence_len, cfg.n_embd // cfg.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def init_weights(self):
        """nanochat's initialization."""
        nn.init.normal_(self.transformer.wte.weight)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                fan_out, fan_in = m.weight.shape
                # Spectral norms that do not depend on the width (arXiv 2310.17813)
                aspect = min(1.0, (fan_out / fan_in) ** 0.5)
                nn.init.normal_(m.weight, std=fan_in ** -0.5 * aspect)
        # A fresh model gives every token the same probability, and its blocks are the identity.
        nn.init.zeros_(self.lm_head.weight)
        for block in self.transformer.h:
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)

    def forward(self, x, cache=None, positions=None, lengths=None, taps=None):
        """
        Embeddings (B, T, C), before their norm -> hidden states (B, T, C), which `logits` takes.

        positions: (B, T), default 0..T-1.
        cache:     a KVCache with room for them; a query sees every key up to its own position.
        lengths:   of packed rows, for each row the lengths of its samples, in order. A position
                   then sees its own sample only.
        taps:      a dict that is given the hidden states "before_last_block" (B, T, C).
        """
        B, T, _ = x.shape
        if positions is None:
            if T > self.cfg.sequence_len:
                raise ValueError(f"sequence of {T} positions, the decoder has "
                                 f"{self.cfg.sequence_len}")
            cos = self.cos[None, :T, None]  # (1, T, 1, D / 2)
            sin = self.sin[None, :T, None]
            if cache is not None:
                positions = torch.arange(T, device=x.device).expand(B, T)
        else:
            cos = self.cos[positions][:, :, None]  # (B, T, 1, D / 2)
            sin = self.sin[positions][:, :, None]

        # Without a cache, attention is causal and needs no mask. With one, all layers share it.
        mask = None if cache is None else cache.mask(positions)
        x = norm(x)
        packing = None
        if lengths:
            packing = Packing(lengths, T, x.device)
            # Tried here, the first time: inside a block whose activations are recomputed, the trial
            # would be counted among them, and be missing when they are computed again.
            varlen_works(x.device)
            x = packing.flatten(x)  # (1, B * T, C)
            cos = packing.flatten(cos.expand(B, -1, -1, -1))
            sin = packing.flatten(sin.expand(B, -1, -1, -1))
        varies = 1 if packing else 0  # of x: positions of packed rows, else rows

        def through(blocks, x):
            return run_blocks(blocks, x, cos, sin, mask, cache, positions, packing,
                              recompute=self.recompute, varies=varies)

        *blocks, last_block = self.transformer.h
        x = through(blocks, x)
        if taps is not None:
            taps["before_last_block"] = x.view(B, T, -1)
        x = through([last_block], x)
        return norm(x).view(B, T, -1)

    def head_weight(self, dtype):
        """
        The head's weights (vocab, C) in the compute dtype; on a GPU with rows of zeros up to a
        multiple of HEAD_ROWS, which `logits` cuts off again.
        """
        weight = self.lm_head.weight.to(dtype)
        missing = -weight.size(0) % HEAD_ROWS
        if missing and weight.device.type != "cpu":
            weight = F.pad(weight, (0, 0, 0, missing))
        return weight

    def logits(self, x, head_weight=None):
        """
        (..., C) -> (..., vocab) in fp32. head_weight: as returned by head_weight().
        Without it nothing is padded, since a decoding step is short and the padding is a copy.
        """
        if head_weight is None:
            x = self.lm_head(x)
        else:
            x = F.linear(x, head_weight)[..., :self.cfg.vocab_size]
        x = x.float()  # cap and softmax are in fp32, whatever the compute dtype
        return SOFTCAP * torch.tanh(x / SOFTCAP)
