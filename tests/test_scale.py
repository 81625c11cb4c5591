"""Several processes that wait for one another, and checkpoints written while training goes on."""
import contextlib
import os
import random
import shutil
import threading
import time

import processes
import pytest
import torch
from test_train import TINY, assert_same, final_state, run, tiny_nets

import train_repae_e as train
from models.runtime import distributed, files, trainer
from models.runtime.data import EndlessSampler


# ---------------------------------------------------------------- waiting for one another

def main(argv):
    """What each of two processes does; `processes` starts it."""
    {"hang": hang, "shard": shard, "meet": meet}[argv[0]](argv[1])


def hang(done):
    """The second process is late and says why; then it hangs without a word."""
    distributed.PATIENCE, distributed.LONG_PATIENCE, distributed.SAY_EVERY = 1.0, 60.0, 0.5
    rank, _, _ = distributed.init()
    assert [distributed.any_process(rank == 1), distributed.any_process(False)] == [True, False]
    assert distributed.gather(rank) == [0, 1] and distributed.from_main(lambda: f"of {rank}") == "of 0"
    with pytest.raises(FileNotFoundError):
        distributed.from_main(lambda: open("no such file"))
    if rank == 1:
        with distributed.busy("drawing pictures"):
            time.sleep(2)   # beyond PATIENCE
    distributed.barrier()
    if rank == 1:   # asleep until the other has given it up
        while not os.path.exists(done):
            time.sleep(0.05)
        os._exit(0)
    with pytest.raises(TimeoutError) as at_a_meeting:
        distributed.barrier()
    with pytest.raises(RuntimeError) as in_a_step:
        distributed.all_reduce_sum(torch.ones(1))
    print(f"meeting: {at_a_meeting.value}\nstep: {distributed.lost_process(in_a_step.value)}", flush=True)
    open(done, "w").close()
    os._exit(0)


