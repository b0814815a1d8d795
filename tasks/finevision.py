"""
FineVision (Wiedmann et al. 2025): any of its configs by name, e.g. chartqa,
olmOCR-mix-0225-documents, olmOCR-mix-0225-books. A row has pictures (or none) and one or more
turns. Its only split is train: hold rows out by part="val", or by start and stop.
"""
from functools import partial

from nanochat.conversation import OCR_PROMPT, BadSample, column, open_image
from tasks.rows import Rows

REPO = "HuggingFaceM4/FineVision"

# Configs whose answers are the text of the page. Their instructions are replaced by the prompt of
# our rendered pages and benchmarks, so that a model is evaluated with what it was trained with.
TRANSCRIBED = ("olmOCR-mix-0225-documents", "olmOCR-mix-0225-books")


def to_conversation(row, where, prompt=None):
    """
    Every turn and every picture of a row, the pictures before the first question. Its ratings are
    not used (they may be null). prompt: asked in place of the first question.
    """
    # Columns are addressed by name, since their order differs between configs. `images` is null in
    # configs of text alone.
    images = []
    for k, image in enumerate(column(row, "images", where) or []):
        images.append(open_image(image, f"{where}, picture {k}"))

    # A turn is {"user": question, "assistant": answer}.
    messages = []
    for k, turn in enumerate(column(row, "texts", where) or []):
        for role in ("user", "assistant"):
            content = column(turn, role, f"{where}, turn {k}", str)
            messages.append({"role": role, "content": content})
    if not messages:
        raise BadSample(f"{where} has no turns in texts")

    # The rows do not say where in the text a picture belongs.
    if images:
        question = prompt or "\n" + messages[0]["content"]
        text = {"type": "text", "text": question}
        messages[0]["content"] = [{"type": "image"}] * len(images) + [text]
    attributes = {"source": row.get("source")}
    return {"messages": messages, "images": images, "id": where, "attributes": attributes}


class FineVision(Rows):
    def __init__(self, config, repo=REPO, **kwargs):
        prompt = OCR_PROMPT if config in TRANSCRIBED else None
        convert = partial(to_conversation, prompt=prompt)
        super().__init__(repo, config, "train", convert, "texts", **kwargs)
