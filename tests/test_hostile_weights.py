"""
Proves that whatever a file of weights, sizes or tokens may hold is refused in one line that names
the file: no other kind of error, no value of the model changed, nothing run.

python -m pytest tests/test_hostile_weights.py
"""
import hashlib
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint as ckpt
from nanochat import pretrained
from nanochat.gpt import GPT
from nanochat.tokenizer import SPECIAL_TOKENS
from tests.test_pretrained import (  # noqa: F401 (hub is a fixture)
    META, RANKS, SPECIAL_IDS, VOCAB, Hostile, copy_of, deepseek_tensors, hub, random_model)


def digest(module):
    """One hash over every parameter and buffer."""
    content = hashlib.sha256()
    for key, t in module.state_dict().items():
        content.update(key.encode())
        content.update(t.numpy().tobytes())
    return content.hexdigest()


def refused(load, module, message):
    """Asserts that load() is refused in one line that has `message`, and `module` is as before."""
    before = digest(module)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load()
    text = str(error.value)
    assert message in text
    assert "\n" not in text
    assert len(text) < 1000
    assert digest(module) == before


def named(cases):
    """[(name, ...)] for parametrize: the first of each becomes its id."""
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


# -----------------------------------------------------------------------------
# Safetensors: one file, of SAM

NECK = "vision_encoder.neck.conv2.weight"  # (16, 16, 3, 3)
LAST = "vision_encoder.pos_embed"          # of the last keys to be copied


def header(record, data=b""):
    """Bytes of a safetensors file with this header."""
    text = json.dumps(record).encode()
    return struct.pack("<Q", len(text)) + text + data


HUGE = {"a": {"dtype": "F32", "shape": [2 ** 40], "data_offsets": [0, 2 ** 42]}}
NOT_COMPLETE = "is not a complete safetensors file"


@pytest.mark.parametrize("content, message", named([
    ("empty", b"", NOT_COMPLETE),
    ("three bytes", b"abc", NOT_COMPLETE),
    ("zeros", bytes(100), NOT_COMPLETE),
    ("length bomb", struct.pack("<Q", 2 ** 62) + b"{}", NOT_COMPLETE),
    ("header cut", header(HUGE)[:20], NOT_COMPLETE),
    ("header is a list", header([]), NOT_COMPLETE),
    ("tensor bomb", header(HUGE), NOT_COMPLETE),
    ("no tensors", header({}), "expected keys are missing"),
    ("a pickle", pickle.dumps({"a": 1}), NOT_COMPLETE),
    ("a web page", b"<!DOCTYPE html><html>Not found</html>", NOT_COMPLETE),
]))
def test_safetensors_of_other_bytes(hub, tmp_path, content, message):
    source = copy_of(hub, "sam", tmp_path)
    Path(source, "model.safetensors").write_bytes(content)
    model = random_model(1)
    refused(lambda: pretrained.load_sam(model, source), model, message)


@pytest.mark.parametrize("key, value, message", named([
    ("integers", NECK, torch.ones(16, 16, 3, 3, dtype=torch.int64), "is of torch.int64"),
    ("booleans", NECK, torch.ones(16, 16, 3, 3, dtype=torch.bool), "is of torch.bool"),
    ("complex", NECK, torch.ones(16, 16, 3, 3, dtype=torch.complex64), "is of torch.complex64"),
    ("float8", NECK, torch.ones(16, 16, 3, 3).to(torch.float8_e4m3fn), "is of torch.float8_e4m3fn"),
    ("fp64 overflow", NECK, torch.ones(16, 16, 3, 3).double() * 1e300, "too large for"),
    ("nan", LAST, torch.full((1, 8, 8, 32), float("nan")), "not finite"),
    ("infinite", LAST, torch.full((1, 8, 8, 32), float("inf")), "not finite"),
    ("0-D", NECK, torch.tensor(1.0), "has the shape ()"),
    ("empty", NECK, torch.zeros(0), "has the shape (0,)"),
    ("transposed", LAST, torch.zeros(1, 32, 8, 8), "has the shape (1, 32, 8, 8)"),
]))
def test_safetensors_of_other_values(hub, tmp_path, key, value, message):
    source = copy_of(hub, "sam", tmp_path)
    path = os.path.join(source, "model.safetensors")
    save_file({**load_file(path), key: value}, path)
    model = random_model(1)
    refused(lambda: pretrained.load_sam(model, source), model, message)


