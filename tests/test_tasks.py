"""Each task's published layouts, from made files; broken ones; and the real files where somebody has them."""

import dataclasses
import gzip
import io
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from project.data.readers import Texts, decode_image
from project.data.sources import SourceError, find, published
from project.data.tasks import get_task, task_names

FACES = ("angry", "fear", "happy")
DOGS = ("Basset", "Shih-Tzu")


def picture(seed, edge=48, kind="JPEG", grey=True):
    """The bytes of an image of noise."""
    shape = (edge, edge) if grey else (edge, edge + 10, 3)
    noise = np.random.default_rng(seed).integers(0, 255, shape, np.uint8)
    Image.fromarray(noise).save(file := io.BytesIO(), kind)
    return file.getvalue()


def write(folder, files):
    """Write name -> content below a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def pack(path, files):
    """Write name -> content into a zip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
    return path


def read(task, source):
    """What a task reads from a folder or file."""
    return get_task(task).read(find(task, source=source, places=()))


def same(a, b):
    """Whether two readings are equal in everything."""
    inputs = (a.inputs.blob, b.inputs.blob) if isinstance(a.inputs, Texts) else (a.inputs, b.inputs)
    arrays = (inputs, (a.labels, b.labels), (a.part, b.part))
    rest = [(x.classes, x.parts, x.ids, x.rejects, x.notes) for x in (a, b)]
    return all(np.array_equal(x, y) for x, y in arrays) and rest[0] == rest[1]


def refused(task, source):
    """The message with which a task refuses a source."""
    with pytest.raises(SourceError) as told:
        read(task, source)
    assert "expected" in str(told.value) and "found" in str(told.value)
    return str(told.value)


# ---- faces


def fer(edge=48, names=FACES, parts=("train", "test")):
    """Files in FER-2013's layout."""
    paths = (f"{p}/{c}/{p}_{i}.jpg" for p in parts for c in names for i in range(4))
    return {path: picture(zlib.crc32(path.encode()), edge) for path in paths}


def test_fer_layout_as_folder_and_as_archive(tmp_path):
    write(tmp_path / "folder" / "face_emotion", fer())
    pack(tmp_path / "zip" / "fer2013.zip", fer())
    pack(tmp_path / "around" / "some archive.zip", {f"archive/{name}": content for name, content in fer().items()})
    faces = read("face_emotion", tmp_path / "folder")
    assert faces.inputs.shape == (24, 48, 48) and faces.classes == FACES and faces.parts == ("train", "test")
    assert np.bincount(faces.part).tolist() == [12, 12] and not faces.rejects and not faces.notes
    assert faces.ids[0] == "train/angry/train_0.jpg" and faces.labels[:5].tolist() == [0, 0, 0, 0, 1]
    for other in ("zip", "around", "folder/face_emotion", "zip/fer2013.zip"):
        assert same(faces, read("face_emotion", tmp_path / other)), other


def test_human_face_emotions_layout(tmp_path):
    below = {f"{c}/{i}.png": picture(i, 200, "PNG", grey=False) for c in ("Angry", "Happy") for i in range(3)}
    write(tmp_path / "root", below)
    write(tmp_path / "named", {f"train_data/{name}": content for name, content in below.items()})
    for layout in ("root", "named"):
        faces = read("face_emotion", tmp_path / layout)
        assert faces.inputs.shape == (6, 64, 64) and faces.classes == ("angry", "happy") and faces.parts == ("train",)


def test_equalized_faces_are_a_part_of_another_origin(tmp_path):
    pack(tmp_path / "fer2013.zip", fer())
    pack(tmp_path / "fer2013_equalized_drift.zip", fer(names=FACES[:2], parts=("test",)))
    faces = read("face_emotion", tmp_path)
    assert faces.parts == ("train", "test", "ood-equalized") and np.bincount(faces.part).tolist() == [12, 12, 8]
    assert faces.ids[-1] == "ood-equalized/test/fear/test_3.jpg" and faces.labels[-1] == 1
    assert same(faces, read("face_emotion", tmp_path / "fer2013.zip"))  # what lies beside a file is found too
    pack(tmp_path / "fer2013_equalized_drift.zip", fer(names=("bored",), parts=("test",)))
    assert "test/bored/test_0.jpg: expected one of the classes of train (angry, fear, happy)" in refused(
        "face_emotion", tmp_path
    )


