"""
How fast data comes, and how much of it is padding. Pages are counted per CPU second of one core, samples by the clock.

    python -m scripts.data_bench                                       # minutes: it trains the nano preset to see how long steps wait
    python -m scripts.data_bench --pages=20 --samples=64 --steps=0     # seconds
"""
import argparse
import json
import tempfile
import time

import numpy as np

from nanochat.common import json_line, run_main
from nanochat.dataloader import Sampler, loader
from nanochat.batch import pack_rows
from nanochat.image_modes import get_mode, plan
from nanochat.tokenizer import Tokenizer
from scripts import tok_train, vis_tok_train
from tasks.synthdoc import SynthDoc
from tasks.synthpage import TEXT, SynthPage

BATCH, ROW = 32, 2048  # samples of a micro-batch, positions of a packed row


def dense_pages(px, damage):
    """Pages of px x px as full as a page of Fox: text of 4,000 to 5,000 characters."""
    return SynthPage("train", 1_000_000, px, chars=(4000, 5000), columns=(1, 2), parts=TEXT, damage=damage)


def pages_per_cpu_second(task, n):
    task[0]  # fonts and words are read once
    start = time.process_time()
    for i in range(1, n + 1):
        task[i]
    return round(n / (time.process_time() - start), 1)


def samples_per_second(sampler, workers):
    batches = loader(sampler, BATCH, 0, len(sampler) // BATCH, workers=workers)
    next(batches)  # processes have started
    start = time.perf_counter()
    return round(BATCH * sum(1 for _ in batches) / (time.perf_counter() - start), 1)


def padding(n=4096):
    """
    (plain, packed) share of padding on lengths like those of FineVision's chartqa (28.3 thousand questions on 18,266 charts): a chart
    in mode small, 1 + Poisson(0.55) questions of about 14 tokens, answers of 1 to 6, the special tokens around them.
    """
    rng = np.random.default_rng(0)
    chart = plan(get_mode("small"), 800, 600, 64).positions
    turns = [[4 + max(4, round(rng.normal(14, 5))) + int(rng.integers(1, 7)) for _ in range(1 + rng.poisson(0.55))] for _ in range(n)]
    lengths = [chart + sum(turn) for turn in turns]
    plain = [lengths[i:i + BATCH] for i in range(0, n, BATCH)]
    packed = [[sum(batch[i] for i in row) for row in pack_rows(batch, [1] * BATCH, ROW, 16)] for batch in plain]
    return [round(1 - sum(lengths) / sum(len(rows) * max(rows) for rows in batches), 4) for batches in (plain, packed)]


def data_wait(folder, steps, workers):
    """Share of a nano training step spent waiting for data, over the second half of the steps."""
    vis_tok_train.main([f"--tokenizer={folder}", f"--checkpoints={folder}", f"--model-tag=wait{workers}", f"--num-iterations={steps}",
                        f"--workers={workers}", "--eval-every=-1", "--save-every=-1"])
    with open(f"{folder}/wait{workers}/metrics.jsonl") as f:
        records = [r for r in map(json.loads, f) if "train/dt" in r][steps // 2:]
    return round(sum(r["data/wait"] * r["train/dt"] for r in records) / sum(r["train/dt"] for r in records), 4)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pages", type=int, default=100, help="dense pages to draw per size")
    parser.add_argument("--samples", type=int, default=2048, help="nano samples to load per number of workers, at least 64")
    parser.add_argument("--steps", type=int, default=20, help="nano training steps per number of workers; 0 = none")
    args = parser.parse_args(argv)
    if args.pages < 1 or args.samples < 2 * BATCH or args.steps < 0:
        raise ValueError(f"--pages={args.pages} --samples={args.samples} --steps={args.steps}: give at least 1, {2 * BATCH} and 0")
    result = {}
    for px, damage in ((640, 0), (640, 1), (1024, 0), (1024, 1)):
        task = dense_pages(px, damage)
        result[f"pages_per_cpu_second_{px}{'_damaged' * damage}"] = pages_per_cpu_second(task, args.pages)
    result["padding_plain"], result["padding_packed"] = padding()
    with tempfile.TemporaryDirectory() as folder:
        tok_train.main(["--out", folder])
        sampler = Sampler(SynthDoc("train", args.samples, image_size=64, chars=(31, 41)), Tokenizer.load(folder), get_mode("nano"), 16, 256)
        result |= {f"samples_per_second_{n}_workers": samples_per_second(sampler, n) for n in (1, 2)}
        if args.steps:
            result |= {f"data_wait_{n}_workers": data_wait(folder, args.steps, n) for n in (0, 1)}
    json_line(result)


if __name__ == "__main__":
    run_main(main)
