"""
Proves that batched, cached generation says token for token what plain decoding says without batch and cache, in any company and
in mixed modes; that rows end by themselves or by the limit; that no special token and, on request, no n-gram twice is ever
generated; and that text streams in whole characters.

python -m pytest tests/test_engine.py
"""

import pytest
import torch

from nanochat import engine as engine_module
from nanochat import image_modes
from nanochat.engine import Engine, NoRepeat
from nanochat.reader import choose_mode
from nanochat.image_modes import MODES, Mode
from nanochat.tokenizer import SPECIAL_TOKENS
from nanochat.conversation import ocr_conversation


@pytest.fixture
def engine(model, tokenizer):
    model.gpt.lm_head.weight.data.mul_(3)  # further apart: no near ties for rounding to decide
    return Engine(model.eval(), tokenizer, MODES["test"])


@pytest.fixture
def mixed(pages, chats):
    """Prompts of different lengths, with and without a page."""
    return [pages[0], chats[0], chats[1], pages[1], ocr_conversation(pages[2]["images"][0], "", "long", "\nRead it all to me.")]


@torch.inference_mode()
def plain(engine, conversation, n):
    """n greedy tokens of one conversation: the whole sequence anew for each."""
    model, (batch, (length,)) = engine.model, engine.prompt_batch([conversation])
    said = []
    while len(said) < n and (not said or said[-1] != engine.end):
        logits = model.gpt.logits(model.gpt(model.embed(batch))[0, -1])
        logits[engine.banned + (engine.no_repeat.banned(said) if engine.no_repeat else [])] = float("-inf")
        said.append(int(logits.argmax()))
        batch.ids = torch.cat([batch.ids, torch.tensor([[said[-1]]])], 1)
    return said


def tokens_of(engine, conversations, n, **kw):
    """(what `generate` chooses as lists of ids, its results)."""
    said, decode = [], engine.tokenizer.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.tokenizer, "decode", lambda ids: said.append(ids) or decode(ids))
        results = engine.generate(conversations, n, **kw)
    return [ids + [engine.end] * r.finished for ids, r in zip(said, results)], results


def test_prompts_differ_in_length(engine, mixed):
    _, lengths = engine.prompt_batch(mixed)
    assert len(set(lengths)) > 2


def test_equals_plain_decoding(engine, mixed):
    said, results = tokens_of(engine, mixed, 20)
    assert said == [plain(engine, c, 20) for c in mixed]
    assert len({tuple(ids) for ids in said}) == len(mixed) and all(len(set(ids)) > 3 for ids in said)  # no trivial output
    assert [r.text for r in results] == [engine.tokenizer.decode(ids[:-1] if r.finished else ids) for ids, r in zip(said, results)]


def test_replayed_steps_say_the_same(engine, mixed, monkeypatch):
    """The way on CUDA, where steps are replayed several at a time on fixed memory: here the step itself stands in for its graph."""
    captures = []

    def captured(step, state):
        places = [t.data_ptr() for t in state]
        captures.append(places)

        def replay():
            assert places == [t.data_ptr() for t in state]
            step()
        return replay
    monkeypatch.setattr(engine_module, "captured", captured)
    monkeypatch.setattr(engine_module, "GRAPH_ROOM", 8)
    engine.end = -1
    endless, _ = tokens_of(engine, mixed, 40)
    engine.end = next(t for ids in endless for t in ids[:10] if any(t not in other for other in endless))
    expected, steps = tokens_of(engine, mixed, 40)[0], list(engine.decode(mixed, 40, 0.0, 0))
    engine.graphs = True
    assert tokens_of(engine, mixed, 40)[0] == expected and len(captures) > 1
    replayed = list(engine.decode(mixed, 40, 0.0, 0))
    assert [[(row, token) for row, token, _ in step] for step in replayed] == [[(row, token) for row, token, _ in step] for step in steps]
    engine.no_repeat, captures[:] = NoRepeat(2, 10), []
    assert tokens_of(engine, mixed[:1], 20)[0] == [plain(engine, mixed[0], 20)] and not captures  # it needs the host at each step


def test_each_row_ends_by_itself(engine, mixed):
    engine.end = -1  # which end the random model comes to say, if any, depends on the tokenizer: none here, then one of ours
    endless, _ = tokens_of(engine, mixed, 20)
    # another end token, one that some rows come to say and some do not
    engine.end = next(t for ids in endless for t in ids[:10] if any(t not in other for other in endless))
    said, results = tokens_of(engine, mixed, 20)
    for ids, full, r in zip(said, endless, results):
        stop = full.index(engine.end) + 1 if engine.end in full else 20
        assert ids == full[:stop] and r.tokens == stop and r.finished == (engine.end in full)
    assert {r.finished for r in results} == {True, False}
    assert said == [plain(engine, c, 20) for c in mixed]


