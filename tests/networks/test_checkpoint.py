"""Weights and card: what goes in comes out, and nothing damaged, hostile or half-written gets through."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gatewatt.networks
from gatewatt.gating import DynamicNetwork
from gatewatt.networks import ResNet, SkipNet, checkpoint
from gatewatt.networks.checkpoint import CheckpointError, amend_card, card_of, load, load_weights, save

CARD = {"recipe": "network/skipnet.yaml", "data": "digits", "seed": 3, "license": "MIT", "figures": {"accuracy_clean": 0.97}}


@pytest.fixture
def saved(network: SkipNet, tmp_path: Path) -> Path:
    """A sound checkpoint."""
    path = tmp_path / "skipnet-8-digits.safetensors"
    save(network, path, card=CARD)
    return path


def refused(path: str | Path) -> str:
    """The one line with which :func:`load` refuses."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def rewrite_card(path: Path, **changes: Any) -> None:
    """Change facts of a card; ``None`` deletes one."""
    card = {**json.loads(path.with_suffix(".json").read_text()), **changes}
    path.with_suffix(".json").write_text(json.dumps({key: value for key, value in card.items() if value is not None}))


def replace_weights(path: Path, content: bytes) -> None:
    """Swap the weights and have the card vouch for them, as an attacker with both files would."""
    path.write_bytes(content)
    rewrite_card(path, sha256=checkpoint.hashlib.sha256(content).hexdigest())


