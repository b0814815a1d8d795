"""
From the blocks of a whole page to a laid-out Page: text, tables and figures flow through one to
three columns, with header, footer and page number around them.
"""
import html
import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tasks.fonts import BOLD, MIN_PX, advances, line_height, text_width
from tasks.omnidocbench import NO_SPACE
from tasks.page import Box, Figure, Line, Page, PageFull, wrap
from tasks.words import FUNCTION_WORDS

# Print size over that of the text.
TITLE = 1.6
HEADING = 1.2
SMALL = 0.8  # tables, headers, footers and page numbers
FIGURE_PX = 100  # least width of a figure


class Block(NamedTuple):
    """One part of a page's content, before it has a place."""

    kind: str  # title, text_block, table or figure; of a note header, footer or page_number
    content: object  # words; rows of cells of a table; (split, seed) of a figure's chart
    scale: float = 1  # print size over that of the text
    marker: str = ""  # of a list item, "2. "

    @property
    def spans_columns(self):
        """Whether it goes over all columns, as the title of a page does."""
        return self.scale == TITLE


# -----------------------------------------------------------------------------
# Setting one block


@dataclass
class Piece:
    """What a column break does not cut, at (0, 0): a line of text, a table or a figure."""

    height: int  # px
    text: str  # of the truth
    lines: list = field(default_factory=list)  # of Line
    rules: list = field(default_factory=list)  # (left, top, right, bottom)
    figure: Figure = None


def set_text(block, face, px, room):
    """A Piece for every line: a column break may come after any of them."""
    if block.kind == "title":
        face = BOLD.get(face, face)
    # The lines of a list item are indented by its marker.
    indent = int(text_width(face, px, block.marker))
    widths = [text_width(face, px, word) for word in block.content]
    texts = wrap(block.content, widths, advances(face, px)[" "], room - indent)
    if texts is None:
        return None
    height = line_height(face, px)
    first = block.marker + texts[0]
    pieces = [Piece(height, first, [Line(0, 0, face, px, first)])]
    for text in texts[1:]:
        pieces.append(Piece(height, text, [Line(indent, 0, face, px, text)]))
    return pieces


def table_rules(xs, ys, ruling):
    """Lines 1 px wide at the column edges `xs` and row edges `ys`: (left, top, right, bottom)."""
    if ruling == "none":
        return []
    right = xs[-1] + 1
    bottom = ys[-1] + 1
    if ruling == "rows":  # around the head and at the foot
        ys = [ys[0], ys[1], ys[-1]]
        xs = []
    rows = [(0, y, right, y + 1) for y in ys]
    columns = [(x, 0, x + 1, bottom) for x in xs]
    return rows + columns


def table_html(rows):
    """As OmniDocBench's annotators write tables, without attributes."""
    text = ""
    for row in rows:
        cells = [f"<td>{html.escape(cell, quote=False)}</td>" for cell in row]
        text += f"<tr>{''.join(cells)}</tr>"
    return f"<table>{text}</table>"


