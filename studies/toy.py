"""Studies in the plane, the world of toy2d.py.

    python -m studies.toy prior         what a prior is worth, by number of labels (paper's Fig. 2)
    python -m studies.toy modes         which paths to steer, with which weights (paper's Fig. 3)
    python -m studies.toy robustness    how many labels, how many steps (paper's Fig. 4)
    python -m studies.toy bits          how many bits a condition adds, and where bits are lost
    python -m studies.toy algebra       tempering and composing, against the exact laws

The first three append each run to runs/toy/runs.jsonl, one line per run, and resume from there.

Shapes as in toy2d.py: N conditions, K components, n labels.
"""
import copy
import functools
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import diffusion
import toy2d
from bps import posterior
from inputs.files import write_text
from inputs.options import Parser, run_script
from measure.bits import condition_bits, log_snr
from measure.plots import Figure
from measure.report import VALIDATION_T, mean_and_error

RATES, STEPS = (1e-4, 3e-4, 1e-3, 3e-3), (160, 625, 2500)   # the grid of every method
SIZES, SEEDS = (12, 25, 100, 400, 1600), (0, 1, 2)
GRID_SEED = 7                   # the seed that chooses from the grid, so that it is not measured on
LINES = ("density", "scratch", "labels", "draws", "bound")
NO_NETWORK = ("density", "bound")
COLORS = dict(scratch=0, labels=1, draws=2, tuned=3, density=4, bound=5)
RIVALS, ROBUSTNESS_SIZES = ("scratch", "labels", "tuned"), (12, 100, 400)
# Port weights. A weight acts as a learning rate too, so flat and foot-heavy (the mirror) have
# head-heavy's sum of squares.
MODES = {"CP": (16, 8, 4, 0, 0, 0, 0), "TP": (0, 0, 0, 16, 0, 0, 0), "EP": (0, 0, 0, 0, 1, 1, 1),
         "CP+TP": (16, 8, 4, 16, 0, 0, 0), "CP+EP": (16, 8, 4, 0, 1, 1, 1),
         "TP+EP": (0, 0, 0, 16, 1, 1, 1), "CP+TP+EP": toy2d.HEAD_HEAVY, "flat": (9.2,) * 7,
         "foot-heavy": (1, 1, 1, 16, 4, 8, 16)}
MODES_SIZES, MODES_STEPS, MODES_SEEDS = (12, 100), (625,), range(5)
GAUSSIAN_SAMPLES, GAUSSIAN_STEPS = 20_000, 400
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
KINDS = dict(arm=(1,) * toy2d.ARMS + (0,), place=(0,) * toy2d.ARMS + (1,), both=1)  # what is known
LAWS = [*({"arm": s} for s in STRENGTHS), *({"place": s} for s in STRENGTHS),
        {"both": 1.0}, {"arm": 1.0, "place": 1.0}]              # products of p(c | z)^s
BITS_POINTS = 4000


# ---- runs and their record -----------------------------------------------------------------

class Run(NamedTuple):
    """One training, or one estimate without a network (0 steps)."""
    method: str
    n: int
    steps: int
    lr: float
    seed: int


