"""What is done with whole adapters: merging, resizing, extraction."""
