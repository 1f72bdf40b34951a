"""What a run needs and how fast it should be, without its GPUs: `titan-dp estimate`, and the memory lines of `--dry-run`."""
