"""llama.cpp as an independent oracle: the `xllamacpp` wheel's server, inside this process, on loopback."""
from __future__ import annotations

import json
import urllib.request
from pathlib import Path


class LlamaServer:
    """Serves one GGUF file; it stops when the object is garbage."""

    def __init__(self, model: Path, *, context: int = 512):
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.warmup = False
        parameters.verbosity = -1
        parameters.cpuparams.n_threads = 1
        parameters.hostnames = ["127.0.0.1"]
        parameters.port = 0
        self._server = xllamacpp.Server(parameters)
        self.address = self._server.listening_address

    def tokenize(self, text: str, *, control: bool) -> list[int]:
        """Token ids without BOS; `control` parses control-token text (llama.cpp's parse_special)."""
        return self.post("/tokenize", {"content": text, "add_special": False, "parse_special": control})["tokens"]

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        # No proxy: the server is on loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as response:
            return json.load(response)
