"""
Proves that the verdict names models that read and models that do not; that every page counts
exactly once, failed ones as wrong, also after a kill and when pages change; that a cut of a
benchmark is said; and that tables, curve, controls and files for the official evaluators hold what
they should.

python -m pytest tests/test_eval.py
"""
import io
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from nanochat import figures, official, report, scoring, verdict
from nanochat.conversation import Task, ocr_conversation
from nanochat.engine import Engine, Result
from nanochat.image_modes import MODES
from scripts import speedrun_report, vision_eval
from tasks.folder import Folder
from tasks.omnidocbench import OmniDocBench
from tasks.synthdoc import SynthDoc

DEMO = Path(__file__).parents[1].parent / "shared/data/omnidocbench_demo"
needs_demo = pytest.mark.skipif(not DEMO.exists(), reason="the demo pages are not here")
PAGES = 20
CONFIG = {"chars": "10-24", "faces": "mono,serif"}


def truth_of(conversation):
    return conversation["messages"][-1]["content"]


def picture_of(conversation):
    return conversation["images"][0].tobytes()


class Fake(Engine):
    """An engine whose text is a function of the conversation; it notes which pages it was given."""
    say = None
    budget = None  # pages after which it is killed
    tokens = 5
    finished = True

    def generate(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        self.limit = max_new_tokens
        if self.budget is not None:
            self.budget -= len(conversations)
            if self.budget < 0:
                raise KeyboardInterrupt
        results = []
        for conversation in conversations:
            text = self.say(conversation)
            self.asked.append(conversation["id"])
            results.append(Result(text, self.tokens, self.finished, -0.1))
        return results


@pytest.fixture
def fake(model, tokenizer, tmp_path, monkeypatch):
    """
    A function (say, *flags) -> (summary, printed lines, folder): the whole script, with an engine
    that says what `say` returns in place of a checkpoint.
    """
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/model.safetensors").write_bytes(b"weights")
    engine = Fake(model.eval(), tokenizer, MODES["64px"])
    engine.asked = []
    engine.folder = tmp_path / "ckpt"
    meta = {"mode": "64px", "step": 7, "user_config": CONFIG}
    monkeypatch.setattr(vision_eval, "load_engine", lambda args, device: (engine, meta))

    def call(say, *flags, budget=None, drawn=False):
        with monkeypatch.context() as patch:
            if not drawn:  # drawing takes longer than everything else
                patch.setattr(vision_eval, "plot_curve",
                              lambda path, table, pages: Path(path).write_bytes(b""))
            engine.say = say
            engine.budget = budget
            given = " ".join(flags)
            defaults = ["--batch-size=4"]
            if "--task" not in given:
                defaults += ["--task=heldout", f"--max-problems={PAGES}"]
            if "--out" not in given:
                defaults += [f"--out={tmp_path / 'out'}"]
            out = io.StringIO()
            with redirect_stdout(out):
                vision_eval.main([f"--checkpoint={tmp_path / 'ckpt'}", *defaults, *flags])
        lines = out.getvalue().splitlines()
        return json.loads(lines[-1]), lines, tmp_path / "out"

    call.engine = engine
    return call


@pytest.fixture
def pages():
    faces = ["mono", "serif"]
    return list(SynthDoc("heldout", PAGES, image_size=64, chars=(10, 24), faces=faces, seed=2))


def reader(pages, shift=0):
    """Says what is on the picture, or on the page `shift` further on; nothing if it is unknown."""
    known = {}
    for i, page in enumerate(pages):
        known[picture_of(page)] = truth_of(pages[(i + shift) % len(pages)])
    return lambda conversation: known.get(picture_of(conversation), "")


def rows_of(out, name):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


# -----------------------------------------------------------------------------
# Fake models


def fake_models(pages):
    """{kind: (say, what the verdict must begin with, what it must mention)}."""
    right = reader(pages)
    numbers = {picture_of(page): i for i, page in enumerate(pages)}

    def page_then_loop(conversation):
        text = right(conversation)
        return text + " and so on" * 60 if text else ""

    def half(conversation):
        i = numbers.get(picture_of(conversation))
        return right(conversation) if i is not None and i % 2 == 0 else ""

    def one_text_for_45_percent(conversation):
        i = numbers.get(picture_of(conversation), 0)
        often = i < 0.45 * len(pages)
        return "Figure 1 shows the results." if often else right(conversation)

    return {
        "constant": (lambda c: "0.6.", "same text for every page: '0.6.' on", ""),
        "loop": (lambda c: truth_of(c)[:6] + " and so on" * 60, "loops: on", ""),
        "other page": (reader(pages, 1), "reads another page: 1-NED", ""),
        "oracle": (right, "reads: 1-NED +", ""),
        "recites": (truth_of, "ignores the page: 1-NED +0.000", ""),
        "page then loop": (page_then_loop, "loops: on", "looping on"),
        "half right, half empty": (half, "reads in part: empty on", "(50%)"),
        "one text for 45 %": (one_text_for_45_percent,
                              "reads in part: the same wrong text as for other pages on", ""),
    }


GRADES = {"oracle": "good", "half right, half empty": "mixed", "one text for 45 %": "mixed"}
KINDS = ["constant", "loop", "other page", "oracle", "recites", "page then loop",
         "half right, half empty", "one text for 45 %"]


@pytest.mark.parametrize("kind", KINDS)
def test_fake_models_are_named_by_the_verdict(fake, pages, kind):
    say, begins, mentions = fake_models(pages)[kind]
    summary, lines, out = fake(say, f"--controls={PAGES}")
    assert summary["verdict"].startswith(begins) and mentions in summary["verdict"]
    assert summary["grade"] == GRADES.get(kind, "bad")
    assert any(begins in line for line in lines)
    controls = summary["heldout"]["controls"]
    assert set(controls) == {"blank", "another", "random_chars", "shuffled"}
    if kind == "oracle":
        assert summary["one_minus_ned"] == 1 and summary["ned"] == 0 and summary["ci95"] == [1, 1]
        assert controls["blank"]["one_minus_ned"] == 0

    html = (out / "report.html").read_text()
    assert f"<p class='verdict {summary['grade']}'>heldout: {begins.split(chr(39))[0]}" in html
    loops = PAGES if "loop" in kind else 0
    assert html.count('class="flag">loops<') == loops


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The eight real pages, their pictures reduced: a fake engine need not see every pixel."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "images").mkdir()
    shutil.copy(DEMO / "OmniDocBench.json", folder)
    for path in (DEMO / "images").iterdir():
        with Image.open(path) as image:
            image.reduce(8).save(folder / "images" / path.name)
    return folder


@needs_demo
@pytest.mark.parametrize("kind", KINDS)
def test_fake_models_on_real_pages(fake, demo, kind):
    real = list(OmniDocBench(demo))
    say, begins, mentions = fake_models(real)[kind]
    if kind == "half right, half empty":  # 0.5 on average, and that of eight pages is uncertain
        begins, mentions = "too few pages to tell", "empty on 4 of 8 (50%)"
    summary, _, _ = fake(say, "--task=omnidocbench", f"--path={demo}", "--controls=8",
                         "--report-pages=0")
    assert summary["verdict"].startswith(begins) and mentions in summary["verdict"]
    assert summary["samples"] == summary["of"] == 8 and summary["failed"] == 0
    if kind == "oracle":
        assert summary["ned"] == 0.0 and summary["repetition_rate"] == 0


def row(index, score, truth=None, prediction=None, **more):
    """A row of a page that was read with a given score."""
    truth = f"The truth of page {index}" if truth is None else truth
    prediction = f"What was read on {index}" if prediction is None else prediction
    return {"index": index, "task": "fox", "truth": truth, "prediction": prediction,
            "one_minus_ned": score, "failed": False, "finished": True, "repetition": False, **more}


def test_a_failed_pair_says_nothing_about_reading():
    """A blind model: 0.3 everywhere. The pages that failed under the control are no gain."""
    rows = [row(i, 0.3) for i in range(10)]
    another = [row(i, 0.3) for i in range(10)]
    for failed in another[:6]:
        failed.update(failed=True, one_minus_ned=0.0)
    found = verdict.judge(rows, {"another": another, "blank": another})
    assert found.text.startswith("ignores the page: 1-NED +0.000")


def test_a_pair_or_two_prove_nothing():
    rows = [row(i, 0.9) for i in range(10)]
    another = [row(i, 0.1) for i in range(10)]
    found = verdict.judge(rows, {"another": another[:1], "blank": another[:1]})
    assert found.grade == "open" and found.text.startswith("too few pages to tell")
    assert "on 1 pages" in found.text


def test_a_text_that_is_right_on_most_pages_is_no_collapse():
    """An empty table, or "yes": as often as it is the truth."""
    rows = [row(i, 1.0, truth="", prediction="") for i in range(6)] + [row(i, 1.0) for i in range(6, 10)]
    for page in rows[6:]:
        page["prediction"] = page["truth"]
    another = [row(i, 0.1) for i in range(10)]
    assert verdict.judge(rows, {"another": another, "blank": another}).grade == "good"
    for page in rows[6:]:
        page.update(prediction="yes", one_minus_ned=0.0)
    for page in rows[:6]:
        page.update(truth=f"Page {page['index']}", prediction="yes", one_minus_ned=0.0)
    assert verdict.judge(rows, {}).text.startswith("same text for every page: 'yes' on 10 of 10")


def test_as_good_on_blank_pages_is_not_reading():
    rows = [row(i, 0.9) for i in range(10)]
    another = [row(i, 0.1) for i in range(10)]
    blank = [row(i, 0.9) for i in range(10)]
    assert verdict.judge(rows, {"another": another, "blank": another}).grade == "good"
    found = verdict.judge(rows, {"another": another, "blank": blank})
    assert found.text.startswith("ignores the page") and "+0.000 against a blank one" in found.text


def test_faults_are_said_from_five_percent_on():
    rows = [row(i, 0.9) for i in range(40)]
    another = [row(i, 0.1) for i in range(40)]
    controls = {"another": another, "blank": another}
    for cut in rows[:2]:
        cut["finished"] = False
    assert verdict.judge(rows, controls).text.startswith("reads: ")  # 5 %, and not more
    rows[2]["finished"] = False
    found = verdict.judge(rows, controls)
    assert found.text.startswith("reads in part: cut by the token limit on 3 of 40 (8%); 1-NED")
    assert len(found.faults["cut"]) == 3


def test_an_empty_page_and_equal_answers_are_no_faults():
    rows = [row(0, 1.0, truth="", prediction=""), row(1, 1.0, truth="yes", prediction="yes"),
            row(2, 0.0, truth="no", prediction="yes"),
            row(3, 1.0, truth="The same line", prediction="The same line"),
            row(4, 1.0, truth="The same line", prediction="The same line")]
    found = verdict.judge(rows, {}).faults
    assert {fault: len(pages) for fault, pages in found.items()} == dict.fromkeys(found, 0)


def test_shares_and_distribution_of_scores(fake, pages):
    say, _, _ = fake_models(pages)["half right, half empty"]
    summary, lines, out = fake(say)
    figures = summary["heldout"]
    assert figures["shares"]["empty"] == 0.5 and figures["shares"]["cut"] == 0
    assert figures["histogram"] == [10, 0, 0, 0, 0, 0, 0, 0, 0, 10]
    assert figures["quantiles"]["p25"] == 0 and figures["quantiles"]["p75"] == 1
    assert any(line.startswith("  1-NED of pages: min 0.000, p10 0.000") for line in lines)
    assert (out / "report.html").read_text().count('<div title="1-NED') == 10
    assert "controls would tell" in summary["verdict"] and summary["grade"] == "open"


# -----------------------------------------------------------------------------
# Files


def test_last_lines_and_files(fake, pages):
    summary, lines, out = fake(reader(pages), drawn=True)
    assert {"task", "samples", "of", "failed", "one_minus_ned", "ned", "cer", "f1", "precision",
            "precision_official", "repetition_rate", "ci95", "pages_per_sec",
            "tokens_per_sec"} <= set(summary)
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["task"] == "heldout" and summary["samples"] == PAGES
    assert lines[-2] == f"report: {out / 'report.html'}"
    assert (out / "curve.png").stat().st_size > 10_000
    html = (out / "report.html").read_text()
    assert html.count('src="data:image/png') == PAGES and html.count("src='data:image/png") == 1
    assert "http" not in html  # nothing from elsewhere


def test_the_report_shows_a_page_above_all_tables(fake, pages):
    _, _, out = fake(reader(pages), "--controls=4")
    html = (out / "report.html").read_text()
    unfolded = ""
    for part in html.split("<details>"):
        unfolded += part.split("</details>")[-1]
    assert "<table" in html and "<table" not in unfolded and "alt='curve'" not in unfolded
    assert unfolded.index("class='verdict good'") < unfolded.index('<img alt="page"')
    assert ".curve { max-width: 100% }" in html and "img class='curve'" in html


def test_three_decimals():
    assert report.cell(0.98765) == "0.988" and report.cell(1.0) == "1.000"
    assert report.cell([0.5, 0.25]) == "0.500 to 0.250" and report.cell(1250.0) == "1250.0"
    table = report.html_table([{"a": 1, "b": 0.5}, {"a": 2, "c": "<"}])
    assert table.count("<th>") == 3 and "<td>0.500</td>" in table and "<td>&lt;</td>" in table


def test_settings_name_the_real_dtype(fake, pages):
    _, _, out = fake(reader(pages))
    assert json.loads((out / "settings.json").read_text())["dtype"] == "float32"


# -----------------------------------------------------------------------------
# Stopped and begun again, and pages that change


def test_killed_and_begun_again(fake, pages):
    say = reader(pages)
    with pytest.raises(KeyboardInterrupt):
        fake(say, budget=8)
    fake.engine.asked.clear()

    summary, lines, out = fake(say)
    assert len(set(fake.engine.asked)) == len(fake.engine.asked) == PAGES - 8
    assert summary["samples"] == PAGES and summary["one_minus_ned"] == 1
    assert summary["reused"] == 8
    assert any(line.startswith(f"heldout: 8 of {PAGES} predictions are of an earlier run")
               for line in lines)

    fake(say, "--batch-size=2")  # finished: nothing is read again, whatever the batch size
    assert len(fake.engine.asked) == PAGES - 8
    with pytest.raises(ValueError, match="max_new_tokens was -1, now 50.*give another --out"):
        fake(say, "--max-new-tokens=50")


def test_what_a_killed_rank_wrote_counts(fake, pages):
    say = reader(pages)
    _, _, out = fake(say)
    lines = (out / "predictions.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == PAGES
    (out / "predictions.jsonl").write_text("".join(lines[:3]))
    # one page that counts, and one line cut short
    (out / "predictions.jsonl.rank1").write_text(lines[3] + lines[4][:20])
    fake.engine.asked.clear()
    summary, _, _ = fake(say)
    assert len(fake.engine.asked) == PAGES - 4 and summary["samples"] == PAGES
    assert not list(out.glob("*.rank*"))


def write_folder(folder, texts):
    """A folder of pages for --task=folder; every page looks different."""
    folder.mkdir(exist_ok=True)
    for i, (name, text) in enumerate(texts.items()):
        Image.new("L", (40, 30), 10 * i).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text)


def test_pages_that_change(fake, tmp_path):
    """Every row is of the page as it is now, and only pictures that are new are read."""
    folder = tmp_path / "bench"
    texts = {name: f"Text of page {name}" for name in "abcdef"}
    write_folder(folder, texts)
    shades = {10 * i: text for i, text in enumerate(texts.values())}

    def say(conversation):
        return shades.get(conversation["images"][0].convert("L").getpixel((0, 0)), "?")

    flags = ["--task=folder", f"--path={folder}"]
    summary, _, out = fake(say, *flags)
    assert summary["one_minus_ned"] == 1 and summary["reused"] == 0
    fake.engine.asked.clear()

    # the truth corrected: read by nobody, scored anew
    (folder / "b.txt").write_text("Another text that fits not at all")
    summary, lines, _ = fake(say, *flags)
    scores = {r["id"]: r["one_minus_ned"] for r in rows_of(out, "folder")}
    assert scores["b.png"] < 0.7 and scores["a.png"] == scores["c.png"] == 1
    assert fake.engine.asked == [] and "(1 scored anew as their truth changed" in "".join(lines)
    (folder / "b.txt").write_text(texts["b"])

    # a page added in front of all others, which moves every index
    Image.new("L", (40, 30), 200).save(folder / "0.png")
    (folder / "0.txt").write_text("New page")
    summary, lines, _ = fake(say, *flags)
    assert fake.engine.asked == ["0.png"] and summary["samples"] == 7 and summary["reused"] == 6
    scores = {r["id"]: r["one_minus_ned"] for r in rows_of(out, "folder")}
    assert scores.pop("0.png") < 0.2 and set(scores.values()) == {1.0}

    # a page renamed: its picture is known
    fake.engine.asked.clear()
    (folder / "c.png").rename(folder / "z.png")
    (folder / "c.txt").rename(folder / "z.txt")
    _, lines, _ = fake(say, *flags)
    assert fake.engine.asked == [] and "1 renamed" in "".join(lines)
    assert [r["id"] for r in rows_of(out, "folder")][-1] == "z.png"

    # a picture replaced: read again
    Image.new("L", (40, 30), 201).save(folder / "d.png")
    fake(say, *flags)
    assert fake.engine.asked == ["d.png"]
    scores = {r["id"]: r["one_minus_ned"] for r in rows_of(out, "folder")}
    assert scores["d.png"] < 0.2 and scores["e.png"] == 1


def test_rows_carry_hashes(fake, pages):
    _, _, out = fake(reader(pages))
    hashes = [r["hash"] for r in rows_of(out, "heldout")]
    for key in ("page", "picture", "truth"):
        assert len({h[key] for h in hashes}) == PAGES
    page = pages[0]
    same = {**page, "id": "other", "messages": [page["messages"][0], {"content": "other"}]}
    assert scoring.picture_hash(same) == scoring.picture_hash(page) == hashes[0]["picture"]
    asked = ocr_conversation(page["images"][0], "", "", prompt="\nWhat is it?")
    assert scoring.picture_hash(asked) != hashes[0]["picture"]  # another prompt, another answer


# -----------------------------------------------------------------------------
# Cuts: of pages and of tokens


def test_a_benchmark_is_read_whole_unless_a_cut_is_asked_for(fake, tmp_path):
    texts = {f"{i:03}": f"Text of page {i}" for i in range(300)}
    write_folder(tmp_path / "bench", texts)
    flags = ["--task=folder", f"--path={tmp_path / 'bench'}", "--batch-size=50",
             "--report-pages=2"]
    summary, lines, _ = fake(truth_of, *flags)
    assert summary["samples"] == summary["of"] == 300
    assert "300 of 300 pages" in "".join(lines)

    summary, lines, out = fake(truth_of, *flags, "--max-problems=20", "--controls=5")
    assert summary["samples"] == 20 and summary["of"] == 300
    text = "\n".join(lines)
    assert "folder was read in part: 20 of 300 pages" in text and "5 of 300 pages" in text
    assert "20 of 300 pages" in (out / "report.html").read_text()
    indices = [r["index"] for r in rows_of(out, "folder")]
    assert indices == sorted(indices) and max(indices) > 200  # not the first 20
    assert indices == vision_eval.sample(300, 20, seed=2)
    assert set(indices) < set(vision_eval.sample(300, 40, seed=2))


def test_synthetic_splits_keep_256_pages(fake):
    args = vision_eval.parse_args(["--task=heldout,synthchart"])
    tasks = vision_eval.tasks_of(args, CONFIG, 64)
    assert [len(task) for _, task in tasks] == [256, 256]


def test_the_token_limit_follows_the_task_and_the_room(fake, pages, tokenizer, tmp_path):
    summary, _, _ = fake(reader(pages))
    longest = max(len(tokenizer.encode(truth_of(page))) for page in pages)
    assert summary["max_new_tokens"] == longest + longest // 2 + 32 == fake.engine.limit

    room = scoring.room_left(fake.engine, pages[0])
    fake(reader(pages), "--max-new-tokens=5000", f"--out={tmp_path / 'other'}")
    assert fake.engine.limit == room < 256


def test_cut_pages_are_named_in_the_banner(fake, pages):
    fake.engine.finished = False
    summary, lines, _ = fake(reader(pages), f"--controls={PAGES}")
    text = "\n".join(lines)
    assert f"{PAGES} of {PAGES} pages were cut short by the limit of" in text and "!" * 80 in text
    assert summary["verdict"].startswith(
        f"reads in part: cut by the token limit on {PAGES} of {PAGES} (100%)")


def test_a_text_that_a_lower_limit_cut_is_read_again(tmp_path):
    predictions = scoring.Predictions(str(tmp_path))
    records = [{"task": "fox", "picture": "a", "finished": False, "limit": 100, "tokens": 100},
               {"task": "fox", "picture": "b", "finished": True, "limit": 100, "tokens": 50}]
    predictions.append(records)
    predictions.load()
    assert predictions.find("fox", "a", 100) == records[0]
    assert predictions.find("fox", "a", 101) is None
    assert predictions.find("fox", "b", 101) == records[1]
    assert predictions.find("fox.blank", "a", 100) is None
    # nor does one that is longer than this limit allows
    assert predictions.find("fox", "a", 99) is None and predictions.find("fox", "b", 49) is None


# -----------------------------------------------------------------------------
# Real pages


def one_page(name, language="english", text=None):
    """A page in OmniDocBench's format, of one block of text."""
    block = {"category_type": "text_block", "poly": [0] * 8, "ignore": False, "order": 1,
             "anno_id": 1, "text": f"Text of {name}." if text is None else text}
    attributes = {"language": language, "special_issue": ["None", "watermark"]}
    return {"layout_dets": [block],
            "page_info": {"image_path": name, "page_attribute": attributes}}


def write_bench(folder, pages, pictures):
    (folder / "images").mkdir(parents=True)
    for i, name in enumerate(pictures):
        path = folder / "images" / name
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (90, 120), 255 - i).save(path)
    (folder / "OmniDocBench.json").write_text(json.dumps(pages))
    return folder


