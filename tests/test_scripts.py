"""
Proves, with the tiny preset, that the scripts run one after the other; that a killed run goes on bit for bit; that two
processes equal one with twice the passes; and that mistakes end in one clear line, a non-zero exit and nothing overwritten.

python -m pytest tests/test_scripts.py
"""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nanochat.common import run_main
from scripts import finetune, ocr, tok_train, vis_mid_train, vis_tok_train, vision_eval

ROOT = Path(__file__).parents[1]
TRAIN = ["--dtype=float32", "--device-type=cpu", "--num-iterations=6", "--device-batch-size=8", "--warmup-steps=2",
         "--eval-every=3", "--save-every=3", "--eval-pages=16"]
READ = ["--dtype=float32", "--device-type=cpu", "--max-new-tokens=20"]


def call(main, *flags):
    """Lines that a script prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        main(list(map(str, flags)))
    return out.getvalue().splitlines()


def stage1_flags(folder, tokenizer_dir, *flags):
    return ["--preset=tiny", "--chars=10-12", f"--tokenizer={tokenizer_dir}", f"--checkpoints={folder}",
            "--model-tag=stage1", *TRAIN, *flags]


def stage2_flags(folder, stage1_folder, *flags):
    return [f"--encoder={stage1_folder / 'stage1'}", f"--checkpoints={folder}", "--model-tag=stage2", "--text-share=25",
            *TRAIN, *flags]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_dir):
    """Both stages from start to end: their folder, and the lines that they printed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return SimpleNamespace(folder=folder, stage1=call(vis_tok_train.main, *stage1_flags(folder, tokenizer_dir)),
                           stage2=call(vis_mid_train.main, *stage2_flags(folder, folder)))


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def column(run_dir, name):
    """[(step, value), ...] of one number over a run."""
    return [(r["step"], r[name]) for r in records(run_dir) if name in r]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -----------------------------------------------------------------------------
# From start to end


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_what_a_stage_leaves(runs, stage):
    run_dir, lines = runs.folder / stage, getattr(runs, stage)
    summary = json.loads(lines[-1])
    assert summary == json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 6 and lines[-2].startswith(f"min val loss {summary['min_val_loss']:.4f} at step")
    assert sum("| loss" in line and "eta" in line for line in lines) == 6  # one line a step
    assert (run_dir / "curves.png").stat().st_size > 10_000
    kinds = ["model", "deepencoder"] if stage == "stage1" else ["model"]
    assert sorted(p.name for p in run_dir.iterdir() if p.is_dir()) == sorted(f"{k}_00000{n}" for k in kinds for n in (3, 6))
    for name in ("loss", "lr", "dt", "tok_per_sec", "img_per_sec", "mfu", "total_flops"):
        assert {step for step, _ in column(run_dir, f"train/{name}")} >= set(range(6)), name
    for name in ("val/loss", "vision/gap", "vision/cosine_sam", "vision/cosine_compressor", "vision/cosine_clip",
                 "vision/cosine_projector", "val/one_minus_ned"):
        assert [step for step, _ in column(run_dir, name)] == [0, 3, 6]
    losses = column(run_dir, "train/loss")
    assert losses[0][1] == pytest.approx(torch.tensor(300.0).log().item())  # a fresh decoder: every token alike
    assert losses[-1][1] < losses[0][1]


def test_stage_2_keeps_the_eyes_and_has_a_fresh_decoder(runs, tokenizer):
    one, two = (load_file(runs.folder / stage / "model_000006/model.safetensors") for stage in ("stage1", "stage2"))
    for name in one:
        same = torch.equal(one[name], two[name])
        assert same == name.startswith("encoder.sam_model."), name
    unused = tokenizer.encode_special("<|python_start|>")  # never seen, so its embedding is still as it was drawn
    assert not torch.equal(one["gpt.transformer.wte.weight"][unused], two["gpt.transformer.wte.weight"][unused])
    assert "inherited --chars=10-12" in runs.stage2


