"""What can rot in the pages: `make docs` finds dead links, but not commands and files that are no longer there."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from orl.cli import parser

PROJECT = Path(__file__).parents[1]
PAGES = sorted(path for path in (PROJECT / "docs").rglob("*.md") if not path.parent.name.startswith("_"))
RULES = "".join(path.read_text() for path in (PROJECT / "workflow" / "rules").glob("*.smk"))
PLACES = r"`((?:\.ci|config|docs|orl|tests|workflow)/[\w./-]+)`"


def commands(page: Path) -> list[list[str]]:
    """The words of the lines that a page tells to type."""
    text = re.sub(r"^```\S.*?^```$", "", page.read_text(), flags=re.M | re.S)  # without those of Python, and so on
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_files_of_a_page_exist(page, capsys):
    for words in commands(page):
        if words[0] == "orl" and "centroid" not in words:
            try:
                parser().parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")
        for option, rule in pairwise(words):
            if option in ("--forcerun", "--until"):
                assert f"rule {rule}:" in RULES, words
    for file in re.findall(PLACES, page.read_text()):
        added = ("simsiam", "centroid")  # by the guides' examples
        assert any(name in file for name in added) or file.startswith("docs/_") or (PROJECT / file).exists(), file
