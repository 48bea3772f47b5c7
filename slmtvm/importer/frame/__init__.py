"""The graph at two lengths, and how its values lie in rows of tokens."""
