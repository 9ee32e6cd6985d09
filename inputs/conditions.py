"""Read images and conditions, and turn them into what BPS sees.

| task | condition picture | channels that BPS sees |
|---|---|---|
| sketch | line drawing | 1: ink |
| segmentation | label map, a palette PNG | 3: the colours of the classes |
| layout | boxes in the colours of their classes | 3: the same |
| artistic | any colour picture | 3 + 1: its coarse colours and its lines |

Shapes: B batch, C channels, H W rows and columns of the image.
"""
import contextlib
import functools
import warnings
from collections import Counter
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

from inputs.files import check_file
from weights import UserError, as_user_error

# Pillow starts another program for some other formats: Ghostscript for PostScript
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
LOSSLESS = ("PNG", "BMP", "GIF", "TIFF")
LINE_CONTRAST = 0.1             # slope of x per pixel from which an edge counts as a line
FAINT, FULL_INK = 0.05, 0.25    # slopes at which a soft line begins, and reaches full ink
FAINTEST_INK = 0.1              # least contrast of a condition that is not blank
UNIFORM = 0.97                  # share of one tone in a line of pixels that is frame or margin
HIDDEN_INK = 2                  # contrast on black relative to white from which black is used
RARE_LIGHT = 0.3                # a drawing with dark sides and fewer light pixels is chalk
SMALLEST_SHEET = 0.1            # share of light pixels in a photo of a sheet on a dark desk
SHEET_FIT = 0.65                # how well light pixels fill a quadrilateral (IoU) that is a sheet
LARGE_SHEET = 0.45              # share of light pixels in a picture that need no shades
LEAST_SHADE = 1                 # of 255: between the darker and the lighter part of a real sheet
SMOOTHED = 256                  # side in pixels above which pictures are smoothed for soft lines
COLOUR_CELLS = 8                # cells of a colour reference along the shorter side
MAX_CLASSES = 256               # entries of a palette
INSIDE_NUMBERS = (1, 255)       # the inside of grey masks; 0 is outside
LARGEST_TEXT = 1 << 28          # bytes of text or colour profile in a PNG
LABELS_NOTE = ("drawings look like label maps: palette images in colour. For label maps use --task "
               "segmentation.")
PIXELS_AT_A_TIME = 48 * 64**2   # of a batch outside of training: 48 pictures of 64 px


# ---- images --------------------------------------------------------------------------------

@contextlib.contextmanager
def naming_file(file):
    """Turn any error that Pillow raises for a file into a UserError that names it."""
    bombs = Image.DecompressionBombError, Image.DecompressionBombWarning
    # Exception, because each decoder has its own errors
    with as_user_error(Exception, f"{file} can't be read as an image",
                       f"Save it as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}."), \
            as_user_error(bombs, f"{file} must have at most {Image.MAX_IMAGE_PIXELS:,} pixels",
                          "Scale it down, because it could fill the memory."):
        yield


def load_image(file):
    """The PIL image in a file, upright. Nothing else opens a user's pictures."""
    check_file(file)
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = LARGEST_TEXT
    with naming_file(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=FORMATS) as image:
            image.verify()                  # the checksums of a PNG, which load() ignores
        with Image.open(file, formats=FORMATS) as image:
            image.load()
            with contextlib.suppress(Exception):        # odd EXIF, which viewers ignore
                ImageOps.exif_transpose(image, in_place=True)
            return image


def to_8_bits(image):
    """Greys (H, W) uint8 of an image of whole numbers up to 65535, or of floats in [0, 1]."""
    values = np.asarray(image, np.float64)
    white = 65535 if values.max() > 255 else 255 if image.mode != "F" or values.max() > 1 else 1
    if not 0 <= values.min() <= values.max() <= white or white > 1 and (values % 1).any():
        raise ValueError("its values must be in 0..1, or whole numbers in 0..65535")
    return (values * (255 / white)).round().astype(np.uint8)


