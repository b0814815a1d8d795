"""
Scores a checkpoint on pages it has never seen: greedy, cached, batched generation; 1-NED first.

    python -m scripts.vision_eval --checkpoint=checkpoints/stage2 --task=heldout,heldout_words,random_chars
    python -m scripts.vision_eval --checkpoint=checkpoints/stage2 --task=heldout --chars=14-20,31-41,60-68   # a curve
    python -m scripts.vision_eval --checkpoint=checkpoints/stage2 --task=omnidocbench --path=DIR               # real pages

Writes <out>/<task>.jsonl (a line a page) and <out>/summary.json; the last line printed is that summary.
"""
import argparse
import json
import os
import time

from tqdm import tqdm

from nanochat.checkpoint import load_model, write_json
from nanochat.common import choose_dtype, compute_init, dist_info, json_line, print0, run_main
from nanochat.engine import Engine
from nanochat.image_modes import get_mode
from nanochat.metrics import score_page, summarize
from tasks.synthdoc import MIN_PX, SPLITS, SynthDoc
from tasks.training import parse_chars

FIGURES = ("one_minus_ned", "ned", "cer", "f1", "precision", "precision_official", "repetition_rate")


BREAKDOWNS = ("face", "size_px")  # of synthetic pages


def breakdown(rows, key):
    """{value of `key`: [mean 1-NED, pages]}, where the pages have that key."""
    groups = {}
    for r in rows:
        if key in r:
            groups.setdefault(str(r[key]), []).append(r["one_minus_ned"])
    return {value: [round(sum(scores) / len(scores), 3), len(scores)] for value, scores in sorted(groups.items())}


def tasks_of(args, user_config, image_size):
    """-> [(name, task)] for --task, synthetic splits once for each range of --chars."""
    chars = parse_chars(args.chars or user_config["chars"])
    common = dict(image_size=image_size, faces=user_config["faces"].split(","), min_px=user_config.get("min_px", MIN_PX), seed=args.seed)
    found = []
    for name in args.task.split(","):
        if name in SPLITS:
            if not args.chars:  # as in training: the mixture in one set
                found.append((name, SynthDoc(name, args.max_problems, chars=chars, **common)))
                continue
            for low, high, _ in chars:
                found.append((f"{name}_{low}-{high}", SynthDoc(name, args.max_problems, chars=(low, high), **common)))
        elif name == "omnidocbench":
            from tasks.omnidocbench import OmniDocBench
            if not args.path:
                raise ValueError("--task=omnidocbench needs --path=DIR, a folder with OmniDocBench.json and images/")
            found.append((name, OmniDocBench(args.path)))
        else:
            raise ValueError(f"--task={name}: must be one of {', '.join(SPLITS)}, omnidocbench")
    return found


