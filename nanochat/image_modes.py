"""
Image modes: how a picture becomes square views, and how many vision tokens and LLM positions those take. Geometry is one pure
function, `plan`, which tokenizer, loader and model all use. Sizes, resize rules and tiling are DeepSeek-OCR's (paper table 1).
"""
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

PAD_COLOR = (127, 127, 127)  # int(0.5 * 255): zero after normalisation


@dataclass(frozen=True)
class Mode:
    name: str
    size: int             # px, side of the global view
    stretch: bool = False # resize straight to the square (aspect lost) instead of padding with grey
    tile: int = 0         # px, side of a local tile; 0 = global view only
    max_tiles: int = 0


MODES = {m.name: m for m in (
    Mode("tiny", 512, stretch=True), Mode("small", 640, stretch=True), Mode("base", 1024), Mode("large", 1280),
    Mode("gundam", 1024, tile=640, max_tiles=6), Mode("gundam-m", 1280, tile=1024, max_tiles=6),
    Mode("gundam-9", 1024, tile=640, max_tiles=9), Mode("gundam-m-9", 1280, tile=1024, max_tiles=9),
    Mode("nano", 64, stretch=True), Mode("dense", 128, stretch=True), Mode("test", 64, stretch=True))}


def get_mode(name, supported=None):
    if name not in MODES or (supported is not None and name not in supported):
        raise ValueError(f"image mode {name!r}: must be one of {sorted(supported if supported is not None else MODES)}")
    return MODES[name]


@dataclass(frozen=True)
class Plan:
    """What one picture becomes in one mode. Units: vision tokens along a side."""
    mode: Mode
    cols: int             # tiles across, 0 when there are none
    rows: int
    side: int             # tokens along a side of the global view
    tile_side: int

    @property
    def tokens(self):
        """Vision tokens as the paper counts them (table 1), without newlines and separator."""
        return self.side ** 2 + self.rows * self.cols * self.tile_side ** 2

    @property
    def positions(self):
        """Positions in the decoder: one newline per row of tokens, one separator at the end."""
        return self.side * (self.side + 1) + 1 + self.rows * self.tile_side * (self.cols * self.tile_side + 1)

    @property
    def views(self):
        """{side in px: number of views}."""
        return {self.mode.size: 1, **({self.mode.tile: self.rows * self.cols} if self.rows else {})}


def auto_mode(supported, width, height):
    """
    The mode for a picture of width x height px when none is given: Gundam where the model supports it, whose own rule sends a picture
    of at most 640 px a side through without tiles; else the smallest mode the picture does not lose pixels in, or the largest there is.
    """
    if "gundam" in supported:
        return MODES["gundam"]
    single = sorted((MODES[name] for name in supported if not MODES[name].tile), key=lambda m: m.size)
    return next((m for m in single if m.size >= max(width, height)), single[-1])


def valid_tokens(p, width, height):
    """
    Vision tokens of plan `p` that show the picture (width x height px) and not grey padding (paper, equation 1): the global view keeps
    the share min / max of its tokens when it pads; tiles are stretched and always full.
    """
    view = p.side ** 2
    if not p.mode.stretch:
        view = math.ceil(view * (1 - (max(width, height) - min(width, height)) / max(width, height)))
    return view + p.tokens - p.side ** 2


def best_grid(width, height, tile, max_tiles):
    """(cols, rows) of 2..max_tiles tiles whose aspect is nearest; on a tie the larger if the picture fills over half of it."""
    grids = sorted({(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if 2 <= c * r <= max_tiles},
                   key=lambda g: (g[0] * g[1], g))
    best, best_gap = None, float("inf")
    for c, r in grids:
        gap = abs(width / height - c / r)
        if gap < best_gap or (gap == best_gap and width * height > 0.5 * tile * tile * c * r):
            best, best_gap = (c, r), gap
    return best


def plan(mode, width, height, stride):
    """Plan for a picture of width x height px in `mode`, where a vision token covers `stride` px of a side."""
    if width < 1 or height < 1:
        raise ValueError(f"image of {width}x{height} px: both sides must be at least 1")
    if mode.size % stride or mode.tile % stride:
        raise ValueError(f"mode {mode.name}: {mode.size}/{mode.tile} px are not multiples of the token stride {stride} px")
    cols = rows = 0
    if mode.tile and max(width, height) > mode.tile:
        cols, rows = best_grid(width, height, mode.tile, mode.max_tiles)
    return Plan(mode, cols, rows, mode.size // stride, mode.tile // stride)


def to_rgb(image):
    """What a viewer would show on white paper: EXIF orientation applied, 16-bit grey scaled, transparency over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # convert() would clip at 255
        levels = np.asarray(image, dtype=np.float64)
        if not np.isfinite(levels).all():
            raise ValueError("the image has grey levels that are not finite")
        image = Image.fromarray((levels / (257 if levels.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_array(image):
    """PIL RGB -> (3, H, W) uint8."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def preprocess(image, mode, stride):
    """
    PIL image -> (plan, global view (3, S, S) uint8, tiles (rows*cols, 3, t, t) uint8 in row-major order).
    Orientation from EXIF is applied; normalisation to [-1, 1] is the model's business, on the device.
    """
    image = to_rgb(image)
    p = plan(mode, *image.size, stride)
    if mode.stretch:
        view = image if image.size == (mode.size, mode.size) else image.resize((mode.size, mode.size), Image.Resampling.BICUBIC)
    else:
        view = ImageOps.pad(image, (mode.size, mode.size), color=PAD_COLOR)
    t = mode.tile
    tiles = np.zeros((p.rows * p.cols, 3, t, t), dtype=np.uint8)
    if len(tiles):
        big = to_array(image.resize((t * p.cols, t * p.rows), Image.Resampling.BICUBIC))
        tiles[:] = big.reshape(3, p.rows, t, p.cols, t).transpose(1, 3, 0, 2, 4).reshape(tiles.shape)
    return p, to_array(view), tiles
