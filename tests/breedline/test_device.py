import json
import random
from contextlib import suppress

import numpy as np
import pytest
import torch

from breedline.device import autocast, choose_kernels, leave_autocast, machine, pick_precision, set_seed

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("wanted", "device", "has", "picked"),
    [
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp16"),
        ("fp32", "cuda", True, "fp32"),
        ("auto", "cpu", True, "bf16"),
        ("auto", "cpu", False, "fp32"),
        ("bf16", "cpu", False, "bf16"),
        ("fp16", "cpu", True, "bf16"),
        ("fp16", "cpu", False, "fp32"),
        ("bf16", "mps", True, "fp32"),
    ],
)
def test_the_precision_is_one_that_the_device_computes_in(
    monkeypatch: pytest.MonkeyPatch, wanted: str, device: str, has: bool, picked: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has, "avx2": True})
    assert pick_precision(wanted, torch.device(device)) == picked


def test_another_number_of_threads_is_another_machine() -> None:
    threads = torch.get_num_threads()
    records = []
    for number in (1, 2):
        torch.set_num_threads(number)
        records.append(machine(torch.device("cpu"), "fp32"))
    torch.set_num_threads(threads)
    assert records[1] == records[0] | {"threads": 2}
    json.dumps(records)


def test_an_error_between_two_callbacks_leaves_no_autocast() -> None:
    context = autocast(CPU, "bf16")
    context.__enter__()  # type: ignore[no-untyped-call]
    with suppress(RuntimeError):
        raise RuntimeError
    assert torch.is_autocast_enabled("cpu")
    leave_autocast(CPU)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_computes_in_the_precision(precision: str, dtype: torch.dtype) -> None:
    with autocast(CPU, precision):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype


def test_a_seed_decides_every_random_number() -> None:
    draws = []
    for seed in (2**63 - 1, 2**63 - 1, 7):
        set_seed(seed)
        draws.append([random.random(), np.random.rand(), torch.rand(1).item()])  # noqa: S311 - nothing secret
    assert draws[0] == draws[1]
    assert not set(draws[0]) & set(draws[2])


@pytest.mark.parametrize("deterministic", [True, False])
def test_kernels_are_deterministic_if_they_are_to_be(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", not deterministic)
    choose_kernels(CPU, deterministic)
    assert torch.backends.cudnn.deterministic is deterministic
