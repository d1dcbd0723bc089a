"""Are the tests able to fail? One-line faults are planted one at a time into a throw-away copy of the package.

Each fault is a file, what stands there, what stands there instead, and the tests that should notice. A fault counts as
found when a test fails with it and the same test passes without it. Libraries are imported once; each run is a fork, so
that a fault costs seconds. `planted.py --only serve` plants those whose file has the word in its name.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = "numpy PIL.Image torch pytorch_lightning httpx pydantic click yaml sqlalchemy"  # none starts a thread
SECONDS = 150  # for the tests of one fault

FAULTS = [
    # file below project/, what is there, what is planted, tests
    ("core.py", "    if free < nbytes:", "    if free > nbytes:", "test_core.py"),
    (
        "core.py",
        "except (json.JSONDecodeError, UnicodeDecodeError) as e:",
        "except json.JSONDecodeError as e:",
        "test_core.py",
    ),
    (
        "locks.py",
        "    except (ProcessLookupError, KeyError, ValueError):",
        "    except (KeyError, ValueError):",
        "test_locks.py",
    ),
    (
        "locks.py",
        'p.name.startswith(f"{path.name}.") and p != own]',
        'p.name.startswith(f"{path.name}.")]',
        "test_locks.py",
    ),
    ("metrics.py", "if not (math.isfinite(t) and t > 0):", "if not (math.isfinite(t) and t >= 0):", "test_metrics.py"),
    ("metrics.py", "    there = matrix.sum(1) > 0", "    there = matrix.sum(1) >= 0", "test_metrics.py"),
    ("metrics.py", "    right = labels == said", "    right = labels != said", "test_metrics.py"),
    (
        "behaviour.py",
        "np.flatnonzero([np.any(a != b) for",
        "np.flatnonzero([np.all(a != b) for",
        "test_behaviour.py::test_only_changed_inputs_count test_behaviour.py::test_shapes_that_do_not_fit",
    ),
    ("figures.py", '"image/png": {"alt": said}}', '"image/png": {}}', "test_figures.py"),
    (
        "runs/contract.py",
        "    if t is int and value != int(value):",
        "    if t is int and value == int(value) + 1:",
        "test_contract.py::test_values_and_types test_contract.py::test_a_bound_is_within_where_its_name_says_so",
    ),
    (
        "runs/contract.py",
        "return bool(value <= x)",
        "return bool(value < x)",
        "test_contract.py::test_values_and_types test_contract.py::test_a_bound_is_within_where_its_name_says_so",
    ),
    (
        "runs/secrets.py",
        "            if len(form) >= 16 and form[:8] in text:",
        "            if len(form) >= 64 and form[:8] in text:",
        "test_planted.py",
    ),
    (
        "runs/record.py",
        "return all(isinstance(k, str) and _is_json(v)",
        "return all(isinstance(k, str) or _is_json(v)",
        "test_record.py::test_parameters_are_the_json_values test_sittings.py",
    ),
    (
        "runs/record.py",
        'return alike[-1] if alike and alike[-1]["status"] != "finished" else None',
        "return alike[-1] if alike else None",
        "test_record.py::test_parameters_are_the_json_values test_sittings.py",
    ),
    (
        "runs/receipt.py",
        "    return len(here) == len(there) and same",
        "    return same",
        "test_planted.py",
    ),
    (
        "runs/compare.py",
        "    if _is_number(a) and _is_number(b):",
        "    if _is_number(a) or _is_number(b):",
        "test_planted.py",
    ),
    (
        "runs/results.py",
        "    numbers = [v for v in found if v is not None]",
        "    numbers = [v for v in found if v]",
        "test_results.py",
    ),
    (
        "runs/fresh.py",
        "    off, large = abs(a - b), max(abs(a), abs(b))",
        "    off, large = a - b, max(abs(a), abs(b))",
        "test_fresh.py::test_an_edit_is_stale_where_it_is_code",
    ),
    (
        "data/sources.py",
        "    if info.file_size > _LIMIT or info.file_size",
        "    if info.file_size > _LIMIT and info.file_size",
        "test_sources.py",
    ),
    ("data/sources.py", "    if not info.flag_bits & 0x800:", "    if info.flag_bits & 0x800:", "test_sources.py"),
    (
        "data/readers.py",
        "if isinstance(row, str) or len(row) != len(fields):",
        "if isinstance(row, str):",
        "test_readers.py",
    ),
    ("data/readers.py", "MAX_PIXELS = 50_000_000", "MAX_PIXELS = 50_000_000_000", "test_readers.py"),
    (
        "data/cleaning.py",
        "return [group for group in rows.values() if len(group) > 1]",
        "return [group for group in rows.values() if len(group) > 2]",
        "test_cleaning.py",
    ),
    (
        "data/cleaning.py",
        "            if group[a] != group[b]:",
        "            if group[a] == group[b]:",
        "test_cleaning.py",
    ),
    ("data/store.py", "        except (DataError, OSError):", "        except OSError:", "test_store.py"),
    ("data/loader.py", "rows = (down >= corner[:, :1]) &", "rows = (down > corner[:, :1]) &", "test_loader.py"),
    ("data/tokens.py", "    if size < 16:", "    if size < 15:", "test_tokens.py"),
    (
        "data/tasks.py",
        "    if len(sizes) < 2 or sizes.min() < 2:",
        "    if len(sizes) < 2 or sizes.min() < 1:",
        "test_tasks.py",
    ),
    ("data/features.py", "where=shares > 0)", "where=shares >= 0)", "test_features.py"),
    ("models/vision.py", "self.around = stride == 1 and i == o", "self.around = stride == 1", "test_vision.py"),
    ("models/vision.py", 'if self.held and name != "head":', 'if self.held and name == "head":', "test_vision.py"),
    ("models/text.py", "device=ids.device), ids != PAD", "device=ids.device), ids == PAD", "test_text.py"),
    (
        "train/recipe.py",
        "isinstance(value, bool) or value < low:",
        "isinstance(value, bool) or value <= low:",
        "test_fit.py",
    ),
    ("train/module.py", "return out.T if matrix.shape[0] > matrix.shape[1] else out", "return out", "test_fit.py"),
    (
        "train/fit.py",
        'best = max(sound, key=lambda row: row["val/acc"])',
        'best = min(sound, key=lambda row: row["val/acc"])',
        "test_fit.py",
    ),
    (
        "train/fit.py",
        "trainer.should_stop or _waited(self.history.rows) >= self.patience",
        "trainer.should_stop or _waited(self.history.rows) > self.patience",
        "test_fit.py",
    ),
    ("bundle/manifest.py", "        if not stat.S_ISREG(mode):", "        if stat.S_ISDIR(mode):", "test_manifest.py"),
    (
        "bundle/manifest.py",
        "and not isinstance(value, bool) and abs(value) < 1e300",
        "and abs(value) < 1e300",
        "test_manifest.py",
    ),
    (
        "bundle/registry.py",
        "        except (FileNotFoundError, NotADirectoryError):",
        "        except NotADirectoryError:",
        "test_registry.py",
    ),
    (
        "bundle/registry.py",
        "            stack.enter_context(locked(file, wait or _WAIT))",
        "            pass",
        "test_registry.py",
    ),
    (
        "bundle/gate.py",
        "n, k = only_first + only_second, min(only_first, only_second)",
        "n, k = only_first + only_second, max(only_first, only_second)",
        "test_gate.py::test_mcnemar_is_exact",
    ),
    (
        "bundle/compress.py",
        "    if not np.isfinite(found).all():",
        "    if not np.isfinite(found).any():",
        "test_compress.py",
    ),
    (
        "bundle/mirror.py",
        "if now.get(alias) != stood.get(alias)]",
        "if now.get(alias) == stood.get(alias)]",
        "test_mirror.py::test_without_a_key_or_a_wish_nothing_is_tried",
    ),
    (
        "serve/batching.py",
        ">= self.most:\n                return False",
        "> self.most:\n                return False",
        "test_batching.py",
    ),
    ("serve/batching.py", "if not row.future.done()]", "if row.future.done()]", "test_batching.py"),
    (
        "serve/log.py",
        "return query.where(p.c.time < stamp(until))",
        "return query.where(p.c.time <= stamp(until))",
        "test_log.py",
    ),
    (
        "serve/limits.py",
        'self.given = [h for h in hashes if h != "none"]',
        "self.given = list(hashes)",
        "test_doors.py",
    ),
    (
        "serve/metrics.py",
        "if len(labels) == len(family.labels) and 0 <= first",
        "if 0 <= first",
        "test_serve_metrics.py",
    ),
    (
        "serve/predictor.py",
        "        if name not in names and value not in",
        "        if name in names and value not in",
        "test_predictor.py",
    ),
    ("serve/predictor.py", "    if held > most:", "    if held > 2 * most:", "test_predictor.py"),
    ("serve/client.py", "        if name not in head:", "        if name in head:", "test_client.py"),
    ("serve/client.py", "    if task not in tasks:", "    if task in tasks:", "test_client.py"),
    ("serve/card.py", "self.silent = max(0, self.silent - 1)", "self.silent = 0", "test_card.py"),
    (
        "serve/load.py",
        "not all(0 <= v <= 1 for v in values) or",
        "False or",
        "test_load.py::test_only_a_prediction_is_a_prediction",
    ),
    ("cli.py", "    if not extras:", "    if extras:", "test_cli.py"),
    (
        "cli.py",
        'if not output.endswith(".ipynb") or Path(output).is_dir():',
        "if Path(output).is_dir():",
        "test_cli.py",
    ),
]


def copy_into(folder):
    """What git would hold, without the history."""
    call = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    for name in filter(
        None, subprocess.run(call, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    ):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())


def tests(folder, *names):
    """Run them in a fork: the status of pytest, and what it printed."""
    log = folder / "planted.log"
    log.write_text("", encoding="utf-8")
    if (pid := os.fork()) == 0:
        status = 70
        try:
            os.setsid()
            os.chdir(folder)
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # Locust and Schemathesis take seconds
            sys.dont_write_bytecode = True
            file = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1), os.dup2(file, 2)
            sys.path[:] = [str(folder), str(folder / "tests"), *(p for p in sys.path if p not in ("", str(ROOT)))]
            import pytest

            assert Path(importlib.util.find_spec("project").origin).is_relative_to(folder), "not the copy"
            quiet = ["-q", "-p", "no:cacheprovider", "--durations=0", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
            status = pytest.main([*names, "-x", *quiet])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(int(status))
    end = time.monotonic() + SECONDS
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)  # the session is the fork's own
            os.waitpid(pid, 0)
            return None, log.read_text(encoding="utf-8", errors="replace")
        time.sleep(0.1)
    return os.waitstatus_to_exitcode(done[1]), log.read_text(encoding="utf-8", errors="replace")


def judge(folder, name, old, new, files):
    """Plant one, in the module and in its notebook: whether it was found, and by which test."""
    path = folder / "project" / name
    text = path.read_text(encoding="utf-8")
    lesson = (path.parent / re.search(r"File to edit: (\S+)\.", text)[1]).resolve()
    cells = lesson.read_text(encoding="utf-8")
    as_json = [json.dumps(part, ensure_ascii=False)[1:-1] for part in (old, new)]
    as_json = [part.replace("\\n", '\\n",\n    "') for part in as_json]  # a line of a cell is a text of its own
    if (text.count(old), cells.count(as_json[0])) != (1, 1):
        return "not planted", f"it is there {text.count(old)} and {cells.count(as_json[0])} times"
    path.write_text(text.replace(old, new), encoding="utf-8")
    lesson.write_text(cells.replace(*as_json), encoding="utf-8")
    groups = [[f"tests/{file}" for file in files.split()], [lesson.relative_to(folder).as_posix()]]
    try:
        for names in groups:  # the lesson only where its tests find nothing
            status, said = tests(folder, *names)
            if status != 0:
                break
    finally:
        path.write_text(text, encoding="utf-8")
        lesson.write_text(cells, encoding="utf-8")
    if status == 0:
        return "NOT FOUND", files
    failed = re.findall(r"^(?:FAILED|ERROR) ([^\s\[]+)", said, re.M)[:1]
    again, said = tests(folder, *(failed or names))
    if again != 0:
        print(said, file=sys.stderr)
        return "FAILS ANYWAY", " ".join(failed or names)
    return "found", failed[0].removeprefix("tests/") if failed else "a test that does not end, or an import"


def main():
    """Plant, run, and print a table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", default="", help="a word in the file's name")
    options.add_argument("--first", default=0, type=int, help="how many of the list to pass over")
    asked = options.parse_args()
    chosen = [f for f in FAULTS[asked.first :] if asked.only in f[0]]
    for name in LIBRARIES.split():
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve() / "copy"
        copy_into(folder)
        print("| file | there | planted | result | by | s |\n|---|---|---|---|---|--:|")
        results = []
        for name, old, new, files in chosen:
            began = time.monotonic()
            result, by = judge(folder, name, old, new, files)
            results.append(result)
            cells = [f"`{' '.join(text.split()).replace('|', chr(92) + '|')}`" for text in (name, old, new)]
            print(f"| {' | '.join([*cells, result, by])} | {time.monotonic() - began:.0f} |", flush=True)
    print(f"\n{results.count('found')} of {len(results)} found")
    return any(result != "found" for result in results)


if __name__ == "__main__":
    sys.exit(main())
