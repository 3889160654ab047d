"""Train a LoRA-type network for Wan 2.1 or 2.2."""

from library.core.lazy_names import homes, lazy_names
from library.training import cli

_HOMES = {
    **homes("library.compat.trainers", "WanNetworkTrainer"),
    **homes("library.compat.video_names", "wan_setup_parser"),
    "main": "library.compat.video_names:wan_main",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)


def setup_parser():
    return cli.build_parser(family="wan", trainable="network")


if __name__ == "__main__":
    cli.main(family="wan", trainable="network")