def test_a_process_that_hangs_is_named_and_one_at_work_is_waited_for(tmp_path):
    processes.run_two("test_scale", ["hang", tmp_path / "done"], tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert "waiting for process 1 (pid " in text and "), drawing pictures (" in text
    for begin in ("meeting: the others have waited ", "step: process 1 (pid "):
        line, = (line for line in text.splitlines() if line.startswith(begin))
        assert "process 1 (pid " in line and "process 0" not in line
    assert distributed.lost_process(RuntimeError("another kind")) is None


def meet(done):
    """Join the others, and die without a farewell."""
    rank, _, _ = distributed.init()
    assert distributed.gather(rank) == [0, 1]
    open(done + str(rank), "w").close()
    time.sleep(600)


def test_processes_that_torchrun_starts_anew_find_one_another(tmp_path):
    """torchrun --max-restarts keeps its store, which then holds the addresses of those who died."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
              "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for count in ("0", "1"):
        log, done = tmp_path / "log", tmp_path / f"done {count} "
        both = [processes.start("test_scale", ["meet", done], log, RANK=rank, LOCAL_RANK=rank, **common,
                                TORCHELASTIC_RESTART_COUNT=count) for rank in ("0", "1")]
        processes.wait_for(lambda done=done: all(os.path.exists(f"{done}{r}") for r in (0, 1)), both, log, 60)
        for process in both:
            processes.kill(process)


# ---------------------------------------------------------------- moments shared out

def three_steps(nets, args):
    """The second is skipped: the first process has a pixel that is not finite."""
    for step in range(1, 4):
        images = torch.arange(args.batch_size * 3 * 32 * 32).mul(step * 7 + 1).remainder(256).to(torch.uint8)
        images = images.view(-1, 3, 32, 32)[trainer.my_share(args)]
        batch = train.make_batch(nets, args, step, images, torch.arange(len(images)))
        if step == 2 and distributed.is_main():
            batch.images[0, 0, 0, 0] = float("nan")
        _, skip = train.train_step(nets, args, batch)
        assert skip.item() == (step == 2)


def shard(path):
    """Trains with and without, writes the sharded run's checkpoint; then both go on from it."""
    distributed.init()
    flags = ["--max-grad-norm", "0.1"]
    plain, args = tiny_nets(*flags)
    three_steps(plain, args)
    sharded, args = tiny_nets(*flags, "--shard-optimizer")
    three_steps(sharded, args)
    states = [trainer.checkpoint_state(nets, args, 3) for nets in (plain, sharded)]
    bytes_of = [sum(t.numel() * 4 for o in nets.opts.values() for v in o.state.values() for t in v.values())
                for nets in (plain, sharded)]
    assert sum(distributed.gather(bytes_of[1])) == bytes_of[0] and bytes_of[1] < 0.6 * bytes_of[0]
    if distributed.is_main():
        assert_close(*states)
        files.save(states[1], path)
        print(f"moments: {bytes_of[0]} bytes without, {bytes_of[1]} with", flush=True)
    distributed.barrier()
    for nets in (plain, sharded):
        trainer.restore(nets, path, files.load(path))
        three_steps(nets, args)
    assert_close(*(dict(nets.sit.state_dict()) for nets in (plain, sharded)))
    distributed.shut_down()


def assert_close(a, b):
    """Within 1e-6, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        [assert_close(a[k], b[k]) for k in a]
    elif isinstance(a, list):
        [assert_close(x, y) for x, y in zip(a, b, strict=True)]


def test_shared_out_moments_give_the_same_run_and_a_checkpoint_for_any_number_of_processes(tmp_path):
    processes.run_two("test_scale", ["shard", tmp_path / "a.pt"], tmp_path / "log")
    nets, args = tiny_nets()
    state = files.load(tmp_path / "a.pt")
    assert trainer.restore(nets, "a.pt", state) == 3
    assert_same(nets.opts["vae"].state_dict()["state"], state["opt_vae"]["state"])


def test_another_number_of_processes_on_resume_repeats_and_misses_no_image():
    """Steps of 12 images of 50: 3 by one process, 5 by four, the rest by two; over three epochs."""
    seen = []
    for first, last, n in ((0, 3, 1), (3, 8, 4), (8, 13, 2)):
        shares = [iter(EndlessSampler(50, 12, rank, n, seed=3, start_step=first)) for rank in range(n)]
        for _ in range(first, last):
            seen += [next(share) for share in shares for _ in range(12 // n)]
    for epoch in range(3):
        assert sorted(i for e, i in seen if e == epoch) == list(range(50))


# ---------------------------------------------------------------- checkpoints in the background

@pytest.fixture
def slow_save(monkeypatch):
    """Each write waits for this event first."""
    go, save = threading.Event(), files.save

    def waiting(obj, path):
        assert go.wait(60)
        save(obj, path)
    monkeypatch.setattr(files, "save", waiting)
    yield go
    go.set()


def test_a_checkpoint_is_the_state_at_its_step_whatever_training_does_meanwhile(tmp_path, slow_save):
    nets, args = tiny_nets("--keep-checkpoints", "1", "--milestones-every", "2")
    writer = trainer.CheckpointWriter(args, tmp_path)
    for step in (1, 2, 3, 4, 5):
        state = trainer.checkpoint_state(nets, args, step)
        torch.save(state, tmp_path / "now.pt")
        slow_save.clear()
        began = time.monotonic()
        writer.save(state)
        assert time.monotonic() - began < 5 and writer.last != str(tmp_path / f"checkpoints/{step:07d}.pt")
        for p in nets.sit.parameters():     # training goes on
            p.data.add_(1)
        slow_save.set()
        writer.wait()
        assert_same(torch.load(tmp_path / "now.pt"), files.load(writer.last))
    assert files.checkpoint_steps(tmp_path / "checkpoints") == [2, 4, 5]


@pytest.mark.parametrize("error, code, words", [
    (OSError(28, "No space left on device"), 1, "No space left"),
    (files.NotFinite("x.pt: not written, because model.a holds NaN or infinity"), 1, "stopped: x.pt")])
def test_a_failed_write_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys, error, code, words):
    def fail(*_):
        raise error
    monkeypatch.setattr(files, "save", fail)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--max-train-steps", "200")
    shown = capsys.readouterr()
    assert stop.value.code == code and words in shown.err + shown.out and "Traceback" not in shown.err
    assert len((tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()) < 100


def test_killed_while_a_checkpoint_is_written(tmp_path):
    """KILLS=20 repeats it; each time at another moment of a write, and the run goes on to the same bits."""
    flags = ["--max-train-steps", "6", "--checkpointing-steps", "1", "--keep-checkpoints", "2"]
    torch.set_num_threads(1)
    whole = final_state(run(tmp_path / "whole", *flags), 6)
    whole["args"].pop("output_dir")
    for k in range(int(os.environ.get("KILLS", 1))):
        folder, log = tmp_path / f"{k}" / "demo" / "checkpoints", tmp_path / f"log{k}"
        process = processes.start("train_repae_e", [*TINY, "--output-dir", tmp_path / f"{k}", *flags], log)

        def writing():
            with contextlib.suppress(FileNotFoundError):
                return len(os.listdir(folder)) > k % 3 and any(n.endswith(".tmp") for n in os.listdir(folder))
        processes.wait_for(writing, [process], log)
        time.sleep(random.Random(k).random() * 0.02)
        processes.kill(process)
        for step in files.checkpoint_steps(folder):
            files.load(folder / f"{step:07d}.pt")   # whole
        resumed = final_state(run(tmp_path / f"{k}", *flags), 6)
        resumed["args"].pop("output_dir")
        assert_same(whole, resumed)
        assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
        shutil.rmtree(tmp_path / f"{k}")


def test_a_full_gpu_ends_in_one_line(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    monkeypatch.setattr(train, "train_step", fail)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--max-train-steps", "2", "--gradient-accumulation-steps", "2")
    text = capsys.readouterr().err
    assert stop.value.code == 1 and text.count("\n") == 1 and "Tried to allocate 2.00 GiB" in text
    assert "--batch-size" in text and "--gradient-accumulation-steps" in text and "--grad-checkpoint" in text
