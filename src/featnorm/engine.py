"""`Engine`: runs a network by onnxruntime, which on CPUs is about twice as fast as PyTorch."""

import copy
import hashlib
import inspect
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import featnorm
from featnorm import archive
from featnorm._utils.errors import first_line
from featnorm._utils.files import replacing
from featnorm.features import Features
from featnorm.inputs.kinds import FRAMES, IMAGES, ROWS, Inputs, Kind, rows_in, run
from featnorm.inputs.loading import PassSize
from featnorm.runtime import Runtime
from featnorm.tap import FeatureTap
from featnorm.tap.contents import Contents

#: Number of items from which ``engine="auto"`` exports a network. The export takes about as long as onnxruntime
#: saves on a thousand images of EfficientNet-Lite0.
MIN_ITEMS = 1000
#: Folder of exported graphs.
DEFAULT_CACHE = "~/.cache/featnorm/engines"
#: Largest difference between onnxruntime and PyTorch, relative to the largest value.
TOLERANCE = 1e-4
#: What a preprocess does that resizes or crops images to no fixed size.
SEVERAL_SIZES = "the preprocess returns images of different sizes"
_PLAIN = (str, bytes, int, float, tuple, type(None))
_PACKAGES = ("torch", "onnxruntime", "onnxscript")


class EngineError(ValueError):
    """A network cannot be run by onnxruntime."""


