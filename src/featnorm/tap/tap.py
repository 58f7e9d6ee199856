"""`FeatureTap`, which finds and captures the features of a model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featnorm._utils.checks import check_text, check_type
from featnorm._utils.progress import progress_bar
from featnorm.augmentation import jigsaw
from featnorm.features import PER_INPUT, Classifier, Features, Parts, two_classes
from featnorm.hidden.classifier import HiddenClassifier
from featnorm.runtime import Runtime
from featnorm.tap.batch import BatchError, Call, LabelsOf, Signature, class_labels, position_labels, read_batch
from featnorm.tap.boxes import BoxHead, detector_call, labels_of_boxes
from featnorm.tap.capture import (
    TRACE_AGAIN,
    HookPoint,
    PathError,
    capture,
    eval_mode,
    is_eval,
    locate,
    locate_part,
    made,
)
from featnorm.tap.contents import Contents
from featnorm.tap.find import Anatomy, Part, Per, Pooling, find, place
from featnorm.tap.linear import hidden_classifiers
from featnorm.tap.positions import find_positions
from featnorm.tap.ranking import LayerRanking, Ratios, candidates
from featnorm.tap.trace import Trace, trace
from featnorm.tap.weights import Step, checked_step, classifier, paths

# Batch size of the traced forward pass, which keeps every tensor it makes.
_TRACED_ROWS = 2
# Cosine similarity of logits and the classifier's, in any precision; logits shorter than a share of the longest
# are not compared.
_ALIKE, _NEGLIGIBLE = 0.99, 1e-6
_COMPARED = 4096  # rows

_MIXED_UP = (
    "inputs and positions were taken for each other, or a single position for none, when the model was traced: "
    "trace a new FeatureTap on a batch of at least two inputs with several positions"
)


class FeatureTap:
    """Captures the features of a model: its last hidden layer, pooled feature, embedding and logits.

    It finds them by tracing one forward pass on the first batch; `describe` reports the result. Every call leaves
    the model exactly as it was: no hook, mode, gradient or parameter changes, even if it raises an error. If the
    model is wrapped by `torch.nn.DataParallel` or `torch.compile`, the model inside the wrapper is used.

    Parameters
    ----------
    model
        Module that maps a batch of inputs to logits, to features, or to a tuple, dict or object that holds them.
        One logit z, of shape (n, 1) or (n,), is read as that of two classes, (-z / 2, z / 2).
    layer
        Module whose output is the last hidden layer, or its name, if the one found automatically is not the right
        one. Tokens and maps are averaged over their positions.
    output
        Head of a model with several: a key or attribute of what the model returns, an index, or a path such as
        "heads.0". Default: the output named "logits", or the first one.
    channel_axis
        Axis of the units in the output of ``layer``, if it is not a vector: 1 for maps (n, d, ...), -1 for tokens
        (n, ..., d). Default: inferred from the module or the operations before it.
    pooling
        How the positions of a unit in the output of ``layer`` become one number: "mean", or "norm", the L2 norm of
        their positive parts, of which `L1Norm` makes the FeatureNorm of Yu et al., CVPR 2023; see `rank_layers`.
    per
        What a row of the features is of: "input", "position" of a model that returns maps of logits
        (n, C, height, width), such as a segmentation model, or "box" that an R-CNN of torchvision finds; see
        `Features.parts`. Positions are those of the layer that makes the logits, before they are interpolated to
        the size of the input. Their labels are masks (n, height, width) of integers, of which each position takes
        the nearest pixel; one that is not the index of a logit, such as 255, stands for no label. A batch of a
        detector is a list of images (c, h, w), optionally with the targets that it is trained with, from which
        a box has the label of the object that it overlaps with an intersection over union of at least 0.5.

    Raises
    ------
    ValueError
        ``layer`` is not in the model, ``channel_axis`` or another ``pooling`` than "mean" is given without
        ``layer``, ``layer`` is given and ``per`` is not "input", or a part of the model is a TorchScript module,
        which takes no hooks; or ``per`` is "box", and the model has no box head.
    TypeError
        The model is not a `torch.nn.Module`, ``layer`` is neither a module nor a name, or ``output`` is neither a
        path nor an index.

    Examples
    --------
    >>> tap = FeatureTap(model)
    >>> features = tap(images)
    >>> features.activation.shape, features.logits.shape
    (torch.Size([8, 16]), torch.Size([8, 3]))
    >>> features = tap.extract(train_loader)
    >>> print(tap.describe())
    Last hidden layer: 16 units, from mean in `2`. It is a pool of rectified maps, ...
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module | None = None,
        output: str | int | None = None,
        channel_axis: int | None = None,
        pooling: Pooling = "mean",
        per: Per = "input",
    ) -> None:
        if isinstance(model, torch.export.ExportedProgram):
            raise TypeError("the model must be a torch.nn.Module, got an ExportedProgram: pass its module()")
        if callable(model) and not isinstance(model, nn.Module):
            raise TypeError(
                f"the model must be a torch.nn.Module, got {type(model).__name__}: pass the module that it calls"
            )
        check_type(model, nn.Module, "the model", "a torch.nn.Module")
        check_type(layer, (str, nn.Module, type(None)), "layer", "a module of the model or its name")
        check_type(output, (str, int, type(None)), "output", "a key, an index or a path")
        check_type(channel_axis, (int, type(None)), "channel_axis", "an integer")
        if channel_axis is not None and layer is None:
            raise ValueError("channel_axis is an axis of the output of a layer: pass layer= too")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {', '.join(map(repr, get_args(Pooling)))}, got {pooling!r}")
        if pooling != "mean" and layer is None:
            raise ValueError("pooling is of the positions in the output of a layer: pass layer= too")
        if per not in get_args(Per):
            raise ValueError(f"per must be one of {', '.join(map(repr, get_args(Per)))}, got {per!r}")
        if per != "input" and layer is not None:
            raise ValueError(f"with per={per!r} the layer is found automatically: leave out layer=")
        self.model = unwrap(model)
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ValueError(
                    f"{f'{name!r} in the model' if name else 'the model'} is a TorchScript module, which takes no "
                    "hooks: pass the model that it was made from"
                )
        self.layer = self._name(layer)
        self.output = output
        self._signature = Signature.of(self.model)
        self.channel_axis = channel_axis
        self.pooling: Pooling = pooling
        self.per: Per = per
        self._boxes = BoxHead(self.model) if per == "box" else None
        self._plan: _Plan | None = None
        self._contents: Contents | None = None
        self._inactive = ""
        self._advice = TRACE_AGAIN

    def trace(self, batch: Any) -> "FeatureTap":
        """Find the layers by tracing the model on a batch of inputs, and return self.

        Parameters
        ----------
        batch : see `stream`.

        Raises
        ------
        ValueError
            The model returns neither logits nor features of shape (n, width), the chosen layer did not run, the
            chosen output does not exist, or the batch is not what the model takes; the weights are on the meta
            device; or a batch normalization has no running statistics, so that scores would depend on the batch.
        """
        self._trace(self._read(batch))
        return self

    def _read(self, batch: Any, labels: LabelsOf | None = None, name: str = "the batch") -> Call:
        call = read_batch(batch, self._signature, labels, name)
        return call if self._boxes is None else detector_call(call, name)

    def __call__(self, batch: Any) -> Features:
        """Return the features of one batch, on the model's device, from one forward pass.

        A tensor is passed as ``model(x)``, a tuple as ``model(*args)``, a mapping as ``model(**kwargs)``; see
        `stream`. The caller may change the tensors: none shares memory with the model or the inputs.
        """
        return self.capture(batch, classifier=True)

    def capture(self, batch: Any, *, classifier: bool, contents: Contents | None = None) -> Features:
        """Return the features of one batch.

        Parameters
        ----------
        batch : see `stream`.
        classifier : whether to copy the classifier's weights.
        contents : what `contents` has just returned, so that it is not looked up again.
        """
        return self._features(self._read(batch), classifier, contents)

    def call(self, batch: Any) -> "_ModelCall":
        """Return the call of the model on one batch, by which detectors run it again, without running it."""
        return _ModelCall(self, self._read(batch))

    def contents(self) -> Contents:
        """Return the modules and tensors of the model as it is now."""
        contents = self._contents
        if contents is None or not contents.is_current():
            contents = self._contents = Contents(self.model)
        return contents

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_contents": None}

    def _features(self, call: Call, classifier: bool = True, contents: Contents | None = None) -> Features:
        if self._plan is None:
            return self._trace(call)
        return self._capture(self._plan, call, classifier, contents)

    def _trace(self, call: Call) -> Features:
        call = call.to(self.device)
        if self._boxes is None:
            traced = self._record(call)
            plan = _Plan.of(self._find(traced), traced)
        else:
            with eval_mode(self.model):
                plan = _Plan.of_boxes(self._boxes, self._boxes.proposals(self.model, call))
        features = self._capture(plan, call, classifier=True)
        _check_classifier(features)
        self._plan = plan
        self._advice = TRACE_AGAIN
        activation = features.activation
        if activation is not None and activation.numel():
            share = float((activation <= 0).float().mean())
            self._inactive = f"On average, {share:.0%} of its units were off for the {len(features)} inputs."
        return features

    def _find(self, traced: Trace) -> Anatomy:
        if self.per == "position":
            return find_positions(traced, self.model)
        return find(traced, self.model, self.layer, self.channel_axis, self.pooling)

    def _record(self, call: Call) -> Trace:
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise ValueError("the model's weights are on the meta device and have no values: load them first")
        part, traced = call.head(_TRACED_ROWS), None
        with eval_mode(self.model):
            if part is not call:
                # Some models take only batches of one size, or tensors that are not rows of a batch.
                with suppress(Exception):
                    traced = trace(self.model, part)
            traced = traced or trace(self.model, call)
        ran = {io.module for io in traced.module_io}
        for name, module in self.model.named_modules():
            if name in ran and isinstance(module, _BatchNorm) and module.running_mean is None:
                raise ValueError(
                    f"`{name}` ({type(module).__name__}) has no running statistics, so that a score would depend "
                    "on the rest of its batch: train the model with track_running_stats=True"
                )
        if self.output is not None:
            path = str(self.output).split(".")
            chosen = [(slot, node) for slot, node in traced.outputs if [*map(str, slot)][: len(path)] == path]
            if not chosen:
                names = ", ".join(repr(".".join(map(str, slot))) for slot, _ in traced.outputs)
                raise ValueError(f"output {self.output!r} is none of the model's outputs: {names}")
            traced.outputs = chosen
        return traced

    def _capture(self, plan: "_Plan", call: Call, classifier: bool, contents: Contents | None = None) -> Features:
        contents = contents or self.contents()
        call = call.to(contents.device)
        if is_eval(contents):
            return self._caught(call, plan, classifier)
        with eval_mode(self.model, contents=contents):
            return self._caught(call, plan, classifier)

    def traced(self, batch: Any) -> Features:
        """Return the features of one batch without their classifier, as operations that torch can export.

        The model must have been traced, and be in evaluation mode.
        """
        return self._caught(self._read(batch), classifier=False)

    def _caught(self, call: Call, plan: "_Plan | None" = None, classifier: bool = True) -> Features:
        """Return the features of one batch, in the current mode and with the current gradient setting."""
        plan = plan or self._planned()
        parts = None
        if self._boxes is None:
            caught = capture(self.model, plan.points, call, advice=self._advice)
        else:
            caught, parts = self._boxes.capture(self.model, plan.points, call, advice=self._advice)
        grid = caught["logits"].shape[:-1] if self.per == "position" else None
        # If two fields are one tensor, such as a pooled feature that is the last hidden layer, it stays one.
        vectors = {
            plan.points[name]: _as_vectors(value) if grid is None else value.flatten(0, -2)
            for name, value in caught.items()
        }
        rows = [value.shape[0] for value in vectors.values()]  # an export keeps them symbolic
        if any(row != rows[0] for row in rows):
            raise PathError(_MIXED_UP)
        fields: dict[str, Any] = {}
        for name, point in plan.points.items():
            first, _, more = name.partition(".")
            fields[first] = torch.cat([fields[first], vectors[point]], 1) if more else vectors[point]
        fields["classifier"] = plan.classifier(self.model) if classifier else None
        absent = plan.absent
        if call.labels is not None:
            if grid is not None:
                labels, why = position_labels(call, grid, fields["logits"].shape[1])
            elif parts is not None:
                labels, why = labels_of_boxes(parts, call.labels)
            else:
                labels, why = class_labels(call, rows[0])
            fields["labels"] = None if labels is None else labels.to(self.device)
            absent = absent if labels is not None else {**absent, "labels": why}
        if grid is not None:
            owners = torch.arange(grid[0], device=self.device).repeat_interleave(grid[1] * grid[2])
            parts = Parts(owners, grid[0], (grid[1], grid[2]))
        return Features(**fields, absent=absent, call=_ModelCall(self, call), parts=parts)

    def stream(
        self, loader: Iterable[Any], labels: LabelsOf | None = None, *, progress: bool | None = None
    ) -> Iterator[Features]:
        """Yield the features of a loader batch by batch, on the model's device.

        Parameters
        ----------
        loader
            Iterable of batches. A tensor is passed as ``model(x)``; the items of a tuple or list as
            ``model(*args)``; those of a mapping as ``model(**kwargs)``; anything else, such as a graph or a
            `torch.nn.utils.rnn.PackedSequence`, as ``model(batch)``. If the model has a single argument, and
            a mapping has no item of its name, it is the one tensor of the mapping; or the mapping itself, if the
            argument is annotated as a mapping, the mapping has several tensors, or a tuple holds it. It may also
            be a whole list of images (c, h, w).
        labels
            Where the labels of a batch are: a key or attribute, an index, or a function of the batch. Default: the
            item of a tuple that the model does not take, or a last item of one integer per input; the item or
            attribute named label, labels, y, target, targets or class, unless the model requires it. If labels
            found this way are not one integer per input, the features have none.
        progress : whether to show a progress bar. Default: on a terminal; elsewhere a line every 30 seconds.

        Raises
        ------
        ValueError
            A batch holds no tensor, or a tensor that the model does not take; ``labels`` points to nothing, or
            not to one integer per input; or the loader yields no batch.
        TypeError
            The loader is not an iterable of batches.
        """
        check_loader(loader)
        total = _length(loader)
        bar = progress_bar(loader, total=total, unit="batch", progress=progress)
        empty = True
        for i, batch in enumerate(bar):
            call = self._read(batch, labels, f"batch {i} of the loader")
            if call.rows == 0:
                continue
            try:
                features = self._features(call)
            except Exception as error:
                error.add_note(f"(on batch {i} of the loader, counted from 0)")
                raise
            empty = False
            if call.labels is None:
                features = features.replace(absent={**features.absent, "labels": "the loader yields none"})
            yield features
        if empty:
            raise ValueError(_no_batch(loader))

    def extract(
        self, loader: Iterable[Any], labels: LabelsOf | None = None, *, progress: bool | None = None
    ) -> Features:
        """Return the features of a whole loader, on the CPU: the batches of `stream`, concatenated.

        To fit a detector without holding all features in memory, pass the batches of `stream` to `partial_fit`.
        """
        return Features.cat([features.to("cpu") for features in self.stream(loader, labels, progress=progress)])

    def rank_layers(self, loader: Iterable[Any], *, seed: int = 0, progress: bool | None = None) -> LayerRanking:
        """Rank the layers of a model of images by how well a norm of their maps may detect OOD inputs.

        No OOD data are needed: every image is compared with its jigsaw, its 3 x 3 patches in random order. The
        NormRatio of a layer is the mean over the images of ``norm(image) / norm(jigsaw)``, where the norm is the
        FeatureNorm, the mean over the channels of ``||ReLU(map)||_2`` (Yu et al., CVPR 2023). Candidates are the
        rectified maps and tokens that modules return. A large ratio is a hint, not a measurement: confirm the
        choice with OOD data if you have any.

        Parameters
        ----------
        loader : iterable of batches of in-distribution images, see `stream`; a few hundred images are enough.
        seed : seed of the jigsaws. The result does not depend on how the images are batched.
        progress : see `stream`.

        Raises
        ------
        ValueError
            The batches hold no images (n, c, h, w) of at least 3 x 3 pixels, or several; the model has no
            rectified maps or tokens; or the loader yields no batch.

        Examples
        --------
        >>> ranking = FeatureTap(model).rank_layers(train_loader)
        >>> scorer = Scorer(model, L1Norm(), ranking.best, pooling="norm")  # L1Norm is FeatureNorm times the width
        """
        check_loader(loader)
        generator = torch.Generator().manual_seed(seed)
        points: dict[str, HookPoint] = {}
        ratios = Ratios()
        for i, batch in enumerate(progress_bar(loader, total=_length(loader), unit="batch", progress=progress)):
            call = read_batch(batch, self._signature, name=f"batch {i} of the loader")
            if call.rows == 0:
                continue
            try:
                image = _image(call)
                points = points or candidates(self._record(call.to(self.device)), self.model)
                with eval_mode(self.model):
                    plain, shuffled = (
                        capture(self.model, points, call.with_image(x).to(self.device))
                        for x in (image, jigsaw(image, generator))
                    )
            except Exception as error:
                error.add_note(f"(on batch {i} of the loader, counted from 0)")
                raise
            ratios.add(plain, shuffled)
        if not points:
            raise ValueError(_no_batch(loader))
        return ratios.ranking()

    def hidden(self, batch: Any, *, pre_activation: bool = False) -> HiddenClassifier:
        """Return the classifier hidden in the layer for a batch: ``logits = C a + Gamma`` (paper Prop. 1, A.2.3).

        In one forward pass, every rectifier multiplies its input by the constant gate ``s(z) / z``; one backward
        pass per class, batched, then gives C. The cost is that of 1 + 2 K forward passes from the layer on, and
        the memory is n K d.

        Parameters
        ----------
        batch : batch of n inputs, see `stream`.
        pre_activation : whether to use the input of the layer's rectifier instead of its output (Prop. 6).

        Returns
        -------
        The hidden classifier of the last hidden layer, or of ``layer`` if it was given to the tap. For maps, d is
        the number of all their values. One logit z is that of two classes, (-z / 2, z / 2).

        Raises
        ------
        ValueError
            The model has no logits or no such layer, or an operation after the layer, such as attention or a
            LayerNorm, is not linear even with its gates held fixed. The message names the operation.
        """
        if self._boxes is not None:
            raise ValueError("a hidden classifier is of an input and not of boxes: create a tap with per='input'")
        call = read_batch(batch, self._signature).to(self.device)
        traced = self._record(call)
        anatomy = find(traced, self.model, self.layer, self.channel_axis)
        if not anatomy.activation or not anatomy.logits:
            missing = "logits" if anatomy.activation else "activation"
            raise ValueError(f"there is no hidden classifier without {missing}: {anatomy.absent.get(missing)}")
        if len(anatomy.activation) > 1:
            raise ValueError(
                f"the last hidden layer has {len(anatomy.activation)} parts, one per head: choose one with layer="
            )
        name = self.layer or "the last hidden layer"
        layers = {name: made(traced, anatomy.activation[0].node)}
        logits = locate(traced, anatomy.logits[0].node)
        found = hidden_classifiers(self.model, layers, logits, call, pre_activation=pre_activation)[name]
        if found.coefficients.shape[1] > 1 or found.offset is None:
            return found
        return HiddenClassifier(found.activation, two_classes(found.coefficients, 1), two_classes(found.offset, 1))

    def describe(self) -> str:
        """Describe the features that were found, and whether the negative-aware norm works on them.

        If no batch was traced yet, the model is traced on noise of the input size that its layers suggest.

        Raises
        ------
        ValueError
            The input size of the model cannot be inferred; call `trace` with a batch first.
        """
        noise = self._plan is None
        if noise:
            guess = _noise_for(self.model)
            try:
                self.trace(guess)
            except (RuntimeError, TypeError, AssertionError, IndexError, BatchError) as error:
                raise ValueError(
                    f"the model does not accept noise of shape {tuple(guess.shape)}, so its input size cannot be "
                    "inferred: call tap.trace with a batch first"
                ) from error
        plan = self._planned()
        lines = [plan.verdict]
        if self._inactive:
            lines.append(self._inactive + (" (They were noise: trace real inputs.)" if noise else ""))
        for name, words in plan.words.items():
            lines.append(f"{name}: {words}")
        return "\n".join(lines)

    def describe_heads(self) -> str:
        """Describe which head of several the logits are from; empty if there is one. The model must be traced."""
        words = self._planned().words
        return f"logits: {words['logits']}; other heads: {words['other heads']}" if "other heads" in words else ""

    def to_dict(self) -> dict[str, Any]:
        """Return the state of the tap as plain data, for a file; see `from_dict`."""
        return {
            "layer": self.layer,
            "output": self.output,
            "channel_axis": self.channel_axis,
            "pooling": self.pooling,
            "per": self.per,
            "inactive": self._inactive,
            "plan": self._planned().to_dict(),
        }

    @classmethod
    def from_dict(cls, model: nn.Module, state: Mapping[str, Any]) -> "FeatureTap":
        """Create a tap from the state of another one, without tracing the model again.

        Raises
        ------
        KeyError, TypeError, ValueError
            The data are not a state, or do not fit the model.
        """
        tap = cls(model, state["layer"], state["output"], state["channel_axis"], state["pooling"], state["per"])
        tap._plan = _Plan.from_dict(state["plan"])
        tap._plan.check(tap.model)
        tap._inactive = check_text(state["inactive"])
        tap._advice = "the file that the tap was read from is damaged or does not fit the model: fit again"
        return tap

    def require(self, names: Iterable[str]) -> None:
        """Raise a ValueError if the tap, read from a file, lacks one of these fields of `Features`."""
        plan = self._planned()
        for name in names:
            if name not in plan.points and not (name == "classifier" and plan.weights):
                raise ValueError(f"the tap captures no {name}")

    def classifier(self) -> Classifier | None:
        """Return a copy of the classifier's weights; the model must have been traced."""
        return self._planned().classifier(self.model)

    @property
    def captured(self) -> tuple[str, ...]:
        """Fields of `Features` that the tap captures; the model must have been traced."""
        return tuple(self._planned().points)

    def _planned(self) -> "_Plan":
        if self._plan is None:
            raise RuntimeError("the tap has not traced the model yet: call trace with a batch")
        return self._plan

    def _name(self, layer: str | nn.Module | None) -> str | None:
        names = {name: module for name, module in self.model.named_modules() if name}
        if layer is None:
            return None
        if isinstance(layer, str):  # if a module has two names, use the first
            layer = dict(self.model.named_modules(remove_duplicate=False)).get(layer, layer)
        for name, module in names.items():
            if module is layer:
                return name
        last_names = ", ".join(list(names)[-8:])
        given = layer if isinstance(layer, str) else type(layer).__name__
        raise ValueError(f"layer {given!r} is not in the model; its last modules are {last_names}")

    @property
    def device(self) -> torch.device:
        """Device of the model and of its features."""
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device


