"""
Small pages of words rendered on the fly, with exact truth in reading order: nothing to download,
and no two runs differ. (SynthPage has whole pages with columns, tables and charts.)

Page i of a split depends on (the arguments, i) and on nothing else, in three steps:
    choose_words -> lay_out -> scan       words -> Page of Boxes -> PIL image

The splits are those of words.py: train, heldout, heldout_words and random_chars.
"""
import math
import random
from functools import lru_cache

from nanochat.conversation import Task, ocr_conversation
from tasks.damage import parse_damage, skew_margin
from tasks.fonts import FACES, MIN_PX, font_folder, line_height, overhang, text_width
from tasks.page import Box, Line, Page, PageFull, page_size, scan, wrap
from tasks.words import (
    NUMBER_SHARE,
    PROSE_SHARE,
    RANDOM_SHARE,
    SPLITS,
    held_out_list,
    held_out_words,
    letters,
    prose,
    random_string,
    ranked,
    train_words,
)

# Of the words of pages without prose, except random_chars.
CAPITAL_SHARE = 0.08
PUNCTUATION_SHARE = 0.08

# The grid of a primer page, (columns, rows) in characters: as many as a nano page has later.
PRIMER_GRID = (8, 4)
PRIMER_FACE = "mono"
PRIMER_FREEDOM = 0.1  # a page drawn less free than this is a primer page
PRIMER_PART = 0.25  # of a curriculum: primer pages alone

TITLE_SCALE = 1.4  # print size of a title over that of the text
MIN_CHARS = 10  # a page must have room for any word of the list (9 letters and a comma)
MARGIN = 1  # px of paper kept on every side of a clean page

# -----------------------------------------------------------------------------
# Words


def prose_from_anywhere(rng, held_out):
    """Yields the words of the prose from a random place on, without end."""
    words = prose(held_out)
    i = rng.randrange(len(words))
    while True:
        yield words[i % len(words)]
        i += 1


def listed_words(rng, split):
    """Yields words of the list, and except in heldout_words numbers, without end."""
    only_held_out = split == "heldout_words"
    while True:
        # No numbers among the held-out words: training has numbers too.
        if not only_held_out and rng.random() < NUMBER_SHARE:
            word = str(rng.randrange(10, 10 ** rng.randint(2, 4)))
        else:
            word = rng.choice(held_out_list()) if only_held_out else ranked(rng, train_words())
            if rng.random() < CAPITAL_SHARE:
                word = word.capitalize()
        if rng.random() < PUNCTUATION_SHARE:
            word += rng.choice(",.")
        yield word


def word_source(rng, split):
    """Yields the words of one page without end."""
    # A page is either prose or words of the list, not both.
    if split == "random_chars":
        while True:
            yield random_string(rng)
    elif split in ("train", "heldout") and rng.random() < PROSE_SHARE:
        yield from prose_from_anywhere(rng, held_out=split == "heldout")
    else:
        yield from listed_words(rng, split)


def choose_words(rng, split, n_chars, random_share):
    """list of words: n_chars characters or a little fewer, counting the spaces between them."""
    words = []
    used = 0  # characters, with a space after every word
    for word in word_source(rng, split):
        if rng.random() < random_share:
            word = random_string(rng)
        if used + len(word) <= n_chars:
            words.append(word)
            used += len(word) + 1
        elif words:  # a first word that is too long is skipped: no page is empty
            return words


# -----------------------------------------------------------------------------
# Layout. A block is (kind, words, scale of the print).


