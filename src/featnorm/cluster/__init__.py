"""Scoring, feature extraction and fitting on many machines, by Ray."""

from featnorm.cluster.cluster import Cluster

__all__ = ["Cluster"]
