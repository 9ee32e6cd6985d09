"""The embedded world: portraits and robots by designers, in colours that have names.

A figure is a row of tiny/data/figures.jsonl: the words of its captions, its split, and the name of
its pictures in figures.zip, all 64 x 64 px. A caption reads like

    person, purple bun, brown skin, smiling, glasses, blue clothes, toon style, on pink
"""
import functools
import io
import json
import re
import zipfile
from pathlib import Path

from PIL import Image

DATA = Path(__file__).parent / "data"
FIGURES = DATA / "figures.zip"
SIZE = 64
SPLITS = ("train", "val", "test", "unseen")     # unseen: hair shapes that occur nowhere else
# DiceBear style -> its words in captions
STYLES = {"adventurer": "adventurer", "avataaars": "avataaars", "bigEars": "big ears",
          "bigSmile": "big smile", "bottts": "bottts", "dylan": "dylan", "lorelei": "lorelei",
          "micah": "micah", "miniavs": "miniavs", "toonHead": "toon"}
ARTISTIC_STYLE = "pixelArt"                     # the base has never seen it
PARTS = ("hair", "skin", "clothes", "robot")    # parts with a colour of their own
# part -> colour word in captions -> RGB
COLOURS = {
    "hair": {"black": "1b1b1f", "brown": "5a3825", "red": "c93305", "orange": "e8762c",
             "blond": "e6c170", "grey": "a9a9ad", "white": "f4f1ec", "blue": "3d7bd9",
             "green": "4f9d4f", "pink": "f08bb4", "purple": "8a4fbe"},
    "skin": {"pale": "fbe3d3", "light": "f2c9a5", "tan": "d9a066", "brown": "a86b3c",
             "dark": "6b3f24"},
    "clothes": {"red": "d8433b", "orange": "f08a3c", "yellow": "f2c94c", "green": "4caf6a",
                "blue": "4a86d9", "purple": "8e5bc0", "pink": "f29abf", "white": "f7f7f7",
                "grey": "9aa0a6", "black": "2b2b30"},
    "robot": {"red": "e53935", "orange": "fb8c00", "yellow": "fdd835", "green": "43a047",
              "teal": "00897b", "blue": "1e88e5", "purple": "8e24aa", "pink": "d81b60",
              "grey": "757575", "brown": "6d4c41"},
    "ground": {"white": "ffffff", "grey": "bebebe", "cream": "faf0d2", "pink": "fac8d2",
               "pale blue": "bedcfa", "pale green": "c8ebc8", "yellow": "fae178",
               "teal": "3c9696", "navy": "1e285a"},
}
# Word in captions -> pattern of DiceBear's "key value" in lower case; the first match counts.
HAIR_WORDS = {
    "bun": "bun", "mohawk": "mohawk|mrt", "afro": "fro", "braids": "braid|dread",
    "pony tail": "ponytail|pigtails", "hijab": "hijab", "turban": "turban",
    "hat": "hat|cap|beanie", "bald": "bald|nohair|mrclean", "curly hair": "curl",
    "spiky hair": "spik", "bob": "bob", "long hair": "long|straight", "short hair": "short"}
HEADWEAR = ("hijab", "turban", "hat", "bald")   # these hide the colour of the hair
EXPRESSIONS = {
    "laughing": "mouth laugh", "smiling": "(mouth|mood) .*(smile|happy|twinkle)",
    "sad": "(mouth|mood) .*(sad|frown)", "angry": "(mouth|mood) angry",
    "surprised": "surprise|agape|scream"}
EXTRAS = {
    "winking": "eyes wink", "sunglasses": "sunglasses|wayfarers", "eyepatch": "eyepatch",
    "glasses": "^glasses |(accessories|eyes) (glasses|prescription|kurt)|accessories round",
    "face mask": "mask", "earrings": "^earrings ", "beard": "beard|facialhair (full|goatee|chin)",
    "moustache": "mustache|moustache"}
