"""The masked denoising loop: scalar formulas, and a noise predictor whose answer is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wys_nerfstudio.editing import sampling
from wys_nerfstudio.editing.sampling import add_noise, apply_guidance, ddim_step, masked_denoise, v_to_epsilon

levels = st.floats(0.01, 0.999)
numbers = st.floats(-3, 3)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1)


def level(alpha: float) -> torch.Tensor:
    return torch.tensor(alpha, dtype=torch.float64)


def stable_diffusion_alphas(length: int = 1000) -> torch.Tensor:
    """The "scaled linear" schedule, multiplied up one by one."""
    product, alphas_cumprod = 1.0, []
    for i in range(length):
        beta = (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / (length - 1)) ** 2
        product *= 1 - beta
        alphas_cumprod.append(product)
    return torch.tensor(alphas_cumprod, dtype=torch.float64)


ALPHAS = stable_diffusion_alphas()
ONE = torch.tensor(1.0, dtype=torch.float64)


def towards(target: torch.Tensor):
    """Predicts the very noise that leads from the target to the latents."""

    def predict(latents: torch.Tensor, t: int) -> torch.Tensor:
        return (latents - ALPHAS[t].sqrt() * target) / (1 - ALPHAS[t]).sqrt()

    return predict


class Recorder:
    """A noise predictor that depends on place, value and time, and remembers what it was asked."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, int]] = []

    def __call__(self, latents: torch.Tensor, t: int) -> torch.Tensor:
        self.seen.append((latents.clone(), t))
        return torch.sin(latents * 1.7 + t / 300)


