"""Is it learning? Held-out losses, obedience and a sheet of pictures, against the frozen base.

Shapes: B batch, C channels, H W rows and columns, of the latent or of the picture.
"""
import copy
import sys

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from bps import Condition, load_bps
from diffusion import Sampling
from inputs.conditions import cond_to_x, images_at_a_time, to_image, to_x
from measure.bits import best_strength, condition_bits, log_snr
from sample import check_fit, draw
from weights import UserError, replacing

VALIDATION_T = tuple(range(62, 1000, 125))      # timesteps 62, 187 .. 937
OBEDIENCE_PICTURES = 48
RELIABLE_PAIRS = 20                             # with fewer, standard errors are unreliable
SHEET_ROWS = 12
SAMPLING = Sampling()


def peak_memory(device):
    """The most memory that the process has held so far, in GB; with CUDA, the GPU's.

    It is nan if the system does not tell (Windows).
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ModuleNotFoundError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- losses on held-out pairs --------------------------------------------------------------

def held_out(base, cache, bps):
    """Yield (k, i, target, predict) for the k-th of VALIDATION_T and each part i of the pairs.

    predict(rows) is the prediction for pairs i with the conditions of rows; for None it is the
    frozen base's. The noise is the same for every model.
    """
    device = next(base.unet.parameters()).device
    for k, t in enumerate(tqdm(VALIDATION_T, desc="validate", delay=2, leave=False)):
        generator = torch.Generator().manual_seed(t)
        for i in torch.arange(len(cache.pairs)).split(images_at_a_time(cache.size)):
            ts = torch.full((len(i),), t)
            z = cache.rows("mean", i).float()
            noise = torch.randn(z.shape, generator=generator)
            target = base.schedule.target(z, noise, ts)
            z_t = base.schedule.add_noise(z, noise, ts).to(device)
            z_t, ts = z_t.contiguous(memory_format=torch.channels_last), ts.to(device)
            context = cache.context(cache.first_prompts(i.tolist())).to(device)

            def predict(rows):
                residuals = None
                with base.autocast():
                    if rows is not None:
                        residuals = bps(cache.cond(rows).to(device), base.unet.time_embedding(ts))
                    return base.unet(z_t, ts, context, residuals).float().cpu()

            yield k, i, target, predict


def mean_square(x):
    """The mean square (n,) of each row of x (n, C, H, W)."""
    return x.square().mean(dim=(1, 2, 3))


@torch.inference_mode()
def paired_errors(base, cache, bps=None):
    """The squared error (n,) of eps (or v) for each pair, the mean over VALIDATION_T.

    bps None is the frozen base.
    """
    errors = torch.zeros(len(cache.pairs))
    for _, i, target, predict in held_out(base, cache, bps):
        errors[i] += mean_square(predict(i if bps else None) - target) / len(VALIDATION_T)
    return errors


def mean_and_error(values):
    """The mean of two or more values (n,), and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def ratio(value, unit):
    """value / unit, or nan if the unit is zero."""
    return value / unit if unit else float("nan")


@torch.inference_mode()
def paired_squares(base, cache, bps):
    """Squares (4, n, T) of each pair at each of VALIDATION_T, means over dimensions.

    They are the errors of the frozen base, of the steered one, of the one with shuffled conditions,
    each pair's being that of the pair before it; and the steering's own square.
    """
    n = len(cache.pairs)
    squares = torch.zeros(4, n, len(VALIDATION_T))
    for k, i, target, predict in held_out(base, cache, bps):
        eps, eps_bar = predict(None), predict(i)
        for row, difference in enumerate((eps - target, eps_bar - target,
                                          predict((i - 1) % n) - target, eps_bar - eps)):
            squares[row, i, k] = mean_square(difference)
    return squares


