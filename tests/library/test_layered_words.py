"""Words with vectors for each layer (XTI): what each cross-attention of the U-Net attends to, computed by hand, in
training and in gen_img; names and rows against the reference file."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image

from library.components.tokenizers import load_clip_tokenizer
from library.components.unet_models import UNetParams, text_layers
from library.core.errors import ConfigError
from library.generation.gen_img import script as gen_img
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.sd_models import UNet2DConditionModel
from library.sd_utils import inspect_sd_unet, load_text_encoder_sd, load_unet_sd
from library.tiny_models import build_tiny
from library.training.new_words import TextualInversionOptions
from library.training.new_words.layered import LayeredWord
from tests.golden_dir import behaviour

COUNT = 2
XTI = behaviour("textual_inversion.json")["xti"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def layers(tiny) -> list[str]:
    return text_layers(inspect_sd_unet(tiny.model).params)


@pytest.fixture
def vectors(tiny, layers) -> dict[str, torch.Tensor]:
    width = load_text_encoder_sd(tiny.model, False, torch.float32, "cpu").get_input_embeddings().embedding_dim
    generator = torch.Generator().manual_seed(3)
    return {layer: torch.randn(COUNT, width, generator=generator) for layer in layers}


def states_by_hand(tiny, text: str, rows: torch.Tensor) -> torch.Tensor:
    """States [1, 77, D] of a text in which {0} and {1} are `rows`: vectors are put in the place of embeddings, and go
    through the modules of transformers."""
    from transformers.modeling_attn_mask_utils import _create_4d_causal_attention_mask

    encoder = load_text_encoder_sd(tiny.model, False, torch.float32, "cpu").text_model
    tokenizer, table = load_clip_tokenizer(str(tiny.tokenizer)), encoder.embeddings.token_embedding.weight
    found = [table[tokenizer.bos_token_id]]
    for piece in text.split():
        if piece in ("{0}", "{1}"):
            found.append(rows[int(piece[1])])
        else:
            found += [table[number] for number in tokenizer(piece, add_special_tokens=False).input_ids]
    found += [table[tokenizer.eos_token_id]] * (77 - len(found))
    hidden = torch.stack(found)[None] + encoder.embeddings.position_embedding.weight[:77]
    mask = _create_4d_causal_attention_mask((1, 77), hidden.dtype, device=hidden.device)
    for layer in encoder.encoder.layers:
        made = layer(hidden, attention_mask=mask)
        hidden = made[0] if isinstance(made, tuple) else made
    return encoder.final_layer_norm(hidden)


def contexts_seen(unet: torch.nn.Module) -> list[torch.Tensor]:
    """Filled while the U-Net runs: what its cross-attentions attend to, in their order."""
    seen: list[torch.Tensor] = []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    return seen


def test_each_layer_attends_to_states_with_its_own_vectors(tiny, layers, vectors, tmp_path):
    """Through the prompt encoder of gen_img and the U-Net; a text without the word gives every layer the same."""
    from library.generation.gen_img.options import GenerationModelOptions
    from library.generation.sd_pipeline import SdPipeline
    from library.generation.words import read_layered_words

    file = tmp_path / "zyx.safetensors"
    save_file_atomic(vectors, file)
    options = GenerationModelOptions(ckpt=str(tiny.model), clip_tokenizer=str(tiny.tokenizer))
    prompts = SdPipeline.load_prompt_encoder(options, torch.float32, torch.device("cpu"))
    (width,) = SdPipeline.embedding_widths(options).values()
    prompts.add_layered(read_layered_words([str(file)], layers, width, "XTI_embeddings"))
    unet = load_unet_sd(tiny.model, torch.float32, "cpu").eval()
    seen, sample = contexts_seen(unet), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made = unet(sample, torch.tensor([500]), prompts.encode("a zyx , cat", 1)["hidden_state"])
        assert len(seen) == len(layers)
        for layer, context in zip(layers, seen, strict=True):
            wanted = states_by_hand(tiny, "a {0} {1} , cat", vectors[layer])
            torch.testing.assert_close(context, wanted, rtol=1e-4, atol=1e-5)
        plain = prompts.encode("a cat", 1)["hidden_state"]
        assert torch.equal(unet(sample, torch.tensor([500]), plain), unet(sample, torch.tensor([500]), plain[:, 0]))
        assert not torch.equal(made, unet(sample, torch.tensor([500]), plain))
        weighted = prompts.encode("a (zyx:1.5) , cat", 1)["hidden_state"]
        assert weighted.shape == (1, len(layers), 77, width) and not torch.equal(weighted, seen[0])


def test_gen_img_makes_pictures_with_them(tiny, layers, vectors, tmp_path):
    """Equal vectors in every layer are a plain textual inversion."""
    plain, layered, other = (tmp_path / name / "zyx.safetensors" for name in ("plain", "layered", "other"))
    for path, tensors in (
        (plain, {"emb_params": vectors["MID"]}), (layered, dict.fromkeys(layers, vectors["MID"])), (other, vectors),
    ):  # fmt: skip
        path.parent.mkdir()
        save_file_atomic({key: rows.clone() for key, rows in tensors.items()}, path)

    def picture(*more: str) -> bytes:
        (path,) = gen_img.run([
            f"--ckpt={tiny.model}", f"--clip_tokenizer={tiny.tokenizer}", "--prompt=a zyx --d 1", "--W=64", "--H=64",
            "--steps=2", f"--outdir={tmp_path / 'out'}", *more,
        ])  # fmt: skip
        return Image.open(path).tobytes()

    bundle, width = tmp_path / "bundle.safetensors", vectors["MID"].shape[1]
    layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save_file_atomic({
        "bundle_emb.zyx.string_to_param.*": vectors["MID"], f"{layer}.lora_down.weight": torch.zeros(1, width),
        f"{layer}.lora_up.weight": torch.zeros(width, 1),
    }, bundle)  # fmt: skip
    same = picture("--textual_inversion_embeddings", str(plain))
    assert picture("--XTI_embeddings", str(layered)) == same != picture("--XTI_embeddings", str(other))
    assert picture("--network_module", "lora", "--network_weights", str(bundle)) == same


def test_files_that_do_not_fit(tiny, layers, vectors, tmp_path):
    contents = {
        "single": {"emb_params": torch.zeros(1, 4)}, "wide": {key: rows.repeat(1, 2) for key, rows in vectors.items()},
        "lacking": {key: rows for key, rows in vectors.items() if key != "MID"},
        "uneven": {**vectors, "MID": vectors["MID"][:1]},
    }  # fmt: skip
    paths = [str(tmp_path / f"{name}.safetensors") for name in contents]
    for path, tensors in zip(paths, contents.values()):
        save_file_atomic(tensors, path)
    argv = ["--prompt=a", f"--outdir={tmp_path}", "--XTI_embeddings", *paths]
    with pytest.raises(ConfigError) as error:
        gen_img.run([
            f"--ckpt={tiny.model}", f"--clip_tokenizer={tiny.tokenizer}", *argv, "--textual_inversion_embeddings", paths[0],
        ])  # fmt: skip
    told = "\n".join(error.value.problems)
    assert "both give the word 'single'" in told
    assert "single.safetensors holds emb_params; vectors for each layer" in told and "it lacks MID" in told
    assert "wide.safetensors holds vectors of" in told and "1 in MID" in told
    sdxl = build_tiny("sdxl", tmp_path / "sdxl")
    with pytest.raises(ConfigError, match="in Stable Diffusion 1 and 2 alone"):
        gen_img.run(["--sdxl", f"--ckpt={sdxl.model}", f"--clip_tokenizer={sdxl.tokenizer}", *argv])


def test_names_and_rows_are_those_of_the_reference():
    """Layers of the real U-Net, tokens and the row that each starts from."""
    layers = text_layers(UNetParams())
    assert layers == XTI["layers"] == [place["layer"] for place in XTI["cross_attention"]]
    names = {"input_blocks": "IN", "output_blocks": "OUT"}
    without = [block.split(".") for block in XTI["blocks_without_row"]]
    assert not {f"{names[part]}{int(number):02}" for part, number in without} & set(layers)
    token = XTI["rows"][0]["token"].removesuffix(f"_{layers[0]}")
    options = TextualInversionOptions(token_string=token, num_vectors_per_token=XTI["num_vectors_per_token"])
    word = LayeredWord(options)
    word.layers, word.init_ids = layers, {"emb_params": XTI["init_ids"]}
    assert word.tokens == [row["token"] for row in XTI["rows"]]

    class Runtime:
        seed = 1

    size = max(XTI["init_ids"]) + 1
    table = torch.nn.Embedding(size, 1, _weight=torch.arange(float(size))[:, None])
    rows = word.fresh_rows("emb_params", table, Runtime())
    assert rows[:, 0].tolist() == [row["init_id"] for row in XTI["rows"]]


def test_the_layers_run_in_the_order_of_the_reference():
    """The attention of each place, by its name in diffusers: those of the way down, the middle, those of the way up."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetParams())
    levels = range(len(UNetParams().channels))
    order = [*(f"down_blocks.{n}" for n in levels), "mid_block", *(f"up_blocks.{n}" for n in levels)]
    places = [
        f"{name}.attentions.{number}"
        for name in order
        for number in range(len(getattr(unet.get_submodule(name), "attentions", ())))
    ]
    assert places == [place["diffusers"] for place in XTI["cross_attention"]]
    originals = {f"IN{n:02}": f"input_blocks.{n}.1" for n in range(12)} | {"MID": "middle_block.1"}
    originals |= {f"OUT{n:02}": f"output_blocks.{n}.1" for n in range(12)}
    assert [originals[layer] for layer in text_layers(UNetParams())] == [p["original"] for p in XTI["cross_attention"]]


