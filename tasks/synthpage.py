"""
Whole pages rendered on the fly: headings, paragraphs, lists, tables and charts in one to three
columns, with headers, footers and page numbers, from 64 px up, clean or as scanned, annotated in
OmniDocBench's schema; and charts with a question. (SynthDoc has the small pages of words on which
the nano model begins.)

Page i depends on (the arguments, i) alone: PageWriter draws its blocks, layout.set_page places
them, page.scan prints them. The content does not depend on the size of the page, so that one text
can be read at several resolutions.

The splits are those of words.py. Sentences are words of the list in Zipf's odds among function
words, numbers and punctuation; between them stand sentences of prose: in train any, in heldout each
on one of the first hundred pages. Held-out prose is short (19,000 characters in Python 3.11, a
little different in other versions): the rest of a held-out page is like English in its letters and
lengths only.
"""
import hashlib
import json
import random
from pathlib import Path

from nanochat.conversation import Task, ocr_conversation
from tasks.charts import draw_chart
from tasks.damage import parse_damage
from tasks.fonts import BOLD, FACES, MIN_PX, font_folder, lacks
from tasks.layout import HEADING, SMALL, TITLE, Block, set_page
from tasks.page import annotation, page_size, scan
from tasks.words import (
    PROSE_SHARE,
    SPLITS,
    draw_number,
    draw_sentence,
    draw_words,
    prose_sentences,
    read_paragraphs,
)

# Odds of what comes next on a page: on mixed pages, and on pages of text alone.
PARTS = {"paragraph": 10, "heading": 3, "list": 2, "table": 1, "figure": 1}
TEXT = {"paragraph": 10, "heading": 2, "list": 1}
FLOATS = ("table", "figure")  # parts that take room but no characters
MAX_FLOATS = 2  # on a page
COLUMN_PX = 160  # of a page's width for every column, or lines would hold two or three words
# Characters by which a page may be short: a list's marker, the longest word and a blank line.
SLACK = 20
DEAL = 100  # held-out pages over which the held-out prose is dealt out
LONGEST_WORD = 30  # letters, in a user's own text

# -----------------------------------------------------------------------------
# Content


def read_own_text(paths, split, faces):
    """
    (paragraphs as lists of words, number left out) of a user's UTF-8 files. Left out are those that
    cannot be printed as they are: with letters that a face lacks, or with words over LONGEST_WORD.
    """
    texts = read_paragraphs(paths, split)
    # Titles are set in the bold face, which may lack letters that the plain one has.
    used_faces = set(faces) | {BOLD.get(face, face) for face in faces}
    lacking = set()
    for char in set("".join(texts)) - {" "}:
        if any(lacks(face, char) for face in used_faces):
            lacking.add(char)

    # A longer word could be wider than a column, and words are never split.
    kept = []
    for text in texts:
        words = text.split()
        if lacking.isdisjoint(text) and max(map(len, words)) <= LONGEST_WORD:
            kept.append(words)
    if not kept:
        raise ValueError(
            f"text_files {paths} with {len(texts)} paragraphs in split {split!r} (train, or "
            "heldout: one in ten; blank lines separate them) have none that can be printed: "
            "letters lacking "
            f"{''.join(sorted(lacking))[:40]!r}, longest word {LONGEST_WORD}"
        )
    return kept, len(texts) - len(kept)


