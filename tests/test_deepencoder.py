"""
Proves that the encoder is the published one: attention with its folded bias equals the plain
formula, sizes and names are those of the published weights, CLIP's features come before SAM's.
That another second stage fits in, and that parts cover all parameters. Where transformers is
installed, the whole encoder also equals its port of DeepSeek-OCR's.

python -m pytest tests/test_deepencoder.py
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from nanochat import config
from nanochat.clip import CLIP, CLIPConfig, CLIPEmbeddings
from nanochat.config import ModelConfig, SAMConfig
from nanochat.deepencoder import SAM, DeepEncoder, SAMAttention, SAMBlock
from nanochat.image_modes import Mode, plan
from nanochat.layers import Linear, attention
from nanochat.model import DeepseekOCR, forward_flops
from scripts.parity import transformers_encoder

# -----------------------------------------------------------------------------
# SAM's attention


def randomized(module, seed=0):
    torch.manual_seed(seed)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module.double()


def linear(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def resampled(table, length):
    """Linear interpolation with half-pixel centers, edges repeated."""
    last = len(table) - 1
    at = (torch.arange(length).double() + 0.5) * len(table) / length - 0.5
    at = at.clamp(0, last)
    low = at.long()
    high = (low + 1).clamp(max=last)
    share = (at - low)[:, None]
    return table[low] * (1 - share) + table[high] * share


def naive_attention(attn, x):
    """softmax(q.k / sqrt(d) + q.Rh[dy] + q.Rw[dx]) v, pair of positions by pair. x: (H, W, C)."""
    H, W, C = x.shape
    d = C // attn.n_head
    qkv = linear(attn.qkv, x.reshape(H * W, C)).view(H * W, 3, attn.n_head, d)
    q, k, v = qkv.unbind(1)
    table_h = resampled(attn.rel_pos_h, 2 * H - 1)
    table_w = resampled(attn.rel_pos_w, 2 * W - 1)
    heads = []
    for n in range(attn.n_head):
        logits = q[:, n] @ k[:, n].T / d ** 0.5
        for i in range(H * W):
            for j in range(H * W):
                dy = i // W - j // W
                dx = i % W - j % W
                logits[i, j] += q[i, n] @ (table_h[dy + H - 1] + table_w[dx + W - 1])
        heads.append(logits.softmax(-1) @ v[:, n])
    return linear(attn.proj, torch.cat(heads, -1)).view(H, W, C)


# The grid of the table, a smaller one, a larger one
@pytest.mark.parametrize("grid, H, W", [(4, 4, 4), (8, 6, 6), (3, 5, 4)])
@torch.no_grad()
def test_attention_equals_the_plain_formula(grid, H, W):
    attn = randomized(SAMAttention(16, 2, grid))
    x = torch.randn(2, H, W, 16).double()
    expected = torch.stack([naive_attention(attn, image) for image in x])
    # worst seen: 1.8e-6, from interpolating in fp32
    assert (attn(x) - expected).abs().max() < 1e-5
    torch.nn.init.zeros_(attn.rel_pos_h)
    assert (attn(x) - expected).abs().max() > 1e-2  # the bias does matter here


def normed(layer, x, eps):
    centered = x - x.mean(-1, keepdim=True)
    var = x.var(-1, keepdim=True, correction=0)
    return centered / (var + eps).sqrt() * layer.weight + layer.bias


def gelu(x):
    return x * (1 + torch.erf(x / 2 ** 0.5)) / 2


def naive_block(block, x):
    """A SAM block on one image (H, W, C). Padding to windows is after the norm and attended to."""
    H, W, _ = x.shape
    w = block.window
    y = normed(block.norm1, x, 1e-6)
    if w:
        y = F.pad(y, (0, 0, 0, -W % w, 0, -H % w))
        rows = []
        for top in range(0, H, w):
            row = []
            for left in range(0, W, w):
                row.append(naive_attention(block.attn, y[top:top + w, left:left + w]))
            rows.append(torch.cat(row, 1))
        x = x + torch.cat(rows)[:H, :W]
    else:
        x = x + naive_attention(block.attn, y)
    z = gelu(linear(block.mlp.lin1, normed(block.norm2, x, 1e-6)))
    return x + linear(block.mlp.lin2, z)


@pytest.mark.parametrize("window, H, W", [(5, 8, 8), (5, 10, 7), (0, 8, 8)])
@torch.no_grad()
def test_block(window, H, W):
    block = randomized(SAMBlock(16, 2, window, grid=8))
    x = torch.randn(2, H, W, 16).double() * 1e-3  # so small that the norm's eps counts
    expected = torch.stack([naive_block(block, image) for image in x])
    assert (block(x) - expected).abs().max() < 1e-5


# -----------------------------------------------------------------------------
# CLIP, and the position tables of both


def naive_clip(clip, image):
    """CLIP with 2 heads of 8 channels on one image (C, h, w)."""
    table = clip.embeddings.position_embedding.weight
    y = torch.cat([clip.embeddings.class_embedding[None], image.flatten(1).T]) + table
    y = normed(clip.pre_layrnorm, y, 1e-5)
    for layer in clip.transformer.layers:
        qkv = linear(layer.self_attn.qkv_proj, normed(layer.layer_norm1, y, 1e-5))
        q, k, v = qkv.chunk(3, -1)
        heads = []
        for h in (slice(0, 8), slice(8, 16)):
            scores = q[:, h] @ k[:, h].T / 8 ** 0.5
            heads.append(scores.softmax(-1) @ v[:, h])
        y = y + linear(layer.self_attn.out_proj, torch.cat(heads, -1))
        z = linear(layer.mlp.fc1, normed(layer.layer_norm2, y, 1e-5))
        y = y + linear(layer.mlp.fc2, z / (1 + torch.exp(-1.702 * z)))
    return y[1:]  # the class token is dropped


@torch.no_grad()
def test_clip_equals_the_plain_formula():
    clip = randomized(CLIP(CLIPConfig(
        grid=2, width=16, depth=2, n_head=2, ffn=24, patch_size=0)))
    x = torch.randn(3, 16, 2, 2).double() * 1e-2
    expected = torch.stack([naive_clip(clip, image) for image in x])
    assert (clip(x) - expected).abs().max() < 1e-9


def resized_by_pil(table, side):
    """Bicubic with antialiasing, (h, w, C) -> (side, side, C), by another library."""
    channels = []
    for channel in table.permute(2, 0, 1):
        image = Image.fromarray(channel.numpy())
        channels.append(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(channels, -1))


@pytest.mark.parametrize("side", [5, 8, 11])
@torch.no_grad()
def test_position_tables_for_another_grid(side):
    torch.manual_seed(0)
    sam = SAM(SAMConfig(image_size=64, patch_size=8, width=4, depth=0, n_head=1, neck=4, net_2=4,
                        net_3=4))
    sam.pos_embed.normal_()
    expected = resized_by_pil(sam.pos_embed[0], side)
    torch.testing.assert_close(sam.positions(side)[0], expected, atol=1e-5, rtol=0)

    embeddings = CLIPEmbeddings(CLIPConfig(grid=8, width=4, depth=0, n_head=1, patch_size=0))
    table = embeddings.position_embedding.weight
    y = embeddings(torch.zeros(1, 4, side, side))[0]
    expected = resized_by_pil(table[1:].view(8, 8, 4), side)
    torch.testing.assert_close(y[1:].view(side, side, 4), expected, atol=1e-5, rtol=0)
    assert torch.equal(y[0], table[0])  # the class token's place is not on the grid


# -----------------------------------------------------------------------------
# The published size


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return DeepseekOCR(ModelConfig())


def test_published_parameter_counts(published):
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(published.encoder.sam_model) == 95_569_152
    assert count(published.encoder.vision_model) == 303_177_728
    assert count(published.projector) == 2_622_720


def test_published_names_and_shapes(published):
    def weights_and_biases(prefix, *layers):
        return {f"{prefix}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}

    names = {
        "sam_model.pos_embed", "sam_model.net_2.weight", "sam_model.net_3.weight",
        "sam_model.neck.0.weight", "sam_model.neck.2.weight",
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight"}
    names |= weights_and_biases("sam_model", "patch_embed.proj", "neck.1", "neck.3")
    names |= weights_and_biases("vision_model", "pre_layrnorm")
    for i in range(12):
        names |= weights_and_biases(
            f"sam_model.blocks.{i}", "norm1", "norm2", "attn.qkv", "attn.proj", "mlp.lin1",
            "mlp.lin2")
        names |= {f"sam_model.blocks.{i}.attn.rel_pos_{axis}" for axis in "hw"}
    for i in range(24):
        names |= weights_and_biases(
            f"vision_model.transformer.layers.{i}", "layer_norm1", "layer_norm2",
            "self_attn.qkv_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    shapes = {name: tuple(t.shape) for name, t in published.encoder.state_dict().items()}
    assert set(shapes) == names  # so "none" holds no state either

    for i in range(12):
        table = (127, 64) if i in (2, 5, 8, 11) else (27, 64)  # global, or in windows of 14
        assert shapes[f"sam_model.blocks.{i}.attn.rel_pos_h"] == table
        assert shapes[f"sam_model.blocks.{i}.attn.rel_pos_w"] == table
    assert shapes["sam_model.pos_embed"] == (1, 64, 64, 768)
    assert shapes["sam_model.net_2.weight"] == (512, 256, 3, 3)
    assert shapes["sam_model.net_3.weight"] == (1024, 512, 3, 3)
    assert shapes["vision_model.embeddings.position_embedding.weight"] == (257, 1024)

    around = {name for name in published.state_dict()
              if not name.startswith(("encoder.", "gpt."))}
    assert around == {
        "projector.layers.weight", "projector.layers.bias", "image_newline", "view_seperator"}


# -----------------------------------------------------------------------------
# The whole encoder


@pytest.fixture
def encoder(model):
    return model.encoder.eval()


@pytest.mark.parametrize("side, tokens", [(32, 1), (64, 4), (128, 16)])
@torch.no_grad()
def test_one_token_per_16_patches_and_clip_first(encoder, side, tokens):
    x = torch.rand(2, 3, side, side)
    taps = {}
    y = encoder(x, taps)
    assert y.shape == (2, tokens, 32 + 32)
    clip, compressor = y.split(32, -1)
    compressed = encoder.sam_model(x)
    assert torch.equal(compressor, compressed.flatten(2).transpose(1, 2))
    assert torch.equal(clip, encoder.vision_model(compressed))
    assert list(taps) == ["sam", "compressor", "clip"]
    assert torch.equal(taps["compressor"], compressed)
    assert torch.equal(taps["clip"], clip)


@pytest.mark.parametrize("shape", [(1, 3, 64, 32), (1, 3, 48, 48), (3, 64, 64)])
def test_pixels_of_a_wrong_shape(encoder, shape):
    with pytest.raises(ValueError, match="need .* multiple of 32"):
        encoder(torch.zeros(shape))


@pytest.mark.parametrize("side", [64, 96])  # the tables' size, and one they are interpolated for
@torch.no_grad()
def test_equals_the_port_in_transformers(cfg, side):
    pytest.importorskip("transformers.models.unlimited_ocr", exc_type=ImportError,
                        reason="transformers with unlimited_ocr is not installed")
    ours = DeepEncoder(cfg)
    randomized(ours).float()
    theirs = transformers_encoder(ours, cfg)
    x = torch.rand(2, 3, side, side) * 2 - 1
    expected = theirs(x).last_hidden_state
    assert (ours(x) - expected).abs().max() < 1e-5 * expected.abs().max()


# -----------------------------------------------------------------------------
# Parts


def test_parts_cover_every_parameter_once(model):
    parts = model.parts()
    assert list(parts) == ["sam", "compressor", "clip", "projector", "gpt", "embedding", "head"]
    names = [name for part in parts.values() for name, _ in part]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(parts.values())
    found = {part: {name for name, _ in parts[part]} for part in parts}
    assert found["compressor"] == {
        "encoder.sam_model.net_2.weight", "encoder.sam_model.net_3.weight"}
    assert found["projector"] >= {"image_newline", "view_seperator"}
    assert found["embedding"] == {"gpt.transformer.wte.weight"}
    assert found["head"] == {"gpt.lm_head.weight"}


@pytest.mark.parametrize("names, frozen", [
    (["sam"], ["sam"]),
    (["compressor"], ["compressor"]),
    (["clip", "head"], ["clip", "head"]),
    (["gpt"], ["gpt", "embedding", "head"]),
    (["sam", "compressor"], ["sam", "compressor"]),
])
def test_frozen_parts_get_no_gradient_and_all_others_do(model, make_batch, pages, names, frozen):
    """Also those before a frozen part: gradients pass through it."""
    model.train().freeze(names)
    loss, count = model(make_batch(pages[:8]))["text"]
    (loss / count).backward()
    for part, parameters in model.parts().items():
        for name, p in parameters:
            if part in frozen:
                assert p.grad is None, name
            else:
                assert p.grad.abs().sum() > 0, name


# -----------------------------------------------------------------------------
# Another second stage


@dataclass
class QueriesConfig:
    kind: str = "queries"
    width: int = 32
    n: int = 3


class Queries(nn.Module):
    """A few learned queries that attend to the compressor's tokens: a sequence, not a grid."""
    config_class = QueriesConfig
    layout = "sequence"
    blocks = ()
    recompute = False

    def __init__(self, cfg):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(cfg.n, cfg.width))
        self.out = Linear(cfg.width, cfg.width)

    def init_weights(self):
        nn.init.normal_(self.queries)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)[:, None]  # (B, 1, hw, C)
        q = self.queries.to(x.dtype).expand(len(x), 1, -1, -1)
        return self.out(attention(q, x, x)[:, 0])  # (B, n, C)

    @staticmethod
    def tokens(cfg, h, w):
        return cfg.n

    @staticmethod
    def flops(cfg, h, w):
        return 4 * cfg.n * h * w * cfg.width + 2 * cfg.n * cfg.width ** 2


