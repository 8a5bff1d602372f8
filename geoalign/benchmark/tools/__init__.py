"""Programs of others that measure videos, each a file worker in a Python environment of its own."""
