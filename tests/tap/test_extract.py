"""`FeatureTap.extract` and `stream` over loaders of every shape."""

from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from featnorm.features import Features
from featnorm.tap import FeatureTap

pytestmark = pytest.mark.usefixtures("seeded")

N, IN, D, C = 10, 5, 8, 3
Pair = namedtuple("Pair", "image target")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, IN)


@pytest.fixture
def y() -> Tensor:
    return torch.arange(N) % C


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C))
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.net(x)


@pytest.fixture
def model() -> Counting:
    return Counting().eval()


def assert_features(features: Features, model: Counting, x: Tensor, y: Tensor | None = None) -> None:
    hidden = model.net[:2](x).detach()
    torch.testing.assert_close(features.activation, hidden)
    torch.testing.assert_close(features.pooled, hidden)
    torch.testing.assert_close(features.logits, model.net(x).detach())
    assert features.activation is features.pooled, "one tensor is kept twice"
    weight, bias = features.linear()
    torch.testing.assert_close(weight, model.net[2].weight.detach())
    torch.testing.assert_close(bias, model.net[2].bias.detach())
    if y is None:
        assert features.labels is None
    else:
        assert features.labels.dtype == y.dtype
        assert torch.equal(features.labels, y)
    assert len(features) == len(x)


def batches(x: Tensor, size: int = 4) -> list[slice]:
    return [slice(i, i + size) for i in range(0, len(x), size)]


LABELLED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "triple": lambda x, y: (x, y, ["a.png"] * len(x)),
    "named tuple": lambda x, y: Pair(x, y),
    **{
        f"dict {image} {label}": lambda x, y, image=image, label=label: {label: y, "path": ["p"], image: x}
        for image, label in [
            ("image", "label"),
            ("images", "labels"),
            ("pixel_values", "labels"),
            ("input", "target"),
            ("inputs", "targets"),
            ("x", "y"),
            ("img", "class"),
            ("data", "label"),
        ]
    },
    "mapping": lambda x, y: UserDict(image=x, label=y),
}
UNLABELLED: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple of one": lambda x: (x,),
    "list of one": lambda x: [x],
    "dict": lambda x: {"pixel_values": x},
    "label None": lambda x: (x, None),
    "dict, label None": lambda x: {"image": x, "label": None},
    "boxes": lambda x: (x, torch.rand(len(x), 4)),
    "soft labels": lambda x: (x, torch.rand(len(x))),
    "mask": lambda x: (x, torch.ones(len(x), dtype=torch.bool)),
    "paths": lambda x: (x, ["a.png"] * len(x)),
    "one label too few": lambda x: (x, torch.zeros(len(x) - 1, dtype=torch.long)),
}


@pytest.mark.parametrize("form", LABELLED)
def test_loaders_with_labels(form: str, model: Counting, x: Tensor, y: Tensor) -> None:
    make = LABELLED[form]
    features = FeatureTap(model).extract([make(x[rows], y[rows]) for rows in batches(x)])
    assert_features(features, model, x, y)


@pytest.mark.parametrize("form", UNLABELLED)
def test_loaders_without_labels(form: str, model: Counting, x: Tensor) -> None:
    make = UNLABELLED[form]
    features = FeatureTap(model).extract([make(x[rows]) for rows in batches(x)])
    assert_features(features, model, x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int64])
def test_the_type_of_the_labels(dtype: torch.dtype, model: Counting, x: Tensor, y: Tensor) -> None:
    assert_features(FeatureTap(model).extract([(x, y.to(dtype))]), model, x, y.to(dtype))


@pytest.mark.parametrize("size", [1, 3, 4, N, 100])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_data_loader_of_torch_in_its_order(
    shuffle: bool, size: int, model: Counting, x: Tensor, y: Tensor
) -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(x, torch.arange(N)), batch_size=size, shuffle=shuffle, generator=generator)
    features = FeatureTap(model).extract(loader)
    assert sorted(features.labels.tolist()) == list(range(N))
    assert shuffle == (features.labels.tolist() != list(range(N)))
    assert_features(features, model, x[features.labels], features.labels)


