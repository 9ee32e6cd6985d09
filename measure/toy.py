"""Studies in the plane: paths and weights, robustness, algebra of posteriors, bits, learning rates.

    python -m measure.toy modes         which paths to steer, with which weights (paper's Fig. 3)
    python -m measure.toy robustness    how many labelled points, how many epochs (paper's Fig. 4)
    python -m measure.toy algebra       tempering and composing, against the exact laws
    python -m measure.toy bits          how many bits a condition says, against the exact number
    python -m measure.toy rates         which learning rate suits which method

Shapes as in toy2d.py: N conditions, K components.
"""
import itertools
import math
from dataclasses import replace

import torch
from tqdm import tqdm

import diffusion
import toy2d
from bps import posterior
from inputs.options import Parser, run_script
from measure.bits import condition_bits, log_snr
from measure.plots import Figure
from measure.report import VALIDATION_T, mean_and_error

# Port weights: three on CP, one on TP, three on EP, one at the output. The weight of a port acts as
# a learning rate too, so flat and foot-heavy (the mirror) have head-heavy's sum of squares.
MODES = {"CP": (16, 8, 4, 0, 0, 0, 0, 0), "TP": (0, 0, 0, 16, 0, 0, 0, 0),
         "EP": (0, 0, 0, 0, 1, 1, 1, 0), "CP+TP": (16, 8, 4, 16, 0, 0, 0, 0),
         "CP+EP": (16, 8, 4, 0, 1, 1, 1, 0), "TP+EP": (0, 0, 0, 16, 1, 1, 1, 0),
         "CP+TP+EP": toy2d.HEAD_HEAVY, "flat": (9.2,) * 7 + (0,),
         "foot-heavy": (1, 1, 1, 16, 4, 8, 16, 0), "time-blind": toy2d.HEAD_HEAVY,
         "at output": (0, 0, 0, 0, 0, 0, 0, 16)}
ALL, MODES_N, MODES_SEEDS = "CP+TP+EP", 12, 5
SCORES = ("accuracy", "energy")                         # the scores in figures
RIVALS = ("steered", "scratch", "tuned")
SIZES, EPOCHS, ROBUSTNESS_SEEDS = (12, 100, 500), (160, 640, 2500), 3       # for robustness
RATES, RATES_SEEDS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), 3
RATE_SEED = 100                 # added to the seed where robustness chooses a rate
GAUSSIAN_READING = 1.0          # tau, the standard error of a reading of a normal number
GAUSSIAN_SAMPLES, GAUSSIAN_STEPS = 20_000, 400
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)                   # for tempering
LAWS = [*({"arm": s} for s in STRENGTHS), *({"place": s} for s in STRENGTHS),
        {"both": 1.0}, {"arm": 1.0, "place": 1.0}]
BITS_POINTS = 4000              # to measure bits on
ALL_T = range(0, 1000, 10)


def train_and_score(held_out, method, prior, n, effort, **bps_options):
    """Returns the HeldOut.scores of a method that learned from n labelled points."""
    seed = held_out.seed
    points = toy2d.labelled_points(held_out.world, n, seed)
    eps = toy2d.train_method(method, prior, points, seed, effort, **bps_options)
    return held_out.scores(held_out.draw(eps))


def mean_floor(held_outs):
    """Returns the energy distance of fresh true points to true points, the mean over HeldOuts."""
    return sum(held_out.floor() for held_out in held_outs) / len(held_outs)


# ---- which paths, which weights ------------------------------------------------------------

def modes(world, prior, args):
    """Steers in each mode with 12 labelled points, five times: other points, other network."""
    held_outs = [toy2d.HeldOut(world, args.seed + i) for i in range(MODES_SEEDS)]
    floor = mean_floor(held_outs)
    scores = torch.zeros(len(MODES), MODES_SEEDS, len(SCORES))
    for i, (name, port_weights) in enumerate(tqdm(MODES.items(), desc="modes")):
        for j, held_out in enumerate(held_outs):
            row = train_and_score(held_out, toy2d.METHODS["steered"], prior, MODES_N, args.effort,
                                  port_weights=port_weights, time_blind=name == "time-blind")
            scores[i, j] = torch.tensor([row[key] for key in SCORES])
    mean, deviation = scores.mean(1), scores.std(1)                         # (modes, scores)
    difference = scores - scores[list(MODES).index(ALL)]    # each mode has the same points
    error = difference.std(1) / MODES_SEEDS**0.5
    rows = [dict(mode=name, floor=floor) for name in MODES]
    for (i, row), (k, key) in itertools.product(enumerate(rows), enumerate(SCORES)):
        row |= {key: mean[i, k].item(), f"{key} sd": deviation[i, k].item(),
                f"{key} - {ALL}'s": f"{difference.mean(1)[i, k]:+.3f} +- {error[i, k]:.3f}"}
    toy2d.save_table(rows, args.out / "modes.md")
    figure = Figure(2, [f"{key}, n = {MODES_N}, {MODES_SEEDS} seeds" for key in SCORES])
    for k, axes in enumerate(figure.axes):
        axes.bars(list(MODES), mean[:, k], deviation[:, k])
    figure.save(args.out / "modes.png")


