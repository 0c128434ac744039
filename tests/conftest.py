"""Small seeded stand-ins for the files of users: an InstructPix2Pix folder, AlexNet weights, captured scenes."""

import importlib.util
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# The suite runs in two workers, whose torch threads would compete for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

# No deadline: the time of an example depends on the machine.
settings.register_profile("wys", deadline=None)
settings.load_profile("wys")

SMALL_FIELD = {
    "num_levels": 3,
    "max_res": 32,
    "log2_hashmap_size": 8,
    "hidden_dim": 8,
    "hidden_dim_color": 8,
    "implementation": "torch",
}
FAKES = Path(__file__).parent / "fakes"
"""Folder of stand-ins for packages that need a GPU. It is never on this process's path: nerfstudio would find them."""
WORDS = "a the make turn paint give it bear ball block hat red blue green panda polar snow night into of photo".split()

EDIT_INSTRUCTION = "make the ball blue"
APPLIED_TRANSFORM = [[1.0, 0.0, 0.0, 0.2], [0.0, 0.0, 1.0, -0.1], [0.0, -1.0, 0.0, 0.3]]
"""Instruction and `applied_transform` of `edited_run`."""


@pytest.fixture(autouse=True)
def interruptible() -> None:
    """Let Ctrl-C interrupt programs as in a terminal. Shells make programs in the background ignore it, and so does a `wys` command
    that was stopped, which usually ends the process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def torch_state() -> Iterator[None]:
    """Fail tests that leave gradients switched off or another default dtype: they would change the tests after them."""
    before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    yield
    after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    torch.set_grad_enabled(before[0])
    assert after == before


@pytest.fixture
def tcnn(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Let nerfstudio use the stand-in for tiny-cuda-nn, as if it had been installed."""
    from nerfstudio.field_components import encodings, mlp
    from nerfstudio.utils import external

    spec = importlib.util.spec_from_file_location("tinycudann", FAKES / "tinycudann.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for user in (external, encodings, mlp):
        monkeypatch.setattr(user, "TCNN_EXISTS", True)
        monkeypatch.setattr(user, "tcnn", module)
    return module


def run_wys(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the `wys` command in this process."""
    from wys_nerfstudio.cli import main

    monkeypatch.setattr(sys, "argv", ["wys", *map(str, arguments)])
    main.entrypoint()


def sentence_of(call: Callable[[], object]) -> str:
    """Return the one-line error message with which a command exits.

    Args:
        call: Runs the command.
    """
    with pytest.raises(SystemExit) as ended:
        call()
    sentence = str(ended.value.code)
    assert sentence.startswith("wys: ") and "\n" not in sentence
    return sentence


def build_editor_folder(folder: Path, *, prediction_type: str = "epsilon", in_channels: int = 8, seed: int = 0) -> Path:
    """Write an untrained InstructPix2Pix with the file layout and class names of timbrooks/instruct-pix2pix.

    Args:
        folder: Folder to write.
        prediction_type: The scheduler's `prediction_type`.
        in_channels: Input channels of the UNet; 8 are InstructPix2Pix's.
        seed: Seed of the weights.
    """
    from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.18215,
    ).save_pretrained(folder / "vae")
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *(f"{w}</w>" for w in WORDS), "!</w>"]
    vocabulary += [c for c in "abcdefghijklmnopqrstuvwxyz'.,"] + [f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz'.,"]
    tokenizer_folder = folder / "raw_tokenizer"
    tokenizer_folder.mkdir(parents=True)
    (tokenizer_folder / "vocab.json").write_text(
        json.dumps({word: i for i, word in enumerate(dict.fromkeys(vocabulary))})
    )
    (tokenizer_folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(tokenizer_folder / "vocab.json"), str(tokenizer_folder / "merges.txt"), model_max_length=40
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=40,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder / "text_encoder")
    EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionInstructPix2PixPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def editor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained editor."""
    return build_editor_folder(tmp_path_factory.mktemp("editors") / "untrained")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained CLIP for 12 tokens and images of 32 pixels."""
    from transformers import CLIPConfig, CLIPModel

    from wys_nerfstudio.demo.training.networks import vocabulary, write_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(folder, WORDS, tokens=12)
    entries, _ = vocabulary(WORDS)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, "vocab_size": len(entries), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**small, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained Grounding DINO."""
    from segmenter_folders import build_detector_folder

    return build_detector_folder(tmp_path_factory.mktemp("detectors") / "untrained")


@pytest.fixture(scope="session")
def segmenter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained SAM 2."""
    from segmenter_folders import build_segmenter_folder

    return build_segmenter_folder(tmp_path_factory.mktemp("segmenters") / "untrained")


@pytest.fixture(scope="session")
def alexnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File with AlexNet's state dict: random weights in the real shapes."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save({k: v for k, v in alexnet(weights=None).state_dict().items() if k.startswith("features")}, path)
    return path


@pytest.fixture(scope="module")
def torch_home(alexnet_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Torch cache that contains AlexNet, which nerfacto loads even for training."""
    home = tmp_path_factory.mktemp("torch_home")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    state = torch.load(alexnet_file, weights_only=True)
    from torchvision.models import alexnet

    full = alexnet(weights=None).state_dict()
    torch.save({**full, **state}, home / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth")
    before = os.environ.get("TORCH_HOME")
    os.environ["TORCH_HOME"] = str(home)
    yield home
    os.environ.pop("TORCH_HOME")
    if before is not None:
        os.environ["TORCH_HOME"] = before


def write_ring_scene(
    folder: Path, *, width: int = 40, height: int = 32, views: int = 14, alpha: bool = False, distorted: bool = False
) -> Path:
    """Write a nerfstudio scene: noise-free views of a ball from a ring of cameras. The color of the ball differs in each view.

    Args:
        folder: Folder to write.
        width: Width of the views in pixels.
        height: Height of the views in pixels.
        views: Number of views.
        alpha: Write RGBA images, transparent outside the ball.
        distorted: Write distortion parameters; the images stay undistorted.
    """
    (folder / "images").mkdir(parents=True)
    focal = 1.2 * width
    frames = []
    for i in range(views):
        angle = 2 * math.pi * i / views
        eye = np.array([3 * math.cos(angle), 3 * math.sin(angle), 1.0])
        back = eye / np.linalg.norm(eye)
        right = np.cross([0, 0, 1], back)
        right /= np.linalg.norm(right)
        up = np.cross(back, right)
        matrix = np.eye(4)
        matrix[:3] = np.stack([right, up, back, eye], axis=1)
        xs, ys = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
        directions = (xs / focal)[..., None] * right - (ys / focal)[..., None] * up - back
        directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
        along = -(directions @ eye)
        hit = along**2 - (eye @ eye - 1.0) > 0
        tint = np.array([0.5 + 0.5 * math.cos(angle), 0.5 + 0.5 * math.sin(angle), 0.5])
        image = np.where(hit[..., None], tint, 0.5 + 0.3 * directions)
        pixels = (image.clip(0, 1) * 255).astype(np.uint8)
        if alpha:
            pixels = np.concatenate([pixels, (hit * 255).astype(np.uint8)[..., None]], axis=-1)
        Image.fromarray(pixels).save(folder / "images" / f"frame_{i:03d}.png")
        frames.append({"file_path": f"images/frame_{i:03d}.png", "transform_matrix": matrix.tolist()})
    meta = {"fl_x": focal, "fl_y": focal, "cx": width / 2, "cy": height / 2, "w": width, "h": height, "frames": frames}
    meta["camera_model"] = "OPENCV"
    if distorted:
        meta |= {"k1": -0.05, "k2": 0.01, "p1": 0.001, "p2": 0.0}
    (folder / "transforms.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def ring_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scene of 14 views in landscape format."""
    return write_ring_scene(tmp_path_factory.mktemp("scenes") / "ring")


@pytest.fixture(scope="session")
def edited_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scene of 11 distorted views of 40x32 with frame masks and an `applied_transform`, and masks for edits in `to-edit`."""
    folder = write_ring_scene(tmp_path_factory.mktemp("edited") / "scene", views=11, distorted=True)
    trained = np.full((32, 40), 255, dtype=np.uint8)
    trained[:4] = 0
    edited = np.zeros((32, 40), dtype=np.uint8)
    edited[:, 8:32] = 255
    meta = json.loads((folder / "transforms.json").read_text())
    for name, mask in (("masks", trained), ("to-edit", edited)):
        (folder / name).mkdir()
        for frame in meta["frames"]:
            Image.fromarray(mask).save(folder / name / Path(frame["file_path"]).name)
    for frame in meta["frames"]:
        frame["mask_path"] = frame["file_path"].replace("images", "masks")
    (folder / "transforms.json").write_text(json.dumps({**meta, "applied_transform": APPLIED_TRANSFORM}))
    return folder


@pytest.fixture(scope="session")
def edited_run(edited_scene: Path, editor_folder: Path) -> Path:
    """A short run on the views of `edited_scene`, reduced to a half, in which three of ten training views are edited."""
    from nerfstudio.scripts import train
    from nerfstudio.utils import writer
    from test_bad_input import TINY

    typed = ["ns-train", "wys-tiny", f"--data={edited_scene}", f"--editor={editor_folder}", *TINY, "--timestamp=run"]
    typed += ["--localization=masks", f"--pipeline.masks-dir={edited_scene / 'to-edit'}"]
    typed += ["--pipeline.caption-before=a red ball", "--pipeline.caption-after=a blue ball"]
    typed += [
        "--pipeline.datamanager.camera-res-scale-factor=0.5",
        "--pipeline.edit-steps=3",
        "--pipeline.edit-every=1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "EVENT_WRITERS", [])
        patch.setattr(
            sys, "argv", [*typed, f"--output-dir={edited_scene.parent / 'out'}", f"--instruction={EDIT_INSTRUCTION}"]
        )
        train.entrypoint()
    return edited_scene.parent / "out" / "scene" / "wys-tiny" / "run"


def as_blender_scene(ring: Path, folder: Path) -> Path:
    """Write the views of a ring scene in the format of NeRF's synthetic scenes.

    Args:
        ring: Result of `write_ring_scene`.
        folder: Folder to write.
    """
    meta = json.loads((ring / "transforms.json").read_text())
    shutil.copytree(ring / "images", folder / "images")
    angle = 2 * math.atan(meta["w"] / (2 * meta["fl_x"]))
    for split, frames in (("train", meta["frames"][2:]), ("val", meta["frames"][:2]), ("test", meta["frames"][:2])):
        listed = [{**frame, "file_path": "./" + frame["file_path"].removesuffix(".png")} for frame in frames]
        (folder / f"transforms_{split}.json").write_text(json.dumps({"camera_angle_x": angle, "frames": listed}))
    return folder


def as_colmap_scene(ring: Path, folder: Path) -> Path:
    """Write the views of a ring scene as a COLMAP model in text format.

    Args:
        ring: Result of `write_ring_scene`.
        folder: Folder to write.
    """
    from scipy.spatial.transform import Rotation

    meta = json.loads((ring / "transforms.json").read_text())
    model = folder / "colmap" / "sparse" / "0"
    model.mkdir(parents=True)
    shutil.copytree(ring / "images", folder / "images")
    intrinsics = [meta[key] for key in ("w", "h", "fl_x", "fl_y", "cx", "cy")]
    (model / "cameras.txt").write_text(f"1 PINHOLE {' '.join(map(str, intrinsics))}\n")
    lines = []
    for i, frame in enumerate(meta["frames"]):
        world_to_camera = np.linalg.inv(np.array(frame["transform_matrix"]) @ np.diag([1, -1, -1, 1]))
        x, y, z, w = Rotation.from_matrix(world_to_camera[:3, :3]).as_quat()
        numbers = [w, x, y, z, *world_to_camera[:3, 3]]
        lines += [f"{i + 1} {' '.join(map(str, numbers))} 1 {Path(frame['file_path']).name}", ""]
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    (model / "points3D.txt").write_text("".join(f"{i} 0 0 {i / 10} 128 128 128 0.5 1 0\n" for i in range(1, 4)))
    return folder
