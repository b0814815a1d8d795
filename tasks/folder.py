"""
Pages of your own, in one of two forms:

    a folder of pictures, subfolders too; the text of name.png is beside it in name.txt or name.md
    a JSON-lines file; a line is {"image": path relative to the file's folder, "text": ...} and may
    have a "prompt" of its own

All texts are UTF-8.
"""
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from nanochat.common import stable_hash
from nanochat.conversation import (
    OCR_PROMPT, Task, check_inside, column, ocr_conversation, open_image)

END_OF_PICTURE = 4096  # bytes that count in the fingerprint
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")


class OwnPage(NamedTuple):
    picture: str  # path relative to the folder, also the page's id
    text: str     # may be empty: an empty page
    prompt: str


# -----------------------------------------------------------------------------
# The task

class Folder(Task):
    """
    split: "train" or "val", of which val holds val_share of the pages, or "all" for both.

    allow_outside: whether a line may name a picture outside of the file's folder.

    Errors name the file (and line) that is missing, broken or not UTF-8. Texts are read at once,
    pictures when they are used.
    """
    def __init__(self, path, split="all", val_share=0.1, prompt=OCR_PROMPT, allow_outside=False):
        path = Path(path)
        # A name that is mistyped must not look like an empty folder.
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give a folder of pictures with texts "
                                    "beside them, or a .jsonl file")
        if path.is_dir():
            self.folder = path
            pages = pages_of_folder(path, prompt)
        else:
            self.folder = path.parent
            pages = pages_of_json_lines(path, prompt, allow_outside)

        self.pages = []
        for page in pages:
            if split == "all" or split == split_of(page, val_share):
                self.pages.append(page)
        # Most often a small folder at a small share, of which no name hashes to val.
        if not self.pages:
            raise ValueError(f"{path}: none of its {len(pages)} pages ({' '.join(PICTURES)}) "
                             f"is for {split} at a validation share of {val_share}")

    def __len__(self):
        return len(self.pages)

    def truth(self, i):
        return self.pages[i].text

    def image_name(self, i):
        return self.pages[i].picture

    def fingerprint(self):
        """Of names, texts, and size and end of each picture. A copy of the folder has the same."""
        # Not of times, which a copy or a checkout changes, nor of whole pictures, which would take
        # minutes. Pictures that are not compressed all have the same size, hence the end as well.
        state = hashlib.sha256()
        for page in self.pages:
            with open(self.folder / page.picture, "rb") as f:
                size = f.seek(0, os.SEEK_END)
                f.seek(max(0, size - END_OF_PICTURE))
                end = f.read()
            state.update(repr((*page, size)).encode("utf-8", "backslashreplace"))
            state.update(end)
        return f"{len(self.pages)} pages, {state.hexdigest()[:16]}"

    def __getitem__(self, i):
        self.check_index(i)
        page = self.pages[i]
        image = open_image(self.folder / page.picture, "folder")
        return ocr_conversation(image, page.text, page.picture, page.prompt,
                                image_name=page.picture)


def split_of(page, val_share):
    """"train" or "val"."""
    # By hash of the name without its ending: a page that is added later moves no other, and the
    # same page as .png and as .jpg stays on one side.
    name = page.picture.rpartition(".")[0]
    return "val" if stable_hash(name) % 1000 < 1000 * val_share else "train"


# -----------------------------------------------------------------------------
# Reading the two forms

def pages_of_folder(folder, prompt):
    """list of OwnPage, sorted by path."""
    pages = []
    for picture in sorted(folder.rglob("*")):
        if picture.suffix.lower() not in PICTURES:
            continue
        # Two texts are an error as well: nobody knows which of them the picture shows.
        candidates = (picture.with_suffix(".txt"), picture.with_suffix(".md"))
        texts = [path for path in candidates if path.is_file()]
        if len(texts) != 1:
            names = f"{picture.stem}.txt or {picture.stem}.md"
            raise ValueError(f"{picture} has {len(texts)} texts beside it: needs one, {names}")
        name = picture.relative_to(folder).as_posix()
        pages.append(OwnPage(name, read_text(texts[0]), prompt))
    return pages


def pages_of_json_lines(path, prompt, allow_outside):
    """list of OwnPage in the order of the lines."""
    pages = []
    # Not splitlines(): that would also cut at U+2028 and the like, which JSON allows in a string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        where = f"{path} line {number}"
        try:
            # TypeError: JSON, but not an object.
            row = {"prompt": prompt, **json.loads(line)}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where} is not a JSON object ({error})") from error
        page = OwnPage(
            picture=column(row, "image", where, str),
            text=column(row, "text", where, str),
            prompt=column(row, "prompt", where, str),
        )
        check_inside(page.picture, where, allow_outside)
        # Now, with the line's number, and not in the middle of a run.
        if not (path.parent / page.picture).is_file():
            raise FileNotFoundError(f"{where}: no picture {path.parent / page.picture}")
        pages.append(page)
    return pages


def read_text(path):
    """The text without the byte order mark that Windows editors write, and without outer space."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): convert it") from error