def test_company_does_not_matter(engine, mixed):
    together, _ = tokens_of(engine, mixed, 12)
    backwards, _ = tokens_of(engine, mixed[::-1], 12)
    assert together == backwards[::-1]


@pytest.mark.parametrize("n", [1, 2, 7])
def test_max_new_tokens(engine, mixed, n):
    assert [(r.tokens, r.finished) for r in engine.generate(mixed, n)] == [(n, False)] * len(mixed)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_special_tokens_are_never_generated(engine, mixed, temperature):
    special = {engine.tokenizer.encode_special(name) for name in SPECIAL_TOKENS} - {engine.end}
    logits = engine.model.gpt.logits

    def tempted(hidden):
        out = logits(hidden)
        out[:, list(special)] += 100
        return out
    engine.model.gpt.logits = tempted
    said, _ = tokens_of(engine, mixed, 20, temperature=temperature)
    assert sum(map(len, said)) > 20 and not special & set(sum(said, []))


def test_sampling_is_seeded(engine, mixed):
    a, b, c = ([r.text for r in engine.generate(mixed, 12, temperature=1.0, seed=s)] for s in (1, 1, 2))
    assert a == b != c


@torch.inference_mode()
def test_confidence_is_the_mean_log_probability(engine, pages):
    ids, (result,) = tokens_of(engine, [pages[0]], 6)
    batch, _ = engine.prompt_batch([pages[0]])
    start = batch.ids.size(1)
    batch.ids = torch.cat([batch.ids, torch.tensor(ids)], 1)
    logits = engine.model.gpt.logits(engine.model.gpt(engine.model.embed(batch)))[0, start - 1:-1]
    logits[:, engine.banned] = float("-inf")
    expected = logits.log_softmax(-1)[torch.arange(6), ids[0]].mean().item()
    assert result.confidence == pytest.approx(expected, abs=1e-5) and expected < -0.1


def test_what_is_refused(engine, pages):
    with pytest.raises(ValueError, match="max_new_tokens 0: must be at least 1"):
        engine.generate(pages, 0)
    with pytest.raises(ValueError, match="cache of .* the decoder has 256; shorten prompt or max_new_tokens"):
        engine.generate(pages, 250)
    engine.model.train()
    with pytest.raises(ValueError, match="call model.eval"):
        engine.generate(pages, 5)


# -----------------------------------------------------------------------------
# No-repeat n-gram


def naive_banned(ids, n, window, whitelist):
    """Every token with which the last n tokens would equal n tokens that begin within the last `window`."""
    return {t for t in range(max(ids, default=0) + 1) for start in range(max(0, len(ids) - window), len(ids) - n + 1)
            if (ids + [t])[-n:] == ids[start:start + n] and t not in whitelist}


def test_no_repeat_by_hand():
    rule = NoRepeat(3, 6)
    assert rule.banned([1, 2, 3, 1, 2]) == [3]
    assert rule.banned([1, 2]) == rule.banned([]) == [] and rule.banned([1, 2, 3, 4, 5, 6, 1, 2]) == []  # 1 2 3 began 8 tokens ago
    assert NoRepeat(3, 8).banned([1, 2, 3, 4, 5, 6, 1, 2]) == [3]
    assert NoRepeat(3, 6, frozenset([3])).banned([1, 2, 3, 1, 2]) == []
    generator = torch.Generator().manual_seed(0)
    for n, window in ((2, 2), (2, 7), (3, 5), (4, 30)):
        for _ in range(60):
            ids = torch.randint(0, 3, (int(torch.randint(0, 25, (1,), generator=generator)),), generator=generator).tolist()
            assert set(NoRepeat(n, window, frozenset([2])).banned(ids)) == naive_banned(ids, n, window, [2])
    with pytest.raises(ValueError, match="no-repeat n-gram 30,20: needs 2 <= n <= window"):
        NoRepeat(30, 20)


def test_no_repeat_parses_and_lets_table_tags_pass(tokenizer):
    rule = NoRepeat.parse("30,90", tokenizer)
    assert (rule.n, rule.window) == (30, 90) and set(tokenizer.encode("</td>")) <= rule.whitelist and NoRepeat.parse("", tokenizer) is None
    with pytest.raises(ValueError, match="--no-repeat=30: give N,WINDOW"):
        NoRepeat.parse("30", tokenizer)


