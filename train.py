"""Steers a frozen Stable Diffusion with a new condition: trains BPS on pairs and measures it.

    python train.py --task sketch                       # embedded base, embedded line drawings
    python train.py --base SD_FOLDER --data PAIRS --size 512 --batch 16 --lr 1e-5

Writes to runs/TASK: bps.safetensors, samples.png, log.jsonl, args.json. Interrupted, the same
command goes on from the last checkpoint; a finished run is never overwritten.

Shapes: B batch, C channels, H W rows and columns of the latent.
"""
import hashlib
import json
import shlex
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from inputs import checkpoints
import weights
from bps import BPS, config_for, save_bps
from inputs.options import BASE, Parser, check_pixels, run, seed_number
from clip import load_clip
from inputs.conditions import TASKS, UserError, cond_to_x, to_image
from data import EMPTY_SHARE, Bank, load_pairs, mostly_light_on_dark, open_pair, split_names
from measure.report import SHEET_ROWS, contact_sheet, paired_errors, peak_memory, report
from measure.obedience import meter_for
from inputs.pairs import Source, check, find_pairs, groups
from ports import add_options
from sample import load_base
from tiny.tasks import CLASSES

CHECKPOINT = "checkpoint.safetensors"           # there as long as a run is unfinished


# ---- training ------------------------------------------------------------------------------

def train(bps, optimizer, unet, schedule, bank, args, start, on_save):
    """Trains BPS in place from step `start` to args.steps; nothing of the base ever changes.

    Everything random is a function of (seed, step), so a resumed run equals an uninterrupted one.
    on_save(step, loss) is called every args.save_every steps and at the end.
    """
    device = args.device
    average = None
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="train")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        cond, z, context = (x.to(device) for x in bank.batch(args.batch, generator,
                                                                args.prompt_drop))
        t = torch.randint(schedule.timesteps, (args.batch,), generator=generator).to(device)
        noise = torch.randn(z.shape, generator=generator).to(device)
        z_t = schedule.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)

        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device != "cpu"):
            residuals = bps(cond, unet.time_embedding(t))
            eps = unet(z_t, t, context, residuals)
        loss = F.mse_loss(eps.float(), schedule.target(z, noise, t))

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(bps.parameters(), 1.0)
        optimizer.step()

        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            on_save(step + 1, average)


# ---- what is written -----------------------------------------------------------------------

def choose_out(wanted, facts):
    """Returns the run's folder: `wanted` if new or an unfinished run of the same facts.

    Otherwise the first free one of wanted-2, wanted-3 ..: a finished run is never overwritten.
    facts: the arguments, and the base's fingerprint. Errors: UserError for a damaged args.json.
    """
    wanted = wanted if wanted.name else wanted.resolve()        # "." has no name to count up
    for number in range(1, 10_000):
        out = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        if not (out / "args.json").is_file():
            return out
        finished = (out / "bps.safetensors").exists() and not (out / CHECKPOINT).exists()
        if not finished and weights.read_json(out / "args.json") == facts:
            return out
    raise UserError(f"{wanted}: 10,000 runs beside it; give another --out")


def named_classes(args, bank):
    """Returns {colour: name} of the label maps' classes; only the embedded ones have names."""
    names = {} if args.data else {colour: name for name, colour in CLASSES.items()}
    return {colour: names.get(colour, "") for colour in sorted(bank.classes)}


def example_condition(task, bank):
    """Returns an image that draws with pair 0's condition: itself where it is colours only."""
    if task == "artistic":                  # whose condition is made of the picture
        return bank.image(0)
    return to_image(cond_to_x(bank.cond([0]))[0])


def sampling_command(args, file, drawing, prompt):
    """Returns the command that draws with a trained BPS on the base of these arguments."""
    words = ["python", "sample.py", "--bps", file, "--cond", drawing, "--prompt", prompt]
    words += ["--base", args.base] if args.base != BASE else []
    for name in ("tokenizer", "vae", "prediction_type"):
        value = getattr(args, name)
        words += [f"--{name.replace('_', '-')}", value] if value else []
    return shlex.join(map(str, words))


