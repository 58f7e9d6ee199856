"""Capturing leaves the user's model exactly as it was, and concurrent captures do not affect each other."""

import copy
import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featnorm.features import Features
from featnorm.tap import FeatureTap

pytestmark = pytest.mark.usefixtures("seeded")

N, IN, D, C = 6, 5, 8, 3


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, IN)


class Model(nn.Module):
    """A model with everything that a capture might change; `trouble` runs in the middle of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, D)
        self.norm = nn.BatchNorm1d(D)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.utils.parametrizations.spectral_norm(nn.Linear(D, D))
        self.fc = nn.Linear(D, C)
        self.frozen.requires_grad_(False)
        self.trouble: Callable[[], None] = lambda: None
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        h = self.norm(self.first(x))
        self.trouble()
        return self.fc(self.drop(F.relu(self.frozen(self.act(h)))))


def functional_model() -> nn.Module:
    """Return a model in which no value passes a module's boundary, so that operations must be captured."""

    class Functional(Model):
        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            h = F.relu(F.batch_norm(
                x @ self.first.weight.T, self.norm.running_mean, self.norm.running_var, self.norm.weight,
                self.norm.bias, self.training,
            ))  # fmt: skip
            self.trouble()
            return F.dropout(h, 0.5, self.training) @ self.fc.weight.T + self.fc.bias

    return Functional()


MODELS = [Model, functional_model]
HOOKS = [
    name
    for name in vars(nn.Module())
    if name.startswith("_") and ("hook" in name) and name != "_is_full_backward_hook"
]


def snapshot(model: nn.Module) -> dict[str, Any]:
    module = nn.modules.module
    state: dict[str, Any] = {
        "grad mode": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": repr(np.random.get_state()),  # noqa: NPY002
        "python rng": random.getstate(),
        "dispatch modes": torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default dtype": torch.get_default_dtype(),
        "global hooks": [(k, list(v)) for k, v in vars(module).items() if "hook" in k and hasattr(v, "keys")],
    }
    for name, m in model.named_modules():
        state[name, "training"] = m.training
        state[name, "attributes"] = sorted(k for k in vars(m) if k != "passes")
        state[name, "class"] = type(m)
        for hooks in HOOKS:
            value = getattr(m, hooks)
            state[name, hooks] = list(value.items()) if hasattr(value, "items") else value
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        state[name, "value"] = t.detach().numpy().tobytes()
        state[name, "version"] = t._version
        state[name, "grad"] = None if t.grad is None else (id(t.grad), t.grad.numpy().tobytes())
        state[name, "requires_grad"] = t.requires_grad
        state[name, "identity"] = (id(t), t.data_ptr(), t.is_leaf)
    return state


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    assert [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)] == []


def train_a_little(model: nn.Module, x: Tensor) -> None:
    """Give the model running statistics, gradients, and a mix of training and evaluation."""
    model.train()
    model(x).sum().backward()
    model.norm.eval()
    model.frozen.eval()


CALLS: dict[str, Callable[[FeatureTap, Tensor], Any]] = {
    "trace": lambda tap, x: tap.trace(x),
    "call": lambda tap, x: tap(x),
    "twice": lambda tap, x: (tap(x), tap(x)),
    "extract": lambda tap, x: tap.extract([(x, torch.arange(N)), (x[:2], torch.arange(2))]),
    "stream": lambda tap, x: list(tap.stream([{"image": x}, {"image": x[:1]}])),
    "abandoned stream": lambda tap, x: next(iter(tap.stream([x, x, x]))),
    "describe": lambda tap, x: tap.describe(),
    "state": lambda tap, x: FeatureTap.from_dict(tap.model, tap.trace(x).to_dict())(x),
}


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
@pytest.mark.parametrize("call", CALLS)
def test_the_model_is_left_as_it_was(call: str, mode: str, make: Callable[[], Any], x: Tensor) -> None:
    model = make()
    train_a_little(model, x)
    if mode != "mixed":
        model.train(mode == "train")
    before = snapshot(model)
    inputs = x.clone()
    CALLS[call](FeatureTap(model), x)
    assert_unchanged(before, model)
    assert torch.equal(x, inputs)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("traced", [True, False])
def test_after_an_exception_in_the_middle_of_the_pass(
    traced: bool, error: type[BaseException], make: Callable[[], Any], x: Tensor
) -> None:
    model = make()
    train_a_little(model, x)
    tap = FeatureTap(model)
    if traced:
        tap.trace(x)

    def trouble() -> None:
        raise error("in the middle")

    model.trouble = trouble
    before = snapshot(model)
    for call in (lambda: tap(x), lambda: tap.extract([x, x]), lambda: tap.trace(x)):
        with pytest.raises(error, match="in the middle"):
            call()
        assert_unchanged(before, model)
    model.trouble = lambda: None
    features = tap(x)  # and it works again
    torch.testing.assert_close(features.logits, copy.deepcopy(model).eval()(x).detach())


