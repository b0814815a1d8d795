"""
Proves that batched, cached generation gives token for token what plain decoding gives without batch
and cache, in any company and in mixed modes; that rows end by themselves or by the limit; that no
special token and, on request, no n-gram twice is ever generated; and that text streams in whole
characters.

python -m pytest tests/test_engine.py
"""

import pytest
import torch

from nanochat import engine as engine_module
from nanochat.conversation import ocr_conversation
from nanochat.engine import Engine, NoRepeat
from nanochat.image_modes import Mode, get_mode
from nanochat.reader import choose_mode
from nanochat.tokenizer import SPECIAL_TOKENS

SMALL = get_mode("64px")


@pytest.fixture
def engine(model, tokenizer):
    # Logits further apart, so that rounding never decides between two tokens.
    model.gpt.lm_head.weight.data.mul_(3)
    return Engine(model.eval(), tokenizer, SMALL)


@pytest.fixture
def mixed(pages, chats):
    """Prompts of different lengths, with and without a page."""
    picture = pages[2]["images"][0]
    long = ocr_conversation(picture, "", "long", "\nRead it all to me.")
    return [pages[0], chats[0], chats[1], pages[1], long]


@torch.inference_mode()
def plain(engine, conversation, n):
    """n greedy tokens of one conversation, the whole sequence computed anew for each."""
    model = engine.model
    batch, _ = engine.prompt_batch([conversation])
    tokens = []
    while len(tokens) < n and engine.end not in tokens:
        hidden = model.gpt(model.embed(batch))
        logits = model.gpt.logits(hidden[0, -1])
        logits[engine.banned] = float("-inf")
        if engine.no_repeat:
            logits[engine.no_repeat.banned(tokens)] = float("-inf")
        tokens.append(int(logits.argmax()))
        batch.ids = torch.cat([batch.ids, torch.tensor([tokens[-1:]])], 1)
    return tokens


def tokens_of(engine, conversations, n, temperature=0.0):
    """The tokens generated for each conversation, the end token included."""
    tokens = [[] for _ in conversations]
    for step in engine.decode(conversations, n, temperature, 0):
        for number, token, _ in step:
            tokens[number].append(token)
    return tokens


def end_early(engine, conversations, n):
    """
    Makes a token the end token that some rows generate early and some never do. -> what the rows
    generate when nothing ends them. (Whether this random model ever says the real one is chance.)
    """
    engine.end = -1
    endless = tokens_of(engine, conversations, n)
    for token in sum([ids[:10] for ids in endless], []):
        if not all(token in ids for ids in endless):
            engine.end = token
            return endless
    raise AssertionError("every token comes in every row")


def test_prompts_differ_in_length(engine, mixed):
    _, lengths = engine.prompt_batch(mixed)
    assert len(set(lengths)) > 2


def test_equals_plain_decoding(engine, mixed):
    tokens = tokens_of(engine, mixed, 20)
    assert tokens == [plain(engine, c, 20) for c in mixed]
    # The rows say different things, and none the same token all the time.
    assert len({tuple(ids) for ids in tokens}) == len(mixed)
    assert all(len(set(ids)) > 3 for ids in tokens)
    for result, ids in zip(engine.generate(mixed, 20), tokens):
        if result.finished:
            ids = ids[:-1]
        assert result.text == engine.tokenizer.decode(ids)


