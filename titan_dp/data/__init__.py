"""From text to batches: tokenizer -> prepare -> shards -> order -> loader. Read in this order."""
