"""
Draws the pictures of README and FINDINGS from the files that runs leave behind.

    python -m scripts.pictures --what=reading --evaluation=checkpoints/stage2/eval
    python -m scripts.pictures --what=network --sizes=nano=checkpoints/stage2,base
    python -m scripts.pictures --what=curves --panels=loss,gap,cosine \
        --runs="reads=checkpoints/stage1;collapses=checkpoints/blind"

reading: pages of an evaluation, picked by how well they were read, with what was misread marked.
They are drawn anew, and only shown if they are, pixel for pixel, what the model was given. network:
the parts with their parameters, and how many tokens travel between them. curves: figures of
evaluations while training, run beside run. Each writes docs/<what>.png, or --out. The last line is
JSON.
"""
import io
import math
import os
import re

import torch
from PIL import Image, ImageDraw

from nanochat.checkpoint import read_config, resolve
from nanochat.common import (
    ArgumentParser, json_line, natural, print0, read_json_lines, read_record, run_main)
from nanochat.config import PRESETS
from nanochat.image_modes import get_mode, plan
from nanochat.model import DeepseekOCR, forward_flops
from nanochat.report import differences
from nanochat.scoring import picture_hash, read_lines
from scripts import vision_eval
from tasks.fonts import font

COLORS = 128  # of a PNG's palette: drawings and gray pages look the same, in half of the bytes


def save_png(image, path):
    """RGB -> a PNG with a palette."""
    # The usual method, median cut, gives a color that is rare, such as a mark's, to gray.
    method = Image.Quantize.MAXCOVERAGE
    image.quantize(COLORS, method=method, dither=Image.Dither.NONE).save(path, optimize=True)


# -----------------------------------------------------------------------------
# reading: which pages


def checkpoint_of(evaluation):
    """The checkpoint folder that an evaluation was made with: it is written inside the run's."""
    parent = os.path.dirname(os.path.abspath(evaluation))
    return resolve(parent)


def open_task(evaluation, checkpoint, name, pages):
    """The task `name` as scripts.vision_eval opened it, of so many pages."""
    meta = read_record(os.path.join(checkpoint, "meta.json"), ("user_config",))
    settings = read_record(os.path.join(evaluation, "settings.json"), vision_eval.SETTINGS)
    # Not by the command line: it refuses flags that have no effect on a task, and all are in there.
    args = vision_eval.parse_args([])
    for key in vision_eval.SETTINGS:
        setattr(args, key, settings[key])
    args.task = re.sub(r"_\d+-\d+$", "", name)  # heldout_31-41 is one of heldout's ranges
    args.max_problems = pages

    image_size = read_config(checkpoint).sam.image_size
    tasks = dict(vision_eval.tasks_of(args, meta["user_config"], image_size))
    if name not in tasks:
        raise ValueError(f"--task={name}: opening it again gives {', '.join(tasks)}")
    return tasks[name]


def at_percentiles(rows, percentiles):
    """[(percentile, row), ...], by 1-NED. A draw by eye would show the pages that please us."""
    # By index among equals, so that the same evaluation always shows the same pages
    ordered = sorted(rows, key=lambda row: (row["one_minus_ned"], row["index"]))
    found = []
    for percentile in percentiles:
        # Whole places only: between two pages there is none to show.
        place = round(percentile / 100 * (len(ordered) - 1))
        found.append((percentile, ordered[place]))
    return found


def picture_of(task, row):
    """The page of a row as a PIL image. ValueError if it is not the one that was read."""
    if row["failed"]:
        raise ValueError(f"{row['id']} could not be read ({row['error']}): "
                         f"choose other --percentiles")
    conversation = task[row["index"]]
    if picture_hash(conversation) != row["hash"]["picture"]:
        raise ValueError(f"{row['id']} is drawn otherwise now than when it was read: evaluate the "
                         f"checkpoint again with this version, into another --out")
    return conversation["images"][0].convert("RGB")


def parse_percentiles(text):
    """"10,50" -> [10, 50]"""
    values = []
    for part in text.split(","):
        if not part.isdecimal() or int(part) > 100:
            raise ValueError(f"--percentiles={text}: give whole numbers of 0 to 100 with commas, "
                             f"e.g. 10,50,90")
        values.append(int(part))
    return values


