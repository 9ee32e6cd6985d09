"""Nothing is lost: killed runs, a folder that two trainings want, full disks, the best weights."""
import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import drawings
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
import weights
from bps import load_bps
from inputs.files import write_json
from inputs.options import ROOT
from inputs.run_folder import choose_out, lock
from measure import curve

OPTIONS = ["--steps", "4", "--batch", "2", "--save-every", "2", "--lr", "1e-2", "--device", "cpu"]
# A training that kills itself before or after the n-th call of a function.
KILLED = """
import os, signal, sys
import data, diffusion, train, weights
from measure import report

report.SAMPLING, report.VALIDATION_T = diffusion.Sampling(steps=2), (500,)
phase, count, moment = sys.argv[1], int(sys.argv[2]), sys.argv[3]
owner, name = {"caching": (train, "LatentCache"), "training": (train, "require_finite"),
               "validation": (train, "paired_errors"), "checkpoint": (weights, "save_training"), "writing": (weights, "save_file"),
               "best": (train, "save_bps"), "curve": (train, "draw_curve"),
               "report": (train, "report"), "none": (data, "open_pair")}[phase]
function, calls = getattr(owner, name), iter(range(10**6))

def killed(*arguments, **options):
    is_last = next(calls) + 1 == count and phase != "none"
    if is_last and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = function(*arguments, **options)
    if is_last:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, killed)
sys.argv = ["train.py", *sys.argv[4:]]
train.main()
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of ten pairs of shapes."""
    return drawings.write_shapes(tmp_path_factory.mktemp("trust") / "pairs")


def start(pairs, out, phase="none", count=1, moment="before"):
    """Start a training in a process of its own, on one thread, so that it rounds in one way."""
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, phase, str(count), moment, *OPTIONS, "--data", pairs,
         "--cache", out.parent / "cache", "--out", out], cwd=ROOT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(pairs, out):
    """Run the training to its end; the bytes of its BPS."""
    process = start(pairs, out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return (out / "bps.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(pairs, tmp_path_factory):
    """The bytes of the BPS that an undisturbed training writes."""
    return finish(pairs, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("phase, count, moment", [
    ("caching", 2, "before"), ("training", 3, "before"), ("training", 3, "after"),
    ("validation", 3, "before"), ("checkpoint", 1, "before"), ("checkpoint", 1, "after"),
    ("checkpoint", 2, "after"), ("writing", 4, "after"), ("best", 1, "after"), ("curve", 1, "before"),
    ("report", 1, "before"), ("report", 1, "after")])
def test_a_run_killed_in_any_phase_ends_with_the_same_bytes(pairs, undisturbed, tmp_path, phase,
                                                            count, moment):
    killed = start(pairs, tmp_path / "run", phase, count, moment)
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    assert finish(pairs, tmp_path / "run") == undisturbed
    assert not (tmp_path / "run-2").exists()
    assert not list(tmp_path.rglob(".*"))               # nor what was half-written


# ---- in this process -----------------------------------------------------------------------

@pytest.fixture
def run(run_script, pairs, short_report):
    """A function that trains on the pairs, with a short report."""
    return lambda out: run_script(train, *OPTIONS, "--data", pairs, "--out", out)


def test_a_second_training_in_a_folder_is_refused(run, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(SystemExit):
        run(out)
    assert "run is in use by another training. Wait until it ends" in capsys.readouterr().err
    assert not list(out.iterdir())
    os.close(other)                                     # as the kernel does when its owner dies
    with pytest.raises(BlockingIOError), lock(out):     # an error of the training, not of the lock
        raise BlockingIOError


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="run can't be locked"), lock(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_the_average_of_the_lowest_validation_loss_is_kept(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "FEW_PAIRS", 1)
    losses, errors = iter([0.5, 0.3, 0.4]), train.paired_errors         # of the base, steps 2 and 4
    monkeypatch.setattr(train, "paired_errors", lambda *a: errors(*a) * 0 + next(losses))
    saved, save = {}, train.Training.save

    def noted(self, step, *arguments):
        saved[step] = {key: tensor.half() for key, tensor in self.average.state_dict().items()}
        save(self, step, *arguments)

    monkeypatch.setattr(train.Training, "save", noted)
    run(tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "bps.safetensors")
    assert all(torch.equal(tensors[key], saved[2][key]) for key in tensors)
    assert any(not torch.equal(saved[2][key], saved[4][key]) for key in tensors)
    best = load_bps(tmp_path / "run" / "bps.safetensors").metadata["best"]
    assert best == dict(step=2, loss=pytest.approx(0.3))


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(b"cut")],
                         ids=["moved away", "cut"])
def test_lost_best_weights_are_noticed_before_the_training(run, tmp_path, monkeypatch, capsys,
                                                           spoil):
    def interrupted(*_):
        raise KeyboardInterrupt

    losses, errors = iter([0.5, 0.3, 0.4] + [0.5] * 9), train.paired_errors    # step 2 is best
    monkeypatch.setattr(train, "paired_errors", lambda *a: errors(*a) * 0 + next(losses))
    monkeypatch.setattr(train, "report", interrupted)
    monkeypatch.setattr(train, "FEW_PAIRS", 1)
    with pytest.raises(SystemExit):
        run(tmp_path / "run")
    spoil(tmp_path / "run" / "bps.safetensors")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run")
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and "The run's best weights were in it: put it back" in printed


def test_a_finished_run_is_left_alone_even_without_its_bps(tmp_path):
    out, record = tmp_path / "run", dict(task="sketch")
    out.mkdir()
    write_json(record, out / "args.json")
    assert choose_out(out, record) == out               # stopped before its first checkpoint
    (out / "log.jsonl").touch()
    assert choose_out(out, record) == tmp_path / "run-2"
    (out / "checkpoint.safetensors").touch()
    assert choose_out(out, record) == out
    assert choose_out(out, dict(task="layout")) == tmp_path / "run-2"


@pytest.mark.parametrize("owner, name", [
    (weights, "save_file"), pytest.param(Path, "write_text", marks=pytest.mark.slow),
    pytest.param(Image.Image, "save", marks=pytest.mark.slow)], ids=["tensors", "text", "image"])
def test_a_full_disk_is_one_line_and_old_files_stay_intact(run, tmp_path, monkeypatch, capsys,
                                                           owner, name):
    def interrupted(*_):
        raise KeyboardInterrupt

    def full(*arguments, **options):
        """Write a part of the file, then fail as a full disk does."""
        file, = [argument for argument in arguments if isinstance(argument, Path)]
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "report", interrupted)     # leaves a checkpoint, a log and a curve
        run(out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(owner, name, full)
        run(out)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and "No space left" in lines[0]
    after = {file.name: file.read_bytes() for file in out.iterdir()}
    assert {name: after[name] for name in before} == before
    assert not any(name.startswith(".") for name in after)              # no temporary file is left
    run(out)                                            # once there is room, it resumes
    assert (out / "samples.png").exists() and not (tmp_path / "run-2").exists()


def test_the_curve_of_a_single_validation_is_drawn(tmp_path):
    rows = [dict(step=100, train_loss=0.08, val_base=0.07, val_steered=0.06)]
    curve.draw_curve(rows, tmp_path / "curve.png")
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]