def with_tensors(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the stored tensors and have the card vouch for them."""
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    replace_weights(path, safetensors.torch.save(tensors))


# ---- round trip ----


@pytest.mark.parametrize(
    "arguments", [{"depth": 8, "width": 4}, {"depth": 14, "num_classes": 7, "gate": "feedforward2", "decision": "sampled", "width": 3}]
)
def test_a_loaded_network_is_the_saved_one(arguments: dict[str, Any], images: Tensor, tmp_path: Path) -> None:
    network = SkipNet(**arguments)
    network(images)  # BatchNorm has statistics of its own now
    save(network, tmp_path / "x.safetensors", card={})
    loaded = load(tmp_path / "x.safetensors")
    assert type(loaded) is SkipNet
    assert not loaded.training
    assert loaded.arguments == network.arguments
    assert loaded.decision is network.decision
    assert loaded.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(images).logits, network.eval()(images).logits)


def test_the_card_holds_what_was_given_and_what_rebuilds_the_network(saved: Path, network: SkipNet) -> None:
    card = card_of(saved)
    assert {key: card[key] for key in CARD} == CARD
    assert card["format"] == 1
    assert card["network"] == "SkipNet"
    assert card["arguments"] == network.arguments
    assert card["dtype"] == "float32"
    assert card["sha256"] == checkpoint.hashlib.sha256(saved.read_bytes()).hexdigest()


def test_save_returns_the_card_as_written(network: SkipNet, tmp_path: Path) -> None:
    card = save(network, tmp_path / "new" / "x.safetensors", card={"sizes": (1, 2)})
    assert card == card_of(tmp_path / "new" / "x.safetensors")
    assert card["sizes"] == [1, 2]


def test_equal_weights_give_equal_bytes(network: SkipNet, tmp_path: Path) -> None:
    # Laid out in another way and in train mode: neither is part of what the weights are.
    twin = SkipNet(**network.arguments)
    twin.load_state_dict(network.state_dict())
    twin.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    files = [tmp_path / f"{index}.safetensors" for index in range(6)]
    for index, file in enumerate(files):
        save((network, twin)[index % 2], file, card=dict(sorted(CARD.items(), reverse=bool(index % 2))))
    assert len({file.read_bytes() for file in files}) == 1
    assert len({file.with_suffix(".json").read_bytes() for file in files}) == 1


def test_saving_leaves_the_network_alone(network: SkipNet, tmp_path: Path) -> None:
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in network.state_dict().items()}
    save(network.train(), tmp_path / "x.safetensors", card={}, half=True)
    assert network.training
    assert all(torch.equal(tensor, before[name][0]) and tensor.data_ptr() == before[name][1] for name, tensor in network.state_dict().items())


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    load(saved)
    assert torch.equal(torch.rand(4), expected)


def test_loading_gives_float32_on_the_cpu_whatever_the_defaults(saved: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            loaded = load(saved)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(tensor.device.type, tensor.dtype) for tensor in loaded.parameters()} == {("cpu", torch.float32)}


def test_half_is_stored_only_when_asked_and_loads_as_float32(network: SkipNet, tmp_path: Path, saved: Path) -> None:
    path = tmp_path / "half.safetensors"
    assert save(network, path, card={}, half=True)["dtype"] == "float16"
    assert path.stat().st_size < 0.65 * saved.stat().st_size
    for name, tensor in load(path).state_dict().items():
        original = network.state_dict()[name]
        assert tensor.dtype == original.dtype
        assert torch.equal(tensor, original.half().float() if original.is_floating_point() else original)


def test_a_shipped_name_loads(saved: Path, network: SkipNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatewatt.shipped.shipped_folder", lambda kind: saved.parent)
    assert torch.equal(load("skipnet-8-digits").trunk.head.weight, network.trunk.head.weight)
    assert card_of("skipnet-8-digits")["data"] == "digits"
    assert "skipnet-8-digits" in refused("skipnet-8-digit")


def test_weights_of_one_stage_start_the_next(saved: Path, network: SkipNet) -> None:
    reinforced = SkipNet(8, width=4, decision="sampled").train()
    own = reinforced.decision
    load_weights(reinforced, saved)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in reinforced.state_dict().items())
    assert reinforced.decision is own
    assert reinforced.training


def test_weights_that_do_not_fit_leave_the_network_as_it_was(saved: Path) -> None:
    other = SkipNet(8, width=5)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"does not fit SkipNet: .*\(4, 4, 3, 3\) float32 instead of \(5, 5, 3, 3\) float32.* and \d+ more"):
        load_weights(other, saved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


# ---- damage ----


def test_a_truncated_file_is_refused_wherever_it_ends(saved: Path) -> None:
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in {1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) // 2, len(content) - 4, len(content) - 1}:
        saved.write_bytes(content[:length])
        assert "damaged" in refused(saved)
        # With a card that vouches for the stump, the format itself must notice.
        replace_weights(saved, content[:length])
        assert "not a complete safetensors file" in refused(saved)
        rewrite_card(saved, sha256=checkpoint.hashlib.sha256(content).hexdigest())


def test_an_empty_file_is_refused(saved: Path) -> None:
    saved.write_bytes(b"")
    assert "is empty" in refused(saved)


def test_any_flipped_bit_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(len(content), (60,), generator=generator).tolist()
    for position in [0, 7, 8, len(content) - 1, *positions]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        saved.write_bytes(flipped)
        assert "damaged" in refused(saved)


@pytest.mark.parametrize("extra", [b"\0", b"more"])
def test_trailing_bytes_are_refused(saved: Path, extra: bytes) -> None:
    replace_weights(saved, saved.read_bytes() + extra)
    assert "not a complete safetensors file" in refused(saved)


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b"null", b'{"a": 1}', b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', b"\xff" * 20]
)
@pytest.mark.parametrize("length", [None, 2**63, 2**64 - 1])
def test_a_forged_header_is_refused(saved: Path, header: bytes, length: int | None) -> None:
    replace_weights(saved, (len(header) if length is None else length).to_bytes(8, "little") + header + b"\0" * 4)
    refused(saved)


def test_a_type_that_networks_do_not_hold_is_refused(saved: Path) -> None:
    with_tensors(saved, lambda tensors: tensors.update({"trunk.head.bias": torch.zeros(10, dtype=torch.int64)}))
    assert "trunk.head.bias ((10,) int64 instead of (10,) float32)" in refused(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["trunk.head.weight", "trunk.stem.1.running_var", "gating.controller.bias_hh"])
def test_non_finite_weights_are_refused_on_both_ways(saved: Path, network: SkipNet, tmp_path: Path, value: float, name: str) -> None:
    with_tensors(saved, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    assert f"NaN or infinity in {name}" in refused(saved)
    network.state_dict()[name].view(-1)[0] = value
    with pytest.raises(CheckpointError, match=f"NaN or infinity in {name}"):
        save(network, tmp_path / "other.safetensors", card={})
    assert not (tmp_path / "other.safetensors").exists()


def test_missing_extra_and_misshapen_tensors_are_named(saved: Path) -> None:
    sound = saved.read_bytes()
    with_tensors(saved, lambda tensors: tensors.pop("trunk.head.bias"))
    assert "it lacks trunk.head.bias" in refused(saved)
    replace_weights(saved, sound)
    with_tensors(saved, lambda tensors: tensors.update(backdoor=torch.zeros(1)))
    assert "it holds unexpected backdoor" in refused(saved)
    replace_weights(saved, sound)
    with_tensors(saved, lambda tensors: tensors.update({"trunk.head.weight": torch.zeros(10, 15)}))
    assert "trunk.head.weight ((10, 15) float32 instead of (10, 16) float32)" in refused(saved)
    replace_weights(saved, sound)
    load(saved)


@given(st.binary(max_size=400))
def test_no_bytes_at_all_get_past_the_loader(content: bytes) -> None:
    # Hypothesis wants one folder per example, hence no fixture.
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        path.with_suffix(".json").write_bytes(content)
        refused(path)
        facts = {"format": 1, "network": "SkipNet", "arguments": {"depth": 8, "width": 1}, "sha256": checkpoint.hashlib.sha256(content).hexdigest()}
        path.with_suffix(".json").write_text(json.dumps(facts))
        refused(path)


# ---- hostility ----


class Bomb:
    """Pickles into a call that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("vouched", [True, False])
def test_a_pickle_is_refused_unopened(saved: Path, tmp_path: Path, protocol: int, vouched: bool) -> None:
    marker = tmp_path / "executed"
    content = pickle.dumps(Bomb(marker), protocol)
    if vouched:
        replace_weights(saved, content)
    else:
        saved.write_bytes(content)
    message = refused(saved)
    # The text protocols 0 and 1 have no mark of their own; they are just no safetensors file.
    assert "pickled or zipped" in message if protocol >= 2 else "damaged" in message or "safetensors file" in message
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists(), "the bomb itself is a dud"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["weights.safetensors", "last.ckpt"])
def test_a_torch_save_is_refused_unopened_card_or_no_card(tmp_path: Path, zipped: bool, name: str) -> None:
    marker = tmp_path / "executed"
    torch.save({"state_dict": {}, "bomb": Bomb(marker)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert "pickled or zipped file (torch.save, Lightning .ckpt), which can run code" in refused(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("asked", ["ResNet", "DynamicNetwork", "checkpoint", "os.system", "Skipnet", "", "__builtins__"])
def test_only_exported_dynamic_networks_are_built(saved: Path, asked: str) -> None:
    rewrite_card(saved, network=asked)
    assert f"asks for network {asked!r}; it must be one of " in refused(saved)


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 9},
        {"depth": "8"},
        {"hidden": 4},
        {"depth": 8, "width": 10**9},
        {"depth": 8, "width": -1},
        {"depth": 8, "gate": ["recurrent"]},
        {"": 0},
    ],
)
def test_arguments_that_the_network_refuses_are_one_line(saved: Path, arguments: dict[str, Any]) -> None:
    rewrite_card(saved, arguments=arguments)
    assert "has arguments that SkipNet refuses" in refused(saved)


