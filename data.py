"""Pairs of condition and image, the embedded ones or a user's own, and what training caches.

Shapes: C channels, H W rows and columns of the image, L tokens, D width.

    pairs = with_copies(load_pairs("sketch", "train"))
    cache = LatentCache(pairs, "sketch", 64, base)
    cond, z, context = cache.batch(torch.arange(16), 16, generator)
"""
import functools
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import weights
from inputs.conditions import (TASKS, class_colours, images_at_a_time, is_blank, object_note,
                               open_image, palette_fault, to_x)
from inputs.files import fingerprint, hash_module
from inputs.pairs import find_pairs, group_pairs, shape_fault
from inputs.processes import Processes
from tiny.tasks import embedded_pairs
from tiny.world import FIGURES
from weights import UserError

SPLITS = ("train", "val", "test")
TEST_SHARE, VAL_SHARE = 0.15, 0.05      # shares of a user's pairs
MIN_PAIRS = 10
MAX_COPIES = 14                 # most rows of one training pair, the pair itself included
COPIED_ROWS = 600               # rows aimed at; more than 200 pairs have one copy each
MIN_SIDE, MAX_SHIFT = 0.8, 0.06         # of a moved copy, shares of the picture
EMPTY_SHARE = 0.1               # share of empty prompts, so that guidance has an unconditional pass
CACHE = Path("runs/cache")
CACHE_VERSION = 4               # raise it when the content of cached parts changes
PART = 48                       # pairs in a part of the cache
BLANK_FIX = ("Drawings need lines of a pixel or more at --size; label maps need at least two "
             "classes.")
MOST_PROMPTS = 2000             # encoded in advance: 240 MB at SD 1.5's size


class View(NamedTuple):
    """A square crop of a pair's pictures, in units of their central square's side."""
    left: float = 0.0
    top: float = 0.0
    side: float = 1.0
    is_mirrored: bool = False


class Pair(NamedTuple):
    """One labelled image; its pictures are opened only when needed."""
    name: str
    open_cond: Callable[[], Image.Image]
    open_image: Callable[[], Image.Image]
    prompts: tuple              # the first is the one to validate with
    files: tuple = ()           # what its pictures are read from
    view: View = View()
    weight: float = 1.0         # how often it occurs in batches, relative to others


# ---- pairs ---------------------------------------------------------------------------------

