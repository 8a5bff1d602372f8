"""The fused ops inside networks of other projects: ``accelerate`` switches them on, its ``Handle`` off again.

``handle.py`` finds the network and patches it, ``diffusers_wan.py`` and ``diffsynth_wan.py`` know its blocks,
``parts.py`` holds what both share. Nothing here imports the other projects: their networks are known by their parts.
"""

from geoalign_kernels.dropin.handle import Handle, UnknownNetwork, accelerate

__all__ = ["Handle", "UnknownNetwork", "accelerate"]
