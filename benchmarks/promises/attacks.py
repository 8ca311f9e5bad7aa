"""Rows 10, 11 and 12: an attack's step is its formula, leaves the network alone, and is worth more than noise."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from benchmarks.promises.base import Outcome, apart, tally


def formula(count: int, folder: Path) -> Outcome:
    """``count`` random cases of GradMDM's direction in float64 against plain NumPy, to 1e-10; the projection never turns against open gates."""
    return apart(_formula, count, folder, log=folder / "formula.log")


def _formula(count: int, folder: Path) -> Outcome:
    import numpy as np
    import torch

    from gatewatt.attacks import ConflictMasking, PowerLoss, TanhSpace
    from gatewatt.gating import GateTable

    results: list[str | None] = []
    largest = conflicts = 0.0
    source = np.random.default_rng(10)
    for case in range(count):
        units, alpha, scale = int(source.integers(2, 9)), float(source.uniform(1, 6)), 10.0 ** source.uniform(-6, 2)
        weight, bias = source.standard_normal((units, 12)), source.standard_normal(units)
        share = source.uniform(0, 2, units)
        pixels = source.uniform(0.01, 0.99, 12)
        score = 1 / (1 + np.exp(-(weight @ (pixels - 0.5) + bias)))
        closed, opened = score < 0.5, score > 0.5
        slope = scale * share * score * (1 - score)
        chain = 2 * pixels * (1 - pixels)  # of (tanh + 1) / 2
        g_closed = chain * (-(slope * alpha * score ** (alpha - 1) * closed) @ weight)
        g_open = chain * (-(slope * opened) @ weight)
        inner = g_closed @ g_open
        expected = g_closed - inner / (g_open @ g_open) * g_open if inner < 0 else g_closed
        conflicts += inner < 0

        image = torch.tensor(pixels).view(1, 3, 2, 2).requires_grad_()
        scores = torch.sigmoid((image.flatten(1) - 0.5) @ torch.tensor(weight).T + torch.tensor(bias))
        table = GateTable(scores, torch.full_like(scores, 0.5).detach(), (scores >= 0.5).double())

        def gradient(loss: Any, more: bool, image: Any = image) -> Any:
            return TanhSpace().pullback(image.detach(), torch.autograd.grad(loss.sum(), image, retain_graph=more)[0])

        found = ConflictMasking()(PowerLoss(alpha), table, torch.tensor(scale * share), gradient).flatten().numpy()
        size = max(float(np.abs(g_closed).max()), 1e-300)
        error = float(np.abs(found - expected).max()) / size
        largest = max(largest, error)
        turned = float(found @ g_open) < -1e-10 * np.linalg.norm(g_closed) * np.linalg.norm(g_open)
        results.append(f"case {case}: off by {error:.1e}" if error > 1e-10 else f"case {case}: turned against open gates" if turned else None)
    return tally(results, f"largest error {largest:.1e} of the largest entry; the two gradients conflicted in {int(conflicts)} cases")


def untouched(count: int, folder: Path) -> Outcome:
    """Attacks inside fit, validate, test and predict, ``count`` or more in each: network, modes, gradients and random state to the byte."""
    return apart(_untouched, count, folder, log=folder / "untouched.log")


