"""S1, split learning without returned gradients (Yao 2024): messages, client, server, schemes, defences, attacks."""
