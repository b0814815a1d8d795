"""
Proves that every hub task loads, slices and streams through the real, unpatched clients (in child
processes, against tests/hub_server.py), that a warm cache serves them when the hub is gone, and
that what is missing or broken ends in a clear error, soon.

    python -m pytest tests/test_hub_tasks.py
"""
import io
import json
import pickle
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

from nanochat import hub
from nanochat.conversation import OCR_PROMPT
from nanochat.tokenizer import turns
from tasks.chartqa import ChartQA
from tasks.finevision import FineVision
from tasks.fox import Fox
from tasks.omnidocbench import ORIGINAL, OmniDocBench
from tasks.registry import training_sets
from tasks.smoltalk import SmolTalk
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[1]


def fails(error, words, call):
    with pytest.raises(error, match=words):
        call()


def answers(conversations):
    return [conversation["messages"][1]["content"] for conversation in conversations]


# -----------------------------------------------------------------------------
# Repositories as on the hub: schemas and layouts of the data sets' own pages

RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")


def picture(mode="RGB", size=(20, 30)):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "JPEG" if mode == "CMYK" else "PNG")
    return {"bytes": file.getvalue(), "path": None}


def front_matter(folder, config, path, split="train"):
    """Adds a config of one split to the README, which is where `datasets` looks for configs."""
    folder.mkdir(parents=True, exist_ok=True)
    readme = folder / "README.md"
    before = "---\nconfigs:\n"
    if readme.exists():
        before = readme.read_text().removesuffix("---\n")
    text = f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {path}\n"
    readme.write_text(before + text + "---\n")


def finevision_rows():
    """300 rows of a question and a picture; the first few are as odd as FineVision's can be."""
    rows = []
    for i in range(300):
        row = {
            "images": [picture()],
            "texts": [{"user": f"question {i}", "assistant": f"answer {i}"}],
            "source": "charts",
        }
        for rating in RATINGS:
            row[f"{rating}_ratings"] = [5]
            row[f"{rating}_min"] = 5
        rows.append(row)
    # Two turns, four pictures of four kinds
    rows[0]["texts"].append({"user": "again?", "assistant": "yes"})
    rows[0]["images"] = []
    for n, mode in enumerate(("L", "P", "RGBA", "CMYK")):
        rows[0]["images"].append(picture(mode, (20 + n, 30)))
    rows[1]["images"] = None
    rows[2]["images"] = []
    for rating in RATINGS:
        rows[3][f"{rating}_ratings"] = None
        rows[3][f"{rating}_min"] = None
    rows[5]["images"] = [{"bytes": picture()["bytes"][:50], "path": None}]
    rows[6]["texts"] = []
    return rows


