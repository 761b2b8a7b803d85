"""`iared2 demo` as a Hugging Face Space, with the `model.safetensors` beside this file or else the model in the box."""

from pathlib import Path

from iared2 import Predictor, load
from iared2.demo.page import build, serve

checkpoint = Path(__file__).with_name("model.safetensors")
page = build(Predictor(load(checkpoint if checkpoint.exists() else None)))

if __name__ == "__main__":
    serve(page)  # the Space's environment says on which address and port
