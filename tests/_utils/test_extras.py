import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from featnorm._utils.extras import _EXTRAS, import_extra


@pytest.fixture(scope="module")
def distributions():
    return packages_distributions()


@pytest.mark.parametrize("module", _EXTRAS)
def test_the_extra_named_by_the_error_installs_the_package(module, distributions):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    listed = {re.split(r"[<>=]", line)[0] for line in project["optional-dependencies"][_EXTRAS[module]]}
    assert listed & {name.lower().replace("_", "-") for name in distributions.get(module, [module])}


def test_a_missing_package_and_its_extra_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"^this needs timm \(.*\): pip install 'featnorm\[images\]'$") as error:
        import_extra("timm")
    assert error.value.name == "timm"
