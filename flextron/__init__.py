"""Flextron (ICML 2024), on the Llama of model.py. See README.md."""
