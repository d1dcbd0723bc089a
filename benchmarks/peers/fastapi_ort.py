"""FastAPI and ONNX Runtime in a plain `def`: each request in a thread."""

from common import INPUT, answer, pixels, session
from fastapi import FastAPI, UploadFile
from fastapi.responses import JSONResponse

app, model = FastAPI(), session()


@app.post("/predict")
def predict(file: UploadFile):
    """A prediction."""
    row = pixels(file.file.read())[None]
    return JSONResponse(answer(model.run(["probabilities"], {INPUT: row})[0][0]))
