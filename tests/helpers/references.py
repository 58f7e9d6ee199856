"""A plain float64 reference of every detector, written from its formula and not as in the source.

Every registered detector must be in one of the two tables. The laws are tested for all expressions of
`REFERENCES`.
"""

import copy
import math

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import nn
from torchvision.transforms import functional as images_of

import featnorm as fn
from fabricate import held_out_features, id_features, of_activation, ood_features
from featnorm.augmentation import Distortion
from featnorm.detectors import parse_detector, registered_detectors
from featnorm.features import Features

TRAIN, TEST, OOD = id_features(), id_features(40, seed=5), ood_features(40)
HELD_OUT = held_out_features()
BOTH = Features.cat([TEST.replace(labels=None), OOD])


def np_unit(z):
    return z / (np.sqrt((z**2).sum(1, keepdims=True)) + 1e-10)


def quadratic(rows, mean, precision):
    return np.array([(r - mean) @ precision @ (r - mean) for r in rows])


def np_mahalanobis(z, y, q):
    cov, means = np.zeros((z.shape[1], z.shape[1])), []
    for c in np.unique(y):
        own = z[y == c]
        means.append(own.mean(0))
        for row in own:
            cov += np.outer(row - means[-1], row - means[-1])
    precision = np.linalg.pinv(cov / len(z), hermitian=True)
    return -np.min([quadratic(q, m, precision) for m in means], axis=0)


def np_relative(z, y, q):
    return np_mahalanobis(z, y, q) - np_mahalanobis(z, np.zeros(len(z)), q)


def np_ssd(z, q, groups=None):
    z, q = np_unit(z), np_unit(q)
    mean, std = z.mean(0), z.std(0)
    std = np.where(std > 1e-12, std, 1)
    z, q = (z - mean) / std, (q - mean) / std
    groups = np.zeros(len(z)) if groups is None else groups
    distances = []
    for g in np.unique(groups):
        own = z[groups == g]
        cov = np.atleast_2d(np.cov(own.T, bias=True))
        distances.append(quadratic(q, own.mean(0), np.linalg.pinv(cov, hermitian=True)))
    return -np.min(distances, axis=0)


def np_residual(z, weight, bias, q, dim):
    u = -np.linalg.pinv(weight) @ bias if bias is not None else np.zeros(z.shape[1])
    principal = np.linalg.svd(z - u, full_matrices=True)[2][:dim]
    return np.linalg.norm((q - u) - (q - u) @ principal.T @ principal, axis=1)


def np_knn(z, q, k, squared=True, normalize=True):
    z, q = (np_unit(z), np_unit(q)) if normalize else (z, q)
    d = np.array([np.sort(((z - row) ** 2).sum(1))[k - 1] for row in q])
    return -(d if squared else np.sqrt(d))


def np_svm(z, q, nu):
    """The dual, times nu n (Schölkopf et al., eq. 13): minimize a'Ka / 2 with 0 <= a_i <= 1 and sum a = nu n.

    Solved by exchanging weight between the two inputs that gain most by it, until none does.
    """
    gamma = 1 / (z.shape[1] * z.var())

    def kernel(a, b):
        return np.exp(-gamma * ((a[:, None] - b[None]) ** 2).sum(2))

    gram = kernel(z, z)
    a = np.full(len(z), nu)
    while True:
        slope = gram @ a
        low = np.where(a < 1, slope, np.inf).argmin()  # gains by more weight
        high = np.where(a > 0, slope, -np.inf).argmax()
        if slope[high] - slope[low] < 1e-11:
            break
        step = (slope[high] - slope[low]) / (gram[low, low] + gram[high, high] - 2 * gram[low, high])
        step = min(step, 1 - a[low], a[high])
        a[low] += step
        a[high] -= step
    inner = (a > 0) & (a < 1)  # on the boundary, where the score is 0
    return kernel(q, z) @ a - (gram @ a)[inner].mean()


