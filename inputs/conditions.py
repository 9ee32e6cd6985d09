"""Pictures and conditions: how they are read, what BPS is shown of them, what is read from them.

| task | condition picture | channels that BPS is shown |
|---|---|---|
| sketch | line drawing | 1: ink |
| segmentation | label map, a palette PNG | 3: the classes' colours |
| layout | boxes filled with their class's colour | 3: the same |
| artistic | any picture in colours | 3 + 1: its colours, coarsely, and its lines |

Shapes: B batch, C channels, H W rows and columns of the image.
"""
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

LINE_CONTRAST = 0.1             # slope of x per pixel from which an edge counts as a line
FAINT, FULL_INK = 0.05, 0.25    # slopes from which a soft line is there, and is drawn in full
SMOOTHED = 256                  # pixels a side above which pictures are smoothed for soft lines
COLOUR_CELLS = 8                # of a colour reference, along the shorter side
MAX_CLASSES = 256               # what a palette holds
LOSSLESS = ("PNG", "BMP", "GIF")
PIXELS_AT_A_TIME = 48 * 64**2   # through a network outside of training: 48 pictures of 64 px


class UserError(ValueError):
    """Pairs or an image that cannot be used; the message is one line for the user."""


class Task(NamedTuple):
    """A kind of condition."""
    channels: int
    port_weights: str = "head-heavy"        # a name of bps.WEIGHTS, by default
    has_labels: bool = False                # its colours are classes, which nothing may blend
    has_lines: bool = False                 # which may be extracted where only images are there
    steps: int = 900                        # of training, by default


TASKS = {"sketch": Task(1, has_lines=True), "segmentation": Task(3, has_labels=True),
         "layout": Task(3, "flat", has_labels=True),
         "artistic": Task(4, has_lines=True, steps=300)}        # 40 pictures: more steps overfit


# ---- images --------------------------------------------------------------------------------

def load_image(file, name=None):
    """Returns a PIL image as it lies in a file: a path, or an open binary file called `name`.

    Errors: UserError where it is not there, cannot be read, or is too large to be meant.
    """
    name = name or file
    if isinstance(file, (str, Path)) and not Path(file).is_file():
        raise UserError(f"{file}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file)
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{name}: more than {Image.MAX_IMAGE_PIXELS:,} pixels, which may be meant "
                        f"to fill the memory; scale it down") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{name}: cannot be read as an image ({error}); allowed are PNG, JPEG, "
                        f"WebP and BMP") from None
    return image


def open_image(file, name=None):
    """Returns an image file's picture, upright, of mode RGB, with transparent parts white.

    Errors: UserError, as load_image has them.
    """
    return to_rgb(ImageOps.exif_transpose(load_image(file, name)))


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


def crop(image, width, height):
    """Returns the image scaled until it covers width x height, and cropped to its middle.

    Label maps, palette images, are not blended: Pillow takes the nearest pixel for mode P.
    """
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


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
    full ink. Errors: UserError where the file is no image or holds no drawing.
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
        raise UserError(f"{file}: no line in it; a drawing is dark on light or light on dark")
    cond = cond / cond.max()
    return cond, to_image((1 - 2 * cond).expand(3, -1, -1))


def edges(x):
    """Returns (slope, ridge), both (B, H, W), of pictures x (B, 3, H, W) in [-1, 1].

    Canny's first steps (IEEE PAMI 8(6), 1986): slope is the Sobel gradient of whichever colour
    channel changes most; ridge (bool) is where it is a maximum across the line.
    """
    B, C, H, W = x.shape
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack([sobel, sobel.T])[:, None]                           # (2, 1, 3, 3)
    padded = F.pad(x.float().cpu(), (1, 1, 1, 1), mode="replicate")
    padded = padded.reshape(B * C, 1, H + 2, W + 2)
    gradient = F.conv2d(padded, kernels).view(B, C, 2, H, W)
    slope, channel = gradient.norm(dim=2).max(dim=1)                           # (B, H, W)
    across = gradient.gather(1, channel[:, None, None].expand(B, 1, 2, H, W))[:, 0]
    octant = (torch.atan2(across[:, 1], across[:, 0]) / (torch.pi / 4)).round().long() % 4
    around = F.pad(slope, (1, 1, 1, 1))
    ridge = torch.zeros_like(slope, dtype=torch.bool)
    for i, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        after = around[:, 1 + dy:1 + dy + H, 1 + dx:1 + dx + W]
        before = around[:, 1 - dy:1 - dy + H, 1 - dx:1 - dx + W]
        ridge |= (octant == i) & (slope >= after) & (slope > before)
    return slope, ridge


def extract_lines(x):
    """Returns where the lines of pictures are: (B, H, W) bool for x (B, 3, H, W) in [-1, 1]."""
    slope, ridge = edges(x)
    return ridge & (slope > LINE_CONTRAST)


def soft_lines(x):
    """Returns the lines of pictures as ink (B, 1, H, W) in [0, 1], for x (B, 3, H, W) in [-1, 1].

    The steeper the edge, the more ink. Large pictures are smoothed first, so that their texture
    does not become lines; their slopes are then per pixel of the smaller picture that they are.
    """
    sigma = min(x.shape[-2:]) / SMOOTHED
    if sigma > 1:
        reach = torch.arange(-int(3 * sigma), int(3 * sigma) + 1, dtype=torch.float32)
        kernel = (-(reach / sigma) ** 2 / 2).softmax(0).expand(3, 1, 1, -1)
        edge = len(reach) // 2
        padded = F.pad(x.float().cpu(), (edge, edge, edge, edge), mode="replicate")
        x = F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    slope, ridge = edges(x)
    return (ridge * (slope * max(1, sigma) - FAINT) / (FULL_INK - FAINT)).clamp(0, 1)[:, None]