# ---- how many labelled points, how many epochs ---------------------------------------------

def best_rate(method, world, prior, n, args):
    """Returns the Method with the rate of the least energy distance, on a seed of its own."""
    held_out = toy2d.HeldOut(world, args.seed + RATE_SEED)
    return min((replace(method, lr=lr) for lr in RATES),
               key=lambda each: train_and_score(held_out, each, prior, n, args.effort)["energy"])


def robustness(world, prior, args):
    """Trains each method anew on each number of points for each number of epochs, on three seeds.

    Everywhere each method has its own best learning rate.
    """
    held_outs = [toy2d.HeldOut(world, args.seed + i) for i in range(ROBUSTNESS_SEEDS)]
    floor = mean_floor(held_outs)
    rows = []
    for name, n, epochs in tqdm(list(itertools.product(RIVALS, SIZES, EPOCHS)), desc="robustness"):
        method = best_rate(replace(toy2d.METHODS[name], epochs=epochs), world, prior, n, args)
        runs = [train_and_score(held_out, method, prior, n, args.effort) for held_out in held_outs]
        row = dict(method=name, n=n, epochs=epochs, rate=f"{method.lr:g}")
        for key in SCORES:
            values = torch.tensor([scores_of_run[key] for scores_of_run in runs])
            row |= {key: values.mean().item(), f"{key} sd": values.std().item()}
        rows.append(row | dict(floor=floor))
    toy2d.save_table(rows, args.out / "robustness.md")
    panels = list(itertools.product(SCORES, RIVALS))
    figure = Figure(len(RIVALS), [f"{name}: {key} by epochs" for key, name in panels])
    for axes, (key, name) in zip(figure.axes, panels):
        for n in SIZES:
            line = [row for row in rows if (row["method"], row["n"]) == (name, n)]
            axes.line(EPOCHS, [row[key] for row in line], f"n = {n}", log_y=key == "energy",
                      band=[row[f"{key} sd"] for row in line])
    for first in range(0, len(panels), len(RIVALS)):
        figure.share_limits(range(first, first + len(RIVALS)))
    figure.save(args.out / "robustness.png")


# ---- which learning rate -------------------------------------------------------------------

def rates(world, prior, args):
    """Trains each method at each rate, and prints the energy distance for each seed and the mean.
    """
    held_outs = [toy2d.HeldOut(world, args.seed + i) for i in range(RATES_SEEDS)]
    floor = mean_floor(held_outs)
    rows = []
    for name, lr in tqdm(list(itertools.product(toy2d.METHODS, RATES)), desc="rates"):
        method = replace(toy2d.METHODS[name], lr=lr)
        energies = {f"seed {held_out.seed}": train_and_score(
            held_out, method, prior, toy2d.LABELLED, args.effort)["energy"]
            for held_out in held_outs}
        mean = sum(energies.values()) / RATES_SEEDS
        rows.append(dict(method=name, rate=f"{lr:g}", floor=floor, energy=mean)
                    | energies)
    toy2d.save_table(rows, args.out / "rates.md")


# ---- tempering and composing ---------------------------------------------------------------

def grid():
    """Returns a World whose two coordinates are independent: columns for arms, rows for places."""
    columns, rows = torch.cartesian_prod(*2 * [torch.arange(toy2d.ARMS)]).unbind(1)
    means = torch.stack([columns - 2.0, rows - 2.0], dim=1) * 0.8
    return toy2d.World(means, columns, rows / (toy2d.ARMS - 1))