@pytest.fixture
def real(tmp_path):
    """Three pages, one picture broken and one missing."""
    pages = [one_page("a.b.png"), one_page("broken.jpg", "chinese"),
             one_page("missing.jpeg", "chinese")]
    folder = write_bench(tmp_path / "bench", pages, ["a.b.png"])
    (folder / "images/broken.jpg").write_bytes(b"no picture")
    return folder


def test_failed_pages_count_as_wrong(fake, real):
    summary, lines, out = fake(truth_of, "--task=omnidocbench", f"--path={real}", "--controls=2")
    assert summary["samples"] == 3 and summary["failed"] == 2
    assert summary["one_minus_ned"] == pytest.approx(1 / 3)
    text = "\n".join(lines)
    assert "2 of 3 pages failed and count as wrong; the first: OmniDocBench: row 1" in text
    assert "failed on 2 of 3 (67%)" in summary["verdict"]
    files = {path.name: path.read_text() for path in (out / "md").iterdir()}
    assert files == {"a.b.md": "Text of a.b.png.", "broken.md": "", "missing.jpeg.md": ""}

    rows = rows_of(out, "omnidocbench")
    truths = [r["truth"] for r in rows]
    assert truths == ["Text of a.b.png.", "Text of broken.jpg.", "Text of missing.jpeg."]
    assert rows[1]["one_minus_ned"] == 0 and rows[1]["flags"] == ["failed"]
    assert rows[1]["id"] == "broken.jpg"
    assert rows[1]["error"] in (out / "report.html").read_text()
    # no page of a picture task can be printed anew with other words
    assert set(summary["omnidocbench"]["controls"]) == {"blank", "another"}


