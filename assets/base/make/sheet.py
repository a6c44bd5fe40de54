"""Draws the sheet of the base's README: 24 prompts by a fixed seed from all that is taught, one image each.

python assets/base/make/sheet.py --base assets/base
"""

import argparse
from pathlib import Path

from catalog import caption, drawn_triples
from painter import grid, load_base, paint

COUNT = 24
SEED = 2026  # of the prompts and of the images
MARK = "<!-- prompts -->"


def rewritten(readme: str, prompts: list[str]) -> str:
    """Returns the README with the numbered prompts between its two marks."""
    before, _, after = readme.split(MARK)
    lines = "\n".join(f"{n}. {prompt}" for n, prompt in enumerate(prompts, start=1))
    return f"{before}{MARK}\n\n{lines}\n\n{MARK}{after}"


def main(base: Path) -> None:
    """Writes `sheet.png` and the list of its prompts."""
    prompts = [caption(*triple) for triple in drawn_triples(COUNT, SEED)]
    grid(paint(load_base(base), prompts, SEED), columns=6).save(base / "sheet.png", optimize=True)
    readme = base / "README.md"
    readme.write_text(rewritten(readme.read_text(encoding="utf-8"), prompts), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base's folder")
    main(parser.parse_args().base)