class Lab:
    """The pinwheel, priors and held-out conditions by seed, and the record of runs in a folder.

    effort: share of all training steps.
    """

    def __init__(self, out, effort):
        self.out, self.effort, self.world = out, effort, toy2d.pinwheel()
        self.prior = functools.cache(lambda seed: toy2d.train_prior(self.world, seed, effort))
        self.held_out = functools.cache(lambda seed: toy2d.HeldOut(self.world, seed))
        self.file = out / "runs.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.record = {}
        for line in map(json.loads, lines):
            if line["effort"] == effort:
                self.record[Run(*(line[field] for field in Run._fields))] = line["scores"]

    def scores(self, run):
        """Scores of a run, from the record where it is there."""
        if run not in self.record:
            scores = self.measure(run)
            line = json.dumps(run._asdict() | dict(effort=self.effort, scores=scores))
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
            print(line)
            self.record[run] = scores
        return self.record[run]

    def measure(self, run):
        """Train and measure: accuracy, energy, spread and bits."""
        held_out = self.held_out(run.seed)
        labels = toy2d.draw_labels(self.world, run.n, run.seed)
        if run.method in NO_NETWORK:
            points, bits = dict(density=density, bound=bound)[run.method](held_out, labels)
        else:
            run = run._replace(steps=math.ceil(run.steps * self.effort))
            eps = learn(run, self.prior(run.seed), labels)
            points, bits = held_out.draw(eps), held_out.bits_lost(eps).sum().item()
        return held_out.scores(points) | dict(bits=bits)

    def best(self, score, method, n, steps=STEPS):
        """The Run of steps and RATES with the least score on GRID_SEED."""
        if method in NO_NETWORK:
            return Run(method, n, 0, 0.0, GRID_SEED)
        grid = [Run(method, n, *pair, GRID_SEED) for pair in itertools.product(steps, RATES)]
        return min(grid, key=lambda run: self.scores(run)[score])

    def over_seeds(self, run, score, seeds=SEEDS):
        """A score (seeds,) of a run on other seeds."""
        return torch.tensor([self.scores(run._replace(seed=seed))[score] for seed in seeds])


def cell(run, values):
    """Text of a table: mean and standard deviation over seeds, and the steps and rate chosen."""
    chosen = f" ({run.steps}, {run.lr:g})" if run.steps else ""
    return f"{values.mean():.3f} +- {values.std():.3f}{chosen}"


def learn(run, prior, labels):
    """eps(z_t, t, cond) that a run learns from labels."""
    settings = run.steps, run.lr, run.seed
    if run.method in toy2d.METHODS:
        return toy2d.learn(run.method, prior, labels, run.seed, run.steps, run.lr)
    if run.method.startswith("output"):
        return learn_output_term(run, prior, labels)
    if run.method == "tuned":
        return toy2d.fit(labels, *settings, copy.deepcopy(prior).requires_grad_(True))
    if run.method == "time-blind":
        return toy2d.fit(labels, *settings, prior, TimeBlindBPS)
    return toy2d.fit(labels, *settings, prior, lambda: toy2d.ToyBPS(MODES[run.method]))


class TimeBlindBPS(toy2d.ToyBPS):
    """A BPS that does not see the timestep."""

    def forward(self, cond, t_emb):
        return super().forward(cond, 0 * t_emb)


class OutputTerm(toy2d.UShape):
    """A network whose output is added to eps, as DEFT's (arXiv 2406.01781).

    It sees the condition, the timestep and, unless it is blind, z_t.
    """

    def __init__(self, blind):
        super().__init__(toy2d.ARMS + 1 + 2)
        self.blind = blind
        self.out = nn.Linear(toy2d.WIDTHS[0], 2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z_t, t_emb, cond):
        seen = torch.cat([0 * z_t if self.blind else z_t, cond], dim=1)
        return self.out(self.outputs(seen, t_emb)[-1])


def learn_output_term(run, prior, labels):
    """eps(z_t, t, cond) of the frozen prior plus an OutputTerm."""
    torch.manual_seed(run.seed)
    term = OutputTerm(blind=run.method == "output, blind")

    def eps(z_t, t, cond):
        return prior(z_t, t) + term(z_t, prior.time_embedding(t), cond)

    batch = min(toy2d.BATCH, toy2d.PASSES * run.n)
    toy2d.train(eps, list(term.parameters()), labels, run.steps, run.lr, batch, run.seed)
    return eps


# ---- what can be had without a network -----------------------------------------------------

def excess_bits(held_out, log_density):
    """KL divergence in bits from the true p(z | c) to log_density (N, m) at held_out.true.

    It is also the integral of HeldOut.bits_lost for the exact denoiser of that density.
    """
    world = held_out.world
    log_p_c = held_out.log_p_cond.logsumexp(1) - math.log(len(world.means))
    exact = torch.stack([world.log_p(points, *toy2d.CLEAN, row) for points, row in zip(
        held_out.true, held_out.log_p_cond)]) - log_p_c[:, None]
    return (exact - log_density).mean().item() / math.log(2)


