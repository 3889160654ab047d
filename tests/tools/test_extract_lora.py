"""The extraction tool through its command line: a change of low rank comes back, and merged into the original it is the
tuned model."""

import pytest
import torch
from safetensors import safe_open

from library.checkpoints.unet_convert import original_to_diffusers
from library.safetensors_utils import load_safetensors, save_file_atomic
from networks.files.network_files import by_module
from networks.kinds.registry import weight_change
from networks.lora import create_network
from networks.operations.extraction import is_rounding
from tests.tiny import build_tiny_flux
from tests.tools.test_merge_lora import build, models_of
from tools.lora_tools.extract import main
from tools.lora_tools.merge import main as merge

FAMILIES = ("flux", "sd1", "sd2", "sdxl", "anima", "lumina", "hunyuan_image")
CONV = ("sd1", "sdxl")


def write_lora(path, family, denoiser, encoders, rank=3):
    pairs = {"conv_dim": "3", "conv_alpha": "2"} if family in CONV else {}
    network = create_network(1.0, rank, 1.5, None, encoders, denoiser, **pairs)
    network.apply_to(encoders, denoiser, bool(encoders), True)
    generator = torch.Generator().manual_seed(9)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    network.save_weights(str(path), torch.float32, {"ss_base_model_version": "x"})
    return str(path)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(family, original, tuned, the LoRA that lies between them)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = str(build(request.param, folder))
    lora = write_lora(folder / "lora.safetensors", request.param, *models_of(request.param, model))
    tuned = str(folder / "tuned.safetensors")
    assert merge(["--model", model, "--models", lora, "--save_to", tuned]) == 0
    return request.param, model, tuned, lora


def assert_same_model(first, second, tolerance=1e-4):
    one, two = load_safetensors(first), load_safetensors(second)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key].view(tensor.shape), tensor, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("more", [["--dim", "3", "--conv_dim", "3"], ["--dim", "5", "--conv_dim", "4"]])
def test_a_change_of_low_rank_comes_back(case, tmp_path, more):
    family, model, tuned, lora = case
    out, again = str(tmp_path / "new" / "found.safetensors"), str(tmp_path / "again.safetensors")
    assert main(["--model_org", model, "--model_tuned", tuned, "--save_to", out, *more]) == 0
    wanted, found = by_module(load_safetensors(lora)), by_module(load_safetensors(out))
    assert wanted.keys() == found.keys()
    for name, part in found.items():
        shape = (part["lora_up.weight"].shape[0], *part["lora_down.weight"].shape[1:])
        torch.testing.assert_close(
            weight_change(part, torch.zeros(shape)),
            weight_change(wanted[name], torch.zeros(shape)),
            rtol=1e-4,
            atol=1e-4,
        )
    assert merge(["--model", model, "--models", out, "--save_to", again]) == 0
    assert_same_model(tuned, again)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    versions = {
        "flux": "flux1", "sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "anima": "anima",
        "lumina": "lumina2", "hunyuan_image": "hunyuan-image-2.1",
    }  # fmt: skip
    # the tiny Stable Diffusion 2 is too narrow to be told from 1
    assert metadata["ss_base_model_version"] == ("sd_v1" if family == "sd2" else versions[family])
    assert (
        metadata["ss_network_dim"] == more[1]
        and metadata["modelspec.title"] == "found"
        and len(metadata["sshs_model_hash"]) == 64
    )


