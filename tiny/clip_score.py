"""The embedded base's CLIP as a whole: text encoder and image tower, and a classifier with them.

Nothing that draws needs the image tower. With it the CLIP tells the category of a picture, without
any training for that, and finds the caption of a picture among others.

    category = Classifier()(x)              # indices of world.CATEGORIES

Shapes: B batch, L tokens (77), D width, C channels, H W rows and columns.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import weights
from clip import load_clip
from inputs import checkpoints
from inputs.options import BASE
from tiny import world

BATCH = 48                  # pictures or captions at a time


class ImageTower(nn.Module):
    """Maps an image to a vector by strided convolutions, a residual block per size, and the mean.
    """

    def __init__(self, widths, dim):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1)
                                  for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths)
        self.projection = nn.Linear(widths[-1], dim, bias=False)

    def forward(self, x):
        """Returns (B, dim), not normalised, for images x (B, 3, H, W) in [-1, 1]."""
        h = self.stem(x)
        for i, (norm, block) in enumerate(zip(self.norms, self.blocks)):
            h = h + block(F.silu(norm(h)))
            if i < len(self.down):
                h = F.silu(self.down[i](h))
        return self.projection(h.mean(dim=(2, 3)))


class CLIPScore(nn.Module):
    """Cosine similarities between texts and images: text encoder, image tower, projections."""

    def __init__(self, text_model, image_widths, dim):
        super().__init__()
        self.text_model = text_model
        self.image_tower = ImageTower(image_widths, dim)
        self.text_projection = nn.Linear(text_model.config.width, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))       # exp: 1 / 0.07, as CLIP's start

    def embed_text(self, ids, end):
        """Returns unit vectors (B, dim) of ids (B, 77), from the state at the first `end`."""
        context = self.text_model(ids)
        position = (ids == end).int().argmax(dim=1)                           # (B,)
        return F.normalize(self.text_projection(context[torch.arange(len(ids)), position]), dim=-1)

    def embed_image(self, x):
        """Returns unit vectors (B, dim) of images x (B, 3, H, W) in [-1, 1]."""
        return F.normalize(self.image_tower(x), dim=-1)


def save_score(score, file):
    """Writes what a CLIPScore has beyond its text encoder, in fp16."""
    tensors = {key: tensor.half() for key, tensor in score.state_dict().items()
               if not key.startswith("text_model.")}
    weights.save(tensors, file, dict(format="pt"))


def load_score(path, device="cpu"):
    """Returns (tokenizer, frozen CLIPScore) of the embedded base's folder."""
    tokenizer, text_model = load_clip(path)
    file = Path(path) / "clip_score.safetensors"
    state = weights.read_header(file)
    norms = sorted(name for name in state if ".norms." in name and name.endswith(".weight"))
    score = CLIPScore(text_model, [state[name].shape[0] for name in norms],
                      state["text_projection.weight"].shape[0])
    state |= {f"text_model.{name}": stored
              for name, stored in checkpoints.read_text(path).state.items()}
    return tokenizer, weights.load_strict(score, weights.Checkpoint({}, state, str, file),
                                          device=device)


class Classifier:
    """Names the category whose captions, taken together, fit a picture best.

    The captions are those of all names and styles, or of the names of one split.
    """

    def __init__(self, base=BASE, device="cpu", split=None):
        self.device = device
        self.tokenizer, self.score = load_score(base, device)
        rows = world.records(split)
        self.texts = self.embed_captions([world.full_caption(row) for row in rows])
        self.member = F.one_hot(world.category_numbers(rows).to(device)).float()

    @torch.inference_mode()
    def embed_captions(self, captions):
        """Returns unit vectors (captions, dim)."""
        return torch.cat([self.score.embed_text(
            self.tokenizer(captions[i:i + BATCH]).to(self.device), self.tokenizer.end)
            for i in range(0, len(captions), BATCH)])

    @torch.inference_mode()
    def embed_pictures(self, x):
        """Returns unit vectors (n, dim) of pictures x (n, 3, 64, 64)."""
        return torch.cat([self.score.embed_image(part) for part in x.split(BATCH)])

    def cosines(self, x, captions):
        """Returns the cosines (n, captions) between pictures x (n, 3, 64, 64) and captions."""
        return self.embed_pictures(x) @ self.embed_captions(captions).T

    def __call__(self, x):
        """Returns the indices (n,) of the categories of pictures x (n, 3, 64, 64).

        p(category | x) is the sum over its captions of p(caption | x), the softmax of cosines.
        """
        logits = self.score.logit_scale.exp() * self.embed_pictures(x) @ self.texts.T
        return (logits.softmax(dim=1) @ self.member).argmax(dim=1)
