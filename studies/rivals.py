"""Compares BPS with its rivals, with other recipes of its training, and with parts of itself.

    python -m studies.rivals                            # everything, seed by seed: hours
    python -m studies.rivals --study data --minutes 60
    python -m studies.rivals --task sketch --method lora --pairs 40 --seed 1        # one row
    python -m studies.rivals --done                     # print the tables, train nothing

Each training appends its result to docs/rivals.jsonl as one line. A study trains only what has no
line there. If it is interrupted, the same command resumes; processes with the same command share
the work. Lines that were measured on another base are ignored.

All methods use the same pairs, noises and steps, and train.py's recipe: the moving average of the
weights, and mirrored copies of the pairs. We choose the learning rate of each method by the lowest
validation loss of a sweep on sketch, with another seed and the same number of steps (900 for rows
of 3,000). For rows with 12, 40 and 100 pairs the sweep uses 40 pairs, for all other rows all pairs.
Segmentation and artistic use sketch's rates. Other recipes, and BPS without a part, use BPS's rate;
other port weights, which act like rates, have a sweep of their own. T2I-Adapter and ControlNet are
also trained once with their authors' recipe, which is kept if its validation loss is lower. Without
pairs, BPS learns from pictures that the base draws, as with train.py --from-base. The study
measures the first 100 test pairs and 50 pairs with unseen hair.

With few pairs, the rate with the lowest loss is not always the one whose pictures follow their
conditions best. So the study `rates` trains all methods at one rate.
"""
import contextlib
import functools
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import weights
from bps import BPS, LightBPS, config_for
from data import EMPTY_SHARE, LatentCache, load_pairs, with_copies
from draws import add_draws, draw_for, pairs_of
from inputs import checkpoints
from inputs.conditions import TASKS
from inputs.files import fingerprint
from inputs.options import BASE, ROOT, Parser, positive, run_script
from inputs.processes import Processes
from inputs.run_folder import lock
from measure.plots import Figure
from measure.report import paired_errors
from sample import load_base
from studies import rival_networks as networks
from studies.quality import evaluate, paired_difference
from tiny import world
from train import SELECTION_PAIRS, NotFinite, Training, require_finite, train
from weights import UserError

BATCH, STEPS, SAVES = 8, 300, 5
LONG, LONGEST = 900, 3000               # steps; LONGEST has the rates of LONG
SEEDS, SWEEP_SEED = (0, 1, 2), 100
RATES, FIRST_RATE = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), 1e-3
DRAWS = 500                             # pictures that the base draws
SWEPT = {12: 40, 100: 40, 300: 0, DRAWS: 0}     # pairs: the pairs with which their rate is found
ALL_PAIRS = 1000                        # of sketch
MEASURED = dict(test=100, unseen=50)    # pairs of each split that are drawn and measured
WAIT = 10                               # seconds, if other processes do all that is left


class Recipe(NamedTuple):
    """How a network is trained; the defaults are train.py's."""
    averaged: bool = True               # else the best step's weights, however few pairs there are
    copies: bool = False                # moved ones, not only the mirrored one
    pairs: bool = True                  # else only pictures that the base draws
    draws: bool = False                 # half of each batch are pictures that the base draws
    cubic: bool = False                 # T2I-Adapter's timesteps
    empty_share: float = EMPTY_SHARE    # of the prompts


RECIPES = {"best step": Recipe(averaged=False), "average": Recipe(),
           "copies": Recipe(copies=True), "draws": Recipe(draws=True),
           "copies and draws": Recipe(copies=True, draws=True), "draws alone": Recipe(pairs=False),
           "cubic timesteps": Recipe(cubic=True), "half of the prompts": Recipe(empty_share=0.5)}
AUTHORS = {"t2i-adapter": "cubic timesteps", "controlnet": "half of the prompts"}


def bps_maker(Network=BPS, port_weights="head-heavy"):
    """A maker of BPS networks."""
    return lambda unet, channels, factor: Network(
        config_for(unet.config, channels, factor, port_weights))


