"""Train a ControlNet of Stable Diffusion 1 or 2."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="sd", trainable="control_net")


if __name__ == "__main__":
    cli.main(family="sd", trainable="control_net")
