"""
Proves that a run folder is only ever continued by what it was begun with: flags, data, tokenizer
and batch; and that damaged records are named, skipped and counted.

    python -m pytest tests/test_run.py
"""
import argparse
import errno
import fcntl
import importlib.util
import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from PIL import Image

from nanochat import checkpoint as ckpt
from nanochat import common
from nanochat.common import compute_init, run_main
from nanochat.dataloader import micro_batches
from nanochat.loop import StepResult, account, watch_divergence
from nanochat.mixture import Mixture, Shuffled, fingerprints
from nanochat.run import Run, samples_per_step
from scripts import vis_tok_train, vision_eval
from tasks.folder import Folder
from tasks.synthchat import SynthChat


def make_args(folder, *flags):
    return vis_tok_train.parse_args([f"--checkpoints={folder}", "--model-tag=run", *flags])


@pytest.fixture
def begun(tmp_path, tokenizer):
    """The folder of a run that has begun, and has logged three steps."""
    run = begin(tmp_path, tokenizer)
    for step in range(3):
        run.record(step, {"train/loss": 5.0 - step})
    return tmp_path / "run"


def begin(folder, tokenizer, *flags):
    """A Run that has begun, and whose process has ended."""
    run = Run(make_args(folder, *flags), "stage 1")
    run.check_data({})
    run.begin(tokenizer, argparse.Namespace(name="64px"))
    run.lock_file.close()
    (folder / "run/model_000003").mkdir()  # a checkpoint, by its name
    return run


def resume(folder, *flags):
    return Run(make_args(folder, "--resume", *flags), "stage 1")


# -----------------------------------------------------------------------------
# Before anything is written

def test_wandb_is_asked_for_before_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # wandb is not installed
    with pytest.raises(ValueError, match="--run=mine logs to Weights & Biases.*pip install wandb"):
        Run(make_args(tmp_path, "--run=mine"), "stage 1")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="pip install wandb"):
        vision_eval.parse_args(["--run=mine"])


def test_a_fork_does_not_hold_the_lock(tmp_path, tokenizer):
    """A worker of the loader outlives a killed run by seconds, in which it can be resumed."""
    run = Run(make_args(tmp_path), "stage 1")
    run.begin(tokenizer, argparse.Namespace(name="64px"))
    with pytest.raises(ValueError, match="is being trained by another process"):
        Run(make_args(tmp_path, "--resume"), "stage 1").lock()
    begun, says_begun = os.pipe()
    worker = os.fork()
    if not worker:
        os.write(says_begun, b"x")
        signal.pause()
    os.read(begun, 1)
    try:
        run.lock_file.close()  # as when the process is killed
        Run(make_args(tmp_path, "--resume"), "stage 1").lock()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


# -----------------------------------------------------------------------------
# What a resumed run may change

def test_less_memory_may_be_asked_for(begun, capsys):
    """The advice for a run that is out of memory, followed on --resume: the steps are the same."""
    run = resume(begun.parent, "--device-batch-size=16", "--recompute")
    assert run.config["total_batch_size"] == samples_per_step(run.args) == 32
    out = capsys.readouterr().out
    assert "--device-batch-size was 32, now 16" in out and "same 32 samples" in out
    assert "--recompute was False, now True: the same numbers up to rounding" in out
    resume(begun.parent, "--compile=no")  # the way out when a compiled kernel fails
    assert "--compile was auto, now no: the same numbers" in capsys.readouterr().out
    resume(begun.parent, "--device-batch-size=16", "--total-batch-size=32")
    with pytest.raises(ValueError, match="--total-batch-size was 32, now 16"):
        resume(begun.parent, "--device-batch-size=16", "--total-batch-size=16")
    with pytest.raises(ValueError, match="=32 is not a multiple of one pass: 10 x 1"):
        resume(begun.parent, "--device-batch-size=10")


@pytest.mark.parametrize("flags", [["--resume"], []])
def test_a_run_that_failed_before_its_first_checkpoint_holds_on_to_nothing(begun, capsys, flags):
    with pytest.raises(FileExistsError, match="--resume continues it"):
        Run(make_args(begun.parent, "--lr=0.1"), "stage 1")
    (begun / "model_000003").rmdir()
    run = Run(make_args(begun.parent, "--lr=0.1", "--device-batch-size=4", *flags), "stage 1")
    assert run.start is None and run.config["total_batch_size"] == 4
    run.check_data({"Folder": "9 pages, cd"})
    assert "no whole checkpoint: starting from the beginning" in capsys.readouterr().out


