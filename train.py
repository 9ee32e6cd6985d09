"""Steers a frozen Stable Diffusion with a new condition: trains BPS on pairs and measures it.

    python train.py --task sketch                       # embedded base, embedded line drawings
    python train.py --base SD_FOLDER --data PAIRS --size 512 --batch 16 --lr 1e-5

Writes to runs/TASK: bps.safetensors (the weights of the lowest validation loss), samples.png,
condition.png, log.jsonl, curve.png, args.json. Interrupted, the same command goes on from the last
checkpoint; a finished run is never overwritten.

Shapes: B batch, C channels, H W rows and columns of the latent.
"""
import contextlib
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import weights
from bps import build_bps, config_for, load_bps, save_bps
from data import LatentCache, check_conditions, load_pairs
from inputs.conditions import TASKS, class_names, cond_to_x, to_image
from inputs.disk_cache import DiskCache
from inputs.options import BASE, DTYPES, run, shell_command
from inputs.pairs import warn_of_losses
from inputs.processes import join_processes
from inputs.run_folder import CHECKPOINT, choose_out, lock, run_facts
from inputs.train_options import check_training, parse_args
from measure.curve import draw_curve
from measure.dataset import check_data
from measure.obedience import meter_for
from measure.report import paired_errors, peak_memory, report
from sample import load_base
from tiny.tasks import CLASSES
from weights import UserError

SPLITS = ("train", "val", "test")
MAX_GRADIENT_NORM = 1.0
BASE_FACTS = ("vae_sha256", "configs_sha256")           # what latents depend on


# ---- training ------------------------------------------------------------------------------

def train(run, base, cache, args, on_save):
    """Trains run.bps in place from step run.step to args.steps; nothing of the base ever changes.

    Everything random is a function of (seed, step), so a resumed run equals an uninterrupted one,
    and several processes equal one: each has its own slots of every batch. on_save(step, loss) is
    called every args.save_every steps and at the end.
    """
    device, schedule, processes = args.device, base.schedule, run.processes
    bps, average = processes.wrap(run.bps), run.train_loss
    slots = processes.slots(args.batch)
    bar = tqdm(range(run.step, args.steps), initial=run.step, total=args.steps, desc="train")
    for step in bar:
        for group in run.optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps)     # the authors' rate is constant
        # another seed for each (seed, step), as long as there are fewer steps than that
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        cond, z, context = cache.batch(slots, args.batch, generator, args.prompt_drop)
        t = torch.randint(schedule.timesteps, (args.batch,), generator=generator)[slots]
        noise = torch.randn(args.batch, *z.shape[1:], generator=generator)[slots]
        batch = [x.to(device) for x in (cond, z, context, t, noise)]

        loss = torch.zeros((), device=device)
        run.optimizer.zero_grad()
        parts = list(zip(*(x.chunk(args.accumulate) for x in batch)))
        for i, (cond, z, context, t, noise) in enumerate(parts):
            z_t = schedule.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
            with base.autocast(), processes.sharing(bps, is_last=i + 1 == len(parts)):
                residuals = bps(cond, base.unet.time_embedding(t))
                eps = base.unet(z_t, t, context, residuals)
                # Of all functions of (z_t, t, text, c), E[noise | z_t, text, c] minimises this:
                # the posterior denoiser. The gradient reaches BPS through the frozen U-Net.
                part_loss = F.mse_loss(eps.float(), schedule.target(z, noise, t))
                part_loss = part_loss * (len(z) * processes.count / args.batch)
                run.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        run.scaler.unscale_(run.optimizer)
        norm = nn.utils.clip_grad_norm_(run.bps.parameters(), MAX_GRADIENT_NORM)
        loss = processes.mean(loss)
        # in fp16 a gradient may overflow: the scaler then leaves the step out
        require_finite(loss if run.scaler.is_enabled() else loss + norm,
                       f"step {step + 1}: the loss or its gradient", args.lr)
        run.scaler.step(run.optimizer)
        run.scaler.update()

        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            on_save(step + 1, average)


class NotFinite(UserError):
    """A loss, or its gradient, is not finite."""


def require_finite(value, what, lr):
    """Raises NotFinite if a value is not, so that nothing is saved of it."""
    if not value.isfinite():
        raise NotFinite(f"{what} is not finite, most likely because --lr {lr:g} is too large; give "
                        f"a smaller one. What was saved before is kept")


# ---- the run's folder ----------------------------------------------------------------------

