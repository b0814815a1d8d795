"""
Proves that a person's own pages arrive with their texts, in parts that stay as they are; that --data names mixtures which any step can be
rebuilt from; that data_look shows what the model gets; and that finetune starts from a whole checkpoint and reports before and after.

    python -m pytest tests/test_folder.py
"""
import io
import json
from argparse import Namespace
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nanochat import loop
from scripts import data_look, finetune, vis_tok_train
from tasks.folder import Folder
from tasks.synthdoc import SynthDoc
from tasks.registry import parse_data, training_sets
from nanochat.mixture import Shuffled

ROOT = Path(__file__).parents[1]
DATA = dict(seed=0, chars="10-12", faces="sans,mono", min_px=8, random_share=0.2, val_share=0.3, stream=False)
TRAIN = ["--dtype=float32", "--device-type=cpu", "--num-iterations=3", "--device-batch-size=8", "--warmup-steps=1", "--eval-every=-1",
         "--save-every=-1"]


@pytest.fixture
def folder(tmp_path):
    """Forty pages, every other in a subfolder, texts as .txt or .md."""
    for i in range(40):
        path = tmp_path / "pages" / ("more" if i % 2 else "") / f"page {i}.{'PNG' if i % 4 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (60 + i, 80), 255 - i).save(path)
        path.with_suffix(".md" if i % 3 else ".txt").write_text(f"\ufeffText {i} <|image|>\nüß \n", encoding="utf-8")
    (tmp_path / "pages/README.txt").write_text("about these pages")
    return tmp_path / "pages"


def write_lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def call(main, *flags):
    out = io.StringIO()
    with redirect_stdout(out):
        main(list(map(str, flags)))
    return out.getvalue().splitlines()


def test_pictures_and_texts_beside(folder):
    task = Folder(folder)
    assert len(task) == 40 and len({c["id"] for c in task}) == 40
    c = next(c for c in task if c["id"] == "more/page 7.PNG")
    assert c["messages"][1]["content"] == "Text 7 <|image|>\nüß" and c["images"][0].size == (67, 80)


def test_parts_stay_as_they_are(folder):
    def ids(split, share=0.3):
        return {c["id"] for c in Folder(folder, split, share)}
    train, val = ids("train"), ids("val")
    assert not train & val and len(train | val) == 40 and 4 <= len(val) <= 20
    Image.new("L", (9, 9)).save(folder / "a new one.png")
    (folder / "a new one.txt").write_text("new")
    assert train <= ids("train") and val <= ids("val") and val <= ids("val", 0.5)
    with pytest.raises(ValueError, match="none of its 41 pages .* is for val at a validation share of 0"):
        ids("val", 0)


def test_json_lines(folder):
    path = write_lines(folder / "pages.jsonl", {"image": "page 0.jpg", "text": "a\u2028b"}, {"image": "page 2.PNG", "text": "", "prompt": "\nHow many?"})
    first, second = Folder(path)
    assert first["messages"][1]["content"] == "a\u2028b" and first["messages"][0]["content"][1]["text"] == "\nFree OCR."
    assert second["messages"][0]["content"][1]["text"] == "\nHow many?" and second["images"][0].size == (62, 80)


@pytest.mark.parametrize("line, error", [
    ({"image": "page 0.jpg"}, "line 2 has no str 'text'"), ({"image": "page 0.jpg", "text": None}, "line 2 has no str 'text'"),
    ({"image": "gone.png", "text": ""}, "line 2: no picture .*gone.png"), ("{", "line 2 is not a JSON object"), ("3", "line 2 is not a JSON object")])
def test_json_lines_missing_or_broken(folder, line, error):
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        Folder(write_lines(folder / "pages.jsonl", {"image": "page 0.jpg", "text": "a"}, line))


def test_a_folder_that_is_missing_or_broken(folder, tmp_path):
    def fails(words, call=lambda: Folder(folder)):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            call()
    fails("nowhere is not there", lambda: Folder(tmp_path / "nowhere"))
    fails("none of its 0 pages", lambda: Folder((folder / "empty").mkdir() or folder / "empty"))
    (folder / "page 0.md").write_text("")
    fails("page 0.jpg has 2 texts beside it")
    (folder / "page 0.md").unlink()
    (folder / "page 0.txt").write_bytes(b"\xff\xfe\x00")
    fails("page 0.txt is not UTF-8")
    (folder / "page 0.txt").unlink()
    fails("page 0.jpg has 0 texts beside it: needs one, page 0.txt or page 0.md")
    (folder / "page 0.txt").write_text("")
    (folder / "page 0.jpg").write_bytes(b"")
    fails("page 0.jpg: the picture cannot be read", lambda: list(Folder(folder)))


# -----------------------------------------------------------------------------
# --data


def test_names_and_shares():
    assert parse_data("folder:a=b/c=3,smoltalk,finevision:dir/chartqa=2") == [("folder", "a=b/c", 3), ("smoltalk", "", 1), ("finevision", "dir/chartqa", 2)]
    assert parse_data("folder:a=b") == [("folder", "a=b", 1)]


