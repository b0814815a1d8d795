"""
Proves that the local reading loss asks each cell for the character that stands there, on plain,
tiled and skewed pages; that it is the same mean however a step is cut into micro-batches and ranks,
with unlabeled sets mixed in; that it can be learned; that a resumed run equals the unbroken one;
and that it leaves no trace in the saved model.

    python -m pytest tests/test_local_loss.py
"""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nanochat import config
from nanochat.batch import IGNORE, collate
from nanochat.conversation import ocr_conversation
from nanochat.dataloader import Sampler
from nanochat.image_modes import MODES, Mode
from nanochat.heads import LABELS, WithHeads, loss_weights, make_heads
from nanochat.local_loss import (
    CLASS_OF, EMPTY, INK, NONE, LocalHead, cells_of, count_cells, local_accuracy)
from nanochat.loop import train_step, wrap_model
from nanochat.model import DeepseekOCR
from nanochat.optim import Optimizer
from scripts import vis_tok_train
from tasks.page import Box, Line, Page, render, scan
from tasks.synthdoc import SynthDoc
from tasks.synthpage import SynthPage

STRIDE = 32  # px of a token in the tiny preset: 8 x 4 cells of 4 x 8 px


@pytest.fixture
def make_labeled_batch(tokenizer):
    """A function (conversations, mode) -> Batch with the labels of its pages."""
    def make(conversations, mode=MODES["64px"]):
        sampler = Sampler(conversations, tokenizer, mode, STRIDE, max_tokens=2000, labels=LABELS)
        return collate([sampler[i] for i in range(len(conversations))])
    return make


def without_labels(conversation):
    return {key: value for key, value in conversation.items() if key != "labels"}


def laid_out(classes, cells):
    """CellTargets.classes (n, h * h, R * S) -> (n, h * R, h * S), as they lie on the views."""
    n, tokens, _ = classes.shape
    h = int(tokens ** 0.5)
    rows, columns = cells
    classes = classes.reshape(n, h, h, rows, columns).transpose(0, 1, 3, 2, 4)
    return classes.reshape(n, h * rows, h * columns)


# -----------------------------------------------------------------------------
# What is asked

def spread_page(placed, side):
    """A Page with single characters of 10 px, (character, x, y) of each one's top left corner."""
    boxes = []
    for k, (char, x, y) in enumerate(placed):
        line = Line(x, y, "sans", 10, char)
        boxes.append(Box("text_block", char, k, (x, y, x + 14, y + 14), [line]))
    return Page(side, side, boxes, "sans", 10, ink=0, paper=255)