def summarize(squares, schedule, dimensions):
    """The mean losses of paired_squares, and with standard errors what follows from them.

    gain: loss of the frozen base minus that of the steered one. For exact denoisers it is the mean
    square of the steering, E|noise - eps*|^2 - E|noise - eps_bar*|^2 = E|M|^2 (Pythagoras). gap:
    loss with shuffled conditions minus that with the right ones; it is zero for a network that
    ignores the condition. strength: the best one. bits: what a condition says beyond the
    prompt, as measure/bits.py has it: exact for exact denoisers, but for the range of VALIDATION_T;
    else an estimate, in which what is learned of the pictures in general counts, too. gain_by_t,
    strength_by_t: at each of VALIDATION_T; overfitting shows at low ones first.
    """
    prior, steered, shuffled, steering = squares
    gains, abar = prior - steered, schedule.alphas_cumprod[list(VALIDATION_T)]
    to_eps = abar if schedule.prediction_type == "v_prediction" else 1.0    # |eps|^2 of |v|^2
    bits = condition_bits(dimensions * to_eps * gains, log_snr(schedule, VALIDATION_T))
    return dict(pairs=len(prior), base=prior.mean().item(), steered=steered.mean().item(),
                shuffled=shuffled.mean().item(), gain=mean_and_error(gains.mean(1)),
                gap=mean_and_error((shuffled - steered).mean(1)), bits=mean_and_error(bits),
                strength=best_strength(gains.mean(1), steering.mean(1)),
                gain_by_t=gains.mean(0).tolist(),
                strength_by_t=[best_strength(*columns)[0]
                               for columns in zip(gains.T, steering.T)])


def validate(base, cache, bps):
    """The losses on held-out pairs, and what follows from them, as summarize does."""
    return summarize(paired_squares(base, cache, bps), base.schedule,
                     cache.rows("mean", [0]).numel())


@torch.inference_mode()
def draw_pairs(base, cache, bps, count, seed):
    """Pictures x (count, 3, H, W) for the first pairs' prompts and conditions, on the CPU.

    bps None is the frozen base; the noise of pair i is that of seed + i either way.
    """
    weight = next(base.unet.parameters())
    empty, device = cache.context([""]).to(weight), weight.device
    bps = bps and copy.deepcopy(bps).to(weight.dtype)
    pictures = []
    for i in torch.arange(count).split(images_at_a_time(cache.size)):
        context = cache.context(cache.first_prompts(i.tolist())).to(weight)
        conditions = [Condition(bps, cache.cond(i).to(device))] if bps else []
        pictures.append(draw(base, context, empty, (seed + i).tolist(), (cache.size,) * 2,
                             SAMPLING, conditions).cpu())
    return torch.cat(pictures)


@torch.inference_mode()
def round_trips(base, cache, count):
    """The first true pictures x (count, 3, H, W) after encoder and decoder, on the CPU."""
    device = next(base.vae.parameters()).device
    return torch.cat([base.vae.decode(cache.rows("mean", i).float().to(device)).cpu()
                      for i in torch.arange(count).split(images_at_a_time(cache.size))])


def load_fitting(file, base, task=None, device="cpu"):
    """A BPS for the embedded base, and for this task if one is named."""
    bps = load_bps(file, device=device)
    check_fit(bps, file, base)
    if task not in (None, bps.metadata["task"]):
        raise UserError(f"{file} must be trained for {task}, got {bps.metadata['task']}.")
    return bps


