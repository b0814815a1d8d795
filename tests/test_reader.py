"""
Proves that the reader which comes with the repository is the default, that a saved bfloat16 folder
loads and reads, that pages of another size are read in windows and the results say so per window,
and that the example pages are sound.

python -m pytest tests/test_reader.py
"""
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from nanochat import reader
from nanochat.conversation import ocr_conversation
from nanochat.engine import Engine, Result
from nanochat.image_modes import get_mode
from nanochat.reader import NanoDeepseekOCR, PageResult, WindowEngine, known_to
from nanochat.windows import Known, split
from scripts import export, ocr, vision_eval
from tasks.folder import Folder

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
MODE = get_mode("64px")
KNOWN = Known(64, (10, 12), (5, 30))
META = {"stage": "stage 2", "step": 3, "commit": "abc", "mode": "64px",
        "user_config": {"seed": 0, "chars": "14-20", "faces": "sans"}}


def page_image(paragraphs=1):
    """A picture that is larger than the tiny model's pages of 64 px."""
    image = Image.new("L", (420, 120 * paragraphs), 255)
    font = ImageFont.load_default(14)
    lines = textwrap.fill("The quick brown fox jumps over the lazy dog, and then it sleeps.", 50)
    for k in range(paragraphs):
        ImageDraw.Draw(image).multiline_text((12, 12 + 100 * k), lines, 0, font, spacing=8)
    return image


@pytest.fixture
def saved(model, tokenizer, tmp_path):
    """Folder of a saved model, as the reader is: bfloat16, in windows."""
    model.tokenizer = tokenizer
    model.meta = {**META, "windows": KNOWN.to_meta()}
    results = {"heldout": {"samples": 2, "one_minus_ned": 0.5}}
    model.save_pretrained(tmp_path / "saved", results, "bfloat16", "bash speedrun.sh page", "me/it")
    return tmp_path / "saved"


# -----------------------------------------------------------------------------
# The folder


def test_a_saved_bfloat16_folder(saved, model):
    weights = load_file(saved / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    card = (saved / "README.md").read_text()
    for said in ("parameters in bfloat16", "commit abc, seed 0", "bash speedrun.sh page", "0.5",
                 'from_pretrained("me/it")'):
        assert said in card

    loaded = NanoDeepseekOCR.from_pretrained(saved)
    for name, p in loaded.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, weights[name].float())

    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is corrupted"):
        NanoDeepseekOCR.from_pretrained(saved)


