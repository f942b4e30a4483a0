"""The model as every Python server here runs it: one ONNX Runtime session, one thread."""
import numpy as np
import onnxruntime


class Model:
    def __init__(self, path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.name = self.session.get_inputs()[0].name
        self.dtype = {"tensor(float)": np.float32, "tensor(int64)": np.int64}[self.session.get_inputs()[0].type]

    def run(self, values, shape):
        return self.session.run(None, {self.name: np.asarray(values, dtype=self.dtype).reshape(shape)})[0]
