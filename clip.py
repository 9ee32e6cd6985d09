"""CLIP for Stable Diffusion: the tokenizer and the text encoder.

The text encoder turns a prompt into `context`, the 77 text states that the U-Net attends to.

Shapes: B batch, L tokens (77), D width.

    from clip import load_clip
    tokenizer, text_model = load_clip("tiny/model")
    context = text_model(tokenizer(["a red apple"]))
"""
import warnings
from dataclasses import dataclass

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import Regex, normalizers, pre_tokenizers
from torch import nn

from inputs import checkpoints
from weights import UserError, first_line

CONTEXT_LENGTH = 77         # begin + 75 tokens + end
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"      # CLIP's own split


def quick_gelu(h):
    """Returns x * sigmoid(1.702 x), the approximate GELU of SD 1's text encoder."""
    return h * torch.sigmoid(1.702 * h)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class CLIPTextConfig:
    """The sizes of a text encoder; the defaults are Stable Diffusion 1.5's."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    vocab_size: int = 49408
    activation: str = "quick_gelu"


# ---- tokenizer -----------------------------------------------------------------------------

def split_words():
    """Returns (normalizer, pre-tokenizer) of CLIP: lower case, one space, words, bytes."""
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "),
                                       normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    return normalizer, pre_tokenizers.Sequence([words,
                                                pre_tokenizers.ByteLevel(add_prefix_space=False)])


class Tokenizer:
    """CLIP's byte-level BPE: texts to ids, all of length 77."""

    def __init__(self, vocab, merges, pad_token=END, added=()):
        """vocab: {token: id}; merges: [(left, right)] in order; pad_token fills up to 77.

        added: {token of vocab that stays whole: whether it is looked for after lower-casing}.
        """
        model = tokenizers.models.BPE(vocab, merges, unk_token=END, end_of_word_suffix="</w>",
                                      continuing_subword_prefix="", fuse_unk=False)
        self.bpe = tokenizers.Tokenizer(model)
        self.bpe.normalizer, self.bpe.pre_tokenizer = split_words()
        self.bpe.add_special_tokens([BEGIN, END, pad_token])    # whole, if a text spells them
        self.bpe.add_tokens([tokenizers.AddedToken(token, normalized=added[token])
                             for token in added if token not in (BEGIN, END, pad_token)])
        self.begin, self.end, self.pad = vocab[BEGIN], vocab[END], vocab[pad_token]
        self.vocab = vocab

    def __call__(self, texts):
        """Returns ids (B, 77) int64: begin, the text's tokens, end, padding.

        A text of more than 75 tokens is cut, with a warning that shows what was dropped.
        """
        rows = []
        for text in texts:
            ids, dropped = self.fit(text)
            if dropped:
                warnings.warn(f"prompt longer than {CONTEXT_LENGTH - 2} tokens; "
                              f"dropped: {dropped!r}")
            row = [self.begin, *ids, self.end]
            rows.append(row + [self.pad] * (CONTEXT_LENGTH - len(row)))
        return torch.tensor(rows, dtype=torch.int64)

    def fit(self, text):
        """Returns (the ids of a text, 75 at most, and what of the text was dropped for that)."""
        encoding = self.bpe.encode(text, add_special_tokens=False)
        ids = encoding.ids[:CONTEXT_LENGTH - 2]
        cut = len(encoding.ids) > len(ids)
        return ids, text[encoding.offsets[len(ids)][0]:] if cut else ""


def load_tokenizer(folder):
    """Returns the Tokenizer of a folder's vocab.json and merges.txt, or of its tokenizer.json.

    Errors: UserError names the missing or faulty file.
    """
    vocab, merges, pad_token, added = checkpoints.read_tokenizer(folder)
    try:
        return Tokenizer(vocab, merges, pad_token or END, added)
    except Exception as error:      # all that `tokenizers` raises for merges that do not fit
        raise UserError(f"{folder}: not a CLIP tokenizer ({first_line(error)})") from None


# ---- text encoder --------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention in which a token sees only itself and those before it."""

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
    """The transformer's two-layer perceptron, four times as wide inside."""

    def __init__(self, width, activation):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1, self.fc2 = nn.Linear(width, width * 4), nn.Linear(width * 4, width)

    def forward(self, h):
        return self.fc2(self.activation(self.fc1(h)))


class EncoderLayer(nn.Module):
    """Attention and perceptron, each normed before and added after."""

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
    """Token ids to text states."""

    def __init__(self, config=CLIPTextConfig()):
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict(dict(
            token_embedding=nn.Embedding(config.vocab_size, config.width),
            position_embedding=nn.Embedding(CONTEXT_LENGTH, config.width)))
        self.encoder = nn.ModuleDict(dict(
            layers=nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))))
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids, clip_skip=1):
        """Returns context (B, L, D) for ids (B, L).

        clip_skip: 1 reads the last layer's states, 2 those of the one before, and so on; the final
        norm is applied either way.
        """
        h = self.embeddings["token_embedding"](ids)
        h = h + self.embeddings["position_embedding"].weight[:ids.shape[1]]
        for layer in self.encoder["layers"][:len(self.encoder["layers"]) + 1 - clip_skip]:
            h = layer(h)
        return self.final_layer_norm(h)


def load_clip(path, tokenizer_path=None, dtype=torch.float32, device="cpu"):
    """Returns (tokenizer, frozen text encoder) of an SD folder or single .safetensors file.

    tokenizer_path: a tokenizer's folder, or an SD folder that has one; a single file has none of
    its own. Errors: UserError names the file and what is missing or does not fit.
    """
    checkpoint = checkpoints.read_text(path)
    folder = checkpoints.find_tokenizer(path, tokenizer_path)
    tokenizer = load_tokenizer(folder)
    checkpoints.check_text(checkpoint, folder, tokenizer.vocab, ACTIVATIONS)
    return tokenizer, checkpoint.build(CLIPTextModel, CLIPTextConfig, dtype, device)
