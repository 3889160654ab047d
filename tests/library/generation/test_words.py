"""Words of embedding files in the image scripts of families with several text encoders: the pictures, every form of
file, what is refused."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from library.components.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from library.core.errors import ConfigError
from library.families.registry import FAMILIES
from library.flux_utils import load_clip_l, load_t5xxl
from library.generation import flux_inference, sd3_inference, sdxl_inference
from library.safetensors_utils import save_file_atomic
from library.sd3_utils import load_clip_g
from library.sdxl_utils import load_text_encoders_sdxl
from library.tiny_models import build_tiny

SCRIPTS: dict[str, ModuleType] = {"flux": flux_inference, "sd3": sd3_inference, "sdxl": sdxl_inference}


class Scene:
    """A tiny model with the command line of its script, and the vectors of known words in its text encoders."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.tiny = name, build_tiny(name, folder)
        tiny: Any = self.tiny
        self.files = {
            "flux": lambda: [f"--ckpt_path={tiny.flux}", f"--ae={tiny.ae}", f"--clip_l={tiny.clip_l}",
                             f"--t5xxl={tiny.t5xxl}", f"--clip_l_tokenizer={tiny.clip_l_tokenizer}",
                             "--t5xxl_max_token_length=16", "--dtype=float32"],
            "sd3": lambda: [f"--ckpt_path={tiny.model}", f"--clip_l={tiny.clip_l}", f"--clip_g={tiny.clip_g}",
                            f"--t5xxl={tiny.t5xxl}", f"--clip_l_tokenizer={tiny.tokenizer}"],
            "sdxl": lambda: [f"--ckpt_path={tiny.model}", f"--clip_tokenizer={tiny.tokenizer}", "--dtype=float32"],
        }[name]()  # fmt: skip

    def tables(self) -> dict[str, tuple[Any, torch.Tensor]]:
        """key -> (tokenizer, embedding table)."""
        tiny: Any = self.tiny
        clip = load_clip_tokenizer(str(tiny.clip_l_tokenizer if self.name == "flux" else tiny.tokenizer))
        if self.name == "sdxl":
            encoders = load_text_encoders_sdxl(tiny.model, torch.float32, "cpu")
            return {k: (clip, e.get_input_embeddings().weight) for k, e in zip(("clip_l", "clip_g"), encoders)}
        found = {"clip_l": (clip, load_clip_l(tiny.clip_l, torch.float32, "cpu").get_input_embeddings().weight)}
        if self.name == "sd3":
            found["clip_g"] = (clip, load_clip_g(tiny.clip_g, torch.float32, "cpu").get_input_embeddings().weight)
        t5 = load_t5_tokenizer(model_path=str(tiny.t5xxl))
        return {**found, "t5xxl": (t5, load_t5xxl(tiny.t5xxl, torch.float32, "cpu").get_input_embeddings().weight)}

    def vectors(self, word: str) -> dict[str, torch.Tensor]:
        """Those of a known word of one token."""
        found = {}
        for key, (tokenizer, table) in self.tables().items():
            (number,) = tokenizer(word, add_special_tokens=False).input_ids
            found[key] = table[number][None].detach().contiguous()
        return found

    def run(self, folder: Path, *more: str) -> list[bytes]:
        argv = [*self.files, "--width=64", "--height=64", "--steps=1", "--seed=5", f"--output_dir={folder}", *more]
        return [Image.open(path).tobytes() for path in SCRIPTS[self.name].run(argv)]


@pytest.fixture(scope="module", params=SCRIPTS)
def scene(request, tmp_path_factory) -> Scene:
    return Scene(request.param, tmp_path_factory.mktemp(request.param))


def test_a_word_makes_the_pictures_of_its_vectors(scene, tmp_path):
    """Also one that the tokenizer knows otherwise, in a file of an adapter, and in the negative prompt."""
    vectors, prompts = scene.vectors("cat"), tmp_path / "prompts.txt"
    files = [tmp_path / "zyx.safetensors", tmp_path / "dog.pt"]
    save_file_atomic(vectors, files[0])
    torch.save(vectors, files[1])
    bundle = tmp_path / "adapter.safetensors"
    words = {f"bundle_emb.abc.{key.replace('t5xxl', 't5')}": rows for key, rows in vectors.items()}
    layer = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    width = vectors["clip_l"].shape[1]
    lora = {f"{layer}.lora_down.weight": torch.zeros(1, width), f"{layer}.lora_up.weight": torch.zeros(width, 1)}
    save_file_atomic({**words, **lora}, bundle)
    prompts.write_text("a cat\na zyx\na dog\na abc\na zyxland\n", encoding="utf-8")
    cat, zyx, dog, abc, zyxland = scene.run(
        tmp_path / "out", "--textual_inversion_embeddings", *map(str, files), f"--lora_weights={bundle}",
        f"--from_file={prompts}",
    )  # fmt: skip
    assert zyx == dog == abc == cat != zyxland


def test_files_that_do_not_fit_are_named_together(scene, tmp_path):
    keys, vectors = FAMILIES[scene.name].embedding_keys, scene.vectors("cat")
    wide = {key: rows.repeat(1, 2) for key, rows in vectors.items()}
    contents = {
        "single": {"emb_params": torch.zeros(1, 4)}, "wide": {**vectors, keys[1]: wide[keys[1]]},
        "uneven": {**vectors, keys[0]: vectors[keys[0]].repeat(2, 1)}, "partly": {keys[0]: vectors[keys[0]]},
        "layers": {"IN01": torch.zeros(1, 4), "MID": torch.zeros(1, 4)},
    }  # fmt: skip
    for name, tensors in contents.items():
        save_file_atomic(tensors, tmp_path / f"{name}.safetensors")
    given = [str(tmp_path / f"{name}.safetensors") for name in (*contents, "absent")]
    with pytest.raises(ConfigError) as error:
        scene.run(tmp_path, "--prompt=a", "--textual_inversion_embeddings", *given, given[1])
    told, own = "\n".join(error.value.problems), vectors[keys[1]].shape[1]
    assert f"single.safetensors: holds emb_params; {' and '.join(keys)} are needed" in told
    assert f"wide.safetensors holds vectors of {2 * own} values in {keys[1]}; the text encoder has {own}" in told
    assert f"uneven.safetensors holds 2 in {keys[0]}, 1 in {keys[1]}" in told
    assert f"partly.safetensors: holds {keys[0]}; {' and '.join(keys)} are needed" in told
    assert "layers.safetensors: holds vectors for each layer" in told and "--XTI_embeddings" in told
    assert "absent.safetensors: there is no such file" in told and "two files give the word 'wide'" in told
