"""The embedded tasks: labelled pairs of four small spaces, from the figures in tiny/data.

| task | condition | picture | pairs: train, val, test, unseen |
|---|---|---|---|
| sketch | line drawing | figure of ten styles | 1000, 60, 200, 100 |
| segmentation | label map of its parts | the same figures | 1000, 60, 200, 100 |
| layout | a filled box for each part | the same figures | 1000, 60, 200, 100 |
| artistic | colours and lines of the picture itself | a style the base never saw | 40, 20, 60 |

The base has seen no figure of val, test or unseen; the hair shapes of `unseen` occur nowhere else.
"""
import functools

import numpy as np
from PIL import Image

from tiny import world

# class -> its colour in label maps
CLASSES = {"ground": "#000000", "hair": "#d62728", "skin": "#ffdd55", "clothes": "#1f77b4",
           "robot": "#2ca02c", "features": "#9467bd"}
LEAST_IN_BOX = 2                # pixels of a class in a row or column that its box has to hold


def embedded_pairs(task, split):
    """[(name, open_cond, open_image, prompts)], the pairs of a task and split.

    open_cond and open_image are functions without arguments that open the pictures. The first of
    the prompts is for validation.
    """
    if task == "artistic":
        rows = world.figures(split, (world.ARTISTIC_STYLE,))
        open_cond = functools.partial(world.open_part, "picture")
    else:
        rows = world.figures(split)
        open_cond = CONDITIONS[task]
    return [(row["name"], functools.partial(open_cond, row["name"]),
             functools.partial(world.open_part, "picture", row["name"]), (world.prompt(row),))
            for row in rows]


def open_boxes(name):
    """The layout of a figure: its part map with each part's box filled, larger boxes first."""
    parts = world.open_part("parts", name)
    boxes = Image.new("P", parts.size)
    boxes.putpalette(parts.getpalette())
    found = find_boxes(np.asarray(parts))
    for number, box in sorted(found.items(), key=lambda entry: -area(entry[1])):
        boxes.paste(number, box)
    return boxes


def find_boxes(classes):
    """{class index: (left, top, right, bottom)} of the parts in a label map (H, W), pixels."""
    boxes = {}
    for number, name in enumerate(CLASSES):
        if name in world.PARTS:
            inside = classes == number
            rows = np.flatnonzero(inside.sum(1) >= LEAST_IN_BOX).tolist()
            columns = np.flatnonzero(inside.sum(0) >= LEAST_IN_BOX).tolist()
            if rows and columns:
                boxes[number] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def area(box):
    """Pixels in a box (left, top, right, bottom)."""
    return (box[2] - box[0]) * (box[3] - box[1])


CONDITIONS = {"sketch": functools.partial(world.open_part, "drawing"),
              "segmentation": functools.partial(world.open_part, "parts"), "layout": open_boxes}
