"""Several models compiled for several targets: read from a file, computed by many, told in one."""