@dataclass(frozen=True)
class _ModelCall:
    """The call that made features, and the tap that captured them."""

    tap: FeatureTap
    call: Call

    @property
    def inputs(self) -> Tensor:
        return self.call.image

    def features(self, inputs: Tensor) -> Features:
        return self.tap._features(self.call.with_image(inputs))

    def gradient(self, loss: Callable[[Features], Tensor]) -> Tensor:
        # Inference tensors cannot be differentiated, so the caller's inference mode is turned off.
        with torch.inference_mode(False):
            inputs = self.inputs.detach().clone().requires_grad_()
            with eval_mode(self.tap.model, gradients=True):
                features = self.tap._caught(self.call.with_image(inputs))
                return torch.autograd.grad(loss(features), inputs)[0]


class AutocastTap(FeatureTap):
    """A tap that runs the model in the precision of a runtime, also for detectors that call the model again.

    Parameters
    ----------
    model : see `FeatureTap`.
    runtime : its precision is used.
    """

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        super().__init__(model)
        self._runtime = runtime

    def _features(self, call: Call, classifier: bool = True, contents: Contents | None = None) -> Features:
        with self._runtime.autocast():
            return super()._features(call, classifier, contents)


def _check_classifier(features: Features) -> None:
    """Raise a ValueError if the classifier that was found does not make the logits of any features.

    The lengths of the rows are not compared: the classifier of a cosine head leaves them out.
    """
    if features.classifier is None or features.logits is None or len(features) == 0:
        return
    weight, bias = features.linear()
    logits = features.logits[:_COMPARED].double()
    for name in ("activation", "pooled", "embedding"):
        value = getattr(features, name)
        if value is None or value.shape[1] != weight.shape[1]:
            continue
        value = value[:_COMPARED].double()
        made = nn.functional.linear(value, weight.double(), None if bias is None else bias.double())
        length = logits.norm(dim=1)
        # torch's default epsilon would take short vectors, such as those of a network with random weights, for 0.
        likeness = nn.functional.cosine_similarity(made, logits, eps=torch.finfo(torch.float64).tiny)
        likeness = likeness[length > _NEGLIGIBLE * length.max()]
        if bool((likeness > _ALIKE).all()):
            return
    raise ValueError(
        "the features that were found do not make the model's logits by its classifier, so the search went wrong: "
        "choose the last hidden layer with layer="
    )


