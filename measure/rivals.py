"""Compares BPS with its rivals, on the same pairs, noises and steps, each at a rate of its own.

    python -m measure.rivals --task sketch --study methods
    python -m measure.rivals --task sketch --study data         # 12 pairs to all
    python -m measure.rivals --task sketch --study steps
    python -m measure.rivals --task sketch --study methods --done       # prints, trains nothing

The results of each training are a line of docs/rivals.jsonl; a study trains what has no line there,
which takes hours, and prints its table. Stopped, it goes on where it was. A method's learning
rate, in all studies, has the lowest validation loss of a sweep: all pairs, another seed, a third
of the steps.
"""
import functools
import json
import shutil
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
from inputs.conditions import TASKS, to_x
from inputs.options import BASE, HERE, Parser, run
from inputs.processes import Processes
from inputs.train_options import EMPTY_SHARE
from measure.obedience import meter_for
from measure.plots import Figure
from measure.quality import caption_rate, kernel_distance
from measure.report import draw_pairs, paired_errors, validate
from measure.rival_networks import ControlNet, FineTuned, LoRA, RivalUNet, T2IAdapter, TimeBlindBPS
from sample import load_base
from tiny import world
from tiny.classifier import Classifier
from train import Run, train
from weights import UserError

BATCH, STEPS, SAVES = 16, 300, 5
SEEDS, SWEEP_SEED = (0, 1, 2), 100
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
WIDER = 10**0.5                 # factor by which a sweep goes on beyond its best end
MOST_RATES = 7
DIGITS = {"bits": 1, "strength": 2, "line F1": 3, "pixel accuracy": 3, "mIoU": 3}   # printed


def bps_maker(port_weights="head-heavy", foot="faithful"):
    """Returns a maker of BPS networks."""
    return lambda unet, channels, factor: build_bps(
        config_for(unet.config, channels, factor, port_weights, foot))


# name: maker(frozen U-Net, channels of the condition, f)
METHODS = {
    "bps": bps_maker(), "bps-light": bps_maker(foot="light"), "controlnet": ControlNet,
    "t2i-adapter": T2IAdapter, "fine-tuned": FineTuned, "lora": LoRA,
    # at about BPS's number of parameters
    "controlnet-sized": lambda *base: ControlNet(*base, width=1.25),
    "t2i-adapter-sized": lambda *base: T2IAdapter(*base, width=2.5),
    "lora-sized": lambda *base: LoRA(*base, rank=410),      # more than full rank
    # BPS without one of its parts
    "bps-contracting": bps_maker((16, 8, 4, 0, 0)), "bps-flat": bps_maker("flat"),
    "bps-foot-heavy": bps_maker((1, 1, 1, 16, 16)),
    "bps-time-blind": lambda unet, *base: TimeBlindBPS(config_for(unet.config, *base))}
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
        """Returns the folder of its files, which are there until it is done."""
        return root / "-".join(map(str, (self.task, self.method, self.pairs or "all", self.steps,
                                         f"{self.rate:.2g}", self.seed)))


class Record:
    """The results of all Jobs that are done, in a file of JSON lines."""

    def __init__(self, file):
        self.file, self.results = file, {}
        for line in file.read_text().splitlines() if file.exists() else []:
            row = json.loads(line)
            self.results[Job(**row["job"])] = row["results"]

    def add(self, job, numbers):
        """Adds the numbers of a Job; several processes may do so at once."""
        self.results[job] = numbers
        with self.file.open("a") as f:
            f.write(json.dumps(dict(job=job._asdict(), results=numbers)) + "\n")


class RivalRun(Run):
    """A run that keeps the trained weights as they are, for rivals have no BPS file."""

    def write(self, metadata):
        """Writes the log, and the weights if they are the best."""
        if self.best["step"] == self.step:
            weights.save({key: parameter.detach() for key, parameter in self.bps.named_parameters()
                          if parameter.requires_grad}, self.out / "best.safetensors", {})
        weights.write_lines(self.rows, self.out / "log.jsonl")

    def restore_best(self):
        """Puts the best weights into the network."""
        self.bps.load_state_dict(load_file(self.out / "best.safetensors"), strict=False)


