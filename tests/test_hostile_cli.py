"""
Proves that whatever nonsense a command is given, it ends in one line that says what is wrong, with
a non-zero exit status, no traceback, and nothing written or overwritten.

    python -m pytest tests/test_hostile_cli.py
"""
import argparse
import importlib
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from PIL import Image

from nanochat import checkpoint as ckpt
from nanochat import common
from nanochat.optim import Optimizer
from tests.test_commands import SCRIPTS, Parsed

# What a script needs beside the flag in question.
REQUIRED = {
    "data_look": ["synthdoc"],
    "export": ["--out=exported"],
    "ocr": ["page.png"],
    "speedrun_report": ["--started=1"],
}
RUNTIME = ("--device-type=cpu", "--dtype=float32")


def main_of(script):
    return importlib.import_module(f"scripts.{script}").main


def parser_of(script, monkeypatch):
    """The script's parser, at the moment at which it is to be used."""
    def stop(parser, *_):
        raise Parsed(parser)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as parsed:
            main_of(script)([])
    return parsed.value.args[0]


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def error_line(capsys, script, flags, may_write="nothing"):
    """
    The line in which a script ends; a second one may tell how to see the traceback. Outside the
    folder that it may write no file is changed.
    """
    before = contents(".")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: main_of(script)([str(flag) for flag in flags]))
    err = capsys.readouterr().err
    assert stop.value.code in (1, 2), err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in err, err
    assert err.splitlines()[-1] in (errors[0], "(set NANOCHAT_TRACEBACK=1 for the traceback)"), err
    after = contents(".")
    changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
    assert {path for path in changed if path.parts[0] != may_write} == set()
    return errors[0]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    Image.new("L", (9, 9)).save("page.png")
    return tmp_path


# -----------------------------------------------------------------------------
# Flags

NOT_NUMBERS = ("nan", "inf", "-inf", "1e400", "", "x", "0x10", "-7", "-1e-9", "1,5", "9" * 50)


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers(script, here, monkeypatch, capsys):
    """Of every flag that takes a number."""
    parser = parser_of(script, monkeypatch)
    required = REQUIRED.get(script, [])
    for action in parser._actions:
        assert action.type not in (int, float), f"{action.dest}: NaN and -7 would pass"
        if action.type is None or action.type is str:
            continue
        for value in NOT_NUMBERS:
            flag = f"{action.option_strings[0]}={value}"
            with pytest.raises(SystemExit) as stop:
                parser.parse_args([*required, flag])
            err = capsys.readouterr().err
            assert stop.value.code == 2 and len(err.splitlines()) == 1, err
            assert err.startswith("error: argument ") and "must be a" in err


# That zero would be an endless loop, a division by it, or nothing to do.
NOT_ZERO = {
    "vis_tok_train": ("num-iterations", "device-batch-size", "total-batch-size", "lr", "matrix-lr",
                      "max-seq-len", "max-images", "eval-every", "save-every", "eval-pages",
                      "max-minutes", "grad-clip", "min-px"),
    "vision_eval": ("batch-size", "max-problems", "max-new-tokens"),
    "ocr": ("batch-size", "dpi", "max-new-tokens"),
    "lmms": ("batch-size", "limit"),
    "tok_train": ("vocab-size", "max-chars"),
    "bench": ("repeats", "batch", "seq", "pack", "new-tokens", "rounds", "pages", "steps"),
    "ablation": ("steps",),
    "data_look": ("samples",),
}
NOT_ZERO["vis_mid_train"] = NOT_ZERO["vis_tok_train"]
NOT_ZERO["finetune"] = NOT_ZERO["vis_tok_train"]


@pytest.mark.parametrize("script", sorted(NOT_ZERO))
def test_zero(script, here, capsys):
    for flag in NOT_ZERO[script]:
        line = error_line(capsys, script, [*REQUIRED.get(script, []), f"--{flag}=0"])
        assert f"--{flag}" in line and "'0' must be a" in line


