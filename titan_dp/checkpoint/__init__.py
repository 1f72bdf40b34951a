"""What is saved, when it counts, and what may change before it is resumed."""
