"""Trains a stage of the embedded base: the autoencoder, the small CLIP, then the U-Net.

    python -m tiny.make_data --pool 60000
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
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm

import clip
import weights
from bps import make_denoiser
from diffusion import NoiseSchedule, draw_noise, sample
from inputs import checkpoints
from inputs.checkpoints import load_clip, load_tokenizer, load_unet, load_vae
from inputs.conditions import to_x
from inputs.files import fingerprint, write_json, write_text
from inputs.options import BASE, Parser, positive, run_script, seed_number
from measure.report import contact_sheet
from tiny import world
from tiny.clip_score import BATCH, CLIPScore, save_score
from unet import ResBlock, SpatialTransformer, UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

EMA_DECAY = 0.9995
WARM_UP_STEPS = 200
COOLDOWN = 0.25             # share of the budget over which the learning rate falls to zero
SAVE_SECONDS = 240          # between two checkpoints
SHEET_SECONDS = 1800        # between two sheets of pictures that the U-Net draws
SHEET_ROWS = 24
VOCAB_SIZE = 3000           # at most; the captions have fewer words
IMAGE_WIDTHS = (32, 64, 128, 192)
KL_WEIGHT = 1e-4            # weight of the mean over latent elements: keeps the latents smooth
HELD_OUT_T = 16             # timesteps per held-out figure
FORMAT = torch.channels_last


def load_pool(work):
    """(pictures (N, 64, 64, 3) uint8, mapped from the file; rows) that make_data --pool wrote."""
    folder = work / "pool"
    if not (folder / "pictures.npy").is_file():
        raise weights.UserError(f"{folder} has no pictures. Run `python -m tiny.make_data --pool "
                                f"60000` first.")
    rows = list(map(json.loads, (folder / "figures.jsonl").read_text("utf-8").splitlines()))
    return np.load(folder / "pictures.npy", mmap_mode="r"), rows


def held_out_pictures(split="val"):
    """Images (n, 3, 64, 64) in [-1, 1] and rows of a split that no part of the base learns from."""
    rows = world.figures(split)
    return torch.stack([to_x(world.open_part("picture", row["name"])) for row in rows]), rows


def to_batch(pictures, device):
    """Images (B, 3, H, W) in [-1, 1] of uint8 pictures (B, H, W, 3)."""
    x = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
    return (x.to(device).float() / 127.5 - 1).contiguous(memory_format=FORMAT)


def attend_in_fp32(q, k, v, attend=F.scaled_dot_product_attention):
    """Attention computed in fp32: its backward pass in bf16 takes nine times as long on a CPU."""
    with torch.autocast(q.device.type, enabled=False):
        return attend(q.float(), k.float(), v.float()).to(q.dtype)


def accelerate(function, args, compile=True):
    """The function in bf16 where `--fast` asks for it, and compiled.

    Compiled for the CPU in bf16, the autoencoder's gradients are wrong in PyTorch 2.13 (the cosine
    to those in fp32 is 0.2, while the U-Net's is above 0.999), so it is not compiled.
    """
    if not args.fast:
        return function
    if compile:
        function = torch.compile(function, dynamic=False)

    def call(*inputs):
        with torch.autocast(args.device.partition(":")[0], torch.bfloat16), mock.patch.object(
                F, "scaled_dot_product_attention", attend_in_fp32):
            return function(*inputs)
    return call


def encode_means(vae, x):
    """The mean latents of images x, a part at a time."""
    return torch.cat([vae.encode(part).mean for part in x.split(BATCH)])


def decoder_errors(vae, z, x):
    """What images x and their decoded latents z differ by: (PSNR in dB, L1).

    PSNR is taken over the mean squared error of all images.
    """
    decoded = torch.cat([vae.decode(part) for part in z.split(BATCH)]).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (decoded - x).square().mean())
    return psnr.item(), (decoded - x).abs().mean().item()


class VAEStage:
    """The autoencoder: L1 and squared error, and a light pull of the latents to the unit normal."""
    batch, rate = 16, 1e-3

    def __init__(self, args):
        self.args = args
        self.pictures, _ = load_pool(args.work)
        self.held_out, _ = held_out_pictures()
        self.model = (load_vae(args.init).requires_grad_(True) if args.init else
                      AutoencoderKL(VAEConfig(channels=(32, 64, 128), blocks_per_level=1,
                                              norm_groups=8, scaling_factor=1.0)))
        self.reconstruct = accelerate(self.reconstruct_noisy, args, compile=False)

    def reconstruct_noisy(self, x, noise):
        """(decoded latents, their mean, their std) of images x; noise is standard normal."""
        mean, std = self.model.encode(x)
        return self.model.decode(mean + std * noise), mean, std

    def loss(self, generator):
        """The loss of a batch drawn with the generator."""
        indices = torch.randint(len(self.pictures), (self.batch,), generator=generator)
        x = to_batch(self.pictures[indices], self.args.device)
        side = world.SIZE // self.model.factor
        noise = torch.randn(self.batch, self.model.config.latent_channels, side, side,
                            generator=generator).to(x)
        decoded, mean, std = map(torch.Tensor.float, self.reconstruct(x, noise))
        error = decoded - x
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * kl

    @torch.inference_mode()
    def evaluate(self, model):
        """PSNR (dB) and L1 over held-out pictures, and the latents' standard deviation."""
        x = self.held_out.to(self.args.device)
        z = encode_means(model, x)
        psnr, l1 = decoder_errors(model, z, x)
        return dict(psnr=psnr, l1=l1, latent_std=z.std().item())

    @torch.inference_mode()
    def export(self, model):
        """Write vae/ of the model folder, with the factor that gives latents unit variance."""
        model.config = replace(model.config, scaling_factor=1.0)
        z = encode_means(model, to_batch(self.pictures[:2048], self.args.device))
        model.config = replace(model.config, scaling_factor=round(1 / z.std().item(), 4))
        save_vae(model, self.args.out / "vae")


