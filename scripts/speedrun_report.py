"""
The last line of speedrun.sh: what the run took and what it reached, out of the files its stages wrote.

    python -m scripts.speedrun_report --checkpoints=checkpoints --started=$(date +%s)
"""
import argparse
import os
import time

from nanochat.checkpoint import load_model, read_json
from nanochat.common import json_line, run_main


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoints", default="checkpoints", help="folder with the run folder stage2")
    parser.add_argument("--started", type=float, required=True, help="unix time at which speedrun.sh began, s")
    args = parser.parse_args(argv)

    stage2 = os.path.join(args.checkpoints, "stage2")
    model, _, _ = load_model(stage2, "cpu")
    scores, training = (read_json(os.path.join(stage2, name)) for name in (os.path.join("eval", "summary.json"), "summary.json"))
    heldout = scores["heldout"]
    json_line({"speedrun": "nano", "minutes": round((time.time() - args.started) / 60, 2), "params": model.num_params(),
               "vision_tokens": heldout["vision_tokens"],
               "chars_per_vision_token": round(heldout["chars_per_vision_token"], 3),
               "text_tokens_per_vision_token": round(heldout["text_tokens_per_vision_token"], 3),
               **{f"{split}_1_ned": round(scores[split]["one_minus_ned"], 4) for split in ("heldout", "heldout_words", "random_chars")},
               "vision_gap": round(training["vision/gap"], 3), "pages": heldout["samples"]})


if __name__ == "__main__":
    run_main(main)
