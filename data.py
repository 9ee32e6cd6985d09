"""Pairs of condition and image: the embedded tasks, a user's own, and what training caches of them.

Shapes: C channels, H W rows and columns of the image, f the autoencoder's factor, L tokens, D
width.

    pairs = load_pairs("sketch", "train")
    cache = LatentCache(pairs, "sketch", 64, base)
    cond, z, context = cache.batch(torch.arange(16), 16, generator)
"""
import hashlib
import json
import os
import warnings
from typing import Callable, NamedTuple

import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from tqdm import tqdm

import weights
from inputs.conditions import (
    TASKS,
    class_colours,
    crop,
    images_at_a_time,
    is_blank,
    open_image,
    palette_fault,
    to_x,
)
from inputs.pairs import find_pairs, group_pairs, same_shape, shape_fault
from inputs.train_options import EMPTY_SHARE
from tiny.tasks import embedded_pairs
from weights import UserError

TEST_SHARE, VAL_SHARE = 0.15, 0.05      # shares of a user's pairs
MIN_PAIRS = 10
PART = 48                       # pairs in a part of the cache
MOST_PROMPTS = 2000             # that are encoded beforehand: 240 MB at SD 1.5's size


class Pair(NamedTuple):
    """One labelled image; the pictures are opened only when needed."""
    name: str
    open_cond: Callable[[], Image.Image]
    open_image: Callable[[], Image.Image]
    prompts: tuple              # the first is the one to validate with
    files: tuple = ()           # condition and image, if they are a user's own


# ---- pairs ---------------------------------------------------------------------------------

