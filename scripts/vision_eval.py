"""
Scores a checkpoint on pages it has never seen: greedy, cached, batched generation; 1-NED first.

    python -m scripts.vision_eval --checkpoint=checkpoints/stage2 --controls
    python -m scripts.vision_eval --task=heldout --chars=14-20,31-41,60-68      # a curve
    torchrun --standalone --nproc_per_node=8 -m scripts.vision_eval \
        --task=omnidocbench --path=DIR                                          # real pages

Writes to <out>: report.html (look at this first), curve.png, <task>.jsonl (one line per page),
md/<image name>.md for the official OmniDocBench evaluator, and summary.json, which is also the last
line printed. Run the same command again to continue a stopped evaluation.
"""
import argparse
import copy
import hashlib
import importlib.util
import os
import random

from PIL import Image

from nanochat.common import (banner, barrier, compute_cleanup, compute_init, dist_info, init_wandb,
                             json_line, print0, read_json, run_main, write_json)
from nanochat.evaluation import FIGURES, evaluate, figures_of
from nanochat.pretrained import fetch
from nanochat.reader import add_arguments, load_engine
from nanochat.report import curve, plot_curve, write_html
from nanochat.verdict import CONTROLS
from tasks.registry import EVALUATED, open_set, parse_chars
from tasks.synthdoc import MIN_PX, SPLITS, SynthDoc, random_string

# Flags that change a prediction or a page: rows made under others must not be mixed.
SETTINGS = ("dtype", "max_new_tokens", "no_repeat", "path", "chars", "seed")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # Model
    add_arguments(parser)
    # Pages
    parser.add_argument("--task", default="heldout,heldout_words,random_chars",
                        help=f"with commas: {', '.join(SPLITS + EVALUATED)}")
    parser.add_argument("--path", default="",
                        help="where the pages of fox, omnidocbench, chartqa-test or folder are; "
                             "empty = on the hub")
    parser.add_argument("--chars", default="",
                        help="synthetic pages: LO-HI characters, or several ranges, each a set of "
                             "its own; empty = as trained")
    parser.add_argument("--max-problems", type=int, default=256, help="pages per task")
    parser.add_argument("--controls", type=int, nargs="?", const=64, default=0,
                        help="pages per control: blank, another page, other words")
    parser.add_argument("--seed", type=int, default=2,
                        help="seed of the synthetic pages (0 trains, 1 validates)")
    parser.add_argument("--batch-size", type=int, default=64, help="pages generated together")
    # Output
    parser.add_argument("--run", default="dummy", help="W&B run name; dummy = no W&B")
    parser.add_argument("--samples", type=int, default=3,
                        help="pages printed per task, truth and prediction")
    parser.add_argument("--report-pages", type=int, default=256,
                        help="pages per task in report.html, the worst ones")
    parser.add_argument("--out", default="",
                        help="folder for the results; empty = eval_<task> beside the checkpoint")
    args = parser.parse_args(argv)
    if min(args.max_problems, args.batch_size) < 1:
        raise ValueError("--max-problems and --batch-size must be at least 1")
    return args


# -----------------------------------------------------------------------------
# Tasks and controls


def tasks_of(args, user_config, image_size):
    """[(name, task), ...] for --task; a synthetic split appears once per range of --chars."""
    tasks = []
    for name in args.task.split(","):
        if name not in SPLITS + EVALUATED or (name == "folder" and not args.path):
            raise ValueError(f"--task={name}: must be one of {', '.join(SPLITS + EVALUATED)}; "
                             "folder needs --path")
        if name in SPLITS:
            tasks += split_tasks(name, args, user_config, image_size)
        else:
            task = open_set(name, args.path, "all", args, image_size, args.max_problems)
            tasks.append((name, task))
    return tasks


def split_tasks(name, args, user_config, image_size):
    """[(name, task), ...] of one split of SynthDoc, with faces and print as in training."""
    chars = parse_chars(args.chars or user_config["chars"])
    common = {"image_size": image_size, "faces": user_config["faces"].split(","),
              "min_px": user_config.get("min_px", MIN_PX), "seed": args.seed}
    # Without --chars the pages are those of training: all its ranges mixed in one set.
    if not args.chars or len(chars) == 1:
        return [(name, SynthDoc(name, args.max_problems, chars=chars, **common))]
    tasks = []
    for low, high, _ in chars:
        task = SynthDoc(name, args.max_problems, chars=(low, high), **common)
        tasks.append((f"{name}_{low}-{high}", task))
    return tasks


