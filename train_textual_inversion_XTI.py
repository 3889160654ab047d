"""Teach Stable Diffusion 1 and 2 a new word with vectors of its own for each layer with cross-attention (XTI)."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="sd", trainable="textual_inversion_xti")


if __name__ == "__main__":
    cli.main(family="sd", trainable="textual_inversion_xti")