def test_a_run_goes_on_from_the_model_of_another(runs, tmp_path):
    """--init: what the first evaluation finds is what the last one of the earlier run found."""
    earlier = runs.folder / "stage1"
    call(vis_tok_train.main, f"--init={earlier}", "--chars=10-12", f"--checkpoints={tmp_path}",
         "--model-tag=more", "--local-loss=1", "--place-loss=0.3", *TRAIN)
    for name in ("val/loss", "vision/gap"):
        assert column(tmp_path / "more", name)[0][1] == pytest.approx(column(earlier, name)[-1][1], abs=1e-5)
    assert column(tmp_path / "more", "val/loss")[-1][1] < column(earlier, "val/loss")[-1][1]


def test_eval(runs, tmp_path):
    lines = call(vision_eval.main, f"--checkpoint={runs.folder / 'stage2'}", f"--out={tmp_path}", "--max-problems=6",
                 "--task=heldout,random_chars", "--batch-size=4", *READ)
    summary = json.loads(lines[-1])
    assert summary == json.loads((tmp_path / "summary.json").read_text()) and summary["step"] == 6
    for task in ("heldout", "random_chars"):
        figures, rows = summary[task], [json.loads(line) for line in (tmp_path / f"{task}.jsonl").read_text().splitlines()]
        assert len(rows) == figures["samples"] == 6 and figures["vision_tokens"] == 4
        assert figures["one_minus_ned"] == pytest.approx(sum(r["one_minus_ned"] for r in rows) / 6)
        assert figures["chars_per_vision_token"] == pytest.approx(sum(len(r["truth"]) for r in rows) / 24)
        assert {"ned", "f1", "precision", "repetition_rate", "pages_per_sec", "tokens_per_sec", "text_tokens_per_vision_token",
                "unfinished", "ci95"} <= set(figures)
    assert any("misleading" in line for line in lines)


def test_eval_is_the_same_in_other_batches(runs, tmp_path):
    predictions = []
    for size in (1, 5):
        call(vision_eval.main, f"--checkpoint={runs.folder / 'stage2'}", f"--out={tmp_path / str(size)}", "--max-problems=5",
             "--task=heldout", f"--batch-size={size}", *READ)
        rows = (tmp_path / str(size) / "heldout.jsonl").read_text().splitlines()
        predictions.append([json.loads(row)["prediction"] for row in rows])
    assert predictions[0] == predictions[1] and any(predictions[0])


def test_eval_of_real_pages(runs, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (90, 120), 255).save(tmp_path / "images/a.png")
    det = {"category_type": "text_block", "poly": [0] * 8, "ignore": False, "order": 1, "anno_id": 1, "text": "Some text."}
    page = {"layout_dets": [det], "extra": {"relation": []},
            "page_info": {"page_attribute": {}, "page_no": 0, "height": 120, "width": 90, "image_path": "a.png"}}
    (tmp_path / "OmniDocBench.json").write_text(json.dumps([page]))
    lines = call(vision_eval.main, f"--checkpoint={runs.folder / 'stage2'}", "--task=omnidocbench", f"--path={tmp_path}",
                 f"--out={tmp_path / 'out'}", *READ)
    assert json.loads(lines[-1])["omnidocbench"]["samples"] == 1


def test_eval_over_two_processes(runs, tmp_path):
    flags = [f"--checkpoint={runs.folder / 'stage2'}", "--max-problems=7", "--task=heldout", "--batch-size=2", "--controls=3", *READ]
    lines = torchrun("scripts.vision_eval", f"--out={tmp_path / 'two'}", *flags)
    call(vision_eval.main, f"--out={tmp_path / 'one'}", *flags)
    two, one = ([{k: v for k, v in json.loads(line).items() if k not in ("seconds", "confidence")}
                 for line in (tmp_path / name / "heldout.jsonl").read_text().splitlines()] for name in ("two", "one"))
    assert two == one and [row["index"] for row in two] == list(range(7)) and json.loads(lines[-1])["samples"] == 7
    assert not list((tmp_path / "two").glob("*.rank*")) and (tmp_path / "two/report.html").exists()


def test_ocr(runs, tmp_path, capsys):
    Image.new("RGB", (90, 120), "white").save(tmp_path / "empty.png")  # nothing on it is no mistake
    Image.new("L", (30, 30)).save(tmp_path / "small.jpg")
    lines = call(ocr.main, tmp_path / "empty.png", tmp_path / "small.jpg", "--jsonl", f"--checkpoint={runs.folder / 'stage2'}", *READ)
    assert [json.loads(line)["file"] for line in lines] == [str(tmp_path / name) for name in ("empty.png", "small.jpg")]
    assert "empty.png: " in capsys.readouterr().err  # a model that has not learned is not sure of anything


