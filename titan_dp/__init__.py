"""titan_dp: pretraining for DeltaProduct language models. Start reading at train/start.py."""

__version__ = "0.1.0"