class Engine:
    """A network from a batch to tensors (n, ...), run by onnxruntime on the CPU.

    Parameters
    ----------
    model : exported graph, an ONNX model as bytes.
    example : a batch that the network takes.

    Attributes
    ----------
    seconds : float
        Time that all runs together took.
    """

    def __init__(self, model: bytes, example: Inputs) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle threads would otherwise take the CPUs from those that decode images.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self.seconds = 0.0
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._names = [one.name for one in self._session.get_inputs()]
        self._example = self._named(example)

    def _named(self, inputs: Inputs) -> Mapping[str, Tensor]:
        return named_inputs(inputs, self._names[0])

    def takes(self, inputs: Inputs) -> bool:
        """Whether a batch has the types and shapes of the example; texts may have other lengths."""
        given, fixed = self._named(inputs), isinstance(inputs, Tensor)
        return given.keys() == self._example.keys() and all(
            value.dtype == one.dtype and (value.shape[1:] == one.shape[1:] if fixed else value.ndim == one.ndim)
            for value, one in ((given[name], self._example[name]) for name in given)
        )

    def features(self, otherwise: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
        """Return a function from a batch to the first output, by another one for batches that it does not take."""
        return lambda inputs: self(inputs)[0] if self.takes(inputs) else otherwise(inputs)

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        """Return the outputs for a batch that the engine `takes`."""
        began = time.perf_counter()
        given = self._named(inputs)
        found = self._session.run(None, {name: given[name].numpy(force=True) for name in self._names})
        self.seconds += time.perf_counter() - began
        return [torch.from_numpy(value) for value in found]


class _Network(nn.Module):
    """A network that takes a batch as one argument, and returns a tuple."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        found = run(self.module, inputs)
        return found if isinstance(found, tuple) else (found,)


class _Captured(nn.Module):
    """What a tap captures: the distinct tensors among its fields."""

    def __init__(self, tap: FeatureTap, names: Sequence[str]) -> None:
        super().__init__()
        self.tap = copy.deepcopy(tap)
        self.model = self.tap.model.eval()
        self.names = names

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        features = self.tap.traced(inputs)
        return tuple(features.tensor(name) for name in self.names)


class FeatureEngine:
    """The features that a tap captures, computed by onnxruntime.

    Parameters
    ----------
    tap : tap of a model on the CPU, which has traced it.
    kind, preprocess : what the model's inputs are made from.

    Raises
    ------
    EngineError
        The network cannot be exported, or onnxruntime does not reproduce PyTorch.
    """

    def __init__(self, tap: FeatureTap, kind: Kind, preprocess: Callable[[Any], Any]) -> None:
        if tap.per != "input":
            raise EngineError(f"its features are of each {tap.per}")
        self.example = example_batch(kind, preprocess)
        features = tap.capture(self.example, classifier=False)
        distinct: dict[int, str] = {}
        self._fields = {name: distinct.setdefault(id(value), name) for name, value in features.fields()}
        self._names = list(distinct.values())
        self._tap, self._absent = tap, features.absent
        self._versions = _versions(tap.contents())
        self._engine = engine_of(
            lambda: _Captured(tap, self._names), tap.model, self.example, kind, {"tap": tap.to_dict()}
        )

    @property
    def seconds(self) -> float:
        """Time that all runs together took."""
        return self._engine.seconds

    def features(self, inputs: Inputs, contents: Contents, *, classifier: bool) -> Features | None:
        """Return the features of a batch; None if the engine does not take it, or the model has changed.

        Parameters
        ----------
        inputs : batch of preprocessed inputs.
        contents : the model's contents now.
        classifier : whether to copy the classifier's weights.
        """
        if _versions(contents) != self._versions or not self._engine.takes(inputs):
            return None
        found = dict(zip(self._names, self._engine(inputs), strict=True))
        fields: dict[str, Any] = {name: found[other] for name, other in self._fields.items()}
        weights = self._tap.classifier() if classifier else None
        return Features(**fields, classifier=weights, absent=self._absent)


def _versions(contents: Contents) -> Any:
    """Return what changes with any tensor of a model, those that are not in its state included."""
    others = [
        (id(buffer), buffer._version)
        for module in contents.modules
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set and buffer is not None and not buffer.is_inference()
    ]
    return contents.versions(), others


def is_wanted(runtime: Runtime, kind: Kind, device: torch.device, count: int) -> bool:
    """Whether onnxruntime runs a network, by the runtime's ``engine``.

    Parameters
    ----------
    runtime : see `Runtime`.
    kind : what the items are.
    device : device of the network. With a cluster, that of its actors is used instead.
    count : number of items.

    Raises
    ------
    ValueError
        ``engine`` is "onnx", and the device is not a CPU, or the precision is mixed.
    ImportError
        ``engine`` is "onnx", and ``featnorm[onnx]`` is not installed.
    """
    if runtime.engine == "torch":
        return False
    if runtime.cluster is not None:
        device = torch.device(runtime.cluster.actors.device)
    possible = device.type == "cpu" and runtime.precision == "32-true"
    missing = next((name for name in _PACKAGES if find_spec(name) is None), None)
    if runtime.engine == "auto":
        return possible and missing is None and kind is not ROWS and count >= MIN_ITEMS
    if not possible:
        raise ValueError(
            f"the engine onnx runs on a CPU in 32-true; got {device.type}, {runtime.precision}: use the engine "
            "auto or torch"
        )
    if missing is not None:
        raise ImportError(f"the engine onnx needs {missing}: pip install 'featnorm[onnx]'")
    return True


def pass_size(runtime: Runtime, kind: Kind, device: torch.device, count: int) -> PassSize | None:
    """Return what chooses the number of images that PyTorch runs at a time; None for whole batches.

    Parameters
    ----------
    runtime, kind, device, count : see `is_wanted`.
    """
    is_chosen = runtime.batch_size is None and device.type == "cpu" and count >= MIN_ITEMS
    return PassSize() if is_chosen and kind in (IMAGES, FRAMES) else None


def required_or_none(runtime: Runtime, make: Callable[[], Any]) -> Any:
    """Return what a function makes; if it raises an EngineError and the engine is "auto", warn and return None."""
    try:
        return make()
    except EngineError as error:
        if runtime.engine == "onnx":
            raise
        warnings.warn(
            f"PyTorch runs the model, not onnxruntime: {error}. To hide this note, choose the engine torch "
            "(--engine torch)",
            stacklevel=2,
        )
        return None


def network_engine(module: nn.Module, kind: Kind, preprocess: Callable[[Any], Any]) -> Engine:
    """Return an engine that runs a module from inputs to features (n, D).

    Parameters
    ----------
    module : module in evaluation mode, on the CPU.
    kind, preprocess : what its inputs are made from.

    Raises
    ------
    EngineError
        See `FeatureEngine`.
    """
    return engine_of(lambda: _Network(module), module, example_batch(kind, preprocess), kind, {})


def example_batch(kind: Kind, preprocess: Callable[[Any], Any]) -> Inputs:
    """Return a batch of two inputs, made from the items by which one preprocess is told from another."""
    prepared = [preprocess(item) for item in kind.probes(preprocess)]
    if several_sizes(prepared):
        raise EngineError(f"{SEVERAL_SIZES}: add a resize or crop to one size")
    try:
        batch: Inputs = kind.collate((prepared * 2)[:2], preprocess)
    except (RuntimeError, TypeError, ValueError) as error:
        raise EngineError(f"its inputs have no fixed shape: {first_line(error)}") from None
    return batch


def several_sizes(prepared: Sequence[Any]) -> bool:
    """Whether preprocessed inputs are images (c, H, W) of different heights or widths."""
    shapes = {tuple(one.shape) for one in prepared if isinstance(one, Tensor)}
    return len(shapes) > 1 and {len(shape) for shape in shapes} == {3} and len({shape[0] for shape in shapes}) == 1


@torch.no_grad()
def engine_of(
    graph_of: Callable[[], nn.Module], model: nn.Module, example: Inputs, kind: Kind, about: Mapping[str, Any]
) -> Engine:
    """Return an engine for a graph, exported or from the cache, that was compared with PyTorch.

    Parameters
    ----------
    graph_of : function that returns the module to export, from a batch to a tuple of tensors.
    model : the model whose weights it has.
    example : batch of two inputs.
    kind : what the inputs are.
    about : anything else that the graph depends on, as plain data.
    """
    sizes = {name: [*value.shape[1:]] for name, value in named_inputs(example, kind.name).items()}
    versions = {name: metadata.version(name) for name in _PACKAGES}
    key = {"weights": archive.fingerprint(model), "inputs": sizes, "versions": versions, **about}
    code = _code_of(model)
    name = hashlib.sha256(json.dumps([featnorm.__version__, key, code], sort_keys=True).encode()).hexdigest()
    path = Path(DEFAULT_CACHE).expanduser() / f"{name}.onnx"
    try:
        graph = graph_of().eval()
        if code is not None and path.exists():
            # Code that the digest does not cover may have changed, or the file be damaged: it is exported again.
            with suppress(Exception):
                return _compared(Engine(path.read_bytes(), example), graph, example)
        outputs = [f"output {i}" for i in range(len(graph(example)))]
        model_bytes = exported(graph, example, kind, outputs).SerializeToString()
        engine = _compared(Engine(model_bytes, example), graph, example)
    except EngineError:
        raise
    # The exporter wraps every error, in messages of many lines.
    except Exception as error:
        raise EngineError(f"it cannot be exported: {first_line(error.__cause__ or error)}") from error
    if code is None:
        return engine
    with suppress(OSError):  # the cache cannot be written
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            Path(temporary).write_bytes(model_bytes)
    return engine


def _code_of(model: nn.Module) -> str | None:
    """Return a digest of a model's code and plain settings; None if a source cannot be read.

    Weights alone do not tell ReLU from ReLU6. The code is that of the files that define the classes of its
    modules, except torch's own, whose version is known.
    """
    hashed = hashlib.sha256(repr(model).encode())
    classes = {base for module in model.modules() for base in type(module).__mro__}
    known = ("torch", "builtins")
    try:
        files = {inspect.getfile(one) for one in classes if one.__module__.partition(".")[0] not in known}
        for file in sorted(files):
            hashed.update(Path(file).read_bytes())
    except (OSError, TypeError):
        return None
    for module in model.modules():
        settings = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
        hashed.update(repr(sorted(settings.items(), key=lambda pair: pair[0])).encode())
    return hashed.hexdigest()


def _compared(engine: Engine, graph: nn.Module, example: Inputs) -> Engine:
    """Return an engine; raise an EngineError if it does not reproduce PyTorch for batches of several sizes."""
    for rows in ([0], [0, 1, 1]):
        inputs = rows_in(example, rows)
        for found, expected in zip(engine(inputs), graph(inputs), strict=True):
            if found.shape != expected.shape:
                raise EngineError(f"its output has shape {tuple(found.shape)}, PyTorch's {tuple(expected.shape)}")
            if not (gap := relative_gap(found, expected)) <= TOLERANCE:
                raise EngineError(f"its output differs from PyTorch's by {gap:.1e} of the largest value")
    engine.seconds = 0.0
    return engine


def named_inputs(inputs: Inputs, name: str) -> Mapping[str, Tensor]:
    """Return the tensors of a batch by the names of a graph's inputs, of which a single one has a name of its own.

    Raises
    ------
    EngineError
        The batch is a list of images of different sizes.
    """
    if isinstance(inputs, list):
        raise EngineError("it takes lists of images of different sizes")
    return inputs if isinstance(inputs, Mapping) else {name: inputs}


def exported(
    graph: nn.Module, example: Inputs, kind: Kind, outputs: Sequence[str], *, any_size: bool = False
) -> Any:
    """Return a module as an ``onnx.ModelProto`` for any batch size and, of texts, any length.

    Parameters
    ----------
    graph : module in evaluation mode that takes a batch as its argument ``inputs``, and returns a tuple.
    example : batch of at least two inputs: a size of 0 or 1 would become a constant of the graph.
    kind : what the inputs are.
    outputs : names of the outputs.
    any_size : whether the graph takes images of any height and width; a model may fix them nevertheless.
    """
    axes: dict[int, Any] = {0: torch.export.Dim("n", min=1)}
    shapes: Any = axes | ({2: "height", 3: "width"} if any_size else {})
    if not isinstance(example, Tensor):
        shapes = dict.fromkeys(example, axes | {1: torch.export.Dim("length", min=2)})
    with warnings.catch_warnings():
        # The tensors of a text share their axes, so the exporter drops the name of an axis for the same name.
        warnings.filterwarnings("ignore", r"# The axis name: (\w+) will not be used, .* another axis: \1\.")
        program = torch.onnx.export(
            graph,
            kwargs={"inputs": example},
            dynamo=True,
            input_names=list(named_inputs(example, kind.name)),
            output_names=list(outputs),
            dynamic_shapes={"inputs": shapes},
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest finite value; NaN if there is a NaN."""
    found, expected = found.double(), expected.double()
    # The difference of an infinite score, of an input without active units, from itself would be NaN.
    gaps = torch.where(found == expected, 0.0, (found - expected).abs())
    finite = expected[expected.isfinite()]
    largest = finite.abs().max() if len(finite) else torch.ones(())
    return float(gaps.max() / largest.clamp(min=1e-12))
