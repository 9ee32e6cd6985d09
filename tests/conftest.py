"""Fixtures that several test files share."""
import functools

import pytest
import references

from diffusion import Sampling
from measure import report


@pytest.fixture
def short_report(monkeypatch):
    """The report's measures over fewer pictures, steps and timesteps."""
    for name, value in dict(VALIDATION_T=(500,), OBEDIENCE_PICTURES=2, SHEET_ROWS=2,
                            SAMPLING=Sampling(steps=2)).items():
        monkeypatch.setattr(report, name, value)


@pytest.fixture(scope="session")
def bps_file(tmp_path_factory):
    """A BPS file for the embedded base whose ports are random, so that it steers visibly."""
    return references.write_random_bps(tmp_path_factory.mktemp("bps") / "bps.safetensors", "sketch")


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
