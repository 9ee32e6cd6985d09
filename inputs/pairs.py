"""A user's own pairs: a folder in any of three layouts, and what is wrong with it.

    prompt.json         per line {"source", "target", "prompt"}, as in fill50k
    metadata.jsonl      per line {"file_name", "text", "conditioning_image"}, as in imagefolder
    images/, conditions/        files of the same names, with captions in images/NAME.txt

Keys may be in any case, and a caption under any of CAPTION_KEYS. A caption may be a list, and a
file of captions may have several lines: these are several captions of one picture, and so are
several lines of a listing for one pair. If conditions are extracted from the images, conditions
need not be there, and images may also lie in the folder itself. Sub-folders and links are followed.

    pairs, problems, unused = find_pairs("my_pairs")
"""
import functools
import json
import os
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from weights import UserError

NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")        # known to Pillow, but not read
CAPTION_SUFFIXES = (".txt", ".caption")
LISTINGS = {"prompt.json": (("source",), "target"),
            "metadata.jsonl": (("conditioning_image", "conditioning_image_file_name"),
                               "file_name")}            # keys of condition and image
CAPTION_KEYS = ("text", "prompt", "caption", "description")
RUN_FILE = "args.json"          # in the folder of a training
LEFT_BY_SYSTEMS = (".", "__macosx", "thumbs.db", "desktop.ini")     # beginnings of names
SAME_SHAPE = 0.02               # how far the aspect ratios of a pair may differ


class PairFiles(NamedTuple):
    """The files of a pair. cond is the image itself if conditions are extracted."""
    cond: Path
    image: Path
    prompts: tuple


class FolderFiles(NamedTuple):
    """What lies in a folder of images, by name: the path in it without suffix, accents composed."""
    images: dict                # {name: file}
    captions: dict              # {name: files}
    problems: list


def check_folder(folder):
    """Raises UserError if there is no such folder of pairs."""
    if folder.suffix.lower() == ".zip" and folder.is_file():
        raise UserError(f"{folder}: a .zip is not read; unpack it and give the folder")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --data takes a folder of pairs")


def walk(folder, visited=None):
    """Yields the files in a folder and its sub-folders, sorted; links are followed, once each.

    What systems leave behind and the folders of trainings are left out. visited: the folders,
    without links, that are not to be entered again; at first those that this one lies in.
    """
    real = Path(os.path.realpath(folder))
    if visited is None:
        parent = Path(os.path.realpath(folder.parent))          # of a link, not of what it links to
        visited = {*real.parents, parent, *parent.parents}
    if not folder.is_dir() or real in visited or (folder / RUN_FILE).exists():
        return
    visited.add(real)
    for entry in sorted(folder.iterdir()):
        if entry.name.lower().startswith(LEFT_BY_SYSTEMS):
            continue
        if entry.is_dir():
            yield from walk(entry, visited)
        else:
            yield entry


@functools.cache
def image_suffixes():
    """Returns the suffixes of pictures that Pillow reads, in lower case."""
    return {suffix for suffix, kind in Image.registered_extensions().items()
            if kind in Image.OPEN and kind not in NO_PICTURES}


def name_in(folder, file):
    """Returns a file's path in a folder as text, with accents composed.

    Systems differ in whether an accent is part of its letter or a character that follows it.
    """
    return unicodedata.normalize("NFC", file.relative_to(folder).as_posix())


def read_text(file):
    """Returns a text file's content; UTF-8, with or without a byte order mark. Errors: UserError.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error}); save it as UTF-8") from None


def read_captions(files):
    """Returns the captions in files of an image: their lines that are not blank."""
    lines = [line.strip() for file in files for line in read_text(file).split("\n")]
    return tuple(dict.fromkeys(line for line in lines if line))


def list_files(folder):
    """Returns the FolderFiles of a folder; there may be none."""
    images, captions, problems = {}, {}, []
    for file in walk(folder):
        name = name_in(folder, file.with_suffix(""))
        if file.suffix.lower() in CAPTION_SUFFIXES:
            captions.setdefault(name, []).append(file)
        elif file.suffix.lower() in image_suffixes():
            if name in images:
                problems.append(f"{images[name]} and {file.name}: which one? names must differ in "
                                f"more than the suffix, or the spelling of an accent")
            images[name] = file
    return FolderFiles(images, captions, problems)


def find_pairs(folder, extract=False):
    """Returns (pairs, problems, unused) of a folder.

    pairs: a list of PairFiles. problems: a line for each thing that is wrong. unused: the files in
    the folder that belong to no pair. Errors: UserError if there is no such folder.
    """
    folder = Path(folder)
    check_folder(folder)
    listings = {file.name.lower(): file for file in folder.iterdir()}
    listing = next((listings[name] for name in LISTINGS if name in listings), None)
    if listing:
        pairs, problems = _listed_pairs(folder, listing, extract)
        captions = [listing]
    else:
        pairs, problems, captions = _named_pairs(folder, extract)
    read = {file for pair in pairs for file in (pair.cond, pair.image)}.union(captions)
    unused = [file for file in walk(folder) if file not in read]
    if extract:
        unused = [file for file in unused if not file.is_relative_to(folder / "conditions")]
    return pairs, problems, unused


def warn_of_losses(folder, extract, default_prompt):
    """Warns of files in a user's folder that are not read, and of captions that most pairs lack."""
    files, _, unused = find_pairs(folder, extract)
    if unused:
        warnings.warn(f"{folder}: files that belong to no pair: {len(unused)}, such as "
                      f"{unused[0]}; --check-data names them")
    without_caption = sum(not pair.prompts for pair in files)
    if without_caption > len(files) / 2 and not default_prompt:
        warnings.warn(f"{folder}: {without_caption} of {len(files)} pairs have no caption and "
                      f"train on an empty prompt; give --default-prompt, or captions in NAME.txt "
                      f"or NAME.caption beside the image, or in a listing as "
                      f"{', '.join(CAPTION_KEYS)}")


