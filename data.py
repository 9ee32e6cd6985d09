"""Pairs of condition and image: the embedded tasks, a user's own, and what training caches of them.

Shapes: C channels, H W rows and columns of the image, f the autoencoder's factor, L tokens, D
width.

    pairs = load_pairs("sketch", "train")
    cache = LatentCache(pairs, "sketch", 64, base)
    cond, z, context = cache.batch(16, generator)
"""
import hashlib
import os
import warnings
from typing import Callable, NamedTuple

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

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
from inputs.pairs import CAPTION_KEYS, find_pairs, group_pairs, same_shape, shape_fault
from inputs.train_options import EMPTY_SHARE
from tiny.tasks import embedded_pairs
from weights import UserError

TEST_SHARE, VAL_SHARE = 0.15, 0.05      # of a user's pairs
MIN_PAIRS = 10


class Pair(NamedTuple):
    """One labelled image; the pictures are opened only when needed."""
    name: str
    open_cond: Callable[[], Image.Image]
    open_image: Callable[[], Image.Image]
    prompts: tuple              # the first is the one to validate with
    files: tuple = ()           # of condition and image, if they are a user's own


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
        raise UserError(f"{folder}: {len(sides)} pairs; at least {MIN_PAIRS} are needed to "
                        f"train, to validate and to test")
    open_cond = open_image if extract else TASKS[task].open
    return [Pair(str(pair.cond), lambda file=pair.cond: open_cond(file),
                 lambda file=pair.image: open_image(file), pair.prompts or (default_prompt,),
                 (pair.cond, pair.image))
            for pair, group in zip(files, groups) if sides[group] == split]


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
    are kept in fp16, conditions in 8 bits. Attribute palettes: {((colour as in "#1f77b4", number),
    ..): name of a pair whose label map has these classes}.
    """

    def __init__(self, pairs, task, size, base, mirror=False, extract=False):
        """size: pixels of the square that pairs are scaled and cropped to. base: StableDiffusion.

        extract: conditions are made from the images' own lines. Errors: UserError if a picture or
        the base is at fault.
        """
        self.pairs, self.size, self.palettes = pairs, size, {}
        device = next(base.vae.parameters()).device
        conds, means, stds = [], [], []
        for flip in (False, True) if mirror else (False,):
            parts = range(0, len(pairs), images_at_a_time(size))
            for i in tqdm(parts, desc="latents", leave=False):
                opened = [open_pair(pair, task, size, extract, flip)
                          for pair in pairs[i:i + parts.step]]
                for pair, (cond, _, colours) in zip(pairs[i:], opened):
                    conds.append(cond)
                    self.palettes.setdefault(tuple(colours.items()), pair.name)
                x = torch.stack([x for _, x, _ in opened]).to(device)
                with torch.inference_mode():
                    mean, std = base.vae.encode(x.contiguous(memory_format=torch.channels_last))
                means.append(mean.half().cpu())
                stds.append(std.half().cpu())
                if not (means[-1].isfinite().all() and stds[-1].isfinite().all()):
                    raise UserError(f"{pairs[i].name}: the autoencoder, {base.vae_path}, makes no "
                                    f"finite latent of it or of one soon after it; give another "
                                    f"--vae")
        self.conds = torch.stack(conds)                            # (n, C, H, W) uint8
        self.mean, self.std = torch.cat(means), torch.cat(stds)    # (n, 4, H/f, W/f)
        prompts = sorted({prompt for pair in pairs for prompt in pair.prompts} | {""})
        self.prompt_ids = {prompt: i for i, prompt in enumerate(prompts)}
        with torch.inference_mode():
            self.contexts = base.encode(prompts).half().cpu()      # (prompts, L, D)
        if not self.contexts.isfinite().all():
            raise UserError(f"{base.path}: its text states are too large for half precision; give "
                            f"another --base")

    def __len__(self):
        return len(self.conds)

    def image(self, i):
        """Returns the true picture of pair i as it was trained on, an RGB image."""
        return crop(self.pairs[i].open_image(), self.size, self.size)

    def cond(self, indices):
        """Returns conditions (B, C, H, W) float in [0, 1]."""
        return self.conds[indices].float() / 255

    def context(self, prompts):
        """Returns text states (B, L, D) of prompts that occur in the pairs, or of the empty one."""
        return self.contexts[[self.prompt_ids[prompt] for prompt in prompts]].float()

    def first_prompts(self, indices):
        """Returns the prompt to validate with of each pair."""
        return [self.pairs[i % len(self.pairs)].prompts[0] for i in indices]

    def batch(self, slots, size, generator, empty_share=EMPTY_SHARE):
        """Returns cond (n, C, H, W), z (n, 4, h, w) and context (n, L, D) of slots (n,) of a batch.

        The whole batch of this size is drawn with the generator, whichever slots are asked for.
        That share of the prompts is empty; the others are any of the pair's own.
        """
        indices = torch.randint(len(self), (size,), generator=generator)
        noise = torch.randn(size, *self.mean.shape[1:], generator=generator)[slots]
        choices = torch.rand(size, 2, generator=generator)[slots]
        indices = indices[slots]
        z = self.mean[indices].float() + self.std[indices].float() * noise
        prompts = []
        for i, (u, v) in zip(indices.tolist(), choices.tolist()):
            captions = self.pairs[i % len(self.pairs)].prompts
            prompts.append("" if u < empty_share else captions[int(v * len(captions))])
        return self.cond(indices), z, self.context(prompts)


def check_conditions(caches, task):
    """Warns of conditions that say nothing; raises UserError if all are so or palettes differ."""
    conds = [(pair.name, cond) for cache in caches for pair, cond in zip(cache.pairs, cache.conds)]
    blank = [name for name, cond in conds if is_blank(cond / 255, task)]
    if len(blank) == len(conds):
        raise UserError(f"{blank[0]}: blank, and so are all other conditions; a drawing needs ink, "
                        f"a label map two classes")
    if blank:
        warnings.warn(f"{len(blank)} of {len(conds)} conditions are blank, such as {blank[0]}; "
                      f"--check-data names them")
    fault = palette_fault({classes: name for cache in caches
                           for classes, name in cache.palettes.items()})
    if fault and TASKS[task].has_numbers:
        raise UserError(fault)
