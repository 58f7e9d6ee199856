"""What every detector is: a module that learns from `Features` and scores `Features`."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from featnorm._utils.checks import Setting, shown, table
from featnorm._utils.errors import RefusalError
from featnorm.detectors.statistics import Statistic
from featnorm.features import Features

Role = Literal["norm", "distance", "confidence"]


class NotFittedError(RefusalError, RuntimeError):
    """A detector that learns was asked for a score before it has seen anything."""


class Detector(nn.Module, ABC):
    """A score of how in-distribution an input is: **higher is more in-distribution**, for every detector.

    What it learned is held in buffers, as sums that add up: `partial_fit` streams, `merge` joins two fits
    into the fit of the whole, and `state_dict` and `to` do what they do for any module. Settings are
    constructor arguments; ``repr`` is the expression that makes the detector again.
    """

    #: The fields of `Features` that the score reads.
    reads: tuple[str, ...] = ()
    #: The fields that fitting reads; empty where there is nothing to learn.
    learns: tuple[str, ...] = ()
    #: A distance may be divided by a norm (`Fusion`).
    role: Role = "confidence"
    #: What each constructor argument must be, but for detectors inside, which `check_detector` looks at.
    settings: ClassVar[Mapping[str, Setting]] = table()
    # Whether the score asks the model again, about inputs that it changes.
    _asks_again = False

    def __init__(self) -> None:
        super().__init__()
        self._derived: Any = None

    def fit(self, features: Features) -> Self:
        """Learn from the features of in-distribution inputs, forgetting what was learned before.

        Raises
        ------
        ValueError
            A field is missing or not finite; what was learned before is then still there.
        TypeError
            What was passed is no `Features`.
        """
        with self.refit():
            self.partial_fit(features)
        return self

    @contextmanager
    def refit(self) -> Iterator[None]:
        """Forget what was learned, for a fit in batches; if the block raises, what was learned is back."""
        statistics = list(self._statistics())
        before = [dict(statistic.named_buffers()) for statistic in statistics]
        try:
            for statistic in statistics:
                statistic.reset()
            yield
        except BaseException:
            for statistic, buffers in zip(statistics, before, strict=True):
                statistic.reset()
                for name, value in buffers.items():
                    setattr(statistic, name, value)
            raise
        finally:
            self._forget_derived()

    def partial_fit(self, features: Features) -> Self:
        """Learn from one more batch of in-distribution inputs.

        Raises
        ------
        ValueError
            A field is missing, not finite or of another width than before; nothing is then learned from it.
        TypeError
            What was passed is no `Features`.
        """
        self._check_fit(features)
        # Sums made under inference mode could never be added to again.
        with torch.inference_mode(False), torch.no_grad():
            self._partial_fit(features)
        self._forget_derived()
        return self

    def merge(self, other: Self) -> Self:
        """Take in what another detector of the same settings learned; the result is the fit of both halves.

        Raises
        ------
        ValueError
            The other is another detector, has other settings or was fitted to features of other widths.
        TypeError
            The other is no detector.
        """
        check_detector(other, f"{self!r}.merge")
        if repr(self) != repr(other):
            raise ValueError(f"cannot merge {other!r} into {self!r}: both must be the same detector")
        pairs = list(zip(self._statistics(), other._statistics(), strict=True))
        for mine, theirs in pairs:
            if mine.is_empty or theirs.is_empty:
                continue
            if mine.width != theirs.width:
                raise ValueError(f"cannot merge {other!r} of width {theirs.width} into one of width {mine.width}")
        for mine, theirs in pairs:
            mine.merge(theirs)
        self._forget_derived()
        return self

    def score(self, features: Features) -> Tensor:
        """Score inputs; higher is more in-distribution.

        Returns
        -------
        (n,) scores in the dtype of the features, at least float32.

        Raises
        ------
        NotFittedError
            The detector learns and has not.
        ValueError
            A field is missing, not finite (the row is named) or not of the width that was fitted.
        TypeError
            What was passed is no `Features`.
        """
        self._require(features, self.reads)
        self.require_fitted()
        scores = self._score(features)
        widest = torch.float32
        for name in self.reads:
            value = getattr(features, name)
            if isinstance(value, Tensor) and value.is_floating_point():
                widest = torch.promote_types(widest, value.dtype)
        return scores.to(widest)

    def forward(self, features: Features) -> Tensor:
        """Score inputs, as `score`."""
        return self.score(features)

    @property
    def needs_fit(self) -> bool:
        """Whether it learns at all."""
        return any(True for _ in self._statistics())

    @property
    def needs_inputs(self) -> bool:
        """Whether it, or a part of it, asks the model again about changed inputs."""
        return any(module._asks_again for module in self.modules() if isinstance(module, Detector))

    @property
    def is_fitted(self) -> bool:
        """Whether it has learned what its score needs (always, where there is nothing to learn)."""
        return not any(statistic.is_empty for statistic in self._statistics())

    def require_fitted(self) -> None:
        """Raise a NotFittedError if the score needs something that was not learned yet."""
        if not torch.compiler.is_compiling() and not self.is_fitted:
            raise NotFittedError(f"{self!r} has learned nothing yet: call fit on in-distribution features")

    def validate(self) -> None:
        """Refuse what was loaded from a file, by a ValueError, where no fit could have left it."""
        self.require_fitted()
        for statistic in self._statistics():
            statistic.validate()
        for module in self.modules():
            widths = {child.width for child in module.children() if isinstance(child, Statistic) and child.width}
            if len(widths) > 1:
                raise ValueError(f"{module!r} was fitted to features of widths {sorted(widths)} at once")
            if isinstance(module, Detector):
                module._validate()

    def __truediv__(self, other: "Detector") -> "Detector":
        """Divide a distance by a norm: the paper's fusion (eq. 49)."""
        if not isinstance(other, Detector):
            return NotImplemented
        from featnorm.detectors.fusion import Fusion

        return Fusion(self, other)

    def __repr__(self) -> str:
        given = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if parameter.default is parameter.empty:
                given.append(repr(value))
            elif value != parameter.default:
                given.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"

    # What a kind of detector fills in.

    def _partial_fit(self, features: Features) -> None:
        """Add one batch, checked, to the statistics."""

    @abstractmethod
    def _score(self, features: Features) -> Tensor:
        """Score checked features."""

    def _validate(self) -> None:
        """Refuse, by a ValueError, settings that do not fit what was learned."""

    def _derive(self) -> Any:
        """Work out from the statistics what the score uses; called once a fit."""

    # What they share.

    def _set(self, **given: Any) -> None:
        """Check settings by the table, and keep them as attributes of their names."""
        for name, value in given.items():
            setattr(self, name, self.settings[name].check(value, name, type(self).__name__))

    def _learned(self) -> Any:
        if self._derived is None:
            with torch.no_grad():
                self._derived = self._derive()
        return self._derived

    def _check_fit(self, features: Features) -> None:
        self._require(features, self.learns)

    def _statistics(self) -> Iterator[Statistic]:
        return (module for module in self.modules() if isinstance(module, Statistic))

    def _forget_derived(self) -> None:
        for module in self.modules():
            if isinstance(module, Detector):
                module._derived = None

    def _require(self, features: Features, names: tuple[str, ...]) -> None:
        # A graph that is being traced has no values to look at.
        if torch.compiler.is_compiling():
            return
        if not isinstance(features, Features):
            field = (*names, *self.reads)[0]
            raise TypeError(
                f"{self!r} takes Features, got {type(features).__name__}: wrap tensors in "
                f"Features({field}=...), or let FeatureTap(model) make them from inputs"
            )
        for name in names:
            try:
                value = features.tensor(name)
            except ValueError as missing:
                raise ValueError(f"{self!r} reads `{name}`: {missing}") from None
            if name != "classifier":
                _require_finite(name, value)
                continue
            for part in features.linear():
                if part is not None and not torch.isfinite(part).all():
                    raise ValueError(
                        "the weights of the `classifier` are not finite everywhere: look at the model"
                    )

    def _same_width(self, name: str, got: Tensor, fitted: int) -> None:
        if got.shape[1] != fitted:
            raise ValueError(f"{self!r} was fitted to `{name}` of width {fitted}, got width {got.shape[1]}")

    def __getstate__(self) -> dict[str, Any]:
        # A copy works it out again: it may be as large as what was learned, or an index that cannot be copied.
        return {**self.__dict__, "_derived": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._derived = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._derived = None
        super()._load_from_state_dict(*args, **kwargs)


def check_detector(value: object, owner: str) -> None:
    """Refuse, by a TypeError, what is no detector.

    Parameters
    ----------
    value : what was passed as a detector.
    owner : what takes it, for the error message.
    """
    if isinstance(value, type) and issubclass(value, Detector):
        raise TypeError(f"{owner} takes a detector, got the class {value.__name__}: write {value.__name__}()")
    if not isinstance(value, Detector):
        raise TypeError(f"{owner} takes a detector such as NAN(), got {shown(value)}")


def _require_finite(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        return
    # The sum tells in one read without a temporary; only when it is not finite is the culprit looked for.
    if math.isfinite(value.detach().sum(dtype=torch.promote_types(value.dtype, torch.float32)).item()):
        return
    bad = (~torch.isfinite(value)).any(1).nonzero().squeeze(1)
    if len(bad):
        raise ValueError(
            f"`{name}` is not finite for {len(bad)} of {len(value)} inputs, the first at row {int(bad[0])}: "
            "look at that input, or at the model's precision"
        )