class Run:
    """A training under way: its network, its optimiser, and the folder that they are saved in.

    The folder holds args.json from the first moment, and CHECKPOINT, bps.safetensors, log.jsonl and
    curve.png from the first validation. bps.safetensors are the weights of the lowest validation
    loss so far, or the last ones. Only the first process writes.
    """

    def __init__(self, out, bps, args, processes, metadata=None):
        """metadata: what a sampler has to know of the network, a dict."""
        self.out, self.bps, self.processes, self.metadata = out, bps, processes, metadata
        self.keep_last = args.keep == "last"
        self.optimizer = torch.optim.AdamW(bps.parameters(), lr=args.lr, weight_decay=0.01)
        self.scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.dtype == "fp16")
        self.step, self.train_loss, self.rows = 0, None, []
        self.best = dict(step=0, loss=float("inf"))

    def start_or_resume(self, facts):
        """Writes args.json, or goes on from the checkpoint. Errors: UserError if it is damaged."""
        if self.processes.rank == 0:
            weights.write_json(facts, self.out / "args.json")
        self.processes.wait()
        checkpoint = self.out / CHECKPOINT
        if checkpoint.exists():
            state = weights.load_training(checkpoint, dict(bps=self.bps), "bps", self.optimizer)
            self.step, self.train_loss = state["step"], state["train_loss"]
            self.best, self.rows = state["best"], state["rows"]
            self.scaler.load_state_dict(state["scaler"])
            print(f"{checkpoint}: resumed at step {self.step}")
            if self.processes.rank == 0:
                self.write()                        # should it have been stopped before

    def save(self, step, train_loss, base_loss, val_loss):
        """Writes all that the run has to keep of a step, and the best weights if these are."""
        self.step, self.train_loss = step, train_loss
        self.rows.append(dict(step=step, train_loss=train_loss, val_base=base_loss,
                              val_steered=val_loss))
        if val_loss < self.best["loss"] or self.keep_last:
            self.best = dict(step=step, loss=val_loss)
        weights.save_training(
            self.out / CHECKPOINT, dict(bps=self.bps), "bps", self.optimizer,
            dict(step=step, train_loss=train_loss, best=self.best, rows=self.rows,
                 scaler=self.scaler.state_dict()))
        self.write()

    def write(self):
        """Writes what follows from the checkpoint: log, curve, and the weights if they are best."""
        if self.best["step"] == self.step:
            save_bps(self.bps, self.out / "bps.safetensors", self.metadata | dict(best=self.best))
        weights.write_lines(self.rows, self.out / "log.jsonl")
        draw_curve(self.rows, self.out / "curve.png")

    def restore_best(self):
        """Puts the weights of bps.safetensors, rounded to fp16, into the network."""
        self.bps.load_state_dict(load_bps(self.out / "bps.safetensors").state_dict())


def bps_metadata(args, facts, base, cache):
    """Returns what a sampler has to know of a trained BPS, beside its sizes."""
    numbers = {colour: number for classes in cache.palettes for colour, number in classes}
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
    processes, args.device = join_processes(args.device)
    base = load_base(args.base, args.tokenizer, args.device, DTYPES[args.dtype], args.vae,
                     args.prediction_type)
    base.check_finite()
    check_training(args, base, processes)
    splits = {split: load_pairs(args.task, split, args.data, args.extract, args.default_prompt)
              for split in SPLITS}
    if args.data:
        warn_of_losses(args.data, args.extract, args.default_prompt)
    facts = processes.from_first(lambda: run_facts(args, splits))
    out = processes.from_first(lambda: choose_out(args.out, facts))
    renamed = out.resolve() != args.out.resolve()
    print(f"run: {out} ({args.out} is taken)" if renamed else f"run: {out}")
    with lock(out) if processes.rank == 0 else contextlib.nullcontext():
        train_in(out, args, facts, base, splits, processes)


def train_in(out, args, facts, base, splits, processes):
    """Trains and measures in a run's folder."""
    started = time.monotonic()
    config = config_for(base.unet.config, TASKS[args.task].channels, base.vae.factor, args.weights,
                        args.foot)
    disk = args.data and DiskCache(args.cache, {key: facts[key] for key in BASE_FACTS}, processes)
    cache, val_cache, test_cache = (
        LatentCache(pairs, args.task, args.size, base, mirror=split == "train",
                    extract=args.extract, disk=disk) for split, pairs in splits.items())
    check_conditions((cache, val_cache, test_cache), args.task)
    print(f"{len(cache.pairs)} training, {len(val_cache.pairs)} validation and "
          f"{len(test_cache.pairs)} test pairs; latents and text states are cached")
    torch.manual_seed(args.seed)
    bps = build_bps(config).to(args.device, memory_format=torch.channels_last)
    base.unet.checkpointing = bps.checkpointing = args.checkpointing
    run = Run(out, bps, args, processes, bps_metadata(args, facts, base, cache))
    run.start_or_resume(facts)
    base_loss = paired_errors(base, val_cache).mean()
    if not base_loss.isfinite():
        raise UserError(f"{args.base}: its own validation loss is not finite, as its numbers "
                        f"overflow; give --dtype fp32 or another --base")
    base_loss = base_loss.item()

    def on_save(step, train_loss):
        if processes.rank == 0:
            val_loss = paired_errors(base, val_cache, bps).mean()
            require_finite(val_loss, f"step {step}: the validation loss", args.lr)
            run.save(step, train_loss, base_loss, val_loss.item())
            tqdm.write(f"step {step}: validation loss {val_loss:.4f}, frozen base {base_loss:.4f}")
        processes.wait()

    train(run, base, cache, args, on_save)
    if processes.rank > 0:
        return
    run.restore_best()
    meter = meter_for(args.task, args.data is None, args.device)
    numbers = report(base, test_cache, bps, out, args.seed, meter)
    file, drawing = out / "bps.safetensors", out / "condition.png"
    save_bps(bps, file, run.metadata | dict(best=run.best, results=numbers))
    example = example_condition(args.task, test_cache)
    with weights.replacing(drawing) as temporary:
        example.save(temporary)
    (out / CHECKPOINT).unlink()
    for written in (file, drawing, out / "log.jsonl", out / "curve.png", out / "args.json"):
        print(written)
    print(f"done in {(time.monotonic() - started) / 60:.1f} min, peak memory "
          f"{peak_memory(args.device):.2f} GB; now draw from a condition:\n"
          + sampling_command(args, file, drawing, test_cache.first_prompts([0])[0]))


if __name__ == "__main__":
    run(main, interrupted="interrupted; the same command goes on from the last checkpoint")
