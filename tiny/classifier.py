"""The small CLIP as a classifier: which category a picture shows, without any training for it.

    category = Classifier()(x)              # indices of world.CATEGORIES
"""
import torch
import torch.nn.functional as F

from cli import BASE
from clip import load_score
from tiny import world

BATCH = 48


class Classifier:
    """A picture belongs to the category whose training captions fit it best, taken together."""

    def __init__(self, base=BASE, device="cpu"):
        tokenizer, self.score = load_score(base, device)
        rows = world.records("train")
        captions = [world.full_caption(row) for row in rows]
        self.texts = torch.cat([
            self.score.embed_text(tokenizer(captions[i:i + BATCH]).to(device), tokenizer.end)
            for i in range(0, len(captions), BATCH)])                          # (captions, dim)
        categories = [world.CATEGORIES.index(row["category"]) for row in rows]
        self.member = F.one_hot(torch.tensor(categories, device=device)).float()

    @torch.inference_mode()
    def __call__(self, x):
        """Returns the index (n,) of the category of each of pictures x (n, 3, 64, 64).

        p(category | x) = the sum over its captions of p(caption | x), CLIP's softmax of cosines.
        """
        images = torch.cat([self.score.embed_image(part) for part in x.split(BATCH)])
        p_caption = (self.score.logit_scale.exp() * images @ self.texts.T).softmax(dim=1)
        return (p_caption @ self.member).argmax(dim=1)
