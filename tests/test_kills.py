"""
Proves, in short, that a kill at any moment changes nothing of what a run leaves. The long form
takes hours: KILLS=1000 python -m tests.kill_campaign.

    python -m pytest tests/test_kills.py
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import kill_campaign

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("variant, kills", [("stage1", 3), ("stage1 ranks", 2)])
def test_a_few_kills(variant, kills):
    """In a process of its own, since it forks."""
    command = [sys.executable, "-m", "tests.kill_campaign", f"--kills={kills}",
               f"--variants={variant}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    record = json.loads(process.stdout.splitlines()[-1])
    assert record["differences"] == 0 and sum(record["kills"].values()) >= 1


def test_what_the_campaign_would_find(tmp_path):
    """It compares what it says it compares."""
    for name in ("a", "b"):
        folder = tmp_path / name / "model_000003"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        meta = {"user_config": {"resume": name}, "loop_state": {"seconds": name, "flops": 3.0}}
        (folder / "meta.json").write_text(json.dumps(meta))
        lines = [{"step": 0, "train/loss": 5.0, "train/dt": len(name)}, {"step": 1}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    a = tmp_path / "a"
    b = tmp_path / "b"
    assert kill_campaign.compare(a, b) == []

    def changed(name, content):
        before = (b / name).read_bytes()
        (b / name).write_bytes(content)
        found = kill_campaign.compare(a, b)
        (b / name).write_bytes(before)
        return found
    weights = "model_000003/model.safetensors"
    assert changed(weights, b"Weights") == [weights]
    other = b'{"step": 0, "train/loss": 5.1}\n{"step": 1}\n'
    assert changed("metrics.jsonl", other) == ["metrics.jsonl"]
    other = b'{"user_config": {}, "loop_state": {"seconds": 0, "flops": 4.0}}'
    assert changed("model_000003/meta.json", other) == ["model_000003/meta.json"]
    (b / "model_000004.tmp").mkdir()
    (b / "model_000004.tmp/x").touch()
    assert "files differ" in kill_campaign.compare(a, b)[0]
