"""Train a LoRA-type network for HunyuanVideo."""

from library.core.lazy_names import homes, lazy_names
from library.training import cli

_HOMES = {
    **homes("library.compat.trainers", "HunyuanVideoNetworkTrainer"),
    "NetworkTrainer": "library.compat.trainers:HunyuanVideoNetworkTrainer",
    "DiTOutput": "library.training.run:DiTOutput",
    "main": "library.compat.video_names:hv_main",
    **homes(
        "library.compat.video_names", "SS_METADATA_KEY_BASE_MODEL_VERSION", "SS_METADATA_KEY_NETWORK_ALPHA",
        "SS_METADATA_KEY_NETWORK_ARGS", "SS_METADATA_KEY_NETWORK_DIM", "SS_METADATA_KEY_NETWORK_MODULE",
        "SS_METADATA_MINIMUM_KEYS", "collator_class", "compute_density_for_timestep_sampling",
        "compute_loss_weighting_for_sd3", "get_sigmas", "hv_setup_parser", "line_to_prompt_dict", "load_prompts",
        "setup_parser_common", "should_sample_images",
    ),
    "clean_memory_on_device": "library.device_utils:clean_memory_on_device",
    "prepare_accelerator": "library.compat.accelerator:prepare_accelerator",
    "read_config_from_file": "library.compat.arguments:read_config_from_file",
    "set_seed": "accelerate.utils:set_seed",
}  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__, _HOMES)


def setup_parser():
    return cli.build_parser(family="hunyuan_video", trainable="network")


if __name__ == "__main__":
    cli.main(family="hunyuan_video", trainable="network")
