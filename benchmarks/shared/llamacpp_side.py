"""The llama.cpp side of `llamacpp.py`, in a separate process, which may run another Python.

Reads a request a line from stdin, `{"prompt": [ids], "tokens": n}`, and answers each with a line on stdout,
`{"seconds": s, "ids": [ids], "first_seconds": s}`. Greedy; the prompt is processed again every time. Imports only
llama-cpp-python, so that it runs where spdbench is not installed.

    python benchmarks/shared/llamacpp_side.py FILE.gguf THREADS CONTEXT
"""

from __future__ import annotations

import importlib
import json
import sys
import time


def main() -> None:
    file, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    llama_cpp = importlib.import_module("llama_cpp")
    model = llama_cpp.Llama(file, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
    for line in sys.stdin:
        request = json.loads(line)
        model.reset()  # else it reuses its cache of the prompt
        start = time.perf_counter()
        new = model.generate(request["prompt"], temp=0.0)
        ids = [next(new)]
        first_seconds = time.perf_counter() - start
        ids += (next(new) for _ in range(request["tokens"] - 1))
        answer = {"seconds": time.perf_counter() - start, "ids": ids, "first_seconds": first_seconds}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
