"""
The one conversation format, and the base class of every task.

    {"messages": [{"role": "system" | "user" | "assistant", "content": str | [part, ...]}, ...],
     "images": [PIL.Image, ...],
     "id": str,
     "labels": [{kind: [(value, x, y), ...]}, ...],   # optional, one dict per image
     ...}                                             # a task may add keys of its own

A part is {"type": "text", "text": str} or {"type": "image"}. The n-th image part of a conversation
is images[n]. An optional system message comes first, then user and assistant take turns. A
text-only conversation has images=[].

Labels say what is where on an image, for auxiliary losses. (x, y) is in px of the upright image as
the task gives it. Kind "glyphs": value is one printed character, (x, y) the center of its ink.
"""
import io
import os
from functools import cached_property

from PIL import Image, UnidentifiedImageError

OCR_PROMPT = "\nFree OCR."

# Larger pictures are refused before they are decoded. A4 at 600 dpi has 35 million pixels.
MAX_PIXELS = 80_000_000

# Formats that PIL may open. EPS is left out: PIL would start Ghostscript on a file from outside.
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000")


class BadSample(ValueError):
    """A row that cannot be used. The message names the data set, the row and the reason."""


# -----------------------------------------------------------------------------
# Tasks

class Task:
    """
    A map-style data set: task[i] is a conversation that depends only on the task's arguments and i.

    A subclass defines __len__ and __getitem__. What follows has defaults:
    name           its samples are counted under this name in the logs
    answer_metric  how an evaluation scores its answers: None for pages to transcribe,
                   "relaxed_accuracy" for questions with a short answer (ChartQA's metric)
    """
    answer_metric = None

    @cached_property  # not a plain property: a subclass may assign self.name
    def name(self):
        return type(self).__name__

    def __len__(self):
        raise NotImplementedError

    def __getitem__(self, i):
        raise NotImplementedError

    def truth(self, i):
        """
        The text of a perfect answer to sample i, or None if it is not known without making the
        sample. Evaluation asks for it when sample i cannot be made: this never opens a picture.
        """
        return None

    def image_name(self, i):
        """File name of sample i's picture, or None where the pictures are not files."""
        return None

    def attributes(self, i):
        """What is known of sample i without opening its picture (language, layout, ...), a dict."""
        return {}

    def fingerprint(self):
        """
        A short text that changes when the samples change; None for samples that depend on the
        task's arguments alone.
        """
        return None

    def check_index(self, i):
        """IndexError unless 0 <= i < len(self): this is what ends a plain for loop over a task."""
        if not 0 <= i < len(self):
            name = type(self).__name__
            raise IndexError(f"index {i} is out of range: {name} has {len(self)} items")


def ocr_conversation(image, text, id, prompt=OCR_PROMPT, **extra):
    """One page: the user shows `image` (PIL) and the prompt, the assistant answers with `text`."""
    user = [{"type": "image"}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": text}]
    return {"messages": messages, "images": [image], "id": id, **extra}


def truth_of(conversation):
    """What the assistant should have said last: the text that an evaluation compares with."""
    return conversation["messages"][-1]["content"]


# -----------------------------------------------------------------------------
# Reading rows

def column(row, name, where, kind=object):
    """row[name], which must be of type `kind`. If not, BadSample shows what the row has."""
    if not isinstance(row, dict) or name not in row or not isinstance(row[name], kind):
        # Cut short: a row may hold a whole picture as bytes.
        raise BadSample(f"{where} has no {kind.__name__} {name!r}, it has {str(row)[:200]}")
    return row[name]


def check_inside(name, where, allow_outside=False):
    """BadSample if the name of a file, in somebody's JSON, leads out of the data set's folder."""
    # As written, without following links: whoever puts a link into the folder means it.
    path = os.path.normpath(name)
    leads_out = os.path.isabs(path) or path == ".." or path.startswith(".." + os.sep)
    if leads_out and not allow_outside:
        raise BadSample(f"{where}: {name} is outside of the data set's folder; if you trust this "
                        f"data set to name files on your machine, give --allow-outside")


def open_image(source, where):
    """
    A fully decoded PIL image (the first frame, if there are several).

    source: encoded bytes, a path, {"bytes": ..., "path": ...} (an undecoded picture of `datasets`)
    or a PIL image. Raises BadSample, whose message starts with `where`, if the file does not exist
    or is not an intact picture.
    """
    if isinstance(source, dict):  # `datasets` gives one of the two, the other is None
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, (str, os.PathLike)):
        where = f"{where}: {os.fspath(source)}"
        source = read_file(source, where)
    if not isinstance(source, (bytes, Image.Image)):
        raise BadSample(f"{where}: a picture was expected, not {type(source).__name__}")

    # PIL's decoders raise whatever they stumble over: OSError, SyntaxError, struct.error,
    # zlib.error, ... On a file from outside each of them means the same: a corrupted picture.
    try:
        image = source
        if isinstance(source, bytes):
            image = Image.open(io.BytesIO(source), formats=FORMATS)
        width, height = image.size
        too_large = width * height > MAX_PIXELS
        if not too_large:  # a decompression bomb is recognized by its header, before decoding
            image.load()
            image.getexif()  # corrupted EXIF fails here, not later when the page is turned upright
    except UnidentifiedImageError as error:
        raise BadSample(f"{where}: the picture cannot be read (in no known format)") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadSample(f"{where}: the picture cannot be read ({reason})") from error

    if too_large:
        size = f"{width}x{height} px"
        raise BadSample(f"{where}: a picture of {size} is over the limit of {MAX_PIXELS:,} px")
    return image


def read_file(path, where):
    """The bytes of a file that a row refers to."""
    try:
        with open(path, "rb") as f:
            return f.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        # Any other OSError (permissions, a failing disk) is not the row's fault and passes through.
        raise BadSample(f"{where}: no such picture ({error.strerror})") from error
