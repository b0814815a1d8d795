"""
Proves that image features land exactly on their placeholders and matter; that counts are compared
row by row; that rows without images and longer padding do no harm; that everything that should
learn has a gradient, and nothing else; and that compiled blocks compute the same.

python -m pytest tests/test_fusion.py
"""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nanochat.batch import collate
from nanochat.dataloader import Sampler
from nanochat.heads import LABELS, loss_weights, make_heads
from nanochat.image_modes import MODES
from nanochat.loop import accumulate_gradients, compiled_graphs, wrap_model
from nanochat.model import fuse

# -----------------------------------------------------------------------------
# fuse


def test_features_take_the_placeholders_in_order():
    embeddings = torch.arange(24.0).view(2, 6, 2)
    is_image = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0]]).bool()
    features = -torch.arange(1.0, 11).view(5, 2)
    y = fuse(embeddings, is_image, features, [3, 2])
    assert torch.equal(y[is_image], features)
    assert torch.equal(y[~is_image], embeddings[~is_image])
    assert torch.equal(y[0, 5], features[2]) and torch.equal(y[1, 0], features[3])


def test_fuse_equals_masked_scatter_bit_for_bit():
    is_image = torch.rand(4, 50) < 0.4
    per_row = is_image.sum(1).tolist()
    results = []
    for method in ("fuse", "masked_scatter"):
        torch.manual_seed(0)
        embeddings = torch.randn(4, 50, 8, requires_grad=True)
        features = torch.randn(sum(per_row), 8, requires_grad=True)
        if method == "fuse":
            y = fuse(embeddings, is_image, features, per_row)
        else:
            y = embeddings.masked_scatter(is_image[..., None], features)
        y.sin().sum().backward()
        results.append((y, embeddings.grad, features.grad))
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("given, row, slots, features", [
    ([4, 1], 0, 3, 4), ([3, 1], 1, 2, 1), ([3, 3], 1, 2, 3), ([0, 5], 0, 3, 0)])
def test_a_surplus_is_not_lent_to_the_next_row(given, row, slots, features):
    is_image = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1]]).bool()
    message = rf"row {row} has {slots} <\|image\|> placeholders but {features} image features"
    with pytest.raises(ValueError, match=message):
        fuse(torch.zeros(2, 4, 2), is_image, torch.zeros(sum(given), 2), given)


def test_counts_and_tensor_must_agree():
    is_image = torch.tensor([[0, 1, 1, 1]]).bool()
    with pytest.raises(ValueError, match="4 image features for 3 placeholders"):
        fuse(torch.zeros(1, 4, 2), is_image, torch.zeros(4, 2), [3])


# -----------------------------------------------------------------------------
# Through the model


@torch.no_grad()
def test_embed(model, make_batch, pages, chats):
    """With a text-only row between two pages."""
    model.eval()
    batch = make_batch([pages[0], chats[0], pages[1]])
    is_image = batch.ids == model.cfg.image_token_id
    # 2 rows of 2 tokens and a newline, and the separator
    assert is_image.sum(1).tolist() == batch.features_per_row == [7, 0, 7]

    x = model.embed(batch)
    first_page = x[is_image][:7]
    assert torch.equal(x[is_image], model.arrange(model.encode_views(batch.views), batch.plans))
    assert torch.equal(x[~is_image], model.gpt.transformer.wte(batch.ids)[~is_image])
    assert torch.equal(first_page[[2, 5]], model.image_newline.expand(2, -1))
    assert torch.equal(first_page[6], model.view_seperator)
    # The second page is in the third row, and not in the first.
    alone = model.embed(make_batch([pages[1]]))
    torch.testing.assert_close(x[2, :alone.size(1)], alone[0])


def test_a_row_cut_inside_its_image_is_named(model, make_batch, pages):
    batch = make_batch(pages[:3])
    batch.ids[1, 3] = 65  # a placeholder less
    with pytest.raises(ValueError, match="row 1 has 6 .* but 7"):
        model(batch)


def test_placeholders_without_images_are_named(model, make_batch, pages):
    batch = replace(make_batch(pages[:3]), views={}, plans=[], features_per_row=[])
    with pytest.raises(ValueError, match="row 0 has .* placeholders but the batch has no images"):
        model(batch)


def loss_of(model, batch):
    return model(batch)["text"][0]


