"""
What a data set is and what the model gets of it: counts, lengths, and a sheet of pixels after preprocessing beside the supervised text.

    python -m scripts.data_look folder:DIR
    python -m scripts.data_look chartqa --preset=base --mode=gundam --out=sheet.png

Names of data sets: tasks/registry.py. A sample that cannot be used is counted, and its reason printed.
"""
import argparse
import textwrap

import numpy as np
from PIL import Image, ImageDraw

from nanochat.common import json_line, run_main
from nanochat.config import PRESETS
from nanochat.dataloader import Sampler
from nanochat.batch import IGNORE, collate
from nanochat.image_modes import get_mode
from nanochat.tokenizer import Tokenizer
from tasks.synthdoc import FACES, font
from tasks.registry import open_set, parse_data

SHOWN, VIEW, TEXT = 8, 256, 480  # samples on the sheet; px: side of a view there, width of the text beside it


def histogram(name, values):
    """Prints a histogram of whole numbers in at most ten bins; -> {min, median, p90, max}."""
    counts, edges = np.histogram(values, bins=min(10, max(values) - min(values) + 1), range=(min(values), max(values) + 1))
    print(f"{name}:\n" + "\n".join(f"  from {low:7.0f} {n:7d} {'#' * round(50 * n / max(counts))}" for n, low in zip(counts, edges)))
    return dict(zip(("min", "median", "p90", "max"), np.percentile(values, (0, 50, 90, 100)).tolist()))


def draw(samples, path):
    """samples: [(views, text), ...], a row each: every view the model gets, tiles before the global one, then what it learns to say."""
    step, widest = VIEW + 4, max(len(views) for views, _ in samples)
    sheet = Image.new("RGB", (widest * step + TEXT, len(samples) * step), "white")
    for k, (views, text) in enumerate(samples):
        for j, view in enumerate(views):
            sheet.paste(Image.fromarray(view.transpose(1, 2, 0)).resize((VIEW, VIEW)), (j * step, k * step))
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, TEXT // 8) or [""]]
        ImageDraw.Draw(sheet).text((len(views) * step, k * step), "\n".join(lines[:VIEW // 16]), "black", font("mono", 12))
    sheet.save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("task", help="NAME[:ARG] as in --data of the training scripts, or a benchmark")
    parser.add_argument("--split", default="train", choices=["train", "val"], help="part of a set that has parts")
    parser.add_argument("--samples", type=int, default=256, help="samples looked at, the first ones")
    parser.add_argument("--out", default="data_look.png", help=f"the sheet, of the first {SHOWN}")
    parser.add_argument("--tokenizer", default="checkpoints/tokenizer", help="folder of scripts.tok_train, or a checkpoint")
    parser.add_argument("--preset", default="nano", choices=sorted(PRESETS), help="model the pixels are for")
    parser.add_argument("--mode", default="", help="image mode; empty = the preset's first")
    parser.set_defaults(chars="31-41", faces=",".join(FACES), min_px=10, random_share=0.2, val_share=0.1, seed=0)
    args = parser.parse_args(argv)
    (name, arg, _), cfg, tokenizer = parse_data(args.task)[0], PRESETS[args.preset](), Tokenizer.load(args.tokenizer)
    task = open_set(name, arg, args.split, args, cfg.sam.image_size, args.samples)
    sampler = Sampler(task, tokenizer, get_mode(args.mode or cfg.modes[0], cfg.modes), cfg.token_stride, max_tokens=10 ** 9)

    lengths, bad, shown, looked = [], [], [], min(args.samples, len(task))
    for i in range(looked):
        try:
            batch = collate([sampler[i]])
        except (ValueError, OSError) as e:
            bad.append(str(e))
            continue
        lengths.append((batch.characters, batch.ids.size(1) - sum(batch.features_per_row), sum(batch.features_per_row)))
        if len(shown) < SHOWN:
            said = tokenizer.decode(batch.targets[batch.targets != IGNORE].tolist())
            shown.append(([view for views in batch.views.values() for view in views.numpy()], said))
    record = {"task": args.task, "conversations": len(task), "looked_at": looked, "bad": len(bad), "text_only": sum(not n for *_, n in lengths)}
    print("\n".join([str(record), *(f"bad: {reason}" for reason in bad[:5])]))
    if not lengths:
        raise ValueError(f"{args.task}: none of {looked} samples can be used")
    draw(shown, args.out)
    figures = {name: histogram(name, values) for name, values in zip(("characters", "text_tokens", "image_positions"), zip(*lengths))}
    json_line({**record, **figures, "sheet": args.out})


if __name__ == "__main__":
    run_main(main)
