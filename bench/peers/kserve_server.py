"""usage: kserve_server.py PORT NAME MODEL.onnx WIDTH..."""
import sys

import kserve
from kserve import InferOutput, InferResponse
from kserve.utils.utils import generate_uuid

from onnx_model import Model

port, name, path, width = sys.argv[1], sys.argv[2], sys.argv[3], [int(d) for d in sys.argv[4:]]
sys.argv = [sys.argv[0], "--http_port", port, "--enable_grpc", "false", "--workers", "1", "--configure_logging", "false"]


class Served(kserve.Model):
    def __init__(self):
        super().__init__(name)
        self.model = Model(path)
        self.ready = True

    def predict(self, payload, headers=None):
        y = self.model.run(payload.inputs[0].as_numpy(), [-1] + width)
        out = InferOutput(name="y", shape=list(y.shape), datatype="FP32", data=y.reshape(-1).tolist())
        return InferResponse(response_id=generate_uuid(), model_name=name, infer_outputs=[out])


if __name__ == "__main__":
    kserve.ModelServer(http_port=int(port), enable_grpc=False, workers=1, access_log_format=None).start([Served()])
