"""What is in a user's own pairs, and what is wrong there: train.py --check-data.

    check_data(args)            # prints it, and writes a sheet of what the network will see
"""
import hashlib
from collections import Counter

import torch
from PIL import Image
from tqdm import tqdm

from data import load_pairs, open_pair, split_names
from inputs import conditions
from inputs.checkpoints import find_tokenizer, load_tokenizer
from inputs.pairs import find_pairs, group_pairs, same_shape, shape_fault
from measure.report import SHEET_ROWS, contact_sheet
from weights import UserError

MANY_CLASSES = 64               # in all maps; a larger number may be shades
ENTRIES = 8                     # sizes or modes in a line


class Survey:
    """Collects what the files of some pairs are, and what is wrong with them."""

    def __init__(self, task, extract, size):
        self.task, self.kind = task, conditions.TASKS[task]
        self.extract, self.size = extract, size
        self.is_drawing = self.kind.open is conditions.open_drawing
        self.problems, self.blank = [], []
        self.sizes, self.modes, self.classes = Counter(), Counter(), Counter()
        self.files_of_digest = {}                   # (role, SHA-256): files
        self.palettes = {}                          # ((colour, number), ..): a map that has them
        self.light_on_dark = 0                      # number of drawings

    def look(self, role, file):
        """Returns the image of a file and counts it; None if it cannot be used."""
        try:
            with conditions.naming_file(file), Image.open(file) as image:
                image.verify()                      # checksums, too, which load() passes over
            image = conditions.load_image(file)
            if role == "condition" or self.extract:
                self.look_at_condition(file, image)
            digest = hashlib.sha256(file.read_bytes()).digest()
        except (UserError, OSError) as error:
            self.problems.append(str(error))
            return None
        self.modes[f"{role} {image.mode}"] += 1
        self.sizes[f"{role} {image.width} x {image.height}"] += 1
        self.files_of_digest.setdefault((role, digest), set()).add(file)
        return image

    def look_at_condition(self, file, image):
        """Counts classes of label maps, drawings that are light on dark, and blank conditions."""
        picture = conditions.open_image(file) if self.extract else self.kind.open(file)
        to_cond = self.kind.extract if self.extract else self.kind.to_cond
        cond = to_cond(conditions.crop(picture, self.size, self.size))
        if conditions.is_blank(cond, self.task):
            self.blank.append(file)
        if self.kind.has_labels:
            colours = conditions.class_colours(picture)
            self.classes.update(colours.keys())
            self.palettes.setdefault(tuple(colours.items()), file)
        elif self.is_drawing and not self.extract:
            self.light_on_dark += conditions.is_light_on_dark(conditions.drawing_to_rgb(image))

    def report(self, folder, number_of_pairs):
        """Prints sizes, modes, classes, blank conditions and duplicates.

        Palettes that differ are a problem, and so are conditions that are all blank.
        """
        for what, counts in (("sizes", self.sizes), ("modes", self.modes)):
            entries = [f"{entry} ({n})" for entry, n in counts.most_common(ENTRIES)]
            rest = len(counts) - len(entries)
            print(f"{what}: {', '.join(entries)}" + (f" and {rest} more" if rest else ""))
        if self.kind.has_labels:
            names = conditions.class_names(dict(sum(self.palettes, ())))
            print("classes: " + ", ".join(f"{names[colour]} in {n} maps"
                                          for colour, n in sorted(self.classes.items())))
        fault = conditions.palette_fault(self.palettes)
        if fault and self.kind.has_numbers:
            self.problems.append(f"{folder}: {fault}")
        for file in self.blank:
            print(f"blank condition: {file}")
        if self.blank and len(self.blank) == number_of_pairs:
            self.problems.append(f"{folder}: all conditions are blank; a drawing needs ink, a "
                                 f"label map two classes")
        if self.is_drawing:
            print(f"drawings that are light on dark, and are turned: {self.light_on_dark}")
            if "condition P" in self.modes:
                print("note: palette images as line drawings; label maps want --task segmentation")
        if len(self.classes) > MANY_CLASSES:
            print(f"note: {len(self.classes)} classes look like shades of a picture")
        for (role, _), files in self.files_of_digest.items():
            if len(files) > 1:
                print(f"duplicates: {role} {' = '.join(map(str, sorted(files)))}")


def check_captions(pairs, tokenizer, default_prompt):
    """Prints how many captions there are and which are cut."""
    captions = [(pair.image, text) for pair in pairs for text in pair.prompts]
    bare = sum(not pair.prompts for pair in pairs)
    print(f"captions: {len(captions)}, and {bare} pictures without; their --default-prompt is "
          f"{default_prompt!r}")
    if bare:
        captions.append(("--default-prompt", default_prompt))
    for pair in [pair for pair in pairs if not pair.prompts][:ENTRIES]:
        print(f"no caption: {pair.image}")
    for place, text in captions:
        _, rest = tokenizer.truncate(text)
        if rest:
            print(f"cut: {place}: its caption loses {rest!r}")


def check_data(args):
    """Prints what is in --data and writes a sheet of it; raises UserError if anything is wrong."""
    tokenizer = load_tokenizer(find_tokenizer(args.base, args.tokenizer))
    pairs, problems, unused = find_pairs(args.data, args.extract)
    survey = Survey(args.task, args.extract, args.size)
    for pair in tqdm(pairs, desc="check", leave=False):
        image = survey.look("image", pair.image)
        cond = image if args.extract else survey.look("condition", pair.cond)
        if image and cond and not same_shape(cond, image):
            survey.problems.append(shape_fault(pair.cond, cond, image))
    groups = group_pairs(args.data, pairs)
    side_of = split_names(groups)
    counts = Counter(side_of[group] for group in groups)
    print(f"pairs: {len(pairs)}, of which " + ", ".join(
        f"{counts[side]} {side}" for side in ("train", "val", "test")))
    for file in unused[:ENTRIES]:
        print(f"belongs to no pair: {file}")
    if unused[ENTRIES:]:
        print(f"and {len(unused) - ENTRIES} more files belong to no pair")
    survey.report(args.data, len(pairs))
    check_captions(pairs, tokenizer, args.default_prompt)
    problems += survey.problems
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise UserError(f"{args.data}: problems, each named above: {len(problems)}; no sheet is "
                        f"written")
    write_sheet(args)
    print("no problem found; the sheet shows what the network will see")


def write_sheet(args):
    """Writes check.png: the first training pairs as the network will see them, and flipped."""
    pairs = load_pairs(args.task, "train", args.data, args.extract,
                       args.default_prompt)[:SHEET_ROWS]
    columns = []
    for flip in (False, True):
        conds, pictures, _ = zip(*(open_pair(pair, args.task, args.size, args.extract, flip)
                                   for pair in pairs))
        columns += [conditions.cond_to_x(torch.stack(conds) / 255), torch.stack(pictures)]
    args.out.mkdir(parents=True, exist_ok=True)
    contact_sheet(columns, ["condition", "picture", "flipped", "flipped"],
                  [pair.prompts[0] for pair in pairs], args.out / "check.png")