def test_no_ngram_twice(engine, mixed):
    endless, _ = tokens_of(engine, mixed, 60)
    def grams(ids):
        return [tuple(ids[i:i + 2]) for i in range(len(ids) - 1)]
    assert any(len(set(grams(ids))) < len(grams(ids)) for ids in endless)
    engine.no_repeat = NoRepeat(2, 200)
    said, _ = tokens_of(engine, mixed, 60)
    assert all(len(set(grams(ids))) == len(grams(ids)) for ids in said)
    assert [ids[:20] for ids in said] == [plain(engine, c, 20) for c in mixed]  # each row by its own text alone


# -----------------------------------------------------------------------------
# Modes and streaming

TILED = Mode("tiled", 64, tile=64, max_tiles=4)


def test_a_mode_per_conversation(engine, pages):
    wide = ocr_conversation(pages[1]["images"][0].resize((200, 100)), "", "wide")
    mixed = [pages[0], {**wide, "mode": TILED}, wide, pages[3]]
    assert [[(p.mode.name, p.tokens, p.positions) for p in engine.plans(c)] for c in mixed] == \
        [[("test", 4, 7)], [("tiled", 12, 17)], [("test", 4, 7)], [("test", 4, 7)]]
    said, _ = tokens_of(engine, mixed, 20)
    assert said == [plain(engine, c, 20) for c in mixed] and said[1] != said[2]
    engine.mode = lambda width, height: TILED if width > height else MODES["test"]
    assert tokens_of(engine, [pages[0], wide], 20)[0] == [said[0], said[1]]


def test_the_function_gets_upright_sides(engine, pages):
    image, sides = pages[0]["images"][0].resize((80, 40)), []
    image.getexif()[0x0112] = 6  # to be turned by a quarter
    engine.mode = lambda *size: sides.append(size) or MODES["test"]
    engine.plans({"images": [image]})
    assert sides == [(40, 80)]


@pytest.mark.skipif(not hasattr(image_modes, "auto_mode"), reason="image_modes has no automatic choice in this version")
def test_automatic_mode(engine, pages):
    assert choose_mode("auto", ["base", "tiny"])(300, 500) == MODES["tiny"]
    engine.mode = choose_mode("auto", ["test"])
    assert engine.plans(pages[0])[0].mode == MODES["test"]


def test_images_are_encoded_once(engine, pages, monkeypatch):
    seen, project = [], engine.model.project
    monkeypatch.setattr(engine.model, "project", lambda pixels, *args: seen.append(len(pixels)) or project(pixels, *args))
    engine.generate(pages[:3], 10)
    assert seen == [3]


def test_stream_is_generate_in_pieces(engine, mixed):
    for c in mixed:
        pieces = list(engine.stream(c, 25))
        result, = engine.generate([c], 25)
        assert "".join(piece for piece, _ in pieces) == result.text == pieces[-1][1].text and pieces[-1][1].tokens == result.tokens
        assert pieces[-1][1].confidence == pytest.approx(result.confidence) and pieces[-1][1].finished == result.finished


def test_characters_stream_whole(engine, pages, monkeypatch):
    """Chinese takes three byte tokens a character here; the last one is cut by the limit."""
    ids = [engine.tokenizer.enc.encode_single_token(bytes([byte])) for byte in "\u4f60\u597d!".encode()]
    monkeypatch.setattr(engine, "decode", lambda *args: ([(0, token, -1.0)] for token in ids + ids[:2]))
    pieces = [piece for piece, _ in engine.stream(pages[0], 9)]
    assert pieces == ["", "", "\u4f60", "", "", "\u597d", "!", "", "", "\ufffd"]
    assert "".join(pieces) == engine.tokenizer.decode(ids + ids[:2])


def test_one_that_is_refused_leaves_the_others(engine, pages):
    long = ocr_conversation(pages[0]["images"][0], "", "long", "word " * 300)
    error, result = engine.generate_each([long, pages[0]], 10)
    assert "the decoder has 256" in str(error) and result == engine.generate([pages[0]], 10)[0]
    assert engine.generate_each([], 10) == []


def test_flags(engine, pages):
    result, = engine.generate([pages[0]], 5)
    result.text, result.confidence, result.finished = "0.6." * 20, -1.0, False
    assert result.flags == ["loops", "low confidence", "cut"]
    result.text, result.confidence, result.finished = "plain", -0.1, True
    assert result.flags == []


def test_casting_the_decoder_once_changes_nothing(engine, mixed):
    engine.model.dtype = torch.bfloat16
    before = engine.generate(mixed, 12)
    for p in engine.model.gpt.parameters():
        p.data = p.data.to(torch.bfloat16)
    assert engine.generate(mixed, 12) == before
