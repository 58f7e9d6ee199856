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

from featnorm.protocols.cifar10 import TABLES
from featnorm.protocols.tables import make_table, width_figure

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def main() -> None:
    """Take over results, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    folder = parser.parse_args().folder
    kept = RESULTS / "cifar10"
    for name in TABLES if folder else ():
        if (folder / f"{name}.json").exists():
            shutil.copyfile(folder / f"{name}.json", kept / f"{name}.json")
    page = RESULTS / "cifar10.md"
    text = page.read_text("utf-8")
    for file in sorted(kept.glob("*.json")):
        results = json.loads(file.read_text("utf-8"))
        block = f"<!-- {file.stem} -->\n\n{make_table(file.stem, results).markdown()}\n<!-- end -->"
        text, count = re.subn(f"<!-- {file.stem} -->.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise SystemExit(
                f"{page} has {count} places for {file.stem}: mark one by <!-- {file.stem} --> <!-- end -->"
            )
        if file.stem == "figure7":
            (kept / "figure7.svg").write_text(width_figure(results), encoding="utf-8")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
