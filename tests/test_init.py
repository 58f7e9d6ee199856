"""The public names: imported when they are asked for, and the same for people, type checkers and `import *`."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import featnorm
from featnorm.detectors import base


def test_every_public_name_is_there():
    for name in featnorm.__all__:
        assert getattr(featnorm, name) is not None
        assert name in dir(featnorm)
    everything = {}
    exec("from featnorm import *", everything)
    assert set(featnorm.__all__) <= set(everything)


def test_type_checkers_find_each_name():
    """They know the names that a file imports as themselves, and those of a star."""

    def declared(file):
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
        return {alias.name: node.module for node in imports for alias in node.names if alias.asname == alias.name}

    stub, detectors = declared(Path(featnorm.__file__).with_suffix(".pyi")), declared(featnorm.detectors.__file__)
    assert {**stub, **detectors}.keys() == set(featnorm.__all__)
    for name, module in (stub | detectors).items():
        assert getattr(import_module(module), name) is getattr(featnorm, name)


def test_a_detector_of_the_users_own_is_no_public_name_of_featnorm(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    names = featnorm.__all__

    class Mine(featnorm.MSP):
        pass

    assert isinstance(featnorm.parse_detector("Mine"), Mine)
    assert featnorm.__all__ == names
    assert not hasattr(featnorm, "Mine")


def test_nothing_large_is_imported_before_a_name_is_asked_for():
    code = (
        "import sys, featnorm\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "assert featnorm.calibration.Calibration is featnorm.Calibration\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_citation_and_the_changelog_are_of_this_version():
    root = Path(__file__).parents[1]
    assert f"\nversion: {featnorm.__version__}\n" in (root / "CITATION.cff").read_text("utf-8")
    assert f"\n## {featnorm.__version__} " in (root / "CHANGELOG.md").read_text("utf-8")


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'featnorm' has no attribute 'nan'"):
        _ = featnorm.nan
    with pytest.raises(ImportError, match="cannot import name 'nan'"):
        from featnorm import nan  # noqa: F401