# name: maker(frozen U-Net, channels of the condition, f)
METHODS = {
    "bps": bps_maker(), "bps-light": bps_maker(LightBPS), "controlnet": networks.ControlNet,
    "t2i-adapter": networks.T2IAdapter, "lora": networks.LoRA, "fine-tuned": networks.FineTuned,
    "output-term": networks.OutputTerm,
    "bps-contracting": bps_maker(port_weights=(16, 8, 4, 0, 0)),
    "bps-flat": bps_maker(port_weights="flat"),
    # small on the way down; on the way up 8, the geometric mean of 16, 8 and 4
    "bps-mirrored": bps_maker(port_weights=(1, 1, 1, 16, 8)),
    "bps-time-blind": bps_maker(networks.TimeBlindBPS),
    "bps-condition-blind": bps_maker(networks.ConditionBlindBPS)}
MAIN, PARTS = list(METHODS)[:7], ["bps", *list(METHODS)[7:]]
LONGER = ("bps", "t2i-adapter", "controlnet")
RATE_OF = dict.fromkeys(("bps-contracting", "bps-time-blind", "bps-condition-blind"), "bps")
FILTERS = ("task", "method", "recipe", "pairs", "steps", "seed")
BASE_ALONE = "base-alone"               # in place of a method: nothing is trained


class Job(NamedTuple):
    """One training and its measurements."""
    task: str
    method: str
    recipe: str
    pairs: int                          # for training; 0 is all. "draws alone": pictures
    steps: int
    rate: float                         # 0 in a row of a study: the one of the lowest loss
    seed: int


def rows(tasks, methods, recipes=("average",), pairs=(40, 0), steps=STEPS, seeds=SEEDS):
    """The Jobs of a study."""
    return [Job(task, method, recipe, count, steps, 0.0, seed) for seed, task, count, recipe, method
            in itertools.product(seeds, tasks, pairs, recipes, methods)]


STUDIES = dict(
    methods=rows(("sketch", "segmentation"), [BASE_ALONE], ["-"], [0], 0)
    + rows(["sketch"], MAIN) + rows(["segmentation"], MAIN, seeds=[0]),
    recipes=rows(["artistic"], [BASE_ALONE], ["-"], [0], 0)
    + rows(("sketch", "artistic"), ["bps"], list(RECIPES)[:5], [40])
    + rows(("sketch", "artistic"), ["bps"], ["draws alone"], [DRAWS])
    + rows(["sketch"], ["bps"], pairs=(100, 0)),
    data=rows(["sketch"], MAIN) + rows(["sketch"], MAIN, pairs=(12, 100, 300), seeds=[0]),
    rates=[row._replace(rate=FIRST_RATE) for row in rows(["sketch"], MAIN, pairs=[40], seeds=[0])],
    ablations=rows(["sketch"], PARTS),
    steps=rows(["sketch"], LONGER, pairs=[0], steps=LONG)
    + rows(["sketch"], LONGER, pairs=[40], steps=LONG, seeds=[0])
    + rows(["sketch"], LONGER, pairs=[0], steps=LONGEST, seeds=[0]))


# ---- what is done, and what to train next --------------------------------------------------

def read_record(file, base_sha256):
    """{Job: numbers} of everything that is done on a base, also by other processes."""
    results = {}
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if row["base_sha256"] == base_sha256:
                results[Job(**row["job"])] = row["results"]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{file}: line {number} is corrupt. Delete it.") from None
    return results


@functools.cache
def code_version():
    """The short hash of the code that runs, or "" without git."""
    with contextlib.suppress(OSError):
        return subprocess.run(("git", "rev-parse", "--short", "HEAD"), cwd=ROOT, text=True,
                              capture_output=True).stdout.strip()
    return ""


def write_record(file, base_sha256, job, numbers):
    """Append a line in one piece, because other processes may append at the same time."""
    line = json.dumps(dict(job=job._asdict(), base_sha256=base_sha256, commit=code_version(),
                           torch=torch.__version__, results=numbers), allow_nan=False)
    with file.open("ab", buffering=0) as f:
        f.write(f"{line}\n".encode())
    tqdm.write(f"done: {' '.join(map(str, job))}", file=sys.stderr)


def best_rate(losses):
    """The rate with the lowest loss of {rate: validation loss}, the smaller one of two equals."""
    return min(losses, key=lambda rate: (losses[rate], rate))


def next_rate(losses):
    """The rate to try next, or None if both neighbours of the best one have been tried."""
    if not losses:
        return FIRST_RATE
    best = RATES.index(best_rate(losses))
    return next((rate for rate in RATES[max(0, best - 1):best + 2] if rate not in losses), None)


