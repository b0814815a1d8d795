"""SmolTalk: text-only chat, splits train and test. The large HuggingFaceTB/smoltalk has the same columns and needs a config, e.g. "all"."""
from nanochat.conversation import column
from tasks.rows import Rows

REPO = "HuggingFaceTB/smol-smoltalk"


def to_conversation(row, where):
    """The messages as they are: perhaps one of the system first, then user and assistant in turn."""
    messages = [{key: column(message, key, f"{where}, message {k}", str) for key in ("role", "content")}
                for k, message in enumerate(column(row, "messages", where, list))]
    return {"messages": messages, "images": [], "id": where, "attributes": {"source": row.get("source")}}


class SmolTalk(Rows):
    def __init__(self, split="train", repo=REPO, config=None, **kwargs):
        super().__init__(repo, config, split, to_conversation, "messages", **kwargs)
