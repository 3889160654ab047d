"""Teach FLUX.1 a new word (textual inversion)."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="flux", trainable="textual_inversion")


if __name__ == "__main__":
    cli.main(family="flux", trainable="textual_inversion")
