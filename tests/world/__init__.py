"""What tests stand on, and nothing else does: tiny models and data, whole projects, shipped messages, other code bases.

Tests import from here and from the package, never from other tests; fixtures that several folders use are in conftest.
"""
