"""Mixtures of experts, by operator or by what a graph computes."""