def test_safetensors_whose_joined_parts_differ(hub, tmp_path):
    """q, k and v of CLIP are joined; parts of other sizes must not add up to the right one."""
    source = copy_of(hub, "clip", tmp_path)
    path = os.path.join(source, "model.safetensors")
    tensors = load_file(path)
    prefix = "vision_model.encoder.layers.0.self_attn"
    tensors[f"{prefix}.q_proj.weight"] = torch.zeros(40, 32)
    tensors[f"{prefix}.k_proj.weight"] = torch.zeros(24, 32)
    save_file(tensors, path)
    model = random_model(1)
    message = "q_proj.weight has the shape (40, 32)"
    refused(lambda: pretrained.load_clip(model, source), model, message)


# -----------------------------------------------------------------------------
# Safetensors: shards and index, of DeepSeek-OCR

def without(key):
    def change(tensors):
        del tensors[key]
    return change


def with_value(key, value):
    def change(tensors):
        tensors[key] = value
    return change


@pytest.mark.parametrize("change, message", named([
    ("no newline", without("model.image_newline"), "['image_newline']"),
    ("no projector", without("model.projector.layers.weight"), "['projector.layers.weight']"),
    ("no bias", without("model.projector.layers.bias"), "['projector.layers.bias']"),
    ("0-D projector", with_value("model.projector.layers.weight", torch.tensor(1.0)), "shape ()"),
    ("nan in the last", with_value("model.view_seperator", torch.full((256,), float("nan"))),
     "view_seperator has values that are not finite"),
    ("newline too short", with_value("model.image_newline", torch.zeros(255)), "shape (255,)"),
    ("another key", with_value("model.vision_model.head.weight", torch.zeros(1)), "are unknown"),
]))
def test_deepseek_with_something_missing_or_wrong(hub, tmp_path, change, message):
    tensors = deepseek_tensors(hub[1])
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    model = random_model(1)
    refused(lambda: pretrained.load_deepseek(model, str(tmp_path)), model, message)


INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-000001.safetensors"
KEY = "model.image_newline"


@pytest.mark.parametrize("index, message", named([
    ("empty", "", "is not valid JSON"),
    ("cut", '{"weight_map": {', "is not valid JSON"),
    ("nested without end", "[" * 100_000, "is not valid JSON"),
    ("null", "null", "has a NoneType where an object is expected"),
    ("a list", "[]", "has a list where an object is expected"),
    ("no map", "{}", "lacks the key 'weight_map'"),
    ("map is null", '{"weight_map": null}', "weight_map is a NoneType"),
    ("shard is null", json.dumps({"weight_map": {KEY: None}}), "shard of model.image_newline is"),
    ("path upwards", json.dumps({"weight_map": {KEY: f"../{SHARD}"}}), "need the name of a file"),
    ("absolute path", json.dumps({"weight_map": {KEY: "/etc/hosts"}}), "need the name of a file"),
    ("no name", json.dumps({"weight_map": {KEY: ""}}), "need the name of a file"),
    ("no such shard", json.dumps({"weight_map": {KEY: "other.safetensors"}}), "other.safetensors"),
    ("no such key", json.dumps({"weight_map": {"model.other": SHARD}}), "that no shard has"),
]))
def test_indices(hub, tmp_path, index, message):
    source = copy_of(hub, "deepseek", tmp_path)
    Path(source, INDEX).write_text(index)
    model = random_model(1)
    refused(lambda: pretrained.load_deepseek(model, source), model, message)


def test_a_key_in_two_shards(hub, tmp_path):
    source = copy_of(hub, "deepseek", tmp_path)
    save_file({KEY: torch.zeros(256)}, os.path.join(source, "second.safetensors"))
    index = json.loads(Path(source, INDEX).read_text())
    index["weight_map"]["model.other"] = "second.safetensors"
    Path(source, INDEX).write_text(json.dumps(index))
    model = random_model(1)
    refused(lambda: pretrained.load_deepseek(model, source), model, "1 keys are in two shards")


