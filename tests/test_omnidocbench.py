"""
Proves that the truth of an OmniDocBench page holds the blocks that count, in reading order,
whichever way absent keys are written; that pictures arrive upright in RGB; and that what is missing
or broken is named. The last tests read the eight real demo pages and are skipped without them.

    python -m pytest tests/test_omnidocbench.py
"""
import json
from pathlib import Path

import pytest
from PIL import Image

from nanochat.metrics import score_page
from tasks.omnidocbench import OmniDocBench, page_truth

DEMO = Path(__file__).parents[1].parent / "shared/data/omnidocbench_demo"
ALL_KINDS = ("text", "table", "equation")

# -----------------------------------------------------------------------------
# Pages made here


def block(category, order, anno_id, ignore=False, **content):
    return {
        "category_type": category,
        "poly": [0] * 8,
        "ignore": ignore,
        "order": order,
        "anno_id": anno_id,
        **content,
    }


def page(*blocks, relation=(), image_path="a.png"):
    info = {
        "page_attribute": {"language": "english"},
        "page_no": 1,
        "height": 20,
        "width": 10,
        "image_path": image_path,
    }
    return {"layout_dets": list(blocks), "extra": {"relation": list(relation)}, "page_info": info}


def truncated(source, target):
    return {"source_anno_id": source, "target_anno_id": target, "relation_type": "truncated"}


# Categories that the official evaluator matches and then drops from the score.
DROPPED = ("footer", "page_number", "page_footnote", "figure_caption", "table_caption",
           "equation_caption", "table_footnote", "figure_footnote", "code_algorithm", "abandon")
MIXED = page(
    block("text_block", 4, 14, text="Last."),
    block("header", None, 15, text="HEADER"),
    block("title", 1, 11, text="A Title"),
    block("equation_isolated", 2, 12, latex="$$\nx=1\n$$"),
    block("table", 3, 13, html="<table></table>", latex="no"),
    block("text_block", 5, 16, ignore=True, text="IGNORED"),
    *[block(category, 6, 20 + i, text=category.upper()) for i, category in enumerate(DROPPED)],
    block("figure", None, 40),
    block("code_txt", 7, 41, text="x = 1"),
    block("code_txt_caption", 8, 42, text="Listing"),
    block("reference", 9, 43, text="[1] Ref"),
)


@pytest.fixture
def folder(tmp_path):
    """A function: pages -> a benchmark folder of them, with a 10 x 20 picture for each."""
    def write(*pages):
        (tmp_path / "images").mkdir(exist_ok=True)
        for row in pages:
            Image.new("L", (10, 20), 200).save(tmp_path / "images" / row["page_info"]["image_path"])
        (tmp_path / "OmniDocBench.json").write_text(json.dumps(pages), encoding="utf-8")
        return tmp_path
    return write


def test_what_counts_and_in_which_order():
    assert page_truth(MIXED) == "A Title\n\nLast.\n\nx = 1\n\nListing\n\n[1] Ref"
    assert page_truth(MIXED, ALL_KINDS) == (
        "A Title\n\n$$\nx=1\n$$\n\n<table></table>\n\nLast.\n\nx = 1\n\nListing\n\n[1] Ref")
    assert page_truth(MIXED, ("table",)) == "<table></table>"


def test_keys_filled_with_none_read_as_absent():
    """datasets 5.x leaves absent keys out, 4.x fills them with None."""
    keys = ("text", "html", "latex", "merge_list", "attribute", "line_with_spans")
    filled = [{**dict.fromkeys(keys), **det} for det in MIXED["layout_dets"]]
    assert page_truth({**MIXED, "layout_dets": filled}, ALL_KINDS) == page_truth(MIXED, ALL_KINDS)
    for extra in ({}, {"extra": None}, {"extra": {"relation": None}}):
        bare = {"page_info": MIXED["page_info"], "layout_dets": MIXED["layout_dets"], **extra}
        assert page_truth(bare) == page_truth(MIXED)


