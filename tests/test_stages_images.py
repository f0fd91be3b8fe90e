"""Images as inputs: decoding, ids, the processor, and where images are found."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from model_tools import picture, save_model, write_images
from PIL import Image
from sherl_pipe.cache import InputError, UnsafeError
from sherl_pipe.stages import pictures
from sherl_pipe.stages.backbone import load_backbone
from sherl_pipe.stages.data import load_sources
from sherl_pipe.stages.inputs import load_preprocessor, preprocessor_fingerprint, read_inputs
from sherl_pipe.stages.pictures import Picture
from sherl_pipe.stages.source import Source
from sherl_pipe.stages.templates import PictureTemplate, Template


def saved(image: Image.Image, kind: str = "PNG", **how: Any) -> Picture:
    """The image as the bytes of a file."""
    out = io.BytesIO()
    image.save(out, kind, **how)
    return Picture(out.getvalue(), "here")


def test_an_id_names_pixels_and_not_files(tmp_path: Path) -> None:
    image = picture(1)
    image.save(tmp_path / "a.png")
    same = [
        Picture(tmp_path / "a.png", "a"),
        saved(image),
        saved(image, "BMP"),
        saved(image, "PNG", compress_level=0),
        saved(image.convert("RGBA")),
    ]
    assert len({each.identity for each in same}) == 1
    other = image.copy()
    other.putpixel((0, 0), (1, 2, 3))
    turned = Image.frombytes("RGB", image.size[::-1], image.tobytes())  # the same bytes
    assert image.size[0] != image.size[1]
    assert len({saved(each).identity for each in (image, other, turned)}) == 3
    assert len(same[0].identity) == 16


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA", "RGBA"])
def test_modes_become_rgb(mode: str) -> None:
    image = picture(2).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    found = saved(image, kind).pixels()
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


def test_the_orientation_of_the_camera_is_applied() -> None:
    image = picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    found = saved(image, "PNG", exif=exif)
    assert np.array_equal(np.asarray(found.pixels()), np.rot90(np.asarray(image), 3))
    assert found.identity != saved(image).identity


def test_what_is_no_image_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(4)
    clear = image.convert("RGBA")
    clear.putpixel((0, 0), (1, 2, 3, 4))
    deep = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    cut = saved(image).content
    assert isinstance(cut, bytes)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    jpeg = saved(noise, "JPEG").content
    assert isinstance(jpeg, bytes)
    for wrong, part in (
        (saved(clear), "transparent"),
        (saved(deep), "8 bits a channel"),
        (Picture(cut[: len(cut) // 2], "here"), "damaged"),
        (Picture(jpeg[: len(jpeg) // 2], "here"), "damaged"),
        (Picture(b"no image at all", "here"), "Pillow does not know"),
        (Picture(Path("/nowhere.png"), "here"), "no file"),
        (saved(image, "GIF", save_all=True, append_images=[picture(5)]), "2 of them"),
    ):
        with pytest.raises(InputError, match=f"^here: .*{part}"):
            wrong.pixels()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(UnsafeError, match=r"^here: .*exceeds limit"):
        saved(image).pixels()


@pytest.mark.parametrize(("family", "size"), [("vit", 7), ("deit", 8), ("dinov2", 10)])
def test_the_processor_makes_what_the_model_reads(tmp_path: Path, family: str, size: int) -> None:
    name = save_model(tmp_path, family)
    reader, backbone = load_preprocessor(name), load_backbone(name)
    assert reader.tokens(backbone) == size
    images = [saved(picture(number)) for number in range(5)]
    read = read_inputs(reader, images, size)
    assert read.lengths.tolist() == [size] * 5
    (values,) = read.batch([3, 1], 0).values()
    plain = reader.processor(images=[images[3].pixels(), images[1].pixels()], return_tensors="pt")
    assert torch.equal(values, plain["pixel_values"])
    with torch.no_grad():
        assert backbone.model(pixel_values=values).last_hidden_state.shape == (2, size, 36)


def test_an_image_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    reader = load_preprocessor(save_model(tmp_path, "vit"))
    file = tmp_path / "a.png"
    picture(1).save(file)
    image = Picture(file, "a.png")
    first = reader.batch([image])
    assert image.identity
    assert torch.equal(reader.batch([image]), first)
    picture(2).save(file)
    with pytest.raises(InputError, match=r"a\.png: expected the image that it was"):
        reader.batch([image])


def change_processor(folder: Path, **change: Any) -> None:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_a_changed_processor_has_another_fingerprint(tmp_path: Path) -> None:
    name = save_model(tmp_path, "vit")
    first = preprocessor_fingerprint(load_preprocessor(name))
    assert preprocessor_fingerprint(load_preprocessor(name)) == first
    change_processor(tmp_path, image_mean=[0.4, 0.5, 0.5])
    assert preprocessor_fingerprint(load_preprocessor(name)) != first


def test_a_processor_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    name = save_model(tmp_path, "vit")
    change_processor(tmp_path, size={"height": 8, "width": 8})
    with pytest.raises(InputError, match=r"image processor of .*doesn't match model"):
        load_preprocessor(name).tokens(load_backbone(name))
    change_processor(tmp_path, size={"shortest_edge": 8})
    with pytest.raises(InputError, match="all images one size"):
        load_preprocessor(name)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="cannot load the image processor"):
        load_preprocessor(name)


def shapes(sources: list[Source]) -> dict[str, tuple[int, str | None]]:
    return {each.name: (len(each.rows), each.label_column) for each in sources}


def test_folders_of_images(tmp_path: Path) -> None:
    write_images(tmp_path, ("shade",), train=6, validation=4)
    (tmp_path / "shade" / "train" / ".hidden").write_text("")
    sources = load_sources(str(tmp_path), images=True)
    # Training data first.
    assert list(shapes(sources)) == ["shade/train", "shade/validation"]
    assert sources[0].labels() == ["above"] * 3 + ["below"] * 3
    # Without the task's folder, and without classes.
    inner = load_sources(str(tmp_path / "shade"), images=True)
    assert shapes(inner) == {"shade/train": (6, "label"), "shade/validation": (4, "label")}
    above = tmp_path / "shade" / "train" / "above"
    plain = tmp_path / "plain" / "some"
    for role in ("train", "validation"):
        (plain / role).mkdir(parents=True)
        for file in above.iterdir():
            (plain / role / file.name).write_bytes(file.read_bytes())
    found = {"some/train": (3, None), "some/validation": (3, None)}
    assert shapes(load_sources(str(tmp_path / "plain"), images=True)) == found
    assert shapes(load_sources(str(plain), images=True)) == found
    assert load_sources(str(plain), images=True, limit=2)[0].rows[1]["image"].origin.endswith("png")


def test_folders_that_are_unclear_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, ("shade",), train=4, validation=2)
    odd = tmp_path / "shade" / "train" / "above" / "notes.txt"
    odd.write_text("")
    with pytest.raises(InputError, match=r"notes.txt: expected an image"):
        load_sources(str(tmp_path), images=True)
    odd.unlink()
    picture(1).save(tmp_path / "shade" / "train" / "loose.png")
    with pytest.raises(InputError, match="all of one depth"):
        load_sources(str(tmp_path), images=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="images <task>/<split>/<class>"):
        load_sources(str(tmp_path / "empty"), images=True)


def test_columns_of_images(tmp_path: Path) -> None:
    files = [tmp_path / "pictures" / f"{number}.png" for number in range(3)]
    files[0].parent.mkdir()
    for number, file in enumerate(files):
        picture(number).save(file)
    ids = [Picture(file, "").identity for file in files]
    rows: list[dict[str, Any]] = [
        {"image": f"pictures/{file.name}", "label": number} for number, file in enumerate(files)
    ]
    listed = tmp_path / "train.jsonl"
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [file.read_bytes() for file in files]
    stored = {"raw": data, "image": [{"bytes": each, "path": None} for each in data]}
    pyarrow.parquet.write_table(pa.table(stored | {"label": [0, 1, 2]}), tmp_path / "train.parquet")
    template = PictureTemplate.of("image")
    for file in (listed, tmp_path / "train.parquet"):
        (source,) = load_sources(str(file), images=True)
        assert source.columns == ("image",) and source.ids(template) == ids
    (source,) = load_sources(str(tmp_path / "train.parquet"), images=True, image_column="raw")
    assert source.ids(template.reading(source.columns)) == ids
    with pytest.raises(InputError, match=r"image column: expected 'x'"):
        load_sources(str(listed), images=True, image_column="x")
    for wrong, found in (("gone.png", "no file"), (None, "nothing"), (3, "int")):
        listed.write_text(json.dumps({"image": wrong}))
        with pytest.raises(InputError, match=f"row 1, column 'image'.*{found}"):
            load_sources(str(listed), images=True)


def test_a_template_of_images_survives_json() -> None:
    template = PictureTemplate.of("image")
    assert Template.from_json(json.loads(json.dumps(template.to_json()))) == template
    assert Template.from_json(template.reading(["x"]).to_json()).columns == ("x",)


def test_reading_stops_at_the_first_image_that_is_wrong() -> None:
    images = [saved(picture(number)) for number in range(6)]
    told: list[int] = []
    ids = pictures.identify_pictures(images, lambda *each: told.append(int(each[1])))
    assert ids == [each.identity for each in images] and told == [1, 2, 3, 4, 5, 6]
    with pytest.raises(InputError, match="number three"):
        pictures.identify_pictures([*images[:2], Picture(b"x", "number three"), *images[3:]])