def test_after_an_exception_of_the_loader_and_of_the_consumer(x: Tensor) -> None:
    model = Model()
    train_a_little(model, x)
    before = snapshot(model)

    def loader() -> Iterator[Tensor]:
        yield x
        raise OSError("corrupt file")

    with pytest.raises(OSError, match="corrupt"):
        FeatureTap(model).extract(loader())
    assert_unchanged(before, model)

    def consume() -> None:
        for _ in FeatureTap(model).stream([x, x]):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        consume()
    assert_unchanged(before, model)


def test_in_a_loop_over_the_stream_the_model_is_in_its_own_mode(x: Tensor) -> None:
    model = Model()
    train_a_little(model, x)
    before = snapshot(model)
    for _ in FeatureTap(model).stream([x, x]):
        assert_unchanged(before, model)


def test_errors_leave_the_model_as_it_was(x: Tensor) -> None:
    model = Model()
    train_a_little(model, x)
    model.spare = nn.Linear(2, 2)
    before = snapshot(model)
    with pytest.raises(ValueError, match="did not run"):
        FeatureTap(model, "spare")(x)
    with pytest.raises(ValueError, match="not in the model"):
        FeatureTap(model, "stranger")
    with pytest.raises(ValueError, match="takes vectors of 5 numbers"):
        FeatureTap(model)(torch.zeros(2, IN + 1))
    assert_unchanged(before, model)


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_of_the_caller(enabled: bool, x: Tensor) -> None:
    model = Model()
    leaf = x.clone().requires_grad_()
    with torch.set_grad_enabled(enabled):
        features = FeatureTap(model)(leaf)
        assert torch.is_grad_enabled() == enabled
    assert leaf.grad is None
    for name, value in features.fields():
        assert not value.requires_grad, name
    assert not features.classifier[0].requires_grad


def test_hooks_of_the_user_stay_in_place_and_in_effect(x: Tensor) -> None:
    model = Model().eval()
    seen: list[str] = []
    model.act.register_forward_hook(lambda m, a, out: seen.append("act"))
    model.frozen.register_forward_pre_hook(lambda m, a: (a[0].clamp(max=0.5),))
    model.register_forward_hook(lambda m, a, k, out: out * 2, with_kwargs=True, always_call=True)
    model.fc.register_full_backward_hook(lambda *a: None)
    expected = model(x).detach()
    before = snapshot(model)
    features = FeatureTap(model)(x)
    assert_unchanged(before, model)
    torch.testing.assert_close(features.logits, expected)
    assert set(seen) == {"act"}


def test_capturing_does_not_change_training(x: Tensor) -> None:
    def train(listened: bool) -> list[Tensor]:
        torch.manual_seed(3)
        model = Model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        tap = FeatureTap(model)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x).logsumexp(1).sum()
            if listened:
                tap(x + 1)
            loss.backward()
            if listened:
                tap.extract([x, x[:2]])
            optimizer.step()
        return [t.detach() for t in model.state_dict().values()]

    for a, b in zip(train(True), train(False), strict=True):
        assert torch.equal(a, b)


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
def test_values_do_not_depend_on_the_batch_also_of_a_model_in_training(make: Callable[[], Any], x: Tensor) -> None:
    model = make()
    for _ in range(3):
        model(torch.randn(16, IN) * 3 + 1)
    assert model.training
    tap = FeatureTap(model)
    whole = tap(x)
    single = Features.cat([tap(row[None]) for row in x])
    mixed = tap(torch.cat([x[:1], torch.randn(4, IN) * 100]))
    for name, value in whole.fields():
        torch.testing.assert_close(getattr(single, name), value)
        torch.testing.assert_close(getattr(mixed, name)[:1], value[:1])
    torch.testing.assert_close(whole.logits, model.eval()(x).detach())


def test_an_input_that_the_model_changes_in_place_is_taken_as_it_was(x: Tensor) -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.sub_(0.5).div_(0.25))

    model = Normalising()
    expected = model(x.clone()).detach()
    torch.testing.assert_close(FeatureTap(model)(x.clone()).logits, expected)
    torch.testing.assert_close(FeatureTap(model).extract([x.clone()]).logits, expected)


