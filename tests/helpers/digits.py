"""A small classifier of real digits, 0 to 8, for the trainers: 9 is OOD."""

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


@functools.cache
def parts():
    """Return sets of images (64,) and digits: "train", "validation" and "calibration" of 0 to 8, and "nines"."""
    rows, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    rows, nine = (rows / 16).float(), digits == 9
    cut = {"train": slice(800), "validation": slice(800, 1000), "calibration": slice(1000, None)}
    found = {name: TensorDataset(rows[~nine][some], digits[~nine][some]) for name, some in cut.items()}
    return {**found, "nines": TensorDataset(rows[nine], digits[nine])}


def loader(name, **options):
    """Return a loader of a data set."""
    return DataLoader(parts()[name], batch_size=100, **options)


def network():
    """Return a network with dropout, which draws random numbers when it is trained."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 9))
