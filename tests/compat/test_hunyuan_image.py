"""HunyuanImage 2.1 by its known calls, against our own objects."""

import shutil

import pytest
import torch

from library import hunyuan_image_models, hunyuan_image_text_encoder, hunyuan_image_utils, hunyuan_image_vae
from library.components.llm_encoder_utils import load_qwen25_vl
from library.components.tokenizers import byt5_ids
from library.safetensors_utils import load_safetensors
from library.strategy_hunyuan_image import HunyuanImageTextEncodingStrategy, HunyuanImageTokenizeStrategy, glyph_text
from library.tiny_models.hunyuan_image_tiny import build_tiny_hunyuan_image
from networks import lora, lora_hunyuan_image
from tests.compat.test_networks_and_metadata import described
from tests.library.test_flux_utils import key_table

PROMPTS = ['a sign "open"', "a cat", "“one” and ‘two’ words"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_hunyuan_image(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def denoiser(tiny):
    return hunyuan_image_utils.load_hunyuan_image(tiny.denoiser, torch.float32, "cpu")


@pytest.fixture(scope="module")
def qwen(tiny, tmp_path_factory):
    """A folder with the text encoder and its tokenizer."""
    folder = tmp_path_factory.mktemp("qwen")
    shutil.copytree(tiny.tokenizer, folder, dirs_exist_ok=True)
    shutil.copy(tiny.text_encoder, folder / "model.safetensors")
    return str(folder)


def same(model, other) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_loading(tiny, denoiser):
    load = hunyuan_image_models.load_hunyuan_image_model
    assert same(load("cpu", str(tiny.denoiser), "torch", False, "cpu", torch.float32), denoiser)
    small = load("cpu", str(tiny.denoiser), "flash", True, "cpu", None, fp8_scaled=True)
    assert small.single_blocks[0].linear1.weight.dtype == torch.float8_e4m3fn
    vae = hunyuan_image_vae.load_vae(str(tiny.vae), "cpu", disable_mmap=True, chunk_size=16)
    assert same(vae, hunyuan_image_utils.load_vae(tiny.vae, None, "cpu"))
    made = hunyuan_image_models.create_model("torch", False, torch.bfloat16)
    assert {key: list(tensor.shape) for key, tensor in made.state_dict().items()} == key_table("hunyuan_image")
    assert made.dtype == torch.bfloat16 and made.device.type == "meta"
    assert hunyuan_image_utils.MODEL_VERSION_2_1 == "hunyuan-image-2.1"


def test_adapters_merged_into_the_denoiser(tiny, denoiser):
    network = lora.create_network(1.0, 2, 2.0, None, [], denoiser)
    for number, module in enumerate(network.loras):
        torch.nn.init.normal_(module.lora_up.weight, generator=torch.Generator().manual_seed(number))
    merged = hunyuan_image_models.load_hunyuan_image_model(
        "cpu", str(tiny.denoiser), "torch", False, "cpu", torch.float32,
        lora_weights_list=[network.file_state_dict()], lora_multipliers=[0.5],
    )  # fmt: skip
    assert not same(merged, denoiser)
    network.set_multiplier(0.5)
    network.merge_to(None, denoiser)
    for (name, tensor), (_, other) in zip(denoiser.state_dict().items(), merged.state_dict().items(), strict=True):
        torch.testing.assert_close(other, tensor, msg=lambda text, name=name: f"{name}: {text}")


def test_texts_are_those_of_the_strategies(tiny, qwen):
    tokenizer, vlm = hunyuan_image_text_encoder.load_qwen2_5_vl(qwen, torch.float32, "cpu")
    bytes_of, byt5 = hunyuan_image_text_encoder.load_byt5(str(tiny.byt5), torch.float32, "cpu")
    assert same(vlm, load_qwen25_vl(tiny.text_encoder, torch.float32, "cpu"))
    strategy = HunyuanImageTokenizeStrategy(tokenizer=str(tiny.tokenizer))
    tokens = strategy.tokenize(PROMPTS)
    with torch.no_grad():
        states, mask, glyphs, glyph_mask, has_text = HunyuanImageTextEncodingStrategy().encode_tokens(
            strategy, [vlm, byt5], tokens
        )
    ids, given = hunyuan_image_text_encoder.get_qwen_tokens(tokenizer, PROMPTS)
    assert torch.equal(ids, tokens[0]) and torch.equal(given, tokens[1])
    found = hunyuan_image_text_encoder.get_qwen_prompt_embeds(tokenizer, vlm, PROMPTS)
    assert torch.equal(found[0], states) and torch.equal(found[1], mask)
    one = hunyuan_image_text_encoder.get_qwen_prompt_embeds(tokenizer, vlm, PROMPTS[1])[0]
    torch.testing.assert_close(one[0], states[1, : one.shape[1]])

    told, embeds, places = hunyuan_image_text_encoder.get_glyph_prompt_embeds(bytes_of, byt5, PROMPTS)
    assert told == has_text.tolist() == [True, False, True] and embeds.shape[:2] == places.shape == (3, 128)
    longest = glyph_mask.shape[1]
    assert torch.equal(places[:, :longest], glyph_mask) and not places[:, longest:].any()
    torch.testing.assert_close(embeds[:, :longest], glyphs)
    text = glyph_text(PROMPTS[2])
    ids, ones = hunyuan_image_text_encoder.get_byt5_text_tokens(bytes_of, 24, [text])
    assert ids[0].tolist() == byt5_ids(text, 24) and ones.all()


def test_texts_without_the_head_of_the_released_template(tiny, qwen):
    """The text encoder comes from tensors in memory, whose head size is the usual one."""
    wide = {24: 128, 12: 128}  # widths of the tiny one and of its head
    state = {
        key: torch.randn([wide.get(size, size) for size in tensor.shape])
        for key, tensor in load_safetensors(tiny.text_encoder).items()
    }
    _, vlm = hunyuan_image_text_encoder.load_qwen2_5_vl(qwen, torch.float32, "cpu", state_dict=state)
    ids, mask = torch.arange(40)[None], torch.ones(1, 40, dtype=torch.int64)
    states, left = hunyuan_image_text_encoder.get_qwen_prompt_embeds_from_tokens(vlm, ids, mask)
    with torch.no_grad():
        expected = vlm(ids, output_hidden_states=True).hidden_states[-3][:, 34:]
    assert torch.equal(states, expected) and left.tolist() == [[1] * 6]


def test_steps_along_the_schedule():
    timesteps, sigmas = hunyuan_image_utils.get_timesteps_sigmas(4, 5.0, "cpu")
    wanted = [5 * u / (1 + 4 * u) for u in (1, 0.75, 0.5, 0.25, 0)]
    assert sigmas.tolist() == pytest.approx(wanted)
    assert timesteps.tolist() == pytest.approx([1000 * sigma for sigma in wanted[:4]])
    clean, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    latents = noise.bfloat16().float()
    for number in range(4):
        latents = hunyuan_image_utils.step(latents, noise - clean, sigmas, number)
    torch.testing.assert_close(latents, noise.bfloat16().float() - noise + clean)


def test_networks_by_their_constructor(denoiser):
    pairs = {"network_reg_dims": "img_attn_qkv=3", "split_qkv": "True"}
    own = lora.create_network(0.5, 4, 2.0, None, [], denoiser, **pairs)
    mine = lora_hunyuan_image.HunyuanImageLoRANetwork(
        [], denoiser, 0.5, 4, 2.0, split_qkv=True, reg_dims={"img_attn_qkv": 3}
    )
    assert described(mine) == described(own) and {module.lora_dim for module in mine.loras} == {3, 4}
