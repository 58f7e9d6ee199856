"""The objectives of the training frameworks: their formulas, and that they resume with their state."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from featnorm.models import cifar_network
from featnorm.paper.objectives import cider
from featnorm.paper.recipe import OBJECTIVES, PRESETS, PaperRecipe
from featnorm.runtime import Runtime
from featnorm.training import train
from featnorm.training.objectives import Batch
from trainings import assert_same, data, framework, weights

F64 = torch.float64
FABRIC = Runtime().fabric
#: The frameworks' settings, for a few small images.
SMALL = {
    name: replace(PRESETS[name], epochs=4, batch_size=16, optimizer="sgd", lr=0.03, queue=40, warmup=0)
    for name in ("MoCo-v2", "SimCLR", "RotNet", "CIDER", "CSI")
}


class Embeds(nn.Module):
    """A model of two views whose embeddings are its parameters."""

    def __init__(self, *embeddings):
        super().__init__()
        self.views = nn.ParameterList(nn.Parameter(e) for e in embeddings)

    def forward(self, images):
        return torch.cat(list(self.views))[: len(images)]


def batch(n, views):
    return Batch(torch.zeros(views * n, 3, 8, 8), torch.arange(n) % 2, torch.arange(n))


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def test_simclr_is_its_formula():
    """Chen et al., ICML 2020, eq. 1, term by term in float64."""
    torch.manual_seed(1)
    first, second = torch.randn(7, 5), torch.randn(7, 5)
    objective = OBJECTIVES["simclr"](replace(SMALL["SimCLR"], temperature=0.3))
    got = objective(Embeds(first, second), batch(7, 2), FABRIC).loss
    z = unit(torch.cat([first, second]).to(F64))
    total = 0.0
    for i in range(14):
        similar = [math.exp(z[i] @ z[k] / 0.3) for k in range(14)]
        total -= math.log(similar[(i + 7) % 14] / (sum(similar) - similar[i]))
    assert float(got.detach()) == pytest.approx(total / 14, rel=1e-5)


def test_moco_is_its_formula_and_remembers_its_keys():
    """He et al., CVPR 2020, eq. 1 and 2."""
    recipe = replace(SMALL["MoCo-v2"], batch_size=4, queue=10, temperature=0.2, ema=0.9)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 6))
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    objective = OBJECTIVES["moco"](recipe)
    objective.begin(model, images, torch.zeros(12), 0, FABRIC)
    queue = objective.queue.clone()
    assert torch.allclose(queue.norm(dim=1), torch.ones(10))
    slow = {name: value.clone() for name, value in objective.encoder.state_dict().items()}
    with torch.no_grad():
        model[1].weight += 0.1
    views = torch.rand(8, 3, 8, 8)
    loss = objective(model, Batch(views, torch.zeros(4), torch.arange(4)), FABRIC).loss
    loss.backward()
    for name, value in objective.encoder.state_dict().items():
        torch.testing.assert_close(value, 0.9 * slow[name] + 0.1 * model.state_dict()[name])
        assert not dict(objective.encoder.named_parameters())[name].requires_grad
    with torch.no_grad():
        q = unit(model(views[:4]).to(F64))
        k = unit(objective.encoder(views[4:]).to(F64))
    expected = 0.0
    for i in range(4):
        positive = math.exp(q[i] @ k[i] / 0.2)
        negative = sum(math.exp(q[i] @ old / 0.2) for old in queue.to(F64))
        expected -= math.log(positive / (positive + negative)) / 4
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(objective.queue, torch.cat([queue[4:], k.float()]))


def test_moco_normalizes_keys_in_shuffled_parts(monkeypatch):
    monkeypatch.setattr("featnorm.paper.objectives._KEYS_PER_PASS", 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 6), nn.BatchNorm1d(6))
    objective = OBJECTIVES["moco"](replace(SMALL["MoCo-v2"], batch_size=8, queue=8))
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    objective.begin(model, images, torch.zeros(8), 0, FABRIC)
    objective.train()
    sizes = []
    objective.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    views = torch.rand(16, 3, 8, 8)
    torch.manual_seed(0)
    objective(model, Batch(views, torch.zeros(8), torch.arange(8)), FABRIC)
    assert sizes == [4, 4]
    torch.manual_seed(0)
    order = torch.randperm(8)
    assert order.tolist() != list(range(8))
    with torch.no_grad():
        parts = [unit(objective.encoder(part)) for part in views[8:][order].split(4)]
    torch.testing.assert_close(objective.queue, torch.cat(parts)[order.argsort()])


def test_rotnet_turns_every_input_four_ways():
    seen = []

    class Sees(nn.Module):
        def forward(self, images):
            seen.append(images)
            logits = torch.zeros(len(images), 4)
            logits[torch.arange(len(images)), torch.arange(4).repeat_interleave(3)] = 2.0
            return logits

    views = torch.rand(3, 3, 8, 8)
    step = OBJECTIVES["rotnet"](SMALL["RotNet"])(Sees(), Batch(views, torch.zeros(3), torch.arange(3)), FABRIC)
    for turns in range(4):
        assert torch.equal(seen[0][3 * turns : 3 * turns + 3], views.rot90(turns, (2, 3)))
    assert float(step.accuracy) == 1
    assert float(step.loss) == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 3)))
    with pytest.raises(ValueError, match="the model returns 10 logits"):
        OBJECTIVES["rotnet"](SMALL["RotNet"])(
            lambda images: torch.zeros(len(images), 10), Batch(views, torch.zeros(3), torch.arange(3)), FABRIC
        )


def test_cider_is_its_formula():
    """Ming et al., ICLR 2023: the moving average one embedding after the other, then both losses, in float64."""
    torch.manual_seed(3)
    z, prototypes = unit(torch.randn(11, 5, dtype=F64)), unit(torch.randn(3, 5, dtype=F64))
    y = torch.tensor([0, 2, 1, 0, 0, 2, 1, 0, 2, 2, 0])
    recipe = replace(SMALL["CIDER"], temperature=0.3, ema=0.8, weight=1.7)
    moved = prototypes.clone()
    for i in range(11):
        moved[y[i]] = 0.8 * moved[y[i]] + 0.2 * z[i]
        moved[y[i]] /= moved[y[i]].norm()
    dispersion = compactness = 0.0
    for c in range(3):
        others = [math.exp(moved[c] @ moved[o] / 0.3) for o in range(3) if o != c]
        dispersion += math.log(sum(others) / 2) / 3
    for i in range(11):
        near = [math.exp(z[i] @ moved[c] / 0.3) for c in range(3)]
        compactness -= math.log(near[y[i]] / sum(near)) / 11
    loss, after = cider(z.requires_grad_(), y, prototypes, recipe)
    torch.testing.assert_close(after, moved)
    assert float(loss.detach()) == pytest.approx(1.7 * compactness + dispersion, rel=1e-9)
    # The dispersion reaches the embeddings through the prototypes that they moved.
    assert torch.autograd.gradcheck(lambda rows: cider(rows, y, prototypes, replace(recipe, weight=1e-9))[0], (z,))


def test_cider_begins_at_class_means():
    images, targets = data(48)
    model = framework(SMALL["CIDER"])
    objective = OBJECTIVES["cider"](SMALL["CIDER"])
    before = weights(model)
    objective.begin(model, images, targets, 0, FABRIC)
    assert_same(before, weights(model))
    with torch.no_grad():
        z = unit(model.eval()(images.float() / 255))
    means = torch.stack([z[targets == c].mean(0) for c in range(3)])
    torch.testing.assert_close(objective.prototypes, unit(means), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no input has the target 1"):
        objective.begin(model, images, torch.where(targets == 1, 0, targets), 0, FABRIC)
    with pytest.raises(ValueError, match="all targets are 0"):
        objective.begin(model, images, torch.zeros_like(targets), 0, FABRIC)


def test_csi_is_simclr_over_rotations_and_their_cross_entropy():
    """Tack et al., NeurIPS 2020, in float64, from the order of its views."""
    recipe = replace(SMALL["CSI"], temperature=0.5, weight=0.7)
    torch.manual_seed(4)
    embedding, logits = torch.randn(2 * 4 * 3, 5), torch.randn(2 * 4 * 3, 4)
    got = OBJECTIVES["csi"](recipe)(
        lambda views: {"embedding": embedding, "logits": logits}, batch(3, 8), FABRIC
    ).loss
    z = unit(embedding.to(F64))
    contrast = turned = 0.0
    for i in range(24):
        similar = [math.exp(z[i] @ z[k] / 0.5) for k in range(24)]
        contrast -= math.log(similar[(i + 12) % 24] / (sum(similar) - similar[i])) / 24
        turned -= float(logits[i].to(F64).log_softmax(0)[i % 12 // 3]) / 24
    assert float(got) == pytest.approx(contrast + 0.7 * turned, rel=1e-5)


def test_csi_mirrors_before_it_turns(monkeypatch):
    monkeypatch.setattr("featnorm.paper.objectives.distort", lambda images, drawn, crop: images)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    make_views = OBJECTIVES["csi"](SMALL["CSI"]).make_views
    views = make_views(images, slice(0, 6), torch.Generator().manual_seed(1), None, torch.device("cpu"))
    views = (255 * views).round().byte().unflatten(0, (2, 4, 6))
    mirrored = 0
    for view in views:
        for i in range(6):
            mirror = not torch.equal(view[0, i], images[i])
            mirrored += mirror
            upright = images[i].flip(2) if mirror else images[i]
            for turns in range(4):
                assert torch.equal(view[turns, i], upright.rot90(turns, (1, 2)))
    assert 0 < mirrored < 12


@pytest.mark.parametrize("name", SMALL)
def test_resumed_is_unbroken(name, tmp_path):
    recipe = SMALL[name]
    images, targets = data(48)
    targets = targets if OBJECTIVES[recipe.objective].needs_targets else None
    entries = []
    unbroken = train(
        framework(recipe), images, targets, recipe, on_epoch=lambda entry, _: entries.append(entry)
    ).state_dict()
    assert (entries[0]["accuracy"] is None) == (name != "RotNet")

    def die(entry, _):
        if entry["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(framework(recipe), images, targets, recipe, folder=tmp_path, on_epoch=die)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    held = {"MoCo-v2": "queue", "CIDER": "prototypes"}
    assert bool(saved["objective"]) == (name in held)
    torch.rand(3)
    other = framework(recipe, seed=7)
    with torch.inference_mode():
        resumed = train(other, images, targets, recipe, folder=tmp_path)
    assert_same(unbroken, resumed.state_dict())


def test_moco_resumes_its_queue_and_its_encoder(tmp_path):
    recipe, (images, _) = SMALL["MoCo-v2"], data(48)
    train(framework(recipe), images, None, replace(recipe, epochs=1), folder=tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["objective"]
    model = framework(recipe)
    fresh = OBJECTIVES["moco"](recipe)
    fresh.begin(model, images, torch.zeros(48), 0, FABRIC)
    assert saved.keys() == fresh.state_dict().keys()
    assert any(not torch.equal(saved[name], value) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_views_are_of_the_recipe(name):
    """On crops of another side first, and in part for each process, of the same random numbers."""
    objective = OBJECTIVES[SMALL[name].objective](SMALL[name])
    images, _ = data(16)
    count = {"csi": 8, "rotnet": 1}.get(SMALL[name].objective, 2)

    def views_of(mine, crop=None):
        generator = torch.Generator().manual_seed(5)
        return objective.make_views(images, mine, generator, crop, torch.device("cpu"))

    assert views_of(slice(0, 16), 6).shape == (16 * count, 3, 6, 6)
    whole = views_of(slice(0, 16)).unflatten(0, (count, 16))
    for half in (slice(0, 8), slice(8, 16)):
        assert torch.equal(views_of(half).unflatten(0, (count, 8)), whole[:, half])


def test_lars_is_its_formula():
    """You et al., 2017, by hand in float64."""
    torch.manual_seed(5)
    start, zero = torch.randn(4, 3, dtype=F64), torch.zeros(3, dtype=F64)
    a, b = nn.Parameter(start.clone()), nn.Parameter(zero.clone())
    recipe = replace(PRESETS["SimCLR"], lr=0.5, momentum=0.9, weight_decay=0.01)
    optimizer = recipe.make_optimizer([a, b])
    w, v, speed = start.clone(), zero.clone(), [torch.zeros_like(start), torch.zeros_like(zero)]
    for _ in range(3):
        gradients = torch.randn(4, 3, dtype=F64), torch.randn(3, dtype=F64)
        a.grad, b.grad = (g.clone() for g in gradients)
        optimizer.step()
        for i, (weight, g) in enumerate(zip((w, v), gradients, strict=True)):
            size = weight.norm()
            trust = 1e-3 * size / (g.norm() + 0.01 * size) if size > 0 else 1.0
            speed[i] = 0.9 * speed[i] + trust * (g + 0.01 * weight)
            weight -= 0.5 * speed[i]
    torch.testing.assert_close(a.detach(), w)
    torch.testing.assert_close(b.detach(), v)


def test_other_objectives_settings_are_no_part_of_a_run(tmp_path):
    plain = PaperRecipe(epochs=1, batch_size=16, optimizer="sgd", lr=0.1)
    assert {"scale", "queue", "ema", "weight"}.isdisjoint(plain.to_dict())
    assert plain.to_dict() == replace(plain, queue=99, ema=0.5).to_dict()
    assert SMALL["MoCo-v2"].to_dict()["queue"] == 40
    assert "queue" not in SMALL["CIDER"].to_dict()


def test_what_is_wrong_is_named():
    images, _ = data(32)
    with pytest.raises(ValueError, match="moco compares augmented views"):
        replace(SMALL["MoCo-v2"], augment=False)
    with pytest.raises(ValueError, match="a queue of 8 does not hold the keys of a batch of 16"):
        replace(SMALL["MoCo-v2"], queue=8)
    with pytest.raises(ValueError, match="ema must be a share below 1"):
        replace(SMALL["MoCo-v2"], ema=1)
    with pytest.raises(ValueError, match="scale must be a share"):
        replace(SMALL["MoCo-v2"], scale=0)
    with pytest.raises(ValueError, match="weight must be positive"):
        replace(SMALL["CIDER"], weight=0)
    with pytest.raises(ValueError, match="CIDER needs targets"):
        train(framework(SMALL["CIDER"]), images, None, SMALL["CIDER"])
    with pytest.raises(ValueError, match="RotNet rotates square images"):
        train(framework(SMALL["RotNet"]), images[:, :, 1:], None, SMALL["RotNet"])
    with pytest.raises(ValueError, match="give it a hidden layer"):
        cifar_network(4, None, hidden=None)