class PageWriter:
    """
    Draws the blocks of one page until its text has about n_chars characters.

    paragraphs: endless lists of words; own_words: those of a user's text, empty for the built-in
    ones.
    """

    def __init__(self, rng, split, n_chars, paragraphs, own_words):
        self.rng = rng
        self.split = split
        # Characters left. + 2: every block counts the blank line after it, but the last has none.
        self.room = n_chars + 2
        self.paragraphs = paragraphs
        self.own_words = own_words
        self.blocks = []

    def words(self, low, high):
        return draw_words(self.rng, self.split, low, high, self.own_words)

    def write(self, parts):
        """-> list of Blocks; parts: odds by name, as PARTS."""
        go_on = True  # until text has to be cut
        if self.rng.random() >= 0.5:  # the other half of the pages has no title
            # A long title over a short text would take the whole page.
            longest = 6 if self.room > 200 else 2
            go_on = self.add("title", self.words(2, longest), TITLE)
        part = "paragraph"
        while go_on and self.room > SLACK:
            go_on = self.add_part(part)
            part = self.next_part(parts)
        return self.blocks

    def next_part(self, parts):
        # Tables and figures do not use up n_chars, so that their number needs a limit of its own.
        n_floats = sum(block.kind in FLOATS for block in self.blocks)
        odds = []
        for name in parts:
            allowed = name not in FLOATS or n_floats < MAX_FLOATS
            odds.append(parts[name] if allowed else 0)
        return self.rng.choices(list(parts), odds)[0]

    def add_part(self, part):
        """Adds a part of the page; False once text had to be cut, which fills the page."""
        if part == "table":
            self.blocks.append(Block("table", self.table_rows(), SMALL))
            return True
        if part == "figure":
            # The seed of a chart, which is drawn once its size is known.
            self.blocks.append(Block("figure", (self.split, self.rng.getrandbits(32))))
            return True
        if part == "list":
            return self.add_list()
        # A heading is always followed by a paragraph.
        if part == "heading":
            self.add_heading()
        return self.add("text_block", next(self.paragraphs))

    def add(self, kind, words, scale=1, marker=""):
        """Adds as many of the words as the page has room for; -> whether these are all."""
        # A space or newline after every word, and one newline more after the last.
        used = 1 + len(marker)
        n = 0
        for word in words:
            if used + len(word) + 1 > self.room:
                break
            used += len(word) + 1
            n += 1
        if n > 0:
            self.blocks.append(Block(kind, words[:n], scale, marker))
            self.room -= used
        return n == len(words)

    def add_list(self):
        marker = self.rng.choice(("• ", "- ", "{}. ", "({}) "))
        n_items = self.rng.randint(2, 6)
        for k in range(n_items):
            paragraph = next(self.paragraphs)
            # The beginning of a paragraph: items are short.
            words = paragraph[:self.rng.randint(4, 20)]
            if not self.add("text_block", words, marker=marker.format(k + 1)):
                return False
        return True

    def add_heading(self):
        # Drawn even where it is not used: fixed evaluation sets depend on the order of these draws.
        chapter = self.rng.randint(1, 9)
        section = self.rng.randint(1, 9)
        is_numbered = self.rng.random() < 0.3
        words = self.words(1, 5)
        if is_numbered:
            words = [f"{chapter}.{section}", *words]
        self.add("title", words, HEADING)

    def table_rows(self):
        """3 to 7 rows of 2 to 4 cells: words in the first column and row, numbers elsewhere."""
        n_columns = self.rng.randint(2, 4)
        rows = []
        for k in range(self.rng.randint(3, 7)):
            row = self.words(1, 1)
            for _ in range(n_columns - 1):
                if k == 0:  # the head
                    row += self.words(1, 1)
                else:
                    row.append(draw_number(self.rng))
            rows.append(row)
        return rows

    def notes(self):
        """list of Blocks: header, footer and page number, each on half of the pages."""
        header = Block("header", self.words(2, 5), SMALL)
        footer = Block("footer", self.words(2, 5), SMALL)
        number = Block("page_number", [str(self.rng.randint(1, 999))], SMALL)
        return [note for note in (header, footer, number) if self.rng.random() < 0.5]


# -----------------------------------------------------------------------------
# Tasks


