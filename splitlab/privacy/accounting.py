"""Accounting: ε as a pure function of a list of PrivacyEvents."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.special import log_ndtr

from splitlab.core.errors import InputError
from splitlab.core.seeds import PUBLISHED, SECRET

ACCOUNTANTS = ("prv", "rdp")

SIMULATED = "simulated: ε holds for the same run with secret draws"
"""What is said of an ε whose draws follow from a published key: whoever knows the key can take the noise off."""

SIMULATED_NOTE = (
    "A simulated ε holds for the same run with secret draws: here they follow from a published key, so that the run "
    "can be repeated."
)
"""The same, once below a table or a picture."""

ADJACENCIES = {"add_remove_one": 1.0, "replace_one": 2.0}
"""Neighbouring data sets -> sensitivity of a sum of vectors of norm 1 at most."""

PRECISION = 0.004
"""What the PRV accountant may overstate ε by, as a share of ε: half a per cent is below any other uncertainty."""

FINEST = 1e-4
"""The smallest error in ε that is asked of the PRV accountant: a finer grid over many steps outgrows memory."""

PRV_LIMIT = 100.0
"""Above this ε the PRV accountant's grid outgrows memory; the RDP bound, valid and loose by some 10 %, stands in."""

ORDERS = [1.01, 1.03, 1.06] + [1 + x / 10 for x in range(1, 100)] + [*range(11, 64)]
"""Rényi orders below 64, denser at the low end than Opacus' own, for large ε."""

HIGH_ORDERS = [64, 96, 128, 192, 256]
"""Rényi orders that small ε are best bounded at: without them RDP's conversion cannot go below about 0.1."""


@dataclass(frozen=True)
class PrivacyEvent:
    """One application of a randomised mechanism; ε is a pure function of a list of these.

    Attributes:
        mechanism: e.g. "gaussian".
        noise_multiplier: noise standard deviation over sensitivity.
        sample_rate: Poisson sampling rate in (0, 1]; 1 where nothing is sampled.
        steps: how often it was applied.
        adjacency: which neighbouring data sets the bound is for, e.g. "add_remove_one".
    """

    mechanism: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    adjacency: str


def epsilon(events: Sequence[PrivacyEvent], delta: float, *, accountant: str = "prv") -> float:
    """Return ε at δ of all events together; infinite where one has no noise, 0 where nothing was released.

    Gaussian mechanisms without sampling are exact: they compose to one of μ = sqrt(Σ 1/σ²) (Dong et al. 2022, Cor.
    3.3), whose ε is closed-form (`gdp_epsilon`). Poisson-sampled ones are composed numerically, as an upper bound: by
    privacy random variables (Gopi et al. 2021, through Opacus) or by Rényi divergences (Mironov et al. 2019).

    Args:
        events: mechanisms applied to the same data, one after another and each free to depend on those before.
        delta: δ in (0, 1).
        accountant: "prv" (tight within half a per cent, up to ε = 100) or "rdp".

    Raises:
        InputError: δ, an event or the accountant is not what it should be, or the events' adjacencies differ.
    """
    _check_delta(delta)
    if accountant not in ACCOUNTANTS:
        raise InputError(f"accountant must be one of {', '.join(ACCOUNTANTS)}, got {accountant!r}")
    for event in events:
        _check_event(event)
    if len({event.adjacency for event in events}) > 1:
        raise InputError("events of different adjacencies have no common ε; compute one per adjacency")
    active = [event for event in events if event.steps]
    if any(event.noise_multiplier == 0 for event in active):
        return math.inf
    sampled = [event for event in active if event.sample_rate < 1]
    mu = composed_mu([event for event in active if event.sample_rate == 1])
    if not sampled:
        return gdp_epsilon(mu, delta)
    history = [(event.noise_multiplier, event.sample_rate, event.steps) for event in sampled]
    if mu:
        history.append((1 / mu, 1.0, 1))
    return _sampled_epsilon(tuple(history), delta, accountant)


@cache
def _sampled_epsilon(history: tuple[tuple[float, float, int], ...], delta: float, accountant: str) -> float:
    """Compose sampled mechanisms, (σ, q, steps) each."""
    upper = _rdp(history, delta)
    return upper if accountant == "rdp" or upper > PRV_LIMIT else _prv(history, delta, upper)


