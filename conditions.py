"""Pictures and conditions: how they are read, what BPS is shown of them, what is read from them.

Shapes: B batch, C channels, H W rows and columns of the image.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

LINE_CONTRAST = 0.1             # slope of x per pixel from which an edge counts as a line
PIXELS_AT_A_TIME = 48 * 64**2   # through a network outside of training: 48 pictures of 64 px


class DataError(ValueError):
    """Pairs or an image that cannot be used; the message is one line for the user."""


# ---- images --------------------------------------------------------------------------------

def open_image(file):
    """Returns a PIL image, upright, of mode RGB, with transparent parts white.

    Errors: DataError where the file cannot be read as an image.
    """
    if not Path(file).is_file():
        raise DataError(f"{file}: no such file")
    try:
        image = Image.open(file)
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be read as an image ({error}); allowed are PNG, JPEG, "
                        f"WebP and BMP") from None
    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image):
    """Returns the image in mode RGB: 16-bit greys scaled to 8 bits, transparency over white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        values = values / 257 if values.max() > 255 else values
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_x(image):
    """Returns x (3, H, W) float in [-1, 1] of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_image(x):
    """Returns the RGB image of x (3, H, W) in [-1, 1]; values outside are clipped."""
    array = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def crop_square(image, size):
    """Returns the image scaled until its shorter side is `size`, its middle cut out square."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def images_at_a_time(size):
    """Returns how many pictures of `size` px go through a network at a time; 1 from 512 px on."""
    return max(1, PIXELS_AT_A_TIME // size**2)


# ---- line drawings -------------------------------------------------------------------------

def border_grey(image):
    """Returns the median grey, 0 to 255, of an RGB drawing's outermost pixels: its ground."""
    grey = np.asarray(image.convert("L"))
    return float(np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])))


def is_light_on_dark(image):
    """Returns whether an RGB drawing has a dark ground."""
    return border_grey(image) < 128


def sketch_to_cond(image):
    """Returns cond (1, H, W) float in [0, 1] of a dark-on-light RGB drawing: 1 is ink, 0 paper."""
    ink = 1 - np.asarray(image.convert("L"), np.float32) / 255
    return torch.from_numpy(ink)[None]


def read_drawing(file, width, height):
    """Returns (cond (1, height, width), drawing as used) of any drawing a user may have.

    It is fitted into that many pixels with paper around it; a light-on-dark one is inverted; paper
    that is not white becomes white; lines that have become faint by shrinking are brought back to
    full ink. Errors: DataError where the file is no image or holds no drawing.
    """
    image = open_image(file)
    if is_light_on_dark(image):
        image = ImageOps.invert(image)
    # grey or yellowed paper is paper: what is as light as the border becomes white
    paper = max(border_grey(image), 1)
    image = image.convert("L").point(lambda grey: min(255, round(grey * 255 / paper)))
    drawing = ImageOps.pad(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS,
                           color="white")
    cond = sketch_to_cond(drawing)
    if cond.max() < 0.1:
        raise DataError(f"{file}: no line in it; a drawing is dark on light or light on dark")
    cond = cond / cond.max()
    return cond, to_image((1 - 2 * cond).expand(3, -1, -1))


def extract_lines(x):
    """Returns where the lines of pictures are: (B, H, W) bool for x (B, 3, H, W) in [-1, 1].

    Canny's first steps (IEEE PAMI 8(6), 1986): the Sobel gradient of whichever colour channel
    changes most, kept where it is a maximum across the line and above LINE_CONTRAST.
    """
    B, C, H, W = x.shape
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack([sobel, sobel.T])[:, None]                           # (2, 1, 3, 3)
    padded = F.pad(x.float().cpu(), (1, 1, 1, 1), mode="replicate")
    padded = padded.reshape(B * C, 1, H + 2, W + 2)
    gradient = F.conv2d(padded, kernels).view(B, C, 2, H, W)
    magnitude, channel = gradient.norm(dim=2).max(dim=1)                       # (B, H, W)
    across = gradient.gather(1, channel[:, None, None].expand(B, 1, 2, H, W))[:, 0]
    octant = (torch.atan2(across[:, 1], across[:, 0]) / (torch.pi / 4)).round().long() % 4
    around = F.pad(magnitude, (1, 1, 1, 1))
    lines = torch.zeros_like(magnitude, dtype=torch.bool)
    for i, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        after = around[:, 1 + dy:1 + dy + H, 1 + dx:1 + dx + W]
        before = around[:, 1 - dy:1 - dy + H, 1 - dx:1 - dx + W]
        lines |= (octant == i) & (magnitude >= after) & (magnitude > before)
    return lines & (magnitude > LINE_CONTRAST)


def line_f1(found, wanted):
    """Returns the F1 score (B,) of lines found against lines wanted, (B, H, W) bool, 1 px apart."""
    def near(lines):
        return F.max_pool2d(lines.float(), 3, 1, 1) > 0

    precision = (found & near(wanted)).sum((1, 2)) / found.sum((1, 2)).clamp(min=1)
    recall = (wanted & near(found)).sum((1, 2)) / wanted.sum((1, 2)).clamp(min=1)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-9)
