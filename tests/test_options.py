"""What the scripts share: texts that begin with a dash, quoting, consoles, names of all kinds."""
import os
import random
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageOps

import sample
import train
from inputs import options, pictures
from inputs.options import BASE, ROOT, MAX_SEEDS, shell_command
from inputs.sample_options import DEFAULT_DRAWING

NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture
def run(monkeypatch, short_report):
    """Runs a script with these command-line arguments, in this process."""
    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        options.run_script(module.main)

    return call


@pytest.fixture
def folder(tmp_path):
    """A folder of 12 pairs: the drawing that comes with the project, shifted, and its mirror image.
    """
    drawing = Image.open(DEFAULT_DRAWING).convert("RGB").resize((64, 64))
    for kind in ("images", "conditions"):
        (tmp_path / "pairs" / kind).mkdir(parents=True)
    for i in range(12):
        shifted = ImageOps.expand(drawing, (i, 0, 0, 0), "white").crop((0, 0, 64, 64))
        shifted.save(tmp_path / "pairs" / "conditions" / f"{i:02d}.png")
        ImageOps.mirror(shifted).save(tmp_path / "pairs" / "images" / f"{i:02d}.png")
        (tmp_path / "pairs" / "images" / f"{i:02d}.txt").write_text("a ring")
    return tmp_path / "pairs"