def estimate_px(blocks, face, width, height, joiner, min_px):
    """About the largest print size in px at which the blocks fit width x height px."""
    # Measured once, at a print of 1 px: widths grow almost in proportion to the print size.
    space = text_width(face, 64, joiner) / 64
    pitch = line_height(face, 64) / 64
    between = (len(blocks) > 1) / 2  # half a line after every block
    widths = []
    for _, words, _ in blocks:
        widths.append([text_width(face, 64, word) / 64 for word in words])

    def fits(px):
        total = 0
        for (_, words, scale), word_widths in zip(blocks, widths):
            limit = width / (px * scale) - 2 * overhang(face)  # in em, as the widths are
            lines = wrap(words, word_widths, space, limit, joiner)
            if lines is None:
                return False
            total += pitch * px * scale * (len(lines) + between)
        return total <= height

    # Bisection. Whether min_px does fit is found out when the page is set.
    low = min_px
    high = max(min_px + 1, height)
    while high - low > 1:
        px = (low + high) // 2
        if fits(px):
            low = px
        else:
            high = px
    return low


def stack_blocks(blocks, face, px, spacing, width, height, joiner):
    """list of Boxes one under the other from (0, 0), None if they do not fit width x height px."""
    boxes = []
    bottom = 0
    for kind, words, scale in blocks:
        size = round(px * scale)
        pad = math.ceil(size * overhang(face))  # on both sides, so that ink stays in its box
        widths = [text_width(face, size, word) for word in words]
        space = text_width(face, size, joiner)
        texts = wrap(words, widths, space, width - 2 * pad, joiner)
        if texts is None:
            return None

        line_px = line_height(face, size)
        top = bottom
        if boxes:
            top += line_px // 2  # between title and text
        lines = []
        y = top
        for text in texts:
            lines.append(Line(pad, y, face, size, text))
            bottom = y + line_px
            y += round(line_px * spacing)
        widest = max(text_width(face, size, text) for text in texts)
        bbox = (0, top, math.ceil(widest) + 2 * pad, bottom)
        boxes.append(Box(kind, joiner.join(words), len(boxes), bbox, lines))
    return boxes if bottom <= height else None


def stack_shrinking(blocks, face, px, spacing, width, height, joiner, min_px):
    """(Boxes, px) in the largest print from px down to min_px that fits, or (None, min_px)."""
    boxes = stack_blocks(blocks, face, px, spacing, width, height, joiner)
    if boxes is None:  # px is an estimate: if it is a little too large, closer lines may be enough
        boxes = stack_blocks(blocks, face, px, 1, width, height, joiner)
    while boxes is None and px > min_px:
        px -= 1
        boxes = stack_blocks(blocks, face, px, 1, width, height, joiner)
    return boxes, px


def lay_out(rng, blocks, face, width, height, freedom=1.0, min_px=MIN_PX, margin=MARGIN,
            primer_columns=PRIMER_GRID[0]):
    """
    A Page of `blocks`, or None if they do not fit in print of min_px. Size (as large as fits times
    0.9 to 1), line spacing, position, ink and paper are drawn. No word is split or cut.

    freedom < 1 is for curricula: face, size, spacing and position are drawn nearer to those of a
    primer page of `primer_columns`, and lines may break inside words. margin: px of paper kept on
    every side.
    """
    room_x = width - 2 * margin
    room_y = height - 2 * margin
    joiner = " "
    if rng.random() >= freedom:
        face = PRIMER_FACE
    if rng.random() >= freedom:
        # Every letter is a "word", so that a line may break anywhere, as on a primer page.
        blocks = [(kind, " ".join(words), scale) for kind, words, scale in blocks]
        joiner = ""

    largest = estimate_px(blocks, face, room_x, room_y, joiner, min_px)
    # The geometric mean of the sizes of a primer page and a free one, weighted by freedom.
    primer = min(largest, primer_px(width, primer_columns))
    free = largest * rng.uniform(0.9, 1)
    px = round(primer ** (1 - freedom) * free ** freedom)
    px = max(min_px, px)
    # Lines further apart than print of that size needs: up to 15 %.
    spacing = rng.uniform(1, 1 + 0.15 * freedom)

    boxes, px = stack_shrinking(blocks, face, px, spacing, room_x, room_y, joiner, min_px)
    if boxes is None:
        return None

    # Less free pages begin nearer to the top left corner, where every primer page does.
    free_x = room_x - max(box.bbox[2] for box in boxes)
    free_y = room_y - boxes[-1].bbox[3]
    x = margin + rng.randint(0, int(free_x * freedom))
    y = margin + rng.randint(0, int(free_y * freedom))
    for box in boxes:
        left, top, right, bottom = box.bbox
        box.bbox = (left + x, top + y, right + x, bottom + y)
        box.lines = [line.moved(x, y) for line in box.lines]
    ink = rng.randint(0, 60)
    paper = rng.randint(225, 255)
    return Page(width, height, boxes, face, px, ink, paper)


