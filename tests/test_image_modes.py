"""
Proves that every published image mode takes the published number of tokens and positions, that preprocessing gives the views
it should, and that the model lays tiles, newlines and separator out in the published order.

python -m pytest tests/test_image_modes.py
"""

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.image_modes import MODES, Mode, auto_mode, best_grid, get_mode, plan, preprocess, valid_tokens
from nanochat.conversation import ocr_conversation

STRIDE = 64  # px a token covers in the published encoder: patches of 16, four to a side


@pytest.mark.parametrize("mode, size, grid, tokens, positions", [
    ("tiny", (1275, 1650), (0, 0), 64, 73),
    ("small", (1275, 1650), (0, 0), 100, 111),
    ("base", (1275, 1650), (0, 0), 256, 273),
    ("large", (1275, 1650), (0, 0), 400, 421),
    ("gundam", (1275, 1650), (2, 3), 856, 903),
    ("gundam", (1920, 1080), (2, 1), 456, 483),
    ("gundam", (600, 600), (0, 0), 256, 273),    # both sides within a tile: no tiles
    ("gundam", (640, 640), (0, 0), 256, 273),
    ("gundam", (641, 100), (6, 1), 856, 883),
    ("gundam-m", (1275, 1650), (2, 3), 1936, 2005),
])
def test_published_counts(mode, size, grid, tokens, positions):
    p = plan(MODES[mode], *size, STRIDE)
    assert ((p.cols, p.rows), p.tokens, p.positions) == (grid, tokens, positions)


def test_up_to_nine_tiles():
    p = plan(MODES["gundam-9"], 1920, 1080, STRIDE)
    assert ((p.cols, p.rows), p.tokens, p.positions) == ((4, 2), 1056, 1093)


@pytest.mark.parametrize("supported, size, mode", [
    (("tiny", "base", "gundam"), (600, 600), "gundam"), (("tiny", "small", "large"), (500, 512), "tiny"),
    (("tiny", "small", "large"), (500, 513), "small"), (("tiny", "small", "large"), (4000, 10), "large"), (("nano",), (4000, 10), "nano")])
def test_automatic_mode(supported, size, mode):
    assert auto_mode(supported, *size).name == mode


@pytest.mark.parametrize("mode, size, tokens", [
    ("base", (1275, 1650), 198), ("large", (1275, 1650), 310), ("base", (800, 800), 256), ("tiny", (1275, 1650), 64), ("gundam", (1275, 1650), 600 + 198)])
def test_valid_tokens_under_padding(mode, size, tokens):
    assert valid_tokens(plan(MODES[mode], *size, STRIDE), *size) == tokens


def test_best_grid_on_a_tie_takes_more_tiles_only_for_a_large_picture():
    assert best_grid(700, 700, 640, 6) == (2, 2)     # the one square grid of 2 to 6
    assert best_grid(700, 350, 640, 9) == (2, 1)     # 2:1 is also 4x2, but the picture is under half of it
    assert best_grid(2560, 1280, 640, 9) == (4, 2)


@pytest.mark.parametrize("name", sorted(MODES))
def test_views_of_every_mode(name):
    mode = MODES[name]
    stride = 32 if name in ("nano", "test") else STRIDE
    p, view, tiles = preprocess(Image.new("RGB", (700, 1100), "white"), mode, stride)
    assert view.shape == (3, mode.size, mode.size) and view.dtype == np.uint8
    assert tiles.shape == (p.rows * p.cols, 3, mode.tile, mode.tile) and tiles.dtype == np.uint8
    assert bool(len(tiles)) == bool(mode.tile)
    assert p.side * stride == mode.size and p.tile_side * stride == mode.tile


