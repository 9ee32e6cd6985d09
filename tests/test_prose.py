"""Wordings that style.md rules out do not return, in any page or file of the project."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [file.relative_to(ROOT) for pattern in ("*", "*/*", "tiny/data/*")
         for file in sorted(ROOT.glob(pattern))
         if file.suffix in (".md", ".py") and file != Path(__file__)
         and not file.parent.name.startswith(".")]
BANNED = (                          # regular expressions; a line's end counts as a space
    r"\ballowed (is|are)\b",        # write: must be RANGE, got VALUE
    r"\bis not seen\b",             # we found no evidence
    r"\banew\b",                    # again
    r"\bmend(s|ed)?\b",             # fix
    r"\bcomes along\b",             # is included
    r"\bof before\b",               # old
    r"\bwhat else\b",               # everything else that
    r"\bto the bit\b",              # bit for bit
    r"\bof which\b",                # start a new sentence
    r"\bgoes on (with|from)\b",     # resumes
    r"\bstands in\b",               # is in
    r'"""Returns ')                 # a noun phrase, or an imperative


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_has_no_wording_that_the_style_rules_out(file):
    text = " ".join((ROOT / file).read_text(encoding="utf-8").split())
    assert [found[0] for banned in BANNED for found in re.finditer(banned, text)] == []
