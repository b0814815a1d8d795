"""
Proves that a person's own pages arrive with their texts, in parts that stay as they are; that
--data names mixtures of which any step can be rebuilt; that data_look shows what the model gets;
and that finetune starts from a whole checkpoint and reports before and after.

    python -m pytest tests/test_folder.py
"""
import argparse
import io
import json
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from scripts import data_look, finetune, vis_tok_train
from tasks import registry
from tasks.folder import Folder
from tasks.omnidocbench import OmniDocBench
from tasks.registry import add_data_arguments, open_set, parse_data, training_sets
from tasks.synthdoc import SynthDoc

ROOT = Path(__file__).parents[1]
PAGES = 40


@pytest.fixture
def folder(tmp_path):
    """Forty pages, every other in a subfolder, texts as .txt or .md."""
    pages = tmp_path / "pages"
    (pages / "more").mkdir(parents=True)
    for i in range(PAGES):
        ending = "PNG" if i % 4 else "jpg"
        path = pages / ("more" if i % 2 else "") / f"page {i}.{ending}"
        Image.new("L", (60 + i, 80), 255 - i).save(path)
        text_path = path.with_suffix(".md" if i % 3 else ".txt")
        text_path.write_text(f"\ufeffText {i} <|image|>\nüß \n", encoding="utf-8")
    (pages / "README.txt").write_text("about these pages")
    return pages


def write_lines(path, *rows):
    """A JSON-lines file of dicts, or of lines as they are."""
    lines = []
    for row in rows:
        lines.append(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def call(main, *flags):
    """What a script prints, as lines."""
    out = io.StringIO()
    with redirect_stdout(out):
        main(list(map(str, flags)))
    return out.getvalue().splitlines()


# -----------------------------------------------------------------------------
# Folders


def test_pictures_and_texts_beside(folder):
    task = Folder(folder)
    pages = {page["id"]: page for page in task}
    assert len(task) == len(pages) == PAGES
    page = pages["more/page 7.PNG"]
    # Without the byte order mark and the white space around it.
    assert page["messages"][1]["content"] == "Text 7 <|image|>\nüß"
    assert page["images"][0].size == (67, 80)


def test_a_page_is_known_without_opening_its_picture(folder):
    task = Folder(folder)
    for i, page in enumerate(task):
        assert task.truth(i) == page["messages"][1]["content"]
        assert task.image_name(i) == page["image_name"] == page["id"]
    (folder / "page 0.jpg").write_bytes(b"")
    names = [task.image_name(i) for i in range(PAGES)]
    assert task.truth(names.index("page 0.jpg")) == "Text 0 <|image|>\nüß"


def test_parts_stay_as_they_are(folder):
    def ids(split, share=0.3):
        return {page["id"] for page in Folder(folder, split, share)}

    train = ids("train")
    val = ids("val")
    assert not train & val and len(train | val) == PAGES and 4 <= len(val) <= 20
    # Another page moves no other, and a larger share only adds pages.
    Image.new("L", (9, 9)).save(folder / "a new one.png")
    (folder / "a new one.txt").write_text("new")
    assert train <= ids("train") and val <= ids("val") and val <= ids("val", 0.5)
    empty = "none of its 41 pages .* is for val at a validation share of 0"
    with pytest.raises(ValueError, match=empty):
        ids("val", 0)


def test_json_lines(folder):
    first_row = {"image": "page 0.jpg", "text": "a\u2028b"}
    second_row = {"image": "page 2.PNG", "text": "", "prompt": "\nHow many?"}
    first, second = Folder(write_lines(folder / "pages.jsonl", first_row, second_row))
    assert first["messages"][1]["content"] == "a\u2028b"  # which str.splitlines would cut
    assert first["messages"][0]["content"][1]["text"] == "\nFree OCR."
    assert second["messages"][0]["content"][1]["text"] == "\nHow many?"
    assert second["images"][0].size == (62, 80)


@pytest.mark.parametrize("absolute", [False, True])
def test_json_lines_may_not_lead_out_of_the_folder(folder, absolute):
    outside = folder.parent / "outside.png"
    Image.new("L", (9, 9)).save(outside)
    name = str(outside) if absolute else "more/../../outside.png"
    lines = write_lines(folder / "pages.jsonl", {"image": name, "text": "x"})
    with pytest.raises(ValueError, match=f"line 1: {name} is outside .* --allow-outside"):
        Folder(lines)
    assert len(Folder(lines, allow_outside=True)) == 1
    # A link is in the folder because somebody put it there.
    (folder / "link.png").symlink_to(outside)
    Folder(write_lines(folder / "pages.jsonl", {"image": "link.png", "text": "x"}))[0]


@pytest.mark.parametrize("line, error", [
    ({"image": "page 0.jpg"}, "line 2 has no str 'text'"),
    ({"image": "page 0.jpg", "text": None}, "line 2 has no str 'text'"),
    ({"image": "gone.png", "text": ""}, "line 2: no picture .*gone.png"),
    ("{", "line 2 is not a JSON object"),
    ("3", "line 2 is not a JSON object"),
])
def test_json_lines_missing_or_broken(folder, line, error):
    path = write_lines(folder / "pages.jsonl", {"image": "page 0.jpg", "text": "a"}, line)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        Folder(path)


def test_a_folder_that_is_missing_or_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="none of its 0 pages"):
        Folder(tmp_path / "empty")


