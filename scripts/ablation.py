"""
What does each choice do to reading? Stage 1 once per variant and seed, and one table of results.

    python -m scripts.ablation                  # optimizers and losses, 300 steps, 3 seeds
    python -m scripts.ablation --seeds=0,1 --steps=50 --variants="lr=1e-3;lr=3e-3 warmup-steps=40"

A variant is any flags of scripts.vis_tok_train without their dashes, separated by spaces (a value
with spaces in quotes); variants are separated by semicolons. Finished runs are not repeated, and an
interrupted one is resumed. The last line is JSON.
"""
import os
import re
import shlex
import statistics
import subprocess
import sys

from nanochat.common import (
    ArgumentParser, git_commit, json_line, positive_int, print0, read_record, run_main)

# What decides whether a page is read at all: the optimizer, and what the encoder is told beside the
# next token. For each optimizer neither loss and both (the default), for Muon also one alone.
VARIANTS = (
    "optimizer=adamw local-loss=0 place-loss=0;"
    "optimizer=adamw;"
    "optimizer=muon local-loss=0 place-loss=0;"
    "optimizer=muon;"
    "optimizer=muon place-loss=0;"
    "optimizer=muon local-loss=0"
)
# Of a run's summary.json. The gap says whether the page is read at all, the cosines whether all
# pages look alike to the decoder (near 1: the encoder has collapsed).
FIGURES = (
    "val/one_minus_ned",
    "val/loss_per_char",
    "vision/gap",
    "vision/cosine_compressor",
    "vision/cosine_projector",
)
RESERVED = ("seed", "model-tag", "checkpoints", "resume")  # set below, they tell the runs apart


def parse_variants(text):
    """"lr=2e-3 recompute;lr=3e-3" -> {text of a variant: its flags, with dashes}."""
    variants = {}
    for variant in text.split(";"):
        flags = shlex.split(variant)
        for flag in flags:
            if flag.split("=")[0] in RESERVED:
                raise ValueError(
                    f"--variants: {variant!r} sets {flag!r}, but {', '.join(RESERVED)} are set for "
                    f"every run by this script: use --seeds and --checkpoints")
        variants[variant.strip()] = [f"--{flag}" for flag in flags]
    return variants


def run_name(variant, steps, seed):
    """The run folder's name: the variant in characters that every file system takes."""
    # File systems differ in what they take beside letters, digits and these.
    words = re.sub(r"[^\w.,+-]", "-", variant.replace(" ", "_"))
    return f"{words}_steps-{steps}_seed-{seed}"


def run(name, flags, seed, args):
    """Trains one variant with one seed, unless that is done. -> its summary."""
    folder = os.path.join(args.checkpoints, name)
    summary = os.path.join(folder, "summary.json")  # written at the very end of a run
    if os.path.exists(summary):
        return read_record(summary, FIGURES)
    # The variant comes last, so that it may also change what is set for all, e.g. num-iterations.
    command = [
        sys.executable, "-m", "scripts.vis_tok_train",
        f"--num-iterations={args.steps}",
        f"--tokenizer={args.tokenizer}",
        "--eval-every=-1",
        "--save-every=-1",
        f"--seed={seed}",
        f"--checkpoints={args.checkpoints}",
        f"--model-tag={name}",
        *flags,
    ]
    # A folder with a run in it is refused without --resume; that starts anew if no step was saved.
    if os.path.exists(os.path.join(folder, "run.json")):  # begun and not finished
        command.append("--resume")
    log_path = folder + ".log"
    print0(f"{name}: running, output in {log_path}")
    with open(log_path, "a") as log:  # an interrupted run's own output stays in it
        # Errors go to the screen. A process of its own, since a run sets seeds and global state.
        process = subprocess.run(command, stdout=log)
    if process.returncode:
        raise ValueError(f"{name} ended with status {process.returncode}: see the error above and "
                         f"{log_path}; run this again to go on")
    return read_record(summary, FIGURES)


def tabulate(summaries):
    """{figure: {mean, min, max}} over the seeds of a variant, and the mean minutes of a run."""
    # The range and not the deviation: of three seeds, one that fails to read is what matters.
    row = {"runs": len(summaries)}
    for figure in FIGURES:
        values = [summary[figure] for summary in summaries]
        row[figure] = {  # four digits: seeds differ in the second
            "mean": round(statistics.mean(values), 4),
            "min": round(min(values), 4),
            "max": round(max(values), 4),
        }
    # Finished runs are not repeated: some may be of an earlier commit, with other defaults.
    row["commits"] = sorted({summary.get("commit", "unknown") for summary in summaries})
    row["minutes"] = round(statistics.mean(summary["minutes"] for summary in summaries), 2)
    return row


def print_row(variant, row):
    cells = [f"{variant:45s}"]
    for figure in FIGURES:
        name = figure.split("/")[1]
        value = row[figure]
        cells.append(f"{name} {value['mean']:.3f} ({value['min']:.3f}-{value['max']:.3f})")
    print0(" | ".join(cells))
    if row["commits"] != [git_commit()]:
        print0(f"NOTE: runs of {', '.join(row['commits'])} and not of {git_commit()}; another "
               f"--checkpoints repeats them")


def main(argv=None):
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--variants", default=VARIANTS, help="flags of each variant")
    flag("--seeds", default="0,1,2", help="with commas")
    flag("--steps", type=positive_int, default=300, help="stage-1 steps of each run")
    flag("--checkpoints", default="checkpoints/ablation", help="where the runs are written")
    flag("--tokenizer", default="checkpoints/tokenizer", help="folder of scripts.tok_train")
    args = parser.parse_args(argv)

    variants = parse_variants(args.variants)
    # Two variants of one name would share their runs, and come out equal.
    names = {run_name(variant, args.steps, seed="all") for variant in variants}
    if len(names) < len(variants):
        raise ValueError(f"--variants={args.variants}: two of them differ only in punctuation")
    seeds = args.seeds.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        raise ValueError(f"--seeds={args.seeds}: give whole numbers with commas, e.g. 0,1,2")
    os.makedirs(args.checkpoints, exist_ok=True)
    table = []
    # All seeds of a variant before the next one, so that whole rows come early.
    for variant, flags in variants.items():
        summaries = []
        for seed in seeds:
            name = run_name(variant, args.steps, seed)
            summaries.append(run(name, flags, seed, args))
        row = tabulate(summaries)
        print_row(variant, row)  # at once: a long ablation is read while it runs
        table.append({"variant": variant, **row})
    json_line({
        "ablation": table,
        "steps": args.steps,
        "seeds": args.seeds,
        "commit": git_commit(),
    })


if __name__ == "__main__":
    run_main(main)
