"""The benchmarks of OpenOOD v1.5: its lists of images, its metrics and the format of its results.

>>> result = fn.compare(["MSP", "KNN(k=50)"], model=scorer, **openood.benchmark_sets("cifar10", "data"))
>>> openood.save(result, "out")

What differs from OpenOOD itself: images are preprocessed as the compared model needs them, EXIF orientation is
applied, corrupt images are skipped instead of decoded in part, and no setting is tuned on validation data.

Source: Zhang et al., "OpenOOD v1.5: enhanced benchmark for out-of-distribution detection", DMLR 2024; github.com/
Jingkang50/OpenOOD, its metrics at commit a59cdac, evaluation scripts at 0ad2b93, leaderboard at 03db2d8.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from scipy.integrate import trapezoid

from featnorm._utils.checks import ScoreLike, as_score_array
from featnorm._utils.files import write_text
from featnorm.evaluation import Comparison
from featnorm.inputs import DataError, ImageSource
from featnorm.inputs.files import LocalFolder
from featnorm.inputs.images import ImageFiles
from featnorm.metrics import auroc, roc_curve

_LISTS = "benchmark_imglist"
_DOWNLOAD = "OpenOOD's scripts/download/download.py --datasets ood_v1.5 downloads lists and images"


@dataclass(frozen=True)
class Benchmark:
    """An ID data set and the OOD sets it is compared with.

    Parameters
    ----------
    classes : number of classes of the ID set.
    images : folder of the images under the data root; those of the set ``textures`` are in ``images_classic``.
    near, far : names of the OOD sets.
    """

    classes: int
    images: str
    near: tuple[str, ...]
    far: tuple[str, ...]


_CIFAR_FAR = ("mnist", "svhn", "texture", "places365")
_IMAGENET = ("images_largescale", ("ssb_hard", "ninco"), ("inaturalist", "textures", "openimage_o"))

#: The benchmarks of OpenOOD v1.5 by the names of their ID sets, without covariate-shifted ID inputs.
BENCHMARKS = {
    "cifar10": Benchmark(10, "images_classic", ("cifar100", "tin"), _CIFAR_FAR),
    "cifar100": Benchmark(100, "images_classic", ("cifar10", "tin"), _CIFAR_FAR),
    "imagenet200": Benchmark(200, *_IMAGENET),
    "imagenet": Benchmark(1000, *_IMAGENET),
}

#: Measures of `results`, as OpenOOD names and orders them.
MEASURES = ("FPR@95", "AUROC", "AUPR_IN", "AUPR_OUT", "ACC")

#: Files that `save` writes.
FILES = ("openood.csv", "leaderboard.csv")

_LEADERBOARD = (
    "Training",
    "Postprocessor",
    "Near-OOD_AUROC",
    "Far-OOD_AUROC",
    "ID_Accuracy",
    "Outlier_Data",
    "Arch",
    "Additional_Description",
)


class Sets(TypedDict):
    """Arguments of `featnorm.compare`."""

    id_set: tuple[str, ImageSource]
    ood_sets: dict[str, ImageSource]
    fit: ImageSource | None


def benchmark_sets(name: str, root: str | Path) -> Sets:
    """Open the images of a benchmark, as arguments of `featnorm.compare`.

    Parameters
    ----------
    name : name of the benchmark, one of `BENCHMARKS`.
    root : folder that contains ``benchmark_imglist``, ``images_classic`` and ``images_largescale``.

    Returns
    -------
    Sets
        The ID test set; the OOD test sets, in the groups near and far; and the ID training set to fit on, or None
        if none of its images exist. `compare` skips images that a list names but that are missing, and lists them
        in `Comparison.skipped`.

    Raises
    ------
    DataError
        There is no such benchmark, a list is missing or malformed, or none of the images of a test set exist.
    """
    if name not in BENCHMARKS:
        raise DataError(f"no benchmark {name!r} in OpenOOD v1.5: choose one of {', '.join(BENCHMARKS)}")
    benchmark, root = BENCHMARKS[name], Path(root).expanduser()

    def opened(split: str, set_name: str) -> ImageSource | None:
        classes = benchmark.classes if set_name == name else None
        images = root / ("images_classic" if set_name == "textures" else benchmark.images)
        path = root / _LISTS / name / f"{split}_{set_name}.txt"
        files, labels = _read_list(path, classes)
        if not any((images / file).exists() for file in files):
            if split == "train":
                return None
            raise DataError(
                f"none of the {len(files):,} images of {path} exist, such as {images / files[0]} ({_DOWNLOAD})"
            )
        class_names = None if classes is None else [str(label) for label in range(classes)]
        return ImageFiles(LocalFolder(images), files, set_name, None if classes is None else labels, class_names)

    def tested(set_name: str) -> ImageSource:
        source = opened("test", set_name)
        assert source is not None
        return source

    groups = {"near": benchmark.near, "far": benchmark.far}
    return Sets(
        id_set=(name, tested(name)),
        ood_sets={f"{group}:{one}": tested(one) for group, names in groups.items() for one in names},
        fit=opened("train", name),
    )


def _read_list(path: Path, classes: int | None) -> tuple[list[str], list[int]]:
    """Return the paths of the images of a list, relative to their folder, and their labels below `classes`."""
    try:
        # File names may contain bytes that cannot be decoded.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"cannot read the image list {path}: {error.strerror} ({_DOWNLOAD})") from None
    files, labels = [], []
    for number, line in enumerate(text.split("\n"), 1):
        file, *label = line.strip().rsplit(maxsplit=1) or [""]
        if not file:
            continue
        try:
            (value,) = map(int, label)
        except ValueError:
            raise DataError(f"{path}, line {number}: expected a path and a label, got {line.strip()!r}") from None
        if file.startswith("/") or Path(file).is_absolute():
            raise DataError(f"{path}, line {number}: the path {file!r} must be relative to the folder of images")
        if classes is not None and not 0 <= value < classes:
            raise DataError(f"{path}, line {number}: the label {value} is not one of the {classes} classes")
        files.append(file)
        labels.append(value)
    if not files:
        raise DataError(f"the image list {path} is empty ({_DOWNLOAD})")
    return files, labels


def metrics(id_scores: ScoreLike, ood_scores: ScoreLike) -> dict[str, float]:
    """Compute the metrics of OpenOOD v1.5, by its conventions.

    They differ from those of `featnorm.metrics`, except for AUROC:

    - FPR@95 takes OOD as the positive class, as `fpr_at_tpr_ood_positive`: it is the share of ID inputs that are
      flagged when at least 95 % of OOD inputs are. As in scikit-learn's ``roc_curve``, which OpenOOD uses, only
      corners of the ROC curve are thresholds, so the share can be higher where scores are tied. `fpr_at_tpr`, the
      paper's FPR95, is the share of OOD inputs that are accepted when at least 95 % of ID inputs are.
    - AUPR is the area under the precision-recall curve by the trapezoidal rule, which interpolates between
      thresholds; `aupr_in` and `aupr_out` are average precisions, which do not.

    Parameters
    ----------
    id_scores, ood_scores
        (n,) and (m,) scores, higher for ID; see `featnorm.metrics` for types and errors.

    Returns
    -------
    dict
        ``FPR@95``, ``AUROC``, ``AUPR_IN`` and ``AUPR_OUT``, each in [0, 1].
    """
    ood_share, id_share = roc_curve(id_scores, ood_scores)
    n, m = len(as_score_array(id_scores, "id_scores")), len(as_score_array(ood_scores, "ood_scores"))
    # Counts of accepted inputs at falling thresholds, and of flagged inputs at rising ones; the first are 0.
    accepted_id, accepted_ood = np.rint(id_share * n), np.rint(ood_share * m)
    flagged_id, flagged_ood = n - accepted_id[::-1], m - accepted_ood[::-1]
    corner = np.ones(len(flagged_id), dtype=bool)
    corner[2:-1] = (np.diff(flagged_id[1:], 2) != 0) | (np.diff(flagged_ood[1:], 2) != 0)
    values = (
        flagged_id[np.argmax(corner & (flagged_ood / m >= 0.95))] / n,
        auroc(id_scores, ood_scores),
        _area(accepted_id, accepted_ood),
        _area(flagged_ood, flagged_id),
    )
    return dict(zip(MEASURES, map(float, values), strict=False))


def _area(positive: npt.NDArray[np.float64], negative: npt.NDArray[np.float64]) -> float:
    """Return the area under the precision-recall curve from counts of inputs that are called positive."""
    precision = np.append(1, positive[1:] / (positive + negative)[1:])
    return float(trapezoid(precision, positive / positive[-1]))


def results(comparison: Comparison) -> dict[str, dict[str, dict[str, float]]]:
    """Return the results of a comparison in percent, as OpenOOD's evaluator does.

    Parameters
    ----------
    comparison : result of `featnorm.compare` on the sets of a benchmark.

    Returns
    -------
    dict
        By detector, best mean AUROC first, and by row: the near sets, their mean ``nearood``, the far sets, their
        mean ``farood``. Each row has `MEASURES`. ACC, the accuracy of the model on the ID test set, is the same in
        all of them; it is NaN if the model has another number of classes.

    Raises
    ------
    ValueError
        The comparison has no near or no far sets.
    """
    groups = {
        group: [name for name, of in comparison.ood_groups.items() if of == group] for group in ("near", "far")
    }
    for group, names in groups.items():
        if not names:
            raise ValueError(f"the comparison has no {group} OOD sets: name one '{group}:NAME'")
    accuracy = np.nan if comparison.accuracy is None else comparison.accuracy
    found = {}
    for result in comparison.ranked:
        rows: dict[str, dict[str, float]] = {}
        for group, names in groups.items():
            sets = [metrics(result.id_scores, result.ood_scores[name]) for name in names]
            sets.append({measure: float(np.mean([one[measure] for one in sets])) for measure in MEASURES[:-1]})
            for name, shares in zip([*names, f"{group}ood"], sets, strict=True):
                rows[name] = {measure: 100 * share for measure, share in {**shares, "ACC": accuracy}.items()}
        found[result.detector] = rows
    return found


def save(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write the results of a comparison to a folder, in the formats of OpenOOD; return the files.

    Parameters
    ----------
    comparison : see `results`.
    folder
        Made if there is none. It gets ``openood.csv``, for each detector the table that OpenOOD's evaluator
        writes; and ``leaderboard.csv``, one row per detector in the columns of its leaderboard. Columns about the
        training of the model are empty there. Percentages have two decimals.
    """
    tables: list[tuple[str, ...]] = [("Postprocessor", "", *MEASURES)]
    leaderboard: list[tuple[str, ...]] = [_LEADERBOARD]
    for detector, rows in results(comparison).items():
        tables += [(detector, name, *map(_cell, row.values())) for name, row in rows.items()]
        near, far = rows["nearood"], rows["farood"]
        accuracy = "/" if comparison.accuracy is None else _cell(near["ACC"])
        leaderboard.append(("", detector, _cell(near["AUROC"]), _cell(far["AUROC"]), accuracy, "", "", ""))
    Path(folder).mkdir(parents=True, exist_ok=True)
    files = [Path(folder) / name for name in FILES]
    for file, table in zip(files, (tables, leaderboard), strict=True):
        write_text(file, _csv(table))
    return files


def _cell(percent: float) -> str:
    return "" if np.isnan(percent) else f"{percent:.2f}"


def _csv(rows: Sequence[Sequence[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
