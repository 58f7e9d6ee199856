"""How errors are reported: whose code raised them, where, on which input, and the exit status."""

import errno
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import featnorm as library
from featnorm.__main__ import main
from featnorm.inputs.loading import TransformError
from featnorm.models import ModelError, create_model
from featnorm.models.loading import UserModelError

HINT = " (rerun with --debug for the traceback)\n"
MINE = """
import sys
import threading
from pathlib import Path

import torch
from torch import nn
from torchvision.transforms.functional import to_tensor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        features = self.body(x).relu().mean((2, 3))
        if Path("broken").exists():
            raise KeyError("gate")
        return self.head(features)


class Features(Net):
    def forward(self, x):
        if len(x) > 2 and Path("broken").exists():
            x = x.flatten(1)
        return self.body(x).relu().mean((2, 3))


def make():
    torch.manual_seed(0)
    return Net(), to_tensor


def features():
    torch.manual_seed(0)
    return Features(), to_tensor


class Leaving(Features):
    def forward(self, x):
        if Path("broken").exists():
            sys.exit(3)
        return super().forward(x)


def leaving():
    return Leaving(), to_tensor


def misfit():
    nn.Linear(2, 2).load_state_dict(nn.Linear(3, 2).state_dict())


def leave():
    sys.exit(3)


def leaving_transform():
    return Net(), lambda image: to_tensor(image) if image.size == (256, 256) else sys.exit(3)


def of_library_parts():
    return nn.Sequential(nn.Flatten(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), to_tensor


def crop(image):
    if image.size == (7, 8):
        raise ZeroDivisionError("no room")
    return to_tensor(image)


def cropping():
    return Net(), crop


def locked():
    net = Features()
    net.lock = threading.Lock()
    return net, to_tensor


def failing():
    raise LookupError("no weights")


def failing_transform():
    return Net(), lambda image: 1 / 0
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own in the working directory."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.fixture
def demo(featnorm, monkeypatch):
    """Run `featnorm demo` with other work than its own."""

    def run(work, *arguments):
        module = types.ModuleType("featnorm.cli.demo")
        module.demo = lambda: work()
        monkeypatch.setitem(sys.modules, "featnorm.cli.demo", module)
        return featnorm("demo", *arguments)

    return run


def place(function, text):
    line = [line.strip() for line in MINE.splitlines()].index(text) + 1
    return f"mine:{function} (mine.py:{line})"


def pictures(folder, n, seed=0, size=(8, 8)):
    random = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(n):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return folder


def raises(error):
    def work():
        raise error

    return work


class TestUsersCode:
    def test_inspect_takes_a_model_of_the_users_own(self, featnorm, mine):
        status, printed, _ = featnorm("inspect", "--model", "mine:make")
        assert status == 0
        assert "Last hidden layer: 8 units" in printed

    def test_inspect_takes_a_model_that_comes_with_featnorm(self, featnorm):
        status, printed, _ = featnorm("inspect", "--model", "featnorm:cifar10-resnet18")
        assert status == 0
        assert "Last hidden layer: 512 units" in printed

    def test_a_forward_pass_by_its_place_and_input(self, featnorm, mine):
        (mine / "broken").touch()
        there = place("Net.forward", 'raise KeyError("gate")')
        said = f"featnorm: the model of mine:make raised KeyError: 'gate', at {there}, on "
        noise = f"{said}noise of shape (2, 3, 256, 256){HINT}"
        assert featnorm("inspect", "--model", "mine:make") == (2, "", noise)
        known, other = pictures(mine / "known", 5), pictures(mine / "other", 5, 1)
        options = ["--model", "mine:make", "--id", known, "--ood", other, "--batch-size", 4, "--detector", "NAN"]
        batch = f"a batch of 4 images, {known / '000.png'} to {known / '003.png'}"
        assert featnorm("evaluate", *options) == (2, "", f"{said}{batch}{HINT}")

    def test_a_forward_pass_of_library_parts(self, featnorm, mine):
        status, _, error = featnorm("inspect", "--model", "mine:of_library_parts")
        assert status == 2
        assert error.startswith("featnorm: the model of mine:of_library_parts raised RuntimeError: mat1 and mat2")
        file = Path("torch", "nn", "modules", "linear.py")
        assert f", at torch.nn.modules.linear:Linear.forward ({file}:" in error
        assert error.endswith(f"on noise of shape (2, 3, 256, 256){HINT}")
        assert error.count("\n") == 1

    def test_a_model_of_a_library_is_not_the_users(self, featnorm, monkeypatch):
        def forward(self, x):
            raise KeyError("gate")

        monkeypatch.setattr("timm.models.byobnet.ByobNet.forward", forward)
        monkeypatch.setattr("timm.models.resnet.ResNet.forward", forward)
        status, _, error = featnorm("inspect", "--model", "timm:test_resnet")
        assert status == 1
        assert "Traceback" in error

    def test_fit_and_score_name_the_batch(self, featnorm, mine):
        photos = pictures(mine / "photos", 120)
        fit = ["fit", photos, "--model", "mine:features", "--cache", "cache", "--batch-size", 50, "--workers", 0]
        (mine / "broken").touch()
        status, _, error = featnorm(*fit)
        assert status == 2
        there = place("Features.forward", "return self.body(x).relu().mean((2, 3))")
        assert error.startswith("featnorm: the model of mine:features raised RuntimeError: ")
        batch = f"on a batch of 8 images, {photos / '000.png'} to {photos / '007.png'}"
        assert error.endswith(f", at {there}, {batch}{HINT}")
        status, _, error = featnorm(*fit, "--head", "train")
        assert status == 2
        batch = f"on a batch of 50 images, {photos / '000.png'} to {photos / '049.png'}"
        assert error.endswith(f", at {there}, {batch}{HINT}")
        (mine / "broken").unlink()
        assert featnorm(*fit)[0] == 0
        (mine / "broken").touch()
        score = ["score", "detector.featnorm", f"{photos}[:40]", "--model", "mine:features"]
        status, _, error = featnorm(*score, "--batch-size", 30)
        assert status == 2
        batch = f"on a batch of 30 images, {photos / '000.png'} to {photos / '029.png'}"
        assert error.endswith(f", at {there}, {batch}{HINT}")
        scorer = library.load("detector.featnorm", "mine:features")
        with pytest.raises(UserModelError, match=r"on a batch of 3 images, a to c$") as caught:
            scorer.predict_batch(torch.zeros(3, 3, 8, 8), ["a", "b", "c"])
        assert isinstance(caught.value.__cause__, RuntimeError)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_transform_by_its_place_and_image(self, featnorm, mine, workers):
        known, other = pictures(mine / "known", 3), pictures(mine / "other", 3, 1)
        odd = pictures(mine / "known" / "odd", 1, 2, (8, 7)) / "000.png"
        options = ["--model", "mine:cropping", "--id", known, "--ood", other, "--workers", workers]
        there = place("crop", 'raise ZeroDivisionError("no room")')
        said = f"the transform failed on {odd} (ZeroDivisionError: no room), at {there}"
        assert featnorm("evaluate", *options, "--batch-size", 1) == (2, "", f"featnorm: {said}{HINT}")
        status, _, error = featnorm("evaluate", *options, "--batch-size", 1, "--debug")
        assert status == 2
        assert "in crop\n" in error
        assert error.endswith(f"\nfeatnorm: {said}\n")

    def test_a_function_and_a_transform_that_never_work(self, mine, monkeypatch):
        monkeypatch.chdir(mine)
        for spec, words in {
            "mine:failing": r"mine:failing\(\) raised LookupError: no weights, at mine:failing \(mine\.py:\d+\)$",
            "mine:failing_transform": r"the transform of mine:failing_transform raised ZeroDivisionError: "
            r"division by zero, at mine:failing_transform\.<locals>\.<lambda> \(mine\.py:\d+\), on a black image",
            "mine:misfit": r"mine:misfit\(\) raised RuntimeError: Error\(s\) in loading state_dict for Linear: "
            r"size mismatch for weight: .*, at mine:misfit \(mine\.py:\d+\)$",
            "math:sqrt": r"math:sqrt\(\) raised TypeError: math\.sqrt\(\) takes exactly one argument \(0 given\)$",
        }.items():
            with pytest.raises(UserModelError, match=words):
                create_model(spec)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_an_exit_is_an_error_like_any_other(self, featnorm, mine, workers):
        status, printed, error = featnorm("inspect", "--model", "mine:leave")
        there = place("leave", "sys.exit(3)").partition(":")[0]
        assert (status, printed) == (2, "")
        assert error.startswith(f"featnorm: mine:leave() raised SystemExit: 3, at {there}:leave (mine.py:")
        known, other = pictures(mine / "known", 2), pictures(mine / "other", 2, 1)
        images = ["--id", known, "--ood", other, "--workers", workers]
        status, _, error = featnorm("evaluate", "--model", "mine:leaving_transform", *images)
        assert status == 2
        assert error.startswith(f"featnorm: the transform failed on {known / '000.png'} (SystemExit: 3), at mine:")
        (mine / "broken").touch()
        status, _, error = featnorm("evaluate", "--model", "mine:leaving", *images)
        assert status == 2
        assert error.startswith(
            "featnorm: the model of mine:leaving raised SystemExit: 3, at mine:Leaving.forward"
        )
        (mine / "ending.py").write_text("import sys\nsys.exit()\n")
        status, _, error = featnorm("inspect", "--model", "ending:make")
        assert status == 2
        assert error.startswith("featnorm: importing ending raised SystemExit, at ending:<module> (ending.py:2)")

    def test_a_model_that_cannot_be_copied(self, featnorm, mine):
        photos = pictures(mine / "photos", 2)
        status, _, error = featnorm("fit", photos, "--model", "mine:locked")
        assert status == 2
        assert (
            "the model of mine:locked cannot be copied without its classifier (TypeError: cannot pickle" in error
        )

    def test_a_module_that_cannot_be_imported(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        (tmp_path / "needing.py").write_text("import torch\nimport no_such_module\n")
        (tmp_path / "unfinished.py").write_text("import torch\ndef make(:\n")
        words = (
            r"importing needing raised ModuleNotFoundError: No module named 'no_such_module', at needing:<module> "
        )
        with pytest.raises(UserModelError, match=words + r"\(needing\.py:2\)"):
            create_model("needing:make")
        with pytest.raises(
            UserModelError, match=r"importing unfinished raised SyntaxError: .*, at unfinished\.py:2"
        ):
            create_model("unfinished:make")
        with pytest.raises(ModelError, match="cannot import nothing_here:make"):
            create_model("nothing_here:make")

    def test_a_batch_of_the_users_loader_is_named(self):
        class Net(torch.nn.Module):
            def forward(self, x):
                return x if x.sum() > 0 else x[:, 7]

        scorer = library.Scorer(torch.nn.Sequential(Net(), torch.nn.Linear(3, 2)), library.MSP())
        batches = [torch.ones(20, 3), torch.ones(20, 3), -torch.ones(20, 3)]
        with pytest.raises(IndexError) as caught:
            scorer.calibrate(batches)
        assert caught.value.__notes__ == ["(on batch 2 of the loader, counted from 0)"]


class TestStatus:
    @pytest.mark.parametrize(
        "error",
        [
            KeyError("x"),
            RuntimeError("boom"),
            NotImplementedError(),
            AssertionError(),
            IndexError("x"),
            AttributeError("x"),
            RecursionError("x"),
            EOFError(),
            ImportError("cannot import name 'x'", name="featnorm.scorer"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_an_internal_error(self, demo, error):
        status, _, said = demo(raises(error))
        assert status == 1
        assert said.startswith("Traceback (most recent call last):\n")
        last = said.splitlines()[-1]
        assert last.startswith(
            f"featnorm: internal error, {type(error).__name__}. Please report it to the maintainers"
        )
        assert f"featnorm {library.__version__}, Python 3." in last
        assert f"torch {torch.__version__}." in last

    @pytest.mark.parametrize(
        "slip",
        [
            lambda: [1, 2, 3].index(4),
            lambda: dict([1]),
            lambda: json.loads("{"),
            lambda: torch.zeros(2) + torch.zeros(3),
            lambda: np.zeros(2) + np.zeros(3),
            lambda: list(zip([1], [], strict=True)),
        ],
        ids=["index", "dict", "json", "torch", "numpy", "zip"],
    )
    def test_a_slip_that_happens_to_be_a_value_error_is_internal(self, demo, slip):
        status, _, said = demo(slip)
        assert status == 1
        assert "Traceback" in said

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (ValueError("tpr must be in (0, 1)\nand more"), "tpr must be in (0, 1) and more"),
            (TypeError("takes Features"), "takes Features"),
            (library.NotFittedError("call fit"), "call fit"),
            (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.csv"), "x.csv"),
            (OSError(errno.ENOSPC, "No space left on device", "d.featnorm"), "d.featnorm"),
            (ImportError("this needs timm: pip install 'featnorm[images]'", name="timm"), "this needs timm"),
            (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory.): lower --batch-size"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "lower --batch-size"),
            (MemoryError(), "out of memory"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
    )
    def test_a_refusal_is_one_line(self, demo, error, words):
        status, _, said = demo(raises(error))
        assert status == 2
        assert said.startswith("featnorm: ")
        assert words in said
        assert said.count("\n") == 1
        assert "--debug" not in said

    def test_debug_shows_the_traceback_of_a_refusal_wherever_it_stands(self, featnorm, demo):
        line = "featnorm: no\n"
        for found in (demo(raises(ValueError("no")), "--debug"), featnorm("--debug", "demo")):
            status, _, said = found
            assert status == 2
            assert said.startswith("Traceback (most recent call last):\n")
            assert "in work\n" in said
            assert said.endswith(line)
        assert featnorm("demo") == (2, "", line)
        assert featnorm("--debug", "demo", "--help")[0] == 0

    def test_what_follows_two_dashes_is_no_option(self, monkeypatch, featnorm, demo):
        """A file may be called --debug."""
        given = []
        monkeypatch.setattr("featnorm.cli.app.run_command", lambda arguments, commands: given.extend(arguments))
        monkeypatch.setattr(
            sys, "argv", ["featnorm", "score", "d", "--debug", "--", "a.jpg", "--debug", "--", "b"]
        )
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        assert given == ["--debug", "score", "d", "--", "a.jpg", "--debug", "--", "b"]

    @pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["inspect", "--model", "mine:make"]])
    def test_an_output_that_nobody_reads_any_more(self, mine, arguments):
        code = f"import sys\nsys.argv = ['featnorm', *{arguments}]\nfrom featnorm.__main__ import main\nmain()"
        read, write = os.pipe()
        os.close(read)
        with open(write, "wb") as unread:
            ended = subprocess.run([sys.executable, "-c", code], stdout=unread, stderr=subprocess.PIPE, cwd=mine)
        assert (ended.returncode, ended.stderr) == (141, b"")

    def test_a_wrong_call(self, featnorm):
        seeds = (["demo", "--seed", "x"], ["demo", "--seed", "-1"], ["demo", "--seed", 2**70])
        for wrong in (["demo", "--no-such-option"], ["no-such-command"], ["fit"], *seeds):
            status, _, said = featnorm(*wrong)
            assert status == 2
            assert re.fullmatch(r"featnorm: .+[.?] See featnorm( demo| fit)? --help\n", said)

    def test_help_states_the_statuses(self, featnorm, monkeypatch):
        monkeypatch.setenv("COLUMNS", "400")
        status, printed, _ = featnorm("--help")
        assert status == 0
        assert "Exit status: 0 success, 1 internal error in featnorm" in printed
        assert "--debug" in printed

    def test_an_error_of_another_process(self, mine):
        """Its traceback stayed there: it is a refusal by its type alone."""
        from featnorm.cli.faults import report

        assert report(TransformError("the transform failed on x"), debug=False) == 2
