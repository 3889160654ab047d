"""HunyuanVideo: the template of captions, what is cut off, ragged captions, both encoders, and files of the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from library.components.llama_clip_utils import load_encoders
from library.components.llm_encoder_utils import inspect_llama, load_llama
from library.components.tokenizers import load_llama_tokenizer
from library.core.errors import CheckpointError, ConfigError
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.strategy_hunyuan_video import HunyuanVideoTextEncodingStrategy, HunyuanVideoTokenizeStrategy
from library.strategy_llama_clip import HIDDEN_LAYER, TAIL, VIDEO_HEAD, system_head
from library.tiny_models.hunyuan_video_tiny import TinyHunyuanVideo, build_tiny_hunyuan_video
from tests.library.test_flux_utils import empty_checkpoint, key_table

CAPTIONS = ["a red cat", "", "a blue dog runs, number 7", "the circle"]
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: 1. The main"
    " content and theme of the video.2. The color, shape, size, texture, quantity, text, and spatial relationships of"
    " the objects.3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.4."
    " background environment, light, style and atmosphere.5. camera angles, movements, and transitions used in the"
    " video:<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
CONFIG = {"num_attention_heads": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyHunyuanVideo:
    return build_tiny_hunyuan_video(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenize(tiny: TinyHunyuanVideo) -> HunyuanVideoTokenizeStrategy:
    return HunyuanVideoTokenizeStrategy(
        llama_tokenizer=str(tiny.llama_tokenizer), clip_l_tokenizer=str(tiny.clip_tokenizer)
    )


@pytest.fixture(scope="module")
def encoders(tiny: TinyHunyuanVideo) -> list[torch.nn.Module]:
    return load_encoders(tiny.text_encoder1, tiny.text_encoder2, torch.float32, "cpu")


def encoded(tokenize: HunyuanVideoTokenizeStrategy, models: list, texts: list[str]) -> list[torch.Tensor]:
    with torch.no_grad():
        return HunyuanVideoTextEncodingStrategy().encode_tokens(tokenize, models, tokenize.tokenize(texts))


def test_the_template_stands_around_a_caption_behind_the_token_that_begins_texts(tokenize) -> None:
    assert VIDEO_HEAD + "{}" + TAIL == TEMPLATE
    assert system_head("X") == TEMPLATE[: TEMPLATE.index("Describe")] + "X" + TEMPLATE[TEMPLATE.index("<|eot") : -12]
    ids, mask, clip_ids, clip_mask = tokenize.tokenize(CAPTIONS)
    texts = tokenize.llama.batch_decode([row[: int(length)] for row, length in zip(ids, mask.sum(dim=1))])
    assert texts == ["<|begin_of_text|>" + TEMPLATE.format(caption) for caption in CAPTIONS]
    assert mask[1].sum() == tokenize.num_head + 1, "of an empty caption the end of the template is left"
    assert clip_ids.shape == clip_mask.shape == (4, 77) and clip_mask[1].sum() == 2


def test_a_tokenizer_that_does_not_begin_texts_is_helped(tokenize, tiny, tmp_path: Path) -> None:
    content = json.loads((tiny.llama_tokenizer / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    other = HunyuanVideoTokenizeStrategy(llama_tokenizer=str(tmp_path), clip_l_tokenizer=tokenize.clip_l)
    assert other.num_head == tokenize.num_head
    assert torch.equal(other.tokenize("a cat")[0], tokenize.tokenize("a cat")[0])


def test_long_captions_are_cut_and_told(tokenize) -> None:
    ids, mask, _, _ = tokenize.tokenize(["cat " * 400, "a cat"])
    assert ids.shape[1] == tokenize.num_head + 256 and mask[0].all() and not mask[1].all()
    assert tokenize.overlong("cat " * 400) and not tokenize.overlong("a cat")


def test_states_do_not_depend_on_the_batch_and_are_those_of_the_whole_padded_batch(tokenize, encoders) -> None:
    """Byte for byte in any batch; against one forward with padding and an attention mask, as others encode."""
    states, mask, pooled, clip_mask = encoded(tokenize, encoders, CAPTIONS)
    assert states.shape == (4, 256, 24) and mask.shape == (4, 256) and pooled.shape == (4, 16)
    assert not states[mask == 0].any() and mask.sum(dim=1).tolist() == [4, 1, mask[2].sum(), 3]
    for number, caption in enumerate(CAPTIONS):
        alone = encoded(tokenize, encoders, [caption])
        assert all(torch.equal(alone[part][0], whole[number]) for part, whole in enumerate((states, mask, pooled)))
    ids, ids_mask, clip_ids, _ = tokenize.tokenize(CAPTIONS)
    with torch.no_grad():
        hidden = encoders[0](ids, attention_mask=ids_mask, output_hidden_states=True).hidden_states
        wanted = encoders[1](clip_ids)
    assert HIDDEN_LAYER == -3 and len(hidden) == 5
    expected = hidden[2][:, tokenize.num_head :]
    inside = ids_mask[:, tokenize.num_head :].bool()
    torch.testing.assert_close(states[:, : expected.shape[1]][inside], expected[inside])
    end = encoders[1].config.eos_token_id
    first = (clip_ids == end).int().argmax(dim=1)
    torch.testing.assert_close(pooled, wanted.last_hidden_state[torch.arange(4), first])


def test_one_encoder_alone(tokenize, encoders) -> None:
    """Tools encode with one after the other; masks are there in any case."""
    whole = encoded(tokenize, encoders, CAPTIONS)
    for models, missing in (([encoders[0], None], 2), ([None, encoders[1]], 0)):
        part = encoded(tokenize, models, CAPTIONS)
        assert part[missing] is None
        assert all(torch.equal(a, b) for number, (a, b) in enumerate(zip(part, whole)) if number != missing)
    assert TEXT_LAYOUTS["hunyuan_video"].names == ("llm", "llm_mask", "clipL", "clipL_mask")


def test_the_language_model_of_every_file(tiny, tmp_path: Path) -> None:
    """Under prefixes, beside the rest of LLaVA, with a tokenizer inside, as a folder of transformers."""
    from transformers import LlamaConfig, LlamaModel

    state = load_safetensors(tiny.text_encoder1, "cpu")
    ids = torch.arange(12)[None]
    expected = load_llama(tiny.text_encoder1, torch.float32, "cpu")(ids).last_hidden_state
    rest = {
        "multi_modal_projector.linear_1.weight": torch.zeros(2, 2), "vision_tower.x.weight": torch.zeros(2),
        "tokenizer": torch.zeros(9, dtype=torch.uint8), "lm_head.weight": torch.zeros(3, 24),
    }  # fmt: skip
    bare = {key.removeprefix("model."): tensor for key, tensor in state.items()}
    inside = "text_encoders.llama.transformer.model."
    prefixes = ("", "model.", "language_model.model.", "model.language_model.", inside)
    for prefix in prefixes:
        save_file_atomic({**{prefix + key: t for key, t in bare.items()}, **rest}, tmp_path / "x.safetensors")
        model = load_llama(tmp_path / "x.safetensors", torch.float32, "cpu", config=CONFIG)
        assert torch.equal(model(ids).last_hidden_state, expected), prefix
    theirs = LlamaModel(
        LlamaConfig(
            vocab_size=bare["embed_tokens.weight"].shape[0], hidden_size=24, intermediate_size=40, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )
    )  # fmt: skip
    theirs.load_state_dict(bare)
    theirs.save_pretrained(tmp_path / "folder")
    model = load_llama(tmp_path / "folder", torch.float32, "cpu")
    torch.testing.assert_close(model(ids).last_hidden_state, expected)
    bare["layers.0.self_attn.q_proj.bias"] = torch.zeros(24)
    save_file_atomic(bare, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="holds no LLaMA text encoder"):
        load_llama(tmp_path / "x.safetensors", torch.float32, "cpu", config=CONFIG)


def test_sizes_of_the_real_language_model(tmp_path: Path) -> None:
    assert inspect_llama(empty_checkpoint(tmp_path / "x.safetensors", key_table("llama3_8b"))) == {
        "vocab_size": 128320, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 5e5, "eps": 1e-5,
    }  # fmt: skip


def test_eight_bits_of_the_language_model_alone(tiny, tokenize, encoders) -> None:
    llama, clip_l = load_encoders(tiny.text_encoder1, tiny.text_encoder2, torch.float16, "cpu", form="fp8")
    assert llama.layers[0].self_attn.q_proj.weight.dtype == torch.float8_e4m3fn
    assert llama.embed_tokens.weight.dtype == llama.norm.weight.dtype == torch.bfloat16, "float16 on a CPU"
    close = encoded(tokenize, [llama, clip_l], ["a red cat"])[0].float()
    exact = encoded(tokenize, encoders, ["a red cat"])[0]
    assert 0 < ((close - exact).norm() / exact.norm()).item() < 0.3


def test_tokenizers_that_are_missing_or_of_another_model(tokenize, encoders, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="hf download xtuner/llava-llama-3-8b-v1_1-transformers"):
        load_llama_tokenizer(None, str(tmp_path))
    table = encoders[0].get_input_embeddings()
    monkeypatch.setattr(table, "num_embeddings", 100)
    with pytest.raises(ConfigError, match="LLaMA"):
        encoded(tokenize, encoders, ["a cat"])


def test_the_tokenizer_lies_in_the_folder_of_the_model_or_of_the_cache(tiny, tokenize, tmp_path: Path) -> None:
    folder = tmp_path / "xtuner_llava-llama-3-8b-v1_1-transformers"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tiny.llama_tokenizer / "tokenizer.json").read_bytes())
    for how in ({"cache_dir": str(tmp_path)}, {"model_path": str(folder)}):
        assert load_llama_tokenizer(**how)("a cat").input_ids == tokenize.llama("a cat").input_ids
