"""Errors of models that cannot be created or loaded."""

from featnorm._utils.errors import UserCodeError


class ModelError(ValueError):
    """A model cannot be created, or weights do not fit it; the message is one line."""


class UserModelError(ModelError, UserCodeError):
    """The user's own model, or the function that creates it, raised an error, which is the cause."""
