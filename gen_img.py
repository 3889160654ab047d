"""Make images with Stable Diffusion 1, 2 and SDXL, with and without networks."""

from library.generation.gen_img import script


def setup_parser():
    return script.build_parser()


if __name__ == "__main__":
    script.main()
