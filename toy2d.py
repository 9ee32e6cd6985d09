"""From a large to a small probability space in the plane, against the exact posterior denoiser.

    python toy2d.py                     prior, steered, rivals: two figures and a table
    python toy2d.py --study modes       or robustness, algebra, rates: see measure/toy.py

The large space is a pinwheel, a Gaussian mixture of K components; a condition c_add names an arm
and says, with some error, how far out on it the point lies. For a mixture everything that a
denoiser can only learn has a closed form (equations beside the code; derived from the mixture and
Bayes' rule, notation of arXiv 2406.03683). The networks are those of unet.py and bps.py with
vectors in place of maps; schedule, sampler and posterior algebra are the big model's own.

Shapes: B points, 2 coordinates, K components, N conditions of 6 numbers (5 arms and a place).
"""
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import diffusion
from inputs.options import Parser, run, seed_number
from measure.plots import Figure
from unet import timestep_embedding

ARMS, BEADS = 5, 12                     # arms of the pinwheel, components on each
PLACE_ERROR = 0.2                       # of a reading of the place, 0 to 1 along an arm
KINDS = dict(arm=slice(0, ARMS), place=slice(ARMS, ARMS + 1), both=slice(0, ARMS + 1))
WIDTHS, TIME_DIM = (96, 64, 48), 32
HEAD_HEAVY = (16, 8, 4, 16, 1, 1, 1, 0)     # three on CP, one on TP, three on EP; at the output
PRIOR_SAMPLES, PRIOR_EPOCHS, PRIOR_BATCH, PRIOR_LR = 500_000, 5, 1000, 2e-3
PASSES = 4                              # over the labelled points in a step: epochs / 4 steps
STEPS = 100                             # of DDIM
CONDITIONS, SAMPLES = 25, 200           # fresh conditions to measure on, samples of each
SCHEDULE = diffusion.NoiseSchedule()    # Stable Diffusion's
CLEAN = torch.ones(1, 1), torch.zeros(1, 1)     # a and s of points without noise


# ---- the world: every quantity in closed form ----------------------------------------------

