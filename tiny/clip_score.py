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

BATCH = 64                  # pictures or captions at a time


class ImageTower(nn.Module):
    """Image to vector: strided convolutions, a residual block per size, and the mean."""

    def __init__(self, widths, dim):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1)
                                  for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths)
        self.projection = nn.Linear(widths[-1], dim, bias=False)

    def forward(self, x):
        """Vectors (B, dim), not normalised, of images x (B, 3, H, W) in [-1, 1]."""
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


def load_score(path, device="cpu"):
    """(tokenizer, frozen CLIPScore) of the embedded base's folder."""
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


class Reader:
    """Reads pictures with the embedded base's CLIP."""

    def __init__(self, base=BASE, device="cpu"):
        self.device = device
        self.tokenizer, self.score = load_score(base, device)

    @torch.inference_mode()
    def embed_captions(self, captions):
        """Unit vectors (captions, dim)."""
        return torch.cat([self.score.embed_text(
            self.tokenizer(captions[i:i + BATCH]).to(self.device), self.tokenizer.end)
            for i in range(0, len(captions), BATCH)])

    @torch.inference_mode()
    def embed_pictures(self, x):
        """Unit vectors (n, dim) of pictures x (n, 3, 64, 64)."""
        return torch.cat([self.score.embed_image(part) for part in x.to(self.device).split(BATCH)])

    def styles(self, x):
        """Index (n,) into world.STYLES of the style that fits each picture x (n, 3, 64, 64) best.
        """
        captions = self.embed_captions(world.style_captions())
        return (self.embed_pictures(x) @ captions.T).argmax(dim=1).cpu()
