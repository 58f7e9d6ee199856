"""Videos as a source of their frames, and the frames of a stream; PyAV decodes them."""

import hashlib
import math
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from typing import Any, BinaryIO, NoReturn

from PIL import Image

from featnorm._utils.extras import import_extra
from featnorm._utils.progress import progress_bar
from featnorm.inputs.decoding import reason_of, upright
from featnorm.inputs.errors import ItemError
from featnorm.inputs.files import Files, Folder
from featnorm.inputs.formats import VIDEO_ENDINGS
from featnorm.inputs.images import classes_by_folder
from featnorm.inputs.kinds import FRAMES
from featnorm.inputs.openers import Location, Opener, Options
from featnorm.inputs.source import ImageSource

#: Version of the rule by which a video becomes RGB frames. Whatever is kept of decoded frames depends on it.
DECODING = 1
#: Number of pixels of a frame above which a video is rejected; 8K has 33 million. A decoder holds many frames.
MAX_PIXELS = 40_000_000

# FFmpeg's names of the containers that are read. The others are images, playlists, scripts and devices, which open
# other files or addresses, or streams without time stamps.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,mxf,nut,dv,ivf,yuv4mpegpipe,wtv,mjpeg"
# Those whose time stamps FFmpeg partly guesses, otherwise after a seek than from the start.
_UNSEEKABLE = {"mpeg", "ogg", "wtv"}
_BUFFER = 1 << 18
# Threads that look through clips; most of their time is reading.
_SCANNERS = 4
# Time that the last frames of a clip may miss before it counts as cut off, in seconds.
_SLACK = 0.5
# Frames that are decoded rather than skipped by a seek, which empties the decoder.
_NEAR = 8
# Error of time stamps in containers that round them to milliseconds, in seconds.
STAMP_ROUNDING = 0.001


class FrameRate:
    """Chooses the frames to read: the first one, and then the first one of each further interval of ``1 / fps`` s.

    Parameters
    ----------
    fps : maximum number of frames per second; None for all of them.
    """

    def __init__(self, fps: float | None) -> None:
        self._fps = fps
        self._wanted = self._last = -math.inf

    def takes(self, time: float, rounding: float = STAMP_ROUNDING) -> bool:
        """Return whether to read the next frame, by its time and the largest rounding error of it, in seconds."""
        if time < self._last:  # the stream starts again
            self._wanted = -math.inf
        self._last, moment = time, time + rounding
        if self._fps is None:
            return True
        if moment < self._wanted:
            return False
        self._wanted = (math.floor(moment * self._fps) + 1) / self._fps
        return True


@dataclass(frozen=True)
class Clip:
    """A video file, and which of its frames are read.

    Attributes
    ----------
    path : str
        Path of the file in its folder.
    identity : str
        Name, size and modification time of the file that was looked through.
    sha256 : bytes
        Digest of its content.
    base : Fraction
        Unit of its time stamps, in seconds.
    stamps : array of int
        Time stamps of the frames that are read, ascending.
    keys : array of int
        Time stamps of all frames from which decoding can start, ascending; none if only the beginning is one.
    places : array of int
        Time stamps of these frames in the order of decoding, by which a container is searched.
    start : int
        Time stamp of its first frame.
    interval : float
        Average distance of two frames, in units of `base`.
    fault : str
        Why some or all of its frames are missing; empty if none are.
    """

    path: str
    identity: str
    sha256: bytes = b""
    base: Fraction = Fraction(1)
    stamps: "array[int]" = field(default_factory=lambda: array("q"))
    keys: "array[int]" = field(default_factory=lambda: array("q"))
    places: "array[int]" = field(default_factory=lambda: array("q"))
    start: int = 0
    interval: float = 0.0
    fault: str = ""

    def __len__(self) -> int:
        # Missing frames are one item, which cannot be read: they are reported like any other.
        return len(self.stamps) + bool(self.fault)

    def time(self, i: int) -> float | None:
        """Return the time of frame `i` since the first one in seconds; None for the missing frames."""
        return float((self.stamps[i] - self.start) * self.base) if i < len(self.stamps) else None


