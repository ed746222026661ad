"""Calls in parallel: in order, one thread each; errors come through, and base models arrive as they are."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splitlab.core.errors import InputError
from splitlab.core.parallel import n_workers, parallel
from splitlab.diffusion.base import Base, load_base


def where(number: int) -> tuple[int, int, int]:
    time.sleep(0.2 if number == 0 else 0.0)  # the first ends last
    return number, os.getpid(), torch.get_num_threads()


def refuse(number: int) -> int:
    if number == 1:
        raise InputError("call 1 cannot be: give another")
    return number


def test_results_come_in_order_from_other_processes_of_one_thread() -> None:
    found = list(parallel(where, [(n,) for n in range(6)], desc="test", workers=2))
    assert [number for number, _, _ in found] == list(range(6))
    assert os.getpid() not in {process for _, process, _ in found}
    assert {threads for _, _, threads in found} == {1}


def test_one_worker_is_this_process_with_its_threads() -> None:
    found = list(parallel(where, [(n,) for n in range(3)], desc="test"))
    assert found == [(n, os.getpid(), torch.get_num_threads()) for n in range(3)]


def words(base: Base, ids: list[int]) -> tuple[str, int]:
    return base.tokenizer.decode(ids, skip_special_tokens=True), id(base)


def test_a_base_model_is_the_same_over_there_to_its_tokenizer_and_loaded_once(base_path: Path) -> None:
    base = load_base(base_path)
    ids = base.tokenizer("a red circle").input_ids
    here = base.tokenizer.decode(ids, skip_special_tokens=True)
    found = list(parallel(words, [(base, ids)] * 6, desc="test", workers=2))
    assert {said for said, _ in found} == {here}
    assert len({where for _, where in found}) <= 2


def test_a_base_model_that_changed_is_refused(base_path: Path) -> None:
    other = replace(load_base(base_path), digest="of other weights")
    with pytest.raises(InputError, match="it changed after it was loaded"):
        list(parallel(words, [(other, [1])], desc="test", workers=2))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_through_as_it_was_raised(workers: int) -> None:
    with pytest.raises(InputError, match="call 1 cannot be: give another"):
        list(parallel(refuse, [(n,) for n in range(3)], desc="test", workers=workers))


def test_there_is_always_a_worker_and_never_more_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= n_workers() <= (os.cpu_count() or 1)
    monkeypatch.setattr("splitlab.core.parallel.MEMORY_PER_PROCESS", 1 << 60)
    assert n_workers() == 1
