"""One-time costs of a process: the import, at most twice that of torch; and keeping or returning freed memory."""

import subprocess
import sys

FORWARD = """
import timm, torch
model = timm.create_model("tf_efficientnet_lite0").eval().to(memory_format=torch.channels_last)
images = torch.randn({batch}, 3, 224, 224).contiguous(memory_format=torch.channels_last)
with torch.no_grad():
    for _ in range(12):
        model(images)
"""
KEEP = "from featnorm._utils.memory import keep_freed_memory; keep_freed_memory()\n"


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import(compare, size):
    compare.time(
        "import featnorm",
        lambda: run("import featnorm"),
        {"import torch": (lambda: run("import torch"), 2)},
        rounds=size(7, 1),
        sizes="a new process",
    )


def test_freed_memory(compare, size):
    code = FORWARD.format(batch=size(32, 1))
    compare.time(
        "a convolutional network, freed memory kept",
        lambda: run(KEEP + code),
        {"the same, memory given back": (lambda: run(code), None)},
        rounds=size(3, 1),
        sizes=f"12 batches of {size(32, 1)} images of 224 x 224, EfficientNet-Lite0, the process included",
        warm=False,
    )
