"""
Proves that the gauges of collapse measure what their names say: cosine 1 for pages that all look the same, a gap that is
positive when the right page helps and zero when it is ignored.

python -m pytest tests/test_evaluator.py
"""

import pytest
import torch

from nanochat.common import ArgumentParser
from nanochat.conversation import BadSample, Task
from nanochat.engine import Engine, Result
from nanochat.evaluator import Evaluator, cosines, page_cosine, read_pages, validate
from nanochat.heads import make_heads
from nanochat.image_modes import MODES
from nanochat.loop import add_training_arguments
from tasks.registry import add_data_arguments, letters_set


def test_page_cosine():
    assert page_cosine(torch.ones(4, 2, 3)) == pytest.approx(1)
    assert page_cosine(torch.eye(4)) == pytest.approx(0)
    assert page_cosine(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-1)
    # pairs (a, b), (a, c), (b, c) at 60, 90 and 150 degrees; length does not matter
    vectors = torch.tensor([[1.0, 0], [0.5, 0.75 ** 0.5], [0, -7]])
    assert page_cosine(vectors) == pytest.approx((0.5 + 0 - 0.75 ** 0.5) / 3, abs=1e-6)


@torch.no_grad()
def test_cosines(model, make_batch, pages):
    pixels = make_batch(pages).views[64]
    model.eval()
    measured = cosines(model, pixels)
    assert list(measured) == ["sam", "compressor", "clip", "projector"]
    assert measured["compressor"] == pytest.approx(page_cosine(model.encoder.sam_model(pixels / 127.5 - 1)), abs=1e-5)
    assert measured["projector"] == pytest.approx(page_cosine(model.project(pixels)), abs=1e-5)
    same = cosines(model, pixels[:1].expand(10, -1, -1, -1))
    assert list(same.values()) == pytest.approx([1] * 4, abs=1e-4)


class Reader(torch.nn.Module):
    """Loss 3 nats a row beside its own page, 3 + `gap` beside another."""
    device = torch.device("cpu")

    def __init__(self, batches, gap):
        super().__init__()
        self.own, self.gap = {b.ids.data_ptr(): b.views[64] for b in batches}, gap

    def forward(self, batch):
        wrong = (self.own[batch.ids.data_ptr()] != batch.views[64]).flatten(1).any(1)
        return {"text": ((3 + self.gap * wrong).sum(), batch.supervised())}


@pytest.mark.parametrize("gap", [5.0, 0.0, -1.0])
def test_validate(make_batch, pages, gap):
    batches = [make_batch(pages[:6]), make_batch(pages[6:])]
    record = validate(Reader(batches, gap), batches)
    characters = sum(len(c["messages"][-1]["content"]) for c in pages)
    assert record["val/loss"] == pytest.approx(30 / sum(b.supervised() for b in batches))
    assert record["val/loss_per_char"] == pytest.approx(30 / characters)
    assert record["vision/gap"] == pytest.approx(10 * gap / characters)


def test_read_pages(model, tokenizer, pages, monkeypatch):
    engine = Engine(model.eval(), tokenizer, MODES["64px"])
    truths = [c["messages"][-1]["content"] for c in pages]
    texts = truths[:9] + [""]
    generate = engine.generate

    def reads(conversations, n):
        results = generate(conversations, n)
        for r, text in zip(results, texts):
            r.text = text
        return results
    monkeypatch.setattr(engine, "generate", reads)
    rows = read_pages(engine, pages, 4)
    assert [(c["id"], text, score) for c, text, score in rows] == [
        (c["id"], text, float(text == truth)) for c, text, truth in zip(pages, texts, truths)]


def read_on_a_rank(rank, world, make_model, tokenizer, pages, folder):
    engine = Engine(make_model().eval(), tokenizer, MODES["64px"])
    read = []
    for n in (2, 10):  # with two pages the third rank reads none
        read.append([row[1:] for row in read_pages(engine, pages[:n])])
    torch.save(read, folder / f"{world}_{rank}")


def test_ranks_share_the_reading(make_model, tokenizer, pages, run_ranks, tmp_path):
    """Every rank has all pages at the end, in their order."""
    for world in (1, 3):
        run_ranks(world, read_on_a_rank, make_model, tokenizer, pages, tmp_path)
    expected = torch.load(tmp_path / "1_0")
    assert [len(rows) for rows in expected] == [2, 10]
    for rank in range(3):
        assert torch.load(tmp_path / f"3_{rank}") == expected


def test_reading_stops_where_the_decoder_ends(model, tokenizer, pages):
    """A truth longer than the room behind its page is read as far as there are positions."""
    engine = Engine(model.eval(), tokenizer, MODES["64px"])
    conversation = dict(pages[0])
    long_answer = {"role": "assistant", "content": "word " * 400}
    conversation["messages"] = [*conversation["messages"][:-1], long_answer]
    [(_, text, score)] = read_pages(engine, [conversation])
    assert 0 <= score < 1


