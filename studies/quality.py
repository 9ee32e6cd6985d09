"""How good are drawn pictures? What the embedded base's CLIP sees in them, beside true ones.

Shapes: n pictures, D width.
"""
import numpy as np
import torch

from inputs.conditions import to_x


def true_features(reader, cache, count):
    """Features (count, D) of the first true pictures of a LatentCache, by a Reader."""
    return reader.embed_pictures(torch.stack([to_x(cache.image(i)) for i in range(count)]))


def kernel_distance(drawn, true, paired=True):
    """The squared maximum mean discrepancy between two laws, unbiased, so about 0 if equal.

    drawn: features (n, D). true: (m, D). paired: whether drawn i was made from what belongs to true
    i, so that the two are not independent and k(drawn i, true i) is left out. The kernel is
    Gaussian; its width is the median distance within the true ones. Sources: A Kernel Two-Sample
    Test, JMLR 13 (2012), equations 3 and 4, on the features of a CLIP as arXiv 2401.09603 has it.
    """
    width = torch.pdist(true).median()

    def kernel(a, b):
        """k (n, m) of features (n, D) and (m, D)."""
        return (-(torch.cdist(a, b) / width) ** 2 / 2).exp()

    def mean_between_different(a, b):
        """The mean of k over all pairs of two different rows."""
        k = kernel(a, b)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    between = mean_between_different(drawn, true) if paired else kernel(drawn, true).mean()
    return (mean_between_different(drawn, drawn) + mean_between_different(true, true)
            - 2 * between).item()


def distance_and_error(drawn, true, paired=True):
    """[kernel distance, its standard error by the jackknife], as kernel_distance does.

    If they are paired, true i is left out with drawn i.
    """
    n = len(drawn)
    without_one = []
    for i in range(n):
        others = torch.arange(n) != i
        without_one.append(kernel_distance(drawn[others], true[others] if paired else true, paired))
    return [kernel_distance(drawn, true, paired), float(np.std(without_one) * (n - 1) ** 0.5)]