def np_lse(logits):
    return np.array([math.log(sum(math.exp(v - max(row)) for v in row)) + max(row) for row in logits])


def np_softmax(logits):
    return np.exp(logits - np_lse(logits)[:, None])


def np_gen(logits, gamma, top):
    return np.array([-sum((p * (1 - p)) ** gamma for p in sorted(row)[-top:]) for row in np_softmax(logits)])


def np_kl_matching(logits, q_logits):
    p, q = np_softmax(logits), np_softmax(q_logits)
    typical = [p[p.argmax(1) == k].mean(0) for k in range(p.shape[1]) if (p.argmax(1) == k).any()]
    return np.array([-min((row * np.log(row / other)).sum() for other in typical) for row in q])


def np_she(z, y, logits, q, q_logits):
    correct = logits.argmax(1) == y
    patterns = [z[correct & (y == c)].mean(0) for c in range(logits.shape[1])]
    return np.array([row @ patterns[c] for row, c in zip(q, q_logits.argmax(1), strict=True)])


def np_nnguide(z, logits, q, q_logits, k):
    guides = np_lse(logits)[:, None] * np_unit(z)
    return np.array([np.sort(guides @ row)[-k:].mean() for row in np_unit(q)]) * np_lse(q_logits)


def np_neco(z, q, dim):
    principal = np.linalg.svd(z - z.mean(0))[2][:dim]
    return np.linalg.norm(q @ principal.T, axis=1) / np.linalg.norm(q, axis=1)


def np_margins(z, weight, logits, q):
    """For each input: h - mu, and the boundaries of the predicted class as pairs of a margin and a difference."""
    for row, scores in zip(q, logits, strict=True):
        y = scores.argmax()
        yield (
            row - z.mean(0),
            weight[y],
            [(scores[y] - scores[c], weight[y] - weight[c]) for c in range(len(scores)) if c != y],
        )


def np_fdbd(z, weight, logits, q):
    return np.array(
        [
            np.mean([margin / np.linalg.norm(w) if w.any() else 0.0 for margin, w in boundaries])
            / np.linalg.norm(v)
            for v, _, boundaries in np_margins(z, weight, logits, q)
        ]
    )


def np_nci(z, weight, logits, q):
    return np.array([w @ v / np.linalg.norm(v) for v, w, _ in np_margins(z, weight, logits, q)])


def np_ora(z, weight, logits, q):
    scores = []
    for v, _, boundaries in np_margins(z, weight, logits, q):
        points = [v - margin / (w @ w) * w for margin, w in boundaries if w.any()]
        cosines = [v @ p / np.linalg.norm(v) / np.linalg.norm(p) for p in points]
        scores.append(np.arccos(np.clip(min(cosines, default=1.0), -1, 1)))
    return np.array(scores)


def np_ras(z, q):
    means = np.sort(z, axis=1).mean(0)
    return np.array([means[np.argsort(np.argsort(row, kind="stable"), kind="stable")] for row in q])


def np_scale(q, percentile, prune):
    changed = []
    for row in q:
        kept = len(row) - int(np.round(len(row) * percentile / 100))
        top = np.argsort(-row, kind="stable")[:kept]
        factor = np.exp(row.sum() / row[top].sum()) if row.any() else 1.0
        changed.append(factor * (row * np.isin(np.arange(len(row)), top) if prune else row))
    return np.array(changed)


def np_nan(a):
    return np.abs(a).sum(1) / np.maximum((a > 0).sum(1), 1)


def np_predicted_mahalanobis(z, logits, q):
    y, mean = logits.argmax(1), z.mean(0)
    means = [(z[y == c].sum(0) + mean) / ((y == c).sum() + 1) for c in range(logits.shape[1])]
    residuals = np.stack([row - means[c] for row, c in zip(z, y, strict=True)])
    rounding = z.shape[1] * np.finfo(np.float32).eps
    inverse = np.linalg.pinv(residuals.T @ residuals / len(z), rcond=rounding, hermitian=True)
    return np.array([-min((row - m) @ inverse @ (row - m) for m in means) for row in q])


