"""
Scores a checkpoint on pages it has never seen: greedy, cached, batched generation; 1-NED first.

    python -m scripts.vision_eval --checkpoint=checkpoints/stage2 --task=heldout,heldout_words,random_chars --controls
    python -m scripts.vision_eval --checkpoint=checkpoints/stage2 --task=heldout --chars=14-20,31-41,60-68   # a curve
    torchrun --standalone --nproc_per_node=8 -m scripts.vision_eval --task=omnidocbench --path=DIR             # real pages

Writes to <out>: report.html (look at this), curve.png, <task>.jsonl (a line a page), md/<image name>.md for the official
OmniDocBench evaluator, and summary.json, which is also the last line printed. A stopped evaluation goes on where it was.
"""
import argparse
import copy
import glob
import hashlib
import importlib.util
import json
import os
import random
import time

from PIL import Image, ImageOps
from tqdm import tqdm

from nanochat.common import barrier, read_json, write_json
from nanochat.common import banner, compute_cleanup, compute_init, dist_info, init_wandb, json_line, print0, run_main
from nanochat.reader import add_arguments, load_engine
from nanochat.metrics import FAILED, relaxed_accuracy, score_page, summarize
from nanochat.image_modes import valid_tokens
from nanochat.pretrained import fetch
from nanochat.report import CONTROLS, breakdown, curve, mean, plot_curve, step_of, verdict, write_html
from tasks.synthdoc import MIN_PX, SPLITS, SynthDoc, random_string
from tasks.registry import EVALUATED, open_set, parse_chars

FIGURES = ("one_minus_ned", "ned", "cer", "f1", "precision", "precision_official", "repetition_rate", "relaxed_accuracy")
ANSWERS = ("chartqa-test", "synthchart")  # tasks of questions with a short answer, scored by relaxed accuracy too
SETTINGS = ("dtype", "max_new_tokens", "no_repeat", "path", "chars", "seed")  # flags that change a prediction
WINDOW = 4  # batches' worth of pages are loaded and sorted by length before they are cut into batches


def tasks_of(args, user_config, image_size):
    """-> [(name, task)] for --task, synthetic splits once for each range of --chars."""
    chars = parse_chars(args.chars or user_config["chars"])
    common = dict(image_size=image_size, faces=user_config["faces"].split(","), min_px=user_config.get("min_px", MIN_PX), seed=args.seed)
    found = []
    for name in args.task.split(","):
        if name not in SPLITS + EVALUATED or (name == "folder" and not args.path):
            raise ValueError(f"--task={name}: must be of {', '.join(SPLITS + EVALUATED)}; folder needs --path")
        if name not in SPLITS:
            found.append((name, open_set(name, args.path, "all", args, image_size, args.max_problems)))
        elif not args.chars or len(chars) == 1:  # without --chars as in training: the mixture in one set
            found.append((name, SynthDoc(name, args.max_problems, chars=chars, **common)))
        else:
            found += [(f"{name}_{low}-{high}", SynthDoc(name, args.max_problems, chars=(low, high), **common)) for low, high, _ in chars]
    return found


class Control:
    """A task with the picture of every conversation replaced, by a blank one or by the next page's."""
    def __init__(self, task, kind):
        self.task, self.kind = task, kind

    def __getitem__(self, i):
        c = self.task[i]
        if self.kind == "another":
            return {**c, "images": self.task[(i + 1) % len(self.task)]["images"]}
        return {**c, "images": [Image.new("RGB", image.size, "white") for image in c["images"]]}


def reworded(task, kind):
    """A synthetic task, layouts included, with its words replaced by random strings of their length or shuffled, truth too."""
    def blocks(i):
        rng, freedom, blocks = task.blocks(i)
        own = random.Random(f"{kind}/{i}")
        def other(words):
            letters = ("".join(random_string(own) for _ in word)[:len(word)] for word in words)
            return own.sample(words, len(words)) if kind == "shuffled" else list(letters)
        return rng, freedom, [(box, other(words), scale) for box, words, scale in blocks]
    task_with_others = copy.copy(task)
    task_with_others.blocks = blocks
    return task_with_others


