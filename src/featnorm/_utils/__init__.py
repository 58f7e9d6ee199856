"""Helpers that know nothing of detectors and models: files, checks, errors, memory."""
