"""Toy world: ray tracing compared with a slow reference, consistency of views, edits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wys_nerfstudio.demo import instructions, tracer, world
from wys_nerfstudio.demo.render import render_edits


def scene_and_camera(seeds, width=24, height=16):
    scene = world.sample_scenes(seeds)
    return scene, world.sample_cameras(scene, seeds, width, height)


def slow_hit(scene, origin, direction):
    """Intersect one ray with the first scene in plain Python and return (depth, object)."""

    def turn(p, angle):
        c, s = math.cos(angle), math.sin(angle)
        return [c * p[0] - s * p[1], s * p[0] + c * p[1], p[2]]

    def sphere(o, d):
        a, b, c = sum(x * x for x in d), 2 * sum(x * y for x, y in zip(o, d)), sum(x * x for x in o) - 1
        root = b * b - 4 * a * c
        near = (-b - math.sqrt(root)) / (2 * a) if root > 0 else math.inf
        return near if near > 0 else math.inf

    hits = []
    size, yaw = scene.bear_size[0].item(), scene.bear_yaw[0].item()
    feet = [*scene.bear_position[0].tolist(), 0.0]
    local_o = [x / size for x in turn([a - b for a, b in zip(origin, feet)], -yaw)]
    local_d = [x / size for x in turn(direction, -yaw)]
    for _, center, radii in world.BEAR_PARTS:
        o = [(x - c) / r for x, c, r in zip(local_o, center, radii)]
        hits.append((sphere(o, [x / r for x, r in zip(local_d, radii)]), "bear"))
    radius = scene.ball_radius[0].item()
    center = [*scene.ball_position[0].tolist(), radius]
    hits.append((sphere([(x - c) / radius for x, c in zip(origin, center)], [x / radius for x in direction]), "ball"))
    half, yaw = scene.block_half[0].tolist(), scene.block_yaw[0].item()
    center = [*scene.block_position[0].tolist(), half[2]]
    o = turn([x - c for x, c in zip(origin, center)], -yaw)
    d = turn(direction, -yaw)
    spans = [sorted([(-h - x) / y, (h - x) / y]) for h, x, y in zip(half, o, d)]
    enter, leave = max(s[0] for s in spans), min(s[1] for s in spans)
    hits.append((enter if 0 < enter < leave else math.inf, "block"))
    hits.append((-origin[2] / direction[2] if direction[2] < 0 else math.inf, "ground"))
    a, b = sum(x * x for x in direction), sum(x * y for x, y in zip(origin, direction))
    c = sum(x * x for x in origin) - world.DOME_RADIUS**2
    hits.append(((-b + math.sqrt(b * b - a * c)) / a, "sky"))
    return min(hits)


@pytest.mark.parametrize("seed", [world.TEST_SEEDS[5], world.TEST_SEEDS[6]])
def test_hits_equal_their_slow_reference(seed):
    scene, camera = scene_and_camera([seed], 12, 8)
    view = tracer.render(scene, camera, samples=1)
    pose, focal = camera.pose[0], camera.focal[0].item()
    for y in range(8):
        for x in range(12):
            local = torch.tensor([(x + 0.5 - 6) / focal, (4 - y - 0.5) / focal, -1.0])
            depth, name = slow_hit(scene, pose[:, 3].tolist(), (pose[:, :3] @ local).tolist())
            assert view.depth[0, y, x].item() == pytest.approx(depth, rel=1e-3)
            assert world.OBJECTS[view.objects[0, y, x]] == name


def test_the_ball_is_rendered_at_its_projection():
    scene, _ = scene_and_camera([world.TEST_SEEDS[0]])
    center = torch.cat([scene.ball_position, scene.ball_radius[:, None]], -1)
    # From the side opposite to bear and block, so that the ball is not occluded.
    away = torch.nn.functional.normalize(center - scene.center() * torch.tensor([1.0, 1.0, 0.0]), dim=-1)
    camera = world.look_at(center + 2 * away, center, torch.tensor([math.radians(45)]), 96, 96)
    view = tracer.render(scene, camera, samples=1)
    ball = view.objects[0] == world.OBJECTS.index("ball")
    ys, xs = torch.nonzero(ball, as_tuple=True)
    assert abs(xs.float().mean() - 47.5) < 0.6 and abs(ys.float().mean() - 47.5) < 0.6
    angle = math.asin(scene.ball_radius.item() / 2)
    assert ball.sum().item() == pytest.approx(math.pi * (camera.focal.item() * math.tan(angle)) ** 2, rel=0.06)


def test_overlapping_views_are_consistent():
    scene = world.sample_scenes([world.TEST_SEEDS[1]])
    target = scene.center()
    first, second = (
        world.look_at(target + torch.tensor([offset]), target, torch.tensor([0.8]), 120, 96)
        for offset in ([2.5, 0.4, 1.2], [2.4, 0.9, 1.3])
    )
    one, other = tracer.render(scene, first, 1), tracer.render(scene, second, 1)
    y, x = torch.meshgrid(torch.arange(96), torch.arange(120), indexing="ij")
    local = torch.stack([(x + 0.5 - 60), (48 - y - 0.5), -first.focal * torch.ones_like(x)], -1) / first.focal
    points = first.pose[0, :, 3] + (local * one.depth[0, ..., None]) @ first.pose[0, :, :3].T
    local_points = (points - second.pose[0, :, 3]) @ second.pose[0, :, :3]
    depth = -local_points[..., 2]
    u = (60 + second.focal * local_points[..., 0] / depth).floor().long()
    v = (48 - second.focal * local_points[..., 1] / depth).floor().long()
    inside = (u >= 0) & (u < 120) & (v >= 0) & (v < 96)
    u, v = u.clamp(0, 119), v.clamp(0, 95)
    visible = inside & ((other.depth[0, v, u] - depth).abs() < 0.02 * depth)
    assert visible.float().mean() > 0.5
    assert (one.objects[0][visible] == other.objects[0, v, u][visible]).float().mean() > 0.97
    assert (one.rgb[0][visible] - other.rgb[0, v, u][visible]).abs().mean() < 0.02


@given(st.integers(0, 999_000), st.integers(1, 4))
@settings(max_examples=15)
def test_a_scene_depends_on_its_seed_only(offset, count):
    seeds = [world.TEST_SEEDS[offset + i] for i in range(count)]
    batch, single = world.sample_scenes(seeds), world.sample_scenes(seeds[-1:])
    assert torch.equal(batch.colors[-1:], single.colors)
    assert torch.equal(batch.ball_position[-1:], single.ball_position)
    assert 0.0 < batch.colors.min() and batch.colors.max() < 1.0
    gap = (batch.ball_position - batch.block_position).norm(dim=-1)
    assert (gap > batch.ball_radius + batch.block_half[:, :2].norm(dim=-1)).all()


def test_batches_equal_single_renders():
    scene, camera = scene_and_camera(world.TEST_SEEDS[:3])
    batch = tracer.render(scene, camera)
    for i in range(3):
        one = world.Camera(camera.pose[i : i + 1], camera.focal[i : i + 1], camera.width, camera.height)
        assert torch.allclose(tracer.render(scene[i : i + 1], one).rgb[0], batch.rgb[i], atol=1e-5)


def test_splits_are_disjoint():
    splits = [world.TRAIN_SEEDS, world.VALIDATION_SEEDS, world.TEST_SEEDS, world.DEMO_SEEDS]
    ordered = sorted(splits, key=lambda split: split.start)
    assert all(a.stop <= b.start for a, b in zip(ordered, ordered[1:]))


def test_recolorings_change_their_object_only():
    scene, camera = scene_and_camera(world.TEST_SEEDS[:6], 40, 32)
    before = tracer.render(scene, camera, samples=1)
    for edit in instructions.EDITS:
        if edit.kind not in ("recolor", "turn-into"):
            continue
        after = tracer.render(instructions.apply(edit, scene), camera, samples=1)
        changed = (tracer.to_bytes(after.rgb) != tracer.to_bytes(before.rgb)).any(-1)
        target = before.objects == world.OBJECTS.index(edit.target)
        assert not (changed & ~target).any()
        assert torch.equal(before.depth, after.depth)
        if edit.kind == "recolor":
            assert torch.equal(changed, target)


def test_add_ons_change_only_the_pixels_they_cover():
    scene, camera = scene_and_camera(world.TEST_SEEDS[:6], 40, 32)
    before = tracer.render(scene, camera, samples=1)
    for slug in ("hat", "sunglasses"):
        after = tracer.render(instructions.apply(instructions.BY_SLUG[slug], scene), camera, samples=1)
        covered = after.objects == world.OBJECTS.index(slug)
        assert covered.any()
        assert torch.equal(after.rgb[~covered], before.rgb[~covered])


def test_rendered_edits_equal_separate_renders():
    scene, camera = scene_and_camera(world.TEST_SEEDS[:2])
    images = render_edits(scene, camera)
    for number, edit in enumerate(instructions.EDITS):
        single = tracer.to_bytes(tracer.render(instructions.apply(edit, scene), camera).rgb)
        assert torch.equal(images[:, number], single)
    assert torch.equal(images[:, -1], tracer.to_bytes(tracer.render(scene, camera).rgb))


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("Turn the bear into a panda", "panda"),
        ("turn the bear into a polar bear.", "polar-bear"),
        ("GIVE the bear a hat!", "hat"),
        ("give the bear sunglasses", "sunglasses"),
        ("make the ball blue", "ball-blue"),
        ("Paint the block red.", "block-red"),
        ("make it look like it just snowed", "snow"),
        ("make it night", "night"),
        ("Don't change the image", "no-change"),
    ],
)
def test_canonical_wordings_are_found(text, slug):
    edit = instructions.find(text)
    assert edit is not None and edit.slug == slug


def test_wordings_are_unambiguous():
    wordings = [wording for edit in instructions.EDITS for wording in edit.wordings]
    assert len(wordings) == len(set(wordings))
    assert all(len(edit.wordings) >= 3 for edit in instructions.EDITS)
    assert instructions.find("juggle") is None
