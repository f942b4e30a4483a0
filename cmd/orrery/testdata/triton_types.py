"""Sends every datatype through a server with the unmodified tritonclient, and uses the rest of the protocol.

usage: triton_types.py HTTP-HOST:PORT GRPC-HOST:PORT MODEL VERSION
The model passes a tensor of every datatype through: in_FP32 [-1,-1] to out_FP32, and so on.
"""
import asyncio
import queue
import sys
import threading

import ml_dtypes
import numpy as np
import tritonclient.grpc as tgrpc
import tritonclient.grpc.aio as agrpc
import tritonclient.http as thttp
import tritonclient.http.aio as ahttp

http_url, grpc_url, model, version = sys.argv[1:5]
r = np.random.default_rng(1)
numpys = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64, "INT8": np.int8,
    "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16, "FP32": np.float32, "FP64": np.float64,
}


def value(kind, shape):
    if kind == "BYTES":
        return np.array([bytes(r.integers(0, 256, r.integers(0, 40), dtype=np.uint8)) for _ in range(int(np.prod(shape)))], dtype=object).reshape(shape)
    if kind == "BF16":
        return r.standard_normal(shape).astype(ml_dtypes.bfloat16)
    dtype = numpys[kind]
    if kind == "BOOL":
        return r.integers(0, 2, shape).astype(dtype)
    if kind.startswith("FP"):
        return r.standard_normal(shape).astype(dtype)
    info = np.iinfo(dtype)
    return r.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def inputs(mod, values, **how):
    out = []
    for kind, v in values.items():
        t = mod.InferInput("in_" + kind, list(v.shape), kind)
        t.set_data_from_numpy(v, **how)
        out.append(t)
    return out


def same(result, values):
    for kind, v in values.items():
        got = result.as_numpy("out_" + kind)
        assert got is not None, kind
        if kind == "BYTES":
            got = np.array([g.encode() if isinstance(g, str) else g for g in got.reshape(-1)], dtype=object).reshape(got.shape)
        assert got.shape == v.shape and (got == v).all(), (kind, got, v)


kinds = list(numpys) + ["BF16", "BYTES"]
http, grpc = thttp.InferenceServerClient(http_url), tgrpc.InferenceServerClient(grpc_url)
for shape in ((3, 2), (1, 1), (2, 0), (0, 2)):
    values = {k: value(k, shape) for k in kinds}
    same(http.infer(model, inputs(thttp, values), model_version=version), values)
    same(grpc.infer(model, inputs(tgrpc, values), model_version=version), values)
    for algorithm in ("gzip", "deflate"):
        same(http.infer(model, inputs(thttp, values), model_version=version, request_compression_algorithm=algorithm, response_compression_algorithm=algorithm), values)
        same(grpc.infer(model, inputs(tgrpc, values), model_version=version, compression_algorithm=algorithm), values)

# What JSON can carry.
def as_json(values):
    plain = {k: v for k, v in values.items() if k not in ("FP16", "BF16")}
    plain["BYTES"] = np.array([["grüße", ""], ["x\ny", "\"q\""]], dtype=object)
    return plain

values = {k: value(k, (2, 2)) for k in kinds}
mixed = inputs(thttp, as_json(values), binary_data=False) + inputs(thttp, {k: values[k] for k in ("FP16", "BF16")})
wanted = [thttp.InferRequestedOutput("out_" + k, binary_data=k in ("FP16", "BF16")) for k in kinds]
result = http.infer(model, mixed, model_version=version, outputs=wanted)
for k, v in as_json(values).items():
    got = result.as_numpy("out_" + k)
    if k == "BYTES":
        assert [g.decode() if isinstance(g, bytes) else g for g in got.reshape(-1)] == list(v.reshape(-1)), got
    else:
        assert (got == v).all(), (k, got, v)

