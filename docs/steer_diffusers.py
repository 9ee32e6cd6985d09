"""Steers diffusers' StableDiffusionPipeline, with any of its schedulers, by BPS trained here.

        # with this folder and the project's in PYTHONPATH
    pipe = StableDiffusionPipeline.from_pretrained("SD_FOLDER")
    unet = SteeredUNet(pipe.unet)
    bps = load_bps("runs/sd/bps.safetensors", pipe.dtype, pipe.device)
    cond, _ = read_condition("drawing.png", "sketch", 512, 512)
    unet.steerings = [Steering(bps, unet, cond[None])]          # one or several, without a window
    pipe.unet = unet

load_bps and Steering are in bps.py, read_condition is in inputs/conditions.py. LoRAs are loaded
into the pipeline before that.
"""
from functools import partial

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from bps import make_denoiser


class SteeredUNet(torch.nn.Module):
    """A UNet2DConditionModel's stand-in; it steers with what is in `.steerings`."""
    device = property(lambda self: self.unet.device)
    dtype = property(lambda self: self.unet.dtype)

    def __init__(self, unet):
        super().__init__()
        self.unet, self.config, self.steerings, self.residuals = unet, unet.config, [], None
        blocks = [[]]                                       # no map behind the stem ...
        for level in unet.down_blocks:
            blocks += self.layers(level) + ([[]] if level.downsamplers else [])     # nor these
        blocks.append([*unet.mid_block.resnets, *unet.mid_block.attentions])
        for level in unet.up_blocks:
            blocks += self.layers(level)
        for i, block in enumerate(blocks):
            for layer in block:
                layer.register_forward_hook(partial(self.add_map, i))

    def layers(self, level):
        """Returns for each block of a level its residual block, and its transformer if it has one.
        """
        attentions = getattr(level, "attentions", None)
        return [*zip(level.resnets, attentions)] if attentions else [*zip(level.resnets)]

    def add_map(self, i, layer, inputs, output):
        """Adds block i's map to what a layer returns; a transformer returns a tuple of one."""
        residual = self.residuals and self.residuals[i]
        if residual is None:
            return output
        return (output[0] + residual,) if isinstance(output, tuple) else output + residual

    def time_embedding(self, t):
        """Returns what the residual blocks and BPS know of t (B,)."""
        return self.unet.time_embedding(self.unet.time_proj(t).to(self.dtype))

    def predict(self, options, z_t, t, context, residuals=None):
        """Returns eps (B, 4, H, W), as our own UNet does."""
        self.residuals = residuals
        eps, = self.unet(z_t, t, context, return_dict=False, **options)
        self.residuals = None
        return eps

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **options):
        """Returns the posterior's eps for both passes of the pipeline's guidance at once."""
        predict = partial(self.predict, options)
        denoise = make_denoiser(predict, encoder_hidden_states, None, 1.0, self.steerings)
        eps = denoise(sample, timestep.item()).to(sample.dtype)
        return UNet2DConditionOutput(eps) if return_dict else (eps,)
