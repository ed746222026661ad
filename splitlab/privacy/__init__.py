"""Events to ε, secret draws, DP-SGD in visible steps, and audits of it."""
