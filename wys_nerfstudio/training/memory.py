"""What to change when a run has run out of memory."""

from typing import Any, Literal, Optional

from wys_nerfstudio.training.schedule import Phase

RunActivity = Literal["preparation", "relevance maps", "edits", "training", "renders"]

ACTIVITIES: dict[RunActivity, str] = {
    "preparation": "while the run was prepared",
    "relevance maps": "while relevance maps were computed",
    "edits": "while views were edited",
    "training": "in a training step",
    "renders": "while views were rendered",
}
"""What a run does, for error messages."""


def memory_remedies(
    activity: RunActivity, phase: Optional[Phase], method: Optional[str], options: Any, on_gpu: bool
) -> list[str]:
    """Return what to type instead of the options in force, so that an activity needs less memory; never empty.

    Args:
        activity: What the run did when memory ran out.
        phase: Phase of the run; None before its first step.
        method: Name of the method.
        options: The run's `WysPipelineConfig`.
        on_gpu: Whether the run is trained on a GPU.
    """
    data, editor = options.datamanager, activity in ("relevance maps", "edits")
    found = ["ns-train wys-small"] if method == "wys" else []
    if activity == "relevance maps" and options.relevance_batch_size != 1:
        found.append("--pipeline.relevance-batch-size 1")
    if activity == "edits" and options.edit_count > 1:
        found.append("--pipeline.edit-count 1")
    if activity == "training":
        own = phase is Phase.LOCALIZE and data.localize_num_rays_per_batch
        name = "edit" if phase is Phase.EDIT else "localize" if own else "train"
        rays = getattr(data, f"{name}_num_rays_per_batch")
        found.append(f"--pipeline.datamanager.{name}-num-rays-per-batch {max(1, rays // 2)}")
    if activity in ("edits", "renders"):
        found.append(f"--pipeline.model.eval-num-rays-per-chunk {max(1, options.model.rays_per_chunk() // 2)}")
    if on_gpu and data.images_on_gpu:
        found.append("--pipeline.datamanager.images-on-gpu False")
    if on_gpu and options.editor_device is None and (editor or phase is Phase.EDIT or activity == "preparation"):
        found.append("--pipeline.editor-device cpu (or cuda:1)")
    if editor:
        found.append("a lower --pipeline.edit-resolution")
    return found if found and activity != "preparation" else [*found, "smaller views"]