def parse_args():
    """Returns the checked command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--task", choices=TASKS, default="sketch", help="kind of condition (default: %(default)s)")
    add("--data", type=Path, help="your own pairs: a folder, or a .zip of one (default: the "
        "embedded ones)")
    add("--extract", choices=[name for name, task in TASKS.items() if task.has_lines],
        help="make the conditions of this task from the images' own lines; --data needs no others")
    add("--default-prompt", default="", help="of pictures that have no caption (default: nothing)")
    add("--prompt-drop", type=float, default=EMPTY_SHARE, help="share of prompts that training "
        "leaves empty, so that guidance works (default: %(default)s)")
    add("--check-data", action="store_true", help="look at --data without training: what is in "
        "it, what is wrong, and a sheet of what the network will see")
    parser.add_base()
    add("--size", type=int, default=64, help="pixels of the square; 512 for SD 1.5 "
                                             "(default: %(default)s)")
    add_options(parser)
    add("--steps", type=int, help="fewer for few pictures: when the validation loss rises, they "
        "are learned by heart (default: 900, artistic 300)")
    add("--batch", type=int, default=16, help="(default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="AdamW's at the start, then falling to zero; 1e-5 "
                                               "for SD 1.5 (default: %(default)s)")
    add("--save-every", type=int, default=150, help="steps between checkpoints, each with a "
                                                    "validation (default: %(default)s)")
    add("--seed", type=seed_number, default=0, help="(default: %(default)s)")
    parser.add_device()
    add("--out", type=Path, help="folder of the run (default: runs/TASK)")
    args = parser.parse_args()
    args.weights = args.weights or TASKS[args.task].port_weights
    args.steps = TASKS[args.task].steps if args.steps is None else args.steps
    for name in ("size", "steps", "batch", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    if not 0 < args.lr < 1:
        parser.error(f"--lr {args.lr}: allowed is what lies between 0 and 1")
    if not 0 <= args.prompt_drop <= 1:
        parser.error(f"--prompt-drop {args.prompt_drop}: allowed are 0 to 1")
    for name in ("extract", "check_data", "default_prompt"):
        if getattr(args, name) and not args.data:
            parser.error(f"--{name.replace('_', '-')}: needs --data, your own pairs")
    if args.extract and args.extract != args.task:
        parser.error(f"--extract {args.extract}: makes no conditions of --task {args.task}; give "
                     f"--task {args.extract}")
    args.out = args.out or Path("runs") / ("check" if args.check_data else args.task)
    parser.check_out(args.out)
    return args


def load_splits(args):
    """Returns {train, val or test: its pairs}."""
    return {split: load_pairs(args.task, split, args.data, bool(args.extract), args.default_prompt)
            for split in ("train", "val", "test")}


def run_facts(args, splits):
    """Returns what makes a run this one: arguments, base, its pairs' names and captions."""
    pairs = [(split, pair.name, pair.prompts) for split, own in splits.items() for pair in own]
    return {key: str(value) for key, value in vars(args).items() if key != "out"} | dict(
        base_sha256=weights.fingerprint(*checkpoints.find_unet(args.base)),
        pairs_sha256=hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16])


def load_banks(args, splits, vae, tokenizer, text_model):
    """Returns the Banks of the training, validation and test pairs."""
    light_on_dark, banks = None, []
    for split, pairs in splits.items():
        banks.append(Bank(pairs, args.task, args.size, vae, tokenizer, text_model,
                          mirror=split == "train", light_on_dark=light_on_dark,
                          extract=bool(args.extract)))
        light_on_dark = banks[0].light_on_dark
    return banks


def main():
    """Trains, measures, and writes everything of the run."""
    args = parse_args()
    if args.check_data:
        return check_data(args)
    started, task = time.monotonic(), args.task
    unet, vae, tokenizer, text_model, schedule = load_base(
        args.base, args.tokenizer, args.device, vae_path=args.vae,
        prediction_type=args.prediction_type)
    if args.size % (unit := vae.factor * 2 ** (len(unet.config.channels) - 1)):
        raise UserError(f"--size {args.size}: this base takes multiples of {unit}")
    check_pixels(args.size, args.size)
    bps_config = config_for(unet.config, TASKS[task].channels, vae.factor, args.weights, args.paths,
                            args.foot)
    splits = load_splits(args)
    facts = run_facts(args, splits)
    out = choose_out(args.out, facts)
    bank, val_bank, test_bank = load_banks(args, splits, vae, tokenizer, text_model)
    del text_model
    print(f"{len(bank.pairs)} training, {len(val_bank.pairs)} validation and "
          f"{len(test_bank.pairs)} test pairs; latents and text states are cached")

    torch.manual_seed(args.seed)
    bps = BPS(bps_config).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(bps.parameters(), lr=args.lr, weight_decay=0.01)
    other = out.resolve() != args.out.resolve()
    print(f"run: {out}" + f" ({args.out} holds another run)" * other)
    out.mkdir(parents=True, exist_ok=True)
    weights.write_json(facts, out / "args.json")
    checkpoint, start = out / CHECKPOINT, 0
    if checkpoint.exists():
        start = weights.load_training(checkpoint, dict(bps=bps), "bps", optimizer)["step"]
        print(f"{checkpoint}: resumed at step {start}")
    base_loss = paired_errors(unet, schedule, val_bank).mean().item()

    def on_save(step, loss):
        steered = paired_errors(unet, schedule, val_bank, bps).mean().item()
        row = dict(step=step, train_loss=loss, val_base=base_loss, val_steered=steered)
        with open(out / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        weights.save_training(checkpoint, dict(bps=bps), "bps", optimizer, dict(step=step))
        tqdm.write(f"step {step}: validation loss {steered:.4f}, frozen base {base_loss:.4f}")

    train(bps, optimizer, unet, schedule, bank, args, start, on_save)
    metadata = dict(task=task, base=facts["base_sha256"], context_dim=unet.config.context_dim,
                    prediction_type=schedule.prediction_type, size=args.size, steps=args.steps,
                    batch=args.batch, lr=args.lr, seed=args.seed, extracted=bool(args.extract),
                    light_on_dark=bank.light_on_dark, classes=named_classes(args, bank))
    file, drawing = out / "bps.safetensors", out / "condition.png"
    save_bps(bps, file, metadata)                       # first, should the report be interrupted
    meter = meter_for(task, args.data is None, args.device)
    numbers = report(unet, vae, schedule, test_bank, bps, out, args.seed, meter)
    save_bps(bps, file, metadata | dict(results=numbers))
    example_condition(task, test_bank).save(drawing)
    checkpoint.unlink()
    for written in (file, drawing, out / "log.jsonl", out / "args.json"):
        print(written)
    print(f"done in {(time.monotonic() - started) / 60:.1f} min, peak memory "
          f"{peak_memory(args.device):.2f} GB; now draw from a condition:\n"
          + sampling_command(args, file, drawing, test_bank.first_prompts([0])[0]))


if __name__ == "__main__":
    run(main, interrupted="interrupted; the same command goes on from the last checkpoint")
