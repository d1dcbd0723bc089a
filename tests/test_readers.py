"""What is read from files of strangers: archives, images and tables, most of them broken on purpose."""

import copy
import csv
import gzip
import io
import os
import random
import struct
import tarfile
import threading
import time
import zipfile
import zlib

import numpy as np
import pytest
from archives import tarred
from PIL import Image

from project.data.readers import (
    FORMATS,
    ImageError,
    Texts,
    check_rejects,
    class_folders,
    common_edge,
    csv_head,
    decode_all,
    decode_image,
    in_order,
    open_tree,
    read_csv,
    reject,
)
from project.data.sources import SourceError, read_content


def packed(image, kind="PNG", **options):
    """The bytes of an image file."""
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def noise(edge=32, channels=3, seed=0):
    """An image in which every pixel counts."""
    shape = (edge, edge, 3) if channels == 3 else (edge, edge)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, np.uint8))


def archive(path, files, method=zipfile.ZIP_DEFLATED):
    """A zip of name -> content."""
    with zipfile.ZipFile(path, "w", method) as z:
        for name, content in files.items():
            z.writestr(name, content)
    return path


FOUR = {name: packed(noise(8, seed=i)) for i, name in enumerate(("a/0.png", "a/1.png", "b/0.png", "b/1.png"))}


# ---- texts


def test_texts_are_what_was_packed():
    draw = random.Random(3)
    rows = [tuple("".join(draw.choices("aæ語🙂\n ", k=draw.randrange(6))) for _ in range(2)) for _ in range(50)]
    texts = Texts.from_rows(rows, ("title", "text"))
    assert [tuple(texts[i].values()) for i in range(50)] == rows
    assert texts[-1] == texts[49] and texts.column("text") == [text for _, text in rows]
    assert texts.joined()[7] == "\n".join(value for value in rows[7] if value.strip())
    for chosen in (slice(3, 40, 7), slice(5, 2), np.array([4, 4, 1]), np.array([i % 3 == 0 for i in range(50)]), []):
        positions = np.arange(50)[chosen].tolist()
        assert [tuple(row.values()) for row in map(texts[chosen].__getitem__, range(len(positions)))] == [
            rows[i] for i in positions
        ]
    with pytest.raises(IndexError):
        texts[50]


def test_texts_may_be_mapped_and_must_fit_together(tmp_path):
    texts = Texts.from_rows([["one"], ["two"]])
    np.save(tmp_path / "texts.npy", texts.blob)
    mapped = Texts(("text",), np.load(tmp_path / "texts.npy", mmap_mode="r"), texts.offsets)
    assert mapped.column("text") == ["one", "two"] and mapped[1:].column("text") == ["two"]
    assert len(Texts.from_rows([])) == 0 and Texts.from_rows([]).joined() == []
    for blob, offsets in ((texts.blob[:-1], texts.offsets), (texts.blob, texts.offsets[1:]), (texts.blob, np.zeros(0))):
        with pytest.raises(ValueError, match="texts: expected unsigned bytes"):
            Texts(("text",), blob, offsets)
    with pytest.raises(ValueError, match="row 1: expected a value for each of title, text"):
        Texts.from_rows([("a", "b"), ("c",)], ("title", "text"))
    with pytest.raises(ValueError, match="row 0: expected a value for each of text, got 'abc'"):
        Texts.from_rows(["abc"], ("text",))
    with pytest.raises(ValueError, match="row 1: expected text, found half of a character"):
        Texts.from_rows([["a"], ["\ud83d"]])


# ---- one image


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_size_that_was_asked_for(kind):
    content = packed(noise(40), kind)
    for size, channels in ((16, 3), (64, 1), (40, 3)):
        image = decode_image(content, size, channels)
        assert image.dtype == np.uint8 and image.shape == ((size, size, 3) if channels == 3 else (size, size))
        assert image.flags.writeable and image.std() > 3


def test_pixels_of_the_right_size_are_not_touched():
    image = noise(48, 1)
    assert (decode_image(packed(image), 48, 1) == np.asarray(image)).all()


@pytest.mark.parametrize(
    ("mode", "colour", "grey"),
    [
        ("1", 1, 255),
        ("L", 90, 90),
        ("LA", (90, 0), 255),
        ("P", 3, 3),
        ("RGB", (10, 10, 10), 10),
        ("RGBA", (10, 10, 10, 255), 10),
        ("RGBA", (10, 10, 10, 0), 255),
        ("I;16", 0, 0),
        ("I;16", 90 * 257, 90),
        ("I;16", 65535, 255),
    ],
)
def test_any_kind_of_pixel_becomes_8_bits_on_white(mode, colour, grey):
    image = Image.new(mode, (9, 9), colour)
    if mode == "P":
        image.putpalette([i for i in range(256) for _ in range(3)])
    content = packed(image)
    assert (decode_image(content, 9, 1) == grey).all()
    assert (decode_image(content, 9, 3) == grey).all()


