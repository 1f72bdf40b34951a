"""What goes wrong around a run: signals, hangs, slow ranks, ranks that disagree."""