class SynthPage(Task):
    """
    Page i as an OCR conversation, with labels of its glyphs and extra keys chars (length of the
    truth), bucket, face, size_px, columns, split and page.

    image_size    px, one int for a square or (width, height), 64 and more
    chars         (low, high) of the number of characters besides tables, or [(low, high, bucket),
                  ...], which pages take in turn
    columns       numbers of columns to draw from; a page has no more than fit at COLUMN_PX each
    parts         odds of paragraph, heading, list, table and figure (a chart, which is no part of
                  the truth), as PARTS; a table may have seven rows, for which small pages have no
                  room
    kinds         of boxes in the truth, as in tasks/omnidocbench.py: "text" and "table"; headers,
                  footers and page numbers never count
    damage        of a scanner, 0 to 1 or {kind: 0 to 1}, see tasks/damage.py; the truth stays
    min_px        smallest print: a text that does not fit at it is set in another face, and
                  smaller, down to MIN_PX, if it fits in none
    text_files    a user's own UTF-8 files instead of the built-in words; `left_out` counts
                  paragraphs that could not be printed
    """


    def __init__(self, split, size, image_size=1024, chars=(500, 2500), columns=(1, 2, 3),
                 parts=PARTS, kinds=("text", "table"), damage=0, faces=tuple(BOLD), min_px=7,
                 text_files=None, seed=0):
        self.split = split
        self.size = size
        self.width, self.height = page_size(image_size)
        self.chars = chars
        if isinstance(chars[0], int):
            low, high = chars
            self.chars = [(low, high, f"{low}-{high}")]
        # One column always fits, and no page gets more than it is wide enough for.
        self.columns = []
        for n in (1, 2, 3):
            if n in columns and (n == 1 or n * COLUMN_PX <= self.width):
                self.columns.append(n)
        self.parts = parts
        self.kinds = tuple(kinds)
        self.damage = parse_damage(damage)
        self.faces = faces
        self.min_px = min_px
        self.seed = seed
        self.check_arguments(image_size, columns)
        font_folder()  # so that missing fonts are reported now and not in a worker

        self.own = []
        self.left_out = 0
        if text_files:
            self.own, self.left_out = read_own_text(text_files, split, faces)
        self.own_words = [word for paragraph in self.own for word in paragraph]
        # A page that goes round the text more than once would repeat itself.
        n_letters = sum(map(len, self.own_words))
        longest_page = max(high for _, high, _ in self.chars)
        if self.own and n_letters < longest_page:
            raise ValueError(
                f"text_files hold {n_letters} characters of the split {split}, too few for one "
                f"page of chars {chars}: give more text, or lower chars"
            )

    def check_arguments(self, image_size, columns):
        def check(condition, message):
            if not condition:
                raise ValueError(message)

        check(self.split in SPLITS, f"split {self.split!r}: give one of {', '.join(SPLITS)}")
        check(self.size > 0, f"size {self.size}: give one page or more")
        check(min(self.width, self.height) >= 64, f"image_size {image_size}: give 64 px or more")
        check(
            self.columns,
            f"columns {columns}: give some of 1, 2, 3, and {COLUMN_PX} px of image_size for each",
        )
        for low, high, _ in self.chars:
            check(SLACK <= low <= high, f"chars ({low}, {high}): give {SLACK} <= low <= high")
        check(
            set(self.parts) <= set(PARTS) and self.parts.get("paragraph"),
            f"parts {self.parts}: give odds of {', '.join(PARTS)}, the first over 0",
        )
        check(
            self.kinds and set(self.kinds) <= {"text", "table"},
            f"kinds {self.kinds}: give text, table or both",
        )
        check(self.min_px >= MIN_PX, f"min_px {self.min_px}: give {MIN_PX} or more")
        check(
            self.faces and set(self.faces) <= set(FACES),
            f"faces {self.faces}: give some of {', '.join(FACES)}",
        )

    def __len__(self):
        return self.size

    def fingerprint(self):
        """Of a user's own text, which may be edited between two runs; all else are arguments."""
        if not self.own:
            return None
        state = hashlib.sha256(json.dumps(self.own).encode())
        return f"{len(self.own)} paragraphs, {state.hexdigest()[:16]}"

    def page_id(self, i):
        """What all draws of page i are seeded with, and the conversation's id."""
        return f"synthpage/{self.split}/{self.seed}/{i}"

    def paragraphs(self, rng, i):
        """Yields lists of words without end."""
        # Drawn even without own text: fixed evaluation sets depend on the order of these draws.
        start = rng.randrange(len(self.own) or 1)
        if self.own:
            yield from self.own_paragraphs(start)
        else:
            yield from self.made_paragraphs(rng, i)

    def own_paragraphs(self, start):
        """A user's text from paragraph `start` on, again and again."""
        while True:
            yield self.own[start % len(self.own)]
            start += 1

    def made_paragraphs(self, rng, i):
        """Paragraphs of the built-in words and prose, for page i."""
        # Held-out prose stands on one page each, or it would be the same few sentences everywhere.
        dealt = []
        if self.split == "heldout" and i < DEAL:
            dealt = prose_sentences(True)[i::DEAL]
        while True:
            # 2 to 6 sentences, of three sources.
            words = []
            for _ in range(rng.randint(2, 6)):
                if dealt and rng.random() < 0.5:
                    words += dealt.pop()
                elif self.split == "train" and rng.random() < PROSE_SHARE:
                    words += rng.choice(prose_sentences(False))
                else:
                    words += draw_sentence(rng, self.split)
            yield words

    def content(self, i):
        """(blocks, notes, bucket) of page i: what it says, whatever its size."""
        rng = random.Random(self.page_id(i))
        low, high, bucket = self.chars[i % len(self.chars)]
        # A page may end up to SLACK short, and must still have `low` characters.
        n_chars = rng.randint(min(low + SLACK, high), high)
        writer = PageWriter(rng, self.split, n_chars, self.paragraphs(rng, i), self.own_words)
        blocks = writer.write(self.parts)
        return blocks, writer.notes(), bucket

    def lay_out(self, i):
        """(Page i before it is printed, bucket of its length)."""
        self.check_index(i)
        blocks, notes, bucket = self.content(i)
        # A generator of its own: what a page says must not depend on its size.
        rng = random.Random(f"{self.page_id(i)}/layout")
        faces = rng.sample(self.faces, len(self.faces))
        columns = rng.choice(self.columns)
        page = set_page(rng, blocks, notes, faces, columns, self.width, self.height, self.min_px)
        page.kinds = self.kinds  # of boxes in its truth
        return page, bucket

    def truth(self, i):
        page, _ = self.lay_out(i)
        return page.truth

    def __getitem__(self, i):
        page, bucket = self.lay_out(i)
        image, glyphs = scan(page, self.damage, self.page_id(i))
        truth = page.truth  # as it would be read from the annotation
        return ocr_conversation(
            image,
            truth,
            self.page_id(i),
            labels=[{"glyphs": glyphs}],
            chars=len(truth),
            bucket=bucket,
            face=page.face,
            size_px=page.size_px,
            columns=page.columns,
            split=self.split,
            page=page,
        )


