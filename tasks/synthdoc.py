"""
Pages rendered on the fly with PIL, with exact truth in reading order: nothing to download, and no two runs differ.

Page i of a split is a function of (the arguments, i) and nothing else, in three steps:
    choose_words -> lay_out -> render        words -> Page of Boxes -> PIL image
A page is a list of boxes, each with a kind (named as in OmniDocBench), text, place in the reading order and ink box.

    train          words of the list and prose, some of them replaced by random strings
    heldout        other pages of the same kinds of words and of prose from held-out topics, no random strings
    heldout_words  only words that no training text contains: there is nothing to recall, they have to be read
    random_chars   only random letters and digits: no language prior helps at all

Words: words.txt (licence in words.LICENSE). Prose: the topics of Python's own help, which differ a little from one
Python version to the next; so the held-out words are chosen by hash alone and are the same everywhere.
"""

import importlib.util
import math
import os
import random
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pydoc_data.topics import topics

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nanochat.common import stable_hash
from nanochat.conversation import Task, ocr_conversation

SPLITS = ("train", "heldout", "heldout_words", "random_chars")
FACES = {  # all from matplotlib's wheel
    "sans": "DejaVuSans.ttf",
    "sans-bold": "DejaVuSans-Bold.ttf",
    "sans-oblique": "DejaVuSans-Oblique.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif-bold": "DejaVuSerif-Bold.ttf",
    "mono": "DejaVuSansMono.ttf",
    "stix": "STIXGeneral.ttf",
    "stix-bold": "STIXGeneralBol.ttf",
}
ALPHANUMERIC = "abcdefghijklmnopqrstuvwxyz0123456789"
RANDOM_SHARE = 0.15  # of the training words: with none the model guesses words instead of reading letters
PROSE_SHARE = 0.2  # of the pages
NUMBER_SHARE = CAPITAL_SHARE = PUNCTUATION_SHARE = 0.08  # of the words of the other pages, except random_chars
ZIPF_OFFSET = 20
PRIMER_FACE, PRIMER_COLUMNS, PRIMER_ROWS = "mono", 8, 4
PRIMER_FREEDOM = 0.1  # a page drawn less free than this is a primer page
PRIMER_PART = 0.25  # of a curriculum: primer pages alone
TITLE_SCALE = 1.4  # print size of a title over that of the text
MIN_PX = 5  # smallest print; below it letters fall together
MIN_CHARS = 10  # a page must have room for any word of the list (9 letters and a comma)
MARGIN = 1  # px of paper kept on every side
OVERHANG, OVERHANG_OBLIQUE = 1 / 10, 1 / 6  # of the print size: how far ink reaches out of a line's width on either side, at most

# -----------------------------------------------------------------------------
# Words


def letters(text):
    """The words of a text as the splits see them: its runs of letters, in lower case."""
    return re.findall("[a-z]+", text.lower())


@lru_cache(None)
def word_list():
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "words.txt"), encoding="ascii") as f:
        return tuple(f.read().split())


@lru_cache(None)
def held_out_words():
    """frozenset of a tenth of the list. No short words: "able" and "ment" are syllables that BPE may well merge."""
    return frozenset(w for w in word_list() if len(w) >= 5 and stable_hash(w) % 10 == 0)


@lru_cache(None)
def train_words():
    """In the order of their rank: which words are common is settled by hash."""
    return tuple(sorted((w for w in word_list() if w not in held_out_words()), key=stable_hash))


def ranked(rng, words):
    """A word of rank r with odds 1 / (r + 20), Zipf's law without its peak: a third of what is drawn are the first hundred words."""
    return words[int(ZIPF_OFFSET * ((len(words) / ZIPF_OFFSET + 1) ** rng.random() - 1))]


@lru_cache(None)
def prose(held_out):
    """
    tuple of words: the plain sentences of the held-out tenth of the topics (True) or of the rest (False), run together.
    Code, tables, long words and held-out words cut a paragraph, and pieces of fewer than 8 words are dropped. Topics
    quote each other, so the training part drops every paragraph that a held-out topic has too.
    """
    plain = re.compile(r"[A-Za-z]+(?:[-'][A-Za-z]+)*[.,;:]?|[0-9]{1,4}[.,]?")
    words, skip = [], set() if held_out else set(paragraphs(True))
    for paragraph in dict.fromkeys(paragraphs(held_out)):
        piece = []
        for word in [] if paragraph in skip else paragraph.split() + [""]:
            if plain.fullmatch(word) and len(word) <= 12 and held_out_words().isdisjoint(letters(word)):
                piece.append(word)
            else:
                words += piece if len(piece) >= 8 else []
                piece = []
    return tuple(words)


