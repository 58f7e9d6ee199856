"""`import featnorm` against `import torch` alone: the mark is under twice the time."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["torch", "featnorm"])
def test_import(benchmark, module):
    benchmark.group = "import"
    benchmark.pedantic(subprocess.run, ([sys.executable, "-c", f"import {module}"],), {"check": True}, rounds=7)
