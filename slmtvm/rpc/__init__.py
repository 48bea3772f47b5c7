"""Measuring on devices: a runner for the board, a tracker, TLS around them, the tuner's side."""
