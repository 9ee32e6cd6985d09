"""Training pairs that the base draws itself, with conditions read off its pictures.

From n labelled pairs BPS has to learn all pictures that fit a condition, and n pictures show only
few of them. To learn which condition fits a picture is far easier: each pixel of the n pairs is an
example. So the base draws more pictures, a small network trained on the labelled pairs reads
conditions off them, and BPS trains on these pairs, too. Lemma 3.1 of arXiv 2406.03683 allows this,
because a condition depends on the clean picture alone. Where a program can read conditions, as for
train.py --extract, no labelled pair is needed. DatasetGAN (arXiv 2104.06490) also labels a
generator's pictures from few labels; docs/method.md compares the estimators.

    files = draw_pictures(base, prompts, 500, 64, folder)
    extractor = fit_extractor(train_pairs, val_pairs, "sketch", 64)
    pairs = pairs_of(files, prompts, extractor.read, hash_module(extractor))

Shapes: B batch, C channels of the condition, H W rows and columns of the picture.
"""
import hashlib
import json
import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from data import SPLITS, Pair, load_pairs, open_pair, split_names, with_copies
from diffusion import Sampling
from inputs.conditions import (MAX_CLASSES, TASKS, class_colours, cond_to_x, images_at_a_time,
                               open_image, to_image, to_x)
from inputs.files import hash_module, read_utf8
from inputs.processes import Processes
from sample import check_pictures, draw
from weights import UserError, replacing

SAMPLING = Sampling(guidance_scale=1.0)         # the prior's own law; guidance would narrow it
WIDTH = 32                                      # of the extractor
FIT_STEPS, FIT_BATCH, FIT_RATE = 1200, 8, 3e-3  # a minute on one core at 64 px
FIT_PAIRS = 200                                 # most labelled pairs that it is fitted to
MIN_QUALITY = 0.5                               # least explained variance of its labels


# ---- pictures ------------------------------------------------------------------------------

def pictures_folder(base, prompts, size, root):
    """The folder in root for this base's pictures of these prompts, however many are drawn."""
    content = [hash_module(base.unet), hash_module(base.vae), hash_module(base.text_model),
               repr(base.schedule), base.tokenizer(list(prompts)).tolist(), size, SAMPLING]
    return root / f"draws-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}"


def draw_pictures(base, prompts, count, size, folder, processes=Processes()):
    """PNG files of `count` pictures by the frozen base, each prompt in turn, with seed i.

    Pictures that exist are not drawn again, and each is written when it is finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:06d}.png" for i in range(count)]
    missing = [i for i in processes.shard(count).tolist() if not files[i].is_file()]
    with torch.inference_mode(), tqdm(total=len(missing), desc="pictures of the base",
                                      disable=not missing) as bar:
        at_a_time = images_at_a_time(size)
        for seeds in (missing[k:k + at_a_time] for k in range(0, len(missing), at_a_time)):
            context = base.encode([prompts[i % len(prompts)] for i in seeds])
            x = draw(base, context, None, seeds, (size, size), SAMPLING)    # no guidance
            check_pictures(x)
            for i, picture in zip(seeds, x):
                with replacing(files[i]) as temporary:
                    to_image(picture).save(temporary)
            bar.update(len(seeds))
    processes.barrier()
    return files


def pairs_of(files, prompts, read=None, reader=""):
    """Pairs of drawn pictures; read(image) -> condition picture, None if a program makes it.

    reader: identifies `read`, such as the extractor's hash, so that a cache tells readers apart.
    """
    read = read or (lambda image: image)
    return [Pair(f"{file.parent.name}/{file.stem} {reader}",
                 lambda file=file: read(open_image(file)), lambda file=file: open_image(file),
                 (prompts[i % len(prompts)],), (file,)) for i, file in enumerate(files)]


def shuffled(items):
    """The items in a fixed random order: a user's files may be sorted by kind."""
    return random.Random(0).sample(items, len(items))


# ---- the extractor -------------------------------------------------------------------------

class Extractor(nn.Module):
    """Six convolutions on three scales that read a condition off a picture, on the CPU.

    With classes, {colour: number} of label maps, it has one output for each; else one for each
    channel of the condition.
    """

    def __init__(self, task_name, classes):
        super().__init__()
        self.task, self.classes, self.config = TASKS[task_name], classes, (task_name, classes)
        colours = [list(bytes.fromhex(colour[1:])) for colour in classes]
        self.register_buffer("colours", torch.tensor(colours).float() / 255)        # (K, 3)
        self.fine = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.down1 = nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1)
        self.up = nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1)
        self.out = nn.Conv2d(WIDTH, len(classes) or self.task.channels, 3, padding=1)

    def forward(self, x):
        """Logits (B, outputs, H, W) of pictures x (B, 3, H, W) in [-1, 1]."""
        full = F.silu(self.fine(x))
        half = F.silu(self.down1(full))
        quarter = F.silu(self.down2(half))
        quarter = quarter + F.silu(self.middle(quarter))
        half = half + F.interpolate(quarter, half.shape[-2:], mode="bilinear")
        full = full + F.interpolate(F.silu(self.up(half)), full.shape[-2:], mode="bilinear")
        return self.out(full)

    def target(self, cond):
        """What the outputs should be, in [0, 1], for conditions (B, C, H, W) in [0, 1]."""
        if not self.classes:
            return cond
        distance = (cond[:, None] - self.colours[None, :, :, None, None]).abs().sum(2)
        return F.one_hot(distance.argmin(1), len(self.classes)).permute(0, 3, 1, 2).float()

    @torch.inference_mode()
    def read(self, image):
        """The condition picture of an RGB image, in the form that a user would give."""
        logits = self(to_x(image)[None])[0]
        if self.classes:
            numbers = np.array(list(self.classes.values()), np.uint8)
            if len(set(numbers)) < len(numbers):        # RGB maps number their own colours
                numbers = np.arange(len(numbers), dtype=np.uint8)
            palette = np.zeros((256, 3), np.uint8)
            palette[numbers] = (self.colours * 255).round().byte().numpy()
            labels = Image.fromarray(numbers[logits.argmax(0).numpy()])
            labels.putpalette(palette.tobytes())
            return labels
        return to_image(cond_to_x(logits.sigmoid()[None])[0])


