"""Drives an Open Inference Protocol server with the unmodified tritonclient, over HTTP and gRPC.

usage: triton_client.py HTTP-HOST:PORT GRPC-HOST:PORT MODEL PINNED-VERSION ROUTED-VERSION
Models answer y = x (FP32, [n,2]), j = i (INT64, [n]) and t = s (BYTES, [n,1]).
"""
import sys

import numpy as np
import tritonclient.grpc as tgrpc
import tritonclient.http as thttp

http_url, grpc_url, model, pinned, routed = sys.argv[1:6]
x = np.array([[1.5, -2.0], [3.25, 1e9]], dtype=np.float32)
i = np.array([2**62 + 1, -7], dtype=np.int64)
s = np.array([["grüße"], ["zwei"]], dtype=object)


def inputs(mod, **binary):
    out = []
    for name, value, kind in (("x", x, "FP32"), ("i", i, "INT64"), ("s", s, "BYTES")):
        t = mod.InferInput(name, list(value.shape), kind)
        t.set_data_from_numpy(value, **binary)
        out.append(t)
    return out


def check(result, version):
    assert (result.as_numpy("y") == x).all(), result.as_numpy("y")
    assert (result.as_numpy("j") == i).all(), result.as_numpy("j")
    got = [v.decode() if isinstance(v, bytes) else v for v in result.as_numpy("t").reshape(-1)]
    assert got == ["grüße", "zwei"], got
    answer = result.get_response()
    number = answer["model_version"] if isinstance(answer, dict) else answer.model_version
    assert number == version, (number, version)


def refused(call, word):
    try:
        call()
    except Exception as e:  # InferenceServerException of either client
        assert word in str(e), e
        return
    raise AssertionError("it was not refused: " + word)


http = thttp.InferenceServerClient(http_url)
grpc = tgrpc.InferenceServerClient(grpc_url)
for c in (http, grpc):
    assert c.is_server_live() and c.is_server_ready() and c.is_model_ready(model) and c.is_model_ready(model, pinned)
    assert not c.is_model_ready(model, "99") if c is http else True
meta = http.get_model_metadata(model)
assert {t["name"]: (t["datatype"], t["shape"]) for t in meta["inputs"]} == {
    "x": ("FP32", [-1, 2]), "i": ("INT64", [-1]), "s": ("BYTES", [-1, 1])}, meta
assert [t.name for t in grpc.get_model_metadata(model).outputs] == ["y", "t", "j"]
assert http.get_server_metadata()["name"].startswith("orrery") and "binary_tensor_data" in grpc.get_server_metadata().extensions
assert any(m["name"] == model and m["state"] == "READY" for m in http.get_model_repository_index())

for version, want in (("", routed), (pinned, pinned)):
    for binary in (True, False):
        check(http.infer(model, inputs(thttp, binary_data=binary), model_version=version), want)
        wanted = [thttp.InferRequestedOutput(n, binary_data=binary) for n in ("j", "y", "t")]
        check(http.infer(model, inputs(thttp, binary_data=binary), model_version=version, outputs=wanted, request_id="7"), want)
    for algorithm in ("gzip", "deflate"):
        check(http.infer(model, inputs(thttp), model_version=version, request_compression_algorithm=algorithm,
                         response_compression_algorithm=algorithm), want)
    check(grpc.infer(model, inputs(tgrpc), model_version=version), want)
only = http.infer(model, inputs(thttp), outputs=[thttp.InferRequestedOutput("j")])
assert only.as_numpy("y") is None and (only.as_numpy("j") == i).all()

for c, mod in ((http, thttp), (grpc, tgrpc)):
    wrong = mod.InferInput("x", [2, 2], "FP64")
    wrong.set_data_from_numpy(x.astype(np.float64))
    refused(lambda: c.infer(model, [wrong] + inputs(mod)[1:]), "expected FP32, got FP64")
    shape = mod.InferInput("x", [1, 3], "FP32")
    shape.set_data_from_numpy(np.zeros((1, 3), dtype=np.float32))
    refused(lambda: c.infer(model, [shape] + inputs(mod)[1:]), "expected shape")
    refused(lambda: c.infer("no-such", inputs(mod)), "no model")
    refused(lambda: c.infer(model, inputs(mod), outputs=[mod.InferRequestedOutput("nope")]), "unknown output")
print("ok")