@pytest.fixture
def sequence_cfg(monkeypatch):
    monkeypatch.setitem(config.SECOND_STAGES, "queries", Queries)
    cfg = config.tiny()
    cfg.second_stage = QueriesConfig()
    return cfg


def test_a_second_stage_may_give_a_sequence(sequence_cfg):
    cfg = ModelConfig.from_dict(sequence_cfg.to_dict())
    assert cfg.second_stage == QueriesConfig()
    model = DeepseekOCR(cfg).init_weights(0).train()
    taps = {}
    assert model.project(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), taps).shape == (2, 3, 32)
    assert list(taps) == ["sam", "compressor", "queries", "projector"]
    assert list(model.parts())[2] == "queries"
    flops = forward_flops(cfg, {64: 2}, 10)
    assert flops["queries"] == 2 * Queries.flops(cfg.second_stage, 2, 2)
    assert flops["projector"] == 2 * 2 * 3 * 32 * 32

    # 2 x 1 tiles of 32 px and a global view of 64 px, 3 tokens each without newlines, a separator
    tiled = plan(Mode("tiled", 64, tile=32, max_tiles=2), 80, 40, cfg.token_stride)
    views = {32: torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8),
             64: torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)}
    positions = model.arrange(model.encode_views(views), [tiled])
    layout = cfg.layout
    assert len(positions) == layout.positions(1, 2, 1) + layout.positions(1, 1, 2) + 1 == 10
    assert layout.tokens(1, 2, 1) + layout.tokens(1, 1, 2) == 9
    tiles = model.project(views[32])
    torch.testing.assert_close(positions[:6], tiles.flatten(0, 1))
    assert torch.equal(positions[-1], model.view_seperator)

    # A parameter without a gradient would have no state to resume from, and DDP would wait for it.
    positions.sum().backward()
    at_the_pages = [p for part in ("queries", "projector") for _, p in model.parts()[part]]
    assert all(p.grad is not None for p in at_the_pages if p.requires_grad)


