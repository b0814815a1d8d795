"""
The last line of speedrun.sh: what the run took and what it reached, out of the files its stages and evaluations wrote.

    python -m scripts.speedrun_report --checkpoints=checkpoints --started=$(date +%s) --evaluations=eval
"""
import argparse
import os
import time

from nanochat.common import read_json
from nanochat.common import json_line, run_main

TRAINING = ("steps", "minutes", "images_per_sec", "mfu", "data_wait", "vision/gap", "commit")
FIGURES = ("one_minus_ned", "ci95", "samples", "vision_tokens", "chars_per_vision_token", "text_tokens_per_vision_token", "by_bucket")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoints", default="checkpoints", help="folder with the run folders stage1 and stage2")
    parser.add_argument("--started", type=float, required=True, help="unix time at which speedrun.sh began, s")
    parser.add_argument("--evaluations", default="eval", help="folders below stage2 in which scripts.vision_eval wrote, with commas")
    args = parser.parse_args(argv)

    stages = {stage: read_json(os.path.join(args.checkpoints, stage, "summary.json")) for stage in ("stage1", "stage2")}
    record = {"speedrun": args.checkpoints, "minutes": round((time.time() - args.started) / 60, 2), "params": stages["stage2"]["params"],
              **{stage: {k: summary[k] for k in TRAINING} for stage, summary in stages.items()}}
    for name in args.evaluations.split(","):
        scores = read_json(os.path.join(args.checkpoints, "stage2", name, "summary.json"))
        record[name] = {task: {k: of_task[k] for k in FIGURES if k in of_task} for task, of_task in scores.items()
                        if isinstance(of_task, dict) and "one_minus_ned" in of_task}
    json_line(record)


if __name__ == "__main__":
    run_main(main)
