"""From a large to a small probability space in the plane, against the exact posterior denoiser.

    python toy2d.py                     prior, steered, rivals: two figures and a table, 3 minutes
    python -m measure.toy modes         studies: modes, robustness, algebra, rates, bits

The large space is a pinwheel, a Gaussian mixture of K components; a condition c_add names an arm
and says, with some error, how far out on it the point lies. In a mixture everything that a
denoiser otherwise has to learn has a closed form. The equations stand beside the code; they follow
from the mixture and Bayes' rule, in the notation of arXiv 2406.03683. The networks are those of
unet.py and bps.py with vectors in place of maps. Noise schedule, sampler and posterior algebra are
those of the big model.

Shapes: B points, 2 coordinates, K components, N conditions of 6 numbers (5 arms and a place).
"""
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import diffusion
from inputs.options import Parser, run_script, seed_number
from measure.plots import Figure
from unet import timestep_embedding

ARMS, BEADS = 5, 12                     # arms of the pinwheel, components on each
PLACE_ERROR = 0.2                       # standard error of a reading of the place, 0 to 1
KINDS = dict(arm=slice(0, ARMS), place=slice(ARMS, ARMS + 1), both=slice(0, ARMS + 1))
WIDTHS, TIME_DIM = (96, 64, 48), 32
HEAD_HEAVY = (16, 8, 4, 16, 1, 1, 1, 0)     # three on CP, one on TP, three on EP; at the output
PRIOR_SAMPLES, PRIOR_BATCH = 500_000, 1000
LABELLED = 100                          # labelled points to learn from
PASSES = 4                              # how often a batch holds each labelled point
STEPS = 100                             # DDIM steps
CONDITIONS, SAMPLES = 25, 200           # fresh conditions to measure on, samples of each
SCHEDULE = diffusion.NoiseSchedule()    # Stable Diffusion's
QUARTERS = range(0, SCHEDULE.timesteps, 250)
CLEAN = torch.ones(1, 1), torch.zeros(1, 1)     # alpha and sigma if there is no noise


# ---- the world: every quantity in closed form ----------------------------------------------

