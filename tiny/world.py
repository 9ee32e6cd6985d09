"""The embedded base's large probability space: emoji on plain grounds, alone or in scenes.

Every picture and its caption is a function of a numpy Generator, so that any of them can be made
again from (seed, index). 64 x 64 px; a caption is like "red apple, food, flat style, on teal".
"""
import functools
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).parent / "data"
SIZE = 64
BASE_STYLES = ("3d", "flat", "noto", "twemoji", "emojitwo")     # "firefox" is kept for a task
FLUENT_STYLES = ("3d", "flat")      # by one designer, with the outlines of the line drawings
CATEGORIES = ("food", "nature", "object", "place", "activity", "face")
# colour word in captions -> RGB of the ground
GROUNDS = {"white": (255, 255, 255), "grey": (190, 190, 190), "cream": (250, 240, 210),
           "pink": (250, 200, 210), "pale blue": (190, 220, 250), "pale green": (200, 235, 200),
           "yellow": (250, 225, 120), "teal": (60, 150, 150), "navy": (30, 40, 90),
           "black": (20, 20, 20)}
WHITE_SHARE = 0.6       # of all grounds; a caption without a ground means white


@functools.cache
def _archive(style):
    return zipfile.ZipFile(DATA / f"{style}.zip")


@functools.cache
def picture(style, name):
    """Returns the emoji as a PIL image, 64 x 64 RGBA."""
    return Image.open(io.BytesIO(_archive(style).read(f"{name}.png"))).convert("RGBA")


@functools.cache
def records(split=None, styles=BASE_STYLES):
    """Returns the rows of metadata.jsonl as dicts, of one split (train, val, test) or of all."""
    rows = map(json.loads, (DATA / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["style"] in styles and split in (None, row["split"])]


def pool(split):
    """Returns the rows whose pictures the base learns from (train) or is tested on (val, test).

    Held out are pictures, not names: the base learns every name from other designers, but sees
    Fluent's own pictures of training names only. Those of the other names are what it is tested on.
    """
    if split != "train":
        return records(split, FLUENT_STYLES)
    return [row for row in records()
            if row["split"] == "train" or row["style"] not in FLUENT_STYLES]


def on_ground(emoji, ground="white"):
    """Returns an RGB image: the RGBA picture over a plain ground, named as in GROUNDS."""
    canvas = Image.new("RGBA", emoji.size, (*GROUNDS[ground], 255))
    return Image.alpha_composite(canvas, emoji).convert("RGB")


def placed(emoji, size, left, top, flip):
    """Returns the emoji scaled to size px, on a transparent 64 x 64 canvas."""
    if flip:
        emoji = emoji.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if size != SIZE:
        emoji = emoji.resize((size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(emoji, (left, top))
    return canvas


def _random_ground(rng):
    return "white" if rng.random() < WHITE_SHARE else str(rng.choice(list(GROUNDS)[1:]))


def full_caption(row, ground="white"):
    """Returns the caption that says all there is to say of a single picture."""
    caption = f"{row['caption']}, {row['category']}, {row['style']} style"
    return caption if ground == "white" else f"{caption}, on {ground}"


def vary_caption(row, ground, rng):
    """Returns a caption of a single picture that leaves out now the name, category or style.

    The ground is left out only where it is white."""
    caption = row["caption"]
    if rng.random() < 0.25:
        caption = ("an " if caption[0] in "aeiou" else "a ") + caption
    if rng.random() < 0.15:
        caption = row["category"]           # so that the word comes to mean the whole category
    elif rng.random() < 0.5:
        caption += f", {row['category']}"
    if rng.random() < 0.7:
        caption += f", {row['style']} style"
    if ground != "white" or rng.random() < 0.3:
        caption += f", on {ground}"
    return caption


def single(rows, rng, plain=False):
    """Returns (RGB image, caption) of one random emoji on a random ground.

    It is moved, scaled and mirrored a little; plain leaves it as drawn, on white."""
    row = rows[rng.integers(len(rows))]
    ground = "white" if plain else _random_ground(rng)
    size = SIZE if plain or rng.random() < 0.5 else int(rng.integers(50, SIZE + 1))
    left, top = (int(rng.integers(SIZE - size + 1)) for _ in range(2))
    flip = not plain and rng.random() < 0.3
    emoji = placed(picture(row["style"], row["name"]), size, left, top, flip)
    return on_ground(emoji, ground), vary_caption(row, ground, rng)


def scene(rows, rng):
    """Returns (RGB image, caption, [(row, left, top, size)]) of two to four emoji of one style."""
    style = rows[rng.integers(len(rows))]["style"]
    same = [row for row in rows if row["style"] == style]
    ground, count = _random_ground(rng), int(rng.integers(2, 5))
    cells = rng.permutation(4)[:count]                  # of a 2 x 2 grid, so nothing overlaps
    canvas, places = Image.new("RGBA", (SIZE, SIZE)), []
    for cell in cells:
        row = same[rng.integers(len(same))]
        size = int(rng.integers(26, 33))
        left = 32 * int(cell % 2) + int(rng.integers(32 - size + 1))
        top = 32 * int(cell // 2) + int(rng.integers(32 - size + 1))
        canvas.alpha_composite(placed(picture(style, row["name"]), size, left, top, False))
        places.append((row, left, top, size))
    names = [row["caption"] for row, *_ in places]
    caption = f"{', '.join(names[:-1])} and {names[-1]}, {style} style, on {ground}"
    return on_ground(canvas, ground), caption, places


def random_picture(rows, rng, alone=0.85):
    """Returns (RGB image, caption): a single emoji with probability `alone`, else a scene."""
    return single(rows, rng) if rng.random() < alone else scene(rows, rng)[:2]


def to_array(image):
    """Returns (3, H, W) uint8 of an RGB image."""
    return np.asarray(image).transpose(2, 0, 1)