@pytest.mark.parametrize(
    "rule",
    [None, ("sv_ratio", 4.0), ("sv_fro", 0.7), ("sv_cumulative", 0.6), ("sv_quantile", 0.6), ("sv_threshold", 0.5)],
)
def test_error_is_the_optimum(tmp_path, rule):
    """Of a change of full rank: for every rule and layer, convolutions included."""
    model, tuned, out = (
        str(build("sd1", tmp_path)),
        str(tmp_path / "tuned.safetensors"),
        str(tmp_path / "out.safetensors"),
    )
    changed = moved(model, tuned, lambda key, tensor: "model.diffusion_model" in key and tensor.ndim > 1)
    dynamic = ["--dynamic_method", rule[0], "--dynamic_param", str(rule[1])] if rule else []
    assert (
        main(
            ["--model_org", model, "--model_tuned", tuned, "--save_to", out, "--dim", "9", "--conv_dim", "3", *dynamic]
        )
        == 0
    )
    found = by_module(load_safetensors(out))
    before, after = load_safetensors(model), load_safetensors(tuned)
    diffs = [(after[key] - before[key]) for key in changed]
    assert len(found) == len(diffs)
    singular = sorted(
        (tuple(diff.shape), [float(v) for v in torch.linalg.svdvals(diff.flatten(1).double())]) for diff in diffs
    )
    made = sorted(
        ((part["lora_up.weight"].shape[0], *part["lora_down.weight"].shape[1:]), torch.linalg.svdvals(
            part["lora_up.weight"].flatten(1).double() @ part["lora_down.weight"].flatten(1).double()).tolist(), part)
        for part in found.values()
    )  # fmt: skip
    for (shape, values), (own_shape, own, part) in zip(
        sorted(singular), sorted(made, key=lambda item: item[:2]), strict=True
    ):
        assert shape == own_shape
        most = 3 if shape[2:] == (3, 3) else 9
        rank = part["lora_down.weight"].shape[0]
        assert rank == counted(values, most, shape, rule)
        assert own[:rank] == pytest.approx(
            values[:rank], rel=1e-4
        )  # the kept ones are those of the difference: the optimum


def counted(values, most, shape, rule):
    total = {"sv_fro": sum(v * v for v in values) ** 0.5}.get(rule[0] if rule else "", sum(values))
    sides = (shape[0], torch.Size(shape[1:]).numel())
    if rule is None:
        return min(most, *sides)
    method, parameter = rule
    if method == "sv_ratio":
        wanted = sum(v > values[0] / parameter for v in values)
    elif method == "sv_threshold":
        wanted = sum(v > parameter for v in values)
    else:
        size = (lambda s: sum(v * v for v in s) ** 0.5) if method == "sv_fro" else sum
        wanted = next(k for k in range(1, len(values) + 1) if size(values[:k]) >= parameter * total)
    return max(1, min(wanted, most, *sides))


def moved(model, tuned, which, size=0.1):
    """Write a copy in which chosen tensors are changed; their keys."""
    generator = torch.Generator().manual_seed(4)
    state, changed = load_safetensors(model), []
    for key, tensor in state.items():
        if tensor.is_floating_point() and which(key, tensor):
            state[key] = tensor + size * torch.randn(tensor.shape, generator=generator)
            changed.append(key)
    with safe_open(model, "pt") as file:
        save_file_atomic(state, tuned, file.metadata())
    return changed


@pytest.mark.parametrize("family", FAMILIES)
def test_full_differences_are_exact(family, tmp_path):
    """Norms, biases and whole weights; what no adapter has a place for (embeddings) is told."""
    model, tuned, out, again = (
        str(build(family, tmp_path)),
        *(str(tmp_path / f"{name}.safetensors") for name in ("tuned", "out", "again")),
    )
    skipped = ("first_stage_model", "vae.", "embedding", "embed", "text_projection", "logit_scale", "time_", "label_")
    moved(model, tuned, lambda key, tensor: not any(part in key for part in skipped))
    assert main(["--model_org", model, "--model_tuned", tuned, "--save_to", out, "--kind", "full"]) == 0
    assert merge(["--model", model, "--models", out, "--save_to", again]) == 0
    assert_same_model(tuned, again, 1e-6)
    assert {key.rpartition(".")[2] for key in load_safetensors(out)} <= {"diff", "diff_b", "w_norm", "b_norm"}


def test_norms_beside_a_lora_and_alone(tmp_path):
    model, tuned, out, again = (
        str(build("sdxl", tmp_path)),
        *(str(tmp_path / f"{name}.safetensors") for name in ("tuned", "out", "again")),
    )
    moved(model, tuned, lambda key, tensor: "diffusion_model" in key and ".norm" in key and tensor.ndim == 1)
    for words in (["--kind", "norm"], ["--with_norms"]):
        assert main(["--model_org", model, "--model_tuned", tuned, "--save_to", out, "--overwrite", *words]) == 0
        assert merge(["--model", model, "--models", out, "--save_to", again, "--overwrite"]) == 0
        assert_same_model(tuned, again, 1e-6)


