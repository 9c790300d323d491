"""The prototypes' cross-entropy: the equation as loops, the plain version in float64, memory, Sinkhorn's centre."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from triptych.compiling import compiling
from triptych.heads import Prototypes
from triptych.losses import balanced
from triptych.memory import LiveMemory
from triptych.prototype_loss import masked_cross_entropy, other_views, prototype_cross_entropy, sinkhorn_center

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.05}


def plain(z_s, w_s, z_t, w_t, *, center, student_temp, teacher_temp, weight):
    """The same sum with every logit held at once."""
    log_p_s = (z_s @ w_s.T / student_temp).log_softmax(-1)  # (S, B, K)
    p_t = ((z_t @ w_t.T - center) / teacher_temp).softmax(-1).detach()  # (T, B, K)
    return -(weight * (p_t[:, None] * log_p_s[None]).sum(-1)).sum()


def units(*shape, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1).to(dtype)


def uniform(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def prototypes(count, embedding, train_gain, seed, dtype=torch.float64):
    module = Prototypes(embedding, count, train_gain=train_gain).to(dtype)
    with torch.no_grad():
        module.direction.copy_(3 * units(count, embedding, seed=seed) * (0.2 + uniform(count, 1)))
        module.gain.copy_(0.5 + uniform(count, 1))
    return module


K, P = 23, 6
VIEWS = {  # (S, T, B), weight
    "patches, one to one": ((1, 1, 11), uniform(1, 1, 11)),
    "pairs of crops": ((5, 2, 4), other_views(2, 5, 4, like=torch.zeros(1, dtype=torch.float64))),
    "one weight": ((3, 2, 4), torch.tensor(0.3, dtype=torch.float64)[None, None, None]),
    "of each image": ((3, 2, 4), uniform(2, 3, 4)),
    "UDI's patches": ((1, 2, 9), uniform(2, 1, 9) * (uniform(2, 1, 9) > 0.4)),
    "UDI's mixture": ((1, 8, 3), uniform(8, 1, 3)),
}
SIZES = {"one chunk": {}, "chunks": {"chunk": 5}, "chunks, nothing held": {"chunk": 5, "block": 40}}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", ["tensor", "module", "module with a trained gain"])
@pytest.mark.parametrize("views", VIEWS)
def test_loss_and_gradients_equal_those_of_all_logits_at_once(views, kind, sizes):
    (S, T, B), weight = VIEWS[views]
    z_s, z_t = units(S, B, P, seed=1).requires_grad_(), units(T, B, P, seed=2)
    options = {"center": 0.1 * uniform(K), "weight": weight, **TEMPS}
    if kind == "tensor":
        w_s, w_t = units(K, P, seed=3).requires_grad_(), units(K, P, seed=4)
        trained, weights = [z_s, w_s], (w_s, w_t)
    else:
        gain = kind == "module with a trained gain"
        w_s, w_t = (prototypes(K, P, gain, seed) for seed in (3, 4))
        w_t.requires_grad_(False)
        trained, weights = [z_s, *(p for p in w_s.parameters() if p.requires_grad)], (w_s.weight, w_t.weight)
    expected = plain(z_s, weights[0], z_t, weights[1], **options)
    ours = prototype_cross_entropy(z_s, w_s, z_t, w_t, **options, **sizes)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(0.7 * loss, trained) for loss in (ours, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert ours.grad_fn is not None


def test_the_loss_is_the_equation_written_as_loops():
    z_s, z_t, w_s, w_t = (units(n, 3, seed=i) for i, n in enumerate((6, 4, 7, 7)))
    z_s, z_t, c, weight = z_s.view(3, 2, 3), z_t.view(2, 2, 3), uniform(7), uniform(2, 3, 2)
    total = 0.0
    for t in range(2):
        for s in range(3):
            for b in range(2):
                e_t = [math.exp((float(z_t[t, b] @ w_t[k]) - c[k]) / 0.05) for k in range(7)]
                e_s = [math.exp(float(z_s[s, b] @ w_s[k]) / 0.1) for k in range(7)]
                entropy = -sum(e_t[k] / sum(e_t) * math.log(e_s[k] / sum(e_s)) for k in range(7))
                total += float(weight[t, s, b]) * entropy
    loss = prototype_cross_entropy(z_s, w_s, z_t, w_t, center=c, weight=weight, chunk=2, block=8, **TEMPS)
    assert loss.item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("sizes", [{"chunk": 3}, {"chunk": 3, "block": 12}])
def test_gradients_equal_differences(sizes):
    z_s, z_t, v = units(2, 3, 4, seed=1), units(2, 3, 4, seed=2), prototypes(7, 4, True, seed=3)
    target, weight = units(7, 4, seed=4), uniform(2, 2, 3)

    def loss(z, direction, gain):
        student = copy.copy(v)
        student._parameters = {}
        student.direction, student.gain = direction, gain
        return prototype_cross_entropy(
            z, student, z_t, target, center=torch.zeros(7).double(), weight=weight, **TEMPS, **sizes
        )

    inputs = [x.detach().clone().requires_grad_() for x in (z_s, v.direction, v.gain)]
    assert torch.autograd.gradcheck(loss, inputs)


def case(S=3, T=2, B=4, K=K, P=P, dtype=torch.float64, gain=True):
    w_s, w_t = (prototypes(K, P, gain, seed, dtype) for seed in (3, 4))
    z_s, z_t = units(S, B, P, seed=1, dtype=dtype).requires_grad_(), units(T, B, P, seed=2, dtype=dtype)
    weight = other_views(T, S, B, like=z_s) if S > 1 else z_s.new_full((1, 1, B), 1 / B)
    options = {"center": 0.1 * uniform(K).to(dtype), "weight": weight, **TEMPS}
    return (z_s, w_s, z_t, w_t.requires_grad_(False)), options


def test_a_centre_of_each_teacher_view():
    (z_s, w_s, z_t, w_t), options = case()
    centers = 0.1 * uniform(2, K)
    views = other_views(2, 3, 4, like=z_s)
    options.pop("weight"), options.pop("center")
    both = prototype_cross_entropy(z_s, w_s, z_t, w_t, center=centers, weight=views, chunk=5, **options)
    each = [
        prototype_cross_entropy(z_s, w_s, z_t[v, None], w_t, center=centers[v], weight=views[v, None], **options)
        for v in range(2)
    ]
    torch.testing.assert_close(both, sum(each), rtol=0, atol=1e-12)


def test_only_what_is_trained_gets_a_gradient_and_only_where_gradients_are_asked_for():
    (z_s, w_s, z_t, w_t), options = case(gain=False)
    with torch.no_grad():
        silent = prototype_cross_entropy(z_s, w_s, z_t, w_t, **options)
    assert not silent.requires_grad
    loss = prototype_cross_entropy(z_s.detach(), w_s, z_t.requires_grad_(), w_t, **options)
    loss.backward()
    assert silent == loss
    assert w_s.direction.grad is not None
    assert z_s.grad is w_s.gain.grad is z_t.grad is w_t.direction.grad is None
    alone = prototype_cross_entropy(z_s, w_s.requires_grad_(False), z_t, w_t, **options)
    alone.backward()
    torch.testing.assert_close(z_s.grad, torch.autograd.grad(plain_of(z_s, w_s, z_t, w_t, options), z_s)[0])


def plain_of(z_s, w_s, z_t, w_t, options):
    return plain(z_s, w_s.weight, z_t, w_t.weight, **options)


def test_backward_twice_gives_the_gradient_twice():
    inputs, options = case()
    loss = prototype_cross_entropy(*inputs, **options)
    once = [g.clone() for g in torch.autograd.grad(loss, (inputs[0], *inputs[1].parameters()), retain_graph=True)]
    for factor in (3.0, 1.0):
        again = torch.autograd.grad(factor * loss, (inputs[0], *inputs[1].parameters()), retain_graph=True)
        for a, b in zip(again, once, strict=True):
            torch.testing.assert_close(a, factor * b, rtol=0, atol=1e-12)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(inputs[1].direction.grad, 2 * once[1], rtol=0, atol=1e-12)


def test_a_masked_mean_is_the_mean_over_each_images_masked_patches():
    mask = torch.tensor([[[1, 0, 1, 1], [0, 0, 0, 0]], [[0, 1, 0, 0], [1, 1, 0, 0]]], dtype=torch.bool)  # (V, B, N)
    z_t, z_s, w = units(2, 2, 4, P, seed=1), units(2, 2, 4, P, seed=2), units(K, P, seed=3)
    c = 0.1 * uniform(K)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    means = []
    for v in range(2):
        for b in range(2):
            rows = [i for i in range(4) if mask[v, b, i]]
            losses = [
                plain(z_s[v, b, i][None, None], w, z_t[v, b, i][None, None], w, center=c, weight=one, **TEMPS)
                for i in rows
            ]
            means.append(sum(losses) / len(rows) if rows else 0.0)
    loss = masked_cross_entropy(z_s[mask], w, z_t, w, mask, mask.flatten().nonzero()[:, 0], center=c, **TEMPS)
    assert loss.item() == pytest.approx(float(sum(means) / 4), abs=1e-12)
    nothing, at = torch.zeros_like(mask), torch.empty(0, dtype=torch.int64)
    assert masked_cross_entropy(z_s[nothing], w, z_t, w, nothing, at, center=c, **TEMPS).item() == 0


@pytest.mark.parametrize("block", [None, 2000])
def test_under_bf16_autocast_products_are_rounded_and_sums_are_not(block):
    inputs, options = case(B=16, K=700, P=32, dtype=torch.float32)
    exact = prototype_cross_entropy(*inputs, **options)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = prototype_cross_entropy(*inputs, **options, chunk=100, block=block)
        wide = prototype_cross_entropy(*(copy.deepcopy(x).double() for x in inputs), **options)
    assert rounded.dtype == torch.float32
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), exact, rtol=1e-5, atol=0)  # autocast leaves float64 alone
    torch.testing.assert_close(rounded, exact, rtol=2e-3, atol=0)
    assert rounded != exact
    trained = inputs[0], *inputs[1].parameters()
    for a, b in zip(*(torch.autograd.grad(x, trained) for x in (rounded, exact)), strict=True):
        assert a.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999
        torch.testing.assert_close(a.norm(), b.norm(), rtol=1e-2, atol=0)


def test_large_scores_stay_finite():
    inputs, options = case(dtype=torch.float32)
    options |= {"student_temp": 1e-3, "teacher_temp": 1e-3}
    loss = prototype_cross_entropy(*inputs, **options, chunk=5)
    loss.backward()
    assert loss.isfinite()
    assert inputs[0].grad.isfinite().all()


def peak(loss, inputs, options, **sizes) -> tuple[int, int]:
    """Most bytes alive during forward and backward, beyond the gradients themselves."""
    for x in inputs:
        x.grad = None
    with LiveMemory() as memory:
        loss(*inputs, **options, **sizes).backward()
    return memory.peak - sum(x.grad.nbytes for x in inputs if x.grad is not None)


def large(rows, count, P=32):
    inputs = [
        units(*shape, seed=1, dtype=torch.float32) for shape in ((1, rows, P), (count, P), (1, rows, P), (count, P))
    ]
    for x in inputs[:2]:
        x.requires_grad_()
    return inputs, {"center": torch.zeros(count), "weight": torch.full((1, 1, rows), 1 / rows), **TEMPS}


SMALL_BLOCK = {"chunk": 256, "block": 1 << 18}


def test_memory_does_not_grow_with_rows_times_prototypes():
    least = peak(prototype_cross_entropy, *large(512, 4096), **SMALL_BLOCK)
    for rows, count in ((1024, 4096), (512, 8192), (1024, 8192)):
        more = peak(prototype_cross_entropy, *large(rows, count), **SMALL_BLOCK)
        own = 4 * 3 * (rows - 512) * 32 + 4 * 4 * (count - 4096)  # embeddings over τ of both sides, dz; vectors of K
        assert more <= least + own + 4096
    held = peak(prototype_cross_entropy, *large(1024, 8192), chunk=256, block=1 << 22)
    assert held <= least + 4 * (1 << 22) + own + 4096


def test_temporaries_are_at_most_a_tenth_of_the_plain_versions():
    inputs, options = large(1024, 16384)
    ours, all_at_once = (peak(loss, inputs, options) for loss in (prototype_cross_entropy, plain))
    assert ours <= all_at_once / 10


def test_compiled_chunks_give_the_same():
    inputs, options = case(B=8, K=150, P=16, dtype=torch.float32)
    eager = prototype_cross_entropy(*inputs, **options, chunk=50)
    with compiling():
        compiled = prototype_cross_entropy(*inputs, **options, chunk=50)
    torch.testing.assert_close(compiled, eager)
    trained = inputs[0], *inputs[1].parameters()
    for a, b in zip(*(torch.autograd.grad(x, trained) for x in (compiled, eager)), strict=True):
        torch.testing.assert_close(a, b)


def codes_of(z, w, epsilon, center):
    return ((z @ w.T - center) / epsilon).softmax(-1)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("kind", ["tensor", "module"])
def test_with_sinkhorns_centre_the_softmax_is_sinkhorns_codes(kind, chunk):
    z, own = units(13, P, seed=1), prototypes(K, P, True, seed=2)
    w = own.weight.detach()
    for iterations in (1, 3, 10):
        c = sinkhorn_center(z, own if kind == "module" else w, 0.05, iterations, chunk)
        expected = balanced((z @ w.T / 0.05).exp(), iterations)
        torch.testing.assert_close(codes_of(z, w, 0.05, c), expected, rtol=0, atol=1e-12)


def test_sinkhorns_centre_needs_no_range_of_scores():
    """The exponentials themselves would overflow: e^2000."""
    z, w = units(13, P, seed=1), units(K, P, seed=2)
    codes = codes_of(z, w, 5e-4, sinkhorn_center(z, w, 5e-4, 50))
    torch.testing.assert_close(codes.sum(1), torch.ones(13, dtype=torch.float64))
    assert codes.isfinite().all()


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    z, w = units(12, P, seed=1), units(K, P, seed=2)
    torch.save(sinkhorn_center(z.chunk(2)[rank], w, 0.05, 3, chunk=5), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_sinkhorns_centre_of_two_processes_is_that_of_their_joint_rows(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    joint = sinkhorn_center(units(12, P, seed=1), units(K, P, seed=2), 0.05, 3)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), joint, rtol=0, atol=1e-12)
