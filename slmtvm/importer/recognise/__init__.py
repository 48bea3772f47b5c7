"""What the values of the frozen graph are: steps over rows, from the outputs backwards."""
