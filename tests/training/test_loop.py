"""The training loop: it learns, resumes to the same weights, and does on two processes what it does on one."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from featnorm.training import MLP, PRESETS, CifarResNet18, ProjectionHead, Recipe, augment, scheme_labels, train

RECIPE = Recipe(epochs=4, batch_size=16, optimiser="sgd", lr=0.05, augment=True)


def data(n=96, classes=3, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % classes
    images = torch.randint(0, 100, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    for c in range(classes):
        images[targets == c, c] += 120
    return images, targets


def network(seed=0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(CifarResNet18(4), ProjectionHead(32, classes, embedding=16))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_it_learns():
    images, targets = data()
    entries = []
    model = train(network(), images, targets, RECIPE, on_epoch=lambda entry, _: entries.append(entry))
    assert not model.training
    assert entries[-1]["loss"] < entries[0]["loss"]
    assert entries[-1]["accuracy"] > 0.9
    assert entries[-1]["lr"] == pytest.approx(0, abs=1e-9)


def test_seed_alone_decides():
    images, targets = data()
    first = weights(train(network(), images, targets, RECIPE, seed=1))
    torch.rand(5)
    assert_same(first, weights(train(network(), images, targets, RECIPE, seed=1)))
    other = weights(train(network(), images, targets, RECIPE, seed=2))
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_resumed_is_unbroken(tmp_path, optimiser):
    images, targets = data()
    recipe = replace(RECIPE, optimiser=optimiser, lr=0.01, weight_decay=0.01)
    unbroken = weights(train(network(), images, targets, recipe))

    def die(entry, _):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), images, targets, recipe, folder=tmp_path, on_epoch=die)
    resumed = train(network(seed=5), images, targets, recipe, folder=tmp_path)
    assert_same(unbroken, weights(resumed))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4]
    assert_same(unbroken, weights(train(network(seed=6), images, targets, recipe, folder=tmp_path)))


def test_a_killed_run_loses_one_epoch_at_most(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(__file__.rsplit('/', 1)[0])!r})\n"
        "from test_loop import *\n"
        "def kill(entry, model):\n"
        "    if entry['epoch'] == 3 and '--kill' in sys.argv:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "images, targets = data()\n"
        "model = train(network(), images, targets, RECIPE, folder='run', on_epoch=kill)\n"
        "torch.save(model.state_dict(), 'end.pt')\n"
    )
    killed = subprocess.run([sys.executable, script, "--kill"], cwd=tmp_path)
    assert killed.returncode == -9
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] == 3
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True)
    images, targets = data()

    expected = weights(train(network(), images, targets, RECIPE))
    resumed = torch.load(tmp_path / "end.pt", weights_only=True)
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    images, targets = data()
    train(network(), images, targets, replace(RECIPE, epochs=1), folder=tmp_path)
    with pytest.raises(ValueError, match="another run: its recipe differ"):
        train(network(), images, targets, RECIPE, folder=tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(name):
    images, targets = data(64)
    recipe = replace(PRESETS[name], epochs=1, batch_size=32)
    torch.manual_seed(0)
    model = MLP(192, 3, hidden=16, embedding=8) if name == "A.3.1" else network()
    train(model, images, targets, recipe)


@pytest.mark.parametrize("scheme", ["S", "I", "Is", "R", "O"])
def test_every_label_scheme_trains(scheme):
    images, labels = data(48)
    targets, classes = scheme_labels(scheme, labels)
    entries = []
    recipe = replace(RECIPE, epochs=2).under(scheme)
    assert recipe.augment == (scheme in ("S", "Is"))
    train(network(classes=classes), images, targets, recipe, on_epoch=lambda e, _: entries.append(e))
    assert (entries[-1]["loss"] == 0) == (scheme == "O")


def test_label_schemes():
    labels = torch.tensor([3, 1, 0, 1])
    assert scheme_labels("S", labels)[1] == 4
    assert scheme_labels("I", labels)[0].tolist() == [0, 1, 2, 3]
    assert scheme_labels("O", labels)[0].tolist() == [0, 0, 0, 0]
    bits, classes = scheme_labels("R", torch.zeros(1000), seed=3)
    assert classes == 2
    assert 0.4 < bits.float().mean() < 0.6
    assert torch.equal(bits, scheme_labels("R", torch.zeros(1000), seed=3)[0])
    with pytest.raises(ValueError, match="input 1 has none"):
        scheme_labels("S", torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="no label scheme 'X'"):
        scheme_labels("X", labels)


def test_augmentation_is_a_mirrored_crop_and_a_flip():
    images = torch.randint(0, 256, (40, 3, 16, 24), dtype=torch.uint8)
    moved = augment(images, torch.Generator().manual_seed(4)).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (3, 3)), mode="reflect")
    flips = tops = 0
    for i in range(40):
        places = [
            (top, left, flip)
            for top in range(5)
            for left in range(7)
            for flip in (False, True)
            if np.array_equal(moved[i], _cut(padded[i], top, left, flip))
        ]
        assert len(places) == 1
        tops += places[0][0]
        flips += places[0][2]
    assert 8 < flips < 32
    assert 40 < tops < 120


def _cut(padded, top, left, flip):
    cut = padded[:, top : top + 16, left : left + 24]
    return cut[:, :, ::-1] if flip else cut


TWO = """
import sys, torch
sys.path.insert(0, {folder!r})
from lightning_fabric import Fabric
from featnorm.training import MLP, Recipe, train
from test_loop import data
def run(fabric):
    images, targets = data(64)
    torch.manual_seed(0)
    recipe = Recipe(epochs=2, batch_size=16, optimiser="sgd", lr=0.05)
    model = train(MLP(192, 3, hidden=16, embedding=8), images, targets, recipe, fabric=fabric)
    if fabric.global_rank == 0:
        torch.save(model.state_dict(), {out!r})
if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn")
    fabric.launch(run)
"""


def test_two_processes_train_as_one(tmp_path):
    out = tmp_path / "two.pt"
    script = tmp_path / "two.py"
    script.write_text(TWO.format(folder=__file__.rsplit("/", 1)[0], out=str(out)))
    subprocess.run([sys.executable, script], check=True, capture_output=True, timeout=120)
    images, targets = data(64)
    torch.manual_seed(0)
    recipe = Recipe(epochs=2, batch_size=16, optimiser="sgd", lr=0.05)
    one = train(MLP(192, 3, hidden=16, embedding=8), images, targets, recipe)
    for name, value in torch.load(out, weights_only=True).items():
        torch.testing.assert_close(value, one.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_what_is_wrong_is_named(tmp_path):
    images, targets = data(32)
    with pytest.raises(ValueError, match="must be uint8"):
        train(network(), images.float(), targets, RECIPE)
    with pytest.raises(ValueError, match="targets must be 32 integers"):
        train(network(), images, targets[:5], RECIPE)
    with pytest.raises(ValueError, match="a batch of 64 needs as many images"):
        train(network(), images, targets, replace(RECIPE, batch_size=64))
    with pytest.raises(ValueError, match="no optimiser"):
        replace(RECIPE, optimiser="adam")
    with pytest.raises(ValueError, match="lr must be positive"):
        replace(RECIPE, lr=0)
    bad = network()
    with torch.no_grad():
        bad[1].hidden.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss is not finite in epoch 1"):
        train(bad, images, targets, RECIPE, folder=tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()