def test_truncated_blocks_become_one():
    blocks = (
        block("text_block", 3, 3, text="Mexico and"),
        block("title", 2, 2, text="Between"),
        block("text_block", 1, 1, text="New"),
        block("text_block", 4, 4, text="more."),
    )

    def truth(*relation):
        return page_truth(page(*blocks, relation=relation))

    assert truth(truncated(1, 3)) == "New Mexico and\n\nBetween\n\nmore."
    # Three blocks, in any order of relations
    assert truth(truncated(3, 4), truncated(1, 3)) == "New Mexico and more.\n\nBetween"
    assert truth(truncated(1, 3), truncated(3, 4)) == "New Mexico and more.\n\nBetween"
    # Other relations join nothing
    son = {**truncated(1, 3), "relation_type": "parent_son"}
    assert truth(son) == "New\n\nBetween\n\nMexico and\n\nmore."


def test_truncated_glue():
    def joined(a, b):
        first = block("text_block", 1, 1, text=a)
        second = block("text_block", 2, 2, text=b)
        return page_truth(page(first, second, relation=[truncated(1, 2)]))

    assert joined("场子设在", "村边") == "场子设在村边"
    assert joined("inter-", "national") == "inter-national"
    assert joined("one ", " two") == "one two"


# -----------------------------------------------------------------------------
# The task


def test_conversation(folder):
    task = OmniDocBench(folder(MIXED, page(block("figure", None, 1), image_path="b.png")))
    assert len(task) == 2 and task.empty_pages == 1
    first, second = task  # a plain loop ends
    user, assistant = first["messages"]
    assert user["content"] == [{"type": "image"}, {"type": "text", "text": "\nFree OCR."}]
    assert assistant == {"role": "assistant", "content": page_truth(MIXED)}
    assert first["id"] == first["image_name"] == "a.png"
    assert first["attributes"] == {"language": "english"}
    assert first["images"][0].mode == "RGB" and first["images"][0].size == (10, 20)
    assert second["messages"][1]["content"] == ""
    other_prompt = OmniDocBench(task.path, prompt="\nRead.")[0]
    assert other_prompt["messages"][0]["content"][1]["text"] == "\nRead."


def test_a_page_is_known_without_opening_its_picture(folder):
    task = OmniDocBench(folder(MIXED))
    (task.path / "images" / "a.png").unlink()
    assert task.truth(0) == page_truth(MIXED) and task.image_name(0) == "a.png"
    assert task.answer_metric is None


def test_exif_orientation(folder):
    path = folder(page(image_path="turned.jpg"))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    Image.new("RGB", (20, 10)).save(path / "images" / "turned.jpg", exif=exif)
    assert OmniDocBench(path)[0]["images"][0].size == (10, 20)


def test_pictures_missing_or_broken(folder):
    task = OmniDocBench(folder(*(page(image_path=f"{i}.png") for i in range(3))))
    (task.path / "images" / "0.png").unlink()
    (task.path / "images" / "1.png").write_bytes(b"no picture")
    whole = (task.path / "images" / "2.png").read_bytes()
    (task.path / "images" / "2.png").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(FileNotFoundError, match=r"OmniDocBench: row 0 .*images/0\.png"):
        task[0]
    for i in (1, 2):
        with pytest.raises(ValueError, match=rf"OmniDocBench: row {i}: .*images/{i}\.png"):
            task[i]


def test_json_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"OmniDocBench\.json is missing"):
        OmniDocBench(tmp_path)


