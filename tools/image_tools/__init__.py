"""The inside of the tools for images."""
