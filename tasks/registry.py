"""
The data sets by name, for the command lines of the scripts.

Training sets, for --data:
    synthdoc                rendered small pages of words (the default)
    synthpage               rendered whole pages: headings, paragraphs, lists, tables, charts
    synthchart              rendered charts with a question and its answer
    synthchat               built-in text-only chat
    folder:DIR              your own pages (tasks/folder.py); folder:FILE.jsonl, too
    finevision:CONFIG       any config of FineVision; finevision:DIR/CONFIG reads a local copy
    chartqa                 = finevision:chartqa
    smoltalk[:REPO]         text-only chat from the hub

Benchmarks, never trained on:
    fox[:ZIP or DIR]        fox-cn as well, the Chinese pages
    omnidocbench[:REPO or DIR]
    chartqa-test[:REPO or DIR]
    fox_like                rendered pages as dense as Fox's
    omnidocbench_like       rendered pages of mixed layouts

To add a data set: write its task in a new file of this folder, then add its name to one of the
tuples below and two lines to open_training_set or open_benchmark.
"""
import argparse
import math
import re

from nanochat.common import fraction, natural, positive, positive_int, print0, real
from nanochat.dataloader import UNUSABLE
from nanochat.mixture import First, Mixture, Shuffled, Stream
from tasks import chartqa, finevision, omnidocbench, smoltalk, synthpage
from tasks.folder import Folder
from tasks.fox import Fox
from tasks.rows import Rows
from tasks.synthchat import SynthChat
from tasks.synthdoc import SynthDoc

RENDERED = ("synthdoc", "synthpage", "synthchart", "synthchat")  # made on the fly, never used up
TRAINING_SETS = (*RENDERED, "folder", "finevision", "chartqa", "smoltalk")
KNOW_LETTERS = ("synthdoc", "synthpage")  # say where on their pages each letter is printed
BENCHMARKS = ("fox", "fox-cn", "omnidocbench", "chartqa-test", "fox_like", "omnidocbench_like")
# What scripts.vision_eval scores, beside the splits of SynthDoc.
EVALUATED = (*BENCHMARKS, "folder", "synthchart")

# All but stix, so that there is print a trained model has never seen (docs/reference.md fine-tunes
# on it).
FACES = "sans,sans-bold,sans-oblique,serif,serif-bold,mono"
VAL_PAGES = 1000  # held-out samples of a rendered set
LARGEST_SHARE = 1000  # of a set in --data: a cycle of the mixture is a list of so many samples
SEARCHED = 256  # samples in which a first picture is looked for
STREAM_WINDOW = 1000  # rows of a stream that are shuffled among themselves
STREAM_HELD = 256  # rows of a stream that validation keeps in memory

# -----------------------------------------------------------------------------
# Command line

def add_data_arguments(parser, **defaults):
    """Adds the flags that name and shape the training data; defaults by keyword, as in args."""
    flag = parser.add_argument
    flag("--data", default="synthdoc",
         help="training data, NAME[:ARG][=SHARE] with commas, e.g. folder:DIR=3,smoltalk=1 (names: "
              "tasks/registry.py); validation uses held-out samples of the first")
    flag("--stream", action="store_true",
         help="read data sets from the hub as streams, which need no disk space")
    flag("--ramp", type=natural, default=0,
         help="curriculum: synthdoc's pages grow from large print to the full range over this many "
              "samples; 0 = none")
    flag("--primer", default="8x4",
         help="grids of characters that the curriculum begins with, COLUMNSxROWS; several with "
              "commas come in one after the other, e.g. 8x4,16x8")
    add_page_arguments(parser)
    parser.set_defaults(**defaults)


def add_page_arguments(parser, **defaults):
    """The part of these flags that shapes the pages of a set, whatever they are used for."""
    flag = parser.add_argument
    flag("--val-share", type=fraction, default=0.1,
         help="share of a folder's pages that is held out")
    flag("--allow-outside", action="store_true",
         help="let the JSON lines of a folder set name pictures outside of their folder")
    # Rendered pages
    flag("--chars", default="31-41",
         help="characters per page, 10 or more: LO-HI or LO-HIxWEIGHT, several with commas")
    flag("--faces", default=FACES, help="faces of the print (tasks/fonts.py), with commas")
    flag("--min-px", type=positive_int, default=10,
         help="smallest print in px, where the text fits at it")
    flag("--random-share", type=fraction, default=0.2,
         help="share of words replaced by random strings, so that reading beats guessing")
    flag("--damage", type=fraction, default=0.0,
         help="scan damage (skew, blur, uneven light, noise, JPEG): 0 = clean to 1")
    flag("--text-files", default="",
         help="synthpage: your own UTF-8 text files, with commas, instead of the built-in words")
    flag("--page-parts", default="",
         help="synthpage: odds of what is on a page, e.g. "
              "paragraph=10,heading=3,list=2,table=1,figure=1; empty = text alone")
    parser.set_defaults(**defaults)


