"""Files as the project reads and writes them: bounded parsers, whole-or-absent writing, locks, sealed tensors."""
