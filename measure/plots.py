"""Draws figures with Pillow: a sheet to draw on, and panels of dots, arrows, lines and bars."""
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from weights import replacing

SIDE, TOP, EDGE, NAMES = 300, 34, 42, 64        # pixels of a panel, and of its title and names
GAP = 16                                        # pixels between panels
ZOOM = 3                                        # figures are drawn larger, then scaled down
MAX_TICKS = 8                                   # of a horizontal axis
MARGIN = 0.04                                   # share of it before its first and after its last
PLANE = 2.6                                     # a plane is drawn over [-2.6, 2.6] squared
COLORS = ("#d1495b", "#e28413", "#2a9d5c", "#2f6fb5", "#7b4fa3", "#444444", "#1fa2b0")
LIGHT, GREY = "#d5d8dd", "#777777"
BAND_ALPHA = 50                                 # opacity, 0 to 255


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
    """A picture drawn ZOOM times as large as it will be; all is given in final pixels."""

    def __init__(self, width, height, left=0, top=0):
        """left, top: the pixel that has the coordinates (0, 0)."""
        self.size, self.left, self.top = (width, height), left, top
        self.image = Image.new("RGB", (width * ZOOM, height * ZOOM), "white")
        self.pen = ImageDraw.Draw(self.image, "RGBA")

    def zoomed(self, points):
        """Points [(x, y)] of the enlarged picture."""
        return [((self.left + x) * ZOOM, (self.top + y) * ZOOM) for x, y in points]

    def line(self, points, color, width=1):
        """Draw a line through points [(x, y)]."""
        self.pen.line(self.zoomed(points), color, width * ZOOM)

    def polygon(self, points, color):
        """Fill the polygon of points."""
        self.pen.polygon(self.zoomed(points), color)

    def rectangle(self, corners, fill=None, outline=None):
        """Draw the rectangle of its upper left and lower right corner."""
        self.pen.rectangle(self.zoomed(corners), fill, outline, ZOOM)

    def discs(self, points, radius, color):
        """Draw a disc around each of the points."""
        for point in self.zoomed(points):
            self.pen.circle(point, radius * ZOOM, color)

    def text(self, x, y, text, size, anchor, color=GREY):
        """Write a text with Pillow's anchor at (x, y)."""
        self.pen.text(self.zoomed([(x, y)])[0], text, color, ImageFont.load_default(size * ZOOM),
                      anchor)

    def save(self, file):
        """Write the picture as PNG at its own size."""
        with replacing(file) as temporary:
            self.image.resize(self.size, Image.Resampling.LANCZOS).quantize(128).save(
                temporary, optimize=True)


class Line(NamedTuple):
    """Values (n,) and the edges of their band (2, n) over x (n,)."""
    x: np.ndarray
    y: np.ndarray
    band: np.ndarray
    name: str
    color: str