def with_defaults(args):
    """A copy of args; flags that the caller's parser does not have get their defaults."""
    # An evaluation has no --ramp or --stream, and need not know about them.
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    values = vars(parser.parse_args([]))
    values.update(vars(args))
    return argparse.Namespace(**values)


def parse_data(text):
    """"folder:scans=3,smoltalk" -> [("folder", "scans", 3), ("smoltalk", "", 1)]"""
    sets = []
    for piece in text.split(","):
        # A path may hold "=" too, so only a number at the very end is a share.
        spec, _, share = piece.rpartition("=")
        if spec and share.isdecimal():
            share = int(share)
        else:
            spec = piece
            share = 1
        if not 1 <= share <= LARGEST_SHARE:
            raise ValueError(f"--data={text}: the share of {spec} is {share}, it must be 1 or "
                             f"more, at most {LARGEST_SHARE}")
        name, _, arg = spec.partition(":")
        sets.append((name, arg, share))
    return sets


def parse_grids(text):
    """"8x4,16x8" -> [(8, 4), (16, 8)]"""
    grids = []
    for piece in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)", piece)
        if match is None:
            raise ValueError(f"--primer={text}: {piece!r} is not COLUMNSxROWS, e.g. 8x4")
        grids.append((int(match[1]), int(match[2])))
    return grids


def parse_chars(text):
    """"24-48" or "24-48x4,64-96x1" -> [(low, high, weight), ...] characters per page."""
    ranges = []
    for part in text.split(","):
        span, _, weight = part.partition("x")  # no "x": weight ""
        low, _, high = span.partition("-")
        try:
            ranges.append((positive_int(low), positive_int(high), positive(weight or "1")))
        except argparse.ArgumentTypeError:
            raise ValueError(f"--chars={text}: {part!r} is not LO-HI or LO-HIxWEIGHT, "
                             "e.g. 24-48x4,64-96x1") from None
    return ranges


def parse_parts(text):
    """"paragraph=10,table=1" -> {"paragraph": 10.0, "table": 1.0}: odds of the parts of a page."""
    odds = {}
    for piece in text.split(","):
        name, _, value = piece.partition("=")
        try:
            odds[name] = real()(value)
        except argparse.ArgumentTypeError:
            raise ValueError(f"--page-parts={text}: {piece!r} is not NAME=ODDS, "
                             "e.g. paragraph=10,table=1") from None
    return odds


# The sets that a flag applies to. On others it would be ignored without a word.
USED_BY = {
    "stream": ("finevision", "chartqa", "smoltalk"),
    "ramp": ("synthdoc",),
    "primer": ("synthdoc",),
    "val_share": ("folder",),
    "allow_outside": ("folder",),
    "chars": ("synthdoc", "synthpage"),
    "faces": ("synthdoc",),
    "min_px": ("synthdoc",),
    "random_share": ("synthdoc",),
    "damage": ("synthdoc", "synthpage", "fox_like", "omnidocbench_like"),
    "text_files": ("synthpage",),
    "page_parts": ("synthpage",),
}


def refuse_ignored(given, data):
    """ValueError if a flag of `given`, names of those on the command line, concerns no set."""
    names = {name for name, _, _ in parse_data(data)}
    refuse_unused(given, USED_BY, names, what=", ".join(sorted(names)))


def refuse_unused(given, used_by, names, what):
    """
    ValueError if a flag of `given` is for none of `names`. used_by: {flag: names that it is for};
    what: how the error calls `names`.
    """
    for flag, users in used_by.items():
        if flag in given and not names & set(users):
            raise ValueError(f"--{flag.replace('_', '-')} has no effect on {what}: it is for "
                             f"{', '.join(users)}; leave it out")


