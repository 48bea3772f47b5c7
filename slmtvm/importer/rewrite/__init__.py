"""Graph to graph, before any length is known: what exporters write in many ways, in one."""
