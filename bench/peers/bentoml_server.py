"""Served with: bentoml serve bentoml_server:Service --port PORT; MODEL and WIDTH in the environment."""
import os
import sys

import bentoml

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from onnx_model import Model  # noqa: E402


@bentoml.service(workers=1)
class Service:
    def __init__(self):
        self.model = Model(os.environ["MODEL"])
        self.shape = [-1] + [int(d) for d in os.environ["WIDTH"].split()]

    @bentoml.api
    def predict(self, x: list) -> list:
        return self.model.run(x, self.shape).reshape(-1).tolist()