def picture(width, height):
    """Every pixel's red grows to the right, its green down, its blue is 0."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_a_padded_view_keeps_the_aspect_on_grey():
    _, view, _ = preprocess(Image.new("RGB", (100, 50), "white"), Mode("m", 64), 32)
    expected = np.full((3, 64, 64), 127)
    expected[:, 16:48] = 255
    assert np.array_equal(view, expected)


def test_a_stretched_view_fills_the_square():
    _, view, _ = preprocess(Image.new("RGB", (100, 50), "white"), Mode("m", 64, stretch=True), 32)
    assert (view == 255).all()
    image = picture(64, 64)
    _, view, _ = preprocess(image, Mode("m", 64, stretch=True), 32)
    assert np.array_equal(view.transpose(1, 2, 0), np.asarray(image))  # the right size is not touched


def test_tiles_are_the_resized_page_row_by_row():
    image = picture(150, 100)
    p, _, tiles = preprocess(image, Mode("m", 64, tile=32, max_tiles=6), 32)
    assert (p.cols, p.rows) == (3, 2)
    page = np.asarray(image.resize((96, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    for row in range(2):
        for col in range(3):
            assert np.array_equal(tiles[3 * row + col], page[:, 32 * row:32 * row + 32, 32 * col:32 * col + 32])


@pytest.mark.parametrize("kind", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_any_kind_of_picture(kind):
    _, view, _ = preprocess(Image.new("RGB", (64, 64), "white").convert(kind), MODES["test"], 32)
    assert (view == 255).all()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # show it a quarter turn clockwise
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (0, 0, 32, 32))  # its left half is the turned picture's upper half
    image.save(tmp_path / "turned.png", exif=exif)
    _, view, _ = preprocess(Image.open(tmp_path / "turned.png"), Mode("m", 64), 32)
    assert (view[:, :32, 16:48] == 255).all() and (view[:, 32:, 16:48] == 0).all() and (view[:, :, :16] == 127).all()


def test_what_is_refused():
    with pytest.raises(ValueError, match="'huge': must be one of"):
        get_mode("huge")
    with pytest.raises(ValueError, match=r"'base': must be one of \['nano'\]"):
        get_mode("base", ["nano"])
    with pytest.raises(ValueError, match="not multiples of the token stride 48"):
        plan(MODES["base"], 10, 10, 48)
    with pytest.raises(ValueError, match="image of 0x5 px"):
        plan(MODES["base"], 0, 5, STRIDE)


@pytest.mark.parametrize("size, tile", [(64, 32), (32, 64), (64, 64)])  # equal sizes share one stack of views
@torch.no_grad()
def test_the_model_lays_out_local_global_separator(model, make_batch, size, tile):
    model.eval()
    mode = Mode("m", size, tile=tile, max_tiles=6)
    images = [picture(300, 200), picture(20, 30), picture(200, 400)]  # 3x2 tiles, none, 1x2
    batch = make_batch([ocr_conversation(image, "x", str(i)) for i, image in enumerate(images)], mode)
    assert [(p.cols, p.rows) for p in batch.plans] == [(3, 2), (0, 0), (1, 2)]
    rows = model.encode_images(batch.views, batch.plans)
    assert rows.size(0) == sum(p.positions for p in batch.plans) == sum(batch.features_per_row)
    expected = []
    for image in images:
        p, view, tiles = preprocess(image, mode, 32)
        grids = [model.project(torch.from_numpy(t)[None])[0] for t in tiles]  # (tile_side, tile_side, C) each
        for y in range(p.rows * p.tile_side):
            for x in range(p.cols * p.tile_side):
                row, col = y // p.tile_side, x // p.tile_side
                expected.append(grids[row * p.cols + col][y % p.tile_side, x % p.tile_side])
            expected.append(model.image_newline)
        for line in model.project(torch.from_numpy(view)[None])[0]:
            expected += [*line, model.image_newline]
        expected.append(model.view_seperator)
    torch.testing.assert_close(rows, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_views_and_plans_must_agree(model, make_batch, pages):
    batch = make_batch(pages[:3])
    with pytest.raises(ValueError, match="views given per size {64: 3}, used by the plans {64: 2}"):
        model.encode_images(batch.views, batch.plans[:2])
