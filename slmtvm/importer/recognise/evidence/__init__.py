"""What can be known of a part of a graph: by computing it, by its bounds, by its pieces."""