def test_broken_texts_and_pictures_are_named(folder):
    def fails(words):
        with pytest.raises(ValueError, match=words):
            list(Folder(folder))

    (folder / "page 0.md").write_text("")
    fails("page 0.jpg has 2 texts beside it")
    (folder / "page 0.md").unlink()
    (folder / "page 0.txt").write_bytes(b"\xff\xfe\x00")
    fails("page 0.txt is not UTF-8")
    (folder / "page 0.txt").unlink()
    fails("page 0.jpg has 0 texts beside it: needs one, page 0.txt or page 0.md")
    (folder / "page 0.txt").write_text("")
    (folder / "page 0.jpg").write_bytes(b"")
    fails("page 0.jpg: the picture cannot be read")


# -----------------------------------------------------------------------------
# --data


def arguments(*flags):
    """What a training script knows after its command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    add_data_arguments(parser, chars="10-12", faces="sans,mono", min_px=8, val_share=0.3)
    return parser.parse_args(flags)


def test_names_and_shares():
    sets = parse_data("folder:a=b/c=3,smoltalk,finevision:dir/chartqa=2")
    assert sets == [("folder", "a=b/c", 3), ("smoltalk", "", 1), ("finevision", "dir/chartqa", 2)]
    assert parse_data("folder:a=b") == [("folder", "a=b", 1)]


@pytest.mark.parametrize("data, error", [
    ("book", "unknown data set 'book': must be one of synthdoc"),
    ("synthchat", "synthchat has no pictures"),
    ("synthdoc,fox", "fox is for evaluation: training on it contaminates the score"),
    ("fox_like", "fox_like is for evaluation: training on it contaminates the score"),
    ("synthdoc=0", "the share of synthdoc is 0"),
])
def test_data_that_makes_no_sense(data, error):
    with pytest.raises(ValueError, match=error):
        training_sets(arguments(f"--data={data}"), 64, 10, 0)


@pytest.mark.parametrize("flags, error", [
    (["--chars=10"], "'10' is not LO-HI"),
    (["--data=synthpage", "--page-parts=table"], "'table' is not NAME=ODDS"),
    (["--data=synthpage", "--page-parts=paragraph=1,poem=1"], "poem"),
])
def test_pages_that_make_no_sense(flags, error):
    with pytest.raises(ValueError, match=error):
        training_sets(arguments("--chars=30-60", *flags), 64, 10, 0)


def assert_same(a, b):
    assert a["messages"] == b["messages"]
    assert a["images"][0].tobytes() == b["images"][0].tobytes()


def test_the_default_is_the_pages_alone():
    task, val = training_sets(arguments(), 64, 50, ramp=20)
    plain = SynthDoc("train", 50, image_size=64, chars=(10, 12), random_share=0.2, seed=0, ramp=20,
                     faces=["sans", "mono"], min_px=8)
    assert type(task) is SynthDoc and len(val) == 1000
    for i in (0, 15, 49):
        assert_same(task[i], plain[i])


def test_a_caller_without_all_flags_gets_their_defaults():
    few = argparse.Namespace(seed=0, chars="30-60")
    every = arguments("--chars=30-60")
    assert_same(open_set("synthpage", "", "train", few, 128, 5)[3],
                open_set("synthpage", "", "train", every, 128, 5)[3])


def test_flags_reach_whole_pages(tmp_path):
    """Damage, a person's own texts, and tables."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"one two three {number}" for number in range(1000)))
    shape = ["--data=synthpage", "--chars=150-200"]
    clean, _ = training_sets(arguments(*shape), 256, 8, 0)
    damaged, _ = training_sets(arguments(*shape, "--damage=1"), 256, 8, 0)
    own, _ = training_sets(arguments(*shape, f"--text-files={text}"), 256, 8, 0)
    tables, _ = training_sets(arguments(*shape, "--page-parts=paragraph=1,table=2"), 512, 8, 0)
    assert clean[0]["messages"] == damaged[0]["messages"]
    assert clean[0]["images"][0].tobytes() != damaged[0]["images"][0].tobytes()
    assert "one two three" in own[0]["messages"][1]["content"]
    assert "one two three" not in clean[0]["messages"][1]["content"]
    answers = [tables[i]["messages"][1]["content"] for i in range(8)]
    assert any("<table>" in answer for answer in answers)


