"""Videos as a source of frames: which frames, in which order, whatever the container; and hostile files."""

import pickle
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from clips import SIZE, number_of, numbered, packets, write_clip
from featnorm.inputs import FRAMES, IMAGES, DataError, ItemError, open_source, source_loader
from featnorm.inputs import video as video_module
from featnorm.inputs.formats import looks_like_image, reason_not_read

CONTAINERS = {
    "a.mp4": "libx264",
    "b.mkv": "libx264",
    "c.mov": "libx264",
    "d.avi": "mpeg4",
    "e.ts": "libx264",
    "f.webm": "libvpx-vp9",
    "g.avi": "mjpeg",
    "h.mpg": "mpeg1video",
    "i.wmv": "wmv2",
}


def readable(source):
    """Return the numbers of the frames that can be read, and the names and reasons of the others."""
    numbers, unread = [], {}
    for i in range(len(source)):
        try:
            numbers.append(number_of(source.item(i)))
        except ItemError as error:
            unread[error.name] = error.reason
    return numbers, unread


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 40)


@pytest.mark.parametrize(("name", "codec"), CONTAINERS.items())
def test_each_frame_is_the_one_of_its_time_in_any_order_of_reading(tmp_path, name, codec):
    fps = 25 if codec == "mpeg1video" else 10  # which has a few rates only
    path = write_clip(tmp_path / name, 40, codec=codec, fps=fps)
    for rate in (0, 2.5, 1):
        source = open_source(str(path), fps=rate)
        wanted = [round(source.time(i) * fps) for i in range(len(source))]
        assert readable(source) == (wanted, {})
        if not rate:
            assert wanted == list(range(40))
        order = random.Random(0).choices(range(len(source)), k=12)
        assert [number_of(source.item(i)) for i in order] == [wanted[i] for i in order]


def test_names_times_and_clips(clip):
    source = open_source(str(clip), fps=2)
    assert source.kind is FRAMES
    assert len(source) == 8
    assert [source.time(i) for i in range(8)] == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert source.name(3) == f"{clip} at 1.500 s"
    assert {source.unit(i) for i in range(8)} == {str(clip)}
    assert source.item(0).mode == "RGB"
    assert source.item(0).size == SIZE
    part = open_source(f"{clip}[2:4]", fps=2)
    assert [(part.time(i), part.unit(i)) for i in range(2)] == [(1, str(clip)), (1.5, str(clip))]
    assert len({source.digest(i) for i in range(8)}) == 8
    assert part.digest(0) == source.digest(2) == source.read(2)[1]


def test_one_frame_per_second_is_the_default_and_a_shorter_clip_has_one(tmp_path, clip):
    assert [open_source(str(clip)).time(i) for i in range(4)] == [0, 1, 2, 3]
    assert len(open_source(str(write_clip(tmp_path / "short.mp4", 2)))) == 1


def test_a_variable_frame_rate_keeps_the_times_of_the_frames(tmp_path):
    times = [0, 0.1, 0.2, 1.05, 1.1, 4.0, 4.5, 9.25]
    path = write_clip(tmp_path / "v.mkv", 8, times=times)
    source = open_source(str(path), fps=0)
    assert [source.time(i) for i in range(8)] == pytest.approx(times)
    sampled = open_source(str(path), fps=1)
    assert [sampled.time(i) for i in range(len(sampled))] == pytest.approx([0, 1.05, 4.0, 9.25])
    assert readable(sampled) == ([0, 3, 5, 7], {})


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_frames_are_upright(tmp_path, rotation):
    turned = np.rot90(numbered(5), -rotation // 90)
    source = open_source(str(write_clip(tmp_path / "r.mp4", [turned] * 3, rotation=rotation)))
    assert source.item(0).size == SIZE
    assert number_of(source.item(0)) == 5


def test_frames_are_an_image_to_a_model_and_loaded_in_order_by_one_thread(clip):
    source = open_source(str(clip), fps=0)
    source.require(IMAGES, "a model")
    readers = set()

    def transform(image):
        import torch

        readers.add(threading.get_ident())
        return torch.tensor([number_of(image)])

    loader = source_loader(source, transform, batch_size=7, workers=4)
    assert [n for batch in loader for n in batch.inputs.flatten().tolist()] == list(range(40))
    assert len(readers) == 1


def test_threads_may_read_one_source(clip):
    source = open_source(str(clip), fps=0)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda i: number_of(source.item(i)), range(40))) == list(range(40))


