"""vLLM's API server, which keeps SIGTERM blocked where whoever starts it has blocked it.

Starting Python's resource tracker would unblock it, in every process of the server. vLLM imports
this module as the main module of its own processes too.
"""

import multiprocessing.resource_tracker
import runpy
import signal

if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
    multiprocessing.resource_tracker._HAVE_SIGMASK = False  # type: ignore[attr-defined]

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
