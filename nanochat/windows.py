"""
A picture of any size -> windows that a reader of small pages can read, and their texts -> one text.

A reader knows pages of one size, print of a few sizes and so many characters on a page (`Known`).
`split` finds the lines of print (nanochat/lines.py) and gives them the print that the reader knows.
Lines that are then wider than a window are broken again, between words, as a typesetter would: no
word is cut, none is in two windows, and each window is a paragraph like those the reader was
trained on. So the texts need no matching: `join` puts them one after the other.

    windows, notes = split(image, known)
    text = join(windows, [read(window.image) for window in windows])
"""
import math
import re
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
from PIL import Image

from nanochat.lines import Box, find_lines, ink_of, pitch_of, quietest, weighted_quantile

# What a window is printed with, gray levels: the middle of what rendered pages have.
PAPER = 240
INK = 30

MARGIN = 3            # px of paper around the words of a window
LETTER = 0.5          # em, the mean advance of a letter: tells how many characters a width holds
WIDEST_SPACE = 1.0    # em by which two words are set apart at most: tables and tabs have more
CLOSEST = 1.15        # em from baseline to baseline, at least ...
LOOSEST = 1.7         # ... and at most: double-spaced lines are brought together
SQUEEZED = 0.9        # of its size, to which print is reduced to keep the lines of the page
BLURRED = 1.6         # print that is enlarged more than this has too few pixels to be read
BAR = 0.55            # share of ink in a line: print has at most 0.46, what has more is dark paper
HUGE = 20             # times the largest print that the reader knows: hardly print at all


@dataclass(frozen=True)
class Known:
    """What a reader was trained on. In a checkpoint's meta.json under "windows", but for size."""
    size: int             # px, side of its pages
    print_px: tuple       # (smallest, largest) print, px per em
    chars: tuple          # (fewest, most) characters on a page

    def __post_init__(self):
        low, high = self.print_px
        fewest, most = self.chars
        if not 4 <= low <= high <= self.size / 4 or not 0 <= fewest <= most or most < 1:
            raise ValueError(f"windows of {self.size} px with print of {low:g} to {high:g} px and "
                             f"{fewest} to {most} characters: give print from 4 px to a quarter "
                             f"of the window, and both in ascending order")

    @classmethod
    def parse(cls, text, size):
        """"10-14,130-400": print in px, then characters -> Known for pages of `size` px."""
        match = re.fullmatch(r"(\d+)-(\d+),(\d+)-(\d+)", text)
        if not match:
            raise ValueError(f"windows {text!r}: give the print (px) and the characters that a "
                             f"page may have, for example 10-14,130-400")
        low, high, fewest, most = map(int, match.groups())
        return cls(size, (low, high), (fewest, most))

    def to_meta(self):
        """For meta.json; `from_meta` is the inverse."""
        return {"print_px": list(self.print_px), "chars": list(self.chars)}

    @classmethod
    def from_meta(cls, meta, size):
        """None where meta (a dict) does not say that its model reads in windows."""
        if "windows" not in meta:
            return None
        record = meta["windows"]
        try:
            return cls(size, tuple(record["print_px"]), tuple(record["chars"]))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"meta.json: windows is {record!r}, need print_px and chars, a pair "
                             f"of numbers each ({error})") from error


class Piece(NamedTuple):
    """Words of a line, on their way from the page to a window."""
    line: object    # the Line that they are on
    box: Box        # px of the straightened page
    x: int = 0      # px of the window's print, of the left edge


@dataclass
class Row:
    """A line of print in a window."""
    pieces: list = field(default_factory=list)
    width: int = 0        # px of the window
    opens: bool = False   # begins a paragraph


@dataclass
class Window:
    image: Image.Image    # gray (L), size x size: a page of small print may have a thousand
    rows: list            # of Row, from top to bottom
    before: str           # what goes between the text of the window before and this one's

    @property
    def place(self):
        """Box of what it shows, px of the straightened page."""
        boxes = []
        for row in self.rows:
            for piece in row.pieces:
                boxes.append(piece.box)
        return around(boxes)


def around(boxes):
    """The Box around Boxes."""
    lefts, tops, rights, bottoms = zip(*boxes)
    return Box(min(lefts), min(tops), max(rights), max(bottoms))


# -----------------------------------------------------------------------------
# From lines to rows

def scale_of(line, known):
    """What the print of a line is multiplied by; 1 where the reader knows it as it is."""
    low, high = known.print_px
    return min(max(line.print_px, low), high) / line.print_px


def fitting_scale(lines, known):
    """
    What the print of a column is multiplied by so that its lines fit the window as they are; None
    where that would make it much smaller than it can be.
    """
    print_px = lines[0].print_px
    if any(line.print_px != print_px for line in lines):
        return None  # what makes the text fit would make a title too large, or the other way round
    widest = around([around(line.words) for line in lines]).width
    fitting = (known.size - 2 * MARGIN - 1) / widest  # 1: rounding
    wanted = scale_of(lines[0], known)
    return min(wanted, fitting) if fitting >= SQUEEZED * wanted else None


