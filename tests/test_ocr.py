"""
Proves that scripts.ocr reads pictures, folders, patterns, PDFs and standard input in order; that what cannot be read is named, does
not stop the rest and shows in the exit status; that pages are drawn no sooner than their batch; and that model.read gives a str.

python -m pytest tests/test_ocr.py
"""

import io
import json
import sys

import pytest
from PIL import Image

from nanochat.engine import Engine, NoRepeat, Result
from nanochat.image_modes import MODES
from scripts import ocr


class Shades(Engine):
    """Says the grey level of the picture's middle; or the last question."""
    def generate(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        self.batches.append(len(conversations))
        self.asked += [c["messages"][0]["content"][1]["text"] for c in conversations]
        results = []
        for c in conversations:
            x, y = c["images"][0].size
            level = c["images"][0].convert("L").getpixel((x // 2, y // 2))
            results.append(Result("loop " * 20 if level == 99 else f"grey {level}", 5, True, -2.0 if level == 98 else -0.1))
        return results


@pytest.fixture
def engine(model, tokenizer, monkeypatch):
    engine = Shades(model.eval(), tokenizer, MODES["test"])
    engine.batches, engine.asked = [], []
    monkeypatch.setattr(ocr, "load_engine", lambda args, device: (engine, {}))
    return engine


@pytest.fixture
def run(engine, capsys):
    """(lines of standard output, standard error, exit status) of the script."""
    def call(*flags):
        try:
            ocr.main([str(f) for f in flags])
            status = 0
        except SystemExit as e:
            status = e.code
        out, err = capsys.readouterr()
        return out.splitlines(), err, status
    return call


def picture(path, level, size=(40, 30), **kw):
    Image.new("L", size, level).save(path, **kw)
    return path


def pdf(path, levels):
    first, *rest = (Image.new("L", (72, 72), level) for level in levels)
    first.save(path, save_all=True, append_images=rest)
    return path


def test_a_picture_is_its_text_alone(run, tmp_path):
    assert run(picture(tmp_path / "a.png", 7)) == (["grey 7"], "", 0)


def test_files_folders_and_patterns_in_order(run, engine, tmp_path):
    (tmp_path / "folder/inner").mkdir(parents=True)
    picture(tmp_path / "folder/b.png", 2), picture(tmp_path / "folder/a.bmp", 1), picture(tmp_path / "folder/inner/c.png", 3)
    (tmp_path / "folder/notes.txt").write_text("no page")
    picture(tmp_path / "x1.png", 4), picture(tmp_path / "x2.png", 5), picture(tmp_path / "[z].png", 6)
    lines, err, status = run(tmp_path / "[z].png", tmp_path / "folder", tmp_path / "x*.png", "--batch-size=4", "--jsonl")
    assert [json.loads(line)["text"] for line in lines] == ["grey 6", "grey 1", "grey 2", "grey 3", "grey 4", "grey 5"]
    assert status == 0 and engine.batches == [4, 2] and "1 files are no pictures" in err
    lines, _, _ = run(tmp_path / "x*.png")
    assert lines == [f"== {tmp_path / 'x1.png'}", "grey 4", f"== {tmp_path / 'x2.png'}", "grey 5"]


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(run, tmp_path):
    good = picture(tmp_path / "good.png", 8)
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(noise, "PNG")
    broken = {"empty.png": b"", "cut.png": noise.getvalue()[:2000], "text.jpg": b"hello", "broken.pdf": b"%PDF-1.4\nnothing",
              "gone.png": None}
    for name, content in broken.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    lines, err, status = run(*(tmp_path / name for name in broken), good, tmp_path / "nothing*.png", "--jsonl")
    records = [json.loads(line) for line in lines]
    assert status == 1 and [("text" in r) for r in records] == [False] * 5 + [True, False] and records[5]["text"] == "grey 8"
    for name in (*broken, "nothing*.png"):
        assert f"error: {tmp_path / name}: " in err
    assert "the file is empty" in err and "6 files or pages could not be read" in err


def test_huge_pictures_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ocr, "MAX_PIXELS", 1000)
    lines, err, status = run(picture(tmp_path / "35.png", 0, (35, 35)))
    assert (lines, status) == ([], 1) and "35 x 35 px, over 1000 px" in err
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    lines, err, status = run(picture(tmp_path / "90.png", 0, (90, 90)))  # PIL itself refuses this one
    assert (lines, status) == ([], 1) and "exceeds limit of" in err


def test_a_format_that_would_start_another_program_is_not_opened(run, tmp_path):
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    lines, err, status = run(tmp_path / "page.png")
    assert (lines, status) == ([], 1) and "cannot identify" in err


def test_pages_of_pdf_and_tiff(run, engine, tmp_path, monkeypatch):
    pytest.importorskip("pypdfium2")
    lines, err, status = run(pdf(tmp_path / "a.pdf", range(0, 100, 20)), "--batch-size=2", "--jsonl")
    assert [(json.loads(line)["page"], json.loads(line)["text"]) for line in lines] == [(k + 1, f"grey {20 * k}") for k in range(5)]
    assert engine.batches == [2, 2, 1] and status == 0
    lines, _, _ = run(tmp_path / "a.pdf")
    assert lines[:2] == [f"== {tmp_path / 'a.pdf'} page 1", "grey 0"]
    Image.new("L", (9, 9), 10).save(tmp_path / "b.tiff", save_all=True, append_images=[Image.new("L", (9, 9), 11)])
    assert [json.loads(line)["text"] for line in run(tmp_path / "b.tiff", "--jsonl")[0]] == ["grey 10", "grey 11"]
    monkeypatch.setattr(ocr, "MAX_PIXELS", 1000)
    _, err, status = run(tmp_path / "a.pdf")
    assert status == 1 and "page 1: 144 x 144 px at 144 dpi" in err and "lower --dpi" in err and "page 5" in err


def test_an_encrypted_pdf(run, tmp_path):
    pytest.importorskip("pypdfium2")
    content = pdf(tmp_path / "a.pdf", [1]).read_bytes()
    lock = b"trailer\n<< /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <" + b"41" * 32 + b"> /U <" + b"42" * 32 + b"> >> /ID [<0> <0>] "
    (tmp_path / "a.pdf").write_bytes(content.replace(b"trailer\n<<", lock))
    lines, err, status = run(tmp_path / "a.pdf")
    assert (lines, status) == ([], 1) and "encrypted or broken" in err


def test_pages_are_drawn_batch_by_batch(run, engine, tmp_path, monkeypatch):
    drawn, seen = [], []
    pages_of, generate = ocr.pages_of, engine.generate
    def counted(path, dpi):
        for page in pages_of(path, dpi):
            drawn.append(path)
            yield page
    monkeypatch.setattr(ocr, "pages_of", counted)
    engine.generate = lambda *args: seen.append(len(drawn)) or generate(*args)
    run(*(picture(tmp_path / f"{k}.png", k) for k in range(7)), "--batch-size=2")
    assert seen == [2, 4, 6, 7]


def test_standard_input(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(picture(tmp_path / "a.png", 7).read_bytes())))
    assert run("-") == (["grey 7"], "", 0)


def test_flags(run, tmp_path):
    lines, err, status = run(picture(tmp_path / "loop.png", 99), picture(tmp_path / "low.png", 98), "--jsonl")
    assert [json.loads(line)["flags"] for line in lines] == [["loops"], ["low confidence"]] and status == 0
    assert "loop.png: loops" in err and "low.png: low confidence (confidence -2.00" in err


def test_a_question_about_a_picture(run, engine, tmp_path):
    run(picture(tmp_path / "a.png", 7), "--prompt=What is it?")
    run(tmp_path / "a.png")
    assert engine.asked == ["\nWhat is it?", "\nFree OCR."]


def test_streaming_and_chat(run, engine, tmp_path, monkeypatch):
    plain = Engine(engine.model, engine.tokenizer, engine.mode)
    page = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nFree OCR."}]}],
            "images": [Image.open(picture(tmp_path / "a.png", 7))]}
    expected = plain.generate([page], 30)[0].text
    assert run(tmp_path / "a.png", "--stream", "--max-new-tokens=30")[0] == expected.splitlines()
    hello = {"messages": [{"role": "user", "content": "hello"}], "images": []}
    assert run("--prompt=hello", "--max-new-tokens=30")[0] == plain.generate([hello], 30)[0].text.splitlines()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n"))
    answers = run("--chat", "--max-new-tokens=20")[0]
    first = plain.generate([hello], 20)[0].text
    turns = [*hello["messages"], {"role": "assistant", "content": first}, {"role": "user", "content": "again"}]
    assert answers == f"{first}\n{plain.generate([{'messages': turns, 'images': []}], 20)[0].text}".splitlines()


@pytest.mark.parametrize("flags", [[], ["a.png", "--chat"], ["a.png", "--stream", "--jsonl"], ["a.png", "--dpi=0"]])
def test_flags_that_make_no_sense(engine, flags):
    with pytest.raises(ValueError, match="--chat|--dpi"):
        ocr.main(flags)


def test_model_read(model, tokenizer):
    image = Image.effect_noise((50, 70), 60)
    model.eval()
    with pytest.raises(ValueError, match="no tokenizer to read with"):
        model.read(image)
    model.tokenizer = tokenizer
    text = model.read(image, max_new_tokens=20)
    assert isinstance(text, str) and text == model.read(image, "test", max_new_tokens=20)
    assert text == model.read(image, lambda w, h: MODES["test"], max_new_tokens=20)
    assert model.read(image, prompt="What?", max_new_tokens=20) != text
    assert len(model.read(image)) > len(text)  # up to the decoder's last position
    assert model.read(image, no_repeat=NoRepeat(2, 50)) != model.read(image)
    with pytest.raises(ValueError, match="image mode 'base'"):
        model.read(image, "base")
    assert not any("tokenizer" in name for name in model.state_dict())