def test_every_glyph_is_asked_for_in_its_own_cell(make_labeled_batch):
    placed = []
    for k, char in enumerate("AgM~!;Wx0"):
        placed.append((char, 2 + 20 * (k % 3), 2 + 20 * (k // 3)))
    page = spread_page(placed, side=64)
    image, glyphs = render(page)
    conversation = ocr_conversation(image, "text", "id", labels=[{"glyphs": glyphs}])
    cells = cells_of(STRIDE)
    assert cells == (4, 8)
    head = LocalHead(8, STRIDE)
    views, classes = head.targets(make_labeled_batch([conversation]))[64]
    assert views == [0]

    # Rendering leaves each box as tight as its ink: the cell of its center, counted in px.
    expected = np.full((8, 16), NONE)
    for box in page.boxes:
        left, top, right, bottom = box.bbox
        row = int((top + bottom) / 2 / 8)
        column = int((left + right) / 2 / 4)
        expected[row, column] = ord(box.text) - 31
    assert (laid_out(classes, cells)[0] == expected).all()
    assert count_cells(head.targets(make_labeled_batch([conversation]))) == (9, 8 * 16 - 9)


def test_every_cell_of_a_page(make_labeled_batch):
    """A label in the middle of each cell, and at its corners: the token and cell that answer."""
    chars = list(CLASS_OF)[1:]  # a space is never printed
    for dx, dy in ((2, 4), (0, 0), (3.99, 7.99)):
        labels = []
        expected = np.zeros((8, 16), int)
        for k in range(8 * 16):
            row, column = divmod(k, 16)
            char = chars[k % len(chars)]
            labels.append((char, 4 * column + dx, 8 * row + dy))
            expected[row, column] = CLASS_OF[char]
        page = ocr_conversation(Image.new("L", (64, 64)), "text", "id", labels=[{"glyphs": labels}])
        head = LocalHead(8, STRIDE)
        _, classes = head.targets(make_labeled_batch([page]))[64]
        assert (laid_out(classes, head.cells)[0] == expected).all()
        # Row-major: token 1 is the second of the first row, and its cell 8 begins the second line.
        assert classes[0, 1, 8] == expected[1, 8]


def test_shared_cells_and_unknown_characters(make_labeled_batch):
    labels = [("b", 1, 1), ("a", 2, 2), ("é", 9, 9), ("x", 63, 63), ("ab", 30, 30)]
    page = ocr_conversation(Image.new("L", (64, 64)), "text", "id", labels=[{"glyphs": labels}])
    head = LocalHead(8, STRIDE)
    targets = head.targets(make_labeled_batch([page]))
    classes = laid_out(targets[64].classes, head.cells)[0]
    assert classes[0, 0] == CLASS_OF["b"]  # the first in reading order
    assert classes[1, 2] == classes[3, 7] == IGNORE  # neither a class nor empty
    assert classes[7, 15] == CLASS_OF["x"]
    assert count_cells(targets) == (2, 8 * 16 - 4)


@pytest.mark.parametrize("stride, cells", [(16, (2, 4)), (32, (4, 8)), (64, (8, 16)), (4, (1, 1))])
def test_cells_of_a_token(stride, cells):
    assert cells_of(stride) == cells
    head = LocalHead(8, stride, cells=(3, 5))  # any other number may be asked for
    assert head(torch.zeros(2, 4, 8)).shape == (2, 4, 15, 96)


def test_classes_are_the_printable_characters():
    assert len(CLASS_OF) == 95 and sorted(CLASS_OF.values()) == list(range(1, 96))
    assert "".join(CLASS_OF) == "".join(map(chr, range(32, 127)))


@pytest.mark.parametrize("size, tiles", [((128, 64), 2), ((60, 130), 2), ((64, 64), 0)])
def test_tiles_and_global_view(make_labeled_batch, size, tiles):
    """Each view is asked for what it shows: red marks lie in exactly the cells with a character."""
    mode = Mode("toy", 128, tile=64, max_tiles=4)
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    labels = []
    for char, across, down in (("a", 0.2, 0.3), ("b", 0.7, 0.6), ("c", 0.8, 0.2)):
        x = int(across * width)
        y = int(down * height)
        pixels[y - 3:y + 4, x - 3:x + 4, 0] = 255
        labels.append((char, x + 0.5, y + 0.5))
    page = ocr_conversation(Image.fromarray(pixels), "text", "id", labels=[{"glyphs": labels}])
    batch = make_labeled_batch([page, without_labels(page), page], mode)
    assert batch.plans[0].tiles == tiles
    head = LocalHead(8, STRIDE)
    targets = head.targets(batch)
    assert count_cells(targets)[0] == 2 * 3 * (2 if tiles else 1)
    for side, (views, classes) in targets.items():
        shown = laid_out(classes, head.cells)
        for view, of_view in zip(views, shown):
            for row, column in np.argwhere(of_view > NONE):
                cell = batch.views[side][view, 0, 8 * row:8 * row + 8, 4 * column:4 * column + 4]
                assert cell.max() > 200


def quarter(array, top, left, height, width):
    return array[top:top + height, left:left + width]


def middle_of(ink):
    """(y, x) of the middle of the box around what is True."""
    rows, columns = np.nonzero(ink)
    return (rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2


def test_a_skewed_page_is_asked_where_its_ink_is(make_labeled_batch):
    """Found from the picture alone: the middle of the ink in each corner of a turned page."""
    page = spread_page([("H", 40, 40), ("o", 440, 40), ("x", 40, 440), ("M", 440, 440)], side=512)
    image, glyphs = scan(page, {"skew": 1}, "name")
    assert abs(page.skew) > 0.01
    conversation = ocr_conversation(image, "text", "id", labels=[{"glyphs": glyphs}])
    head = LocalHead(8, STRIDE)
    batch = make_labeled_batch([conversation], MODES["512px"])
    _, classes = head.targets(batch)[512]
    asked = laid_out(classes, head.cells)[0]  # (64, 128)

    ink = np.asarray(image) < 100
    found = []
    for top in (0, 256):
        for left in (0, 256):
            (row, column), = np.argwhere(quarter(asked, top // 8, left // 4, 32, 64) > NONE)
            y, x = middle_of(quarter(ink, top, left, 256, 256))
            assert abs(8 * row + 4 - y) <= 4 + 1  # half a cell, and a px for blurred edges
            assert abs(4 * column + 2 - x) <= 2 + 1
            found.append(asked[top // 8 + row, left // 4 + column])
    assert found == [CLASS_OF[char] for char in "HoxM"]
    # On the straight page they are elsewhere, so that the test can tell.
    straight, _ = render(page)
    y_straight, _ = middle_of(quarter(np.asarray(straight) < 100, 0, 0, 256, 256))
    y_turned, _ = middle_of(quarter(ink, 0, 0, 256, 256))
    assert abs(y_straight - y_turned) > 3


def test_whole_pages_with_damage(make_labeled_batch):
    """Titles, columns, tables and every kind of damage: letters are counted once each."""
    task = SynthPage("train", 4, 512, chars=(200, 400), damage=0.5)
    batch = make_labeled_batch(list(task), MODES["512px"])
    head = LocalHead(8, STRIDE)
    n_ink, n_empty = count_cells(head.targets(batch))
    n_labels = sum(len(page["labels"][0]["glyphs"]) for page in task)
    assert 0.8 * n_labels < n_ink <= n_labels
    assert n_ink + n_empty == 4 * (512 // 8) * (512 // 4)


# -----------------------------------------------------------------------------
# The loss

def both_means(model, head, batch):
    """The two losses by a plain sum over cells."""
    sums = {INK: [], EMPTY: []}
    for side, (views, classes) in head.targets(batch).items():
        log_p = head(model.features(batch.views[side])).log_softmax(-1)
        for k, view in enumerate(views):
            for token, cell in np.ndindex(classes.shape[1:]):
                wanted = classes[k, token, cell]
                if wanted != IGNORE:
                    name = INK if wanted > NONE else EMPTY
                    sums[name].append(-log_p[view, token, cell, wanted])
    return {name: torch.stack(terms).mean().item() for name, terms in sums.items()}


@pytest.fixture
def learner(model):
    """The tiny model, whose head starts at random: from zero all answers are alike."""
    heads = make_heads(model, 1.0, 0.0)
    torch.manual_seed(0)
    torch.nn.init.normal_(heads["local"].linear.weight, std=0.1)
    return WithHeads(model, heads)


def test_losses_are_means_over_letters_and_over_empty_cells(learner, make_labeled_batch, pages,
                                                            chats):
    learner.eval()
    batch = make_labeled_batch([pages[0], chats[0], without_labels(pages[1]), pages[2]])
    losses = learner(batch)
    counts = learner.loss_counts(batch)
    assert list(losses) == list(counts) == ["text", INK, EMPTY]
    means = {}
    for name, (nats, count) in losses.items():
        assert count == counts[name]
        means[name] = nats.item() / count
    expected = both_means(learner.model, learner.heads["local"], batch)
    assert {INK: means[INK], EMPTY: means[EMPTY]} == pytest.approx(expected, rel=1e-4)
    n_letters = sum(len(pages[i]["labels"][0]["glyphs"]) for i in (0, 2))
    assert 0.8 * n_letters < counts[INK] <= n_letters  # a few share a cell
    assert counts[INK] + counts[EMPTY] == 2 * 8 * 16
    # The text loss is what it is without the head, and nothing else is known of unlabeled pages.
    text = learner.model(batch)["text"][0].item()
    assert losses["text"][0].item() == text
    other = make_labeled_batch([pages[0], chats[0], without_labels(pages[5]), pages[2]])
    assert learner(other)[INK][0].item() == losses[INK][0].item()


def test_both_the_head_and_the_encoder_learn_from_it(learner, make_labeled_batch, pages):
    learner.train()
    losses = learner(make_labeled_batch(pages[:8]))
    for name in (INK, EMPTY):
        learner.zero_grad()
        losses[name][0].backward(retain_graph=True)
        for parameter, p in learner.named_parameters():
            wanted = parameter.startswith(("model.encoder.", "heads."))
            has_gradient = p.grad is not None and p.grad.abs().sum() > 0
            assert has_gradient == wanted, parameter


def test_a_frozen_sam_stays_and_the_second_stage_learns(learner, make_labeled_batch, pages):
    """Stage 2."""
    learner.train().model.freeze(["sam", "compressor"])
    learner(make_labeled_batch(pages[:8]))[INK][0].backward()
    for parameter, p in learner.named_parameters():
        wanted = parameter.startswith(("model.encoder.vision_model.", "heads."))
        has_gradient = p.grad is not None and p.grad.abs().sum() > 0
        assert has_gradient == wanted, parameter


def step_of(learner, batches, accumulate, weights, steps=1):
    """Trains in place. -> the last StepResult, and the parameters."""
    optimizer = Optimizer(learner.model, "adamw", lr=1e-2, heads=learner.heads)
    batches = iter(batches)
    for step in range(steps):
        result = train_step(step, learner, optimizer, batches, accumulate, 1.0, 1.0, ["images"],
                            weights)
    return result, {name: p.detach().clone() for name, p in learner.named_parameters()}


def test_a_step_is_the_same_in_any_number_of_passes(cfg, make_model, make_labeled_batch, pages,
                                                    chats):
    """Of three passes one has unlabeled pages alone, one no page at all."""
    conversations = [pages[0], pages[1], without_labels(pages[2]), without_labels(pages[3]),
                     chats[0], chats[1]]
    found = []
    for size in (6, 2):
        model = make_model().train()
        learner = WithHeads(model, make_heads(model, 2.0, 0.0))
        batches = []
        for first in range(0, 6, size):
            batches.append(make_labeled_batch(conversations[first:first + size]))
        assert len(batches) == 6 // size
        found.append(step_of(learner, batches, len(batches), loss_weights(2.0, 0.0)))
    (one, in_one), (three, in_three) = found
    assert one.losses == pytest.approx(three.losses, rel=1e-5)
    assert list(one.losses) == ["text", INK, EMPTY]
    assert one.losses[INK] == pytest.approx(np.log(96), rel=1e-5)  # a fresh head: all alike
    assert one.grad_norm == pytest.approx(three.grad_norm, rel=1e-4)
    for name in ("heads.local.linear.weight", "model.encoder.sam_model.net_3.weight"):
        # AdamW's first step is of one size, in a direction settled by rounding near zero.
        gap = (in_one[name] - in_three[name]).abs().mean()
        assert gap < 1e-4, name


def test_a_step_without_labels(learner, make_labeled_batch, pages, chats):
    """The head's gradient is zero and not missing: DDP would wait for it."""
    unlabeled = make_labeled_batch([without_labels(pages[0]), without_labels(pages[1])])
    text = make_labeled_batch(chats[:2])
    for batch in (unlabeled, text):
        learner.zero_grad()
        losses = learner(batch)
        assert losses[INK] == (0, 0) and losses[EMPTY] == (0, 0)
        sum(nats for nats, _ in losses.values()).backward()
        for p in learner.parameters():
            assert p.grad is not None
        assert not any(p.grad.any() for p in learner.heads.parameters())
    result, _ = step_of(learner, [unlabeled, text], 2, loss_weights(1.0, 0.0))
    assert list(result.losses) == ["text"]  # no mean of nothing is logged


def steps_on_a_rank(rank, world, seed_model, batches, folder):
    """Trains on this rank's share of the micro-batches, two to a step over all ranks."""
    model = seed_model().train()
    heads = make_heads(model, 1.0, 0.0)
    optimizer = Optimizer(model, "muon", lr=3e-3, heads=heads)
    net = wrap_model(model, compiled=False, heads=heads)
    own = iter(batches[rank::world])
    losses = []
    for step in range(len(batches) // 2):
        result = train_step(step, net, optimizer, own, 2 // world, 1.0, 1.0, ["images"],
                            loss_weights(1.0, 0.0))
        losses.append(result.losses)
    torch.save([losses, heads.state_dict()], folder / f"{rank}_of_{world}")


def test_two_ranks_equal_two_passes(make_model, make_labeled_batch, pages, chats, tmp_path,
                                    run_ranks):
    """Micro-batches with labels, without, and without a page: a rank often has none at all."""
    labeled = make_labeled_batch(pages[:3])
    more = make_labeled_batch([pages[5], without_labels(pages[6])])
    unlabeled = make_labeled_batch([without_labels(page) for page in pages[3:5]])
    text = make_labeled_batch(chats[:2])
    batches = [labeled, text, text, more, unlabeled, text, labeled, more]
    for world in (2, 1):
        run_ranks(world, steps_on_a_rank, make_model, batches, tmp_path)

    one, head = torch.load(tmp_path / "0_of_1")
    names = [list(losses) for losses in one]
    assert names == [["text", INK, EMPTY], ["text", INK, EMPTY], ["text"], ["text", INK, EMPTY]]
    for rank in (0, 1):
        two, their_head = torch.load(tmp_path / f"{rank}_of_2")
        for losses, expected in zip(two, one, strict=True):
            assert losses == pytest.approx(expected, rel=1e-4)
        for name in head:
            assert (their_head[name] - head[name]).abs().mean() < 1e-4, name


def test_it_is_learned_and_the_gauge_sees_it(cfg, make_model, make_labeled_batch, pages):
    model = make_model().train()
    learner = WithHeads(model, make_heads(model, 1.0, 0.0))
    batch = make_labeled_batch(pages)
    before = local_accuracy(model, learner.heads["local"], [batch])
    first, _ = step_of(learner, [batch], 1, loss_weights(1.0, 0.0))
    last, _ = step_of(learner, [batch] * 80, 1, loss_weights(1.0, 0.0), steps=80)
    assert before < 0.05
    assert last.losses[INK] < 0.3 * first.losses[INK]
    assert last.losses[EMPTY] < 0.3 * first.losses[EMPTY]
    assert local_accuracy(model, learner.heads["local"], [batch]) > 0.8
    assert local_accuracy(model, learner.heads["local"], [make_labeled_batch(pages[:3]), batch]) > 0.8


def test_the_gauge_without_labels(learner, make_labeled_batch, pages):
    batch = make_labeled_batch([without_labels(page) for page in pages])
    assert local_accuracy(learner.model, learner.heads["local"], [batch]) is None


# -----------------------------------------------------------------------------
# Settings

def test_off_is_off(model):
    assert make_heads(model, 0.0, 0.0) is None
    assert loss_weights(0.0, 0.0) == {"text": 1.0}
    assert loss_weights(2.0, 0.0) == {"text": 1.0, INK: 2.0, EMPTY: 1.0}
    with pytest.raises(ValueError, match="--local-loss=-1, .* must be 0"):
        make_heads(model, -1, 0.0)


def test_a_sequence_of_tokens_has_no_cells(model, monkeypatch):
    monkeypatch.setattr(model.encoder, "layout", "sequence")
    with pytest.raises(ValueError, match="the second stage clip gives a sequence"):
        make_heads(model, 1.0, 0.0)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_head_is_adamws_at_lr_and_no_part_of_the_model(model, kind):
    names = list(model.state_dict())
    n_params = model.num_params()
    heads = make_heads(model, 1.0, 0.0)
    head = heads["local"]
    optimizer = Optimizer(model, kind, lr=1e-3, part_lrs={"sam": 1e-5, "head": 1e-5},
                          heads=heads)
    for inner in optimizer.optimizers:
        for group in inner.param_groups:
            for p in group["params"]:
                if p is head.linear.weight or p is head.linear.bias:
                    assert type(inner).__name__ == "AdamW" and group["lr"] == 1e-3
    assert optimizer.num_params() == n_params == model.num_params()
    assert len(optimizer.params) == len(list(model.parameters())) + 2
    assert list(model.state_dict()) == names


def test_the_state_of_another_head_is_refused(model):
    state = Optimizer(model, "muon", lr=1e-3, heads=make_heads(model, 1.0, 0.0)).state_tensors()
    assert set(state) == {"heads.local.linear.weight", "heads.local.linear.bias"}  # no step yet
    other = torch.nn.ModuleDict({"local": LocalHead(model.encoder.width, STRIDE, cells=(1, 1))})
    for heads, tensors in ((other, state), (make_heads(model, 1.0, 0.0), {})):
        optimizer = Optimizer(model, "muon", lr=1e-3, heads=heads)
        with pytest.raises(ValueError, match="lacks heads.local.linear.weight of shape"):
            optimizer.load_state_tensors(tensors)


# -----------------------------------------------------------------------------
# Whole runs

@pytest.fixture
def unlabeled_folder(tmp_path):
    """Pages of one's own, which have no labels."""
    folder = tmp_path / "pages"
    folder.mkdir()
    for i, page in enumerate(SynthDoc("train", 12, image_size=64, chars=(10, 12))):
        page["images"][0].save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(page["messages"][-1]["content"])
    return folder


@pytest.fixture
def flags(tokenizer_dir, tmp_path, unlabeled_folder):
    return ["--preset=tiny", "--dtype=float32", "--device-type=cpu", "--chars=10-12",
            f"--tokenizer={tokenizer_dir}", f"--checkpoints={tmp_path}", "--local-loss=1",
            f"--data=synthdoc=2,folder:{unlabeled_folder}=1,synthchat=1", "--num-iterations=6",
            "--device-batch-size=2", "--total-batch-size=8", "--eval-pages=4"]


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def column(run_dir, name):
    return [record[name] for record in records(run_dir) if name in record]


def test_a_resumed_run_equals_the_unbroken_one(flags, tmp_path, capsys):
    flags = [*flags, "--eval-every=3", "--save-every=3"]
    run_dir = tmp_path / "stage1"
    final = run_dir / "model_000006"

    def outcome():
        files = {path.name: path.read_bytes() for path in final.iterdir()
                 if path.name in ("model.safetensors", "optim.safetensors", "config.json")}
        names = ("train/loss", "train/loss_local", "train/loss_local_empty", "train/grad_norm",
                 "val/loss", "vision/local_accuracy")
        return files, {name: column(run_dir, name) for name in names}

    vis_tok_train.main(flags)
    unbroken = outcome()
    lines = capsys.readouterr().out.splitlines()
    shutil.rmtree(final)
    vis_tok_train.main([*flags, "--resume"])
    assert outcome() == unbroken

    # What it leaves, beside the head's state: the gauges, and a model as any other.
    summary = json.loads(lines[-1])
    assert sum("| local accuracy 0." in line for line in lines) == 3
    assert len(unbroken[1]["vision/local_accuracy"]) == 3
    assert summary["vision/local_accuracy"] == unbroken[1]["vision/local_accuracy"][-1]
    saved = load_file(final / "model.safetensors")
    with torch.device("meta"):
        cfg = config.ModelConfig.from_dict(json.loads((final / "config.json").read_text()))
        assert set(saved) == set(DeepseekOCR(cfg).state_dict())
    state = load_file(final / "optim.safetensors")
    of_the_head = {name for name in state if name.startswith("heads.")}
    assert of_the_head >= {"heads.local.linear.weight", "heads.local.linear.weight.exp_avg_sq"}
    assert state["heads.local.linear.weight"].abs().max() > 0


def test_a_loss_that_no_page_can_be_asked_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--local-loss=1.0 has no effect on folder:x: only synthdoc"):
        vis_tok_train.parse_args(["--data=folder:x", "--local-loss=1"])
    args = vis_tok_train.parse_args(["--data=folder:x"])
    assert args.local_loss == args.place_loss == 0
