"""Activations that a file rounds, and what it computes on the integers."""
