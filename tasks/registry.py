"""
The sets a training stage draws from, out of its command line: --data names them, --chars and the like shape the synthetic pages.

    synthdoc            rendered word pages (the default)             synthchat         built-in text-only chat
    synthpage           rendered whole pages, --chars characters      synthchart        rendered charts, question and answer
    folder:DIR, folder:FILE.jsonl   your own pages (tasks/folder.py)  smoltalk[:REPO]   text-only chat from the hub
    finevision:CONFIG   any config of FineVision; finevision:DIR/CONFIG reads a local copy;  chartqa = finevision:chartqa

Benchmarks, never trained on: fox, fox-cn [:ZIP or DIR], omnidocbench[:REPO or DIR], chartqa-test[:REPO or DIR], fox_like, omnidocbench_like.
"""
from nanochat.conversation import BadSample
from nanochat.mixture import First, Mixture, Shuffled, Stream
from tasks import chartqa, finevision, folder, fox, omnidocbench, smoltalk, synthchat, synthpage
from tasks.synthdoc import SynthDoc

BENCHMARKS = ("fox", "fox-cn", "omnidocbench", "chartqa-test", "fox_like", "omnidocbench_like")
EVALUATED = (*BENCHMARKS, "folder", "synthchart")  # what scripts.vision_eval scores beside the splits of synthdoc


def parse_chars(text):
    """"24-48" or "24-48x4,64-96x1" -> [(low, high, weight), ...] characters a page."""
    ranges = []
    for part in text.split(","):
        span, _, weight = part.partition("x")
        low, _, high = span.partition("-")
        try:
            ranges.append((int(low), int(high), float(weight or 1)))
        except ValueError:
            raise ValueError(f"--chars={text}: {part!r} is not LO-HI or LO-HIxWEIGHT, e.g. 24-48x4,64-96x1") from None
    return ranges


def page_tasks(args, image_size, pages, ramp):
    """-> (training pages, held-out pages for validation, training-like pages for the encoder's statistics)."""
    common = dict(image_size=image_size, chars=parse_chars(args.chars), faces=args.faces.split(","), min_px=args.min_px)
    train = SynthDoc("train", pages, random_share=args.random_share, seed=args.seed, ramp=ramp, **common)
    val = SynthDoc("heldout", 1000, seed=1, **common)
    statistics = SynthDoc("train", 1000, random_share=args.random_share, seed=f"{args.seed}/statistics", **common)
    return train, val, statistics


def parse_data(text):
    """"folder:scans=3,smoltalk" -> [("folder", "scans", 3), ("smoltalk", "", 1)]: names, arguments, shares."""
    sets = []
    for piece in text.split(","):
        spec, _, share = piece.rpartition("=")
        spec, share = (spec, int(share)) if spec and share.isdecimal() else (piece, 1)  # a path may hold "=" too
        name, _, arg = spec.partition(":")
        if share < 1:
            raise ValueError(f"--data={text}: the share of {spec} is {share}, it must be 1 or more")
        sets.append((name, arg, share))
    return sets


def open_set(name, arg, split, args, image_size, size, ramp=0):
    """The set of that name; split is train, val or all. `size` is for those that are made as they go."""
    repo, _, config = arg.rpartition("/")
    heldout = "train" if split == "train" else "heldout"
    stream = getattr(args, "stream", False)
    makers = {
        "synthdoc": lambda: page_tasks(args, image_size, size, ramp)[split == "val"],
        "synthchat": lambda: synthchat.SynthChat("heldout" if split == "val" else split, size, seed=args.seed),
        "synthpage": lambda: text_pages(heldout, size, image_size, parse_chars(args.chars), args.seed),
        "synthchart": lambda: synthpage.SynthChart(heldout, size, image_size, seed=args.seed),
        "folder": lambda: folder.Folder(arg, split, getattr(args, "val_share", 0.0)),
        "finevision": lambda: finevision.FineVision(config, repo or finevision.REPO, part=split, streaming=stream),
        "chartqa": lambda: finevision.FineVision("chartqa", part=split, streaming=stream),
        "smoltalk": lambda: smoltalk.SmolTalk("test" if split == "val" else split, arg or smoltalk.REPO, streaming=stream),
        "fox": lambda: fox.Fox("en", arg),
        "fox-cn": lambda: fox.Fox("cn", arg),
        "omnidocbench": lambda: omnidocbench.OmniDocBench(arg or omnidocbench.QUIVR),
        "fox_like": lambda: synthpage.fox_like(image_size),
        "omnidocbench_like": lambda: synthpage.omnidocbench_like(image_size),
        "chartqa-test": lambda: chartqa.ChartQA("test", arg or chartqa.REPO)}
    if name not in makers:
        raise ValueError(f"unknown data set {name!r}: must be one of {', '.join(makers)}")
    return makers[name]()


def text_pages(split, size, image_size, chars, seed):
    """Whole pages of text alone, in one or two columns, with as many characters as --chars spans."""
    low, high = min(low for low, *_ in chars), max(high for _, high, _ in chars)
    return synthpage.SynthPage(split, size, image_size, chars=(low, high), columns=(1, 2), parts=synthpage.TEXT, kinds=("text",), seed=seed)


def has_pictures(task):
    """Whether the first sound one of a few samples has a picture."""
    for i in range(min(16, len(task))):
        try:
            return bool(task[i]["images"])
        except BadSample:  # --bad-data decides what becomes of it when it is used
            continue
    return False


def training_sets(args, image_size, samples, ramp):
    """-> (training task of at least `samples` samples, held-out pages for validation, training-like pages for the encoder's statistics)."""
    sets = parse_data(args.data)
    if sets == [("synthdoc", "", 1)]:
        return page_tasks(args, image_size, samples, ramp)
    if benchmarks := [name for name, *_ in sets if name in BENCHMARKS]:
        raise ValueError(f"--data={args.data}: {', '.join(benchmarks)} measures models, and no longer could one that was trained on it")
    cycles, parts = -(-samples // sum(share for *_, share in sets)), []
    for name, arg, share in sets:
        part = open_set(name, arg, "train", args, image_size, cycles * share, ramp)
        streamed = args.stream and hasattr(part, "rows")
        if streamed:
            parts.append((Stream(part.rows, part.to_conversation, part.name, window=1000, seed=args.seed), share))
        else:
            parts.append((part if name.startswith("synth") else Shuffled(part, cycles * share, f"{args.seed}/{name}/{arg}"), share))
        if len(parts) == 1:
            statistics = First(part, 256) if streamed else Shuffled(part, 1000, f"{args.seed}/statistics")
    val = open_set(*sets[0][:2], "val", args, image_size, 1000)
    val = First(val, 256) if args.stream and hasattr(val, "rows") else val
    if not has_pictures(val):
        raise ValueError(f"--data={args.data}: {sets[0][0]} has no pictures to validate on: name a set with pictures first")
    return Mixture(parts), val, statistics
