"""
Proves that the encoder is the published one: attention with its folded bias equals the plain formula, sizes and names
are those of the published weights, CLIP's features come before SAM's; and that standardisation does what it says.
Where transformers is installed, the whole encoder also equals its port of DeepSeek-OCR's.

python -m pytest tests/test_deepencoder.py
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nanochat.config import CLIPConfig, ModelConfig, SAMConfig
from nanochat.clip import CLIP, CLIPEmbeddings
from nanochat.deepencoder import SAM, DeepEncoder, SAMAttention, SAMBlock, Standardize
from nanochat.model import DeepseekOCR
from scripts.parity import transformers_encoder

# -----------------------------------------------------------------------------
# SAM's attention


def randomised(module, seed=0):
    torch.manual_seed(seed)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module.double()


def resampled(table, length):
    """Linear interpolation with half-pixel centres, edges repeated."""
    at = ((torch.arange(length).double() + 0.5) * len(table) / length - 0.5).clamp(0, len(table) - 1)
    low = at.long()
    high, share = (low + 1).clamp(max=len(table) - 1), (at - low)[:, None]
    return table[low] * (1 - share) + table[high] * share


def naive_attention(attn, x):
    """softmax(q.k / sqrt(d) + q.Rh[dy] + q.Rw[dx]) v, one pair of positions after the other. x: (H, W, C)."""
    H, W, C = x.shape
    d = C // attn.n_head
    q, k, v = F.linear(x.reshape(H * W, C), attn.qkv.weight, attn.qkv.bias).view(H * W, 3, attn.n_head, d).unbind(1)
    table_h, table_w = resampled(attn.rel_pos_h, 2 * H - 1), resampled(attn.rel_pos_w, 2 * W - 1)
    heads = []
    for n in range(attn.n_head):
        logits = q[:, n] @ k[:, n].T / d ** 0.5
        for i in range(H * W):
            for j in range(H * W):
                dy, dx = i // W - j // W, i % W - j % W
                logits[i, j] += q[i, n] @ (table_h[dy + H - 1] + table_w[dx + W - 1])
        heads.append(logits.softmax(-1) @ v[:, n])
    return F.linear(torch.cat(heads, -1), attn.proj.weight, attn.proj.bias).view(H, W, C)


@pytest.mark.parametrize("grid, H, W", [(4, 4, 4), (8, 6, 6), (3, 5, 4)])  # the table's grid, a smaller one, a larger one
@torch.no_grad()
def test_attention_equals_the_plain_formula(grid, H, W):
    attn = randomised(SAMAttention(16, 2, grid))
    x = torch.randn(2, H, W, 16).double()
    expected = torch.stack([naive_attention(attn, image) for image in x])
    assert (attn(x) - expected).abs().max() < 1e-5  # worst seen: 1.8e-6, from interpolating in fp32
    torch.nn.init.zeros_(attn.rel_pos_h)
    assert (attn(x) - expected).abs().max() > 1e-2  # the bias does matter here


def normed(layer, x, eps):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt() * layer.weight + layer.bias


def gelu(x):
    return x * (1 + torch.erf(x / 2 ** 0.5)) / 2


def naive_block(block, x):
    """A SAM block on one image (H, W, C); windows are padded after the norm, and the padding is attended to."""
    H, W, _ = x.shape
    w = block.window
    y = normed(block.norm1, x, 1e-6)
    if w:
        y = F.pad(y, (0, 0, 0, -W % w, 0, -H % w))
        rows = [torch.cat([naive_attention(block.attn, y[top:top + w, left:left + w]) for left in range(0, W, w)], 1)
                for top in range(0, H, w)]
        x = x + torch.cat(rows)[:H, :W]
    else:
        x = x + naive_attention(block.attn, y)
    lin1, lin2 = block.mlp.lin1, block.mlp.lin2
    return x + F.linear(gelu(F.linear(normed(block.norm2, x, 1e-6), lin1.weight, lin1.bias)), lin2.weight, lin2.bias)


@pytest.mark.parametrize("window, H, W", [(5, 8, 8), (5, 10, 7), (0, 8, 8)])
@torch.no_grad()
def test_block(window, H, W):
    block = randomised(SAMBlock(16, 2, window, grid=8))
    x = torch.randn(2, H, W, 16).double() * 1e-3  # so small that the norm's eps counts
    assert (block(x) - torch.stack([naive_block(block, image) for image in x])).abs().max() < 1e-5


# -----------------------------------------------------------------------------
# CLIP, and the position tables of both


@torch.no_grad()
def test_clip_equals_the_plain_formula():
    cfg = CLIPConfig(grid=2, width=16, depth=2, n_head=2, ffn=24, patch_size=0)
    clip = randomised(CLIP(cfg))
    x = torch.randn(3, 16, 2, 2).double() * 1e-2
    expected = []
    for image in x:
        e = clip.embeddings
        y = torch.cat([e.class_embedding[None], image.reshape(16, 4).T]) + e.position_embedding.weight
        y = normed(clip.pre_layrnorm, y, 1e-5)
        for layer in clip.transformer.layers:
            a, m = layer.self_attn, layer.mlp
            q, k, v = F.linear(normed(layer.layer_norm1, y, 1e-5), a.qkv_proj.weight, a.qkv_proj.bias).chunk(3, -1)
            heads = [(q[:, h] @ k[:, h].T / 8 ** 0.5).softmax(-1) @ v[:, h] for h in (slice(0, 8), slice(8, 16))]
            y = y + F.linear(torch.cat(heads, -1), a.out_proj.weight, a.out_proj.bias)
            z = F.linear(normed(layer.layer_norm2, y, 1e-5), m.fc1.weight, m.fc1.bias)
            y = y + F.linear(z / (1 + torch.exp(-1.702 * z)), m.fc2.weight, m.fc2.bias)
        expected.append(y[1:])  # the class token was only company
    assert (clip(x) - torch.stack(expected)).abs().max() < 1e-9


def resized_by_pil(table, side):
    """Bicubic with antialiasing, (h, w, C) -> (side, side, C), by another library."""
    channels = [np.asarray(Image.fromarray(c.numpy()).resize((side, side), Image.Resampling.BICUBIC)) for c in table.permute(2, 0, 1)]
    return torch.from_numpy(np.stack(channels, -1))


@pytest.mark.parametrize("side", [5, 8, 11])
@torch.no_grad()
def test_position_tables_for_another_grid(side):
    torch.manual_seed(0)
    sam = SAM(SAMConfig(image_size=64, patch_size=8, width=4, depth=0, n_head=1, neck=4, net_2=4, net_3=4))
    sam.pos_embed.normal_()
    torch.testing.assert_close(sam.positions(side)[0], resized_by_pil(sam.pos_embed[0], side), atol=1e-5, rtol=0)
    embeddings = CLIPEmbeddings(CLIPConfig(grid=8, width=4, depth=0, n_head=1, patch_size=0))
    table = embeddings.position_embedding.weight
    y = embeddings(torch.zeros(1, 4, side, side))[0]
    torch.testing.assert_close(y[1:].view(side, side, 4), resized_by_pil(table[1:].view(8, 8, 4), side), atol=1e-5, rtol=0)
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
    def both(prefix, names):
        return {f"{prefix}.{name}.{kind}" for name in names for kind in ("weight", "bias")}
    names = {"sam_model.pos_embed", "sam_model.net_2.weight", "sam_model.net_3.weight", "sam_model.neck.0.weight",
             "sam_model.neck.2.weight", "vision_model.embeddings.class_embedding",
             "vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.position_embedding.weight"}
    names |= both("sam_model", ["patch_embed.proj", "neck.1", "neck.3"]) | both("vision_model", ["pre_layrnorm"])
    for i in range(12):
        names |= both(f"sam_model.blocks.{i}", ["norm1", "norm2", "attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"])
        names |= {f"sam_model.blocks.{i}.attn.rel_pos_{axis}" for axis in "hw"}
    for i in range(24):
        names |= both(f"vision_model.transformer.layers.{i}", [
            "layer_norm1", "layer_norm2", "self_attn.qkv_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"])
    shapes = {name: tuple(t.shape) for name, t in published.encoder.state_dict().items()}
    assert set(shapes) == names  # so "none" holds no state either
    assert {shapes[f"sam_model.blocks.{i}.attn.rel_pos_{axis}"] for i in (2, 5, 8, 11) for axis in "hw"} == {(127, 64)}
    assert {shapes[f"sam_model.blocks.{i}.attn.rel_pos_{axis}"] for i in (0, 1, 3, 10) for axis in "hw"} == {(27, 64)}
    assert shapes["sam_model.pos_embed"] == (1, 64, 64, 768)
    assert shapes["sam_model.net_2.weight"] == (512, 256, 3, 3) and shapes["sam_model.net_3.weight"] == (1024, 512, 3, 3)
    assert shapes["vision_model.embeddings.position_embedding.weight"] == (257, 1024)
    other = {name for name in published.state_dict() if not name.startswith(("encoder.", "gpt."))}
    assert other == {"projector.layers.weight", "projector.layers.bias", "image_newline", "view_seperator"}


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
    sam = encoder.standardize(encoder.sam_model(x))
    assert torch.equal(y[..., 32:], sam.flatten(2).transpose(1, 2)) and torch.equal(y[..., :32], encoder.vision_model(sam))
    assert torch.equal(taps["compressor"], encoder.sam_model(x)) and torch.equal(taps["clip"], y[..., :32])


@pytest.mark.parametrize("shape", [(1, 3, 64, 32), (1, 3, 48, 48), (3, 64, 64)])
def test_pixels_of_a_wrong_shape(encoder, shape):
    with pytest.raises(ValueError, match="need .* multiple of 32"):
        encoder(torch.zeros(shape))


def test_freeze_sam(encoder):
    encoder.train()
    encoder.freeze_sam()
    table = encoder.standardize.mean.clone()
    encoder(torch.rand(8, 3, 64, 64)).square().sum().backward()
    assert torch.equal(encoder.standardize.mean, table)
    for name, p in encoder.named_parameters():
        if name.startswith("sam_model."):
            assert p.grad is None and not p.requires_grad, name
        else:
            assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("side", [64, 96])  # the tables' size, and one for which they are interpolated
@torch.no_grad()
def test_equals_the_port_in_transformers(cfg, side):
    pytest.importorskip("transformers.models.unlimited_ocr", exc_type=ImportError, reason="transformers with unlimited_ocr is not installed")
    cfg.standardize = "none"
    ours = DeepEncoder(cfg)
    randomised(ours).float()
    theirs = transformers_encoder(ours, cfg)
    x = torch.rand(2, 3, side, side) * 2 - 1
    expected = theirs(x).last_hidden_state
    assert (ours(x) - expected).abs().max() < 1e-5 * expected.abs().max()


# -----------------------------------------------------------------------------
# Standardisation. Shapes (images, channels, h, w).

KINDS = pytest.mark.parametrize("kind, dims", [("channel", (0, 2, 3)), ("position", (0,))])


def features(images=16, side=4, seed=0):
    torch.manual_seed(seed)
    return 3 * torch.randn(images, 6, side, side) + 5 * torch.randn(6, 1, 1) + torch.randn(6, side, side)


@KINDS
def test_batch_statistics_in_training(kind, dims):
    standardize, x = Standardize(kind, 6, 4), features(8)
    y = standardize(x)
    assert y.mean(dims).abs().max() < 1e-5 and (y.var(dims, correction=0) - 1).abs().max() < 1e-4
    torch.testing.assert_close(standardize.mean.squeeze(), 0.1 * x.mean(dims))
    torch.testing.assert_close(standardize.var.squeeze(), 0.9 + 0.1 * x.var(dims, correction=0))


@KINDS
@pytest.mark.parametrize("case", ["few images", "eval", "frozen"])
def test_running_statistics_otherwise_and_they_stay(kind, dims, case):
    standardize, x = Standardize(kind, 6, 4), features(7 if case == "few images" else 16)
    standardize.mean.normal_()
    standardize.var.uniform_(1, 2)
    mean, var = standardize.mean.clone(), standardize.var.clone()
    standardize.train(case != "eval").frozen = case == "frozen"
    torch.testing.assert_close(standardize(x), (x - mean) / (var + 1e-5).sqrt())
    assert torch.equal(standardize.mean, mean) and torch.equal(standardize.var, var)


@KINDS
def test_reestimate_is_the_statistics_of_all_batches(kind, dims):
    standardize, x = Standardize(kind, 6, 4), features(20)
    standardize.mean.fill_(100)  # what was there does not matter
    standardize.reestimate([x[:3], x[3:16], x[16:]])
    torch.testing.assert_close(standardize.mean.squeeze(), x.mean(dims))
    torch.testing.assert_close(standardize.var.squeeze(), x.var(dims, correction=0))


def test_reestimate_needs_images():
    with pytest.raises(ValueError, match="at least 8 images, got 7"):
        Standardize("position", 6, 4).reestimate([features(3), features(4)])


def test_another_grid_interpolates_and_does_not_move_the_tables():
    standardize, x = Standardize("position", 6, 4), features(16, side=8)
    standardize.mean.copy_(torch.arange(4.0)[:, None].expand(6, 4, 4))  # rises down the page
    mean, var = standardize.mean.clone(), standardize.var.clone()
    standardize(x)
    assert torch.equal(standardize.mean, mean) and torch.equal(standardize.var, var)
    removed = x - standardize.eval()(x) * (1 + 1e-5) ** 0.5
    rows = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    torch.testing.assert_close(removed, rows[:, None].expand_as(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["channel", "position"])
def test_every_grid_has_its_own_statistics(kind):
    standardize, small, large = Standardize(kind, 6, 4, others=(4, 8)), features(16), 3 * features(16, side=8) + 5
    standardize.reestimate([small])
    standardize.eval()
    fallback = standardize(large)  # not yet trained on: the first grid's
    assert fallback.mean() > 1
    standardize.train()(large)
    assert torch.equal(standardize.mean, standardize.tables(4)[0])
    standardize.reestimate([large], 8)
    assert standardize.eval()(large).mean().abs() < 1e-3 and standardize(small).mean().abs() < 1e-3
    assert sorted(standardize.state_dict()) == ["mean", "mean_8", "var", "var_8"]
    with pytest.raises(ValueError, match="re-estimating the statistics of 4x4 outputs on some of"):
        standardize.reestimate([large])



def test_none_is_the_identity():
    standardize, x = Standardize("none", 6, 4), features()
    assert standardize(x) is x and standardize.eval()(x) is x and not standardize.state_dict()
    standardize.reestimate([x])


@KINDS
def test_gradient_flows_through_batch_statistics(kind, dims):
    """What is standardised cannot be shifted or stretched: the gradient is orthogonal to a constant and to the output."""
    standardize, x = Standardize(kind, 6, 4), features().requires_grad_()
    y = standardize(x)
    weights = torch.randn_like(y)
    g, = torch.autograd.grad((weights * y).sum(), x)
    size = g.abs().mean()
    assert g.mean(dims).abs().max() < 1e-4 * size and (g * y).mean(dims).abs().max() < 1e-4 * size
    g, = torch.autograd.grad((weights * standardize.eval()(x)).sum(), x)
    assert g.mean(dims).abs().max() > 1e-2 * g.abs().mean()
