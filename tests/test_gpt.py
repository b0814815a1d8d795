"""
Proves that the decoder is nanochat's of October 2025, by a second, plain implementation (and by
transformers' where that is installed); that decoding with the cache equals decoding without, for
rows of different lengths; and what is refused.

python -m pytest tests/test_gpt.py
"""

import math

import pytest
import torch
import torch.nn.functional as F

from nanochat import gpt
from nanochat.config import GPTConfig
from nanochat.gpt import EPS, GPT, FixedKVCache, KVCache
from nanochat.layers import attention
from scripts.parity import transformers_gpt

SIZES = dict(sequence_len=32, vocab_size=50, n_layer=2, n_head=4, n_kv_head=4, n_embd=32)


def make_gpt(**sizes):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**{**SIZES, **sizes}))
    gpt.init_weights()
    for p in gpt.parameters():  # the zeros of init_weights would hide everything
        torch.nn.init.normal_(p, std=p.size(-1) ** -0.5)
    return gpt


def logits_of(gpt, ids):
    return gpt.logits(gpt(gpt.transformer.wte(ids)))


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def turned(x, t):
    """
    The pairs (x[i], x[i + D/2]) of one head at position t, as complex numbers turned by
    t / 10000^(2i/D).
    """
    D = len(x)
    out = x.clone()
    for i in range(D // 2):
        angle = t * 10000 ** (-2 * i / D)
        a, b = x[i], x[i + D // 2]
        out[i] = a * math.cos(angle) + b * math.sin(angle)
        out[i + D // 2] = b * math.cos(angle) - a * math.sin(angle)
    return out


def plain_head(q, k, v):
    """One head over (T, D), one position after the other."""
    T, D = q.shape
    q = torch.stack([rms(turned(q[t], t)) for t in range(T)])
    k = torch.stack([rms(turned(k[t], t)) for t in range(T)])
    out = []
    for t in range(T):
        scores = k[:t + 1] @ q[t] / math.sqrt(D)
        out.append(scores.softmax(0) @ v[:t + 1])
    return torch.stack(out)


def plain_logits(weights, cfg, ids):
    """The same network from its formulas: fp64, one row, one head, one position at a time."""
    w = {name: t.double() for name, t in weights.items()}
    D = cfg.n_embd // cfg.n_head
    rows = []
    for row in ids.tolist():
        x = rms(w["transformer.wte.weight"][row])  # (T, C)
        for layer in range(cfg.n_layer):
            p = f"transformer.h.{layer}."
            y = rms(x)
            q = y @ w[f"{p}attn.c_q.weight"].T
            k = y @ w[f"{p}attn.c_k.weight"].T
            v = y @ w[f"{p}attn.c_v.weight"].T
            heads = []
            for h in range(cfg.n_head):
                g = h * cfg.n_kv_head // cfg.n_head  # query heads share key heads in groups
                mine = slice(h * D, (h + 1) * D)
                shared = slice(g * D, (g + 1) * D)
                heads.append(plain_head(q[:, mine], k[:, shared], v[:, shared]))
            x = x + torch.cat(heads, -1) @ w[f"{p}attn.c_proj.weight"].T
            z = (rms(x) @ w[f"{p}mlp.c_fc.weight"].T).relu().square()
            x = x + z @ w[f"{p}mlp.c_proj.weight"].T
        rows.append(15 * torch.tanh(rms(x) @ w["lm_head.weight"].T / 15))
    return torch.stack(rows)


@pytest.mark.parametrize("n_kv_head", [4, 2])
@torch.no_grad()
def test_equals_a_plain_implementation(n_kv_head):
    gpt = make_gpt(n_kv_head=n_kv_head)
    ids = torch.randint(50, (2, 12))
    expected = plain_logits(gpt.state_dict(), gpt.cfg, ids)
    assert expected.std() > 0.5
    assert (logits_of(gpt, ids) - expected).abs().max() < 1e-5  # worst seen: 1.3e-6


@torch.no_grad()
def test_equals_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, "NanoChatForCausalLM"):
        pytest.skip("this transformers has no nanochat")
    gpt = make_gpt(n_kv_head=2)
    theirs = transformers_gpt(gpt)
    ids = torch.randint(gpt.cfg.vocab_size, (2, 16))
    assert (logits_of(gpt, ids) - theirs(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("n_kv_head", [4, 2])
@torch.no_grad()
def test_cached_equals_uncached(n_kv_head):
    gpt = make_gpt(n_kv_head=n_kv_head)
    ids = torch.randint(50, (3, 20))
    expected = logits_of(gpt, ids)
    lengths = torch.tensor([4, 9, 6])
    prompt = ids[:, :9].clone()
    for row, n in enumerate(lengths):
        prompt[row, n:] = 49  # padding, which the cache must forget
    cache = KVCache(gpt.cfg, 3, 20, ids.device, torch.float32)
    assert cache.reserve(20) and not cache.reserve(20)
    hidden = gpt(gpt.transformer.wte(prompt), cache=cache)
    for row, n in enumerate(lengths):
        assert (gpt.logits(hidden[row, :n]) - expected[row, :n]).abs().max() < 1e-5
    position = lengths.clone()
    rows = torch.arange(3)
    for step in range(10):
        if step == 5:  # a row leaves the batch
            cache.keep_rows(torch.tensor([True, False, True]))
            position = position[[0, 2]]
            rows = rows[[0, 2]]
        x = gpt.transformer.wte(ids[rows, position])[:, None]
        logits = gpt.logits(gpt(x, cache=cache, positions=position[:, None])[:, 0])
        assert (logits - expected[rows, position]).abs().max() < 1e-5
        position = position + 1


@torch.no_grad()
def test_no_position_sees_a_later_one():
    gpt = make_gpt()
    ids = torch.randint(50, (1, 12))
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % 50
    a, b = logits_of(gpt, ids), logits_of(gpt, changed)
    assert torch.equal(a[:, :7], b[:, :7]) and (a[:, 7:] - b[:, 7:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("T", [8, 300, 1100])  # written out, in blocks if causal, and SDPA
@pytest.mark.parametrize("kind", ["full", "causal", "mask"])
def test_attention(T, kind):
    torch.manual_seed(0)
    q = torch.randn(1, 2, T, 8)
    k = torch.randn(1, 2, T, 8)
    v = torch.randn(1, 2, T, 5)  # values may be narrower
    allowed = torch.ones(T, T).bool()
    if kind == "causal":
        allowed = allowed.tril()
    if kind == "mask":
        allowed = (torch.rand(T, T) > 0.5) | torch.eye(T).bool()
    mask = torch.where(allowed, 0.0, -math.inf)
    scores = 0.3 * q.double() @ k.double().mT
    expected = (scores + mask).softmax(-1) @ v.double()
    given = mask[None, None] if kind == "mask" else None
    y = attention(q, k, v, scale=0.3, mask=given, causal=kind == "causal")
    assert y.shape == v.shape and (y - expected).abs().max() < 1e-5


@torch.no_grad()
def test_softcap():
    gpt = make_gpt()
    x = F.normalize(torch.randn(4, 32))
    gpt.lm_head.weight.mul_(1000)
    assert 14.9 < gpt.logits(x).abs().max() <= 15
    gpt.lm_head.weight.mul_(1e-6)
    plain = x @ gpt.lm_head.weight.T
    torch.testing.assert_close(gpt.logits(x), plain)  # near zero it changes nothing
    torch.testing.assert_close(gpt.logits(x, gpt.lm_head.weight), plain)


def test_padding_of_the_head_changes_nothing():
    """On a GPU the head gets rows of zeros up to a multiple of 64; its 50 logits stay the same."""
    gpt = make_gpt()
    assert gpt.head_weight(torch.float32).shape == (50, 32)  # on a CPU there is no need
    x = torch.randn(4, 32)
    grads = []
    for head in (None, F.pad(gpt.lm_head.weight, (0, 0, 0, 14))):
        logits = gpt.logits(x, head)
        assert logits.shape == (4, 50)
        logits.logsumexp(-1).sum().backward()
        grads.append(gpt.lm_head.weight.grad)
        gpt.lm_head.weight.grad = None
    torch.testing.assert_close(*grads)
    meta = gpt.to("meta")
    assert meta.head_weight(torch.bfloat16).shape == (64, 32)
    assert meta.state_dict()["lm_head.weight"].shape == (50, 32)  # checkpoints are as before


def test_logits_are_fp32_whatever_the_compute_dtype():
    gpt = make_gpt()
    hidden = gpt(gpt.transformer.wte(torch.arange(8)[None]).bfloat16())
    assert hidden.dtype == torch.bfloat16 and gpt.logits(hidden).dtype == torch.float32


def test_a_fresh_decoder_knows_nothing():
    gpt = make_gpt()
    gpt.init_weights()
    assert logits_of(gpt, torch.arange(8)[None]).abs().max() == 0


def test_how_the_cache_grows():
    cfg = GPTConfig(**{**SIZES, "sequence_len": 1000})

    def sizes(kind):
        """What is reserved while 1,000 positions are asked for one by one."""
        cache = kind(cfg, 2, 1000, "cpu", torch.float32, room=64)
        found = []
        for n in range(1, 1001):
            replaced = cache.reserve(n)
            assert n <= cache.reserved
            if replaced:
                found.append(cache.reserved)
        return found

    assert sizes(KVCache) == [*range(64, 1000, 64), 1000]
    # Few sizes, since each takes a CUDA graph of its own.
    assert sizes(FixedKVCache) == [64, 128, 192, 256, 320, 448, 576, 768, 960, 1000]


def test_a_fixed_cache_is_a_cache():
    """The same contents after growing and dropping rows, in memory that does not move."""
    cfg = GPTConfig(**SIZES)
    plain = KVCache(cfg, 3, 30, "cpu", torch.float32, room=4)
    fixed = FixedKVCache(cfg, 3, 30, "cpu", torch.float32, room=4)
    place = fixed.memory.data_ptr()
    for step in range(20):
        if step == 12:
            for cache in (plain, fixed):
                cache.keep_rows(torch.tensor([0, 2]))
        rows = plain.k.size(1)
        assert fixed.k.size(1) == rows
        for cache in (plain, fixed):
            cache.reserve(step + 1)
        k, v = torch.randn(2, rows, cfg.n_kv_head, 1, cfg.n_embd // cfg.n_head)
        for layer in range(cfg.n_layer):
            for cache in (plain, fixed):
                cache.update(layer, k + layer, v, torch.full((rows, 1), step))
        n = step + 1
        assert torch.equal(fixed.k[:, :, :, :n], plain.k[:, :, :, :n])
        assert torch.equal(fixed.v[:, :, :, :n], plain.v[:, :, :, :n])
    assert fixed.k.data_ptr() == place


def test_too_long():
    gpt = make_gpt()
    with pytest.raises(ValueError, match="cache of 33 positions: the decoder has 32"):
        KVCache(gpt.cfg, 1, 33, "cpu", torch.float32)
    with pytest.raises(ValueError, match="33 positions, the decoder has 32"):
        gpt(torch.zeros(1, 33, 32))


def test_kernels_are_tried_outside_of_blocks_that_are_recomputed(monkeypatch):
    """A trial in there would save tensors that are missing when the block is computed again."""
    order = []
    run_blocks = gpt.run_blocks
    monkeypatch.setattr(gpt, "varlen_works", lambda device: order.append("trial"))
    monkeypatch.setattr(gpt, "run_blocks", lambda *args, **settings: (
        order.append("blocks"), run_blocks(*args, **settings))[1])
    model = gpt.GPT(GPTConfig(**SIZES))
    model(torch.randn(1, 7, SIZES["n_embd"]), lengths=[[3, 4]])
    assert order == ["trial", "blocks", "blocks"]
