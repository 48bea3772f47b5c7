"""Recognisers: each says what a value of the graph is, as a step over other values."""
