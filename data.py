"""Pairs of condition and image: the embedded task, a user's own folder, and their cache.

Shapes: C channels, H W rows and columns of the image, f the autoencoder's factor.

    pairs = load_pairs("sketch", "train")
    bank = Bank(pairs, size, vae, tokenizer, text_model)
    cond, z, context = bank.batch(16, generator)
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from conditions import (
    DataError,
    crop_square,
    images_at_a_time,
    is_light_on_dark,
    open_image,
    sketch_to_cond,
    to_x,
)
from tiny import world

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
EMPTY_SHARE = 0.1               # of the training prompts, so that guidance has its other half
TEST_SHARE, VAL_SHARE = 0.15, 0.05      # of a user's pairs
MIN_PAIRS = 10
PROMPTS_AT_A_TIME = 16


@dataclass(frozen=True)
class Task:
    """What a condition looks like and how strongly its maps are weighted."""
    channels: int
    head_heavy: bool


TASKS = {"sketch": Task(channels=1, head_heavy=True)}


class Pair(NamedTuple):
    """One labelled image; the pictures are opened only when needed."""
    name: str
    open_cond: Callable[[], Image.Image]
    open_image: Callable[[], Image.Image]
    prompts: tuple              # the first is the one to validate with


# ---- pairs ---------------------------------------------------------------------------------

def embedded_pairs(task, split):
    """Returns the embedded pairs of a task and split (train, val, test), in alphabetical order."""
    assert task == "sketch"
    pairs = []
    for row in world.records(split, ("3d",)):
        name = row["name"]
        pairs.append(Pair(name, lambda n=name: world.on_ground(world.picture("line", n)),
                          lambda n=name: world.on_ground(world.picture("3d", n)),
                          (world.full_caption(row), row["caption"])))
    return pairs


def folder_pairs(folder):
    """Returns (source file, target file, prompt) of every pair in a user's folder.

    Three layouts: `prompt.json` with a line {"source", "target", "prompt"} a pair, as in fill50k;
    `metadata.jsonl` with file_name, text and conditioning_image; or the folders images/ and
    conditions/ with files of the same names, and images/NAME.txt.
    Errors: DataError names the file and line at fault.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; --data takes a folder of pairs")
    for listing, keys in (("prompt.json", ("source", "target", "prompt")),
                          ("metadata.jsonl", ("conditioning_image", "file_name", "text"))):
        if (folder / listing).is_file():
            return _listed_pairs(folder, folder / listing, keys)
    conds, images = _by_stem(folder / "conditions"), _by_stem(folder / "images")
    triples = []
    for stem in sorted(conds.keys() | images.keys()):
        if stem not in conds or stem not in images:
            raise DataError(f"{folder}: {stem} is not in both conditions/ and images/")
        text = images[stem].with_suffix(".txt")
        prompt = _read_text(text).strip() if text.is_file() else ""
        triples.append((conds[stem], images[stem], prompt))
    if not triples:
        raise DataError(f"{folder}: no pairs; allowed are prompt.json (fill50k), metadata.jsonl "
                        f"(imagefolder) or the folders images/ and conditions/")
    return triples


def _by_stem(folder):
    """Returns {name without suffix: file} of the images in a folder."""
    files = {}
    for file in sorted(folder.glob("*.*")):
        if file.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if file.stem in files:
            raise DataError(f"{files[file.stem]} and {file.name}: which one? names must differ "
                            f"in more than the suffix")
        files[file.stem] = file
    return files


