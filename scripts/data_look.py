"""
Shows what is in a data set and what the model gets of it: counts, lengths, and a sheet of pixels.

    python -m scripts.data_look folder:DIR
    python -m scripts.data_look chartqa --preset=base --mode=gundam --out=sheet.png
    python -m scripts.data_look omnidocbench_like --preset=base --damage=0.5 --write-folder=DIR

The sheet has the pixels after preprocessing, beside the supervised text. A sample that cannot be
used is counted, and its reason printed. --write-folder writes rendered pages as a folder in
OmniDocBench's layout. Names of data sets: tasks/registry.py.
"""
import textwrap

import numpy as np
from PIL import Image, ImageDraw

from nanochat.batch import IGNORE, collate
from nanochat.common import ArgumentParser, json_line, natural, positive_int, run_main
from nanochat.config import PRESETS
from nanochat.dataloader import Sampler
from nanochat.image_modes import get_mode
from nanochat.tokenizer import Tokenizer
from tasks.registry import add_page_arguments, open_set, parse_data, refuse_ignored
from tasks.fonts import font
from tasks.synthpage import write_folder

SHOWN = 8  # samples on the sheet
VIEW = 256  # px: side of a view on the sheet
GAP = 4  # px: paper between views
TEXT = 480  # px: width of the text beside them
TEXT_PX = 12  # print size of the text; the face is about 8 px wide and 16 px high a line
BAD_SHOWN = 5  # reasons printed
WRITABLE = ("synthdoc", "synthpage", "fox_like", "omnidocbench_like")  # annotated pages

# -----------------------------------------------------------------------------
# Looking

class Look:
    """What was found in the samples of a set: lengths of all, pixels and texts of the first few."""
    def __init__(self):
        self.lengths = {"characters": [], "text_tokens": [], "image_positions": []}
        self.bad = []  # reasons
        self.shown = []  # [(views, text), ...] for the sheet

    def add(self, batch, tokenizer):
        """batch: of one sample."""
        image_positions = sum(batch.features_per_row)
        self.lengths["characters"].append(batch.characters)
        self.lengths["text_tokens"].append(batch.ids.size(1) - image_positions)
        self.lengths["image_positions"].append(image_positions)
        if len(self.shown) < SHOWN:
            supervised = batch.targets[batch.targets != IGNORE]
            views = [view for side in batch.views.values() for view in side.numpy()]
            self.shown.append((views, tokenizer.decode(supervised.tolist())))


def look(sampler, n):
    """Makes the first n samples. -> Look"""
    found = Look()
    for i in range(n):
        # Alone in a batch, a sample is not padded: its lengths are its own.
        try:
            batch = collate([sampler[i]])
        except (ValueError, OSError) as error:
            found.bad.append(str(error))
            continue
        found.add(batch, sampler.tokenizer)
    return found


# -----------------------------------------------------------------------------
# Showing

def histogram(name, values):
    """Prints a histogram of whole numbers in at most ten bins; -> {min, median, p90, max}."""
    low = min(values)
    high = max(values)
    counts, edges = np.histogram(values, bins=min(10, high - low + 1), range=(low, high + 1))
    print(f"{name}:")
    for n, edge in zip(counts, edges):
        bar = "#" * round(50 * n / max(counts))
        print(f"  from {edge:7.0f} {n:7d} {bar}")
    percentiles = np.percentile(values, (0, 50, 90, 100)).tolist()
    return dict(zip(("min", "median", "p90", "max"), percentiles))


def draw(samples, path):
    """
    One row per sample (views, text): every view that the model gets (3, side, side), tiles before
    the global one, then what the model learns to say.
    """
    step = VIEW + GAP
    most_views = max(len(views) for views, _ in samples)
    sheet = Image.new("RGB", (most_views * step + TEXT, len(samples) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (views, text) in enumerate(samples):
        for k, view in enumerate(views):
            pixels = view.transpose(1, 2, 0)  # (side, side, 3)
            picture = Image.fromarray(pixels).resize((VIEW, VIEW))
            sheet.paste(picture, (k * step, row * step))
        # As much of the text as fits beside a view.
        lines = []
        for line in text.splitlines():
            lines += textwrap.wrap(line, TEXT // 8) or [""]
        visible = "\n".join(lines[:VIEW // 16])
        pen.text((len(views) * step, row * step), visible, "black", font("mono", TEXT_PX))
    sheet.save(path)


def report(task_name, task, looked_at, found, sheet):
    """Prints counts and histograms, draws the sheet. -> the record for the last line"""
    record = {
        "task": task_name,
        "conversations": len(task),
        "looked_at": looked_at,
        "bad": len(found.bad),
        "text_only": found.lengths["image_positions"].count(0),
    }
    print(record)
    for reason in found.bad[:BAD_SHOWN]:
        print(f"bad: {reason}")
    if len(found.bad) == looked_at:
        raise ValueError(f"{task_name}: none of {looked_at} samples can be used")
    for what, values in found.lengths.items():
        record[what] = histogram(what, values)
    draw(found.shown, sheet)
    record["sheet"] = sheet
    return record


# -----------------------------------------------------------------------------

def parse_arguments(argv):
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    # Data
    flag("task", help="NAME[:ARG] as in --data of training, or a benchmark")
    flag("--split", default="train", choices=["train", "val"], help="part of a set that has parts")
    flag("--seed", type=natural, default=0, help="seed of rendered pages")
    flag("--samples", type=positive_int, default=256, help="samples looked at, the first ones")
    add_page_arguments(parser)
    # Model that the data is for
    flag("--tokenizer", default="checkpoints/tokenizer",
         help="folder of scripts.tok_train, or a checkpoint")
    flag("--preset", default="nano", choices=sorted(PRESETS), help="model the pixels are for")
    flag("--mode", default="", help="image mode; empty = the preset's first")
    # Output
    flag("--out", default="data_look.png", help=f"the sheet, of the first {SHOWN}")
    flag("--write-folder", default="",
         help=f"new folder for the pages of {', '.join(WRITABLE)}: OmniDocBench.json and images/")
    args = parser.parse_args(argv)
    refuse_ignored(parser.given(argv), args.task)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    name, arg, _ = parse_data(args.task)[0]
    if args.write_folder and name not in WRITABLE:
        writable = ", ".join(WRITABLE)
        raise ValueError(f"--write-folder: the pages of {name} are not annotated; use {writable}")

    # data set
    cfg = PRESETS[args.preset]()
    task = open_set(name, arg, args.split, args, cfg.sam.image_size, args.samples)

    # samples as in training, but of any length
    tokenizer = Tokenizer.load(args.tokenizer)
    mode = get_mode(args.mode or cfg.modes[0])
    sampler = Sampler(task, tokenizer, mode, cfg.layout, max_tokens=10 ** 9)
    looked_at = min(args.samples, len(task))
    found = look(sampler, looked_at)

    record = report(args.task, task, looked_at, found, args.out)
    if args.write_folder:
        write_folder(task, args.write_folder)
        record["folder"] = args.write_folder
    json_line(record)


if __name__ == "__main__":
    run_main(main)
