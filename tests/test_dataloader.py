"""
Proves that the supervised tokens of a batch are exactly the answers; that ranks and workers share
the samples without loss or repetition; that a run goes on from any step with equal batches,
streamed or not; that packing changes no loss; that labels stay with their pixels; and that what
does not fit is named, or cut by rule and counted.

    python -m pytest tests/test_dataloader.py
"""
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.batch import collate, pack_rows
from nanochat.conversation import BadSample, ocr_conversation
from nanochat.dataloader import (
    Sampler, ahead, batch_bytes, loader, loader_workers, micro_batches, workers_that_fit)
from nanochat.image_modes import MODES, Mode
from nanochat.layers import Packing, attention, packed_attention, varlen_works
from nanochat.mixture import Mixture, Stream
from scripts import vis_tok_train
from tasks.synthchat import SynthChat
from tasks.synthdoc import SynthDoc
from tests.streamed_set import png, write_streamed_set

ROOT = Path(__file__).parents[1]
MODE = MODES["64px"]
STRIDE = 32  # px a token covers in the tiny preset


@pytest.fixture
def make_sampler(tokenizer):
    """A function (task, settings of a Sampler) -> Sampler."""
    def make(task, mode=MODE, stride=STRIDE, max_tokens=256, **settings):
        return Sampler(task, tokenizer, mode, stride, max_tokens, **settings)
    return make


@pytest.fixture
def sampler(make_sampler):
    """Nine pages to one chat, fifty samples."""
    pages = SynthDoc("train", 45, image_size=64, chars=(10, 12))
    return make_sampler(Mixture([(pages, 9), (SynthChat("train", 5), 1)]), max_tokens=128)


def all_of(sampler):
    return [sampler[i] for i in range(len(sampler))]


# -----------------------------------------------------------------------------
# What is in a batch

def test_targets_are_the_answers(make_batch, tokenizer, pages, chats):
    conversations = [*pages, *chats]
    batch = make_batch(conversations)
    answers = [c["messages"][-1]["content"] for c in conversations]
    for ids, targets, answer in zip(batch.ids, batch.targets, answers):
        said = targets != -1
        assert tokenizer.decode(targets[said].tolist()) == answer + "<|assistant_end|>"
        # They are in one piece, begin at the start token, and each is the token that comes next.
        first, last = said.nonzero()[[0, -1], 0].tolist()
        assert ids[first] == tokenizer.encode_special("<|assistant_start|>")
        assert last - first + 1 == said.sum()
        assert torch.equal(targets[first:last], ids[first + 1:last + 1])
    assert batch.characters == sum(map(len, answers))
    assert batch.images == len(pages)
    assert batch.supervised() == sum(len(tokenizer.encode(a)) + 1 for a in answers)


def test_rows_are_padded_on_the_right(make_batch, pages, chats):
    batch = make_batch([pages[0], chats[0]])
    alone = make_batch([chats[0]])
    n = alone.ids.size(1)
    assert torch.equal(batch.ids[1, :n], alone.ids[0])
    assert torch.equal(batch.targets[1, :n], alone.targets[0])
    assert (batch.targets[1, n:] == -1).all()


def test_rows_come_in_few_lengths(make_sampler, pages):
    plain = next(loader(make_sampler(pages), 4, 0, 1))
    padded = next(loader(make_sampler(pages, multiple=64), 4, 0, 1))
    n = plain.ids.size(1)
    assert padded.ids.size(1) % 64 == 0
    assert padded.ids.size(1) - 64 < n
    assert padded.counts["slots"] > plain.counts["slots"]
    assert torch.equal(padded.targets[:, :n], plain.targets)
    assert (padded.targets[:, n:] == -1).all()


@torch.no_grad()
def test_several_modes_share_a_batch(make_sampler, model, pages):
    """Each task is seen in each mode, and a row has the loss it has alone."""
    modes = [MODE, Mode("double", 128, stretch=True)]
    sampler = make_sampler(Mixture([(pages, 1), (pages[::-1], 1)]), modes)
    samples = [sampler[i] for i in range(8)]
    seen = Counter()
    for i, sample in enumerate(samples):
        plan, _, _ = sample.images[0]
        seen[i % 2, plan.mode.size] += 1
    assert seen == {(0, 64): 2, (0, 128): 2, (1, 64): 2, (1, 128): 2}

    batch = collate(samples)
    assert {side: len(v) for side, v in batch.views.items()} == {64: 4, 128: 4}
    model.eval()
    together, _ = model(batch)["text"]
    alone = [model(collate([sample]))["text"][0] for sample in samples]
    torch.testing.assert_close(together, sum(alone), rtol=1e-5, atol=0)
    assert model(batch.deranged())["text"][0] != together


def test_pixels_sent_ahead_are_the_same_batches(make_sampler, pages):
    sampler = make_sampler(pages)
    plain = list(loader(sampler, 2, 0, 5))
    sent = list(ahead(loader(sampler, 2, 0, 5), torch.device("cpu")))
    assert len(sent) == 5
    for a, b in zip(sent, plain):
        assert_same(a, b)


