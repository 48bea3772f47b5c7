"""Tuning: which knobs make each kernel of a model fastest on a device, measured there."""