def log_likelihood(fitted, z, cond):
    """log p(c | z) (m,) of one condition (6,) at points (m, 2) by toy2d.likelihood's result."""
    arm_p, place, error = fitted(z)
    arm = (arm_p @ cond[:toy2d.ARMS]).log()
    return arm + torch.distributions.Normal(place, error).log_prob(cond[toy2d.ARMS])


def bound(held_out, labels):
    """Points (N, SAMPLES, 2) and bits of the exact prior times the likelihood fitted to labels."""
    world, fitted = held_out.world, toy2d.likelihood(*labels)
    generator = torch.Generator().manual_seed(50_000 + held_out.seed)
    large, _ = world.draw(20_000, generator)
    drawn, log_density = [], []
    for points, cond in zip(held_out.true, held_out.cond):
        log_weights = log_likelihood(fitted, large, cond)
        log_p_c = log_weights.logsumexp(0) - math.log(len(large))
        drawn.append(large[torch.multinomial(log_weights.softmax(0), toy2d.SAMPLES,
                                             replacement=True, generator=generator)])
        log_density.append(world.log_p(points, *toy2d.CLEAN)
                           + log_likelihood(fitted, points, cond) - log_p_c)
    return torch.stack(drawn), excess_bits(held_out, torch.stack(log_density))


def density(held_out, labels):
    """Points (N, SAMPLES, 2) and bits of a kernel density of the labels alone.

    p(z | c) is a mean of normal kernels at the labels of c's arm, weighted by a kernel on the
    place. Both widths predict each label best from the others.
    """
    z_0, cond = labels

    def log_weights(asked, width):
        square = (asked[:, None, toy2d.ARMS] - cond[:, toy2d.ARMS]) ** 2
        return (asked[:, :toy2d.ARMS] @ cond[:, :toy2d.ARMS].T).log() - square / (2 * width**2)

    def log_kernel(points, width):
        square = torch.cdist(points, z_0).square()
        return -square / (2 * width**2) - math.log(2 * math.pi * width**2)

    itself = torch.zeros(len(z_0), len(z_0)).fill_diagonal_(-math.inf)
    fits = {}
    for place_width in toy2d.KERNEL_WIDTHS:
        log_w = (log_weights(cond, place_width) + itself).log_softmax(1)
        for width in toy2d.KERNEL_WIDTHS:
            fits[place_width, width] = (log_w + log_kernel(z_0, width)).logsumexp(1).sum()
    place_width, width = max(fits, key=fits.get)
    log_w = log_weights(held_out.cond, place_width).log_softmax(1)              # (N, n)
    generator = torch.Generator().manual_seed(60_000 + held_out.seed)
    near = torch.multinomial(log_w.exp(), toy2d.SAMPLES, replacement=True, generator=generator)
    points = z_0[near] + width * torch.randn(*near.shape, 2, generator=generator)
    log_density = torch.stack([(row + log_kernel(true, width)).logsumexp(1)
                               for row, true in zip(log_w, held_out.true)])
    return points, excess_bits(held_out, log_density)


# ---- what a prior is worth -----------------------------------------------------------------

def prior_worth(lab):
    """Compare five ways by number of labels, each at its own best steps and rate."""
    scores = ("energy", "bits")
    best = {key: lab.best(*key) for key in itertools.product(scores, LINES, SIZES)}
    values = {key: lab.over_seeds(run, key[0]) for key, run in best.items()}
    print(f"grid: steps {STEPS}, rates {RATES}; each chosen on seed {GRID_SEED}")
    save_table([dict(score=score, n=n) | {
        method: cell(best[score, method, n], values[score, method, n]) for method in LINES}
        for score, n in itertools.product(scores, SIZES)], lab.out / "prior.md")
    figure = Figure(2, ["energy distance by labels", "bits lost by labels"])
    for axes, score in zip(figure.axes, scores):
        lines = {method: torch.stack([values[score, method, n] for n in SIZES]) for method in LINES}
        for method, line in lines.items():
            axes.line(SIZES, line.mean(1), method, log_y=True, band=line.std(1),
                      color=COLORS[method])
        print(worth(score, values[score, "draws", toy2d.LABELS].mean(),
                    lines["scratch"].mean(1)))
    figure.save(lab.out / "prior.png")