def test_replayed_steps_say_the_same(engine, mixed, monkeypatch):
    """
    As on CUDA, where steps are replayed several at a time on fixed memory. Here the step itself
    stands in for its graph.
    """
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
    end_early(engine, mixed, 40)
    expected = list(engine.decode(mixed, 40, 0.0, 0))
    assert not captures
    engine.graphs = True

    def check():
        # The same rows in the same steps. Log-probabilities are sums in another order where
        # finished rows leave later.
        replayed = list(engine.decode(mixed, 40, 0.0, 0))
        assert len(replayed) == len(expected)
        for step, expected_step in zip(replayed, expected):
            assert [entry[:2] for entry in step] == [entry[:2] for entry in expected_step]
            logprobs = [logprob for _, _, logprob in step]
            assert logprobs == pytest.approx([logprob for _, _, logprob in expected_step], abs=1e-4)

    check()
    n = len(captures)
    assert n > 1
    check()  # the next batch needs no capture
    assert len(captures) == n
    # A longer one moves the memory, and all graphs are captured anew. Then the first fits again.
    engine.generate(mixed, 60)
    longer = len(captures)
    assert longer > n
    check()
    engine.generate(mixed[:2], 40)
    assert captures[-1][0] == captures[n][0]

    # A page that is read while another one is being read has memory of its own.
    [alone] = engine.generate(mixed[:1], 40)
    outer = engine.stream(mixed[0], 40)
    pieces = [next(outer)]
    assert engine.generate(mixed, 40)[0].text == alone.text
    assert engine.memory is not None
    pieces.extend(outer)
    assert pieces[-1][1].text == alone.text

    # The no-repeat rule needs the host at every step: no graphs.
    captures.clear()
    engine.no_repeat = NoRepeat(2, 10)
    assert tokens_of(engine, mixed[:1], 20) == [plain(engine, mixed[0], 20)]
    assert not captures


def test_each_row_ends_by_itself(engine, mixed):
    endless = end_early(engine, mixed, 20)
    tokens = tokens_of(engine, mixed, 20)
    results = engine.generate(mixed, 20)
    for ids, full, result in zip(tokens, endless, results):
        ends = engine.end in full
        length = full.index(engine.end) + 1 if ends else 20
        assert ids == full[:length]
        assert result.tokens == length and result.finished == ends
    assert {result.finished for result in results} == {True, False}
    assert tokens == [plain(engine, c, 20) for c in mixed]


