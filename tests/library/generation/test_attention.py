"""What computes the attention in image and video scripts."""

import importlib.util

import pytest

from library.components.attention_backends import KERNELS
from library.core.attention_modes import AttentionChoice
from library.core.errors import ConfigError
from library.core.options import Config
from library.generation import anima_inference, attention
from library.generation.attention import attention_of
from library.generation.gen_img.options import GenerationModelOptions
from library.generation.hunyuan_video_options import HunyuanVideoModelOptions
from library.generation.lumina_options import LuminaModelOptions
from tests.library.generation import tiny_scripts
from tests.library.test_anima_inference import arguments, pixels
from tests.tiny_anima import build_tiny_anima


def of(group: type, **given) -> attention.AttentionSettings:
    return attention_of(Config({group: group(**given)}, given))


def test_options_of_scripts_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of(HunyuanVideoModelOptions).choice == AttentionChoice() == of(GenerationModelOptions, sdpa=True).choice
    missing = of(HunyuanVideoModelOptions, attn_mode="flash").problems
    assert "flash-attn is not installed" in missing[0] and "--attn_mode torch_flash" in missing[0]
    assert "xformers is not installed" in of(GenerationModelOptions, xformers=True).notes[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(attention, "get_preferred_device", lambda: "cuda")
    chosen = of(HunyuanVideoModelOptions, attn_mode="flash", split_attn=True)
    assert chosen.choice == AttentionChoice("flash", split=True) and not chosen.problems
    assert "--dit_dtype bfloat16" in of(HunyuanVideoModelOptions, attn_mode="sageattn", dit_dtype="float32").problems[0]
    assert of(LuminaModelOptions, use_sage_attn=True, use_flash_attn=True).choice.mode == "sageattn"
    assert of(GenerationModelOptions, xformers=True, fp16=True).choice.mode == "xformers"
    assert of(HunyuanVideoModelOptions, attn_mode="flash3", device="cpu").problems


def test_a_script_computes_as_it_is_told(tmp_path, tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, called = build_tiny_anima(tmp_path_factory.mktemp("tiny")), []
    plain, math = KERNELS["torch"], KERNELS["torch_math"]
    monkeypatch.setitem(KERNELS, "torch_math", lambda *states: called.append(1) or math(*states))
    told = pixels(anima_inference.run(arguments(tiny, tmp_path, "--attn_mode=torch_math")))
    assert called and KERNELS["torch"] is plain and len(told) == 1
    with pytest.raises(ConfigError, match="sageattention is not installed"):
        anima_inference.run(arguments(tiny, tmp_path, "--attn_mode=sageattn"))


@pytest.mark.parametrize("name", ["flux", "chroma", "sd3", "sdxl", "gen_img"])
def test_scripts_whose_known_ones_have_no_such_option_take_it(name, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, called = tiny_scripts.build(name, tmp_path / "tiny"), []
    math = KERNELS["torch_math"]
    monkeypatch.setitem(KERNELS, "torch_math", lambda *states: called.append(1) or math(*states))
    plain = tiny_scripts.made(name, tiny, tmp_path / "plain")
    assert not called
    told = tiny_scripts.made(name, tiny, tmp_path / "math", "--attn_mode=torch_math")
    assert called and float((told - plain).abs().max()) <= 1
    lacks = {"gen_img": "wider than SageAttention takes"}.get(name, "sageattention is not installed; the nearest")
    with pytest.raises(ConfigError, match=lacks):
        tiny_scripts.made(name, tiny, tmp_path, "--attn_mode=sageattn")
