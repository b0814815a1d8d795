"""
A laid-out page: lines of print, boxes around them, and what follows from these: the truth in
reading order, the annotation in OmniDocBench's schema, the picture, and where each glyph is on the
picture.

All coordinates are px from the top left corner of the page; right and bottom edges are exclusive.
"""
import math
import random
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

from nanochat.common import stable_hash
from tasks.charts import draw_chart
from tasks.damage import damage_image
from tasks.fonts import glyphs
from tasks.omnidocbench import page_truth


class PageFull(ValueError):
    """The text does not fit the page."""


class Line(NamedTuple):
    """A printed line of text; (x, y) is its top left corner."""

    x: int
    y: int
    face: str  # one of fonts.FACES
    px: int  # print size
    text: str

    def moved(self, dx, dy):
        return Line(self.x + dx, self.y + dy, self.face, self.px, self.text)


@dataclass
class Figure:
    """A chart, drawn from the words of `split` by `seed`."""

    x: int
    y: int
    width: int
    height: int
    split: str
    seed: int


@dataclass
class Box:
    """Text that belongs together, named as in OmniDocBench, with its place on the page."""

    kind: str  # title, text_block, table, figure, header, footer, page_number
    text: str  # HTML of a table, empty for a figure
    order: int  # place in the reading order, from 0; None for headers, footers and page numbers
    bbox: tuple  # (left, top, right, bottom): room for its ink, and once rendered the ink itself
    lines: list = field(default_factory=list)  # of Line
    figure: Figure = None


@dataclass
class Page:
    width: int
    height: int
    boxes: list
    face: str
    size_px: int  # print size of the text; titles and notes differ
    ink: int  # gray levels
    paper: int
    columns: int = 1
    kinds: tuple = ("text", "table")  # of the boxes in the truth
    relations: list = field(default_factory=list)  # (j, k): box k continues box j's text
    rules: list = field(default_factory=list)  # (left, top, right, bottom) of the lines of tables
    damaged: bool = False
    skew: float = 0.0  # radians by which damage turned the picture clockwise about its middle

    @property
    def truth(self):
        return page_truth(annotation(self), self.kinds)

    def turned(self, x, y):
        """Where a point of the straight page, or an array of points, is on the picture."""
        # y points down, so that a positive angle turns clockwise.
        middle_x = self.width / 2
        middle_y = self.height / 2
        cos = math.cos(self.skew)
        sin = math.sin(self.skew)
        turned_x = middle_x + cos * (x - middle_x) - sin * (y - middle_y)
        turned_y = middle_y + sin * (x - middle_x) + cos * (y - middle_y)
        return turned_x, turned_y


def page_size(image_size):
    """(width, height) of an image_size argument: one int for a square, or a pair."""
    if isinstance(image_size, int):
        return image_size, image_size
    width, height = image_size
    return width, height


def wrap(words, widths, space, limit, joiner=" "):
    """
    list of lines of at most `limit` px, filled greedily; None if a word is wider than that.

    widths: px of every word; space: px of the joiner.
    """
    lines = []
    used = 0  # px of the last line
    for word, width in zip(words, widths):
        if width > limit:
            return None
        if lines and used + space + width <= limit:
            lines[-1].append(word)
            used += space + width
        else:
            lines.append([word])
            used = width
    return [joiner.join(line) for line in lines]


# -----------------------------------------------------------------------------
# Annotation


def detection(page, number, box):
    """A box as an entry of layout_dets. The poly runs clockwise from the top left."""
    left, top, right, bottom = box.bbox
    poly = []
    for x, y in ((left, top), (right, top), (right, bottom), (left, bottom)):
        poly.extend(page.turned(x, y))
    entry = {
        "category_type": box.kind,
        "ignore": False,
        # OmniDocBench counts from 1, and gives None to what is outside the reading order.
        "order": None if box.order is None else box.order + 1,
        "anno_id": number,
        "poly": poly,
    }
    if box.kind == "table":
        entry["html"] = box.text
    elif box.kind != "figure":
        entry["text"] = box.text
    return entry


