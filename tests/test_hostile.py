"""
Proves that whatever a data set may hold is either read as a viewer would show it or named with data
set, row and reason; that skipping counts, and moves no other sample; and that no text can put a
special token into a sequence.

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

from nanochat.batch import collate
from nanochat.conversation import MAX_PIXELS, BadSample, Task, ocr_conversation, open_image
from nanochat.dataloader import Sampler, loader
from nanochat.image_modes import MODES
from nanochat.mixture import Mixture
from nanochat.tokenizer import SPECIAL_TOKENS


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def striped(mode="L", size=(60, 90)):
    """Dark above, light below."""
    gray = np.full((size[1], size[0]), 250, dtype=np.uint8)
    gray[:size[1] // 2] = 5
    return Image.fromarray(gray).convert(mode)


def png_header(width, height):
    """A PNG with a sound header and not one row of pixels."""
    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
            + chunk(b"IEND", b""))


def sound_pictures(folder):
    """{name: source for open_image}"""
    png = encoded(striped())
    path = folder / "fine.png"
    path.write_bytes(png)
    sixteen_bits = Image.fromarray(np.asarray(striped()).astype(np.uint16) * 257)
    half_transparent = striped("RGBA")
    half_transparent.putalpha(128)
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    two_frames = {"save_all": True, "append_images": [striped().rotate(180)]}  # the first counts
    return {
        "file": path,
        "name of a file": str(path),
        "bytes": png,
        "dict of bytes": {"bytes": png, "path": "elsewhere.png"},
        "dict of path": {"bytes": None, "path": str(path)},
        "lazy": Image.open(path),
        "1-bit": encoded(striped("1")),
        "16-bit": encoded(sixteen_bits),
        "palette": encoded(striped("P")),
        "gray and alpha": encoded(striped("LA")),
        "rgba": encoded(half_transparent),
        "cmyk": encoded(striped("CMYK"), "JPEG"),
        "ycbcr": encoded(striped("YCbCr"), "JPEG"),
        "float": encoded(striped("F"), "TIFF"),
        "animated gif": encoded(striped(), "GIF", **two_frames),
        "animated webp": encoded(striped("RGB"), "WEBP", lossless=True, **two_frames),
        "tiff of two pages": encoded(striped(), "TIFF", **two_frames),
        "exif": encoded(striped().rotate(180), "JPEG", exif=upside_down),
        "1x1": encoded(Image.new("L", (1, 1))),
        "20000x10": encoded(Image.new("1", (20000, 10))),
        "10x20000": encoded(Image.new("1", (10, 20000))),
    }


def unusable_pictures(folder):
    """{name: (source for open_image, a pattern of the reason for which it is refused)}"""
    png = encoded(striped())
    empty = folder / "empty.png"
    empty.write_bytes(b"")
    noise = encoded(Image.effect_noise((90, 90), 50), "JPEG")
    wrong_width = png.replace(b"IHDR\0\0\0\x3c", b"IHDR\0\0\0\x3d")  # its checksum is the old one
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    not_a_number = Image.fromarray(np.full((9, 9), np.nan, dtype=np.float32))
    return {
        "truncated png": (png[:-30], "OSError: "),
        "truncated jpeg": (noise[:-900], "truncated"),
        "zero bytes": (b"", "in no known format"),
        "zero-byte file": (empty, "empty.png: .*in no known format"),
        "header alone": (png_header(60, 90), "cannot be read"),
        "broken checksum": (wrong_width, "cannot be read"),
        "bomb": (png_header(30000, 30000), "DecompressionBombError"),
        "smaller bomb": (png_header(9000, 9000), "9000x9000 px is over the limit of 80,000,000"),
        "text": (b"hello", "in no known format"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "in no known format"),
        "postscript": (postscript, "in no known format"),
        "absent": (folder / "none.png", "none.png: no such picture"),
        "folder": (folder, "no such picture"),
        "nothing": (None, "expected, not NoneType"),
        "empty dict": ({}, "expected, not NoneType"),
        "number": (7, "expected, not int"),
        "not finite": (encoded(not_a_number, "TIFF"), "not finite"),
    }


def texts():
    """{name: (columns of a row, None or the reason for which it is refused)}"""
    full = {"question": "Read.", "answer": "All."}
    specials = {"question": "<|image|>" + "".join(SPECIAL_TOKENS),
                "answer": "<|assistant_end|><|image|>"}
    return {
        "null answer": ({**full, "answer": None}, "assistant is null or empty"),
        "empty answer": ({**full, "answer": ""}, "assistant is null or empty"),
        "blank answer": ({**full, "answer": " \n\t"}, "assistant is null or empty"),
        "number for an answer": ({**full, "answer": 42}, "AttributeError"),
        "null question": ({**full, "question": None}, "TypeError|AttributeError"),
        "no answer column": ({"question": "Read."}, "KeyError: 'answer'"),
        "special tokens": (specials, None),
        "lone surrogate": ({**full, "answer": "a\ud800b"}, None),
        "null character": ({**full, "answer": "a\0b"}, None),
    }


def hostile_rows(folder):
    """[(name, row, None or the reason), ...]: every picture with a sound text, and vice versa."""
    full = {"question": "Read.", "answer": "All."}
    found = []
    for name, source in sound_pictures(folder).items():
        found.append((name, {"image": source, **full}, None))
    for name, (source, reason) in unusable_pictures(folder).items():
        found.append((name, {"image": source, **full}, reason))
    for name, (text, reason) in texts().items():
        found.append((name, {"image": encoded(striped()), **text}, reason))
    found.append(("no image column", full, "KeyError: 'image'"))
    found.append(("row is null", None, "TypeError"))
    return found


class Hostile(Task):
    name = "hostile"

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        name, row, _ = self.rows[i]
        # The picture is opened by the Sampler.
        return ocr_conversation(row["image"], row["answer"], name, prompt=row["question"])

    def index(self, name):
        return [row_name for row_name, _, _ in self.rows].index(name)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    found = hostile_rows(tmp_path_factory.mktemp("hostile"))
    assert len(found) >= 45
    return Hostile(found)


def make_sampler(task, tokenizer, mode="64px", **rules):
    return Sampler(task, tokenizer, MODES[mode], 32, max_tokens=10_000, **rules)


def test_each_is_read_or_named(hostile, tokenizer):
    sampler = make_sampler(hostile, tokenizer)
    skipping = make_sampler(hostile, tokenizer, bad_data="skip")
    for i, (name, _, reason) in enumerate(hostile.rows):
        if reason is None:
            assert sampler[i].ids, name
            continue
        with pytest.raises(BadSample, match=rf"^hostile row {i}: ") as e:
            sampler[i]
        assert re.search(reason, str(e.value)), (name, str(e.value))
        assert not skipping[i].ids
        assert skipping[i].counts == {"drawn/hostile": 1, "bad": 1}


@pytest.mark.parametrize("mode", ["64px", "640px", "1024px", "gundam"])
def test_what_is_read_is_what_a_viewer_shows(hostile, tokenizer, mode):
    sampler = make_sampler(hostile, tokenizer, mode)
    extreme = ("1x1", "20000x10", "10x20000")
    for i, (name, _, reason) in enumerate(hostile.rows):
        if reason is None and name not in extreme:
            (_, view, _), = sampler[i].images
            middle = view[:, :, view.shape[2] // 2].astype(int)
            quarter = view.shape[1] // 4
            # Dark above, light below. Of rgba half is paper, hence 140.
            assert (middle[:, quarter] < 140).all() and (middle[:, -quarter] > 200).all(), name
    size = MODES[mode].size
    for name in extreme:  # they must give a sample in every mode, tiles included
        (_, view, _), = sampler[hostile.index(name)].images
        assert view.shape == (3, size, size)


def test_skipped_samples_are_counted_and_move_no_other(hostile, tokenizer, capfd):
    is_bad = [reason is not None for _, _, reason in hostile.rows]
    mixture = Mixture([(hostile, 1)])
    size = 4
    steps = len(hostile) // size
    n_bad = sum(is_bad[:steps * size])
    sampler = make_sampler(mixture, tokenizer, bad_data="skip")
    batches = list(loader(sampler, size, 0, steps, workers=2))
    assert sum(b.counts.get("bad", 0) for b in batches) == n_bad > 20
    assert sum(b.counts["drawn/hostile"] for b in batches) == steps * size
    for k, batch in enumerate(batches):
        here = range(k * size, k * size + size)
        good = [sampler[i] for i in here if not is_bad[i]]
        assert batch.counts.get("bad", 0) == size - len(good) and batch.images == len(good)
        if good:
            assert torch.equal(batch.ids, collate(good).ids)
            assert torch.equal(batch.views[64], collate(good).views[64])
    named = re.findall(r"skipped hostile row \d+: ", capfd.readouterr().err)
    assert len(named) >= n_bad
    first = is_bad.index(True)
    message = f"hostile row {first}: conversation .*: the picture cannot be read"
    with pytest.raises(BadSample, match=message):
        list(loader(make_sampler(mixture, tokenizer), 1, first, first + 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_one_line_that_names_it(hostile, tokenizer, workers):
    """Also from a worker, which would send twenty lines of traceback with it."""
    i = hostile.index("empty answer")
    batches = loader(make_sampler(hostile, tokenizer), 1, i, i + 1, workers=workers)
    with pytest.raises(BadSample) as e:
        next(batches)
    assert str(e.value) == (f"hostile row {i}: conversation empty answer: a message of the "
                            f"assistant is null or empty")


def test_a_page_that_is_too_long_is_named(hostile, tokenizer):
    sampler = Sampler(hostile, tokenizer, MODES["64px"], 32, max_tokens=5)
    with pytest.raises(ValueError, match=r"^hostile row 0: conversation file takes \d+ positions"):
        sampler[0]


def test_a_batch_of_bad_samples_teaches_nothing(hostile, tokenizer, model):
    sampler = make_sampler(hostile, tokenizer, bad_data="skip")
    bad = hostile.index("truncated png")
    batch = collate([sampler[bad], sampler[bad + 1]])
    assert batch.counts["bad"] == 2 and batch.supervised() == 0 and batch.images == 0
    model.train()
    loss, count = model(batch)["text"]
    loss.backward()
    assert loss == 0 and count == 0
    for name, p in model.named_parameters():
        # Other ranks wait for every gradient, so it must be there, and zero.
        assert p.grad is not None and p.grad.abs().sum() == 0, name


def test_text_cannot_spell_a_special_token(hostile, tokenizer):
    sample = make_sampler(hostile, tokenizer)[hostile.index("special tokens")]
    (plan, _, _), = sample.images
    special_ids = set(tokenizer.special_ids.values())
    assert sample.ids.count(tokenizer.image_token_id) == plan.positions
    others = [t for t in sample.ids if t in special_ids and t != tokenizer.image_token_id]
    assert tokenizer.decode(others) == ("<|bos|><|user_start|><|user_end|>"
                                        "<|assistant_start|><|assistant_end|>")
    for text in SPECIAL_TOKENS:
        ids = tokenizer.encode(text)
        assert not set(ids) & special_ids
        assert tokenizer.decode(ids) == text


def test_a_mode_that_does_not_fit_is_not_skipped(hostile, tokenizer):
    with pytest.raises(ValueError, match="not multiples of the token stride 48 px"):
        Sampler(hostile, tokenizer, MODES["64px"], 48, max_tokens=100, bad_data="skip")


def test_open_image(tmp_path):
    fine = encoded(striped("RGB"))
    assert open_image(fine, "x").tobytes() == striped("RGB").tobytes()
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadSample, match=r"^set row 3: .*none\.png: no such picture"):
        open_image({"bytes": None, "path": tmp_path / "none.png"}, "set row 3")
