"""The package LyCORIS as --network_module: it trains through the command line, and its files are ours to load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.tiny_models.chroma_tiny import build_tiny_chroma
from library.training.parser_common import parse
from library.training.trainables.network import NetworkTrainable
from library.training.wiring.chroma import ChromaFamily
from networks.lora import create_network_from_weights
from tests.runs.test_adapters import family as family  # a fixture
from tests.runs.test_adapters import losses_of, read_parts, train

pytest.importorskip("lycoris")
WAYS = (("lora", "dora_wd=True"), ("loha",), ("lokr", "factor=4"))


@pytest.mark.parametrize(
    "family", ["flux", "sd", pytest.param("sdxl", marks=pytest.mark.full)], indirect=True
)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way[0])
def test_a_file_of_the_package_gives_its_output_in_ours(way: tuple[str, ...], family, tmp_path: Path) -> None:
    algo, *more = way
    run, batches = train(
        family, tmp_path, "--network_module=lycoris.kohya", "--network_dim=2", "--network_alpha=1",
        "--learning_rate=2e-2",
        "--network_train_unet_only", "--network_args", f"algo={algo}", *more,
    )  # fmt: skip
    after, few = losses_of(run, batches), batches[:2]
    theirs = run.trainable.network
    for module in theirs.loras:
        module.org_module[0].forward = module.org_forward
    before = losses_of(run, batches)
    assert sum(after) < sum(before) * 0.999, (before, after)

    file = tmp_path / "lora.safetensors"
    assert read_parts(file)[0]["ss_network_module"] == "lycoris.kohya"
    encoders = list(run.models.text_encoders)
    ours, tensors = create_network_from_weights(1.0, str(file), None, encoders, run.models.denoiser, for_inference=True)
    assert len(ours.loras) == len(theirs.loras)
    ours.apply_to(encoders, run.models.denoiser)
    assert ours.load_weights(str(file)) == {"missing": [], "unexpected": []}
    assert losses_of(run, few) == pytest.approx(after[:2], rel=1e-5)
    ours.remove_from()
    with torch.no_grad():
        ours.merge_to(encoders, run.models.denoiser, tensors)
    assert losses_of(run, few) == pytest.approx(after[:2], rel=1e-4)


def test_a_variant_whose_whole_models_keep_a_part_still_takes_the_package(tmp_path: Path) -> None:
    """What stays as it is in training of whole models is no rate that the package would have to know."""
    tiny = build_tiny_chroma(tmp_path)
    argv = [*tiny.arguments(), "--model_type=chroma", "--network_module=lycoris.kohya", "--network_train_unet_only"]
    config = parse([*argv, "--learning_rate=1e-4", "--network_args", "algo=lora"], "chroma", "network")
    NetworkTrainable(config).check(ChromaFamily(config))


@pytest.mark.parametrize("family", ["sd"], indirect=True)
@pytest.mark.parametrize("argument", ["preset=nothing_like_it", "algo=nothing_like_it"])
def test_arguments_that_the_package_does_not_know_are_one_message(argument, family, tmp_path) -> None:
    """Whatever a module of another package raises while the network is made comes with its name, its arguments and the
    reason."""
    from library.core.errors import ConfigError

    with pytest.raises(ConfigError, match=f"lycoris.kohya cannot be made with .*{argument}.*Error"):
        train(
            family,
            tmp_path,
            "--network_module=lycoris.kohya",
            "--network_dim=2",
            "--network_train_unet_only",
            "--network_args",
            argument,
        )
