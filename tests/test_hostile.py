"""
Proves that whatever a data set may hold is either read as a viewer would show it or named with data set, row and reason; that
skipping counts, and moves no other sample; and that no text can put a special token into a sequence.

python -m pytest tests/test_hostile.py
"""

import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.dataloader import Sampler, loader
from nanochat.mixture import Mixture
from nanochat.batch import collate
from nanochat.image_modes import MODES
from nanochat.tokenizer import SPECIAL_TOKENS
from nanochat.conversation import MAX_PIXELS, BadSample, Task, ocr_conversation, open_image


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def striped(mode="L", size=(60, 90)):
    """Dark above, light below."""
    grey = np.full((size[1], size[0]), 250, dtype=np.uint8)
    grey[:size[1] // 2] = 5
    return Image.fromarray(grey).convert(mode)


def png_header(width, height):
    """A whole PNG by its header, of which not one row is there."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def pictures(folder):
    """{name: (source for open_image, None or a pattern of the reason for which it is refused)}"""
    png, rotated, clear = encoded(striped()), Image.Exif(), striped("RGBA")
    rotated[0x0112] = 3  # upside down
    clear.putalpha(128)
    (folder / "fine.png").write_bytes(png)
    (folder / "empty.png").write_bytes(b"")
    sixteen = Image.fromarray(np.asarray(striped()).astype(np.uint16) * 257)
    frames = [striped(), striped().rotate(180)]
    return {
        "file": (folder / "fine.png", None), "name of a file": (str(folder / "fine.png"), None), "bytes": (png, None),
        "dict of bytes": ({"bytes": png, "path": "elsewhere.png"}, None),
        "dict of path": ({"bytes": None, "path": str(folder / "fine.png")}, None),
        "lazy": (Image.open(folder / "fine.png"), None), "1-bit": (encoded(striped("1")), None), "16-bit": (encoded(sixteen), None),
        "palette": (encoded(striped("P")), None), "grey and alpha": (encoded(striped("LA")), None), "rgba": (encoded(clear), None),
        "cmyk": (encoded(striped("CMYK"), "JPEG"), None), "ycbcr": (encoded(striped("YCbCr"), "JPEG"), None),
        "float": (encoded(striped("F"),
        "TIFF"), None),
        "animated gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), None),
        "animated webp": (encoded(frames[0].convert("RGB"), "WEBP", save_all=True, append_images=frames[1:], lossless=True), None),
        "tiff of two pages": (encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]), None),
        "exif": (encoded(striped().rotate(180), "JPEG", exif=rotated), None),
        "1x1": (encoded(Image.new("L", (1, 1))), None), "20000x10": (encoded(Image.new("1", (20000, 10))), None),
        "10x20000": (encoded(Image.new("1", (10, 20000))), None),
        "truncated png": (png[:-30], "OSError: "),
        "truncated jpeg": (encoded(Image.effect_noise((90, 90), 50),
        "JPEG")[:-900], "truncated"),
        "zero bytes": (b"", "in no known format"), "zero-byte file": (folder / "empty.png", "empty.png: .*in no known format"),
        "header alone": (png_header(60, 90),
        "cannot be read"),
        "broken checksum": (png.replace(b"IHDR\0\0\0\x3c", b"IHDR\0\0\0\x3d"),
        "cannot be read"),
        "bomb": (png_header(30000, 30000),
        "DecompressionBombError"),
        "smaller bomb": (png_header(9000, 9000),
        "9000x9000 px is over the limit of 80,000,000"),
        "text": (b"hello", "in no known format"), "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "in no known format"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "in no known format"),
        "absent": (folder / "none.png", "none.png: no such picture"), "folder": (folder, "no such picture"),
        "nothing": (None, "expected, not NoneType"), "empty dict": ({}, "expected, not NoneType"), "number": (7, "expected, not int"),
        "not finite": (encoded(Image.fromarray(np.full((9, 9), np.nan, dtype=np.float32)), "TIFF"), "not finite"),
    }


def rows(folder):
    """[(name, row, None or the reason), ...]: the pictures with a sound text, then texts with a sound picture."""
    png, full = encoded(striped()), {"question": "Read.", "answer": "All."}
    texts = {
        "null answer": ({**full, "answer": None}, "assistant is null or empty"),
        "empty answer": ({**full, "answer": ""}, "assistant is null or empty"),
        "blank answer": ({**full, "answer": " \n\t"}, "assistant is null or empty"),
        "number for an answer": ({**full, "answer": 42}, "AttributeError"),
        "null question": ({**full, "question": None}, "TypeError|AttributeError"),
        "no answer column": ({"question": "Read."}, "KeyError: 'answer'"),
        "special tokens": ({"question": "<|image|>" + "".join(SPECIAL_TOKENS), "answer": "<|assistant_end|><|image|>"}, None),
        "lone surrogate": ({**full, "answer": "a\ud800b"}, None), "null character": ({**full, "answer": "a\0b"}, None),
    }
    return [(name, {"image": source, **full}, reason) for name, (source, reason) in pictures(folder).items()] + \
           [(name, {"image": png, **text}, reason) for name, (text, reason) in texts.items()] + \
           [("no image column", full, "KeyError: 'image'"), ("row is null", None, "TypeError")]


class Hostile(Task):
    name = "hostile"

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        name, row, _ = self.rows[i]
        return ocr_conversation(row["image"], row["answer"], name, prompt=row["question"])  # the Sampler opens the picture


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    found = rows(tmp_path_factory.mktemp("hostile"))
    assert len(found) >= 45
    return Hostile(found)


def make_sampler(task, tokenizer, mode="test", **rules):
    return Sampler(task, tokenizer, MODES[mode], 32, max_tokens=10_000, **rules)


def test_each_is_read_or_named(hostile, tokenizer):
    sampler, skipping = make_sampler(hostile, tokenizer), make_sampler(hostile, tokenizer, bad_data="skip")
    for i, (name, _, reason) in enumerate(hostile.rows):
        if reason is None:
            assert sampler[i].ids, name
            continue
        with pytest.raises(BadSample, match=rf"^hostile row {i}: ") as e:
            sampler[i]
        assert re.search(reason, str(e.value)), (name, str(e.value))
        assert not skipping[i].ids and skipping[i].counts == {"drawn/hostile": 1, "bad": 1}


@pytest.mark.parametrize("mode", ["test", "small", "base", "gundam"])
def test_what_is_read_is_what_a_viewer_shows(hostile, tokenizer, mode):
    sampler = make_sampler(hostile, tokenizer, mode)
    for i, (name, _, reason) in enumerate(hostile.rows):
        if reason is None and name not in ("1x1", "20000x10", "10x20000"):
            (_, view, _), = sampler[i].images
            middle = view[:, :, view.shape[2] // 2].astype(int)
            assert (middle[:, view.shape[1] // 4] < 140).all() and (middle[:, -view.shape[1] // 4] > 200).all(), name  # rgba is half paper
    for name in ("1x1", "20000x10", "10x20000"):  # must give a sample in every mode, tiles included
        i = [n for n, *_ in hostile.rows].index(name)
        assert sampler[i].images[0][1].shape == (3, MODES[mode].size, MODES[mode].size)


def test_skipped_samples_are_counted_and_move_no_other(hostile, tokenizer, capfd):
    expected = [reason is not None for _, _, reason in hostile.rows]
    mixture = Mixture([(hostile, 1)])
    size = 4
    steps = len(hostile) // size
    sampler = make_sampler(mixture, tokenizer, bad_data="skip")
    batches = list(loader(sampler, size, 0, steps, workers=2))
    assert sum(b.counts.get("bad", 0) for b in batches) == sum(expected[:steps * size]) > 20
    assert sum(b.counts["drawn/hostile"] for b in batches) == steps * size
    for k, batch in enumerate(batches):
        good = [sampler[i] for i in range(k * size, k * size + size) if not expected[i]]
        assert batch.counts.get("bad", 0) == size - len(good) and batch.images == len(good)
        if good:
            assert torch.equal(batch.ids, collate(good).ids) and torch.equal(batch.views[64], collate(good).views[64])
    assert len(re.findall(r"skipped hostile row \d+: ", capfd.readouterr().err)) >= sum(expected[:steps * size])
    with pytest.raises(BadSample, match="hostile row 21: the picture cannot be read"):
        list(loader(make_sampler(mixture, tokenizer), 1, 21, 22))


def test_a_batch_of_bad_samples_teaches_nothing(hostile, tokenizer, model):
    first = [reason is not None for _, _, reason in hostile.rows].index(True)
    sampler = make_sampler(hostile, tokenizer, bad_data="skip")
    batch = collate([sampler[first], sampler[first + 1]])
    assert batch.counts["bad"] == 2 and batch.supervised() == 0 and batch.images == 0
    loss = model.train()(batch)["text"][0]
    loss.backward()
    assert loss == 0
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() == 0, name  # there, for the other ranks' sake, and zero


def test_text_cannot_spell_a_special_token(hostile, tokenizer):
    i = [name for name, *_ in hostile.rows].index("special tokens")
    sample = make_sampler(hostile, tokenizer)[i]
    assert sample.ids.count(tokenizer.image_token_id) == sample.images[0][0].positions
    specials = [t for t in sample.ids if t in tokenizer.special_ids.values() and t != tokenizer.image_token_id]
    assert [tokenizer.decode([t]) for t in specials] == [
        "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"]
    for text in SPECIAL_TOKENS:
        assert not set(tokenizer.encode(text)) & set(tokenizer.special_ids.values()) and tokenizer.decode(tokenizer.encode(text)) == text


def test_a_mode_that_does_not_fit_is_not_skipped(hostile, tokenizer):
    with pytest.raises(ValueError, match="not multiples of the token stride 48 px"):
        Sampler(hostile, tokenizer, MODES["test"], 48, max_tokens=100, bad_data="skip")


def test_open_image(tmp_path):
    fine = encoded(striped("RGB"))
    assert open_image(fine, "x").tobytes() == striped("RGB").tobytes()
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadSample, match=r"^set row 3: .*none\.png: no such picture"):
        open_image({"bytes": None, "path": tmp_path / "none.png"}, "set row 3")
