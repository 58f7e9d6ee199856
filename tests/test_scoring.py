"""Scores of a source, in the library: written, resumed, counted."""

import csv

import pytest

import featnorm as fn
from featnorm.inputs import SlicedSource, open_source
from featnorm.records import Journal
from featnorm.scoring import folder_of

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
