"""README and the chapters: commands run, quotes are current, links lead somewhere, code runs."""
import argparse
import functools
import importlib
import re
import shlex
import shutil
import sys
from unittest.mock import Mock

import pytest
from PIL import Image

import sample
from diffusion import Sampling
from inputs.options import BASE, DEFAULT_BPS, DEFAULT_DRAWING, ROOT
from measure import report
from studies import base as base_study
from studies import figures, walkthrough, wiring

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tiny" / "README.md"]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS[ROOT / "README.md"]
COMMANDS = list(dict.fromkeys(
    line for text in TEXTS.values()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines() if line.strip() and not line.startswith("#")))
QUOTES = [(page, block) for page, text in TEXTS.items()
          for block in re.findall(r"```python\n# (\S+\.py\n.*?)```", text, re.DOTALL)]


def split(command):
    """(module, its arguments) of a command line in the pages."""
    argv = shlex.split(command.split("&&")[-1], comments=True)
    argv = ["python", *argv[3:]] if argv[:2] == ["torchrun", "--nproc-per-node"] else argv
    name, *arguments = argv[2:] if argv[1] == "-m" else argv[1:]
    name = "pad.__main__" if name == "pad" else name.removesuffix(".py")
    return importlib.import_module(name), arguments


def test_the_readme_shows_a_picture_first_and_contains_the_install_steps():
    lines = README.splitlines()
    assert any(line.startswith("![") for line in lines[:10])
    assert "python sample.py" in README[:README.index("## The idea")]
    for command in ("python train.py --task sketch", "python -m pytest"):
        assert f"pip install -r requirements.txt && {command}" in lines


def test_the_readme_is_short_and_narrow():
    lines = README.splitlines()
    assert not any(str(ROOT) in text for text in TEXTS.values())     # pasted from this machine
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 110
    assert not [page.name for page, text in TEXTS.items() if re.search("@[A-Z]+@", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_heading_has_empty_lines_around_it(page):
    prose = re.sub(r"^```.*?^```$", "code", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"\S+ #{2,} .*", prose)
    assert not re.findall(r"[^\n]\n#+ .*|^#+ .*\n[^\n].*", prose, re.MULTILINE)


class Parsed(Exception):
    """Raised once a script has read its command line."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_arguments_that_its_script_takes(command, monkeypatch):
    if re.match(r"(.*python -m pytest( -m (peers -s|browser))?|pip install [^&]*)$", command):
        return
    module, arguments = split(command)
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *arguments):
        parse_args(parser, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    with pytest.raises(Parsed):
        module.main()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "sample.py" in c])
def test_a_sampling_command_of_the_readme_draws(command, tmp_path, monkeypatch, run_script,
                                                sd_folder, sd_file):
    _, arguments = split(command)
    (tmp_path / "drawings").mkdir()
    shutil.copy(DEFAULT_DRAWING, tmp_path / "drawings")
    short = ["--steps", 1, "--n", 1, "--size", 64, "--out"]
    if "--from" in arguments:
        run_script(sample, *short, tmp_path / "first")
    # for a user's own files: the base is the embedded one where BPS steers it
    replacements = {
        **dict.fromkeys([f"runs/{run}/bps.safetensors" for run in ("sketch", "sd", "coco")]
                        + ["A.safetensors", "B.safetensors"], DEFAULT_BPS),
        **dict.fromkeys([f"{name}.png" for name in ("a", "b", "drawing", "left", "right")],
                        DEFAULT_DRAWING),
        **dict.fromkeys(["DRAWINGS", "VAL2017_EDGES"], tmp_path / "drawings"),
        "pictures/0000.png": tmp_path / "first" / "0000.png",
        "SD_FOLDER": BASE if "--bps" in arguments else sd_folder("small1"),
        "MODEL.safetensors": sd_file("small1")}
    monkeypatch.chdir(ROOT)
    arguments = [replacements.get(word, word) for word in arguments]
    for option in ("--steps", "--n", "--size", "--out"):
        if option in arguments:                         # no option may be given twice
            del arguments[arguments.index(option):arguments.index(option) + 2]
    run_script(sample, *arguments, *short, tmp_path)
    assert list(tmp_path.glob("*0000.png"))


def test_the_table_of_ports_in_the_walkthrough_is_what_is_printed(run_script, capsys):
    run_script(wiring, "--table")
    assert capsys.readouterr().out in TEXTS[ROOT / "docs" / "walkthrough.md"]


@pytest.mark.slow
def test_the_shapes_in_the_walkthrough_are_what_is_printed(run_script, capsys):
    run_script(walkthrough)
    printed = capsys.readouterr().out
    shown = TEXTS[ROOT / "docs" / "walkthrough.md"].split("```\n")[2]
    # the last digit of a number depends on the machine
    assert re.sub(r"[\d.-]+", "", printed).split() == re.sub(r"[\d.-]+", "", shown).split()


def test_every_quote_is_what_its_file_says():
    assert len(QUOTES) >= 9                                     # the method quotes every step
    for page, quote in QUOTES:
        file, lines = quote.split("\n", 1)
        assert lines in (ROOT / file).read_text(encoding="utf-8"), f"{page.name}: {file}"


def test_the_python_of_the_readme_runs_and_draws(tmp_path, monkeypatch):
    example, = re.findall(r"```python\n(from bps .*?)```", README, re.DOTALL)
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    with Image.open(tmp_path / "portrait.png") as image:
        assert image.size == (64, 64) and len(image.getcolors(4096)) > 100


def test_the_line_counts_of_the_readme_are_about_right():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
    assert len(rows) == 11
    for file, lines in rows:
        count = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert int(lines) == pytest.approx(count, rel=0.05), file


def headings(text):
    """The anchors of a page's headings, as a code host makes them."""
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-")
            for line in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)]+)\)", TEXTS[page])
    for target in targets:
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            assert anchor in headings(linked.read_text(encoding="utf-8")), target