class Control:
    """A task whose pictures are replaced: by blank ones, or by the next page's ("another")."""

    def __init__(self, task, kind):
        self.task = task
        self.kind = kind

    def __getitem__(self, i):
        conversation = self.task[i]
        if self.kind == "another":
            images = self.task[(i + 1) % len(self.task)]["images"]
        else:
            images = [Image.new("RGB", image.size, "white") for image in conversation["images"]]
        return {**conversation, "images": images}


def other_words(words, kind, rng):
    """The words in another order ("shuffled"), or random strings as long as they are."""
    if kind == "shuffled":
        return rng.sample(words, len(words))
    strings = []
    for word in words:
        letters = "".join(random_string(rng) for _ in word)  # more than enough
        strings.append(letters[:len(word)])
    return strings


def reworded(task, kind):
    """A synthetic task whose pages keep their layout but show `other_words`, truth included."""
    def blocks(i):
        rng, freedom, own_blocks = task.blocks(i)
        own_rng = random.Random(f"{kind}/{i}")  # the task's rng goes on to draw the layout
        new_blocks = []
        for box, words, scale in own_blocks:
            new_blocks.append((box, other_words(words, kind, own_rng), scale))
        return rng, freedom, new_blocks
    changed = copy.copy(task)
    changed.blocks = blocks
    return changed


def controls_of(task):
    """{control: task}, as many as the task allows; what each shows is in verdict.CONTROLS."""
    controls = {"blank": Control(task, "blank")}
    if len(task) > 1:
        controls["another"] = Control(task, "another")
    if hasattr(task, "blocks"):  # pages that are drawn from words can be drawn from others
        controls["random_chars"] = reworded(task, "random_chars")
        controls["shuffled"] = reworded(task, "shuffled")
    return controls


# -----------------------------------------------------------------------------
# The output folder


def default_out(args):
    parent = args.checkpoint if os.path.isdir(args.checkpoint) else "."
    return os.path.join(parent, "eval_" + args.task.replace(",", "_"))


def settings_of(args, meta, by_character):
    """What the predictions depend on, besides the pages and the number of pages."""
    with open(os.path.join(fetch(args.checkpoint), "model.safetensors"), "rb") as f:
        weights = hashlib.file_digest(f, "sha256").hexdigest()
    settings = {"weights": weights, "by_character": by_character, "mode": args.mode or meta["mode"]}
    for key in SETTINGS:
        settings[key] = getattr(args, key)
    return settings


def check_settings(settings, out):
    """Writes <out>/settings.json; ValueError if <out> was begun under other settings."""
    path = os.path.join(out, "settings.json")
    earlier = read_json(path) if os.path.exists(path) else settings
    changes = []
    for key in settings:
        if earlier.get(key) != settings[key]:
            changes.append(f"{key} was {earlier.get(key)!r}, now {settings[key]!r}")
    if changes:
        raise ValueError(f"{out} holds an evaluation under other settings ({'; '.join(changes)}): "
                         "give another --out, or delete it")
    barrier()  # all ranks have looked
    if dist_info()[0] == 0:
        os.makedirs(out, exist_ok=True)
        write_json(path, settings)


def write_markdown(folder, rows):
    """md/<image name>.md as OmniDocBench's evaluator wants it, for the rows of real pages."""
    os.makedirs(folder, exist_ok=True)
    for row in rows:
        if "image_name" not in row:
            continue
        # Failed pages get their (empty) file too: the official evaluator skips pages without one.
        name = os.path.splitext(os.path.basename(row["image_name"]))[0]
        with open(os.path.join(folder, name + ".md"), "w", encoding="utf-8") as f:
            f.write(row["prediction"])


def write_report(args, out, summary, sections):
    """Everything but the rows, which are there already: report, curve, Markdown, summary."""
    all_rows = []
    for _, _, rows in sections:
        all_rows += rows
    by_length = curve(all_rows, "text_tokens")
    by_ratio = curve(all_rows, "tokens_per_vision_token")
    summary["curve"] = by_length
    png = os.path.join(out, "curve.png")
    plot_curve(png, by_length)
    title = f"{args.checkpoint}, step {summary['step']}, mode {summary['mode']}"
    write_html(os.path.join(out, "report.html"), title, summary, sections, [by_length, by_ratio],
               png, args.report_pages)
    write_markdown(os.path.join(out, "md"), all_rows)
    write_json(os.path.join(out, "summary.json"), summary)
    if args.run != "dummy":
        log_wandb(args, summary, sections, png)


