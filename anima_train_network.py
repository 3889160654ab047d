"""Train a LoRA-type network for Anima."""

from library.core.lazy_names import homes, lazy_names
from library.training import cli

__getattr__, __dir__ = lazy_names(__name__, homes("library.compat.trainers", "AnimaNetworkTrainer"))


def setup_parser():
    return cli.build_parser(family="anima", trainable="network")


if __name__ == "__main__":
    cli.main(family="anima", trainable="network")
