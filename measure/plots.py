"""Draws figures of dots, arrows, lines and bars with Pillow, as the studies in the plane need."""
import math

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from weights import replacing

SIDE, TOP, EDGE, NAMES = 300, 34, 42, 64        # pixels of a panel, and of its title and names
GAP = 16                                        # pixels between panels
ZOOM = 3                                        # figures are drawn larger, then scaled down
COLORS = ("#d1495b", "#e28413", "#2a9d5c", "#2f6fb5", "#7b4fa3", "#444444")
LIGHT, GREY = "#d5d8dd", "#777777"
BAND_ALPHA = 50                                 # opacity, 0 to 255
GREYS = dict(light=LIGHT, dark="#555555")


def round_step(extent):
    """Returns a round number that goes three to eight times into an extent."""
    unit = 10.0 ** math.floor(math.log10(extent))
    return next(unit * share for share in (0.2, 0.5, 1, 2) if extent / unit <= 8 * share)


class Axes:
    """One panel: collects layers, and draws them when the range of all is known."""

    def __init__(self, title):
        self.title, self.layers, self.limits = title, [], None

    def dots(self, clouds):
        """Adds {color: points (n, 2) in the plane}; a color is a number, "light" or "dark"."""
        self.layers += [("dots", np.asarray(points), color) for color, points in clouds.items()]

    def arrows(self, points, vectors):
        """Adds vectors (n, 2) at points (n, 2) in the plane."""
        self.layers.append(("arrows", np.asarray(points), np.asarray(vectors)))

    def line(self, x, y, name, log_y=False, band=0.0):
        """Adds a line with a band around it; x is logarithmic unless it starts at 0."""
        y = np.asarray(y, float)
        self.layers.append(("line", np.asarray(x), y, name, log_y, y + np.multiply.outer(
            (-1, 1), np.broadcast_to(band, y.shape))))

    def range(self):
        """Returns the least and the greatest value of its lines and bands."""
        bands = np.concatenate([layer[5].ravel() for layer in self.layers])
        return bands.min(), bands.max()

    def bars(self, labels, values, errors):
        """Adds a horizontal bar for each label, with its error."""
        self.layers.append(("bars", labels, np.asarray(values), np.asarray(errors)))

    def paint(self, pen, left, top):
        """Draws the panel with its upper left corner at (left, top)."""
        self.pen, self.left, self.top = pen, left, top
        self.text(SIDE / 2, -TOP / 2, self.title, 15, "mm", "black")
        paint = dict(line=self.paint_lines, bars=self.paint_bars)
        paint.get(self.layers[0][0], self.paint_plane)()

    def text(self, x, y, words, size, anchor, color=GREY):
        """Writes words at (x, y), in pixels of the panel."""
        self.pen.text(self.at([(x, y)])[0], words, color, ImageFont.load_default(size * ZOOM),
                      anchor)

    def at(self, xy):
        """Returns [(x, y)] in the enlarged figure for pixels xy (n, 2) of the panel."""
        return [((self.left + x) * ZOOM, (self.top + y) * ZOOM) for x, y in xy]

    def discs(self, xy, radius, color):
        """Draws a disc at each of the pixels xy (n, 2) of the panel."""
        r = radius * ZOOM
        for x, y in self.at(xy):
            self.pen.ellipse((x - r, y - r, x + r, y + r), color)

    def paint_plane(self):
        """Draws dots and arrows over [-2.6, 2.6] squared, y upwards."""
        def to_panel(points):
            """Returns pixels (n, 2) of the panel for points in the plane."""
            return (np.array([1, -1]) * points / 5.2 + 0.5) * SIDE

        for kind, points, extra in self.layers:
            if kind == "dots":
                inside = points[np.abs(points).max(1) < 2.6]
                self.discs(to_panel(inside), 0.9, GREYS.get(extra) or COLORS[extra])
            else:
                for ends in zip(self.at(to_panel(points)), self.at(to_panel(points + extra))):
                    self.arrow(*ends)
        self.pen.rectangle(self.at([(0, 0), (SIDE, SIDE)]), outline=LIGHT, width=ZOOM)

    def arrow(self, tail, tip):
        """Draws an arrow between two points of the enlarged figure."""
        self.pen.line([tail, tip], COLORS[3], ZOOM)
        turn = math.atan2(tip[1] - tail[1], tip[0] - tail[0])
        head = min(4 * ZOOM, 0.5 * math.dist(tail, tip))
        self.pen.polygon([tip, *((tip[0] - head * math.cos(turn + side),
                                  tip[1] - head * math.sin(turn + side))
                                 for side in (-0.45, 0.45))], COLORS[3])

    def paint_lines(self):
        """Draws lines with ticks at their points, and their names at their ends.

        A logarithmic axis starts at 1e-4 or above; smaller and negative values are drawn at 1e-4.
        """
        ticks = np.unique(np.concatenate([layer[1] for layer in self.layers]))
        log_x, log_y = ticks[0] > 0, self.layers[0][4]
        to_x = np.log10 if log_x else np.asarray
        x = to_x(ticks)
        scaled = (lambda y: np.log10(np.maximum(y, 1e-4))) if log_y else np.asarray
        low, high = scaled(self.limits or self.range())
        if log_y:
            low, high, step = np.floor(low), np.ceil(high), 1.0
        else:
            step = round_step(high - min(low, 0.0))
            low, high = step * np.floor(min(low, 0.0) / step), step * np.ceil(high / step)
        x_low, x_high = x[0] - 0.1, x[-1] + 0.1

        def to_panel(x, y):
            """Returns pixels (.., 2) of the panel for values on the axes."""
            x = EDGE + (x - x_low) / (x_high - x_low) * (SIDE - EDGE - NAMES)
            return np.stack([x, SIDE - 20 - (y - low) / (high - low) * (SIDE - 30)], axis=-1)

        for tick in np.arange(low, high + step / 2, step):
            ends = to_panel(np.array([x_low, x_high]), np.full(2, tick))
            self.pen.line(self.at(ends), LIGHT, ZOOM)
            self.text(EDGE - 4, ends[0][1], f"{10.0**tick if log_y else tick:.3g}", 11, "rm")
        for tick, value in zip(x, ticks):
            self.text(to_panel(tick, low)[0], SIDE - 8, f"{value:g}", 11, "mm")
        for (_, x, y, _, _, band), color in zip(self.layers, COLORS):
            x = to_x(x)
            lower, upper = (self.at(to_panel(x, edge)) for edge in scaled(band))
            self.pen.polygon(lower + upper[::-1], (*ImageColor.getrgb(color), BAND_ALPHA))
            self.pen.line(self.at(to_panel(x, scaled(y))), color, 2 * ZOOM)
            self.discs(to_panel(x, scaled(y)), 3, color)
        last = scaled([layer[2][-1] for layer in self.layers])
        ends = to_panel(np.full(len(last), x_high), last)                   # (lines, 2)
        lowest = 0.0
        for i in ends[:, 1].argsort():                          # from the top, so none overlap
            lowest = max(ends[i, 1], lowest)
            self.text(ends[i, 0] + 4, lowest, self.layers[i][3], 11, "lm", COLORS[i])
            lowest += 12

    def paint_bars(self):
        """Draws a bar, its error and its value for each label."""
        _, labels, values, errors = self.layers[0]
        name_width, height = 84, SIDE / len(values)
        scale = (SIDE - name_width - 44) / (values + errors).max()
        for i, (value, error) in enumerate(zip(values, errors)):
            y = (i + 0.5) * height
            self.text(name_width - 6, y, labels[i], 12, "rm", "black")
            tip, error = name_width + max(value, 0) * scale, error * scale
            self.pen.rectangle(self.at([(name_width, y - height / 3), (tip, y + height / 3)]),
                               COLORS[3])
            self.pen.line(self.at([(tip - error, y), (tip + error, y)]), "black", ZOOM)
            self.text(tip + error + 4, y, f"{value:.2f}", 11, "lm")


class Figure:
    """Panels in columns: `axes` holds one for each title, from left to right, then downwards."""

    def __init__(self, columns, titles):
        self.columns = columns
        self.axes = [Axes(title) for title in titles]

    def share_limits(self, panels):
        """Gives the panels of lines, indices of `axes`, the same range."""
        ranges = [self.axes[i].range() for i in panels]
        for i in panels:
            self.axes[i].limits = min(low for low, _ in ranges), max(high for _, high in ranges)

    def save(self, file):
        """Writes the figure as PNG and prints its path."""
        rows = math.ceil(len(self.axes) / self.columns)
        width, height = self.columns * (SIDE + GAP) + GAP, rows * (SIDE + TOP) + GAP
        sheet = Image.new("RGB", (width * ZOOM, height * ZOOM), "white")
        pen = ImageDraw.Draw(sheet, "RGBA")
        for i, axes in enumerate(self.axes):
            row, column = divmod(i, self.columns)
            axes.paint(pen, GAP + column * (SIDE + GAP), TOP + row * (SIDE + TOP))
        sheet = sheet.resize((width, height), Image.Resampling.LANCZOS)
        with replacing(file) as temporary:
            sheet.quantize(128).save(temporary, optimize=True)
        print(file)
