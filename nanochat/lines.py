"""
Where the print is on a picture: its lines, the words in each, and the size of the print. Rules
alone, no network: ink against paper, then projections of the ink.

    ink_of      picture -> how much ink each pixel has, dark or light print, whatever the paper
    find_lines  ink -> Lines in reading order, columns one after the other

All coordinates are px of the straightened picture, halved if it is huge; right and bottom edges are
exclusive. "Print" is the size of a font, px per em, as the height of its letters tells it.
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from nanochat.image_modes import to_rgb

# Ink
LARGEST = 12_000_000  # px; what is larger is halved first. A4 at 300 dpi has 8.7 million
CELL = 16             # px, side of the squares whose median is taken for paper
CROPPED = 6 * CELL    # px, side of a picture that may show a line or two and hardly any paper
FAINTEST = 20         # gray levels between ink and paper; what differs less is paper
NARROWEST = 8         # px, side of a picture that can hold print
SOLID = 0.35          # of full ink: from here on a pixel counts as printed
DARK = 0.65           # what a rule has; letters that run into each other have less in between

# Skew
STEEPEST = 3.0        # degrees that are looked for, either way
SLIGHTEST = 0.2       # degrees that are left as they are
SAMPLED = 30_000      # px of ink that are enough to find the angle

SPECKLESS = 16        # px of rough_print from which single pixels are dust and no full stop

# A stroke at least so long and no wider than THIN is a rule, whatever the print, px: the strokes of
# letters as large as that are wider.
LONG_RULE = 100
THIN = 5

# Proportions of print, in em. Latin faces differ little in them.
ASCENT = 0.72         # from the baseline to the top of capitals, b, d, h
DESCENT = 0.25        # from the baseline to the foot of g, p, q
RULE = 6.0            # a dark thin stroke longer than this is a rule or a frame, not a letter
LONGEST_WORD = 16.0   # one longer than this is a rule, or an edge, however faint or thick
GUTTER = 1.2          # least paper between two columns; spaces in justified lines stay below
COLUMN = 10.0         # least width of a column of prose, about 20 letters
SPACE = 0.35          # between words, where a column has no gap to measure
TAB = 1.0             # what is wider is no space: tab stops, gaps between the cells of a table
REACH = 0.15          # of the soft edges of a line, at most
DOT = 0.3             # height of what belongs to the line beside it: dots, accents, a dash
TALLEST = 6.0         # what is higher is no line of print but a picture
GRAIN = 3.0           # px per em; smaller letters are two pixels high, so that is no print
WORD_GAP = (0.15, 0.5)  # between which the border of letter gaps and word gaps is looked for


class Box(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self):
        return self.right - self.left

    @property
    def height(self):
        return self.bottom - self.top


@dataclass
class Line:
    """A line of print."""
    box: Box                # of its ink
    baseline: int           # y of the first row below the letters without a descender
    print_px: float         # size of the print, px per em
    column: int             # number of its column, in reading order
    opens: bool = False     # whether a gap above it says that a paragraph begins here
    words: list = field(default_factory=list)  # of Boxes, each with half of the space around it


def runs(flags):
    """[(start, end), ...] of the stretches of True in a bool array (n,)."""
    edges = np.diff(np.concatenate([[0], flags.astype(np.int8), [0]]))
    starts = np.flatnonzero(edges == 1).tolist()
    ends = np.flatnonzero(edges == -1).tolist()
    return list(zip(starts, ends))


def weighted_quantile(values, weights, share):
    """The value below which that share of the weights lies."""
    order = np.argsort(values)
    total = np.cumsum(np.asarray(weights)[order])
    return float(values[order[np.searchsorted(total, share * total[-1])]])


# -----------------------------------------------------------------------------
# Ink

@dataclass
class Ink:
    """A picture as ink on paper, straightened."""
    levels: np.ndarray    # (height, width) float32, 0 for paper to 1 for full ink
    printed: np.ndarray   # (height, width) bool: without specks, rules and frames
    reduced: int          # px of the picture along a side that became one of these
    degrees: float        # by which the picture was turned clockwise to make its lines level


def in_cells(pixels):
    """(height, width) -> (rows, columns, CELL * CELL); the edge fills up the last cells."""
    height, width = pixels.shape
    pixels = np.pad(pixels, ((0, -height % CELL), (0, -width % CELL)), mode="edge")
    rows = pixels.shape[0] // CELL
    columns = pixels.shape[1] // CELL
    cells = pixels.reshape(rows, CELL, columns, CELL).transpose(0, 2, 1, 3)
    return cells.reshape(rows, columns, CELL * CELL)


def per_pixel(cells, shape, resample):
    """(rows, columns), a number per cell -> (height, width) float32, a number per pixel."""
    rows, columns = cells.shape
    image = Image.fromarray(cells.astype(np.float32))
    image = image.resize((columns * CELL, rows * CELL), resample)
    height, width = shape
    return np.asarray(image)[:height, :width]


def paper_of(gray):
    """Gray level of the paper at every pixel, also under the print: (height, width) float32."""
    # Even dense print leaves most of a cell to the paper, so the median is paper. Where it is not,
    # inside a bold title, most of the cells around are.
    # A line of bold print, cropped, has as much ink as paper. A frame, of what most of its edge
    # shows, tells which is which.
    frame = CELL if min(gray.shape) < CROPPED else 0
    edge = np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])
    framed = np.pad(gray, frame, constant_values=np.median(edge))
    medians = np.median(in_cells(framed), axis=2).astype(np.uint8)
    medians = np.asarray(Image.fromarray(medians).filter(ImageFilter.MedianFilter(5)))
    paper = per_pixel(medians, framed.shape, Image.Resampling.BILINEAR)
    height, width = gray.shape
    return paper[frame:frame + height, frame:frame + width]


def ink_levels(gray):
    """
    -> (ink, 0 to 1, (height, width) float32; whether the page is noisy) of gray levels of that
    shape.
    """
    darker = paper_of(gray) - gray
    # Half of all pixels differ less from the paper than this: on a scan that is its noise.
    noise = 1.48 * np.median(np.abs(darker))
    floor = max(FAINTEST, 4 * noise)

    # Dark print or light print is decided per cell: a page may have a dark heading, printed white.
    beyond = np.sign(darker) * np.maximum(np.abs(darker) - floor, 0)
    sign = np.where(in_cells(beyond).sum(2) >= 0, 1, -1)
    ink = np.maximum(darker * per_pixel(sign, gray.shape, Image.Resampling.NEAREST), 0)

    noisy = floor > FAINTEST
    found = ink[ink > floor]
    if not found.size:
        return np.zeros_like(ink), noisy
    # Thin strokes never reach full ink, so the darkest of them say what that is. Below the floor
    # the levels are kept: they are the soft edges of letters.
    faintest = floor / SOLID
    full = max(np.percentile(found, 95), faintest)
    # Full ink is a matter of the neighborhood: beside black print a paragraph may be gray.
    darkest = in_cells(ink).max(2).astype(np.uint8)
    darkest = np.asarray(Image.fromarray(darkest).filter(ImageFilter.MaxFilter(3)), np.float32)
    full_here = np.where(darkest > floor, np.clip(darkest, faintest, full), full)
    full_here = per_pixel(full_here, gray.shape, Image.Resampling.BILINEAR)
    return np.minimum(ink / full_here, 1), noisy


def solid(levels, noisy):
    """The printed pixels, (height, width) bool."""
    printed = levels > SOLID
    cleaned = without_specks(printed)
    # On a clean page a single pixel may be a comma, but not in print of this size.
    return cleaned if noisy or rough_print(cleaned) >= SPECKLESS else printed


def without_specks(printed):
    """Drops printed pixels with fewer than two printed neighbors: noise, and no dot of an i."""
    height, width = printed.shape
    around = np.pad(printed.astype(np.int8), 1)
    neighbors = -printed.astype(np.int8)
    for dy in range(3):
        for dx in range(3):
            neighbors += around[dy:dy + height, dx:dx + width]
    return printed & (neighbors >= 2)


def long_strokes(printed, length):
    """The pixels of horizontal strokes of at least `length` px, (height, width) bool."""
    height, width = printed.shape
    if length > width:
        return np.zeros_like(printed)
    counts = np.cumsum(np.pad(printed, ((0, 0), (1, 0))), axis=1, dtype=np.int32)
    whole = counts[:, length:] - counts[:, :-length] == length  # a stroke begins at this pixel
    # Back from beginnings to strokes: a pixel belongs to one if one began up to length - 1 before.
    begun = np.cumsum(np.pad(whole, ((0, 0), (1, length - 1))), axis=1, dtype=np.int32)
    before = np.pad(begun, ((0, 0), (length, 0)))[:, :begun.shape[1]]
    return (begun - before)[:, 1:] > 0


def strokes_of_rules(dark, printed, print_px):
    """The pixels of strokes across the page that are no letters, (height, width) bool."""
    # On a soft scan the letters of a word meet at their feet, in gray; and larger print has stems
    # that are long, but thick.
    long = long_strokes(dark, math.ceil(RULE * print_px))
    too_thick = max(THIN, round(0.5 * print_px)) + 1
    thin = long & ~long_strokes(np.ascontiguousarray(long.T), too_thick).T
    return thin | long_strokes(printed, math.ceil(LONGEST_WORD * print_px))


def rules_of(levels, printed, print_px):
    """Rules, underlines and frames, with the soft pixels beside them, (height, width) bool."""
    dark = printed & (levels > DARK)
    across = strokes_of_rules(dark, printed, print_px)
    down = strokes_of_rules(np.ascontiguousarray(dark.T), np.ascontiguousarray(printed.T),
                            print_px).T
    found = across | down
    if found.any():
        thicker = np.asarray(Image.fromarray(found).convert("L").filter(ImageFilter.MaxFilter(3)))
        found = thicker > 0
    return found


def upright_rules(printed):
    """The pixels of long thin strokes down the page, (height, width) bool: the rules of a table."""
    long = long_strokes(np.ascontiguousarray(printed.T), LONG_RULE).T
    return long & ~long_strokes(long, THIN + 1)


def flat_rules(printed):
    """The pixels of long thin strokes across the page: the rules of a table or of a form."""
    long = long_strokes(printed, LONG_RULE)
    return long & ~long_strokes(np.ascontiguousarray(long.T), THIN + 1).T


def rough_print(printed):
    """About the size of the print in px, which is enough to tell a gutter from a space; 0 = none"""
    # A rule from top to bottom in every strip would make the whole page one line, and one across
    # has as much ink in its strip as several lines of text.
    printed = printed & ~upright_rules(printed) & ~flat_rules(printed)
    # In strips a few letters wide, neither skew nor a second column closes the gaps between lines.
    height, width = printed.shape
    step = max(CELL, width // 16)
    heights = []
    weights = []
    for left in range(0, width, step):
        rows = printed[:, left:left + step].sum(1)
        for top, bottom in runs(rows > 0):
            heights.append(bottom - top)
            # As its ink is: dots and dot leaders count for little, a picture no more than print.
            weights.append(float(rows[top:bottom].mean()) * min(bottom - top, CELL))
    if not heights:
        return 0.0
    # Strips without a b or a p are as high as an x, and those are the lower ones.
    return weighted_quantile(heights, weights, 0.65)


def skew_of(printed):
    """Degrees by which the lines of print fall to the right; 0 where that is not clear."""
    ys, xs = np.nonzero(printed)
    if len(ys) < 50 or np.ptp(xs) < 4 * CELL:
        return 0.0
    stride = max(1, len(ys) // SAMPLED)
    ys = ys[::stride]
    xs = xs[::stride]
    # Each half of the page for itself: the lines of two columns need not be level with each
    # other, and would then look sharpest at some other angle.
    half = 2 * xs // printed.shape[1]

    def sharpness(degrees):
        # Level lines gather their ink in few rows, so the sum of squares is largest.
        rows = np.rint(ys - xs * math.tan(math.radians(degrees))).astype(np.int64)
        counts = np.bincount(2 * (rows - rows.min()) + half)
        return float((counts.astype(np.float64) ** 2).sum())

    coarse = np.arange(-STEEPEST, STEEPEST + 0.01, 0.25)
    best = max(coarse, key=sharpness)
    fine = np.arange(best - 0.2, best + 0.21, 0.05)
    best = float(max(fine, key=sharpness))
    clearly_better = sharpness(best) > 1.02 * sharpness(0)
    return best if clearly_better and abs(best) > SLIGHTEST else 0.0


def ink_of(image):
    """The Ink of a PIL image."""
    image = to_rgb(image).convert("L")
    reduced = 1
    while image.width * image.height / reduced ** 2 > LARGEST:
        reduced *= 2
    if reduced > 1:
        image = image.reduce(reduced)

    gray = np.asarray(image, dtype=np.float32)
    # A strip of a pixel or two may be millions long: filled up to cells it would be 16 times as
    # much, and every row a line to the rules.
    if min(gray.shape) < NARROWEST:
        return Ink(np.zeros_like(gray), np.zeros(gray.shape, bool), reduced, 0.0)
    levels, noisy = ink_levels(gray)
    degrees = skew_of(solid(levels, noisy))
    if degrees:
        # Of the ink and not of the picture: what comes in from outside is paper then.
        turned = Image.fromarray(levels).rotate(degrees, Image.Resampling.BICUBIC)
        levels = np.asarray(turned).clip(0, 1)

    printed = solid(levels, noisy)
    print_px = rough_print(printed)
    if print_px:
        rules = rules_of(levels, printed, print_px)
        printed = printed & ~rules
        levels = np.where(rules, 0, levels)
    return Ink(levels, printed, reduced, degrees)


# -----------------------------------------------------------------------------
# Columns

def trimmed(printed, box):
    """The Box of the ink inside a box, None without any."""
    part = printed[box.top:box.bottom, box.left:box.right]
    rows = np.flatnonzero(part.any(1))
    columns = np.flatnonzero(part.any(0))
    if not len(rows):
        return None
    return Box(box.left + int(columns[0]), box.top + int(rows[0]),
               box.left + int(columns[-1]) + 1, box.top + int(rows[-1]) + 1)


def gutter_in(empty, print_px):
    """(left, right) of the widest stretch of paper between two columns, None without any."""
    inked = np.flatnonzero(~empty)
    best = None
    for left, right in runs(empty):
        is_inside = inked[0] < left and right < inked[-1]
        if is_inside and right - left >= GUTTER * print_px:
            if best is None or right - left > best[1] - best[0]:
                best = (left, right)
    return best


def is_prose(printed, box, print_px):
    """Whether a part beside a gutter is a column of text, and not the cells of a table."""
    part = trimmed(printed, box)
    if part is None or part.width < COLUMN * print_px or part.height < 3 * print_px:
        return False
    widths = []
    for top, bottom in runs(printed[part.top:part.bottom, part.left:part.right].any(1)):
        inked = np.flatnonzero(printed[part.top + top:part.top + bottom,
                                       part.left:part.right].any(0))
        widths.append(inked[-1] + 1 - inked[0])
    return len(widths) >= 3 and np.median(widths) > 0.6 * part.width


def is_picture(printed, box, print_px):
    """Whether most of a part beside a gutter is one stretch of ink that is too high for a line."""
    part = trimmed(printed, box)
    if part is None:
        return False
    heights = [bottom - top for top, bottom
               in runs(printed[part.top:part.bottom, part.left:part.right].any(1))]
    return max(heights) > max(TALLEST * print_px, 0.5 * part.height)


def text_beside_a_picture(printed, left, right, print_px, notes):
    """Of the parts beside a gutter the text, where the other is a picture (noted); or None."""
    for text, other in ((left, right), (right, left)):
        if is_picture(printed, other, print_px) and is_prose(printed, text, print_px):
            note_picture(trimmed(printed, other), notes)
            return text
    return None


def note_picture(box, notes):
    notes.append(f"a picture of {box.width}x{box.height} px at {box.left}, {box.top} is left out: "
                 f"that is no line of print")


def alike(empty, other, print_px):
    """Whether two bands, by the pixel columns empty in each, share a gutter or both have none."""
    if gutter_in(empty & other, print_px):
        return True
    return not gutter_in(empty, print_px) and not gutter_in(other, print_px)


def bands_of(part, print_px):
    """
    [(top, bottom, which columns of pixels are empty), ...] from top to bottom: rows of print that
    share a gutter, or have none, taken together. A title across the page ends a band.
    """
    bands = []
    for top, bottom in runs(part.any(1)):
        empty = ~part[top:bottom].any(0)
        if bands and alike(bands[-1][2], empty, print_px):
            top = bands[-1][0]
            empty = bands[-1][2] & empty
            bands.pop()
        bands.append((top, bottom, empty))
    return bands


def columns_of(printed, box, print_px, notes):
    """
    list of Boxes in reading order: columns where a gutter divides the print, or else the lines
    above and below them. Adds a note where a gap runs through lines that are not columns.
    """
    box = trimmed(printed, box)
    if box is None:
        return []
    part = printed[box.top:box.bottom, box.left:box.right]

    boxes = []
    for top, bottom, empty in bands_of(part, print_px):
        whole = Box(box.left, box.top + top, box.right, box.top + bottom)
        gutter = gutter_in(empty, print_px)
        if gutter and whole.height > 4 * print_px:
            left = whole._replace(right=box.left + gutter[0])
            right = whole._replace(left=box.left + gutter[1])
            if is_prose(printed, left, print_px) and is_prose(printed, right, print_px):
                boxes += columns_of(printed, left, print_px, notes)
                boxes += columns_of(printed, right, print_px, notes)
                continue
            text = text_beside_a_picture(printed, left, right, print_px, notes)
            if text is not None:
                boxes += columns_of(printed, text, print_px, notes)
                continue
            if whole.height > 8 * print_px:  # and no chance of two or three lines
                notes.append(f"rows {whole.top} to {whole.bottom} px have a gap from top to bottom "
                             f"but do not look like columns of prose: they are read across")
        # Bands that no gutter divides are one column, or a short line would be one of its own.
        if boxes and boxes[-1].left == whole.left and boxes[-1].right == whole.right:
            boxes[-1] = boxes[-1]._replace(bottom=whole.bottom)
        else:
            boxes.append(whole)
    return boxes


# -----------------------------------------------------------------------------
# Lines

def split_rows(profile, print_px):
    """
    [(top, bottom), ...] of the lines in a stretch of rows without a gap, whose descenders and
    ascenders meet. profile: ink in each row, (height,).
    """
    # Of a rough size: it lies between the height of an x and that of a line, half as much again.
    if len(profile) < 1.9 * print_px:
        return [(0, len(profile))]
    bodies = bodies_in(profile, print_px)
    # A single body that is higher than the print of the page is a line of larger print.
    if len(bodies) == 1 and print_px > GRAIN:
        print_px = max(print_px, 1.4 * (bodies[0][1] - bodies[0][0]))
    cuts = []
    first = bodies[0][0]
    if first > 0.9 * print_px:  # more than ascenders: a short line, of little ink, stands above
        cuts.append(quietest(profile, round(first - 0.45 * print_px), first))
    for above, below in zip(bodies, bodies[1:]):
        cuts.append(quietest(profile, above[1], below[0]))
    last = bodies[-1][1]
    if len(profile) - last > 0.8 * print_px:  # more than descenders: or below
        cuts.append(quietest(profile, last, round(last + 0.45 * print_px)))
    edges = [0, *cuts, len(profile)]
    return list(zip(edges, edges[1:]))


def bodies_in(profile, print_px):
    """[(top, bottom), ...] of the rows in which the lines of a profile have their body."""
    # The body, the height of an x, has the most ink: ascenders and descenders are few.
    bodies = []
    peaks = []  # most ink in a row of each, kept because a body may grow by thousands of runs
    for top, bottom in runs(profile > 0.35 * profile.max()):
        own_peak = profile[top:bottom].max()
        if bodies:
            previous = bodies[-1]
            valley = profile[previous[1]:top].min()
            peak = min(peaks[-1], own_peak)
            # An x has more ink at its edges than in its middle, and large print at the top of its
            # capitals, too. But only between lines there is hardly any.
            if valley > 0.25 * peak or top - previous[0] < 1.1 * print_px:
                bodies[-1] = (previous[0], bottom)
                peaks[-1] = max(peaks[-1], own_peak)
                continue
        bodies.append((top, bottom))
        peaks.append(own_peak)
    return bodies


def quietest(profile, start, end):
    """
    The row from `start` to `end` - 1 with the least ink, the middle one of equals; `start` where
    rounding has left no row between the two, as it does in print of a pixel or two.
    """
    rows = profile[start:max(end, start + 1)]
    least = np.flatnonzero(rows == rows.min())
    return start + int(least[len(least) // 2])


def rows_of_print(printed, column, print_px):
    """list of Boxes of the lines of a column, from top to bottom; no row of ink is left out."""
    part = printed[column.top:column.bottom, column.left:column.right]
    profile = part.sum(1)
    stretches = []
    for top, bottom in runs(profile > 0):
        for start, end in split_rows(profile[top:bottom], print_px):
            stretches.append((top + start, top + end))

    # The dots of a line of "in", an accent or a dash of its own go to the line that is nearer.
    merged = []
    dot_above = False  # whether the last of `merged` is a dot that belongs to the line below it
    for k, (top, bottom) in enumerate(stretches):
        above = top - merged[-1][1] if merged else math.inf
        below = stretches[k + 1][0] - bottom if k + 1 < len(stretches) else math.inf
        is_dot = bottom - top < DOT * print_px
        joins_above = is_dot and above <= below and above < DOT * print_px
        if dot_above or joins_above:
            merged[-1] = (merged[-1][0], bottom)
            dot_above = False
        else:
            merged.append((top, bottom))
            dot_above = is_dot and below < above and below < DOT * print_px

    boxes = []
    for top, bottom in merged:
        row = Box(column.left, column.top + top, column.right, column.top + bottom)
        box = trimmed(printed, row)
        if box is not None:
            boxes.append(box)
    return boxes


def baseline_of(levels, box):
    """y of the first row below the letters of a line, descenders not counted."""
    profile = levels[box.top:box.bottom, box.left:box.right].sum(1)
    drops = profile - np.append(profile[1:], 0)
    # In the lower half: the top of an x is an edge too, but there the ink grows.
    half = len(profile) // 2
    return box.top + half + int(np.argmax(drops[half:])) + 1


def is_other_print(own, usual):
    """Whether a line is of another print than the usual one, a title for example."""
    # Measured on one line alone, a size is uncertain: without a capital, b or d it looks smaller.
    return not 0.65 < own / usual < 1.35


def lines_of_column(ink, column, number, rough, notes):
    """list of the Lines of a column."""
    boxes = []
    for box in rows_of_print(ink.printed, column, rough):
        if box.height > TALLEST * rough:
            note_picture(box, notes)
        else:
            boxes.append(box)
    if not boxes:
        return []

    baselines = [baseline_of(ink.levels, box) for box in boxes]
    sizes = []
    for box, baseline in zip(boxes, baselines):
        sizes.append((baseline - box.top) / ASCENT)
    usual = weighted_quantile(sizes, [box.width for box in boxes], 0.5)
    # Screens of dots and grain would be a hundred thousand words, enlarged until they fill windows.
    if usual < GRAIN:
        notes.append(f"{len(boxes)} rows of ink from {boxes[0].top} to {boxes[-1].bottom} px are "
                     f"left out: about {usual:.1f} px high, they are a screen of dots or too small "
                     f"to be read")
        return []

    lines = []
    for box, baseline, own in zip(boxes, baselines, sizes):
        print_px = own if is_other_print(own, usual) else usual
        lines.append(Line(box, baseline, print_px, number))
    mark_paragraphs(lines)
    find_words(ink, lines)
    return lines


def pitch_of(lines):
    """Usual distance of the baselines of Lines in px; 0 for a single line."""
    steps = [below.baseline - above.baseline for above, below in zip(lines, lines[1:])]
    return float(np.median(steps)) if steps else 0.0


def mark_paragraphs(lines):
    """Sets `opens` of the lines that a blank line, or print of another size, sets apart."""
    pitch = pitch_of(lines)
    # Where half of the lines are paragraphs of their own, the median is the distance of those.
    if lines:
        pitch = min(pitch, 1.6 * lines[0].print_px)
    for above, below in zip(lines, lines[1:]):
        step = below.baseline - above.baseline
        other_print = is_other_print(below.print_px, above.print_px)
        below.opens = bool(step > 1.35 * pitch) or other_print


# -----------------------------------------------------------------------------
# Words

def border_of_gaps(gaps):
    """In em: wider gaps are between words, others between letters. gaps: all of a column, in em."""
    gaps = np.sort(gaps[gaps < TAB])
    if not len(gaps):
        return WORD_GAP[1]
    borders = np.linspace(*WORD_GAP, 36)
    scores = []
    # Otsu's rule: the border that leaves two groups whose means are furthest apart.
    for border in borders:
        n = int(np.searchsorted(gaps, border))
        score = 0.0
        if 0 < n < len(gaps):
            apart = gaps[n:].mean() - gaps[:n].mean()
            score = n * (len(gaps) - n) * apart ** 2
        scores.append(score)
    # Every border between the same two gaps has the same score: the middle one is safest.
    best = borders[np.array(scores) >= max(scores) * 0.9999]
    return float(best[len(best) // 2])


def stretches_of_words(printed, lines):
    """For each Line its words, [(left, right), ...]: ink that no gap between words divides."""
    strokes_of = []
    gaps = []
    for line in lines:
        box = line.box
        strokes = runs(printed[box.top:box.bottom, box.left:box.right].any(0))
        strokes_of.append(strokes)
        for (_, end), (start, _) in zip(strokes, strokes[1:]):
            gaps.append((start - end) / line.print_px)
    border = border_of_gaps(np.array(gaps)) if gaps else 0

    words_of = []
    for line, strokes in zip(lines, strokes_of):
        words = []
        for start, end in strokes:
            left = line.box.left + start
            right = line.box.left + end
            if words and left - words[-1][1] <= border * line.print_px:
                words[-1] = (words[-1][0], right)
            else:
                words.append((left, right))
        words_of.append(words)
    return words_of


def usual_space(lines, words_of):
    """The usual space between two words of a column, in em."""
    spaces = []
    for line, words in zip(lines, words_of):
        for (_, end), (start, _) in zip(words, words[1:]):
            spaces.append((start - end) / line.print_px)
    spaces = [space for space in spaces if space < TAB]
    return float(np.median(spaces)) if spaces else SPACE


def find_words(ink, lines):
    """
    Sets the words of the Lines of a column. A word has half of the space between it and the next:
    so what is too faint to count as print stays with its word, and any two words may be printed
    side by side.
    """
    height, width = ink.printed.shape
    words_of = stretches_of_words(ink.printed, lines)
    space = usual_space(lines, words_of)
    for k, (line, words) in enumerate(zip(lines, words_of)):
        half = space * line.print_px / 2
        above = lines[k - 1].box.bottom if k > 0 else 0
        below = lines[k + 1].box.top if k + 1 < len(lines) else height
        for j, (left, right) in enumerate(words):
            before = left - words[j - 1][1] if j > 0 else 2 * left
            after = words[j + 1][0] - right if j + 1 < len(words) else 2 * (width - right)
            padded_left = left - math.floor(min(half, before / 2))
            padded_right = right + math.ceil(min(half, after / 2))
            levels = ink.levels[:, padded_left:padded_right]
            top = row_border(levels, line.box.top, above, line.print_px)
            bottom = row_border(levels, line.box.bottom, below, line.print_px)
            line.words.append(Box(padded_left, top, padded_right, bottom))


def row_border(levels, edge, neighbor, print_px):
    """
    y at which a word is cut off from the line above or below it. levels: ink of the word's columns,
    over the whole height; edge: of its own line; neighbor: the edge of the other line, y as well.
    """
    if abs(neighbor - edge) >= 1:
        # Soft edges belong to it, as far as they are not the other line's.
        reach = min(REACH * print_px, abs(neighbor - edge) / 2)
        return edge + round(math.copysign(reach, neighbor - edge))
    # The lines touch, but seldom in the columns of this very word: there, paper may go around the
    # descender of the one or the ascender of the other.
    around = round(DESCENT * print_px)
    start = max(0, edge - around)
    # Only of the rows in question: of all rows, each word would cost as much as the page is high.
    profile = levels[start:edge + around + 1].sum(1)
    free = start + np.flatnonzero(profile < SOLID)
    if not len(free):
        return edge
    return int(free[np.argmin(np.abs(free - edge))])


# -----------------------------------------------------------------------------

def find_lines(ink):
    """-> (Lines in reading order, list of notes on what a rule could not decide)."""
    rough = rough_print(ink.printed)
    if not rough:
        return [], []
    height, width = ink.printed.shape
    notes = []
    lines = []
    columns = columns_of(ink.printed, Box(0, 0, width, height), rough, notes)
    for number, column in enumerate(columns):
        lines += lines_of_column(ink, column, number, rough, notes)
    return lines, notes
