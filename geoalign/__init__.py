"""geoalign: reinforcement learning of camera-controlled video with rewards in metres and degrees."""

__version__ = "0.1.0"
