"""Draws figures with Pillow: a sheet to draw on, and panels of dots, arrows, lines and bars."""
import math
from typing import NamedTuple

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
    """A round number that goes three to eight times into an extent."""
    unit = 10.0 ** math.floor(math.log10(extent))
    return next(unit * share for share in (0.2, 0.5, 1, 2) if extent / unit <= 8 * share)


def spread(heights, gap):
    """Heights (n,) moved downwards, from the top on, so that a gap lies between any two."""
    result, free = np.array(heights, float), -math.inf
    for i in result.argsort():
        result[i] = max(result[i], free)
        free = result[i] + gap
    return result


class Sheet:
    """A picture that is drawn ZOOM times as large as it will be; all is given in final pixels."""

    def __init__(self, width, height):
        self.size = width, height
        self.image = Image.new("RGB", (width * ZOOM, height * ZOOM), "white")
        self.pen = ImageDraw.Draw(self.image, "RGBA")

    def line(self, points, color, width=1):
        """Draw a line through points [(x, y)]."""
        self.pen.line(self.zoomed(points), color, width * ZOOM)

    def polygon(self, points, color):
        """Fill the polygon of points."""
        self.pen.polygon(self.zoomed(points), color)

    def rectangle(self, corners, fill=None, outline=None):
        """Draw the rectangle of its upper left and lower right corner."""
        self.pen.rectangle(self.zoomed(corners), fill, outline, ZOOM)

    def disc(self, x, y, radius, color):
        """Draw a disc around (x, y)."""
        self.pen.ellipse(self.zoomed([(x - radius, y - radius), (x + radius, y + radius)]), color)

    def text(self, x, y, words, size, anchor, color=GREY):
        """Write words with Pillow's anchor at (x, y)."""
        self.pen.text((x * ZOOM, y * ZOOM), words, color, ImageFont.load_default(size * ZOOM),
                      anchor)

    def zoomed(self, points):
        """Points of the enlarged picture."""
        return [(x * ZOOM, y * ZOOM) for x, y in points]

    def save(self, file):
        """Write the picture as PNG at its own size."""
        with replacing(file) as temporary:
            self.image.resize(self.size, Image.Resampling.LANCZOS).quantize(128).save(
                temporary, optimize=True)


class Line(NamedTuple):
    """A layer of Axes: values (n,) and the edges of their band (2, n) over x (n,)."""
    x: np.ndarray
    y: np.ndarray
    band: np.ndarray
    name: str
    log_y: bool
    color: str


