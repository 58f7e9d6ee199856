"""A probe records what its parts compute for the model at each epoch."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import featnorm as fn
from featnorm.hidden.classifier import HiddenClassifier
from featnorm.hidden.statistics import ActivationStatistics
from featnorm.models import CifarResNet18, ProjectionHead
from featnorm.paper.networks import MLP
from featnorm.paper.probe import LAST, Probe
from featnorm.training import train
from featnorm.training.runs import read_log
from trainings import RECIPE, data


def sets():
    images, targets = data(60)
    generator = torch.Generator().manual_seed(9)
    ood = {
        name: torch.randint(0, 256, (40, 3, 8, 8), generator=generator, dtype=torch.uint8) for name in ("a", "b")
    }
    return {"train": (images[:40], targets[:40]), "test": (images[40:], targets[40:])}, ood


def network():
    torch.manual_seed(0)
    return nn.Sequential(CifarResNet18(4), ProjectionHead(32, 3, hidden=24, embedding=16)).eval()


def test_every_number_is_what_its_part_says():
    splits, ood = sets()
    model = network()
    probe = Probe(splits, ood, layers=["0.stages.3"], pre_activation="1.hidden")
    found = probe.measure(model)
    with torch.no_grad():
        z = {name: model[1].hidden(model[0](x.float() / 255)) for name, (x, _) in splits.items()}
        z |= {name: model[1].hidden(model[0](x.float() / 255)) for name, x in ood.items()}
        maps = model[0].stages[:4](model[0].stem(splits["test"][0].float() / 255)).flatten(1)
    a = {name: torch.relu(value) for name, value in z.items()}
    last = found[LAST]
    for name, value in a.items():
        assert last["norm"][name] == pytest.approx(float(fn.l1_norm(value).mean()), rel=1e-4)
        assert last["nan"][name] == pytest.approx(float(fn.negative_aware_norm(value).mean()), rel=1e-4)
    assert last["entropy"]["test"] == pytest.approx(
        ActivationStatistics().update(a["test"]).mean_entropy, abs=1e-3
    )
    assert found["0.stages.3"]["entropy"]["test"] == pytest.approx(
        ActivationStatistics().update(maps).mean_entropy, abs=1e-3
    )
    expected = sum(fn.auroc(fn.l1_norm(a["test"]), fn.l1_norm(a[name])) for name in ood) / 2
    assert last["auroc"]["test"]["norm"] == pytest.approx(expected, abs=2e-3)
    weight = model[1].classifier.weight.detach() @ model[1].embedding.weight.detach()
    hidden = HiddenClassifier(a["test"], weight)
    targets = splits["test"][1]
    record = last["hidden"]["test"]
    assert record["accuracy"] == pytest.approx(float((hidden.prediction == targets).float().mean()))
    assert record["sign_difference"] == pytest.approx(float(1 - hidden.agreement(targets).mean()), abs=1e-3)
    errors = hidden.approximation_error(targets)
    assert record["error"] == pytest.approx(float(errors[0].mean()), abs=1e-3)
    assert record["other_error"] == pytest.approx(float(errors[1].mean()), abs=1e-3)
    before = fn.FeatureTap(model).hidden(splits["test"][0].float() / 255, pre_activation=True)
    torch.testing.assert_close(before.activation, z["test"], rtol=1e-4, atol=1e-4)
    errors = before.approximation_error(targets)
    assert record["pre_error"] == pytest.approx(float(errors[0].mean()), abs=1e-3)
    assert record["pre_other_error"] == pytest.approx(float(errors[1].mean()), abs=1e-3)


def test_the_hidden_classifiers_of_inner_layers():
    splits, _ = sets()
    torch.manual_seed(0)
    model = MLP(192, 3, layers=3, hidden=16, embedding=8).eval()
    probe = Probe(splits, {}, layers=["body.2"], hidden=["body.2", LAST])
    found = probe.measure(model)
    assert found[LAST]["auroc"] == {}
    images, targets = splits["train"]
    hidden = fn.FeatureTap(model, "body.2").hidden(images.float() / 255)
    assert found["body.2"]["hidden"]["train"]["sign_difference"] == pytest.approx(
        float(1 - hidden.agreement(targets).mean()), abs=1e-5
    )
    last = fn.FeatureTap(model).hidden(images.float() / 255)
    assert found[LAST]["hidden"]["train"]["accuracy"] == pytest.approx(
        float((last.prediction == targets).float().mean())
    )


def test_it_follows_training_and_a_broken_run(tmp_path):
    splits, ood = sets()
    recipe = replace(RECIPE, epochs=3)

    def probe():
        return Probe(splits, ood, max_inputs=20, file=tmp_path / "probe.jsonl")

    unbroken = Probe(splits, ood, max_inputs=20)
    train(network(), *splits["train"], recipe, on_epoch=unbroken)
    first = probe()

    def die(entry, model):
        first(entry, model)
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), *splits["train"], recipe, folder=tmp_path, on_epoch=die)
    train(network(), *splits["train"], recipe, folder=tmp_path, on_epoch=probe())
    records = read_log(tmp_path / "probe.jsonl")
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert records == json.loads(json.dumps(unbroken.records))


def test_more_inputs_than_wanted_are_thinned_evenly():
    images = torch.arange(100)[:, None].float()
    probe = Probe({"train": (images, torch.zeros(100, dtype=torch.int64))}, {}, max_inputs=4)
    assert probe.splits["train"][0].flatten().tolist() == [0, 33, 66, 99]


def test_what_cannot_be_probed_is_named():
    splits, ood = sets()
    for options, message in (
        (dict(layers=[LAST]), "always recorded"),
        (dict(hidden=["1.hidden"]), "'1.hidden', which is not among layers"),
    ):
        with pytest.raises(ValueError, match=message):
            Probe(splits, ood, **options)
    with pytest.raises(ValueError, match="both named a"):
        Probe({"a": splits["train"]}, ood)
    with pytest.raises(ValueError, match="not the ReLU of the output of"):
        Probe(splits, ood, pre_activation="1.embedding").measure(network())
