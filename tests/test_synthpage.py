"""
Whole pages: they depend on (arguments, index) only; all ink is in its box and no box meets another;
the truth is what is printed in reading order, and what tasks/omnidocbench.py reads from the folder;
every glyph has its label; splits cannot leak; damage leaves the truth alone.

    python -m pytest tests/test_synthpage.py
"""
import hashlib
import json
import random
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from tasks.charts import draw_chart, draw_data
from tasks.damage import LIMITS, damage_image, parse_damage
from tasks.fonts import FACES
from tasks.omnidocbench import OmniDocBench
from tasks.page import PageFull, annotation
from tasks.synthpage import (
    FOX_PAGES,
    SynthChart,
    SynthPage,
    fox_like,
    omnidocbench_like,
    write_folder,
)
from tasks.words import held_out_words, letters, prose, prose_sentences

FURNITURE = ("header", "footer", "page_number")
SMALL_PAGE = {"paragraph": 3, "heading": 1, "list": 1}  # parts that 64 px have room for
MIXED_PAGE = {"paragraph": 2, "table": 2, "figure": 2}


def digest(conversation):
    """sha256 of picture, question and answer."""
    pixels = conversation["images"][0].tobytes()
    return hashlib.sha256(pixels + repr(conversation["messages"]).encode()).hexdigest()


def answer_of(conversation):
    return conversation["messages"][1]["content"]


def text_of(conversation):
    return " ".join(box.text for box in conversation["page"].boxes if box.kind != "table")


@pytest.fixture(scope="module")
def mixed():
    task = omnidocbench_like(800)
    return [task[i] for i in range(40)]


# -----------------------------------------------------------------------------
# Pages


@pytest.mark.parametrize("make", [
    lambda size, seed: SynthPage("train", size, 320, (100, 600), seed=seed),
    lambda size, seed: SynthPage("heldout", size, (300, 200), (100, 300), damage=0.7, seed=seed),
    lambda size, seed: SynthChart("train", size, 200, seed),
], ids=["clean", "damaged", "charts"])
def test_a_page_depends_on_arguments_and_index_only(make):
    in_order = [digest(make(10**9, 0)[i]) for i in range(12)]
    backwards = [digest(make(100, 0)[i]) for i in reversed(range(12))]
    assert backwards == in_order[::-1]
    assert len(set(in_order)) == 12
    assert not {digest(make(100, 1)[i]) for i in range(12)} & set(in_order)


@pytest.mark.parametrize("split, options, i, expected", [
    ("heldout", {"image_size": 64, "chars": (20, 50), "parts": SMALL_PAGE}, 100,
     "aecdfc15e15600c2"),
    ("heldout", {"image_size": (500, 900)}, 101, "771d707166e9675f"),
    ("heldout_words", {"image_size": 1024, "chars": (500, 3500)}, 4, "8508e4230270060d"),
    ("random_chars", {"image_size": 640, "chars": (1000, 3000), "columns": (2,)}, 2,
     "17fd71a6d3295c54"),
    ("heldout", {"image_size": 800, "seed": 1, "chars": (500, 2000), "parts": MIXED_PAGE,
                 "kinds": ("table",)}, 107, "4660999879afa69d"),
])
def test_pages_are_those_that_models_were_measured_on(split, options, i, expected):
    """As in test_synthdoc.py: no prose, and only Pillow or the fonts may change these hashes."""
    conversation = SynthPage(split, 10_000, **options)[i]
    pixels = conversation["images"][0].tobytes()
    found = hashlib.sha256(pixels + answer_of(conversation).encode()).hexdigest()
    assert found[:16] == expected


def apart(a, b):
    """Whether two boxes (left, top, right, bottom) have no pixel in common."""
    beside = a[2] <= b[0] or b[2] <= a[0]
    above = a[3] <= b[1] or b[3] <= a[1]
    return beside or above


def boxes_apart(page):
    for k, box in enumerate(page.boxes):
        for other in page.boxes[:k]:
            if not apart(box.bbox, other.bbox):
                return False
    return True


