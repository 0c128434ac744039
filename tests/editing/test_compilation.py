"""Compiled editors: edits equal those of the plain editor, maps are not compiled, and what cannot be compiled is refused."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from flux2_folder import build_flux2_folder
from qwen_folder import build_qwen_folder
from test_sdxl import build_sdxl_folder
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch.utils._python_dispatch import TorchDispatchMode

from wys_nerfstudio.editing import EMBEDDED, EditSettings, edit_images, load_editor, relevance_maps
from wys_nerfstudio.editing.compilation import check_compiler, compile_editor
from wys_nerfstudio.editing.editor import EMBEDDED_FLOW, Editor
from wys_nerfstudio.utils.errors import WysError

INSTRUCTION = "turn the bear into a panda"
FAMILIES = ["stable_diffusion", "sdxl", "flux2", "qwen"]


@pytest.fixture(autouse=True)
def _no_earlier_graphs():
    """Start and end without compiled graphs, so that they are counted from zero."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture graphs, but run them without compiling them, which takes minutes."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda call, **options: compile_(call, **{**options, "mode": None}, backend="eager")
    )


@pytest.fixture(scope="module", params=FAMILIES)
def untrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, editor_folder: Path) -> str:
    """Folder of a small untrained editor of each family."""
    folder = tmp_path_factory.mktemp(request.param) / "editor"
    builders = {"sdxl": build_sdxl_folder, "flux2": build_flux2_folder, "qwen": build_qwen_folder}
    return str(editor_folder if request.param == "stable_diffusion" else builders[request.param](folder))


def edit(editor: Editor, views: int = 1, *, guidance_scale: float = 3.0, steps: int = 2) -> torch.Tensor:
    """Edit random views, with all branches of the editor, or without guidance."""
    images = torch.rand(views, 64, 80, 3, generator=torch.Generator().manual_seed(0))
    image_guidance_scale = 1.5 if editor.profile.has_image_guidance and guidance_scale != 1 else 1.0
    settings = EditSettings(guidance_scale, image_guidance_scale, steps, resolution=80)
    everywhere = torch.ones(images.shape[:3], dtype=torch.bool)
    seeds = list(range(views))
    return edit_images(editor, images, images, everywhere, INSTRUCTION, settings, strength=0.9, seeds=seeds)


def relevance_map(editor: Editor) -> torch.Tensor:
    images = torch.rand(1, 64, 80, 3, generator=torch.Generator().manual_seed(0))
    return next(iter(relevance_maps(editor, images, INSTRUCTION, seeds=[0], resolution=80)))


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("without_inductor")
def test_an_edit_compiles_one_graph_per_number_of_rows(untrained: str) -> None:
    editor, plain = load_editor(untrained), load_editor(untrained)
    compile_editor(editor, cuda_graphs=True)
    # Texts with and without the instruction have different lengths for Qwen-Image-Edit.
    graphs = 2 if "qwen" in untrained else 1
    for times in range(2):
        torch.testing.assert_close(edit(editor), edit(plain), rtol=0, atol=1e-5)
        assert num_graphs() == graphs, "captured in the first edit only"
    torch.testing.assert_close(edit(editor, views=2), edit(plain, views=2), rtol=0, atol=1e-5)
    assert num_graphs() == 2 * graphs
    assert counters["graph_break"] == {}


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_maps_are_not_compiled(untrained: str, dtype: Any) -> None:
    editor, plain = load_editor(untrained, dtype=dtype), load_editor(untrained, dtype=dtype)
    compile_editor(editor, cuda_graphs=False)
    assert torch.equal(relevance_map(editor), relevance_map(plain)), "maps of runs without the option are found again"
    assert num_graphs() == 0
    edit(editor)
    graphs = num_graphs()
    relevance_map(editor)
    edit(editor)
    assert num_graphs() == graphs > 0, "the weights' stay in float32 leaves the graphs valid"


@pytest.mark.usefixtures("without_inductor")
def test_weights_keep_their_names_and_the_network_its_attributes(untrained: str) -> None:
    editor: Any = load_editor(untrained)
    before, config = {**editor.network.state_dict()}, editor.network.config
    compile_editor(editor, cuda_graphs=False)
    after = editor.network.state_dict()
    assert after.keys() == before.keys() and all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert editor.network.config is config and editor.network.dtype == torch.float32


