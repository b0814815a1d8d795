"""
Proves that the benchmarks that only run on real machines do run, on the tiny preset: their figures are numbers.

python -m pytest tests/test_bench.py
"""
import json

import pytest

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
