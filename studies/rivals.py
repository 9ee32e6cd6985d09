"""Compares BPS with its rivals, on the same pairs, noises and steps, each at a rate of its own.

    python -m studies.rivals --task sketch --study methods
    python -m studies.rivals --task sketch --study data         # 12 pairs to all
    python -m studies.rivals --task sketch --study steps
    python -m studies.rivals --task sketch --study methods --done       # prints, trains nothing
    python -m studies.rivals --task sketch --method lora --pairs 40 --seed 1    # one row

The results of each training are a line of docs/rivals.jsonl; a study trains what has no line there,
which takes hours, and print its tables. Stopped, it goes on where it was. A method's learning
rate, in all studies, has the lowest validation loss of a sweep: all pairs, another seed, a third
of the steps (all steps for ControlNet, which learns late). Lines of another base than today's are
not read.
"""
import functools
import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

import weights
from bps import build_bps, config_for
from data import LatentCache, load_pairs
from inputs import checkpoints
from inputs.conditions import TASKS, to_x
from inputs.files import fingerprint, write_lines
from inputs.options import BASE, ROOT, Parser, positive, run_script
from inputs.processes import Processes
from inputs.run_folder import lock
from measure.obedience import meter_for
from measure.plots import Figure
from studies.quality import distance_and_error, true_features
from measure.report import draw_pairs, paired_errors, paired_squares, summarize
from studies.rival_networks import (
    ConditionBlindBPS,
    ControlNet,
    FineTuned,
    LoRA,
    RivalUNet,
    T2IAdapter,
    TimeBlindBPS,
)
from sample import load_base
from tiny import world
from tiny.clip_score import Reader
from train import NotFinite, Training, train
from weights import UserError

BATCH, STEPS, SAVES = 16, 300, 5
SEEDS, SWEEP_SEED = (0, 1, 2), 100
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
WIDER = 10**0.5                 # factor by which a sweep goes on beyond its best end
MOST_RATES = 7
DIGITS = {"strength": 2, "bits": 1, "line F1": 3, "pixel accuracy": 3, "mIoU": 3}   # printed


def bps_maker(port_weights="head-heavy", foot="faithful"):
    """A maker of BPS networks."""
    return lambda unet, channels, factor: build_bps(
        config_for(unet.config, channels, factor, port_weights, foot))


# name: maker(frozen U-Net, channels of the condition, f)
METHODS = {
    "bps": bps_maker(), "bps-light": bps_maker(foot="light"), "controlnet": ControlNet,
    "t2i-adapter": T2IAdapter, "fine-tuned": FineTuned, "lora": LoRA,
    # at about BPS's number of parameters
    "controlnet-wide-random": lambda *base: ControlNet(*base, width=1.25),
    "t2i-adapter-wide": lambda *base: T2IAdapter(*base, width=2.5),
    "lora-full-rank": lambda *base: LoRA(*base, rank=410),
    # BPS without one of its parts
    "bps-contracting": bps_maker((16, 8, 4, 0, 0)), "bps-flat": bps_maker("flat"),
    "bps-foot-heavy": bps_maker((1, 1, 1, 16, 16)),
    "bps-time-blind": lambda unet, *base: TimeBlindBPS(config_for(unet.config, *base)),
    "bps-condition-blind": lambda unet, *base: ConditionBlindBPS(config_for(unet.config, *base))}
MAIN = ("bps", "bps-light", "controlnet", "t2i-adapter", "fine-tuned", "lora")
# pictures to compare with: by the base, true ones of other pairs, the test pairs' after the VAE
BOUNDS = ("base alone", "other true pictures", "VAE round trip")


class Job(NamedTuple):
    """One training and its evaluation."""
    task: str
    method: str
    pairs: int                  # training pairs; 0 is all
    steps: int
    rate: float
    seed: int

    def folder(self, root):
        """The folder of its files, which are there until it is done."""
        return root / "-".join(map(str, (self.task, self.method, self.pairs or "all", self.steps,
                                         f"{self.rate:.2g}", self.seed)))


