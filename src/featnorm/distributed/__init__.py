"""Many machines, by Ray: images are judged and asked about by actors, fits are mapped and merged."""

from featnorm.distributed.cluster import Cluster

__all__ = ["Cluster"]
