"""
Proves that a checkpoint comes back bit for bit; that one which is incomplete, corrupted or of
another model is refused by name before anything is lost; and that a kill at any moment leaves a run
from which the same command goes on.

python -m pytest tests/test_checkpoint.py
"""
import json
import os
import resource
import shutil
import stat
import sys
from collections import namedtuple
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint as ckpt
from nanochat.config import PRESETS, ModelConfig
from nanochat.optim import Optimizer
from nanochat.reader import NEEDED, NanoDeepseekOCR
from nanochat.tokenizer import Tokenizer
from scripts import tok_train

META = {"world_size": 1, "mode": "64px", "user_config": {"chars": "10-12"}}
CPU = torch.device("cpu")


@pytest.fixture
def trained(model, make_batch, pages):
    """(model, optimizer) after one step, so that both have a state."""
    optimizer = Optimizer(model.train(), "muon", lr=1e-3)
    model(make_batch(pages))["text"][0].backward()
    optimizer.step(1.0)
    return model, optimizer


@pytest.fixture
def save(trained, tokenizer, tmp_path):
    """A function step: what a run of stage 1 does to save, in its run folder."""
    def save(step):
        model, optimizer = trained
        ckpt.save_encoder(tmp_path, step, model, META)
        ckpt.save_checkpoint(tmp_path, step, model, tokenizer, optimizer, META)
    return save


@pytest.fixture
def saved(save, tmp_path):
    """Run folder with a full checkpoint of step 3 and its encoder."""
    save(3)
    return tmp_path


def assert_equal(a, b):
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def listing(folder):
    """Every file under a folder."""
    found = []
    for path, _, names in os.walk(folder):
        found += [os.path.relpath(os.path.join(path, name), folder) for name in names]
    return sorted(found)


# -----------------------------------------------------------------------------
# There and back

def test_round_trip(saved, trained, tokenizer, make_model):
    model, optimizer = trained
    loaded, their_tokenizer, meta = ckpt.load_model(saved, CPU)
    assert_equal(loaded.state_dict(), model.state_dict())
    assert not loaded.training
    assert loaded.cfg == model.cfg
    assert meta == {**META, "step": 3}
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
    assert_equal(other.gpt.state_dict(), decoder)  # nothing else changed


def test_encoder_and_model_may_be_saved_in_either_order(saved, trained, tokenizer, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    model, optimizer = trained
    ckpt.save_checkpoint(other, 3, model, tokenizer, optimizer, META)
    ckpt.save_encoder(other, 3, model, META)
    for folder in ("model_000003", "deepencoder_000003"):
        sums = (other / folder / "sha256.json").read_text()
        assert sums == (saved / folder / "sha256.json").read_text()


def test_folders_without_checksums_load(saved, trained, make_model):
    (saved / "model_000003/sha256.json").unlink()
    (saved / "deepencoder_000003/sha256.json").unlink()
    ckpt.load_model(saved, CPU)
    ckpt.load_encoder(saved, make_model(1))
    ckpt.load_training_state(saved, 3, *trained)


def test_rank_0_alone_writes_and_every_rank_reads_it(saved, save, trained, make_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    before = listing(saved)
    save(6)
    assert listing(saved) == before
    with pytest.raises(ValueError, match="written by 1 processes, this run has 2"):
        ckpt.load_training_state(saved, 3, *trained)
    other = make_model(1)
    optimizer = Optimizer(other, "muon", lr=1e-3)
    ckpt.load_training_state(saved, 3, other, optimizer, allow_other_world_size=True)
    assert_equal(other.state_dict(), trained[0].state_dict())
    assert_equal(optimizer.state_tensors(), trained[1].state_tensors())


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_config_survives_json(preset):
    cfg = PRESETS[preset]()
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_the_tokenizer_is_the_one_trained_with(saved, tokenizer):
    """Another one of the same size would load, and turn every answer into other words."""
    folder = saved / "model_000003"
    (folder / "sha256.json").unlink()  # as if somebody had copied the file over
    meta = {**META, "step": 3, "tokenizer": tokenizer.fingerprint()}
    (folder / "meta.json").write_text(json.dumps(meta))
    ckpt.load_model(folder, CPU)
    ranks = [*tokenizer.ranks[:-2], tokenizer.ranks[-1], tokenizer.ranks[-2]]
    Tokenizer(ranks).save(folder)
    with pytest.raises(ValueError, match="tokenizer.json is not the tokenizer that this model was"):
        ckpt.load_model(folder, CPU)


@pytest.mark.parametrize("text", ["", "{", '{"ranks": 3}'])
def test_a_broken_tokenizer_of_a_checkpoint_is_not_to_be_trained_anew(saved, text):
    folder = saved / "model_000003"
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="copy it from another checkpoint") as e:
        Tokenizer.load(folder)
    assert "tok_train" not in str(e.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="copy it from another checkpoint") as e:
        Tokenizer.load(folder)
    assert "tok_train" not in str(e.value)
    with pytest.raises(SystemExit):
        tok_train.main([f"--out={folder}", "--overwrite"])
    assert not (folder / "tokenizer.json").exists()


@pytest.mark.parametrize("meta, reason", [
    ({"mode": "64px", "step": 3}, "lacks the key 'user_config'"),
    ({"mode": 7, "step": 3, "user_config": {}}, "mode is 7, need a str"),
    ({"mode": "64px", "step": 3, "user_config": []}, r"user_config is \[\], need a dict"),
])
def test_what_a_script_needs_of_meta_is_named(saved, meta, reason):
    folder = saved / "model_000003"
    (folder / "sha256.json").unlink()
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=rf"meta.json:? {reason}"):
        ckpt.load_model(folder, CPU, needed=NEEDED)


