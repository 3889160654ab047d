"""The video script of HunyuanVideo and SkyReels V1: what its files must be, and how they are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.core.errors import AtelierError
from library.core.options import Config
from library.generation.hunyuan_video_options import (
    GROUPS,
    LINE_OPTIONS,
    HunyuanVideoAdapterOptions,
    HunyuanVideoClipOptions,
    HunyuanVideoModelOptions,
    HunyuanVideoRequest,
)
from library.generation.llama_clip_script import LlamaClipScript
from library.generation.requests import SessionOptions
from library.generation.video_options import OldCompileOptions
from library.generation.video_requests import VideoRequest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.checkpoints.loading import Transform
    from library.dataset.strategies import StrategySet
    from library.generation.video_pipeline import VideoPipeline
    from library.hunyuan_video_models import HYVideoParams


class HunyuanVideoScript(LlamaClipScript):
    family = "hunyuan_video"
    title = "HunyuanVideo"
    adapters = HunyuanVideoAdapterOptions
    pictures = HunyuanVideoClipOptions
    models = HunyuanVideoModelOptions
    compilation = OldCompileOptions
    request_class = HunyuanVideoRequest
    groups = GROUPS
    line_options = LINE_OPTIONS
    vae_kinds = frozenset({"vae_hunyuan_video"})
    texts = {"flow-shift": "flow_shift", "guidance": "embedded_guidance_scale", "prompt_2": "prompt_2"}

    def frequencies_of_time(self, config: Config) -> int | None:
        try:
            return self._params(config).rope_dim_list[0] // 2 if config[self.models].dit else None
        except (AtelierError, OSError):
            return None  # `check` tells of the file

    def slots(self, config: Config) -> list[tuple[str, set[str]]]:
        return [("dit", {"hunyuan_video"}), *self.encoder_slots]

    def strategies(self, config: Config) -> StrategySet:
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS
        from library.strategy_hunyuan_video import HunyuanVideoTextEncodingStrategy, HunyuanVideoTokenizeStrategy

        tokenize = HunyuanVideoTokenizeStrategy(*self.tokenizer_files(config))
        options = config[self.models]
        encode = HunyuanVideoTextEncodingStrategy(options.hidden_layer, options.apply_final_norm)
        return StrategySet(tokenize, encode, text_layout=TEXT_LAYOUTS[self.family])

    def load_denoiser(
        self, config: Config, dtype: torch.dtype | None, device: torch.device, transform: Transform | None
    ) -> nn.Module:
        from library.hunyuan_video_utils import load_hunyuan_video

        options = config[self.models]
        denoiser = load_hunyuan_video(
            options.dit, dtype, device, self.disable_mmap(config), form=options.form, by_rows=options.multiplies_fp8,
            transform=transform,
        )  # fmt: skip
        denoiser.embedders_wait = options.img_in_txt_in_offloading
        return denoiser

    def save_denoiser(self, denoiser: Any, target: str, dtype: torch.dtype | None) -> None:
        from library.hunyuan_video_utils import save_hunyuan_video

        save_hunyuan_video(denoiser, target, dtype)

    def pipeline(self, config: Config, denoiser: Any, vae: Any) -> VideoPipeline:
        from library.generation.hunyuan_video_pipeline import HunyuanVideoPipeline

        return HunyuanVideoPipeline(denoiser, vae, split_uncond=config[self.pictures].split_uncond)

    def fitting_problems(self, config: Config) -> list[str]:
        from library.hunyuan_video_utils import fitting_problems

        options = config[self.models]
        found = fitting_problems(
            lambda: self._params(config), **dict(zip(("text_encoder1", "text_encoder2"), self.encoder_files(config))),
            vae=options.vae, model=options.dit, in_channels=options.dit_in_channels,
            blocks_to_swap=options.blocks_to_swap,
        )  # fmt: skip
        if not found:
            from library.components.llm_encoder_utils import inspect_llama

            layers = inspect_llama(self.encoder_files(config)[0])["num_hidden_layers"]
            if options.hidden_state_skip_layer > layers:
                found.append(
                    f"--hidden_state_skip_layer is {options.hidden_state_skip_layer}; {options.text_encoder1} has {layers}"
                    " layers, at most as many can be left out"
                )
        return found + self.tokenizer_problems(config)

    def request_problems(self, config: Config, request: VideoRequest) -> list[str]:
        """A picture for a model that is shown none, and the other way round."""
        found = super().request_problems(config, request)
        if self.is_without_prompts(config):
            return found
        dit = config[self.models].dit
        try:
            shown = self._params(config).shown_channels if dit else None
        except (AtelierError, OSError):
            return found  # `check` tells of the file
        if shown and request.image_path is None:
            found.append(
                f"--image_path is not given, and {dit} is a model from image to video; needed: the first frame, or a"
                " model from text to video"
            )
        if shown == 0 and request.image_path is not None:
            found.append(
                f"--image_path is {request.image_path}, and {dit} is a model from text to video, which is shown no"
                " picture; needed: a model from image to video (32 input channels, as SkyReels V1 I2V)"
            )
        return found

    def _params(self, config: Config) -> HYVideoParams:
        from library.hunyuan_video_utils import inspect_hunyuan_video

        return inspect_hunyuan_video(config[self.models].dit).params

    def notices(self, config: Config) -> list[str]:
        found = super().notices(config)
        if config[self.models].apply_final_norm and config[self.models].hidden_layer == -1:
            found.append("--apply_final_norm has no effect: with --hidden_state_skip_layer 0 states have passed that norm")
        if config[self.pictures].disable_embedded_for_cfg:
            if not self._params(config).guidance_embed:
                found.append("--disable_embedded_for_cfg has no effect: only distilled models have embedded guidance")
            elif not self.base_request(config).is_guided and not config[SessionOptions].from_file:
                found.append("--disable_embedded_for_cfg has no effect: no step is guided by the negative prompt")
        if "embedded_cfg_scale" in config.explicit and not self._params(config).guidance_embed:
            found.append("--embedded_cfg_scale has no effect: only distilled models have embedded guidance")
        return found


SCRIPT = HunyuanVideoScript()
build_parser, main, run = SCRIPT.build_parser, SCRIPT.main, SCRIPT.run
