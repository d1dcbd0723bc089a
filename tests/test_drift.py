"""Drift: tests beside scipy's, the reference of a bundle, reports, and the command on a real service's log."""

import io
import json
import math
import shutil
import tracemalloc
import warnings

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from scipy import stats
from serve_process import Server, image_bundle, text_bundle
from shapes import CLASSES, Shapes, shapes, shapes_bundle

from project.bundle import reference as reference_module
from project.bundle.manifest import BundleError, open_bundle, write_manifest
from project.bundle.reference import FILE, Rows, look_at, make_reference, moved, open_reference, support
from project.cli import app
from project.monitor import drift as drift_module
from project.monitor.drift import Window, drift, read_parquet, report_on, to_html
from project.monitor.tests import (
    _LONG,
    benjamini_hochberg,
    chi2_counts,
    families,
    holm,
    ks_columns,
    mmd,
)

# Tests, value for value


def _samples(kind, n, rng):
    made = {
        "bytes": lambda: rng.integers(0, 256, n) / 255,
        "means of bytes": lambda: rng.integers(0, 255 * 784, n) / 255 / 784,
        "rounded": lambda: rng.normal(0.3, 0.1, n).round(4),
        "continuous": lambda: rng.normal(size=n),
        "far": lambda: rng.standard_cauchy(n) * 10.0 ** rng.integers(-250, 250, n),
        "one outlier": lambda: np.append(rng.random(n - 1), 1e300),
        "infinite": lambda: np.append(rng.random(n - 2), [np.inf, -np.inf]),
        "tiny": lambda: rng.choice([0.0, -0.0, 5e-324, -5e-324, 1e-310], n),
        "two values": lambda: rng.integers(0, 2, n).astype(float),
        "huge": lambda: rng.normal(size=n).clip(-1.7, 1.7) * 1e308,
        "whole": lambda: rng.integers(-(2**40), 2**40, n).astype(float),
    }
    return made[kind]()


KINDS = [
    "bytes",
    "means of bytes",
    "rounded",
    "continuous",
    "far",
    "one outlier",
    "infinite",
    "tiny",
    "two values",
    "huge",
    "whole",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 1), (1, 40), (50, 5000), (333, 77), (_LONG, 7001)])
