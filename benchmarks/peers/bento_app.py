"""BentoML: a service with adaptive batches. `PEER_CONFIG` is JSON: size, and ms that an answer may take."""

import json
import os

import bentoml
import numpy as np
from common import INPUT, answer, session
from PIL.Image import Image

config = json.loads(os.environ["PEER_CONFIG"])


@bentoml.service(workers=1, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class Peer:
    """The same model, in batches."""

    def __init__(self) -> None:
        self.model = session()

    @bentoml.api(batchable=True, max_batch_size=config["size"], max_latency_ms=config["ms"])
    def predict(self, images: list[Image]) -> list[dict]:
        """Answers, one for each image."""
        x = np.stack([np.asarray(image.convert("L")) for image in images])
        return [answer(p) for p in self.model.run(["probabilities"], {INPUT: x})[0]]
