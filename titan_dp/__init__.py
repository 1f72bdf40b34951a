"""titan_dp: pretraining for DeltaProduct language models. Start reading at train/__main__.py."""

__version__ = "0.1.0"
