"""The training loop: it learns, resumes to the same weights, and agrees between one and two processes."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from apart import start
from featnorm.models import (
    CifarResNet18,
    Normalize,
    ProjectionHead,
    attach_head,
)
from featnorm.paper.networks import MLP
from featnorm.paper.recipe import PRESETS, scheme_labels
from featnorm.runtime import Runtime
from featnorm.training import Recipe, train, train_head
from trainings import (
    CASES,
    PAPER_RECIPE,
    RECIPE,
    assert_same,
    data,
    framework,
    network,
    plain,
    train_until_killed,
    weights,
)

pytestmark = pytest.mark.slow

FABRIC = Runtime().fabric


def test_it_learns():
    images, targets = data()
    entries = []
    model = train(network(), images, targets, RECIPE, on_epoch=lambda entry, _: entries.append(entry))
    assert not model.training
    assert entries[-1]["loss"] < entries[0]["loss"]
    assert entries[-1]["accuracy"] > 0.9
    assert entries[-1]["lr"] == pytest.approx(0, abs=1e-9)


def test_masks_are_targets_of_maps(tmp_path):
    images, classes = data(n=32)
    masks = classes[:, None, None].repeat(1, 8, 8)
    masks[:, :, 4:] = 0
    recipe = replace(RECIPE, augment=False, epochs=6)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)
    entries = []
    train(nn.Sequential(*layers), images, masks, recipe, on_epoch=lambda entry, _: entries.append(entry))
    assert entries[-1]["loss"] < entries[0]["loss"]
    with pytest.raises(ValueError, match=r"targets must be 32 integers, got torch.int64 \(32, 8, 8\)"):
        train(nn.Sequential(*layers), images, masks, RECIPE)


def test_seed_alone_decides():
    images, targets = data()
    first = weights(train(network(), images, targets, RECIPE, seed=1))
    torch.rand(5)
    assert_same(first, weights(train(network(), images, targets, RECIPE, seed=1)))
    other = weights(train(network(), images, targets, RECIPE, seed=2))
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_token_ids_stay_exact_in_mixed_precision():
    ids = torch.arange(1000, 1064)[:, None]
    seen = []

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(1064, 2)

        def forward(self, ids):
            seen.append(ids)
            return self.words(ids).mean(1)

    recipe = replace(RECIPE, epochs=1, batch_size=16, augment=False, crop=None)
    train(Words(), ids, torch.arange(64) % 2, recipe, runtime=Runtime(device="cpu", precision="bf16-mixed"))
    assert torch.cat(seen).sort(0).values.equal(ids)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_is_unbroken(tmp_path, optimizer):
    images, targets = data()
    recipe = replace(RECIPE, optimizer=optimizer, lr=0.01, weight_decay=0.01)
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


@pytest.mark.posix
def test_a_killed_run_loses_one_epoch_at_most(tmp_path):
    killed = start(train_until_killed, tmp_path / "run", out=tmp_path / "out", error=tmp_path / "log")
    killed.join()
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] == 2
    images, targets = data()
    epochs = []
    resumed = train(
        network(seed=5),
        images,
        targets,
        RECIPE,
        folder=tmp_path / "run",
        on_epoch=lambda entry, _: epochs.append(entry["epoch"]),
    )
    assert epochs == [3, 4]
    for name, value in weights(train(network(), images, targets, RECIPE)).items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    images, targets = data()
    train(network(), images, targets, replace(RECIPE, epochs=1), folder=tmp_path)
    with pytest.raises(ValueError, match=r"another run \(different recipe\)"):
        train(network(), images, targets, RECIPE, folder=tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(name):
    images, targets = data(64)
    recipe = replace(PRESETS[name], epochs=1, batch_size=32)
    torch.manual_seed(0)
    if recipe.objective != "cross_entropy":
        model = framework(recipe)
    else:
        model = MLP(192, 3, hidden=16, embedding=8) if name == "A.3.1" else network()
    entries = []
    train(model, images, targets, recipe, on_epoch=lambda entry, _: entries.append(entry))
    assert entries[-1]["loss"] > 0


@pytest.mark.parametrize("scheme", ["S", "I", "Is", "R", "O"])
def test_every_label_scheme_trains(scheme):
    images, labels = data(48)
    targets, classes = scheme_labels(scheme, labels)
    entries = []
    recipe = replace(PAPER_RECIPE, epochs=2).under(scheme)
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
    with pytest.raises(ValueError, match="unknown label scheme 'X'"):
        scheme_labels("X", labels)


def test_crops_come_first_and_whole_images_last():
    images, targets = data(64)
    sides = []
    model = network()
    model.register_forward_pre_hook(lambda _, args: sides.append(args[0].shape[-1]))
    train(model, images, targets, replace(RECIPE, epochs=2, crop=6, crop_share=0.75))
    assert sides == [6] * 6 + [8] * 2


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    images, targets = data(96)
    rates = []
    model = network()
    recipe = replace(RECIPE, epochs=10, warmup=0.5, lr=1e-6)
    train(model, images, targets, recipe, on_epoch=lambda entry, _: rates.append(entry["lr"]))
    assert rates[:5] == sorted(rates[:5])
    assert rates[4] == pytest.approx(1e-6)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def embedder(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        Normalize((0.3,) * 3, (0.2,) * 3), CifarResNet18(4), ProjectionHead(32, None, embedding=16)
    )


def test_supcon_draws_a_class_together():
    images, targets = data(96)
    recipe = replace(PAPER_RECIPE, epochs=6, objective="supcon", warmup=0.2)
    entries = []
    model = train(embedder(), images, targets, recipe, on_epoch=lambda entry, _: entries.append(entry))
    assert entries[-1]["loss"] < entries[0]["loss"]
    assert entries[-1]["accuracy"] is None
    with torch.no_grad():
        embedding = nn.functional.normalize(model(images.float() / 255))
    cosine = embedding @ embedding.T
    same = targets[:, None] == targets
    assert cosine[same].mean() > cosine[~same].mean() + 0.5


def test_supcon_is_the_formula_over_both_views():
    """Return the loss of Khosla et al., NeurIPS 2020, eq. 2, term by term in float64."""
    from featnorm.paper.objectives import supcon

    torch.manual_seed(3)
    z = torch.randn(12, 5, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 0, 1, 2])
    unit = z / z.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(12):
        others = [a for a in range(12) if a != i]
        below = sum(torch.exp(unit[i] @ unit[a] / 0.2) for a in others)
        positives = [p for p in others if y[p] == y[i]]
        total -= sum(torch.log(torch.exp(unit[i] @ unit[p] / 0.2) / below) for p in positives) / len(positives)
    assert float(supcon(z, y, 0.2, FABRIC)) == pytest.approx(float(total) / 12, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_head_alone_learns_and_the_backbone_stays(optimizer):
    images, targets = data(96)
    torch.manual_seed(0)
    model = attach_head(CifarResNet18(4), 3, features=32, hidden=16)
    before = weights(model[0])
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    loader = [
        (part.float() / 255, labels) for part, labels in zip(images.split(32), targets.split(32), strict=True)
    ]
    recipe = replace(PRESETS["D.4"], epochs=60, batch_size=32, optimizer=optimizer)
    assert train_head(model, loader, recipe) is model
    assert len(calls) == 3
    assert_same(before, weights(model[0]))
    with torch.no_grad():
        logits = torch.cat([model(inputs) for inputs, _ in loader])
    assert float((logits.argmax(1) == targets).float().mean()) > 0.9
    with pytest.raises(ValueError, match="no batch"):
        train_head(model, [], recipe)
    with pytest.raises(ValueError, match="not 3 parts"):
        train_head(nn.Sequential(*model, nn.Identity()), loader, recipe)


TWO = """
import sys, torch
sys.path.insert(0, {folder!r})
from dataclasses import replace
from featnorm.paper.networks import MLP
from featnorm.paper.recipe import PRESETS
from featnorm.models import ProjectionHead
from featnorm.runtime import Runtime
from featnorm.training import Recipe, train
from trainings import CASES, data, plain
def run(fabric):
    images, targets = data(64)
    ends = {{}}
    for name, recipe in CASES.items():
        ends[name] = train(plain(recipe), images, targets, recipe, runtime=runtime).state_dict()
    if fabric.global_rank == 0:
        torch.save(ends, {out!r})
