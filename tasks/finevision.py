"""
FineVision: any of its configs by name, e.g. chartqa, olmOCR-mix-0225-documents, olmOCR-mix-0225-books. A row has pictures (or none) and one
or more turns. The one split is train: hold rows out by part="val", or by start and stop.
"""
from nanochat.conversation import column, open_image
from tasks.rows import Rows

REPO = "HuggingFaceM4/FineVision"


def to_conversation(row, where):
    """Every turn and every picture of a row, the pictures before the first question. Ratings are not used (they may be null)."""
    images = [open_image(image, f"{where}, picture {k}") for k, image in enumerate(column(row, "images", where) or [])]
    messages = [{"role": role, "content": column(turn, role, f"{where}, turn {k}", str)}
                for k, turn in enumerate(column(row, "texts", where) or []) for role in ("user", "assistant")]
    if not messages:
        raise ValueError(f"{where} has no turns in texts")
    if images:
        messages[0]["content"] = [{"type": "image"}] * len(images) + [{"type": "text", "text": "\n" + messages[0]["content"]}]
    return {"messages": messages, "images": images, "id": where, "attributes": {"source": row.get("source")}}


class FineVision(Rows):
    def __init__(self, config, repo=REPO, **kwargs):
        super().__init__(repo, config, "train", to_conversation, "texts", **kwargs)
