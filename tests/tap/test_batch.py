"""How batches of every form reach a model, and where their labels are found."""

import collections.abc
import copy
import operator
from collections import UserDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import featnorm as fn
from featnorm.tap import FeatureTap
from featnorm.tap.batch import BatchError, Signature, read_batch

pytestmark = pytest.mark.usefixtures("seeded")

N, IN, D, C = 6, 5, 8, 3


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, IN)


X, MASK, IDS = torch.randn(N, IN), torch.ones(N, 4), torch.arange(N * 4).reshape(N, 4)
Y, PAIR, SOFT, LENGTHS = torch.arange(N) % C, torch.arange(2), torch.rand(N, C), torch.arange(N) + 1
IMAGES = [torch.rand(3, 4 + i, 5) for i in range(N)]
XY = {"x": X, "y": Y}
WHOLE = {"image": X, "meta": MASK}
BY_NAME = {"input_ids": IDS, "labels": IDS}
TILES, BOXES = tuple(IMAGES), tuple({"boxes": X} for _ in IMAGES)
PACKED = pack_sequence([torch.rand(4, IN), torch.rand(2, IN)])
Pair = namedtuple("Pair", "image target")


class Graph:
    """A graph as torch_geometric's: its tensors are in a store, which refers to the graph."""

    def __init__(self, **tensors: Any) -> None:
        self._store = SimpleNamespace(_mapping=tensors, _parent=self)

    def __getattr__(self, name: str) -> Any:
        try:
            return vars(self)["_store"]._mapping[name]
        except KeyError:
            raise AttributeError(name) from None


GRAPH = Graph(x=X, edge_index=torch.zeros(2, 9, dtype=torch.int64), y=Y[:2], num_graphs=2)


def forward(of: Callable[..., Any]) -> Signature:
    """Return the signature of a model whose forward pass takes what a function does."""
    return Signature.of(SimpleNamespace(forward=of))  # type: ignore[arg-type]


ONE = forward(lambda x: x)
MASKED = forward(lambda x, mask=None: x)
TWO = forward(lambda x, m: x)
TEXT = forward(lambda input_ids, attention_mask=None, token_type_ids=None, labels=None: input_ids)
ANY = forward(lambda *args, **kwargs: args)
KEYWORDS = forward(lambda x, **kwargs: x)


def mapped(batch: dict[str, Tensor]) -> Tensor:
    return batch["image"]


def quoted(batch: "collections.abc.Mapping[str, Tensor]") -> Tensor:
    return batch["image"]


MAPPED, QUOTED = forward(mapped), forward(quoted)
DETECTION = forward(lambda images, targets=None: images)

