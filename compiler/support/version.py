"""The version of foldcut."""

__version__ = "0.1.0"
