"""Trains a stage of the embedded base: the small CLIP, then the autoencoder, then the U-Net.

    python -m tiny.pretrain --stage vae --minutes 60

Runs on CPU or GPU, resumes from tiny/work by itself, appends held-out numbers to
tiny/work/STAGE/log.jsonl, and writes its part of the SD folder tiny/model at the end. `--minutes`
is the stage's whole budget over all its runs; the learning rate falls to zero over its last
quarter. All randomness is a function of (seed, step).
"""
import copy
import json
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import nn
from tqdm import tqdm

from inputs import checkpoints
import weights
from inputs.options import Parser, run
from clip import (
    BEGIN,
    CONTEXT_LENGTH,
    END,
    CLIPTextConfig,
    CLIPTextModel,
    load_clip,
    load_tokenizer,
    split_words,
)
from diffusion import NoiseSchedule
from tiny import world
from tiny.classifier import CLIPScore, save_score
from unet import ResBlock, SpatialTransformer, UNet, UNetConfig, load_unet
from vae import AutoencoderKL, VAEConfig, load_vae

HERE = Path(__file__).parent
EMA_DECAY = 0.9995
COOLDOWN = 0.25             # share of the budget over which the learning rate falls to zero
SAVE_SECONDS = 120
VOCAB_SIZE = 3000           # at most; the captions have fewer words
IMAGE_WIDTHS = (32, 64, 128, 192)
KL_WEIGHT = 1e-4            # on the mean over latent elements; keeps the latent space smooth


def compose(rows, seeds):
    """Returns (pictures (n, 3, 64, 64) uint8, captions), each a function of its own seed."""
    made = [world.random_picture(rows, np.random.default_rng(seed)) for seed in seeds]
    pictures = np.stack([world.to_array(image) for image, _ in made])
    return torch.from_numpy(pictures), [caption for _, caption in made]


def make_pool(split, count, seed):
    """Returns (pictures (count, 3, 64, 64) uint8, captions) composed of a split's pool."""
    return compose(world.pool(split),
                   tqdm([(seed, i) for i in range(count)], desc=f"{split} pictures", leave=False))


def to_x(pictures, device):
    """Returns images (B, 3, H, W) in [-1, 1] of uint8 pictures."""
    x = pictures.to(device).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


class VAEStage:
    """The autoencoder: L1 and squared error, and a light pull of the latents to the unit normal."""
    batch, rate = 8, 1e-3

    def __init__(self, args):
        self.args = args
        self.pool, _ = make_pool("train", args.pool, args.seed)
        self.held_out, _ = make_pool("val", 256, args.seed + 1)
        config = VAEConfig(channels=(16, 32, 64), blocks_per_level=1, norm_groups=8,
                           scaling_factor=1.0)
        self.model = AutoencoderKL(config)

    def loss(self, generator):
        """Returns the loss of a batch drawn with the generator."""
        indices = torch.randint(len(self.pool), (self.batch,), generator=generator)
        x = to_x(self.pool[indices], self.args.device)
        mean, std = self.model.encode(x)
        noise = torch.randn(mean.shape, generator=generator).to(x)
        error = self.model.decode(mean + std * noise) - x
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * kl

    @torch.inference_mode()
    def evaluate(self, model):
        """Returns PSNR (dB) and L1 over held-out pictures, and the latents' standard deviation."""
        squared, absolute, latents = [], [], []
        for pictures in self.held_out.split(32):
            x = to_x(pictures, self.args.device)
            latent = model.encode(x)
            error = model.decode(latent.mean).clamp(-1, 1) - x
            squared.append(error.square().mean(dim=(1, 2, 3)))
            absolute.append(error.abs().mean(dim=(1, 2, 3)))
            latents.append(latent.mean)
        psnr = 10 * torch.log10(4 / torch.cat(squared).mean())
        return dict(psnr=psnr.item(), l1=torch.cat(absolute).mean().item(),
                    latent_std=torch.cat(latents).std().item())

    @torch.inference_mode()
    def export(self, model):
        """Writes vae/ of the model folder, with the factor that gives latents unit variance."""
        sample = torch.cat([model.encode(to_x(pictures, self.args.device)).mean
                            for pictures in self.pool[:2048].split(64)])
        config = model.config
        levels = len(config.channels)
        save_part(model, self.args.out / "vae",
                  lambda key: checkpoints.vae_folder_name(key, levels),
                  dict(_class_name="AutoencoderKL", in_channels=3, out_channels=3,
                       latent_channels=config.latent_channels, sample_size=world.SIZE,
                       block_out_channels=config.channels, act_fn="silu",
                       layers_per_block=config.blocks_per_level,
                       down_block_types=["DownEncoderBlock2D"] * levels,
                       up_block_types=["UpDecoderBlock2D"] * levels,
                       norm_num_groups=config.norm_groups,
                       scaling_factor=round(1 / sample.std().item(), 4)))


