"""
Proves that the report tells models that read from models that do not; that every page counts exactly once, failed ones as wrong,
also after a kill and over ranks; and that tables, curve, controls and files for the official evaluator hold what they should.

python -m pytest tests/test_eval.py
"""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from nanochat import report
from nanochat.engine import Engine, Result
from nanochat.image_modes import MODES
from scripts import vision_eval
from nanochat.conversation import ocr_conversation
from tasks.synthdoc import SynthDoc

DEMO = Path(__file__).parents[1].parent / "shared/data/omnidocbench_demo"
PAGES = 10
CONFIG = {"chars": "10-24", "faces": "mono,serif"}


def truth_of(c):
    return c["messages"][-1]["content"]


class Fake(Engine):
    """An engine whose text is a function of the conversation."""
    say, budget = None, None

    def generate(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        if self.budget is not None:
            self.budget -= len(conversations)
            if self.budget < 0:
                raise KeyboardInterrupt
        return [Result(self.say(c), 5, True, -0.1) for c in conversations]


@pytest.fixture
def fake(model, tokenizer, tmp_path, monkeypatch):
    """-> function (say, *flags) -> (summary, lines, folder): the whole script with a fake engine in place of a checkpoint."""
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/model.safetensors").write_bytes(b"weights")
    engine = Fake(model.eval(), tokenizer, MODES["test"])
    monkeypatch.setattr(vision_eval, "load_engine", lambda args, device: (engine, {"mode": "test", "step": 7, "user_config": CONFIG}))

    def call(say, *flags, budget=None, drawn=False):
        if not drawn:  # drawing takes longer than everything else
            monkeypatch.setattr(vision_eval, "plot_curve", lambda path, table: Path(path).write_bytes(b""))
        engine.say, engine.budget, out = say, budget, io.StringIO()
        with redirect_stdout(out):
            vision_eval.main([f"--checkpoint={tmp_path / 'ckpt'}", f"--out={tmp_path / 'out'}", f"--max-problems={PAGES}", "--batch-size=4",
                              *([] if any(f.startswith("--task") for f in flags) else ["--task=heldout"]), *flags])
        lines = out.getvalue().splitlines()
        return json.loads(lines[-1]), lines, tmp_path / "out"
    return call


@pytest.fixture
def pages():
    return list(SynthDoc("heldout", PAGES, image_size=64, chars=(10, 24), faces=["mono", "serif"], seed=2))


def reader(pages, shift=0):
    """Says what stands on the picture, or on the page `shift` further on; nothing for a picture it does not know."""
    known = {p["images"][0].tobytes(): truth_of(pages[(i + shift) % len(pages)]) for i, p in enumerate(pages)}
    return lambda c: known.get(c["images"][0].tobytes(), "")


@pytest.mark.parametrize("kind, expected", [
    ("constant", "same text for every page: '0.6.' on 10 of 10"), ("loop", "loops: on 10 of 10 pages"),
    ("copy", "reads another page: 1-NED"), ("oracle", "reads: 1-NED +"),
    ("recites", "ignores the page: 1-NED +0.000")])
def test_fake_models_are_told_apart(fake, pages, kind, expected):
    say = {"constant": lambda c: "0.6.", "loop": lambda c: truth_of(c)[:6] + " and so on" * 20, "copy": reader(pages, 1),
           "oracle": reader(pages), "recites": truth_of}[kind]
    summary, lines, out = fake(say, "--controls=6")
    assert summary["verdict"].startswith(expected) and any(expected in line for line in lines)
    html = (out / "report.html").read_text()
    assert html.index("class='verdict'>heldout: " + expected.split("'")[0]) < html.index("<img")  # at the top, before any page
    assert html.count('class="flag">loops<') == (PAGES if kind == "loop" else 0)
    assert set(summary["heldout"]["controls"]) == {"blank", "another", "random_chars", "shuffled"}
    if kind == "oracle":
        assert summary["one_minus_ned"] == 1 and summary["ned"] == 0 and summary["ci95"] == [1, 1]
        assert summary["heldout"]["controls"]["blank"]["one_minus_ned"] == 0


def test_last_line_and_files(fake, pages):
    summary, _, out = fake(reader(pages), drawn=True)
    assert {"task", "samples", "failed", "one_minus_ned", "ned", "cer", "f1", "precision", "precision_official", "repetition_rate", "ci95",
            "pages_per_sec", "tokens_per_sec"} <= set(summary)
    assert summary == json.loads((out / "summary.json").read_text()) and summary["task"] == "heldout" and summary["samples"] == PAGES
    assert (out / "curve.png").stat().st_size > 10_000
    html = (out / "report.html").read_text()
    assert html.count('src="data:image/png') == PAGES and html.count("src='data:image/png") == 1
    assert "http" not in html  # nothing from elsewhere
    assert "controls would tell" in summary["verdict"]


def test_killed_and_begun_again(fake, pages):
    asked = []
    say = reader(pages)
    with pytest.raises(KeyboardInterrupt):
        fake(say, budget=8)

    def counted(c):
        asked.append(c["id"])
        return say(c)
    summary, _, out = fake(counted)
    assert len(asked) == len(set(asked)) == 2 and summary["samples"] == PAGES and summary["one_minus_ned"] == 1
    fake(counted, "--batch-size=2")  # finished: nothing is read again, whatever the batch size
    assert len(asked) == 2
    with open(out / "heldout.jsonl.rank1", "w") as f:  # of a killed second rank: one page that counts, one cut short
        lines = (out / "heldout.jsonl").read_text().splitlines(keepends=True)
        f.write(lines[3] + lines[4][:20])
    (out / "heldout.jsonl").write_text("".join(lines[:3]))
    summary, _, _ = fake(counted)
    assert len(asked) == 2 + PAGES - 4 and summary["samples"] == PAGES and not (out / "heldout.jsonl.rank1").exists()
    with pytest.raises(ValueError, match="max_new_tokens was 200, now 50.*give another --out"):
        fake(say, "--max-new-tokens=50")


def one_page(text, order=1):
    return {"category_type": "text_block", "poly": [0] * 8, "ignore": False, "order": order, "anno_id": order, "text": text}


@pytest.fixture
def real(tmp_path):
    """A folder in OmniDocBench's format with three pages, one picture broken and one missing."""
    folder = tmp_path / "bench"
    (folder / "images").mkdir(parents=True)
    Image.new("L", (90, 120), 255).save(folder / "images/a.b.png")
    (folder / "images/broken.jpg").write_bytes(b"no picture")
    (folder / "OmniDocBench.json").write_text(json.dumps([
        {"layout_dets": [one_page(f"Text of {name}.")], "page_info": {"image_path": name, "page_attribute": {
            "language": language, "special_issue": ["None", "watermark"]}}}
        for name, language in (("a.b.png", "english"), ("broken.jpg", "chinese"), ("missing.jpeg", "chinese"))]))
    return folder


def test_failed_pages_count_as_wrong(fake, real):
    summary, lines, out = fake(truth_of, "--task=omnidocbench", f"--path={real}", "--controls=2")
    assert summary["samples"] == 3 and summary["failed"] == 2 and summary["one_minus_ned"] == pytest.approx(1 / 3)
    assert any("2 of 3 pages failed and count as wrong; the first: OmniDocBench: row 1" in line for line in lines)
    assert {p.name: p.read_text() for p in (out / "md").iterdir()} == {"a.b.md": "Text of a.b.png.", "broken.md": "", "missing.md": ""}
    rows = [json.loads(line) for line in (out / "omnidocbench.jsonl").read_text().splitlines()]
    assert [r["truth"] for r in rows] == ["Text of a.b.png.", "Text of broken.jpg.", "Text of missing.jpeg."]
    assert "error" in rows[1] and rows[1]["one_minus_ned"] == 0 and rows[1]["flags"] == ["failed"]
    assert set(summary["omnidocbench"]["controls"]) == {"blank", "another"}  # no page of a picture task is printed anew


def test_a_page_too_long_fails_alone(fake, pages):
    def say(c):
        if c["id"].endswith("/3"):
            raise ValueError("cache of 999 positions")
        return truth_of(c)
    summary, _, _ = fake(say)
    assert summary["failed"] == 1 and summary["one_minus_ned"] == pytest.approx(1 - 1 / PAGES)


@pytest.mark.skipif(not DEMO.exists(), reason="no demo pages here")
def test_truth_as_prediction_scores_zero_ned_on_real_pages(fake):
    summary, _, out = fake(truth_of, "--task=omnidocbench", f"--path={DEMO}", "--max-problems=3", "--report-pages=0")
    assert summary["ned"] == 0.0 and summary["one_minus_ned"] == 1.0 and summary["failed"] == 0 and summary["repetition_rate"] == 0
    assert len(list((out / "md").iterdir())) == 3


def test_chartqa_is_scored_as_answers(fake, monkeypatch):
    questions = [ocr_conversation(Image.new("L", (30, 30)), answer, f"q{i}") for i, answer in enumerate(("100", "yes", "0"))]
    monkeypatch.setattr(vision_eval, "open_set", lambda *_: questions)
    said = {"100": "104", "yes": "Yes", "0": "0.1"}
    summary, _, _ = fake(lambda c: said[truth_of(c)], "--task=chartqa-test")
    assert summary["relaxed_accuracy"] == pytest.approx(2 / 3) and summary["one_minus_ned"] < 0.7


def test_wandb_gets_figures_pictures_and_curve(fake, pages, monkeypatch):
    logged = {}
    wandb = SimpleNamespace(init=lambda **kw: SimpleNamespace(log=logged.update, finish=lambda: None), Image=lambda x: ("image", x),
                            Table=lambda columns: SimpleNamespace(add_data=lambda *row: logged.setdefault("rows", []).append(row)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    fake(reader(pages), "--run=name")
    assert logged["heldout/one_minus_ned"] == 1 and len(logged["rows"]) == PAGES and logged["curve"][0] == "image" and "pages" in logged


# -----------------------------------------------------------------------------
# Tables


def row(text_tokens, score, mode="tiny", vision=64, positions=73, **attributes):
    return {"task": "fox", "mode": mode, "text_tokens": text_tokens, "vision_tokens": vision, "positions": positions, "precision": score,
            "precision_official": score, "one_minus_ned": score, "attributes": attributes}


def test_curve_in_the_papers_form():
    rows = [row(650, 1.0), row(690, 0.5), row(1250, 0.25), row(1250, 0.75, "small", 100, 111), row(None, 0.0, vision=0)]
    first, second, third = report.curve(rows)
    assert (first["mode"], first["bucket"], first["pages"], first["precision"]) == ("small", "1200-1300", 1, 0.75)
    assert (second["bucket"], second["pages"], second["one_minus_ned"]) == ("600-700", 2, 0.75)
    assert second["tokens_per_vision_token"] == pytest.approx(670 / 64, abs=1e-3)
    assert second["tokens_per_position"] == pytest.approx(670 / 73, abs=1e-3)
    assert (third["vision_tokens"], third["positions"]) == (64, 73)
    by_ratio = report.curve(rows, "tokens_per_vision_token")
    assert sum(r["pages"] for r in by_ratio) == 4 and [r["bucket"] for r in by_ratio] == ["12-14", "10-12", "18-20"]
    assert report.curve([row(None, 0.0, vision=0)]) == []


def test_breakdown():
    rows = [row(1, 1.0, size=10, tags=["a", "b"]), row(1, 0.5, size=9, tags=["a"]), row(1, 0.0, size=9)]
    assert list(report.breakdown(rows, "size").items()) == [("9", [0.25, 2, [0.0, 0.5]]), ("10", [1.0, 1, [1.0, 1.0]])]
    assert report.breakdown(rows, "tags") == {"a": [0.75, 2, [0.5, 1.0]], "b": [1.0, 1, [1.0, 1.0]]}
    assert report.breakdown(rows[1:], "size") == {}  # nothing to compare


def test_coloured_differences_are_escaped():
    assert report.coloured("<b>cat", "<b>rat") == ("&lt;b&gt;<del>c</del>at", "&lt;b&gt;<ins>r</ins>at")
    left, right = report.coloured("one two " * 60, "one two " * 30 + "2 " + "two one " * 29)
    assert "<del>" in left and "<ins>" in right


def test_reworded_pages_keep_their_layout(pages):
    task = SynthDoc("heldout", PAGES, image_size=64, chars=(10, 24), faces=["mono", "serif"], seed=2)
    controls = vision_eval.controls_of(task)
    for i in range(4):
        own, shuffled, chars = truth_of(task[i]), truth_of(controls["shuffled"][i]), truth_of(controls["random_chars"][i])
        assert sorted(own.split()) == sorted(shuffled.split())
        assert list(map(len, own.split())) == list(map(len, chars.split())) and own != chars
        assert controls["blank"][i]["images"][0].getextrema() == ((255, 255),) * 3 and truth_of(controls["blank"][i]) == own
        assert controls["another"][i]["images"][0].tobytes() == task[i + 1]["images"][0].tobytes()
        assert truth_of(controls["another"][i]) == own
