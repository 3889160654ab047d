"""Every adapter of the table trains on every family through the command line: the loss falls, and its file gives the
same output again, hooked and merged, whatever kind the reader was told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from library.tiny_models import build_tiny
from library.training import cli, loop
from networks.kinds.targets import targets_of_family
from networks.lora import create_network_from_weights
from tests.families import CASES
from tests.networks.adapter_table import ADAPTERS, Adapter, kind_of_adapter
from tests.pairwise import Each, denoiser
from tests.runs.conftest import draw_pictures, read_parts

FAMILIES = {
    "flux": "flux", "sd": "sd1", "sdxl": "sdxl", "anima": "anima", "chroma": "chroma", "lumina": "lumina",
    "hunyuan_image": "hunyuan_image",
}  # fmt: skip
"""family -> its set of tiny models"""
DATASET = """
[[datasets]]
resolution = 64
batch_size = 3
[[datasets.subsets]]
image_dir = '{images}'
caption_extension = ".txt"
"""
STEPS = 10


@pytest.fixture(scope="module")
def family(request, tmp_path_factory) -> tuple[str, Path, list[str]]:
    """(name, folder with pictures and a dataset configuration, options that name the models)."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny = build_tiny(FAMILIES[request.param], folder / "models")
    images = draw_pictures(folder / "images", 3)
    (folder / "data.toml").write_text(DATASET.format(images=images), encoding="utf-8")
    case = CASES[FAMILIES[request.param]]
    return request.param, folder, [*tiny.arguments(), *case.entry.options, *case.brief]


def options_of(adapter: Adapter, family: str) -> list[str]:
    """Its rank, alpha and arguments; convolutions are trained too where the family has any."""
    pairs, refused = dict(adapter.pairs), kind_of_adapter(adapter).refused
    if targets_of_family(family).conv_classes and "conv_dim" not in refused:
        pairs["conv_dim"] = str(adapter.rank)
    words = [f"--network_module={adapter.module}", f"--learning_rate={adapter.rate}"]
    if "network_dim" not in refused:
        words.append(f"--network_dim={adapter.rank}")
    if "network_alpha" not in refused and adapter.alpha is not None:
        words.append(f"--network_alpha={adapter.alpha}")
    return [*words, "--network_args", *(f"{name}={value}" for name, value in pairs.items())] if pairs else words


def train(family: tuple[str, Path, list[str]], out: Path, *more: str) -> tuple[Any, list[Any]]:
    """Train in this process: the Run and the batches of its steps."""
    name, folder, models = family
    runs, batches, original = [], [], loop.micro_step

    def noting(run, batch):
        runs.append(run)
        batches.append(batch)
        return original(run, batch)

    argv = [
        *models, f"--dataset_config={folder / 'data.toml'}", f"--output_dir={out}", "--output_name=lora",
        f"--max_train_steps={STEPS}",
        "--seed=5", "--cache_latents", "--save_precision=float", "--max_data_loader_n_workers=0",
        "--console_log_level=WARNING", *more,
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "micro_step", noting)
        cli.run(name, "network", argv)
    return runs[-1], batches


def losses_of(run: Any, batches: list[Any]) -> list[float]:
    """The losses of these batches at the noise and times of their steps, with the weights for making images."""
    with torch.no_grad(), run.weights_for_eval():
        return [float(run.step(batch.to(run.runtime.device)).loss) for batch in batches]


FIRST_OF_KIND = {adapter.module: name for name, adapter in reversed(ADAPTERS.items())}


def cell(family: str, name: str) -> Any:
    """Variants of a kind differ inside a layer: one family is enough for them, the smallest one. Convolutions, which it
    has not, are those of the kind itself, and of --full."""
    adapter, is_kind = ADAPTERS[name], FIRST_OF_KIND[ADAPTERS[name].module] == name
    home = "flux" if "flux" in adapter.families else adapter.families[0]
    return pytest.param(family, name, marks=() if is_kind or family == home else pytest.mark.full)


CELLS = [
    cell(family, name) for family in FAMILIES for name, adapter in ADAPTERS.items()
    if family in adapter.families
    and (family in (adapter.families[0], "flux") or FIRST_OF_KIND[adapter.module] == name)
]  # fmt: skip


@pytest.mark.cross_product("name", denoiser("family"), Each("family"))
@pytest.mark.parametrize(("family", "name"), CELLS, indirect=["family"])
def test_an_adapter_trains_and_its_file_gives_the_same_output(name: str, family, tmp_path: Path) -> None:
    adapter = ADAPTERS[name]
    run, batches = train(family, tmp_path, *options_of(adapter, family[0]))
    run.trainable.network.set_enabled(False)
    before = losses_of(run, batches)
    run.trainable.network.set_enabled(True)
    after, few = losses_of(run, batches), batches[:2]  # every weight takes part in the loss of any batch
    assert sum(after) < sum(before) * 0.999, (before, after)

    file = tmp_path / "lora.safetensors"
    metadata = read_parts(file)[0]
    assert metadata["ss_network_module"] == adapter.module
    assert json.loads(metadata.get("ss_network_args", "{}")).items() >= adapter.pairs.items()
    trained = {module.lora_name for module in run.trainable.network.loras}
    for module in run.trainable.network.loras:
        module.remove_from()
    assert losses_of(run, few) == pytest.approx(before[:2], rel=1e-6)

    encoders = list(run.models.text_encoders)
    network, tensors = create_network_from_weights(
        1.0, str(file), None, encoders, run.models.denoiser, for_inference=True
    )
    assert trained == {key.partition(".")[0] for key in tensors}
    assert {module.lora_name.partition("_")[2] for module in network.loras} == {
        name.partition("_")[2] for name in trained
    }
    network.apply_to(encoders, run.models.denoiser)
    assert network.load_weights(str(file)) == {"missing": [], "unexpected": []}
    network.eval()
    assert losses_of(run, few) == pytest.approx(after[:2], rel=1e-6)
    network.remove_from()
    network.merge_to(encoders, run.models.denoiser, tensors)
    assert losses_of(run, few) == pytest.approx(after[:2], rel=1e-4)