def test_a_layer_reads_the_tokens_of_its_name(tiny):
    """Ids of a caption, shifted to a layer, are those of the caption with the tokens of that layer."""
    layers = ["IN01", "MID", "OUT03"]
    word = LayeredWord(TextualInversionOptions(token_string="zyx", num_vectors_per_token=COUNT))
    word.layers = layers
    tokenizer = load_clip_tokenizer(str(tiny.tokenizer))
    word.prepare_tokenizers(("emb_params",), [tokenizer])

    class Strategies:
        text_encoding, layout = None, None

    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("library.training.new_words.layered.with_layers", lambda _, words: seen.update(words=words))
        word.text_strategies(Strategies())
    (ids,) = seen["words"]
    text = "a {} cat"
    first = torch.tensor(tokenizer(text.format(" ".join(word.words))).input_ids)
    for number, layer in enumerate(layers):
        wanted = tokenizer(text.format(" ".join(word.of_layer(layer)))).input_ids
        assert ids.of_layer(first, number).tolist() == wanted


def test_the_file_of_a_run_is_read_again(layers, vectors, tmp_path):
    file = tmp_path / "zyx.safetensors"
    save_file_atomic(vectors, file)
    word = LayeredWord(
        TextualInversionOptions(token_string="zyx", num_vectors_per_token=COUNT, weights=str(file))
    )
    word.layers = layers
    (rows,) = word.given_rows(("emb_params",)).values()
    word.rows["emb_params"] = torch.nn.Parameter(copy.deepcopy(rows))
    assert all(torch.equal(tensor, vectors[key]) for key, tensor in word.file_tensors().items())
    assert load_safetensors(str(file)).keys() == word.file_tensors().keys()
