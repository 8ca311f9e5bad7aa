"""Rows and summaries: round trips, refusals, merging, and figures against plain formulas."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gatewatt.metrics import ImageRecord, RecordError, image_records, merge_records, read_records, summarize, write_records, write_summary
from gatewatt.metrics.record import MAX_GATE_STRING, SUMMARY_KEYS, gate_strings, psnr_of_mse


@pytest.fixture(autouse=True)
def without_flushing(monkeypatch):
    """Flushing to disk can take seconds on a busy machine, and what a power cut leaves is not tested here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def row(image: int = 0, **changes) -> ImageRecord:
    """A valid row; a changed MSE brings its PSNR along."""
    cells = {
        "id": image,
        "label": 3,
        "prediction_clean": 3,
        "prediction_adversarial": 3,
        "prediction_adversarial_8bit": 2,
        "flops_dense": 100.0,
        "flops_clean": 40.0,
        "flops_adversarial": 70.0,
        "flops_adversarial_8bit": 60.0,
        "mse_levels2": 0.11,
        "linf_levels": 1.5,
        "mse_levels2_8bit": 0.2,
        "gates_clean": "0110",
        "gates_adversarial": "1110",
    } | changes
    cells.setdefault("psnr_db", psnr_of_mse(cells["mse_levels2"]))
    cells.setdefault("psnr_db_8bit", psnr_of_mse(cells["mse_levels2_8bit"]))
    return ImageRecord(**cells)


def summary_of(rows, **changes):
    """A summary with plain names."""
    settings = {
        "network": "SkipNet-38",
        "dataset": "digits",
        "attack": {"name": "GradMDM", "gamma": 100.0},
        "defense": None,
        "seed": 0,
        "wall_seconds": 2.0,
        "versions": {"torch": "2"},
        "recipe": "r.yaml",
    }
    return summarize(rows, **(settings | changes))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_written_is_read_back_to_the_last_bit(tmp_path, data):
    share = st.floats(0, 1)
    dense = data.draw(st.floats(1, 1e12))
    rows = [
        row(
            image,
            flops_dense=dense,
            flops_clean=dense * data.draw(share),
            flops_adversarial=dense * data.draw(share),
            flops_adversarial_8bit=dense * data.draw(share),
            mse_levels2=data.draw(st.floats(0, 65025)),
            mse_levels2_8bit=data.draw(st.floats(0, 65025)),
            gates_clean=data.draw(st.text("01", min_size=5, max_size=5)),
            gates_adversarial="11111",
        )
        for image in range(data.draw(st.integers(0, 4)))
    ]
    path = tmp_path / f"{sum(1 for _ in tmp_path.iterdir())}.csv"
    write_records(path, rows)
    assert read_records(path) == rows


def test_an_unchanged_image_and_a_network_with_too_many_units_round_trip(tmp_path):
    rows = [row(mse_levels2=0.0, linf_levels=0.0, gates_clean="", gates_adversarial="")]
    assert rows[0].psnr_db == math.inf
    assert read_records(write_records(tmp_path / "records.csv", rows)) == rows


def test_results_are_never_overwritten_and_leave_no_temporary_files(tmp_path):
    path = write_records(tmp_path / "run" / "records.csv", [row()])
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="never overwritten"):
        write_records(path, [])
    summary = write_summary(tmp_path / "run" / "summary.json", {"a": 1})
    with pytest.raises(FileExistsError, match="never overwritten"):
        write_summary(summary, {})
    assert path.read_bytes() == before
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["records.csv", "summary.json"]


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_records(tmp_path / "records.csv", [row()])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "column"),
    [
        ({"id": -1}, "id"),
        ({"flops_clean": math.nan}, "flops_clean"),
        ({"flops_adversarial": math.inf}, "flops_adversarial"),
        ({"flops_adversarial": 101.0}, "flops_adversarial"),
        ({"flops_dense": math.inf}, "flops_dense"),
        ({"mse_levels2": math.nan, "psnr_db": 1.0}, "mse_levels2"),
        ({"linf_levels": -1.0}, "linf_levels"),
        ({"psnr_db": 20.0}, "psnr_db"),
        ({"psnr_db": math.inf}, "psnr_db"),
        ({"psnr_db_8bit": math.nan}, "psnr_db_8bit"),
        ({"gates_clean": "01x0"}, "gates_clean"),
        ({"gates_adversarial": "01"}, "gates_adversarial"),
    ],
)
def test_a_row_that_cannot_be_is_refused_by_column(changes, column):
    with pytest.raises(RecordError, match=f"column '{column}'"):
        row(**changes)


