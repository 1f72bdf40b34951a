"""The models the trainer trains; `build_model` is the entry point."""

from titan_dp.model.transformer import Transformer, build_model

__all__ = ["Transformer", "build_model"]
