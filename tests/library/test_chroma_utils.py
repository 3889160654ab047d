"""Loading Chroma denoisers: every layout and type of file, hyper-parameters from shapes, clear refusals; which text
takes part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library import chroma_utils
from library.checkpoints.flux_convert import convert_bfl_sd_to_diffusers, convert_diffusers_sd_to_bfl
from library.checkpoints.loading import build_on_meta
from library.chroma_models import Chroma, ChromaParams, attended_tokens
from library.core.errors import CheckpointError
from library.flux_models import Flux, FluxParams
from library.flux_utils import load_flux, prepare_img_ids
from library.safetensors_utils import read_header, save_file_atomic
from tests.runs.families import key_table, write_header_only
from tests.tiny import random_state

diffusers = pytest.importorskip("diffusers")

PARAMS = ChromaParams(
    in_channels=16, context_in_dim=20, hidden_size=64, num_heads=2, mlp_ratio=3.0, depth=2, depth_single_blocks=3,
    axes_dim=(4, 14, 14),
    approximator_in_dim=32, approximator_hidden_size=24, approximator_depth=3,
)  # fmt: skip


def state_of(params: ChromaParams = PARAMS) -> dict[str, torch.Tensor]:
    return random_state(build_on_meta(lambda: Chroma(params)), torch.Generator().manual_seed(1))


def written(tmp_path: Path, state: dict[str, torch.Tensor], name: str = "chroma.safetensors") -> Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_real_file_is_recognised_and_has_the_real_keys(tmp_path: Path, layout: str) -> None:
    shapes = key_table("chroma")
    if layout == "diffusers":
        on_meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        with torch.device("meta"):
            theirs = diffusers.ChromaTransformer2DModel().state_dict()
        given = {key: list(tensor.shape) for key, tensor in convert_bfl_sd_to_diffusers(on_meta).items()}
        assert given == {key: list(tensor.shape) for key, tensor in theirs.items()}
    else:
        given = shapes
    write_header_only(tmp_path / "x.safetensors", given)
    info = chroma_utils.inspect_chroma(tmp_path / "x.safetensors")
    assert (
        info.params == ChromaParams()
        and info.params.num_vectors == 344
        and info.is_diffusers == (layout == "diffusers")
    )
    model = build_on_meta(lambda: Chroma(info.params))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == shapes


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_sizes_are_read_from_shapes(tmp_path: Path, prefix: str) -> None:
    state = state_of()
    model = chroma_utils.load_chroma(
        written(tmp_path, {prefix + key: tensor for key, tensor in state.items()}), torch.float32, "cpu"
    )
    assert model.params == PARAMS
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_what_shapes_do_not_tell_is_written_beside_them(tmp_path: Path) -> None:
    params = ChromaParams(**{**vars(PARAMS), "axes_dim": (8, 12, 12)})
    model = Chroma(params)
    chroma_utils.save_chroma(model, tmp_path / "odd.safetensors", torch.bfloat16, {"a": "b"})
    chroma_utils.save_chroma(Chroma(PARAMS), tmp_path / "usual.safetensors")
    assert chroma_utils.load_chroma(tmp_path / "odd.safetensors", None, "cpu").params == params
    assert read_header(tmp_path / "odd.safetensors")[1]["a"] == "b"
    assert "model_config" not in read_header(tmp_path / "usual.safetensors")[1]


def outputs(
    model: Chroma, height: int, width: int, lengths: list[int], tokens: int = 9
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    batch = len(lengths)
    given = {
        "img": torch.randn(batch, height * width, model.params.in_channels, generator=generator),
        "img_ids": prepare_img_ids(1, height, width),
        "txt": torch.randn(batch, tokens, model.params.context_in_dim, generator=generator),
        "txt_ids": torch.zeros(1, tokens, 3),
        "timesteps": torch.rand(batch, generator=generator),
        "txt_attention_mask": (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long(),
    }
    with torch.no_grad():
        return model(**given), given


def loaded(tmp_path: Path, params: ChromaParams = PARAMS) -> Chroma:
    return chroma_utils.load_chroma(
        written(tmp_path, state_of(params)), torch.float32, "cpu", config={"axes_dim": list(params.axes_dim)}
    )


def test_one_token_of_padding_takes_part_and_no_more(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert attended_tokens(mask).int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    model = loaded(tmp_path)
    plain, given = outputs(model, 2, 3, [4, 1])
    for place, counts in ((slice(5, None), False), (slice(4, 5), True)):
        text = given["txt"].clone()
        text[0, place] += 1
        with torch.no_grad():
            changed = model(**{**given, "txt": text})
        assert torch.equal(changed[0], plain[0]) is not counts and torch.equal(changed[1], plain[1])


def test_a_batch_of_ragged_captions_is_each_caption_alone(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    together, given = outputs(model, 3, 5, [9, 0, 3])
    for number in range(3):
        alone = {name: tensor[number : number + 1] if len(tensor) == 3 else tensor for name, tensor in given.items()}
        with torch.no_grad():
            assert torch.allclose(model(**alone)[0], together[number], atol=1e-5)


def test_features_are_the_tokens_after_a_block(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    velocity, given = outputs(model, 2, 3, [4, 1])
    for layer in (0, 1, 2, 4):
        with torch.no_grad():
            again, features = model(**given, feature_layer=layer)
        assert torch.equal(again, velocity) and features.shape == (2, 6, model.feature_width)
    with torch.no_grad():
        vectors = model.modulation_vectors(given["timesteps"])[:, -2:]
        assert torch.allclose(model.final_layer(features, vectors), velocity, atol=1e-6)


@pytest.mark.parametrize(("depth", "single", "size", "lengths"), [(1, 1, (1, 1), [9, 9]), (3, 2, (5, 3), [2, 7])])
def test_agrees_with_the_class_of_diffusers(
    tmp_path: Path, depth: int, single: int, size: tuple[int, int], lengths: list[int]
) -> None:
    """Their own random weights, in a folder of several files; their mask is that of the tokens that take part."""
    torch.manual_seed(3)
    reference = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=depth, num_single_layers=single, attention_head_dim=32, num_attention_heads=3,
        joint_attention_dim=20,
        axes_dims_rope=(8, 12, 12), approximator_num_channels=32, approximator_hidden_dim=28, approximator_layers=2,
    ).eval()  # fmt: skip
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    reference.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    model = chroma_utils.load_chroma(tmp_path, torch.float32, "cpu")
    assert (model.params.depth, model.params.depth_single_blocks, model.params.axes_dim) == (depth, single, (8, 12, 12))
    ours, given = outputs(model, *size, lengths)
    mask = torch.cat((attended_tokens(given["txt_attention_mask"]), torch.ones(2, size[0] * size[1])), dim=1)
    with torch.no_grad():
        theirs = reference(
            hidden_states=given["img"], encoder_hidden_states=given["txt"], timestep=given["timesteps"],
            img_ids=given["img_ids"][0],
            txt_ids=given["txt_ids"][0], attention_mask=mask > 0, return_dict=False,
        )[0]  # fmt: skip
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4
    state = reference.state_dict()
    again = convert_bfl_sd_to_diffusers(convert_diffusers_sd_to_bfl(state))
    assert again.keys() == state.keys() and all(torch.equal(again[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_in_8_bits_are_near_the_wide_ones(tmp_path: Path, stored: torch.dtype) -> None:
    path = written(tmp_path, {key: tensor.to(stored) for key, tensor in state_of().items()})
    model = chroma_utils.load_chroma(path, torch.float8_e4m3fn, "cpu")
    assert model.double_blocks[0].img_attn.qkv.weight.dtype == torch.float8_e4m3fn and model.dtype == torch.bfloat16
    wide, given = outputs(chroma_utils.load_chroma(path, torch.float32, "cpu"), 2, 3, [4, 1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        narrow = model(**given).float()
    assert ((narrow - wide).norm() / wide.norm()).item() < 0.1


def test_gradients_reach_weights_through_checkpoints(tmp_path: Path) -> None:
    model = loaded(tmp_path).train()
    weight = model.double_blocks[0].txt_attn.qkv.weight.requires_grad_(True)
    _, given = outputs(model, 2, 3, [4, 1])
    plain = torch.autograd.grad(model(**given).square().sum(), weight)[0]
    model.enable_gradient_checkpointing()
    assert (
        torch.allclose(torch.autograd.grad(model(**given).square().sum(), weight)[0], plain, atol=1e-5)
        and plain.abs().max() > 0
    )


def test_each_kind_is_sent_to_the_other(tmp_path: Path) -> None:
    params = FluxParams(
        in_channels=16,
        vec_in_dim=12,
        context_in_dim=20,
        hidden_size=64,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=(4, 14, 14),
    )
    flux = random_state(build_on_meta(lambda: Flux(params)), torch.Generator().manual_seed(1))
    with pytest.raises(CheckpointError, match="is a FLUX.1 model .* leave --model_type out"):
        chroma_utils.load_chroma(written(tmp_path, flux), torch.float32, "cpu")
    with pytest.raises(CheckpointError, match="is a Chroma model; add --model_type chroma"):
        load_flux(written(tmp_path, state_of()), torch.float32, "cpu")
    save_file_atomic({"a.weight": torch.zeros(2, 2)}, tmp_path / "no.safetensors")
    with pytest.raises(CheckpointError, match="holds no Chroma denoiser"):
        chroma_utils.load_chroma(tmp_path / "no.safetensors", torch.float32, "cpu")
    headless = {key: tensor for key, tensor in state_of().items() if key != "img_in.weight"}
    with pytest.raises(CheckpointError, match=r"holds no Chroma denoiser \(it lacks img_in.weight;"):
        chroma_utils.load_chroma(written(tmp_path, headless), torch.float32, "cpu")
    short = {
        key: tensor for key, tensor in state_of().items() if not key.startswith("distilled_guidance_layer.norms.1")
    }
    with pytest.raises(CheckpointError, match="1 keys are missing: distilled_guidance_layer.norms.1.scale"):
        chroma_utils.load_chroma(written(tmp_path, short), torch.float32, "cpu")


@pytest.mark.parametrize("values", [{"approximator_in_dim": 20}, {"axes_dim": [4, 14, 15]}])
def test_sizes_that_do_not_go_together_name_the_argument(tmp_path: Path, values: dict) -> None:
    with pytest.raises(CheckpointError, match=next(iter(values))):
        chroma_utils.load_chroma(written(tmp_path, state_of()), torch.float32, "cpu", config=values)
