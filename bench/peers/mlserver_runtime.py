"""MLServer has no runtime for ONNX; this is one as its documentation says to write it."""
import os

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

from onnx_model import Model


class Runtime(MLModel):
    async def load(self):
        self.model = Model(os.environ["MODEL"])
        self.shape = [-1] + [int(d) for d in os.environ["WIDTH"].split()]
        return True

    async def predict(self, payload):
        y = self.model.run(NumpyCodec.decode_input(payload.inputs[0]), self.shape)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)])
