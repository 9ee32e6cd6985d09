"""Does a picture follow its condition and its prompt? Measured without a neural network.

Lines and coarse colours are extracted from the picture again. The prompts of embedded figures name
the colours of their parts, so each pixel belongs to the part with the nearest colour.

Shapes: n pictures, C channels, H W rows and columns.
"""
import numpy as np

from inputs.conditions import coarse_colours, cond_to_x, extract_lines, line_f1, soft_lines
from tiny import world
from tiny.tasks import CLASSES, area

SURE_INK = 0.25                 # ink from which a soft line counts
SEEN_PIXELS = 24                # a smaller part of the map is not measured
TOO_CLOSE = 40                  # RGB distance within which another part's colour may be meant
FEATURES = list(CLASSES).index("features")
EMBEDDED_PARTS = ("ground", *world.PARTS)
GREYS = [(grey,) * 3 for grey in (0, 64, 128, 192, 255)]     # outlines, eyes, teeth
TRIMMED = 0.05                  # share of a part's pixels outside its box, on each side


def meter_for(task, embedded):
    """The meter of a task, or None if there is none. embedded: are the pairs the embedded ones?

    A meter is a function of pictures x (n, 3, H, W) in [-1, 1], conditions (n, C, H, W) and the
    pairs' names, all on the CPU. It returns {name of a measure: its mean}.
    """
    if task in LINE_METERS:
        return LINE_METERS[task]
    return PART_METERS[task] if embedded else None


def drawing_f1(pictures, conds):
    """F1 score (n,) of each picture's lines against its drawing's, to within 1 px."""
    return line_f1(extract_lines(pictures), extract_lines(cond_to_x(conds)))


def sketch(pictures, conds, names):
    """Mean F1 score of the pictures' lines against the drawings'."""
    return {"line F1": drawing_f1(pictures, conds).mean().item()}


def artistic(pictures, conds, names):
    """Mean difference of the coarse colours, 0 to 1, and the F1 score of the lines."""
    distance = (coarse_colours(pictures) - conds[:, :3]).abs().mean().item()
    f1 = line_f1(soft_lines(pictures)[:, 0] > SURE_INK, conds[:, 3] > SURE_INK)
    return {"colour distance": distance, "line F1": f1.mean().item()}


# ---- parts and colours of embedded figures -------------------------------------------------

def to_rgb(x):
    """Colours (.., H, W, 3) from 0 to 255 of pictures x (.., 3, H, W) in [-1, 1]."""
    return ((x.clamp(-1, 1) + 1) * 127.5).movedim(-3, -1).numpy()


def nearest(rgb, colours):
    """Index (..) of the colour (k, 3) that is nearest to each of rgb (.., 3)."""
    return np.linalg.norm(rgb[..., None, :] - np.array(colours), axis=-1).argmin(-1)


def part_map(name):
    """The true classes (H, W) of an embedded figure: indices into CLASSES."""
    return np.asarray(world.open_part("parts", name))


def read_parts(x, figure):
    """The classes (H, W) of a picture x (3, H, W): for each pixel the part of the nearest colour.

    Features have no colour of their own, so their pixels count as one of the other parts.
    """
    named = [part for part in EMBEDDED_PARTS if part in figure]
    index = nearest(to_rgb(x), [world.rgb(part, figure[part]) for part in named])
    return np.array([list(CLASSES).index(part) for part in named])[index]


def segmentation(pictures, conds, names):
    """Pixel accuracy and mean IoU of the parts read from pictures, apart from features."""
    hits, confusion = [], np.zeros((len(CLASSES), len(CLASSES)))
    for x, name in zip(pictures, names):
        target, found = part_map(name), read_parts(x, world.figure(name))
        known = target != FEATURES
        hits.append((target == found)[known].mean())
        np.add.at(confusion, (target[known], found[known]), 1)
    intersection = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - intersection
    return {"pixel accuracy": float(np.mean(hits)),
            "mIoU": float((intersection / union.clip(1))[union > 0].mean())}


def trimmed_boxes(classes):
    """{class index: (left, top, right, bottom)} of the parts in a map (H, W), without outliers.

    A twentieth of a part's pixels may be outside on each side, because a few pixels at outlines
    look like parts that are not there.
    """
    boxes = {}
    for k, name in enumerate(CLASSES):
        rows, columns = np.nonzero(classes == k)
        if name in world.PARTS and len(rows) >= SEEN_PIXELS:
            low, high = (np.quantile([columns, rows], share, axis=1)
                         for share in (TRIMMED, 1 - TRIMMED))
            boxes[k] = (*low, *(high + 1))
    return boxes


def box_iou(a, b):
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    return overlap / (area(a) + area(b) - overlap)


def layout(pictures, conds, names):
    """Mean IoU of the true parts' boxes with those read from pictures; 0 for a missing part."""
    scores = []
    for x, name in zip(pictures, names):
        found = trimmed_boxes(read_parts(x, world.figure(name)))
        scores += [box_iou(box, found[k]) if k in found else 0.0
                   for k, box in trimmed_boxes(part_map(name)).items()]
    return {"box IoU": float(np.mean(scores))}


def colour_fidelity(pictures, names):
    """{part: how often the median colour inside its true outline is nearest to the named one}."""
    hits = {}
    for x, name in zip(pictures, names):
        figure, classes, rgb = world.figure(name), part_map(name), to_rgb(x)
        for part in world.PARTS:
            inside = classes == list(CLASSES).index(part)
            if part in figure and inside.sum() >= SEEN_PIXELS:
                palette = list(world.COLOURS[part])
                median = np.median(rgb[inside], axis=0)
                found = palette[nearest(median, [world.rgb(part, word) for word in palette])]
                hits.setdefault(part, []).append(found == figure[part])
    return {part: float(np.mean(values)) for part, values in hits.items()}


def prompt_fidelity(pictures, figures):
    """{part: how often no other colour of its palette has more pixels than the named one}.

    For pictures with unknown outlines. Ignores pixels that are nearer to the ground, to another
    part's colour or to a shade of grey, and palette colours that are too close to one of these.
    """
    hits = {}
    for x, figure in zip(pictures, figures):
        rgb = to_rgb(x)
        for part in set(world.PARTS) & figure.keys():
            others = [world.rgb(other, figure[other]) for other in EMBEDDED_PARTS
                      if other in figure and other != part] + GREYS
            palette = {word: world.rgb(part, word) for word in world.COLOURS[part]}
            words = [word for word, colour in palette.items() if word == figure[part] or min(
                np.linalg.norm(np.subtract(colour, other)) for other in others) > TOO_CLOSE]
            index = nearest(rgb, [palette[word] for word in words] + others)
            pixels = np.bincount(index.ravel(), minlength=len(words))[:len(words)]
            hits.setdefault(part, []).append(words[pixels.argmax()] == figure[part])
    return {part: float(np.mean(values)) for part, values in hits.items()}


LINE_METERS = {"sketch": sketch, "artistic": artistic}
PART_METERS = {"segmentation": segmentation, "layout": layout}      # of embedded figures only