class Record:
    """The results of all Jobs that are done on a base, in a file of JSON lines."""

    def __init__(self, file, base_sha256):
        self.file, self.base_sha256, self.results = file, base_sha256, {}
        self.read()

    def read(self):
        """Read what other processes have added, too."""
        lines = self.file.read_text(errors="replace").splitlines() if self.file.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if row["base_sha256"] == self.base_sha256:
                    self.results[Job(**row["job"])] = row["results"]
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{self.file}: line {number} is corrupt. Delete it.") from None

    def add(self, job, numbers):
        """Add the numbers of a Job."""
        self.results[job] = numbers
        row = dict(job=job._asdict(), base_sha256=self.base_sha256, torch=torch.__version__,
                   results=numbers)
        with self.file.open("a") as f:
            f.write(json.dumps(row, allow_nan=False) + "\n")
        print(f"done: {' '.join(map(str, job))}", file=sys.stderr)


class RivalTraining(Training):
    """A run that keeps the trained weights as they are, for rivals have no BPS file."""

    def write(self):
        """Write the log, and the weights if they are the best."""
        if self.best["step"] == self.step:
            weights.save({key: parameter.detach() for key, parameter in self.bps.named_parameters()
                          if parameter.requires_grad}, self.out / "best.safetensors", {})
        write_lines(self.rows, self.out / "log.jsonl")

    def restore_best(self):
        """Put the best weights into the network."""
        self.bps.load_state_dict(load_file(self.out / "best.safetensors"), strict=False)


