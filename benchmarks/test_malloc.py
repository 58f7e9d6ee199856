"""A convolutional network on the CPU, with memory given back to the system and with memory kept."""

import subprocess
import sys

import pytest

FORWARD = """
import timm, torch
model = timm.create_model("tf_efficientnet_lite0").eval().to(memory_format=torch.channels_last)
images = torch.randn(32, 3, 224, 224).contiguous(memory_format=torch.channels_last)
with torch.no_grad():
    for _ in range(12):
        model(images)
"""
KEEP = "from featnorm._memory import keep_freed_memory; keep_freed_memory()\n"


@pytest.mark.parametrize("memory", ["given back", "kept"])
def test_forward(benchmark, memory):
    benchmark.group = "12 batches of 32 images, the process included"
    code = FORWARD if memory == "given back" else KEEP + FORWARD
    benchmark.pedantic(subprocess.run, ([sys.executable, "-c", code],), {"check": True}, rounds=3)
