"""Networks whose last hidden layer carries the norm, and heads for networks that have none."""

from featnorm.training.networks import MLP, CifarResNet18, ProjectionHead, attach_head

__all__ = ["MLP", "CifarResNet18", "ProjectionHead", "attach_head"]
