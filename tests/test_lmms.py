"""
Proves that the adapter for lmms-eval answers every request in order, within the task's limits, and
that a question it cannot take stops no other. With LMMS_PYTHON, an interpreter that has lmms-eval,
its ChartQA runs on a tiny checkpoint.

python -m pytest tests/test_lmms.py
"""
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from nanochat.engine import Engine, Result
from nanochat.image_modes import MODES
from scripts.lmms import Answers, cut_at
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[1]
LMMS_PYTHON = os.environ.get("LMMS_PYTHON", "")


class Says(Engine):
    """Says the question again; the limits it was given are noted."""

    def generate(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        self.limits.append(max_new_tokens)
        results = []
        for conversation in conversations:
            text = conversation["messages"][0]["content"][-1]["text"]
            results.append(Result(f"{len(conversation['images'])}{text}.END more", 5, True, -0.1))
        return results


@pytest.fixture
def adapter(model, tokenizer):
    """The adapter around a fake engine; lmms-eval itself need not be installed."""
    engine = Says(model.eval(), tokenizer, MODES["64px"])
    engine.limits = []
    return Answers(engine, batch_size=2, max_new_tokens=50)


def request(doc, question, **settings):
    def doc_to_visual(doc):
        return [doc["image"]] if doc["image"] else []
    return SimpleNamespace(args=(question, settings, doc_to_visual, doc, "task", "test"))


def test_requests_are_answered_in_order(adapter, capsys):
    pictures = [{"image": Image.new("RGB", (40, 30), (i, i, i))} for i in range(3)]
    adapter.task_dict = {"task": {"test": [*pictures, {"image": None}]}}
    requests = [request(0, "first", max_new_tokens=16), request(1, "word " * 300),
                request(2, "third", until=[".END"]), request(3, "no picture", until=".END")]
    answers = adapter.generate_until(requests)
    assert answers == ["1\nfirst.END more", "", "1\nthird", "0no picture"]
    assert adapter.engine.limits == [16, 50]  # a batch of two limits would be read in two
    assert "1 of 4 questions were not answered and count as wrong" in capsys.readouterr().out
    with pytest.raises(NotImplementedError, match="likelihoods are not supported"):
        adapter.loglikelihood(requests)


def test_one_question_does_not_cut_the_answers_of_others(adapter):
    adapter.task_dict = {"task": {"test": [{"image": None}] * 2}}
    adapter.generate_until([request(0, "short", max_new_tokens=2), request(1, "long")])
    assert adapter.engine.limits == [2, 50]


def test_blank_lines_are_no_end():
    assert cut_at("a\n\nb", ["\n\n"]) == "a\n\nb"
    assert cut_at("a\n\nb.END", ["\n\n", ".END"]) == "a\n\nb"


CHARTQA = """
import sys
from datasets import Dataset, Features, Image, Value
rows = {"type": ["human_test", "augmented_test"], "question": ["How many?", "Which?"],
        "answer": ["12", "red"], "image": [sys.argv[2]] * 2}
kinds = {"type": Value("string"), "question": Value("string"), "answer": Value("string")}
Dataset.from_dict(rows, Features(**kinds, image=Image())).to_parquet(sys.argv[1])
"""


@pytest.mark.skipif(not LMMS_PYTHON, reason="needs LMMS_PYTHON, an interpreter with lmms-eval")
def test_chartqa_of_lmms_eval(model, tokenizer, tmp_path):
    """Unchanged, but that its rows come from a stand-in for the hub."""
    model.tokenizer = tokenizer
    model.meta = {"stage": "stage 2", "step": 1, "commit": "none", "mode": model.cfg.modes[0],
                  "user_config": {"seed": 0}}
    model.save_pretrained(tmp_path / "model_000001")

    data = tmp_path / "hub/datasets/lmms-lab-encoder/ChartQA/data"
    data.mkdir(parents=True)
    Image.new("RGB", (80, 60), "white").save(tmp_path / "chart.png")
    made = [LMMS_PYTHON, "-c", CHARTQA, data / "test-00000-of-00001.parquet",
            tmp_path / "chart.png"]
    subprocess.run(made, check=True, capture_output=True)

    with HubServer(tmp_path / "hub") as hub:
        command = [LMMS_PYTHON, "-m", "scripts.lmms", "--tasks=chartqa", "--dtype=float32",
                   "--device-type=cpu", f"--checkpoint={tmp_path / 'model_000001'}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                              env=hub.env(tmp_path / "home"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "|relaxed_human_split" in done.stdout  # lmms-eval's table
    results = json.loads(done.stdout.splitlines()[-1])["chartqa"]
    scores = {key.split(",")[0]: value for key, value in results.items()}
    assert {"relaxed_overall", "relaxed_human_split", "relaxed_augmented_split"} <= set(scores)
    assert scores["relaxed_overall"] == 0  # an untrained model