@pytest.mark.usefixtures("without_inductor")
def test_a_compiled_network_is_freed_with_its_editor(editor_folder: Path) -> None:
    editor = load_editor(str(editor_folder))
    compile_editor(editor, cuda_graphs=False)
    edit(editor)
    network = weakref.ref(editor.network)
    del editor
    gc.collect()
    assert network() is None


@pytest.mark.usefixtures("without_inductor")
def test_more_shapes_than_torch_compiles_are_reported(editor_folder: Path, caplog) -> None:
    editor, plain = load_editor(str(editor_folder)), load_editor(str(editor_folder))
    compile_editor(editor, cuda_graphs=False)
    with dynamo_config.patch(recompile_limit=2):
        edits = [edit(editor, views) for views in (1, 2, 3)]
    assert num_graphs() == 2 and "recompile_limit" in caplog.text
    torch.testing.assert_close(edits[-1], edit(plain, views=3), rtol=0, atol=1e-5)


def test_four_views_and_three_branches_are_within_torchs_limit() -> None:
    rows = {views * branches for views in range(1, 5) for branches in range(1, 4)}
    assert len(rows) <= dynamo_config.recompile_limit


def test_predictions_outlive_the_networks_output(untrained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph writes the output of every call to the same memory."""
    editor: Any = load_editor(untrained)
    encoding = editor.encode(torch.rand(1, 64, 80, 3))
    predict = editor.predictor(encoding.condition, INSTRUCTION, editor.branches(1.0, 1.0)[:1])
    forward, outputs = editor.network.forward, []

    def as_a_cuda_graph(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        values = result[0] if isinstance(result, tuple) else result.sample
        outputs.append(values)
        outputs[0].copy_(values)
        return (outputs[0],) if isinstance(result, tuple) else type(result)(sample=outputs[0])

    monkeypatch.setattr(editor.network, "forward", as_a_cuda_graph)
    level = editor.noise_level(0.8, encoding.latents.shape[2:])
    first = predict(encoding.latents, level)[0]
    expected = first.clone()
    second = predict(encoding.latents + 1, level)[0]
    assert not torch.equal(second, expected) and torch.equal(first, expected)


@pytest.mark.parametrize(("device", "mode"), [("cpu", None), ("cuda", "reduce-overhead")])
def test_cuda_graphs_are_used_on_a_gpu(editor_folder: Path, monkeypatch, device: str, mode: "str | None") -> None:
    editor, options = load_editor(str(editor_folder)), []
    monkeypatch.setattr(type(editor), "device", torch.device(device))
    monkeypatch.setattr(editor.network, "compile", lambda **given: options.append(given))
    compile_editor(editor, cuda_graphs=True)
    compile_editor(editor, cuda_graphs=False)
    assert [given["mode"] for given in options] == [mode, None]
    assert all(given["dynamic"] is False for given in options)


class OperationNames(TorchDispatchMode):
    """Names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def test_attention_is_one_fused_operation(untrained: str) -> None:
    editor, calls = load_editor(untrained), []
    hook = editor.network.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
    edit(editor)
    hook.remove()
    args, kwargs = calls[0]
    with torch.no_grad(), OperationNames() as operations:
        editor.network(*args, **kwargs)
    assert any("scaled_dot_product" in name for name in operations.names)
    assert not any("softmax" in name for name in operations.names)


def test_a_missing_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.raises(WysError) as error, inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        check_compiler("cpu")
    sentence = str(error.value)
    assert sentence.startswith("The editor cannot be compiled on this machine (") and "\n" not in sentence
    assert sentence.endswith("): install a C++ compiler such as g++, or leave out --pipeline.compile-editor.")


def test_running_out_of_memory_is_not_reported_as_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", run_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        check_compiler("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", [EMBEDDED, EMBEDDED_FLOW])
def test_inductors_edits_equal_those_of_the_plain_editor(name: str) -> None:
    editor, plain = load_editor(name), load_editor(name)
    compile_editor(editor, cuda_graphs=False)
    check_compiler("cpu")
    edited = edit(editor, steps=4)
    torch.testing.assert_close(edited, edit(plain, steps=4), rtol=0, atol=1e-4)
    assert torch.equal(edited, edit(editor, steps=4)), "compiled edits are repeatable"
    assert torch.equal(relevance_map(editor), relevance_map(plain))