if __name__ == "__main__":
    runtime = Runtime(processes=2)
    runtime.fabric.launch(run)
"""


def test_two_processes_train_as_one(tmp_path):
    out = tmp_path / "two.pt"
    script = tmp_path / "two.py"
    helpers = Path(__file__).parents[1] / "helpers"
    script.write_text(TWO.format(folder=str(helpers), out=str(out)))
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    images, targets = data(64)
    two = torch.load(out, weights_only=True)
    assert two.keys() == CASES.keys()
    for name, recipe in CASES.items():
        one = train(plain(recipe), images, targets, recipe)
        for key, value in two[name].items():
            torch.testing.assert_close(value, one.state_dict()[key], rtol=1e-4, atol=1e-6, msg=f"{name} {key}")


def test_supcon_of_one_class_and_of_classes_of_one():
    from featnorm.paper.objectives import supcon

    z = torch.randn(6, 4)
    one = supcon(z, torch.zeros(6, dtype=torch.int64), 0.1, FABRIC)
    unit = nn.functional.normalize(z)
    expected = [
        -torch.stack([(unit[i] @ unit[p]) / 0.1 for p in range(6) if p != i]).log_softmax(0).mean()
        for i in range(6)
    ]
    torch.testing.assert_close(one, torch.stack(expected).mean())
    z.requires_grad_()
    alone = supcon(z, torch.arange(6), 0.1, FABRIC)
    alone.backward()
    assert float(alone.detach()) == 0
    assert torch.isfinite(z.grad).all()


def test_dropout_depends_on_the_seed_and_resumes(tmp_path):
    features, targets = torch.randn(64, 6), torch.arange(64) % 2
    recipe = Recipe(epochs=4, batch_size=16, optimizer="sgd", lr=0.05)

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 2))

    unbroken = weights(train(make(), features, targets, recipe))
    assert_same(unbroken, weights(train(make(), features, targets, recipe)))
    model = make()
    state = torch.random.get_rng_state()
    train(model, features, targets, replace(recipe, epochs=1))
    assert torch.equal(state, torch.random.get_rng_state())

    def die(entry, _):
        if entry["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make(), features, targets, recipe, folder=tmp_path, on_epoch=die)
    torch.rand(7)
    assert_same(unbroken, weights(train(make(), features, targets, recipe, folder=tmp_path)))


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    features, targets = torch.randn(64, 6), torch.arange(64) % 2
    recipe = Recipe(epochs=1, batch_size=16, optimizer="sgd", lr=0.05)
    train(nn.Linear(6, 2), features, targets, recipe, folder=tmp_path)
    for other in ((features, 1 - targets), (features + 1, targets)):
        with pytest.raises(ValueError, match=r"another run \(different data\)"):
            train(nn.Linear(6, 2), *other, recipe, folder=tmp_path)


def test_warmup_to_the_last_step_and_gradients_switched_off():
    features, targets = torch.randn(64, 6), torch.arange(64) % 2
    model = nn.Linear(6, 2)
    before = weights(model)
    with torch.no_grad():
        train(model, features, targets, Recipe(epochs=1, batch_size=64, optimizer="sgd", lr=0.1, warmup=0.9))
    assert not torch.equal(before["weight"], model.weight)


def test_weights_that_are_not_finite_are_never_kept(tmp_path):
    features, targets = torch.randn(64, 6) * 1e3, torch.arange(64) % 2
    recipe = Recipe(epochs=3, batch_size=64, optimizer="sgd", lr=1e38)
    with pytest.raises(ValueError, match="the weights are not finite in epoch 1"):
        train(nn.Linear(6, 2), features, targets, recipe, folder=tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_what_is_wrong_is_named(tmp_path):
    images, targets = data(32)
    with pytest.raises(ValueError, match="input 3 has the target -1"):
        train(network(), images, torch.where(torch.arange(32) == 3, -1, targets), RECIPE)
    with pytest.raises(ValueError, match="must be images, uint8"):
        train(network(), images.float(), targets, RECIPE)
    with pytest.raises(ValueError, match="features cannot be augmented"):
        train(network()[1], torch.zeros(32, 32), targets, RECIPE)
    with pytest.raises(ValueError, match="a crop of 9 cannot be cut from images of 8 x 8"):
        train(network(), images, targets, replace(RECIPE, crop=9))
    with pytest.raises(ValueError, match="supcon compares augmented views"):
        replace(PAPER_RECIPE, objective="supcon", augment=False)
    with pytest.raises(ValueError, match="unknown objective 'triplet'"):
        replace(PAPER_RECIPE, objective="triplet")
    with pytest.raises(ValueError, match="crops are an augmentation"):
        replace(RECIPE, crop=6, augment=False)
    with pytest.raises(ValueError, match="warmup must be a share"):
        replace(RECIPE, warmup=1.0)
    with pytest.raises(ValueError, match="targets must be 32 integers"):
        train(network(), images, targets[:5], RECIPE)
    with pytest.raises(ValueError, match="a batch of 64 needs as many inputs"):
        train(network(), images, targets, replace(RECIPE, batch_size=64))
    with pytest.raises(ValueError, match="unknown optimizer"):
        replace(RECIPE, optimizer="adam")
    with pytest.raises(ValueError, match="lr must be positive"):
        replace(RECIPE, lr=0)
    bad = network()
    with torch.no_grad():
        bad[1].hidden.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss is not finite in epoch 1"):
        train(bad, images, targets, RECIPE, folder=tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: g++")
def test_compiled_training_ends_where_plain_does_and_resumes(tmp_path, monkeypatch):
    # A separate cache, because code that was compiled for wider vectors than are requested now corrupts the heap.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    # In this process: others would import torch first.
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    # Compiled sooner, as code that need not be fast. Trying out the kinds of vectors takes longer than all else.
    monkeypatch.setattr("torch._inductor.cpp_builder._get_optimization_cflags", lambda *_: (["O0"], []))
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", lambda: [])
    images, targets = data(64)
    recipe = Recipe(epochs=3, batch_size=16, optimizer="sgd", lr=0.05, augment=True, crop=6, crop_share=0.5)
    runtime = Runtime("cpu", compiled=True)

    def network():
        torch.manual_seed(0)
        # The second layer is one of those for which `safe_gradients` is needed.
        convolutions = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1, stride=2)
        convolution = nn.Sequential(*convolutions, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(8, 3))

    plain = train(network(), images, targets, recipe)
    compiled = train(network(), images, targets, recipe, runtime=runtime)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value, rtol=1e-3, atol=1e-5)

    def stop(entry, _):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), images, targets, recipe, folder=tmp_path, runtime=runtime, on_epoch=stop)
    resumed = train(network(), images, targets, recipe, folder=tmp_path, runtime=runtime)
    assert_same(weights(compiled), weights(resumed))
