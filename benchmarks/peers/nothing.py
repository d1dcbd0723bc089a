"""The ceiling: FastAPI reads the upload and does nothing with it."""

from fastapi import FastAPI, UploadFile
from fastapi.responses import JSONResponse

app = FastAPI()


@app.post("/predict")
async def predict(file: UploadFile):
    """A constant."""
    await file.read()
    return JSONResponse({"class": "nothing"})