def write_finevision(folder):
    """Two configs, in four shards each. The second has its columns and keys in another order."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture
    columns = {
        "images": List(Picture()),
        "texts": List({"user": Value("string"), "assistant": Value("string")}),
        "source": Value("string"),
    }
    for rating in RATINGS:
        columns[f"{rating}_ratings"] = List(Value("int64"))
        columns[f"{rating}_min"] = Value("int64")
    rows = Dataset.from_list(finevision_rows(), features=Features(columns))
    write_shards(rows, folder, "chartqa")

    columns["texts"] = List({"assistant": Value("string"), "user": Value("string")})
    few = rows.select(range(4)).cast(Features(columns))
    write_shards(few.select_columns(list(columns)[::-1]), folder, "olmOCR-mix-0225-books")


def write_shards(rows, folder, config):
    (folder / config).mkdir(parents=True)
    for n in range(4):
        shard = rows.shard(4, n, contiguous=True)
        shard.to_parquet(folder / config / f"train-0000{n}-of-00004.parquet")
    front_matter(folder, config, f"{config}/train-*")


def write_chartqa(folder):
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as Picture
    rows = []
    for i in range(4):
        rows.append({"image": picture(), "query": f"How many {i}?", "label": [str(i), "other"],
                     "human_or_machine": i % 2})
    features = Features({
        "image": Picture(),
        "query": Value("string"),
        "label": List(Value("string")),
        "human_or_machine": ClassLabel(names=["human", "machine"]),
    })
    path = folder / "data/test-00000-of-00001.parquet"
    Dataset.from_list(rows, features=features).to_parquet(path)
    front_matter(folder, "default", "data/test-*", "test")


def write_smoltalk(folder):
    from datasets import Dataset, Features, List, Value
    features = Features({
        "messages": List({"content": Value("string"), "role": Value("string")}),
        "source": Value("string"),
    })
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello <|image|>"},
    ]
    rows = [{"messages": talk[i % 2:], "source": "talk"} for i in range(6)]  # half without a system
    rows.append({"messages": [{"role": "user", "content": None}], "source": ""})
    for split in ("train", "test"):
        path = folder / f"data/{split}-00000-of-00001.parquet"
        Dataset.from_list(rows, features=features).to_parquet(path)
    front_matter(folder, "default", "data/train-*")
    readme = folder / "README.md"
    one_split = readme.read_text().removesuffix("---\n")
    readme.write_text(one_split + "  - split: test\n    path: data/test-*\n---\n")


def fox_record(name, text, length):
    question = {"from": "human", "value": "<image>\nOCR this image: "}
    answer = {"from": "gpt", "value": text}
    return {"image": name, "len": length, "conversations": [question, answer]}


FOX_RECORDS = [
    fox_record("en_1.png", "Some text.", 826),
    fox_record("en_2.png", "", 1),  # its picture is broken
    fox_record("gone.png", "x", 2),
]


def write_fox(path, records=FOX_RECORDS):
    path.parent.mkdir(parents=True, exist_ok=True)
    cn_records = [fox_record("cn_1.png", "场子设在村边", 700)]
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("focus_benchmark_test/en_page_ocr.json", json.dumps(records))
        z.writestr("focus_benchmark_test/cn_page_ocr.json", json.dumps(cn_records))
        for name in ("en_pdf_png/en_1.png", "cn_pdf_png/cn_1.png"):
            z.writestr(f"focus_benchmark_test/{name}", picture()["bytes"])
        z.writestr("focus_benchmark_test/en_pdf_png/en_2.png", b"no picture")
    return path


def write_omnidocbench(folder, names=("a.png", "b.png", "gone.png")):
    """A page per name; gone.png has no file."""
    (folder / "images").mkdir(parents=True)
    text = {"category_type": "text_block", "poly": [0] * 8, "ignore": False, "order": 1,
            "anno_id": 1, "text": "A page."}
    header = {"category_type": "header", "order": None, "anno_id": 2}
    pages = []
    for name in names:
        info = {"page_no": 0, "width": 1, "height": 1, "image_path": name,
                "page_attribute": {"language": "english"}}
        pages.append({"layout_dets": [text, header], "extra": {"relation": []}, "page_info": info})
        if name != "gone.png":
            (folder / "images" / name).write_bytes(picture()["bytes"])
    (folder / "OmniDocBench.json").write_text(json.dumps(pages))


# -----------------------------------------------------------------------------
# What a client sees. These run in a process of their own, where HF_ENDPOINT is the stand-in.


def check_finevision(local_copy):
    rows = FineVision("chartqa")
    first = rows[0]
    assert len(rows) == 300
    assert [image.mode for image in first["images"]] == ["L", "P", "RGBA", "CMYK"]
    question = {"type": "text", "text": "\nquestion 0"}
    assert first["messages"][0]["content"] == [{"type": "image"}] * 4 + [question]
    assert first["messages"][1:] == [
        {"role": "assistant", "content": "answer 0"},
        {"role": "user", "content": "again?"},
        {"role": "assistant", "content": "yes"},
    ]
    for i in (1, 2):  # null and empty pictures: text only
        assert rows[i]["images"] == []
        assert rows[i]["messages"][0]["content"] == f"question {i}"
    assert rows[3]["images"][0].size == (20, 30)  # null ratings
    for i in (0, 1, 3):
        turns(rows[i], "")  # the tokenizer's check of the format

    name = "FineVision chartqa train"
    fails(ValueError, f"{name} row 5, picture 0: the picture cannot be read", lambda: rows[5])
    fails(ValueError, "row 6 has no turns", lambda: rows[6])
    fails(IndexError, "index 300", lambda: rows[300])
    fails(ValueError, "chartqa", lambda: FineVision("nothing"))
    fails(FileNotFoundError, "nobody/nothing", lambda: FineVision("chartqa", "nobody/nothing"))
    fails(ValueError, "has 300 rows", lambda: FineVision("chartqa", start=290, stop=301))

    piece = FineVision("chartqa", start=100, stop=110)
    assert answers(piece) == [f"answer {i}" for i in range(100, 110)]
    assert "row 103" in piece[3]["id"]

    # Columns and keys in another order
    other = FineVision("olmOCR-mix-0225-books")
    for i in range(4):
        assert other[i]["messages"][1:] == rows[i]["messages"][1:]
        # Pages to be transcribed are asked for as all other pages are.
        if other[i]["images"]:
            question = {"type": "text", "text": OCR_PROMPT}
            assert other[i]["messages"][0]["content"][-1] == question
            assert rows[i]["messages"][0]["content"][-1] != question

    # A local copy travels to worker processes, and a change in it is seen.
    local = FineVision("olmOCR-mix-0225-books", str(local_copy))
    assert pickle.loads(pickle.dumps(local))[3]["messages"] == other[3]["messages"]
    (local_copy / "olmOCR-mix-0225-books/train-00003-of-00004.parquet").unlink()
    assert len(FineVision("olmOCR-mix-0225-books", str(local_copy))) == 3


def raw_answers(rows):
    """First answers of raw rows, without row 6, which has none."""
    return [row["texts"][0]["assistant"] for row in rows if row["texts"]]


def check_streaming():
    """Rows stay raw, a plain function converts them; pieces, parts, ranks' shares, state."""
    from datasets.distributed import split_dataset_by_node
    rows = FineVision("chartqa")
    stream = FineVision("chartqa", streaming=True)
    for i, row in enumerate(stream.rows.take(4)):
        conversation = stream.to_conversation(row, "here")
        assert conversation["messages"] == rows[i]["messages"]
        assert [x.mode for x in conversation["images"]] == [x.mode for x in rows[i]["images"]]
    piece = FineVision("chartqa", start=7, stop=9, streaming=True)
    assert raw_answers(piece.rows) == ["answer 7", "answer 8"]

    # Both parts together are all rows, and streamed they are what they are by index.
    parts = {part: answers_of_part(part) for part in ("train", "val")}
    assert 2 <= len(parts["val"]) < 20
    assert sorted(parts["train"] + parts["val"]) == sorted(raw_answers(stream.rows))
    for part in parts:
        streamed = FineVision("chartqa", part=part, streaming=True).rows
        assert raw_answers(streamed) == parts[part]
        # Each rank reads something, and each row is read once.
        shares = [raw_answers(split_dataset_by_node(streamed, rank, 2)) for rank in range(2)]
        assert sorted(shares[0] + shares[1]) == sorted(parts[part])
        assert shares[0] and shares[1]

    # It goes on from its state.
    streamed = FineVision("chartqa", part="val", streaming=True).rows
    seen = raw_answers([next(iter(streamed))])
    state = json.loads(json.dumps(streamed.state_dict()))
    resumed = FineVision("chartqa", part="val", streaming=True).rows
    resumed.load_state_dict(state)
    assert seen + raw_answers(resumed) == parts["val"]


