"""Trains a stage of the embedded base: the small CLIP, then the autoencoder, then the U-Net.

    python -m tiny.pretrain --stage vae --minutes 60

It runs on CPU or GPU, resumes from tiny/work by itself, appends held-out numbers to
tiny/work/STAGE/log.jsonl, and writes its part of the SD folder tiny/model at the end. `--minutes`
is the budget of the stage, all its runs together; the learning rate falls to zero over the last
quarter of it. All randomness is a function of (seed, step).

Shapes: B batch, H W rows and columns of the image.
"""
import copy
import json
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import nn
from tqdm import tqdm

import clip
import weights
from diffusion import NoiseSchedule
from inputs import checkpoints
from inputs.options import BASE, Parser, positive, run, seed_number
from tiny import world
from tiny.classifier import BATCH, CLIPScore, save_score
from unet import ResBlock, SpatialTransformer, UNet, UNetConfig, load_unet
from vae import AutoencoderKL, VAEConfig, load_vae

EMA_DECAY = 0.9995
WARM_UP_STEPS = 200
COOLDOWN = 0.25             # share of the budget over which the learning rate falls to zero
SAVE_SECONDS = 120          # between two checkpoints
VOCAB_SIZE = 3000           # at most; the captions have fewer words
IMAGE_WIDTHS = (32, 64, 128, 192)
KL_WEIGHT = 1e-4            # weight of the mean over latent elements: keeps the latents smooth
HELD_OUT = 256              # pictures to evaluate with


def compose(rows, seeds):
    """Returns (pictures (n, 3, 64, 64) uint8, captions), each a function of its own seed."""
    images, captions = zip(*(world.random_picture(rows, np.random.default_rng(seed))
                             for seed in seeds))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), list(captions)


def make_pool(split, count, seed):
    """Returns (pictures (count, 3, 64, 64) uint8, captions) composed of a split's pool."""
    return compose(world.pool(split),
                   tqdm([(seed, i) for i in range(count)], desc=f"{split} pictures", leave=False))


def to_batch(pictures, device):
    """Returns images (B, 3, H, W) in [-1, 1] of uint8 pictures."""
    x = pictures.to(device).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def encode_means(vae, x):
    """Returns the mean latents of images x, a part at a time."""
    return torch.cat([vae.encode(part).mean for part in x.split(BATCH)])


def decoder_errors(vae, z, x):
    """Returns what images x and their decoded latents z differ by: (PSNR in dB, L1).

    PSNR is taken over the mean squared error of all images.
    """
    decoded = torch.cat([vae.decode(part) for part in z.split(BATCH)]).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (decoded - x).square().mean())
    return psnr.item(), (decoded - x).abs().mean().item()


