"""
Proves that batched, cached generation says token for token what plain decoding says without batch and cache, in any company;
that rows end by themselves or by the limit; and that no special token is ever generated.

python -m pytest tests/test_engine.py
"""

import pytest
import torch

from nanochat.engine import Engine
from nanochat.image_modes import MODES
from nanochat.tokenizer import SPECIAL_TOKENS
from tasks.common import ocr_conversation


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
        logits[engine.banned] = float("-inf")
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
    assert [r.text for r in results] == [engine.tokenizer.decode(ids) for ids in said]


def test_each_row_ends_by_itself(engine, mixed):
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