def test_a_stream_keeps_its_micro_batch(tmp_path, tokenizer):
    begin(tmp_path, tokenizer, "--stream", "--data=chartqa")
    with pytest.raises(ValueError, match="was 32, now 16, and a stream .* use --recompute"):
        resume(tmp_path, "--stream", "--data=chartqa", "--device-batch-size=16")


def test_micro_batches_of_another_size_have_the_same_samples_in_a_step():
    step = 7
    for size in (32, 16, 4):
        accumulate = 32 // size
        batches = list(micro_batches(step * accumulate, (step + 1) * accumulate, size, 0, 1))
        assert sorted(i for batch in batches for i in batch) == list(range(7 * 32, 8 * 32))


def test_encoders_without_their_models_are_not_deleted(tmp_path):
    """Of a stage 1 whose models were deleted to make room: stage 2 still needs its encoder."""
    (tmp_path / "run/deepencoder_000003").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="holds encoders without their models"):
        Run(make_args(tmp_path), "stage 1")
    # What a killed first save leaves is an encoder, too.
    (tmp_path / "run/run.json").write_text("{}")
    Run(make_args(tmp_path), "stage 1")


def test_what_a_kill_kept_from_being_pruned(begun, tokenizer):
    """A run that was killed between its last save and the pruning saves nothing more."""
    for step in (1, 2, 3):
        (begun / f"model_{step:06d}").mkdir(exist_ok=True)
        (begun / f"deepencoder_{step:06d}").mkdir()
    (begun / "model_000001").rmdir()
    run = resume(begun.parent)
    run.state.best_saved_step = 3  # as run.load would find it
    run.begin(tokenizer, argparse.Namespace(name="64px"))
    assert ckpt.steps_of(begun) == ckpt.steps_of(begun, "deepencoder") == [2, 3]


# -----------------------------------------------------------------------------
# Data

@pytest.fixture
def pages_folder(tmp_path):
    folder = tmp_path / "pages"
    (folder / "more").mkdir(parents=True)
    for i in range(8):
        path = folder / ("more" if i % 2 else "") / f"{i}.png"
        Image.new("L", (40 + i, 30)).save(path)
        path.with_suffix(".txt").write_text(f"text {i}")
    return folder


def mark(folder):
    task = Mixture([(Shuffled(Folder(folder), 100, 0), 3), (SynthChat("train", 9), 1)])
    return fingerprints(task, SynthChat("train", 9))


def test_what_the_fingerprint_of_a_folder_tells(pages_folder, tmp_path):
    before = mark(pages_folder)
    assert list(before) == ["Folder"] and before["Folder"].startswith("8 pages, ")
    copy = tmp_path / "copy"
    shutil.copytree(pages_folder, copy)
    os.utime(copy / "0.png", (1, 1))
    (copy / "Thumbs.db").write_text("not a page")
    assert mark(copy) == before
    for name, content in {"0.txt": "text 9", "more/1.png": (copy / "0.png").read_bytes()}.items():
        old = (copy / name).read_bytes()
        (copy / name).write_bytes(content.encode() if isinstance(content, str) else content)
        assert mark(copy) != before, name
        (copy / name).write_bytes(old)
    (copy / "0.png").rename(copy / "8.png")
    (copy / "0.txt").rename(copy / "8.txt")
    assert mark(copy) != before


def test_data_that_changed_are_refused_on_resume(begun):
    config = json.loads((begun / "run.json").read_text())
    config["data_fingerprints"] = {"Folder": "8 pages, ab"}
    (begun / "run.json").write_text(json.dumps(config))
    resume(begun.parent).check_data({"Folder": "8 pages, ab"})
    with pytest.raises(ValueError, match="Folder was 8 pages, ab, now 9 pages, cd.*put them back"):
        resume(begun.parent).check_data({"Folder": "9 pages, cd"})
    with pytest.raises(ValueError, match="Folder was 8 pages, ab, now None"):
        resume(begun.parent).check_data({})