def contact_sheet(columns, titles, names, file, groups=3):
    """Write one picture with a row per name, in groups side by side if they divide the names.

    columns: one x (n or more, 3, H, W) for each of the titles.
    """
    n, (_, _, H, W) = len(names), columns[0].shape
    zoom = max(1, 128 // W)
    H, W = H * zoom, W * zoom
    gap, top = 8, 16                            # pixels between groups, and above each tile
    groups = groups if n % groups == 0 else 1
    rows = n // groups
    group_width = len(columns) * (W + 2) + 2 * gap
    sheet = Image.new("RGB", (groups * group_width, top + rows * (H + top)), "white")
    pen = ImageDraw.Draw(sheet)
    for i in range(n):
        left, y = i // rows * group_width, top + i % rows * (H + top)
        for k, (column, title) in enumerate(zip(columns, titles)):
            x = left + k * (W + 2)
            if i % rows == 0:
                pen.text((x, 2), title, "black")
            tile = to_image(column[i]).resize((W, H), Image.Resampling.LANCZOS)
            sheet.paste(tile, (x, y))
        pen.text((left, y + H + 1), names[i][:group_width // 7], "grey")    # 7 px are a letter
    with replacing(file) as temporary:
        sheet.save(temporary)
    print(file)


def print_losses(numbers):
    """Print the numbers that validate returns."""
    (gain, gain_error), (gap, gap_error) = numbers["gain"], numbers["gap"]
    print(f"held-out loss over {numbers['pairs']} test pairs: frozen base {numbers['base']:.4f}, "
          f"steered {numbers['steered']:.4f}, shuffled conditions {numbers['shuffled']:.4f}")
    print(f"gain {gain:.4f} +- {gain_error:.4f} ({ratio(gain, gain_error):.1f} standard errors), "
          f"shuffled-condition gap {gap:.4f} +- {gap_error:.4f} ({ratio(gap, gap_error):.1f})")
    print("information beyond the prompt: {:.0f} +- {:.0f} bits (estimate); best strength by loss: "
          "{:.2f} +- {:.2f}".format(*numbers["bits"], *numbers["strength"]))
    print("timestep:        " + "".join(f"{t:8d}" for t in VALIDATION_T))
    print("gain there:      " + "".join(f"{value:8.4f}" for value in numbers["gain_by_t"]))
    print("strength by loss:" + "".join(f"{value:8.2f}" for value in numbers["strength_by_t"]))
    if gain < 0:
        print("The held-out loss is higher than the frozen base's. With few pairs, use more pairs "
              "or fewer --steps, but look at the obedience first. Otherwise train longer.")
    if numbers["pairs"] < RELIABLE_PAIRS:
        print(f"(only {numbers['pairs']} test pairs; expect large variation)")


def measure_obedience(meter, conds, names, prior, steered, round_trip):
    """Print and return {measure: its value for each kind of picture, and the share of the way}.

    The round trip of the true pictures through the autoencoder is the upper bound of steering.
    """
    if meter is None:
        print("obedience: not measured, because nothing here can read your classes from pictures")
        return {}
    scores = [meter(pictures, conds, names) for pictures in (prior, steered, round_trip)]
    obedience = {}
    for measure, lower in scores[0].items():
        value, upper = scores[1][measure], scores[2][measure]
        share = ratio(value - lower, upper - lower)
        print(f"obedience ({measure}, {len(conds)} test pairs): frozen base {lower:.3f}, "
              f"steered {value:.3f}, VAE round trip of the true picture {upper:.3f}: {share:.0%} "
              f"of the way")
        obedience[measure] = dict(base=lower, steered=value, round_trip=upper, share=share)
    return obedience


def report(base, cache, bps, out, seed, meter):
    """Validates on test pairs, draws, writes samples.png and returns all the numbers.

    meter: the meter of obedience that meter_for returns, or None.
    """
    numbers = validate(base, cache, bps)
    print_losses(numbers)
    count = min(OBEDIENCE_PICTURES, len(cache.pairs))
    conds = cache.cond(range(count))
    prior = draw_pairs(base, cache, None, count, seed)
    steered = draw_pairs(base, cache, bps, count, seed)
    numbers["obedience"] = measure_obedience(
        meter, conds, [pair.name for pair in cache.pairs[:count]], prior, steered,
        round_trips(base, cache, count))
    rows = range(min(SHEET_ROWS, count))
    true = torch.stack([to_x(cache.image(i)) for i in rows])
    contact_sheet([cond_to_x(conds), prior, steered, true],
                  ["condition", "without BPS", "with BPS", "true picture"],
                  cache.first_prompts(rows), out / "samples.png")
    return numbers
