"""A user's own pairs: find them in a folder of any of three layouts, and name what is wrong.

    prompt.json         one {"source", "target", "prompt"} per line, as in fill50k
    metadata.jsonl      one {"file_name", "text", "conditioning_image"} per line, as in imagefolder
    images/, conditions/        files of the same names, with captions in images/NAME.txt

Keys may be in any case, and a caption may have any of CAPTION_KEYS. A picture has several captions
if its caption is a list, its text file has several lines, or several lines of a listing name the
pair. If conditions are extracted from the images, only images are needed, which may also be in the
folder itself. Subfolders and links are followed. Generation parameters and boxes, which other
programs write into NAME.txt, are not captions.

    pairs, problems, unused = find_pairs("my_pairs")
"""
import itertools
import json
import os
import re
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

from inputs.conditions import LABELS_NOTE, load_image, looks_like_label_map
from inputs.files import read_utf8
from weights import MALFORMED, UserError

IMAGE_SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff",
                  ".bmp", ".gif", ".avif", ".avifs")
# pictures too, which are refused by name unless one that is read has the same name
UNREAD_SUFFIXES = (".heic", ".heif", ".jxl", ".jp2", ".svg", ".eps", ".tga", ".ppm", ".pgm", ".exr",
                   ".dng", ".cr2", ".cr3", ".nef", ".arw")
CAPTION_SUFFIXES = (".txt", ".caption")
# of AUTOMATIC1111
PARAMETERS = re.compile(r"negative prompt:|steps: \d+, [a-z ]+:", re.IGNORECASE)
NUMBER = r"-?[\d.]+(e[+-]?\d+)?"
# of YOLO: a class and its coordinates
BOX = re.compile(rf"\S+(\s+{NUMBER}){{4,}}|\d+(,{NUMBER}){{4,}}")
LISTINGS = {"prompt.json": ("source", "target"),           # keys of condition and image
            "metadata.jsonl": ("conditioning_image", "file_name")}
CAPTION_KEYS = ("text", "prompt", "caption", "description")
NO_CAPTIONS = "lines of NAME.txt are parameters or boxes of other programs, not captions."
RUN_FILE = "args.json"          # in the folder of a training
# beginnings of names; network disks keep thumbnails and deleted files beside the pictures
SYSTEM_FILES = (".", "@eadir", "@recycle", "@__thumb", "@tmp", "__macosx", "thumbs.db",
                "ehthumbs", "desktop.ini", "#recycle", "#snapshot", "$recycle.bin",
                "network trash folder", "system volume information", "lost+found")
SAME_SHAPE = 0.02               # how far the aspect ratios of a pair may differ


class PairFiles(NamedTuple):
    """The files of a pair. cond is the image itself if conditions are extracted."""
    cond: Path
    image: Path
    prompts: tuple = ()
    other_lines: int = 0        # of the image's text files, which are no captions


class FolderFiles(NamedTuple):
    """The files in a folder of images. A name is a path in it without suffix, accents composed."""
    images: dict                # {name: file}
    captions: dict              # {name: files}
    problems: list


def walk(folder, visited=None):
    """Yield the files in a folder and its subfolders, sorted; links are followed, once each.

    System files and the folders of trainings are left out. visited: the real paths of folders that
    are not entered again; at first the folder's parents.
    """
    real = Path(os.path.realpath(folder))
    if visited is None:
        # of a link, not of its target; "." and ".." have one, too
        parent = Path(os.path.realpath(os.path.dirname(os.path.abspath(folder))))
        visited = {*real.parents, parent, *parent.parents}
    if not folder.is_dir() or real in visited or (folder / RUN_FILE).exists():
        return
    visited.add(real)
    for entry in sorted(folder.iterdir()):
        if entry.name.lower().startswith(SYSTEM_FILES):
            continue
        if entry.is_dir():
            yield from walk(entry, visited)
        else:
            yield entry