def test_failed_pages_stay_in_breakdowns_and_curve(fake, real):
    summary, _, _ = fake(truth_of, "--task=omnidocbench", f"--path={real}")
    figures = summary["omnidocbench"]
    assert figures["by_language"]["chinese"] == [0.0, 2, [0.0, 0.0]]
    assert figures["by_language"]["english"] == [1.0, 1, [0.0, 1.0]]
    assert sum(point["pages"] for point in summary["curve"]) == 3
    assert sum(pages for _, pages, _ in figures["by_text_tokens"].values()) == 3


def test_failed_pages_are_tried_again(fake, real):
    flags = ["--task=omnidocbench", f"--path={real}"]
    fake(truth_of, *flags)
    Image.new("L", (90, 120), 9).save(real / "images/broken.jpg")
    summary, _, _ = fake(truth_of, *flags)
    assert summary["failed"] == 1 and fake.engine.asked == ["a.b.png", "broken.jpg"]


def test_exit_status_when_every_page_failed(fake, real):
    (real / "images/a.b.png").unlink()
    with pytest.raises(SystemExit) as stopped:
        fake(truth_of, "--task=omnidocbench", f"--path={real}")
    assert stopped.value.code == 1


def test_a_page_that_the_engine_refuses_fails_alone(fake):
    def say(conversation):
        if conversation["id"].endswith("/3"):
            raise ValueError("cache of 999 positions")
        return truth_of(conversation)
    summary, _, _ = fake(say)
    assert summary["failed"] == 1 and summary["one_minus_ned"] == pytest.approx(1 - 1 / PAGES)


