"""`titan-dp data inspect`: what is in token shards, before a run of weeks reads them.

measure.py counts, text.py makes ids readable, batch.py asks the trainer's own loader for a batch, report.py is all of it as
data, and command.py shows that. Nothing here writes into a folder of shards.
"""
