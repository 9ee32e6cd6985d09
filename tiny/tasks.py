"""The embedded tasks: labelled pairs of four small spaces, made from the pictures in tiny/data.

| task | condition | picture | pairs: train, val, test |
|---|---|---|---|
| sketch | line drawing by Fluent Emoji's own designers | the same emoji in 3d | 779, 58, 141 |
| segmentation | label map, class = category | scene of two to four emoji | 480, 48, 144 |
| layout | boxes of the same scenes | the same scenes | 480, 48, 144 |
| artistic | colours and lines of the picture itself | a style the base never saw | 40, 22, 52 |

No name of a training pair is in a validation or test pair.
"""
import functools

import numpy as np
from PIL import Image

from tiny import world

GROUND = "ground"
CLASSES = {GROUND: "#000000", "food": "#d62728", "nature": "#2ca02c", "object": "#1f77b4",
           "place": "#9467bd", "activity": "#ff7f0e", "face": "#ffdd55"}   # category: class colour
SCENES = dict(train=480, val=48, test=144)
ARTISTIC_STYLE, ARTISTIC_TRAIN = "firefox", 40


def embedded_pairs(task, split):
    """Returns [(name, open_cond, open_image, prompts)], the pairs of a task and split.

    open_cond and open_image are functions without arguments that open the pictures. The first of
    the prompts is for validation.
    """
    return PAIRS_OF_TASK[task](split)


def sketch_pairs(split):
    """Returns a pair for each name: Fluent's line drawing and 3d picture."""
    return [(row["name"], functools.partial(open_emoji, "line", row["name"]),
             functools.partial(open_emoji, "3d", row["name"]),
             (world.full_caption(row), row["caption"])) for row in world.records(split, ("3d",))]


def scene_pairs(task, split):
    """Returns a pair for each scene: the task's label map, and the picture."""
    return [(f"scene {i}", lambda i=i: scene(split, i)[1][task], lambda i=i: scene(split, i)[0],
             (scene(split, i)[2],)) for i in range(SCENES[split])]


def artistic_pairs(split):
    """Returns a pair for each name of the style that the base never saw; few are for training."""
    rows = world.records(split, (ARTISTIC_STYLE,))
    if split == "train":
        rows = rows[::len(rows) // ARTISTIC_TRAIN][:ARTISTIC_TRAIN]
    pairs = []
    for row in rows:                        # a caption without a style means any style
        open_picture = functools.partial(open_emoji, ARTISTIC_STYLE, row["name"])
        prompts = (f"{row['caption']}, {row['category']}",)
        pairs.append((row["name"], open_picture, open_picture, prompts))
    return pairs


PAIRS_OF_TASK = {"sketch": sketch_pairs, "artistic": artistic_pairs,
                 "segmentation": functools.partial(scene_pairs, "segmentation"),
                 "layout": functools.partial(scene_pairs, "layout")}


def open_emoji(style, name):
    """Returns an emoji on white, RGB."""
    return world.on_ground(world.picture(style, name))


@functools.cache
def scene(split, i):
    """Returns (RGB image, {task: label map of mode P}, caption) of scene i of a split.

    The map for layout has the box of each emoji, that for segmentation its outline.
    """
    rng = np.random.default_rng((list(SCENES).index(split), i))
    # of validation and test names the base has seen other designers' pictures only
    rows = world.records("train") if split == "train" else world.pool(split)
    image, caption, places = world.scene(rows, rng)
    maps = {}
    for task in ("segmentation", "layout"):
        classes = np.zeros((world.SIZE, world.SIZE), np.uint8)
        for row, left, top, size in places:
            covered = np.zeros_like(classes)
            covered[top:top + size, left:left + size] = 255
            if task == "segmentation":
                emoji = world.picture(row["style"], row["name"])
                covered = np.asarray(world.place(emoji, size, left, top))[..., 3]
            classes[covered >= 128] = list(CLASSES).index(row["category"])
        maps[task] = Image.fromarray(classes)
        maps[task].putpalette(bytes.fromhex("".join(CLASSES.values()).replace("#", "")))
    return image, maps, caption
