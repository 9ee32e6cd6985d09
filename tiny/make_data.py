"""Rebuilds tiny/data from emoji sets of the npm registry: 64 px PNGs in zips and metadata.jsonl.

Only this script needs more than requirements.txt: `pip install resvg-py`, and npm on the PATH.

    python -m tiny.make_data            # writes tiny/data, which is committed: nobody has to

A picture keeps its alpha, so that it can be pasted on any ground. Its colours are rounded to six
bits per channel (at most 2 of 255 off), which saves a third of the bytes.
"""
import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from inputs.options import Parser, run
from tiny import world
from weights import UserError, replacing, write_lines

# style word in captions -> npm package, pinned
PACKAGES = {
    "3d": "@iconify-json/fluent-emoji@1.2.7",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "line": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojitwo": "@iconify-json/emojione@1.2.3",
    "firefox": "@iconify-json/fxemoji@1.2.2",
}
# categories of the set, in the order of world.CATEGORIES
CATEGORIES = ("Food & Drink", "Animals & Nature", "Objects", "Travel & Places", "Activities",
              "Smileys & Emotion")
# Names of symbols, and of pictures whose point is text.
LEFT_OUT = {
    "anger-symbol", "hundred-points", "zzz", "eye-in-speech-bubble", "left-speech-bubble",
    "right-anger-bubble", "speech-balloon", "thought-balloon", "face-with-symbols-on-mouth", "dvd",
    "chart-increasing-with-yen", "japanese-post-office", "globe-with-meridians", "love-hotel",
    "heart-decoration", "heart-exclamation", "high-voltage", "bus-stop", "label",
}
# Captions of names whose hyphens are not spaces, or that lack an accented letter.
SPELLING = {"e-mail": "e-mail", "t-shirt": "t-shirt", "x-ray": "x-ray", "t-rex": "t-rex",
            "yo-yo": "yo-yo", "jack-o-lantern": "jack-o-lantern", "piata": "pinata"}
TEST_SHARE, VAL_SHARE = 0.16, 0.06


def check_tools():
    """Raises UserError if this machine lacks what requirements.txt does not bring."""
    if importlib.util.find_spec("resvg_py") is None:
        raise UserError("resvg-py is not installed; pip install resvg-py")
    if shutil.which("npm") is None:
        raise UserError("npm is not on the PATH; it comes with Node.js")


def fetch(package, folder):
    """Returns (icons.json, metadata.json) of an npm package as dicts, unpacked by `npm pack`.

    Errors: UserError if npm cannot fetch it.
    """
    process = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True,
                             text=True)
    if process.returncode:
        raise UserError(f"{package}: npm cannot fetch it ({process.stderr.strip()})")
    with tarfile.open(Path(folder) / process.stdout.split()[-1]) as tar:
        names = tar.getnames()
        return [json.load(tar.extractfile(f"package/{part}.json"))
                if f"package/{part}.json" in names else {} for part in ("icons", "metadata")]


def choose_names(metadata):
    """Returns {name: category word} of the things in the line-drawing set, sorted.

    Clocks are left out, as they differ by a hand only.
    """
    return dict(sorted((name, word) for category, word in zip(CATEGORIES, world.CATEGORIES)
                       for name in metadata["categories"][category]
                       if name not in LEFT_OUT and not name.endswith(("-oclock", "-thirty"))))


def split_of(name):
    """Returns train, val or test, as a fixed function of the name, so the same for all styles."""
    u = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "test" if u < TEST_SHARE else "val" if u < TEST_SHARE + VAL_SHARE else "train"


def find_icon(icons, name):
    """Returns the icon with this name or alias in a set, or None if there is none.

    fxemoji writes names without hyphens.
    """
    for candidate in (name, name.replace("-", "")):
        candidate = icons.get("aliases", {}).get(candidate, {}).get("parent", candidate)
        if candidate in icons["icons"]:
            return icons["icons"][candidate]
    return None


def render(icons, icon):
    """Returns the icon as the bytes of a PNG, RGBA."""
    import resvg_py
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'viewBox="{left} {top} {width} {height}" width="{world.SIZE}" height="{world.SIZE}">'
           f'{icon["body"]}</svg>')
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    pixels = np.asarray(image).astype(int)
    rounded = np.clip((pixels + 2) // 4 * 4, 0, 255)
    rounded[pixels == 255] = 255                       # white stays white, opaque stays opaque
    rounded[rounded[..., 3] == 0] = 0                  # colour under zero alpha costs bytes only
    file = io.BytesIO()
    Image.fromarray(rounded.astype(np.uint8)).save(file, "PNG", optimize=True)
    return file.getvalue()


def main():
    """Fetches, renders and writes all of tiny/data."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=world.DATA, help="(default: tiny/data)")
    args = parser.parse_args()
    check_tools()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sets = {style: fetch(package, folder) for style, package in PACKAGES.items()}
    names = choose_names(sets["line"][1])
    rows = []
    for style, (icons, _) in sets.items():
        with (replacing(args.out / f"{style}.zip") as temporary,
              zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive):
            for name, category in tqdm(names.items(), desc=style):
                icon = find_icon(icons, name)
                if icon is None:
                    continue
                entry = zipfile.ZipInfo(f"{name}.png")         # a fixed date: same bytes each time
                archive.writestr(entry, render(icons, icon))
                caption = SPELLING.get(name, name.replace("-", " "))
                rows.append(dict(name=name, caption=caption, category=category, style=style,
                                 split=split_of(name)))
    write_lines(rows, args.out / "metadata.jsonl")
    print(f"{len(names)} names, {len(rows)} pictures -> {args.out}")


if __name__ == "__main__":
    run(main)