def worth(score, drawn, scratch):
    """A sentence: how many labels bring a network from scratch as far as draws.

    scratch (sizes,) falls with the labels; between sizes it is a line on two logarithmic axes.
    """
    sizes, values = np.log(SIZES)[::-1], scratch.log().numpy()[::-1]
    n = np.exp(np.interp(drawn.log(), values, sizes))
    known = "at least " if drawn < scratch.min() else ""
    return (f"{score}: with {toy2d.LABELS} labels and the prior you do as well as with "
            f"{known}{n:.0f} without it")


# ---- which paths, which weights ------------------------------------------------------------

def modes(lab):
    """Steer in each mode, on five seeds, each mode at its own best rate."""
    names = (*MODES, "time-blind", "output", "output, blind")
    rows = [dict(n=n, mode=name) for n in MODES_SIZES for name in names]
    panels = list(itertools.product(MODES_SIZES, ("accuracy", "energy")))
    figure = Figure(2, [f"{score}, {n} labels" for n, score in panels])
    for axes, (n, score) in zip(figure.axes, panels):
        best = [lab.best("energy", name, n, MODES_STEPS) for name in names]
        values = torch.stack([lab.over_seeds(run, score, MODES_SEEDS) for run in best])
        axes.bars(names, values.mean(1), values.std(1))
        all_paths = values[names.index("CP+TP+EP")]
        rows_of_n = [row for row in rows if row["n"] == n]
        for row, run, line in zip(rows_of_n, best, values):
            row |= {"rate": f"{run.lr:g}", score: line.mean().item(),
                    f"{score} - CP+TP+EP's": "{:+.3f} +- {:.3f}".format(
                        *mean_and_error(line - all_paths))}
    save_table(rows, lab.out / "modes.md")
    figure.save(lab.out / "modes.png")


# ---- how many labels, how many steps -------------------------------------------------------

def robustness(lab):
    """Train on fewer and more labels for fewer and more steps, at the best rate of each cell."""
    cells = list(itertools.product(RIVALS, ROBUSTNESS_SIZES, STEPS))
    best = {(name, n, steps): lab.best("energy", name, n, (steps,)) for name, n, steps in cells}
    rows = []
    panels = list(itertools.product(("accuracy", "energy"), RIVALS))
    figure = Figure(len(RIVALS), [f"{name}: {score} by steps" for score, name in panels])
    for axes, (score, name) in zip(figure.axes, panels):
        for n in ROBUSTNESS_SIZES:
            runs = [best[name, n, steps] for steps in STEPS]
            values = torch.stack([lab.over_seeds(run, score) for run in runs])
            axes.line(STEPS, values.mean(1), f"{n} labels", log_y=score == "energy",
                      band=values.std(1), color=COLORS[name])
            rows += [dict(score=score, method=name, labels=n) | {
                f"{steps} steps": cell(*pair) for steps, pair in zip(STEPS, zip(runs, values))}]
    for first in (0, len(RIVALS)):
        figure.share_limits(range(first, first + len(RIVALS)))
    save_table(rows, lab.out / "robustness.md")
    figure.save(lab.out / "robustness.png")


# ---- bits ----------------------------------------------------------------------------------

def log_p_cond(world, cond, kind):
    """World.log_p_cond (N, K) of the part of cond (N, 6) that is known: arm, place or both."""
    arm = (cond[:, :toy2d.ARMS].argmax(1)[:, None] == world.arms).to(cond).log()
    place = -(cond[:, toy2d.ARMS:] - world.places) ** 2 / (2 * toy2d.PLACE_ERROR**2)
    return dict(arm=arm, place=place, both=arm + place)[kind]