def epsilon_entry(value: float | None, randomness: str) -> dict[str, Any]:
    """Return the entries that state an ε in a record: `epsilon`, or `epsilon_simulated` where draws are published.

    Args:
        value: ε; infinite or None where nothing is claimed, which no key changes.
        randomness: `splitlab.core.seeds.SECRET` or `PUBLISHED`: the kind of key that the draws which ε rests on follow
            from.
    """
    if value is None or math.isinf(value) or randomness == SECRET:
        return {"epsilon": value}
    return {"epsilon_simulated": value, "note": SIMULATED}


def recorded_epsilon(record: Mapping[str, Any]) -> float | None:
    """Return the ε that a record states, be it a simulation's; None where it claims nothing."""
    value: float | None = record["epsilon"] if "epsilon" in record else record["epsilon_simulated"]
    return value


def epsilon_words(value: float, randomness: str, *, digits: str = ".3g") -> str:
    """Say what ε is; "simulated" where it rests on draws that are not known to be secret. What that means: `SIMULATED`.

    Args:
        value: ε. Of 0 and of infinity, no draw decides.
        randomness: as for `epsilon_entry`.
        digits: format of a finite value.
    """
    if math.isinf(value):
        return "ε = ∞"
    words = f"ε = {value:{digits}}"
    return words if randomness == SECRET or value == 0 else f"simulated {words}"


def randomness_of(rows: pd.DataFrame) -> str:
    """Say what the ε of several rows of a result table rest on: "secret" only if all say so."""
    known = "randomness" in rows and len(rows) > 0 and bool(rows["randomness"].eq(SECRET).all())
    return SECRET if known else PUBLISHED


@cache
def noise_multiplier_for(
    target_epsilon: float, *, delta: float, sample_rate: float, steps: int, accountant: str = "prv"
) -> float:
    """Return the smallest noise multiplier, to a part in a thousand and never too small, whose ε is the target.

    Args:
        target_epsilon: ε > 0 of all steps together, add or remove one.
        delta: δ in (0, 1).
        sample_rate: Poisson sampling rate in (0, 1].
        steps: number of applications, 1 or more.
        accountant: as for `epsilon`.

    Raises:
        InputError: a value is outside its range, or the accountant cannot certify that target at these steps.
    """
    if not 0 < target_epsilon < math.inf:
        raise InputError(f"the target epsilon must be above 0 and finite, got {target_epsilon}; raise it")
    if steps < 1:
        raise InputError(f"steps must be 1 or more, got {steps}")
    if target_epsilon < FINEST and accountant == "prv" and sample_rate < 1:
        raise InputError(
            f"epsilon {target_epsilon:g} is unreachable by the prv accountant, which resolves no less than {FINEST:g}: "
            "raise epsilon"
        )
    event = PrivacyEvent("gaussian", 1.0, sample_rate, steps, "add_remove_one")

    def excess(log_sigma: float) -> float:
        spent = epsilon([replace(event, noise_multiplier=math.exp(log_sigma))], delta, accountant=accountant)
        return math.log(max(spent, 1e-12) / target_epsilon)

    double = math.log(2)
    high = double
    while excess(high) > 0:
        high += double
        if high > math.log(1e6):
            raise InputError(
                f"epsilon {target_epsilon:g} at delta {delta:g} is unreachable in {steps} steps at sample rate "
                f"{sample_rate:g} by the {accountant} accountant: raise epsilon, or take fewer steps"
            )
    low = high - double
    while excess(low) <= 0:
        low -= double
        if low < math.log(1e-3):
            return math.exp(low)
    sigma = float(brentq(excess, low, high, xtol=5e-4))
    while excess(sigma) > 0:  # the root finder may end on either side
        sigma += 5e-4
    return math.exp(sigma)


