"""The curve of a training: loss on its batches, and on validation pairs with and without BPS."""
import numpy as np

from measure.plots import COLORS, GREY, LIGHT, Sheet, spread

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 110, 20, 34      # room around the lines, in pixels
LINES = {"train_loss": ("training", GREY), "val_base": ("frozen base", COLORS[1]),
         "val_steered": ("validation", COLORS[3])}
TICKS = 4


def draw_curve(rows, file):
    """Write the losses of a log's rows over their steps as PNG."""
    steps = np.array([row["step"] for row in rows], float)
    losses = {key: np.array([row[key] for row in rows], float) for key in LINES}
    low, high = min(map(np.min, losses.values())), max(map(np.max, losses.values()))
    margin = 0.05 * (high - low) or 0.05
    low, high = low - margin, high + margin
    right = WIDTH - RIGHT

    def pixels(x, y):
        """[(x, y)] in the picture of steps and losses."""
        across = LEFT + np.asarray(x) / steps[-1] * (right - LEFT)
        down = HEIGHT - BOTTOM - (np.asarray(y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return [tuple(point) for point in np.stack([across, down], axis=-1)]

    sheet = Sheet(WIDTH, HEIGHT)
    for tick in np.linspace(low + margin, high - margin, TICKS):
        ends = pixels([0, steps[-1]], [tick, tick])
        sheet.line(ends, LIGHT)
        sheet.text(ends[0][0] - 4, ends[0][1], f"{tick:.4f}", 11, "rm")
    for tick in np.linspace(0, steps[-1], TICKS):
        x, _ = pixels([tick], [low])[0]
        sheet.text(x, HEIGHT - 14, f"{tick:.0f}", 11, "mm")
    points = {key: pixels(steps, losses[key]) for key in LINES}
    heights = spread([line[-1][1] for line in points.values()], 13)
    for (key, (name, color)), height in zip(LINES.items(), heights):
        sheet.line(points[key], color, 2)
        for x, y in points[key]:
            sheet.disc(x, y, 2, color)
        sheet.text(points[key][-1][0] + 8, height, name, 11, "lm", color)
    sheet.save(file)
