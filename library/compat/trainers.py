"""Trainers as classes to derive from: `train(args)` with methods that a script or notebook overrides.

A method that nobody overrides is not called: the run is then that of the script, byte for byte. What an override gives
is put in the place of our own object by `library/compat/trainer_run.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class NetworkTrainer:
    """Trains a network (LoRA and so on) of Stable Diffusion 1 and 2. `args` is what the parser of the script gives."""

    family = "sd"
    trainable = "network"
    is_sdxl = False

    def __init__(self) -> None:
        self.run: Any = None
        """the Calls of the run that goes on; see trainer_run"""

    def train(self, args: Any) -> None:
        """Prepare and train. Raises AtelierError (ConfigError before any model is loaded) with what is wrong."""
        from library.compat.trainer_run import train

        train(self, args)

    def _overrides(self, name: str) -> bool:
        """Whether a class of the user has its own version of a method."""
        return getattr(type(self), name) is not getattr(NetworkTrainer, name)

    # -- before the models ---------------------------------------------------------------------------------------------

    def get_model_version(self, args: Any) -> str:
        """What metadata call the base model (ss_base_model_version)."""
        return self.run.family.own("metadata")()["ss_base_model_version"]

    def assert_extra_args(self, args: Any, train_dataset_group: Any, val_dataset_group: Any | None) -> None:
        """Raise for what does not go together; options and data are read, no model is loaded."""

    def get_tokenize_strategy(self, args: Any) -> Any:
        return self.run.strategies.tokenize

    def get_text_encoding_strategy(self, args: Any) -> Any:
        return self.run.strategies.text_encoding

    def get_latents_caching_strategy(self, args: Any) -> Any:
        from library.strategy_base import latents_strategy_of

        return latents_strategy_of(self.run.family.own("latents_caching")())

    def get_text_encoder_outputs_caching_strategy(self, args: Any) -> Any | None:
        """None: captions are encoded in the step."""
        from library.strategy_base import text_strategy_of

        return text_strategy_of(self.run.strategies.text_encoder_outputs_caching)

    # -- models --------------------------------------------------------------------------------------------------------

    def load_target_model(
        self, args: Any, weight_dtype: torch.dtype, accelerator: Any
    ) -> tuple[str, Any, nn.Module, nn.Module]:
        """(version, text encoder or list of them, VAE, denoiser). An override of it has all of them in memory at
        once."""
        family, runtime = self.run.family, self.run.runtime
        encoders = family.own("load_text_encoders")(runtime)
        text = encoders[0] if len(encoders) == 1 else encoders
        return self.get_model_version(args), text, family.own("load_vae")(runtime), family.own("load_denoiser")(runtime)

    def on_transformer_loaded(self, args: Any, accelerator: Any, transformer: nn.Module) -> None:
        """Right after the denoiser is loaded, before it is frozen and adapters are attached."""

    def post_process_network(
        self, args: Any, accelerator: Any, network: nn.Module, text_encoders: list[Any], unet: nn.Module
    ) -> None:
        """After the network is attached."""

    def extra_trainable_params(
        self, args: Any, accelerator: Any, network: nn.Module, transformer: nn.Module,
        trainable_params: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The groups of the optimizer: those given, and further ones ({"params", "lr"})."""
        return trainable_params

    # -- the step ------------------------------------------------------------------------------------------------------

    def on_train_start(
        self, args: Any, accelerator: Any, network: nn.Module, transformer: nn.Module, optimizer: Any
    ) -> None: ...

    def on_step_start(
        self, args: Any, accelerator: Any, network: nn.Module, text_encoders: list[Any], unet: nn.Module, batch: Any,
        weight_dtype: torch.dtype, is_train: bool = True,
    ) -> None:
        """Before each micro-batch."""

    def process_batch(
        self, batch: Any, text_encoders: list[Any], unet: nn.Module, network: nn.Module, vae: nn.Module | None,
        noise_scheduler: Any,
        vae_dtype: torch.dtype, weight_dtype: torch.dtype, accelerator: Any, args: Any, text_encoding_strategy: Any,
        tokenize_strategy: Any, is_train: bool = True, train_text_encoder: bool = True, train_unet: bool = True,
    ) -> Tensor:
        """The loss of one batch, a number: the mean over its samples. `noise_scheduler` is our Objective."""
        return self.run.own_loss(batch)

    def call_unet(
        self, args: Any, accelerator: Any, unet: nn.Module, noisy_latents: Tensor, timesteps: Tensor,
        text_conds: list[Any], batch: Any,
        weight_dtype: torch.dtype, **kwargs: Any,
    ) -> Tensor:
        """What is compared with the target, of the shape of the latents; timesteps [B] on the 0..1000 scale."""
        return self.run.own_prediction(unet, noisy_latents, timesteps, text_conds, batch, kwargs)

    def compute_loss(
        self, args: Any, output: Any, timesteps: Tensor, noise_scheduler: Any, dit_dtype: torch.dtype,
        network_dtype: torch.dtype,
        global_step: int,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(loss of each sample [B], or one number for all; values for the log). `output` has `pred` and `target`."""
        return self.run.own_losses(output)

    def on_post_optimizer_step(
        self, args: Any, accelerator: Any, network: nn.Module, transformer: nn.Module, sync_gradients: bool,
        global_step: int
    ) -> None: ...

    # -- samples, files, logs ------------------------------------------------------------------------------------------

    def sample_images(
        self, accelerator: Any, args: Any, epoch: int | None, global_step: int, device: Any, vae: nn.Module | None,
        tokenizers: Any,
        text_encoder: Any, unet: nn.Module,
    ) -> None:
        """Called at the start (epoch 0, step 0), after every step (epoch None) and every epoch; makes pictures when
        some are due."""
        self.run.own_samples("first" if global_step == 0 else "step" if epoch is None else "epoch")

    def on_before_sample_images(
        self, accelerator: Any, args: Any, epoch: int | None, steps: int, vae: Any, transformer: Any, network: Any,
        sample_parameters: Any,
        dit_dtype: torch.dtype,
    ) -> None: ...

    def on_after_sample_images(
        self, accelerator: Any, args: Any, epoch: int | None, steps: int, vae: Any, transformer: Any, network: Any,
        sample_parameters: Any,
        dit_dtype: torch.dtype,
    ) -> None: ...

    def on_post_save(
        self, args: Any, accelerator: Any, network: nn.Module, transformer: nn.Module, ckpt_name: str, save_dtype: Any,
        metadata: dict[str, str], force_sync_upload: bool,
    ) -> None:
        """On the main process, after a model file was written; `metadata` is what it holds."""

    def update_metadata(self, metadata: dict[str, Any], args: Any) -> None:
        """Put further keys into `metadata`."""

    def extra_metadata(self, args: Any) -> dict[str, Any]:
        return {}

    def extra_step_logs(self, args: Any, logs: dict[str, float]) -> dict[str, float]:
        """Further values of a step."""
        return {}


class SdxlNetworkTrainer(NetworkTrainer):
    family = "sdxl"
    is_sdxl = True


class FluxNetworkTrainer(NetworkTrainer):
    family = "flux"


class AnimaNetworkTrainer(NetworkTrainer):
    family = "anima"


class LuminaNetworkTrainer(NetworkTrainer):
    family = "lumina"
