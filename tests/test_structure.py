"""Imports point down without cycles, the models import nothing of ours, and folders stay small."""
import ast
import io
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# lines of code in the files of each folder; 3 % more are allowed
BUDGETS = {".": 2150, "inputs": 1340, "measure": 560, "studies": 1470, "pad": 330, "tiny": 780,
           "tests": 5330}
FILES = [file.relative_to(ROOT) for folder in (".", "inputs", "measure", "studies", "pad", "tiny")
         for file in sorted((ROOT / folder).glob("*.py")) if file.name != "__init__.py"]
MODULES = {".".join(file.with_suffix("").parts): file for file in FILES}
ALONE = ("weights", "diffusion", "unet", "vae", "clip")
# A module may import those of its own line, without cycles, and those of lines above it.
FLOORS = [ALONE, ("bps",), ("inputs",), ("measure.plots", "measure.bits", "tiny", "toy2d"),
          ("data",), ("sample",), ("draws",), ("measure", "pad", "tiny.pretrain"), ("train",),
          ("studies",)]


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


def test_lines_have_at_most_100_columns():
    for file in (*FILES, *sorted(ROOT.glob("tests/*.py"))):
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if len(line) > 100], file


def test_imports_have_no_cycle():
    TopologicalSorter(GRAPH).prepare()


def test_the_lesson_has_eleven_flat_files():
    flat = {file.stem for file in FILES if len(file.parts) == 1}
    assert flat == {"toy2d", "bps", *ALONE, "train", "sample", "data", "draws"}


def code_lines(file):
    """Number of lines in a file that are not blank, a comment or part of a docstring."""
    text = file.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    skipped = {token.start[0] for token in tokens if token.type == tokenize.COMMENT
               and not token.line[:token.start[1]].strip()}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) \
                and ast.get_docstring(node) is not None:
            skipped.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(bool(line.strip()) and number not in skipped
               for number, line in enumerate(text.split("\n"), 1))


@pytest.mark.parametrize("folder", BUDGETS)
def test_a_folder_has_no_more_code_than_its_budget(folder):
    code = sum(map(code_lines, (ROOT / folder).glob("*.py")))
    assert code <= 1.03 * BUDGETS[folder], f"{folder}: {code} lines; remove something first"
