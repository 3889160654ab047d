"""Making pictures: prompts, conditioning, sampling, pipelines and the image scripts."""