def test_a_prompt_too_long_takes_no_room_from_others(fake, tmp_path):
    lines = []
    for i, prompt in enumerate(["short", "word " * 300, "short"]):
        Image.new("L", (30, 30), i).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "text": f"Text {i}", "prompt": prompt}))
    (tmp_path / "pages.jsonl").write_text("\n".join(lines))
    summary, printed, _ = fake(truth_of, "--task=folder", f"--path={tmp_path / 'pages.jsonl'}")
    assert summary["failed"] == 1 and summary["one_minus_ned"] == pytest.approx(2 / 3)
    assert fake.engine.limit == summary["max_new_tokens"] > 30
    assert "leaves no room for an answer: the decoder has 256" in "".join(printed)


def test_tables_when_asked_for(fake, tmp_path):
    page = one_page("p.png")
    table = {"category_type": "table", "poly": [0] * 8, "ignore": False, "order": 2, "anno_id": 2,
             "html": "<table><tr><td>1</td></tr></table>"}
    page["layout_dets"].append(table)
    folder = write_bench(tmp_path / "bench", [page], ["p.png"])
    asked = []

    def say(conversation):
        asked.append(conversation["messages"][0]["content"][1]["text"])
        return f"Text of p.png.\n\n{table['html']}"

    flags = ["--task=omnidocbench", f"--path={folder}"]
    summary, _, _ = fake(say, *flags, f"--out={tmp_path / 'text'}")
    assert summary["one_minus_ned"] < 0.5
    summary, _, _ = fake(say, *flags, "--kinds=text,table", "--prompt=To Markdown.",
                         f"--out={tmp_path / 'table'}")
    assert summary["one_minus_ned"] == 1
    assert asked == ["\nFree OCR.", "\nTo Markdown."]


