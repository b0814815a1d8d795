"""
OmniDocBench (Ouyang et al. 2024, arXiv 2412.07626): real document pages with blocks in reading order, from the hub
(pictures are fetched one by one, when they are asked for) or a local folder in the published layout:

    <path>/OmniDocBench.json         a list of pages: layout_dets, extra.relation, page_info
    <path>/images/<image_path>       one picture per page

The keys of v1.0 and v1.5 are the same. Absent keys and keys filled with None (as some JSON loaders leave them) read
alike.

The truth here is one string per page, for a whole-page edit distance. That is NOT the official OmniDocBench score:
the official evaluator pairs blocks, strips punctuation and spaces, and scores text, tables and formulas apart. Quote a
number from this task under a name of its own, and run the official evaluator for a number to compare with papers.
"""

import json
import re
from pathlib import Path

from nanochat.hub import download
from nanochat.image_modes import to_rgb
from nanochat.conversation import OCR_PROMPT, Task, ocr_conversation, open_image

QUIVR, ORIGINAL = "Quivr/OmniDocBench", "opendatalab/OmniDocBench"  # annotated copy of v1.0 (981 pages); v1.5 (1,355 pages)

# Block categories of each kind, and the key that holds their content. The text kind is what the official evaluator
# scores as text: captions, footnotes, headers, footers, page numbers and algorithms are matched there, then dropped.
TEXT_CATEGORIES = ("text_block", "title", "code_txt", "code_txt_caption", "reference")
KINDS = {
    "text": dict.fromkeys(TEXT_CATEGORIES, "text"),
    "table": {"table": "html"},
    "equation": {"equation_isolated": "latex"},
}
NO_SPACE = re.compile("[-\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]")  # a hyphen, or a script written without spaces


def _join(pieces):
    """Pieces of one block that a column or page break cut. The official evaluator joins them with nothing, since it
    drops spaces anyway; here spaces count, so a word does not grow into the next ('New' + 'Mexico')."""
    text = ""
    for piece in filter(None, map(str.strip, pieces)):
        glue = "" if not text or NO_SPACE.match(text[-1]) else " "
        text += glue + piece
    return text


def page_truth(page, kinds=("text",)):
    """
    The text of one page (a row of OmniDocBench.json): blocks of the wanted kinds in `order`, a blank line between.

    A block without an order comes first, as in the official code. Blocks marked `ignore` are left out. Blocks that
    extra.relation calls "truncated" become one block, with the category and place of the first. Text is kept as
    annotated, inline LaTeX included; "table" adds the HTML of tables, "equation" the LaTeX of displayed formulas.
    """
    content_key = {category: key for kind in kinds for category, key in KINDS[kind].items()}
    blocks = [block for block in page.get("layout_dets") or [] if not block.get("ignore")]
    blocks.sort(key=lambda block: block.get("order") or 0)

    parts_of = {}  # anno_id -> the ids of all blocks it was one block with
    for relation in (page.get("extra") or {}).get("relation") or []:
        if relation["relation_type"] == "truncated":
            source, target = relation["source_anno_id"], relation["target_anno_id"]
            joined = parts_of.get(source, {source}) | parts_of.get(target, {target})  # chains of three and more
            parts_of.update(dict.fromkeys(joined, joined))

    texts, done = [], set()
    for block in blocks:
        anno_id, category = block.get("anno_id"), block["category_type"]
        if anno_id in done:
            continue
        parts = [block]
        if anno_id in parts_of:
            parts = [other for other in blocks if other.get("anno_id") in parts_of[anno_id]]
            done |= parts_of[anno_id]
        if category in content_key:
            texts.append(_join(part.get(content_key[category]) or "" for part in parts))
    return "\n\n".join(filter(None, texts))


class OmniDocBench(Task):
    """
    One conversation per page, with extra keys `attributes` (page_attribute: data_source, language, layout,
    special_issue) and `image_name`, which is also the id.

    Pages whose truth is empty are kept, since a model should write nothing there; `empty_pages` counts them.
    `truths` and `image_names` are the texts and names by row, without opening a picture. path: a local folder, or QUIVR or
    ORIGINAL on the hub.
    Raises FileNotFoundError or ValueError, with the path and row, for a missing or broken JSON or picture.
    """

    def __init__(self, path=QUIVR, kinds=("text",), prompt=OCR_PROMPT):
        unknown = [kind for kind in kinds if kind not in KINDS]
        if isinstance(kinds, str) or unknown or not kinds:
            raise ValueError(f"kinds={kinds!r}: give a tuple of one or more of {', '.join(KINDS)}, as in ('text',)")
        self.path, self.prompt = Path(path), prompt
        json_path = self._file("OmniDocBench.json", "OmniDocBench.json is missing")
        try:
            self.pages = json.loads(json_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"OmniDocBench: {json_path} is not valid JSON ({error}); fetch it again") from error
        if not isinstance(self.pages, list) or not self.pages:
            raise ValueError(f"OmniDocBench: {json_path} holds a {type(self.pages).__name__}, "
                             "expected a list of one or more pages")
        self.truths = []
        for row, page in enumerate(self.pages):
            if not isinstance(page, dict) or not (page.get("page_info") or {}).get("image_path"):
                raise ValueError(f"OmniDocBench: row {row} of {json_path} has no page_info.image_path")
            try:
                self.truths.append(page_truth(page, kinds))
            except KeyError as error:
                raise ValueError(f"OmniDocBench: a block or relation in row {row} of {json_path} "
                                 f"has no key {error}") from error

    def __len__(self):
        return len(self.pages)

    def __getitem__(self, i):
        self.check_index(i)
        info = self.pages[i]["page_info"]
        return ocr_conversation(self._image(i), self.truths[i], info["image_path"], prompt=self.prompt,
                                attributes=info.get("page_attribute") or {}, image_name=info["image_path"])

    @property
    def empty_pages(self):
        return sum(not truth for truth in self.truths)

    @property
    def image_names(self):
        return [page["page_info"]["image_path"] for page in self.pages]

    def _file(self, name, problem):
        try:
            return Path(download(str(self.path), name, "dataset"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"OmniDocBench: {problem} ({error}): give a folder with OmniDocBench.json and images/, "
                                    f"or {QUIVR} or {ORIGINAL}") from error

    def _image(self, i):
        """The page upright and in RGB. Width and height in the JSON are not used: some pages have them swapped."""
        name = f"images/{self.pages[i]['page_info']['image_path']}"
        return to_rgb(open_image(self._file(name, f"row {i} has no picture"), f"OmniDocBench: row {i}: {self.path}/{name}"))