def composed_mu(events: Sequence[PrivacyEvent]) -> float:
    """Return μ = sqrt(Σ steps / σ²) of Gaussian mechanisms without sampling (Dong et al. 2022, Cor. 3.3); exact.

    Raises:
        InputError: an event is sampled: that is no Gaussian mechanism any more, and has no μ.
    """
    for event in events:
        _check_event(event)
        if event.sample_rate < 1:
            raise InputError(f"a mechanism sampled at rate {event.sample_rate:g} has no μ; compute its ε instead")
    if any(event.steps and event.noise_multiplier == 0 for event in events):
        return math.inf
    return math.sqrt(sum(event.steps / event.noise_multiplier**2 for event in events if event.steps))


def gdp_delta(mu: float, epsilon: float) -> float:
    """Return δ(ε) = Φ(-ε/μ + μ/2) - e^ε Φ(-ε/μ - μ/2) of μ-GDP (Balle & Wang 2018, Thm 8; Dong 2022, Cor. 2.13).

    Raises:
        InputError: μ or ε is negative or not a number.
    """
    if not mu >= 0 or not epsilon >= 0:
        raise InputError(f"μ and epsilon must be 0 or more, got {mu} and {epsilon}")
    if mu == 0 or epsilon == math.inf:
        return 0.0
    if mu == math.inf:
        return 1.0
    first = math.exp(log_ndtr(-epsilon / mu + mu / 2))
    return max(first - math.exp(epsilon + log_ndtr(-epsilon / mu - mu / 2)), 0.0)


def gdp_epsilon(mu: float, delta: float) -> float:
    """Return the exact ε at δ of a μ-GDP mechanism: `gdp_delta` solved for ε; infinite for infinite μ.

    Raises:
        InputError: μ is negative, or δ is outside (0, 1).
    """
    _check_delta(delta)
    if gdp_delta(mu, 0.0) <= delta:
        return 0.0
    if mu == math.inf:
        return math.inf
    top = mu * (mu / 2 + math.sqrt(2 * math.log(1 / delta)))  # the first term alone is below δ here (Chernoff)
    return float(brentq(lambda at: gdp_delta(mu, at) - delta, 0.0, top, xtol=1e-12, rtol=1e-12))


def _rdp(history: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Return the best ε over Rényi orders; high orders, slow to compute, only where the others are not enough."""
    accountant = RDPAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the best order is the first or the last one tried
        found = float(accountant.get_epsilon(delta, alphas=ORDERS))
        if found < 1:
            found = min(found, float(accountant.get_epsilon(delta, alphas=HIGH_ORDERS)))
    return found


def _prv(history: Sequence[tuple[float, float, int]], delta: float, upper: float) -> float:
    """Return the PRV accountant's upper bound; its grid is refined until the error allowed is small against ε."""
    accountant = PRVAccountant()
    accountant.history = list(history)
    error = max(upper * PRECISION, FINEST)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # as in `_rdp`, which sizes the grid
        while True:
            try:
                found = float(accountant.get_epsilon(delta, eps_error=error))
            except (RuntimeError, ValueError):  # the grid is too coarse or δ too small for double precision
                return upper
            found = min(max(found, 0.0), upper)
            if error <= max(2 * PRECISION * found, FINEST):
                return found
            error = max(found * PRECISION, error / 8, FINEST)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise InputError(f"delta must lie strictly between 0 and 1, got {delta}; take less than 1 / number of images")


def _check_event(event: PrivacyEvent) -> None:
    if event.mechanism != "gaussian":
        raise InputError(f"no accounting for the mechanism {event.mechanism!r}; the one known is 'gaussian'")
    if event.adjacency not in ADJACENCIES:
        raise InputError(f"adjacency must be one of {', '.join(ADJACENCIES)}, got {event.adjacency!r}")
    if not event.noise_multiplier >= 0:
        raise InputError(f"a noise multiplier must be 0 or more, got {event.noise_multiplier}")
    if not 0 < event.sample_rate <= 1:
        raise InputError(f"a sample rate must lie in (0, 1], got {event.sample_rate}")
    if event.steps < 0:
        raise InputError(f"steps must be 0 or more, got {event.steps}")
    if event.sample_rate < 1 and event.adjacency != "add_remove_one":
        raise InputError(f"Poisson sampling is accounted for add_remove_one only, got {event.adjacency!r}")
