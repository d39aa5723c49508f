"""Numbers of few bits: formats, scales and zero points, observers, learned steps; tensors in, tensors out."""