def random_init(module):
    """The module with linear and embedding weights drawn as CLIP draws them: small."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            nn.init.normal_(layer.weight, std=0.02)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return module


def augment(x, generator):
    """Images (B, 3, H, W), each scaled, moved and tinted a little at random.

    Without this the image tower would learn the training figures by heart. Gentle enough that
    colours keep their names.
    """
    def uniform(most, *shape):
        return most * (2 * torch.rand(len(x), *shape, generator=generator) - 1)

    zoom, move = 1 + uniform(0.1), uniform(0.1, 2, 1)
    zero = torch.zeros_like(zoom)
    scale = torch.stack([torch.stack([zoom, zero], 1), torch.stack([zero, zoom], 1)], 1)
    affine = torch.cat([scale, move], dim=2).to(x)                             # (B, 2, 3)
    moved = F.grid_sample(x, F.affine_grid(affine, x.shape, align_corners=False),
                          padding_mode="border", align_corners=False)
    return (moved + uniform(0.05, 3, 1, 1).to(x)).clamp(-1, 1)


def train_tokenizer(captions, folder):
    """Learns a BPE of at most VOCAB_SIZE tokens and writes it in CLIP's file format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = clip.split_words()
    bpe.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2 * len(alphabet) - 2, end_of_word_suffix="</w>",
        show_progress=False))
    merges = json.loads(bpe.to_str())["model"]["merges"]
    tokens = alphabet + [token + "</w>" for token in alphabet] + list(map("".join, merges))
    tokens = [*dict.fromkeys(tokens), clip.BEGIN, clip.END]
    folder.mkdir(parents=True, exist_ok=True)
    write_json({token: i for i, token in enumerate(tokens)}, folder / "vocab.json")
    write_text("#version: 0.2\n" + "".join(
        f"{left} {right}\n" for left, right in merges), folder / "merges.txt")
    write_json(dict(
        tokenizer_class="CLIPTokenizer", model_max_length=clip.CONTEXT_LENGTH,
        add_prefix_space=False, do_lower_case=True, errors="replace", bos_token=clip.BEGIN,
        eos_token=clip.END, unk_token=clip.END, pad_token=clip.END),
        folder / "tokenizer_config.json")


def draw_captions(rows, seed):
    """A random caption of each figure, a function of the seed and the figure's place."""
    return [world.vary_caption(row, np.random.default_rng((seed, i)))
            for i, row in enumerate(rows)]