def test_a_mixture_takes_every_page_once_an_epoch(folder):
    args = arguments(f"--data=folder:{folder}=3,synthdoc=1")
    task, val = training_sets(args, 64, 250, 0)
    pages = {page["id"] for page in Folder(folder, "train", 0.3)}
    held_out = {page["id"] for page in Folder(folder, "val", 0.3)}
    assert len(task) >= 250 and {page["id"] for page in val} == held_out

    drawn = [task[i]["id"] for i in range(250)]
    own = [name for name in drawn if not name.startswith("synthdoc")]
    assert abs(len(own) - 187.5) < 2
    n = len(pages)
    epochs = [own[start:start + n] for start in range(0, len(own) - n + 1, n)]
    assert len(epochs) > 3 and epochs[0] != epochs[1]
    for epoch in epochs:
        assert Counter(epoch) == Counter(pages)
    # Any sample can be rebuilt, in any order.
    assert [task[i]["id"] for i in (200, 3, 77)] == [drawn[i] for i in (200, 3, 77)]


@pytest.mark.parametrize("name", ["fox_like", "omnidocbench_like", *registry.RENDERED])
def test_sets_that_need_no_files_open(name):
    task = open_set(name, "", "val", arguments("--chars=100-200"), 1024, 3)
    conversation = task[0]
    assert len(task) >= 3 and conversation["messages"][-1]["role"] == "assistant"
    assert (task.answer_metric == "relaxed_accuracy") == (name == "synthchart")


# -----------------------------------------------------------------------------
# Scripts


def test_data_look(folder, tokenizer_dir, tmp_path):
    (folder / "page 0.jpg").write_bytes(b"no picture")
    sheet_path = tmp_path / "sheet.png"
    lines = call(data_look.main, f"folder:{folder}", f"--tokenizer={tokenizer_dir}",
                 "--preset=tiny", f"--out={sheet_path}")
    record = json.loads(lines[-1])
    assert record["looked_at"] == record["conversations"]
    reasons = [line for line in lines if "bad: " in line and "page 0.jpg" in line]
    assert record["bad"] == len(reasons) == 1
    assert record["characters"]["max"] == len("Text 10 <|image|>\nüß")
    assert set(record["image_positions"].values()) == {7.0}
    with Image.open(sheet_path) as sheet:
        assert sheet.size == (260 + 480, 8 * 260)  # one view and the text beside it, eight samples


def test_data_look_at_text_only(tokenizer_dir, tmp_path):
    lines = call(data_look.main, "synthchat", f"--tokenizer={tokenizer_dir}",
                 f"--out={tmp_path / 'sheet.png'}", "--samples=3")
    assert json.loads(lines[-1])["text_only"] == 3


def test_data_look_writes_a_folder_that_omnidocbench_reads(tokenizer_dir, tmp_path):
    flags = [f"--tokenizer={tokenizer_dir}", f"--out={tmp_path / 'sheet.png'}",
             f"--write-folder={tmp_path / 'set'}", "--samples=3"]
    call(data_look.main, "synthpage", "--preset=small", "--chars=100-200", "--damage=0.5", *flags)
    written = OmniDocBench(tmp_path / "set")
    assert len(written) == 3 and min(len(truth) for truth in written.truths) > 50
    with pytest.raises(ValueError, match="the pages of synthchat are not annotated"):
        call(data_look.main, "synthchat", *flags)