def choose_losses(args, local, place):
    """
    Fills in --local-loss and --place-loss where they are -1: with `local` and `place` if a set of
    --data knows where its letters are, else with 0. ValueError if one is asked for, and none does.
    """
    names = {name for name, _, _ in parse_data(args.data)}
    some_know = bool(names & set(KNOW_LETTERS))
    for flag, default in (("local_loss", local), ("place_loss", place)):
        weight = getattr(args, flag)
        if weight == -1:
            setattr(args, flag, default if some_know else 0.0)
        elif weight and not some_know:
            raise ValueError(f"--{flag.replace('_', '-')}={weight} has no effect on {args.data}: "
                             f"only {', '.join(KNOW_LETTERS)} know where their letters are; leave "
                             f"it out, or mix one of them in")


# -----------------------------------------------------------------------------
# One set by its name

def open_set(name, arg, split, args, image_size, size, ramp=0):
    """
    The task of that name; `arg` is what stood after the colon.

    split       "train", "val" (held out from training) or "all"; benchmarks have one part only. Of
                what is rendered, "all" is the held-out part: it is for evaluation
    args        the flags of add_data_arguments or add_page_arguments, and seed
    image_size  px of rendered pages
    size, ramp  samples of a rendered set; synthdoc's curriculum, in samples
    """
    args = with_defaults(args)
    if name in TRAINING_SETS:
        return open_training_set(name, arg, split, args, image_size, size, ramp)
    if name in BENCHMARKS:  # which have no split
        return open_benchmark(name, arg, image_size, args.damage)
    known = ", ".join(TRAINING_SETS + BENCHMARKS)
    raise ValueError(f"unknown data set {name!r}: must be one of {known}")


def open_training_set(name, arg, split, args, image_size, size, ramp):
    """The task of one of TRAINING_SETS."""
    # Rendered here
    rendered_split = "train" if split == "train" else "heldout"
    if name == "synthdoc":
        train, val = page_tasks(args, image_size, size, ramp)
        return train if split == "train" else val
    if name == "synthpage":
        return whole_pages(rendered_split, size, image_size, args)
    if name == "synthchart":
        return synthpage.SynthChart(rendered_split, size, image_size, seed=args.seed)
    if name == "synthchat":
        return SynthChat(rendered_split, size, seed=args.seed)

    # Your own
    if name == "folder":
        return Folder(arg, split, args.val_share, allow_outside=args.allow_outside)

    # From the hub. FineVision has no validation split: its rows are held out by hash.
    if name == "chartqa":
        return finevision.FineVision("chartqa", part=split, streaming=args.stream)
    if name == "finevision":
        repo, _, config = arg.rpartition("/")
        return finevision.FineVision(config, repo or finevision.REPO, part=split,
                                     streaming=args.stream)
    if name == "smoltalk":
        hub_split = "train" if split == "train" else "test"
        return smoltalk.SmolTalk(hub_split, arg or smoltalk.REPO, streaming=args.stream)


def open_benchmark(name, arg, image_size, damage):
    """The task of one of BENCHMARKS."""
    if name == "fox":
        return Fox("en", arg)
    if name == "fox-cn":
        return Fox("cn", arg)
    if name == "omnidocbench":
        return omnidocbench.OmniDocBench(arg or omnidocbench.QUIVR)
    if name == "chartqa-test":
        return chartqa.ChartQA("test", arg or chartqa.REPO)
    if name == "fox_like":
        return synthpage.fox_like(image_size, damage=damage)
    if name == "omnidocbench_like":
        return synthpage.omnidocbench_like(image_size, damage=damage)


def page_tasks(args, image_size, pages, ramp):
    """-> (SynthDoc for training, held-out SynthDoc for validation)"""
    common = {
        "image_size": image_size,
        "chars": parse_chars(args.chars),
        "faces": args.faces.split(","),
        "min_px": args.min_px,
    }
    if args.damage:
        common["damage"] = args.damage
    train = SynthDoc("train", pages, random_share=args.random_share, seed=args.seed, ramp=ramp,
                     primer=parse_grids(args.primer), **common)
    # No random strings here, and one seed for all runs, so that their validation losses compare.
    val = SynthDoc("heldout", VAL_PAGES, seed=1, **common)
    return train, val


