"""ControlNet-LLLite: its formula by hand, what a new one does, rows and sizes, dropout, files and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from library.components.lllite_models import LLLite, linear_layers, new_shapes
from library.components.lllite_utils import load_lllite, load_tensors, misfit, read_shapes
from library.components.unet_models import CrossAttention
from library.components.unet_utils import inspect_unet
from library.core.errors import CheckpointError
from library.core.keyed_random import StepDraws
from library.safetensors_utils import save_file_atomic
from library.sdxl_models import SdxlUNet2DConditionModel
from tests.tiny_sd import build_tiny_sd, tiny_params

COND, MLP = 6, 5


@pytest.fixture(scope="module")
def unet() -> SdxlUNet2DConditionModel:
    torch.manual_seed(3)
    return SdxlUNet2DConditionModel(tiny_params("sdxl")).requires_grad_(False).eval()


@pytest.fixture
def net(unet):
    """A network whose every tensor shows."""
    found = LLLite(unet, new_shapes(unet, COND, MLP))
    found.load_state_dict(random_tensors(found))
    yield found
    found.remove()


def random_tensors(net: LLLite, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.3 * torch.randn(tensor.shape, generator=generator) for key, tensor in net.state_dict().items()}


def picture(rows: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1


def inputs(unet: SdxlUNet2DConditionModel, rows: int = 2, height: int = 8, width: int = 12) -> list[torch.Tensor]:
    generator, params = torch.Generator().manual_seed(5), unet.params
    return [
        torch.randn(rows, 4, height, width, generator=generator), torch.full((rows,), 300.0),
        torch.randn(rows, 7, params.context_dim, generator=generator),
        torch.randn(rows, params.adm_in_channels, generator=generator),
    ]  # fmt: skip


def by_hand(tensors: dict[str, torch.Tensor], shown: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """up(relu(mid(relu-embedded picture beside relu(down(x))))) of one module, written out."""
    for place in (0, 2, 4):
        weight = tensors.get(f"conditioning1.{place}.weight")
        if weight is not None:
            shown = shown if place == 0 else shown.clamp(min=0)
            shown = F.conv2d(shown, weight, tensors[f"conditioning1.{place}.bias"], stride=weight.shape[-1])
    tokens = shown.flatten(2).transpose(1, 2)  # [B, L, c]
    inner = (x @ tensors["down.0.weight"].T + tensors["down.0.bias"]).clamp(min=0)
    inner = torch.cat((tokens, inner), dim=2) @ tensors["mid.0.weight"].T + tensors["mid.0.bias"]
    return inner.clamp(min=0) @ tensors["up.0.weight"].T + tensors["up.0.bias"]


@pytest.mark.parametrize("path, places", [("input_blocks.3.1", (4, 6)), ("middle_block.1", (2, 3))])
def test_one_attention_layer_by_hand(net, unet, path, places):
    """Query, key and value of self-attention are those of changed inputs, each with its own module."""
    attention: CrossAttention = unet.get_submodule(f"{path}.transformer_blocks.0.attn1")
    shown, multiplier = picture(), 0.7
    x = torch.randn(2, places[0] * places[1], attention.to_q.in_features, generator=torch.Generator().manual_seed(8))
    projected = []
    for part in ("q", "k", "v"):
        name = f"lllite_unet_{path.replace('.', '_')}_transformer_blocks_0_attn1_to_{part}"
        tensors = {key.removeprefix(f"{name}."): t for key, t in net.state_dict().items() if key.startswith(f"{name}.")}
        layer = getattr(attention, f"to_{part}")
        projected.append((x + multiplier * by_hand(tensors, shown, x)) @ layer.weight.T)
    query, key, value = (t.unflatten(2, (attention.heads, -1)).transpose(1, 2) for t in projected)
    weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(dim=-1)
    out = attention.to_out[0]
    wanted = (weights @ value).transpose(1, 2).flatten(2) @ out.weight.T + out.bias
    net.state.multiplier = multiplier
    net.set_picture(shown)
    torch.testing.assert_close(attention(x), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_new_ones_and_those_without_a_picture_change_nothing(unet, net):
    given = inputs(unet)
    net.set_picture(picture())
    changed = unet(*given)
    net.set_picture(None)
    alone = unet(*given)
    assert (changed - alone).norm() > 0.05 * alone.norm()
    with net.silent():
        net.set_picture(picture())
        assert torch.equal(unet(*given), alone)
    assert not torch.equal(unet(*given), alone)
    net.remove()
    fresh = LLLite(unet, new_shapes(unet, COND, MLP))
    fresh.initialize(7)
    fresh.set_picture(picture())
    assert torch.equal(unet(*given), alone), "bias and weight of `up` are zero"
    assert sum(tensor.count_nonzero() == 0 for tensor in fresh.state_dict().values()) == 2 * len(fresh.names)
    again = LLLite(unet, new_shapes(unet, COND, MLP))
    again.initialize(7)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters(), strict=True))
    fresh.remove(), again.remove()
    assert not any(layer._forward_pre_hooks for layer in linear_layers(unet).values())


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(8, 12), (7, 9)])
def test_branches_share_the_pictures_and_every_side_goes(unet, net, height, width):
    """Rows of two branches of two pictures; sides that cannot be halved have a picture that is a little larger."""
    given, shown = inputs(unet, 2, height, width), picture(2, 8 * height, 8 * width)
    net.set_picture(shown)
    rows = unet(*given)
    twice = unet(*(torch.cat((tensor, tensor)) for tensor in given))
    torch.testing.assert_close(twice, torch.cat((rows, rows)), rtol=1e-4, atol=1e-5)
    net.set_picture(shown[1:])
    torch.testing.assert_close(unet(*(tensor[1:] for tensor in given)), rows[1:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_several_change_one_after_the_other(unet, net):
    """The last one that was made sees the layer's input first, as if it stood around the others."""
    layer = next(net.parts).layer
    x = torch.randn(2, 24, layer.in_features, generator=torch.Generator().manual_seed(4))
    second = LLLite(unet, new_shapes(unet, 4, 3))
    second.load_state_dict(random_tensors(second, 9))
    for one in (net, second):
        one.set_picture(picture())
    changed = x + next(second.parts).change(x)
    wanted = F.linear(changed + next(net.parts).change(changed), layer.weight)
    torch.testing.assert_close(layer(x), wanted)
    second.remove()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_with_dropout_that_is_drawn_by_sample(unet, checkpointed):
    """Recomputed activations see the masks and the pictures of the forward; a sample's mask does not hang on others."""
    made, given = [], inputs(unet)
    for rows in ((0, 1), (1,)):
        net = LLLite(unet, new_shapes(unet, COND, MLP), dropout=0.4)
        net.load_state_dict(random_tensors(net))
        net.train(), unet.train()
        if checkpointed:
            unet.enable_gradient_checkpointing()
        net.state.draws = StepDraws(1, 2, rows)
        net.set_picture(picture()[list(rows)])
        made.append(unet(*(tensor[list(rows)] for tensor in given)))
        made[-1][-1].square().sum().backward()
        made.append([p.grad for p in net.parameters()])
        unet.disable_gradient_checkpointing(), unet.eval(), net.remove()
    torch.testing.assert_close(made[0][1:], made[2], rtol=1e-4, atol=1e-4)
    for both, alone in zip(made[1], made[3], strict=True):
        torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-3)
    assert all(gradient.abs().sum() > 0 for gradient in made[3])