def test_every_chapter_is_linked_from_the_readme_and_every_figure_is_shown():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in README, page.name
    for figure in (ROOT / "docs" / "figures").iterdir():
        assert any(f"figures/{figure.name}" in text for text in TEXTS.values()), figure.name


@pytest.fixture
def one_step(monkeypatch):
    """Draw a study's pictures with a single step."""
    for module in (base_study, figures):
        monkeypatch.setattr(module, "draw",
                            functools.partial(sample.draw, sampling=Sampling(steps=1)))
    monkeypatch.setattr(report, "SAMPLING", Sampling(steps=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", figures.FIGURES)
def test_each_figure_of_steering_is_written(name, tmp_path, run_script, one_step):
    run_script(figures, name, "--out", tmp_path)
    width, _ = Image.open(tmp_path / f"{name}.png").size
    assert width > 4 * 128


def test_the_wiring_has_an_arrow_for_each_of_21_maps(tmp_path, run_script, monkeypatch):
    arrows = Mock()
    monkeypatch.setattr(wiring.Drawing, "arrow", arrows)
    run_script(wiring, "--out", tmp_path)
    assert arrows.call_count == 21
    assert Image.open(tmp_path / "wiring.png").width > 800


@pytest.mark.slow
def test_the_evaluation_of_the_base_prints_its_tables(tmp_path, run_script, one_step, monkeypatch,
                                                      capsys):
    for name, value in dict(SHEET_ROWS=3, MATCHED=2, TIMESTEPS_PER_RANGE=1).items():
        monkeypatch.setattr(base_study, name, value)
    figures_of, pairs_of = base_study.world.figures, base_study.load_pairs
    monkeypatch.setattr(base_study.world, "figures", lambda split, *styles: (
        figures_of(split, *styles)[:4 if split else None]))
    monkeypatch.setattr(base_study, "load_pairs", lambda *names: pairs_of(*names)[:4])
    run_script(base_study, "--bps", DEFAULT_BPS, "--out", tmp_path)
    rows = [line.split(" | ")[:4] for line in capsys.readouterr().out.splitlines()
            if line.startswith("| sketch")]
    assert [row[0] for row in rows[1:3]] == ["| sketch, unseen hair", "| sketch, shaky hand"]
    assert rows[0][1:3] == rows[2][1:3] and rows[0][3] != rows[2][3]    # other drawings are shown
    assert {file.name for file in tmp_path.iterdir()} == {"drawn.png", "matching.png",
                                                          "prompts.png"}
