"""
Proves, with an oracle in place of a reader, that a page of any size becomes windows which hold
every word of it once, whole and in reading order, in print that the reader knows; whatever the
face, the paper and the light, and also for slightly turned pages and two columns.

python -m pytest tests/test_windows.py
"""
import re
import textwrap

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from nanochat import lines
from nanochat.lines import find_lines, ink_of, split_rows
from nanochat.windows import MARGIN, Known, join, split
from tasks.fonts import font_folder, line_height, text_width
from tasks.synthdoc import SynthDoc
from tasks.synthpage import SynthPage

KNOWN = Known(size=256, print_px=(10, 14), chars=(130, 400))
TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age "
    "of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the "
    "season of Light, it was the season of Darkness, it was the spring of hope, it was the winter "
    "of despair.")
# Of matplotlib and PIL, none of which our renderer uses.
OTHER_FACES = {"cm": "cmr10.ttf", "italic": "STIXGeneralItalic.ttf",
               "oblique": "DejaVuSerif-Italic.ttf"}


def face(name, px):
    if name == "pil":
        return ImageFont.load_default(px)
    return ImageFont.truetype(f"{font_folder()}/{OTHER_FACES[name]}", px)


def typeset(size, font, lines, at=(20, 20), pitch=24, ink=0, paper=255):
    """-> (picture, [(word, x, y of its middle), ...]) of lines of text."""
    image = Image.new("L", size, paper)
    draw = ImageDraw.Draw(image)
    words = []
    for k, line in enumerate(lines):
        x = at[0]
        y = at[1] + k * pitch
        for word in line.split():
            draw.text((x, y), word, ink, font)
            left, top, right, bottom = draw.textbbox((x, y), word, font)
            words.append((word, (left + right) / 2, (top + bottom) / 2))
            x += font.getlength(word + " ")
    return image, words


def words_of(page):
    """[(word, x, y of its middle), ...] of a rendered Page, headers and footers included."""
    words = []
    for box in page.boxes:
        for line in box.lines:
            before = ""
            for word in line.text.split():
                left = line.x + text_width(line.face, line.px, before)
                width = text_width(line.face, line.px, word)
                words.append((word, left + width / 2, line.y + line_height(line.face, line.px) / 2))
                before += word + " "
    return words


def oracle(window, words):
    """What is printed in a window: the words whose middle one of its pieces shows, in its order."""
    found = []
    for row in window.rows:
        for piece in row.pieces:
            box = piece.box
            for word, x, y in words:
                if box.left <= x < box.right and box.top <= y < box.bottom:
                    found.append(word)
    return " ".join(found)


def read(image, words, known=KNOWN):
    windows, notes = split(image, known)
    check_windows(image, windows, known)
    return join(windows, [oracle(window, words) for window in windows]), windows, notes


def check_windows(image, windows, known):
    """Holds for all windows: all ink is in them once, and each is a page that the reader knows."""
    ink = ink_of(image)
    shown = np.zeros(ink.printed.shape, int)
    for window in windows:
        assert window.image.size == (known.size, known.size)
        left, top, right, bottom = ink_box(window.image)
        assert min(left, top) >= MARGIN - 2
        assert max(right, bottom) <= known.size - MARGIN + 2
        lines, _ = find_lines(ink_of(window.image))
        low, high = known.print_px
        sizes = [line.print_px for line in lines]
        assert 0.8 * low <= np.median(sizes) <= 1.2 * high
        for row in window.rows:
            for piece in row.pieces:
                box = piece.box
                shown[box.top:box.bottom, box.left:box.right] += 1
    assert (shown[ink.printed] == 1).all()


def ink_box(image):
    return ImageOps.invert(image.convert("L")).point(lambda level: 255 * (level > 60)).getbbox()


# -----------------------------------------------------------------------------
# Pages of our renderer


@pytest.mark.parametrize("i", range(6))
def test_small_pages(i):
    page = SynthDoc("heldout", 6, image_size=256, chars=(130, 400))[i]
    text, windows, _ = read(page["images"][0], words_of(page["page"]))
    assert text.split() == page["page"].truth.split()


