"""Steers a frozen Stable Diffusion with a new condition: trains BPS on pairs and measures it.

    python train.py --task sketch                       # embedded base, embedded line drawings
    python train.py --base SD_FOLDER --data PAIRS --batch 16
    python train.py --task sketch --from-base 500       # pictures that the base draws, no pairs

Writes to runs/TASK: bps.safetensors (the moving average of the weights), samples.png,
condition.png, log.jsonl, curve.png, args.json. If it is interrupted, the same command resumes from
the last checkpoint; a finished run is never overwritten.

Shapes: B batch, C channels, H W rows and columns of the latent.
"""
import contextlib
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import weights
from bps import build_bps, config_for, load_bps, save_bps
from data import CACHE, MIN_PAIRS, SPLITS, LatentCache, check_conditions, load_pairs, with_copies
from draws import add_draws, draw_splits
from inputs.conditions import TASKS, class_names, cond_to_x, to_image
from inputs.files import write_json, write_lines
from inputs.options import (DTYPES, Parser, add_port_options, check_pixels, in_range, is_embedded,
                            positive, run_script, seed_number, shell_command, to_argv,
                            unicode_path, unicode_text)
from inputs.pairs import warn_of_losses
from inputs.processes import join_processes
from inputs.run_folder import CHECKPOINT, check_best, choose_out, lock, run_record
from measure.curve import draw_curve
from measure.dataset import check_data
from measure.obedience import meter_for
from measure.report import paired_errors, peak_memory, report
from sample import load_base
from tiny.tasks import CLASSES
from weights import UserError

EMBEDDED_DEFAULTS = dict(size=64, lr=1e-3)          # with the steps of the task
OTHER_DEFAULTS = dict(size=512, lr=1e-5, steps=10_000)      # SD 1.5's size, the authors' rate
MAX_GRADIENT_NORM = 1.0
AVERAGED_STEPS = 100            # of the moving average of the weights
SELECTION_PAIRS = 100           # with fewer, the validation loss is too noisy to choose a step


# ---- options -------------------------------------------------------------------------------

def make_parser():
    """The parser of train.py's command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--task", choices=TASKS, default="sketch", help="kind of condition (default: %(default)s)")
    add("--data", type=Path, help="a folder of your own pairs (default: the embedded ones); with "
        "--from-base also a text file with a prompt per line, and no pairs")
    add("--extract", action="store_true", help="make the conditions from the images' own lines; "
        "--data then needs images only (for sketch and artistic)")
    add("--from-base", type=positive, metavar="N", help="also train on N pictures drawn by the "
        "base; an extractor trained on your pairs labels them. Without pairs, train on these "
        "pictures only, with their own lines as conditions (sketch, artistic)")
    add("--no-mirror", action="store_true", help="never flip pairs, for writing or for left and "
        "right")
    add("--default-prompt", type=unicode_text, default="", help="for pictures without a caption")
    add("--check-data", action="store_true", help="check --data instead of training: what it "
        "contains, what is wrong, and a sheet of what the network will see")
    parser.add_base()
    add("--size", type=positive, help="side of the square in pixels (default: 64, for another "
        "--base 512)")
    add_port_options(parser)
    add("--steps", type=positive, help="training steps (default: 1200, artistic 300; for another "
        "--base 10000)")
    add("--batch", type=positive, default=8, help="pictures per step (default: %(default)s)")
    add("--accumulate", type=positive, default=1, help="parts of a batch, computed one by one to "
        "save memory (default: %(default)s)")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, more "
        "time")
    add("--dtype", choices=DTYPES, help="of the base; BPS's weights stay fp32 (default: bf16 on a "
        "GPU, else fp32)")
    add("--lr", type=in_range(float, 1e-9, 1), help="AdamW's learning rate, which falls to zero "
        "(default: 1e-3, for another --base 1e-5)")
    add("--save-every", type=positive, default=150, help="steps between checkpoints, each with a "
        "validation (default: %(default)s)")
    add("--seed", type=seed_number, default=0, help="(default: %(default)s)")
    add("--cache", type=unicode_path, default=CACHE, help="folder of the latents, which trainings "
        "share (default: %(default)s)")
    parser.add_device()
    add("--out", type=unicode_path, help="folder of the run (default: runs/TASK)")
    return parser


def parse_args():
    """The checked options."""
    parser = make_parser()
    args = parser.parse_args()
    task = TASKS[args.task]
    args.weights = args.weights or task.port_weights
    defaults = (EMBEDDED_DEFAULTS | dict(steps=task.steps) if is_embedded(args.base)
                else OTHER_DEFAULTS)
    for name, value in defaults.items():
        setattr(args, name, getattr(args, name) or value)
    args.dtype = args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")
    has_pairs = args.data is not None and not (args.from_base and args.data.is_file())
    args.without_pairs = args.from_base is not None and not has_pairs
    needing_pairs = dict(extract=args.extract and not args.without_pairs,
                         check_data=args.check_data, default_prompt=args.default_prompt)
    for name, given in needing_pairs.items():
        if given and not has_pairs:
            parser.error(f"--{name.replace('_', '-')} needs --data, your own pairs.")
    if args.without_pairs:
        args.extract = True
        if args.data is None and not is_embedded(args.base):
            parser.error("--data is missing. Give a text file with a prompt per line for the base "
                         "to draw.")
        if args.from_base < MIN_PAIRS:
            parser.error(f"--from-base must be at least {MIN_PAIRS}, got {args.from_base}.")
    if args.extract and not task.extract:
        option = "--from-base without pairs" if args.without_pairs else "--extract"
        parser.error(f"{option} must be used with --task sketch or artistic, got {args.task}.")
    check_pixels(args.size, args.size)
    args.out = args.out or Path("runs") / ("check" if args.check_data else args.task)
    sources = []                                    # a run in them would hide their pictures
    if has_pairs:
        sources = [args.data] if args.extract else [args.data / "images", args.data / "conditions"]
    parser.check_out(args.out, *sources)
    parser.check_out(args.cache, *sources, option="--cache")
    return args


def check_training(args, base, processes):
    """Raise UserError if --size doesn't fit the base, or a process would get no picture."""
    unit = base.vae.factor * 2 ** (len(base.unet.config.channels) - 1)
    if args.size % unit:
        raise UserError(f"--size must be a multiple of {unit} for this base, got {args.size}.")
    if args.batch < processes.count * args.accumulate:
        raise UserError(f"--batch must be at least processes x --accumulate = "
                        f"{processes.count * args.accumulate}, got {args.batch}.")