# -----------------------------------------------------------------------------
# Which one is found

def test_the_last_complete_checkpoint_is_found(saved, save):
    save(12)
    os.makedirs(saved / "model_000020.tmp")  # what a killed run leaves
    os.makedirs(saved / "model_000021.old")
    assert ckpt.steps_of(saved) == [3, 12]
    assert ckpt.resolve(saved) == str(saved / "model_000012")
    assert ckpt.resolve(saved / "model_000003") == saved / "model_000003"
    with pytest.raises(FileNotFoundError, match="no model_<step> checkpoint there; train one"):
        ckpt.resolve(saved / "nothing")


def test_an_older_encoder_than_the_runs_last_is_not_taken_silently(saved, save, make_model):
    save(12)
    shutil.rmtree(saved / "deepencoder_000012")
    with pytest.raises(ValueError, match="trained to step 12, but its last encoder is of step 3"):
        ckpt.load_encoder(saved, make_model(1))
    ckpt.load_encoder(saved / "deepencoder_000003", make_model(1))  # unless it is named


# -----------------------------------------------------------------------------
# What is refused

@pytest.mark.parametrize("part, value", [
    ("sam", {"depth": 3}),
    ("second_stage", {"ffn": 32}),
])
def test_an_encoder_of_another_config_is_refused(saved, cfg, part, value):
    for key, number in value.items():
        setattr(getattr(cfg, part), key, number)
    with pytest.raises(ValueError, match=f"was trained with {part}=.*use the same preset"):
        ckpt.load_encoder(saved, NanoDeepseekOCR(cfg))


def test_a_config_of_another_version_is_refused(cfg):
    d = cfg.to_dict()
    d["sam"]["dropout"] = d["sam"].pop("neck")
    with pytest.raises(ValueError, match=r"SAMConfig: unknown keys \['dropout'\], missing keys"):
        ModelConfig.from_dict(d)


DAMAGES = [
    (lambda t: t.pop("image_newline"), r"1 keys missing \['image_newline'\]"),
    (lambda t: t.update(stowaway=torch.zeros(1)), r"1 unknown \['stowaway'\]"),
    (lambda t: t.update(image_newline=torch.zeros(7)), r"image_newline: file \(7,\), model"),
    (lambda t: t.update(image_newline=t["image_newline"].int()), "image_newline is of torch.int32"),
    (lambda t: t["image_newline"][3].fill_(float("nan")), "image_newline has values that are not"),
    (lambda t: t["view_seperator"][0].fill_(float("inf")), "view_seperator has values"),
    (lambda t: t.update(image_newline=t["image_newline"].double() * 1e300), "too large for"),
]


@pytest.mark.parametrize("damage, message", DAMAGES,
                         ids=["missing", "extra", "shape", "int", "nan", "inf", "overflow"])
def test_weights_that_do_not_fit_are_refused(saved, make_model, damage, message):
    (saved / "model_000003/sha256.json").unlink()  # as somebody's own script would write it
    path = saved / "model_000003/model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        ckpt.load_model(saved, CPU)

    model = make_model(1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        ckpt.load_weights(model, tensors, "here")
    assert_equal(model.state_dict(), before)  # not half loaded


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[2 * len(content) // 3] ^= 4
    path.write_bytes(content)


def zero_a_page(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 4096] = bytes(len(content[middle:middle + 4096]))
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, zero_a_page, cut, os.unlink])
def test_every_corruption_is_named_and_the_checkpoint_before_offered(saved, save, trained, damage):
    """On resume every file counts, also those that a resuming run does not read."""
    save(6)
    folder = saved / "model_000006"
    before = {name: t.clone() for name, t in trained[0].state_dict().items()}
    for path in sorted(folder.iterdir()):
        if path.name == "sha256.json" and damage is os.unlink:
            continue  # then it is a folder without checksums, which is taken as it is
        good = path.read_bytes()
        damage(path)
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            ckpt.load_training_state(saved, 6, *trained)
        text = str(error.value)
        assert "model_000006" in text
        assert path.name in text
        assert f"the checkpoint before it is {saved}/model_000003" in text
        path.write_bytes(good)
    ckpt.load_training_state(saved, 6, *trained)
    assert_equal(trained[0].state_dict(), before)