@pytest.mark.parametrize("make", MODELS)
def test_a_clip_of_the_features_does_not_change_the_logits_of_the_user(make: Callable[[], Any], x: Tensor) -> None:
    model = make().eval()
    before = snapshot(model)
    expected = model(x).detach()
    tap = FeatureTap(model)
    features = tap(x)
    features.activation.clamp_(max=0.1)
    for _, value in features.fields():
        value.zero_()
    assert torch.equal(model(x), expected)
    assert torch.equal(tap(x).logits, expected)
    for name, now in snapshot(model).items():
        assert before[name] == now, name


def test_writing_to_the_classifier_of_the_features_does_not_change_the_model(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C)).eval()
    expected = model(x).detach()
    features = FeatureTap(model)(x)
    features.classifier[0].mul_(2)
    features.classifier[1].zero_()
    assert torch.equal(model(x), expected)


def test_writing_to_the_pooled_feature_does_not_change_the_input_of_the_user(x: Tensor) -> None:
    features = FeatureTap(nn.Linear(IN, C))(x)
    inputs = x.clone()
    features.pooled.zero_()
    assert torch.equal(x, inputs)


# --- several at once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
def test_two_taps_on_one_model(make: Callable[[], Any], x: Tensor) -> None:
    model = make()
    before = snapshot(model)
    found, chosen = FeatureTap(model), FeatureTap(model, "norm") if make is Model else FeatureTap(model)
    alone = found(x), chosen(x)
    streams = found.stream([x, x + 1]), chosen.stream([x, x + 1])
    for (a, b), inputs in zip(zip(*streams, strict=True), (x, x + 1), strict=True):
        torch.testing.assert_close(a.logits, b.logits)
        torch.testing.assert_close(a.activation, found(inputs).activation)
        torch.testing.assert_close(b.activation, chosen(inputs).activation)
    torch.testing.assert_close(alone[0].activation, found(x).activation)
    assert_unchanged(before, model)


@pytest.mark.parametrize("make", MODELS)
def test_a_tap_inside_the_pass_of_another_one(make: Callable[[], Any], x: Tensor) -> None:
    # A hook, or the forward pass itself, runs the same model on another input.
    model = make()
    train_a_little(model, x)
    outer, inner = FeatureTap(model), FeatureTap(model)
    expected_outer, expected_inner = outer(x), inner(x + 1)
    inside: list[Features] = []

    def trouble() -> None:
        model.trouble = lambda: None
        inside.append(inner(x + 1))
        model.trouble = trouble

    model.trouble = trouble
    before = snapshot(model)
    features = outer(x)
    assert_unchanged(before, model)
    for got, expected in ((features, expected_outer), (inside[0], expected_inner)):
        for name, value in expected.fields():
            torch.testing.assert_close(getattr(got, name), value, msg=name)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("traced", [True, False])
