"""CLIP for Stable Diffusion: the tokenizer and the text encoder.

The text encoder turns a prompt into `context`, the 77 text states that the U-Net attends to.

Shapes: B batch, L tokens (77), D width.

    tokenizer = Tokenizer(vocab, merges)
    text_model = CLIPTextModel(CLIPTextConfig())    # random; inputs/checkpoints.py loads both
    context = text_model(tokenizer(["a red apple"]))
"""
import warnings
from dataclasses import dataclass

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import Regex, normalizers, pre_tokenizers
from torch import nn

CONTEXT_LENGTH = 77         # begin + 75 tokens + end
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"      # of CLIP's own code


def quick_gelu(h):
    """h * sigmoid(1.702 h), the approximate GELU of SD 1's text encoder."""
    return h * torch.sigmoid(1.702 * h)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a text encoder; the defaults are Stable Diffusion 1.5's."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    vocab_size: int = 49408
    activation: str = "quick_gelu"


# ---- tokenizer -----------------------------------------------------------------------------

def word_splitter():
    """CLIP's normalizer (lower case, single spaces) and pre-tokenizer (words, then bytes)."""
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "),
                                       normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    return normalizer, pre_tokenizers.Sequence([words,
                                                pre_tokenizers.ByteLevel(add_prefix_space=False)])


class Tokenizer:
    """CLIP's byte-level BPE."""

    def __init__(self, vocab, merges, pad_token=END, added=()):
        """vocab: {token: id}. merges: [(left, right)], first merge first. pad_token fills up to 77.

        added: {token that is never split: whether to match it after lower-casing}.
        """
        model = tokenizers.models.BPE(vocab, merges, unk_token=END, end_of_word_suffix="</w>",
                                      continuing_subword_prefix="", fuse_unk=False)
        self.bpe = tokenizers.Tokenizer(model)
        self.bpe.normalizer, self.bpe.pre_tokenizer = word_splitter()
        self.bpe.add_special_tokens([BEGIN, END, pad_token])    # never split
        self.bpe.add_tokens([tokenizers.AddedToken(token, normalized=added[token])
                             for token in added if token not in (BEGIN, END, pad_token)])
        self.begin, self.end, self.pad = vocab[BEGIN], vocab[END], vocab[pad_token]
        self.vocab = vocab

    def __call__(self, prompts):
        """Token ids (B, 77) int64: begin, the prompt's tokens, end, padding.

        A prompt of more than 75 tokens is truncated, with a warning that shows the rest.
        """
        rows = []
        for prompt in prompts:
            ids, dropped = self.truncate(prompt)
            if dropped:
                warnings.warn(f"prompt longer than {CONTEXT_LENGTH - 2} tokens; "
                              f"dropped: {dropped!r}")
            row = [self.begin, *ids, self.end]
            rows.append(row + [self.pad] * (CONTEXT_LENGTH - len(row)))
        return torch.tensor(rows, dtype=torch.int64)

    def truncate(self, prompt):
        """At most 75 token ids of a prompt, and the rest of the prompt that did not fit."""
        encoding = self.bpe.encode(prompt, add_special_tokens=False)
        ids = encoding.ids[:CONTEXT_LENGTH - 2]
        is_cut = len(encoding.ids) > len(ids)
        return ids, prompt[encoding.offsets[len(ids)][0]:] if is_cut else ""


# ---- text encoder --------------------------------------------------------------------------

class Attention(nn.Module):
    """Causal multi-head self-attention: a token attends to itself and to earlier tokens."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width)
                                                                for _ in range(4))

    def forward(self, h):
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)    # (B, heads, L, d)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))                  # (B, L, D)


class MLP(nn.Module):
    """Two-layer perceptron of the transformer, four times as wide inside."""

    def __init__(self, width, activation):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1, self.fc2 = nn.Linear(width, width * 4), nn.Linear(width * 4, width)

    def forward(self, h):
        return self.fc2(self.activation(self.fc1(h)))


class EncoderLayer(nn.Module):
    """Attention and perceptron, each pre-normed, with a skip connection."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config.width, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, config.activation)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, h):
        h = h + self.self_attn(self.layer_norm1(h))
        return h + self.mlp(self.layer_norm2(h))


class CLIPTextModel(nn.Module):
    """Text encoder: token ids to text states."""

    def __init__(self, config=CLIPTextConfig()):
        super().__init__()
        self.config = config
        counts = dict(token_embedding=config.vocab_size, position_embedding=CONTEXT_LENGTH)
        # zeros, because drawing random numbers here would import PyTorch's compiler: two seconds
        self.embeddings = nn.ModuleDict({
            name: nn.Embedding.from_pretrained(torch.zeros(count, config.width), freeze=False)
            for name, count in counts.items()})
        self.encoder = nn.ModuleDict(dict(
            layers=nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))))
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids):
        """Context (B, L, D) of token ids (B, L)."""
        h = self.embeddings["token_embedding"](ids)
        h = h + self.embeddings["position_embedding"].weight[:ids.shape[1]]
        for layer in self.encoder["layers"]:
            h = layer(h)
        return self.final_layer_norm(h)