# -----------------------------------------------------------------------------
# Which samples are validated on

def numbered(pages, chats, bad):
    """A task of texts, broken rows and pages in turn."""
    class Mixed(Task):
        name = "mixed"

        def __len__(self):
            return 24

        def __getitem__(self, i):
            self.check_index(i)
            if i % 3 == 2:
                return pages[i // 3]
            return bad(i) if i % 3 else chats[i // 3]
    return Mixed()


def broken(i):
    raise BadSample(f"mixed row {i}: broken")


def evaluator_of(task, tokenizer, cfg, rule, **limits):
    rules = {"max_tokens": 256, "bad_data": rule, "too_long": "raise", "max_images": 16, **limits}
    return Evaluator(tokenizer, MODES["64px"], cfg.token_stride, rules, task, 6)


def test_held_out_samples_may_be_bad_or_text(model, tokenizer, cfg, pages, chats, capsys):
    task = numbered(pages, chats, broken)
    evaluator = evaluator_of(task, tokenizer, cfg, "skip")
    figures, rows = evaluator(model)
    assert [c["id"] for c, _, _ in rows] == [page["id"] for page in pages[:6]]
    assert figures["val/loss"] > 0 and -1 <= figures["vision/cosine_sam"] <= 1
    out = capsys.readouterr().out
    assert "preparing 6 pages for validation\n" in out  # waits are announced
    assert "leaves out 12 samples that have no picture or cannot be used" in out
    with pytest.raises(BadSample, match="mixed row 1: broken"):
        evaluator_of(task, tokenizer, cfg, "raise")


def test_letters_are_asked_for_on_pages_that_know_them(make_model, tokenizer, cfg, pages):
    """Where the first set of a mixture has no labels, those of another one are taken."""
    unlabeled = [{key: value for key, value in page.items() if key != "labels"} for page in pages]
    model = make_model()
    heads = make_heads(model, local_weight=1.0, place_weight=0.3)
    rules = {"max_tokens": 256, "bad_data": "raise", "too_long": "raise", "max_images": 16}
    figures = {}
    for name, task, letters in (("own", pages, None), ("others", unlabeled, pages),
                                ("none", unlabeled, None)):
        evaluator = Evaluator(tokenizer, MODES["64px"], cfg.token_stride, rules, task, 6, heads,
                              letters)
        figures[name], _ = evaluator(model)
    for gauge in ("vision/local_accuracy", "vision/place_accuracy"):
        assert figures["others"][gauge] == figures["own"][gauge]
        assert gauge not in figures["none"]
    assert figures["others"]["val/loss"] == figures["own"]["val/loss"]

    args = namespace("--data=synthchart=2,synthdoc=1")
    assert len(letters_set(args, 64)) == 1000
    assert letters_set(namespace("--data=synthchart"), 64) is None
    assert letters_set(namespace("--data=synthdoc=1,synthpage=1"), 64) is None  # it has them itself


def namespace(*flags):
    parser = ArgumentParser("flags")
    add_data_arguments(parser, chars="10-20", ramp=0)
    add_training_arguments(parser)
    return parser.parse_args(flags)


def test_too_few_held_out_samples(tokenizer, cfg, chats):
    with pytest.raises(ValueError, match="at least 2 pages; of 10 samples of list 0 have a picture"):
        evaluator_of(chats, tokenizer, cfg, "skip")


def test_a_long_prompt_does_not_cut_the_answers_of_others(model, tokenizer, pages, monkeypatch):
    engine = Engine(model.eval(), tokenizer, MODES["64px"])
    decoder = model.cfg.gpt.sequence_len
    limits = []
    monkeypatch.setattr(engine, "prompt_batch", lambda batch: (None, [100, decoder - 3, 100]))

    def generate(conversations, limit):
        limits.append((len(conversations), limit))
        return [Result("", 1, True, 0.0) for _ in conversations]
    monkeypatch.setattr(engine, "generate", generate)
    read_pages(engine, pages[:3])
    [(two, longest), one] = limits
    assert two == 2 and longest > 3 and one == (1, 3)


def test_a_prompt_that_fills_the_decoder_is_left_out(model, tokenizer, pages):
    engine = Engine(model.eval(), tokenizer, MODES["64px"])
    user, answer = pages[0]["messages"]
    question = {"role": "user", "content": "Go on. " * 400}
    dialog = {**pages[0], "messages": [user, answer, question, answer]}
    rows = read_pages(engine, [pages[1], dialog, pages[2]])
    assert [c["id"] for c, _, _ in rows] == [pages[1]["id"], pages[2]["id"]]
    with pytest.raises(ValueError, match="no prompt of these pages leaves room"):
        read_pages(engine, [dialog])