def answers_of_part(part):
    columns = FineVision("chartqa", part=part).rows["texts"].to_pylist()
    return [texts[0]["assistant"] for texts in columns if texts]


def check_chartqa():
    charts = ChartQA()
    for i, chart in enumerate(charts):
        assert chart["attributes"]["kind"] == ("augmented" if i % 2 else "human")
        assert chart["answers"] == [str(i), "other"]
        assert chart["messages"][1]["content"] == charts.truth(i) == str(i)
        assert chart["messages"][0]["content"][1]["text"] == f"\nHow many {i}?"
        assert chart["images"][0].size == (20, 30)
    assert len(charts) == 4 and charts.answer_metric == "relaxed_accuracy"


def check_smoltalk():
    talks = SmolTalk()
    assert len(talks) == len(SmolTalk("test")) == 7
    assert len(SmolTalk(start=1, stop=3)) == 2
    roles = [message["role"] for message in talks[0]["messages"]]
    assert roles == ["system", "user", "assistant"] and len(talks[1]["messages"]) == 2
    assert len(turns(talks[0], "")) == 2
    fails(ValueError, "row 6, message 0 has no str 'content'", lambda: talks[6])


def check_page_benchmarks():
    fox = Fox("en")
    assert len(fox) == 3 and fox[0]["messages"][1]["content"] == "Some text."
    assert fox[0]["attributes"] == {"language": "en", "len": 826}
    assert fox[0]["images"][0].size == (20, 30)
    assert answers(Fox("cn")) == ["场子设在村边"]

    bench = OmniDocBench()
    assert len(bench) == 3 and bench[1]["messages"][1]["content"] == "A page."
    assert bench[1]["attributes"] == {"language": "english"}
    fails(FileNotFoundError, "row 2 has no picture .*images/gone.png", lambda: bench[2])
    assert len(OmniDocBench(ORIGINAL)) == 1


