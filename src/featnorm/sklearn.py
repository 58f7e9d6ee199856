"""A scikit-learn estimator: out-of-distribution detection for rows of features."""

import copy
import warnings
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.validation import check_is_fitted, validate_data

from featnorm._utils.checks import min_scores
from featnorm.detectors import Detector, parse_detector
from featnorm.fitting import Head, fit_source
from featnorm.inputs.arrays import ArrayRows
from featnorm.inputs.rows import Vector
from featnorm.inputs.source import class_labels
from featnorm.models.loading import rows_model
from featnorm.runtime import Runtime

_Array = npt.NDArray[Any]


class OODDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Detector of out-of-distribution rows, with a stated false-alarm rate.

    `fit` takes in-distribution rows, holds one in five out, fits the detector to the others, and sets the
    threshold by the held-out ones, as `featnorm.fit` does. With fewer than 100 rows, rows are left out of the fit
    in turn instead; see `featnorm.Jackknife`. A new in-distribution row is then flagged with a probability of at
    most ``1 - tpr``, for every distribution and every detector.

    Rows are used as they are, in single precision: scale columns of different units first, such as by
    `sklearn.preprocessing.StandardScaler` in a pipeline.

    Parameters
    ----------
    detector
        Detector or its expression, such as ``"KNN(k=10)"`` for embeddings, whose direction alone counts. Default:
        ``KNN(k=10, normalize=False)``, or ``k=1`` for fewer than 100 rows.
    tpr
        Share of new in-distribution rows to accept, between 0 and 1. At least 20 rows are needed at 0.95,
        and 100 at 0.99. If there are fewer, the highest share that they allow is used, with a warning.
    head
        "none" uses rows as features. "train" trains a `featnorm.models.ProjectionHead` on them, for detectors that
        read its hidden layer or logits, such as ``"NAN()"``; 100 rows are needed.
    random_state
        Seed, random generator or None, for the training of a head.

    Attributes
    ----------
    scorer_ : Scorer
        The fitted scorer, which can be saved and exported.
    offset_ : float
        The threshold: ``decision_function(X) = score_samples(X) - offset_``.
    tpr_ : float
        Share of new in-distribution rows to accept: ``tpr``, or less if there are too few rows for it.
    n_features_in_ : int
        Number of columns.
    feature_names_in_ : array of str
        Names of the columns, if `fit` was given a table whose column names are strings.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> detector = OODDetector().fit(X[y != 9])
    >>> flagged = detector.predict(X[y == 9]) == -1
    """

    def __init__(
        self,
        detector: Detector | str | None = None,
        *,
        tpr: float = 0.95,
        head: Head = "none",
        random_state: Any = None,
    ) -> None:
        self.detector = detector
        self.tpr = tpr
        self.head = head
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit to in-distribution rows, and calibrate on those of them that are held out.

        Parameters
        ----------
        X : array-like of shape (n, D), n in-distribution rows.
        y
            Class of each row, for detectors that learn from labels, and for ``head="train"``, which otherwise
            learns clusters of the rows. Other detectors ignore it.

        Raises
        ------
        ValueError
            ``X`` has a value that is not finite, or fewer than two rows, or the detector cannot work here.
        """
        X = validate_data(self, X, dtype=np.float32, ensure_min_samples=2)
        labels: Any = (None, None)
        if y is not None:
            y = column_or_1d(y)
            check_consistent_length(X, y)
            labels = class_labels(y)
        self.tpr_ = self.tpr
        if len(X) <= (needed := min_scores(self.tpr)):
            self.tpr_ = (len(X) - 1) / len(X)
            warnings.warn(
                f"tpr={self.tpr} needs {needed + 1} rows, and X has {len(X)}: tpr={self.tpr_:.3g} is used",
                stacklevel=2,
            )
        detector = parse_detector(self.detector) if isinstance(self.detector, str) else self.detector
        self.scorer_, report = fit_source(
            ArrayRows(X, "X", *labels),
            rows_model(Vector(X.shape[1], embeds=False)),
            detector=copy.deepcopy(detector),
            head=self.head,
            tpr=self.tpr_,
            seed=int(check_random_state(self.random_state).randint(2**31)),
            thumbnails=False,
            runtime=Runtime(progress=False),
        )
        for note in report.notes:
            warnings.warn(note, stacklevel=2)
        assert self.scorer_.calibration is not None
        self.offset_ = float(self.scorer_.calibration.threshold)
        return self

    def score_samples(self, X: Any) -> _Array:
        """Return the score of each row, (n,) float64, higher for more in-distribution."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float32, reset=False)
        return self.scorer_(torch.from_numpy(X)).score.double().numpy()

    def decision_function(self, X: Any) -> _Array:
        """Return the score of each row minus the threshold, (n,) float64, negative for rows that are flagged."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> _Array:
        """Return 1 for each row that is in-distribution and -1 for each that is flagged, (n,)."""
        return np.where(self.decision_function(X) >= 0, 1, -1)