# -----------------------------------------------------------------------------
# Ranks and steps

@pytest.mark.parametrize("world, size", [(1, 4), (2, 4), (3, 2)])
def test_ranks_cover_each_sample_once(world, size):
    per_rank = [list(micro_batches(0, 5, size, rank, world)) for rank in range(world)]
    in_order = []
    for pass_of_all_ranks in zip(*per_rank):
        for batch in pass_of_all_ranks:
            in_order += batch
    assert in_order == list(range(5 * world * size))  # one process sees the same in this order
    assert per_rank[0][2:] == list(micro_batches(2, 5, size, 0, world))


def assert_same(a, b):
    assert torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets)
    assert a.plans == b.plans and a.owners == b.owners
    assert a.features_per_row == b.features_per_row
    assert a.characters == b.characters and a.counts == b.counts
    assert list(a.views) == list(b.views)
    for side in a.views:
        assert torch.equal(a.views[side], b.views[side])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_starting_at_a_step_gives_what_the_unbroken_run_gives(sampler, workers, world):
    for rank in range(world):
        unbroken = list(loader(sampler, 5, 0, 5, rank, world))
        resumed = list(loader(sampler, 5, 2, 5, rank, world, workers=workers))
        assert len(unbroken) == 5 and len(resumed) == 3
        for a, b in zip(unbroken[2:], resumed):
            assert_same(a, b)
    first = unbroken[0].ids
    assert not torch.equal(first, unbroken[1].ids[:, :first.size(1)])


def test_two_ranks_are_one_process_with_twice_the_passes(sampler):
    one = list(loader(sampler, 5, 0, 10))
    two = [list(loader(sampler, 5, 0, 5, rank, 2)) for rank in range(2)]
    for k, batch in enumerate(one):
        assert_same(batch, two[k % 2][k // 2])


def test_too_few_samples_are_not_repeated(sampler):
    message = "6 micro-batches of 5 on 2 ranks need 60 samples, the task has 50"
    with pytest.raises(ValueError, match=message):
        loader(sampler, 5, 0, 6, 0, 2)


def test_mixture():
    tasks = [[f"{name}{i}" for i in range(n)] for name, n in (("a", 60), ("b", 30), ("c", 11))]
    mixture = Mixture([(tasks[0], 6), (tasks[1], 3), (tasks[2], 1)])
    assert len(mixture) == 100
    items = [mixture[i] for i in range(100)]
    for first in range(0, 100, 10):
        assert Counter(item[0] for item in items[first:first + 10]) == {"a": 6, "b": 3, "c": 1}
    for name, used in zip("abc", (60, 30, 10)):  # each in its own order, each item once
        assert [item for item in items if item[0] == name] == [f"{name}{i}" for i in range(used)]
    with pytest.raises(ValueError, match="share 0"):
        Mixture([(tasks[0], 0)])


def test_a_mixture_is_spread_evenly():
    assert "".join(Mixture([("aaaaaa", 3), ("bbbb", 2)])) == "ababaababa"
    items = "".join(Mixture([("a" * 90, 90), ("b" * 10, 10)]))  # 90:10 is 9:1
    assert all(items[first:first + 10].count("b") == 1 for first in range(0, 100, 10))


# -----------------------------------------------------------------------------
# Too long

def test_too_long_is_named_not_cut(make_sampler, tokenizer, pages):
    message = (r"conversation synthdoc/heldout/0/3 takes \d\d positions and 1 images, "
               r"the limit is 20 and 16: raise --max-seq-len")
    with pytest.raises(ValueError, match=message):
        make_sampler(pages, max_tokens=20)[3]
    ids, _ = tokenizer.render_conversation(pages[3], [7])
    n = len(ids) - 1  # the last token is only a target
    assert len(make_sampler(pages, max_tokens=n)[3].ids) == n + 1
    with pytest.raises(ValueError, match=f"takes {n} positions and 1 images, the limit is {n - 1}"):
        make_sampler(pages, max_tokens=n - 1)[3]
    with pytest.raises(ValueError, match="takes"):  # nor is it bad data
        make_sampler(pages, max_tokens=n - 1, bad_data="skip")[3]


def test_clipped_and_dropped_are_counted(make_sampler, tokenizer, pages):
    dropped = {"drawn/list": 1, "dropped": 1}
    answer = pages[3]["messages"][-1]["content"]
    whole = make_sampler(pages)[3]
    n = whole.positions
    first = whole.mask.index(1)  # of the answer
    for limit in range(first, n):
        clipped = make_sampler(pages, max_tokens=limit, too_long="clip")[3]
        assert clipped.ids == whole.ids[:limit + 1] and clipped.mask == whole.mask[:limit + 1]
        assert clipped.counts == {"drawn/list": 1, "clipped": 1}
        said = tokenizer.decode(clipped.ids[first:])
        assert answer.startswith(said.removesuffix("<|assistant_end|>"))
        assert clipped.characters == min(len(answer), len(said))
        assert torch.equal(collate([clipped]).targets, collate([whole]).targets[:, :limit])
        assert make_sampler(pages, max_tokens=limit, too_long="drop")[3].counts == dropped
    for limit in (1, 5, first - 1):  # in the middle of the image, or before any answer
        sample = make_sampler(pages, max_tokens=limit, too_long="clip")[3]
        assert not sample.ids and sample.counts == dropped
    fits = make_sampler(pages, max_tokens=n, too_long="drop")[3]
    assert (fits.ids, fits.mask, fits.counts) == (whole.ids, whole.mask, {"drawn/list": 1})


def test_too_many_images(make_sampler, pages):
    question = {"role": "user", "content": [{"type": "image"}] * 3}
    images = [page["images"][0] for page in pages[:3]]
    three = {**pages[0], "images": images, "messages": [question, pages[0]["messages"][1]]}
    message = r"list row 0: .* takes \d+ positions and 3 images, the limit is 256 and 2: raise"
    with pytest.raises(ValueError, match=message):
        make_sampler([three], max_images=2)[0]
    assert make_sampler([three], max_images=2, too_long="clip")[0].counts["dropped"] == 1
    assert len(make_sampler([three], max_images=3)[0].images) == 3


# -----------------------------------------------------------------------------
# Workers

def test_workers_by_the_cores_that_are_ours(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(208)))
    assert loader_workers(-1) == 24  # not 206: their batches would fill the memory
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert loader_workers(-1) == 6  # eight ranks share the cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert loader_workers(-1) == 1

    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(208)))
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr("nanochat.dataloader.CPU_QUOTA", str(quota))
    quota.write_text("750000 100000\n")  # docker run --cpus=7.5
    assert loader_workers(-1) == 6
    quota.write_text("max 100000\n")
    assert loader_workers(-1) == 24
    assert loader_workers(0) == 0 and loader_workers(30) == 30
    with pytest.raises(ValueError, match="--workers=-2: must be -1"):
        loader_workers(-2)