class Laws:
    """Draws from p(z_0) prod_i p(c_i | z_0)^s_i, for each condition of a HeldOut.

    By importance: points of the large space are drawn again with the other factors as weights.
    """

    def __init__(self, held_out):
        self.held_out = held_out
        world = held_out.world
        self.z_0, _ = world.draw(50_000, torch.Generator().manual_seed(40_000 + held_out.seed))
        clean = self.z_0, *toy2d.CLEAN
        log_p = world.log_p(*clean)
        self.log_p_cond = {kind: torch.stack([world.log_p(*clean, row) - log_p
                                              for row in world.log_p_cond(held_out.cond, kind)])
                           for kind in toy2d.KINDS}                             # (N, 50,000) each

    def draw(self, law, seed=0):
        """Returns points (N, m, 2), as many as HeldOut.true has; law: {kind: s}."""
        log_weights = sum(s * self.log_p_cond[kind] for kind, s in law.items())
        generator = torch.Generator().manual_seed(50_000 + 100 * seed + self.held_out.seed)
        return self.z_0[torch.multinomial(log_weights.softmax(1), self.held_out.true.shape[1],
                                          replacement=True, generator=generator)]


def exact_denoisers(held_out):
    """Returns eps* and {kind: eps_bar*} of the held-out conditions, functions of (z_t, t)."""
    world = held_out.world
    return world.denoiser(), {
        kind: world.denoiser(world.log_p_cond(held_out.cond, kind)[held_out.rows])
        for kind in toy2d.KINDS}


def learned_denoisers(held_out, prior, args):
    """Returns the same as exact_denoisers does, from the prior network and a BPS for each kind."""
    cond = held_out.cond[held_out.rows]
    points = toy2d.labelled_points(held_out.world, toy2d.LABELLED, args.seed)
    networks = {kind: toy2d.train_method(toy2d.METHODS["steered"], prior, points, args.seed,
                                         args.effort, kind=kind) for kind in toy2d.KINDS}
    return prior, {kind: lambda z_t, t, eps=eps: eps(z_t, t, cond)
                   for kind, eps in networks.items()}


def draw_law(held_out, denoisers, law):
    """Returns points (N, SAMPLES, 2) drawn with bps.posterior of denoisers; law: {kind: s}."""
    prior, posteriors = denoisers
    return held_out.draw(lambda z_t, t, _: posterior(
        prior(z_t, t), [posteriors[kind](z_t, t) for kind in law], list(law.values())))


def gaussian_eps(variances):
    """Returns denoise(z_t, t) of independent normal coordinates with these variances."""
    variances = torch.tensor(variances)

    def denoise(z_t, t):
        """Returns eps of points z_t (B, coordinates)."""
        alpha, sigma = toy2d.signal_and_noise(t, z_t)
        return sigma * z_t / (alpha**2 * variances + sigma**2)

    return denoise