def random_init(module):
    """Returns the module with linear and embedding weights drawn as CLIP draws them: small."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            nn.init.normal_(layer.weight, std=0.02)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return module


def augment(x, generator):
    """Returns images (B, 3, H, W), each turned, scaled, moved and tinted a little at random.

    A few drawings of each name are all there are: without this the image tower learns them by
    heart. Gentle enough that colours and styles keep their names.
    """
    def uniform(most, *shape):
        return most * (2 * torch.rand(len(x), *shape, generator=generator) - 1)

    angle, zoom, move = uniform(0.35), 1 + uniform(0.2), uniform(0.1, 2, 1)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)   # (B, 2, 2)
    affine = torch.cat([turn, move], dim=2).to(x)
    turned = F.grid_sample(x, F.affine_grid(affine, x.shape, align_corners=False),
                           padding_mode="border", align_corners=False)
    gain, shift = 1 + uniform(0.3, 3, 1, 1), uniform(0.15, 3, 1, 1)
    return (turned * gain.to(x) + shift.to(x)).clamp(-1, 1)


def learn_merges(captions, most):
    """Returns the merges [(left, right)] of a byte-pair encoding: the most frequent pair each time.

    Ties go to the alphabet, so that the same captions always give the same tokens.
    """
    normalizer, splitter = split_words()
    words = Counter(word for caption in captions
                    for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
    tokens = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges = []
    while len(merges) < most:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(tokens[word], tokens[word][1:]):
                pairs[pair] += count
        if not pairs:
            break                                           # every word is one token
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        tokens = {word: merge(parts, best) for word, parts in tokens.items()}
    return merges


def merge(parts, pair):
    """Returns the tuple of tokens with every occurrence of the pair, from the left, made one."""
    merged, i = [], 0
    while i < len(parts):
        step = 2 if parts[i:i + 2] == pair else 1
        merged.append("".join(parts[i:i + step]))
        i += step
    return tuple(merged)


def train_tokenizer(captions, folder):
    """Learns a BPE of at most VOCAB_SIZE tokens and writes it in CLIP's file format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(captions, VOCAB_SIZE - 2 * len(alphabet) - 2)
    tokens = alphabet + [token + "</w>" for token in alphabet] + ["".join(m) for m in merges]
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(tokens), BEGIN, END])}
    folder.mkdir(parents=True, exist_ok=True)
    weights.write_json(vocab, folder / "vocab.json")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(
        f"{left} {right}\n" for left, right in merges), encoding="utf-8")
    special = dict(bos_token=BEGIN, eos_token=END, unk_token=END, pad_token=END)
    weights.write_json(special, folder / "special_tokens_map.json")
    facts = dict(tokenizer_class="CLIPTokenizer", model_max_length=CONTEXT_LENGTH,
                 add_prefix_space=False, do_lower_case=True, errors="replace")
    weights.write_json(facts | special, folder / "tokenizer_config.json")


