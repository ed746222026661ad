import pytest

from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.split.config import SCHEMES, AttackSpec, Defences, TrainConfig
from splitlab.study.config import EvaluateConfig


def test_parse_builds_nested_defences():
    built = parse(TrainConfig, {"steps": 7, "lr": 1, "defences": {"half": True, "fixed_noise": 2}}, where="train")
    assert built == TrainConfig(steps=7, lr=1.0, defences=Defences(half=True, fixed_noise=2.0))
    assert isinstance(built.lr, float)  # YAML's 1 is a learning rate of 1.0


@pytest.mark.parametrize(("lr", "steps"), [(1e-4, 1e3), ("1e-4", "1e3"), ("0.0001", "1000"), ("+1E-04", 1000.0)])
def test_numbers_are_read_as_yaml_1_2_writes_them_whoever_read_the_file(lr: object, steps: object):
    built = parse(TrainConfig, {"lr": lr, "steps": steps}, where="runs.mine")
    assert (built.lr, built.steps) == (0.0001, 1000)
    assert isinstance(built.steps, int)


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
        ({"lr": "fast"}, r"train\.lr: expected float, got 'fast'; write a number such as 0\.0001 or 1e-4"),
        ({"lr": "inf"}, r"train\.lr: expected float, got 'inf'; write \.inf for infinity"),
        ({"lr": "1e400"}, r"train\.lr: expected float, got '1e400'"),
        ({"lr": "1_0"}, r"train\.lr: expected float, got '1_0'"),
        ({"lr": float("nan")}, r"train\.lr: expected float, got nan"),
        ({"lr": 10**400}, r"train\.lr: expected float, got 10{400}"),
        ({"lr": True}, r"train\.lr: expected float, got True"),
        ({"lr": None}, r"train\.lr: expected float, got None; leave the key out for its default"),
        ({"steps": "1e-3"}, r"train\.steps: expected int, got '1e-3'"),
        ({"steps": float("inf")}, r"train\.steps: expected int, got inf"),
        ({"steps": 2**63}, r"train\.steps: expected int"),
        ({"steps": "9" * 5000}, r"train\.steps: expected int"),
        ({"scheme": None}, r'train\.scheme: expected str, got None; leave the key out, or write "" for nothing'),
        ({"defences": {"half": "yes"}}, r"train\.defences\.half: expected bool, got 'yes'; write true or false"),
        ({1: 2, "stepz": 3}, "train: unknown key 1, stepz"),
        ({"scheme": 3}, r"train\.scheme: expected str, got 3; put it in quotes"),
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
        (EvaluateConfig, {"buckets": [0, "2x"]}, r"where\.buckets\[1\]: expected int, got '2x'"),
        (AttackSpec, {"attack": "x", "options": {1: 2}}, r"where\.options: the key 1 is no text; put it in quotes"),
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
        ({"steps": 5, "record_from": 5}, "record_from 5 leaves no message of 5 steps: lower it"),
        ({"scheme": "federated", "defences": Defences(timestep_floor=5)}, "'federated' sends no activations"),
        ({"scheme": "split_gradients", "defences": Defences(symsigmoid=True)}, "symsigmoid is for latent hints"),
        ({"scheme": "federated", "n_clients": 4, "local_steps": 5, "steps": 19}, "give a multiple of 20 steps"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"batch_size": -1}, "batch_size must be 1 or more, got -1"),
        ({"n_clients": 0}, "n_clients must be 1 or more"),
        ({"checkpoint_every": 0}, "checkpoint_every must be 1 or more"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0"),
        ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
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
    assert AttackSpec("inverse").adversary.name == "inverse"
    assert AttackSpec("inverse", ignore=("noise", "timesteps")).adversary.name == "inverse-without-noise-timesteps"