def test_a_file_system_without_locks_is_said(tmp_path, tokenizer, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", flock)
    begin(tmp_path, tokenizer)
    assert "cannot be locked ([Errno 38] Function not implemented)" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# Damaged files

def test_damaged_lines_of_metrics_are_skipped_and_counted(begun, capsys):
    metrics = begun / "metrics.jsonl"
    sound = metrics.read_text()
    bad_lines = ['{"step": 3, "tra', "null", '{"train/loss": 1}', '{"step": "x"}', "\0\0\0"]
    later = ['{"step": 3, "train/loss": 2.0}', '{"step": 4']  # the last one is cut off
    metrics.write_text(sound + "\n".join(bad_lines + later))
    records = resume(begun.parent).metrics()
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert f"5 damaged lines of {metrics}" in capsys.readouterr().out


@pytest.mark.parametrize("text", [
    "", "{", "[]", "7", "\udcff", "{}", '{"total_batch_size": "x", "device_batch_size": 32}',
    '{"total_batch_size": 0, "device_batch_size": 32, "data_fingerprints": {}}',
    '{"total_batch_size": 32, "device_batch_size": -1, "data_fingerprints": {}}',
    '{"total_batch_size": 32, "device_batch_size": 32, "data_fingerprints": [1]}',
])
def test_a_damaged_run_json_is_named(begun, text):
    (begun / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="run/run.json.* delete it to resume without comparing"):
        resume(begun.parent)


# -----------------------------------------------------------------------------
# Counting

def test_compiling_does_not_count_as_training(tmp_path, tokenizer):
    """It would use up --max-minutes."""
    run = begin(tmp_path, tokenizer)
    step = StepResult(losses={"text": 1.0}, grad_norm=1.0, seconds=60.0, waited=1.0, flops=5.0,
                      counts={"images": 4}, streams={}, compiling=True)
    account(run, step)
    assert (run.state.seconds, run.state.timed_images, run.state.flops) == (0, 0, 5)
    account(run, replace(step, compiling=False))
    assert (run.state.seconds, run.state.timed_images, run.state.flops) == (60, 4, 10)


@pytest.fixture
def two_gpus(monkeypatch):
    """torchrun's environment of two processes, on a machine with a GPU by all appearances."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(common, "set_cuda_defaults", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = {}

    def init_process_group(backend, **kwargs):
        asked.update(backend=backend, **kwargs)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    return asked


def test_the_process_group_of_gpus(two_gpus):
    device = compute_init("cuda")
    assert two_gpus["backend"] == "cpu:gloo,cuda:nccl"  # numbers of the host stay on the host
    assert two_gpus["device_id"] == device and two_gpus["timeout"].total_seconds() == 7200


def test_more_processes_than_gpus(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 1 .* use torchrun --nproc_per_node=1"):
        compute_init("cuda")


# -----------------------------------------------------------------------------
# Runs that cannot succeed

def test_a_run_that_has_diverged_says_so(tmp_path, tokenizer, capsys):
    """Finite, and far above log(300) = 5.7 nats: nothing else would stop it."""
    run = begin(tmp_path, tokenizer)
    capsys.readouterr()
    for _ in range(49):
        watch_divergence(run, 17.8)
    watch_divergence(run, 5.7)  # as a fresh model
    for _ in range(49):
        watch_divergence(run, 17.8)
    assert capsys.readouterr().out == ""
    watch_divergence(run, 17.8)
    out = capsys.readouterr().out
    assert out.startswith("!!!!") and "has been above 6.84 for 50 steps" in out
    assert "lower\n--lr and --matrix-lr" in out


@pytest.mark.parametrize("flags, parts", [
    (["--freeze=sam,clip,gpt"], "sam, clip, gpt"),
    (["--freeze=gpt,sam", "--sam=x"], "gpt"),
    (["--freeze=clip,gpt,compressor", "--gpt=x", "--clip=x"], "compressor"),
])
def test_random_parts_are_not_frozen(tmp_path, flags, parts):
    args = make_args(tmp_path, *flags)
    with pytest.raises(ValueError, match=f": {parts} would keep random weights"):
        vis_tok_train.check_frozen(args.freeze.split(","), args)
    loaded = make_args(tmp_path, "--freeze=sam,clip,gpt", "--encoder=x", "--gpt=x")
    vis_tok_train.check_frozen(loaded.freeze.split(","), loaded)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nAnd more"),
    MemoryError(),
])
def test_out_of_memory_says_what_to_do(capsys, error):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "And more" not in err and "Traceback" not in err
    assert "halve the batch (--device-batch-size" in err and "--resume" in err


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), NotImplementedError("no")])
def test_other_errors_keep_their_traceback(error):
    def main():
        raise error
    with pytest.raises(type(error)):
        run_main(main)


def test_a_full_disk_says_what_to_do(capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl")
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "run/metrics.jsonl" in err
    assert "make room: training then goes on with --resume" in err


def test_a_missing_package_says_how_to_get_it(capsys):
    def main():
        import no_such_package.part  # noqa: F401
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1
    assert "needs the package no_such_package" in err and "-m pip install no_such_package" in err
