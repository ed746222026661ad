"""Split training between machines: clients publish their messages to a durable stream, the server trains on it."""
