"""The command line: ``featnorm``."""

from featnorm.cli.app import main

__all__ = ["main"]
