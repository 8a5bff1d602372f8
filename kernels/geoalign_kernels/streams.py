"""Every purpose that counter-based noise is drawn for, as the ``stream`` of a ``NoiseKey``: numbered once, here.

Two purposes with one number would draw the same values from equal ids. The numbers are frozen: one that changes makes
every seed mean another run. A new purpose takes the next one.
"""

SDE = 0
"""Noise of a stochastic sampler step."""
INITIAL_NOISE = 1
"""Latents at the start of a rollout or a sample."""
CLIP = 2
"""Choice of a source clip and of its window."""
PATH = 3
"""Choice of a target path and of its speeds."""
EVALUATION = 4
"""Latents at the start of a held-out evaluation."""
WINDOW = 5
"""Position of the stochastic window under the random schedule."""
SHUFFLE = 6
"""Permutation of the advantages of a group, the control that learns from shuffled rewards."""
SUBSET = 7
"""Choice of the window steps that an update learns from."""
