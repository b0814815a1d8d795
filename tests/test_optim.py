"""
Proves that Muon orthogonalizes, one matrix or many at once; that ranks share this work and stay
equal to the last bit; that every trainable parameter is in exactly one group, at the rate of its
part; that a saved state goes on bit for bit; that `adamw` is torch's AdamW; and the values of the
schedules.

python -m pytest tests/test_optim.py
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint as ckpt
from nanochat import optim
from nanochat.batch import collate
from nanochat.dataloader import Sampler
from nanochat.image_modes import MODES
from nanochat.loop import train_step, wrap_model
from nanochat.optim import Muon, Optimizer, orthogonalize, schedule, share_out

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
# Muon's work, shared over ranks


@pytest.mark.parametrize("world", [1, 3, 8, 40])
def test_shares_are_complete_and_about_equal(world):
    sizes = [(64, 64)] * 11 + [(256, 64)] * 5 + [(64, 256)] * 5 + [(8, 27)]
    shapes = [torch.Size(size) for size in sizes]
    shares = share_out(shapes, world)
    assert len(shares) == world
    found = []
    loads = []
    for share in shares:
        load = 0
        for shape, indices in share.items():
            found.extend(indices)
            assert all(shapes[i] == shape for i in indices) and indices == sorted(indices)
            load += len(indices) * (4 * min(shape) * shape.numel() + 2 * min(shape) ** 3)
        loads.append(load)
    assert sorted(found) == list(range(len(shapes)))
    dearest = 4 * 64 * 64 * 256 + 2 * 64 ** 3
    assert max(loads) - min(loads) <= dearest  # one matrix


@pytest.fixture
def orthogonalized(monkeypatch):
    """How many matrices each call of `orthogonalize` had. A fork goes on with a list of its own."""
    sizes = []

    def counting(G, dtype):
        sizes.append(len(G))
        return orthogonalize(G, dtype)
    monkeypatch.setattr(optim, "orthogonalize", counting)
    return sizes


def steps_of_a_rank(rank, world, dtype, sizes, folder):
    """Three steps with gradients that are equal on all ranks."""
    # A fused qkv is three matrices, a kernel one. Most shapes are fewer than the ranks.
    shapes = [(48, 16), (32, 16), (32, 16), (16, 32), (8, 4, 3, 3), (16, 16), (24, 8)]
    torch.manual_seed(0)
    params = [torch.randn(shape) for shape in shapes]
    first = {"params": params[:4]}
    second = {"params": params[4:], "lr": 0.01}  # a part with a rate of its own
    optimizer = Muon([first, second], lr=0.1, dtype=dtype)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape)
        params[1].grad = None
        optimizer.step()
    momenta = [optimizer.state[p]["momentum"] for p in params if p.grad is not None]
    torch.save([params, momenta, sum(sizes)], folder / f"{rank}_of_{world}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_with_equal_gradients(run_ranks, orthogonalized, tmp_path, dtype):
    """Every rank has the parameters of one process, and all of its momenta to the last bit."""
    steps_of_a_rank(0, 1, dtype, orthogonalized, tmp_path)
    orthogonalized.clear()
    run_ranks(3, steps_of_a_rank, dtype, orthogonalized, tmp_path)
    expected, expected_momenta, in_one = torch.load(tmp_path / "0_of_1")
    first, _, _ = torch.load(tmp_path / "0_of_3")
    assert in_one == 3 * (2 * 3 + 4)  # in each of three steps two fused qkv, and four others
    shares = []
    for rank in range(3):
        params, momenta, share = torch.load(tmp_path / f"{rank}_of_3")
        shares.append(share)
        for p, of_rank_0, single in zip(params, first, expected):
            assert torch.equal(p, of_rank_0)
            # Stacks of another size may be rounded otherwise.
            torch.testing.assert_close(p, single, atol=1e-5 if dtype == torch.float32 else 1e-2,
                                       rtol=0)
        for momentum, single in zip(momenta, expected_momenta, strict=True):
            assert torch.equal(momentum, single)
    assert sum(shares) == in_one and max(shares) <= in_one / 2


def two_to_a_step(model, optimizer, batches, rank=0, world=1):
    """Trains a rank on its share of the micro-batches, two to a step over all ranks."""
    net = wrap_model(model, compiled=False)
    own = iter(batches[rank::world])
    for step in range(len(batches) // 2):
        train_step(step, net, optimizer, own, 2 // world, 1.0, 1.0, ["images"])


def train_on_a_rank(rank, world, make_model, batches, tokenizer, sizes, folder):
    """Two steps, a checkpoint, and another step."""
    model = make_model().train()
    optimizer = Optimizer(model, "muon", lr=3e-3, part_lrs={"sam": 1e-3})
    two_to_a_step(model, optimizer, batches[:4], rank, world)
    ckpt.save_checkpoint(folder, 2, model, tokenizer, optimizer, {"world_size": world})
    two_to_a_step(model, optimizer, batches[4:], rank, world)
    weights = dict(model.named_parameters())
    torch.save([weights, optimizer.state_tensors(), sum(sizes)], folder / f"rank_{rank}")


def test_two_ranks_train_as_one(make_model, make_batch, pages, chats, tokenizer, cfg, run_ranks,
                                orthogonalized, tmp_path):
    sampler = Sampler([*pages, *chats], tokenizer, MODES["64px"], cfg.token_stride, max_tokens=256,
                      pack=256)
    packed = collate([sampler[i] for i in (0, 1, 10)], 256, max_images=16)
    batches = [make_batch(pages[:3]), make_batch(pages[3:6]), packed, make_batch(chats[:3]),
               make_batch(pages[6:8]), make_batch(pages[8:])]
    for world in (1, 2):
        folder = tmp_path / f"ranks_{world}"
        folder.mkdir()
        run_ranks(world, train_on_a_rank, make_model, batches, tokenizer, orthogonalized, folder)
    expected, their_state, in_one = torch.load(tmp_path / "ranks_1/rank_0")
    first, first_state, first_share = torch.load(tmp_path / "ranks_2/rank_0")
    second, second_state, second_share = torch.load(tmp_path / "ranks_2/rank_1")

    assert first_share + second_share == in_one
    assert 0.3 * in_one < first_share < 0.7 * in_one
    assert set(first_state) == set(their_state)
    for name in first_state:
        assert torch.equal(first_state[name], second_state[name]), name

    # The checkpoint of two ranks goes on with one.
    resumed = make_model(1).train()
    optimizer = Optimizer(resumed, "muon", lr=3e-3, part_lrs={"sam": 1e-3})
    ckpt.load_training_state(tmp_path / "ranks_2", 2, resumed, optimizer,
                             allow_other_world_size=True)
    assert set(optimizer.state_tensors()) == set(their_state)
    two_to_a_step(resumed, optimizer, batches[4:])
    before = dict(make_model().named_parameters())
    for name, p in resumed.named_parameters():
        assert torch.equal(first[name], second[name]), name
        moved = (expected[name] - before[name]).abs().mean()
        # Where a gradient is near zero, its rounding settles the direction: compare the mean.
        for other in (first[name], p):
            assert (other - expected[name]).abs().mean() < 0.02 * moved, name


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
        model.freeze(["sam", "compressor"])
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
