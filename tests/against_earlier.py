"""
Speed of this tree against the earlier public attempt at the same model
(github.com/Yusuke710/nanochat at abde743): forward and backward of the published encoder with a
nanochat decoder, in bf16.

    git clone https://github.com/Yusuke710/nanochat EARLIER && git -C EARLIER checkout abde743
    python -m tests.against_earlier EARLIER                                   # 512 px, 2 pages
    python -m tests.against_earlier EARLIER --px=1024 --batch=1 --seq=1024

Both packages are named nanochat, so each round starts a process for each of them, in turn. The
optimizers are left out, as they are different ones. The last line is JSON: the median ratio of
their seconds over the rounds (above 1: this tree is faster), with the least and the largest.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
REPEATS = 5  # timed steps of a process, of which the median counts


def gpt_sizes(args):
    """Of nanochat's d20, with fewer blocks so that a round takes seconds."""
    return {"vocab_size": 65536, "n_layer": args.layers, "n_head": 10, "n_kv_head": 10,
            "n_embd": 1280}


def step_of_this_tree(args):
    from nanochat.config import PRESETS
    from nanochat.image_modes import get_mode
    from scripts.bench import build, byte_tokenizer, make_batch
    cfg = PRESETS["base"]()
    cfg.image_token_id = byte_tokenizer().image_token_id
    cfg.gpt.sequence_len = args.seq
    for name, value in gpt_sizes(args).items():
        setattr(cfg.gpt, name, value)
    model = build(cfg, torch.device("cpu"), torch.bfloat16).train()
    batch = make_batch(model, get_mode(f"{args.px}px"), args.batch, args.seq)

    def step():
        loss_sum, count = model(batch)["text"]
        (loss_sum / count).backward()
        model.zero_grad(set_to_none=True)
    return step, sum(batch.features_per_row)


def step_of_the_earlier(args):
    # It takes from easydict a dict with attributes, and nothing more.
    easydict = types.ModuleType("easydict")
    easydict.EasyDict = type("EasyDict", (dict,), {"__getattr__": dict.__getitem__})
    sys.modules["easydict"] = easydict
    sys.path.insert(0, args.earlier)
    from nanochat.gpt import GPTConfig
    from nanochat.nano_deepseek_ocr import VisionConfig, build_nano_deepseek_ocr
    torch.manual_seed(0)
    gpt = GPTConfig(sequence_len=args.seq, **gpt_sizes(args))
    model = build_nano_deepseek_ocr(gpt, VisionConfig(base_size=args.px))
    model.init_weights()
    model.set_image_token_id(gpt.vocab_size - 1)
    features = model.num_vision_tokens()
    ids = torch.randint(gpt.vocab_size - 1, (args.batch, args.seq))
    ids[:, :features] = gpt.vocab_size - 1
    targets = ids.roll(-1, 1)
    targets[:, :features - 1] = -1
    targets[:, -1] = -1
    pixels = torch.randn(args.batch, 3, args.px, args.px)

    def step():
        with torch.autocast("cpu", torch.bfloat16):  # as its training does on a GPU
            loss = model(ids, targets, pixels)
        loss.backward()
        model.zero_grad(set_to_none=True)
    return step, features * args.batch


def time_one(args):
    """The child's part: prints the median seconds of a step."""
    torch.manual_seed(0)
    make = {"ours": step_of_this_tree, "earlier": step_of_the_earlier}[args.child]
    step, features = make(args)
    step()
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": statistics.median(seconds), "features": features}))


def measure(side):
    """The figures of one side, by a process of its own."""
    # From a file, not with -m: the clone's nanochat must not be hidden by the one in this folder.
    path = [str(ROOT)] if side == "ours" else []
    code = (f"import runpy, sys; sys.path[:1] = {path}; "
            f"runpy.run_path({__file__!r}, run_name='__main__')")
    command = [sys.executable, "-c", code, *sys.argv[1:], f"--child={side}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {side}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("earlier", help="folder of the earlier attempt's clone")
    parser.add_argument("--px", type=int, default=512, help="pixels of a page")
    parser.add_argument("--batch", type=int, default=2, help="pages")
    parser.add_argument("--seq", type=int, default=512, help="decoder positions of a page")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the decoder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=["ours", "earlier"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.earlier = str(Path(args.earlier).resolve())
    if args.child:
        time_one(args)
        return

    ratios = []
    features = {}
    for k in range(args.rounds):
        # Each goes first as often as the other: the machine may get warm, or busy, meanwhile.
        order = ("earlier", "ours") if k % 2 == 0 else ("ours", "earlier")
        found = {side: measure(side) for side in order}
        seconds = {side: record["seconds"] for side, record in found.items()}
        features = {side: record["features"] for side, record in found.items()}
        ratios.append(seconds["earlier"] / seconds["ours"])
        print(f"round {k + 1} of {args.rounds}: {seconds['earlier']:.2f} s earlier, "
              f"{seconds['ours']:.2f} s here, ratio {ratios[-1]:.3f}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout.strip()
    print(json.dumps({
        "px": args.px, "batch": args.batch, "seq": args.seq, "layers": args.layers,
        "features": features, "commit": commit, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "rounds": args.rounds,
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)]}))


if __name__ == "__main__":
    main()
