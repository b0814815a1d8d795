"""
Proves that any text survives the tokenizer, that special tokens spelled in a text stay text, and
that the loss mask is exactly what the assistant says.

    python -m pytest tests/test_tokenizer.py
"""
import json
import os
import pickle

import pytest

from nanochat.conversation import ocr_conversation
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts import tok_train
from tasks.synthdoc import text_stream
from tasks.words import held_out_words


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(tok_train.training_text(50_000, seed=0), 400)


def ocr(text="Hello world", n=1, **extra):
    conversation = ocr_conversation(None, text, "page/7", **extra)
    conversation["images"] *= n
    return conversation


def said(tokenizer, ids, mask):
    return tokenizer.decode([i for i, m in zip(ids, mask) if m])


@pytest.mark.parametrize("text", [
    "", " ", "\n\n \t", "a  b\r\nc", "12345 67", "naïve Ünïcode ß", "漢字かな 한국어", "🙂👩‍👩‍👧",
    "e\u0301 \u0000 \ufeff \u2028",
    "don't stop -- (now)!",
    "".join(map(chr, range(0x250))),
    "".join(map(chr, range(0x900, 0xd800, 97))),
])
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_text_stay_text(tokenizer):
    for name in SPECIAL_TOKENS:
        ids = tokenizer.encode(f"a {name} b")
        assert tokenizer.decode(ids) == f"a {name} b"
        assert not set(ids) & set(tokenizer.special_ids.values())
    ids, _ = tokenizer.render_conversation(ocr("<|image|><|bos|>"), [3])
    assert ids.count(tokenizer.image_token_id) == 3
    assert ids.count(tokenizer.get_bos_token_id()) == 1


def test_special_tokens_end_the_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == 400
    assert [tokenizer.encode_special(name) for name in SPECIAL_TOKENS] == list(range(390, 400))
    assert tokenizer.image_token_id == 399 and SPECIAL_TOKENS[0] == "<|bos|>"
    with pytest.raises(ValueError, match="<|nope|>"):
        tokenizer.encode_special("<|nope|>")


def test_training_and_saving_are_reproducible(tokenizer, tmp_path):
    again = Tokenizer.train(tok_train.training_text(50_000, seed=0), 400)
    assert again.fingerprint() == tokenizer.fingerprint()
    tokenizer.save(tmp_path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.encode("the letter 42") == tokenizer.encode("the letter 42")
    assert Tokenizer.train(["other text"] * 9, 270).fingerprint() != tokenizer.fingerprint()


def test_loading_what_is_not_there_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match="scripts.tok_train"):
        Tokenizer.load(tmp_path)
    for content in (b"{", b'{"pattern": "a"}', pickle.dumps([1])):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match="not a tokenizer"):
            Tokenizer.load(tmp_path)


def test_too_small_a_vocabulary():
    with pytest.raises(ValueError, match="vocab_size 200 .* 266 or more"):
        Tokenizer.train(["text"], 200)


def test_render_layout(tokenizer):
    ids, mask = tokenizer.render_conversation(ocr(), [5])
    prompt = "<|bos|><|user_start|>" + "<|image|>" * 5 + "\nFree OCR.<|user_end|>"
    answer = "<|assistant_start|>Hello world<|assistant_end|>"
    assert tokenizer.decode(ids) == prompt + answer
    assert len(ids) == len(mask) and set(mask) == {0, 1}


@pytest.mark.parametrize("text", ["Hello world", "", "<|assistant_end|> 漢字\n\n12"])
def test_mask_is_what_the_assistant_says(tokenizer, text):
    ids, mask = tokenizer.render_conversation(ocr(text), [5])
    assert said(tokenizer, ids, mask) == text + "<|assistant_end|>"


def test_many_turns_and_images(tokenizer):
    image = {"type": "image"}

    def text(s):
        return {"type": "text", "text": s}

    conversation = {"id": "x", "images": [None, None], "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, text(" and "), image]},
        {"role": "assistant", "content": [text("one "), text("two")]},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "three"},
    ]}
    ids, mask = tokenizer.render_conversation(conversation, [2, 3])
    start = ("<|bos|><|user_start|>Be brief.\n\n"
             "<|image|><|image|> and <|image|><|image|><|image|><|user_end|>")
    assert tokenizer.decode(ids).startswith(start)
    assert said(tokenizer, ids, mask) == "one two<|assistant_end|>three<|assistant_end|>"
    prompt = tokenizer.render_for_completion(conversation, [2, 3])
    assert ids[:len(prompt)] == prompt
    assert tokenizer.decode(ids[len(prompt):]) == "three<|assistant_end|>"
    unanswered = {**conversation, "messages": conversation["messages"][:-1]}
    assert tokenizer.render_for_completion(unanswered, [2, 3]) == prompt
    roles = [message["role"] for message in conversation["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]  # left as it was


def of_messages(*messages):
    return {"id": "x", "messages": [{"role": role, "content": said} for role, said in messages]}


@pytest.mark.parametrize("conversation, positions, message", [
    (ocr(), [], "'page/7' has 1 image parts, 1 images and 0 counts"),
    (ocr(), [1, 1], "1 images and 2 counts"),
    (ocr(n=2), [1, 1], "1 image parts, 2 images and 2 counts"),
    (ocr(), [0], "at least 1"),
    (of_messages(), [], "roles"),
    (of_messages(("user", "a"), ("user", "a")), [], "'x' has the roles .*take turns"),
    (of_messages(("assistant", "a")), [], "take turns"),
    (of_messages(("system", "a")), [], "take turns"),
    (of_messages(("user", [{"type": "video"}])), [], "'video'"),
    (of_messages(("user", "a"), ("assistant", [{"type": "image"}])), [],
     "assistant message has a part of type 'image'"),
])
def test_malformed_conversations(tokenizer, conversation, positions, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.render_conversation(conversation, positions)


def test_tok_train(tmp_path, capsys):
    command = ["--vocab-size", "300", "--max-chars", "50000", "--out", str(tmp_path)]
    tok_train.main(command)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokenizer = Tokenizer.load(tmp_path)
    assert result["vocab_size"] == tokenizer.get_vocab_size() == 300
    assert result["fingerprint"] == tokenizer.fingerprint()
    chars_per_token = result["chars_per_token"]
    assert 1 < chars_per_token["random_chars"] < chars_per_token["heldout"] < 3
    before = (tmp_path / "tokenizer.json").stat().st_mtime_ns
    with pytest.raises(SystemExit) as e:
        tok_train.main(command)
    assert e.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "tokenizer.json").stat().st_mtime_ns == before
    tok_train.main(command + ["--overwrite"])


def test_no_held_out_word_is_a_token(tokenizer):
    assert tok_train.known_held_out_words(tokenizer) == []
    word = sorted(held_out_words())[0]
    contaminated = Tokenizer.train([f"{word} {word}"] * 9, 300)
    assert tok_train.known_held_out_words(contaminated) == [word]
    assert "".join(text_stream("train", 1000)) == "".join(text_stream("train", 1000))
