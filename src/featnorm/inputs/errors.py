"""Errors of the user's data."""


class DataError(ValueError):
    """A specification of data, or the data itself, that cannot be used. The message is one line."""


class ItemError(DataError):
    """One item that is corrupt or unreadable.

    Parameters
    ----------
    name : str
        Name of the item in its source: its file, or its row.
    reason : str
        What is wrong with it, in one line.

    Attributes
    ----------
    digest : bytes or None
        `Source.digest` of the content that cannot be decoded; None if no content was read.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason
        self.digest: bytes | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"
