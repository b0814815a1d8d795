"""
Proves that image features land exactly on their placeholders and matter; that counts are compared row by row; that rows
without images and longer padding do no harm; and that everything that should learn has a gradient, and nothing else.

python -m pytest tests/test_fusion.py
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanochat.dataloader import Sampler
from nanochat.batch import collate
from nanochat.image_modes import MODES
from nanochat.model import fuse


def test_features_take_the_placeholders_in_order():
    embeddings = torch.arange(24.0).view(2, 6, 2)
    is_image = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0]]).bool()
    features = -torch.arange(1.0, 11).view(5, 2)
    y = fuse(embeddings, is_image, features, [3, 2])
    assert torch.equal(y[is_image], features) and torch.equal(y[~is_image], embeddings[~is_image])
    assert torch.equal(y[0, 5], features[2]) and torch.equal(y[1, 0], features[3])


@pytest.mark.parametrize("given, row, slots, features", [([4, 1], 0, 3, 4), ([3, 1], 1, 2, 1), ([3, 3], 1, 2, 3), ([0, 5], 0, 3, 0)])
def test_a_surplus_is_not_lent_to_the_next_row(given, row, slots, features):
    is_image = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1]]).bool()
    with pytest.raises(ValueError, match=rf"row {row} has {slots} <\|image\|> placeholders but {features} image features"):
        fuse(torch.zeros(2, 4, 2), is_image, torch.zeros(sum(given), 2), given)


def test_counts_and_tensor_must_agree():
    with pytest.raises(ValueError, match="4 image features for 3 placeholders"):
        fuse(torch.zeros(1, 4, 2), torch.tensor([[0, 1, 1, 1]]).bool(), torch.zeros(4, 2), [3])


@torch.no_grad()
def test_embed(model, make_batch, pages, chats):
    """Through the model, with a text-only row between two pages."""
    model.eval()
    batch = make_batch([pages[0], chats[0], pages[1]])
    is_image = batch.ids == model.cfg.image_token_id
    x = model.embed(batch)
    assert is_image.sum(1).tolist() == batch.features_per_row == [7, 0, 7]  # 2 rows of 2 tokens and a newline, separator
    assert torch.equal(x[is_image], model.encode_images(batch.views, batch.plans))
    assert torch.equal(x[~is_image], model.gpt.transformer.wte(batch.ids)[~is_image])
    assert torch.equal(x[is_image][[2, 5]], model.image_newline.expand(2, -1)) and torch.equal(x[is_image][6], model.view_seperator)
    alone = model.embed(make_batch([pages[1]]))
    torch.testing.assert_close(x[2, :alone.size(1)], alone[0])  # the second page is in the third row, not the first


def test_a_row_cut_inside_its_image_is_named(model, make_batch, pages):
    batch = make_batch(pages[:3])
    batch.ids[1, 3] = 65  # a placeholder less
    with pytest.raises(ValueError, match="row 1 has 6 .* but 7"):
        model(batch)["text"][0]


@torch.no_grad()
def test_the_image_changes_the_output(model, make_batch, pages):
    model.eval()
    batch = make_batch(pages[:8])
    others = replace(batch, views={64: batch.views[64].flip(0)})
    assert model(batch)["text"][0] != model(others)["text"][0]
    after = batch.targets != -1  # every answer stands after its page
    difference = (model.gpt(model.embed(batch)) - model.gpt(model.embed(others))).abs().amax(-1)
    assert difference[after].min() > 1e-4 and difference[:, :2].max() == 0  # <|bos|><|user_start|> stand before it


def loss_per_token(model, batch):
    return model(batch)["text"][0] / batch.supervised()


def test_every_trainable_parameter_gets_a_gradient(model, make_batch, pages):
    loss_per_token(model.train(), make_batch(pages[:8])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_frozen_parameters_get_none(model, make_batch, pages):
    model.train().encoder.freeze_sam()
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
        model.encoder.freeze_sam()
    before = [t.clone() for t in model.encoder.standardize.buffers()]
    loss_per_token(model.train(), make_batch(chats)).backward()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert p.grad is None, name
        elif name.startswith("gpt."):
            assert p.grad.abs().sum() > 0, name
        else:
            assert p.grad.abs().sum() == 0, name  # there, and zero
    assert all(torch.equal(a, b) for a, b in zip(before, model.encoder.standardize.buffers()))
    with torch.no_grad():
        trained = model(make_batch(chats))["text"][0]
        assert torch.equal(trained, model.eval()(make_batch(chats))["text"][0])


@torch.no_grad()
def test_three_images_in_one_conversation(model, make_batch, pages):
    """Each takes its own place: the conversation changes with every one of them, and not with a swap undone."""
    def loss(images):
        user = [part for _ in images for part in ({"type": "image"}, {"type": "text", "text": " and "})]
        c = {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": "three"}], "images": images, "id": "x"}
        return model.eval()(make_batch([c]))["text"][0].item()
    a, b, c, other = (page["images"][0] for page in pages[:4])
    plain = loss([a, b, c])
    assert plain == loss([a, b, c])
    assert all(abs(plain - loss(images)) > 1e-6 for images in ([other, b, c], [a, other, c], [a, b, other], [b, a, c]))


def test_image_only_batch(model, make_batch, pages):
    """A user who shows a page and says nothing."""
    c = {**pages[0], "messages": [{"role": "user", "content": [{"type": "image"}]}, pages[0]["messages"][1]]}
    assert torch.isfinite(model(make_batch([c, c]))["text"][0])


def test_a_mixed_batch_is_the_sum_of_its_rows(model, make_batch, pages, chats):
    model.eval()
    rows = [pages[0], chats[0], pages[1], chats[1]]
    alone = sum(model(make_batch([row]))["text"][0] for row in rows)
    torch.testing.assert_close(model(make_batch(rows))["text"][0], alone, rtol=1e-5, atol=0)


@torch.no_grad()
def test_padding_is_inert(model, make_batch, pages):
    model.eval()
    batch = make_batch(pages[:8])
    longer = replace(batch, ids=F.pad(batch.ids, (0, 9), value=7), targets=F.pad(batch.targets, (0, 9), value=-1))
    torch.testing.assert_close(model(longer)["text"][0], model(batch)["text"][0], rtol=1e-6, atol=0)


@torch.no_grad()
def test_the_loss_is_that_of_the_supervised_tokens(model, make_batch, pages):
    batch = make_batch(pages[:2])
    model.eval()
    logp = model.gpt.logits(model.gpt(model.embed(batch))).log_softmax(-1)
    expected = -sum(logp[b, t, target] for b, row in enumerate(batch.targets) for t, target in enumerate(row) if target != -1)
    torch.testing.assert_close(model(batch)["text"][0], expected)


@pytest.mark.parametrize("pack", [0, 256])
def test_compiled_blocks_learn_the_same(make_model, tokenizer, pages, chats, pack):
    """Traced and differentiated by torch's compiler, without its code generator; another number of unpacked rows needs no graph of its own."""
    sampler = Sampler([c for pair in zip(pages, chats) for c in pair], tokenizer, MODES["test"], 32, max_tokens=128, pack=pack, multiple=64)
    eager, compiled = make_model().train(), make_model().train()
    torch._dynamo.reset()
    compiled.compile_blocks(backend="aot_eager")
    graphs = []
    for rows in (8, 8, 6):
        batch = collate([sampler[i] for i in range(rows)], pack, max_images=4, multiple=128)
        losses = []
        for model in (eager, compiled):
            loss = model(batch)["text"][0] / batch.supervised()
            loss.backward()
            losses.append(loss.item())
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    for p, q in zip(eager.parameters(), compiled.parameters()):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    assert 0 < graphs[0] == graphs[2] or pack
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        torch.testing.assert_close(compiled.eval()(batch), eager.eval()(batch))
