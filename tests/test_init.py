"""The public names: imported when they are asked for, and the same for people, type checkers and `import *`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import featnorm


def test_every_public_name_is_there():
    for name in featnorm.__all__:
        assert getattr(featnorm, name) is not None
        assert name in dir(featnorm)
    everything = {}
    exec("from featnorm import *", everything)
    assert set(featnorm.__all__) <= set(everything)


def test_type_checkers_find_each_name_where_it_is():
    tree = ast.parse(Path(featnorm.__file__).read_text(encoding="utf-8"))
    blocks = (node for node in tree.body if isinstance(node, ast.If))
    (block,) = (node for node in blocks if ast.unparse(node.test) == "TYPE_CHECKING")
    imports = (node for node in block.body if isinstance(node, ast.ImportFrom) and node.module != "typing")
    declared = {alias.name: node.module for node in imports for alias in node.names}
    assert declared == featnorm._HOMES
    assert set(declared) == set(featnorm.__all__)


def test_nothing_large_is_imported_before_a_name_is_asked_for():
    code = (
        "import sys, featnorm\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "assert featnorm.metrics.auroc is featnorm.auroc\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'featnorm' has no attribute 'nan'"):
        _ = featnorm.nan
    with pytest.raises(ImportError, match="cannot import name 'nan'"):
        from featnorm import nan  # noqa: F401