@pytest.mark.parametrize("kind, text, message", [
    (common.positive_int, "0", "'0' must be a whole number of 1 or more"),
    (common.every_or_never, "1.5", "'1.5' must be a whole number of 1 or more (or -1)"),
    (common.integer(0, 99), "100", "'100' must be a whole number of 0 or more, at most 99"),
    (common.natural, "9" * 12, f"'{'9' * 12}' must be a whole number of 0 or more, at most 1e+09"),
    (common.positive, "0", "'0' must be a number above 0"),
    (common.fraction, "nan", "'nan' must be a number of 0 or more, at most 1"),
])
def test_what_a_number_must_be(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as e:
        kind(text)
    assert str(e.value) == message


TRAINING_FLAGS = (
    "--mode=huge", "--tokenizer=nowhere", "--dtype=int8", "--device-type=tpu",
    "--compile=perhaps", "--optimizer=sgd", "--schedule=none", "--model-tag=../up",
    "--model-tag=", "--model-tag=a/b", "--bogus=1", "--total-batch-size=33",
    "--part-lr=sam", "--part-lr=sam=nan", "--part-lr=nose=1", "--part-lr=sam=-1",
    "--chars=few", "--chars=5-3", "--chars=10-20xnan", "--chars=10-20x0", "--chars=", "--chars=0-9",
    "--faces=comic", "--faces=", "--min-px=999999", "--pack=3", "--max-seq-len=4",
    "--data=", "--data=nothing", "--data=synthdoc=0", "--data=synthdoc=99999999", "--data=fox",
    "--data=folder:nowhere", "--data=folder:page.png", "--data=folder:", "--data=finevision:/no/x",
    "--data=chartqa", "--data=synthchat", "--data=smoltalk:/nope",
    "--data=synthpage --page-parts=poem=1", "--data=synthpage --page-parts=table=nan",
    "--data=synthpage --text-files=nowhere.txt", "--data=synthpage --text-files=page.png",
)
BAD = {
    "vis_tok_train": (*TRAINING_FLAGS, "--preset=giant", "--freeze=nose",
                      "--freeze=sam,clip,gpt", "--sam=/nope", "--clip=nope", "--gpt=./nope",
                      "--encoder=/nope/x", "--sam=page.png"),
    "vis_mid_train": (*TRAINING_FLAGS, "--encoder=/nope",
                      "--encoder=page.png", "--text-share=100", "--gpt=/nope", "--encoder="),
    "finetune": ("--checkpoint=/nope", "--checkpoint=page.png", "--mode=huge", "--checkpoint=",
                 "--data=fox", "--data=folder:nowhere", "--model-tag=..", "--max-seq-len=999"),
    "vision_eval": ("--checkpoint=/nope", "--task=", "--task=poems", "--task=folder",
                    "--task=folder --path=nowhere", "--task=omnidocbench --path=/nope",
                    "--task=omnidocbench --path=.", "--task=fox --path=page.png",
                    "--task=omnidocbench --path=. --kinds=poem", "--chars=few", "--no-repeat=1",
                    "--no-repeat=0,5", "--mode=huge", "--against=nowhere", "--max-new-tokens=9999",
                    "--task=chartqa-test --path=/nope"),
    "ocr": ("--checkpoint=/nope", "--mode=huge", "--no-repeat=a,b", "--max-new-tokens=9999",
            "--stream --jsonl", "--chat", "--dtype=int8"),
    "export": ("--checkpoint=/nope", "--out=page.png", "--out=.", "--format=onnx",
               "--results=nowhere.json", "--results=page.png"),
    "tok_train": ("--vocab-size=10", "--out=run/model_000003", "--bogus"),
    "ablation": ("--variants=seed=3", "--variants='", "--seeds=a", "--seeds=",
                 "--variants=a=1;a=1;a-1"),
    "data_look": ("--preset=giant", "--mode=huge", "--tokenizer=nowhere", "--write-folder=."),
    "bench": ("--what=poems", "--preset=giant", "--mode=huge", "--device-type=tpu", "--dtype=int8",
              "--seq=2", "--what="),
    "lmms": ("--checkpoint=/nope", "--bogus"),
    "parity": ("--sizes=a", "--sizes=", "--sizes=0", "--preset=giant", "--sizes=33 --preset=tiny"),
    "speedrun_report": ("--checkpoints=nowhere", "--evaluations=none"),
    "pictures": ("--what=poems", "--what=reading --evaluation=nowhere", "--what=curves --runs=a=nowhere",
                 "--what=curves --runs=nothing", "--what=network --sizes=giant"),
}


WITHOUT_EFFECT = {
    "vis_tok_train": ("--matrix-lr=1 --optimizer=adamw", "--sam=a/b --encoder=c/d",
                      "--tokenizer=x --gpt=a/b", "--data=folder:x --ramp=5", "--stream",
                      "--init=x --preset=nano", "--primer=8x4 --ramp=0", "--init=x --gpt=a/b", "--init=x --tokenizer=y",
                      "--val-share=0.2", "--data=synthpage --faces=sans", "--page-parts=table=1",
                      "--data=folder:x --chars=10-20", "--data=synthchart --damage=0.1"),
    "vis_mid_train": ("--tokenizer=x --gpt=a/b", "--data=folder:x --ramp=5", "--allow-outside"),
    "finetune": ("--data=folder:x --chars=10-20", "--optimizer=adamw --matrix-lr=1"),
    "data_look": ("--damage=0.1", "--chars=10-20"),
    "vision_eval": ("--path=x", "--kinds=text", "--prompt=Read", "--task=synthchart --chars=9-12"),
}


@pytest.mark.parametrize("script", sorted(WITHOUT_EFFECT))
def test_flags_without_effect(script, here, capsys):
    for flags in WITHOUT_EFFECT[script]:
        task = ["synthchat"] if script == "data_look" else []
        line = error_line(capsys, script, [*task, *flags.split()])
        assert "has no effect" in line and "leave" in line


@pytest.fixture
def run_folder(here, make_model, tokenizer, tokenizer_dir, make_batch, pages):
    """A folder with a run of stage 1 (run/, with its encoder) and a tokenizer."""
    shutil.copytree(tokenizer_dir, here / "tokenizer")
    model = make_model(0)
    optimizer = Optimizer(model.train(), "adamw", lr=1e-3)
    model(make_batch(pages))["text"][0].backward()
    optimizer.step(1.0)
    config = {"chars": "10-12", "faces": "sans", "mode": "", "tokenizer": "tokenizer", "seed": 0}
    meta = {"mode": "64px", "user_config": config, "world_size": 1, "stage": "stage 1",
            "commit": "abc", "tokenizer": tokenizer.fingerprint()}
    os.mkdir("run")
    ckpt.save_encoder(here / "run", 3, model, meta)
    ckpt.save_checkpoint(here / "run", 3, model, tokenizer, optimizer, meta)
    return here / "run"


def sound_flags(script):
    """Flags under which the script would work with `run_folder`."""
    train = ["--num-iterations=1", "--eval-pages=4", "--checkpoints=out",
             *RUNTIME]
    return {
        "vis_tok_train": ["--preset=tiny", "--tokenizer=tokenizer", *train],
        "vis_mid_train": ["--encoder=run", *train],
        "finetune": ["--checkpoint=run", *train],
        "vision_eval": ["--checkpoint=run", "--out=eval", "--max-problems=2", *RUNTIME],
        "ocr": ["--checkpoint=run", *RUNTIME, "page.png"],
        "export": ["--checkpoint=run", "--out=exported"],
        "data_look": ["synthchat", "--tokenizer=tokenizer", "--preset=tiny"],
        "speedrun_report": ["--started=1"],
    }.get(script, [])


@pytest.mark.parametrize("script", SCRIPTS)
def test_words(script, run_folder, capsys):
    for bad in BAD[script]:
        print(bad)  # the last one is shown if it is let through
        error_line(capsys, script, [*sound_flags(script), *bad.split(" ")])


# -----------------------------------------------------------------------------
# Files

DAMAGES = {
    "empty": lambda text: b"",
    "half": lambda text: text[:len(text) // 2],
    "list": lambda text: b"[]",
    "object": lambda text: b"{}",
    "null": lambda text: b"null",
    "deep": lambda text: b"[" * 100_000,
    "binary": lambda text: b"\xff\xfe\x00" * 9,
}


@pytest.mark.parametrize("script", ["vis_mid_train", "finetune", "vision_eval", "ocr", "export"])
@pytest.mark.parametrize("name", ["config.json", "meta.json", "tokenizer.json", "sha256.json",
                                  "model.safetensors"])
def test_a_damaged_checkpoint(script, name, run_folder, capsys):
    """Each error names the file; without its checksum, as somebody has edited it."""
    prefix = "deepencoder" if script == "vis_mid_train" else "model"
    folder = run_folder / f"{prefix}_000003"
    if not (folder / name).exists():  # an encoder has no tokenizer
        return
    sound = (folder / name).read_bytes()
    for damage, change in DAMAGES.items():
        (folder / name).write_bytes(change(sound))
        if name == "sha256.json" and damage == "object":
            line = error_line(capsys, script, sound_flags(script))
            assert "lacks the key" in line
            continue
        if name != "sha256.json" and (folder / "sha256.json").exists():
            assert name in error_line(capsys, script, sound_flags(script))
            (folder / "sha256.json").unlink()
        what = name.removesuffix(".json")
        assert what in error_line(capsys, script, sound_flags(script)), damage


@pytest.mark.parametrize("key, value", [
    ("user_config", 3), ("user_config", None), ("mode", ["64px"]), ("mode", "poem"),
    ("step", "three"), ("tokenizer", "another"),
])
@pytest.mark.parametrize("script", ["finetune", "vision_eval", "ocr"])
def test_a_mistyped_meta(script, key, value, run_folder, capsys):
    folder = run_folder / "model_000003"
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, key: value}))
    (folder / "sha256.json").unlink()
    error_line(capsys, script, sound_flags(script))


