"""The doctor: planted fakes are caught by the check that is meant for them, honest networks pass."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from tests.diagnosis import fakes
from tests.toys import LEDGER, Logistic
from torch import Tensor

import gatewatt
from gatewatt.data import DigitsData
from gatewatt.diagnosis import CHECKS, Diagnosis, Settings, doctor
from gatewatt.gating import DynamicNetwork
from gatewatt.metrics import write_summary
from gatewatt.networks import SkipNet
from gatewatt.networks.checkpoint import load

CAUGHT = {
    "always on": {"clean saving", "gates vary", "routes differ"},
    "always off": {"gates vary", "routes differ", "unbounded attack"},
    "scaled by 1000": {"gates unsaturated"},
    "without gradient": {"gradient alive", "beats search", "unbounded attack"},
    "random": {"decisions repeat"},
}
"""Fake -> the checks that fail."""


@cache
def small() -> Tensor:
    """Images of the toy network, of 8-bit levels."""
    return torch.randint(256, (60, 3, 2, 2), generator=torch.Generator().manual_seed(3)) / 255


def diagnosis_of(network: DynamicNetwork, source: DynamicNetwork | None = None, **settings: object) -> Diagnosis:
    given = Settings(**{"eps": 0.1, "steps": 20, **settings})  # type: ignore[arg-type]
    return doctor(network.eval(), small(), settings=given, ledger=LEDGER, source=source)


def digits(count: int) -> tuple[Tensor, Tensor]:
    data = DigitsData(eval_batch_size=count, test_images=count)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    return batch.images, batch.labels


def test_an_honest_toy_passes_every_check() -> None:
    diagnosis = diagnosis_of(Logistic(), source=Logistic())
    assert [check.name for check in diagnosis.checks] == list(CHECKS)
    # Two step sizes end on two hills; on sixty images that is neither above nor below the bar.
    assert {check.name: check.outcome for check in diagnosis.checks if check.outcome != "pass"} == {"steps suffice": "cannot tell"}
    assert diagnosis.believable
    assert diagnosis.verdict == "believable; cannot tell: steps suffice"


@pytest.mark.parametrize("fake", CAUGHT)
def test_a_planted_fake_is_caught_by_name(fake: str) -> None:
    diagnosis = diagnosis_of(fakes.FIVE[fake]())
    failed = {check.name for check in diagnosis.failed}
    # What a random network does under attack is chance.
    assert failed >= CAUGHT[fake] if fake == "random" else failed == CAUGHT[fake]
    assert not diagnosis.believable
    assert diagnosis.verdict.startswith("not believable: ")
    assert all(f"{name} (" in diagnosis.verdict for name in failed)


@pytest.mark.parametrize("checkpoint", ["avit-small-digits", "dvt-small-digits"])
def test_an_honest_network_passes(checkpoint: str) -> None:
    images, labels = digits(10)
    diagnosis = doctor(load(checkpoint), images, labels, Settings(eps=0.06, steps=4))
    assert {check.outcome for check in diagnosis.checks} == {"pass"}, diagnosis.verdict
    assert diagnosis.figures["accuracy_clean"] == 1
    assert diagnosis.figures["recovery_percent"] > 90


def test_a_few_images_on_one_route_prove_nothing() -> None:
    diagnosis = doctor(fakes.AlwaysOn().eval(), small()[:12], settings=Settings(steps=1), ledger=LEDGER)
    assert {name: diagnosis[name].outcome for name in ("gates vary", "routes differ")} == {
        "gates vary": "cannot tell",
        "routes differ": "cannot tell",
    }


@pytest.mark.parametrize(
    ("network", "check", "said"),
    [
        (fakes.HalfDetached, "gradient alive", "it is hidden"),
        (fakes.Misleading, "beats search", "search finds what gradients do not"),
        (fakes.Misleading, "unbounded attack", ""),
        (fakes.OneRoute, "routes differ", "nearly static"),
        (fakes.Fractions, "survives 8 bits", "rounding takes it back"),
    ],
)
def test_other_tricks_are_caught_too(network: type[DynamicNetwork], check: str, said: str) -> None:
    found = diagnosis_of(network())[check]
    assert found.outcome == "fail"
    assert said in found.reason


def test_a_score_that_is_no_number_ends_the_examination() -> None:
    diagnosis = diagnosis_of(fakes.Broken())
    assert [(check.name, check.outcome) for check in diagnosis.checks] == [("scores finite", "fail")]
    dark = int((small().mean((1, 2, 3)) <= 0.4).sum())
    assert diagnosis.checks[0].finding.figures == {"images": dark}


def test_a_hidden_gradient_shows_in_the_transfer_from_an_honest_twin() -> None:
    diagnosis = diagnosis_of(fakes.Detached(), source=Logistic())
    assert diagnosis["beats transfer"].outcome == "fail"
    assert "beats transfer" not in {check.name for check in diagnosis_of(fakes.Detached()).checks}


def test_a_closed_gate_that_nothing_opens_is_named() -> None:
    network = Logistic()
    with torch.no_grad():
        network.bias[4] -= 50
    found = diagnosis_of(network)["unbounded attack"]
    assert found.outcome == "pass"
    assert "opened by no input: b (1)" in found.reason
    assert found.finding.figures["flops_of_all_units_ever_opened"] == LEDGER.dense - 12


def test_a_euclidean_ball_works_as_well() -> None:
    diagnosis = diagnosis_of(Logistic(), norm="l2", eps=0.3)
    assert diagnosis.believable
    assert diagnosis["images valid"].outcome == "pass"
    assert diagnosis.settings["norm"] == "l2"


def test_batches_and_company_change_nothing() -> None:
    whole, parts = diagnosis_of(Logistic(), steps=3), diagnosis_of(Logistic(), steps=3, batch_size=25)
    assert [check.finding for check in whole.checks] == [check.finding for check in parts.checks]


def test_the_network_is_left_as_it_was(network: SkipNet, images: Tensor) -> None:
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(4)
    gatewatt.doctor(network, images, settings=Settings(steps=1))
    drawn = torch.rand(3)
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    torch.manual_seed(4)
    assert torch.equal(drawn, torch.rand(3))


def test_it_is_written_as_json(tmp_path: object) -> None:
    diagnosis = diagnosis_of(fakes.AlwaysOn())
    path = write_summary(f"{tmp_path}/diagnosis.json", diagnosis.as_dict())
    read = json.loads(path.read_text())
    assert read["verdict"] == diagnosis.verdict
    assert [check["name"] for check in read["checks"]] == [name for name in CHECKS if name != "beats transfer"]
    assert read["checks"][1]["outcome"] == "fail"
    assert read["checks"][1]["figures"] == {"saving_percent": 0.0, "interval": [0.0, 0.0]}
    assert all(check["seconds"] >= 0 for check in read["checks"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l1"}, "norm must be one of linf, l2, got 'l1'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eps": 1.0}, "eps must be above 0 and below 1, where it is no bound, got 1"),
        ({"eps": float("nan")}, "eps must be above 0 and below 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagnosis_of(Logistic(), **settings)


def test_images_and_labels_that_prove_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="images must be at least 2, got 1"):
        doctor(Logistic().eval(), small()[:1], ledger=LEDGER)
    with pytest.raises(ValueError, match="labels must have shape"):
        doctor(Logistic().eval(), small(), torch.zeros(3), ledger=LEDGER)


def test_an_unknown_check_is_named() -> None:
    with pytest.raises(KeyError, match="no check 'gates open' was made; there are scores finite"):
        diagnosis_of(fakes.Broken())["gates open"]