def controls_of(task):
    """{control: task}; a single page has no other, and words can be changed only where pages are drawn from them."""
    pictures = [Control(task, kind) for kind in ("blank", "another")[:len(task)]]
    return {control.kind: control for control in pictures} | \
        ({kind: reworded(task, kind) for kind in ("random_chars", "shuffled")} if hasattr(task, "blocks") else {})


# -----------------------------------------------------------------------------
# Reading


def gather(path):
    """Rows so far, by index: rank 0 merges what any number of processes, of this run and earlier ones, wrote beside `path`."""
    barrier()
    if dist_info()[0] == 0:
        rows, parts = {}, sorted(glob.glob(glob.escape(path) + ".rank*"))
        for part in [path] * os.path.exists(path) + parts:
            with open(part, encoding="utf-8") as f:
                rows.update((row["index"], row) for row in (json.loads(line) for line in f if line.endswith("\n")))  # a kill cuts the last
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in sorted(rows))
        os.replace(path + ".tmp", path)
        for part in parts:
            os.remove(part)
    barrier()
    with open(path, encoding="utf-8") as f:
        return {row["index"]: row for row in map(json.loads, f)}


def page_row(engine, name, task, i, c, result, by_character):
    """The row of page i: conversation c, None if it could not be loaded; `result`, or the error by which the page failed and is wrong."""
    failed, plans = isinstance(result, Exception), engine.plans(c) if c else []
    truth = c["messages"][-1]["content"] if c else task.truths[i] if hasattr(task, "truths") else None
    row = {"index": i, "id": c["id"] if c else f"{name}/{i}", "task": name, "failed": failed, "truth": truth,
           "prediction": "" if failed else result.text, "text_tokens": len(engine.tokenizer.encode(truth or "")),
           "vision_tokens": sum(p.tokens for p in plans), "positions": sum(p.positions for p in plans),
           "valid_tokens": sum(valid_tokens(p, *ImageOps.exif_transpose(image).size) for p, image in zip(plans, c["images"])) if c else 0,
           "mode": "+".join(dict.fromkeys(p.mode.name for p in plans))}
    row["attributes"] = {**{k: c[k] for k in ("face", "size_px", "bucket", "columns") if k in c}, **c.get("attributes", {}), "mode": row["mode"]} if c else {}
    if hasattr(task, "image_names"):
        row["image_name"] = task.image_names[i]
    if failed:
        return {**row, **FAILED, "error": str(result), "flags": ["failed"], "tokens": 0, "truth_chars": len(truth or "")}
    row |= {"finished": result.finished, "confidence": result.confidence, "flags": result.flags, "tokens": result.tokens}
    if name in ANSWERS:
        row["relaxed_accuracy"] = relaxed_accuracy(result.text, truth)
    return {**row, **score_page(result.text, truth, by_character=by_character)}


def evaluate(engine, name, task, pages, args, out, by_character):
    """Rows of pages 0..pages-1 in order. Each rank reads its share of those not yet in <out>/<name>.jsonl, and appends row by row."""
    (rank, _, world), size, path = dist_info(), args.batch_size, os.path.join(out, f"{name}.jsonl")
    done = gather(path)
    todo = [i for i in range(pages) if i not in done][rank::world]
    with open(f"{path}.rank{rank}", "a", encoding="utf-8") as f, tqdm(total=len(todo), unit="page", desc=name, disable=rank != 0) as bar:
        start = time.perf_counter()
        for first in range(0, len(todo), WINDOW * size):
            loaded, read = [], []
            for i in todo[first:first + WINDOW * size]:
                try:
                    loaded.append((i, task[i]))
                except (OSError, ValueError) as error:
                    read.append((i, None, error))
            loaded.sort(key=lambda page: len(page[1]["messages"][-1]["content"]))  # rows of a batch then end at about the same time
            for k in range(0, max(len(loaded), 1), size):
                indices, conversations = [i for i, _ in loaded[k:k + size]], [c for _, c in loaded[k:k + size]]
                read += zip(indices, conversations, engine.generate_each(conversations, args.max_new_tokens))
                seconds, start = (time.perf_counter() - start) / world / len(read), time.perf_counter()
                rows = (page_row(engine, name, task, *page, by_character) for page in read)
                f.writelines(json.dumps({**row, "seconds": seconds}, ensure_ascii=False) + "\n" for row in rows)
                f.flush()
                bar.update(len(read))
                read = []
    rows = gather(path)
    return [rows[i] for i in range(pages)]


