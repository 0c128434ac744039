"""What is wrong with the input is said in one sentence at once: through the real command line, in this process.

    pytest tests/test_bad_input.py -rP | grep '^case'

prints the table.
"""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import WORDS, write_ring_scene
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


class Began(Exception):
    """The run came as far as its first step."""


class Desk:
    """A user's folder, with everything in order: what a case spoils, it spoils in a copy."""

    def __init__(self, folder: Path, editor: Path, run: Path) -> None:
        self.folder, self.finished = folder, run
        self.scene = write_ring_scene(folder / "scene", **SIZE)
        self.editor = str(editor)
        self.instruction = "make the ball blue"

    def arguments(self, *extra: object) -> list[str]:
        """A command line that works, but for what a case has done."""
        fixed = ["wys-tiny", "--data", self.scene, "--output-dir", self.folder / "out", "--editor", self.editor, *TINY]
        typed = [] if self.instruction is None else ["--instruction", self.instruction]
        return [str(argument) for argument in (*fixed, *typed, *extra)]

    # ------------------------------------------------------------------------------------------------------- spoiling

    def meta(self, change: Callable[[dict], object]) -> None:
        """Changes the scene's transforms.json."""
        path = self.scene / "transforms.json"
        meta = json.loads(path.read_text())
        change(meta)
        path.write_text(json.dumps(meta))

    def picture(self, content: bytes) -> None:
        (self.scene / "images" / "frame_003.png").write_bytes(content)

    def recipe(self, text: str) -> list[object]:
        (self.folder / "recipe.yaml").write_text(text)
        return ["--recipe", self.folder / "recipe.yaml"]

    def run(self, change: Callable[[dict[str, Any]], object] = lambda checkpoint: None, nerfacto: bool = False) -> Path:
        """A copy of a finished run whose checkpoint is changed."""
        run = shutil.copytree(self.finished, self.folder / "run")
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

    def masks(self, count: int = 6) -> Path:
        (self.folder / "masks").mkdir()
        for i in range(count):
            Image.new("L", (24, 20), 255).save(self.folder / "masks" / f"frame_{i:03d}.png")
        return self.folder / "masks"

    def own_editor(self) -> Path:
        self.editor = str(shutil.copytree(self.editor, self.folder / "editor"))
        return Path(self.editor)