def set_table(rows, face, px, room, ruling):
    """One Piece, every column as wide as its widest cell."""
    pad = max(2, px // 3)  # px around the text of a cell
    xs = [0]  # left edges of the columns, and the right edge of the last
    for column in zip(*rows):
        widest = max(text_width(face, px, cell) for cell in column)
        xs.append(xs[-1] + int(widest) + 2 * pad)
    row_height = line_height(face, px) + pad
    ys = [k * row_height for k in range(len(rows) + 1)]
    if xs[-1] >= room:  # a cell is never wrapped
        return None

    lines = []
    for y, row in zip(ys, rows):
        for x, cell in zip(xs, row):
            lines.append(Line(x + pad, y + pad // 2 + 1, face, px, cell))
    height = ys[-1] + 1
    rules = table_rules(xs, ys, ruling)
    return [Piece(height, table_html(rows), lines, rules)]


def set_figure(content, px, room):
    width = min(room, 24 * px)  # its print grows with that of the text
    if width < FIGURE_PX:
        return []  # left out: its print could not be read
    height = round(width * 0.6)
    split, seed = content
    return [Piece(height, "", figure=Figure(0, 0, width, height, split, seed))]


def set_block(block, face, px, room, ruling="none"):
    """
    list of Pieces of a block in a column `room` px wide, none where a figure is left out; None if
    it does not fit. px is the print size of the page's text.
    """
    px = max(MIN_PX, round(px * block.scale))
    if block.kind == "figure":
        return set_figure(block.content, px, room)
    if block.kind == "table":
        return set_table(block.content, face, px, room, ruling)
    return set_text(block, face, px, room)


# -----------------------------------------------------------------------------
# Filling a page


@dataclass
class Style:
    """What is drawn once for a page, whatever its face and print size become."""

    spacing: float  # of lines, over their height
    ruling: str  # of tables
    number_on_top: bool
    margin: float  # share of the longer side left blank at every edge
    fill: float  # print size over the largest that is expected to fit
    ink: int  # gray levels
    paper: int


def draw_style(rng):
    return Style(
        spacing=rng.uniform(1, 1.2),
        ruling=("none", "rows", "grid")[rng.randrange(3)],
        number_on_top=rng.random() < 0.3,
        margin=rng.uniform(0.02, 0.06),
        fill=rng.uniform(0.92, 1),
        ink=rng.randint(0, 60),
        paper=rng.randint(225, 255),
    )


@dataclass
class Frame:
    """The part of a page that its columns fill, px."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self):
        return self.right - self.left


class Columns:
    """Columns of a page that are filled one after the other, from the top of the first."""

    def __init__(self, page, frame, style, spacing):
        self.page = page
        self.frame = frame
        self.ruling = style.ruling
        self.spacing = spacing
        self.line_step = round(line_height(page.face, page.size_px) * spacing)
        self.gutter = 2 * page.size_px
        self.width = (frame.width - (page.columns - 1) * self.gutter) // page.columns
        self.first = len(page.boxes)  # the boxes before this one are notes
        # Where the next piece goes, and where a column begins: under a title over all columns.
        self.column = 0
        self.y = frame.top
        self.top = frame.top

    def add(self, block):
        """Puts a block on the page, in as many columns as it takes; False if it does not fit."""
        room = self.frame.width if block.spans_columns else self.width
        pieces = set_block(block, self.page.face, self.page.size_px, room, self.ruling)
        if pieces is None:
            return False

        continues = False  # a paragraph that was begun in the column before
        while pieces:
            n = self.count_fitting(block, pieces)
            if n == 0:
                self.column += 1
                self.y = self.top
                # A title over all columns has to fit where it is: nothing is above it.
                if self.column == self.page.columns or block.spans_columns:
                    return False
                continue
            self.place(block.kind, pieces[:n], room, continues)
            pieces = pieces[n:]
            continues = True

        self.y += self.line_step // 2  # half a line between blocks
        if block.spans_columns:
            self.top = self.y
        return True

    def count_fitting(self, block, pieces):
        """How many of the pieces go into the rest of this column."""
        height = pieces[0].height
        room = self.frame.bottom - self.y - height
        if block.kind == "title":
            room -= 2 * self.line_step  # for two lines of text under it
        n = room // round(height * self.spacing) + 1
        if n >= len(pieces):
            return len(pieces)
        if block.kind == "title":
            return 0  # a heading is not cut
        # No column ends in a hyphen: page_truth would join "two-" and "fold" without a space.
        while n > 0 and NO_SPACE.match(pieces[n - 1].text[-1]):
            n -= 1
        return max(0, n)

    def place(self, kind, pieces, room, continues):
        """Adds a box of `pieces`, whose room is `room` px wide, and moves on below it."""
        page = self.page
        x = self.frame.left + self.column * (self.width + self.gutter)
        height = pieces[0].height
        pitch = round(height * self.spacing)
        bottom = self.y + (len(pieces) - 1) * pitch + height
        reach = self.gutter // 4  # of ink out of its line
        bbox = (x - reach, self.y, x + room + reach, bottom)
        text = " ".join(piece.text for piece in pieces)
        number = len(page.boxes)
        box = Box(kind, text, number - self.first, bbox)

        y = self.y
        for piece in pieces:
            for line in piece.lines:
                box.lines.append(line.moved(x, y))
            for left, top, right, down in piece.rules:
                page.rules.append((x + left, y + top, x + right, y + down))
            if piece.figure:
                box.figure = replace(piece.figure, x=x, y=y)
            y += pitch
        if continues:  # the truth joins the two
            page.relations.append((number - 1, number))
        page.boxes.append(box)
        self.y = bottom


def add_notes(page, notes, style):
    """
    Puts header, footer and page number on the page, in small print.

    notes: Blocks. -> the Frame that is left between them.
    """
    # Margins are over 2 % of the longer side: skew moves no ink further than that.
    edge = math.ceil(style.margin * max(page.width, page.height))
    edge = max(edge, page.size_px // 2)
    frame = Frame(edge, edge, page.width - edge, page.height - edge)
    # Edges of the paper's margin; the frame's own top and bottom move as notes are added.
    right = frame.right
    bottom = frame.bottom
    room = int(0.7 * frame.width)
    for note in notes:
        pieces = set_block(note, page.face, page.size_px, room)
        if pieces is None:
            continue
        height = pieces[0].height
        text = pieces[0].text  # the first line; a note is not wrapped
        px = pieces[0].lines[0].px
        width = int(text_width(page.face, px, text))

        is_number = note.kind == "page_number"
        on_top = note.kind == "header" or (is_number and style.number_on_top)
        x = right - width if is_number else edge
        y = edge if on_top else bottom - height
        # Half a line of room between a note and the text.
        if on_top:
            frame.top = edge + 3 * height // 2
        else:
            frame.bottom = bottom - 3 * height // 2
        reach = px // 2
        bbox = (x - reach, y, x + width + reach, y + height)
        line = Line(x, y, page.face, px, text)
        page.boxes.append(Box(note.kind, text, None, bbox, [line]))
    return frame


# -----------------------------------------------------------------------------
# The print size


def estimated_letters(block):
    """About as many letters of the text's print as would fill the room of the block."""
    if block.kind == "figure":
        return 500
    # For a table the brackets, quotes and commas of its rows stand for the room around its cells.
    text = " ".join(str(part) for part in block.content)
    # 20 for the part of its last line that stays empty.
    return block.scale ** 2 * (len(text) + 20)


def largest_px(blocks, face, columns, width, height, style):
    """About the largest print size in px, a float, at which the blocks fit."""
    # About a seventh of the room is lost where lines break.
    letters = 1.15 * sum(estimated_letters(block) for block in blocks)
    # The area of a letter at a print of 1 px, measured on common words at 64 px.
    sample = " ".join(FUNCTION_WORDS)
    letter_width = text_width(face, 64, sample) / len(sample)
    letter_area = letter_width * line_height(face, 64) / 64 ** 2
    page_area = width * height * (1 - 2 * style.margin) ** 2
    by_area = math.sqrt(page_area / letters / letter_area / style.spacing)
    # However little there is to say: 8 em to a column, and four lines to a page.
    return style.fill * min(by_area, width / columns / 8, height / 4)


def attempts(blocks, notes, faces, columns, width, height, min_px, style):
    """Yields (face, px, line spacing, notes) in the order in which a page is tried."""
    for smallest in (min_px, MIN_PX):
        for face in faces:
            largest = int(largest_px(blocks, face, columns, width, height, style))
            for px in range(max(largest, smallest), smallest - 1, -1):
                yield face, px, style.spacing, notes
            # Before the next face, closer and without notes.
            yield face, smallest, 1, []


def set_page(rng, blocks, notes, faces, columns, width, height, min_px):
    """
    A Page of the blocks in the first face in which they fit at min_px or else at MIN_PX, in print
    about as large as fits; PageFull if there is none. The notes are left out where room is short.
    """
    # Drawn once, so that how a page looks does not depend on how many sizes were tried.
    style = draw_style(rng)
    tries = attempts(blocks, notes, faces, columns, width, height, min_px, style)
    for face, px, spacing, notes_tried in tries:
        page = Page(width, height, [], face, px, style.ink, style.paper, columns)
        frame = add_notes(page, notes_tried, style)
        filled = Columns(page, frame, style, spacing)
        if all(filled.add(block) for block in blocks):
            return page

    n_chars = 0
    for block in blocks:
        if block.kind in ("title", "text_block"):  # what the argument chars counts
            n_chars += sum(len(word) + 1 for word in block.content)
    raise PageFull(
        f"{n_chars} characters in {columns} columns do not fit a page of {width}x{height} px at "
        f"the smallest print, {MIN_PX} px: raise image_size, or lower chars or columns"
    )