@pytest.mark.parametrize("image_size, chars, tables", [
    (64, (20, 50), 0),
    ((160, 96), (40, 120), 0.3),
    ((500, 900), (300, 2000), 0.3),
    (1280, (1000, 6000), 0.3),
])
def test_ink_is_inside_boxes_that_do_not_meet(image_size, chars, tables):
    task = SynthPage("heldout", 12, image_size, chars, parts={**SMALL_PAGE, "table": tables})
    for conversation in task:
        page = conversation["page"]
        image = conversation["images"][0]
        levels = np.array(image)
        assert image.mode == "L"
        assert levels.shape == (task.height, task.width) == (page.height, page.width)
        assert boxes_apart(page)
        for box in page.boxes:
            left, top, right, bottom = box.bbox
            assert 0 < left < right < page.width and 0 < top < bottom < page.height
            ink = levels[top:bottom, left:right] != page.paper
            assert ink[0].any() and ink[-1].any() and ink[:, 0].any() and ink[:, -1].any()
        for box in page.boxes:
            left, top, right, bottom = box.bbox
            levels[top:bottom, left:right] = page.paper
        assert (levels == page.paper).all(), "ink outside the boxes"


def test_columns_are_read_one_after_the_other(mixed):
    seen = set()
    for conversation in mixed:
        page = conversation["page"]
        seen.add(page.columns)
        body = [box for box in page.boxes if box.kind not in FURNITURE]
        orders = [box.order for box in body]
        assert orders == sorted(orders) and boxes_apart(page)
        for a, b in zip(body, body[1:]):
            below = b.bbox[1] >= a.bbox[3]
            to_the_right = b.bbox[0] >= a.bbox[2]
            assert below or to_the_right
        # Nothing runs out of its column into the next.
        for box in body:
            if box.kind == "text_block":
                assert box.bbox[2] - box.bbox[0] <= page.width / page.columns
    assert seen == {1, 2, 3}


def test_truth_is_what_is_printed(mixed):
    task = omnidocbench_like(800)
    kinds = set()
    for i, conversation in enumerate(mixed):
        page = conversation["page"]
        truth = answer_of(conversation)
        assert conversation["chars"] == len(truth)
        blocks, _, _ = task.content(i)
        said = []
        for block in blocks:
            if block.kind in ("title", "text_block"):
                said.append(block.marker + " ".join(block.content))
        # Pieces of a paragraph in two columns are one again.
        assert [part for part in truth.split("\n\n") if not part.startswith("<table>")] == said

        for box in page.boxes:
            kinds.add(box.kind)
            printed = [line.text for line in box.lines]
            if box.kind == "table":
                assert re.findall("<td>(.*?)</td>", box.text) == printed
                assert truth.count(box.text) == 1
                rows = re.findall("<tr>(.*?)</tr>", box.text)
                assert len(rows) >= 3 and len({row.count("<td>") for row in rows}) == 1
            else:
                assert box.text == " ".join(printed)
            if box.kind in FURNITURE:
                assert box.order is None
    assert kinds == {"title", "text_block", "table", "figure", *FURNITURE}
    assert any(c["page"].relations for c in mixed)
    printed = " ".join(map(text_of, mixed))
    for mark in (r"\d", r"[,;:]", r"[?!]", "%", "•", r"\(2\)"):
        assert re.search(mark, printed)


@pytest.mark.parametrize("damage", [0, 1])
def test_truth_without_a_picture_is_the_same(damage):
    task = SynthPage("train", 6, 500, (300, 1200), damage=damage)
    assert [task.truth(i) for i in range(6)] == [answer_of(c) for c in task]


# -----------------------------------------------------------------------------
# Labels


def test_every_printed_glyph_has_its_label(mixed):
    """In text, tables, headers and footers, but not in figures; and on the line of its glyph."""
    for conversation in mixed[:12]:
        page = conversation["page"]
        labels, = conversation["labels"]
        assert set(labels) == {"glyphs"}
        glyphs = iter(labels["glyphs"])
        for box in page.boxes:
            left, top, right, bottom = box.bbox
            for line in box.lines:
                last_x = left
                for char in line.text.replace(" ", ""):
                    labeled, x, y = next(glyphs)
                    assert labeled == char
                    assert last_x < x < right and top < y < bottom
                    assert line.y < y < line.y + 1.5 * line.px
                    last_x = x
        assert next(glyphs, None) is None