def resolve(results, row):
    """A row as the Job with its best rate and recipe, or else the next Job of its sweep."""
    if row.method == BASE_ALONE or row.rate:
        return row
    sweep = row._replace(task="sketch", method=RATE_OF.get(row.method, row.method),
                         recipe="average", pairs=SWEPT.get(row.pairs, row.pairs),
                         steps=min(row.steps, LONG), seed=SWEEP_SEED)
    losses = {}
    while (rate := next_rate(losses)) is not None:
        job = sweep._replace(rate=rate)
        if job not in results:
            return job
        losses[rate] = results[job]["val"] or math.inf
    best = best_rate(losses)
    if row.method in AUTHORS:
        job = sweep._replace(rate=best, recipe=AUTHORS[row.method])
        if job not in results:
            return job
        if (results[job]["val"] or math.inf) < losses[best]:
            row = row._replace(recipe=job.recipe)
    return row._replace(rate=best)


def claim(stack, folder):
    """Lock a folder until the stack is closed; False if another process has it."""
    try:
        stack.enter_context(lock(folder))
    except UserError:
        return False
    return True


def finish(row, bench_of, args):
    """Train all that a row needs, until the time is up; False if another process is at it."""
    def read():
        return read_record(args.record, args.base_sha256)

    while time.monotonic() < args.end and (job := resolve(results := read(), row)) not in results:
        out = args.out / "-".join(map(str, job)).replace(" ", "_")
        with contextlib.ExitStack() as stack:
            if not claim(stack, out):
                return False
            if job not in read():               # it may have been done meanwhile
                numbers = bench_of(job.task).measure(job, out)
                write_record(args.record, args.base_sha256, job, numbers)
            shutil.rmtree(out, ignore_errors=True)
    return True


# ---- training and measuring ----------------------------------------------------------------

class RivalTraining(Training):
    """A training whose network need not be a BPS; it keeps a file of the average."""

    def __init__(self, out, network, args, recipe, picks_best):
        """picks_best: keep the average of the lowest validation loss, not the last one."""
        super().__init__(out, network, args, Processes(), keep_best=False)
        self.recipe, self.picks_best = recipe, picks_best

    def average_weights(self, step):
        """Let the average follow the weights; a mean over one step is the weights themselves."""
        super().average_weights(step if self.recipe.averaged else 0)

    def kept(self):
        """The log's row of the average that is kept."""
        return min(self.rows if self.picks_best else self.rows[-1:],
                   key=lambda row: row["val_steered"])

    def write(self):
        """Write the average if it is to be kept."""
        if self.kept() is self.rows[-1]:
            weights.save(self.average.state_dict(), self.out / "kept.safetensors", {})

    def restore_best(self):
        """Load the average that was kept."""
        self.average.load_state_dict(load_file(self.out / "kept.safetensors"))


