"""
Fox (ucaslcl/Fox_benchmark_data, CC-BY-NC-SA-4.0): dense pages of English (112) or Chinese print, read in place from the benchmark's
one zip. A record: {"image": "en_1.png", "len": 826, "conversations": [{"from": "human", ...}, {"from": "gpt", "value": text}]}.
"""
import json
import os
import zipfile
import zlib

from nanochat.hub import download
from tasks.common import OCR_PROMPT, Task, ocr_conversation, open_image

REPO, FOLDER = "ucaslcl/Fox_benchmark_data", "focus_benchmark_test"


class Fox(Task):
    """
    language   "en" or "cn"
    path       the zip, or a folder it was extracted to; empty = from the hub
    attributes hold language and `len`, Fox's own count of a page's tokens, by which DeepSeek-OCR chose and bucketed its pages.
    """
    def __init__(self, language="en", path="", prompt=OCR_PROMPT):
        if language not in ("en", "cn"):
            raise ValueError(f"Fox language {language!r}: must be en or cn")
        self.path, self.prompt, self.language = str(path or download(REPO, FOLDER + ".zip", "dataset")), prompt, language
        if os.path.isdir(os.path.join(self.path, FOLDER)):
            self.path = os.path.join(self.path, FOLDER)
        self.records = []
        try:
            for record in json.loads(self.read(f"{language}_page_ocr.json")):
                truth = record["conversations"][1]["value"]
                if not isinstance(truth, str) or not isinstance(record["image"], str):
                    raise TypeError(f"image {record['image']!r} or value {truth!r:.50} is not a text")
                self.records.append((record["image"], truth, record["len"]))
        except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError) as e:
            raise ValueError(f"Fox: record {len(self.records)} of {language}_page_ocr.json in {self.path} is not as documented ({e!r}): "
                             f"fetch it again") from e

    def read(self, name):
        """bytes of a file of the benchmark. The zip is opened anew each time: loader processes must not share its file position."""
        try:
            if not os.path.isdir(self.path):
                with zipfile.ZipFile(self.path) as z:
                    return z.read(f"{FOLDER}/{name}")
            with open(os.path.join(self.path, name), "rb") as f:
                return f.read()
        except (KeyError, FileNotFoundError) as e:
            raise FileNotFoundError(f"Fox: no {name} in {self.path} ({e}): give {FOLDER}.zip or the folder in it") from e
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:
            raise ValueError(f"Fox: {name} of {self.path} cannot be read ({e}): fetch the zip again") from e

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        self.check_index(i)
        name, truth, length = self.records[i]
        image = open_image(self.read(f"{self.language}_pdf_png/{name}"), f"Fox: record {i}, {name}")
        return ocr_conversation(image, truth, name, self.prompt, image_name=name, attributes={"language": self.language, "len": length})
