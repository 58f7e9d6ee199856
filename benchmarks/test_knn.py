"""KNN against scikit-learn's brute force (the mark: five times as fast) and faiss's Flat index (level with it)."""

import faiss
import torch
from sklearn.neighbors import NearestNeighbors

import featnorm as fn

K = 50


def test_exact(compare, size):
    queries, rows, d = size(50_000, 2_000), size(1_280_000, 20_000), size(512, 128)
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
