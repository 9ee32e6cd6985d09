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
RIVALS, ROBUSTNESS_SIZES = ("scratch", "labels", "tuned"), (12, 100, 400)
# Port weights. A weight acts as a learning rate too, so flat and foot-heavy (the mirror) have
# head-heavy's sum of squares.
MODES = {"CP": (16, 8, 4, 0, 0, 0, 0), "TP": (0, 0, 0, 16, 0, 0, 0), "EP": (0, 0, 0, 0, 1, 1, 1),
         "CP+TP": (16, 8, 4, 16, 0, 0, 0), "CP+EP": (16, 8, 4, 0, 1, 1, 1),
         "TP+EP": (0, 0, 0, 16, 1, 1, 1), "CP+TP+EP": toy2d.HEAD_HEAVY, "flat": (9.2,) * 7,
         "foot-heavy": (1, 1, 1, 16, 4, 8, 16)}
ALL_MODES = (*MODES, "time-blind", "output", "output, blind")
MODES_SIZES, MODES_STEPS, MODES_SEEDS = (12, 100), (625,), range(5)
GAUSSIAN_SAMPLES, GAUSSIAN_STEPS = 20_000, 400
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
KINDS = dict(arm=(1,) * toy2d.ARMS + (0,), place=(0,) * toy2d.ARMS + (1,), both=1)  # what is known
LAWS = [*({"arm": s} for s in STRENGTHS), *({"place": s} for s in STRENGTHS),
        {"both": 1.0}, {"arm": 1.0, "place": 1.0}]              # products of p(c | z)^s
BITS_POINTS = 4000
CLEAN = torch.ones(1, 1), torch.zeros(1, 1)                     # alpha and sigma without noise


# ---- runs and their record -----------------------------------------------------------------

class Run(NamedTuple):
    """One training, or one estimate without a network (0 steps).

    effort: share of the steps that are taken.
    """
    method: str
    n: int
    steps: int
    lr: float
    seed: int
    effort: float = 1.0


class Lab:
    """The pinwheel, priors and held-out conditions by seed, and the record of runs in a folder."""

    def __init__(self, out, effort):
        self.out, self.effort, self.world = out, effort, toy2d.pinwheel()
        self.prior = functools.cache(lambda seed: toy2d.train_prior(self.world, seed, effort))
        self.held_out = functools.cache(lambda seed: toy2d.HeldOut(self.world, seed))
        self.file = out / "runs.jsonl"
        self.record = {}
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            run = json.loads(line)
            scores = run.pop("scores")
            self.record[Run(**run)] = scores

    def scores(self, run):
        """Accuracy, energy, spread and bits of a run: read from the record, or else measured."""
        if run not in self.record:
            self.record[run] = self.measure(run)
            line = json.dumps(run._asdict() | dict(scores=self.record[run]))
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
            print(line)
        return self.record[run]

    def measure(self, run):
        """Train and measure a run."""
        held_out = self.held_out(run.seed)
        labels = toy2d.sample_labels(self.world, run.n, run.seed)
        if run.method in NO_NETWORK:
            points, bits = dict(density=density, bound=bound)[run.method](held_out, labels)
        else:
            eps = learn(run, self.prior(run.seed), labels)
            points, bits = held_out.draw(eps), held_out.bits_lost(eps).sum().item()
        return held_out.scores(points) | dict(bits=bits)

    def best(self, score, method, n, steps=STEPS):
        """The Run of steps and RATES with the least score on GRID_SEED."""
        if method in NO_NETWORK:
            return Run(method, n, 0, 0.0, GRID_SEED, self.effort)
        grid = [Run(method, n, *pair, GRID_SEED, self.effort)
                for pair in itertools.product(steps, RATES)]
        return min(grid, key=lambda run: self.scores(run)[score])

    def over_seeds(self, runs, score, seeds=SEEDS):
        """A score (runs, seeds) of runs on other seeds."""
        return torch.tensor([[self.scores(run._replace(seed=seed))[score] for seed in seeds]
                             for run in runs])


