"""
SmolTalk (Ben Allal et al. 2025): text-only chat, splits train and test. The large version,
HuggingFaceTB/smoltalk, has the same columns and needs a config, e.g. "all".
"""
from nanochat.conversation import column
from tasks.rows import Rows

REPO = "HuggingFaceTB/smol-smoltalk"  # 460 thousand conversations, made for small models


def to_conversation(row, where):
    """The messages as they are: perhaps a system message, then user and assistant in turn."""
    # A null role or text is refused here, where the message can still be named.
    messages = []
    for k, message in enumerate(column(row, "messages", where, list)):
        role = column(message, "role", f"{where}, message {k}", str)
        content = column(message, "content", f"{where}, message {k}", str)
        messages.append({"role": role, "content": content})
    attributes = {"source": row.get("source")}
    return {"messages": messages, "images": [], "id": where, "attributes": attributes}


class SmolTalk(Rows):
    def __init__(self, split="train", repo=REPO, config=None, **kwargs):
        super().__init__(repo, config, split, to_conversation, "messages", **kwargs)