def log_wandb(args, summary, sections, png):
    """Every figure, the table of pictures and the curve."""
    import wandb
    run = init_wandb(args.run, vars(args))
    table = wandb.Table(columns=["task", "page", "truth", "prediction", "1-NED", "flags"])
    for name, task, rows in sections:
        for key, value in summary[name].items():
            if isinstance(value, (int, float)):
                run.log({f"{name}/{key}": value})
        worst_first = sorted(rows, key=lambda row: row["one_minus_ned"])
        for row in worst_first[:args.report_pages]:
            picture = None
            if not row["failed"]:
                picture = wandb.Image(task[row["index"]]["images"][0])
            table.add_data(name, picture, row["truth"], row["prediction"], row["one_minus_ned"],
                           ", ".join(row["flags"]))
    run.log({"pages": table, "curve": wandb.Image(png)})
    run.finish()


# -----------------------------------------------------------------------------
# Printing


def print_figures(name, figures):
    scores = [f"{key} {figures[key]:.4f}" for key in FIGURES if key in figures]
    print0(f"{name}: {figures['verdict']}")
    print0(f"  {figures['samples']} pages, {figures['chars_per_vision_token']:.2f} characters per "
           f"vision token | {' | '.join(scores)} | {figures['pages_per_sec']:.1f} pages/s, "
           f"{figures['tokens_per_sec']:.0f} tok/s")
    print0("  (precision counts only what was written: misleading when the output is short)")
    for kind, control in figures["controls"].items():
        print0(f"  control {kind} ({CONTROLS[kind]}): 1-NED {control['one_minus_ned']:.4f} on "
               f"{control['samples']} pages")
    for key in figures:
        if key.startswith("by_"):
            print_breakdown(key.removeprefix("by_"), figures[key])


def print_breakdown(attribute, groups):
    parts = []
    for value, (score, pages, (low, high)) in groups.items():
        parts.append(f"{value} {score:.3f} ({low:.3f}-{high:.3f}, {pages})")
    print0(f"  1-NED by {attribute}: {', '.join(parts)}")


def print_pages(rows, number):
    """The first pages, truth above prediction; and, loudly, those that failed."""
    for row in rows[:number]:
        print0(f"  {row['one_minus_ned']:.2f}  truth {(row['truth'] or '')[:200]!r}")
        print0(f"        reads {row['prediction'][:200]!r}")
    failed = [row for row in rows if row["failed"]]
    if failed:
        banner(f"{len(failed)} of {len(rows)} pages failed and count as wrong; the first: "
               f"{failed[0]['error']}")


def main(argv=None):
    args = parse_args(argv)

    # model
    device = compute_init(args.device_type)
    engine, meta = load_engine(args, device)
    # Fox's script cuts Chinese into words with jieba.
    by_character = importlib.util.find_spec("jieba") is None
    if by_character:
        print0("jieba is not installed: f1 and precision of Chinese pages count characters")

    # tasks; pages are drawn at the encoder's own size, so that they are the same in every mode
    tasks = tasks_of(args, meta["user_config"], engine.model.cfg.sam.image_size)
    out = args.out or default_out(args)
    check_settings(settings_of(args, meta, by_character), out)

    # reading and figures
    summary = {"checkpoint": args.checkpoint, "step": meta["step"],
               "mode": args.mode or meta["mode"], "seed": args.seed}
    sections = []
    for name, task in tasks:
        pages = min(args.max_problems, len(task))
        rows = evaluate(engine, name, task, pages, args, out, by_character)
        controls = {}
        if args.controls:
            pages = min(args.controls, len(rows))
            for kind, other in controls_of(task).items():
                controls[kind] = evaluate(engine, f"{name}.{kind}", other, pages, args, out,
                                          by_character)
        figures = figures_of(name, rows, controls)
        summary[name] = figures
        sections.append((name, task, rows))
        print_figures(name, figures)
        print_pages(rows, args.samples)
    if len(tasks) == 1:  # the figures of the only task also stand at the top level
        for key, value in figures.items():
            if not isinstance(value, dict):
                summary[key] = value

    # report
    if dist_info()[0] == 0:
        write_report(args, out, summary, sections)
    json_line(summary)
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
