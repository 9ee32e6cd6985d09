"""Pairs of condition and image: the embedded tasks, a user's own, and what training caches of them.

Shapes: C channels, H W rows and columns of the image, f the autoencoder's factor.

    pairs = load_pairs("sketch", "train")
    bank = Bank(pairs, "sketch", size, vae, tokenizer, text_model)
    cond, z, context = bank.batch(16, generator)
"""
import hashlib
from typing import Callable, NamedTuple

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from inputs.conditions import (
    TASKS,
    UserError,
    class_colours,
    crop,
    images_at_a_time,
    is_light_on_dark,
    to_cond,
    to_x,
)
from inputs.pairs import Source, find_pairs, groups, other_shape, same_shape
from tiny.tasks import embedded_pairs

EMPTY_SHARE = 0.1               # of the training prompts, so that guidance has its other half
TEST_SHARE, VAL_SHARE = 0.15, 0.05      # of a user's pairs
MIN_PAIRS = 10
PROMPTS_AT_A_TIME = 16


class Pair(NamedTuple):
    """One labelled image; the pictures are opened only when needed."""
    name: str
    open_cond: Callable[[], Image.Image]
    open_image: Callable[[], Image.Image]
    prompts: tuple              # the first is the one to validate with


# ---- pairs ---------------------------------------------------------------------------------

def split_names(names):
    """Returns {name: train, val or test} of a user's pairs: a fixed function of all their names.

    At least one pair is held out for each of val and test.
    """
    order = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())
    test = max(1, round(TEST_SHARE * len(order)))
    val = test + max(1, round(VAL_SHARE * len(order)))
    return {name: "test" if i < test else "val" if i < val else "train"
            for i, name in enumerate(order)}


def load_pairs(task, split, folder=None, extract=False, default_prompt=""):
    """Returns the pairs of a split: of the embedded data, or of a user's folder or .zip.

    extract: the images' own lines are the conditions. default_prompt: where a picture has no
    caption. Errors: UserError names the file at fault, or says that there are too few.
    """
    if folder is None:
        return [Pair(*pair) for pair in embedded_pairs(task, split)]
    source = Source(folder)
    found, problems = find_pairs(source, extract)
    if problems:
        more = f" (and {len(problems) - 1} more: see --check-data)" if problems[1:] else ""
        raise UserError(problems[0] + more)
    names = groups(found)
    sides = split_names(names)
    if len(sides) < MIN_PAIRS:
        raise UserError(f"{folder}: {len(sides)} pairs; at least {MIN_PAIRS} are needed to "
                        f"train, to validate and to test")
    return [Pair(source.where(pair.cond),
                 lambda name=pair.cond: (source.image(name) if extract
                                         else source.condition(name, task)),
                 lambda name=pair.image: source.image(name), pair.prompts or (default_prompt,))
            for pair, name in zip(found, names) if sides[name] == split]


# ---- the cache -----------------------------------------------------------------------------

def mostly_light_on_dark(pairs, task, extract=False):
    """Returns whether most of the first drawings are light on dark; other conditions never are."""
    if task != "sketch" or extract:
        return False
    light = [is_light_on_dark(pair.open_cond()) for pair in pairs[:32]]
    return sum(light) * 2 > len(light)


def open_pair(pair, task, size, light_on_dark=False, extract=False, flip=False):
    """Returns (cond uint8 (C, size, size), x (3, size, size), label map's colours) of a pair.

    Condition and image are cropped, and flipped, alike. Errors: UserError where shapes differ.
    """
    cond, image, colours = pair.open_cond(), pair.open_image(), set()
    if not same_shape(cond, image):
        raise UserError(other_shape(pair.name, cond, image))
    if TASKS[task].has_labels:
        colours = set(class_colours(cond))
    cond, image = crop(cond, size, size), crop(image, size, size)
    if light_on_dark:
        cond = ImageOps.invert(cond)
    if flip:
        cond, image = ImageOps.mirror(cond), ImageOps.mirror(image)
    return (to_cond(cond, task, extract) * 255).round().byte(), to_x(image), colours


class Bank:
    """Everything a training step needs of some pairs, computed once: latents and text states.

    With mirror, every pair is there a second time, flipped left to right. Latents and text states
    are kept in fp16, conditions in 8 bits. Attributes: classes, the set of label maps' colours, as
    in "#1f77b4"; light_on_dark, the drawings' polarity.
    """

    def __init__(self, pairs, task, size, vae, tokenizer, text_model, mirror=False,
                 light_on_dark=None, extract=False):
        """size: pixels of the square that pairs are scaled and cropped to.

        light_on_dark: the drawings' polarity, one for all; None asks the first of them. extract:
        conditions are made from the images' own lines.
        """
        self.pairs, self.size = pairs, size
        device = next(vae.parameters()).device
        flips = (False, True) if mirror else (False,)
        conds, means, stds, batch = [], [], [], images_at_a_time(size)
        if light_on_dark is None:
            light_on_dark = mostly_light_on_dark(pairs, task, extract)
        self.light_on_dark, self.classes = light_on_dark, set()
        for flip in flips:
            for i in tqdm(range(0, len(pairs), batch), desc="latents", leave=False):
                opened = [open_pair(pair, task, size, light_on_dark, extract, flip)
                          for pair in pairs[i:i + batch]]
                for cond, _, classes in opened:
                    conds.append(cond)
                    self.classes |= classes
                x = torch.stack([x for _, x, _ in opened]).to(device)
                with torch.inference_mode():
                    mean, std = vae.encode(x.contiguous(memory_format=torch.channels_last))
                means.append(mean.half().cpu())
                stds.append(std.half().cpu())
        self.conds = torch.stack(conds)                            # (n, C, H, W) uint8
        self.mean, self.std = torch.cat(means), torch.cat(stds)    # (n, 4, H/f, W/f)
        prompts = sorted({prompt for pair in pairs for prompt in pair.prompts} | {""})
        self.prompt_ids = {prompt: i for i, prompt in enumerate(prompts)}
        with torch.inference_mode():
            self.contexts = torch.cat([
                text_model(tokenizer(prompts[i:i + PROMPTS_AT_A_TIME]).to(device)).half().cpu()
                for i in range(0, len(prompts), PROMPTS_AT_A_TIME)])

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

    def batch(self, size, generator, empty_share=EMPTY_SHARE):
        """Returns (cond (B, C, H, W), z (B, 4, h, w), context (B, L, D)) drawn with the generator.

        That share of the prompts is empty; the others are any of the pair's own.
        """
        indices = torch.randint(len(self), (size,), generator=generator)
        mean, std = self.mean[indices].float(), self.std[indices].float()
        z = mean + std * torch.randn(mean.shape, generator=generator)
        prompts = []
        for i, (u, v) in zip(indices.tolist(), torch.rand(size, 2, generator=generator).tolist()):
            own = self.pairs[i % len(self.pairs)].prompts
            prompts.append("" if u < empty_share else own[int(v * len(own))])
        return self.cond(indices), z, self.context(prompts)
