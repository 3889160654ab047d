"""Train a whole Lumina-Image 2.0 denoiser."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="lumina", trainable="full")


if __name__ == "__main__":
    cli.main(family="lumina", trainable="full")
