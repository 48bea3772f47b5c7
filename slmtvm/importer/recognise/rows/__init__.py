"""What is done to each row alone: norms, single elements, features, rows of tables."""
