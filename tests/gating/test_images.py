"""What is refused before it can look like an efficient image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gatewatt.gating import DynamicOutput, Gate, check_finite, check_images, check_labels


def with_pixel(value: float) -> Tensor:
    batch = torch.full((3, 3, 4, 4), 0.5)
    batch[2, 1, 3, 0] = value
    return batch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pixels_from_zero_to_one_inclusive_are_images(dtype: torch.dtype) -> None:
    check_images(torch.tensor([0.0, 0.5, 1.0], dtype=dtype).view(1, 3, 1, 1))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (with_pixel(float("nan")), "must be finite; image 2 of the batch"),
        (with_pixel(float("inf")), "must be finite; image 2 of the batch"),
        (with_pixel(-float("inf")), "must be finite; image 2 of the batch"),
        (with_pixel(1.0000001), r"must be in \[0, 1\]; image 2 of the batch spans 0.5 to 1"),
        (with_pixel(-0.25), r"must be in \[0, 1\]; image 2 of the batch spans -0.25 to 0.5"),
        (255 * torch.ones(1, 3, 2, 2), "image 0 of the batch spans 255 to 255"),
        (torch.rand(3, 4, 4), r"shape \(B, 3, H, W\) with B, H, W >= 1, got \(3, 4, 4\)"),
        (torch.rand(2, 1, 4, 4), r"got \(2, 1, 4, 4\)"),
        (torch.rand(2, 4, 4, 3), r"got \(2, 4, 4, 3\)"),
        (torch.rand(0, 3, 4, 4), r"got \(0, 3, 4, 4\)"),
        (torch.rand(1, 3, 0, 4), r"got \(1, 3, 0, 4\)"),
    ],
    ids=["nan", "inf", "-inf", "above 1", "below 0", "bytes as floats", "no batch", "grey", "channels last", "empty batch", "empty image"],
)
def test_what_is_no_image_is_refused_and_named(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_images(images)


@pytest.mark.parametrize(("images", "name"), [(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "torch.uint8"), ([[0.0]], "list"), (None, "NoneType")])
def test_what_is_no_float_tensor_is_a_type_error(images: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"floating-point tensor in .0, 1., got {name}"):
        check_images(images)


def test_there_is_one_label_per_image() -> None:
    check_labels(torch.zeros(3, dtype=torch.long), torch.rand(3, 3, 4, 4))
    with pytest.raises(ValueError, match=r"shape \(3,\), one per image, got \(2,\)"):
        check_labels(torch.zeros(2, dtype=torch.long), torch.rand(3, 3, 4, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["logits", "the scores of gate 'a'"])
def test_a_non_finite_output_names_its_image(value: float, name: str) -> None:
    output = DynamicOutput(torch.zeros(3, 10), {"a": Gate(torch.rand(3, 2), torch.tensor(0.5), torch.ones(3, 2))})
    check_finite(output)
    (output.logits if name == "logits" else output.gates["a"].score)[1, 1] = value
    with pytest.raises(ValueError, match=f"{name} hold NaN or infinity for image 1 of the batch"):
        check_finite(output)
