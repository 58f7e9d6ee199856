"""Scores of a source, in the library: written, resumed, counted."""

import copy
import csv

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import featnorm as fn
from featnorm.inputs import SlicedSource, open_source
from featnorm.records import COLUMNS, Journal, read_scores
from featnorm.scoring import calibrate_source, folder_of

RUNTIME = fn.Runtime(batch_size=4, workers=0, progress=False)


@pytest.fixture
def source(folder):
    return SlicedSource(open_source(str(folder)), range(18), "eighteen")


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_an_interrupted_run_is_resumed_and_ends_as_a_whole_one(scorer, source, tmp_path):
    whole = fn.score_source(scorer, source, tmp_path / "whole.csv", runtime=RUNTIME)
    assert (len(whole.scores), whole.unread, whole.computed) == (17, 1, 18)
    assert 0 < whole.model_seconds < whole.seconds

    def stop(verdicts):
        if verdicts[0].item == source.name(8):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fn.score_source(scorer, source, tmp_path / "t.csv", runtime=RUNTIME, on_batch=stop)
    opened = []
    resumed = fn.score_source(scorer, source, tmp_path / "t.csv", runtime=RUNTIME, on_start=opened.append)
    assert [(journal.done, journal.restarted) for journal in opened] == [(12, False)]
    assert resumed.computed == 6
    assert resumed.scores == whole.scores
    assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sorted(place.name for place in tmp_path.iterdir()) == ["t.csv", "whole.csv"]
    scores = [float(row["score"]) for row in rows_of(tmp_path / "t.csv") if row["score"]]
    assert scores == list(whole.scores)
    assert [verdict.score for _, verdict in whole.lowest] == sorted(scores)


def test_a_scorer_that_has_not_run_yet_scores_to_a_file(scorer, source, tmp_path):
    new = fn.Scorer(scorer.model, fn.MSP(), preprocess=scorer.preprocess)
    fn.score_source(new, source, tmp_path / "t.csv", runtime=RUNTIME)
    assert len(rows_of(tmp_path / "t.csv")) == 18