@pytest.mark.parametrize("content, message", named([
    ("none", None, "has no config.json"),
    ("null", b"null", "has a NoneType where an object is expected"),
    ("not UTF-8", b'{"vision_config": "\xff"}', "is not valid JSON"),
    ("vision is null", b'{"vision_config": null}', "is a NoneType, need an object"),
    ("other words", b'{"vision_config": {"width": 32}}', "describes another network: hidden_size"),
]))
def test_configs_of_sources(hub, tmp_path, content, message):
    for name, load in (("sam", pretrained.load_sam), ("clip", pretrained.load_clip)):
        source = copy_of(hub, name, tmp_path)
        os.remove(os.path.join(source, "config.json"))
        if content is not None:
            Path(source, "config.json").write_bytes(content)
        model = random_model(1)
        refused(lambda: load(model, source), model, message)


# -----------------------------------------------------------------------------
# nanochat's weights

WTE = "transformer.wte.weight"
HEAD = "lm_head.weight"


def nanochat_tensors(source):
    return torch.load(os.path.join(source, "model_000650.pt"), weights_only=True)


def refused_pt(hub, tmp_path, content, message):
    """content: what is saved as model_*.pt, or its bytes."""
    source = copy_of(hub, "d32", tmp_path)
    if callable(content):
        content = content(nanochat_tensors(source))
    path = os.path.join(source, "model_000650.pt")
    if isinstance(content, bytes):
        Path(path).write_bytes(content)
    else:
        torch.save(content, path)
    cfg, _ = pretrained.nanochat_config(source)
    gpt = GPT(cfg)
    refused(lambda: pretrained.load_nanochat(gpt, source), gpt, message)


def pt_with(key, value):
    return lambda tensors: {**tensors, key: value}


PLAIN = "is not a plain file of tensors"


@pytest.mark.parametrize("content, message", named([
    ("empty", b"", PLAIN),
    ("text", b"model", PLAIN),
    ("a zip that is cut", b"PK\x03\x04" + bytes(40), PLAIN),
    ("a plain pickle", pickle.dumps({WTE: 1}), PLAIN),
    ("a list", [torch.zeros(2)], "has a list, need a dict of tensors"),
    ("a tensor", torch.zeros(2), "has a Tensor, need a dict of tensors"),
    ("int keys", {0: torch.zeros(2)}, "under the key 0"),
    ("a string", pt_with(WTE, "/etc/hosts"), "has a str under the key 'transformer.wte.weight'"),
    ("none", pt_with(WTE, None), "has a NoneType under the key"),
    ("a dict", pt_with(WTE, {"weight": torch.zeros(2)}), "has a dict under the key"),
    ("sparse", pt_with(WTE, torch.zeros(VOCAB, 256).to_sparse()), "is not a dense tensor"),
    ("no data", pt_with(WTE, torch.zeros(VOCAB, 256, device="meta")), "is not a dense tensor"),
    ("shape bomb", pt_with(WTE, torch.zeros(1).expand(10 ** 12, 256)), "has the shape"),
    ("0-D table", pt_with(WTE, torch.tensor(1.0)), "has the shape ()"),
    ("1-D table", pt_with(WTE, torch.zeros(VOCAB)), "has the shape"),
    ("two rows short", pt_with(HEAD, torch.zeros(VOCAB - 1, 256)), "lm_head.weight has the shape"),
    ("a row too many", pt_with(WTE, torch.zeros(VOCAB + 2, 256)), "wte.weight has the shape"),
    ("integers", pt_with(HEAD, torch.ones(VOCAB, 256, dtype=torch.int8)), "lm_head.weight"),
    ("integers of the right size", pt_with(HEAD, torch.ones(VOCAB + 1, 256, dtype=torch.int8)),
     "is of torch.int8"),
    ("float8", pt_with(HEAD, torch.ones(VOCAB + 1, 256).to(torch.float8_e5m2)), "float8_e5m2"),
    ("complex", pt_with(HEAD, torch.ones(VOCAB + 1, 256) * 1j), "is of torch.complex64"),
    ("overflow", pt_with(HEAD, torch.ones(VOCAB, 256).double() * 1e300), "too large for"),
    ("nan in the last", pt_with(HEAD, torch.full((VOCAB, 256), float("nan"))), "not finite"),
    ("twice", pt_with("_orig_mod." + HEAD, torch.zeros(VOCAB, 256)), "has lm_head.weight twice"),
    ("another key", pt_with("value_embeds.0.weight", torch.zeros(2)), "are unknown"),
]))
def test_pt_files(hub, tmp_path, content, message):
    refused_pt(hub, tmp_path, content, message)


