"""
Bar, line and pie charts with a question about them. All values are printed in the chart, and
differ, so that every question has one answer.
"""
import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

from tasks.fonts import MIN_PX, font
from tasks.words import draw_words

COLORS = (
    (20, 60, 130),
    (245, 170, 60),
    (60, 130, 60),
    (240, 215, 90),
    (150, 100, 190),
    (220, 70, 60),
)
GRID_COLOR = (200, 200, 200)
GRID_LINES = 5


@dataclass
class Chart:
    kind: str  # bar, line or pie
    name: str  # of what is shown
    labels: list  # of the categories, one a value
    values: list  # whole numbers, all different, to be multiplied by the unit
    unit: float

    def printed(self, k):
        """Value k as the chart prints it."""
        return f"{self.values[k] * self.unit:g}"


def draw_data(rng, width, split):
    """A Chart that has room on `width` px, in words of the split."""
    kind = rng.choice(("bar", "line", "pie"))
    n = rng.randint(2, max(2, min(6, width // 50)))
    longest = max(5, min(8, width // 16))  # letters: labels must not run into each other
    words = []
    while len(words) < n + 1:
        word, = draw_words(rng, split, 1, 1)
        if len(word) <= longest and word not in words:
            words.append(word)
    name = words[0]
    labels = words[1:]

    year = rng.randrange(1950, 2020)
    # Years run along an axis, but are no parts of a whole.
    if kind != "pie" and rng.random() < 0.4:
        labels = [str(year + k) for k in range(n)]
    unit = rng.choice((0.1, 1, 1, 10))
    values = rng.sample(range(5, 100), n)  # without replacement: one is the highest
    return Chart(kind, name, labels, values, unit)


# -----------------------------------------------------------------------------
# Picture


class Canvas:
    """A white picture to draw a chart on, with print whose size suits the number of values."""

    def __init__(self, chart, width, height):
        n = len(chart.values)
        # A pie's legend has a line for each value; elsewhere a slot on the axis holds 6.5 letters.
        if chart.kind == "pie":
            px = min(height / (n + 4), width / 18)
        else:
            px = min(height / 14, width / n / 6.5)
        self.px = max(MIN_PX, int(px))
        self.width = width
        self.height = height
        self.image = Image.new("RGB", (width, height), "white")
        self.draw = ImageDraw.Draw(self.image)

    def write(self, x, y, text, anchor):
        """Text at (x, y) px; anchor as in PIL."""
        # The white outline keeps it legible where it crosses a line or a bar.
        self.draw.text(
            (round(x), round(y)),
            text,
            "black",
            font("sans", self.px),
            anchor,
            stroke_width=self.px // 9,
            stroke_fill="white",
        )


def draw_pie(canvas, chart):
    """A pie on the left, a legend with the values on the right."""
    px = canvas.px
    side = min(canvas.height - 3 * px, canvas.width // 2 - px)
    left = px // 2
    top = 2 * px
    circle = (left, top, left + side, top + side)
    total = sum(chart.values)
    start = -90  # degrees: the top
    for k, (label, value) in enumerate(zip(chart.labels, chart.values)):
        stop = start + 360 * value / total
        canvas.draw.pieslice(circle, start, stop, COLORS[k], "white")
        start = stop

        # One line of the legend, with a swatch of half its height.
        y = (2.2 + 1.3 * k) * px
        swatch = (side + px, round(y), side + 1.5 * px, round(y + px / 2))
        canvas.draw.rectangle(swatch, COLORS[k])
        text = f"{label} {chart.printed(k)}"
        canvas.write(side + 2 * px, y + px / 4, text, "lm")


def draw_bars_or_line(canvas, chart):
    """Bars or a line over a grid, with the value above each point and its label under the axis."""
    px = canvas.px
    # Room for the numbers on the left, the name above and the labels below.
    left = 3.2 * px
    top = 3.2 * px
    bottom = canvas.height - 2 * px
    # Above the highest value, and such that every grid line has a short number.
    peak = 20 * math.ceil(max(chart.values) / 20)  # value of the top grid line
    for k in range(GRID_LINES):
        y = round(bottom - (bottom - top) * k / (GRID_LINES - 1))
        value = peak * chart.unit * k / (GRID_LINES - 1)
        canvas.draw.line((left, y, canvas.width, y), GRID_COLOR)
        canvas.write(left - px / 3, y, f"{value:g}", "rm")

    # A slot of the axis for each value, the point in its middle.
    slot = (canvas.width - left) / len(chart.values)
    points = []
    for k, value in enumerate(chart.values):
        x = left + slot * (k + 0.5)
        y = bottom - (bottom - top) * value / peak
        points.append((x, y))
    # The line comes before the numbers, which stay legible on top of it.
    if chart.kind == "line":
        canvas.draw.line(points, COLORS[0], max(1, px // 6))

    for k, (x, y) in enumerate(points):
        if chart.kind == "bar":
            half = slot * 0.35  # of the width of a bar
            bar = (round(x - half), round(y), round(x + half), round(bottom))
            canvas.draw.rectangle(bar, COLORS[0])
        canvas.write(x, y - px / 6, chart.printed(k), "mb")
        canvas.write(x, bottom + px / 3, chart.labels[k], "mt")


# -----------------------------------------------------------------------------
# Questions


def ask(rng, chart):
    """-> (question, short answer in ChartQA's form)."""
    n = len(chart.labels)
    a, b = rng.sample(range(n), 2)
    name = chart.name
    label_a = chart.labels[a]
    label_b = chart.labels[b]
    values = chart.values
    highest = chart.labels[values.index(max(values))]
    lowest = chart.labels[values.index(min(values))]
    difference = abs(values[a] - values[b]) * chart.unit
    # Answers are numbers as printed, or labels: relaxed accuracy compares either.
    questions = (
        (f"What is the value of {name} in {label_a}?", chart.printed(a)),
        (f"Which category has the highest value of {name}?", highest),
        (f"Which category has the lowest value of {name}?", lowest),
        (
            f"What is the difference between {label_a} and {label_b} in {name}?",
            f"{difference:g}",
        ),
        ("How many categories are there in the chart?", str(n)),
    )
    return rng.choice(questions)


def draw_chart(rng, width, height, split):
    """-> (PIL "RGB" picture of width x height px, question, short answer)."""
    chart = draw_data(rng, width, split)
    canvas = Canvas(chart, width, height)
    canvas.write(width / 2, canvas.px, chart.name, "mm")
    if chart.kind == "pie":
        draw_pie(canvas, chart)
    else:
        draw_bars_or_line(canvas, chart)
    question, answer = ask(rng, chart)
    return canvas.image, question, answer
