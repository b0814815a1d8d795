"""
Proves that every published image mode takes the published number of tokens and positions; that
preprocessing gives the views it should; that a point of the page is found on the token that shows
it, in every mode; and that the model lays out tiles, newlines and separator in the published order.

    python -m pytest tests/test_image_modes.py
"""
import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.conversation import ocr_conversation
from nanochat.image_modes import (ALIASES, MODES, REGISTERED, Mode, auto_mode, best_grid, get_mode,
                                  plan, preprocess, to_rgb, to_tokens, upright_size, valid_tokens)

STRIDE = 64  # px a token covers in the published encoder: patches of 16, four to a side


def stride_of(mode):
    """A token stride that the mode is made for."""
    return 32 if mode.size < 512 else STRIDE


# -----------------------------------------------------------------------------
# Names

def test_names_say_the_size_and_the_papers_are_aliases():
    for mode in REGISTERED:
        assert get_mode(mode.name) is mode
        assert mode.tile or mode.name == f"{mode.size}px"
    for alias, name in ALIASES.items():
        assert get_mode(alias) is MODES[alias] is get_mode(name)
        assert get_mode(alias).name == name
    published = {"tiny": 512, "small": 640, "base": 1024, "large": 1280}
    for name, size in published.items():
        assert get_mode(name).size == size


# -----------------------------------------------------------------------------
# Geometry

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
    ("gundam-9", (1920, 1080), (4, 2), 1056, 1093),
])
def test_published_counts(mode, size, grid, tokens, positions):
    p = plan(MODES[mode], *size, STRIDE)
    assert ((p.cols, p.rows), p.tokens, p.positions) == (grid, tokens, positions)


@pytest.mark.parametrize("supported, size, mode", [
    (("tiny", "base", "gundam"), (600, 600), "gundam"),
    (("tiny", "small", "large"), (500, 512), "512px"),
    (("512px", "small", "large"), (500, 513), "640px"),
    (("tiny", "small", "1280px"), (4000, 10), "1280px"),
    (("64px",), (4000, 10), "64px"),
])
def test_automatic_mode(supported, size, mode):
    assert auto_mode(supported, *size).name == mode


@pytest.mark.parametrize("mode, size, tokens", [
    ("base", (1275, 1650), 198),
    ("large", (1275, 1650), 310),
    ("base", (800, 800), 256),
    ("tiny", (1275, 1650), 64),
    ("gundam", (1275, 1650), 600 + 198),
])
def test_valid_tokens_under_padding(mode, size, tokens):
    assert valid_tokens(plan(MODES[mode], *size, STRIDE), *size) == tokens


def test_best_grid_on_a_tie_takes_more_tiles_only_for_a_large_page():
    assert best_grid(700, 700, 640, 6) == (2, 2)     # the one square grid of 2 to 6
    assert best_grid(700, 350, 640, 9) == (2, 1)     # 2:1 is also 4x2, but too few pixels
    assert best_grid(2560, 1280, 640, 9) == (4, 2)


def test_what_is_refused():
    with pytest.raises(ValueError, match="'huge': must be one of 64px, .*aliases tiny, "):
        get_mode("huge")
    with pytest.raises(ValueError, match="not multiples of the token stride 48"):
        plan(MODES["base"], 10, 10, 48)
    with pytest.raises(ValueError, match="image of 0x5 px"):
        plan(MODES["base"], 0, 5, STRIDE)


# -----------------------------------------------------------------------------
# Pixels

@pytest.mark.parametrize("mode", REGISTERED, ids=lambda mode: mode.name)
def test_views_of_every_mode(mode):
    stride = stride_of(mode)
    p, view, tiles = preprocess(Image.new("RGB", (700, 1100), "white"), mode, stride)
    assert view.shape == (3, mode.size, mode.size) and view.dtype == np.uint8
    assert tiles.shape == (p.tiles, 3, mode.tile, mode.tile) and tiles.dtype == np.uint8
    assert bool(len(tiles)) == bool(mode.tile)
    assert p.side * stride == mode.size and p.tile_side * stride == mode.tile