class _Plan:
    """The result of tracing a model, without the tensors of the trace."""

    def __init__(
        self,
        points: dict[str, HookPoint],
        weights: list[Step],
        absent: dict[str, str],
        verdict: str,
        words: dict[str, str],
    ) -> None:
        # By field; the further parts of a field follow as "pooled.1", ... Equal points are one object.
        same: dict[str, HookPoint] = {}
        self.points = {name: same.setdefault(repr(point), point) for name, point in points.items()}
        self.weights = weights
        self.absent = absent
        self.verdict = verdict
        self.words = words

    @classmethod
    def of(cls, anatomy: Anatomy, traced: Trace) -> "_Plan":
        parts: dict[str, list[Part]] = {
            name: found
            for name in ("activation", "pooled", "embedding", "logits")
            if (found := getattr(anatomy, name))
        }
        points = {
            f"{name}.{i}" if i else name: locate_part(traced, part)
            for name, found in parts.items()
            for i, part in enumerate(found)
        }
        words = {name: _words(found) for name, found in parts.items() if name != "activation"}
        if anatomy.logits and sum(map(_width, anatomy.logits)) == 1:
            words["logits"] += ", read as two classes (-z / 2, z / 2)"
        if anatomy.others:
            words["logits"] += f", the model's output {anatomy.output!r}"
            words["other heads"] = f"{', '.join(map(repr, anatomy.others))}; choose one with output="
        words |= {name: anatomy.absent[name] for name in ("pooled", "logits") if name not in parts}
        return cls(points, anatomy.classifier, anatomy.absent, _verdict(anatomy), words)

    @classmethod
    def of_boxes(cls, head: BoxHead, proposals: Features) -> "_Plan":
        points, absent = head.points(), dict(proposals.absent)
        name = points["pooled"].module
        width = proposals.tensor("pooled").shape[1]
        words = {
            "pooled": f"{width} wide, from the output of `{name}`, one row per detected box",
            "logits": f"{proposals.tensor('logits').shape[1]} wide, of the detected boxes, with the background",
        }
        if proposals.activation is None:
            del points["activation"]
            verdict = f"No last hidden layer for NAN: {absent['activation']}."
        else:
            verdict = (
                f"Last hidden layer: {width} units, from the output of `{name}`. It is what the classifier reads "
                "of every detected box, and rectified as NAN expects."
            )
        return cls(points, head.classifier_steps(), absent, verdict, words)

    def classifier(self, model: nn.Module) -> Classifier | None:
        """Return the linear map from the hidden layer to the logits, from the model's current weights."""
        return classifier(self.weights, model)

    def check(self, model: nn.Module) -> None:
        """Raise a ValueError if a plan from a file does not fit the model."""
        for name, point in self.points.items():
            kinds = [point.module.rpartition("/")[0], *(step[0].rpartition("/")[0] for step in point.chain)]
            exists = all(_has_module(model, owner) for owner in (kinds if point.side == "op" else [point.module]))
            first, _, more = name.partition(".")
            if first not in PER_INPUT or (more and first not in self.points) or not exists:
                raise ValueError(f"the hook point of {name!r} does not exist: {point.side!r} of {point.module!r}")
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for path in paths(self.weights):
            owner, _, attribute = path.rpartition(".")
            # A parametrized weight is an attribute of its module, but neither a parameter nor a buffer.
            if path not in tensors and not (attribute in ("weight", "bias") and _has_module(model, owner)):
                raise ValueError(f"the classifier is read from {path!r}, which is not a weight of the model")
        self.classifier(model)

    def to_dict(self) -> dict[str, Any]:
        return {
            "points": {name: point.to_dict() for name, point in self.points.items()},
            "weights": [list(step) for step in self.weights],
            "absent": self.absent,
            "verdict": self.verdict,
            "words": self.words,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "_Plan":
        return cls(
            {name: HookPoint.from_dict(point) for name, point in data["points"].items()},
            [checked_step(step) for step in data["weights"]],
            _texts(data["absent"]),
            check_text(data["verdict"]),
            _texts(data["words"]),
        )


def _texts(values: Any) -> dict[str, str]:
    return {check_text(name): check_text(text) for name, text in values.items()}


def check_loader(loader: object) -> None:
    """Raise a TypeError if a loader is not an iterable of batches."""
    if isinstance(loader, Tensor):
        raise TypeError("a tensor is not a loader, as its rows would be taken for batches: pass [tensor]")
    if not (hasattr(type(loader), "__iter__") or hasattr(type(loader), "__getitem__")):
        raise TypeError(
            f"the loader must be an iterable of batches such as a DataLoader, got {type(loader).__name__}"
        )


def _no_batch(loader: Iterable[Any]) -> str:
    used_up = ": it is an iterator, which one pass uses up; pass a list or a DataLoader"
    return f"the loader yielded no batch{used_up if iter(loader) is loader else ''}"


def _image(call: Call) -> Tensor:
    """Return the images (n, c, h, w) of a call; raise a ValueError if it has none, or several."""
    tensors = [tensor for tensor in call.tensors if tensor.is_floating_point()]
    if len(tensors) != 1 or tensors[0].ndim != 4 or tensors[0] is not call.image:
        shapes = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in call.tensors)
        raise ValueError(
            f"layers are ranked on images: the batch must hold one (n, c, h, w), and it holds {shapes}"
        )
    return tensors[0]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, data-parallel and Fabric wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "_forward_module", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _has_module(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules(remove_duplicate=False))