# ---- training ------------------------------------------------------------------------------

def train(training, base, cache, args, on_save):
    """Train training.bps and its average up to args.steps; nothing of the base ever changes.

    Everything random is a function of (seed, step), so a resumed run equals an uninterrupted one,
    and several processes equal one: each has its own shard of every batch. on_save(step, loss) is
    called every args.save_every steps and at the end.
    """
    device, schedule, processes = args.device, base.schedule, training.processes
    bps, train_loss = processes.wrap(training.bps), training.train_loss
    shard = processes.shard(args.batch)
    bar = tqdm(range(training.step, args.steps), initial=training.step, total=args.steps,
               desc="train")
    for step in bar:
        for group in training.optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps)     # the authors' rate is constant
        # distinct for every (seed, step) with fewer than 1,000,003 steps
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        # z is drawn from the autoencoder's posterior, and a tenth of the prompts is empty
        cond, z, context = cache.batch(shard, args.batch, generator)
        t = torch.randint(schedule.timesteps, (args.batch,), generator=generator)[shard]
        noise = torch.randn(args.batch, *z.shape[1:], generator=generator)[shard]
        batch = [x.to(device) for x in (cond, z, context, t, noise)]

        loss = torch.zeros((), device=device)
        training.optimizer.zero_grad()
        parts = list(zip(*(x.chunk(args.accumulate) for x in batch)))
        for i, (cond, z, context, t, noise) in enumerate(parts):
            z_t = schedule.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
            with base.autocast(), processes.sync_gradients(bps, is_last=i + 1 == len(parts)):
                residuals = bps(cond, base.unet.time_embedding(t))
                eps = base.unet(z_t, t, context, residuals)
                # Of all functions of (z_t, t, text, c), E[noise | z_t, text, c] minimizes this:
                # the posterior denoiser. The gradient reaches BPS through the frozen U-Net.
                part_loss = F.mse_loss(eps.float(), schedule.target(z, noise, t))
                # parts add up and processes are averaged: in all, the mean over the batch
                part_loss = part_loss * (len(z) * processes.count / args.batch)
                training.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        training.scaler.unscale_(training.optimizer)
        norm = nn.utils.clip_grad_norm_(training.bps.parameters(), MAX_GRADIENT_NORM)
        loss = processes.mean(loss)
        # the sum is finite if both are; in fp16 the scaler skips a step whose gradient overflows
        require_finite(loss if training.scaler.is_enabled() else loss + norm,
                       f"step {step + 1}: the loss or its gradient", args.lr)
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.average_weights(step)

        train_loss = loss.item() if train_loss is None else 0.98 * train_loss + 0.02 * loss.item()
        bar.set_postfix(loss=f"{train_loss:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            on_save(step + 1, train_loss)


class NotFinite(UserError):
    """A loss, or its gradient, is not finite."""


def require_finite(value, name, lr):
    """Raise NotFinite if a value is NaN or infinite, before anything is saved."""
    if not value.isfinite():
        raise NotFinite(f"{name} is not finite, probably because --lr {lr:g} is too large. Use a "
                        f"smaller one; the last checkpoint is kept.")


# ---- the run's folder ----------------------------------------------------------------------

class Training:
    """A training in progress: its network, its optimizer, and the folder they are saved in.

    What is validated and saved is the moving average of the network's weights. The folder holds
    args.json from the start, and CHECKPOINT, bps.safetensors, log.jsonl and curve.png from the
    first validation. Only the first process writes.
    """

    def __init__(self, out, bps, args, processes, metadata=None, keep_best=True):
        """metadata: what sample.py needs to know about the network, a dict.

        keep_best: keep the average of the lowest validation loss, not the last one.
        """
        self.out, self.bps, self.processes, self.metadata = out, bps, processes, metadata or {}
        self.average = copy.deepcopy(bps).requires_grad_(False)
        self.keep_best = keep_best
        self.optimizer = torch.optim.AdamW(bps.parameters(), lr=args.lr, weight_decay=0.01)
        self.scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.dtype == "fp16")
        self.step, self.train_loss, self.rows = 0, None, []
        self.best = dict(step=0, loss=float("inf"))

    def start_or_resume(self, record):
        """Write args.json, or resume from the checkpoint."""
        if self.processes.rank == 0:
            write_json(record, self.out / "args.json")
        self.processes.barrier()
        checkpoint = self.out / CHECKPOINT
        if checkpoint.exists():
            state = weights.load_training(checkpoint, self.networks(), "bps", self.optimizer)
            self.step, self.train_loss = state["step"], state["train_loss"]
            self.best, self.rows = state["best"], state["rows"]
            self.scaler.load_state_dict(state["scaler"])
            if self.best["step"] != self.step:
                check_best(self.out, self.best)
            print(f"{checkpoint}: resumed at step {self.step}")
            if self.processes.rank == 0:
                self.write()                        # in case it was stopped before that

    def networks(self):
        """{name: module} of what a checkpoint holds."""
        return dict(bps=self.bps, average=self.average)

    @torch.no_grad()
    def average_weights(self, step):
        """Let the average follow the weights after a step: a mean over about AVERAGED_STEPS."""
        for average, parameter in zip(self.average.parameters(), self.bps.parameters()):
            average.lerp_(parameter, 1 / min(step + 1, AVERAGED_STEPS))

    def save(self, step, train_loss, base_loss, val_loss):
        """Write everything that resuming needs, and the average if it is the one to keep."""
        self.step, self.train_loss = step, train_loss
        self.rows.append(dict(step=step, train_loss=train_loss, val_base=base_loss,
                              val_steered=val_loss))
        if val_loss < self.best["loss"] or not self.keep_best:
            self.best = dict(step=step, loss=val_loss)
        weights.save_training(
            self.out / CHECKPOINT, self.networks(), "bps", self.optimizer,
            dict(step=step, train_loss=train_loss, best=self.best, rows=self.rows,
                 scaler=self.scaler.state_dict()))
        self.write()

    def write(self):
        """Write the files that the checkpoint determines: log, curve, the average if it is kept."""
        if self.best["step"] == self.step:
            save_bps(self.average, self.out / "bps.safetensors",
                     self.metadata | dict(best=self.best))
        write_lines(self.rows, self.out / "log.jsonl")
        draw_curve(self.rows, self.out / "curve.png")

    def restore_best(self):
        """Load bps.safetensors into the average, to measure what the file holds."""
        self.average.load_state_dict(load_bps(self.out / "bps.safetensors").state_dict())


