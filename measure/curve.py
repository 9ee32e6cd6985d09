"""The curve of a training: loss on its batches, and on validation pairs with and without BPS."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from weights import replacing

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 110, 20, 34      # room around the lines, in pixels
ZOOM = 3                                        # it is drawn so much larger, then made small
LINES = {"train_loss": ("training", "#777777"), "val_base": ("frozen base", "#e28413"),
         "val_steered": ("validation", "#2f6fb5")}
TICKS = 4


def draw_curve(rows, file):
    """Writes the losses of a log's rows over their steps as PNG."""
    steps = np.array([row["step"] for row in rows], float)
    losses = {key: np.array([row[key] for row in rows], float) for key in LINES}
    low, high = min(map(np.min, losses.values())), max(map(np.max, losses.values()))
    margin = 0.05 * (high - low) or 0.05
    low, high = low - margin, high + margin
    right = WIDTH - RIGHT

    def pixels(x, y):
        """Returns [(x, y)] in the enlarged picture of steps and losses."""
        across = LEFT + np.asarray(x) / steps[-1] * (right - LEFT)
        down = HEIGHT - BOTTOM - (np.asarray(y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return [tuple(point) for point in ZOOM * np.stack([across, down], axis=-1)]

    sheet = Image.new("RGB", (WIDTH * ZOOM, HEIGHT * ZOOM), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11 * ZOOM)
    for tick in np.linspace(low + margin, high - margin, TICKS):
        ends = pixels([0, steps[-1]], [tick, tick])
        pen.line(ends, "#d5d8dd", ZOOM)
        pen.text((ends[0][0] - 4 * ZOOM, ends[0][1]), f"{tick:.4f}", "#777777", font, "rm")
    for tick in np.linspace(0, steps[-1], TICKS):
        x, _ = pixels([tick], [low])[0]
        pen.text((x, (HEIGHT - 14) * ZOOM), f"{tick:.0f}", "#777777", font, "mm")
    lowest_name = 0
    for key in sorted(LINES, key=lambda key: -losses[key][-1]):         # from the top downwards
        name, color = LINES[key]
        points = pixels(steps, losses[key])
        pen.line(points, color, 2 * ZOOM)
        for x, y in points:
            pen.ellipse((x - 2 * ZOOM, y - 2 * ZOOM, x + 2 * ZOOM, y + 2 * ZOOM), color)
        lowest_name = max(points[-1][1], lowest_name)
        pen.text((points[-1][0] + 8 * ZOOM, lowest_name), name, color, font, "lm")
        lowest_name += 13 * ZOOM
    with replacing(file) as temporary:
        sheet.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(temporary)
