"""The edit loop on a stub scene: a list of images that is "trained" by copying the edited views."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from PIL import Image
from torch import Tensor

from wys_nerfstudio.editing import EMBEDDED, Editor, EditSettings, edit_images, load_editor
from wys_nerfstudio.editing.editor import EditorProfile, resize_images
from wys_nerfstudio.editing.sampling import edit_seed
from wys_nerfstudio.relevance import resize
from wys_nerfstudio.relevance.localizer import available_localizations
from wys_nerfstudio.training import edit_log, edit_loop, schedule
from wys_nerfstudio.training.edit_loop import EditLoop
from wys_nerfstudio.training.scene import EditInput, LoopOptions, Scene, TrainingViews
from wys_nerfstudio.training.settings import RunSettings, Settings
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.visualization import apply_colormap, read_png

INSTRUCTION = "turn the bear into a panda"
OTHER_INSTRUCTION = "paint the ball red"
HEIGHT, WIDTH, NUM_VIEWS = 32, 48, 3
CAMERAS = object()
"""The loop only passes cameras on."""


@dataclass
class StubScene:
    """A list of images and their relevance; depth is 2 everywhere."""

    images: Float[Tensor, "n h w 3"]
    relevance: Float[Tensor, "n h w"]
    device: torch.device = torch.device("cpu")
    rendered_pixels: list[int] = field(default_factory=list)
    hulls: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    hull_of_given_masks: bool = False

    def render_pixels(self, cameras: object, view: int, where: Bool[Tensor, "h w"]) -> tuple[Tensor, Tensor, Tensor]:
        assert cameras is CAMERAS
        self.rendered_pixels.append(int(where.sum()))
        colors = resize_images(self.images[view : view + 1], *where.shape)[0]
        values = resize(self.relevance[view : view + 1], *where.shape)[0]
        return colors[where], values[where], torch.full((int(where.sum()),), 2.0)

    def pose_corrected_camera(self, cameras: Cameras, view: int) -> Cameras:
        return cameras[view : view + 1]

    def needs_visual_hull(self) -> bool:
        return not self.hulls

    def build_visual_hull(
        self, cameras: object, maps: Tensor, unclamped_maps: Tensor, depths: Tensor, given_masks: bool = False
    ) -> None:
        assert (depths == 2).all()
        self.hull_of_given_masks = given_masks
        self.hulls.append((tuple(maps.shape), tuple(unclamped_maps.shape), tuple(depths.shape)))

    def reset_relevance(self) -> None:
        self.relevance = torch.zeros_like(self.relevance)


@dataclass
class StubViews:
    """Training views as two stacks of images."""

    captured: Float[Tensor, "n h w 3"]
    relevance_maps: Float[Tensor, "n h w"]
    cameras: object = CAMERAS

    def __post_init__(self) -> None:
        self.current = self.captured.clone()
        self.unclamped_maps = self.relevance_maps
        self.edited_views: set[int] = set()
        self.num_views, *size = self.captured.shape[:3]
        self.view_size = tuple(size)
        self.view_names = [f"view_{i}" for i in range(self.num_views)]

    def captured_views(self, views: list[int]) -> Tensor:
        return self.captured[views]

    reference_views = captured_views

    def current_views(self, views: list[int]) -> Tensor:
        return self.current[views]

    def edit_views(
        self,
        editor: Editor,
        inputs: list[EditInput],
        instruction: str,
        settings: EditSettings,
        *,
        strength: float,
        seeds: list[int],
    ) -> Tensor:
        reference = self.reference_views([i.view for i in inputs])
        start = torch.where(
            torch.stack([i.rendered for i in inputs])[..., None],
            torch.stack([i.render for i in inputs]),
            resize_images(reference, *inputs[0].render.shape[:2]),
        )
        mask = torch.stack([i.mask for i in inputs])
        return edit_images(editor, start, reference, mask, instruction, settings, strength=strength, seeds=seeds)

    def set_view(self, view: int, image: Tensor) -> None:
        self.current[view] = image
        self.edited_views.add(view)


@dataclass
class StubOptions:
    """Constant options."""

    seed: int = 5
    min_strength: float = 0.6
    max_strength: float = 0.9
    resolution: int = 48

    def edit_settings(self, settings: RunSettings, profile: EditorProfile) -> EditSettings:
        return EditSettings(
            guidance_scale=settings.guidance_scale,
            image_guidance_scale=settings.image_guidance_scale,
            mask_threshold=settings.mask_threshold,
            diffusion_steps=4,
            resolution=self.resolution,
        )

    def preview_map(self, editor: Editor, views: StubViews, view: int, instruction: str) -> Tensor:
        assert instruction == OTHER_INSTRUCTION
        return block(slice(0, 8), slice(0, 8))


def block(rows: slice, columns: slice) -> Float[Tensor, "h w"]:
    """Relevance 1 in a block of the view, 0 elsewhere."""
    values = torch.zeros(HEIGHT, WIDTH)
    values[rows, columns] = 1.0
    return values


FIELD, MAP = block(slice(8, 24), slice(16, 32)), block(slice(4, 12), slice(28, 44))
"""The stub's relevance field and its views' relevance maps differ, so that masks show their source."""


@dataclass
class Stub:
    """An edit loop and everything around it."""

    loop: EditLoop
    scene: StubScene
    views: StubViews
    settings: Settings
    options: StubOptions

    def next_view(self) -> int:
        """View of the next edit."""
        return schedule.view_of_edit(self.options.seed, self.loop.edits, self.views.num_views)


@pytest.fixture(scope="module")
def editor() -> Editor:
    return load_editor(EMBEDDED)


@pytest.fixture
def make_stub(editor: Editor):
    def make(
        localization: str = "relevance-field", overlap: bool = False, edit_count: int = 1, resolution: int = 48
    ) -> Stub:
        generator = torch.Generator().manual_seed(3)
        images = resize_images(torch.rand(NUM_VIEWS, 4, 6, 3, generator=generator), HEIGHT, WIDTH)
        scene = StubScene(images, FIELD.expand(NUM_VIEWS, -1, -1).clone())
        views = StubViews(images.clone(), MAP.expand(NUM_VIEWS, -1, -1).clone())
        values = RunSettings(
            instruction=INSTRUCTION,
            mask_threshold=0.5,
            guidance_scale=3.0,
            image_guidance_scale=1.5,
            localization=localization,  # type: ignore
            edit_every=1,
            edit_count=edit_count,
        )
        settings = Settings(values, available_localizations(has_masks=localization == "masks"))
        options = StubOptions(resolution=resolution)
        loop = EditLoop(options, settings, scene, views, lambda: editor, overlap)  # type: ignore
        return Stub(loop, scene, views, settings, options)

    return make


def test_stubs_implement_the_protocols(make_stub):
    stub = make_stub()
    assert isinstance(stub.scene, Scene) and isinstance(stub.views, TrainingViews)
    assert isinstance(stub.options, LoopOptions)


def test_the_edit_loop_imports_no_nerfacto():
    code = (
        "import sys, wys_nerfstudio.training.edit_loop\n"
        "print([m for m in sys.modules if m.startswith(('nerfstudio.models', 'nerfstudio.fields', 'wys_nerfstudio.model'))])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_edit_is_the_seeded_masked_edit_of_the_render(make_stub, editor, tmp_path):
    stub = make_stub()
    view, number = stub.next_view(), stub.loop.edits
    stub.loop.edit(step=0, folder=tmp_path)
    strength = schedule.strength_of_edit(5, number, 0.6, 0.9)
    expected = edit_images(
        editor,
        stub.views.captured[[view]],
        stub.views.captured[[view]],
        FIELD[None] >= 0.5,
        INSTRUCTION,
        stub.options.edit_settings(stub.settings.current, editor.profile),
        strength=strength,
        seeds=[edit_seed(5, number)],
    )
    torch.testing.assert_close(stub.views.current[view], expected[0])
    assert (stub.views.current[view] != stub.views.captured[view]).any()
    assert stub.views.edited_views == {view}


def test_edits_start_from_the_scene_as_it_is_now(make_stub, tmp_path):
    results = []
    for brightness in (0.0, 0.2):
        stub = make_stub()
        stub.scene.images = (stub.scene.images + brightness).clamp(0, 1)
        view = stub.next_view()
        stub.loop.edit(step=0, folder=tmp_path)
        results.append(stub.views.current[view])
    assert (results[0] != results[1]).any()


@pytest.mark.parametrize(
    ("localization", "mask"),
    [("relevance-field", FIELD), ("relevance-map", MAP), ("masks", MAP), ("none", torch.ones(HEIGHT, WIDTH))],
)
def test_views_change_only_where_the_localizer_allows(make_stub, localization, mask, tmp_path):
    stub = make_stub(localization)
    for step in range(NUM_VIEWS):
        stub.loop.edit(step, tmp_path)
        stub.scene.images = stub.views.current.clone()
    assert stub.views.edited_views == set(range(NUM_VIEWS))
    changed = (stub.views.current != stub.views.captured).any(dim=-1)
    assert not (changed & (mask < 0.5)).any()
    assert (changed[:, mask >= 0.5]).float().mean() > 0.9
    lines = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    assert [line["mask_fraction"] for line in lines] == [round(float(mask.mean()), 5)] * NUM_VIEWS


def test_a_change_of_settings_applies_to_the_next_edit(make_stub, tmp_path):
    stub = make_stub()
    for localization, mask in (("relevance-field", FIELD), ("relevance-map", MAP)):
        stub.settings.update(localization=localization)
        before, view = stub.views.current.clone(), stub.next_view()
        stub.loop.edit(step=0, folder=tmp_path)
        changed = (stub.views.current[view] != before[view]).any(dim=-1)
        assert changed.any() and not (changed & (mask < 0.5)).any()


def test_a_view_with_an_empty_mask_is_skipped(make_stub, tmp_path):
    stub = make_stub()
    stub.scene.relevance[:] = 0.0
    stub.loop.edit(step=4, folder=tmp_path)
    assert (stub.loop.edits, stub.loop.skipped, stub.views.edited_views) == (1, 1, set())
    record = json.loads((tmp_path / "edits.jsonl").read_text())
    assert (record["step"], record["steps"], record["mask_fraction"]) == (4, 0, 0)


def test_only_pixels_near_the_mask_are_rendered(make_stub):
    stub = make_stub()
    edit_input = stub.loop.prepare_edit(0)
    coarse, fine = stub.scene.rendered_pixels
    assert coarse < fine == int(edit_input.rendered.sum()) < HEIGHT * WIDTH
    assert (edit_input.rendered | ~edit_input.mask).all()
    assert not edit_input.render[~edit_input.rendered].any()


def test_overlapped_edits_are_committed_when_the_next_are_due(make_stub, tmp_path):
    serial, overlapped = make_stub(), make_stub(overlap=True)
    for step in range(2):
        serial.loop.edit(step, tmp_path / "serial")
        overlapped.loop.edit(step, tmp_path / "overlapped")
        assert len(overlapped.views.edited_views) == step
        assert len(overlapped.loop.pending()) == 1
    overlapped.loop.commit(2, tmp_path / "overlapped")
    torch.testing.assert_close(overlapped.views.current, serial.views.current, rtol=0, atol=0)


def test_pending_edits_are_restored_from_plain_data(make_stub, tmp_path):
    whole, stopped, resumed = make_stub(), make_stub(overlap=True), make_stub(overlap=True)
    whole.loop.edit(0, tmp_path / "whole")
    stopped.loop.edit(0, tmp_path / "stopped")
    resumed.loop.load_state(stopped.loop.edits, [vars(edit) for edit in stopped.loop.pending()])
    resumed.loop.commit(0, tmp_path / "resumed")
    assert resumed.loop.edits == 1
    torch.testing.assert_close(resumed.views.current, whole.views.current, rtol=0, atol=0)


def test_loading_a_state_discards_pending_edits(make_stub, tmp_path):
    stub = make_stub(overlap=True)
    stub.loop.edit(0, tmp_path)
    stub.loop.load_state(0, [])
    stub.loop.commit(1, tmp_path)
    assert stub.views.edited_views == set() and not (tmp_path / "edits.jsonl").exists()


def test_several_views_are_edited_in_one_batch(make_stub, tmp_path):
    stub = make_stub(edit_count=2)
    views = [schedule.view_of_edit(5, number, NUM_VIEWS) for number in range(2)]
    stub.loop.edit(step=0, folder=tmp_path)
    assert stub.loop.edits == 2 and stub.views.edited_views == set(views)


def test_an_error_of_the_editor_reaches_the_training_loop(make_stub, tmp_path, monkeypatch):
    stub = make_stub(overlap=True)

    def fail(*arguments: object, **named: object) -> None:
        raise WysError("The editor failed.")

    monkeypatch.setattr(stub.views, "edit_views", fail)
    stub.loop.edit(0, tmp_path)
    with pytest.raises(WysError, match="The editor failed"):
        stub.loop.edit(1, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("overlap", [False, True])
def test_edits_that_are_not_finite_change_no_view(make_stub, tmp_path, monkeypatch, value, overlap):
    stub = make_stub(overlap=overlap)
    name = stub.views.view_names[stub.next_view()]
    edit_views = stub.views.edit_views
    monkeypatch.setattr(stub.views, "edit_views", lambda *a, **named: edit_views(*a, **named).fill_(value))
    sentence = f"the edit of {name} became NaN or Inf. Resume with --pipeline.editor-dtype float32"
    with pytest.raises(WysError, match=sentence):
        stub.loop.edit(0, tmp_path)
        stub.loop.commit(1, tmp_path)
    with pytest.raises(WysError, match="the edit of view_1 became NaN or Inf"):
        stub.loop.preview(1, INSTRUCTION)
    assert torch.equal(stub.views.current, stub.views.captured)
    assert not (tmp_path / "edits.jsonl").exists()


def test_preview_changes_nothing(make_stub):
    stub = make_stub()
    before, mask, edited = stub.loop.preview(1, INSTRUCTION)
    assert torch.equal(before, stub.views.captured[1]) and torch.equal(mask, FIELD >= 0.5)
    assert (edited != before).any() and torch.equal(edited[~mask], before[~mask])
    assert stub.loop.edits == 0 and stub.views.edited_views == set()
    assert torch.equal(stub.views.current, stub.views.captured)


def test_preview_of_another_instruction_uses_a_map_of_that_view(make_stub):
    _, mask, _ = make_stub().loop.preview(1, OTHER_INSTRUCTION)
    assert torch.equal(mask, block(slice(0, 8), slice(0, 8)) >= 0.5)


def test_preview_without_relevant_pixels_is_refused(make_stub):
    stub = make_stub()
    stub.scene.relevance[:] = 0.2
    with pytest.raises(WysError, match="Nothing in view_2 is relevant at this threshold: lower it, or choose another"):
        stub.loop.preview(2, INSTRUCTION)


def test_the_visual_hull_is_built_once_from_all_views(make_stub, editor):
    stub = make_stub()
    for _ in range(2):
        stub.loop.build_visual_hull()
    sizes = (NUM_VIEWS, HEIGHT, WIDTH)
    assert stub.scene.hulls == [
        (sizes, sizes, (NUM_VIEWS, *editor.latent_size(*editor.editing_size(HEIGHT, WIDTH, 48))))
    ]


@pytest.mark.parametrize("given", [True, False])
def test_the_scene_is_told_whether_masks_are_given(make_stub, given):
    stub = make_stub("masks" if given else "relevance-map")
    if given:
        stub.views.relevance_maps = stub.views.unclamped_maps = stub.views.relevance_maps > 0.5
    stub.loop.build_visual_hull()
    assert stub.scene.hull_of_given_masks == given


def test_no_visual_hull_without_relevance_maps(make_stub):
    stub = make_stub("none")
    stub.views.relevance_maps = None
    stub.loop.build_visual_hull()
    assert stub.scene.hulls == []


@pytest.mark.parametrize("localization", ["relevance-field", "masks", "none"])
@pytest.mark.parametrize(
    ("sheet_side", "resolution", "size", "rendered"),
    [(384, 48, (32, 48), (32, 48)), (24, 48, (16, 24), (16, 24)), (384, 24, (32, 48), (16, 24))],
)
def test_the_contact_sheet_has_a_limited_size(
    make_stub, tmp_path, monkeypatch, localization, sheet_side, resolution, size, rendered
):
    stub = make_stub(localization, resolution=resolution)
    monkeypatch.setattr(edit_loop, "SHEET_SIDE", sheet_side)
    assert stub.loop.write_contact_sheet(tmp_path, lambda: False)
    height, width = size
    assert stub.scene.rendered_pixels == [rendered[0] * rendered[1]] * NUM_VIEWS
    factor = -(-160 // height)
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width == 4 + 6 * (width * factor + 4)


@pytest.mark.parametrize("resolution", [48, 24])
def test_the_contact_sheet_enlarges_only_what_is_rendered(make_stub, tmp_path, resolution):
    stub = make_stub(resolution=resolution)
    stub.loop.write_contact_sheet(tmp_path, lambda: False)
    factor, small = -(-160 // HEIGHT), (HEIGHT * resolution // 48, resolution)
    sheet = read_png(tmp_path / "contact_sheet.png")
    cells = [
        sheet[18:][: HEIGHT * factor : factor, 4 + i * (WIDTH * factor + 4) :][:, : WIDTH * factor : factor]
        for i in range(6)
    ]
    value = resize(resize(stub.scene.relevance[:1], *small), HEIGHT, WIDTH)[0]
    render = resize_images(resize_images(stub.scene.images[:1], *small), HEIGHT, WIDTH)[0]
    expected = [stub.views.captured[0], apply_colormap(MAP), apply_colormap(value), (value >= 0.5)[..., None].expand(-1, -1, 3),
                stub.views.current[0], render]  # fmt: skip
    for cell, image in zip(cells, expected, strict=True):
        torch.testing.assert_close(cell, image.float(), atol=0.5 / 255 + 1e-6, rtol=0)


def test_the_contact_sheet_stops_between_two_renders(make_stub, tmp_path):
    stub = make_stub()
    assert stub.loop.write_contact_sheet(tmp_path, lambda: False)
    stub.scene.rendered_pixels.clear()
    assert not stub.loop.write_contact_sheet(tmp_path, lambda: len(stub.scene.rendered_pixels) == 2)
    assert len(stub.scene.rendered_pixels) == 2
    assert not list(tmp_path.iterdir()), "a sheet of an earlier moment is not left"


def test_images_for_tensorboard_are_reduced(make_stub, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(edit_log.writer, "EVENT_WRITERS", [None])
    monkeypatch.setattr(edit_log.writer, "put_image", lambda name, image, step: sent.append(image))
    monkeypatch.setattr(edit_log, "STRIP_SIDE", 24)
    stub = make_stub()
    view = stub.next_view()
    stub.loop.edit(0, tmp_path)
    (strip,) = sent
    assert strip.shape == (16, 5 * 24, 3)
    images = (stub.views.captured[view], stub.views.current[view])
    for cell, image in zip((strip[:, :24], strip[:, -24:]), images):
        torch.testing.assert_close(cell, image.view(16, 2, 24, 2, 3).mean(dim=(1, 3)))


def test_the_contact_sheet_has_a_progress_bar(make_stub, tmp_path, capsys):
    make_stub().loop.write_contact_sheet(tmp_path, lambda: False)
    assert re.search(r"Contact sheet .* 100% \d+:\d+:\d+", capsys.readouterr().out)
