"""Search for Efficient Large Language Models (NeurIPS 2024) on the Llama of model.py: README.md."""
