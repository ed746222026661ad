"""Attacks on fine-tuned models: membership and canaries."""
