"""Invalid input is refused in one sentence before training starts; the real command line runs in this process.

    pytest tests/test_bad_input.py -rP | grep '^case'

prints each case with its exit code and message.
"""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import numpy as np
import pytest
import torch
import yaml
from conftest import WORDS, sentence_of, write_ring_scene
from hypothesis import given
from hypothesis import strategies as st
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.scripts import train
from PIL import Image

from wys_nerfstudio.cli import main
from wys_nerfstudio.trainer import WysTrainer
from wys_nerfstudio.training.checkpoint import newest_checkpoint, read_checkpoint
from wys_nerfstudio.utils.data_checks import check_capture
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.recipes import recipe_arguments

TINY = [
    "--vis=tensorboard",
    "--machine.device-type=cpu",
    "--mask-threshold=0.3",
    "--pipeline.reconstruct-steps=2",
    "--pipeline.localize-steps=1",
    "--pipeline.edit-steps=2",
    "--pipeline.diffusion-steps=2",
    "--pipeline.relevance-num-samples=1",
    "--pipeline.model.num-nerf-samples-per-ray=4",
    "--pipeline.model.num-proposal-samples-per-ray=8",
    "--pipeline.model.log2-hashmap-size=10",
    "--pipeline.datamanager.train-num-rays-per-batch=64",
    "--pipeline.datamanager.edit-num-rays-per-batch=64",
]
SIZE = {"width": 24, "height": 20, "views": 6}


class TrainingStarted(Exception):
    """Raised in place of the first training step."""


class CliCase:
    """A valid command line and the files that it names; a test case makes one part invalid.

    Args:
        folder: Empty folder for the files.
        editor: Folder of a valid editor, shared by all cases.
        finished_run: Folder of a finished run, shared by all cases.
    """

    def __init__(self, folder: Path, editor: Path, finished_run: Path) -> None:
        self.folder, self.finished_run = folder, finished_run
        self.scene = write_ring_scene(folder / "scene", **SIZE)
        self.editor = str(editor)
        self.instruction: Optional[str] = "make the ball blue"
        self.method = "wys-tiny"

    def arguments(self, *extra: object) -> list[str]:
        """Return the arguments of ns-train."""
        fixed = [self.method, "--data", self.scene, "--output-dir", self.folder / "out", "--editor", self.editor, *TINY]
        typed = [] if self.instruction is None else ["--instruction", self.instruction]
        return [str(argument) for argument in (*fixed, *typed, *extra)]

    def change_scene(self, change: Callable[[dict], object]) -> None:
        """Change the content of transforms.json."""
        path = self.scene / "transforms.json"
        meta = json.loads(path.read_text())
        change(meta)
        path.write_text(json.dumps(meta))

    def write_image(self, content: bytes) -> None:
        """Replace the file of one image."""
        (self.scene / "images" / "frame_003.png").write_bytes(content)

    def write_recipe(self, text: str) -> list[object]:
        """Write a recipe and return its arguments."""
        (self.folder / "recipe.yaml").write_text(text)
        return ["--recipe", self.folder / "recipe.yaml"]

    def copy_run(
        self, change: Callable[[dict[str, Any]], object] = lambda checkpoint: None, nerfacto: bool = False
    ) -> Path:
        """Copy the finished run and change its checkpoint.

        Args:
            change: Function that modifies the checkpoint.
            nerfacto: Whether the copy is a nerfacto run.
        """
        run = shutil.copytree(self.finished_run, self.folder / "run")
        path = newest_checkpoint(run / "nerfstudio_models")
        assert path is not None
        checkpoint = read_checkpoint(path)
        if nerfacto:
            pipeline = {key: value for key, value in checkpoint["pipeline"].items() if "relevance" not in key}
            checkpoint = {"step": checkpoint["step"], "pipeline": pipeline}
            config = yaml.safe_dump({"method_name": "nerfacto"})
            (run / "config.yml").write_text(config)
        change(checkpoint)
        torch.save(checkpoint, path)
        for other in path.parent.glob("*.ckpt"):
            if other != path:
                other.unlink()
        return run

    def write_masks(self, count: int = 6, value: int = 255, size: tuple[int, int] = (24, 20)) -> Path:
        """Write masks of one gray value, white by default, for the first views."""
        (self.folder / "masks").mkdir()
        for i in range(count):
            Image.new("L", size, value).save(self.folder / "masks" / f"frame_{i:03d}.png")
        return self.folder / "masks"

    def use_cameras(self) -> None:
        """Move the views to the folders of two cameras, with equal names."""

        def move(meta: dict) -> None:
            for i, frame in enumerate(meta["frames"]):
                file = self.scene / "images" / "ab"[i % 2] / f"frame_{i // 2:03d}.png"
                file.parent.mkdir(exist_ok=True)
                (self.scene / frame["file_path"]).rename(file)
                frame["file_path"] = file.relative_to(self.scene).as_posix()

        self.change_scene(move)

    def copy_editor(self) -> Path:
        """Copy the editor and use the copy."""
        self.editor = str(shutil.copytree(self.editor, self.folder / "editor"))
        return Path(self.editor)


