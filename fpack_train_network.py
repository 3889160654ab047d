"""Train a LoRA-type network for FramePack."""

from library.core.lazy_names import homes, lazy_names
from library.training import cli

_HOMES = {
    "FramePackNetworkTrainer": "library.compat.trainers:FramepackNetworkTrainer",
    "main": "library.compat.video_names:fpack_main",
    **homes("library.compat.video_names", "fpack_setup_parser"),
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)


def setup_parser():
    return cli.build_parser(family="framepack", trainable="network")


if __name__ == "__main__":
    cli.main(family="framepack", trainable="network")