def title_of(percentile, score):
    """What stands above the page at a percentile. score: 1-NED"""
    names = {0: "worst page", 50: "median page", 100: "best page"}
    name = names.get(percentile, f"{percentile}th percentile")
    return f"{name}: 1-NED {score:.2f}"


# -----------------------------------------------------------------------------
# reading: the picture

WIDTH = 1240      # px of the whole picture: legible where a page shows it at 850
HIGHEST = 6000    # px, of the paper that it is drawn on
MARGIN = 20       # px around everything, and between columns
PRINT = 17        # px of the text's face
LINE = 25         # px from one line of text to the next
PAGE_SIDE = 340   # px that a page is enlarged to, or a little less: its pixels stay square
LONGEST = 4000    # characters of a text whose letters are compared; longer ones by word
LONG = 90         # characters from which on a text stands beside its page and not below
MISSED = "#ffbbbb"  # the colors of report.html
WRONG = "#bbddff"
GRAY = "#777777"
TOKENS = "#ff9933"  # lines between the areas of vision tokens


def enlarged(page, vision_tokens):
    """A page with whole pixels made larger, and with lines between its vision tokens' areas."""
    width, height = page.size
    factor = PAGE_SIDE // max(width, height)
    if factor > 1:
        page = page.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    else:  # as large as it is, or smaller
        page = page.copy()
        page.thumbnail((PAGE_SIDE, PAGE_SIDE))
    side = math.isqrt(vision_tokens)
    # Only where the page is one square view is it plain which token shows what.
    if width == height and side * side == vision_tokens:
        ruled = page.copy()
        pen = ImageDraw.Draw(ruled)
        for k in range(1, side):
            at = round(k * page.width / side)
            pen.line((at, 0, at, page.height), fill=TOKENS)
            pen.line((0, at, page.width, at), fill=TOKENS)
        page = Image.blend(page, ruled, 0.5)  # print below the lines stays legible
    return page


def line_ranges(text, columns):
    """[(start, end), ...] of the lines of a text, broken at spaces where there are any."""
    ranges = []
    start = 0
    while start < len(text):
        end = min(start + columns, len(text))
        space = text.rfind(" ", start, end + 1)
        if end < len(text) and space > start:
            end = space + 1  # the space itself may stick out, nobody sees it
        newline = text.find("\n", start, end)
        if newline >= 0:
            end = newline + 1
        ranges.append((start, end))
        start = end
    return ranges


def marked_texts(truth, prediction):
    """((truth, marks), (prediction, marks)), a mark for each character that the other lacks."""
    texts = ["", ""]
    marks = [[], []]
    # By character: a well-read page has few mistakes, and they are letters.
    for kept, missed, wrong in differences(truth, prediction, by_character=LONGEST):
        for side, different in enumerate((missed, wrong)):
            # One of the two is empty.
            texts[side] += kept + different
            marks[side] += [False] * len(kept) + [True] * len(different)
    return (texts[0], marks[0]), (texts[1], marks[1])