def np_pattern(z, logits, q, q_logits):
    y, on = logits.argmax(1), z > 0
    p = (on.sum(0) + 0.5) / (len(on) + 1)
    rates = [(on[y == c].sum(0) + p) / ((y == c).sum() + 1) for c in range(logits.shape[1])]
    return np.array(
        [
            sum(math.log(r if o else 1 - r) for o, r in zip(row > 0, rates[c], strict=True))
            for row, c in zip(q, q_logits.argmax(1), strict=True)
        ]
    )


def np_kl_uniform(logits):
    classes = logits.shape[1]
    return np.array(
        [
            sum(1 / classes * (math.log(1 / classes) - (v - lse)) for v in r)
            for r, lse in zip(logits, np_lse(logits), strict=True)
        ]
    )


def np_sum(*terms):
    """Add functions of features, each with its weight, standardized on the held-out inputs."""
    return sum(w * (score(BOTH) - score(HELD_OUT).mean()) / score(HELD_OUT).std() for w, score in terms)


def np_temperature(logits, y):
    n, classes = logits.shape
    target = (np.eye(classes)[y] * n + 1 / classes) / (n + 1)
    found = minimize_scalar(
        lambda t: -(target * np.log(np_softmax(logits / t))).sum(), bounds=(0.01, 100), options={"xatol": 1e-9}
    )
    return found.x


def _parts(features):
    weight, bias = features.classifier
    a = features.activation.numpy()
    return a, features.logits.numpy(), weight.numpy(), bias.numpy()