def bps_metadata(args, record, base, cache):
    """What sample.py needs to know about a trained BPS, apart from its sizes (a dict)."""
    numbers = {colour: number for classes in cache.palettes for colour, number in classes}
    names = class_names(numbers)            # those of grey maps are numbers,
    if not args.data:                       # those of the embedded maps are words
        names = {colour: word for word, colour in CLASSES.items() if colour in numbers}
    return dict(task=args.task, base=record["base_sha256"],
                context_dim=base.unet.config.context_dim,
                prediction_type=base.schedule.prediction_type, size=args.size, steps=args.steps,
                batch=args.batch, lr=args.lr, seed=args.seed, extracted=args.extract,
                from_base=args.from_base or 0, classes=dict(sorted(names.items())))


def example_condition(task, cache):
    """Pair 0's condition as an image that sample.py --cond accepts."""
    if TASKS[task].extract is TASKS[task].to_cond:      # made from any picture
        return cache.image(0)
    return to_image(cond_to_x(cache.cond([0]))[0])


def sampling_command(out, args, prompt):
    """The command that draws with the BPS of a run's folder, from its example."""
    options = dict(bps=out / "bps.safetensors", cond=out / "condition.png", prompt=prompt,
                   base=None if is_embedded(args.base) else args.base, tokenizer=args.tokenizer,
                   vae=args.vae, prediction_type=args.prediction_type)
    given = {name: value for name, value in options.items() if value is not None}
    return shell_command(["python", "sample.py", *to_argv(given)])