def test_each_module_drops_other_values(unet):
    net = LLLite(unet, new_shapes(unet, COND, MLP), dropout=0.4)
    net.remove()
    net.state.draws = StepDraws(1, 2, (0, 1))
    first, second, *_ = (part._dropped(torch.ones(2, 24, MLP)) for part in net.parts)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert {round(value, 4) for value in first.unique().tolist()} == {0.0, round(1 / 0.6, 4)}


# -- files ---------------------------------------------------------------------------------------------------------------


def widened(name: str, width: int) -> dict[str, torch.Tensor]:
    """The tensors of a module for a layer of another width."""
    shapes = {"down.0.weight": (MLP, width), "up.0.weight": (width, MLP), "up.0.bias": (width,)}
    return {f"{name}.{parameter}": torch.zeros(shape) for parameter, shape in shapes.items()}


def write(net: LLLite, path: Path, **changed: torch.Tensor) -> Path:
    save_file_atomic({**net.state_dict(), **changed}, path)
    return path


@torch.no_grad()
def test_a_file_is_read_back_with_its_sizes(unet, net, tmp_path):
    path = write(net, tmp_path / "a.safetensors")
    assert read_shapes(path) == {part.lllite_name: part.shape for part in net.parts}
    net.set_picture(picture())
    wanted = unet(*inputs(unet))
    net.remove()
    again = load_lllite(path, unet, torch.float32, "cpu")
    again.set_picture(picture())
    assert torch.equal(unet(*inputs(unet)), wanted)
    again.remove()
    torch.save(net.state_dict(), tmp_path / "a.pt")
    assert read_shapes(tmp_path / "a.pt") == read_shapes(path)


def test_what_does_not_fit_is_told_from_headers(unet, net, tmp_path):
    path = write(net, tmp_path / "a.safetensors")
    bases = {kind: inspect_unet(build_tiny_sd(tmp_path / kind, kind).model) for kind in ("sdxl", "sd1")}
    assert misfit(path, bases["sdxl"]) is None
    assert "layers that" in misfit(path, bases["sd1"]) and "made for another model" in misfit(path, bases["sd1"])
    name = net.names[0]
    wide = write(net, tmp_path / "wide.safetensors", **widened(name, 99))
    assert f"{name} has 99 inputs" in misfit(wide, bases["sdxl"])
    with pytest.raises(CheckpointError, match="does not fit LLLite"):
        load_tensors(net, {**net.state_dict(), f"{name}.down.0.weight": torch.zeros(MLP, 99)}, wide)
    with pytest.raises(CheckpointError, match="not finite"):
        load_tensors(net, {**net.state_dict(), f"{name}.up.0.bias": torch.full((16,), float("nan"))}, path)
    for tensors, message in (
        ({"lora_unet_x.lora_down.weight": torch.zeros(1)}, "no ControlNet-LLLite: its tensor lora_unet_x"),
        ({f"{name}.down.0.weight": torch.zeros(2, 3)}, "is incomplete"), ({}, "holds no tensor"),
        ({**net.state_dict(), f"{name}.up.0.bias": torch.zeros(3)}, r"up.0.bias is \[3\], needed: \[16\]"),
        ({key: tensor for key, tensor in net.state_dict().items() if "up.0.bias" not in key}, "is not there, needed"),
        ({**net.state_dict(), f"{name}.more": torch.zeros(3)}, r"more is \[3\], needed: not there"),
    ):  # fmt: skip
        save_file_atomic(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(CheckpointError, match=message):
            read_shapes(tmp_path / "bad.safetensors")