class Bench:
    """What all trainings of a task share: the base, the pairs, and how pictures are judged."""

    def __init__(self, task, base, root, record):
        self.task, self.base, self.root, self.record = task, base, root, record
        self.pairs = {split: load_pairs(task, split) for split in ("train", "val", "test")}
        self.count = len(self.pairs["test"])

    def network(self, method, seed):
        """Returns (the base that predicts with it, an untrained network) of a method."""
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
    def classify(self):
        """The small CLIP."""
        return Classifier()

    @functools.cached_property
    def true(self):
        """Its features (n, D) of the true test pictures."""
        return self.classify.embed_pictures(
            torch.stack([to_x(self.test.image(i)) for i in range(self.count)]))

    @functools.cached_property
    def base_loss(self):
        """The frozen base's validation loss."""
        return paired_errors(self.base, self.val).mean().item()

    @functools.cached_property
    def all_pairs(self):
        """The LatentCache of all training pairs."""
        return LatentCache(self.pairs["train"], self.task, world.SIZE, self.base, mirror=True)

    def train_cache(self, pairs, seed):
        """Returns the LatentCache of all training pairs, or of so many, drawn by the seed."""
        if not pairs:
            return self.all_pairs
        order = np.random.default_rng(seed).permutation(len(self.pairs["train"]))
        chosen = [self.pairs["train"][i] for i in sorted(order[:pairs])]
        return LatentCache(chosen, self.task, world.SIZE, self.base, mirror=True)

    def result(self, job):
        """Returns a job's numbers (a dict), for which it trains unless that has been done."""
        if job in self.record.results:
            return self.record.results[job]
        if job.method in BOUNDS:
            numbers = self.judge(self.pictures_of(job.method))
            self.record.add(job, numbers)
            return numbers
        out, start = job.folder(self.root), time.monotonic()
        base, network = self.network(job.method, job.seed)
        args = SimpleNamespace(
            device="cpu", dtype="fp32", steps=job.steps, batch=BATCH, lr=job.rate, seed=job.seed,
            prompt_drop=EMPTY_SHARE, accumulate=1, keep="best",
            save_every=job.steps if job.seed == SWEEP_SEED else max(1, job.steps // SAVES))
        run_of_job = RivalRun(out, network, args, Processes())
        out.mkdir(parents=True, exist_ok=True)
        run_of_job.open(job._asdict(), {})
        steps_to_go = job.steps - run_of_job.step

        def on_save(step, loss):
            val_loss = paired_errors(base, self.val, network).mean().item()
            run_of_job.save(step, loss, self.base_loss, val_loss, {})

        try:
            train(run_of_job, base, self.train_cache(job.pairs, job.seed), args, on_save)
        except UserError as error:
            if "is not finite" not in str(error) or job.seed != SWEEP_SEED:
                raise
            run_of_job.best["loss"] = float("inf")                  # of a rate that is too large
        numbers = dict(parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
                       val=run_of_job.best["loss"], best_step=run_of_job.best["step"],
                       minutes=(time.monotonic() - start) / 60 * job.steps / max(1, steps_to_go))
        if job.seed != SWEEP_SEED:
            run_of_job.restore_best()
            numbers |= self.measure(base, network, job)
        self.record.add(job, numbers)
        shutil.rmtree(out)
        return numbers

    def measure(self, base, network, job):
        """Returns the numbers of a trained network on the test pairs."""
        numbers = validate(base, self.test, network)
        x = draw_pairs(base, self.test, network, self.count, job.seed)
        if self.task == "sketch" and (job.pairs, job.steps, job.seed) == (0, STEPS, 0):
            prompts = self.other_prompts()
            pictures = draw_pairs(base, self.test, network, self.count, job.seed, prompts=prompts)
            numbers["conflict"] = self.obedience(pictures) | {
                "name": caption_rate(self.classify, pictures, prompts)}
        return numbers | self.judge(x)

    def other_prompts(self):
        """Returns for each test picture the prompt of the next one of the same category."""
        rows = world.records("test", ("3d",))
        prompts = self.test.first_prompts(range(self.count))
        return [next(prompts[j % self.count] for j in range(i + 1, i + self.count + 1)
                     if rows[j % self.count]["category"] == row["category"])
                for i, row in enumerate(rows[:self.count])]

    def pictures_of(self, bound):
        """Returns pictures x (n, 3, H, W) of one of the BOUNDS."""
        if bound == "base alone":
            return draw_pairs(self.base, self.test, None, self.count, 0)
        if bound == "other true pictures":
            return torch.stack([to_x(pair.open_image()) for pair in self.pairs["val"]])
        with torch.inference_mode():
            return self.base.vae.decode(self.test.rows("mean", range(self.count)).float())

    def judge(self, x):
        """Returns the obedience and the quality of pictures x (n, 3, H, W) for n test pairs."""
        return dict(obedience=self.obedience(x),
                    distance=self.distance(self.classify.embed_pictures(x)))

    def obedience(self, x):
        """Returns {measure: how far pictures x do what the first n conditions say}."""
        return meter_for(self.task, embedded=True)(x, self.test.cond(range(len(x))))

    def distance(self, features):
        """Returns [kernel distance of features (n, D) to the true ones, its jackknife error]."""
        n = len(features)
        without_one = [kernel_distance(features[torch.arange(n) != i], self.true) for i in range(n)]
        return [kernel_distance(features, self.true), float(np.std(without_one) * (n - 1) ** 0.5)]

    def best_rate(self, method):
        """Returns the learning rate of the lowest validation loss; the sweep widens at its ends."""
        losses, rates = {}, list(RATES)
        while rates:
            rate = rates.pop(0)
            job = Job(self.task, method, 0, STEPS // 3, rate, SWEEP_SEED)
            losses[rate] = self.result(job)["val"]
            best = min(losses, key=losses.get)
            if not rates and best in (min(losses), max(losses)) and len(losses) < MOST_RATES:
                rates = [best / WIDER if best == min(losses) else best * WIDER]
        return best


# ---- studies -------------------------------------------------------------------------------

def methods_study(bench, rates):
    """Yields the Jobs of all methods, on scenes the main ones, at all pairs, beside the bounds."""
    for bound in BOUNDS:
        yield Job(bench.task, bound, 0, 0, 0.0, 0)
    for seed in SEEDS:
        for method in METHODS if bench.task == "sketch" and seed == 0 else MAIN:
            yield Job(bench.task, method, 0, STEPS, rates(method), seed)


def data_study(bench, rates):
    """Yields the Jobs of the main methods over the number of pairs; several seeds at 40."""
    for pairs in (40, 12, 300, 100, 0):
        for seed in SEEDS if pairs in (40, 0) else (0,):
            for method in MAIN:
                yield Job(bench.task, method, pairs, STEPS, rates(method), seed)


def steps_study(bench, rates):
    """Yields the Jobs of the main methods over the number of steps."""
    for steps in (STEPS // 3, STEPS, 3 * STEPS):
        for method in MAIN:
            yield Job(bench.task, method, 0, steps, rates(method), 0)


STUDIES = dict(methods=methods_study, data=data_study, steps=steps_study)


def done(record, task, study):
    """Returns {Job: numbers} of a study, as far as they are in the record, in the table's order."""
    belongs = dict(methods=lambda job: job.pairs == 0 and job.steps in (0, STEPS),
                   data=lambda job: job.method in MAIN and job.steps == STEPS,
                   steps=lambda job: job.method in MAIN and job.pairs == 0 and job.seed == 0)
    order = [*BOUNDS, *METHODS]
    jobs = [job for job in record.results
            if job.task == task and job.seed != SWEEP_SEED and belongs[study](job)]
    return {job: record.results[job] for job in sorted(jobs, key=lambda job: (
        job.pairs or float("inf"), job.steps, order.index(job.method), job.seed))}


def over_seeds(results):
    """Returns {Job of seed 0: [numbers of each seed]} of {Job: numbers}."""
    groups = {}
    for job, numbers in results.items():
        groups.setdefault(job._replace(seed=0), []).append(numbers)
    return groups


def means(group):
    """Returns {measure: (mean over seeds, standard error over test pairs, deviation over seeds)}.

    The standard error of an obedience is unknown, as is a deviation over a single seed: both nan.
    """
    values = {name: [(numbers[name][0], numbers[name][1]) for numbers in group]
              for name in ("gain", "distance", "strength", "bits") if name in group[0]}
    for name in group[0]["obedience"]:
        values[name] = [(numbers["obedience"][name], float("nan")) for numbers in group]
    return {name: (*np.mean(pairs, axis=0),
                   np.std(pairs, axis=0, ddof=1)[0] if len(group) > 1 else float("nan"))
            for name, pairs in values.items()}


def print_results(results):
    """Prints the table of {Job: its numbers}."""
    groups = over_seeds(results)
    measures = list(means(list(groups.values())[-1]))
    print("| method | pairs | steps | rate | seeds | parameters | "
          + " | ".join(measures) + " | minutes |\n|" + "---|" * (7 + len(measures)))
    for job, group in groups.items():
        found, cells = means(group), []
        for name in measures:
            mean, error, deviation = found.get(name, 3 * (float("nan"),))
            digits = DIGITS.get(name, 4)
            cells.append("-" if np.isnan(mean) else f"{mean:.{digits}f}"
                         + ("" if np.isnan(error) else f" +- {error:.{digits}f}")
                         + ("" if np.isnan(deviation) else f", sd {deviation:.{digits}f}"))
        size = f"{group[0]['parameters']:,}" if "parameters" in group[0] else "-"
        minutes = np.mean([numbers.get("minutes", 0.0) for numbers in group])
        print(f"| {job.method} | {job.pairs or 'all'} | {job.steps} | {job.rate:.2g} "
              f"| {len(group)} | {size} | {' | '.join(cells)} | {minutes:.1f} |")


def print_conflicts(results):
    """Prints the obedience of pictures whose prompts name another thing of the same category."""
    if not any("conflict" in numbers for numbers in results.values()):
        return
    print("\n| method | line F1 | with another prompt | the picture names that prompt |\n"
          "|---|---|---|---|")
    for job, numbers in results.items():
        if "conflict" in numbers:
            print(f"| {job.method} | {numbers['obedience']['line F1']:.3f} | "
                  f"{numbers['conflict']['line F1']:.3f} | {numbers['conflict']['name']:.1%} |")


def draw_results(results, over, most_pairs, file):
    """Draws gain, first obedience and kernel distance over "pairs" or "steps", a line per method.

    Bands are standard errors over test pairs; those of obedience are deviations over seeds.
    """
    groups = over_seeds(results)
    names = ("gain", next(iter(next(iter(results.values()))["obedience"])), "distance")
    figure = Figure(len(names), [f"{name} by {over}" for name in names])
    for axes, name in zip(figure.axes, names):
        for method in MAIN:
            lines = sorted((getattr(job, over) or most_pairs, *means(group)[name])
                           for job, group in groups.items() if job.method == method)
            if not lines:
                continue
            x, mean, error, deviation = np.array(lines).T
            axes.line(x, mean, method, band=np.nan_to_num(deviation if name == names[1] else error))
    figure.save(file)


def main():
    """Runs a study, as far as it is not done, and prints its table."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--task", choices=("sketch", "segmentation"), default="sketch", help="(default: sketch)")
    add("--study", choices=STUDIES, default="methods", help="(default: methods)")
    add("--record", type=Path, default=HERE / "docs" / "rivals.jsonl", help="file of the results "
        "(default: docs/rivals.jsonl)")
    add("--out", type=Path, default=Path("runs/rivals"), help="folder of the trainings under way "
        "(default: %(default)s)")
    add("--figures", type=Path, default=HERE / "docs" / "figures", help="folder of the figures "
        "(default: docs/figures)")
    add("--done", action="store_true", help="train nothing: print what is done")
    args = parser.parse_args()
    record = Record(args.record)
    if not args.done:
        bench = Bench(args.task, load_base(BASE), args.out, record)
        for job in STUDIES[args.study](bench, functools.cache(bench.best_rate)):
            bench.result(job)
    results = done(record, args.task, args.study)
    if not results:
        raise UserError(f"{args.record}: nothing of this study is done")
    print_results(results)
    if args.study == "methods":
        print_conflicts(results)
    else:
        over = dict(data="pairs", steps="steps")[args.study]
        draw_results(results, over, len(load_pairs(args.task, "train")),
                     args.figures / f"rivals-{args.task}-{args.study}.png")


if __name__ == "__main__":
    run(main)