@pytest.mark.parametrize("i", range(3))
def test_large_pages_of_one_column(i):
    parts = {"paragraph": 10, "heading": 2}
    task = SynthPage("heldout", 3, (900, 700), (500, 900), columns=(1,), parts=parts, seed=1)
    page = task[i]
    words = words_of(page["page"])
    text, windows, _ = read(page["images"][0], words)
    assert len(windows) >= 2
    assert sorted(text.split()) == sorted(word for word, _, _ in words)
    # Headers and footers are read too, but are no part of the truth.
    assert is_inside(page["page"].truth.split(), text.split())


def is_inside(words, longer):
    """Whether `words` are in `longer` in this order."""
    rest = iter(longer)
    return all(word in rest for word in words)


@pytest.mark.parametrize("damage", [0, 0.4])
@pytest.mark.parametrize("i", range(2))
def test_two_columns(i, damage):
    task = SynthPage("heldout", 2, 1000, (1500, 2000), columns=(2,), parts={"paragraph": 1},
                     damage=damage, seed=3)
    page = task[i]
    windows, notes = split(page["images"][0], KNOWN)
    assert not notes
    columns = []
    for window in windows:
        for row in window.rows:
            columns += [piece.line.column for piece in row.pieces]
    assert columns == sorted(columns)
    if not damage:  # else the picture is turned, and the oracle's words are elsewhere
        text, _, _ = read(page["images"][0], words_of(page["page"]))
        assert is_inside(page["page"].truth.split(), text.split())


# -----------------------------------------------------------------------------
# Pictures drawn by PIL


@pytest.mark.parametrize("name", ["pil", *OTHER_FACES])
@pytest.mark.parametrize("px, ink, paper", [(12, 0, 255), (20, 60, 200), (32, 240, 30)])
def test_other_faces_and_papers(name, px, ink, paper):
    lines = textwrap.wrap(TEXT, 60)
    size = (px * 40, px * 14)
    image, words = typeset(size, face(name, px), lines, pitch=px * 3 // 2, ink=ink, paper=paper)
    text, windows, notes = read(image, words)
    assert text.split() == TEXT.split()
    assert not notes
    # Whatever the paper was, the reader gets dark print on light paper.
    assert np.median(np.asarray(windows[0].image)) > 200


def test_print_that_fits_keeps_its_lines_and_pixels():
    lines = textwrap.wrap(TEXT, 36)
    image, words = typeset((256, 256), face("cm", 12), lines, at=(8, 8), pitch=16)
    text, [window], _ = read(image, words)
    assert len(window.rows) == len(lines)
    # Not resampled: the same letters, on other paper.
    ink = np.asarray(image.crop(ink_box(image.convert("RGB"))))
    shown = np.asarray(window.image.convert("L").crop(ink_box(window.image)))
    assert ink.shape == shown.shape
    assert np.corrcoef(ink.ravel(), shown.ravel())[0, 1] > 0.98


def test_a_wide_paragraph_is_set_again():
    """A 900x300 screenshot: its lines do not fit a window in print that can be read."""
    image, words = typeset((900, 300), face("cm", 20), textwrap.wrap(TEXT, 85), pitch=28)
    text, windows, _ = read(image, words)
    assert text.split() == TEXT.split()
    assert len(windows) == 1
    assert len(windows[0].rows) > 5


def test_long_pages_become_windows_of_equal_length():
    lines = textwrap.wrap(" ".join([TEXT] * 4), 85)
    image, words = typeset((900, 600), face("cm", 20), lines, pitch=28)
    text, windows, _ = read(image, words)
    assert text.split() == (TEXT.split() * 4)
    lengths = [len(oracle(window, words)) for window in windows]
    assert max(lengths) <= 1.3 * KNOWN.chars[1]
    assert min(lengths) >= 0.7 * max(lengths)


def test_paragraphs():
    lines = textwrap.wrap(TEXT, 80)
    image, words = typeset((900, 400), face("cm", 20), [*lines, "", *lines], pitch=28)
    text, _, _ = read(image, words)
    assert text == f"{TEXT}\n\n{TEXT}"


def test_a_dark_heading_and_a_frame():
    image, words = typeset((700, 330), face("cm", 16), textwrap.wrap(TEXT, 80), (30, 110))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 700, 63), 40)
    draw.text((30, 14), "A Tale of Two Cities", 250, face("cm", 28))
    draw.rectangle((12, 90, 688, 320), outline=0)
    windows, _ = split(image, KNOWN)
    title = ("A Tale of Two Cities", 100, 32)
    text = join(windows, [oracle(window, [title, *words]) for window in windows])
    assert text.split()[-len(TEXT.split()):] == TEXT.split()
    lines, _ = find_lines(ink_of(image))
    assert len(lines) == 1 + len(textwrap.wrap(TEXT, 80))  # neither the frame nor the edge is one