class Bench:
    """What all trainings of a task share: the base, the pairs, and how pictures are judged."""

    def __init__(self, task, base, root, record):
        self.task, self.base, self.root, self.record = task, base, root, record
        self.pairs = {split: load_pairs(task, split) for split in ("train", "val", "test")}
        self.count = len(self.pairs["test"])

    def network(self, method, seed):
        """(the base that predicts with it, an untrained network) of a method."""
        torch.manual_seed(seed)
        network = METHODS[method](self.base.unet, TASKS[self.task].channels, self.base.vae.factor)
        if hasattr(network, "predict"):
            return self.base._replace(unet=RivalUNet(self.base.unet, network)), network
        return self.base, network

    @functools.cached_property
    def val(self):
        """The LatentCache of the validation pairs."""
        return LatentCache(self.pairs["val"], self.task, world.SIZE, self.base)

    @functools.cached_property
    def test(self):
        """The LatentCache of the test pairs."""
        return LatentCache(self.pairs["test"], self.task, world.SIZE, self.base)

    @functools.cached_property
    def reader(self):
        """The small CLIP."""
        return Reader()

    @functools.cached_property
    def true(self):
        """Its features (n, D) of the true test pictures."""
        return true_features(self.reader, self.test, self.count)

    @functools.cached_property
    def base_loss(self):
        """The frozen base's validation loss."""
        return paired_errors(self.base, self.val).mean().item()

    @functools.cached_property
    def all_pairs(self):
        """The LatentCache of all training pairs."""
        return LatentCache(self.pairs["train"], self.task, world.SIZE, self.base, mirror=True)

    def train_cache(self, pairs, seed):
        """The LatentCache of all training pairs, or of so many, drawn by the seed."""
        if not pairs:
            return self.all_pairs
        order = np.random.default_rng(seed).permutation(len(self.pairs["train"]))
        chosen = [self.pairs["train"][i] for i in sorted(order[:pairs])]
        return LatentCache(chosen, self.task, world.SIZE, self.base, mirror=True)

    def result(self, job):
        """A job's numbers (a dict), for which it trains unless that has been done."""
        if job not in self.record.results:
            out = job.folder(self.root)
            with lock(out):
                self.record.read()                  # it may have been done meanwhile
                if job not in self.record.results:
                    self.record.add(job, self.bound(job.method) if job.method in BOUNDS
                                    else self.train(job, out))
                shutil.rmtree(out)
        return self.record.results[job]

    def train(self, job, out):
        """The numbers of a job after training; without a finite loss, a val of None."""
        base, network = self.network(job.method, job.seed)
        args = SimpleNamespace(
            device="cpu", dtype="fp32", steps=job.steps, batch=BATCH, lr=job.rate, seed=job.seed,
            accumulate=1,
            save_every=job.steps if job.seed == SWEEP_SEED else max(1, job.steps // SAVES))
        run_of_job = RivalTraining(out, network, args, Processes())
        run_of_job.start_or_resume(job._asdict())
        steps_to_go, base_loss = job.steps - run_of_job.step, self.base_loss
        cache = self.train_cache(job.pairs, job.seed)

        def on_save(step, loss):
            val_loss = paired_errors(base, self.val, network).mean().item()
            run_of_job.save(step, loss, base_loss, val_loss)

        start = time.process_time()
        try:
            train(run_of_job, base, cache, args, on_save)
        except NotFinite:
            pass                                # its rate was too large
        minutes = (time.process_time() - start) / 60 * job.steps / max(1, steps_to_go)
        best = run_of_job.best
        numbers = dict(parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
                       val=best["loss"] if best["step"] else None, best_step=best["step"],
                       minutes=minutes if steps_to_go else None)
        if best["step"] and job.seed != SWEEP_SEED:
            run_of_job.restore_best()
            numbers |= self.measure(base, network, job)
        return numbers

    def measure(self, base, network, job):
        """The numbers of a trained network on the test pairs."""
        squares = paired_squares(base, self.test, network)
        numbers = summarize(squares, base.schedule, self.test.rows("mean", [0]).numel())
        del numbers["pairs"]
        numbers["gains"] = [round(gain, 7) for gain in (squares[0] - squares[1]).mean(1).tolist()]
        return numbers | self.judge(draw_pairs(base, self.test, network, self.count, job.seed))

    def bound(self, name):
        """The numbers of one of the BOUNDS."""
        return self.judge(self.pictures_of(name), paired=name != "other true pictures")

    def pictures_of(self, bound):
        """Pictures x (n, 3, H, W) of one of the BOUNDS."""
        if bound == "base alone":
            return draw_pairs(self.base, self.test, None, self.count, 0)
        if bound == "other true pictures":
            chosen = np.random.default_rng(0).permutation(len(self.pairs["train"]))[:self.count]
            return torch.stack([to_x(self.pairs["train"][i].open_image()) for i in chosen])
        with torch.inference_mode():
            return self.base.vae.decode(self.test.rows("mean", range(self.count)).float())

    def judge(self, x, paired=True):
        """The obedience and the quality of pictures x (n, 3, H, W) for n test pairs."""
        return dict(obedience=self.obedience(x), distance=distance_and_error(
            self.reader.embed_pictures(x), self.true, paired))

    def obedience(self, x):
        """{measure: how far pictures x do what the first n conditions say}."""
        names = [pair.name for pair in self.pairs["test"][:len(x)]]
        return meter_for(self.task, embedded=True)(x, self.test.cond(range(len(x))), names)

    def best_rate(self, method):
        """The learning rate of the lowest validation loss; the sweep widens at its ends.

        The control that sees no condition is trained at BPS's rate.
        """
        if method == "bps-condition-blind":
            return self.best_rate("bps")
        losses, rates = {}, list(RATES)
        while rates:
            rate = rates.pop(0)
            steps = STEPS if method == "controlnet" else STEPS // 3
            job = Job(self.task, method, 0, steps, rate, SWEEP_SEED)
            loss = self.result(job)["val"]
            losses[rate] = float("inf") if loss is None else loss
            best = min(losses, key=losses.get)
            if not rates and best in (min(losses), max(losses)) and len(losses) < MOST_RATES:
                rates = [best / WIDER if best == min(losses) else best * WIDER]
        return best


# ---- studies -------------------------------------------------------------------------------

def methods_study(bench, rates):
    """Yield the Jobs at all pairs and the bounds; for segmentation the main methods, one seed."""
    for bound in BOUNDS:
        yield Job(bench.task, bound, 0, 0, 0.0, 0)
    sketch = bench.task == "sketch"
    for method in METHODS if sketch else (*MAIN, "bps-condition-blind"):
        yield Job(bench.task, method, 0, STEPS, rates(method), 0)
    for seed in SEEDS[1:] if sketch else ():
        for method in MAIN:
            yield Job(bench.task, method, 0, STEPS, rates(method), seed)


def data_study(bench, rates):
    """Yield the Jobs of the main methods over the number of pairs; several seeds at 40 and all."""
    for seed in SEEDS:
        for pairs in (40, 12, 300, 100, 0) if seed == 0 else (40, 0):
            for method in MAIN:
                yield Job(bench.task, method, pairs, STEPS, rates(method), seed)


def steps_study(bench, rates):
    """Yield the Jobs of the main methods over the number of steps."""
    for steps in (STEPS // 3, STEPS, 3 * STEPS):
        for method in MAIN:
            yield Job(bench.task, method, 0, steps, rates(method), 0)


STUDIES = dict(methods=methods_study, data=data_study, steps=steps_study)


def done(record, task, study):
    """{Job: numbers} of a study, as far as they are in the record, in the table's order."""
    belongs = dict(methods=lambda job: job.pairs == 0 and job.steps in (0, STEPS),
                   data=lambda job: job.method in MAIN and job.steps == STEPS,
                   steps=lambda job: job.method in MAIN and job.pairs == 0)
    order = [*BOUNDS, *METHODS]
    jobs = [job for job, numbers in record.results.items()
            if job.task == task and job.method in order and "obedience" in numbers
            and belongs[study](job)]
    return {job: record.results[job] for job in sorted(jobs, key=lambda job: (
        job.pairs or float("inf"), job.steps, order.index(job.method), job.seed))}


def over_seeds(results):
    """{Job of seed 0: {seed: numbers}} of {Job: numbers}."""
    groups = {}
    for job, numbers in results.items():
        groups.setdefault(job._replace(seed=0), {})[job.seed] = numbers
    return groups


def means(group):
    """{measure: (mean over seeds, standard error over test pairs, deviation over seeds)}.

    group: {seed: numbers}. The standard error of an obedience is unknown, as is a deviation over a
    single seed: both nan.
    """
    first = next(iter(group.values()))
    values = {name: [numbers[name] for numbers in group.values()]
              for name in ("gain", "gap", "bits", "distance", "strength") if name in first}
    for name in first["obedience"]:
        values[name] = [(numbers["obedience"][name], float("nan")) for numbers in group.values()]
    return {name: (*np.mean(pairs, axis=0),
                   np.std(pairs, axis=0, ddof=1)[0] if len(group) > 1 else float("nan"))
            for name, pairs in values.items()}


def gain_beyond(group, reference):
    """The gain beyond another method's with the same seeds, and its standard error.

    The error is over the test pairs. group, reference: {seed: numbers}, with a seed in common.
    """
    seeds = group.keys() & reference.keys()
    difference = np.subtract(*(np.mean([each[seed]["gains"] for seed in seeds], axis=0)
                               for each in (group, reference)))
    return difference.mean(), difference.std(ddof=1) / len(difference) ** 0.5


def print_results(results):
    """Print the table of {Job: its numbers}."""
    groups = over_seeds(results)
    measures = list(means(list(groups.values())[-1]))
    titles = ("method", "pairs", "steps", "rate", "seeds", "parameters", *measures,
              "gain beyond bps", "best step", "CPU minutes")
    print(f"| {' | '.join(titles)} |\n|" + "---|" * len(titles))
    for job, group in groups.items():
        found, first, cells = means(group), group[min(group)], []
        for name in measures:
            mean, error, deviation = found.get(name, 3 * (float("nan"),))
            digits = DIGITS.get(name, 4)
            cells.append("-" if np.isnan(mean) else f"{mean:.{digits}f}"
                         + ("" if np.isnan(error) else f" +- {error:.{digits}f}")
                         + ("" if np.isnan(deviation) else f", sd {deviation:.{digits}f}"))
        reference = [each for other, each in groups.items() if other.method == "bps"
                     and other._replace(method=job.method, rate=job.rate) == job]
        beyond = "-"
        if "gains" in first and job.method != "bps" and reference and group.keys() & reference[0]:
            beyond = "{:+.4f} +- {:.4f}".format(*gain_beyond(group, reference[0]))
        size = f"{first['parameters']:,}" if "parameters" in first else "-"
        best = ", ".join(f"{numbers['best_step']}" for numbers in group.values()
                         if "best_step" in numbers)
        minutes = [numbers["minutes"] for numbers in group.values() if numbers.get("minutes")]
        print(f"| {job.method} | {job.pairs or 'all'} | {job.steps} | {job.rate:.2g} "
              f"| {len(group)} | {size} | {' | '.join(cells)} | {beyond} "
              f"| {best or '-'} | {f'{np.mean(minutes):.1f}' if minutes else '-'} |")


def print_sweeps(record, task):
    """Print the validation loss of each method at each learning rate that was tried."""
    sweeps = {}
    for job, numbers in record.results.items():
        if job.task == task and job.seed == SWEEP_SEED:
            sweeps.setdefault((job.method, job.steps), {})[job.rate] = numbers["val"]
    print("\n| method | steps | validation loss at each rate |\n|---|---|---|")
    for (method, steps), losses in sweeps.items():
        cells = [f"{rate:.2g}: {loss:.5f}" if loss else f"{rate:.2g}: not finite"
                 for rate, loss in sorted(losses.items())]
        print(f"| {method} | {steps} | {', '.join(cells)} |")


def draw_results(results, over, most_pairs, file):
    """Draw gain, first obedience and kernel distance over "pairs" or "steps", a line per method.

    Bands are standard errors over test pairs, and for obedience, where there are several seeds,
    deviations over these.
    """
    groups = over_seeds(results)
    names = ("gain", next(iter(next(iter(results.values()))["obedience"])), "distance")
    figure = Figure(len(names), [f"{name} by {over}" for name in names])
    for axes, name in zip(figure.axes, names):
        for method in MAIN:
            lines = sorted((getattr(job, over) or most_pairs, *means(group)[name])
                           for job, group in groups.items() if job.method == method)
            if not lines:
                continue                    # nothing of this method is done
            x, mean, error, deviation = np.array(lines).T
            axes.line(x, mean, method, band=np.nan_to_num(deviation if name == names[1] else error))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.save(file)


def main():
    """Run a study, as far as it is not done, and print its table."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--task", choices=("sketch", "segmentation"), default="sketch", help="(default: sketch)")
    add("--study", choices=STUDIES, default="methods", help="(default: methods)")
    add("--record", type=Path, default=ROOT / "docs" / "rivals.jsonl", help="file of the results "
        "(default: docs/rivals.jsonl)")
    add("--out", type=Path, default=Path("runs/rivals"), help="folder of the trainings under way "
        "(default: %(default)s)")
    add("--figures", type=Path, default=ROOT / "docs" / "figures", help="folder of the figures "
        "(default: docs/figures)")
    add("--done", action="store_true", help="train nothing: print what is done")
    add("--method", choices=METHODS, help="train this one only, on --pairs for --steps by --seed")
    add("--pairs", type=int, default=0, help="its training pairs; 0 is all (default: %(default)s)")
    add("--steps", type=positive, default=STEPS, help="its steps (default: %(default)s)")
    add("--seed", type=int, choices=SEEDS, default=0, help="its seed (default: %(default)s)")
    args = parser.parse_args()
    if args.done and args.method:
        parser.error("--method can't be combined with --done, which prints a whole study.")
    if not args.method and (args.pairs, args.steps, args.seed) != (0, STEPS, 0):
        parser.error("--pairs, --steps and --seed need --method.")
    parser.check_out(args.record.parent, option="--record")
    parser.check_out(args.figures, option="--figures")
    record = Record(args.record, fingerprint(*checkpoints.read_unet(BASE).files()))
    if not args.done:
        args.record.parent.mkdir(parents=True, exist_ok=True)       # before the work
        bench = Bench(args.task, load_base(BASE), args.out, record)
        rates = functools.cache(bench.best_rate)
        jobs = STUDIES[args.study](bench, rates)
        if args.method:
            if not 0 <= args.pairs <= len(bench.pairs["train"]):
                parser.error(f"--pairs must be in 0..{len(bench.pairs['train'])}, got "
                             f"{args.pairs}. 0 is all.")
            jobs = [Job(args.task, args.method, args.pairs, args.steps, rates(args.method),
                        args.seed)]
        for job in jobs:
            bench.result(job)
    results = done(record, args.task, args.study)
    if not results:
        raise UserError(f"{args.record} has no results of this study.")
    print_results(results)
    if args.study == "methods":
        print_sweeps(record, args.task)
    else:
        over = dict(data="pairs", steps="steps")[args.study]
        draw_results(results, over, len(load_pairs(args.task, "train")),
                     args.figures / f"rivals-{args.task}-{args.study}.png")


if __name__ == "__main__":
    run_script(main)
