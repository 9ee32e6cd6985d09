"""Fixtures that several test files share."""
import functools

import pytest
import references
import torch

from bps import BPS, config_for, save_bps
from inputs.options import BASE
from unet import load_unet


@pytest.fixture(scope="session")
def bps_file(tmp_path_factory):
    """A BPS file for the embedded base whose ports are random, so that it steers visibly."""
    torch.manual_seed(0)
    bps = BPS(config_for(load_unet(BASE).config, cond_channels=1, factor=4))
    for port in bps.zero_blocks:
        if port is not None:
            torch.nn.init.normal_(port.weight, std=0.002)
    file = tmp_path_factory.mktemp("bps") / "bps.safetensors"
    save_bps(bps, file, dict(task="sketch", size=64, context_dim=128))
    return file


@pytest.fixture(scope="session")
def random_states():
    """A function of a small model's name: random state dicts of its U-Net, VAE and text encoder."""
    @functools.cache
    def states(name):
        modules = references.our_modules(references.MODELS[name], meta=True)
        return [references.random_weights(module, seed) for seed, module in enumerate(modules)]

    return states


@pytest.fixture(scope="session")
def sd_folder(random_states, tmp_path_factory):
    """A function of a small model's name: its SD folder, which tests only read."""
    path = tmp_path_factory.mktemp("folders")
    return functools.cache(lambda name: references.write_folder(path / name, name,
                                                                random_states(name)))


@pytest.fixture(scope="session")
def sd_file(random_states, tmp_path_factory):
    """A function of a small model's name: its single file, which tests only read."""
    @functools.cache
    def file(name):
        path = tmp_path_factory.mktemp("files") / f"{name}.safetensors"
        references.save_file(references.single_file(random_states(name)), path)
        return path

    return file
