"""README and tutorials: their Python blocks from top to bottom, and where their links lead."""

import re

import pytest
from conftest import ROOT
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

CHAPTERS = [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("[0-9]*.md"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("*.md")), ROOT / "ema_kernel" / "README.md"]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = list(Sybil([PythonCodeBlockParser()]).parse(path))
    assert examples
    for example in examples:
        example.evaluate()


LINK = re.compile(r"\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s]+)\)")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    """To a file; to a heading; to a line that holds the words of the link."""
    text = path.read_text(encoding="utf-8")
    links = [(label, target) for label, target in LINK.findall(text) if not target.startswith("http")]
    for label, target in links:
        name, _, place = target.partition("#")
        aim = (path.parent / name if name else path).read_bytes().decode(errors="replace")
        if re.fullmatch(r"L\d+", place):
            lines, word = aim.splitlines(), label.strip("`")
            now = [i for i, line in enumerate(lines, 1) if word in line]
            assert int(place[1:]) in now, f"{path.name}: {label} is in line {now}, not {place}"
        elif place:
            headings = [line.lstrip("# ").lower() for line in aim.splitlines() if line.startswith("#")]
            assert place in [re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings]
