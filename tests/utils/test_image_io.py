"""Image files: lossless reading and writing, refusals, output paths."""

import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, features
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngInfo

from wys_nerfstudio import __version__
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.image_io import find_images, plan_outputs, provenance, read_image, read_mask, write_image


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def refusal(path: Path) -> str:
    with pytest.raises(WysError) as error:
        read_image(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("channels", [3, 4])
def test_reading_and_writing_is_lossless(tmp_path, channels):
    pixels = noise(17, 31, channels)
    image = read_image(save(tmp_path / "a.png", pixels, icc_profile=b"a profile"))
    write_image(tmp_path / "b.png", image.rgb, like=image)
    assert np.array_equal(read_pixels(tmp_path / "b.png"), pixels)
    with Image.open(tmp_path / "b.png") as written:
        assert written.info["icc_profile"] == b"a profile"


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_files_are_read_as_pillow_decodes_them(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", noise(16, 24, 3))
    assert np.array_equal((read_image(path).rgb * 255).round().numpy(), read_pixels(path))


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".gif"])
def test_other_lossless_formats_are_read(tmp_path, suffix):
    pixels = np.array(Image.fromarray(noise(16, 24, 3)).quantize(16).convert("RGB"))
    image = read_image(save(tmp_path / f"a{suffix}", pixels))
    assert np.array_equal(image.pixels.numpy(), pixels) and image.alpha is None


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_avif_files_are_read_as_pillow_decodes_them(tmp_path):
    path = save(tmp_path / "a.avif", noise(16, 24, 3))
    assert np.array_equal(read_image(path).pixels.numpy(), read_pixels(path))
    if "AVIF" in Image.OPEN:
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(Image.OPEN, "AVIF")
            assert "is an AVIF image, which the installed Pillow cannot read: update it" in refusal(path)


