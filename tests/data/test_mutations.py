from world.fuzz import mutations


def test_mutated_data_sets_are_read_or_refused_and_never_crash():
    outcomes = mutations.attempt(600)
    assert outcomes["read"] > 100  # many changes hurt nothing, so it is known that the originals are read
    assert outcomes["refused"] > 100
