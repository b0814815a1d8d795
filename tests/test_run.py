"""
Proves that a run folder is only ever continued by what it was begun with: flags, data, tokenizer
and batch; and that damaged records are named, skipped and counted.

    python -m pytest tests/test_run.py
"""
import argparse

import pytest

from nanochat.run import Run
from scripts import vis_tok_train


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
    run.begin(tokenizer, argparse.Namespace(name="64px"))
    run.lock_file.close()
    return run


def resume(folder, *flags):
    return Run(make_args(folder, "--resume", *flags), "stage 1")


# -----------------------------------------------------------------------------
# Damaged files

def test_damaged_lines_of_metrics_are_skipped_and_counted(begun, capsys):
    metrics = begun / "metrics.jsonl"
    sound = metrics.read_text()
    bad_lines = ['{"step": 3, "tra', "null", '{"train/loss": 1}', '{"step": "x"}', "\0\0\0"]
    metrics.write_text(sound + "\n".join(bad_lines) + '\n{"step": 3, "train/loss": 2.0}\n{"step": 4')
    records = resume(begun.parent).metrics()
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert f"5 damaged lines of {metrics}" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "\udcff"])
def test_a_damaged_run_json_is_named(begun, text):
    (begun / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="run/run.json .*delete it to resume without comparing"):
        resume(begun.parent)
