"""gen_img.py: prompts to batches of pictures of Stable Diffusion and SDXL, with networks, sources, masks and two
stages."""
