"""What the vision transformers share, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from gatewatt.networks import AViT
from gatewatt.networks.vit import attend, drop_paths, sequence


@pytest.mark.parametrize("added", [False, True])
def test_attention_is_torchs_and_shows_its_logits(added: bool) -> None:
    qkv, extra = torch.randn(2, 7, 3 * 12, dtype=torch.float64), torch.randn(2, 3, 7, 7, dtype=torch.float64)
    query, key, value = (part.unflatten(2, (3, 4)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=extra if added else None)
    mixed, logits = attend(qkv, 3, extra if added else None)
    torch.testing.assert_close(mixed, expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(logits, torch.einsum("bhqd,bhkd->bhqk", query, key) / 2 + (extra if added else 0))


def test_a_sequence_is_the_class_token_and_the_patches_row_by_row() -> None:
    patches, positions = torch.arange(12.0).view(1, 2, 2, 3), torch.zeros(1, 7, 2)
    tokens = sequence(patches.expand(4, -1, -1, -1), torch.full((1, 1, 2), -1.0), positions)
    assert tokens.shape == (4, 7, 2)
    assert tokens[3].tolist() == [[-1, -1], [0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]


def test_the_first_block_always_runs_and_a_single_one_too() -> None:
    assert [drop.p for drop in drop_paths(0.3, 4)] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [drop.p for drop in drop_paths(0.3, 1)] == [0]


def test_avit_drops_layers_in_training_alone() -> None:
    network, images = AViT("small-32", 10, dim=12, depth=4, heads=2, patch=8, drop_path=0.5), torch.rand(16, 3, 32, 32)
    with torch.no_grad():
        network.train()
        assert not torch.equal(network(images).logits, network(images).logits)
        network.eval()
        assert torch.equal(network(images).logits, network(images).logits)