@dataclass(frozen=True)
class World:
    """A mixture of K equal, round components N(mu_k, std^2 I), and what a condition says of them.

    means: mu (K, 2). arms: (K,) integers, the classes. places: (K,) in 0..1.
    log_says, below, is log p(c_add | k), what log_p_cond returns, (K,) or one row a point, (B, K):
    it speaks of components alone, so a small space is the same mixture with other weights.
    """
    means: torch.Tensor
    arms: torch.Tensor
    places: torch.Tensor
    std: float = 0.09

    def draw(self, n, generator, log_says=None):
        """Returns clean points z_0 (n, 2) and their components k (n,), of p(z_0 | c_add)."""
        weights = torch.ones(len(self.means)) if log_says is None else log_says.exp()
        k = torch.multinomial(weights, n, replacement=True, generator=generator)
        return self.scatter(k, generator), k

    def scatter(self, k, generator):
        """Returns a clean point of each of the components k (n,): z_0 (n, 2)."""
        return self.means[k] + self.std * torch.randn(len(k), 2, generator=generator)

    def label(self, k, generator):
        """Returns the conditions (N, 6) of components k: the arm, and a reading of the place."""
        reading = self.places[k] + PLACE_ERROR * torch.randn(len(k), generator=generator)
        return torch.cat([F.one_hot(self.arms[k], ARMS).to(reading), reading[:, None]], dim=1)

    def draw_labelled(self, n, generator):
        """Returns n labelled points, z_0 (n, 2) and cond (n, 6), of the arms in turn."""
        of_arm = self.arms == torch.arange(n)[:, None] % ARMS                   # (n, K)
        k = torch.multinomial(of_arm.float(), 1, generator=generator).squeeze(1)
        return self.scatter(k, generator), self.label(k, generator)

    def log_p_cond(self, cond, kind="both"):
        """Returns log p(c_add | k) (N, K), up to a constant, of the part of cond that counts."""
        arm = (cond[:, KINDS["arm"]] @ F.one_hot(self.arms, ARMS).to(cond).T).log()
        place = -(cond[:, KINDS["place"]] - self.places) ** 2 / (2 * PLACE_ERROR**2)
        return dict(arm=arm, place=place, both=arm + place)[kind]

    def log_components(self, z_t, a, s, log_says=0.0):
        """Returns log p(c_add | k) N(z_t; a mu_k, v I) / K (B, K), with v = a^2 std^2 + s^2."""
        v = a**2 * self.std**2 + s**2
        square = (z_t[:, None] - a[..., None] * self.means).square().sum(-1)
        return log_says - square / (2 * v) - math.log(2 * math.pi * len(self.means)) - v.log()

    def log_p(self, z_t, a, s, log_says=0.0):
        """Returns log p_t(z_t) (B,), or with log_says log p_t(z_t, c_add)."""
        return self.log_components(z_t, a, s, log_says).logsumexp(1)

    def eps(self, z_t, a, s, log_says=0.0):
        """Returns eps* = E[eps | z_t] (B, 2), or with log_says eps_bar* = E[eps | z_t, c_add].

        Of one component E[eps | z_t, k] = s (z_t - a mu_k) / v; they are averaged with
        p(k | z_t, c_add). a and s: (B, 1) or (1, 1) tensors.
        """
        p_k = self.log_components(z_t, a, s, log_says).softmax(1)
        return s * (z_t - a * (p_k @ self.means)) / (a**2 * self.std**2 + s**2)

    def w(self, z_t, a, s, log_says):
        """Returns w_k = p(c_add | k) / p_t(c_add | z_t) (B, K): its mean over p(k | z_t) is 1."""
        log_p_c = self.log_p(z_t, a, s, log_says) - self.log_p(z_t, a, s)
        return (log_says - log_p_c[:, None]).exp()

    def steering(self, z_t, a, s, log_says):
        """Returns M = eps_bar* - eps* = Cov(eps, w | z_t) (B, 2), as the covariance."""
        p_k = self.log_components(z_t, a, s).softmax(1)
        p_k_w = self.log_components(z_t, a, s, log_says).softmax(1)     # p_k w_k, without overflow
        eps_k = s[..., None] * (z_t[:, None] - a[..., None] * self.means)       # (B, K, 2)
        eps_k = eps_k / (a**2 * self.std**2 + s**2)[..., None]
        return ((p_k_w - p_k)[..., None] * eps_k).sum(1)                # E[eps w] - E[eps] E[w]

    def denoiser(self, log_says=0.0):
        """Returns the exact denoise(z_t, t) for the project's sampler."""
        return lambda z_t, t: self.eps(z_t, *signal_and_noise(t, z_t), log_says)

    def classify(self, z_0):
        """Returns the most probable arm (B,) of clean points: the Bayes classifier."""
        p_k = self.log_components(z_0, *CLEAN).softmax(1)
        return (p_k @ F.one_hot(self.arms, ARMS).to(p_k)).argmax(1)


def signal_and_noise(t, z_t):
    """Returns a and s, (1, 1) for a number t, (B, 1) for t (B,)."""
    return SCHEDULE.signal_and_noise(torch.as_tensor(t).view(-1), z_t)


def pinwheel():
    """Returns the World of this file: arms that turn as they go out, from radius 0.5 to 2."""
    arms = torch.arange(ARMS).repeat_interleave(BEADS)
    places = torch.linspace(0, 1, BEADS).repeat(ARMS)
    radius = 0.5 + 1.5 * places
    angle = 2 * math.pi * arms / ARMS + 0.9 * radius
    means = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return World(means, arms, places)


# ---- the networks: unet.py and bps.py with vectors in place of maps ------------------------

class Block(nn.Module):
    """A residual block of two linear layers with a shift by the timestep in between."""

    def __init__(self, width_in, width, t_emb_dim):
        super().__init__()
        self.in_layer = nn.Linear(width_in, width)
        self.emb_layer = nn.Linear(t_emb_dim, width)
        self.out_layer = nn.Linear(width, width)
        self.skip = nn.Identity() if width_in == width else nn.Linear(width_in, width)

    def forward(self, h, t_emb):
        """Returns (B, width) for h (B, width_in)."""
        return self.skip(h) + self.out_layer(F.silu(self.in_layer(F.silu(h))
                                                    + self.emb_layer(t_emb)))


