"""Products with constants: their weights in every format, and convolutions of channels."""