def test_nearest_kronecker_product(tmp_path):
    model, tuned, out, again = (
        str(build("flux", tmp_path)),
        *(str(tmp_path / f"{name}.safetensors") for name in ("tuned", "out", "again")),
    )
    state = load_safetensors(model)
    generator = torch.Generator().manual_seed(5)
    for key, tensor in state.items():
        if key.endswith("img_attn.qkv.weight"):
            state[key] = tensor + torch.kron(
                torch.randn(4, 4, generator=generator),
                torch.randn(tensor.shape[0] // 4, tensor.shape[1] // 4, generator=generator),
            )
    with safe_open(model, "pt") as file:
        save_file_atomic(state, tuned, file.metadata())
    assert (
        main(["--model_org", model, "--model_tuned", tuned, "--save_to", out, "--kind", "lokr", "--factor", "4"]) == 0
    )
    assert merge(["--model", model, "--models", out, "--save_to", again]) == 0
    assert_same_model(tuned, again)


def test_a_diffusers_folder_against_a_file(tmp_path):
    """The layout does not matter: the adapter is the same."""
    model, tuned = str(build("sd1", tmp_path)), str(tmp_path / "tuned.safetensors")
    moved(model, tuned, lambda key, tensor: "attn" in key and tensor.ndim > 1 and "first_stage" not in key)
    folder = tmp_path / "folder"
    for name in ("unet", "text_encoder"):
        (folder / name).mkdir(parents=True)
    (folder / "model_index.json").write_text("{}", encoding="utf-8")
    state = load_safetensors(tuned)
    unet = {
        key.removeprefix("model.diffusion_model."): tensor
        for key, tensor in state.items()
        if key.startswith("model.diffusion_model.")
    }
    text = {
        key.removeprefix("cond_stage_model.transformer."): tensor
        for key, tensor in state.items()
        if key.startswith("cond_stage_model.")
    }
    save_file_atomic(original_to_diffusers(unet), folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file_atomic(text, folder / "text_encoder" / "model.safetensors")
    outs = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b")]
    for path, out in zip((tuned, str(folder)), outs, strict=True):
        assert main(["--model_org", model, "--model_tuned", path, "--save_to", out]) == 0
    first, second = (load_safetensors(out) for out in outs)
    assert first.keys() == second.keys() and any("lora_te_" in key for key in first)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_text_encoders_in_files_of_their_own(tmp_path):
    flux = build_tiny_flux(tmp_path)
    arguments, words = flux.arguments(), []
    for name in ("clip_l", "t5xxl"):
        path = next(a.partition("=")[2] for a in arguments if a.startswith(f"--{name}="))
        tuned = str(tmp_path / f"{name}-tuned.safetensors")
        moved(path, tuned, lambda key, tensor: tensor.ndim == 2 and ("attn" in key or "SelfAttention.q" in key))
        words += [f"--{name}_org", path, f"--{name}_tuned", tuned]
    out = str(tmp_path / "te.safetensors")
    assert main(["--model_org", str(flux.flux), "--model_tuned", str(flux.flux), "--save_to", out, *words]) == 2
    assert main(["--save_to", out, *words, "--dim", "64"]) == 0
    assert {key.split("_")[1] for key in load_safetensors(out)} == {"te1", "te3"}


def test_selection(tmp_path, caplog):
    model, tuned, out = str(build("sd1", tmp_path)), str(tmp_path / "t.safetensors"), str(tmp_path / "o.safetensors")
    moved(model, tuned, lambda key, tensor: tensor.ndim > 1 and "first_stage" not in key, 1e-3)
    base = ["--model_org", model, "--model_tuned", tuned, "--save_to", out, "--overwrite"]
    assert main([*base, "--include", "attentions", "--exclude", "attn2|lora_te"]) == 0
    names = set(by_module(load_safetensors(out)))
    assert names and all("attentions" in name and "attn2" not in name and "lora_unet" in name for name in names)
    assert main([*base, "--clamp_quantile", "0.5", "--save_precision", "bf16"]) == 0
    assert {tensor.dtype for key, tensor in load_safetensors(out).items() if "alpha" not in key} == {torch.bfloat16}
    state, te = load_safetensors(tuned), load_safetensors(model)
    state |= {
        key: tensor + 1 if "diffusion_model.middle_block.1.proj_in" in key else te[key]
        for key, tensor in te.items()
        if "diffusion_model" in key
    }
    save_file_atomic(state, tuned)
    assert main([*base, "--min_diff", "0.01"]) == 0
    assert all(name.startswith("lora_unet") for name in by_module(load_safetensors(out)))


def test_bad_input(tmp_path, capsys):
    sd1, sdxl = str(build("sd1", tmp_path / "a")), str(build("sdxl", tmp_path / "b"))
    tuned, out = str(tmp_path / "t.safetensors"), tmp_path / "out.safetensors"
    moved(sd1, tuned, lambda key, tensor: tensor.ndim > 1)
    cases = (
        ([sd1, sdxl], "both must be of one kind"), ([sd1, sd1], "are the same"),
        ([sd1, str(tmp_path / "none")], "does not exist"),
        ([sd1, tuned, "--dim", "0"], "--dim is 0; needed: a whole number from 1"),
        ([sd1, tuned, "--kind", "full", "--dim", "8"], "belongs to --kind lora"),
        ([sd1, tuned, "--include", "("], "no regular expression"),
        ([sd1, tuned, "--factor", "4"], "belongs to --kind lokr"),
        ([sd1, tuned, "--include", "nothing"], "nothing to extract"),
        ([sd1, tuned, "--clamp_quantile", "2"], "up to 1"),
    )  # fmt: skip
    for (first, second, *more), told in cases:
        assert main(["--model_org", first, "--model_tuned", second, "--save_to", str(out), *more]) != 0
        assert told in capsys.readouterr().err
    assert main(["--model_org", sd1, "--model_tuned", tuned, "--save_to", tuned]) == 2
    assert "is an input too" in capsys.readouterr().err
    state = load_safetensors(tuned)
    key = next(key for key in state if key.endswith("attn1.to_q.weight"))
    save_file_atomic({**state, key: state[key] * float("nan")}, tmp_path / "nan.safetensors")
    assert main(["--model_org", sd1, "--model_tuned", str(tmp_path / "nan.safetensors"), "--save_to", str(out)]) != 0
    assert "not finite" in capsys.readouterr().err
    save_file_atomic({name: tensor for name, tensor in state.items() if name != key}, tmp_path / "less.safetensors")
    assert main(["--model_org", sd1, "--model_tuned", str(tmp_path / "less.safetensors"), "--save_to", str(out)]) != 0
    assert "lacks 1 layers" in capsys.readouterr().err and not out.exists()
    assert (
        main(["--model_org", sd1, "--model_tuned", tuned, "--save_to", str(out), "--dry_run"]) == 0 and not out.exists()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_no_change(dtype, tmp_path, caplog):
    """A float32 original and a tuned model in 16 bits: layers that the format alone moved are left out, in one line;
    the others are taken, however little they changed beyond it."""
    caplog.set_level("INFO")
    model, tuned, out = (
        str(build("flux", tmp_path)),
        *(str(tmp_path / f"{name}.safetensors") for name in ("tuned", "out")),
    )
    moved(model, tuned, lambda key, tensor: key == "double_blocks.0.img_mlp.0.weight", 0.02)
    state = {key: tensor.to(dtype) for key, tensor in load_safetensors(tuned).items()}
    with safe_open(model, "pt") as file:
        metadata = file.metadata()
    save_file_atomic(state, tuned, metadata)
    words = ["--model_org", model, "--model_tuned", tuned, "--save_to", out]
    assert main(words) == 0
    assert {key.partition(".")[0] for key in load_safetensors(out)} == {"lora_unet_double_blocks_0_img_mlp_0"}
    told = [
        record.getMessage() for record in caplog.records if "the formats of the models, explains" in record.getMessage()
    ]
    assert len(told) == 1 and f"from float32 to {str(dtype).removeprefix('torch.')}" in told[0]
    save_file_atomic({key: tensor.to(dtype) for key, tensor in load_safetensors(model).items()}, tuned, metadata)
    assert main([*words, "--overwrite"]) == 2, "nothing but rounding"


def test_steps_of_a_format():
    """Half a step is rounding; more, the same format and a finer one are not."""
    weight = torch.tensor([1.0, -3.0, 1e-7, 0.0, 60000.0])
    rounded = weight.half().float() - weight
    assert is_rounding(weight, rounded, torch.float32, torch.float16)
    assert not is_rounding(weight, rounded + torch.tensor([0.0, 0, 0, 0, 40.0]), torch.float32, torch.float16)
    assert not is_rounding(weight, torch.full((5,), 1e-9), torch.float16, torch.float16)
    assert not is_rounding(weight, torch.full((5,), 1e-9), torch.bfloat16, torch.float32)
    assert is_rounding(weight, torch.zeros(5), torch.float16, torch.float16)