class UShape(nn.Module):
    """The outline that U-Net and BPS share: contracting, transition and expansive path, skips."""

    def __init__(self, width_in, t_emb_dim):
        super().__init__()
        self.stem = nn.Linear(width_in, WIDTHS[0])
        self.contracting = nn.ModuleList(
            Block(*sizes, t_emb_dim) for sizes in zip((WIDTHS[0], *WIDTHS), WIDTHS))
        self.transition = Block(WIDTHS[-1], WIDTHS[-1], t_emb_dim)
        self.expansive = nn.ModuleList(
            Block(below + width, width, t_emb_dim)
            for below, width in zip((WIDTHS[-1], *WIDTHS[::-1]), WIDTHS[::-1]))

    def outputs(self, x, t_emb, residuals=(0.0,) * 7):
        """Returns each block's output, after its residual was added: 3 + 1 + 3 of (B, width)."""
        h, skips, residuals = self.stem(x), [], iter(residuals)
        for block in self.contracting:
            h = block(h, t_emb) + next(residuals)
            skips.append(h)
        h = self.transition(h, t_emb) + next(residuals)
        outputs = [*skips, h]
        for block in self.expansive:
            h = block(torch.cat([h, skips.pop()], dim=1), t_emb) + next(residuals)
            outputs.append(h)
        return outputs


class ToyUNet(UShape):
    """The prior network: z_t and t to eps, with a residual added after each of seven blocks."""

    def __init__(self):
        super().__init__(2, 2 * TIME_DIM)
        self.time_embed = nn.Sequential(nn.Linear(TIME_DIM, 2 * TIME_DIM), nn.SiLU(),
                                        nn.Linear(2 * TIME_DIM, 2 * TIME_DIM), nn.SiLU())
        self.out = nn.Linear(WIDTHS[0], 2)

    def time_embedding(self, t):
        """Returns what every block, and BPS, is told of t (B,): (B, 2 TIME_DIM)."""
        return self.time_embed(timestep_embedding(t, TIME_DIM))

    def forward(self, z_t, t, residuals=(0.0,) * 8):
        """Returns eps (B, 2) for z_t (B, 2); the eighth residual is added to eps itself."""
        *inside, at_output = residuals
        h = self.outputs(z_t, self.time_embedding(t), inside)[-1]
        return self.out(F.silu(h)) + at_output


class ToyBPS(UShape):
    """The steering network: (c_add, t) to residuals, through ports that start at zero.

    weights: the port weights, three on the contracting path, one in the middle, three on the
    expansive path, and one at the output, which the method leaves at 0; 0 is no port.
    """

    def __init__(self, kind="both", weights=HEAD_HEAVY, time_blind=False):
        sees = KINDS[kind]
        super().__init__(sees.stop - sees.start, 2 * TIME_DIM)
        self.sees, self.weights, self.time_blind = sees, weights, time_blind
        inside = (*WIDTHS, WIDTHS[-1], *WIDTHS[::-1])
        self.ports = nn.ModuleList([*(nn.Linear(width, width) for width in inside),
                                    nn.Linear(WIDTHS[0], 2)])
        for port in self.ports:
            nn.init.zeros_(port.weight)
            nn.init.zeros_(port.bias)

    def forward(self, cond, t_emb):
        """Returns eight residuals, each (B, width) or 0, for cond (B, 6) and t_emb (B, D)."""
        outputs = self.outputs(cond[:, self.sees], 0 * t_emb if self.time_blind else t_emb)
        return [weight * port(h) if weight else 0.0
                for weight, port, h in zip(self.weights, self.ports, (*outputs, outputs[-1]))]


def steer(unet, bps):
    """Returns eps(z_t, t, cond): the prior with BPS's residuals, which never see z_t."""
    return lambda z_t, t, cond: unet(z_t, t, bps(cond, unet.time_embedding(t)))


# ---- training and sampling -----------------------------------------------------------------

@dataclass(frozen=True)
class Method:
    """A way to learn the posterior from labelled points; the wiring is the same for all.

    from_prior: starts from the trained prior, else from a new network. freezes_prior: trains BPS
    alone, else both.
    """
    epochs: int
    lr: float
    from_prior: bool = True
    freezes_prior: bool = False


