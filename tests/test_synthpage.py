"""
Whole pages: a page depends on (arguments, index) only; all ink is in its box and no box meets another; the truth is what is printed
in reading order, and what tasks/omnidocbench.py reads from the folder; splits cannot leak; damage leaves the truth alone.

    python -m pytest tests/test_synthpage.py
"""

import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from tasks import synthpage
from tasks.damage import LIMITS, damage_image, parse_damage
from tasks.omnidocbench import OmniDocBench
from tasks.synthdoc import FACES, PageFull, held_out_words, letters, prose
from tasks.synthpage import (FOX_PAGES, SynthChart, SynthPage, annotation, fox_like, omnidocbench_like, prose_sentences, write_folder)

FURNITURE = ("header", "footer", "page_number")


def digest(conversation):
    return hashlib.sha256(conversation["images"][0].tobytes() + repr(conversation["messages"]).encode()).hexdigest()


def text_of(conversation):
    return " ".join(box.text for box in conversation["page"].boxes if box.kind != "table")


@pytest.fixture(scope="module")
def mixed():
    return [omnidocbench_like(800)[i] for i in range(40)]


@pytest.mark.parametrize("make", [
    lambda size, seed: SynthPage("train", size, 320, (100, 600), seed=seed),
    lambda size, seed: SynthPage("heldout", size, (300, 200), (100, 300), damage=0.7, seed=seed),
    lambda size, seed: SynthChart("train", size, 200, seed),
], ids=["clean", "damaged", "charts"])
def test_a_page_depends_on_arguments_and_index_only(make):
    in_order = [digest(make(10**9, 0)[i]) for i in range(12)]
    assert [digest(make(100, 0)[i]) for i in reversed(range(12))] == in_order[::-1]
    assert len(set(in_order)) == 12 and not {digest(make(100, 1)[i]) for i in range(12)} & set(in_order)


def boxes_apart(page):
    return all(a.bbox[2] <= b.bbox[0] or b.bbox[2] <= a.bbox[0] or a.bbox[3] <= b.bbox[1] or b.bbox[3] <= a.bbox[1]
               for k, a in enumerate(page.boxes) for b in page.boxes[:k])


@pytest.mark.parametrize("image_size, chars", [(64, (20, 50)), ((160, 96), (40, 120)), ((500, 900), (300, 2000)), (1280, (1000, 6000))])
def test_ink_is_inside_boxes_that_do_not_meet(image_size, chars):
    task = SynthPage("heldout", 12, image_size, chars, parts={"paragraph": 3, "heading": 1, "list": 1, "table": 0.3 * (image_size != 64)})
    for conversation in task:
        page, levels = conversation["page"], np.array(conversation["images"][0])
        assert conversation["images"][0].mode == "L" and levels.shape == (task.height, task.width) == (page.height, page.width)
        for box in page.boxes:
            left, top, right, bottom = box.bbox
            assert 0 < left < right < page.width and 0 < top < bottom < page.height
            ink = levels[top:bottom, left:right] != page.paper
            assert ink[0].any() and ink[-1].any() and ink[:, 0].any() and ink[:, -1].any()
        assert boxes_apart(page)
        for box in page.boxes:
            levels[box.bbox[1]:box.bbox[3], box.bbox[0]:box.bbox[2]] = page.paper
        assert (levels == page.paper).all()  # no ink outside the boxes


def test_columns_are_read_one_after_the_other(mixed):
    seen = set()
    for page in (c["page"] for c in mixed):
        seen.add(page.columns)
        body = [box for box in page.boxes if box.kind not in FURNITURE]
        assert [box.order for box in body] == sorted(box.order for box in body) and boxes_apart(page)
        for a, b in zip(body, body[1:]):
            assert b.bbox[1] >= a.bbox[3] or b.bbox[0] >= a.bbox[2]  # below, or to the right
        # a word is as wide as its letters: nothing runs out of its column into the next
        for box in (b for b in body if b.kind == "text_block"):
            assert box.bbox[2] - box.bbox[0] <= page.width / page.columns
    assert seen == {1, 2, 3}


def test_truth_is_what_is_printed(mixed):
    kinds = {box.kind for c in mixed for box in c["page"].boxes}
    assert kinds == {"title", "text_block", "table", "figure", *FURNITURE}
    task = omnidocbench_like(800)
    for i, conversation in enumerate(mixed):
        page, truth = conversation["page"], conversation["messages"][1]["content"]
        blocks, _, _ = task.content(i)
        said = [marker + " ".join(words) for kind, words, _, marker in blocks if kind in ("title", "text_block")]
        assert [part for part in truth.split("\n\n") if not part.startswith("<table>")] == said  # pieces of two columns are one again
        assert conversation["chars"] == len(truth)
        for box in page.boxes:
            printed = [text for _, _, _, _, text in box.lines] if box.kind != "figure" else []
            if box.kind == "table":
                assert re.findall("<td>(.*?)</td>", box.text) == printed and truth.count(box.text) == 1
                rows = re.findall("<tr>(.*?)</tr>", box.text)
                assert len(rows) >= 3 and len({row.count("<td>") for row in rows}) == 1
            else:
                assert box.text == " ".join(printed)
            if box.kind in FURNITURE:
                assert box.order is None
    assert any(c["page"].relations for c in mixed)
    assert all(re.search(mark, " ".join(map(text_of, mixed))) for mark in (r"\d", r"[,;:]", r"[?!]", "%", "•", r"\(2\)"))


