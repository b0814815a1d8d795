"""
Image modes: how a page becomes square views, and how many vision tokens and decoder positions
those views take. The geometry is one pure function, `plan`, shared by tokenizer, loader and model;
`to_tokens` is its inverse question: which token shows a given pixel of the page. Sizes, resize
rules and tiling are DeepSeek-OCR's (paper, table 1).
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

PAD_COLOR = (127, 127, 127)  # int(0.5 * 255): zero after the model's normalization


@dataclass(frozen=True)
class Mode:
    name: str
    size: int              # px, side of the global view
    stretch: bool = False  # resize to the square and lose the aspect, instead of padding with gray
    tile: int = 0          # px, side of a local tile; 0 = global view only
    max_tiles: int = 0


# A new mode is one line here. Names say the size, so that they cannot be taken for presets.
REGISTERED = (
    Mode("64px", 64, stretch=True),    # nano and the tests
    Mode("128px", 128, stretch=True),  # dense
    Mode("512px", 512, stretch=True),
    Mode("640px", 640, stretch=True),
    Mode("1024px", 1024),
    Mode("1280px", 1280),
    Mode("gundam", 1024, tile=640, max_tiles=6),
    Mode("gundam-m", 1280, tile=1024, max_tiles=6),
    # The published code has 6 tiles in one place and 9 in another.
    Mode("gundam-9", 1024, tile=640, max_tiles=9),
    Mode("gundam-m-9", 1280, tile=1024, max_tiles=9),
)

# The paper's names, and those that earlier checkpoints have in their meta file and config.
ALIASES = {
    "tiny": "512px",
    "small": "640px",
    "base": "1024px",
    "large": "1280px",
    "nano": "64px",
    "test": "64px",
    "dense": "128px",
}

MODES = {mode.name: mode for mode in REGISTERED}
MODES.update({alias: MODES[name] for alias, name in ALIASES.items()})


def get_mode(name, supported=None):
    """
    The mode of that name or alias. A model reads in any mode whose sizes fit its token stride
    (`plan` checks that), so `supported` is ignored; it is accepted for callers that pass it.
    """
    if name not in MODES:
        names = ", ".join(mode.name for mode in REGISTERED)
        raise ValueError(f"image mode {name!r}: must be one of {names}, "
                         f"or of their aliases {', '.join(ALIASES)}")
    return MODES[name]


def auto_mode(supported, width, height):
    """
    The mode for a page of width x height px when none is given, out of the names `supported`.
    Gundam if it is among them: its own rule already leaves pages of up to 640 px without tiles.
    Otherwise the smallest mode in which the page loses no pixels, or else the largest there is.
    """
    modes = [get_mode(name) for name in supported]
    gundam = MODES["gundam"]
    if gundam in modes:
        return gundam
    untiled = [mode for mode in modes if not mode.tile]
    untiled.sort(key=lambda mode: mode.size)
    for mode in untiled:
        if mode.size >= max(width, height):
            return mode
    return untiled[-1]


# -----------------------------------------------------------------------------
# Geometry

@dataclass(frozen=True)
class Plan:
    """What one page becomes in one mode. Sides are counted in vision tokens."""
    mode: Mode
    cols: int       # tiles across, 0 when there are none
    rows: int
    side: int       # tokens along a side of the global view
    tile_side: int  # tokens along a side of a tile

    @property
    def tokens(self):
        """Vision tokens as the paper counts them (table 1): no newlines, no separator."""
        return self.side ** 2 + self.rows * self.cols * self.tile_side ** 2

    @property
    def positions(self):
        """Decoder positions: the tokens, a newline after each row of them, one separator."""
        global_view = self.side * (self.side + 1)
        # Tiles are laid out as one large grid, so a newline ends a row of the whole page.
        tiles = self.rows * self.tile_side * (self.cols * self.tile_side + 1)
        return tiles + global_view + 1

    @property
    def views(self):
        """{side in px: number of views}."""
        count = {self.mode.size: 1}
        if self.rows:
            # Tiles may be as large as the global view; they are then counted together.
            tile = self.mode.tile
            count[tile] = count.get(tile, 0) + self.rows * self.cols
        return count


def best_grid(width, height, tile, max_tiles):
    """
    (cols, rows) of the 2..max_tiles tiles of `tile` px whose aspect is nearest to the page's.
    On a tie the larger grid wins if the page has more than half of its pixels (as InternVL2 does).
    """
    grids = []
    for cols in range(1, max_tiles + 1):
        for rows in range(1, max_tiles // cols + 1):
            if cols * rows >= 2:
                grids.append((cols * rows, cols, rows))

    best = None
    best_gap = float("inf")
    for n_tiles, cols, rows in sorted(grids):  # small grids first: ties look at ever larger ones
        gap = abs(width / height - cols / rows)
        fills_it = width * height > 0.5 * tile * tile * n_tiles
        if gap < best_gap or (gap == best_gap and fills_it):
            best = (cols, rows)
            best_gap = gap
    return best


def plan(mode, width, height, stride):
    """Plan for a page of width x height px in `mode`; a vision token covers stride x stride px."""
    if width < 1 or height < 1:
        raise ValueError(f"image of {width}x{height} px: both sides must be at least 1")
    if mode.size % stride or mode.tile % stride:
        raise ValueError(f"mode {mode.name}: {mode.size}/{mode.tile} px are not multiples of "
                         f"the token stride {stride} px")
    cols = 0
    rows = 0
    # A page that fits one tile gets none: the global view shows it as well.
    if mode.tile and max(width, height) > mode.tile:
        cols, rows = best_grid(width, height, mode.tile, mode.max_tiles)
    return Plan(mode, cols, rows, mode.size // stride, mode.tile // stride)


def valid_tokens(plan, width, height):
    """
    Vision tokens that show the page (width x height px) and not gray padding (paper, equation 1).
    A padded global view keeps the share min / max of its tokens; tiles are stretched, always full.
    """
    global_view = plan.side ** 2
    tiles = plan.tokens - global_view
    if not plan.mode.stretch:
        longer = max(width, height)
        padding = (longer - min(width, height)) / longer
        global_view = math.ceil(global_view * (1 - padding))
    return global_view + tiles


def page_box(mode, width, height):
    """
    (left, top, width, height) in px of a page of width x height px inside the global view.
    The rounding is that of PIL's ImageOps.pad, which the published code uses; a page with an
    aspect beyond 2 * size : 1 gets a box without area, that is an empty view.
    """
    size = mode.size
    box_width = size
    box_height = size
    if not mode.stretch and width > height:
        box_height = round(height / width * size)
    if not mode.stretch and height > width:
        box_width = round(width / height * size)
    left = round((size - box_width) / 2)
    top = round((size - box_height) / 2)
    return left, top, box_width, box_height


# -----------------------------------------------------------------------------
# From points of the page to tokens

class TokenPoints(NamedTuple):
    """Where points of a page lie in its views of one size. Arrays of equal length."""
    index: np.ndarray   # which of the points
    view: np.ndarray    # the page's n-th view of this size, in the order in which they are stacked
    row: np.ndarray     # float token coordinates: token (r, c) covers rows [r, r + 1) ...
    column: np.ndarray  # ... and columns [c, c + 1)


def to_tokens(plan, page_size, xy):
    """
    The inverse of `preprocess`: where points of a page are in its views.
    page_size: (width, height) in px of the upright page; xy: (n, 2), points in px, where pixel k
    covers [k, k + 1). -> {side in px of a view: TokenPoints}: every point once on the global view
    and, if there are tiles, once on a tile. ValueError for points that are not on the page.
    """
    xy = np.asarray(xy, dtype=np.float64).reshape(-1, 2)
    width, height = page_size
    outside = ~((xy >= 0) & (xy <= (width, height))).all(1)
    if outside.any():
        x, y = xy[outside][0]
        raise ValueError(f"{outside.sum()} of {len(xy)} points are not on the page of "
                         f"{width}x{height} px, the first at {x:g}, {y:g}")

    found = {}
    if plan.rows:
        found[plan.mode.tile] = on_tiles(plan, width, height, xy)
    whole = on_global_view(plan, width, height, xy)
    if plan.mode.size in found:
        # Equal sizes share one stack, an image's tiles before its global view.
        tiles = found[plan.mode.size]
        whole = whole._replace(view=whole.view + plan.rows * plan.cols)
        whole = TokenPoints(*[np.concatenate(pair) for pair in zip(tiles, whole)])
    found[plan.mode.size] = whole
    return found


def on_global_view(plan, width, height, xy):
    left, top, box_width, box_height = page_box(plan.mode, width, height)
    tokens_per_px = plan.side / plan.mode.size
    column = (left + xy[:, 0] / width * box_width) * tokens_per_px
    row = (top + xy[:, 1] / height * box_height) * tokens_per_px
    index = np.arange(len(xy))
    view = np.zeros_like(index)
    return TokenPoints(index, view, below(row, plan.side), below(column, plan.side))


def on_tiles(plan, width, height, xy):
    # The page is stretched over the whole grid of tiles: coordinates in tiles first.
    x = below(xy[:, 0] / width * plan.cols, plan.cols)
    y = below(xy[:, 1] / height * plan.rows, plan.rows)
    tile_col = np.floor(x)
    tile_row = np.floor(y)
    view = (tile_row * plan.cols + tile_col).astype(np.int64)  # tiles are stacked row by row
    column = below((x - tile_col) * plan.tile_side, plan.tile_side)
    row = below((y - tile_row) * plan.tile_side, plan.tile_side)
    return TokenPoints(np.arange(len(xy)), view, row, column)


def below(coordinates, n):
    """Coordinates kept under n: the page's last edge, and rounding, belong to the last token."""
    return np.minimum(coordinates, np.nextafter(n, 0))