# rates: those of least energy distance in `python toy2d.py --study rates --seed 7`
METHODS = {"steered": Method(2500, 3e-4, freezes_prior=True),
           "scratch": Method(20_000, 1e-4, from_prior=False),
           "scratch, short": Method(2500, 3e-4, from_prior=False),
           "tuned": Method(2500, 1e-4)}


def train(eps, parameters, z_0, cond, epochs, batch, lr, seed, name):
    """Trains parameters, so that eps(z_t, t, cond) predicts the noise: plain MSE, t uniform.

    The rate falls linearly to zero. A step takes the next `batch` points, round and round.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    steps = max(1, epochs * len(z_0) // batch)
    for step in tqdm(range(steps), desc=name, leave=False):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        i = torch.arange(step * batch, (step + 1) * batch) % len(z_0)
        t = torch.randint(SCHEDULE.timesteps, (batch,), generator=generator)
        noise = torch.randn(batch, 2, generator=generator)
        z_t = SCHEDULE.add_noise(z_0[i], noise, t)
        loss = F.mse_loss(eps(z_t, t, cond[i]), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_prior(world, seed, samples=PRIOR_SAMPLES):
    """Returns the frozen prior network, trained on `samples` points of the large space."""
    torch.manual_seed(seed)
    unet = ToyUNet()
    z_0, _ = world.draw(samples, torch.Generator().manual_seed(seed))
    train(lambda z_t, t, _: unet(z_t, t), unet.parameters(), z_0, z_0, PRIOR_EPOCHS, PRIOR_BATCH,
          PRIOR_LR, seed, "prior")
    return unet.requires_grad_(False)


def labelled(world, n, seed):
    """Returns the n labelled points of a seed: z_0 (n, 2), cond (n, 6)."""
    return world.draw_labelled(n, torch.Generator().manual_seed(30_000 + seed))


def train_method(name, prior, world, n, seed, *, epochs=None, lr=None, effort=1.0,
                 **bps_options):
    """Returns the posterior's eps(z_t, t, cond), learned from n labelled points in one of METHODS.

    epochs and lr: the method's own by default; `effort` is the share of the epochs that is done.
    """
    torch.manual_seed(seed)
    method, unet, bps = METHODS[name], ToyUNet(), ToyBPS(**bps_options)
    if method.from_prior:
        unet.load_state_dict(prior.state_dict())
    unet.requires_grad_(not method.freezes_prior)
    eps, epochs = steer(unet, bps), max(1, round(effort * (epochs or method.epochs)))
    train(eps, [*unet.parameters(), *bps.parameters()], *labelled(world, n, seed), epochs,
          PASSES * n, lr or method.lr, seed, f"{name}, n = {n}")
    return eps


@torch.no_grad()
def draw(denoise, n, seed):
    """Returns n points (n, 2) that the project's DDIM draws with denoise(z_t, t (1,))."""
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    for z in diffusion.sample(lambda z_t, t: denoise(z_t, torch.tensor([t])), noise, SCHEDULE,
                              STEPS):
        pass
    return z


# ---- measurements --------------------------------------------------------------------------

def energy_distance(x, y):
    """Returns 2 E|X - Y| - E|X - X'| - E|Y - Y'| of points (.., n, 2), (.., m, 2), unbiased.

    Zero for the same law; by chance it may come out below. Source: Szekely and Rizzo, Energy
    statistics, 2013.
    """
    def mean_distance(a, b, pairs):
        exact = "donot_use_mm_for_euclid_dist"          # the fast way loses digits near zero
        return torch.cdist(a.double(), b.double(), compute_mode=exact).sum((-2, -1)) / pairs

    n, m = x.shape[-2], y.shape[-2]
    return (2 * mean_distance(x, y, n * m) - mean_distance(x, x, n * (n - 1))
            - mean_distance(y, y, m * (m - 1)))


def sliced_wasserstein(x, y, directions=64):
    """Returns the mean over directions of the 1-D Wasserstein-1 distance of (.., n, 2) points."""
    angle = math.pi * torch.arange(directions) / directions
    onto = torch.stack([angle.cos(), angle.sin()])                              # (2, directions)
    return ((x @ onto).sort(-2)[0] - (y @ onto).sort(-2)[0]).abs().mean((-2, -1))