@pytest.fixture(scope="module")
def finished(editor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, from the same command line that is spoiled below."""
    folder = tmp_path_factory.mktemp("finished")
    desk = Desk(folder, editor_folder, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ns-train", *desk.arguments("--timestamp=run")])
        train.entrypoint()
    (run,) = folder.glob("out/*/*/run")
    return run


@pytest.fixture
def desk(tmp_path: Path, editor_folder: Path, finished: Path) -> Desk:
    return Desk(tmp_path, editor_folder, finished)


@pytest.fixture
def refused(desk: Desk, monkeypatch, capsys, request) -> Callable[[list[str]], str]:
    """Types a command line and returns the sentence that it is refused with."""

    def began(trainer: WysTrainer) -> None:
        raise Began

    monkeypatch.setattr(WysTrainer, "train", began)

    def type_it(arguments: list[str]) -> str:
        before = sorted(desk.folder.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["ns-train", *arguments])
        with pytest.raises(SystemExit) as ending:
            train.entrypoint()
        said, code = capsys.readouterr().err, ending.value.code
        assert "Traceback" not in said
        left = {path.relative_to(desk.folder) for path in desk.folder.rglob("*")} - {
            path.relative_to(desk.folder) for path in before
        }
        assert left <= {Path("out")}, f"left behind: {sorted(map(str, left))}"
        if code == 2:  # tyro's own, about a value of another type or an option that it does not know
            sentence = " ".join(said.replace("│", " ").split())
        else:
            assert isinstance(code, str) and code.startswith("wys: ") and len(code.splitlines()) == 1, code
            sentence = code
        print(f"case\t{request.node.callspec.id}\t{code if code == 2 else 1}\t{sentence}")
        return sentence

    return type_it


def test_the_command_line_that_is_spoiled_below_works(desk, monkeypatch):
    monkeypatch.setattr(WysTrainer, "train", lambda trainer: (_ for _ in ()).throw(Began))
    monkeypatch.setattr(sys, "argv", ["ns-train", *desk.arguments()])
    with pytest.raises(Began):
        train.entrypoint()


def case(name: str, spoil: Callable[[Desk], object], sentence: str):
    """A case: what is done to the desk; it may return further arguments."""
    return pytest.param(spoil, sentence, id=name)


def frame(meta: dict) -> dict:
    return meta["frames"][3]


SCENES = [
    case("no scene folder", lambda d: shutil.rmtree(d.scene), 'There is no data at ".*scene": give --data'),
    case("empty scene folder", lambda d: (shutil.rmtree(d.scene), d.scene.mkdir()) and None,
         'There is no ".*transforms.json": ns-process-data writes it'),
    case("broken JSON", lambda d: (d.scene / "transforms.json").write_text("{"), "is not valid JSON"),
    case("JSON of another kind", lambda d: (d.scene / "transforms.json").write_text("[1]"), "is not a capture"),
    case("binary instead of JSON", lambda d: (d.scene / "transforms.json").write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
    case("JSON too deep", lambda d: (d.scene / "transforms.json").write_text("[" * 100000), "is not valid JSON"),
    case("no frames key", lambda d: d.meta(lambda m: m.pop("frames")), 'no list of "frames"'),
    case("empty frames", lambda d: d.meta(lambda m: m.update(frames=[])), 'no list of "frames"'),
    case("frame is no mapping", lambda d: d.meta(lambda m: m.update(frames=[3])), 'no list of "frames"'),
    case("frame without file", lambda d: d.meta(lambda m: frame(m).pop("file_path")), 'frame 3 has no "file_path"'),
    case("frame without matrix", lambda d: d.meta(lambda m: frame(m).pop("transform_matrix")),
         '"transform_matrix" of images/frame_003.png is not 4 x 4 finite numbers'),
    case("NaN in a matrix", lambda d: d.meta(lambda m: frame(m)["transform_matrix"][0].__setitem__(3, math.nan)),
         "is not 4 x 4 finite numbers"),
    case("infinite matrix", lambda d: d.meta(lambda m: frame(m)["transform_matrix"][0].__setitem__(3, math.inf)),
         "is not 4 x 4 finite numbers"),
    case("3 x 3 matrix", lambda d: d.meta(lambda m: frame(m).update(transform_matrix=[[1, 0, 0]] * 3)),
         "is not 4 x 4 finite numbers"),
    case("no focal length", lambda d: d.meta(lambda m: m.pop("fl_x")), 'neither the top level nor the frame .* has "fl_x"'),
    case("focal length of zero", lambda d: d.meta(lambda m: m.update(fl_y=0)), '"fl_y" of .* has the invalid value 0'),
    case("focal length is a word", lambda d: d.meta(lambda m: m.update(fl_x="50mm")), '"fl_x" of .* has the invalid value "50mm"'),
    case("NaN distortion", lambda d: d.meta(lambda m: m.update(k1=math.nan)), '"k1" of .* has the invalid value NaN'),
    case("negative width", lambda d: d.meta(lambda m: m.update(w=-24)), '"w" of .* has the invalid value -24'),
    case("unknown camera", lambda d: d.meta(lambda m: m.update(camera_model="PINHOLE9")), "unknown camera_model PINHOLE9. Supported: "),
    case("missing picture", lambda d: (d.scene / "images" / "frame_003.png").unlink(), "no image .*frame_003.png"),
    case("empty picture", lambda d: d.picture(b""), r'frame_003.png" \(0 bytes\) cannot be read as an image'),
    case("text instead of a picture", lambda d: d.picture(b"no picture"), r"\(10 bytes\) cannot be read as an image"),
    case("half a picture", lambda d: d.picture((d.scene / "images" / "frame_002.png").read_bytes()[:100]),
         r'frame_003.png" \(100 bytes\) cannot be read as an image'),
    case("pictures of two sizes",
         lambda d: Image.new("RGB", (12, 10)).save(d.scene / "images" / "frame_003.png"), "All views must have one size"),
    case("no downscaled pictures", lambda d: ["nerfstudio-data", "--downscale-factor", "2"],
         "There is no image .*images_2/frame_000.png"),
    case("masks for some frames only", lambda d: d.meta(lambda m: frame(m).update(mask_path="images/frame_003.png")),
         "The data at .* cannot be read .AssertionError: Different number of image and mask"),
    case("split that names no frame", lambda d: d.meta(lambda m: m.update(train_filenames=["nothing.png"])),
         "The data at .* cannot be read .RuntimeError: Some filenames for split train were not found"),
    case("another format", lambda d: ["blender-data", "--data", d.scene], "The data at .* cannot be read"),
]  # fmt: skip

MASKS = ["--localization", "masks", "--pipeline.masks-dir"]
OPTIONS = [
    *(
        case(f"{option} {value}", lambda d, option=option, value=value: [f"--{option}", value], f"--{option} must be")
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
            "optimizers.fields.optimizer.lr": ["nan", "-0.1"],
            "optimizers.fields.scheduler.max-steps": ["0"],
        }.items()
        for value in values
    ),
    case("near above far", lambda d: ["--pipeline.model.near-plane=9", "--pipeline.model.far-plane=3"], "must be below"),
    case("noise levels the wrong way round", lambda d: ["--pipeline.min-strength=0.9", "--pipeline.max-strength=0.2"],
         "swap them"),
    case("too few samplings", lambda d: ["--pipeline.model.num-proposal-iterations=2"], "needs 2 numbers, one per"),
    case("threshold is a word", lambda d: ["--mask-threshold", "abc"], "mask-threshold"),
    case("unknown option", lambda d: ["--mask-treshold", "0.5"], "mask-treshold"),
    case("unknown localization", lambda d: ["--localization", "magic"], "localization"),
    case("field without localising", lambda d: ["--pipeline.localize-steps=0"], "needs --pipeline.localize-steps above 0"),
    case("patches larger than views", lambda d: ["--pipeline.model.lpips-loss-mult=1", "--pipeline.model.lpips-weights",
         d.folder / "none.pth", "--pipeline.datamanager.edit-patch-size=8"], "edit-patch-size must be at least 32"),
    case("two devices", lambda d: ["--machine.num-devices=2"], "num-devices is 2, and this machine has 0 CUDA devices"),
    case("no device", lambda d: ["--machine.num-devices=0"], "num-devices is 0, and this machine has 0 CUDA devices"),
    case("two machines", lambda d: ["--machine.num-machines=2"], "A scene is trained on one machine"),
    case("editor device that is not there", lambda d: ["--pipeline.editor-device=cuda:7"], 'no device "cuda:7" here'),
    case("editor device of no kind", lambda d: ["--pipeline.editor-device=gpu"], 'no device "gpu" here'),
    case("one caption", lambda d: ["--pipeline.caption-after", "a panda"], "go together"),
    case("normals", lambda d: ["--pipeline.model.predict-normals=True"], "is not supported"),
    case("not all views in memory", lambda d: ["--pipeline.datamanager.train-num-images-to-sample-from=2"],
         "All views are edited"),
    case("masks without a folder", lambda d: ["--localization=masks"], "go together"),
    case("folder without masks", lambda d: ["--pipeline.masks-dir", d.scene], "go together"),
    case("masks folder that is not there", lambda d: [*MASKS, d.folder / "none"], "no mask for the view frame_000.png"),
    case("a mask is missing", lambda d: [*MASKS, d.masks(3)], "no mask for the view frame_003.png"),
    case("a mask is no picture", lambda d: ((d.masks() / "frame_003.png").write_bytes(b"x"), [*MASKS, d.folder / "masks"])[1],
         r'masks/frame_003.png" \(1 bytes\) cannot be read as an image'),
    case("no instruction", lambda d: setattr(d, "instruction", None), "There is no instruction"),
    case("blank instruction", lambda d: setattr(d, "instruction", " \t "), "There is no instruction"),
    case("instruction too long", lambda d: setattr(d, "instruction", " ".join(WORDS * 3)),
         r"The instruction has \d+ tokens, but the text encoder of .* takes at most 40: shorten it"),
    case("non-Latin words for the embedded editor", lambda d: (setattr(d, "editor", "embedded"),
         setattr(d, "instruction", "снег")) and None, "has words that the editor .embedded. was not trained on"),
    case("prompt and instruction", lambda d: ["--prompt", "make it red"], "--prompt and --instruction mean the same"),
]  # fmt: skip

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij")
)
RECIPES = [
    case("no recipe", lambda d: ["--recipe", d.folder / "none.yaml"], "cannot be read: give --recipe a YAML file"),
    case("recipe is a folder", lambda d: ["--recipe", d.scene], "cannot be read: give --recipe a YAML file"),
    case("recipe is no YAML", lambda d: d.recipe("a: [1"), "is not valid YAML"),
    case("recipe is a list", lambda d: d.recipe("- a\n- b"), 'must consist of lines "option: value"'),
    case("recipe is empty", lambda d: d.recipe(""), 'must consist of lines "option: value"'),
    case("recipe with an unknown option", lambda d: d.recipe("mask-treshold: 0.5"), "has an unknown option of ns-train"),
    case("recipe with a value of another type", lambda d: d.recipe("mask-threshold: high"), "or an invalid value"),
    case("recipe out of range", lambda d: ["--recipe", _range_recipe(d)], "--pipeline.edit-every must be at least 1, not 0"),
    case("recipe with a nested value", lambda d: d.recipe("mask-threshold: {a: 1}"), 'must consist of lines "option: value"'),
    case("recipe that names a recipe", lambda d: d.recipe("recipe: other.yaml"), "refers to another recipe"),
    case("YAML bomb", lambda d: d.recipe(BOMB), 'must consist of lines "option: value"'),
    case("YAML that would run code", lambda d: d.recipe('a: !!python/object/apply:os.mkdir ["/tmp/x"]'), "is not valid YAML"),
    case("YAML too deep", lambda d: d.recipe("[" * 20000), "is not valid YAML"),
]  # fmt: skip


def _range_recipe(desk: Desk) -> Path:
    (desk.folder / "range.yaml").write_text("pipeline.edit-every: 0\n")
    return desk.folder / "range.yaml"


def base(desk: Desk, change: Callable[[dict[str, Any]], object], nerfacto: bool = True) -> list[object]:
    return ["--base-run", desk.run(change, nerfacto)]


def rename(checkpoint: dict[str, Any]) -> None:
    key = next(key for key in checkpoint["pipeline"] if "mlp_head" in key)
    checkpoint["pipeline"][key.replace("mlp_head", "head_mlp")] = checkpoint["pipeline"].pop(key)


def fewer_views(checkpoint: dict[str, Any]) -> None:
    key = next(key for key in checkpoint["pipeline"] if "embedding_appearance" in key)
    checkpoint["pipeline"][key] = checkpoint["pipeline"][key][:-1]


def other_backend(checkpoint: dict[str, Any]) -> None:
    checkpoint["pipeline"]["_model.field.mlp_base.model.params"] = torch.zeros(10)


def other_method(checkpoint: dict[str, Any]) -> None:
    checkpoint["pipeline"] = {"_model.gauss_params.means": torch.zeros(5, 3)}


def half(desk: Desk, everything: bool) -> list[object]:
    run = shutil.copytree(desk.finished, desk.folder / "run")
    for path in (run / "nerfstudio_models").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[: 1000 if everything else 0])
    return ["--load-dir" if everything else "--base-run", run]


def without_poses(desk: Desk) -> list[object]:
    run = desk.run()
    file = run / "dataparser_transforms.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scale": 9.0}))
    return ["--base-run", run]


RUNS = [
    case("base run that is not there", lambda d: ["--base-run", d.folder / "none"], "no checkpoint in .*--base-run takes"),
    case("base run without a checkpoint", lambda d: ["--base-run", d.scene], "no checkpoint in .*--base-run takes"),
    case("base run of another method", lambda d: base(d, other_method), "is not a scene of this shape"),
    case("base run of other views", lambda d: base(d, fewer_views), "trained on 5 views and this data has 6"),
    case("base run of another backend", lambda d: base(d, other_backend), "with tiny-cuda-nn, whose weights only"),
    case("base run with renamed keys", lambda d: base(d, rename), "is not a scene of this shape: .*head"),
    case("base run that saw other poses", without_poses, "saw the cameras in another place or scale"),
    case("base run with edited views of other data",
         lambda d: base(d, lambda c: c["wys"]["views"].update(size=[9, 9]), nerfacto=False), "edited views of that run"),
    case("base run of an empty checkpoint", lambda d: half(d, everything=False), "could not be read"),
    case("half a checkpoint to resume", lambda d: half(d, everything=True), "could not be read"),
    case("resume without a state", lambda d: ["--load-dir", d.run(lambda c: c.pop("wys"))], "cannot be resumed from"),
    case("resume with a damaged state", lambda d: ["--load-dir", d.run(lambda c: c["wys"].update(plan=3))],
         "cannot be resumed from"),
    case("resume of a step that is not there", lambda d: ["--load-dir", d.finished, "--load-step=3"],
         "no checkpoint of step 3 in .*--load-step can be 4"),
    case("resume of a finished run", lambda d: ["--load-dir", d.finished], "The run is through: it has 5 of 5 steps"),
    case("resume with another instruction", lambda d: (setattr(d, "instruction", "make it snow"),
         ["--load-dir", d.finished])[1], "resumes a run whose instruction is"),
    case("nerfacto to resume and a base", lambda d: ["--load-dir", d.run(nerfacto=True), "--base-run", d.finished],
         "give one of them"),
]  # fmt: skip


def shorten(desk: Desk, part: str) -> None:
    (weights,) = (desk.own_editor() / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])


def pickle_only(desk: Desk) -> None:
    (weights,) = (desk.own_editor() / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))


EDITORS = [
    case("editor folder that is not there", lambda d: setattr(d, "editor", str(d.folder / "none")), "no editor folder"),
    case("editor without a part", lambda d: shutil.rmtree(d.own_editor() / "vae"), 'has no vae: --editor needs'),
    case("editor with an empty part", lambda d: [p.unlink() for p in (d.own_editor() / "unet").iterdir()] and None,
         "could not be loaded from its folder"),
    case("editor half downloaded", lambda d: shorten(d, "unet"), "could not be loaded from its folder"),
    case("text encoder half downloaded", lambda d: shorten(d, "text_encoder"), "could not be loaded from its folder"),
    case("editor with pickled weights", pickle_only, "as a pickle .* only: .*--pipeline.editor-allow-pickle"),
    case("editor with a broken config", lambda d: (d.own_editor() / "unet" / "config.json").write_text("{") and None,
         "could not be loaded from its folder"),
    case("editor without a vocabulary", lambda d: [p.unlink() for p in (d.own_editor() / "tokenizer").iterdir()] and None,
         "is incomplete: it has "),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "sentence"), [*SCENES, *OPTIONS, *RECIPES, *RUNS, *EDITORS])
def test_what_is_wrong_is_said_in_one_sentence_before_anything_begins(desk, refused, spoil, sentence):
    extra = spoil(desk)
    said = refused(desk.arguments(*(extra if isinstance(extra, list) else [])))
    assert re.search(sentence, said), said


def in_the_way(desk: Desk) -> list[object]:
    (desk.folder / "file").touch()
    return ["--output-dir", desk.folder / "file" / "out"]


def existing(desk: Desk) -> list[object]:
    folder = desk.folder / "out" / "scene" / "wys-tiny" / "run"
    shutil.copytree(desk.finished, folder)
    return ["--timestamp=run"]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        case("output folder that cannot be made", in_the_way, "folder .* cannot be written: .*--output-dir"),
        case("a run of this name is there", existing, 'There is a run in ".*run" already: to go on, type .*--load-dir'),
    ],
)
def test_an_output_folder_that_will_not_do_is_refused(desk, refused, spoil, sentence):
    extra = spoil(desk)
    before = {path: path.read_bytes() for path in (desk.folder / "out").rglob("*") if path.is_file()}
    assert re.search(sentence, refused(desk.arguments(*extra)))
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
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
def test_what_is_wrong_with_a_picture_is_said_in_one_sentence(
    arguments, sentence, editor_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (24, 20)).save("good.png")
    Path("empty.png").touch()
    rest = ["-o", "out.png", *([] if "--editor" in arguments else ["--editor", str(editor_folder)])]
    monkeypatch.setattr(sys, "argv", ["wys", "edit-image", *arguments, *rest])
    with pytest.raises(SystemExit) as ending:
        main.entrypoint()
    code = str(ending.value.code)
    assert code.startswith("wys: ") and len(code.splitlines()) == 1 and sentence in code, code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.png", "good.png"]
    assert "Traceback" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- properties

PARTS = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
                     lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part, max_size=3),
                     max_leaves=6)  # fmt: skip


@given(text=st.text(alphabet="ab:-[]{}&*!#|>%@ \n\t'\"0129.,?~\0é", max_size=40) | PARTS.map(yaml.safe_dump))
def test_whatever_a_recipe_holds_it_is_arguments_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(text, "utf8")
    try:
        arguments = recipe_arguments(path)
    except WysError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
    else:
        assert all(isinstance(argument, str) for argument in arguments)
        assert all(argument.startswith("--") for argument in arguments[::2])


@pytest.fixture(scope="module")
def whole_scene(tmp_path_factory) -> Path:
    return write_ring_scene(tmp_path_factory.mktemp("whole") / "scene", **SIZE)


@given(part=PARTS, key=st.sampled_from(["frames", "fl_x", "cx", "w", "k1", "camera_model", "file_path", "transform_matrix"]),
       into_frame=st.booleans(), drop=st.booleans())  # fmt: skip
def test_whatever_a_capture_holds_it_is_taken_or_refused(whole_scene, part, key, into_frame, drop):
    meta = json.loads((whole_scene / "transforms.json").read_text())
    place = frame(meta) if into_frame else meta
    if drop:
        place.pop(key, None)
    else:
        place[key] = part
    file = whole_scene / "changed.json"
    file.write_text(json.dumps(meta))
    try:
        check_capture(file)
    except WysError as error:
        assert len(str(error).splitlines()) == 1
    else:  # nerfstudio takes it, too
        config = NerfstudioDataParserConfig(data=file)
        assert len(config.setup().get_dataparser_outputs("train").image_filenames) == SIZE["views"]
