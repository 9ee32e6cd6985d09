"""Figures of dots, arrows, lines and bars with Pillow: what the studies draw, and no more."""
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, TOP, EDGE, NAMES = 300, 34, 42, 64        # of one panel, and the room for names, in pixels
ZOOM = 3                                        # it is drawn so much larger, then made small
COLORS = ("#d1495b", "#e28413", "#2a9d5c", "#2f6fb5", "#7b4fa3", "#444444")
LIGHT, GREY = "#d5d8dd", "#777777"
GREYS = dict(light=LIGHT, dark="#555555")


class Axes:
    """One panel: collects what is drawn, and draws it once its range is known."""

    def __init__(self):
        self.title, self.layers = "", []

    def dots(self, points, color):
        """Adds points (n, 2) of the plane; color is a number, "light" or "dark"."""
        self.layers.append(("dots", np.asarray(points), color))

    def arrows(self, points, vectors):
        """Adds vectors (n, 2) at points (n, 2), both in the plane's units."""
        self.layers.append(("arrows", np.asarray(points), np.asarray(vectors)))

    def line(self, x, y, name, log_y=False):
        """Adds a line; x is logarithmic unless it starts at 0."""
        self.layers.append(("line", np.asarray(x), np.asarray(y), name, log_y))

    def bars(self, labels, values, errors):
        """Adds a horizontal bar for each label, with its error."""
        self.layers.append(("bars", labels, np.asarray(values), np.asarray(errors)))

    def paint(self, pen, left, top):
        """Draws everything with its upper left corner there."""
        self.pen, self.left, self.top = pen, left, top
        self.text(SIDE / 2, -TOP / 2, self.title, 15, "mm", "black")
        kinds = {layer[0] for layer in self.layers}
        if "line" in kinds:
            self.paint_lines()
        elif "bars" in kinds:
            self.paint_bars()
        else:
            self.paint_plane()

    def text(self, x, y, words, size, anchor, color=GREY):
        """Writes words at panel coordinates in pixels."""
        self.pen.text(((self.left + x) * ZOOM, (self.top + y) * ZOOM), words, color,
                      ImageFont.load_default(size * ZOOM), anchor)

    def at(self, xy):
        """Returns pixel pairs of panel coordinates (n, 2)."""
        return [((self.left + x) * ZOOM, (self.top + y) * ZOOM) for x, y in xy]

    def paint_plane(self):
        """Draws dots and arrows over [-2.6, 2.6] squared, y upwards."""
        def to_panel(points):
            """Returns panel coordinates of points of the plane."""
            return (np.array([1, -1]) * points / 5.2 + 0.5) * SIDE

        for kind, points, extra in self.layers:
            points = points[np.abs(points).max(1) < 2.6] if kind == "dots" else points
            if kind == "dots":
                for x, y in self.at(to_panel(points)):
                    r = 0.9 * ZOOM
                    color = GREYS.get(extra) or COLORS[extra]
                    self.pen.ellipse((x - r, y - r, x + r, y + r), color)
                continue
            for tail, tip in zip(self.at(to_panel(points)), self.at(to_panel(points + extra))):
                self.arrow(tail, tip)
        self.pen.rectangle(self.at([(0, 0), (SIDE, SIDE)]), outline=LIGHT, width=ZOOM)

    def arrow(self, tail, tip):
        """Draws an arrow between two pixel pairs."""
        self.pen.line([tail, tip], COLORS[3], ZOOM)
        turn = math.atan2(tip[1] - tail[1], tip[0] - tail[0])
        head = min(4 * ZOOM, 0.5 * math.dist(tail, tip))
        self.pen.polygon([tip, *((tip[0] - head * math.cos(turn + side),
                                  tip[1] - head * math.sin(turn + side))
                                 for side in (-0.45, 0.45))], COLORS[3])

    def paint_lines(self):
        """Draws lines with ticks at their points, and their names at their ends.

        A logarithmic axis starts at 1e-4 at the lowest; what is below, or negative, is drawn there.
        """
        _, ticks, _, _, log_y = self.layers[0]
        x = np.log10(ticks) if ticks[0] > 0 else ticks
        values = np.stack([layer[2] for layer in self.layers])              # (lines, points)
        values = np.log10(np.maximum(values, 1e-4)) if log_y else values
        low, high = (np.floor(values.min()), np.ceil(values.max())) if log_y else (0.0, 1.0)

        def to_panel(x, y):
            """Returns panel coordinates of numbers on the axes."""
            x = EDGE + (x - x_low) / (x_high - x_low) * (SIDE - EDGE - NAMES)
            return np.stack([x, SIDE - 20 - (y - low) / (high - low) * (SIDE - 30)], axis=-1)

        x_low, x_high = x[0] - 0.1, x[-1] + 0.1
        for tick in np.arange(low, high + 1e-6, 1.0 if log_y else 0.25):
            ends = to_panel(np.array([x_low, x_high]), np.full(2, tick))
            self.pen.line(self.at(ends), LIGHT, ZOOM)
            name = f"{10.0**tick:g}" if log_y else f"{tick:g}"
            self.text(EDGE - 4, ends[0][1], name, 11, "rm")
        for tick, value in zip(x, ticks):
            self.text(to_panel(tick, low)[0], SIDE - 8, f"{value:g}", 11, "mm")
        for i, y in enumerate(values):
            points = self.at(to_panel(x, y))
            self.pen.line(points, COLORS[i], 2 * ZOOM)
            for px, py in points:
                self.pen.ellipse((px - 3 * ZOOM, py - 3 * ZOOM, px + 3 * ZOOM, py + 3 * ZOOM),
                                 COLORS[i])
        ends = to_panel(np.full(len(values), x_high), values[:, -1])        # (lines, 2)
        free = 0.0
        for i in ends[:, 1].argsort():                          # from the top, none on another
            free = max(ends[i, 1], free)
            self.text(ends[i, 0] + 4, free, self.layers[i][3], 11, "lm", COLORS[i])
            free += 12

    def paint_bars(self):
        """Draws a bar, its error and its value for each label."""
        _, labels, values, errors = self.layers[0]
        name_width, height = 84, SIDE / len(values)
        scale = (SIDE - name_width - 44) / (values + errors).max()
        for i, (value, error) in enumerate(zip(values, errors)):
            y = (i + 0.5) * height
            self.text(name_width - 6, y, labels[i], 12, "rm", "black")
            tip = name_width + max(value, 0) * scale
            self.pen.rectangle(self.at([(name_width, y - height / 3), (tip, y + height / 3)]),
                               COLORS[3])
            self.pen.line(self.at([(tip - error * scale, y), (tip + error * scale, y)]), "black",
                          ZOOM)
            self.text(tip + error * scale + 4, y, f"{value:.2f}", 11, "lm")


class Figure:
    """Rows and columns of Axes, from left to right and from top to bottom in `axes`."""

    def __init__(self, rows, columns):
        self.rows, self.columns = rows, columns
        self.axes = [Axes() for _ in range(rows * columns)]

    def save(self, file):
        """Writes the figure as PNG and prints its path."""
        wide, high = self.columns * (SIDE + 16) + 16, self.rows * (SIDE + TOP) + 16
        sheet = Image.new("RGB", (wide * ZOOM, high * ZOOM), "white")
        pen = ImageDraw.Draw(sheet)
        for i, axes in enumerate(self.axes):
            row, column = divmod(i, self.columns)
            axes.paint(pen, 16 + column * (SIDE + 16), TOP + row * (SIDE + TOP))
        sheet = sheet.resize((wide, high), Image.Resampling.LANCZOS)
        temporary = file.with_suffix(".tmp.png")
        sheet.quantize(128).save(temporary, optimize=True)
        temporary.replace(file)
        print(file)
