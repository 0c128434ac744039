"""The faster hash encoding and scene contraction against nerfstudio's own: values, gradients, where they are put in place."""

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from nerfstudio.field_components.encodings import HashEncoding
from nerfstudio.field_components.spatial_distortions import SceneContraction

from wys_nerfstudio.utils.encodings import FastHashEncoding, FastSceneContraction, use_fast_encodings


def build(
    levels: int, base: int, finest: int, log2: int, features: int, seed: int
) -> tuple[HashEncoding, HashEncoding]:
    """nerfstudio's encoding, and the faster one with the same table."""
    torch.manual_seed(seed)
    slow = HashEncoding(levels, base, finest, log2, features, hash_init_scale=1.0, implementation="torch")
    fast = copy.deepcopy(slow)
    use_fast_encodings(fast)
    assert type(slow) is HashEncoding and type(fast) is FastHashEncoding
    return slow, fast


shapes = st.sampled_from([(0,), (1,), (7,), (2, 3), (4, 1, 2)])


@given(
    st.integers(2, 6), st.integers(2, 20), st.integers(21, 4096), st.integers(3, 19), st.sampled_from([1, 2, 4]), shapes,
    st.integers(0, 2**20),
)  # fmt: skip
def test_values_and_gradients_are_nerfstudios(levels, base, finest, log2, features, shape, seed) -> None:
    slow, fast = build(levels, base, finest, log2, features, seed)
    positions = torch.rand(*shape, 3)
    scaled = positions[..., None, :] * slow.scalings.view(-1, 1)
    assume(bool((scaled != scaled.floor()).all()))  # on a cell's wall the gradient by the position has two values
    toward = torch.rand(*shape, levels * features)
    results = []
    for encoding in (slow, fast):
        x = positions.clone().requires_grad_()
        encoded = encoding(x)
        (encoded * toward).sum().backward()
        results.append((encoded.detach(), encoding.hash_table.grad, x.grad))
    for theirs, ours in zip(*results):
        assert theirs.shape == ours.shape
        # The gradient by a position grows with the level's resolution.
        assert torch.allclose(
            ours, theirs, rtol=1e-4, atol=1e-5 * max(1.0, float(theirs.abs().max()) if theirs.numel() else 0)
        )


def test_on_the_corners_of_cells_values_are_nerfstudios_too() -> None:
    slow, fast = build(3, 4, 16, 12, 2, 0)
    corners = torch.tensor([[0.0, 0.0, 0.0], [0.25, 0.5, 0.75], [1.0, 1.0, 1.0], [0.0, 1.0, 0.5]])
    assert torch.allclose(fast(corners), slow(corners), atol=1e-6)


def test_positions_without_a_gradient_get_none_and_the_table_its_own() -> None:
    slow, fast = build(2, 4, 16, 8, 2, 0)
    positions = torch.rand(5, 3)
    for encoding in (slow, fast):
        encoding(positions).square().sum().backward()
    assert positions.grad is None
    assert torch.allclose(fast.hash_table.grad, slow.hash_table.grad, atol=1e-6) and fast.hash_table.grad.any()


def test_half_precision_around_it_changes_nothing() -> None:
    _, fast = build(2, 4, 16, 8, 2, 0)
    positions = torch.rand(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(positions), fast(positions.clone()))
        inside = fast(positions)
    assert inside.dtype == torch.float32 and torch.equal(inside, fast(positions))


def test_weights_keep_their_names_and_other_modules_stay() -> None:
    slow, fast = build(2, 4, 16, 8, 2, 0)
    assert slow.state_dict().keys() == fast.state_dict().keys()
    both = torch.nn.ModuleList([torch.nn.Linear(2, 2), slow])
    use_fast_encodings(both)
    assert type(both[0]) is torch.nn.Linear and type(both[1]) is FastHashEncoding


def test_encodings_of_tiny_cuda_nn_stay() -> None:
    slow, _ = build(2, 4, 16, 8, 2, 0)
    slow.tcnn_encoding = torch.nn.Identity()
    use_fast_encodings(slow)
    assert type(slow) is HashEncoding


@given(shapes, st.floats(0.1, 100), st.integers(0, 2**20))
def test_contracted_positions_and_gradients_are_nerfstudios(shape, scale, seed) -> None:
    torch.manual_seed(seed)
    positions = torch.cat(
        [torch.randn(*shape, 3).flatten(0, -2), torch.tensor([[0.0, 0, 0], [1, -0.5, 0], [0, 0, -7]])]
    )
    toward, results = torch.randn(positions.shape), []
    slow, fast = SceneContraction(order=float("inf")), SceneContraction(order=float("inf"))
    use_fast_encodings(fast)
    assert type(fast) is FastSceneContraction
    for contraction in (slow, fast):
        x = (scale * positions).requires_grad_()
        contracted = contraction(x)
        (contracted * toward).sum().backward()
        results.append((contracted.detach(), x.grad))
    (theirs, their_gradient), (ours, our_gradient) = results
    assert torch.equal(ours, theirs) and ours.abs().max() < 2
    away = positions.abs().amax(dim=-1) > 0  # where all coordinates are 0, each is the largest
    assert torch.allclose(our_gradient[away], their_gradient[away], rtol=1e-4, atol=1e-6)


def test_contractions_of_another_order_stay() -> None:
    contraction = SceneContraction(order=2)
    use_fast_encodings(contraction)
    assert type(contraction) is SceneContraction


@pytest.mark.parametrize("size", [1 << 3, 1 << 19])
def test_every_entry_is_of_its_own_level(size: int) -> None:
    _, fast = build(4, 4, 4096, size.bit_length() - 1, 2, 0)
    entries = fast._entries((torch.rand(3, 4, 50) * 4096).int())
    assert entries.shape == (8, 4, 50)
    assert (entries // size == torch.arange(4)[:, None]).all()
