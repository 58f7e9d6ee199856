"""The norms compared with their definitions, and inequalities between them."""

import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from featnorm import norms
from featnorm.norms import l0_norm, l1_norm, lp_norm, negative_aware_norm

ALL = [l1_norm, l0_norm, negative_aware_norm, lambda a: lp_norm(a, 2), lambda a: lp_norm(a, 0.5)]
NAMES = ["l1", "l0", "nan", "l2", "l0.5"]
every_norm = pytest.mark.parametrize("norm", ALL, ids=NAMES)

values = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0]), st.floats(-1e3, 1e3, width=32))
matrices = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=values)
powers = st.floats(0.2, 12)


def reference(rows, p):
    # Decimals have a wider range; as a float, the power of a small number is 0, and so would be its norm.
    power = Decimal(float(p))
    return np.array([float(sum(abs(Decimal(float(x))) ** power for x in row) ** (1 / power)) for row in rows])


@settings(max_examples=60)
@given(matrices)
def test_definitions(a):
    t = torch.from_numpy(a)
    l1 = np.array([sum(abs(float(x)) for x in row) for row in a])
    l0 = np.array([len(row) - sum(float(x) <= 0 for x in row) for row in a])
    np.testing.assert_allclose(l1_norm(t), l1, rtol=1e-12)
    np.testing.assert_array_equal(l0_norm(t), l0)
    np.testing.assert_allclose(negative_aware_norm(t), l1 / np.maximum(l0, 1), rtol=1e-12)


@settings(max_examples=60)
@given(matrices, powers)
@example(np.array([[1.17549435e-38]]), 9.0)
def test_lp_norm_is_its_definition(a, p):
    np.testing.assert_allclose(lp_norm(torch.from_numpy(a), p), reference(a, p), rtol=1e-9, atol=1e-300)


@settings(max_examples=60)
@given(matrices, st.floats(1.01, 12))
def test_hoelder(a, p):
    t = torch.from_numpy(a)
    d, lp, l1 = a.shape[1], lp_norm(t, p), l1_norm(t)
    slack = 1 + 1e-12
    assert (lp <= l1 * slack).all()
    assert (l1 <= d ** (1 - 1 / p) * lp * slack).all()


@settings(max_examples=40)
@given(matrices, st.randoms(use_true_random=False))
def test_no_norm_depends_on_the_order_of_units_or_rows(a, random):
    units = random.sample(range(a.shape[1]), a.shape[1])
    rows = random.sample(range(a.shape[0]), a.shape[0])
    t = torch.from_numpy(a)
    for norm in ALL:
        torch.testing.assert_close(norm(t[:, units]), norm(t), rtol=1e-12, atol=0)
        torch.testing.assert_close(norm(t[rows]), norm(t)[rows], rtol=1e-12, atol=0)


@settings(max_examples=40)
@given(matrices, st.integers(-20, 20))
def test_a_layer_at_another_scale_scales_its_norms(a, exponent):
    t, c = torch.from_numpy(a), 2.0**exponent
    for norm in (l1_norm, negative_aware_norm, lambda x: lp_norm(x, 3)):
        torch.testing.assert_close(norm(c * t), c * norm(t), rtol=1e-12, atol=0)
    assert torch.equal(l0_norm(c * t), l0_norm(t))


def test_a_negative_unit_is_deactivated_and_still_has_a_magnitude():
    a = torch.tensor([[2.0, -1.0, 0.0, -0.0], [-1.0, -1.0, -2.0, 0.0]])
    assert l0_norm(a).tolist() == [1, 0]
    assert l1_norm(a).tolist() == [3, 4]
    assert negative_aware_norm(a).tolist() == [3, 4]  # no unit on: the count is taken as 1