class Bench:
    """What the trainings of a task share: the base, and the pairs."""

    def __init__(self, task, base, root):
        """root: folder for what the base draws."""
        self.task, self.base, self.root = task, base, root
        self.pairs = {split: load_pairs(task, split)[:MEASURED.get(split)]
                      for split in world.SPLITS}
        self.val, *self.tests = (self.cache(lambda: pairs) for split, pairs in self.pairs.items()
                                 if split != "train" and pairs)

    def cache(self, make_rows, extract=False):
        """The LatentCache of rows, made while no other process makes one: they share files."""
        with contextlib.ExitStack() as stack:
            while not claim(stack, self.root / "preparing"):
                time.sleep(1)
            return LatentCache(make_rows(), self.task, world.SIZE, self.base, extract)

    def train_rows(self, job):
        """The rows of the LatentCache that a Job trains on; its seed chooses the pairs."""
        recipe, labelled = RECIPES[job.recipe], self.pairs["train"]
        args = SimpleNamespace(task=self.task, data=None, extract=False, size=world.SIZE,
                               from_base=DRAWS if recipe.pairs else job.pairs, seed=job.seed,
                               cache=self.root, no_mirror=False)
        order = np.random.default_rng(job.seed).permutation(len(labelled))
        pairs = [labelled[i] for i in sorted(order[:job.pairs or None])]
        if not recipe.pairs:
            prompts = [pair.prompts[0] for pair in labelled]
            pairs = pairs_of(*draw_for(prompts, self.base, args, Processes()))
        rows = with_copies(pairs, with_moved=recipe.copies)
        return rows if not recipe.draws else add_draws(
            rows, self.pairs | dict(train=pairs), self.base, args, Processes())

    def measure(self, job, out):
        """The numbers of a Job (a dict), for which it trains in the folder `out`."""
        base, network, numbers = self.base, None, {}
        if job.method != BASE_ALONE:
            try:
                network, numbers = self.train(job, out)
            except NotFinite:
                return dict(val=None)                       # the rate is too large
            base = networks.base_with(self.base, network)
        if job.seed == SWEEP_SEED:
            return numbers
        test, *unseen = (evaluate(base, cache, network, job.seed) for cache in self.tests)
        return numbers | test | (dict(unseen=unseen[0]) if unseen else {})

    def train(self, job, out):
        """(trained network, numbers of its training) of a Job."""
        recipe = RECIPES[job.recipe]
        torch.manual_seed(job.seed)
        network = METHODS[job.method](self.base.unet, TASKS[self.task].channels,
                                      self.base.vae.factor).to(memory_format=torch.channels_last)
        labelled = (job.pairs or len(self.pairs["train"])) if recipe.pairs else 0
        picks_best = job.seed != SWEEP_SEED and (labelled >= SELECTION_PAIRS
                                                 or not recipe.averaged)
        args = SimpleNamespace(
            device="cpu", dtype="fp32", steps=job.steps, batch=BATCH, lr=job.rate, seed=job.seed,
            accumulate=1, save_every=max(1, job.steps // SAVES) if picks_best else job.steps)
        training = RivalTraining(out, network, args, recipe, picks_best)
        training.start_or_resume(job._asdict())
        steps_to_go = job.steps - training.step
        cache = self.cache(lambda: self.train_rows(job), extract=not recipe.pairs)
        cache.batch = functools.partial(cache.batch, empty_share=recipe.empty_share)

        def on_save(step, train_loss):
            base = networks.base_with(self.base, training.average)
            val_loss = paired_errors(base, self.val, training.average).mean()
            require_finite(val_loss, "the validation loss", job.rate)
            training.save(step, train_loss, None, val_loss.item())

        start, base = time.process_time(), networks.base_with(self.base, network, recipe.cubic)
        train(training, base, cache, args, on_save)
        minutes = (time.process_time() - start) / 60
        training.restore_best()
        return training.average, dict(
            val=training.kept()["val_steered"], step=training.kept()["step"],
            minutes=minutes * job.steps / steps_to_go if steps_to_go else None,
            parameters=sum(parameter.numel() for parameter in network.parameters()))


# ---- tables and figures --------------------------------------------------------------------

def over_seeds(results, study):
    """{Job of seed 0: {seed: numbers}} of a study's rows, as far as they are measured."""
    groups = {}
    for row in study:
        job = resolve(results, row)
        if "obedience" in results.get(job, {}):
            groups.setdefault(job._replace(seed=0), {})[job.seed] = results[job]
    return groups


def columns(numbers):
    """{head: value} of a Job's numbers."""
    found = {}
    for where, part in (("", numbers), (", unseen hair", numbers.get("unseen", {}))):
        if "gain" in part:
            found[f"gain x 1000{where}"] = 1000 * part["gain"][0]
            found[f"gain x 1000 at best strength{where}"] = 1000 * part["calibrated_gain"][0]
        for name, value in part.get("obedience", {}).items():
            found[f"{name} (0 to 1){where}"] = value
    found["colours as in the prompt (%)"] = 100 * numbers["colours"]
    found["kernel distance x 1000"] = 1000 * numbers["distance"][0]
    if "gain" in numbers:
        found |= {"best strength": numbers["strength"][0],
                  "CPU minutes": numbers["minutes"] or math.nan,
                  "parameters (millions)": numbers["parameters"] / 1e6}
    return found


def mean_and_deviation(group, head):
    """(mean, standard deviation over seeds) of a column; NaN if a seed lacks it, 0 for one seed."""
    values = [columns(numbers).get(head, math.nan) for numbers in group.values()]
    return np.mean(values), np.std(values, ddof=1) if np.ptp(values) > 0 else 0.0


def beyond_bps(groups, job, name):
    """A cell: by how much gains or distances (`name`) exceed BPS's, with an error over pairs.

    BPS is the row of the same table with the same pairs, steps and seeds.
    """
    bps = next((group for other, group in groups.items() if other != job and other._replace(
        rate=0.0) == job._replace(method="bps", recipe="average", rate=0.0)), {})
    values = [(numbers[name], bps[seed][name]) for seed, numbers in groups[job].items()
              if name in numbers and seed in bps]
    if not values:
        return "-"
    difference, error = paired_difference(*np.mean(values, axis=0))
    return f"{1000 * difference:+.2f} +- {1000 * error:.2f}"


def print_table(title, groups):
    """Print what over_seeds returns as a table. title: its study and task."""
    heads = list(dict.fromkeys(head for group in reversed(groups.values())
                               for head in columns(group[min(group)])))
    titles = ["method", "recipe", "pairs", "steps", "rate", "seeds", *heads,
              "gain x 1000 beyond bps", "kernel distance x 1000 beyond bps"]
    print(f"\n### {', '.join(title)}\n\n+- is the standard deviation over seeds; for what is "
          f"beyond bps, the standard error over test pairs.\n\n"
          f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for job, group in groups.items():
        cells = [job.method, job.recipe, job.pairs or "all", job.steps, f"{job.rate:g}", len(group)]
        for head in heads:
            mean, deviation = mean_and_deviation(group, head)
            error = f" +- {deviation:.2g}" if deviation else ""
            cells.append("-" if np.isnan(mean) else f"{mean:.3g}{error}")
        cells += [beyond_bps(groups, job, name) for name in ("gains", "distances")]
        print(f"| {' | '.join(map(str, cells))} |")


def draw_figure(groups, folder):
    """Draw seed 0's gain and line F1 by number of sketches, with bands over seeds."""
    folder.mkdir(exist_ok=True)
    heads = "gain x 1000", "line F1 (0 to 1)"
    figure = Figure(2, [f"{head} by number of sketches" for head in heads])
    for axes, head in zip(figure.axes, heads):
        for color, method in enumerate(MAIN):
            points = sorted((job.pairs or ALL_PAIRS, columns(group[0])[head],
                             mean_and_deviation(group, head)[1])
                            for job, group in groups.items() if job.method == method and 0 in group)
            if points:
                x, y, band = zip(*points)
                axes.line(x, y, method, band=band, color=color)
    figure.save(folder / "rivals.png")


def main():
    """Train what is missing of the chosen rows, and print their tables."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--study", choices=STUDIES, help="(default: all)")
    for field in FILTERS:
        values = list(dict.fromkeys(getattr(row, field) for row in sum(STUDIES.values(), [])))
        add(f"--{field}", type=type(values[0]), choices=values, help="only rows with this value")
    add("--done", action="store_true", help="train nothing: print what is done")
    add("--minutes", type=positive, default=10**6, help="start no training after this time")
    add("--record", type=Path, default=ROOT / "docs" / "rivals.jsonl", help="file of the results; "
        "the figure goes to figures/ beside it (default: docs/rivals.jsonl)")
    add("--out", type=Path, default=Path("runs/rivals"), help="folder of the trainings under way "
        "(default: %(default)s)")
    args = parser.parse_args()
    parser.check_out(args.record.parent, option="--record")
    parser.check_out(args.out)
    args.end = time.monotonic() + 60 * args.minutes
    args.base_sha256 = fingerprint(*itertools.chain(*checkpoints.weights_files(BASE).values()))
    code_version()                              # before it can change
    chosen = {name: [row for row in study if args.study in (None, name) and all(
        getattr(args, field) in (None, getattr(row, field)) for field in FILTERS)]
        for name, study in STUDIES.items()}
    if not args.done:
        args.record.parent.mkdir(parents=True, exist_ok=True)       # before the work
        base = load_base(BASE)
        bench_of = functools.cache(lambda task: Bench(task, base, args.out))
        todo = sorted(dict.fromkeys(sum(chosen.values(), [])), key=lambda row: row.seed)
        while todo := [row for row in todo if not finish(row, bench_of, args)]:
            time.sleep(WAIT)
    results = read_record(args.record, args.base_sha256)
    tables = {(name, task): groups for name, study in chosen.items() for task in TASKS
              if (groups := over_seeds(results, [row for row in study if row.task == task]))}
    if not tables:
        raise UserError(f"{args.record} has no results of these rows.")
    for title, groups in tables.items():
        print_table(title, groups)
    if chosen["data"] and (groups := over_seeds(results, STUDIES["data"])):
        draw_figure(groups, args.record.parent / "figures")


if __name__ == "__main__":
    run_script(main)
