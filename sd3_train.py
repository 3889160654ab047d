"""Train a whole Stable Diffusion 3 model."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="sd3", trainable="full")


if __name__ == "__main__":
    cli.main(family="sd3", trainable="full")
