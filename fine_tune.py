"""Train a whole Stable Diffusion 1 or 2 model on images with a metadata file."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="sd", trainable="full")


if __name__ == "__main__":
    cli.main(family="sd", trainable="full")
