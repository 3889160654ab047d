"""The script for a GPU in its CPU mode: every kind of cell runs, and what cannot run is told."""

from __future__ import annotations

import json
import time

import torch

from benchmarks import command, gpu, model_files
from benchmarks.gpu import Cell, GpuBench
from benchmarks.real_models import MODELS
from library.core.errors import ConfigError
from library.safetensors_utils import read_header
from tests.library.components.deep_denoisers import Denoiser
from tests.simulated_device import simulated_device


def test_cells_on_the_cpu(tmp_path, capsys):
    """Each model once, then FLUX.1 in 8 bits and with blocks that wait."""
    path = tmp_path / "figures.json"
    assert command.main(["gpu", "--cpu", "--cells", "5", "--folder", str(tmp_path), "--json", str(path)]) == 0
    figures = {figure["case"]: figure for figure in json.loads(path.read_text())["figures"]}
    flux, wan = "small FLUX.1 dev, 64x64", "small Wan 2.1 1.3B, 64x64, 5 frames"
    ran = [f"{flux}: bf16", "small SDXL, 64x64: bf16", f"{wan}: bf16", f"{flux}: fp8_scaled", f"{flux}: bf16, 1 swapped"]
    assert list(figures) == ran
    for figure in figures.values():
        assert len(figure["ours"]["values"]) == gpu.SMALL_STEPS and figure["ours"]["median"] > 0
        assert figure["baselines"][0]["name"] == "its multiplications" and figure["baselines"][0]["is_bound"]
    assert list(tmp_path.iterdir()) == [path]
    told = capsys.readouterr()
    assert "of it" in told.out and "gpu: flux, bf16, 1 swapped: " in told.err


def test_a_cell_of_its_own_process_and_one_that_is_refused(tmp_path, capsys):
    def refuse() -> dict:
        raise ConfigError(["no room", "more"])

    words = MODELS["wan"].write(tmp_path, is_small=True)

    def told(cell: Cell) -> dict:
        given = {"cell": {"model": cell.model, "format": cell.format, "swapped": cell.swapped}, "words": words}
        assert gpu.main([json.dumps({**given, "folder": str(tmp_path)})]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert len(told(Cell("wan", "fp32"))["ms"]) == gpu.STEPS
    refused = gpu.problems_as_results(refuse)
    assert refused == {"problem": "ConfigError: 2 problems: - no room - more"}


def test_memory_that_does_not_suffice_is_a_result():
    def too_large() -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    result = gpu.problems_as_results(too_large)
    assert gpu.summary(result) == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    ran = {"ms": [1.0], "peak": 2e9, "flops": 5, "matmul": 1e3, "moved": 0}
    cells = {Cell("flux", "bf16"): result, Cell("wan", "bf16"): ran}
    assert [figure.unit for figure in gpu.figures_of(cells, True)] == ["ms", "GB"]


def test_no_gpu_and_no_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["gpu", "--json", str(tmp_path / "figures.json")]) == 0
    assert "torch sees no GPU here" in capsys.readouterr().err
    late = GpuBench(tmp_path, False, time.monotonic() + gpu.SECONDS_OF_A_CELL - 1)
    assert late.result_of(Cell("flux", "bf16")) == {"problem": "left out: no time is left"}


def test_the_cells_of_the_issue():
    cells = gpu.cells_of(["flux", "sdxl", "wan"], is_small=False)
    assert cells[:3] == [Cell("flux", "bf16"), Cell("sdxl", "bf16"), Cell("wan", "bf16")]
    flux = {(c.format, c.swapped, c.compiled) for c in cells if c.model == "flux"}
    assert flux - {("fp8_fast", 0, False)} == {(f, n, c) for f in ("bf16", "fp8_scaled") for n in (0, 10, 20, 35) for c in (False, True)}
    assert len(cells) == len(set(cells)) and [c.compiled for c in cells[:10]] == [False] * 10


def test_what_block_swap_moves():
    """As many bytes as a step of a denoiser with block swap copies to a simulated device."""
    for ring in (1, 2):
        with simulated_device() as device:
            denoiser = Denoiser("wan")
            denoiser.model.enable_block_swap(2, device.device, ring)
            for parameter in denoiser.model.requires_grad_(False).parameters():
                parameter.requires_grad_(parameter.ndim == 1)  # biases and norms, which stay
            denoiser().square().mean().backward()
            copied = sum(target.nbytes for copy in device.copies for target, _ in copy.pairs)
        assert gpu.bytes_moved(denoiser.model) == copied > 0
    assert gpu.bytes_moved(torch.nn.Linear(2, 2)) == 0


def test_time_between_events():
    class Event:
        def __init__(self, at: float) -> None:
            self.at, self.is_waited_for = at, False

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

        def synchronize(self) -> None:
            self.is_waited_for = True

    events = [Event(at) for at in (1.0, 3.0, 6.0)]
    assert gpu.milliseconds_between(events) == [2.0, 3.0]
    assert [event.is_waited_for for event in events] == [False, False, True]
    assert gpu.milliseconds_between([1.0, 1.5]) == [500.0]


def test_models_have_the_size_that_they_are_named_for(tmp_path):
    from library.components.unet_models import UNetParams
    from library.flux_models import Flux, FluxParams
    from library.sdxl_models import SdxlUNet2DConditionModel
    from library.wan_models import WanModel, WanParams

    sizes = {
        "flux": (lambda of: Flux(FluxParams(**of)), 11_901_408_320),
        "sdxl": (lambda of: SdxlUNet2DConditionModel(UNetParams(**of)), 2_567_463_684),
        "wan": (lambda of: WanModel(WanParams(**of)), 1_418_996_800),
    }
    for name, (build, count) in sizes.items():
        found = model_files.shapes_of(lambda build=build, name=name: build(MODELS[name].real.denoiser))
        assert model_files.count_of(found) == count
    shapes = {"a.weight": (8, 40), "norm.scale": (4,), "a.bias": (8,)}
    path = tmp_path / "model.safetensors"
    model_files.write_random(path, shapes, beside={"more": torch.full((2,), 3.0)}, config={"heads": 2})
    infos, metadata = read_header(path)
    assert {key: tuple(info.shape) for key, info in infos.items()} == {**shapes, "more": (2,)}
    assert metadata == {"model_config": '{"heads": 2}'}
    from safetensors.torch import load_file

    tensors = load_file(path)
    assert (tensors["norm.scale"] == 1).all() and (tensors["more"] == 3).all()
    assert 0.5 < tensors["a.weight"].float().std() * 40**0.5 < 1.5
