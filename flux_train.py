"""Train a whole FLUX.1 denoiser."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="flux", trainable="full")


if __name__ == "__main__":
    cli.main(family="flux", trainable="full")