@pytest.mark.parametrize("degrees", [-2, -0.7, 1.3])
def test_turned_pages_are_made_level(degrees):
    lines = textwrap.wrap(TEXT, 80)
    image, _ = typeset((900, 300), face("cm", 20), lines, pitch=28)
    turned = image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=255)
    ink = ink_of(turned)
    assert ink.degrees == pytest.approx(-degrees, abs=0.15)
    found, _ = find_lines(ink)
    assert len(found) == len(lines)
    assert ink_of(image).degrees == 0


def test_lines_that_touch():
    lines = textwrap.wrap(TEXT, 60)
    image, words = typeset((700, 200), face("italic", 20), lines, pitch=19)
    found, _ = find_lines(ink_of(image))
    assert len(found) == len(lines)
    windows, _ = split(image, KNOWN)
    assert join(windows, [oracle(window, words) for window in windows]).split() == TEXT.split()


def test_a_word_that_is_wider_than_a_window_is_cut():
    word = "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch"
    image, _ = typeset((1200, 80), face("cm", 28), [word])
    windows, _ = split(image, KNOWN)
    check_windows(image, windows, KNOWN)
    assert len(windows[0].rows) > 1


@pytest.mark.parametrize("image", [
    Image.new("RGB", (300, 200), "white"), Image.new("L", (300, 200), 0), Image.new("L", (1, 1)),
    Image.effect_noise((300, 200), 40), Image.linear_gradient("L"),
    # A strip becomes cells of 16 px a side: filled up, this one would be 64 million pixels.
    Image.linear_gradient("L").resize((1, 256)).resize((1, 4_000_000)),
])
def test_pictures_without_print(image):
    assert split(image, KNOWN) == ([], ["no print was found"])
    assert join([], []) == ""


def test_small_print_and_pictures_are_said():
    image, _ = typeset((300, 150), face("pil", 4), textwrap.wrap(TEXT, 70), pitch=8)
    _, notes = split(image, KNOWN)
    assert "px is too small: the reader knows 10 px and more" in notes[0]

    lines = textwrap.wrap(TEXT, 80)
    image, words = typeset((900, 600), face("cm", 20), lines, (20, 380), pitch=28)
    stripes = Image.new("L", (300, 300), 255)
    for x in range(0, 300, 12):
        stripes.paste(0, (x, 0, x + 4, 300))
    image.paste(stripes.rotate(45), (300, 20))
    windows, notes = split(image, KNOWN)
    assert "a picture of 30" in notes[0] and "is left out" in notes[0]
    assert join(windows, [oracle(window, words) for window in windows]).split() == TEXT.split()