def test_rows_do_not_influence_each_other(engine, mixed):
    """Neither the order nor the number of the other rows matters, nor when they end."""
    end_early(engine, mixed, 20)
    together = tokens_of(engine, mixed, 20)
    assert tokens_of(engine, mixed[::-1], 20) == together[::-1]
    assert tokens_of(engine, mixed[:2], 20) == together[:2]
    results = engine.generate(mixed, 20)
    for conversation, result in zip(mixed, results):
        [alone] = engine.generate([conversation], 20)
        assert alone.text == result.text
        assert alone.confidence == pytest.approx(result.confidence, abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_max_new_tokens(engine, mixed, n):
    for result in engine.generate(mixed, n):
        assert (result.tokens, result.finished) == (n, False)


def test_without_a_limit_the_decoder_is_filled(engine, pages):
    engine.end = -1
    _, [length] = engine.prompt_batch(pages[:1])
    [result] = engine.generate(pages[:1], None)
    assert length + result.tokens == engine.model.gpt.cfg.sequence_len and not result.finished


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_special_tokens_are_never_generated(engine, mixed, temperature):
    special = {engine.tokenizer.encode_special(name) for name in SPECIAL_TOKENS} - {engine.end}
    logits = engine.model.gpt.logits

    def tempted(hidden):
        out = logits(hidden)
        out[:, list(special)] += 100
        return out

    engine.model.gpt.logits = tempted
    tokens = sum(tokens_of(engine, mixed, 20, temperature), [])
    assert len(tokens) > 20 and not special & set(tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padded_vocabulary_is_never_generated(cfg, make_model, tokenizer, mixed, temperature):
    """A model may have more rows in its head than the tokenizer has tokens."""
    size = tokenizer.get_vocab_size()
    cfg.gpt.vocab_size = size + 20
    engine = Engine(make_model(cfg=cfg).eval(), tokenizer, SMALL)
    logits = engine.model.gpt.logits

    def tempted(hidden):
        out = logits(hidden)
        out[:, size:] += 100
        return out

    engine.model.gpt.logits = tempted
    tokens = sum(tokens_of(engine, mixed, 20, temperature), [])
    assert len(tokens) > 20 and max(tokens) < size
    engine.generate(mixed, 5, temperature)  # and what is generated can be decoded


def test_sampling_is_seeded(engine, mixed):
    def texts(seed):
        return [r.text for r in engine.generate(mixed, 12, temperature=1.0, seed=seed)]
    assert texts(1) == texts(1) != texts(2)


@torch.inference_mode()
def test_confidence_is_the_mean_log_probability(engine, pages):
    ids = tokens_of(engine, [pages[0]], 6)
    [result] = engine.generate([pages[0]], 6)
    batch, [start] = engine.prompt_batch([pages[0]])
    batch.ids = torch.cat([batch.ids, torch.tensor(ids)], 1)
    hidden = engine.model.gpt(engine.model.embed(batch))
    logits = engine.model.gpt.logits(hidden)[0, start - 1:-1]  # those that each new token came from
    logits[:, engine.banned] = float("-inf")
    expected = logits.log_softmax(-1)[torch.arange(6), ids[0]].mean().item()
    assert result.confidence == pytest.approx(expected, abs=1e-5)
    assert expected < -0.1


def test_what_is_refused(engine, pages):
    with pytest.raises(ValueError, match="max_new_tokens 0: must be at least 1"):
        engine.generate(pages, 0)
    too_long = "cache of .* the decoder has 256; shorten prompt or max_new_tokens"
    with pytest.raises(ValueError, match=too_long):
        engine.generate(pages, 250)
    engine.model.train()
    with pytest.raises(ValueError, match="call model.eval"):
        engine.generate(pages, 5)


# -----------------------------------------------------------------------------
# No-repeat n-gram


def naive_banned(ids, n, window, whitelist):
    """Every token with which the last n tokens would equal n that began within the window."""
    banned = set()
    first = max(0, len(ids) - window)
    for token in set(ids) - set(whitelist):
        ngram = (ids + [token])[-n:]
        for start in range(first, len(ids) - n + 1):
            if ids[start:start + n] == ngram:
                banned.add(token)
    return banned


def test_no_repeat_by_hand():
    rule = NoRepeat(3, 6)
    assert rule.banned([1, 2, 3, 1, 2]) == [3]
    assert rule.banned([1, 2]) == []
    assert rule.banned([]) == []
    # Here 1 2 3 began 8 tokens ago.
    assert rule.banned([1, 2, 3, 4, 5, 6, 1, 2]) == []
    assert NoRepeat(3, 8).banned([1, 2, 3, 4, 5, 6, 1, 2]) == [3]
    assert NoRepeat(3, 6, frozenset([3])).banned([1, 2, 3, 1, 2]) == []
    with pytest.raises(ValueError, match="no-repeat n-gram 30,20: needs 2 <= n <= window"):
        NoRepeat(30, 20)


@pytest.mark.parametrize("n, window", [(2, 2), (2, 7), (3, 5), (4, 30)])
def test_no_repeat_equals_a_naive_search(n, window):
    rule = NoRepeat(n, window, frozenset([2]))
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        length = int(torch.randint(0, 25, (1,), generator=generator))
        ids = torch.randint(0, 3, (length,), generator=generator).tolist()
        assert set(rule.banned(ids)) == naive_banned(ids, n, window, [2])


def test_no_repeat_parses_and_lets_table_tags_pass(tokenizer):
    rule = NoRepeat.parse("30,90", tokenizer)
    assert (rule.n, rule.window) == (30, 90)
    assert set(tokenizer.encode("</td>")) <= rule.whitelist
    assert NoRepeat.parse("", tokenizer) is None
    with pytest.raises(ValueError, match="--no-repeat=30: give N,WINDOW"):
        NoRepeat.parse("30", tokenizer)


def has_repeated_pair(ids):
    pairs = list(zip(ids, ids[1:]))
    return len(set(pairs)) < len(pairs)


def test_no_ngram_twice(engine, mixed):
    assert any(has_repeated_pair(ids) for ids in tokens_of(engine, mixed, 60))
    engine.no_repeat = NoRepeat(2, 200)
    tokens = tokens_of(engine, mixed, 60)
    assert not any(has_repeated_pair(ids) for ids in tokens)
    # Each row is judged by its own text alone.
    assert [ids[:20] for ids in tokens] == [plain(engine, c, 20) for c in mixed]


# -----------------------------------------------------------------------------
# Modes

TILED = Mode("tiled", 64, tile=64, max_tiles=4)


def test_a_mode_per_conversation(engine, pages):
    wide = ocr_conversation(pages[1]["images"][0].resize((200, 100)), "", "wide")
    mixed = [pages[0], {**wide, "mode": TILED}, wide, pages[3]]
    shapes = []
    for conversation in mixed:
        [p] = engine.plans(conversation)
        shapes.append((p.mode, p.tokens, p.positions))
    assert shapes == [(SMALL, 4, 7), (TILED, 12, 17), (SMALL, 4, 7), (SMALL, 4, 7)]

    tokens = tokens_of(engine, mixed, 20)
    assert tokens == [plain(engine, c, 20) for c in mixed]
    assert tokens[1] != tokens[2]
    engine.mode = lambda width, height: TILED if width > height else SMALL
    assert tokens_of(engine, [pages[0], wide], 20) == tokens[:2]


def test_the_function_gets_upright_sides(engine, pages):
    image = pages[0]["images"][0].resize((80, 40))
    image.getexif()[0x0112] = 6  # to be turned by a quarter
    sizes = []

    def mode(width, height):
        sizes.append((width, height))
        return SMALL

    engine.mode = mode
    engine.plans({"images": [image]})
    assert sizes == [(40, 80)]


def test_automatic_mode(engine, pages):
    """The smallest mode that loses no pixels, for each picture by itself."""
    engine.mode = choose_mode("auto", ["tiny", "small", "base"])
    for size, expected in ((300, "tiny"), (513, "small"), (900, "base"), (5000, "base")):
        picture = pages[0]["images"][0].resize((size, 100))
        [p] = engine.plans({"images": [picture]})
        assert p.mode == get_mode(expected)


# -----------------------------------------------------------------------------
# Batches, streams, results


def test_images_are_encoded_once(engine, pages, monkeypatch):
    seen = []
    project = engine.model.project

    def counted(pixels, *args):
        seen.append(len(pixels))
        return project(pixels, *args)

    monkeypatch.setattr(engine.model, "project", counted)
    engine.generate(pages[:3], 10)
    assert seen == [3]


def test_stream_is_generate_in_pieces(engine, mixed):
    for conversation in mixed:
        pieces = list(engine.stream(conversation, 25))
        [result] = engine.generate([conversation], 25)
        _, last = pieces[-1]
        assert "".join(piece for piece, _ in pieces) == result.text == last.text
        assert (last.tokens, last.finished) == (result.tokens, result.finished)
        assert last.confidence == pytest.approx(result.confidence)


def test_characters_stream_whole(engine, pages, monkeypatch):
    """Chinese takes three byte tokens a character here; the last one is cut by the limit."""
    ids = []
    for byte in "\u4f60\u597d!".encode():
        ids.append(engine.tokenizer.enc.encode_single_token(bytes([byte])))
    ids += ids[:2]

    def decode(*args):
        for token in ids:
            yield [(0, token, -1.0)]

    monkeypatch.setattr(engine, "decode", decode)
    pieces = [piece for piece, _ in engine.stream(pages[0], 9)]
    assert pieces == ["", "", "\u4f60", "", "", "\u597d", "!", "", "", "\ufffd"]
    assert "".join(pieces) == engine.tokenizer.decode(ids)


def test_one_that_is_refused_leaves_the_others(engine, pages):
    long = ocr_conversation(pages[0]["images"][0], "", "long", "word " * 300)
    error, result = engine.generate_each([long, pages[0]], 10)
    assert "the decoder has 256" in str(error)
    assert [result] == engine.generate([pages[0]], 10)
    assert engine.generate_each([], 10) == []


def test_flags(engine, pages):
    [result] = engine.generate([pages[0]], 5)
    result.text = "0.6." * 20
    result.confidence = -1.0
    result.finished = False
    assert result.flags == ["loops", "low confidence", "cut"]
    result.text = "plain"
    result.confidence = -0.1
    result.finished = True
    assert result.flags == []


def test_casting_the_decoder_once_changes_nothing(engine, mixed):
    engine.model.dtype = torch.bfloat16
    before = engine.generate(mixed, 12)
    for p in engine.model.gpt.parameters():
        p.data = p.data.to(torch.bfloat16)
    assert engine.generate(mixed, 12) == before
