"""Ahead-of-time checks of the kernels, without a GPU: the command (`check`), what it compiles (`configs`), a table."""
