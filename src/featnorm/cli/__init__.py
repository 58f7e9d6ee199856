"""The command line: ``featnorm``."""

from featnorm.cli.entry import main

__all__ = ["main"]
