"""Put the tables of `featnorm reproduce` on the page of results, between the marks that name them.

    python tools/update_results.py [FOLDER]

takes over the results in FOLDER, such as featnorm-reproduction/laptop, and then writes every table
anew from the results that the documentation keeps.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from featnorm.protocols import cifar10, heads, own_images
from featnorm.protocols.tables import Table, make_table, width_figure

RESULTS = Path(__file__).parents[1] / "docs" / "results"
#: The results that each page shows; they lie in a folder of its name.
PAGES = {"cifar10": (*cifar10.TABLES, "head-study"), "own-images": ("own-images",)}


def tables(file: Path) -> dict[str, Table]:
    """Return the tables of a file of results, by the names that mark their places."""
    content = json.loads(file.read_text("utf-8"))
    match file.stem:
        case "own-images":
            return own_images.tables(content)
        case "head-study":
            return heads.tables(content)
    return {file.stem: make_table(file.stem, content)}


def render(page: str) -> str:
    """Return a page's text with every table anew."""
    text = (RESULTS / f"{page}.md").read_text("utf-8")
    for file in sorted((RESULTS / page).glob("*.json")):
        for name, table in tables(file).items():
            block = f"<!-- {name} -->\n\n{table.markdown()}\n<!-- end -->"
            text, count = re.subn(f"<!-- {name} -->.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL)  # noqa: B023
            if count != 1:
                raise SystemExit(
                    f"{page}.md has {count} places for {name}: mark one by <!-- {name} --> <!-- end -->"
                )
    return text


def main() -> None:
    """Take over results, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    folder = parser.parse_args().folder
    for page, names in PAGES.items():
        kept = RESULTS / page
        kept.mkdir(exist_ok=True)
        for name in names if folder else ():
            if (folder / f"{name}.json").exists():
                shutil.copyfile(folder / f"{name}.json", kept / f"{name}.json")
        if (kept / "figure7.json").exists():
            results = json.loads((kept / "figure7.json").read_text("utf-8"))
            (kept / "figure7.svg").write_text(width_figure(results), encoding="utf-8")
        (RESULTS / f"{page}.md").write_text(render(page), encoding="utf-8")


if __name__ == "__main__":
    main()
