"""Detectors of a user's own images: one file that holds all of it, and what reads that file."""

from featnorm.deploy.image_scorer import ImageScorer, ImageVerdict

__all__ = ["ImageScorer", "ImageVerdict"]
