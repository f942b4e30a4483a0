"""Drives a server with the unmodified client of KServe, over REST and gRPC.

usage: kserve_client.py HTTP-HOST:PORT GRPC-HOST:PORT MODEL
The model answers y = x (FP32, [n,2]), j = i (INT64, [n]) and t = s (BYTES, [n,1]).
"""
import asyncio
import sys

import numpy as np
from kserve import InferInput, InferRequest
from kserve.inference_client import InferenceGRPCClient, InferenceRESTClient, RESTConfig

http_url, grpc_url, model = sys.argv[1:4]
x = np.array([[1.5, -2.0], [3.25, 1e9]], dtype=np.float32)
i = np.array([2**62 + 1, -7], dtype=np.int64)
s = np.array([[b"eins"], [b"zwei"]], dtype=object)


def request(binary):
    values = []
    for name, value, kind in (("x", x, "FP32"), ("i", i, "INT64"), ("s", s, "BYTES")):
        t = InferInput(name, list(value.shape), kind)
        t.set_data_from_numpy(value, binary_data=binary)
        values.append(t)
    return InferRequest(infer_inputs=values, model_name=model, request_id="r1")


def check(answer):
    got = {o.name: o.as_numpy() for o in answer.outputs}
    assert answer.id == "r1" and answer.model_name == model, answer
    assert (got["y"] == x).all() and (got["j"].reshape(-1) == i).all(), got
    assert [v.decode() if isinstance(v, bytes) else v for v in got["t"].reshape(-1)] == ["eins", "zwei"], got


async def main():
    rest = InferenceRESTClient(RESTConfig(protocol="v2"))
    base = "http://" + http_url
    assert await rest.is_server_live(base) and await rest.is_server_ready(base) and await rest.is_model_ready(base, model)
    for binary in (False, True):
        check(await rest.infer(base, request(binary), model_name=model))
    async with InferenceGRPCClient(grpc_url) as grpc:
        assert await grpc.is_server_live() and await grpc.is_server_ready() and await grpc.is_model_ready(model)
        for binary in (False, True):
            check(await grpc.infer(request(binary)))
    print("ok")


asyncio.run(main())
