"""Clips of real pixels: what is written is what is read, and the rates of the study on scores that are known."""

import json
import math

import numpy as np
import pytest
import torch

from featnorm.inputs import open_source
from featnorm.paper.study import studies

pytest.importorskip("av", reason="PyAV is not installed")

from featnorm.paper.studies import video


def test_a_clip_shows_its_image_from_beginning_to_end(tmp_path):
    image = torch.full((3, 32, 32), 60, dtype=torch.uint8)
    image[0, 8:24, 8:24] = 230  # a red square in its middle
    frames = list(video.footage(image, np.random.default_rng(0)))
    assert video._LENGTHS[0] <= len(frames) <= video._LENGTHS[1]
    video.write_clip(tmp_path / "clip.mp4", iter(frames))
    source = open_source(str(tmp_path / "clip.mp4"), fps=0)
    assert len(source) == len(frames)
    for i in (0, len(frames) // 2, len(frames) - 1):
        read = np.asarray(source.item(i), np.float32)
        assert np.abs(read - frames[i]).mean() < 12
        middle = read[28:36, 28:36].mean((0, 1))
        assert middle[0] > middle[1] + 60


def test_rates_on_scores_that_are_known(monkeypatch):
    monkeypatch.setattr(video, "_DRAWS", 150)
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(200).repeat_interleave(20)
    scores = torch.randn(200, generator=generator)[owners] + 0.3 * torch.randn(4000, generator=generator)
    rates = [*video._rates(scores.double(), owners).values()]
    error = 2 / math.sqrt(150)
    for promised in rates[:2]:
        assert 0.02 < promised <= 0.05 + 0.2 * error
    assert rates[4] > 0.08  # a clip with any frame flagged
    assert rates[5] < 0.6  # a range for independent frames that promises 90 %


def test_the_study_has_its_tables():
    study = studies()["video"]
    row = dict.fromkeys(["frames, calibrated on clips", "others"], 0.05)
    content = {
        "clips": {"ID clips": 600, "OOD clips": 200, "calibration clips": 100, "draws": 1000},
        "frames": {"ID": 14_000},
        "network": "a network",
        "images": {},
        "environment": {},
        "rates": {"NAN()": row},
        "ood": {"NAN()": {"mnist": [0.9, 0.95, 0.5]}},
    }
    tables = study.tables(json.loads(json.dumps(content)))
    assert tables["video"].rows == [["NAN()", "5.0", "5.0"]]
    assert tables["video-ood"].rows == [["NAN()", "90.0 / 95.0 / 50.0"]]
