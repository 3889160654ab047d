"""Train a LoRA-type network for Stable Diffusion 3 and 3.5."""

from library.core.lazy_names import homes, lazy_names
from library.training import cli

__getattr__, __dir__ = lazy_names(__name__, homes("library.compat.trainers", "Sd3NetworkTrainer"))


def setup_parser():
    return cli.build_parser(family="sd3", trainable="network")


if __name__ == "__main__":
    cli.main(family="sd3", trainable="network")