def split_names(names):
    """{name: train, val or test} of a user's pairs: a fixed function of all their names.

    At least one pair is held out for each of val and test.
    """
    order = sorted(set(names), key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    test = max(1, round(TEST_SHARE * len(order)))
    val = test + max(1, round(VAL_SHARE * len(order)))
    return {name: "test" if i < test else "val" if i < val else "train"
            for i, name in enumerate(order)}


def load_pairs(task, split, folder=None, extract=False, default_prompt=""):
    """The pairs of a split: of the embedded data, or of a user's folder.

    extract: the images' own lines are the conditions. default_prompt: the prompt of a picture that
    has no caption.
    """
    if folder is None:
        return [Pair(*pair, files=(FIGURES,)) for pair in embedded_pairs(task, split)]
    files, problems, _ = find_pairs(folder, extract)
    if problems:
        more = f" (and {len(problems) - 1} more: see --check-data)" if problems[1:] else ""
        raise UserError(problems[0] + more)
    groups = group_pairs(folder, files)
    split_of = split_names(groups)
    if len(split_of) < MIN_PAIRS:
        raise UserError(f"{folder} must have at least {MIN_PAIRS} pairs to train, validate and "
                        f"test, got {len(split_of)} (pairs that share a file count as one).")
    open_cond = open_image if extract else TASKS[task].open
    return [Pair(str(pair.cond), lambda file=pair.cond: open_cond(file),
                 lambda file=pair.image: open_image(file), pair.prompts or (default_prompt,),
                 (pair.cond, pair.image))
            for pair, group in zip(files, groups) if split_of[group] == split]


def with_copies(pairs, with_mirrored=True, with_moved=True):
    """The pairs, followed by one copy of each, or by up to MAX_COPIES - 1 copies if they are few.

    The first copy is mirrored, the others are moved. with_mirrored=False and with_moved=False leave
    out one kind. Copies should be pictures that the base knows. The embedded base has only seen
    centred portraits: its loss on moved ones is more than twice as high.
    """
    count = min(MAX_COPIES, max(2, COPIED_ROWS // len(pairs))) if with_moved else 1 + with_mirrored
    return [pair._replace(view=choose_view(copy, i, with_mirrored))
            for copy in range(count) for i, pair in enumerate(pairs)]


def choose_view(copy, i, with_mirrored):
    """The View of a copy of pair i; copy 0 is the pair itself."""
    if copy == 0:
        return View()
    if copy == 1 and with_mirrored:
        return View(is_mirrored=True)
    rng = np.random.default_rng((copy, i))
    side = rng.uniform(MIN_SIDE, 1)
    room = 1 - side
    left, top = (room / 2 + rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2)).clip(0, room).tolist()
    return View(left, top, side, with_mirrored and copy % 2 == 1)


# ---- the cache -----------------------------------------------------------------------------

def crop_view(image, view, size):
    """A View of an image, scaled to size x size pixels; label maps are not blended."""
    side = min(image.size)
    left, top = ((extent - side) / 2 + start * side
                 for extent, start in zip(image.size, (view.left, view.top)))
    box = (left, top, left + view.side * side, top + view.side * side)
    image = image.resize((size, size), Image.Resampling.LANCZOS, box)   # palette images: nearest
    return ImageOps.mirror(image) if view.is_mirrored else image


def open_pair(pair, task_name, size, extract=False):
    """(cond uint8 (C, size, size), x (3, size, size), {colour: number} of a label map).

    Condition and image show the same View.
    """
    task, cond_image, image = TASKS[task_name], pair.open_cond(), pair.open_image()
    if fault := shape_fault(pair.name, cond_image, image):
        raise UserError(fault)
    colours = class_colours(cond_image) if task.has_labels else {}
    to_cond = task.extract if extract else task.to_cond
    cond = to_cond(crop_view(cond_image, pair.view, size))
    return (cond * 255).round().byte(), to_x(crop_view(image, pair.view, size)), colours


class LatentCache:
    """Everything a training step needs of some pairs, computed once: latents and text states.

    Latents (fp16) and conditions (8 bits) are kept in parts on the disk, which trainings share and
    from which the rows of a batch are mapped. Attributes: palettes: {((colour as in "#1f77b4",
    number), ..): name of a pair whose label map has these classes}; blank: names of pairs whose
    conditions are blank.
    """

    def __init__(self, pairs, task, size, base, extract=False, folder=None, processes=Processes()):
        """size: side in pixels to which pairs are scaled and cropped. base: StableDiffusion.

        extract: make conditions from the images' own lines. folder: of the parts, CACHE if None.
        """
        self.pairs, self.task, self.size, self.extract = pairs, task, size, extract
        self.palettes, self.blank, self.base = {}, [], base
        self.weights = torch.tensor([pair.weight for pair in pairs], dtype=torch.float64)
        folder = folder or CACHE
        folder.mkdir(parents=True, exist_ok=True)
        vae_hash, hash_once = hash_module(base.vae), functools.cache(fingerprint)
        parts = [pairs[i:i + PART] for i in range(0, len(pairs), PART)]
        self.files = [folder / self.file_name(vae_hash, hash_once, part) for part in parts]
        for i in tqdm(processes.shard(len(parts)).tolist(), desc="latents", leave=False):
            if not self.files[i].is_file():
                tensors, metadata = self.make_part(parts[i])
                weights.save(tensors, self.files[i], metadata)
        processes.barrier()                                # for the parts of the others
        for file, part in zip(self.files, parts):
            metadata = self.read(file, lambda f: f.metadata())
            self.blank += [part[row].name for row in json.loads(metadata["blank"])
                           if part[row].view == View()]     # a moved copy may miss the only line
            for classes, row in json.loads(metadata["palettes"]):
                self.palettes.setdefault(tuple(map(tuple, classes)), part[row].name)
        prompts = sorted({prompt for pair in pairs for prompt in pair.prompts} | {""})
        self.contexts = None                            # too many: encoded when needed
        if len(prompts) <= MOST_PROMPTS:
            self.contexts = dict(zip(prompts, self.encode(prompts)))

    def file_name(self, vae_hash, hash_file, pairs):
        """The name of a part's file, a hash of all that its content depends on."""
        content = [CACHE_VERSION, vae_hash, self.task, self.size, self.extract,
                   [(pair.name, pair.view, [hash_file(file) for file in pair.files])
                    for pair in pairs]]
        return f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]}.safetensors"

    def read(self, file, get):
        """get(f) of an open part, which is mapped no longer than that takes."""
        try:
            with safe_open(file, "pt") as f:
                return get(f)
        except SafetensorError:
            raise UserError(f"{file} is corrupt. Delete it to compute it again.") from None

    def make_part(self, pairs):
        """(tensors, metadata) of some pairs: cond uint8 (n, C, H, W), mean and std fp16.

        metadata, as JSON: blank, the rows of blank conditions, and palettes, a row for
        each set of classes.
        """
        device = next(self.base.vae.parameters()).device
        conds, means, stds, blank, palettes = [], [], [], [], {}
        for i in range(0, len(pairs), images_at_a_time(self.size)):
            batch = pairs[i:i + images_at_a_time(self.size)]
            opened = [open_pair(pair, self.task, self.size, self.extract) for pair in batch]
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
                raise UserError(f"{self.base.vae_path}: the latent of {batch[0].name} or of a "
                                f"pair after it is not finite. Use another --vae.")
        tensors = dict(cond=torch.stack(conds), mean=torch.cat(means), std=torch.cat(stds))
        return tensors, dict(blank=json.dumps(blank), palettes=json.dumps(list(palettes.items())))

    def encode(self, prompts):
        """Text states (B, L, D) in fp16 of prompts."""
        with torch.inference_mode():
            contexts = self.base.encode(prompts).half().cpu()
        if not contexts.isfinite().all():
            raise UserError(f"{self.base.path}: its text states overflow half precision. Use "
                            f"another --base.")
        return contexts

    def rows(self, name, indices):
        """Rows (n, ..) of "cond", "mean" or "std"."""
        return torch.stack([
            self.read(self.files[i // PART], lambda f: f.get_slice(name)[i % PART].clone())
            for i in torch.as_tensor(indices).tolist()])

    def image(self, i):
        """The true picture of pair i as it was trained on, an RGB image."""
        return crop_view(self.pairs[i].open_image(), self.pairs[i].view, self.size)

    def cond(self, indices):
        """Conditions (B, C, H, W) float in [0, 1]."""
        return self.rows("cond", indices).float() / 255

    def context(self, prompts):
        """Text states (B, L, D) of prompts that occur in the pairs, or of the empty one."""
        if self.contexts is None:
            return self.encode(prompts).float()
        return torch.stack([self.contexts[prompt] for prompt in prompts]).float()

    def first_prompts(self, indices):
        """Each pair's validation prompt."""
        return [self.pairs[i].prompts[0] for i in indices]

    def batch(self, shard, batch_size, generator, empty_share=EMPTY_SHARE):
        """cond (n, C, H, W), z (n, 4, h, w) and context (n, L, D) of a shard (n,) of a batch.

        All batch_size rows are drawn, so a row doesn't depend on the shard. A share empty_share of
        the prompts is empty; the others are any of the pair's own.
        """
        indices = torch.multinomial(self.weights, batch_size, replacement=True, generator=generator)
        mean, std = (self.rows(name, indices[shard]).float() for name in ("mean", "std"))
        noise = torch.randn(batch_size, *mean.shape[1:], generator=generator)[shard]
        choices = torch.rand(batch_size, 2, generator=generator)[shard]
        indices, z = indices[shard], mean + std * noise
        prompts = []
        for i, (u, v) in zip(indices.tolist(), choices.tolist()):
            captions = self.pairs[i].prompts
            prompts.append("" if u < empty_share else captions[int(v * len(captions))])
        return self.cond(indices), z, self.context(prompts)


def check_conditions(caches, task):
    """Warn about blank conditions; refuse pairs if all are, or if palettes differ."""
    blank = [name for cache in caches for name in cache.blank]
    number_of_pairs = sum(pair.view == View() for cache in caches for pair in cache.pairs)
    if len(blank) == number_of_pairs:
        raise UserError(f"all conditions are blank (first: {blank[0]}). {BLANK_FIX}")
    if blank:
        warnings.warn(f"{len(blank)} of {number_of_pairs} conditions are blank, such as "
                      f"{blank[0]}. --check-data lists them.")
    palettes = {classes: name for cache in caches for classes, name in cache.palettes.items()}
    fault = palette_fault(palettes)
    if fault and TASKS[task].has_numbers:
        raise UserError(fault)
    if note := object_note(palettes, number_of_pairs):
        warnings.warn(note)