class Exam:
    """Fresh conditions, and true samples of each one's small space, to measure denoisers with.

    Attributes: cond (N, 6), log_says (N, K), true (N, 5 SAMPLES, 2); `rows` (N SAMPLES,) names
    the condition of each point that draw() is to make.
    """

    def __init__(self, world, seed):
        generator = torch.Generator().manual_seed(10_000 + seed)
        self.world, self.seed = world, seed
        _, self.cond = world.draw_labelled(CONDITIONS, generator)
        self.log_says = world.log_p_cond(self.cond)
        self.true = torch.stack([world.draw(5 * SAMPLES, generator, log_says)[0]
                                 for log_says in self.log_says])
        self.fresh = torch.stack([world.draw(SAMPLES, generator, log_says)[0]
                                  for log_says in self.log_says])
        self.rows = torch.arange(CONDITIONS).repeat_interleave(SAMPLES)

    def draw(self, eps):
        """Returns points (N, SAMPLES, 2) that eps(z_t, t, cond) draws, some of each condition."""
        cond = self.cond[self.rows]
        return draw(lambda z_t, t: eps(z_t, t, cond), len(cond), self.seed).view_as(self.fresh)

    def marks(self, points):
        """Returns what points (N, SAMPLES, 2) are worth, averaged over the conditions.

        accuracy: the share of the asked arm, by the Bayes classifier. energy, wasserstein:
        distances to true points. spread: root mean square, relative to true points' spread; well
        below 1 is a model that has collapsed onto its training points.
        """
        right = self.world.classify(points.view(-1, 2)) == self.cond[self.rows, :ARMS].argmax(1)
        spread = points.var(1).sum(1) / self.true.var(1).sum(1)                 # (N,)
        return dict(accuracy=right.float().mean().item(),
                    energy=energy_distance(points, self.true).mean().item(),
                    wasserstein=sliced_wasserstein(points, self.true[:, :SAMPLES]).mean().item(),
                    spread=spread.sqrt().mean().item())

    def repeated(self, points, z_0):
        """Returns the share of points closer to a training point of z_0 than 95 % of true ones.

        0.05 is what fresh true points have; near 1 is a model that repeats its training points
        exactly. Collapse around them shows in the spread.
        """
        def nearest(points):
            return torch.cdist(points.reshape(-1, 2), z_0).amin(1)

        return (nearest(points) < nearest(self.true).quantile(0.05)).float().mean().item()

    @torch.no_grad()
    def steering_error(self, eps, prior):
        """Returns |M learned - M|, relative to |M|, root mean square, in four quarters of t.

        The learned M is eps - prior's eps; z_t are true points of each condition with noise.
        """
        generator, errors = torch.Generator().manual_seed(20_000 + self.seed), []
        cond, log_says = self.cond[self.rows], self.log_says[self.rows]
        for low in range(0, SCHEDULE.timesteps, 250):
            t = torch.randint(low, low + 250, (len(cond),), generator=generator)
            noise = torch.randn(len(cond), 2, generator=generator)
            z_t = SCHEDULE.add_noise(self.fresh.view(-1, 2), noise, t)
            exact = self.world.steering(z_t, *signal_and_noise(t, z_t), log_says)
            learned = eps(z_t, t, cond) - prior(z_t, t)
            errors.append(((learned - exact).square().sum() / exact.square().sum()).sqrt().item())
        return errors