def _untouched(count: int, folder: Path) -> Outcome:
    import numpy as np
    import torch
    from lightning.pytorch import Trainer

    from gatewatt.attacks import GradMDM
    from gatewatt.callbacks import AdversarialPNGs, RecoveryCallback
    from gatewatt.data import DigitsData
    from gatewatt.networks import SkipNet
    from gatewatt.tasks import DynamicTraining, EnergyAdversarialTraining, EnergyAttackEvaluation

    results: list[str | None] = []
    seen: dict[str, int] = {}
    loop = [""]

    def state(network: Any) -> dict[str, Any]:
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        return {
            "parameters and buffers": {name: (tensor.data_ptr(), tensor.detach().numpy().tobytes()) for name, tensor in tensors.items()},
            "gradients": {name: None if p.grad is None else p.grad.numpy().tobytes() for name, p in network.named_parameters()},
            "frozen parts": {name: p.requires_grad for name, p in network.named_parameters()},
            "modes": {name: (id(module), module.training) for name, module in network.named_modules()},
            "hooks": {name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in network.named_modules()},
            "random state": (torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), random.getstate()),  # noqa: NPY002 - the global one
            "modes of torch": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        }

    class Watched(GradMDM):
        """Compares everything before and after each call."""

        def __call__(self, network: Any, images: Any, labels: Any = None, **options: Any) -> Any:
            before, pixels = state(network), images.clone()
            result = super().__call__(network, images, labels, **options)
            after = state(network)
            changed = [what for what in before if before[what] != after[what]]
            if not torch.equal(pixels, images):
                changed.append("images")
            seen[loop[0]] = seen.get(loop[0], 0) + 1
            results.append(f"{loop[0]}: changed {', '.join(changed)}" if changed else None)
            return result

    attack = Watched(steps=2)
    torch.manual_seed(0)
    network = SkipNet(8, width=4, decision="sampled")
    data = DigitsData(batch_size=16, eval_batch_size=4, val_images=max(40, 4 * count), val_subset=4 * count, test_images=4 * count)

    def trainer(*callbacks: Any, **settings: Any) -> Trainer:
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        plain = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "use_distributed_sampler": False, "default_root_dir": folder}
        return Trainer(**quiet, **plain, callbacks=list(callbacks), **settings)

    loop[0] = "fit"
    trainer(max_steps=count, limit_val_batches=0).fit(EnergyAdversarialTraining(network, attack), data)
    loop[0] = "validate"
    trainer(RecoveryCallback(attack, images=4 * count)).validate(DynamicTraining(network), data, verbose=False)
    loop[0] = "test"
    trainer().test(EnergyAttackEvaluation(network, attack), data, verbose=False)
    loop[0] = "predict"
    trainer(AdversarialPNGs()).predict(EnergyAttackEvaluation(network, attack), data, return_predictions=False)
    results += [f"no attack in {name}" for name in ("fit", "validate", "test", "predict") if seen.get(name, 0) < count]
    return tally(results, ", ".join(f"{number} attacks in {name}" for name, number in seen.items()))


def checked(count: int, folder: Path) -> Outcome:
    """On ``count`` images of every shipped checkpoint: gradients alive, decisions repeatable, GradMDM stronger than noise of its size."""
    return apart(_checked, count, folder, log=folder / "checked.log", timeout=4 * 3600)


def _checked(count: int, folder: Path) -> Outcome:
    import torch

    from benchmarks.promises.flops import pictures, subjects
    from gatewatt.attacks import GradMDM
    from gatewatt.flops import price
    from gatewatt.gating import gate_table

    results: list[str | None] = []
    notes = []
    for name, network, size, _ in list(subjects(100))[: None if count >= 100 else 1]:
        images = pictures(count, size, seed=12)
        ledger = price(network, images[:1])

        def flops(pixels: Any, network: Any = network, ledger: Any = ledger) -> Any:
            with torch.no_grad():
                return ledger(network(pixels, "skipped").gates)

        clean = flops(images)
        repeats = all(torch.equal(clean, flops(images)) for _ in range(5))
        results.append(None if repeats else f"{name}: decisions are random")
        watched = images.clone().requires_grad_()
        gates = gate_table(network(watched, "masked").gates)
        (gradient,) = torch.autograd.grad(gates.score.sum(), watched)
        dead = int((gradient.flatten(1).abs().amax(1) == 0).sum())
        results.append(f"{name}: the gradient of {dead} of {count} images is zero" if dead else None)
        adversarial = GradMDM(gamma=1.0, steps=20)(network, images, ledger=ledger).images
        size_of_change = (adversarial - images).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(12))
        noisy = (images + noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * size_of_change).clamp(0, 1)
        gained, by_noise = (float((flops(pixels) - clean).sum() / clean.sum()) for pixels in (adversarial, noisy))
        results.append(None if gained > max(by_noise, 0) else f"{name}: attack {100 * gained:+.1f} %, noise {100 * by_noise:+.1f} % of FLOPs")
        notes.append(f"{name}: {100 * gained:+.1f} % FLOPs by GradMDM, {100 * by_noise:+.1f} % by noise of its size")
    return tally(results, "; ".join(notes))
