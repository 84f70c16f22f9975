"""Flextron (ICML 2024): routers in front of every layer of model.py's Llama. See README.md here."""