# Signature, batch, labels=, arguments by position, arguments by name, labels.
READ: dict[str, tuple[Signature, Any, Any, tuple[Any, ...], dict[str, Any], Any]] = {
    "tensor": (ONE, X, None, (X,), {}, None),
    "tuple of one": (ONE, (X,), None, (X,), {}, None),
    "pair": (ONE, (X, Y), None, (X,), {}, Y),
    "named tuple": (ONE, Pair(X, Y), None, (X,), {}, Y),
    "named tuple, field": (ONE, Pair(X, Y), "target", (X,), {}, Y),
    "list of ints as labels": (ONE, [X, Y.tolist()], None, (X,), {}, Y.tolist()),
    "pair, optional mask": (MASKED, [X, Y], None, (X,), {}, Y),
    "x and mask": (MASKED, (X, MASK), None, (X, MASK), {}, None),
    "x, mask and labels": (MASKED, (X, MASK, Y), None, (X, MASK), {}, Y),
    "x, no mask and labels": (MASKED, (X, None, Y), None, (X,), {}, Y),
    "two required": (TWO, (X, Y), None, (X, Y), {}, None),
    "two required and labels": (TWO, (X, MASK, Y), None, (X, MASK), {}, Y),
    "ids, mask, labels": (TEXT, (IDS, MASK, Y), None, (IDS, MASK), {}, Y),
    "lengths": (forward(lambda x, lengths=None: x), (X, LENGTHS), None, (X, LENGTHS), {}, None),
    "lengths and labels": (forward(lambda x, lengths=None: x), (X, LENGTHS, Y), None, (X, LENGTHS), {}, Y),
    "graph in parts": (forward(lambda x, e, batch=None: x), (X, IDS, Y), None, (X, IDS, Y), {}, None),
    "soft labels": (ONE, (X, SOFT), None, (X,), {}, SOFT),
    "labels and paths": (ONE, (X, Y, ["a"] * N), None, (X,), {}, Y),
    "paths": (ONE, (X, ["a"] * N), None, (X,), {}, None),
    "index": (ONE, (Y, X), 0, (X,), {}, Y),
    "index from the end": (TWO, (X, Y, MASK), -2, (X, MASK), {}, Y),
    "anything": (ANY, (X, MASK, Y), None, (X, MASK), {}, Y),
    "images": (DETECTION, IMAGES, None, (IMAGES,), {}, None),
    "images and labels": (DETECTION, (IMAGES, Y), None, (IMAGES,), {}, Y),
    "images and targets of parts": (ONE, (TILES, BOXES), None, (TILES,), {}, BOXES),
    "packed": (ONE, PACKED, None, (PACKED,), {}, None),
    "packed and labels": (ONE, (PACKED, PAIR), None, (PACKED,), {}, PAIR),
    "graph": (ONE, GRAPH, None, (GRAPH,), {}, GRAPH.y),
    "graph, attribute": (ONE, GRAPH, "y", (GRAPH,), {}, GRAPH.y),
    "graph, function": (ONE, GRAPH, lambda batch: batch.y, (GRAPH,), {}, GRAPH.y),
    "mapping and labels": (TEXT, (BY_NAME, Y), None, (), BY_NAME, Y),
    "a mapping that the model takes": (forward(lambda batch: batch), (WHOLE, Y), None, (WHOLE,), {}, Y),
    "a mapping of several tensors": (forward(lambda batch: batch), WHOLE, None, (WHOLE,), {}, None),
    "a mapping of several tensors and labels": (
        forward(lambda batch: batch), {**WHOLE, "y": Y, "path": "a"}, None, ({**WHOLE, "path": "a"},), {}, Y,
    ),
    "an option beside the mapping": (forward(lambda batch, full=False: batch), WHOLE, None, (WHOLE,), {}, None),
    "a mapping and further names": (KEYWORDS, WHOLE, None, (WHOLE,), {}, None),
    "an argument that is a mapping": (MAPPED, {"image": X, "label": Y}, None, ({"image": X},), {}, Y),
    "an argument that is a mapping, by a string": (QUOTED, {"image": X}, None, ({"image": X},), {}, None),
    "a mapping by its name": (MAPPED, {"batch": WHOLE, "y": Y}, None, (), {"batch": WHOLE}, Y),
    "labels that the model requires": (forward(lambda x, y: x), XY, "y", (), XY, Y),
    "mapping": (ONE, {"x": X, "y": Y}, None, (), {"x": X}, Y),
    "mapping of another name": (ONE, {"image": X, "label": Y, "path": ["a"]}, None, (X,), {}, Y),
    "user dict": (TEXT, UserDict(input_ids=IDS, labels=Y), None, (), {"input_ids": IDS}, Y),
    "labels that the model takes": (TEXT, BY_NAME, None, (), BY_NAME, None),
    "by name": (MASKED, {"mask": MASK, "x": X, "none": None}, None, (), {"x": X, "mask": MASK}, None),
    "options": (forward(lambda x, scale=1: x), {"x": X, "scale": 2}, None, (), {"x": X, "scale": 2}, None),
    "y is an argument": (forward(lambda x, y: x), XY, None, (), XY, None),
    "mapping, key": (ONE, {"x": X, "kind": Y}, "kind", (), {"x": X}, Y),
    "mapping, function": (ONE, {"x": X, "kind": Y}, lambda b: b["kind"], (), {"x": X}, Y),
    "mapping to anything": (ANY, {"x": X, "m": MASK, "label": Y}, None, (), {"x": X, "m": MASK}, Y),
    "one more name": (KEYWORDS, {"image": X, "y": Y}, None, (X,), {}, Y),
    "further names": (KEYWORDS, {"x": X, "m": MASK}, None, (), {"x": X, "m": MASK}, None),
}  # fmt: skip


@pytest.mark.parametrize("form", READ)
def test_the_arguments_and_the_labels(form: str) -> None:
    signature, batch, where, args, kwargs, labels = READ[form]
    call = read_batch(batch, signature, where)
    for got, expected in zip(call.args, args, strict=True):
        if isinstance(expected, dict):
            assert list(got) == list(expected)
            got, expected = [*got.values()], [*expected.values()]
        assert got is expected or (type(got) is list and all(map(operator.is_, got, expected)))
    assert {key: id(value) for key, value in call.kwargs.items()} == {k: id(v) for k, v in kwargs.items()}
    assert call.labels is labels or (type(labels) is list and call.labels == labels)
    assert call.labels_given == (where is not None)


