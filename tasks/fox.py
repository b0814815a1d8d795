"""
Fox (ucaslcl/Fox_benchmark_data, CC-BY-NC-SA-4.0): dense pages of English (112) or Chinese print, read in place from the benchmark's
one zip. A record: {"image": "en_1.png", "len": 826, "conversations": [{"from": "human", ...}, {"from": "gpt", "value": text}]}.
"""
import json
import os
import zipfile
import zlib

from nanochat.hub import download
from nanochat.conversation import OCR_PROMPT, Task, column, ocr_conversation, open_image

REPO, FOLDER = "ucaslcl/Fox_benchmark_data", "focus_benchmark_test"


class Fox(Task):
    """
    language: en or cn. path: the zip, or a folder it was extracted to; empty = from the hub. attributes["len"] is Fox's own count of a
    page's tokens, by which DeepSeek-OCR chose and bucketed its pages.
    """
    def __init__(self, language="en", path="", prompt=OCR_PROMPT):
        self.path, self.prompt, self.language = str(path or download(REPO, FOLDER + ".zip", "dataset")), prompt, language
        name, self.records = f"{language}_page_ocr.json", []
        try:
            for k, record in enumerate(json.loads(self.read(name))):
                where = f"Fox: record {k} of {name} in {self.path}"
                answer = column(record, "conversations", where, list)[1:2] or [{}]
                self.records.append((column(record, "image", where, str), column(answer[0], "value", where, str), column(record, "len", where)))
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise ValueError(f"Fox: {name} in {self.path} is not JSON ({e}): fetch it again") from e

    def read(self, name):
        """bytes of a file of the benchmark. The zip is opened anew each time: loader processes must not share its file position."""
        inner = os.path.join(self.path, FOLDER)
        try:
            if not os.path.isdir(self.path):
                with zipfile.ZipFile(self.path) as z:
                    return z.read(f"{FOLDER}/{name}")
            with open(os.path.join(inner if os.path.isdir(inner) else self.path, name), "rb") as f:
                return f.read()
        except (KeyError, FileNotFoundError) as e:
            raise FileNotFoundError(f"Fox: no {name} in {self.path} ({e}): give {FOLDER}.zip or the folder in it, language en or cn") from e
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:
            raise ValueError(f"Fox: {name} of {self.path} cannot be read ({e}): fetch the zip again") from e

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        self.check_index(i)
        name, truth, length = self.records[i]
        image = open_image(self.read(f"{self.language}_pdf_png/{name}"), f"Fox: record {i}, {name}")
        return ocr_conversation(image, truth, name, self.prompt, image_name=name, attributes={"language": self.language, "len": length})
