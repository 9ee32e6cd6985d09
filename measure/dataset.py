"""What a user's own pairs contain, and what is wrong with them: train.py --check-data.

    check_data(args)            # prints it, and writes a sheet of what the network will see
"""
from collections import Counter
from itertools import chain

import torch
from tqdm import tqdm

from data import BLANK_FIX, load_pairs, open_pair, split_names, with_copies
from inputs import conditions
from inputs.checkpoints import find_tokenizer, load_tokenizer
from inputs.files import fingerprint
from inputs.options import is_embedded
from inputs.pairs import NO_CAPTIONS, find_pairs, group_pairs, shape_fault
from measure.report import SHEET_ROWS, contact_sheet
from weights import UserError, shortened

MANY_CLASSES = 64               # more than this in all maps may be shades


class Survey:
    """Counts of what the files of some pairs contain, and their problems."""

    def __init__(self, args):
        self.args, self.task = args, conditions.TASKS[args.task]
        self.problems, self.blank = [], []
        self.sizes, self.modes, self.classes = Counter(), Counter(), Counter()
        self.files_of_digest = {}                   # (role, fingerprint): files
        self.palettes = {}                          # ((colour, number), ..): a map that has them
        self.notes = Counter()                      # of drawings

    def add(self, role, file):
        """Count a file and return its image, or None if it can't be used.

        role: "image" or "condition".
        """
        try:
            image = conditions.load_image(file)
            if role == "condition" or self.args.extract:
                self.add_condition(file, image)
            self.files_of_digest.setdefault((role, fingerprint(file)), set()).add(file)
        except (UserError, OSError) as error:
            self.problems.append(str(error))
            return None
        self.modes[f"{role} {image.mode}"] += 1
        self.sizes[f"{role} {image.width} x {image.height}"] += 1
        return image

    def add_condition(self, file, image):
        """Count a label map's classes, what is odd about a drawing, or a blank condition."""
        size, extract = self.args.size, self.args.extract
        picture = conditions.open_image(file) if extract else self.task.open(file)
        to_cond = self.task.extract if extract else self.task.to_cond
        is_drawing = self.args.task == "sketch" and not extract
        if conditions.is_blank(to_cond(conditions.crop(picture, size, size)), self.args.task):
            reason = conditions.why_blank(picture) if is_drawing else "is the same everywhere."
            self.blank.append(f"{file} {reason}")
        if self.task.has_labels:
            colours = conditions.class_colours(picture)
            self.classes.update(colours.keys())
            self.palettes.setdefault(tuple(colours.items()), file)
        elif is_drawing:
            is_inverted = conditions.is_light_on_dark(conditions.drawing_to_rgb(image))
            self.notes["drawings are light on dark and will be inverted"] += is_inverted
            self.notes[conditions.LABELS_NOTE] += conditions.looks_like_label_map(image)

    def report(self, number_of_pairs):
        """Print sizes, modes, classes, blank conditions and duplicates.

        Add a problem if palettes differ, or if all conditions are blank.
        """
        for name, counts in (("sizes", self.sizes), ("modes", self.modes)):
            print(f"{name}: {shortened([f'{entry} ({n})' for entry, n in counts.most_common()])}")
        if self.task.has_labels:
            names = conditions.class_names(dict(sum(self.palettes, ())))
            print("classes: " + ", ".join(f"{names[colour]} in {n} maps"
                                          for colour, n in sorted(self.classes.items())))
            if len(self.classes) > MANY_CLASSES:
                print(f"note: {len(self.classes)} classes may be the shades of a picture")
            if note := conditions.object_note(self.palettes, number_of_pairs):
                print(f"note: {note}")
        fault = conditions.palette_fault(self.palettes)
        if fault and self.task.has_numbers:
            self.problems.append(f"{self.args.data}: {fault}")
        for line in self.blank:
            print(f"blank condition: {line}")
        if self.blank and len(self.blank) == number_of_pairs:
            self.problems.append(f"{self.args.data}: all conditions are blank. {BLANK_FIX}")
        for note, n in (+self.notes).items():           # without those that no drawing has
            print(f"note: {n} {note}")
        for (role, _), files in self.files_of_digest.items():
            if len(files) > 1:
                print(f"duplicates: {role} {' = '.join(map(str, sorted(files)))}")


def check_captions(pairs, tokenizer, default_prompt):
    """Print how many captions there are, and which are truncated."""
    captions = [(pair.image, text) for pair in pairs for text in pair.prompts]
    without_caption = [pair.image for pair in pairs if not pair.prompts]
    print(f"captions: {len(captions)}; pictures without one: {len(without_caption)}, which train "
          f"with --default-prompt {default_prompt!r}")
    if other_lines := sum(pair.other_lines for pair in pairs):
        print(f"note: {other_lines} {NO_CAPTIONS}")
    if without_caption:
        captions.append(("--default-prompt", default_prompt))
        print(f"no caption: {shortened(list(map(str, without_caption)))}")
    for place, text in captions:
        _, dropped = tokenizer.truncate(text)
        if dropped:
            print(f"truncated caption: {place} loses {dropped!r}")


def check_data(args):
    """Print what --data contains and write a sheet of it; raise UserError if anything is wrong."""
    tokenizer = load_tokenizer(find_tokenizer(args.base, args.tokenizer))
    pairs, problems, unused = find_pairs(args.data, args.extract)
    survey = Survey(args)
    for pair in tqdm(pairs, desc="check", leave=False):
        image = survey.add("image", pair.image)
        cond = image if args.extract else survey.add("condition", pair.cond)
        if image and cond and (fault := shape_fault(pair.cond, cond, image)):
            survey.problems.append(fault)
    groups = group_pairs(args.data, pairs)
    counts = Counter(map(split_names(groups).get, groups))
    print(f"pairs: {len(pairs)} ({counts['train']} train, {counts['val']} val, {counts['test']} "
          f"test)")
    if unused:
        print(f"belong to no pair: {shortened(list(map(str, unused)))}")
    survey.report(len(pairs))
    check_captions(pairs, tokenizer, args.default_prompt)
    problems += survey.problems
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise UserError(f"{args.data}: fix the problems that are listed above ({len(problems)}) to "
                        f"get the sheet.")
    write_sheet(args)
    print("these pairs can be trained on; the sheet shows what the network will see")


def write_sheet(args):
    """Write check.png: what the network sees of the first pairs, and of a copy if they have one."""
    pairs = load_pairs(args.task, "train", args.data, args.extract,
                       args.default_prompt)[:SHEET_ROWS]
    rows = with_copies(pairs, not args.no_mirror, with_moved=not is_embedded(args.base))
    conds, pictures, _ = zip(*(open_pair(pair, args.task, args.size, args.extract)
                               for pair in rows[:2 * len(pairs)]))
    cond, picture = conditions.cond_to_x(torch.stack(conds) / 255), torch.stack(pictures)
    columns = list(chain(*zip(cond.split(len(pairs)), picture.split(len(pairs)))))
    title = "moved" if args.no_mirror else "flipped"
    args.out.mkdir(parents=True, exist_ok=True)
    contact_sheet(columns, ["condition", "picture", title, title][:len(columns)],
                  [pair.prompts[0] for pair in pairs], args.out / "check.png")