@pytest.mark.parametrize("script", ["finetune", "vis_mid_train"])
@pytest.mark.parametrize("key, value", [("chars", 5), ("faces", None), ("max_seq_len", "x"),
                                        ("damage", "nan"), ("min_px", True)])
def test_a_mistyped_setting_to_inherit(script, key, value, run_folder, capsys):
    prefix = "deepencoder" if script == "vis_mid_train" else "model"
    folder = run_folder / f"{prefix}_000003"
    meta = json.loads((folder / "meta.json").read_text())
    meta["user_config"][key] = value
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "sha256.json").unlink()
    line = error_line(capsys, script, sound_flags(script))
    assert "meta.json" in line and f"user_config.{key} is {value!r}" in line


def test_a_damaged_benchmark(run_folder, capsys):
    os.mkdir("bench")
    for text in ("", "{", "{}", "[]", "[1]", '[{"page_info": 3}]', "[" * 100_000):
        Path("bench/OmniDocBench.json").write_text(text)
        flags = [*sound_flags("vision_eval"), "--task=omnidocbench", "--path=bench"]
        assert "OmniDocBench.json" in error_line(capsys, "vision_eval", flags)


def test_damaged_pages(run_folder, capsys):
    """One bad text or picture of somebody's folder is named."""
    os.mkdir("pages")
    for i in range(12):
        Image.new("L", (30, 30), 20 * i).save(f"pages/{i}.png")
        Path(f"pages/{i}.txt").write_text("words")
    sound = contents("pages")
    flags = [*sound_flags("finetune"), "--data=folder:pages", "--val-share=0.5"]
    for name, content in {"3.txt": b"\xff\xfe\xfa", "4.png": b"", "5.png": b"<svg/>", "6.txt": b" ",
                          "7.png": sound[Path("pages/7.png")][:40]}.items():
        Path("pages", name).write_bytes(content)
        # A page of the training part is met after the first evaluation.
        assert Path(name).stem in error_line(capsys, "finetune", flags, may_write="out")
        Path("pages", name).write_bytes(sound[Path("pages", name)])
    os.unlink("pages/3.txt")
    assert "3.png has 0 texts" in error_line(capsys, "finetune", flags, may_write="out")


@pytest.mark.parametrize("format", ["nano", "encoder"])
def test_export_to_a_full_disk(format, run_folder, capsys):
    """It leaves nothing, and the same command works once there is room."""
    flags = [*sound_flags("export"), f"--format={format}"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1000, 100_000):  # bytes of a file; writing beyond fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            line = error_line(capsys, "export", flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "exported" in line and "make room" in line
        assert not list(Path(".").glob("exported*"))
    main_of("export")(flags)
    assert Path("exported/model.safetensors").exists()


# -----------------------------------------------------------------------------
# --help

@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, monkeypatch, capsys):
    """A whole sentence about the script, a text for every flag, and no empty default."""
    parser = parser_of(script, monkeypatch)
    assert parser.description.endswith((".", "?", "results.")), parser.description
    for action in parser._actions:
        assert action.help, action.dest
    text = " ".join(parser.format_help().split())
    assert "(default: )" not in text and "(default: None)" not in text
    if script in ("vis_mid_train", "finetune"):
        source = "stage 1" if script == "vis_mid_train" else "the checkpoint"
        chars = text.split("--chars CHARS ")[-1]
        assert chars.split("(default: ")[1].startswith(f"{source}'s)")