@pytest.mark.parametrize("other", ["scorer", "made_with", "precision"])
def test_a_run_of_something_else_starts_over(scorer, source, tmp_path, monkeypatch, other):
    def keep(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", keep)
        with pytest.raises(KeyboardInterrupt):
            fn.score_source(scorer, source, tmp_path / "t.csv", runtime=RUNTIME)
    options = {"runtime": RUNTIME}
    if other == "scorer":
        scorer.classes = ["other", *scorer.classes[1:]]
    elif other == "made_with":
        options["made_with"] = {"transform": 2}
    else:
        options["runtime"] = fn.Runtime(precision="bf16-mixed", batch_size=4, workers=0, progress=False)
    opened = []
    summary = fn.score_source(scorer, source, tmp_path / "t.csv", on_start=opened.append, **options)
    assert (opened[0].done, opened[0].restarted, summary.computed) == (0, True, 18)


@pytest.mark.parametrize(
    ("item", "folder"),
    [
        ("photos/a/1.png", "photos/a"),
        ("/1.png", ""),
        ("1.png", ""),
        ("row 5", ""),
        ("train-0.parquet row 12", "train-0.parquet"),
        ("textures: row 3", "textures"),
        ("textures: a/b.png", "textures: a"),
        ("mnist:test image 7", "mnist:test"),
        ("s3://bucket/x/y.jpg", "s3://bucket/x"),
    ],
)
def test_the_folder_of_an_item(item, folder):
    assert folder_of(item) == folder


def test_images_are_counted_by_folder(scorer, source):
    summary = fn.score_source(scorer, source, runtime=RUNTIME)
    assert {name.rpartition("/")[2]: scored for name, (scored, _) in summary.folders.items()} == {"a": 17}
    assert sum(flagged for _, flagged in summary.folders.values()) == summary.flagged


def test_a_page_shows_why(scorer, source, tmp_path):
    """Similar images and a heat map; without statistics and examples, the image and its score alone."""
    fn.score_source(scorer, source, page=tmp_path / "p.html", runtime=RUNTIME)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    cards = page.count('<p class="name">')
    assert 5 <= cards <= 17
    assert page.count("Heat map of ") == cards
    assert page.count("similar image, a") > cards
    scorer.statistics = scorer.examples = None
    fn.score_source(scorer, source, page=tmp_path / "p.html", runtime=RUNTIME)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.count('<p class="name">') == page.count("<image ") == cards


def test_without_a_file_the_verdicts_come_in_order(scorer, source, tmp_path):
    names = []
    hooks = dict(scorer.model._forward_hooks)
    summary = fn.score_source(
        scorer, source, runtime=RUNTIME, on_batch=lambda verdicts: names.extend(v.item for v in verdicts)
    )
    assert names == [source.name(i) for i in range(18)]
    assert str(summary).startswith(f"{summary.flagged} of 17 images flagged as OOD (")
    assert dict(scorer.model._forward_hooks) == hooks


def test_what_is_refused_before_the_work(scorer, source, tmp_path):
    with pytest.raises(ValueError, match=r"t\.xlsx must end in \.csv, \.jsonl or \.parquet"):
        fn.score_source(scorer, source, tmp_path / "t.xlsx")
    with pytest.raises(ValueError, match=r"t\.txt must end in \.html"):
        fn.score_source(scorer, source, page=tmp_path / "t.txt")
    scorer.calibration = None
    with pytest.raises(ValueError, match="not calibrated"):
        fn.score_source(scorer, source, page=tmp_path / "t.html")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def of_positions(folder):
    """A scorer of positions, and 18 of the images, of which one is broken."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Conv2d(8, 4, 1))
    to_tensor = v2.Compose([v2.Resize((32, 24)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    scorer = fn.Scorer(net, fn.NAN(), per="position", preprocess=to_tensor)
    pictures = open_source(str(folder))
    calibrate_source(scorer, SlicedSource(pictures, range(30, 60), "thirty"), 0.8, runtime=RUNTIME)
    return scorer, SlicedSource(pictures, range(18), "eighteen")


def test_images_are_the_rows_and_the_units_of_positions(of_positions, tmp_path):
    scorer, source = of_positions
    assert len(scorer.calibration.unit_scores) == 30
    assert len(scorer.calibration.scores) == 30 * 48
    summary = fn.score_source(scorer, source, tmp_path / "t.csv", maps=tmp_path / "maps", runtime=RUNTIME)
    rows = rows_of(tmp_path / "t.csv")
    assert list(rows[0]) == [*COLUMNS, "flagged_share"]
    found = scorer.predict([source.item(i) for i in range(1, 4)])
    for row, verdict in zip(rows[1:4], found, strict=True):
        assert float(row["score"]) == pytest.approx(verdict.score, rel=1e-5)
        assert float(row["flagged_share"]) == pytest.approx(verdict.flagged_share, abs=1e-6)
    assert (rows[0]["error"] != "", rows[0]["flagged_share"]) == (True, "")
    assert (len(summary.scores), summary.unread) == (17, 1)
    drawn = sorted(file.name for file in (tmp_path / "maps").iterdir())
    assert len(drawn) == 17
    assert drawn[0] == "000001-004.png"
    assert Image.open(tmp_path / "maps" / drawn[0]).size[0] == 2 * 288 + 12
    for suffix in (".jsonl", ".parquet"):
        fn.score_source(scorer, source, tmp_path / f"t{suffix}", runtime=RUNTIME)
        again = [row.score for row in read_scores(tmp_path / f"t{suffix}")]
        assert again == [row.score for row in read_scores(tmp_path / "t.csv")]


def test_an_interrupted_run_leaves_no_map_out(of_positions, tmp_path):
    scorer, source = of_positions

    def stop(verdicts):
        if verdicts[0].item == source.name(8):
            raise KeyboardInterrupt

    options = {"maps": tmp_path / "maps", "runtime": RUNTIME}
    with pytest.raises(KeyboardInterrupt):
        fn.score_source(scorer, source, tmp_path / "t.csv", on_batch=stop, **options)
    assert len(list((tmp_path / "maps").iterdir())) == 11
    assert fn.score_source(scorer, source, tmp_path / "t.csv", **options).computed == 6
    assert len(list((tmp_path / "maps").iterdir())) == 17


def test_the_page_shows_the_maps(of_positions, tmp_path):
    scorer, source = of_positions
    fn.score_source(scorer, source, page=tmp_path / "p.html", runtime=RUNTIME)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.count("Map of p-values of ") == page.count('<p class="name">') > 0
    assert "The second picture is the map of p-values" in page


def test_an_earlier_calibration_of_positions_is_updated(of_positions):
    scorer, source = of_positions
    scorer = copy.deepcopy(scorer)
    calibrate_source(scorer, source, update=True, runtime=RUNTIME)
    assert len(scorer.calibration.unit_scores) == 47


def test_maps_need_verdicts_per_position(scorer, source, tmp_path):
    with pytest.raises(ValueError, match="scores whole inputs, so there are no maps: fit with --per position"):
        fn.score_source(scorer, source, maps=tmp_path / "maps")
    assert not list(tmp_path.iterdir())
