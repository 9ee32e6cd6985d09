"""How many bits a condition adds, and how strong its steering should be, from errors of denoisers.

The bits that a condition c adds to the text about a picture z_0 are the mutual information of c and
z_0 given the text, which is an integral over the noise levels:

    I(c; z_0 | text) = 1/2 integral of E|M|^2 d log snr,      snr = alpha_t^2 / sigma_t^2

(derived here from I-MMSE, arXiv cs/0412108, theorem 1; the error of z_0 is the error of the noise
divided by snr). For exact denoisers E|M|^2 is the gain, E|noise - eps*|^2 - E|noise - eps_bar*|^2.

Shapes: n pairs, T timesteps.
"""
import math

import torch


def log_snr(schedule, timesteps):
    """log(alpha_t^2 / sigma_t^2) (T,) float64 at timesteps, whole numbers."""
    abar = schedule.alphas_cumprod[list(timesteps)]
    return (abar / (1 - abar)).log()


def condition_bits(gains, log_snrs):
    """The bits (n,) that each condition adds, between the first and the last noise level.

    gains: (n, T), of eps, summed over its dimensions. log_snrs: (T,), falling. Integrated by the
    trapezoidal rule.
    """
    nats = -torch.trapezoid(gains.to(log_snrs), log_snrs) / 2
    return nats / math.log(2)


def best_strength(gains, steerings):
    """The strength with the lowest loss, and its standard error by the jackknife over pairs.

    gains: (n,). steerings: |M_hat|^2 (n,). The loss at strength s is L(s) = L(0)
    - s (gain + |M_hat|^2) + s^2 |M_hat|^2 (derived here). Below 1 the steering is
    too strong on held-out pairs, as after overfitting. Without any steering it is nan.
    """
    def vertex(gain, steering):
        """The vertex of the parabola."""
        return (gain + steering) / (2 * steering)

    n = len(gains)
    without_one = vertex(gains.sum() - gains, steerings.sum() - steerings)        # (n,)
    error = ((n - 1) * without_one.var(correction=0)).sqrt()
    return vertex(gains.sum(), steerings.sum()).item(), error.item()
