"""Parameter-matched scaling studies: match shapes, sweep over them, launch the runs, report what they found."""