def learn(run, prior, labels):
    """eps(z_t, t, cond) that a run learns from labels."""
    settings = math.ceil(run.steps * run.effort), run.lr, run.seed
    if run.method in toy2d.METHODS:
        return toy2d.learn(run.method, prior, labels, *settings)
    if run.method == "tuned":
        return toy2d.fit(labels, *settings, copy.deepcopy(prior).requires_grad_(True))
    if run.method == "time-blind":
        return toy2d.fit(labels, *settings, prior, TimeBlindBPS)
    if run.method in MODES:
        return toy2d.fit(labels, *settings, prior, lambda: toy2d.ToyBPS(MODES[run.method]))
    return fit_output_term(labels, *settings, prior, blind=run.method == "output, blind")


class TimeBlindBPS(toy2d.ToyBPS):
    """A BPS that does not see the timestep."""

    def forward(self, cond, t_emb):
        """Seven residuals (B, width) that do not depend on t_emb."""
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
        """The term (B, 2), which is 0 before training."""
        seen = torch.cat([0 * z_t if self.blind else z_t, cond], dim=1)
        return self.out(self.outputs(seen, t_emb)[-1])


def fit_output_term(labels, steps, lr, seed, prior, blind):
    """eps(z_t, t, cond) of the frozen prior plus an OutputTerm trained on labels."""
    torch.manual_seed(seed)
    term = OutputTerm(blind)

    def eps(z_t, t, cond):
        """The prior's eps plus the term."""
        return prior(z_t, t) + term(z_t, prior.time_embedding(t), cond)

    batch = min(toy2d.BATCH, toy2d.PASSES * len(labels[0]))
    toy2d.train(eps, list(term.parameters()), labels, steps, lr, batch, seed)
    return eps


# ---- what can be had without a network -----------------------------------------------------

def excess_bits(held_out, log_density):
    """KL divergence in bits from the true p(z | c) to log_density (N, m) at held_out.reference.

    It is also the integral of HeldOut.bits_lost for the exact denoiser of that density.
    """
    world = held_out.world
    log_p_c = held_out.log_p_cond.logsumexp(1) - math.log(len(world.means))
    exact = torch.stack([world.log_p(points, *CLEAN, row) for points, row in zip(
        held_out.reference, held_out.log_p_cond)]) - log_p_c[:, None]
    return (exact - log_density).mean().item() / math.log(2)


def log_likelihood(fitted, z, cond):
    """log p(c | z) (m,) of one condition (6,) at points (m, 2) by toy2d.fit_likelihood's result."""
    arm_p, place, error = fitted(z)
    arm = (arm_p @ cond[:toy2d.ARMS]).log()
    return arm + torch.distributions.Normal(place, error).log_prob(cond[toy2d.ARMS])


def bound(held_out, labels):
    """Points (N, SAMPLES, 2) and bits of the exact prior times the likelihood fitted to labels."""
    world, fitted = held_out.world, toy2d.fit_likelihood(*labels)
    generator = torch.Generator().manual_seed(50_000 + held_out.seed)
    large = world.sample(20_000, generator)
    drawn, log_density = [], []
    for points, cond in zip(held_out.reference, held_out.cond):
        log_weights = log_likelihood(fitted, large, cond)
        log_p_c = log_weights.logsumexp(0) - math.log(len(large))
        drawn.append(large[torch.multinomial(log_weights.softmax(0), toy2d.SAMPLES,
                                             replacement=True, generator=generator)])
        log_density.append(world.log_p(points, *CLEAN) + log_likelihood(fitted, points, cond)
                           - log_p_c)
    return torch.stack(drawn), excess_bits(held_out, torch.stack(log_density))