def learn_kind(lab, kind):
    """eps(z_t, t, cond) of a BPS that saw the labels of seed 0, and of cond one kind only."""
    steps, lr = toy2d.METHODS["labels"]
    known = torch.tensor(KINDS[kind])
    z_0, cond = toy2d.draw_labels(lab.world, toy2d.LABELS, 0)
    eps = toy2d.fit((z_0, cond * known), math.ceil(steps * lab.effort), lr, 0, lab.prior(0))
    return lambda z_t, t, cond: eps(z_t, t, cond * known)


def exact_bits(world, z_0, cond, kind):
    """log2 p(c | z_0) / p(c) (n,), whose mean is the mutual information I(c; z_0)."""
    log_p = log_p_cond(world, cond, kind)                                       # (n, K)
    given_z_0 = world.log_p(z_0, *toy2d.CLEAN, log_p) - world.log_p(z_0, *toy2d.CLEAN)
    return (given_z_0 - log_p.logsumexp(1) + math.log(len(world.means))) / math.log(2)


@torch.no_grad()
def denoisers_bits(timesteps, z_0, eps, eps_bar, seed):
    """condition_bits (n,) from the errors of eps(z_t, t), the prior, and of eps_bar."""
    generator = torch.Generator().manual_seed(seed)
    gains = []
    for t in timesteps:
        t = torch.full((len(z_0),), t)
        noise = torch.randn(z_0.shape, generator=generator)
        z_t = toy2d.SCHEDULE.add_noise(z_0, noise, t)
        gains.append((eps(z_t, t) - noise).square().sum(1)
                     - (eps_bar(z_t, t) - noise).square().sum(1))
    return condition_bits(torch.stack(gains, dim=1), log_snr(toy2d.SCHEDULE, timesteps))


def bits(lab):
    """Bits of each kind of condition, exact and from denoisers; then where bits are lost."""
    rows, learned = [], {kind: learn_kind(lab, kind) for kind in KINDS}
    z_0, cond = lab.world.draw_labelled(BITS_POINTS, torch.Generator().manual_seed(0))
    all_t = toy2d.BITS_T.tolist()
    for kind, eps in learned.items():
        exact = lab.world.denoiser(), lab.world.denoiser(log_p_cond(lab.world, cond, kind))
        networks = lab.prior(0), functools.partial(eps, cond=cond)
        estimates = {
            "exact": exact_bits(lab.world, z_0, cond, kind),
            "exact denoisers": denoisers_bits(all_t, z_0, *exact, seed=0),
            "exact denoisers, 8 t": denoisers_bits(VALIDATION_T, z_0, *exact, seed=0),
            "learned denoisers": denoisers_bits(all_t, z_0, *networks, seed=0)}
        rows.append(dict(condition=kind) | {
            name: "{:.2f} +- {:.2f}".format(*mean_and_error(values))
            for name, values in estimates.items()})
    save_table(rows, lab.out / "bits.md")
    sources(lab, learned["both"])


def sources(lab, labels_eps):
    """Add the sampler's, the prior network's and the steering's error one by one; draw M."""
    held_out, prior, world = lab.held_out(0), lab.prior(0), lab.world
    log_p = held_out.log_p_cond[held_out.rows]
    steps, lr = toy2d.METHODS["draws"]
    labels = toy2d.draw_labels(world, toy2d.LABELS, 0)
    denoisers = {
        "exact": lambda z_t, t, _: world.denoiser(log_p)(z_t, t),
        "prior network + exact M": lambda z_t, t, _: prior(z_t, t) + world.steering(
            z_t, *toy2d.signal_and_noise(t, z_t), log_p),
        "prior network + M of draws": toy2d.learn("draws", prior, labels, 0,
                                                  math.ceil(steps * lab.effort), lr),
        "prior network + M of labels": labels_eps}
    save_table([{"denoiser": name, "energy": held_out.scores(held_out.draw(eps))["energy"],
                 "bits lost": held_out.bits_lost(eps).sum().item()}
                for name, eps in denoisers.items()], lab.out / "sources.md")
    draw_steering(lab, labels_eps)


