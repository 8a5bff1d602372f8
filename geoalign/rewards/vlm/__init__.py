"""Perceptual rewards by frozen Qwen2-VL scorers (VideoAlign, HPSv3) on one static forward pass."""