# Priorities, timeouts, ids; a timeout too short is an error that says so.
result = http.infer(model, inputs(thttp, values), model_version=version, priority=1, timeout=5_000_000, request_id="seven")
assert result.get_response()["id"] == "seven"
result = grpc.infer(model, inputs(tgrpc, values), model_version=version, priority=1, timeout=5_000_000, request_id="seven")
assert result.get_response().id == "seven"
for c, mod in ((http, thttp), (grpc, tgrpc)):
    try:
        c.infer(model, inputs(mod, values), model_version=version, timeout=1)
        raise SystemExit("a microsecond was enough")
    except (thttp.InferenceServerException, tgrpc.InferenceServerException if hasattr(tgrpc, "InferenceServerException") else Exception) as e:
        assert "deadline" in str(e).lower(), e

# Asynchronous twins and the stream.
async def twins():
    async with ahttp.InferenceServerClient(http_url) as c:
        assert await c.is_server_live() and await c.is_model_ready(model)
        for answer in await asyncio.gather(*[c.infer(model, inputs(ahttp, values), model_version=version) for _ in range(8)]):
            same(answer, values)
    async with agrpc.InferenceServerClient(grpc_url) as c:
        assert await c.is_server_ready() and (await c.get_model_metadata(model)).name == model
        for answer in await asyncio.gather(*[c.infer(model, inputs(agrpc, values), model_version=version) for _ in range(8)]):
            same(answer, values)

asyncio.run(twins())
answers = queue.Queue()
grpc.start_stream(lambda result, error: answers.put((result, error)))
for n in range(20):
    grpc.async_stream_infer(model, inputs(tgrpc, values), model_version=version, request_id=str(n), enable_empty_final_response=True)
grpc.async_stream_infer("no-such-model", inputs(tgrpc, values), request_id="lost")
ids, lost = set(), None
for _ in range(21):
    result, error = answers.get(timeout=20)
    if error is not None:
        lost = error
        continue
    same(result, values)
    assert result.get_response().parameters["triton_final_response"].bool_param
    ids.add(result.get_response().id)
grpc.stop_stream()
assert ids == {str(n) for n in range(20)} and "no model" in str(lost), (ids, lost)

# Configuration and statistics, which add up.
config = http.get_model_config(model, version)
assert config["backend"] == "onnxruntime" and config["max_batch_size"] == 32, config
assert {i["name"]: (i["data_type"], i["dims"]) for i in config["input"]}["in_FP16"] == ("TYPE_FP16", [-1]), config
assert grpc.get_model_config(model, version).config.dynamic_batching.priority_levels == 8
def counts(s):
    return {k: int(v["count"]) for k, v in s["inference_stats"].items()}, int(s["inference_count"]), int(s["execution_count"])

before = http.get_inference_statistics(model, version)["model_stats"][0]
for _ in range(5):
    http.infer(model, inputs(thttp, values), model_version=version)
try:
    http.infer(model, inputs(thttp, values)[:3], model_version=version)
except thttp.InferenceServerException:
    pass
after = http.get_inference_statistics(model, version)["model_stats"][0]
(b, rows_b, runs_b), (a, rows_a, runs_a) = counts(before), counts(after)
assert a["success"] - b["success"] == 5 and a["fail"] - b["fail"] == 1, (b, a)
assert rows_a - rows_b == 10 and runs_a - runs_b == 5 and a["compute_infer"] - b["compute_infer"] == 5, (before, after)
assert sum(int(s["batch_size"]) * int(s["compute_infer"]["count"]) for s in after["batch_stats"]) == rows_a, after
one = grpc.get_inference_statistics(model, version).model_stats[0]
assert one.inference_count == rows_a and one.inference_stats.success.ns > 0 and one.last_inference > 1_600_000_000_000
assert any(s.name == model for s in grpc.get_inference_statistics().model_stats)

# Shared memory is refused cleanly.
assert http.get_system_shared_memory_status() == []
assert not grpc.get_system_shared_memory_status().regions
for call in (lambda: http.register_system_shared_memory("r", "/r", 64), lambda: grpc.register_system_shared_memory("r", "/r", 64)):
    try:
        call()
        raise SystemExit("a region was registered")
    except Exception as e:
        assert "shared memory is not supported" in str(e), e
shared = tgrpc.InferInput("in_FP32", [2, 2], "FP32")
shared.set_shared_memory("r", 16)
try:
    grpc.infer(model, [shared], model_version=version)
    raise SystemExit("shared memory was read")
except Exception as e:
    assert "shared memory is not supported" in str(e), e
print("ok")
