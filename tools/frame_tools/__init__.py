"""Tools for frames: pictures and videos one frame after the other, and what made files tell."""
