"""Steer diffusers' StableDiffusionPipeline, with any of its schedulers, by a BPS trained here.

Put the project's folder and this one into PYTHONPATH, and load LoRAs into the pipeline first:

    from bps import Condition, load_bps
    from inputs.conditions import read_condition

    pipe = StableDiffusionPipeline.from_pretrained("SD_FOLDER")
    bps = load_bps("runs/sd/bps.safetensors", pipe.dtype, pipe.device)
    cond = read_condition("drawing.png", "sketch", 512, 512)
    pipe.unet = SteeredUNet(pipe.unet)
    pipe.unet.conditions = [Condition(bps, cond[None])]         # one or several
"""
from functools import partial

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from bps import make_denoiser


class SteeredUNet(torch.nn.Module):
    """A replacement for a UNet2DConditionModel that `.conditions` steer."""
    device = property(lambda self: self.unet.device)
    dtype = property(lambda self: self.unet.dtype)

    def __init__(self, unet):
        super().__init__()
        self.unet, self.config, self.conditions, self.residuals = unet, unet.config, [], None
        blocks = [[]]                                       # no map after the stem ...
        for level in unet.down_blocks:
            blocks += self.layers(level) + ([[]] if level.downsamplers else [])     # ... or these
        blocks.append([*unet.mid_block.resnets, *unet.mid_block.attentions])
        for level in unet.up_blocks:
            blocks += self.layers(level)
        for i, block in enumerate(blocks):
            for layer in block:
                layer.register_forward_hook(partial(self.add_map, i))

    def layers(self, level):
        """For each block of a level, its residual block and, if it has one, its transformer."""
        attentions = getattr(level, "attentions", None)
        return [*zip(level.resnets, attentions)] if attentions else [*zip(level.resnets)]

    def add_map(self, i, layer, inputs, output):
        """Add block i's map to a layer's output, which is a tuple of one for a transformer."""
        residual = self.residuals and self.residuals[i]
        if residual is None:
            return output
        return (output[0] + residual,) if isinstance(output, tuple) else output + residual

    def time_embedding(self, t):
        """The frozen U-Net's embedding of t (B,), which BPS reads too."""
        return self.unet.time_embedding(self.unet.time_proj(t).to(self.dtype))

    def predict(self, options, z_t, t, context, residuals=None):
        """eps (B, 4, H, W), with the arguments of our own UNet."""
        self.residuals = residuals
        eps, = self.unet(z_t, t, context, return_dict=False, **options)
        self.residuals = None
        return eps

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **options):
        """The posterior's eps for both passes of the pipeline's guidance at once."""
        predict = partial(self.predict, options)
        # the parts of our own UNet that a Condition reads
        predict.parameters, predict.time_embedding = self.parameters, self.time_embedding
        denoise = make_denoiser(predict, encoder_hidden_states, None, 1.0, self.conditions)
        eps = denoise(sample, timestep.item()).to(sample.dtype)
        return UNet2DConditionOutput(eps) if return_dict else (eps,)
