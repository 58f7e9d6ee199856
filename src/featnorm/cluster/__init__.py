"""Many machines, by Ray: images are judged and asked about by actors, fits are mapped and merged."""

from featnorm.cluster.cluster import Cluster

__all__ = ["Cluster"]
