"""PNG files, color maps and contact sheets."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from wys_nerfstudio.utils.visualization import (
    SOFTWARE,
    apply_colormap,
    contact_sheet,
    evenly_spaced,
    limited_size,
    printable,
    read_png,
    reduce,
    save_figure,
    save_png,
    to_uint8,
    write_png,
)


def test_to_uint8_is_the_inverse_of_dividing_by_255():
    levels = torch.arange(256, dtype=torch.uint8)
    assert to_uint8(levels.float() / 255).tolist() == levels.tolist()


def test_to_uint8_rounds_and_clamps():
    assert to_uint8(torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0, 7.0])).tolist() == [
        *(0, 0, 0, 1, 255, 255, 255)
    ]


def test_png_files_round_trip(tmp_path):
    image = torch.randint(0, 256, (7, 5, 3)).float() / 255
    write_png(tmp_path / "new" / "folder" / "view.png", image)
    assert torch.equal(read_png(tmp_path / "new" / "folder" / "view.png"), image)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1)])
def test_gray_images_are_written_with_one_channel(tmp_path, shape):
    write_png(tmp_path / "mask.png", torch.linspace(0, 1, 24).reshape(shape))
    with Image.open(tmp_path / "mask.png") as image:
        assert (image.mode, image.size) == ("L", (6, 4))
        assert np.array(image).ravel().tolist() == [round(255 * i / 23) for i in range(24)]


def test_every_png_has_software_and_description(tmp_path):
    figure = Figure(figsize=(1, 1))
    write_png(tmp_path / "a.png", torch.zeros(4, 6), "a mask")
    save_png(tmp_path / "b.png", contact_sheet(["a"], [("row", [torch.ones(4, 6, 3)])]), "a sheet")
    save_figure(tmp_path / "c.png", figure, "a chart")
    for name, description in (("a", "a mask"), ("b", "a sheet"), ("c", "a chart")):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert (image.info["Software"], image.info["Description"]) == (SOFTWARE, description)


def test_writing_replaces_the_file_without_leftovers(tmp_path):
    write_png(tmp_path / "a.b.png", torch.zeros(2, 2, 3))
    write_png(tmp_path / "a.b.png", torch.ones(2, 2, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["a.b.png"]
    assert bool((read_png(tmp_path / "a.b.png") == 1).all())


def test_a_failed_write_leaves_the_old_file_intact(tmp_path):
    write_png(tmp_path / "view.png", torch.ones(2, 2, 3))
    with pytest.raises((TypeError, ValueError)):
        write_png(tmp_path / "view.png", torch.zeros(2, 2, 3, 5))
    assert bool((read_png(tmp_path / "view.png") == 1).all())


def test_apply_colormap_is_inferno_on_a_fixed_scale():
    relevance = torch.tensor([[0.0, 0.25, 1.0], [0.5, -3.0, 2.0]])
    result = apply_colormap(relevance)
    for y in range(2):
        for x in range(3):
            color = colormaps["inferno"](min(max(float(relevance[y, x]), 0.0), 1.0))[:3]
            assert result[y, x].tolist() == pytest.approx(color, abs=1e-6)


def test_colors_get_brighter_with_relevance():
    assert (apply_colormap(torch.linspace(0, 1, 20)[None]).sum(dim=-1)[0].diff() > 0).all()


def test_a_contact_sheet_enlarges_images_by_whole_factors():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 8, 10, 3)).float() / 255
    rows = [(f"view {i}", list(images[i])) for i in range(2)]
    sheet = np.array(contact_sheet(["a", "b", "c"], rows, min_height=20))
    for i in range(2):
        for j in range(3):
            top, left = 18 + i * (24 + 18 + 4), 4 + j * (30 + 4)
            cell = sheet[top : top + 24, left : left + 30]
            assert cell[1::3, 1::3].tolist() == to_uint8(images[i, j]).tolist()
            assert cell.tolist() == cell[1::3, 1::3].repeat(3, 0).repeat(3, 1).tolist()


def test_a_contact_sheet_has_titles_and_names():
    rows = [("a view's name", [torch.ones(16, 64, 3)] * 2)]
    plain, named = (
        np.array(contact_sheet(titles, [(name, rows[0][1])], min_height=16))
        for titles, name in ((["", ""], ""), (["captured", "edited"], "a view's name"))
    )
    assert (plain == 255).all()
    assert (named[:18, 4:68] < 128).any()
    assert (named[:18, 72:] < 128).any()
    assert (named[18 + 16 :, :68] < 200).any()


def name_pixels(name: str) -> np.ndarray:
    """Return the pixels of a row's name and of a title in a contact sheet."""
    sheet = np.array(contact_sheet([name], [(name, [torch.ones(16, 300, 3)])], min_height=16))
    return np.concatenate([sheet[:18], sheet[18 + 16 :]])


@pytest.mark.parametrize("letters", ["жшюы", "αβψλ", "éñøß", "אבגד", "ابجد"])
def test_a_contact_sheet_shows_letters_instead_of_boxes(letters):
    shown = [name_pixels(letter) for letter in letters]
    assert all((a != b).any() for i, a in enumerate(shown) for b in shown[:i])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Медведь_0001 Ωμέγα é", "Медведь_0001 Ωμέγα é"),
        ("宮殿_0001", r"\u5bae\u6bbf_0001"),
        ("곰", r"\uacf0"),
        ("\udcff_from_latin-1", r"\udcff_from_latin-1"),
        ("two\nlines", r"two\nlines"),
        ("\U0001f43c\U000e0001", r"\U0001f43c\U000e0001"),
    ],
)
def test_characters_that_the_font_lacks_are_escaped(name, expected):
    assert printable(name) == expected
    assert (name_pixels(name) == name_pixels(expected)).all()


@given(st.text())
def test_every_name_can_be_drawn(name):
    assert name_pixels(name).shape == name_pixels("").shape


@pytest.mark.parametrize("longer_side", [1, 5, 32, 48, 100])
@pytest.mark.parametrize("size", [(32, 48), (48, 32), (1, 48), (20, 20)])
def test_images_are_reduced_to_the_limited_size(size, longer_side):
    image = torch.full((*size, 3), 0.25)
    reduced = reduce(image, longer_side)
    assert reduced.shape[:2] == limited_size(*size, longer_side)
    assert max(reduced.shape[:2]) == min(longer_side, max(size)) and (reduced == 0.25).all()
    assert reduced is image or max(size) > longer_side


def test_a_reduced_image_has_the_means_of_areas():
    image = torch.rand(4, 6, 3)
    torch.testing.assert_close(reduce(image, 3), image.view(2, 2, 3, 2, 3).mean(dim=(1, 3)))


@given(st.integers(0, 40), st.integers(0, 40))
def test_evenly_spaced_indices_are_distinct(count, total):
    chosen = evenly_spaced(count, total)
    assert len(chosen) == min(count, total)
    assert all(0 <= i < total for i in chosen)
    gaps = {b - a for a, b in zip(chosen, chosen[1:])}
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
