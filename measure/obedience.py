"""Does a picture do what its condition says? One meter for each task, in [0, 1].

For sketch and artistic, lines and colours are extracted again from the picture. For segmentation
and layout, the small CLIP says what it sees. That only works for the embedded scenes, in which each
quarter of the picture holds at most one emoji, and whose classes the CLIP knows.

Shapes: n pictures, C channels, H W rows and columns.
"""
import torch
import torch.nn.functional as F

from inputs.conditions import coarse_colours, cond_to_x, extract_lines, line_f1, soft_lines
from tiny import world
from tiny.classifier import Classifier
from tiny.tasks import CLASSES

SURE_INK = 0.25                 # ink from which a soft line counts
OFF_GROUND = 0.25               # difference of x, in any channel, from which it is not the ground
LEAST_SHARE = 0.05              # share of a quarter that an emoji has to cover


def meter_for(task, embedded, device="cpu"):
    """Returns the meter of a task, or None if there is none.

    A meter takes pictures x (n, 3, H, W) in [-1, 1] and conditions (n, C, H, W), both on the CPU,
    to {name of a measure: its mean}. embedded: whether the pairs are the embedded ones.
    """
    if task in LINE_METERS:
        return LINE_METERS[task]
    if not embedded:
        return None
    classify = Classifier(device=device)
    return lambda pictures, conds: CLASS_METERS[task](pictures, conds,
                                                      lambda x: classify(x.to(device)).cpu())


def sketch(pictures, conds):
    """Returns the F1 score of the pictures' lines against the drawings', to within 1 px."""
    f1 = line_f1(extract_lines(pictures), extract_lines(cond_to_x(conds)))
    return {"line F1": f1.mean().item()}


def artistic(pictures, conds):
    """Returns the mean difference of the coarse colours, 0 to 1, and the F1 score of the lines."""
    distance = (coarse_colours(pictures) - conds[:, :3]).abs().mean().item()
    f1 = line_f1(soft_lines(pictures)[:, 0] > SURE_INK, conds[:, 3] > SURE_INK)
    return {"colour distance": distance, "line F1": f1.mean().item()}


# ---- classes, read again from scenes -------------------------------------------------------

def class_numbers(conds):
    """Returns the indices (n, H, W) into CLASSES that conditions (n, 3, H, W) show."""
    palette = torch.tensor([list(bytes.fromhex(colour[1:])) for colour in CLASSES.values()]) / 255
    return (conds[:, :, None] - palette.T[None, :, :, None, None]).abs().sum(1).argmin(1)


def quarters(x):
    """Returns views of the quarters of (n, .., H, W), each (n, .., H / 2, W / 2)."""
    return [part for half in x.chunk(2, -2) for part in half.chunk(2, -1)]


def cut_out(x, covered):
    """Returns the part of x (3, H, W) around what is covered (H, W) bool, scaled to (3, 64, 64)."""
    rows, columns = covered.any(1).nonzero()[:, 0], covered.any(0).nonzero()[:, 0]
    part = x[None, :, rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    return F.interpolate(part, world.SIZE, mode="bilinear", antialias=True)[0].clamp(-1, 1)


def off_ground(x):
    """Returns where pictures (n, 3, H, W) differ from their ground, (n, H, W) bool, holes filled.

    The ground is the median colour of the outermost pixels.
    """
    border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], dim=-1)   # (n, 3, ..)
    ground = border.median(-1).values[..., None, None]
    covered = (x - ground).abs().amax(1) > OFF_GROUND
    filled = torch.ones_like(covered)
    for dim in (-1, -2):                    # a hole has something on all four sides
        filled &= covered.int().cummax(dim).values.bool()
        filled &= covered.flip(dim).int().cummax(dim).values.flip(dim).bool()
    return filled


def segmentation(pictures, conds, classify):
    """Returns pixel accuracy and mean IoU of the classes that are read again from pictures.

    What is off the ground in a quarter is of the class that the classifier sees there. The ground
    counts as a class.
    """
    target = class_numbers(conds)
    prediction = torch.zeros_like(target)
    for x, numbers in zip(quarters(pictures), quarters(prediction)):
        covered = off_ground(x)
        indices = (covered.float().mean((1, 2)) > LEAST_SHARE).nonzero()[:, 0]
        if len(indices):
            classes = classify(torch.stack([cut_out(x[i], covered[i]) for i in indices])) + 1
            numbers[indices] = covered[indices] * classes[:, None, None]    # writes to prediction
    a, b = (F.one_hot(numbers, len(CLASSES)).bool() for numbers in (target, prediction))
    intersection, union = (a & b).sum((0, 1, 2)), (a | b).sum((0, 1, 2))        # (classes,)
    return {"pixel accuracy": (target == prediction).float().mean().item(),
            "mIoU": (intersection / union)[union > 0].mean().item()}


def layout(pictures, conds, classify):
    """Returns the share of boxes in which the classifier sees the class they ask for."""
    parts, targets = [], []
    for x, numbers in zip(quarters(pictures), quarters(class_numbers(conds))):
        for i in (numbers > 0).any(2).any(1).nonzero()[:, 0]:
            parts.append(cut_out(x[i], numbers[i] > 0))
            targets.append(numbers[i].max() - 1)
    hits = classify(torch.stack(parts)) == torch.stack(targets)
    return {"boxes of the right class": hits.float().mean().item()}


LINE_METERS = {"sketch": sketch, "artistic": artistic}
CLASS_METERS = {"segmentation": segmentation, "layout": layout}     # these need a classifier
