"""What counts as an order to stop: signals that this process sends to itself, at times of a clock of the test."""

from __future__ import annotations

import os
import signal
import time

import pytest

from zinf_cli.launch.stop_signals import StopSignals

TERM, INT, USR1, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP


@pytest.mark.parametrize(
    ("sent", "orders"),
    [
        ([(0.0, TERM)], 1),
        ([(0.0, TERM), (0.9, TERM)], 1),  # Slurm at the end of a job
        ([(0.0, TERM), (1.1, TERM)], 2),
        ([(0.0, TERM), (0.1, INT)], 2),
        ([(0.0, INT), (0.1, INT)], 2),
        ([(0.0, INT), (0.1, TERM), (0.2, TERM)], 2),
        ([(0.0, USR1), (5.0, USR1)], 1),
        ([(0.0, USR1), (90.0, TERM), (90.1, TERM)], 2),  # Slurm's warning, and then its time limit
        ([(0.0, HUP), (5.0, HUP)], 1),
        ([(0.0, None), (0.1, TERM), (0.2, TERM)], 1),  # Slurm, whose order a node has heard before the launcher
        ([(0.0, TERM), (0.1, None)], 1),
        ([(0.0, None), (1.1, TERM)], 2),
    ],
)
def test_orders_to_stop(
    sent: list[tuple[float, signal.Signals | None]], orders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: other processes of the run have got a SIGTERM."""
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    previous = [signal.getsignal(number) for number in (TERM, INT, USR1)]
    try:
        with StopSignals() as stop_signals:
            for now, number in sent:
                with monkeypatch.context() as clock:
                    clock.setattr(time, "monotonic", lambda now=now: 1000.0 + now)
                    if number is None:
                        stop_signals.told_elsewhere()
                    else:
                        os.kill(os.getpid(), number)
            assert stop_signals.received == orders
        assert [signal.getsignal(number) for number in (TERM, INT, USR1)] == previous
    finally:
        signal.signal(signal.SIGHUP, hang_up)