def test_all_units_off_is_zero_and_not_nan():
    a = torch.zeros(2, 5)
    for norm in ALL:
        assert norm(a).tolist() == [0, 0]
    assert lp_norm(a, math.inf).tolist() == [0, 0]


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("p", [0.5, 2, 7, math.inf])
def test_lp_norm_neither_overflows_nor_underflows(scale, p):
    a = torch.tensor([[3.0, 4.0, 0.0]])
    torch.testing.assert_close(lp_norm(a * scale, p) / scale, lp_norm(a, p), rtol=1e-5, atol=0)


def test_lp_norm_goes_to_the_largest_unit():
    a = torch.tensor([[1.0, -3.0, 2.0]])
    assert lp_norm(a, math.inf).item() == 3
    assert lp_norm(a, 1e4).item() == pytest.approx(3, rel=1e-3)
    assert torch.equal(lp_norm(a, 1), l1_norm(a))


@every_norm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precision(norm, dtype):
    a = (torch.randn(5, 2000, generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
    got = norm(a)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.double(), norm(a.double()), rtol=1e-5, atol=0)


@every_norm
@pytest.mark.parametrize(("n", "d"), [(0, 4), (3, 0), (0, 0), (1, 1), (7, 1), (5, 1 << 17), (3000, 97)])
def test_shapes(norm, n, d):
    a = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    got = norm(a)
    assert got.shape == (n,)
    assert got.isfinite().all()
    if n > 1 and d:  # block borders: the rows of the end are the rows alone
        torch.testing.assert_close(got[-1:], norm(a[-1:]), rtol=1e-5, atol=0)


@every_norm
def test_memory_layout_and_gradients_do_not_matter(norm):
    a = torch.randn(9, 14, generator=torch.Generator().manual_seed(0))
    expected, before = norm(a), a.clone()
    for same in (a.T.contiguous().T, a.repeat(1, 2)[:, :14], a.repeat_interleave(2, 0)[::2]):
        assert torch.equal(same, a)
        torch.testing.assert_close(norm(same), expected)
    torch.testing.assert_close(norm(a.clone().requires_grad_()).detach(), expected)
    with torch.inference_mode():
        torch.testing.assert_close(norm(a), expected)
    assert torch.equal(a, before)


def test_the_norms_can_be_differentiated():
    a = torch.tensor([[1.0, 2.0, -4.0, 0.0]], requires_grad=True)
    negative_aware_norm(a).sum().backward()
    assert a.grad.tolist() == [[0.5, 0.5, -0.5, 0.0]]  # the count is a constant


def test_the_traced_count_is_the_same(monkeypatch):
    a = torch.randn(9, 14, generator=torch.Generator().manual_seed(0))
    plain = l0_norm(a)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(l0_norm(a), plain)


def test_small_blocks_change_nothing(monkeypatch):
    a = torch.randn(50, 14, generator=torch.Generator().manual_seed(0))
    plain = l0_norm(a)
    monkeypatch.setattr(norms, "_BLOCK_ELEMENTS", 100)
    assert torch.equal(l0_norm(a), plain)


@pytest.mark.parametrize(
    "norm", [l1_norm, negative_aware_norm, lambda a: lp_norm(a, 2), lambda a: lp_norm(a, math.inf)]
)
def test_nan_is_not_hidden(norm):
    assert norm(torch.tensor([[1.0, math.nan], [1.0, 2.0]])).isnan().tolist() == [True, False]


@every_norm
@pytest.mark.parametrize(
    "bad",
    [torch.ones(3), torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)],
    ids=["vector", "map", "integers", "booleans"],
)
def test_what_is_not_a_floating_point_matrix_is_refused(norm, bad):
    with pytest.raises(ValueError, match=r"floating-point activations of shape \(n, d\)"):
        norm(bad)


@pytest.mark.parametrize("p", [0, -1, math.nan, -math.inf, "2", None, True])
def test_a_power_that_makes_no_norm_is_refused(p):
    with pytest.raises(ValueError, match=r"lp_norm: p must be a number in \(0, inf\], got "):
        lp_norm(torch.ones(1, 2), p)
