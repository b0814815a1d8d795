"""ChartQA (Masry et al. 2022) for evaluation: raw rows of a question and its accepted answers. To train: tasks/finevision.py, chartqa."""
from nanochat.conversation import column, ocr_conversation, open_image
from tasks.rows import Rows

REPO = "HuggingFaceM4/ChartQA"


def to_conversation(row, where):
    """The first answer is the truth, all of them are under `labels`; attributes["kind"] says who wrote the question."""
    query, labels = column(row, "query", where, str), column(row, "label", where, list)
    kind = ("human", "augmented")[bool(column(row, "human_or_machine", where, int))]
    if not labels or not isinstance(labels[0], str):
        raise ValueError(f"{where} has the answers {labels}: at least one text is needed")
    image = open_image(column(row, "image", where), where)
    return ocr_conversation(image, labels[0], where, "\n" + query, labels=labels, attributes={"kind": kind})


class ChartQA(Rows):
    def __init__(self, split="test", repo=REPO, **kwargs):
        super().__init__(repo, None, split, to_conversation, "query", **kwargs)
