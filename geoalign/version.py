"""The version of both packages; ``setup.py`` reads it here and nothing else states it."""

__version__ = "0.1.0"