def test_cmyk_16_bit_colour_palette_with_transparency_and_animation():
    red = decode_image(packed(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), 8)[4, 4]
    assert red[0] > 250 and red[1:].max() < 5
    head = png_head(2, 2, bits=16, kind=2)
    rows = b"".join(b"\0" + struct.pack(">6H", 65535, 0, 257 * 9, 0, 0, 0) for _ in range(2))
    deep = head + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    assert decode_image(deep, 2)[0, 0].tolist() == [255, 0, 9]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([200, 0, 0])
    assert (decode_image(packed(palette, transparency=bytes([0])), 8) == 255).all()
    frames = [Image.new("L", (8, 8), value) for value in (40, 250, 250)]
    for kind in ("GIF", "WEBP"):
        image = decode_image(packed(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True), 8, 1)
        assert (image == 40).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_photo_is_upright(turn):
    upright = Image.new("L", (64, 64), 0)
    upright.paste(255, (0, 0, 32, 32))  # bright above left
    upright.paste(128, (32, 0, 64, 32))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[turn]) if turn > 1 else upright
    note = Image.Exif()
    note[0x0112] = turn
    for kind in ("JPEG", "PNG", "WEBP"):
        image = decode_image(packed(stored, kind, exif=note), 64, 1).astype(int)
        assert abs(image[16, 16] - 255) < 9 and abs(image[16, 48] - 128) < 9 and image[48, 16] < 9


def test_the_middle_is_kept():
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    assert (decode_image(packed(wide), 50)[:, 1:-1] == (0, 0, 255)).all()
    assert decode_image(packed(Image.new("L", (1, 5000), 7)), 16, 1).max() == 7


