"""Train a LoRA-type network for HunyuanImage 2.1."""

from library.core.lazy_names import homes, lazy_names
from library.training import cli

__getattr__, __dir__ = lazy_names(__name__, {
    **homes("library.compat.trainers", "HunyuanImageNetworkTrainer"),
    **homes("library.compat.hunyuan_image_names", "sample_images"),
})


def setup_parser():
    return cli.build_parser(family="hunyuan_image", trainable="network")


if __name__ == "__main__":
    cli.main(family="hunyuan_image", trainable="network")