@pytest.mark.slow
def test_a_closed_pipe_ends_a_script_without_a_word_and_after_the_pictures(tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, "bps.py", "--ports"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()                              # as `| head -1` does
    assert process.stderr.read() == b"" and process.wait() == 1

    silent = subprocess.run(f"{shlex.quote(sys.executable)} bps.py --ports >&-", shell=True,
                            cwd=ROOT, stderr=subprocess.PIPE)
    assert silent.stderr == b"" and silent.returncode == 0

    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(pictures, "print", closed, raising=False)
    with pytest.raises(BrokenPipeError):
        pictures.write_pictures("", torch.zeros(2, 3, 8, 8), range(2), [{}, {}], [], tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0000.png", "0001.png"]


def test_memory_that_is_not_there_is_one_line(capsys):
    for fill in (lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60)):
        with pytest.raises(SystemExit) as stop:
            options.run_script(fill)
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and printed.startswith("error: out of memory. Reduce --size")
        assert printed.count("\n") == 1


@pytest.mark.parametrize("prompt", ["-cat", "-3 cats", "-h", "-"])
def test_a_prompt_may_begin_with_a_dash(run, tmp_path, capsys, prompt):
    run(sample, "--bps", "none", "--prompt", prompt, "--negative-prompt", "-dog", "--steps", "1",
        "--n", "1", "--out", tmp_path)
    text = Image.open(tmp_path / "0000.png").text
    assert (text["prompt"], text["negative_prompt"]) == (prompt, "-dog")
    with pytest.raises(SystemExit):
        run(sample, "--prompt", "--n", "1")
    assert "--prompt: expected one argument" in capsys.readouterr().err


def test_a_command_is_split_into_its_words_again():
    random.seed(0)
    letters = "ab -'\"$`!%\\&|<>;#é"
    for _ in range(500):
        words = ["".join(random.choices(letters, k=random.randrange(8))) for _ in range(4)]
        assert shlex.split(shell_command(words), comments=True) == words
    command = shell_command(["python", "sample.py", "--prompt", "a cat's toy, red", "--n", 4])
    assert command == 'python sample.py --prompt "a cat\'s toy, red" --n 4'    # for cmd.exe, too
    assert shell_command(["a", "$b"]) == "a '$b' # quoted for a POSIX shell"
    assert shell_command(["%TEMP%"]) == "%TEMP% # quoted for a POSIX shell"


@pytest.mark.parametrize("there, device", [
    ((), "cpu"), (("mps",), "mps"), (("cuda",), "cuda"), (("cuda", "mps"), "cuda")], ids=str)
def test_a_gpu_is_the_default_where_there_is_one(there, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    monkeypatch.setattr(options, "usable_device", lambda name: name)
    parser = options.Parser("")
    parser.add_device()
    assert parser.parse_args([]).device == device


def test_on_windows_what_cmd_would_split_is_in_double_quotes(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    words = ["C:\\my\\a.png", "C:\\my pics\\a.png", "a&b", "x>y", "100%", ""]
    assert shell_command(words) == (
        'C:\\my\\a.png "C:\\my pics\\a.png" "a&b" "x>y" "100%" ""')


def test_the_last_seeds_picture_can_be_drawn_again(run, tmp_path, capsys):
    last = MAX_SEEDS - 1
    quick = ("--bps", "none", "--steps", "1")
    with pytest.raises(SystemExit):
        run(sample, *quick, "--seed", last, "--n", "2", "--out", tmp_path)
    assert f"--seed {last}: of 2 pictures the last has seed {last + 1}" in capsys.readouterr().err
    run(sample, *quick, "--seed", last, "--n", "1", "--out", tmp_path)
    run(sample, "--from", tmp_path / f"{last}.png", "--out", tmp_path / "again")
    assert (tmp_path / "again" / f"{last}.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_cannot_show_a_prompt_shows_an_escape(tmp_path, encoding):
    done = subprocess.run(
        [sys.executable, "sample.py", "--bps", "none", "--prompt", "grün 苹果", "--steps", "1",
         "--n", "1", "--out", tmp_path], cwd=ROOT, capture_output=True,
        env=os.environ | dict(PYTHONIOENCODING=encoding))
    assert done.returncode == 0, done.stderr
    assert b"\\u82f9\\u679c" in done.stdout
    assert (b"gr\\xfcn" in done.stdout) == (encoding == "ascii")


def test_files_whose_names_are_not_utf8_are_drawn_with_and_trained_on(run, folder, tmp_path,
                                                                      capsys):
    try:
        shutil.copy(DEFAULT_DRAWING, tmp_path / f"{NOT_UTF8}.png")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    out = tmp_path / NOT_UTF8
    run(sample, "--cond", tmp_path / f"{NOT_UTF8}.png", "--steps", "1", "--n", "1", "--out", out)
    run(sample, "--from", out / "0000.png", "--out", tmp_path / "again")
    assert Image.open(tmp_path / "again" / "0000.png").tobytes() == Image.open(
        out / "0000.png").tobytes()
    for kind in ("images", "conditions"):
        (folder / kind / "03.png").rename(folder / kind / f"{NOT_UTF8}.png")
    folder.rename(folder.with_name(f"pairs {NOT_UTF8}"))
    run(train, "--data", folder.with_name(f"pairs {NOT_UTF8}"), "--steps", "1", "--batch", "2",
        "--cache", tmp_path / "cache", "--out", tmp_path / "run")
    with pytest.raises(SystemExit):                     # safetensors could not open what it writes
        run(train, "--steps", "1", "--out", out / "run")
    assert "must be UTF-8, got" in capsys.readouterr().err


def test_a_prompt_that_is_not_utf8_is_refused_in_one_line(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(sample, "--prompt", NOT_UTF8, "--out", tmp_path)
    assert stop.value.code == 2 and "must be UTF-8, got 'caf\\udce9'" in capsys.readouterr().err


def test_a_run_whose_pictures_or_base_were_replaced_is_another_run(run, folder, tmp_path,
                                                                  monkeypatch, capsys):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    arguments = ("--base", base, "--data", folder, "--steps", "2", "--save-every", "1", "--batch",
                 "2", "--cache", tmp_path / "cache", "--out", tmp_path / "run")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "report", interrupted)

    def folder_of_run():
        with pytest.raises(SystemExit):
            run(train, *arguments)
        line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run: ")]
        return line.split(" (")[0]

    assert folder_of_run() == f"run: {tmp_path}/run"
    assert folder_of_run() == f"run: {tmp_path}/run"
    ImageOps.mirror(Image.open(folder / "images" / "05.png")).save(folder / "images" / "05.png")
    assert folder_of_run() == f"run: {tmp_path}/run-2"
    config = base / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(config.read_bytes())
    data[-4] ^= 1                                       # a bit of one weight
    config.write_bytes(data)
    assert folder_of_run() == f"run: {tmp_path}/run-3"
