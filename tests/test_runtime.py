"""Where and how a model runs."""

import pickle
import subprocess
import sys

import pytest
import torch

from featnorm import Runtime


def test_a_runtime_on_the_cpu_needs_no_fabric():
    code = (
        "import sys\n"
        "from featnorm import Runtime\n"
        "runtime = Runtime()\n"
        "assert runtime.torch_device.type == 'cpu'\n"
        "assert runtime.fabric.device.type == 'cpu'\n"
        "with runtime.autocast(), runtime.fabric.autocast():\n"
        "    pass\n"
        "assert 'lightning_fabric' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_mixed_precision_is_that_of_the_context():
    with Runtime(precision="bf16-mixed").autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    with Runtime().autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_a_runtime_is_pickled_without_what_this_machine_made():
    runtime = Runtime("auto", "bf16-mixed", batch_size=5, workers=2)
    assert runtime.fabric is runtime.fabric
    again = pickle.loads(pickle.dumps(runtime))
    assert again == runtime
    assert "fabric" not in vars(again)


def test_what_is_not_available_is_named():
    with pytest.raises(ValueError, match="precision must be one of 32-true, bf16-mixed, 16-mixed, got '64-true'"):
        Runtime(precision="64-true")
    with pytest.raises(ValueError, match="cannot use device 'quantum' in 32-true: "):
        _ = Runtime("quantum").torch_device
