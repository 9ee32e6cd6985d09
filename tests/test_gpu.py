"""On a GPU the same training and the same pictures as on the CPU, up to rounding: pytest -m gpu.

Skipped without CUDA or Apple's GPU.
"""
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample
import train
import weights
from inputs.sample_options import DEFAULT_BPS

GPU = next((name for name, is_there in (("cuda", torch.cuda.is_available()),
                                        ("mps", torch.backends.mps.is_available())) if is_there),
           None)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPU is None, reason="no GPU")]


@pytest.fixture
def run(monkeypatch, tmp_path, short_report):
    """Runs a script on a device with an --out of its own; returns that folder."""
    def call(module, out, device, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, "--device", device, "--out",
                                          str(tmp_path / out), *map(str, arguments)])
        module.main()
        return tmp_path / out

    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
        monkeypatch.setattr(backend, "allow_tf32", False)
    load_pairs = train.load_pairs
    monkeypatch.setattr(train, "load_pairs", lambda *arguments: load_pairs(*arguments)[:12])
    return call


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_training_has_the_losses_of_the_cpu(run):
    short = ["--steps", 6, "--batch", 4, "--save-every", 2, "--dtype", "fp32"]
    cpu, gpu = (rows(run(train, device, device, *short)) for device in ("cpu", GPU))
    for a, b in zip(cpu, gpu, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)
        assert b["val_steered"] == pytest.approx(a["val_steered"], rel=1e-3)


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not(run, monkeypatch):
    short = ["--steps", 6, "--batch", 4, "--save-every", 2]
    whole = run(train, "whole", GPU, *short)

    def stop(*_):
        raise KeyboardInterrupt

    save = train.Run.save
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save",
                      lambda self, step, *rest: (save(self, step, *rest), step == 4 and stop()))
        with pytest.raises(KeyboardInterrupt):
            run(train, "parts", GPU, *short)
    parts = run(train, "parts", GPU, *short)
    states = [load_file(folder / "bps.safetensors") for folder in (whole, parts)]
    for key, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][key], rtol=1e-2, atol=1e-4)
    for a, b in zip(rows(whole), rows(parts), strict=True):
        assert b["val_steered"] == pytest.approx(a["val_steered"], rel=1e-3)


@pytest.mark.skipif(GPU != "cuda", reason="AdamW is fused on CUDA only")
def test_a_fused_optimizer_goes_on_from_a_checkpoint(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(1, 3, device=GPU)).sum().backward()
        optimizer.step()
        return dict(step=1)

    models = [torch.nn.Linear(3, 2, device=GPU) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1, fused=True) for model in models]
    file, modules = tmp_path / "checkpoint.safetensors", [dict(model=model) for model in models]
    facts = step(models[0], optimizers[0])
    weights.save_training(file, modules[0], "model", optimizers[0], facts)
    weights.load_training(file, modules[1], "model", optimizers[1])
    for model, optimizer in zip(models, optimizers):
        step(model, optimizer)
    torch.testing.assert_close(models[0].weight, models[1].weight)


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 0.1), ("fp16", 0.3), ("bf16", 2)])
def test_a_picture_is_that_of_the_cpu(dtype, tolerance, run):
    """tolerance: of the mean difference, of 255; on the CPU fp16 differs by 0.03, bf16 by 0.27."""
    options = ["--bps", DEFAULT_BPS, "--n", 2, "--steps", 10]
    cpu = run(sample, "cpu", "cpu", *options)
    gpu = run(sample, "gpu", GPU, *options, "--dtype", dtype)
    for name in ("0000.png", "0001.png"):
        a, b = (np.asarray(Image.open(folder / name), np.float32) for folder in (cpu, gpu))
        assert np.abs(a - b).mean() < tolerance, np.abs(a - b).mean()
