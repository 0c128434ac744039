"""Do the tests of the mathematics notice small faults? `python tests/benchmarks/mutations.py`

Each fault is put into a copy of the package by itself; the tests of its module must then fail. Prints a table of faults and of
the test that noticed first, and exits with 1 if a fault went through. Not here: the tests themselves.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RELEVANCE, DENOISE = "relevance.py", "editing/denoise.py"
LOCAL, SCHEDULE = "editing/local.py", "schedule.py"
HULL = "hull.py"
TESTS = {
    RELEVANCE: ["test_relevance.py"],
    DENOISE: ["test_editing_denoise.py"],
    LOCAL: ["test_editing_local.py"],
    SCHEDULE: ["test_schedule.py"],
    HULL: ["test_hull.py"],
}


@dataclass(frozen=True)
class Fault:
    """A piece of a module that is put wrong."""

    module: str
    """File inside the package."""
    right: str
    """What stands there, once."""
    wrong: str
    """What stands there instead."""

    def apply(self, package: Path) -> None:
        """Spoils a copy of the package."""
        file = package / self.module
        text = file.read_text("utf8")
        assert text.count(self.right) == 1, f"{self.module} has {text.count(self.right)} times: {self.right}"
        file.write_text(text.replace(self.right, self.wrong), "utf8")


FAULTS = [
    Fault(RELEVANCE, ".abs().mean(dim=1)", ".mean(dim=1)"),
    Fault(RELEVANCE, ".abs().mean(dim=1)", ".abs().amax(dim=1)"),
    Fault(RELEVANCE, "noise_with_instruction.float() - noise_without.float()", "noise_with_instruction - noise_without"),
    Fault(RELEVANCE, "(0.25, 0.75)", "(0.25, 0.7)"),
    Fault(RELEVANCE, "q3 + factor * (q3 - q1)", "q1 + factor * (q3 - q1)"),
    Fault(RELEVANCE, "torch.minimum(raw, q3", "torch.maximum(raw, q3"),
    Fault(RELEVANCE, "position - below)", "0.5)"),
    Fault(RELEVANCE, "spread <= 1e-6 *", "spread <= 0 *"),
    Fault(RELEVANCE, "torch.zeros_like(values), (values - low)", "torch.zeros_like(values), values"),
    Fault(RELEVANCE, 'if over == "view" else', 'if over == "scene" else'),
    Fault(RELEVANCE, "min_max(clamped)", "min_max(flat)"),
    Fault(RELEVANCE, "if outlier_factor is None", "if not outlier_factor"),
    Fault(RELEVANCE, "clamp_outliers(flat, outlier_factor)", "clamp_outliers(flat)"),
    Fault(RELEVANCE, "normalize(raw, over, outlier_factor)", "normalize(raw, over)"),
    Fault(RELEVANCE, "normalize(raw, over, outlier_factor)", 'normalize(raw, "view", outlier_factor)'),
    Fault(RELEVANCE, "align_corners=False", "align_corners=True"),
    Fault(RELEVANCE, "rendered > maps, agreement", "rendered < maps, agreement"),
    Fault(RELEVANCE, "return 2 * (weights", "return (weights"),
    Fault(RELEVANCE, "relevance >= tau", "relevance > tau"),
    Fault(RELEVANCE, "kernel_size=3, stride=1, padding=1", "kernel_size=5, stride=1, padding=2"),
    Fault(RELEVANCE, "adaptive_max_pool2d", "adaptive_avg_pool2d"),
    Fault(RELEVANCE, "mask[..., None], edited, reference", "mask[..., None], reference, edited"),
    Fault(DENOISE, "alpha.sqrt() * latents + (1 - alpha).sqrt() * noise", "alpha.sqrt() * latents + (1 - alpha) * noise"),
    Fault(DENOISE, "* noise) / alpha.sqrt()", "* noise) / next_alpha.sqrt()"),
    Fault(DENOISE, "add_noise(clean, noise, next_alpha)", "add_noise(clean, noise, alpha)"),
    Fault(DENOISE, "(with_image - with_neither) + guidance_scale", "(with_image - with_neither) - guidance_scale"),
    Fault(DENOISE, "with_both - with_image)", "with_both - with_neither)"),
    Fault(DENOISE, "alpha.sqrt() * velocity + (1", "alpha.sqrt() * velocity - (1"),
    Fault(DENOISE, "add_noise(start, noise, alphas[timesteps[0]])", "add_noise(reference, noise, alphas[timesteps[0]])"),
    Fault(DENOISE, "next_alpha = final_alpha if last", "next_alpha = alphas[0] if last"),
    Fault(DENOISE, "reference if last else add_noise", "add_noise"),
    Fault(DENOISE, "add_noise(reference, noise, next_alpha)", "add_noise(reference, noise, alphas[t])"),
    Fault(DENOISE, "add_noise(reference, noise, next_alpha)", "add_noise(reference, torch.randn_like(noise), next_alpha)"),
    Fault(DENOISE, "mask[:, None], latents, background", "mask[:, None], background, latents"),
    Fault(DENOISE, "if mask is not None:", "if mask is not None and last:"),
    Fault(DENOISE, "predict_noise(latents, t), alphas[t]", "predict_noise(latents, i), alphas[t]"),
    Fault(DENOISE, "report(i + 1, len(timesteps))", "report(i, len(timesteps))"),
    Fault(LOCAL, "seeds=[edit_seed(seed, -1)]", "seeds=[edit_seed(seed, 0)]"),
    Fault(LOCAL, "noise_level=settings.relevance_noise_level", "noise_level=0.5"),
    Fault(LOCAL, "draws=draws", "draws=1"),
    Fault(LOCAL, "height, width, outlier_factor=factor", "height, width"),
    Fault(LOCAL, "if mask is None:", "if True:"),
    Fault(LOCAL, "relevance_map, settings.mask_threshold", "relevance_map, 0.5"),
    Fault(LOCAL, "start_timestep=editor.num_train_timesteps - 1", "start_timestep=editor.num_train_timesteps // 2"),
    Fault(LOCAL, "[edit_seed(seed, 0)]", "[0]"),
    Fault(LOCAL, "report(draws + done, draws + total)", "report(done, draws + total)"),
    Fault(SCHEDULE, "step < self.reconstruct_steps", "step <= self.reconstruct_steps"),
    Fault(SCHEDULE, "step < self.edit_start", "step <= self.edit_start"),
    Fault(SCHEDULE, "step >= self.edit_start and ", ""),
    Fault(SCHEDULE, "(step - self.edit_start) % every", "step % every"),
    Fault(SCHEDULE, 'f"{seed}/{edit_number}"', 'f"{seed + edit_number}"'),
    Fault(SCHEDULE, "/round/{edit_round}", "/round"),
    Fault(SCHEDULE, "max(1, round(", "max(1, int("),
    Fault(SCHEDULE, "min(start, max(1, round(full_steps * start / num_train_timesteps)))",
          "max(1, round(full_steps * start / num_train_timesteps))"),
    Fault(SCHEDULE, "start - (i * start) // count", "start - 1 - (i * start) // count"),
    Fault(SCHEDULE, "if not 1 <= start", "if not 0 <= start"),
    Fault(HULL, "torch.where(fisheye, angle,", "torch.where(~fisheye, angle,"),
    Fault(HULL, "new_tensor([1, -1])", "new_tensor([1, 1])"),
    Fault(HULL, "p2 * (r + 2 * x**2)", "p2 * (r + x**2)"),
    Fault(HULL, "1.01 * _widest_angle", "10 * _widest_angle"),
    Fault(HULL, "distance < DEPTH_MARGIN *", "distance > DEPTH_MARGIN *"),
    Fault(HULL, "seen.sum(dim=0) * (1 - AGREEING)", "seen.sum(dim=0) * AGREEING"),
    Fault(HULL, "(cells + 0.5) * size", "cells * size"),
    Fault(HULL, "rays.directions * depths.reshape(-1, 1)", "rays.directions"),
    Fault(HULL, "UNEXPLAINED * (claimed - explained)", "claimed - explained"),
    Fault(HULL, "(claimed - explained)).clamp_min(0)", "claimed).clamp_min(0)"),
    Fault(HULL, "torch.maximum(surfaces.quantile(TOP), self.relevance.max())", "surfaces.quantile(TOP)"),
    Fault(HULL, "torch.maximum(surfaces.quantile(TOP), self.relevance.max())", "self.relevance.max()"),
    Fault(HULL, "top.clamp_min(FAINT)).clamp_min(1)", "top.clamp_min(FAINT))"),
    Fault(HULL, "surface_relevance(cameras, maps, depths).q", "surface_relevance(cameras, peaks, depths).q"),
    Fault(HULL, "max(FEWEST_VIEWS, FEWEST_SHARE * len(maps))", "FEWEST_VIEWS"),
    Fault(HULL, "kernel_size=3, stride=1, padding=1) >= FAINT", "kernel_size=1, stride=1) >= FAINT"),
    Fault(HULL, "torch.stack([x, y, z], dim=-1)", "torch.stack([z, y, x], dim=-1)"),
    Fault(HULL, "self.relevance.fill_(-1)", "self.relevance.fill_(0)"),
    Fault(HULL, "< 0.5).sum", "< 0.1).sum"),
]  # fmt: skip


def first_failure(package_folder: Path, module: str) -> str:
    """The first test of a module that fails on the package in a folder; empty if all pass."""
    options = ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    tests = [ROOT / "tests" / name for name in TESTS[module]]
    # Python looks for the package in the current folder first.
    command = map(str, [sys.executable, "-m", "pytest", *options, *tests])
    done = subprocess.run([*command], cwd=package_folder, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (?:\S*::)?(\S+)", done.stdout, re.MULTILINE)
    assert found, done.stdout + done.stderr
    return found[1]


def main() -> None:
    """Prints the table."""
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "wys_nerfstudio"

        def try_out(module: str, fault: Fault | None = None) -> str:
            shutil.copytree(ROOT / "wys_nerfstudio", package, ignore=shutil.ignore_patterns("__pycache__"))
            if fault is not None:
                fault.apply(package)
            failed = first_failure(Path(folder), module)
            shutil.rmtree(package)
            return failed

        for module in TESTS:
            assert not try_out(module), f"the tests of {module} fail without a fault, too"
        print("| module | right | wrong | noticed by |\n|---|---|---|---|")
        for fault in FAULTS:
            noticed = try_out(fault.module, fault)
            survived += not noticed
            print(f"| `{fault.module}` | `{fault.right}` | `{fault.wrong}` | {noticed or 'NOBODY'} |", flush=True)
    print(f"{len(FAULTS) - survived} of {len(FAULTS)} faults were noticed.")
    raise SystemExit(survived > 0)


if __name__ == "__main__":
    main()
