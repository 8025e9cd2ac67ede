"""Processes that share a batch take the step that one alone would take with all of it."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

from policies.errors import ProcessError
from policies.parallel import ALONE, Processes, join_processes

#: Each of two processes has a part of another size, and one head of the network is used by the second one only.
SCRIPT = """
import sys
from datetime import timedelta
import torch
from torch import nn
from torch.distributed.distributed_c10d import _get_default_group
from policies.losses import (
    huber, log_partition_variance_loss, square, trajectory_balance_loss, trajectory_balance_residual
)
from policies.parallel import ALONE, join_processes

class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList([nn.Linear(3, 1) for _ in range(3)])
        self.log_Z = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def gradients(self, name, x, log_reward, penalty, processes):
        log_pf = self.heads[0](x).squeeze(1)
        late = log_reward > 5.0
        if late.any():
            log_pf = log_pf + torch.where(late, self.heads[1](x).squeeze(1), 0.0)
        log_pf, log_pb = log_pf.double(), torch.zeros(len(x), dtype=torch.float64)
        if name == "tb":
            residual = trajectory_balance_residual(self.log_Z, log_pf, log_pb, log_reward)
            loss, log_Z = trajectory_balance_loss(residual, penalty, processes.total), self.log_Z
        else:
            loss, log_Z = log_partition_variance_loss(
                log_pf, log_pb, log_reward, penalty=penalty, total=processes.total
            )
        self.zero_grad(set_to_none=True)
        loss.backward()
        processes.sum_gradients(self.parameters())
        return processes.total(loss.detach()), log_Z.detach(), [p.grad for p in self.parameters()]

processes = join_processes(patience=timedelta(days=365))
assert processes.world == 2
generator = torch.Generator().manual_seed(1)
x = torch.randn(12, 3, generator=generator)
log_reward = torch.cat([torch.zeros(5), torch.full((7,), 6.0)]).double()
log_reward += torch.randn(12, generator=generator)
rows = slice(0, 5) if processes.rank == 0 else slice(5, 12)
policy = Policy()
for name in ("tb", "vargrad"):
    for penalty in (square, huber(1.0)):
        together = policy.gradients(name, x[rows], log_reward[rows], penalty, processes)
        alone = policy.gradients(name, x, log_reward, penalty, ALONE)
        for found, wanted in zip(together[:2], alone[:2], strict=True):
            torch.testing.assert_close(found, wanted)
        for found, wanted in zip(together[2], alone[2], strict=True):
            assert (found is None) == (wanted is None)
            torch.testing.assert_close(found, wanted)
        unused = [gradient is None for gradient in together[2]]
        assert sum(unused) == (2 if name == "tb" else 3)
assert processes.from_first({"given": processes.rank}) == {"given": 0}
patience = [
    group._get_backend(torch.device("cpu")).options._timeout for group in (_get_default_group(), processes.patient)
]
assert patience[0] < timedelta(hours=1), patience
assert patience[1] == timedelta(days=365), patience
del processes  # a group to which something refers is not left at the end
"""


def test_two_processes_take_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    script = tmp_path / "step.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr


def test_one_whose_first_process_has_ended_says_so_and_ends(tmp_path: Path) -> None:
    script = tmp_path / "end.py"
    script.write_text(
        "import os\nfrom datetime import timedelta\nfrom policies.parallel import join_processes\n"
        "processes = join_processes(patience=timedelta(days=365))\n"
        "if processes.rank == 0:\n    os._exit(1)\n"
        "processes.from_first()\n"
    )
    # Without torchrun, which would end the second one.
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    first, second = (
        subprocess.Popen(
            [sys.executable, str(script)], env={**os.environ, **shared, "RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    )
    assert "ProcessError: another process of this training has ended" in second.communicate(timeout=60)[1]
    assert second.returncode != 0
    first.communicate(timeout=60)


def test_peers_that_do_not_come_are_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "host"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)

    def nobody(*_: object, timeout: timedelta | None = None) -> None:
        assert timeout is None, "patience is for the first process, not for those who may never come"
        raise distributed.DistNetworkError("timed out")

    monkeypatch.setattr(distributed, "init_process_group", nobody)
    with pytest.raises(ProcessError, match=r"at host:29500 \(timed out\); start all of them with torchrun"):
        join_processes(patience=timedelta(days=365))
    monkeypatch.undo()
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ProcessError, match="MASTER_ADDR expected, but not set"):
        join_processes()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_shares_make_up_the_batch() -> None:
    for n, world in ((1024, 2), (10, 4), (3, 3)):
        shares = [Processes(rank, world).share(n) for rank in range(world)]
        assert sum(shares) == n
        assert max(shares) - min(shares) <= 1


def test_shares_of_parts_make_up_the_share_of_the_whole() -> None:
    for parts, world in (((6, 6, 0), 4), ((4, 4, 8), 8), ((1, 1, 1), 3), ((5, 0, 7), 5)):
        for process in (Processes(rank, world) for rank in range(world)):
            shares = [process.share(n, start=sum(parts[:i])) for i, n in enumerate(parts)]
            assert sum(shares) == process.share(sum(parts))
            assert all(abs(share - n / world) < 1 for share, n in zip(shares, parts, strict=True))


def test_one_process_alone_changes_nothing(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert join_processes() == ALONE
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    used.square().sum().backward()
    ALONE.sum_gradients([used, unused])
    assert used.grad is not None
    assert used.grad.tolist() == [2.0, 2.0]
    assert unused.grad is None
    assert ALONE.share(7) == 7
    assert ALONE.total(used) is used
    assert ALONE.from_first("word") == "word"