@pytest.fixture(scope="module")
def finished_run(editor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the valid command line."""
    folder = tmp_path_factory.mktemp("finished")
    cli_case = CliCase(folder, editor_folder, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ns-train", *cli_case.arguments("--timestamp=run")])
        train.entrypoint()
    (run,) = folder.glob("out/*/*/run")
    return run


@pytest.fixture
def cli_case(tmp_path: Path, editor_folder: Path, finished_run: Path) -> CliCase:
    return CliCase(tmp_path, editor_folder, finished_run)


@pytest.fixture
def no_training(monkeypatch) -> None:
    """Training raises `TrainingStarted`."""

    def start(trainer: WysTrainer) -> None:
        raise TrainingStarted

    monkeypatch.setattr(WysTrainer, "train", start)


@pytest.fixture
def refusal(cli_case: CliCase, no_training, monkeypatch, capsys, request) -> Callable[[list[str]], str]:
    """Run a command line that must be refused, and return the error message."""

    def run(arguments: list[str]) -> str:
        before = set(cli_case.folder.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["ns-train", *arguments])
        with pytest.raises(SystemExit) as error:
            train.entrypoint()
        stderr, code = capsys.readouterr().err, error.value.code
        assert "Traceback" not in stderr
        created = set(cli_case.folder.rglob("*")) - before
        assert created <= {cli_case.folder / "out"}, f"left behind: {sorted(map(str, created))}"
        if code == 2:  # of tyro, for an unknown option or a value of another type
            message = " ".join(stderr.replace("│", " ").split())
        else:
            assert isinstance(code, str) and code.startswith("wys: ") and len(code.splitlines()) == 1, code
            message = code
        print(f"case\t{request.node.callspec.id}\t{code if code == 2 else 1}\t{message}")
        return message

    return run


def test_the_unchanged_command_line_is_accepted(cli_case, no_training, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ns-train", *cli_case.arguments()])
    with pytest.raises(TrainingStarted):
        train.entrypoint()


def test_masks_of_views_with_equal_names_are_accepted(cli_case, no_training, monkeypatch):
    cli_case.use_cameras()
    for number, view in enumerate(sorted((cli_case.scene / "images").rglob("*.png"))):
        name = f"{view.parent.name}/{view.name}" if number % 2 else f"{number:05d}_{view.name}"
        mask = cli_case.folder / "masks" / name
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (24, 20), 255).save(mask)
    monkeypatch.setattr(sys, "argv", ["ns-train", *cli_case.arguments(*MASKS, cli_case.folder / "masks")])
    with pytest.raises(TrainingStarted):
        train.entrypoint()


def case(name: str, invalidate: Callable[[CliCase], object], message: str):
    """Return the parameters of one case.

    Args:
        name: Test id.
        invalidate: Function that makes one part of the command line invalid; a list that it returns holds further arguments.
        message: Regular expression of the expected error message.
    """
    return pytest.param(invalidate, message, id=name)


def frame(meta: dict) -> dict:
    return meta["frames"][3]


def change_pose(meta: dict, change: Callable[[np.ndarray], np.ndarray]) -> None:
    frame(meta)["transform_matrix"] = change(np.array(frame(meta)["transform_matrix"])).tolist()


def stand_still(meta: dict) -> None:
    for other in meta["frames"]:
        for row, value in zip(other["transform_matrix"], (0.1, 0.2, 0.3)):
            row[3] = value


POSES = {
    "zero": lambda pose: 0 * pose,
    "mirrored": lambda pose: pose @ np.diag([1, 1, -1, 1]),
    "scaled by 3": lambda pose: pose @ np.diag([3, 3, 3, 1]),
    "sheared or stretched": lambda pose: pose + [[0, 0.3, 0, 0], *[[0] * 4] * 3],
    "without a last row of 0 0 0 1": lambda pose: pose + [*[[0] * 4] * 3, [0, 0, 0.5, 0]],
}
"""Changes of a pose by the fault that is reported."""

SCENES = [
    case("no scene folder", lambda c: shutil.rmtree(c.scene), 'There is no data at ".*scene": give --data'),
    case("empty scene folder", lambda c: (shutil.rmtree(c.scene), c.scene.mkdir()) and None,
         'There is no ".*transforms.json": ns-process-data writes it'),
    case("broken JSON", lambda c: (c.scene / "transforms.json").write_text("{"), "is not valid JSON"),
    case("JSON list", lambda c: (c.scene / "transforms.json").write_text("[1]"), "is not a capture"),
    case("binary instead of JSON", lambda c: (c.scene / "transforms.json").write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
    case("deeply nested JSON", lambda c: (c.scene / "transforms.json").write_text("[" * 100000), "is not valid JSON"),
    case("no frames key", lambda c: c.change_scene(lambda m: m.pop("frames")), 'no list of "frames"'),
    case("empty frames", lambda c: c.change_scene(lambda m: m.update(frames=[])), 'no list of "frames"'),
    case("frame is not a mapping", lambda c: c.change_scene(lambda m: m.update(frames=[3])), 'no list of "frames"'),
    case("frame without file", lambda c: c.change_scene(lambda m: frame(m).pop("file_path")), 'frame 3 has no "file_path"'),
    case("frame without matrix", lambda c: c.change_scene(lambda m: frame(m).pop("transform_matrix")),
         '"transform_matrix" of images/frame_003.png is not 4 x 4 finite numbers'),
    case("NaN in a matrix", lambda c: c.change_scene(lambda m: frame(m)["transform_matrix"][0].__setitem__(3, math.nan)),
         "is not 4 x 4 finite numbers"),
    case("infinite matrix", lambda c: c.change_scene(lambda m: frame(m)["transform_matrix"][0].__setitem__(3, math.inf)),
         "is not 4 x 4 finite numbers"),
    case("3 x 3 matrix", lambda c: c.change_scene(lambda m: frame(m).update(transform_matrix=[[1, 0, 0]] * 3)),
         "is not 4 x 4 finite numbers"),
    case("poses of zeros", lambda c: c.change_scene(lambda m: [f.update(transform_matrix=[[0] * 4] * 4) for f in m["frames"]]),
         '"transform_matrix" of images/frame_000.png is zero: it must be a rotation and a translation'),
    *(case(f"pose that is {fault}", lambda c, change=change: c.change_scene(lambda m: change_pose(m, change)),
           f'"transform_matrix" of images/frame_003.png is {fault}') for fault, change in POSES.items()),
    case("one frame", lambda c: c.change_scene(lambda m: m.update(frames=m["frames"][:1])), "has a single frame: a scene is"),
    case("all cameras in one place", lambda c: c.change_scene(stand_still), "were all captured from one place"),
    case("byte order mark", lambda c: (c.scene / "transforms.json").write_bytes(b"\xef\xbb\xbf" + (c.scene / "transforms.json").read_bytes())
         and None, "begins with a byte order mark, which nerfstudio cannot read"),
    case("file name that is too long", lambda c: c.change_scene(lambda m: frame(m).update(file_path="x" * 300)), 'no image ".*x"'),
    case("images of another size than their cameras", lambda c: c.change_scene(lambda m: m.update(w=25)),
         'images/frame_000.png" is 24x20 and its camera 25x20: use the images that'),
    case("no training views", lambda c: c.change_scene(lambda m: m.update(train_filenames=[], val_filenames=[], test_filenames=[])),
         "is left for training: change its train_filenames, --eval-mode"),
    case("no training views left by the interval", lambda c: ["nerfstudio-data", "--eval-mode=interval", "--eval-interval=1"],
         "is left for training: change its train_filenames, --eval-mode"),
    case("black frame masks", lambda c: (c.write_masks(value=0), c.change_scene(lambda m: [
         f.update(mask_path=f"../masks/{Path(f['file_path']).name}") for f in m["frames"]]))[1], "leave 0 pixels and a batch has 512"),
    case("no focal length", lambda c: c.change_scene(lambda m: m.pop("fl_x")), 'neither the top level nor the frame .* has "fl_x"'),
    case("focal length of zero", lambda c: c.change_scene(lambda m: m.update(fl_y=0)), '"fl_y" of .* has the invalid value 0'),
    case("focal length is text", lambda c: c.change_scene(lambda m: m.update(fl_x="50mm")), '"fl_x" of .* has the invalid value "50mm"'),
    case("NaN distortion", lambda c: c.change_scene(lambda m: m.update(k1=math.nan)), '"k1" of .* has the invalid value NaN'),
    case("negative width", lambda c: c.change_scene(lambda m: m.update(w=-24)), '"w" of .* has the invalid value -24'),
    case("unknown camera model", lambda c: c.change_scene(lambda m: m.update(camera_model="PINHOLE9")), "unknown camera_model PINHOLE9. Supported: "),
    case("missing image", lambda c: (c.scene / "images" / "frame_003.png").unlink(), "no image .*frame_003.png"),
    case("empty image", lambda c: c.write_image(b""), r'frame_003.png" \(0 bytes\) cannot be read as an image'),
    case("text instead of an image", lambda c: c.write_image(b"plain text"), r"\(10 bytes\) cannot be read as an image"),
    case("truncated image", lambda c: c.write_image((c.scene / "images" / "frame_002.png").read_bytes()[:100]),
         r'frame_003.png" \(100 bytes\) cannot be read as an image'),
    case("CMYK image", lambda c: Image.new("CMYK", (24, 20)).save(c.scene / "images" / "frame_003.png", "JPEG"),
         'images/frame_003.png" is a CMYK image: convert it to RGB first'),
    case("image of 16 bits", lambda c: Image.fromarray(np.zeros((20, 24), np.uint16)).save(c.scene / "images" / "frame_003.png"),
         'images/frame_003.png" has 16 bits per channel'),
    case("images of two sizes",
         lambda c: Image.new("RGB", (12, 10)).save(c.scene / "images" / "frame_003.png"), "All views must have one size"),
    case("no downscaled images", lambda c: ["nerfstudio-data", "--downscale-factor", "2"],
         "There is no .*images_2/frame_000.png.: --downscale-factor 2 reads smaller images .* give --pipeline.datamanager.camera-res-scale-factor 0.5 instead"),
    case("masks for some frames only", lambda c: c.change_scene(lambda m: frame(m).update(mask_path="images/frame_003.png")),
         '5 of 6 frames have no "mask_path", the first of them images/frame_000.png: give it to all frames or to none'),
    case("depth for some frames only", lambda c: c.change_scene(lambda m: frame(m).update(depth_file_path="depth.png")),
         '5 of 6 frames have no "depth_file_path"'),
    case("mask that is a number", lambda c: c.change_scene(lambda m: [f.update(mask_path=1) for f in m["frames"]]),
         'the "mask_path" of images/frame_000.png is not a path'),
    case("unknown orientation", lambda c: c.change_scene(lambda m: m.update(orientation_override="down")),
         'the "orientation_override" is down. Supported: pca, up, vertical, none'),
    case("malformed transform", lambda c: c.change_scene(lambda m: m.update(applied_transform=[[1, 0, 0]] * 3)),
         'the "applied_transform" is not 3 x 4 finite numbers'),
    *(case(f"split with {' and '.join(given) or 'nothing'}", lambda c, given=given: c.change_scene(lambda m: m.update(
           {f"{split}_filenames": ["images/frame_003.png"] for split in given})),
           f"has {' and '.join(f'{split}_filenames' for split in given)}, but no {missing}_filenames: training reads")
      for given, missing in [(["train"], "val"), (["val"], "train"), (["train", "val"], "test"), (["train", "test"], "val")]),
    *(case(f"{split} split without frames", lambda c, split=split: c.change_scene(lambda m: m.update(
           {f"{other}_filenames": ["nothing.png"] if other == split else ["images/frame_003.png"] for other in ("train", "val", "test")})),
           f'{split}_filenames lists nothing.png, which is not the "file_path" of any frame') for split in ("train", "val", "test")),
    case("split that is not a list", lambda c: c.change_scene(lambda m: m.update(
         train_filenames=None, val_filenames=[], test_filenames=[])), "train_filenames is not a list of file names"),
    *(case(f"split by file names with {parser}", lambda c, parser=parser: [parser, "--eval-mode=filename"],
           "The name of each image at .*scene. must contain train or eval") for parser in ("nerfstudio-data", "instant-ngp-data")),
    case("scene of another format", lambda c: ["blender-data"], 'There is no ".*transforms_train.json": for data in another'),
]  # fmt: skip

MASKS = ["--localization", "masks", "--pipeline.masks-dir"]
OPTIONS = [
    *(
        case(f"{option} {value}", lambda c, option=option, value=value: [f"--{option}", value], f"--{option} must be")
        for option, values in {
            "guidance-scale": ["nan", "inf", "-1"],
            "image-guidance-scale": ["nan", "-0.5"],
            "mask-threshold": ["nan", "1.5", "-0.1"],
            "pipeline.relevance-noise-level": ["0", "1", "nan"],
            "pipeline.min-strength": ["0", "-1"],
            "pipeline.max-strength": ["1", "nan"],
            "pipeline.relevance-num-samples": ["0"],
            "pipeline.relevance-outlier-factor": ["-1", "nan"],
            "pipeline.model.relevance-expectile": ["0", "1", "nan"],
            "pipeline.diffusion-steps": ["0"],
            "pipeline.edit-every": ["0"],
            "pipeline.edit-count": ["-1"],
            "pipeline.edit-steps": ["0"],
            "pipeline.reconstruct-steps": ["-1"],
            "pipeline.localize-steps": ["-5"],
            "pipeline.relevance-batch-size": ["0"],
            "pipeline.edit-resolution": ["0"],
            "pipeline.datamanager.edit-patch-size": ["0"],
            "pipeline.datamanager.edit-num-rays-per-batch": ["0"],
            "pipeline.datamanager.train-num-rays-per-batch": ["-64"],
            "pipeline.model.lpips-loss-mult": ["-1", "nan"],
            "pipeline.model.relevance-loss-mult": ["inf"],
            "pipeline.model.num-levels": ["0"],
            "pipeline.model.near-plane": ["nan", "-1"],
            "machine.seed": ["-1"],
            "max-num-iterations": ["0"],
            "steps-per-save": ["-1"],
            "steps-per-eval-batch": ["-1"],
            "steps-per-eval-image": ["-2"],
            "steps-per-eval-all-images": ["-1"],
            "logging.steps-per-log": ["0", "-5"],
            "logging.max-buffer-size": ["0"],
            "logging.local-writer.max-log-size": ["-1"],
            "pipeline.datamanager.camera-res-scale-factor": ["0", "nan"],
            "optimizers.fields.optimizer.lr": ["nan", "-0.1"],
            "optimizers.fields.scheduler.max-steps": ["0"],
        }.items()
        for value in values
    ),
    case("gradients accumulated over no step", lambda c: ["--gradient-accumulation-steps", "fields", "0"],
         "--gradient-accumulation-steps fields must be at least 1, not 0"),
    *(
        case(f"{option} of 256 bytes", lambda c, option=option: [option, "é" * 128], "has a file or folder name of 256 bytes")
        for option in ("--experiment-name", "--timestamp", "--output-dir", "--pipeline.masks-dir", "--load-dir", "--base-run")
    ),
    case("experiment name with a line break", lambda c: ["--experiment-name", "x\n```\n<img src=x>"], "The run's folder .* contains control characters"),
    case("data in a folder with a line break", lambda c: ["--data", c.scene.rename(c.folder / "a\nb")], "contains control characters"),
    case("path of 5000 bytes", lambda c: ["--output-dir", "a/" * 2500], "is a path of more than 4095 bytes"),
    case("instruction that is not UTF-8", lambda c: setattr(c, "instruction", "make it \udcff"),
         r"--pipeline.instruction .make it .udcff. has bytes that are not UTF-8"),
    case("output folder that is not UTF-8", lambda c: ["--output-dir", c.folder / "\udce9t\udce9"], "--output-dir .* has bytes that are not UTF-8"),
    case("data that are not UTF-8", lambda c: ["--data", c.scene.rename(c.folder / "\udce9")], "--pipeline.datamanager.data .* has bytes that are not UTF-8"),
    case("editor that is not UTF-8", lambda c: setattr(c, "editor", "\udce9"), "--pipeline.editor .* has bytes that are not UTF-8"),
    case("null byte in the instruction", lambda c: setattr(c, "instruction", "make it\0"), "--pipeline.instruction contains a null byte"),
    case("null byte in a path", lambda c: ["--base-run", "a\0b"], "--pipeline.base-run contains a null byte"),
    case("editor of an unknown user", lambda c: setattr(c, "editor", "~nosuchuser/editor"), "no editor folder"),
    case("editor with an overlong name", lambda c: setattr(c, "editor", "/" + "x" * 300), "File name too long|no editor folder"),
    *(
        case(f"nerfstudio-data {option} {value}", lambda c, option=option, value=value: ["nerfstudio-data", f"--{option}", value],
             f"wys: --{option} must be")
        for option, values in {
            "scale-factor": ["nan", "0", "-1", "inf"],
            "scene-scale": ["nan", "0"],
            "downscale-factor": ["0", "-1"],
            "train-split-fraction": ["0", "nan", "1.5"],
            "eval-interval": ["0"],
            "depth-unit-scale-factor": ["nan"],
        }.items()
        for value in values
    ),
    case("fraction of another parser", lambda c: ["phototourism-data", "--train-split-fraction=0"], "wys: --train-split-fraction must be above 0"),
    case("scale of another parser", lambda c: ["colmap", "--data", c.scene, "--scale-factor=nan"], "wys: --scale-factor must be a finite"),
    case("near above far", lambda c: ["--pipeline.model.near-plane=9", "--pipeline.model.far-plane=3"], "must be below"),
    case("minimum strength above maximum", lambda c: ["--pipeline.min-strength=0.9", "--pipeline.max-strength=0.2"],
         "swap them"),
    case("too few proposal samples", lambda c: ["--pipeline.model.num-proposal-iterations=2"], "needs 2 numbers, one per"),
    case("threshold is text", lambda c: ["--mask-threshold", "abc"], "mask-threshold"),
    case("unknown option", lambda c: ["--mask-treshold", "0.5"], "mask-treshold"),
    case("unknown localization", lambda c: ["--localization", "magic"], "localization"),
    case("field without localize steps", lambda c: ["--pipeline.localize-steps=0"], "needs --pipeline.localize-steps above 0"),
    case("patches larger than views", lambda c: ["--pipeline.model.lpips-loss-mult=1", "--pipeline.model.lpips-weights",
         c.folder / "none.pth", "--pipeline.datamanager.edit-patch-size=8"], "edit-patch-size must be at least 32"),
    case("two devices on a machine without any", lambda c: ["--machine.num-devices=2"], "num-devices is 2, but this machine has 0 CUDA devices"),
    case("zero devices", lambda c: ["--machine.num-devices=0"], "num-devices is 0, but this machine has 0 CUDA devices"),
    case("two machines", lambda c: ["--machine.num-machines=2"], "A scene is trained on one machine"),
    case("missing editor device", lambda c: ["--pipeline.editor-device=cuda:7"], 'no device "cuda:7": --pipeline.editor-device can be cpu'),
    case("unknown number of an editor device", lambda c: ["--pipeline.editor-device=cuda:one"], 'no device "cuda:one": --pipeline.editor-device can be cpu'),
    case("unknown kind of editor device", lambda c: ["--pipeline.editor-device=gpu"], 'The device "gpu" is not supported: --pipeline.editor-device takes cpu or cuda.'),
    case("editor on Apple's mps", lambda c: ["--pipeline.editor-device=mps"], 'The device "mps" is not supported: --pipeline.editor-device takes cpu or cuda.'),
    case("training on Apple's mps", lambda c: ["--machine.device-type=mps"], 'The device "mps" is not supported: --machine.device-type takes cpu or cuda.'),
    case("one caption", lambda c: ["--pipeline.caption-after", "a panda"], "go together"),
    case("normals", lambda c: ["--pipeline.model.predict-normals=True"], "is not supported"),
    case("not all views in memory", lambda c: ["--pipeline.datamanager.train-num-images-to-sample-from=2"],
         "All views are edited"),
    case("masks without a folder", lambda c: ["--localization=masks"], "go together"),
    case("folder without masks", lambda c: ["--pipeline.masks-dir", c.scene], "go together"),
    case("missing masks folder", lambda c: [*MASKS, c.folder / "none"], "no mask for the view frame_000.png"),
    case("missing mask", lambda c: [*MASKS, c.write_masks(3)], "no mask for the view frame_003.png"),
    case("mask is not an image", lambda c: ((c.write_masks() / "frame_003.png").write_bytes(b"x"), [*MASKS, c.folder / "masks"])[1],
         r'The mask ".*masks/frame_003.png" cannot be read as an image'),
    case("masks that are all black", lambda c: [*MASKS, c.write_masks(value=0)], "All masks in .*masks. are black: nothing would be edited"),
    case("0/1 masks", lambda c: [*MASKS, c.write_masks(value=1)], "masks/frame_000.png. is a 0/1 mask: .* multiply a 0/1 mask by 255"),
    case("one mask for two views", lambda c: (c.use_cameras(), [*MASKS, c.write_masks(3)])[1],
         'masks/frame_000.png" is the mask of both ".*images/a/frame_000.png" and ".*images/b/frame_000.png": give each its own'),
    case("masks of another shape", lambda c: [*MASKS, c.write_masks(size=(20, 24))], "masks/frame_000.png. is 20x24 and its view 24x20"),
    case("no instruction", lambda c: setattr(c, "instruction", None), "There is no instruction"),
    case("blank instruction", lambda c: setattr(c, "instruction", " \t "), "There is no instruction"),
    case("instruction too long", lambda c: setattr(c, "instruction", " ".join(WORDS * 3)),
         r"The instruction has \d+ tokens, but the text encoder of .* takes at most 40: shorten it"),
    case("unknown words for the embedded editor", lambda c: (setattr(c, "editor", "embedded"),
         setattr(c, "instruction", "снег")) and None, "has words that the editor .embedded. was not trained on"),
    case("more steps than noise levels", lambda c: ["--pipeline.diffusion-steps", "5000"],
         "has 999 noise levels: .*--pipeline.diffusion-steps. must be at most 999, not 5000"),
    case("prompt and instruction", lambda c: ["--prompt", "make it red"], "--prompt and --instruction are the same option"),
]  # fmt: skip

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij")
)
RECIPES = [
    case("missing recipe", lambda c: ["--recipe", c.folder / "none.yaml"], "cannot be read: give --recipe a YAML file"),
    case("recipe is a folder", lambda c: ["--recipe", c.scene], "cannot be read: give --recipe a YAML file"),
    case("recipe is not YAML", lambda c: c.write_recipe("a: [1"), "is not valid YAML"),
    case("recipe is a list", lambda c: c.write_recipe("- a\n- b"), 'must consist of lines "option: value"'),
    case("recipe is empty", lambda c: c.write_recipe(""), 'must consist of lines "option: value"'),
    case("recipe with an unknown option", lambda c: c.write_recipe("mask-treshold: 0.5"), "has an unknown option of ns-train"),
    case("recipe with a value of another type", lambda c: c.write_recipe("mask-threshold: high"), "or an invalid value"),
    case("recipe with a value out of range", lambda c: c.write_recipe("pipeline.edit-every: 0"), "--pipeline.edit-every must be at least 1, not 0"),
    case("recipe with a nested value", lambda c: c.write_recipe("mask-threshold: {a: 1}"), 'must consist of lines "option: value"'),
    case("recipe with a recipe", lambda c: c.write_recipe("recipe: other.yaml"), "refers to another recipe"),
    case("recipe with an option within a value", lambda c: c.write_recipe('instruction: "x\\0y"'), 'must consist of lines "option: value"'),
    case("recipe with a value within an option", lambda c: c.write_recipe("output-dir=/tmp: x"), 'must consist of lines "option: value"'),
    case("recipe that sets where a run is written", lambda c: c.write_recipe("output_dir: elsewhere"), "sets --output-dir, which recipes cannot"),
    case("recipe that opens the viewer's port", lambda c: c.write_recipe("viewer.websocket-host: 0.0.0.0"), "sets --viewer.websocket-host"),
    case("recipe that loads a run", lambda c: c.write_recipe("base-run: elsewhere"), "sets --pipeline.base-run, which recipes cannot"),
    case("YAML bomb", lambda c: c.write_recipe(BOMB), 'must consist of lines "option: value"'),
    case("YAML with a Python call", lambda c: c.write_recipe('a: !!python/object/apply:os.mkdir ["/tmp/x"]'), "is not valid YAML"),
    case("deeply nested YAML", lambda c: c.write_recipe("[" * 20000), "is not valid YAML"),
]  # fmt: skip


def base(cli_case: CliCase, change: Callable[[dict[str, Any]], object], nerfacto: bool = True) -> list[object]:
    return ["--base-run", cli_case.copy_run(change, nerfacto)]


def rename_weight(checkpoint: dict[str, Any]) -> None:
    key = next(key for key in checkpoint["pipeline"] if "mlp_head" in key)
    checkpoint["pipeline"][key.replace("mlp_head", "head_mlp")] = checkpoint["pipeline"].pop(key)


def drop_view(checkpoint: dict[str, Any]) -> None:
    key = next(key for key in checkpoint["pipeline"] if "embedding_appearance" in key)
    checkpoint["pipeline"][key] = checkpoint["pipeline"][key][:-1]


def use_tiny_cuda_nn(checkpoint: dict[str, Any]) -> None:
    checkpoint["pipeline"]["_model.field.mlp_base.model.params"] = torch.zeros(10)


def use_splatfacto(checkpoint: dict[str, Any]) -> None:
    checkpoint["pipeline"] = {"_model.gauss_params.means": torch.zeros(5, 3)}


def truncate(cli_case: CliCase, length: int) -> Path:
    """Truncate all checkpoints of a run."""
    run = shutil.copytree(cli_case.finished_run, cli_case.folder / "run")
    for path in (run / "nerfstudio_models").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:length])
    return run


def change_scale(cli_case: CliCase) -> list[object]:
    run = cli_case.copy_run()
    file = run / "dataparser_transforms.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scale": 9.0}))
    return ["--base-run", run]


MORE_STEPS = ["--pipeline.edit-steps=9"]


def repaint_frame(cli_case: CliCase) -> None:
    """Change one pixel of a picture by one level."""
    path = cli_case.scene / "images" / "frame_002.png"
    pixels = np.array(Image.open(path))
    pixels[3, 5, 1] ^= 1
    Image.fromarray(pixels).save(path)


def move_frame(cli_case: CliCase) -> None:
    """Change the focal length of one camera."""
    lengths = {"fl_x": 28.8, "fl_y": 28.8}
    cli_case.change_scene(lambda meta: [meta.pop(key) for key in lengths])
    cli_case.change_scene(lambda meta: [each.update(lengths) for each in meta["frames"]])
    cli_case.change_scene(lambda meta: frame(meta).update(fl_x=29))


def zoom_frames(cli_case: CliCase) -> None:
    cli_case.change_scene(lambda meta: meta.update(fl_x=31))


def widen(checkpoint: dict[str, Any]) -> None:
    key = next(key for key in checkpoint["pipeline"] if "mlp_head" in key)
    checkpoint["pipeline"][key] = torch.zeros(99, 3)


RUNS = [
    case("missing base run", lambda c: ["--base-run", c.folder / "none"], "No checkpoint found in .*--base-run takes"),
    case("base run without a checkpoint", lambda c: ["--base-run", c.scene], "No checkpoint found in .*--base-run takes"),
    case("base run of another method", lambda c: base(c, use_splatfacto), "is not a scene of this shape"),
    case("base run of other views", lambda c: base(c, drop_view), "trained on 5 views and this data has 6"),
    case("base run of another backend", lambda c: base(c, use_tiny_cuda_nn), "with tiny-cuda-nn, whose weights only"),
    case("base run with renamed keys", lambda c: base(c, rename_weight), "is not a scene of this shape: .*head"),
    case("base run with another scale", change_scale, "has its cameras in another place or scale"),
    case("base run with edited views of other data",
         lambda c: base(c, lambda checkpoint: checkpoint["wys"]["views"].update(size=[9, 9]), nerfacto=False), "views of that run are of other data"),
    case("base run of an empty checkpoint", lambda c: ["--base-run", truncate(c, 0)], "could not be read"),
    case("resume from a truncated checkpoint", lambda c: ["--load-dir", truncate(c, 1000)], "could not be read"),
    case("resume without a state", lambda c: ["--load-dir", c.copy_run(lambda checkpoint: checkpoint.pop("wys"))], "cannot be resumed from"),
    case("resume with a damaged state", lambda c: ["--load-dir", c.copy_run(lambda checkpoint: checkpoint["wys"].update(schedule=3))],
         "cannot be resumed from"),
    case("resume from a missing step", lambda c: ["--load-dir", c.finished_run, "--load-step=3"],
         "No checkpoint of step 3 found in .*--load-step can be 4"),
    case("resume with another backend", lambda c: ["--load-dir", c.copy_run(use_tiny_cuda_nn), "--pipeline.edit-steps=9"],
         "The run .*run. was trained with tiny-cuda-nn, whose weights only"),
    *(
        case(f"resume with {' '.join(option)}", lambda c, option=option: ["--load-dir", c.finished_run, *MORE_STEPS, *option],
             f'The run ".*run" was trained with other options: {remedy}[.]')
        for option, remedy in [
            (["--pipeline.model.hidden-dim=16"], "add --pipeline.model.hidden-dim 32"),
            (["--pipeline.model.log2-hashmap-size=11"], "add --pipeline.model.log2-hashmap-size 10"),
            (["--pipeline.model.num-levels=7"], "add --pipeline.model.num-levels 8"),
            (["--pipeline.model.max-res=256"], "add --pipeline.model.max-res 512"),
            (["--pipeline.model.base-res=8"], "add --pipeline.model.base-res 16"),
            (["--pipeline.model.average-init-density=0.5"], "add --pipeline.model.average-init-density 1.0"),
            (["--pipeline.model.use-appearance-embedding=False"], "add --pipeline.model.use-appearance-embedding True"),
            (["--pipeline.model.relevance-input=geometry"], "add --pipeline.model.relevance-input geometry.position"),
            (["--pipeline.model.camera-optimizer.mode=SE3"], "add --pipeline.model.camera-optimizer.mode off"),
            (["--pipeline.model.background-color=white"], "add --pipeline.model.background-color last_sample"),
            (["nerfstudio-data", "--eval-mode", "all"], "end the command with nerfstudio-data --eval-mode fraction"),
            (["nerfstudio-data", "--orientation-method=none", "--scale-factor=2"],
             "end the command with nerfstudio-data --orientation-method up --scale-factor 1.0"),
            (["blender-data"], "end the command with nerfstudio-data"),
        ]
    ),
    case("resume with another method", lambda c: (setattr(c, "method", "wys"), ["--load-dir", c.finished_run, *MORE_STEPS])[1],
         'The run ".*run" is a wys-tiny run: resume it with ns-train wys-tiny.'),
    case("resume with fewer views", lambda c: (c.change_scene(lambda m: m["frames"].pop()),
         ["--load-dir", c.finished_run, *MORE_STEPS])[1], "views of that run are of other data .6 views.* than this run's .5 views"),
    *(
        case(f"{option} with {change.__name__}", lambda c, option=option, change=change: (change(c), [option, c.finished_run, *MORE_STEPS])[1],
             f"{message} not what that run was trained on: use the same --data")
        for option, change, message in [
            ("--load-dir", repaint_frame, "The picture of the view frame_002 is"),
            ("--base-run", repaint_frame, "The picture of the view frame_002 is"),
            ("--load-dir", move_frame, "The camera of the view frame_003 is"),
            ("--load-dir", zoom_frames, "The cameras of 6 views, the first of them frame_000, are"),
            ("--base-run", zoom_frames, "The cameras of 6 views, the first of them frame_000, are"),
        ]
    ),
    case("resume from weights of another shape", lambda c: ["--load-dir", c.copy_run(widen), *MORE_STEPS],
         "The run .*run. is not a scene of this shape: field.mlp_head.* there and .* here. Resume it with the options"),
    case("resume from the captured scene", lambda c: ["--load-checkpoint", c.finished_run / "wys" / "captured.ckpt"],
         "cannot be resumed from .*captured.ckpt.*Give it to --base-run instead"),
    case("resume from a snapshot", lambda c: ["--load-dir", c.copy_run(lambda checkpoint: checkpoint.pop("optimizers")), *MORE_STEPS],
         "cannot be resumed from .*, which contains no optimizers. Give it to --base-run instead"),
    case("resume with a damaged config.yml", lambda c: ((run := c.copy_run()), (run / "config.yml").write_text("["),
         ["--load-dir", run, *MORE_STEPS])[-1], "config.yml. cannot be read: .* Restore that run's options"),
    case("base run with a damaged config.yml", lambda c: ((run := c.copy_run()), (run / "config.yml").write_bytes(b"\xff"),
         ["--base-run", run])[-1], "config.yml. cannot be read: .* Restore that run's options"),
    case("base run with a damaged transform", lambda c: ((run := c.copy_run()), (run / "dataparser_transforms.json").write_text("{}"),
         ["--base-run", run])[-1], "because .dataparser_transforms.json. is damaged: restore"),
    case("resume of a finished run", lambda c: ["--load-dir", c.finished_run], "The run is finished: it has 5 of 5 steps"),
    case("resume with another instruction", lambda c: (setattr(c, "instruction", "make it snow"),
         ["--load-dir", c.finished_run])[1], "resumes a run whose instruction is"),
    case("resume from nerfacto with a base run", lambda c: ["--load-dir", c.copy_run(nerfacto=True), "--base-run", c.finished_run],
         "give one of them"),
]  # fmt: skip


def truncate_weights(cli_case: CliCase, part: str) -> None:
    (weights,) = (cli_case.copy_editor() / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])


def rename_to_pickle(cli_case: CliCase) -> None:
    (weights,) = (cli_case.copy_editor() / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))


EDITORS = [
    case("missing editor folder", lambda c: setattr(c, "editor", str(c.folder / "none")), "no editor folder"),
    case("editor without a part", lambda c: shutil.rmtree(c.copy_editor() / "vae"), 'has no vae: --editor needs'),
    case("editor with an empty part", lambda c: [p.unlink() for p in (c.copy_editor() / "unet").iterdir()] and None,
         "could not be loaded from its folder"),
    case("editor with truncated weights", lambda c: truncate_weights(c, "unet"), "could not be loaded from its folder"),
    case("text encoder with truncated weights", lambda c: truncate_weights(c, "text_encoder"), "could not be loaded from its folder"),
    case("editor with pickled weights", rename_to_pickle, "as a pickle .* only: .*--pipeline.editor-allow-pickle"),
    case("editor with a broken config", lambda c: (c.copy_editor() / "unet" / "config.json").write_text("{") and None,
         "could not be loaded from its folder"),
    case("editor without a vocabulary", lambda c: [p.unlink() for p in (c.copy_editor() / "tokenizer").iterdir()] and None,
         "is incomplete: it has "),
]  # fmt: skip


@pytest.mark.parametrize(("invalidate", "message"), [*SCENES, *OPTIONS, *RECIPES, *RUNS, *EDITORS])
def test_invalid_input_is_refused_before_training_starts(cli_case, refusal, invalidate, message):
    extra = invalidate(cli_case)
    printed = refusal(cli_case.arguments(*(extra if isinstance(extra, list) else [])))
    assert re.search(message, printed), printed


def file_as_output_folder(cli_case: CliCase) -> list[object]:
    (cli_case.folder / "file").touch()
    return ["--output-dir", cli_case.folder / "file" / "out"]


def existing_run(cli_case: CliCase) -> list[object]:
    shutil.copytree(cli_case.finished_run, cli_case.folder / "out" / "scene" / "wys-tiny" / "run")
    return ["--timestamp=run"]


@pytest.mark.parametrize(
    ("invalidate", "message"),
    [
        case("output folder cannot be created", file_as_output_folder, "folder .* cannot be written: .*--output-dir"),
        case(
            "run of this name exists", existing_run, 'There is a run in ".*run" already: to resume, type .*--load-dir'
        ),
    ],
)
def test_unusable_output_folders_are_refused_and_not_changed(cli_case, refusal, invalidate, message):
    extra = invalidate(cli_case)
    before = {path: path.read_bytes() for path in (cli_case.folder / "out").rglob("*") if path.is_file()}
    assert re.search(message, refusal(cli_case.arguments(*extra)))
    assert {path: path.read_bytes() for path in before} == before


def test_a_refused_resume_keeps_the_config_of_the_run(cli_case, no_training, monkeypatch):
    run = cli_case.folder / "out" / "scene" / "wys-tiny" / "run"
    shutil.copytree(cli_case.finished_run, run)
    before = (run / "config.yml").read_bytes()
    repaint_frame(cli_case)
    arguments = cli_case.arguments("--timestamp=run", "--load-dir", run, *MORE_STEPS)
    monkeypatch.setattr(sys, "argv", ["ns-train", *arguments])
    assert "The picture of the view frame_002" in sentence_of(train.entrypoint)
    assert (run / "config.yml").read_bytes() == before
    repaint_frame(cli_case)  # as before
    with pytest.raises(TrainingStarted):
        train.entrypoint()
    assert b"edit_steps: 9" in (run / "config.yml").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png", "make it red"], "none.png"),
        (["empty.png", "make it red"], "empty.png"),
        (["good.png", ""], "instruction"),
        (["good.png"], "takes images and an instruction"),
        (["good.png", "make it red", "--editor", "no/folder/here"], "There is no editor folder"),
        (["good.png", "make it red", "--guidance-scale", "nan"], "guidance-scale"),
        (["good.png", "make it red", "--mask-threshold", "2"], "mask-threshold"),
        (["good.png", "make it red", "--diffusion-steps", "0"], "diffusion-steps"),
    ],
)
def test_invalid_image_edits_are_refused(arguments, message, editor_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (24, 20)).save("good.png")
    Path("empty.png").touch()
    rest = ["-o", "out.png", *([] if "--editor" in arguments else ["--editor", str(editor_folder)])]
    monkeypatch.setattr(sys, "argv", ["wys", "edit-image", *arguments, *rest])
    with pytest.raises(SystemExit) as error:
        main.entrypoint()
    code = str(error.value.code)
    assert code.startswith("wys: ") and len(code.splitlines()) == 1 and message in code, code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.png", "good.png"]
    assert "Traceback" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- properties

JSON_VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
                           lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values, max_size=3),
                           max_leaves=6)  # fmt: skip


@given(text=st.text(alphabet="ab:-[]{}&*!#|>%@ \n\t'\"0129.,?~\0é", max_size=40) | JSON_VALUES.map(yaml.safe_dump))
def test_a_recipe_gives_arguments_or_is_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(text, "utf8")
    try:
        arguments = recipe_arguments(path)
    except WysError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
    else:
        assert all(isinstance(argument, str) for argument in arguments)
        assert all(argument.startswith("--") and "=" in argument for argument in arguments)


@pytest.fixture(scope="module")
def valid_scene(tmp_path_factory) -> Path:
    """A scene whose transforms.json stays valid; changed ones are written beside it."""
    return write_ring_scene(tmp_path_factory.mktemp("valid") / "scene", **SIZE)


@given(value=JSON_VALUES, key=st.sampled_from(["frames", "fl_x", "cx", "w", "k1", "camera_model", "file_path", "transform_matrix"]),
       into_frame=st.booleans(), drop=st.booleans())  # fmt: skip
def test_a_capture_is_loadable_or_refused(valid_scene, value, key, into_frame, drop):
    meta = json.loads((valid_scene / "transforms.json").read_text())
    mapping = frame(meta) if into_frame else meta
    if drop:
        mapping.pop(key, None)
    else:
        mapping[key] = value
    file = valid_scene / "changed.json"
    file.write_text(json.dumps(meta))
    try:
        check_capture(file, NerfstudioDataParserConfig())
    except WysError as error:
        assert len(str(error).splitlines()) == 1
    else:  # what the check accepts, nerfstudio can load
        config = NerfstudioDataParserConfig(data=file)
        assert len(config.setup().get_dataparser_outputs("train").image_filenames) == SIZE["views"]


def start_tracker(failure: BaseException) -> ModuleType:
    """Return a stand-in for wandb and comet_ml that cannot be started."""

    def fail(**_: object) -> None:
        raise failure

    module = ModuleType("tracker")
    module.init = module.Experiment = fail  # type: ignore
    return module


@pytest.mark.parametrize(
    ("vis", "package", "tracker", "message"),
    [
        ("wandb", "wandb", None, "the package wandb cannot be imported.: pip install wandb, or train with --vis viewer"),
        ("viewer+wandb", "wandb", start_tracker(RuntimeError("No API key configured. Use `wandb login` to log in.")),
         "No API key configured. Use `wandb login` to log in.: log in with wandb login, set WANDB_MODE=offline if"),
        ("comet", "comet_ml", None, "the package comet_ml cannot be imported.: pip install comet_ml, or train with"),
        ("comet", "comet_ml", start_tracker(ValueError("Comet.ml requires an API key.\nDetails")),
         "Comet.ml requires an API key.: set COMET_API_KEY to the key of your account, or train with --vis viewer"),
        ("comet", "comet_ml", start_tracker(TimeoutError()), "--vis comet does not start .TimeoutError.: set COMET_API"),
    ],
)  # fmt: skip
def test_trackers_that_cannot_be_started_are_refused(cli_case, refusal, monkeypatch, vis, package, tracker, message):
    monkeypatch.setitem(sys.modules, package, tracker)
    assert re.search(message, refusal(cli_case.arguments("--vis", vis)))