def _table():
    z, logits, weight, bias = _parts(TRAIN)
    q, q_logits, _, _ = _parts(BOTH)
    y = TRAIN.labels.numpy()
    ones = np.where(weight > 0, 1, -1)
    p90, p80, p70, p95 = (np.percentile(z, p) for p in (90, 80, 70, 95))

    unit, q_unit = np_unit(z), np_unit(q)

    def vim(dim, clip=np.inf):
        x = np.minimum(q, clip)
        alpha = logits.max(1).mean() / np_residual(z, weight, bias, z, dim).mean()
        return np_lse(x @ weight.T + bias) - alpha * np_residual(z, weight, bias, x, dim)

    def clipped(p):
        return lambda features: np.minimum(features.activation.numpy(), p) @ weight.T + bias

    def temperature(p=np.inf):
        return np_temperature(clipped(p)(HELD_OUT), HELD_OUT.labels.numpy())

    def kl(features):
        return np_kl_uniform(features.logits.numpy())

    def knn(k, p=np.inf):
        return lambda features: np_knn(z, np.minimum(features.pooled.numpy(), p), k)

    def nan(features):
        return np_nan(features.activation.numpy())

    return {
        "NAN()": lambda: np_nan(q),
        "L1Norm()": lambda: np.abs(q).sum(1),
        "LpNorm()": lambda: np.sqrt((q**2).sum(1)),
        "LpNorm(p=0.5)": lambda: np.sqrt(np.abs(q)).sum(1) ** 2,
        "LpNorm(p=inf)": lambda: np.abs(q).max(1),
        "Sparsity()": lambda: 1 / np.maximum((q > 0).sum(1), 1),
        "EmbeddingMagnitude()": lambda: np.linalg.norm(BOTH.embedding.numpy(), axis=1),
        "HiddenConfidence()": lambda: np.array([max(sum(s * x) for s in ones) for x in q]),
        "MSP()": lambda: np.array([np.exp(r - r.max()).max() / np.exp(r - r.max()).sum() for r in q_logits]),
        "MaxLogit()": lambda: q_logits.max(1),
        "Energy()": lambda: np_lse(q_logits),
        "KLUniform()": lambda: np_kl_uniform(q_logits),
        "TemperatureScaling(MSP())": lambda: np_softmax(q_logits / temperature()).max(1),
        "ReAct(TemperatureScaling(Energy()))": lambda: np_lse(clipped(p90)(BOTH) / temperature(p90)),
        "GEN()": lambda: np_gen(q_logits, 0.1, 3),
        "GEN(gamma=0.5, top=2)": lambda: np_gen(q_logits, 0.5, 2),
        "KLMatching()": lambda: np_kl_matching(logits, q_logits),
        "SHE()": lambda: np_she(z, y, logits, q, q_logits),
        "NNGuide()": lambda: np_nnguide(z, logits, q, q_logits, 10),
        "NNGuide(k=3, share=0.5)": lambda: np_nnguide(z, logits, q, q_logits, 3),
        "NECO()": lambda: np_neco(z, q, 2),  # the classes are far apart
        "NECO(dim=3)": lambda: np_neco(z, q, 3),
        "Mahalanobis()": lambda: np_mahalanobis(z, y, q),
        "Mahalanobis(normalize=True)": lambda: np_mahalanobis(unit, y, q_unit),
        "Mahalanobis(relative=True)": lambda: np_relative(z, y, q),
        "Mahalanobis(normalize=True, relative=True)": lambda: np_relative(unit, y, q_unit),
        "PredictedMahalanobis()": lambda: np_predicted_mahalanobis(unit, logits, q_unit),
        "ActivationPattern()": lambda: np_pattern(z, logits, q, q_logits),
        "SSD()": lambda: np_ssd(z, q),
        "SSD(clusters=3)": lambda: np_ssd(z, q, y),  # the classes are far apart: k-means finds them
        "SSD(clusters='labels')": lambda: np_ssd(z, q, y),
        "KNN(k=5)": lambda: np_knn(z, q, 5),
        "KNN(k=5, size=1000)": lambda: np_knn(z, q, 5),
        "KNN(k=2, squared=False)": lambda: np_knn(z, q, 2, squared=False),
        "KNN(k=3, normalize=False)": lambda: np_knn(z, q, 3, normalize=False),
        "OneClassSVM()": lambda: np_svm(z, q, 0.1),
        "OneClassSVM(nu=0.5)": lambda: np_svm(z, q, 0.5),
        "Residual()": lambda: -np_residual(z, weight, bias, q, 6),
        "Residual(dim=4)": lambda: -np_residual(z, weight, bias, q, 4),
        "Residual(dim=4, normalize=True)": lambda: -np_residual(unit, weight, None, q_unit, 4),
        "ViM()": lambda: vim(6),
        "ViM(dim=5, normalize=True)": lambda: (
            np_lse(q_logits)
            - logits.max(1).mean()
            / np_residual(unit, weight, None, unit, 5).mean()
            * np_residual(unit, weight, None, q_unit, 5)
        ),
        "ViM(dim=5)": lambda: vim(5),
        "ReAct(NAN())": lambda: np_nan(np.minimum(q, p90)),
        "ReAct(HiddenConfidence())": lambda: (np.minimum(q, p90) @ ones.T).max(1),
        "ReAct(Energy(), percentile=80)": lambda: np_lse(np.minimum(q, p80) @ weight.T + bias),
        "ReAct(KNN(k=3), percentile=70)": lambda: np_knn(z, np.minimum(q, p70), 3),
        "ReAct(ViM(dim=4))": lambda: vim(4, p90),
        "ReAct(KNN(k=3) / NAN())": lambda: np_knn(z, np.minimum(q, p90), 3) / np_nan(np.minimum(q, p90)),
        "FDBD()": lambda: np_fdbd(z, weight, q_logits, q),
        "NCI()": lambda: np_nci(z, weight, q_logits, q),
        "NCI(alpha=0.01)": lambda: np_nci(z, weight, q_logits, q) + 0.01 * np.abs(q).sum(1),
        "ORA()": lambda: np_ora(z, weight, q_logits, q),
        "ReAct(FDBD())": lambda: np_fdbd(z, weight, np.minimum(q, p90) @ weight.T + bias, np.minimum(q, p90)),
        "RAS(Energy())": lambda: np_lse(np_ras(z, q) @ weight.T + bias),
        "RAS(KNN(k=3))": lambda: np_knn(z, np_ras(z, q), 3),
        "KNN(k=5) / NAN()": lambda: np_knn(z, q, 5) / np_nan(q),
        "SSD() / L1Norm()": lambda: np_ssd(z, q) / np.abs(q).sum(1),
        "Residual() / EmbeddingMagnitude()": lambda: (
            -np_residual(z, weight, bias, q, 6) / np.linalg.norm(BOTH.embedding.numpy(), axis=1)
        ),
        "KLUniform() + KNN(k=5)": lambda: np_sum((1, kl), (1, knn(5))),
        "2 * (KNN(k=5) / NAN()) + NAN() + 0.5 * KLUniform()": lambda: np_sum(
            (2, lambda features: knn(5)(features) / nan(features)), (1, nan), (0.5, kl)
        ),
        "1 * KLUniform()": lambda: np_sum((1, kl)),
        "ReAct(KLUniform() + KNN(k=3))": lambda: np_sum(
            (1, lambda features: np_kl_uniform(clipped(p90)(features))), (1, knn(3, p90))
        ),
        "ReAct(SSD()) / Sparsity()": lambda: np_ssd(z, np.minimum(q, p90)) * np.maximum((q > 0).sum(1), 1),
        "Mahalanobis() / ReAct(NAN(), percentile=95)": lambda: (
            np_mahalanobis(z, y, q) / np_nan(np.minimum(q, p95))
        ),
    }