def density(held_out, labels):
    """Points (N, SAMPLES, 2) and bits of a kernel density of the labels alone.

    p(z | c) is a mean of normal kernels at the labels of c's arm, weighted by a kernel on the
    place. Both widths predict each label best from the others.
    """
    z_0, cond = labels

    def log_weights(asked, width):
        """Log weight (m, n) of each label for conditions `asked` (m, 6)."""
        square = (asked[:, None, toy2d.ARMS] - cond[:, toy2d.ARMS]) ** 2
        return (asked[:, :toy2d.ARMS] @ cond[:, :toy2d.ARMS].T).log() - square / (2 * width**2)

    def log_kernel(points, width):
        """Log density (.., n) of each label's kernel at points (.., 2)."""
        square = torch.cdist(points, z_0).square()
        return -square / (2 * width**2) - math.log(2 * math.pi * width**2)

    def left_out(widths):
        """Log likelihood of the labels, each predicted from all others."""
        log_w = log_weights(cond, widths[0]).fill_diagonal_(-math.inf).log_softmax(1)
        return (log_w + log_kernel(z_0, widths[1])).logsumexp(1).sum()

    place_width, width = max(itertools.product(toy2d.KERNEL_WIDTHS, repeat=2), key=left_out)
    log_w = log_weights(held_out.cond, place_width).log_softmax(1)              # (N, n)
    generator = torch.Generator().manual_seed(60_000 + held_out.seed)
    near = torch.multinomial(log_w.exp(), toy2d.SAMPLES, replacement=True, generator=generator)
    points = z_0[near] + width * torch.randn(*near.shape, 2, generator=generator)
    log_density = torch.stack([(row + log_kernel(true, width)).logsumexp(1)
                               for row, true in zip(log_w, held_out.reference)])
    return points, excess_bits(held_out, log_density)


# ---- the three studies that keep a record --------------------------------------------------

def prior_worth(lab):
    """Compare five ways by number of labels, each at its own best steps and rate."""
    print(f"grid: steps {STEPS}, rates {RATES}; each chosen on seed {GRID_SEED}")
    rows, chosen, figure = [], [], Figure(2, ["energy distance by labels", "bits lost by labels"])
    for axes, score in zip(figure.axes, ("energy", "bits")):
        best = {method: [lab.best(score, method, n) for n in SIZES] for method in LINES}
        values = {method: lab.over_seeds(runs, score) for method, runs in best.items()}
        for i, n in enumerate(SIZES):
            row = dict(score=score, n=n)
            rows.append(row | {method: cell(values[method][i]) for method in LINES})
            chosen.append(row | {f"{method}: steps, rate": f"{runs[i].steps}, {runs[i].lr:g}"
                                 for method, runs in best.items() if runs[i].steps})
        for method, by_size in values.items():
            axes.line(SIZES, by_size.mean(1), method, log_y=True, band=by_size.std(1))
        print(worth(score, values["draws"][SIZES.index(toy2d.LABELS)].mean(),
                    values["scratch"].mean(1)))
    save(lab.out / "prior", rows, figure)
    save(lab.out / "prior-chosen", chosen)


def cell(values):
    """Text of a table: mean and standard deviation over seeds."""
    return f"{values.mean():.3f} +- {values.std():.3f}"


def worth(score, drawn, scratch):
    """A sentence: how many labels a network from scratch needs to be as good as draws.

    scratch (sizes,) falls with the labels; between sizes it is a line on two logarithmic axes.
    """
    sizes, values = np.log(SIZES)[::-1], scratch.log().numpy()[::-1]
    n = np.exp(np.interp(drawn.log(), values, sizes))
    at_least = "at least " if drawn < scratch.min() else ""
    return (f"{score}: with {toy2d.LABELS} labels and the prior you do as well as with "
            f"{at_least}{n:.0f} without it")


def modes(lab):
    """Steer in each mode, on five seeds, each mode at its own best rate."""
    panels = list(itertools.product(MODES_SIZES, ("accuracy", "energy")))
    figure = Figure(2, [f"{score}, {n} labels" for n, score in panels])
    rows = {(n, name): dict(n=n, mode=name) for n in MODES_SIZES for name in ALL_MODES}
    for axes, (n, score) in zip(figure.axes, panels):
        best = [lab.best("energy", name, n, MODES_STEPS) for name in ALL_MODES]
        values = lab.over_seeds(best, score, MODES_SEEDS)
        axes.bars(ALL_MODES, values.mean(1), values.std(1))
        gaps = values - values[ALL_MODES.index("CP+TP+EP")]
        for run, of_mode, gap in zip(best, values, gaps):
            rows[n, run.method] |= {
                "rate": f"{run.lr:g}", score: of_mode.mean().item(),
                f"{score} - CP+TP+EP's": "{:+.3f} +- {:.3f}".format(*mean_and_error(gap))}
    save(lab.out / "modes", list(rows.values()), figure)


