"""Bayesian Power Steering in the plane, where the exact posterior is known.

    python toy2d.py                     one figure and one table in runs/toy2d, about 3 minutes
    python -m studies.toy prior         studies: prior, modes, robustness, bits, algebra

The large probability space (arXiv 2406.03683, Fig. 1) is a pinwheel of K Gaussians. A condition
names an arm and measures, with some error, a point's place on it. The points that fit a condition
are its small space. Prior, posterior and steering have closed forms, which follow from the mixture
and Bayes' rule. The networks are unet.py and bps.py with vectors in place of maps.

A label is a point with its condition. Three methods learn the posterior from 100 labels and are
compared with the exact one (docs/method.md):

    scratch     train a new network on the labels
    labels      train BPS on the frozen prior and the labels, as the paper does
    draws       fit a likelihood p(c | z_0) to the labels, let the prior draw points, give each a
                condition from that likelihood, and train BPS on the frozen prior and these points

Shapes: B points of 2 coordinates, K components, N conditions of 6 numbers (5 arms and a place).
"""
import argparse
import itertools
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

import diffusion

ARMS, BEADS = 5, 12                     # arms of the pinwheel, components on each
PLACE_ERROR = 0.2                       # standard error of a measured place; places are 0 to 1
WIDTHS, TIME_DIM = (96, 64, 48), 32
HEAD_HEAVY = (16, 8, 4, 16, 1, 1, 1)    # port weights: 3 contracting, 1 middle, 3 expansive
PRIOR_SAMPLES = 500_000                 # as in the paper's Fig. 2
PRIOR_STEPS, PRIOR_BATCH, PRIOR_LR = 2500, 1000, 2e-3
LABELS, DRAWS = 100, 4000               # labels to learn from; points that the prior draws
BATCH, PASSES = 400, 4                  # points per step; one occurs at most PASSES times in it
# (steps, rate), tuned on seed 7: energy and bits are within 16 % of the best tried
METHODS = dict(scratch=(160, 3e-3), labels=(625, 3e-4), draws=(2500, 1e-3))
KERNEL_WIDTHS = torch.logspace(-1.5, 0.2, 12).tolist()      # of the likelihood, in the plane
DOUBTS = (0.003, 0.01, 0.03, 0.1, 0.2)  # of the likelihood about the arm of a label
STEPS = 100                             # DDIM steps
CONDITIONS, SAMPLES = 25, 200           # held-out conditions, points of each
SCHEDULE = diffusion.NoiseSchedule()    # Stable Diffusion's
# Timesteps to integrate bits over, denser at low noise, where log snr changes fastest
BITS_T = (999 * torch.linspace(0, 1, 101) ** 2).round().long().unique()
TITLES = dict(true="true points", prior="prior, no condition", exact="exact posterior",
              scratch=f"from scratch, {LABELS} labels", labels=f"BPS on {LABELS} labels",
              draws="BPS on the prior's draws")
COLORS = ("#d5d8dd", "#d1495b", "#e28413", "#2a9d5c", "#2f6fb5", "#7b4fa3")     # grey: large space
SIDE = 900                              # pixels of a panel, before the figure shrinks to a third


# ---- the world: every quantity in closed form ----------------------------------------------

