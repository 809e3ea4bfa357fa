"""vLLM's CPU build in an environment of its own: a worker process that exchanges lines of JSON.

This file is both ends. The other environment's Python runs the worker, which imports
vllm and the standard library only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HOW_TO_INSTALL = (
    "see docs/benchmarks.md (vLLM in an environment of its own), then --config.vllm_python=/path/to/that/bin/python"
)


class Worker:
    """A model in vLLM, with prefix caching on."""

    def __init__(self, python: str, directory: Path, dtype: str, *, max_length: int, kv_gib: float, num_threads: int):
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(num_threads or os.cpu_count() or 1),
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, __file__, str(directory), dtype, str(max_length)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._answer()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Greedy tokens of all prompts at once."""
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self) -> list[list[int]]:
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"the vLLM worker ended with code {self._process.wait()}: see its output above")


def _serve(directory: str, dtype: str, max_length: int) -> None:
    import vllm

    model = vllm.LLM(
        model=directory, dtype=dtype, skip_tokenizer_init=True, enable_prefix_caching=True, max_model_len=max_length
    )
    print("ANSWER []", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        settings = vllm.SamplingParams(
            temperature=0.0, max_tokens=task["new_tokens"], ignore_eos=True, detokenize=False
        )
        outputs = model.generate([{"prompt_token_ids": prompt} for prompt in task["prompts"]], settings, use_tqdm=False)
        print("ANSWER " + json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
