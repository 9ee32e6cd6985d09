"""The embedded base's large probability space: emoji on plain grounds, alone or in scenes.

Each picture and its caption are a function of a numpy Generator, so that any of them can be made
again from (seed, index). Pictures are 64 x 64 px; a caption is like "red apple, food, flat style,
on teal".
"""
import functools
import io
import json
import zipfile
from pathlib import Path

import torch
from PIL import Image

DATA = Path(__file__).parent / "data"
SIZE = 64
BASE_STYLES = ("3d", "flat", "noto", "twemoji", "emojitwo")     # "firefox" is kept for a task
FLUENT_STYLES = ("3d", "flat")      # these have the designer and the outlines of the line drawings
CATEGORIES = ("food", "nature", "object", "place", "activity", "face")
# colour word in captions -> RGB of the ground
GROUNDS = {"white": (255, 255, 255), "grey": (190, 190, 190), "cream": (250, 240, 210),
           "pink": (250, 200, 210), "pale blue": (190, 220, 250), "pale green": (200, 235, 200),
           "yellow": (250, 225, 120), "teal": (60, 150, 150), "navy": (30, 40, 90),
           "black": (20, 20, 20)}
WHITE_SHARE = 0.6       # share of white grounds; a caption without a ground means white
SINGLE_SHARE = 0.85     # share of pictures with a single emoji; the others are scenes


@functools.cache
def _archive(style):
    return zipfile.ZipFile(DATA / f"{style}.zip")


@functools.cache
def picture(style, name):
    """Returns the emoji as a PIL image, 64 x 64 RGBA."""
    return Image.open(io.BytesIO(_archive(style).read(f"{name}.png"))).convert("RGBA")


@functools.cache
def records(split=None, styles=BASE_STYLES):
    """Returns the rows of metadata.jsonl as dicts; split: train, val, test, or None for all."""
    rows = map(json.loads, (DATA / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["style"] in styles and split in (None, row["split"])]


def pool(split):
    """Returns the rows whose pictures the base learns from (train) or is tested on (val, test).

    Pictures are held out, not names: the base learns every name from other designers, but Fluent's
    pictures of training names only. Fluent's pictures of the other names are for testing.
    """
    if split != "train":
        return records(split, FLUENT_STYLES)
    return [row for row in records()
            if row["split"] == "train" or row["style"] not in FLUENT_STYLES]


def on_ground(emoji, ground="white"):
    """Returns an RGB image of the RGBA picture over a plain ground; ground: a name in GROUNDS."""
    canvas = Image.new("RGBA", emoji.size, (*GROUNDS[ground], 255))
    return Image.alpha_composite(canvas, emoji).convert("RGB")


def place(emoji, size, left, top, flip=False):
    """Returns a transparent 64 x 64 canvas with the emoji, scaled to size px."""
    if flip:
        emoji = emoji.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if size != SIZE:
        emoji = emoji.resize((size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(emoji, (left, top))
    return canvas


def _random_ground(rng):
    return "white" if rng.random() < WHITE_SHARE else str(rng.choice(list(GROUNDS)[1:]))


def category_numbers(rows):
    """Returns the indices of the rows' categories in CATEGORIES (n,)."""
    return torch.tensor([CATEGORIES.index(row["category"]) for row in rows])


def full_caption(row):
    """Returns a caption with the name, category and style of a single picture, on white."""
    return f"{row['caption']}, {row['category']}, {row['style']} style"


def vary_caption(row, ground, rng):
    """Returns a caption of a single picture that leaves out some of name, category and style.

    The ground is left out only if it is white.
    """
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


def single(rows, rng):
    """Returns (RGB image, caption) of one random emoji, moved, scaled or mirrored, on a ground."""
    row = rows[rng.integers(len(rows))]
    ground = _random_ground(rng)
    size = SIZE if rng.random() < 0.5 else int(rng.integers(50, SIZE + 1))
    left, top = (int(rng.integers(SIZE - size + 1)) for _ in range(2))
    flip = rng.random() < 0.3
    emoji = place(picture(row["style"], row["name"]), size, left, top, flip)
    return on_ground(emoji, ground), vary_caption(row, ground, rng)


def scene(rows, rng):
    """Returns (RGB image, caption, [(row, left, top, size)]) of two to four emoji of one style."""
    style = rows[rng.integers(len(rows))]["style"]
    rows = [row for row in rows if row["style"] == style]
    ground = _random_ground(rng)
    count = int(rng.integers(2, 5))
    cells = rng.permutation(4)[:count]                  # cells of a 2 x 2 grid do not overlap
    canvas, places = Image.new("RGBA", (SIZE, SIZE)), []
    for cell in cells:
        row = rows[rng.integers(len(rows))]
        size = int(rng.integers(26, 33))
        left = 32 * int(cell % 2) + int(rng.integers(32 - size + 1))
        top = 32 * int(cell // 2) + int(rng.integers(32 - size + 1))
        canvas.alpha_composite(place(picture(style, row["name"]), size, left, top))
        places.append((row, left, top, size))
    names = [row["caption"] for row, *_ in places]
    caption = f"{', '.join(names[:-1])} and {names[-1]}, {style} style, on {ground}"
    return on_ground(canvas, ground), caption, places


def random_picture(rows, rng):
    """Returns (RGB image, caption) of a single emoji or a scene."""
    return single(rows, rng) if rng.random() < SINGLE_SHARE else scene(rows, rng)[:2]
