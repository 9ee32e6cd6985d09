"""Nothing is lost: killed runs, a folder that two trainings want, full disks, corrupt files."""
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import drawings
import pytest
from PIL import Image

import train
import weights
from inputs.options import DEFAULT_BPS, ROOT
from inputs.run_folder import lock

OPTIONS = ["--steps", "4", "--batch", "2", "--save-every", "2", "--lr", "1e-2", "--device", "cpu"]
# A training that kills itself before or after the n-th call of a function.
KILLED = """
import os, signal, sys
import diffusion, train, weights
from measure import report

report.SAMPLING, report.VALIDATION_T = diffusion.Sampling(steps=2), (500,)
phase, count, moment = sys.argv[1], int(sys.argv[2]), sys.argv[3]
owner, name = {"caching": (train, "LatentCache"), "training": (train, "require_finite"),
               "validation": (train, "paired_errors"), "writing": (weights, "save_file"),
               "checkpoint": (weights, "save_training"), "best": (train, "save_bps"),
               "curve": (train, "draw_curve"), "report": (train, "report")}[phase]
function, calls = getattr(owner, name), iter(range(10**6))

def killed(*arguments, **options):
    is_last = next(calls) + 1 == count
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


def train_shapes(pairs, out, code, phase="report", count=0, moment="before"):
    """Train in a process of its own that ends with a code, on one thread: it rounds in one way."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, phase, str(count), moment, *OPTIONS, "--data", pairs,
         "--cache", out.parent / "cache", "--out", out], cwd=ROOT, text=True, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stderr


@pytest.fixture(scope="module")
def undisturbed(pairs, tmp_path_factory):
    """The bytes of the BPS that an undisturbed training writes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train_shapes(pairs, out, 0)
    return (out / "bps.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("phase, count, moment", [
    ("caching", 2, "before"), ("training", 3, "before"), ("training", 3, "after"),
    ("validation", 3, "before"), ("checkpoint", 1, "before"), ("checkpoint", 1, "after"),
    ("checkpoint", 2, "after"), ("writing", 4, "after"), ("best", 1, "after"),
    ("curve", 1, "before"), ("report", 1, "before"), ("report", 1, "after")])
def test_a_run_killed_in_any_phase_ends_with_the_same_bytes(pairs, undisturbed, tmp_path, phase,
                                                            count, moment):
    out = tmp_path / "run"
    train_shapes(pairs, out, -signal.SIGKILL, phase, count, moment)
    train_shapes(pairs, out, 0)
    assert (out / "bps.safetensors").read_bytes() == undisturbed
    assert not (tmp_path / "run-2").exists()
    assert not list(tmp_path.rglob(".*"))               # nor what was half-written


# ---- in this process -----------------------------------------------------------------------

def test_a_second_training_in_a_folder_is_refused(run_train, refused, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert "run is in use by another training. Wait" in refused(run_train, "--out", out)
    assert not list(out.iterdir())
    os.close(other)                                     # as the kernel does when its owner dies
    with pytest.raises(BlockingIOError), lock(out):     # an error of the training, not of the lock
        raise BlockingIOError


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    error = OSError(errno.EBADF, "Bad file descriptor")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=error))
    with pytest.warns(UserWarning, match="run can't be locked"), lock(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize("name, spoil, message", [
    ("checkpoint.safetensors", cut, "checkpoint is corrupt"),
    ("bps.safetensors", Path.unlink, "The run's best weights were in it: put it back"),
    ("bps.safetensors", lambda file: shutil.copy(DEFAULT_BPS, file),
     "is not of step 1 of this run. The run's best weights were in it")])
def test_a_lost_or_corrupt_file_is_noticed_before_the_training(
        name, spoil, message, run_train, interrupted, refused, tmp_path, monkeypatch):
    losses, errors = iter([0.5, 0.3, 0.4] + [0.5] * 9), train.paired_errors    # step 1 is best
    monkeypatch.setattr(train, "paired_errors", lambda *a: errors(*a) * 0 + next(losses))
    monkeypatch.setattr(train, "SELECTION_PAIRS", 1)
    interrupted(run_train, "--out", tmp_path / "run")
    spoil(tmp_path / "run" / name)
    assert message in refused(run_train, "--out", tmp_path / "run")


@pytest.mark.parametrize("owner, name", [
    (weights, "save_file"), pytest.param(Path, "write_text", marks=pytest.mark.slow),
    pytest.param(Image.Image, "save", marks=pytest.mark.slow)], ids=["tensors", "text", "image"])
def test_a_full_disk_is_one_line_and_old_files_stay_intact(
        owner, name, run_train, interrupted, refused, tmp_path, monkeypatch):
    def full(*arguments, **options):
        """Write a part of the file, then fail as a full disk does."""
        file, = [argument for argument in arguments if isinstance(argument, Path)]
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "run"
    interrupted(run_train, "--out", out)                # leaves a checkpoint, a log and a curve
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        assert "No space left" in refused(run_train, "--out", out)
    after = {file.name: file.read_bytes() for file in out.iterdir()}
    assert {name: after[name] for name in before} == before
    assert not any(name.startswith(".") for name in after)              # no temporary file is left
    interrupted(run_train, "--out", out)                # once there is room, it resumes
    assert not (tmp_path / "run-2").exists()
