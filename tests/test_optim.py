"""
Proves that Muon orthogonalizes, one matrix or many at once; that every trainable parameter is in
exactly one group, at the rate of its part; that a saved state goes on bit for bit; that `adamw` is
torch's AdamW; and the values of the schedules.

python -m pytest tests/test_optim.py
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat.optim import Muon, Optimizer, orthogonalize, schedule

# -----------------------------------------------------------------------------
# Muon


def singular_values(x):
    return torch.linalg.svdvals(x.double())


@pytest.mark.parametrize("shape", [(1, 64, 16), (1, 16, 64), (5, 48, 24), (3, 24, 96)])
def test_orthogonalize(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    y = orthogonalize(G, torch.float32)
    assert y.shape == G.shape
    assert 0.6 < singular_values(y).min() and singular_values(y).max() < 1.3
    for scale in (1e-4, 1e4):  # the size of the gradient does not matter
        scaled = orthogonalize(G * scale, torch.float32)
        torch.testing.assert_close(scaled, y, atol=1e-2, rtol=0)
    # The same directions, and not just any rotation
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    in_directions_of_G = U.mT @ y @ Vh.mT
    assert (in_directions_of_G.diagonal(dim1=1, dim2=2) > 0.6).all()


def test_orthogonalize_lifts_small_singular_values():
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(16, 16))
    V, _ = torch.linalg.qr(torch.randn(16, 16))
    G = U @ torch.logspace(-2, 0, 16).diag() @ V
    y = orthogonalize(G[None], torch.float32)
    assert 0.6 < singular_values(y).min() and singular_values(y).max() < 1.3


def test_batched_equals_one_by_one():
    torch.manual_seed(0)
    sizes = torch.tensor([1e-3, 1, 10, 1000])
    G = torch.randn(4, 24, 16) * sizes[:, None, None]
    one_by_one = torch.cat([orthogonalize(g[None], torch.float32) for g in G])
    torch.testing.assert_close(orthogonalize(G, torch.float32), one_by_one, atol=1e-5, rtol=0)


def muon_steps(params, grads, **kw):
    """The parameters after one step for each list of gradients."""
    optimizer = Muon(params, lr=0.1, **kw)
    for step in grads:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()
    return params


def test_a_fused_qkv_is_three_matrices():
    torch.manual_seed(0)
    weight = torch.randn(48, 16)
    grads = torch.randn(3, 48, 16)
    grads[:, :16] *= 100  # a large query gradient must not drown keys and values
    fused, = muon_steps([weight.clone()], [[g] for g in grads])
    parts = muon_steps(list(weight.clone().chunk(3)), [list(g.chunk(3)) for g in grads])
    torch.testing.assert_close(fused, torch.cat(parts), atol=1e-5, rtol=0)
    moved = (fused - weight).view(3, 16, 16)
    assert (singular_values(moved).mean(1) > 0.1).all()


def test_one_muon_step_by_hand():
    torch.manual_seed(0)
    weight = torch.randn(32, 8)
    g1, g2 = torch.randn(2, 32, 8)
    stepped, = muon_steps([weight.clone()], [[g1], [g2]], momentum=0.9)
    m1 = 0.1 * g1
    m2 = 0.9 * m1 + 0.1 * g2
    for g, m in ((g1, m1), (g2, m2)):
        nesterov = 0.1 * g + 0.9 * m
        direction = orthogonalize(nesterov[None], torch.float32)[0]
        weight = weight - 0.1 * (32 / 8) ** 0.5 * direction
    torch.testing.assert_close(stepped, weight, atol=1e-5, rtol=0)


# -----------------------------------------------------------------------------
# Groups


def names_and_rates(model, optimizer):
    """{name of a parameter: (class of its optimizer, its rate)}; fails if one is in two groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for inner in optimizer.optimizers:
        for group in inner.param_groups:
            for p in group["params"]:
                name = names[id(p)]
                assert name not in found, f"{name} is in two groups"
                found[name] = (type(inner).__name__, group["lr"])
    return found


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_trainable_parameter_is_in_one_group(model, kind, frozen):
    if frozen:
        model.encoder.freeze_sam()
    optimizer = Optimizer(model, kind, lr=1e-3)
    found = names_and_rates(model, optimizer)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == set(trained)
    assert len(optimizer.groups()) == (2 if kind == "muon" else 1)  # one rate, one group

    muons = {name for name, (optimizer_class, _) in found.items() if optimizer_class == "Muon"}
    blocks = ("encoder.sam_model.blocks", "gpt.transformer.h",
              "encoder.vision_model.transformer.layers")
    for name, p in trained.items():
        is_matrix = p.ndim == 2 and "rel_pos" not in name
        is_kernel = p.ndim == 4 and "pos_embed" not in name
        if kind == "muon" and (is_kernel or is_matrix and name.startswith(blocks)):
            assert name in muons, name
        if not (is_matrix or is_kernel) or "wte" in name or "lm_head" in name:
            assert name not in muons, name


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_part_learns_at_its_own_rate(model, kind):
    part_lrs = {"compressor": 8e-3, "sam": 5e-4, "gpt": 1e-3}
    optimizer = Optimizer(model, kind, lr=1e-3, matrix_lr=0.02, part_lrs=part_lrs)
    optimizer.step(0.5)  # no gradients, so it only sets the rates
    found = names_and_rates(model, optimizer)
    muons = set()
    for part, parameters in model.parts().items():
        rate = part_lrs.get(part, 1e-3)
        for name, _ in parameters:
            optimizer_class, found_rate = found.pop(name)
            if optimizer_class == "Muon":
                muons.add(part)
                assert found_rate == pytest.approx(0.5 * 0.02 * rate / 1e-3), name
            else:
                assert found_rate == pytest.approx(0.5 * rate), name
    assert not found
    with_matrices = {"sam", "compressor", "clip", "projector", "gpt"}
    assert muons == (with_matrices if kind == "muon" else set())