def test_the_folder_reads_as_omnidocbench(tmp_path):
    pages = [omnidocbench_like(640)[i] for i in range(12)]
    write_folder(pages, tmp_path / "set")
    for kinds in (("text",), ("text", "table")):
        read = OmniDocBench(tmp_path / "set", kinds=kinds)
        for page, row, again in zip(pages, read.truths, read):
            page["page"].kinds = kinds
            assert row == page["page"].truth == again["messages"][1]["content"]
            assert np.array_equal(np.asarray(again["images"][0])[..., 0], np.asarray(page["images"][0]))
    assert read.truths == [page["messages"][1]["content"] for page in pages]
    row = json.loads((tmp_path / "set" / "OmniDocBench.json").read_text())[3]
    assert set(row) == {"layout_dets", "extra", "page_info"} and row["page_info"]["image_path"] == "00003.png"
    assert set(row["page_info"]["page_attribute"]) == {"data_source", "language", "layout", "special_issue"}
    for det in row["layout_dets"]:
        assert {"category_type", "poly", "ignore", "order", "anno_id"} <= set(det) and len(det["poly"]) == 8
    with pytest.raises(FileExistsError):
        write_folder(pages, tmp_path / "set")


def test_fox_like_buckets_and_no_page_repeats_another():
    task = fox_like()
    texts, buckets = [], {}
    for i in range(len(task)):
        blocks, _, bucket = task.content(i)
        texts.append("\n\n".join(marker + " ".join(words) for _, words, _, marker in blocks))
        low, high = (int(n) * 4.5 for n in bucket.split("-"))
        assert low <= len(texts[-1]) < high
        buckets[bucket] = buckets.get(bucket, 0) + 1
    assert buckets == {f"{n}-{n + 100}": pages for n, pages in FOX_PAGES.items()} and sum(buckets.values()) == 100
    assert 2700 <= min(map(len, texts)) and max(map(len, texts)) < 5850
    runs = [{tuple(words[k:k + 16]) for k in range(len(words) - 15)} for words in map(str.split, texts)]
    assert sum(map(len, runs)) == len(set().union(*runs))  # no sixteen words in a row stand on two pages
    one, other = task[0], fox_like(640)[0]
    assert one["messages"] == other["messages"] and one["messages"][1]["content"] == texts[0]  # one text at every size
    assert one["bucket"] in buckets and one["images"][0].size == (1024, 1024) and one["columns"] in (1, 2)


def test_splits_cannot_leak():
    held_out = held_out_words()
    for i in range(25):
        train = SynthPage("train", 999, 640, (500, 1500), seed=1)[i]
        assert held_out.isdisjoint(letters(text_of(train) + train["messages"][1]["content"].replace("td>", "")))
        only = SynthPage("heldout_words", 999, 640, (200, 800))[i]
        assert held_out >= set(letters(" ".join(re.sub("<.*?>", " ", box.text) for box in only["page"].boxes)))
        noise = SynthPage("random_chars", 99, 640, (200, 800))[i]["messages"][1]["content"]
        assert not re.search("[A-Z]{2}|the ", noise)
        chart = SynthChart("train", 999)[i]["messages"]
        assert held_out.isdisjoint(letters(chart[0]["content"][1]["text"] + " " + chart[1]["content"]))
    trained = " ".join(prose(False))
    assert len(prose_sentences(True)) > 50 and sum(" ".join(s) in trained for s in prose_sentences(True) if len(s) > 8) == 0
    dealt = [tuple(s) for i in range(100) for s in prose_sentences(True)[i::100]]
    assert sorted(dealt) == sorted(map(tuple, prose_sentences(True)))


@pytest.mark.parametrize("kind", LIMITS)
def test_each_damage_changes_pixels_and_not_the_truth(kind):
    clean, bad = (SynthPage("heldout", 9, 300, (100, 300), damage=d)[4] for d in (0, {kind: 1}))
    assert clean["messages"] == bad["messages"] and clean["images"][0].size == bad["images"][0].size
    assert bad["images"][0].mode == "L" and clean["images"][0].tobytes() != bad["images"][0].tobytes()
    assert clean["page"].truth == bad["page"].truth and annotation(bad["page"])["page_info"]["page_attribute"]["special_issue"]
    none = damage_image(clean["images"][0], parse_damage(0), 1, 12)
    assert none == (clean["images"][0], 0)


