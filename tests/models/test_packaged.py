"""The network that is included in the package matches its model card."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import featnorm as fn
from featnorm._utils.layout import fast_layout
from featnorm.inputs import image_tensor, open_source
from featnorm.models import ModelError, create_model, packaged
from featnorm.models.packaged import model_facts

NAME = "cifar10-resnet18"
FOLDER = Path(packaged.__file__).parent


def test_it_loads_and_is_found_by_the_tap():
    assert fn.model_names() == [NAME]
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    model = fn.load_model(NAME)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not model.training
    tap = fn.FeatureTap(model).trace(torch.rand(4, 3, 32, 32))
    assert "hidden layer of an MLP head" in tap.describe()
    features = tap(torch.rand(4, 3, 32, 32))
    assert features.tensor("activation").shape == (4, 512)
    assert features.tensor("embedding").shape == (4, 128)
    assert features.tensor("logits").shape == (4, 10)


def test_it_is_small_and_has_a_card():
    file = FOLDER / f"{NAME}.safetensors"
    assert sum(weights.stat().st_size for weights in FOLDER.glob("*.safetensors")) <= 8e6
    card = file.with_suffix(".md").read_text("utf-8")
    result = model_facts(NAME)["result"]
    assert f"{result['accuracy']:.2%}" in card
    for name, sets in result["scores"].items():
        for auroc, fpr95 in sets.values():
            assert f"{auroc:.1f} / {fpr95:.1f}" in card, name


#: Accuracy on every tenth test image, and AUROC against every tenth digit of MNIST and every fourth texture. They
#: were measured while those on all images, which take ten times as long, were as published.
ACCURACY = 0.955
AUROC = {
    "NAN()": (91.57, 91.41),
    "L1Norm()": (90.00, 89.09),
    "Energy()": (73.17, 76.07),
    "MSP()": (83.35, 90.32),
    "HiddenConfidence()": (91.01, 90.24),
}


def test_it_reaches_what_was_published(shared_data):
    model = fast_layout(fn.load_model(NAME))
    tap = fn.FeatureTap(model)

    def features(source):
        pixels = image_tensor(source, 32, progress=False)
        return fn.Features.cat([tap(fast_layout(batch).float() / 255) for batch in pixels.split(64)])

    source = open_source("cifar10:test[::10]", root=shared_data)
    known = features(source)
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    strange = [
        features(open_source(f"ood32/{name}", root=shared_data)) for name in ("mnist[::10]", "textures[::4]")
    ]
    accuracy = float((known.tensor("logits").argmax(1) == labels).float().mean())
    assert accuracy == pytest.approx(ACCURACY, abs=0.001)
    result = model_facts(NAME)["result"]
    # Within three standard errors.
    assert accuracy == pytest.approx(result["accuracy"], abs=3 * (accuracy * (1 - accuracy) / len(labels)) ** 0.5)
    for detector in (fn.NAN(), fn.L1Norm(), fn.Energy(), fn.MSP(), fn.HiddenConfidence()):
        name = repr(detector)
        ours = [100 * fn.auroc(detector.score(known), detector.score(one)) for one in strange]
        assert ours == pytest.approx(AUROC[name], abs=0.05), name
        published = [result["scores"][name][key][0] for key in ("mnist", "textures")]
        assert ours == pytest.approx(published, abs=4), name


def test_the_command_line_takes_it_by_name():
    loaded = create_model(f"featnorm:{NAME}")
    assert loaded.transform(Image.new("RGB", (50, 40), "red")).shape == loaded.input_size
    assert loaded.transform(Image.new("RGB", (32, 32), "red"))[:, 0, 0].tolist() == [1, 0, 0]
    with pytest.raises(ModelError, match="includes its weights"):
        create_model(f"featnorm:{NAME}", num_classes=5)
    with pytest.raises(ModelError, match=f"unknown model 'other'; available: {NAME}"):
        create_model("featnorm:other")


def test_its_hidden_classifier_explains(shared_data):
    source = open_source("cifar10:test[:150]", root=shared_data)
    pixels = image_tensor(source, 32, progress=False).float() / 255
    model = fn.load_model(NAME)
    explainer = fn.Explainer(model).fit(pixels.split(50), progress=False)
    with torch.no_grad():
        logits = model(pixels[:5])
    hidden = fn.FeatureTap(model).hidden(pixels[:5])
    torch.testing.assert_close(hidden.output_logits, logits, rtol=1e-4, atol=1e-4)
    assert [e.predicted for e in explainer(pixels[:5])] == logits.argmax(1).tolist()
    strange = image_tensor(open_source("ood32/mnist[:100]", root=shared_data), 32, progress=False).float() / 255

    def agreement(inputs):
        return sum(e.hidden_confidence / e.norm for e in explainer(inputs)) / len(inputs)

    assert agreement(pixels[:100]) > agreement(strange)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=f"unknown model 'resnet'; available: {NAME}"):
        fn.load_model("resnet")
