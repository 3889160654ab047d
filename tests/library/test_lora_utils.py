"""Merging while a file is read: the same numbers as merging into the loaded model, for every layout of the file."""

import pytest
import torch
from tests.tiny import build_tiny_flux
from tests.tiny_anima import build_tiny_anima
from tests.tiny_sd import build_tiny_sd
