"""The command line: one module a verb. Nothing imports these but ``main``."""
