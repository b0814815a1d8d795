"""
Image modes: how a page becomes square views, and how many vision tokens and decoder positions
those views take. The geometry is one pure function, `plan`, shared by tokenizer, loader and model;
`to_tokens` is its inverse question: which token shows a given pixel of the page. Sizes, resize
rules and tiling are DeepSeek-OCR's (paper, table 1).
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from nanochat.config import TokenLayout

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
    Mode("256px", 256, stretch=True),  # page
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

# The paper's names.
ALIASES = {
    "tiny": "512px",
    "small": "640px",
    "base": "1024px",
    "large": "1280px",
}

MODES = {mode.name: mode for mode in REGISTERED}
for alias, name in ALIASES.items():
    MODES[alias] = MODES[name]


def get_mode(name):
    """
    The mode of that name or alias. A model reads in any mode whose sizes fit its token stride, not
    only in those it was trained in; `plan` checks that they fit.
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
    layout: TokenLayout = field(compare=False, repr=False)  # of the model; the same for all plans

    @property
    def tiles(self):
        return self.rows * self.cols

    @property
    def tokens(self):
        """Vision tokens as the paper counts them (table 1): no newlines, no separator."""
        global_view = self.layout.tokens(1, 1, self.side)
        return global_view + self.layout.tokens(self.rows, self.cols, self.tile_side)

    @property
    def positions(self):
        """Decoder positions: the tokens, on a grid a newline after each row, one separator."""
        global_view = self.layout.positions(1, 1, self.side)
        # Tiles are laid out as one large grid: a newline ends a row of tokens across all tiles.
        tiles = self.layout.positions(self.rows, self.cols, self.tile_side)
        return tiles + global_view + 1

    @property
    def views(self):
        """{side in px: number of views}."""
        count = {self.mode.size: 1}
        if self.tiles:
            # Not an assignment: tiles as large as the global view are counted with it.
            count.setdefault(self.mode.tile, 0)
            count[self.mode.tile] += self.tiles
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
        grid_area = tile * tile * n_tiles
        fills_it = width * height > 0.5 * grid_area
        if gap < best_gap or (gap == best_gap and fills_it):
            best = (cols, rows)
            best_gap = gap
    return best


