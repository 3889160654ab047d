"""Train a LoRA-type network for Lumina-Image 2.0."""

from library.core.lazy_names import homes, lazy_names
from library.training import cli

__getattr__, __dir__ = lazy_names(__name__, homes("library.compat.trainers", "LuminaNetworkTrainer"))


def setup_parser():
    return cli.build_parser(family="lumina", trainable="network")


if __name__ == "__main__":
    cli.main(family="lumina", trainable="network")