def paragraphs(held_out):
    """list of one-line paragraphs without markup, from the topics of one part."""
    part = [topics[name] for name in sorted(topics) if (stable_hash(name) % 10 == 0) == held_out]
    markup = re.compile(r'["*`]|\(\)|(?<!\S)\(|\)(?!\w)')
    return [" ".join(markup.sub("", p).split()) for text in part for p in re.split(r"\n\s*\n", text)]


def random_string(rng):
    """2 to 8 letters and digits that spell no held-out word."""
    while True:
        s = "".join(rng.choices(ALPHANUMERIC, k=rng.randint(2, 8)))
        if held_out_words().isdisjoint(letters(s)):
            return s


def word_source(rng, split):
    """Endless words for one page."""
    if split in ("train", "heldout") and rng.random() < PROSE_SHARE:
        words = prose(split == "heldout")
        i = rng.randrange(len(words))
        while True:
            yield words[i % len(words)]
            i += 1
    while split == "random_chars":
        yield random_string(rng)
    words = sorted(held_out_words()) if split == "heldout_words" else train_words()
    while True:
        if split != "heldout_words" and rng.random() < NUMBER_SHARE:
            word = str(rng.randrange(10, 10 ** rng.randint(2, 4)))
        else:
            word = rng.choice(words) if split == "heldout_words" else ranked(rng, words)
            word = word.capitalize() if rng.random() < CAPITAL_SHARE else word
        yield word + rng.choice(",.") if rng.random() < PUNCTUATION_SHARE else word


def choose_words(rng, split, n_chars, random_share):
    """list of words, n_chars or a little fewer with the spaces: it ends before the first word that would go over."""
    words, used = [], 0
    for word in word_source(rng, split):
        if rng.random() < random_share:
            word = random_string(rng)
        if used + len(word) <= n_chars:
            words.append(word)
            used += len(word) + 1
        elif words:
            return words


# -----------------------------------------------------------------------------
# Layout


class PageFull(ValueError):
    """The words do not fit the page."""


@dataclass
class Box:
    kind: str  # OmniDocBench's category_type: text_block, title
    text: str
    order: int  # place in the reading order, from 0
    bbox: tuple = None  # (left, top, right, bottom) in px, right and bottom exclusive; its ink, once rendered
    lines: list = field(default_factory=list)  # (x, y, px, text) of every printed line


@dataclass
class Page:
    width: int  # px
    height: int
    boxes: list
    face: str
    size_px: int  # print size of the text
    ink: int = 0  # grey levels
    paper: int = 255

    @property
    def truth(self):
        return "\n\n".join(box.text for box in sorted(self.boxes, key=lambda box: box.order))


@lru_cache(None)
def font_folder():
    spec = importlib.util.find_spec("matplotlib")  # found, not imported: that would take a second
    if spec is None:
        raise ModuleNotFoundError("SynthDoc prints with matplotlib's fonts, which are not here: pip install matplotlib")
    return os.path.join(spec.submodule_search_locations[0], "mpl-data", "fonts", "ttf")