@pytest.mark.parametrize("text, error", [
    ("{", "not valid JSON"),
    ("{}", "holds a dict"),
    ("[]", "one or more pages"),
    ('[{"layout_dets": [], "page_info": {}}]', "row 0 .* no page_info.image_path"),
    (json.dumps([page({"order": 1})]), "row 0 .*'category_type'"),
])
def test_json_broken(tmp_path, text, error):
    (tmp_path / "OmniDocBench.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=error):
        OmniDocBench(tmp_path)


@pytest.mark.parametrize("change, error", [
    ({"page_info": []}, "page_info is \\[\\], need dict"),
    ({"page_info": {"image_path": 7}}, "page_info.image_path is 7, need str"),
    ({"page_info": {"image_path": "../a.png"}}, "../a.png is outside of the data set's folder"),
    ({"layout_dets": {}}, "layout_dets is {}, need list"),
    ({"layout_dets": [3]}, r"layout_dets\[0\] is 3, need a dict"),
    ({"layout_dets": [{"category_type": "title", "order": "x"}]}, r"\[0\].order is 'x', need int"),
    ({"layout_dets": [{"category_type": "title", "text": 3}]}, r"\[0\].text is 3, need str"),
    ({"layout_dets": [{"category_type": []}]}, r"\[0\].category_type is \[\], need str"),
    ({"extra": 3}, "extra is 3, need dict"),
    ({"extra": {"relation": ["x"]}}, r"extra.relation\[0\] is 'x', need a dict"),
])
def test_a_mistyped_key_is_named(tmp_path, change, error):
    (tmp_path / "OmniDocBench.json").write_text(json.dumps([page(), {**page(), **change}]))
    with pytest.raises(ValueError, match=rf"row 1 of .*OmniDocBench.json.*{error}"):
        OmniDocBench(tmp_path)


@pytest.mark.parametrize("kinds", ["text", (), ("text", "figure")])
def test_unknown_kinds(kinds):
    with pytest.raises(ValueError, match="text, table, equation"):
        OmniDocBench("anywhere", kinds=kinds)


# -----------------------------------------------------------------------------
# Real pages, checked by eye against the pictures

needs_demo = pytest.mark.skipif(not DEMO.is_dir(), reason="no OmniDocBench demo pages here")


@pytest.fixture
def demo_truths():
    """{file name: text}"""
    task = OmniDocBench(DEMO)
    assert len(task) == 8 and task.empty_pages == 0
    return {task.image_name(i): task.truth(i) for i in range(8)}


def in_order(text, *pieces):
    places = [text.index(piece) for piece in pieces]
    return places == sorted(places)


@needs_demo
def test_a_newspaper(demo_truths):
    text = demo_truths["newspaper_5e266dfd9c498cab274e12a7b4a75755_4.jpg"]
    assert text.startswith("The regulation provides that")
    assert "northwestern New Mexico, as well" in text  # across a column break
    assert in_order(text, "Robbie McAboy.", "Notice of termination", "New Mexico,")
    assert "Federal Register/ Vol. 89" not in text and "57165" not in text  # the running head


@needs_demo
def test_a_sheet_of_questions(demo_truths):
    text = demo_truths["jiaocaineedrop_Chapter9.pdf_46.jpg"]
    questions = [f"{n}. " for n in range(1, 8)]
    assert in_order(text, *questions)  # down the left column, then the right
    assert in_order(text, "dishes?", "A $ \\frac{1}{3} $", "4. ")
    assert "Birthday Money" not in text  # a table
    assert "Use Factors and Multiples" not in text  # a footer


@needs_demo
def test_a_slide(demo_truths):
    text = demo_truths["yanbaopptmerge_yanbaoPPT_145.jpg"]
    assert text.startswith("暖风熏得游人醉\n\n")  # its title
    assert "深入赏析" not in text  # its header


@needs_demo
def test_real_pages_with_tables_and_equations():
    text = OmniDocBench(DEMO)
    whole = OmniDocBench(DEMO, kinds=ALL_KINDS)
    assert [i for i in range(8) if text.truth(i) != whole.truth(i)] == [2, 4, 5, 6]
    paper = whole.truth(2)
    assert in_order(paper, "Poisson brackets", "\\Pi^{U} ( y )", "etc., we find")
    assert "(13)" not in paper  # an equation's number is a caption
    assert "Birthday Money</th>" in whole.truth(4)


@needs_demo
def test_real_pictures_and_a_perfect_reader():
    task = OmniDocBench(DEMO, kinds=ALL_KINDS)
    assert task[7]["images"][0].size == (612, 792)
    for i in range(8):
        figures = score_page(task.truth(i), task.truth(i), by_character=True)
        assert figures["one_minus_ned"] == figures["f1"] == 1.0 and not figures["repetition"]
