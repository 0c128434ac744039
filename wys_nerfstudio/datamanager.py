"""The training views: captured, edited, and their relevance maps. Edits views with an image editor under masks.

Ray batches are drawn from one stack of 8-bit images, so an edit is a write into that stack. It is the only one on the training
device; captured views and reference views are in main memory and moved view by view. Captured views keep their transparency, for the
reconstruction; edited views and what edits are conditioned on are opaque.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from jaxtyping import Bool, Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.configs.dataparser_configs import AnnotatedDataParserUnion
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.pixel_samplers import PatchPixelSamplerConfig
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader, RandIndicesEvalDataloader
from nerfstudio.model_components.ray_generators import RayGenerator
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.editing import Editor, EditSettings, edit_images, relevance_maps
from wys_nerfstudio.editing.edit import check_finite
from wys_nerfstudio.editing.editor import resize_images
from wys_nerfstudio.editing.encoding_cache import EncodingCache
from wys_nerfstudio.editing.sampling import edit_seed
from wys_nerfstudio.relevance.cache import MAPS_FILE, RelevanceRequest, find_maps, save_maps
from wys_nerfstudio.training.capture_dataset import CaptureDataset
from wys_nerfstudio.training.distributed import broadcast_from_main, gather, main_process_only, shard
from wys_nerfstudio.training.held_out import FewCameras
from wys_nerfstudio.training.image_stack import ImageStack, blend, read_images, to_device
from wys_nerfstudio.training.scene import EditInput
from wys_nerfstudio.training.validation import flag, minimum, validate_positive, validate_ranges, validate_share
from wys_nerfstudio.utils.cameras import check_cameras, check_positions, fit_cameras
from wys_nerfstudio.utils.data_checks import check_image, check_names, parsing
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.image_io import MIN_SIDE
from wys_nerfstudio.utils.log_filters import ignore_warnings
from wys_nerfstudio.utils.progress import track
from wys_nerfstudio.utils.view_masks import check_frame_masks
from wys_nerfstudio.utils.visualization import SOFTWARE, apply_colormap, save_png, to_uint8, write_png

REFERENCE_VIEWS = "reference"
"""Folder, beside the edited views, of the views that edits are conditioned on, if these are not the captured ones."""

MAX_NAME_BYTES = 255 - len("00000_") - len(".png.partial")
"""Bytes of a file name stem that are left for the name of a view."""

MINIMA = {
    **minimum(1, "train_num_rays_per_batch", "eval_num_rays_per_batch", "edit_num_rays_per_batch"),
    **minimum(1, "localize_num_rays_per_batch"),
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
    """Rays per step of the reconstruct phase."""
    localize_num_rays_per_batch: Optional[int] = None
    """Rays per step of the localize phase. Default: as many as in the reconstruct phase."""
    eval_num_rays_per_batch: int = 4096
    """Rays per evaluation step."""
    edit_num_rays_per_batch: int = 16384
    """Rays per step while the scene is edited, in the edit phase."""
    edit_patch_size: int = 32
    """Side in pixels of the patches for the perceptual loss in the edit phase."""
    images_on_gpu: bool = True
    """Keep the stack of training views on the training device."""

    @property
    def localize_rays(self) -> int:
        """Rays per step of the localize phase."""
        return self.localize_num_rays_per_batch or self.train_num_rays_per_batch

    def check(self) -> None:
        """Refuse options that cannot work.

        Raises:
            WysError: For the first such option.
        """
        validate_ranges("pipeline.datamanager.", self, MINIMA)
        validate_positive("--pipeline.datamanager.camera-res-scale-factor", self.camera_res_scale_factor)
        _check_parser_options(self.dataparser)
        if self.train_num_images_to_sample_from != -1:
            raise WysError(
                "All views are edited, so all must be in memory: leave out "
                "--pipeline.datamanager.train-num-images-to-sample-from."
            )


def _check_parser_options(options: DataParserConfig) -> None:
    """Refuse numbers among the options of a parser that cannot work: scales, factors, intervals and fractions."""
    validate_ranges("", options, {})
    for option in fields(options):
        name, value = flag(option.name, ""), getattr(options, option.name)
        if option.name.endswith("fraction"):
            validate_share(name, value)
        if option.name.endswith(("scale", "factor", "interval", "fraction", "bound")) and value is not None:
            validate_positive(name, value)


class WysDataManager(VanillaDataManager[CaptureDataset]):
    """Captured views, relevance maps and edited views of one scene; views are numbered as in the training dataset."""

    config: WysDataManagerConfig
    background = 0.0
    """Gray in [0, 1] behind transparent pixels wherever views are opaque: in edits, metrics of edits and images of views."""

    def __init__(self, config: WysDataManagerConfig, *arguments: Any, **named: Any) -> None:
        self._written: dict[Path, dict[str, bytes]] = {}
        """Hash of each image that was written, by folder and name."""
        self._rescaled: Optional[str] = None
        """What was printed about cameras that were rescaled."""
        ignore_warnings()  # in ns-eval and other commands nothing of this package is built earlier
        with parsing(config.dataparser):
            super().__init__(config, *arguments, **named)

    def create_train_dataset(self) -> CaptureDataset:
        """Build the dataset of the training views, with cameras that agree with the images."""
        outputs = self.train_dataparser_outputs
        if len(outputs.image_filenames) < 2:
            left = "Only one view" if outputs.image_filenames else "No view"
            raise WysError(
                f'{left} of "{self.config.data}" is left for training: change its train_filenames, --eval-mode, '
                "--train-split-fraction or --eval-interval."
            )
        dataset = self._create_dataset(outputs)
        check_positions(outputs)
        return dataset

    def create_eval_dataset(self) -> CaptureDataset:
        """Build the dataset of the held-out views, with cameras that agree with the images."""
        if self.test_mode == "val":  # ns-eval, ns-render and ns-viewer of this run read another split
            self._create_dataset(self.dataparser.get_dataparser_outputs(split="test"))
        dataset = self._create_dataset(self.dataparser.get_dataparser_outputs(split=self.test_split))
        if len(dataset) < 2:
            dataset.cameras = FewCameras.of(dataset.cameras)
        if len(dataset) == 0:
            CONSOLE.print("No view is held out: metrics of held-out views are left out.")
        return dataset

    def _create_dataset(self, outputs: DataparserOutputs) -> CaptureDataset:
        files, masks, scale = outputs.image_filenames, outputs.mask_filenames, self.config.camera_res_scale_factor
        flipped = getattr(self.dataparser.config, "orientation_method", None) == "pca"
        check_cameras(
            outputs,
            "choose another --orientation-method than pca, which can mirror poses."
            if flipped
            else "it must be a rotation and a translation; compute the poses again.",
        )
        check_names(files)
        # Renders read no images; these may be absent then.
        if self.test_mode != "inference" or all(map(Path.is_file, files)):
            for file in files:
                check_image(file, "the capture")
            change = fit_cameras(outputs.cameras, files, self._downscaled)
            if change is not None and change != self._rescaled:
                CONSOLE.print(change)
                self._rescaled = change
            check_frame_masks(files, masks or [])
        dataset = self.dataset_type(dataparser_outputs=outputs, scale_factor=scale)
        if scale != 1.0:
            for side in ("width", "height"):  # rounded as the dataset rounds its images, in double precision
                pixels = (getattr(outputs.cameras, side).double() * scale).long()
                setattr(dataset.cameras, side, pixels)
        for width, height in zip(dataset.cameras.width.flatten().tolist(), dataset.cameras.height.flatten().tolist()):
            if min(width, height) < MIN_SIDE:
                raise WysError(
                    f"The views have {width}x{height} pixels and each side must have at least {MIN_SIDE}: use larger images, or "
                    "a larger --pipeline.datamanager.camera-res-scale-factor."
                )
        return dataset

    @property
    def _downscaled(self) -> bool:
        """Whether the parser reads images from a folder of downscaled ones."""
        parser = self.dataparser
        factors = (getattr(parser, name, None) for name in ("downscale_factor", "_downscale_factor"))
        return any((factor or 1) > 1 for factor in (*factors, getattr(parser.config, "downscale_factor", None)))

    def setup_train(self) -> None:
        """Read the captured views."""
        self._captured, self._frame_masks = read_images(self.train_dataset)
        self._picture_hashes = [hashlib.sha256(picture.numpy().data).hexdigest()[:16] for picture in self._captured]
        on_device = self.config.images_on_gpu and torch.device(self.device).type != "cpu"
        self._stack = ImageStack(
            self._captured.to(self.device) if on_device else self._captured.clone(), self._frame_masks, self.device
        )
        self._set_reference(self._captured)
        self.edited_views: set[int] = set()
        """Views that differ from the captured ones."""
        self.forget_relevance()
        rays = self.config.train_num_rays_per_batch, self.config.localize_rays, self.config.edit_num_rays_per_batch
        self._stack.check_drawable(max(rays), "training")
        self.use_reconstruction_rays()
        self.train_ray_generator = RayGenerator(self.train_dataset.cameras.to(self.device))
        # `ns-render spiral` starts at a view of it. Without held-out views, `setup_eval` is not called.
        self.eval_dataloader = RandIndicesEvalDataloader(self.train_dataset, self.device)

    def setup_eval(self) -> None:
        """Read the held-out views as the training views: in 8 bits."""
        self._eval_stack = ImageStack(*read_images(self.eval_dataset), self.device)
        self._eval_stack.check_drawable(self.config.eval_num_rays_per_batch, "held-out")
        self.eval_pixel_sampler = self._get_pixel_sampler(self.eval_dataset, self.config.eval_num_rays_per_batch)
        self.eval_ray_generator = RayGenerator(self.eval_dataset.cameras.to(self.device))
        loading = {"input_dataset": self.eval_dataset, "device": self.device, "num_workers": 4 * self.world_size}
        self.fixed_indices_eval_dataloader = FixedIndicesEvalDataloader(**loading)
        self.eval_dataloader = RandIndicesEvalDataloader(**loading)

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
        """File name stem of each view, with its number in front if stems repeat; long ones are cut off."""
        stems = [
            path.stem.encode()[:MAX_NAME_BYTES].decode(errors="ignore") for path in self.train_dataset.image_filenames
        ]
        # Some disks do not distinguish upper and lower case.
        unique = len({stem.casefold() for stem in stems}) == len(stems)
        return stems if unique else [f"{i:05d}_{stem}" for i, stem in enumerate(stems)]

    def captured_views(self, views: Sequence[int]) -> Float[Tensor, "b h w 3"]:
        """Return views as captured, in [0, 1]."""
        return self._to_floats(self._captured, views)

    def reference_views(self, views: Sequence[int]) -> Float[Tensor, "b h w 3"]:
        """Return what edits are conditioned on and keep outside their masks, in [0, 1]: the captured views, until an
        instruction is applied on top of another."""
        return self._to_floats(self._reference, views)

    def current_views(self, views: Sequence[int]) -> Float[Tensor, "b h w 3"]:
        """Return views as training uses them now, in [0, 1]."""
        return self._to_floats(self._stack.images, views)

    def frame_mask(self, view: int) -> Optional[Bool[Tensor, "h w"]]:
        """Return the pixels of a captured view that are trained on; None for all."""
        return None if self._frame_masks is None else self._frame_masks[view, ..., 0]

    def _to_floats(self, images: UInt8[Tensor, "n h w c"], views: Sequence[int]) -> Float[Tensor, "b h w 3"]:
        return blend(images[list(views)].to(self.device), self.background).float().div_(255)

    # -------------------------------------------------------------------------------------------------- ray batches

    def check_patches(self) -> None:
        """Refuse patches that do not fit the views, their frame masks or the number of rays.

        Raises:
            WysError: If they do not.
        """
        side, rays = self.config.edit_patch_size, self.config.edit_num_rays_per_batch
        if side > min(self.view_size) or side**2 > rays:
            raise WysError(
                f"Patches of {side} pixels do not fit views of {self.view_size[1]}x{self.view_size[0]} and {rays} rays: "
                "lower --pipeline.datamanager.edit-patch-size or raise --pipeline.datamanager.edit-num-rays-per-batch."
            )
        self._stack.check_drawable(rays, "training", side)

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

    def use_localize_rays(self) -> None:
        """Draw ray batches of the localize phase's size."""
        self.train_pixel_sampler = self._get_pixel_sampler(self.train_dataset, self.config.localize_rays)

    def use_reconstruction_rays(self) -> None:
        """Draw ray batches of the reconstruct phase's size."""
        self.train_pixel_sampler = self._get_pixel_sampler(self.train_dataset, self.config.train_num_rays_per_batch)

    def next_train(self, step: int) -> tuple[RayBundle, dict]:
        """Return the next ray batch: `image` (RGBA if any captured view is), `indices`, the `patch_size` of the edit phase, and `relevance` if there are relevance maps."""
        self.train_count += 1
        assert self.train_pixel_sampler is not None
        batch, drawn = self._stack.sample(self.train_pixel_sampler)
        batch["patch_size"] = self.config.edit_patch_size
        if self._relevance is not None and self._relevance.dtype != torch.bool:  # given masks train no relevance head
            indices = drawn if self._relevance.device == drawn.device else batch["indices"]
            values = relevance.sample(self._relevance, indices, *self.view_size)
            batch["relevance"] = to_device(values, torch.device(self.device))[:, None]
        return self.train_ray_generator(batch["indices"]), batch

    def next_eval(self, step: int) -> tuple[RayBundle, dict]:
        """Return a ray batch of the held-out views."""
        self.eval_count += 1
        assert self.eval_pixel_sampler is not None
        batch, _ = self._eval_stack.sample(self.eval_pixel_sampler)
        return self.eval_ray_generator(batch["indices"]), batch

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
            bar = track(parts, description="Relevance maps", total=batches)
            computed: list[Tensor] = []
            with editor.full_precision():  # cast once, not for each batch
                for part in bar:
                    computed.extend(part.cpu())
                    report(len(computed), len(mine))
            by_view = dict(pair for pairs in gather(list(zip(mine, computed))) for pair in pairs)
            raw = torch.stack([by_view[view] for view in range(self.num_views)])
            main_process_only(save_maps)(folder, request, self.view_names, raw)
        maps = relevance.normalize(raw, normalization, outlier_factor)
        self.set_relevance(maps, relevance.normalize(raw, normalization, outlier_factor=None))
        self.write_relevance_images(folder, request.instruction)

    @main_process_only
    def write_relevance_images(self, folder: Path, instruction: str = "") -> None:
        """Write an image of each view's relevance map; without maps remove the images of earlier ones.

        Args:
            folder: Folder of the images.
            instruction: Instruction of the maps.
        """
        maps = [] if self._relevance is None or self._relevance.dtype == torch.bool else self._relevance
        for name, view_map in zip(self.view_names, maps):
            colors = apply_colormap(relevance.resize(view_map[None], *self.view_size)[0])
            write_png(folder / f"{name}.png", colors, f'relevance map of view {name}: "{instruction}"')
        for name in self.view_names[len(maps) :]:
            (folder / f"{name}.png").unlink(missing_ok=True)

    def discard_relevance(self, folder: Path) -> None:
        """Remove the relevance maps and their files: another instruction follows.

        Args:
            folder: As for `make_relevance_maps`.
        """
        self.forget_relevance()
        self.write_relevance_images(folder)
        main_process_only((folder / MAPS_FILE).unlink)(missing_ok=True)

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
        for first in range(0, len(views), batch_size):
            batch = views[first : first + batch_size]
            (raw,) = relevance_maps(
                editor,
                self.reference_views(batch),
                request.instruction,
                noise_level=request.noise_level,
                num_samples=request.num_samples,
                seeds=[edit_seed(request.seed, -1 - view) for view in batch],
                resolution=request.resolution,
                batch_size=len(batch),
            )
            names = [f"the relevance map of {self.view_names[view]}" for view in batch]
            check_finite(raw, names, "Start with --pipeline.editor-dtype float32.")
            yield raw

    def set_relevance(
        self,
        maps: "Float[Tensor, 'n mh mw'] | Bool[Tensor, 'n h w']",
        unclamped_maps: Optional[Float[Tensor, "n uh uw"]] = None,
    ) -> None:
        """Set the relevance maps of all views.

        Args:
            maps: Relevance in [0, 1], of any size, which ray batches contain, interpolated, as `relevance`; or given masks.
            unclamped_maps: The same before outliers were clamped, of any size. Default: the maps.
        """
        # Masks have the size of the views and stay in main memory; maps are small.
        self._relevance = maps if maps.dtype == torch.bool else maps.to(self.device)
        self._unclamped_maps = self._relevance if unclamped_maps is None else unclamped_maps.to(self.device)

    @property
    def relevance_maps(self) -> "Optional[Float[Tensor, 'n mh mw'] | Bool[Tensor, 'n h w']]":
        """Relevance maps of the views in [0, 1], of any size, or given masks; None without."""
        return self._relevance

    @property
    def unclamped_maps(self) -> "Optional[Float[Tensor, 'n uh uw'] | Bool[Tensor, 'n h w']]":
        """The relevance maps before outliers were clamped; None without."""
        return self._unclamped_maps

    def forget_relevance(self) -> None:
        """Remove the relevance maps."""
        self._relevance: Optional[Tensor] = None
        self._unclamped_maps: Optional[Tensor] = None

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
        views = [edit_input.view for edit_input in inputs]
        # Before the views: Undo can replace both while this edit, which it discards, is computed.
        encodings = self._encodings
        reference = self.reference_views(views)
        encoded = encodings.encode(editor, reference, views, settings.resolution)
        render, rendered, mask = (
            torch.stack([getattr(edit_input, name) for edit_input in inputs]).to(reference.device)
            for name in ("render", "rendered", "mask")
        )
        # Far from the mask the scene is not rendered; the reference view fills the rest.
        start = torch.where(rendered[..., None], render, resize_images(reference, *render.shape[1:3]))
        return edit_images(
            editor,
            start,
            reference,
            mask,
            instruction,
            settings,
            strength=strength,
            seeds=seeds,
            encoded_reference=encoded,
        )

    def set_view(self, view: int, image: Float[Tensor, "h w 3"]) -> None:
        """Replace a view by an image, in 8 bits as it is written to disk; the next ray batch uses it."""
        self._stack.replace(view, torch.from_numpy(to_uint8(image)))
        self.edited_views.add(view)

    def reference_hash(self) -> str:
        """Return a short hash of the reference views; empty if these are the captured ones."""
        if self._reference is self._captured:
            return ""
        return hashlib.sha256(self._reference.numpy().data).hexdigest()[:16]

    def views_state(self) -> dict[str, Any]:
        """Return the edited views and their reference (None if captured), in 8 bits in main memory, for `load_views_state`."""
        edited = sorted(self.edited_views)
        current = torch.empty(len(edited), *self.view_size, 3, dtype=torch.uint8)
        for place, view in zip(current, edited):
            place.copy_(self._stack.images[view, ..., :3])
        return {
            "names": self.view_names,
            "size": list(self.view_size),
            "pictures": self._picture_hashes,
            "cameras": self._camera_numbers(),
            "edited": edited,
            "current": current,
            "reference": None if self._reference is self._captured else self._reference,
        }

    def load_views_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `views_state`.

        Raises:
            WysError: As for `check_views`.
        """
        self.check_views(state)
        self.start_from_captured()
        for view, image in zip(state["edited"], state["current"]):
            self._stack.replace(view, image)
        if state["reference"] is not None:
            self._set_reference(state["reference"])
        self.edited_views = set(state["edited"])

    def check_views(self, state: dict[str, Any]) -> None:
        """Compare the captured views and cameras of a run with those of this one.

        Args:
            state: Result of `views_state`.

        Raises:
            WysError: If they differ.
        """
        remedy = "use the same --data and the same dataparser options."
        if state["names"] != self.view_names or state["size"] != list(self.view_size):
            theirs, ours = (f"{len(names)} views of {width}x{height}, the first of them {names[0]}"
                            for names, (height, width) in ((state["names"], state["size"]),
                                                           (self.view_names, self.view_size)))  # fmt: skip
            raise WysError(f"The views of that run are of other data ({theirs}) than this run's ({ours}): {remedy}")
        # Orientation and scale differ in the last digits between machines.
        cameras = torch.isclose(state["cameras"], self._camera_numbers(), rtol=1e-5, atol=1e-4).all(dim=1).tolist()
        pictures = [before == now for before, now in zip(state["pictures"], self._picture_hashes)]
        for what, same in (("picture", pictures), ("camera", cameras)):
            changed = [name for name, is_same in zip(self.view_names, same) if not is_same]
            if changed:
                subject = f"The {what} of the view {changed[0]} is"
                if len(changed) > 1:
                    subject = f"The {what}s of {len(changed)} views, the first of them {changed[0]}, are"
                raise WysError(f"{subject} not what that run was trained on: {remedy}")

    def _camera_numbers(self) -> Float[Tensor, "n numbers"]:
        cameras, numbers = self.cameras.to("cpu"), ("fx", "fy", "cx", "cy", "width", "height", "camera_type")
        distortion = cameras.distortion_params
        parts = [cameras.camera_to_worlds.flatten(1), *(getattr(cameras, name).float() for name in numbers)]
        return torch.cat([*parts, torch.zeros(len(cameras), 6) if distortion is None else distortion], dim=1)

    def start_from_captured(self) -> None:
        """Undo all edits of the views."""
        self._stack.images.copy_(self._captured)
        self._set_reference(self._captured)
        self.edited_views = set()

    def start_from_current(self) -> None:
        """Make the views as they are now the reference of the edits to come."""
        reference = torch.empty(self.num_views, *self.view_size, 3, dtype=torch.uint8)
        for place, image in zip(reference, self._stack.images):
            place.copy_(blend(image, self.background))
        self._set_reference(reference)

    def _set_reference(self, images: UInt8[Tensor, "n h w c"]) -> None:
        """Replace what edits are conditioned on."""
        self._reference = images
        self._encodings = EncodingCache()

    @main_process_only
    def write_edited_views(self, folder: Path, state: dict[str, Any]) -> None:
        """Write the edited views that have changed since the last call, and remove the files of views that are not edited.

        Args:
            folder: Folder of the edited views; their reference, if it is not the captured views, is written beside it.
            state: Result of `views_state`.
        """
        names = state["names"]
        self._write_changed(folder, dict(zip((names[view] for view in state["edited"]), state["current"])))
        reference = state["reference"]
        self._write_changed(folder.parent / REFERENCE_VIEWS, {} if reference is None else dict(zip(names, reference)))

    def _write_changed(self, folder: Path, images: dict[str, UInt8[Tensor, "h w 3"]]) -> None:
        written = self._written.setdefault(folder, {})
        for name, image in images.items():
            content = hashlib.sha256(image.numpy().data).digest()
            if written.get(name) != content:
                about = f"view {name} of a scene edited with {SOFTWARE}"
                save_png(folder / f"{name}.png", Image.fromarray(image.numpy()), about)
                written[name] = content
        for name in {*self.view_names} - images.keys():
            (folder / f"{name}.png").unlink(missing_ok=True)
            written.pop(name, None)
        if not images and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
