"""How good are drawn pictures? What the embedded base's CLIP sees in them, beside true ones.

Shapes: n pictures, D width.
"""
import torch

CANDIDATES = 24                 # captions among which a picture has to find its own


def recognition_rates(classify, x, captions, categories):
    """Returns how often the CLIP sees the right category, and how often the right caption.

    classify: a Classifier. x: (n, 3, 64, 64). categories: (n,) indices of world.CATEGORIES.
    """
    return ((classify(x).cpu() == categories).float().mean().item(),
            caption_rate(classify, x, captions))


def caption_rate(classify, x, captions):
    """Returns how often the CLIP finds a picture's own caption among CANDIDATES.

    These are its own and those of the pictures that follow it.
    """
    cosines = classify.cosines(x, captions).cpu()                              # (n, n)
    order = (torch.arange(len(x))[:, None] + torch.arange(CANDIDATES)) % len(x)
    return (cosines.gather(1, order).argmax(dim=1) == 0).float().mean().item()


def kernel_distance(drawn, true):
    """Returns the squared maximum mean discrepancy between two laws, unbiased, so about 0 if equal.

    drawn: features (n, D). true: (m, D). The kernel is Gaussian; its width is the median distance
    within the true ones. Sources: A Kernel Two-Sample Test, JMLR 13 (2012), equation 3, on the
    features of a CLIP as arXiv 2401.09603 has it.
    """
    width = torch.pdist(true).median()

    def kernel(a, b):
        """Returns k (n, m) of features (n, D) and (m, D)."""
        return (-(torch.cdist(a, b) / width) ** 2 / 2).exp()

    def mean_between_different(a):
        """Returns the mean of k over all pairs of two different rows."""
        return (kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))

    return (mean_between_different(drawn) + mean_between_different(true)
            - 2 * kernel(drawn, true).mean()).item()
