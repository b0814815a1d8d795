"""
ChartQA (Masry et al. 2022, arXiv 2203.10244) for evaluation: a chart, a question and its accepted
answers. To train on charts: tasks/finevision.py, config chartqa.
"""
from nanochat.conversation import BadSample, column, ocr_conversation, open_image
from tasks.rows import Rows

REPO = "HuggingFaceM4/ChartQA"


def accepted_answers(row, where):
    """list of one or more texts, of which the first is scored."""
    answers = column(row, "label", where, list)
    if not answers or not isinstance(answers[0], str):
        raise BadSample(f"{where} has the answers {answers}: at least one text is needed")
    return answers


def asked_by(row, where):
    by_machine = column(row, "human_or_machine", where, int)  # 0 = human, 1 = machine
    return {"kind": "augmented" if by_machine else "human"}


def to_conversation(row, where):
    """The first answer is the truth. attributes["kind"] says who wrote the question."""
    question = column(row, "query", where, str)
    answers = accepted_answers(row, where)
    image = open_image(column(row, "image", where), where)
    return ocr_conversation(image, answers[0], where, prompt="\n" + question,
                            answers=answers, attributes=asked_by(row, where))


class ChartQA(Rows):
    answer_metric = "relaxed_accuracy"  # numbers may be off by 5 %

    def __init__(self, split="test", repo=REPO, **kwargs):
        super().__init__(repo, None, split, to_conversation, "query", **kwargs)

    def truth(self, i):
        try:
            return accepted_answers(self.row(i), self.where(i))[0]
        except BadSample:
            return None  # task[i] says what is wrong with the row

    def attributes(self, i):
        try:
            return asked_by(self.row(i), self.where(i))
        except BadSample:
            return {}