def test_a_table_with_rules_is_not_one_line():
    """Its rules go from top to bottom, so that no row of pixels between its lines is empty."""
    image = Image.new("L", (600, 500), 255)
    draw = ImageDraw.Draw(image)
    words = []
    for top in range(0, 500, 20):
        draw.line((0, top, 600, top), 0)
        for left in range(0, 600, 50):
            draw.line((left, 0, left, 500), 0)
            draw.text((left + 8, top + 4), "123.4", 0, face("pil", 11))
            words.append(("123.4", left + 22, top + 11))
    windows, _ = split(image, KNOWN)
    read_words = join(windows, [oracle(window, words) for window in windows]).split()
    assert len(read_words) == len(words)


def test_text_above_a_table_with_flat_rules():
    """A rule has as much ink in a strip of the page as several lines of text."""
    font = face("pil", 18)
    lines = textwrap.wrap(TEXT, 60)[:3]
    image, words = typeset((700, 600), font, lines)
    draw = ImageDraw.Draw(image)
    for row in range(11):
        draw.line((20, 140 + 30 * row, 680, 140 + 30 * row), 0)
    for row in range(10):
        for left in (30, 250, 470):
            draw.text((left, 145 + 30 * row), "123.4", 0, font)
    windows, notes = split(image, KNOWN)
    text = join(windows, [oracle(window, words) for window in windows])
    assert text.split() == " ".join(lines).split()
    assert not any("too small" in note for note in notes)


@pytest.mark.parametrize("gray", [170, 200])
def test_gray_print_beside_black_print(gray):
    lines = textwrap.wrap(TEXT, 50)
    image, words = typeset((700, 500), face("pil", 18), lines[:3])
    more, gray_words = typeset((700, 500), face("pil", 18), lines[3:], at=(20, 140), ink=gray)
    image.paste(more.crop((0, 130, 700, 500)), (0, 130))
    text, _, _ = read(image, words + gray_words)
    assert text.split() == TEXT.split()


def test_a_list_with_wide_spacing_fits_its_windows():
    items = "milk eggs bread butter salt rice beans corn apples pears".split()
    image, words = typeset((400, 700), face("pil", 20), items, pitch=56)
    text, _, _ = read(image, words, Known(256, (18, 22), (60, 200)))
    assert text.split() == items


def test_words_beside_a_table_without_rules_stay_whole():
    lines = textwrap.wrap(TEXT, 60)[:2]
    font = face("pil", 16)
    image, words = typeset((700, 500), font, lines)
    draw = ImageDraw.Draw(image)
    for row in range(10):
        for left in (20, 200, 380, 560):
            draw.text((left, 80 + 24 * row), "12.5", 0, font)
    windows, _ = split(image, KNOWN)
    prose = [piece for window in windows for row in window.rows for piece in row.pieces
             if piece.box.top < 70]
    assert len(prose) == len(words)


SOFT = ("The administration of international communication required unmistakable commitment, and "
        "representatives misunderstood recommendations.")


@pytest.mark.parametrize("face", ["cmr10.ttf", "STIXGeneralBol.ttf"])
def test_soft_print_is_no_rule(face):
    """The letters of a word that is out of focus meet at their feet. Rules below it are found."""
    font = ImageFont.truetype(f"{font_folder()}/{face}", 14)
    page = Image.new("L", (560, 150), 255)
    draw = ImageDraw.Draw(page)
    for k, row in enumerate(textwrap.wrap(SOFT, 50)):
        draw.text((10, 8 + 21 * k), row, 0, font)
    for y, width in ((126, 1), (140, 2)):
        draw.line((10, y, 500, y), 0, width)
    soft = page.filter(ImageFilter.GaussianBlur(1.3))
    levels, noisy = lines.ink_levels(np.asarray(soft, dtype=np.float32))
    printed = lines.solid(levels, noisy)
    rules = lines.rules_of(levels, printed, lines.rough_print(printed))
    text = printed[:118]
    assert (text & rules[:118]).sum() < 0.05 * text.sum()
    assert rules[122:131].any() and rules[136:].any()


