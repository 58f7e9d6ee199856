"""`Detector`, the base class of every detector, and the registry of detector classes."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from featnorm._utils.checks import Constraint, shown, table
from featnorm._utils.errors import NotFiniteError, RefusalError
from featnorm.detectors.held_out import fit_in_batches
from featnorm.detectors.statistics import Statistic
from featnorm.features import FIELDS, Features

Role = Literal["norm", "distance", "confidence"]

_REGISTRY: dict[str, type["Detector"]] = {}


def _is_abstract(cls: type) -> bool:
    """Return whether a class has abstract methods; `inspect.isabstract` cannot tell before the class is made."""
    names = {name for name, value in vars(cls).items() if getattr(value, "__isabstractmethod__", False)}
    names = names.union(*(getattr(base, "__abstractmethods__", ()) for base in cls.__bases__))
    return any(getattr(getattr(cls, name), "__isabstractmethod__", False) for name in names)


class NotFittedError(RefusalError, RuntimeError):
    """A detector was asked for a score before it was fitted."""


class Detector(nn.Module, ABC):
    """A score of how in-distribution an input is: **higher is more in-distribution**, for every detector.

    Fitted state is held in buffers, as sums that add up: `partial_fit` streams, `merge` joins two fits into the
    fit of the whole, and `state_dict` and `to` work as for any module. Settings are constructor arguments;
    ``repr`` is the expression from which `parse_detector` makes the detector again.

    A subclass that defines `_score` is registered under its name when the class statement is executed. From then
    on it works in expressions, and files that hold it can be loaded. Its constructor arguments must be attributes
    of the same names, and its fitted state must be held in `Statistic` modules. A class that no
    expression can make is defined with ``registered=False``.

    Raises
    ------
    TypeError
        When a subclass is defined: `reads` or `learns` is not a tuple of field names, or another class has its
        name.

    Examples
    --------
    >>> class Spread(Detector):
    ...     reads = ("logits",)
    ...
    ...     def _score(self, features):
    ...         return features.tensor("logits").std(1)
    >>> parse_detector("ReAct(Spread(), percentile=85)")
    ReAct(Spread(), percentile=85)
    """

    #: Fields of `Features` that the score reads.
    reads: tuple[str, ...] = ()
    #: Fields of `Features` that fitting reads; empty for a detector that needs no fit.
    learns: tuple[str, ...] = ()
    #: Kind of score. `Fusion` divides a distance by a norm.
    role: Role = "confidence"
    #: Whether scoring runs the model again, on inputs that the detector changes.
    needs_model: bool = False
    #: Constraint on each constructor argument, except inner detectors, which `check_detector` checks.
    settings: ClassVar[Mapping[str, Constraint]] = table()
    #: Where the score is defined: authors, venue, year and, where known, the equation or section.
    source: ClassVar[str] = ""
    #: The score, or what a wrapper changes, in LaTeX, with the symbols of the docstring.
    formula: ClassVar[str] = ""
    #: Cost of scoring one input, in addition to the forward pass that makes the features. d, D and e are the
    #: widths of the last hidden layer, the pooled feature and the embedding; C is the number of classes, n the
    #: number of training inputs.
    cost: ClassVar[str] = ""
    #: Expressions by which the class takes part in the standard comparison; empty if it does not.
    standard: ClassVar[tuple[str, ...]] = ()
    #: Special kind of model that the detector needs, such as "trained to predict rotations"; empty if any will do.
    network: ClassVar[str] = ""
    #: Operator by which expressions combine two detectors into this one; empty for a class that is called by name.
    operator: ClassVar[str] = ""

    def __init_subclass__(cls, *, registered: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("reads", "learns"):
            fields = getattr(cls, name)
            if not isinstance(fields, tuple) or not set(fields) <= set(FIELDS):
                allowed = ", ".join(FIELDS)
                raise TypeError(f"{cls.__name__}.{name} must be a tuple of fields ({allowed}), got {fields!r}")
        # torch.export makes a subclass of every module, named as its class, where a model has one module twice.
        if not registered or _is_abstract(cls) or cls.__module__ == "abc":
            return
        other = _REGISTRY.get(cls.__name__, cls)
        # The same qualified name is the same class, defined again by a notebook cell or `importlib.reload`.
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"there is a detector {cls.__name__} already, {other.__module__}.{other.__qualname__}: give "
                f"{cls.__module__}.{cls.__qualname__} another name"
            )
        _REGISTRY[cls.__name__] = cls

    def __init__(self) -> None:
        super().__init__()
        self._finalized: Any = None

    def fit(self, features: Features, held_out: Features | Iterable[Features] | None = None) -> Self:
        """Fit to the features of in-distribution inputs, discarding any earlier fit.

        Parameters
        ----------
        features : features of in-distribution inputs.
        held_out
            Features of other in-distribution inputs, in one batch or several, for a detector that needs them (see
            `fit_held_out`). Default: one input in five of ``features`` is held out, chosen by its content.

        Raises
        ------
        ValueError
            A field is missing or not finite, or there are too few inputs to hold some out; the earlier fit is
            kept.
        TypeError
            ``features`` is not a `Features`.
        """
        batches = None if held_out is None else _batches(held_out)
        with self.refit():
            for error in fit_in_batches([self], [features], batches).values():
                raise error
        return self

    @contextmanager
    def refit(self) -> Iterator[None]:
        """Discard the fit, for a new one in batches within the block; restore it if the block raises."""
        self._drop_fitted_state()
        try:
            with _replaced(list(self._statistics())):
                yield
        finally:
            self._drop_fitted_state()

    def partial_fit(self, features: Features) -> Self:
        """Add one more batch of in-distribution inputs to the fit.

        What was fitted to held-out inputs is discarded: a detector that needs them is ready to score once
        `fit_held_out` is called after the last batch.

        Raises
        ------
        ValueError
            A field is missing, not finite or of another width than before; the batch then changes nothing.
        TypeError
            ``features`` is not a `Features`.
        """
        self._check_fit(features)
        # Sums made under inference mode could never be added to again.
        with torch.inference_mode(False), torch.no_grad():
            self._partial_fit(features)
        if len(features):
            self._reset_held_out()
        self._drop_fitted_state()
        return self

    def fit_held_out(self, held_out: Features | Iterable[Features]) -> Self:
        """Fit to in-distribution inputs that were held out of `partial_fit`, discarding an earlier such fit.

        It is the second phase of the fit of a detector that `needs_held_out`, such as a sum. On the inputs of the
        first phase, the scores of a detector with a bank or a covariance are higher than on new inputs.

        Parameters
        ----------
        held_out
            Features in one batch or several; about 100 inputs or more. They need the fields that the score reads,
            and `labels` only for a temperature.

        Raises
        ------
        NotFittedError
            The first phase is missing.
        ValueError
            There are no inputs, or a field is missing or not finite; an earlier fit is kept.
        """
        batches = _batches(held_out)
        for features in batches:
            self._require(features, self.reads)
        if not any(len(features) for features in batches):
            raise ValueError(f"{self!r}: there are no held-out inputs to fit to")
        with _replaced(list(self._held_out_statistics())), torch.inference_mode(False), torch.no_grad():
            self._fit_held_out(batches)
        return self

    def merge(self, other: Self) -> Self:
        """Add the fit of another detector of the same settings; the result is the fit to the data of both.

        If both have data, what was fitted to held-out inputs is discarded, as by `partial_fit`.

        Raises
        ------
        ValueError
            The other is another detector, has other settings or was fitted to features of other widths.
        TypeError
            The other is not a detector.
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
        both = all(any(not part.is_empty for part in detector._statistics()) for detector in (self, other))
        for mine, theirs in pairs:
            mine.merge(theirs)
        if both:
            self._reset_held_out()
        self._drop_fitted_state()
        return self

    def score(self, features: Features) -> Tensor:
        """Score inputs; higher is more in-distribution.

        Returns
        -------
        (n,) scores in the dtype of the features, at least float32.

        Raises
        ------
        NotFittedError
            The detector needs a fit and has none.
        ValueError
            A field is missing, not finite (the row is named) or of another width than in the fit.
        TypeError
            ``features`` is not a `Features`.
        """
        self._require(features, self.reads)
        self.require_fitted()
        return self._checked_score(features)

    def _checked_score(self, features: Features) -> Tensor:
        """Score features that were checked already, as those of a detector that combines others."""
        scores = self._score(features)
        widest = torch.float32
        for name in self.reads:
            value = getattr(features, name)
            if isinstance(value, Tensor) and value.dtype != widest and value.is_floating_point():
                widest = torch.promote_types(widest, value.dtype)
        return scores if scores.dtype == widest else scores.to(widest)

    def forward(self, features: Features) -> Tensor:
        """Score inputs, as `score`."""
        return self.score(features)

    @property
    def needs_fit(self) -> bool:
        """Whether the detector has anything to fit."""
        return any(True for _ in self._statistics())

    @property
    def needs_held_out(self) -> bool:
        """Whether the fit has a second phase, `fit_held_out`."""
        return any(True for _ in self._held_out_statistics())

    @property
    def is_fitted(self) -> bool:
        """Whether the detector is ready to score; always true for one that needs no fit."""
        if self._finalized is not None:
            return True
        for child in self._modules.values():
            if isinstance(child, Statistic) and child.is_empty:
                return False
        # Detectors inside answer for themselves: the bank of one may lie in other processes.
        return all(inner.is_fitted for inner in self._inner())

    def require_fitted(self) -> None:
        """Raise a NotFittedError if the detector needs a fit and has none."""
        if not torch.compiler.is_compiling() and not self.is_fitted:
            after = (
                "; after partial_fit or merge, call fit_held_out on held-out ones" if self.needs_held_out else ""
            )
            raise NotFittedError(f"{self!r} is not fitted: call fit on in-distribution features{after}")

    def validate(self) -> None:
        """Raise a ValueError if the state, loaded from a file, is none that a fit could have left."""
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

    def __add__(self, other: "Detector") -> "Detector":
        """Add the scores of two detectors, standardized on held-out in-distribution inputs."""
        if not isinstance(other, Detector):
            return NotImplemented
        from featnorm.detectors.fusion import Sum

        return Sum(self, other)

    def __mul__(self, weight: float) -> "Detector":
        """Return a sum of one term, with a weight for use in a longer sum."""
        if not isinstance(weight, Real):
            return NotImplemented
        from featnorm.detectors.fusion import Sum

        return Sum(self, weights=[weight])

    __rmul__ = __mul__

    def __repr__(self) -> str:
        given = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if parameter.default is parameter.empty:
                given.append(repr(value))
            elif not _equal(value, parameter.default):
                given.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"

    # What a subclass defines.

    def _partial_fit(self, features: Features) -> None:
        """Add one checked batch to the statistics."""

    def _fit_held_out(self, batches: Sequence[Features]) -> None:
        """Fit to checked batches of held-out inputs; by default, only the detectors inside are."""
        for inner in self._inner():
            if inner.needs_held_out:
                inner._fit_held_out([self._changed(features) for features in batches])

    def _changed(self, features: Features) -> Features:
        """Return the features that the detectors inside score; by default, as they are."""
        return features

    @abstractmethod
    def _score(self, features: Features) -> Tensor:
        """Return the scores (n,) of checked features."""

    def _validate(self) -> None:
        """Raise a ValueError if the settings do not fit the fitted state."""

    def _finalize(self) -> Any:
        """Compute from the statistics what the score uses; called once per fit."""

    # What all of them share.

    def _set(self, **given: Any) -> None:
        """Check settings against their constraints, and keep them as attributes of the same names."""
        for name, value in given.items():
            setattr(self, name, self.settings[name].check(value, name, type(self).__name__))

    def _fitted_state(self) -> Any:
        """Return what `_finalize` computed."""
        if self._finalized is None:
            with torch.no_grad():
                self._finalized = self._finalize()
        return self._finalized

    def _check_fit(self, features: Features) -> None:
        """Raise unless one more batch can be added to the fit."""
        self._require(features, self.learns)

    def _inner(self) -> list["Detector"]:
        return [module for module in self._modules.values() if isinstance(module, Detector)]

    def _statistics(self) -> Iterator[Statistic]:
        return (module for module in self.modules() if isinstance(module, Statistic))

    def _held_out_statistics(self) -> Iterator[Statistic]:
        yield from (child for child in self.children() if isinstance(child, Statistic) and child.held_out)
        for inner in self._inner():
            yield from inner._held_out_statistics()

    def _reset_held_out(self) -> None:
        for statistic in self._held_out_statistics():
            statistic.reset()

    def _drop_fitted_state(self) -> None:
        for module in self.modules():
            if isinstance(module, Detector):
                module._finalized = None

    def _require(self, features: Features, names: tuple[str, ...]) -> None:
        """Raise unless the features have these fields, all of them finite."""
        # A graph that is being traced has no values to check.
        if torch.compiler.is_compiling():
            return
        if not isinstance(features, Features):
            field = (*names, *self.reads, *FIELDS)[0]
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
                    raise NotFiniteError(
                        "the weights of the `classifier` are not finite everywhere: look at the model"
                    )

    def _same_width(self, name: str, got: Tensor, fitted: int) -> None:
        if got.shape[1] != fitted:
            raise ValueError(f"{self!r} was fitted to `{name}` of width {fitted}, got width {got.shape[1]}")

    def __getstate__(self) -> dict[str, Any]:
        # A copy computes it again: it may be as large as the statistics, or an index that cannot be copied.
        return {**self.__dict__, "_finalized": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._finalized = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._finalized = None
        super()._load_from_state_dict(*args, **kwargs)


class Wrapper(Detector):
    """Base of the detectors that are made of other detectors: it fits them, and reads what they read."""

    def _wrap(self, **detectors: Detector) -> None:
        """Check the detectors inside, and keep them as attributes of the same names."""
        for name, detector in detectors.items():
            check_detector(detector, type(self).__name__)
            setattr(self, name, detector)
        self._read_as(detectors.values())

    def _read_as(self, detectors: Iterable[Detector]) -> None:
        """Read and learn what the detectors inside do."""
        detectors = list(detectors)
        self.reads = joined(*(detector.reads for detector in detectors))
        self.learns = joined(*(detector.learns for detector in detectors))
        self.needs_model = self.needs_model or any(detector.needs_model for detector in detectors)

    def _check_fit(self, features: Features) -> None:
        for detector in self._inner():
            detector._check_fit(features)

    def _partial_fit(self, features: Features) -> None:
        for detector in self._inner():
            detector._partial_fit(features)


def registered_detectors() -> Mapping[str, type[Detector]]:
    """Return every detector class that has been defined so far, by name: featnorm's and the user's own.

    Examples
    --------
    >>> registered_detectors()["KNN"](k=10)
    KNN(k=10)
    """
    return MappingProxyType(_REGISTRY)


def joined(*names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of all tuples in order, each once."""
    return tuple(dict.fromkeys(name for part in names for name in part))


def check_detector(value: object, owner: str) -> None:
    """Raise a TypeError unless a value is a detector.

    Parameters
    ----------
    value : the value to check.
    owner : name of the class or function that takes it, for the error message.
    """
    if isinstance(value, type) and issubclass(value, Detector):
        raise TypeError(f"{owner} takes a detector, got the class {value.__name__}: write {value.__name__}()")
    if not isinstance(value, Detector):
        advice = ": fn.parse_detector makes a detector of an expression" if isinstance(value, str) else ""
        raise TypeError(f"{owner} takes a detector such as NAN(), got {shown(value)}{advice}")


@contextmanager
def _replaced(statistics: list[Statistic]) -> Iterator[None]:
    """Empty statistics, for new ones within the block; restore them if the block raises."""
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


def _batches(features: Features | Iterable[Features]) -> list[Features]:
    return [features] if isinstance(features, Features) else list(features)


def require_labels(detector: Detector, labels: Tensor, classes: int | None = None) -> None:
    """Raise a ValueError if a row of labels (n,) has none, or one that is not the index of a logit.

    Parameters
    ----------
    detector : the detector to name.
    labels : labels (n,); negative numbers stand for no label.
    classes : number of logits. Default: labels are not compared with logits.
    """
    without = (labels < 0).nonzero()
    if len(without):
        raise ValueError(
            f"{detector!r} is fitted with labels, and {len(without)} of {len(labels)} inputs have none, "
            f"the first at row {int(without[0])} (SSD and KNN need no labels)"
        )
    wrong = (labels >= (classes or torch.inf)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{detector!r} compares labels with logits: row {row} has the label {int(labels[row])}, and there are "
            f"only {classes} logits; fit with labels that are indices of logits"
        )


def _equal(value: object, default: object) -> bool:
    try:
        return bool(value == default)
    except (RuntimeError, ValueError):  # of several numbers, as a tensor or an array, in a class of the user's own
        return False


def _require_finite(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        return
    # The sum needs one read and no temporary; only if it is not finite are the rows searched.
    wide = value.dtype if value.dtype == torch.float64 else torch.float32
    if math.isfinite((value.detach() if value.requires_grad else value).sum(dtype=wide).item()):
        return
    bad = (~torch.isfinite(value)).any(1).nonzero().squeeze(1)
    if len(bad):
        raise NotFiniteError(
            f"`{name}` is not finite for {len(bad)} of {len(value)} inputs, the first at row {int(bad[0])}: "
            "look at that input, or at the model's precision"
        )