@lru_cache(None)
def primer_px(width, columns):
    """Print size in px at which so many letters of PRIMER_FACE fill the width of a page."""
    px = round(width / columns / 0.602)  # a letter advances by 0.602 em
    # ... and by whole px, so that a row can be wider than that.
    while px > 1 and text_width(PRIMER_FACE, px, "x" * columns) > width:
        px -= 1
    return px


def primer_text(words, grid):
    """As much of the words as a grid of (columns, rows) holds; the last one may be cut."""
    columns, rows = grid
    text = " ".join(words)
    cut = text[:columns * rows].rstrip()
    shown = letters(cut)
    # "otherwise", cut short, must not show "other" if that is a word which training never shows.
    if shown and shown[-1] != letters(text)[len(shown) - 1] and shown[-1] in held_out_words():
        cut = cut[:-1]
    return cut


def lay_out_primer(rng, words, width, height, grid=PRIMER_GRID):
    """
    A page of a curriculum's beginning: large print of one monospaced face that fills a fixed grid,
    words broken where a row ends. The n-th character always stands in the same place, so that the
    decoder need not find it first: reading takes off sooner (FINDINGS.md, leads).
    """
    columns, rows = grid
    text = primer_text(words, grid)
    px = primer_px(width, columns)
    pitch = height // rows
    lines = []
    # No margin and no overhang: the grid matters here, not whether an edge of a letter is cut off.
    for start in range(0, len(text), columns):
        row = text[start:start + columns]
        lines.append(Line(0, len(lines) * pitch, PRIMER_FACE, px, row))
    box = Box("text_block", text, 0, (0, 0, width, len(lines) * pitch), lines)
    ink = rng.randint(0, 60)
    paper = rng.randint(225, 255)
    return Page(width, height, [box], PRIMER_FACE, px, ink, paper)


# -----------------------------------------------------------------------------
# Task