@lru_cache(512)
def font(face, px):
    path = os.path.join(font_folder(), FACES[face])
    if not os.path.exists(path):
        raise FileNotFoundError(f"no font file {path}: reinstall matplotlib, or leave {face!r} out of faces")
    return ImageFont.truetype(path, px, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(None)
def advance(face, px, char):
    return font(face, px).getlength(char)


def text_width(face, px, text):
    """Width in px without kerning: asking the font for whole words loads every letter again, and costs half a page."""
    return sum(advance(face, px, char) for char in text)


@lru_cache(None)
def overhang(face):
    return OVERHANG_OBLIQUE if "oblique" in face else OVERHANG


@lru_cache(None)
def line_height(face, px):
    return sum(font(face, px).getmetrics())  # ascent + descent


def wrap(words, widths, space, limit, joiner):
    """Greedy lines of at most `limit` px as a list of strings; None if a word is wider than that."""
    lines, used = [], limit
    for word, width in zip(words, widths):
        if width > limit:
            return None
        if used + space + width > limit:
            lines.append([word])
            used = width
        else:
            lines[-1].append(word)
            used += space + width
    return [joiner.join(line) for line in lines]


def estimate_px(blocks, face, width, height, joiner, min_px):
    """About the largest print size in px at which the blocks fit width x height (px): bisection on widths at 64 px."""
    widths = [[text_width(face, 64, word) / 64 for word in words] for _, words, _ in blocks]
    space, pitch = text_width(face, 64, joiner) / 64, line_height(face, 64) / 64
    low, high = min_px, max(min_px + 1, height)  # low fits or will be found not to, high does not
    while high - low > 1:
        px = (low + high) // 2
        tall = 0
        for (_, words, scale), ws in zip(blocks, widths):
            lines = wrap(words, ws, space, width / (px * scale) - 2 * overhang(face), joiner)
            tall += math.inf if lines is None else pitch * px * scale * (len(lines) + (len(blocks) > 1) / 2)
        low, high = (px, high) if tall <= height else (low, px)
    return low


def stack_blocks(blocks, face, px, spacing, width, height, joiner):
    """Boxes one under the other from (0, 0): (boxes, width, height) of their print, px, or None if they do not fit."""
    boxes, right, y = [], 0, 0
    for kind, words, scale in blocks:
        size = round(px * scale)
        pad = math.ceil(size * overhang(face))
        widths = [text_width(face, size, word) for word in words]
        lines = wrap(words, widths, text_width(face, size, joiner), width - 2 * pad, joiner)
        if lines is None:
            return None
        y += line_height(face, size) // 2 if boxes else 0
        pitch = round(line_height(face, size) * spacing)
        box = Box(kind, joiner.join(words), len(boxes))
        box.lines = [(pad, y + k * pitch, size, line) for k, line in enumerate(lines)]
        box.bbox = (0, y, math.ceil(max(text_width(face, size, line) for line in lines)) + 2 * pad,
                    y + (len(lines) - 1) * pitch + line_height(face, size))
        right, y = max(right, box.bbox[2]), box.bbox[3]
        boxes.append(box)
    return (boxes, right, y) if y <= height else None


def lay_out(rng, blocks, face, width, height, freedom=1.0, min_px=MIN_PX):
    """
    A Page of `blocks`, a list of (kind, words, scale of the print). Size (as large as fits times 0.9 to 1), line
    spacing, position, ink and paper are drawn. No word is split or cut; PageFull if print of min_px does not fit.
    freedom < 1 is for curricula: face, size, spacing and position are drawn nearer to a primer's, and lines may break
    inside words.
    """
    w, h = width - 2 * MARGIN, height - 2 * MARGIN
    joiner = " "
    if rng.random() >= freedom:
        face = PRIMER_FACE
    if rng.random() >= freedom:  # every letter is a "word"
        blocks, joiner = [(kind, " ".join(words), scale) for kind, words, scale in blocks], ""
    largest = estimate_px(blocks, face, w, h, joiner, min_px)
    px = min(largest, primer_px(width)) ** (1 - freedom) * (largest * rng.uniform(0.9, 1)) ** freedom
    px = max(min_px, round(px))
    spacing = rng.uniform(1, 1 + 0.15 * freedom)
    placed = stack_blocks(blocks, face, px, spacing, w, h, joiner)
    while placed is None and px >= min_px:
        placed = stack_blocks(blocks, face, px, 1, w, h, joiner)
        px -= placed is None
    if placed is None:
        n_chars = sum(len(" ".join(words)) for _, words, _ in blocks)
        raise PageFull(f"{n_chars} characters in {face} do not fit a page of {width}x{height} px at the smallest "
                         f"print, {min_px} px: raise image_size or lower chars")
    boxes, right, bottom = placed
    x, y = (MARGIN + rng.randint(0, int(room * freedom)) for room in (w - right, h - bottom))
    for box in boxes:
        left, top, right, bottom = box.bbox
        box.bbox = (left + x, top + y, right + x, bottom + y)
        box.lines = [(lx + x, ly + y, size, text) for lx, ly, size, text in box.lines]
    return Page(width, height, boxes, face, px, ink=rng.randint(0, 60), paper=rng.randint(225, 255))


def primer_px(width):
    """Print size in px at which PRIMER_COLUMNS letters of PRIMER_FACE fill a page's width: they advance by 0.602 em."""
    return round(width / PRIMER_COLUMNS / 0.602)


def lay_out_primer(rng, words, width, height):
    """
    A page of a curriculum's beginning: large print of one monospaced face that fills a fixed grid, words broken where a row
    ends. The n-th character always stands in the same place, which the decoder then need not find first: reading takes off sooner
    (FINDINGS.md, leads).
    """
    text = " ".join(words)[:PRIMER_COLUMNS * PRIMER_ROWS].rstrip()
    px, pitch = primer_px(width), height // PRIMER_ROWS
    rows = [text[k:k + PRIMER_COLUMNS] for k in range(0, len(text), PRIMER_COLUMNS)]
    box = Box("text_block", text, 0, (0, 0, width, pitch * len(rows)))
    box.lines = [(0, k * pitch, px, row) for k, row in enumerate(rows)]
    return Page(width, height, [box], PRIMER_FACE, px, ink=rng.randint(0, 60), paper=rng.randint(225, 255))


# -----------------------------------------------------------------------------
# Rendering


@lru_cache(1 << 15)
def glyph(face, px, char):
    """(advance, left, top, uint8 ink) of a letter: pasting it costs a fifth of having the font draw it again."""
    left, top, right, bottom = font(face, px).getbbox(char)
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), char, 255, font(face, px))
    return int(advance(face, px, char)), left, top, np.asarray(image)