@torch.no_grad()
def test_the_image_changes_the_output(model, make_batch, pages):
    model.eval()
    batch = make_batch(pages[:8])
    others = replace(batch, views={64: batch.views[64].flip(0)})
    assert loss_of(model, batch) != loss_of(model, others)
    hidden = model.gpt(model.embed(batch))
    difference = (hidden - model.gpt(model.embed(others))).abs().amax(-1)
    is_answer = batch.targets != -1  # every answer stands after its page
    assert difference[is_answer].min() > 1e-4
    assert difference[:, :2].max() == 0  # <|bos|><|user_start|> stand before it


def loss_per_token(model, batch):
    loss, count = model(batch)["text"]
    assert count == batch.supervised()
    return loss / count


def test_every_trainable_parameter_gets_a_gradient(model, make_batch, pages):
    loss_per_token(model.train(), make_batch(pages[:8])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_frozen_parameters_get_none(model, make_batch, pages):
    model.train().freeze(["sam", "compressor"])
    loss_per_token(model, make_batch(pages[:8])).backward()
    for name, p in model.named_parameters():
        if name.startswith("encoder.sam_model."):
            assert p.grad is None, name
        else:
            assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("frozen", [False, True])
def test_text_alone_touches_no_vision_but_leaves_no_gradient_out(model, make_batch, chats, frozen):
    """Under DDP a parameter without a gradient on one rank would stop all."""
    if frozen:
        model.freeze(["sam", "compressor"])
    loss_per_token(model.train(), make_batch(chats)).backward()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert p.grad is None, name
        elif name.startswith("gpt."):
            assert p.grad.abs().sum() > 0, name
        else:
            assert p.grad.abs().sum() == 0, name  # there, and zero
    with torch.no_grad():
        trained = loss_of(model, make_batch(chats))
        assert torch.equal(trained, loss_of(model.eval(), make_batch(chats)))


@torch.no_grad()
def test_three_images_in_one_conversation(model, make_batch, pages):
    """Each takes its own place: every one of them changes the loss, and so does a swap."""
    model.eval()

    def loss(images):
        user = []
        for _ in images:
            user += [{"type": "image"}, {"type": "text", "text": " and "}]
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": "three"}]
        batch = make_batch([{"messages": messages, "images": images, "id": "x"}])
        return loss_of(model, batch).item()

    a, b, c, other = (page["images"][0] for page in pages[:4])
    plain = loss([a, b, c])
    assert plain == loss([a, b, c])
    for images in ([other, b, c], [a, other, c], [a, b, other], [b, a, c]):
        assert abs(plain - loss(images)) > 1e-6


def test_image_only_batch(model, make_batch, pages):
    """A user who shows a page and says nothing."""
    user = {"role": "user", "content": [{"type": "image"}]}
    silent = {**pages[0], "messages": [user, pages[0]["messages"][1]]}
    assert torch.isfinite(loss_of(model, make_batch([silent, silent])))


def test_a_mixed_batch_is_the_sum_of_its_rows(model, make_batch, pages, chats):
    model.eval()
    rows = [pages[0], chats[0], pages[1], chats[1]]
    alone = sum(loss_of(model, make_batch([row])) for row in rows)
    torch.testing.assert_close(loss_of(model, make_batch(rows)), alone, rtol=1e-5, atol=0)


@torch.no_grad()
def test_padding_is_inert(model, make_batch, pages):
    model.eval()
    batch = make_batch(pages[:8])
    longer = replace(batch, ids=F.pad(batch.ids, (0, 9), value=7),
                     targets=F.pad(batch.targets, (0, 9), value=-1))
    torch.testing.assert_close(loss_of(model, longer), loss_of(model, batch), rtol=1e-6, atol=0)


@torch.no_grad()
def test_the_loss_is_that_of_the_supervised_tokens(model, make_batch, pages):
    batch = make_batch(pages[:2])
    model.eval()
    logp = model.gpt.logits(model.gpt(model.embed(batch))).log_softmax(-1)
    expected = 0.0
    for b, row in enumerate(batch.targets):
        for t, target in enumerate(row):
            if target != -1:
                expected -= logp[b, t, target]
    torch.testing.assert_close(loss_of(model, batch), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_in_chunks_is_the_loss(make_model, make_batch, pages, monkeypatch, dtype):
    """A vocabulary too large for the whole batch: the logits exist a chunk at a time."""
    batch = make_batch(pages[:8])
    whole = make_model().train()
    chunked = make_model().train()
    losses = []
    for model, positions in ((whole, 10 ** 6), (chunked, 20)):
        model.dtype = dtype
        logits = positions * model.cfg.gpt.vocab_size
        monkeypatch.setattr("nanochat.model.LOSS_CHUNK", logits)
        loss = loss_per_token(model, batch)
        loss.backward()
        losses.append(loss.item())
    assert batch.supervised() > 3 * 20
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for (name, p), q in zip(whole.gpt.named_parameters(), chunked.gpt.parameters()):
        assert (p.grad - q.grad).norm() <= tolerance * p.grad.norm(), name


# -----------------------------------------------------------------------------
# Compiled


@pytest.mark.parametrize("pack, recompute", [(0, False), (256, False), (256, True)])
def test_compiled_blocks_learn_the_same(make_model, tokenizer, pages, chats, pack, recompute):
    """
    Traced and differentiated by torch's compiler, without its code generator. Other lengths of
    samples need no graphs of their own, nor does another number of unpacked rows. `full` packs,
    compiles and recomputes all at once.
    """
    mixed = [c for pair in zip(pages, chats) for c in pair]
    sampler = Sampler(mixed, tokenizer, MODES["64px"], 32, max_tokens=128, pack=pack, multiple=64)
    eager = make_model().train()
    compiled = make_model().train()
    torch._dynamo.reset()
    compiled.compile_blocks(backend="aot_eager")
    compiled.recompute(recompute)
    graphs = []
    for samples in (range(8), range(2, 10), range(10)):  # packed, all three take 2 rows
        batch = collate([sampler[i] for i in samples], pack, max_images=5, multiple=128)
        assert len(batch.ids) == (2 if pack else len(samples))
        losses = []
        for model in (eager, compiled):
            loss = loss_per_token(model, batch)
            loss.backward()
            losses.append(loss.item())
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    for p, q in zip(eager.parameters(), compiled.parameters()):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    assert graphs[0] > 0
    assert graphs[1:] == [graphs[0], graphs[0]]
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        torch.testing.assert_close(compiled.eval()(batch), eager.eval()(batch))


def test_packed_batches_share_their_graphs(make_model, tokenizer, chats):
    """
    Forty batches with other numbers of rows, samples and positions each: the decoder may not be
    compiled for every one of them, nor be given up on. Text alone, since packing is the decoder's.
    """
    sampler = Sampler(chats, tokenizer, MODES["64px"], 32, max_tokens=128)
    samples = [sampler[i] for i in range(len(chats))]
    model = make_model().train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_blocks(backend="aot_eager")
    rng = random.Random(0)
    shapes = set()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(40):
            drawn = rng.choices(samples, k=rng.randint(3, 14))
            batch = collate(drawn, pack=128, max_images=5, multiple=8)
            shapes.add((*batch.ids.shape, *sum(batch.lengths, [])))
            loss_per_token(model, batch).backward()
    assert len(shapes) > 35
    of_decoder_and_loss = 4 + 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= of_decoder_and_loss


def gradients_on_a_rank(rank, world, make_model, batches, compiled, folder):
    """Those of one step over all ranks, the second one: the first builds DDP's buckets."""
    torch._dynamo.reset()
    before = compiled_graphs()  # by the process that this one was forked from
    model = make_model().train()
    model.recompute(True)
    model.compile_blocks = partial(model.compile_blocks, backend="aot_eager")
    net = wrap_model(model, compiled, make_heads(model, 1.0, 0.3))
    for _ in range(2):
        net.zero_grad()
        losses, _ = accumulate_gradients(net, batches[rank::world], loss_weights(1.0, 0.3))
    assert len(losses) == 5
    assert (compiled_graphs() > before) == compiled
    gradients = {name.removeprefix("module."): p.grad for name, p in net.named_parameters()}
    torch.save(gradients, folder / f"{world}_{rank}.pt")


def test_two_compiled_ranks_are_one_eager_one(make_model, tokenizer, pages, chats, run_ranks,
                                              tmp_path):
    """As stage 0 of `full` on several GPUs: DDP over compiled, recomputed blocks, rows packed."""
    mixed = [c for pair in zip(pages, chats) for c in pair]
    sampler = Sampler(mixed, tokenizer, MODES["64px"], 32, max_tokens=128, pack=256, multiple=64,
                      labels=LABELS)
    batches = []
    for samples in (range(8), range(8, 12), range(12, 18), range(18, 20)):
        batches.append(collate([sampler[i] for i in samples], 256, max_images=5, multiple=64))
    run_ranks(1, gradients_on_a_rank, make_model, batches, False, tmp_path)
    run_ranks(2, gradients_on_a_rank, make_model, batches, True, tmp_path)
    expected = torch.load(tmp_path / "1_0.pt")
    for rank in range(2):
        for name, gradient in torch.load(tmp_path / f"2_{rank}.pt").items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