# ---- the script ----------------------------------------------------------------------------

def main():
    """Train, measure, and write everything of the run."""
    args = parse_args()
    if args.check_data:
        return check_data(args)
    processes, args.device = join_processes(args.device)
    base = load_base(args.base, args.tokenizer, args.device, DTYPES[args.dtype], args.vae,
                     args.prediction_type)
    base.check_finite()
    check_training(args, base, processes)
    config = config_for(base.unet.config, TASKS[args.task].channels, base.vae.factor, args.weights,
                        args.foot)
    if args.without_pairs:
        splits = draw_splits(base, args, processes)
    else:
        splits = {split: load_pairs(args.task, split, args.data, args.extract, args.default_prompt)
                  for split in SPLITS}
    if args.data and not args.without_pairs:
        warn_of_losses(args.data, args.extract, args.default_prompt, args.task)
    record = processes.broadcast(lambda: run_record(args, splits))
    out = processes.broadcast(lambda: choose_out(args.out, record))
    is_renamed = out.resolve() != args.out.resolve()
    print(f"run: {out} ({args.out} is taken)" if is_renamed else f"run: {out}")
    started = time.monotonic()
    with lock(out) if processes.rank == 0 else contextlib.nullcontext():
        training, test_cache = run_training(out, args, config, record, base, splits, processes)
        if processes.rank == 0:
            measure(training, base, test_cache, args)
            print(f"done in {(time.monotonic() - started) / 60:.1f} min, peak memory "
                  f"{peak_memory(args.device):.2f} GB. Draw from a condition:\n"
                  + sampling_command(out, args, test_cache.first_prompts([0])[0]))


def run_training(out, args, config, record, base, splits, processes):
    """Train a BPS of this config in the folder `out`; (Training, LatentCache of the test pairs)."""
    print("{} training, {} validation and {} test pairs".format(*map(len, splits.values())))
    print(f"{args.steps} steps of {args.batch}, {args.size} px, learning rate {args.lr:g}")
    rows = with_copies(splits["train"], not args.no_mirror, with_moved=not is_embedded(args.base))
    if args.from_base and not args.without_pairs:
        rows = add_draws(rows, splits, base, args, processes)
    cache, val_cache, test_cache = (
        LatentCache(pairs, args.task, args.size, base, args.extract, args.cache, processes)
        for pairs in (rows, splits["val"], splits["test"]))
    check_conditions((cache, val_cache, test_cache), args.task)
    torch.manual_seed(args.seed)
    bps = build_bps(config).to(args.device, memory_format=torch.channels_last)
    base.unet.checkpointing = bps.checkpointing = args.checkpointing
    training = Training(out, bps, args, processes, bps_metadata(args, record, base, cache),
                        keep_best=len(splits["train"]) >= SELECTION_PAIRS)
    training.start_or_resume(record)
    base_loss = paired_errors(base, val_cache).mean()
    if not base_loss.isfinite():
        raise UserError(f"{args.base}: the validation loss of the frozen base is not finite. Use "
                        f"--dtype fp32 or another --base.")

    def on_save(step, train_loss):
        if processes.rank == 0:
            val_loss = paired_errors(base, val_cache, training.average).mean()
            require_finite(val_loss, f"step {step}: the validation loss", args.lr)
            training.save(step, train_loss, base_loss.item(), val_loss.item())
            tqdm.write(f"step {step}: validation loss {val_loss:.4f}, frozen base {base_loss:.4f}")
        processes.barrier()

    train(training, base, cache, args, on_save)
    return training, test_cache


def measure(training, base, test_cache, args):
    """Measure the average that is kept, and write it with its numbers and an example."""
    training.restore_best()
    meter, out = meter_for(args.task, embedded=args.data is None), training.out
    numbers = report(base, test_cache, training.average, out, args.seed, meter)
    save_bps(training.average, out / "bps.safetensors",
             training.metadata | dict(best=training.best, results=numbers))
    with weights.replacing(out / "condition.png") as temporary:
        example_condition(args.task, test_cache).save(temporary)
    (out / CHECKPOINT).unlink()
    for name in ("bps.safetensors", "condition.png", "log.jsonl", "curve.png", "args.json"):
        print(out / name)


if __name__ == "__main__":
    run_script(main, interrupted="interrupted; the same command resumes from the last "
               "checkpoint (see --save-every)")
