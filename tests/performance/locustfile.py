"""Load from Locust: `locust -f tests/performance/locustfile.py --host http://127.0.0.1:8000`.

Real inputs, and an answer is a success only if it is a prediction. A refusal that says when to come back (429 or 503
with Retry-After) is a line of its own, and no failure. PROJECT_LOAD_TASK names the task (else the first that is
served), PROJECT_API_KEY the key, if one is needed.
"""

import os
from itertools import count
from pathlib import Path
from urllib.parse import quote

from locust import FastHttpUser, constant, events, task

from project.serve.load import data_samples, judge, pick_task, served_samples

SOURCE = Path(__file__).resolve().parents[1] / "samples"
KEY = os.environ.get("PROJECT_API_KEY", "")


@events.test_start.add_listener
def prepare(environment, **_):
    """Find the task and its inputs, once for all users of this process."""
    Asker.asked = pick_task(environment.host, os.environ.get("PROJECT_LOAD_TASK", ""), KEY)
    Asker.samples = served_samples(environment.host, Asker.asked, KEY) or data_samples(Asker.asked, SOURCE)


class Asker(FastHttpUser):
    """Asks for the next prediction as soon as it has one."""

    wait_time = constant(0)
    turn = count()

    @task
    def predict(self):
        """One input, judged by what is in the answer."""
        sample = self.samples[next(self.turn) % len(self.samples)]
        headers = {"Content-Type": sample.content_type} | ({"X-API-Key": KEY} if KEY else {})
        path, name = f"/predict/{quote(self.asked)}", "/predict/{task}"
        asking = self.client.post(path, data=sample.body, headers=headers, name=name, catch_response=True)
        with asking as answer:
            retry = "Retry-After" in (answer.headers or {})
            said = judge(answer.status_code, retry, answer.content or b"", self.asked)
            if said == "refused":
                answer.request_meta["name"] = f"{name} (refused)"
            answer.failure(said) if said not in ("", "refused") else answer.success()