REFERENCES = _table()

#: As `TRAIN`, `TEST` and `BOTH`, for detectors of rectified features.
RECTIFIED_TRAIN, RECTIFIED_TEST, RECTIFIED_BOTH = (
    of_activation(f.activation.clamp_min(0), f.labels) for f in (TRAIN, TEST, BOTH)
)


def _rectified_table():
    z, _, weight, bias = _parts(RECTIFIED_TRAIN)
    q, _, _, _ = _parts(RECTIFIED_BOTH)

    def energy(percentile, *, prune):
        return np_lse(np_scale(q, percentile, prune) @ weight.T + bias)

    return {
        "SCALE(Energy())": lambda: energy(85, prune=False),
        "SCALE(Energy(), percentile=62.5)": lambda: energy(62.5, prune=False),
        "SCALE(L1Norm(), percentile=50)": lambda: np.abs(np_scale(q, 50, False)).sum(1),
        "ASH(Energy())": lambda: energy(90, prune=True),
        "ASH(Energy(), percentile=37.5)": lambda: energy(37.5, prune=True),
        "ASH(KNN(k=3), percentile=70)": lambda: np_knn(z, np_scale(q, 70, True), 3),
    }


#: Detectors that take rectified features alone, fitted to `RECTIFIED_TRAIN`, of `RECTIFIED_BOTH`.
RECTIFIED_REFERENCES = _rectified_table()


def net(head, seed=0):
    """A small convolutional network for images (n, 3, 8, 8), with a head for features of width 6."""
    torch.manual_seed(seed)
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(512, 6)
    )
    model = nn.Sequential(body, head)
    model(torch.rand(64, 3, 8, 8))  # running statistics that are not the initial ones
    return model


def odin(logits_of, images, temperature, eps, std=(1, 1, 1)):
    """Liang et al., in float64 and one input at a time."""
    scores = []
    for image in images.double():
        x = image[None].clone().requires_grad_()
        logits = logits_of(x) / temperature
        loss = -torch.log_softmax(logits, 1)[0, logits.argmax()]
        loss.backward()
        step = eps * x.grad.sign() / torch.tensor(std).double()[None, :, None, None]
        scores.append(torch.softmax(logits_of(x.detach() - step) / temperature, 1).max().item())
    return np.array(scores)