def robustness(lab):
    """Train on fewer and more labels for fewer and more steps, at the best rate of each cell."""
    rows, panels = [], list(itertools.product(("accuracy", "energy"), RIVALS))
    figure = Figure(len(RIVALS), [f"{name}: {score} by steps" for score, name in panels])
    for axes, (score, name) in zip(figure.axes, panels):
        for n in ROBUSTNESS_SIZES:
            best = [lab.best("energy", name, n, (steps,)) for steps in STEPS]
            values = lab.over_seeds(best, score)
            axes.line(STEPS, values.mean(1), f"{n} labels", log_y=score == "energy",
                      band=values.std(1))
            rows.append(dict(score=score, method=name, labels=n) | {
                f"{run.steps} steps": f"{cell(of_run)} ({run.lr:g})"
                for run, of_run in zip(best, values)})
    for first in (0, len(RIVALS)):
        figure.share_limits(range(first, first + len(RIVALS)))
    save(lab.out / "robustness", rows, figure)


# ---- bits ----------------------------------------------------------------------------------

def log_p_cond(world, cond, kind):
    """World.log_p_cond (N, K) of the part of cond (N, 6) that is known: arm, place or both."""
    arm = cond[:, world.arms].log()
    place = -(cond[:, toy2d.ARMS:] - world.places) ** 2 / (2 * toy2d.PLACE_ERROR**2)
    return dict(arm=arm, place=place, both=arm + place)[kind]


def exact_denoiser(world, log_p_cond=0.0):
    """The exact denoise(z_t, t); t is a number or (B,)."""
    return lambda z_t, t: world.eps(z_t, *toy2d.SCHEDULE.alpha_sigma(t, z_t), log_p_cond)


def learn_kind(lab, kind):
    """eps(z_t, t, cond) of a BPS that saw the labels of seed 0, and of cond one kind only."""
    known = torch.tensor(KINDS[kind])
    z_0, cond = toy2d.sample_labels(lab.world, toy2d.LABELS, 0)
    run = Run("labels", toy2d.LABELS, *toy2d.METHODS["labels"], seed=0, effort=lab.effort)
    eps = learn(run, lab.prior(0), (z_0, cond * known))
    return lambda z_t, t, cond: eps(z_t, t, cond * known)


def exact_bits(world, z_0, cond, kind):
    """log2 p(c | z_0) / p(c) (n,), whose mean is the mutual information I(c; z_0)."""
    log_p = log_p_cond(world, cond, kind)                                       # (n, K)
    given_z_0 = world.log_p(z_0, *CLEAN, log_p) - world.log_p(z_0, *CLEAN)
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
    z_0, cond = lab.world.sample_labels(BITS_POINTS, torch.Generator().manual_seed(0))
    all_t = toy2d.BITS_T.tolist()
    for kind, eps in learned.items():
        exact = [exact_denoiser(lab.world, log_p)
                 for log_p in (0.0, log_p_cond(lab.world, cond, kind))]
        networks = lab.prior(0), functools.partial(eps, cond=cond)
        estimates = {
            "exact": exact_bits(lab.world, z_0, cond, kind),
            "exact denoisers": denoisers_bits(all_t, z_0, *exact, seed=0),
            "exact denoisers, 8 t": denoisers_bits(VALIDATION_T, z_0, *exact, seed=0),
            "learned denoisers": denoisers_bits(all_t, z_0, *networks, seed=0)}
        rows.append(dict(condition=kind) | {
            name: "{:.2f} +- {:.2f}".format(*mean_and_error(values))
            for name, values in estimates.items()})
    save(lab.out / "bits", rows)
    save(lab.out / "sources", sources(lab, learned["both"]))
    draw_steering(lab, learned["both"]).save(lab.out / "steering.png")