@dataclass(frozen=True)
class World:
    """A mixture of K round Gaussians N(mu_k, std^2 I) of equal weight, and conditions.

    means: mu (K, 2). arms: (K,) integers. places: (K,) in [0, 1]. A condition depends on the
    component alone, so a small space is the same mixture with other weights: log_p_cond, which is
    log p(c | k), (K,) for one condition or (B, K) for one per point. Without log_p_cond a method
    describes the large space. alpha and sigma are (B, 1) or (1, 1).
    """
    means: torch.Tensor
    arms: torch.Tensor
    places: torch.Tensor
    std: float = 0.09

    def sample(self, n, generator, log_p_cond=None):
        """Clean points z_0 (n, 2) from p(z_0 | c)."""
        p = torch.ones(len(self.means)) if log_p_cond is None else log_p_cond.exp()
        k = p.multinomial(n, replacement=True, generator=generator)
        return self.means[k] + self.std * torch.randn(n, 2, generator=generator)

    def sample_labels(self, n, generator):
        """Labels from the arms in turn: z_0 (n, 2) and cond (n, 6)."""
        on_arm = self.arms == torch.arange(n)[:, None] % ARMS                   # (n, K)
        k = on_arm.float().multinomial(1, generator=generator).squeeze(1)
        z_0 = self.means[k] + self.std * torch.randn(n, 2, generator=generator)
        measured = self.places[k] + PLACE_ERROR * torch.randn(n, generator=generator)
        return z_0, condition(self.arms[k], measured)

    def log_p_cond(self, cond):
        """log p(c | k) (N, K), up to a constant, of conditions (N, 6)."""
        log_arm = cond[:, self.arms].log()                  # 0 on the condition's arm, else -inf
        return log_arm - (cond[:, ARMS:] - self.places) ** 2 / (2 * PLACE_ERROR**2)

    def variance(self, alpha, sigma):
        """Variance of a component of z_t."""
        return alpha**2 * self.std**2 + sigma**2

    def log_components(self, z_t, alpha, sigma, log_p_cond=0.0):
        """log [p(c | k) N(z_t; alpha mu_k, variance I) / K] (B, K)."""
        variance = self.variance(alpha, sigma)
        square = (z_t[:, None] - alpha[..., None] * self.means).square().sum(-1)
        return (log_p_cond - square / (2 * variance) - math.log(2 * math.pi * len(self.means))
                - variance.log())

    def log_p(self, z_t, alpha, sigma, log_p_cond=0.0):
        """log p_t(z_t) (B,), or with log_p_cond log p_t(z_t, c)."""
        return self.log_components(z_t, alpha, sigma, log_p_cond).logsumexp(1)

    def eps(self, z_t, alpha, sigma, log_p_cond=0.0):
        """eps* = E[noise | z_t] (B, 2), or with log_p_cond eps_bar* = E[noise | z_t, c].

        One component has E[noise | z_t, k] = sigma (z_t - alpha mu_k) / variance. The components'
        weights are p(k | z_t, c).
        """
        p_k = self.log_components(z_t, alpha, sigma, log_p_cond).softmax(1)
        return sigma * (z_t - alpha * (p_k @ self.means)) / self.variance(alpha, sigma)

    def eps_bar(self, z_t, t, cond):
        """eps_bar* (B, 2) for timesteps t (B,) and conditions (B, 6)."""
        return self.eps(z_t, *SCHEDULE.alpha_sigma(t, z_t), self.log_p_cond(cond))

    def steering(self, z_t, alpha, sigma, log_p_cond):
        """M = eps_bar* - eps* (B, 2), computed as the covariance Cov(noise, w | z_t).

        w_k = p(c | k) / p_t(c | z_t), so p(k | z_t) w_k = p(k | z_t, c).
        """
        p_k = self.log_components(z_t, alpha, sigma).softmax(1)
        # not p_k * w, because w overflows far from the arm
        p_k_cond = self.log_components(z_t, alpha, sigma, log_p_cond).softmax(1)
        eps_k = sigma[..., None] * (z_t[:, None] - alpha[..., None] * self.means)   # (B, K, 2)
        eps_k = eps_k / self.variance(alpha, sigma)[..., None]
        return ((p_k_cond - p_k)[..., None] * eps_k).sum(1)        # E[noise w] - E[noise] E[w]


def condition(arms, places):
    """Conditions (n, 6) from arms (n,) and measured places (n,)."""
    return torch.cat([F.one_hot(arms, ARMS).to(places), places[:, None]], dim=1)


def pinwheel():
    """The World whose arms turn as they go out from radius 0.5 to 2."""
    arms = torch.arange(ARMS).repeat_interleave(BEADS)
    places = torch.linspace(0, 1, BEADS).repeat(ARMS)
    radius = 0.5 + 1.5 * places
    angle = 2 * math.pi * arms / ARMS + 0.9 * radius
    means = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return World(means, arms, places)


