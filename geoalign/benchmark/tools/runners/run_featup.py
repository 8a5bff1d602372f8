"""Features of every frame of a video by FeatUp over DINO, as the published Dyn-MEt3R takes them.

Options: ``device``, where auto takes CUDA if there is any. Files: ``features.npy`` ``[F, C, H, W]`` float16.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np


def load(options: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load the network once; it serves every case."""
    import torch
    from featup.util import norm

    device = options["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network = torch.hub.load("mhamilton723/FeatUp", "dino16", use_norm=True, trust_repo=True).eval().to(device)

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        import av

        target = os.path.join(request["folder"], "features.npy")
        store, count = None, request["frames"]
        with av.open(request["retake_video"]) as film, torch.no_grad(), torch.autocast(torch.device(device).type):
            for index, frame in enumerate(film.decode(video=0)):
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).to(device).permute(2, 0, 1)[None] / 255.0
                found = network(norm(pixels))[0].half().cpu().numpy()
                if store is None:
                    store = np.lib.format.open_memmap(target + ".part", "w+", np.float16, (count, *found.shape))
                store[index] = found  # an IndexError names a video that is too long
        if store is None or index + 1 != count:
            raise ValueError(f"{request['retake_video']} holds fewer than {count} frames")
        store.flush()
        os.replace(target + ".part", target)
        return {"frames": count}

    return measure