@dataclass(frozen=True)
class World:
    """A mixture of K equal, round components N(mu_k, std^2 I), and the likelihood of conditions.

    means: mu (K, 2). arms: (K,) integers, the classes. places: (K,) in 0..1. A condition depends on
    the component alone, so a small space is the same mixture with other weights. The methods take
    log_p_cond, which is log p(c_add | k): (K,) for one condition, or (B, K) for one per point;
    without it they are about the large space. Their alpha and sigma are (B, 1) or (1, 1).
    """
    means: torch.Tensor
    arms: torch.Tensor
    places: torch.Tensor
    std: float = 0.09

    def draw(self, n, generator, log_p_cond=None):
        """Draws from p(z_0 | c_add): returns clean points z_0 (n, 2), their components k (n,)."""
        p = torch.ones(len(self.means)) if log_p_cond is None else log_p_cond.exp()
        k = torch.multinomial(p, n, replacement=True, generator=generator)
        return self.scatter(k, generator), k

    def scatter(self, k, generator):
        """Draws a clean point from each of the components k (n,): returns z_0 (n, 2)."""
        return self.means[k] + self.std * torch.randn(len(k), 2, generator=generator)

    def label(self, k, generator):
        """Returns the conditions (N, 6) of components k: the arm, and a reading of the place."""
        reading = self.places[k] + PLACE_ERROR * torch.randn(len(k), generator=generator)
        return torch.cat([F.one_hot(self.arms[k], ARMS).to(reading), reading[:, None]], dim=1)

    def draw_labelled(self, n, generator):
        """Draws labelled points from the arms in turn: returns z_0 (n, 2) and cond (n, 6)."""
        on_arm = self.arms == torch.arange(n)[:, None] % ARMS                   # (n, K)
        k = torch.multinomial(on_arm.float(), 1, generator=generator).squeeze(1)
        return self.scatter(k, generator), self.label(k, generator)

    def log_p_cond(self, cond, kind="both"):
        """Returns log p(c_add | k) (N, K) but for a constant; kind: which part of cond is known."""
        arm = (cond[:, KINDS["arm"]] @ F.one_hot(self.arms, ARMS).to(cond).T).log()
        place = -(cond[:, KINDS["place"]] - self.places) ** 2 / (2 * PLACE_ERROR**2)
        return dict(arm=arm, place=place, both=arm + place)[kind]

    def variance(self, alpha, sigma):
        """Returns the variance of a component to which noise was added."""
        return alpha**2 * self.std**2 + sigma**2

    def log_components(self, z_t, alpha, sigma, log_p_cond=0.0):
        """Returns log [p(c_add | k) N(z_t; alpha mu_k, variance I) / K] (B, K)."""
        variance = self.variance(alpha, sigma)
        square = (z_t[:, None] - alpha[..., None] * self.means).square().sum(-1)
        return (log_p_cond - square / (2 * variance) - math.log(2 * math.pi * len(self.means))
                - variance.log())

    def log_p(self, z_t, alpha, sigma, log_p_cond=0.0):
        """Returns log p_t(z_t) (B,), or with log_p_cond log p_t(z_t, c_add)."""
        return self.log_components(z_t, alpha, sigma, log_p_cond).logsumexp(1)

    def eps(self, z_t, alpha, sigma, log_p_cond=0.0):
        """Returns eps* = E[noise | z_t] (B, 2), or eps_bar* = E[noise | z_t, c_add].

        One component has E[noise | z_t, k] = sigma (z_t - alpha mu_k) / variance; the mean over
        components has the weights p(k | z_t, c_add).
        """
        p_k = self.log_components(z_t, alpha, sigma, log_p_cond).softmax(1)
        return sigma * (z_t - alpha * (p_k @ self.means)) / self.variance(alpha, sigma)

    def steering(self, z_t, alpha, sigma, log_p_cond):
        """Returns M = eps_bar* - eps* (B, 2), computed as the covariance Cov(noise, w | z_t).

        w_k = p(c_add | k) / p_t(c_add | z_t), so p(k | z_t) w_k = p(k | z_t, c_add).
        """
        p_k = self.log_components(z_t, alpha, sigma).softmax(1)
        p_k_cond = self.log_components(z_t, alpha, sigma, log_p_cond).softmax(1)    # no overflow
        eps_k = sigma[..., None] * (z_t[:, None] - alpha[..., None] * self.means)   # (B, K, 2)
        eps_k = eps_k / self.variance(alpha, sigma)[..., None]
        return ((p_k_cond - p_k)[..., None] * eps_k).sum(1)        # E[noise w] - E[noise] E[w]

    def denoiser(self, log_p_cond=0.0):
        """Returns the exact denoise(z_t, t), as diffusion.sample takes it."""
        return lambda z_t, t: self.eps(z_t, *signal_and_noise(t, z_t), log_p_cond)

    def classify(self, z_0):
        """Returns the most probable arm (B,) of clean points: the Bayes classifier."""
        p_k = self.log_components(z_0, *CLEAN).softmax(1)
        return (p_k @ F.one_hot(self.arms, ARMS).to(p_k)).argmax(1)


def signal_and_noise(t, z_t):
    """Returns alpha_t and sigma_t, (1, 1) for a number t, (B, 1) for t (B,)."""
    return SCHEDULE.signal_and_noise(torch.as_tensor(t).view(-1), z_t)


def pinwheel():
    """Returns a World of arms that turn as they go out, from radius 0.5 to 2."""
    arms = torch.arange(ARMS).repeat_interleave(BEADS)
    places = torch.linspace(0, 1, BEADS).repeat(ARMS)
    radius = 0.5 + 1.5 * places
    angle = 2 * math.pi * arms / ARMS + 0.9 * radius
    means = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return World(means, arms, places)


# ---- the networks: unet.py and bps.py with vectors in place of maps ------------------------

class Block(nn.Module):
    """A residual block of two linear layers with a shift by the timestep in between."""

    def __init__(self, width_in, width):
        super().__init__()
        self.in_layer = nn.Linear(width_in, width)
        self.emb_layer = nn.Linear(2 * TIME_DIM, width)
        self.out_layer = nn.Linear(width, width)
        self.skip = nn.Identity() if width_in == width else nn.Linear(width_in, width)

    def forward(self, h, t_emb):
        shifted = self.in_layer(F.silu(h)) + self.emb_layer(t_emb)
        return self.skip(h) + self.out_layer(F.silu(shifted))


