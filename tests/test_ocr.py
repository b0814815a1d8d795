"""
Proves that scripts.ocr reads pictures, folders, patterns, PDFs and standard input in order; that
what cannot be read is named, does not stop the rest and shows in the exit status; that pages are
drawn no sooner than their batch; and that a model loads, reads and saves by itself.

python -m pytest tests/test_ocr.py
"""

import io
import json
import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, PngImagePlugin

from nanochat import reader
from nanochat.common import run_main
from nanochat.conversation import ocr_conversation
from nanochat.engine import Engine, NoRepeat, Result
from nanochat.image_modes import get_mode
from nanochat.reader import NanoDeepseekOCR, load_to_read
from scripts import ocr

SMALL = get_mode("64px")
LOOPING, UNSURE = 99, 98  # gray levels that Shades reads badly


class Shades(Engine):
    """Reads the gray level in the middle of a picture."""
    def __init__(self, *args):
        super().__init__(*args)
        self.batches = []  # sizes of the batches that it was given
        self.asked = []    # their prompts

    def generate(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        self.batches.append(len(conversations))
        results = []
        for conversation in conversations:
            _, prompt = conversation["messages"][0]["content"]
            self.asked.append(prompt["text"])
            [image] = conversation["images"]
            level = image.convert("L").getpixel((image.width // 2, image.height // 2))
            text = "loop " * 20 if level == LOOPING else f"gray {level}"
            results.append(Result(text, 5, True, -2.0 if level == UNSURE else -0.1))
        return results


@pytest.fixture
def engine(model, tokenizer, monkeypatch):
    engine = Shades(model.eval(), tokenizer, SMALL)
    monkeypatch.setattr(ocr, "load_engine", lambda args, device: (engine, {}))
    return engine


@pytest.fixture
def run(engine, capsys):
    """A function that calls the script -> (lines of standard output, standard error, status)."""
    def call(*flags):
        status = 0
        try:
            ocr.main([str(flag) for flag in flags])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return out.splitlines(), err, status
    return call


def records(lines):
    """What --jsonl printed."""
    return [json.loads(line) for line in lines]


def texts(lines):
    return [record["text"] for record in records(lines)]


def picture(path, level, size=(40, 30), **kw):
    Image.new("L", size, level).save(path, **kw)
    return path


def many_pages(path, levels, size=(72, 72), **kw):
    """A PDF (of an inch a side) or TIFF, a page for each gray level."""
    first, *rest = [Image.new("L", size, level) for level in levels]
    first.save(path, save_all=True, append_images=rest, **kw)
    return path


# -----------------------------------------------------------------------------
# Files in


def test_a_picture_is_its_text_alone(run, tmp_path):
    assert run(picture(tmp_path / "a.png", 7)) == (["gray 7"], "", 0)


def test_files_folders_and_patterns_in_order(run, engine, tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    picture(folder / "b.png", 2)
    picture(folder / "a.bmp", 1)
    picture(folder / "inner/c.png", 3)
    (folder / "notes.txt").write_text("no page")
    picture(tmp_path / "x1.png", 4)
    picture(tmp_path / "x2.png", 5)
    picture(tmp_path / "[z].png", 6)
    files = [tmp_path / "[z].png", folder, tmp_path / "x*.png"]
    lines, err, status = run(*files, "--batch-size=4", "--jsonl")
    assert texts(lines) == ["gray 6", "gray 1", "gray 2", "gray 3", "gray 4", "gray 5"]
    assert status == 0
    assert engine.batches == [4, 2]
    assert f"{folder}: 1 files are not pictures" in err
    lines, _, _ = run(tmp_path / "x*.png")
    assert lines == [f"== {tmp_path / 'x1.png'}", "gray 4", f"== {tmp_path / 'x2.png'}", "gray 5"]


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(run, tmp_path):
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(noise, "PNG")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(noise.getvalue()[:2000])
    (tmp_path / "text.jpg").write_bytes(b"hello")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4\nnothing")
    bad = ["empty.png", "cut.png", "text.jpg", "broken.pdf", "gone.png"]
    picture(tmp_path / "good.png", 8)
    files = [tmp_path / name for name in [*bad, "good.png", "nothing*.png"]]
    lines, err, status = run(*files, "--jsonl")
    assert status == 1
    *failed, good, no_match = records(lines)
    assert good["text"] == "gray 8"
    for path, record in zip([*files[:5], files[6]], [*failed, no_match]):
        assert record["file"] == str(path) and "text" not in record
        assert f"error: {path}: {record['error']}" in err
    assert failed[0]["error"] == "the file is empty"
    assert "6 files or pages could not be read" in err


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_any_failure_of_one_file_leaves_the_others(run, tmp_path):
    """PIL raises a TypeError for a TIFF that ends inside its directory: no error of pictures."""
    cut = many_pages(tmp_path / "b.tiff", [1, 2], compression="packbits")
    cut.write_bytes(cut.read_bytes()[:-100])
    files = [picture(tmp_path / "a.png", 5), cut, picture(tmp_path / "c.png", 6)]
    lines, err, status = run(tmp_path, "--jsonl")
    assert status == 1
    first, sound, failed, last = records(lines)
    assert [r["text"] for r in (first, sound, last)] == ["gray 5", "gray 1", "gray 6"]
    assert f"error: {files[1]} page 2: TypeError: " in err
    assert failed["error"] in err
    assert "1 files or pages could not be read" in err


def test_a_picture_that_cannot_be_converted_leaves_the_others(run, tmp_path):
    """It opens and decodes; gray levels that are not finite show only when it becomes RGB."""
    Image.new("F", (9, 9), float("nan")).save(tmp_path / "a.tiff")
    picture(tmp_path / "b.png", 6)
    lines, err, status = run(tmp_path)
    assert status == 1
    assert lines == [f"== {tmp_path / 'b.png'}", "gray 6"]
    assert f"error: {tmp_path / 'a.tiff'}: the image has gray levels that are not finite" in err


def test_huge_pictures_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ocr, "MAX_PIXELS", 1000)
    lines, err, status = run(picture(tmp_path / "35.png", 0, (35, 35)))
    assert (lines, status) == ([], 1)
    assert "35 x 35 px, over 1000 px" in err
    # Over twice this limit PIL itself refuses to open a picture.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    lines, err, status = run(picture(tmp_path / "90.png", 0, (90, 90)))
    assert (lines, status) == ([], 1)
    assert "exceeds limit of" in err


def test_a_format_that_would_start_another_program_is_not_opened(run, tmp_path):
    """PIL would hand PostScript to Ghostscript."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "page.png").write_bytes(postscript)
    lines, err, status = run(tmp_path / "page.png")
    assert (lines, status) == ([], 1)
    assert "cannot identify it: no picture (PNG, " in err


def test_pages_of_a_pdf(run, engine, tmp_path, monkeypatch):
    pytest.importorskip("pypdfium2")
    path = many_pages(tmp_path / "a.pdf", range(0, 100, 20))
    lines, _, status = run(path, "--batch-size=2", "--jsonl")
    assert status == 0
    assert texts(lines) == ["gray 0", "gray 20", "gray 40", "gray 60", "gray 80"]
    assert [record["page"] for record in records(lines)] == [1, 2, 3, 4, 5]
    assert engine.batches == [2, 2, 1]
    lines, _, _ = run(path)
    assert lines[:2] == [f"== {path} page 1", "gray 0"]

    monkeypatch.setattr(ocr, "MAX_PIXELS", 1000)
    _, err, status = run(path)
    assert status == 1
    for number in range(1, 6):
        assert f"page {number}: 144 x 144 px at 144 dpi, over 1000 px: lower --dpi" in err


FORM = b"""%PDF-1.4
1 0 obj << /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [4 0 R] >> >> endobj
2 0 obj << /Type /Pages /Kids [3 0 R] /Count 1 >> endobj
3 0 obj << /Type /Page /Parent 2 0 R /MediaBox [0 0 72 72] /Annots [4 0 R] >> endobj
4 0 obj << /Type /Annot /Subtype /Widget /FT /Tx /T (name) /V (filled) /F 4 /P 3 0 R
/Rect [0 0 72 72] /AP << /N 5 0 R >> >> endobj
5 0 obj << /Type /XObject /Subtype /Form /BBox [0 0 72 72] /Length 25 >> stream
0.2 g 0 0 72 72 re f     
endstream endobj
trailer << /Root 1 0 R >>
"""


def test_filled_fields_of_a_form_are_drawn(run, tmp_path):
    """The appearance of this text field is a dark square over the whole page."""
    pytest.importorskip("pypdfium2")
    (tmp_path / "form.pdf").write_bytes(FORM)
    lines, _, status = run(tmp_path / "form.pdf", "--jsonl")
    assert (texts(lines), status) == (["gray 51"], 0)


def pdf(path, page=b"", kids=b"3 0 R", count=1, catalog=b"", others=b""):
    """Writes a PDF by hand, with what is given in its dictionaries; one page of an inch a side."""
    path.write_bytes(
        b"%%PDF-1.7\n1 0 obj << /Type /Catalog /Pages 2 0 R %s >> endobj\n"
        b"2 0 obj << /Type /Pages /Kids [%s] /Count %d /MediaBox [0 0 72 72] >> endobj\n"
        b"3 0 obj << /Type /Page /Parent 2 0 R %s >> endobj\n%s\ntrailer << /Root 1 0 R >>\n"
        % (catalog, kids, count, page, others))
    return path


def test_pages_without_area_and_files_without_pages(run, tmp_path):
    pytest.importorskip("pypdfium2")
    pdf(tmp_path / "a.pdf", b"/CropBox [100 100 200 200]")
    pdf(tmp_path / "b.pdf", kids=b"", count=0)
    lines, err, status = run(tmp_path, "--jsonl")
    flat, none = records(lines)
    assert (flat["page"], none["page"], status) == (1, None, 1)
    assert f"{tmp_path / 'a.pdf'} page 1: the page has no area, 0 x 0 points" in err
    assert f"{tmp_path / 'b.pdf'}: not a PDF that can be opened, broken, without pages" in err


def test_pages_that_a_pdf_only_claims_to_have(run, tmp_path, monkeypatch):
    """It counts a million pages; each would be an error, and the files after it never read."""
    pytest.importorskip("pypdfium2")
    monkeypatch.setattr(ocr, "MISSING", 3)
    pdf(tmp_path / "a.pdf", count=1_000_000)
    picture(tmp_path / "b.png", 5)
    lines, err, status = run(tmp_path, "--jsonl")
    real, *missing, rest, after = records(lines)
    assert (real["text"], after["text"], status) == ("gray 255", "gray 5", 1)
    assert [record["page"] for record in missing] == [2, 3, 4]
    assert "pages 5 to 1000000 are left out" in rest["error"]
    assert "a.pdf page 2: the page is missing or broken" in err


@pytest.mark.parametrize("side, fix", [(8400, b"lower --dpi to 76"), (10 ** 9, b"so the file is")])
def test_pages_too_large_to_be_drawn(run, tmp_path, side, fix):
    pytest.importorskip("pypdfium2")
    path = pdf(tmp_path / "a.pdf", b"/MediaBox [0 0 %d %d]" % (side, side))
    _, err, status = run(path)
    assert status == 1
    assert fix.decode() in err and "a.pdf page 1: " in err
    if side == 8400:  # and what the message says is true
        with pytest.raises(ValueError, match="lower --dpi to 76"):
            ocr.check_page_size(side, side, 77)
        ocr.check_page_size(side, side, 76)


def test_text_that_is_not_drawn_is_said(run, tmp_path, caplog):
    """Invisible text on a page without anything else, as a font that is missing leaves it."""
    pytest.importorskip("pypdfium2")
    content = b"BT /F1 12 Tf 3 Tr 9 9 Td (lost words) Tj ET"
    stream = b"4 0 obj << /Length %d >> stream\n%s\nendstream endobj" % (len(content), content)
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    page = b"/Contents 4 0 R /Resources << /Font << /F1 %s >> >>" % font
    pdf(tmp_path / "a.pdf", page, others=stream)
    pdf(tmp_path / "b.pdf")
    form = b"/NeedsRendering true /AcroForm << /Fields [] /XFA 4 0 R >>"
    xfa = b"4 0 obj << /Length 11 >> stream\n<xdp></xdp>\nendstream endobj"
    pdf(tmp_path / "c.pdf", catalog=form, others=xfa)
    _, err, status = run(tmp_path)
    notes = err.splitlines()
    assert status == 0
    assert len(notes) == 2  # a blank page is no error, and pypdfium2 itself says nothing
    assert "a.pdf page 1: the page is drawn blank, but the file has 9 characters" in notes[0]
    assert "c.pdf page 1: the file is an XFA form, which is not drawn" in notes[1]
    assert not caplog.records


def test_large_pages_are_read_in_smaller_batches(run, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(ocr, "MAX_PIXELS", 4000)
    for k, size in enumerate([(60, 60), (60, 60), (10, 10), (10, 10), (10, 10)]):
        picture(tmp_path / f"{k}.png", k, size)
    lines, _, _ = run(tmp_path, "--batch-size=3", "--jsonl")
    assert engine.batches == [2, 3]
    assert texts(lines) == [f"gray {k}" for k in range(5)]


def test_a_picture_that_mentions_pdf_is_a_picture(run, tmp_path):
    path = tmp_path / "a.png"
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "made from %PDF-1.7")
    picture(path, 7, pnginfo=info)
    assert b"%PDF-" in path.read_bytes()[:1024]
    assert run(path) == (["gray 7"], "", 0)


def test_a_pdf_may_begin_late(run, tmp_path):
    pytest.importorskip("pypdfium2")
    path = many_pages(tmp_path / "a.pdf", [60])
    path.write_bytes(b"junk of a mail gateway\n" + path.read_bytes())
    lines, _, status = run(path, "--jsonl")
    assert (texts(lines), status) == (["gray 60"], 0)


def test_pages_of_a_tiff(run, tmp_path):
    lines, _, _ = run(many_pages(tmp_path / "b.tiff", [10, 11]), "--jsonl")
    assert texts(lines) == ["gray 10", "gray 11"]
    assert [record["page"] for record in records(lines)] == [1, 2]


def test_a_tiff_that_is_cut_short_has_its_first_pages(run, tmp_path):
    path = many_pages(tmp_path / "b.tiff", [10, 120, 200])
    data = path.read_bytes()
    path.write_bytes(data[:-2500])  # in the third page's directory
    lines, err, status = run(path)
    assert lines[1::2] == ["gray 10", "gray 120"] and status == 1
    assert err.startswith(f"error: {path} page 3: ")


def test_a_pipe(run, tmp_path):
    """As in `ocr <(curl ...)`: it can be read once, and has no end to seek to."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    data = picture(tmp_path / "a.png", 9).read_bytes()
    writer = threading.Thread(target=path.write_bytes, args=[data])
    writer.start()
    lines, _, status = run(path)
    writer.join()
    assert (lines, status) == (["gray 9"], 0)


def test_a_broken_page_of_a_tiff_leaves_those_after_it(run, tmp_path, monkeypatch):
    frame_of = ocr.frame_of

    def breaks(image):
        if image.tell() == 1:
            raise OSError("decoder error -2")
        return frame_of(image)

    monkeypatch.setattr(ocr, "frame_of", breaks)
    lines, err, status = run(many_pages(tmp_path / "b.tiff", [10, 11, 12]), "--jsonl")
    assert status == 1 and "page 2" in err and "decoder error -2" in err
    assert [record.get("text") for record in records(lines)] == ["gray 10", None, "gray 12"]


def test_a_pattern_may_match_a_folder(run, tmp_path):
    (tmp_path / "scans").mkdir()
    picture(tmp_path / "scans" / "a.png", 7)
    lines, _, status = run(tmp_path / "sc*", "--jsonl")
    assert (texts(lines), status) == (["gray 7"], 0)
    lines, _, status = run(tmp_path / "**", "--jsonl")  # the folder and what is in it
    assert (texts(lines), status) == (["gray 7"], 0)


def test_an_encrypted_pdf(run, tmp_path):
    pytest.importorskip("pypdfium2")
    content = many_pages(tmp_path / "a.pdf", [1]).read_bytes()
    lock = b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>" % (b"41" * 32, b"42" * 32)
    locked = b"trailer\n<< /Encrypt %s /ID [<0> <0>] " % lock
    (tmp_path / "a.pdf").write_bytes(content.replace(b"trailer\n<<", locked))
    lines, err, status = run(tmp_path / "a.pdf")
    assert (lines, status) == ([], 1)
    assert "a.pdf: the PDF needs a password: save a copy without one" in err


def test_pages_are_drawn_batch_by_batch(run, engine, tmp_path, monkeypatch):
    drawn = []
    drawn_before_batch = []
    pages_of = ocr.pages_of
    generate = engine.generate

    def counted(path, dpi):
        for page in pages_of(path, dpi):
            drawn.append(page.path)
            yield page

    def watched(*args):
        drawn_before_batch.append(len(drawn))
        return generate(*args)

    monkeypatch.setattr(ocr, "pages_of", counted)
    engine.generate = watched
    files = [picture(tmp_path / f"{k}.png", k) for k in range(7)]
    run(*files, "--batch-size=2")
    assert drawn_before_batch == [2, 4, 6, 7]


def test_standard_input(run, tmp_path, monkeypatch):
    content = picture(tmp_path / "a.png", 7).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert run("-") == (["gray 7"], "", 0)


def test_progress_has_a_total(run, tmp_path, monkeypatch):
    """In pages, those of PDFs and TIFFs included; a file that cannot be read counts as one."""
    pytest.importorskip("pypdfium2")
    picture(tmp_path / "a.png", 1)
    many_pages(tmp_path / "b.tiff", [1, 2, 3])
    many_pages(tmp_path / "c.pdf", [1, 2])
    (tmp_path / "d.png").write_bytes(b"no picture")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    lines, _, status = run(tmp_path, "--batch-size=3")
    assert status == 1
    assert "0/7 " in terminal.getvalue() and "7/7 " in terminal.getvalue()


# -----------------------------------------------------------------------------
# Text out


def test_equal_names_in_other_folders_are_told_apart(run, tmp_path):
    for level, name in enumerate(["x", "y"]):
        (tmp_path / name).mkdir()
        picture(tmp_path / name / "p.png", level)
    lines, _, _ = run(tmp_path)
    assert lines == [f"== {tmp_path}/x/p.png", "gray 0", f"== {tmp_path}/y/p.png", "gray 1"]


def test_names_that_are_not_utf8(run, tmp_path):
    """They reach Python with surrogates, which no UTF-8 stream takes."""
    raw = os.fsencode(tmp_path) + b"/caf\xe9.png"
    picture(tmp_path / "a.png", 7)
    os.rename(tmp_path / "a.png", raw)
    (tmp_path / "b\udcff.png").write_bytes(b"no picture")
    lines, err, status = run(tmp_path)
    assert (lines, status) == ([rf"== {tmp_path}/caf\udce9.png", "gray 7"], 1)
    assert rf"error: {tmp_path}/b\udcff.png: " in err
    lines, _, _ = run(tmp_path, "--jsonl")
    assert records(lines)[1]["file"] == rf"{tmp_path}/caf\udce9.png"


def test_a_reader_that_has_gone_ends_it_quietly(engine, tmp_path, monkeypatch, capsys):
    """As in `ocr ... | head -1`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    files = [picture(tmp_path / f"{k}.png", k) for k in range(3)]
    with os.fdopen(write_end, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: ocr.main([*map(str, files), "--batch-size=1"]))
    assert (capsys.readouterr().err, stop.value.code) == ("", 141)


def test_a_page_that_cannot_be_read_does_not_stop_the_others(run, engine, tmp_path, monkeypatch):
    """Whatever reading one of them ends in: a rule for windows may have a bug, too."""
    read = engine.generate_each

    def generate_each(conversations, *args):
        if any("b.png" in conversation["id"] for conversation in conversations):
            raise IndexError("no such line")
        return read(conversations, *args)
    monkeypatch.setattr(engine, "generate_each", generate_each)
    files = [picture(tmp_path / f"{name}.png", k) for k, name in enumerate("abc")]
    lines, err, status = run(*files)
    assert (lines[1::2], status) == (["gray 0", "gray 2"], 1)
    assert err.startswith(f"error: {files[1]}: IndexError: no such line\n")


def test_folders_that_are_not_read_are_said(run, tmp_path, monkeypatch):
    picture(tmp_path / "a.png", 7)
    (tmp_path / "b").mkdir()
    (tmp_path / "above").symlink_to(tmp_path)
    walk = os.walk

    def no_entry(folder, onerror=None):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "b")))
        yield from walk(folder)
    monkeypatch.setattr(os, "walk", no_entry)
    lines, err, status = run(tmp_path)
    assert (lines[1], status) == ("gray 7", 1)
    assert "1 folders are links and were left out" in err
    assert f"error: {tmp_path / 'b'}: " in err


def test_interrupted(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 130
    assert capsys.readouterr().err .startswith("\ninterrupted")


def test_flags(run, tmp_path):
    loops = picture(tmp_path / "loops.png", LOOPING)
    unsure = picture(tmp_path / "unsure.png", UNSURE)
    lines, err, status = run(loops, unsure, "--jsonl")
    assert [record["flags"] for record in records(lines)] == [["loops"], ["low confidence"]]
    assert status == 0
    assert "loops.png: loops" in err
    assert "unsure.png: low confidence (confidence -2.00" in err


def test_a_question_about_a_picture(run, engine, tmp_path):
    run(picture(tmp_path / "a.png", 7), "--prompt=What is it?")
    run(tmp_path / "a.png")
    assert engine.asked == ["\nWhat is it?", "\nFree OCR."]


@pytest.fixture
def answer(engine):
    """A function messages -> the answer of the model itself, without pictures."""
    real = Engine(engine.model, engine.tokenizer, engine.mode)

    def call(messages, max_new_tokens):
        [result] = real.generate([{"messages": messages, "images": []}], max_new_tokens)
        return result.text
    return call


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_streaming(run, engine, tmp_path):
    path = picture(tmp_path / "a.png", 7)
    page = ocr_conversation(Image.open(path), "", "page")
    real = Engine(engine.model, engine.tokenizer, engine.mode)
    [expected] = real.generate([page], 30)
    lines, _, _ = run(path, "--stream", "--max-new-tokens=30")
    assert lines == expected.text.splitlines()


def test_a_question_and_a_chat(run, answer, monkeypatch):
    lines, _, _ = run("--prompt=hello", "--max-new-tokens=30")
    assert lines == answer([user("hello")], 30).splitlines()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n"))
    lines, _, _ = run("--chat", "--max-new-tokens=20")
    first = answer([user("hello")], 20)
    second = answer([user("hello"), assistant(first), user("again")], 20)
    assert lines == f"{first}\n{second}".splitlines()


def test_a_chat_keeps_the_latest_turns_that_fit(run, engine, tokenizer, monkeypatch):
    """
    The decoder has 256 positions, 60 of which are asked for the answer. A line that is too long by
    itself is refused and forgotten.
    """
    asked = []

    def positions(contents):
        messages = []
        for k, text in enumerate(contents):
            messages.append(assistant(text) if k % 2 else user(text))
        return len(tokenizer.render_for_completion({"messages": messages, "images": []}))

    def stream(conversation, max_new_tokens, temperature):
        contents = [message["content"] for message in conversation["messages"]]
        if positions(contents) + max_new_tokens > 256:
            raise ValueError("too long")
        asked.append(contents)
        yield "yes", Result("yes", 1, True, -0.1)

    engine.stream = stream
    questions = [f"question {k} of a talk that takes some positions" for k in range(6)]
    lines = [*questions[:3], "x" * 300, *questions[3:]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    out, err, status = run("--chat", "--max-new-tokens=60")
    assert (out, status) == (["yes"] * 6, 0)
    assert err.count("error: too long") == 1

    turns = []
    for question, contents in zip(questions, asked, strict=True):
        # The latest turns: with one turn more, it would not have fitted.
        whole = [*turns, question]
        assert contents == whole[-len(contents):]
        if len(contents) < len(whole):
            assert positions(whole[-len(contents) - 2:]) + 60 > 256
        turns += [question, "yes"]
    assert len(asked[-1]) < len(turns) - 1
    assert "the decoder has 256 positions: the first 1 turns of this chat no longer fit" in err


@pytest.mark.parametrize("flags, message", [
    ([], "nothing to do: give files"),
    (["a.png", "--chat"], "--chat talks without pictures"),
    (["a.png", "--stream", "--jsonl"], "--stream prints text as it comes, --jsonl whole pages"),
])
def test_flags_that_make_no_sense(engine, flags, message):
    with pytest.raises(ValueError, match=message):
        ocr.main(flags)


# -----------------------------------------------------------------------------
# A model by itself


def test_model_read(model, tokenizer, tmp_path):
    image = Image.effect_noise((50, 70), 60)
    model.eval()
    with pytest.raises(ValueError, match="no tokenizer to read with"):
        model.read(image)
    model.tokenizer = tokenizer
    text = model.read(image, max_new_tokens=20)
    assert isinstance(text, str)
    assert text == model.read(image, "64px", max_new_tokens=20)
    assert text == model.read(image, SMALL, max_new_tokens=20)
    assert text == model.read(image, lambda width, height: SMALL, max_new_tokens=20)
    assert text != model.read(image, prompt="What?", max_new_tokens=20)
    assert len(model.read(image)) > len(text)  # up to the decoder's last position
    assert model.read(image, no_repeat=NoRepeat(2, 50)) != model.read(image)
    with pytest.raises(ValueError, match="image mode 'huge'"):
        model.read(image, "huge")
    assert not any("tokenizer" in name for name in model.state_dict())


def test_model_reads_a_path(model, tokenizer, tmp_path):
    model.eval()
    model.tokenizer = tokenizer
    image = Image.effect_noise((50, 70), 60)
    path = tmp_path / "page.png"
    image.save(path)
    text = model.read(image, max_new_tokens=20)
    assert text == model.read(path, max_new_tokens=20) == model.read(str(path), max_new_tokens=20)
    with pytest.raises(ValueError, match="gone.png: no such picture"):
        model.read(tmp_path / "gone.png")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="page.png: the picture cannot be read"):
        model.read(path)


@pytest.fixture
def saved(model, tokenizer, tmp_path):
    """Folder of a saved model."""
    model.tokenizer = tokenizer
    model.meta = {"stage": "stage 2", "step": 3, "commit": "abc", "mode": "64px",
                  "user_config": {"seed": 0}}
    model.save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_loaded_on_a_cpu_a_model_computes_in_fp32(saved, model, tmp_path):
    loaded = NanoDeepseekOCR.from_pretrained(saved)
    assert loaded.dtype == torch.float32
    image = Image.effect_noise((50, 70), 60)
    assert loaded.read(image, max_new_tokens=20) == model.eval().read(image, max_new_tokens=20)
    loaded.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="--dtype=int8"):
        NanoDeepseekOCR.from_pretrained(saved, dtype="int8")


def test_from_pretrained_sets_up_as_the_scripts_do(saved, monkeypatch, tmp_path):
    """In bf16: the decoder's weights are cast, and not saved with the precision they have left."""
    cpu = torch.device("cpu")
    # Not every CPU has bf16.
    monkeypatch.setattr(reader, "choose_dtype", lambda device, name: torch.bfloat16)
    by_user = NanoDeepseekOCR.from_pretrained(saved, "cpu", dtype="bfloat16")
    by_script, _, _ = load_to_read(saved, cpu, "auto")
    for loaded in (by_user, by_script):
        assert loaded.dtype == torch.bfloat16
        assert {p.dtype for p in loaded.gpt.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in loaded.encoder.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="lose precision: load it with dtype=\"float32\""):
        by_user.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("checkpoint", ["checkpoints/stage2", "/nope", "./a/b", "no-folder"])
def test_before_anything_is_trained(tmp_path, monkeypatch, checkpoint):
    """The default has the form of a hub name, but nobody means that."""
    monkeypatch.chdir(tmp_path)
    args = SimpleNamespace(checkpoint=checkpoint, dtype="auto")
    expected = f"no such folder {checkpoint}; train first .bash speedrun.sh. or name a checkpoint"
    with pytest.raises(FileNotFoundError, match=expected):
        reader.load_engine(args, torch.device("cpu"))


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="no such folder me/reader, and as a hub name: "):
        NanoDeepseekOCR.from_pretrained("me/reader")
