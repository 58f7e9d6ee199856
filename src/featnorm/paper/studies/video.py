"""Clips of real pixels: false alarms per frame and clip, calibrated on clips or on frames as if independent."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from featnorm._utils.extras import import_extra
from featnorm._utils.layout import fast_layout
from featnorm._utils.progress import progress_bar
from featnorm.calibration import Calibration
from featnorm.detectors import KNN, MSP, NAN, Detector, Energy, KLUniform, L1Norm
from featnorm.detectors.held_out import fit_in_batches
from featnorm.inputs import open_source, source_loader
from featnorm.inputs.video import VideoFrames
from featnorm.metrics import auroc
from featnorm.models import load_model
from featnorm.paper.heads import NETWORK
from featnorm.paper.images import SIDE, Images, as_pixels, cifar10_images, spaced
from featnorm.paper.study import Context, SingleRun, Whole
from featnorm.paper.tables import Table, facts
from featnorm.parts import PartCalibration, unit_scores
from featnorm.tap import FeatureTap

ID_CLIPS, OOD_CLIPS = 600, 200
# Of each draw; the other ID clips are new ones.
_CALIBRATED, _DRAWS = 100, 1000
_LENGTHS = (8, 40)
_FPS, _PIXELS, _LARGE = 10, 64, 160
_TPR, _LOWEST = 0.95, 0.25
_DETECTORS = (NAN, L1Norm, MSP, Energy, KLUniform, KNN)

_Array = npt.NDArray[Any]


class Video(SingleRun[Images]):
    """Photographs that a camera pans and zooms over, as H.264 files, scored by the packaged network.

    Its result has, for each detector, the rates over the draws (``rates``) and AUROCs and flagged shares of the
    OOD sets (``ood``).
    """

    page: ClassVar[str] = "video"

    def load(self, scale: None, context: Context) -> Images:
        import_extra("av")
        return context.once(cifar10_images)

    def settings(self, job: Whole, scale: None, inputs: Images) -> dict[str, Any]:
        clips = {"ID clips": ID_CLIPS, "OOD clips": OOD_CLIPS, "calibration clips": _CALIBRATED, "draws": _DRAWS}
        return {"network": NETWORK, "clips": clips, "images": inputs.facts}

    def run(self, job: Whole, scale: None, inputs: Images, folder: Path, context: Context) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        detectors = [detector() for detector in _DETECTORS]
        tap = FeatureTap(fast_layout(load_model(NETWORK).to(context.runtime.torch_device)))
        fit_in_batches(detectors, (tap(as_pixels(images, tap.device)) for images in inputs.train[0].split(256)))
        sets = {"ID": spaced(inputs.test[0], ID_CLIPS)}
        sets |= {name: spaced(images, OOD_CLIPS) for name, images in inputs.ood.items()}
        found = {name: _scores(tap, detectors, images, rng, context) for name, images in sets.items()}
        frames = {name: len(owners) for name, (_, owners) in found.items()}
        rates, ood = {}, {}
        for i, detector in enumerate(detectors):
            scores = {name: (values[i], owners) for name, (values, owners) in found.items()}
            rates[repr(detector)] = _rates(*scores["ID"])
            ood[repr(detector)] = {name: _told_apart(scores["ID"], scores[name]) for name in inputs.ood}
        return {"frames": frames, "rates": rates, "ood": ood}

    def tables(self, content: Mapping[str, Any]) -> dict[str, Table]:
        clips, frames = content["clips"], content["frames"]
        notes = [
            f"{clips['ID clips']} ID clips ({frames['ID']:,} frames) and {clips['OOD clips']} of each OOD set, of "
            f"{_LENGTHS[0]} to {_LENGTHS[1]} frames, scored by {content['network']}",
            f"percent; means over {clips['draws']:,} draws of {clips['calibration clips']} calibration clips, on "
            "the other ID clips",
            *facts([content]),
        ]
        rates = [
            [name, *(f"{100 * value:.1f}" for value in row.values())] for name, row in content["rates"].items()
        ]
        headers = ["Detector", *next(iter(content["rates"].values()))]
        sets = list(next(iter(content["ood"].values())))
        told = [
            [name, *(" / ".join(f"{100 * value:.1f}" for value in row[one]) for one in sets)]
            for name, row in content["ood"].items()
        ]
        return {
            "video": Table("False alarms at a promised 5 %", headers, rates, notes),
            "video-ood": Table(
                "OOD clips: AUROC of frames / AUROC of clips / clips flagged, in percent",
                ["Detector", *sets],
                told,
                notes[:1],
            ),
        }


def footage(image: Tensor, rng: np.random.Generator) -> Iterator[_Array]:
    """Yield the frames of a clip: a window that moves over an enlarged image, with changing light and noise.

    Parameters
    ----------
    image : (3, h, w) uint8.
    rng : chooses length, path, light and noise.
    """
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    large = Image.fromarray(pixels).resize((_LARGE, _LARGE), Image.Resampling.BICUBIC)
    count = int(rng.integers(_LENGTHS[0], _LENGTHS[1] + 1))
    (size0, size1), light, noise = rng.uniform(0.75, 1, 2), rng.uniform(0.8, 1.2, 2), rng.uniform(2, 8)
    places = rng.uniform(0, 1, (2, 2))
    for t in np.linspace(0, 1, count):
        size = _LARGE * (size0 + t * (size1 - size0))
        x, y = (_LARGE - size) * (places[0] + t * (places[1] - places[0]))
        window = large.resize((_PIXELS, _PIXELS), Image.Resampling.BILINEAR, (x, y, x + size, y + size))
        frame = np.asarray(window, np.float32) * (light[0] + t * (light[1] - light[0]))
        yield (frame + noise * rng.standard_normal(frame.shape)).clip(0, 255).astype(np.uint8)


def write_clip(path: Path, frames: Iterator[_Array]) -> None:
    """Write frames as an H.264 file."""
    av = import_extra("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_FPS, options={"preset": "veryfast"})
        stream.width = stream.height = _PIXELS
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, "rgb24")
            picture.pts, picture.time_base = i, Fraction(1, _FPS)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


@torch.no_grad()
def _scores(
    tap: FeatureTap, detectors: Sequence[Detector], images: Tensor, rng: np.random.Generator, context: Context
) -> tuple[Tensor, Tensor]:
    """Return the scores of the frames of a clip for each image, (detectors, n), and their clips (n,)."""
    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(progress_bar(images, desc="clips", unit="clip", progress=context.progress)):
            write_clip(Path(folder) / f"{i:04}.mp4", footage(image, rng))
        source = open_source(folder, fps=0)
        assert isinstance(source, VideoFrames)
        owners = torch.tensor([int(Path(unit).stem) for unit in source.units() or ()])
        loader = source_loader(source, _shrunk, batch_size=250)
        scores = []
        for batch in progress_bar(loader, desc="frames", unit="batch", progress=context.progress):
            features = tap(batch.inputs)
            scores.append(torch.stack([detector.score(features).double().cpu() for detector in detectors]))
    return torch.cat(scores, 1), owners


def _shrunk(image: Image.Image) -> Tensor:
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(255)


def _rates(scores: Tensor, owners: Tensor) -> dict[str, float]:
    """Return shares of new ID frames and clips that are flagged, calibrated in two ways, and how sure they are."""
    rng = np.random.default_rng(1)
    count = int(owners.max()) + 1
    rows = [torch.nonzero(owners == clip).squeeze(1) for clip in range(count)]
    sums = np.zeros(6)
    for _ in range(_DRAWS):
        order = rng.permutation(count)
        known = torch.cat([rows[clip] for clip in order[:_CALIBRATED]])
        new = torch.cat([rows[clip] for clip in order[_CALIBRATED:]])
        _, of_new = owners[new].unique(return_inverse=True)
        of_clips = count - _CALIBRATED
        sizes = torch.bincount(of_new)

        def per_clip(flagged: Tensor, of_new: Tensor = of_new, sizes: Tensor = sizes) -> Tensor:
            return torch.bincount(of_new, flagged.double()) / sizes

        on_clips = PartCalibration(scores[known], owners[known], _TPR, lowest=_LOWEST)
        on_frames = Calibration(scores[known], _TPR)
        flagged = ~on_frames.is_id(scores[new])
        whole = unit_scores(scores[new], of_new, of_clips, _LOWEST)
        low, high = on_frames.false_alarm_range(0.9)
        sums += [
            float(per_clip(~on_clips.is_id(scores[new])).mean()),
            float((~on_clips.units.is_id(whole)).double().mean()),
            float(per_clip(flagged).mean()),
            float((~on_frames.is_id(whole)).double().mean()),
            float((per_clip(flagged) > 0).double().mean()),
            float(low <= float(flagged.double().mean()) <= high),
        ]
    names = (
        "frames, calibrated on clips",
        "clips, calibrated on clips",
        "frames, as if independent",
        "clips by the threshold of such frames",
        "clips with such a frame flagged",
        "how often the 90 % range of such frames holds",
    )
    return dict(zip(names, (sums / _DRAWS).tolist(), strict=True))


def _told_apart(known: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> list[float]:
    """Return AUROC of frames, AUROC of clips, and the share of OOD clips that are flagged."""
    whole = [unit_scores(scores, owners, int(owners.max()) + 1, _LOWEST) for scores, owners in (known, others)]
    flagged = ~PartCalibration(*known, _TPR, lowest=_LOWEST).units.is_id(whole[1])
    rates = auroc(known[0], others[0]), auroc(whole[0], whole[1]), float(flagged.double().mean())
    return [float(rate) for rate in rates]


Video("video", "Clips of real pixels, frame by frame and as wholes", duration="6 min")
