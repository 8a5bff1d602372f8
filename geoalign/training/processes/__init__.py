"""The processes of a run: ranks, their start by torchrun, the device of each."""
