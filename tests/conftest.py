"""Fixtures that several test files share."""
import functools
import itertools
import shutil
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import references
from PIL import Image

import data
import sample
import train
from diffusion import Sampling
from inputs import options
from inputs.options import BASE
from measure import report


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """One folder of cached latents for all tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for module in (data, train):
            patch.setattr(module, "CACHE", folder)
        yield folder


@pytest.fixture
def short_report(monkeypatch):
    """Measure over fewer pictures, steps and timesteps in a training's report."""
    for name, value in dict(VALIDATION_T=(500,), OBEDIENCE_PICTURES=2, SHEET_ROWS=2,
                            SAMPLING=Sampling(steps=2)).items():
        monkeypatch.setattr(report, name, value)


@pytest.fixture
def run_script(monkeypatch):
    """A function that runs a script's module with arguments, as the command line does."""
    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        options.run_script(module.main)

    return run


def filled_in(arguments, defaults):
    """A command line's arguments, preceded by the defaults {option: value} that they lack."""
    missing = [pair for pair in defaults.items() if pair[0] not in arguments]
    return [*itertools.chain(*missing), *arguments]


@pytest.fixture
def run_train(run_script, load_once, short_report, monkeypatch):
    """A function that trains a light BPS for two steps on the first six pairs of each split."""
    monkeypatch.setattr(train, "load_base", load_once)
    load_pairs = train.load_pairs
    monkeypatch.setattr(train, "load_pairs", lambda *a, **k: load_pairs(*a, **k)[:6])

    defaults = {"--steps": 2, "--batch": 2, "--save-every": 1, "--size": 32, "--foot": "light",
                "--device": "cpu"}
    return lambda *arguments: run_script(train, *filled_in(arguments, defaults))


@pytest.fixture
def refused(capsys):
    """A function that calls another, which ends in one line and exit code 2; returns the line."""
    def call(function, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*arguments)
        *others, line = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith("error: ")
        # bars of progress and notes may precede it
        assert all("%|" in other or other.startswith(("note: ", "warning: "))
                   for other in others if other.strip())
        return line

    return call


@pytest.fixture
def interrupted(monkeypatch):
    """A function that calls another, whose training is interrupted before its report."""
    def call(function, *arguments):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(train, "report", Mock(side_effect=KeyboardInterrupt))
            function(*arguments)

    return call


@pytest.fixture
def draw(run_script, load_once, monkeypatch, tmp_path, bps_file):
    """A function that runs sample.py with two steps; returns the folder of its pictures."""
    monkeypatch.setattr(sample, "load_base", load_once)
    counter = itertools.count()

    def run(*arguments, bps=bps_file):
        defaults = {"--out": tmp_path / f"drawn{next(counter)}", "--device": "cpu"}
        if "--from" not in arguments:
            defaults |= {"--bps": bps, "--steps": 2}
        run_script(sample, *filled_in(arguments, defaults))
        return defaults["--out"]

    return run


@pytest.fixture(scope="session")
def pixels():
    """A function from an image file to its pixels."""
    return lambda file: np.asarray(Image.open(file))


@pytest.fixture
def picture(draw, pixels):
    """A function that draws a picture with sample.py; returns its pixels."""
    return lambda *arguments: pixels(draw("--n", 1, *arguments) / "0000.png")


@pytest.fixture(scope="session")
def load_once():
    """load_base, which loads each base once for all tests; they do not change it."""
    return functools.cache(sample.load_base)


@pytest.fixture(scope="session")
def base(load_once):
    """The embedded base."""
    return load_once(BASE)


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
    """A function of a small model's name: its SD folder; tests only read it."""
    path = tmp_path_factory.mktemp("folders")
    return functools.cache(lambda name: references.write_folder(path / name, name,
                                                                random_states(name)))


@pytest.fixture
def copied(sd_folder, tmp_path):
    """A function of a small model's name: a copy of its SD folder that a test may change."""
    return lambda name="small1": shutil.copytree(sd_folder(name), tmp_path / "sd", symlinks=True)


@pytest.fixture(scope="session")
def sd_file(random_states, tmp_path_factory):
    """A function of a small model's name: its single file; tests only read it."""
    @functools.cache
    def file(name):
        path = tmp_path_factory.mktemp("files") / f"{name}.safetensors"
        references.save_file(references.single_file(random_states(name)), path)
        return path

    return file