def test_pt_cut_in_the_middle(hub, tmp_path):
    whole = Path(copy_of(hub, "d20", tmp_path), "model_000650.pt").read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 1):
        folder = tmp_path / str(length)
        folder.mkdir()
        refused_pt(hub, folder, whole[:length], PLAIN)


def test_pt_in_the_old_format(hub, tmp_path):
    """Which is a chain of pickles, not a zip."""
    path = tmp_path / "old.pt"
    torch.save({WTE: torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    refused_pt(hub, tmp_path, path.read_bytes(), PLAIN)


# -----------------------------------------------------------------------------
# nanochat's sizes and tokenizer

@pytest.mark.parametrize("sizes, message", named([
    ("null", {"n_layer": None}, "n_layer is None, must be an integer"),
    ("text", {"n_embd": "256"}, "n_embd is '256', must be an integer"),
    ("fraction", {"n_head": 2.0}, "n_head is 2.0, must be an integer"),
    ("boolean", {"n_layer": True}, "n_layer is True, must be an integer"),
    ("infinite", {"sequence_len": float("inf")}, "sequence_len is inf, must be an integer"),
    ("negative", {"vocab_size": -1}, "vocab_size is -1, must be an integer"),
    ("zero", {"n_kv_head": 0}, "has a size of zero"),
    ("bomb", {"sequence_len": 10 ** 12}, "sequence_len is 1000000000000"),
    ("bomb in two", {"n_embd": 2 ** 19, "n_head": 2 ** 12}, "more than any published nanochat"),
    ("heads", {"n_head": 4}, "n_embd 256 / n_head 4 is not 128"),
    ("kv heads", {"n_head": 2, "n_kv_head": 3}, "is not a multiple of n_kv_head 3"),
    ("a newer nanochat", {"window_pattern": "L"}, "another nanochat than October 2025's"),
    ("vocabulary", {"vocab_size": 100}, "the model 100"),
]))
def test_sizes_of_nanochat(hub, tmp_path, sizes, message):
    source = copy_of(hub, "d20", tmp_path)
    path = Path(source, "meta_000650.json")
    meta = json.loads(path.read_text())
    meta["model_config"].update(sizes)
    path.write_text(json.dumps(meta))
    refused(lambda: pretrained.nanochat_config(source), torch.nn.Identity(), message)


@pytest.mark.parametrize("content, message", named([
    ("empty", "", "is not valid JSON"),
    ("null", "null", "has a NoneType where an object is expected"),
    ("no sizes", '{"step": 1}', "lacks the key 'model_config'"),
    ("sizes are null", '{"model_config": null}', "model_config is None"),
    ("sizes are a list", '{"model_config": [1]}', "model_config is [1]"),
    ("digits without end", '{"model_config": ' + "9" * 5000 + "}", "is not valid JSON"),
]))
def test_meta_of_nanochat(hub, tmp_path, content, message):
    source = copy_of(hub, "d20", tmp_path)
    Path(source, "meta_000650.json").write_text(content)
    refused(lambda: pretrained.nanochat_config(source), torch.nn.Identity(), message)


def encoding_bytes(state):
    """A pickle of a tiktoken Encoding with any state, in the opcodes that a real one has."""
    body = pickle.dumps(state, protocol=4)[2:-1]  # without PROTO and STOP
    return b"\x80\x04ctiktoken.core\nEncoding\n)\x81" + body + b"b."


def state_with(**changes):
    return {"name": "x", "pat_str": ".", "mergeable_ranks": RANKS, "special_tokens": SPECIAL_IDS,
            **changes}


NO_BOS = {name: i for name, i in SPECIAL_IDS.items() if name != "<|bos|>"}
NO_BOS["<|other|>"] = SPECIAL_IDS["<|bos|>"]
FEWER_BYTES = {bytes([i]): i for i in range(255)} | {b"th": 255, b"the": 256, b"them": 257}
IT_IS_NOT = "is not a nanochat tokenizer: "


@pytest.mark.parametrize("content, message", named([
    ("empty", b"", IT_IS_NOT),
    ("cut", encoding_bytes(state_with())[:-20], IT_IS_NOT),
    ("a dict", pickle.dumps({}), IT_IS_NOT),
    ("no state", b"\x80\x04ctiktoken.core\nEncoding\n)\x81.", IT_IS_NOT),
    ("state is a list", encoding_bytes([1, 2]), IT_IS_NOT),
    ("no pattern", encoding_bytes({"mergeable_ranks": RANKS, "special_tokens": SPECIAL_IDS}),
     IT_IS_NOT + "'pat_str'"),
    ("pattern is a number", encoding_bytes(state_with(pat_str=5)), IT_IS_NOT),
    ("pattern is none", encoding_bytes(state_with(pat_str="(")), IT_IS_NOT),
    ("text for bytes", encoding_bytes(state_with(mergeable_ranks={"a": 0})), "ranks has 'a'"),
    ("fractions", encoding_bytes(state_with(mergeable_ranks={b"a": 0.0})), "ranks has b'a'"),
    ("bytes for text", encoding_bytes(state_with(special_tokens={b"a": 258})), "tokens has b'a'"),
    ("ranks are null", encoding_bytes(state_with(mergeable_ranks=None)), IT_IS_NOT),
    ("no ranks", encoding_bytes(state_with(mergeable_ranks={})), IT_IS_NOT),
    ("a gap", encoding_bytes(state_with(special_tokens={"<|bos|>": 300})), "ids are not 0, 1, 2"),
    ("special first", encoding_bytes(state_with(
        mergeable_ranks={bytes([i]): i + 1 for i in range(256)}, special_tokens={"<|bos|>": 0})),
     "special tokens are not the last"),
    ("no bos", encoding_bytes(state_with(special_tokens=NO_BOS)), "the tokenizer has no <|bos|>"),
    ("a byte missing", encoding_bytes(state_with(mergeable_ranks=FEWER_BYTES)), "256 single bytes"),
    ("length bomb", b"\x80\x04\x8e" + struct.pack("<Q", 2 ** 62) + b"x", IT_IS_NOT),
    ("memo bomb", b"\x80\x04Nr" + struct.pack("<I", 2 ** 32 - 2) + b".", IT_IS_NOT),
    ("a call", pickle.dumps(Hostile("it_ran")), "only tiktoken.core.Encoding is admitted"),
    ("builtins", b"\x80\x04cbuiltins\neval\n(V1\ntR.", "only tiktoken.core.Encoding is admitted"),
    ("an argument", b"\x80\x04ctiktoken.core\nEncoding\n(VX\ntR.", IT_IS_NOT),
]))
def test_tokenizers_of_nanochat(hub, tmp_path, monkeypatch, content, message):
    source = copy_of(hub, "d20", tmp_path)
    monkeypatch.chdir(tmp_path)  # where "it_ran" would be
    Path(source, "tokenizer.pkl").write_bytes(content)
    refused(lambda: pretrained.nanochat_config(source), torch.nn.Identity(), message)
    assert not Path("it_ran").exists()


def test_the_pickles_above_are_the_kind_that_is_read(hub, tmp_path):
    source = copy_of(hub, "d20", tmp_path)
    Path(source, "tokenizer.pkl").write_bytes(encoding_bytes(state_with()))
    _, tokenizer = pretrained.nanochat_config(source)
    assert tokenizer.encode("the") == [116, 104, 101]  # its pattern cuts after every character


# -----------------------------------------------------------------------------
# Our own folders

@pytest.fixture
def folder(model, tokenizer, tmp_path):
    """A saved model without checksums: as somebody else would have written it."""
    model.tokenizer = tokenizer
    model.meta = META
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/sha256.json").unlink()
    return tmp_path / "saved"


def refused_folder(folder, message):
    refused(lambda: ckpt.load_model(folder, "cpu"), torch.nn.Identity(), message)


@pytest.mark.parametrize("part, key, value, message", named([
    ("null", "sam", "width", None, "sam: width is None, must be an integer"),
    ("text", "gpt", "n_embd", "32", "gpt: n_embd is '32', must be an integer"),
    ("fraction", "second_stage", "width", 32.0, "second_stage: width is 32.0, must be an integer"),
    ("no width", "second_stage", "width", None, "config.json is not a valid config ("),
    ("no heads", "sam", "n_head", 0, "config.json is not a valid config ("),
    ("no patch", "sam", "patch_size", 0, "config.json is not a valid config ("),
    ("another width", "gpt", "n_embd", 64, "of another shape"),
    ("deep bomb", "gpt", "n_layer", 2 ** 20, "describes 1048579 blocks, model.safetensors has no"),
    ("wide bomb", "second_stage", "ffn", 2 ** 20, "of another shape"),
    ("long bomb", "gpt", "sequence_len", 10 ** 12, "gpt: sequence_len is 1000000000000"),
    ("another kind", "second_stage", "kind", "siglip", "config.json is not a valid config ("),
    ("kind is a list", "second_stage", "kind", [], "config.json is not a valid config ("),
    ("missing", "sam", "neck", "DELETE", "SAMConfig: unknown keys [], missing keys ['neck']"),
]))
def test_sizes_of_a_config(folder, part, key, value, message):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config[part][key] = value
    if value == "DELETE":
        del config[part][key]
    path.write_text(json.dumps(config))
    refused_folder(folder, message)


@pytest.mark.parametrize("key, value, message", named([
    ("modes are null", "modes", None, "config.json is not a valid config ("),
    ("mode unknown", "modes", ["sideways"], "'sideways'"),
    ("sam is null", "sam", None, "sam is None, need an object"),
    ("gpt is a list", "gpt", [], "gpt is [], need an object"),
    ("image token", "image_token_id", 3, "they are not of the same model"),
    ("another key", "dropout", 0.1, "ModelConfig: unknown keys ['dropout']"),
]))
def test_the_rest_of_a_config(folder, key, value, message):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config[key] = value
    path.write_text(json.dumps(config))
    refused_folder(folder, message)


@pytest.mark.parametrize("name", ["config.json", "meta.json", "sha256.json"])
def test_json_files(folder, name):
    for content, message in (("", "is not valid JSON"), ("{", "is not valid JSON"),
                             ("[]", "where an object is expected"), ("[" * 100_000, "is not valid"),
                             ('"\\ud800"', "where an object is expected")):
        (folder / name).write_text(content)
        refused_folder(folder, name)
        refused_folder(folder, message)


@pytest.mark.parametrize("missing", ["<|bos|>", "<|image|>", "<|assistant_end|>"])
def test_a_tokenizer_without_what_conversations_need(folder, missing):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    names = [name if name != missing else "<|other|>" for name in SPECIAL_TOKENS]
    path.write_text(json.dumps({**content, "special_tokens": names}))
    refused_folder(folder, f"the tokenizer has no {missing}")


def test_a_tokenizer_of_another_model(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "ranks": content["ranks"][:-1]}))
    refused_folder(folder, "they are not of the same model")


def test_weights_of_a_folder(folder):
    path = folder / "model.safetensors"
    for content in (b"", b"abc", header(HUGE)):
        path.write_bytes(content)
        refused_folder(folder, f"{NOT_COMPLETE}")
    path.unlink()
    refused_folder(folder, "no model_<step> checkpoint there")
