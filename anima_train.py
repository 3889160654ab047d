"""Train a whole Anima denoiser."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="anima", trainable="full")


if __name__ == "__main__":
    cli.main(family="anima", trainable="full")
