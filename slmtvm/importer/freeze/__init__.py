"""The graph for one sequence of fixed length: constants computed, all shapes known."""
