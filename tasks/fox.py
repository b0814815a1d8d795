"""
Fox (Liu et al. 2024, arXiv 2405.14295; ucaslcl/Fox_benchmark_data, CC-BY-NC-SA-4.0): dense pages of
English (112) or Chinese print, read in place from the benchmark's one zip. A record is

    {"image": "en_1.png", "len": 826,
     "conversations": [{"from": "human", ...}, {"from": "gpt", "value": text}]}
"""
import json
import os
import zipfile
import zlib
from typing import NamedTuple

from nanochat.conversation import (
    OCR_PROMPT, Task, check_inside, column, ocr_conversation, open_image)
from nanochat.hub import download

REPO = "ucaslcl/Fox_benchmark_data"
FOLDER = "focus_benchmark_test"  # inside the zip, and the zip's own name
LARGEST_ENTRY = 256_000_000  # bytes, unpacked; a zip of some kilobytes may hold terabytes


class Record(NamedTuple):
    image: str   # file name
    text: str
    length: int  # "len": tokens by Fox's own count


# -----------------------------------------------------------------------------

class Fox(Task):
    """
    language: en or cn. path: the zip, or a folder it was extracted to; empty = from the hub.

    attributes["len"] is Fox's own count of a page's tokens. (DeepSeek-OCR's study, section 4.1 of
    its paper, takes the 100 English pages of 600 to 1,300 tokens.)
    """
    def __init__(self, language="en", path="", prompt=OCR_PROMPT):
        self.path = str(path or download(REPO, FOLDER + ".zip", "dataset"))
        self.prompt = prompt
        self.language = language
        name = f"{language}_page_ocr.json"
        try:
            records = json.loads(self.read(name))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"Fox: {name} in {self.path} is not JSON ({error}): "
                             "fetch it again") from error
        if not isinstance(records, list):
            raise ValueError(f"Fox: {name} in {self.path} holds a {type(records).__name__}, "
                             "expected a list of records")
        # All of them now: a malformed record should not be found in the middle of an evaluation.
        self.records = []
        for k, record in enumerate(records):
            where = f"Fox: record {k} of {name} in {self.path}"
            self.records.append(parse_record(record, where))

    def read(self, name):
        """The bytes of a file of the benchmark."""
        try:
            if os.path.isdir(self.path):
                return self.read_from_folder(name)
            # Opened anew each time: the loader's processes must not share its file position.
            with zipfile.ZipFile(self.path) as z:
                entry = z.getinfo(f"{FOLDER}/{name}")
                if entry.file_size > LARGEST_ENTRY:  # a page has 3 MB; zipfile reads no more
                    raise ValueError(f"Fox: {name} of {self.path} has {entry.file_size:,} bytes, "
                                     f"the limit is {LARGEST_ENTRY:,}: fetch the zip again")
                return z.read(entry)
        except (KeyError, FileNotFoundError) as error:
            raise FileNotFoundError(f"Fox: no {name} in {self.path} ({error}): give {FOLDER}.zip "
                                    "or the folder in it, language en or cn") from error
        # What zipfile raises on a truncated or encrypted archive.
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise ValueError(f"Fox: {name} of {self.path} cannot be read ({error}): "
                             "fetch the zip again") from error

    def read_from_folder(self, name):
        inner = os.path.join(self.path, FOLDER)  # people unzip it with or without the outer folder
        folder = inner if os.path.isdir(inner) else self.path
        with open(os.path.join(folder, name), "rb") as f:
            return f.read()

    def __len__(self):
        return len(self.records)

    def truth(self, i):
        return self.records[i].text

    def attributes(self, i):
        return {"language": self.language, "len": self.records[i].length}

    def image_name(self, i):
        return self.records[i].image

    def __getitem__(self, i):
        self.check_index(i)
        record = self.records[i]
        # Beside this folder Fox has the same pages with boxes drawn on them (_pdf_png_onbox).
        data = self.read(f"{self.language}_pdf_png/{record.image}")
        image = open_image(data, f"Fox: record {i}, {record.image}")
        return ocr_conversation(image, record.text, record.image, self.prompt,
                                image_name=record.image, attributes=self.attributes(i))


def parse_record(record, where):
    turns = column(record, "conversations", where, list)
    answer = turns[1] if len(turns) > 1 else None  # turns[0] is the question, the same everywhere
    name = column(record, "image", where, str)
    check_inside(name, where)
    return Record(
        image=name,
        text=column(answer, "value", where, str),
        length=column(record, "len", where),
    )