def _verdict(anatomy: Anatomy) -> str:
    parts = anatomy.activation
    if not parts:
        return "No last hidden layer for NAN: " + anatomy.absent["activation"] + "."
    found = f"Last hidden layer: {sum(map(_width, parts))} units, from {_places(parts)}. "
    if anatomy.kind == "hidden" and anatomy.norm:
        return found + (
            f"It is the hidden layer of a head, but {anatomy.norm} rescales it before the classifier, so its norm "
            "is not what the logits depend on. NAN may be less accurate there: measure it."
        )
    if anatomy.kind == "hidden":
        return found + (
            "It is the hidden layer of an MLP head, which is what the paper recommends for NAN if the network was "
            "trained on the in-distribution data. Measure NAN before you rely on it (featnorm evaluate): on some "
            "such networks, and for a new head on a frozen backbone, it is worse than chance."
        )
    if anatomy.kind == "pooled":
        return found + (
            "It is a pool of rectified maps, not the hidden layer of an MLP head. NAN is less accurate there, "
            "because pooled units are rarely off (paper Table 6), and on some models worse than chance: "
            "measure it."
        )
    if anatomy.kind == "positions":
        return found + "It is what the classifier reads at every position, and rectified as NAN expects."
    return found + "It was chosen by name; NAN expects the output of a rectifier."


