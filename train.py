"""Steers a frozen Stable Diffusion with a new condition: trains BPS on pairs and measures it.

    python train.py --task sketch                       # embedded base, embedded line drawings
    python train.py --base SD_FOLDER --data PAIRS --size 512 --batch 16 --lr 1e-5

Writes to runs/TASK: bps.safetensors, samples.png, log.jsonl, args.json. Interrupted, the same
command goes on from the last checkpoint; a finished run is never overwritten.

Shapes: B batch, C channels, H W rows and columns of the latent.
"""
import json
import shlex
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import layouts
import weights
from bps import BPS, config_for, save_bps
from data import (
    TASKS,
    Bank,
    DataError,
    extract_lines,
    images_at_a_time,
    line_f1,
    load_pairs,
    to_image,
    to_x,
)
from sample import BASE, Parser, Steering, draw, load_base, run, seed_number

VALIDATION_T = tuple(range(62, 1000, 125))      # the fixed timesteps: 62, 187 .. 937
OBEDIENCE_PICTURES = 48
SHEET_ROWS = 12
CHECKPOINT = "checkpoint.safetensors"           # there as long as a run is unfinished
SAMPLE_STEPS, SAMPLE_GUIDANCE = 25, 3.0


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
        cond, z, context = (x.to(device) for x in bank.batch(args.batch, generator))
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


# ---- is it learning? -----------------------------------------------------------------------

@torch.inference_mode()
def paired_errors(unet, schedule, bank, bps=None, shift=0):
    """Returns the squared error of eps (or v) (n,) for each pair, over VALIDATION_T, fixed noise.

    bps None is the frozen base. shift 1 gives each pair the condition of the one before.
    """
    device = next(unet.parameters()).device
    errors = torch.zeros(len(bank.pairs))
    conds = bank.cond(slice(0, len(errors))).roll(shift, 0)
    context = bank.context(bank.first_prompts(range(len(errors))))
    for t in VALIDATION_T:
        generator = torch.Generator().manual_seed(t)            # the same noise for every model
        noise = torch.randn(bank.mean[:len(errors)].shape, generator=generator)
        for i in torch.arange(len(errors)).split(images_at_a_time(bank.size)):
            ts = torch.full((len(i),), t)
            z = bank.mean[i].float()
            target = schedule.target(z, noise[i], ts)
            z_t = schedule.add_noise(z, noise[i], ts).to(device)
            z_t, ts = z_t.contiguous(memory_format=torch.channels_last), ts.to(device)
            residuals = bps and bps(conds[i].to(device), unet.time_embedding(ts))
            eps = unet(z_t, ts, context[i].to(device), residuals).cpu()
            errors[i] += (eps - target).square().mean(dim=(1, 2, 3)) / len(VALIDATION_T)
    return errors


def mean_and_error(values):
    """Returns (mean, standard error of the mean) of values (n,) as floats; n = 1 has error 0."""
    deviation = values.std().item() if len(values) > 1 else 0.0
    return values.mean().item(), deviation / len(values) ** 0.5


def ratio(value, unit):
    """Returns value / unit; nan where the unit is zero, as with a single pair."""
    return value / unit if unit else float("nan")


def validate(unet, schedule, bank, bps):
    """Returns the losses on held-out pairs, and gain and gap with their standard errors.

    gain: frozen base minus steered. gap: with shuffled conditions minus with the right ones; only
    a network that reads the condition has one.
    """
    base = paired_errors(unet, schedule, bank)
    steered = paired_errors(unet, schedule, bank, bps)
    shuffled = paired_errors(unet, schedule, bank, bps, shift=1)
    return dict(pairs=len(base), base=base.mean().item(), steered=steered.mean().item(),
                shuffled=shuffled.mean().item(), gain=mean_and_error(base - steered),
                gap=mean_and_error(shuffled - steered))


@torch.inference_mode()
def draw_pairs(unet, vae, schedule, bank, bps, count, seed):
    """Returns pictures x (count, 3, H, W) for the first pairs' prompts and conditions, on the CPU.

    bps None is the frozen base; the noise of pair i is that of seed + i either way.
    """
    device = next(unet.parameters()).device
    empty = bank.context([""]).to(device)
    pictures = []
    for i in torch.arange(count).split(images_at_a_time(bank.size)):
        context = bank.context(bank.first_prompts(i.tolist())).to(device)
        steering = bps and Steering(bps, unet, bank.cond(i).to(device))
        pictures.append(draw(unet, vae, schedule, context, empty, (seed + i).tolist(), bank.size,
                             SAMPLE_STEPS, SAMPLE_GUIDANCE, steering).cpu())
    return torch.cat(pictures)