def test_damaged_faces_are_listed_and_too_many_are_an_error(tmp_path):
    files = fer() | {"train/happy/x.jpg": b"", "train/happy/.DS_Store": b"x", "train/happy/y.txt": b"hello"}
    faces = read("face_emotion", write(tmp_path / "few", files))
    assert len(faces.labels) == 24 and [r["file"] for r in faces.rejects] == ["train/happy/x.jpg", "train/happy/y.txt"]
    assert "an empty file" in faces.rejects[0]["reason"]
    many = files | {f"test/happy/{i}.jpg": b"<html>" for i in range(5)}
    told = refused("face_emotion", pack(tmp_path / "fer2013.zip", many))
    assert "expected at least 90% of 31 rows" in told and "found 7" in told and "train/happy/x.jpg: " in told


def test_face_folders_that_are_no_set(tmp_path):
    one = {name: content for name, content in fer().items() if not name.startswith(("train/fear", "test/fear"))}
    one["train/fear/1.jpg"] = picture(1)
    assert "two training examples each, found fear 1" in refused("face_emotion", write(tmp_path / "one", one))
    outside = fer() | {"test/bored/1.jpg": picture(1)}
    assert "test/bored/1.jpg: expected one of" in refused("face_emotion", write(tmp_path / "outside", outside))
    assert "expected a folder train, found only test" in refused(
        "face_emotion", write(tmp_path / "test", fer(parts=("test",)))
    )
    assert "found one class" in refused("face_emotion", write(tmp_path / "single", fer(names=("happy",))))


EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")


def pixels(files, head="emotion,pixels,Usage"):
    """The table in which FER-2013 was first published, of the same images: the decoded pixels."""
    rows = []
    for i, (name, content) in enumerate(sorted(files.items())):
        part, emotion, _ = name.split("/")
        usage = "Training" if part == "train" else ("PublicTest", "PrivateTest")[i % 2]
        numbers = " ".join(map(str, decode_image(content, 48, 1).ravel().tolist()))
        row = {"emotion": str(EMOTIONS.index(emotion)), "pixels": numbers, "Usage": usage}
        rows.append(",".join(row[name.strip()] for name in head.split(",")))
    return "\n".join([head, *rows, ""])


