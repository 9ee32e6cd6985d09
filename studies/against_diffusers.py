"""Compares the embedded base with diffusers, which must load it and draw the same picture.

Needs an environment of its own, never that of requirements.txt:

    pip install "torch<=2.13.0" diffusers transformers accelerate tqdm tokenizers pillow
    python -m pytest -m peers -s
"""
import torch
from diffusers import StableDiffusionPipeline

import diffusion
from inputs.options import BASE
from sample import load_base
from steer import draw_noise, make_denoiser

PROMPTS = ["red apple, food, 3d style", "a cat, flat style, on pale blue", ""]
STEPS, GUIDANCE = 50, 3.0


@torch.inference_mode()
def main():
    """Prints the largest differences, part by part and then of a picture."""
    pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    unet, vae, tokenizer, text_model, schedule = load_base(BASE)

    def show(what, ours, theirs):
        """Prints how far two tensors are apart."""
        print(f"{what}: largest difference {(ours - theirs).abs().max().item():.2e}")

    ids = tokenizer(PROMPTS)
    show("token ids", ids, pipe.tokenizer(PROMPTS, padding="max_length", max_length=77,
                                          return_tensors="pt").input_ids)
    context = text_model(ids)
    show("text states", context, pipe.text_encoder(ids)[0])
    z_t, t = torch.randn(3, 4, 16, 16), torch.tensor([5, 500, 981])
    show("eps", unet(z_t, t, context), pipe.unet(z_t, t, context).sample)
    x, factor = torch.rand(2, 3, 64, 64) * 2 - 1, vae.config.scaling_factor
    show("latent mean", vae.encode(x).mean, pipe.vae.encode(x).latent_dist.mean * factor)
    show("decoded image", vae.decode(z_t), pipe.vae.decode(z_t / factor).sample)

    noise = draw_noise([0], (4, 16, 16))
    denoise = make_denoiser(unet, context[:1], context[2:], GUIDANCE)
    *_, z = diffusion.sample(denoise, noise, schedule, STEPS)
    theirs = pipe(PROMPTS[0], latents=noise, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                  height=64, width=64, output_type="pt").images
    show("picture drawn from one seed, in 0..255", (vae.decode(z).clamp(-1, 1) + 1) * 127.5,
         theirs * 255)


if __name__ == "__main__":
    main()
