"""Plug hardware optimizations into the PyTorch trainer that you already have, and prove that they ran."""

__version__ = "0.1.0"
