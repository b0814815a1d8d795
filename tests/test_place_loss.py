"""
Proves that the place loss asks for the vision token and the cell in which the next character is
printed, on plain and tiled pages, padded and packed rows; that it leaves out what it does not know;
that the decoder learns from it; and that a resumed run equals the unbroken one.

    python -m pytest tests/test_place_loss.py
"""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.batch import IGNORE, NO_GLYPH, collate
from nanochat.conversation import ocr_conversation
from nanochat.dataloader import Sampler
from nanochat.heads import LABELS, WithHeads, loss_weights, make_heads
from nanochat.image_modes import MODES, Mode
from nanochat.loop import train_step
from nanochat.optim import Optimizer
from nanochat.place_loss import CELL, TOKEN, PlaceHead, place_accuracy, places
from scripts import vis_tok_train
from tasks.synthdoc import SynthDoc
from tasks.synthpage import TEXT, SynthPage

STRIDE = 32  # px of a token in the tiny preset: 8 x 4 cells of 4 x 8 px
CELLS = (4, 8)


@pytest.fixture
def make_labeled_batch(tokenizer):
    """A function (conversations, mode) -> Batch with the labels of its pages."""
    def make(conversations, mode=MODES["64px"], pack=0):
        sampler = Sampler(conversations, tokenizer, mode, STRIDE, max_tokens=pack or 2000,
                          labels=LABELS, pack=pack)
        return collate([sampler[i] for i in range(len(conversations))], pack=pack, max_images=9)
    return make


def asked_for(batch):
    """[(token about to be written, image, row, column of the cell on its page of cells), ...]"""
    T = batch.ids.size(1)
    found = []
    for asked in places(batch, CELLS):
        for i, column in np.argwhere(asked.tokens != IGNORE):
            at = asked.queries[i, column]
            token = batch.targets.flatten()[at].item()
            shown_at = asked.keys[i, asked.tokens[i, column]]
            assert shown_at // T == at // T, "the image of another row"
            first = asked.keys[i, 0]
            found.append((token, batch.image_at.index(first), shown_at - first,
                          asked.rows[i, column], asked.columns[i, column]))
    return found


def marked_page(text, size, places_of_characters):
    labels = []
    for char, (x, y) in zip("".join(text.split()), places_of_characters, strict=True):
        labels.append((char, x, y))
    return ocr_conversation(Image.new("L", size), text, "id", labels=[{"glyphs": labels}])


@pytest.mark.parametrize("pack", [0, 400])
def test_the_place_of_each_character(make_labeled_batch, tokenizer, pack, chats):
    """The n-th character of each page stands in another corner; whitespace stands nowhere."""
    corners = [(1, 1), (33, 1), (62, 30), (3.9, 63.9)]
    pages = []
    for k, text in enumerate(("Q~7 \n|", "{ }^Z")):  # too rare to be merged
        pages.append(marked_page(text, (64, 64), corners[k:] + corners[:k]))
    batch = make_labeled_batch([pages[0], chats[0], pages[1]], pack=pack)
    placeholders = (batch.ids == tokenizer.image_token_id).flatten().nonzero()[:, 0].tolist()
    assert set(batch.image_at) <= set(placeholders)
    # A row of the page of tokens is 2 tokens and a newline.
    expected_corner = {(1, 1): (0, 0, 0), (33, 1): (1, 0, 0), (62, 30): (1, 3, 7),
                       (3.9, 63.9): (3, 3, 0)}
    expected = []
    for page in pages:
        for char, x, y in page["labels"][0]["glyphs"]:
            [token] = tokenizer.encode(char)
            expected.append((token, *expected_corner[x, y]))
    found = [(token, *place) for token, _, *place in asked_for(batch)]
    assert sorted(found) == sorted(expected)
    images = {token: image for token, image, *_ in asked_for(batch)}
    assert images[tokenizer.encode("Q")[0]] != images[tokenizer.encode("{")[0]]


def test_rendered_pages_are_asked_for_every_token(make_labeled_batch, tokenizer, pages):
    batch = make_labeled_batch(pages[:4])
    targets = batch.targets.flatten()
    for asked in places(batch, CELLS):
        for i, said in enumerate(asked.queries):
            written_at = said[asked.tokens[i] != IGNORE]
            written = tokenizer.decode(targets[written_at].tolist())
            truth = pages[i]["messages"][-1]["content"]
            assert "".join(written.split()) == "".join(truth.split())