class VAEStage:
    """The autoencoder: L1 and squared error, and a light pull of the latents to the unit normal."""
    batch, rate = 8, 1e-3

    def __init__(self, args):
        self.args = args
        self.pool, _ = make_pool("train", args.pool, args.seed)
        self.held_out, _ = make_pool("val", HELD_OUT, args.seed + 1)
        self.model = AutoencoderKL(VAEConfig(channels=(16, 32, 64), blocks_per_level=1,
                                             norm_groups=8, scaling_factor=1.0))

    def loss(self, generator):
        """Returns the loss of a batch drawn with the generator."""
        indices = torch.randint(len(self.pool), (self.batch,), generator=generator)
        x = to_batch(self.pool[indices], self.args.device)
        mean, std = self.model.encode(x)
        noise = torch.randn(mean.shape, generator=generator).to(x)
        error = self.model.decode(mean + std * noise) - x
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * kl

    @torch.inference_mode()
    def evaluate(self, model):
        """Returns PSNR (dB) and L1 over held-out pictures, and the latents' standard deviation."""
        x = to_batch(self.held_out, self.args.device)
        z = encode_means(model, x)
        psnr, l1 = decoder_errors(model, z, x)
        return dict(psnr=psnr, l1=l1, latent_std=z.std().item())

    @torch.inference_mode()
    def export(self, model):
        """Writes vae/ of the model folder, with the factor that gives latents unit variance."""
        z = encode_means(model, to_batch(self.pool[:2048], self.args.device))
        model.config = replace(model.config, scaling_factor=round(1 / z.std().item(), 4))
        save_vae(model, self.args.out / "vae")


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
    normalizer, splitter = clip.split_words()
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
    """Returns the tuple of tokens, in which each occurrence of the pair, from the left, is one."""
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
    tokens = alphabet + [token + "</w>" for token in alphabet] + list(map("".join, merges))
    tokens = [*dict.fromkeys(tokens), clip.BEGIN, clip.END]
    vocab = {token: i for i, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    weights.write_json(vocab, folder / "vocab.json")
    weights.write_text("#version: 0.2\n" + "".join(
        f"{left} {right}\n" for left, right in merges), folder / "merges.txt")
    weights.write_json(dict(
        tokenizer_class="CLIPTokenizer", model_max_length=clip.CONTEXT_LENGTH,
        add_prefix_space=False, do_lower_case=True, errors="replace", bos_token=clip.BEGIN,
        eos_token=clip.END, unk_token=clip.END, pad_token=clip.END),
        folder / "tokenizer_config.json")


class CLIPStage:
    """Text and image tower, contrastively (arXiv 2103.00020): each caption finds its picture."""
    batch, rate = 128, 5e-4

    def __init__(self, args):
        self.args = args
        self.rows = world.pool("train")
        self.held_out, held_out_captions = make_pool("val", HELD_OUT, args.seed + 1)
        if not (args.out / "tokenizer" / "vocab.json").exists():
            train_tokenizer(make_pool("train", args.pool, args.seed)[1], args.out / "tokenizer")
        self.tokenizer = clip.load_tokenizer(args.out / "tokenizer")
        self.held_out_ids = self.tokenizer(held_out_captions)
        config = clip.CLIPTextConfig(width=128, layers=3, heads=4,
                                     vocab_size=self.tokenizer.end + 1)
        self.model = CLIPScore(random_init(clip.CLIPTextModel(config)), IMAGE_WIDTHS, 128)

    def logits(self, model, x, ids):
        """Returns scaled cosines (B, B) between images x (rows) and captions (columns)."""
        end = self.tokenizer.end
        length = int((ids == end).int().argmax(dim=1).max()) + 1        # the rest is padding
        images = model.embed_image(x)
        texts = model.embed_text(ids[:, :length].to(self.args.device), end)
        return model.logit_scale.clamp(max=4.6).exp() * images @ texts.T

    def loss(self, generator):
        """Returns the symmetric cross-entropy of a batch composed anew for this step."""
        seed = torch.randint(2**31, (), generator=generator).item()
        pictures, captions = compose(self.rows, [(seed, slot) for slot in range(self.batch)])
        x = augment(to_batch(pictures, self.args.device), generator)
        logits = self.logits(self.model, x, self.tokenizer(captions))
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    @torch.inference_mode()
    def evaluate(self, model):
        """Returns how often a held-out picture finds its caption among all of them."""
        x = to_batch(self.held_out, self.args.device)
        nearest = self.logits(model, x, self.held_out_ids).argmax(dim=1).cpu()
        return dict(retrieval_of_256=(nearest == torch.arange(len(nearest))).float().mean().item())

    def export(self, model):
        """Writes text_encoder/ and the scores' part of the model folder."""
        save_text_encoder(model.text_model, self.args.out / "text_encoder")
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
        tokenizer, text_model = clip.load_clip(args.out, device=args.device)
        self.pool = self.encode(vae, tokenizer, text_model, "train", args.pool, args.seed)
        self.held_out = self.encode(vae, tokenizer, text_model, "val", HELD_OUT, args.seed + 1)
        self.empty = text_model(tokenizer([""]).to(args.device)).cpu()
        self.model = load_unet(args.init).requires_grad_(True) if args.init else zero_last_layers(
            UNet(UNetConfig(channels=(64, 128, 192), attention=(False, True, True),
                            heads=(4, 4, 4), blocks_per_level=1, context_dim=128,
                            sample_size=world.SIZE // 4)))

    @torch.inference_mode()
    def encode(self, vae, tokenizer, text_model, split, count, seed):
        """Returns (mean, std, context) in fp16 of all pictures of a split, each computed once."""
        pictures, captions = make_pool(split, count, seed)
        latents, context = [], []
        for i in tqdm(range(0, count, 64), desc=f"{split} latents", leave=False):
            latents.append(vae.encode(to_batch(pictures[i:i + 64], self.args.device)))
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
        t = torch.arange(HELD_OUT) * 1000 // HELD_OUT       # picture i at its own t
        error = torch.cat([self.eps_error(model, self.held_out, i, t[i], generator).cpu()
                           for i in torch.arange(HELD_OUT).split(64)])
        return dict(held_out=error.mean().item(),
                    held_out_quarters=error.view(4, -1).mean(dim=1).tolist())

    def export(self, model):
        """Writes unet/, scheduler/ and model_index.json of the model folder."""
        save_unet(model, self.args.out / "unet")
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


def save_part(model, folder, folder_name, config, dtype=torch.float16,
              stem=checkpoints.UNET_STEM):
    """Writes config.json and the model's weights, under the folder layout's names."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {folder_name(key): tensor.to(dtype) for key, tensor in model.state_dict().items()}
    # the folder layout holds the autoencoder's attention as linear layers, not 1x1 convolutions
    tensors = {name: tensor.flatten(1) if re.search(r"\.to_\w+(\.0)?\.weight", name) else tensor
               for name, tensor in tensors.items()}
    weights.save(tensors, folder / f"{stem}.safetensors", dict(format="pt"))
    weights.write_json(config, folder / "config.json")


def save_text_encoder(text_model, folder, dtype=torch.float16):
    """Writes the text_encoder/ of an SD folder."""
    config = text_model.config
    end = config.vocab_size - 1
    save_part(text_model, folder, "text_model.{}".format, dict(
        architectures=["CLIPTextModel"], model_type="clip_text_model", hidden_size=config.width,
        intermediate_size=config.width * 4, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, max_position_embeddings=clip.CONTEXT_LENGTH,
        vocab_size=config.vocab_size, hidden_act=config.activation, projection_dim=config.width,
        layer_norm_eps=1e-5, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
        torch_dtype="float32"), dtype, checkpoints.TEXT_STEM)


def save_vae(vae, folder, dtype=torch.float16):
    """Writes the vae/ of an SD folder."""
    config = vae.config
    levels = len(config.channels)
    save_part(vae, folder, lambda key: checkpoints.vae_folder_name(key, levels), dict(
        _class_name="AutoencoderKL", in_channels=3, out_channels=3,
        latent_channels=config.latent_channels, block_out_channels=config.channels,
        act_fn="silu", layers_per_block=config.blocks_per_level,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, norm_num_groups=config.norm_groups,
        scaling_factor=config.scaling_factor), dtype)


def save_unet(unet, folder, dtype=torch.float16):
    """Writes the unet/ of an SD folder; without a sample_size, that of SD 1.5 is written."""
    config = unet.config
    kinds = ["CrossAttn" if attention else "" for attention in config.attention]
    save_part(unet, folder,
              lambda key: checkpoints.unet_folder_name(key, config.blocks_per_level), dict(
                  _class_name="UNet2DConditionModel", sample_size=config.sample_size or 64,
                  in_channels=config.latent_channels, out_channels=config.latent_channels,
                  block_out_channels=config.channels, layers_per_block=config.blocks_per_level,
                  down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
                  up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
                  attention_head_dim=config.heads, cross_attention_dim=config.context_dim,
                  norm_num_groups=config.norm_groups), dtype)


STAGES = {"clip": CLIPStage, "vae": VAEStage, "unet": UNetStage}


def train(stage, args):
    """Trains until the budget is used up; returns the moving average of the model."""
    folder = args.work / args.stage
    folder.mkdir(parents=True, exist_ok=True)
    model = stage.model.to(args.device, memory_format=torch.channels_last).train()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.rate, betas=(0.9, 0.99),
                                  weight_decay=0.01, fused=True)
    facts = dict(step=0, seconds=0.0)
    modules = dict(model=model, ema=ema)
    checkpoint = folder / "checkpoint.safetensors"
    if checkpoint.exists():
        facts = weights.load_training(checkpoint, modules, "model", optimizer)
        print(f"resumed at step {facts['step']}, after {facts['seconds'] / 60:.1f} min")
    step = facts["step"]
    budget = args.minutes * 60
    start = last_save = time.monotonic()
    average = None
    bar = tqdm(desc=args.stage, initial=step, unit="step", mininterval=5)

    def seconds():
        return facts["seconds"] + time.monotonic() - start

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
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        cool_down = min(1.0, max(0.0, 1 - seconds() / budget) / COOLDOWN)
        optimizer.param_groups[0]["lr"] = stage.rate * warm_up * cool_down
        loss = stage.loss(generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(EMA_DECAY, step / (step + 10))
        with torch.no_grad():       # otherwise each average would keep the one before in memory
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
    add = parser.add_argument
    add("--stage", choices=STAGES, required=True)
    add("--minutes", type=float, default=60.0, help="budget of the stage (default: %(default)s)")
    add("--steps", type=positive, default=10**9, help="stop after this many steps (default: never)")
    add("--pool", type=positive, default=32_000, help="training pictures (default: %(default)s)")
    add("--work", type=Path, default=BASE.parent / "work", help="checkpoints (default: tiny/work)")
    add("--out", type=Path, default=BASE, help="SD folder (default: tiny/model)")
    add("--init", metavar="PATH", help="SD folder whose U-Net the training starts from")
    add("--seed", type=seed_number, default=0, help="(default: %(default)s)")
    parser.add_device()
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes}: allowed is more than 0")
    torch.manual_seed(args.seed)            # the initial weights
    stage = STAGES[args.stage](args)
    stage.export(train(stage, args))
    print(f"wrote the {args.stage} stage's part of {args.out}")


if __name__ == "__main__":
    run(main, interrupted="interrupted; the same command goes on from the last checkpoint")
