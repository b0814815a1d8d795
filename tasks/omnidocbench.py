"""
OmniDocBench (Ouyang et al. 2024, arXiv 2412.07626): real document pages with blocks in reading
order, from the hub (pictures are fetched one by one, when they are asked for) or from a local
folder in the published layout:

    <path>/OmniDocBench.json         a list of pages: layout_dets, extra.relation, page_info
    <path>/images/<image_path>       one picture per page

v1.0 and v1.5 have the same keys. Absent keys and keys filled with None (as some JSON loaders leave
them) read alike.

The truth here is one string per page, for a whole-page edit distance. That is NOT the official
OmniDocBench score: the official evaluator pairs blocks, strips punctuation and spaces, and scores
text, tables and formulas apart. Quote a number from this task under a name of its own, and run the
official evaluator for a number to compare with papers.
"""
import json
import re
from pathlib import Path

from nanochat.conversation import OCR_PROMPT, Task, check_inside, ocr_conversation, open_image
from nanochat.hub import download
from nanochat.image_modes import to_rgb

QUIVR = "Quivr/OmniDocBench"  # annotated copy of v1.0, 981 pages
ORIGINAL = "opendatalab/OmniDocBench"  # v1.5, 1,355 pages

# Block categories of each kind, and the key that holds their content. The text kind is what the
# official evaluator scores as text. It matches captions, footnotes, headers, footers, page numbers
# and algorithms too, but then drops them from the score.
KINDS = {
    "text": {
        "text_block": "text",
        "title": "text",
        "code_txt": "text",
        "code_txt_caption": "text",
        "reference": "text",
    },
    "table": {"table": "html"},
    "equation": {"equation_isolated": "latex"},
}

# What is read of a block, where it has it. Ids and orders are numbers.
BLOCK = {"category_type": str, "text": str, "html": str, "latex": str, "order": (int, float),
         "anno_id": (int, float, str)}

# A hyphen, or a script that is written without spaces: CJK, kana, full-width forms.
NO_SPACE = re.compile("[-\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]")

# -----------------------------------------------------------------------------
# The truth of a page

def page_truth(page, kinds=("text",)):
    """
    The text of one page (a row of OmniDocBench.json): blocks of the wanted kinds in `order`, a
    blank line between them.

    Blocks without an order come first, as in the official code. Blocks marked `ignore` are left
    out. Blocks that extra.relation calls "truncated" become one block, with the category and place
    of the first. Text is kept as annotated, inline LaTeX included; "table" adds the HTML of tables,
    "equation" the LaTeX of displayed formulas.
    """
    content_key = {}
    for kind in kinds:
        content_key.update(KINDS[kind])

    # Everywhere here `or`, not a default of get(): the key may be there, with None.
    blocks = [block for block in page.get("layout_dets") or [] if not block.get("ignore")]
    blocks.sort(key=reading_order)  # stable, so that equal orders stay as annotated
    group_of = truncated_groups(page)

    texts = []
    joined = set()  # ids of the blocks that were written together with an earlier one
    for block in blocks:
        category = block["category_type"]
        if block.get("anno_id") in joined:
            continue
        # The category of the first piece decides for all of them.
        group = group_of.get(block.get("anno_id"))
        pieces = [block]
        if group is not None:
            pieces = [other for other in blocks if other.get("anno_id") in group]
            joined |= group
        if category in content_key:
            key = content_key[category]
            texts.append(join_pieces([piece.get(key) or "" for piece in pieces]))
    return "\n\n".join(text for text in texts if text)


def reading_order(block):
    return block.get("order") or 0  # None: figures, headers, page numbers and the like


def truncated_groups(page):
    """{anno_id: set of the ids of all blocks that were one block before a column or page break}."""
    groups = {}
    for relation in (page.get("extra") or {}).get("relation") or []:
        if relation["relation_type"] != "truncated":
            continue
        source = relation["source_anno_id"]
        target = relation["target_anno_id"]
        # Either may already be in a group: a block can be cut into three and more.
        group = groups.get(source, {source}) | groups.get(target, {target})
        for anno_id in group:
            groups[anno_id] = group
    return groups


def join_pieces(pieces):
    """
    The pieces of one block as one text. The official evaluator joins them with nothing, since it
    drops spaces anyway. Here spaces count: "New" and "Mexico" must not become "NewMexico".
    """
    text = ""
    for piece in pieces:
        piece = piece.strip()
        # After a hyphen no space: "inter-" + "national" stays as printed, hyphen included.
        if text and piece and not NO_SPACE.match(text[-1]):
            text += " "
        text += piece
    return text


# -----------------------------------------------------------------------------
# The task

