"""A family of videos in miniature, planted from outside: a linear VAE with a temporal stride, a tiny DiT, one text
encoder, and the latents of the first frame as a condition."""
