"""Steers a frozen Stable Diffusion with a new condition: trains BPS on pairs and measures it.

    python train.py --task sketch                       # embedded base, embedded line drawings
    python train.py --base SD_FOLDER --data PAIRS --size 512 --batch 16 --lr 1e-5

Writes to runs/TASK: bps.safetensors, samples.png, log.jsonl, args.json. Interrupted, the same
command goes on from the last checkpoint; a finished run is never overwritten.

Shapes: B batch, C channels, H W rows and columns of the latent.
"""
import hashlib
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import weights
from bps import build_bps, config_for, save_bps
from data import LatentCache, check_conditions, load_pairs
from inputs import checkpoints
from inputs.conditions import TASKS, class_names, cond_to_x, to_image
from inputs.options import BASE, run, shell_command
from inputs.train_options import check_size, parse_args
from measure.dataset import check_data
from measure.obedience import meter_for
from measure.report import paired_errors, peak_memory, report
from sample import load_base
from tiny.tasks import CLASSES
from weights import UserError

CHECKPOINT = "checkpoint.safetensors"           # there as long as a run is unfinished
SPLITS = ("train", "val", "test")


# ---- training ------------------------------------------------------------------------------

def train(bps, optimizer, base, cache, args, start, on_save):
    """Trains BPS in place from step `start` to args.steps; nothing of the base ever changes.

    Everything random is a function of (seed, step), so a resumed run equals an uninterrupted one.
    on_save(step, loss) is called every args.save_every steps and at the end.
    """
    device, schedule = args.device, base.schedule
    average = None
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="train")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)    # a large prime
        cond, z, context = (x.to(device) for x in cache.batch(args.batch, generator,
                                                              args.prompt_drop))
        t = torch.randint(schedule.timesteps, (args.batch,), generator=generator).to(device)
        noise = torch.randn(z.shape, generator=generator).to(device)
        z_t = schedule.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)

        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device != "cpu"):
            residuals = bps(cond, base.unet.time_embedding(t))
            eps = base.unet(z_t, t, context, residuals)
        # Of all functions of (z_t, t, text, c), E[noise | z_t, text, c] minimises this: the
        # posterior denoiser. The gradient reaches BPS through the frozen U-Net's layers.
        loss = F.mse_loss(eps.float(), schedule.target(z, noise, t))

        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(bps.parameters(), 1.0)
        check_finite(torch.stack([loss, norm]), f"step {step + 1}: the loss or its gradient",
                     args.lr)
        optimizer.step()

        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            on_save(step + 1, average)


def check_finite(values, what, lr):
    """Raises UserError if one of the values is not finite; its run ends with its last checkpoint."""
    if not values.isfinite().all():
        raise UserError(f"{what} is not finite, most likely because --lr {lr:g} is too large; give "
                        f"a smaller one. The last checkpoint is kept")


# ---- the run's folder ----------------------------------------------------------------------

def choose_out(folder, facts):
    """Returns the run's folder: `folder` if new or an unfinished run of the same facts.

    Otherwise the first free one of folder-2, folder-3 ..: a finished run is never overwritten.
    facts: the arguments, and the base's fingerprint. Errors: UserError for a damaged args.json.
    """
    folder = folder if folder.name else folder.resolve()        # "." has no name to count up
    for number in range(1, 10_000):
        out = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        if not (out / "args.json").is_file():
            return out
        finished = (out / "bps.safetensors").exists() and not (out / CHECKPOINT).exists()
        if not finished and weights.read_json(out / "args.json") == facts:
            return out
    raise UserError(f"{folder}: 10,000 runs beside it; give another --out")


def run_facts(args, splits):
    """Returns what makes a run this one: arguments, and what its base and its pairs consist of."""
    pairs = [(split, pair) for split, pairs in splits.items() for pair in pairs]
    names = [(split, pair.name, pair.prompts) for split, pair in pairs]
    return {key: str(value) for key, value in vars(args).items() if key != "out"} | dict(
        base_sha256=weights.fingerprint(*checkpoints.find_unet(args.base)),
        vae_sha256=weights.fingerprint(checkpoints.read_vae(args.vae or args.base).file),
        text_sha256=weights.fingerprint(checkpoints.read_text(args.base).file),
        pairs_sha256=hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16],
        pictures_sha256=weights.fingerprint(*(file for _, pair in pairs for file in pair.files)))