class Sheet:
    """White paper, as wide as asked for and as high as what is put on it."""
    def __init__(self, width):
        self.width = width
        # PIL cannot grow a picture: more than the longest text takes, and cut when it is saved
        self.image = Image.new("RGB", (width, HIGHEST), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.bottom = 0  # px: lower edge of what is lowest

    def put(self, picture, left, top):
        """Pastes a picture with a thin frame. -> its lower edge"""
        self.image.paste(picture, (left, top))
        box = (left - 1, top - 1, left + picture.width, top + picture.height)
        self.pen.rectangle(box, outline="#bbbbbb")
        return self.reach(top + picture.height)

    def write(self, text, left, top, face="sans", fill="black", px=PRINT):
        """One line. -> where the next one begins"""
        self.pen.text((left, top), text, font=font(face, px), fill=fill)
        return self.reach(top + LINE)

    def write_marked(self, text, marks, mark_color, left, top, width):
        """A text in `width` px, broken into lines, its marked characters on color. -> as write"""
        advance = font("mono", PRINT).getlength("x")
        for start, end in line_ranges(text, int(width / advance)):
            for k in range(start, end):
                if marks[k]:
                    x = left + (k - start) * advance
                    self.pen.rectangle((x, top - 1, x + advance, top + LINE - 4), fill=mark_color)
            # Over the color, and in one go, so that letters stand where they were printed.
            line = text[start:end].rstrip("\n")
            self.pen.text((left, top), line, font=font("mono", PRINT), fill="black")
            top += LINE
        return self.reach(top)

    def reach(self, y):
        """Notes that something goes down to y. -> y. ValueError if that is off the paper."""
        if y > HIGHEST:
            raise ValueError(f"these pages and their texts are more than {HIGHEST} px high: choose "
                             f"fewer --percentiles")
        self.bottom = max(self.bottom, y)
        return y

    def save(self, path):
        sheet = self.image.crop((0, 0, self.width, self.bottom + MARGIN))
        save_png(sheet, path)


def write_texts(sheet, row, left, top, width, beside):
    """Truth and prediction with their marks, one below the other or side by side."""
    printed, read = marked_texts(row["truth"], row["prediction"])
    if beside:
        width = (width - MARGIN) // 2
    below = sheet.write("printed", left, top, fill=GRAY)
    below = sheet.write_marked(*printed, MISSED, left, below, width)
    if beside:
        left += width + MARGIN
    else:
        top = below
    below = sheet.write("read", left, top, fill=GRAY)
    sheet.write_marked(*read, WRONG, left, below, width)


def draw_reading(shown, path):
    """
    shown: [(percentile, row, PIL image), ...]. Short texts stand below their pages, which stand in
    a row; long ones beside them, page below page.
    """
    sheet = Sheet(WIDTH)
    longest = max(len(row["truth"]) for _, row, _ in shown)
    # All in one way, so that the rows of pages stay straight
    beside = longest > LONG
    columns = 1 if beside else len(shown)
    column = (WIDTH - MARGIN * (columns + 1)) // columns  # px
    left = MARGIN
    top = MARGIN
    for percentile, row, image in shown:
        title = title_of(percentile, row["one_minus_ned"])
        below = sheet.write(title, left, top, face="sans-bold") + 4
        page = enlarged(image, row["vision_tokens"])
        under = sheet.put(page, left + 1, below) + 10
        density = len(row["truth"]) / row["vision_tokens"]
        note = (f"{image.width}x{image.height} px, {row['vision_tokens']} vision tokens, "
                f"{density:.1f} characters each")
        under = sheet.write(note, left, under, fill=GRAY, px=PRINT - 2) + 4
        if beside:
            right = left + page.width + MARGIN
            write_texts(sheet, row, right, below, WIDTH - MARGIN - right, beside)
            top = sheet.bottom + MARGIN
        else:
            write_texts(sheet, row, left, under, column, beside)
            left += column + MARGIN
    sheet.save(path)


def reading(args):
    name = args.task
    rows = read_lines(os.path.join(args.evaluation, f"{name}.jsonl"))
    if not rows:
        raise FileNotFoundError(f"{args.evaluation} has no pages of --task={name}: name a folder "
                                f"that scripts.vision_eval wrote (its --out)")
    checkpoint = resolve(args.checkpoint) if args.checkpoint else checkpoint_of(args.evaluation)
    summary = read_record(os.path.join(args.evaluation, "summary.json"), (name,))
    task = open_task(args.evaluation, checkpoint, name, summary[name]["of"])

    # All pages are opened before anything is drawn: one that has changed leaves no picture.
    shown = []
    for percentile, row in at_percentiles(rows, parse_percentiles(args.percentiles)):
        shown.append((percentile, row, picture_of(task, row)))
    draw_reading(shown, args.out)
    return {"task": name, "picked_from": len(rows), "pages": [row["id"] for _, row, _ in shown],
            "one_minus_ned": [round(row["one_minus_ned"], 4) for _, row, _ in shown]}


# -----------------------------------------------------------------------------
# network

PARTS = (
    # (title, what it does, its parts in DeepseekOCR.parts, color)
    ("SAM", "attention, most\nof it in windows", ("sam",), "#fde3c8"),
    ("compressor", "2 convolutions\nof stride 2", ("compressor",), "#f9d7d7"),
    ("CLIP", "attention over\nthe whole page", ("clip",), "#d6e6f7"),
    ("projector", "joins both,\none matrix", ("projector",), "#d9efd9"),
    ("GPT", "writes the text,\ntoken by token", ("gpt", "embedding", "head"), "#e6dcf3"),
)
# What travels on the arrow before each part: (unit, its key in `measure`'s dict)
COUNTED = (
    ("pixels", "side"),
    ("patches", "patches"),
    ("tokens", "tokens"),
    ("tokens", "tokens"),
    ("positions", "positions"),
)
SIZE_COLORS = ("#0b5394", "#7f4f00", "#38761d")  # of the sizes, in the order of --sizes
# Inches. Forges show a picture at two thirds of this, so the print must be large for its width.
BOX = 1.3    # width of a box
STEP = 2.1   # from one box to the next
TEXT_SIZE = 10.5  # points


def parse_sizes(text):
    """"nano=checkpoints/stage2,base" -> {label: ModelConfig}, of checkpoints and presets."""
    sizes = {}
    for part in text.split(","):
        label, _, source = part.partition("=")
        source = source or label
        # A name in the list of presets is the preset, also where a folder is called so.
        sizes[label] = PRESETS[source]() if source in PRESETS else read_config(resolve(source))
    if len(sizes) > len(SIZE_COLORS):
        raise ValueError(f"--sizes={text}: {len(sizes)} sizes do not fit, give up to "
                         f"{len(SIZE_COLORS)}")
    return sizes


def measure(label, cfg, text_tokens):
    """What the diagram says of one size: counts of tokens, parameters and FLOPs, a dict."""
    if cfg.second_stage.kind != "clip":
        raise ValueError(f"--sizes: {label} has {cfg.second_stage.kind} for its second stage, and "
                         f"the diagram is one of CLIP: give PARTS a box for it")
    mode = get_mode(f"{cfg.sam.image_size}px")  # what its position tables are made for
    page = plan(mode, mode.size, mode.size, cfg.layout)
    with torch.device("meta"):  # parameters without memory: base has 962 million
        parts = DeepseekOCR(cfg).parts()
    params = {}
    for part, named in parts.items():
        params[part] = sum(p.numel() for _, p in named)
    # One row, not padded; as in training only the text goes through the head.
    length = page.positions + text_tokens
    flops = forward_flops(cfg, page.views, length, head_positions=text_tokens)
    gflop = {part: round(value / 1e9, 3) for part, value in flops.items()}
    return {
        "mode": mode.name,
        "side": mode.size,
        "patches": (mode.size // cfg.sam.patch_size) ** 2,
        "tokens": page.tokens,
        "positions": page.positions,
        "params": params,
        "total_params": sum(params.values()),
        "text_tokens": text_tokens,
        "forward_gflop": gflop,
        # Backward costs two forwards.
        "training_gflop": round(3 * sum(gflop.values()), 3),
    }


def millions(n):
    return f"{n / 1e6:,.2f} M" if n < 10e6 else f"{n / 1e6:,.0f} M"


def draw_box(axis, left, title, does, color, lines):
    """One part: its name, what it does, and below the box a line for each size."""
    from matplotlib.patches import FancyBboxPatch
    box = FancyBboxPatch((left, 0), BOX, 1.1, boxstyle="round,pad=0,rounding_size=0.08",
                         facecolor=color, edgecolor="#666666")
    axis.add_patch(box)
    middle = left + BOX / 2
    axis.text(middle, 0.83, title, ha="center", va="center", fontsize=13, weight="bold")
    axis.text(middle, 0.36, does, ha="center", va="center", fontsize=TEXT_SIZE)
    for k, (line, text_color) in enumerate(lines):
        axis.text(middle, -0.2 - 0.22 * k, line, ha="center", va="center", fontsize=TEXT_SIZE,
                  color=text_color)


def draw_arrow(axis, x, to_x, y=0.55, to_y=0.55):
    arrow = {"arrowstyle": "-|>", "color": "#444444", "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", xy=(to_x, to_y), xytext=(x, y), arrowprops=arrow)


def draw_counts(axis, measured, colors):
    """An arrow before every part; above it how much travels there, below it the unit."""
    for k, (unit, key) in enumerate(COUNTED):
        left = k * STEP
        draw_arrow(axis, left, left + STEP - BOX - 0.04)
        middle = left + (STEP - BOX) / 2
        for line, (label, m) in enumerate(measured.items()):
            count = f"{m[key]}²" if key == "side" else f"{m[key]:,}"
            # The first size on top, the last just above the arrow
            y = 0.66 + 0.22 * (len(measured) - 1 - line)
            axis.text(middle, y, count, ha="center", fontsize=TEXT_SIZE, color=colors[label])
        axis.text(middle, 0.3, unit, ha="center", fontsize=TEXT_SIZE, color=GRAY)


def draw_parts(axis, measured, colors):
    for k, (title, does, names, color) in enumerate(PARTS):
        lines = []
        for label, m in measured.items():
            n = sum(m["params"][name] for name in names)
            lines.append((millions(n), colors[label]))
        draw_box(axis, k * STEP + STEP - BOX, title, does, color, lines)


def draw_bypass(axis):
    """The way around CLIP: its output is joined with what it was given."""
    start = 2 * STEP - BOX / 2  # above the middle of the compressor
    goal = 4 * STEP - BOX / 2   # and of the projector
    axis.plot([start, start, goal, goal], [1.1, 1.4, 1.4, 1.2], "--", color="#444444", linewidth=1)
    # A dashed line has no room for a head of its own.
    draw_arrow(axis, goal, goal, 1.25, 1.11)
    axis.text((start + goal) / 2, 1.48, "the same tokens, around CLIP", ha="center",
              fontsize=TEXT_SIZE, color=GRAY)


def draw_network(measured, path):
    """measured: {label: a dict of `measure`}."""
    import matplotlib
    matplotlib.use("Agg")  # no window system is needed
    import matplotlib.pyplot as plt

    colors = dict(zip(measured, SIZE_COLORS))
    end = len(PARTS) * STEP
    width = end + 1.3  # room for the words at both ends
    height = 2.9
    figure, axis = plt.subplots(figsize=(width, height))
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1)  # the axis is the paper, in inches
    axis.set(xlim=(-0.65, width - 0.65), ylim=(-0.75, height - 0.75))
    axis.axis("off")

    # From left to right
    axis.text(-0.32, 0.55, "page", ha="center", va="center", fontsize=13, weight="bold")
    draw_counts(axis, measured, colors)
    draw_parts(axis, measured, colors)
    draw_bypass(axis)
    draw_arrow(axis, end, end + 0.13)
    axis.text(end + 0.16, 0.55, "text", va="center", fontsize=13, weight="bold")

    # Above: whose color is whose, and why there are more positions than tokens
    for k, (label, m) in enumerate(measured.items()):
        axis.text(-0.55, 1.85 - 0.26 * k, f"{label}: {millions(m['total_params'])} parameters",
                  fontsize=12, weight="bold", color=colors[label])
    axis.text(end + 0.55, 1.98, "positions = tokens, a newline after\neach row, one separator",
              fontsize=TEXT_SIZE, color=GRAY, va="top", ha="right")
    save_figure(figure, path)


def save_figure(figure, path):
    """As a PNG with a palette."""
    import matplotlib.pyplot as plt
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    plt.close(figure)  # matplotlib keeps every figure otherwise
    save_png(Image.open(drawn).convert("RGB"), path)


def network(args):
    sizes = parse_sizes(args.sizes)
    measured = {}
    for label, cfg in sizes.items():
        measured[label] = measure(label, cfg, args.text_tokens)
    draw_network(measured, args.out)
    return {"sizes": measured}


# -----------------------------------------------------------------------------
# curves

# {name in --panels: (title, unit, figure in metrics.jsonl, range or None)}
PANELS = {
    "loss": ("validation loss", "nats per character", "val/loss_per_char", None),
    "gap": ("gap: what a wrong page costs", "nats per character", "vision/gap", None),
    "cosine": ("how alike 16 pages look to the decoder", "cosine, 1 = all the same",
               "vision/cosine_projector", (-0.05, 1.05)),
    "1-ned": ("score on 16 fixed pages", "1-NED", "val/one_minus_ned", (-0.03, 1.03)),
    "local": ("letters read off the vision tokens", "share", "vision/local_accuracy",
              (-0.03, 1.03)),
    "place": ("places known to the decoder", "share", "vision/place_accuracy", (-0.03, 1.03)),
}


def parse_runs(text):
    """"reads=DIR;collapses=DIR" -> {label: records of its metrics.jsonl}"""
    runs = {}
    for part in text.split(";"):
        label, equals, folder = part.strip().partition("=")
        if not equals:
            raise ValueError(f"--runs: {part!r} must be LABEL=FOLDER; several with semicolons")
        path = os.path.join(folder, "metrics.jsonl")
        if not os.path.exists(path):
            raise FileNotFoundError(f"--runs: {folder} has no metrics.jsonl: name a run folder, "
                                    f"e.g. checkpoints/stage1")
        # A damaged line is one point less, and was reported when the run was resumed.
        records, _ = read_json_lines(path)
        runs[label] = records
    return runs


def points_of(records, figure):
    """(steps, values) of the records that have a figure."""
    having = [record for record in records if figure in record]
    return [record["step"] for record in having], [record[figure] for record in having]


def draw_panel(axis, name, runs):
    """One figure of all runs. -> {label: its last value}"""
    title, unit, key, limits = PANELS[name]
    last = {}
    for label, records in runs.items():
        steps, values = points_of(records, key)
        # Drawn even without a point (the local accuracy of a run without that loss), so that a
        # run has the same color in every panel.
        axis.plot(steps, values, "o-", markersize=3, linewidth=2, label=label)
        if values:
            last[label] = round(values[-1], 4)
    if not last:
        raise ValueError(f"--panels={name}: none of these runs has measured {key}")
    axis.set_title(title, fontsize=11)
    axis.set(xlabel="step", ylabel=unit, ylim=limits)
    axis.grid(alpha=0.3)
    return last


def draw_curves(runs, panels, path):
    """runs: {label: records}; panels: names of PANELS. -> {panel: {label: last value}}"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.1 * len(panels), 3.6), squeeze=False)
    last = {}
    for axis, name in zip(axes[0], panels):
        last[name] = draw_panel(axis, name, runs)
    handles, labels = axes[0][0].get_legend_handles_labels()
    # Above the panels: inside, it would lie on one of the curves.
    figure.legend(handles, labels, loc="upper center", ncol=len(labels), frameon=False, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    save_figure(figure, path)
    return last


def curves(args):
    panels = args.panels.split(",")
    for name in panels:
        if name not in PANELS:
            raise ValueError(f"--panels={name}: must be one of {', '.join(PANELS)}")
    return {"last": draw_curves(parse_runs(args.runs), panels, args.out)}


# -----------------------------------------------------------------------------

PICTURES = {"reading": reading, "network": network, "curves": curves}


def main(argv=None):
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--what", choices=PICTURES, required=True, help="which picture")
    flag("--out", default="", help="the PNG; empty = docs/<what>.png")
    # reading
    flag("--evaluation", default="checkpoints/stage2/eval",
         help="folder that scripts.vision_eval wrote")
    flag("--checkpoint", default="",
         help="what was evaluated; empty = the run folder that the evaluation lies in")
    flag("--task", default="heldout", help="one of its tasks")
    flag("--percentiles", default="10,50,90", help="of the pages, by 1-NED")
    # network
    flag("--sizes", default="nano,base", help="presets, or LABEL=CHECKPOINT, with commas")
    flag("--text-tokens", type=natural, default=1000, help="of the page whose FLOPs are counted")
    # curves
    flag("--runs", default="", help="LABEL=RUN FOLDER, with semicolons")
    flag("--panels", default="loss,gap,cosine", help=f"with commas: {', '.join(PANELS)}")
    args = parser.parse_args(argv)
    if args.what == "curves" and not args.runs:
        raise ValueError("--what=curves needs --runs, e.g. --runs=\"reads=checkpoints/stage1\"")

    args.out = args.out or os.path.join("docs", f"{args.what}.png")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    record = PICTURES[args.what](args)
    size = os.path.getsize(args.out)
    print0(f"{args.out}: {size / 1000:.0f} kB")
    json_line({"picture": args.out, "bytes": size, **record})


if __name__ == "__main__":
    run_main(main)
