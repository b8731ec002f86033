"""Peers with environments of their own, where somebody has put them: VATTENTION_PEER_VLLM and VATTENTION_PEER_OPENVINO
are their folders, VATTENTION_PEER_MODEL a directory of safetensors, VATTENTION_PEER_OPENVINO_MODEL an exported one."""

import os

import pytest

from vattention.cli import main

MODEL = os.environ.get("VATTENTION_PEER_MODEL")
SMALL = [
    *("--requests", "2", "--prompt-tokens", "40", "--output-tokens", "4", "--rounds", "1", "--kv-cache-memory", "1GiB"),
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bench", ["throughput", "latency"])
@pytest.mark.parametrize("peer", ["vllm", "openvino"])
def test_a_peer_of_its_own(bench: str, peer: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = os.environ.get(f"VATTENTION_PEER_{peer.upper()}")
    if folder is None or MODEL is None:
        pytest.skip(f"VATTENTION_PEER_{peer.upper()} and VATTENTION_PEER_MODEL name no environment and model")
    exported = os.environ.get(f"VATTENTION_PEER_{peer.upper()}_MODEL")
    own = [] if exported is None else ["--peer-model", f"{peer}={exported}"]
    assert main(["bench", bench, MODEL, *SMALL, "--peer", f"{peer}={folder}", *own]) == 0
    assert "DIFFERENT" not in capsys.readouterr().out
