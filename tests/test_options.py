"""What all scripts share: pipes, memory, quoting, devices, and names that are not ASCII."""
import errno
import io
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import drawings
import pytest
import torch
from PIL import Image

from inputs import options, pictures
from inputs.options import DEFAULT_DRAWING, ROOT, shell_command
from weights import UserError

NOT_UTF8 = os.fsdecode(b"caf\xe9")
QUICK = ("--bps", "none", "--steps", 1, "--n", 1)


def shell(command, **environment):
    return subprocess.run(command, shell=True, cwd=ROOT, capture_output=True,
                          env=os.environ | environment)


# ---- how a script ends ---------------------------------------------------------------------

@pytest.mark.parametrize("main, code, line", [
    (Mock(side_effect=UserError("a.pt is truncated.")), 2, "error: a.pt is truncated."),
    (Mock(side_effect=FileExistsError(17, "File exists", "a")), 2, "error: [Errno 17] File exists"),
    (Mock(side_effect=MemoryError), 2, "error: out of memory. Reduce --size or --batch"),
    (lambda: torch.empty(1 << 50), 2, "error: out of memory. Reduce --size or --batch"),
    (Mock(side_effect=KeyboardInterrupt), 130, "interrupted")])
def test_a_script_ends_in_one_line_and_an_exit_code(main, code, line, capsys):
    with pytest.raises(SystemExit) as stop:
        options.run_script(main)
    printed = capsys.readouterr().err.strip()
    assert stop.value.code == code and printed.startswith(line) and "\n" not in printed


def test_a_script_runs_without_stdout_and_stderr(draw, monkeypatch):
    """As under pythonw and some schedulers."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert (draw(*QUICK) / "0000.png").is_file()
    with pytest.raises(SystemExit) as stop:
        draw("--seed", -1)
    assert stop.value.code == 2


@pytest.mark.slow
def test_a_closed_pipe_ends_a_script_silently():
    command = [sys.executable, "-m", "studies.wiring", "--table"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()                              # as `| head -1` does
    assert process.stderr.read() == b"" and process.wait() == 1
    done = shell(f"{shlex.join(command)} >&-")
    assert done.stderr == b"" and done.returncode == 0


def test_a_picture_is_written_before_its_name_is_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "print", Mock(side_effect=BrokenPipeError), raising=False)
    with pytest.raises(BrokenPipeError):
        pictures.write_new(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (4, 4)


def test_a_picture_for_which_there_is_no_room_leaves_nothing_behind(tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pictures, "open", Full, raising=False)
    with pytest.raises(UserError, match="a.png can't be written .No space left"):
        pictures.write_new(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


# ---- the command line ----------------------------------------------------------------------

@pytest.mark.parametrize("prompt", ["-cat", "-3 cats", "-h", "-"])
def test_a_prompt_may_begin_with_a_dash(draw, prompt):
    out = draw(*QUICK, "--prompt", prompt, "--negative-prompt", "-dog")
    stored = Image.open(out / "0000.png").text
    assert stored["prompt"] == prompt and '"negative_prompt": "-dog"' in stored["options"]


def test_a_shell_splits_a_command_into_its_arguments():
    random.seed(0)
    letters = "ab -'\"$`!%\\&|<>;#é"
    for _ in range(500):
        argv = ["".join(random.choices(letters, k=random.randrange(8))) for _ in range(4)]
        assert shlex.split(shell_command(argv), comments=True) == argv
    assert shell_command(["a.py", "--n", 4, Path("b c")]) == "a.py --n 4 'b c'"


def test_on_windows_arguments_are_in_double_quotes(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    argv = ["C:\\my\\a.png", "C:\\my pics\\a.png", "a&b", "x>y", "100%", ""]
    assert shell_command(argv) == 'C:\\my\\a.png "C:\\my pics\\a.png" "a&b" "x>y" "100%" ""'


@pytest.mark.parametrize("available, device", [
    ((), "cpu"), (("mps",), "mps"), (("cuda",), "cuda"), (("cuda", "mps"), "cuda")], ids=str)
def test_an_available_gpu_is_the_default(available, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in available)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in available)
    monkeypatch.setattr(options, "usable_device", str)
    parser = options.Parser("")
    parser.add_device()
    assert parser.parse_args([]).device == device


# ---- names and texts that are not ASCII ----------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_shows_an_escape_for_what_it_cannot_show(tmp_path, encoding):
    command = [sys.executable, "sample.py", *QUICK, "--prompt", "grün 苹果", "--out", tmp_path]
    done = shell(shlex.join(map(str, command)), PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert b"\\u82f9\\u679c" in done.stdout
    assert (b"gr\\xfcn" in done.stdout) == (encoding == "ascii")


def test_files_may_have_names_that_are_not_utf8(draw, run_train, interrupted, pixels, tmp_path):
    drawing = tmp_path / f"{NOT_UTF8}.png"
    try:
        shutil.copy(DEFAULT_DRAWING, drawing)
    except OSError:
        pytest.skip("this file system has only UTF-8 names")
    out = draw("--cond", drawing, "--n", 1, "--steps", 1)
    again = draw("--from", out / "0000.png")
    assert (pixels(out / "0000.png") == pixels(again / "0000.png")).all()
    folder = drawings.write_shapes(tmp_path / f"pairs {NOT_UTF8}")
    for part in ("images", "conditions"):
        (folder / part / "3.png").rename(folder / part / f"{NOT_UTF8}.png")
    interrupted(run_train, "--data", folder, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "bps.safetensors").is_file()