class OmniDocBench(Task):
    """
    One conversation per page, with extra keys `attributes` (page_attribute: data_source, language,
    layout, special_issue) and `image_name`, which is also the id.

    path: a local folder, or QUIVR or ORIGINAL on the hub. kinds: of blocks in the truth, see KINDS.
    Pages whose truth is empty are kept, since a model should write nothing there; `empty_pages`
    counts them. Raises FileNotFoundError or ValueError, with the path and row, for a missing or
    broken JSON or picture.
    """
    def __init__(self, path=QUIVR, kinds=("text",), prompt=OCR_PROMPT):
        unknown = [kind for kind in kinds if kind not in KINDS]
        if isinstance(kinds, str) or unknown or not kinds:
            raise ValueError(f"kinds={kinds!r}: give a tuple of one or more of {', '.join(KINDS)}, "
                             "as in ('text',)")
        self.path = Path(path)
        self.prompt = prompt
        json_path = self.fetch("OmniDocBench.json", "OmniDocBench.json is missing")
        self.pages = read_pages(json_path)
        # All truths now, from the annotation alone: pictures are downloaded one by one, later.
        self.truths = []
        for row, page in enumerate(self.pages):
            try:
                self.truths.append(page_truth(page, kinds))
            except KeyError as error:
                raise ValueError(f"OmniDocBench: a block or relation in row {row} of {json_path} "
                                 f"has no key {error}") from error

    def __len__(self):
        return len(self.pages)

    def truth(self, i):
        return self.truths[i]

    def image_name(self, i):
        return self.pages[i]["page_info"]["image_path"]

    def attributes(self, i):
        return self.pages[i]["page_info"].get("page_attribute") or {}

    @property
    def empty_pages(self):
        return self.truths.count("")

    def __getitem__(self, i):
        self.check_index(i)
        name = self.image_name(i)
        return ocr_conversation(self.picture(i), self.truths[i], name, self.prompt,
                                attributes=self.attributes(i), image_name=name)

    def picture(self, i):
        """The page upright and in RGB."""
        # Width and height in the JSON are not used: on some pages they are swapped.
        name = f"images/{self.image_name(i)}"
        path = self.fetch(name, f"row {i} has no picture")
        return to_rgb(open_image(path, f"OmniDocBench: row {i}: {self.path}/{name}"))

    def fetch(self, name, problem):
        """Path of a file of the benchmark, downloaded if it is not there yet."""
        try:
            return Path(download(str(self.path), name, "dataset"))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"OmniDocBench: {problem} ({error}): give a folder with OmniDocBench.json and "
                f"images/, or {QUIVR} or {ORIGINAL}") from error


def read_pages(path):
    """The list of pages of OmniDocBench.json, each with a picture's name."""
    try:
        pages = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"OmniDocBench: {path} is not valid JSON ({error}); "
                         "fetch it again") from error
    if not isinstance(pages, list) or not pages:
        raise ValueError(f"OmniDocBench: {path} holds a {type(pages).__name__}, "
                         "expected a list of one or more pages")
    for row, page in enumerate(pages):
        check_page(page, f"OmniDocBench: row {row} of {path}")
    return pages


def check_page(page, where):
    """ValueError that names the key, unless everything that is read of a page has its type."""
    def value(record, key, kind, name):
        found = record.get(key) if isinstance(record, dict) else None
        if found is not None and not isinstance(found, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            needed = " or ".join(k.__name__ for k in kinds)
            raise ValueError(f"{where}: {name} is {repr(found)[:80]}, need {needed}")
        return found

    info = value(page, "page_info", dict, "page_info")
    name = value(info, "image_path", str, "page_info.image_path")
    if not name:
        raise ValueError(f"{where} has no page_info.image_path")
    check_inside(name, where)
    value(info, "page_attribute", dict, "page_info.page_attribute")

    blocks = value(page, "layout_dets", list, "layout_dets") or []
    for k, block in enumerate(blocks):
        if not isinstance(block, dict):
            raise ValueError(f"{where}: layout_dets[{k}] is {repr(block)[:80]}, need a dict")
        for key, kind in BLOCK.items():
            value(block, key, kind, f"layout_dets[{k}].{key}")

    extra = value(page, "extra", dict, "extra")
    for k, relation in enumerate(value(extra, "relation", list, "extra.relation") or []):
        if not isinstance(relation, dict):
            raise ValueError(f"{where}: extra.relation[{k}] is {repr(relation)[:80]}, need a dict")
        for key in ("source_anno_id", "target_anno_id"):
            value(relation, key, BLOCK["anno_id"], f"extra.relation[{k}].{key}")
