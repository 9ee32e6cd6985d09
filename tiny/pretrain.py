"""Trains a stage of the embedded base: the autoencoder, the small CLIP, then the U-Net.

    python -m tiny.make_data --pool 60000
    python -m tiny.pretrain --stage vae --minutes 60

It runs on CPU or GPU, resumes from tiny/work by itself, appends held-out numbers to
tiny/work/STAGE/log.jsonl, draws a sheet of held-out captions every half hour of the U-Net's
training, and writes its part of the SD folder tiny/model at the end. `--minutes` is the budget of
the stage, all its runs together; the learning rate falls to zero over the last quarter of it. All
randomness is a function of (seed, step). The sizes of the networks are those of the config.json
files in tiny/model.

Shapes: B batch, H W rows and columns of the image.
"""
import copy
import json
import re
import time
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
from inputs.checkpoints import load_clip, load_tokenizer, load_vae
from inputs.conditions import to_x
from inputs.files import fingerprint, read_json, write_json, write_text
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
KL_WEIGHT = 1e-4            # weight of the mean over latent elements: keeps the latents smooth
EMPTY_SHARE = 0.1           # of the U-Net's prompts
HELD_OUT_T = 16             # timesteps per held-out figure
FORMAT = torch.channels_last


# ---- data and speed ------------------------------------------------------------------------

def load_pool(work):
    """(pictures (N, 64, 64, 3) uint8, mapped from the file; rows) that make_data --pool wrote."""
    folder = work / "pool"
    if not (folder / "pictures.npy").is_file():
        raise weights.UserError(f"{folder} has no pictures. Run `python -m tiny.make_data --pool "
                                f"60000` first.")
    rows = list(map(json.loads, (folder / "figures.jsonl").read_text("utf-8").splitlines()))
    return np.load(folder / "pictures.npy", mmap_mode="r"), rows


def true_pictures(figures):
    """Images (n, 3, 64, 64) in [-1, 1] of figures of the tasks."""
    return torch.stack([to_x(world.open_part("picture", row["name"])) for row in figures])


def to_batch(pictures, device):
    """Images (B, 3, H, W) in [-1, 1] of uint8 pictures (B, H, W, 3)."""
    x = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
    return (x.to(device).float() / 127.5 - 1).contiguous(memory_format=FORMAT)


def draw_captions(rows, seed):
    """A random caption of each figure, a function of the seed and the figure's place."""
    return [world.vary_caption(row, np.random.default_rng((seed, i)))
            for i, row in enumerate(rows)]


def attend_in_fp32(q, k, v, attend=F.scaled_dot_product_attention):
    """Attention computed in fp32: its backward pass in bf16 takes nine times as long on a CPU."""
    with torch.autocast(q.device.type, enabled=False):
        return attend(q.float(), k.float(), v.float()).to(q.dtype)


def autocast(function, args):
    """The function computed in bf16 if `--fast` asks for it."""
    def call(*inputs):
        with torch.autocast(args.device.partition(":")[0], torch.bfloat16), mock.patch.object(
                F, "scaled_dot_product_attention", attend_in_fp32):
            return function(*inputs)

    return call if args.fast else function


def export(model, checkpoint, out, prefix="", **changes):
    """Write a network in fp16 and its config.json as a part of the SD folder `out`.

    checkpoint: of the same part of tiny/model. prefix: of its names. changes: to its config.
    """
    folder = out / checkpoint.file.parent.name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + checkpoint.key_map(key): tensor.half()
               for key, tensor in model.state_dict().items()}
    # the folder layout has linear layers in the autoencoder's attention, not 1x1 convolutions
    tensors = {name: tensor.flatten(1) if re.search(r"\.to_\w+(\.0)?\.weight", name) else tensor
               for name, tensor in tensors.items()}
    weights.save(tensors, folder / checkpoint.file.name, dict(format="pt"))
    config = read_json(checkpoint.file.with_name("config.json"))
    write_json(config | changes, folder / "config.json")


# ---- autoencoder ---------------------------------------------------------------------------

def encode_means(vae, x):
    """The mean latents of images x, a part at a time."""
    return torch.cat([vae.encode(part).mean for part in x.split(BATCH)])


