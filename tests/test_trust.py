"""Nothing is lost: killed runs, folders that two want, disks that are full, best weights."""
import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import drawings
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
import weights
from bps import load_bps
from inputs.options import ROOT
from inputs.run_folder import lock
from measure import curve
from weights import UserError

OPTIONS = ["--steps", "4", "--batch", "2", "--save-every", "2", "--lr", "1e-2"]
# A training that kills itself when a function is called the n-th time: before it, or behind it.
KILLED = """
import os, signal, sys
import data, diffusion, train, weights
from measure import report

report.SAMPLING, report.VALIDATION_T = diffusion.Sampling(steps=2), (500,)
phase, count, behind = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "behind"
owner, name = {"caching": (train, "LatentCache"), "training": (train, "require_finite"),
               "validation": (train, "paired_errors"), "checkpoint": (weights, "save_training"),
               "best": (train, "save_bps"), "curve": (train, "draw_curve"),
               "report": (train, "report"), "none": (data, "open_pair")}[phase]
function, calls = getattr(owner, name), iter(range(10**6))

def killed(*arguments, **options):
    last = next(calls) + 1 == count and phase != "none"
    if last and not behind:
        os.kill(os.getpid(), signal.SIGKILL)
    result = function(*arguments, **options)
    if last:
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
    """Starts a training in a process of its own, on one thread, which rounds in one way."""
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, phase, str(count), moment, *OPTIONS, "--data", pairs,
         "--cache", out.parent / "cache", "--out", out], cwd=ROOT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def undisturbed(pairs, tmp_path_factory):
    """The bytes that an undisturbed training writes, and the seconds that it takes."""
    out, began = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    done = start(pairs, out)
    assert done.wait() == 0, done.stderr.read()
    return (out / "bps.safetensors").read_bytes(), time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("phase, count, moment", [
    ("caching", 2, "before"), ("training", 3, "before"), ("training", 3, "behind"),
    ("validation", 3, "before"), ("checkpoint", 1, "before"), ("checkpoint", 1, "behind"),
    ("checkpoint", 2, "behind"), ("best", 1, "behind"), ("curve", 1, "before"),
    ("report", 1, "before"), ("report", 1, "behind")])
def test_a_run_killed_in_any_phase_ends_with_the_same_bytes(pairs, undisturbed, tmp_path, phase,
                                                            count, moment):
    killed = start(pairs, tmp_path / "run", phase, count, moment)
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    done = start(pairs, tmp_path / "run")
    assert done.wait() == 0, done.stderr.read()
    assert (tmp_path / "run" / "bps.safetensors").read_bytes() == undisturbed[0]
    assert not (tmp_path / "run-2").exists()


@pytest.mark.slow
def test_a_run_killed_twenty_times_at_random_ends_with_the_same_bytes(pairs, undisturbed, tmp_path):
    random.seed(0)
    expected, seconds = undisturbed
    for _ in range(20):
        done = start(pairs, tmp_path / "run")
        time.sleep(random.uniform(0.5, 1) * seconds)
        done.kill()
        done.wait()
        if (tmp_path / "run" / "condition.png").exists():       # it had come to its end
            break
    done = start(pairs, tmp_path / "run")
    assert done.wait() == 0, done.stderr.read()
    assert (tmp_path / "run" / "bps.safetensors").read_bytes() == expected


# ---- in this process -----------------------------------------------------------------------

@pytest.fixture
def run(monkeypatch, pairs, short_report):
    """Runs train.py on the pairs, with a short report."""
    def call(out, *options):
        monkeypatch.setattr(sys, "argv", ["train.py", *OPTIONS, "--data", str(pairs), "--cache",
                                          str(out.parent / "cache"), "--out", str(out), *options])
        train.main()

    return call


def test_a_second_training_in_a_folder_ends_in_one_line(run, tmp_path):
    (tmp_path / "run").mkdir()
    other = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="run is in use by another training. Wait until it ends"):
        run(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    os.close(other)                                     # as the kernel does when its owner dies
    with pytest.raises(BlockingIOError), lock(tmp_path / "run"):      # another's, not ours
        raise BlockingIOError
    run(tmp_path / "run")
    assert (tmp_path / "run" / "bps.safetensors").exists()


def test_where_folders_cannot_be_locked_a_warning_says_so(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="run can't be locked"), lock(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("keep, step, factor", [("best", 2, 1), ("last", 4, 2)])
def test_the_weights_of_the_lowest_validation_loss_are_kept(run, tmp_path, monkeypatch, keep, step,
                                                           factor):
    losses = iter([0.5, 0.3, 0.4])                      # of the base, of steps 2 and 4
    errors = train.paired_errors
    monkeypatch.setattr(train, "paired_errors",
                        lambda *a: errors(*a) * 0 + next(losses))
    saved = {}
    save = train.Run.save

    def noted(self, number, *arguments):
        saved[number] = {key: tensor.half() for key, tensor in self.bps.state_dict().items()}
        save(self, number, *arguments)

    monkeypatch.setattr(train.Run, "save", noted)
    run(tmp_path / "run", "--keep", keep)
    tensors = {key: tensor.clone() for key, tensor in
               load_file(tmp_path / "run" / "bps.safetensors").items()}
    assert all(torch.equal(tensors[key], saved[step][key]) for key in tensors)
    assert any(not torch.equal(saved[2][key], saved[4][key]) for key in tensors)
    metadata = load_bps(tmp_path / "run" / "bps.safetensors").metadata
    assert metadata["best"]["step"] == step
    assert metadata["best"]["loss"] == pytest.approx(0.3 if keep == "best" else 0.4)


WRITERS = {"checkpoint": (weights, "save_file"), "texts": (Path, "write_text"),
           "pictures": (Image.Image, "save")}


@pytest.mark.parametrize("name", [
    name if name == "checkpoint" else pytest.param(name, marks=pytest.mark.slow)
    for name in WRITERS])
def test_a_full_disk_is_one_line_and_older_files_stay_whole(run, tmp_path, monkeypatch, capsys,
                                                            name):
    out, (owner, function) = tmp_path / "run", WRITERS[name]
    with pytest.MonkeyPatch.context() as patch:         # leaves a checkpoint, a log and a curve
        patch.setattr(train, "report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    write = getattr(owner, function)

    def full(*arguments, **options):
        """Writes a part of the file that is asked for, then fails as a full disk does."""
        file, = [each for each in arguments if isinstance(each, Path)]
        assert out in file.parents
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, function, full)
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as stop:
        train.run_script(lambda: run(out))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and "No space left" in lines[0]
    for file in out.iterdir():
        assert not file.name.startswith(".")            # no temporary file is left
        if file.name in before:
            assert file.read_bytes() == before[file.name]
    monkeypatch.setattr(owner, function, write)
    run(out)                                            # and once there is room, it goes on
    assert (out / "samples.png").exists() and not (tmp_path / "run-2").exists()


def test_the_curve_shows_its_three_losses_over_the_steps(tmp_path):
    rows = [dict(step=step, train_loss=0.08 - step / 1e5, val_base=0.07, val_steered=0.06)
            for step in (100, 200, 300)]
    curve.draw_curve(rows, tmp_path / "curve.png")
    image = Image.open(tmp_path / "curve.png").convert("RGB")
    pixels = np.asarray(image, int).reshape(-1, 3)
    for _, color in curve.LINES.values():               # as good as its color, scaled down
        assert np.abs(pixels - list(bytes.fromhex(color[1:]))).max(1).min() < 10
    curve.draw_curve(rows[:1], tmp_path / "curve.png")          # one row is a curve, too
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]