class SynthDoc(Task):
    """
    Page i as an OCR conversation, with labels of its glyphs and extra keys chars (length of the
    truth), face, size_px, split and page.

    size          number of pages; costs nothing, a training run may ask for as many as it likes
    image_size    px, one int for a square or (width, height)
    chars         (low, high) of the number of characters, drawn uniformly; or [(low, high, weight),
                  ...], a mixture
    random_share  of the words replaced by random strings; None is RANDOM_SHARE in train and 0
                  elsewhere
    ramp          curriculum over the first `ramp` pages: primer pages (large print filling a fixed
                  grid), then layouts that grow freer in face, size and position page by page.
                  Earlier kinds stay in the mix: a sudden change first disturbs what was learned
    primer        [(columns, rows), ...], the grids of primer pages. They come in one after the
                  other. A page that is not yet free has print size and length from one of them
    faces         names from FACES; None is all of them
    min_px        smallest print: a text that does not fit in its face at this size is set in
                  another face, and smaller only if it fits in none
    titles        share of the pages that open with a title of one to three words in larger print
    damage        of a scanner, 0 to 1 or {kind: 0 to 1}, see tasks/damage.py. Primer pages stay
                  clean: they fill their page to the edge, and are there to be easy
    """


    def __init__(self, split, size, image_size=128, chars=(24, 48), random_share=None, seed=0,
                 ramp=0, faces=None, min_px=MIN_PX, titles=0.0, damage=0, primer=(PRIMER_GRID,)):
        self.split = split
        self.size = size
        self.width, self.height = page_size(image_size)
        self.chars = list(chars)
        if isinstance(chars[0], int):
            low, high = chars
            self.chars = [(low, high, 1)]
        # Only training pages have random strings, unless they are asked for.
        self.random_share = random_share
        if random_share is None:
            self.random_share = RANDOM_SHARE if split == "train" else 0.0
        self.seed = seed
        self.ramp = ramp
        self.faces = list(FACES) if faces is None else list(faces)
        self.min_px = min_px
        self.titles = titles
        self.damage = parse_damage(damage)
        self.primer = [tuple(grid) for grid in primer]
        self.check_arguments()
        font_folder()  # so that missing fonts are reported now and not in a worker

    def check_arguments(self):
        if self.split not in SPLITS:
            raise ValueError(f"unknown split {self.split!r}: choose one of {', '.join(SPLITS)}")
        if not self.faces or not set(self.faces) <= set(FACES):
            raise ValueError(f"unknown or no faces {self.faces}: choose from {', '.join(FACES)}")
        for low, high, weight in self.chars:
            if not MIN_CHARS <= low <= high or weight < 0:
                raise ValueError(
                    f"chars has ({low}, {high}, weight {weight}): "
                    f"give {MIN_CHARS} <= low <= high and weight >= 0"
                )
        if min(self.width, self.height) < 32:
            raise ValueError(
                f"image_size {self.width}x{self.height} px is under 32 px: raise image_size"
            )
        if not (0 <= self.random_share <= 1 and 0 <= self.titles <= 1):
            raise ValueError(
                f"random_share {self.random_share} and titles {self.titles} are shares: give 0 to 1"
            )
        if self.size < 1 or self.ramp < 0:
            raise ValueError(
                f"size {self.size} and ramp {self.ramp} count pages: give size >= 1 and ramp >= 0"
            )
        for columns, rows in self.primer:
            if min(columns, rows) < 1 or primer_px(self.width, columns) < MIN_PX:
                raise ValueError(
                    f"primer has a grid of {columns}x{rows} characters, in print of "
                    f"{primer_px(self.width, max(1, columns))} px: give 1 row or more, and columns "
                    f"wide enough for print of {MIN_PX} px"
                )
        if not MIN_PX <= self.min_px <= self.height:
            raise ValueError(
                f"min_px {self.min_px} is no print size for this page: "
                f"give {MIN_PX} to {self.height}"
            )

    def __len__(self):
        return self.size

    def page_id(self, i):
        """What all draws of page i are seeded with, and the conversation's id."""
        return f"synthdoc/{self.split}/{self.seed}/{i}"

    def freedom(self, rng, i):
        """
        How free the layout of page i is, 0 to 1. A curriculum begins with primer pages alone (0);
        then pages are drawn from 0 up to a limit that grows to 1, at first evenly, towards the end
        near the limit.
        """
        if not self.ramp:
            return 1.0
        progress = max(0.0, (i / self.ramp - PRIMER_PART) / (1 - PRIMER_PART))
        if progress >= 1:
            return 1.0
        # The power goes from 1 (even odds) to 0 (all at the limit).
        return progress * rng.random() ** (1 - progress)

    def grid(self, i):
        """The primer grid of page i: any of those that have come in by then."""
        progress = i / self.ramp / PRIMER_PART if self.ramp else 0.0
        known = min(len(self.primer), 1 + int(progress * len(self.primer)))
        # A generator of its own: pages of one grid are the same with and without this draw.
        return random.Random(f"{self.page_id(i)}/grid").choice(self.primer[:known])

    def blocks(self, i):
        """(rng, freedom, blocks) of page i: what it says, and the generator for its layout."""
        self.check_index(i)
        rng = random.Random(self.page_id(i))
        # From here on the order of the draws is fixed: published figures are for these pages.
        weights = [weight for _, _, weight in self.chars]
        low, high, _ = rng.choices(self.chars, weights)[0]
        freedom = self.freedom(rng, i)
        n_chars = rng.randint(low, high)
        # Less free pages go towards as many characters as a primer page holds.
        columns, rows = self.grid(i)
        full = columns * rows
        if freedom < PRIMER_FREEDOM:
            n_chars = full + MIN_CHARS  # a word more: the page is to be full
        elif freedom < 1:
            n_chars = round((1 - freedom) * full + freedom * n_chars)
        words = choose_words(rng, self.split, n_chars, self.random_share)

        # Titles only once the curriculum is over: a primer page has one size of print.
        wants_title = rng.random() < self.titles
        if not (wants_title and len(words) >= 4 and freedom == 1):
            return rng, freedom, [("text_block", words, 1)]
        k = rng.randint(1, 3)
        title = ("title", words[:k], TITLE_SCALE)
        text = ("text_block", words[k:], 1)
        return rng, freedom, [title, text]

    def truth(self, i):
        """The text of page i, without laying it out."""
        _, freedom, blocks = self.blocks(i)
        texts = []
        for _, words, _ in blocks:
            # A primer page is cut off where its grid is full.
            is_primer = freedom < PRIMER_FREEDOM
            texts.append(primer_text(words, self.grid(i)) if is_primer else " ".join(words))
        return "\n\n".join(texts)

    def lay_out(self, rng, blocks, freedom, primer_columns):
        """A Page of the blocks in the first face in which they fit at min_px, or else at MIN_PX."""
        # Skew must not turn ink out of the page. A clean page has the plain margin.
        margin = MARGIN + skew_margin(self.damage, self.width, self.height)
        faces = rng.sample(self.faces, len(self.faces))
        # Another face before smaller print: faces differ in width by half.
        for min_px in (self.min_px, MIN_PX):
            for face in faces:
                page = lay_out(rng, blocks, face, self.width, self.height, freedom, min_px, margin,
                               primer_columns)
                if page is not None:
                    return page
        n_chars = sum(len(" ".join(words)) for _, words, _ in blocks)
        raise PageFull(
            f"{n_chars} characters do not fit a page of {self.width}x{self.height} px at the "
            f"smallest print, {MIN_PX} px, in any of {', '.join(faces)}: "
            "raise image_size or lower chars"
        )

    def __getitem__(self, i):
        rng, freedom, blocks = self.blocks(i)
        page_id = self.page_id(i)
        # rng goes on from the words to the layout: both are drawn from one seed.
        if freedom < PRIMER_FREEDOM:
            _, words, _ = blocks[0]
            page = lay_out_primer(rng, words, self.width, self.height, self.grid(i))
            image, glyphs = scan(page, {}, page_id)
        else:
            page = self.lay_out(rng, blocks, freedom, primer_columns=self.grid(i)[0])
            image, glyphs = scan(page, self.damage, page_id)
        truth = page.truth
        return ocr_conversation(
            image,
            truth,
            page_id,
            labels=[{"glyphs": glyphs}],
            chars=len(truth),
            face=page.face,
            size_px=page.size_px,
            split=self.split,
            page=page,
        )


def text_stream(split="train", n_chars=2_000_000, seed=0, chars=(100, 400)):
    """Yields texts of pages, about n_chars characters in all, to train the tokenizer on."""
    # A seed of its own: the tokenizer must not be fitted to the very pages that are trained on.
    task = SynthDoc(split, size=n_chars, chars=chars, seed=f"text/{seed}")
    i = 0
    done = 0  # characters
    while done < n_chars:
        text = task.truth(i)
        yield text
        done += len(text)
        i += 1