def _named_pairs(folder, extract):
    """Returns (pairs, problems, files of captions) of images/ and conditions/ of the same names."""
    files = list_files(folder / "images")
    if extract and not files.images:
        files = list_files(folder)
    images, conds, problems = files.images, files.images, list(files.problems)
    if not extract:
        conds, _, cond_problems = list_files(folder / "conditions")
        problems += cond_problems
    pairs, captions = [], []
    for name in sorted(conds.keys() | images.keys()):
        for part, part_files in (("conditions", conds), ("images", images)):
            if name not in part_files:
                problems.append(f"{folder / part}/{name}.*: missing, so that {name} is not in both "
                                f"conditions/ and images/")
        if name in conds and name in images:
            prompts, caption_files = (), files.captions.get(name, [])
            captions += caption_files
            try:
                prompts = read_captions(caption_files)
            except UserError as error:
                problems.append(str(error))
            pairs.append(PairFiles(conds[name], images[name], prompts))
    if not pairs and not problems:
        problems.append(f"{folder}: no pairs; allowed are prompt.json (fill50k), metadata.jsonl "
                        f"(imagefolder) or the folders images/ and conditions/; with --extract, "
                        f"images alone")
    return pairs, problems, captions


def _listed_pairs(folder, listing, extract):
    """Returns the pairs of a file with one JSON object per line, and its problems by line."""
    captions, problems = {}, []
    text = read_text(listing)
    if text.lstrip().startswith("["):
        return [], [f"{listing}: a JSON array; it must be one object per line, without "
                    f"brackets and commas around"]
    files = {name_in(folder, file): file for file in walk(folder)}
    cond_keys, image_key = LISTINGS[listing.name.lower()]
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{listing}, line {number}"
        try:
            names, prompts = _read_row(json.loads(line), cond_keys, image_key, extract)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"{place}: not a JSON object with the keys {cond_keys[0]}, "
                            f"{image_key}, {' or '.join(CAPTION_KEYS)} ({error})")
            continue
        try:
            pair = tuple(_find(folder, name, files) for name in (names[0], names[-1]))
        except ValueError as error:
            problems.append(f"{place}: {error}")
            continue
        captions.setdefault(pair, []).extend(prompts)
    if not captions and not problems:
        problems.append(f"{listing}: no pairs in it")
    return [PairFiles(cond, image, tuple(dict.fromkeys(prompts)))
            for (cond, image), prompts in captions.items()], problems


def _find(folder, name, files):
    """Returns the file that a listing names. Errors: ValueError says what is wrong with it."""
    if name.startswith(("../", "/")) or name[1:2] == ":":
        raise ValueError(f"{name} leaves the folder; only files in it are read")
    file = folder / name
    if not file.is_file():
        file = files.get(unicodedata.normalize("NFC", name))
    if file is None:
        raise ValueError(f"{folder / name} does not exist")
    return file


def _read_row(row, cond_keys, image_key, extract):
    """Returns (names of condition, unless extracted, and image; captions) of a listing's line."""
    row = {key.lower(): value for key, value in row.items()}
    names = [row[image_key]]
    if not extract:
        names.insert(0, row[next((key for key in cond_keys if key in row), cond_keys[0])])
    prompts = next((row[key] for key in CAPTION_KEYS if row.get(key)), [])
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list):
        raise TypeError(f"{prompts!r} is no caption")
    for text in (*names, *prompts):
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is no text")
        text.encode("utf-8")            # JSON can escape what is no Unicode: a ValueError
    names = [os.path.normpath(name.replace("\\", "/")) for name in names]
    return names, [prompt.strip() for prompt in prompts if prompt.strip()]


def group_pairs(folder, pairs):
    """Returns a name for each pair; pairs that share a condition or an image have the same one.

    They must not be on two sides of a split. The names leave out the folder, which may be moved.
    """
    leaders = {}

    def leader(file):
        name = name_in(folder, file)
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
