"""Train a ControlNet of SDXL."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="sdxl", trainable="control_net")


if __name__ == "__main__":
    cli.main(family="sdxl", trainable="control_net")