# -----------------------------------------------------------------------------
# Resuming

def killed_after(line_start, kill_signal, script, *flags):
    """Runs a script in a process of its own and sends a signal when it prints a certain line."""
    command = [sys.executable, "-m", script, *map(str, flags)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith(line_start):
            process.send_signal(kill_signal)
            break
    _, errors = process.communicate()
    return process.returncode, errors


def assert_same_run(run_dir, unbroken):
    assert column(run_dir, "train/loss") == column(unbroken, "train/loss")
    assert column(run_dir, "val/loss") == column(unbroken, "val/loss")
    for name in ("model.safetensors", "optim.safetensors", "config.json", "tokenizer.json"):
        for step in (3, 6):
            path = f"model_{step:06d}/{name}"
            assert (run_dir / path).read_bytes() == (unbroken / path).read_bytes(), path


def test_kill_9_then_resume_equals_the_unbroken_run(runs, tokenizer_dir, tmp_path):
    flags = stage1_flags(tmp_path, tokenizer_dir)
    status, errors = killed_after("step 00003/", signal.SIGKILL, "scripts.vis_tok_train", *flags)
    assert status == -signal.SIGKILL, errors
    run_dir = tmp_path / "stage1"
    assert (run_dir / "model_000003").is_dir() and not (run_dir / "model_000006").exists()
    (run_dir / "model_000006.tmp").mkdir(exist_ok=True)  # as if it had been killed while saving
    with open(run_dir / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "train/lo')
    lines = call(vis_tok_train.main, *flags, "--resume")
    assert f"resuming {run_dir} at step 3" in lines
    assert_same_run(run_dir, runs.folder / "stage1")
    assert json.loads(lines[-1])["val/loss"] == json.loads(runs.stage1[-1])["val/loss"]


def test_stage_2_resumes_after_ctrl_c(runs, tmp_path):
    flags = stage2_flags(tmp_path, runs.folder)
    status, errors = killed_after("step 00003/", signal.SIGINT, "scripts.vis_mid_train", *flags)
    assert status == 130 and "--resume" in errors and "Traceback" not in errors
    call(vis_mid_train.main, *flags, "--resume")
    assert_same_run(tmp_path / "stage2", runs.folder / "stage2")


def test_a_run_folder_belongs_to_one_process(runs, tokenizer_dir, capsys):
    """--resume beside a live run is refused, and writes nothing."""
    before = contents(runs.folder)
    with open(runs.folder / "stage1/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = error_of(capsys, vis_tok_train.main, *stage1_flags(runs.folder, tokenizer_dir), "--resume")
    assert "is being trained by another process" in line and contents(runs.folder) == before


def test_resuming_a_finished_run_changes_nothing(runs, tokenizer_dir):
    before = contents(runs.folder / "stage1")
    lines = call(vis_tok_train.main, *stage1_flags(runs.folder, tokenizer_dir), "--resume")
    assert json.loads(lines[-1])["val/loss"] == json.loads(runs.stage1[-1])["val/loss"]
    after = contents(runs.folder / "stage1")
    assert set(after) == set(before)
    for path in before:
        if path.name == "summary.json":  # MFU is a share of a rate measured anew
            old, new = json.loads(before[path]), json.loads(after[path])
            assert {**old, "mfu": 0} == {**new, "mfu": 0}
        elif path.name != "curves.png":
            assert after[path] == before[path], path


# -----------------------------------------------------------------------------
# Two processes


def torchrun(module, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", module, "--", *flags]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def assert_close(run_dir, other, name, steps):
    a, b = dict(column(run_dir, name)), dict(column(other, name))
    assert list(a) == list(b) and len(a) == steps
    assert max(abs(a[step] - b[step]) for step in a) < 1e-4


def test_two_processes_equal_one_with_twice_the_passes(tokenizer_dir, tmp_path):
    def flags(name, *more):
        return stage1_flags(tmp_path / name, tokenizer_dir, "--num-iterations=10", "--eval-every=-1", "--save-every=5", *more)
    lines = torchrun("scripts.vis_tok_train", *flags("two"))
    assert json.loads(lines[-1])["steps"] == 10 and sum("| loss" in line for line in lines) == 10  # rank 0 alone speaks
    call(vis_tok_train.main, *flags("one", "--total-batch-size=16"))
    assert_close(tmp_path / "two/stage1", tmp_path / "one/stage1", "train/loss", 10)

    # One process goes on where two have stopped.
    shutil.copytree(tmp_path / "two", tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer/stage1/model_000010")
    call(vis_tok_train.main, *flags("fewer", "--resume"))
    assert_close(tmp_path / "two/stage1", tmp_path / "fewer/stage1", "train/loss", 10)
    assert_close(tmp_path / "two/stage1", tmp_path / "fewer/stage1", "val/loss", 2)


def test_two_passes_equal_a_large_one(tokenizer_dir, tmp_path):
    """Answers differ in length: a mean of the passes' means would be another number."""
    def flags(name, *more):
        return stage1_flags(tmp_path / name, tokenizer_dir, "--chars=10-40", "--eval-every=-1",
                            "--save-every=-1", "--total-batch-size=16", *more)
    call(vis_tok_train.main, *flags("one", "--device-batch-size=16"))
    call(vis_tok_train.main, *flags("two"))
    assert_close(tmp_path / "two/stage1", tmp_path / "one/stage1", "train/loss", 6)
    assert_close(tmp_path / "two/stage1", tmp_path / "one/stage1", "train/grad_norm", 6)


def test_two_processes_of_which_one_may_have_only_text(runs, tmp_path):
    """Stage 2, one sample a pass: sooner or later a rank has a page while the other has none."""
    def flags(name, *more):
        return stage2_flags(tmp_path / name, runs.folder, "--num-iterations=8", "--device-batch-size=1", "--text-share=50",
                            "--eval-every=-1", "--save-every=-1", *more)
    torchrun("scripts.vis_mid_train", *flags("two"))
    call(vis_mid_train.main, *flags("one", "--total-batch-size=2"))
    assert_close(tmp_path / "two/stage2", tmp_path / "one/stage2", "train/loss", 8)
    images = [rate * dt for (_, rate), (_, dt) in zip(column(tmp_path / "two/stage2", "train/img_per_sec"),
                                                      column(tmp_path / "two/stage2", "train/dt"))]
    assert images == pytest.approx([1] * 8)  # one of the two, in each step


# -----------------------------------------------------------------------------
# Mistakes


def error_of(capsys, main, *flags):
    """What a failing script says, in one line; a second tells how to see the traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run_main(lambda: main(list(map(str, flags))))
    out, err = capsys.readouterr()
    assert e.value.code == 1 and err.startswith("error: ") and len(err.splitlines()) == 2
    return err.splitlines()[0]


@pytest.mark.parametrize("script", [tok_train, vis_tok_train, vis_mid_train, vision_eval, ocr], ids=lambda m: m.__name__)
def test_unknown_flag(script, capsys):
    with pytest.raises(SystemExit) as e:
        script.main(["--bogus=1"])
    assert e.value.code == 2 and "unrecognized arguments: --bogus=1" in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten(runs, tokenizer_dir, capsys):
    before = contents(runs.folder)
    assert "stage1 holds a run: --resume" in error_of(capsys, vis_tok_train.main, *stage1_flags(runs.folder, tokenizer_dir))
    assert "stage2 holds a run: --resume" in error_of(capsys, vis_mid_train.main, *stage2_flags(runs.folder, runs.folder))
    assert contents(runs.folder) == before


@pytest.mark.parametrize("change", ["--lr=0.004", "--chars=10-14", "--optimizer=adamw", "--total-batch-size=16"])
def test_resume_under_a_changed_config(runs, tokenizer_dir, capsys, change):
    before = contents(runs.folder)
    line = error_of(capsys, vis_tok_train.main, *stage1_flags(runs.folder, tokenizer_dir), "--resume", change)
    flag, value = change.split("=")
    assert "cannot resume" in line and f"{flag} was" in line and f"now {value}" in line.replace("'", "")
    assert line.count(" was ") == 1 and contents(runs.folder) == before


def test_a_loss_that_is_not_finite_stops_the_run(tokenizer_dir, tmp_path, capsys):
    line = error_of(capsys, vis_tok_train.main, *stage1_flags(tmp_path, tokenizer_dir, "--lr=3e38"))
    assert line.startswith("error: step 1: text loss nan") and "not finite" in line  # step 0 was sound, its update was not
    assert [step for step, _ in column(tmp_path / "stage1", "train/loss")] == [0]
    assert not list((tmp_path / "stage1").glob("model_*"))


def test_rows_that_do_not_fit(tokenizer_dir, tmp_path, capsys):
    line = error_of(capsys, vis_tok_train.main, *stage1_flags(tmp_path, tokenizer_dir, "--max-seq-len=20"))
    assert "the limit is 20 and 16: raise --max-seq-len" in line


@pytest.mark.parametrize("change, message", [
    ("--mode=huge", "image mode 'huge': must be one of"), ("--model-tag=../up", "must be a plain folder name"), ("--chars=few", "--chars=few: 'few' is not LO-HI"),
    ("--tokenizer=nowhere", "no tokenizer at nowhere"), ("--device-type=tpu", "--device-type=tpu: must be one of"),
    ("--total-batch-size=12", "--total-batch-size=12 is not a multiple of one pass"), ("--dtype=int8", "--dtype=int8: must be"),
])
def test_flags_that_make_no_sense(tokenizer_dir, tmp_path, capsys, change, message):
    assert message in error_of(capsys, vis_tok_train.main, *stage1_flags(tmp_path, tokenizer_dir), change)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("main, flag", [
    (vis_mid_train.main, "--encoder"), (finetune.main, "--checkpoint"), (vision_eval.main, "--checkpoint"), (ocr.main, "--checkpoint"),
])
def test_before_anything_is_trained(main, flag, tmp_path, monkeypatch, capsys):
    """The defaults look like hub names; what the hub says of them would tell a newcomer nothing."""
    monkeypatch.chdir(tmp_path)
    page = ["page.png"] if main is ocr.main else []
    without = [] if main is ocr.main else [[]]  # by default it reads with the repository's own reader
    for flags in (*without, [f"{flag}=checkpoints/mine"]):
        line = error_of(capsys, main, "--device-type=cpu", *flags, *page)
        assert "no such folder checkpoints/" in line and "train first (bash speedrun.sh)" in line
    assert not list(tmp_path.iterdir())


def test_no_encoder(tmp_path, capsys):
    assert "no such folder" in error_of(capsys, vis_mid_train.main, *stage2_flags(tmp_path, tmp_path))


def test_exit_status_of_the_command(runs):
    """A picture that is not there, from the shell's side."""
    process = subprocess.run([sys.executable, "-m", "scripts.ocr", "no/such.png", f"--checkpoint={runs.folder / 'stage2'}"], cwd=ROOT,
                             capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == "" and "error: no/such.png: " in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("part, key, value, message", [
    ("gpt", "n_embd", 64, "does not fit the model"), ("sam", "depth", 3, "does not fit the model"),
    ("second_stage", "dropout", 0.1, "unknown keys ['dropout']"), ("gpt", "n_head", 3, "not a multiple of its 3 heads"),
])
def test_a_checkpoint_of_another_config(runs, tmp_path, capsys, part, key, value, message):
    source = runs.folder / "stage2/model_000006"
    for path in source.iterdir():
        os.symlink(path, tmp_path / path.name)
    config = json.loads((source / "config.json").read_text())
    config[part][key] = value
    (tmp_path / "config.json").unlink()
    (tmp_path / "sha256.json").unlink()  # else the change would count as corruption
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert message in error_of(capsys, vision_eval.main, f"--checkpoint={tmp_path}", f"--out={tmp_path / 'out'}", *READ)
    assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# A limit of time


def test_a_stage_ends_by_the_clock_with_its_rate_at_zero(tokenizer_dir, tmp_path):
    flags = [f for f in stage1_flags(tmp_path, tokenizer_dir) if not f.startswith("--num-iterations")]
    summary = json.loads(call(vis_tok_train.main, *flags, "--num-iterations=5000", "--max-minutes=0.02", "--eval-every=-1", "--save-every=-1")[-1])
    rates = [rate for _, rate in column(tmp_path / "stage1", "train/lr")]
    assert 1 < summary["steps"] < 5000 and 0.02 <= summary["minutes"] < 0.2
    assert rates[-1] < 0.5 * max(rates) and (tmp_path / f"stage1/model_{summary['steps']:06d}").exists()
