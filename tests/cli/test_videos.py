"""Commands on videos: a verdict per frame with its time, and one per clip, calibrated on clips."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import featnorm as fn
from clips import write_clip
from featnorm.inputs import open_source
from featnorm.parts import PartCalibration, unit_scores

CLIPS, FRAMES = 26, 6


def footage(random, frames=FRAMES, odd=False):
    """Frames of a clip, all alike: a color of its own, and noise."""
    color = (250, 5, 5) if odd else random.integers(90, 160, 3)
    for _ in range(frames):
        frame = np.full((32, 48, 3), color) + random.integers(-20, 20, (32, 48, 3))
        yield frame.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    random = np.random.default_rng(0)
    for i in range(CLIPS):
        write_clip(folder / "known" / f"{i:02}.mp4", footage(random), fps=2, codec="mpeg4")
        write_clip(folder / "more" / f"{i:02}.mp4", footage(random), fps=2, codec="mpeg4")
    for i in range(3):
        write_clip(folder / "new" / f"{'odd' if i == 1 else i}.mp4", footage(random, odd=i == 1), fps=2)
    return folder


@pytest.fixture(scope="module")
def fitted(videos):
    """A scorer fitted by the command, and what it printed."""
    return {}


@pytest.fixture
def scorer_file(featnorm, videos, fitted, tmp_path):
    path = videos / "d.featnorm"
    if not path.exists():
        code, fitted["out"], err = featnorm(
            *("fit", videos / "known", "--model", "tiny:make", "--head", "none", "--detector", "KNN(k=1)"),
            *("--fps", 2, "-o", path, "--cache", videos / "cache"),
        )
        assert code == 0, err
    return path


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_few_clips_are_too_few_to_train_a_head_however_many_frames_they_have(videos):
    runtime = fn.Runtime(progress=False)
    scorer = fn.fit(videos / "known", "featnorm:cifar10-resnet18", fps=2, runtime=runtime, cache=videos / "cache")
    assert scorer.head == "none"
    assert repr(scorer.detector) == "KNN(k=1)"
    odd = scorer.predict([np.full((32, 48, 3), (250, 5, 5), np.uint8)])
    assert odd[0].is_id is False


def test_fit_holds_out_whole_clips(featnorm, scorer_file, fitted):
    out = fitted["out"]
    assert f"{CLIPS * FRAMES} frames of {CLIPS} clips in known" in out
    assert (
        "held-out frames of 19 clips. Averaged over such calibration sets, it flags at most 5.0 % of frames" in out
    )
    assert "like these in a new clip, and at most 5.0 % of new clips" in out
    assert "near-duplicates" not in out
    scorer = fn.load(scorer_file, "tiny:make")
    assert isinstance(scorer.calibration, PartCalibration)
    assert len(scorer.calibration.unit_scores) == 19
    assert len(scorer.calibration.scores) == 19 * FRAMES
    assert scorer.facts["frames per second"] == "2"


def test_score_writes_times_and_verdicts_of_frames_and_clips(featnorm, scorer_file, videos, tmp_path):
    command = ("score", scorer_file, videos / "new", "--model", "tiny:make")
    code, out, err = featnorm(*command, "--out", "frames.csv", "--clips", "clips.csv", "--html", "page.html")
    assert code == 0, err
    frames, clips = rows_of(tmp_path / "frames.csv"), rows_of(tmp_path / "clips.csv")
    assert [*frames[0]][-2:] == ["clip", "time"]
    # The rate is that of the fit, not the default.
    assert [float(row["time"]) for row in frames] == [i / 2 for i in range(FRAMES)] * 3
    assert [row["clip"] for row in frames[::FRAMES]] == [
        str(videos / "new" / f"{n}.mp4") for n in ("0", "2", "odd")
    ]
    assert frames[1]["path"] == f"{videos / 'new' / '0.mp4'} at 0.500 s"
    assert [row["verdict"] for row in frames[-FRAMES:]] == ["OOD"] * FRAMES
    odd = clips[0]
    assert (odd["clip"], odd["verdict"]) == (str(videos / "new" / "odd.mp4"), "OOD")
    assert (odd["frames"], odd["flagged"], odd["unreadable"]) == (str(FRAMES), str(FRAMES), "0")
    scorer = fn.load(scorer_file, "tiny:make")
    for clip in clips:
        scores = torch.tensor([float(row["score"]) for row in frames if row["clip"] == clip["clip"]])
        expected = unit_scores(scores, torch.zeros(FRAMES, dtype=torch.int64), 1, 0.25)
        assert float(clip["score"]) == pytest.approx(float(expected[0]), rel=1e-6)
        verdict = scorer.calibration.units.predict(expected)
        assert float(clip["p_value"]) == float(verdict[0])
        assert clip["verdict"] == ("ID" if verdict[1] else "OOD")
    assert "1 of 3 clips flagged as OOD." in out
    assert "odd.mp4  (6 of 6 frames flagged)" in out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "odd.mp4 at 2.500 s" in page
    assert '<th scope="col">Clip</th>' in page


def test_other_formats_of_the_tables_hold_the_same(featnorm, scorer_file, videos, tmp_path):
    for ending in ("csv", "jsonl", "parquet"):
        code, _, err = featnorm(
            *("score", scorer_file, videos / "new", "--model", "tiny:make"),
            *("--out", f"f.{ending}", "--clips", f"c.{ending}"),
        )
        assert code == 0, err
    table, lines = (
        pq.read_table(tmp_path / "f.parquet").to_pylist(),
        (tmp_path / "f.jsonl").read_text().splitlines(),
    )
    assert table == [json.loads(line) for line in lines]
    assert table[1]["time"] == 0.5
    clips = pq.read_table(tmp_path / "c.parquet").to_pylist()
    assert clips == [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert clips[0]["flagged"] == FRAMES


def test_clips_alone_are_printed_or_written(featnorm, scorer_file, videos, tmp_path):
    code, out, _ = featnorm("score", scorer_file, videos / "new" / "odd.mp4", "--model", "tiny:make")
    assert code == 0
    assert "odd.mp4 at 0.000 s" in out
    assert "1 of 1 clip flagged as OOD." in out
    code, _, _ = featnorm("score", scorer_file, videos / "new", "--model", "tiny:make", "--clips", "clips.csv")
    assert code == 0
    assert len(rows_of(tmp_path / "clips.csv")) == 3


def test_a_run_that_was_killed_is_resumed(featnorm, scorer_file, videos, tmp_path, monkeypatch):
    from featnorm.records import Journal

    command = ("score", scorer_file, videos / "new", "--model", "tiny:make", "--batch-size", 4, "--out")
    assert featnorm(*command, "whole.csv", "--clips", "whole-clips.csv")[0] == 0
    add = Journal.add

    def failing(self, number, verdicts):
        if number == 3:
            raise KeyboardInterrupt
        add(self, number, verdicts)

    monkeypatch.setattr(Journal, "add", failing)
    assert featnorm(*command, "part.csv", "--clips", "part-clips.csv")[0] == 130
    monkeypatch.setattr(Journal, "add", add)
    code, out, _ = featnorm(*command, "part.csv", "--clips", "part-clips.csv")
    assert code == 0
    assert "resuming after 12 of 18 frames" in out
    assert (tmp_path / "part.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert (tmp_path / "part-clips.csv").read_bytes() == (tmp_path / "whole-clips.csv").read_bytes()


def test_calibrate_takes_clips_as_units(featnorm, scorer_file, videos, tmp_path):
    command = ("calibrate", scorer_file, videos / "more", "--model", "tiny:make")
    code, out, err = featnorm(*command, "-o", "c.featnorm")
    assert code == 0, err
    assert f"Calibrated on {CLIPS * FRAMES} frames of {CLIPS} clips." in out
    assert "flags at most 5.0 % of in-distribution frames in a new clip, and at most 5.0 % of new clips." in out
    assert len(fn.load(tmp_path / "c.featnorm", "tiny:make").calibration.unit_scores) == CLIPS
    code, out, err = featnorm(*command, "--update", "--fps", 1, "-o", "u.featnorm")
    assert code == 0, err
    assert len(fn.load(tmp_path / "u.featnorm", "tiny:make").calibration.unit_scores) == 19 + CLIPS
    assert "in the calibration already" not in out
    again = ("calibrate", "u.featnorm", videos / "more", "--model", "tiny:make", "--update", "-o", "w.featnorm")
    code, out, err = featnorm(*again)
    assert code == 0, err
    assert (
        "Note: all scores of more were in the calibration already. If these are the same clips, they count" in out
    )
    code, out, err = featnorm("calibrate", tmp_path / "u.featnorm", "--tpr", 0.9, "-o", "t.featnorm")
    assert code == 0, err
    assert (
        "of 45 clips. Averaged over such calibration sets, it flags at most 10.0 % of in-distribution frames"
        in out
    )
    code, _, err = featnorm("calibrate", scorer_file, videos / "new", "--model", "tiny:make", "-o", "n.featnorm")
    assert code != 0
    assert "3 calibration images or clips are too few for tpr=0.95: at least 19 are needed" in err


def test_images_and_clips_calibrate_each_others_scorers(featnorm, scorer_file, videos, tmp_path):
    source = open_source(str(videos / "known"), fps=1)
    (tmp_path / "images").mkdir()
    for i in range(30):
        source.item(i).save(tmp_path / "images" / f"{i}.png")
    command = ("calibrate", scorer_file, "images", "--model", "tiny:make", "-o", "i.featnorm")
    code, out, err = featnorm(*command)
    assert code == 0, err
    assert "Calibrated on 30 images." in out
    code, out, err = featnorm("score", "i.featnorm", videos / "new", "--model", "tiny:make", "--out", "f.csv")
    assert code == 0, err
    assert "There are no verdicts on clips, because the scorer is not calibrated on clips" in out
    code, _, err = featnorm("score", "i.featnorm", videos / "new", "--model", "tiny:make", "--clips", "c.csv")
    assert code != 0
    assert "not calibrated on clips" in err
    code, _, err = featnorm("score", scorer_file, "images", "--model", "tiny:make", "--clips", "c.csv")
    assert code != 0
    assert "images holds images, not videos" in err
    code, out, err = featnorm(
        "calibrate", "i.featnorm", videos / "more", "--model", "tiny:make", "-o", "v.featnorm"
    )
    assert code == 0, err
    assert f"of {CLIPS} clips" in out


def test_what_cannot_be_read_is_counted_by_clip(featnorm, scorer_file, videos, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes((videos / "new" / "0.mp4").read_bytes())
    (tmp_path / "in" / "b.mp4").write_bytes(b"no video")
    (tmp_path / "in" / "notes.txt").write_text("x")
    code, out, err = featnorm(
        *("score", scorer_file, "in", "--model", "tiny:make", "--out", "f.csv", "--clips", "c.csv")
    )
    assert code == 0, err
    assert "read 6 frames; ignored 1 file that is not a video (.txt 1); 1 unreadable" in out
    unread = rows_of(tmp_path / "f.csv")[-1]
    assert unread["path"] == unread["clip"] == "in/b.mp4"
    assert (unread["time"], unread["score"]) == ("", "")
    assert "not a video that can be read" in unread["error"]
    clips = {row["clip"]: row for row in rows_of(tmp_path / "c.csv")}
    assert (clips["in/b.mp4"]["verdict"], clips["in/b.mp4"]["unreadable"]) == ("", "1")
    code, _, err = featnorm("score", scorer_file, "in/b.mp4", "--model", "tiny:make")
    assert code != 0
    assert "none of the 1 frames could be read; the first is in/b.mp4: not a video" in err


def test_too_few_clips_or_frames_are_named(featnorm, videos, tmp_path):
    command = ("fit", videos / "new", "--model", "tiny:make", "--fps", 0)
    code, _, err = featnorm(*command)
    assert code != 0
    assert "new has 3 clips; at least 20 are needed for tpr=0.95, however many frames they have" in err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_bytes((videos / "new" / "0.mp4").read_bytes())
    (tmp_path / "broken" / "b.mp4").write_bytes(b"no video")
    code, _, err = featnorm("fit", "broken", "--model", "tiny:make")
    assert code != 0
    assert "broken has 1 clip; at least 20 are needed" in err
    command = ("fit", videos / "known", "--model", "tiny:make", "--head", "none", "--cache", videos / "cache")
    code, _, err = featnorm(*command)
    assert code != 0
    assert "fewer than 100 readable frames" in err
    assert "(--fps takes more frames)" in err
    code, _, err = featnorm(*command, "--fps", 0, "--thresholds-by", "folder")
    assert code != 0
    assert "frames of a clip are not" in err
