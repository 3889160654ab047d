"""The conversion tool: round trips bit by bit for every layout and family, kinds, old commands, and what it refuses."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.safetensors_utils import read_header
from networks.files.conversion_record import KEY
from tests.golden_dir import BEHAVIOUR_DIR
from tests.golden_tests.test_convert import FILES, LAYOUTS
from tests.waiting import PATIENCE
from tools import convert_lora
from tools.lora_tools import old_names

TARGETS = ("kohya", "peft", "diffusers", "comfy", "ai-toolkit", "lycoris")
LAYOUT_OF = {
    "kohya": "kohya", "separate_kohya": "kohya", "diffusers": "diffusers", "separate_diffusers": "diffusers",
    "comfy": "comfy",
}  # fmt: skip
"""recorded layout -> --to that leads back to it"""


def recorded(family, name):
    tensors = load_file(BEHAVIOUR_DIR / f"convert_{FILES[family]}.safetensors")
    return {key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}


def tool(source, target, to, family=None, expect=0):
    assert (
        convert_lora.main([str(source), str(target), "--to", to, *(["--family", family] if family else [])]) == expect
    )


def assert_same(path, tensors, metadata=None):
    written = load_file(path)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), key
    if metadata is not None:
        assert read_header(path)[1] == metadata


def random_alphas(tensors, dtype):
    """Strengths that are no powers of two, one per layer, with tensors of a type."""
    generator = torch.Generator().manual_seed(3)
    done = {}
    for key, tensor in tensors.items():
        is_alpha = key.endswith(".alpha")
        done[key] = (torch.rand((), generator=generator) * 3 + 0.1) if is_alpha else tensor.to(dtype)
    return done


def cases():
    for family in FILES:
        for source in LAYOUTS[family]:
            for to in TARGETS:
                # the recorded layers of HunyuanImage are square, so that fused ones have no parts
                if source in LAYOUT_OF and not (family == "hunyuan_image" and to in ("peft", "diffusers")):
                    yield pytest.param(family, source, to, id=f"{family}-{source}-{to}")


@pytest.mark.parametrize(("family", "source", "to"), list(cases()))
def test_there_and_back_is_the_same_file(family, source, to, tmp_path):
    tensors, metadata = recorded(family, source), {"ss_note": "a", "modelspec.title": "t"}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    tool(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to, family)
    if LAYOUT_OF[source] == to:
        return
    tool(tmp_path / "b.safetensors", tmp_path / "c.safetensors", LAYOUT_OF[source], family)
    assert_same(tmp_path / "c.safetensors", tensors)
    kept = read_header(tmp_path / "c.safetensors")[1]
    assert {key: value for key, value in kept.items() if not key.startswith("sshs_")} == metadata


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["flux", "sd", "sdxl", "anima"])
def test_strengths_that_round_come_back_too(family, dtype, tmp_path):
    """Over three files, the folded ones on the way."""
    tensors = random_alphas(recorded(family, "kohya"), dtype)
    save_file(tensors, tmp_path / "0.safetensors")
    for number, to in enumerate(("diffusers", "comfy", "ai-toolkit", "peft", "kohya")):
        tool(tmp_path / f"{number}.safetensors", tmp_path / f"{number + 1}.safetensors", to, family)
    assert_same(tmp_path / "5.safetensors", tensors)
    assert KEY not in read_header(tmp_path / "5.safetensors")[1]


def test_a_file_that_was_changed_on_the_way_is_not_undone(tmp_path):
    tensors = recorded("flux", "kohya")
    save_file(tensors, tmp_path / "a.safetensors")
    tool(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", "flux")
    changed = {
        key: tensor * 2 if "lora_B" in key else tensor for key, tensor in load_file(tmp_path / "b.safetensors").items()
    }
    save_file(changed, tmp_path / "b.safetensors", read_header(tmp_path / "b.safetensors")[1])
    tool(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", "flux")
    key = "lora_unet_double_blocks_1_img_mlp_0"
    scale = float(tensors[f"{key}.alpha"]) / 2
    torch.testing.assert_close(
        load_file(tmp_path / "c.safetensors")[f"{key}.lora_up.weight"], 2 * scale * tensors[f"{key}.lora_up.weight"]
    )


KINDS = {
    "loha": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8), "alpha": ()},
    "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4), "alpha": ()},
    "oft": {"oft_blocks": (2, 4, 4), "alpha": ()},
    "boft": {"oft_blocks": (2, 2, 4, 4), "rescale": (8, 1), "alpha": ()},
    "full": {"diff": (8, 8), "diff_b": (8,)},
    "norm": {"w_norm": (8,), "b_norm": (8,)},
    "ia3": {"weight": (8,), "on_input": ()},
    "glora": {"a1.weight": (2, 8), "a2.weight": (8, 2), "b1.weight": (2, 8), "b2.weight": (8, 2), "alpha": ()},
    "dora": {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2), "alpha": (), "dora_scale": (8, 1)},
}
LAYERS = {
    "flux": "double_blocks_3_img_attn_proj", "sd": "mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    "sdxl": "middle_block_1_transformer_blocks_0_attn1_to_q", "anima": "blocks_3_self_attn_q_proj",
    "hunyuan_image": "double_blocks_3_img_attn_proj",
}  # fmt: skip


def of_kind(kind, family):
    generator = torch.Generator().manual_seed(1)
    name = f"lora_unet_{LAYERS[family]}"
    return {f"{name}.{key}": torch.randn(shape, generator=generator).abs() for key, shape in KINDS[kind].items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", LAYERS)
def test_every_kind_keeps_its_tensors(family, kind, tmp_path):
    tensors = of_kind(kind, family)
    save_file(tensors, tmp_path / "a.safetensors")
    for to in TARGETS[1:]:
        refused = to == "peft" and kind != "dora"
        tool(tmp_path / "a.safetensors", tmp_path / f"{to}.safetensors", to, family, expect=2 if refused else 0)
        assert (tmp_path / f"{to}.safetensors").exists() != refused
        if refused:
            continue
        reads_limits = to == "comfy" or (
            to == "ai-toolkit" and family == "anima"
        )  # rotations come in ComfyUI's form, see test_comfy_forms
        if kind != "dora" and not (reads_limits and kind in ("oft", "boft")):
            assert sorted(map(str, load_file(tmp_path / f"{to}.safetensors").values())) == sorted(
                map(str, tensors.values())
            )
        tool(tmp_path / f"{to}.safetensors", tmp_path / f"{to}_back.safetensors", "kohya", family)
        assert_same(tmp_path / f"{to}_back.safetensors", tensors)


def test_parts_of_a_fused_layer_that_only_lora_can_be(tmp_path, capsys):
    tensors = {
        key.replace(LAYERS["flux"], "double_blocks_3_img_attn_qkv"): t for key, t in of_kind("loha", "flux").items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    tool(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", "flux", expect=2)
    assert "parts apart" in capsys.readouterr().err and not (tmp_path / "b.safetensors").exists()


def attention_only():
    tensors = {
        key: t
        for key, t in recorded("flux", "kohya").items()
        if any(w in key for w in ("attn_qkv", "attn_proj", "linear1"))
    }
    for key in [key for key in tensors if "linear1.lora_up" in key]:
        tensors[key][36:] = 0  # q, k and v of width 12
    return tensors


def test_xlabs(tmp_path):
    """Named as XLabs does, without alpha; diffusers reads the same change out of it."""
    from networks.files.lora_conversion import to_diffusers

    pytest.importorskip("diffusers")
    tensors = attention_only()
    save_file(tensors, tmp_path / "a.safetensors")
    tool(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "xlabs", "flux")
    written = load_file(tmp_path / "b.safetensors")
    assert (
        "single_blocks.10.processor.qkv_lora.up.weight" in written
        and "double_blocks.1.processor.proj_lora2.down.weight" in written
    )
    tool(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", "flux")
    assert_same(tmp_path / "c.safetensors", tensors)
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    theirs, ours = _convert_xlabs_flux_lora_to_diffusers(dict(written)), to_diffusers("flux", tensors)
    for key in (key for key in theirs if "lora_A" in key):
        other = key.replace("lora_A", "lora_B")
        torch.testing.assert_close(theirs[other] @ theirs[key], ours[other] @ ours[key])


def test_peft_folder_and_its_configuration(tmp_path):
    tensors = {key: tensor for key, tensor in recorded("sd", "kohya").items() if not key.startswith("lora_te")}
    save_file(tensors, tmp_path / "a.safetensors")
    tool(tmp_path / "a.safetensors", tmp_path / "p" / "adapter_model.safetensors", "peft", "sd")
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 1)
    tool(tmp_path / "p" / "adapter_model.safetensors", tmp_path / "b.safetensors", "kohya", "sd")
    assert_same(tmp_path / "b.safetensors", tensors)
    save_file(recorded("sd", "kohya"), tmp_path / "both.safetensors")
    tool(tmp_path / "both.safetensors", tmp_path / "q" / "adapter_model.safetensors", "peft", "sd", expect=2)


def test_options_of_musubi(tmp_path):
    tensors = recorded("anima", "kohya")
    save_file(tensors, tmp_path / "a.safetensors")
    a, b, c = (str(tmp_path / f"{name}.safetensors") for name in "abc")
    assert (
        convert_lora.main(
            ["--input", a, "--output", b, "--target", "other", "--diffusers_prefix", "pre", "--family", "anima"]
        )
        == 0
    )
    assert "pre.blocks.27.cross_attn.k_proj.lora_A.weight" in load_file(b)
    assert not any(key.endswith(".alpha") for key in load_file(b))
    assert convert_lora.main(["--input", b, "--output", c, "--target", "default", "--family", "anima"]) == 0
    assert_same(c, tensors)


def run_script(*words):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=PATIENCE)


def test_old_commands(tmp_path):
    save_file(recorded("hunyuan_image", "kohya"), tmp_path / "h.safetensors")
    done = run_script(
        "networks/convert_hunyuan_image_lora_to_comfy.py", tmp_path / "h.safetensors", tmp_path / "hc.safetensors"
    )
    assert done.returncode == 0 and "old name" in done.stderr
    assert_same(tmp_path / "hc.safetensors", recorded("hunyuan_image", "comfy"))
    assert (
        old_names.convert_hunyuan_image_lora_to_comfy(
            [str(tmp_path / "hc.safetensors"), str(tmp_path / "hb.safetensors"), "--reverse"]
        )
        == 0
    )
    assert_same(tmp_path / "hb.safetensors", recorded("hunyuan_image", "kohya"))
    save_file(recorded("anima", "kohya"), tmp_path / "a.safetensors")
    assert (
        old_names.convert_anima_lora_to_comfy([str(tmp_path / "a.safetensors"), str(tmp_path / "ac.safetensors")]) == 0
    )
    assert_same(tmp_path / "ac.safetensors", recorded("anima", "comfy"))
    save_file(recorded("flux", "kohya"), tmp_path / "f.safetensors")
    words = [
        "--src",
        "sd-scripts",
        "--dst",
        "ai-toolkit",
        "--src_path",
        str(tmp_path / "f.safetensors"),
        "--dst_path",
        str(tmp_path / "fa.safetensors"),
    ]
    assert old_names.convert_flux_lora(words) == 0
    assert all(key.startswith(("transformer.", "text_encoder.")) for key in load_file(tmp_path / "fa.safetensors"))


def bad(name, folder):
    """(tensors, options, what the message says)"""
    good = recorded("flux", "kohya")
    first = next(iter(good))
    if name == "another family":
        return good, ["--family", "sdxl"], "no layers of sdxl"
    if name == "no name known":
        return (
            {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "lora_unet_x.lora_up.weight": torch.ones(4, 2)},
            [],
            "--family",
        )
    if name == "half of the names known":
        return (
            {k.replace("double_blocks_1", "double_x_1"): t for k, t in good.items()},
            ["--family", "flux"],
            "no layers of flux",
        )
    if name == "not finite":
        return {k: t * float("nan") if k == first else t for k, t in good.items()}, [], "not finite"
    if name == "down without up":
        return {k: t for k, t in good.items() if not k.endswith("img_mlp_0.lora_up.weight")}, [], "no lora_up.weight"
    return good, ["--family", "fluxx"], "did you mean"


@pytest.mark.parametrize(
    "name",
    ["another family", "no name known", "half of the names known", "not finite", "down without up", "family misspelt"],
)
def test_bad_input_is_one_message_and_no_file(name, tmp_path, capsys):
    tensors, options, message = bad(name, tmp_path)
    save_file(tensors, tmp_path / "a.safetensors")
    assert (
        convert_lora.main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "comfy", *options])
        != 0
    )
    assert message in capsys.readouterr().err.lower() and not (tmp_path / "b.safetensors").exists()


def test_missing_alphas_and_mixed_ranks(tmp_path):
    """No alpha: the rank, so that scale is 1; layers keep their own rank."""
    tensors = {key: t for key, t in recorded("sd", "kohya").items() if not key.endswith(".alpha")}
    name = "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn1_to_out_0"
    tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = torch.ones(3, 6), torch.ones(6, 3)
    save_file(tensors, tmp_path / "a.safetensors")
    tool(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", "sd")
    written = load_file(tmp_path / "b.safetensors")
    assert torch.equal(
        written["unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0.lora_B.weight"], torch.ones(6, 3)
    )
    tool(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", "sd")
    assert_same(tmp_path / "c.safetensors", tensors)


def test_outputs_are_not_written_over(tmp_path, capsys):
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    save_file(recorded("flux", "kohya"), a)
    assert convert_lora.main([a, a, "--to", "comfy", "--overwrite"]) == 2
    assert "is an input too" in capsys.readouterr().err
    assert convert_lora.main([a, b, "--to", "comfy", "--dry_run"]) == 0 and not (tmp_path / "b.safetensors").exists()
    tool(a, b, "comfy")
    assert convert_lora.main([a, b, "--to", "diffusers"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert convert_lora.main([a, b]) == 2 and convert_lora.main([a, "--to", "comfy"]) == 2
    assert_same(
        b, recorded("flux", "comfy") | {k: t for k, t in load_file(b).items() if k.startswith("text_encoders.")}
    )


@pytest.mark.parametrize("family", ["flux", "sdxl", "anima"])
@pytest.mark.parametrize(
    ("kind", "dim", "alpha"), [("norm", 4, 1.0), ("oft", 4, 0.002), ("diag_oft", 4, 0.002), ("boft", 16, 0.002)]
)
def test_norms_and_rotations_for_comfy_and_back(family, kind, dim, alpha, tmp_path):
    """Through the command line: ComfyUI's form (see test_comfy_forms), and the same file again on the way back."""
    from library.core.registry import import_target
    from tests.networks.test_every_adapter import trained
    from tests.networks.tiny_denoisers import tiny_denoiser

    model, _ = tiny_denoiser(family)
    network = import_target(f"networks.{kind}:create_network")(1.0, dim, alpha, None, None, model)
    network.apply_to(None, model, False, True)
    trained(network)
    source, there, back = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "c"))
    network.save_weights(str(source), torch.float32, {"ss_network_module": f"networks.{kind}"})
    tool(source, there, "comfy", family)
    dotted = load_file(there)
    assert all(key.startswith("diffusion_model.") for key in dotted) and not any(
        key.endswith(".alpha") for key in dotted
    )
    if family == "flux" and kind == "norm":
        assert all(key.endswith("_norm.scale.w_norm") for key in dotted)
    tool(there, back, "kohya", family)
    assert_same(back, load_file(source), read_header(source)[1])
