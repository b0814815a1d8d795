"""
Whole pages rendered on the fly: headings, paragraphs, lists, tables and charts in one to three columns, with headers, footers
and page numbers, from 64 px up, clean or as scanned, annotated in OmniDocBench's schema; and charts with a question. (SynthDoc
has the small pages of words on which the nano model begins.)

Page i is a function of (the arguments, i) alone, in three steps: content -> blocks, set_page -> FullPage, render -> PIL "L" image.
The content does not depend on the size of the page: one text can be read at several resolutions. The splits are SynthDoc's.
Sentences are words of the list in Zipf's odds among function words, numbers and punctuation; between them stand sentences of
prose, in train any, in heldout each on one of the first hundred pages. Held-out prose is short (19,000 characters in Python
3.11, a little different in other versions): the rest of a held-out page is like English in its letters and lengths, but none.
"""
import html
import json
import math
import random
import re
import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from nanochat.common import stable_hash
from nanochat.conversation import Task, ocr_conversation
from tasks.damage import damage_image, parse_damage
from tasks.omnidocbench import NO_SPACE, page_truth
from tasks.synthdoc import (FACES, MIN_PX, NUMBER_SHARE, PROSE_SHARE, RANDOM_SHARE, SPLITS, Box, Page, PageFull, advance, font, font_folder,
                            held_out_words, line_height, on_paper, print_line, prose, random_string, ranked, text_width, train_words,
                            wrap)

BOLD = {"serif": "serif-bold", "sans": "sans-bold", "sans-oblique": "sans-bold", "stix": "stix-bold"}  # for titles
FUNCTION_WORDS = "the the the of of and and to to in in a is for with on by as at from it was that are or be".split()
FUNCTION_SHARE = 0.3
PARTS = {"paragraph": 10, "heading": 3, "list": 2, "table": 1, "figure": 1}  # odds of what comes next on a page
TEXT = {"paragraph": 10, "heading": 2, "list": 1}  # odds on pages of text alone
COLUMN_PX, FIGURE_PX = 160, 100  # of a page's width for every column; least width of a figure
TITLE, HEADING, SMALL = 1.6, 1.2, 0.8  # print over that of the text; SMALL are tables, headers and footers
SLACK = 20  # characters by which a page may stay under its length: a list's marker, the longest word and a blank line
DEAL = 100  # held-out pages over which the held-out prose is dealt out
LONGEST_WORD = 30  # letters, in a person's own text
COLOURS = ((20, 60, 130), (245, 170, 60), (60, 130, 60), (240, 215, 90), (150, 100, 190), (220, 70, 60))
FOX_PAGES = {600: 7, 700: 28, 800: 28, 900: 14, 1000: 11, 1100: 8, 1200: 4}  # text tokens, of 100 more in a bucket: pages
CHARS_PER_TOKEN = 4.5  # of English text, about

# -----------------------------------------------------------------------------
# Text

held_out_list = lru_cache(None)(lambda: sorted(held_out_words()))
prose_sentences = lru_cache(None)(lambda held_out: [s.split() for s in dict.fromkeys(re.split(r"(?<=\.) ", " ".join(prose(held_out))))])


def draw_words(rng, split, low, high, own=()):
    """low to high words of the split, or of `own`, a person's text, the first with a capital: a heading, a label, a cell."""
    if split == "random_chars":
        return [random_string(rng) for _ in range(rng.randint(low, high))]
    own = own or split == "heldout_words" and held_out_list()
    words = [rng.choice(own) if own else ranked(rng, train_words()) for _ in range(rng.randint(low, high))]
    return [words[0][0].upper() + words[0][1:], *words[1:]]


def draw_number(rng):
    n = rng.randrange(10 ** rng.randint(1, 4))
    return rng.choice((f"{n}", f"{n:,}", f"{n / 10:.1f}", f"{n % 100}%", f"${n}", f"{1900 + n % 130}", f"{n % 24}:{n % 60:02}"))