def line_f1(found, wanted):
    """Returns the F1 score (B,) of lines found against lines wanted, (B, H, W) bool, 1 px apart."""
    def near(lines):
        return F.max_pool2d(lines.float(), 3, 1, 1) > 0

    precision = (found & near(wanted)).sum((1, 2)) / found.sum((1, 2)).clamp(min=1)
    recall = (wanted & near(found)).sum((1, 2)) / wanted.sum((1, 2)).clamp(min=1)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-9)


# ---- label maps and colours ----------------------------------------------------------------

def open_label_map(file, name=None, any_colours=False):
    """Returns a label map as a palette image (mode P), whose colours are the classes.

    Grey ones of 8 bits hold class numbers; they get the palette of distinct_colours. any_colours:
    an image without a palette may be one too. Errors: UserError where classes cannot be told.
    """
    image, name = load_image(file, name), name or file
    if image.format not in LOSSLESS:
        raise UserError(f"{name}: a {image.format} file blurs where classes meet; save label maps "
                        f"as palette PNG")
    if image.mode == "L":
        image.putpalette(distinct_colours())
    if image.mode == "P":
        if len(class_colours(image)) < len(image.getcolors()):
            raise UserError(f"{name}: two of its classes have one colour, and BPS sees colours "
                            f"only; give each class its own")
        return image
    if not any_colours:
        raise UserError(f"{name}: mode {image.mode}, so its classes cannot be told from blends of "
                        f"them; save label maps as palette PNG (mode P) or as class numbers (L)")
    colours, index = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0,
                               return_inverse=True)
    if len(colours) > MAX_CLASSES:
        raise UserError(f"{name}: {len(colours):,} colours; a label map has one a class, at most "
                        f"{MAX_CLASSES}, without shades between")
    labels = Image.fromarray(index.reshape(image.height, image.width).astype(np.uint8))
    labels.putpalette(colours.astype(np.uint8).tobytes())
    return labels


def distinct_colours():
    """Returns 256 colours as bytes (768): class 0 black, no two alike.

    The bits of the number are dealt out to red, green and blue, highest first, as PASCAL VOC's
    palette does it.
    """
    numbers, colours = np.arange(MAX_CLASSES), np.zeros((MAX_CLASSES, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= ((numbers >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours.tobytes()


def class_colours(labels):
    """Returns {colour, as in "#1f77b4": palette index} of the classes that a palette image has."""
    palette = labels.getpalette("RGB") + [0] * 3 * MAX_CLASSES      # it may be cut short
    return {"#%02x%02x%02x" % tuple(palette[3 * i:3 * i + 3]): i for _, i in labels.getcolors()}


def coarse_colours(x):
    """Returns a colour reference (B, 3, H, W) in [0, 1] of pictures x (B, 3, H, W) in [-1, 1]:
    the mean colour of each of COLOUR_CELLS cells along the shorter side."""
    H, W = x.shape[-2:]
    cells = [max(1, round(COLOUR_CELLS * side / min(H, W))) for side in (H, W)]
    return F.interpolate(F.adaptive_avg_pool2d((x + 1) / 2, cells), (H, W), mode="nearest")


# ---- conditions ----------------------------------------------------------------------------

def to_cond(image, task, extract=False):
    """Returns cond (C, H, W) float in [0, 1] of a condition picture: what BPS is shown of it.

    extract: the picture is no drawing but an image whose lines are the condition.
    """
    if task == "sketch" and not extract:
        return sketch_to_cond(image)
    x = to_x(image.convert("RGB"))[None]
    if task == "sketch":
        return soft_lines(x)[0]
    if task == "artistic":
        return torch.cat([coarse_colours(x), soft_lines(x)], dim=1)[0]
    return (x[0] + 1) / 2


def cond_to_x(cond):
    """Returns a picture x (B, 3, H, W) in [-1, 1] to look at of conditions (B, C, H, W)."""
    colours, ink = cond[:, :-1], cond[:, -1:]
    if cond.shape[1] == 3:
        colours, ink = cond, torch.zeros_like(ink)
    if cond.shape[1] == 1:
        colours = torch.ones_like(ink)
    return (2 * colours * (1 - ink) - 1).expand(-1, 3, -1, -1)


def read_condition(file, task, width, height, classes=None):
    """Returns (cond (C, height, width), picture of it) of any file that a user may draw with.

    A drawing is fitted in, everything else covers the picture and is cropped. classes: {colour:
    name} that BPS was trained on. Errors: UserError names the file, and a class that is unknown.
    """
    if task == "sketch":
        return read_drawing(file, width, height)
    if TASKS[task].has_labels:
        image = open_label_map(file, any_colours=True)
        for colour, index in class_colours(image).items():
            if classes and colour not in classes:
                known = ", ".join(" ".join(entry).strip() for entry in classes.items())
                raise UserError(f"{file}: class {index}, {colour}, is unknown; this BPS was "
                                f"trained on {known}")
        image = crop(image, width, height)
    else:
        image = crop(open_image(file), width, height)
    cond = to_cond(image, task)
    return cond, to_image(cond_to_x(cond[None])[0])
