"""The faster hash encoding and scene contraction, compared with nerfstudio's; which modules are replaced."""

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
    """Return nerfstudio's encoding and the faster one with the same table."""
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
def test_values_and_gradients_equal_nerfstudios(levels, base, finest, log2, features, shape, seed) -> None:
    slow, fast = build(levels, base, finest, log2, features, seed)
    positions = torch.rand(*shape, 3)
    scaled = positions[..., None, :] * slow.scalings.view(-1, 1)
    assume(bool((scaled != scaled.floor()).all()))  # the gradient is discontinuous on cell boundaries
    cotangent = torch.rand(*shape, levels * features)
    results = []
    for encoding in (slow, fast):
        x = positions.clone().requires_grad_()
        encoded = encoding(x)
        (encoded * cotangent).sum().backward()
        results.append((encoded.detach(), encoding.hash_table.grad, x.grad))
    for expected, actual in zip(*results):
        assert expected.shape == actual.shape
        # The gradient with respect to positions grows with the resolution of the level.
        assert torch.allclose(
            actual, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max()) if expected.numel() else 0)
        )


def test_values_at_the_corners_of_cells_equal_nerfstudios() -> None:
    slow, fast = build(3, 4, 16, 12, 2, 0)
    corners = torch.tensor([[0.0, 0.0, 0.0], [0.25, 0.5, 0.75], [1.0, 1.0, 1.0], [0.0, 1.0, 0.5]])
    assert torch.allclose(fast(corners), slow(corners), atol=1e-6)


def test_only_the_table_gets_a_gradient_for_plain_positions() -> None:
    slow, fast = build(2, 4, 16, 8, 2, 0)
    positions = torch.rand(5, 3)
    for encoding in (slow, fast):
        encoding(positions).square().sum().backward()
    assert positions.grad is None
    assert torch.allclose(fast.hash_table.grad, slow.hash_table.grad, atol=1e-6) and fast.hash_table.grad.any()


def test_autocast_does_not_change_the_encoding() -> None:
    _, fast = build(2, 4, 16, 8, 2, 0)
    positions = torch.rand(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(positions), fast(positions.clone()))
        inside = fast(positions)
    assert inside.dtype == torch.float32 and torch.equal(inside, fast(positions))


def test_parameter_names_and_other_modules_are_unchanged() -> None:
    slow, fast = build(2, 4, 16, 8, 2, 0)
    assert slow.state_dict().keys() == fast.state_dict().keys()
    modules = torch.nn.ModuleList([torch.nn.Linear(2, 2), slow])
    use_fast_encodings(modules)
    assert type(modules[0]) is torch.nn.Linear and type(modules[1]) is FastHashEncoding


def test_tiny_cuda_nn_encodings_are_not_replaced() -> None:
    slow, _ = build(2, 4, 16, 8, 2, 0)
    slow.tcnn_encoding = torch.nn.Identity()
    use_fast_encodings(slow)
    assert type(slow) is HashEncoding


@given(shapes, st.floats(0.1, 100), st.integers(0, 2**20))
def test_contraction_and_gradients_equal_nerfstudios(shape, scale, seed) -> None:
    torch.manual_seed(seed)
    positions = torch.cat(
        [torch.randn(*shape, 3).flatten(0, -2), torch.tensor([[0.0, 0, 0], [1, -0.5, 0], [0, 0, -7]])]
    )
    cotangent, results = torch.randn(positions.shape), []
    slow, fast = SceneContraction(order=float("inf")), SceneContraction(order=float("inf"))
    use_fast_encodings(fast)
    assert type(fast) is FastSceneContraction
    for contraction in (slow, fast):
        x = (scale * positions).requires_grad_()
        contracted = contraction(x)
        (contracted * cotangent).sum().backward()
        results.append((contracted.detach(), x.grad))
    (expected, expected_gradient), (actual, actual_gradient) = results
    assert torch.equal(actual, expected) and actual.abs().max() < 2
    nonzero = positions.abs().amax(dim=-1) > 0  # at 0 every coordinate is a maximum
    assert torch.allclose(actual_gradient[nonzero], expected_gradient[nonzero], rtol=1e-4, atol=1e-6)


def test_contractions_of_other_orders_are_not_replaced() -> None:
    contraction = SceneContraction(order=2)
    use_fast_encodings(contraction)
    assert type(contraction) is SceneContraction


@pytest.mark.parametrize("size", [1 << 3, 1 << 19])
def test_entries_belong_to_their_own_level(size: int) -> None:
    _, fast = build(4, 4, 4096, size.bit_length() - 1, 2, 0)
    entries = fast._entries((torch.rand(3, 4, 50) * 4096).int())
    assert entries.shape == (8, 4, 50)
    assert (entries // size == torch.arange(4)[:, None]).all()