def test_shared_memory_is_looked_at_before_the_start(make_sampler, pages, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    sampler = make_sampler(pages)
    [batch] = loader(sampler, 10, 0, 1)
    stored = batch.views[64].nbytes + batch.ids.nbytes
    assert stored < batch_bytes(sampler, 10) < 3 * stored
    needed = 2 * 4 * 3 * batch_bytes(sampler, 10)  # 2 ranks, 4 workers, 2 batches ahead and 1
    assert workers_that_fit(sampler, 10, 4, room=needed) == 4
    assert capsys.readouterr().out == ""
    assert workers_that_fit(sampler, 10, 4, room=needed - 1) == 4  # as asked for
    out = capsys.readouterr().out
    assert "4 workers on 2 ranks may put 24 batches" in out and "enough for 3 workers" in out
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert workers_that_fit(sampler, 10, -1, room=needed) == 4
    assert workers_that_fit(sampler, 10, -1, room=needed - 1) == 3
    assert workers_that_fit(sampler, 10, -1, room=1000) == 0  # docker's 64 MB: no worker at all


# -----------------------------------------------------------------------------
# Packing

def test_packed_attention_is_attention_under_a_block_diagonal_mask():
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    y = packed_attention(q, k, v, [[3, 2], [7]])  # the first row has two positions of padding
    for row, pieces in enumerate(((3, 2, 2), (7,))):  # padding attends to itself
        blocks = [torch.ones(n, n).tril() for n in pieces]
        allowed = torch.block_diag(*blocks).bool()
        mask = torch.where(allowed, 0.0, float("-inf"))
        torch.testing.assert_close(y[row], attention(q, k, v, mask=mask)[row])


def varlen_by_masks(q, k, v, starts_q, starts_k, longest_q, longest_k, window_size):
    """Stands in for torch's varlen_attn, which runs on CUDA only: (positions, H, D)."""
    assert starts_q.dtype == torch.int32 and torch.equal(starts_q, starts_k)
    lengths = starts_q.diff().tolist()
    assert sum(lengths) == len(q) and max(lengths) == longest_q == longest_k
    assert window_size == (-1, 0)  # causal
    blocks = [torch.ones(n, n).tril() for n in lengths]
    mask = torch.where(torch.block_diag(*blocks).bool(), 0.0, float("-inf"))
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return attention(q, k, v, mask=mask)[0].transpose(0, 1)


@pytest.mark.parametrize("lengths", [
    [[3, 2], [7]],     # two positions of padding behind the first row
    [[1], [4, 2, 1]],  # almost a whole row of padding
    [[7], [7]],        # none
])
def test_one_kernel_for_all_samples_gets_the_right_arguments(lengths, monkeypatch):
    monkeypatch.setattr("nanochat.layers.varlen_attn", varlen_by_masks)
    q, k, v = torch.randn(3, 2, 4, 7, 8)  # 2 rows, 4 heads, 7 positions
    packing = Packing(lengths, 7, q.device)
    # As the decoder has them: all rows laid end to end, heads before positions
    flat = [packing.flatten(t.transpose(1, 2)).transpose(1, 2) for t in (q, k, v)]
    by_kernel = packing.varlen_attention(*flat)
    assert by_kernel.shape == (1, 4, 14, 8)
    by_sample = packed_attention(q, k, v, lengths)
    torch.testing.assert_close(by_kernel[0].unflatten(1, (2, 7)).transpose(0, 1), by_sample)
    assert torch.equal(packing.attention(*flat)[0].unflatten(1, (2, 7)).transpose(0, 1), by_sample)


def test_the_kernel_takes_these_arguments():
    """torch's own varlen_attn, forward and backward, on tensors without memory."""
    q, k, v = torch.empty(3, 1, 4, 14, 8, device="meta", dtype=torch.bfloat16).unbind()
    q.requires_grad_()
    y = Packing([[3, 2], [7]], 7, q.device).varlen_attention(q, k, v)
    y.sum().backward()
    assert y.shape == q.shape == q.grad.shape
    assert not varlen_works(torch.device("cpu"))


def test_rows_hold_all_samples_within_their_limits():
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(1, 40)
        limit = rng.randint(50, 300)
        most = rng.randint(2, 6)
        lengths = [rng.randint(1, 50) for _ in range(n)]
        images = [rng.randint(0, 2) for _ in range(n)]
        rows = pack_rows(lengths, images, limit, most)
        assert sorted(sum(rows, [])) == list(range(n))
        for row in rows:
            assert row == sorted(row)
            assert sum(lengths[i] for i in row) <= limit
            assert sum(images[i] for i in row) <= most


def test_no_more_rows_than_needed():
    assert pack_rows([5, 5, 5, 5], [1, 1, 1, 1], 100, 2) == [[0, 2], [1, 3]]  # images need two
    assert len(pack_rows([60, 40, 50, 50], [0] * 4, 100, 1)) == 2
    with pytest.raises(ValueError, match="up to 60 positions and 0 images do not fit rows of 50"):
        pack_rows([60, 40], [0, 0], 50, 1)


def test_packing_leaves_little_padding():
    """On lengths like those of chart questions: an image of 111 positions, 1 to 5 short turns."""
    rng = random.Random(0)
    lengths = []
    for _ in range(1024):
        turns = [4 + rng.randint(6, 24) + rng.randint(1, 6) for _ in range(rng.randint(1, 5))]
        lengths.append(111 + sum(turns))
    plain_slots = 0
    packed_slots = 0
    for first in range(0, 1024, 32):
        batch = lengths[first:first + 32]
        plain_slots += len(batch) * max(batch)
        row_lengths = []
        for row in pack_rows(batch, [1] * 32, 2048, 16):
            row_lengths.append(sum(batch[i] for i in row))
        packed_slots += len(row_lengths) * max(row_lengths)
    assert 1 - sum(lengths) / packed_slots < 0.05 < 1 - sum(lengths) / plain_slots


@torch.no_grad()
def test_a_packed_row_has_the_losses_of_its_samples_alone(make_sampler, model, make_batch, pages,
                                                          chats):
    model.eval()
    conversations = []
    for page, chat in zip(pages, chats):
        conversations += [page, chat]
    samples = all_of(make_sampler(conversations, max_tokens=128))
    packed = collate(samples, pack=256, max_images=3)
    assert 1 < len(packed.ids) < 10 and packed.images == 10
    assert packed.counts["positions"] == sum(sample.positions for sample in samples)
    assert packed.counts["slots"] == packed.ids.numel()

    def log_probabilities(batch):
        embeddings = model.embed(batch)
        hidden = model.gpt(embeddings, positions=batch.positions, lengths=batch.lengths)
        return model.gpt.logits(hidden).log_softmax(-1)

    found = log_probabilities(packed)
    seen = []
    for r, row_lengths in enumerate(packed.lengths):
        start = 0
        for n in row_lengths:
            here = slice(start, start + n)
            ids = packed.ids[r, here].tolist()
            i = next(i for i, s in enumerate(samples) if s.ids[:-1] == ids and i not in seen)
            alone = make_batch([conversations[i]])
            assert packed.positions[r, here].tolist() == list(range(n))
            assert torch.equal(packed.targets[r, here], alone.targets[0])
            said = alone.targets[0] != -1
            expected = log_probabilities(alone)[0]
            torch.testing.assert_close(found[r, here][said], expected[said], rtol=1e-5, atol=2e-5)
            seen.append(i)
            start += n
    assert sorted(seen) == list(range(20))

    total = model(packed)["text"][0]
    alone = [model(make_batch([c]))["text"][0] for c in conversations]
    unpacked = model(make_batch(conversations))["text"][0]
    torch.testing.assert_close(total, sum(alone), rtol=1e-5, atol=0)
    torch.testing.assert_close(total, unpacked, rtol=1e-5, atol=0)


def test_a_packed_row_must_hold_the_longest_sample(make_sampler, pages):
    message = "--pack=100: a packed row must hold the longest sample, --max-seq-len=128"
    with pytest.raises(ValueError, match=message):
        make_sampler(pages, max_tokens=128, pack=100)


# -----------------------------------------------------------------------------
# Wrong pages

def test_deranged(make_batch, pages, chats):
    batch = make_batch(pages[:4])
    wrong = batch.deranged()
    assert torch.equal(wrong.ids, batch.ids) and torch.equal(wrong.targets, batch.targets)
    for row in range(4):
        assert torch.equal(wrong.views[64][row], batch.views[64][row - 1])
        assert not torch.equal(wrong.views[64][row], batch.views[64][row])
    beside_a_chat = make_batch([pages[0], chats[0], pages[1]]).deranged()
    assert torch.equal(beside_a_chat.views[64], make_batch(pages[:2]).views[64].flip(0))
    message = "two conversations or more; of 64px with 0x0 tiles there are 1, 1 in one"
    with pytest.raises(ValueError, match=message):
        make_batch([pages[0], chats[0]]).deranged()
    with pytest.raises(ValueError, match="needs images"):
        make_batch(chats[:2]).deranged()


def with_images(images, text="text", **extra):
    """A conversation about any number of images."""
    conversation = ocr_conversation(None, text, "id", **extra)
    conversation["images"] = images
    conversation["messages"][0]["content"][:1] = [{"type": "image"} for _ in images]
    return conversation


@pytest.mark.parametrize("pack", [0, 4000])
def test_deranged_with_tiles_several_images_and_packed_rows(make_sampler, pack):
    """Image n has gray level 10 n in all its views."""
    sizes = [(90, 90), (2000, 900), (80, 80), (100, 100),
             (1900, 910), (1800, 850), (2000, 900), (90, 90)]
    is_wide = [width > 1000 for width, _ in sizes]
    images_of = [(0, 1, 2), (3,), (4,), (), (5, 7), (6,)]  # of each conversation
    conversations = []
    owner = {}
    for number, images in enumerate(images_of):
        gray = [Image.new("L", sizes[n], 10 * n) for n in images]
        conversations.append(with_images(gray))
        owner.update(dict.fromkeys(images, number))
    samples = all_of(make_sampler(conversations, MODES["gundam"], 64, max_tokens=2000))

    def numbers(batch):
        """Which image each is, from its pixels: the tiles must say the same as the global view."""
        tiles = batch.views[640][:, 0, 300, 300].tolist()
        global_views = batch.views[1024][:, 0, 512, 512].tolist()
        found = []
        for plan, level in zip(batch.plans, global_views, strict=True):
            own = tiles[:plan.tiles]
            tiles = tiles[plan.tiles:]
            assert own == [level] * plan.tiles
            found.append(level // 10)
        assert not tiles
        return found

    batch = collate(samples, pack, max_images=4)
    right = numbers(batch)
    wrong = numbers(batch.deranged())
    assert sorted(right) == sorted(wrong) == list(range(8))
    for a, b in zip(right, wrong):
        assert owner[a] != owner[b]
        assert is_wide[a] == is_wide[b]  # only equal plans change places
    with pytest.raises(ValueError, match="of gundam with 0x0 tiles there are 3, 2 in one"):
        collate(samples[:2]).deranged()


# -----------------------------------------------------------------------------
# Labels

def labeled_page(number, size, spots):
    """
    A page whose blue is its number, with a red square at every spot, given as fractions of its
    sides. -> (image, {"glyphs": labels}): the labels at the spots name the page and the spot.
    """
    width, height = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 2] = 20 * number
    reach_x = max(2, width // 25)
    reach_y = max(2, height // 25)
    labels = []
    for k, (across, down) in enumerate(spots):
        x = int(across * width)
        y = int(down * height)
        pixels[y - reach_y:y + reach_y, x - reach_x:x + reach_x, 0] = 255
        labels.append((f"{number}.{k}", x, y))
    return Image.fromarray(pixels), {"glyphs": labels}


def labeled_conversations(sizes):
    """
    Of each size two conversations with a labeled page; among them a text without images, a page
    without labels, and a conversation of two pages, of which one has no spots.
    """
    conversations = []
    number = 0
    for size in sizes:
        for spots in ([(0.3, 0.2), (0.6, 0.7)], [(0.8, 0.4)]):
            number += 1
            image, labels = labeled_page(number, size, spots)
            conversations.append(with_images([image], labels=[labels]))
        conversations.append(with_images([]))
        conversations.append(with_images([labeled_page(0, size, [])[0]]))
    number += 1
    image, labels = labeled_page(number, sizes[0], [(0.2, 0.8), (0.7, 0.3), (0.7, 0.8)])
    empty, no_labels = labeled_page(0, sizes[0], [])
    conversations.append(with_images([empty, image], labels=[no_labels, labels]))
    return conversations


def assert_labels_are_on_their_spots(batch, stride, values):
    """Each label lies on a red pixel of its own page, in every view; and all labels are there."""
    points = batch.label_points("glyphs")
    n_points = 0
    found = set()
    for side, (names, views, rows, columns) in points.items():
        n_points += len(names)
        found.update(names)
        for name, view, row, column in zip(names, views, rows, columns, strict=True):
            y = int(row * stride)
            x = int(column * stride)
            red, _, blue = batch.views[side][view, :, y, x].tolist()
            assert red > 200
            assert abs(blue - 20 * int(name.split(".")[0])) <= 1
    assert found == values
    return n_points


@pytest.mark.parametrize("pack", [0, 4000])
@pytest.mark.parametrize("modes, stride, sizes", [
    (["64px"], 32, [(64, 64)]),
    (["64px", "128px"], 32, [(64, 64), (50, 90)]),     # stretched
    (["1024px"], 64, [(300, 500), (500, 300)]),        # padded
    (["gundam"], 64, [(1300, 700), (600, 500)]),       # with tiles and without
    (["640px", "gundam-9", "gundam-m"], 64, [(1300, 700)]),
])
def test_labels_stay_with_their_pixels(make_sampler, modes, stride, sizes, pack):
    # All modes see all pages: as many copies of the data as modes, one after the other.
    conversations = labeled_conversations(sizes)
    task = conversations * len(modes)
    modes = [MODES[name] for name in modes]
    sampler = make_sampler(task, modes, stride, max_tokens=4000, labels=("glyphs",))
    batch = collate(all_of(sampler), pack, max_images=8)
    assert len(batch.labels) == batch.images

    values = set()
    for conversation in conversations:
        for labels in conversation.get("labels", ()):
            values.update(value for value, _, _ in labels["glyphs"])
    n_points = assert_labels_are_on_their_spots(batch, stride, values)
    tiled = any(plan.tiles for plan in batch.plans)
    n_labels = (3 * len(sizes) + 3) * len(modes)
    assert n_points > n_labels if tiled else n_points == n_labels

    # Other pages, and with them their labels.
    wrong = batch.deranged()
    assert assert_labels_are_on_their_spots(wrong, stride, values) == n_points
    assert [id(labels) for labels in wrong.labels] != [id(labels) for labels in batch.labels]
    assert torch.equal(wrong.ids, batch.ids)

    # Nothing but the labels is another, and they survive the workers.
    batch.counts.pop("no_places", None)  # these labels are made up and spell nothing
    plain = make_sampler(task, modes, stride, max_tokens=4000)
    assert_same(batch, collate(all_of(plain), pack, max_images=8))
    half = len(task) // 2
    for loaded in loader(sampler, half, 0, 2, workers=1):
        for names, views, _, _ in loaded.label_points("glyphs").values():
            assert len(names) == len(views) > 0


def test_labels_of_an_upright_page(make_sampler):
    """Labels are in px of the page as it is shown: here turned a quarter by its EXIF tag."""
    image, labels = labeled_page(3, (400, 200), [(0.8, 0.3)])
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned a quarter counterclockwise
    file = io.BytesIO()
    image.transpose(Image.Transpose.ROTATE_270).save(file, "PNG", exif=exif)
    task = [with_images([file.getvalue()], labels=[labels])]
    batch = collate(all_of(make_sampler(task, MODES["1024px"], 64, 400, labels=("glyphs",))))
    assert_labels_are_on_their_spots(batch, 64, {"3.0"})


def test_labels_are_carried_only_where_wanted(make_sampler):
    conversations = labeled_conversations([(64, 64)])
    batch = collate(all_of(make_sampler(conversations)))
    assert batch.labels == [{}] * batch.images
    assert batch.label_points("glyphs") == {} and batch.labeled_views("glyphs") == {}
    text_only = collate([make_sampler(conversations, labels=("glyphs", "words"))[2]])
    assert text_only.labels == [] and text_only.label_points("words") == {}
    dropping = make_sampler(conversations, max_tokens=1, too_long="drop", labels=("glyphs",))
    nothing = collate(all_of(dropping))
    assert nothing.counts["dropped"] == len(conversations)
    assert nothing.label_points("glyphs") == nothing.labeled_views("glyphs") == {}


def test_views_of_pages_with_labels(make_sampler):
    """With an empty list of labels a page is known to be empty; without one nothing is known."""
    conversations = labeled_conversations([(1300, 700)])  # two tiles each
    batch = collate(all_of(make_sampler(conversations, MODES["gundam"], 64, 4000,
                                        labels=("glyphs",))))
    # Labeled: the first, the second, and both pages of the last; between them one without labels.
    assert batch.labeled_views("glyphs") == {
        640: [0, 1, 2, 3, 6, 7, 8, 9],
        1024: [0, 1, 3, 4],
    }


def test_a_clipped_sample_keeps_its_labels(make_sampler):
    task = labeled_conversations([(64, 64)])[:1]
    whole = make_sampler(task, labels=("glyphs",))[0]
    limit = whole.positions - 1
    clipped = make_sampler(task, max_tokens=limit, too_long="clip", labels=("glyphs",))[0]
    assert clipped.counts["clipped"] == 1
    assert_labels_are_on_their_spots(collate([clipped]), STRIDE, {"1.0", "1.1"})


@pytest.mark.parametrize("labels, message", [
    ([], "list row 0: conversation id: 0 labels for 1 images: there must be one dict"),
    ([{"glyphs": [("a", 3, 3), ("b", 70, 5)]}],
     "list row 0: conversation id: ValueError: 1 of 2 points are not on the page of 64x64 px"),
    ([{"glyphs": [("a", 3)]}], "list row 0: conversation id: ValueError: not enough values"),
])
def test_labels_that_do_not_fit_the_page_are_bad_data(make_sampler, labels, message):
    task = [with_images([Image.new("L", (64, 64))], labels=labels)]
    with pytest.raises(BadSample, match=message):
        make_sampler(task, labels=("glyphs",))[0]
    skipped = make_sampler(task, labels=("glyphs",), bad_data="skip")[0]
    assert not skipped.ids and skipped.counts["bad"] == 1
    assert make_sampler(task)[0].ids  # nobody asked


# -----------------------------------------------------------------------------
# Resuming, and sharing among workers

class Marked(SynthDoc):
    """Pages with their index as text: what was seen can be told from a batch."""
    def __getitem__(self, i):
        c = super().__getitem__(i)
        c["messages"][-1]["content"] = f"#{i};"
        return c


def seen(tokenizer, batches):
    """Sorted indices of the Marked pages of unpacked batches."""
    found = []
    for batch in batches:
        for targets in batch.targets:
            text = tokenizer.decode(targets[targets != -1].tolist())
            if text.startswith("#"):
                found.append(int(text[1:text.index(";")]))
    return sorted(found)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pack", [0, 128])
def test_every_sample_once_over_ranks_and_workers(make_sampler, tokenizer, workers, pack):
    pages = Marked("train", 36, image_size=64, chars=(10, 12))
    task = Mixture([(pages, 3), (SynthChat("train", 12), 1)])
    sampler = make_sampler(task, max_tokens=128, pack=pack)
    batches = []
    for rank in range(2):
        batches += loader(sampler, 4, 0, 6, rank, 2, workers)
    if not pack:
        assert seen(tokenizer, batches) == list(range(36))
    counts = Counter()
    for batch in batches:
        counts.update(batch.counts)
    assert (counts["drawn/Marked"], counts["drawn/SynthChat"], counts["images"]) == (36, 12, 36)


def contents(batches):
    """All tensors of each batch as bytes, to compare runs with."""
    found = []
    for batch in batches:
        tensors = [batch.ids, batch.targets, *batch.views.values()]
        found.append([t.numpy().tobytes() for t in tensors])
    return found


def test_twenty_stops(sampler):
    """The number of the step is all that is needed. On one rank, and on the second of two."""
    rng = random.Random(0)
    sampler.pack = 160
    for world in (1, 2):
        rank = world - 1
        stop = 10 // world
        unbroken = contents(loader(sampler, 5, 0, stop, rank, world))
        for _ in range(10):
            at = rng.randint(1, stop - 1)
            workers = rng.choice([0, 2])
            resumed = loader(sampler, 5, at, stop, rank, world, workers)
            assert contents(resumed) == unbroken[at:]


def page_rows(shards):
    """Rows of a streamed set: six to a shard, pictures as bytes."""
    pages = Marked("train", 48, image_size=64, chars=(10, 12))
    for shard in shards:
        for i in range(6 * shard, 6 * shard + 6):
            page = pages[i]
            picture = {"bytes": png(page["images"][0]), "path": None}
            yield {"image": picture, "text": page["messages"][-1]["content"]}


def to_conversation(row, where):
    return ocr_conversation(row["image"], row["text"], where)


@pytest.fixture
def make_stream_sampler(make_sampler):
    """A function -> Sampler of a stream of pages, by default with a chat to three pages."""
    datasets = pytest.importorskip("datasets")

    def make(window=5, shards=8, chats=True):
        rows = datasets.IterableDataset.from_generator(
            page_rows, gen_kwargs={"shards": list(range(shards))})
        task = Stream(rows, to_conversation, "pages", window)
        if chats:
            task = Mixture([(task, 3), (SynthChat("train", 20), 1)])
        return make_sampler(task, max_tokens=128)
    return make


def states_after(batches):
    """{worker: state of its last batch}, by way of JSON, as a checkpoint keeps it."""
    states = {batch.state["worker"]: batch.state for batch in batches}
    return json.loads(json.dumps(states))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_a_stream_goes_on_where_it_was(make_stream_sampler, workers, world):
    """Over two epochs and more, in shuffled windows, beside a task with indices."""
    rng = random.Random(0)

    def load(start, rank, states=None):
        return loader(make_stream_sampler(), 4, start, 30, rank, world, workers, states=states)

    for rank in range(world):
        unbroken = list(load(0, rank))
        for batch in unbroken:
            assert (batch.counts["drawn/pages"], batch.counts["drawn/SynthChat"]) == (3, 1)
        expected = contents(unbroken)
        for stop in rng.sample(range(1, 30), 4):
            states = states_after(unbroken[:stop])
            resumed = list(load(stop, rank, states))
            assert contents(resumed) == expected[stop:]
            # Stopped a second time: a worker that had no turn keeps its earlier state.
            states |= states_after(resumed[:3])
            again = load(min(stop + 3, 30), rank, states)
            assert contents(again) == expected[stop + 3:]
    message = f"--workers=3: the stream was begun with {max(1, workers)}, resume with as many"
    with pytest.raises(ValueError, match=message):
        loader(make_stream_sampler(), 4, 5, 30, workers=3, states=states)


@pytest.mark.parametrize("world, workers, shards", [(1, 0, 8), (1, 2, 8), (2, 2, 8), (2, 0, 3)])
def test_a_stream_gives_every_row_once_an_epoch(make_stream_sampler, tokenizer, world, workers,
                                                shards):
    epoch = 6 * shards // world // 3  # batches of three rows, per rank
    for first, epochs in ((0, 1), (epoch, 1), (0, 2)):
        sampler = make_stream_sampler(4, shards, chats=False)
        batches = []
        for rank in range(world):
            loaded = list(loader(sampler, 3, 0, first + epoch * epochs, rank, world, workers))
            batches += loaded[first:]
        assert seen(tokenizer, batches) == sorted(list(range(6 * shards)) * epochs)


def test_a_worker_without_shards_is_named(make_stream_sampler):
    message = "pages has no row for worker 2 of 3 on rank 0 of 1"
    with pytest.raises(ValueError, match=message):
        list(loader(make_stream_sampler(shards=2, chats=False), 4, 0, 9, workers=3))


# -----------------------------------------------------------------------------
# Whole runs, from the command line

def stage1_flags(tmp_path, tokenizer_dir, *flags):
    return ["--preset=tiny", "--dtype=float32", "--device-type=cpu",
            f"--tokenizer={tokenizer_dir}", f"--checkpoints={tmp_path}", *flags]


def test_a_streamed_run_resumes(tokenizer_dir, tmp_path, capsys):
    """Packed, with rows that cannot be used: the resumed run has the unbroken one's weights."""
    pytest.importorskip("datasets")
    pages = Marked("train", 200, image_size=64, chars=(10, 12))
    write_streamed_set(tmp_path / "set", pages, n_shards=4)
    data = f"--data=finevision:{tmp_path / 'set'}/pages=3,synthchat=1"
    flags = stage1_flags(tmp_path, tokenizer_dir, data, "--stream", "--pack=256", "--workers=2",
                         "--num-iterations=6", "--device-batch-size=4", "--total-batch-size=12",
                         "--save-every=3")
    run = tmp_path / "stage1"

    def weights():
        final = run / "model_000006"
        return [(final / name).read_bytes()
                for name in ("model.safetensors", "optim.safetensors")]

    def figures():
        """What each step counted and lost; how long it waited is another every time."""
        found = []
        for line in (run / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            record.pop("data/wait", None)
            found.append({name: value for name, value in record.items()
                          if name.startswith(("data/", "train/loss"))})
        return found

    vis_tok_train.main([*flags, "--bad-data=skip"])
    unbroken = (weights(), figures())
    shutil.rmtree(run / "model_000006")
    vis_tok_train.main([*flags, "--bad-data=skip", "--resume"])
    assert (weights(), figures()) == unbroken

    counted = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]
    drawn = [n for name, n in counted.items() if name.startswith("drawn/")]
    assert sorted(drawn) == [18, 54]
    assert 0 < counted["bad"] < 20
    last = [record for record in figures() if "data/bad" in record][-1]
    assert last["data/bad"] == counted["bad"] and last["data/padding"] < 0.3
    with pytest.raises(BadSample, match="picture 0: the picture cannot be read"):
        vis_tok_train.main([*flags, "--model-tag=strict"])


def test_text_and_images_mix_on_two_processes(tmp_path, tokenizer_dir):
    """
    With one sample a pass, one rank often has text alone while the other has a page, also in the
    last pass of a step, which is the one that reduces gradients. Two ranks must not wait for each
    other, and learn what one process learns from the same samples.
    """
    flags = stage1_flags(tmp_path, tokenizer_dir, "--data=synthdoc=2,synthchat=1",
                         "--chars=10-12", "--workers=1",
                         "--num-iterations=4", "--device-batch-size=1", "--total-batch-size=4",
                         "--eval-every=-1", "--save-every=-1")
    vis_tok_train.main([*flags, "--model-tag=one"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "scripts.vis_tok_train", *flags, "--model-tag=two"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    summary = json.loads(process.stdout.splitlines()[-1])
    drawn = [n for name, n in summary["data"].items() if name.startswith("drawn/")]
    assert sorted(drawn) == [5, 11]  # 16 samples, 2 to 1

    def losses(tag):
        lines = (tmp_path / tag / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [record["train/loss"] for record in records if "train/loss" in record]

    assert len(losses("two")) == 4
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)
