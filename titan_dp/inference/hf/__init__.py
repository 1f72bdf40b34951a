"""Hugging Face folders: written by `titan-dp export`, read by `titan-dp import` and wherever a trained model is loaded."""