def test_a_corrupted_file_is_named_by_whoever_reads_it(saved, make_model):
    for path in sorted((saved / "deepencoder_000003").iterdir()):
        good = path.read_bytes()
        flip_a_bit(path)
        with pytest.raises(ValueError, match=f"{path.name}.*there is no checkpoint before it"):
            ckpt.load_encoder(saved, make_model(1))
        path.write_bytes(good)
    flip_a_bit(saved / "model_000003/optim.safetensors")
    ckpt.load_model(saved, CPU)  # does not read it
    flip_a_bit(saved / "model_000003/tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json is corrupted"):
        ckpt.load_model(saved, CPU)


# -----------------------------------------------------------------------------
# Kills and full disks

class Killed(BaseException):
    pass


class Killer:
    """Raises Killed at the n-th time that something is to change under a folder."""
    EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"}

    def __init__(self):
        self.folder = None
        sys.addaudithook(self.hook)  # stays for good, so it can be switched off

    def hook(self, event, args):
        if self.folder is None or event not in self.EVENTS:
            return
        # rmtree names files by a descriptor of their folder, so these have relative names.
        relative = event in ("os.rmdir", "os.remove")
        if event == "open" and not set("wxa+") & set(args[1] or ""):
            return
        if relative or os.fspath(args[0]).startswith(self.folder):
            self.left -= 1
            if self.left == 0:
                raise Killed

    @contextmanager
    def at(self, n, folder):
        self.left = n
        self.folder = str(folder)
        try:
            yield
        finally:
            self.folder = None


def save_and_prune(save, run_dir, step):
    save(step)
    ckpt.prune(run_dir, {step})
    ckpt.prune(run_dir, {step}, "deepencoder")


def test_a_kill_at_any_moment_loses_nothing(saved, save):
    before = saved.parent / "before"
    shutil.copytree(saved, before)
    save_and_prune(save, saved, 6)
    unbroken = listing(saved)
    killer = Killer()
    moment = 0
    killed = True
    while killed:
        moment += 1
        shutil.rmtree(saved)
        shutil.copytree(before, saved)
        try:
            with killer.at(moment, saved):
                save_and_prune(save, saved, 6)
            killed = False
        except Killed:
            pass

        # Whatever has its final name is complete, and the last model has its encoder.
        for prefix in ("model", "deepencoder"):
            for step in ckpt.steps_of(saved, prefix):
                ckpt.verify(ckpt.checkpoint_dir(saved, step, prefix))
        last = ckpt.steps_of(saved)[-1]
        assert last in ckpt.steps_of(saved, "deepencoder"), moment

        # The resumed run comes to where the unbroken one is.
        ckpt.clear_leftovers(saved)
        if last == 3:
            save(6)
        ckpt.prune(saved, {6})
        ckpt.prune(saved, {6}, "deepencoder")
        assert listing(saved) == unbroken, moment
    assert moment > 15  # that many files and folders at least were written, renamed, deleted


def test_a_full_disk_leaves_what_was_there(saved, save):
    """A limit on the size of files stands in for the disk: writing beyond it fails likewise."""
    before = listing(saved)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1, 1000, 100_000):  # the first JSON file; the tokenizer; the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError):
                save(6)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert listing(saved) == before
    save(6)
    assert ckpt.steps_of(saved) == ckpt.steps_of(saved, "deepencoder") == [3, 6]


def disk_with(free):
    return namedtuple("Usage", "free")(free)


def test_no_room_is_seen_before_writing(saved, save, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk_with(1_000_000))
    before = listing(saved)
    with pytest.raises(OSError, match=r"needs \d+ MB, .* has 1 MB free: make room and --resume"):
        save(6)
    assert listing(saved) == before


def test_weights_may_be_read_by_whom_the_umask_lets(saved):
    """safetensors writes a file that its owner alone may read, among others that all may."""
    modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_room_is_counted_for_what_is_written_after_leftovers_are_gone(saved, save, monkeypatch):
    written = sum(path.stat().st_size for path in (saved / "model_000003").iterdir())
    os.makedirs(saved / "model_000002.tmp")

    def disk_usage(folder):
        full = (saved / "model_000002.tmp").exists()
        return disk_with(0 if full else written + 10_000_000)  # 10 MB for all JSON files
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    save(6)
    assert ckpt.steps_of(saved) == [3, 6]


def test_prune_and_leftovers(tmp_path):
    leftovers = ["model_000003.tmp", "model_000002.old", "deepencoder_000009.tmp"]
    others = ["run.json", "model_notes", "eval_heldout", "model_000003.tmp.mine"]
    for name in ["model_000001", "model_000002", "model_000003", "deepencoder_000001",
                 *leftovers, *others]:
        (tmp_path / name).mkdir()
    ckpt.clear_leftovers(tmp_path)
    ckpt.prune(tmp_path, {1, 3})
    kept = ["model_000001", "model_000003", "deepencoder_000001", *others]
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    ckpt.prune(tmp_path, set(), "deepencoder")
    kept.remove("deepencoder_000001")
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    ckpt.clear_leftovers(tmp_path / "not_there_yet")
