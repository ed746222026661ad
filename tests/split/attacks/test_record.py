"""What attacks say of themselves: every option has words and a range, and what lies outside is refused once for all."""

import inspect
import math

import pytest

from splitlab.core.errors import InputError
from splitlab.split.attacks import ATTACKS
from splitlab.split.attacks.record import Option, Parameter

COMMON = ("observations", "knowledge", "generator", "callback")
OPTIONS = [(name, option) for name, record in ATTACKS.items() for option in record.options]


def refusal(attack: str, option: str, value: object) -> str:
    with pytest.raises(InputError) as error:
        ATTACKS[attack].check({option: value})
    return str(error.value)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_keyword_is_an_option_with_words(name: str) -> None:
    keywords = [p for p in inspect.signature(ATTACKS[name].function).parameters if p not in COMMON]
    assert list(ATTACKS[name].options) == keywords
    assert all(parameter.option.words for parameter in ATTACKS[name].options.values())


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_defaults_are_good_and_nonsense_is_not(name: str, option: str) -> None:
    parameter = ATTACKS[name].options[option]
    parameter.check(name, option, parameter.default)
    for nonsense in ([], "dreams", math.nan, math.inf):
        assert refusal(name, option, nonsense).startswith(f"{name}: {option} ")


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_what_is_out_of_range_is_refused_with_the_range(name: str, option: str) -> None:
    declared = ATTACKS[name].options[option].option
    outside = [declared.least - 1, declared.above, declared.most + 1]
    for value in (v for v in outside if math.isfinite(v)):
        whole = int(value) if int in ATTACKS[name].options[option].types else value
        assert f"{name}: {option} must be {declared.range}, got {whole!r}" in refusal(name, option, whole)


def test_numbers_and_truths_are_not_mixed_up() -> None:
    count, share, flag = (Parameter(Option("x"), (kind,), None) for kind in (int, float, bool))
    share.check("a", "b", 1)
    for parameter, value in ((count, True), (share, True), (count, 1.5), (flag, 1)):
        with pytest.raises(InputError, match="a: b must be"):
            parameter.check("a", "b", value)


def test_options_that_an_attack_does_not_take_are_named() -> None:
    for name in ("stepz", "generator", "callback"):
        assert refusal("one_step", name, 1) == f"attack one_step has no option {name!r}; it takes batch"
    assert refusal("mean_public", "steps", 1).endswith("it takes none")
