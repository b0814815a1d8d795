"""What a scanner does to a page, a PIL "L" image: skew, blur, uneven light, noise and JPEG, in this order, by seed."""
import io
import math

import numpy as np
from PIL import Image, ImageFilter

LIMITS = {  # at strength 1; every amount is drawn between a third and the whole of limit x strength
    "skew": 2.0,   # degrees, either way: ink moves by less than 2 % of the longer side, which SynthPage keeps free
    "blur": 0.08,  # radius over the print size
    "light": 0.5,  # of the light missing in a corner
    "noise": 20,   # grey levels, standard deviation
    "jpeg": 75,    # taken from quality 95
}


def parse_damage(damage):
    """0 to 1, one strength for all kinds, or a dict {kind: strength} -> dict."""
    strengths = damage if isinstance(damage, dict) else dict.fromkeys(LIMITS, damage)
    if not set(strengths) <= set(LIMITS) or not all(0 <= strength <= 1 for strength in strengths.values()):
        raise ValueError(f"damage {damage}: give 0 to 1, or a dict of 0 to 1 for some of {', '.join(LIMITS)}")
    return strengths


def damage_image(image, strengths, seed, print_px):
    """-> (image of the same size, radians by which it was turned clockwise about its middle); print_px is the size of the text."""
    rng = np.random.default_rng(seed)
    amount = {kind: LIMITS[kind] * strengths.get(kind, 0) * rng.uniform(1 / 3, 1) for kind in LIMITS}
    degrees = amount["skew"] * rng.choice((-1, 1))
    if degrees:
        image = image.rotate(-degrees, Image.Resampling.BICUBIC, fillcolor=image.getpixel((0, 0)))
    if amount["blur"]:
        image = image.filter(ImageFilter.GaussianBlur(amount["blur"] * print_px))
    if amount["light"] or amount["noise"]:
        corners = Image.fromarray((1 - amount["light"] * rng.random((2, 2))).astype(np.float32))
        levels = np.asarray(image) * np.asarray(corners.resize(image.size, Image.Resampling.BILINEAR))
        levels += rng.standard_normal(levels.shape, dtype=np.float32) * np.float32(amount["noise"])
        image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if amount["jpeg"]:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=round(95 - amount["jpeg"]))
        image = Image.open(file).copy()  # a plain image, not a file's
    return image, math.radians(degrees)