def print_line(mask, x, y, face, px, text):
    """Prints a line of text at (x, y) into `mask`, a uint8 array of ink; what would reach out of it is cut off."""
    for char in text:
        step, left, top, ink = glyph(face, px, char)
        if char != " ":
            u, v = max(0, x + left), max(0, y + top)
            there = mask[v:y + top + ink.shape[0], u:x + left + ink.shape[1]]
            np.maximum(there, ink[v - y - top:, u - x - left:][:there.shape[0], :there.shape[1]], out=there)
        x += step


def on_paper(page, mask):
    """PIL "L" image of the ink; every bbox is tightened from the room of its box to its ink."""
    image = Image.fromarray(mask)
    for box in page.boxes:
        left, top = max(0, box.bbox[0]), box.bbox[1]
        l, t, r, b = image.crop((left, top, *box.bbox[2:])).getbbox()
        box.bbox = (left + l, top + t, left + r, top + b)
    return image.point([page.paper + (page.ink - page.paper) * v // 255 for v in range(256)])


def render(page):
    """PIL "L" image, width x height px, of a page."""
    mask = np.zeros((page.height, page.width), np.uint8)
    for box in page.boxes:
        for x, y, px, text in box.lines:
            print_line(mask, x, y, page.face, px, text)
    return on_paper(page, mask)


# -----------------------------------------------------------------------------
# Task


class SynthDoc(Task):
    """
    Page i as an OCR conversation, with extra keys chars (length of the truth), face, size_px, split and page.

    size          number of pages; costs nothing, a training run may ask for as many as it likes
    image_size    px, one int for a square or (width, height)
    chars         (low, high) of the number of characters, drawn uniformly; or [(low, high, weight), ...], a mixture
    random_share  of the words replaced by random strings; None is RANDOM_SHARE in train and 0 elsewhere
    ramp          curriculum over the first `ramp` pages: primer pages (large print filling a fixed grid), then layouts
                  that grow freer in face, size and position page by page. Earlier kinds stay in the mix: a sudden change
                  first disturbs what was learned
    faces         names from FACES; None is all of them
    min_px        smallest print: a text that does not fit in its face at this size is set in another face, and smaller only
                  if it fits in none
    titles        share of the pages that open with a title of one to three words in larger print
    """

    def __init__(self, split, size, image_size=128, chars=(24, 48), random_share=None, seed=0, ramp=0, faces=None,
                 min_px=MIN_PX, titles=0.0):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        faces = list(FACES) if faces is None else list(faces)
        if not faces or not set(faces) <= set(FACES):
            raise ValueError(f"unknown or no faces {faces}: choose from {', '.join(FACES)}")
        self.chars = [(*chars, 1)] if isinstance(chars[0], int) else list(chars)
        for low, high, weight in self.chars:
            if not MIN_CHARS <= low <= high or weight < 0:
                raise ValueError(f"chars has ({low}, {high}, weight {weight}): "
                                 f"give {MIN_CHARS} <= low <= high and weight >= 0")
        self.width, self.height = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(self.width, self.height) < 32:
            raise ValueError(f"image_size {self.width}x{self.height} px is under 32 px: raise image_size")
        self.random_share = (RANDOM_SHARE if split == "train" else 0.0) if random_share is None else random_share
        if not (0 <= self.random_share <= 1 and 0 <= titles <= 1):
            raise ValueError(f"random_share {self.random_share} and titles {titles} are shares: give 0 to 1")
        if size < 1 or ramp < 0:
            raise ValueError(f"size {size} and ramp {ramp} count pages: give size >= 1 and ramp >= 0")
        if not MIN_PX <= min_px <= self.height:
            raise ValueError(f"min_px {min_px} is no size of print on this page: give {MIN_PX} to {self.height}")
        font_folder()  # so that missing fonts are reported now and not in a worker
        self.split, self.size, self.seed, self.ramp, self.faces, self.titles = split, size, seed, ramp, faces, titles
        self.min_px = min_px

    def __len__(self):
        return self.size

    def freedom(self, rng, i):
        """
        How free the layout of page i is, 0 to 1. A curriculum begins with primer pages alone (0); then pages are drawn from
        0 up to a limit that grows to 1, at first evenly, towards the end near the limit.
        """
        progress = max(0.0, (i / self.ramp - PRIMER_PART) / (1 - PRIMER_PART)) if self.ramp else 1.0
        return progress * rng.random() ** (1 - progress) if progress < 1 else 1.0

    def blocks(self, i):
        """(rng, freedom, blocks) of page i; a block is (kind, words, scale of the print); rng goes on to the layout."""
        self.check_index(i)
        rng = random.Random(f"synthdoc/{self.split}/{self.seed}/{i}")
        low, high, _ = rng.choices(self.chars, [weight for _, _, weight in self.chars])[0]
        freedom = self.freedom(rng, i)
        n_chars = rng.randint(low, high)
        if freedom < 1:  # towards as many as a primer page holds, and a word more where it must be full
            full = PRIMER_COLUMNS * PRIMER_ROWS
            n_chars = full + MIN_CHARS if freedom < PRIMER_FREEDOM else round((1 - freedom) * full + freedom * n_chars)
        words = choose_words(rng, self.split, n_chars, self.random_share)
        blocks = [("text_block", words, 1)]
        if rng.random() < self.titles and len(words) >= 4 and freedom == 1:
            k = rng.randint(1, 3)
            blocks = [("title", words[:k], TITLE_SCALE), ("text_block", words[k:], 1)]
        return rng, freedom, blocks

    def text(self, i):
        """The text of page i, without laying it out."""
        return "\n\n".join(" ".join(words) for _, words, _ in self.blocks(i)[2])

    def lay_out(self, rng, blocks, freedom):
        faces = rng.sample(self.faces, len(self.faces))
        tries = [(face, px) for px in (self.min_px, MIN_PX) for face in faces]
        for face, px in tries:
            try:
                return lay_out(rng, blocks, face, self.width, self.height, freedom, px)
            except PageFull:
                if (face, px) == tries[-1]:
                    raise

    def __getitem__(self, i):
        rng, freedom, blocks = self.blocks(i)
        if freedom < PRIMER_FREEDOM:
            page = lay_out_primer(rng, blocks[0][1], self.width, self.height)
        else:
            page = self.lay_out(rng, blocks, freedom)
        image = render(page)
        return ocr_conversation(image, page.truth, f"synthdoc/{self.split}/{self.seed}/{i}", chars=len(page.truth),
                                face=page.face, size_px=page.size_px, split=self.split, page=page)


def text_stream(split="train", n_chars=2_000_000, seed=0, chars=(100, 400)):
    """Texts of a split's pages, about n_chars characters in all, without drawing them: food for the tokenizer."""
    task = SynthDoc(split, size=n_chars, chars=chars, seed=f"text/{seed}")  # a seed no page that is read ever has
    i = done = 0
    while done < n_chars:
        text = task.text(i)
        yield text
        done += len(text)
        i += 1
