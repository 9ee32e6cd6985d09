"""The toy's studies: paths and weights, robustness, the algebra of posteriors, learning rates.

    python toy2d.py --study modes       which paths to steer, with which weights (paper's Fig. 3)
    python toy2d.py --study robustness  how many labelled points, how many epochs (paper's Fig. 4)
    python toy2d.py --study algebra     tempering and composing, against the exact laws
    python toy2d.py --study rates       which learning rate suits which method

Shapes as in toy2d.py: N conditions, K components.
"""
import itertools

import torch
from tqdm import tqdm

import toy2d
from bps import posterior
from measure.plots import Figure

# port weights: three on CP, one on TP, three on EP, one at the output. A port's weight acts as a
# learning rate too, so flat and foot-heavy (the mirror) have head-heavy's sum of squares.
MODES = {"CP": (16, 8, 4, 0, 0, 0, 0, 0), "TP": (0, 0, 0, 16, 0, 0, 0, 0),
         "EP": (0, 0, 0, 0, 1, 1, 1, 0), "CP+TP": (16, 8, 4, 16, 0, 0, 0, 0),
         "CP+EP": (16, 8, 4, 0, 1, 1, 1, 0), "TP+EP": (0, 0, 0, 16, 1, 1, 1, 0),
         "CP+TP+EP": toy2d.HEAD_HEAVY, "flat": (9.2,) * 7 + (0,),
         "foot-heavy": (1, 1, 1, 16, 4, 8, 16, 0), "time-blind": toy2d.HEAD_HEAVY,
         "at output": (0, 0, 0, 0, 0, 0, 0, 16)}
ALL, MODES_N, MODES_SEEDS = "CP+TP+EP", 12, 5
COMPARED = ("steered", "scratch, short", "tuned")
SIZES, EPOCHS = (12, 25, 50, 100, 200, 500), (40, 160, 640, 2500)      # of robustness
RATES, RATES_SEEDS = (3e-5, 1e-4, 3e-4, 1e-3), 3
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)                                   # of tempering
LAWS = [*({"arm": s} for s in STRENGTHS), *({"place": s} for s in STRENGTHS),
        {"both": 1.0}, {"arm": 1.0, "place": 1.0}]


# ---- which paths, which weights ------------------------------------------------------------

def modes(world, prior, args):
    """Steers in each mode with 12 labelled points, five times: other points, other network."""
    keys, seeds = ("accuracy", "energy"), range(args.seed, args.seed + MODES_SEEDS)
    marks = torch.zeros(len(MODES), len(seeds), len(keys))
    exams = [toy2d.Exam(world, seed) for seed in seeds]
    jobs = [(i, j) for i in range(len(MODES)) for j in range(len(seeds))]
    for i, j in tqdm(jobs, desc="modes"):
        name, seed, exam = list(MODES)[i], seeds[j], exams[j]
        eps = toy2d.train_method("steered", prior, world, MODES_N, seed, effort=args.effort,
                                 weights=MODES[name], time_blind=name == "time-blind")
        measured = exam.marks(exam.draw(eps))
        marks[i, j] = torch.tensor([measured[key] for key in keys])
    mean, deviation = marks.mean(1), marks.std(1)                               # (modes, keys)
    apart = marks - marks[list(MODES).index(ALL)]           # the same seed: same points and exam
    error = apart.std(1) / len(seeds) ** 0.5
    rows = []
    for i, name in enumerate(MODES):
        rows.append(dict(mode=name))
        for k, key in enumerate(keys):
            rows[i] |= {key: mean[i, k].item(), f"{key} sd": deviation[i, k].item(),
                        f"{key} - {ALL}'s": f"{apart.mean(1)[i, k]:+.3f} +- {error[i, k]:.3f}"}
    toy2d.table(rows, args.out / "modes.md")
    figure = Figure(1, len(keys))
    for k, (axes, key) in enumerate(zip(figure.axes, keys)):
        axes.title = f"{key}, n = {MODES_N}, {MODES_SEEDS} seeds"
        axes.bars(list(MODES), mean[:, k], deviation[:, k])
    figure.save(args.out / "modes.png")


# ---- how many labelled points, how many epochs ---------------------------------------------

def robustness(world, prior, args):
    """Trains each method on each number of points for each number of epochs, from the start."""
    rows, exam = [], toy2d.Exam(world, args.seed)
    jobs = [(method, n, epochs) for method in COMPARED for n in SIZES for epochs in EPOCHS]
    for method, n, epochs in tqdm(jobs, desc="robustness"):
        eps = toy2d.train_method(method, prior, world, n, args.seed, epochs=epochs,
                                 effort=args.effort)
        rows.append(dict(method=method, n=n, epochs=epochs) | exam.marks(exam.draw(eps)))
    toy2d.table(rows, args.out / "robustness.md")
    figure = Figure(2, len(COMPARED))
    panels = [(key, method) for key in ("accuracy", "energy") for method in COMPARED]
    for axes, (key, method) in zip(figure.axes, panels):
        axes.title = f"{method}: {key} by epochs"
        for n in SIZES:
            values = [row[key] for row in rows if (row["method"], row["n"]) == (method, n)]
            axes.line(EPOCHS, values, f"n = {n}", log_y=key == "energy")
    figure.save(args.out / "robustness.png")


# ---- which learning rate -------------------------------------------------------------------