@pytest.mark.parametrize("rows, cols, side", [(0, 0, 10), (1, 1, 16), (3, 2, 10)])
def test_a_grid_has_a_newline_for_each_row_of_tokens(rows, cols, side):
    layout = ModelConfig().layout
    assert layout.stride == 64
    assert layout.tokens(rows, cols, side) == rows * side * cols * side
    assert layout.positions(rows, cols, side) == rows * side * (cols * side + 1)


def test_an_unknown_second_stage_is_named(cfg):
    d = cfg.to_dict()
    d["second_stage"]["kind"] = "resnet"
    with pytest.raises(ValueError, match=r"second stage .* 'resnet': must be one of \['clip'\]"):
        ModelConfig.from_dict(d)


# -----------------------------------------------------------------------------
# The kernel of global attention

def test_which_kernel_is_asked_for(cfg, monkeypatch):
    """cuDNN is considered for global attention alone, with q and k as wide as they come to it."""
    encoder = DeepEncoder(cfg)
    encoder.init_weights()
    pixels = torch.zeros(1, 3, 64, 64)
    asked = []

    def refuse(device, dtype, positions, width, value_width):
        asked.append((positions, width, value_width))
        return False

    monkeypatch.setattr("nanochat.deepencoder.cudnn_pays", refuse)
    with torch.no_grad():
        expected = encoder(pixels)
    # 8 x 8 patches: 16 channels of a head, and a bias for each row and column
    assert asked == [(64, 32, 16)]
    monkeypatch.undo()
    with torch.inference_mode():
        assert torch.equal(encoder(pixels), expected)
    assert not any(any(block.attn.cudnn.values()) for block in encoder.sam_model.blocks)  # never on a CPU
