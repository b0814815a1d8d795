"""
What a scanner does to a page, a PIL "L" image: skew, blur, uneven light, noise and JPEG, in this
order. All amounts and the noise depend on a seed alone.
"""
import io
import math

import numpy as np
from PIL import Image, ImageFilter

# At strength 1. The amount on a page is drawn between a third and the whole of limit x strength.
LIMITS = {
    "skew": 2.0,  # degrees, either way
    "blur": 0.08,  # radius over the print size
    "light": 0.5,  # share of the light missing in a corner
    "noise": 20,  # gray levels, standard deviation
    "jpeg": 75,  # subtracted from quality 95
}


def parse_damage(damage):
    """One strength for all kinds, 0 to 1, or a dict {kind: strength} -> dict."""
    strengths = damage if isinstance(damage, dict) else dict.fromkeys(LIMITS, damage)
    known = set(strengths) <= set(LIMITS)
    if not known or not all(0 <= strength <= 1 for strength in strengths.values()):
        raise ValueError(
            f"damage {damage}: give 0 to 1, or a dict of 0 to 1 for some of {', '.join(LIMITS)}"
        )
    return strengths


def skew_margin(strengths, width, height):
    """The px that have to stay blank around the ink, or skew could turn it out of the page."""
    angle = math.radians(LIMITS["skew"] * strengths.get("skew", 0))
    # No point moves further than a corner, which moves along this chord.
    radius = math.hypot(width, height) / 2
    chord = 2 * radius * math.sin(angle / 2)
    return math.ceil(chord)


def light_map(rng, size, shade):
    """(height, width) float32, 1 - shade to 1: drawn at the four corners, linear between them."""
    corners = 1 - shade * rng.random((2, 2))
    light = Image.fromarray(corners.astype(np.float32))
    return np.asarray(light.resize(size, Image.Resampling.BILINEAR))


def grain(rng, shape, noise):
    """float32 array of normal noise, `noise` gray levels of standard deviation."""
    levels = rng.standard_normal(shape, dtype=np.float32)
    levels *= np.float32(noise)
    return levels


def damage_image(image, strengths, seed, print_px):
    """
    -> (image of the same size, radians by which it was turned clockwise about its middle).

    print_px is the size of the text in px, to which blur is relative.
    """
    rng = np.random.default_rng(seed)
    # Every amount is drawn, used or not: none depends on the strengths of the others.
    amounts = {}
    for kind, limit in LIMITS.items():
        amounts[kind] = limit * strengths.get(kind, 0) * rng.uniform(1 / 3, 1)
    skew, blur, shade, noise, loss = amounts.values()
    degrees = skew * rng.choice((-1, 1))

    # The page is turned first, as it lies under the lid; the other kinds come from lamp and sensor.
    if degrees:
        paper = image.getpixel((0, 0))
        image = image.rotate(-degrees, Image.Resampling.BICUBIC, fillcolor=paper)
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(blur * print_px))
    if shade or noise:
        levels = np.asarray(image) * light_map(rng, image.size, shade)  # (height, width) float32
        levels += grain(rng, levels.shape, noise)
        image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if loss:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=round(95 - loss))
        image = Image.open(file).copy()  # a plain image without an open file
    return image, math.radians(degrees)
