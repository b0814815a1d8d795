"""
What was read, in the files that the benchmarks' own evaluators score.

OmniDocBench (pdf_validation.py, v1.5) takes a folder of Markdown files. Its known faults: a page
without a file is left out of the mean, with a warning; a middle block of a chain of three truncated
blocks is appended twice to the truth; `ignore` is not read; a name in .jpeg is found, but stops the
split by page attributes at the end. Fox (eval_tools/eval_ocr_test.py) takes a JSON list, and
crashes on an empty answer.
"""
import os
from collections import Counter

from nanochat.common import write_json


def short_name(name):
    """The first file that OmniDocBench's evaluator looks for: the name less 4 characters, .md."""
    stem, extension = os.path.splitext(os.path.basename(name))
    if len(extension) == 4:
        return stem + ".md"
    # Less 4 characters, "page.jpeg" would leave a dot. The evaluator's last try is the whole name.
    return stem + extension + ".md"


def markdown_names(image_names):
    """{image name: path of its file in md/}, different for all, where the evaluator looks."""
    shorts = Counter(short_name(name) for name in image_names)
    wholes = Counter(os.path.basename(name) for name in image_names)
    paths = {}
    for name in image_names:
        path = short_name(name)
        if shorts[path] > 1:  # p.png and p.jpg: found under the whole name
            path = os.path.basename(name) + ".md"
        if wholes[os.path.basename(name)] > 1:  # x/p.png and y/p.png: one page to the evaluator
            inside = os.path.normpath("/" + name)  # a "../p.png" must not leave the folder
            path = inside.lstrip("/") + ".md"
        paths[name] = path
    return paths


def write_markdown(folder, rows):
    """A Markdown file for every row of a picture with a name. Failed pages get an empty one."""
    texts = {}
    for row in rows:
        if "image_name" in row:
            texts[row["image_name"]] = row["prediction"]
    for name, path in markdown_names(list(texts)).items():
        path = os.path.join(folder, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8", errors="replace") as f:
            f.write(texts[name])


def write_fox(path, rows):
    """The JSON list that Fox's script scores."""
    records = []
    for row in rows:
        # An empty answer would crash the script. A sign that is on no page scores the same: no
        # word in common, and an edit distance of 1.
        answer = row["prediction"].strip() or "\u2205"
        records.append({"image": row["id"], "question": row["prompt"], "label": row["truth"],
                        "answer": answer})
    write_json(path, records)
