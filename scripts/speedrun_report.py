"""
The last line of speedrun.sh: what the run took and what it reached, from the files that its stages
and evaluations wrote. Its "minutes" are those since this call of speedrun.sh began, which may have
found stages finished; those that each stage trained are beside its other figures.

    python -m scripts.speedrun_report --checkpoints=checkpoints --started=$(date +%s) \
        --evaluations=eval
"""
import os
import time

from nanochat.common import ArgumentParser, json_line, read_record, real, run_main

TRAINING = ("steps", "minutes", "images_per_sec", "mfu", "data_wait", "vision/gap", "commit")
# `samples` of `of` pages were read.
FIGURES = ("one_minus_ned", "ci95", "samples", "of", "verdict", "vision_tokens",
           "chars_per_vision_token", "text_tokens_per_vision_token", "by_bucket")


def select(figures, names):
    return {name: figures[name] for name in names if name in figures}


def scores_of(summary):
    """{task: its main figures} from the summary.json of one evaluation."""
    scores = {}
    for task, figures in summary.items():  # beside tasks a summary has single values and a curve
        if isinstance(figures, dict) and "one_minus_ned" in figures:
            scores[task] = select(figures, FIGURES)
    return scores


def main(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--checkpoints", default="checkpoints",
                        help="folder with the run folders stage1 and stage2")
    parser.add_argument("--started", type=real(high=1e11), required=True,
                        help="unix time at which speedrun.sh began, s")
    parser.add_argument("--evaluations", default="eval",
                        help="folders below stage2 that scripts.vision_eval wrote, with commas")
    args = parser.parse_args(argv)

    # A missing file is an error here: the run before it did not end as it should.
    stages = {}
    for stage in ("stage1", "stage2"):
        stages[stage] = read_record(
            os.path.join(args.checkpoints, stage, "summary.json"), (*TRAINING, "params"))

    record = {
        "speedrun": args.checkpoints,
        "minutes": round((time.time() - args.started) / 60, 2),
        "params": stages["stage2"]["params"],
    }
    for stage, summary in stages.items():
        record[stage] = {name: summary[name] for name in TRAINING}  # all of them must be there
    for name in args.evaluations.split(","):
        path = os.path.join(args.checkpoints, "stage2", name, "summary.json")
        record[name] = scores_of(read_record(path))
    json_line(record)


if __name__ == "__main__":
    run_main(main)
