"""The files import one way: no circle, no import of our own hidden inside a function."""
import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [file.relative_to(ROOT) for folder in (".", "inputs", "measure", "pad", "tiny")
         for file in sorted((ROOT / folder).glob("*.py")) if file.name != "__init__.py"]
MODULES = {".".join(file.with_suffix("").parts): file for file in FILES}
# Each line stands above all that it imports; files of one line may import each other one way.
FLOORS = [("weights", "diffusion"), ("inputs",), ("unet", "vae", "clip"),
          ("measure.plots", "measure.bits", "bps", "tiny", "toy2d"), ("data",), ("sample",),
          ("measure", "pad"), ("train",), ("studies.rivals",)]
RELIED_ON = ["bps.posterior", "bps.BPS", "bps.BPSConfig", "bps.config_for", "bps.load_bps",
             "bps.save_bps", "unet.UNet", "unet.UNetConfig", "unet.load_unet", "vae.load_vae",
             "clip.load_clip", "diffusion.NoiseSchedule", "diffusion.sample"]


def our_imports(tree):
    """Returns [(node, module)] of the imports of our own modules in a syntax tree."""
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
    """Returns the index in FLOORS of a module: that of its own name, else of its folder's."""
    for name in (module, module.split(".")[0]):
        for index, names in enumerate(FLOORS):
            if name in names:
                return index
    raise AssertionError(f"{module}: stands on no floor; add it to FLOORS")


def reached(module, graph):
    """Returns all modules that a module imports, by way of others too."""
    seen, open_ends = set(), [module]
    while open_ends:
        for imported in graph[open_ends.pop()] - seen:
            seen.add(imported)
            open_ends.append(imported)
    return seen


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_nothing_that_stands_above_it(module):
    above = [imported for imported in GRAPH[module] if floor(imported) > floor(module)]
    assert not above


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_in_no_import_circle(module):
    assert module not in reached(module, GRAPH)


def test_a_circle_would_be_seen():
    assert "a" in reached("a", {"a": {"b"}, "b": {"c"}, "c": {"a"}})


@pytest.mark.parametrize("module", MODULES)
def test_no_import_of_our_own_hides_inside_a_function(module):
    top = set(TREES[module].body)
    assert all(node in top for node, _ in our_imports(TREES[module]))


def test_there_are_ten_flat_modules():
    flat = {file.stem for file in FILES if len(file.parts) == 1}
    assert flat == {"bps", "unet", "vae", "clip", "diffusion", "weights", "data", "train",
                    "sample", "toy2d"}


@pytest.mark.parametrize("name", RELIED_ON)
def test_a_name_that_others_rely_on_imports_from_its_module(name):
    module, attribute = name.split(".")
    assert hasattr(importlib.import_module(module), attribute)