class SynthChart(Task):
    """
    Chart i with a question as the user's text and a short answer in ChartQA's form as the
    assistant's.

    image_size    px, one int for a square or (width, height), 64 and more
    """

    answer_metric = "relaxed_accuracy"

    def __init__(self, split, size, image_size=512, seed=0):
        if split not in SPLITS or size < 1:
            raise ValueError(
                f"split {split!r}, size {size}: give one of {', '.join(SPLITS)}, and 1 or more"
            )
        self.width, self.height = page_size(image_size)
        if min(self.width, self.height) < 64:
            raise ValueError(f"image_size {image_size}: give 64 px or more")
        font_folder()  # so that missing fonts are reported now and not in a worker
        self.split = split
        self.size = size
        self.seed = seed

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        self.check_index(i)
        chart_id = f"synthchart/{self.split}/{self.seed}/{i}"
        rng = random.Random(chart_id)
        # No labels: what is printed in a chart is not asked for as text.
        image, question, answer = draw_chart(rng, self.width, self.height, self.split)
        prompt = f"\n{question}"
        return ocr_conversation(image, answer, chart_id, prompt, split=self.split)


# -----------------------------------------------------------------------------
# Fixed sets, and a set of one's own

# Text tokens, of 100 more in a bucket: pages, as in the paper's study of compression.
FOX_PAGES = {600: 7, 700: 28, 800: 28, 900: 14, 1000: 11, 1100: 8, 1200: 4}
CHARS_PER_TOKEN = 4.5  # of English text, about


def fox_like(size_px=1024, damage=0):
    """
    100 dense held-out pages, fixed by seed, in the buckets of the paper's study of compression on
    Fox's English pages: 600-700 to 1200-1300 text tokens, at 4.5 characters a token 2,700-3,149 to
    5,400-5,849 characters. One or two columns, no tables. A twentieth of the text is prose, the
    rest is like English in its letters and lengths only (see the top of this file).
    """
    chars = []
    for tokens, pages in FOX_PAGES.items():
        low = int(tokens * CHARS_PER_TOKEN)
        high = int((tokens + 100) * CHARS_PER_TOKEN) - 1
        chars += [(low, high, f"{tokens}-{tokens + 100}")] * pages
    random.Random("fox").shuffle(chars)  # so that any first few pages are of all buckets
    return SynthPage(
        "heldout", 100, size_px, chars, columns=(1, 2), parts=TEXT, damage=damage, seed="fox"
    )


def omnidocbench_like(size_px=1024, damage=0):
    """100 held-out pages, fixed by seed: all PARTS, 1 to 3 columns, 500 to 3,500 characters."""
    return SynthPage("heldout", 100, size_px, (500, 3500), damage=damage, seed="omnidocbench")


def write_folder(task, folder):
    """
    Pages as a new folder of OmniDocBench.json and images/, which tasks/omnidocbench.py reads.

    task: conversations with a page, as SynthPage and SynthDoc give them.
    """
    images = Path(folder) / "images"
    images.mkdir(parents=True)  # FileExistsError if there is one: nothing is overwritten
    rows = []
    for i, conversation in enumerate(task):
        name = f"{i:05}.png"
        conversation["images"][0].save(images / name)  # PNG: the pixels as they are
        rows.append(annotation(conversation["page"], name, i))
    (Path(folder) / "OmniDocBench.json").write_text(json.dumps(rows), encoding="utf-8")