def figures_of(name, rows, controls):
    """Everything that is said of one task, from its rows and {control: rows}."""
    loaded, finished = [r for r in rows if r["vision_tokens"]], [r for r in rows if not r["failed"]]
    tokens, positions, text, characters = (mean(loaded, key) if loaded else 0.0
                                           for key in ("vision_tokens", "positions", "text_tokens", "truth_chars"))
    width, seconds = step_of([r["text_tokens"] for r in rows]), sum(r["seconds"] for r in rows)
    for r in loaded:
        r["attributes"]["text_tokens"] = f"{(low := r['text_tokens'] // width * width):g}-{low + width:g}"
    return {"task": name, "verdict": verdict(rows, controls), **summarize(rows),
            "chars_per_vision_token": characters / max(tokens, 1), "text_tokens_per_vision_token": text / max(tokens, 1),
            "vision_tokens": int(tokens) if tokens == int(tokens) else tokens, "positions": positions,
            "valid_tokens": mean(loaded, "valid_tokens") if loaded else 0.0,
            "confidence": mean(finished, "confidence") if finished else None, "unfinished": sum(not r["finished"] for r in finished),
            "pages_per_sec": len(rows) / seconds, "tokens_per_sec": sum(r["tokens"] for r in rows) / seconds,
            "controls": {kind: {k: v for k, v in summarize(r).items() if k in ("samples", "failed", "ci95", *FIGURES)}
                         for kind, r in controls.items()},
            **{f"by_{key}": groups for key in dict.fromkeys(k for r in rows for k in r["attributes"]) if (groups := breakdown(rows, key))}}


def check_settings(args, out, meta, by_character):
    """Rows of different settings must not mix: ValueError if <out> was begun under others. Batch size and number of pages may change."""
    path = os.path.join(out, "settings.json")
    with open(os.path.join(fetch(args.checkpoint), "model.safetensors"), "rb") as f:
        ours = {"weights": hashlib.file_digest(f, "sha256").hexdigest(), "by_character": by_character, "mode": args.mode or meta["mode"],
                **{key: getattr(args, key) for key in SETTINGS}}
    theirs = read_json(path) if os.path.exists(path) else ours
    if theirs != ours:
        changed = "; ".join(f"{key} was {theirs.get(key)!r}, now {ours[key]!r}" for key in ours if theirs.get(key) != ours[key])
        raise ValueError(f"{out} holds an evaluation under other settings ({changed}): give another --out, or delete it")
    barrier()
    if dist_info()[0] == 0:
        os.makedirs(out, exist_ok=True)
        write_json(path, ours)


