"""Trains the flights model with scikit-learn: a trainer of Orrery for those who have Python.

pip install scikit-learn==1.9.1 skl2onnx==1.20.0 onnx==1.23.2 pandas

Reads ORRERY_TRAINING_DATA and ORRERY_LABEL_COLUMN, and leaves model.onnx in ORRERY_OUTPUT_DIR, with the same input
("flight") and output ("late") as the Go trainer's, so that one can take the other's place.
"""
import os

import onnx
import pandas as pd
from onnx import helper
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.ensemble import GradientBoostingClassifier

FEATURES = "hour distance temp dewp humid wind_speed precip visib origin carrier".split()

data = pd.read_csv(os.environ["ORRERY_TRAINING_DATA"])
label = os.environ.get("ORRERY_LABEL_COLUMN", "late")
fitted = GradientBoostingClassifier(n_estimators=80).fit(data[FEATURES].values, data[label].values.astype(int))
model = to_onnx(fitted, initial_types=[("flight", FloatTensorType([None, len(FEATURES)]))],
                options={id(fitted): {"zipmap": False}}, target_opset=17)
# Keep the probability of "late" alone, as [n, 1].
graph = model.graph
probabilities = graph.output[1].name
graph.initializer.append(helper.make_tensor("late_column", onnx.TensorProto.INT64, [1], [1]))
graph.node.append(helper.make_node("Gather", [probabilities, "late_column"], ["late"], axis=1))
del graph.output[:]
graph.output.append(helper.make_tensor_value_info("late", onnx.TensorProto.FLOAT, [None, 1]))
helper.set_model_props(model, {"features": ",".join(FEATURES)})
onnx.save(model, os.path.join(os.environ["ORRERY_OUTPUT_DIR"], "model.onnx"))
print(f"fitted {len(data)} rows")