def test_the_ks_distance_is_scipys(kind, sizes):
    rng = np.random.default_rng(sum(sizes))
    x, y = (_samples(kind, max(n, 3), rng)[-n:] for n in sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = stats.ks_2samp(x, y, method="asymp")
    (found,) = ks_columns(x, y)
    assert abs(found.statistic - expected.statistic) <= 1e-12
    if not math.isnan(expected.pvalue):  # with one value each scipy has none
        assert math.isclose(found.p, expected.pvalue, rel_tol=0.005, abs_tol=1e-12)
    assert 0 <= found.p <= 1


def test_long_columns_are_like_short_ones():
    """Rows by the ten thousand go another way; with a shift inside one bin, and in any order."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60_000, 5)), rng.normal(size=(70_000, 5))
    y[:, 1] += 0.01
    x[:, 2], y[:, 2] = rng.integers(0, 9, 60_000), rng.integers(0, 9, 70_000)
    x[0, 3] = 1e12  # all others share a bin
    x[:3, 4] = np.nan
    for a, b in ((x, y), (np.asfortranarray(x), y[::-1])):
        for i, found in enumerate(ks_columns(a, b)):
            expected = stats.ks_2samp(a[~np.isnan(a[:, i]), i], b[:, i], method="asymp").statistic
            assert abs(found.statistic - expected) <= 1e-12
    assert found.rows == 59_997 and found.note == "3 without a number"


def test_long_columns_take_little_memory():
    rng = np.random.default_rng(0)
    x, y = rng.random((100_000, 20)), rng.random((100_000, 20))
    ks_columns(x[:10], y[:10])
    tracemalloc.start()
    ks_columns(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes + y.nbytes


@pytest.mark.parametrize(
    ("x", "y", "note"),
    [
        ([], [1.0, 2], "no values in the window"),
        ([1.0], [], "no values in the reference"),
        ([math.nan] * 3, [1.0], "no values in the window"),
        ([1.0, math.nan], [1.0, 2], "1 without a number"),
        ([5.0] * 60, [5.0] * 900, ""),
    ],
)
def test_what_cannot_be_tested_is_no_alarm(x, y, note):
    (found,) = ks_columns(np.array(x), np.array(y))
    assert found.note == note and (found.p == 1 or note.startswith("1 without"))


def test_columns_that_do_not_fit_are_refused():
    for x, y, names in ((np.zeros((3, 2)), np.zeros((3, 3)), None), (np.zeros(3), np.zeros(3), ["a", "b"])):
        with pytest.raises(ValueError, match="expected"):
            ks_columns(x, y, names)
    with pytest.raises(ValueError, match="as many columns"):
        mmd(np.zeros((3, 2)), np.zeros((3, 3)))


def test_chi_square_is_scipys_where_nothing_is_rare():
    rng = np.random.default_rng(0)
    for k in (2, 5, 20):
        for _ in range(20):
            a, b = rng.multinomial(400, np.full(k, 1 / k)), rng.multinomial(4000, np.full(k, 1 / k))
            expected = stats.chi2_contingency(np.stack([a, b]), correction=False)
            found = chi2_counts(a, b)
            assert math.isclose(found.statistic, expected.statistic, rel_tol=1e-9)
            assert math.isclose(found.p, expected.pvalue, rel_tol=1e-9)


def test_classes_nobody_saw_and_rare_ones():
    """Columns of zeros change nothing, rare classes are one, and what is new counts."""
    assert chi2_counts([30, 0, 20], [300, 0, 200]).p == chi2_counts([30, 20], [300, 200]).p
    rare = chi2_counts([40, 1, 2, 1, 2], [400, 10, 20, 10, 20])
    assert rare.p > 0.9 and rare.statistic < 0.1
    new = chi2_counts([40, 30], [400, 0], classes=["a", "b"])
    assert new.p < 1e-20 and new.note.startswith("not in the reference: b")
    assert chi2_counts([3, 0], [400, 0]).p == 1 == chi2_counts([0, 0], [0, 0]).p
    with pytest.raises(ValueError, match="counts"):
        chi2_counts([1], [1, 2])


def test_twenty_classes_raise_no_false_alarms():
    """With the reference's shares taken for the truth, seven of ten such windows are called drifted."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(20, 3))
    p = [chi2_counts(rng.multinomial(1000, share), rng.multinomial(1000, share)).p for _ in range(400)]
    assert 0.02 < np.mean(np.array(p) <= 0.05) < 0.08


def test_corrections_are_what_they_are_defined_as():
    rng = np.random.default_rng(0)
    for k in (1, 2, 7, 30):
        p = rng.random(k) ** 2
        assert np.allclose(benjamini_hochberg(p), stats.false_discovery_control(p))
        order = np.sort(p)
        rejected = next((i for i, v in enumerate(order) if v > 0.05 / (k - i)), k)
        assert (holm(p) <= 0.05).sum() == rejected and (holm(p) >= p).all()
    for wrong in ([1.2], [-0.1], [math.nan]):
        with pytest.raises(ValueError, match="p-values"):
            holm(wrong)
    assert families({}) == []


def test_the_multivariate_test_keeps_its_level_and_sees_correlation():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(600, 3))
    p = [mmd(rng.normal(size=(60, 3)), rng.normal(size=(600, 3)), permutations=99, seed=i).p for i in range(150)]
    assert np.mean(np.array(p) <= 0.05) < 0.1
    together = rng.normal(size=(200, 1)) + rng.normal(size=(200, 3)) * 0.6
    together /= together.std(0)
    assert mmd(together, reference).p < 0.01
    constant = np.ones((50, 2))
    assert mmd(constant, constant).p == 1
    hole = together.copy()
    hole[:5, 0] = np.nan
    assert mmd(hole, reference).rows == 195