def decoder_errors(vae, z, x):
    """The difference between images x and their decoded latents z: (PSNR in dB, L1).

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
        self.held_out = true_pictures(world.figures("val")).to(args.device)
        self.checkpoint = checkpoints.read_vae(BASE)
        self.model = AutoencoderKL(VAEConfig(**self.checkpoint.config | dict(scaling_factor=1.0)))
        self.reconstruct = autocast(self.reconstruct_noisy, args)

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
        z = encode_means(model, self.held_out)
        psnr, l1 = decoder_errors(model, z, self.held_out)
        return dict(psnr=psnr, l1=l1, latent_std=z.std().item())

    @torch.inference_mode()
    def export(self, model):
        """Write vae/ of the model folder, with the factor that gives latents unit variance."""
        z = encode_means(model, to_batch(self.pictures[:2048], self.args.device))
        export(model, self.checkpoint, self.args.out, scaling_factor=round(1 / z.std().item(), 4))


# ---- CLIP ----------------------------------------------------------------------------------

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
    scale = torch.diag_embed(torch.stack([zoom, zoom], dim=1))
    affine = torch.cat([scale, move], dim=2).to(x)                             # (B, 2, 3)
    moved = F.grid_sample(x, F.affine_grid(affine, x.shape, align_corners=False),
                          padding_mode="border", align_corners=False)
    return (moved + uniform(0.05, 3, 1, 1).to(x)).clamp(-1, 1)


def train_tokenizer(captions, folder):
    """Learn a BPE of at most VOCAB_SIZE tokens and write it in CLIP's file format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = clip.word_splitter()
    bpe.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2 * len(alphabet) - 2, end_of_word_suffix="</w>",
        show_progress=False))
    merges = json.loads(bpe.to_str())["model"]["merges"]
    tokens = [*alphabet, *(token + "</w>" for token in alphabet), *map("".join, merges),
              clip.BEGIN, clip.END]
    folder.mkdir(parents=True, exist_ok=True)
    write_json({token: i for i, token in enumerate(dict.fromkeys(tokens))}, folder / "vocab.json")
    write_text("#version: 0.2\n" + "".join(
        f"{left} {right}\n" for left, right in merges), folder / "merges.txt")
    config = "tokenizer_config.json"
    write_json(read_json(BASE / "tokenizer" / config), folder / config)


class CLIPStage:
    """Text and image tower, contrastively (arXiv 2103.00020): each caption finds its picture."""
    batch, rate = 128, 5e-4

    def __init__(self, args):
        self.args = args
        self.pictures, self.rows = load_pool(args.work)
        if not (args.out / "tokenizer" / "vocab.json").exists():
            train_tokenizer(map(world.full_caption, self.rows), args.out / "tokenizer")
        self.tokenizer = load_tokenizer(args.out / "tokenizer")
        self.held_out = true_pictures(world.figures("test")).to(args.device)
        self.held_out_ids = self.tokenizer(list(map(world.full_caption, world.figures("test"))))
        self.checkpoint = checkpoints.read_text(BASE)
        config = self.checkpoint.config | dict(vocab_size=self.tokenizer.end + 1)
        self.model = CLIPScore(random_init(clip.CLIPTextModel(clip.CLIPTextConfig(**config))))

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
        """How often a held-out picture finds its caption among all of them."""
        found = self.logits(model, self.held_out, self.held_out_ids).argmax(dim=1).cpu()
        return dict(retrieval=(found == torch.arange(len(found))).float().mean().item())

    def export(self, model):
        """Write text_encoder/ and the scores' part of the model folder."""
        end = self.tokenizer.end
        export(model.text_model, self.checkpoint, self.args.out, "text_model.",
               vocab_size=end + 1, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)
        save_score(model, self.args.out / "clip_score.safetensors")


# ---- U-Net ---------------------------------------------------------------------------------

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

    def __init__(self, args):
        self.args = args
        self.schedule = NoiseSchedule()
        self.loss_weights = min_snr_weights(self.schedule, gamma=5.0)
        self.vae = load_vae(args.out, device=args.device)
        self.tokenizer, self.text_model = load_clip(args.out, device=args.device)
        pictures, self.rows = load_pool(args.work)
        self.mean, self.std = self.encode_pool(pictures)
        with torch.inference_mode():
            x = true_pictures(world.figures("val")).to(args.device)
            self.held_out = encode_means(self.vae, x).cpu()
        self.checkpoint = checkpoints.read_unet(BASE)
        self.model = zero_last_layers(UNet(UNetConfig(**self.checkpoint.config)))
        # the autoencoder isn't compiled: in bf16 PyTorch 2.13 gets its gradients wrong on CPUs
        compiled = torch.compile(self.model, dynamic=False) if args.fast else self.model
        self.predict = autocast(compiled, args)

    @torch.inference_mode()
    def encode_pool(self, pictures):
        """Mean and std of all latents, (N, 4, 16, 16) fp16 each, computed once and kept in work."""
        file = next((self.args.out / "vae").glob("*.safetensors"))
        key = fingerprint(file, self.args.work / "pool" / "figures.jsonl")
        cache = self.args.work / f"latents-{key}.npz"
        if not cache.is_file():
            encode = autocast(self.vae.encode, self.args)
            latents = [encode(to_batch(pictures[i:i + BATCH], self.args.device))
                       for i in tqdm(range(0, len(pictures), BATCH), desc="latents")]
            mean, std = (torch.cat(parts).half().cpu() for parts in zip(*latents))
            with weights.replacing(cache) as temporary:
                np.savez(temporary, mean=mean, std=std)
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
        empty = round(EMPTY_SHARE * self.batch)
        context = self.encode([""] * empty + captions[empty:])
        eps = self.predict(z_t, t.to(self.args.device), context).float()
        error = (eps - noise).square().mean(dim=(1, 2, 3))
        return (self.loss_weights[t].to(error) * error).mean()

    @torch.inference_mode()
    def evaluate(self, model):
        """The held-out loss, all and in quarters of the t range, always with the same noise."""
        generator = torch.Generator().manual_seed(self.args.seed)
        context = self.encode(list(map(world.full_caption, world.figures("val"))))
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
        captions = list(map(world.full_caption, world.figures("val")[:SHEET_ROWS]))
        denoise = make_denoiser(model, self.encode(captions), self.encode([""]), 3.0)
        noise = draw_noise(range(SHEET_ROWS), self.held_out.shape[1:]).to(self.args.device)
        *_, z = sample(denoise, noise, self.schedule, steps=20, sampler="dpm++2m")
        true = self.vae.decode(self.held_out[:SHEET_ROWS].to(z))
        contact_sheet([true, self.vae.decode(z)], ["true picture", "drawn"], captions, file)

    def export(self, model):
        """Write unet/, scheduler/ and model_index.json of the model folder."""
        export(model, self.checkpoint, self.args.out)
        (self.args.out / "scheduler").mkdir(exist_ok=True)
        for name in ("scheduler/scheduler_config.json", "model_index.json"):
            write_json(read_json(BASE / name), self.args.out / name)