# ---- the networks: unet.py and bps.py with vectors in place of maps ------------------------

class Block(nn.Module):
    """A residual block of two linear layers, shifted by the timestep in between."""

    def __init__(self, width_in, width):
        super().__init__()
        self.in_layer = nn.Linear(width_in, width)
        self.emb_layer = nn.Linear(2 * TIME_DIM, width)
        self.out_layer = nn.Linear(width, width)
        self.skip = nn.Identity() if width_in == width else nn.Linear(width_in, width)

    def forward(self, h, t_emb):
        """(B, width) for h (B, width_in) and t_emb (B, 2 TIME_DIM)."""
        shifted = self.in_layer(F.silu(h)) + self.emb_layer(t_emb)
        return self.skip(h) + self.out_layer(F.silu(shifted))


class UShape(nn.Module):
    """Seven blocks; the three of the expansive path also read those of the contracting path."""

    def __init__(self, width_in):
        super().__init__()
        outer, middle, inner = WIDTHS
        self.stem = nn.Linear(width_in, outer)
        contracting = Block(outer, outer), Block(outer, middle), Block(middle, inner)
        transition = Block(inner, inner)
        expansive = (Block(inner + inner, inner), Block(inner + middle, middle),
                     Block(middle + outer, outer))
        self.blocks = nn.ModuleList([*contracting, transition, *expansive])

    def outputs(self, x, t_emb, residuals=(0.0,) * 7):
        """Outputs (B, width) of the blocks, each with its residual added."""
        h, outputs = self.stem(x), []
        for i, (block, residual) in enumerate(zip(self.blocks, residuals)):
            if i > 3:                                               # the expansive path
                h = torch.cat([h, outputs[6 - i]], dim=1)
            h = block(h, t_emb) + residual
            outputs.append(h)
        return outputs


class ToyUNet(UShape):
    """The prior network: predicts eps, and adds a residual after each of its 7 blocks."""

    def __init__(self):
        super().__init__(2)
        self.time_embed = nn.Sequential(nn.Linear(TIME_DIM, 2 * TIME_DIM), nn.SiLU(),
                                        nn.Linear(2 * TIME_DIM, 2 * TIME_DIM), nn.SiLU())
        self.out = nn.Linear(WIDTHS[0], 2)

    def time_embedding(self, t):
        """Embedding (B, 2 TIME_DIM) of t (B,), for all blocks and for BPS."""
        frequencies = 1e4 ** -torch.linspace(0, 1, TIME_DIM // 2 + 1)[:-1]
        angles = t[:, None] * frequencies
        return self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))

    def forward(self, z_t, t, residuals=(0.0,) * 7):
        """eps (B, 2) for z_t (B, 2) and t (B,)."""
        return self.out(F.silu(self.outputs(z_t, self.time_embedding(t), residuals)[-1]))


class ToyBPS(UShape):
    """The steering network: residuals from condition and time, through ports that start at zero."""

    def __init__(self, port_weights=HEAD_HEAVY):
        super().__init__(ARMS + 1)
        self.port_weights = port_weights
        self.ports = nn.ModuleList(nn.Linear(width, width)
                                   for width in (*WIDTHS, WIDTHS[-1], *WIDTHS[::-1]))
        for parameter in self.ports.parameters():
            nn.init.zeros_(parameter)

    def forward(self, cond, t_emb):
        """Seven residuals (B, width) for cond (B, 6) and t_emb (B, 2 TIME_DIM)."""
        outputs = self.outputs(cond, t_emb)
        return [weight * port(h)
                for weight, port, h in zip(self.port_weights, self.ports, outputs)]


def steer(unet, bps):
    """eps(z_t, t, cond): the U-Net with BPS's residuals, which do not depend on z_t."""
    return lambda z_t, t, cond: unet(z_t, t, bps(cond, unet.time_embedding(t)))