def test_labels_turn_with_the_page():
    task = SynthPage("heldout", 8, (400, 300), (300, 700), damage={"skew": 1})
    clean = SynthPage("heldout", 8, (400, 300), (300, 700))
    for damaged, straight in zip(task, clean):
        page = damaged["page"]
        assert page.skew
        expected = []
        for char, x, y in straight["labels"][0]["glyphs"]:
            expected.append((char, *page.turned(x, y)))
        assert damaged["labels"] == [{"glyphs": expected}]


# -----------------------------------------------------------------------------
# Fixed sets and folders


def test_the_folder_reads_as_omnidocbench(tmp_path):
    task = omnidocbench_like(640)
    pages = [task[i] for i in range(12)]
    folder = tmp_path / "set"
    write_folder(pages, folder)
    for kinds in (("text",), ("text", "table")):
        read = OmniDocBench(folder, kinds=kinds)
        for page, again in zip(pages, read):
            page["page"].kinds = kinds
            assert answer_of(again) == page["page"].truth
            pixels = np.asarray(again["images"][0])
            assert np.array_equal(pixels[..., 0], np.asarray(page["images"][0]))
    assert [answer_of(again) for again in read] == [answer_of(page) for page in pages]

    row = json.loads((folder / "OmniDocBench.json").read_text())[3]
    assert set(row) == {"layout_dets", "extra", "page_info"}
    assert row["page_info"]["image_path"] == "00003.png"
    attributes = {"data_source", "language", "layout", "special_issue"}
    assert set(row["page_info"]["page_attribute"]) == attributes
    for entry in row["layout_dets"]:
        assert {"category_type", "poly", "ignore", "order", "anno_id"} <= set(entry)
        assert len(entry["poly"]) == 8
    with pytest.raises(FileExistsError):
        write_folder(pages, folder)


def test_fox_like_buckets_and_no_page_repeats_another():
    task = fox_like()
    texts = []
    buckets = {}
    for i in range(len(task)):
        blocks, _, bucket = task.content(i)
        texts.append("\n\n".join(block.marker + " ".join(block.content) for block in blocks))
        low, high = (int(n) * 4.5 for n in bucket.split("-"))
        assert low <= len(texts[-1]) < high
        buckets[bucket] = buckets.get(bucket, 0) + 1
    assert buckets == {f"{n}-{n + 100}": pages for n, pages in FOX_PAGES.items()}
    assert sum(buckets.values()) == 100
    assert 2700 <= min(map(len, texts)) and max(map(len, texts)) < 5850

    # No sixteen words in a row stand on two pages.
    seen = set()
    for text in texts:
        words = text.split()
        runs = {tuple(words[k:k + 16]) for k in range(len(words) - 15)}
        assert not runs & seen
        seen |= runs

    # The same text at every size.
    one = task[0]
    assert one["messages"] == fox_like(640)[0]["messages"] and answer_of(one) == texts[0]
    assert one["bucket"] in buckets and one["columns"] in (1, 2)
    assert one["images"][0].size == (1024, 1024)


def test_splits_cannot_leak():
    held_out = held_out_words()
    tasks = {}
    for split in ("train", "heldout_words", "random_chars"):
        tasks[split] = SynthPage(split, 999, 640, (200, 800))
    charts = SynthChart("train", 999)
    for i in range(40):
        train = tasks["train"][i]
        assert held_out.isdisjoint(letters(text_of(train)))
        assert held_out.isdisjoint(letters(answer_of(train).replace("td>", "")))
        only = " ".join(box.text for box in tasks["heldout_words"][i]["page"].boxes)
        assert held_out >= set(letters(re.sub("<.*?>", " ", only)))
        assert not re.search("[A-Z]{2}|the ", answer_of(tasks["random_chars"][i]))
        question, answer = charts[i]["messages"]
        text = question["content"][1]["text"] + " " + answer["content"]
        assert held_out.isdisjoint(letters(text))


def test_held_out_prose_is_dealt_out_and_not_trained_on():
    held_out = prose_sentences(True)
    trained = " ".join(prose(False))
    assert len(held_out) > 50
    for sentence in held_out:
        assert len(sentence) <= 8 or " ".join(sentence) not in trained
    # Each sentence is on at most one of the first hundred pages.
    task = SynthPage("heldout", 100, 640, (1000, 2500), parts={"paragraph": 1})
    pages = [" ".join(" ".join(block.content) for block in task.content(i)[0]) for i in range(100)]
    long = [" ".join(sentence) for sentence in held_out if len(sentence) > 12]
    counts = [sum(sentence in page for page in pages) for sentence in long]
    assert max(counts) == 1 and sum(counts) > len(long) / 4


