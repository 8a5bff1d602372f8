"""Which signals stop a run cleanly, and which at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from geoalign.cli import main as cli
from geoalign.errors import Stopped
from geoalign.jobs.stop import StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_any_number_of_sigterm_is_one(first: signal.Signals) -> None:
    with StopRequest().installed() as stop:
        assert not stop.signal_name
        send(first, *[signal.SIGTERM] * 20)
    assert stop.signal_name == first.name
    send(signal.SIGTERM)  # while the process closes down: its exit code stays


@pytest.mark.parametrize(("under_torchrun", "presses"), [(False, 2), (True, 3)])
def test_a_second_ctrl_c_interrupts_at_once(
    under_torchrun: bool, presses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers of torchrun get the first one twice: from the terminal, and passed on."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(KeyboardInterrupt), StopRequest().installed() as stop:
        for press in range(1, presses + 1):
            assert stop.presses == press - 1
            send(signal.SIGTERM, signal.SIGINT)


def test_without_a_signal_everything_is_as_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().installed():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stopped_run_has_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: list[str]) -> int:
        raise Stopped("stopped after iteration 3 of 9; continue with --resume auto")

    monkeypatch.setattr(cli, "_dispatch", stopped)
    assert cli.main(["train"]) == 75 and "75" in cli.help_text()
    assert capsys.readouterr().err == "geoalign: stopped after iteration 3 of 9; continue with --resume auto\n"
