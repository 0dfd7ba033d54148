#!/bin/sh
# Guess: a TCPStore that is made for 127.0.0.1 listens on 127.0.0.1.
# Found: the address only tells clients where to connect. The server binds every interface; only a socket that was bound
# beforehand and handed over (master_listen_fd) keeps it on one.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy psutil==7.1.3
"$folder/venv/bin/python" - <<'PY'
import socket, sys
import psutil, torch
from torch.distributed import TCPStore


def listening(port):
    return {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}


plain = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
handed = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
print(f"torch {torch.__version__}: TCPStore('127.0.0.1') listens on {sorted(listening(plain.port))}")
print(f"with master_listen_fd of a socket bound to 127.0.0.1: {sorted(listening(port))}")
sys.exit(not (listening(plain.port) & {"::", "0.0.0.0"} and listening(port) == {"127.0.0.1"}))
PY
