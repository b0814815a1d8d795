"""
Proves that a checkpoint comes back bit for bit, that one half-written is no checkpoint, and that one which does not fit, is
damaged or finds no room is refused by name before anything is lost.

python -m pytest tests/test_checkpoint.py
"""

import json
import os
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint as ckpt
from nanochat.config import PRESETS, ModelConfig
from nanochat.reader import NanoDeepseekOCR
from nanochat.optim import Optimizer

META = {"world_size": 1, "mode": "test", "user_config": {"chars": "10-12"}}


@pytest.fixture
def trained(model, make_batch, pages):
    """(model, optimizer) after one step, so that both have a state."""
    optimizer = Optimizer(model.train(), "muon", lr=1e-3)
    model(make_batch(pages))["text"][0].backward()
    optimizer.step(1.0)
    return model, optimizer


@pytest.fixture
def saved(trained, tokenizer, tmp_path):
    """Run folder with a full checkpoint of step 3 and its encoder."""
    ckpt.save_checkpoint(tmp_path, 3, trained[0], tokenizer, trained[1], META)
    ckpt.save_encoder(tmp_path, 3, trained[0], META)
    return tmp_path


def assert_equal(a, b):
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_round_trip(saved, trained, tokenizer, make_model):
    model, optimizer = trained
    loaded, their_tokenizer, meta = ckpt.load_model(saved, torch.device("cpu"))
    assert_equal(loaded.state_dict(), model.state_dict())
    assert not loaded.training and loaded.cfg == model.cfg and meta == {**META, "step": 3}
    assert their_tokenizer.fingerprint() == tokenizer.fingerprint()
    other = make_model(1)
    other_optimizer = Optimizer(other, "muon", lr=1e-3)
    assert ckpt.load_training_state(saved, 3, other, other_optimizer) == meta
    assert_equal(other.state_dict(), model.state_dict())
    assert_equal(other_optimizer.state_tensors(), optimizer.state_tensors())


def test_encoder_alone(saved, trained, make_model):
    other = make_model(1)
    decoder = {name: t.clone() for name, t in other.gpt.state_dict().items()}
    ckpt.load_encoder(saved, other)
    assert_equal(other.encoder.state_dict(), trained[0].encoder.state_dict())
    assert_equal(other.gpt.state_dict(), decoder)  # nothing else moved


@pytest.mark.parametrize("part, value", [("sam", {"depth": 3}), ("second_stage", {"ffn": 32}), ("standardize", "channel")])
def test_an_encoder_of_another_config_is_refused(saved, cfg, part, value):
    if isinstance(value, dict):
        for key, number in value.items():
            setattr(getattr(cfg, part), key, number)
    else:
        setattr(cfg, part, value)
    with pytest.raises(ValueError, match=f"was trained with {part}=.*use the same preset"):
        ckpt.load_encoder(saved, NanoDeepseekOCR(cfg))


def test_the_last_whole_checkpoint_is_found(saved, trained, tokenizer):
    ckpt.save_checkpoint(saved, 12, *trained[:1], tokenizer, trained[1], META)
    os.makedirs(saved / "model_000020.tmp")  # what a killed run leaves
    assert ckpt.steps_of(saved) == [3, 12] and ckpt.resolve(saved) == str(saved / "model_000012")
    assert ckpt.resolve(saved / "model_000003") == saved / "model_000003"
    with pytest.raises(FileNotFoundError, match="no model_<step> checkpoint there; train one first"):
        ckpt.resolve(saved / "nothing")


def test_a_run_killed_while_saving_keeps_what_it_had(saved, trained, tokenizer, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(tokenizer, "save", killed)  # the weights are written by then
    with pytest.raises(KeyboardInterrupt):
        ckpt.save_checkpoint(saved, 6, trained[0], tokenizer, trained[1], META)
    monkeypatch.undo()
    assert ckpt.steps_of(saved) == [3] and (saved / "model_000006.tmp").is_dir()
    ckpt.save_checkpoint(saved, 6, trained[0], tokenizer, trained[1], META)
    assert ckpt.steps_of(saved) == [3, 6] and not (saved / "model_000006.tmp").exists()
    assert_equal(load_file(saved / "model_000006/model.safetensors"), trained[0].state_dict())


@pytest.mark.parametrize("damage, message", [
    (lambda t: t.pop("image_newline"), r"1 keys missing \['image_newline'\]"),
    (lambda t: t.update(stowaway=torch.zeros(1)), r"1 unknown \['stowaway'\]"),
    (lambda t: t.update(image_newline=torch.zeros(7)), r"image_newline: file \(7,\), model \(32,\)"),
    (lambda t: t["image_newline"][3].fill_(float("nan")), "image_newline has values that are not finite"),
    (lambda t: t["encoder.standardize.var"][0].fill_(float("inf")), "encoder.standardize.var has values"),
], ids=["missing", "extra", "shape", "nan", "inf"])
def test_damaged_weights_are_refused(saved, make_model, damage, message):
    path = saved / "model_000003/model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        ckpt.load_model(saved, torch.device("cpu"))
    model = make_model(1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        ckpt.load_weights(model, tensors, "here")
    assert_equal(model.state_dict(), before)  # not half loaded


def test_another_number_of_processes_is_refused(saved, trained):
    path = saved / "model_000003/meta.json"
    path.write_text(json.dumps({**META, "step": 3, "world_size": 4}))
    with pytest.raises(ValueError, match="written by 4 processes, this run has 1"):
        ckpt.load_training_state(saved, 3, *trained)


def test_no_room_is_seen_before_writing(saved, trained, tokenizer, monkeypatch):
    monkeypatch.setattr(ckpt.shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(10_000_000))
    names = sorted(os.listdir(saved))
    with pytest.raises(OSError, match=r"needs \d+ MB, .* has 10 MB free: make room and --resume"):
        ckpt.save_checkpoint(saved, 6, trained[0], tokenizer, trained[1], META)
    assert sorted(os.listdir(saved)) == names


def test_prune(tmp_path):
    for name in ("model_000001", "model_000002", "model_000003", "model_000003.tmp", "deepencoder_000001", "run.json",
                 "model_notes", "eval_heldout"):
        (tmp_path / name).mkdir()
    ckpt.prune(tmp_path, {1, 3})
    assert sorted(os.listdir(tmp_path)) == ["deepencoder_000001", "eval_heldout", "model_000001", "model_000003",
                                            "model_notes", "run.json"]
    ckpt.prune(tmp_path, set(), "deepencoder")
    assert "deepencoder_000001" not in os.listdir(tmp_path) and "model_000001" in os.listdir(tmp_path)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_config_survives_json(preset):
    cfg = PRESETS[preset]()
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_a_config_of_another_version_is_refused(cfg):
    d = cfg.to_dict()
    d["sam"]["dropout"] = d["sam"].pop("neck")
    with pytest.raises(ValueError, match=r"SAMConfig: unknown keys \['dropout'\], missing keys \['neck'\]"):
        ModelConfig.from_dict(d)