def check_training_sets():
    """As a training stage takes them."""
    def sets(data, stream=False):
        args = Namespace(data=data, stream=stream, seed=0, chars="10-12", faces="sans")
        return training_sets(args, 64, 300, 0)

    in_train = set(answers_of_part("train"))
    in_val = set(answers_of_part("val"))
    task, val = sets("chartqa=3,smoltalk=1,synthdoc=2")
    assert len(task) == 300 and task.shares == [3, 1, 2]
    assert set(answers(val)) == in_val

    task, val = sets("chartqa=3,synthdoc=1", stream=True)
    assert task.streams and set(answers(val)) == in_val
    _, get, _ = next(task.tasks[0].draws(0, 1, 0, 1, None))
    assert answers([get()])[0] in in_train

    fails(ValueError, "smoltalk has no pictures", lambda: sets("smoltalk,chartqa"))
    contaminated = "fox is for evaluation: training on it contaminates the score"
    fails(ValueError, contaminated, lambda: sets("chartqa,fox"))


def online(root):
    write_finevision(root / "HuggingFaceM4/FineVision")
    write_chartqa(root / "HuggingFaceM4/ChartQA")
    write_smoltalk(root / "HuggingFaceTB/smol-smoltalk")
    check_finevision(root / "HuggingFaceM4/FineVision")
    check_streaming()
    check_chartqa()
    check_smoltalk()
    check_page_benchmarks()
    check_training_sets()


def offline(root):
    """The hub is gone. What was read comes from the cache; the rest is an error that says so."""
    assert len(FineVision("chartqa")[0]["images"]) == 4
    assert len(ChartQA()) == 4 and len(SmolTalk()) == 7 and len(Fox("en")) == 3
    bench = OmniDocBench()
    assert bench[1]["images"][0].size == (20, 30)
    unavailable = (ConnectionError, FileNotFoundError, ValueError)
    fails(unavailable, "not cached|cache", lambda: FineVision("chartqa", "nobody/nothing"))
    not_cached = "images/a.png of Quivr/OmniDocBench.*not cached"
    fails((ConnectionError, FileNotFoundError), not_cached, lambda: bench[0])
    # Soon: the clients are offline, and do not retry every call for twenty seconds.
    import datasets
    import huggingface_hub
    assert not hub.online()
    assert huggingface_hub.constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE


def client(what, root, env):
    command = [sys.executable, __file__, what, str(root)]
    env = {**env, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]


def test_through_the_real_clients(tmp_path):
    pytest.importorskip("datasets")
    root = tmp_path / "hub/datasets"
    write_fox(root / "ucaslcl/Fox_benchmark_data/focus_benchmark_test.zip")
    write_omnidocbench(root / "Quivr/OmniDocBench")
    write_omnidocbench(root / "opendatalab/OmniDocBench", ("c.png",))
    with HubServer(tmp_path / "hub") as server:
        env = server.env(tmp_path / "home")
        client("online", root, env)
        got = [path for method, path in server.log if method == "GET"]
    # Pictures come one by one, when they are asked for, and nothing comes twice.
    assert sum(path.endswith("b.png") for path in got) == 1
    assert not any(path.endswith("a.png") for path in got)
    assert sum(path.endswith("focus_benchmark_test.zip") for path in got) == 1

    client("offline", root, env)


# -----------------------------------------------------------------------------
# Fox and OmniDocBench from local paths


