"""Does a picture do what its condition says? One meter for each task, in [0, 1].

Of sketch and artistic, lines and colours are extracted again from the picture. Of segmentation and
layout, the small CLIP says what it sees; that only works for the embedded scenes, whose emoji lie
in the quarters of the picture, one in each, and whose classes it knows.

Shapes: n pictures, C channels, H W rows and columns.
"""
import torch
import torch.nn.functional as F

from inputs.conditions import coarse_colours, cond_to_x, extract_lines, line_f1, soft_lines
from tiny import world
from tiny.classifier import Classifier
from tiny.tasks import CLASSES

SURE_INK = 0.25                 # of a soft line, from which it counts
OFF_GROUND = 0.25               # of x in the channel that differs most: no longer the ground
LEAST_SHARE = 0.05              # of a quarter that something must cover to be there


def meter_for(task, embedded, device="cpu"):
    """Returns the meter of a task: a function of pictures x (n, 3, H, W) in [-1, 1] and conditions
    (n, C, H, W), both on the CPU, to {what is measured: its mean}; None if there is none.
    """
    if task in LINE_METERS:
        return LINE_METERS[task]
    if not embedded:
        return None
    classify = Classifier(device=device)
    return lambda pictures, conds: CLASS_METERS[task](pictures, conds,
                                                      lambda x: classify(x.to(device)).cpu())


def sketch(pictures, conds):
    """Returns the F1, 1 px tolerance, of the pictures' lines against the drawings' lines."""
    f1 = line_f1(extract_lines(pictures), extract_lines(cond_to_x(conds)))
    return {"line F1": f1.mean().item()}


def artistic(pictures, conds):
    """Returns the mean difference of the coarse colours, 0 to 1, and the F1 of the lines."""
    distance = (coarse_colours(pictures) - conds[:, :3]).abs().mean().item()
    f1 = line_f1(soft_lines(pictures)[:, 0] > SURE_INK, conds[:, 3] > SURE_INK)
    return {"colour distance": distance, "line F1": f1.mean().item()}


# ---- classes, read again from scenes -------------------------------------------------------

def class_numbers(conds):
    """Returns (n, H, W) the numbers, in the order of CLASSES, of conditions (n, 3, H, W)."""
    palette = torch.tensor([list(bytes.fromhex(colour[1:])) for colour in CLASSES.values()]) / 255
    return (conds[:, :, None] - palette.T[None, :, :, None, None]).abs().sum(1).argmin(1)


def quarters(x):
    """Returns views of the quarters of (n, .., H, W), each (n, .., H / 2, W / 2)."""
    return [part for half in x.chunk(2, -2) for part in half.chunk(2, -1)]


def cut_out(x, covered):
    """Returns (3, 64, 64), the part of a picture (3, H, W) around what is covered (H, W) bool."""
    rows, columns = covered.any(1).nonzero()[:, 0], covered.any(0).nonzero()[:, 0]
    part = x[:, rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    size = (world.SIZE, world.SIZE)
    return F.interpolate(part[None], size, mode="bilinear", antialias=True)[0].clamp(-1, 1)


def off_ground(x):
    """Returns where pictures (n, 3, H, W) show anything, (n, H, W) bool, holes filled.

    The ground is the median colour of the outermost pixels.
    """
    border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], dim=-1)   # (n, 3, ..)
    ground = border.median(-1).values[..., None, None]
    covered = (x - ground).abs().amax(1) > OFF_GROUND
    filled = torch.ones_like(covered)
    for dim in (-1, -2):                    # inside is what has something on all four sides
        filled &= covered.int().cummax(dim).values.bool()
        filled &= covered.flip(dim).int().cummax(dim).values.flip(dim).bool()
    return filled


def segmentation(pictures, conds, classify):
    """Returns pixel accuracy and mean IoU of the classes read again, ground among them.

    What is off the ground in a quarter is of the class that the classifier sees there.
    """
    asked = class_numbers(conds)
    read = torch.zeros_like(asked)
    for x, numbers in zip(quarters(pictures), quarters(read)):
        covered = off_ground(x)
        there = (covered.float().mean((1, 2)) > LEAST_SHARE).nonzero()[:, 0]
        if len(there):
            seen = classify(torch.stack([cut_out(x[i], covered[i]) for i in there])) + 1
            numbers[there] = covered[there] * seen[:, None, None]       # a view: written to read
    both, of_either = [], []
    for number in range(len(CLASSES)):
        a, b = asked == number, read == number
        both.append((a & b).sum())
        of_either.append((a | b).sum())
    iou = torch.stack(both) / torch.stack(of_either).clamp(min=1)
    present = torch.stack(of_either) > 0
    return {"pixel accuracy": (asked == read).float().mean().item(),
            "mIoU": iou[present].mean().item()}


def layout(pictures, conds, classify):
    """Returns the share of boxes in which the classifier sees the class they ask for."""
    parts, asked = [], []
    for x, numbers in zip(quarters(pictures), quarters(class_numbers(conds))):
        for i in (numbers > 0).any(2).any(1).nonzero()[:, 0]:
            parts.append(cut_out(x[i], numbers[i] > 0))
            asked.append(numbers[i].max() - 1)
    right = classify(torch.stack(parts)) == torch.stack(asked)
    return {"boxes of the right class": right.float().mean().item()}


LINE_METERS = {"sketch": sketch, "artistic": artistic}
CLASS_METERS = {"segmentation": segmentation, "layout": layout}     # these need a classifier