def table(rows, out):
    """Prints a table of dicts as markdown, and writes it to out."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{value:.4f}" if isinstance(value, float) else str(value)
               for value in row.values()] for row in rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    print(text, end="")
    temporary = out.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(out)
    print(out)


# ---- the default run -----------------------------------------------------------------------

def compare(world, prior, args):
    """The prior, three ways to learn the posterior from 100 labelled points, the exact one."""
    exam, (z_0, _) = Exam(world, args.seed), labelled(world, args.n, args.seed)
    exact = world.denoiser(exam.log_says[exam.rows])
    denoisers = {"exact": lambda z_t, t, _: exact(z_t, t),
                 "prior": lambda z_t, t, _: prior(z_t, t)}
    for method in METHODS:
        denoisers[method] = train_method(method, prior, world, args.n, args.seed,
                                         effort=args.effort)
    points = {"true": exam.fresh} | {name: exam.draw(eps) for name, eps in denoisers.items()}
    rows = []
    for name, drawn in points.items():
        errors = ["-"] * 4
        if name in METHODS:
            errors = exam.steering_error(denoisers[name], prior)
        rows.append(dict(samples=name) | exam.marks(drawn)
                    | dict(repeated=exam.repeated(drawn, z_0))
                    | {f"M error, t {250 * i}..{250 * i + 249}": error
                       for i, error in enumerate(errors)})
    table(rows, args.out / "toy2d.md")

    titles = dict(true="(a) true", prior="(b) pre-trained", steered="(c) steered",
                  scratch="(d) from scratch", tuned="(e) fine-tuned whole")
    large, _ = world.draw(5000, torch.Generator().manual_seed(args.seed))
    figure = Figure(1, len(titles))
    for axes, (name, title) in zip(figure.axes, titles.items()):
        axes.title = title
        axes.dots(large, "light")
        if name == "prior":                         # it is told no condition
            axes.dots(points[name].view(-1, 2), "dark")
            continue
        for i in range(ARMS):                       # one condition an arm, of those measured
            axes.dots(points[name][i], i)
    figure.save(args.out / "toy2d.png")
    draw_steering(world, prior, denoisers["steered"], exam, args)


@torch.no_grad()
def draw_steering(world, prior, eps, exam, args):
    """Draws M of the first condition at three t, exact above, learned below, on one scale."""
    generator = torch.Generator().manual_seed(args.seed)
    grid = torch.cartesian_prod(*2 * [torch.linspace(-2.2, 2.2, 14)])
    figure = Figure(2, 3)
    for column, t in enumerate((700, 450, 200)):
        (a, s), ts = signal_and_noise(t, grid), torch.full((len(grid),), t)
        clouds = [a * z_0 + s * torch.randn(z_0.shape, generator=generator)
                  for z_0 in (world.draw(2000, generator)[0], exam.true[0])]
        # where the prior has next to nothing, neither field matters
        seen = world.log_p(grid, a, s) > world.log_p(clouds[0], a, s).quantile(0.02)
        exact = world.steering(grid, a, s, exam.log_says[:1])[seen]
        learned = (eps(grid, ts, exam.cond[:1]) - prior(grid, ts))[seen]
        for row, (name, field) in enumerate((("exact", exact), ("learned", learned))):
            axes = figure.axes[3 * row + column]
            axes.title = f"M {name}, t = {t}"
            for points, color in zip(clouds, ("light", 0)):
                axes.dots(points, color)
            axes.arrows(grid[seen], field / exact.norm(dim=1).max() * 0.33)
    figure.save(args.out / "steering.png")


def parse_args():
    """Returns the checked command line; no --device, for a GPU gains nothing at this size."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--study", choices=("modes", "robustness", "algebra", "rates"),
        help="(default: the comparison)")
    add("--n", type=int, help="labelled points (default: 100; modes and robustness have their own)")
    add("--effort", type=float, default=1.0, help="share of all epochs and of the prior's samples, "
        "for a quick look (default: %(default)s)")
    add("--seed", type=seed_number, default=0, help="(default: %(default)s)")
    add("--out", type=Path, default=Path("runs/toy2d"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    if args.n is not None and args.study in ("modes", "robustness"):
        parser.error(f"--n {args.n}: --study {args.study} has numbers of its own; leave it out")
    args.n = 100 if args.n is None else args.n
    if args.n < ARMS:
        parser.error(f"--n {args.n}: at least {ARMS}, one an arm")
    if not 0 < args.effort <= 1:
        parser.error(f"--effort {args.effort}: allowed is above 0, up to 1")
    parser.check_out(args.out)
    return args


def main():
    """Trains the prior, then compares or studies."""
    args, started, world = parse_args(), time.monotonic(), pinwheel()
    args.out.mkdir(parents=True, exist_ok=True)
    samples = max(PRIOR_BATCH, round(PRIOR_SAMPLES * args.effort))
    prior = train_prior(world, args.seed, samples)
    study = compare
    if args.study:
        from studies import toy_studies  # here, because it imports this file
        study = getattr(toy_studies, args.study)
    study(world, prior, args)
    print(f"done in {(time.monotonic() - started) / 60:.1f} min")


if __name__ == "__main__":
    run(main)