@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg"])
def test_heic_files_are_read_by_a_plugin(tmp_path, monkeypatch, name):
    path, pixels = tmp_path / name, noise(16, 24, 3)
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + pixels.tobytes())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "is a HEIC image: install the plugin that reads it (pip install pillow-heif)" in refusal(path)

    class Heif(ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size, self._mode = (24, 16), "RGB"
            self.tile = [("raw", (0, 0, 24, 16), 24, ("RGB", 0, 1))]

    def register() -> None:
        monkeypatch.setitem(Image.OPEN, "HEIF", (Heif, lambda head: head[4:8] == b"ftyp"))

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    assert np.array_equal(read_image(path).pixels.numpy(), pixels)


@pytest.mark.parametrize(("suffix", "kind"), [(".CR2", "a camera raw file"), (".psd", "a Photoshop file")])
def test_other_formats_are_named(tmp_path, suffix, kind):
    path = save(tmp_path / "a.png", noise(16, 24, 3)).rename(tmp_path / f"a{suffix}")
    assert f"is {kind}, which is not supported: convert it to PNG" in refusal(path)


def test_deep_tiff_files_are_refused(tmp_path):
    assert "has 16 bits per channel" in refusal(save(tmp_path / "a.tif", noise(16, 24).astype(np.uint16)))
    assert "has 32 bits per channel" in refusal(save(tmp_path / "b.tif", noise(16, 24).astype(np.float32)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_color_and_resolution_are_kept(tmp_path, mode):
    info = PngInfo()
    info.add(b"gAMA", struct.pack(">I", 45455))
    info.add(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))
    info.add_text("Copyright", "© somebody")
    info.add_text("Software", "another program")
    image = Image.fromarray(noise(16, 24, 4 if mode == "RGBA" else 3))
    image = image.quantize(16) if mode == "P" else image
    image.save(tmp_path / "a.png", pnginfo=info, dpi=(300, 150), icc_profile=b"a profile")
    source = read_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", source.rgb, like=source)
    with Image.open(tmp_path / "a.png") as read, Image.open(tmp_path / "b.png") as written:
        for key in ("gamma", "chromaticity", "dpi", "icc_profile", "Copyright"):
            assert written.info[key] == read.info[key]
        assert written.info["Software"] == f"wys-nerfstudio {__version__}"


def test_the_rendering_intent_is_kept(tmp_path):
    info = PngInfo()
    info.add(b"sRGB", b"\1")
    Image.fromarray(noise(16, 24, 3)).save(tmp_path / "a.png", pnginfo=info)
    source = read_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", source.rgb, like=source)
    with Image.open(tmp_path / "b.png") as written:
        assert written.info["srgb"] == 1


def test_profiles_of_gray_values_are_not_kept(tmp_path):
    gray, color = (b"x" * 16 + space + b"x" * 100 for space in (b"GRAY", b"RGB "))
    for profile, kept in ((gray, None), (color, color)):
        assert read_image(save(tmp_path / "a.png", noise(16, 24), icc_profile=profile)).metadata.icc_profile == kept


def test_metadata_of_rotated_photographs_is_kept(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Copyright] = "somebody"
    exif[ExifTags.Base.Artist] = "a photographer"
    source = read_image(save(tmp_path / "a.jpg", noise(16, 24, 3), exif=exif, dpi=(300, 150)))
    write_image(tmp_path / "b.png", source.rgb, like=source)
    with Image.open(tmp_path / "b.png") as written:
        assert written.info["dpi"] == pytest.approx((150, 300), abs=0.1)
        assert (written.info["Author"], written.info["Copyright"]) == ("a photographer", "somebody")
        assert not written.getexif()


def test_images_written_without_a_record_are_marked(tmp_path):
    write_image(tmp_path / "a.png", torch.rand(16, 16, 3))
    with Image.open(tmp_path / "a.png") as written:
        software = f"wys-nerfstudio {__version__}"
        assert written.info["Software"] == software and written.info["Description"] == f"edited with {software}"


def test_records_of_earlier_edits_are_kept(tmp_path):
    like = None
    for number in range(3):
        origin = provenance(f"edit {number}", "embedded", {"seed": number})
        write_image(tmp_path / "a.png", torch.rand(16, 16, 3), like=like, origin=origin)
        like = read_image(tmp_path / "a.png")
    assert like is not None and [edit["instruction"] for edit in like.edits] == ["edit 0", "edit 1", "edit 2"]


@pytest.mark.parametrize("record", ["{", "7", "[1]", "[" * 100_000, '{"instruction": "x"}'])
def test_foreign_records_are_not_errors(tmp_path, record):
    info = PngInfo()
    info.add_text("wys-nerfstudio", record)
    Image.fromarray(noise(16, 24, 3)).save(tmp_path / "a.png", pnginfo=info)
    expected = ({"instruction": "x"},) if record.startswith('{"') else ()
    assert read_image(tmp_path / "a.png").edits == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.jpg", noise(16, 24, 3), exif=exif)
    stored = read_pixels(path)
    transforms = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
        8: np.rot90,
    }
    image = read_image(path)
    assert np.array_equal((image.rgb * 255).round().numpy(), transforms[orientation](stored))
    assert image.size == ((24, 16) if orientation > 4 else (16, 24))


def test_gray_and_palette_images_are_converted_without_loss(tmp_path):
    gray = noise(16, 20)
    image = read_image(save(tmp_path / "gray.png", gray))
    assert np.array_equal((image.rgb * 255).round().numpy(), gray[..., None].repeat(3, axis=2))
    palette = Image.fromarray(noise(16, 20, 3)).quantize(16)
    palette.save(tmp_path / "palette.png")
    image = read_image(tmp_path / "palette.png")
    assert np.array_equal((image.rgb * 255).round().numpy(), np.array(palette.convert("RGB")))
    assert image.alpha is None
    palette.save(tmp_path / "clear.png", transparency=3)
    alpha = read_image(tmp_path / "clear.png").alpha
    assert alpha is not None and np.array_equal(alpha == 0, np.array(palette) == 3)


def write_16_bit_png(path: Path) -> Path:
    """Write a 16-bit RGB PNG chunk by chunk; Pillow cannot."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(16 * 6) for _ in range(16))
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def test_16_bit_images_are_refused(tmp_path):
    assert "16 bits per channel" in refusal(write_16_bit_png(tmp_path / "color.png"))
    assert "16 bits per channel" in refusal(save(tmp_path / "gray.png", noise(16, 16).astype(np.uint16)))


def test_unsupported_images_are_refused(tmp_path):
    assert "There is no image" in refusal(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("not an image")
    assert "cannot be read" in refusal(tmp_path / "text.png")
    content = save(tmp_path / "complete.png", noise(64, 64, 3)).read_bytes()
    for share in (0.001, 0.5):
        (tmp_path / "half.png").write_bytes(content[: int(len(content) * share)])
        assert "cannot be read" in refusal(tmp_path / "half.png")
    Image.new("CMYK", (20, 20)).save(tmp_path / "cmyk.jpg")
    assert "CMYK" in refusal(tmp_path / "cmyk.jpg")
    frames = [Image.fromarray(noise(16, 16, 3, seed=i)) for i in range(2)]
    for suffix in ("png", "gif", "webp", "tif"):
        frames[0].save(tmp_path / f"animated.{suffix}", save_all=True, append_images=frames[1:])
        assert "is an animation or has several pages" in refusal(tmp_path / f"animated.{suffix}")
    assert "15x40 pixels" in refusal(save(tmp_path / "small.png", noise(40, 15, 3)))


def test_masks_are_true_where_bright(tmp_path):
    gray = noise(16, 20)
    assert torch.equal(read_mask(save(tmp_path / "m.png", gray)), torch.from_numpy(gray) > 127)
    with pytest.raises(WysError, match="all black"):
        read_mask(save(tmp_path / "dark.png", np.zeros((16, 16), np.uint8)))
    with pytest.raises(WysError, match="There is no mask"):
        read_mask(tmp_path / "missing.png")


def rgba(value: int, inside: np.ndarray, opacity: tuple[int, int] = (0, 255)) -> np.ndarray:
    """Return pixels of one gray value whose opacity is `opacity[inside]`."""
    alpha = np.where(inside, opacity[1], opacity[0])
    return np.concatenate([np.full((*inside.shape, 3), value), alpha[..., None]], axis=-1).astype(np.uint8)


DISC = np.hypot(*np.mgrid[-10:10, -12:12]) < 8
BLACK_AND_WHITE = Image.fromarray((DISC * 255).astype(np.uint8))


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(Image.fromarray(rgba(255, DISC)), id="white cut-out over hidden white"),
        pytest.param(Image.fromarray(rgba(0, DISC)), id="black cut-out"),
        pytest.param(Image.fromarray(rgba(90, DISC, (100, 200))), id="half transparent gray"),
        pytest.param(Image.fromarray(rgba(255, DISC)).convert("LA"), id="gray with alpha"),
        pytest.param(Image.fromarray(rgba(0, DISC)).quantize(4), id="palette with transparency"),
        pytest.param(Image.merge("RGBA", [Image.fromarray(noise(20, 24, seed=i)) for i in range(3)]
                                 + [BLACK_AND_WHITE]), id="cut-out of a photograph"),
        pytest.param(BLACK_AND_WHITE.convert("RGBA"), id="opaque RGBA"),
        pytest.param(BLACK_AND_WHITE.convert("LA"), id="opaque gray with alpha"),
        pytest.param(Image.merge("RGBA", [BLACK_AND_WHITE] * 3 + [Image.new("L", (24, 20), 200)]), id="even opacity"),
        pytest.param(BLACK_AND_WHITE.convert("1"), id="1 bit"),
        pytest.param(BLACK_AND_WHITE.convert("P"), id="palette"),
        pytest.param(BLACK_AND_WHITE.convert("RGB"), id="RGB"),
    ],
)  # fmt: skip
def test_white_or_opaque_pixels_are_inside_a_mask(tmp_path, image):
    image.save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png").numpy(), DISC)


def test_the_transparent_gray_value_of_a_png_is_outside(tmp_path):
    BLACK_AND_WHITE.point(lambda value: value or 9).save(tmp_path / "mask.png", transparency=9)
    assert np.array_equal(read_mask(tmp_path / "mask.png").numpy(), DISC)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(DISC.astype(np.uint8)), "is a 0/1 mask: what is inside must be 255; multiply a 0/1 mask by 255"),
        (Image.fromarray(3 * DISC.astype(np.uint8)), "has no value above 3 of 255, as class ids have: .* 0/1 mask by 255"),
        (Image.fromarray(rgba(255, DISC, (0, 1))), "is a 0/1 mask"),
        (Image.fromarray(rgba(255, DISC, (0, 0))), "is all black"),
        (Image.fromarray(DISC.astype(np.uint16) * 65535), "is not a single image of 8 bits per channel"),
        (Image.fromarray(DISC.astype(np.float32)), "is not a single image of 8 bits per channel"),
        (Image.fromarray(DISC.astype(np.int32)), "is not a single image of 8 bits per channel"),
        (BLACK_AND_WHITE.convert("CMYK"), "is not a single image of 8 bits per channel"),
        (Image.merge("RGBA", [BLACK_AND_WHITE] * 3 + [Image.linear_gradient("L").resize((24, 20))]),
         "has white, black and transparent pixels: make it opaque"),
    ],
)  # fmt: skip
def test_masks_without_a_clear_inside_are_refused(tmp_path, image, message):
    path = tmp_path / "mask.tif"
    image.save(path)
    with pytest.raises(WysError, match=f'The mask "{path}" {message}'):
        read_mask(path)


def test_damaged_and_animated_masks_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(WysError, match='The mask ".*text.png" cannot be read as an image: replace it'):
        read_mask(tmp_path / "text.png")
    BLACK_AND_WHITE.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("L", (24, 20))])
    with pytest.raises(WysError, match='The mask ".*moving.gif" is not a single image'):
        read_mask(tmp_path / "moving.gif")


def test_folders_are_replaced_by_their_images(tmp_path):
    for name in ("b.png", "a.JPG", "d.heic", "e.psd", "notes.txt", ".DS_Store", "._b.png"):
        (tmp_path / name).touch()
    (tmp_path / "c.png").mkdir()
    assert find_images([tmp_path]) == [tmp_path / name for name in ("a.JPG", "b.png", "d.heic", "e.psd")]
    assert find_images([tmp_path / "b.png", tmp_path / "a.JPG"]) == [tmp_path / "b.png", tmp_path / "a.JPG"]
    for missing in (tmp_path / "c.png", tmp_path / "missing.png"):
        with pytest.raises(WysError, match="There is no image"):
            find_images([missing])


def test_outputs_are_a_file_or_files_in_a_folder(tmp_path):
    a, b = tmp_path / "a.jpg", tmp_path / "b.png"
    a.touch()
    b.touch()
    out = tmp_path / "out"
    assert plan_outputs([a], [a], tmp_path / "x.png") == [tmp_path / "x.png"]
    assert plan_outputs([a, b], [a, b], out) == [out / "a.png", out / "b.png"]
    assert plan_outputs([tmp_path], [a, b], out) == [out / "a.png", out / "b.png"]
    out.mkdir()
    assert plan_outputs([a], [a], out) == [out / "a.png"]


@pytest.mark.parametrize(
    ("inputs", "output", "message"),
    [
        (["a.jpg"], "x.jpg", "lossless PNG"),
        (["a.jpg"], "x", "lossless PNG"),
        (["a.jpg", "b.png"], "x.png", "give -o a folder"),
        (["a.jpg", "a.png"], "out", "rename one of them"),
        (["a.jpg", "a_mask.png"], "out", "rename one of them"),
        (["a.jpg", "A.png"], "out", "rename one of them"),
    ],
)
def test_unsuitable_outputs_are_refused(tmp_path, inputs, output, message):
    files = [tmp_path / name for name in inputs]
    for file in files:
        file.touch()
    with pytest.raises(WysError, match=message):
        plan_outputs(files, files, tmp_path / output)