@pytest.mark.parametrize("size, tiles", [((128, 64), 2), ((64, 128), 2), ((64, 64), 0)])
def test_a_tiled_page_is_looked_at_on_its_tiles(make_labeled_batch, size, tiles):
    mode = Mode("toy", 128, tile=64, max_tiles=4)
    width, height = size
    fractions = ((0.05, 0.1), (0.9, 0.1), (0.45, 0.9))
    points = [(x * width, y * height) for x, y in fractions]
    batch = make_labeled_batch([marked_page("abc", size, points)] * 2, mode)
    assert batch.plans[0].tiles == tiles
    [asked] = places(batch, CELLS)
    across = {2: width // 32, 0: 4}[tiles]
    down = {2: height // 32, 0: 4}[tiles]
    for n, (x, y) in enumerate(fractions):
        row = int(y * down)
        column = int(x * across)
        assert (asked.tokens[:, n] == row * (across + 1) + column).all()


def test_what_is_not_known_is_not_asked(make_labeled_batch, pages, chats):
    plain = {key: value for key, value in pages[0].items() if key != "labels"}
    cut = marked_page("abcd", (64, 64), [(1, 1)] * 4)
    cut["labels"] = [{"glyphs": cut["labels"][0]["glyphs"][:3]}]  # one letter is off the page
    batch = make_labeled_batch([plain, cut, chats[0]])
    assert places(batch, CELLS) == [] and len(batch.image_at) == 2
    assert batch.counts["no_places"] == 1  # of the page whose letters are known, but one
    known = make_labeled_batch([plain, pages[1]])
    assert list(known.said) == [1]
    # Beside the wrong page, the truth about it is not known.
    assert make_labeled_batch(pages[:2]).deranged().said == {}


def test_letters_around_the_text_are_left_out(make_labeled_batch, tokenizer):
    """Whole pages have headers and page numbers, which are printed but not part of the answer."""
    pages = SynthPage("train", 12, 640, chars=(40, 200), parts=TEXT, kinds=("text",), seed=0)
    longer = 0
    for page in pages:
        batch = make_labeled_batch([page], MODES["64px"])
        answer = "".join(page["messages"][-1]["content"].split())
        longer += len(page["labels"][0]["glyphs"]) > len(answer)
        [(at, glyphs)] = batch.said.values()
        first_of_the_answer = len(page["labels"][0]["glyphs"]) - len(answer)
        assert glyphs[0] == first_of_the_answer and (np.diff(glyphs) > 0).all()
    assert longer > 2


def test_a_character_of_several_tokens_is_one_glyph(make_labeled_batch, tokenizer):
    text = "a\u2022\u00e9b"
    assert len(tokenizer.encode(text)) > 4
    batch = make_labeled_batch([marked_page(text, (64, 64), [(1, 1), (20, 1), (40, 1), (60, 1)])])
    [(at, glyphs)] = batch.said.values()
    assert glyphs.tolist() == [0, 1, 2, 3]
    first_bytes = [tokenizer.decode_bytes([t]) for t in batch.targets.flatten()[at].tolist()]
    assert [b[0] for b in first_bytes] == [c.encode()[0] for c in text]


def test_clipped_text_is_asked_for_as_far_as_it_goes(tokenizer, pages):
    sampler = Sampler(pages, tokenizer, MODES["64px"], STRIDE, max_tokens=2000, labels=LABELS)
    whole = sampler[0]
    sampler = Sampler(pages, tokenizer, MODES["64px"], STRIDE, max_tokens=len(whole.ids) - 6,
                      too_long="clip", labels=LABELS)
    clipped = sampler[0]
    assert clipped.glyphs == whole.glyphs[:len(clipped.ids)]
    assert any(glyph != NO_GLYPH for glyph in clipped.glyphs)
    collate([clipped])


# -----------------------------------------------------------------------------
# The loss

@pytest.fixture
def learner(model):
    return WithHeads(model, make_heads(model, 0.0, 1.0))


def test_a_fresh_head_knows_nothing(learner, make_labeled_batch, pages, chats):
    batch = make_labeled_batch([pages[0], chats[0], pages[1]])
    losses = learner(batch)
    counts = learner.loss_counts(batch)
    assert list(losses) == list(counts) == ["text", TOKEN, CELL]
    means = {}
    for name, (total, count) in losses.items():
        assert count == counts[name]
        means[name] = total.item() / count
    # 2 x 2 tokens, a newline after each row and the separator; 4 rows and 8 columns of cells
    assert means[TOKEN] == pytest.approx(np.log(7), rel=1e-5)
    assert means[CELL] == pytest.approx(np.log(4 * 8), rel=1e-5)
    assert losses["text"][0].item() == learner.model(batch)["text"][0].item()


def test_all_but_the_last_block_learns_from_it(learner, make_labeled_batch, pages):
    torch.nn.init.normal_(learner.heads["place"].key.weight)
    for block in learner.model.gpt.transformer.h:  # a fresh block gives nothing
        torch.nn.init.normal_(block.attn.c_proj.weight)
    learner(make_labeled_batch(pages[:4]))[TOKEN][0].backward()
    last = f"gpt.transformer.h.{learner.model.cfg.gpt.n_layer - 1}."
    for name, p in learner.model.named_parameters():
        learns = p.grad is not None and bool(p.grad.abs().sum() > 0)
        if name.startswith((last, "gpt.lm_head")):
            assert not learns, name
        elif name.endswith(("c_q.weight", "projector.layers.weight", "net_3.weight")):
            assert learns, name


def test_without_labels_the_head_still_has_a_gradient(learner, make_labeled_batch, chats):
    losses = learner(make_labeled_batch(chats[:2]))
    assert losses[TOKEN][0].item() == losses[CELL][0].item() == 0
    (losses["text"][0] + losses[TOKEN][0] + losses[CELL][0]).backward()
    for p in learner.heads.parameters():
        assert p.grad is not None and not p.grad.abs().any()


def test_places_are_learned(make_model, make_labeled_batch):
    """Four pages by heart, in a few steps; the gauge says so, and the text is learned beside it."""
    model = make_model().train()
    learner = WithHeads(model, make_heads(model, 0.0, 1.0))
    batch = make_labeled_batch(list(SynthDoc("train", 4, image_size=64, chars=(10, 12))))
    optimizer = Optimizer(model, "muon", lr=3e-3, heads=learner.heads)
    before = place_accuracy(model, learner.heads["place"], [batch])
    batches = iter([batch] * 60)
    for step in range(60):
        result = train_step(step, learner, optimizer, batches, 1, 1.0, 1.0, ["images"],
                            loss_weights(0.0, 1.0))
    after = place_accuracy(model, learner.heads["place"], [batch])
    assert before < 0.5 and after > 0.95
    assert result.losses[TOKEN] < 0.3
    assert place_accuracy(model, learner.heads["place"], [batch.deranged()]) is None


def test_settings(model):
    assert make_heads(model, 0.0, 0.0) is None
    assert set(make_heads(model, 1.0, 0.3)) == {"local", "place"}
    assert loss_weights(0.0, 0.3) == {"text": 1.0, TOKEN: 0.3, CELL: 0.3}
    with pytest.raises(ValueError, match="--place-loss=-1: must be 0"):
        make_heads(model, 0.0, -1)
    # The head draws its weights after the model: everything else starts as it would without.
    assert isinstance(make_heads(model, 0.0, 1.0)["place"], PlaceHead)


def test_a_resumed_run_equals_the_unbroken_one(tokenizer_dir, tmp_path, capsys):
    flags = ["--preset=tiny", "--dtype=float32", "--device-type=cpu", "--chars=10-12",
             f"--tokenizer={tokenizer_dir}", f"--checkpoints={tmp_path}", "--local-loss=1",
             "--place-loss=0.3", "--data=synthdoc=2,synthchat=1", "--num-iterations=6",
             "--device-batch-size=2", "--total-batch-size=8", "--eval-pages=4",
             "--eval-every=3", "--save-every=3"]
    final = tmp_path / "stage1" / "model_000006"

    def outcome():
        files = {path.name: path.read_bytes() for path in final.iterdir()
                 if path.suffix == ".safetensors"}
        metrics = (tmp_path / "stage1" / "metrics.jsonl").read_text().splitlines()
        names = ("train/loss_place", "train/loss_place_cell", "vision/place_accuracy")
        records = [json.loads(line) for line in metrics]
        return files, [[record[name] for record in records if name in record] for name in names]

    vis_tok_train.main(flags)
    unbroken = outcome()
    assert [len(values) for values in unbroken[1]] == [6, 6, 3]
    assert "| place accuracy 0." in capsys.readouterr().out
    shutil.rmtree(final)
    vis_tok_train.main([*flags, "--resume"])
    assert outcome() == unbroken