def plan(mode, width, height, layout):
    """
    Plan for a page of width x height px in `mode`. layout: the model's TokenLayout (cfg.layout), or
    just the px that a token covers along a side, if tokens form a grid.
    """
    if isinstance(layout, int):
        layout = TokenLayout(layout)
    stride = layout.stride
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
    return Plan(mode, cols, rows, mode.size // stride, mode.tile // stride, layout)


def valid_tokens(plan, width, height):
    """
    Vision tokens that show the page (width x height px) and not gray padding (paper, equation 1).
    A padded global view keeps the share min / max of its tokens; tiles are stretched, always full.
    """
    global_view = plan.layout.tokens(1, 1, plan.side)
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
    points = np.asarray(xy, dtype=np.float64).reshape(-1, 2)
    check_on_page(points, page_size)
    # Resizing keeps where a point is as a fraction of the page, also where it loses the aspect.
    across, down = (points / page_size).T  # (n,) each

    found = {}
    if plan.tiles:
        found[plan.mode.tile] = on_tiles(plan, across, down)
    box = page_box(plan.mode, *page_size)
    whole = on_global_view(plan, box, across, down)
    if plan.mode.size in found:
        # Equal sizes share one stack, an image's tiles before its global view.
        tiles = found[plan.mode.size]
        whole = whole._replace(view=whole.view + plan.tiles)
        whole = TokenPoints(*map(np.concatenate, zip(tiles, whole)))
    found[plan.mode.size] = whole
    return found


def check_on_page(points, page_size):
    on_page = (points >= 0) & (points <= page_size)
    outside = points[~on_page.all(1)]
    if len(outside):
        width, height = page_size
        x, y = outside[0]
        raise ValueError(f"{len(outside)} of {len(points)} points are not on the page of "
                         f"{width}x{height} px, the first is at {x:g}, {y:g}")


def on_global_view(plan, box, across, down):
    left, top, width, height = box
    tokens_per_px = plan.side / plan.mode.size
    column = (left + across * width) * tokens_per_px
    row = (top + down * height) * tokens_per_px
    index = np.arange(len(row))
    view = np.zeros_like(index)  # there is one
    return TokenPoints(index, view, kept_below(row, plan.side), kept_below(column, plan.side))


def on_tiles(plan, across, down):
    # First in tiles, of which the page has cols x rows, then in tokens within the tile.
    x = kept_below(across * plan.cols, plan.cols)
    y = kept_below(down * plan.rows, plan.rows)
    tile_col = np.floor(x)
    tile_row = np.floor(y)
    column = kept_below((x - tile_col) * plan.tile_side, plan.tile_side)
    row = kept_below((y - tile_row) * plan.tile_side, plan.tile_side)
    view = tile_row * plan.cols + tile_col  # tiles are stacked row by row
    return TokenPoints(np.arange(len(row)), view.astype(np.int64), row, column)


def kept_below(coordinates, n):
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


WHITES = (255, 4095, 65535)  # of 8, 12 and 16 bits


def gray_levels(image):
    """An image of 16-bit, 32-bit or float gray levels -> 8-bit gray."""
    levels = np.asarray(image, dtype=np.float64)
    if not np.isfinite(levels).all():
        raise ValueError("the image has gray levels that are not finite")
    # PIL does not say what white is: the least that the levels allow. Floats may end at 1.
    largest = levels.max()
    white = next((white for white in WHITES if largest <= white), WHITES[-1])
    if image.mode == "F" and largest <= 1:
        white = 1
    levels = (levels * (255 / white)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels)


def to_rgb(image):
    """What a viewer would show on white paper: upright, 8 bits a channel, transparency on white."""
    return as_shown(image).convert("RGB")


def as_shown(image):
    """The same, but a gray picture has mode "L": one channel is a third of the work of three."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = gray_levels(image)  # convert("RGB") would clip all levels at 255
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def to_array(image):
    """PIL RGB or L -> (3, H, W) uint8; the channels of a gray picture are equal."""
    pixels = np.asarray(image)  # (H, W, 3) or (H, W)
    if pixels.ndim == 2:
        return np.repeat(pixels[None], 3, axis=0)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def square_view(image, mode):
    """PIL RGB or L -> the same of size x size px, stretched or with gray padding."""
    square = (mode.size, mode.size)
    if image.size == square:
        return image  # pages drawn at the model's size keep their pixels
    if mode.stretch:
        return image.resize(square, Image.Resampling.BICUBIC)
    view = Image.new(image.mode, square, PAD_COLOR if image.mode == "RGB" else PAD_COLOR[0])
    left, top, width, height = page_box(mode, *image.size)
    if width and height:
        page = image.resize((width, height), Image.Resampling.BICUBIC)
        view.paste(page, (left, top))
    return view


def cut_tiles(image, cols, rows, tile):
    """PIL RGB or L -> (rows * cols, 3, tile, tile) uint8, row by row. The aspect is lost."""
    if not rows:
        return np.zeros((0, 3, tile, tile), dtype=np.uint8)
    size = (cols * tile, rows * tile)
    page = to_array(image.resize(size, Image.Resampling.BICUBIC))  # (3, H, W)
    tiles = page.reshape(3, rows, tile, cols, tile)
    tiles = tiles.transpose(1, 3, 0, 2, 4)  # (rows, cols, 3, tile, tile)
    return tiles.reshape(rows * cols, 3, tile, tile)


def preprocess(image, mode, layout):
    """
    PIL image -> (plan, global view (3, S, S) uint8, tiles (rows * cols, 3, t, t) uint8).
    Normalization to [-1, 1] is left to the model, on the device: bytes travel faster than floats.
    """
    image = as_shown(image)
    image_plan = plan(mode, *image.size, layout)
    tiles = cut_tiles(image, image_plan.cols, image_plan.rows, mode.tile)
    return image_plan, to_array(square_view(image, mode)), tiles
