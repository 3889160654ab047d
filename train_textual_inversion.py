"""Teach Stable Diffusion 1 and 2 a new word (textual inversion)."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="sd", trainable="textual_inversion")


if __name__ == "__main__":
    cli.main(family="sd", trainable="textual_inversion")
