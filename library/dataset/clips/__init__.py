"""Clips: what a dataset says of videos, and what is made of them."""