HEADER = ",".join(field.name for field in fields(ImageRecord))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("70.0", "7O.0"), r"line 2, column 'flops_adversarial': expected a number, got '7O.0'"),
        (lambda text: text.replace("0,3,3,3,2", "0.5,3,3,3,2"), r"line 2, column 'id': expected a whole number, got '0.5'"),
        (lambda text: text.replace("70.0", "nan"), r"line 2, column 'flops_adversarial': must be finite"),
        (lambda text: text.replace("70.0,", ""), r"line 2: 15 cells, expected 16"),
        (lambda text: text.replace("flops_clean,", ""), r"line 1: column 'flops_clean' is missing"),
        (lambda text: text.replace("gates_clean,", "gates_clean,extra,"), r"line 1: column 'extra' is unknown"),
        (lambda text: text.replace("id,label", "label,id"), r"line 1: columns must be in this order"),
        (lambda text: text[:-3], r"line 3: cut off"),
        (lambda text: "", r"line 1: cut off"),
        (lambda text: text.replace("1,3,3,3,2", '1,"3,3,3,2'), r"line \d+: "),
        (lambda text: text + text.splitlines()[1].replace("0110,1110", "01,11") + "\n", r"line 4, column 'gates_clean': 2 units, line 2 has 4"),
        (lambda text: text.replace("0110", "0\x000"), r"line 2"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_with_its_place(tmp_path, damage, message):
    path = write_records(tmp_path / "records.csv", [row(0), row(1)])
    path.write_text(damage(path.read_text()))
    with pytest.raises(RecordError, match=message) as caught:
        read_records(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "records.csv").write_bytes(b"\x89PNG\xff\n")
    with pytest.raises(RecordError, match="not a text file"):
        read_records(tmp_path / "records.csv")


def test_a_file_cut_anywhere_is_never_read_as_whole(tmp_path):
    whole = write_records(tmp_path / "records.csv", [row(0), row(1), row(2)]).read_bytes()
    cut = tmp_path / "cut.csv"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(RecordError):
            merge_records([read_records(cut)], expected=3)


@settings(deadline=None)
@given(st.permutations(range(9)), st.integers(0, 9))
def test_two_parts_merge_to_the_rows_of_one_process(order, cut):
    rows = [row(image) for image in range(9)]
    shuffled = [rows[image] for image in order]
    assert merge_records([shuffled[:cut], shuffled[cut:]], expected=9) == rows


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1], "missing 2"),
        ([0, 1, 1], "missing 2; doubled 1"),
        ([0, 1, 2, 2], "doubled 2"),
        ([0, 1, 2, 7], "not expected 7"),
        ([], "0 rows for 3 images: missing 0, 1, 2"),
    ],
)
def test_gaps_and_doubles_are_named(ids, message):
    with pytest.raises(RecordError, match=message):
        merge_records([[row(image) for image in ids]], expected=3)


def test_part_of_a_split_merges_by_the_ids_it_was_to_hold():
    rows = [row(image) for image in (2, 5, 9)]
    assert merge_records([rows[1:], rows[:1]], expected=(9, 5, 2)) == rows
    with pytest.raises(RecordError, match="missing 3; not expected 9"):
        merge_records([rows], expected=(2, 3, 5))


def test_a_summary_has_the_agreed_keys_and_the_figures_of_plain_formulas():
    generator = np.random.default_rng(0)
    clean = generator.uniform(20, 90, 30)
    clean[0] = 100.0
    adversarial, rounded = (np.minimum(clean + generator.uniform(-5, 40, 30), 100) for _ in range(2))
    mse = generator.uniform(0.1, 5, 30)
    mse[:2] = 0
    rows = [
        row(
            image,
            flops_clean=clean[image],
            flops_adversarial=adversarial[image],
            flops_adversarial_8bit=rounded[image],
            mse_levels2=mse[image],
            prediction_adversarial=3 if image < 12 else 0,
            prediction_clean=3 if image < 27 else 0,
        )
        for image in range(30)
    ]
    summary = summary_of(rows[::-1])
    assert set(SUMMARY_KEYS) <= set(summary)
    expected = {
        "images": 30,
        "accuracy_clean": 0.9,
        "accuracy_adversarial": 0.4,
        "accuracy_adversarial_8bit": 0.0,
        "flops_dense": 100,
        "flops_clean": clean.mean(),
        "flops_clean_std": clean.std(),
        "flops_adversarial": adversarial.mean(),
        "flops_adversarial_p95": np.quantile(adversarial, 0.95),
        "flops_adversarial_max": adversarial.max(),
        "flops_adversarial_8bit": rounded.mean(),
        "recovery_percent": 100 * (adversarial - clean).sum() / (100 - clean).sum(),
        "recovery_8bit_percent": 100 * (rounded - clean).sum() / (100 - clean).sum(),
        "recovery_per_image_percent": np.mean(100 * (adversarial - clean)[1:] / (100 - clean)[1:]),
        "images_at_full_flops": 1,
        "images_left_out": 1,
        "mse_levels2": mse.mean(),
        "psnr_db": np.mean(10 * np.log10(255**2 / mse[2:])),
        "psnr_db_of_mean_mse": 10 * np.log10(255**2 / mse.mean()),
        "images_unchanged": 2,
        "linf_levels": 1.5,
        "mse_levels2_8bit": 0.2,
        "routes_clean": 1,
        "gates_static_clean_percent": 100,
        "images_per_second": 15,
    }
    assert {key: summary[key] for key in expected} == pytest.approx(expected)
    low, high = summary["recovery_percent_interval"]
    assert low < summary["recovery_percent"] < high