def test_export_writes_such_a_folder(saved, tmp_path, capsys):
    out = tmp_path / "again"
    export.main([f"--checkpoint={saved}", f"--out={out}", "--dtype=bfloat16", "--command=make it",
                 "--windows=11-12,5-30"])
    assert (out / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert "make it" in (out / "README.md").read_text()
    loaded = NanoDeepseekOCR.from_pretrained(out)
    assert Known.from_meta(loaded.meta, 64) == Known(64, (11, 12), (5, 30))
    with pytest.raises(ValueError, match="--dtype has no effect on --format=encoder"):
        export.main([f"--checkpoint={saved}", f"--out={tmp_path / 'e'}", "--format=encoder",
                     "--dtype=bfloat16"])
    with pytest.raises(ValueError, match="dtype 'int8': must be one of float32, bfloat16"):
        loaded.save_pretrained(tmp_path / "e", dtype="int8")


def test_the_default_checkpoint(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # not a path relative to the working directory
    monkeypatch.setattr(reader, "READER", saved)
    assert NanoDeepseekOCR.from_pretrained().meta["commit"] == "abc"
    assert reader.READER == saved

    monkeypatch.setattr(reader, "READER", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="comes without its reader. Get it with git"):
        NanoDeepseekOCR.from_pretrained()


def test_every_page_is_warned_of(saved):
    """Python shows the same warning once, which would leave the next page out without a word."""
    program = (f"from PIL import Image; from nanochat.reader import NanoDeepseekOCR as N\n"
               f"model = N.from_pretrained({str(saved)!r})\n"
               f"for _ in range(2): model.read(Image.new('L', (300, 300), 255))")
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.stderr.count("no print was found") == 2


def test_doubtful_text_is_warned_of(saved):
    model = NanoDeepseekOCR.from_pretrained(saved)
    page = Image.new("RGB", (64, 64), "white")
    with pytest.warns(reader.ReadingNote, match="its text may be wrong: .*cut"):
        model.read(page, max_new_tokens=3)


def test_ocr_has_that_default_and_an_evaluation_has_not():
    assert ocr.parse_arguments(["a.png"]).checkpoint == str(ROOT / "checkpoints/reader")
    assert vision_eval.parse_args([]).checkpoint == "checkpoints/stage2"


READER = ROOT / "checkpoints/reader"


@pytest.mark.skipif(not READER.is_dir(), reason="this copy comes without its reader")
def test_the_reader_of_the_repository():
    size = sum(path.stat().st_size for path in READER.iterdir() if path.is_file())
    assert size <= 16_000_000
    model = NanoDeepseekOCR.from_pretrained()
    assert Known.from_meta(model.meta, get_mode(model.meta["mode"]).size)
    assert (READER / "sha256.json").exists()  # without it nothing would be verified


# -----------------------------------------------------------------------------
# Windows


class Counting(WindowEngine):
    """Reads the number of its window, over all that it has been asked for."""
    def __init__(self, *args):
        super().__init__(*args)
        self.read = []

    def decode(self, conversations, max_new_tokens, temperature, seed):
        first = len(self.read)
        self.read += [conversation["images"][0].size for conversation in conversations]
        tokens = []
        for k in range(len(conversations)):
            tokens.append(self.tokenizer.encode(f"w{first + k}") + [self.end])
        for step in range(max(map(len, tokens))):
            news = []
            for k, ids in enumerate(tokens):
                if step < len(ids):
                    news.append((k, ids[step], -0.1 if k else -2.0))
            yield news


@pytest.fixture
def engine(model, tokenizer):
    return Counting(model.eval(), tokenizer, MODE, None, KNOWN)


def test_a_larger_page_is_read_in_windows(engine):
    conversation = ocr_conversation(page_image(2), "", "page")
    windows, _ = split(page_image(2), KNOWN)
    own = ocr_conversation(Image.new("L", (64, 64), 255), "", "small")
    first, [result] = engine.generate([own], None), engine.generate([conversation], None)
    assert not isinstance(first[0], PageResult)
    n = len(windows)
    assert n >= 4
    assert engine.read == [(64, 64)] * (1 + n)
    assert result.text.split() == [f"w{k + 1}" for k in range(n)]
    assert result.text.count("\n\n") == 1
    assert len(result.windows) == n and result.finished
    assert result.tokens == sum(part.tokens for _, part in result.windows)
    # The first row of a batch is low in confidence, and that is said of the window.
    assert result.windows[0][1].flags == ["low confidence"]
    assert result.flags == ["low confidence"]
    assert result.windows[0][0].startswith(f"window 1 of {n} (x ")
    assert len(engine.parts(conversation)) == n


def test_order_of_a_mixed_batch(engine):
    small = ocr_conversation(Image.new("L", (64, 64), 255), "", "small")
    large = ocr_conversation(page_image(), "", "page")
    empty = ocr_conversation(Image.new("L", (200, 90), 255), "", "empty")
    results = engine.generate([large, empty, small], None)
    n = len(results[0].windows)
    assert results[0].text.split() == [f"w{k}" for k in range(n)]
    assert results[1].text == "" and results[1].notes == ["no print was found"]
    assert results[2].text == f"w{n}"


def test_questions_are_asked_about_the_whole_picture(engine):
    question = ocr_conversation(page_image(), "", "page", "\nWhat is it?")
    assert engine.parts(question) == [question]
    chat = {"messages": [{"role": "user", "content": "hi"}], "images": []}
    assert engine.parts(chat) == [chat]


def test_streaming_gives_the_same_text(engine):
    conversation = ocr_conversation(page_image(2), "", "page")
    pieces = list(engine.stream(conversation, None))
    text = "".join(piece for piece, _ in pieces)
    assert text == pieces[-1][1].text
    assert "\n\n" in text
    empty = ocr_conversation(Image.new("L", (200, 90), 255), "", "empty")
    assert [piece for piece, _ in engine.stream(empty, None)] == [""]


def test_who_reads_in_windows(saved, model, tokenizer):
    meta = {"windows": KNOWN.to_meta()}
    assert known_to(meta, MODE, "auto") == KNOWN
    assert known_to({}, MODE, "auto") is None
    assert known_to(meta, MODE, "no") is None
    assert known_to({}, MODE, "10-14,5-30") == Known(64, (10, 14), (5, 30))
    with pytest.raises(ValueError, match="needs an image mode of one size"):
        known_to({}, get_mode("gundam"), "10-14,5-30")
    assert known_to(meta, get_mode("gundam"), "auto") is None

    loaded = NanoDeepseekOCR.from_pretrained(saved)
    image = page_image()
    whole = loaded.read(image, windows="no", max_new_tokens=5)
    engine = Engine(loaded, loaded.tokenizer, MODE)
    assert whole == engine.generate([ocr_conversation(image, "", "page")], 5)[0].text
    assert loaded.read(image, max_new_tokens=5) != whole


def test_remarks_name_the_window(capsys):
    sure = Result("a", 1, True, -0.1)
    unsure = Result("b", 1, True, -2.0)
    named = [("window 1 of 2 (x 0-9, y 0-9)", sure), ("window 2 of 2 (x 0-9, y 9-20)", unsure)]
    result = PageResult("a b", 2, True, -1.0, named, ["a note"])
    ocr.remark(ocr.Page("page.png"), result)
    assert capsys.readouterr().err.splitlines() == [
        "note: page.png: a note",
        "look at page.png window 2 of 2 (x 0-9, y 9-20): low confidence (confidence -2.00 "
        "nats/token)"]


# -----------------------------------------------------------------------------
# Example pages


def test_example_pages():
    pages = Folder(EXAMPLES)
    assert len(pages) == 6
    for i in range(len(pages)):
        [image] = pages[i]["images"]
        text = pages.truth(i)
        path = EXAMPLES / pages.image_name(i)
        assert path.stat().st_size <= 50_000
        assert 150 <= len(text) <= 450
        assert text.isascii() and "\n" not in text
        assert path.stem in (EXAMPLES / "README.md").read_text()
        # They give the reader windows in which every word is one.
        windows, notes = split(image, Known(256, (10, 14), (130, 400)))
        assert not notes
        pieces = [piece for window in windows for row in window.rows for piece in row.pieces]
        assert len(pieces) == len(text.split())


def test_an_evaluation_takes_the_folder_of_examples(saved, capsys, tmp_path):
    vision_eval.main([f"--checkpoint={saved}", f"--task=folder:{EXAMPLES}", f"--out={tmp_path}/out",
                      "--max-new-tokens=4", "--device-type=cpu", "--dtype=float32"])
    rows = vision_eval.read_lines(f"{tmp_path}/out/folder.jsonl")
    names = sorted(path.name for path in EXAMPLES.glob("*.png"))
    assert [row["image_name"] for row in rows] == names
    assert all("one_minus_ned" in row and not row["failed"] for row in rows)
    assert all(row["vision_tokens"] > 4 for row in rows)  # 4 of each window of the tiny model
    with pytest.raises(ValueError, match="give one folder"):
        vision_eval.parse_args(["--task=folder:a", "--path=b"])
