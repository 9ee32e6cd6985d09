"""The embedded base's CLIP as a whole: the text encoder with its image tower.

Nothing that draws needs the image tower. With it the CLIP reads the style of a picture, and its
features compare drawn pictures with true ones.

    style = Reader().styles(x)              # indices into world.STYLES

Shapes: B batch, L tokens (77), D width, C channels, H W rows and columns.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import weights
from inputs import checkpoints
from inputs.checkpoints import load_clip
from inputs.options import BASE
from tiny import world

BATCH = 64                  # pictures at a time
WIDTHS = (32, 64, 128, 192)


class ImageTower(nn.Module):
    """Image to vector: strided convolutions, a residual block per size, and the mean."""

    def __init__(self, dim):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, stride=2, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1)
                                  for a, b in zip(WIDTHS, WIDTHS[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in WIDTHS)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in WIDTHS)
        self.projection = nn.Linear(WIDTHS[-1], dim, bias=False)

    def forward(self, x):
        """Vectors (B, dim), not normalized, of images x (B, 3, H, W) in [-1, 1]."""
        h = self.stem(x)
        for i, (norm, block) in enumerate(zip(self.norms, self.blocks)):
            h = h + block(F.silu(norm(h)))
            if i < len(self.down):
                h = F.silu(self.down[i](h))
        return self.projection(h.mean(dim=(2, 3)))


class CLIPScore(nn.Module):
    """Cosine similarities between texts and images: text encoder, image tower, projections."""

    def __init__(self, text_model):
        super().__init__()
        dim = text_model.config.width
        self.text_model = text_model
        self.image_tower = ImageTower(dim)
        self.text_projection = nn.Linear(dim, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))       # exp: 1 / 0.07, as CLIP's start

    def embed_text(self, ids, end):
        """Unit vectors (B, dim) of ids (B, 77), from the state at the first `end`."""
        context = self.text_model(ids)
        position = (ids == end).int().argmax(dim=1)                           # (B,)
        return F.normalize(self.text_projection(context[torch.arange(len(ids)), position]), dim=-1)

    def embed_image(self, x):
        """Unit vectors (B, dim) of images x (B, 3, H, W) in [-1, 1]."""
        return F.normalize(self.image_tower(x), dim=-1)


def save_score(score, file):
    """Write what a CLIPScore has beyond its text encoder, in fp16."""
    tensors = {key: tensor.half() for key, tensor in score.state_dict().items()
               if not key.startswith("text_model.")}
    weights.save(tensors, file, dict(format="pt"))


class Reader:
    """Reads pictures with the embedded base's CLIP."""

    def __init__(self, base=BASE, device="cpu"):
        self.device = device
        self.tokenizer, text_model = load_clip(base)
        file = Path(base) / "clip_score.safetensors"
        state = weights.read_header(file) | {
            f"text_model.{name}": stored
            for name, stored in checkpoints.read_text(base).state.items()}
        self.score = weights.load_strict(
            CLIPScore(text_model), weights.Checkpoint({}, state, str, file), device=device)

    @torch.inference_mode()
    def embed_pictures(self, x):
        """Unit vectors (n, dim) of pictures x (n, 3, 64, 64)."""
        return torch.cat([self.score.embed_image(part) for part in x.to(self.device).split(BATCH)])

    @torch.inference_mode()
    def styles(self, x):
        """Index (n,) into world.STYLES of the style that fits each picture x (n, 3, 64, 64) best.
        """
        ids = self.tokenizer(world.style_captions()).to(self.device)
        captions = self.score.embed_text(ids, self.tokenizer.end)
        return (self.embed_pictures(x) @ captions.T).argmax(dim=1).cpu()
