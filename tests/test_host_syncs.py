"""What makes the host wait is found, with the line that asked for it; what does not is not."""

import pytest
import torch
import torch.nn.functional as F

from triptych.health import feature_health
from triptych.syncs import host_syncs

x = torch.arange(12.0).reshape(3, 4)  # existed before: on the device
WAITS = {
    "a number is read": (lambda: x.sum().item(), "_local_scalar_dense"),
    "a branch": (lambda: 1 if x.sum() > 0 else 0, "_local_scalar_dense"),
    "a number of what has the device": (lambda: torch.ones(2, device=x.device).sum().item(), "_local_scalar_dense"),
    "to a list": (lambda: x.tolist(), "copy to the host"),
    "to numpy": (lambda: x.numpy(), "copy to the host"),
    "to the host": (lambda: x.to("cpu"), "copy to the host"),
    "where": (lambda: torch.where(x > 0), "nonzero"),
    "a mask": (lambda: x[x > 0], "index by a mask"),
    "masked select": (lambda: x.masked_select(x > 0), "masked_select"),
    "unique": (lambda: x.unique(), "_unique2"),
    "equal": (lambda: torch.equal(x, x), "equal"),
    "counts": (lambda: torch.bincount(x[0].long()), "bincount"),
    "repeats": (lambda: x.repeat_interleave(x[:, 0].long(), 0), "repeat_interleave"),
    "a list as index": (lambda: x[[0, 1]], "index by indices of the host"),
    "host indices": (lambda: x[torch.tensor([0, 1])], "index by indices of the host"),
    "numbers of Python": (lambda: torch.tensor([1.0, 2.0], device=x.device), "copy to the device"),
    "made on the host": (lambda: torch.linspace(0, 1, 3).to(x.device), "copy to the device"),
    "copied over": (lambda: x.copy_(torch.zeros(3, 4)), "copy to the device"),
    "classes that are not given": (lambda: F.one_hot(x[0].long()), "_local_scalar_dense"),
}
DOES_NOT_WAIT = {
    "made on the device": lambda: x + torch.arange(4, device=x.device),
    "a number of the host": lambda: torch.ones(2).sum().item(),
    "host scalars": lambda: x * torch.tensor(2.0),
    "moved where it is": lambda: x.to(x.device),
    "another type": lambda: x.to(torch.float64),
    "not awaited": lambda: torch.ones(2).to(x.device, non_blocking=True),
    "indices of the device": lambda: x[torch.arange(2, device=x.device)],
    "slices": lambda: x[:, None, 1:],
    "a filled mask": lambda: x.masked_fill(x > 0, 0),
    "a choice": lambda: torch.where(x > 0, x, 0),
    "classes that are given": lambda: F.one_hot(x[0].long(), 5),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_named(name):
    run, operation = WAITS[name]
    found = host_syncs(run)
    assert {s.operation for s in found} == {operation}
    assert all(__file__ in s.where for s in found)


@pytest.mark.parametrize("name", DOES_NOT_WAIT)
def test_what_does_not_wait_is_not_named(name):
    assert host_syncs(DOES_NOT_WAIT[name]) == []


def test_the_line_is_triptychs_and_a_gradient_has_that_of_its_forward_pass():
    found = host_syncs(lambda: feature_health(x))
    assert found
    assert all(s.where.startswith("health.py:") and s.where.endswith("feature_health") for s in found)
    w = x.clone().requires_grad_()

    def picks():
        return w[w > 3].sum()

    forward, backward = host_syncs(lambda: picks().backward())
    assert (forward.operation, forward.backward) == ("index by a mask", False)
    assert (backward.operation, backward.backward) == ("index_put by a mask", True)
    assert forward.where.split()[0] == backward.where.split()[0]
    assert forward.where.endswith("picks")


def test_what_only_the_first_call_does_does_not_count():
    made = []

    def step():
        if not made:
            made.append(x.sum().item())

    assert host_syncs(step) == []