def rates(world, prior, args):
    """Trains each method at each rate: energy distances, the mean over three seeds and each."""
    rows, seeds = [], range(args.seed, args.seed + RATES_SEEDS)
    exams = [toy2d.Exam(world, seed) for seed in seeds]
    for name, lr in tqdm(list(itertools.product(toy2d.METHODS, RATES)), desc="rates"):
        energies = []
        for seed, exam in zip(seeds, exams):
            eps = toy2d.train_method(name, prior, world, args.n, seed, lr=lr, effort=args.effort)
            energies.append(exam.marks(exam.draw(eps))["energy"])
        rows.append(dict(method=name, rate=f"{lr:g}", energy=sum(energies) / len(seeds))
                    | {f"seed {seed}": energy for seed, energy in zip(seeds, energies)})
    toy2d.table(rows, args.out / "rates.md")


# ---- tempering and composing ---------------------------------------------------------------

def grid():
    """Returns a World whose two coordinates are independent: columns for arms, rows for places."""
    columns, rows = torch.cartesian_prod(*2 * [torch.arange(toy2d.ARMS)]).unbind(1)
    means = torch.stack([columns - 2.0, rows - 2.0], dim=1) * 0.8
    return toy2d.World(means, columns, rows / (toy2d.ARMS - 1))


class Laws:
    """Draws from p(z_0) prod_i p(c_i | z_0)^s_i, for each condition of an Exam.

    By importance: points of the large space, drawn again with these weights.
    """

    def __init__(self, exam):
        world, self.exam = exam.world, exam
        self.z_0, _ = world.draw(50_000, torch.Generator().manual_seed(40_000 + exam.seed))
        clean = self.z_0, *toy2d.CLEAN
        log_p = world.log_p(*clean)
        self.log_p_cond = {kind: torch.stack([world.log_p(*clean, log_says) - log_p for log_says
                                              in world.log_p_cond(exam.cond, kind)])
                           for kind in toy2d.KINDS}                             # (N, 50,000) each

    def draw(self, law, seed=0):
        """Returns points (N, m, 2), as many as exam.true has; law: {kind: s}."""
        log_weights = sum(s * self.log_p_cond[kind] for kind, s in law.items())
        generator = torch.Generator().manual_seed(50_000 + 100 * seed + self.exam.seed)
        return self.z_0[torch.multinomial(log_weights.softmax(1), self.exam.true.shape[1],
                                          replacement=True, generator=generator)]


def exact_denoisers(exam):
    """Returns eps* and {kind: eps_bar*} of exam's conditions, each a function of (z_t, t)."""
    return exam.world.denoiser(), {
        kind: exam.world.denoiser(exam.world.log_p_cond(exam.cond, kind)[exam.rows])
        for kind in toy2d.KINDS}


def learned_denoisers(exam, prior, args):
    """Returns what exact_denoisers does, of the prior network and of one BPS a kind."""
    def of_kind(kind):
        eps = toy2d.train_method("steered", prior, exam.world, args.n, args.seed,
                                 effort=args.effort, kind=kind)
        return lambda z_t, t: eps(z_t, t, exam.cond[exam.rows])

    return prior, {kind: of_kind(kind) for kind in toy2d.KINDS}


def draw_law(exam, denoisers, law):
    """Returns points (N, SAMPLES, 2) drawn with bps.posterior of these denoisers; law {kind: s}."""
    prior, posteriors = denoisers
    return exam.draw(lambda z_t, t, _: posterior(
        prior(z_t, t), [posteriors[kind](z_t, t) for kind in law], list(law.values())))


def algebra(world, prior, args):
    """Draws tempered and composed posteriors, and compares them with the laws they stand for."""
    pinwheel, other = toy2d.Exam(world, args.seed), toy2d.Exam(grid(), args.seed)
    laws, other_laws = Laws(pinwheel), Laws(other)
    sources = {"exact": (laws, exact_denoisers(pinwheel)),
               "learned": (laws, learned_denoisers(pinwheel, prior, args)),
               "exact, grid": (other_laws, exact_denoisers(other))}
    rows, composed = [], {}
    for law in tqdm(LAWS, desc="algebra"):
        name = " ".join(f"{kind}^{s:g}" for kind, s in law.items())
        for source, (laws, denoisers) in sources.items():
            true, drawn = laws.draw(law), draw_law(laws.exam, denoisers, law)
            floor = toy2d.energy_distance(laws.draw(law, seed=1)[:, :toy2d.SAMPLES], true)
            rows.append(dict(law=name, denoisers=source, floor=floor.mean().item(),
                             energy=toy2d.energy_distance(drawn, true).mean().item()))
            if len(law) == 2:
                composed[source] = drawn
                composed.setdefault("true", true)               # the first source is the pinwheel
    toy2d.table(rows, args.out / "algebra.md")
    draw_algebra(world, rows, composed, args)


def draw_algebra(world, rows, composed, args):
    """Draws distances by strength, and the points composed of two conditions: {source: points}."""
    figure = Figure(1, 5)
    values = {(row["law"], row["denoisers"]): row["energy"] for row in rows}
    for axes, kind in zip(figure.axes, ("arm", "place")):
        axes.title = f"p(z) p({kind} | z)^s: energy distance by s"
        for source in dict.fromkeys(row["denoisers"] for row in rows):
            axes.line(STRENGTHS, [values[f"{kind}^{s:g}", source] for s in STRENGTHS], source,
                      log_y=True)
    large, _ = world.draw(5000, torch.Generator().manual_seed(args.seed))
    for axes, (source, title) in zip(figure.axes[2:], dict(
            true="arm and place: true", exact="composed, exact denoisers",
            learned="composed, learned denoisers").items()):
        axes.title = title
        axes.dots(large, "light")
        for i in range(toy2d.ARMS):
            axes.dots(composed[source][i, :toy2d.SAMPLES], i)
    figure.save(args.out / "algebra.png")
