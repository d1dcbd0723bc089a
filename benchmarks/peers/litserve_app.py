"""LitServe: an HTTP process and a worker that gathers batches. `PEER_CONFIG` is JSON: size, timeout, fast, workers."""

import json
import os
import sys

import litserve
import numpy as np
from common import INPUT, answer, pixels, session
from fastapi import Request


class Peer(litserve.LitAPI):
    """The same model, in batches."""

    def setup(self, device):
        """Load the model, in the worker."""
        self.model = session()

    def decode_request(self, request: Request):
        """An image of a form."""
        return pixels(request["file"].file.read())

    def batch(self, inputs):
        """Images as one array."""
        return np.stack(inputs)

    def predict(self, x):
        """Probabilities: of a batch, or of one image where batches are of one."""
        return self.model.run(["probabilities"], {INPUT: x if x.ndim == 3 else x[None]})[0]

    def unbatch(self, output):
        """Rows."""
        return list(output)

    def encode_response(self, output):
        """A row as JSON."""
        return answer(output.reshape(-1))


if __name__ == "__main__":
    config = json.loads(os.environ["PEER_CONFIG"])
    server = litserve.LitServer(
        Peer(max_batch_size=config["size"], batch_timeout=config["timeout"]),
        accelerator="cpu",
        workers_per_device=config["workers"],
        fast_queue=config["fast"],
    )
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
