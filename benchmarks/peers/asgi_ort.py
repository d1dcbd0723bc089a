"""Bare ASGI and ONNX Runtime, in the event loop: no framework, no limits, no log, no checks."""

import json

from common import INPUT, answer, pixels, session

model = session()


async def app(scope, receive, send):
    """A prediction for whatever is posted."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    content = body.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0]
    found = json.dumps(answer(model.run(["probabilities"], {INPUT: pixels(content)[None]})[0][0])).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(found))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": found})
