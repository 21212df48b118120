"""Diffusion-DPO for masked diffusion language models. Importing this package is cheap: no torch, no deepspeed."""

__version__ = "0.1.0"
