"""ControlNets against the classes of diffusers, both ways through files, and files that do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.control_net_convert import control_net_to_original
from library.checkpoints.kinds import check_slot, describe_checkpoint
from library.components.control_models import Control, GuidedBy
from library.components.control_nets import control_nets_of
from library.components.unet_models import UNetParams
from library.core.errors import CheckpointError, UnsupportedCombination
from library.families.registry import script_of_kind
from library.flux_control_net_models import FluxControlNet
from library.flux_models import FluxParams
from library.flux_utils import prepare_img_ids

UNET = {
    "channels": (16, 32),
    "attention_levels": (True, False),
    "transformer_depth": (1, 0),
    "heads": (2, 4),
    "context_dim": 24,
    "time_embed_dim": 64,
    "norm_groups": 8,
}
PARAMS = {
    "sd1": UNetParams(**UNET),
    "sd2": UNetParams(**{**UNET, "context_dim": 1024}, use_linear_projection=True),
    "sdxl": UNetParams(**UNET, use_linear_projection=True, adm_in_channels=12 + 6 * 256),
    "flux": FluxParams(
        in_channels=16,
        context_in_dim=20,
        vec_in_dim=12,
        hidden_size=96,
        num_heads=3,
        depth=2,
        depth_single_blocks=0,
        axes_dim=(8, 12, 12),
    ),
}
FAMILIES = {"sd1": "sd", "sd2": "sd", "sdxl": "sdxl", "flux": "flux"}


def reference(kind: str) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    if kind == "flux":
        net = diffusers.FluxControlNetModel(
            patch_size=2,
            in_channels=16,
            num_layers=2,
            num_single_layers=0,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=20,
            pooled_projection_dim=12,
            guidance_embeds=True,
            axes_dims_rope=[8, 12, 12],
            conditioning_embedding_channels=4,
        )
    else:
        params, more = PARAMS[kind], {}
        if kind == "sdxl":
            more = {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": params.adm_in_channels,
            }
        net = diffusers.ControlNetModel(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            block_out_channels=(16, 32),
            attention_head_dim=(2, 4),
            cross_attention_dim=params.context_dim,
            norm_num_groups=8,
            conditioning_embedding_out_channels=(4, 8, 12, 16),
            use_linear_projection=params.use_linear_projection,
            **more,
        )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.12)
    return net.eval()


def outputs(kind: str, ours: torch.nn.Module, theirs: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    width = PARAMS[kind].context_in_dim if kind == "flux" else PARAMS[kind].context_dim
    picture, times, context = random(2, 3, 48, 80), torch.tensor([13.0, 920.0]), random(2, 7, width)
    with torch.no_grad():
        if kind == "flux":
            img, y, guidance, ids = random(2, 15, 16), random(2, 12), torch.tensor([3.5, 1.0]), prepare_img_ids(2, 3, 5)
            mine = ours(picture, img, ids, context, torch.zeros(2, 7, 3), times / 1000, y, guidance)
            other = theirs(
                hidden_states=img,
                controlnet_cond=picture,
                encoder_hidden_states=context,
                pooled_projections=y,
                timestep=times / 1000,
                img_ids=ids[0],
                txt_ids=torch.zeros(7, 3),
                guidance=guidance,
            ).controlnet_block_samples
            return list(zip(mine, other, strict=True))
        sample, added, more = random(2, 4, 6, 10), (), {}
        if kind == "sdxl":
            pooled, sizes = random(2, 12), torch.arange(12.0).reshape(2, 6)
            embedded = theirs.add_time_proj(sizes.flatten()).reshape(2, -1)
            added = (torch.cat((pooled, embedded), dim=1),)
            more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        mine = ours(picture, sample, times, context, *added)
        down, middle = theirs(sample, times, context, controlnet_cond=picture, return_dict=False, **more)
        return list(zip(mine, [*down, middle], strict=True))


def assert_alike(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for ours, theirs in pairs:
        assert theirs.std() > 0.01
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4


@pytest.mark.parametrize("kind", PARAMS)
def test_residuals_and_files_are_those_of_diffusers(tmp_path, kind):
    theirs, nets = reference(kind), control_nets_of(FAMILIES[kind])
    theirs.save_pretrained(tmp_path / "theirs")
    found = describe_checkpoint(tmp_path / "theirs")
    assert found.kind in nets.kinds and found.kind.startswith(kind) and "diffusers names" in found.detail
    ours = nets.load(tmp_path / "theirs", PARAMS[kind], torch.float32, "cpu")
    assert_alike(outputs(kind, ours, theirs))

    (tmp_path / "ours").mkdir()
    save_file(nets.diffusers_state(ours), tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(nets.diffusers_config(ours)))
    assert_alike(outputs(kind, ours, type(theirs).from_pretrained(tmp_path / "ours")))

    original = ours.state_dict() if kind == "flux" else control_net_to_original(ours.state_dict())
    for name, prefix in {"plain": "", "prefixed": "" if kind == "flux" else "control_model."}.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({prefix + key: value.contiguous() for key, value in original.items()}, path)
        assert describe_checkpoint(path).kind == found.kind, name
        again = nets.load(path, PARAMS[kind], torch.float32, "cpu").state_dict()
        assert all(torch.equal(again[key], value) for key, value in ours.state_dict().items())


def test_several_nets_add_up():
    class Net(torch.nn.Module):
        def forward(self, picture, sample):
            return [picture.mean(dim=(1, 2, 3)) + number for number in range(2)]

    pictures = torch.stack([torch.full((3, 8, 8), value) for value in (1.0, 5.0)])
    parts = GuidedBy(Net(), pictures), GuidedBy(Net(), pictures[:1], 0.5, repeats=False)
    found = Control(parts).residuals(3, torch.zeros(4, 2))  # two branches of two samples
    assert [each.tolist() for each in found] == [
        [1.5, 5.5, 1.5, 5.5],
        [2.5, 6.5, 2.5, 6.5],
        [2.0, 6.0, 2.0, 6.0],
    ]  # residuals 0, 1, 0 of the first net; 0, 0, 1 of the second


def test_files_that_do_not_fit(tmp_path):
    flux, sd = control_nets_of("flux"), control_nets_of("sd")
    net = FluxControlNet(PARAMS["flux"])
    save_file(net.state_dict(), tmp_path / "flux.safetensors")
    wider = FluxParams(**{**vars(PARAMS["flux"]), "context_in_dim": 24})
    with pytest.raises(CheckpointError, match=r"flux.safetensors does not fit .*txt_in.weight is \[96, 20\], needed"):
        flux.check(tmp_path / "flux.safetensors", wider)
    with pytest.raises(CheckpointError, match="no ControlNet of a U-Net"):
        sd.check(tmp_path / "flux.safetensors", PARAMS["sd1"])
    state = load_file(tmp_path / "flux.safetensors")
    for name, keys, told in (
        ("latents", [key for key in state if not key.startswith("input_hint_block.")], "reads encoded latents"),
        ("base", [key for key in state if not key.startswith("controlnet_blocks.")], "holds no ControlNet of FLUX.1"),
    ):
        save_file({key: state[key] for key in keys}, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=told):
            flux.check(tmp_path / f"{name}.safetensors", PARAMS["flux"])
    save_file({**state, "controlnet_single_blocks.0.weight": torch.zeros(1)}, tmp_path / "single.safetensors")
    with pytest.raises(CheckpointError, match="with single blocks"):
        flux.check(tmp_path / "single.safetensors", PARAMS["flux"])
    with pytest.raises(UnsupportedCombination, match="no ControlNets of Chroma"):
        control_nets_of("chroma")
    key = next(iter(state))
    save_file({**state, key: torch.full_like(state[key], torch.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match="nan.safetensors: .* has values that are not finite"):
        flux.load(tmp_path / "nan.safetensors", PARAMS["flux"], torch.float32, "cpu")


def test_a_net_of_another_family_is_told_with_the_script_that_trains_it(tmp_path):
    scripts = {"flux": "flux_train_control_net.py", "sd": "train_control_net.py", "sdxl": "sdxl_train_control_net.py"}
    for family, script in scripts.items():
        assert {script_of_kind(kind) for kind in control_nets_of(family).kinds} == {script}
    save_file(FluxControlNet(PARAMS["flux"]).state_dict(), tmp_path / "flux.safetensors")
    told = check_slot(tmp_path / "flux.safetensors", "control_net_models", set(control_nets_of("sd").kinds))
    assert told.endswith("; flux_train_control_net.py trains such a model")


@pytest.mark.parametrize("kind", PARAMS)
def test_the_tool_rewrites_names_there_and_back(tmp_path, kind):
    """A folder of diffusers becomes a file and a folder again; what shapes do not tell is in the file's metadata."""
    from tools import convert_model

    reference(kind).save_pretrained(tmp_path / "theirs")
    file, again = tmp_path / "file.safetensors", tmp_path / "again"
    assert convert_model.main([str(tmp_path / "theirs"), str(file), "--to", "single"]) == 0
    assert describe_checkpoint(file).layout == "original"
    nets = control_nets_of(FAMILIES[kind])
    metadata = nets.file_metadata(nets.load(file, PARAMS[kind], torch.float32, "cpu"))
    save_file(load_file(file), file, metadata)  # tiny nets have other heads than those that their widths stand for
    assert convert_model.main([str(file), str(again), "--to", "diffusers"]) == 0
    states = [
        load_file(folder / "diffusion_pytorch_model.safetensors")
        for folder in (tmp_path / "theirs", again / "controlnet")
    ]
    assert states[0].keys() == states[1].keys() and all(
        torch.equal(states[1][key], value) for key, value in states[0].items()
    )
    ours, theirs = (
        nets.load(file, PARAMS[kind], torch.float32, "cpu"),
        type(reference(kind)).from_pretrained(again / "controlnet"),
    )
    assert_alike(outputs(kind, ours, theirs))