def random_case(seed: int = 0, batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(seed)
    start, reference, noise, target = torch.randn(4, batch, 3, 5, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, 5, 6, generator=generator) > 0.5
    return {"start": start, "reference": reference, "noise": noise, "mask": mask, "target": target}


def run(case: dict, predict, *, mask="its own", start_timestep: int = 700, full_steps: int = 10) -> torch.Tensor:
    return masked_denoise(
        start=case["start"],
        reference=case["reference"],
        mask=case["mask"] if isinstance(mask, str) else mask,
        noise=case["noise"],
        timesteps=sampling.timesteps(start_timestep, full_steps, 1000),
        alphas_cumprod=ALPHAS,
        final_alpha=ONE,
        predict_noise=predict,
    )


def slow_denoise(case: dict, timesteps: list[int], final_alpha: float) -> torch.Tensor:
    """The loop element by element, in Python floats."""
    result = torch.empty_like(case["start"])
    for place in torch.cartesian_prod(*(torch.arange(n) for n in result.shape)).tolist():
        b, _, y, x = place
        z, reference, noise = (float(case[k][tuple(place)]) for k in ("start", "reference", "noise"))
        z = math.sqrt(ALPHAS[timesteps[0]]) * z + math.sqrt(1 - ALPHAS[timesteps[0]]) * noise
        for i, t in enumerate(timesteps):
            a = float(ALPHAS[t])
            b_ = float(ALPHAS[timesteps[i + 1]]) if i + 1 < len(timesteps) else final_alpha
            eps = math.sin(z * 1.7 + t / 300)
            clean = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
            z = math.sqrt(b_) * clean + math.sqrt(1 - b_) * eps
            if not case["mask"][b, y, x]:
                at_the_end = i + 1 == len(timesteps)
                z = reference if at_the_end else math.sqrt(b_) * reference + math.sqrt(1 - b_) * noise
        result[tuple(place)] = z
    return result


@given(numbers, numbers, levels)
def test_add_noise_equals_its_formula(z, eps, a):
    assert float(add_noise(tensor(z), tensor(eps), level(a))) == pytest.approx(
        math.sqrt(a) * z + math.sqrt(1 - a) * eps
    )


def test_add_noise_has_its_limits_at_both_ends():
    z, eps = tensor(0.3, -2.0), tensor(1.0, 0.5)
    assert torch.equal(add_noise(z, eps, level(1.0)), z)
    assert torch.equal(add_noise(z, eps, level(0.0)), eps)


@given(numbers, numbers, levels, levels)
def test_ddim_step_equals_its_formula(z, eps, a, b):
    clean = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
    wanted = math.sqrt(b) * clean + math.sqrt(1 - b) * eps
    assert float(ddim_step(tensor(z), tensor(eps), level(a), level(b))) == pytest.approx(wanted, abs=1e-9)


@given(numbers, numbers, levels, levels)
def test_a_ddim_step_with_the_true_noise_is_the_same_image_at_the_next_level(x, eps, a, b):
    noisy = add_noise(tensor(x), tensor(eps), level(a))
    stepped = ddim_step(noisy, tensor(eps), level(a), level(b))
    torch.testing.assert_close(stepped, add_noise(tensor(x), tensor(eps), level(b)), atol=1e-9, rtol=0)


def test_ddim_step_equals_diffusers():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(10)
    z, eps = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    t, following = scheduler.timesteps[3:5].tolist()
    alphas_cumprod = scheduler.alphas_cumprod
    theirs = scheduler.step(eps, t, z).prev_sample
    torch.testing.assert_close(ddim_step(z, eps, alphas_cumprod[t], alphas_cumprod[following]), theirs)


@given(numbers, numbers, numbers, st.floats(0, 15), st.floats(0, 3))
def test_guide_equals_its_formula(both, image, neither, s_t, s_i):
    wanted = neither + s_i * (image - neither) + s_t * (both - image)
    result = apply_guidance(tensor(both), tensor(image), tensor(neither), s_t, s_i)
    assert float(result) == pytest.approx(wanted, abs=1e-9)


def test_guidance_of_one_is_the_full_condition_and_of_zero_is_none():
    both, image, neither = tensor(1.5), tensor(-0.25), tensor(4.0)
    assert torch.equal(apply_guidance(both, image, neither, 1.0, 1.0), both)
    assert torch.equal(apply_guidance(both, image, neither, 0.0, 1.0), image)
    assert torch.equal(apply_guidance(both, image, neither, 0.0, 0.0), neither)


@given(numbers, numbers, levels)
def test_velocity_stands_for_the_noise(x, eps, a):
    noisy = math.sqrt(a) * x + math.sqrt(1 - a) * eps
    velocity = math.sqrt(a) * eps - math.sqrt(1 - a) * x
    assert float(v_to_epsilon(tensor(velocity), tensor(noisy), level(a))) == pytest.approx(eps, abs=1e-9)


@given(seed=st.integers(0, 50), start_timestep=st.integers(1, 999), full_steps=st.integers(1, 30))
def test_the_loop_ends_in_the_target_inside_the_mask_and_in_the_reference_outside(seed, start_timestep, full_steps):
    case = random_case(seed)
    result = run(case, towards(case["target"]), start_timestep=start_timestep, full_steps=full_steps)
    inside = case["mask"][:, None].expand_as(result)
    torch.testing.assert_close(result[inside], case["target"][inside], atol=1e-9, rtol=0)
    assert torch.equal(result[~inside], case["reference"][~inside])


def test_a_velocity_prediction_ends_in_the_same_target():
    case = random_case()

    def predict(latents: torch.Tensor, t: int) -> torch.Tensor:
        noise = towards(case["target"])(latents, t)
        velocity = ALPHAS[t].sqrt() * noise - (1 - ALPHAS[t]).sqrt() * case["target"]
        return v_to_epsilon(velocity, latents, ALPHAS[t])

    torch.testing.assert_close(run(case, predict), run(case, towards(case["target"])), atol=1e-9, rtol=0)


@pytest.mark.parametrize("final_alpha", [1.0, float(ALPHAS[0])])
def test_the_loop_equals_its_twin_element_by_element(final_alpha):
    case, timesteps = random_case(3), sampling.timesteps(640, 8, 1000)
    arguments = {key: case[key] for key in ("start", "reference", "mask", "noise")}
    result = masked_denoise(
        **arguments,
        timesteps=timesteps,
        alphas_cumprod=ALPHAS,
        final_alpha=level(final_alpha),
        predict_noise=Recorder(),
    )
    torch.testing.assert_close(result, slow_denoise(case, timesteps, final_alpha), atol=1e-9, rtol=0)


def test_each_step_is_reported_when_it_is_done():
    case, predictor, seen = random_case(1), Recorder(), []
    arguments = {key: case[key] for key in ("start", "reference", "mask", "noise")}
    masked_denoise(
        **arguments, timesteps=[500, 300, 1], alphas_cumprod=ALPHAS, final_alpha=ONE, predict_noise=predictor,
        report=lambda done, total: seen.append((done, total, len(predictor.seen))),
    )  # fmt: skip
    assert seen == [(1, 3, 1), (2, 3, 2), (3, 3, 3)]


def test_a_mask_of_everything_is_no_mask():
    case = random_case(1)
    everything = torch.ones_like(case["mask"])
    assert torch.equal(run(case, Recorder(), mask=everything), run(case, Recorder(), mask=None))


def test_a_mask_of_nothing_returns_the_reference():
    case = random_case(1)
    assert torch.equal(run(case, Recorder(), mask=torch.zeros_like(case["mask"])), case["reference"])


def test_the_predictor_sees_the_start_noised_to_the_first_timestep():
    case, recorder = random_case(2), Recorder()
    run(case, recorder, start_timestep=700)
    latents, t = recorder.seen[0]
    assert t == 700
    torch.testing.assert_close(latents, ALPHAS[700].sqrt() * case["start"] + (1 - ALPHAS[700]).sqrt() * case["noise"])


def test_between_the_steps_the_background_is_the_reference_noised_to_the_timestep_just_entered():
    case, recorder = random_case(2), Recorder()
    run(case, recorder, start_timestep=700)
    outside = ~case["mask"][:, None].expand_as(case["start"])
    assert [t for _, t in recorder.seen] == [700, 600, 500, 400, 300, 200, 100]
    for latents, t in recorder.seen[1:]:
        background = ALPHAS[t].sqrt() * case["reference"] + (1 - ALPHAS[t]).sqrt() * case["noise"]
        assert torch.equal(latents[outside], background[outside])
        assert not torch.isclose(latents[~outside], background[~outside]).any()


def test_images_of_a_batch_do_not_influence_each_other():
    case = random_case(4, batch=3)
    together = run(case, Recorder())
    for i in range(3):
        alone = run({key: value[i : i + 1] for key, value in case.items()}, Recorder())
        assert torch.equal(together[i : i + 1], alone)


def test_nothing_that_is_handed_in_is_changed():
    case, alphas_cumprod = random_case(5), ALPHAS.clone()
    before = {key: value.clone() for key, value in case.items()}
    run(case, Recorder())
    assert all(torch.equal(case[key], before[key]) for key in case)
    assert torch.equal(ALPHAS, alphas_cumprod)
