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

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from tiny import world

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
EMPTY_SHARE = 0.1               # of the training prompts, so that guidance has its other half
TEST_SHARE, VAL_SHARE = 0.15, 0.05      # of a user's pairs
MIN_PAIRS = 10
LINE_CONTRAST = 0.1             # slope of x per pixel from which an edge counts as a line
PIXELS_AT_A_TIME = 48 * 64**2   # through a network outside of training: 48 pictures of 64 px
PROMPTS_AT_A_TIME = 16


class DataError(ValueError):
    """Pairs or an image that cannot be used; the message is one line for the user."""


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


# ---- images --------------------------------------------------------------------------------

def open_image(file):
    """Returns a PIL image, upright, of mode RGB, with transparent parts white.

    Errors: DataError where the file cannot be read as an image.
    """
    if not Path(file).is_file():
        raise DataError(f"{file}: no such file")
    try:
        image = Image.open(file)
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be read as an image ({error}); allowed are PNG, JPEG, "
                        f"WebP and BMP") from None
    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image):
    """Returns the image in mode RGB: 16-bit greys scaled to 8 bits, transparency over white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        values = values / 257 if values.max() > 255 else values
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_x(image):
    """Returns x (3, H, W) float in [-1, 1] of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_image(x):
    """Returns the RGB image of x (3, H, W) in [-1, 1]; values outside are clipped."""
    array = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def crop_square(image, size):
    """Returns the image scaled until its shorter side is `size`, its middle cut out square."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


# ---- line drawings -------------------------------------------------------------------------

def border_grey(image):
    """Returns the median grey, 0 to 255, of an RGB drawing's outermost pixels: its ground."""
    grey = np.asarray(image.convert("L"))
    return float(np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])))


def is_light_on_dark(image):
    """Returns whether an RGB drawing has a dark ground."""
    return border_grey(image) < 128


def sketch_to_cond(image):
    """Returns cond (1, H, W) float in [0, 1] of a dark-on-light RGB drawing: 1 is ink, 0 paper."""
    ink = 1 - np.asarray(image.convert("L"), np.float32) / 255
    return torch.from_numpy(ink)[None]


def read_drawing(file, width, height):
    """Returns (cond (1, height, width), drawing as used) of any drawing a user may have.

    It is fitted into that many pixels with paper around it; a light-on-dark one is inverted; paper
    that is not white becomes white; lines that have become faint by shrinking are brought back to
    full ink. Errors: DataError where the file is no image or holds no drawing.
    """
    image = open_image(file)
    if is_light_on_dark(image):
        image = ImageOps.invert(image)
    # grey or yellowed paper is paper: what is as light as the border becomes white
    paper = max(border_grey(image), 1)
    image = image.convert("L").point(lambda grey: min(255, round(grey * 255 / paper)))
    drawing = ImageOps.pad(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS,
                           color="white")
    cond = sketch_to_cond(drawing)
    if cond.max() < 0.1:
        raise DataError(f"{file}: no line in it; a drawing is dark on light or light on dark")
    cond = cond / cond.max()
    return cond, to_image((1 - 2 * cond).expand(3, -1, -1))


def extract_lines(x):
    """Returns where the lines of pictures are: (B, H, W) bool for x (B, 3, H, W) in [-1, 1].

    Canny's first steps (IEEE PAMI 8(6), 1986): the Sobel gradient of whichever colour channel
    changes most, kept where it is a maximum across the line and above LINE_CONTRAST.
    """
    B, C, H, W = x.shape
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack([sobel, sobel.T])[:, None]                           # (2, 1, 3, 3)
    padded = F.pad(x.float().cpu(), (1, 1, 1, 1), mode="replicate")
    padded = padded.reshape(B * C, 1, H + 2, W + 2)
    gradient = F.conv2d(padded, kernels).view(B, C, 2, H, W)
    magnitude, channel = gradient.norm(dim=2).max(dim=1)                       # (B, H, W)
    across = gradient.gather(1, channel[:, None, None].expand(B, 1, 2, H, W))[:, 0]
    octant = (torch.atan2(across[:, 1], across[:, 0]) / (torch.pi / 4)).round().long() % 4
    around = F.pad(magnitude, (1, 1, 1, 1))
    lines = torch.zeros_like(magnitude, dtype=torch.bool)
    for i, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        after = around[:, 1 + dy:1 + dy + H, 1 + dx:1 + dx + W]
        before = around[:, 1 - dy:1 - dy + H, 1 - dx:1 - dx + W]
        lines |= (octant == i) & (magnitude >= after) & (magnitude > before)
    return lines & (magnitude > LINE_CONTRAST)


def line_f1(found, wanted):
    """Returns the F1 score (B,) of lines found against lines wanted, (B, H, W) bool, 1 px apart."""
    def near(lines):
        return F.max_pool2d(lines.float(), 3, 1, 1) > 0

    precision = (found & near(wanted)).sum((1, 2)) / found.sum((1, 2)).clamp(min=1)
    recall = (wanted & near(found)).sum((1, 2)) / wanted.sum((1, 2)).clamp(min=1)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-9)


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

def images_at_a_time(size):
    """Returns how many pictures of `size` px go through a network at a time; 1 from 512 px on."""
    return max(1, PIXELS_AT_A_TIME // size**2)


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