def test_taps_in_threads_get_each_their_own_values(traced: bool, make: Callable[[], Any], x: Tensor) -> None:
    model = make()
    train_a_little(model, x)
    reference = copy.deepcopy(model).eval()
    inputs = [x + i for i in range(4)]
    expected = [FeatureTap(reference)(batch) for batch in inputs]
    taps = [FeatureTap(model) for _ in inputs]
    if traced:
        for tap in taps:
            tap.trace(x)
    before = snapshot(model)
    barrier = threading.Barrier(len(inputs))
    problems: list[str] = []

    def work(i: int) -> None:
        try:
            barrier.wait(10)
            for _ in range(15):
                tap = taps[i] if traced else FeatureTap(model)
                features = tap(inputs[i])
                for name, value in expected[i].fields():
                    if not torch.allclose(getattr(features, name), value, atol=1e-5):
                        problems.append(f"thread {i}: another {name}")
        except Exception as error:
            problems.append(f"thread {i}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not problems, problems[:3]
    assert_unchanged(before, model)


def test_another_thread_may_run_the_model_while_hooks_are_registered(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model().eval()
    register = nn.Module.register_forward_pre_hook

    def register_in_two_steps(module: nn.Module, hook: Any, **options: Any) -> Any:
        # torch adds a hook first, and notes then that it takes keyword arguments.
        handle = register(module, hook)
        with ThreadPoolExecutor(1) as threads:
            threads.submit(model, x).result()
        handle.remove()
        return register(module, hook, **options)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", register_in_two_steps)
    features = FeatureTap(model)(x)
    torch.testing.assert_close(features.logits, model(x).detach())


class Meeting:
    """Puts two threads in the middle of one model's pass: the first waits for the second, and leaves first."""

    def __init__(self) -> None:
        self.arrived, self.second_is_in, self.first_is_done = (threading.Event() for _ in range(3))
        self.first: int | None = None

    def __call__(self) -> None:
        if self.first is None:
            self.first = threading.get_ident()
            self.arrived.set()
            self.second_is_in.wait(2)
        elif threading.get_ident() != self.first:
            self.second_is_in.set()
            self.first_is_done.wait(2)


@pytest.mark.parametrize("traced", [True, False])
def test_a_thread_that_is_done_does_not_put_the_other_back_into_training_mode(traced: bool, x: Tensor) -> None:
    class Early(Model):
        def forward(self, x: Tensor) -> Tensor:
            self.trouble()  # before the batch norm
            return super().forward(x)

    model = Early()
    train_a_little(model, x)
    model.train()
    reference = copy.deepcopy(model).eval()
    taps = FeatureTap(model), FeatureTap(model)
    if traced:
        taps[0].trace(x), taps[1].trace(x)
    meeting = Meeting()
    model.trouble = meeting
    before = snapshot(model)
    results: dict[int, Any] = {}

    def work(i: int) -> None:
        try:
            if i == 1:
                meeting.arrived.wait(10)
            results[i] = taps[i](x + i)
        except Exception as error:
            results[i] = error
        if i == 0:
            meeting.first_is_done.set()

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert_unchanged(before, model)
    for i in (0, 1):
        assert isinstance(results[i], Features), results[i]
        torch.testing.assert_close(results[i].logits, reference(x + i).detach())


def test_the_user_calls_the_model_in_another_thread_while_a_tap_traces_it(x: Tensor) -> None:
    model = Model().eval()
    reference = copy.deepcopy(model)
    meeting = Meeting()
    model.trouble = meeting
    results: dict[str, Any] = {}

    def capture() -> None:
        try:
            results["tap"] = FeatureTap(model)(x)
        except Exception as error:
            results["tap"] = error

    def use() -> None:
        meeting.arrived.wait(10)
        try:
            with torch.no_grad():
                results["user"] = model(x + 1)
        except Exception as error:
            results["user"] = error

    def release() -> None:
        meeting.second_is_in.wait(10)
        meeting.first_is_done.set()

    threads = [threading.Thread(target=target) for target in (capture, use, release)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert isinstance(results["tap"], Features), results["tap"]
    torch.testing.assert_close(results["user"], reference(x + 1).detach())
    torch.testing.assert_close(results["tap"].logits, reference(x).detach())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


# --- state ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("layer", [None, "norm"])
def test_the_state_is_plain_data_and_makes_the_same_tap(
    layer: str | None, make: Callable[[], Any], x: Tensor
) -> None:
    if layer is not None and make is functional_model:
        pytest.skip("its norm never runs as a module")
    model = make()
    tap = FeatureTap(model, layer).trace(x)
    state = json.loads(json.dumps(tap.to_dict()))
    passes = model.passes
    again = FeatureTap.from_dict(model, state)
    assert model.passes == passes, "the model was traced again"
    assert json.loads(json.dumps(again.to_dict())) == state
    for (name, value), (_, other) in zip(tap(x).fields(), again(x).fields(), strict=True):
        assert torch.equal(value, other), name
    if tap(x).classifier is not None:
        assert torch.equal(tap(x).classifier[0], again(x).classifier[0])
    assert again(x).absent == tap(x).absent
    assert again.describe() == tap.describe()


def test_the_state_of_dicts_and_cosine_heads(x: Tensor) -> None:
    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.project = nn.Linear(IN, D), nn.Linear(D, 4)
            self.prototypes = nn.Parameter(torch.randn(C, 4))

        def forward(self, x: Tensor) -> Any:
            g = self.project(F.relu(self.first(x)))
            return {"logits": F.linear(F.normalize(g), F.normalize(self.prototypes)), "embedding": g}

    model = Cosine()
    tap = FeatureTap(model).trace(x)
    twin = Cosine()
    again = FeatureTap.from_dict(twin, json.loads(json.dumps(tap.to_dict())))
    twin.load_state_dict(model.state_dict())
    for (name, value), (_, other) in zip(tap(x).fields(), again(x).fields(), strict=True):
        torch.testing.assert_close(value, other, msg=name)
    torch.testing.assert_close(tap(x).classifier[0], again(x).classifier[0])


def test_the_state_of_a_tap_without_a_trace() -> None:
    with pytest.raises(RuntimeError, match="trace"):
        FeatureTap(Model()).to_dict()


def test_the_state_of_another_model_raises_an_error(x: Tensor) -> None:
    state = FeatureTap(Model()).trace(x).to_dict()
    other = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C))
    with pytest.raises((ValueError, RuntimeError, AttributeError)):
        FeatureTap.from_dict(other, state)(x)