def sources(lab, labels_eps):
    """Rows of a table that adds the sampler's, the prior network's and the steering's error."""
    held_out, prior, world = lab.held_out(0), lab.prior(0), lab.world
    log_p = held_out.log_p_cond[held_out.rows]
    draws = Run("draws", toy2d.LABELS, *toy2d.METHODS["draws"], seed=0, effort=lab.effort)
    denoisers = {
        "exact": world.eps_bar,
        "prior network + exact M": lambda z_t, t, _: prior(z_t, t) + world.steering(
            z_t, *toy2d.SCHEDULE.alpha_sigma(t, z_t), log_p),
        "prior network + M of draws": learn(draws, prior, toy2d.sample_labels(
            world, toy2d.LABELS, 0)),
        "prior network + M of labels": labels_eps}
    return [{"denoiser": name, "energy": held_out.scores(held_out.draw(eps))["energy"],
             "bits lost": held_out.bits_lost(eps).sum().item()}
            for name, eps in denoisers.items()]


@torch.no_grad()
def draw_steering(lab, eps):
    """A Figure of M for the first held-out condition at three t, exact above, learned below."""
    held_out, world, timesteps = lab.held_out(0), lab.world, (700, 450, 200)
    generator = torch.Generator().manual_seed(0)
    grid = torch.cartesian_prod(*2 * [torch.linspace(-2.2, 2.2, 14)])
    figure = Figure(3, [f"M {name}, t = {t}" for name in ("exact", "learned") for t in timesteps])
    for column, t in enumerate(timesteps):
        alpha, sigma = toy2d.SCHEDULE.alpha_sigma(t, grid)
        large, small = (alpha * z_0 + sigma * torch.randn(z_0.shape, generator=generator)
                        for z_0 in (world.sample(2000, generator), held_out.reference[0]))
        # neither field matters at points that the prior hardly ever reaches
        lowest = world.log_p(large, alpha, sigma).quantile(0.02)
        z_t = grid[world.log_p(grid, alpha, sigma) > lowest]
        exact = world.steering(z_t, alpha, sigma, held_out.log_p_cond[:1])
        ts = torch.full((len(z_t),), t)
        learned = eps(z_t, ts, held_out.cond[:1]) - lab.prior(0)(z_t, ts)
        for axes, field in zip(figure.axes[column::3], (exact, learned)):
            axes.dots({"light": large, 0: small})
            axes.arrows(z_t, field / exact.norm(dim=1).max() * 0.33)
    return figure


# ---- tempering and composing ---------------------------------------------------------------

def law_points(held_out, law):
    """Points (N, m, 2) of p(z_0) prod_i p(c_i | z_0)^s_i, as many as the reference; law: {kind: s}.

    By importance: points of the large space, drawn again with the other factors as weights.
    """
    world = held_out.world
    generator = torch.Generator().manual_seed(40_000 + held_out.seed)
    z_0 = world.sample(50_000, generator)
    log_p, log_weights = world.log_p(z_0, *CLEAN), 0.0
    for kind, s in law.items():
        log_weights += s * torch.stack([world.log_p(z_0, *CLEAN, row) - log_p
                                        for row in log_p_cond(world, held_out.cond, kind)])
    count = held_out.reference.shape[1]
    return z_0[torch.multinomial(log_weights.softmax(1), count, replacement=True,
                                 generator=generator)]


def exact_denoisers(held_out):
    """eps* and {kind: eps_bar*} of the held-out conditions, functions of (z_t, t)."""
    world, cond = held_out.world, held_out.cond[held_out.rows]
    return exact_denoiser(world), {kind: exact_denoiser(world, log_p_cond(world, cond, kind))
                                   for kind in KINDS}


def draw_law(held_out, denoisers, law):
    """Points (N, SAMPLES, 2) drawn with bps.posterior of denoisers; law: {kind: s}."""
    eps_prior, posteriors = denoisers
    return held_out.draw(lambda z_t, t, _: posterior(
        eps_prior(z_t, t), [posteriors[kind](z_t, t) for kind in law], list(law.values())))


