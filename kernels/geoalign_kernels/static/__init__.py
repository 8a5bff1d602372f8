"""Ahead-of-time checks of the kernels without a GPU: command (``check``), what it compiles (``configs``), a table."""