def name_in(folder, file):
    """A file's path in a folder as text, with accents composed.

    Systems differ in whether an accent is part of its letter or a character that follows it.
    """
    return unicodedata.normalize("NFC", file.relative_to(folder).as_posix())


def read_captions(files):
    """(captions, number of other lines) of an image's text files; blank lines don't count."""
    captions, count = [], 0
    for file in files:
        lines = [line.strip() for line in read_utf8(file).split("\n") if line.strip()]
        count += len(lines)
        captions += itertools.takewhile(lambda line: not PARAMETERS.match(line), lines)
    captions = [line for line in captions if not BOX.fullmatch(line)]
    return tuple(dict.fromkeys(captions)), count - len(captions)


def list_files(folder):
    """The FolderFiles of a folder, which may be missing."""
    images, captions, unread, problems = {}, {}, {}, []
    for file in walk(folder):
        name, suffix = name_in(folder, file.with_suffix("")), file.suffix.lower()
        if suffix in CAPTION_SUFFIXES:
            captions.setdefault(name, []).append(file)
        elif suffix in IMAGE_SUFFIXES:
            if name in images:
                problems.append(f"{images[name]} and {file.name} have the same name. Names must "
                                f"differ in more than the suffix or the spelling of an accent.")
            images[name] = file
        elif suffix in UNREAD_SUFFIXES:
            unread[name] = file
    return FolderFiles(unread | images, captions, problems)


def find_pairs(folder, extract=False):
    """(pairs, problems, unused) of a folder.

    pairs: a list of PairFiles. problems: a line for each thing that is wrong. unused: the files in
    the folder that belong to no pair.
    """
    folder = Path(folder)
    if not folder.is_dir():
        fix = " Unpack it." if folder.suffix.lower() == ".zip" else ""
        raise UserError(f"--data must be a folder of pairs, got {folder}.{fix}")
    listings = {file.name.lower(): file for file in folder.iterdir()}
    listing = next((listings[name] for name in LISTINGS if name in listings), None)
    if listing:
        pairs, problems = _listed_pairs(folder, listing, extract)
        captions = [listing]
    else:
        pairs, problems, captions = _named_pairs(folder, extract)
    used = {file for pair in pairs for file in (pair.cond, pair.image)}.union(captions)
    unused = [file for file in walk(folder) if file not in used]
    if extract:
        unused = [file for file in unused if not file.is_relative_to(folder / "conditions")]
    return pairs, problems, unused


def warn_of_losses(folder, extract, default_prompt, task_name="sketch"):
    """Warn of what is not read of a user's folder, of missing captions, and of a forgotten task."""
    pairs, _, unused = find_pairs(folder, extract)
    if unused:
        warnings.warn(f"{folder}: {len(unused)} files belong to no pair, such as {unused[0]}. "
                      f"--check-data lists them.")
    if other_lines := sum(pair.other_lines for pair in pairs):
        warnings.warn(f"{folder}: {other_lines} {NO_CAPTIONS}")
    without_caption = sum(not pair.prompts for pair in pairs)
    if without_caption > len(pairs) / 2 and not default_prompt:
        warnings.warn(f"{folder}: {without_caption} of {len(pairs)} pairs have no caption and "
                      f"train with an empty prompt. Give --default-prompt, or captions in NAME.txt "
                      f"or NAME.caption beside the image, or in a listing as "
                      f"{', '.join(CAPTION_KEYS)}.")
    if task_name == "sketch" and not extract and looks_like_label_map(load_image(pairs[0].cond)):
        warnings.warn(f"{folder}: {LABELS_NOTE}")


