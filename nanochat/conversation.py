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
import os

from PIL import Image, UnidentifiedImageError

OCR_PROMPT = "\nFree OCR."
MAX_PIXELS = 80_000_000  # a larger picture is refused before it is decoded; A4 at 600 dpi has 35 million
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000")  # not EPS: opening it would start Ghostscript


class BadSample(ValueError):
    """A row that cannot be used; the message names the data set, the row and the reason."""


def open_image(source, where):
    """
    PIL image, decoded whole (of several frames the first), from encoded bytes, a path, {"bytes":, "path":} (what `datasets` gives
    for an undecoded picture) or a PIL image. BadSample, which opens with `where`, if there is no such file or it is no sound picture.
    """
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, (str, os.PathLike)):
        where = f"{where}: {os.fspath(source)}"
        try:
            with open(source, "rb") as f:
                source = f.read()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:  # another OSError is not the row's fault
            raise BadSample(f"{where}: no such picture ({e.strerror})") from e
    if not isinstance(source, (bytes, Image.Image)):
        raise BadSample(f"{where}: a picture was expected, not {type(source).__name__}")
    try:
        image = Image.open(io.BytesIO(source), formats=FORMATS) if isinstance(source, bytes) else source
        width, height = image.size
        if width * height <= MAX_PIXELS:
            image.load()
            image.getexif()
            return image
    except Exception as e:  # PIL's decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, zlib.error, ...
        reason = "in no known format" if isinstance(e, UnidentifiedImageError) else f"{type(e).__name__}: {e}"
        raise BadSample(f"{where}: the picture cannot be read ({reason})") from e
    raise BadSample(f"{where}: a picture of {width}x{height} px is over the limit of {MAX_PIXELS:,} px")


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


def column(row, name, where, kind=object):
    """row[name], of that kind; a BadSample says what the row has instead."""
    if not isinstance(row, dict) or name not in row or not isinstance(row[name], kind):
        raise BadSample(f"{where} has no {kind.__name__} {name!r}, it has {str(row)[:200]}")
    return row[name]


def ocr_conversation(image, text, id, prompt=OCR_PROMPT, **extra):
    """One page as a conversation: the user shows `image` (PIL) and the prompt, the assistant answers with `text`."""
    user = [{"type": "image"}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": text}]
    return {"messages": messages, "images": [image], "id": id, **extra}
