"""A user's own pairs: a folder, or a .zip of one, in any of three layouts, and what is wrong there.

    prompt.json         a line {"source", "target", "prompt"} a pair, as in fill50k
    metadata.jsonl      a line {"file_name", "text", "conditioning_image"} a pair (imagefolder)
    images/, conditions/        files of the same names, with captions in images/NAME.txt

A prompt or text may be a list, a .txt may have several lines: several captions of one picture, as
several lines of a listing for one pair are. Where conditions are extracted from the images,
conditions need not be there, and images may also lie in the folder itself.

    pairs, problems = find_pairs(Source("my_pairs.zip"))
"""
import hashlib
import io
import json
import posixpath
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import ImageOps
from tqdm import tqdm

from inputs.conditions import TASKS, UserError, class_colours, load_image, open_image, open_label_map

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
LISTINGS = {"prompt.json": (("source",), "target", "prompt"),
            "metadata.jsonl": (("conditioning_image", "conditioning_image_file_name"),
                               "file_name", "text")}    # keys of condition, image, caption
SAME_SHAPE = 0.02               # how far the aspect ratios of a pair may differ
MANY_CLASSES = 64               # in all maps; more may be shades
MOST_BYTES = 2**28              # of one file in a .zip, unpacked


class Source:
    """A folder, or a .zip of one: the names of its files, with / between, and their bytes."""

    def __init__(self, path):
        """Errors: UserError where the path is neither."""
        self.path, self.archive, self.top = Path(path), None, ""
        if self.path.is_dir():
            names = [file.relative_to(path).as_posix() for file in self.path.rglob("*")
                     if file.is_file()]
        elif self.path.is_file():
            try:
                self.archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(f"{path}: not a .zip ({error}); --data takes a folder of pairs, "
                                f"or a .zip of one") from None
            names = [entry.filename for entry in self.archive.infolist() if not entry.is_dir()]
        else:
            raise UserError(f"{path}: no such folder; --data takes a folder of pairs, or a .zip")
        names = [name for name in names if not any(
            part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)]
        tops = {PurePosixPath(name).parts[0] for name in names}
        if self.archive and len(tops) == 1 and not any(name in tops for name in names):
            self.top = f"{tops.pop()}/"                 # the folder itself was packed
        self.names = {name.removeprefix(self.top) for name in names}

    def where(self, name):
        """Returns what to call a file in messages."""
        return f"{self.path}/{name}"

    def open(self, name):
        """Returns a binary file. Errors: UserError where a .zip is damaged, locked or a bomb."""
        if not self.archive:
            return open(self.path / name, "rb")
        try:
            if self.archive.getinfo(self.top + name).file_size > MOST_BYTES:
                raise UserError(f"{self.where(name)}: more than {MOST_BYTES:,} bytes unpacked, "
                                f"which may be meant to fill the memory")
            return io.BytesIO(self.archive.read(self.top + name))
        except (RuntimeError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise UserError(f"{self.where(name)}: cannot be unpacked ({error})") from None

    def text(self, name):
        """Returns a text file's content; UTF-8, with or without a byte order mark."""
        with self.open(name) as file:
            try:
                return file.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"{self.where(name)}: not UTF-8 ({error}); save it as "
                                f"UTF-8") from None

    def captions(self, image):
        """Returns the captions of an image: the lines of NAME.txt beside it that are not blank."""
        text = str(PurePosixPath(image).with_suffix(".txt"))
        lines = self.text(text).splitlines() if text in self.names else []
        return tuple(line.strip() for line in lines if line.strip())

    def images(self, folder="."):
        """Returns ({name without suffix: name} of the images in a folder of it, problems)."""
        files, problems = {}, []
        for name in sorted(self.names):
            file = PurePosixPath(name)
            if str(file.parent) != folder or file.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if file.stem in files:
                problems.append(f"{self.where(files[file.stem])} and {file.name}: which one? names "
                                f"must differ in more than the suffix")
            files[file.stem] = name
        return files, problems

    def image(self, name):
        """Returns the RGB image of a file."""
        with self.open(name) as file:
            return open_image(file, self.where(name))

    def condition(self, name, task):
        """Returns the condition picture of a file: RGB, or of mode P where it is a label map."""
        if not TASKS[task].has_labels:
            return self.image(name)
        with self.open(name) as file:
            return open_label_map(file, self.where(name), any_colours=task == "layout")


