"""Videos for tests, written by PyAV; frames that show their own number."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av", reason="PyAV is not installed")

SIZE = (96, 64)
_BITS, _STRIPE = 8, 12


def numbered(number: int) -> np.ndarray:
    """Return a frame that `number_of` reads: the bits of its number, as stripes at its top, on a gradient."""
    across, down = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    frame = np.stack([across, 3 * down, (7 * number + across) % 256], 2).astype(np.uint8)
    for bit in range(_BITS):
        frame[:24, bit * _STRIPE : (bit + 1) * _STRIPE] = 255 * (number >> bit & 1)
    return frame


def number_of(image: Image.Image) -> int:
    top = np.asarray(image)[4:20].mean((0, 2))
    return sum(int(top[bit * _STRIPE + 3 : (bit + 1) * _STRIPE - 3].mean() > 128) << bit for bit in range(_BITS))


def write_clip(
    path: Path | str,
    frames: Iterable[np.ndarray | Image.Image] | int,
    *,
    fps: int = 10,
    codec: str = "libx264",
    gop: int = 8,
    rotation: float | None = None,
    times: Sequence[float] | None = None,
    sound: bool = False,
    **options: str,
) -> Path:
    """Write a video of frames, or of so many numbered ones.

    Parameters
    ----------
    rotation : counterclockwise rotation in degrees by which a player shows it upright.
    times : time of each frame in seconds. Default: `fps` per second.
    sound : whether to add a second of silence.
    options : options of the container.
    """
    if isinstance(frames, int):
        frames = map(numbered, range(frames))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    frames = [np.ascontiguousarray(frame) for frame in frames]
    with av.open(str(path), "w", options=options) as container:
        if frames:
            presets = {"preset": "ultrafast", "bf": "2"} if codec == "libx264" else {}
            stream = container.add_stream(codec, rate=fps, options={"g": str(gop), **presets})
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            if codec != "libx264":
                stream.bit_rate = 4_000_000
            if times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            if rotation is not None:
                stream.set_display_rotation(rotation)
        if sound or not frames:
            voice = container.add_stream("aac", rate=8000)
            for start in range(0, 8000, 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                silence.sample_rate, silence.pts = 8000, start
                container.mux(voice.encode(silence))
            container.mux(voice.encode())
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, "rgb24")
            picture.pts = i if times is None else round(1000 * times[i])
            picture.time_base = Fraction(1, fps if times is None else 1000)
            container.mux(stream.encode(picture))
        if frames:
            container.mux(stream.encode())
    return Path(path)


def packets(path: Path) -> list[tuple[int, int, int]]:
    """Return the number, the offset in the file and the size of each frame's packet, in the order of the file."""
    with av.open(str(path)) as container:
        found = [(p.pts, p.pos, p.size) for p in container.demux(video=0) if p.size]
    order = sorted(stamp for stamp, *_ in found)
    return [(order.index(stamp), place, size) for stamp, place, size in found]