REFUSED: dict[str, tuple[Signature, Any, Any, str]] = {
    "meta beside x": (ONE, {"x": X, "meta": MASK}, None, r"'meta' .*, which the model's forward\(x\) does not"),
    "a third tensor": (ONE, (X, MASK, Y), None, r"holds item 1 \(torch.float32 of shape \(6, 4\)\)"),
    "two kinds of labels": (ONE, (X, Y, Y + 0), None, r"holds item 1 \(torch.int64"),
    "chosen label, other left": (ONE, (X, Y, MASK), 1, r"holds item 2 \(torch.float32"),
    "a second label": (ONE, {"x": X, "label": Y, "target": SOFT}, None, "holds 'target'"),
    "an argument is missing": (TWO, (X,), None, r"forward\(x, m\) requires m, and the batch has none"),
    "an argument is missing by name": (TWO, {"x": X, "y": Y}, None, r"requires m, and the batch"),
    "no such index": (ONE, (X, Y), 2, "labels=2, and the batch has 2 items"),
    "no such key": (ONE, {"x": X, "y": Y}, "kind", "labels='kind', and the batch has only x, y"),
    "no such attribute": (ONE, GRAPH, "kind", "labels='kind', and the batch is a Graph, without such a part"),
    "a name in a tuple": (ONE, (X, Y), "kind", "labels='kind', and the batch is a tuple"),
    "an index in a tensor": (ONE, X, 1, "labels=1, and the batch is a Tensor"),
    "no tensor": (ONE, {"x": [1, 2]}, None, r"is a dict with keys \['x'\], without a tensor of inputs"),
    "no rows": (ONE, torch.tensor(3.0), None, "is a Tensor, without a tensor of inputs"),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_every_tensor_reaches_the_model_or_is_named(form: str) -> None:
    signature, batch, where, message = REFUSED[form]
    with pytest.raises(ValueError, match=message):
        read_batch(batch, signature, where)


class Model(nn.Module):
    """A model of several arguments, all of which change the logits, in place if it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C)

    def head(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))

    def forward(self, x: Tensor, scale: Tensor, shift: Any = None) -> Tensor:
        x.mul_(scale[:, None])
        return self.head(x if shift is None else x + shift["by"][0])


def batches_of(x: Tensor) -> dict[str, Any]:
    scale, shift = torch.arange(1.0, N + 1), {"by": [torch.randn(N, IN)]}
    return {
        "tuple": (x, scale, shift),
        "tuple and labels": (x, scale, shift, Y),
        "mapping": {"scale": scale, "x": x, "shift": shift},
        "mapping and labels": UserDict(scale=scale, x=x, shift=shift, label=Y),
    }


@pytest.mark.parametrize("form", batches_of(torch.zeros(N, IN)))
def test_a_model_of_several_arguments(form: str, x: Tensor) -> None:
    model = Model().eval()
    batch = batches_of(x)[form]
    before = copy.deepcopy(batch)
    (x, scale, shift) = batch[:3] if isinstance(batch, tuple) else (batch["x"], batch["scale"], batch["shift"])
    with torch.no_grad():
        expected = model(x.clone(), scale, shift)
    features = FeatureTap(model).extract([batch])
    torch.testing.assert_close(features.logits, expected)
    torch.testing.assert_close(features.activation @ features.linear()[0].T + features.linear()[1], expected)
    assert (features.labels is not None) == ("labels" in form)
    assert repr(before) == repr(batch), "the model wrote to the caller's batch"
    scorer = fn.Scorer(model, fn.KNN(k=1)).fit([batch]).calibrate([batch], tpr=0.5)
    assert scorer(batch).score.shape == (N,)


def test_labels_by_key_reach_a_detector(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C))
    tap = FeatureTap(model)
    features = tap.extract([{"x": x, "kind": Y}], labels="kind")
    assert torch.equal(features.labels, Y)
    assert tap.extract([{"x": x, "kind": Y.tolist()}], "kind").labels.tolist() == Y.tolist()
    (streamed,) = tap.stream([{"x": x, "kind": Y}], labels=lambda batch: batch["kind"])
    assert torch.equal(streamed.labels, Y)
    assert torch.equal(tap((x, Y)).labels, Y)
    with pytest.raises(
        ValueError, match=r"the labels are torch.float32 of shape \(6, 3\), and must be one integer"
    ):
        tap.extract([{"x": x, "kind": SOFT}], labels="kind")


def test_the_labels_of_some_other_number_of_inputs(x: Tensor) -> None:
    class Pooled(Model):
        def forward(self, x: Tensor, batch: Tensor | None = None) -> Tensor:
            return self.head(torch.stack([x[batch == i].mean(0) for i in range(int(batch.max()) + 1)]))

    batch = (x, torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([2, 0, 1]))
    features = FeatureTap(Pooled()).extract([batch])
    assert features.logits.shape == (3, C)
    assert features.labels.tolist() == [2, 0, 1]


def test_a_graph_that_cannot_be_cut(x: Tensor) -> None:
    class Dense(Model):
        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.head(adjacency @ x)

    model, adjacency = Dense().eval(), torch.rand(N, N)
    expected = model.head(adjacency @ x).detach()
    torch.testing.assert_close(FeatureTap(model)((x, adjacency)).logits, expected)


def test_an_object_is_passed_as_it_is(x: Tensor) -> None:
    class Network(Model):
        def forward(self, graph: Any) -> Tensor:
            return self.head(graph.x.mul_(2)[:2])

    model = Network().eval()
    graph = Graph(x=x, y=Y[:2], num_graphs=2)
    expected = model.head(2 * x[:2]).detach()
    features = FeatureTap(model).extract([graph])
    torch.testing.assert_close(features.logits, expected)
    assert features.activation.shape == (2, D)
    assert torch.equal(features.labels, Y[:2])
    torch.testing.assert_close(FeatureTap(model)(graph).logits, expected)


def test_packed_sequences_and_sequences_along_the_first_axis() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.GRU(IN, D), nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, C))

        def forward(self, x: Tensor | PackedSequence) -> Tensor:
            return self.last(self.rnn(x)[1][-1])

    model = Recurrent().eval()
    sequences = [torch.randn(4, IN), torch.randn(7, IN), torch.randn(3, IN)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    features = FeatureTap(model).extract([(packed, torch.tensor([0, 2, 1])), (packed, torch.tensor([1, 1, 1]))])
    expected = torch.cat([model(sequence[:, None]) for sequence in sequences]).detach()
    torch.testing.assert_close(features.logits, torch.cat([expected] * 2))
    assert features.labels.tolist() == [0, 2, 1, 1, 1, 1]
    long = torch.randn(9, 4, IN)
    torch.testing.assert_close(FeatureTap(model).extract([(long, Y[:4])]).logits, model(long).detach())


def test_a_list_of_images() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, D, 3), nn.Linear(D, C)

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.last(torch.stack([F.relu(self.conv(image[None])).mean((0, 2, 3)) for image in images]))

    model = Padded().eval()
    expected = model(IMAGES).detach()
    tap = FeatureTap(model)
    assert torch.equal(tap(IMAGES).logits, expected)
    features = tap.extract([(TILES, BOXES)])
    assert torch.equal(features.logits, expected)
    assert "must be one integer per input" in features.absent["labels"]


def test_a_batch_moves_to_the_device_of_the_model_and_the_callers_stays() -> None:
    class Movable(SimpleNamespace):
        def to(self, device: torch.device) -> "Movable":
            self.x = self.x.to(device)
            return self

    class Network(Model):
        def forward(self, batch: Any) -> Tensor:
            return self.head(batch.x)

    batch = Movable(x=torch.randn(N, IN))
    tap = FeatureTap(Network().eval()).trace(batch)
    tap.model.to("meta")  # holds no values, which is enough to test devices without a GPU
    assert tap(batch).logits.device.type == "meta"
    assert batch.x.device.type == "cpu"
    packed = FeatureTap(nn.GRU(IN, D))
    assert read_batch(PACKED, packed._signature).to(torch.device("meta")).args[0].data.device.type == "meta"


def test_a_batch_encoding_of_transformers() -> None:
    encoding = pytest.importorskip("transformers").BatchEncoding({"input_ids": IDS, "labels": Y})
    call = read_batch(encoding, TEXT)
    assert (call.args, list(call.kwargs), call.labels is Y) == ((), ["input_ids"], True)


def test_detectors_that_change_the_input_of_a_mapping(x: Tensor) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.last = nn.Embedding(N * 4, D), nn.Linear(D, C)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.last(F.relu(self.embed(input_ids)).mean(1))

    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C))
    odin = fn.ODIN()
    expected = fn.Scorer(net, odin)(x).score
    assert torch.equal(fn.Scorer(net, odin)({"input": x, "label": Y}).score, expected)
    assert torch.equal(fn.Scorer(net, odin)((x, Y)).score, expected)
    with pytest.raises(ValueError, match=r"needs one floating-point tensor in the batch.*takes torch.int64 of"):
        fn.Scorer(Text(), odin)({"input_ids": IDS})


def test_the_hidden_classifier_of_a_model_of_several_arguments(x: Tensor) -> None:
    model = Model().eval()
    batch = {"x": x, "scale": torch.arange(1.0, N + 1)}
    found = FeatureTap(model).hidden(batch)
    with torch.no_grad():
        torch.testing.assert_close(found.output_logits, model(x.clone(), batch["scale"]))


@pytest.mark.parametrize("form", ["double", "bytes", "float into bfloat16", "one vector", "one image"])
def test_a_batch_of_another_precision_or_shape_is_named(form: str, x: Tensor) -> None:
    dense = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C))
    conv = nn.Sequential(nn.Conv2d(3, D, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, C))
    model, batch, message = {
        "double": (dense, x.double(), r"float64 and the model torch.float32: convert it, x.to\(torch.float32\)"),
        "bytes": (conv, torch.zeros(2, 3, 9, 9).byte(), r"is torch.uint8 and .* for example x.float\(\) / 255"),
        "float into bfloat16": (copy.deepcopy(dense).bfloat16(), x, r"convert it, x.to\(torch.bfloat16\)"),
        "one vector": (dense, x[0], r"has shape \(5,\): if it is one input, pass x\[None\]"),
        "one image": (conv, torch.rand(3, 9, 9), r"has shape \(3, 9, 9\): if it is one input, pass x\[None\]"),
    }[form]  # fmt: skip
    tap = FeatureTap(model)
    with pytest.raises(ValueError, match=message):
        tap(batch)
    with pytest.raises(ValueError, match=message) as error:
        tap.extract([batch])
    assert "\n" not in str(error.value)


def test_a_second_batch_of_inputs_is_no_labels():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    images = torch.randn(4, 3, 8, 8)
    with pytest.raises(BatchError, match="does not take"):
        FeatureTap(model)((images, images.clone()))


class OfMapping(nn.Module):
    """A classifier whose argument is a mapping, as the annotation says or not."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(IN, D), nn.Linear(D, C)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.last(self.hidden(batch["image"]).relu())


class Unannotated(OfMapping):
    def forward(self, batch):
        return self.last(self.hidden(batch["image"]).relu())


@pytest.mark.parametrize("detector", [fn.NAN(), fn.KNN(k=3), fn.ODIN()])
@pytest.mark.parametrize("form", ["mapping", "mapping and labels", "pair"])
def test_a_model_of_a_mapping_is_fitted_calibrated_and_called(detector: fn.Detector, form: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, IN), torch.arange(20) % C
    batches = {
        "mapping": {"image": x}, "mapping and labels": {"image": x, "label": y}, "pair": ({"image": x}, y),
    }  # fmt: skip
    kind = Unannotated if form == "pair" else OfMapping
    model = kind().eval()
    scorer = fn.Scorer(model, detector).fit([batches[form]]).calibrate([batches[form]])
    verdict = scorer(batches["pair" if form == "pair" else "mapping"])
    torch.testing.assert_close(verdict.logits, model({"image": x}).detach())
    tensors = nn.Sequential(model.hidden, nn.ReLU(), model.last)
    expected = fn.Scorer(tensors, copy.deepcopy(detector)).fit([x])(x)
    torch.testing.assert_close(verdict.score, expected.score)
    assert (scorer.tap.extract([batches[form]]).labels is None) == (form == "mapping")


def test_a_mapping_keeps_its_type() -> None:
    class Model(OfMapping):
        def forward(self, batch: UserDict) -> Tensor:
            return super().forward(batch.data)

    model = Model().eval()
    batch = UserDict(image=torch.randn(N, IN), mask=MASK)
    torch.testing.assert_close(FeatureTap(model)(batch).logits, model(batch).detach())


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (
            Unannotated(),
            {"image": X},
            r"forward\(batch\) was given item 'image' .*annotate its argument as a dict",
        ),
        (Unannotated(), X, r"takes a mapping, and the batch is a tensor: .* model\(\{'image': x\}\)"),
        (OfMapping(), X, "takes a mapping, and the batch is a tensor"),
        (
            nn.Linear(IN, C),
            WHOLE,
            r"'image' \(torch.* and 'meta' \(.*\(6, 4\)\), which the model's forward\(input\) does not take.* was "
            "given the mapping itself",
        ),
    ],
)
def test_a_mapping_that_is_not_what_the_model_takes(model: nn.Module, batch: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        FeatureTap(model)(batch)