@torch.no_grad()
def draw_steering(lab, eps):
    """Draw M for the first held-out condition at three t, exact above, learned below."""
    held_out, world = lab.held_out(0), lab.world
    generator = torch.Generator().manual_seed(0)
    grid = torch.cartesian_prod(*2 * [torch.linspace(-2.2, 2.2, 14)])
    timesteps = (700, 450, 200)
    figure = Figure(3, [f"M {name}, t = {t}" for name in ("exact", "learned") for t in timesteps])
    for column, t in enumerate(timesteps):
        alpha, sigma = toy2d.signal_and_noise(t, grid)
        large, small = (alpha * z_0 + sigma * torch.randn(z_0.shape, generator=generator)
                        for z_0 in (world.draw(2000, generator)[0], held_out.true[0]))
        # neither field matters at points that the prior hardly ever reaches
        lowest = world.log_p(large, alpha, sigma).quantile(0.02)
        z_t = grid[world.log_p(grid, alpha, sigma) > lowest]
        exact = world.steering(z_t, alpha, sigma, held_out.log_p_cond[:1])
        ts = torch.full((len(z_t),), t)
        learned = eps(z_t, ts, held_out.cond[:1]) - lab.prior(0)(z_t, ts)
        for axes, field in zip(figure.axes[column::3], (exact, learned)):
            axes.dots({"light": large, 0: small})
            axes.arrows(z_t, field / exact.norm(dim=1).max() * 0.33)
    figure.save(lab.out / "steering.png")


# ---- tempering and composing ---------------------------------------------------------------

def law_points(held_out, law, seed=0):
    """Points (N, m, 2) of p(z_0) prod_i p(c_i | z_0)^s_i, as many as HeldOut.true; law: {kind: s}.

    By importance: points of the large space, drawn again with the other factors as weights.
    """
    world = held_out.world
    generator = torch.Generator().manual_seed(40_000 + 100 * seed + held_out.seed)
    z_0, _ = world.draw(50_000, generator)
    log_p, log_weights = world.log_p(z_0, *toy2d.CLEAN), 0.0
    for kind, s in law.items():
        log_weights += s * torch.stack([world.log_p(z_0, *toy2d.CLEAN, row) - log_p
                                        for row in log_p_cond(world, held_out.cond, kind)])
    return z_0[torch.multinomial(log_weights.softmax(1), held_out.true.shape[1], replacement=True,
                                 generator=generator)]


def exact_denoisers(held_out):
    """eps* and {kind: eps_bar*} of the held-out conditions, functions of (z_t, t)."""
    world = held_out.world
    return world.denoiser(), {
        kind: world.denoiser(log_p_cond(world, held_out.cond, kind)[held_out.rows])
        for kind in KINDS}


def draw_law(held_out, denoisers, law):
    """Points (N, SAMPLES, 2) drawn with bps.posterior of denoisers; law: {kind: s}."""
    eps_prior, posteriors = denoisers
    return held_out.draw(lambda z_t, t, _: posterior(
        eps_prior(z_t, t), [posteriors[kind](z_t, t) for kind in law], list(law.values())))


def gaussian_eps(variances):
    """denoise(z_t, t) of independent normal coordinates with these variances."""
    variances = torch.tensor(variances)

    def denoise(z_t, t):
        alpha, sigma = toy2d.signal_and_noise(t, z_t)
        return sigma * z_t / (alpha**2 * variances + sigma**2)

    return denoise


