"""Several processes, parts of a batch and checkpointing give the same training as one process."""
import argparse
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import drawings
import pytest
import torch
from safetensors.torch import load_file

import sample
import train
from bps import build_bps, config_for
from data import LatentCache, load_pairs
from inputs.options import BASE, DTYPES, ROOT, usable_device
from inputs.processes import Processes, join_processes
from weights import UserError

# the rate for SD 1.5: at 1e-3 AdamW's first steps amplify rounding to 1 % of a loss in 20 steps
ARGS = dict(steps=20, lr=1e-5, batch=16, seed=0, save_every=1, device="cpu",
            accumulate=1, dtype="fp32")


def trained(processes=Processes(), foot="faithful", checkpointing=False, folder=None, **changes):
    """Train on four embedded pairs; return the loss of each step and the weights (n,)."""
    args = SimpleNamespace(**ARGS | changes)
    base = sample.load_base(BASE, dtype=DTYPES[args.dtype])
    cache = LatentCache(load_pairs("sketch", "train")[:4], "sketch", 64, base, folder=folder)
    torch.manual_seed(0)
    bps = build_bps(config_for(base.unet.config, 1, base.vae.factor, foot=foot))
    base.unet.checkpointing = bps.checkpointing = checkpointing
    averages = []
    train.train(train.Training(None, bps, args, processes), base, cache, args,
                lambda step, average: averages.append(average))
    averages = torch.tensor(averages, dtype=torch.float64)
    losses = torch.cat([averages[:1], (averages[1:] - 0.98 * averages[:-1]) / 0.02])
    assert {parameter.dtype for parameter in bps.parameters()} == {torch.float32}
    return losses, torch.cat([parameter.detach().flatten() for parameter in bps.parameters()])


@pytest.fixture(scope="module")
def plain():
    """Losses and weights of one process."""
    return trained()


def assert_same(result, expected, loss_tolerance, weight_tolerance):
    """Assert that each loss and the norm of the weights agree within relative tolerances."""
    (losses, weights), (plain_losses, plain_weights) = result, expected
    assert ((losses - plain_losses).abs() / plain_losses).max() <= loss_tolerance
    assert (weights - plain_weights).norm() / plain_weights.norm() <= weight_tolerance


def process(rank, count, port, folder):
    """Train in one of several processes; rank 0 writes its result."""
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    processes, _ = join_processes("cpu")
    result = trained(processes, folder=folder)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    torch.distributed.destroy_process_group()


# ---- devices and shards --------------------------------------------------------------------

@pytest.mark.parametrize("device, wrong, message", [
    ("mps", {}, "--device must be cpu or cuda with torchrun, got mps"),
    ("cuda:0", {}, "--device must be cpu or cuda with torchrun, got cuda:0"),
    ("cpu", dict(WORLD_SIZE=None), "torchrun are missing or wrong .'WORLD_SIZE'.. Start with"),
    ("cpu", dict(MASTER_ADDR=None), "torchrun are missing or wrong .'MASTER_ADDR'."),
    ("cpu", dict(MASTER_PORT="abc"), "torchrun are missing or wrong .invalid literal .* 'abc'."),
    ("cpu", dict(RANK="4"), "torchrun are missing or wrong .RANK 4, WORLD_SIZE 4.")])
def test_processes_that_cannot_train_together_are_refused(device, wrong, message, monkeypatch):
    right = dict(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1")
    for name, value in (right | wrong).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=message):
        join_processes(device)


def test_a_scheduler_that_starts_one_process_need_not_be_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join_processes("cpu") == (Processes(), "cpu")


@pytest.mark.parametrize("batch, shards", [
    (6, [[0, 4], [1, 5], [2], [3]]), (1, [[0], [], [], []])])
def test_shards_partition_a_batch(batch, shards):
    assert [Processes(rank, 4).shard(batch).tolist() for rank in range(4)] == shards


def test_each_process_uses_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "zeros", Mock(side_effect=RuntimeError("no GPU")))
    with pytest.raises(argparse.ArgumentTypeError, match="cuda:3 can't be used .no GPU"):
        usable_device("cuda")
    torch.zeros.assert_called_once_with(1, device="cuda:3")


# ---- the same training ---------------------------------------------------------------------

# not 1e-6: AdamW turns a rounded gradient of nearly 0 into a step of either sign
@pytest.mark.slow
@pytest.mark.parametrize("count, weight_tolerance", [(2, 1e-5), (4, 2e-5)])
def test_several_processes_give_the_same_training(plain, count, weight_tolerance, tmp_path):
    port = 29_500 + os.getpid() % 1000 + count
    torch.multiprocessing.spawn(process, (count, port, tmp_path), count)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert_same(result, plain, 1e-5, weight_tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("foot", ["faithful", "light"])
def test_checkpointing_gives_the_same_gradients(foot):
    plain = trained(foot=foot, steps=3)
    assert_same(trained(foot=foot, steps=3, checkpointing=True), plain, 1e-6, 1e-6)


@pytest.mark.slow
def test_a_batch_in_parts_gives_the_same_training(plain):
    assert_same(trained(accumulate=3), plain, 2e-5, 5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_base_in_half_precision_gives_nearly_the_same_losses(dtype):
    losses, _ = trained(dtype=dtype, steps=2, batch=2)
    plain_losses, _ = trained(steps=2, batch=2)
    assert losses.tolist() == pytest.approx(plain_losses.tolist(), rel=0.03)


# ---- torchrun ------------------------------------------------------------------------------

def run(command, *arguments):
    """Run python with a command and arguments of train.py in the project's folder."""
    return subprocess.run([sys.executable, *command, *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | dict(OMP_NUM_THREADS="1"))


LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]


@pytest.mark.slow
def test_a_run_of_one_process_resumes_in_two(run_script, refused, tmp_path, monkeypatch):
    pairs = drawings.write_shapes(tmp_path / "pairs")
    arguments = ["--steps", 4, "--save-every", 2, "--batch", 4, "--data", pairs, "--cache",
                 tmp_path / "cache", "--out"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    done = run(["train.py"], *arguments, whole)
    assert done.returncode == 0, done.stderr
    with monkeypatch.context() as patch:
        # it is called in steps 1 and 2, in a validation, and in step 3
        stop = Mock(side_effect=[None, None, None, UserError("stopped")])
        patch.setattr(train, "require_finite", stop)
        refused(run_script, train, *arguments, halves)
    done = run(LAUNCHER, *arguments, halves)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 2" in done.stdout and done.stdout.count("run: ") == 1
    one, two = (load_file(folder / "bps.safetensors") for folder in (whole, halves))
    for key in one:  # Adam turns rounding errors in small gradients into steps: 0.5 % was seen
        change = (one[key].float() - two[key].float()).norm()
        assert change <= 0.03 * one[key].float().norm() + 1e-6
    assert sorted(file.name for file in halves.iterdir()) == sorted(
        file.name for file in whole.iterdir())


@pytest.mark.slow
def test_an_error_in_all_processes_is_printed(tmp_path):
    done = run(LAUNCHER, "--batch", 1, "--out", tmp_path / "run")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert set(lines) == {"error: --batch must be at least processes x --accumulate = 2, got 1."}
    assert done.returncode != 0 and not (tmp_path / "run").exists()