class CLIPStage:
    """Text and image tower, contrastively (arXiv 2103.00020): each caption finds its picture."""
    batch, rate = 128, 5e-4

    def __init__(self, args):
        self.args, self.rows = args, world.pool("train")
        self.held_out, held_out_captions = make_pool("val", 256, args.seed + 1)
        if not (args.out / "tokenizer" / "vocab.json").exists():
            train_tokenizer(make_pool("train", args.pool, args.seed)[1], args.out / "tokenizer")
        self.tokenizer = load_tokenizer(args.out / "tokenizer")
        self.end = self.tokenizer.end
        self.held_out_ids = self.tokenizer(held_out_captions)
        config = CLIPTextConfig(width=128, layers=3, heads=4, vocab_size=self.end + 1)
        self.model = CLIPScore(random_init(CLIPTextModel(config)), IMAGE_WIDTHS, 128)

    def logits(self, model, x, ids):
        """Returns scaled cosines (B, B) between images x (rows) and captions (columns)."""
        used = int((ids == self.end).int().argmax(dim=1).max()) + 1     # the rest is padding
        images = model.embed_image(x)
        texts = model.embed_text(ids[:, :used].to(self.args.device), self.end)
        return model.logit_scale.clamp(max=4.6).exp() * images @ texts.T

    def loss(self, generator):
        """Returns the symmetric cross-entropy of a batch composed anew for this step."""
        seed = torch.randint(2**31, (), generator=generator).item()
        pictures, captions = compose(self.rows, [(seed, slot) for slot in range(self.batch)])
        x = augment(to_x(pictures, self.args.device), generator)
        logits = self.logits(self.model, x, self.tokenizer(captions))
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    @torch.inference_mode()
    def evaluate(self, model):
        """Returns how often a held-out picture finds its caption among 256."""
        x = to_x(self.held_out, self.args.device)
        nearest = self.logits(model, x, self.held_out_ids).argmax(dim=1).cpu()
        return dict(retrieval_of_256=(nearest == torch.arange(len(nearest))).float().mean().item())

    def export(self, model):
        """Writes text_encoder/ and the scores' part of the model folder."""
        folder, config = self.args.out / "text_encoder", model.text_model.config
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"text_model.{key}": tensor.half()
                   for key, tensor in model.text_model.state_dict().items()}
        weights.save(tensors, folder / "model.safetensors", dict(format="pt"))
        facts = dict(architectures=["CLIPTextModel"], model_type="clip_text_model",
                     hidden_size=config.width, intermediate_size=config.width * 4,
                     num_hidden_layers=config.layers, num_attention_heads=config.heads,
                     max_position_embeddings=CONTEXT_LENGTH, vocab_size=config.vocab_size,
                     hidden_act=config.activation, projection_dim=128, layer_norm_eps=1e-5,
                     bos_token_id=self.end - 1, eos_token_id=self.end, pad_token_id=self.end,
                     torch_dtype="float32")
        weights.write_json(facts, folder / "config.json")
        save_score(model, self.args.out / "clip_score.safetensors")


def zero_last_layers(unet):
    """Returns the U-Net whose residual branches end in zeros, as SD's training starts."""
    for module in unet.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.out_layers[-1].weight)
        elif isinstance(module, SpatialTransformer):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(unet.out[-1].weight)
    return unet