def _read_text(file):
    """Returns a text file's content; UTF-8, with or without a byte order mark."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error}); save it as UTF-8") from None


def _listed_pairs(folder, listing, keys):
    """Returns the pairs of a file with one JSON object a line, checked line by line."""
    triples = []
    for number, line in enumerate(_read_text(listing).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            source, target = folder / row[keys[0]], folder / row[keys[1]]
            prompt = str(row[keys[2]])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{listing}, line {number}: not a JSON object with the keys "
                            f"{', '.join(keys)}") from None
        for file in (source, target):
            if not file.is_file():
                raise DataError(f"{listing}, line {number}: {file} does not exist")
        triples.append((source, target, prompt))
    if not triples:
        raise DataError(f"{listing}: no pairs in it")
    return triples


def split_names(names):
    """Returns {name: train, val or test} of a user's pairs: a fixed function of all their names.

    At least one pair is held out for each of val and test.
    """
    order = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())
    test = max(1, round(TEST_SHARE * len(order)))
    val = test + max(1, round(VAL_SHARE * len(order)))
    return {name: "test" if i < test else "val" if i < val else "train"
            for i, name in enumerate(order)}


def load_pairs(task, split, folder=None):
    """Returns the pairs of a split: of the embedded data, or of a user's folder.

    Errors: DataError names the file at fault, or says that there are too few.
    """
    if folder is None:
        return embedded_pairs(task, split)
    triples = folder_pairs(folder)
    names = [source.relative_to(folder).as_posix() for source, *_ in triples]
    if len(set(names)) < MIN_PAIRS:
        raise DataError(f"{folder}: {len(set(names))} pairs; at least {MIN_PAIRS} are needed to "
                        f"train, to validate and to test")
    splits = split_names(names)
    return [Pair(str(source), lambda f=source: open_image(f), lambda f=target: open_image(f),
                 (prompt,))
            for name, (source, target, prompt) in zip(names, triples) if splits[name] == split]


# ---- the cache -----------------------------------------------------------------------------

class Bank:
    """Everything a training step needs of some pairs, computed once: latents and text states.

    With mirror, every pair is there a second time, flipped left to right. Latents and text states
    are kept in fp16, conditions in 8 bits.
    """

    def __init__(self, pairs, size, vae, tokenizer, text_model, mirror=False, light_on_dark=None):
        """size: pixels of the square that pairs are scaled and cropped to.

        light_on_dark: the drawings' polarity, one for all; None asks the first of them.
        """
        self.pairs, self.size = pairs, size
        device = next(vae.parameters()).device
        flips = (False, True) if mirror else (False,)
        conds, means, stds, batch = [], [], [], images_at_a_time(size)
        if light_on_dark is None:
            first = [is_light_on_dark(pair.open_cond()) for pair in pairs[:32]]
            light_on_dark = sum(first) * 2 > len(first)
        self.light_on_dark = light_on_dark
        for flip in flips:
            for i in tqdm(range(0, len(pairs), batch), desc="latents", leave=False):
                opened = [self._open(pair, flip) for pair in pairs[i:i + batch]]
                conds += [cond for cond, _ in opened]
                x = torch.stack([x for _, x in opened]).to(device)
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

    def _open(self, pair, flip):
        """Returns (cond uint8 (C, H, W), x (3, H, W)) of a pair, cropped alike."""
        cond, image = pair.open_cond(), pair.open_image()
        if cond.size != image.size:
            raise DataError(f"{pair.name}: {cond.width} x {cond.height} px, but its picture has "
                            f"{image.width} x {image.height} px; scale both to one size")
        cond, image = crop_square(cond, self.size), crop_square(image, self.size)
        if self.light_on_dark:
            cond = ImageOps.invert(cond)
        if flip:
            cond, image = ImageOps.mirror(cond), ImageOps.mirror(image)
        return (sketch_to_cond(cond) * 255).round().byte(), to_x(image)

    def __len__(self):
        return len(self.conds)

    def image(self, i):
        """Returns the true picture of pair i as it was trained on, an RGB image."""
        return crop_square(self.pairs[i].open_image(), self.size)

    def cond(self, indices):
        """Returns conditions (B, C, H, W) float in [0, 1]."""
        return self.conds[indices].float() / 255

    def context(self, prompts):
        """Returns text states (B, L, D) of prompts that occur in the pairs, or of the empty one."""
        return self.contexts[[self.prompt_ids[prompt] for prompt in prompts]].float()

    def first_prompts(self, indices):
        """Returns the prompt to validate with of each pair."""
        return [self.pairs[i % len(self.pairs)].prompts[0] for i in indices]

    def batch(self, size, generator):
        """Returns (cond (B, C, H, W), z (B, 4, h, w), context (B, L, D)) drawn with the generator.

        A tenth of the prompts is empty; the others are any of the pair's own.
        """
        indices = torch.randint(len(self), (size,), generator=generator)
        mean, std = self.mean[indices].float(), self.std[indices].float()
        z = mean + std * torch.randn(mean.shape, generator=generator)
        prompts = []
        for i, (u, v) in zip(indices.tolist(), torch.rand(size, 2, generator=generator).tolist()):
            own = self.pairs[i % len(self.pairs)].prompts
            prompts.append("" if u < EMPTY_SHARE else own[int(v * len(own))])
        return self.cond(indices), z, self.context(prompts)
