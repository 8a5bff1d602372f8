"""Cameras of a video: what reads them, for rewards, ``prepare``, ``sample`` and the evaluation alike."""
