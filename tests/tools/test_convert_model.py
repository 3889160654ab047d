"""Models between one file and a diffusers folder: diffusers loads what is written and gives our output; the way back is
exact."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.flux_convert import convert_bfl_sd_to_diffusers
from library.components.text_encoder_utils import CLIP_H, CLIP_L, load_clip
from library.safetensors_utils import load_safetensors, read_header
from library.sd_utils import load_unet_sd, load_vae_sd
from library.sdxl_train_utils import predict_noise
from library.sdxl_utils import load_text_encoders_sdxl, load_unet_sdxl, load_vae_sdxl
from tests.tiny import build_tiny_flux
from tests.tiny_sd import build_tiny_sd
from tools import convert_model

HOW = (torch.float32, "cpu")


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    tiny = build_tiny_sd(root, request.param, num_res_blocks=2)
    tensors = load_file(tiny.model) | {"model_ema.decay": torch.ones(()), "betas": torch.rand(5)}
    save_file(tensors, tiny.model, read_header(tiny.model)[1])
    code = convert_model.main(
        [str(tiny.model), str(root / "folder"), "--to", "diffusers", "--tokenizer", str(tiny.tokenizer)]
    )
    assert code == 0
    return request.param, tiny, root / "folder"


def test_diffusers_loads_the_folder_and_agrees(case):
    import diffusers

    kind, tiny, folder = case
    is_sdxl = kind == "sdxl"
    pipeline = (diffusers.StableDiffusionXLPipeline if is_sdxl else diffusers.StableDiffusionPipeline).from_pretrained(
        folder
    )
    generator = torch.Generator().manual_seed(0)
    latents, times = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([500])
    states = torch.randn(1, 5, tiny.params.context_dim, generator=generator)
    ids, image = torch.randint(0, 50, (1, 77), generator=generator), torch.randn(1, 3, 32, 32, generator=generator)
    with torch.no_grad():
        if is_sdxl:
            unet, vae, encoders = (
                load_unet_sdxl(tiny.model, *HOW),
                load_vae_sdxl(tiny.model, *HOW),
                load_text_encoders_sdxl(tiny.model, *HOW),
            )
            pooled, sizes = torch.randn(1, 32, generator=generator), torch.tensor([[64.0, 64, 0, 0, 64, 64]])
            parts = {"hidden_state1": states[..., :16], "hidden_state2": states[..., 16:], "pool2": pooled}
            mine = predict_noise(unet, latents, times, parts, (sizes[:, :2], sizes[:, 2:4], sizes[:, 4:]))
            other = pipeline.unet(
                latents, times, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}
            ).sample
        else:
            unet, vae = load_unet_sd(tiny.model, *HOW), load_vae_sd(tiny.model, *HOW)
            encoders = [load_clip(tiny.model, CLIP_H if kind == "sd2" else CLIP_L, *HOW)]
            mine, other = unet(latents, times, states), pipeline.unet(latents, times, states).sample
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        theirs = [pipeline.text_encoder] + ([pipeline.text_encoder_2] if is_sdxl else [])
        for own, foreign in zip(encoders, theirs, strict=True):
            one, two = (encoder.eval()(ids, output_hidden_states=True).hidden_states[-1] for encoder in (own, foreign))
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
        moments = pipeline.vae.encode(image).latent_dist
        torch.testing.assert_close(
            vae.decode(latents),
            pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample,
            rtol=1e-3,
            atol=1e-3,
        )
        assert moments.mean.shape[1] == 4
    assert pipeline.tokenizer("a cat").input_ids[0] == pipeline.tokenizer.bos_token_id


def test_the_way_back_is_the_same_file(case, tmp_path):
    kind, tiny, folder = case
    assert convert_model.main([str(folder), str(tmp_path / "back.safetensors"), "--to", "single"]) == 0
    before, after = load_file(tiny.model), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert read_header(tiny.model)[1] == read_header(tmp_path / "back.safetensors")[1]


def test_a_folder_without_rest_is_completed_and_comes_back(case, tmp_path):
    """Position ids and logit scale are made; tensors of the parts are those of the folder."""

    kind, tiny, folder = case
    shutil.copytree(folder, tmp_path / "f")
    (tmp_path / "f" / "original_rest.safetensors").unlink()
    words = [str(tmp_path / "f"), str(tmp_path / "one.safetensors"), "--to", "single"]
    assert convert_model.main(words) == 0
    one = load_file(tmp_path / "one.safetensors")
    assert ("cond_stage_model.model.logit_scale" in one) == (kind == "sd2") and "betas" not in one
    assert convert_model.main(words) == 2  # exists
    before = load_file(tiny.model)
    assert all(
        torch.equal(before[key], tensor)
        for key, tensor in one.items()
        if key.startswith(("model.diffusion_model.", "first_stage_model."))
    )


def test_precision_and_variant(case, tmp_path):
    kind, tiny, _ = case
    words = [
        str(tiny.model),
        str(tmp_path / "f"),
        "--to",
        "diffusers",
        "--tokenizer",
        str(tiny.tokenizer),
        "--save_precision",
        "fp16",
        "--variant",
        "fp16",
    ]
    assert convert_model.main([*words, "--prediction_type", "v"]) == 0
    assert {
        t.dtype for t in load_file(tmp_path / "f" / "unet" / "diffusion_pytorch_model.fp16.safetensors").values()
    } == {torch.float16}
    assert (
        json.loads((tmp_path / "f" / "scheduler" / "scheduler_config.json").read_text())["prediction_type"]
        == "v_prediction"
    )


@pytest.mark.parametrize("start", ["folder", "shard", "transformer"])
def test_flux_from_shards(start, tmp_path):
    tiny = build_tiny_flux(tmp_path / "tiny")
    original = load_safetensors(tiny.flux)
    state = {key: tensor.contiguous() for key, tensor in convert_bfl_sd_to_diffusers(original).items()}
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"axes_dims_rope": tiny.params.axes_dim}))
    names = [f"diffusion_pytorch_model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    places = {key: names[number % 4] for number, key in enumerate(state)}
    for name in names:
        save_file({key: state[key] for key, place in places.items() if place == name}, folder / name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    source = {"folder": folder.parent, "transformer": folder, "shard": folder / names[2]}[start]
    out = tmp_path / "flux.safetensors"
    assert convert_model.main([str(source), str(out), "--to", "single"]) == 0
    written = load_file(out)
    assert written.keys() == original.keys() and all(torch.equal(written[key], original[key]) for key in original)
    (folder / names[3]).unlink()
    assert convert_model.main([str(source), str(tmp_path / "x.safetensors"), "--to", "single"]) == 2
    assert convert_model.main([str(out), str(tmp_path / "x.safetensors"), "--to", "single"]) == 2
    assert not (tmp_path / "x.safetensors").exists()


def bundle_of(paths: dict[str, object], target) -> None:
    """The models of a set in one file, as ComfyUI writes it: `paths` maps what stands before the names to a file."""
    state, config = {}, {}
    for prefix, path in paths.items():
        part = next((name for name in ("clip_l", "t5xxl", "vae") if name in prefix), None)
        own = json.loads(read_header(path)[1].get("model_config", "{}"))
        config |= {part: own} if part else own
        state |= {prefix + key: tensor for key, tensor in load_safetensors(path).items()}
    if "text_encoders.clip_l.transformer." in paths:  # what the folder has no place for
        state["text_encoders.clip_l.transformer.text_projection.weight"] = torch.eye(32)
        state["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6)
    save_file(state, target, {"model_config": json.dumps(config), "modelspec.title": "all"})


def same_file(one, other) -> bool:
    before, after = load_file(one), load_file(other)
    return (
        before.keys() == after.keys()
        and all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
        and read_header(one)[1] == read_header(other)[1]
    )


@pytest.mark.parametrize("guidance", [True, False])
def test_flux_to_a_folder_and_back(guidance, tmp_path, capsys):
    """diffusers loads the denoiser and gives our output; variants that take more values than come out are converted
    too."""
    from diffusers import FluxTransformer2DModel

    from library.flux_utils import load_flux, prepare_img_ids

    tiny = build_tiny_flux(tmp_path / "tiny", guidance=guidance)
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    assert convert_model.main([str(tiny.flux), str(folder), "--to", "diffusers"]) == 0
    theirs, mine = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer"), load_flux(tiny.flux, *HOW)
    assert theirs.config.guidance_embeds == guidance
    generator = torch.Generator().manual_seed(0)
    img, txt, vec = (torch.randn(shape, generator=generator) for shape in ((1, 6, 64), (1, 3, 24), (1, 32)))
    times, ids, scale = torch.tensor([0.3]), prepare_img_ids(1, 2, 3), torch.tensor([3.5])
    with torch.no_grad():
        other = theirs(
            img, txt, vec, times, ids[0], torch.zeros(3, 3), scale if guidance else None, return_dict=False
        )[0]
        own = mine(img, ids, txt, torch.zeros(1, 3, 3), times, vec, scale if guidance else None)
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    assert convert_model.main([str(folder), str(back), "--to", "single"]) == 0
    assert same_file(tiny.flux, back)
    fill = load_file(tiny.flux) | {"img_in.weight": torch.randn(32, 384, generator=generator)}
    config = {**json.loads(read_header(tiny.flux)[1]["model_config"]), "in_channels": 384}
    save_file(fill, tmp_path / "fill.safetensors", {"model_config": json.dumps(config)})
    assert convert_model.main([str(tmp_path / "fill.safetensors"), str(tmp_path / "fill"), "--to", "diffusers"]) == 0
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path / "fill", subfolder="transformer")
    assert (theirs.x_embedder.in_features, theirs.proj_out.out_features) == (384, 64)
    words = [str(tiny.flux), str(tmp_path / "no"), "--to", "diffusers", "--tokenizer", str(tiny.clip_l_tokenizer)]
    assert convert_model.main(words) == 2 and convert_model.main([*words[:4], "--prediction_type", "v"]) == 2
    told = capsys.readouterr().err
    assert "holds no CLIP text encoder" in told and "--prediction_type is not for" in told
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["flux", "chroma"])
def test_a_file_of_all_models_is_a_pipeline_and_back(name, tmp_path):
    import diffusers

    from library.components.text_encoder_utils import load_clip_l, load_t5xxl
    from library.flux_utils import load_ae
    from library.tiny_models import build_tiny

    tiny, place = build_tiny(name, tmp_path / "tiny"), "text_encoders.{}.transformer."
    paths = {"model.diffusion_model.": getattr(tiny, name), "vae.": tiny.ae, place.format("t5xxl"): tiny.t5xxl}
    words = []
    if name == "flux":
        paths[place.format("clip_l")], words = tiny.clip_l, ["--tokenizer", str(tiny.clip_l_tokenizer)]
    source, folder, back = tmp_path / "all.safetensors", tmp_path / "folder", tmp_path / "back.safetensors"
    bundle_of(paths, source)
    assert convert_model.main([str(source), str(folder), "--to", "diffusers", *words]) == 0
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline).__name__ == {"flux": "FluxPipeline", "chroma": "ChromaPipeline"}[name]
    ids = torch.randint(0, 50, (1, 7), generator=torch.Generator().manual_seed(0))
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    number = "_2" if name == "flux" else ""
    t5, tokenizer = (getattr(pipeline, f"{part}{number}") for part in ("text_encoder", "tokenizer"))
    with torch.no_grad():
        pairs = [(load_t5xxl(source, *HOW)(ids)[0], t5(ids)[0])]
        raw = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
        pairs.append((load_ae(source, *HOW).decode(latents), pipeline.vae.decode(raw).sample))
        if name == "flux":
            own, other = load_clip_l(source, *HOW).eval()(ids), pipeline.text_encoder(ids)
            pairs.append((own.last_hidden_state, other.last_hidden_state))
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    assert tokenizer("a cat").input_ids[-1] == tokenizer.eos_token_id
    picture = pipeline("a cat", num_inference_steps=1, height=16, width=16, output_type="np", max_sequence_length=16)
    assert picture.images.shape == (1, 16, 16, 3)
    assert convert_model.main([str(folder), str(back), "--to", "single"]) == 0
    assert same_file(source, back)
    alone = tmp_path / "alone.safetensors"  # the denoiser, from its sub-folder
    assert convert_model.main([str(folder / "transformer"), str(alone), "--to", "single"]) == 0
    before, after = load_file(getattr(tiny, name)), load_file(alone)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_old_commands(tmp_path):
    from tools.model_tools.old_names import convert_diffusers20_original_sd, convert_diffusers_to_flux

    tiny = build_tiny_sd(tmp_path / "sd", "sd1", num_res_blocks=2)
    folder, back = str(tmp_path / "folder"), str(tmp_path / "back.safetensors")
    assert (
        convert_diffusers20_original_sd([str(tiny.model), folder, "--v1", "--reference_model", str(tiny.tokenizer)])
        == 0
    )
    assert convert_diffusers20_original_sd([folder, back, "--v1", "--fp16"]) == 0
    assert load_file(back)["first_stage_model.quant_conv.weight"].dtype == torch.float16
    with pytest.raises(SystemExit):
        convert_diffusers20_original_sd([folder, back, "--v1", "--epoch", "3"])
    flux = build_tiny_flux(tmp_path / "flux")
    state = {
        key: tensor.contiguous() for key, tensor in convert_bfl_sd_to_diffusers(load_safetensors(flux.flux)).items()
    }
    save_file(state, tmp_path / "diffusers.safetensors", read_header(flux.flux)[1])
    words = [
        "--diffusers_path",
        str(tmp_path / "diffusers.safetensors"),
        "--save_to",
        str(tmp_path / "one.safetensors"),
        "--mem_eff_load_save",
    ]
    assert (
        convert_diffusers_to_flux(words) == 0
        and load_file(tmp_path / "one.safetensors").keys() == load_safetensors(flux.flux).keys()
    )


def test_no_model_is_one_message(tmp_path, capsys):
    save_file({"some.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    assert convert_model.main([str(tmp_path / "a.safetensors"), str(tmp_path / "out"), "--to", "diffusers"]) == 2
    assert convert_model.main([str(tmp_path / "none"), str(tmp_path / "b.safetensors"), "--to", "single"]) == 2
    assert "does not exist" in capsys.readouterr().err and not (tmp_path / "out").exists()
    for key, told in (
        ("lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_k.conditioning1.0.weight", "a ControlNet-LLLite"),
        ("lora_unet_x.lora_down.weight", "a LoRA-type adapter"),
    ):
        save_file({key: torch.ones(2, 2)}, tmp_path / "net.safetensors")
        assert convert_model.main([str(tmp_path / "net.safetensors"), str(tmp_path / "out"), "--to", "diffusers"]) == 2
        assert f"net.safetensors is {told}" in capsys.readouterr().err


@pytest.mark.parametrize("whole", [False, True])
def test_a_denoiser_to_a_folder_and_back(whole, tmp_path):
    """diffusers loads the folder and gives our output; the way back gives the tensors and metadata of the file."""
    from diffusers import Lumina2Transformer2DModel

    from library.lumina_utils import load_lumina
    from library.tiny_models.lumina_tiny import PREFIXES, build_tiny_lumina

    tiny = build_tiny_lumina(tmp_path / "tiny", whole=whole)
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    assert convert_model.main([str(tiny.lumina), str(folder), "--to", "diffusers"]) == 0
    other = Lumina2Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 16, 8, 8, generator=generator), torch.randn(2, 5, 24, generator=generator)
    mask, times = torch.ones(2, 5, dtype=torch.long), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        mine = load_lumina(tiny.lumina, *HOW, config={"qk_norm_eps": 1e-5})(latents, times, text, mask)
        theirs = other(latents, times, text, mask.bool(), return_dict=False)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert convert_model.main([str(folder), str(back), "--to", "single"]) == 0
    before, after = load_file(tiny.lumina), load_file(back)
    prefix = PREFIXES["denoiser"] if whole else ""
    before = {key[len(prefix) :]: tensor for key, tensor in before.items() if key.startswith(prefix)}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert read_header(tiny.lumina)[1] == read_header(back)[1]


@pytest.mark.parametrize("start", ["folder", "shard"])
def test_chroma_to_a_folder_and_back(start, tmp_path, capsys):
    from diffusers import ChromaTransformer2DModel

    from library.chroma_utils import load_chroma, save_chroma
    from library.chroma_models import Chroma, ChromaParams
    from library.flux_utils import prepare_img_ids

    params = ChromaParams(
        in_channels=16, context_in_dim=24, hidden_size=64, num_heads=2, depth=1, depth_single_blocks=2,
        axes_dim=(4, 14, 14), approximator_in_dim=32, approximator_hidden_size=24, approximator_depth=2,
    )
    torch.manual_seed(0)
    original, folder, back = tmp_path / "chroma.safetensors", tmp_path / "folder", tmp_path / "back.safetensors"
    save_chroma(Chroma(params), original, None, {"modelspec.title": "mine"})
    assert convert_model.main([str(original), str(folder), "--to", "diffusers"]) == 0
    theirs = ChromaTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    img, txt, ids = torch.randn(1, 6, 16), torch.randn(1, 3, 24), prepare_img_ids(1, 2, 3)
    given = {"timestep": torch.tensor([0.3]), "img_ids": ids[0], "txt_ids": torch.zeros(3, 3), "return_dict": False}
    with torch.no_grad():
        other = theirs(hidden_states=img, encoder_hidden_states=txt, **given)[0]
        mine = load_chroma(original, *HOW)(img, ids, txt, torch.zeros(1, 3, 3), given["timestep"], torch.ones(1, 3))
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    source = folder
    if start == "shard":
        theirs.save_pretrained(folder / "transformer", max_shard_size="20KB")
        (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
        source = min((folder / "transformer").glob("*-of-*.safetensors"))
    assert convert_model.main([str(source), str(back), "--to", "single"]) == 0
    before, after = load_file(original), load_file(back)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert read_header(original)[1] == read_header(back)[1]
    save_chroma(Chroma(dataclasses.replace(params, mlp_ratio=2.0)), original)
    assert convert_model.main([str(original), str(tmp_path / "no"), "--to", "diffusers"]) == 2
    assert "mlp_ratio is 2" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_denoiser_folder_without_rest(tmp_path, capsys):
    """In shards, without what an original file has beside: the norm that nothing uses is made up."""
    from library.tiny_models.lumina_tiny import build_tiny_lumina

    tiny = build_tiny_lumina(tmp_path / "tiny")
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    words = [str(tiny.lumina), str(folder), "--to", "diffusers", "--save_precision", "bf16", "--variant", "bf16"]
    assert convert_model.main([*words, "--tokenizer", str(tmp_path)]) == 2
    assert "--tokenizer is not for" in capsys.readouterr().err and not folder.exists()
    assert convert_model.main([str(tiny.lumina), str(back), "--to", "single"]) == 2  # in this layout already
    assert convert_model.main(words) == 0
    (folder / "original_rest.safetensors").unlink()
    weights = folder / "transformer" / "diffusion_pytorch_model.bf16.safetensors"
    state, names = load_file(weights), [f"diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    places = {key: names[number % 3] for number, key in enumerate(state)}
    for name in names:
        save_file({key: state[key] for key, place in places.items() if place == name}, weights.with_name(name))
    part, like = tmp_path / "part" / "transformer", "noise_refiner.0.ffn_norm1.weight"
    shutil.copytree(weights.parent, part, ignore=lambda *_: names)
    save_file({key: tensor for key, tensor in state.items() if key != like}, part / weights.name)
    assert convert_model.main([str(part.parent), str(back), "--to", "single"]) == 2 and not back.exists()
    assert f"lacks {like}" in capsys.readouterr().err
    index = weights.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": places}))
    weights.unlink()
    assert convert_model.main([str(weights.with_name(names[1])), str(back), "--to", "single"]) == 0
    before, after = load_file(tiny.lumina), load_file(back)
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[key], before[key].bfloat16()) for key in before if key != "norm_final.weight")
    assert torch.equal(after["norm_final.weight"], torch.ones_like(after["norm_final.weight"]))


def test_a_denoiser_in_scaled_8_bit_numbers_is_multiplied_out(tmp_path):
    from library.tiny_models.lumina_tiny import build_tiny_lumina

    tiny = build_tiny_lumina(tmp_path / "tiny")
    name = "layers.0.attention.qkv"
    state = load_file(tiny.lumina)
    weight = state[f"{name}.weight"]
    scale = weight.abs().max() / 448
    state |= {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.scale_weight": scale.reshape(1)}
    save_file({f"model.diffusion_model.{key}": tensor for key, tensor in state.items()}, tiny.lumina)
    assert convert_model.main([str(tiny.lumina), str(tmp_path / "folder"), "--to", "diffusers"]) == 0
    written = load_file(tmp_path / "folder" / "transformer" / "diffusion_pytorch_model.safetensors")
    joined = torch.cat([written[f"layers.0.attn.to_{part}.weight"] for part in "qkv"])
    assert joined.dtype == torch.bfloat16 and not any("scale" in key for key in written)
    torch.testing.assert_close(joined.float(), weight, rtol=0.1, atol=scale.item())


def test_a_denoiser_of_another_family_to_a_folder_and_back(tmp_path):
    """HunyuanImage 2.1, distilled: diffusers loads the folder and gives our output. A file that ComfyUI has saved
    becomes the same file and the same folder."""
    from diffusers import HunyuanImageTransformer2DModel

    from library.hunyuan_image_models import HYImageDiffusionTransformer, HYImageParams
    from library.hunyuan_image_utils import load_hunyuan_image, save_hunyuan_image
    from tests.library.test_hunyuan_image_utils import comfy_names
    from tests.tiny import random_state

    params = HYImageParams(
        in_channels=8, hidden_size=72, num_heads=3, depth=1, depth_single=2, refiner_depth=1,
        text_dim=20, byt5_dim=12, rope_dim_list=(12, 12), guidance_embed=True, mean_flow=True,
    )  # fmt: skip
    model = HYImageDiffusionTransformer(params)
    model.load_state_dict(random_state(model, torch.Generator().manual_seed(2)))
    source, folder, back = tmp_path / "x.safetensors", tmp_path / "folder", tmp_path / "back.safetensors"
    save_hunyuan_image(model, source, torch.float32, {"title": "t"})
    assert convert_model.main([str(source), str(folder), "--to", "diffusers"]) == 0
    other = HunyuanImageTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    generator = torch.Generator().manual_seed(0)
    x, text, glyphs = (torch.randn(2, *size, generator=generator) for size in ((8, 3, 4), (5, 20), (3, 12)))
    times, ones = torch.tensor([300.0, 800.0]), torch.ones(2, 5, dtype=torch.long)
    given = {"timestep_r": times - 100, "guidance": torch.tensor([3500.0, 1000.0])}
    with torch.no_grad():
        mine = load_hunyuan_image(folder, *HOW)(x, times, text, ones, glyphs, ones[:, :3], **given)
        theirs = other(x, times, text, ones, encoder_hidden_states_2=glyphs, encoder_attention_mask_2=ones[:, :3],
                       return_dict=False, **given)[0]  # fmt: skip
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    comfy, again = tmp_path / "comfy.safetensors", tmp_path / "again"
    names = {f"model.model.{key}": tensor for key, tensor in comfy_names(load_file(source)).items()}
    save_file(names | {"vae.decoder.conv_in.bias": torch.zeros(3)}, comfy, read_header(source)[1])
    from_comfy = tmp_path / "from_comfy.safetensors"
    assert convert_model.main([str(folder), str(back), "--to", "single"]) == 0
    assert convert_model.main([str(comfy), str(from_comfy), "--to", "single"]) == 0
    before = load_file(source)
    for file in (back, from_comfy):
        after = load_file(file)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        assert read_header(source)[1] == read_header(file)[1]
    assert convert_model.main([str(comfy), str(again), "--to", "diffusers"]) == 0
    before, after = (load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (folder, again))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert convert_model.main([str(source), str(tmp_path / "no.safetensors"), "--to", "single"]) == 2


def test_a_denoiser_of_clips_to_a_folder_and_back(tmp_path):
    """HunyuanVideo, from text and from image to video, as PyTorch file, as saved by ComfyUI, as folder."""
    from library.checkpoints.hunyuan_video_convert import NAMES
    from library.tiny_models.hunyuan_video_tiny import build_tiny_hunyuan_video
    from tests.library.test_hunyuan_image_utils import comfy_names

    for number, shown in enumerate((False, True)):
        source = build_tiny_hunyuan_video(tmp_path / f"tiny{number}", shown=shown).denoiser
        state, folder, back = load_file(source), tmp_path / f"folder{number}", tmp_path / f"back{number}.safetensors"
        assert convert_model.main([str(source), str(folder), "--to", "diffusers"]) == 0
        written = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        expected = NAMES.to_diffusers(state)
        assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in expected)
        config = json.loads((folder / "transformer" / "config.json").read_text())
        assert (config["in_channels"], config["out_channels"]) == (32 if shown else 16, 16)
        comfy = tmp_path / f"comfy{number}.safetensors"
        save_file({f"model.model.{k}": t for k, t in comfy_names(state).items()}, comfy, read_header(source)[1])
        for given in (folder, comfy):
            assert convert_model.main([str(given), str(back), "--to", "single", "--overwrite"]) == 0
            after = load_file(back)
            assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)
            assert read_header(back)[1] == read_header(source)[1]


def test_an_autoencoder_alone_to_a_folder_and_back(tmp_path):
    """That of HunyuanImage 2.1: diffusers loads the folder and gives our output; the norms of another one have another
    number of groups, which no shape tells and the folder says."""
    from diffusers import AutoencoderKLHunyuanImage

    from library.components.ldm_models import AutoEncoderParams
    from library.hunyuan_image_utils import load_vae
    from library.hunyuan_image_vae import HunyuanVAE2D
    from tests.tiny import random_state

    sizes = {"ch_mult": (1,) * 6, "num_res_blocks": 2, "z_channels": 16, "scaling_factor": 0.75289, "shift_factor": 0.0}
    image = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for groups in (32, 4):
        params = AutoEncoderParams(ch=32, norm_groups=groups, **sizes)
        state = random_state(HunyuanVAE2D(params), torch.Generator().manual_seed(2))
        names = ("x.safetensors", "folder", "back.safetensors")
        source, folder, back = (tmp_path / f"{groups} {name}" for name in names)
        config = {} if groups == 32 else {"model_config": json.dumps(dataclasses.asdict(params))}
        save_file({key: tensor.half() for key, tensor in state.items()}, source, {"title": "t", **config})
        assert convert_model.main([str(source), str(folder), "--to", "diffusers"]) == 0
        mine, same = load_vae(folder, *HOW), load_vae(source, *HOW)
        assert mine.params == same.params == params
        assert all(torch.equal(tensor, same.state_dict()[key]) for key, tensor in mine.state_dict().items())
        if groups == 32:
            theirs = AutoencoderKLHunyuanImage.from_pretrained(folder, subfolder="vae").eval()
            with torch.no_grad():
                mean, latents = mine.encode_moments(image)[0], theirs.encode(image).latent_dist.mean
                torch.testing.assert_close(mean, latents, rtol=1e-4, atol=1e-4)
                assert theirs.config.scaling_factor == mine.params.scaling_factor
                pictures = mine.decode(mine.scale(mean)), theirs.decode(latents).sample
                torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)
        assert convert_model.main([str(folder), str(back), "--to", "single"]) == 0
        before, after = load_file(source), load_file(back)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        assert read_header(source)[1] == read_header(back)[1] and after["encoder.conv_in.bias"].dtype == torch.float16