# ---- training and sampling -----------------------------------------------------------------

def train(eps, parameters, points, steps, lr, batch, seed):
    """Train parameters in place, so that eps(z_t, t, cond) predicts the noise: MSE, t uniform.

    Each step takes the next `batch` of points (z_0, cond). The rate falls linearly to zero.
    """
    z_0, cond = points
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, fused=True)
    for step in tqdm(range(steps), desc=f"{len(z_0)} points", leave=False):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        i = torch.arange(step * batch, (step + 1) * batch) % len(z_0)
        t = torch.randint(SCHEDULE.timesteps, (batch,), generator=generator)
        noise = torch.randn(batch, 2, generator=generator)
        z_t = SCHEDULE.add_noise(z_0[i], noise, t)
        loss = F.mse_loss(eps(z_t, t, cond[i]), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_prior(world, seed, effort=1.0):
    """The frozen prior network, after a share `effort` of its training on the large space."""
    torch.manual_seed(seed)
    unet = ToyUNet()
    z_0 = world.sample(PRIOR_SAMPLES, torch.Generator().manual_seed(seed))
    no_cond = torch.zeros(len(z_0), 0)
    steps = math.ceil(PRIOR_STEPS * effort)
    train(lambda z_t, t, _: unet(z_t, t), unet.parameters(), (z_0, no_cond), steps, PRIOR_LR,
          PRIOR_BATCH, seed)
    return unet.requires_grad_(False)


def fit(points, steps, lr, seed, prior=None, make_bps=ToyBPS):
    """eps(z_t, t, cond) of a steered network that is trained on points (z_0, cond).

    prior: the network to steer, trained too unless it is frozen. None is a new one.
    """
    torch.manual_seed(seed)
    new, bps = ToyUNet(), make_bps()        # both always, so that BPS starts alike with a prior
    unet = prior or new
    parameters = [p for p in (*unet.parameters(), *bps.parameters()) if p.requires_grad]
    batch = min(BATCH, PASSES * len(points[0]))
    train(steer(unet, bps), parameters, points, steps, lr, batch, seed)
    return steer(unet, bps)


@torch.no_grad()
def draw(denoise, n, seed):
    """Points (n, 2) that diffusion.sample draws by DDIM with denoise(z_t, t (1,))."""
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    *_, z = diffusion.sample(lambda z_t, t: denoise(z_t, torch.tensor([t])), noise, SCHEDULE, STEPS)
    return z


# ---- the methods ---------------------------------------------------------------------------

def sample_labels(world, n, seed):
    """The n labels of a seed: z_0 (n, 2) and cond (n, 6)."""
    return world.sample_labels(n, torch.Generator().manual_seed(30_000 + seed))


def fit_likelihood(z_0, cond):
    """Fit p(c | z) to labels z_0 (n, 2), cond (n, 6).

    A kernel estimate: arm probabilities and mean place at z are averages over the labels near z,
    and the measured place is normal. Kernel widths and doubt predict each label best from all
    others.
    """
    arms, places = cond[:, :ARMS], cond[:, ARMS]
    squares_to_rest = torch.cdist(z_0, z_0).square().fill_diagonal_(math.inf)

    def label_weights(square, width):
        """Weights of the labels at points, from squared distances (m, n); each row sums to 1."""
        return (-square / (2 * width**2)).softmax(1)                            # (m, n)

    def arm_probabilities(near, doubt):
        """Probabilities (m, ARMS) if a label's arm is random with probability `doubt`."""
        return (1 - doubt) * near @ arms + doubt / ARMS

    near = {width: label_weights(squares_to_rest, width) for width in KERNEL_WIDTHS}
    arm_width, doubt = max(itertools.product(KERNEL_WIDTHS, DOUBTS), key=lambda pair: (
        arm_probabilities(near[pair[0]], pair[1]) * arms).sum(1).log().sum())
    errors = {width: (near[width] @ places - places).square().mean() for width in KERNEL_WIDTHS}
    place_width = min(errors, key=errors.get)
    error = errors[place_width].sqrt()

    def fitted(z):
        """Arm probabilities, mean place and its standard error at z (m, 2)."""
        square = torch.cdist(z, z_0).square()
        return (arm_probabilities(label_weights(square, arm_width), doubt),
                label_weights(square, place_width) @ places, error)

    return fitted


def draw_and_label(prior, labels, seed):
    """DRAWS points (n, 2) from the prior, with conditions (n, 6) from the labels' likelihood."""
    z_0 = draw(prior, DRAWS, 40_000 + seed)
    generator = torch.Generator().manual_seed(40_000 + seed)
    arm_p, place, error = fit_likelihood(*labels)(z_0)
    arm = arm_p.multinomial(1, generator=generator).squeeze(1)
    return z_0, condition(arm, place + error * torch.randn(len(z_0), generator=generator))


def learn(method, prior, labels, steps, lr, seed):
    """eps(z_t, t, cond) that a method of METHODS learns from labels (z_0, cond)."""
    points = draw_and_label(prior, labels, seed) if method == "draws" else labels
    return fit(points, steps, lr, seed, prior=None if method == "scratch" else prior)


# ---- measurements --------------------------------------------------------------------------

def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of points (.., n, 2), (.., m, 2), unbiased.

    It is zero for the same law, and by chance may come out below zero. Source: Szekely and Rizzo,
    Energy statistics, 2013.
    """
    x, y = x.double(), y.double()
    n, m = x.shape[-2], y.shape[-2]
    between, within_x, within_y = (torch.cdist(a, b).sum((-2, -1))
                                   for a, b in ((x, y), (x, x), (y, y)))
    return 2 * between / (n * m) - within_x / (n * (n - 1)) - within_y / (m * (m - 1))


class HeldOut:
    """Conditions that no method was trained on, and true points that fit them.

    cond (N, 6), log_p_cond (N, K). reference (N, 5 SAMPLES, 2): true points to compare with.
    independent (N, SAMPLES, 2): others, for the row `true` and for bits. rows (N SAMPLES,): the
    number of the condition of each point that `draw` draws.
    """

    def __init__(self, world, seed):
        generator = torch.Generator().manual_seed(10_000 + seed)
        self.world, self.seed = world, seed
        _, self.cond = world.sample_labels(CONDITIONS, generator)
        self.log_p_cond = world.log_p_cond(self.cond)
        self.reference, self.independent = (
            torch.stack([world.sample(n, generator, row) for row in self.log_p_cond])
            for n in (5 * SAMPLES, SAMPLES))
        self.rows = torch.arange(CONDITIONS).repeat_interleave(SAMPLES)

    def draw(self, eps):
        """Points (N, SAMPLES, 2) that eps(z_t, t, cond) draws."""
        cond = self.cond[self.rows]
        points = draw(lambda z_t, t: eps(z_t, t, cond), len(cond), self.seed)
        return points.view(CONDITIONS, SAMPLES, 2)

    def scores(self, points):
        """How close points (N, SAMPLES, 2) come to true ones, on average over the conditions.

        accuracy: share with the nearest component on the condition's arm. energy: energy distance.
        spread: standard deviation relative to the true one.
        """
        nearest = torch.cdist(points.view(-1, 2), self.world.means).argmin(1)
        hits = self.world.arms[nearest] == self.cond[self.rows, :ARMS].argmax(1)
        spread = points.var(1).sum(1) / self.reference.var(1).sum(1)                 # (N,)
        return dict(accuracy=hits.float().mean().item(),
                    energy=energy_distance(points, self.reference).mean().item(),
                    spread=spread.sqrt().mean().item())

    @torch.no_grad()
    def bits_lost(self, eps):
        """Bits (4,) that eps(z_t, t, cond) loses against eps_bar*, by quarter of t.

        1/2 integral of E|eps - eps_bar*|^2 d log snr over true points with noise. It bounds the
        divergence of what the reverse SDE would draw (arXiv 2101.09258).
        """
        generator = torch.Generator().manual_seed(20_000 + self.seed)
        z_0, cond = self.independent.view(-1, 2), self.cond[self.rows]
        errors = []
        for t in BITS_T:
            t = t.expand(len(z_0))
            z_t = SCHEDULE.add_noise(z_0, torch.randn(z_0.shape, generator=generator), t)
            error = eps(z_t, t, cond) - self.world.eps_bar(z_t, t, cond)
            errors.append(error.square().sum(1).mean())
        errors, log_snr = torch.stack(errors), SCHEDULE.alphas_cumprod[BITS_T].logit()
        nats = (errors[1:] + errors[:-1]) / 2 * (log_snr[:-1] - log_snr[1:]) / 2    # trapezoids
        return torch.zeros(4).index_add(0, BITS_T[:-1] // 250, nats.float() / math.log(2))


# ---- the comparison ------------------------------------------------------------------------

def markdown(rows):
    """Rows, which are dicts with the same keys, as a markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{round(value, 4) + 0.0:.4f}" if isinstance(value, float) else str(value)
               for value in row.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_figure(panels, file):
    """Write six panels {title: (points (n, 2), one for each of COLORS)} as a PNG, 3 in a row."""
    image = Image.new("RGB", (3 * SIDE, 2 * SIDE), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(42)
    for i, (title, clouds) in enumerate(panels.items()):
        left, top = i % 3 * SIDE, i // 3 * SIDE
        for color, points in zip(COLORS, clouds):
            for x, y in (points * SIDE / 5.6).tolist():
                pen.circle((left + 0.5 * SIDE + x, top + 0.56 * SIDE - y), 2.7, color)
        pen.text((left + SIDE / 2, top + 24), title, "black", font, "ma", align="center")
    image.reduce(3).quantize(128).save(file, optimize=True)


def compare(effort, seed, out):
    """Measure all methods on one seed; write a table and a figure."""
    world = pinwheel()
    prior = train_prior(world, seed, effort)
    labels = sample_labels(world, LABELS, seed)
    held_out = HeldOut(world, seed)
    denoisers = dict(true=world.eps_bar, prior=lambda z_t, t, _: prior(z_t, t),
                     exact=world.eps_bar)
    for method, (steps, lr) in METHODS.items():
        denoisers[method] = learn(method, prior, labels, math.ceil(steps * effort), lr, seed)

    rows, panels = [], {}
    large = world.sample(5000, torch.Generator().manual_seed(seed))
    for name, eps in denoisers.items():
        points = held_out.independent if name == "true" else held_out.draw(eps)
        scores, bits = held_out.scores(points), held_out.bits_lost(eps).tolist()
        quarters = {f"bits, t {250 * i}..{250 * i + 249}": bits[i] for i in range(4)}
        rows.append(dict(points=name) | scores | quarters | dict(bits=sum(bits)))
        energy = round(scores["energy"], 3) + 0.0           # never -0.000
        caption = f"energy distance {energy:.3f}, {sum(bits):.2f} bits lost"
        panels[f"{TITLES[name]}\n{caption}"] = large, *points[:ARMS]
    (out / "toy2d.md").write_text(markdown(rows), encoding="utf-8")
    draw_figure(panels, out / "toy2d.png")
    print(markdown(rows) + f"{out / 'toy2d.md'}\n{out / 'toy2d.png'}")


def main():
    """Check the options and compare the methods."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--effort", type=float, default=1.0, help="share of all training steps (default: 1)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--out", type=Path, default=Path("runs/toy2d"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    if not 0 < args.effort <= 1:
        parser.error(f"--effort must be in (0, 1], got {args.effort}.")
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed must be in [0, {2**31 - 1}], got {args.seed}.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder to write to, got {args.out} ({error.strerror}).")
    sys.stderr = sys.stderr or open(os.devnull, "w")        # it may be closed, and tqdm needs it
    compare(args.effort, args.seed, args.out)


if __name__ == "__main__":
    main()
