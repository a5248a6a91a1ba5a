"""One classifier from many private ones."""

__version__ = "0.1.0"