# -----------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("kind", LIMITS)
def test_each_damage_changes_pixels_and_not_the_truth(kind):
    clean = SynthPage("heldout", 9, 300, (100, 300))[4]
    damaged = SynthPage("heldout", 9, 300, (100, 300), damage={kind: 1})[4]
    assert clean["messages"] == damaged["messages"]
    before = clean["images"][0]
    after = damaged["images"][0]
    assert after.size == before.size and after.mode == "L"
    assert after.tobytes() != before.tobytes()
    assert clean["page"].truth == damaged["page"].truth
    attributes = annotation(damaged["page"])["page_info"]["page_attribute"]
    assert attributes["special_issue"]
    assert damage_image(before, parse_damage(0), 1, 12) == (before, 0)


def test_a_turned_page_keeps_its_ink_and_its_polygons_follow():
    for conversation in SynthPage("heldout", 8, (400, 300), (300, 700), damage={"skew": 1}):
        page = conversation["page"]
        levels = np.asarray(conversation["images"][0]).astype(int)
        allowed = Image.new("L", (page.width, page.height))
        for entry in annotation(page)["layout_dets"]:
            poly = entry["poly"]
            assert min(poly) > 0
            assert max(poly[::2]) < page.width and max(poly[1::2]) < page.height
            ImageDraw.Draw(allowed).polygon(poly, fill=255)
        allowed = allowed.filter(ImageFilter.MaxFilter(3))  # half a pixel of interpolation
        outside = levels[np.asarray(allowed) == 0]
        assert page.skew and (abs(outside - page.paper) < 40).all()


# -----------------------------------------------------------------------------
# Charts


@pytest.mark.parametrize("image_size", [64, (200, 120), 512])
def test_charts_answer_their_question(image_size):
    asked = set()
    for conversation in SynthChart("heldout", 40, image_size):
        user, assistant = conversation["messages"]
        question = user["content"][1]["text"]
        answer = assistant["content"]
        image = conversation["images"][0]
        assert image.mode == "RGB" and "labels" not in conversation
        # Nothing but grid lines reaches the edge.
        levels = np.asarray(image).min(2)
        edge = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
        assert set(np.unique(edge)) <= {200, 255}

        assert question.startswith("\n") and question.endswith("?")
        assert 0 < len(answer) < 12
        is_number = bool(re.fullmatch(r"\d+(\.\d)?", answer))
        if re.match(r"\n(What|How many)", question):
            assert is_number
        else:
            assert not is_number or answer.isdigit()  # a label may be a year
        asked.add(question.split()[3])
    assert len(asked) >= 4


def test_chart_answers_follow_from_the_values():
    for seed in range(60):
        chart = draw_data(random.Random(seed), 400, "train")
        _, question, answer = draw_chart(random.Random(seed), 400, 300, "train")
        printed = [chart.printed(k) for k in range(len(chart.values))]
        assert len(set(printed)) == len(set(chart.labels)) == len(printed)
        if "How many" in question:
            assert answer == str(len(printed))
        elif "difference" in question:
            numbers = [float(value) for value in printed]
            differences = {f"{abs(a - b):.4g}" for a in numbers for b in numbers}
            assert f"{float(answer):.4g}" in differences
        else:
            assert answer in printed or answer in chart.labels


