"""Numbers of the authors' code on two processes: iBOT's centres, MoCo v3's keys, SwAV's codes."""

import numpy as np
import torch

from conftest import GOLDEN, tiny_encoder
from triptych.losses import contrast, gathered_keys
from triptych.methods import build, iBOTConfig
from triptych.prototype_loss import masked_cross_entropy, other_views, prototype_cross_entropy, sinkhorn_center
from triptych.schedules import Progress
from triptych.tokens import TokenSpec


def load(name: str, rank: int) -> dict:
    with np.load(GOLDEN / f"{name}.npz") as file:
        own = {k.removeprefix(f"rank{rank}."): torch.from_numpy(file[k]) for k in file.files}
    return {k: v for k, v in own.items() if not k.startswith("rank")}


def close(ours, expected) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def ibot(rank: int) -> None:
    g = load("ibot_loss_2ranks", rank)
    eye = torch.eye(5, dtype=torch.float64)
    config = iBOTConfig(hidden=4, embedding=5, prototypes=5, patch_prototypes=5)
    method = build(tiny_encoder(TokenSpec(mask=True)), config).double()
    with torch.no_grad():  # prototypes = identity: embeddings are then the golden logits
        for tower in (method.student, method.teacher):
            for prototypes in (tower.prototypes, tower.patch_prototypes):
                prototypes.direction.copy_(eye)
    student, teacher = (g[f"in.{who}_cls"].view(2, 2, 5) for who in ("student", "teacher"))
    student_patch, teacher_patch = (g[f"in.{who}_patch"].view(2, 2, 4, 5) for who in ("student", "teacher"))
    mask = g["in.mask"].flatten(2)
    options = {"student_temp": float(g["cfg.student_temp"]), "center": method.center}  # 0 before the first update
    tau, weight = float(g["cfg.teacher_temp"]), other_views(2, 2, 2, like=student)
    of_class = prototype_cross_entropy(student, eye, teacher, eye, teacher_temp=tau, weight=weight, **options)
    tau = 0.07  # of patches; the file does not say it, its numbers do
    at = mask.flatten().nonzero()[:, 0]
    of_patches = masked_cross_entropy(
        student_patch[mask], eye, teacher_patch, eye, mask, at, teacher_temp=tau, **options
    )
    close(of_class, g["out.cls"])
    close(of_patches, g["out.patch"])
    method.update([{"class": teacher.mean((0, 1)), "patch": teacher_patch.mean((0, 1, 2))}], Progress(0, 2))
    close(method.center, g["center_cls_after"][0])
    close(method.patch_center, g["center_patch_after"][0, 0])


def mocov3(rank: int) -> None:
    g = load("mocov3_loss_2ranks", rank)
    tau = float(g["cfg.temperature"])
    q = g["in.q"].clone().requires_grad_()
    loss = 2 * tau * contrast(q, gathered_keys(g["in.k"][None])[0], tau)
    loss.backward()
    close(loss, g["out.loss"])
    close(q.grad, g["grad.q"])


def swav(rank: int) -> None:
    g = load("swav_sinkhorn_2ranks", rank)
    scores, epsilon = g["in.scores"], float(g["cfg.epsilon"])
    eye = torch.eye(scores.shape[1], dtype=scores.dtype)  # prototypes: embeddings are then the scores
    center = sinkhorn_center(scores, eye, epsilon, int(g["cfg.iterations"]))
    close(((scores - center) / epsilon).softmax(-1), g["out.codes"])


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for case in (ibot, mocov3, swav):
        case(rank)
    torch.distributed.destroy_process_group()


def test_two_processes_equal_the_authors(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
