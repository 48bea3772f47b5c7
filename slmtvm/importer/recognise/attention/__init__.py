"""Attention, from its softmax outwards, and what turns queries and keys."""