def annotation(page, image_path="page.png", page_no=0):
    """The page as a row of OmniDocBench.json."""
    # Pieces of one paragraph in two columns, which a reader has to join.
    relations = []
    for source, target in page.relations:
        relations.append(
            {"source_anno_id": source, "target_anno_id": target, "relation_type": "truncated"}
        )
    layout = ("single", "double", "three")[page.columns - 1]
    attribute = {
        "data_source": "synthetic",
        "language": "english",
        "layout": f"{layout}_column",
        "special_issue": ["fuzzy_scan"] if page.damaged else [],
    }
    page_info = {
        "page_no": page_no,
        "height": page.height,
        "width": page.width,
        "image_path": image_path,
        "page_attribute": attribute,
    }
    return {
        "layout_dets": [detection(page, k, box) for k, box in enumerate(page.boxes)],
        "extra": {"relation": relations},
        "page_info": page_info,
    }


# -----------------------------------------------------------------------------
# Picture and labels


def print_line(mask, line, labels):
    """
    Prints a line into `mask`, (height, width) uint8 of ink, and appends (character, x, y) of each
    glyph to `labels`: the center of its ink box. What reaches over the edge is cut off.
    """
    page_height, page_width = mask.shape
    glyph_of = glyphs(line.face, line.px)
    pen = line.x  # left edge of the next character's advance
    for char in line.text:
        glyph = glyph_of[char]
        ink = glyph.ink
        if ink is not None:
            left = pen + glyph.left
            top = line.y + glyph.top
            if left < 0 or top < 0:  # a negative index would count from the other end
                ink = ink[max(0, -top):, max(0, -left):]
                left = max(0, left)
                top = max(0, top)
            height, width = ink.shape
            there = mask[top:top + height, left:left + width]
            if there.shape != ink.shape:  # cut off at the far edges
                height, width = there.shape
                ink = ink[:height, :width]
            # Maximum, not assignment: neighbors may overlap.
            np.maximum(there, ink, out=there)

            # A glyph of which the edge cuts off more than half has no place to point to.
            x = pen + glyph.x
            y = line.y + glyph.y
            if 0 <= x < page_width and 0 <= y < page_height:
                labels.append((char, x, y))
        pen += glyph.advance


def print_figure(mask, figure):
    """Prints a chart into `mask`, in gray, with its own print."""
    rng = random.Random(figure.seed)
    chart, _, _ = draw_chart(rng, figure.width, figure.height, figure.split)
    gray = np.asarray(chart.convert("L"))
    right = figure.x + figure.width
    bottom = figure.y + figure.height
    mask[figure.y:bottom, figure.x:right] = 255 - gray


def render(page):
    """
    -> (PIL "L" image, [(character, x, y), ...] of every glyph in the order of the boxes).

    Every bbox is tightened from the room of its box to its ink.
    """
    mask = np.zeros((page.height, page.width), np.uint8)  # of ink: 0 is paper, 255 is ink
    for left, top, right, bottom in page.rules:
        mask[top:bottom, left:right] = 255
    labels = []
    for box in page.boxes:
        if box.figure is not None:
            print_figure(mask, box.figure)
        for line in box.lines:
            print_line(mask, line, labels)

    # On the ink and not on the picture, where paper and ink are gray.
    ink = Image.fromarray(mask)
    for box in page.boxes:
        left, top, _, _ = box.bbox
        ink_left, ink_top, ink_right, ink_bottom = ink.crop(box.bbox).getbbox()
        box.bbox = (left + ink_left, top + ink_top, left + ink_right, top + ink_bottom)

    # From ink, 0 to 255, to gray levels between those of paper and ink.
    contrast = page.ink - page.paper
    gray = page.paper + contrast * np.arange(256) // 255
    return ink.point(gray.tolist()), labels


def scan(page, strengths, name):
    """
    The page as a scanner sees it: -> (PIL "L" image, glyph labels on it), as `render` gives them.

    strengths: {kind: 0 to 1} of damage.py. The damage is drawn by `name`; page.skew and
    page.damaged say what was done.
    """
    image, labels = render(page)
    # A clean page skips all of it: a generator of numpy alone takes a tenth of a small page's time.
    page.damaged = any(strengths.values())
    if page.damaged:
        image, page.skew = damage_image(image, strengths, stable_hash(name), page.size_px)
    if page.skew and labels:
        chars, xs, ys = zip(*labels)
        xs, ys = page.turned(np.array(xs), np.array(ys))
        labels = list(zip(chars, xs.tolist(), ys.tolist()))
    return image, labels