class UShape(nn.Module):
    """The outline that U-Net and BPS share: contracting, transition and expansive path, skips."""

    def __init__(self, width_in):
        super().__init__()
        outer, middle, inner = WIDTHS
        self.stem = nn.Linear(width_in, outer)
        self.contracting = nn.ModuleList(
            [Block(outer, outer), Block(outer, middle), Block(middle, inner)])
        self.transition = Block(inner, inner)
        self.expansive = nn.ModuleList([Block(inner + inner, inner), Block(inner + middle, middle),
                                        Block(middle + outer, outer)])

    def outputs(self, x, t_emb, residuals=(0.0,) * 7):
        """Returns the outputs (B, width) of 3 + 1 + 3 blocks, each with its residual added."""
        h, skips = self.stem(x), []
        for block, residual in zip(self.contracting, residuals[:3]):
            h = block(h, t_emb) + residual
            skips.append(h)
        h = self.transition(h, t_emb) + residuals[3]
        outputs = [*skips, h]
        for block, residual in zip(self.expansive, residuals[4:]):
            h = block(torch.cat([h, skips.pop()], dim=1), t_emb) + residual
            outputs.append(h)
        return outputs


class ToyUNet(UShape):
    """The prior network: takes z_t and t to eps, and adds a residual after each of 7 blocks."""

    def __init__(self):
        super().__init__(2)
        self.time_embed = nn.Sequential(nn.Linear(TIME_DIM, 2 * TIME_DIM), nn.SiLU(),
                                        nn.Linear(2 * TIME_DIM, 2 * TIME_DIM), nn.SiLU())
        self.out = nn.Linear(WIDTHS[0], 2)

    def time_embedding(self, t):
        """Returns the embedding (B, 2 TIME_DIM) of t (B,), which all blocks and BPS get."""
        return self.time_embed(timestep_embedding(t, TIME_DIM))

    def forward(self, z_t, t, residuals=(0.0,) * 8):
        """Returns eps (B, 2); the eighth residual is added to eps itself."""
        h = self.outputs(z_t, self.time_embedding(t), residuals[:7])[-1]
        return self.out(F.silu(h)) + residuals[7]


class ToyBPS(UShape):
    """The steering network: takes (c_add, t) to residuals, through ports that start at zero.

    port_weights: three on the contracting path, one in the middle, three on the expansive path, and
    one at the output, which is 0 in the paper's method. A port of weight 0 adds nothing.
    """

    def __init__(self, kind="both", port_weights=HEAD_HEAVY, time_blind=False):
        part = KINDS[kind]
        super().__init__(part.stop - part.start)
        self.part, self.port_weights, self.time_blind = part, port_weights, time_blind
        self.ports = nn.ModuleList(nn.Linear(width, width)
                                   for width in (*WIDTHS, WIDTHS[-1], *WIDTHS[::-1]))
        self.ports.append(nn.Linear(WIDTHS[0], 2))
        for parameter in self.ports.parameters():
            nn.init.zeros_(parameter)

    def forward(self, cond, t_emb):
        """Returns eight residuals, each (B, width) or 0, for cond (B, 6) and t_emb (B, D)."""
        outputs = self.outputs(cond[:, self.part], 0 * t_emb if self.time_blind else t_emb)
        return [weight * port(h) if weight else 0.0
                for weight, port, h in zip(self.port_weights, self.ports, (*outputs, outputs[-1]))]


def steer(unet, bps):
    """Returns eps(z_t, t, cond): the prior with BPS's residuals, which do not depend on z_t."""
    return lambda z_t, t, cond: unet(z_t, t, bps(cond, unet.time_embedding(t)))


# ---- training and sampling -----------------------------------------------------------------

@dataclass(frozen=True)
class Method:
    """A way to learn the posterior from labelled points; all have the same wiring.

    from_prior: whether it starts from the trained prior or from a new network. freezes_prior:
    whether it trains BPS alone or both networks.
    """
    name: str
    epochs: int
    lr: float
    from_prior: bool = True
    freezes_prior: bool = False