# ---- training ------------------------------------------------------------------------------

STAGES = {"clip": CLIPStage, "vae": VAEStage, "unet": UNetStage}


def train(stage, args):
    """Train until the budget is used up; the moving average of the model."""
    folder = args.work / args.stage
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    if args.init:
        weights.load_strict(stage.model, stage.checkpoint).requires_grad_(True)
    model = stage.model.to(args.device, memory_format=FORMAT).train()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.rate, betas=(0.9, 0.99),
                                  weight_decay=0.01, fused=True)
    modules, progress = dict(model=model, ema=ema), dict(step=0, seconds=0.0)
    if checkpoint.exists():
        progress = weights.load_training(checkpoint, modules, "model", optimizer)
        print(f"resumed at step {progress['step']}, after {progress['seconds'] / 60:.1f} min")
    step, seconds, budget = progress["step"], progress["seconds"], args.minutes * 60
    start, last_save, last_sheet, average = time.monotonic() - seconds, seconds, seconds, None
    bar = tqdm(desc=args.stage, initial=step, unit="step", mininterval=5)
    while True:
        is_done = seconds >= budget or step >= args.steps
        if is_done or seconds - last_save > SAVE_SECONDS:
            progress = dict(step=step, seconds=seconds)
            weights.save_training(checkpoint, modules, "model", optimizer, progress)
            row = dict(step=step, minutes=round(seconds / 60, 2), images=step * stage.batch,
                       loss=average, **stage.evaluate(ema))
            with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            bar.write(json.dumps(row))
            last_save = time.monotonic() - start
        if seconds - last_sheet > SHEET_SECONDS and hasattr(stage, "draw_sheet"):
            stage.draw_sheet(ema, folder / f"drawn-{step:07d}.png")
            last_sheet = seconds
        if is_done:
            return ema
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        cool_down = min(1.0, max(0.0, 1 - seconds / budget) / COOLDOWN)
        optimizer.param_groups[0]["lr"] = stage.rate * warm_up * cool_down
        loss = stage.loss(torch.Generator().manual_seed(args.seed * 1_000_003 + step))
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
        seconds = time.monotonic() - start


def main():
    """Train one stage and write its part of the SD folder."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--stage", choices=STAGES, required=True)
    add("--minutes", type=float, default=60.0, help="budget of the stage (default: %(default)s)")
    add("--steps", type=positive, default=10**9, help="stop after this many steps (default: never)")
    add("--work", type=Path, default=BASE.parent / "work", help="checkpoints (default: tiny/work)")
    add("--out", type=Path, default=BASE, help="SD folder (default: tiny/model)")
    add("--init", action="store_true", help="start from tiny/model instead of random weights (vae "
        "and unet)")
    add("--fast", action="store_true", help="compute in bf16 and compile (needs a C++ compiler): "
        "1.9 times faster on CPUs with AMX")
    add("--seed", type=seed_number, default=0, help="(default: %(default)s)")
    parser.add_device()
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f"--minutes must be greater than 0, got {args.minutes}.")
    if args.init and args.stage == "clip":
        parser.error("--init must be used with --stage vae or unet, got clip.")
    torch.manual_seed(args.seed)            # the initial weights
    stage = STAGES[args.stage](args)
    stage.export(train(stage, args))
    print(f"wrote the {args.stage} stage's part of {args.out}")


if __name__ == "__main__":
    run_script(main, interrupted="interrupted; the same command resumes from the last checkpoint")