class OwnPair(NamedTuple):
    """Names in a Source. cond is the image itself where conditions are extracted."""
    cond: str
    image: str
    prompts: tuple


def find_pairs(source, extract=False):
    """Returns (pairs, problems): a list of OwnPair, and a line for each thing that is wrong."""
    for listing, keys in LISTINGS.items():
        if listing in source.names:
            return _listed_pairs(source, listing, keys, extract)
    images, problems = source.images("images")
    if extract and not images:
        images, problems = source.images()
    conds, more = (images, []) if extract else source.images("conditions")
    problems += more
    pairs = []
    for stem in sorted(conds.keys() | images.keys()):
        for there, folder in ((conds, "conditions"), (images, "images")):
            if stem not in there:
                problems.append(f"{source.where(folder)}/{stem}.*: missing, so that {stem} is not "
                                f"in both conditions/ and images/; read are "
                                f"{', '.join(IMAGE_SUFFIXES)}")
        if stem in conds and stem in images:
            prompts = ()
            try:
                prompts = source.captions(images[stem])
            except UserError as error:
                problems.append(str(error))
            pairs.append(OwnPair(conds[stem], images[stem], prompts))
    if not pairs and not problems:
        problems.append(f"{source.path}: no pairs; allowed are prompt.json (fill50k), "
                        f"metadata.jsonl (imagefolder) or the folders images/ and conditions/; "
                        f"with --extract, images alone")
    return pairs, problems


def _listed_pairs(source, listing, keys, extract):
    """Returns the pairs of a file with one JSON object a line, and its problems by line."""
    captions, problems = {}, []
    text = source.text(listing)
    if text.lstrip().startswith("["):
        return [], [f"{source.where(listing)}: a JSON array; wanted is one object a line, without "
                    f"brackets and commas around"]
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{source.where(listing)}, line {number}"
        try:
            names, prompts = _read_row(json.loads(line), keys, extract)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{place}: not a JSON object with the keys "
                            f"{keys[0][0]}, {keys[1]}, {keys[2]} ({error})")
            continue
        wrong = [f"{name} leaves the folder; only files in it are read"
                 if name.startswith(("../", "/")) or name[1:2] == ":" else
                 f"{source.where(name)} does not exist"
                 for name in names if name not in source.names]
        problems += [f"{place}: {words}" for words in wrong]
        if not wrong:
            captions.setdefault((names[0], names[-1]), []).extend(prompts)
    if not captions and not problems:
        problems.append(f"{source.where(listing)}: no pairs in it")
    return [OwnPair(*names, tuple(dict.fromkeys(prompts)))
            for names, prompts in captions.items()], problems


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
    return [posixpath.normpath(name.replace("\\", "/")) for name in names], prompts


def groups(pairs):
    """Returns a name for each pair; pairs that share a condition or an image have the same one.

    They must not be on two sides of a split.
    """
    leader = {}

    def find(name):
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for pair in pairs:
        leader[find(f"image {pair.image}")] = find(pair.cond)
    return [find(pair.cond) for pair in pairs]


def same_shape(a, b):
    """Returns whether two images have the same aspect ratio, but for rounding."""
    return abs(a.width * b.height / (a.height * b.width) - 1) < SAME_SHAPE


def other_shape(name, cond, image):
    """Returns the line that says that a condition does not fit its picture."""
    return (f"{name}: {cond.width} x {cond.height} px, but its picture has {image.width} x "
            f"{image.height} px; crop both to one shape")
