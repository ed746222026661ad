"""Differentially private fine-tuning of the latent diffusion base (DP-LDM, Liu, Lyu et al. 2024, arXiv 2305.15759)."""
