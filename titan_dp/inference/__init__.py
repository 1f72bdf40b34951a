"""Trained models in use: loaded, sampled from, and exchanged with Hugging Face folders."""
