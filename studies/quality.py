"""Held-out losses and drawn pictures of a trained network, and paired comparisons of methods.

Pictures are compared with their conditions and their prompts, and with the true pictures by the
features of the embedded base's CLIP. Methods that drew for the same pairs, from the same noises,
are compared pair by pair. The differences between pairs then cancel, so smaller differences
between methods become visible.

    numbers = evaluate(base, cache, network, seed=0)
    difference, error = paired_difference(numbers["distances"], others["distances"])

Shapes: n pictures, D width.
"""
import functools

import numpy as np
import torch

from inputs.conditions import to_x
from measure.obedience import meter_for, prompt_fidelity
from measure.report import draw_pairs, mean_and_error, paired_squares, summarize
from tiny import world
from tiny.clip_score import Reader

reader = functools.cache(Reader)


def distance_shares(drawn, true):
    """The share (n,) of each pair in the kernel distance, which is the mean of the shares.

    It is the squared maximum mean discrepancy between two laws, unbiased, so about 0 if they are
    equal. drawn, true: features (n, D). Drawn i was made from what belongs to true i, so the two
    are not independent and k(drawn i, true i) is left out. The kernel is Gaussian; its width is the
    median distance within the true ones. Sources: A Kernel Two-Sample Test, JMLR 13 (2012),
    equation 4, on the features of a CLIP as arXiv 2401.09603 has it.

    The shares are the jackknife's pseudo-values. Their standard error is that of the distance, and
    that of the differences between two methods' shares is that of the difference of distances.
    """
    n, width = len(true), torch.pdist(true).median()

    def kernel(a, b):
        """k (n, n) of features (n, D)."""
        return (-(torch.cdist(a, b) / width) ** 2 / 2).exp()

    h = kernel(drawn, drawn) + kernel(true, true) - kernel(drawn, true) - kernel(true, drawn)
    means = (h.sum(1) - h.diagonal()) / (n - 1)             # of h(i, j) over j that are not i
    return means.mean() + 2 * (n - 1) / (n - 2) * (means - means.mean())


def paired_difference(values, others):
    """(mean of values minus that of others, its standard error), both for the same n pairs."""
    return mean_and_error(torch.as_tensor(values) - torch.as_tensor(others))


def judge(x, cache):
    """Numbers (a dict) of pictures x (n, 3, H, W) drawn for all pairs of a LatentCache.

    obedience: {measure: value}. colours: the share that is as the prompt says. distance: kernel
    distance and its standard error. distances: each pair's share in it.
    """
    names, rows = [pair.name for pair in cache.pairs], range(len(x))
    true = torch.stack([to_x(cache.image(i)) for i in rows])
    shares = distance_shares(reader().embed_pictures(x), reader().embed_pictures(true))
    colours = prompt_fidelity(x, list(map(world.figure, names)))
    return dict(obedience=meter_for(cache.task, embedded=True)(x, cache.cond(rows), names),
                colours=float(np.mean(list(colours.values()))), distance=mean_and_error(shares),
                distances=[round(share, 5) for share in shares.tolist()])


@torch.inference_mode()
def evaluate(base, cache, network, seed):
    """All numbers (a dict) of a trained network, or of the base alone (None), on held-out pairs.

    What summarize and judge return, and calibrated_gain: the gain at the strength of the lowest
    loss, with its standard error. gains: the gain of each pair.
    """
    numbers = judge(draw_pairs(base, cache, network, len(cache.pairs), seed), cache)
    if network is None:
        return numbers
    squares = paired_squares(base, cache, network)
    numbers |= summarize(squares, base.schedule, cache.rows("mean", [0]).numel())
    prior, steered, _, steering = squares.mean(2)
    gains, strength = prior - steered, numbers["strength"][0]
    # the loss is a parabola in the strength: see measure/bits.py
    calibrated = strength * (gains + steering) - strength**2 * steering
    return numbers | dict(calibrated_gain=mean_and_error(calibrated),
                          gains=[round(gain, 7) for gain in gains.tolist()])