class UNetStage:
    """The noise predictor on cached latents, with the frozen text tower and 10 % empty prompts."""
    batch, rate = 32, 6e-4
    empty_share = 0.1
    snr_gamma = 5.0             # min-SNR weights (arXiv 2303.09556): clean steps count less

    def __init__(self, args):
        self.args = args
        self.schedule = NoiseSchedule()
        snr = self.schedule.alphas_cumprod / (1 - self.schedule.alphas_cumprod)         # (1000,)
        self.loss_weights = (snr.clamp(max=self.snr_gamma) / snr).float()
        self.loss_weights /= self.loss_weights.mean()
        vae = load_vae(args.out, device=args.device)
        tokenizer, text_model = load_clip(args.out, device=args.device)
        self.pool = self.encode(vae, tokenizer, text_model, "train", args.pool, args.seed)
        self.held_out = self.encode(vae, tokenizer, text_model, "val", 256, args.seed + 1)
        self.empty = text_model(tokenizer([""]).to(args.device)).cpu()
        self.model = load_unet(args.init).requires_grad_(True) if args.init else zero_last_layers(
            UNet(UNetConfig(channels=(64, 128, 192), attention=(False, True, True),
                            heads=(4, 4, 4), blocks_per_level=1, context_dim=128)))

    @torch.inference_mode()
    def encode(self, vae, tokenizer, text_model, split, count, seed):
        """Returns (mean, std, context) in fp16 of all pictures of a split, each computed once."""
        pictures, captions = make_pool(split, count, seed)
        latents, context = [], []
        for i in tqdm(range(0, count, 64), desc=f"{split} latents", leave=False):
            latents.append(vae.encode(to_x(pictures[i:i + 64], self.args.device)))
            ids = tokenizer(captions[i:i + 64]).to(self.args.device)
            context.append(text_model(ids).half().cpu())
        return (torch.cat([latent.mean for latent in latents]).half().cpu(),
                torch.cat([latent.std for latent in latents]).half().cpu(), torch.cat(context))

    def eps_error(self, model, pool, indices, t, generator):
        """Returns the squared error of eps (B,) for pictures `indices` at timesteps t (B,)."""
        mean, std, context = (tensor[indices].float() for tensor in pool)
        empty = torch.rand(len(t), generator=generator) < self.empty_share
        context[empty] = self.empty
        z = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        z_t = self.schedule.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
        device = self.args.device
        eps = model(z_t.to(device), t.to(device), context.to(device))
        return (eps - noise.to(device)).square().mean(dim=(1, 2, 3))

    def loss(self, generator):
        """Returns the loss of a batch drawn with the generator, t uniform in 0..999."""
        indices = torch.randint(len(self.pool[0]), (self.batch,), generator=generator)
        t = torch.randint(self.schedule.timesteps, (self.batch,), generator=generator)
        error = self.eps_error(self.model, self.pool, indices, t, generator)
        return (self.loss_weights[t].to(error) * error).mean()

    @torch.inference_mode()
    def evaluate(self, model):
        """Returns the held-out loss in quarters of the t range, always with the same noise."""
        generator = torch.Generator().manual_seed(self.args.seed)
        t = torch.arange(256) * 1000 // 256                 # picture i at its own t
        error = torch.cat([self.eps_error(model, self.held_out, i, t[i], generator).cpu()
                           for i in torch.arange(256).split(64)])
        return dict(held_out=error.mean().item(),
                    held_out_quarters=error.view(4, 64).mean(dim=1).tolist())

    def export(self, model):
        """Writes unet/, scheduler/ and model_index.json of the model folder."""
        config = model.config
        kinds = [("CrossAttn" if attention else "") for attention in config.attention]
        save_part(model, self.args.out / "unet",
                  lambda key: checkpoints.unet_folder_name(key, config.blocks_per_level), dict(
                      _class_name="UNet2DConditionModel", sample_size=world.SIZE // 4,
                      in_channels=4, out_channels=4, block_out_channels=config.channels,
                      layers_per_block=config.blocks_per_level,
                      down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
                      up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
                      attention_head_dim=list(config.heads),
                      cross_attention_dim=config.context_dim, norm_num_groups=config.norm_groups))
        (self.args.out / "scheduler").mkdir(exist_ok=True)
        scheduler = dict(_class_name="DDIMScheduler", beta_schedule="scaled_linear",
                         beta_start=self.schedule.beta_start, beta_end=self.schedule.beta_end,
                         num_train_timesteps=self.schedule.timesteps, steps_offset=1,
                         clip_sample=False, set_alpha_to_one=False, prediction_type="epsilon")
        weights.write_json(scheduler, self.args.out / "scheduler" / "scheduler_config.json")
        index = dict(_class_name="StableDiffusionPipeline", _diffusers_version="0.30.0",
                     unet=["diffusers", "UNet2DConditionModel"],
                     vae=["diffusers", "AutoencoderKL"],
                     text_encoder=["transformers", "CLIPTextModel"],
                     tokenizer=["transformers", "CLIPTokenizer"],
                     scheduler=["diffusers", "DDIMScheduler"], safety_checker=[None, None],
                     feature_extractor=[None, None], image_encoder=[None, None],
                     requires_safety_checker=False)
        weights.write_json(index, self.args.out / "model_index.json")


