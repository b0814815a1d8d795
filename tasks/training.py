"""The sets of synthetic pages a training stage draws from, out of its command line."""
from tasks.synthdoc import SynthDoc


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