def test_a_summary_does_not_depend_on_the_order_of_its_rows():
    rows = [row(image, flops_adversarial=40.0 + image) for image in range(20)]
    assert summary_of(rows) == summary_of(rows[::-1])


def test_what_is_undefined_is_null_in_the_file(tmp_path):
    rows = [row(flops_clean=100.0, flops_adversarial=100.0, mse_levels2=0.0, gates_clean="", gates_adversarial="")]
    path = write_summary(tmp_path / "summary.json", summary_of(rows, seed=np.int64(3), recipe=[tmp_path / "a.yaml"]))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    summary = json.loads(path.read_text(), parse_constant=refuse)
    assert summary["recovery_percent"] is None
    assert summary["recovery_percent_interval"] == [None, None]
    assert summary["psnr_db"] is None
    assert summary["routes_clean"] is None
    assert summary["images_left_out"] == 1
    assert summary["seed"] == 3


def test_a_run_without_images_has_no_summary():
    with pytest.raises(RecordError, match="no rows"):
        summary_of([])


def batch(**changes):
    columns = {
        "ids": torch.tensor([4, 2]),
        "labels": torch.tensor([1, 0]),
        "prediction_clean": torch.tensor([1, 1]),
        "prediction_adversarial": torch.tensor([0, 0]),
        "prediction_adversarial_8bit": torch.tensor([1, 0]),
        "flops_dense": 2e9 + 1,
        "flops_clean": torch.tensor([1e9 + 1, 1e9], dtype=torch.float64),
        "flops_adversarial": torch.tensor([2e9 + 1, 1e9], dtype=torch.float64),
        "flops_adversarial_8bit": torch.tensor([2e9, 1e9], dtype=torch.float64),
        "mse_levels2": torch.tensor([0.11, 0.0], dtype=torch.float64),
        "linf_levels": torch.tensor([1.0, 0.0], dtype=torch.float64),
        "mse_levels2_8bit": torch.tensor([0.2, 0.0], dtype=torch.float64),
        "executed_clean": torch.tensor([[0.0, 1.0], [1.0, 1.0]], requires_grad=True),
        "executed_adversarial": torch.tensor([[1.0, 1.0], [1.0, 1.0]]),
    }
    return image_records(**(columns | changes))


def test_rows_of_a_batch_of_tensors():
    first, second = batch()
    assert (first.id, first.label, first.prediction_clean, first.prediction_adversarial, first.prediction_adversarial_8bit) == (4, 1, 1, 0, 1)
    assert (first.flops_dense, first.flops_clean, first.flops_adversarial, first.flops_adversarial_8bit) == (2e9 + 1, 1e9 + 1, 2e9 + 1, 2e9)
    assert (first.gates_clean, first.gates_adversarial) == ("01", "11")
    assert first.psnr_db == pytest.approx(57.7, abs=0.05)
    assert second.psnr_db == second.psnr_db_8bit == math.inf
    assert replace(first, id=5).id == 5


def test_a_bad_value_in_a_batch_names_image_and_column():
    with pytest.raises(RecordError, match="image 2, column 'flops_clean'"):
        batch(flops_clean=torch.tensor([1.0, math.nan], dtype=torch.float64))
    with pytest.raises(RecordError, match="image 4, column 'mse_levels2'"):
        batch(mse_levels2=torch.tensor([-1.0, 0.0]))
    with pytest.raises(ValueError, match="label must have one entry per image"):
        batch(labels=torch.tensor([1]))


def test_gate_strings_stop_at_the_stated_number_of_units():
    assert gate_strings(torch.ones(2, MAX_GATE_STRING)) == ["1" * MAX_GATE_STRING] * 2
    assert gate_strings(torch.ones(2, MAX_GATE_STRING + 1)) == ["", ""]
    with pytest.raises(ValueError, match="0 and 1 only"):
        gate_strings([[0.5]])


def test_reading_needs_no_torch():
    code = "import sys, gatewatt.metrics.record, gatewatt.reports; assert not {'torch', 'lightning', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_loads():
    import gatewatt.metrics as metrics

    assert all(getattr(metrics, name) is not None for name in metrics.__all__)
    assert set(metrics.__all__) <= set(dir(metrics))
    with pytest.raises(AttributeError, match="no_such"):
        _ = metrics.no_such
