"""
Proves that Muon orthogonalises, one matrix or many at once; that every trainable parameter is in exactly one group; that a
saved state goes on bit for bit; that `adamw` is torch's AdamW; and the values of the schedules.

python -m pytest tests/test_optim.py
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat.optim import Muon, Optimizer, orthogonalize, schedule


def singular_values(x):
    return torch.linalg.svdvals(x.double())


@pytest.mark.parametrize("shape", [(1, 64, 16), (1, 16, 64), (5, 48, 24), (3, 24, 96)])
def test_orthogonalize(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    y = orthogonalize(G, torch.float32)
    assert y.shape == G.shape and 0.6 < singular_values(y).min() and singular_values(y).max() < 1.3
    for scale in (1e-4, 1e4):  # the size of the gradient does not matter
        torch.testing.assert_close(orthogonalize(G * scale, torch.float32), y, atol=1e-2, rtol=0)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    assert ((U.mT @ y @ Vh.mT).diagonal(dim1=1, dim2=2) > 0.6).all()  # the same directions, not just any rotation


def test_orthogonalize_lifts_small_singular_values():
    torch.manual_seed(0)
    (U, _), (V, _) = (torch.linalg.qr(torch.randn(16, 16)) for _ in range(2))
    y = orthogonalize((U @ torch.logspace(-2, 0, 16).diag() @ V)[None], torch.float32)
    assert 0.6 < singular_values(y).min() and singular_values(y).max() < 1.3


def test_batched_equals_one_by_one():
    torch.manual_seed(0)
    G = torch.randn(4, 24, 16) * torch.tensor([1e-3, 1, 10, 1000])[:, None, None]
    one_by_one = torch.cat([orthogonalize(g[None], torch.float32) for g in G])
    torch.testing.assert_close(orthogonalize(G, torch.float32), one_by_one, atol=1e-5, rtol=0)


def muon_steps(params, grads, **kw):
    optimizer = Muon(params, lr=0.1, **kw)
    for step in grads:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()
    return params


def test_a_fused_qkv_is_three_matrices():
    torch.manual_seed(0)
    weight, grads = torch.randn(48, 16), torch.randn(3, 48, 16)
    grads[:, :16] *= 100  # a large query gradient must not drown keys and values
    fused, = muon_steps([weight.clone()], [[g] for g in grads])
    parts = muon_steps(list(weight.clone().chunk(3)), [list(g.chunk(3)) for g in grads])
    torch.testing.assert_close(fused, torch.cat(parts), atol=1e-5, rtol=0)
    assert (singular_values((fused - weight).view(3, 16, 16)).mean(1) > 0.1).all()


def test_one_muon_step_by_hand():
    torch.manual_seed(0)
    weight, (g1, g2) = torch.randn(32, 8), torch.randn(2, 32, 8)
    stepped, = muon_steps([weight.clone()], [[g1], [g2]], momentum=0.9)
    m1 = 0.1 * g1
    m2 = 0.9 * m1 + 0.1 * g2
    for g, m in ((g1, m1), (g2, m2)):
        nesterov = 0.1 * g + 0.9 * m
        weight = weight - 0.1 * (32 / 8) ** 0.5 * orthogonalize(nesterov[None], torch.float32)[0]
    torch.testing.assert_close(stepped, weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_trainable_parameter_is_in_one_group(model, kind, frozen):
    if frozen:
        model.encoder.freeze_sam()
    optimizer = Optimizer(model, kind, lr=1e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for group in part.param_groups for p in group["params"]] for part in optimizer.parts]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(sum(groups, [])) == sorted(trained) and len(groups) == (2 if kind == "muon" else 1)
    if kind == "muon":
        shapes = {name: p.shape for name, p in model.named_parameters()}
        in_blocks = {name for name in trained if name.startswith(("encoder.sam_model.blocks", "gpt.transformer.h",
                                                                  "encoder.vision_model.transformer.layers"))}
        assert set(groups[1]) >= {name for name in in_blocks if len(shapes[name]) == 2 and "rel_pos" not in name}
        assert not any("rel_pos" in name or "embed" in name or "wte" in name or "lm_head" in name or len(shapes[name]) != 2
                       for name in groups[1])


def test_unknown_optimizer(model):
    with pytest.raises(ValueError, match="'sgd': must be muon or adamw"):
        Optimizer(model, "sgd", lr=1e-3)


def train(model, optimizer, batch, steps):
    for step in range(steps):
        (model(batch)["text"][0] / batch.supervised()).backward()
        optimizer.clip_grad_norm(1.0)
        optimizer.step(1 - 0.1 * step)
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_saved_state_goes_on_bit_for_bit(make_model, make_batch, pages, tmp_path, kind):
    batch, a, b = make_batch(pages), make_model(0).train(), make_model(1).train()
    first = Optimizer(a, kind, lr=3e-3)
    train(a, first, batch, 3)
    save_file(first.state_tensors(), tmp_path / "state")
    b.load_state_dict(a.state_dict())
    second = Optimizer(b, kind, lr=3e-3)
    second.load_state_tensors(load_file(tmp_path / "state"))
    before = {name: p.clone() for name, p in a.named_parameters()}
    train(a, first, batch, 2)
    train(b, second, batch, 2)
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert torch.equal(p, q) and not torch.equal(p, before[name]), name


def test_a_foreign_state_is_refused(make_model, make_batch, pages):
    model, batch = make_model().train(), make_batch(pages)
    muon = Optimizer(model, "muon", lr=1e-3)
    train(model, muon, batch, 1)
    state = muon.state_tensors()
    with pytest.raises(ValueError, match=r"lacks .*\.(step|exp_avg)"):
        Optimizer(model, "adamw", lr=1e-3).load_state_tensors(state)
    with pytest.raises(ValueError, match="unknown tensors.*other"):
        Optimizer(model, "muon", lr=1e-3).load_state_tensors({**state, "other.step": torch.zeros(())})


def test_adamw_is_torchs(make_model, make_batch, pages):
    batch, ours, theirs = make_batch(pages), make_model().train(), make_model().train()
    mine = Optimizer(ours, "adamw", lr=1e-3, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1, foreach=False)
    for scale in (0.5, 1.0, 0.25):
        for model, step in ((ours, lambda: mine.step(scale)), (theirs, reference.step)):
            model.zero_grad()
            (model(batch)["text"][0] / batch.supervised()).backward()
            reference.param_groups[0]["lr"] = 1e-3 * scale
            step()
    # eps is so small that a gradient near 0 takes a whole step in a direction settled by rounding: compare the mean
    gap = sum((p - q).abs().sum() for p, q in zip(ours.parameters(), theirs.parameters())) / ours.num_params()
    assert gap < 1e-6


def test_clip_grad_norm(model, make_batch, pages):
    optimizer = Optimizer(model, "muon", lr=1e-3)
    def norm():
        return torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    model(make_batch(pages))["text"][0].backward()
    before = norm()
    torch.testing.assert_close(optimizer.clip_grad_norm(-1), before)  # off: measured, not changed
    torch.testing.assert_close(norm(), before)
    torch.testing.assert_close(optimizer.clip_grad_norm(0.5), before)
    torch.testing.assert_close(norm(), torch.tensor(0.5))


@pytest.mark.parametrize("kind", ["trapezoid", "cosine", "step"])
def test_warmup(kind):
    assert [schedule(kind, step, 1000, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule(kind, 0, 1000, 0) == 1.0


def test_schedules():
    def at(kind, *steps, **kw):
        return pytest.approx([schedule(kind, step, 100, 0, **kw) for step in steps])
    assert at("cosine", 0, 50, 100) == [1, 0.5, 0]
    assert at("cosine", 50, 100, final=0.1) == [0.55, 0.1]
    assert at("step", 0, 79, 80, 89, 90, 99) == [1, 1, 0.316, 0.316, 0.1, 0.1]
    assert at("trapezoid", 0, 49, 50, 75, 100) == [1, 1, 1, 0.5, 0]
    assert at("trapezoid", 75, 100, final=0.2) == [0.6, 0.2]
    with pytest.raises(ValueError, match="'linear': must be"):
        schedule("linear", 50, 100, 0)
