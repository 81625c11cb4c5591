"""models/runtime/distributed.py: start-up, processes that wait for one another, batch norm over all."""
import datetime
import os
import time
import warnings

import processes
import pytest
import torch
from torch import nn

from models.runtime import distributed

GROUP = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}


@pytest.fixture(autouse=True)
def no_group(monkeypatch):
    for name in GROUP:
        monkeypatch.delenv(name, raising=False)


# ---------------------------------------------------------------- one process

def test_one_process():
    """It needs no group."""
    assert distributed.init() == (0, 1, torch.device("cpu"))
    assert distributed.gather("a") == ["a"] and distributed.any_process(True) and distributed.is_main()
    distributed.check_same({"--seed": 1})
    distributed.barrier()
    distributed.shut_down()


@pytest.mark.parametrize("local_rank, count, device", [("3", 8, 3), ("3", 1, None)])
def test_which_gpu(monkeypatch, local_rank, count, device):
    """Two processes must not share one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    if device is None:
        with pytest.raises(ValueError, match="--nproc-per-node"):
            distributed.choose_device()
    else:
        assert distributed.choose_device() == torch.device("cuda", device)


# ---------------------------------------------------------------- two processes

def main(argv):
    """What each of two processes does; `processes` starts it."""
    {"meet": meet, "hang": hang, "die": die, "restart": restart}[argv[0]](argv[1])


def meet(_):
    rank, world_size, _ = distributed.init()
    assert (rank, world_size) == (distributed.rank(), 2) and distributed.gather(rank) == [0, 1]
    assert [distributed.any_process(rank == 1), distributed.any_process(False)] == [True, False]
    distributed.check_same({"--seed": 1, "data": "a"})
    with pytest.raises(ValueError) as error:
        distributed.check_same({"--seed": 1, "data": f"of {rank}", "more": rank})
    assert "data differs between processes: of 0 in rank 0, of 1 in rank 1" in str(error.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_batch_norm(rank)
    distributed.shut_down()


def check_batch_norm(rank):
    """Statistics, output and gradients of two halves are those of one BatchNorm2d over the whole batch."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5, 5, dtype=torch.float64)
    whole = nn.BatchNorm2d(4).double()
    torch.nn.init.uniform_(whole.weight)
    halves = distributed.sync_batch_norms(nn.Sequential(nn.BatchNorm2d(4)).double())
    halves[0].load_state_dict(whole.state_dict())
    mine = slice(3 * rank, 3 * rank + 3)
    a, b = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
    expected, found = whole(a), halves(b)
    torch.testing.assert_close(found, expected[mine])
    expected.pow(3).sum().backward()
    found.pow(3).sum().backward()
    torch.testing.assert_close(b.grad, a.grad[mine])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(halves[0].state_dict()[name], value)


def hang(done):
    """The second process hangs without a word."""
    distributed.PATIENCE = datetime.timedelta(seconds=1)
    rank, _, _ = distributed.init()
    if rank == 1:
        while not os.path.exists(done):
            time.sleep(0.05)
        os._exit(0)
    with pytest.raises(ConnectionError) as error:
        distributed.barrier()
    print(f"found: {error.value}", flush=True)
    open(done, "w").close()
    os._exit(0)


def die(_):
    """The second process ends; the first one says so in one line, in a barrier and in a collective."""
    rank, _, _ = distributed.init()
    if rank == 1:
        os._exit(0)
    with pytest.raises(ConnectionError) as error:
        distributed.barrier()
    with pytest.raises(RuntimeError) as in_a_step:
        distributed.all_reduce_sum(torch.ones(1))
    assert "\n" not in str(error.value) and "\n" not in distributed.lost_process(in_a_step.value)
    os._exit(0)


def restart(done):
    rank, _, _ = distributed.init()
    assert distributed.gather(rank) == [0, 1]
    open(done + str(rank), "w").close()
    time.sleep(600)


@pytest.mark.parametrize("what, words", [("meet", ""), ("hang", "Ranks 1 failed"), ("die", "")])
def test_two_processes(tmp_path, what, words):
    processes.run_two("test_distributed", [what, tmp_path / "done"], tmp_path / "log")
    assert words in (tmp_path / "log").read_text()
    assert distributed.lost_process(RuntimeError("another kind")) is None


def test_processes_that_torchrun_restarts_find_one_another(tmp_path):
    """torchrun --max-restarts keeps its store, which then has the addresses of those who died."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
              "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for count in ("0", "1"):
        log, done = tmp_path / "log", tmp_path / f"done {count} "
        both = [processes.start("test_distributed", ["restart", done], log, RANK=rank, LOCAL_RANK=rank,
                                **common, TORCHELASTIC_RESTART_COUNT=count) for rank in ("0", "1")]
        processes.wait_for(lambda done=done: all(os.path.exists(f"{done}{r}") for r in (0, 1)), both, log, 60)
        for process in both:
            processes.kill(process)
