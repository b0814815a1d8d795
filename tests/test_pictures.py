"""
Proves that the pictures of README can be drawn from any run's own files; that a page is only shown
if it is the one that was read; and that the marks are on the letters that differ.

python -m pytest tests/test_pictures.py
"""
import io
import json
from contextlib import redirect_stdout

import pytest
from PIL import Image

from scripts import pictures, vis_tok_train, vision_eval

TRAIN = ["--preset=tiny", "--chars=10-12", "--dtype=float32", "--device-type=cpu",
         "--num-iterations=2", "--device-batch-size=4", "--eval-every=1", "--eval-pages=16",
         "--model-tag=run",
         "--local-loss=0"]
READ = ["--task=heldout", "--max-problems=3", "--max-new-tokens=8", "--dtype=float32",
        "--device-type=cpu"]


def last_line(main, *flags):
    """The JSON that a script ends with."""
    out = io.StringIO()
    with redirect_stdout(out):
        main(list(map(str, flags)))
    return json.loads(out.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")  # trained once, in two seconds
def run(tmp_path_factory, tokenizer_dir):
    """The folder of a tiny run, with an evaluation inside."""
    folder = tmp_path_factory.mktemp("checkpoints")
    last_line(vis_tok_train.main, *TRAIN, f"--tokenizer={tokenizer_dir}", f"--checkpoints={folder}")
    out = folder / "run/eval"
    last_line(vision_eval.main, *READ, f"--checkpoint={folder / 'run'}", f"--out={out}")
    return folder / "run"


def draw(what, out, *flags):
    """-> (the script's JSON, the picture)"""
    record = last_line(pictures.main, f"--what={what}", f"--out={out}", *flags)
    assert record["bytes"] == out.stat().st_size
    return record, Image.open(out).convert("RGB")


# -----------------------------------------------------------------------------
# The script, on a run's folder


def test_reading(run, tmp_path):
    record, image = draw("reading", tmp_path / "a.png", f"--evaluation={run / 'eval'}",
                         "--percentiles=0,50,100")
    assert record["picked_from"] == 3 and len(set(record["pages"])) == 3
    assert record["one_minus_ned"] == sorted(record["one_minus_ned"])
    assert image.width == pictures.WIDTH and image.height < 1000


def test_a_page_that_is_not_the_one_read_is_refused(run, tmp_path):
    """As after a change of the renderer: prediction and picture would no longer belong together."""
    evaluation = tmp_path / "eval"
    evaluation.mkdir()
    for name in ("settings.json", "summary.json"):
        (evaluation / name).write_text((run / "eval" / name).read_text())
    # The pages' hashes of another renderer
    rows = [json.loads(line) for line in (run / "eval/heldout.jsonl").read_text().splitlines()]
    for row in rows:
        row["hash"]["picture"] = "0" * 16
    (evaluation / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="drawn otherwise now than when it was read"):
        draw("reading", tmp_path / "a.png", f"--evaluation={evaluation}", f"--checkpoint={run}")
    assert not (tmp_path / "a.png").exists()


def test_curves(run, tmp_path):
    record, _ = draw("curves", tmp_path / "a.png", f"--runs=one={run};other={run}",
                     "--panels=loss,gap,cosine,1-ned")
    last = json.loads((run / "summary.json").read_text())
    gap = round(last["vision/gap"], 4)
    assert record["last"]["gap"] == {"one": gap, "other": gap}
    with pytest.raises(ValueError, match="none of these runs has measured vision/local_accuracy"):
        draw("curves", tmp_path / "b.png", f"--runs=one={run}", "--panels=local")


def test_network(run, tmp_path):
    """Counts of the published network, as the paper and the published weights have them."""
    record, _ = draw("network", tmp_path / "a.png", f"--sizes=tiny={run},base")
    base = record["sizes"]["base"]
    assert (base["patches"], base["tokens"], base["positions"]) == (4096, 256, 273)
    assert base["params"]["sam"] + base["params"]["compressor"] == 95_569_152
    assert base["params"]["clip"] == 303_177_728
    summary = json.loads((run / "summary.json").read_text())
    assert record["sizes"]["tiny"]["total_params"] == summary["params"]


@pytest.mark.parametrize("flags, message", [
    (["--what=curves"], "needs --runs"),
    (["--what=curves", "--runs=checkpoints/stage1"], "must be LABEL=FOLDER"),
    (["--what=curves", "--runs=a=nowhere"], "nowhere has no metrics.jsonl"),
    (["--what=curves", "--runs=a=nowhere", "--panels=losses"], "--panels=losses: must be one of"),
    (["--what=reading", "--evaluation=nowhere"], "nowhere has no pages of --task=heldout"),
    (["--what=network", "--sizes=nano,mini,small,base"], "4 sizes do not fit"),
])
def test_mistakes_are_named(flags, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pictures.main([*flags, f"--out={tmp_path / 'a.png'}"])


@pytest.mark.parametrize("text", ["10,x", "101", "-1", ""])
def test_percentiles_are_checked(text):
    with pytest.raises(ValueError, match="whole numbers of 0 to 100"):
        pictures.parse_percentiles(text)


# -----------------------------------------------------------------------------
# Pages and marks


def row_of(truth, prediction, score=1.0, index=0):
    return {"truth": truth, "prediction": prediction, "one_minus_ned": score, "index": index,
            "vision_tokens": 16}


def test_pages_are_picked_by_score_alone():
    rows = [row_of("", "", score / 10, score) for score in (5, 3, 9, 0, 10)]
    picked = pictures.at_percentiles(rows, [0, 50, 100])
    assert [row["index"] for _, row in picked] == [0, 5, 10]


def test_lines_cover_the_text():
    text = "one two three four  five\nsix seven eight aVeryLongWordWithoutAnySpace end"
    ranges = pictures.line_ranges(text, 12)
    assert "".join(text[start:end] for start, end in ranges) == text
    for start, end in ranges:
        assert len(text[start:end].rstrip()) <= 12
        assert "\n" not in text[start:end - 1]


def test_marks_are_where_the_texts_differ():
    printed, read = pictures.marked_texts("a cat sat", "a cart set")
    assert printed == ("a cat sat", [c == "A" for c in "a cat sAt"])
    assert read == ("a cart set", [c in "RE" for c in "a caRt sEt"])


@pytest.mark.parametrize("length", [20, 300])
def test_colors(tmp_path, length):
    """Short texts below their page, long ones beside it: red and blue in both, only if they err."""
    page = Image.new("RGB", (64, 64), "white")
    truth = ("word " * 60)[:length]

    def colors(prediction):
        path = tmp_path / "a.png"
        pictures.draw_reading([(50, row_of(truth, prediction), page)], path)
        image = Image.open(path).convert("RGB")
        return {color for _, color in image.getcolors(100_000)}

    missed = (255, 187, 187)
    wrong = (187, 221, 255)
    assert not {missed, wrong} & colors(truth)
    assert {missed, wrong} <= colors("X" + truth[1:])