def gaussian_eps(z_t, t, variances=(1.0, 1.0)):
    """eps* (B, 2) of independent normal coordinates with these variances."""
    alpha, sigma = toy2d.SCHEDULE.alpha_sigma(t, z_t)
    return sigma * z_t / (alpha**2 * torch.tensor(variances) + sigma**2)


def gaussian_rows():
    """Variance of the first of two standard normal coordinates, given readings of it.

    A reading is the coordinate plus standard normal noise, so one leaves the variance v = 1/2.
    wanted: that of p(z_0) prod p(c_i | z_0)^s_i. predicted: what the probability flow of
    sum_i s_i M_i ends with (v^s for one reading, derived here). drawn: by diffusion.sample.
    """
    v = 0.5
    first, second = (v, 1.0), (1.0, v)
    cases = [(f"one reading, s = {s:g}", [first], [s], 1 / (1 + s), v**s) for s in STRENGTHS]
    cases += [("two readings of it", [first, first], [1, 1], 1 / 3, v**2),
              ("a reading of each coordinate", [first, second], [1, 1], v, v)]
    noise = torch.randn(GAUSSIAN_SAMPLES, 2, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, readings, strengths, wanted, predicted in cases:
        *_, z = diffusion.sample(lambda z_t, t: posterior(
            gaussian_eps(z_t, t), [gaussian_eps(z_t, t, left) for left in readings], strengths),
            noise, toy2d.SCHEDULE, GAUSSIAN_STEPS)
        rows.append({"readings of a Gaussian": name, "variance: wanted": wanted,
                     "variance: predicted": predicted, "variance: drawn": z[:, 0].var().item()})
    return rows


def algebra(lab):
    """Draw tempered and composed posteriors, and compare them with the laws they stand for."""
    gaussian, held_out, rows = gaussian_rows(), lab.held_out(0), {}
    cond = held_out.cond[held_out.rows]
    learned = {kind: functools.partial(learn_kind(lab, kind), cond=cond) for kind in KINDS}
    denoisers = dict(exact=exact_denoisers(held_out), learned=(lab.prior(0), learned))
    for law in LAWS:
        name = " ".join(f"{kind}^{s:g}" for kind, s in law.items())
        points = dict(true=law_points(held_out, law)) | {
            source: draw_law(held_out, pair, law) for source, pair in denoisers.items()}
        rows[name] = dict(law=name) | {
            source: toy2d.energy_distance(points[source], points["true"]).mean().item()
            for source in denoisers}

    figure = Figure(3, [*(f"p(z) p({kind} | z)^s: energy distance by s" for kind in LAWS[-1]),
                        "a Gaussian's variance by s", "arm and place: true",
                        "composed, exact denoisers", "composed, learned denoisers"])
    for axes, kind in zip(figure.axes, LAWS[-1]):
        for source in denoisers:
            axes.line(STRENGTHS, [rows[f"{kind}^{s:g}"][source] for s in STRENGTHS], source,
                      log_y=True)
    for key in ("wanted", "drawn"):
        variances = [row[f"variance: {key}"] for row in gaussian[:len(STRENGTHS)]]
        figure.axes[2].line(STRENGTHS, variances, key)
    large = lab.world.sample(5000, torch.Generator().manual_seed(0))
    for axes, cloud in zip(figure.axes[3:], points.values()):           # of the last law
        axes.dots(dict(light=large) | dict(enumerate(cloud[:toy2d.ARMS, :toy2d.SAMPLES])))
    save(lab.out / "gaussian", gaussian)
    save(lab.out / "algebra", list(rows.values()), figure)


def save(stem, rows, figure=None):
    """Print rows, which are dicts, as a markdown table; write STEM.md, and a Figure to STEM.png."""
    text, file = toy2d.markdown(rows), stem.with_suffix(".md")
    write_text(text, file)
    print(f"{text}{file}")
    if figure:
        figure.save(stem.with_suffix(".png"))


def main():
    """Run the study that the command line names."""
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
