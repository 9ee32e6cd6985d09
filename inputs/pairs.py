"""A user's own pairs: a folder in any of three layouts, and what is wrong with it.

    prompt.json         per line {"source", "target", "prompt"}, as in fill50k
    metadata.jsonl      per line {"file_name", "text", "conditioning_image"}, as in imagefolder
    images/, conditions/        files of the same names, with captions in images/NAME.txt

A prompt or text may be a list, and a .txt may have several lines: these are several captions of one
picture, and so are several lines of a listing for one pair. If conditions are extracted from the
images, conditions need not be there, and images may also lie in the folder itself.

    pairs, problems = find_pairs("my_pairs")
"""
import json
import os
from pathlib import Path
from typing import NamedTuple

from weights import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
LISTINGS = {"prompt.json": (("source",), "target", "prompt"),
            "metadata.jsonl": (("conditioning_image", "conditioning_image_file_name"),
                               "file_name", "text")}    # keys of condition, image, caption
SAME_SHAPE = 0.02               # how far the aspect ratios of a pair may differ


class PairFiles(NamedTuple):
    """The files of a pair. cond is the image itself if conditions are extracted."""
    cond: Path
    image: Path
    prompts: tuple


def check_folder(folder):
    """Raises UserError if there is no such folder of pairs."""
    if folder.suffix.lower() == ".zip" and folder.is_file():
        raise UserError(f"{folder}: a .zip is not read; unpack it and give the folder")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --data takes a folder of pairs")


def read_text(file):
    """Returns a text file's content; UTF-8, with or without a byte order mark. Errors: UserError.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error}); save it as UTF-8") from None


def read_captions(image):
    """Returns the captions of an image: the lines of NAME.txt beside it that are not blank."""
    file = image.with_suffix(".txt")
    lines = read_text(file).splitlines() if file.is_file() else []
    return tuple(line.strip() for line in lines if line.strip())


def list_images(folder):
    """Returns ({name without suffix: file} of the images in a folder, problems)."""
    files, problems = {}, []
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix.lower() not in IMAGE_SUFFIXES or file.name.startswith("."):
            continue
        if file.stem in files:
            problems.append(f"{files[file.stem]} and {file.name}: which one? names must differ in "
                            f"more than the suffix")
        files[file.stem] = file
    return files, problems


def find_pairs(folder, extract=False):
    """Returns (pairs, problems): a list of PairFiles, and a line for each thing that is wrong."""
    folder = Path(folder)
    check_folder(folder)
    for listing, keys in LISTINGS.items():
        if (folder / listing).is_file():
            return _listed_pairs(folder, listing, keys, extract)
    images, problems = list_images(folder / "images")
    if extract and not images:
        images, problems = list_images(folder)
    conds, cond_problems = (images, []) if extract else list_images(folder / "conditions")
    problems += cond_problems
    pairs = []
    for stem in sorted(conds.keys() | images.keys()):
        for files, part in ((conds, "conditions"), (images, "images")):
            if stem not in files:
                problems.append(f"{folder / part}/{stem}.*: missing, so that {stem} is not in both "
                                f"conditions/ and images/; read are {', '.join(IMAGE_SUFFIXES)}")
        if stem in conds and stem in images:
            prompts = ()
            try:
                prompts = read_captions(images[stem])
            except UserError as error:
                problems.append(str(error))
            pairs.append(PairFiles(conds[stem], images[stem], prompts))
    if not pairs and not problems:
        problems.append(f"{folder}: no pairs; allowed are prompt.json (fill50k), metadata.jsonl "
                        f"(imagefolder) or the folders images/ and conditions/; with --extract, "
                        f"images alone")
    return pairs, problems


def _listed_pairs(folder, listing, keys, extract):
    """Returns the pairs of a file with one JSON object per line, and its problems by line."""
    captions, problems = {}, []
    text = read_text(folder / listing)
    if text.lstrip().startswith("["):
        return [], [f"{folder / listing}: a JSON array; wanted is one object per line, without "
                    f"brackets and commas around"]
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{folder / listing}, line {number}"
        try:
            names, prompts = _read_row(json.loads(line), keys, extract)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{place}: not a JSON object with the keys "
                            f"{keys[0][0]}, {keys[1]}, {keys[2]} ({error})")
            continue
        faults = [fault for fault in (_fault(folder, name) for name in names) if fault]
        problems += [f"{place}: {fault}" for fault in faults]
        if not faults:
            captions.setdefault((names[0], names[-1]), []).extend(prompts)
    if not captions and not problems:
        problems.append(f"{folder / listing}: no pairs in it")
    return [PairFiles(folder / cond, folder / image, tuple(dict.fromkeys(prompts)))
            for (cond, image), prompts in captions.items()], problems


def _fault(folder, name):
    """Returns what is wrong with a file name of a listing, or None."""
    if name.startswith(("../", "/")) or name[1:2] == ":":
        return f"{name} leaves the folder; only files in it are read"
    if not (folder / name).is_file():
        return f"{folder / name} does not exist"
    return None


def _read_row(row, keys, extract):
    """Returns (names of condition, unless extracted, and image; captions) of a listing's line."""
    cond_keys, image_key, text_key = keys
    names = [row[image_key]]
    if not extract:
        names.insert(0, row[next((key for key in cond_keys if key in row), cond_keys[0])])
    prompts = row.get(text_key) or ()
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    for text in (*names, *prompts):
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is no text")
    return [os.path.normpath(name.replace("\\", "/")) for name in names], prompts


def group_pairs(folder, pairs):
    """Returns a name for each pair; pairs that share a condition or an image have the same one.

    They must not be on two sides of a split. The names leave out the folder, which may be moved.
    """
    leaders = {}

    def leader(file):
        name = file.relative_to(folder).as_posix()
        while leaders.setdefault(name, name) != name:
            name = leaders[name]
        return name

    # an image is led by a condition; two are one group if they are linked by any pair
    for pair in pairs:
        leaders[leader(pair.image)] = leader(pair.cond)
    return [leader(pair.cond) for pair in pairs]


def same_shape(a, b):
    """Returns whether two images have the same aspect ratio, but for rounding."""
    return abs(a.width * b.height / (a.height * b.width) - 1) < SAME_SHAPE


def shape_fault(name, cond, image):
    """Returns the line that says that a condition does not fit its picture."""
    return (f"{name}: {cond.width} x {cond.height} px, but its picture has {image.width} x "
            f"{image.height} px; crop both to one shape")