def test_a_large_photo_is_decoded_in_part_and_looks_the_same():
    smooth = Image.fromarray(np.add.outer(np.arange(1200), np.arange(1200)).astype(np.float64) / 10).convert("L")
    whole = np.asarray(smooth.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert abs(decode_image(packed(smooth, "JPEG", quality=95), 64, 1) - whole).max() <= 3


def png_chunk(name, body):
    """One piece of a PNG file."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_head(width, height, bits=8, kind=0):
    """The first bytes of a PNG file."""
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))


def huge_jpeg():
    """A JPEG whose head says 65,500 x 65,500."""
    content = bytearray(packed(noise(16), "JPEG"))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", 65500, 65500)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"<html>Not found</html>", "a web page or other text"),
        (b"hello, I am a text file", "something else, text that begins 'hello, I am a text f'"),
        (b"%PDF-1.7 and so on", "found a PDF"),
        (b"\x89PNG\r\n\x1a\n", "a damaged one"),
        (png_head(0, 0) + png_chunk(b"IEND", b""), "found"),
        (
            png_head(100_000, 100_000) + png_chunk(b"IDAT", zlib.compress(bytes(100))),
            "expected at most 50,000,000 pixels",
        ),
        (png_head(9_000, 9_000) + png_chunk(b"IDAT", zlib.compress(bytes(100))), "found 9,000 x 9,000"),
        (png_head(8, 8) + png_chunk(b"IDAT", b"no zlib"), "a damaged PNG"),
        (huge_jpeg(), "expected at most 50,000,000 pixels"),
        (packed(noise(64), "JPEG")[:900], "a damaged JPEG"),
        (packed(noise(64), "GIF")[:1500], "a damaged GIF"),
        (packed(noise(64), "WEBP")[:300], "damaged"),
        (packed(noise(64), "BMP")[:300], "a damaged BMP"),
        (packed(noise(8), "TIFF"), "a TIFF image, which is not read here. Save it as JPEG or PNG"),
        (packed(noise(8), "ICO"), "an ICO image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript file"),
    ],
)
def test_what_is_no_image_says_what_it_is(content, said):
    with pytest.raises(ImageError) as told:
        decode_image(content, 16)
    assert said in str(told.value)


def test_a_limit_is_for_the_head_and_costs_no_memory():
    started = time.monotonic()
    with pytest.raises(ImageError, match="found 7,000 x 7,000"):
        decode_image(packed(Image.new("1", (7000, 7000))), 16, max_pixels=1_000_000)
    assert time.monotonic() - started < 2
    with pytest.raises(ImageError, match=r"expected an image \(PNG\)"):
        decode_image(packed(noise(8), "JPEG"), 8, formats=("PNG",))


def test_hostile_bytes_never_raise_anything_else():
    draw = random.Random(0)
    for kind in FORMATS:
        content = packed(noise(24), kind)
        for _ in range(150):
            broken = bytearray(content)
            for _ in range(draw.randrange(1, 9)):
                broken[draw.randrange(len(broken))] = draw.randrange(256)
            try:
                image = decode_image(bytes(broken[: draw.randrange(1, len(broken) + 1)]), 12)
            except ImageError:
                continue
            assert image.shape == (12, 12, 3)


# ---- many images


def test_blocks_come_back_in_order_and_are_not_all_there_at_once():
    taken, most = [], 0

    def blocks():
        for i in range(50):
            taken.append(i)
            yield i

    def work(i):
        time.sleep(0.002 if i % 7 else 0.01)
        return i

    for i, result in enumerate(in_order(work, blocks(), 3)):
        most = max(most, len(taken) - i)
        assert result == i
    assert most <= 8


def test_an_error_in_a_thread_is_raised_and_ends_the_work():
    def work(i):
        if i == 5:
            raise KeyError("five")
        return i

    before = threading.active_count()
    with pytest.raises(KeyError):
        list(in_order(work, range(10_000), 2))
    assert threading.active_count() == before


def test_images_are_the_same_in_memory_and_in_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path))
    files = {f"{i:03}": packed(noise(20, seed=i)) if i % 10 else b"broken" for i in range(75)}
    images, kept, rejects = decode_all(list(files), files.__getitem__, 16, 1)
    mapped, again, _ = decode_all(list(files), files.__getitem__, 16, 1, memory=100)
    assert isinstance(mapped, np.memmap) and not isinstance(images, np.memmap)
    assert (images == mapped).all() and (kept == again).all() and len(images) == len(kept) == 67
    assert [r["file"] for r in rejects] == [f"{i:03}" for i in range(0, 75, 10)] and rejects[0]["row"] is None
    assert not list(tmp_path.iterdir())  # the file has no name any more


def test_the_common_edge_is_that_of_most():
    files = {str(i): packed(noise(48 if i % 3 else 200)) for i in range(9)} | {"x": b""}
    assert common_edge(list(files), files.__getitem__) == 48
    assert common_edge(["x"], files.__getitem__) == 0


def test_a_few_rejects_are_counted_and_many_are_an_error():
    check_rejects([reject("a.png", "empty")], 10, "set")
    with pytest.raises(SourceError) as told:
        check_rejects([reject(f"{i}.csv", "empty", i) for i in range(4)], 30, "set.zip")
    assert "set.zip: expected at least 90% of 30 rows" in str(told.value)
    assert "found 4 that are not: 0.csv row 0: empty; 1.csv row 1: empty; 2.csv row 2: empty." in str(told.value)
    with pytest.raises(SourceError, match="there is no row"):
        check_rejects([], 0, "set.zip")


# ---- archives and folders


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../../out.png", "a path that leads out"),
        ("a/../../out.png", "a path that leads out"),
        ("/etc/passwd", "a path that leads out"),
        ("..\\out.png", "a path that leads out"),
        ("C:/out.png", "a path that leads out"),
        ("a//b.png", "a path that leads out"),
        ("./a/b.png", "a path that leads out"),
        ("a/0.png", "a name that was there before"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_an_archive_with_a_bad_name_is_not_read(tmp_path, name, said):
    path = archive(tmp_path / "set.zip", FOUR)
    with zipfile.ZipFile(path, "a") as z:
        z.writestr(name, b"x")
    with pytest.raises(ValueError) as told, open_tree(path):
        pass
    assert f"{path}: expected an archive of plain files, found {said}" in str(told.value)
    assert name in str(told.value).replace("\\\\", "\\")


def test_bombs_are_not_unpacked(tmp_path):
    bomb = archive(tmp_path / "bomb.zip", {**FOUR, "a/9.png": bytes(50_000_000)})
    with (
        pytest.raises(ValueError, match=r"found 48,\d\d\d bytes that unpack to 50,000,000 in 'a/9.png'"),
        open_tree(bomb),
    ):
        pass
    with pytest.raises(ValueError, match="unpack to 50,000,000"):
        read_content(archive(tmp_path / "text.zip", {"Fake.csv": bytes(50_000_000)}))
    overlapping = tmp_path / "overlapping.zip"
    with zipfile.ZipFile(overlapping, "w") as z:
        z.writestr("a/0.png", os.urandom(2000))
        for i in range(1, 9):  # all of them are the same bytes of the file
            info = copy.copy(z.filelist[0])
            info.filename = info.orig_filename = f"a/{i}.png"
            z.filelist.append(info)
    with pytest.raises(ValueError, match="some that overlap"), open_tree(overlapping):
        pass


def test_a_password_and_an_unknown_method_are_refused(tmp_path):
    path = archive(tmp_path / "set.zip", FOUR)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # the bit that says: encrypted
    path.write_bytes(content)
    with pytest.raises(ValueError, match="found a password in 'a/0.png'"), open_tree(path):
        pass
    with (
        pytest.raises(ValueError, match="the packing method 14"),
        open_tree(archive(tmp_path / "lzma.zip", FOUR, zipfile.ZIP_LZMA)),
    ):
        pass


def test_a_cut_archive_is_an_error_and_a_damaged_member_is_listed(tmp_path):
    whole = archive(tmp_path / "set.zip", FOUR, zipfile.ZIP_STORED).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-30], b"PK\3\4", b"no zip at all", b""):
        (tmp_path / "cut.zip").write_bytes(content)
        with (
            pytest.raises(
                SourceError, match=r"cut\.zip: expected a whole zip archive, found (a damaged one|bytes|an empty file)"
            ),
            open_tree(tmp_path / "cut.zip"),
        ):
            pass
    at = whole.index(FOUR["b/0.png"]) + 60
    (tmp_path / "bad.zip").write_bytes(whole[:at] + b"?" + whole[at + 1 :])
    with open_tree(tmp_path / "bad.zip") as tree:
        _, kept, rejects = decode_all(list(tree.names), tree.read, 8)
    assert kept.tolist() == [0, 1, 3]
    assert [r["file"] for r in rejects] == ["b/0.png"] and "Bad CRC-32" in rejects[0]["reason"]


def test_links_and_hidden_files_and_deep_ones(tmp_path):
    path = archive(tmp_path / "set.zip", {**FOUR, "__MACOSX/a/._0.png": b"x", "a/.DS_Store": b"x", "README.txt": b"x"})
    link = zipfile.ZipInfo("a/link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as z:
        z.writestr(link, "/etc/passwd")
        z.writestr("a/deep/5.png", b"x")
        z.writestr("beside.png", b"x")
        z.writestr("empty/", b"")
    with open_tree(path) as tree:
        items, rejects, others = class_folders(tree)
    assert [item.name for item in items] == sorted(FOUR) and others == 1 and tree.ignored == 2
    assert {r["file"]: r["reason"].rpartition("found ")[2] for r in rejects} == {
        "a/link.png": "a link",
        "a/deep/5.png": "it deeper",
        "beside.png": "it beside them",
    }


def test_a_folder_and_its_archive_are_the_same_with_or_without_a_folder_around(tmp_path):
    for around in ("", "archive/", "a/b/"):
        path = archive(tmp_path / f"{len(around)}.zip", {f"{around}{name}": content for name, content in FOUR.items()})
        with zipfile.ZipFile(path) as z:
            z.extractall(tmp_path / f"folder{len(around)}")
        for place in (path, tmp_path / f"folder{len(around)}"):
            with open_tree(place) as tree:
                items, rejects, others = class_folders(tree)
                assert [tree.read(item.name) for item in items] == [FOUR[name] for name in sorted(FOUR)]
            assert [(item.part, item.label, item.name) for item in items] == [
                ("train", name[0], name) for name in sorted(FOUR)
            ]
            assert not rejects and not others


def test_folders_named_in_any_way_for_their_part(tmp_path):
    names = {f"Train/a/{i}.png": b"" for i in range(2)} | {"TEST/b/1.png": b"", "validation/a/2.png": b""}
    with open_tree(archive(tmp_path / "set.zip", names)) as tree:
        assert {item.part for item in class_folders(tree)[0]} == {"train", "test", "valid"}
    with (
        open_tree(archive(tmp_path / "mixed.zip", {**names, "extra/1.png": b""})) as tree,
        pytest.raises(SourceError, match="found 'extra' too"),
    ):
        class_folders(tree)
    with (
        open_tree(archive(tmp_path / "flat.zip", {"a.txt": b"", "b.txt": b""})) as tree,
        pytest.raises(SourceError, match="expected class folders of images.*found a.txt, b.txt"),
    ):
        class_folders(tree)
    with open_tree(archive(tmp_path / "none.zip", {})) as tree, pytest.raises(SourceError, match="found no files"):
        class_folders(tree)


@pytest.mark.skipif(os.name != "posix", reason="named pipes are of POSIX")
def test_a_folder_with_a_pipe_or_a_broken_link_or_a_circle(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(FOUR["a/1.png"])
    (tmp_path / "a" / "around").symlink_to(tmp_path)
    with open_tree(tmp_path) as tree:
        assert list(tree.names) == ["a/1.png"]
    os.mkfifo(tmp_path / "a" / "pipe.png")
    with pytest.raises(SourceError, match="pipe.png: expected a file"), open_tree(tmp_path):
        pass
    (tmp_path / "a" / "pipe.png").unlink()
    (tmp_path / "a" / "broken.png").symlink_to("nowhere")
    with pytest.raises(SourceError, match="broken.png: expected a file, found a broken link"), open_tree(tmp_path):
        pass


def test_a_file_larger_than_any_image_is_not_read_whole(tmp_path):
    with open_tree(archive(tmp_path / "set.zip", FOUR)) as tree, pytest.raises(ImageError, match="at most 10 bytes"):
        tree.read("a/0.png", limit=10)


# ---- tables


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "found 'title' not"),
        (b"titel,text\na,b\n", "Did you mean 'titel'?"),
        (b"title,text,title\na,b,c\n", "found 'title' 2 times"),
        (b"title,text\na,b\nc\n", "row 3: expected 2 fields, found 1"),
        (b'title,text\n"a\n\nb",c\nd,e,f\n', "row 3: expected 2 fields, found 3"),
        (b'title,text\na,"never closed\nb,c\n', "expected a second quote in row 2, found none up to the end, line 3"),
        (b'title,text\na,"b" c\n', "row 2: expected a comma or the end of the row after a quote, found other text"),
        (b'title,text\na,"b\nc" d"\n', "after a quote in row 2, found other text in line 3"),
        ("title,text\na,æ\n".encode("latin-1"), "row 2: expected UTF-8 text, found the byte e6"),
        ("titel,text\na,b\n".encode("utf-16"), "Did you mean 'titel'?"),
        ("title,text\na,b\n".encode("utf-16")[:-1], "expected UTF-16, as it begins, found truncated data"),
        (b"title,text\na,b\nc,\0d\n", "row 3: expected UTF-8 text, found a NUL byte"),
        (b"title,text\na," + b"x" * 16_000_001 + b"\n", "at most 16,000,000 characters, found a longer one in row 2"),
        (b"x" * 16_000_001, "characters, found a longer one in row 1"),
        (b"PK\3\4 no archive", "damaged"),
        (b"\x1f\x8b no archive", "damaged"),
        (b"<html><body>404</body></html>\n", "found a web page"),
    ],
)
def test_a_table_that_is_wrong_says_where(tmp_path, content, said):
    path = tmp_path / "news.csv"
    path.write_bytes(content)
    before = csv.field_size_limit()
    with pytest.raises(ValueError) as told:
        list(read_csv(path, ("title", "text")))
    assert str(path) in str(told.value) and said in str(told.value)
    assert csv.field_size_limit() == before


def test_a_table_in_every_wrapping(tmp_path):
    text = '\ufeffdate,text,title\r\n1,"long, ""quoted""\r\ntext",A\r\n\r\n2,' + "x" * 300_000 + ",B\r\n"
    (tmp_path / "plain.csv").write_bytes(text.encode())
    (tmp_path / "gzip.csv").write_bytes(gzip.compress(text.encode()))
    archive(tmp_path / "one.zip", {"any name.csv": text})
    archive(tmp_path / "many.zip", {"x/news.csv": text, "other.csv": "a,b", "__MACOSX/news.csv": "junk"})
    for path in tmp_path.iterdir():
        rows = list(read_csv(path, ("title", "text"), "news.csv"))
        assert rows == [(2, ["A", 'long, "quoted"\r\ntext']), (4, ["B", "x" * 300_000])], path
    with pytest.raises(ValueError, match=r"expected one file old.csv or new.csv, found 2 \(x/news.csv, other.csv\)"):
        list(read_csv(tmp_path / "many.zip", ("title",), "old.csv", "new.csv"))
    with pytest.raises(ValueError, match="found 0"):
        list(read_csv(archive(tmp_path / "none.zip", {}), ("title",)))


def test_hostile_archives_never_raise_anything_else(tmp_path):
    draw = random.Random(1)
    files = {
        "tree": archive(tmp_path / "a.zip", {**FOUR, "dogs.csv": "filepaths,labels\n" * 3}).read_bytes(),
        "tar": tarred(tmp_path / "a.tar", {**FOUR, "dogs.csv": b"filepaths,labels\n"}).read_bytes(),
        "tgz": tarred(tmp_path / "a.tgz", {**FOUR, "dogs.csv": b"filepaths,labels\n"}, "w:gz").read_bytes(),
        "zip": archive(tmp_path / "b.zip", {"news.csv": "title,text\n" + "a,b\n" * 50}).read_bytes(),
        "gzip": gzip.compress(b"title,text\n" + b"a,b\n" * 50),
    }
    refused = 0
    for kind, content in [item for item in files.items() for _ in range(150)]:
        broken = bytearray(content)
        for _ in range(draw.randrange(1, 4)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        (tmp_path / "x").write_bytes(broken)
        try:
            if kind in ("tree", "tar", "tgz"):
                with open_tree(tmp_path / "x") as tree:
                    items, rejects, others = class_folders(tree)
                    kept, damaged = decode_all([item.name for item in items], tree.read, 8)[1:]
                # nothing is lost in silence
                assert len(kept) + len(damaged) + len(rejects) + others + tree.ignored == 5
            else:
                list(read_csv(tmp_path / "x", ("title", "text")))
        except ValueError as e:
            assert str(tmp_path / "x") in str(e)
            refused += 1
    assert refused > 100


def test_two_threads_that_read_long_fields(tmp_path):
    """The limit is one for the process: the first that ends must not lower it for the other."""
    (tmp_path / "a.csv").write_text("title,text\na,b\n")
    (tmp_path / "b.csv").write_text("title,text\n" + f"a,{'b ' * 100_000}\n" * 3)
    before = csv.field_size_limit()
    one, two = (read_csv(tmp_path / name, ("title", "text")) for name in ("a.csv", "b.csv"))
    rows = iter(one)
    first = next(rows)
    long = iter(two)
    next(long)
    list(rows)
    assert first and len(list(long)) == 2 and csv.field_size_limit() == before


# ---- tables of other programs

TABLE = [["title", "text"], *([f"Ærø {i}", f"a, {i}; and 'so'"] for i in range(40))]


def written(rows, delimiter=",", end="\n"):
    """A table as `csv` writes it."""
    csv.writer(out := io.StringIO(newline=""), delimiter=delimiter, lineterminator=end).writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        written(TABLE, end="\r\n").encode(),
        written(TABLE, end="\r").encode(),
        written(TABLE, end="\r\r\n").encode(),  # written as text on Windows once too often
        (written(TABLE[:9], end="\r\n") + written(TABLE[9:])).encode(),
        ("\ufeff" + written(TABLE)).encode(),
        written(TABLE).encode("utf-16"),
        written(TABLE).encode("utf-16-le"),
        written(TABLE, end="\r\n").encode("utf-16-be"),
        written(TABLE, ";").encode(),
        written(TABLE, "\t").encode(),
        ("\ufeff" + written(TABLE, ";", "\r\n")).encode(),
        written([["Title ", " TEXT"], *TABLE[1:]]).encode(),
    ],
)
def test_a_table_of_another_program_is_the_same_table(tmp_path, content):
    for path, data in ((tmp_path / "a.csv", content), (tmp_path / "a.csv.gz", gzip.compress(content))):
        path.write_bytes(data)
        rejects = []
        assert [row for _, row in read_csv(path, ("title", "text"), rejects=rejects)] == TABLE[1:]
        assert csv_head(path) == ["title", "text"] and not rejects


def test_carriage_returns_in_fields_as_pandas_wrote_them(tmp_path):
    """With lines that end in one byte, `csv` before Python 3.13 and pandas put no quotes around a carriage return."""
    rows = [["a\rb", "c"], ["d", "e\r\rf"], ["g\r", "h"], ["\ri", 'j\r"k"']]
    path = tmp_path / "a.csv"
    path.write_bytes(b'title,text\na\rb,c\nd,e\r\rf\ng\r,h\n\ri,"j\r""k"""\n')
    assert [row for _, row in read_csv(path, ("title", "text"))] == rows
    path.write_bytes(b'title,text\r\n"a\rb",c\r\n"d\r\ne",f\r\n')
    assert [row for _, row in read_csv(path, ("title", "text"))] == [["a\rb", "c"], ["d\r\ne", "f"]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"a,\0\n", "found a NUL byte"),
        (b"\0\0\0,b\n", "found a NUL byte"),
        (b"a,caf\xe9\n", "found the byte e9"),
        (b"\xff,b\n", "found the byte ff"),
        (b"a\n", "expected 2 fields, found 1"),
        (b"a,b,c\n", "expected 2 fields, found 3"),
        (b'a,"b" c\n', "found other text"),
        (b'a,"b', "found the end of the file"),
        (b'a,"b\n\nand a paragraph, cut', "found the end of the file"),
    ],
)
def test_a_row_that_cannot_be_read_is_listed_and_no_other_row_is_lost(tmp_path, row, reason):
    path, rejects = tmp_path / "a.csv", []
    after = b"" if "end of the file" in reason else b"z,last\n"
    path.write_bytes(written(TABLE).encode() + row + after)
    found = list(read_csv(path, ("title", "text"), "news.csv", rejects=rejects))
    assert [values for _, values in found] == [*TABLE[1:], *([["z", "last"]] if after else [])]
    assert [(r["file"], r["row"]) for r in rejects] == [("news.csv", 42)] and reason in rejects[0]["reason"]
    assert not after or found[-1][0] == 43
    with pytest.raises(SourceError, match="row 42: "):
        list(read_csv(path, ("title", "text")))


