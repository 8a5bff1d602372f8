"""What frozen networks share: their pixels, graphs, arena of weights, precision."""
