"""Every kind of image file becomes the RGB picture that its author meant."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageCms

from triptych.data.images import UnreadableImage, to_rgb

RNG = np.random.default_rng(0)
RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)  # 257 k: comes out as k
GREY_RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def u8(values) -> np.ndarray:
    return np.array(values, np.uint8)


def f32(values) -> np.ndarray:
    return np.array(values, np.float32)


def smooth(height: int = 24, width: int = 32) -> Image.Image:
    """A smooth RGB picture, which lossy formats keep within a few levels."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) * 4], 2).astype(np.uint8))


def through_file(image: Image.Image, kind: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) int64 of what to_rgb makes of the image."""
    result = to_rgb(image)
    assert result.mode == "RGB"
    return np.asarray(result).astype(np.int64)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values)[..., None], 3, 2)


def test_rgb_stays_as_it_is():
    np.testing.assert_array_equal(pixels(smooth()), np.asarray(smooth()))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_grey_is_repeated_in_the_three_channels(kind):
    np.testing.assert_array_equal(pixels(through_file(Image.fromarray(GREY_RAMP), kind)), grey(GREY_RAMP))


def test_one_bit_images_become_black_and_white():
    bits = RNG.integers(0, 2, (5, 7)).astype(bool)
    np.testing.assert_array_equal(pixels(through_file(Image.fromarray(bits), "PNG")), grey(bits * 255))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_gives_its_colours(kind):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 7])
    image.putdata([0, 1, 2])
    assert pixels(through_file(image, kind))[0].tolist() == [[10, 20, 30], [200, 100, 50], [0, 255, 7]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_the_transparent_colour_of_a_palette_is_white(kind):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert pixels(through_file(image, kind, transparency=1))[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_palette_entries_with_their_own_alpha_are_blended_with_white():
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 0, 0, 0, 255, 0, 0])
    image.putdata([0, 1, 2])
    result = pixels(through_file(image, "PNG", transparency=bytes([0, 51, 255])))[0]
    assert result.tolist() == [[255] * 3, [204] * 3, [255, 0, 0]]


def test_palette_with_alpha_is_composited_on_white():
    image = Image.new("PA", (2, 1))
    image.putpalette([9, 8, 7, 200, 100, 50])
    image.putdata([(1, 255), (1, 0)])
    assert pixels(image)[0].tolist() == [[200, 100, 50], [255, 255, 255]]


@pytest.mark.parametrize(
    ("image", "transparency"),
    [(Image.fromarray(u8([[3, 200]])), 3), (Image.fromarray(u8([[[1, 2, 3], [200] * 3]])), (1, 2, 3))],
)
def test_the_transparent_value_of_a_grey_or_rgb_png_is_white(image, transparency):
    assert pixels(through_file(image, "PNG", transparency=transparency))[0].tolist() == [[255] * 3, [200] * 3]


def test_hidden_colours_do_not_appear_and_half_transparent_ones_are_mixed_with_white():
    rgba = u8([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51], [0, 100, 200, 102]]])
    expected = [[255, 255, 255], [255, 0, 0], [204, 204, 204], [153, 193, 233]]
    for kind in ("PNG", "TIFF"):
        np.testing.assert_allclose(pixels(through_file(Image.fromarray(rgba), kind))[0], expected, atol=1)


def test_grey_with_alpha_is_composited_on_white():
    image = through_file(Image.fromarray(u8([[[0, 0], [0, 255], [0, 51]]]), "LA"), "PNG")
    assert pixels(image)[0].tolist() == [[255] * 3, [0] * 3, [204] * 3]


@pytest.mark.parametrize(("mode", "straight"), [("RGBa", "RGBA"), ("La", "LA")])
def test_premultiplied_alpha_gives_what_straight_alpha_gives(mode, straight):
    image = smooth().convert(straight)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    np.testing.assert_allclose(pixels(image.convert(mode)), pixels(image), atol=2)


def test_cmyk_tiff_is_ink_on_white():
    image = Image.new("CMYK", (4, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 255), (255, 0, 0, 0), (0, 255, 255, 0)])
    assert pixels(through_file(image, "TIFF"))[0].tolist() == [[255] * 3, [0] * 3, [0, 255, 255], [255, 0, 0]]


def test_adobe_inverted_cmyk_jpeg_is_not_negative():
    image = through_file(smooth().convert("CMYK"), "JPEG", quality=95)  # Pillow writes them inverted, as Adobe does
    assert (image.mode, "adobe" in image.info) == ("CMYK", True)
    assert np.abs(pixels(image) - np.asarray(smooth())).mean() < 4


def test_ycbcr_is_converted():
    np.testing.assert_allclose(pixels(smooth().convert("YCbCr")), np.asarray(smooth()), atol=3)


def test_lab_is_converted_to_srgb():
    neutral_and_red = Image.new("LAB", (2, 1))
    neutral_and_red.putdata([(128, 128, 128), (136, 208, 195)])  # L = 50 without colour is 119 in sRGB
    np.testing.assert_allclose(pixels(neutral_and_red)[0], [[119] * 3, [255, 0, 0]], atol=12)
    lab = ImageCms.profileToProfile(
        smooth(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    error = np.abs(pixels(through_file(lab, "TIFF")) - np.asarray(smooth()))  # 8-bit a and b are coarse in dark colours
    assert error.mean() < 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_a_16_bit_file_uses_its_whole_range_without_clipping(kind):
    image = through_file(Image.fromarray(RAMP), kind)
    assert image.mode in ("I;16", "I;16B", "I")
    np.testing.assert_array_equal(pixels(image), grey(GREY_RAMP))


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2")])
def test_16_bit_values_are_divided_by_257_and_rounded_in_either_byte_order(mode, dtype):
    values = np.array([[0, 128, 129, 1000, 32768, 65406, 65407, 65535]])
    image = Image.frombytes(mode, (8, 1), values.astype(dtype).tobytes())
    np.testing.assert_array_equal(pixels(image), grey(np.rint(values / 257)))


def test_32_bit_integers_in_the_16_bit_range_are_taken_as_16_bit():
    np.testing.assert_array_equal(pixels(Image.fromarray(RAMP.astype(np.int32))), grey(GREY_RAMP))


def test_32_bit_integers_beyond_the_16_bit_range_are_stretched():
    values = np.array([[-100, 0, 100]], np.int32)
    image = through_file(Image.fromarray(values), "TIFF")
    assert (image.mode, pixels(image)[0, :, 0].tolist()) == ("I", [0, 128, 255])
    extremes = np.array([[-(2**31), 2**31 - 1]], np.int32)
    assert pixels(Image.fromarray(extremes))[0, :, 0].tolist() == [0, 255]


def test_float_tiff_in_the_unit_range_is_scaled_by_255():
    image = through_file(Image.fromarray((GREY_RAMP / 255).astype(np.float32)), "TIFF")
    assert image.mode == "F"
    np.testing.assert_array_equal(pixels(image), grey(GREY_RAMP))
    dim = Image.fromarray(f32([[0.1, 0.2]]))  # not stretched
    assert pixels(dim)[0, :, 0].tolist() == [26, 51]


def test_floats_beyond_the_unit_range_are_stretched():
    assert pixels(Image.fromarray(f32([[-1, 0, 1, 3]])))[0, :, 0].tolist() == [0, 64, 128, 255]


def test_nan_is_black_and_infinities_are_the_ends_of_the_range():
    unit = f32([[np.nan, 0.4, np.inf, -np.inf]])
    assert pixels(Image.fromarray(unit))[0, :, 0].tolist() == [0, 102, 255, 0]
    wide = f32([[np.nan, -10, 10, np.inf]])
    assert pixels(Image.fromarray(wide))[0, :, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("value", [np.nan, 7.0])
def test_a_float_image_without_any_range_is_black(value):
    assert pixels(Image.fromarray(np.full((2, 2), value, np.float32))).max() == 0


UPRIGHT = u8([[[10] * 3, [20] * 3, [30] * 3], [[40] * 3, [50] * 3, [60] * 3]])
AS_STORED = {  # how a camera stores the upright image under each orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", AS_STORED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(AS_STORED[orientation](UPRIGHT)))
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(pixels(through_file(stored, kind, exif=exif, **options)), UPRIGHT)


def test_exif_orientation_is_applied_to_16_bit_images():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = through_file(Image.fromarray(np.ascontiguousarray(np.rot90(RAMP))), "PNG", exif=exif)
    np.testing.assert_array_equal(pixels(image), grey(GREY_RAMP))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_counts(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    image = through_file(frames[0], kind, save_all=True, append_images=frames[1:])
    assert getattr(image, "n_frames", 1) == 2
    assert (pixels(image) == [255, 0, 0]).all()


def test_the_given_image_is_left_alone():
    image = smooth().convert("RGBA")
    before = np.asarray(image).copy()
    to_rgb(image)
    assert image.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(image), before)


def test_the_error_names_key_and_reason_and_survives_pickling():
    error = pickle.loads(pickle.dumps(UnreadableImage("cat/1.jpg", "truncated")))
    assert (error.key, error.reason, str(error)) == ("cat/1.jpg", "truncated", "cat/1.jpg: truncated")
