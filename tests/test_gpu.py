"""A GPU gives the CPU's training and pictures, up to rounding: pytest -m gpu.

Skipped without CUDA or Apple's GPU.
"""
import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
import weights
from inputs.options import DEFAULT_BPS
from weights import UserError

GPU = next((name for name, is_available in (("cuda", torch.cuda.is_available()),
                                            ("mps", torch.backends.mps.is_available()))
            if is_available), None)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPU is None, reason="no GPU")]
SHORT = ["--steps", 6, "--batch", 4, "--size", 64, "--foot", "faithful"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that calls another with a device and a folder `name`, which it returns."""
    def call(function, name, device, *arguments):
        function("--device", device, "--out", tmp_path / name, *arguments)
        return tmp_path / name

    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
        monkeypatch.setattr(backend, "allow_tf32", False)
    return call


def losses(folder, name):
    """The losses of a name in a training's log."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [row[name] for row in rows]


def test_a_training_has_the_losses_of_the_cpu(run, run_train):
    cpu, gpu = (run(run_train, name, device, *SHORT, "--dtype", "fp32")
                for name, device in (("cpu", "cpu"), ("gpu", GPU)))
    for name in ("train_loss", "val_steered"):
        assert losses(gpu, name) == pytest.approx(losses(cpu, name), rel=1e-3)


def test_an_interrupted_training_resumes_to_the_same_result(run, run_train, refused, monkeypatch):
    whole = run(run_train, "whole", GPU, *SHORT)
    with monkeypatch.context() as patch:
        # it is called in each step and in each validation, so this stops step 4
        stop = Mock(side_effect=[None] * 6 + [UserError("stopped")])
        patch.setattr(train, "require_finite", stop)
        refused(run, run_train, "parts", GPU, *SHORT)
    parts = run(run_train, "parts", GPU, *SHORT)
    expected, state = (load_file(folder / "bps.safetensors") for folder in (whole, parts))
    for key, tensor in expected.items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-2, atol=1e-4)
    assert losses(parts, "val_steered") == pytest.approx(losses(whole, "val_steered"), rel=1e-3)


@pytest.mark.skipif(GPU != "cuda", reason="AdamW is fused on CUDA only")
def test_a_fused_optimizer_resumes_from_a_checkpoint(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(1, 3, device=GPU)).sum().backward()
        optimizer.step()

    models = [torch.nn.Linear(3, 2, device=GPU) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1, fused=True) for model in models]
    file, modules = tmp_path / "checkpoint.safetensors", [dict(model=model) for model in models]
    step(models[0], optimizers[0])
    weights.save_training(file, modules[0], "model", optimizers[0], dict(step=1))
    weights.load_training(file, modules[1], "model", optimizers[1])
    for model, optimizer in zip(models, optimizers):
        step(model, optimizer)
    torch.testing.assert_close(models[0].weight, models[1].weight)


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 0.1), ("fp16", 0.3), ("bf16", 2)])
def test_a_picture_is_that_of_the_cpu(dtype, tolerance, run, draw, pixels):
    """tolerance: of the mean difference, of 255; on the CPU fp16 differs by 0.03, bf16 by 0.27."""
    arguments = ["--bps", DEFAULT_BPS, "--n", 2, "--steps", 10]
    cpu = run(draw, "cpu", "cpu", *arguments)
    gpu = run(draw, "gpu", GPU, *arguments, "--dtype", dtype)
    for name in ("0000.png", "0001.png"):
        difference = pixels(cpu / name).astype(float) - pixels(gpu / name)
        assert np.abs(difference).mean() < tolerance
