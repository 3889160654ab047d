"""Teach Stable Diffusion 3 a new word (textual inversion)."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="sd3", trainable="textual_inversion")


if __name__ == "__main__":
    cli.main(family="sd3", trainable="textual_inversion")
