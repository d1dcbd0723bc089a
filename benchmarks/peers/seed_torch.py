"""The style this project began with: torch in `async def`, one request at a time in the event loop."""

import torch
from common import CLASSES, FOLDER, answer, pixels
from fastapi import FastAPI, UploadFile
from fastapi.responses import JSONResponse

from project.bundle.export import load_weights
from project.bundle.manifest import open_bundle
from project.models.vision import build_model

torch.set_num_threads(1)
bundle = open_bundle(FOLDER)
shape = tuple(bundle.manifest["input"]["shape"][1:])
model = load_weights(build_model(bundle.manifest["model"], len(CLASSES), shape), bundle).eval()
app = FastAPI()


@app.post("/predict")
async def predict(file: UploadFile):
    """A prediction."""
    image = torch.tensor(pixels(await file.read()))[None, None]
    with torch.no_grad():
        return JSONResponse(answer(torch.softmax(model(image), 1)[0]))
