"""Objectives: wrong files by line, and every rule, test, route and query held against the real tools.

promtool, amtool and Prometheus are those on the PATH, or Debian's packages, unpacked without root.
"""

import json
import re
import socket
import subprocess
import time

import httpx
import pytest
import yaml
from click.testing import CliRunner
from debian import program
from serve_process import Server, make_registry, png

from project.cli import app
from project.core import root
from project.monitor.slo import SloError, read_slo, rule_tests
from project.monitor.watching import check_slo, dashboard_queries, grafana_dashboard, slo_dir, slo_files, write_slo

WHOLE = """
objectives:
  availability: {goal: 99.5}
  latency: {goal: 99, below: 200ms}
  agreement: {goal: 80}
  age: {days: 180}
  drift: {evidence: 1000}
"""


def run(*command, cwd):
    """What a program prints; it must not fail."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["expected names with values"]),
        ("[1]", ["line 1: objectives: expected names with values"]),
        ("goals: {}", ["line 1: goals: expected objectives"]),
        ("objectives: {}", ["expected at least one objective, found none"]),
        ("objectives: 5", ["line 1: objectives: expected names"]),
        ("objectives:\n  latncy: {goal: 99}", ["line 2: latncy: expected one of", "Did you mean 'latency'?"]),
        ("objectives:\n  latency: {goal: 99}", ["line 2: latency: below is missing"]),
        ("objectives:\n  latency:\n    goal: 99\n    below: 180ms", ["line 4: latency.below: expected the upper end"]),
        ("objectives:\n  latency:\n    goal: 99\n    below: fast", ["line 4: latency.below: expected a duration"]),
        ("objectives:\n  availability: {goal: 100}", ["line 2: availability.goal: expected percent", "found 100"]),
        ("objectives:\n  availability: {goal: yes}", ["availability.goal: expected percent", "found True"]),
        ("objectives:\n  availability: {goal: .nan}", ["availability.goal: expected percent"]),
        ("objectives:\n  availability: {goal: 99, least: 0}", ["availability.least: expected a whole number"]),
        ("objectives:\n  availability: {goal: 99, window: 30d}", ["availability.window: expected one of goal, least"]),
        ("objectives:\n  age: {days: -1}", ["line 2: age.days: expected a number above 0, found -1"]),
        ("objectives:\n  age: {}", ["age: days is missing"]),
        ("objectives:\n  age: {days: 1}\n  age: {days: 2}", ["line 3: age: is there twice"]),
        ("objectives: {age: {days: 1}", ["expected"]),
    ],
)
def test_a_wrong_file_is_refused_by_line(text, words, tmp_path):
    """Each word of what is wrong, and nothing is written."""
    with pytest.raises(SloError) as refused:
        read_slo(text)
    assert all(word in str(refused.value) for word in words), refused.value
    (tmp_path / "slo.yaml").write_text(text, encoding="utf-8")
    for verb in ("write", "check"):
        done = CliRunner().invoke(app, ["slo", verb, str(tmp_path)])
        assert done.exit_code and words[0] in done.output and "Traceback" not in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["slo.yaml"]


def test_all_problems_are_in_one_message():
    with pytest.raises(SloError) as refused:
        read_slo("objectives:\n  availability: {goal: 1}\n  age: {day: 3}\n  other: {}")
    assert [f"line {n}:" in str(refused.value) for n in (2, 3, 4)] == [True] * 3


def test_a_folder_without_objectives(tmp_path):
    done = CliRunner().invoke(app, ["slo", "check", str(tmp_path)])
    assert done.exit_code and "slo.yaml" in done.output and "Traceback" not in done.output


def test_what_is_committed_is_what_the_objectives_mean():
    """`project slo write` leaves the checkout clean."""
    assert check_slo() == [], "run `project slo write`"


def test_a_file_that_was_edited_is_named(tmp_path):
    (tmp_path / "slo.yaml").write_text(WHOLE, encoding="utf-8")
    write_slo(tmp_path)
    (tmp_path / "rules.yaml").write_text("groups: []", encoding="utf-8")
    (tmp_path / "dashboard.json").unlink()
    done = CliRunner().invoke(app, ["slo", "check", str(tmp_path)])
    assert done.exit_code == 1 and [line.split(":")[0].rpartition("/")[2] for line in done.output.splitlines()] == [
        "rules.yaml",
        "dashboard.json",
    ]


@pytest.mark.parametrize("hours", ["hours", "days"])
def test_every_alert_fires_and_is_silent_where_it_should(hours):
    """promtool says SUCCESS of a file that is not there, and of a name that is mistyped: both are counted here."""
    promtool, folder = program("promtool", "prometheus"), slo_dir()
    rules = yaml.safe_load((folder / "rules.yaml").read_text(encoding="utf-8"))
    many = sum(len(group["rules"]) for group in rules["groups"])
    assert f"SUCCESS: {many} rules found" in run(promtool, "check", "rules", "rules.yaml", cwd=folder)
    names = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    cases = {hour: yaml.safe_load((folder / f"rules_{hour}_test.yaml").read_text()) for hour in ("hours", "days")}
    told = [case["alert_rule_test"][0] for file in cases.values() for case in file["tests"]]
    assert (
        {t["alertname"] for t in told if t["exp_alerts"]}
        == {t["alertname"] for t in told if not t["exp_alerts"]}
        == names
    )
    assert "SUCCESS" in run(promtool, "test", "rules", f"rules_{hours}_test.yaml", cwd=folder)


def test_a_test_that_expects_something_else_fails(tmp_path):
    """The tests can fail: a limit twice as high makes alerts silent."""
    promtool, objectives = program("promtool", "prometheus"), read_slo("objectives: {availability: {goal: 99.5}}")
    for name, text in slo_files(objectives).items():
        text = re.sub(r"(_1h > )0\.072", r"\g<1>0.9", text) if name == "rules.yaml" else text
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = [promtool, "test", "rules", "rules_hours_test.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "ProjectAvailabilityBurn14_4" in done.stdout + done.stderr


def test_alertmanager_takes_its_routes(tmp_path):
    """Pages go to one receiver, tickets to the other."""
    amtool, file = program("amtool", "prometheus-alertmanager"), slo_dir() / "alertmanager.yaml"
    assert "SUCCESS" in run(amtool, "check-config", str(file), cwd=tmp_path)
    for severity in ("page", "ticket"):
        route = run(amtool, "config", "routes", "test", f"--config.file={file}", f"severity={severity}", cwd=tmp_path)
        assert severity in route.split()


def free_port():
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def ask(url, path, **params):
    """Prometheus' answer; it may still be starting."""
    for _ in range(600):
        try:
            answer = httpx.get(f"{url}/api/v1/{path}", params=params, timeout=10)
            if answer.status_code != 503:
                return answer.json()
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"no answer from {url}")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A real service, asked right and wrong, and a real Prometheus that scrapes it every second."""
    folder = tmp_path_factory.mktemp("watched")
    exe = program("prometheus", "prometheus")
    make_registry(folder)
    port = free_port()
    with Server(folder) as server:
        for _ in range(5):
            server.client.post("/predict/brightness", files={"file": png()})
        server.client.post("/predict/brightness", files={"file": b"no image"})
        made = server.client.post("/predict/brightness", files={"file": png()}).json()["id"]
        server.client.post(f"/predictions/{made}/feedback", json={"label": "dark"})
        for name, text in slo_files(read_slo(WHOLE)).items():
            (folder / name).write_text(text, encoding="utf-8")
        config = yaml.safe_load((folder / "prometheus.yaml").read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
        config.pop("alerting")
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [
            exe,
            "--config.file=prometheus.yaml",
            "--storage.tsdb.path=tsdb",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with (folder / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(300):
                up = ask(url, "query", query="up")["data"]["result"]
                if (
                    up
                    and up[0]["value"][1] == "1"
                    and ask(url, "query", query="rate(project_requests_total[1m])")["data"]["result"]
                ):
                    break
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                time.sleep(0.2)
            yield url, server
        finally:
            process.terminate()
            process.wait(20)


def test_every_query_of_the_dashboard_and_the_rules_runs(watched):
    """Each is asked of a real Prometheus, and each names metrics that the service has."""
    url, server = watched
    text = server.client.get("/metrics").text
    known = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    declared = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    objectives = read_slo(WHOLE)
    rules = [r for g in yaml.safe_load(slo_files(objectives)["rules.yaml"])["groups"] for r in g["rules"]]
    for query in [*dashboard_queries(grafana_dashboard(objectives)), *(rule["expr"] for rule in rules)]:
        assert ask(url, "query", query=query)["status"] == "success", query
        for name in re.findall(r"\bproject_\w+", query):
            assert name in known or {name, name.removesuffix("_total")} & declared, name


def test_what_is_promised_of_the_metrics_holds(watched):
    """Counters begin at 0, the version that answers names its run and its age, and feedback is counted."""
    _, server = watched
    text = server.client.get("/metrics").text
    assert 'project_requests_total{method="POST",route="/predict/{task}",status="500"} 0.0' in text
    assert re.search(r'project_feedback_total\{agrees="(yes|no)",task="brightness",version="[^"]+"\} 1.0', text)
    assert re.search(r'project_predictions_total\{predicted="dark",task="brightness",version="[^"]+"\} \d', text)
    assert re.search(r'project_model_made_seconds\{run="[^"]*",task="brightness",version="[^"]+"\} 1\.\d+e\+09', text)


def test_the_rules_of_a_real_prometheus_are_healthy(watched):
    """It has all of them, and none has an error."""
    url, _ = watched
    for _ in range(300):
        groups = ask(url, "rules")["data"]["groups"]
        health = {rule["health"] for group in groups for rule in group["rules"]}
        if "unknown" not in health:
            break
        time.sleep(0.2)
    assert health == {"ok"} and len(groups) == 5


def test_the_dashboard_has_what_grafana_asks_for():
    """Panels with ids, places and sources; the file is what the function makes."""
    board = json.loads((slo_dir() / "dashboard.json").read_text(encoding="utf-8"))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) >= 10
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places) and all(panel["targets"] for panel in board["panels"])
    assert board == grafana_dashboard(read_slo(root() / "docker" / "monitoring" / "slo.yaml"))


def test_the_number_of_tests_is_that_of_the_alerts():
    tests = [case for file in rule_tests(read_slo(WHOLE)).values() for case in file["tests"]]
    assert len(tests) == 12 + 12 + 6 + 2 + 2
