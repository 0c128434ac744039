"""The training views: captured, edited, and their relevance maps. Edits views with an image editor under masks.

Ray batches are drawn from one cached stack of images, so an edit is a write into that stack.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.configs.dataparser_configs import AnnotatedDataParserUnion
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.pixel_samplers import PatchPixelSamplerConfig
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from rich.progress import track
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.editing import Editor, EditSettings, edit_images, relevance_maps
from wys_nerfstudio.editing.edit import check_finite
from wys_nerfstudio.editing.editor import resize_images
from wys_nerfstudio.editing.sampling import edit_seed
from wys_nerfstudio.relevance.cache import RelevanceRequest, find_maps, save_maps
from wys_nerfstudio.training.distributed import broadcast_from_main, gather, main_process_only, shard
from wys_nerfstudio.training.scene import EditInput
from wys_nerfstudio.training.validation import minimum, validate_ranges
from wys_nerfstudio.utils.data_checks import check_image
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.log_filters import ignore_warnings
from wys_nerfstudio.utils.memory_errors import is_memory_error
from wys_nerfstudio.utils.visualization import apply_colormap, to_uint8, write_png

REFERENCE_VIEWS = "reference"
"""Folder, beside the edited views, of the views that edits are conditioned on, if these are not the captured ones."""

MINIMA = {
    **minimum(1, "train_num_rays_per_batch", "eval_num_rays_per_batch", "edit_num_rays_per_batch"),
    **minimum(1, "edit_patch_size", "patch_size"),
}
"""Smallest allowed values of options."""


@dataclass
class WysDataManagerConfig(VanillaDataManagerConfig):
    """Options of the training views."""

    _target: type = field(default_factory=lambda: WysDataManager)
    dataparser: AnnotatedDataParserUnion = field(default_factory=NerfstudioDataParserConfig)
    """Format of the captured data."""
    train_num_rays_per_batch: int = 4096
    """Rays per step of the reconstruct and localize phases."""
    eval_num_rays_per_batch: int = 4096
    """Rays per evaluation step."""
    edit_num_rays_per_batch: int = 16384
    """Rays per step while the scene is edited, in the edit phase."""
    edit_patch_size: int = 32
    """Side in pixels of the patches for the perceptual loss in the edit phase."""
    images_on_gpu: bool = True
    """Keep the stack of training views on the training device."""

    def check(self) -> None:
        """Refuse options that cannot work.

        Raises:
            WysError: For the first such option.
        """
        validate_ranges("pipeline.datamanager.", self, MINIMA)
        if self.train_num_images_to_sample_from != -1:
            raise WysError(
                "All views are edited, so all must be in memory: leave out "
                "--pipeline.datamanager.train-num-images-to-sample-from."
            )


class WysDataManager(VanillaDataManager[InputDataset]):
    """Captured views, relevance maps and edited views of one scene; views are numbered as in the training dataset."""

    config: WysDataManagerConfig

    def __init__(self, config: WysDataManagerConfig, *arguments: Any, **named: Any) -> None:
        ignore_warnings()  # in ns-eval and other commands nothing of this package is built earlier
        try:
            super().__init__(config, *arguments, **named)
        # Errors of nerfstudio's parsers about data that they cannot read.
        except (AssertionError, LookupError, TypeError, ValueError, OSError, RuntimeError) as error:
            if is_memory_error(error):
                raise
            for path in getattr(getattr(self, "train_dataset", None), "image_filenames", []):
                check_image(path, "the capture", decode=True)
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise WysError(
                f'The data at "{config.data}" cannot be read ({type(error).__name__}: {first_line}): check them with another '
                "method of nerfstudio, or name their format at the end of the command."
            ) from error

    def setup_train(self) -> None:
        """Cache the captured views as one stack, in their own order; transparent pixels are black."""
        self._refuse_unequal_sizes()
        super().setup_train()
        batch = self.cached_batch
        order = batch["image_idx"].argsort()
        for key, value in batch.items():
            batch[key] = value[order.to(value.device)]
        self._files = (batch["image"] * 255).round().to(torch.uint8)
        self.edited_views: set[int] = set()
        """Views that differ from the captured ones."""
        self.set_background(0.0)

    def set_background(self, background: float) -> None:
        """Composite transparent pixels with a gray background in [0, 1]. All edits are undone."""
        self._captured = self._files
        if self._files.shape[-1] == 4:
            images = self._files.float() / 255
            images = images[..., :3] * images[..., 3:] + background * (1 - images[..., 3:])
            self._captured = (images * 255).round().to(torch.uint8)
        self._reference = self._captured
        self.cached_batch["image"] = self._captured.float() / 255

    def _refuse_unequal_sizes(self) -> None:
        cameras, files = self.train_dataset.cameras, self.train_dataset.image_filenames
        camera_sizes = [(int(width), int(height)) for width, height in zip(cameras.width, cameras.height)]
        for sizes in ([_size(path) for path in files], camera_sizes):
            odd = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
            if odd is not None:
                (width, height), (other_width, other_height) = sizes[0], sizes[odd]
                raise WysError(
                    f"All views must have one size, and {files[0].name} is {width}x{height} while {files[odd].name} is "
                    f"{other_width}x{other_height}: crop or resize them, for instance with ns-process-data."
                )

    @property
    def cached_batch(self) -> dict[str, Any]:
        """Stack that ray batches are drawn from."""
        return self.train_image_dataloader.cached_collated_batch  # type: ignore

    @property
    def cameras(self) -> Cameras:
        """Cameras of the training views."""
        return self.train_dataset.cameras

    @property
    def num_views(self) -> int:
        """Number of training views."""
        return len(self.train_dataset)

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of the views."""
        return self._captured.shape[1], self._captured.shape[2]

    @property
    def view_names(self) -> list[str]:
        """File name stem of each view, with its number in front if stems repeat."""
        stems = [path.stem for path in self.train_dataset.image_filenames]
        return stems if len(set(stems)) == len(stems) else [f"{i:05d}_{stem}" for i, stem in enumerate(stems)]

    def captured_views(self, views: Sequence[int]) -> Float[Tensor, "b h w 3"]:
        """Return views as captured, in [0, 1]."""
        return self._captured[list(views)].float() / 255

    def reference_views(self, views: Sequence[int]) -> Float[Tensor, "b h w 3"]:
        """Return what edits are conditioned on and keep outside their masks, in [0, 1]: the captured views, until an
        instruction is applied on top of another."""
        return self._reference[list(views)].float() / 255

    def current_views(self, views: Sequence[int]) -> Float[Tensor, "b h w 3"]:
        """Return views as training uses them now, in [0, 1]."""
        return self.cached_batch["image"][list(views)]

    # -------------------------------------------------------------------------------------------------- ray batches

    def check_patches(self) -> None:
        """Refuse patches that do not fit the views or the number of rays.

        Raises:
            WysError: If they do not.
        """
        side, rays = self.config.edit_patch_size, self.config.edit_num_rays_per_batch
        if side > min(self.view_size) or side**2 > rays:
            raise WysError(
                f"Patches of {side} pixels do not fit views of {self.view_size[1]}x{self.view_size[0]} and {rays} rays: "
                "lower --pipeline.datamanager.edit-patch-size or raise --pipeline.datamanager.edit-num-rays-per-batch."
            )

    def use_edit_rays(self, in_patches: bool) -> None:
        """Draw ray batches of the edit phase's size.

        Args:
            in_patches: Draw square patches, for the perceptual loss.

        Raises:
            WysError: As for `check_patches`.
        """
        rays = self.config.edit_num_rays_per_batch
        if in_patches:
            self.check_patches()
            sampler = PatchPixelSamplerConfig(patch_size=self.config.edit_patch_size)
            self.train_pixel_sampler = sampler.setup(num_rays_per_batch=rays)
        else:
            self.train_pixel_sampler = self._get_pixel_sampler(self.train_dataset, rays)

    def use_reconstruction_rays(self) -> None:
        """Draw ray batches of the reconstruct phase's size."""
        self.train_pixel_sampler = self._get_pixel_sampler(self.train_dataset, self.config.train_num_rays_per_batch)

    def next_train(self, step: int) -> tuple[RayBundle, dict]:
        """Return the next ray batch, with the `patch_size` of the edit phase."""
        ray_bundle, batch = super().next_train(step)
        batch["patch_size"] = self.config.edit_patch_size
        return ray_bundle, batch

    # ----------------------------------------------------------------------------------------------- relevance maps

    def make_relevance_maps(
        self,
        editor: Editor,
        request: RelevanceRequest,
        normalization: Literal["view", "scene"],
        outlier_factor: float,
        folder: Path,
        batch_size: int,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Collective: compute the relevance map of every reference view, or find it beside the run, and set it.

        Args:
            editor: The editor.
            request: What the maps depend on.
            normalization: As in `relevance.normalize`.
            outlier_factor: As in `relevance.normalize`.
            folder: Folder for `maps.safetensors` (raw maps) and one image per view.
            batch_size: Views per pass of the editor's network.
            report: Receives the number of maps that this process has computed, and of all its maps.
        """
        raw = broadcast_from_main(lambda: find_maps(folder, request, self.view_names))
        if raw is None:
            mine = shard(range(self.num_views))
            parts = self._raw_maps(editor, mine, request, batch_size)
            batches = -(-len(mine) // batch_size)
            bar = track(parts, description="Relevance maps", total=batches, console=CONSOLE)
            computed: list[Tensor] = []
            for part in bar:
                computed.extend(part.cpu())
                report(len(computed), len(mine))
            by_view = dict(pair for pairs in gather(list(zip(mine, computed))) for pair in pairs)
            raw = torch.stack([by_view[view] for view in range(self.num_views)])
            main_process_only(save_maps)(folder, request, self.view_names, raw)
        maps = relevance.upsample(raw, *self.view_size, normalization, outlier_factor)
        for name, view_map in zip(self.view_names, maps):
            main_process_only(write_png)(folder / f"{name}.png", apply_colormap(view_map))
        self.set_relevance(maps, relevance.normalize(raw, normalization, outlier_factor=None))

    def compute_relevance_map(
        self, editor: Editor, view: int, request: RelevanceRequest, outlier_factor: float
    ) -> Float[Tensor, "h w"]:
        """Return the relevance map of one view, normalized by itself; nothing is kept.

        Args:
            editor: The editor.
            view: Index of the view.
            request: As for `make_relevance_maps`.
            outlier_factor: As in `relevance.normalize`.
        """
        raw = torch.cat(list(self._raw_maps(editor, [view], request, batch_size=1)))
        return relevance.upsample(raw, *self.view_size, "view", outlier_factor)[0]

    def _raw_maps(
        self, editor: Editor, views: Sequence[int], request: RelevanceRequest, batch_size: int
    ) -> Iterator[Float[Tensor, "n lh lw"]]:
        raw = relevance_maps(
            editor,
            self.reference_views(views),
            request.instruction,
            noise_level=request.noise_level,
            num_samples=request.num_samples,
            seeds=[edit_seed(request.seed, -1 - view) for view in views],
            resolution=request.resolution,
            batch_size=batch_size,
        )
        names = [f"the relevance map of {self.view_names[view]}" for view in views]
        first = 0
        for part in raw:
            check_finite(part, names[first : first + len(part)], "Start with --pipeline.editor-dtype float32.")
            first += len(part)
            yield part

    def set_relevance(
        self, maps: Float[Tensor, "n h w"], unclamped_maps: Optional[Float[Tensor, "n mh mw"]] = None
    ) -> None:
        """Set the relevance maps of all views.

        Args:
            maps: Relevance in [0, 1] at the views' size; ray batches contain it as `relevance`.
            unclamped_maps: The same before outliers were clamped, of any size. Default: the maps.
        """
        self.cached_batch["relevance"] = maps[..., None].to(self.cached_batch["image"])
        self._unclamped_maps = (maps if unclamped_maps is None else unclamped_maps).to(self.cached_batch["image"])

    @property
    def relevance_maps(self) -> Optional[Float[Tensor, "n h w"]]:
        """Relevance maps of the views in [0, 1]; None without."""
        return self.cached_batch["relevance"][..., 0] if "relevance" in self.cached_batch else None

    @property
    def unclamped_maps(self) -> Optional[Float[Tensor, "n mh mw"]]:
        """The relevance maps before outliers were clamped; None without."""
        return self._unclamped_maps if "relevance" in self.cached_batch else None

    def forget_relevance(self) -> None:
        """Remove the relevance maps: another instruction follows."""
        self.cached_batch.pop("relevance", None)

    # --------------------------------------------------------------------------------------------------------- edits

    def edit_views(
        self,
        editor: Editor,
        inputs: Sequence[EditInput],
        instruction: str,
        settings: EditSettings,
        *,
        strength: float,
        seeds: Sequence[int],
    ) -> Float[Tensor, "b h w 3"]:
        """Edit views, starting from renders and conditioned on the reference views, which also hold outside the masks.

        Args:
            editor: The editor.
            inputs: Renders and masks, all of one size.
            instruction: What to change.
            settings: Guidance, steps, resolution.
            strength: Noise that the renders start from, as a share of the diffusion.
            seeds: Seed of the noise of each view.
        """
        reference = self.reference_views([edit_input.view for edit_input in inputs])
        render, rendered, mask = (
            torch.stack([getattr(edit_input, name) for edit_input in inputs]).to(reference.device)
            for name in ("render", "rendered", "mask")
        )
        # Far from the mask the scene is not rendered; the reference view fills the rest.
        start = torch.where(rendered[..., None], render, resize_images(reference, *render.shape[1:3]))
        return edit_images(editor, start, reference, mask, instruction, settings, strength=strength, seeds=seeds)

    def set_view(self, view: int, image: Float[Tensor, "h w 3"]) -> None:
        """Replace a view by an image, in 8 bits as it is written to disk; the next ray batch uses it."""
        pixels = torch.from_numpy(to_uint8(image)).to(self._captured.device)
        self.cached_batch["image"][view] = pixels.float() / 255
        self.edited_views.add(view)

    def reference_hash(self) -> str:
        """Return a short hash of the reference views; empty if these are the captured ones."""
        if self._reference is self._captured:
            return ""
        return hashlib.sha256(self._reference.cpu().numpy().tobytes()).hexdigest()[:16]

    def views_state(self) -> dict[str, Any]:
        """Return the edited views and their reference (None if captured), in 8 bits on the CPU, for `load_views_state`."""
        edited = sorted(self.edited_views)
        own_reference = self._reference is not self._captured
        return {
            "names": self.view_names,
            "size": list(self.view_size),
            "edited": edited,
            "current": torch.from_numpy(to_uint8(self.cached_batch["image"][edited])),
            "reference": self._reference.cpu().clone() if own_reference else None,
        }

    def load_views_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `views_state`.

        Raises:
            WysError: If it belongs to other views.
        """
        if state["names"] != self.view_names or state["size"] != list(self.view_size):
            theirs, ours = (f"{len(names)} views of {width}x{height}, the first of them {names[0]}"
                            for names, (height, width) in ((state["names"], state["size"]),
                                                           (self.view_names, self.view_size)))  # fmt: skip
            raise WysError(
                f"The edited views of that run are of other data ({theirs}) than this run's ({ours}): use the same --data "
                "and the same dataparser options."
            )
        self.start_from_captured()
        self.cached_batch["image"][state["edited"]] = state["current"].to(self._captured.device).float() / 255
        if state["reference"] is not None:
            self._reference = state["reference"].to(self._captured.device)
        self.edited_views = set(state["edited"])

    def start_from_captured(self) -> None:
        """Undo all edits of the views."""
        self.cached_batch["image"][:] = self._captured.float() / 255
        self._reference = self._captured
        self.edited_views = set()

    def start_from_current(self) -> None:
        """Make the views as they are now the reference of the edits to come."""
        self._reference = torch.from_numpy(to_uint8(self.cached_batch["image"])).to(self._captured.device)

    @main_process_only
    def write_edited_views(self, folder: Path) -> None:
        """Write every edited view as it is now, and remove the files of views that are not edited any more."""
        for view, name in enumerate(self.view_names):
            if view in self.edited_views:
                write_png(folder / f"{name}.png", self.current_views([view])[0])
            else:
                (folder / f"{name}.png").unlink(missing_ok=True)
        if self._reference is self._captured:
            shutil.rmtree(folder.parent / REFERENCE_VIEWS, ignore_errors=True)
        else:
            for name, view in zip(self.view_names, self._reference):
                write_png(folder.parent / REFERENCE_VIEWS / f"{name}.png", view.float() / 255)


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:  # reads the file's head only
        return image.size