def fit_extractor(pairs, val_pairs, task_name, size, seed=0, with_mirrored=True):
    """An Extractor trained on labelled pairs.

    UserError if it explains less than MIN_QUALITY of the held-out conditions' variance.
    """
    classes, generator = {}, torch.Generator().manual_seed(seed)
    pairs, val_pairs = shuffled(pairs)[:FIT_PAIRS], shuffled(val_pairs)[:FIT_PAIRS]
    if TASKS[task_name].has_labels:
        for pair in pairs:
            classes |= class_colours(pair.open_cond())
        if len(classes) > MAX_CLASSES:
            raise UserError(f"--from-base must have at most {MAX_CLASSES} classes, got "
                            f"{len(classes)}. Use maps with fewer colours.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        extractor = Extractor(task_name, classes).to(memory_format=torch.channels_last)
    copies = with_copies(pairs, with_mirrored)      # moved ones, too: the base plays no part
    optimizer = torch.optim.Adam(extractor.parameters(), FIT_RATE)
    for step in tqdm(range(FIT_STEPS), desc="extractor", leave=False):
        optimizer.param_groups[0]["lr"] = FIT_RATE * (1 - step / FIT_STEPS)
        batch = torch.randint(len(copies), (FIT_BATCH,), generator=generator).tolist()
        conds, pictures, _ = zip(*(open_pair(copies[i], task_name, size) for i in batch))
        target = extractor.target(torch.stack(conds) / 255)
        x = torch.stack(pictures).contiguous(memory_format=torch.channels_last)
        loss = F.binary_cross_entropy_with_logits(extractor(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    quality = explained_variance(extractor, val_pairs, task_name, size)
    print(f"extractor: explains {quality:.0%} of the variance of {len(val_pairs)} validation "
          f"conditions")
    if not quality >= MIN_QUALITY:                  # nan if all validation conditions are blank
        raise UserError(f"--from-base needs an extractor that explains {MIN_QUALITY:.0%} of the "
                        f"variance of held-out conditions, got {quality:.0%}. Use more pairs, or "
                        f"train without --from-base.")
    return extractor.eval()


def explained_variance(extractor, pairs, task_name, size):
    """Share of the variance of the pairs' conditions that the extractor reads off pictures."""
    opened = [open_pair(pair, task_name, size) for pair in pairs]
    conds = torch.stack([cond for cond, _, _ in opened]) / 255
    read = torch.stack([extractor.task.to_cond(extractor.read(to_image(x)))
                        for _, x, _ in opened])
    mean = conds.mean((0, 2, 3), keepdim=True)
    return 1 - ((read - conds).square().sum() / (conds - mean).square().sum()).item()


# ---- for train.py --------------------------------------------------------------------------

def draw_for(prompts, base, args, processes):
    """(files, prompts) of args.from_base pictures of the prompts, which are shuffled."""
    prompts = shuffled(prompts)
    folder = pictures_folder(base, prompts, args.size, args.cache)
    return draw_pictures(base, prompts, args.from_base, args.size, folder, processes), prompts


def draw_splits(base, args, processes):
    """{split: pairs} of pictures that the base draws; a program makes their conditions.

    The prompts are the lines of the text file --data, or those of the embedded pairs.
    """
    if args.data:
        prompts = [line.strip() for line in read_utf8(args.data).splitlines() if line.strip()]
    else:
        prompts = [pair.prompts[0] for pair in load_pairs(args.task, "train")]
    if not prompts:
        raise UserError(f"--data {args.data} has no prompt. Give a text file with one per line.")
    pairs = pairs_of(*draw_for(prompts, base, args, processes))
    split_of = split_names([pair.name for pair in pairs])
    return {split: [pair for pair in pairs if split_of[pair.name] == split]
            for split in SPLITS}


def add_draws(rows, splits, base, args, processes):
    """Labelled rows and drawn pairs for a LatentCache, so that half of each batch is drawn."""
    task, pairs = TASKS[args.task], splits["train"]
    read, reader = None, ""
    if not args.extract and task.extract is not task.to_cond:
        extractor = processes.broadcast(lambda: fit_extractor(
            pairs, splits["val"], args.task, args.size, args.seed, not args.no_mirror))
        read, reader = extractor.read, hash_module(extractor)
    files, prompts = draw_for([pair.prompts[0] for pair in pairs], base, args, processes)
    draws = pairs_of(files, prompts, read, reader)
    # none are moved: the base can draw more instead
    draws = with_copies(draws, not args.no_mirror, with_moved=False)
    weight = len(rows) / len(draws)
    return rows + [pair._replace(weight=weight) for pair in draws]