def log_wandb(args, summary, sections, png):
    """Every figure, the table of pictures and the curve."""
    import wandb
    run, table = init_wandb(args.run, vars(args)), wandb.Table(columns=["task", "page", "truth", "prediction", "1-NED", "flags"])
    for name, task, rows in sections:
        run.log({f"{name}/{k}": v for k, v in summary[name].items() if isinstance(v, (int, float))})
        for r in sorted(rows, key=lambda r: r["one_minus_ned"])[:args.report_pages]:
            picture = None if r["failed"] else wandb.Image(task[r["index"]]["images"][0])
            table.add_data(name, picture, r["truth"], r["prediction"], r["one_minus_ned"], ", ".join(r["flags"]))
    run.log({"pages": table, "curve": wandb.Image(png)})
    run.finish()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--task", default="heldout,heldout_words,random_chars", help=f"with commas: {', '.join(SPLITS + EVALUATED)}")
    parser.add_argument("--path", default="", help="where the pages of fox, omnidocbench, chartqa-test or folder lie; empty = on the hub")
    parser.add_argument("--chars", default="", help="synthetic pages: LO-HI characters, or several, each its own set; empty = as trained")
    parser.add_argument("--max-problems", type=int, default=256, help="pages per task")
    parser.add_argument("--controls", type=int, nargs="?", const=64, default=0, help="pages per control: blank, another page, other words")
    parser.add_argument("--seed", type=int, default=2, help="seed of the synthetic pages (0 trains, 1 validates)")
    parser.add_argument("--batch-size", type=int, default=64, help="pages generated together")
    parser.add_argument("--run", default="dummy", help="W&B run name; dummy = no W&B")
    parser.add_argument("--samples", type=int, default=3, help="pages printed per task, truth and prediction")
    parser.add_argument("--report-pages", type=int, default=256, help="pages per task in report.html, the worst ones")
    parser.add_argument("--out", default="", help="folder for the results; empty = eval_<task> beside the checkpoint")
    args = parser.parse_args(argv)
    if min(args.max_problems, args.batch_size) < 1:
        raise ValueError("--max-problems and --batch-size must be at least 1")

    device = compute_init(args.device_type)
    engine, meta = load_engine(args, device)
    by_character = importlib.util.find_spec("jieba") is None  # it cuts Chinese into words in Fox's script
    if by_character:
        print0("jieba is not installed: Chinese pages are scored by character in f1 and precision")
    tasks = tasks_of(args, meta["user_config"], engine.model.cfg.sam.image_size)  # the same pages in every mode
    out = args.out or os.path.join(args.checkpoint if os.path.isdir(args.checkpoint) else ".", "eval_" + args.task.replace(",", "_"))
    check_settings(args, out, meta, by_character)

    summary = {"checkpoint": args.checkpoint, "step": meta["step"], "mode": args.mode or meta["mode"], "seed": args.seed}
    sections = []
    for name, task in tasks:
        rows = evaluate(engine, name, task, min(args.max_problems, len(task)), args, out, by_character)
        controls = {kind: evaluate(engine, f"{name}.{kind}", other, min(args.controls, len(rows)), args, out, by_character)
                    for kind, other in controls_of(task).items() if args.controls}
        figures = summary[name] = figures_of(name, rows, controls)
        sections.append((name, task, rows))
        print0(f"{name}: {figures['verdict']}\n  {figures['samples']} pages, {figures['chars_per_vision_token']:.2f} characters per vision "
               "token | " + " | ".join(f"{k} {figures[k]:.4f}" for k in FIGURES if k in figures) +
               f" | {figures['pages_per_sec']:.1f} pages/s, {figures['tokens_per_sec']:.0f} tok/s")
        print0("  (precision counts only what was written: misleading when the output is short)")
        for kind, of_control in figures["controls"].items():
            print0(f"  control {kind} ({CONTROLS[kind]}): 1-NED {of_control['one_minus_ned']:.4f} on {of_control['samples']} pages")
        for key in (key for key in figures if key.startswith("by_")):
            print0(f"  1-NED by {key[3:]}: " + ", ".join(f"{value} {score:.3f} ({low:.3f}-{high:.3f}, {n})"
                                                        for value, (score, n, (low, high)) in figures[key].items()))
        for r in rows[:args.samples]:
            print0(f"  {r['one_minus_ned']:.2f}  truth {(r['truth'] or '')[:200]!r}\n        reads {r['prediction'][:200]!r}")
        if figures["failed"]:
            first = next(r["error"] for r in rows if r["failed"])
            banner(f"{figures['failed']} of {len(rows)} pages failed and count as wrong; the first: {first}")
    if len(tasks) == 1:
        summary |= {k: v for k, v in figures.items() if not isinstance(v, dict)}

    if dist_info()[0] == 0:
        all_rows, png = [row for _, _, rows in sections for row in rows], os.path.join(out, "curve.png")
        curves = [curve(all_rows, key) for key in ("text_tokens", "tokens_per_vision_token")]
        summary["curve"] = curves[0]
        plot_curve(png, curves[0])
        title = f"{args.checkpoint}, step {meta['step']}, mode {summary['mode']}"
        write_html(os.path.join(out, "report.html"), title, summary, sections, curves, png, args.report_pages)
        os.makedirs(os.path.join(out, "md"), exist_ok=True)
        for row in (row for row in all_rows if "image_name" in row):  # failed ones too: the official evaluator skips pages without a file
            name = os.path.splitext(os.path.basename(row["image_name"]))[0]
            with open(os.path.join(out, "md", name + ".md"), "w", encoding="utf-8") as f:
                f.write(row["prediction"])
        write_json(os.path.join(out, "summary.json"), summary)
        if args.run != "dummy":
            log_wandb(args, summary, sections, png)
    json_line(summary)
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