class CLIPStage:
    """Text and image tower, contrastively (arXiv 2103.00020): each caption finds its picture."""
    batch, rate = 128, 5e-4

    def __init__(self, args):
        self.args = args
        self.pictures, self.rows = load_pool(args.work)
        self.held_out, held_out_rows = held_out_pictures("test")
        if not (args.out / "tokenizer" / "vocab.json").exists():
            train_tokenizer(map(world.full_caption, self.rows), args.out / "tokenizer")
        self.tokenizer = load_tokenizer(args.out / "tokenizer")
        self.held_out_ids = self.tokenizer(list(map(world.full_caption, held_out_rows)))
        self.styles = torch.tensor([list(world.STYLES).index(row["style"])
                                    for row in held_out_rows])
        self.style_ids = self.tokenizer(world.style_captions())
        config = clip.CLIPTextConfig(width=128, layers=3, heads=4,
                                     vocab_size=self.tokenizer.end + 1)
        self.model = CLIPScore(random_init(clip.CLIPTextModel(config)), IMAGE_WIDTHS, 128)

    def logits(self, model, x, ids):
        """Scaled cosines (B, n) between images x (B, ..) and captions' ids (n, 77)."""
        end = self.tokenizer.end
        length = int((ids == end).int().argmax(dim=1).max()) + 1        # the rest is padding
        images = model.embed_image(x)
        texts = model.embed_text(ids[:, :length].to(self.args.device), end)
        return model.logit_scale.clamp(max=4.6).exp() * images @ texts.T

    def loss(self, generator):
        """The symmetric cross-entropy of a batch of figures, with captions made for this step."""
        indices = torch.randint(len(self.rows), (self.batch,), generator=generator)
        seed = torch.randint(2**31, (), generator=generator).item()
        captions = draw_captions([self.rows[i] for i in indices], seed)
        x = augment(to_batch(self.pictures[indices], self.args.device), generator)
        logits = self.logits(self.model, x, self.tokenizer(captions))
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    @torch.inference_mode()
    def evaluate(self, model):
        """How often a held-out picture finds its caption among all of them, and its style."""
        x = self.held_out.to(self.args.device)
        found = self.logits(model, x, self.held_out_ids).argmax(dim=1).cpu()
        style = self.logits(model, x, self.style_ids).argmax(dim=1).cpu()
        return dict(retrieval=(found == torch.arange(len(found))).float().mean().item(),
                    style=(style == self.styles).float().mean().item())

    def export(self, model):
        """Write text_encoder/ and the scores' part of the model folder."""
        save_text_encoder(model.text_model, self.args.out / "text_encoder")
        save_score(model, self.args.out / "clip_score.safetensors")


def zero_last_layers(unet):
    """The U-Net whose residual branches end in zeros, as SD's training starts."""
    for module in unet.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.out_layers[-1].weight)
        elif isinstance(module, SpatialTransformer):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(unet.out[-1].weight)
    return unet


def min_snr_weights(schedule, gamma):
    """Loss weights (1000,) with mean 1: min(snr, gamma) / snr, so that clean steps count less.

    Source: arXiv 2303.09556.
    """
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    loss_weights = (snr.clamp(max=gamma) / snr).float()
    return loss_weights / loss_weights.mean()


