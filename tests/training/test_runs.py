"""The state of a run: a damaged checkpoint or log raises a one-line error, and is not resumed."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from featnorm.paper.systems.base import TrainContext
from featnorm.paper.systems.steps import train_steps
from featnorm.runtime import Runtime
from featnorm.training import Recipe, runs, train
from featnorm.training.runs import CHECKPOINT, LOG, are_finite, log, read_checkpoint, read_log, write_checkpoint

RUN = {"recipe": {"lr": 0.1}, "seed": 0}
RECIPE = Recipe(epochs=3, batch_size=16, optimizer="sgd", lr=0.05)
CPU = torch.device("cpu")


def data():
    return torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2


def model():
    torch.manual_seed(0)
    return nn.Linear(6, 2)


@pytest.fixture
def checkpoint(tmp_path):
    maps = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    write_checkpoint(tmp_path / CHECKPOINT, {"run": RUN, "epoch": 2, "model": {"w": maps, "n": torch.tensor(5)}})
    return tmp_path / CHECKPOINT


def test_a_checkpoint_comes_back_as_it_was(checkpoint):
    saved = read_checkpoint(checkpoint, RUN, CPU)
    assert saved["epoch"] == 2
    # The memory layout too, because the next step rounds differently in another one.
    assert saved["model"]["w"].is_contiguous(memory_format=torch.channels_last)
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 2


def test_a_flipped_bit_anywhere_is_refused(checkpoint):
    good = checkpoint.read_bytes()
    for place in range(len(good)):
        checkpoint.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        with pytest.raises(
            ValueError, match=r"checkpoint\.pt is damaged, .*: delete it to train from the beginning$"
        ):
            read_checkpoint(checkpoint, RUN, CPU)


@pytest.mark.parametrize("content", [b"", b"no checkpoint\n", b"PK\x03\x04", 200 * b"text\n"])
def test_what_is_no_checkpoint_is_refused(checkpoint, content):
    good = checkpoint.read_bytes()
    for wrong in (content, good[:-1], good[:-80], good[: len(good) // 2], good + b"\n", content + good):
        if wrong != good:
            checkpoint.write_bytes(wrong)
            with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
                read_checkpoint(checkpoint, RUN, CPU)


def test_training_never_resumes_from_a_damaged_checkpoint(tmp_path):
    train(model(), *data(), replace(RECIPE, epochs=1), folder=tmp_path)
    content = bytearray((tmp_path / CHECKPOINT).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / CHECKPOINT).write_bytes(content)
    untrained = model()
    with pytest.raises(ValueError, match="is damaged"):
        train(untrained, *data(), replace(RECIPE, epochs=1), folder=tmp_path)
    assert torch.equal(untrained.weight, model().weight)
    # The advice in the message works.
    (tmp_path / CHECKPOINT).unlink()
    again = train(model(), *data(), RECIPE, folder=tmp_path)
    assert torch.equal(again.weight, train(model(), *data(), RECIPE).weight)
    assert [entry["epoch"] for entry in read_log(tmp_path / LOG)] == [1, 2, 3]


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_log_lacks_no_epoch_wherever_a_run_is_killed(tmp_path, monkeypatch, epoch, when):
    def die(path, state):
        if when == "after" or state["epoch"] != epoch:
            write_checkpoint(path, state)
        if state["epoch"] == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            train(model(), *data(), RECIPE, folder=tmp_path)
    train(model(), *data(), RECIPE, folder=tmp_path)
    assert [entry["epoch"] for entry in read_log(tmp_path / LOG)] == [1, 2, 3]


def test_a_damaged_log_is_named_with_its_line(tmp_path):
    for epoch in (1, 2, 3):
        log(tmp_path / LOG, {"epoch": epoch, "loss": 1 / epoch})
    good = (tmp_path / LOG).read_text()
    for old, new in (("0.5", "0.6"), ('"epoch": 2', '"epoch": 1'), (good.splitlines()[1], "null")):
        (tmp_path / LOG).write_text(good.replace(old, new, 1))
        for use in (read_log, lambda file: log(file, {"epoch": 4})):
            with pytest.raises(ValueError, match=rf"line 2 of .*{LOG} is damaged.*: delete the folder"):
                use(tmp_path / LOG)
    (tmp_path / LOG).write_text(good)
    log(tmp_path / LOG, {"epoch": 2, "loss": 0.25})
    assert read_log(tmp_path / LOG) == [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.25}]
    assert json.loads((tmp_path / LOG).read_text().splitlines()[1])["loss"] == 0.25


def fit_small(folder):
    """Train for one more epoch than the checkpoint has, and return the epochs that were trained."""
    trained = []
    train(model(), *data(), RECIPE, folder=folder, on_epoch=lambda entry, _: trained.append(entry["epoch"]))
    return trained


def fit_steps(folder):
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    system = nn.Sequential(nn.Conv2d(3, 1, 32), nn.Flatten())
    trained = []

    def step(parts, pixels, epoch):
        trained.append(epoch + 1)
        yield "one", parts["1"](parts["0"](pixels)).square().mean()

    optimizers = {"one": torch.optim.SGD(system.parameters(), lr=0.01)}
    context = TrainContext(folder, Runtime(), seed=0)
    train_steps(system, images, step, optimizers, {"epochs": 3, "batch_size": 8}, context)
    return trained


@pytest.mark.parametrize("fit", [fit_small, fit_steps])
@pytest.mark.parametrize("what", ["damaged", "missing", "empty", "cut", "a folder"])
def test_a_log_that_does_not_fit_the_checkpoint_costs_no_epoch(tmp_path, monkeypatch, fit, what):
    def die(path, state):
        write_checkpoint(path, state)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "write_checkpoint", die)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path)
    monkeypatch.undo()
    file, before = tmp_path / LOG, (tmp_path / CHECKPOINT).read_bytes()
    good = file.read_bytes()
    file.unlink()
    if what == "a folder":
        file.mkdir()
    elif what != "missing":
        first = good.splitlines(keepends=True)[0]
        file.write_bytes({"damaged": good.replace(b"0", b"1", 1), "empty": b"", "cut": first}[what])
    said = {"damaged": "line 1 of .* is damaged", "a folder": "is a folder, but must be a file"}.get(
        what,
        f"has no line for epoch {2 if what == 'cut' else 1}, but checkpoint.pt next to it is of epoch 2: restore",
    )
    with pytest.raises(ValueError, match=said):
        fit(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    if what == "a folder":
        file.rmdir()
    file.write_bytes(good)
    assert fit(tmp_path) == [3]


def test_a_damaged_log_without_a_checkpoint_costs_no_epoch(tmp_path):
    (tmp_path / LOG).write_text("no log\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is damaged"):
        fit_small(tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_folder_in_the_place_of_a_checkpoint_is_named(tmp_path):
    (tmp_path / CHECKPOINT).mkdir()
    with pytest.raises(ValueError, match=r"checkpoint\.pt is a folder, but must be a file"):
        fit_small(tmp_path)


def test_a_buffer_that_is_expanded_resumes(tmp_path):
    class Expanded(nn.Linear):
        def __init__(self):
            super().__init__(6, 2)
            self.register_buffer("scale", torch.ones(1).expand(6))

        def forward(self, x):
            return super().forward(x * self.scale)

    train(Expanded(), *data(), replace(RECIPE, epochs=1), folder=tmp_path)
    resumed = train(Expanded(), *data(), replace(RECIPE, epochs=1), folder=tmp_path)
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)["model"]
    assert torch.equal(resumed.weight, saved["weight"])


def test_values_whose_sum_is_not_finite_can_be_finite():
    largest = torch.finfo(torch.float32).max
    assert are_finite([torch.full((3, 2), largest), torch.zeros(0), torch.tensor(3)])
    for bad in ([1.0, float("nan")], [largest, float("inf")], [float("inf"), -float("inf")]):
        assert not are_finite([torch.zeros(2), torch.tensor(bad)])