class Axes:
    """One panel: collects layers, and draws them when the range of all is known."""

    def __init__(self, title):
        self.title, self.layers, self.limits = title, [], None

    def dots(self, clouds):
        """Add {color: points (n, 2) in the plane}; a color is a number, "light" or "dark"."""
        self.layers += [("dots", np.asarray(points), color) for color, points in clouds.items()]

    def arrows(self, points, vectors):
        """Add vectors (n, 2) at points (n, 2) in the plane."""
        self.layers.append(("arrows", np.asarray(points), np.asarray(vectors)))

    def line(self, x, y, name, log_y=False, band=0.0, color=None):
        """Add a line with a band around it; x is logarithmic unless it starts at 0.

        color: an index of COLORS; the default is the number of lines before this one.
        """
        color = len(self.layers) if color is None else color
        y = np.asarray(y, float)
        edges = y + np.multiply.outer((-1, 1), np.broadcast_to(band, y.shape))
        self.layers.append(Line(np.asarray(x), y, edges, name, log_y, COLORS[color]))

    def range(self):
        """The least and the greatest value of its lines and bands."""
        bands = np.concatenate([line.band.ravel() for line in self.layers])
        return bands.min(), bands.max()

    def bars(self, labels, values, errors):
        """Add a horizontal bar for each label, with its error."""
        self.layers.append(("bars", labels, np.asarray(values), np.asarray(errors)))

    def paint(self, sheet, left, top):
        """Draw the panel with its upper left corner at (left, top)."""
        self.sheet, self.left, self.top = sheet, left, top
        self.text(SIDE / 2, -TOP / 2, self.title, 15, "mm", "black")
        if isinstance(self.layers[0], Line):
            self.paint_lines()
        elif self.layers[0][0] == "bars":
            self.paint_bars()
        else:
            self.paint_plane()

    def at(self, xy):
        """[(x, y)] in the sheet for pixels xy (n, 2) of the panel."""
        return [(self.left + x, self.top + y) for x, y in xy]

    def text(self, x, y, words, size, anchor, color=GREY):
        """Write words at (x, y), in pixels of the panel."""
        self.sheet.text(self.left + x, self.top + y, words, size, anchor, color)

    def discs(self, xy, radius, color):
        """Draw a disc at each of the pixels xy (n, 2) of the panel."""
        for x, y in self.at(xy):
            self.sheet.disc(x, y, radius, color)

    def paint_plane(self):
        """Draw dots and arrows over [-2.6, 2.6] squared, y upwards."""
        def to_panel(points):
            """Pixels (n, 2) of the panel for points in the plane."""
            return (np.array([1, -1]) * points / 5.2 + 0.5) * SIDE

        for kind, points, extra in self.layers:
            if kind == "dots":
                inside = points[np.abs(points).max(1) < 2.6]
                self.discs(to_panel(inside), 0.9, GREYS.get(extra) or COLORS[extra])
            else:
                for ends in zip(self.at(to_panel(points)), self.at(to_panel(points + extra))):
                    self.arrow(*ends)
        self.sheet.rectangle(self.at([(0, 0), (SIDE, SIDE)]), outline=LIGHT)

    def arrow(self, tail, tip):
        """Draw an arrow between two points of the sheet."""
        self.sheet.line([tail, tip], COLORS[3])
        turn = math.atan2(tip[1] - tail[1], tip[0] - tail[0])
        head = min(4, 0.5 * math.dist(tail, tip))
        self.sheet.polygon([tip, *((tip[0] - head * math.cos(turn + side),
                                    tip[1] - head * math.sin(turn + side))
                                   for side in (-0.45, 0.45))], COLORS[3])

    def paint_lines(self):
        """Draw lines with ticks at their points, and their names at their ends.

        A logarithmic axis starts at 1e-4 or above; smaller and negative values are drawn at 1e-4.
        """
        ticks = np.unique(np.concatenate([line.x for line in self.layers]))
        log_x, log_y = ticks[0] > 0, self.layers[0].log_y
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
            """Pixels (.., 2) of the panel for values on the axes."""
            x = EDGE + (x - x_low) / (x_high - x_low) * (SIDE - EDGE - NAMES)
            return np.stack([x, SIDE - 20 - (y - low) / (high - low) * (SIDE - 30)], axis=-1)

        for tick in np.arange(low, high + step / 2, step):
            ends = to_panel(np.array([x_low, x_high]), np.full(2, tick))
            self.sheet.line(self.at(ends), LIGHT)
            self.text(EDGE - 4, ends[0][1], f"{10.0**tick if log_y else tick:.3g}", 11, "rm")
        for tick, value in zip(x, ticks):
            self.text(to_panel(tick, low)[0], SIDE - 8, f"{value:g}", 11, "mm")
        for line in self.layers:
            color, x = line.color, to_x(line.x)
            lower, upper = (self.at(to_panel(x, edge)) for edge in scaled(line.band))
            self.sheet.polygon(lower + upper[::-1], (*ImageColor.getrgb(color), BAND_ALPHA))
            self.sheet.line(self.at(to_panel(x, scaled(line.y))), color, 2)
            self.discs(to_panel(x, scaled(line.y)), 3, color)
        last = scaled([line.y[-1] for line in self.layers])
        ends = to_panel(np.full(len(last), x_high), last)                   # (lines, 2)
        for line, end, height in zip(self.layers, ends, spread(ends[:, 1], 12)):
            self.text(end[0] + 4, height, line.name, 11, "lm", line.color)

    def paint_bars(self):
        """Draw a bar, its error and its value for each label."""
        _, labels, values, errors = self.layers[0]
        name_width, height = 84, SIDE / len(values)
        scale = (SIDE - name_width - 44) / (values + errors).max()
        for i, (value, error) in enumerate(zip(values, errors)):
            y = (i + 0.5) * height
            self.text(name_width - 6, y, labels[i], 12, "rm", "black")
            tip, error = name_width + max(value, 0) * scale, error * scale
            self.sheet.rectangle(self.at([(name_width, y - height / 3), (tip, y + height / 3)]),
                                 COLORS[1])
            self.sheet.line(self.at([(tip - error, y), (tip + error, y)]), "black")
            self.text(tip + error + 4, y, f"{value:.2f}", 11, "lm")


class Figure:
    """Panels in columns: `axes` holds one for each title, from left to right, then downwards."""

    def __init__(self, columns, titles):
        self.columns = columns
        self.axes = [Axes(title) for title in titles]

    def share_limits(self, panels):
        """Give the panels of lines, indices of `axes`, the same range."""
        ranges = [self.axes[i].range() for i in panels]
        for i in panels:
            self.axes[i].limits = min(low for low, _ in ranges), max(high for _, high in ranges)

    def save(self, file):
        """Write the figure as PNG and print its path."""
        rows = math.ceil(len(self.axes) / self.columns)
        sheet = Sheet(self.columns * (SIDE + GAP) + GAP, rows * (SIDE + TOP) + GAP)
        for i, axes in enumerate(self.axes):
            row, column = divmod(i, self.columns)
            axes.paint(sheet, GAP + column * (SIDE + GAP), TOP + row * (SIDE + TOP))
        sheet.save(file)
        print(file)
