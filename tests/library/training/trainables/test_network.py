"""NetworkTrainable on a tiny FLUX: our networks and lycoris.kohya through the same calls."""

import logging
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.core.errors import ConfigError
from library.core.keyed_random import StepDraws
from library.flux_utils import load_clip_l, load_flux
from library.training.accelerator_setup import Runtime
from library.training.adapters import NetworkOptions, parse_pairs
from library.training.parser_common import parse
from library.training.run import Models
from library.training.trainables.network import NetworkTrainable
from library.training.wiring.flux import FluxFamily
from tests.networks.test_lora import denoiser_inputs
from tests.tiny import build_tiny_flux

SEED = 5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("flux"))


def denoiser_of(tiny, transform=None):
    return load_flux(tiny.flux, torch.float32, "cpu", transform=transform)


def clip_of(tiny):
    return load_clip_l(tiny.clip_l, torch.float32, "cpu")


def runtime(trained_dtype=torch.float32):
    dtype = torch.float32
    return Runtime(
        accelerator=None, device=torch.device("cpu"), weight_dtype=dtype, denoiser_dtype=dtype,
        text_encoder_dtype=dtype,
        vae_dtype=dtype, trained_dtype=trained_dtype, rank=0, num_processes=1, seed=SEED,
    )


def made(tiny, *arguments, clip=True):
    """(trainable, models) after the options are parsed and checked and the network is attached."""
    trainable, family = unattached(tiny, *arguments)
    trainable.check(family)
    family.transform = trainable.transform(family)
    models = Models(None, [clip_of(tiny) if clip else None, None], denoiser_of(tiny, transform=family.transform))
    trainable.attach(family, models, runtime())
    return trainable, models


def unattached(tiny, *arguments):
    arguments = arguments if "--network_module" in arguments else ("--network_module", "networks.lora_flux", *arguments)
    config = parse([*tiny.arguments(), "--learning_rate", "1e-4", *arguments], "flux", "network")
    return NetworkTrainable(config), FluxFamily(config)


