"""The registered methods. nerfstudio imports this module whenever any ns-* command starts, so it must be light and must
not fail: no diffusers, no transformers."""

from typing import Any

from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.base_config import LoggingConfig, ViewerConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig
from nerfstudio.plugins.types import MethodSpecification

from wys_nerfstudio.datamanager import WysDataManagerConfig
from wys_nerfstudio.editing.loading import EMBEDDED
from wys_nerfstudio.model import WysModelConfig
from wys_nerfstudio.pipeline import WysPipelineConfig
from wys_nerfstudio.trainer import WysTrainerConfig
from wys_nerfstudio.training.checkpoint import register_safe_globals

# Every ns-* command imports this module, so all of them can read checkpoints again.
register_safe_globals()


def _optimizers(final_lr: float, decay_steps: int) -> dict[str, Any]:
    def decayed(lr: float = 1e-2, lr_final: float = final_lr) -> dict[str, Any]:
        return {
            "optimizer": AdamOptimizerConfig(lr=lr, eps=1e-15),
            "scheduler": ExponentialDecaySchedulerConfig(lr_final=lr_final, max_steps=decay_steps),
        }

    return {
        "proposal_networks": decayed(),
        "fields": decayed(),
        "camera_opt": decayed(1e-3, 1e-4),
        # No schedule: it would have run down before the relevance head takes its first step.
        # Where little is relevant, a rate of 1e-2 can silence the head for good in its first steps.
        "relevance": {"optimizer": AdamOptimizerConfig(lr=3e-3, eps=1e-15), "scheduler": None},
    }


def _of_nerfactos_size(name: str, rays_per_chunk: int, **options: Any) -> WysTrainerConfig:
    """A method whose field has the registered nerfacto's size, so that its runs are bases; chunks are those of renders."""
    return WysTrainerConfig(
        method_name=name,
        steps_per_eval_batch=500,
        steps_per_save=2000,
        mixed_precision=True,
        pipeline=WysPipelineConfig(
            model=WysModelConfig(eval_num_rays_per_chunk=rays_per_chunk, average_init_density=0.01), **options
        ),
        optimizers=_optimizers(final_lr=1e-4, decay_steps=200000),
        viewer=ViewerConfig(num_rays_per_chunk=rays_per_chunk, websocket_host="127.0.0.1"),
        vis="viewer",
    )


wys = MethodSpecification(
    config=_of_nerfactos_size("wys", rays_per_chunk=1 << 15, datamanager=WysDataManagerConfig()),
    description="Watch Your Steps: edit a scene by text, only where the text is about.",
)

wys_small = MethodSpecification(
    config=_of_nerfactos_size(
        "wys-small",
        rays_per_chunk=1 << 13,
        datamanager=WysDataManagerConfig(
            train_num_rays_per_batch=2048,
            eval_num_rays_per_batch=2048,
            edit_num_rays_per_batch=4096,
            images_on_gpu=False,
        ),
        relevance_batch_size=1,
    ),
    description="Watch Your Steps for small GPUs: the same field and edits, fewer rays at once, views in main memory.",
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
                eval_num_rays_per_batch=1024,
                edit_num_rays_per_batch=1024,
            ),
            model=WysModelConfig(
                # Small enough for a CPU's cache: pictures are drawn in 0.7 of the time that 8192 rays at once take.
                eval_num_rays_per_chunk=1 << 10,
                implementation="torch",
                num_levels=8,
                max_res=512,
                log2_hashmap_size=15,
                hidden_dim=32,
                hidden_dim_color=32,
                appearance_embed_dim=8,
                num_proposal_iterations=1,
                # Twice the proposals and half as many samples again would take 1.6 times as long for 0.2 to 0.3 dB.
                num_proposal_samples_per_ray=(32,),
                num_nerf_samples_per_ray=16,
                proposal_net_args_list=[
                    {"hidden_dim": 16, "log2_hashmap_size": 14, "num_levels": 5, "max_res": 128, "use_linear": False}
                ],
                proposal_weights_anneal_max_num_iters=300,
                proposal_warmup=1000,
                # In a few hundred steps cameras that look at plain ground hide behind clouds of their own; a near plane
                # leaves these no room (nerfstudio scales cameras to at most 1 from the centre). Held-out PSNR of a
                # portrait scene: 36.4 dB instead of 14.5; a scene without clouds loses 0.7 dB.
                near_plane=0.3,
                far_plane=100.0,
                camera_optimizer=CameraOptimizerConfig(mode="off"),
                # The demo editor's maps are clean: they need no second opinion and, below, no clamp.
                relevance_expectile=0.5,
                lpips_loss_mult=0.0,
            ),
            editor=EMBEDDED,
            clip_model=EMBEDDED,
            # Chosen on validation scenes of the toy world; clamping clean maps would only widen them.
            guidance_scale=1.0,
            image_guidance_scale=1.0,
            mask_threshold=0.35,
            relevance_outlier_factor=1000.0,
            relevance_num_samples=4,
            diffusion_steps=4,
            reconstruct_steps=800,
            localize_steps=400,
            edit_steps=600,
            edit_every=5,
            min_strength=0.5,
        ),
        # Not lower at the end: in 600 steps of editing, what is added would get its shape but not its colour.
        optimizers=_optimizers(final_lr=3e-3, decay_steps=1800),
        viewer=ViewerConfig(num_rays_per_chunk=1 << 10, websocket_host="127.0.0.1"),
        vis="viewer",
    ),
    description="Watch Your Steps, tiny: toy-sized scenes and the embedded demo editor, minutes on a laptop's CPU.",
)