def test_arguments_of_another_network_do_not_fit_the_weights(saved: Path) -> None:
    rewrite_card(saved, arguments={"depth": 14, "width": 4})
    assert "does not fit SkipNet: it lacks gating.embed.2.bias" in refused(saved)


@pytest.mark.parametrize("url", ["https://example.org/x.safetensors", "http://x", "s3://bucket/x.safetensors", "file:///etc/x.safetensors"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_is_refused(network: SkipNet, url: str, kind: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "is a URL" in refused(kind(url))
    with pytest.raises(CheckpointError, match="is a URL"):
        save(network, kind(url), card={})
    assert list(tmp_path.iterdir()) == []


# ---- the card ----


def test_a_missing_card_is_named_with_its_remedy(saved: Path) -> None:
    saved.with_suffix(".json").unlink()
    assert "has no card: skipnet-8-digits.json must lie beside it (copy both files" in refused(saved)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"format": 1,}', b'{"format": NaN}', b"[" * 100_000, b'{"format": 1, "seed": Infinity}'])
def test_a_card_that_is_no_json_is_refused(saved: Path, content: bytes) -> None:
    saved.with_suffix(".json").write_bytes(content)
    assert "is not valid JSON" in refused(saved)


@pytest.mark.parametrize("content", [b"[]", b"null", b'"format"', b"{}", b'{"format": "1"}'])
def test_json_that_is_no_card_is_refused(saved: Path, content: bytes) -> None:
    saved.with_suffix(".json").write_bytes(content)
    assert "is not a gatewatt card" in refused(saved)


def test_an_empty_card_is_refused(saved: Path) -> None:
    saved.with_suffix(".json").write_bytes(b"")
    assert "skipnet-8-digits.json is empty" in refused(saved)


@pytest.mark.parametrize("key", ["network", "arguments", "sha256"])
@pytest.mark.parametrize("value", [None, 7, [1]])
def test_a_card_without_a_fact_is_refused(saved: Path, key: str, value: Any) -> None:
    rewrite_card(saved, **{key: value})
    assert f"must hold {key!r} as a" in refused(saved)


def test_a_card_of_a_later_format_asks_for_an_upgrade(saved: Path) -> None:
    rewrite_card(saved, format=2)
    assert "has format 2, this gatewatt reads 1; upgrade gatewatt" in refused(saved)


def test_figures_measured_later_are_added_to_the_card(saved: Path) -> None:
    before = card_of(saved)
    amended = amend_card(saved, seed=4, recovery_percent=81.5, sizes=(1, 2))
    assert amended == card_of(saved) == {**before, "seed": 4, "recovery_percent": 81.5, "sizes": [1, 2]}
    load(saved)


def test_what_belongs_to_the_weights_is_not_amended_and_unsound_weights_get_no_figures(saved: Path) -> None:
    before = saved.with_suffix(".json").read_bytes()
    with pytest.raises(CheckpointError, match="a card's 'sha256' belong to the weights and cannot be amended"):
        amend_card(saved, sha256="0" * 64)
    with pytest.raises(CheckpointError, match="must hold JSON values and finite numbers only"):
        amend_card(saved, psnr_db=float("inf"))
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        amend_card(saved, recovery_percent=81.5)
    assert saved.with_suffix(".json").read_bytes() == before


# ---- where there is nothing to read, or no right to ----


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "nowhere.safetensors" in refused(tmp_path / "nowhere.safetensors")
    assert str(tmp_path) in refused(tmp_path)
    assert "no-such-checkpoint" in refused("no-such-checkpoint")
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "pipe.safetensors" in refused(tmp_path / "pipe.safetensors")  # reading it would wait for ever


def test_an_unreadable_file_is_one_line(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert refused(saved) == f"cannot read {saved}: Permission denied"


# ---- writing ----


@pytest.mark.parametrize("left", [".safetensors", ".json"])
def test_an_existing_file_is_replaced_only_on_request(saved: Path, network: SkipNet, left: str) -> None:
    for suffix in {".safetensors", ".json"} - {left}:
        saved.with_suffix(suffix).unlink()
    before = saved.with_suffix(left).read_bytes()
    with pytest.raises(CheckpointError, match=f"{left} exists; choose another name or pass overwrite=True"):
        save(network, saved, card={"seed": 4})
    assert saved.with_suffix(left).read_bytes() == before
    save(network, saved, card={"seed": 4}, overwrite=True)
    assert card_of(saved)["seed"] == 4
    load(saved)


@pytest.mark.parametrize("name", ["x.pt", "x", "x.safetensors.gz", "x.json"])
def test_a_checkpoint_has_one_suffix(network: SkipNet, tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="a checkpoint is named <name>.safetensors, got "):
        save(network, tmp_path / name, card={})


@pytest.mark.parametrize("card", [{"format": 2}, {"sha256": "0" * 64}, {"network": "x", "arguments": {}}])
def test_a_card_cannot_bring_what_save_writes_itself(network: SkipNet, tmp_path: Path, card: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="save writes format, network, arguments, sha256, dtype itself"):
        save(network, tmp_path / "x.safetensors", card=card)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.zeros(1), Path("x"), {1, 2}, {(1, 2): 3}])
def test_a_card_that_json_cannot_hold_is_refused_before_anything_is_written(network: SkipNet, tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match="must hold JSON values and finite numbers only"):
        save(network, tmp_path / "x.safetensors", card={"figure": value})
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_no_card_could_rebuild_is_refused(network: SkipNet, tmp_path: Path) -> None:
    class Own(SkipNet):
        pass

    class Impostor(SkipNet):
        pass

    Impostor.__name__ = "SkipNet"
    for kind in (Own, Impostor):
        with pytest.raises(CheckpointError, match=f"{kind.__name__} cannot be saved: of gatewatt.networks, .*SkipNet.* can be rebuilt"):
            save(kind(8, width=4), tmp_path / "x.safetensors", card={})
    with pytest.raises(CheckpointError, match="ResNet cannot be saved"):
        save(ResNet(8, width=4), tmp_path / "x.safetensors", card={})  # type: ignore[arg-type]


def test_every_exported_dynamic_network_can_be_named_by_a_card() -> None:
    exported = {name for name in gatewatt.networks.__all__ if isinstance(getattr(gatewatt.networks, name), type)}
    dynamic = {name for name in exported if issubclass(getattr(gatewatt.networks, name), DynamicNetwork)}
    assert set(checkpoint.network_classes()) == dynamic
    assert "SkipNet" in dynamic


def test_float64_weights_are_not_rounded_in_silence(network: SkipNet, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is float64 and would be rounded; call network.float\(\) first"):
        save(network.double(), tmp_path / "x.safetensors", card={})


def test_a_weight_too_large_for_float16_is_refused_as_half(network: SkipNet, tmp_path: Path) -> None:
    network.state_dict()["trunk.head.bias"][0] = 7e4
    with pytest.raises(CheckpointError, match="SkipNet in float16 holds NaN or infinity in trunk.head.bias"):
        save(network, tmp_path / "x.safetensors", card={}, half=True)
    save(network, tmp_path / "x.safetensors", card={})


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(
    saved: Path, network: SkipNet, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.parent.iterdir()}

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), full)
    network.trunk.head.bias.data += 1
    with pytest.raises(OSError, match="No space left"):
        save(network, saved, card=CARD, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.parent.iterdir()} == before


def test_a_kill_between_weights_and_card_is_noticed(saved: Path, network: SkipNet, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = checkpoint.write_atomically, []

    def interrupted(file: Path, content: bytes) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(file)
        write(file, content)

    monkeypatch.setattr(checkpoint, "write_atomically", interrupted)
    network.trunk.head.bias.data += 1
    with pytest.raises(KeyboardInterrupt):
        save(network, saved, card=CARD, overwrite=True)
    assert "is not the file of its card" in refused(saved)