def _words(parts: list[Part]) -> str:
    widths = " + ".join(str(_width(part)) for part in parts)
    heads = f", the inputs of {len(parts)} heads whose outputs are summed" if len(parts) > 1 else ""
    return f"{widths} wide, from {_places(parts)}{heads}"


def _width(part: Part) -> int:
    shape = part.node.shape
    if part.axis is not None or part.chain:
        return shape[-1 if part.axis is None else part.axis]
    return part.node.value.numel() // max(shape[0], 1)


def _places(parts: list[Part]) -> str:
    pooled = {"mean": ", averaged over positions", "norm": ", the norm over positions", None: " at each position"}
    averaged = pooled[parts[0].pooling] if parts[0].axis is not None else ""
    reduced = ", reduced over positions as the logits are" if parts[0].chain else ""
    return " and ".join(place(part.node) for part in parts) + averaged + reduced


def _as_vectors(value: Tensor) -> Tensor:
    if value.ndim == 2 and not value.is_quantized:
        return value
    value = value.dequantize() if value.is_quantized else value
    if sum(length > 1 for length in value.shape[1:]) > 1:
        raise PathError(_MIXED_UP)
    return value[:, None] if value.ndim == 1 else value.flatten(1)


def _length(loader: Iterable[Any]) -> int | None:
    """Return the number of batches, or None; the length of a DataLoader over an iterable data set raises."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        return None


def _noise_for(model: nn.Module) -> Tensor:
    """Return a batch of noise of the input size that the model's configuration or first layer suggests."""
    config = getattr(model, "default_cfg", None)
    if any(isinstance(p, torch.nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ValueError("the input size of a lazy model cannot be inferred: call tap.trace with a batch first")
    generator = torch.Generator().manual_seed(0)
    shape: tuple[int, ...] | None = None
    if isinstance(config, Mapping) and "input_size" in config:
        shape = tuple(config["input_size"])
    for module in model.modules() if shape is None else ():
        if isinstance(module, nn.Conv2d):
            shape = (module.in_channels, 224, 224)
        elif isinstance(module, nn.Linear):
            shape = (module.in_features,)
        if shape is not None:
            break
    if shape is None:
        raise ValueError("the input size of the model cannot be inferred: call tap.trace with a batch first")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(_TRACED_ROWS, *shape, generator=generator).to(dtype)