def rows_as_they_are(lines, scale):
    """A Row per Line: the page's own line breaks and indents."""
    left = min(line.words[0].left for line in lines)
    rows = []
    for line in lines:
        row = Row(opens=line.opens)
        # Word by word and not as a whole: where lines touch, each word has borders of its own.
        for word in line.words:
            piece = Piece(line, word, round((word.left - left) * scale))
            row.pieces.append(piece)
            row.width = piece.x + math.ceil(word.width * scale)
        rows.append(row)
    return rows


def parts_of(word, ink, most):
    """A word of more than `most` px in parts: a name of a file, or a failure of the rules."""
    parts = []
    while word.width > most:
        # Where there is least ink, in the second half of what fits.
        profile = ink.levels[word.top:word.bottom, word.left:word.left + most].sum(0)
        cut = word.left + quietest(profile, most // 2, most)
        parts.append(word._replace(right=cut))
        word = word._replace(left=cut)
    return [*parts, word]


def flowed(lines, ink, known):
    """Rows that are as wide as a window: the words of all Lines, one after the other."""
    room = known.size - 2 * MARGIN
    rows = []
    for line in lines:
        scale = scale_of(line, known)
        most = int(room / scale) - 1
        widest_space = WIDEST_SPACE * line.print_px
        # Where lines are joined, a px more: the spaces there were measured and not printed, and one
        # that is too narrow makes two words one.
        end = line.words[0].left - 1 / scale  # of the word before
        opens = line.opens or not rows
        for word in line.words:
            # Words bring their spaces along, so only wider gaps are left between them.
            gap = min(word.left - end, widest_space) * scale
            end = word.right
            for part in parts_of(word, ink, most):
                width = math.ceil(part.width * scale)
                if opens or rows[-1].width + gap + width > room:
                    rows.append(Row(opens=line.opens and opens))
                    gap = 0
                row = rows[-1]
                x = round(row.width + gap)
                row.pieces.append(Piece(line, part, x))
                row.width = x + width
                opens = False
                gap = 0
    return rows


# -----------------------------------------------------------------------------
# From rows to windows

class Setter:
    """Sets the rows of one column into windows."""

    def __init__(self, lines, ink, known):
        self.ink = ink
        self.known = known
        self.fixed_scale = fitting_scale(lines, known)
        if self.fixed_scale is None:
            self.rows = flowed(lines, ink, known)
        else:
            self.rows = rows_as_they_are(lines, self.fixed_scale)
        print_px = max(line.print_px * self.scale(line) for line in lines)
        pitch = pitch_of(lines) * self.scale(lines[0])
        self.pitch = min(max(pitch, CLOSEST * print_px), LOOSEST * print_px)
        # Lines of usual print that a window holds from top to bottom
        self.lines_per_window = max(1, int((known.size - 2 * MARGIN) / self.pitch))

    def scale(self, line):
        return scale_of(line, self.known) if self.fixed_scale is None else self.fixed_scale

    def chars(self, rows):
        """About how many characters are on rows."""
        total = 0.0
        for row in rows:
            line = row.pieces[0].line
            total += row.width / (LETTER * line.print_px * self.scale(line)) + 1
        return total

    def paragraphs(self):
        """[[Row, ...], ...]"""
        found = []
        for row in self.rows:
            if not found or row.opens:
                found.append([])
            found[-1].append(row)
        return found

    def parts(self):
        """[(rows of a window, whether a paragraph begins there), ...]"""
        fewest, most = self.known.chars
        parts = []
        for paragraph in self.paragraphs():
            # A heading or a short paragraph alone is a page like none that the reader has seen, so
            # it shares one with what follows. The blank line between them is lost.
            if parts and self.chars(parts[-1][0]) < fewest:
                both = parts[-1][0] + paragraph
                if self.chars(both) <= most and self.fits(both):
                    parts[-1] = (both, parts[-1][1])
                    continue
            for k, rows in enumerate(self.equal_parts(paragraph)):
                parts.append((rows, k == 0))
        return parts

    def equal_parts(self, paragraph):
        """
        [rows of a window, ...] of a paragraph that may be too long for one. Parts of about equal
        length: a last window with three words would be a page like none, too.
        """
        _, most = self.known.chars
        n_rows = len(paragraph)
        by_chars = math.ceil(self.chars(paragraph) / most)
        by_height = math.ceil(n_rows / self.lines_per_window)
        fewest = min(max(by_chars, by_height), n_rows)
        for n in range(fewest, n_rows + 1):
            edges = [round(k * n_rows / n) for k in range(n + 1)]
            parts = [paragraph[start:end] for start, end in zip(edges, edges[1:])]
            # Larger print, and rows that are set apart, take more room than `by_height` counts.
            if all(self.fits(rows) for rows in parts):
                break
        return parts  # at worst a row each

    def fits(self, rows):
        """Whether the rows fit a window from top to bottom."""
        return self.heights(rows)[-1] <= self.known.size - 2 * MARGIN

    def draw(self, rows):
        """The picture of a window."""
        size = self.known.size
        canvas = np.zeros((size, size), np.float32)  # of ink, as ink.levels
        heights = self.heights(rows)
        # In the middle of the page, as far as its lines are known to fit.
        left = max(MARGIN, (size - max(row.width for row in rows)) // 2)
        y = max(MARGIN, round((size - heights[-1]) / 2))
        for row, height in zip(rows, heights):
            for piece in row.pieces:
                self.print_piece(canvas, piece, left + piece.x, y + height)
        gray = PAPER - (PAPER - INK) * canvas
        return Image.fromarray(gray.round().astype(np.uint8))

    def heights(self, rows):
        """Of the baselines under the top of the print, px; last, the foot of the print."""
        heights = []
        foot = 0.0
        for row in rows:
            above = 0.0
            below = 0.0
            for piece in row.pieces:
                scale = self.scale(piece.line)
                above = max(above, (piece.line.baseline - piece.box.top) * scale)
                below = max(below, (piece.box.bottom - piece.line.baseline) * scale)
            height = foot + above + 1
            if heights:
                step = self.pitch * (1.5 if row.opens else 1)
                height = max(height, heights[-1] + step)
            heights.append(round(height))
            foot = heights[-1] + below
        return [*heights, math.ceil(foot)]

    def print_piece(self, canvas, piece, x, baseline):
        """Prints a Piece into `canvas` with its left edge at x, standing on `baseline`."""
        line = piece.line
        scale = self.scale(line)
        box = piece.box
        part = self.ink.levels[box.top:box.bottom, box.left:box.right]
        if scale != 1:
            new_size = (max(1, round(box.width * scale)), max(1, round(box.height * scale)))
            resized = Image.fromarray(part).resize(new_size, Image.Resampling.BICUBIC)
            part = np.asarray(resized).clip(0, 1)
        add_ink(canvas, part, x, baseline - round((line.baseline - box.top) * scale))


def add_ink(canvas, part, x, y):
    """Prints `part` at (x, y); what reaches over the edge is cut off, and is soft edges only."""
    part = part[max(0, -y):, max(0, -x):]
    x = max(0, x)
    y = max(0, y)
    there = canvas[y:y + part.shape[0], x:x + part.shape[1]]
    np.maximum(there, part[:there.shape[0], :there.shape[1]], out=there)


# -----------------------------------------------------------------------------
# The interface

def split(image, known):
    """
    -> (list of Windows in reading order, list of notes). image: a PIL image; known: a Known.

    A picture without print gives no windows. The notes are for people: what the rules left out or
    could not decide.
    """
    ink = ink_of(image)
    lines, notes = find_lines(ink)
    if not lines:
        return [], [*notes, "no print was found"]
    note_print(lines, ink, known, notes)

    windows = []
    # In reading order already; columns with nothing but a picture have no lines.
    for _, column in groupby(lines, key=lambda line: line.column):
        setter = Setter(list(column), ink, known)
        for rows, opens in setter.parts():
            before = "\n\n" if opens else " "
            windows.append(Window(setter.draw(rows), rows, before if windows else ""))
    return windows, notes


def note_print(lines, ink, known, notes):
    """Notes print that is too small to be read, however it is enlarged, or hardly print at all."""
    # Dashes and rows of dots are lines, too: what counts as print has a part of the page's width.
    sizes = [line.print_px for line in lines]
    widths = [line.box.width for line in lines]
    smallest = weighted_quantile(sizes, widths, 0.05)
    largest = max(line.print_px for line in lines)
    low, high = known.print_px
    if low / smallest > BLURRED:
        notes.append(f"print of about {smallest * ink.reduced:.0f} px is too small: the reader "
                     f"knows {low:g} px and more; scan at a higher resolution")
    if largest > HUGE * high:
        notes.append(f"print of about {largest * ink.reduced:.0f} px was found: a picture, or "
                     f"lines that touch, look like that, and their text is lost")
    for line in lines:
        box = line.box
        if ink.printed[box.top:box.bottom, box.left:box.right].mean() > BAR:
            notes.append(f"a dark bar from {box.top * ink.reduced:.0f} to "
                         f"{box.bottom * ink.reduced:.0f} px: light print on it is lost")


def join(windows, texts):
    """The text of a page from those of its Windows."""
    whole = ""
    for window, text in zip(windows, texts, strict=True):
        text = text.strip()
        if text:
            whole += (window.before if whole else "") + text
    return whole