class Axes:
    """One panel. Lines are collected, and drawn when the range of all is known."""

    def __init__(self, title):
        self.lines, self.limits, self.log_y = [], None, False
        self.sheet = Sheet(SIDE + GAP, SIDE + TOP + GAP // 2, GAP // 2, TOP)
        self.sheet.text(SIDE / 2, -TOP / 2, title, 15, "mm", "black")

    def dots(self, clouds):
        """Draw {color: points (n, 2) in the plane}; a color is a number or "light"."""
        for color, points in clouds.items():
            points = np.asarray(points)
            inside = points[np.abs(points).max(1) < PLANE]
            self.sheet.discs(in_plane(inside), 0.9, LIGHT if color == "light" else COLORS[color])
        self.sheet.rectangle([(0, 0), (SIDE, SIDE)], outline=LIGHT)

    def arrows(self, points, vectors):
        """Draw vectors (n, 2) at points (n, 2) in the plane."""
        points, vectors = np.asarray(points), np.asarray(vectors)
        for (x, y), (tip_x, tip_y) in zip(in_plane(points), in_plane(points + vectors)):
            turn, head = math.atan2(tip_y - y, tip_x - x), math.hypot(tip_x - x, tip_y - y) / 2
            barbs = [(tip_x - min(4, head) * math.cos(turn + side),
                      tip_y - min(4, head) * math.sin(turn + side)) for side in (-0.45, 0.45)]
            self.sheet.line([(x, y), (tip_x, tip_y)], COLORS[3])
            self.sheet.polygon([(tip_x, tip_y), *barbs], COLORS[3])

    def bars(self, labels, values, errors):
        """Draw a horizontal bar, its error and its value for each label."""
        values, errors = np.asarray(values), np.asarray(errors)
        name_width, height = 84, SIDE / len(values)
        scale = (SIDE - name_width - 44) / (values + errors).max()
        for i, (value, error) in enumerate(zip(values, errors * scale)):
            y, tip = (i + 0.5) * height, name_width + max(value, 0) * scale
            self.sheet.text(name_width - 6, y, labels[i], 12, "rm", "black")
            self.sheet.rectangle([(name_width, y - height / 3), (tip, y + height / 3)], COLORS[1])
            self.sheet.line([(tip - error, y), (tip + error, y)], "black")
            self.sheet.text(tip + error + 4, y, f"{value:.2f}", 11, "lm")

    def line(self, x, y, name, log_y=False, band=0.0, color=None):
        """Add a line with a band around it; x is logarithmic unless it starts at 0.

        color: an index of COLORS; the default is the number of lines before this one.
        """
        color = COLORS[len(self.lines) if color is None else color]
        y = np.asarray(y, float)
        edges = y + np.multiply.outer((-1, 1), np.broadcast_to(band, y.shape))
        self.lines.append(Line(np.asarray(x), y, edges, name, color))
        self.log_y = log_y

    def range(self):
        """The least and the greatest value of its lines and bands."""
        bands = np.concatenate([line.band.ravel() for line in self.lines])
        return bands.min(), bands.max()

    def draw_lines(self):
        """Draw the lines with ticks at their points, and their names at their ends.

        A logarithmic axis starts at 1e-4 or above; smaller and negative values are drawn at 1e-4.
        Another one starts at 0, unless all values are in the upper half of the panel.
        """
        ticks = np.unique(np.concatenate([line.x for line in self.lines]))
        to_x = np.log10 if ticks[0] > 0 else np.asarray
        to_y = (lambda y: np.log10(np.maximum(y, 1e-4))) if self.log_y else np.asarray
        low, high = to_y(self.limits or self.range())
        if not (self.log_y or high / 2 < low < high):
            low = min(low, 0.0)
        step = 1.0 if self.log_y else round_step(high - low)
        levels = step * np.arange(np.floor(low / step), np.ceil(high / step) + 1)
        low, high = levels[[0, -1]]
        left, right = to_x(ticks[[0, -1]])
        margin = MARGIN * (right - left) or 1.0
        left, right = left - margin, right + margin

        def to_panel(x, y):
            """[(x, y)] in pixels of the panel; values on a logarithmic axis are logarithms."""
            across = EDGE + (x - left) / (right - left) * (SIDE - EDGE - NAMES)
            down = SIDE - 20 - (y - low) / (high - low) * (SIDE - 30)
            return list(zip(*np.broadcast_arrays(across, down)))

        for level in levels:
            ends = to_panel(np.array([left, right]), level)
            self.sheet.line(ends, LIGHT)
            label = f"{10.0**level if self.log_y else level:.3g}"
            self.sheet.text(EDGE - 4, ends[0][1], label, 11, "rm")
        ticks = ticks[::math.ceil(len(ticks) / MAX_TICKS)]
        for (x, _), tick in zip(to_panel(to_x(ticks), low), ticks):
            self.sheet.text(x, SIDE - 8, f"{tick:g}", 11, "mm")
        for line in self.lines:
            points = to_panel(to_x(line.x), to_y(line.y))
            lower, upper = (to_panel(to_x(line.x), to_y(edge)) for edge in line.band)
            self.sheet.polygon(lower + upper[::-1], (*ImageColor.getrgb(line.color), BAND_ALPHA))
            self.sheet.line(points, line.color, 2)
            self.sheet.discs(points, 3, line.color)
        ends = to_panel(right, to_y([line.y[-1] for line in self.lines]))
        for line, height in zip(self.lines, spread([y for _, y in ends], 12)):
            self.sheet.text(ends[0][0] + 4, height, line.name, 11, "lm", line.color)


def in_plane(points):
    """Pixels (n, 2) of a panel for points in the plane, y upwards."""
    return (np.array([1, -1]) * points / (2 * PLANE) + 0.5) * SIDE


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
        self.draw().save(file)
        print(file)

    def draw(self):
        """The sheet with all panels."""
        width, height = self.axes[0].sheet.size
        sheet = Sheet(self.columns * width, math.ceil(len(self.axes) / self.columns) * height)
        for i, axes in enumerate(self.axes):
            if axes.lines:
                axes.draw_lines()
            row, column = divmod(i, self.columns)
            sheet.image.paste(axes.sheet.image, (column * width * ZOOM, row * height * ZOOM))
        return sheet