def whole_pages(split, size, image_size, args):
    """The synthpage set of --chars, --page-parts, --text-files and --damage."""
    options = {"damage": args.damage}
    if args.text_files:
        options["text_files"] = args.text_files.split(",")
    if args.page_parts:
        options["parts"] = parse_parts(args.page_parts)
        options["kinds"] = ("text", "table")  # a table is read as HTML, a figure not at all
    # The other options, columns and faces among them, are as for pages of text alone.
    chars = parse_chars(args.chars)
    task = text_pages(split, size, image_size, chars, args.seed, **options)
    if task.left_out:
        print0(f"NOTE: {task.left_out} paragraphs of --text-files={args.text_files} ({split}) are "
               f"left out: they have characters that no face prints, or words that are too long")
    return task


def text_pages(split, size, image_size, chars, seed, **options):
    """
    SynthPage of one or two columns with as many characters as `chars` spans, of text alone; unless
    `options`, parameters of SynthPage, say otherwise.
    """
    low = min(low for low, _, _ in chars)
    high = max(high for _, high, _ in chars)
    options = {"parts": synthpage.TEXT, "kinds": ("text",), **options}
    return synthpage.SynthPage(split, size, image_size, chars=(low, high), columns=(1, 2),
                               seed=seed, **options)


# -----------------------------------------------------------------------------
# What a training stage draws from

def training_sets(args, image_size, samples, ramp):
    """
    -> (training task of `samples` samples or more,
        held-out samples of the first set that --data names, for validation)
    """
    args = with_defaults(args)
    sets = parse_data(args.data)
    refuse_benchmarks(args.data, sets)
    # Alone, SynthDoc is not wrapped.
    if sets == [("synthdoc", "", 1)]:
        return page_tasks(args, image_size, samples, ramp)

    # Whole cycles of the mixture, `samples` or more; each part needs its share of every cycle.
    total_share = sum(share for _, _, share in sets)
    cycles = math.ceil(samples / total_share)
    parts = []
    for name, arg, share in sets:
        needed = cycles * share
        task = open_set(name, arg, "train", args, image_size, needed, ramp)
        parts.append((repeated(task, name, arg, needed, args.seed), share))

    return Mixture(parts), validation_set(args, sets[0], image_size)


def refuse_benchmarks(data, sets):
    benchmarks = [name for name, _, _ in sets if name in BENCHMARKS]
    if benchmarks:
        names = ", ".join(benchmarks)
        raise ValueError(f"--data={data}: {names} is for evaluation: training on it contaminates "
                         f"the score. Train on {', '.join(TRAINING_SETS)}")


def repeated(task, name, arg, samples, seed):
    """The task as a part of a mixture, which needs `samples` of it: epoch after epoch, shuffled."""
    if is_stream(task):
        return Stream(task.rows, task.to_conversation, task.name, STREAM_WINDOW, seed)
    if name in RENDERED:
        return task  # has as many samples as are needed, and --ramp needs their order
    return Shuffled(task, samples, f"{seed}/{name}/{arg}")


def validation_set(args, first, image_size):
    name, arg, _ = first
    val = open_set(name, arg, "val", args, image_size, VAL_PAGES)
    if is_stream(val):
        val = First(val, STREAM_HELD)
    if not len(val):
        raise ValueError(f"--data={args.data}: {name} has no sample that is held out for "
                         "validation: give more, or name a larger set first")
    # Validation measures what the model sees (vision/gap): on text alone it would measure nothing.
    if not has_pictures(val):
        raise ValueError(f"--data={args.data}: {name} has no pictures to validate on: "
                         "name a set with pictures first")
    return val


def letters_set(args, image_size):
    """
    Where the pages of validation_set do not know where their letters are: held-out pages of the
    first set of --data that knows, for the accuracies of the heads. Else None.
    """
    args = with_defaults(args)
    first, *others = parse_data(args.data)
    if first[0] in KNOW_LETTERS:
        return None
    for name, arg, _ in others:
        if name in KNOW_LETTERS:
            return open_set(name, arg, "val", args, image_size, VAL_PAGES)
    return None


def is_stream(task):
    return isinstance(task, Rows) and task.streaming


def has_pictures(task):
    """Whether one of the first samples has a picture; the first ones may be unusable, or text."""
    for i in range(min(SEARCHED, len(task))):
        try:
            if task[i]["images"]:
                return True
        except UNUSABLE:  # counts when it is used: --bad-data says what happens then
            continue
    return False
