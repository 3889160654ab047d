"""Train a LoRA-type network for SDXL."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="sdxl", trainable="network")


if __name__ == "__main__":
    cli.main(family="sdxl", trainable="network")
