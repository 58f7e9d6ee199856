"""The documentation: the code of its pages runs, and its reference is complete."""

import importlib
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import featnorm as fn
from featnorm import engine
from featnorm.__main__ import COMMANDS
from featnorm.detectors import base
from painted import paint
from references import OWN
from snippets import blocks, run_page
from tiny_texts import saved_classifier

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLE = ROOT / "examples" / "own_model.py"
#: Pages whose code a reader types. Those of results state the commands that wrote them.
PAGES = sorted(
    path
    for path in [ROOT / "README.md", *DOCS.rglob("*.md")]
    if not {"results", "commands", "detectors"} & {path.parent.name} and blocks(path.read_text("utf-8"))
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder, for the cache of features that all pages share."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def written(tmp_path_factory, home):
    """The files that the pages name: photos/ and so on, and the detector of most pages."""
    folder, random = tmp_path_factory.mktemp("written"), np.random.default_rng(0)
    counts = {"photos": 100, "more": 30, "few": 20, "test": 40, "other": 40, "new-photos": 30}
    for name, count in counts.items():
        for i in range(count):
            paint(folder / name / f"{'abcd'[i % 4]}/shot{i // 2:02}-{i % 2}.png", i % 4, random)
    paint(folder / "new.jpg", 1, random)
    (folder / "tickets.csv").write_text(
        "text,label\n" + "".join(f"request {i} on {i % 3} cards,{i % 3}\n" for i in range(20))
    )
    (folder / "new.csv").write_text("text\nanother request\n")
    saved_classifier(folder / "my-model", ["card", "place"], ["my card was lost", "where is it ?"])
    rows = random.normal(size=(100, 8))
    np.save(folder / "embeddings.npy", rows)
    np.save(folder / "labels.npy", np.arange(100) % 2)
    np.savetxt(folder / "table.csv", rows, delimiter=",", header=",".join("abcdefgh"), comments="")
    # The default backbone, which some pages fit, takes ten times as long.
    scorer = fn.fit(folder / "photos", "featnorm:cifar10-resnet18", head="train", cache=home)
    scorer.save(folder / "photos.featnorm", weights=True)
    return folder


@pytest.fixture
def names():
    """What the pages of the guide find defined: a model, its inputs and scores."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = torch.nn.Linear(8, 16)
        head = torch.nn.Sequential()
        head.add_module("activation", torch.nn.ReLU())
        model = torch.nn.Sequential(body, head, torch.nn.Linear(16, 3))
        loader = [torch.randn(64, 8) for _ in range(5)]
        scores = torch.randn(200)
        known = {
            "held_out_scores": scores,
            "new_scores": scores[:9],
            "id_scores": scores,
            "ood_scores": scores - 1,
        }
        yield {"fn": fn, "torch": torch, "model": model, "loader": loader, "inputs": loader[0][:2], **known}


@pytest.fixture
def registry(monkeypatch):
    """What a page registers is forgotten after it."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


@pytest.mark.slow
@pytest.mark.usefixtures("registry", "few_steps", "operators_read_once")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page, featnorm, capsys, monkeypatch, tmp_path, shared, home, written, names):
    # An export takes as long as the rest of a page.
    monkeypatch.setattr(engine, "MIN_ITEMS", 10**9)
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    shutil.copy(EXAMPLE, tmp_path)
    imported = set(sys.modules)
    run_page(page, featnorm, capsys, shared, names)
    for name in set(sys.modules) - imported:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == tmp_path:
            del sys.modules[name]


@pytest.fixture
def reference_pages(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "_ext")
    yield importlib.import_module("reference_pages")
    del sys.modules["reference_pages"]


def test_every_detector_has_a_page(reference_pages):
    pages = reference_pages.detector_pages()
    assert pages.keys() == {"index", *OWN}
    for name, kind in OWN.items():
        assert kind.formula in pages[name]
        assert kind.source in pages[name]
        assert f"]({name}.md) | " in pages["index"]
        assert all(f"`{field}`" in pages[name] for field in {*kind.reads, *kind.learns})
        assert f"**When it fails.** {reference_pages.FAILURES[name]}" in pages[name]


def test_every_command_has_a_page_with_its_options(reference_pages):
    pages = reference_pages.command_pages()
    assert pages.keys() == {"index", *COMMANDS}
    assert "`--tpr <float>` | Share of in-distribution items to accept. [default: 0.95] |" in pages["fit"]
    assert "| `SCORER` | File written by" in pages["score"]
    assert "usage: featnorm" not in pages["index"].lower()


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text("utf-8") for path in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"\.\. auto\w+:: featnorm\.(\w+)$", text, re.MULTILINE))
    assert documented | OWN.keys() >= set(fn.__all__)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_links_of_a_page_outside_the_site_lead_to_files(name):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text("utf-8"))
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]


def test_a_page_whose_code_fails_names_the_line(tmp_path, featnorm, capsys, shared):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\nprint(x)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:4: Expected:\s+2\s+Got:\s+1"):
        run_page(page, featnorm, capsys, shared)
    page.write_text("<!-- not run: why -->\n```python\nx = 1 / 0\n```\n\n```console\n$ make all\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:7: make is not run here"):
        run_page(page, featnorm, capsys, shared)