@pytest.mark.parametrize("data, error", [("book", "unknown data set 'book': must be one of synthdoc"), ("synthchat", "synthchat has no pictures"),
                                         ("synthdoc,fox", "fox measures models"), ("synthdoc=0", "share")])
def test_data_that_makes_no_sense(data, error):
    with pytest.raises(ValueError, match=error):
        training_sets(Namespace(data=data, **DATA), 64, 10, 0)


def test_the_default_is_the_pages_alone():
    args = Namespace(data="synthdoc", **DATA)
    task, val, _ = training_sets(args, 64, 50, ramp=20)
    plain = SynthDoc("train", 50, image_size=64, chars=(10, 12), random_share=0.2, seed=0, ramp=20, faces=["sans", "mono"], min_px=8)
    assert type(task) is SynthDoc and len(val) == 1000
    for i in (0, 15, 49):
        assert task[i]["messages"] == plain[i]["messages"] and task[i]["images"][0].tobytes() == plain[i]["images"][0].tobytes()


def test_a_mixture_takes_every_page_once_an_epoch(folder):
    task, val, statistics = training_sets(Namespace(data=f"folder:{folder}=3,synthdoc=1", **DATA), 64, 250, 0)
    pages, held_out = ({c["id"] for c in Folder(folder, split, 0.3)} for split in ("train", "val"))
    assert len(task) >= 250 and {c["id"] for c in val} == held_out
    drawn = [task[i]["id"] for i in range(250)]
    own = [name for name in drawn if not name.startswith("synthdoc")]
    assert abs(len(own) - 187.5) < 2
    n = len(pages)
    epochs = [own[k:k + n] for k in range(0, len(own) - n + 1, n)]
    assert len(epochs) > 3 and all(Counter(epoch) == Counter(pages) for epoch in epochs) and epochs[0] != epochs[1]
    assert [task[i]["id"] for i in (200, 3, 77)] == [drawn[i] for i in (200, 3, 77)]  # any sample, in any order
    assert {statistics[i]["id"] for i in range(n)} <= pages


def test_shuffled_by_seed():
    orders = [[Shuffled(range(20), 40, seed)[i] for i in range(40)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0][20:]) == list(range(20))


# -----------------------------------------------------------------------------
# Scripts


def test_data_look(folder, tokenizer_dir, tmp_path):
    (folder / "page 0.jpg").write_bytes(b"no picture")
    lines = call(data_look.main, f"folder:{folder}", f"--tokenizer={tokenizer_dir}", "--preset=tiny", f"--out={tmp_path / 'sheet.png'}")
    record = json.loads(lines[-1])
    assert record["looked_at"] == record["conversations"] and record["bad"] == sum("bad: " in line and "page 0.jpg" in line for line in lines) == 1
    assert record["characters"]["max"] == len("Text 10 <|image|>\nüß") and record["image_positions"] == dict.fromkeys(("min", "median", "p90", "max"), 7.0)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (260 + 480, 8 * 260)


def test_readme_makes_pages_to_try(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec((ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0])
    pages = Folder("pages")
    assert len(pages) == 200 and sum("\n\n" in text for _, text, _ in pages.pages) > 150 and pages[0]["images"][0].size == (64, 64)


def test_data_look_at_text_only(tokenizer_dir, tmp_path):
    lines = call(data_look.main, "synthchat", f"--tokenizer={tokenizer_dir}", f"--out={tmp_path / 'sheet.png'}", "--samples=3")
    assert json.loads(lines[-1])["text_only"] == 3


@pytest.mark.parametrize("freeze", [False, True])
def test_finetune(folder, tokenizer_dir, tmp_path, monkeypatch, freeze):
    for name, value in {"VAL_PAGES": 16, "STATISTICS_PAGES": 32, "matmul_rate": lambda *args: 1e12}.items():
        monkeypatch.setattr(loop, name, value)
    call(vis_tok_train.main, "--preset=tiny", "--chars=10-12", f"--tokenizer={tokenizer_dir}", f"--checkpoints={tmp_path}", *TRAIN)
    flags = [f"--checkpoint={tmp_path / 'stage1'}", f"--data=folder:{folder}", "--val-share=0.3", f"--checkpoints={tmp_path}", "--matrix-lr=0.02"]
    lines = call(finetune.main, *flags, *TRAIN, *(["--freeze-sam"] if freeze else []))
    summary = json.loads(lines[-1])
    assert summary == json.loads((tmp_path / "finetune/summary.json").read_text())
    held_out = len(Folder(folder, "val", 0.3))
    assert all(summary[when]["samples"] == held_out and summary[when]["cer"] > 0 for when in ("before", "after"))
    before, after = (load_file(tmp_path / run / "model_000003/model.safetensors") for run in ("stage1", "finetune"))
    same = {name.split(".")[1] for name in before if name.startswith("encoder") and torch.equal(before[name], after[name])}
    assert ({"sam_model", "standardize"} <= same) == freeze and not torch.equal(before["projector.layers.weight"], after["projector.layers.weight"])
