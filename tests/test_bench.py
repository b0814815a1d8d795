"""
Proves that every measurement of scripts.bench runs at toy size and that its figures make sense,
that FLOPs and predicted memory are right, and that an ablation keeps and tabulates its runs.

python -m pytest tests/test_bench.py
"""
import json
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanochat import common, config
from nanochat.common import choose_compile, write_json
from nanochat.image_modes import get_mode
from nanochat.measure import PeakMemory
from nanochat.model import DeepseekOCR, forward_flops
from scripts import ablation, bench, vis_tok_train

TOY = ["--preset=tiny", "--device-type=cpu", "--dtype=float32", "--batch=8", "--seq=24",
       "--new-tokens=20", "--repeats=1", "--steps=2", "--pages=1"]


@pytest.fixture
def measure(capsys):
    """A function flags -> the records that scripts.bench prints with them."""
    def run(*flags):
        capsys.readouterr()
        bench.main([*TOY, *flags])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return run


# -----------------------------------------------------------------------------
# Every --what

def test_by_default_training_steps_and_generation_are_measured(measure):
    stage1, stage2, generate = measure()
    assert [stage1["bench"], stage2["bench"], generate["bench"]] == ["stage1", "stage2", "generate"]
    for record in (stage1, stage2):
        assert record["seconds"] > 0
        assert record["mfu"] > 0
        assert set(record["share"]) == {"encoder forward", "decoder forward",
                                        "fusion and loss forward", "backward", "optimizer"}
    assert generate["pages_per_sec"] > 0
    assert generate["bandwidth_share"] != 0  # on a busy machine prefill may seem slower than all


def test_data(measure):
    [record] = measure("--what=data")
    assert set(record["dense_pages_per_cpu_second"]) == {
        "640px", "640px, damaged", "1024px", "1024px, damaged"}
    assert record["samples_per_second"] > 0
    assert 0 < record["data_wait"] < 1
    assert 0 < record["padding"] < 1


def test_generation_is_compared_with_transformers(measure, model, tokenizer, tmp_path):
    pytest.importorskip("transformers")
    model.tokenizer = tokenizer
    model.meta = {"mode": model.cfg.modes[0], "stage": "stage 2", "step": 1, "commit": "x",
                  "user_config": {"seed": 0}}
    model.save_pretrained(tmp_path / "saved")
    batch, alone = measure("--what=transformers", f"--checkpoint={tmp_path / 'saved'}",
                           "--batch=3", "--rounds=2")
    for record, rows in ((batch, 3), (alone, 1)):
        assert record["batch"] == rows
        assert record["same_text"]
        assert 0 < record["ratio"]["min"] <= record["ratio"]["median"] <= record["ratio"]["max"]


def test_packed_and_recomputed_steps_run(measure):
    [record] = measure("--what=stage2", "--seq=50", "--pack=2", "--recompute", "--optimizer=adamw")
    assert record["pack"] == 2 and record["recompute"] and record["mfu"] > 0


@pytest.mark.parametrize("flags, message", [
    (["--seq=7"], "leaves 7 positions to a sample, and a page in mode .* takes 7"),
    (["--what=stage3"], "--what=stage3: must be of stage1, stage2"),
])
def test_what_it_cannot_measure(flags, message):
    with pytest.raises(ValueError, match=message):
        bench.main([*TOY, *flags])


def test_a_packed_batch_supervises_the_text_of_each_sample():
    cfg = config.tiny()
    cfg.image_token_id = 300
    mode = get_mode(cfg.modes[0])
    batch = bench.make_batch(DeepseekOCR(cfg), mode, rows=3, seq=25, pack=2)
    page = batch.plans[0].positions
    text = 12 - page  # a sample has 12 positions, and one is left over
    assert batch.images == 6
    # The page's last position predicts the text's first token; the text's last predicts nothing.
    assert batch.supervised() == 6 * text
    assert (batch.ids == 300).sum() == 6 * page
    at = batch.targets != -1
    assert torch.equal(batch.targets[:, :-1][at[:, :-1]], batch.ids[:, 1:][at[:, :-1]])


# -----------------------------------------------------------------------------
# The suite

