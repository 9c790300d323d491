"""SimCLR: the equations as loops, and the numbers of the authors' code (google-research/simclr, TensorFlow 2)."""

import pytest
import torch
from toy import ToyEncoder

from conftest import random_views, tiny_encoder
from triptych.methods import SimCLRConfig, build
from triptych.methods.simclr import SimCLR
from triptych.schedules import Progress
from triptych.tokens import TokenSpec

SMALL = SimCLRConfig(hidden=16, embedding=6)


@pytest.mark.parametrize("layers", [2, 3])
def test_the_loss_is_equation_1_written_as_loops(layers):
    torch.manual_seed(0)
    method, views = (
        build(tiny_encoder(TokenSpec()), SMALL.model_copy(update={"layers": layers})).double(),
        random_views(3),
    )
    with torch.no_grad():
        tokens = torch.cat([method.student.encoder(v.images).cls for v in views.global_crops])
        z = method.student.projector(tokens).view(2, 3, 6)  # BatchNorm's batch: both views of all images
    u, loss = z / z.norm(dim=-1, keepdim=True), 0.0
    for a, b in ((0, 1), (1, 0)):
        for i in range(3):
            others = sum(torch.exp(u[a][i] @ u[b][j] / 0.1) for j in range(3))
            others += sum(torch.exp(u[a][i] @ u[a][j] / 0.1) for j in range(3) if j != i)
            loss -= torch.log(torch.exp(u[a][i] @ u[b][i] / 0.1) / others) / 3
    torch.testing.assert_close(method(views, Progress(0, 10)).loss, loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["case0", "case1"])  # case2 is without unit length, which the method always has
def test_loss_and_gradient_equal_the_authors(golden, case):
    g = golden("simclr_loss")
    assert g[f"{case}.normalise"]
    method = SimCLR(ToyEncoder(2, 2), SMALL.model_copy(update={"temperature": float(g[f"{case}.temperature"])}))
    hidden = g[f"{case}.hidden"].clone().requires_grad_()
    z = torch.stack(hidden.chunk(2))
    loss = method.global_loss(z, z, Progress(0, 1)).loss
    loss.backward()
    # The authors hide an image's own similarity behind -1e9 where we have -inf: e^-1e9 is 0 either way.
    torch.testing.assert_close(loss, g[f"{case}.loss"], rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden.grad, g[f"{case}.grad.hidden"], rtol=0, atol=1e-12)


def test_the_projector_has_the_authors_biases_and_scales():
    """No bias before BatchNorm; scale and offset in hidden layers, scale alone at the end."""
    head = SimCLR(ToyEncoder(5, 8), SMALL).student.projector
    trained = {n for n, p in head.named_parameters() if p.requires_grad}
    assert trained == {"0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias", "6.weight", "7.weight"}
    assert not head[7].bias.any()


def test_one_views_statistics_reach_the_other():
    """The projector takes both views at once, as the authors' does."""
    method, t = build(tiny_encoder(TokenSpec()), SMALL).double(), Progress(0, 10)
    S, _ = method.encode(random_views(3), t)
    other, _ = method.encode(random_views(3, seed=1), t)
    assert not torch.equal(method.student.project(S)[0], method.student.project([S[0], other[1]])[0])
