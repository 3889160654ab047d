"""Files of every kind of adapter in the image scripts, hooked and merged, and as --base_weights: family and kind are
recognised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from library.core.registry import import_target
from networks.kinds.targets import targets_of_family
from tests.library import (
    test_anima_inference, test_flux_inference, test_hunyuan_image_inference, test_lumina_inference,
    test_sdxl_inference, test_unet_inference,
)  # fmt: skip
from tests.networks.adapter_table import ADAPTERS, kind_of_adapter
from tests.pairwise import Each, denoiser
from tests.runs.test_start_files import OTHER, SAME, Start, start
from tests.tools.test_merge_lora import models_of

KINDS = ("dora", "loha", "lokr", "oft", "diag_oft_rescaled", "boft", "glora", "ia3", "full", "norm", "dylora")
STRENGTH = {"ia3": 0.3, "full": 0.03, "norm": 0.3}
"""size of the numbers that are added, where 0.15 shows too little or too much"""


def write(path: Path, family: str, model: Path, name: str) -> str:
    """A file of this kind for the denoiser, with values that show."""
    adapter = ADAPTERS[name]
    denoiser, _ = models_of({"sd": "sd1"}.get(family, family), str(model))
    kind = kind_of_adapter(adapter)
    pairs = dict(adapter.pairs)
    if kind.targets(targets_of_family(family)).conv_classes and "conv_dim" not in kind.refused:
        pairs["conv_dim"] = "2"
    dim = None if "network_dim" in kind.refused else adapter.rank
    torch.manual_seed(6)  # start values of a network that no run made
    network = import_target(f"{adapter.module}:create_network")(
        1.0, dim, adapter.alpha, None, [None, None], denoiser, **pairs
    )
    network.apply_to([], denoiser, False, True)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(STRENGTH.get(name, 0.15) * torch.randn(parameter.shape, generator=generator))
    network.save_weights(str(path), None, {})
    return str(path)


def model_file(made: Start) -> Path:
    if made.family == "hunyuan_image":
        return made.tiny.denoiser
    return getattr(made.tiny, made.family if made.family in ("flux", "anima", "lumina") else "model")


@pytest.fixture(scope="module", params=["flux", "anima", "lumina", "hunyuan_image", "sd1", "sdxl"])
def made(request, tmp_path_factory) -> Start:
    return start(request.param, tmp_path_factory.mktemp(request.param))


LORA, MERGED = ("--lora_weights", "{file};0.6"), "--merge_lora_weights"
LISTED = ("--lora_weight", "{file}", "--lora_multiplier", "0.6")
NETWORK = ("--network_module", "networks.lora", "--network_weights", "{file}", "--network_mul", "0.6")
WAYS: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "flux": {"flux": (LORA, MERGED)},
    "anima": {"anima": (LISTED, MERGED)},
    "hunyuan_image": {"hunyuan_image": (LISTED, MERGED)},
    "lumina": {"lumina": (LORA, MERGED)},
    "sd": {"gen_img": (NETWORK, "--network_merge")},
    "sdxl": {"gen_img": (NETWORK, "--network_merge"), "sdxl": (LORA, MERGED)},
}
"""family -> its image scripts -> (options that hook a file at multiplier 0.6, the one that merges it)"""


def paint(script: str, made: Start, folder: Path, *more: str) -> bytes:
    """The pixels of one picture."""
    tiny = made.tiny
    if script == "flux":
        return test_flux_inference.picture(tiny, folder, *more)
    if script == "anima":
        return test_anima_inference.picture(tiny, folder, *more)
    if script == "hunyuan_image":
        return test_hunyuan_image_inference.picture(tiny, folder, *more)
    if script == "lumina":
        return test_lumina_inference.picture(tiny, folder, *more)
    if script == "sdxl":
        return test_sdxl_inference.picture(tiny, folder, *more)
    (path,) = test_unet_inference.made(tiny, folder, "--prompt=a cat --d 5", *more)
    return test_unet_inference.pixels(path).astype("uint8").tobytes()


def pictures(made: Start, folder: Path, file: str) -> Iterator[tuple[str, bytes, bytes, bytes]]:
    """(script, its picture without the adapter, with it hooked, with it merged); the first is painted once for all
    files."""
    for script, (options, merged) in WAYS[made.family].items():
        if script not in made.pictures:
            made.pictures[script] = paint(script, made, folder / "plain")
        hooked = [word.format(file=file) for word in options]
        yield (
            script, made.pictures[script], paint(script, made, folder / "hooked", *hooked),
            paint(script, made, folder / "merged", *hooked, merged),
        )  # fmt: skip


@pytest.mark.cross_product("name", denoiser("made"), Each("made"))
@pytest.mark.parametrize("name", KINDS)
def test_hooked_and_merged_pictures_are_the_same(name: str, made: Start, tmp_path: Path) -> None:
    file = write(tmp_path / "adapter.safetensors", made.family, model_file(made), name)
    for script, plain, hooked, merged in pictures(made, tmp_path, file):
        assert test_sdxl_inference.largest_difference(plain, hooked) > 2, script
        assert test_sdxl_inference.largest_difference(hooked, merged) <= 1, script


@pytest.mark.cross_product("name", denoiser("made"), Each("made"))
@pytest.mark.parametrize("name", ("dora", "loha", "lokr", "oft", "full"))
def test_base_weights_are_those_of_a_hooked_file(name: str, made: Start, tmp_path: Path) -> None:
    """Merged while loading, whatever kind is trained: the loss is that of a run that starts from the file."""
    file = write(tmp_path / "adapter.safetensors", made.family, model_file(made), name)
    fresh = ("--network_dim=4", "--network_train_unet_only")
    plain, merged = made.first_loss(*fresh), made.first_loss(*fresh, "--base_weights", file)
    going_on = made.first_loss(
        "--network_train_unet_only",
        f"--network_module={ADAPTERS[name].module}",
        "--dim_from_weights",
        f"--network_weights={file}",
    )
    assert merged == pytest.approx(going_on, rel=SAME) and merged != pytest.approx(plain, rel=OTHER)
