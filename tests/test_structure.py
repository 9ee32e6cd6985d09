"""Imports point down, have no cycles, and the models and the schedule import nothing of ours."""
import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [file.relative_to(ROOT) for folder in (".", "inputs", "measure", "studies", "pad", "tiny")
         for file in sorted((ROOT / folder).glob("*.py")) if file.name != "__init__.py"]
MODULES = {".".join(file.with_suffix("").parts): file for file in FILES}
ALONE = ("weights", "diffusion", "unet", "vae", "clip")
# A module may import those of its own line, without cycles, and those of lines above it.
FLOORS = [ALONE, ("bps",), ("inputs",), ("measure.plots", "measure.bits", "tiny", "toy2d"),
          ("data",), ("sample",), ("draws",), ("measure", "pad", "tiny.pretrain"), ("train",),
          ("studies",)]
RELIED_ON = ["bps.posterior", "bps.BPS", "bps.BPSConfig", "bps.config_for", "bps.load_bps",
             "bps.save_bps", "unet.UNet", "unet.UNetConfig", "diffusion.NoiseSchedule",
             "diffusion.sample", "inputs.checkpoints.load_unet", "inputs.checkpoints.load_vae",
             "inputs.checkpoints.load_clip"]


def our_imports(tree):
    """[(node, module)] of the imports of our own modules in a syntax tree."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [(node, name) for name in names if name in MODULES]
    return found


TREES = {name: ast.parse((ROOT / file).read_text(encoding="utf-8"))
         for name, file in MODULES.items()}
GRAPH = {name: {module for _, module in our_imports(tree)} for name, tree in TREES.items()}


def floor(module):
    """Index in FLOORS of a module, or else of its folder."""
    return next(index for name in (module, module.split(".")[0])
                for index, names in enumerate(FLOORS) if name in names)


@pytest.mark.parametrize("module", ALONE)
def test_a_model_or_schedule_imports_nothing_of_ours(module):
    assert not GRAPH[module]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_and_stand_at_the_top_of_a_file(module):
    assert not {name for name in GRAPH[module] if floor(name) > floor(module)}
    assert all(node in TREES[module].body for node, _ in our_imports(TREES[module]))


def test_imports_have_no_cycle():
    TopologicalSorter(GRAPH).prepare()


def test_the_lesson_has_eleven_flat_files():
    flat = {file.stem for file in FILES if len(file.parts) == 1}
    assert flat == {"toy2d", "bps", *ALONE, "train", "sample", "data", "draws"}


@pytest.mark.parametrize("name", RELIED_ON)
def test_a_name_that_others_rely_on_is_in_its_module(name):
    module, attribute = name.rsplit(".", 1)
    assert hasattr(importlib.import_module(module), attribute)