def test_suite_goes_on_past_a_row_that_fails(monkeypatch, tmp_path):
    bad = "--preset=tiny --device-type=cpu --seq=7"
    good = " ".join([*TOY, "--what=stage2"])
    path = tmp_path / "new" / "bench.jsonl"
    monkeypatch.setattr(bench, "SUITE", (bad, good))
    for _ in range(2):  # the second time both rows are there already
        with pytest.raises(ValueError, match="1 of 2 rows failed, .* --seq=7"):
            bench.main([f"--suite={path}"])
        failed, measured = [json.loads(line) for line in path.read_text().splitlines()]
        assert failed["flags"] == bad and "takes 7 of them" in failed["failed"]
        assert measured["flags"] == good and measured["mfu"] > 0


@pytest.mark.parametrize("flags", bench.SUITE)
def test_every_row_of_the_suite_has_room_for_its_pages(flags):
    args = bench.parse_arguments(flags.split())
    mode = get_mode(args.mode or config.PRESETS[args.preset]().modes[0])
    cfg = bench.make_config(args, mode)
    if "stage" in args.what:  # the others do not look at --seq
        assert bench.page_plan(mode, cfg.token_stride).positions < args.seq // args.pack


# -----------------------------------------------------------------------------
# FLOPs and memory

def test_flops_agree_with_those_that_torch_counts():
    cfg = config.tiny()
    side, rows, length = 64, 2, 24
    model = DeepseekOCR(cfg).init_weights(0).eval()
    pixels = torch.zeros(rows, 3, side, side, dtype=torch.uint8)
    embeddings = torch.zeros(rows, length, cfg.gpt.n_embd)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.project(pixels)
        model.gpt.logits(model.gpt(embeddings))
    ours = sum(forward_flops(cfg, {side: rows}, length, rows).values())
    # torch also counts the upper half of causal attention
    assert 0.8 < ours / counter.get_total_flops() < 1.05


def test_packed_rows_have_the_flops_of_their_samples():
    cfg = config.tiny()
    whole = sum(forward_flops(cfg, {64: 2}, 48, 1).values())
    packed = sum(forward_flops(cfg, {64: 2}, 48, 1, lengths=[[24, 24]]).values())
    pairs_saved = 48 ** 2 - 2 * 24 ** 2
    assert whole - packed == cfg.gpt.n_layer * 2 * cfg.gpt.n_embd * pairs_saved


def test_peak_memory_counts_what_is_alive_at_one_time():
    with PeakMemory() as memory:
        a = torch.zeros(1000, device="meta")
        b = a + 1
        b.view(10, 100).add_(1)  # neither a view nor an operation in place takes memory
        assert (memory.live, memory.peak) == (8000, 8000)
        del b
        c = a * 2
        assert (memory.live, memory.peak) == (8000, 8000)
        c = c + a  # the old one lives until the new one is there
    assert (memory.live, memory.peak) == (8000, 12000)


def test_memory_grows_with_the_batch_and_shrinks_with_recomputation(measure):
    def predicted(*flags):
        stage1, stage2, _ = measure("--what=memory", "--optimizer=adamw", *flags)
        assert stage2["predicted_gb"] < stage1["predicted_gb"]  # a frozen SAM keeps no activations
        return stage1

    few = predicted("--batch=2", "--seq=128")
    many = predicted("--batch=64", "--seq=128")
    long = predicted("--batch=64", "--seq=256")
    recomputed = predicted("--batch=64", "--seq=256", "--recompute")
    assert few["predicted_gb"] < many["predicted_gb"] < long["predicted_gb"]
    assert recomputed["predicted_gb"] < 0.8 * long["predicted_gb"]
    # AdamW has two numbers beside each weight, and gradients are gone between steps; pixels stay,
    # but those of two pages are too few to count.
    assert few["between_steps_gb"] == pytest.approx(3 * few["weights_gb"], rel=0.05)


def test_memory_of_generation_is_that_of_the_cache():
    def predicted(new_tokens):
        args = bench.parse_arguments([*TOY, "--batch=64", f"--new-tokens={new_tokens}"])
        mode = get_mode("64px")
        return bench.measure_generation_memory(args, bench.make_config(args, mode), mode)

    cfg = config.tiny().gpt
    bytes_per_position = 64 * 2 * cfg.n_layer * cfg.n_embd * 4  # keys and values of 64 rows, fp32
    cache = 1000 * bytes_per_position / 1e9
    more = predicted(1020)["predicted_gb"] - predicted(20)["predicted_gb"]
    assert cache < more < 1.5 * cache  # it never moves, so there is never a second one beside it


