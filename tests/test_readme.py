"""The READMEs' commands are ones their scripts take, and every file named is there."""
import functools
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

import bps
import sample
import toy2d
import train
from diffusion import Sampling
from inputs import options
from measure import base, cost, figures, samplers, toy
from tiny import make_data, pretrain

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BOTH = README + (ROOT / "tiny" / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", BOTH, re.DOTALL)
            for line in block.splitlines() if line.strip() and not line.startswith("#")]
MODULES = {"train.py": train, "sample.py": sample, "toy2d.py": toy2d,
           "bps.py": bps, "tiny.pretrain": pretrain, "tiny.make_data": make_data,
           "measure.base": base, "measure.cost": cost, "measure.figures": figures,
           "measure.samplers": samplers, "measure.toy": toy}


def split(command):
    """Returns (module or None, its arguments) of a command line of README."""
    words = shlex.split(command.split("&&")[-1], comments=True)
    words = ["python", *words[3:]] if words[:2] == ["torchrun", "--nproc-per-node"] else words
    assert words[0] == "python", command
    name, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    return MODULES.get(name), arguments


def test_the_first_two_commands_are_the_install_steps():
    assert COMMANDS[0] == "pip install -r requirements.txt && python train.py --task sketch"
    assert COMMANDS[1] == "pip install -r requirements.txt && python -m pytest"
    lines = README.splitlines()
    assert any(line.startswith("![") for line in lines[:10])
    assert max(lines.index(command) for command in COMMANDS[:2]) < 25


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_has_arguments_that_its_script_takes(command, monkeypatch):
    module, arguments = split(command)
    if module is None:
        assert command.split()[-1] == "pytest" or command == "python -m pytest -m peers -s"
        return
    # a script reads its arguments first: with --help at the end they are checked, and it stops
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if "sample.py" in c])
def test_a_sampling_command_of_the_readme_draws(command, tmp_path, monkeypatch, sd_folder,
                                                sd_file):
    _, arguments = split(command)
    tiny = options.BASE.parent
    if "DRAWINGS" in arguments:
        (tmp_path / "drawings").mkdir()
        shutil.copy(tiny / "drawing.png", tmp_path / "drawings")
    if "--from" in arguments:
        monkeypatch.setattr(sys, "argv", ["sample.py", "--steps", "2", "--n", "1", "--out",
                                          str(tmp_path / "first")])
        sample.main()
    # what stands in for a user's own files: the base is the embedded one where BPS steers it
    bps_file, drawing = tiny / "bps_sketch.safetensors", tiny / "drawing.png"
    stand_ins = {"runs/sketch/bps.safetensors": bps_file, "runs/sd/bps.safetensors": bps_file,
                 "A.safetensors": bps_file, "B.safetensors": bps_file, "a.png": drawing,
                 "b.png": drawing, "drawing.png": drawing, "left.png": drawing,
                 "right.png": drawing, "768x512": "96x64",
                 "DRAWINGS": tmp_path / "drawings",
                 "pictures/0000.png": tmp_path / "first/0000.png",
                 "SD_FOLDER": options.BASE if "--bps" in arguments else sd_folder("small1"),
                 "MODEL.safetensors": sd_file("small1")}
    arguments = [str(stand_ins.get(word, word)) for word in arguments]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments, "--steps", "2", "--n", "1",
                                      "--out", str(tmp_path)])
    sample.main()
    assert list(tmp_path.glob("*0000.png"))


def test_the_table_of_ports_in_the_readme_is_what_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bps.py", "--ports"])
    bps.main()
    assert capsys.readouterr().out in README


def test_every_file_that_the_readme_links_to_exists():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    targets += [file for row in re.findall(r"^\| (`[^|]+`) \|", README, re.M)
                for file in re.findall(r"`([\w/]+\.\w+)`", row)]
    assert targets
    headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-")
                for line in re.findall(r"^#+ (.*)$", README, re.M)}
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings, anchor
    for target in targets:
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("name", figures.FIGURES)
def test_each_figure_of_steering_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw",
                        functools.partial(figures.draw, sampling=Sampling(steps=1)))
    monkeypatch.setattr(sys, "argv", ["figures", name, "--out", str(tmp_path)])
    figures.main()
    width, _ = Image.open(tmp_path / f"{name}.png").size
    assert width > 6 * 128


@pytest.mark.slow
def test_samplers_are_compared_with_and_without_bps(monkeypatch, capsys):
    monkeypatch.setattr(samplers, "COMPARED", (Sampling("ddim", 2), Sampling("dpm++2m", 3)))
    monkeypatch.setattr(sys, "argv", ["samplers", "--count", "25", "--device", "cpu"])
    samplers.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[who, what] for who in ("the base", "with BPS")
                                         for what in ("ddim 2", "dpm++2m 3")]
    assert all(0 <= float(row[3]) <= 1 for row in rows)
    assert float(rows[3][3]) > float(rows[1][3])            # steering is obeyed in three steps, too


@pytest.mark.slow
def test_the_evaluation_of_the_base_prints_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base, "draw", functools.partial(base.draw, sampling=Sampling(steps=1)))
    monkeypatch.setattr(base, "SHEET_ROWS", 3)
    monkeypatch.setattr(base.world, "pool", lambda split: base.world.records(split)[::40])
    monkeypatch.setattr(sys, "argv", ["base", "--count", "30", "--out", str(tmp_path / "d.png")])
    base.main()
    printed = capsys.readouterr().out
    for words in ("PSNR", "L1", "t 750..999", "true 3d test pictures", "name among 24, drawn",
                  "drawn relative to true"):
        assert words in printed
    assert (tmp_path / "d.png").is_file()