def test_a_kernel_is_orthogonalized_as_one_matrix():
    """Whatever the memory format of its gradient: (out, in * h * w), and written in place."""
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.zeros(8, 3, 4, 4))
    kernel.grad = torch.randn(8, 3, 4, 4).to(memory_format=torch.channels_last)
    Muon([kernel], lr=1.0).step()
    singular_values = torch.linalg.svdvals(kernel.detach().flatten(1))
    assert singular_values.min() > 0.6 and singular_values.max() < 1.3


def test_a_rate_of_its_own_moves_that_part_alone(make_model, make_batch, pages):
    """With a tenfold rate AdamW's first step is ten times as long in that part, and only there."""
    batch = make_batch(pages)
    before = dict(make_model().named_parameters())
    after = []
    for part_lrs in ({}, {"compressor": 1e-3}):
        model = make_model().train()
        train(model, Optimizer(model, "adamw", lr=1e-4, part_lrs=part_lrs), batch, 1)
        after.append(dict(model.named_parameters()))
    for name in before:
        plain = (after[0][name] - before[name]).norm().item()
        changed = (after[1][name] - before[name]).norm().item()
        expected = 10 if "net_" in name else 1
        assert changed == pytest.approx(expected * plain, rel=1e-2), name


@pytest.mark.parametrize("settings, message", [
    (dict(kind="sgd"), "'sgd': must be muon or adamw"),
    (dict(part_lrs={"encoder": 1e-3}), "the part 'encoder': must be one of sam, compressor, clip"),
    (dict(lr=0.0, part_lrs={"sam": 1e-3}), "learning rate 0.0 with rates for sam: must be above 0"),
])
def test_settings_that_cannot_be(model, settings, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(model, **{"kind": "muon", "lr": 1e-3, **settings})


def test_nothing_to_train(model):
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="every part of the model is frozen"):
        Optimizer(model, "muon", lr=1e-3)


# -----------------------------------------------------------------------------
# State, and AdamW


def train(model, optimizer, batch, steps):
    for step in range(steps):
        loss, count = model(batch)["text"]
        (loss / count).backward()
        optimizer.clip_grad_norm(1.0)
        optimizer.step(1 - 0.1 * step)
        optimizer.zero_grad()


@pytest.mark.parametrize("part_lrs", [{}, {"sam": 1e-3}], ids=["one rate", "two rates"])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_saved_state_goes_on_bit_for_bit(
        make_model, make_batch, pages, tmp_path, kind, part_lrs):
    batch = make_batch(pages)
    a = make_model(0).train()
    first = Optimizer(a, kind, lr=3e-3, part_lrs=part_lrs)
    train(a, first, batch, 3)
    save_file(first.state_tensors(), tmp_path / "state")

    b = make_model(1).train()
    b.load_state_dict(a.state_dict())
    second = Optimizer(b, kind, lr=3e-3, part_lrs=part_lrs)
    second.load_state_tensors(load_file(tmp_path / "state"))
    before = {name: p.clone() for name, p in a.named_parameters()}
    train(a, first, batch, 2)
    train(b, second, batch, 2)
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert torch.equal(p, q) and not torch.equal(p, before[name]), name


def test_a_foreign_state_is_refused(make_model, make_batch, pages):
    model = make_model().train()
    muon = Optimizer(model, "muon", lr=1e-3)
    train(model, muon, make_batch(pages), 1)
    state = muon.state_tensors()
    with pytest.raises(ValueError, match=r"lacks .*\.(step|exp_avg)"):
        Optimizer(model, "adamw", lr=1e-3).load_state_tensors(state)
    with pytest.raises(ValueError, match="unknown tensors.*other"):
        state["other.step"] = torch.zeros(())
        Optimizer(model, "muon", lr=1e-3).load_state_tensors(state)


def test_adamw_is_torchs(make_model, make_batch, pages):
    batch = make_batch(pages)
    ours = make_model().train()
    theirs = make_model().train()
    mine = Optimizer(ours, "adamw", lr=1e-3, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-10,
                                  weight_decay=0.1, foreach=False)
    for scale in (0.5, 1.0, 0.25):
        for model in (ours, theirs):
            model.zero_grad()
            loss, count = model(batch)["text"]
            (loss / count).backward()
        mine.step(scale)
        reference.param_groups[0]["lr"] = 1e-3 * scale
        reference.step()
    # eps is so small that a gradient near 0 takes a whole step in a direction settled by rounding:
    # compare the mean.
    pairs = zip(ours.parameters(), theirs.parameters())
    gap = sum((p - q).abs().sum() for p, q in pairs) / ours.num_params()
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


# -----------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize("kind", ["trapezoid", "cosine", "step"])
def test_a_run_begins_at_the_full_rate(kind):
    assert schedule(kind, 0.0) == 1.0


@pytest.mark.parametrize("kind, steps, expected", [
    ("cosine", [0, 50, 100], [1, 0.5, 0]),
    ("step", [0, 79, 80, 89, 90, 99], [1, 1, 0.316, 0.316, 0.1, 0.1]),
    ("trapezoid", [0, 49, 50, 75, 100], [1, 1, 1, 0.5, 0]),
])
def test_schedules(kind, steps, expected):
    assert [schedule(kind, step / 100) for step in steps] == pytest.approx(expected)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="'linear': must be"):
        schedule("linear", 0.5)