def to_rgb(image, ground="white"):
    """The image in mode RGB: greys scaled to 8 bits, transparency over a ground."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(to_8_bits(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
    return image.convert("RGB")


def open_image(file, convert=to_rgb):
    """The RGB image in a file, upright, with transparent parts white."""
    image = load_image(file)
    with naming_file(file):
        return convert(image)


def to_x(image):
    """x (3, H, W) float in [-1, 1] of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_image(x):
    """The RGB image of x (3, H, W) in [-1, 1]; values outside are clipped."""
    array = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def crop(image, width, height):
    """The image scaled until it covers width x height, and cropped to its middle.

    Label maps, which are palette images, are not blended: Pillow takes the nearest pixel.
    """
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def read_mask(file, width, height, factor):
    """Mask (1, 1, height / factor, width / factor) in [0, 1] of an image file: 1 is white.

    It covers the picture, width x height, and is cropped like it. Transparent parts are black. A
    mask that steers nowhere is refused; class numbers 0 and 1 look black, too.
    """
    tones = open_image(file, functools.partial(to_rgb, ground="black")).convert("L")
    tones = ImageOps.fit(tones, (width // factor, height // factor), Image.Resampling.BOX)
    lightest = tones.getextrema()[1]
    if lightest <= 1:
        raise UserError(f"{file}: mask is black where the picture is (maximum {lightest} of 255), "
                        f"so it steers nowhere. White means steer: save it with values 0 and 255.")
    return torch.from_numpy(np.asarray(tones, np.float32) / 255)[None, None]


def images_at_a_time(size):
    """Number of pictures of `size` px that go through a network at a time; 1 from 512 px on."""
    return max(1, PIXELS_AT_A_TIME // size**2)


# ---- line drawings -------------------------------------------------------------------------

def side_shares(dark):
    """Share of dark pixels in the top, right, bottom and left line of (H, W) bool."""
    return [np.rot90(dark, turns)[0].mean() for turns in range(4)]


def side_tones(dark):
    """For each of the four sides True if its line is dark, False if light, None if mixed."""
    return [share > 0.5 if max(share, 1 - share) >= UNIFORM else None
            for share in side_shares(dark)]


def layer_tone(dark):
    """True if all four sides of (H, W) bool are dark, False if light, None if mixed.

    One side may be mixed, where a drawing touches it, if other tones are rare.
    """
    tones = side_tones(dark)
    tone = max(tones, key=tones.count)
    needed = 3 if (dark != tone).mean() < RARE_LIGHT else 4
    return tone if tones.count(tone) >= needed else None


def peel(grey, middle, tones):
    """The inside of (H, W) without the uniform lines at its sides; darker than `middle` is dark."""
    for tone in tones:
        if tone is not None and grey.size:
            differs = ((grey < middle) == tone).mean(axis=1) < UNIFORM
            grey = grey[differs.argmax():] if differs.any() else grey[:0]
        grey = np.rot90(grey)
    return grey


def is_light_on_dark(image):
    """Whether an RGB drawing has a dark ground.

    Frames, margins and letterbox bars are uniform lines at the sides. They are peeled off, and the
    ground is the innermost layer that is uniform on all four sides, unless a sheet of paper is on
    it. Without such a layer, because the drawing fills the picture, the ground is dark if the sides
    are dark and light is rare.
    """
    grey = np.asarray(image.convert("L"), np.float32)
    middle = middle_tone(grey)
    dark = grey < middle
    ground, inside = layer_tone(dark), peel(grey, middle, side_tones(dark))
    while min(inside.shape) > 2 and layer_tone(inside < middle) is not None:
        ground = layer_tone(inside < middle)
        inside = peel(inside, middle, [ground] * 4)
    light = 1 - dark.mean()
    if ground is None:
        return bool(np.mean(side_shares(dark)) > 0.5 and light < RARE_LIGHT)
    return bool(ground and not (light > SMALLEST_SHEET
                                and is_sheet(inside, middle, light > LARGE_SHEET)))


def is_sheet(grey, middle, is_large):
    """Whether what is lighter than `middle` in (H, W) is a photographed sheet of paper.

    It fills a quadrilateral, seen at any angle. Unlike a drawn shape it has shades, or `is_large`.
    """
    if not grey.size:
        return False
    dark = np.ascontiguousarray(grey < middle)
    shrunk = Image.fromarray(dark).convert("L").resize((64, 64), Image.Resampling.BOX)
    light = np.asarray(shrunk) < 128                        # without specks
    if not light.any():
        return False
    if not is_large and np.ptp(np.percentile(grey[~dark], (20, 80))) < LEAST_SHADE:
        return False
    y, x = np.nonzero(light)
    fits = []
    for ends in (((x + y).argmin(), (x - y).argmax(), (x + y).argmax(), (x - y).argmin()),
                 (y.argmin(), x.argmax(), y.argmax(), x.argmin())):     # if turned by 45 degrees
        sheet = Image.new("1", light.shape)
        ImageDraw.Draw(sheet).polygon([(int(x[i]), int(y[i])) for i in ends], fill=1)
        sheet = np.asarray(sheet)
        fits.append((light & sheet).sum() / (light | sheet).sum())
    return max(fits) > SHEET_FIT


def tone_range(grey):
    """Darkest and lightest tone, 0 to 255, of pixels, leaving out 0.1 % each."""
    return np.percentile(grey, (0.1, 99.9))


def middle_tone(grey):
    """The tone, 0 to 255, that separates dark from light in a picture (H, W)."""
    darkest, lightest = tone_range(grey)
    return (darkest + lightest) / 2 if lightest > darkest else 128


def level_drawing(image):
    """A drawing as dark lines on white paper, RGB, whatever its polarity and paper tone.

    The paper is everything lighter than the middle tone; its median becomes white.
    """
    image = drawing_to_rgb(image)
    if is_light_on_dark(image):
        image = ImageOps.invert(image)
    grey = np.asarray(image.convert("L"), np.float32)
    paper = max(1.0, float(np.median(grey[grey >= min(middle_tone(grey), grey.max())])))
    levelled = (grey * (255 / paper)).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(levelled).convert("RGB")


def drawing_to_rgb(image):
    """A drawing in mode RGB; transparent parts are white, or black if white hides the ink."""
    if image.has_transparency_data:
        grey, alpha = (np.asarray(part) for part in image.convert("LA").split())
        if (alpha > 127).any():
            darkest, lightest = tone_range(grey[alpha > 127])
            if lightest > HIDDEN_INK * (255 - darkest):
                return to_rgb(image, "black")
    return to_rgb(image)


def open_drawing(file):
    """The drawing in a file as dark lines on white paper, RGB."""
    return open_image(file, level_drawing)


def drawing_to_cond(image):
    """cond (1, H, W) float in [0, 1] of a dark-on-light RGB drawing: 1 is ink, 0 paper.

    The darkest line is full ink, though a pencil or shrinking made it faint.
    """
    ink = torch.from_numpy(1 - np.asarray(image.convert("L"), np.float32) / 255)[None]
    return ink / ink.max() if ink.max() >= FAINTEST_INK else ink


def edges(x):
    """(slope, ridge), both (B, H, W), of pictures x (B, 3, H, W) in [-1, 1].

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
    """Pixels (B, H, W) bool that are lines of pictures x (B, 3, H, W) in [-1, 1]."""
    slope, ridge = edges(x)
    return ridge & (slope > LINE_CONTRAST)


def soft_lines(x):
    """Lines of pictures x (B, 3, H, W) in [-1, 1] as ink (B, 1, H, W) in [0, 1].

    The steeper the edge, the more ink. Large pictures are smoothed first, so that texture does not
    become lines; their slopes then count per pixel of a picture with SMOOTHED pixels a side.
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


def line_f1(lines, reference):
    """F1 score (B,) of lines against a reference, both (B, H, W) bool.

    A line pixel counts if the other has one at most 1 px away.
    """
    def near(mask):
        return F.max_pool2d(mask.float(), 3, 1, 1) > 0

    precision = (lines & near(reference)).sum((1, 2)) / lines.sum((1, 2)).clamp(min=1)
    recall = (reference & near(lines)).sum((1, 2)) / reference.sum((1, 2)).clamp(min=1)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-9)


# ---- label maps and colours ----------------------------------------------------------------

def open_label_map(file, accepts_rgb=False):
    """The label map in a file as a palette image (mode P), whose colours are the classes.

    Grey maps of 8 bits contain class numbers and get the palette of distinct_colours.
    """
    image = load_image(file)
    if image.format not in LOSSLESS or image.info.get("compression") == "jpeg":
        raise UserError(f"{file} must be in a lossless format, got {image.format}, which blurs "
                        f"classes into each other. Save label maps as palette PNG.")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        raise UserError(f"{file} must be opaque: a transparent part has no class. Fill it with "
                        f"the colour of the ground.")
    if accepts_rgb and image.mode in ("RGB", "RGBA", "LA"):
        return colours_to_labels(image, file)
    if image.mode == "1":
        image = image.convert("L")                          # 0 and 255
    if image.mode.startswith("I") and np.asarray(image).max() < MAX_CLASSES:
        image = Image.fromarray(np.asarray(image).astype(np.uint8))
    if image.mode == "L":
        image.putpalette(distinct_colours())
    if image.mode != "P":
        raise UserError(f"{file} must have mode P or L, got {image.mode}, in which blends look "
                        f"like classes. Save label maps as palette PNG (P) or class numbers (L).")
    if len(class_colours(image)) < len(image.getcolors()):
        raise UserError(f"{file} must have a colour for each class, got two classes of one colour. "
                        f"BPS sees only colours: change the palette.")
    return image


def open_boxes(file):
    """The label map in a file as a palette image; RGB is accepted if it has few colours."""
    return open_label_map(file, accepts_rgb=True)


def colours_to_labels(image, file):
    """An RGB image with few colours as a palette image."""
    pixels = np.asarray(image.convert("RGB").convert("RGBX")).view(np.uint32)[..., 0]
    colours = np.unique(pixels)                 # single numbers, which sort fast
    if len(colours) > MAX_CLASSES:
        raise UserError(f"{file} must have at most {MAX_CLASSES} colours, one per class, got "
                        f"{len(colours):,}. Save it without shades between classes.")
    labels = Image.fromarray(np.searchsorted(colours, pixels).astype(np.uint8))
    labels.putpalette(colours.tobytes(), "RGBX")
    return labels


def distinct_colours():
    """256 different colours as bytes (768); class 0 is black.

    The bits of a class number go to red, green and blue in turns, as in PASCAL VOC's palette.
    """
    numbers, colours = np.arange(MAX_CLASSES), np.zeros((MAX_CLASSES, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= ((numbers >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours.tobytes()


def colour_of(i, palette):
    """Entry i of a palette (bytes), as in "#1f77b4"."""
    return f"#{palette[3 * i:3 * i + 3].hex()}"


def class_colours(labels):
    """{colour, as in "#1f77b4": palette index} of the classes in a palette image."""
    palette = bytes(labels.getpalette("RGB")) + bytes(3 * MAX_CLASSES)      # it may be shorter
    return {colour_of(i, palette): i for _, i in labels.getcolors()}


def class_names(colours):
    """{colour: name of the class} of {colour: index}: its number in grey maps, else its colour.

    Grey maps are recognized by the palette of distinct_colours.
    """
    palette = distinct_colours()
    numbered = all(colour == colour_of(i, palette) for colour, i in colours.items())
    return {colour: str(i) if numbered else colour for colour, i in colours.items()}


def palette_fault(palettes):
    """What is wrong with label maps whose palettes contradict each other, or None.

    palettes: {((colour, number), ..): a map that has these classes}. BPS sees only colours, so the
    same colours may have other numbers. An error is a number with two colours that have no other
    number, and masks whose inside is 1 in some files and 255 in others.
    """
    numbers, maps = {}, {}              # {colour: its numbers}, {(number, colour): a map}
    for classes, file in palettes.items():
        for colour, number in classes:
            numbers.setdefault(colour, set()).add(number)
            maps.setdefault((number, colour), file)
    for number in sorted({number for number, _ in maps}):
        colours = [colour for colour, its_numbers in numbers.items() if its_numbers == {number}]
        if len(colours) > 1:
            places = ", ".join(f"{colour} in {maps[number, colour]}" for colour in colours)
            return f"palettes differ: class {number} is {places}. Save all maps with one palette."
    insides = {tuple(number for _, number in classes if number != 0): file
               for classes, file in palettes.items()}
    if {(1,), (255,)} <= insides.keys() <= {(), (1,), (255,)}:
        return (f"masks differ: inside is 1 in {insides[1,]}, but 255 in {insides[255,]}. Save all "
                f"masks alike.")
    return None


def object_note(palettes, number_of_maps):
    """What to say of label maps whose colours seem to be single objects (panoptic, instances).

    None if they share their colours. palettes: as in palette_fault.
    """
    counts = Counter(colour for classes in palettes for colour, _ in classes)
    rare = sum(count == 1 for count in counts.values())
    if 2 * rare > len(counts) and 2 * len(palettes) > number_of_maps:
        return (f"{rare} of {len(counts)} classes occur in one map only. A colour must be a class "
                f"in all maps, not a single object.")
    return None


def looks_like_label_map(image):
    """Whether an image has a palette with other colours than greys."""
    return image.mode == "P" and any(len({c[1:3], c[3:5], c[5:]}) > 1 for c in class_colours(image))


def match_mask(labels, classes):
    """A mask recoloured to the inside colour that a BPS was trained on; other maps unchanged.

    Inside may be number 1 or 255 of a grey map, or white. classes: {colour: name} that BPS was
    trained on.
    """
    palette = distinct_colours()
    outside, *insides = (colour_of(i, palette) for i in (0, *INSIDE_NUMBERS))
    insides.append("#ffffff")
    colours, known = class_colours(labels), [colour for colour in classes if colour != outside]
    if any(colours.keys() <= {outside, inside} for inside in insides) \
            and len(known) == 1 and known[0] in insides:
        mask = Image.fromarray((np.asarray(labels) != colours.get(outside)).astype(np.uint8))
        mask.putpalette(bytes.fromhex(f"{outside}{known[0]}".replace("#", "")))
        return mask
    return labels


def coarse_colours(x):
    """Colour reference (B, 3, H, W) in [0, 1] of pictures x (B, 3, H, W) in [-1, 1].

    Each cell has its mean colour; there are COLOUR_CELLS along the shorter side.
    """
    H, W = x.shape[-2:]
    cells = [max(1, round(COLOUR_CELLS * side / min(H, W))) for side in (H, W)]
    return F.interpolate(F.adaptive_avg_pool2d((x + 1) / 2, cells), (H, W), mode="nearest")


# ---- tasks ---------------------------------------------------------------------------------

def pad(image, width, height):
    """A drawing scaled to fit into width x height, with white paper around it."""
    return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color="white")


def colours_to_cond(image):
    """cond (3, H, W) in [0, 1]: the picture's colours."""
    return (to_x(image.convert("RGB")) + 1) / 2


def lines_to_cond(image):
    """cond (1, H, W) in [0, 1]: the picture's lines."""
    return soft_lines(to_x(image)[None])[0]


def colours_and_lines_to_cond(image):
    """cond (4, H, W) in [0, 1]: the picture's coarse colours and its lines."""
    x = to_x(image)[None]
    return torch.cat([coarse_colours(x), soft_lines(x)], dim=1)[0]


class Task(NamedTuple):
    """A kind of condition: how its files become what BPS sees."""
    channels: int
    open: Callable                          # file -> condition picture
    to_cond: Callable                       # condition picture -> cond (channels, H, W) in [0, 1]
    fit: Callable = crop                    # picture, width, height -> that size, for sampling
    extract: Callable | None = None         # image -> cond of its own lines, for --extract
    port_weights: str = "head-heavy"        # the default of train.py --weights
    has_labels: bool = False                # colours are classes, which must not be blended
    has_numbers: bool = False               # classes have the same number in all maps
    steps: int = 1200                       # the default of train.py --steps


TASKS = {
    "sketch": Task(1, open_drawing, drawing_to_cond, fit=pad, extract=lines_to_cond),
    "segmentation": Task(3, open_label_map, colours_to_cond, has_labels=True,
                         has_numbers=True),
    "layout": Task(3, open_boxes, colours_to_cond, port_weights="flat", has_labels=True),
    "artistic": Task(4, open_image, colours_and_lines_to_cond, extract=colours_and_lines_to_cond,
                     steps=300)}            # more steps overfit its 40 pictures


def cond_to_x(cond):
    """A viewable picture x (B, 3, H, W) in [-1, 1] of conditions (B, C, H, W)."""
    colours, ink = cond[:, :-1], cond[:, -1:]
    if cond.shape[1] == 3:
        colours, ink = cond, torch.zeros_like(ink)
    if cond.shape[1] == 1:
        colours = torch.ones_like(ink)
    return (2 * colours * (1 - ink) - 1).expand(-1, 3, -1, -1)


def is_blank(cond, task_name):
    """Whether a condition (C, H, W) in [0, 1] is the same everywhere."""
    contrast = (cond.amax((1, 2)) - cond.amin((1, 2))).max()
    return bool(contrast == 0 if TASKS[task_name].has_labels else contrast < FAINTEST_INK)


def open_condition(file, task_name, classes=None):
    """The condition picture in a file to draw with; a label map may have any mode.

    classes: {colour: name} that BPS was trained on.
    """
    task = TASKS[task_name]
    if not task.has_labels:
        return task.open(file)
    image = open_boxes(file)
    if classes:
        image = match_mask(image, classes)
        check_classes(file, image, classes)
    return image


def read_condition(file, task_name, width, height, classes=None):
    """cond (C, height, width) in [0, 1] of a file to draw with.

    A drawing is fitted in, everything else covers the picture and is cropped. classes: {colour:
    name} that BPS was trained on.
    """
    task, picture = TASKS[task_name], open_condition(file, task_name, classes)
    cond = task.to_cond(task.fit(picture, width, height))
    if task.open is open_drawing and is_blank(cond, task_name):
        raise UserError(f"{file} {why_blank(picture)}")
    return cond


def why_blank(drawing):
    """Why nothing is left of a drawing, dark on white, at the network's size: ends a sentence."""
    if is_blank(drawing_to_cond(drawing), "sketch"):
        return "has no line. A drawing must be dark on light or light on dark."
    return "has only lines thinner than a pixel at this size. Thicken them, or crop the drawing."


def check_classes(file, labels, classes):
    """Raise UserError if a label map has a class that is not in classes, {colour: name}."""
    for colour, name in class_names(class_colours(labels)).items():
        if colour not in classes:
            known = ", ".join(name if name.isdecimal() or name == colour else
                              f"{colour} {name}".strip() for colour, name in classes.items())
            raise UserError(f"{file}: class {name} is unknown. This BPS was trained on {known}.")
