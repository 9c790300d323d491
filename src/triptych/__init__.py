"""Triptych: pre-train vision encoders on your own images, and see how good they are."""

__version__ = "0.1.0"