def test_markdown_names():
    """As the official evaluator looks for them: <name less 4 characters>.md, then <name>.md."""
    names = ["a.pdf_1.jpg", "b.jpeg", "c.png", "c.jpg", "x/p.png", "y/p.png", "z/only.png"]
    paths = official.markdown_names(names)
    assert list(paths.values()) == ["a.pdf_1.md", "b.jpeg.md", "c.png.md", "c.jpg.md",
                                    "x/p.png.md", "y/p.png.md", "only.md"]
    outside = official.markdown_names(["../../p.png", "y/p.png"])
    assert outside["../../p.png"] == "p.png.md"


def test_pages_of_one_name_in_two_folders_both_get_their_file(fake, tmp_path):
    pages = [one_page("x/p.png"), one_page("y/p.png")]
    folder = write_bench(tmp_path / "bench", pages, ["x/p.png", "y/p.png"])
    _, _, out = fake(truth_of, "--task=omnidocbench", f"--path={folder}")
    assert (out / "md/x/p.png.md").read_text() == "Text of x/p.png."
    assert (out / "md/y/p.png.md").read_text() == "Text of y/p.png."


def test_a_lone_surrogate_stops_nothing(fake, tmp_path):
    folder = write_bench(tmp_path / "bench", [one_page("p.png", text="odd \ud800 text")], ["p.png"])
    summary, _, out = fake(lambda c: "odd \ufffd text", "--task=omnidocbench", f"--path={folder}")
    assert summary["one_minus_ned"] == 1
    assert rows_of(out, "omnidocbench")[0]["truth"] == "odd \ufffd text"


