"""
The one conversation format, and the base class of every task.

    {"messages": [{"role": "system" | "user" | "assistant", "content": str | [part, ...]}, ...],
     "images": [PIL.Image, ...],
     "id": str,
     ...}                                   # a task may add keys of its own

A part is {"type": "text", "text": str} or {"type": "image"}; the n-th image part of a conversation is images[n].
An optional system message comes first, then user and assistant take turns. A text-only conversation has images=[].
"""
import io
import warnings

from PIL import Image

OCR_PROMPT = "\nFree OCR."


class Task:
    """A map-style data set: task[i] is a conversation, and depends on nothing but the task's arguments and i."""

    def __len__(self):
        raise NotImplementedError

    def __getitem__(self, i):
        raise NotImplementedError

    def check_index(self, i):
        """IndexError unless 0 <= i < len(self), so that a plain for loop over a task ends."""
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} is outside this {type(self).__name__} of {len(self)} items")


def open_image(source, where):
    """
    bytes, a path, {"bytes", "path"} as `datasets` leaves a picture it does not decode, or a PIL image -> PIL image, loaded whole.
    ValueError that names `where` for what is absent, broken or over PIL's limit of pixels.
    """
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, AttributeError, Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ValueError(f"{where} is not a readable picture ({type(e).__name__}: {e})") from e


def column(row, name, where, kind=object):
    """row[name], of that kind; a ValueError says what the row has instead."""
    if not isinstance(row, dict) or name not in row or not isinstance(row[name], kind):
        raise ValueError(f"{where} has no {kind.__name__} {name!r}, it has {str(row)[:200]}")
    return row[name]


def ocr_conversation(image, text, id, prompt=OCR_PROMPT, **extra):
    """One page as a conversation: the user shows `image` (PIL) and the prompt, the assistant answers with `text`."""
    user = [{"type": "image"}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": text}]
    return {"messages": messages, "images": [image], "id": id, **extra}
