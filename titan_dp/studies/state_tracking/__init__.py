"""State tracking: the theory of DeltaProduct as constructed models, and word problems and formal languages to train on."""