# -----------------------------------------------------------------------------
# Compiling

def test_compile_needs_a_compiler(monkeypatch, capsys):
    cpu = torch.device("cpu")
    monkeypatch.setattr(common.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="--compile=yes: it needs one of .* and none is on the"):
        choose_compile(cpu, "yes")
    assert not choose_compile(cpu)  # auto never compiles on a CPU, so it says nothing
    assert not choose_compile(cpu, "no")
    assert capsys.readouterr().out == ""


def test_compiling_is_tried_before_it_is_relied_on(monkeypatch, capsys):
    """A machine that has a compiler, but neither Triton nor Python's headers."""
    def compile_nothing(function):
        raise RuntimeError("while compiling:\nPython.h: No such file or directory")

    cpu = torch.device("cpu")
    monkeypatch.setattr(common.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert choose_compile(cpu, "yes")
    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(ValueError, match="--compile=yes: RuntimeError: Python.h: No such file"):
        choose_compile(cpu, "yes")

    class FakeGPU:
        """Only the name is asked for: tensors are made on the CPU."""
        type = "cuda"

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda n, device, **kwargs: ones(n, **kwargs))
    assert not choose_compile(FakeGPU())
    out = capsys.readouterr().out
    assert out.startswith("!!!!") and "runs eagerly" in out and "Python.h" in out


# -----------------------------------------------------------------------------
# Ablations

def ablate(capsys, *flags):
    """-> the table of an ablation."""
    capsys.readouterr()
    ablation.main(list(map(str, flags)))
    return json.loads(capsys.readouterr().out.splitlines()[-1])["ablation"]


def test_finished_runs_are_tabulated_and_not_repeated(tmp_path, capsys):
    for seed, gap in enumerate([0.1, 0.2, 0.6]):
        summary = dict.fromkeys(ablation.FIGURES, gap) | {"minutes": 2.0, "commit": "abc"}
        folder = tmp_path / ablation.run_name("lr=1e-3 recompute", 300, seed)
        folder.mkdir()
        write_json(folder / "summary.json", summary)
    [row] = ablate(capsys, "--variants=lr=1e-3 recompute", f"--checkpoints={tmp_path}")
    assert row["runs"] == 3 and row["minutes"] == 2.0 and row["commits"] == ["abc"]
    assert row["vision/gap"] == {"mean": 0.3, "min": 0.1, "max": 0.6}


def test_a_variant_may_be_any_flags_of_stage_1(tokenizer_dir, tmp_path, capsys):
    toy = ("preset=tiny device-type=cpu dtype=float32 device-batch-size=8 chars=10-12 min-px=5 "
           "num-iterations=1 recompute")
    [row] = ablate(capsys, f"--variants={toy}", "--seeds=3", f"--checkpoints={tmp_path}",
                   f"--tokenizer={tokenizer_dir}")
    assert row["variant"] == toy and row["runs"] == 1
    [folder] = [path for path in tmp_path.iterdir() if path.is_dir()]
    config = json.loads((folder / "run.json").read_text())
    assert config["recompute"] and config["num_iterations"] == 1 and config["seed"] == 3


def test_variants_in_words():
    for flags in ablation.parse_variants(ablation.VARIANTS).values():
        vis_tok_train.parse_args(flags)
    variants = ablation.parse_variants("lr=1e-3;data='folder:my scans' wide")
    assert variants == {"lr=1e-3": ["--lr=1e-3"],
                        "data='folder:my scans' wide": ["--data=folder:my scans", "--wide"]}
    with pytest.raises(ValueError, match="sets 'seed=1', but seed, model-tag"):
        ablation.parse_variants("lr=1e-3 seed=1")


def test_a_run_that_fails_is_named(tokenizer_dir, tmp_path):
    with pytest.raises(ValueError, match="bogus-1_steps-300_seed-0 ended with status 2: .*log"):
        ablation.main(["--variants=bogus=1", f"--checkpoints={tmp_path}", "--seeds=0"])


def test_waits_for_a_gpu_need_one(capsys):
    with pytest.raises(ValueError, match="--what=syncs counts how often the host waits for a GPU"):
        bench.main(["--what=syncs", "--device-type=cpu"])


def test_only_waits_are_counted():
    """torch announces its debug mode with a warning of its own, and others may come in a step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("Synchronization debug mode is a prototype feature")
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation")
    assert list(bench.lines_that_wait(caught).values()) == [2]