OFFICIAL = os.environ.get("OMNIDOCBENCH_OFFICIAL", "")  # a checkout of opendatalab/OmniDocBench


@needs_demo
@pytest.mark.skipif(not OFFICIAL, reason="needs OMNIDOCBENCH_OFFICIAL and its requirements")
def test_the_official_evaluator_finds_the_truth_perfect(fake, tmp_path):
    """Every page is found; text and order have distance 0, tables a TEDS of 1."""
    _, _, out = fake(truth_of, "--task=omnidocbench", f"--path={DEMO}", "--kinds=text,table",
                     "--report-pages=0")
    metrics = {"text_block": {"metric": ["Edit_dist"]}, "table": {"metric": ["TEDS"]},
               "reading_order": {"metric": ["Edit_dist"]}}
    dataset = {"dataset_name": "end2end_dataset", "match_method": "quick_match",
               "ground_truth": {"data_path": str(DEMO / "OmniDocBench.json")},
               "prediction": {"data_path": str(out / "md")}}
    config = {"end2end_eval": {"metrics": metrics, "dataset": dataset}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (tmp_path / "result").mkdir()  # the evaluator writes into it and does not make it

    python = os.environ.get("OMNIDOCBENCH_PYTHON", sys.executable)
    command = [python, Path(OFFICIAL) / "pdf_validation.py", "--config", tmp_path / "config.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No prediction for" not in done.stdout
    result = json.loads((tmp_path / "result/md_quick_match_metric_result.json").read_text())
    assert result["text_block"]["all"]["Edit_dist"]["ALL_page_avg"] == 0
    assert result["reading_order"]["all"]["Edit_dist"]["ALL_page_avg"] == 0
    assert result["table"]["all"]["TEDS"]["all"] == 1


# -----------------------------------------------------------------------------
# Answers, Fox, W&B, another evaluation


class Questions(Task):
    """Three questions of ChartQA's kind, with who asked them."""
    answer_metric = "relaxed_accuracy"
    answers = ("100", "yes", "0")
    kinds = ("human", "augmented", "augmented")

    def __len__(self):
        return 3

    def __getitem__(self, i):
        self.check_index(i)
        return ocr_conversation(Image.new("L", (30, 30), i), self.answers[i], f"q{i}",
                                attributes={"kind": self.kinds[i]})

    def truth(self, i):
        return self.answers[i]


def test_chartqa_has_relaxed_accuracy_by_part(fake, monkeypatch):
    monkeypatch.setattr(vision_eval, "open_set", lambda *_: Questions())
    said = {"100": "104", "yes": "Yes", "0": "0.1"}
    summary, lines, out = fake(lambda c: said[truth_of(c)], "--task=chartqa-test")
    assert summary["relaxed_accuracy"] == pytest.approx(2 / 3) and summary["one_minus_ned"] < 0.7
    parts = summary["chartqa-test"]["relaxed_accuracy_by_kind"]
    assert parts == {"augmented": [0.5, 2, [0.0, 1.0]], "human": [1.0, 1, [0.0, 1.0]]}
    assert any(line.startswith("  relaxed accuracy by kind: augmented 0.500") for line in lines)
    html = (out / "report.html").read_text()
    assert "<th>relaxed accuracy</th>" in html and "<td>augmented</td><td>0.500</td>" in html


def test_a_file_for_foxs_own_script(fake, tmp_path):
    folder = tmp_path / "fox"
    (folder / "en_pdf_png").mkdir(parents=True)
    records = []
    for i in range(2):
        name = f"en_{i}.png"
        Image.new("L", (30, 30), i).save(folder / "en_pdf_png" / name)
        turns = [{"from": "human", "value": "<image>\nOCR this image: "},
                 {"from": "gpt", "value": f"Text {i}"}]
        records.append({"image": name, "len": 2, "conversations": turns})
    (folder / "en_page_ocr.json").write_text(json.dumps(records))
    _, _, out = fake(lambda c: "Text 0" if truth_of(c) == "Text 0" else " ", "--task=fox",
                     f"--path={folder}")
    assert json.loads((out / "fox_official.json").read_text()) == [
        {"image": "en_0.png", "question": "Free OCR.", "label": "Text 0", "answer": "Text 0"},
        {"image": "en_1.png", "question": "Free OCR.", "label": "Text 1", "answer": "\u2205"}]


def test_wandb_gets_figures_pictures_and_curve(fake, pages, monkeypatch):
    logged = {"rows": []}
    run = SimpleNamespace(log=logged.update, finish=lambda: None)
    table = SimpleNamespace(add_data=lambda *row: logged["rows"].append(row))
    wandb = SimpleNamespace(init=lambda **kw: run, Image=lambda x: ("image", x),
                            Table=lambda columns: table)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    fake(reader(pages), "--run=name")
    assert logged["heldout/one_minus_ned"] == 1 and len(logged["rows"]) == PAGES
    assert logged["curve"][0] == "image" and "pages" in logged


def test_two_evaluations_are_compared_page_by_page(fake, pages, tmp_path):
    first = tmp_path / "first"
    worse = reader(pages[:PAGES // 2])  # knows half of the pages
    fake(worse, f"--out={first}")
    summary, lines, out = fake(reader(pages), f"--against={first}")
    against = summary["heldout"]["against"]
    assert against["difference"] == pytest.approx(0.5) and against["pages"] == PAGES
    assert 0.2 < against["ci95"][0] < 0.5 < against["ci95"][1] < 0.8
    assert against["better"] == PAGES // 2 and against["worse"] == 0
    line = f"against {first}: 1-NED +0.500"
    assert any(line in printed for printed in lines) and line in (out / "report.html").read_text()

    with pytest.raises(FileNotFoundError, match="has no random_chars.jsonl: evaluate the other"):
        fake(worse, f"--against={first}", "--task=random_chars", f"--out={tmp_path / 'none'}")


def hashed(page, picture, truth, score):
    return {"hash": {"page": page, "picture": picture, "truth": truth}, "one_minus_ned": score}


def test_only_equal_pages_are_compared():
    here = [hashed("a", "1", "x", 1.0), hashed("b", "2", "y", 1.0), hashed("c", None, "z", 0.0),
            hashed("d", "4", "v", 1.0)]
    there = [hashed("a", "1", "x", 0.5), hashed("b", "other", "y", 0.0),
             hashed("c", "3", "z", 0.5), hashed("d", "4", "corrected", 0.0)]
    found = verdict.compare(here, there)
    assert found["pages"] == 2 and found["of"] == 4 and found["difference"] == 0
    assert found["better"] == found["worse"] == 1
    with pytest.raises(ValueError, match="no page is in both evaluations"):
        verdict.compare(here[:1], there[1:])


def test_the_last_line_of_speedrun_says_of_how_many(tmp_path, capsys):
    training = dict.fromkeys(speedrun_report.TRAINING, 1) | {"params": 5}
    for stage in ("stage1", "stage2"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "summary.json").write_text(json.dumps(training))
    (tmp_path / "stage2/eval").mkdir()
    figures = {"heldout": {"one_minus_ned": 0.9, "samples": 20, "of": 300}, "step": 7}
    (tmp_path / "stage2/eval/summary.json").write_text(json.dumps(figures))
    speedrun_report.main([f"--checkpoints={tmp_path}", "--started=0"])
    record = json.loads(capsys.readouterr().out)
    assert record["eval"] == {"heldout": figures["heldout"]} and record["params"] == 5


# -----------------------------------------------------------------------------
# Tables


def sized(text_tokens, score, mode="tiny", vision=64, positions=73, truth="", **attributes):
    """A row as the curve and the breakdowns need it."""
    return {"task": "fox", "mode": mode, "text_tokens": text_tokens, "vision_tokens": vision,
            "positions": positions, "precision": score, "precision_official": score,
            "one_minus_ned": score, "truth": truth, "attributes": attributes}


def test_curve_in_the_papers_form():
    rows = [sized(650, 1.0), sized(690, 0.5), sized(1250, 0.25),
            sized(1250, 0.75, "small", 100, 111), sized(0, 0.0, vision=0, truth=None)]
    first, second, third = figures.curve(rows)
    assert first["mode"] == "small" and first["bucket"] == "1200-1300"
    assert first["pages"] == 1 and first["precision"] == 0.75
    assert second["bucket"] == "600-700" and second["pages"] == 2
    assert second["one_minus_ned"] == 0.75
    assert second["tokens_per_vision_token"] == pytest.approx(670 / 64, abs=1e-3)
    assert second["tokens_per_position"] == pytest.approx(670 / 73, abs=1e-3)
    assert third["vision_tokens"] == 64 and third["positions"] == 73

    by_ratio = figures.curve(rows, "tokens_per_vision_token")
    assert sum(point["pages"] for point in by_ratio) == 4
    assert [point["bucket"] for point in by_ratio] == ["12-14", "10-12", "18-20"]
    assert figures.curve([sized(0, 0.0, vision=0, truth=None)]) == []


def test_a_page_that_did_not_open_is_in_the_curve_at_the_size_of_the_others():
    rows = [sized(650, 1.0), sized(650, 1.0), sized(650, 0.0, mode="", vision=0)]
    [line] = figures.curve(rows)
    assert line["pages"] == 3 and line["one_minus_ned"] == pytest.approx(2 / 3, abs=1e-4)
    assert line["vision_tokens"] == 64 and line["mode"] == "tiny"


def test_breakdown():
    rows = [sized(1, 1.0, size=10, tags=["a", "b"]), sized(1, 0.5, size=9, tags=["a"]),
            sized(1, 0.0, size=9)]
    by_size = figures.breakdown(rows, "size")
    assert list(by_size.items()) == [("9", [0.25, 2, [0.0, 1.0]]), ("10", [1.0, 1, [0.0, 1.0]])]
    by_tag = figures.breakdown(rows, "tags")
    assert by_tag == {"a": [0.75, 2, [0.0, 1.0]], "b": [1.0, 1, [0.0, 1.0]]}
    assert figures.breakdown(rows[1:], "size") == {}  # nothing to compare


def test_colored_differences_are_escaped():
    left, right = report.colored("<b>cat", "<b>rat")
    assert (left, right) == ("&lt;b&gt;<del>c</del>at", "&lt;b&gt;<ins>r</ins>at")
    left, right = report.colored("one two " * 60, "one two " * 30 + "2 " + "two one " * 29)
    assert "<del>" in left and "<ins>" in right
    left, _ = report.colored("\u5929\u5730" * 200, "\u5929\u4eba" * 200)  # no spaces to cut at
    assert left.startswith("\u5929<del>\u5730</del>\u5929")


@pytest.mark.parametrize("unit", ["ab ", "the cat sat ", "\u5929\u5730", "a"])
def test_coloring_a_long_loop_is_quick(unit):
    """8,000 repetitive characters took difflib 32 s. In processor time: the machine may be busy."""
    truth = (unit * 8000)[:8000]
    start = time.process_time()
    left, _ = report.colored(truth, truth[:3000] + "x" + truth[3001:7000])
    assert time.process_time() - start < 2 and "<del>" in left


# -----------------------------------------------------------------------------
# Controls


def test_controls_show_what_they_say(pages):
    faces = ["mono", "serif"]
    task = SynthDoc("heldout", PAGES, image_size=64, chars=(10, 24), faces=faces, seed=2)
    controls = vision_eval.controls_of(task, engine=None)
    for i in range(4):
        own = truth_of(task[i])
        shuffled = truth_of(controls["shuffled"][i])
        chars = truth_of(controls["random_chars"][i])
        assert sorted(own.split()) == sorted(shuffled.split())
        assert own != chars
        assert [len(word) for word in own.split()] == [len(word) for word in chars.split()]

        blank = controls["blank"][i]
        assert blank["images"][0].getextrema() == ((255, 255),) * 3 and truth_of(blank) == own
        another = controls["another"][i]
        assert picture_of(another) == picture_of(task[i + 1]) and truth_of(another) == own


class OnePicture(Questions):
    """Questions about pictures that change after every `each` of them."""
    def __init__(self, each):
        self.each = each

    def __getitem__(self, i):
        self.check_index(i)
        picture = Image.new("L", (30, 30), i // self.each)
        return ocr_conversation(picture, self.answers[i], f"q{i}")


def test_another_page_shows_another_picture():
    """ChartQA asks twice about every picture, one question after the other."""
    task = OnePicture(each=2)
    control = vision_eval.Control(task, "another")
    for i in range(3):
        assert picture_of(control[i]) != picture_of(task[i])
    assert control.answer_metric == "relaxed_accuracy"
    with pytest.raises(ValueError, match="every page of this task shows the same picture"):
        vision_eval.Control(OnePicture(each=3), "another")[0]


def test_a_blank_page_is_one_that_a_reader_in_windows_is_given(pages):
    engine = SimpleNamespace(known=SimpleNamespace(size=64))
    blank = vision_eval.controls_of(OnePicture(each=1), engine)["blank"][0]
    assert blank["images"][0].size == (64, 64)


def test_pictures_that_differ_in_what_is_transparent_have_other_hashes():
    picture = Image.new("L", (4, 4), 7)
    clear = picture.copy()
    clear.info["transparency"] = 7
    assert scoring.pixel_hash([picture]).digest() != scoring.pixel_hash([clear]).digest()


def test_a_folder_that_was_trained_on_is_read_in_its_held_out_part(fake, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "bench"
    write_folder(folder, {f"{i:03}": f"Text of page {i}" for i in range(40)})
    trained = {**CONFIG, "data": f"folder:{folder}=2,synthdoc=1", "val_share": 0.3}
    args = vision_eval.parse_args([f"--task=folder:{folder}"])
    [(_, task)] = vision_eval.tasks_of(args, trained, 64)
    held_out = [page.picture for page in Folder(folder, "val", 0.3).pages]
    assert [page.picture for page in task.pages] == held_out
    assert f"only the {len(held_out)} pages that were held out" in capsys.readouterr().out
    [(_, task)] = vision_eval.tasks_of(args, {**trained, "val_share": 0.0}, 64)
    assert len(task) == 40 and "was trained on all pages" in capsys.readouterr().out
    [(_, whole)] = vision_eval.tasks_of(args, CONFIG, 64)
    assert len(whole) == 40


def test_a_task_named_twice_is_refused():
    for flags in (["--task=heldout,heldout"], ["--task=heldout", "--chars=10-12,10-12"]):
        with pytest.raises(ValueError, match="names a task twice"):
            vision_eval.tasks_of(vision_eval.parse_args(flags), CONFIG, 64)
