"""Benchmarks: their data, models and detectors."""