def test_a_quote_that_swallows_rows_is_not_one_bad_row(tmp_path):
    path, rejects = tmp_path / "a.csv", []
    plain = "".join(f"a{i},b{i}\n" for i in range(40))
    path.write_text(f'title,text\nfirst,"open\n{plain}', encoding="utf-8")
    with pytest.raises(SourceError, match="expected a second quote in row 2.*line 42, and whole rows on the way"):
        list(read_csv(path, ("title", "text"), rejects=rejects))


# ---- folders around a set, sets inside of sets, other archives


def folder(path, files):
    """Files below a folder."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def in_each(tmp_path, files):
    """The same files as a folder, a zip, a tar and a packed tar."""
    yield folder(tmp_path / "folder", files)
    yield archive(tmp_path / "set.zip", files)
    yield tarred(tmp_path / "set.tar", files)
    yield tarred(tmp_path / "set.tar.gz", files, "w:gz")


@pytest.mark.parametrize(
    "around", ["Images/", "images/", "images/Images/", "a/b/c/d/", "dogs (1)/Dataset/images/", "test set/"]
)
def test_folders_around_a_set_are_looked_through(tmp_path, around):
    files = {f"{around}{name}": content for name, content in FOUR.items()}
    files |= {"annotations/Annotation/a/0": b"<xml>", "README": b"x"}
    for path in in_each(tmp_path, files):
        with open_tree(path) as tree:
            items, rejects, others = class_folders(tree)
            assert [(item.label, item.name) for item in items] == [(name[0], name) for name in sorted(FOUR)], path
            assert [tree.read(item.name) for item in items] == [FOUR[name] for name in sorted(FOUR)]
            assert not rejects and others == 2


@pytest.mark.parametrize("names", [FOUR, {f"train/{name}": content for name, content in FOUR.items()}])
@pytest.mark.parametrize(("one", "two"), [("images/", "images/images/"), ("", "again/"), ("x/", "y/")])
def test_a_set_that_holds_itself_is_read_once_and_its_copy_counted(tmp_path, names, one, two):
    files = {one + name: content for name, content in names.items()}
    files |= {two + name: content for name, content in names.items()}
    for path in in_each(tmp_path, files):
        with open_tree(path) as tree:
            items, rejects, others = class_folders(tree)
            assert [item.name for item in items] == sorted(names) and tree.copies == 4
        assert not rejects and not others


def test_two_sets_that_differ_are_named_with_the_one_thing_to_do(tmp_path):
    files = {f"one/{name}": content for name, content in FOUR.items()}
    files |= {f"two/{name}": content + b"." for name, content in FOUR.items()}
    for path in in_each(tmp_path, files):
        with pytest.raises(SourceError) as told, open_tree(path):
            pass
        assert "expected one set of images, found one/ (4 files) and two/ (4 files), which are not the same" in str(
            told.value
        )
        assert ("Unpack it" in str(told.value)) == path.is_file()


def test_images_around_a_set_are_listed(tmp_path):
    files = {f"images/{name}": content for name, content in FOUR.items()} | {"sample.png": b"x", "more/1.png": b"x"}
    for path in in_each(tmp_path, files):
        with open_tree(path) as tree:
            assert sorted(r["file"] for r in class_folders(tree)[1]) == ["more/1.png", "sample.png"]


def test_a_zip_has_no_folder_to_name(tmp_path):
    for path in in_each(tmp_path, {"a.txt": b"", "b.txt": b""}):
        with open_tree(path) as tree, pytest.raises(SourceError) as told:
            class_folders(tree)
        advice = "Name the folder" if path.is_dir() else "Unpack it, and name the folder"
        assert str(told.value).endswith(f"found a.txt, b.txt. {advice} that holds them.")


def test_a_tar_that_ends_too_early_or_holds_more_than_files(tmp_path):
    whole = tarred(tmp_path / "set.tar", FOUR).read_bytes()
    head = 512 + -(-len(FOUR["a/0.png"]) // 512) * 512  # of one member, with its content
    broken = bytearray(whole)
    broken[head + 150] ^= 1  # the second member's checksum: for `tarfile` it is the end
    for content in (whole[: head + 600], whole[: 2 * head], bytes(broken)):
        (tmp_path / "cut.tar").write_bytes(content)
        said = r"cut.tar: expected a whole tar archive, found a damaged one"
        with pytest.raises(SourceError, match=said), open_tree(tmp_path / "cut.tar"):
            pass
    with tarfile.open(tmp_path / "set.tar", "a") as z:
        link = tarfile.TarInfo("a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        z.addfile(link)
        z.addfile(tarfile.TarInfo("a/.DS_Store"))
    with open_tree(tmp_path / "set.tar") as tree:
        assert list(tree.names) == sorted(FOUR) and tree.ignored == 1
        assert [r["reason"] for r in class_folders(tree)[1]] == ["expected a file, found a link"]
    for name, said in (("../x.png", "leads out"), ("/etc/x.png", "leads out"), ("a/0.png", "there before")):
        tarred(tmp_path / "bad.tar", FOUR)
        tarred(tmp_path / "bad.tar", {name: b"x"}, "a")
        with pytest.raises(SourceError, match=said), open_tree(tmp_path / "bad.tar"):
            pass
    bomb = tarred(tmp_path / "bomb.tar.gz", {"a/1.png": bytes(50_000_000)}, "w:gz")
    with pytest.raises(SourceError, match="unpack to far more"), open_tree(bomb):
        pass


def test_names_that_are_not_utf8_in_zips(tmp_path):
    path = archive(tmp_path / "set.zip", FOUR | {"a/café.png": FOUR["a/0.png"], "b\\2.png": FOUR["b/0.png"]})
    content = path.read_bytes()
    with open_tree(path) as tree:
        assert "a/café.png" in tree.names and "b/2.png" in tree.names
    marked = content.replace("café".encode(), b"caf\xff\xfe")  # still said to be UTF-8
    path.write_bytes(marked)
    said = r"names in UTF-8, as the archive says.*found b'a/caf.xff.xfe.png'. Rename"
    with pytest.raises(SourceError, match=said), open_tree(path):
        pass
    unmarked = bytearray(content)
    for start, at in ((b"PK\3\4", 7), (b"PK\1\2", 9)):  # the flag of UTF-8 taken off, as many programs leave it
        for i in (i for i in range(len(unmarked)) if unmarked[i : i + 4] == start):
            unmarked[i + at] &= ~8
    path.write_bytes(unmarked)
    with open_tree(path) as tree:
        assert "a/café.png" in tree.names and tree.read("a/café.png") == FOUR["a/0.png"]
    path.write_bytes(bytes(unmarked).replace("é".encode(), b"\x82\x82"))  # é in code page 437
    with open_tree(path) as tree:
        assert "a/caféé.png" in tree.names


@pytest.mark.skipif(os.name != "posix", reason="a file's name is any bytes on POSIX alone")
def test_names_that_are_not_utf8_in_folders_and_tars(tmp_path):
    folder(tmp_path / "folder", FOUR)
    (tmp_path / "folder" / "a" / os.fsdecode(b"caf\xe9.png")).write_bytes(FOUR["a/0.png"])
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.GNU_FORMAT) as z:
        z.add(tmp_path / "folder", ".")
    for path in (tmp_path / "folder", tmp_path / "set.tar"):
        with open_tree(path) as tree:
            items, rejects, _ = class_folders(tree)
            assert "a/caf\\xe9.png" in [item.name for item in items] and len(items) == 5 and not rejects
            assert tree.read("a/caf\\xe9.png") == FOUR["a/0.png"]


def test_why_a_file_cannot_be_read_is_not_called_damage(tmp_path):
    with open_tree(folder(tmp_path, FOUR)) as tree:
        (tmp_path / "a" / "0.png").unlink()
        with pytest.raises(ImageError, match=r"found one that cannot \(No such file"):
            tree.read("a/0.png")
    with pytest.raises(ImageError, match="found a JPEG image, which is not read here"):
        decode_image(packed(noise(8), "JPEG"), 8, formats=("PNG",))
