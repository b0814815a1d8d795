"""
Proves that the supervised tokens of a batch are exactly the answers; that ranks share the samples out without loss or
repetition; that any step can be rebuilt, with or without workers; and that what does not fit is named, not cut.

python -m pytest tests/test_dataloader.py
"""

from collections import Counter

import pytest
import torch

from nanochat.dataloader import MicroBatches, Mixture, Sampler, loader
from nanochat.image_modes import MODES
from tasks.synthchat import SynthChat
from tasks.synthdoc import SynthDoc


@pytest.fixture
def sampler(tokenizer):
    """Nine pages to one chat, fifty samples."""
    task = Mixture([(SynthDoc("train", 45, image_size=64, chars=(10, 12)), 9), (SynthChat("train", 5), 1)])
    return Sampler(task, tokenizer, MODES["test"], 32, max_tokens=128)


def test_targets_are_the_answers(make_batch, tokenizer, pages, chats):
    conversations = [*pages, *chats]
    batch = make_batch(conversations)
    answers = [c["messages"][-1]["content"] for c in conversations]
    for ids, targets, answer in zip(batch.ids, batch.targets, answers):
        said = targets != -1
        assert tokenizer.decode(targets[said].tolist()) == answer + "<|assistant_end|>"
        first, last = said.nonzero()[[0, -1], 0].tolist()
        assert ids[first] == tokenizer.encode_special("<|assistant_start|>") and last - first + 1 == said.sum()
        assert torch.equal(targets[first:last], ids[first + 1:last + 1])  # each is the token that comes next
    assert batch.characters == sum(map(len, answers)) and batch.images == len(pages)
    assert batch.supervised() == sum(len(tokenizer.encode(a)) + 1 for a in answers)


def test_rows_are_padded_on_the_right(make_batch, pages, chats):
    batch, alone = make_batch([pages[0], chats[0]]), make_batch([chats[0]])
    n = alone.ids.size(1)
    assert torch.equal(batch.ids[1, :n], alone.ids[0]) and torch.equal(batch.targets[1, :n], alone.targets[0])
    assert (batch.targets[1, n:] == -1).all()


@pytest.mark.parametrize("world, size", [(1, 4), (2, 4), (3, 2)])
def test_ranks_cover_each_sample_once(world, size):
    per_rank = [[list(b) for b in MicroBatches(0, 5, size, rank, world)] for rank in range(world)]
    in_order = [i for step in zip(*per_rank) for micro in step for i in micro]
    assert in_order == list(range(5 * world * size))  # and one process sees the same in the same order
    assert per_rank[0][2:] == [list(b) for b in MicroBatches(2, 5, size, 0, world)]


def assert_same(a, b):
    assert torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets) and a.plans == b.plans
    assert a.features_per_row == b.features_per_row and a.characters == b.characters and set(a.views) == set(b.views)
    assert all(torch.equal(a.views[side], b.views[side]) for side in a.views)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_starting_at_a_step_gives_what_the_unbroken_run_gives(sampler, workers, world):
    for rank in range(world):
        unbroken = list(loader(sampler, 5, 0, 5, rank, world))
        resumed = list(loader(sampler, 5, 2, 5, rank, world, workers=workers))
        assert len(unbroken) == 5 and len(resumed) == 3
        for a, b in zip(unbroken[2:], resumed):
            assert_same(a, b)
    assert not torch.equal(unbroken[0].ids, unbroken[1].ids[:, :unbroken[0].ids.size(1)])


def test_two_ranks_are_one_process_with_twice_the_passes(sampler):
    one = list(loader(sampler, 5, 0, 10))
    two = [list(loader(sampler, 5, 0, 5, rank, 2)) for rank in range(2)]
    for k, batch in enumerate(one):
        assert_same(batch, two[k % 2][k // 2])


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


def test_too_long_is_named_not_cut(tokenizer, pages):
    sampler = Sampler(pages, tokenizer, MODES["test"], 32, max_tokens=20)
    with pytest.raises(ValueError, match=r"conversation synthdoc/heldout/0/3 takes \d\d positions, the limit is 20"):
        sampler[3]
    n = len(tokenizer.render_conversation(pages[3], [7])[0]) - 1
    assert len(Sampler(pages, tokenizer, MODES["test"], 32, max_tokens=n)[3][0]) == n + 1
    with pytest.raises(ValueError, match=f"takes {n} positions, the limit is {n - 1}"):
        Sampler(pages, tokenizer, MODES["test"], 32, max_tokens=n - 1)[3]


def test_too_few_samples_are_not_repeated(sampler):
    with pytest.raises(ValueError, match="6 micro-batches of 5 on 2 ranks need 60 samples, the task has 50"):
        loader(sampler, 5, 0, 6, 0, 2)


def test_deranged(make_batch, pages, chats):
    batch = make_batch(pages[:4])
    wrong = batch.deranged()
    assert torch.equal(wrong.ids, batch.ids) and torch.equal(wrong.targets, batch.targets)
    for row in range(4):
        assert torch.equal(wrong.views[64][row], batch.views[64][row - 1])
        assert not torch.equal(wrong.views[64][row], batch.views[64][row])
    for unfit in ([pages[0]], [pages[0], chats[0]]):
        with pytest.raises(ValueError, match="at least two rows with one image each"):
            make_batch(unfit).deranged()
