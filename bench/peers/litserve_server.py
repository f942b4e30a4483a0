"""usage: litserve_server.py PORT MODEL.onnx WIDTH..."""
import sys

import litserve

from onnx_model import Model


class API(litserve.LitAPI):
    def setup(self, device):
        self.model = Model(sys.argv[2])
        self.shape = [-1] + [int(d) for d in sys.argv[3:]]

    def decode_request(self, request):
        return request["x"]

    def predict(self, x):
        return self.model.run(x, self.shape)

    def encode_response(self, output):
        return {"y": output.reshape(-1).tolist()}


if __name__ == "__main__":
    litserve.LitServer(API(), accelerator="cpu").run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="error")
