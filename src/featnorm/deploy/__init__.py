"""Detectors of a user's own images: one file that holds all of it, and what reads that file."""

from featnorm.deploy.export import ExportError, export_onnx
from featnorm.deploy.image_scorer import ImageScorer, ImageVerdict

__all__ = ["ExportError", "ImageScorer", "ImageVerdict", "export_onnx"]