def test_a_source_continues_in_another_process(clip):
    source = open_source(str(clip), fps=0)
    assert number_of(source.item(5)) == 5
    assert number_of(pickle.loads(pickle.dumps(source)).item(6)) == 6


def test_frames_between_those_that_are_read_are_not_all_decoded(clip, monkeypatch):
    decoded = []
    generate = video_module._Decoder._decoded

    def counting(self):
        for frame in generate(self):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_module._Decoder, "_decoded", counting)
    source = open_source(str(clip), fps=1)
    assert readable(source)[0] == [0, 10, 20, 30]
    assert len(decoded) < 30


def test_folders_are_classes_and_what_is_not_a_video_is_counted(tmp_path, clip):
    for name in ("cats/a.mp4", "dogs/deep/b.MP4", "dogs/c.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    Image.new("RGB", (8, 8)).save(tmp_path / "cats" / "cover.jpg")
    source = open_source(str(tmp_path))
    assert source.class_names == ["cats", "dogs"]
    assert [source.label(i) for i in range(12)] == [0] * 4 + [1] * 8
    assert len({source.unit(i) for i in range(12)}) == 3
    assert str(source.passed_over) == "ignored 2 files that are not videos (.jpg 1, .txt 1)"
    for name in "xyz":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    images = open_source(str(tmp_path))
    assert len(images) == 4
    assert str(images.passed_over) == "ignored 4 files that are not images (.mp4 3, .txt 1)"
    (tmp_path / "dogs" / "labels.csv").write_text("a,b\n1,2\n")
    assert open_source(str(tmp_path / "dogs")).kind is FRAMES


def test_a_video_among_images_is_named(tmp_path, clip):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    source = open_source(str(tmp_path / "a.png"), str(clip))
    assert source.kind is IMAGES
    with pytest.raises(ItemError, match="a video: pass videos apart from images"):
        source.item(1)
    for name in ("d.avi", "b.mkv"):
        content = write_clip(tmp_path / name, 3, codec=CONTAINERS[name]).read_bytes()
        assert not looks_like_image(content)
        assert "a video" in reason_not_read(content)


def test_several_videos_are_one_source(tmp_path, clip):
    paths = [shutil.copy(clip, tmp_path / f"{name}.mp4") for name in "ab"]
    source = open_source(*map(str, paths))
    assert source.title == "2 videos"
    assert [source.unit(i) for i in (0, 4)] == [str(path) for path in paths]
    assert readable(source) == ([0, 10, 20, 30] * 2, {})


def test_a_damaged_frame_costs_itself_only(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 24)
    number, place, size = packets(path)[12]
    content = bytearray(path.read_bytes())
    content[place + 4 : place + size] = b"\xff" * (size - 4)
    path.write_bytes(content)
    source = open_source(str(path), fps=0)
    numbers, unread = readable(source)
    assert unread == {source.name(number): "a damaged frame"}
    # Those around it are there, and may show the damage up to the next key frame, the 16th.
    assert len(numbers) == 23
    assert set(numbers) >= {*range(8), *range(16, 24)}
    assert readable(source)[1] == unread


def test_a_clip_that_is_cut_off_says_so_once(tmp_path):
    path = write_clip(tmp_path / "cut.mp4", 40, movflags="faststart")
    content = path.read_bytes()
    path.write_bytes(content[: 6 * len(content) // 10])
    source = open_source(str(path))
    numbers, unread = readable(source)
    assert numbers == [0, 10, 20][: len(numbers)]
    *_, (name, reason) = unread.items()
    assert name.startswith(f"{path} after ")
    assert "it is cut off after" in reason
    assert source.time(len(source) - 1) is None
    with pytest.raises(ItemError, match="cut off"):
        source.digest(len(source) - 1)


HOSTILE = {
    "empty.mp4": (b"", "not a video that can be read"),
    "text.mkv": (b"hello world, this is not a video\n" * 99, "not a video that can be read"),
    "list.mp4": (b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{clip}\n#EXT-X-ENDLIST\n", "not a video"),
    "concat.avi": (b"ffconcat version 1.0\nfile '{clip}'\n", "not a video that can be read"),
    "address.ts": (b"http://127.0.0.1:9/clip.mp4", "not a video that can be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_a_video_is_one_unreadable_item(tmp_path, clip, name):
    content, reason = HOSTILE[name]
    (tmp_path / name).write_bytes(content.replace(b"{clip}", str(clip).encode()))
    source = open_source(str(tmp_path / name))
    numbers, unread = readable(source)
    assert numbers == []
    assert list(unread) == [str(tmp_path / name)]
    assert reason in unread[str(tmp_path / name)]


def test_a_file_that_names_others_does_not_open_them(tmp_path, clip, monkeypatch):
    # The container that FFmpeg would follow without asking, if the format were allowed.
    (tmp_path / "list.mp4").write_bytes(HOSTILE["list.mp4"][0].replace(b"{clip}", str(clip).encode()))
    monkeypatch.setattr(video_module, "_FORMATS", f"{video_module._FORMATS},hls,concat")
    assert readable(open_source(str(tmp_path / "list.mp4")))[0] == []


def test_sound_alone_is_no_video_and_beside_one_it_is_ignored(tmp_path):
    numbers, unread = readable(open_source(str(write_clip(tmp_path / "sound.mp4", 0))))
    assert (numbers, list(unread.values())) == ([], ["it has no video, only sound"])
    source = open_source(str(write_clip(tmp_path / "both.mp4", 12, sound=True)), fps=0)
    assert readable(source) == (list(range(12)), {})


def test_the_wrong_ending_does_not_matter(tmp_path, clip):
    assert readable(open_source(str(shutil.copy(clip, tmp_path / "clip.avi"))))[0] == [0, 10, 20, 30]


@pytest.mark.parametrize("name", ["large.avi", "large.mp4"])
def test_frames_of_too_many_pixels_are_rejected(tmp_path, monkeypatch, name):
    monkeypatch.setattr(video_module, "MAX_PIXELS", 200 * 100 - 1)
    frames = [np.zeros((100, 200, 3), np.uint8)] * 2
    path = write_clip(tmp_path / name, frames, codec="mjpeg" if name.endswith("avi") else "mpeg4")
    numbers, unread = readable(open_source(str(path)))
    assert numbers == []
    assert "19,999" in unread[str(path)]


def test_a_clip_that_changes_is_not_read_as_the_old_one(tmp_path, clip):
    path = shutil.copy(clip, tmp_path / "clip.mp4")
    source = open_source(str(path))
    write_clip(path, 12)
    with pytest.raises(ItemError, match="the video has changed since it was opened"):
        source.item(0)
    path.unlink()
    with pytest.raises(ItemError, match="changed"):
        source.item(1)


@pytest.mark.parametrize("fps", [-1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_named(clip, fps):
    with pytest.raises(ValueError, match="fps is"):
        open_source(str(clip), fps=fps)


def test_columns_are_of_tables(clip):
    with pytest.raises(DataError, match="not a table"):
        open_source(str(clip), label_column="y")


def test_without_pyav_the_extra_is_named(clip, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"this needs av .*pip install '\.\[video\]'"):
        open_source(str(clip))
