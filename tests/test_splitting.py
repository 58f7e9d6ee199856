"""The split by groups: near-duplicates are found, stay on one side, and new groups are flagged as stated."""

import hashlib
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy.cluster.hierarchy import linkage
from scipy.stats import binom

from featnorm import splitting
from featnorm._utils.layout import fast_layout
from featnorm.calibration import Calibration
from featnorm.detectors import KNN, KLUniform
from featnorm.features import Features
from featnorm.inputs import open_source
from featnorm.models import DEFAULT_MODEL, create_model
from featnorm.models.loading import backbone_of
from featnorm.splitting import (
    MIN_CONSTANTS,
    first_of_groups,
    for_constants,
    held_out,
    join_groups,
    near_duplicates,
)


def digests_of(n):
    return [hashlib.sha256(str(i).encode()).digest() for i in range(n)]


def clips(generator, count, frames, spread=0.25, width=128):
    """Features of clips, (count * frames, width): each frame is the clip's scene with some noise."""
    scenes = torch.randn(count, 1, width, generator=generator)
    return (scenes + spread * torch.randn(count, frames, width, generator=generator)).flatten(0, 1)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_clips_are_found_in_any_order_and_single_images_are_not_grouped(generator):
    values = torch.cat([clips(generator, 40, 10), torch.randn(200, 128, generator=generator)])
    order = torch.randperm(600, generator=generator)
    groups = near_duplicates(1000 * values[order])
    is_frame, scene = order < 400, order // 10
    assert torch.equal(groups[is_frame], torch.arange(600)[is_frame][join_groups(scene[is_frame])])
    assert len(groups[~is_frame].unique()) >= 195
    # Without clips, what is grouped by chance are few, in groups of a few.
    single = near_duplicates(torch.randn(2000, 128, generator=generator))
    _, counts = single.unique(return_counts=True)
    assert counts.max() <= 3
    assert counts[counts > 1].sum() < 0.02 * 2000