def test_a_chart_prints_its_values_and_labels(monkeypatch):
    written = []
    text = ImageDraw.ImageDraw.text

    def spy(self, xy, string, *args, **kwargs):
        written.append(string)
        text(self, xy, string, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    for seed in range(20):
        written.clear()
        chart = draw_data(random.Random(seed), 400, "train")
        draw_chart(random.Random(seed), 400, 300, "train")
        words = " ".join(written).split()
        assert chart.name in words
        for k, label in enumerate(chart.labels):
            assert label in words and chart.printed(k) in words


# -----------------------------------------------------------------------------
# A user's own text


def test_own_text(tmp_path):
    paragraphs = []
    for k in range(600):
        filler = "wort " * (k % 7)
        paragraphs.append(
            f"Paragraf {k}: Größe <b> & Maß, {filler}zu drei- und vierstöckigen Häusern."
        )
    unprintable = ["漢字 gibt es nicht.", "Kein\u200bRaum.", "x" * 80]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(paragraphs + unprintable), encoding="utf-8")

    parts = {"paragraph": 5, "table": 1, "list": 1}
    said = {}
    left_out = 0
    for split in ("train", "heldout"):
        task = SynthPage(split, 50, 500, (300, 900), text_files=[path], parts=parts)
        left_out += task.left_out
        truths = " ".join(answer_of(conversation) for conversation in task)
        said[split] = set(re.findall(r"Paragraf (\d+):", truths))
    assert not said["train"] & said["heldout"]
    assert len(said["train"]) > 100 and len(said["heldout"]) > 10
    assert left_out == len(unprintable)
    # Edited between two runs, the text is no longer the same data.
    before = SynthPage("train", 50, 500, (300, 900), text_files=[path]).fingerprint()
    path.write_text(path.read_text(encoding="utf-8") + "\n\nNoch ein Absatz.", encoding="utf-8")
    assert SynthPage("train", 50, 500, (300, 900), text_files=[path]).fingerprint() != before

    # A paragraph that goes on in the second column is joined as it was, hyphens included.
    for conversation in SynthPage("train", 40, 400, (300, 900), columns=(2,), text_files=path):
        truth = answer_of(conversation)
        assert "drei-und" not in truth
        for part in truth.split("\n\n"):
            if re.match(r"Paragraf \d+:", part):
                assert any(paragraph.startswith(part) for paragraph in paragraphs)


@pytest.mark.parametrize("name, content, split, error, message", [
    ("none.txt", None, "train", FileNotFoundError, "none.txt"),
    ("empty.txt", b" \n\n", "train", ValueError, "empty.txt is empty"),
    ("latin.txt", "Größe".encode("latin1"), "train", ValueError, "latin.txt is not UTF-8.*iconv"),
    ("short.txt", b"ab cde", "train", ValueError,
     "5 characters of the split train, too few.*give more text"),
    ("short.txt", b"ab cde", "random_chars", ValueError, "0 paragraphs in split 'random_chars'"),
    ("kanji.txt", "漢字".encode(), "train", ValueError, "letters lacking '[字漢]"),
])
def test_own_text_that_cannot_be_used(tmp_path, name, content, split, error, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        SynthPage(split, 1, chars=(100, 200), text_files=[str(path)])


# -----------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("arguments, message", [
    ({"split": "test"}, "split 'test'"),
    ({"size": 0}, "size 0"),
    ({"image_size": 32}, "64 px"),
    ({"chars": (5, 10)}, "chars (5, 10)"),
    ({"chars": (90, 50)}, "chars (90, 50)"),
    ({"columns": (4,)}, "columns (4,)"),
    ({"columns": (3,), "image_size": 200}, "columns (3,)"),
    ({"parts": {"poem": 1}}, "poem"),
    ({"parts": {"table": 1}}, "paragraph"),
    ({"faces": ["comic"]}, "comic"),
    ({"damage": 2}, "damage 2"),
    ({"damage": {"rain": 0.5}}, "rain"),
    ({"kinds": ("poem",)}, "poem"),
    ({"min_px": 2}, "min_px 2"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SynthPage(**{"split": "train", "size": 1, **arguments})


@pytest.mark.parametrize("arguments, message", [
    ({"split": "test"}, "split 'test'"),
    ({"size": 0}, "size 0"),
    ({"image_size": 32}, "64 px"),
])
def test_bad_arguments_of_charts(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SynthChart(**{"split": "train", "size": 1, **arguments})


def test_a_full_page_is_an_error_and_every_face_is_tried():
    with pytest.raises(PageFull, match="64x64 px.*raise image_size"):
        SynthPage("train", 1, 64, (900, 900))[0]
    task = SynthPage("train", 30, 300, (100, 200), faces=list(FACES))
    assert {conversation["face"] for conversation in task} == set(FACES)
    with pytest.raises(IndexError):
        task[30]