def _named_pairs(folder, extract):
    """(pairs, problems, caption files) of images/ and conditions/ with the same names."""
    files = list_files(folder / "images")
    if extract and not files.images:
        files = list_files(folder)
    images, conds, problems = files.images, files.images, list(files.problems)
    if not extract:
        conds, _, cond_problems = list_files(folder / "conditions")
        problems += cond_problems
    for part, names in (("conditions", images.keys() - conds.keys()),
                        ("images", conds.keys() - images.keys())):
        problems += [f"{folder / part}/{name}.* is missing. Each name must be in both conditions/ "
                     f"and images/." for name in sorted(names)]
    pairs, used = [], []
    for name in sorted(conds.keys() & images.keys()):
        captions, caption_files = (), files.captions.get(name, [])
        try:
            captions = read_captions(caption_files)
        except UserError as error:
            problems.append(str(error))
        pairs.append(PairFiles(conds[name], images[name], *captions))
        used += caption_files
    if not pairs and not problems:
        problems.append(f"{folder} has no pairs. It must contain prompt.json (fill50k), "
                        f"metadata.jsonl (imagefolder) or the folders images/ and conditions/; "
                        f"with --extract, images alone.")
    return pairs, problems, used


def _listed_pairs(folder, listing, extract):
    """(pairs, problems) of a file with one JSON object per line."""
    captions, problems = {}, []
    text = read_utf8(listing)
    if text.lstrip().startswith("["):
        return [], [f"{listing} must have one JSON object per line, got an array. Remove the "
                    f"brackets and the commas between objects."]
    files = {name_in(folder, file): file for file in walk(folder)}
    keys = LISTINGS[listing.name.lower()]
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{listing}, line {number}"
        try:
            names, prompts = _read_row(json.loads(line), keys[1:] if extract else keys)
            pair = tuple(_find(folder, name, files) for name in (names[0], names[-1]))
            captions.setdefault(pair, []).extend(prompts)
        except UserError as error:
            problems.append(f"{place}: {error}")
        except MALFORMED as error:
            problems.append(f"{place} must be a JSON object with the keys {', '.join(keys)}, "
                            f"{' or '.join(CAPTION_KEYS)} ({error}).")
    if not captions and not problems:
        problems.append(f"{listing} has no pairs.")
    return [PairFiles(cond, image, tuple(dict.fromkeys(prompts)))
            for (cond, image), prompts in captions.items()], problems


def _find(folder, name, files):
    """The file that a listing names. files: {name in the folder: file}."""
    if name.startswith(("../", "/")) or name[1:2] == ":":
        raise UserError(f"{name} is outside the folder. Only files inside it are read.")
    file = folder / name
    if not file.is_file():
        file = files.get(unicodedata.normalize("NFC", name))
    if file is None:
        raise UserError(f"{folder / name} is missing.")
    return file


def _read_row(row, keys):
    """(file names, captions) of a listing's line. keys: of the names."""
    row = {key.lower().removesuffix("_file_name"): value for key, value in row.items()}
    names = [row[key] for key in keys]
    prompts = next((row[key] for key in CAPTION_KEYS if row.get(key)), [])
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list):
        raise TypeError(f"{prompts!r} is no caption")
    for text in (*names, *prompts):
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is no text")
        text.encode("utf-8")            # JSON can escape surrogates: a ValueError
    names = [os.path.normpath(name.replace("\\", "/")) for name in names]
    return names, [prompt.strip() for prompt in prompts if prompt.strip()]


def group_pairs(folder, pairs):
    """Group key per pair. Pairs that share a file must end up in the same split.

    Keys don't contain the folder's own path, so the folder may be moved.
    """
    parents = {}

    def root(file):
        name = name_in(folder, file)
        while parents.setdefault(name, name) != name:
            name = parents[name]
        return name

    # union-find: each pair joins the groups of its image and its condition
    for pair in pairs:
        parents[root(pair.image)] = root(pair.cond)
    return [root(pair.cond) for pair in pairs]


def shape_fault(name, cond, image):
    """What is wrong with a condition whose aspect ratio is not its picture's, or None."""
    if abs(cond.width * image.height / (cond.height * image.width) - 1) < SAME_SHAPE:
        return None
    return (f"{name} must have the aspect ratio of its picture, {image.width} x {image.height} px, "
            f"got {cond.width} x {cond.height} px. Crop both alike.")
