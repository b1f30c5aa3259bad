"""The Python blocks of README and of each tutorial, from top to bottom."""

import pytest
from conftest import ROOT
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

CHAPTERS = [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("[0-9]*.md"))]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = list(Sybil([PythonCodeBlockParser()]).parse(path))
    assert examples
    for example in examples:
        example.evaluate()
