"""
Proves that the supervised tokens of a batch are exactly the answers; that ranks and workers share the samples out without loss
or repetition; that a run goes on from any step with equal batches, streamed or not; that packing changes no loss; and that what
does not fit is named, or cut by rule and counted.

python -m pytest tests/test_dataloader.py
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanochat import loop
from nanochat.dataloader import Sampler, ahead, loader, micro_batches
from nanochat.mixture import Mixture, Stream
from nanochat.batch import collate, pack_rows
from nanochat.layers import attention, packed_attention
from nanochat.image_modes import MODES, Mode
from scripts import vis_tok_train
from scripts.data_bench import padding
from nanochat.conversation import BadSample, ocr_conversation
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
    per_rank = [[list(b) for b in micro_batches(0, 5, size, rank, world)] for rank in range(world)]
    in_order = [i for step in zip(*per_rank) for micro in step for i in micro]
    assert in_order == list(range(5 * world * size))  # and one process sees the same in the same order
    assert per_rank[0][2:] == [list(b) for b in micro_batches(2, 5, size, 0, world)]


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
    with pytest.raises(ValueError, match=r"conversation synthdoc/heldout/0/3 takes \d\d positions and 1 images, the limit is 20 "):
        sampler[3]
    n = len(tokenizer.render_conversation(pages[3], [7])[0]) - 1
    assert len(Sampler(pages, tokenizer, MODES["test"], 32, max_tokens=n)[3][0]) == n + 1
    with pytest.raises(ValueError, match=f"takes {n} positions and 1 images, the limit is {n - 1} "):
        Sampler(pages, tokenizer, MODES["test"], 32, max_tokens=n - 1)[3]


def test_too_few_samples_are_not_repeated(sampler):
    with pytest.raises(ValueError, match="6 micro-batches of 5 on 2 ranks need 60 samples, the task has 50"):
        loader(sampler, 5, 0, 6, 0, 2)


# -----------------------------------------------------------------------------
# Too long, by rule


def test_clipped_and_dropped_are_counted(tokenizer, pages):
    def sampler(limit, rule, **more):
        return Sampler(pages, tokenizer, MODES["test"], 32, max_tokens=limit, too_long=rule, **more)
    whole = sampler(200, "raise")[3]
    n, answer = len(whole.ids) - 1, pages[3]["messages"][-1]["content"]
    first = whole.mask.index(1)  # of the answer
    for limit in range(first, n):
        clipped = sampler(limit, "clip")[3]
        assert (clipped.ids, clipped.mask) == (whole.ids[:limit + 1], whole.mask[:limit + 1]) and clipped.counts["clipped"] == 1
        assert answer.startswith(tokenizer.decode(clipped.ids[first:]).removesuffix("<|assistant_end|>"))
        assert clipped.characters == min(len(answer), len(tokenizer.decode(clipped.ids[first:])))
        assert torch.equal(collate([clipped]).targets, collate([whole]).targets[:, :limit])
        assert sampler(limit, "drop")[3].counts == {"drawn/list": 1, "dropped": 1}
    for limit in (1, 5, first - 1):  # in the middle of the image, or before any answer
        assert not sampler(limit, "clip")[3].ids and sampler(limit, "clip")[3].counts == {"drawn/list": 1, "dropped": 1}
    assert sampler(n, "drop")[3][:2] == whole[:2]


def test_too_many_images(tokenizer, pages):
    three = {**pages[0], "images": [p["images"][0] for p in pages[:3]]}
    three["messages"] = [{"role": "user", "content": [{"type": "image"}] * 3}, pages[0]["messages"][1]]
    with pytest.raises(ValueError, match=r"list row 0: .* takes \d+ positions and 3 images, the limit is 128 and 2: raise"):
        Sampler([three], tokenizer, MODES["test"], 32, 128, max_images=2)[0]
    assert Sampler([three], tokenizer, MODES["test"], 32, 128, max_images=2, too_long="clip")[0].counts["dropped"] == 1
    assert len(Sampler([three], tokenizer, MODES["test"], 32, 128, max_images=3)[0].images) == 3


@torch.no_grad()
def test_several_modes_share_a_batch(tokenizer, model, make_batch, pages, chats):
    """Each task is seen in each mode, and a row has the loss it has alone."""
    modes = [MODES["test"], Mode("double", 128, stretch=True)]
    sampler = Sampler(Mixture([(pages, 1), (pages[::-1], 1)]), tokenizer, modes, 32, max_tokens=256)
    seen = [(i % 2, sampler[i].images[0][0].mode.size) for i in range(8)]
    assert sorted(seen) == sorted([(0, 64), (0, 128), (1, 64), (1, 128)] * 2)
    batch = collate([sampler[i] for i in range(8)])
    assert {side: len(v) for side, v in batch.views.items()} == {64: 4, 128: 4}
    model.eval()
    alone = [model(collate([sampler[i]]))["text"][0] for i in range(8)]
    torch.testing.assert_close(model(batch)["text"][0], sum(alone), rtol=1e-5, atol=0)
    assert model(batch.deranged())["text"][0] != model(batch)["text"][0]


def test_rows_come_in_few_lengths(tokenizer, pages):
    sampler = Sampler(pages, tokenizer, MODES["test"], 32, max_tokens=256, multiple=64)
    plain, padded = (next(loader(s, 4, 0, 1)) for s in (Sampler(pages, tokenizer, MODES["test"], 32, max_tokens=256), sampler))
    assert padded.ids.size(1) % 64 == 0 and padded.ids.size(1) - 64 < plain.ids.size(1) and padded.counts["slots"] > plain.counts["slots"]
    assert torch.equal(padded.targets[:, :plain.ids.size(1)], plain.targets) and (padded.targets[:, plain.ids.size(1):] == -1).all()


def test_pixels_sent_ahead_are_the_same_batches(tokenizer, pages):
    sampler = Sampler(pages, tokenizer, MODES["test"], 32, max_tokens=256)
    sent, plain = list(ahead(loader(sampler, 2, 0, 5), torch.device("cpu"))), list(loader(sampler, 2, 0, 5))
    assert len(sent) == 5 and all(torch.equal(a.ids, b.ids) and torch.equal(a.views[64], b.views[64]) for a, b in zip(sent, plain))


# -----------------------------------------------------------------------------
# Packing


def test_packed_attention_is_attention_under_a_block_diagonal_mask():
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    y = packed_attention(q, k, v, [[3, 2], [7]])  # two samples and padding, which attends to itself; one sample
    for row, pieces in enumerate(((3, 2, 2), (7,))):
        mask = torch.where(torch.block_diag(*(torch.ones(n, n).tril() for n in pieces)).bool(), 0.0, float("-inf"))
        torch.testing.assert_close(y[row], attention(q, k, v, mask=mask)[row])


def test_rows_hold_all_samples_within_their_limits():
    rng = random.Random(0)
    for _ in range(200):
        n, limit, most = rng.randint(1, 40), rng.randint(50, 300), rng.randint(2, 6)
        lengths, images = [rng.randint(1, 50) for _ in range(n)], [rng.randint(0, 2) for _ in range(n)]
        rows = pack_rows(lengths, images, limit, most)
        assert sorted(i for row in rows for i in row) == list(range(n)) and all(row == sorted(row) for row in rows)
        assert all(sum(lengths[i] for i in row) <= limit and sum(images[i] for i in row) <= most for row in rows)
    assert pack_rows([5, 5, 5, 5], [1, 1, 1, 1], 100, 2) == [[0, 2], [1, 3]]  # as many rows as the images need
    assert len(pack_rows([60, 40, 50, 50], [0] * 4, 100, 1)) == 2
    plain, packed = padding(2048)
    assert packed < 0.05 < plain


@torch.no_grad()
def test_a_packed_row_has_the_losses_of_its_samples_alone(tokenizer, model, make_batch, pages, chats):
    model.eval()
    conversations = [c for pair in zip(pages, chats) for c in pair]
    sampler = Sampler(conversations, tokenizer, MODES["test"], 32, max_tokens=128)
    samples = [sampler[i] for i in range(20)]
    packed = collate(samples, pack=256, max_images=3)
    assert 1 < len(packed.ids) < 10 and packed.counts["positions"] == sum(len(s.ids) - 1 for s in samples)
    assert packed.counts["slots"] == packed.ids.numel() and packed.images == 10
    hidden = model.gpt(model.embed(packed), positions=packed.positions, lengths=packed.lengths)
    logp, seen = model.gpt.logits(hidden).log_softmax(-1), []
    for r, row in enumerate(packed.ids):
        starts = [t for t in range(len(row)) if packed.positions[r, t] == 0 and row[t] == tokenizer.get_bos_token_id()]
        for start in starts:
            i = next(i for i, s in enumerate(samples) if i not in seen and row[start:start + len(s.ids) - 1].tolist() == s.ids[:-1])
            alone = make_batch([conversations[i]])
            at = slice(start, start + alone.ids.size(1))
            said = alone.targets[0] != -1
            assert torch.equal(packed.targets[r, at], alone.targets[0])
            expected = model.gpt.logits(model.gpt(model.embed(alone)))[0].log_softmax(-1)
            torch.testing.assert_close(logp[r, at][said], expected[said], rtol=1e-5, atol=2e-5)
            seen.append(i)
    assert sorted(seen) == list(range(20))
    torch.testing.assert_close(model(packed)["text"][0], sum(model(make_batch([c]))["text"][0] for c in conversations), rtol=1e-5, atol=0)
    torch.testing.assert_close(model(packed)["text"][0], model(make_batch(conversations))["text"][0], rtol=1e-5, atol=0)


def test_a_packed_row_must_hold_the_longest_sample(tokenizer, pages):
    with pytest.raises(ValueError, match="--pack=100: a packed row must hold the longest sample, --max-seq-len=128"):
        Sampler(pages, tokenizer, MODES["test"], 32, 128, pack=100)


# -----------------------------------------------------------------------------
# Wrong pages


def test_deranged(make_batch, pages, chats):
    batch = make_batch(pages[:4])
    wrong = batch.deranged()
    assert torch.equal(wrong.ids, batch.ids) and torch.equal(wrong.targets, batch.targets)
    for row in range(4):
        assert torch.equal(wrong.views[64][row], batch.views[64][row - 1])
        assert not torch.equal(wrong.views[64][row], batch.views[64][row])
    assert torch.equal(make_batch([pages[0], chats[0], pages[1]]).deranged().views[64], make_batch(pages[:2]).views[64].flip(0))
    with pytest.raises(ValueError, match="two conversations or more; of test with 0x0 tiles there are 1, 1 in one"):
        make_batch([pages[0], chats[0]]).deranged()
    with pytest.raises(ValueError, match="needs images"):
        make_batch(chats[:2]).deranged()


def test_deranged_with_tiles_several_images_and_packed_rows(tokenizer):
    """Image n is of grey level n in all its views; 0-2 are one conversation's, 1 and 4-6 wide, 3 and 7 text only."""
    sizes = [(90, 90), (2000, 900), (80, 80), (100, 100), (1900, 910), (1800, 850), (2000, 900), (90, 90)]
    grey = [Image.new("L", size, 10 * n) for n, size in enumerate(sizes)]
    def conversation(*numbers):
        c = ocr_conversation(None, "text", str(numbers), images=[grey[n] for n in numbers])
        c["messages"][0]["content"][:1] = [{"type": "image"} for _ in numbers]
        return c
    conversations = [conversation(0, 1, 2), conversation(3), conversation(4), conversation(), conversation(5, 7), conversation(6)]
    sampler = Sampler(conversations, tokenizer, MODES["gundam"], 64, max_tokens=2000)
    samples = [sampler[i] for i in range(6)]
    for pack in (0, 4000):
        batch = collate(samples, pack, max_images=4)
        wrong, owner = batch.deranged(), {0: 0, 1: 0, 2: 0, 3: 1, 4: 2, 5: 4, 7: 4, 6: 5}
        def levels(b):  # grey level of every image in order: its global view, and all of its tiles
            tiles = iter(b.views[640][:, 0, 300, 300].tolist())
            found = []
            for p, whole in zip(b.plans, b.views[1024][:, 0, 512, 512].tolist()):
                assert {next(tiles) for _ in range(p.rows * p.cols)} <= {whole}
                found.append(whole // 10)
            assert next(tiles, None) is None
            return found
        right, swapped = levels(batch), levels(wrong)
        assert sorted(right) == sorted(swapped) == list(range(8))
        for a, b in zip(right, swapped):
            assert owner[a] != owner[b] and (sizes[a][0] > 1000) == (sizes[b][0] > 1000)
    with pytest.raises(ValueError, match="of gundam with 0x0 tiles there are 3, 2 in one"):
        collate(samples[:2]).deranged()


# -----------------------------------------------------------------------------
# Resuming, and sharing out


class Marked(SynthDoc):
    """Pages with the index as id, and in the text: what was seen can be told from a batch."""
    def __getitem__(self, i):
        c = super().__getitem__(i)
        c["messages"][-1]["content"] = f"#{i};"
        return c


def seen(tokenizer, batches):
    """Sorted indices of the Marked pages of batches."""
    texts = (tokenizer.decode(t[t != -1].tolist()) for b in batches for t in b.targets)
    return sorted(int(text[1:text.index(";")]) for text in texts if text.startswith("#"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pack", [0, 128])
def test_every_sample_once_over_ranks_and_workers(tokenizer, workers, pack):
    task = Mixture([(Marked("train", 36, image_size=64, chars=(10, 12)), 3), (SynthChat("train", 12), 1)])
    sampler = Sampler(task, tokenizer, MODES["test"], 32, 128, pack=pack)
    batches = [b for rank in range(2) for b in loader(sampler, 4, 0, 6, rank, 2, workers)]
    if not pack:
        assert seen(tokenizer, batches) == list(range(36))
    drawn = Counter()
    for b in batches:
        drawn.update(b.counts)
    assert (drawn["drawn/Marked"], drawn["drawn/SynthChat"], drawn["images"]) == (36, 12, 36)


def hashes(batches):
    return [hash(tuple(t.numpy().tobytes() for t in (b.ids, b.targets, *b.views.values()))) for b in batches]


def test_twenty_stops(sampler):
    """Map-style: nothing but the number of the step is needed. Five samples a batch, on one rank or the second of two."""
    rng = random.Random(0)
    sampler.pack = 160
    for world in (1, 2):
        unbroken = hashes(loader(sampler, 5, 0, 10 // world, world - 1, world))
        for _ in range(10):
            stop = rng.randint(1, 10 // world - 1)
            assert hashes(loader(sampler, 5, stop, 10 // world, world - 1, world, workers=rng.choice([0, 2]))) == unbroken[stop:]


def page_rows(shards):
    """Rows of a streamed set: six to a shard, pictures as bytes."""
    import io
    task = Marked("train", 48, image_size=64, chars=(10, 12))
    for i in (6 * shard + k for shard in shards for k in range(6)):
        c, file = task[i], io.BytesIO()
        c["images"][0].save(file, "PNG")
        yield {"image": {"bytes": file.getvalue(), "path": None}, "text": c["messages"][-1]["content"]}


def to_conversation(row, where):
    return ocr_conversation(row["image"], row["text"], where)


def stream_sampler(tokenizer, window=5, shards=8, chats=True):
    datasets = pytest.importorskip("datasets")
    rows = datasets.IterableDataset.from_generator(page_rows, gen_kwargs={"shards": list(range(shards))})
    stream = Stream(rows, to_conversation, "pages", window)
    return Sampler(Mixture([(stream, 3), (SynthChat("train", 20), 1)]) if chats else stream, tokenizer, MODES["test"], 32, 128)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_a_stream_goes_on_where_it_was(tokenizer, workers, world):
    """Over two epochs and more, in shuffled windows, beside a task with indices; the state travels as JSON."""
    rng = random.Random(0)
    for rank in range(world):
        unbroken = list(loader(stream_sampler(tokenizer), 4, 0, 30, rank, world, workers))
        assert all((b.counts["drawn/pages"], b.counts["drawn/SynthChat"]) == (3, 1) for b in unbroken)
        for stop in rng.sample(range(1, 30), 4):
            states = json.loads(json.dumps({b.state["worker"]: b.state for b in unbroken[:stop]}))
            resumed = list(loader(stream_sampler(tokenizer), 4, stop, 30, rank, world, workers, states=states))
            assert hashes(resumed) == hashes(unbroken[stop:])
            states |= json.loads(json.dumps({b.state["worker"]: b.state for b in resumed[:3]}))  # stopped a second time
            resumed = loader(stream_sampler(tokenizer), 4, min(stop + 3, 30), 30, rank, world, workers, states=states)
            assert hashes(resumed) == hashes(unbroken[stop + 3:])
    with pytest.raises(ValueError, match="--workers=3: a stream goes on with as many workers"):
        loader(stream_sampler(tokenizer), 4, 5, 30, workers=3, states=states)


@pytest.mark.parametrize("world, workers, shards", [(1, 0, 8), (1, 2, 8), (2, 2, 8), (2, 0, 3)])
def test_a_stream_gives_every_row_once_an_epoch(tokenizer, world, workers, shards):
    per_rank = 6 * shards // world // 3
    for first, epochs in ((0, 1), (per_rank, 1), (0, 2)):
        sampler, stop = stream_sampler(tokenizer, 4, shards, chats=False), first + per_rank * epochs
        batches = [b for rank in range(world) for b in list(loader(sampler, 3, 0, stop, rank, world, workers))[first:]]
        assert seen(tokenizer, batches) == sorted(list(range(6 * shards)) * epochs)


def test_a_worker_without_shards_is_named(tokenizer):
    with pytest.raises(ValueError, match="pages has no row for worker 2 of 3 on rank 0 of 1: give --workers no more"):
        list(loader(stream_sampler(tokenizer, shards=2, chats=False), 4, 0, 9, workers=3))


def test_a_streamed_run_resumes(tokenizer_dir, tokenizer, tmp_path, monkeypatch, capsys):
    """The whole loop, packed, with rows that cannot be used: weights and counts of the resumed run are the unbroken one's."""
    stream = stream_sampler(tokenizer).task
    stream.tasks[0].to_conversation = sometimes_bad
    val = SynthDoc("heldout", 100, image_size=64, chars=(10, 12))
    for name, value in {"VAL_PAGES": 16, "STATISTICS_PAGES": 32, "matmul_rate": lambda *args: 1e12}.items():
        monkeypatch.setattr(loop, name, value)
    monkeypatch.setattr(vis_tok_train, "training_sets", lambda *args: (stream, val, val))
    flags = ["--preset=tiny", "--dtype=float32", "--device-type=cpu", "--num-iterations=6", "--device-batch-size=4",
             "--total-batch-size=12", "--save-every=3",
             f"--tokenizer={tokenizer_dir}", f"--checkpoints={tmp_path}", "--pack=256", "--bad-data=skip", "--workers=2"]
    def outcome():
        final = tmp_path / "stage1/model_000006"
        records = [json.loads(line) for line in (tmp_path / "stage1/metrics.jsonl").read_text().splitlines()]
        return [(final / name).read_bytes() for name in ("model.safetensors", "optim_rank0.safetensors")], \
            [{k: v for k, v in r.items() if k.startswith(("data/", "train/loss")) and k != "data/wait"} for r in records]
    vis_tok_train.main(flags)
    unbroken = outcome()
    shutil.rmtree(tmp_path / "stage1/model_000006")
    vis_tok_train.main([*flags, "--resume"])
    assert outcome() == unbroken
    last = unbroken[1][-2]
    assert (last["data/drawn/pages"], last["data/drawn/SynthChat"]) == (54, 18) and 0 < last["data/bad"] < 20 and last["data/padding"] < 0.3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"]["bad"] == last["data/bad"]
    with pytest.raises(BadSample, match=r"pages epoch 0, row \d+ of worker 0 of rank 0: KeyError: 'no such column'"):
        vis_tok_train.main([*flags[:-2], "--model-tag=strict"])


def sometimes_bad(row, where):
    return {}["no such column"] if row["text"].endswith("3;") else to_conversation(row, where)


# -----------------------------------------------------------------------------
# Two processes with mixed data

MIXED = """
import json, sys
from tests.test_dataloader import Marked, seen, stream_sampler
from nanochat import dataloader, loop
from nanochat.common import compute_cleanup, compute_init, dist_info
from nanochat import loop
from nanochat.tokenizer import Tokenizer
from scripts import vis_tok_train
from tasks.synthchat import SynthChat
from tasks.synthdoc import SynthDoc

folder, steps, tokenizer_dir, *flags = sys.argv[1:]
rank = dist_info()[0]
vars(loop).update(VAL_PAGES=16, STATISTICS_PAGES=32, matmul_rate=lambda *args: 1e12)
tokenizer, images, found, moved, models = Tokenizer.load(tokenizer_dir), [], [], [], []

class Blocks(Marked):  # blocks of 8: text, pages, half and half twice
    def __getitem__(self, i):
        page = (i // 8 % 4 == 1) if i // 8 % 4 < 2 else i % 2
        return super().__getitem__(i) if page else SynthChat("train", len(self))[i]

def tasks(args, image_size, pages, ramp):
    val = SynthDoc("heldout", 100, image_size=image_size, chars=(10, 12))
    if args.seed == 7:
        return stream_sampler(tokenizer).task, val, val
    return Blocks("train", 32 * int(steps), image_size=image_size, chars=(10, 12)), val, val

loaded = dataloader.loader
def watched(*args, **kwargs):
    for batch in loaded(*args, **kwargs):
        images.append(batch.images)
        moved.append(bool(models[0].encoder.standardize.mean.any()))
        found.extend(seen(tokenizer, [batch]))
        yield batch

def optimizer(model, *args, **kwargs):
    models.append(model)
    return Optimizer(model, *args, **kwargs)
Optimizer, loop.Optimizer = loop.Optimizer, optimizer
vis_tok_train.training_sets, loop.loader = tasks, watched
vis_tok_train.main(["--preset=tiny", "--dtype=float32", "--device-type=cpu", f"--num-iterations={steps}", "--device-batch-size=8",
                    "--total-batch-size=32", "--eval-every=-1", f"--tokenizer={tokenizer_dir}", f"--checkpoints={folder}", *flags])
with open(f"{folder}/seen{rank}.json", "w") as f:
    json.dump([found, images, moved], f)
"""


def two_processes(tmp_path, tokenizer_dir, steps, *flags):
    root = Path(__file__).parents[1]
    (tmp_path / "mixed.py").write_text(MIXED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "mixed.py"),
               str(tmp_path), str(steps), str(tokenizer_dir), *flags]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in range(2)], json.loads(process.stdout.splitlines()[-1])


def test_text_and_images_mix_on_two_processes(tmp_path, tokenizer_dir, steps=int(os.environ.get("MIXED_STEPS", 4))):
    """MIXED_STEPS=200 for the long run. In each step's first pass one rank has text alone, the other pages alone."""
    ranks, summary = two_processes(tmp_path, tokenizer_dir, steps, "--workers=2", "--save-every=-1", "--model-tag=mixed")
    (first, images, moved), (second, others, moved_too) = ranks
    assert images == [0, 4] * steps and others == [8, 4] * steps
    assert not any(moved), "the blank page of a pass without images left a trace in the running statistics"
    assert not any(moved_too[:2]) and all(moved_too[2:])  # it was looked at before each pass, two passes a step
    assert sorted(first + second) == [i for i in range(32 * steps) if i // 8 % 4 == 1 or (i // 8 % 4 > 1 and i % 2)]
    assert summary["steps"] == steps and summary["data"]["drawn/Blocks"] == 32 * steps