@pytest.mark.parametrize("place", ["fox.zip", "out", "out/focus_benchmark_test"])
def test_fox_from_a_zip_or_a_folder(tmp_path, place):
    path = write_fox(tmp_path / "fox.zip")
    with zipfile.ZipFile(path) as z:
        z.extractall(tmp_path / "out")
    fox = Fox("en", tmp_path / place)
    assert [record.length for record in fox.records] == [826, 1, 2]
    assert fox[0]["id"] == "en_1.png" and fox[0]["images"][0].size == (20, 30)
    broken = "Fox: record 1, en_2.png: the picture cannot be read"
    fails(ValueError, broken, lambda: fox[1])
    fails(FileNotFoundError, "no en_pdf_png/gone.png", lambda: fox[2])
    # What evaluation needs of a page that failed.
    assert fox.truth(2) == "x" and fox.image_name(2) == "gone.png"
    assert Fox("cn", tmp_path / place)[0]["attributes"]["language"] == "cn"


def test_fox_missing(tmp_path):
    nowhere = tmp_path / "nowhere.zip"
    fails(FileNotFoundError, "no en_page_ocr.json in .*nowhere.zip", lambda: Fox("en", nowhere))
    fails(FileNotFoundError, "no en_page_ocr.json", lambda: Fox("en", tmp_path))
    fails(FileNotFoundError, "language en or cn", lambda: Fox("de", tmp_path))


def test_fox_broken(tmp_path):
    whole = write_fox(tmp_path / "fox.zip").read_bytes()
    half = tmp_path / "half.zip"
    half.write_bytes(whole[:len(whole) // 2])
    fails(ValueError, "half.zip cannot be read .*fetch the zip again", lambda: Fox("en", half))


@pytest.mark.parametrize("record", [
    {"image": "a.png"},
    fox_record("a.png", None, 1),
    {**fox_record("a.png", "x", 1), "conversations": []},
    "text",
])
def test_fox_names_a_malformed_record(tmp_path, record):
    path = write_fox(tmp_path / "fox.zip", [fox_record("en_1.png", "x", 1), record])
    fails(ValueError, "record 1 of en_page_ocr.json", lambda: Fox("en", path))


def test_omnidocbench_by_a_path_that_is_none():
    neither = "no such folder .*, and it is no hub name"
    fails(FileNotFoundError, neither, lambda: OmniDocBench("/no/such/folder"))


def test_a_hub_that_hangs(tmp_path, monkeypatch, capsys):
    """It answers the probe and nothing else. The clients would retry for minutes without a word."""
    with HubServer(tmp_path) as server:
        server.hangs = True
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.3)
        monkeypatch.setattr(hub, "FIRST_WORD", 0.1)
        for cached in (hub.online, hub.check_answers):
            cached.cache_clear()
        try:
            for ask in (hub.list_files, hub.dataset):
                fails(ConnectionError, "did not answer within 0.3 s.* HF_HUB_OFFLINE=1",
                      lambda: ask("some/repo"))
            fails(ConnectionError, "try again later", lambda: hub.download("some/repo", "x.json"))
        finally:
            hub.online.cache_clear()
            hub.check_answers.cache_clear()
    assert "still waiting for the hub's answer about some/repo" in capsys.readouterr().err


def test_a_mistyped_path_is_no_question_to_the_hub():
    for path in ("/nope", "./nope/x", "~/nope", "nope", "a/b/c"):
        fails(FileNotFoundError, f"no such folder {path}", lambda: hub.list_files(path))
        fails(FileNotFoundError, f"no such folder {path}", lambda: hub.dataset(path))
        fails(FileNotFoundError, f"no such folder {path}", lambda: hub.download(path, "x"))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png"])
def test_fox_does_not_leave_its_folder(tmp_path, name):
    path = write_fox(tmp_path / "fox.zip", [fox_record(name, "x", 1)])
    fails(ValueError, f"record 0 .*{name} is outside of the data set", lambda: Fox("en", path))


def test_fox_does_not_unpack_a_bomb(tmp_path, monkeypatch):
    path = write_fox(tmp_path / "fox.zip")
    monkeypatch.setattr("tasks.fox.LARGEST_ENTRY", 10)
    fails(ValueError, "en_page_ocr.json .* bytes, the limit is 10", lambda: Fox("en", path))


if __name__ == "__main__":
    checks = {"online": online, "offline": offline}
    checks[sys.argv[1]](Path(sys.argv[2]))
