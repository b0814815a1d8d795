"""
Speed of this tree against that of an earlier commit: both run their own scripts.bench with the same
flags, in turn, since the times of two runs on a shared machine do not compare.

    python -m tests.against 3c1f10d                      # a training step of nano, both stages
    python -m tests.against HEAD~1 --flags="--preset=page --batch=16 --seq=600 --what=stage1"

The last line is JSON: for each measurement the median ratio of their seconds over the rounds (above
1: this tree is faster), with the least and the largest.
"""
import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def git(*args):
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def measure(tree, flags):
    """{measurement: seconds} of `python -m scripts.bench FLAGS` in a tree, whose code it imports."""
    command = [sys.executable, "-m", "scripts.bench", *shlex.split(flags)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} in {tree}:\n{done.stderr[-2000:]}")
    found = {}
    for line in done.stdout.splitlines():
        record = json.loads(line) if line.startswith("{") else {}
        if "seconds" in record:  # not in what measures data or memory
            found[record["bench"]] = record["seconds"]
    return found


def compare(before, flags, rounds):
    """{measurement: [seconds before / seconds now, of each round]}"""
    ratios = {}
    for k in range(rounds):
        # Each goes first as often as the other: the machine may get warm, or busy, meanwhile.
        first, second = (before, ROOT) if k % 2 == 0 else (ROOT, before)
        seconds = {first: measure(first, flags)}
        seconds[second] = measure(second, flags)
        for name in seconds[ROOT]:
            ratio = seconds[before][name] / seconds[ROOT][name]
            ratios.setdefault(name, []).append(ratio)
            print(f"round {k + 1} of {rounds}: {name} {1000 * seconds[before][name]:.0f} ms before, "
                  f"{1000 * seconds[ROOT][name]:.0f} ms now, ratio {ratio:.3f}", flush=True)
    return ratios


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("commit", help="that is compared with")
    parser.add_argument("--flags", default="--what=stage1,stage2 --compile=no",
                        help="of scripts.bench, which both trees must know")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        git("worktree", "add", "--detach", str(before), args.commit)
        try:
            ratios = compare(before, args.flags, args.rounds)
        finally:
            git("worktree", "remove", "--force", str(before))
    summary = {}
    for name, values in ratios.items():
        summary[name] = {"ratio": round(statistics.median(values), 3),
                         "range": [round(min(values), 3), round(max(values), 3)]}
    print(json.dumps({"against": git("rev-parse", "--short", args.commit),
                      "commit": git("rev-parse", "--short", "HEAD"), "flags": args.flags,
                      "rounds": args.rounds, **summary}))


if __name__ == "__main__":
    main()