def bps_metadata(args, facts, base, cache):
    """Returns what a sampler has to know of a trained BPS, beside its sizes."""
    numbers = {colour: number for number, maps in cache.maps_of_class.items() for colour in maps}
    names = class_names(numbers)            # those of grey maps have numbers, and
    if not args.data:                       # those of the embedded maps have words
        names = {colour: word for word, colour in CLASSES.items() if colour in numbers}
    return dict(task=args.task, base=facts["base_sha256"],
                context_dim=base.unet.config.context_dim,
                prediction_type=base.schedule.prediction_type, size=args.size, steps=args.steps,
                batch=args.batch, lr=args.lr, seed=args.seed, extracted=args.extract,
                classes=dict(sorted(names.items())))


def example_condition(task, cache):
    """Returns an image that draws with pair 0's condition, in the form that a user would give."""
    if TASKS[task].extract is TASKS[task].to_cond:      # made of any picture
        return cache.image(0)
    return to_image(cond_to_x(cache.cond([0]))[0])


def sampling_command(args, file, drawing, prompt):
    """Returns the command that draws with a trained BPS on the base of these arguments."""
    words = ["python", "sample.py", "--bps", file, "--cond", drawing, "--prompt", prompt]
    words += ["--base", args.base] if args.base != BASE else []
    for name in ("tokenizer", "vae", "prediction_type"):
        value = getattr(args, name)
        words += [f"--{name.replace('_', '-')}", value] if value else []
    return shell_command(words)


# ---- the script ----------------------------------------------------------------------------

def main():
    """Trains, measures, and writes everything of the run."""
    args = parse_args(__doc__)
    if args.check_data:
        return check_data(args)
    started = time.monotonic()
    base = load_base(args.base, args.tokenizer, args.device, vae_path=args.vae,
                     prediction_type=args.prediction_type)
    base.check_finite()
    check_size(args.size, base)
    config = config_for(base.unet.config, TASKS[args.task].channels, base.vae.factor, args.weights,
                        args.foot)
    splits = {split: load_pairs(args.task, split, args.data, args.extract, args.default_prompt)
              for split in SPLITS}
    facts = run_facts(args, splits)
    out = choose_out(args.out, facts)
    cache, val_cache, test_cache = (
        LatentCache(pairs, args.task, args.size, base, mirror=split == "train",
                    extract=args.extract) for split, pairs in splits.items())
    check_conditions((cache, val_cache, test_cache), args.task)
    print(f"{len(cache.pairs)} training, {len(val_cache.pairs)} validation and "
          f"{len(test_cache.pairs)} test pairs; latents and text states are cached")

    torch.manual_seed(args.seed)
    bps = build_bps(config).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(bps.parameters(), lr=args.lr, weight_decay=0.01)
    renamed = out.resolve() != args.out.resolve()
    print(f"run: {out} ({args.out} holds another run)" if renamed else f"run: {out}")
    out.mkdir(parents=True, exist_ok=True)
    weights.write_json(facts, out / "args.json")
    checkpoint, start = out / CHECKPOINT, 0
    if checkpoint.exists():
        start = weights.load_training(checkpoint, dict(bps=bps), "bps", optimizer)["step"]
        print(f"{checkpoint}: resumed at step {start}")
    base_loss = paired_errors(base, val_cache).mean().item()

    def on_save(step, loss):
        steered = paired_errors(base, val_cache, bps).mean()
        check_finite(steered, f"step {step}: the validation loss", args.lr)
        row = dict(step=step, train_loss=loss, val_base=base_loss, val_steered=steered.item())
        with open(out / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        weights.save_training(checkpoint, dict(bps=bps), "bps", optimizer, dict(step=step))
        tqdm.write(f"step {step}: validation loss {steered:.4f}, frozen base {base_loss:.4f}")

    train(bps, optimizer, base, cache, args, start, on_save)
    metadata, file = bps_metadata(args, facts, base, cache), out / "bps.safetensors"
    save_bps(bps, file, metadata)                       # first, should the report be interrupted
    meter = meter_for(args.task, args.data is None, args.device)
    numbers = report(base, test_cache, bps, out, args.seed, meter)
    save_bps(bps, file, metadata | dict(results=numbers))
    drawing = out / "condition.png"
    example_condition(args.task, test_cache).save(drawing)
    checkpoint.unlink()
    for written in (file, drawing, out / "log.jsonl", out / "args.json"):
        print(written)
    print(f"done in {(time.monotonic() - started) / 60:.1f} min, peak memory "
          f"{peak_memory(args.device):.2f} GB; now draw from a condition:\n"
          + sampling_command(args, file, drawing, test_cache.first_prompts([0])[0]))


if __name__ == "__main__":
    run(main, interrupted="interrupted; the same command goes on from the last checkpoint")