def obedience(pictures, conds):
    """Returns the mean F1, 1 px tolerance, of the pictures' lines against the drawings' lines."""
    paper = (1 - 2 * conds).expand(-1, 3, -1, -1)
    return line_f1(extract_lines(pictures), extract_lines(paper)).mean().item()


# ---- what is written -----------------------------------------------------------------------

def contact_sheet(columns, titles, names, file):
    """Writes one picture: a row a name, in three groups side by side; columns of (n, 3, H, W)."""
    n, _, H, W = columns[0].shape
    zoom = max(1, 128 // W)
    H, W, gap, top = H * zoom, W * zoom, 8, 16
    groups = 3 if n % 3 == 0 else 1
    rows = n // groups
    group_width = len(columns) * (W + 2) + 2 * gap
    sheet = Image.new("RGB", (groups * group_width, top + rows * (H + top)), "white")
    pen = ImageDraw.Draw(sheet)
    for i in range(n):
        left, y = i // rows * group_width, top + i % rows * (H + top)
        for k, (column, title) in enumerate(zip(columns, titles)):
            x = left + k * (W + 2)
            if i % rows == 0:
                pen.text((x, 2), title, "black")
            tile = to_image(column[i]).resize((W, H), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, y))
        pen.text((left, y + H + 1), names[i][:group_width // 7], "grey")     # 6 px a letter
    temporary = file.with_suffix(".tmp.png")
    sheet.save(temporary)
    temporary.replace(file)
    print(file)


def report(unet, vae, schedule, bank, bps, out, seed):
    """Validates on test pairs, draws, writes samples.png and returns all the numbers."""
    numbers = validate(unet, schedule, bank, bps)
    (gain, gain_se), (gap, gap_se) = numbers["gain"], numbers["gap"]
    print(f"held-out loss over {numbers['pairs']} test pairs: frozen base {numbers['base']:.4f}, "
          f"steered {numbers['steered']:.4f}, shuffled conditions {numbers['shuffled']:.4f}")
    print(f"gain {gain:.4f} +- {gain_se:.4f} ({ratio(gain, gain_se):.1f} standard errors), "
          f"shuffled-condition gap {gap:.4f} +- {gap_se:.4f} ({ratio(gap, gap_se):.1f})")
    count = min(OBEDIENCE_PICTURES, len(bank.pairs))
    indices = torch.arange(count)
    conds, names = bank.cond(indices), bank.first_prompts(range(count))
    prior = draw_pairs(unet, vae, schedule, bank, None, count, seed)
    steered = draw_pairs(unet, vae, schedule, bank, bps, count, seed)
    true = torch.stack([to_x(bank.image(i)) for i in range(count)])
    with torch.inference_mode():
        device = next(vae.parameters()).device
        round_trip = torch.cat([vae.decode(z.float().to(device)).cpu()
                                for z in bank.mean[:count].split(images_at_a_time(bank.size))])
    scores = dict(base=obedience(prior, conds), steered=obedience(steered, conds),
                  round_trip=obedience(round_trip, conds))
    share = ratio(scores["steered"] - scores["base"], scores["round_trip"] - scores["base"])
    print(f"obedience (line F1, 1 px, {count} test drawings): frozen base {scores['base']:.3f}, "
          f"steered {scores['steered']:.3f}, VAE round trip of the true picture "
          f"{scores['round_trip']:.3f}: {share:.0%} of the way")
    shown = min(SHEET_ROWS, count)
    contact_sheet([(1 - 2 * conds[:shown]).expand(-1, 3, -1, -1), prior[:shown], steered[:shown],
                   true[:shown]], ["condition", "without BPS", "with BPS", "true picture"],
                  names[:shown], out / "samples.png")
    return numbers | dict(obedience=scores, obedience_share=share)


def choose_out(wanted, facts):
    """Returns the run's folder: `wanted` if new or an unfinished run of the same facts.

    Otherwise the first free one of wanted-2, wanted-3 ..: a finished run is never overwritten.
    facts: the arguments, and the base's fingerprint. Errors: WeightsError for a damaged args.json.
    """
    wanted = wanted if wanted.name else wanted.resolve()        # "." has no name to count up
    for number in range(1, 10_000):
        out = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        if not (out / "args.json").is_file():
            return out
        finished = (out / "bps.safetensors").exists() and not (out / CHECKPOINT).exists()
        if not finished and weights.read_json(out / "args.json") == facts:
            return out
    raise DataError(f"{wanted}: 10,000 runs beside it; give another --out")


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
    add("--data", type=Path, help="folder of your own pairs (default: the embedded ones)")
    parser.add_base()
    add("--size", type=int, default=64, help="pixels of the square; 512 for SD 1.5 "
                                             "(default: %(default)s)")
    add("--steps", type=int, default=900, help="(default: %(default)s)")
    add("--batch", type=int, default=16, help="(default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="AdamW's at the start, then falling to zero; 1e-5 "
                                               "for SD 1.5 (default: %(default)s)")
    add("--save-every", type=int, default=150, help="steps between checkpoints, each with a "
                                                    "validation (default: %(default)s)")
    add("--seed", type=seed_number, default=0, help="(default: %(default)s)")
    parser.add_device()
    add("--out", type=Path, help="folder of the run (default: runs/TASK)")
    args = parser.parse_args()
    for name in ("size", "steps", "batch", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    if not 0 < args.lr < 1:
        parser.error(f"--lr {args.lr}: allowed is what lies between 0 and 1")
    return args


def main():
    """Trains, measures, and writes everything of the run."""
    args = parse_args()
    started, task = time.monotonic(), TASKS[args.task]
    unet, vae, tokenizer, text_model, schedule = load_base(
        args.base, args.tokenizer, args.device, vae_path=args.vae,
        prediction_type=args.prediction_type)
    unit = vae.factor * 2 ** (len(unet.config.channels) - 1)
    if args.size % unit:
        raise DataError(f"--size {args.size}: this base takes multiples of {unit}")
    base = weights.fingerprint(*layouts.find_unet(args.base))
    facts = {key: str(value) for key, value in vars(args).items() if key != "out"}
    facts["base_sha256"] = base
    out = choose_out(args.out or Path("runs") / args.task, facts)

    pairs = {split: load_pairs(args.task, split, args.data) for split in ("train", "val", "test")}
    bank = Bank(pairs["train"], args.size, vae, tokenizer, text_model, mirror=True)
    val_bank, test_bank = (Bank(pairs[split], args.size, vae, tokenizer, text_model,
                                light_on_dark=bank.light_on_dark) for split in ("val", "test"))
    del text_model
    print(f"{len(bank.pairs)} training, {len(val_bank.pairs)} validation and "
          f"{len(test_bank.pairs)} test pairs; latents and text states are cached")

    torch.manual_seed(args.seed)
    bps = BPS(config_for(unet.config, task.channels, vae.factor, task.head_heavy))
    bps = bps.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(bps.parameters(), lr=args.lr, weight_decay=0.01)
    print(f"run: {out}")
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
    metadata = dict(task=args.task, base=base, context_dim=unet.config.context_dim,
                    prediction_type=schedule.prediction_type,
                    size=args.size, steps=args.steps, batch=args.batch, lr=args.lr,
                    seed=args.seed, light_on_dark=bank.light_on_dark)
    file, drawing = out / "bps.safetensors", out / "drawing.png"
    save_bps(bps, file, metadata)                       # first, should the report be interrupted
    numbers = report(unet, vae, schedule, test_bank, bps, out, args.seed)
    save_bps(bps, file, metadata | dict(results=numbers))
    to_image((1 - 2 * test_bank.cond([0])[0]).expand(3, -1, -1)).save(drawing)
    checkpoint.unlink()
    for written in (file, drawing, out / "log.jsonl", out / "args.json"):
        print(written)
    print(f"done in {(time.monotonic() - started) / 60:.1f} min; now draw from a drawing:\n"
          + sampling_command(args, file, drawing, test_bank.first_prompts([0])[0]))


if __name__ == "__main__":
    run(main, interrupted="interrupted; the same command goes on from the last checkpoint")
