"""What a start does not import and does not look through: looked at in a process of its own, where nothing is imported
yet."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from library.core import garbage

ROOT = Path(__file__).resolve().parents[2]

FRESH_PROCESS = """
import sys
import torch
from library.components.deferred_compiler import TellsMarks, compiler_deferred, is_imported
from library.components.transformers_import import import_in_background, import_transformers_models
from library.core.garbage import wait_until_started
from library.training.optimizers import OptimizerOptions, build


def trained(optimizer_type, arguments):
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
    options = OptimizerOptions(optimizer_type=optimizer_type, optimizer_args=arguments, learning_rate=0.1)
    optimizer = build(options, [{"params": [weight], "lr": 0.1, "name": "weight"}]).optimizer
    for _ in range(3):
        (weight ** 3).sum().backward()
        optimizer.step()
        assert weight.grad_fn is None and torch.is_grad_enabled()
        optimizer.zero_grad(set_to_none=True)
    optimizer.load_state_dict(optimizer.state_dict())
    return weight.detach().clone()


cases = [("AdamW", None), ("SGDNesterov", None), ("torch.optim.RAdam", ["weight_decay=0.1"])]
light = [trained(*case) for case in cases]
assert "torch._dynamo" not in sys.modules, "the compiler was imported"
wait_until_started()
import_in_background()
import_transformers_models()
assert "transformers.modeling_utils" in sys.modules
from transformers import CLIPTextModelWithProjection, T5EncoderModel
from transformers import masking_utils, modeling_utils
from transformers.integrations import deepgemm
with compiler_deferred():  # means in Python, as plans of memory have them
    torch.nn.functional.group_norm(torch.empty(1, 4, 2, 2, device="meta"), 2)
    assert not is_imported()
assert all(finder.marks for finder in sys.meta_path if isinstance(finder, TellsMarks)), "a finder without a purpose"
for name in ("scipy", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint"):
    assert name not in sys.modules, f"{name} was imported"
assert not hasattr(deepgemm.is_sm100, "_dynamo_marked_constant")
from transformers.loss import loss_for_object_detection as detection
rows, columns = detection.linear_sum_assignment([[4.0, 1.0], [2.0, 3.0]])
assert list(columns) == [1, 0] and detection.is_scipy_available()
from library.training.memory.tracing import tracing
with tracing("cuda"):
    import torch._dynamo
    assert torch._dynamo.config.suppress_errors is False and is_imported(), "not the compiler itself"
whole = torch.compile(lambda x: x + torch.is_autocast_enabled("cpu"), backend="eager", fullgraph=True)
assert whole(torch.ones(1)) == 1, "the compiler knows the functions that plans of memory put in their place"
assert deepgemm.is_sm100._dynamo_marked_constant
assert torch._dynamo.trace_rules.is_callable_allowed(modeling_utils.PreTrainedModel.can_record_outputs.fget)
masks = masking_utils.TransformGetItemToIndex()
assert type(masks).__name__ == "TransformGetItemToIndex" and type(masks).__module__.startswith("torch._dynamo.")
assert not any(isinstance(finder, TellsMarks) for finder in sys.meta_path)
assert all(torch.equal(a, trained(*case)) for a, case in zip(light, cases)), "another result with the compiler there"
assert torch._dynamo.eval_frame.innermost_fn(torch.optim.Optimizer.zero_grad.__wrapped__.__dynamo_disable) is not None
assert getattr(torch.optim.Optimizer.zero_grad.__wrapped__.__dynamo_disable, "_torchdynamo_disable", False)
"""


def test_a_start_imports_neither_compiler_nor_scipy_and_trains_as_with_them():
    done = subprocess.run([sys.executable, "-c", FRESH_PROCESS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture()
def collector():
    yield
    gc.enable()


def test_collector_waits_and_leaves_out_what_was_there(collector):
    garbage.started()
    before = gc.get_freeze_count()
    garbage.wait_until_started()
    assert not gc.isenabled()
    with garbage.records_stay():
        pass
    assert not gc.isenabled()
    garbage.started()
    assert gc.isenabled() and gc.get_freeze_count() > before
    garbage.started()
    assert gc.isenabled()


def test_collector_that_the_caller_switched_off_stays_off(collector):
    gc.disable()
    garbage.wait_until_started()
    garbage.started()
    assert not gc.isenabled()
