"""The demonstration's network learns, and the same seed makes the same network."""

from dataclasses import replace

import torch

from featnorm import demo


def test_demo_network_knows_its_digits(monkeypatch):
    monkeypatch.setattr(demo, "RECIPE", replace(demo.RECIPE, epochs=15))
    data = demo.load()
    images, labels = data.test
    assert (demo.train(data.train)(images).argmax(1) == labels).double().mean() > 0.95


def test_demo_network_depends_on_the_seed_alone(monkeypatch):
    monkeypatch.setattr(demo, "RECIPE", replace(demo.RECIPE, epochs=1))
    data = demo.load()
    model = demo.train(data.train)
    torch.rand(7)
    again = demo.train(data.train)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