# The reference


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A bundle with a reference, and the reference."""
    bundle = shapes_bundle(tmp_path_factory.mktemp("known") / "bundle", metrics={"test/acc": 0.9})
    bundle = make_reference(bundle, Shapes())
    return bundle, open_reference(bundle)


def test_a_reference_is_small_listed_and_of_validation_rows(known):
    bundle, reference = known
    entry = bundle.manifest["files"][FILE]
    assert entry["bytes"] < 400_000 and open_bundle(bundle.path).hash == bundle.hash
    images, labels = Shapes().split("val")
    rows = look_at(bundle, images)
    assert sorted(reference.features[:, 0]) == sorted(rows.features[:, 0].astype(np.float32))
    assert np.bincount(reference.labels).tolist() == np.bincount(labels).tolist()
    assert 15 <= len(reference.names) <= 20 and "moved by 3 px" in reference.names
    assert not set(bundle.manifest["files"]) & {"notebook.ipynb"} and bundle.manifest["metrics"] == {"test/acc": 0.9}


def test_directions_are_not_fitted_on_the_reference(known):
    """Fitted on the reference they would show drift in rows of the same kind; the spread of both is alike."""
    bundle, reference = known
    images, _ = shapes(2000, 50)
    projected = reference.project(look_at(bundle, images).embedding)
    p = [t.p for t in ks_columns(projected, reference.projected)]
    assert benjamini_hochberg(p).min() > 0.01


def test_support_marks_what_it_says(known):
    bundle, reference = known
    images, _ = shapes(2000, 51)
    p = support(reference, reference.project(look_at(bundle, images).embedding))
    assert 0.03 < (p <= 0.05).mean() < 0.075 and p.min() > 0 and p.max() <= 1
    odd = np.full((3, len(reference.center)), np.nan, np.float16)
    assert (support(reference, reference.project(odd)) < 0.01).all()
    assert len(support(reference, reference.project(odd[:0]))) == 0


def test_a_text_bundle_has_a_reference_too(tmp_path):
    """Of two fields, with corruptions of texts; the shares of unknown words are those that the service logs."""
    from project.data.readers import Texts
    from project.serve.predictor import Predictor

    bundle = text_bundle(tmp_path / "b")
    rng = np.random.default_rng(0)
    words = ["good", "bad", "Minister", "said,", "on", "Monday"]
    rows = [[" ".join(rng.choice(words, 3)), " ".join(rng.choice(words, 12))] for _ in range(400)]
    labels = np.array([int(" ".join(r).count("good") >= " ".join(r).count("bad")) for r in rows])

    class Data:
        task, hash, classes = "news", "0" * 64, ["fake", "real"]

        def split(self, name):
            part = slice(0, 100) if name == "train" else slice(100, 400)
            return Texts.from_rows(rows[part], ("title", "text")), labels[part]

    found = make_reference(bundle, Data())
    reference = open_reference(found)
    assert len(reference) == 300 and "another language" in reference.names and "first field alone" in reference.names
    predictor = Predictor(found)
    given = {"title": rows[5][0], "text": rows[5][1]}
    seen = look_at(found, [given, {"title": "", "text": "zzz"}])
    assert seen.features[0, -1] == round(predictor.unknown_share(predictor.read_text(given)), 4)
    assert seen.features[1, -1] == 1


@pytest.mark.parametrize("what", ["none", "other model", "damaged", "pickle", "shape", "format", "bomb"])
def test_a_reference_that_is_not_one_is_refused(known, tmp_path, monkeypatch, what):
    bundle, _ = known
    folder = tmp_path / "b"
    shutil.copytree(bundle.path, folder)
    file = folder / FILE
    with np.load(file) as z:
        arrays = {name: z[name] for name in z.files}
    meta = json.loads(arrays["meta"].tobytes())
    if what == "none":
        file.unlink()
    elif what == "damaged":
        file.write_bytes(file.read_bytes()[:5000])
    elif what == "pickle":
        arrays["labels"] = np.array([{"a": 1}], object)
    elif what == "shape":
        arrays["projected"] = arrays["projected"][:-1]
    elif what == "other model":
        meta["model"] = "0" * 64
    elif what == "format":
        meta["format"] = 2
    elif what == "bomb":
        arrays["center"] = np.zeros(20_000_000, np.float32)
    if what in ("pickle", "shape", "other model", "format", "bomb"):
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez_compressed(file, **arrays)
    changed = write_manifest(folder, **bundle.manifest)
    with pytest.raises(BundleError, match="project models reference|Make it anew|Update the package"):
        open_reference(changed)


def test_the_data_of_another_task_is_refused(known):
    class Other(Shapes):
        classes = ["a", "b"]

    with pytest.raises(BundleError, match="project data build"):
        make_reference(known[0], Other())


def test_a_bundle_whose_reference_could_not_be_made_is_as_it_was(tmp_path, monkeypatch):
    bundle = shapes_bundle(tmp_path / "b")
    before = bundle.hash

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(reference_module, "write_manifest", fail)
    with pytest.raises(OSError, match="no space"):
        make_reference(bundle, Shapes())
    assert open_bundle(tmp_path / "b").hash == before and [p.name for p in tmp_path.iterdir()] == ["b"]


# Reports


def _window(bundle, images, **more):
    rows = look_at(bundle, images)
    n = len(rows)
    fields = {
        "times": tuple(f"2026-11-01T00:{i // 60 % 60:02}:{i % 60:02}" for i in range(n)),
        "clients": ("",) * n,
        "inputs": tuple(f"{i}" for i in range(n)),
        "labels": np.full(n, -2),
        "labellers": ("",) * n,
        "left_out": {},
    }
    return Window(rows, **(fields | more))


def _report(known, images, **more):
    bundle, reference = known
    return report_on(_window(bundle, images, **more), reference, CLASSES, "shapes", bundle.hash[:8], 0.91)


@pytest.mark.parametrize("n", [50, 500])
def test_windows_without_a_shift_raise_few_alarms(known, n):
    """At most five of a hundred reports; twenty windows here, the count itself is in the benchmark."""
    bundle, reference = known
    rows = look_at(bundle, shapes(4000, 60)[0])
    rng = np.random.default_rng(n)
    alarms = 0
    for _ in range(20):
        some = rows.take(rng.choice(4000, n, replace=False))
        tested = drift_module.compare(some, reference.project(some.embedding), reference, CLASSES)
        alarms += any(f.adjusted <= 0.05 for f in tested)
    assert alarms <= 4


def test_a_move_is_found_named_and_measured(known):
    images, labels = shapes(200, 61)
    for way in ((3, 0), (0, -3)):
        spoilt = moved(images, *way)
        report = _report(known, spoilt)
        truth = float((look_at(known[0], spoilt).probabilities.argmax(1) == labels).mean())
        assert report.verdict == "changed, harmful" and report.status == 3
        assert report.like[0].name == "moved by 3 px" and report.accuracy.low <= truth <= report.accuracy.high
        assert any("project models rollback shapes" in line for line in report.todo)
    calm = _report(known, images)
    assert calm.verdict == "unchanged" and calm.status == 0 and not calm.like


def test_less_light_is_no_harm(known):
    images, _ = shapes(500, 62)
    report = _report(known, (images * 0.93).astype(np.uint8))
    assert report.verdict == "changed, harmless" and "inputs" in {f.name for f in report.families if f.adjusted <= 0.05}


def test_few_rows_and_none_have_no_verdict(known):
    images, _ = shapes(60, 63)
    for n in (0, 1, 49):
        report = (
            _report(known, images[:n])
            if n
            else report_on(drift_module.read_window([], known[1], CLASSES), known[1], CLASSES, "shapes")
        )
        assert report.verdict == "too few rows" and report.status == 5 and not report.families
        json.dumps(report.to_json(), allow_nan=False)
        to_html(report)
    assert _report(known, images[:50]).verdict != "too few rows"


def test_broken_inputs_are_no_drift(known):
    images, _ = shapes(200, 64)
    images[:80] = 7
    report = _report(known, images)
    assert report.verdict == "broken input" and report.status == 4
    assert report.faults[0].what == "one colour all over" and report.faults[0].rows == 80


def test_features_that_are_no_numbers_stop_nothing(known):
    bundle, reference = known
    window = _window(bundle, shapes(200, 65)[0])
    features = window.rows.features.copy()
    features[:20, 1], features[30, 2], features[:, 3] = np.nan, np.inf, 0.5
    rows = Rows(features, window.rows.probabilities, window.rows.embedding)
    report = report_on(
        Window(rows, *[getattr(window, n) for n in list(Window.__dataclass_fields__)[1:]]), reference, CLASSES
    )
    assert report.faults[0].rows == 21 and "entropy" in {f.name: f.columns for f in report.families}["inputs"]
    json.dumps(report.to_json(), allow_nan=False)


def test_feedback_shows_what_no_estimate_sees(known):
    """Inputs are as before, and the labels are not: a change of meaning."""
    images, labels = shapes(300, 66)
    given = np.full(300, -2)
    given[:120] = np.where(np.arange(120) % 3 == 0, -1, labels[:120])
    report = _report(known, images, labels=given, labellers=("anna",) * 200 + ("",) * 100)
    assert report.verdict == "changed, harmful" and report.accuracy.labelled == 120
    assert report.accuracy.labellers == {"anna": 120} and report.accuracy.interval[1] < 0.8
    assert all(f.adjusted > 0.05 for f in report.families)


def test_retries_and_a_loud_client_do_not_count_twice(known):
    """One client that sends moved images again and again is told of, and is no more than half of what counts."""
    calm, spoilt = shapes(150, 67)[0], moved(shapes(20, 68)[0], 3, 0)
    images = np.concatenate([calm, *[spoilt] * 30])
    clients = ("a",) * 75 + ("b",) * 75 + ("loud",) * 600
    inputs = (*map(str, range(150)), *[f"x{i % 20}" for i in range(600)])
    report = _report(known, images, clients=clients, inputs=inputs)
    assert report.left_out == {"retries": 580} and report.rows == 170
    new = moved(shapes(600, 69)[0], 3, 0)
    report = _report(known, np.concatenate([calm, new]), clients=clients, inputs=tuple(map(str, range(750))))
    assert report.rows == 300 and report.left_out == {"rows of loud clients": 450}
    assert report.segments[0].name in ("client loud", "the second half")
    assert "client loud" in {s.name for s in report.segments if s.p < 0.05}


def test_ten_thousand_rows_take_bounded_memory(known):
    bundle, reference = known
    rows = look_at(bundle, shapes(500, 70)[0])
    many = rows.take(np.tile(np.arange(500), 20))
    n = len(many)
    window = Window(many, ("",) * n, ("",) * n, tuple(map(str, range(n))), np.full(n, -2), ("",) * n, {})
    tracemalloc.start()
    report = report_on(window, reference, CLASSES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.rows == 10_000 and peak < 300e6


def test_a_page_holds_no_script_of_a_stranger(known):
    bundle, reference = known
    window = _window(bundle, moved(shapes(100, 71)[0], 3, 0), clients=("<script>alert(1)</script>",) * 60 + ("b",) * 40)
    page = to_html(report_on(window, reference, CLASSES, "<b>shapes</b>"))
    assert "<script" not in page and "<b>" not in page and "http" not in page and len(page.encode()) < 200_000


# The command


def _png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def _call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_a_service_is_sent_ordinary_and_moved_inputs_and_the_command_tells(known, tmp_path):
    """The whole way: a service, its log, `project drift`; and once more from an export."""
    bundle, _ = known
    log, where = tmp_path / "log.db", ("--bundle", bundle.path, "--log", tmp_path / "log.db")
    images, labels = shapes(400, 80)
    spoilt = moved(images[200:], 0, 3)
    truth = float((look_at(bundle, spoilt).probabilities.argmax(1) == labels[200:]).mean())
    with Server(tmp_path, bundles=[str(bundle.path)], log=str(log)) as server:

        def send(images):
            answers = [
                server.client.post("/predict/shapes", files={"file": ("a.png", _png(image), "image/png")})
                for image in images
            ]
            assert {a.status_code for a in answers} == {200}, answers[0].text
            ids = [a.json()["id"] for a in answers]
            server.wait_for(lambda: server.client.get(f"/predictions/{ids[-1]}").status_code == 200)

        few = _call("drift", "shapes", *where)
        assert few.exit_code in (1, 5), few.output
        send(images[:200])
        server.wait_for(lambda: "(200 rows" in _call("drift", "shapes", *where).output)
        calm = _call("drift", "shapes", *where)
        assert calm.exit_code == 0 and "unchanged" in calm.output, calm.output
        send(spoilt)
        server.wait_for(lambda: drift(bundle, log).rows == 400)
        told = _call("drift", "shapes", "--rows", 200, "--html", tmp_path / "drift.html", *where)
    assert told.exit_code == 3 and "changed, harmful" in told.output and "moved by 3 px" in told.output, told.output
    assert "at most" in told.output and "changed, harmful" in (tmp_path / "drift.html").read_text(encoding="utf-8")
    found = json.loads(_call("drift", "shapes", "--rows", 200, "--json", *where).output)
    assert found["like"][0]["name"] == "moved by 3 px" and found["verdict"] == "changed, harmful"
    assert found["accuracy"]["low"] <= truth <= found["accuracy"]["high"]
    assert _call("predictions", "export", tmp_path / "log.parquet", "--log", log).exit_code == 0
    assert len([*read_parquet(tmp_path / "log.parquet", "shapes")]) == 400
    again = _call(
        "drift", "shapes", "--rows", 200, "--bundle", bundle.path, "--log", tmp_path / "log.parquet", "--json"
    )
    assert again.exit_code == 3 and json.loads(again.output)["accuracy"] == found["accuracy"]


def test_the_command_says_what_is_missing(tmp_path, known):
    bundle, _ = known
    plain = image_bundle(tmp_path / "plain")
    for args, text in (
        (("drift", "brightness", "--bundle", plain.path), "project models reference"),
        (("drift", "news", "--bundle", plain.path), "expected a bundle of news"),
        (("drift", "shapes", "--bundle", bundle.path, "--log", tmp_path / "none.db"), "no prediction log"),
        (("drift", "shapes", "--bundle", bundle.path, "--log", tmp_path / "none.parquet"), "none.parquet"),
        (("drift", "shapes", "--bundle", bundle.path, "--since", "tomorrow"), "is no moment"),
        (("models", "reference", image_bundle(tmp_path / "f", task="fashion_mnist").path), "project data build"),
    ):
        done = _call(*args)
        assert done.exit_code == 1 and text in done.output, done.output
    (tmp_path / "odd.parquet").write_text("no table")
    done = _call("drift", "shapes", "--bundle", bundle.path, "--log", tmp_path / "odd.parquet")
    assert done.exit_code == 1 and "expected a Parquet file" in done.output


def test_a_log_of_another_version_is_told_apart(known, tmp_path):
    from project.serve.log import PredictionLog, new_id

    bundle, _ = known
    log = PredictionLog(tmp_path / "log.db")
    answer = dict.fromkeys(CLASSES, 0.1)
    for version in ["v1-00000000"] * 3 + [f"v2-{bundle.hash[:8]}"]:  # the last one is of a time before embeddings
        row = {"id": new_id(), "task": "shapes", "version": version, "predicted": CLASSES[0], "probabilities": answer}
        assert log.put(row)
    assert log.flush()
    log.close()
    done = _call("drift", "shapes", "--bundle", bundle.path, "--log", tmp_path / "log.db")
    assert (
        done.exit_code == 5 and "3 answered by v1-00000000" in done.output and "1 without an embedding" in done.output
    )


def test_the_command_makes_a_reference_where_the_data_is(tmp_path):
    """The committed sample has few validation rows: they are a reference, if a small one."""
    bundle = shapes_bundle(tmp_path / "bundle")
    manifest = bundle.manifest | {"task": "fashion_mnist"}
    done = _call("data", "build")
    assert done.exit_code == 0, done.output
    from project.data.store import open_data

    bundle = write_manifest(bundle.path, **manifest | {"classes": open_data().classes})
    done = _call("models", "reference", bundle.path)
    assert done.exit_code == 0 and "moved by 3 px" in done.output, done.output
    assert len(open_reference(open_bundle(bundle.path))) == 42