def save_part(model, folder, folder_name, config):
    """Writes config.json and the model's weights in fp16, under the folder layout's names."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {folder_name(key): tensor.half() for key, tensor in model.state_dict().items()}
    # the folder layout holds the autoencoder's attention as linear layers, not 1x1 convolutions
    tensors = {name: tensor.flatten(1) if re.search(r"\.to_\w+(\.0)?\.weight", name) else tensor
               for name, tensor in tensors.items()}
    weights.save(tensors, folder / "diffusion_pytorch_model.safetensors", dict(format="pt"))
    weights.write_json(config, folder / "config.json")


STAGES = {"clip": CLIPStage, "vae": VAEStage, "unet": UNetStage}


def rate_factor(step, share_used):
    """Returns what the learning rate is multiplied by: a short warm-up, then 1, then a descent."""
    return min(1.0, (step + 1) / 200) * min(1.0, max(0.0, 1 - share_used) / COOLDOWN)


def train(stage, args):
    """Trains until the budget is used up; returns the moving average of the model."""
    folder = args.work / args.stage
    folder.mkdir(parents=True, exist_ok=True)
    model = stage.model.to(args.device, memory_format=torch.channels_last).train()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.rate, betas=(0.9, 0.99),
                                  weight_decay=0.01, fused=True)
    step, used = 0, 0.0
    modules, checkpoint = dict(model=model, ema=ema), folder / "checkpoint.safetensors"
    if checkpoint.exists():
        facts = weights.load_training(checkpoint, modules, "model", optimizer)
        step, used = facts["step"], facts["seconds"]
        print(f"resumed at step {step}, {used / 60:.1f} min used")
    budget = args.minutes * 60
    start = last_save = time.monotonic()
    average, bar = None, tqdm(desc=args.stage, initial=step, unit="step", mininterval=5)

    def seconds():
        return used + time.monotonic() - start

    def save_and_log():
        weights.save_training(checkpoint, modules, "model", optimizer,
                              dict(step=step, seconds=seconds()))
        row = dict(step=step, minutes=round(seconds() / 60, 2), images=step * stage.batch,
                   loss=average, **stage.evaluate(ema))
        with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        bar.write(json.dumps(row))

    while seconds() < budget and step < args.steps:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * rate_factor(step, seconds() / budget)
        loss = stage.loss(generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(EMA_DECAY, step / (step + 10))
        with torch.no_grad():       # else every average would hold on to the one before
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        if step % 20 == 0:
            average = loss.item() if average is None else 0.9 * average + 0.1 * loss.item()
            bar.update(20)
            bar.set_postfix(loss=f"{average:.4f}")
        if time.monotonic() - last_save > SAVE_SECONDS:
            save_and_log()
            last_save = time.monotonic()
    save_and_log()
    return ema


def main():
    """Trains one stage and writes its part of the SD folder."""
    parser = Parser(__doc__)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="budget of the stage")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps")
    parser.add_argument("--pool", type=int, default=32_000, help="training pictures composed")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="the SD folder")
    parser.add_argument("--init", metavar="PATH", help="SD folder whose U-Net to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_device()
    args = parser.parse_args()
    torch.manual_seed(args.seed)            # the initial weights
    stage = STAGES[args.stage](args)
    stage.export(train(stage, args))
    print(f"wrote the {args.stage} stage's part of {args.out}")


if __name__ == "__main__":
    run(main, interrupted="interrupted; the same command goes on from the last checkpoint")
