"""Train a ControlNet of FLUX.1."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="flux", trainable="control_net")


if __name__ == "__main__":
    cli.main(family="flux", trainable="control_net")
