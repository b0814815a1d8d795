"""
ChartQA (Masry et al. 2022) for evaluation: raw HuggingFaceM4/ChartQA, a question and its accepted answers a row. Training rows come
from FineVision's config chartqa (tasks/finevision.py).
"""
from tasks.common import column, ocr_conversation, open_image
from tasks.rows import Rows

REPO = "HuggingFaceM4/ChartQA"
KINDS = ("human", "augmented")  # who wrote the question: 0 and 1 in human_or_machine


def to_conversation(row, where):
    """The first answer is the truth; all of them are under `labels`, human or augmented under attributes["kind"]."""
    query, labels, kind = (column(row, name, where) for name in ("query", "label", "human_or_machine"))
    if not isinstance(query, str) or not labels or not all(isinstance(label, str) for label in labels) or kind not in (0, 1):
        raise ValueError(f"{where}: query {query!r}, label {labels!r} and human_or_machine {kind!r} must be a text, texts, and 0 or 1")
    return ocr_conversation(open_image(column(row, "image", where), where), labels[0], where, prompt="\n" + query, labels=labels,
                            attributes={"kind": KINDS[kind]})


class ChartQA(Rows):
    def __init__(self, split="test", repo=REPO, **rows):
        super().__init__(repo, None, split, to_conversation, "query", **rows)