def test_a_loader_that_is_an_iterator_without_a_length(model: Counting, x: Tensor, y: Tensor) -> None:
    features = FeatureTap(model).extract((x[rows], y[rows]) for rows in batches(x))
    assert_features(features, model, x, y)


@pytest.mark.parametrize("first", [1, 2, 4])
def test_one_forward_pass_a_batch_once_the_model_was_traced(first: int, model: Counting, x: Tensor) -> None:
    tap = FeatureTap(model).trace(x[:first])
    model.sizes.clear()
    tap.extract([x[rows] for rows in batches(x, 3)])
    assert model.sizes == [3, 3, 3, 1]
    model.sizes.clear()
    tap(x)
    assert model.sizes == [N]


def test_finding_the_layers_costs_one_small_pass(model: Counting, x: Tensor) -> None:
    FeatureTap(model).extract([x[rows] for rows in batches(x, 5)])
    assert sorted(model.sizes) == [2, 5, 5], "besides one pass on two rows, every batch is seen once"


def test_a_tap_that_is_reused_does_not_trace_again(model: Counting, x: Tensor, y: Tensor) -> None:
    tap = FeatureTap(model)
    tap.extract([x])
    model.sizes.clear()
    assert_features(tap.extract([(x, y)]), model, x, y)
    assert model.sizes == [N]


def test_stream_yields_batch_by_batch_and_no_sooner(model: Counting, x: Tensor, y: Tensor) -> None:
    tap = FeatureTap(model).trace(x)
    model.sizes.clear()
    taken: list[int] = []

    def loader() -> Iterator[Any]:
        for i, rows in enumerate(batches(x)):
            taken.append(i)
            yield x[rows], y[rows]

    stream = tap.stream(loader())
    assert (taken, model.sizes) == ([], [])
    for i, (features, rows) in enumerate(zip(stream, batches(x), strict=True)):
        assert taken == list(range(i + 1))
        assert model.sizes == [4, 4, 2][: i + 1]
        sizes = list(model.sizes)
        assert_features(features, model, x[rows], y[rows])
        model.sizes[:] = sizes


def test_stream_and_extract_agree(model: Counting, x: Tensor, y: Tensor) -> None:
    tap = FeatureTap(model)
    loader = [(x[rows], y[rows]) for rows in batches(x)]
    joined = Features.cat(list(tap.stream(loader)))
    whole = tap.extract(loader)
    for (name, a), (_, b) in zip(joined.fields(), whole.fields(), strict=True):
        assert torch.equal(a, b), name
    assert whole.absent == joined.absent == tap(x).absent


def test_features_are_on_the_cpu_and_carry_no_graph(model: Counting, x: Tensor) -> None:
    features = FeatureTap(model).extract([x.requires_grad_()])
    for name, value in features.fields():
        assert value.device.type == "cpu", name
        assert not value.requires_grad, name


def test_a_batch_moves_to_the_device_of_the_model() -> None:
    # The meta device holds no values, which is enough to test devices without a GPU.
    tap = FeatureTap(Counting().eval()).trace(torch.randn(2, IN))
    tap.model.to("meta")
    (features,) = tap.stream([(torch.randn(4, IN), torch.zeros(4, dtype=torch.long))])
    assert {value.device.type for name, value in features.fields() if name != "labels"} == {"meta"}
    assert features.classifier[0].device.type == "meta"


def test_the_labels_are_where_the_features_are() -> None:
    tap = FeatureTap(Counting().eval()).trace(torch.randn(2, IN))
    tap.model.to("meta")
    (features,) = tap.stream([(torch.randn(4, IN), torch.zeros(4, dtype=torch.long))])
    assert features.labels.device == features.logits.device


def test_every_batch_reusing_one_block_of_memory(x: Tensor) -> None:
    # As in loaders with pinned memory; here the pooled feature is the input itself.
    model = nn.Linear(IN, C).eval()
    block = torch.empty(2, IN)

    def loader() -> Iterator[Tensor]:
        for rows in batches(x, 2):
            yield block.copy_(x[rows])

    torch.testing.assert_close(FeatureTap(model).extract(loader()).pooled, x)


