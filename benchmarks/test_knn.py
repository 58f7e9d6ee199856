"""KNN compared with scikit-learn's brute force and faiss's Flat index.

The targets are five times the speed of the former and that of the latter. Also KNN with an index, compared with
the exact search (target: ten times as fast).
"""

import time

import faiss
import torch
from sklearn.neighbors import NearestNeighbors

import featnorm as fn

K = 50
# The marks are for 50,000 queries. Exact searches process blocks of at most this many queries, so the time is
# proportional to their number; 50,000 would take hours for three libraries and several rounds.
QUERIES = 4_096


def test_exact(compare, size):
    queries, rows, d = size(QUERIES, 2_000), size(1_280_000, 20_000), size(512, 128)
    random = torch.Generator().manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(rows, d, generator=random))
    asked = torch.nn.functional.normalize(torch.randn(queries, d, generator=random))
    ours = fn.KNN(K).use_bank(bank)
    flat = faiss.IndexFlatL2(d)
    flat.add(bank.numpy())
    brute = NearestNeighbors(n_neighbors=K, algorithm="brute", n_jobs=-1).fit(bank.numpy())
    features = fn.Features(pooled=asked)
    compare.time(
        "KNN",
        lambda: ours.score(features),
        {
            "scikit-learn, brute force": (lambda: brute.kneighbors(asked.numpy()), 1 / 5),
            "faiss, IndexFlatL2": (lambda: flat.search(asked.numpy(), K), 1.05),
        },
        rounds=3,
        sizes=f"{queries:,} queries, bank of {rows:,}, d = {d}, k = {K}",
        warm=False,
    )


def test_index(compare, size):
    # An index needs rows of low intrinsic dimension, like those of a network: ten classes, and within them
    # directions of decreasing variance. Levina and Bickel's estimate of the intrinsic dimension, from 50
    # neighbors, is 14 for these rows and 15 for the features of our ResNet-18 on CIFAR-10.
    asked, rows, d = size(QUERIES, 2_000), size(1_280_000, 150_000), size(512, 128)
    random = torch.Generator().manual_seed(0)
    means = torch.randn(10, d, generator=random)
    directions = torch.randn(64, d, generator=random) / torch.arange(1, 65)[:, None]

    def rows_of_classes(n):
        within = torch.randn(n, len(directions), generator=random)
        return torch.addmm(means[torch.randint(len(means), (n,), generator=random)], within, directions)

    bank = torch.nn.functional.normalize(rows_of_classes(rows).relu_())
    own = torch.nn.functional.normalize(rows_of_classes(asked).relu_())
    ood = torch.nn.functional.normalize(torch.rand(1_000, d, generator=random))
    features = fn.Features(pooled=own)
    exact, index = fn.KNN(K).use_bank(bank), fn.KNN(K, recall=0.99).use_bank(bank)
    began = time.perf_counter()
    index.score(features[:1])
    built = time.perf_counter() - began
    found = f"its own queries: {_found(index, exact, own[:1_000])}; OOD queries: {_found(index, exact, ood)}"
    compare.time(
        "KNN(recall=0.99)",
        lambda: index.score(features),
        {"the exact search": (lambda: exact.score(features), 1 / 10)},
        rounds=3,
        sizes=f"{asked:,} queries, bank of {rows:,}, d = {d}, k = {K}; built in {built:.0f} s; {found}",
        warm=False,
    )


def _found(index, exact, queries):
    found, true = index.nearest(queries, K), exact.nearest(queries, K)
    share = (found <= true[:, -1:] + 1e-6).float().mean()
    farther = (found[:, -1] / true[:, -1]).mean() - 1
    return f"recall {share:.3f}, k-th squared distance {farther:.2%} too large"
