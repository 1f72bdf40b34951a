"""A run: its life, its steps, its tasks, and what is written of it."""