def tar(path, files, mode="w:gz"):
    """Write name -> content into a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_fer2013_as_first_published_is_the_same_images(tmp_path):
    faces = read("face_emotion", write(tmp_path / "folders", fer()))
    table, icml = pixels(fer()), pixels(fer(), "emotion, Usage, pixels")
    sources = [
        write(tmp_path / "csv", {"fer2013.csv": table}),
        write(tmp_path / "named", {"face_emotion/fer2013/FER2013.CSV": table}),
        write(tmp_path / "gz", {"fer2013.csv.gz": gzip.compress(table.encode())}),
        write(tmp_path / "icml", {"icml_face_data.csv": icml}),
        pack(tmp_path / "zip" / "fer2013.zip", {"fer2013.csv": table}).parent,
        pack(tmp_path / "any" / "archive (2).zip", {"fer2013/fer2013.csv": table, "fer2013/README": "x"}).parent,
        pack(tmp_path / "csv.zip" / "fer2013.csv.zip", {"fer2013.csv": table}).parent,
        tar(
            tmp_path / "icml.tar" / "fer2013.tar.gz", {"fer2013/fer2013.csv": table, "fer2013/fer2013.bib": "x"}
        ).parent,
        tar(tmp_path / "tar" / "fer2013.tar", {"fer2013.csv": table}, "w"),
    ]
    for source in sources:
        found = read("face_emotion", source)
        assert sorted(map(bytes, found.inputs)) == sorted(map(bytes, faces.inputs)), source
        by_pixels = {bytes(x): (faces.labels[i], faces.part[i]) for i, x in enumerate(faces.inputs)}
        assert all(by_pixels[bytes(x)] == (found.labels[i], found.part[i]) for i, x in enumerate(found.inputs))
        assert found.classes == FACES and found.parts == ("train", "test") and not found.rejects
        assert found.ids[0].lower() in ("fer2013.csv:14", "icml_face_data.csv:14")


def test_rows_of_pixels_that_are_none_are_listed(tmp_path):
    table = pixels(fer(names=FACES) | fer(names=("happy", "sad"), parts=("train", "test")))
    good = table.splitlines()[1]
    emotion, numbers, usage = good.split(",")
    bad = {
        f"{emotion},300 {numbers[2:]},{usage}": "expected 2,304 numbers from 0 to 255, found others",
        f"{emotion},{numbers} 0,{usage}": "expected 2,304 numbers from 0 to 255, found 2305",
        f"7,{numbers},{usage}": "expected an emotion from 0 to 6, found '7'",
        f"{emotion},{numbers},Test": "expected Training, PublicTest or PrivateTest, found 'Test'",
        f"{emotion},{numbers}": "expected 3 fields, found 2",
        "0,1 2 3,Trai": "expected Training, PublicTest or PrivateTest, found 'Trai'",
    }
    rows = 3 * table.splitlines()[1:]
    found = read("face_emotion", write(tmp_path, {"fer2013.csv": "\n".join([table.splitlines()[0], *rows, *bad])}))
    assert len(found.labels) == len(rows)
    assert {r["row"]: r["reason"] for r in found.rejects} == dict(enumerate(bad.values(), len(rows) + 2))


def test_a_table_of_pixels_beside_faces_of_another_origin(tmp_path):
    write(tmp_path, {"fer2013.csv": pixels(fer())})
    pack(tmp_path / "fer2013_equalized_drift.zip", fer(names=FACES[:2], parts=("test",)))
    faces = read("face_emotion", tmp_path)
    assert faces.parts == ("train", "test", "ood-equalized") and np.bincount(faces.part).tolist() == [12, 12, 8]


def test_a_set_that_holds_itself_is_counted_in_the_notes(tmp_path):
    both = {f"images/{n}": c for n, c in fer().items()} | {f"images/images/{n}": c for n, c in fer().items()}
    faces = read("face_emotion", write(tmp_path / "plain", fer()))
    for source in (write(tmp_path / "folder", both), pack(tmp_path / "z" / "archive.zip", both)):
        found = read("face_emotion", source)
        assert found.notes == {"files of the same set again": 24}
        assert same(dataclasses.replace(found, notes={}), faces)


def test_stanford_dogs_as_published(tmp_path):
    breeds = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")
    photos = {f"{c}/{c[:9]}_{i}.jpg": picture(i, 60, grey=False) for c in breeds for i in range(3)}
    notes = {f"{c}/{c[:9]}_{i}": b"<annotation>" for c in breeds for i in range(3)}
    kaggle = {f"images/Images/{n}": c for n, c in photos.items()}
    kaggle |= {f"annotations/Annotation/{n}": c for n, c in notes.items()}
    official = tmp_path / "official"
    tar(official / "images.tar", {f"Images/{n}": c for n, c in photos.items()}, "w")
    tar(official / "annotation.tar", {f"Annotation/{n}": c for n, c in notes.items()}, "w")
    for source in (official, write(tmp_path / "kaggle", kaggle), pack(tmp_path / "a.zip", kaggle)):
        found = read("dog_breeds", source)
        assert found.classes == breeds and len(found.labels) == 6 and not found.rejects
        assert found.notes == ({} if source == official else {"other files": 6})


def test_folders_of_one_class_in_two_spellings(tmp_path):
    files = dogs(("train",)) | {f"Valid/{c.upper()}/1.jpg": picture(9, 224, grey=False) for c in DOGS}
    del files["dogs.csv"]
    found = read("dog_breeds", write(tmp_path, files))
    assert found.classes == DOGS and found.parts == ("train", "test") and found.labels[-2:].tolist() == [0, 1]


def test_other_folders_beside_a_set_are_not_taken_for_one(tmp_path):
    """A folder of many things is not looked through for whatever images are in it."""
    write(tmp_path / "dogs", dogs(("train", "valid")))
    write(tmp_path / "news", {"Fake.csv": "x"})
    with pytest.raises(SourceError, match="has neither fer2013.zip"):
        find("face_emotion", source=tmp_path, places=())


# ---- dogs


def dogs(parts):
    """Files in the layout of 70 Dog Breeds, with its table."""
    files = {f"{p}/{c}/{i:03}.jpg": picture(i, 224, grey=False) for p in parts for c in DOGS for i in range(2)}
    rows = [f"{name},{name.split('/')[1]},{name.split('/')[0]}" for name in files]
    return {**files, "dogs.csv": "\n".join(["filepaths,labels,data set", *rows, ""])}


def test_dogs_in_class_folders(tmp_path):
    found = read("dog_breeds", write(tmp_path / "valid", dogs(("train", "valid"))))
    assert found.inputs.shape == (8, 256, 256, 3) and found.classes == DOGS and not found.rejects
    assert found.parts == ("train", "test") and np.bincount(found.part).tolist() == [4, 4] and not found.notes
    three = read("dog_breeds", pack(tmp_path / "dog-breeds-20.zip", dogs(("train", "valid", "test"))))
    assert np.bincount(three.part).tolist() == [8, 4] and three.notes == {"valid used for training": 4}
    assert [i.partition("/")[0] for i in three.ids] == ["train"] * 4 + ["valid"] * 4 + ["test"] * 4


@pytest.mark.parametrize("folder", ["images", "train"])
def test_dogs_with_a_table_of_labels(tmp_path, folder):
    files = {f"{folder}/{i:02}.jpg": picture(i, 30, grey=False) for i in range(24)}
    rows = "".join(f"{i:02},{DOGS[i % 2]}\n" for i in range(24)) + "99,Pug\n"
    files |= {"labels.csv": f"id,breed\n{rows}", "test/77.jpg": picture(7), "sample_submission.csv": "id"}
    for source in (write(tmp_path / "folder", files), pack(tmp_path / "dog-breed-identification.zip", files)):
        found = read("dog_breeds", source)
        assert found.labels.tolist() == [0, 1] * 12 and found.classes == DOGS and found.parts == ("train",)
        assert found.rejects == (
            {"file": "labels.csv", "row": 26, "reason": "expected an image and its breed, found no image '99'"},
        )
        assert found.notes == {"other files": 2}


def test_wild_canids_are_of_no_class(tmp_path):
    pack(tmp_path / "dog-breeds-20.zip", dogs(("train", "valid")))
    wild = {"dogs.csv": "filepaths,labels\ntest/Dingo/1.jpg,Dingo\n", "test/Dingo/1.jpg": picture(1, grey=False)}
    pack(tmp_path / "wild-canids-ood.zip", wild)
    found = read("dog_breeds", tmp_path)
    assert found.parts == ("train", "test", "ood-wild") and found.labels[-1] == -1 and found.classes == DOGS


def test_tables_of_dogs_that_do_not_fit(tmp_path):
    files = dogs(("train", "valid"))
    files |= {f"train/{c}/{i}.jpg": picture(i) for c in DOGS for i in range(30)}
    files["dogs.csv"] = "filepaths,labels\ntrain/Basset/000.jpg,Beagle\ntrain/Pug/1.jpg,Pug\n"
    found = read("dog_breeds", write(tmp_path / "disagree", files))
    assert {(r["row"], r["reason"].rpartition("found ")[2]) for r in found.rejects} == {
        (2, "'Beagle'"),
        (3, "no 'train/Pug/1.jpg'"),
    }
    assert "train/Basset/000.jpg" not in found.ids and len(found.ids) == 67
    twice = {"images/1.jpg": picture(1), "labels.csv": "id,breed\n1,Pug\n1,Pug\n"}
    assert "labels.csv: expected each id once, found '1' in rows 2 and 3" in refused(
        "dog_breeds", write(tmp_path / "twice", twice)
    )
    for name, content in (("labels.csv", "id,race\n1,Pug\n"), ("labels.csv", "id,breed,id\n1,Pug,1\n")):
        told = refused("dog_breeds", write(tmp_path / "columns", {"images/1.jpg": picture(1), name: content}))
        assert "columns" in told and "labels.csv: expected the columns id, breed once each" in told
    none = {"images/1.jpg": picture(1), "labels.csv": "id,breed\n../../etc/passwd,Pug\n"}
    assert "row 2: expected an image and its breed" in refused("dog_breeds", write(tmp_path / "none", none))


# ---- news

FAKE = "title,text,subject,date\r\n" + "".join(f' Fake {i},"It is, so {i} (they say) ",News,1\r\n' for i in range(30))
TRUE = "title,text,subject,date\r\n" + "".join(f'True {i},"ROME (Reuters) - It, was {i}",pol,1\r\n' for i in range(30))
OTHER = (
    "dataset,file,title,text,label\nCelebrity,a,Star,tells all,fake\nFakeNewsNet-BuzzFeed,b,,no title,real\n"
    "Horne2017-Random,c,Ha,funny,satire\n"
)


@pytest.mark.parametrize("end", ["", ".gz", ".zip"])
def test_isot_in_every_wrapping(tmp_path, end):
    for name, text in (("Fake.csv", FAKE), ("True.csv", TRUE), ("ood_articles.csv", OTHER)):
        path = tmp_path / f"{name}{end}"
        if end == ".zip":
            pack(path, {name: text})
        else:
            path.write_bytes(gzip.compress(text.encode()) if end else text.encode())
    news = read("fake_news", tmp_path)
    assert news.inputs.fields == ("title", "text") and news.classes == ("fake", "real")
    assert news.parts == ("train", "ood-celebrity", "ood-fakenewsnet-buzzfeed", "ood-satire")
    assert np.bincount(news.part).tolist() == [60, 1, 1, 1] and news.labels.tolist() == [0] * 30 + [1] * 30 + [0, 1, -1]
    assert news.inputs[0] == {"title": "Fake 0", "text": "It is, so 0 (they say)"}
    assert news.inputs[30] == {"title": "True 0", "text": "It, was 0"}
    assert (news.ids[0], news.ids[30], news.ids[-1]) == ("Fake.csv:2", "True.csv:2", "ood_articles.csv:4")
    assert news.notes == {"datelines removed": 30, "outer spaces removed": 60} and not news.rejects
    everything = pack(
        tmp_path / "all" / "archive.zip", {"x/Fake.csv": FAKE, "x/True.csv": TRUE, "ood_articles.csv": OTHER}
    )
    assert same(news, read("fake_news", everything)) and same(news, read("fake_news", everything.parent))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("WASHINGTON (Reuters) - The head", "The head"),
        ("WASHINGTON/PALM BEACH, Fla. (Reuters) – The head", "The head"),
        ("(Reuters) - The head", "The head"),
        (" (Corrects name (of X) in paragraph 2) By A Bee and C Dee NEW YORK (Reuters) - The head", "The head"),
        ("((This Dec. 4 story was corrected)) By Marc Frank HAVANA (Reuters) - The head", "The head"),
        ("WASHINGTON (Reuters on Friday ) - The head", "The head"),
        ("WASHINGTON () - The head", "The head"),
        ("NEW YORK (AP) — The head", "The head"),
        (
            "The following statements were posted to the verified Twitter accounts of U.S. President Donald Trump, "
            "@realDonaldTrump and @POTUS.  The opinions expressed are his own. Reuters has not edited the statements "
            "or confirmed their accuracy.  @realDonaldTrump : - While",
            "@realDonaldTrump : - While",
        ),
        ("The end (Reuters). And more", "The end. And more"),
        ("He (that is, I) - and she - went", "He (that is, I) - and she - went"),
        ("A B C D (E) F - G", "A B C D (E) F - G"),
        ("Reuters reported - so they say", "Reuters reported - so they say"),
    ],
)
def test_datelines(tmp_path, text, left):
    rows = f'title,text\nA,"{text}"\nB,b\n'
    news = read("fake_news", write(tmp_path, {"Fake.csv": rows, "True.csv": TRUE}))
    assert news.inputs[0]["text"] == left


def test_no_column_but_title_and_text_is_read(tmp_path):
    write(tmp_path / "a", {"Fake.csv": FAKE, "True.csv": TRUE})
    write(tmp_path / "b", {"Fake.csv": FAKE.replace("News,1", "x,2"), "True.csv": TRUE.replace("pol,1", ",")})
    assert same(read("fake_news", tmp_path / "a"), read("fake_news", tmp_path / "b"))


def test_empty_articles_are_listed_and_broken_tables_are_refused(tmp_path):
    news = read("fake_news", write(tmp_path, {"Fake.csv": FAKE + 'only a title," ",News,1\r\n', "True.csv": TRUE}))
    assert news.rejects == ({"file": "Fake.csv", "row": 32, "reason": "an empty text"},) and len(news.labels) == 60
    for text, said in (
        (FAKE + "a,,,\n" * 9, "expected at least 90% of 69 rows to be usable, found 9"),
        (FAKE.replace("text", "body", 1), "'text' not"),
        (FAKE.replace("title", "text", 1), "'title' not"),
        (FAKE.encode() + b"\xff,a,b,c\n" * 9, "found the byte ff"),
        (FAKE + "a,b\0,c,d\n" * 9, "Fake.csv row 32: expected UTF-8 text, found a NUL byte"),
        (FAKE.replace("\r\n", "\n") + 'x,"open,a,b\n' + "e,f,g,h\n" * 9, "found none up to the end, line 41"),
        (FAKE.splitlines(keepends=True)[0], "found fake 0"),
        ("".join(FAKE.splitlines(keepends=True)[:2]), "found fake 1"),
    ):
        write(tmp_path, {"Fake.csv": text})
        assert said in refused("fake_news", tmp_path), said
    (tmp_path / "Fake.csv.gz").write_bytes(gzip.compress(FAKE.encode())[:-10])
    assert "Fake.csv.gz: expected a whole gzip file" in refused("fake_news", tmp_path)
    (tmp_path / "Fake.csv.gz").unlink()
    (tmp_path / "Fake.csv").unlink()
    assert "found no Fake.csv. Add what is missing" in refused("fake_news", tmp_path)


def test_articles_of_another_origin_are_checked(tmp_path):
    for text, said in (
        (OTHER.replace("satire", "joke"), "expected a label fake, real or satire, found 'joke' in row 4"),
        (OTHER.replace("Celebrity", "../x"), "expected a short name of a collection, found '../x' in row 2"),
        (OTHER.replace("dataset", "set"), "'dataset' not"),
    ):
        write(tmp_path, {"Fake.csv": FAKE, "True.csv": TRUE, "ood_articles.csv": text})
        assert said in refused("fake_news", tmp_path)


def test_titles_count_in_two_senses(tmp_path):
    welfake = ",title,text,label\n" + "".join(f"{i},T {i},x,{i % 2}\n" for i in range(40)) + "40,,x,1\n"
    isot = "text,label\n" + "".join(f"T {i},{1 - i % 2}\n" for i in range(40))
    a = read("fake_titles", write(tmp_path / "fake_titles", {"WELFake_Dataset.csv": welfake}))
    b = read("fake_titles", write(tmp_path / "b", {"real_and_fake_news.csv.gz": gzip.compress(isot.encode())}))
    assert a.labels.tolist() == b.labels.tolist() == [1, 0] * 20 and (a.inputs.blob == b.inputs.blob).all()
    assert a.rejects == ({"file": "titles.csv", "row": 42, "reason": "an empty text"},) and not b.rejects
    assert a.inputs.fields == ("title",) and a.parts == ("train",)
    write(tmp_path / "fake_news", {"ood_articles.csv": OTHER + "Celebrity,x,Other,y,real\n" * 9})
    c = read("fake_titles", tmp_path)
    assert (
        c.parts == ("train", "ood-celebrity", "ood-satire")
        and len(c.rejects) == 2
        and c.ids[40] == "ood_articles.csv:2"
    )
    for text, said in (
        (welfake + "41,T,x,2\n", "expected a label 0 or 1, found '2' in row 43"),
        (welfake + "41,T,x,real\n", "found 'real' in row 43"),
        ("headline,label\nA,1\n", "'text' not"),
        ('title,label\nA,"1', "not: titles.csv row 2: expected a quote at the end of a text, found the end"),
    ):
        assert said in refused("fake_titles", write(tmp_path / "bad", {"WELFake_Dataset.csv": text}))
    packed = pack(tmp_path / "archive.zip", {"WELFake_Dataset.csv": welfake, "readme.txt": "hello"})
    assert same(a, read("fake_titles", packed))
    assert same(c, read("fake_titles", tmp_path / "fake_titles" / "WELFake_Dataset.csv"))  # finds what lies beside it


# ---- which file is meant


def test_other_tasks_folders_are_not_taken_for_this_ones(tmp_path):
    write(tmp_path / "face_emotion", fer())
    pack(tmp_path / "anything.zip", dogs(("train", "valid")))
    with pytest.raises(SourceError, match="has neither dog-breeds-20.zip or class folders of images nor a folder"):
        find("dog_breeds", source=tmp_path, places=())


def test_two_archives_are_one_too_many_and_a_file_may_be_named(tmp_path):
    pack(tmp_path / "a.zip", dogs(("train", "valid")))
    pack(tmp_path / "b.zip", dogs(("train", "valid")))
    with pytest.raises(SourceError, match=r"expected one archive, found a.zip, b.zip. Name the one"):
        find("dog_breeds", source=tmp_path, places=())
    assert find("dog_breeds", source=tmp_path / "b.zip").files == {"images": tmp_path / "b.zip"}
    with pytest.raises(
        SourceError, match="expected a folder or an archive with Fake.csv, True.csv, found no Fake.csv, True.csv"
    ):
        find("fake_news", source=tmp_path / "a.zip")


def test_a_changed_source_has_another_identity(tmp_path):
    write(tmp_path / "a", fer())
    write(tmp_path / "b", fer())
    first = find("face_emotion", source=tmp_path / "a")
    assert first.sha256 == find("face_emotion", source=tmp_path / "b").sha256 and not first.published
    path = tmp_path / "b" / "train" / "happy" / "train_0.jpg"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert first.sha256 != find("face_emotion", source=tmp_path / "b").sha256
    path.rename(path.with_name("other.jpg"))
    write(tmp_path / "a", {"test/happy/.DS_Store": b"x"})
    assert first.sha256 == find("face_emotion", source=tmp_path / "a").sha256


def test_hashing_a_folder_is_quick(tmp_path):
    block = np.random.default_rng(0).bytes(4_000_000)
    write(tmp_path / "set" / "train", {f"{c}/{i}.jpg": block for c in "ab" for i in range(10)})
    started = time.monotonic()
    find("face_emotion", source=tmp_path / "set")
    assert time.monotonic() - started < 4  # 80 MB, on a busy machine too


# ---- the real files

REAL = {
    "face_emotion": ((48, 48), 7, {"train": 15363, "test": 2331, "ood-equalized": 640}),
    "dog_breeds": ((256, 256, 3), 20, {"train": 1800, "test": 199, "ood-wild": 100}),
    "fake_news": (("title", "text"), 2, {"train": 2036, "ood-celebrity": 400, "ood-satire": 60}),
    "fake_titles": (("title",), 2, {"train": 34550, "ood-celebrity": 399, "ood-satire": 60}),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", REAL)
def test_real_files(task, pytestconfig):
    """The numbers are those of the copies that `published` knows; other files are read and checked for less."""
    before = pytestconfig.environment_before
    folder = before.get("PROJECT_REAL_DATA") or before.get("PROJECT_SOURCE")
    if not folder:
        pytest.skip("set PROJECT_SOURCE or PROJECT_REAL_DATA to a folder with real files to test with them")
    try:
        source = find(task, source=folder, places=())
    except SourceError as e:
        pytest.skip(f"no real files of {task}: {str(e).splitlines()[0]}")
    examples = get_task(task).read(source)
    shape, classes, rows = REAL[task]
    texts = isinstance(examples.inputs, Texts)
    assert (examples.inputs.fields if texts else examples.inputs.shape[1:]) == shape
    assert len(examples.inputs) == len(examples.labels) == len(examples.part) == len(examples.ids)
    assert len(set(examples.ids)) == len(examples.ids)
    counts = dict(zip(examples.parts, np.bincount(examples.part).tolist(), strict=True))
    if len(source.copies) == len(source.files):
        assert len(examples.classes) == classes and rows.items() <= counts.items()
    if texts:
        assert not any("(Reuters)" in text for text in examples.inputs.joined())
        assert all(text == text.strip() for text in examples.inputs.column("title"))


def test_every_task_has_published_files_and_says_what_it_is():
    for name in task_names():
        task, files = get_task(name), published(name)
        assert task.name == files.task == name and task.title and task.licence and files.needed
        assert task.near == (name != "fashion_mnist") and dataclasses.is_dataclass(task)
        assert Path(name).name == name
