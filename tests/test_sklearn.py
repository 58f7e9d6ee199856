"""The scikit-learn estimator."""

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits, load_wine
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import featnorm as fn
from featnorm.sklearn import OODDetector

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(400, 5))


@parametrize_with_checks([OODDetector(), OODDetector("SSD()")])
def test_it_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


def test_it_detects_a_left_out_digit():
    rows, digits = load_digits(return_X_y=True)
    is_id = digits != 9
    train = is_id & (np.random.default_rng(0).random(len(rows)) < 0.6)
    detector = OODDetector().fit(rows[train])
    scores = detector.score_samples(rows)
    assert fn.auroc(scores[is_id & ~train], scores[~is_id]) > 0.85
    # 95 % are stated, on average over calibration sets.
    assert 0.9 < (detector.predict(rows[is_id & ~train]) == 1).mean() < 0.99


def test_it_detects_a_left_out_wine_behind_a_scaler():
    rows, wines = load_wine(return_X_y=True)
    train = (wines != 0) & (np.arange(len(rows)) % 3 > 0)
    detector = make_pipeline(StandardScaler(), OODDetector()).fit(rows[train])
    scores = detector.score_samples(rows)
    assert fn.auroc(scores[(wines != 0) & ~train], scores[wines == 0]) > 0.93


def test_a_head_reads_labels_or_clusters():
    names = np.where(ROWS[:, 0] > 0, "right", "left")
    by_labels = OODDetector("NAN()", head="train", random_state=0).fit(ROWS, names)
    assert by_labels.scorer_.classes == ["left", "right"]
    by_clusters, again = (OODDetector(head="train", random_state=0).fit(ROWS) for _ in range(2))
    assert by_clusters.scorer_.classes is None
    scores = by_clusters.score_samples(ROWS)
    assert scores.shape == (400,)
    np.testing.assert_array_equal(again.score_samples(ROWS), scores)


def test_a_detector_behind_a_head_scores_the_features_that_it_was_fitted_to(tmp_path):
    rows, digits = load_digits(return_X_y=True)
    rows, digits = rows[::2] + 0.01 * RNG.normal(size=rows[::2].shape), digits[::2]
    for expression in ("KNN(k=10)", "SSD()", "NAN()"):
        fitted = OODDetector(expression, head="train", random_state=0).fit(rows, digits)
        calibration = fitted.scorer_.calibration.scores.numpy()
        scores = fitted.score_samples(rows)
        # The held-out rows are among these.
        nearest = np.abs(scores[:, None] - calibration).min(0)
        np.testing.assert_allclose(nearest, 0, atol=1e-4 * np.abs(calibration).max())
        assert (fitted.predict(rows) == 1).mean() > 0.9
    # The head would be lost without its weights, so these are in the file.
    fitted.scorer_.save(tmp_path / "s.featnorm")
    again = fn.load(tmp_path / "s.featnorm").predict(rows)
    np.testing.assert_allclose([item.score for item in again], scores, rtol=1e-5)


def test_labels_reach_a_detector_that_learns_from_them_as_integers_or_names():
    classes = (ROWS[:, 0] > 0).astype(int)
    names = np.array(["left", "right"])[classes]
    scores = [OODDetector("Mahalanobis()").fit(ROWS, y).score_samples(ROWS) for y in (classes, names)]
    np.testing.assert_array_equal(scores[0], scores[1])
    with pytest.raises(ValueError, match=r"Mahalanobis\(\) needs labels to fit, and X has none"):
        OODDetector("Mahalanobis()").fit(ROWS)


def test_a_detector_that_is_passed_is_left_unfitted():
    given = fn.KNN(k=3)
    OODDetector(given).fit(ROWS)
    assert not given.is_fitted


def test_too_few_rows_lower_the_share_with_a_warning():
    with pytest.warns(UserWarning, match=r"tpr=0\.95 needs 20 rows, and X has 10: tpr=0\.9 is used"):
        fitted = OODDetector().fit(ROWS[:10])
    assert fitted.tpr_ == 0.9
    assert fitted.tpr == 0.95
    assert fitted.predict(100 + ROWS[:1]).tolist() == [-1]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (np.ones((1, 2)), "1 sample"),
        (np.full((30, 2), np.nan), "NaN"),
        (np.full((30, 2), 1e300), "too large for dtype"),
        (np.zeros((30, 2, 2)), "dim 3"),
        (np.array([["a", "b"]] * 30), "could not convert string to float"),
    ],
)
def test_rows_that_cannot_be_used(rows, match):
    with pytest.raises(ValueError, match=match), np.errstate(over="ignore"):
        OODDetector().fit(rows)


def test_names_and_types_of_columns():
    table = pd.DataFrame(ROWS, columns=list("abcde"))
    fitted = OODDetector().fit(table)
    assert fitted.feature_names_in_.tolist() == list("abcde")
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.predict(table[list("edcba")])
    expected = fitted.score_samples(table)
    single = ROWS.astype(np.float32)
    for rows in (single, np.asfortranarray(single), single.astype(np.float64)):
        np.testing.assert_array_equal(OODDetector().fit(rows).score_samples(rows), expected)


def test_a_pickled_copy_and_a_saved_scorer_score_alike(tmp_path):
    fitted = OODDetector().fit(ROWS)
    scores = fitted.score_samples(ROWS)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).score_samples(ROWS), scores)


def test_equal_rows_are_independent_records():
    # Three booleans: eight different rows, of which each is drawn often.
    rows = RNG.integers(0, 2, (600, 3))
    fitted = OODDetector().fit(rows)
    assert fitted.scorer_.facts["rows"].startswith("X: 480 to fit on, 120 held out")
    assert (fitted.predict(rows) == 1).all()
    assert fitted.predict([[5, 0, 0]]).tolist() == [-1]
    assert (OODDetector().fit(np.ones((30, 2))).predict([[1, 1], [1, 2]]) == [1, -1]).all()