class VideoFrames(ImageSource):
    """The frames of video files, upright and in RGB, one clip after the other and in the order of time.

    A clip is looked through when it is opened, without decoding it: of its frames only the time stamps stay in
    memory. Frames are read fastest in order: a clip is then decoded once, by FFmpeg's own threads, and what lies
    between two frames is decoded only as far as the second one needs it. A frame that cannot be decoded is an item
    that cannot be read, and so are the missing frames of a clip that is cut off or cannot be opened, as one item.

    Parameters
    ----------
    folder : Folder
        The folder.
    files : sequence of str
        Paths of the videos in it.
    title, labels, class_names
        See `Source`; the labels are those of the files.
    fps : float
        Number of frames per second to read; 0 for all of them.

    Raises
    ------
    ImportError
        If PyAV is not installed.
    """

    kind = FRAMES
    names_are_paths = True
    max_readers = 1

    def __init__(
        self,
        folder: Folder,
        files: Sequence[str],
        title: str,
        labels: Sequence[int | None] | None = None,
        class_names: list[str] | None = None,
        fps: float = 1.0,
    ) -> None:
        import_extra("av")
        with ThreadPoolExecutor(_SCANNERS, "featnorm-clips") as threads:
            found = threads.map(lambda file: look_through(folder, file, fps), files)
            self.clips = list(progress_bar(found, total=len(files), unit="clip", desc="looking through clips"))
        of_files = [None] * len(files) if labels is None else labels
        each = [label for label, clip in zip(of_files, self.clips, strict=True) for _ in range(len(clip))]
        super().__init__(title, each, class_names)
        self.fps = fps
        self._folder = folder
        self._ends = list(accumulate(map(len, self.clips)))
        self._lock = threading.Lock()
        self._open: tuple[int, _Decoder] | None = None

    def time(self, i: int) -> float | None:
        """See `Source`."""
        clip, number = self._locate(self._checked(i))
        return self.clips[clip].time(number)

    def unit(self, i: int) -> str | None:
        """See `Source`: the name of the clip."""
        return self._folder.name(self.clips[self._locate(self._checked(i))[0]].path)

    def _locate(self, i: int) -> tuple[int, int]:
        clip = bisect_right(self._ends, i)
        return clip, i - (self._ends[clip - 1] if clip else 0)

    def _read(self, i: int) -> tuple[Image.Image, bytes]:
        digest, name = self._digest(i), self._name(i)
        number, row = self._locate(i)
        clip = self.clips[number]
        with self._lock:
            try:
                frame = self._decoder(number).frame(clip.stamps[row])
            except (OSError, ValueError) as error:
                raise ItemError(name, reason_of(error)) from error
            finally:
                if row == len(clip.stamps) - 1:
                    self._close()
        try:
            return upright(frame, name), digest
        except ItemError as error:
            error.digest = digest
            raise

    def _decoder(self, number: int) -> "_Decoder":
        """Return the open decoder of a clip; only one is open at a time."""
        if self._open is None or self._open[0] != number:
            self._close()
            clip = self.clips[number]
            if self._folder.identity(clip.path) != clip.identity:
                raise ValueError("the video has changed since it was opened")
            self._open = number, _Decoder(self._folder, clip)
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _name(self, i: int) -> str:
        number, row = self._locate(i)
        clip = self.clips[number]
        name = self._folder.name(clip.path)
        if (time := clip.time(row)) is None:
            return f"{name} after {clip.time(row - 1):.3f} s" if row else name
        return f"{name} at {time:.3f} s"

    def _digest(self, i: int) -> bytes:
        number, row = self._locate(i)
        clip = self.clips[number]
        if row == len(clip.stamps):
            raise ItemError(self._name(i), clip.fault)
        return hashlib.sha256(b"%b %d %d" % (clip.sha256, clip.stamps[row], DECODING)).digest()

    def _identity(self, i: int) -> str:
        number, row = self._locate(i)
        clip = self.clips[number]
        return f"{clip.identity} {clip.stamps[row] if row < len(clip.stamps) else clip.fault}"

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the clips itself.
        return {**self.__dict__, "_lock": None, "_open": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_lock": threading.Lock()}


class VideoOpener(Opener):
    """Video files, or a folder that holds more of them than of images.

    As with images, first-level sub-folders are the classes if all videos lie in them.
    """

    endings = VIDEO_ENDINGS
    merges = True

    def accepts(self, location: Location) -> bool:
        """See `Opener`."""
        if isinstance(location, Folder):
            return len(location.videos[0]) > len(location.images[0])
        return isinstance(location, Files) and location.paths[0].lower().endswith(self.endings)

    def open(self, location: Any, title: str, options: Options) -> VideoFrames:
        """See `Opener`."""
        options.require_no_column(location)
        if isinstance(location, Files):
            paths = location.paths
            title = title if len(paths) == 1 else f"{len(paths)} videos"
            return VideoFrames(location.folder, paths, title, fps=options.fps)
        files, beside = location.videos
        frames = VideoFrames(location, files, title, *classes_by_folder(location, files), fps=options.fps)
        frames.passed_over = beside
        return frames


def look_through(folder: Folder, path: str, fps: float) -> Clip:
    """Return a clip and the frames of it that are read: `fps` per second, or all of them for 0.

    The first frame is read, and then the first one of each further interval of ``1 / fps`` seconds.
    """
    identity = folder.identity(path)
    try:
        with folder.stream(path) as file:
            sha256 = hashlib.file_digest(file, "sha256").digest()  # type: ignore[arg-type]  # it has readinto
            file.seek(0)
            with _opened(file) as (container, stream):
                return _indexed(container, stream, fps, path=path, identity=identity, sha256=sha256)
    except (OSError, ValueError) as error:
        return Clip(path, identity, fault=reason_of(error))


class _Reader:
    """The bytes of a file for FFmpeg, without its name, which FFmpeg would interpret."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _refused(url: str, *_: object) -> NoReturn:
    raise PermissionError(f"it names another file, {url}")


@contextmanager
def _opened(file: BinaryIO) -> Iterator[tuple[Any, Any]]:
    """Open a video file, and yield its container and its stream of frames.

    Raises
    ------
    ValueError
        If it is not a video that can be decoded.
    """
    av = import_extra("av")
    limit = {"max_pixels": str(MAX_PIXELS)}
    try:
        container = av.open(
            _Reader(file),
            "r",
            options=limit,
            container_options={"format_whitelist": _FORMATS},
            io_open=_refused,
            metadata_errors="replace",
            buffer_size=_BUFFER,
        )
    except av.FFmpegError as error:
        raise ValueError(f"not a video that can be read ({error.strerror or error})") from None
    with container:
        pictures = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
        streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
        if not streams:
            raise ValueError("it has no video" + (", only sound" if container.streams.audio else ""))
        stream = streams[0]
        if stream.codec_context is None:
            raise ValueError("its frames are in a format that FFmpeg was built without")
        if stream.width * stream.height > MAX_PIXELS:
            raise ValueError(f"frames of {stream.width} x {stream.height} pixels are more than {MAX_PIXELS:,}")
        if not stream.width * stream.height:
            raise ValueError(f"its frames cannot be decoded, or have more than {MAX_PIXELS:,} pixels")
        stream.codec_context.options = limit
        stream.thread_type = "AUTO"
        yield container, stream


def _indexed(container: Any, stream: Any, fps: float, **facts: Any) -> Clip:
    """Return the clip of an open container."""
    av = import_extra("av")
    found, keys = array("q"), dict[int, int]()
    unstamped, end, fault = 0, 0.0, ""
    try:
        for packet in container.demux():
            if not packet.size or packet.is_discard:
                continue
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is not None:
                end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
            if packet.stream is not stream:
                continue
            if packet.pts is None:
                unstamped += 1
                continue
            found.append(packet.pts)
            if packet.is_keyframe and container.format.name not in _UNSEEKABLE:
                keys[packet.pts] = packet.pts if packet.dts is None else packet.dts
    except av.FFmpegError as error:
        fault = f"the rest cannot be read ({error.strerror or error})"
    if unstamped:
        fault = f"{unstamped:,} of its frames have no time stamp: convert it to another format"
    if not found:
        return Clip(**facts, fault=fault or "it has no frames")
    stamps = array("q", sorted(set(found)))
    if not fault and container.duration is not None:
        length = container.duration / av.time_base
        reached = end - (container.start_time or 0) / av.time_base
        if length - reached > _SLACK + float(2 * stream.time_base * (stamps[-1] - stamps[0]) / len(stamps)):
            fault = f"it is cut off after {reached:.1f} of {length:.1f} s"
    base, start = stream.time_base, stamps[0]
    interval = (stamps[-1] - start) / max(1, len(stamps) - 1)
    if fps:
        rate, unit = FrameRate(fps), float(base)
        rounding = min(unit, STAMP_ROUNDING)
        stamps = array("q", (stamp for stamp in stamps if rate.takes((stamp - start) * unit, rounding)))
    return Clip(
        **facts,
        base=base,
        stamps=stamps,
        keys=array("q", sorted(keys)),
        places=array("q", (keys[key] for key in sorted(keys))),
        start=start,
        interval=interval,
        fault=fault,
    )


class _Decoder:
    """The open file of a clip, and the place up to which it is decoded.

    Parameters
    ----------
    folder : Folder
        The folder.
    clip : Clip
        The clip.

    Raises
    ------
    OSError, ValueError
        If it can no longer be opened.
    """

    def __init__(self, folder: Folder, clip: Clip) -> None:
        self._folder, self._clip = folder, clip
        self._start()

    def _start(self) -> None:
        with ExitStack() as stack:
            file = stack.enter_context(self._folder.stream(self._clip.path))
            self._container, self._stream = stack.enter_context(_opened(file))
            self.close = stack.pop_all().close
        self._restart()

    def frame(self, stamp: int) -> Any:
        """Return the frame of a time stamp, an `av.VideoFrame`.

        Raises
        ------
        ValueError
            If it is damaged.
        """
        keys, places = self._clip.keys, self._clip.places
        key = bisect_right(keys, stamp) - 1
        reached = self._clip.start if self._frame is None else self._frame.pts
        # A frame between these two was not decoded, and will not be the next time.
        is_behind = stamp < reached and (self._passed is None or stamp <= self._passed)
        if is_behind or (key >= 0 and keys[key] > reached + _NEAR * self._clip.interval):
            # A container may start after the frame that was asked for: then from the key frame before.
            for number in (key, key - 1):
                self._seek(places[number] if number >= 0 else None)
                self._advance(stamp)
                if self._frame is not None and (self._frame.pts == stamp or self._passed is not None):
                    break
        else:
            self._advance(stamp)
        if self._frame is None or self._frame.pts != stamp:
            raise ValueError("a damaged frame")
        return self._frame

    def _restart(self) -> None:
        self._frames = self._decoded()
        self._frame: Any = None
        # Time stamp of the frame before this one; None if this is the first one.
        self._passed: int | None = None

    def _seek(self, place: int | None) -> None:
        """Continue at a key frame, or at the beginning for None."""
        if place is None:
            self.close()
            self._start()
            return
        with suppress(import_extra("av").FFmpegError):  # then the frame is not found
            self._container.seek(place, stream=self._stream)
        self._restart()

    def _advance(self, stamp: int) -> None:
        """Decode until the frame of a time stamp, or the first one after it."""
        while self._frame is None or self._frame.pts < stamp:
            following = next(self._frames, None)
            if following is None:
                break
            if self._frame is not None:
                self._passed = self._frame.pts
            self._frame = following

    def _decoded(self) -> Iterator[Any]:
        av = import_extra("av")
        stamps, context = self._clip.stamps, self._stream.codec_context
        # A damaged packet costs its own frame only; if the container breaks off, the frames after it are missing.
        with suppress(av.FFmpegError):
            for packet in self._container.demux(self._stream):
                place = bisect_left(stamps, packet.pts) if packet.pts is not None else len(stamps)
                is_read = not packet.size or (place < len(stamps) and stamps[place] == packet.pts)
                # Frames that are neither read nor needed for others are not decoded.
                context.skip_frame = "DEFAULT" if is_read else "NONREF"
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    continue
                yield from (frame for frame in frames if frame.pts is not None and not frame.is_corrupt)
