"""
`TRIAL=1 bash speedrun.sh full` from end to end without the hub: two ranks on a CPU, from stand-ins
of every published weight and data set, at toy size, to the evaluation. Takes a minute, so it
is not part of the suite.

    python -m tests.full_trial [FOLDER]
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nanochat import config
from nanochat.common import read_json
from nanochat.reader import NanoDeepseekOCR
from tests import test_hub_tasks as data
from tests import test_pretrained as weights
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[1]


def publish_weights(root):
    """SAM, CLIP and a nanochat decoder, of the sizes that the preset `tiny` has."""
    cfg = weights.small()
    tiny = config.tiny()
    cfg.sam = tiny.sam
    cfg.second_stage = tiny.second_stage
    model = NanoDeepseekOCR(cfg).init_weights(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)

    folders = {name: root / "models" / weights.SOURCES[name] for name in ("sam", "clip", "d20")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    weights.publish_sam(model, folders["sam"])
    weights.publish_clip(model, folders["clip"])
    weights.publish_nanochat(model, folders["d20"], prefix="_orig_mod.")


def publish_data(root):
    """What both stages train on and what is evaluated, odd rows included."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture
    columns = Features({
        "images": List(Picture()),
        "texts": List({"user": Value("string"), "assistant": Value("string")}),
        "source": Value("string"),
    })
    rows = []
    for row in data.finevision_rows():
        rows.append({name: row[name] for name in columns})
    rows = Dataset.from_list(rows, features=columns)
    finevision = root / "datasets/HuggingFaceM4/FineVision"
    for name in ("olmOCR-mix-0225-documents", "olmOCR-mix-0225-books", "chartqa"):
        data.write_shards(rows, finevision, name)

    data.write_smoltalk(root / "datasets/HuggingFaceTB/smol-smoltalk")
    data.write_chartqa(root / "datasets/HuggingFaceM4/ChartQA")
    data.write_fox(root / "datasets/ucaslcl/Fox_benchmark_data/focus_benchmark_test.zip")
    data.write_omnidocbench(root / "datasets/Quivr/OmniDocBench")
    data.write_omnidocbench(root / "datasets/opendatalab/OmniDocBench")


def run(folder):
    publish_weights(folder / "hub")
    publish_data(folder / "hub")
    out = folder / "checkpoints"
    with HubServer(folder / "hub") as server:
        environment = {**server.env(folder / "home"), "TRIAL": "1", "GPUS": "2",
                       "PYTHON": sys.executable, "CHECKPOINTS": str(out), "OMP_NUM_THREADS": "1"}
        subprocess.run(["bash", "speedrun.sh", "full"], cwd=ROOT, env=environment, check=True)

    for stage in ("stage0", "stage1", "stage2"):
        assert read_json(out / stage / "summary.json")["steps"] == 2
    figures = read_json(out / "stage2/eval/summary.json")
    # Of every benchmark some pages are broken on purpose, and some are read.
    for task, pages in (("fox", 3), ("omnidocbench", 3), ("chartqa-test", 4)):
        assert figures[task]["samples"] == pages, task
        assert figures[task]["failed"] < pages, task
    print("full: its three stages and the evaluation went through")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing of this process may reach the real hub
    if len(sys.argv) > 1:
        run(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as name:
            run(Path(name))