def evaluate(engine, task, pages, batch_size, max_new_tokens, by_character):
    """-> (rows, a dict a page; summary dict)."""
    tokenizer, rows, start, generated = engine.tokenizer, [], time.perf_counter(), 0
    plan_tokens = (engine.mode.size // engine.model.cfg.token_stride) ** 2
    for first in tqdm(range(0, pages, batch_size), unit="batch", disable=dist_info()[0] != 0):
        conversations = [task[i] for i in range(first, min(first + batch_size, pages))]
        for c, result in zip(conversations, engine.generate(conversations, max_new_tokens)):
            truth = c["messages"][-1]["content"]
            generated += result.tokens
            rows.append({"id": c["id"], "truth": truth, "prediction": result.text, "finished": result.finished,
                         "confidence": result.confidence, "text_tokens": len(tokenizer.encode(truth)),
                         **{key: c[key] for key in BREAKDOWNS if key in c},
                         **score_page(result.text, truth, by_character=by_character)})
    seconds = time.perf_counter() - start
    characters, tokens = (sum(values) / len(rows) for values in ([len(r["truth"]) for r in rows], [r["text_tokens"] for r in rows]))
    return rows, {**summarize(rows), "chars_per_vision_token": characters / plan_tokens, "text_tokens_per_vision_token": tokens / plan_tokens,
                  "vision_tokens": plan_tokens, "unfinished": sum(not r["finished"] for r in rows),
                  "pages_per_sec": len(rows) / seconds, "tokens_per_sec": generated / seconds}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # Runtime
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu; empty = the best there is")
    parser.add_argument("--dtype", default="auto", help="compute dtype: auto, bfloat16, float32")
    # What
    parser.add_argument("--checkpoint", default="checkpoints/stage2", help="model_<step> folder, or a run folder (then its last)")
    parser.add_argument("--task", default="heldout,heldout_words,random_chars", help=f"with commas: {', '.join(SPLITS)}, omnidocbench")
    parser.add_argument("--path", default="", help="folder of pages in OmniDocBench's format")
    parser.add_argument("--mode", default="", help="image mode; empty = the one the model was trained in")
    parser.add_argument("--chars", default="", help="synthetic pages: LO-HI characters, several ranges with commas, each its own set; empty = as trained")
    parser.add_argument("--max-problems", type=int, default=256, help="pages per task")
    parser.add_argument("--seed", type=int, default=2, help="seed of the synthetic pages (0 trains, 1 validates)")
    # How
    parser.add_argument("--batch-size", type=int, default=64, help="pages generated together")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens a page may take")
    parser.add_argument("--samples", type=int, default=3, help="pages printed per task, truth and prediction")
    parser.add_argument("--out", default="", help="folder for the results; empty = eval_<task> beside the checkpoint")
    args = parser.parse_args(argv)
    if min(args.max_problems, args.batch_size, args.max_new_tokens) < 1:
        raise ValueError("--max-problems, --batch-size and --max-new-tokens must be at least 1")

    device = compute_init(args.device_type)
    model, tokenizer, meta = load_model(args.checkpoint, device)
    model.dtype = choose_dtype(device, args.dtype)
    mode = get_mode(args.mode or meta["mode"], model.cfg.modes)
    engine = Engine(model, tokenizer, mode)
    # Chinese is cut into words by jieba as in Fox's script; without it, by character, and said
    try:
        import jieba  # noqa: F401
        by_character = False
    except ImportError:
        by_character = True
        print0("jieba is not installed: Chinese pages are scored by character in f1 and precision")

    out = args.out or os.path.join(args.checkpoint, "eval_" + args.task.replace(",", "_"))
    os.makedirs(out, exist_ok=True)
    summary = {}
    for name, task in tasks_of(args, meta["user_config"], mode.size):
        rows, figures = evaluate(engine, task, min(args.max_problems, len(task)), args.batch_size, args.max_new_tokens, by_character)
        summary[name] = figures
        with open(os.path.join(out, f"{name}.jsonl"), "w") as f:
            f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        print0(f"{name}: {figures['samples']} pages, {figures['chars_per_vision_token']:.2f} characters per vision token | " +
               " | ".join(f"{k} {figures[k]:.4f}" for k in FIGURES) + f" | {figures['pages_per_sec']:.1f} pages/s, {figures['tokens_per_sec']:.0f} tok/s")
        print0("  (precision counts only what was written: misleading when the output is short)")
        for key in BREAKDOWNS:
            if groups := breakdown(rows, key):
                figures[f"by_{key}"] = groups
                print0(f"  1-NED by {key}: " + ", ".join(f"{value} {mean:.3f} ({n})" for value, (mean, n) in groups.items()))
        for r in rows[:args.samples]:
            print0(f"  {r['one_minus_ned']:.2f}  truth {r['truth'][:200]!r}\n        reads {r['prediction'][:200]!r}")
    summary = {"checkpoint": args.checkpoint, "step": meta["step"], "mode": mode.name, "seed": args.seed, **summary}
    write_json(os.path.join(out, "summary.json"), summary)
    json_line(summary)


if __name__ == "__main__":
    run_main(main)