def picture(width, height):
    """Every pixel's red grows to the right, its green down, its blue is 0."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_a_padded_view_keeps_the_aspect_on_gray():
    _, view, _ = preprocess(Image.new("RGB", (100, 50), "white"), Mode("m", 64), 32)
    expected = np.full((3, 64, 64), 127)
    expected[:, 16:48] = 255
    assert np.array_equal(view, expected)


def test_a_stretched_view_fills_the_square():
    _, view, _ = preprocess(Image.new("RGB", (100, 50), "white"), Mode("m", 64, stretch=True), 32)
    assert (view == 255).all()
    image = picture(64, 64)
    _, view, _ = preprocess(image, Mode("m", 64, stretch=True), 32)
    assert np.array_equal(view.transpose(1, 2, 0), np.asarray(image))  # no resampling


def test_tiles_are_the_resized_page_row_by_row():
    image = picture(150, 100)
    p, _, tiles = preprocess(image, Mode("m", 64, tile=32, max_tiles=6), 32)
    assert (p.cols, p.rows) == (3, 2)
    page = np.asarray(image.resize((96, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    for row in range(2):
        for col in range(3):
            expected = page[:, 32 * row:32 * row + 32, 32 * col:32 * col + 32]
            assert np.array_equal(tiles[3 * row + col], expected)


@pytest.mark.parametrize("kind", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_any_kind_of_picture(kind):
    _, view, _ = preprocess(Image.new("RGB", (64, 64), "white").convert(kind), MODES["64px"], 32)
    assert (view == 255).all()


@pytest.mark.parametrize("mode", [Mode("m", 64), Mode("m", 64, stretch=True),
                                  Mode("m", 64, tile=32, max_tiles=6)])
def test_gray_is_three_equal_channels(mode):
    """One channel is resampled instead of three, to the same pixels."""
    for size in ((150, 100), (64, 64), (31, 90)):
        gray = picture(*size).convert("L")
        for image in (gray, gray.convert("1")):
            p, view, tiles = preprocess(image, mode, 32)
            expected_p, expected_view, expected_tiles = preprocess(image.convert("RGB"), mode, 32)
            assert p == expected_p
            assert np.array_equal(view, expected_view) and view.flags.c_contiguous
            assert np.array_equal(tiles, expected_tiles)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # show it a quarter turn clockwise
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (0, 0, 32, 32))  # its left half is the turned picture's upper half
    image.save(tmp_path / "turned.png", exif=exif)
    _, view, _ = preprocess(Image.open(tmp_path / "turned.png"), Mode("m", 64), 32)
    assert (view[:, :32, 16:48] == 255).all()
    assert (view[:, 32:, 16:48] == 0).all()
    assert (view[:, :, :16] == 127).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_upright_size_is_that_of_the_upright_picture(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20)).save(tmp_path / "page.png", exif=exif)
    image = Image.open(tmp_path / "page.png")
    assert upright_size(image) == to_rgb(image).size


@pytest.mark.parametrize("white, dtype", [(1, np.float32), (255, np.float32), (4095, np.uint16),
                                          (65535, np.uint16), (65535, np.int32)])
def test_gray_levels_of_any_depth(white, dtype):
    """A scan of 12 bits in 16, or of floats from 0 to 1, would be black else."""
    levels = np.array([[0, white // 2 if white > 1 else 0.5, white]], dtype=dtype)
    pixels = np.asarray(to_rgb(Image.fromarray(levels)))[0, :, 0]
    assert pixels[0] == 0 and pixels[1] in (126, 127, 128) and pixels[2] in (254, 255)


# -----------------------------------------------------------------------------
# From points of the page to tokens, against a search for the pixel in the views

def page_with_a_dot(width, height, x, y, radius):
    """A black page with a cone of light: white at (x, y), black at `radius` px from there."""
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    distance = np.hypot(columns - x, rows - y)
    light = 255 * np.clip(1 - distance / radius, 0, 1)
    return Image.fromarray(light.astype(np.uint8))


def brightest(pixels):
    """(y, x) in px of the brightest pixel of (H, W), the middle if there are several."""
    return np.argwhere(pixels == pixels.max()).mean(0) + 0.5


def side_by_side(tiles, cols):
    """(n, H, W) tiles, row by row -> the page they were cut from."""
    rows = []
    for first in range(0, len(tiles), cols):
        rows.append(np.concatenate(list(tiles[first:first + cols]), axis=1))
    return np.concatenate(rows)


TILES_AS_LARGE_AS_THE_PAGE = Mode("equal", 128, tile=128, max_tiles=6)
PADDED = Mode("padded", 128)


@pytest.mark.parametrize("size", [(850, 1100), (1100, 301), (640, 640), (61, 40)])
@pytest.mark.parametrize("mode", [*REGISTERED, TILES_AS_LARGE_AS_THE_PAGE, PADDED],
                         ids=lambda mode: mode.name)
def test_a_point_is_on_the_token_that_shows_it(mode, size):
    """To a pixel of the view, or to half a pixel of the page where that is more."""
    stride = stride_of(mode)
    width, height = size
    rng = np.random.default_rng(width + mode.size)
    inside = (rng.integers(width) + 0.5, rng.integers(height) + 0.5)
    corner = (width - 0.5, 0.5)
    radius = 4 + 8 * max(size) / mode.size  # the dot must survive being made smaller
    for x, y in (inside, corner):
        p, view, tiles = preprocess(page_with_a_dot(width, height, x, y, radius), mode, stride)
        found = to_tokens(p, size, [(x, y)])
        assert set(found) == set(p.views)

        whole = found[mode.size]
        at = 0
        if p.tiles and mode.tile == mode.size:  # one stack, the global view after the tiles
            at = whole.view.tolist().index(p.tiles)
        assert 0 <= whole.row[at] < p.side and 0 <= whole.column[at] < p.side
        shown = brightest(view[0])
        slack = max(1, mode.size / max(size) / 2)
        assert abs(whole.row[at] * stride - shown[0]) <= slack
        assert abs(whole.column[at] * stride - shown[1]) <= slack

        if p.tiles:
            tile = found[mode.tile]
            assert sum(tile.view < p.tiles) == 1  # on exactly one
            assert 0 <= tile.row[0] < p.tile_side and 0 <= tile.column[0] < p.tile_side
            tile_row, tile_col = divmod(int(tile.view[0]), p.cols)
            shown = brightest(side_by_side(tiles[:, 0], p.cols))
            slack_y = max(1, p.rows * mode.tile / height / 2)
            slack_x = max(1, p.cols * mode.tile / width / 2)
            assert abs(tile_row * mode.tile + tile.row[0] * stride - shown[0]) <= slack_y
            assert abs(tile_col * mode.tile + tile.column[0] * stride - shown[1]) <= slack_x


def test_many_points_at_once_and_the_edges_of_the_page():
    p = plan(MODES["gundam"], 1280, 1920, STRIDE)
    assert (p.cols, p.rows) == (2, 3)
    points = np.array([(0, 0), (639, 0), (641, 0), (1280, 1920), (100, 1000)])
    found = to_tokens(p, (1280, 1920), points)
    assert found[640].index.tolist() == found[1024].index.tolist() == [0, 1, 2, 3, 4]
    assert found[640].view.tolist() == [0, 0, 1, 5, 2]
    assert found[1024].view.tolist() == [0] * 5
    # The right and the lower edge are of the last token.
    assert int(found[640].row[3]) == int(found[640].column[3]) == p.tile_side - 1
    assert found[640].row[4] == pytest.approx(360 / STRIDE)
    nothing = to_tokens(p, (1280, 1920), [])
    assert len(nothing[640].index) == len(nothing[1024].row) == 0
    with pytest.raises(ValueError, match="1 of 2 points are not on the page of 1280x1920 px, "
                                         "the first is at 1281, 7"):
        to_tokens(p, (1280, 1920), [(5, 5), (1281, 7)])


# -----------------------------------------------------------------------------
# The model's layout

@pytest.mark.parametrize("size, tile", [(64, 32), (32, 64), (64, 64)])  # equal: one stack of views
@torch.no_grad()
def test_the_model_lays_out_local_global_separator(model, make_batch, size, tile):
    model.eval()
    mode = Mode("m", size, tile=tile, max_tiles=6)
    images = [picture(300, 200), picture(20, 30), picture(200, 400)]  # 3x2 tiles, none, 1x2
    conversations = [ocr_conversation(image, "x", str(i)) for i, image in enumerate(images)]
    batch = make_batch(conversations, mode)
    assert [(p.cols, p.rows) for p in batch.plans] == [(3, 2), (0, 0), (1, 2)]
    for side, stack in batch.views.items():
        assert len(stack) == sum(p.views.get(side, 0) for p in batch.plans)
    rows = model.arrange(model.encode_views(batch.views), batch.plans)
    assert len(rows) == sum(p.positions for p in batch.plans) == sum(batch.features_per_row)

    def features(pixels):
        return model.project(torch.from_numpy(pixels)[None])[0]  # (side, side, C)

    expected = []
    for image in images:
        p, view, tiles = preprocess(image, mode, 32)
        grids = [features(tile_pixels) for tile_pixels in tiles]
        for y in range(p.rows * p.tile_side):
            for x in range(p.cols * p.tile_side):
                grid = grids[y // p.tile_side * p.cols + x // p.tile_side]
                expected.append(grid[y % p.tile_side, x % p.tile_side])
            expected.append(model.image_newline)
        for line in features(view):
            expected += [*line, model.image_newline]
        expected.append(model.view_seperator)
    torch.testing.assert_close(rows, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_views_and_plans_must_agree(model, make_batch, pages):
    batch = make_batch(pages[:3])
    with pytest.raises(ValueError, match="views given per size {64: 3}, .* plans {64: 2}"):
        model.arrange(model.encode_views(batch.views), batch.plans[:2])