def test_the_stems_of_a_heading_are_no_rules():
    page = Image.new("L", (800, 330), 255)
    draw = ImageDraw.Draw(page)
    draw.text((20, 10), "The Hill", 0, ImageFont.load_default(125))
    for k in range(5):
        draw.text((20, 200 + k * 22), SOFT[:70], 0, ImageFont.load_default(14))
    levels, noisy = lines.ink_levels(np.asarray(page, dtype=np.float32))
    printed = lines.solid(levels, noisy)
    kept = lines.ink_of(page).printed[:190]
    assert kept.sum() > 0.95 * printed[:190].sum()


@pytest.mark.parametrize("px", [14, 20, 40])
def test_a_line_cropped_to_its_ink_is_found(px):
    font = ImageFont.truetype(f"{font_folder()}/DejaVuSans-Bold.ttf", px)
    left, top, right, bottom = font.getbbox("A bold line, cropped")
    crop = Image.new("L", (right - left, bottom - top), 255)
    ImageDraw.Draw(crop).text((-left, -top), "A bold line, cropped", 0, font)
    windows, notes = split(crop, KNOWN)
    assert len(windows) == 1 and not notes


def test_text_beside_a_photo_is_read():
    page = Image.new("L", (900, 300), 255)
    page.paste(Image.effect_noise((300, 260), 90), (20, 20))
    draw = ImageDraw.Draw(page)
    rows = textwrap.wrap(f"{SOFT} {SOFT}", 45)[:8]
    for k, row in enumerate(rows):
        draw.text((360, 25 + k * 30), row, 0, ImageFont.load_default(18))
    found, notes = lines.find_lines(lines.ink_of(page))
    assert len(found) == len(rows) and len(notes) == 1
    assert re.match(r"a picture of 3\d\dx2\d\d px at \d\d, \d\d is left out", notes[0])


def test_a_screen_of_dots_is_left_out():
    """As a photo in old print: 90,000 "words" that would fill a thousand windows."""
    pixels = np.full((1200, 1200), 255, np.uint8)
    pixels[::4, ::4] = 0
    windows, notes = split(Image.fromarray(pixels), KNOWN)
    assert windows == []
    assert "300 rows of ink from 0 to 1197 px are left out" in notes[-2]
    assert notes[-1] == "no print was found"


def test_what_looks_like_huge_print_is_said():
    """A photo in dots of many sizes: the larger ones touch, so that nothing parts its rows."""
    y, x = np.mgrid[:1700, :1200]
    shades = (np.sin(x / 90) + np.cos(y / 70) + 2) / 4
    dots = (x % 8 * 8 + y % 8) / 64 < shades
    _, notes = split(Image.fromarray(np.where(dots, 255, 0).astype(np.uint8)), KNOWN)
    assert "px was found: a picture, or lines that touch" in notes[-1]


def test_print_of_a_pixel():
    """Rounding leaves no row between the top of the stretch and the body of its line."""
    assert split_rows(np.array([1, 9, 9, 9]), 1.0) == [(0, 1), (1, 4)]


def test_empty_texts_leave_no_gaps():
    lines = textwrap.wrap(TEXT, 80)
    image, _ = typeset((900, 560), face("cm", 20), [*lines, "", *lines, "", *lines], pitch=28)
    windows, _ = split(image, KNOWN)
    assert len(windows) == 3
    assert join(windows, ["one", "", " three\n"]) == "one\n\nthree"
    assert join(windows, ["", "two", ""]) == "two"


# -----------------------------------------------------------------------------
# What a reader knows


def test_known():
    assert Known.parse("10-14,130-400", 256) == KNOWN
    assert Known.from_meta({"windows": KNOWN.to_meta()}, 256) == KNOWN
    assert Known.from_meta({}, 256) is None
    for text in ("10-14", "14-10,130-400", "10-14,400-130", "1-14,1-400", "10-100,1-400", "a"):
        with pytest.raises(ValueError, match="windows"):
            Known.parse(text, 256)
    for record in (None, {}, {"print_px": 3, "chars": [1, 2]}, {"print_px": [1], "chars": [1]}):
        with pytest.raises(ValueError, match="meta.json: windows is"):
            Known.from_meta({"windows": record}, 256)
