"""Train a whole SDXL model."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="sdxl", trainable="full")


if __name__ == "__main__":
    cli.main(family="sdxl", trainable="full")
