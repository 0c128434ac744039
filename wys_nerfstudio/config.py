"""The registered methods: `wys`, `wys-small`, `wys-tiny`.

Every ns-* command of nerfstudio imports this module, so it must be cheap and must not fail: no diffusers, no transformers.
"""

from typing import Any

from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.base_config import LoggingConfig, ViewerConfig
from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig
from nerfstudio.plugins.types import MethodSpecification

from wys_nerfstudio.datamanager import WysDataManagerConfig
from wys_nerfstudio.editing.loading import EMBEDDED
from wys_nerfstudio.model import WysModelConfig
from wys_nerfstudio.pipeline import WysPipelineConfig
from wys_nerfstudio.trainer import WysTrainerConfig
from wys_nerfstudio.training.checkpoint import register_safe_globals
from wys_nerfstudio.training.optimizers import FusedAdamConfig

# Here, because every ns-* command imports this module and may load a checkpoint.
register_safe_globals()


def _optimizers(final_lr: float, decay_steps: int) -> dict[str, Any]:
    def decayed(lr: float = 1e-2, lr_final: float = final_lr) -> dict[str, Any]:
        return {
            "optimizer": FusedAdamConfig(lr=lr, eps=1e-15),
            "scheduler": ExponentialDecaySchedulerConfig(lr_final=lr_final, max_steps=decay_steps),
        }

    return {
        "proposal_networks": decayed(),
        "fields": decayed(),
        "camera_opt": decayed(1e-3, 1e-4),
        # No schedule: it would have decayed before the relevance head takes its first step.
        # Where little is relevant, a rate of 1e-2 can collapse the head to zero in its first steps.
        "relevance": {"optimizer": FusedAdamConfig(lr=3e-3, eps=1e-15), "scheduler": None},
    }


def _nerfacto_sized(name: str, **options: Any) -> WysTrainerConfig:
    """Return a method with a field of nerfacto's size, so that nerfacto runs can be its base runs.

    Args:
        name: Name of the method.
        **options: Options of the pipeline.
    """
    return WysTrainerConfig(
        method_name=name,
        steps_per_eval_batch=500,
        steps_per_save=2000,
        mixed_precision=True,
        pipeline=WysPipelineConfig(**options),
        optimizers=_optimizers(final_lr=1e-4, decay_steps=200000),
        viewer=ViewerConfig(websocket_host="127.0.0.1"),
        vis="viewer",
    )


wys = MethodSpecification(
    config=_nerfacto_sized("wys", model=WysModelConfig(average_init_density=0.01)),
    description="Watch Your Steps: text-driven editing of the region that the instruction refers to.",
)

wys_small = MethodSpecification(
    config=_nerfacto_sized(
        "wys-small",
        model=WysModelConfig(eval_num_rays_per_chunk=1 << 13, average_init_density=0.01),
        datamanager=WysDataManagerConfig(
            train_num_rays_per_batch=2048,
            eval_num_rays_per_batch=2048,
            edit_num_rays_per_batch=4096,
            images_on_gpu=False,
        ),
        relevance_batch_size=1,
    ),
    description="Watch Your Steps for small GPUs: same field and edits, fewer rays per batch, views in main memory.",
)

wys_tiny = MethodSpecification(
    config=WysTrainerConfig(
        method_name="wys-tiny",
        steps_per_eval_batch=500,
        steps_per_eval_image=500,
        steps_per_save=500,
        mixed_precision=False,
        logging=LoggingConfig(steps_per_log=50),
        pipeline=WysPipelineConfig(
            datamanager=WysDataManagerConfig(
                train_num_rays_per_batch=1024,
                localize_num_rays_per_batch=512,
                eval_num_rays_per_batch=1024,
                edit_num_rays_per_batch=1024,
            ),
            model=WysModelConfig(
                # Small enough for a CPU's cache: rendering takes 0.7 of the time that chunks of 8192 rays take.
                eval_num_rays_per_chunk=1 << 10,
                implementation="torch",
                num_levels=8,
                max_res=512,
                log2_hashmap_size=15,
                hidden_dim=32,
                hidden_dim_color=32,
                appearance_embed_dim=8,
                num_proposal_iterations=1,
                # 64 proposal and 24 field samples take 1.6 times as long and gain 0.2 to 0.3 dB.
                num_proposal_samples_per_ray=(32,),
                num_nerf_samples_per_ray=16,
                proposal_net_args_list=[
                    {"hidden_dim": 16, "log2_hashmap_size": 14, "num_levels": 5, "max_res": 128, "use_linear": False}
                ],
                proposal_weights_anneal_max_num_iters=300,
                proposal_warmup=1000,
                # In a few hundred steps, cameras over a uniform ground develop floaters near the camera. A near plane
                # excludes that space (nerfstudio scales camera positions to at most 1). Held-out PSNR of a portrait
                # scene: 36.4 dB instead of 14.5; a scene without floaters loses 0.7 dB.
                near_plane=0.3,
                far_plane=100.0,
                camera_optimizer=CameraOptimizerConfig(mode="off"),
                # The demo editor's maps are clean: the mean over the views suffices, and outliers (below) are not clamped.
                relevance_expectile=0.5,
                lpips_loss_mult=0.0,
            ),
            editor=EMBEDDED,
            clip_model=EMBEDDED,
            # Chosen on validation scenes of the toy world; clamping clean maps would only enlarge the masks.
            guidance_scale=1.0,
            image_guidance_scale=1.0,
            mask_threshold=0.35,
            relevance_outlier_factor=1000.0,
            relevance_num_samples=4,
            diffusion_steps=4,
            solver_order=1,
            reconstruct_steps=800,
            localize_steps=400,
            edit_steps=600,
            edit_every=5,
            min_strength=0.5,
        ),
        # No lower final rate: within 600 edit steps, added objects would converge in shape but not in color.
        optimizers=_optimizers(final_lr=3e-3, decay_steps=1800),
        viewer=ViewerConfig(websocket_host="127.0.0.1"),
        vis="viewer",
    ),
    description="Watch Your Steps, tiny: toy scenes and the embedded demo editor, minutes on a laptop CPU.",
)
