"""
Runs stage 1 once for every variant and seed and prints one table: what does each choice do to reading?

    python -m scripts.ablation                                            # standardisation and optimizer, 300 steps, 3 seeds
    python -m scripts.ablation --seeds=0 --steps=50 --variants="standardize=none;standardize=channel"   # a quick look

A variant is a list of flags of scripts.vis_tok_train without their dashes, separated by spaces; variants by semicolons.
Runs that are done are not run again. The last line is one line of JSON.
"""
import argparse
import os
import subprocess
import sys

import numpy as np

from nanochat.common import read_json
from nanochat.common import git_commit, json_line, run_main

VARIANTS = ";".join([f"standardize={kind} optimizer=muon" for kind in ("none", "channel", "position")]
                    + ["standardize=position optimizer=adamw lr=2e-3"])
FIGURES = ("val/one_minus_ned", "val/loss_per_char", "vision/gap", "vision/cosine_compressor", "vision/cosine_projector")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--variants", default=VARIANTS, help="flags of each variant")
    parser.add_argument("--seeds", default="0,1,2", help="with commas")
    parser.add_argument("--steps", type=int, default=300, help="stage-1 steps of each run")
    parser.add_argument("--checkpoints", default="checkpoints/ablation", help="where the runs are written")
    parser.add_argument("--tokenizer", default="checkpoints/tokenizer", help="folder of scripts.tok_train")
    args = parser.parse_args(argv)

    os.makedirs(args.checkpoints, exist_ok=True)
    table = []
    for variant in args.variants.split(";"):
        runs = []
        for seed in args.seeds.split(","):
            tag = f"{variant.replace(' ', '_').replace('=', '-')}_steps-{args.steps}_seed-{seed}"
            summary = os.path.join(args.checkpoints, tag, "summary.json")
            if not os.path.exists(summary):
                flags = [f"--{flag}" for flag in variant.split()]
                resume = ["--resume"] if os.path.exists(os.path.join(args.checkpoints, tag, "run.json")) else []
                with open(os.path.join(args.checkpoints, tag + ".log"), "w") as log:
                    subprocess.run([sys.executable, "-m", "scripts.vis_tok_train", *flags, f"--seed={seed}", f"--num-iterations={args.steps}",
                                    f"--checkpoints={args.checkpoints}", f"--tokenizer={args.tokenizer}", f"--model-tag={tag}",
                                    "--eval-every=-1", "--save-every=-1", *resume], check=True, stdout=log)
            runs.append(read_json(summary))
        row = {"variant": variant, "runs": len(runs)}
        for figure in FIGURES:
            values = [r[figure] for r in runs]
            row[figure] = {"mean": round(float(np.mean(values)), 4), "min": round(min(values), 4), "max": round(max(values), 4)}
        row["minutes"] = round(float(np.mean([r["minutes"] for r in runs])), 2)
        table.append(row)
        print(f"{variant:45s} | " + " | ".join(f"{f.split('/')[1]} {row[f]['mean']:.3f} ({row[f]['min']:.3f}-{row[f]['max']:.3f})" for f in FIGURES), flush=True)
    json_line({"ablation": table, "steps": args.steps, "seeds": args.seeds, "commit": git_commit()})


if __name__ == "__main__":
    run_main(main)