# -----------------------------------------------------------------------------
# Pixels

def upright_size(image):
    """(width, height) in px of a PIL image as a viewer shows it, EXIF orientation applied."""
    width, height = image.size
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in (5, 6, 7, 8):  # the four that include a quarter turn
        return height, width
    return width, height


def gray_levels(image):
    """An image of 16-bit, 32-bit or float gray levels -> 8-bit gray."""
    levels = np.asarray(image, dtype=np.float64)
    if not np.isfinite(levels).all():
        raise ValueError("the image has gray levels that are not finite")
    # PIL does not say what white is. Levels over 255 are taken for 16-bit ones (65535 / 257 = 255).
    if levels.max() > 255:
        levels = levels / 257
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def to_rgb(image):
    """What a viewer would show on white paper: upright, 8 bits a channel, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = gray_levels(image)  # convert("RGB") would clip all levels at 255
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def to_array(image):
    """PIL RGB -> (3, H, W) uint8."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def square_view(image, mode):
    """PIL RGB -> PIL RGB of size x size px, stretched or with gray padding."""
    left, top, width, height = page_box(mode, *image.size)
    if width == height == mode.size:
        return image.resize((width, height), Image.Resampling.BICUBIC)
    view = Image.new("RGB", (mode.size, mode.size), PAD_COLOR)
    if width and height:
        view.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    return view


def cut_tiles(image, cols, rows, tile):
    """PIL RGB -> (rows * cols, 3, tile, tile) uint8, row by row. The aspect is lost, as published."""
    if not rows:
        return np.zeros((0, 3, tile, tile), dtype=np.uint8)
    page = image.resize((cols * tile, rows * tile), Image.Resampling.BICUBIC)
    tiles = to_array(page).reshape(3, rows, tile, cols, tile)
    tiles = tiles.transpose(1, 3, 0, 2, 4)  # (rows, cols, 3, tile, tile)
    return tiles.reshape(rows * cols, 3, tile, tile)


def preprocess(image, mode, stride):
    """
    PIL image -> (plan, global view (3, S, S) uint8, tiles (rows * cols, 3, t, t) uint8).
    Normalization to [-1, 1] is left to the model, on the device: bytes travel faster than floats.
    """
    image = to_rgb(image)
    image_plan = plan(mode, *image.size, stride)
    tiles = cut_tiles(image, image_plan.cols, image_plan.rows, mode.tile)
    return image_plan, to_array(square_view(image, mode)), tiles
