"""What is in a user's own pairs, and what is wrong there: train.py --check-data.

    check_data(args)            # prints it, and writes a sheet of what the network will see
"""
import hashlib
from collections import Counter

import torch
from PIL import ImageOps
from tqdm import tqdm

from clip import load_clip
from data import load_pairs, mostly_light_on_dark, open_pair, split_names
from inputs.conditions import TASKS, class_colours, cond_to_x, load_image
from inputs.pairs import Source, find_pairs, groups, other_shape, same_shape
from measure.report import SHEET_ROWS, contact_sheet
from weights import UserError

MANY_CLASSES = 64               # in all maps; more may be shades


class Survey:
    """Collects what the files of some pairs are, and what is wrong with them."""

    def __init__(self, source, task):
        self.source, self.task, self.problems = source, task, []
        self.sizes, self.modes, self.classes = Counter(), Counter(), Counter()
        self.digests = {}                           # (kind, SHA-256): names
        self.maps_of = {}                           # palette index: {colour: a map that has it}

    def look(self, kind, name):
        """Returns the image of a file, once it is counted; None where it cannot be used."""
        try:
            with self.source.open(name) as file:
                image = ImageOps.exif_transpose(load_image(file, self.source.where(name)))
            if kind == "condition" and TASKS[self.task].has_labels:
                found = class_colours(self.source.condition(name, self.task))
                self.classes.update(list(found))
                for colour, index in found.items():
                    self.maps_of.setdefault(index, {}).setdefault(colour, name)
            with self.source.open(name) as file:
                digest = hashlib.sha256(file.read()).digest()
        except (UserError, OSError) as error:
            self.problems.append(str(error))
            return None
        self.modes[f"{kind} {image.mode}"] += 1
        self.sizes[f"{kind} {image.width} x {image.height}"] += 1
        self.digests.setdefault((kind, digest), []).append(name)
        return image

    def show(self):
        """Prints sizes, modes, classes and duplicates; palettes that differ are a problem."""
        for what, found in (("sizes", self.sizes), ("modes", self.modes)):
            print(f"{what}: " + ", ".join(f"{kind} ({n})" for kind, n in found.most_common(8))
                  + (f" and {len(found) - 8} more" if len(found) > 8 else ""))
        if TASKS[self.task].has_labels:
            print("classes: " + ", ".join(f"{colour} in {n} maps"
                                          for colour, n in sorted(self.classes.items())))
        for index, maps in sorted(self.maps_of.items()):
            if len(maps) > 1 and self.task == "segmentation":
                found = ", ".join(f"{colour} in {name}" for colour, name in maps.items())
                self.problems.append(f"{self.source.path}: palettes differ: class {index} is "
                                     f"{found}; save all maps with one palette")
        if self.task == "sketch" and "condition P" in self.modes:
            print("note: palette images as line drawings; label maps want --task segmentation")
        if len(self.classes) > MANY_CLASSES:
            print(f"note: {len(self.classes)} classes look like shades of a picture")
        for (kind, _), names in self.digests.items():
            if len(set(names)) > 1:
                print(f"duplicates: {kind} {' = '.join(sorted(set(names)))}")


def check(source, task, pairs, sides, tokenizer, extract, default_prompt):
    """Prints what a user's pairs are, and returns a line for each problem of their files.

    sides: train, val or test for each pair.
    """
    survey = Survey(source, task)
    for pair in tqdm(pairs, desc="check", leave=False):
        image = survey.look("image", pair.image)
        cond = image if extract else survey.look("condition", pair.cond)
        if image and cond and not same_shape(cond, image):
            survey.problems.append(other_shape(source.where(pair.cond), cond, image))
    print(f"pairs: {len(pairs)}, of which " + ", ".join(
        f"{sides.count(side)} {side}" for side in ("train", "val", "test")))
    survey.show()
    captions = [(pair.image, text) for pair in pairs for text in pair.prompts]
    bare = sum(not pair.prompts for pair in pairs)
    print(f"captions: {len(captions)}, and {bare} pictures without; their --default-prompt is "
          f"{default_prompt!r}")
    for name, text in [*captions, *[("--default-prompt", default_prompt)] * bool(bare)]:
        dropped = tokenizer.fit(text)[1]
        if dropped:
            print(f"cut: {name}: its caption loses {dropped!r}")
    return survey.problems


def check_data(args):
    """Prints what is in --data and writes a sheet of it; all that is wrong ends in exit code 2."""
    source = Source(args.data)
    found, problems = find_pairs(source, bool(args.extract))
    tokenizer, _ = load_clip(args.base, args.tokenizer)
    names = groups(found)
    sides = split_names(names)
    problems += check(source, args.task, found, [sides[name] for name in names], tokenizer,
                      bool(args.extract), args.default_prompt)
    if not problems:
        pairs = load_pairs(args.task, "train", args.data, bool(args.extract), args.default_prompt)
        light, shown = mostly_light_on_dark(pairs, args.task, args.extract), pairs[:SHEET_ROWS]
        columns = []
        for flip in (False, True):
            opened = [open_pair(pair, args.task, args.size, light, args.extract, flip)
                      for pair in shown]
            columns.append(cond_to_x(torch.stack([cond for cond, *_ in opened]) / 255))
            columns.append(torch.stack([x for _, x, _ in opened]))
        if args.task == "sketch":
            print(f"lines: {'light on dark' if light else 'dark on light'}")
        args.out.mkdir(parents=True, exist_ok=True)
        contact_sheet(columns, ["condition", "picture", "flipped", "flipped"],
                      [pair.prompts[0] for pair in shown], args.out / "check.png")
        return
    for problem in problems:
        print(f"problem: {problem}")
    raise UserError(f"{args.data}: problems, each named above: {len(problems)}")
