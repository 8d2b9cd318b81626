"""PoLar's own predictor, a baseline: labels, network, decoding, training."""