class UNetStage:
    """The noise predictor on cached latents, with the frozen text tower and 10 % empty prompts."""
    batch, rate = 64, 8e-4
    empty_share = 0.1

    def __init__(self, args):
        self.args = args
        self.schedule = NoiseSchedule()
        self.loss_weights = min_snr_weights(self.schedule, gamma=5.0)
        self.vae = load_vae(args.out, device=args.device)
        self.tokenizer, self.text_model = load_clip(args.out, device=args.device)
        pictures, self.rows = load_pool(args.work)
        self.mean, self.std = self.encode_pool(pictures)
        x, self.held_out_rows = held_out_pictures()
        with torch.inference_mode():
            self.held_out = encode_means(self.vae, x.to(args.device)).cpu()
        self.model = load_unet(args.init).requires_grad_(True) if args.init else zero_last_layers(
            UNet(UNetConfig(channels=(64, 128, 192), attention=(False, True, True),
                            heads=(4, 4, 4), blocks_per_level=1, context_dim=128,
                            sample_size=world.SIZE // self.vae.factor)))
        self.predict = accelerate(self.model, args)

    @torch.inference_mode()
    def encode_pool(self, pictures):
        """Mean and std of all latents, (N, 4, 16, 16) fp16 each, computed once and kept in work."""
        file = next((self.args.out / "vae").glob("*.safetensors"))
        cache = self.args.work / f"latents-{len(pictures)}-{fingerprint(file)}.npz"
        if not cache.is_file():
            encode = accelerate(self.vae.encode, self.args, compile=False)
            latents = [encode(to_batch(pictures[i:i + BATCH], self.args.device))
                       for i in tqdm(range(0, len(pictures), BATCH), desc="latents")]
            with weights.replacing(cache) as temporary:
                np.savez(temporary, mean=torch.cat([z.mean for z in latents]).half().cpu(),
                         std=torch.cat([z.std for z in latents]).half().cpu())
        stored = np.load(cache)
        return torch.from_numpy(stored["mean"]), torch.from_numpy(stored["std"])

    @torch.no_grad()
    def encode(self, captions):
        """Text states (B, 77, 128) of captions."""
        return self.text_model(self.tokenizer(captions).to(self.args.device))

    def noisy(self, z, t, generator):
        """(z_t, noise) of latents z at timesteps t (B,)."""
        noise = torch.randn(z.shape, generator=generator)
        z_t = self.schedule.add_noise(z, noise, t).contiguous(memory_format=FORMAT)
        return z_t.to(self.args.device), noise.to(self.args.device)

    def loss(self, generator):
        """The loss of a batch drawn with the generator, t uniform in 0..999."""
        indices = torch.randint(len(self.rows), (self.batch,), generator=generator)
        t = torch.randint(self.schedule.timesteps, (self.batch,), generator=generator)
        seed = torch.randint(2**31, (), generator=generator).item()
        mean, std = self.mean[indices].float(), self.std[indices].float()
        z = mean + std * torch.randn(mean.shape, generator=generator)
        z_t, noise = self.noisy(z, t, generator)
        captions = draw_captions([self.rows[i] for i in indices], seed)
        for i in range(round(self.empty_share * self.batch)):
            captions[i] = ""
        eps = self.predict(z_t, t.to(self.args.device), self.encode(captions)).float()
        error = (eps - noise).square().mean(dim=(1, 2, 3))
        return (self.loss_weights[t].to(error) * error).mean()

    @torch.inference_mode()
    def evaluate(self, model):
        """The held-out loss, all and in quarters of the t range, always with the same noise."""
        generator = torch.Generator().manual_seed(self.args.seed)
        context = self.encode(list(map(world.full_caption, self.held_out_rows)))
        step, errors = self.schedule.timesteps // HELD_OUT_T, []
        for k in range(HELD_OUT_T):
            t = torch.full((len(self.held_out),), k * step + step // 2)
            z_t, noise = self.noisy(self.held_out, t, generator)
            errors.append((model(z_t, t.to(z_t.device), context) - noise).square().mean().cpu())
        errors = torch.stack(errors)
        return dict(held_out=errors.mean().item(),
                    held_out_quarters=errors.view(4, -1).mean(dim=1).tolist())

    @torch.inference_mode()
    def draw_sheet(self, model, file):
        """Write held-out pictures beside what the model draws from their captions."""
        rows = self.held_out_rows[:SHEET_ROWS]
        captions = list(map(world.full_caption, rows))
        denoise = make_denoiser(model, self.encode(captions), self.encode([""]), 3.0)
        noise = draw_noise(range(len(rows)), self.held_out.shape[1:]).to(self.args.device)
        for z in sample(denoise, noise, self.schedule, steps=20, sampler="dpm++2m"):
            pass
        true = self.vae.decode(self.held_out[:SHEET_ROWS].to(z))
        contact_sheet([true, self.vae.decode(z)], ["true picture", "drawn"], captions, file)

    def export(self, model):
        """Write unet/, scheduler/ and model_index.json of the model folder."""
        save_unet(model, self.args.out / "unet")
        (self.args.out / "scheduler").mkdir(exist_ok=True)
        scheduler = dict(_class_name="DDIMScheduler", beta_schedule="scaled_linear",
                         beta_start=self.schedule.beta_start, beta_end=self.schedule.beta_end,
                         num_train_timesteps=self.schedule.timesteps, steps_offset=1,
                         clip_sample=False, set_alpha_to_one=False, prediction_type="epsilon")
        write_json(scheduler, self.args.out / "scheduler" / "scheduler_config.json")
        index = dict(_class_name="StableDiffusionPipeline", _diffusers_version="0.30.0",
                     unet=["diffusers", "UNet2DConditionModel"],
                     vae=["diffusers", "AutoencoderKL"],
                     text_encoder=["transformers", "CLIPTextModel"],
                     tokenizer=["transformers", "CLIPTokenizer"],
                     scheduler=["diffusers", "DDIMScheduler"], safety_checker=[None, None],
                     feature_extractor=[None, None], image_encoder=[None, None],
                     requires_safety_checker=False)
        write_json(index, self.args.out / "model_index.json")


def save_part(model, folder, folder_name, config, dtype=torch.float16,
              stem=checkpoints.UNET_STEM):
    """Write config.json and the model's weights, under the folder layout's names."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {folder_name(key): tensor.to(dtype) for key, tensor in model.state_dict().items()}
    # the folder layout holds the autoencoder's attention as linear layers, not 1x1 convolutions
    tensors = {name: tensor.flatten(1) if re.search(r"\.to_\w+(\.0)?\.weight", name) else tensor
               for name, tensor in tensors.items()}
    weights.save(tensors, folder / f"{stem}.safetensors", dict(format="pt"))
    write_json(config, folder / "config.json")


def save_text_encoder(text_model, folder, dtype=torch.float16):
    """Write the text_encoder/ of an SD folder."""
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
    """Write the vae/ of an SD folder."""
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
    """Write the unet/ of an SD folder; without a sample_size, that of SD 1.5 is written."""
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
    """Train until the budget is used up; returns the moving average of the model."""
    folder = args.work / args.stage
    folder.mkdir(parents=True, exist_ok=True)
    model = stage.model.to(args.device, memory_format=FORMAT).train()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.rate, betas=(0.9, 0.99),
                                  weight_decay=0.01, fused=True)
    progress = dict(step=0, seconds=0.0)
    modules = dict(model=model, ema=ema)
    checkpoint = folder / "checkpoint.safetensors"
    if checkpoint.exists():
        progress = weights.load_training(checkpoint, modules, "model", optimizer)
        print(f"resumed at step {progress['step']}, after {progress['seconds'] / 60:.1f} min")
    step = progress["step"]
    budget = args.minutes * 60
    start = last_save = last_sheet = time.monotonic()
    average = None
    bar = tqdm(desc=args.stage, initial=step, unit="step", mininterval=5)

    def seconds():
        return progress["seconds"] + time.monotonic() - start

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
        if time.monotonic() - last_sheet > SHEET_SECONDS and hasattr(stage, "draw_sheet"):
            stage.draw_sheet(ema, folder / f"drawn-{step:07d}.png")
            last_sheet = time.monotonic()
    save_and_log()
    return ema


def main():
    """Train one stage and writes its part of the SD folder."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--stage", choices=STAGES, required=True)
    add("--minutes", type=float, default=60.0, help="budget of the stage (default: %(default)s)")
    add("--steps", type=positive, default=10**9, help="stop after this many steps (default: never)")
    add("--work", type=Path, default=BASE.parent / "work", help="checkpoints (default: tiny/work)")
    add("--out", type=Path, default=BASE, help="SD folder (default: tiny/model)")
    add("--init", metavar="PATH", help="SD folder whose autoencoder or U-Net to start from")
    add("--fast", action="store_true", help="compute in bf16 and compile (needs a C++ compiler): "
        "1.9 times faster on CPUs with AMX")
    add("--seed", type=seed_number, default=0, help="(default: %(default)s)")
    parser.add_device()
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f"--minutes must be greater than 0, got {args.minutes}.")
    torch.manual_seed(args.seed)            # the initial weights
    stage = STAGES[args.stage](args)
    stage.export(train(stage, args))
    print(f"wrote the {args.stage} stage's part of {args.out}")


if __name__ == "__main__":
    run_script(main, interrupted="interrupted; the same command resumes from the last checkpoint")
