"""An image scorer's file: opened wherever it was written, and refused when it is opened or not at all."""

import pytest
import torch

import featnorm as fn
from featnorm import archive
from featnorm._utils.weights import single_precision
from featnorm.cli.monitor import monitor
from featnorm.image_scorer import ImageScorer
from featnorm.inputs import open_source
from featnorm.models import ModelError, create_model
from mutations import mutated

MODEL = "tiny:make"


def fitted(folder, cache, detector, spec=MODEL):
    source = open_source(str(folder))
    options = {"cache": cache, "runtime": fn.Runtime(progress=False, workers=0)}
    return fn.fit_images(source, create_model(spec), detector=fn.parse_detector(detector), **options).scorer


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Do not wait for the disk, where thousands of files are written."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="module")
def file(folder, cache, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "d.featnorm"
    fitted(folder, cache, "KNN(k=3) / NAN()").save(path)
    return path


def pictures(n=3):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def test_a_model_with_an_expanded_buffer_is_saved_and_opened(folder, cache, file):
    assert create_model(MODEL).model.scale.stride() == (0,)
    made, opened = fitted(folder, cache, "KNN(k=3) / NAN()"), ImageScorer.load(file, model=MODEL)
    for one, other in zip(made.scorer(pictures()), opened.scorer(pictures()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("spec", [MODEL, "timm:test_resnet"])
def test_a_file_opens_under_another_default_type(folder, cache, tmp_path, spec, monkeypatch):
    own = {"model": spec} if spec == MODEL else {}
    if not own:
        # Without a download: random weights are saved, too.
        loaded = create_model(spec, pretrained=False)
        monkeypatch.setattr(f"{__name__}.create_model", lambda _: loaded)
    with single_precision():
        torch.set_default_dtype(torch.float64)
        scorer = fitted(f"{folder}[:120]", cache, "KNN(k=3) / NAN()", spec)
        scorer.save(tmp_path / "d.featnorm")
        for default in (torch.float32, torch.float64):
            torch.set_default_dtype(default)
            again = ImageScorer.load(tmp_path / "d.featnorm", **own)
            images = torch.rand(3, *again.input_size, generator=torch.Generator().manual_seed(0)).float()
            assert again.predict_batch(images, "abc") == scorer.predict_batch(images, "abc")


def usable(path):
    """Open a file and use all that there is in it."""
    scorer = ImageScorer.load(path, model=MODEL)
    judged = scorer.predict_batch(pictures(), "abc", explain=[0, 1, 2])
    for verdict in judged:
        assert (verdict.predicted is None) == (scorer.class_names is None)
        assert verdict.why.sentence
    assert scorer.scorer.tap.describe()
    assert all(isinstance(text, str) for pair in scorer.facts.items() for text in pair)


def opens(use, what):
    """Tell whether a file is used without an error; one is a line that says that the file is at fault."""
    try:
        use()
    except (archive.ArchiveError, ModelError) as error:
        words = str(error)
    except BaseException as error:
        error.add_note(what)
        raise
    else:
        return True
    assert "\n" not in words, what
    return False


def test_whatever_a_header_says_a_file_is_refused_or_works(file, tmp_path):
    tensors, header = archive.read(file)
    path = tmp_path / "d.featnorm"
    opened = []
    for what, changed in mutated(header):
        archive.write(path, tensors, changed)
        opened.append(opens(lambda: usable(path), what))
    # What is read by people alone may be anything.
    assert 0 < sum(opened) < 0.2 * len(opened)


def test_whatever_a_header_says_monitor_refuses_or_reads_it(file, tmp_path):
    tensors, header = archive.read(file)
    path = tmp_path / "d.featnorm"
    lowest = 1 / (len(tensors[archive.CALIBRATION]) + 1)
    (tmp_path / "t.csv").write_text(f"path,score,p_value\na,-inf,{lowest}\n")
    for what, changed in mutated({"tpr": header["tpr"], "model": header["model"]}):
        archive.write(path, tensors, changed)
        opens(lambda: monitor(path, tmp_path / "t.csv"), what)


def test_whatever_a_tensor_is_a_file_is_refused_or_works(file, tmp_path):
    tensors, header = archive.read(file)
    path = tmp_path / "d.featnorm"
    for name, tensor in tensors.items():
        for what, changed in changes(tensor).items():
            others = {key: value for key, value in tensors.items() if key != name}
            archive.write(path, others if changed is None else {**others, name: changed}, header)
            opens(lambda: usable(path), f"{name}: {what}")


def changes(tensor):
    made = {
        "none": None,
        "empty": tensor.new_empty(0, *tensor.shape[1:]),
        "one more dimension": tensor[None],
        "flat": tensor.reshape(-1),
        "as integers": tensor.to(torch.int64),
        "as booleans": tensor.bool(),
        "in half precision": tensor.half(),
        "negative": -tensor,
        "huge": torch.full_like(tensor, torch.finfo(torch.float16).max),
    }
    if tensor.is_floating_point():
        made["NaN"] = tensor * float("nan")
        made["infinite"] = torch.full_like(tensor, float("inf"))
    return made
