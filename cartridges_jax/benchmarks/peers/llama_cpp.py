"""llama.cpp (the `xllamacpp` wheel): its server inside this process, on loopback."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Server:
    """A server of one GGUF file for one caller at a time, which stops when the object is garbage."""

    def __init__(self, model: Path, *, context: int, num_threads: int, warmup: bool = True):
        """
        Args:
          context: context length in tokens.
          num_threads: number of threads; 0 is one a core.
          warmup: run the model once before the first request.
        """
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.warmup = warmup
        parameters.verbosity = -1
        parameters.cpuparams.n_threads = num_threads or os.cpu_count() or 1
        parameters.hostnames = ["127.0.0.1"]
        parameters.port = 0
        self._server = xllamacpp.Server(parameters)
        self._address = self._server.listening_address

    def generate(self, prompt: Sequence[int], new_tokens: int, *, cached: bool = True) -> int:
        """Generates greedy tokens after a prompt whose beginning may be in the cache; returns their number."""
        return self.complete(prompt, new_tokens, cached=cached)["tokens_predicted"]

    def complete(self, prompt: Sequence[int], new_tokens: int, *, cached: bool, **more: Any) -> dict[str, Any]:
        """The server's response to a request for greedy tokens without stop tokens; `more` are further fields."""
        asked = {
            "prompt": list(prompt),
            "n_predict": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": cached,
        }
        return self.post("/completion", {**asked, **more})

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        # No proxy: the server is on loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=600) as response:
            return json.load(response)