def isolated_by_definition(values, limit):
    """All clusters of single linkage by scipy, and the outermost of those that are isolated."""
    unit = torch.nn.functional.normalize(values.double()).numpy()
    tree = linkage(unit, "single")
    n, members, links = len(unit), [{i} for i in range(len(unit))], {}
    for new, (a, b, distance, _) in enumerate(tree, n):
        members.append(members[int(a)] | members[int(b)])
        links[int(a)] = links[int(b)] = distance**2
        links[new] = np.inf
    heights = [0.0] * n + (tree[:, 2] ** 2).tolist()
    groups = torch.arange(n)
    for cluster in range(n, 2 * n - 2):  # ascending, so that the outermost comes last
        if len(members[cluster]) <= limit and links[cluster] >= 1.5 * heights[cluster]:
            groups[list(members[cluster])] = min(members[cluster])
    return groups


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_the_outermost_isolated_clusters_of_single_linkage(seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [clips(generator, 8, frames, spread) for frames, spread in ((2, 0.3), (5, 0.6), (20, 0.5), (40, 0.4))]
    values = torch.cat([*parts, torch.randn(100, 128, generator=generator)])
    groups = near_duplicates(values)
    assert torch.equal(groups, isolated_by_definition(values, len(values) // 20))
    assert len(groups.unique()) < len(values) - 100


def test_equal_features_are_one_group(generator):
    values = torch.randn(100, 128, generator=generator)
    values[[3, 50, 98]] = values[7].clone()
    values[20] = 5 * values[21]
    expected = torch.arange(100)
    expected[[7, 50, 98]] = 3
    expected[21] = 20
    assert torch.equal(near_duplicates(values), expected)


def test_what_is_too_large_is_a_kind_of_image(generator):
    kinds = clips(generator, 12, 50)  # one in 12 images: more than one in 20
    assert near_duplicates(kinds).unique(return_counts=True)[1].max() <= 5
    assert near_duplicates(kinds[:39]).tolist() == list(range(39))
    classes = torch.arange(30).repeat_interleave(20)
    values = clips(generator, 30, 20)
    assert torch.equal(near_duplicates(values), join_groups(classes))
    assert torch.equal(near_duplicates(values, classes), torch.arange(600))
    # Two clips of each class are clips, and no classes.
    assert torch.equal(near_duplicates(values, classes // 2), join_groups(classes))
    partly = torch.where(classes == 3, -1, classes)
    assert near_duplicates(values, partly).unique(return_counts=True)[1].sort().values[-2:].tolist() == [1, 20]


def test_many_images_are_searched_approximately_with_the_same_result(generator, monkeypatch):
    values = torch.cat([clips(generator, 100, 20), torch.randn(1000, 128, generator=generator)])
    exact = near_duplicates(values)
    monkeypatch.setattr(splitting, "_MAX_EXACT", 1000)
    monkeypatch.setattr(splitting, "_PAIRS", 5000)
    approximate = near_duplicates(values)
    assert torch.equal(exact[:2000], torch.arange(100).repeat_interleave(20) * 20)
    assert (exact == approximate).double().mean() > 0.99


def test_groups_are_joined_over_all_groupings():
    assert join_groups(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 3]
    assert join_groups(torch.tensor([5, 5, 2, 3, 2]), [b"x", b"y", b"x", b"z", b"w"]).tolist() == [0, 0, 0, 3, 0]


def test_groups_are_held_out_as_a_whole_whatever_their_order(generator):
    digests, groups = digests_of(600), torch.randint(120, (600,), generator=generator)
    apart = held_out(digests, groups)
    for group in groups.unique():
        assert len(apart[groups == group].unique()) == 1
    assert len(groups[apart].unique()) == 24
    order = torch.randperm(600, generator=generator)
    shuffled = [digests[i] for i in order.tolist()]
    assert torch.equal(held_out(shuffled, groups[order]), apart[order])
    # Every fifth digest, without groups: the rule that earlier versions had.
    alone = held_out(digests)
    chosen = set(sorted(digests)[::5])
    assert alone.tolist() == [digest in chosen for digest in digests]
    first = first_of_groups(digests, groups)
    assert first.sum() == len(groups.unique()) == len(groups[first].unique())
    assert torch.equal(first_of_groups(shuffled, groups[order]), first[order])


def test_copies_are_on_one_side():
    digests = [bytes([i // 2]) for i in range(400)]
    apart = held_out(digests)
    assert int(apart.sum()) == 80
    assert torch.equal(apart[::2], apart[1::2])
    # A copy in another group joins the two groups.
    apart = held_out([b"a", b"b", b"c", b"a"], torch.tensor([0, 0, 1, 1]))
    assert apart.tolist() == [True] * 4


def test_as_many_groups_are_held_out_as_the_rate_needs():
    digests = digests_of(60)
    assert [int(held_out(digests[:n], tpr=0.95).sum()) for n in (20, 21, 60)] == [19, 19, 19]
    assert int(held_out(digests, tpr=0.8).sum()) == 12
    assert int(held_out(digests * 2, tpr=0.95).sum()) == 38
    with pytest.raises(
        ValueError, match=r"^19 groups of inputs are too few for tpr=0\.95: 19 are needed for calibra"
    ):
        held_out(digests[:19], tpr=0.95)
    with pytest.raises(ValueError, match=r"^6 groups of inputs are too few for tpr=0\.95"):
        held_out(digests, torch.arange(60) // 10, 0.95)


def test_constants_come_from_groups_of_their_own_and_leave_as_many_as_the_rate_needs(generator):
    digests, groups = digests_of(3000), torch.randint(1000, (3000,), generator=generator)
    apart = held_out(digests, groups, 0.95, MIN_CONSTANTS)
    assert torch.equal(apart, held_out(digests, groups))
    chosen = for_constants(digests, groups, apart, 0.95)
    count = len(groups[apart].unique())
    assert int(chosen.sum()) == len(groups[chosen].unique()) == count // 4
    assert not (chosen & ~apart).any()
    order = torch.randperm(3000, generator=generator)
    shuffled = [digests[i] for i in order.tolist()]
    assert torch.equal(for_constants(shuffled, groups[order], apart[order], 0.95), chosen[order])
    alone = torch.arange(3000)
    for n, tpr, expected in (
        (30, 0.95, (10, 19)),
        (100, 0.95, (10, 19)),
        (200, 0.95, (10, 30)),
        (120, 0.99, (10, 99)),
    ):
        apart = held_out(digests[:n], alone[:n], tpr, MIN_CONSTANTS)
        made = for_constants(digests[:n], alone[:n], apart, tpr)
        assert (int(made.sum()), int((apart & ~made).sum())) == expected
    many = for_constants(digests, alone, alone >= 0, 0.95)
    assert int(many.sum()) == 750
    few = torch.zeros(3000, dtype=torch.bool).index_fill(0, torch.arange(22), True)
    assert int(for_constants(digests, alone, few, 0.95).sum()) == 3
    with pytest.raises(
        ValueError, match=r"^29 groups of inputs are too few for tpr=0\.95: 29 are needed for calibration and c"
    ):
        held_out(digests[:29], None, 0.95, MIN_CONSTANTS)


def test_a_sum_flags_new_inputs_as_stated(generator):
    """With constants from other inputs than the threshold, the rate is that of 20 exchangeable scores."""
    rate, draws = 0.05, 400
    flagged = 0
    for draw in range(draws):
        values = torch.randn(45, 4, generator=generator)
        features, new = Features(pooled=values[:40], logits=2 * values[:40]), values[40:41]
        digests = [hashlib.sha256(f"{draw} {i}".encode()).digest() for i in range(40)]
        apart = held_out(digests, None, 1 - rate, MIN_CONSTANTS)
        constants = for_constants(digests, torch.arange(40), apart, 1 - rate)
        detector = (KLUniform() + KNN(k=1)).fit(features[~apart], features[constants])
        calibration = Calibration(detector.score(features[apart & ~constants]), 1 - rate)
        flagged += int(not calibration.is_id(detector.score(Features(pooled=new, logits=2 * new))))
    low, high = binom.ppf([0.0005, 0.9995], draws, rate)
    assert low <= flagged <= high


def flagged_by_split(draw, count):
    """Shares of new inputs that are flagged after splits by frames, by groups that are found, and by given ones.

    ``draw(seed)`` returns features of known inputs, their groups, and features of inputs of new groups.
    """
    flagged = {"frames": [], "found": [], "given": []}
    for seed in range(count):
        values, given, new = draw(seed)
        digests = [hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(len(values))]
        single = torch.arange(len(values))
        for name, groups in (("frames", single), ("found", near_duplicates(values)), ("given", given)):
            apart = held_out(digests, groups, 0.95)
            chosen = apart & first_of_groups(digests, groups)
            detector = KNN(1).fit(Features(pooled=values[~apart]))
            calibration = Calibration(detector.score(Features(pooled=values[chosen])))
            flagged[name].append(float((~calibration.is_id(detector.score(Features(pooled=new)))).double().mean()))
    return {name: np.array(shares) for name, shares in flagged.items()}


def test_new_clips_are_flagged_as_stated_if_clips_are_on_one_side():
    """Fault C5: with frames of one clip on both sides of the split, most new clips are flagged."""

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return clips(generator, 48, 10), torch.arange(480) // 10, clips(generator, 20, 10)

    flagged = flagged_by_split(draw, 60)
    assert flagged["frames"].mean() > 0.9
    for name in ("found", "given"):
        assert flagged[name].mean() <= 0.05 + 4 * flagged[name].std() / 60**0.5
        assert flagged[name].mean() > 0.02


def film(image, rng):
    """A frame of a clip: the image from another position, in other light, and compressed again."""
    width, height = image.size
    scale = rng.uniform(0.82, 0.9)
    x, y = (rng.uniform(0, (1 - scale) * size) for size in image.size)
    box = x, y, x + scale * width, y + scale * height
    image = image.transform(image.size, Image.Transform.EXTENT, box, Image.Resampling.BICUBIC)
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.85, 1.15))
    image.save(file := io.BytesIO(), "JPEG", quality=rng.randint(50, 95))
    return Image.open(file).convert("RGB")


@pytest.mark.slow
def test_new_clips_of_real_images_are_flagged_as_stated(shared_data):
    source = open_source(f"{shared_data}/tiny_imagenet/val.parquet[::70]")
    loaded, rng = create_model(DEFAULT_MODEL), random.Random(0)
    backbone = fast_layout(backbone_of(loaded)[0].eval())
    frames = [loaded.transform(film(source.item(i), rng)) for i in range(len(source)) for _ in range(4)]
    with torch.no_grad():
        values = torch.cat(
            [backbone(fast_layout(torch.stack(frames[start : start + 36]))) for start in range(0, len(frames), 36)]
        )
    clip = torch.arange(len(values)) // 4
    found = near_duplicates(values)
    assert (join_groups(found, clip) == join_groups(clip)).all()  # no group has frames of two clips
    assert sum(len(found[clip == one].unique()) == 1 for one in clip.unique()) > 0.85 * len(source)

    def draw(seed):
        known = torch.isin(clip, torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:48])
        return values[known], clip[known], values[~known]

    flagged = flagged_by_split(draw, 25)
    assert flagged["frames"].mean() > 0.5
    for name in ("found", "given"):
        assert flagged[name].mean() <= 0.05 + 4 * flagged[name].std() / 25**0.5


@pytest.mark.slow
def test_ordinary_images_are_not_grouped(shared_data):
    source = open_source(f"{shared_data}/imagenet1k_sample/test.parquet[::4]")
    loaded = create_model(DEFAULT_MODEL)
    backbone = fast_layout(backbone_of(loaded)[0].eval())
    images = [loaded.transform(source.item(i)) for i in range(len(source))]
    with torch.no_grad():
        values = torch.cat(
            [backbone(fast_layout(torch.stack(images[start : start + 50]))) for start in range(0, 250, 50)]
        )
    assert len(near_duplicates(values).unique()) >= 0.99 * len(source)
