"""S2, gradient inversion of federated diffusion models (Huang et al. 2024): update, client, defences, attacks."""