def test_the_reference_makes_pages_to_try(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec((ROOT / "docs/reference.md").read_text().split("```python\n")[1].split("```")[0])
    pages = Folder("pages")
    with_title = [page for page in pages.pages if "\n\n" in page.text]
    assert len(pages) == 200 and len(with_title) > 150
    assert pages[0]["images"][0].size == (64, 64)


TRAIN = ["--dtype=float32", "--device-type=cpu", "--num-iterations=3", "--device-batch-size=8",
         "--warmup-steps=1", "--eval-every=-1", "--save-every=-1"]


def test_pictures_are_looked_for_behind_the_first_samples(folder):
    pages = list(Folder(folder))[:2]
    chat = {"messages": [], "images": [], "id": "chat"}

    class Rowless(list):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            if row is None:
                raise KeyError("images")
            return row
    assert registry.has_pictures(Rowless([chat, None, chat, pages[0]]))
    assert not registry.has_pictures(Rowless([chat, None, chat]))


@pytest.fixture(scope="module")
def stage1(tmp_path_factory, tokenizer_dir):
    """A run folder of three steps."""
    out = tmp_path_factory.mktemp("stage1")
    call(vis_tok_train.main, "--preset=tiny", "--chars=10-12", f"--tokenizer={tokenizer_dir}",
         f"--checkpoints={out}", *TRAIN)
    return out / "stage1"


def test_finetune_does_not_outgrow_the_decoder(folder, stage1, tmp_path):
    with pytest.raises(ValueError, match="--max-seq-len=257: the decoder .* has 256 positions"):
        finetune.main([f"--checkpoint={stage1}", f"--data=folder:{folder}", "--max-seq-len=257",
                       f"--checkpoints={tmp_path}", "--device-type=cpu"])
    assert not list(tmp_path.glob("finetune"))


def test_finetune_skips_held_out_pages_that_are_broken(folder, stage1, tmp_path, capsys):
    """Long texts, too, which leave the decoder no room for all that was said."""
    held_out = Folder(folder, "val", 0.3)
    names = [page.picture for page in held_out.pages]
    (folder / names[0]).write_bytes(b"no picture")
    for ending in (".txt", ".md"):
        text = (folder / names[1]).with_suffix(ending)
        if text.exists():
            text.write_text("Many words. " * 500)
        empty = (folder / names[2]).with_suffix(ending)
        if empty.exists():
            empty.write_text("")
    flags = [f"--checkpoint={stage1}", f"--data=folder:{folder}", "--val-share=0.3",
             f"--checkpoints={tmp_path}", "--bad-data=skip", "--too-long=clip", *TRAIN]
    summary = json.loads(call(finetune.main, *flags)[-1])
    for when in ("before", "after"):
        assert summary[when]["samples"] == len(names) - 2
    assert names[0] in capsys.readouterr().err


@pytest.mark.parametrize("freeze", [False, True])
def test_finetune(folder, stage1, tmp_path, freeze):
    flags = [f"--checkpoint={stage1}", f"--data=folder:{folder}", "--val-share=0.3",
             f"--checkpoints={tmp_path}", "--matrix-lr=0.02", *TRAIN]
    if freeze:
        flags.append("--freeze-sam")
    lines = call(finetune.main, *flags)

    summary = json.loads(lines[-1])
    assert summary == json.loads((tmp_path / "finetune/summary.json").read_text())
    held_out = len(Folder(folder, "val", 0.3))
    for when in ("before", "after"):
        assert summary[when]["samples"] == held_out and summary[when]["cer"] > 0

    # What is frozen is equal bit for bit; the rest has moved.
    before = load_file(stage1 / "model_000003/model.safetensors")
    after = load_file(tmp_path / "finetune/model_000003/model.safetensors")
    unchanged = set()
    for name in before:
        if name.startswith("encoder") and torch.equal(before[name], after[name]):
            unchanged.add(name.split(".")[1])
    assert ("sam_model" in unchanged) == freeze
    assert not torch.equal(before["projector.layers.weight"], after["projector.layers.weight"])