def views(score, images, dy, dx):
    """The mean of a score over nine translations."""
    height, width = images.shape[2:]
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (dy, dy), (dx, dx)), mode="reflect")
    moved = [padded[:, :, y : y + height, x : x + width] for y in (0, dy, 2 * dy) for x in (0, dx, 2 * dx)]
    return torch.stack([score(torch.from_numpy(view)) for view in moved]).mean(0).numpy()


def rotnet(logits_of, images):
    turned = [images_of.rotate(images.double(), 90 * turn) for turn in range(4)]
    return sum(logits_of(view).softmax(1)[:, turn] for turn, view in enumerate(turned)).numpy() / 4


def csi_views(model, image, augmentations, scale):
    """Means over the views of one image, in float64: embeddings (4, e), and the logit of each rotation (4,)."""
    embeddings, logits = [], []
    side = image.shape[1]
    for seed in range(augmentations):
        generator = torch.Generator().manual_seed(seed)
        mirrored = images_of.hflip(image) if torch.rand((), generator=generator) < 0.5 else image
        for turn in range(4):
            drawn = Distortion.draw(1, (side, side), generator, scale=(scale, scale), flips=False)
            view = images_of.rotate(mirrored, 90 * turn)
            top, left, height, width = (int(v) for v in drawn.box[0])
            view = images_of.resized_crop(view, top, left, height, width, [side, side], antialias=False)
            for which in drawn.order[0]:
                change = ("brightness", "contrast", "saturation", "hue")[int(which)]
                view = getattr(images_of, f"adjust_{change}")(view, float(drawn.factors[0, which]))
            if drawn.gray[0]:
                view = images_of.rgb_to_grayscale(view, 3)
            output = model(view[None].double())
            embeddings.append(output["embedding"][0])
            logits.append(output["logits"][0, turn])
    by_view = torch.stack(embeddings).unflatten(0, (-1, 4)), torch.stack(logits).unflatten(0, (-1, 4))
    return [values.mean(0) for values in by_view]


def csi(model, train, images, augmentations, scale):
    known = [csi_views(model, image, augmentations, scale) for image in train]
    scores = []
    for z, f in (csi_views(model, image, augmentations, scale) for image in images):
        total = 0.0
        for turn in range(4):
            length = np.mean([float(other[turn].norm()) for other, _ in known])
            logit = np.mean([float(other[turn]) for _, other in known])
            total += max(float(z[turn] @ other[turn] / other[turn].norm()) for other, _ in known) / length
            total += float(f[turn]) / logit
        scores.append(total / 4)
    return np.array(scores)


def _exact(model):
    """The model in float64, without gradients for its parameters."""
    return copy.deepcopy(model).eval().double().requires_grad_(False)


def _logits(model):
    exact = _exact(model)
    return lambda images: exact(images)["logits"]


#: Detectors that run the model again; arguments: a model with an embedding and four logits, training and test
#: images.
MODEL_REFERENCES = {
    "ODIN(temperature=10, eps=0.05)": lambda model, train, test: odin(_logits(model), test, 10, 0.05),
    "Views(L1Norm())": lambda model, train, test: views(
        lambda images: fn.Scorer(model, fn.L1Norm())(images).score, test, 1, 1
    ),
    "RotNet()": lambda model, train, test: rotnet(_logits(model), test),
    "CSI(augmentations=3, scale=0.5)": lambda model, train, test: csi(_exact(model), train, test, 3, 0.5),
}

OWN = {
    name: kind
    for name, kind in registered_detectors().items()
    if kind.__module__.startswith("featnorm.detectors.")
}
EVERY = list(REFERENCES)
LEARNERS = [expression for expression in EVERY if parse_detector(expression).needs_fit]
UNFITTED = [expression for expression in EVERY if expression not in LEARNERS]
NEED_LABELS = [expression for expression in LEARNERS if "labels" in parse_detector(expression).learns]
