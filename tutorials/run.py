"""Runs the code of a chapter, or makes a notebook or a script of it.

    python tutorials/run.py 3               # run chapter 3 from its first block to its last
    python tutorials/run.py 3 --notebook    # write 03_ppo_equation_by_equation.ipynb instead of running it
    python tutorials/run.py 3 --script      # write 03_ppo_equation_by_equation.py, to be edited

Pictures, notebooks and scripts are left in the current folder. A notebook or a script that is already there
is not overwritten, because it may have been edited."""

import argparse
import json
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # where elastic_reset.py is
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def chapter(number):
    """The file of a chapter. ValueError if there is none."""
    chapters = sorted(HERE.glob("[0-9]*.md"))
    for path in chapters:
        if number.isdecimal() and path.name.startswith(f"{int(number):02}_"):
            return path
    raise ValueError(f"there is no chapter {number!r}; expected 1 to {len(chapters)}")


def run(path):
    """Runs the blocks as one program. An error names the chapter's file and the line in it."""
    text, namespace = path.read_text(encoding="utf-8"), {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        above = text.count("\n", 0, block.start(1))
        exec(compile("\n" * above + block[1], str(path), "exec"), namespace)


def script(path):
    return "\n\n".join(BLOCK.findall(path.read_text(encoding="utf-8")))


def notebook(path):
    """The chapter as the JSON of a notebook: a cell for each block of code and one for the text before it.
    Relative links are rewritten so that they work from the current folder."""

    def from_here(link):
        return f"]({os.path.relpath(HERE / link[1])}{link[2]})"

    text = re.sub(r"\]\((?!http|#)([^)#\s]+)([^)]*)\)", from_here, path.read_text(encoding="utf-8"))
    cells = []
    for i, source in enumerate(BLOCK.split(text)):  # text and code by turns
        kind = ("markdown", "code")[i % 2]
        cell = dict(cell_type=kind, id=f"cell{i}", metadata={}, source=source.strip())
        cells.append(cell | (dict(outputs=[], execution_count=None) if kind == "code" else {}))
    kernel = dict(name="python3", display_name="Python 3", language="python")
    return json.dumps(
        dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5), indent=1
    )


def main(argv=None) -> int:
    style = argparse.RawDescriptionHelpFormatter
    flags = argparse.ArgumentParser("run.py", description=__doc__, formatter_class=style, allow_abbrev=False)
    flags.add_argument("chapter", help="its number")
    flags.add_argument("--notebook", action="store_true", help="write the chapter as a notebook, .ipynb")
    flags.add_argument("--script", action="store_true", help="write the chapter's code as a program, .py")
    given = flags.parse_args(argv)
    try:
        path = chapter(given.chapter)
        for wanted, make, ending in ((given.notebook, notebook, ".ipynb"), (given.script, script, ".py")):
            if wanted:
                with open(path.stem + ending, "x", encoding="utf-8") as file:
                    file.write(make(path))
                print(f"wrote {path.stem}{ending}")
    except (ValueError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    if not (given.notebook or given.script):
        run(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