def split_names(names):
    """Returns {name: train, val or test} of a user's pairs: a fixed function of all their names.

    At least one pair is held out for each of val and test.
    """
    order = sorted(set(names), key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    test = max(1, round(TEST_SHARE * len(order)))
    val = test + max(1, round(VAL_SHARE * len(order)))
    return {name: "test" if i < test else "val" if i < val else "train"
            for i, name in enumerate(order)}


def load_pairs(task, split, folder=None, extract=False, default_prompt=""):
    """Returns the pairs of a split: of the embedded data, or of a user's folder.

    extract: the images' own lines are the conditions. default_prompt: the prompt of a picture that
    has no caption. Errors: UserError names the file at fault, or says that there are too few.
    """
    if folder is None:
        return [Pair(*pair) for pair in embedded_pairs(task, split)]
    files, problems, _ = find_pairs(folder, extract)
    if problems:
        others = f" (and {len(problems) - 1} more: see --check-data)" if problems[1:] else ""
        raise UserError(problems[0] + others)
    groups = group_pairs(folder, files)
    sides = split_names(groups)
    if len(sides) < MIN_PAIRS:
        raise UserError(f"{folder}: {len(sides)} pairs; at least {MIN_PAIRS} are needed to train, "
                        f"to validate and to test (pairs that share a file count as one)")
    open_cond = open_image if extract else TASKS[task].open
    return [Pair(str(pair.cond), lambda file=pair.cond: open_cond(file),
                 lambda file=pair.image: open_image(file), pair.prompts or (default_prompt,),
                 (pair.cond, pair.image))
            for pair, group in zip(files, groups) if sides[group] == split]


# ---- the cache -----------------------------------------------------------------------------

def open_pair(pair, task, size, extract=False, flip=False):
    """Returns (cond uint8 (C, size, size), x (3, size, size), {colour: number} of a label map).

    Condition and image are cropped, and flipped, alike. Errors: UserError if shapes differ.
    """
    kind, cond, image = TASKS[task], pair.open_cond(), pair.open_image()
    if not same_shape(cond, image):
        raise UserError(shape_fault(pair.name, cond, image))
    colours = class_colours(cond) if kind.has_labels else {}
    cond, image = crop(cond, size, size), crop(image, size, size)
    if flip:
        cond, image = ImageOps.mirror(cond), ImageOps.mirror(image)
    to_cond = kind.extract if extract else kind.to_cond
    return (to_cond(cond) * 255).round().byte(), to_x(image), colours


class LatentCache:
    """Everything a training step needs of some pairs, computed once: latents and text states.

    With mirror, every pair is there a second time, flipped left to right. Latents and text states
    are kept in fp16, conditions in 8 bits: in memory for the embedded pairs, else in a DiskCache,
    from which a batch's rows are mapped. Attributes: palettes: {((colour as in "#1f77b4", number),
    ..): name of a pair whose label map has these classes}; blank: names of pairs whose conditions
    say nothing.
    """

    def __init__(self, pairs, task, size, base, mirror=False, extract=False, disk=None):
        """size: pixels of the square that pairs are scaled and cropped to. base: StableDiffusion.

        extract: conditions are made from the images' own lines. disk: a DiskCache, for pairs of
        files. Errors: UserError if a picture or the base is at fault.
        """
        self.pairs, self.task, self.size, self.extract = pairs, task, size, extract
        self.palettes, self.blank, self.base = {}, [], base
        self.flips = (False, True) if mirror else (False,)
        parts = [(pairs[i:i + PART], flip) for flip in self.flips
                 for i in range(0, len(pairs), PART)]
        files = {}                              # {index of a part that this process makes: file}
        if disk:
            disk.folder.mkdir(parents=True, exist_ok=True)
            for i in tqdm(disk.processes.slots(len(parts)).tolist(), desc="latents", leave=False):
                files[i] = self.part_file(disk, *parts[i])
            disk.processes.wait()                       # for the parts of the others
        self.parts = []                                 # dicts of tensors, or files
        for i, (part, flip) in enumerate(tqdm(parts, desc="latents", leave=False)):
            if disk:
                content = files.get(i) or self.part_file(disk, part, flip)
                with safe_open(content, "pt") as f:
                    metadata = f.metadata()
            else:
                content, metadata = self.make_part(part, flip)
            self.parts.append(content)
            self.blank += [part[row].name for row in json.loads(metadata["blank"]) if not flip]
            for classes, row in json.loads(metadata["palettes"]):
                self.palettes.setdefault(tuple(map(tuple, classes)), part[row].name)
        prompts = sorted({prompt for pair in pairs for prompt in pair.prompts} | {""})
        self.contexts = None                            # too many: encoded as they are needed
        if len(prompts) <= MOST_PROMPTS:
            self.contexts = dict(zip(prompts, self.encode(prompts)))

    def part_file(self, disk, pairs, flip):
        """Returns the file of a part in the DiskCache."""
        facts = [self.task, self.size, self.extract, flip,
                 weights.fingerprint(*(file for pair in pairs for file in pair.files))]
        return disk.file(facts, lambda: self.make_part(pairs, flip))

    def make_part(self, pairs, flip):
        """Returns (tensors, metadata) of some pairs: cond uint8 (n, C, H, W), mean and std fp16.

        metadata, as JSON: blank, the rows of conditions that say nothing, and palettes, a row for
        each set of classes.
        """
        device = next(self.base.vae.parameters()).device
        conds, means, stds, blank, palettes = [], [], [], [], {}
        for i in range(0, len(pairs), images_at_a_time(self.size)):
            some = pairs[i:i + images_at_a_time(self.size)]
            opened = [open_pair(pair, self.task, self.size, self.extract, flip) for pair in some]
            for cond, _, colours in opened:
                if is_blank(cond / 255, self.task):
                    blank.append(len(conds))
                palettes.setdefault(tuple(colours.items()), len(conds))
                conds.append(cond)
            x = torch.stack([x for _, x, _ in opened]).to(device)
            with torch.inference_mode():
                mean, std = self.base.vae.encode(x.contiguous(memory_format=torch.channels_last))
            means.append(mean.half().cpu())
            stds.append(std.half().cpu())
            if not (means[-1].isfinite().all() and stds[-1].isfinite().all()):
                raise UserError(f"{some[0].name}: the autoencoder, {self.base.vae_path}, makes no "
                                f"finite latent of it or of one soon after it; give another --vae")
        tensors = dict(cond=torch.stack(conds), mean=torch.cat(means), std=torch.cat(stds))
        return tensors, dict(blank=json.dumps(blank), palettes=json.dumps(list(palettes.items())))

    def encode(self, prompts):
        """Returns text states (B, L, D) in fp16 of prompts."""
        with torch.inference_mode():
            contexts = self.base.encode(prompts).half().cpu()
        if not contexts.isfinite().all():
            raise UserError(f"{self.base.path}: its text states are too large for half precision; "
                            f"give another --base")
        return contexts

    def __len__(self):
        return len(self.pairs) * len(self.flips)

    def rows(self, name, indices):
        """Returns the rows (n, ..) of "cond", "mean" or "std"; from len(pairs) on, flipped ones.
        """
        rows, parts_of_a_flip = [], len(self.parts) // len(self.flips)
        for i in torch.as_tensor(indices).tolist():
            flip, i = divmod(i, len(self.pairs))
            part, row = divmod(i, PART)
            content = self.parts[flip * parts_of_a_flip + part]
            if isinstance(content, dict):
                rows.append(content[name][row])
            else:
                with safe_open(content, "pt") as f:     # mapped no longer than it takes to copy
                    rows.append(f.get_slice(name)[row].clone())
        return torch.stack(rows)

    def image(self, i):
        """Returns the true picture of pair i as it was trained on, an RGB image."""
        return crop(self.pairs[i].open_image(), self.size, self.size)

    def cond(self, indices):
        """Returns conditions (B, C, H, W) float in [0, 1]."""
        return self.rows("cond", indices).float() / 255

    def context(self, prompts):
        """Returns text states (B, L, D) of prompts that occur in the pairs, or of the empty one."""
        if self.contexts is None:
            return self.encode(prompts).float()
        return torch.stack([self.contexts[prompt] for prompt in prompts]).float()

    def first_prompts(self, indices):
        """Returns the prompt to validate with of each pair."""
        return [self.pairs[i % len(self.pairs)].prompts[0] for i in indices]

    def batch(self, slots, size, generator, empty_share=EMPTY_SHARE):
        """Returns cond (n, C, H, W), z (n, 4, h, w) and context (n, L, D) of slots (n,) of a batch.

        All of the batch, `size` rows, is drawn, so that a row is the same whichever slots are asked
        for. A share empty_share of the prompts is empty; the others are any of the pair's own.
        """
        indices = torch.randint(len(self), (size,), generator=generator)
        mean, std = (self.rows(name, indices[slots]).float() for name in ("mean", "std"))
        noise = torch.randn(size, *mean.shape[1:], generator=generator)[slots]
        choices = torch.rand(size, 2, generator=generator)[slots]
        indices, z = indices[slots], mean + std * noise
        prompts = []
        for i, (u, v) in zip(indices.tolist(), choices.tolist()):
            captions = self.pairs[i % len(self.pairs)].prompts
            prompts.append("" if u < empty_share else captions[int(v * len(captions))])
        return self.cond(indices), z, self.context(prompts)


def check_conditions(caches, task):
    """Warns of conditions that say nothing; raises UserError if all are so or palettes differ."""
    blank = [name for cache in caches for name in cache.blank]
    number_of_pairs = sum(len(cache.pairs) for cache in caches)
    if len(blank) == number_of_pairs:
        raise UserError(f"{blank[0]}: blank, and so are all other conditions; a drawing needs ink, "
                        f"a label map two classes")
    if blank:
        warnings.warn(f"{len(blank)} of {number_of_pairs} conditions are blank, such as "
                      f"{blank[0]}; --check-data names them")
    fault = palette_fault({classes: name for cache in caches
                           for classes, name in cache.palettes.items()})
    if fault and TASKS[task].has_numbers:
        raise UserError(fault)