def test_a_turned_page_keeps_its_ink_and_its_polygons_follow():
    for i in range(8):
        c = SynthPage("heldout", 9, (400, 300), (300, 700), damage={"skew": 1})[i]
        page, levels = c["page"], np.asarray(c["images"][0])
        ink = Image.new("L", (page.width, page.height))
        for det in annotation(page)["layout_dets"]:
            assert min(det["poly"]) > 0 and max(det["poly"][::2]) < page.width and max(det["poly"][1::2]) < page.height
            ImageDraw.Draw(ink).polygon(det["poly"], fill=255)
        ink = ink.filter(ImageFilter.MaxFilter(3))  # half a pixel of interpolation
        assert (abs(levels[np.asarray(ink) == 0].astype(int) - page.paper) < 40).all() and page.skew


def test_charts_answer_their_question():
    texts = []
    for image_size in (64, (200, 120), 512):
        for c in SynthChart("heldout", 40, image_size):
            (user, answer), image = c["messages"], c["images"][0]
            question = user["content"][1]["text"]
            edge = np.asarray(image).min(2)
            assert set(np.unique(np.concatenate([edge[0], edge[-1], edge[:, 0], edge[:, -1]]))) <= {200, 255}  # gridlines at most
            assert image.mode == "RGB" and question.startswith("\n") and question.endswith("?") and 0 < len(answer["content"]) < 12
            numeric = re.match(r"\n(What|How many)", question)
            assert bool(re.fullmatch(r"\d+(\.\d)?", answer["content"])) == bool(numeric) or answer["content"].isdigit()  # or a year
            texts.append(question.split()[3])
    assert len(set(texts)) >= 4


def test_chart_values_are_those_drawn(monkeypatch):
    """The answer is printed in the chart, or follows from what is."""
    import random
    for seed in range(60):
        printed = []
        text = synthpage.ImageDraw.ImageDraw.text
        monkeypatch.setattr(synthpage.ImageDraw.ImageDraw, "text", lambda self, xy, s, *a, **k: (printed.append((xy, s)), text(self, xy, s, *a, **k)))
        image, question, answer = synthpage.draw_chart(random.Random(seed), 400, 300, "train")
        monkeypatch.undo()
        words = " ".join(s for _, s in printed).split()
        if "How many" not in question and "difference" not in question:
            assert answer in words
        elif "difference" in question:
            numbers = [float(w) for w in words if re.fullmatch(r"[\d.]+", w)]
            assert any(abs(abs(a - b) - float(answer)) < 1e-6 for a in numbers for b in numbers)


def test_a_persons_own_text(tmp_path):
    paragraphs = [f"Paragraf {k}: Größe <b> & Maß, {'wort ' * (k % 7)}zu drei- und vierstöckigen Häusern." for k in range(600)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs + ["漢字 gibt es nicht.", "Kein\u200bRaum.", "x" * 80]), encoding="utf-8")
    kinds, said = {"paragraph": 5, "table": 1, "list": 1}, {}
    for split in ("train", "heldout"):
        task = SynthPage(split, 50, 500, (300, 900), text_files=[tmp_path / "a.txt"], parts=kinds)
        said[split] = {k for c in task for k in re.findall(r"Paragraf (\d+):", c["messages"][1]["content"])}
        left_out = task.left_out
    assert not said["train"] & said["heldout"] and len(said["train"]) > 100 and len(said["heldout"]) > 10
    assert left_out + SynthPage("train", 1, 500, (300, 900), text_files=tmp_path / "a.txt").left_out == 3
    for c in SynthPage("train", 40, 400, (300, 900), columns=(2,), text_files=[tmp_path / "a.txt"]):
        whole = c["messages"][1]["content"]
        assert "drei-und" not in whole
        assert all(any(p.startswith(part) for p in paragraphs) for part in whole.split("\n\n") if re.match(r"Paragraf \d+:", part))


def test_own_text_that_cannot_be_used(tmp_path):
    def task(name, content=None, split="train", chars=(100, 200)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        return SynthPage(split, 1, chars=chars, text_files=[str(tmp_path / name)])
    with pytest.raises(FileNotFoundError, match="none.txt"):
        task("none.txt")
    with pytest.raises(ValueError, match="empty.txt is empty"):
        task("empty.txt", b" \n\n")
    with pytest.raises(ValueError, match="latin.txt is not UTF-8.*iconv"):
        task("latin.txt", "Größe".encode("latin1"))
    with pytest.raises(ValueError, match="5 characters of the split train, too few.*give more text"):
        task("short.txt", b"ab cde")
    with pytest.raises(ValueError, match="0 paragraphs in split 'random_chars'"):
        task("short.txt", b"ab cde", split="random_chars")
    with pytest.raises(ValueError, match="letters lacking '[字漢]"):
        task("kanji.txt", "漢字".encode())


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


def test_a_full_page_is_an_error_and_every_face_is_tried():
    with pytest.raises(PageFull, match="64x64 px.*raise image_size"):
        SynthPage("train", 1, 64, (900, 900))[0]
    task = SynthPage("train", 30, 300, (100, 200), faces=list(FACES))
    assert {c["face"] for c in task} == set(FACES)
    with pytest.raises(IndexError):
        task[30]