TOPS = {"antenna": "antenna", "horns": "horns", "radar": "radar", "spike": "pyramid",
        "lights": "lights", "bulb": "bulb"}     # of robots


def rgb(part, name):
    """The colour `name` of a part as three numbers 0 to 255."""
    return tuple(bytes.fromhex(COLOURS[part][name]))


# ---- captions ------------------------------------------------------------------------------

def first_word(words, parts):
    """The first word of a table whose pattern matches one of DiceBear's parts, or None."""
    return next((word for word, pattern in words.items()
                 if any(re.search(pattern, part) for part in parts)), None)


def describe(parts, hair_key):
    """The words of captions for DiceBear's parts (a dict): {shape: .., features: [..]}."""
    texts = [f"{key} {value}".lower() for key, value in parts.items()]
    extras = [word for word, pattern in EXTRAS.items()
              if any(re.search(pattern, text) for text in texts)]
    return dict(shape=first_word(HAIR_WORDS | TOPS, [str(parts.get(hair_key, "")).lower()]),
                features=[word for word in (first_word(EXPRESSIONS, texts), *extras) if word])


def phrases(figure):
    """The phrases of a caption apart from kind, style and ground: colours, shapes, features."""
    shape = figure["shape"]
    found = []
    if "hair" in figure:
        found.append(f"{figure['hair']} {'hair' if shape in (None, *HEADWEAR) else shape}")
    if shape in HEADWEAR or (shape and "robot" in figure):
        found.append(shape)
    found += [f"{figure[part]} {part}" for part in ("skin", "clothes") if part in figure]
    return found + figure["features"]


def kind(figure):
    """The first word of a caption: person, or a robot with its colour."""
    return f"{figure['robot']} robot" if "robot" in figure else "person"


def vary_caption(figure, rng):
    """A random caption of a figure: it leaves out some phrases and changes their order."""
    kept = [phrase for phrase in phrases(figure) if rng.random() < 0.75]
    rng.shuffle(kept)
    if rng.random() < 0.8:
        kept.insert(rng.integers(len(kept) + 1), f"{STYLES[figure['style']]} style")
    if figure["ground"] != "white" or rng.random() < 0.3:
        kept.append(f"on {figure['ground']}")
    return ", ".join([kind(figure), *kept])


def full_caption(figure):
    """A caption with all phrases, in a fixed order."""
    return ", ".join([kind(figure), *phrases(figure), f"{STYLES[figure['style']]} style",
                      f"on {figure['ground']}"])


def style_captions():
    """A caption for each style, which names the kind and the style only."""
    return [f"{'robot' if style == 'bottts' else 'person'}, {words} style"
            for style, words in STYLES.items()]


def prompt(figure):
    """A caption with kind, colours, style and ground; a condition gives the shapes."""
    colours = [f"{figure[part]} {part}" for part in ("hair", "skin", "clothes") if part in figure]
    style = [f"{STYLES[figure['style']]} style"] if figure["style"] in STYLES else []
    return ", ".join([kind(figure), *colours, *style, f"on {figure['ground']}"])


# ---- the figures of the tasks --------------------------------------------------------------

@functools.cache
def figures(split=None, styles=tuple(STYLES)):
    """Rows of figures.jsonl as dicts. split: one of SPLITS, or None for all of them."""
    rows = map(json.loads, (DATA / "figures.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["style"] in styles and split in (None, row["split"])]


@functools.cache
def _archive():
    return zipfile.ZipFile(FIGURES)


@functools.cache
def open_part(folder, name):
    """A PIL image of a figure. folder: picture (RGB), drawing (L), hand (L) or parts (P)."""
    image = Image.open(io.BytesIO(_archive().read(f"{folder}/{name}.png")))
    image.load()
    return image


@functools.cache
def figure(name):
    """The row of figures.jsonl with this name."""
    return next(row for row in figures(None, (*STYLES, ARTISTIC_STYLE)) if row["name"] == name)