@pytest.mark.parametrize("progress", [True, False, None])
def test_the_progress_bar(progress: bool | None, model: Counting, x: Tensor, capfd: Any) -> None:
    tap = FeatureTap(model)
    for run in (tap.extract, lambda *a, **k: list(tap.stream(*a, **k))):
        run([x[rows] for rows in batches(x)], progress=progress)
        out, err = capfd.readouterr()
        assert out == ""
        # None shows a bar on a terminal, which standard error is not here.
        assert ("3/3" in err or "batch" in err) == (progress is True), err


def test_describe_and_trace_print_nothing(model: Counting, x: Tensor, capfd: Any) -> None:
    FeatureTap(model).trace(x).describe()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("loader", [[], (), iter(())])
def test_an_empty_loader_is_refused(loader: Any, model: Counting) -> None:
    with pytest.raises(ValueError, match="loader yielded no batch"):
        FeatureTap(model).extract(loader)
    with pytest.raises(ValueError, match="loader yielded no batch"):
        list(FeatureTap(model).stream(loader))


def test_a_loader_that_is_exhausted_is_refused(model: Counting, x: Tensor) -> None:
    loader = iter([x])
    tap = FeatureTap(model)
    tap.extract(loader)
    with pytest.raises(ValueError, match="loader yielded no batch"):
        tap.extract(loader)


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_batch_without_rows(where: str, model: Counting, x: Tensor, y: Tensor) -> None:
    loader = [(x[rows], y[rows]) for rows in batches(x)]
    loader.insert({"first": 0, "middle": 1, "last": 3}[where], (x[:0], y[:0]))
    assert_features(FeatureTap(model).extract(loader), model, x, y)


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ({"picture": 1, "label": 2}, "picture"),
        ({}, "dict"),
        ("a string", "str"),
        (None, "NoneType"),
        (7, "int"),
        ((), "tuple"),
        (("a.png", 3), "tuple"),
        (([1.0, 2.0], 3), "tuple"),
        (torch.tensor(3.0), "Tensor"),
    ],
    ids=str,
)
def test_a_batch_without_inputs_is_refused_by_its_number(
    batch: Any, what: str, model: Counting, x: Tensor
) -> None:
    with pytest.raises(ValueError, match=f"batch 1 of the loader.*{what}"):
        FeatureTap(model).extract([x, batch])


def test_a_key_that_holds_none_does_not_hide_the_inputs(model: Counting, x: Tensor, y: Tensor) -> None:
    batch = {"image": None, "pixel_values": x, "label": None, "labels": y}
    assert_features(FeatureTap(model).extract([batch]), model, x, y)


def test_labels_that_only_some_batches_have(model: Counting, x: Tensor, y: Tensor) -> None:
    with pytest.raises(ValueError, match="batch 1"):
        FeatureTap(model).extract([(x, y), x])


def test_a_tensor_instead_of_a_loader_is_refused_or_taken_as_a_batch(model: Counting, x: Tensor) -> None:
    # Iterating a tensor yields rows, which the model would take for batches.
    try:
        features = FeatureTap(model).extract(x)
    except (ValueError, TypeError) as error:
        assert "loader" in str(error)  # noqa: PT017
    else:
        assert_features(features, model, x)


def test_a_data_set_instead_of_a_loader_is_refused(x: Tensor, y: Tensor) -> None:
    images = torch.randn(4, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, D, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, C))
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        FeatureTap(net).extract(TensorDataset(images, y[:4]))


def test_images_of_different_sizes_from_batch_to_batch() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, D, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, C)
    ).eval()
    loader = [torch.randn(2, 3, 8, 8), torch.randn(3, 3, 12, 9), torch.randn(1, 3, 3, 3)]
    features = FeatureTap(net).extract(loader)
    torch.testing.assert_close(features.activation, torch.cat([net[:4](x) for x in loader]).detach())


def test_maps_of_another_size_are_averaged_all_the_same() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, D, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, C)
    ).eval()
    loader = [torch.randn(2, 3, 8, 8), torch.randn(3, 3, 3, 3)]
    features = FeatureTap(net, "1").extract(loader)
    torch.testing.assert_close(features.activation, torch.cat([net[:2](x).mean((2, 3)) for x in loader]).detach())
