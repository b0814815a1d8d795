"""
Proves that every hub task loads, slices and streams through the real, unpatched clients (in child processes, against tests/hub_server.py),
that a warm cache serves them when the hub is gone, and that what is missing or broken ends in a clear error, soon.

    python -m pytest tests/test_hub_tasks.py
"""
import io
import json
import pickle
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

from nanochat.tokenizer import turns
from tasks.fox import Fox
from tasks.omnidocbench import ORIGINAL, OmniDocBench
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[1]
RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
DATA = dict(seed=0, chars="10-12", faces="sans", min_px=10, random_share=0.2, val_share=0.1, stream=False)


def picture(mode="RGB", size=(20, 30)):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "JPEG" if mode == "CMYK" else "PNG")
    return file.getvalue()


# -----------------------------------------------------------------------------
# Repositories as on the hub: schemas and layouts of the data sets' own pages


def front_matter(folder, config, path, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    text = f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {path}\n"
    readme = folder / "README.md"
    before = readme.read_text().removesuffix("---\n") if readme.exists() else "---\nconfigs:\n"
    readme.write_text(before + text + "---\n")


def finevision_rows():
    for i in range(300):
        row = {"images": [{"bytes": picture(), "path": None}], "texts": [{"user": f"question {i}", "assistant": f"answer {i}"}], "source": "charts",
               **{f"{k}_ratings": [5] for k in RATINGS}, **{f"{k}_min": 5 for k in RATINGS}}
        if i == 0:  # two turns, four pictures of four kinds
            row["texts"].append({"user": "again?", "assistant": "yes"})
            row["images"] = [{"bytes": picture(mode, (20 + n, 30)), "path": None} for n, mode in enumerate(("L", "P", "RGBA", "CMYK"))]
        row.update({1: {"images": None}, 2: {"images": []}, 5: {"images": [{"bytes": picture()[:50], "path": None}]}, 6: {"texts": []},
                    3: {f"{k}_ratings": None for k in RATINGS} | {f"{k}_min": None for k in RATINGS}}.get(i, {}))
        yield row


def write_finevision(folder):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture
    columns = {"images": List(Picture()), "texts": List({"user": Value("string"), "assistant": Value("string")}), "source": Value("string")}
    for k in RATINGS:
        columns |= {f"{k}_ratings": List(Value("int64")), f"{k}_min": Value("int64")}
    rows = Dataset.from_list(list(finevision_rows()), features=Features(columns))
    for config, order in (("chartqa", list(columns)), ("olmOCR-mix-0225-books", list(columns)[::-1])):  # another order in another config
        if config != "chartqa":
            columns["texts"] = List({"assistant": Value("string"), "user": Value("string")})
            rows = rows.select(range(4)).cast(Features(columns))
        (folder / config).mkdir(parents=True)
        for n in range(4):
            rows.select_columns(order).shard(4, n, contiguous=True).to_parquet(folder / config / f"train-0000{n}-of-00004.parquet")
        front_matter(folder, config, f"{config}/train-*")


def write_others(root):
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as Picture
    chartqa, smoltalk = root / "HuggingFaceM4/ChartQA", root / "HuggingFaceTB/smol-smoltalk"
    rows = [{"image": {"bytes": picture(), "path": None}, "query": f"How many {i}?", "label": [str(i), "other"], "human_or_machine": i % 2} for i in range(4)]
    features = {"image": Picture(), "query": Value("string"), "label": List(Value("string")), "human_or_machine": ClassLabel(names=["human", "machine"])}
    Dataset.from_list(rows, features=Features(features)).to_parquet(chartqa / "data/test-00000-of-00001.parquet")
    front_matter(chartqa, "default", "data/test-*", "test")
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello <|image|>"}]
    features = Features({"messages": List({"content": Value("string"), "role": Value("string")}), "source": Value("string")})
    for split in ("train", "test"):
        rows = [{"messages": talk[i % 2:], "source": "talk"} for i in range(6)] + [{"messages": [{"role": "user", "content": None}], "source": ""}]
        Dataset.from_list(rows, features=features).to_parquet(smoltalk / f"data/{split}-00000-of-00001.parquet")
    front_matter(smoltalk, "default", "data/train-*")
    (smoltalk / "README.md").write_text((smoltalk / "README.md").read_text().removesuffix("---\n") + "  - split: test\n    path: data/test-*\n---\n")


def fox_record(name, text, length):
    return {"image": name, "len": length, "conversations": [{"from": "human", "value": "<image>\nOCR this image: "}, {"from": "gpt", "value": text}]}


def write_fox(path, records=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    records = records or [fox_record("en_1.png", "Some text.", 826), fox_record("en_2.png", "", 1), fox_record("gone.png", "x", 2)]
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("focus_benchmark_test/en_page_ocr.json", json.dumps(records))
        z.writestr("focus_benchmark_test/cn_page_ocr.json", json.dumps([fox_record("cn_1.png", "场子设在村边", 700)]))
        for name in ("en_pdf_png/en_1.png", "cn_pdf_png/cn_1.png"):
            z.writestr(f"focus_benchmark_test/{name}", picture())
        z.writestr("focus_benchmark_test/en_pdf_png/en_2.png", b"no picture")
    return path


def write_omnidocbench(folder, names=("a.png", "b.png", "gone.png")):
    (folder / "images").mkdir(parents=True)
    det = {"category_type": "text_block", "poly": [0] * 8, "ignore": False, "order": 1, "anno_id": 1, "text": "A page."}
    pages = [{"layout_dets": [det, {"category_type": "header", "order": None, "anno_id": 2}], "extra": {"relation": []},
              "page_info": {"page_no": 0, "width": 1, "height": 1, "image_path": name, "page_attribute": {"language": "english"}}} for name in names]
    (folder / "OmniDocBench.json").write_text(json.dumps(pages))
    for name in set(names) - {"gone.png"}:
        (folder / "images" / name).write_bytes(picture())


# -----------------------------------------------------------------------------
# What a client sees: run by the tests below in processes of their own


def fails(error, words, call):
    with pytest.raises(error, match=words):
        call()


def online(root):
    write_finevision(root / "HuggingFaceM4/FineVision")
    write_others(root)
    from datasets.distributed import split_dataset_by_node
    from tasks.chartqa import ChartQA
    from tasks.finevision import FineVision
    from tasks.smoltalk import SmolTalk
    from tasks.registry import training_sets

    # FineVision, map-style
    rows = FineVision("chartqa")
    first = rows[0]
    assert len(rows) == 300 and [im.mode for im in first["images"]] == ["L", "P", "RGBA", "CMYK"]
    assert first["messages"][0]["content"] == [{"type": "image"}] * 4 + [{"type": "text", "text": "\nquestion 0"}]
    assert first["messages"][1:] == [{"role": "assistant", "content": "answer 0"}, {"role": "user", "content": "again?"},
                                     {"role": "assistant", "content": "yes"}]
    for i in (1, 2):  # null and empty pictures: text only
        assert rows[i]["images"] == [] and rows[i]["messages"][0]["content"] == f"question {i}"
    assert rows[3]["images"][0].size == (20, 30)  # null ratings
    fails(ValueError, "FineVision chartqa train row 5, picture 0: the picture cannot be read", lambda: rows[5])
    fails(ValueError, "row 6 has no turns", lambda: rows[6])
    fails(IndexError, "index 300", lambda: rows[300])
    for i in (0, 1, 3):
        turns(rows[i], "")
    other = FineVision("olmOCR-mix-0225-books")  # columns and keys in another order
    assert [other[i]["messages"] for i in range(4)] == [rows[i]["messages"] for i in range(4)]
    piece = FineVision("chartqa", start=100, stop=110)
    assert [c["messages"][1]["content"] for c in piece] == [f"answer {i}" for i in range(100, 110)] and "row 103" in piece[3]["id"]
    fails(ValueError, "has 300 rows", lambda: FineVision("chartqa", start=290, stop=301))
    fails(ValueError, "chartqa", lambda: FineVision("nothing"))
    fails(FileNotFoundError, "nobody/nothing", lambda: FineVision("chartqa", "nobody/nothing"))

    local = root / "HuggingFaceM4/FineVision"  # a local copy, and what changes in it
    assert pickle.loads(pickle.dumps(FineVision("olmOCR-mix-0225-books", str(local))))[3]["messages"] == rows[3]["messages"]
    (local / "olmOCR-mix-0225-books/train-00003-of-00004.parquet").unlink()
    assert len(FineVision("olmOCR-mix-0225-books", str(local))) == 3

    # the same by streaming: rows stay raw, a plain function converts; pieces, parts, shares, state
    def answers(rows):
        return [row["texts"][0]["assistant"] for row in rows if row["texts"]]
    stream = FineVision("chartqa", streaming=True)
    read = [stream.to_conversation(row, "here") for row in stream.rows.take(4)]
    assert [c["messages"] for c in read] == [rows[i]["messages"] for i in range(4)] and read[0]["images"][3].mode == "CMYK"
    assert answers(FineVision("chartqa", start=7, stop=9, streaming=True).rows) == ["answer 7", "answer 8"]
    parts = {part: [c.as_py()[0]["assistant"] for c in FineVision("chartqa", part=part).rows["texts"] if c.as_py()] for part in ("train", "val")}
    assert 2 <= len(parts["val"]) < 20 and sorted(parts["train"] + parts["val"]) == sorted(answers(stream.rows))
    for part in parts:
        rows_of_part = FineVision("chartqa", part=part, streaming=True).rows
        assert answers(rows_of_part) == parts[part]
        shares = [answers(split_dataset_by_node(rows_of_part, rank, 2)) for rank in range(2)]
        assert sorted(sum(shares, [])) == sorted(parts[part]) and all(shares)  # each row once, no row of the other part
    it = iter(rows_of_part)
    seen = answers([next(it)])
    state = json.loads(json.dumps(rows_of_part.state_dict()))
    again = FineVision("chartqa", part="val", streaming=True).rows
    again.load_state_dict(state)
    assert seen + answers(again) == parts["val"]

    # the others
    charts = ChartQA()
    assert [(c["attributes"]["kind"], c["labels"], c["messages"][1]["content"]) for c in charts] == [
        (("human", "augmented")[i % 2], [str(i), "other"], str(i)) for i in range(4)]
    assert charts[1]["messages"][0]["content"][1]["text"] == "\nHow many 1?" and charts[1]["images"][0].size == (20, 30)
    talks = SmolTalk()
    assert [m["role"] for m in talks[0]["messages"]] == ["system", "user", "assistant"] and len(talks[1]["messages"]) == 2
    assert len(SmolTalk("test")) == 7 and len(SmolTalk(start=1, stop=3)) == 2 and len(turns(talks[0], "")) == 2
    fails(ValueError, "row 6, message 0 has no str 'content'", lambda: talks[6])
    fox, cn = Fox("en"), Fox("cn")
    assert len(fox) == 3 and fox[0]["attributes"] == {"language": "en", "len": 826} and fox[0]["messages"][1]["content"] == "Some text."
    assert fox[0]["images"][0].size == (20, 30) and cn[0]["messages"][1]["content"] == "场子设在村边"
    bench = OmniDocBench()
    assert len(bench) == 3 and bench[1]["messages"][1]["content"] == "A page." and bench[1]["attributes"] == {"language": "english"}
    fails(FileNotFoundError, "row 2 has no picture .*images/gone.png", lambda: bench[2])
    assert len(OmniDocBench(ORIGINAL)) == 1

    # as a training stage takes them
    task, val, statistics = training_sets(Namespace(data="chartqa=3,smoltalk=1,synthdoc=2", **DATA), 64, 300, 0)
    drawn = [task.tasks[t] for _ in range(50) for t, _ in task.cycle]
    assert len(task) == 300 and [drawn.count(part) for part in task.tasks] == [150, 50, 100]
    assert {c["messages"][1]["content"] for c in val} == set(parts["val"]) and len(statistics) == 1000
    task, val, statistics = training_sets(Namespace(data="chartqa=3,synthdoc=1", **{**DATA, "stream": True}), 64, 300, 0)
    assert task.streams and {val[i]["messages"][1]["content"] for i in range(len(val))} == set(parts["val"])
    _, conversation, _ = next(task.tasks[0].draws(0, 1, 0, 1, None))
    assert conversation()["messages"][1]["content"] in set(parts["train"]) and statistics[0]["images"]
    fails(ValueError, "smoltalk has no pictures", lambda: training_sets(Namespace(data="smoltalk,chartqa", **DATA), 64, 10, 0))
    fails(ValueError, "fox measures models", lambda: training_sets(Namespace(data="chartqa,fox", **DATA), 64, 10, 0))


def offline(root):
    """The hub is gone. What was read is read from the cache; the rest is an error that says so."""
    from tasks.chartqa import ChartQA
    from tasks.finevision import FineVision
    from tasks.smoltalk import SmolTalk
    assert len(FineVision("chartqa")[0]["images"]) == 4 and len(ChartQA()) == 4 and len(SmolTalk()) == 7
    assert len(Fox("en")) == 3 and OmniDocBench()[1]["images"][0].size == (20, 30)
    start = time.time()
    fails((ConnectionError, FileNotFoundError, ValueError), "not cached|cache", lambda: FineVision("chartqa", "nobody/nothing"))
    fails((ConnectionError, FileNotFoundError), "images/a.png of Quivr/OmniDocBench.*not cached", lambda: OmniDocBench()[0])
    assert time.time() - start < 15


def client(what, root, env):
    process = subprocess.run([sys.executable, __file__, what, str(root)], cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]


def test_through_the_real_clients(tmp_path):
    pytest.importorskip("datasets")
    root = tmp_path / "hub/datasets"
    write_fox(root / "ucaslcl/Fox_benchmark_data/focus_benchmark_test.zip")
    write_omnidocbench(root / "Quivr/OmniDocBench")
    write_omnidocbench(root / "opendatalab/OmniDocBench", ("c.png",))
    with HubServer(tmp_path / "hub") as server:
        client("online", root, server.env(tmp_path / "home"))
        got = [path for method, path in server.log if method == "GET"]
        assert sum(path.endswith("b.png") for path in got) == 1 and not any(path.endswith("a.png") for path in got)  # on demand
        assert sum(path.endswith("focus_benchmark_test.zip") for path in got) == 1
        gone = server.env(tmp_path / "home")
    client("offline", root, gone)


# -----------------------------------------------------------------------------
# Fox and OmniDocBench from local paths


def test_fox_from_a_zip_or_a_folder(tmp_path):
    path = write_fox(tmp_path / "fox.zip")
    with zipfile.ZipFile(path) as z:
        z.extractall(tmp_path / "out")
    for place in (path, tmp_path / "out", tmp_path / "out/focus_benchmark_test"):
        fox = Fox("en", place)
        assert [fox.records[i][2] for i in range(3)] == [826, 1, 2] and fox[0]["id"] == "en_1.png" and fox[0]["images"][0].size == (20, 30)
        fails(ValueError, "Fox: record 1, en_2.png: the picture cannot be read", lambda: fox[1])
        fails(FileNotFoundError, "no en_pdf_png/gone.png", lambda: fox[2])
    assert Fox("cn", path)[0]["attributes"]["language"] == "cn"


def test_fox_missing_or_broken(tmp_path):
    fails(FileNotFoundError, "no en_page_ocr.json in .*nowhere.zip", lambda: Fox("en", tmp_path / "nowhere.zip"))
    fails(FileNotFoundError, "no en_page_ocr.json", lambda: Fox("en", tmp_path))
    fails(FileNotFoundError, "language en or cn", lambda: Fox("de", tmp_path))
    whole = write_fox(tmp_path / "fox.zip").read_bytes()
    (tmp_path / "half.zip").write_bytes(whole[:len(whole) // 2])
    fails(ValueError, "half.zip cannot be read .*fetch the zip again", lambda: Fox("en", tmp_path / "half.zip"))
    for wrong in ([{"image": "a.png"}], [fox_record("a.png", None, 1)], [{**fox_record("a.png", "x", 1), "conversations": []}], ["text"]):
        write_fox(tmp_path / "fox.zip", [fox_record("en_1.png", "x", 1), *wrong])
        fails(ValueError, "record 1 of en_page_ocr.json", lambda: Fox("en", tmp_path / "fox.zip"))


def test_omnidocbench_by_a_path_that_is_none():
    fails(FileNotFoundError, "neither a folder here nor a hub name", lambda: OmniDocBench("/no/such/folder"))


if __name__ == "__main__":
    {"online": online, "offline": offline}[sys.argv[1]](Path(sys.argv[2]))
