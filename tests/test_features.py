"""Features: what is refused and how, slicing, moving, joining, and whose layer the classifier is."""

import math

import numpy as np
import pytest
import torch

from featnorm.features import Features


def full(n=5, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(n, 4, generator=g).to(dtype)
    weight, bias = (
        torch.randn(3, 4, generator=torch.Generator().manual_seed(8)).to(dtype),
        torch.ones(3, dtype=dtype),
    )
    return Features(
        activation=a,
        pooled=a,
        embedding=torch.rand(n, 2, generator=g).to(dtype),
        logits=a @ weight.T + bias,
        labels=torch.arange(n) - 1,
        classifier=(weight, bias),
        absent={"views": "none"},
    )


@pytest.mark.parametrize("name", ["activation", "pooled", "embedding", "logits"])
@pytest.mark.parametrize(
    "bad",
    [torch.ones(3), torch.ones(3, 2, 2), torch.ones(3, 2, dtype=torch.int32), torch.ones(3, 2, dtype=torch.bool)],
    ids=["vector", "map", "integers", "booleans"],
)
def test_a_field_of_the_wrong_kind_is_refused_by_name(name, bad):
    with pytest.raises(
        ValueError, match=rf"^{name} must be floating point of shape \(n, width\), got torch\.\w+ of"
    ):
        Features(**{name: bad})


@pytest.mark.parametrize(
    "bad", [torch.ones(3), torch.ones(3, 1, dtype=torch.int64), torch.ones(3, dtype=torch.bool)]
)
def test_labels_of_the_wrong_kind_are_refused(bad):
    with pytest.raises(ValueError, match="labels must be integers of shape"):
        Features(labels=bad)


@pytest.mark.parametrize("value", [np.ones((3, 2)), [[1.0, 2.0]]], ids=["numpy", "list"])
def test_what_is_no_tensor_is_refused_by_name(value):
    with pytest.raises((TypeError, ValueError), match="activation"):
        Features(activation=value)


def test_no_field_at_all_is_refused():
    with pytest.raises(ValueError, match="need at least one of activation, pooled, embedding, logits, labels"):
        Features()
    with pytest.raises(ValueError, match="need at least one of"):
        Features(classifier=(torch.ones(2, 3), None))


def test_fields_of_different_length_are_refused_with_their_lengths():
    with pytest.raises(ValueError, match=r"number of inputs: \{'activation': 3, 'labels': 2\}"):
        Features(activation=torch.ones(3, 2), labels=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("weight", "bias"),
    [(torch.ones(3), None), (torch.ones(3, 2), torch.ones(2)), (torch.ones(3, 2), torch.ones(3, 1))],
)
def test_a_classifier_of_the_wrong_shape_is_refused(weight, bias):
    with pytest.raises(ValueError, match=r"classifier must be \(W, b\)"):
        Features(activation=torch.ones(3, 2), classifier=(weight, bias))


def test_a_missing_field_says_what_there_is_and_why():
    features = Features(logits=torch.ones(2, 3), absent={"activation": "the model has no hidden layer"})
    with pytest.raises(ValueError, match=r"`activation`.*: the model has no hidden layer"):
        features.tensor("activation")
    with pytest.raises(ValueError, match=r"`pooled` is not in Features\(logits \(2, 3\)\)$"):
        features.tensor("pooled")
    with pytest.raises(ValueError, match="`classifier` is not in"):
        features.linear()


def test_len_repr_and_fields():
    features = full()
    assert len(features) == 5
    assert repr(features) == (
        "Features(activation (5, 4), pooled (5, 4), embedding (5, 2), logits (5, 3), labels (5,), "
        "classifier (3, 4))"
    )
    assert [name for name, _ in features.fields()] == ["activation", "pooled", "embedding", "logits", "labels"]
    assert len(Features(activation=torch.empty(0, 3))) == 0


def test_the_classifier_is_detached():
    layer = torch.nn.Linear(4, 3)
    weight, bias = Features(activation=torch.ones(2, 4), classifier=(layer.weight, layer.bias)).linear()
    assert not weight.requires_grad
    assert not bias.requires_grad
    assert Features(activation=torch.ones(2, 4), classifier=(layer.weight, None)).linear()[1] is None


@pytest.mark.parametrize(
    "rows",
    [
        slice(1, 4),
        slice(None, None, 2),
        slice(0, 0),
        torch.tensor([True, False, True, False, True]),
        torch.tensor([4, 0, 0]),
        [3, 1],
        np.array([2, 2, 4]),
    ],
    ids=str,
)
def test_some_inputs(rows):
    features = full()
    some = features[rows]
    for name, value in features.fields():
        assert torch.equal(getattr(some, name), value[rows])
    assert some.classifier is features.classifier
    assert some.absent == features.absent
    assert some.pooled is some.activation


def test_a_tuple_of_indices_is_a_sequence_of_inputs():
    features = full()
    assert torch.equal(features[(3, 1)].activation, features.activation[[3, 1]])


def test_one_input_is_a_batch_of_one():
    with pytest.raises(TypeError, match=r"features\[2:2 \+ 1\]"):
        full()[2]


def test_to_another_precision_leaves_labels_whole():
    features = full()
    moved = features.to(torch.float64)
    assert {v.dtype for n, v in moved.fields() if n != "labels"} == {torch.float64}
    assert moved.labels.dtype == torch.int64
    assert [t.dtype for t in moved.classifier] == [torch.float64] * 2
    assert moved.pooled is moved.activation
    assert features.activation.dtype == torch.float32
    half = features.replace(classifier=(features.classifier[0], None)).to("cpu", torch.bfloat16)
    assert half.classifier[0].dtype == torch.bfloat16
    assert half.classifier[1] is None


def test_to_a_device():
    moved = full().to("meta")
    assert {value.device.type for _, value in moved.fields()} == {"meta"}
    assert moved.classifier[0].device.type == "meta"


def test_replace_sets_fields_and_keeps_the_others():
    features = full()
    other = features.replace(labels=None, logits=torch.zeros(5, 2))
    assert other.labels is None
    assert other.logits.shape == (5, 2)
    assert other.activation is features.activation
    assert other.absent == features.absent
    assert features.labels is not None
    with pytest.raises(ValueError, match="number of inputs"):
        features.replace(labels=torch.tensor([1]))


def test_features_cannot_be_changed():
    with pytest.raises(AttributeError):
        full().labels = None


def test_cat_is_the_whole():
    whole = full(7)
    joined = Features.cat([whole[:3], whole[3:3], whole[3:]])
    for name, value in whole.fields():
        assert torch.equal(getattr(joined, name), value)
    assert joined.classifier is whole.classifier
    assert joined.pooled is joined.activation
    assert joined.absent == whole.absent


def test_cat_of_what_is_one_tensor_in_one_batch_only_keeps_two():
    a = full(3)
    b = a.replace(pooled=a.activation + 1)
    joined = Features.cat([a, b])
    assert joined.pooled is not joined.activation
    assert torch.equal(joined.pooled[3:], a.activation + 1)


def test_cat_refuses_nothing_and_other_fields():
    with pytest.raises(ValueError, match="no batch"):
        Features.cat([])
    with pytest.raises(ValueError, match=r"batch 1 has other fields than batch 0"):
        Features.cat([full(), full().replace(labels=None)])


def test_cat_refuses_another_width_by_name():
    with pytest.raises(ValueError, match="embedding"):
        Features.cat([full(), full().replace(embedding=torch.ones(5, 3))])


def test_the_classifier_reads_the_layer_whose_logits_it_makes():
    features = full()
    assert features.classifier_reads("activation")
    assert not features.classifier_reads("embedding")  # another width
    weight, bias = features.classifier
    other = features.replace(pooled=features.pooled.flip(1) + 1)
    assert other.classifier_reads("activation")
    assert not other.classifier_reads("pooled")  # the same width
    cosine = features.replace(logits=torch.nn.functional.normalize(features.activation) @ weight.T)
    assert not cosine.classifier_reads("activation")
    assert not features.replace(classifier=None).classifier_reads("activation")
    assert not features.replace(pooled=None).classifier_reads("pooled")
    assert features.replace(logits=None).classifier_reads("pooled")
    assert not features.replace(logits=features.logits[:, :2]).classifier_reads("pooled")
    unbiased = features.replace(classifier=(weight, None), logits=features.logits - bias)
    assert unbiased.classifier_reads("pooled")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_classifier_is_known_in_any_precision(dtype):
    assert full(200).to(dtype).classifier_reads("pooled")


def test_logits_that_are_not_finite_are_no_map_of_the_layer():
    features = full()
    logits = features.logits.clone()
    logits[0, 0] = math.nan
    assert not features.replace(logits=logits).classifier_reads("pooled")


def test_whether_the_classifier_reads_an_empty_batch_can_be_asked():
    assert isinstance(full()[:0].classifier_reads("pooled"), bool)
