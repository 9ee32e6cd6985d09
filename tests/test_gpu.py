"""A GPU gives the CPU's training and pictures, up to rounding: pytest -m gpu.

Skipped without CUDA or Apple's GPU.
"""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sample
import train
import weights
from inputs.options import DEFAULT_BPS

GPU = next((name for name, is_available in (("cuda", torch.cuda.is_available()),
                                            ("mps", torch.backends.mps.is_available()))
            if is_available), None)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPU is None, reason="no GPU")]
SHORT = ["--steps", 6, "--batch", 4, "--save-every", 2]


@pytest.fixture
def run(run_script, monkeypatch, tmp_path, short_report):
    """A function that runs a script on a device; returns its folder, `name`."""
    def call(module, name, device, *arguments):
        run_script(module, "--device", device, "--out", tmp_path / name, *arguments)
        return tmp_path / name

    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
        monkeypatch.setattr(backend, "allow_tf32", False)
    load_pairs = train.load_pairs
    monkeypatch.setattr(train, "load_pairs", lambda *arguments: load_pairs(*arguments)[:12])
    return call


def losses(folder, name):
    """The losses of a name in a training's log."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [row[name] for row in rows]


def test_a_training_has_the_losses_of_the_cpu(run):
    cpu, gpu = (run(train, device, device, *SHORT, "--dtype", "fp32") for device in ("cpu", GPU))
    for name in ("train_loss", "val_steered"):
        assert losses(gpu, name) == pytest.approx(losses(cpu, name), rel=1e-3)


def test_an_interrupted_training_resumes_to_the_same_result(run, monkeypatch):
    whole, save = run(train, "whole", GPU, *SHORT), train.Training.save

    def save_and_stop(self, step, *arguments):
        save(self, step, *arguments)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Training, "save", save_and_stop)
        run(train, "parts", GPU, *SHORT)
    parts = run(train, "parts", GPU, *SHORT)
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
def test_a_picture_is_that_of_the_cpu(dtype, tolerance, run, pixels):
    """tolerance: of the mean difference, of 255; on the CPU fp16 differs by 0.03, bf16 by 0.27."""
    arguments = ["--bps", DEFAULT_BPS, "--n", 2, "--steps", 10]
    cpu = run(sample, "cpu", "cpu", *arguments)
    gpu = run(sample, "gpu", GPU, *arguments, "--dtype", dtype)
    for name in ("0000.png", "0001.png"):
        difference = pixels(cpu / name).astype(float) - pixels(gpu / name)
        assert np.abs(difference).mean() < tolerance
