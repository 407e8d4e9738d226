"""Detectors: heads of transformers on an AIMV2 backbone."""
