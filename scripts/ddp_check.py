"""
Do two processes learn what one does? Stage 1 of the tiny preset in fp32, one thread each: two ranks under torchrun (gloo) against one
process with twice the accumulation, step by step. The last line is JSON with the largest difference of the training loss.

    python -m scripts.ddp_check --steps=50
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

from nanochat.common import git_commit, json_line, run_main

LIMIT = 1e-4


def losses(launcher, folder, tag, flags):
    subprocess.run([*launcher, "-m", "scripts.vis_tok_train", "--preset=tiny", "--device-type=cpu", "--dtype=float32", "--chars=10-16", "--min-px=5",
                    "--device-batch-size=8", "--total-batch-size=32", "--eval-every=-1", "--save-every=-1", f"--checkpoints={folder}", f"--model-tag={tag}",
                    *flags], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    with open(os.path.join(folder, tag, "metrics.jsonl")) as f:
        return [r["train/loss"] for r in map(json.loads, f) if "train/loss" in r]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default="checkpoints/tokenizer", help="folder of scripts.tok_train")
    args = parser.parse_args(argv)
    flags = [f"--num-iterations={args.steps}", f"--seed={args.seed}", f"--tokenizer={args.tokenizer}"]
    with tempfile.TemporaryDirectory() as folder:
        two = losses([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], folder, "two", flags)
        one = losses([sys.executable], folder, "one", flags)
    assert len(one) == len(two) == args.steps
    worst = max(abs(a - b) for a, b in zip(one, two))
    json_line({"ddp_check": "2 ranks against 2x accumulation", "steps": args.steps, "first_loss": one[0], "last_loss": one[-1],
               "max_abs_diff": worst, "limit": LIMIT, "ok": worst <= LIMIT, "seed": args.seed, "commit": git_commit()})
    if not worst <= LIMIT:
        raise ValueError(f"training losses differ by {worst:.2e}, over {LIMIT}")


if __name__ == "__main__":
    run_main(main)