def gaussian_rows():
    """Returns rows of the variance of the first of two standard normal coordinates, given readings.

    A reading is the coordinate plus noise of variance tau^2. wanted: that of p(z_0) prod p(c_i |
    z_0)^s_i. closed form: what the probability flow of sum_i s_i M_i ends with, (v^s for a single
    reading, derived here). drawn: what diffusion.sample draws.
    """
    tau_squared = GAUSSIAN_READING**2
    v = tau_squared / (1 + tau_squared)                # a coordinate's variance, given one reading
    first, second = gaussian_eps((v, 1.0)), gaussian_eps((1.0, v))
    cases = [(f"one reading, s = {s:g}", [first], [s], tau_squared / (tau_squared + s), v**s)
             for s in STRENGTHS]
    cases += [("two readings of it", [first, first], [1, 1], tau_squared / (tau_squared + 2), v**2),
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


def algebra(world, prior, args):
    """Draws tempered and composed posteriors, and compares them with the laws they stand for."""
    gaussian = gaussian_rows()
    toy2d.save_table(gaussian, args.out / "gaussian.md")
    pinwheel, other = toy2d.HeldOut(world, args.seed), toy2d.HeldOut(grid(), args.seed)
    pinwheel_laws = Laws(pinwheel)
    sources = {"exact": (pinwheel_laws, exact_denoisers(pinwheel)),
               "learned": (pinwheel_laws, learned_denoisers(pinwheel, prior, args)),
               "exact, grid": (Laws(other), exact_denoisers(other))}
    rows, points = [], {}                   # points keeps those of the last law, the composition
    for law in tqdm(LAWS, desc="algebra"):
        name = " ".join(f"{kind}^{s:g}" for kind, s in law.items())
        for source, (laws, denoisers) in sources.items():
            true = laws.draw(law)
            points[source] = draw_law(laws.held_out, denoisers, law)
            floor = toy2d.energy_distance(laws.draw(law, seed=1)[:, :toy2d.SAMPLES], true)
            rows.append(dict(law=name, denoisers=source, floor=floor.mean().item(),
                             energy=toy2d.energy_distance(points[source], true).mean().item()))
    toy2d.save_table(rows, args.out / "algebra.md")
    draw_algebra(world, rows, gaussian, dict(true=pinwheel_laws.draw(LAWS[-1])) | points, args)


def draw_algebra(world, rows, gaussian, composition, args):
    """Draws distances by strength, and {source: points} of two conditions that are composed."""
    figure = Figure(3, [*(f"p(z) p({kind} | z)^s: energy distance by s" for kind in LAWS[-1]),
                        "a Gaussian's variance by s", "arm and place: true",
                        "composed, exact denoisers", "composed, learned denoisers"])
    energy = {(row["law"], row["denoisers"]): row["energy"] for row in rows}
    for axes, kind in zip(figure.axes, LAWS[-1]):
        for source in ("exact", "learned", "exact, grid"):
            axes.line(STRENGTHS, [energy[f"{kind}^{s:g}", source] for s in STRENGTHS], source,
                      log_y=True)
    for key in ("wanted", "drawn"):
        figure.axes[2].line(STRENGTHS, [row[key] for row in gaussian[:len(STRENGTHS)]], key)
    large, _ = world.draw(5000, torch.Generator().manual_seed(args.seed))
    for axes, source in zip(figure.axes[3:], ("true", "exact", "learned")):
        axes.dots(dict(light=large) | dict(enumerate(
            composition[source][:toy2d.ARMS, :toy2d.SAMPLES])))
    figure.save(args.out / "algebra.png")


# ---- bits ----------------------------------------------------------------------------------

def exact_bits(world, z_0, cond, kind):
    """Returns log2 p(c | z_0) / p(c) (n,), whose mean is the mutual information I(c; z_0)."""
    log_p_cond = world.log_p_cond(cond, kind)                                   # (n, K)
    given_z_0 = world.log_p(z_0, *toy2d.CLEAN, log_p_cond) - world.log_p(z_0, *toy2d.CLEAN)
    return (given_z_0 - log_p_cond.logsumexp(1) + math.log(len(world.means))) / math.log(2)


@torch.no_grad()
def denoisers_bits(timesteps, z_0, eps, eps_bar, seed):
    """Returns condition_bits (n,) from the errors of eps(z_t, t), the prior, and of eps_bar."""
    generator = torch.Generator().manual_seed(seed)
    gains = []
    for t in timesteps:
        t = torch.full((len(z_0),), t)
        noise = torch.randn(z_0.shape, generator=generator)
        z_t = toy2d.SCHEDULE.add_noise(z_0, noise, t)
        gains.append(sum(sign * (denoise(z_t, t) - noise).square().sum(1)
                         for sign, denoise in ((1, eps), (-1, eps_bar))))
    return condition_bits(torch.stack(gains, dim=1), log_snr(toy2d.SCHEDULE, timesteps))


def bits(world, prior, args):
    """Compares the bits of each kind of condition: exact, and from exact and learned denoisers."""
    rows = []
    z_0, cond = world.draw_labelled(BITS_POINTS, torch.Generator().manual_seed(args.seed))
    points = toy2d.labelled_points(world, toy2d.LABELLED, args.seed)
    for kind in tqdm(toy2d.KINDS, desc="bits"):
        exact = world.denoiser(world.log_p_cond(cond, kind))
        learned = toy2d.train_method(toy2d.METHODS["steered"], prior, points, args.seed,
                                     args.effort, kind=kind)
        estimates = {"exact": exact_bits(world, z_0, cond, kind)}
        for name, timesteps, *denoisers in (
                ("exact denoisers", ALL_T, world.denoiser(), exact),
                ("exact denoisers, 8 t", VALIDATION_T, world.denoiser(), exact),
                ("learned denoisers", ALL_T, prior, lambda z_t, t: learned(z_t, t, cond))):
            estimates[name] = denoisers_bits(timesteps, z_0, *denoisers, args.seed)
        rows.append(dict(condition=kind) | {
            name: "{:.2f} +- {:.2f}".format(*mean_and_error(values))
            for name, values in estimates.items()})
    toy2d.save_table(rows, args.out / "bits.md")


def main():
    """Runs a study."""
    studies = dict(modes=modes, robustness=robustness, algebra=algebra, bits=bits, rates=rates)
    parser = Parser(__doc__)
    parser.add_argument("study", choices=studies)
    args = toy2d.parse_args(parser)
    toy2d.run_study(studies[args.study], args)


if __name__ == "__main__":
    run_script(main)
