"""Flow matching: an editor presented as a flow-matching model gives the same maps and edits.

Tested with the embedded editor (v-prediction) and an untrained eps-prediction editor.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flow_editor import FlowEditor, as_flow
from test_edit import smooth_images, some_mask
from test_local_edit import toy_image

from wys_nerfstudio import relevance
from wys_nerfstudio.editing import EMBEDDED, Editor, EditSettings, edit_image, edit_images, load_editor, relevance_maps
from wys_nerfstudio.editing.stable_diffusion import StableDiffusionEditor
from wys_nerfstudio.evaluation.metrics import psnr

INSTRUCTION = "turn the bear into a panda"
MAP_TOLERANCE = 1e-3
"""Largest difference of normalized maps; they are in [0, 1]."""
GUIDANCE = [(7.5, 1.5), (1.0, 1.0)]


@pytest.fixture(scope="module", params=["embedded", "untrained"])
def editor(request: pytest.FixtureRequest, editor_folder: Path) -> StableDiffusionEditor:
    loaded = load_editor(EMBEDDED if request.param == "embedded" else str(editor_folder))
    assert isinstance(loaded, StableDiffusionEditor)
    assert loaded.prediction_type == ("v_prediction" if request.param == "embedded" else "epsilon")
    return loaded


def images_for(editor: StableDiffusionEditor, seed: int = 0) -> torch.Tensor:
    if editor.name == EMBEDDED:
        image = toy_image()
        return torch.stack([image, image.flip(1)]) if seed == 0 else torch.stack([image.flip(1), image])
    return smooth_images(2, seed=seed)


def test_the_wrapper_preserves_the_signal_to_noise_ratio(editor):
    flow = FlowEditor(editor)
    assert isinstance(flow, Editor)
    for original, level in zip(editor.noise_levels(1.0, 20, (8, 8))[:-1], flow.noise_levels(1.0, 20, (8, 8))[:-1]):
        assert level.signal + level.noise == pytest.approx(1)
        assert level.noise / level.signal == pytest.approx(original.noise / original.signal)
        assert flow.timestep(level.time) == original.time
    assert as_flow(editor.noise_level(0.8, (8, 8))).noise == pytest.approx(0.8, abs=0.1)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_relevance_maps_are_equal(editor, num_samples):
    arguments = {"instruction": INSTRUCTION, "num_samples": num_samples, "seeds": [3, 4]}
    images = images_for(editor)
    expected, flows = (next(relevance_maps(e, images, **arguments)) for e in (editor, FlowEditor(editor)))
    assert float((relevance.normalize(expected) - relevance.normalize(flows)).abs().max()) <= MAP_TOLERANCE
    torch.testing.assert_close(flows, expected, rtol=1e-3, atol=1e-5)
    assert float(relevance.normalize(expected).std()) > 0.05


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scales", GUIDANCE)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_edits_are_equal(editor, masked, scales, strength):
    render, reference = images_for(editor, seed=1), images_for(editor)
    height, width = reference.shape[1:3]
    mask = some_mask(2, height, width) if masked else torch.ones(reference.shape[:3], dtype=torch.bool)
    expected, flows = (
        edit_images(e, render, reference, mask, INSTRUCTION, EditSettings(*scales, 10), strength=strength, seeds=[5, 6])
        for e in (editor, FlowEditor(editor))
    )
    assert psnr(flows, expected, mask) >= 60
    assert torch.equal(flows[~mask], reference[~mask])
    assert psnr(expected, reference, mask) < 40


@pytest.mark.parametrize("method", ["local", "sds"])
@pytest.mark.parametrize("scales", GUIDANCE)
def test_edit_image_results_are_equal(editor, method, scales):
    image, settings = images_for(editor)[0], EditSettings(*scales, 8, mask_threshold=0.4, method=method)
    expected, flows = (edit_image(e, image, INSTRUCTION, settings, seed=2) for e in (editor, FlowEditor(editor)))
    torch.testing.assert_close(flows.relevance, expected.relevance, atol=MAP_TOLERANCE, rtol=0)
    assert float((flows.mask != expected.mask).float().mean()) <= 0.002
    assert 0 < int(expected.mask.sum()) < expected.mask.numel()
    both = flows.mask & expected.mask
    assert psnr(flows.edited, expected.edited, both) >= 60
    assert not torch.equal(expected.edited, image)


def test_a_wrong_parametrization_changes_the_edits(editor):
    class Wrong(FlowEditor):
        def split(self, prediction, latents, level):
            clean, noise = super().split(prediction, latents, level)
            return clean, noise * 1.05

    images = images_for(editor)
    full_mask = torch.ones(images.shape[:3], dtype=torch.bool)
    settings = replace(EditSettings(), diffusion_steps=10)
    expected, wrong = (
        edit_images(e, images, images, full_mask, INSTRUCTION, settings, strength=1.0, seeds=[5, 6])
        for e in (editor, Wrong(editor))
    )
    assert psnr(wrong, expected) < 60
