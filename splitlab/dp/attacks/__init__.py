"""Attacks on fine-tuned models."""
