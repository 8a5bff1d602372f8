"""What a run checks before it starts: ranks, devices, configuration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from training_cases import on_fake_ranks, smoke

from geoalign.config.training import RunConfig
from geoalign.errors import RunError, UsageError
from geoalign.flow.reuse import DriftProfile
from geoalign.jobs.train_resume import refuse_disagreement
from geoalign.training.drift import ProfileFile, same_on_all
from geoalign.training.processes.device import device_of
from geoalign.training.processes.ranks import Ranks
from geoalign.training.processes.torchrun import ranks_of_environment


class TestStart:
    def test_ranks_that_found_other_checkpoints_refuse_to_start(self) -> None:
        def start(iteration: int, data: str = "d") -> Callable[[Ranks], None]:
            return lambda ranks: refuse_disagreement(ranks, iteration * ranks.rank, "c", data)

        on_fake_ranks(2, start(0))
        with pytest.raises(RunError, match=r"iteration 0 .*; iteration 5 .*same folder"):
            on_fake_ranks(2, start(5))

    def test_ranks_that_read_other_drift_profiles_refuse_to_start(self) -> None:
        def read(contents: str) -> Callable[[Ranks], ProfileFile | None]:
            profile = DriftProfile((0.5, 0.4), (0.0, 1.0))
            return lambda ranks: same_on_all(ProfileFile(profile, contents[ranks.rank]), ranks)

        assert [file.content for file in on_fake_ranks(2, read("aa"))] == ["a", "a"]
        with pytest.raises(RunError, match=r"2 different drift profiles: ode.reuse_profile must be the same file"):
            on_fake_ranks(2, read("ab"))

    def test_a_rank_that_nobody_joins_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        for missing in ("MASTER_ADDR", "127.0.0.1"):  # not set; nobody listens there
            with (
                pytest.raises(RunError, match=rf"rank 1 of 2: the ranks did not meet \(.*{missing}.*start all"),
                ranks_of_environment(1, 0.2, cuda=False),
            ):
                raise AssertionError("it went on alone")
            monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    @pytest.mark.parametrize("device", ["auto", "cuda"])
    def test_more_processes_than_gpus_are_refused_by_all_of_them(
        self, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert device_of(RunConfig(device=device)) == torch.device("cuda", 1)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        with pytest.raises(UsageError, match="2 CUDA devices for 3 processes"):
            device_of(RunConfig(device=device))

    def test_without_a_gpu_auto_is_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert device_of(RunConfig(device="auto")) == torch.device("cpu")
        with pytest.raises(UsageError, match="geoalign doctor"):
            device_of(RunConfig(device="cuda"))

    def test_a_window_that_does_not_fit_is_refused_when_the_configuration_is_read(self) -> None:
        with pytest.raises(ValidationError, match=r"window.max_start 9 must lie between window.start 0 and \d"):
            smoke(window={"max_start": 9})