def draw_sentence(rng, split):
    words = draw_words(rng, split, 5, 18)
    for k in range(len(words) if split != "random_chars" else 0):
        u = rng.random()
        if split == "train" and u < RANDOM_SHARE:
            words[k] = random_string(rng)
        elif split != "heldout_words" and u > 1 - FUNCTION_SHARE - NUMBER_SHARE and k:
            words[k] = draw_number(rng) if u > 1 - NUMBER_SHARE else rng.choice(FUNCTION_WORDS)
        words[k] += rng.choice("........?!") if k == len(words) - 1 else rng.choice(",,,;:") if rng.random() < 0.06 else ""
    return words


def read_paragraphs(paths, split, faces):
    """
    (paragraphs as lists of words, number left out) of a person's UTF-8 files, cut at blank lines, one in ten held out by its hash.
    Left out are those that cannot be printed as they are: with letters that a face lacks or words over LONGEST_WORD.
    """
    part = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        try:
            text = unicodedata.normalize("NFC", Path(path).read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"text file {path} is not UTF-8 ({error}): convert it, e.g. iconv -f latin1 -t utf-8") from error
        if not text.strip():
            raise ValueError(f"text file {path} is empty: leave it out")
        part += [" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if p.strip()]
    part = [p for p in dict.fromkeys(part) if split == ("train" if stable_hash(p) % 10 else "heldout")]
    lacking = {c for f in {*faces, *(BOLD.get(f, f) for f in faces)} for c in set("".join(part)) - {" "}
               if not any(ink := bytes(font(f, 20).getmask(c))) or ink == bytes(font(f, 20).getmask("\ufffe"))}  # which no face has
    kept = [p.split() for p in part if lacking.isdisjoint(p) and max(map(len, p.split())) <= LONGEST_WORD]
    if not kept:
        raise ValueError(f"text_files {paths} with {len(part)} paragraphs in split {split!r} (train, or heldout: one in ten; blank lines "
                         f"separate) have none to print: letters lacking {''.join(sorted(lacking))[:40]!r}, longest word {LONGEST_WORD}")
    return kept, len(part) - len(kept)


def draw_chart(rng, width, height, split):
    """-> (PIL "RGB" bar, line or pie chart, question, short answer in ChartQA's form). All values are printed, and differ."""
    kind, n, words = rng.choice(("bar", "line", "pie")), rng.randint(2, max(2, min(6, width // 50))), []
    while len(words) <= n:
        word, = draw_words(rng, split, 1, 1)
        words += [word] if len(word) <= max(5, min(8, width // 16)) and word not in words else []
    (name, *labels), year = words, rng.randrange(1950, 2020)
    if kind != "pie" and rng.random() < 0.4:
        labels = [str(year + k) for k in range(n)]
    unit, values = rng.choice((0.1, 1, 1, 10)), rng.sample(range(5, 100), n)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    px = max(MIN_PX, int(min(height / 14, width / n / 6.5) if kind != "pie" else min(height / (n + 4), width / 18)))

    def write(x, y, text, anchor):
        draw.text((round(x), round(y)), text, "black", font("sans", px), anchor, stroke_width=px // 9, stroke_fill="white")

    write(width / 2, px, name, "mm")
    left, top, bottom, start = 3.2 * px, 3.2 * px, height - 2 * px, -90
    slot, peak, side = (width - left) / n, 20 * math.ceil(max(values) / 20), min(height - 3 * px, width // 2 - px)
    points = [(left + slot * (k + 0.5), bottom - (bottom - top) * value / peak) for k, value in enumerate(values)]
    for k in range(5 * (kind != "pie")):
        y = round(bottom - (bottom - top) * k / 4)
        draw.line((left, y, width, y), (200, 200, 200))
        write(left - px / 3, y, f"{peak * unit * k / 4:g}", "rm")
    if kind == "line":
        draw.line(points, COLOURS[0], max(1, px // 6))
    for k, (label, value, (x, y)) in enumerate(zip(labels, values, points)):
        if kind == "pie":
            stop, y = start + 360 * value / sum(values), (2.2 + 1.3 * k) * px
            draw.pieslice((px // 2, 2 * px, px // 2 + side, 2 * px + side), start, stop, COLOURS[k], "white")
            draw.rectangle((side + px, round(y), side + 1.5 * px, round(y + px / 2)), COLOURS[k])
            write(side + 2 * px, y + px / 4, f"{label} {value * unit:g}", "lm")
            start = stop
            continue
        if kind == "bar":
            draw.rectangle((round(x - slot * 0.35), round(y), round(x + slot * 0.35), round(bottom)), COLOURS[0])
        write(x, y - px / 6, f"{value * unit:g}", "mb")
        write(x, bottom + px / 3, label, "mt")
    a, b = rng.sample(range(n), 2)
    return image, *rng.choice((
        (f"What is the value of {name} in {labels[a]}?", f"{values[a] * unit:g}"),
        (f"Which category has the highest value of {name}?", labels[values.index(max(values))]),
        (f"Which category has the lowest value of {name}?", labels[values.index(min(values))]),
        (f"What is the difference between {labels[a]} and {labels[b]} in {name}?", f"{abs(values[a] - values[b]) * unit:g}"),
        ("How many categories are there in the chart?", str(n))))


# -----------------------------------------------------------------------------
# Layout. A block is (kind, content, scale of the print, marker of a list item): content are words, of a table the rows of cells,
# of a figure (split, seed of its chart).


@dataclass
class FullPage(Page):
    """Here a Box's lines are (x, y, face, px, text), of a figure (x, y, split, width, seed); order is None for headers and the like."""
    columns: int = 1
    kinds: tuple = ("text", "table")  # of the boxes in the truth
    relations: list = field(default_factory=list)  # (j, k): box k goes on with box j's paragraph in the next column
    rules: list = field(default_factory=list)  # (left, top, right, bottom) of the lines of tables, px
    skew: float = 0.0  # radians, clockwise, by which damage turned the ink about the middle
    damaged: bool = False

    @property
    def truth(self):
        return page_truth(annotation(self), self.kinds)


def annotation(page, image_path="page.png", page_no=0):
    """The page as a row of OmniDocBench.json. A poly is where the ink of a box is on the picture, clockwise from the top left."""
    dets, x, y, cos, sin = [], page.width / 2, page.height / 2, math.cos(page.skew), math.sin(page.skew)
    for k, box in enumerate(page.boxes):
        left, top, right, bottom = box.bbox
        corners = ((left, top), (right, top), (right, bottom), (left, bottom))
        dets.append({"category_type": box.kind, "ignore": False, "order": None if box.order is None else box.order + 1, "anno_id": k,
                     "poly": [v for u, w in corners for v in (x + cos * (u - x) - sin * (w - y), y + sin * (u - x) + cos * (w - y))],
                     **({} if box.kind == "figure" else {"html" if box.kind == "table" else "text": box.text})})
    relations = [{"source_anno_id": j, "target_anno_id": k, "relation_type": "truncated"} for j, k in page.relations]
    attribute = {"data_source": "synthetic", "language": "english", "layout": ("single", "double", "three")[page.columns - 1] + "_column",
                 "special_issue": ["fuzzy_scan"] * page.damaged}
    return {"layout_dets": dets, "extra": {"relation": relations}, "page_info": {
        "page_no": page_no, "height": page.height, "width": page.width, "image_path": image_path, "page_attribute": attribute}}


def set_block(block, face, px, room, ruled=0):
    """[(height, lines, rules, text)] of what stays together, a line of text or a whole table, at (0, 0); None if wider than `room` px."""
    kind, content, scale, marker = block
    px = max(MIN_PX, round(px * scale))
    if kind == "figure":
        wide = min(room, 24 * px)
        return [(round(wide * 0.6), [(0, 0, content[0], wide, content[1])], [], "")] if wide >= FIGURE_PX else []
    if kind == "table":
        pad = max(2, px // 3)
        xs = [0, *accumulate(int(max(text_width(face, px, cell) for cell in column)) + 2 * pad for column in zip(*content))]
        ys = [k * (line_height(face, px) + pad) for k in range(len(content) + 1)]
        lines = [(x + pad, y + pad // 2 + 1, face, px, cell) for y, row in zip(ys, content) for x, cell in zip(xs, row)]
        rules = [(0, y, xs[-1] + 1, y + 1) for y in ([], ys[:2] + ys[-1:], ys)[ruled]]
        rules += [(x, 0, x + 1, ys[-1] + 1) for x in xs if ruled == 2]
        rows = ("".join(f"<td>{html.escape(cell, quote=False)}</td>" for cell in row) for row in content)
        text = "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"
        return [(ys[-1] + 1, lines, rules, text)] if xs[-1] < room else None
    face, hang = BOLD.get(face, face) if kind == "title" else face, int(text_width(face, px, marker))
    lines = wrap(content, [text_width(face, px, word) for word in content], advance(face, px, " "), room - hang, " ")
    texts = lines and [marker + lines[0], *lines[1:]]
    return texts and [(line_height(face, px), [(hang if k else 0, 0, face, px, text)], [], text) for k, text in enumerate(texts)]


def flow(page, blocks, spacing, ruled, left, top, right, bottom):
    """Fills the page's columns one after the other with the blocks; False if they do not fit the frame."""
    gutter, step = 2 * page.size_px, round(line_height(page.face, page.size_px) * spacing)
    width = (right - left - (page.columns - 1) * gutter) // page.columns
    column, y, first = 0, top, len(page.boxes)
    for block in blocks:
        room, goes_on = right - left if block[2] == TITLE else width, False  # a page's title goes over all columns
        rows = set_block(block, page.face, page.size_px, room, ruled)
        if rows is None:
            return False
        while rows:
            height, pitch, k = rows[0][0], round(rows[0][0] * spacing), len(page.boxes)
            keep = 2 * step if block[0] == "title" else 0  # a heading stands whole, with two lines under it
            n = max(0, min(len(rows), (bottom - keep - y - height) // pitch + 1))
            while 0 < n < len(rows) and (keep or NO_SPACE.match(rows[n - 1][3][-1])):  # page_truth would join "two-" and "fold"
                n -= 1
            if not n:
                column, y = column + 1, top
                if column == page.columns or room > width:
                    return False
                continue
            x, reach = left + column * (width + gutter), gutter // 4  # reach of ink out of its line
            text, end = " ".join(row[3] for row in rows[:n]), y + (n - 1) * pitch + height
            box = Box(block[0], text, k - first, (x - reach, y, x + room + reach, end))
            box.lines = [(x + dx, y + j * pitch + dy, *line) for j, row in enumerate(rows[:n]) for dx, dy, *line in row[1]]
            page.rules += [(x + l, y + t, x + r, y + b) for l, t, r, b in rows[0][2]]
            page.relations += [(k - 1, k)] * goes_on
            page.boxes.append(box)
            rows, goes_on, y = rows[n:], True, end
        y += step // 2
        top = y if block[2] == TITLE else top
    return True


def set_page(rng, blocks, notes, faces, columns, width, height, min_px):
    """
    A FullPage of the blocks in the first face in which they fit at min_px or else at MIN_PX, in print about as large as fits;
    PageFull if there is none. `notes`, [(kind, words)], are header, footer and page number in small print, left out in need.
    """
    spacing, ruled, number_on_top, margin = rng.uniform(1, 1.2), rng.randrange(3), rng.random() < 0.3, rng.uniform(0.02, 0.06)
    share, ink, paper = rng.uniform(0.92, 1), rng.randint(0, 60), rng.randint(225, 255)
    # about as many letters as would fill the same room; 20 for half a line, and a seventh is lost where lines break
    counts = (500 if kind == "figure" else scale ** 2 * (len(" ".join(map(str, content))) + 20) for kind, content, scale, _ in blocks)
    letters = 1.15 * sum(counts)
    for least, face in product((min_px, MIN_PX), faces):
        area = text_width(face, 64, " ".join(FUNCTION_WORDS)) / len(" ".join(FUNCTION_WORDS)) * line_height(face, 64) / 64 ** 2
        largest = share * min(math.sqrt(width * height * (1 - 2 * margin) ** 2 / letters / area / spacing), width / columns / 8, height / 4)
        for px, pitch, around in [(px, spacing, notes) for px in range(max(int(largest), least), least - 1, -1)] + [(least, 1, [])]:
            edge = max(math.ceil(margin * max(width, height)), px // 2)
            top, bottom, page = edge, height - edge, FullPage(width, height, [], face, px, ink, paper, columns)
            for kind, words in around:
                rows = set_block((kind, words, SMALL, ""), face, px, int(0.7 * (width - 2 * edge)))
                if not rows:
                    continue
                tall, [(_, _, _, small, text)], _, _ = rows[0]
                over, wide = kind == "header" or kind == "page_number" and number_on_top, int(text_width(face, small, text))
                x, y = width - edge - wide if kind == "page_number" else edge, edge if over else height - edge - tall
                top, bottom = edge + 3 * tall // 2 if over else top, bottom if over else height - edge - 3 * tall // 2
                page.boxes.append(Box(kind, text, None, (x - small // 2, y, x + wide + small // 2, y + tall), [(x, y, face, small, text)]))
            if flow(page, blocks, pitch, ruled, edge, top, width - edge, bottom):
                return page
    raise PageFull(f"{sum(len(word) + 1 for block in blocks if block[0] in ('title', 'text_block') for word in block[1])} characters in "
                   f"{columns} columns do not fit a page of {width}x{height} px at the smallest print, {MIN_PX} px: raise image_size, or "
                   "lower chars or columns")


def render(page):
    """PIL "L" image, width x height px."""
    mask = np.zeros((page.height, page.width), np.uint8)
    for left, top, right, bottom in page.rules:
        mask[top:bottom, left:right] = 255
    for box in page.boxes:
        for x, y, face, px, text in box.lines:
            if box.kind == "figure":
                chart = draw_chart(random.Random(text), px, box.bbox[3] - y, face)[0]
                mask[y:box.bbox[3], x:x + px] = 255 - np.asarray(chart.convert("L"))
            else:
                print_line(mask, x, y, face, px, text)
    return on_paper(page, mask)


# -----------------------------------------------------------------------------
# Tasks


class SynthPage(Task):
    """
    Page i as an OCR conversation, with extra keys chars (length of the truth), bucket, face, size_px, columns, split and page.

    image_size    px, one int for a square or (width, height), 64 and more
    chars         (low, high) of the number of characters besides tables, or [(low, high, bucket), ...], which pages take in turn
    columns       numbers of columns to draw from; a page has no more than fit at COLUMN_PX each
    parts         odds of paragraph, heading, list, table and figure (a chart, which is no part of the truth), as PARTS; a table
                  may have seven rows, which small pages have no room for
    kinds         of boxes in the truth, as in tasks/omnidocbench.py: "text" and "table"; headers, footers and numbers never count
    damage        0 to 1 or {kind: 0 to 1}, see tasks/damage.py; the truth stays
    min_px        smallest print: a text that does not fit at it is set in another face, and smaller, to MIN_PX, if it fits in none
    text_files    a person's own UTF-8 files instead of the built-in words; left_out counts paragraphs that could not be printed
    """

    def __init__(self, split, size, image_size=1024, chars=(500, 2500), columns=(1, 2, 3), parts=PARTS, kinds=("text", "table"), damage=0,
                 faces=tuple(BOLD), min_px=7, text_files=None, seed=0):
        self.width, self.height = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.chars = [(*chars, f"{chars[0]}-{chars[1]}")] if isinstance(chars[0], int) else chars
        self.columns = [n for n in (1, 2, 3) if n in columns and n * COLUMN_PX <= max(self.width, COLUMN_PX)]
        for good, message in (
                (split in SPLITS and size > 0, f"split {split!r}, size {size}: give one of {', '.join(SPLITS)}, and one page or more"),
                (min(self.width, self.height) >= 64, f"image_size {image_size}: give 64 px or more"),
                (self.columns, f"columns {columns}: give some of 1, 2, 3, and an image_size of {COLUMN_PX} px for each"),
                (all(SLACK <= low <= high for low, high, _ in self.chars), f"chars {chars}: give {SLACK} <= low <= high"),
                (set(parts) <= set(PARTS) and parts.get("paragraph"), f"parts {parts}: give odds of {', '.join(PARTS)}, the first over 0"),
                (kinds and set(kinds) <= {"text", "table"}, f"kinds {kinds}: give text, table or both"),
                (MIN_PX <= min_px, f"min_px {min_px}: give {MIN_PX} or more"),
                (faces and set(faces) <= set(FACES), f"faces {faces}: give some of {', '.join(FACES)}")):
            if not good:
                raise ValueError(message)
        font_folder()  # so that missing fonts are reported now and not in a worker
        self.split, self.size, self.seed, self.parts, self.faces, self.kinds = split, size, seed, parts, faces, tuple(kinds)
        self.min_px, self.damage = min_px, parse_damage(damage)
        self.own, self.left_out = read_paragraphs(text_files, split, faces) if text_files else ([], 0)
        self.own_words = [word for paragraph in self.own for word in paragraph]
        if self.own and sum(map(len, self.own_words)) < max(high for _, high, _ in self.chars):
            raise ValueError(f"text_files hold {sum(map(len, self.own_words))} characters of the split {split}, too few for one page of "
                             f"chars {chars}: give more text, or lower chars")

    def __len__(self):
        return self.size

    def paragraphs(self, rng, i):
        """Endless lists of words."""
        k, dealt = rng.randrange(len(self.own) or 1), prose_sentences(True)[i::DEAL] if self.split == "heldout" and i < DEAL else []
        while self.own:
            yield self.own[k % len(self.own)]
            k += 1
        while True:
            words = []
            for _ in range(rng.randint(2, 6)):
                if dealt and rng.random() < 0.5:
                    words += dealt.pop()
                else:
                    known = self.split == "train" and rng.random() < PROSE_SHARE
                    words += rng.choice(prose_sentences(False)) if known else draw_sentence(rng, self.split)
            yield words

    def content(self, i):
        """(blocks, notes, bucket) of page i; a note is (kind, words)."""
        rng, blocks, part = random.Random(f"synthpage/{self.split}/{self.seed}/{i}"), [], "paragraph"
        low, high, bucket = self.chars[i % len(self.chars)]
        room, paragraphs = rng.randint(min(low + SLACK, high), high) + 2, self.paragraphs(rng, i)

        def draw(low, high):
            return draw_words(rng, self.split, low, high, self.own_words)

        def add(kind, words, scale=1, marker=""):  # as many of the words as the page has room for; are these all?
            nonlocal room
            used = [*accumulate((len(word) + 1 for word in words), initial=1 + len(marker))]
            n = sum(u <= room for u in used) - 1
            if n > 0:
                blocks.append((kind, words[:n], scale, marker))
                room -= used[n]
            return n == len(words)

        whole = rng.random() < 0.5 or add("title", draw(2, 6 if room > 200 else 2), TITLE)
        while whole and room > SLACK:
            if part == "table":
                n = rng.randint(2, 4)
                rows = [draw(1, 1) + [draw_number(rng) if k else draw(1, 1)[0] for _ in range(n - 1)] for k in range(rng.randint(3, 7))]
                blocks.append(("table", rows, SMALL, ""))
            elif part == "figure":
                blocks.append(("figure", (self.split, rng.getrandbits(32)), 1, ""))
            elif part == "list":
                marker, n = rng.choice(("• ", "- ", "{}. ", "({}) ")), rng.randint(2, 6)
                whole = all(add("text_block", next(paragraphs)[:rng.randint(4, 20)], 1, marker.format(k + 1)) for k in range(n))
            else:
                if part == "heading":
                    add("title", [f"{rng.randint(1, 9)}.{rng.randint(1, 9)}"] * (rng.random() < 0.3) + draw(1, 5), HEADING)
                whole = add("text_block", next(paragraphs))
            some = sum(block[0] in ("table", "figure") for block in blocks) < 2
            part = rng.choices([*self.parts], [odds * (some or name not in ("table", "figure")) for name, odds in self.parts.items()])[0]
        notes = [("header", draw(2, 5)), ("footer", draw(2, 5)), ("page_number", [str(rng.randint(1, 999))])]
        return blocks, [note for note in notes if rng.random() < 0.5], bucket

    def __getitem__(self, i):
        self.check_index(i)
        (blocks, notes, bucket), id = self.content(i), f"synthpage/{self.split}/{self.seed}/{i}"
        rng = random.Random(f"{id}/layout")
        faces, columns = rng.sample(self.faces, len(self.faces)), rng.choice(self.columns)
        page = set_page(rng, blocks, notes, faces, columns, self.width, self.height, self.min_px)
        image, page.kinds, page.damaged = render(page), self.kinds, any(self.damage.values())
        image, page.skew = damage_image(image, self.damage, stable_hash(id), page.size_px)
        return ocr_conversation(image, page.truth, id, chars=len(page.truth), bucket=bucket, face=page.face, size_px=page.size_px,
                                columns=columns, split=self.split, page=page)


class SynthChart(SynthPage):
    """Chart i with a question as the user's text and a short answer as the assistant's. Only split, size, image_size and seed matter."""

    def __init__(self, split, size, image_size=512, seed=0):
        super().__init__(split, size, image_size, seed=seed)

    def __getitem__(self, i):
        self.check_index(i)
        id = f"synthchart/{self.split}/{self.seed}/{i}"
        image, question, answer = draw_chart(random.Random(id), self.width, self.height, self.split)
        return ocr_conversation(image, answer, id, prompt=f"\n{question}", split=self.split)


def fox_like(size_px=1024, damage=0):
    """
    100 dense held-out pages, fixed by seed, in the buckets of the paper's study of compression on Fox's English pages: 600-700 to
    1200-1300 text tokens, at 4.5 characters a token 2,700-3,149 to 5,400-5,849 characters. One or two columns, no tables.
    A twentieth of the text is prose, the rest is sentence-like (see the top of this file).
    """
    chars = [(int(n * CHARS_PER_TOKEN), int((n + 100) * CHARS_PER_TOKEN) - 1, f"{n}-{n + 100}") for n, pages in FOX_PAGES.items()
             for _ in range(pages)]
    random.Random("fox").shuffle(chars)  # so that any first few pages are of all buckets
    return SynthPage("heldout", 100, size_px, chars, columns=(1, 2), parts=TEXT, damage=damage, seed="fox")


def omnidocbench_like(size_px=1024, damage=0):
    """100 held-out pages of mixed layouts, fixed by seed: all of PARTS, one to three columns, 500 to 3,500 characters."""
    return SynthPage("heldout", 100, size_px, (500, 3500), damage=damage, seed="omnidocbench")


def write_folder(task, folder):
    """The pages of a SynthPage as a new folder of OmniDocBench.json and images/, which tasks/omnidocbench.py reads."""
    images, rows = Path(folder) / "images", []
    images.mkdir(parents=True)
    for i, conversation in enumerate(task):
        conversation["images"][0].save(images / f"{i:05}.png")
        rows.append(annotation(conversation["page"], f"{i:05}.png", i))
    (Path(folder) / "OmniDocBench.json").write_text(json.dumps(rows), encoding="utf-8")