def shaken(network):
    """Random up matrices, so that the network changes something."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(network.named_parameters()):
        if "lora_up" in name:
            nn.init.normal_(parameter.data, std=0.3, generator=generator)


def predict(models):
    with torch.no_grad():
        return models.denoiser(**denoiser_inputs(models.denoiser))


@pytest.mark.parametrize("module", ["networks.lora_flux", "networks.lora", "lora"])
def test_own_network_trains_denoiser_and_clip(tiny, module):
    trainable, models = made(tiny, "--network_module", module, "--network_dim", "2")
    network = trainable.network
    assert (len(network.unet_loras), len(network.text_encoder_loras)) == (10 + 2 * 3, 2 * 6)
    assert network.text_encoder_loras[0].lora_name.startswith("lora_te1_text_model_encoder_layers_0_")
    assert not any(parameter.requires_grad for parameter in models.denoiser.parameters())
    groups = trainable.param_groups()
    assert [group["name"] for group in groups] == ["textencoder 1", "unet"]
    assert trainable.trains_text_encoders(FluxFamily(trainable.config)) == [True, False]
    assert list(trainable.modules()) == ["network"]


def test_rates_of_parts(tiny):
    trainable, _ = made(tiny, "--unet_lr", "3e-4", "--text_encoder_lr", "1e-5", "2e-5")
    assert [(group["name"], group["lr"]) for group in trainable.param_groups()] == [
        ("textencoder 1", 1e-5),
        ("unet", 3e-4),
    ]
    frozen, _ = made(tiny, "--text_encoder_lr", "0")
    assert [group["name"] for group in frozen.param_groups()] == ["unet"]
    assert not any(
        parameter.requires_grad for lora in frozen.network.text_encoder_loras for parameter in lora.parameters()
    )
    with pytest.raises(ConfigError, match="nothing to train"):
        made(tiny, "--text_encoder_lr", "0", "--unet_lr", "0")


def test_sides_can_be_left_out(tiny):
    only_unet, _ = made(tiny, "--network_train_unet_only", clip=False)
    assert only_unet.network.text_encoder_loras == []
    only_text, _ = made(tiny, "--network_train_text_encoder_only")
    assert only_text.network.unet_loras == [] and only_text.network.text_encoder_loras


def test_start_is_the_same_for_the_same_seed_and_touches_no_global_generator(tiny):
    torch.manual_seed(1)
    first, _ = made(tiny)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second, _ = made(tiny)
    for name, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name]), name
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_disabled_predicts_without_the_network(tiny):
    trainable, models = made(tiny, "--network_train_unet_only")
    shaken(trainable.network)
    trained = predict(models)
    with trainable.disabled():
        plain = predict(models)
    assert torch.equal(predict(models), trained) and not torch.allclose(plain, trained, atol=1e-3)
    torch.testing.assert_close(plain, denoiser_of(tiny)(**denoiser_inputs(models.denoiser)).detach())


def test_dropout_in_a_model_follows_the_position_in_the_batch(tiny):
    trainable, models = made(
        tiny,
        "--network_train_unet_only",
        "--network_dropout",
        "0.5",
        "--network_args",
        "rank_dropout=0.2",
        "module_dropout=0.2",
    )
    shaken(trainable.network)
    inputs = denoiser_inputs(models.denoiser)
    trainable.on_step_start(StepDraws(SEED, 3, (4, 5)))
    together = models.denoiser(**inputs)
    apart = []
    for row in (0, 1):
        trainable.on_step_start(StepDraws(SEED, 3, (4 + row,)))
        apart.append(models.denoiser(**{key: value[row : row + 1] for key, value in inputs.items()}))
    torch.testing.assert_close(torch.cat(apart), together)
    trainable.on_step_start(StepDraws(SEED, 3, (6, 7)))
    assert not torch.allclose(models.denoiser(**inputs), together, atol=1e-3)


def test_recomputed_activations_give_the_same_gradients(tiny):
    trainable, models = made(
        tiny, "--network_train_unet_only", "--network_dropout", "0.5", "--network_args", "module_dropout=0.2"
    )
    shaken(trainable.network)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            models.denoiser.enable_gradient_checkpointing()
            models.denoiser.train()
        trainable.on_step_start(StepDraws(SEED, 3, (0, 1)))
        models.denoiser(**denoiser_inputs(models.denoiser)).square().mean().backward()
        gradients.append({name: p.grad for name, p in trainable.network.named_parameters() if p.grad is not None})
        trainable.network.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_save_load_and_metadata(tiny, tmp_path):
    trainable, models = made(tiny, "--network_dim", "2", "--network_alpha", "3", "--network_args", "rank_dropout=0.1")
    shaken(trainable.network)
    path = str(tmp_path / "a.safetensors")
    trainable.save(path, torch.float16, {"ss_seed": "1"})
    assert trainable.metadata() == {
        "ss_network_module": "networks.lora_flux", "ss_network_dim": 2, "ss_network_alpha": 3.0,
        "ss_network_dropout": None,
        "ss_network_args": '{"rank_dropout": "0.1"}', "ss_scale_weight_norms": None,
    }  # fmt: skip
    again, models_again = made(tiny, "--network_dim", "2", "--network_weights", path)
    trainable.network.eval()
    torch.testing.assert_close(predict(models_again), predict(models), rtol=1e-2, atol=1e-2)
    by_file, models_by_file = made(
        tiny, "--network_weights", path, "--dim_from_weights", "--network_args", "rank_dropout=0.1"
    )
    assert all(
        lora.rank_dropout == 0.1 and lora.lora_dim == 2 and float(lora.alpha) == 3 for lora in by_file.network.loras
    )
    by_file.network.eval()
    assert torch.equal(predict(models_by_file), predict(models_again))


def test_conflicts_with_the_start_file(tiny, tmp_path):
    path = str(tmp_path / "a.safetensors")
    made(tiny, "--network_dim", "2", "--network_alpha", "3")[0].save(path, None, {})
    with pytest.raises(ConfigError, match="alpha 3"):
        made(tiny, "--network_dim", "2", "--network_alpha", "1", "--network_weights", path)
    with pytest.raises(ConfigError, match="rank 2"):
        made(tiny, "--network_dim", "4", "--network_weights", path)


def test_base_weights_are_merged_with_their_multiplier(tiny, tmp_path):
    trainable, models = made(tiny, "--network_train_unet_only")
    shaken(trainable.network)
    path = str(tmp_path / "a.safetensors")
    trainable.save(path, None, {})
    trainable.network.set_multiplier(0.5)
    expected = predict(models)
    _, merged = made(tiny, "--network_train_unet_only", "--base_weights", path, "--base_weights_multiplier", "0.5")
    torch.testing.assert_close(predict(merged), expected, rtol=1e-4, atol=1e-5)


@dataclass
class SampledBatch:
    """What the hook reads of a batch."""

    network_multipliers: torch.Tensor

    def __len__(self) -> int:
        return len(self.network_multipliers)


def test_hooks_pass_on_epochs_and_multipliers(tiny):
    from types import SimpleNamespace

    trainable, models = made(tiny, "--network_args", "ggpo_sigma=0.1", "ggpo_beta=0.1")
    hooks = {type(hook).__name__: hook for hook in trainable.hooks()}
    assert list(hooks) == ["NetworkHook", "WeightNormHook"]
    trainable.network.eval()
    hooks["NetworkHook"].on_epoch_start(SimpleNamespace(models=models))
    assert trainable.network.training
    hooks["NetworkHook"].on_step_start(None, SampledBatch(torch.tensor([0.7, 0.7])))
    assert all(lora.multiplier == pytest.approx(0.7) for lora in trainable.network.loras)
    models.denoiser(**denoiser_inputs(models.denoiser)).mean().backward()
    hooks["WeightNormHook"].on_gradients_ready(None)
    state = hooks["NetworkHook"].state_dict()
    assert state["lora_unet_double_blocks_0_img_attn_qkv"]["grad_norms"].shape == (96, 1)
    hooks["NetworkHook"].load_state_dict(state)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    (["--network_module", ""], "--network_module is missing"),
    (["--network_module", "networks.lora_fluxx"], "did you mean 'networks.lora_flux'"),
    (["--network_module", "networks.lora_anima"], "for Anima; use networks.lora_flux or networks.lora"),
    (["--network_args", "rank_dropuot=0.1"], "did you mean 'rank_dropout'"),
    (["--network_args", "train_single_block_indices=0-2"], "blocks 0-1"),
    (["--network_weights", "/nowhere.safetensors"], "--network_weights is /nowhere.safetensors"),
])  # fmt: skip
def test_bad_options_are_refused_before_models_are_loaded(tiny, arguments, message):
    trainable, family = unattached(tiny, *arguments)
    with pytest.raises(ConfigError, match=message):
        trainable.check(family)


@pytest.mark.parametrize("values", [
    {"network_train_unet_only": True, "network_train_text_encoder_only": True}, {"network_dim": 0},
    {"network_alpha": -1.0},
    {"network_dropout": 1.0}, {"dim_from_weights": True}, {"base_weights_multiplier": [1.0]}, {"network_args": ["x"]},
    {"unet_lr": -1.0}, {"scale_weight_norms": 0.0},
])  # fmt: skip
def test_option_values_are_checked(values):
    with pytest.raises(ConfigError):
        NetworkOptions(**values)


def test_pairs_are_split_at_the_first_equal_sign():
    assert parse_pairs(["a=1", "b = x=y", "a=2"]) == {"a": "2", "b": "x=y"}


def test_a_model_file_is_no_adapter(tiny):
    trainable, family = unattached(tiny, "--base_weights", str(tiny.clip_l))
    with pytest.raises(ConfigError, match="base_weights"):
        trainable.check(family)


def test_empty_network_names_the_classes(tiny):
    with pytest.raises(ConfigError, match="DoubleStreamBlock"):
        made(
            tiny,
            "--network_train_unet_only",
            "--network_args",
            "train_double_block_indices=none",
            "train_single_block_indices=none",
        )


# -- lycoris -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_lycoris():
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_lycoris_runs_unchanged(tiny, tmp_path, quiet_lycoris, algo):
    trainable, models = made(
        tiny, "--network_module", "lycoris.kohya", "--network_dim", "2", "--network_dropout", "0.1", "--network_args",
        f"algo={algo}"
    )
    names = {lora.lora_name for lora in trainable.network.unet_loras + trainable.network.text_encoder_loras}
    assert "lora_unet_double_blocks_0_img_attn_qkv" in names and "lora_te1_text_model_encoder_layers_0_mlp_fc1" in names
    groups = trainable.param_groups()
    assert all(group["name"] and group["params"] for group in groups)
    optimizer = torch.optim.AdamW([{"params": group["params"], "lr": 0.01} for group in groups])
    plain = predict(models)
    trainable.on_step_start(StepDraws(SEED, 0, (0, 1)))
    models.denoiser(**denoiser_inputs(models.denoiser)).square().mean().backward()
    optimizer.step()
    trainable.network.eval()
    assert not torch.equal(predict(models), plain)
    with trainable.disabled():
        torch.testing.assert_close(predict(models), plain)
    paths = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for path in paths:
        trainable.save(path, None, {"ss_b": "1", "ss_a": "2"})
    assert open(paths[0], "rb").read() == open(paths[1], "rb").read()
    again, models_again = made(
        tiny, "--network_module", "lycoris.kohya", "--network_dim", "2", "--network_args", f"algo={algo}",
        "--network_weights", paths[0]
    )
    again.network.eval()
    torch.testing.assert_close(predict(models_again), predict(models), rtol=1e-4, atol=1e-5)


def test_our_file_loads_in_lycoris(tiny, tmp_path, quiet_lycoris):
    import lycoris.kohya

    trainable, models = made(tiny, "--network_dim", "2", "--network_alpha", "1", "--network_train_unet_only")
    shaken(trainable.network)
    path = str(tmp_path / "a.safetensors")
    trainable.save(path, None, {})
    denoiser = denoiser_of(tiny)
    network, weights = lycoris.kohya.create_network_from_weights(1.0, path, None, [], denoiser)
    network.apply_to([], denoiser, False, True)
    network.load_weights(path)
    network.eval()
    assert len(network.unet_loras) == len(trainable.network.unet_loras)
    torch.testing.assert_close(predict(Models(None, [], denoiser)), predict(models), rtol=1e-4, atol=1e-4)
    assert set(load_file(path)) == set(weights)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--network_dim=16",), ["alpha / rank = 1/16; --network_alpha 16 trains at full strength"]),
        ((), ["alpha / rank = 1/4; --network_alpha 4 trains at full strength"]),
        (("--network_dim=16", "--network_alpha=16"), []),
        (("--network_dim=16", "--network_alpha=1"), []),
        (("--network_dim=1",), []),
        (("--network_module", "oft", "--network_dim=2"), []),
        (("--network_module", "norm"), []),
    ],
)
def test_a_missing_alpha_is_said(tiny, arguments, words):
    trainable, _ = made(tiny, *arguments)
    assert [line.partition("by ")[2] for line in trainable.notices()] == words
    assert trainable.description().endswith(f"({trainable.opts.module_path})")
