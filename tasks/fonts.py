"""
Fonts, and what printing needs to know of them: widths, line heights and the ink of every glyph, all
cached. All faces come with matplotlib's wheel.
"""
import importlib.util
import os
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FACES = {
    "sans": "DejaVuSans.ttf",
    "sans-bold": "DejaVuSans-Bold.ttf",
    "sans-oblique": "DejaVuSans-Oblique.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif-bold": "DejaVuSerif-Bold.ttf",
    "mono": "DejaVuSansMono.ttf",
    "stix": "STIXGeneral.ttf",
    "stix-bold": "STIXGeneralBol.ttf",
}
# The faces of text, each with that of its titles. Whole pages draw from them by position, so the
# order decides what every page looks like.
BOLD = {
    "serif": "serif-bold",
    "sans": "sans-bold",
    "sans-oblique": "sans-bold",
    "stix": "stix-bold",
}
MIN_PX = 5  # smallest print; below it letters fall together
# How far ink reaches out of a line's width on either side, at most, over the print size.
OVERHANG = 1 / 10
OVERHANG_OBLIQUE = 1 / 6


@lru_cache(None)
def font_folder():
    spec = importlib.util.find_spec("matplotlib")  # found, not imported: that would take a second
    if spec is None:
        raise ModuleNotFoundError(
            "rendered pages are printed with matplotlib's fonts, and matplotlib is not installed: "
            "pip install matplotlib"
        )
    return os.path.join(spec.submodule_search_locations[0], "mpl-data", "fonts", "ttf")


@lru_cache(512)
def font(face, px):
    """PIL font of one of FACES at px pixels."""
    path = os.path.join(font_folder(), FACES[face])
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"no font file {path}: reinstall matplotlib, or leave {face!r} out of faces"
        )
    # BASIC: the other layout engine is not in every build of Pillow, and its pixels differ.
    return ImageFont.truetype(path, px, layout_engine=ImageFont.Layout.BASIC)


# -----------------------------------------------------------------------------
# Widths. Without kerning: asking the font for whole words loads every letter again, which takes as
# long as half a page.


class Advances(dict):
    """{character: advance in px} of one face at one size, measured on first use."""

    def __init__(self, face, px):
        self.font = font(face, px)

    def __missing__(self, char):  # what dict calls for a key that it does not have
        self[char] = self.font.getlength(char)
        return self[char]


@lru_cache(None)
def advances(face, px):
    return Advances(face, px)


def text_width(face, px, text):
    """Width in px of a line of text, a float."""
    return sum(map(advances(face, px).__getitem__, text))


@lru_cache(None)
def line_height(face, px):
    """Ascent + descent in px."""
    return sum(font(face, px).getmetrics())


def overhang(face):
    return OVERHANG_OBLIQUE if "oblique" in face else OVERHANG


# -----------------------------------------------------------------------------
# Glyphs


class Glyph(NamedTuple):
    """One character as printed. Its pen position is (0, 0), the top left of its line."""

    advance: int  # px from this pen position to the next
    left: int  # of the ink, px
    top: int
    ink: np.ndarray  # (height, width) uint8, no empty rows or columns; None for a space
    x: float  # center of the ink box, px
    y: float


def draw_glyph(face, px, char):
    pen = font(face, px)
    left, top, right, bottom = pen.getbbox(char)
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), char, 255, pen)
    advance = int(advances(face, px)[char])

    # getbbox of a font spans the advance too; that of the image is the ink alone.
    ink_box = image.getbbox()
    if ink_box is None:
        return Glyph(advance, 0, 0, None, 0.0, 0.0)
    ink = np.asarray(image.crop(ink_box))
    left += ink_box[0]
    top += ink_box[1]
    height, width = ink.shape
    return Glyph(advance, left, top, ink, x=left + width / 2, y=top + height / 2)


class Glyphs(dict):
    """{character: Glyph} of one face at one size, drawn on first use."""

    def __init__(self, face, px):
        self.face = face
        self.px = px

    def __missing__(self, char):
        self[char] = draw_glyph(self.face, self.px, char)
        return self[char]


# Pasting a cached glyph takes a fifth of the time that the font takes to draw it again.
@lru_cache(512)
def glyphs(face, px):
    return Glyphs(face, px)


def lacks(face, char):
    """Whether the face has no glyph for the character, or an empty one."""
    ink = bytes(font(face, 20).getmask(char))
    missing = bytes(font(face, 20).getmask("\ufffe"))  # no character, so no face has it
    return not any(ink) or ink == missing