def gaussian_rows():
    """Variance of the first of two standard normal coordinates, given readings of it.

    A reading is the coordinate plus standard normal noise, so one leaves the variance v = 1/2.
    wanted: that of p(z_0) prod p(c_i | z_0)^s_i. closed form: what the probability flow of
    sum_i s_i M_i ends with (v^s for one reading, derived here). drawn: by diffusion.sample.
    """
    v = 0.5
    first, second = gaussian_eps((v, 1.0)), gaussian_eps((1.0, v))
    cases = [(f"one reading, s = {s:g}", [first], [s], 1 / (1 + s), v**s) for s in STRENGTHS]
    cases += [("two readings of it", [first, first], [1, 1], 1 / 3, v**2),
              ("a reading of each coordinate", [first, second], [1, 1], v, v)]
    noise = torch.randn(GAUSSIAN_SAMPLES, 2, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, posteriors, strengths, wanted, closed_form in cases:
        *_, z = diffusion.sample(lambda z_t, t: posterior(
            gaussian_eps((1.0, 1.0))(z_t, t), [eps(z_t, t) for eps in posteriors], strengths),
            noise, toy2d.SCHEDULE, GAUSSIAN_STEPS)
        rows.append({"Gaussian": name, "wanted": wanted, "closed form": closed_form,
                     "drawn": z[:, 0].var().item()})
    return rows


def algebra(lab):
    """Draw tempered and composed posteriors, and compare them with the laws they stand for."""
    gaussian = gaussian_rows()
    save_table(gaussian, lab.out / "gaussian.md")
    held_out = lab.held_out(0)
    cond = held_out.cond[held_out.rows]
    learned = {kind: functools.partial(learn_kind(lab, kind), cond=cond) for kind in KINDS}
    denoisers = dict(exact=exact_denoisers(held_out), learned=(lab.prior(0), learned))
    rows = {}
    for law in LAWS:
        name = " ".join(f"{kind}^{s:g}" for kind, s in law.items())
        points = dict(true=law_points(held_out, law)) | {
            source: draw_law(held_out, pair, law) for source, pair in denoisers.items()}
        rows[name] = dict(law=name) | {
            source: toy2d.energy_distance(points[source], points["true"]).mean().item()
            for source in denoisers}
    save_table(list(rows.values()), lab.out / "algebra.md")

    figure = Figure(3, [*(f"p(z) p({kind} | z)^s: energy distance by s" for kind in LAWS[-1]),
                        "a Gaussian's variance by s", "arm and place: true",
                        "composed, exact denoisers", "composed, learned denoisers"])
    for axes, kind in zip(figure.axes, LAWS[-1]):
        for source, method in (("exact", "bound"), ("learned", "labels")):
            axes.line(STRENGTHS, [rows[f"{kind}^{s:g}"][source] for s in STRENGTHS], source,
                      log_y=True, color=COLORS[method])
    for key, color in (("wanted", 4), ("drawn", 5)):
        figure.axes[2].line(STRENGTHS, [row[key] for row in gaussian[:len(STRENGTHS)]], key,
                            color=color)
    large, _ = lab.world.draw(5000, torch.Generator().manual_seed(0))
    for axes, cloud in zip(figure.axes[3:], points.values()):           # of the last law
        axes.dots(dict(light=large) | dict(enumerate(cloud[:toy2d.ARMS, :toy2d.SAMPLES])))
    figure.save(lab.out / "algebra.png")


def save_table(rows, file):
    """Print rows, which are dicts, as a markdown table, and write it to a file."""
    text = toy2d.markdown(rows)
    write_text(text, file)
    print(f"{text}{file}")


def main():
    studies = dict(prior=prior_worth, modes=modes, robustness=robustness, bits=bits,
                   algebra=algebra)
    parser = Parser(__doc__)
    parser.add_argument("study", choices=studies)
    parser.add_argument("--effort", type=float, default=1.0,
                        help="share of all training steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/toy"),
                        help="folder (default: %(default)s)")
    args = parser.parse_args()
    if not 0 < args.effort <= 1:
        parser.error(f"--effort must be in (0, 1], got {args.effort}.")
    parser.check_out(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    studies[args.study](Lab(args.out, args.effort))


if __name__ == "__main__":
    run_script(main)