PRIOR = Method("prior", 5, 2e-3, from_prior=False)
# The learning rates had the least energy distance in `python -m measure.toy rates --seed 7`.
METHODS = {method.name: method for method in (
    Method("steered", 2500, 3e-4, freezes_prior=True),
    Method("scratch", 20_000, 1e-4, from_prior=False),
    Method("scratch, short", 2500, 3e-4, from_prior=False),
    Method("tuned", 2500, 1e-4))}


def train(eps, parameters, points, method, batch, seed):
    """Trains parameters in place, so that eps(z_t, t, cond) predicts the noise: MSE, t uniform.

    The learning rate falls linearly to zero. Each step takes the next `batch` of the points
    (z_0, cond), over and over again.
    """
    z_0, cond = points
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, fused=True)
    steps = max(1, method.epochs * len(z_0) // batch)
    for step in tqdm(range(steps), desc=f"{method.name}, n = {len(z_0)}", leave=False):
        optimizer.param_groups[0]["lr"] = method.lr * (1 - step / steps)
        i = torch.arange(step * batch, (step + 1) * batch) % len(z_0)
        t = torch.randint(SCHEDULE.timesteps, (batch,), generator=generator)
        noise = torch.randn(batch, 2, generator=generator)
        z_t = SCHEDULE.add_noise(z_0[i], noise, t)
        loss = F.mse_loss(eps(z_t, t, cond[i]), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_prior(world, seed, samples=PRIOR_SAMPLES):
    """Returns the frozen prior network after training on `samples` points of the large space."""
    torch.manual_seed(seed)
    unet = ToyUNet()
    z_0, _ = world.draw(samples, torch.Generator().manual_seed(seed))
    train(lambda z_t, t, _: unet(z_t, t), unet.parameters(), (z_0, z_0), PRIOR, PRIOR_BATCH,
          seed)
    return unet.requires_grad_(False)


def labelled_points(world, n, seed):
    """Returns the n labelled points that a seed means: z_0 (n, 2) and cond (n, 6)."""
    return world.draw_labelled(n, torch.Generator().manual_seed(30_000 + seed))


def train_method(method, prior, points, seed, effort=1.0, **bps_options):
    """Returns the posterior's eps(z_t, t, cond), learned from labelled points (z_0, cond).

    effort: the share of the method's epochs to train for. bps_options: arguments of ToyBPS.
    """
    torch.manual_seed(seed)
    unet, bps = ToyUNet(), ToyBPS(**bps_options)
    if method.from_prior:
        unet.load_state_dict(prior.state_dict())
    unet.requires_grad_(not method.freezes_prior)
    eps = steer(unet, bps)
    method = replace(method, epochs=max(1, round(effort * method.epochs)))
    batch = PASSES * len(points[0])
    train(eps, [*unet.parameters(), *bps.parameters()], points, method, batch, seed)
    return eps


@torch.no_grad()
def draw(denoise, n, seed):
    """Returns points (n, 2) that diffusion.sample draws by DDIM with denoise(z_t, t (1,))."""
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    *_, z = diffusion.sample(lambda z_t, t: denoise(z_t, torch.tensor([t])), noise, SCHEDULE, STEPS)
    return z


# ---- measurements --------------------------------------------------------------------------

def energy_distance(x, y):
    """Returns 2 E|X - Y| - E|X - X'| - E|Y - Y'| of points (.., n, 2), (.., m, 2), unbiased.

    It is zero for the same law; by chance it may come out below zero. Source: Szekely and Rizzo,
    Energy statistics, 2013.
    """
    def mean_distance(a, b, pairs):
        exact = "donot_use_mm_for_euclid_dist"          # the fast way loses digits near zero
        return torch.cdist(a.double(), b.double(), compute_mode=exact).sum((-2, -1)) / pairs

    n, m = x.shape[-2], y.shape[-2]
    return (2 * mean_distance(x, y, n * m) - mean_distance(x, x, n * (n - 1))
            - mean_distance(y, y, m * (m - 1)))


def sliced_wasserstein(x, y, directions=64):
    """Returns the 1-D Wasserstein-1 distance of points (.., n, 2), the mean over directions."""
    angle = math.pi * torch.arange(directions) / directions
    unit = torch.stack([angle.cos(), angle.sin()])                              # (2, directions)
    return ((x @ unit).sort(-2)[0] - (y @ unit).sort(-2)[0]).abs().mean((-2, -1))


class HeldOut:
    """Fresh conditions, and true samples of their small spaces, to measure denoisers with.

    Attributes: cond (N, 6), log_p_cond (N, K), true samples `true` (N, 5 SAMPLES, 2) and `fresh`
    (N, SAMPLES, 2). rows (N SAMPLES,) is the index of the condition of each point that draw makes.
    """

    def __init__(self, world, seed):
        generator = torch.Generator().manual_seed(10_000 + seed)
        self.world, self.seed = world, seed
        _, self.cond = world.draw_labelled(CONDITIONS, generator)
        self.log_p_cond = world.log_p_cond(self.cond)
        self.true, self.fresh = (
            torch.stack([world.draw(n, generator, row)[0] for row in self.log_p_cond])
            for n in (5 * SAMPLES, SAMPLES))
        self.rows = torch.arange(CONDITIONS).repeat_interleave(SAMPLES)

    def floor(self):
        """Returns the energy distance of fresh true points: what chance alone gives, about 0."""
        return energy_distance(self.fresh, self.true).mean().item()

    def draw(self, eps):
        """Returns points (N, SAMPLES, 2) that are drawn with eps(z_t, t, cond)."""
        cond = self.cond[self.rows]
        return draw(lambda z_t, t: eps(z_t, t, cond), len(cond), self.seed).view_as(self.fresh)

    def scores(self, points):
        """Returns how near points (N, SAMPLES, 2) are to true ones, averaged over the conditions.

        accuracy: the share on the condition's arm, by the Bayes classifier. energy, wasserstein:
        distances to true points. spread: standard deviation, relative to that of true points; if
        it is well below 1, the model has collapsed onto its training points.
        """
        hits = self.world.classify(points.view(-1, 2)) == self.cond[self.rows, :ARMS].argmax(1)
        spread = points.var(1).sum(1) / self.true.var(1).sum(1)                 # (N,)
        return dict(accuracy=hits.float().mean().item(),
                    energy=energy_distance(points, self.true).mean().item(),
                    wasserstein=sliced_wasserstein(points, self.true[:, :SAMPLES]).mean().item(),
                    spread=spread.sqrt().mean().item())

    def repeated(self, points, z_0):
        """Returns the share of points closer to a training point of z_0 than 95 % of true ones.

        Fresh true points have 0.05; a model that repeats its training points exactly has nearly 1.
        A model that collapses around them is known by its spread.
        """
        def nearest(points):
            return torch.cdist(points.reshape(-1, 2), z_0).amin(1)

        return (nearest(points) < nearest(self.true).quantile(0.05)).float().mean().item()

    @torch.no_grad()
    def steering_error(self, eps, prior):
        """Returns |M learned - M| / |M|, both root mean square, in each of four quarters of t.

        The learned M is eps minus the prior's eps; z_t are true points of each condition with
        noise.
        """
        generator = torch.Generator().manual_seed(20_000 + self.seed)
        cond, log_p_cond = self.cond[self.rows], self.log_p_cond[self.rows]
        errors = []
        for low in QUARTERS:
            t = torch.randint(low, low + 250, (len(cond),), generator=generator)
            noise = torch.randn(len(cond), 2, generator=generator)
            z_t = SCHEDULE.add_noise(self.fresh.view(-1, 2), noise, t)
            exact = self.world.steering(z_t, *signal_and_noise(t, z_t), log_p_cond)
            estimate = eps(z_t, t, cond) - prior(z_t, t)
            errors.append(((estimate - exact).square().sum() / exact.square().sum()).sqrt().item())
        return errors


def save_table(rows, file):
    """Prints rows, which are dicts, as a markdown table, and writes it to a file."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{value:.4f}" if isinstance(value, float) else str(value)
               for value in row.values()] for row in rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    print(text, end="")
    file.write_text(text, encoding="utf-8")
    print(file)


# ---- the comparison ------------------------------------------------------------------------

def compare(world, prior, args):
    """Measures the prior, the methods that learn the posterior, and the exact posterior."""
    held_out = HeldOut(world, args.seed)
    training_points = labelled_points(world, LABELLED, args.seed)
    exact = world.denoiser(held_out.log_p_cond[held_out.rows])
    denoisers = {"exact": lambda z_t, t, _: exact(z_t, t),
                 "prior": lambda z_t, t, _: prior(z_t, t)}
    for name, method in METHODS.items():
        denoisers[name] = train_method(method, prior, training_points, args.seed, args.effort)
    points = {"true": held_out.fresh} | {name: held_out.draw(eps)
                                         for name, eps in denoisers.items()}
    rows = []
    for name, samples in points.items():
        errors = ["-"] * len(QUARTERS)
        if name in METHODS:
            errors = held_out.steering_error(denoisers[name], prior)
        rows.append(dict(samples=name) | held_out.scores(samples)
                    | dict(repeated=held_out.repeated(samples, training_points[0]))
                    | {f"M error, t {low}..{low + 249}": error
                       for low, error in zip(QUARTERS, errors)})
    save_table(rows, args.out / "toy2d.md")

    titles = dict(true="(a) true", prior="(b) pre-trained", steered="(c) steered",
                  scratch="(d) from scratch", tuned="(e) fine-tuned whole")
    large, _ = world.draw(5000, torch.Generator().manual_seed(args.seed))
    figure = Figure(len(titles), titles.values())
    for axes, name in zip(figure.axes, titles):
        clouds = dict(enumerate(points[name][:ARMS]))           # for one condition per arm
        if name == "prior":                                     # which knows no condition
            clouds = dict(dark=points[name].view(-1, 2))
        axes.dots(dict(light=large) | clouds)
    figure.save(args.out / "toy2d.png")
    draw_steering(prior, denoisers["steered"], held_out, args)


@torch.no_grad()
def draw_steering(prior, eps, held_out, args):
    """Draws M for the first condition at three t, exact above, learned below, on one scale."""
    world = held_out.world
    generator = torch.Generator().manual_seed(args.seed)
    grid = torch.cartesian_prod(*2 * [torch.linspace(-2.2, 2.2, 14)])
    timesteps = (700, 450, 200)
    figure = Figure(3, [f"M {name}, t = {t}" for name in ("exact", "learned") for t in timesteps])
    for column, t in enumerate(timesteps):
        alpha, sigma = signal_and_noise(t, grid)
        large, small = (alpha * z_0 + sigma * torch.randn(z_0.shape, generator=generator)
                        for z_0 in (world.draw(2000, generator)[0], held_out.true[0]))
        # neither field matters at points that the prior hardly ever reaches
        lowest = world.log_p(large, alpha, sigma).quantile(0.02)
        z_t = grid[world.log_p(grid, alpha, sigma) > lowest]
        exact = world.steering(z_t, alpha, sigma, held_out.log_p_cond[:1])
        ts = torch.full((len(z_t),), t)
        estimate = eps(z_t, ts, held_out.cond[:1]) - prior(z_t, ts)
        for axes, field in zip(figure.axes[column::3], (exact, estimate)):
            axes.dots({"light": large, 0: small})
            axes.arrows(z_t, field / exact.norm(dim=1).max() * 0.33)
    figure.save(args.out / "steering.png")


def parse_args(parser):
    """Returns the checked command line; there is no --device, as a GPU gains nothing here."""
    add = parser.add_argument
    add("--effort", type=float, default=1.0, help="share of all epochs and of the prior's samples, "
        "for a quick look (default: %(default)s)")
    add("--seed", type=seed_number, default=0, help="(default: %(default)s)")
    add("--out", type=Path, default=Path("runs/toy2d"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    if not 0 < args.effort <= 1:
        parser.error(f"--effort {args.effort}: allowed is above 0, up to 1")
    parser.check_out(args.out)
    return args


def run_study(study, args):
    """Trains the prior, and runs study(world, prior, args) with it."""
    start = time.monotonic()
    world = pinwheel()
    args.out.mkdir(parents=True, exist_ok=True)
    samples = max(PRIOR_BATCH, round(PRIOR_SAMPLES * args.effort))
    study(world, train_prior(world, args.seed, samples), args)
    print(f"done in {(time.monotonic() - start) / 60:.1f} min")


def main():
    """Runs the comparison."""
    run_study(compare, parse_args(Parser(__doc__)))


if __name__ == "__main__":
    run_script(main)
