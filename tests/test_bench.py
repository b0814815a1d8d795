"""
Proves that the benchmarks that only run on real machines do run, on the tiny preset: their figures are numbers.

python -m pytest tests/test_bench.py
"""
import json

import pytest
import torch

from nanochat import common, config
from nanochat.common import choose_compile
from nanochat.model import forward_flops
from scripts import bench, memory


def test_bench_prints_a_line_for_each_run(capsys):
    bench.main(["--preset=tiny", "--device-type=cpu", "--dtype=float32", "--batch=8", "--seq=24", "--new-tokens=40", "--repeats=1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [r["bench"] for r in lines] == ["stage1", "stage2", "generate"] and all(r["seconds"] > 1e-4 for r in lines)
    assert all(0.8 < r["flops_over_torch"] < 1.05 for r in lines) and lines[2]["bandwidth_share"] > 0


def test_memory_knows_what_batch_length_and_recomputation_do(capsys):
    memory.main(["--preset=tiny", "--mode=test", "--stage=1", "--batches=2,64", "--seqs=128,256"])
    rows = {(r["seq"], r["batch"]): r for r in json.loads(capsys.readouterr().out.splitlines()[-1])["memory"]}
    assert rows[256, 64]["gb"] > rows[128, 64]["gb"] > rows[128, 2]["gb"] and rows[256, 64]["gb_recompute"] < rows[256, 64]["gb"]


def test_bench_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="takes 7 positions"):
        bench.main(["--preset=tiny", "--device-type=cpu", "--seq=7"])


def test_suite_goes_on_past_a_row_that_fails(monkeypatch, tmp_path, capsys):
    good = "--preset=tiny --device-type=cpu --dtype=float32 --batch=8 --seq=24 --what=stage2 --repeats=1"
    path = tmp_path / "new" / "bench.jsonl"
    monkeypatch.setattr(bench, "SUITE", ("--preset=tiny --device-type=cpu --seq=7", good))
    for _ in range(2):  # the second time both rows are there
        with pytest.raises(ValueError, match="1 of 2 rows failed, .* --seq=7"):
            bench.main([f"--suite={path}"])
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert "takes 7 positions" in rows[0]["failed"] and rows[1]["flags"] == good and rows[1]["mfu"] > 0 and len(rows) == 2


def test_packed_rows_have_the_flops_of_their_samples():
    cfg = config.tiny()
    whole, packed = (sum(forward_flops(cfg, {64: 2}, 48, 1, lengths=lengths).values()) for lengths in (None, [[24, 24]]))
    assert whole - packed == cfg.gpt.n_layer * 2 * cfg.gpt.n_embd * (48 ** 2 - 2 * 24 ** 2)


def test_compile_needs_a_compiler(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(common.shutil, "which", lambda name: "/usr/bin/gcc" if name in ("gcc", "g++") else None)
    assert [choose_compile(cpu), choose_compile(cpu, "yes"), choose_compile(cuda), choose_compile(cuda, "no")] == [False, True, True, False]
    monkeypatch.setattr(common.shutil, "which", lambda name: None)
    assert not choose_compile(cuda)
    with pytest.raises(ValueError, match="--compile=yes needs a C"):
        choose_compile(cuda, "yes")
