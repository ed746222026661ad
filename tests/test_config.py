import pytest

from splitlab.config import SCHEMES, AttackSpec, Defences, EvaluateConfig, TrainConfig, parse
from splitlab.errors import InputError


def test_parse_builds_nested_defences():
    built = parse(TrainConfig, {"steps": 7, "lr": 1, "defences": {"half": True, "fixed_noise": 2}}, where="train")
    assert built == TrainConfig(steps=7, lr=1.0, defences=Defences(half=True, fixed_noise=2.0))
    assert isinstance(built.lr, float)  # YAML's 1 is a learning rate of 1.0


def test_parse_builds_tuples_from_lists():
    assert parse(EvaluateConfig, {"buckets": [0, 500, 1000]}, where="evaluate").buckets == (0, 500, 1000)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"stepz": 3}, "train: unknown key stepz; known keys: dataset, scheme"),
        ({"defences": {"hlaf": True}}, r"train\.defences: unknown key hlaf; known keys: timestep_floor"),
        ({"steps": "many"}, r"train\.steps: expected int, got 'many'"),
        ({"steps": 1.5}, r"train\.steps: expected int, got 1\.5"),
        ({"steps": True}, r"train\.steps: expected int, got True"),
        ({"lr": "1e-3"}, r"train\.lr: expected float, got '1e-3'"),  # what YAML 1.1 makes of 1e-3
        ({"scheme": 3}, r"train\.scheme: expected str"),
        ({"defences": {"half": 1}}, r"train\.defences\.half: expected bool, got 1"),
        ({"defences": "none"}, r"train\.defences: expected keys and values, got 'none'"),
        ({"defences": None}, r"train\.defences: expected keys and values, got None"),
    ],
)
def test_parse_names_the_key_and_what_is_wrong(values: dict, says: str):
    with pytest.raises(InputError, match=says):
        parse(TrainConfig, values, where="train")


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        (AttackSpec, {"attack": "x", "ignore": "noise"}, r"where\.ignore: expected a list, got 'noise'"),
        (AttackSpec, {"attack": "x", "ignore": [1]}, r"where\.ignore\[0\]: expected str, got 1"),
        (AttackSpec, {"attack": "x", "options": [1]}, r"where\.options: expected keys and values, got \[1\]"),
        (AttackSpec, {"ignore": ["noise"]}, "where: key attack is missing"),
        (EvaluateConfig, {"buckets": [0, "200"]}, r"where\.buckets\[1\]: expected int, got '200'"),
    ],
)
def test_parse_checks_lists_mappings_and_missing_keys(kind: type, values: dict, says: str):
    with pytest.raises(InputError, match=says):
        parse(kind, values, where="where")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scheme": "splitt"}, "scheme 'splitt' is unknown; choose one of central, federated"),
        ({"scheme": "central", "defences": Defences(half=True)}, "'central' sends no activations.*: half;"),
        ({"scheme": "federated", "defences": Defences(timestep_floor=5)}, "'federated' sends no activations"),
        ({"scheme": "split_gradients", "defences": Defences(symsigmoid=True)}, "symsigmoid is for latent hints"),
        ({"scheme": "federated", "n_clients": 4, "local_steps": 5, "steps": 19}, "give a multiple of 20 steps"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"batch_size": -1}, "batch_size must be 1 or more, got -1"),
        ({"n_clients": 0}, "n_clients must be 1 or more"),
        ({"checkpoint_every": 0}, "checkpoint_every must be 1 or more"),
        ({"lr": 0.0}, "lr must be positive, got 0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
    ],
)
def test_contradictions_are_refused_at_construction(changes: dict, says: str):
    with pytest.raises(InputError, match=says):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"timestep_floor": -1}, "timestep_floor must be 0 or more, got -1"),
        ({"fixed_noise": -0.5}, "fixed_noise is a standard deviation .* got -0.5"),
        ({"fixed_noise": float("nan")}, "fixed_noise is a standard deviation"),
    ],
)
def test_defences_no_client_could_apply_are_refused(changes: dict, says: str):
    with pytest.raises(InputError, match=says):
        Defences(**changes)


def test_every_scheme_can_be_configured():
    for scheme in SCHEMES:
        assert TrainConfig(scheme=scheme).scheme == scheme


def test_defences_name_themselves():
    assert str(Defences()) == "none"
    everything = Defences(timestep_floor=600, symsigmoid=True, fixed_noise=0.3, half=True, hide_prompts=True)
    assert str(everything) == "timestep_floor=600 symsigmoid fixed_noise=0.3 half hide_prompts"


def test_attack_names_tell_ablations_apart():
    assert AttackSpec("inverse").name == "inverse"
    assert AttackSpec("inverse", ignore=("noise", "timesteps")).name == "inverse-without-noise-timesteps"
