"""The models the trainer trains: `titan_dp.model.transformer.build_model` is the entry point. Sizes need no torch: size.py."""
