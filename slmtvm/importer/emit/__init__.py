"""Steps to the canonical model in Relax, and what to tell users of it."""
