"""AIMV2: multimodal autoregressive pre-training of vision encoders."""

__version__ = "0.1.0"
